"""Where do two models choose differently?

Of the same tokens: by layer, the mean FFN experts per token of each, the mean absolute difference
for a token, and the correlation between the two over token ids. The token ids are those that occur
often enough, with the largest differences of their mean FFN experts first, the mean of the layers;
standard errors take documents as samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from moepp_jax.analysis import drawing, means, words
from moepp_jax.analysis.question import Question, Table, labels
from moepp_jax.analysis.record import Record

_NAMED = 12  # in the figure


class Found(NamedTuple):
    ids: np.ndarray  # [I] the largest differences first
    count: np.ndarray  # [I]
    ours: np.ndarray  # [I]
    theirs: np.ndarray  # [I]
    error: np.ndarray  # [I] of the difference
    layers: list[tuple[float, float, float, float]]


class Differences(Question):
    place = 10
    makes = ("differences", "differences_tokens")

    def __init__(self) -> None:
        super().__init__()
        self._compared: tuple[Sequence[Record], Found] | None = None

    def missing(self, records: Sequence[Record]) -> str:
        if len(records) != 2:
            return "There is one record, and nothing to compare it with."
        a, b = records
        if not np.array_equal(a.rows.token, b.rows.token):
            return "The two records are not of the same tokens."
        if a.num_layers != b.num_layers:
            return f"The models have {a.num_layers} and {b.num_layers} MoE layers."
        return ""

    def compared(self, records: Sequence[Record]) -> Found:
        if self._compared is None or self._compared[0] is not records:
            self._compared = records, _compare(*records)
        return self._compared[1]

    def tables(self, records: Sequence[Record]) -> dict[str, Table]:
        found, (ours, theirs) = self.compared(records), labels(records)
        numbers = [
            (a if a == b else f"{a} / {b}")
            for a, b in zip(*(record.meta.layers for record in records), strict=True)
        ]
        layers = [(number, *row) for number, row in zip(numbers, found.layers, strict=True)]
        columns = ["layer", f"FFN experts, {ours}", f"FFN experts, {theirs}"]
        columns += ["mean absolute difference", "correlation over ids"]
        tokens = [
            (int(token), words.shown(records[0], int(token)), int(count), a, b, a - b, error)
            for token, count, a, b, error in zip(*found[:5], strict=True)
        ]
        heads = ["id", "token", "occurrences", *columns[1:3], "difference", "standard error"]
        return {
            "differences": Table(columns, layers, shown=40),
            "differences_tokens": Table(heads, tokens),
        }

    def said(self, records: Sequence[Record]) -> list[str]:
        found, (ours, theirs) = self.compared(records), labels(records)
        a, b, apart, _ = np.mean(np.array(found.layers, float), axis=0)
        return [
            f"FFN experts per token: {ours} {a:.3f}, {theirs} {b:.3f}; in a layer they are "
            f"{apart:.3f} apart for a token. The correlations are over {len(found.ids):,} ids."
        ]

    def figure(self, records: Sequence[Record]) -> Figure:
        found, (ours, theirs) = self.compared(records), labels(records)
        figure = drawing.new(12, 4.2)
        scatter, *by_layer = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
        some = slice(2000)
        x, y = found.theirs[some], found.ours[some]
        scatter.plot(x, y, "o", color=drawing.RUN_COLORS[0], ms=3.5, alpha=0.5, mew=0)
        low, high = (f(np.concatenate([x, y]), **i) for f, i in ((np.min, {}), (np.max, {})))
        scatter.plot([low, high], [low, high], color=drawing.GREY, lw=1)
        scatter.set_xlabel(f"FFN experts of a token id, {drawing.label(theirs, 30)}")
        scatter.set_ylabel(f"FFN experts of a token id, {drawing.label(ours, 30)}")
        drawing.tidy(scatter, "both")
        names = [words.shown(records[0], int(token)) for token in found.ids[:_NAMED]]
        drawing.named_points(scatter, names, x[:_NAMED], y[:_NAMED])
        rows = np.array(found.layers, float)
        said = ("mean absolute difference of a token", "correlation over token ids")
        for axes, values, label in zip(by_layer, rows[:, 2:].T, said, strict=True):
            axes.plot(records[0].meta.layers, values, color=drawing.RUN_COLORS[0], marker="o", ms=4)
            drawing.by_layer(axes, label)
        drawing.from_zero(by_layer[0])
        by_layer[1].set_ylim(-1.05 if np.nanmin(rows[:, 3], initial=0) < 0 else -0.02, 1.05)
        return figure


def _compare(a: Record, b: Record) -> Found:
    token, V = a.rows.token, len(a.meta.pieces)
    count = np.bincount(token, minlength=V)
    ids = np.flatnonzero(count >= means.enough(count))
    layers = []
    for x, y in zip(a.ffn.astype(np.float64), b.ffn.astype(np.float64), strict=True):
        by_id = [np.bincount(token, one, V)[ids] / count[ids] for one in (x, y)]
        layers.append((x.mean(), y.mean(), np.abs(x - y).mean(), means.correlation(*by_id)))
    ours, theirs = means.ffn(a), means.ffn(b)
    difference = means.by_group(token, ours - theirs, means.stretches(a), V)
    ids = ids[np.argsort(-np.abs(difference.mean[ids]), kind="stable")]
    each = [np.bincount(token, one, V)[ids] / count[ids] for one in (ours, theirs)]
    return Found(ids, count[ids], *each, difference.error[ids], layers)
