"""Which routing rule makes the most of its FFN experts, and is each the same on any mesh?

    python -m experiments.routing_rules                            # trains what is not there yet
    python -m experiments.routing_rules --only=deepseek,remoe
    python -m experiments.routing_rules --report                   # from the rows that are there

Question   held-out loss and FFN experts a token of every rule's recipe (configs/routing, and
           configs/tiny.py for MoE++), at the default job's size with steps of its own number; and
           losses on meshes of 8 devices against those on one.
Claim      no rule that uses as few FFN experts a token as MoE++ (at most 5 % more) ends more than
           0.02 nats below it; and on every mesh a rule's losses are one device's to 0.1 %.
Refuted    if a rule does, or a loss is not. Each is trained from one seed: smaller differences of
           held-out loss say nothing.

Every run is a process of its own. A mesh lies on virtual CPU devices, and one device is what JAX
finds: where that is an accelerator, JAX_PLATFORMS=cpu compares like with like. Runs are in
--workdir and go on where they were stopped. Writes rows.csv, README.md and rules.png into --folder.
Runs that are in rows.csv are kept: a row knows the fingerprint of the configuration that made it,
and those of other configurations are listed, but are in no table or picture.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import hashlib
import importlib
import io
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from matplotlib.figure import Figure

from experiments import rows as rows_lib
from moepp_jax import cli, earlier
from moepp_jax.config import Config, differences
from moepp_jax.errors import ConfigError
from moepp_jax.interrupt import Stopped, StopRequest
from moepp_jax.metrics import read_metrics
from moepp_jax.moe import rules
from moepp_jax.progress import Progress
from moepp_jax.storage import write_atomic
from moepp_jax.workdir import open_workdir, read_config

# name: its type. losses are those of the training steps that were logged, in a row.
_TYPES = {
    "rule": str,
    "mesh": str,
    "steps": int,
    "fingerprint": str,
    "seed": int,
    "eval_loss": float,
    "ffn_experts_per_token": float,
    "experts_per_token": float,
    "drop_rate": float,
    "seconds_per_step": float,
    "machine": str,
    "losses": str,
}
COLUMNS = tuple(_TYPES)
ONE = "1"  # the mesh of one device
STEPS, MESH_STEPS, MESHES = 300, 20, (ONE, "8x1", "2x4")

# What says where a run works and what it keeps, not what it computes and measures.
_FREE = ("mesh.", "generate.", "data.dir", "data.worker_processes", "train.save_every")
_FREE += ("train.keep",)

# The claim: so many more FFN experts than MoE++'s are as few, so many nats are a difference, and so
# much of a loss is the same loss.
_AS_FEW, _NATS, _SAME = 1.05, 0.02, 1e-3

Row = dict[str, Any]
Report = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """A recipe on a mesh, for a number of steps.

    Attributes:
      mesh: ONE, or DATAxEXPERT.
    """

    rule: str
    mesh: str
    config: Config

    @property
    def steps(self) -> int:
        """How many it takes."""
        return self.config.train.steps

    @property
    def folder(self) -> str:
        """The name of its work directory; another configuration has another one."""
        return f"{self.rule}-{self.mesh}-{self.steps}-{fingerprint(self.config)}"

    def made(self, row: Row) -> bool:
        """Whether a row is of this run."""
        own = {"rule": self.rule, "mesh": self.mesh, "fingerprint": fingerprint(self.config)}
        return own.items() <= row.items()


def recipe(name: str) -> Any:
    """The ConfigDict of a rule's recipe."""
    if name not in rules.names():
        near = difflib.get_close_matches(name, rules.names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(rules.names())}"
        raise ConfigError(f"--only={name}: there is no such routing rule; {hint}")
    module = "configs.tiny" if name == "moepp" else f"configs.routing.{name}"
    try:
        return importlib.import_module(module).get_config()
    except ModuleNotFoundError as error:
        raise ConfigError(f"rule {name!r} has no recipe {module.replace('.', '/')}.py") from error


def run_of(name: str, mesh: str, steps: int) -> Run:
    """A rule's recipe with so many steps, whose last is followed by all of the held-out text."""
    data, expert = axes_of(mesh)
    fields = recipe(name)
    fields.train.update(steps=steps, log_every=max(1, steps // 60), eval_every=steps)
    fields.train.eval_batches = 0
    fields.mesh.update(data=data, fsdp=1, expert=expert)
    return Run(name, mesh, Config.parse(fields))


def axes_of(mesh: str) -> tuple[int, int]:
    """Devices along the axes data and expert."""
    sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", "1x1" if mesh == ONE else mesh)
    if not sizes or (mesh != ONE and int(sizes[1]) * int(sizes[2]) == 1):
        raise ConfigError(f"--meshes={mesh} must be {ONE}, or devices as DATAxEXPERT, like 2x4")
    return int(sizes[1]), int(sizes[2])


def planned(
    names: Sequence[str], meshes: Sequence[str], steps: int, mesh_steps: int
) -> tuple[list[Run], list[Run]]:
    """The runs of the table, and those that are compared with each other, each on all meshes."""
    for flag, value in (("steps", steps), ("mesh_steps", mesh_steps)):
        if value < 1:
            raise ConfigError(f"--{flag}={value} must be at least 1")
    table = [run_of(name, ONE, steps) for name in names if ONE in meshes]
    others = [mesh for mesh in meshes if mesh != ONE]
    compared = [run_of(n, mesh, mesh_steps) for n in names for mesh in (ONE, *others) if others]
    return table, compared


def fingerprint(config: Config) -> str:
    """Eight digits that differ where what is computed does.

    A field at the value that stands for its absence in earlier configurations has no say.
    """
    groups: dict[str, Any] = {field.name: {} for field in dataclasses.fields(Config)}
    absent, _ = earlier.completed(groups | {"seed": None, "moe": {"rule": {"type": "moepp"}}})
    says = {
        name: value
        for name, (_, value) in differences(absent, config.to_dict()).items()
        if value is not None and not name.startswith(_FREE)
    }
    return hashlib.sha256(json.dumps(says, sort_keys=True).encode()).hexdigest()[:8]


def train_missing(runs: Sequence[Run], file: Path, workdir: Path, report: Report = print) -> None:
    """Trains the runs that have no row yet, and adds each one's row when it is done."""
    rows = read(file)
    left = [run for run in dict.fromkeys(runs) if not any(map(run.made, rows))]
    report(f"{len(left)} of {len(runs)} runs are to be trained, in {workdir}")
    done = 0
    with Progress(sum(run.steps for run in left) or 1, description="runs") as progress:
        for number, run in enumerate(left, start=1):
            folder = Path(open_workdir(workdir / run.folder, run.config))
            for step in in_child(run, folder):
                progress.update(done + step)
            done += run.steps
            row = json.loads((folder / "row.json").read_text(encoding="utf-8"))
            # Another command may have added its own.
            rows = [*(r for r in read(file) if not run.made(r)), row]
            rows_lib.write(file, COLUMNS, rows)
            progress.message(
                f"{number} of {len(left)}: {run.rule} on mesh {run.mesh}, {run.steps} steps: "
                f"held-out loss {row['eval_loss']:.4f}"
            )
            progress.update(done)


def in_child(run: Run, folder: Path) -> Iterator[int]:
    """Trains in a process that has the devices of the mesh; yields steps done, on a terminal.

    Raises:
      ConfigError: the process failed.
      Stopped: SIGINT or SIGTERM asked for it; the run is saved.
    """
    command = [sys.executable, "-m", "experiments.routing_rules", f"--run={folder}"]
    devices = math.prod(axes_of(run.mesh))
    log = folder / "log.txt"
    with StopRequest() as stop, log.open("a") as out:
        # In a session of its own Ctrl-C does not reach it twice.
        child = subprocess.Popen(
            command,
            env=environment(devices),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        step = 0
        while child.poll() is None:
            if stop.signal is not None:
                child.terminate()
                child.wait()
                raise Stopped(stop.signal, steps_done(folder))
            time.sleep(0.2)
            if sys.stdout.isatty() and (now := steps_done(folder)) > step:
                step = now
                yield step
    if child.returncode:
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
        raise ConfigError(f"{run.folder} ended with status {child.returncode}: {said} (see {log})")


def environment(devices: int) -> dict[str, str]:
    """Of a process that is to have so many devices, on CPUs if they are several."""
    own = {"JAX_NUM_CPU_DEVICES": str(devices)}
    if devices > 1:
        # Threads: each collective blocks one; and see moepp_jax/commands/devices.py.
        own |= {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": str(max(32, 4 * devices))}
        own["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    return os.environ | own


def steps_done(folder: Path) -> int:
    """As far as they are logged."""
    try:
        return max((row["step"] for row in read_metrics(folder)), default=0)
    except FileNotFoundError:
        return 0


def train_here(folder: Path) -> None:
    """Trains the run of a folder to its end, and writes its row.json."""
    from benchmarks import timing
    from moepp_jax import host_memory
    from moepp_jax.train import train

    host_memory.keep_freed_on_cpu()
    config = read_config(folder)
    train(config, folder)
    row = measured(config, folder, timing.machine())
    write_atomic(folder / "row.json", json.dumps(row, indent=2) + "\n")


def measured(config: Config, folder: Path, machine: str) -> Row:
    """The row of a finished run, from what it logged."""
    logged = read_metrics(folder)
    steps, mesh = config.train.steps, config.mesh
    held_out = [row for row in logged if "eval_loss" in row][-1]
    training = [row for row in logged if "tokens_per_s" in row]
    late = [row["drop_rate"] for row in training if row["step"] > 0.8 * steps]
    # What chose nothing at all has no rate, and dropped nothing.
    late = [rate for rate in late if rate is not None]
    speed = statistics.median(row["tokens_per_s"] for row in training)
    on_one = (mesh.data, mesh.expert) == (1, 1)
    return {
        "rule": rules.fields_of(config.moe.rule)["type"],
        "mesh": ONE if on_one else f"{mesh.data}x{mesh.expert}",
        "steps": steps,
        "fingerprint": fingerprint(config),
        "seed": config.seed,
        "eval_loss": held_out["eval_loss"],
        "ffn_experts_per_token": held_out["eval_ffn_experts_per_token"],
        "experts_per_token": statistics.fmean(map(sum, held_out["eval_load"])),
        "drop_rate": statistics.fmean(late) if late else 0.0,
        "seconds_per_step": config.train.batch_size * config.data.seq_len / speed,
        "machine": machine,
        "losses": " ".join(f"{row['loss']:.9g}" for row in training),
    }


def stop_with_parent() -> None:
    """Has this process stop politely when the one that started it is gone."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def read(file: Path) -> list[Row]:
    """The rows of a file, none if there is none.

    Raises:
      ConfigError: a line is no row; the message names it.
    """
    if not file.is_file():
        return []
    text = io.StringIO(file.read_bytes().decode(errors="replace"), newline="")
    lines, rows = csv.reader(text, strict=True), []
    try:
        if (header := next(lines, [])) != list(COLUMNS):
            raise ValueError(f"the columns are {','.join(header)!r}, not {','.join(COLUMNS)!r}")
        for cells in lines:
            rows.append(_row(cells))
            if sum(_same_run(row, rows[-1]) for row in rows) > 1:
                raise ValueError("another line is of the same run")
    except (ValueError, csv.Error) as error:
        raise ConfigError(
            f"{file}, line {max(lines.line_num, 1)}: {error}; mend that line or take it away"
        ) from error
    return rows


def _row(cells: Sequence[str]) -> Row:
    """A row of its cells; a ValueError says what is wrong with them."""
    if len(cells) != len(COLUMNS):
        raise ValueError(f"there are {len(cells)} cells for {len(COLUMNS)} columns")
    row = {}
    for (name, kind), cell in zip(_TYPES.items(), cells, strict=True):
        try:
            row[name] = kind(cell)
        except ValueError:
            raise ValueError(f"{name} = {cell!r} is no {kind.__name__}") from None
        if kind is float and not math.isfinite(row[name]):
            raise ValueError(f"{name} = {cell!r} must be finite")
    _losses(row)
    return row


def _losses(row: Row) -> list[float]:
    """Those of the logged training steps."""
    try:
        return [float(loss) for loss in row["losses"].split()]
    except ValueError:
        raise ValueError(f"losses = {row['losses'][:40]!r} are no numbers") from None


def _same_run(a: Row, b: Row) -> bool:
    """Whether two rows are of the same run."""
    return all(a[name] == b[name] for name in ("rule", "mesh", "fingerprint"))


def write_report(
    rows: Sequence[Row], table: Sequence[Run], compared: Sequence[Run], folder: Path
) -> str:
    """Writes README.md and rules.png; returns the page."""
    rows = sorted(rows, key=lambda row: tuple(row[name] for name in ("rule", "mesh", "steps")))
    shown = [row for row in rows if any(run.made(row) for run in table)]
    shown.sort(key=lambda row: (row["eval_loss"], row["rule"]))
    beside = [row for row in rows if any(run.made(row) for run in compared)]
    others = [row for row in rows if row not in shown and row not in beside]
    missing = [run for run in (*table, *compared) if not any(map(run.made, rows))]
    text = page(shown, beside, others, missing, table[0].steps, compared[0].steps)
    write_atomic(folder / "rules.png", figure(shown))
    write_atomic(folder / "README.md", text)
    return text


def page(
    shown: Sequence[Row],
    beside: Sequence[Row],
    others: Sequence[Row],
    missing: Sequence[Run],
    steps: int,
    mesh_steps: int,
) -> str:
    """README.md.

    Args:
      shown: rows of the table, in its order.
      beside: rows that are compared with each other.
      others: rows of other configurations.
      missing: runs of either kind that have no row.
    """
    command = "python -m experiments.routing_rules"
    for flag, value, usual in (("steps", steps, STEPS), ("mesh_steps", mesh_steps, MESH_STEPS)):
        command += f" --{flag}={value}" if value != usual else ""
    machines = list(dict.fromkeys(row["machine"] for row in (*shown, *beside)))
    return "\n".join(
        [
            "# Each routing rule at the default job's size",
            "",
            f"    {command}",
            "",
            "Which routing rule makes the most of its FFN experts, and is each the same on any "
            "mesh? Claim,",
            "and what would refute it, stand in `experiments/routing_rules.py`, which wrote this.",
            "",
            f"Each rule's recipe (`configs/routing/NAME.py`; `moepp` is `configs/tiny.py`) was "
            f"trained for {steps}",
            "steps on one device. Held-out loss (nats a token), FFN experts a token and experts a "
            "token (of all",
            "kinds, chosen) are of the end, over all held-out text, where nothing is dropped "
            "unless the recipe",
            "evaluates with a capacity. Drops are the share of the choices in the last fifth of "
            "training, seconds",
            "a step the median of training's.",
            "",
            *_table(shown, machines),
            *_missing(missing),
            "",
            verdict(shown, beside, bool(missing)),
            "",
            "![held-out loss against FFN experts a token](rules.png)",
            "",
            "## On other meshes",
            "",
            f"The same recipes for {mesh_steps} steps, on meshes of data x expert devices, all "
            "virtual ones of the CPU.",
            "The largest relative difference of a step's training loss to that on one device, and "
            "that of the",
            "held-out loss at the end:",
            "",
            *_comparison(beside),
            "",
            *_machines(machines),
            *_others(others),
            "",
        ]
    )


def _table(shown: Sequence[Row], machines: Sequence[str]) -> list[str]:
    """The table's lines."""
    head = ["rule", "held-out loss", "FFN experts a token", "experts a token", "drops", "s a step"]
    head += ["seed", *(["machine"] if len(machines) > 1 else [])]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in shown:
        cells = [
            row["rule"],
            f"{row['eval_loss']:.3f}",
            f"{row['ffn_experts_per_token']:.2f}",
            f"{row['experts_per_token']:.2f}",
            f"{row['drop_rate']:.1%}",
            f"{row['seconds_per_step']:.3g}",
            str(row["seed"]),
        ]
        cells += [str(machines.index(row["machine"]) + 1)] if len(machines) > 1 else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def compared_losses(beside: Sequence[Row]) -> dict[tuple[str, str], tuple[float, float]]:
    """(rule, mesh) -> relative differences to one device: of a training step, of held-out text."""
    alone = {row["rule"]: row for row in beside if row["mesh"] == ONE}
    found = {}
    for row in beside:
        one = alone.get(row["rule"])
        if row["mesh"] == ONE or one is None:
            continue
        pairs = list(zip(_losses(row), _losses(one), strict=True))
        training = max(abs(a - b) / abs(b) for a, b in pairs)
        held_out = abs(row["eval_loss"] - one["eval_loss"]) / one["eval_loss"]
        found[row["rule"], row["mesh"]] = training, held_out
    return found


def _comparison(beside: Sequence[Row]) -> list[str]:
    """The lines of the table of meshes."""
    found = compared_losses(beside)
    if not found:
        return ["There are no such rows yet."]
    meshes = sorted({mesh for _, mesh in found}, key=axes_of, reverse=True)
    head = [f"{mesh}: {which}" for mesh in meshes for which in ("training", "held-out")]
    lines = [f"| rule | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    for rule in dict.fromkeys(rule for rule, _ in found):
        pairs = [found.get((rule, mesh)) for mesh in meshes]
        cells = [c for pair in pairs for c in (map("{:.1e}".format, pair) if pair else ("", ""))]
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return lines


def _missing(missing: Sequence[Run]) -> list[str]:
    """The runs that have no row yet."""
    if not missing:
        return []
    each = ", ".join(f"{run.rule} ({run.mesh}, {run.steps} steps)" for run in missing)
    return ["", f"No row yet (on its mesh): {each}."]


def _machines(machines: Sequence[str]) -> list[str]:
    """What the runs were made on, in words."""
    if len(machines) == 1:
        return [f"Machine: {machines[0]}."]
    return ["Machines:", "", *(f"{i}. {m}" for i, m in enumerate(machines, start=1))]


def _others(others: Sequence[Row]) -> list[str]:
    """The rows of rows.csv that are in no table."""
    if not others:
        return []
    head = "Rows of other configurations, which `rows.csv` has too and nothing here is made of:"
    rows = [
        f"- {r['rule']}, mesh {r['mesh']}, {r['steps']} steps, {r['fingerprint']}" for r in others
    ]
    return ["", head, "", *rows]


def verdict(shown: Sequence[Row], beside: Sequence[Row], missing: bool = False) -> str:
    """Whether the claim holds, in words; a claim about rows that are missing is open."""
    said, holds = [], True
    own = next((row for row in shown if row["rule"] == "moepp"), None)
    if own is None:
        said.append("MoE++ has no row yet")
    else:
        most = _AS_FEW * own["ffn_experts_per_token"]
        as_few = [r for r in shown if r is not own and r["ffn_experts_per_token"] <= most]
        if as_few:
            best = min(as_few, key=lambda row: row["eval_loss"])
            below = best["eval_loss"] - own["eval_loss"]
            said.append(
                f"of the rules that use as few FFN experts, {best['rule']} has the lowest loss, "
                f"{below:+.3f} nats from MoE++'s"
            )
            holds &= below >= -_NATS
        else:
            said.append("no other rule uses as few FFN experts")
    found = compared_losses(beside)
    if found:
        (rule, mesh), pair = max(found.items(), key=lambda item: max(item[1]))
        said.append(f"losses on meshes differ by {max(pair):.1e} at most ({rule} on {mesh})")
        holds &= max(pair) <= _SAME
    if missing or own is None or not found:
        return f"The claim is open: {'; '.join(said)}."
    return f"The claim {'holds' if holds else 'does not hold'}: {'; '.join(said)}."


def figure(shown: Sequence[Row]) -> bytes:
    """Held-out loss against FFN experts a token, a point a rule, as a PNG."""
    drawn = Figure(figsize=(7.5, 5), dpi=150, layout="constrained")
    axes = drawn.subplots()
    x = [row["ffn_experts_per_token"] for row in shown]
    y = [row["eval_loss"] for row in shown]
    axes.scatter(x, y, color=["C1" if row["rule"] == "moepp" else "C0" for row in shown], zorder=3)
    axes.set(xlabel="FFN experts a token, on held-out text", ylabel="held-out loss, nats a token")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    drawn.draw_without_rendering()
    _label(axes, [row["rule"] for row in shown], x, y)
    out = io.BytesIO()
    drawn.savefig(out, format="png")
    return out.getvalue()


def _label(axes, names: Sequence[str], x: Sequence[float], y: Sequence[float]) -> None:
    """Names beside their points, each in the nearest place that is still free."""
    points = axes.transData.transform(list(zip(x, y, strict=True))) if x else []
    taken = [(px - 8, py - 8, px + 8, py + 8) for px, py in points]
    for name, point, (px, py) in zip(names, zip(x, y, strict=True), points, strict=True):
        text = axes.annotate(
            name, point, (0, 0), textcoords="offset pixels", fontsize=8, va="bottom"
        )
        size = text.get_window_extent()
        for distance, angle in [(d, a) for d in range(14, 250, 9) for a in range(0, 360, 15)]:
            towards = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            # The near edge or corner of the text is at that distance, its middle behind it.
            dx = distance * towards[0] + size.width * (towards[0] - 1) / 2
            dy = distance * towards[1] + size.height * (towards[1] - 1) / 2
            left, bottom = px + dx - 3, py + dy - 3
            box = (left, bottom, left + size.width + 6, bottom + size.height + 6)
            inside = axes.bbox.contains(*box[:2]) and axes.bbox.contains(*box[2:])
            if inside and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        text.set_position((dx, dy))
        if distance > 14:
            end = (dx + size.width / 2, dy + size.height / 2)
            line = {"arrowstyle": "-", "lw": 0.5, "color": "0.5", "relpos": (0.5, 0.5)}
            axes.annotate("", point, end, textcoords="offset pixels", arrowprops=line, zorder=1)


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes (left, bottom, right, top) do."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", "runs/rules", "where the runs are")
    _FOLDER = flags.DEFINE_string("folder", "docs/rules", "where the files are written")
    _STEPS = flags.DEFINE_integer("steps", STEPS, "of a run of the table")
    _MESH_STEPS = flags.DEFINE_integer("mesh_steps", MESH_STEPS, "of a run that compares meshes")
    _ONLY = flags.DEFINE_list("only", [], "rules to train; by default all")
    _MESHES = flags.DEFINE_list("meshes", [*MESHES], "1, and DATAxEXPERT to compare with it")
    _REPORT = flags.DEFINE_bool("report", False, "train nothing, and write the report")
    _RUN = flags.DEFINE_string("run", None, "a run's folder, to train in this process; internal")

    def main(_: Sequence[str]) -> None:
        """Trains what is missing, and reports; or does what --run asks for."""
        if _RUN.value:
            stop_with_parent()
            train_here(Path(_RUN.value))
            return
        file = Path(_FOLDER.value) / "rows.csv"
        steps = _STEPS.value, _MESH_STEPS.value
        if not _REPORT.value:
            names = _ONLY.value or rules.names()
            table, compared = planned(names, _MESHES.value, *steps)
            train_missing([*table, *compared], file, Path(_WORKDIR.value))
        meshes = dict.fromkeys([*MESHES, *_MESHES.value])
        table, compared = planned(rules.names(), list(meshes), *steps)
        print(write_report(read(file), table, compared, file.parent))
        print(f"written to {file.parent}: README.md, rules.png")

    cli.run(main)
