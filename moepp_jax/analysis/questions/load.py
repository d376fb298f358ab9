"""Which experts serve which source, layer by layer?

The paper's figure: of every source (or task) and MoE layer, the share of the served assignments
that each kind of expert has, and the FFN experts per token. The table has each expert's load too:
the share of the source's tokens that it serves. The middle layer is number ceil(J/2) of J, as the
paper's 12 of 24; its errors take documents as samples.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from moepp_jax.analysis import drawing, means
from moepp_jax.analysis.question import Question, Table, beside, expert_names, labels
from moepp_jax.analysis.record import KINDS, Record

# FFN experts per token in layer 12 of the 7B model's 24: how a task is named here and in its paper.
PAPER = {
    "sciq": ("SciQ", 1.486),
    "piqa": ("PIQA", 1.588),
    "winogrande": ("WinoGrande", 1.582),
    "arc_easy": ("ARC-E", 1.569),
    "arc_challenge": ("ARC-C", 1.515),
    "hellaswag": ("HellaSwag", 1.590),
    "logiqa": ("LogiQA", 1.533),
    "boolq": ("BoolQ", 1.553),
    "lambada": ("LAMBADA", 1.564),
    "nq": ("NQ", 1.519),
    "mmlu": ("MMLU", 1.499),
}
_OTHER_NAMES = {"arc_e": "arc_easy", "arc_c": "arc_challenge", "natural_questions": "nq"}
_OTHER_NAMES |= {"nq_open": "nq", "arceasy": "arc_easy", "arcchallenge": "arc_challenge"}
_DRAWN = 30  # sources


class Found(NamedTuple):
    """Of S sources with tokens.

    Attributes:
      load: share of the source's tokens that an expert serves.
      middle: FFN experts per token in the middle layer, by source, or by task of the paper.
    """

    sources: list[str]
    tokens: np.ndarray  # [S]
    load: np.ndarray  # [S J N]
    kinds: np.ndarray  # [S J 4] shares of the served assignments
    ffn: np.ndarray  # [S J]
    dropped: np.ndarray  # [S J] share of the assignments
    middle: dict[str, tuple[int, float, float]]  # tokens, mean, standard error


class Load(Question):
    place = 2
    makes = ("load", "load_middle")

    def of(self, record: Record) -> Found:
        names, source = list(record.meta.sources), record.rows.source
        tokens = np.bincount(source, minlength=len(names))
        there = np.flatnonzero(tokens)
        served = np.stack([_served(record, j) for j in range(record.num_layers)], 1)[there]
        chosen = np.stack([_chosen(record, j) for j in range(record.num_layers)], 1)[there]
        starts = record.meta.starts
        each = [served[..., a:b].sum(-1) for a, b in itertools.pairwise(starts)]
        kinds = np.stack(each, -1)
        return Found(
            [names[s] for s in there],
            tokens[there],
            served / tokens[there, None, None],
            kinds / np.maximum(kinds.sum(-1, keepdims=True), 1),
            kinds[..., 0] / tokens[there, None],
            1 - served.sum(-1) / np.maximum(chosen, 1),
            _middle(record),
        )

    def tables(self, records: Sequence[Record]) -> dict[str, Table]:
        found = self.found(records)
        columns = ["FFN experts", *(f"share {kind}" for kind in KINDS), "dropped"]
        # Pools may differ, which leaves gaps: an expert is known by its name.
        experts = list(dict.fromkeys(name for r in records for name in expert_names(r.meta)))
        each = []
        for record, of in zip(records, found, strict=True):
            rows = {}
            for s, source in enumerate(of.sources):
                for j, layer in enumerate(record.meta.layers):
                    by_name = dict(zip(expert_names(record.meta), of.load[s, j], strict=True))
                    values = [of.ffn[s, j], *of.kinds[s, j], of.dropped[s, j]]
                    values += [by_name.get(name) for name in experts]
                    rows[source, int(of.tokens[s]), layer] = values
            each.append(rows)
        columns += [f"load {name}" for name in experts]
        tables = {"load": beside(records, ("source", "tokens", "layer"), columns, each, shown=0)}
        each = [
            {(name, PAPER.get(name, (0, None))[1]): values for name, values in of.middle.items()}
            for of in found
        ]
        columns = ("tokens", "FFN experts", "standard error")
        keys = ("source or task", "paper, 7B")
        return {"load_middle": beside(records, keys, columns, each, shown=40), **tables}

    def said(self, records: Sequence[Record]) -> list[str]:
        meta = records[0].meta
        layer = meta.layers[_middle_of(records[0])]
        line = f"The first table is of layer {layer}, the middle one of {len(meta.layers)}; "
        return [line + "the second has every source and layer, with each expert's load."]

    def figure(self, records: Sequence[Record]) -> Figure:
        found = self.found(records)
        count = max(record.num_layers for record in records)
        bars = min(_DRAWN, max(len(of.sources) for of in found)) * len(records)
        longest = max(len(name) for of in found for name in of.sources)
        figure, axes = drawing.panels(
            count,
            4 if bars < 25 else 3,
            width=max(2.6, 0.17 * bars + 1.2),
            height=2.0,
            sharey=True,
            sharex=True,
            extra=0.4 + 0.07 * min(longest, 18),
        )
        highest = max(float(of.ffn.max()) for of in found)
        for j, one in enumerate(axes):
            twin = one.twinx()
            for number, (record, of) in enumerate(zip(records, found, strict=True)):
                if j < record.num_layers:
                    _panel(one, twin, of, j, number, len(records))
            layers = dict.fromkeys(r.meta.layers[j] for r in records if j < r.num_layers)
            one.set_title("layer " + " / ".join(map(str, layers)), fontsize=9, pad=3)
            twin.set_ylim(0, 1.1 * max(highest, 0.1))
            last = (j + 1) % _columns(one) == 0 or j + 1 == count
            twin.tick_params(labelsize=8, labelright=last)
            twin.set_ylabel("FFN experts" if last else "", fontsize=8)
            names = [drawing.label(name) for name in found[0].sources[:_DRAWN]]
            one.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
            one.set_ylim(0, 1)
            one.tick_params(axis="y", labelsize=8)
        figure.supylabel("share of assignments (bars)", fontsize=10)
        handles = [Patch(color=color, label=kind) for kind, color in drawing.KIND_COLORS.items()]
        handles += [
            Line2D([], [], color="black", ls="--", marker=_MARKERS[n], ms=4, label=label)
            for n, label in enumerate(_line_labels(records))
        ]
        figure.legend(
            handles=handles, loc="outside upper center", ncols=len(handles), frameon=False
        )
        return figure


_MARKERS = ("o", "s")


def _columns(axes: Axes) -> int:
    return axes.get_subplotspec().get_gridspec().ncols


def _line_labels(records: Sequence[Record]) -> list[str]:
    if len(records) == 1:
        return ["FFN experts per token"]
    sides = ("left bars", "right bars")
    names = [drawing.label(name, 30) for name in labels(records)]
    return [f"{name} ({side})" for name, side in zip(names, sides, strict=False)]


def _panel(axes: Axes, twin: Axes, of: Found, j: int, number: int, among: int) -> None:
    """One record's bars and line in one layer's panel."""
    width = 0.8 / among
    x = np.arange(min(len(of.sources), _DRAWN)) + (number - (among - 1) / 2) * width
    bottom = np.zeros(len(x))
    for kind, color in enumerate(drawing.KIND_COLORS.values()):
        share = of.kinds[: len(x), j, kind]
        axes.bar(x, share, 0.94 * width, bottom, color=color, alpha=1 if number == 0 else 0.7)
        bottom += share
    style = {"color": "black", "ls": "--", "lw": 1, "marker": _MARKERS[number], "ms": 3}
    twin.plot(x, of.ffn[: len(x), j], **style, mec="white", mew=0.4)


def _served(record: Record, j: int) -> np.ndarray:
    """[S N] tokens of each source that each expert served in a layer."""
    S, N = len(record.meta.sources), record.meta.num_experts
    kept, expert = record.rows.kept[j], record.rows.experts[j].astype(np.int64)
    at = (record.rows.source.astype(np.int64)[:, None] * (N + 1) + expert)[kept]
    return np.bincount(at, minlength=S * (N + 1)).reshape(S, N + 1)[:, :N]


def _chosen(record: Record, j: int) -> np.ndarray:
    """[S] assignments of each source in a layer, the dropped ones too."""
    used = (record.rows.experts[j] < record.meta.num_experts).sum(axis=1)
    return np.bincount(record.rows.source, used, len(record.meta.sources))


def _middle_of(record: Record) -> int:
    return math.ceil(record.num_layers / 2) - 1


def _middle(record: Record) -> dict[str, tuple[int, float, float]]:
    """Source -> tokens, FFN experts and their error; tasks of the paper first and in its order."""
    found = [task_of(name) or name for name in record.meta.sources]
    names = sorted(
        dict.fromkeys(found), key=lambda n: list(PAPER).index(n) if n in PAPER else len(PAPER)
    )
    number = np.array([names.index(name) for name in found], np.int64)
    values = record.ffn[_middle_of(record)].astype(np.float64)
    sample = means.stretches(record)
    each = means.by_group(number[record.rows.source], values, sample, len(names))
    return {
        name: (int(count), float(mean), float(error))
        for name, mean, error, count in zip(names, *each, strict=True)
        if count
    }


def task_of(source: str) -> str:
    """The paper's task that a source is, or is a part of; empty if it is none."""
    name = "_".join(re.findall("[a-z0-9]+", source.lower()))
    for known in (*_OTHER_NAMES, *PAPER):
        if name == known or name.startswith(f"{known}_"):
            return _OTHER_NAMES.get(known, known)
    return ""
