"""Many jobs, each of which writes files: worker processes, progress, and going on after a kill.

A job's files are whole or not there. When they are there, its record, a small JSON file, is written
beside them; a job that has a record is not done again. What the jobs write does not depend on how
many processes share them.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich import progress
from rich.console import Console

from moepp_jax import worker
from moepp_jax.data.sources import Report
from moepp_jax.data.storage import DONE
from moepp_jax.errors import ConfigError
from moepp_jax.storage import write_atomic

Advance = Callable[[int], None]

# Seconds between two updates of a bar, and between two lines where there is no terminal.
_POLL_EVERY = 0.5
_LINE_EVERY = 30.0

# Bytes of work that are done in the seconds that a process takes to start.
_WORTH_A_WORKER = 4_000_000


@runtime_checkable
class Job(Protocol):
    """Something to do that another process can be given.

    Attributes:
      name: of its record.
      num_bytes: how much work it is.
    """

    name: str
    num_bytes: int

    def __call__(self, advance: Advance) -> dict[str, Any]:
        """Does it, telling `advance` of every few bytes; returns what its record shall say."""


def run(
    folder: Path, jobs: Sequence[Job], workers: int, description: str, report: Report
) -> list[dict]:
    """Does the jobs that have no record yet; returns what the records of all of them say.

    Args:
      folder: that the jobs write to; their records are in its folder `DONE`.
      workers: processes, at most; one job is done in this one.

    Raises:
      ConfigError: one of the jobs does; the others are stopped, and what is done is kept.
    """
    (folder / DONE).mkdir(exist_ok=True)
    todo = [job for job in jobs if not _record(folder, job).exists()]
    total = sum(job.num_bytes for job in jobs)
    done = total - sum(job.num_bytes for job in todo)
    workers = min(workers, len(todo), 1 + (total - done) // _WORTH_A_WORKER)
    with Meter(description, total, done, report) as meter:
        if workers <= 1:
            for job in todo:
                _do(folder, job, meter.advance)
        else:
            _share_out(folder, todo, workers, meter)
    return [json.loads(_record(folder, job).read_text(encoding="utf-8")) for job in jobs]


def _record(folder: Path, job: Job) -> Path:
    return folder / DONE / f"{job.name}.json"


def _do(folder: Path, job: Job, advance: Advance) -> None:
    write_atomic(_record(folder, job), json.dumps(job(advance)))


def _share_out(folder: Path, jobs: Sequence[Job], workers: int, meter: Meter) -> None:
    # Not forked: a process that has started JAX or TensorStore has threads.
    context = multiprocessing.get_context("spawn")
    _begin_to_track()
    read, stop = context.Value("q", 0), context.Value("b", 0)
    pool = ProcessPoolExecutor(workers, context, worker.start, (read, stop))
    try:
        waiting = {pool.submit(_do_in_worker, folder, job) for job in jobs}
        while waiting:
            ended, waiting = concurrent.futures.wait(
                waiting, _POLL_EVERY, concurrent.futures.FIRST_COMPLETED
            )
            meter.set(read.value)
            for future in ended:
                future.result()
    except BrokenProcessPool:
        raise ConfigError(
            f"one of {workers} worker processes was killed, as a machine does that runs out of "
            "memory. What is done is kept: give the same command again with fewer --workers"
        ) from None
    finally:
        stop.value = 1
        pool.shutdown(cancel_futures=True)


class _StoppedError(Exception):
    """The process that gave out the jobs wants no more of them."""


def _advance(num_bytes: int) -> None:
    """In a worker: tells the process that gave out the jobs, and hears whether it goes on."""
    read, stop = worker.shared
    if stop.value:
        raise _StoppedError
    with read.get_lock():
        read.value += num_bytes


def _begin_to_track() -> None:
    """Python's process that removes the semaphores of one that was killed, without its warning."""
    before = sys.warnoptions[:]
    sys.warnoptions.append("ignore:resource_tracker")  # is given to it
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions[:] = before


def _do_in_worker(folder: Path, job: Job) -> None:
    _do(folder, job, _advance)


class Meter:
    """How much of the work is done: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, description: str, total: int, done: int, report: Report):
        self._description, self._total, self._report = description, total, report
        self._before, self._done = done, done
        self._start = self._last = time.monotonic()
        self._bar = None
        # Whoever takes the lines elsewhere wants no bar.
        if report is print and Console().is_terminal:
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=30),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TextColumn("ETA"),
                progress.TimeRemainingColumn(),
                transient=True,
            )
            self._task = self._bar.add_task(description, total=total, completed=done)

    def advance(self, num_bytes: int) -> None:
        self.set(self._done - self._before + num_bytes)

    def set(self, num_bytes: int) -> None:
        """So many bytes of work have been done since the start."""
        self._done = self._before + num_bytes
        now = time.monotonic()
        if now - self._last < (_POLL_EVERY if self._bar else _LINE_EVERY):
            return
        self._last = now
        if self._bar:
            self._bar.update(self._task, completed=self._done)
        else:
            pace = num_bytes / (now - self._start)
            left = timedelta(seconds=round((self._total - self._done) / max(pace, 1)))
            self._report(
                f"{self._description}: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, "
                f"{pace / 1e6:,.1f} MB/s, ETA {left} h"
            )

    def __enter__(self) -> Meter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()
