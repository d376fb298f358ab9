"""Which experts are chosen together?

As OLMoE has it: of the tokens that chose expert i in a layer, the share that chose expert j too.
"Expected" is j's share of all the layer's tokens: what it would be if choices did not depend on
each other. Choices count whether or not the expert had room for the token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from moepp_jax.analysis import drawing
from moepp_jax.analysis.question import Question, Table, beside, each_said, expert_names, labels
from moepp_jax.analysis.record import Record


class Coactivation(Question):
    place = 12

    def of(self, record: Record) -> np.ndarray:
        """[J N N] tokens that chose both; on the diagonal, those that chose the expert."""
        return np.stack([_together(record, j) for j in range(record.num_layers)])

    def missing(self, records: Sequence[Record]) -> str:
        if max(record.meta.most for record in records) < 2:
            return "Every token has one expert."
        return ""

    def tables(self, records: Sequence[Record]) -> dict[str, Table]:
        each = []
        for record, both in zip(records, self.found(records), strict=True):
            names, share = expert_names(record.meta), _shares(both)
            expected = np.diagonal(both, axis1=1, axis2=2) / max(record.num_tokens, 1)
            rows = {}
            for j, layer in enumerate(record.meta.layers):
                for a, b in itertools.permutations(range(len(names)), 2):
                    rows[layer, names[a], names[b]] = (share[j, a, b], expected[j, b])
            each.append(dict(sorted(rows.items(), key=lambda row: -row[1][0])))
        keys, columns = ("layer", "of the tokens of", "chose too"), ("share", "expected")
        return {self.name: beside(records, keys, columns, each, shown=10)}

    def said(self, records: Sequence[Record]) -> list[str]:
        lines = []
        for both in self.found(records):
            share = _shares(both)
            share[:, np.arange(share.shape[1]), np.arange(share.shape[1])] = 0
            highest = share.max(axis=2).mean() if share.size else 0.0
            lines.append(
                f"the expert that an expert is chosen with most often has {highest:.1%} of its "
                "tokens, the mean of all experts and layers."
            )
        return each_said(records, lines)

    def figure(self, records: Sequence[Record]) -> Figure:
        found = self.found(records)
        most = drawing.PANELS // len(records)
        shown = [
            (record, share, label, j)
            for record, share, label in zip(
                records, map(_shares, found), labels(records), strict=True
            )
            for j in drawing.chosen(record.num_layers, most)
        ]
        figure, axes = drawing.panels(len(shown), 4, 2.7, 2.6)
        offs = [np.where(np.eye(share.shape[1], dtype=bool), 0, share) for _, share, _, _ in shown]
        highest = max(float(off.max()) for off in offs) or 1.0
        for one, (record, share, label, j) in zip(axes, shown, strict=True):
            off = np.where(np.eye(share.shape[1], dtype=bool), np.nan, share[j])
            image = one.imshow(off, cmap=drawing.SEQUENTIAL, vmin=0, vmax=highest)
            drawing.experts_axis(one, record.meta, "x")
            drawing.experts_axis(one, record.meta, "y")
            run = f"{drawing.label(label)}, " if len(records) > 1 else ""
            one.set_title(f"{run}layer {record.meta.layers[j]}", fontsize=9)
        bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=30)
        bar.set_label("of the row's tokens, share\nthat chose the column too", fontsize=9)
        return figure


def _together(record: Record, j: int) -> np.ndarray:
    N = record.meta.num_experts
    experts = record.rows.experts[j].astype(np.int64)
    both = np.zeros((N + 1, N + 1), np.int64)
    for a, b in itertools.combinations(range(experts.shape[1]), 2):
        pairs = experts[:, a] * (N + 1) + experts[:, b]
        both += np.bincount(pairs, minlength=(N + 1) ** 2).reshape(N + 1, N + 1)
    both = (both + both.T)[:N, :N]
    chosen = np.bincount(experts.reshape(-1), minlength=N + 1)[:N]
    both[np.arange(N), np.arange(N)] = chosen
    return both


def _shares(both: np.ndarray) -> np.ndarray:
    """[J N N] of the tokens of the first expert, those of the second too."""
    chosen = np.diagonal(both, axis1=1, axis2=2)
    return both / np.maximum(chosen, 1)[:, :, None]
