"""A disk that knows no locks: one trains, others are told so, and what dies lets go."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.recipe import SAVE_EVERY
from tests.chaos.room import Room, ended, require_ended, require_one_line
from tests.chaos.signals import logged
from tests.chaos.together import require_one_trained, require_refused
from tests.chaos.trial import Lost, Missed, Trial, dice

# Seconds after which who is not heard of is dead here: 45 elsewhere.
_DEAD = 6

# The command where no file can be locked; with --hold it rests in its middle for longer than that.
_WITHOUT_LOCKS = f"""
import errno, fcntl, sys, time
def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.lockf = refuse
from moepp_jax import lease, main, processes
lease.RENEWED, lease.DEAD, lease.SETTLED = 0.5, {_DEAD}, 0.3
if "--hold" in sys.argv:
    sys.argv.remove("--hold")
    place, placed = processes.Rows.place, []
    def slowly(*args):
        placed.append(1)
        if len(placed) == 12:
            time.sleep({4 * _DEAD})
        return place(*args)
    processes.Rows.place = slowly
sys.argv[0] = "moepp"
main.main()
"""
_FAULT = "a disk without locks"
_WAITED = "was at work here: waiting up to"


def trials(room: Room, kills: int, seed: int) -> Iterator[Trial]:
    yield Trial(_FAULT, "while one trains", functools.partial(_beside, room))
    for place in ("this host", "another host"):
        fault = functools.partial(_killed, room, place == "this host")
        yield Trial(_FAULT, f"killed, and given again on {place}", fault)
    yield Trial(_FAULT, "stopped, and another has taken over", functools.partial(_stopped, room))
    for number in range(4):
        delay = dice(seed, "leases", number).uniform(0, 0.5)
        yield Trial(_FAULT, f"at once, {number}", functools.partial(_at_once, room, delay))


def _start(room: Room, run: Path, *flags: str) -> subprocess.Popen:
    return room.start(run, *flags, moepp=[sys.executable, "-c", _WITHOUT_LOCKS])


def _in_its_middle(room: Room, run: Path) -> subprocess.Popen:
    process = _start(room, run, "--hold")
    while logged(run) < SAVE_EVERY:
        if process.poll() is not None:
            raise Missed(f"the run had ended: {ended(process).err}")
        time.sleep(0.01)
    if not (run / ".train.lease").exists():
        process.kill()
        raise Lost("trains without a lease")
    return process


def _beside(room: Room, folder: Path) -> None:
    first = _in_its_middle(room, folder / "run")
    require_refused(ended(_start(room, folder / "run")))
    require_ended(ended(first))
    room.require_whole(folder / "run")


def _killed(room: Room, here: bool, folder: Path) -> None:
    """Where its number can be looked up it is not waited for."""
    run = folder / "run"
    first = _in_its_middle(room, run)
    first.kill()
    ended(first)
    if not here:
        note = run / ".train.lease"
        note.write_text(json.dumps(json.loads(note.read_text()) | {"host": "far"}))
    said = require_ended(ended(_start(room, run)))
    if (_WAITED in said.out) == here:
        raise Lost(f"{'waited' if here else 'did not wait'} for a dead process: {said.out[:300]}")
    room.require_whole(run)


def _stopped(room: Room, folder: Path) -> None:
    """It goes on after another has ended its run: it must not write any more."""
    run = folder / "run"
    first = _in_its_middle(room, run)
    first.send_signal(signal.SIGSTOP)
    try:
        require_ended(ended(_start(room, run)))
    finally:
        first.send_signal(signal.SIGCONT)
    said = ended(first)
    require_one_line(said)
    if "this run ends here" not in said.err:
        raise Lost(f"did not say that another has taken over: {said.err}")
    room.require_whole(run)


def _at_once(room: Room, delay: float, folder: Path) -> None:
    first = _start(room, folder / "run")
    time.sleep(delay)
    said = [ended(process) for process in (first, _start(room, folder / "run"))]
    require_one_trained(said, require_refused)
    room.require_whole(folder / "run")
