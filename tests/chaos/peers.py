"""One of several processes dead, stopped or silent: the others end, and the run goes on."""

from __future__ import annotations

import functools
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from moepp_jax import distributed
from moepp_jax.watch import STATUS
from tests import jobs
from tests.chaos.recipe import SAVE_EVERY
from tests.chaos.room import Room
from tests.chaos.trial import Lost, Missed, Trial

# Seconds in which the others must have ended: what the package states, and some to spare.
BOUND = distributed.HEARTBEAT_TIMEOUT + 60

_GONE = "^error: another process of this run is gone|another task died"

# Of one whose collective meets what a peer sends that has heard already; it hears nothing more.
_TORN = "gloo::EnforceNotMet"

# Of a run that is watched closely: a stopped process is then found before JAX misses it.
_HANG = ("--config.train.hang_seconds=5", "--config.train.hang_factor=2")

_MAIN = jobs.STUCK_AFTER.format(batches=12)


def trials(room: Room, kills: int, seed: int) -> Iterator[Trial]:
    for of in (2, 4):
        for victim in (0, of - 1):
            for what in ("dead", "stopped"):  # a silent one is alive to JAX
                case = f"process {victim} of {of}"
                fault = functools.partial(_without, room, of, victim, what)
                yield Trial(f"one process {what}", case, fault)
            for what in ("stopped", "silent"):
                fault = functools.partial(_without, room, of, victim, what, watched=True)
                yield Trial(f"one process {what}, watched", f"process {victim} of {of}", fault)


def _job(room: Room, run: Path, of: int, silent: int = -1, more: Sequence[str] = ()) -> jobs.Job:
    compiled = {k: v for k, v in room.environment.items() if k.startswith("JAX_")}
    mesh = [f"--config.mesh.{axis}=2" for axis in ("fsdp", "expert")]
    arguments = room.arguments(run) + mesh + ["--config.mesh.data=-1", *more]
    return jobs.Job(
        arguments,
        of=of,
        environment=lambda port, number, of: jobs.slurm(port, number, of) | compiled,
        program=["-c", _MAIN],
        flags=lambda number: ["--stuck"] if number == silent else [],
    )


def _without(
    room: Room, of: int, victim: int, what: str, folder: Path, watched: bool = False
) -> None:
    run, more = folder / "run", _HANG if watched else ()
    with room.several:
        whole = _whole(room, of)
        with _job(room, run, of, victim if what == "silent" else -1, more) as job:
            _wait_for(job, run / "checkpoints" / str(SAVE_EVERY))
            if what != "silent":
                number = signal.SIGKILL if what == "dead" else signal.SIGSTOP
                job.processes[victim].send_signal(number)
            said = _require_others_end(job, victim)
            if watched and not any(re.search(_named(victim), err, re.M) for err in said):
                raise Lost(f"process {victim} is not named: {said}")
        with _job(room, run, of) as job:
            _end(job)
    room.require_whole(run, whole)


def _wait_for(job: jobs.Job, path: Path) -> None:
    deadline = time.monotonic() + jobs.SECONDS
    while not path.exists():
        if any(process.poll() is not None for process in job.processes):
            raise Missed("the run had ended")
        if time.monotonic() > deadline:
            raise Lost("the run hangs before anything was broken")
        time.sleep(0.01)


def _named(victim: int) -> str:
    """What a run that is watched says of it, or of one that is silent before JAX ends all."""
    late = rf"no .* has ended for .*late: .*process {victim} on "
    return rf"^(?:error: )?process \d+ of \d+: (?:{late}|no sign of life of process {victim} on )"


def _require_others_end(job: jobs.Job, victim: int) -> list[str]:
    """What they say."""
    deadline = time.monotonic() + BOUND
    said = []
    for number, process in enumerate(job.processes):
        if number == victim:
            continue
        try:
            _, err = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            raise Lost(f"process {number} still ran {BOUND} s later") from None
        if process.returncode == 0:
            raise Missed("the run had ended")
        said.append(err)
        if process.returncode == STATUS and re.search(_named(victim), err, re.M):
            continue
        known = re.search(_GONE, err, re.M) or _TORN in err
        if process.returncode not in (1, -signal.SIGABRT) or not known:
            raise Lost(f"process {number} ended with {process.returncode}: {err[-400:]}")
    if not any(re.search(f"{_GONE}|{_named(victim)}", err, re.M) for err in said):
        raise Lost(f"nobody says that one is gone: {said}")
    return said


def _end(job: jobs.Job) -> None:
    for number, process in enumerate(job.processes):
        try:
            _, err = process.communicate(timeout=jobs.SECONDS)
        except subprocess.TimeoutExpired:
            raise Lost(f"process {number} still ran {jobs.SECONDS} s after its start") from None
        if process.returncode != 0:
            raise Lost(f"process {number} ended with {process.returncode}: {err[-400:]}")


def _whole(room: Room, of: int) -> Path:
    """The run of so many processes that nobody disturbed."""
    run = room.folder / f"whole-of-{of}"
    if not (run / "ended").exists():
        with _job(room, run, of) as job:
            _end(job)
        (run / "ended").touch()
    return run
