"""Do frequent tokens get fewer FFN experts than rare ones?

The tokens by how often their id occurs in this text, in bins that double; of each bin the mean FFN
experts per token, averaged over the MoE layers. Standard errors take documents as samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from moepp_jax.analysis import drawing, means
from moepp_jax.analysis.question import Question, Table, beside, each_said, labels
from moepp_jax.analysis.record import Record


class Found(NamedTuple):
    low: np.ndarray  # [B] fewest occurrences of a bin's ids; the most is twice that less 1
    ids: np.ndarray  # [B]
    means: means.Means  # [B]
    correlation: float  # over ids


class Frequency(Question):
    place = 5

    def of(self, record: Record) -> Found:
        token = record.rows.token
        count = np.bincount(token, minlength=len(record.meta.pieces))
        of_id = np.frexp(count.astype(np.float64))[1] - 1  # floor of log2; -1 where there is none
        num = int(of_id.max()) + 1
        values = means.ffn(record)
        each = means.by_group(of_id[token], values, means.stretches(record), num)
        there = np.flatnonzero(each.count)
        seen = count > 0
        mean = np.bincount(token, values, len(count))[seen] / count[seen]
        return Found(
            2**there,
            np.bincount(of_id[seen], minlength=num)[there],
            means.Means(*(a[there] for a in each)),
            means.correlation(np.log(count[seen]), mean),
        )

    def tables(self, records: Sequence[Record]) -> dict[str, Table]:
        each = [
            {
                (_range(int(low)), int(ids), int(count)): (mean, error)
                for low, ids, mean, error, count in zip(
                    found.low, found.ids, *found.means, strict=True
                )
            }
            for found in self.found(records)
        ]
        keys, columns = ("occurrences", "ids", "tokens"), ("FFN experts", "standard error")
        return {self.name: beside(records, keys, columns, each, shown=40)}

    def said(self, records: Sequence[Record]) -> list[str]:
        lines = (
            f"the correlation over token ids between the logarithm of the frequency and the FFN "
            f"experts is {found.correlation:+.3f}."
            for found in self.found(records)
        )
        return each_said(records, lines)

    def figure(self, records: Sequence[Record]) -> Figure:
        figure = drawing.new(7.5, 4)
        axes = figure.subplots()
        for found, color in zip(self.found(records), drawing.RUN_COLORS, strict=False):
            x = found.low * 2**0.5  # the middle of a bin, as the axis has it
            axes.errorbar(
                x, found.means.mean, found.means.error, color=color, marker="o", ms=5, capsize=3
            )
        drawing.logarithmic(axes)
        axes.set_xlabel("occurrences of the token's id in the text")
        axes.set_ylabel("FFN experts per token")
        drawing.tidy(axes)
        drawing.runs_legend(figure, labels(records))
        return figure


def _range(low: int) -> str:
    return f"{low:,}" if low == 1 else f"{low:,} to {2 * low - 1:,}"
