"""Does every routing rule learn the same on any mesh?

    python -m experiments.meshes                 # rules that have no row yet, and the table
    python -m experiments.meshes --only=deepseek,remoe

Question   losses of every rule's recipe (configs/routing, and configs/tiny.py for MoE++) on meshes
           of eight devices against those on one: the first steps of the default job, and held-out
           text after them.
Claim      they are the same to 0.1 %: sums are of another order, and where rounding chooses another
           expert, training goes on a little differently.
Refuted    by a loss that is further away.

The devices are virtual ones of the CPU, of one process. Writes meshes.csv and meshes.md into
--folder; rows that are there are kept, unless the recipe has changed.
"""

from __future__ import annotations

from moepp_jax import host_memory

if __name__ == "__main__":
    host_memory.keep_freed_on_cpu()  # before an import starts a thread

import csv
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from moepp_jax import cli, evaluate, markdown
from moepp_jax import mesh as mesh_lib
from moepp_jax import state as state_lib
from moepp_jax.benchmarks import timing
from moepp_jax.config import Config
from moepp_jax.data import prepare
from moepp_jax.errors import ConfigError
from moepp_jax.experiments import rows as rows_lib
from moepp_jax.experiments import runs
from moepp_jax.moe import rules
from moepp_jax.processes import Rows
from moepp_jax.storage import write_atomic

MESHES = {"8x1": (8, 1), "2x4": (2, 4)}  # data x expert
COLUMNS = ("rule", "fingerprint", "steps", "machine")
COLUMNS += tuple(f"{mesh} {which}" for mesh in MESHES for which in ("training", "held-out"))
_SAME = 1e-3
_TABLE = "meshes.csv"


def recipe(rule: str) -> Config:
    """The rule's recipe.

    Raises:
      ConfigError: there is no such rule.
    """
    if rule not in rules.names():
        raise ConfigError(f"--only={rule}: there is no such rule, but {', '.join(rules.names())}")
    module = "moepp_jax.configs.tiny" if rule == "moepp" else f"moepp_jax.configs.routing.{rule}"
    return Config.parse(importlib.import_module(module).get_config())


def losses(config: Config, steps: int, data: int, expert: int) -> tuple[list[float], float]:
    """Of training steps, and of held-out text after them, on a mesh."""
    config = config.replace("mesh", data=data, fsdp=1, expert=expert)
    mesh = mesh_lib.make_mesh(config, jax.devices()[: data * expert])
    parts = state_lib.assemble(config, mesh)
    dataset = prepare(config, lambda line: None)
    train_step, state = state_lib.make_train_step(parts), state_lib.init_state(parts)
    place, training = mesh_lib.batch_sharding(mesh), []
    for step in range(steps):
        batch = jax.device_put(dataset.train_batch(step), place)
        state, metrics = train_step(state, batch)
        training.append(float(metrics["loss"]))
    rows = Rows(place, config.train.batch_size).indices
    held_out = evaluate.evaluate_mixture(
        evaluate.make_evaluate(parts), state.params, dataset, config.train.eval_batches, rows
    )
    return training, held_out["eval_loss"]


def compared(rule: str, config: Config, steps: int) -> dict[str, Any]:
    """A rule's row: the largest relative differences to one device."""
    training, held_out = losses(config, steps, 1, 1)
    row = {"rule": rule, "fingerprint": runs.fingerprint(config), "steps": steps}
    for mesh, axes in MESHES.items():
        here, held_out_here = losses(config, steps, *axes)
        pairs = zip(here, training, strict=True)
        row[f"{mesh} training"] = max(abs(a - b) / b for a, b in pairs)
        row[f"{mesh} held-out"] = abs(held_out_here - held_out) / held_out
    return row | {"machine": timing.machine()}


def read(file: Path) -> list[dict[str, Any]]:
    """Rows as they were written; none if there is no file."""
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def page(rows: Sequence[dict[str, Any]]) -> str:
    """meshes.md."""
    worst = max((float(row[name]) for row in rows for name in COLUMNS[4:]), default=0.0)
    missing = [name for name in rules.names() if name not in {row["rule"] for row in rows}]
    said = "is open: no row yet of " + ", ".join(missing) if missing else "holds"
    said = "does not hold" if worst > _SAME else said
    head = ["rule", *COLUMNS[4:]]
    cells = [[row["rule"], *(f"{float(row[name]):.1e}" for name in COLUMNS[4:])] for row in rows]
    lines = [
        "# Each routing rule on meshes of eight devices",
        "",
        "    python -m experiments.meshes",
        "",
        f"Every rule's recipe was trained for {rows[0]['steps'] if rows else 0} steps on one "
        "device and on meshes of data x expert devices,",
        "virtual ones of the CPU. The largest relative difference of a step's training loss to "
        "that on one device, and",
        "that of the held-out loss at the end:",
        "",
        *markdown.table(head, cells),
    ]
    machines = ", ".join(sorted({row["machine"] for row in rows}))
    lines += ["", f"The claim (the same to {_SAME:.1%}) {said}: {worst:.1e} at most.", ""]
    return "\n".join([*lines, f"Machine: {machines}.", ""])


if __name__ == "__main__":
    _FOLDER = flags.DEFINE_string("folder", "docs/rules", "where the files are written")
    _ONLY = flags.DEFINE_list("only", [], "rules; by default all")
    _STEPS = flags.DEFINE_integer("steps", 20, "of training")

    def main(_: Sequence[str]) -> None:
        # Collectives block a thread each; see moepp_jax/commands/devices.py.
        os.environ.setdefault("PJRT_NPROC", "32")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
        jax.config.update("jax_enable_compilation_cache", False)
        file = Path(_FOLDER.value) / _TABLE
        for rule in _ONLY.value or rules.names():
            config = recipe(rule)
            fresh = {"fingerprint": runs.fingerprint(config), "steps": str(_STEPS.value)}
            kept = [row for row in read(file) if row["rule"] != rule]
            if any(row["rule"] == rule and fresh.items() <= row.items() for row in read(file)):
                continue
            row = compared(rule, config, _STEPS.value)
            jax.clear_caches()
            print(rule, *(f"{name}: {row[name]:.1e}" for name in COLUMNS[4:]), sep="  ", flush=True)
            rows_lib.write(file, COLUMNS, sorted([*kept, row], key=lambda row: row["rule"]))
        write_atomic(file.with_suffix(".md"), page(read(file)))
        print(f"written {file.with_suffix('.md')}")

    cli.run(main)
