"""Where the time of a training step goes: MoE++ beside its vanilla twin, part by part.

    python -m benchmarks.step [--config NAME] [--json FILE] [--figure STEM]

Both train for some steps, so that their routers have learnt how to spread tokens. Then a step of
each is timed by turns; some more are traced, and what every instruction took is counted for a part
of the step, by the model's named scopes. What no instruction takes is the last part, "between".

The theory is about FFN experts alone: if nothing but their time became less, as much as the tokens
that they are spared, a whole step would be so much faster, and no more ("at most").
"""

from __future__ import annotations

from moepp_jax import host_memory

if __name__ == "__main__":
    host_memory.keep_freed_on_cpu()  # before an import starts a thread

import argparse
import importlib
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moepp_jax import mesh as mesh_lib
from moepp_jax import recipes
from moepp_jax import state as state_lib
from moepp_jax.analysis import drawing
from moepp_jax.benchmarks import timing, traced
from moepp_jax.compile import hlo, parts
from moepp_jax.compile.profile import vanilla_twin
from moepp_jax.config import Config
from moepp_jax.data import Dataset, prepare
from moepp_jax.errors import ConfigError

BETWEEN = "between"
NAMES = {"moepp": "MoE++", "moe": "vanilla MoE"}


class Training:
    """A run from fresh parameters on, on one device, a step at a time.

    Attributes:
      module: the program of a step.
    """

    def __init__(self, config: Config, dataset: Dataset):
        mesh = mesh_lib.make_mesh(config, jax.devices()[:1])
        assembly = state_lib.assemble(config, mesh)
        self._placed = mesh_lib.batch_sharding(mesh)
        self._batches = dataset.train_batches()
        self._state = state_lib.init_state(assembly)
        first = self._next_batch()
        step = state_lib.make_train_step(assembly)
        self._compiled = step.lower(assembly.abstract, first).compile()
        self.module = hlo.parse(self._compiled.as_text())

    def step(self) -> Any:
        """The metrics of the next step, which may not have ended."""
        self._state, metrics = self._compiled(self._state, self._next_batch())
        return metrics

    def _next_batch(self) -> Any:
        return jax.device_put(next(self._batches), self._placed)


def twins(config: Config) -> dict[str, Config]:
    """
    Raises:
      ConfigError: it is of a vanilla MoE itself.
    """
    twin = vanilla_twin(config)
    if twin is None:
        raise ConfigError("config.moe has no zero-computation experts: give the recipe of a MoE++")
    return {"moepp": config, "moe": twin}


def measure(
    configs: Mapping[str, Config], dataset: Dataset, before: int, rounds: int, steps: int
) -> dict[str, dict[str, Any]]:
    """Of both twins, what a step takes and its parts; seconds.

    Args:
      before: steps that each has made by then.
      steps: that are traced.
    """
    runs = {name: Training(config, dataset) for name, config in configs.items()}
    experts = {}
    for name, run in runs.items():
        for _ in track(range(max(before, 1)), f"{NAMES[name]}: steps before", transient=True):
            metrics = jax.block_until_ready(run.step())
        experts[name] = float(metrics["ffn_experts_per_token"])
    seconds = timing.interleaved(
        {name: timing.Case(run.step, ()) for name, run in runs.items()}, rounds
    )
    found = {}
    for name, run in runs.items():
        wall, by_part = _traced(run, steps)
        found[name] = {
            "ffn_experts_per_token": experts[name],
            "seconds": seconds[name].median,
            "seconds_quartiles": [seconds[name].low, seconds[name].high],
            "traced_seconds": wall,
            "parts": by_part,
        }
    return found


def _traced(run: Training, steps: int) -> tuple[float, dict[str, float]]:
    """Seconds of a step while it is traced, and of its parts."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        start = time.perf_counter()
        for _ in range(steps):
            jax.block_until_ready(run.step())
        wall = (time.perf_counter() - start) / steps
        jax.profiler.stop_trace()
        seconds = traced.by_instruction(Path(folder), run.module.name)
    found = {p: s / steps for p, s in traced.by_part(seconds, run.module).items()}
    return wall, found | {BETWEEN: max(wall - sum(found.values()), 0.0)}


def bounds(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What the whole step gains, what its experts gain, what theory says of them and of it."""
    moepp, moe = found["moepp"], found["moe"]
    theory = moe["ffn_experts_per_token"] / moepp["ffn_experts_per_token"]
    share = moe["parts"][parts.EXPERTS] / moe["traced_seconds"]
    return {
        "step": moe["seconds"] / moepp["seconds"],
        "experts": moe["parts"][parts.EXPERTS] / moepp["parts"][parts.EXPERTS],
        "experts_in_theory": theory,
        "experts_share_of_the_vanilla_step": share,
        "step_at_most": 1 / (1 - share * (1 - 1 / theory)),
    }


def show(found: Mapping[str, Mapping[str, Any]], title: str, console: Console) -> None:
    table = Table("part", *(f"{NAMES[name]}, ms" for name in found), "difference", title=title)
    for part in _parts(found):
        ms = [1e3 * found[name]["parts"].get(part, 0.0) for name in NAMES]
        table.add_row(part, *(f"{value:,.1f}" for value in ms), f"{ms[1] - ms[0]:+,.1f}")
    table.add_section()
    for said, key in (("a step, traced", "traced_seconds"), ("a step, not traced", "seconds")):
        ms = [1e3 * found[name][key] for name in NAMES]
        table.add_row(said, *(f"{value:,.1f}" for value in ms), f"{ms[1] - ms[0]:+,.1f}")
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    b = bounds(found)
    console.print(
        f"The step is {b['step']:.2f} times as fast as the vanilla twin's, its experts "
        f"{b['experts']:.2f} times (in theory {b['experts_in_theory']:.2f}). They are "
        f"{b['experts_share_of_the_vanilla_step']:.0%} of the vanilla step: by that theory it "
        f"could be {b['step_at_most']:.2f} times as fast."
    )


def _parts(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [p for p in (*parts.ALL, BETWEEN) if any(p in of["parts"] for of in found.values())]


def figure(found: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """A bar of each twin for each part."""
    drawn, named = drawing.new(7.5, 4.5), _parts(found)
    axes = drawn.subplots()
    for number, (name, of) in enumerate(found.items()):
        ms = [1e3 * of["parts"].get(part, 0.0) for part in named]
        places = [y + 0.4 * (number - 0.5) for y in range(len(named))]
        label = f"{NAMES[name]}: {1e3 * of['traced_seconds']:,.0f} ms"
        bars = axes.barh(places, ms, 0.38, color=drawing.RUN_COLORS[number], label=label)
        axes.bar_label(bars, [f"{value:,.0f}" for value in ms], padding=3, fontsize=7)
    axes.set_yticks(range(len(named)), named)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("ms of a step, traced")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right")
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step")
    parser.add_argument("--config", choices=recipes.names(), default="tiny", metavar="NAME")
    parser.add_argument("--before", type=int, default=100, help="steps that are made first")
    parser.add_argument("--rounds", type=int, default=15, help="steps that are timed")
    parser.add_argument("--steps", type=int, default=5, help="steps that are traced")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    parser.add_argument("--figure", type=Path, help="draw it: STEM.png and STEM.svg")
    given = parser.parse_args()
    module = importlib.import_module(f"moepp_jax.configs.{given.config.replace('/', '.')}")
    config = Config.parse(module.get_config())
    configs = twins(config)
    found = measure(configs, prepare(config), given.before, given.rounds, given.steps)
    where = f"{given.config}, {config.batch_tokens:,} tokens, {timing.machine()}"
    show(found, f"a training step of {where}", Console(width=110))
    if given.json:
        report = {"machine": timing.machine(), "config": given.config, "before": given.before}
        report |= {"twins": found, "bounds": bounds(found)}
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    if given.figure:
        drawing.write(figure(found, f"A training step by part\n{where}"), given.figure)


if __name__ == "__main__":
    main()
