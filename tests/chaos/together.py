"""Two processes on one folder, under whatever name: one trains, the other is told so."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.chaos.room import Room, Said, ended, require_ended, require_one_line
from tests.chaos.trial import Lost, Missed, Trial, dice


def trials(room: Room, kills: int, seed: int) -> Iterator[Trial]:
    for name in ("run", "link"):
        fault = functools.partial(_beside, room, name)
        yield Trial("two processes on one folder", f"while one trains, by a {name}", fault)
    for number in range(4):
        delay = dice(seed, "together", number).uniform(0, 0.5)
        fault = functools.partial(_at_once, room, delay, ("run", "link")[number % 2])
        yield Trial("two processes on one folder", f"at once, {number}", fault)


def _link(folder: Path) -> None:
    """Two names for one folder, which is there and empty."""
    (folder / "run").mkdir()
    (folder / "link").symlink_to(folder / "run", target_is_directory=True)


def _beside(room: Room, name: str, folder: Path) -> None:
    _link(folder)
    first = room.start(folder / "run")
    while not (folder / "run" / "config.json").exists():
        if first.poll() is not None:
            raise Missed("the first had ended")
        time.sleep(0.01)
    # It holds still, as training takes longer elsewhere than a second start takes here.
    first.send_signal(signal.SIGSTOP)
    try:
        said = ended(room.start(folder / name))
    finally:
        first.send_signal(signal.SIGCONT)
    require_refused(said)
    require_ended(ended(first))
    room.require_whole(folder / "run")


def _at_once(room: Room, delay: float, name: str, folder: Path) -> None:
    _link(folder)
    first = room.start(folder / "run")
    time.sleep(delay)
    second = room.start(folder / name)
    require_one_trained([ended(first), ended(second)], require_one_line)
    room.require_whole(folder / "run")


def require_refused(said: Said) -> None:
    """As another process trains there.

    Raises:
      Lost: it does not say so.
    """
    require_one_line(said)
    if "trains there" not in said.err:
        raise Lost(f"did not say that another trains: {said.err}")


def require_one_trained(said: Sequence[Said], require_told: Callable[[Said], None]) -> None:
    """Of processes that came at once; those that did not are told.

    Raises:
      Lost: none did, or `require_told` of one that did not.
    """
    for process in said:
        if process.status != 0:
            require_told(process)
    if all(process.status for process in said):
        raise Lost(f"neither trained: {' '.join(process.err for process in said)}")
