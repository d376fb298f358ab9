"""Whether runs fit on devices that need not be there, and how long they take at least.

Of the paper's scale nothing is trained here; its runs are compiled. Rows are in
results/SCALE/compiled.csv: each run is compiled once for a topology, whichever experiment asks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moepp_jax import compile, markdown
from moepp_jax import mesh as mesh_lib
from moepp_jax.chips import GIB
from moepp_jax.compile.topology import Topology, devices
from moepp_jax.config import Config
from moepp_jax.errors import ConfigError
from moepp_jax.experiments import measure
from moepp_jax.experiments.measure import Measured, Measurement
from moepp_jax.experiments.runs import Run

# The bounds of a step's time: as rows name them (`..._ms`), and as reports do.
BOUNDS = {"arithmetic": "arithmetic", "hbm": "main memory", "interconnect": "interconnect"}

_HOUR = 3600.0


def file_of(scale: str, results: Path) -> Path:
    return results / scale / "compiled.csv"


def read(scale: str, results: Path) -> list[Measured]:
    """Rows, each named after the topology and how the run lies on it.

    Raises:
      ConfigError: a line is no row.
    """
    return measure.read(file_of(scale, results))


def compile_missing(
    runs: Sequence[Run], topology: str, file: Path, lock: Path, machine: str
) -> None:
    """Compiles the runs' steps for a topology where they have no row, and adds each one's row.

    Seeds differ in no program: of each variant the first is compiled.

    Raises:
      ConfigError: see `topology.devices`; or a configuration does not go with the topology.
    """
    chips = Topology.parse(topology).num_devices
    first = {run.key[0]: run for run in reversed(runs)}.values()
    wanted = [
        Measurement(
            _named(run, topology, chips),
            run,
            functools.partial(_examined, run=run, topology=topology),
        )
        for run in reversed(list(first))
    ]
    measure.take_missing(wanted, file, lambda run: None, lock, machine)


def _named(run: Run, topology: str, chips: int) -> str:
    """With what a run's fingerprint does not say: how it lies on the chips, and what it keeps."""
    with _naming(run):
        sizes = mesh_lib.mesh_shape(run.config, chips)
    return f"{topology}, {compile.describe(run.config, sizes)}"


@contextlib.contextmanager
def _naming(run: Run) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{run.name}: {error}") from error


def _examined(folder: None, run: Run, topology: str) -> Mapping[str, float]:
    with _naming(run):
        return examined(run.config, topology)


def examined(config: Config, text: str, profiled: str | None = None) -> dict[str, float]:
    """Of a chip: memory in GiB, and, if the step fits, the bounds of its time in milliseconds.

    Args:
      profiled: as in `compile.examine`.

    Raises:
      ConfigError: see `topology.devices` and `mesh.mesh_shape`.
    """
    return values_of(examination(config, text, profiled), config)


def examination(config: Config, text: str, profiled: str | None = None) -> Mapping[str, Any]:
    """All that `compile.examine` finds; arguments and errors as `examined`."""
    topology = Topology.parse(text)
    return compile.examine(config, devices(topology), topology, profiled=profiled)


def values_of(found: Mapping[str, Any], config: Config) -> dict[str, float]:
    """Of an examination what `examined` tells."""
    values = {"fits": float(found["fits"]), "hbm_gib": found["hbm_bytes"] / GIB}
    if limit := found["hbm_limit_bytes"]:
        values["limit_gib"] = limit / GIB
    if "bounds" in found:
        values |= {f"{name}_ms": 1e3 * bound for name, bound in found["bounds"].items()}
        values |= {name: found[name] for name in ("wire_ratio", "tokens_per_second", "mfu")}
        values["hours"] = found["step_seconds"] * config.train.steps / _HOUR
    return values


def table(rows: Sequence[Measured], named: Mapping[str, str]) -> list[str]:
    """Lines of Markdown, in the order of the variants.

    Args:
      named: fingerprint -> variant.
    """
    head = ["variant", "compiled for", "GiB a chip", "fits", "tokens a second", "hours"]
    lines = []
    order = list(named)
    own = [row for row in rows if row.fingerprint in named]
    for row in sorted(own, key=lambda row: (order.index(row.fingerprint), row.name)):
        v = row.values
        limit = f" of {v['limit_gib']:.0f}" if "limit_gib" in v else ""
        cells = [named[row.fingerprint], row.name, f"{v['hbm_gib']:.1f}{limit}"]
        cells += ["yes" if v["fits"] else "**no**"]
        bounds = ("tokens_per_second", ".3g"), ("hours", ".1f")
        cells += [format(v[name], form) if name in v else "" for name, form in bounds]
        lines.append(cells)
    return markdown.table(head, lines)
