"""What is each kind of expert worth: what if it cannot be chosen?

The loss, and the FFN experts per token, of the model as it is and with the experts of one kind
masked: tokens then go to the best of the others, where their rule gives each so many. It is not
trained again for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moepp_jax.analysis import drawing
from moepp_jax.analysis.question import Question, Table, beside, labels, sample_said
from moepp_jax.analysis.record import Record

_NONE = "none"


class SwitchedOff(Question):
    place = 9

    def of(self, record: Record) -> Mapping[str, Any]:
        return record.meta.more.get("switched_off") or {}

    def missing(self, records: Sequence[Record]) -> str:
        if not any(_NONE in found for found in self.found(records)):
            return "The model was not run with experts masked."
        return ""

    def tables(self, records: Sequence[Record]) -> dict[str, Table]:
        each = [
            {
                (kind,): (of[kind]["loss"], _more(of, kind), of[kind]["ffn_experts"])
                for kind in _kinds(of)
            }
            for of in self.found(records)
        ]
        columns = ("loss", "more than with all", "FFN experts")
        return {self.name: beside(records, ("without",), columns, each)}

    def said(self, records: Sequence[Record]) -> list[str]:
        return sample_said(records, self.found(records))

    def figure(self, records: Sequence[Record]) -> Figure:
        found = self.found(records)
        kinds = list(dict.fromkeys(k for of in found for k in _kinds(of) if k != _NONE))
        figure = drawing.new(9, 1.4 + 0.35 * max(len(kinds), 1) * len(found))
        loss, ffn = figure.subplots(1, 2, sharey=True)
        drawing.bars(loss, kinds, [[_more(of, kind) for kind in kinds] for of in found])
        loss.axvline(0, color=drawing.GREY, lw=1)
        loss.set_xlabel("loss more than with all experts, nats")
        loss.set_ylabel("without")
        experts = [[of.get(k, {}).get("ffn_experts", np.nan) for k in kinds] for of in found]
        drawing.bars(ffn, kinds, experts)
        for of, color in zip(found, drawing.RUN_COLORS, strict=False):
            if _NONE in of:
                ffn.axvline(of[_NONE]["ffn_experts"], color=color, ls=":", lw=1.4)
        ffn.set_xlabel("FFN experts per token (dotted: with all)")
        drawing.runs_legend(figure, labels(records))
        return figure


def _kinds(of: Mapping[str, Any]) -> list[str]:
    return [kind for kind, value in of.items() if isinstance(value, Mapping)]


def _more(of: Mapping[str, Any], kind: str) -> float:
    if kind not in of or _NONE not in of:
        return float("nan")
    return of[kind]["loss"] - of[_NONE]["loss"]
