"""How a layer's cost grows: with tokens, FFN experts, choices a token, and width.

    python -m benchmarks.curves [--clock] [--json FILE] [--figure STEM] [--rounds N]

One size varies at a time. The operations of the products, the memory and, with --clock, the time of
each program give a slope on logarithmic axes: the power of the size with which the cost grows.
`MOST` says how fast each may grow; a steeper slope is an error at the end. Memory is that of
temporary arrays and results together, as the first begin their life in the place of the second.

Without --clock nothing is run but the count of dropless blocks: the compiler tells the rest.
"""

from __future__ import annotations

from moepp_jax import host_memory

if __name__ == "__main__":
    host_memory.keep_freed_on_cpu()  # before an import starts a thread

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moepp_jax.analysis import drawing
from moepp_jax.benchmarks import layer, timing

BASE = {"T": 4096, "N": 8, "K": 2, "D": 512}
VALUES = {
    "T": (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536),
    "N": (8, 16, 32, 64, 128, 256),
    "K": (1, 2, 4, 8),
    "D": (128, 256, 512, 1024),
}
NAMES = {"T": "tokens", "N": "FFN experts", "K": "choices a token", "D": "width (F = 2 D)"}
SEQUENCE = 1024  # tokens of a group
TAU = 0.75
# The power with which each may grow at most, forward and with backward. Products of T K rows with
# matrices of D F numbers, F in proportion to D; memory of T K rows of D and F numbers, and with
# backward the parameters' gradients. With N grow, beside those, a token's scores and its place in
# the experts' queues: numbers, not rows.
MOST: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "flops": {"T": (1.0, 1.0), "N": (0.0, 0.0), "K": (1.0, 1.0), "D": (2.0, 2.0)},
    "memory_bytes": {"T": (1.0, 1.0), "N": (0.15, 1.0), "K": (1.0, 1.0), "D": (1.0, 2.0)},
}
ROOM = 0.15  # for slots and blocks that are filled up, and for the router
COSTS = ("flops", "memory_bytes", "seconds")


def shape_and_choices(size: Mapping[str, int]) -> tuple[layer.Shape, int]:
    """Half as many other experts as FFN experts, so that these have the same share for all N."""
    groups = max(1, size["T"] // SEQUENCE)
    others = (size["N"] // 2 - 2, 1, 1)
    return layer.Shape(size["T"], groups, size["D"], 2 * size["D"], size["N"], others), size["K"]


def point(size: Mapping[str, int], mode: str, way: str) -> tuple[dict[str, Any], timing.Case]:
    """The compiler's numbers of one layer."""
    shape, top_k = shape_and_choices(size)
    subject = layer.Subject(layer.subjects(shape)[1].pool, TAU, top_k)
    case = layer.cases_of(subject, shape, mode, way)["layer"]
    work = layer.work_of(subject, shape, mode, way, case)
    over = work.over_ideal
    flops = None if over is None else over * work.flops
    return {"flops": flops, "memory_bytes": work.temp_bytes + _result_bytes(case)}, case


def _result_bytes(case: timing.Case) -> int:
    results = jax.eval_shape(case.function, *case.arguments)
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(results))


def measure(
    mode: str, way: str, values: Mapping[str, Sequence[int]], base: Mapping[str, int], rounds: int
) -> list[dict[str, Any]]:
    """A row for each size and each of its values; the clock is read if there are rounds."""
    rows = []
    for name, several in values.items():
        cases = {}
        for value in track(several, f"{mode}, {way}, {name}", transient=True):
            numbers, case = point(dict(base) | {name: value}, mode, way)
            rows.append({"mode": mode, "pass": way, "size": name, "value": value} | numbers)
            if rounds:
                cases[value] = case
        if cases:
            seconds = timing.interleaved(cases, rounds, label=f"{mode}, {way}, {name}")
            for row in rows[-len(several) :]:
                row["seconds"] = seconds[row["value"]].median
    return rows


def slopes(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The power with which each cost grows, by least squares of the logarithms."""
    found = []
    for key in dict.fromkeys((r["mode"], r["pass"], r["size"]) for r in rows):
        own = [r for r in rows if (r["mode"], r["pass"], r["size"]) == key]
        for cost in COSTS:
            if len(own) < 2 or any(r.get(cost) is None for r in own):
                continue
            x, y = (np.log([r[name] for r in own]) for name in ("value", cost))
            mode, way, size = key
            slope = float(np.polyfit(x, y, 1)[0])
            most = MOST[cost][size][layer.PASSES.index(way)] if cost in MOST else None
            named = {"mode": mode, "pass": way, "size": size, "cost": cost}
            found.append(named | {"slope": slope, "most": most})
    return found


def too_steep(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each cost that grows faster than it must."""
    return [
        f"{s['mode']}, {s['pass']}: {s['cost']} grows as {s['size']}^{s['slope']:.2f}, "
        f"and need not grow faster than {s['size']}^{s['most']:g}"
        for s in found
        if s["most"] is not None and s["slope"] > s["most"] + ROOM
    ]


def show(found: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = Table(title=f"powers with which a layer's costs grow, tau={TAU}, {timing.machine()}")
    for name in ("mode", "pass", "cost"):
        table.add_column(name)
    for name in VALUES:
        table.add_column(name, justify="right")
    for key in dict.fromkeys((s["mode"], s["pass"], s["cost"]) for s in found):
        own = {s["size"]: s for s in found if (s["mode"], s["pass"], s["cost"]) == key}
        cells = (f"{own[n]['slope']:.2f}" if n in own else "" for n in VALUES)
        table.add_row(*key, *cells)
    console.print(table)


def figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A row of panels for each cost, a panel for each size, a line and its slope for each mode and
    pass."""
    costs = [cost for cost in COSTS if any(row.get(cost) is not None for row in rows)]
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    found = {(s["mode"], s["pass"], s["size"], s["cost"]): s["slope"] for s in slopes(rows)}
    drawn = drawing.new(3 * len(sizes), 2.6 * len(costs))
    panels = drawn.subplots(len(costs), len(sizes), squeeze=False, sharey="row", sharex="col")
    for (i, cost), (j, size) in itertools.product(enumerate(costs), enumerate(sizes)):
        axes = panels[i, j]
        own = [r for r in rows if r["size"] == size and r.get(cost) is not None]
        for number, key in enumerate(dict.fromkeys((r["mode"], r["pass"]) for r in own)):
            line = [(r["value"], r[cost]) for r in own if (r["mode"], r["pass"]) == key]
            label = f"{key[0]}, {key[1].replace('_', ' and ')}"
            axes.loglog(*zip(*line, strict=True), "o-", ms=3, color=f"C{number}", label=label)
            if (slope := found.get((*key, size, cost))) is not None:
                power = rf"${size}^{{{slope:.2f}}}$"
                where = dict(transform=axes.transAxes, va="top", fontsize=8)
                axes.text(0.03, 0.97 - 0.09 * number, power, color=f"C{number}", **where)
        axes.grid(alpha=0.3)
        axes.margins(y=0.3)
        values = sorted({r["value"] for r in own})
        axes.set_xticks(values, map(_short, values))
        axes.set_xticks([], minor=True)
        if i == len(costs) - 1:
            axes.set_xlabel(NAMES[size])
        if j == 0:
            axes.set_ylabel(cost.replace("_", " "))
    panels[0, 0].legend(fontsize=6, loc="lower right")
    return drawn


def _short(value: int) -> str:
    return f"{value // 1024}k" if value >= 1024 else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves")
    parser.add_argument("--clock", action="store_true", help="time the programs too")
    parser.add_argument("--json", type=Path, help="write rows and slopes to this file")
    parser.add_argument("--figure", type=Path, help="draw them: STEM.png and STEM.svg")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--modes", nargs="+", choices=layer.MODES, default=layer.MODES)
    parser.add_argument("--passes", nargs="+", choices=layer.PASSES, default=layer.PASSES)
    parser.add_argument("--sizes", nargs="+", choices=VALUES, default=list(VALUES))
    given = parser.parse_args()
    rounds, values = given.rounds if given.clock else 0, {n: VALUES[n] for n in given.sizes}
    rows = [
        row
        for mode in given.modes
        for way in given.passes
        for row in measure(mode, way, values, BASE, rounds)
    ]
    found = slopes(rows)
    show(found, Console(width=110))
    if given.json:
        report = {"machine": timing.machine(), "base": BASE, "rows": rows, "slopes": found}
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    if given.figure:
        drawing.write(figure(rows), given.figure)
    if steep := too_steep(found):
        sys.exit("\n".join(steep))


if __name__ == "__main__":
    main()
