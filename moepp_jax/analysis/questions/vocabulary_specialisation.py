"""Do experts specialise in tokens?

As OLMoE has it: of an expert's tokens, the share of the occurrences of their ids that go to that
expert, the mean of its tokens; ids that occur too seldom are left out. An id's own occurrence is
among them, so that rare ids would look special: "of the others" leaves it out, and is what an
expert's load would be if routing did not depend on the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from moepp_jax.analysis import drawing, means
from moepp_jax.analysis.question import Question, Table, beside, each_said, expert_names, labels
from moepp_jax.analysis.record import KINDS, Record


class Found(NamedTuple):
    least: int  # occurrences of an id
    special: np.ndarray  # [J N]
    others: np.ndarray  # [J N]
    load: np.ndarray  # [J N] of the tokens whose ids occur often enough


class VocabularySpecialisation(Question):
    place = 14

    def of(self, record: Record) -> Found:
        count = np.bincount(record.rows.token, minlength=len(record.meta.pieces))
        least = means.enough(count)
        ids = np.flatnonzero(count >= least)
        number = np.full(len(count), -1)
        number[ids] = np.arange(len(ids))
        of = number[record.rows.token]
        each = [_layer(record, j, of, count[ids]) for j in range(record.num_layers)]
        return Found(least, *(np.stack(values) for values in zip(*each, strict=True)))

    def missing(self, records: Sequence[Record]) -> str:
        if not any(np.isfinite(found.special).any() for found in self.found(records)):
            return "No token occurs twice in the text."
        return ""

    def tables(self, records: Sequence[Record]) -> dict[str, Table]:
        each = [
            {
                (layer, name): (of.special[j, n], of.others[j, n], of.load[j, n])
                for j, layer in enumerate(record.meta.layers)
                for n, name in enumerate(expert_names(record.meta))
            }
            for record, of in zip(records, self.found(records), strict=True)
        ]
        columns = ("specialisation", "of the others", "load")
        return {self.name: beside(records, ("layer", "expert"), columns, each, shown=12)}

    def said(self, records: Sequence[Record]) -> list[str]:
        lines = []
        for record, of in zip(records, self.found(records), strict=True):
            n = record.meta.counts[0]
            values = [_mean(a[:, :n]) for a in (of.special, of.others, of.load)]
            lines.append(
                "of an FFN expert's tokens {:.1%} of their ids' occurrences go to it, {:.1%} of "
                "the others, at a load of {:.1%} (ids that occur at least {} times).".format(
                    *values, of.least
                )
            )
        return each_said(records, lines)

    def figure(self, records: Sequence[Record]) -> Figure:
        figure = drawing.new(10, 3.8)
        left, right = figure.subplots(1, 2)
        for number, (record, of) in enumerate(zip(records, self.found(records), strict=True)):
            starts = record.meta.starts
            for axes, values in ((left, of.special), (right, of.others - of.load)):
                each = {
                    kind: [_mean(values[j, a:b]) for j in range(record.num_layers)]
                    for kind, a, b in zip(KINDS, starts, starts[1:], strict=False)
                    if b > a
                }
                style = drawing.RUN_STYLES[number]
                drawing.lines_by_kind(axes, record.meta.layers, each, style, number == 0)
        drawing.by_layer(left, "specialisation")
        drawing.by_layer(right, "share of the others above the load")
        drawing.from_zero(left)
        right.axhline(0, color=drawing.GREY, lw=1)
        handles, names = left.get_legend_handles_labels()
        runs = drawing.run_lines(labels(records))
        names += [run.get_label() for run in runs]
        figure.legend([*handles, *runs], names, loc="outside upper center", ncols=6, frameon=False)
        return figure


def _layer(record: Record, j: int, of: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, ...]:
    """[N] each: the specialisation, that of the others, and the load.

    Args:
      of: [T] number of the token's id, -1 if it is left out.
      count: [I] occurrences of the ids.
    """
    N, expert = record.meta.num_experts, record.rows.experts[j].astype(np.int64)
    used = record.rows.kept[j] & (of >= 0)[:, None]
    at = (of[:, None] * (N + 1) + expert)[used]
    there = np.bincount(at, minlength=len(count) * (N + 1)).reshape(-1, N + 1)[:, :N]
    there = there.astype(np.float64)
    tokens = there.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        special = (there**2 / count[:, None]).sum(axis=0) / tokens
        others = (there * (there - 1) / (count[:, None] - 1.0)).sum(axis=0) / tokens
        return special, others, tokens / count.sum()


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")
