"""Does a token's place matter for how many FFN experts it gets?

FFN experts per token, averaged over the MoE layers, by the place in the row of tokens that the
model read (32 bins of one width) and by the position in the document (bins that double). Standard
errors take documents as samples, long ones in stretches of 1,024 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from moepp_jax.analysis import drawing, means
from moepp_jax.analysis.question import Question, Table, beside, labels
from moepp_jax.analysis.record import Record

_BINS = 32
_PLACE, _POSITION = "place in the row", "position in the document"


class Bins(NamedTuple):
    first: np.ndarray  # [B]
    last: np.ndarray  # [B]
    means: means.Means  # [B]


class Position(Question):
    place = 6

    def of(self, record: Record) -> dict[str, Bins]:
        place, position = record.rows.place, record.rows.position
        width = -(-(int(place.max(initial=0)) + 1) // _BINS)
        even = np.arange(0, int(place.max(initial=0)) + 1, width)
        doubling = np.append(0, 2 ** np.arange(int(position.max(initial=0)).bit_length()))
        values, sample = means.ffn(record), means.stretches(record)
        found = {}
        for name, where, edges in ((_PLACE, place, even), (_POSITION, position, doubling)):
            group = np.searchsorted(edges, where, side="right") - 1
            each = means.by_group(group, values, sample, len(edges))
            last = np.append(edges[1:] - 1, int(where.max(initial=0)))
            found[name] = Bins(edges, last, each)
        return found

    def tables(self, records: Sequence[Record]) -> dict[str, Table]:
        each = [
            {
                (name, int(first), int(last), int(count)): (mean, error)
                for name, bins in found.items()
                for first, last, mean, error, count in zip(
                    bins.first, bins.last, *bins.means, strict=True
                )
                if count
            }
            for found in self.found(records)
        ]
        keys, columns = ("by", "from", "to", "tokens"), ("FFN experts", "standard error")
        return {self.name: beside(records, keys, columns, each, shown=60)}

    def figure(self, records: Sequence[Record]) -> Figure:
        figure = drawing.new(10, 3.8)
        axes_of = dict(zip((_PLACE, _POSITION), figure.subplots(1, 2, sharey=True), strict=True))
        for found, color in zip(self.found(records), drawing.RUN_COLORS, strict=False):
            for name, bins in found.items():
                # From 1 on, since the logarithmic axis has no place for position 0.
                x = (bins.first + bins.last) / 2 + (1 if name == _POSITION else 0)
                axes_of[name].errorbar(
                    x, bins.means.mean, bins.means.error, color=color, marker="o", ms=4, capsize=2
                )
        for name, axes in axes_of.items():
            axes.set_xlabel(name + (", from 1" if name == _POSITION else ", from 0"))
            drawing.tidy(axes)
        drawing.logarithmic(axes_of[_POSITION])
        axes_of[_PLACE].set_ylabel("FFN experts per token")
        drawing.runs_legend(figure, labels(records))
        return figure
