"""Do the paper's models train on GPUs, by what the compiler makes of it?

Question  what the training steps of the 0.6B and the 7B model need of a GPU's memory, and which of
          their bounds (arithmetic, main memory, interconnect) is the largest, on one host of eight
          and on eight such hosts that need not be there.
Paper     none: it does not say what it was trained on.
Claim     both fit 8 and 64 H100 with the paper's batch, in the share of the memory that JAX takes
          when it starts.
Refuted   if one does not.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from moepp_jax import markdown
from moepp_jax.chips import GB, GIB
from moepp_jax.config import Config
from moepp_jax.experiments import compiled, figures
from moepp_jax.experiments.measure import Measurement
from moepp_jax.experiments.scale import PAPER, Scale, Variant
from moepp_jax.experiments.study import FAILS, HOLDS, MISSING, Results, Study, Verdict

_MODELS = {"0.6B": "8+4", "7B": "16+4, larger"}  # of the scale's sizes
_CLAIMED = "h100:"


class Size(NamedTuple):
    """How a model's mesh lies on hosts: FFN experts within one, where the links are."""

    model: str
    topology: str
    data: int
    fsdp: int
    expert: int
    accumulate: int
    dropless: bool = False

    @property
    def name(self) -> str:
        return f"{self.model} {self.where}"

    @property
    def where(self) -> str:
        return f"{self.topology}{', dropless' if self.dropless else ''}"


SIZES = (
    Size("0.6B", "h100:8", 1, 1, 8, accumulate=8),
    Size("0.6B", "h100:8", 1, 1, 8, accumulate=8, dropless=True),
    Size("0.6B", "h100:8x8", 8, 1, 8, accumulate=1),
    Size("7B", "a100:8x8", 1, 8, 8, accumulate=1),
    Size("7B", "h100:8", 1, 1, 8, accumulate=32),
    Size("7B", "h100:8x8", 1, 8, 8, accumulate=1),  # as launch/ starts it
    Size("7B", "h100:8x8", 1, 8, 8, accumulate=1, dropless=True),
    Size("7B", "h200:8", 1, 1, 8, accumulate=16),
    Size("7B", "b200:8", 1, 1, 8, accumulate=16),
)


class Gpus(Study):
    scales = (PAPER.name,)

    def variants(self, scale: Scale) -> list[Variant]:
        return []

    def measurements(self, scale: Scale) -> list[Measurement]:
        return [
            Measurement(size.name, None, functools.partial(_compile, on(scale, size), size))
            for size in SIZES
        ]

    def verdicts(self, results: Results) -> list[Verdict]:
        rows = _rows(results)
        return [_verdict(size, rows.get(size)) for size in SIZES if _CLAIMED in size.topology]

    def figure(self, results: Results) -> Figure:
        rows = _rows(results)
        figure = figures.new(11, 4.3)
        memory, bounds = figure.subplots(1, 2, sharey=True)
        names = [size.name for size in rows]
        memory.barh(names, [row["hbm_gib"] for row in rows.values()], color="C0", label="needed")
        for at, row in enumerate(rows.values()):
            ends = (at - 0.4, at + 0.4)
            memory.plot([row["limit_gib"]] * 2, ends, color="C3", label="" if at else "the card's")
            taken = [row["preallocated_gib"]] * 2
            memory.plot(taken, ends, ":", color="C3", label="" if at else "taken by JAX")
        for (name, label), marker in zip(compiled.BOUNDS.items(), "os^", strict=True):
            # A row that does not fit has no bounds.
            there = [(at, row) for at, row in enumerate(rows.values()) if f"{name}_ms" in row]
            times = [row[f"{name}_ms"] for _, row in there]
            places = [at for at, _ in there]
            bounds.plot(times, places, marker, ms=7, mew=1.8, mfc="none", label=label)
        memory.set(title="Memory of a GPU", xlabel="GiB")
        memory.invert_yaxis()
        bounds.set(title="Bounds of a step", xlabel="ms at least", xscale="log")
        for axes in (memory, bounds):
            axes.grid(alpha=0.3, axis="both" if axes is bounds else "x")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=3, frameon=False)
        return figure

    def more(self, results: Results) -> list[str]:
        rows = _rows(results)
        if not rows:
            return []
        head = ["model", "GPUs", "data x fsdp x expert", "accumulate", "GiB a GPU", "of the card's"]
        head += ["taken by JAX", "TFLOP in bfloat16", "in TF32", "in float32", "not read"]
        head += [f"{label}, ms" for label in compiled.BOUNDS.values()]
        head += ["exchanges, of these alone", "tokens/s at most", "MFU at most"]
        lines = markdown.table(head, (_cells(size, row) for size, row in rows.items()))
        names = [size.name for size in rows]
        of_parts = markdown.table(["ms at least", *names], _grid(rows, _PART, ",.4g"))
        sent = markdown.table(["GB a GPU sends (how often)", *names], _grid(rows, _SENT, ",.2f"))
        return [*lines, "", *of_parts, "", *sent, "", _NOTES, ""]


_NOTES = """\
The batch is the paper's 2,048 sequences, on topologies of hosts x GPUs. Nothing here ran on a GPU:
the step is compiled by XLA for CUDA from a description of the card. So buffers, kernels and
collectives are those of a run; what is tuned on a card (tiles, algorithms, their workspaces) and
what NCCL needs are not in these numbers, nor does anything here say how fast a kernel is. Bounds
are at the published peaks of each arithmetic and overlap entirely. `not read` are kernels whose
operations the program does not tell. Exchanges are alone that have no product scheduled beside
them. JAX takes 75 % of a card when it starts
(XLA_PYTHON_CLIENT_MEM_FRACTION).

Parts are at these peaks too, those of forward and backward together; they run beside each other in
part, and the exchange is in full.

Without drops, experts are the project's own kernels for Triton, over rows sorted by expert: of
their buffers as many rows count as there are at balance.

Attention is cuDNN's fused kernel, as in a run on cards, in backward with the gradient of its mask,
which nothing reads and JAX asks for all the same.

The compiler has to be there (`make gpu-pods` puts it beside the environment)."""


def on(scale: Scale, size: Size) -> Config:
    """The recipe on a mesh."""
    config = scale.variant(size.model, of=scale.sizes[_MODELS[size.model]]).config
    config = config.replace("mesh", data=size.data, fsdp=size.fsdp, expert=size.expert)
    # As launch/ has it: a card has less memory than a v5p chip.
    config = config.replace("model", remat="exchanged")
    if size.dropless:  # with room for a quarter more rows than all choices are
        fields = {"dispatch": "dropless", "exchange_buffer": 1.25, "exchange_parts": 1}
        config = config.replace("moe", **fields)
    return config.replace("train", accumulate=size.accumulate)


def _compile(config: Config, size: Size, folder: Path | None) -> Mapping[str, float]:
    found = compiled.examination(config, size.topology)
    values = compiled.values_of(found, config)
    values["preallocated_gib"] = found["preallocated_bytes"] / GIB
    kernels = found.get("kernels", [])
    for arithmetic in ("bf16", "tf32", "f32"):
        flops = sum(row["flops"] or 0 for row in kernels if row["arithmetic"] == arithmetic)
        values[f"{arithmetic}_tflop"] = flops / 1e12
    for part, least in found.get("roofline", {}).items():
        values[f"{_PART}{part}"] = least["ms"]
    for row in found.get("collectives", []):
        for column, of in ((_SENT, row["bytes"] / GB), (_OFTEN, float(row["count"]))):
            values[column + row["kind"]] = values.get(column + row["kind"], 0.0) + of
    windows = found.get("exchanges", [])
    values["exchanges"] = float(sum(row["count"] for row in windows))
    values["exchanges_alone"] = float(sum(row["count"] for row in windows if not row["flops"]))
    values["unread"] = float(sum(row["times"] for row in kernels if row["flops"] is None))
    return values


# Columns of parts, and of kinds of collectives.
_PART, _SENT, _OFTEN = "least ms: ", "GB: ", "times: "


def _grid(rows: Mapping[Size, Mapping[str, float]], of: str, form: str) -> list[list[str]]:
    """A line for each column that begins so, a cell for each row."""
    names = dict.fromkeys(name for row in rows.values() for name in row if name.startswith(of))
    lines = []
    for name in names:
        told = [format(row[name], form) if name in row else "" for row in rows.values()]
        often = [row.get(name.replace(of, _OFTEN)) for row in rows.values()]
        counts = [f" ({n:,.0f})" if n and of == _SENT else "" for n in often]
        lines.append([name.removeprefix(of), *map("".join, zip(told, counts, strict=True))])
    return lines


def _rows(results: Results) -> dict[Size, Mapping[str, float]]:
    """What was found, in the order of SIZES."""
    found = {row.name: row.values for row in results.measured}
    return {size: found[size.name] for size in SIZES if size.name in found}


def _verdict(size: Size, row: Mapping[str, float] | None) -> Verdict:
    if row is None:
        return Verdict(MISSING, f"{size.name} is not compiled yet")
    needed, taken = row["hbm_gib"], row["preallocated_gib"]
    said = f"{size.name} needs {needed:.1f} GiB a GPU, and JAX takes {taken:.1f}"
    return Verdict(HOLDS if needed <= taken else FAILS, said)


def _cells(size: Size, row: Mapping[str, float]) -> list[str]:
    mesh = f"{size.data} x {size.fsdp} x {size.expert}"
    cells = [size.model, size.where, mesh, str(size.accumulate), f"{row['hbm_gib']:.1f}"]
    cells += [f"{row['limit_gib']:.1f}", f"{row['preallocated_gib']:.1f}"]
    cells += [f"{row[f'{name}_tflop']:,.2f}" for name in ("bf16", "tf32", "f32")]
    cells.append(f"{row['unread']:.0f}")
    if not row["fits"]:
        return [*cells, *["does not fit"] * (len(compiled.BOUNDS) + 3)]
    cells += [f"{row[f'{bound}_ms']:,.4g}" for bound in compiled.BOUNDS]
    cells.append(f"{row['exchanges']:,.0f}, {row['exchanges_alone']:,.0f}")
    return [*cells, f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.1%}"]
