"""Which tokens get the most FFN experts, and which the fewest?

The FFN experts that served a token, averaged over the MoE layers, then over the occurrences of its
id; ids that occur too seldom are left out. The standard error takes documents as samples (long ones
in stretches of 1,024 tokens), since the tokens of one text are not independent. "Whole words" is
the share of the occurrences that are a word, and not a part of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from moepp_jax.analysis import drawing, means, words
from moepp_jax.analysis.question import Question, Table, beside, labels
from moepp_jax.analysis.record import Record

_BARS = 16


class Found(NamedTuple):
    """Of the token ids that occur often enough, those with the most FFN experts first."""

    token: np.ndarray
    names: list[str]
    whole: np.ndarray  # share that are whole words
    means: means.Means
    least: int  # occurrences


class FFNByToken(Question):
    place = 3

    def of(self, record: Record) -> Found:
        V, token = len(record.meta.pieces), record.rows.token
        each = means.by_group(token, means.ffn(record), means.stretches(record), V)
        least = means.enough(each.count)
        ids = np.flatnonzero(each.count >= least)
        ids = ids[np.argsort(-each.mean[ids], kind="stable")]
        whole = words.spell(record).form == words.FORMS.index("word")
        share = np.bincount(token, whole, V)[ids] / each.count[ids]
        names = [words.shown(record, int(one)) for one in ids]
        return Found(ids, names, share, means.Means(*(a[ids] for a in each)), least)

    def missing(self, records: Sequence[Record]) -> str:
        if not all(len(found.token) for found in self.found(records)):
            return "No token occurs twice in the text."
        return ""

    def tables(self, records: Sequence[Record]) -> dict[str, Table]:
        each = [
            {
                (int(token), name, int(count), float(whole)): (mean, error)
                for token, name, whole, mean, error, count in zip(
                    found.token, found.names, found.whole, *found.means, strict=True
                )
            }
            for found in self.found(records)
        ]
        keys = ("id", "token", "occurrences", "whole words")
        return {self.name: beside(records, keys, ("FFN experts", "standard error"), each)}

    def said(self, records: Sequence[Record]) -> list[str]:
        found = self.found(records)[0]
        line = f"{len(found.token):,} token ids occur at least {found.least} times; the table is"
        line += " of those, the ones with the most FFN experts first."
        paper = "In the paper (7B): touch 1.775, needed 1.770, got 1.750, coffee 1.671, week 1.567;"
        return [line, f"{paper} word fragments fewest (pper 1.347, ts 1.235)."]

    def figure(self, records: Sequence[Record]) -> Figure:
        first, *others = self.found(records)
        count = min(_BARS, max(len(first.token) // 2, 1))
        figure = drawing.new(9.5, 1.6 + 0.24 * count * (1 + 0.4 * len(others)))
        for axes, title, which in zip(
            figure.subplots(1, 2, sharex=True),
            ("the most FFN experts", "the fewest"),
            (slice(count), slice(-1, -count - 1, -1)),
            strict=True,
        ):
            tokens = first.token[which]
            values = [self._at(found, tokens) for found in (first, *others)]
            drawing.bars(axes, first.names[which], [v for v, _ in values], [e for _, e in values])
            balance = [r.meta.wanted for r in records]
            axes.axvline(balance[0], color=drawing.GREY, ls=":", lw=1.2)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("FFN experts per token, mean of layers (dotted: balance)", fontsize=9)
        drawing.runs_legend(figure, labels(records))
        return figure

    @staticmethod
    def _at(found: Found, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and errors of these ids; NaN where there are none."""
        place = {int(token): at for at, token in enumerate(found.token)}
        at = np.array([place.get(int(token), -1) for token in tokens])
        there = at >= 0
        return (
            np.where(there, found.means.mean[at], np.nan),
            np.where(there, found.means.error[at], np.nan),
        )
