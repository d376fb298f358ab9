"""Do experts specialise in a source?

As OLMoE has it: the share of a source's tokens that an expert serves, against the share of all
tokens that it serves (and its share at balance). Turned round, the share of the expert's tokens
that are of the source, against the source's share of all tokens: both ratios are the same number,
the specialisation, which is 1 for an expert that does not care. Experts that serve fewer than 20
tokens of the layer have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter

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

_FEWEST = 20
_SHOWN = 4  # layers drawn
_SOURCES = 30  # drawn


class Found(NamedTuple):
    sources: list[str]
    tokens: np.ndarray  # [S]
    load: np.ndarray  # [J S N]
    ratio: np.ndarray  # [J S N]; NaN of experts that serve too few


class DomainSpecialisation(Question):
    place = 13

    def of(self, record: Record) -> Found:
        names = list(record.meta.sources)
        tokens = np.bincount(record.rows.source, minlength=len(names))
        there = np.flatnonzero(tokens)
        load = np.stack([record.load(record.rows.source == s) for s in there], axis=1)
        served = load * tokens[there][:, None]
        overall = served.sum(axis=1) / max(record.num_tokens, 1)
        enough = served.sum(axis=1) >= _FEWEST
        ratio = load / np.where(enough, overall, np.nan)[:, None]
        return Found([names[s] for s in there], tokens[there], load, ratio)

    def missing(self, records: Sequence[Record]) -> str:
        if max(len(found.sources) for found in self.found(records)) < 2:
            return "It needs two sources."
        return ""

    def tables(self, records: Sequence[Record]) -> dict[str, Table]:
        each = []
        for record, of in zip(records, self.found(records), strict=True):
            rows, balance = {}, balanced(record.meta)
            share = of.tokens / of.tokens.sum()
            for j, layer in enumerate(record.meta.layers):
                for n, name in enumerate(expert_names(record.meta)):
                    for s, source in enumerate(of.sources):
                        ratio = of.ratio[j, s, n]
                        rows[layer, name, source, float(share[s])] = (
                            ratio * share[s],
                            of.load[j, s, n],
                            balance[n],
                            ratio,
                        )
            each.append(dict(sorted(rows.items(), key=lambda r: -np.nan_to_num(r[1][3]))))
        keys = ("layer", "expert", "source", "share of all tokens")
        columns = ("share of the expert's tokens", "share of the source's tokens that it serves")
        columns += ("share at balance", "specialisation")
        return {self.name: beside(records, keys, columns, each, shown=10)}

    def said(self, records: Sequence[Record]) -> list[str]:
        return each_said(records, map(_said, records, self.found(records)))

    def figure(self, records: Sequence[Record]) -> Figure:
        found = self.found(records)
        shown = [
            (row, record, of, label, j)
            for row, (record, of, label) in enumerate(
                zip(records, found, labels(records), strict=True)
            )
            for j in drawing.chosen(record.num_layers, _SHOWN)
        ]
        columns = max(len(drawing.chosen(record.num_layers, _SHOWN)) for record in records)
        count = min(max(len(of.sources) for of in found), _SOURCES)
        figure = drawing.new(1.8 + 2.4 * max(columns, 3), 3.2 + (1.0 + 0.19 * count) * len(records))
        above, below = figure.subfigures(
            2, 1, height_ratios=((1.0 + 0.19 * count) * len(records), 2.7)
        )
        grid = above.subplots(len(records), columns, squeeze=False)
        for unused in grid.flat:
            unused.set_visible(False)
        limit = max(float(np.nanmax(np.abs(_log(of.ratio)), initial=0.1)) for of in found)
        limit = min(limit, 2.0)
        for row, record, of, label, j in shown:
            column = drawing.chosen(record.num_layers, _SHOWN).index(j)
            axes = grid[row, column]
            axes.set_visible(True)
            image = axes.imshow(
                _log(of.ratio[j, :_SOURCES]),
                cmap=drawing.DIVERGING,
                vmin=-limit,
                vmax=limit,
                aspect="auto",
            )
            drawing.experts_axis(axes, record.meta, color="black")
            names = [drawing.label(name) for name in of.sources[:_SOURCES]]
            axes.set_yticks(range(len(names)), names if column == 0 else [], fontsize=8)
            run = f"{drawing.label(label)}, " if len(records) > 1 else ""
            axes.set_title(f"{run}layer {record.meta.layers[j]}", fontsize=9)
        bar = above.colorbar(image, ax=grid, aspect=20, format=FuncFormatter(_factor))
        bar.set_label("specialisation", fontsize=9)
        _by_layer(below, records, found)
        return figure


def _by_layer(figure: SubFigure, records: Sequence[Record], found: Sequence[Found]) -> None:
    """The highest specialisation among a kind's experts."""
    axes = figure.subplots()
    for number, (record, of) in enumerate(zip(records, found, strict=True)):
        starts = record.meta.starts
        each = {
            kind: [_highest(of.ratio[j][:, a:b]) for j in range(record.num_layers)]
            for kind, a, b in zip(KINDS, starts, starts[1:], strict=False)
            if b > a
        }
        style = drawing.RUN_STYLES[number]
        drawing.lines_by_kind(axes, record.meta.layers, each, style, number == 0)
    drawing.by_layer(axes, "highest specialisation")
    axes.axhline(1, color=drawing.GREY, lw=1)
    handles, names = axes.get_legend_handles_labels()
    runs = drawing.run_lines(labels(records))
    axes.legend(
        [*handles, *runs],
        [*names, *(run.get_label() for run in runs)],
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
    )


def _highest(ratios: np.ndarray) -> float:
    ratios = ratios[np.isfinite(ratios)]
    return float(ratios.max()) if len(ratios) else float("nan")


def _log(ratio: np.ndarray) -> np.ndarray:
    """Of two; what no token of a source goes to is as far as the scale goes."""
    with np.errstate(divide="ignore"):
        return np.maximum(np.log2(ratio), -8.0)


def _factor(power: float, _: object = None) -> str:
    return f"{2**power:.2g} times"


def _said(record: Record, of: Found) -> str:
    if not np.isfinite(of.ratio).any():
        return "no expert serves enough tokens."
    j, s, n = np.unravel_index(np.nanargmax(of.ratio), of.ratio.shape)
    name, layer = expert_names(record.meta)[n], record.meta.layers[j]
    return (
        f"the most specialised is {name} of layer {layer}: it serves {of.ratio[j, s, n]:.2f} times "
        f"the share of {of.sources[s]} that it does of all text."
    )
