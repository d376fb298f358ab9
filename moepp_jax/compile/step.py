"""Compiling the training step for devices that are not there: does it fit, and what bounds it.

The step is the one that `train` runs, compiled by the compiler that the devices would use. What is
told of memory and of collectives is the compiler's; bounds are by published peak figures.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from moepp_jax import mesh as mesh_lib
from moepp_jax import state, storage
from moepp_jax.compile import (
    choice,
    evaluation,
    findings,
    generation,
    gpu,
    hlo,
    profile,
    remedies,
    scheduled,
    tables,
)
from moepp_jax.compile.abstract import abstract_batch
from moepp_jax.compile.remedies import REMAT
from moepp_jax.compile.topology import Topology, devices
from moepp_jax.config import Config
from moepp_jax.errors import ConfigError


class OutOfMemoryError(Exception):
    """The compiler found no way to fit the step into a chip's memory.

    Attributes:
      needed: bytes that it asked for, None if it did not say.
    """

    def __init__(self, message: str):
        super().__init__(message)
        needed = re.search(r"(?:[Uu]sed |temporaries \()([\d.]+)([KMGT])", message)
        self.needed = int(float(needed[1]) * 1024 ** (" KMGT".index(needed[2]))) if needed else None


def run(
    config: Config,
    topology_text: str,
    json_file: str | None = None,
    profiled: str | None = None,
    figure_file: str | None = None,
    generates: bool = False,
    chooses_remat: bool = False,
) -> bool:
    """Compiles, prints what was found, writes it to a file if one is named; does all of it fit?

    That is the step and, unless it is compiled no further than its schedule, the evaluation.

    Args:
      profiled: as in `examine`.
      figure_file: a PNG of what is predicted of the step and of its vanilla twin's; by default it
        goes beside the JSON.
      generates: generation is compiled too, and is to fit one of the ways that it can be run.
      chooses_remat: predicts the step with every `model.remat`, and names the fastest that fits.

    Raises:
      ConfigError: see `topology.devices` and `mesh.mesh_shape`; or a file's folder is missing.
    """
    if figure_file and not profiled:
        raise ConfigError(f"--figure={figure_file} shows what --profile predicts: give both")
    if chooses_remat and profiled != "fast":
        raise ConfigError("--choose_remat compares what --profile predicts: give --profile too")
    if profiled and json_file and not figure_file:
        figure_file = str(storage.open_path(json_file).with_suffix(".png"))
    file, drawing = _place("json", json_file), _place("figure", figure_file)
    topology = Topology.parse(topology_text)
    if profiled:
        profile.require_rates(topology)
    there = devices(topology)
    mesh_lib.mesh_shape(config, len(there))  # its errors come before a long compilation
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # of a file or a pipe it cannot know
    with _spinner(console) as spinner:
        report = examine(config, there, topology, spinner.say, profiled)

        def predicted(changed: Config) -> dict[str, Any]:
            return examine(changed, there, topology, spinner.say, "fast")

        if drawing:
            _draw(drawing, config, report, predicted)
        if chooses_remat:
            report["remat_choices"] = choice.of_remat(config, report, predicted)
        if report["fits"] and profiled != "fast":
            spinner.say(f"compiling the evaluation for {topology.text}")
            mesh = mesh_lib.make_mesh(config, there)
            report["evaluation"] = evaluation.examine(config, mesh, report["hbm_limit_bytes"])
        if generates:
            spinner.say(f"compiling generation for {topology.text}")
            report["generation"] = generation.examine(config, there, report["hbm_limit_bytes"])
        if not report["fits"]:
            report["remedy"] = remedies.find(
                config,
                len(there),
                report["hbm_limit_bytes"],
                lambda c: examine(c, there, topology, spinner.say, profiled)["hbm_bytes"],
            )
    tables.show(report, console)
    if file:
        storage.write_atomic(file, json.dumps(report, indent=2) + "\n")
    generated = any(way["fits"] for way in report.get("generation", [report]))
    return report["fits"] and report.get("evaluation", report)["fits"] and generated


def _place(flag: str, name: str | None) -> storage.AnyPath | None:
    file = storage.open_path(name) if name else None
    if file and not file.parent.is_dir():
        raise ConfigError(f"--{flag}={file}: there is no such folder")
    return file


def _draw(
    file: storage.AnyPath,
    config: Config,
    report: dict[str, Any],
    examined: Callable[[Config], dict[str, Any]],
) -> None:
    """What is predicted of a configuration and of its vanilla twin, if it is none itself."""
    from moepp_jax.compile import figure  # its library takes a second to import

    rows = {"this configuration": report}
    if twin := profile.vanilla_twin(config):
        # Its buffers are larger: what leaves room here may squeeze it.
        policies = REMAT[REMAT.index(config.model.remat) :]
        twin, found = choice.fastest(twin, examined, policies)
        rows["its vanilla twin"] = found
        report["vanilla"] = profile.predicted(found) | {"remat": twin.model.remat}
    predicted = {name: row for name, row in rows.items() if "parts_ms" in row}
    if predicted:
        figure.write(file, predicted, report["topology"])


class _Spinner(Progress):
    def say(self, text: str) -> None:
        self.reset(self.tasks[0].id, description=text)


def _spinner(console: Console) -> _Spinner:
    """What is being compiled, and for how long; only seen on a terminal."""
    columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    spinner = _Spinner(*columns, console=console, transient=True, disable=not console.is_terminal)
    spinner.add_task("")
    return spinner


def examine(
    config: Config,
    there: Sequence[jax.Device],
    topology: Topology,
    say: Callable[[str], None] = lambda text: None,
    profiled: str | None = None,
) -> dict[str, Any]:
    """Everything that is known of the step after compiling it, as JSON has it.

    Args:
      profiled: predict its time too: "fast" compiles it no further than its schedule, "full" to the
        end.

    Raises:
      ConfigError: there are no rates of the chip to predict with, or no end of compiling.
    """
    chip = profile.require_rates(topology) if profiled else None
    sizes = mesh_lib.mesh_shape(config, len(there))
    say(f"compiling for {topology.text}: {describe(config, sizes)}")
    mesh = mesh_lib.make_mesh(config, there)
    report = findings.described(config, mesh, topology)
    try:
        if profiled == "fast":
            module, memory = _schedule(config, topology, report["state_bytes"])
        else:
            compiled = compile_step(config, mesh)
            module = hlo.parse(compiled.as_text())
            memory = findings.memory(compiled.memory_analysis(), there[0].platform)
    except OutOfMemoryError as error:
        needed = max(error.needed or 0, report["state_bytes"])
        return report | {"fits": False, "hbm_bytes": needed, "error": str(error)}
    module = dataclasses.replace(module, load=findings.load(config, mesh))
    limit = report["hbm_limit_bytes"]
    report |= memory | {"fits": limit is None or memory["hbm_bytes"] <= limit}
    report |= findings.work(config, mesh, topology, module)
    if chip:
        report |= profile.predict(config, mesh, chip, module)
    if profiled == "full":
        report["by_the_compiler"] = profile.by_the_compiler(compiled, module, chip)
    return report


def _schedule(config: Config, topology: Topology, state: int) -> tuple[hlo.Module, dict[str, int]]:
    """The program as far as its schedule, and its memory, of which the code's is not known yet.

    Raises:
      OutOfMemoryError: it does not fit.
      ConfigError: the compiler failed.
    """
    try:
        text, needed = scheduled.compile_step(config, topology.text)
    except scheduled.DiedError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise OutOfMemoryError(str(error)) from error
        raise ConfigError(f"--topology={topology.text}: {error}") from error
    return hlo.parse(text), {"temporary_bytes": max(needed - state, 0), "hbm_bytes": needed}


def describe(config: Config, sizes: Sequence[int]) -> str:
    """What varies from one compilation to the next, short enough for a line of a terminal."""
    mesh = "x".join(map(str, sizes))
    return f"mesh {mesh}, remat {config.model.remat}, accumulate {config.train.accumulate}"


def compile_step(config: Config, mesh: Mesh) -> jax.stages.Compiled:
    """The training step, compiled for the devices of the mesh.

    Raises:
      OutOfMemoryError: it does not fit.
    """
    parts = state.assemble(config, mesh)
    lowered = state.make_train_step(parts).lower(parts.abstract, abstract_batch(config, mesh))
    try:
        return lowered.compile(gpu.COMPILER_OPTIONS if parts.platform == "gpu" else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemoryError(str(error).strip().splitlines()[0]) from error
