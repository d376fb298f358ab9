"""How sure is the router: how high are the best two probabilities, and how much do they vary?

The two best scores of each token over the sum of all its scores, and the entropy of the scores. The
histogram is over all tokens and MoE layers; mean, variance and range are of each layer. The paper
compares a model with gating residuals and one without, which have the lower variance with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from moepp_jax.analysis import drawing
from moepp_jax.analysis.question import Question, Table, beside, each_said, labels
from moepp_jax.analysis.record import Record

_BINS = 50
_RANKS = ("first", "second")
_RANK_COLORS = ("#332288", "#CC6677")


class Found(NamedTuple):
    density: np.ndarray  # [2 BINS] of each of the two, over all layers
    numbers: np.ndarray  # [J 2 4] mean, variance, lowest, highest
    entropy: np.ndarray  # [J] mean
    variance: np.ndarray  # [2] over all layers


class Scores(Question):
    place = 8
    makes = ("scores", "scores_histogram")

    def of(self, record: Record) -> Found:
        counts, numbers = np.zeros((2, _BINS)), np.full((record.num_layers, 2, 4), np.nan)
        sums = np.zeros((2, 3))
        for j in range(record.num_layers):
            for rank in range(2):
                x = record.rows.scores[j, :, rank].astype(np.float64)
                x = x[np.isfinite(x)]
                if not len(x):
                    continue
                at = np.clip((x * _BINS).astype(np.int64), 0, _BINS - 1)
                counts[rank] += np.bincount(at, minlength=_BINS)
                numbers[j, rank] = x.mean(), x.var(), x.min(), x.max()
                sums[rank] += len(x), x.sum(), (x**2).sum()
        count, total, squares = sums.T
        with np.errstate(invalid="ignore"):
            return Found(
                counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * _BINS,
                numbers,
                record.rows.entropy.mean(axis=1, dtype=np.float64),
                squares / count - (total / count) ** 2,
            )

    def tables(self, records: Sequence[Record]) -> dict[str, Table]:
        found = self.found(records)
        each = [
            {
                (layer,): [*of.numbers[j].reshape(-1), of.entropy[j]]
                for j, layer in enumerate(record.meta.layers)
            }
            for record, of in zip(records, found, strict=True)
        ]
        numbers = ("mean", "variance", "lowest", "highest")
        columns = [f"{rank} {what}" for rank in _RANKS for what in numbers] + ["entropy"]
        edges = [(b / _BINS, (b + 1) / _BINS) for b in range(_BINS)]
        histogram = [dict(zip(edges, of.density.T.tolist(), strict=True)) for of in found]
        density = [f"density of the {rank}" for rank in _RANKS]
        return {
            "scores": beside(records, ("layer",), columns, each, shown=40),
            "scores_histogram": beside(records, ("from", "to"), density, histogram, shown=0),
        }

    def said(self, records: Sequence[Record]) -> list[str]:
        found = self.found(records)
        lines = (
            f"over all layers the variance is {of.variance[0]:.4g} of the first probability and "
            f"{of.variance[1]:.4g} of the second; gating residual: "
            f"{record.meta.rule.get('residual', 'none')}."
            for record, of in zip(records, found, strict=True)
        )
        said = each_said(records, lines)
        residuals = [record.meta.rule.get("residual", "none") != "none" for record in records]
        if sorted(residuals) == [False, True]:
            lower = found[residuals.index(True)].variance < found[residuals.index(False)].variance
            which = [rank for rank, low in zip(_RANKS, lower, strict=True) if low]
            probability = f"the {' and the '.join(which)} probability" if which else "neither"
            said.append(
                f"With gating residuals the variance is lower of {probability}; "
                "in the paper of both."
            )
        return said

    def figure(self, records: Sequence[Record]) -> Figure:
        figure = drawing.new(11, 3.8)
        histogram, variance, entropy = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
        edges = np.linspace(0, 1, _BINS + 1)
        styles = zip(records, self.found(records), drawing.RUN_STYLES, strict=False)
        for number, (record, of, style) in enumerate(styles):
            for rank, color in enumerate(_RANK_COLORS):
                named = _RANKS[rank] if number == 0 else None
                filled = len(records) == 1
                histogram.stairs(
                    of.density[rank], edges, color=color, ls=style, lw=1.4, label=named
                )
                if filled:
                    histogram.stairs(of.density[rank], edges, color=color, fill=True, alpha=0.2)
                line = {"color": color, "ls": style, "marker": "o", "ms": 3.5}
                variance.plot(record.meta.layers, of.numbers[:, rank, 1], **line)
            entropy.plot(record.meta.layers, of.entropy, style, color="0.25", marker="o", ms=3.5)
        histogram.set_xlim(0, 1)
        histogram.set_xlabel("probability")
        histogram.set_ylabel("density")
        drawing.tidy(histogram)
        drawing.by_layer(variance, "variance of the probability")
        drawing.by_layer(entropy, "entropy of the scores, nats")
        for axes in (variance, entropy):
            drawing.from_zero(axes)
        handles, names = histogram.get_legend_handles_labels()
        handles += drawing.run_lines(labels(records))
        names += [handle.get_label() for handle in handles[len(names) :]]
        figure.legend(handles, names, loc="outside upper center", ncols=4, frameon=False)
        return figure
