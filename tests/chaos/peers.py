"""One of several processes dead, stopped or silent: the others end, and the run goes on."""

from __future__ import annotations

import functools
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from moepp_jax import distributed
from moepp_jax.watch import STATUS
from tests import jobs
from tests.chaos.recipe import SAVE_EVERY
from tests.chaos.room import Room
from tests.chaos.team import GONE, Team, wait_for
from tests.chaos.trial import Lost, Missed, Trial

# Seconds in which the others must have ended: what the package states, and some to spare.
BOUND = distributed.HEARTBEAT_TIMEOUT + 60

# Where hangs are watched for: in a save twice ten times `hang_seconds`, and process 0 last.
WATCHED = 2 * 10 * 5 + 30

# Of one whose collective meets what a peer sends that has heard already; it hears nothing more.
_TORN = "gloo::EnforceNotMet"

# Of a run that is watched closely: a stopped process is then found before JAX misses it.
_HANG = ("--config.train.hang_seconds=5", "--config.train.hang_factor=2")


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


def _without(
    room: Room, of: int, victim: int, what: str, folder: Path, watched: bool = False
) -> None:
    run, team, more = folder / "run", Team(room, of), _HANG if watched else ()
    with room.several:
        with team.job(run, *more, silent=victim if what == "silent" else -1) as job:
            wait_for(job, (run / "checkpoints" / str(SAVE_EVERY)).exists)
            if what != "silent":
                number = signal.SIGKILL if what == "dead" else signal.SIGSTOP
                job.processes[victim].send_signal(number)
            said = require_others_end(job, victim, WATCHED if watched else BOUND)
            if watched and not any(re.search(_named(victim), err, re.M) for err in said):
                raise Lost(f"process {victim} is not named: {said}")
        team.require_resumed(run)


def _named(victim: int) -> str:
    """What a run that is watched says of it, or of one that is silent before JAX ends all."""
    late = rf"no .* has ended for .*late: .*process {victim} on "
    return rf"^(?:error: )?process \d+ of \d+: (?:{late}|no sign of life of process {victim} on )"


def require_others_end(job: jobs.Job, victim: int, bound: float = BOUND) -> list[str]:
    """What they say.

    Args:
      bound: seconds.

    Raises:
      Lost, Missed: one hangs, or does not say why it ends; the run had ended.
    """
    deadline = time.monotonic() + bound
    said = []
    for number, process in enumerate(job.processes):
        if number == victim:
            continue
        try:
            _, err = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            _, err = process.communicate()
            raise Lost(f"process {number} still ran {bound:g} s later: {err[-800:]}") from None
        if process.returncode == 0:
            raise Missed("the run had ended")
        said.append(err)
        if process.returncode == STATUS and re.search(_named(victim), err, re.M):
            continue
        known = re.search(GONE, err, re.M) or _TORN in err
        if process.returncode not in (1, -signal.SIGABRT) or not known:
            raise Lost(f"process {number} ended with {process.returncode}: {err[-400:]}")
    torn = len(said) == 1 and _TORN in said[0]  # nobody is left who could say more
    if not torn and not any(re.search(f"{GONE}|{_named(victim)}", err, re.M) for err in said):
        raise Lost(f"nobody says that one is gone: {said}")
    return said
