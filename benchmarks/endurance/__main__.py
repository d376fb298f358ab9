"""What hours of use leave behind: memory, open files and threads of commands that do a lot.

    python -m benchmarks.endurance [--only JOB ...] [--steps N] [--items N]
        [--json FILE] [--figure STEM]

Trains 10,000 steps of a tiny model, continues 10,000 texts and answers 10,000 questions of a
benchmark (which needs the harness: requirements/eval.txt), each by its command. A fifth of each job
is left for what is made once. Over the rest each number's growth is by its slope, the median of the
slopes of all pairs of samples (Theil and Sen), with a confidence interval of 95 %. What grows by
more than `MOST` over the rest of the job is an error at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from scipy import stats

from moepp_jax.analysis import drawing
from moepp_jax.benchmarks import timing
from moepp_jax.benchmarks.endurance import jobs, watching
from moepp_jax.benchmarks.endurance.watching import Sample

# Each number of a sample, as tables and figures name it, and by how much it may grow.
NAMES = {"memory": "memory (MB)", "handles": "open files", "threads": "threads"}
MOST = {"memory": 0.02, "handles": 0.0, "threads": 0.0}  # as a share of what there was before
WARM = 0.2  # the share of a job in which things are made that stay


def growth(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Of each number: what it is once all is warm, and how much it grows from there to the end.

    Raises:
      ValueError: fewer than ten samples are of the time after that.
    """
    rest = [s for s in samples if s.done >= WARM]
    if len(rest) < 10:
        raise ValueError(f"{len(rest)} samples are too few for a slope: watch more steps or items")
    done = np.array([s.done for s in rest])
    found = {}
    for name in NAMES:
        values = np.array([getattr(s, name) for s in rest], float)
        slope, first, low, high = _line(done, values)
        span = 1 - WARM
        found[name] = {
            "warm": float(first + slope * WARM),
            "growth": float(slope * span),
            "low": float(low * span),
            "high": float(high * span),
        }
    return found


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float, float]:
    """Slope, value at 0, and the slope's interval, which ties alone would leave undefined."""
    if (y == y[0]).all():
        return 0.0, float(y[0]), 0.0, 0.0
    return tuple(map(float, stats.theilslopes(y, x)))


def grown(row: Mapping[str, Any]) -> list[str]:
    """One line for each number that has grown too much for chance."""
    return [
        f"{row['job']}: {NAMES[name]} grew by {own['growth']:.3g} "
        f"({own['low']:.3g} to {own['high']:.3g}) from {own['warm']:.4g}"
        for name, own in row["numbers"].items()
        if own["low"] > MOST[name] * own["warm"]
    ]


def measure(name: str, room: jobs.Room, every: float, console: Console) -> dict[str, Any]:
    """One job: its samples, and what they say.

    Raises:
      watching.Ended: its command failed.
    """
    job = jobs.JOBS[name](room)
    columns = (TextColumn(name), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    samples = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=1.0)
        for sample in watching.watch(job.command, job.count, every):
            samples = _of_last_bar([*samples, sample])
            bar.update(task, completed=sample.done)
    row = {"job": name, "count": job.count, "unit": job.unit, "numbers": growth(samples)}
    return row | {"samples": [list(s) for s in _thinned(samples)]}


def _of_last_bar(samples: list[Sample]) -> list[Sample]:
    """Without those of a bar before, as of what is prepared, and what is done after the last."""
    *before, newest = samples
    if not before or newest.done < before[-1].done:
        return [newest]
    return before if before[-1].done == 1.0 else samples


def _thinned(samples: Sequence[Sample], most: int = 200) -> list[Sample]:
    """Evenly, the first and the last among them: as many as a figure can show."""
    chosen = np.linspace(0, len(samples) - 1, min(most, len(samples))).round().astype(int)
    return [
        Sample(round(s.done, 4), round(s.memory, 1), s.handles, s.threads)
        for s in (samples[i] for i in chosen)
    ]


def show(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = Table(title=f"growth over the last {1 - WARM:.0%}, {timing.machine()}")
    for name in ("job", "of", "number"):
        table.add_column(name)
    for name in ("at a fifth", "growth", "95 % interval", "for each 1,000"):
        table.add_column(name, justify="right")
    for row in rows:
        for name, own in row["numbers"].items():
            each = own["growth"] / (1 - WARM) / row["count"] * 1000
            table.add_row(
                row["job"],
                f"{row['count']:,} {row['unit']}s",
                NAMES[name],
                f"{own['warm']:,.1f}",
                f"{own['growth']:+,.2f}",
                f"{own['low']:+,.2f} to {own['high']:+,.2f}",
                f"{each:+,.3f}",
            )
    console.print(table)


def figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A row of panels for each number, a panel for each job."""
    drawn = drawing.new(3.2 * len(rows), 2.2 * len(NAMES))
    panels = drawn.subplots(len(NAMES), len(rows), squeeze=False, sharex="col")
    for column, row in enumerate(rows):
        samples = [Sample(*values) for values in row["samples"]]
        done = [s.done * row["count"] for s in samples]
        for line, (name, label) in enumerate(NAMES.items()):
            axes = panels[line, column]
            axes.plot(done, [getattr(s, name) for s in samples], color=drawing.RUN_COLORS[0])
            axes.axvspan(0, WARM * row["count"], color=drawing.GREY, alpha=0.15, lw=0)
            axes.set_ylim(0, 1.15 * max(getattr(s, name) for s in samples))
            axes.set_xlim(0, row["count"])
            drawing.tidy(axes)
            if column == 0:
                axes.set_ylabel(label)
        panels[0, column].set_title(row["job"], fontsize=9)
        panels[-1, column].set_xlabel(f"{row['unit']}s")
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.endurance")
    parser.add_argument("--only", nargs="+", choices=jobs.JOBS, default=list(jobs.JOBS))
    parser.add_argument("--steps", type=int, default=10_000, help="of training")
    parser.add_argument("--items", type=int, default=10_000, help="texts, and questions")
    parser.add_argument("--every", type=float, default=0.5, help="seconds between two samples")
    parser.add_argument("--json", type=Path, help="write what was seen to this file")
    parser.add_argument("--figure", type=Path, help="draw it: STEM.png and STEM.svg")
    given = parser.parse_args(arguments)
    console = Console(width=110)
    try:
        with tempfile.TemporaryDirectory() as folder:
            room = jobs.room(Path(folder), given.steps, given.items)
            rows = []
            for name in given.only:
                rows.append(measure(name, room, given.every, console))
                if given.json:  # what has ended is not lost by what fails later
                    report = {"machine": timing.machine(), "rows": rows}
                    given.json.write_text(json.dumps(report) + "\n")
    except (subprocess.CalledProcessError, watching.Ended, ValueError) as error:
        sys.exit(f"error: {error}")
    show(rows, console)
    if given.figure:
        drawing.write(figure(rows), given.figure)
    if lines := [line for row in rows for line in grown(row)]:
        sys.exit("\n".join(lines))


if __name__ == "__main__":
    main()
