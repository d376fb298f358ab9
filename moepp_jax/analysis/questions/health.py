"""Are there dead or overloaded experts, and what is dropped?

By layer: the largest and the smallest load of an FFN expert over the mean of them all, the entropy
of their loads over the highest that there can be, and of every kind the share of its assignments
that were dropped. An expert is dead if it serves less than 1 % of the tokens that it would at
balance, and overloaded if it serves more than twice as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure, SubFigure

from moepp_jax.analysis import drawing
from moepp_jax.analysis.question import (
    Question,
    Table,
    balanced,
    beside,
    each_said,
    expert_names,
    labels,
)
from moepp_jax.analysis.record import KINDS, Record

_DEAD, _OVERLOADED = 0.01, 2.0
_FAR = 3  # powers of two to either side, in the heat map


class Found(NamedTuple):
    load: np.ndarray  # [J N]
    over: np.ndarray  # [J N] load over that at balance
    largest: np.ndarray  # [J] of FFN experts, over their mean
    smallest: np.ndarray  # [J]
    entropy: np.ndarray  # [J] of FFN experts, 1 if they are even
    drops: np.ndarray  # [J 4] by kind; NaN if it has no assignments

    @property
    def dead(self) -> np.ndarray:
        return self.over < _DEAD

    @property
    def overloaded(self) -> np.ndarray:
        return self.over > _OVERLOADED


class Health(Question):
    place = 11
    makes = ("health", "health_experts")

    def of(self, record: Record) -> Found:
        load = record.load()
        ffn = load[:, : record.meta.counts[0]]
        mean = np.maximum(ffn.mean(axis=1, keepdims=True), 1e-12)
        share = ffn / np.maximum(ffn.sum(axis=1, keepdims=True), 1e-12)
        entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(axis=1)
        # A kind that has no part in the balance cannot be dead of it.
        balance = np.array(balanced(record.meta))
        over = np.where(balance > 0, load / np.where(balance > 0, balance, 1), 1.0)
        return Found(
            load,
            np.where(load > 0, over, 0.0),
            (ffn / mean).max(axis=1),
            (ffn / mean).min(axis=1),
            entropy / np.log(ffn.shape[1]) if ffn.shape[1] > 1 else np.ones(len(ffn)),
            _drops(record),
        )

    def missing(self, records: Sequence[Record]) -> str:
        if not all(record.meta.counts[0] for record in records):
            return "There are no FFN experts."
        return ""

    def tables(self, records: Sequence[Record]) -> dict[str, Table]:
        found = self.found(records)
        layers, experts = [], []
        for record, of in zip(records, found, strict=True):
            names = expert_names(record.meta)
            layers.append(
                {
                    (layer,): (
                        of.largest[j],
                        of.smallest[j],
                        of.entropy[j],
                        int(of.dead[j].sum()),
                        int(of.overloaded[j].sum()),
                        *of.drops[j],
                    )
                    for j, layer in enumerate(record.meta.layers)
                }
            )
            experts.append(
                {
                    (layer, name): (of.load[j, n], of.over[j, n], _state(of, j, n))
                    for j, layer in enumerate(record.meta.layers)
                    for n, name in enumerate(names)
                }
            )
        columns = ["largest over mean", "smallest over mean", "evenness", "dead", "overloaded"]
        columns += [f"{kind} dropped" for kind in KINDS]
        by_expert = ("load", "over balance", "state")
        return {
            "health": beside(records, ("layer",), columns, layers, shown=40),
            "health_experts": beside(records, ("layer", "expert"), by_expert, experts, shown=0),
        }

    def said(self, records: Sequence[Record]) -> list[str]:
        return each_said(records, map(_said, records, self.found(records)))

    def figure(self, records: Sequence[Record]) -> Figure:
        found = self.found(records)
        tall = 1.3 + 0.13 * max(record.num_layers for record in records)
        figure = drawing.new(11, 3.8 + tall)
        above, below = figure.subfigures(2, 1, height_ratios=(3.8, tall))
        load, even, drops = above.subplots(1, 3)
        for number, (record, of) in enumerate(zip(records, found, strict=True)):
            layers, style = record.meta.layers, drawing.RUN_STYLES[number]
            color = drawing.KIND_COLORS["FFN"]
            for values, marker in ((of.largest, "^"), (of.smallest, "v")):
                load.plot(layers, values, style, color=color, marker=marker, ms=5)
            even.plot(layers, of.entropy, style, color=color, marker="o", ms=3.5)
            each = {
                kind: of.drops[:, k]
                for k, kind in enumerate(KINDS)
                if record.meta.counts[k] and np.isfinite(of.drops[:, k]).any()
            }
            drawing.lines_by_kind(drops, layers, each, style, number == 0)
        load.axhline(1, color=drawing.GREY, lw=1)
        drawing.by_layer(load, "FFN experts' load over their mean")
        load.set_title("largest and smallest", fontsize=10)
        drawing.by_layer(even, "entropy over the highest")
        even.set_title("evenness of the FFN experts", fontsize=10)
        drawing.by_layer(drops, "share of assignments")
        drops.set_title("dropped", fontsize=10)
        for axes in (load, drops):
            drawing.from_zero(axes)
        if not any(np.nansum(of.drops) for of in found):
            drops.set_ylim(0, 0.01)
            drops.text(0.5, 0.5, "none is dropped", transform=drops.transAxes, ha="center")
        handles, names = drops.get_legend_handles_labels()
        runs = drawing.run_lines(labels(records))
        names += [run.get_label() for run in runs]
        above.legend([*handles, *runs], names, loc="outside upper center", ncols=6, frameon=False)
        _heat(below, records, found)
        return figure


def _heat(figure: SubFigure, records: Sequence[Record], found: Sequence[Found]) -> None:
    """Every expert's load over that at balance."""
    grid = figure.subplots(1, len(records), squeeze=False)[0]
    for axes, record, of, label in zip(grid, records, found, labels(records), strict=True):
        with np.errstate(divide="ignore"):
            power = np.maximum(np.log2(of.over), -_FAR)
        image = axes.imshow(
            power,
            cmap=drawing.DIVERGING,
            vmin=-_FAR,
            vmax=_FAR,
            aspect="auto",
            interpolation="none",
        )
        drawing.experts_axis(axes, record.meta, color="black")
        shown = drawing.chosen(record.num_layers)
        axes.set_yticks(shown, [record.meta.layers[j] for j in shown], fontsize=8)
        axes.set_ylabel("layer")
        if len(records) > 1:
            axes.set_title(drawing.label(label, 40), fontsize=10)
    powers = np.arange(-_FAR, _FAR + 1)
    bar = figure.colorbar(image, ax=grid, ticks=powers, aspect=12)
    bar.ax.set_yticklabels([f"{2.0**power:g}" for power in powers])
    bar.set_label("load over that\nat balance", fontsize=9)


def _drops(record: Record) -> np.ndarray:
    """[J 4] share of the assignments of each kind of expert."""
    ends, drops = record.meta.starts[1:], np.full((record.num_layers, len(KINDS)), np.nan)
    for j in range(record.num_layers):
        kept, expert = record.rows.kept[j], record.rows.experts[j]
        chosen = np.bincount(expert.reshape(-1), minlength=record.meta.num_experts + 1)
        served = np.bincount(expert[kept], minlength=record.meta.num_experts + 1)
        for k, (a, b) in enumerate(zip(record.meta.starts, ends, strict=False)):
            if chosen[a:b].sum():
                drops[j, k] = 1 - served[a:b].sum() / chosen[a:b].sum()
    return drops


def _state(of: Found, j: int, n: int) -> str:
    return "dead" if of.dead[j, n] else "overloaded" if of.overloaded[j, n] else ""


def _said(record: Record, of: Found) -> str:
    names = expert_names(record.meta)
    said = []
    for what, which in (("dead", of.dead), ("overloaded", of.overloaded)):
        places = [
            f"{names[n]} of layer {record.meta.layers[j]}" for j, n in np.argwhere(which).tolist()
        ]
        more = f" and {len(places) - 8} more" if len(places) > 8 else ""
        said.append(f"{what}: {', '.join(places[:8]) or 'none'}{more}")
    return "; ".join(said) + "."
