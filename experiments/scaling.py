"""How far does the training step scale, by what the compiler makes of it? 7B on 8 to 4,096 TPU v5p.

    python -m experiments.scaling                     # or `make scaling`, which installs libtpu
    python -m experiments.scaling --compile_up_to=64  # extrapolate the rest

Question   which bound of the step (arithmetic, memory, interconnect) grows as chips are added?
Claim      none: with tokens split over all axes and parameters gathered a layer at a time, the
           bounds of a chip follow its tokens, and the rest stays small up to 2,048 chips.
Refuted    if the interconnect's bound becomes the largest.

The batch is the paper's 2,048 sequences, and from 4,096 chips on one a chip. No chip is needed or
run: rows say how fast the step could be at most, not how fast it is. A row is "compiled", or
"extrapolated" from the last compiled one: arithmetic and memory traffic by the tokens of a chip,
the interconnect by the scheme's least traffic (`moepp_jax.compile.traffic`) over this mesh and
torus, times the ratio that was found there; memory by its state, and temporaries by the tokens at
once.

Writes docs/scaling/scaling.csv, row by row, and scaling.png. Compiled rows that are there are kept:
remove the file to begin anew.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from jax.sharding import Mesh
from matplotlib.figure import Figure
from rich.console import Console

from experiments import rows as rows_lib
from moepp_jax import cli, compile
from moepp_jax import mesh as mesh_lib
from moepp_jax.chips import GIB
from moepp_jax.compile import findings, traffic
from moepp_jax.compile.roofline import Interconnect
from moepp_jax.compile.topology import Topology, devices
from moepp_jax.config import Config
from moepp_jax.storage import write_atomic

COLUMNS = (
    "chips",
    "topology",
    "data",
    "fsdp",
    "expert",
    "accumulate",
    "tokens_per_step",
    "how",
    "hbm_gib",
    "flops",
    "hbm_traffic_bytes",
    "wire_bytes",
    "wire_ratio",
    "arithmetic_ms",
    "hbm_ms",
    "interconnect_ms",
    "tokens_per_second",
    "mfu",
)
_BOUNDS = ("arithmetic", "hbm", "interconnect")


class Size(NamedTuple):
    """A slice and how the mesh lies on it: the axes are products of its dimensions."""

    topology: str
    data: int
    fsdp: int
    expert: int
    accumulate: int = 1


SIZES = (
    Size("v5p:2x2x2", 1, 2, 4, accumulate=8),
    Size("v5p:2x2x4", 1, 4, 4, accumulate=4),
    Size("v5p:2x4x4", 1, 2, 16, accumulate=2),
    Size("v5p:4x4x4", 1, 4, 16),
    Size("v5p:4x4x8", 1, 8, 16),
    Size("v5p:4x8x8", 4, 8, 8),
    Size("v5p:8x8x8", 8, 8, 8),
    Size("v5p:8x8x16", 8, 8, 16),
    Size("v5p:8x16x16", 8, 16, 16),
    Size("v5p:16x16x16", 16, 16, 16),
)


def scaling(base: Config, folder: Path, compile_up_to: int, console: Console) -> list[dict]:
    """The rows, and the files."""
    file = folder / "scaling.csv"
    kept = {row["topology"]: row for row in _read(file) if row["how"] == "compiled"}
    rows: list[dict] = []
    reference: dict[str, Any] | None = None
    for number, size in enumerate(SIZES):
        topology = Topology.parse(size.topology)
        config = _config(base, size, topology.num_devices)
        row = kept.get(size.topology)
        if row is None and (topology.num_devices <= compile_up_to or reference is None):
            console.print(f"compiling for {size.topology}")
            row = _compiled(config, size, topology)
        if row is None:
            row = _extrapolated(config, size, topology, reference, base)
        else:
            reference = row
        rows.append(row)
        later = [kept[s.topology] for s in SIZES[number + 1 :] if s.topology in kept]
        rows_lib.write(file, COLUMNS, rows + later)
    write_atomic(folder / "scaling.png", _figure(rows))
    return rows


def _config(base: Config, size: Size, chips: int) -> Config:
    config = base.replace("mesh", data=size.data, fsdp=size.fsdp, expert=size.expert)
    batch = max(base.train.batch_size, chips)
    return config.replace("train", batch_size=batch, accumulate=size.accumulate)


def _compiled(config: Config, size: Size, topology: Topology) -> dict[str, Any]:
    report = compile.examine(config, devices(topology), topology)
    if "bounds" not in report:
        raise RuntimeError(f"{size.topology} does not fit: {report['error']}")
    return _row(config, size, topology, "compiled", report)


def _extrapolated(
    config: Config, size: Size, topology: Topology, known: Mapping[str, Any], base: Config
) -> dict[str, Any]:
    chip = topology.chip
    mesh, held = _mesh_and_state(config, topology)
    network = Interconnect(list(mesh.devices.flat), chip)
    known_size = Size(*(known[field] for field in Size._fields))
    known_topology = Topology.parse(known_size.topology)
    known_config = _config(base, known_size, known["chips"])
    _, known_held = _mesh_and_state(known_config, known_topology)
    tokens = config.train.batch_size * config.data.seq_len / topology.num_devices
    scale = tokens / (known["tokens_per_step"] / known["chips"])
    report = {
        "flops": known["flops"] * scale,
        "hbm_traffic_bytes": known["hbm_traffic_bytes"] * scale,
        "wire_bytes": sum(traffic.least(config, mesh.shape).values()) * known["wire_ratio"],
        "wire_ratio": known["wire_ratio"],
    }
    at_once = scale * known["accumulate"] / size.accumulate
    report["hbm_bytes"] = held + (known["hbm_gib"] * GIB - known_held) * at_once
    report["bounds"] = {
        "arithmetic": report["flops"] / chip.flops,
        "hbm": report["hbm_traffic_bytes"] / chip.hbm_bandwidth,
        "interconnect": network.bound(traffic.collectives(config, mesh.shape))
        * known["wire_ratio"],
    }
    report |= findings.best_case(config, mesh.size, chip.flops, report["bounds"])
    return _row(config, size, topology, "extrapolated", report)


def _mesh_and_state(config: Config, topology: Topology) -> tuple[Mesh, int]:
    """The mesh, and the bytes of parameters and optimizer state on a chip."""
    mesh = mesh_lib.make_mesh(config, devices(topology))
    return mesh, findings.described(config, mesh, topology)["state_bytes"]


def _row(
    config: Config, size: Size, topology: Topology, how: str, report: Mapping[str, Any]
) -> dict[str, Any]:
    row = size._asdict() | {
        "chips": topology.num_devices,
        "tokens_per_step": config.train.batch_size * config.data.seq_len,
        "how": how,
        "hbm_gib": report["hbm_bytes"] / GIB,
    }
    row |= {f"{bound}_ms": 1e3 * report["bounds"][bound] for bound in _BOUNDS}
    return row | {name: report[name] for name in COLUMNS if name in report}


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        return [{k: _value(v) for k, v in row.items()} for row in csv.DictReader(lines)]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _figure(rows: Sequence[Mapping[str, Any]]) -> bytes:
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    speed, bounds = figure.subplots(1, 2)
    chips = [row["chips"] for row in rows]
    speeds = [row["tokens_per_second"] for row in rows]
    speed.plot(chips, [speeds[0] * n / chips[0] for n in chips], "--", color="0.6", label="linear")
    speed.plot(chips, speeds, color="C0", label="bound")
    for how, fill in (("compiled", "C0"), ("extrapolated", "white")):
        points = [(row["chips"], row["tokens_per_second"]) for row in rows if row["how"] == how]
        if points:
            speed.plot(*zip(*points, strict=True), "o", color="C0", mfc=fill, label=how)
    names = {"arithmetic": "arithmetic", "hbm": "main memory", "interconnect": "interconnect"}
    for bound, label in names.items():
        bounds.plot(chips, [row[f"{bound}_ms"] for row in rows], marker=".", label=label)
    speed.set(title="Upper bound of the training speed", ylabel="tokens/s")
    bounds.set(title="Bounds of a step", ylabel="ms at least")
    for axes in (speed, bounds):
        axes.set(xscale="log", yscale="log", xlabel="TPU v5p chips", xticks=chips)
        axes.set_xticks(chips, [str(n) for n in chips], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


if __name__ == "__main__":
    _CONFIG = cli.define_config("configs/moepp_7b.py")
    _FOLDER = flags.DEFINE_string("folder", "docs/scaling", "where the files are written")
    _UP_TO = flags.DEFINE_integer("compile_up_to", 512, "chips; larger rows are extrapolated")

    def main(_: Sequence[str]) -> None:
        rows = scaling(Config.parse(_CONFIG.value), Path(_FOLDER.value), _UP_TO.value, Console())
        for row in rows:
            speed = f"{row['tokens_per_second']:>13,.0f} tokens/s"
            print(f"{row['chips']:>5} chips  {row['how']:<12} {speed}  MFU {row['mfu']:.1%}")

    cli.run(main)
