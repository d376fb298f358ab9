"""What `moepp experiments` does: trains what experiments need and do not have yet, and reports.

`python -m experiments.run` is the same command.
"""

from __future__ import annotations

from moepp_jax import host_memory

if __name__ == "__main__":
    host_memory.keep_freed_on_cpu()  # before an import starts a thread

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from moepp_jax import main
from moepp_jax.benchmarks import timing
from moepp_jax.errors import ConfigError
from moepp_jax.experiments import (
    board,
    compiled,
    measure,
    report,
    results,
    runs,
    study,
    sweep,
    worker,
)
from moepp_jax.experiments.runs import Run
from moepp_jax.experiments.scale import Scale
from moepp_jax.storage import write_atomic
from moepp_jax.workdir import open_workdir

ALL = "all"


def experiments(names: Sequence[str], scale: Scale) -> list[study.Study]:
    """Those of these names, in their order, once each.

    Raises:
      ConfigError: there is none of a name, or not of this scale.
    """
    if ALL in names:
        return study.at(scale)
    found = [study.find(name) for name in dict.fromkeys(names)]
    for one in found:
        if one.scales is not None and scale.name not in one.scales:
            raise ConfigError(f"{one.name} is not of scale {scale.name}: --scale={one.scales[0]}")
    return found


def plan(of: Sequence[study.Study], scale: Scale, seeds: int | None = None) -> list[Run]:
    """The runs of all of them, each once."""
    return runs.plan([v for one in of for v in one.variants(scale)], seeds)


def chosen(planned: Sequence[Run], only: str | None) -> list[Run]:
    """Those whose numbers are given, as "3", "0,4" or "0-7"; all if none are.

    Raises:
      ConfigError: what is given is no number of a run.
    """
    if only is None:
        return list(planned)
    found: dict[int, Run] = {}
    for part in only.split(","):
        ends = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (0, -1)
        if not ends or last < first or last >= len(planned):
            raise ConfigError(
                f"--only={only}: {part!r} is no run; numbers are 0 to {len(planned) - 1}, as 3, or "
                "0,4, or 0-7 (--list names them)"
            )
        found |= {number: planned[number] for number in range(first, last + 1)}
    return list(found.values())


def write_reports(
    of: Sequence[study.Study], scale: Scale, folder: Path, seeds: int | None = None
) -> list[Path]:
    """The reports of experiments, and the overview of all.

    Args:
      seeds: that reports show, instead of each variant's own number; the overview has its own.
    """
    rows = results.read(results.file_of(scale.name, folder))
    written = [report.write(one, scale, rows, folder, seeds) for one in of]
    overview = report.overview(scale, rows, folder)
    write_atomic(folder / scale.name / report.README, overview)
    if scale.name == "tiny" and folder.resolve() == results.RESULTS.resolve():
        readme = results.RESULTS.parents[1] / report.README
        write_atomic(readme, report.in_readme(readme.read_text(), scale, rows, folder))
    return written


def listed(
    of: Sequence[study.Study], scale: Scale, rows: Sequence[results.Row], seeds: int | None = None
) -> Table:
    """A line an experiment: its runs, and how long those take that have no row."""
    table = Table(box=None, padding=(0, 3, 0, 0))
    for column in ("experiment", "question"):
        table.add_column(column)
    for column in ("runs", "done", "the rest takes"):
        table.add_column(column, justify="right")
    for one in [*of, None]:
        planned = plan([one] if one else of, scale, seeds)
        left = runs.missing(planned, (row.key for row in rows))
        done = str(len(planned) - len(left))
        cells = (one.name, one.title) if one else ("together", "")
        table.add_row(*cells, str(len(planned)), done, board.clock(_estimate(left, rows)))
    return table


def listed_runs(
    one: study.Study, scale: Scale, rows: Sequence[results.Row], seeds: int | None = None
) -> Table:
    """A line a run, with its number for --only."""
    table = Table(box=None, padding=(0, 3, 0, 0))
    for column in ("number", "variant", "seed", "row", "takes"):
        table.add_column(column, justify="right" if column in ("number", "seed") else "left")
    there = {row.key: row for row in rows}
    for number, run in enumerate(plan([one], scale, seeds)):
        row = there.get(run.key)
        said = "" if row is None else f"{row.eval_loss:.4f}" if row.done else row.status
        takes = board.seconds_of(run, rows)
        cells = run.name, str(run.config.seed), said, board.clock(takes)
        table.add_row(str(number), *cells)
    return table


def _estimate(left: Sequence[Run], rows: Sequence[results.Row]) -> float | None:
    each = [board.seconds_of(run, rows) for run in left]
    return None if None in each else sum(each)


def measure_missing(of: Sequence[study.Study], scale: Scale, folder: Path, workdir: Path) -> None:
    """What the experiments measure beside training, of runs that are trained for it if need be."""

    def trained(run: Run) -> Path:
        # The row may be another machine's: what is measured is the checkpoint.
        there = Path(open_workdir(workdir / run.folder, run.config))
        if worker.finished(there) is None:
            for _ in sweep.in_child(run, there, scale):
                pass
        return there

    for one in of:
        wanted, rows = one.measurements(scale), measure.file_of(scale.name, one.name, folder)
        if measure.missing(wanted, measure.read(rows)):
            lock = workdir / sweep.ROWS_LOCK
            measure.take_missing(wanted, rows, trained, lock, timing.machine())


def compile_missing(
    planned: Sequence[Run], scale: Scale, topology: str, folder: Path, workdir: Path
) -> None:
    """Compiles runs for devices that are not there, each once."""
    rows = compiled.file_of(scale.name, folder)
    compiled.compile_missing(planned, topology, rows, workdir / sweep.ROWS_LOCK, timing.machine())


def train_missing(
    of: Sequence[study.Study], planned: Sequence[Run], scale: Scale, folder: Path, workdir: Path
) -> None:
    """Trains runs that have no row, then measures what the experiments measure of all theirs."""
    file = results.file_of(scale.name, folder)
    if others := sweep.train_missing(planned, scale, file, workdir):
        print(f"{others} runs are at work in other processes")
    else:
        measure_missing(of, scale, folder, workdir)


def again(planned: Sequence[Run], scale: Scale, file: Path, workdir: Path) -> None:
    """Trains runs anew in folders of their own, and says how far they end from their rows.

    Raises:
      ConfigError: a run has no row.
    """
    there = {row.key: row for row in results.read(file)}
    for run in planned:
        if run.key not in there:
            raise ConfigError(f"{run.folder} has no row in {file} that it could be compared with")
        folder = workdir / "again" / run.folder
        shutil.rmtree(folder, ignore_errors=True)  # what an earlier one left would be no check
        open_workdir(folder, run.config)
        for _ in sweep.in_child(run, folder, scale):
            pass
        new, old = worker.finished(folder), there[run.key]
        pairs = {
            name: (getattr(old, name), getattr(new, name))
            for name in ("eval_loss", "bits_per_byte", "ffn_experts", "training_ffn_experts")
        }
        for name, (before, now) in pairs.items():
            off = f"{abs(now - before) / abs(before):.1e} away"
            same = "the same to the last digit" if before == now else off
            print(f"{name}: {before} in the row, {now} again: {same}")


if __name__ == "__main__":
    sys.argv.insert(1, "experiments")
    main.main()
