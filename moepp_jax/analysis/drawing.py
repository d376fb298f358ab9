"""What figures of questions share: colours, axes, bars; the same bytes from the same data."""

from __future__ import annotations

import functools
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from matplotlib.transforms import Bbox

from moepp_jax.analysis.record import KINDS, Meta
from moepp_jax.analysis.words import on_line

FORMATS = ("png", "svg")
Numbers = np.ndarray | Sequence[float | int]
GREY = "0.45"
# Okabe and Ito's, which the colour-blind can tell apart too.
KIND_COLORS = dict(zip(KINDS, ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=True))
RUN_COLORS = ("#0072B2", "#D55E00")
RUN_STYLES = ("-", "--")
SEQUENTIAL = "cividis"
DIVERGING = "RdBu_r"
PANELS = 8  # of heat maps by layer, at most


def drawn(figure: Figure, kind: str) -> bytes:
    """The figure as a file of one of FORMATS."""
    out = io.BytesIO()
    # Neither the time nor random names: the bytes change only where numbers do.
    with matplotlib.rc_context({"svg.hashsalt": "moepp_jax", "svg.fonttype": "none"}):
        figure.savefig(out, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return _numbered(out.getvalue()) if kind == "svg" else out.getvalue()


def write(figure: Figure, stem: Path) -> None:
    """STEM.png and STEM.svg."""
    for kind in FORMATS:
        stem.with_suffix(f".{kind}").write_bytes(drawn(figure, kind))


def _numbered(svg: bytes) -> bytes:
    """With names in the order in which they come.

    Matplotlib hashes all digits of where things lie, whose last ones vary from run to run.
    """
    numbers: dict[bytes, int] = {}

    def named(found: re.Match[bytes]) -> bytes:
        where, letter, digits = found.groups()
        return where + letter + b"%d" % numbers.setdefault(letter + digits, len(numbers))

    return re.sub(rb'(id="|url\(#|href="#)([A-Za-z])([0-9a-f]{10})\b', named, svg)


def new(width: float | int = 7.5, height: float | int = 4.5) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


def panels(
    count: int,
    columns: int,
    width: float | int = 3.0,
    height: float | int = 2.4,
    sharex: bool = False,
    sharey: bool = False,
    extra: float | int = 0.0,
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes in rows of `columns`.

    Args:
      width, height: of one, in inches.
      extra: inches of height besides, for a legend or long names.
    """
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = new(width * columns + 0.6, height * rows + 0.5 + extra)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    for unused in axes.flat[count:]:
        unused.set_visible(False)
    if sharex:  # the last of each column has the names, whether a full row or not
        for shown in axes.flat[:count][-columns:]:
            shown.tick_params(labelbottom=True)
    return figure, list(axes.flat[:count])


def tidy(axes: Axes, grid: str = "y") -> None:
    axes.grid(axis=grid, alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def by_layer(axes: Axes, label: str) -> None:
    """Layers along x."""
    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.margins(x=0.04)
    tidy(axes)


def chosen(count: int, most: int = PANELS) -> list[int]:
    """Of so many layers `most`, evenly; the first and the last are among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


@functools.cache
def _glyphs() -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())


def label(text: str, most: int = 18) -> str:
    """Any text as figures can have it: no formula, nothing that the font lacks, not too long."""
    text = on_line(text)
    text = text if len(text) <= most else text[: most - 1] + "…"
    known = (c if ord(c) in _glyphs() else c.encode("unicode_escape").decode("ascii") for c in text)
    return "".join(known).replace("$", r"\$")


def runs_legend(figure: Figure, names: Sequence[str]) -> None:
    """Which colour is whose, where there are two."""
    if len(names) > 1:
        handles = [
            Patch(color=color, label=label(name, 40))
            for name, color in zip(names, RUN_COLORS, strict=False)
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(names), frameon=False)


def run_lines(names: Sequence[str]) -> list[Line2D]:
    """Entries of a legend for the style of each run's lines, where there are two."""
    if len(names) < 2:
        return []
    return [
        Line2D([], [], color=GREY, ls=style, label=label(name, 40))
        for name, style in zip(names, RUN_STYLES, strict=False)
    ]


def bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[Numbers],
    errors: Sequence[Numbers] | None = None,
    colors: Sequence[str] = RUN_COLORS,
) -> None:
    """Horizontal bars from the top down, one of each record at every name.

    Args:
      values, errors: of each record, by name.
    """
    height = 0.8 / len(values)
    for number, (mine, color) in enumerate(zip(values, colors, strict=False)):
        y = np.arange(len(names)) + (number - (len(values) - 1) / 2) * height
        axes.barh(y, np.nan_to_num(mine), 0.92 * height, color=color)
        if errors is not None:
            axes.errorbar(mine, y, xerr=errors[number], fmt="none", ecolor="0.2", lw=1, capsize=2)
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.set_ylim(max(len(names), 1) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    tidy(axes, "x")


def experts_axis(axes: Axes, meta: Meta, which: str = "x", color: str = "white") -> None:
    """Experts along an axis of a heat map: ticks at the kinds' middles, lines between them."""
    edges = [0, *itertools.accumulate(meta.counts)]
    short = ("FFN", "const", "copy", "zero")
    spans = [(kind, *ends) for kind, ends in zip(short, itertools.pairwise(edges), strict=True)]
    there = [(kind, a, b) for kind, a, b in spans if b > a]
    for _, edge, _ in there[1:]:
        line = axes.axvline if which == "x" else axes.axhline
        line(edge - 0.5, color=color, lw=0.8)
    if meta.num_experts > 24 and 0 < max(meta.counts[2:]) == 1 == min(meta.counts[2:]):
        there[-2:] = [("copy, zero", there[-2][1], there[-1][2])]  # each too narrow for a name
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks([(a + b - 1) / 2 for _, a, b in there], [kind for kind, _, _ in there])
    axes.tick_params(axis=which, length=0, labelsize=7, labelrotation=90 if which == "x" else 0)


def logarithmic(axes: Axes) -> None:
    """x in powers of two, as plain numbers."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def from_zero(axes: Axes) -> None:
    """y from zero to a little above what is drawn."""
    axes.set_ylim(0, max(1.06 * axes.dataLim.y1, 1e-9) if np.isfinite(axes.dataLim.y1) else 1)


def named_points(axes: Axes, names: Sequence[str], x: np.ndarray, y: np.ndarray) -> None:
    """Names beside points, as far as there is room for them."""
    axes.figure.draw_without_rendering()
    taken: list[Bbox] = []
    for name, *point in zip(names, x, y, strict=True):
        for dx, dy in ((5, 0), (-5, 0), (5, 9), (5, -9), (-5, 9), (-5, -9)):
            text = axes.annotate(
                label(name, 14),
                point,
                (dx, dy),
                textcoords="offset points",
                fontsize=8,
                va="center",
                ha="left" if dx > 0 else "right",
            )
            box = text.get_window_extent()
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def lines_by_kind(
    axes: Axes,
    layers: Sequence[int],
    each: Mapping[str, Numbers],
    style: str = "-",
    named: bool = True,
) -> None:
    """A line a kind of expert, by layer."""
    for kind, values in each.items():
        axes.plot(
            layers,
            values,
            style,
            color=KIND_COLORS[kind],
            marker="o",
            ms=3.5,
            label=kind if named else None,
        )
