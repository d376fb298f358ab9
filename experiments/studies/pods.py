"""How far does the training step scale, by what the compiler makes of it?

Question  which bound of the 7B model's step (arithmetic, main memory, interconnect) is the largest
          as chips are added, from 8 to 4,096 TPU v5p that need not be there, and which of them
          shrink as a chip's tokens do.
Paper     none: it does not say what it was trained on.
Claim     with tokens split over all axes and parameters gathered a layer at a time, the
          interconnect's bound is not the largest at 2,048 chips.
Refuted   if it is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moepp_jax import markdown
from moepp_jax.config import Config
from moepp_jax.experiments import compiled, figures
from moepp_jax.experiments.measure import Measurement
from moepp_jax.experiments.scale import PAPER, Scale, Variant
from moepp_jax.experiments.study import FAILS, HOLDS, MISSING, Results, Study, Verdict

_MODEL = "16+4, larger"  # of the scale's sizes: the 7B
_AT = "v5p:8x16x16"
_USUAL = "v5p:4x4x4"  # from here on nothing but the mesh changes, until the batch grows


class Size(NamedTuple):
    """How the mesh lies on a slice: its axes are products of the slice's dimensions."""

    data: int
    fsdp: int
    expert: int
    accumulate: int = 1

    @property
    def chips(self) -> int:
        return self.data * self.fsdp * self.expert


SIZES = {
    "v5p:2x2x2": Size(1, 2, 4, accumulate=8),
    "v5p:2x2x4": Size(1, 4, 4, accumulate=4),
    "v5p:2x4x4": Size(1, 2, 16, accumulate=2),
    "v5p:4x4x4": Size(1, 4, 16),
    "v5p:4x4x8": Size(1, 8, 16),
    "v5p:4x8x8": Size(4, 8, 8),
    "v5p:8x8x8": Size(8, 8, 8),
    "v5p:8x8x16": Size(8, 8, 16),
    "v5p:8x16x16": Size(8, 16, 16),
    "v5p:16x16x16": Size(16, 16, 16),
}


class Pods(Study):
    scales = (PAPER.name,)

    def variants(self, scale: Scale) -> list[Variant]:
        return []

    def measurements(self, scale: Scale) -> list[Measurement]:
        usual = scale.variant("7B", of=scale.sizes[_MODEL]).config
        return [
            Measurement(name, None, functools.partial(_compile, on(usual, size), name))
            for name, size in SIZES.items()
        ]

    def verdicts(self, results: Results) -> list[Verdict]:
        found = _rows(results).get(_AT)
        if found is None:
            return [Verdict(MISSING, f"{_AT} is not compiled yet")]
        bounds = {label: found[f"{name}_ms"] for name, label in compiled.BOUNDS.items()}
        largest = max(bounds, key=bounds.get)
        each = ", ".join(f"{label} {ms:.3g}" for label, ms in bounds.items())
        said = f"at {SIZES[_AT].chips:,} chips a step takes, in ms at least: {each}"
        return [Verdict(FAILS if largest == compiled.BOUNDS["interconnect"] else HOLDS, said)]

    def figure(self, results: Results) -> Figure:
        rows = _rows(results)
        figure = figures.new(11, 4.3)
        speed, bounds = figure.subplots(1, 2)
        chips = [SIZES[name].chips for name in rows]
        speeds = [row["tokens_per_second"] for row in rows.values()]
        speed.plot(chips, speeds, "o-", color="C0", label="bound")
        if _USUAL in rows:
            first = SIZES[_USUAL].chips
            after = [n for n in chips if n >= first]
            linear = [rows[_USUAL]["tokens_per_second"] * n / first for n in after]
            speed.plot(after, linear, "--", color="C1", label=f"linear from {first} chips on")
        for name, label in compiled.BOUNDS.items():
            times = [row[f"{name}_ms"] for row in rows.values()]
            bounds.plot(chips, times, "o-", markersize=4, label=label)
        speed.set(title="Upper bound of the training speed", ylabel="tokens/s")
        bounds.set(title="Bounds of a step", ylabel="ms at least")
        for axes in (speed, bounds):
            axes.set(yscale="log")
            figures.by_chips(axes, chips)
            axes.grid(alpha=0.3)
            _mark(axes, results.scale)
            figures.legend(axes)
        return figure

    def more(self, results: Results) -> list[str]:
        rows = _rows(results)
        if not rows:
            return []
        head = ["chips", "slice", "data x fsdp x expert", "accumulate", "GiB a chip"]
        head += [f"{label}, ms" for label in compiled.BOUNDS.values()]
        head += ["bytes sent over the least", "tokens/s at most", "MFU at most"]
        lines = []
        for name, row in rows.items():
            size = SIZES[name]
            mesh = f"{size.data} x {size.fsdp} x {size.expert}"
            cells = [f"{size.chips:,}", name, mesh, str(size.accumulate), f"{row['hbm_gib']:.1f}"]
            cells += [f"{row[f'{bound}_ms']:,.4g}" for bound in compiled.BOUNDS]
            cells += [f"{row['wire_ratio']:.3f}", f"{row['tokens_per_second']:,.0f}"]
            lines.append([*cells, format(row["mfu"], ".1%")])
        return [*markdown.table(head, lines), "", *_shrinking(rows), _NOTES, ""]


_NOTES = """\
The batch is the paper's 2,048 sequences, and from 4,096 chips on one a chip. Below 64 chips it is
worked through in parts, and backward computes more again (`model.remat` is "exchanged"): the line
of linear growth begins at 64. Nothing here ran on a TPU: the step is compiled by the compiler that
a TPU would use, as far as its schedule, and bounds follow from what it made of it at the chip's
published peak figures, every instruction taken to run at the peak of what bounds it and all three
to overlap entirely. They say how fast this program could be at most.

The compiler of TPUs has to be there (`make pods` puts it beside the environment)."""


def on(config: Config, size: Size) -> Config:
    """The recipe on a mesh."""
    config = config.replace("mesh", data=size.data, fsdp=size.fsdp, expert=size.expert)
    if size.accumulate > 1:  # where each chip holds more of the model, less is kept
        config = config.replace("model", remat="exchanged")
    batch = max(config.train.batch_size, size.chips)
    return config.replace("train", batch_size=batch, accumulate=size.accumulate)


def _compile(config: Config, topology: str, folder: Path | None) -> Mapping[str, float]:
    return compiled.examined(config, topology, "fast")


def _rows(results: Results) -> dict[str, Mapping[str, float]]:
    """Topology -> what was found of it, in the order of SIZES."""
    found = {row.name: row.values for row in results.measured if row.values["fits"]}
    return {name: found[name] for name in SIZES if name in found}


def _shrinking(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """By how much bounds do where a chip's tokens do by a known number."""
    if _USUAL not in rows or _AT not in rows:
        return []
    few, many = SIZES[_USUAL].chips, SIZES[_AT].chips
    times = {
        label: rows[_USUAL][f"{name}_ms"] / rows[_AT][f"{name}_ms"]
        for name, label in compiled.BOUNDS.items()
    }
    each = ", ".join(f"{label} {ratio:.1f} times" for label, ratio in times.items())
    return [
        f"At {many:,} chips a chip has {many // few} times fewer tokens than at {few}, and its "
        "bounds are so much smaller:",
        f"{each}. The one that follows the tokens least is {min(times, key=times.get)}.",
        "",
    ]


def _mark(axes: Axes, scale: Scale) -> None:
    """Shades where something else is changed than the mesh."""
    batch = scale.variant("7B", of=scale.sizes[_MODEL]).config.train.batch_size
    beside = math.sqrt(2)  # to the middle between two sizes
    chips = [size.chips for size in SIZES.values()]
    low, high = min(chips) / beside, max(chips) * beside
    in_parts = max(size.chips for size in SIZES.values() if size.accumulate > 1)
    style = {"lw": 0, "zorder": 0}
    axes.axvspan(low, in_parts * beside, color="0.93", label="in parts, recomputed", **style)
    axes.axvspan(batch * beside, high, color="#FCE9D4", label="batch grows with chips", **style)
    axes.set_xlim(low, high)
