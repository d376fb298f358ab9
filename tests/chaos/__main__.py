"""Breaks runs, and tells what came of it: see `tests.chaos`."""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from tests import hurry

# Jobs of several processes are given their devices by what stands here.
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {hurry.XLA_FLAGS}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("PJRT_NPROC", "32")

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.chaos import (
    copies,
    damage,
    disks,
    forbidden,
    hostile,
    launchers,
    leases,
    meshes,
    peers,
    several,
    signals,
    strays,
    together,
    trial,
    unsound,
    workers,
)
from tests.chaos.room import Room
from tests.chaos.trial import Lost, Result, Trial

FAULTS = (
    signals,
    workers,
    damage,
    strays,
    disks,
    forbidden,
    copies,
    together,
    leases,
    meshes,
    launchers,
    peers,
    several,
    unsound,
    hostile,
)


def main(arguments: list[str] | None = None) -> int:
    """The status: 1 if a run was lost."""
    given = _parse(arguments)
    # What a shell starts in the background ignores SIGINT, and so would all that is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        room = Room(Path(folder))
        trials = every(room, given.kills, given.seed)
        earlier = trial.read(given.json) if given.json and given.json.exists() else []
        chosen = _chosen(trials, earlier, given)
        try:
            if chosen:
                room.begin()
        except Lost as error:
            sys.exit(f"error: the undisturbed run is lost: {error}")
        results: list[Result] = []
        turn = {(t.fault, t.case): number for number, t in enumerate(trials)}
        if given.json:
            trial.write(given.json, earlier)
        for result in _results(chosen, Path(folder) / "trials", given):
            results.append(result)
            results.sort(key=lambda r: turn[r.fault, r.case])
            if given.json:  # at once: an hour of trials may be interrupted
                trial.write(given.json, trial.merged(earlier, results))
    print(trial.table(results))
    left = len(chosen) - len(results)
    if left:
        print(f"{left} of {len(chosen)} were not tried within {given.seconds:g} s")
    if given.page:
        trial.put_table(given.page, trial.read(given.json) if given.json else results)
    return int(any(result.verdict == "lost" for result in results))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs; half as many others")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begins none after")
    parser.add_argument("--seed", type=int, default=0, help="of all that is left to chance")
    parser.add_argument("--only", action="append", help="trials with this, or that, in their name")
    parser.add_argument("--at_once", type=int, default=2, help="trials that run at a time")
    parser.add_argument("--json", type=Path, help="gets the results, beside others that it has")
    parser.add_argument("--page", type=Path, help="gets the table of all of these")
    parser.add_argument("--rest", action="store_true", help="not what survived already")
    given = parser.parse_args(arguments)
    if given.rest and not given.json:
        parser.error("--rest goes on from the results of --json=FILE")
    return given


def _chosen(trials: list[Trial], earlier: list[Result], given: argparse.Namespace) -> list[Trial]:
    """Those that are asked for."""
    chosen = [t for t in trials if any(part in t.name for part in given.only or [""])]
    if not chosen:
        sys.exit(f"error: --only={' '.join(given.only)} is in the name of no trial")
    survived = {(r.fault, r.case) for r in earlier if given.rest and r.verdict == "survived"}
    return [t for t in chosen if (t.fault, t.case) not in survived]


def every(room: Room, kills: int, seed: int) -> list[Trial]:
    """All trials; of each fault the first, then of each the second: time may end before them."""
    of_faults: dict[str, list[Trial]] = {}
    for fault in FAULTS:
        for one in fault.trials(room, kills, seed):
            of_faults.setdefault(one.fault, []).append(one)
    return [t for turn in itertools.zip_longest(*of_faults.values()) for t in turn if t]


def _results(chosen: list[Trial], folder: Path, given: argparse.Namespace) -> Iterator[Result]:
    """Of each trial that began in time, when it has ended; the lost are told."""
    deadline = time.monotonic() + given.seconds
    waiting = iter(enumerate(chosen))
    running: set[Future] = set()
    with _bar(len(chosen)) as bar, ThreadPoolExecutor(given.at_once) as pool:
        while True:
            while len(running) < given.at_once and time.monotonic() < deadline:
                if (numbered := next(waiting, None)) is None:
                    break
                number, one = numbered
                running.add(pool.submit(_one, one, folder / str(number)))
            if not running:
                return
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for result in (future.result() for future in ended):
                bar.update(bar.task_ids[0], advance=1)
                if result.verdict == "lost":
                    bar.console.print(_lost(result, given), markup=False, soft_wrap=True)
                yield result


def _one(one: Trial, folder: Path) -> Result:
    try:
        return one.result(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _bar(total: int) -> Progress:
    console = Console()
    columns = (TextColumn("chaos"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    bar.add_task("chaos", total=total)
    return bar


def _lost(result: Result, given: argparse.Namespace) -> str:
    again = (
        f"--seed {given.seed} --kills {given.kills} --only {result.fault + ': ' + result.case!r}"
    )
    return f"lost: {result.fault}: {result.case}: {result.why}\n  python -m tests.chaos {again}"


if __name__ == "__main__":
    sys.exit(main())
