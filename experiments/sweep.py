"""Trains the runs that have no row yet, one after the other, and adds each one's row.

Any number of processes may share a results file and a folder of runs: each takes what no other is
at. What is stopped, or dies, loses the steps since the last checkpoint of one run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moepp_jax import host_memory
from moepp_jax.claim import is_taken
from moepp_jax.errors import ConfigError
from moepp_jax.experiments import results, worker
from moepp_jax.experiments.board import Board
from moepp_jax.experiments.results import Row
from moepp_jax.experiments.runs import Run, missing
from moepp_jax.experiments.scale import Scale
from moepp_jax.interrupt import Stopped, StopRequest
from moepp_jax.workdir import open_workdir

ROWS_LOCK = ".rows.lock"  # in the folder of runs, held while a row is written
Train = Callable[[Run, Path, Scale], Iterator[int]]


def train_missing(
    runs: Sequence[Run], scale: Scale, file: Path, workdir: Path, train: Train | None = None
) -> int:
    """Until every run has a row, or another process is at it; returns how many are another's.

    Args:
      file: of the rows.
      workdir: the folders of runs; what was stopped goes on from there.
      train: (run, folder, scale) -> yields steps done; by default `in_child`.

    Raises:
      ConfigError: a run cannot be trained, and which and why; rows before it are kept.
      Stopped: SIGINT or SIGTERM asked for it; the run is saved.
    """
    train = train or in_child
    with Board(runs, results.read(file)) as board:
        while left := missing(runs, (row.key for row in results.read(file))):
            free = [run for run in left if not is_taken(workdir / run.folder / worker.LOCK)]
            board.taken(run for run in left if run not in free)
            if not free:
                return len(left)
            run = free[0]
            row = _trained(run, scale, workdir, board, train)
            if row is not None:
                results.add(file, row, workdir / ROWS_LOCK)
            board.ended(run, results.read(file))
    return 0


def _trained(run: Run, scale: Scale, workdir: Path, board: Board, train: Train) -> Row | None:
    """The row of a run, trained unless its folder has it; None if another process took it."""
    folder = Path(open_workdir(workdir / run.folder, run.config))
    if worker.finished(folder) is None:
        board.started(run)
        for step in train(run, folder, scale):
            board.at(run, step)
    return worker.finished(folder)


def in_child(run: Run, folder: Path, scale: Scale) -> Iterator[int]:
    """Trains in a process of its own, whose memory and compiled programs go with it.

    Yields:
      Steps done, a few times a second.

    Raises:
      ConfigError: the process failed.
      Stopped: SIGINT or SIGTERM asked for it; the run is saved.
    """
    command = [
        sys.executable,
        "-m",
        "moepp_jax.experiments.worker",
        f"--scale={scale.name}",
        str(folder),
    ]
    log = folder / "log.txt"
    with StopRequest() as stop, log.open("a") as out:
        # In a group of its own Ctrl-C does not reach it twice. A session of its own would undo
        # `nice`: Linux weighs sessions against each other before the processes in them.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            process_group=0,
            env=host_memory.HUGE_PAGES | os.environ,
        )
        while child.poll() is None:
            if stop.signal is not None:
                child.terminate()
                child.wait()
                raise Stopped(stop.signal, steps_done(folder))
            time.sleep(0.3)
            yield steps_done(folder)
    if child.returncode not in (0, worker.TAKEN):
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
        raise ConfigError(f"{run.folder} ended with status {child.returncode}: {said} (see {log})")


def steps_done(folder: Path) -> int:
    """As far as they are logged."""
    return max((row["step"] for row in worker.logged(folder)), default=0)
