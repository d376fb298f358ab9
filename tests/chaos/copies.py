"""Runs that keep copies on a disk of their own: killed, with copies damaged, with no room for them.

A copy that is whole is gone on from, one that is not costs steps: the run ends with the same bits.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from tests.chaos.damage import WAYS
from tests.chaos.disks import disk
from tests.chaos.recipe import SAVE_EVERY, STEPS
from tests.chaos.room import Room, ended, require_ended
from tests.chaos.signals import wait
from tests.chaos.trial import Lost, Trial, dice

EVERY = 2

# The largest of them is what is damaged.
FILES = {"arrays": "*/arrays", "sums": "checksums.json", "note": "copy.json"}


def trials(room: Room, kills: int, seed: int) -> Iterator[Trial]:
    for number in range(kills // 2):
        for name, moment in (("beside copies", _any_time), ("in a copy", _in_a_copy)):
            fault = functools.partial(_killed, room, moment, dice(seed, name, number))
            yield Trial(f"SIGKILL {name}", str(number), fault)
    for kind in FILES:
        for way in WAYS:
            fault = functools.partial(_damaged, room, kind, way, dice(seed, "copy", kind, way))
            yield Trial("damaged: a copy", f"{kind}, {way}", fault)
    for share in (0.3, 0.9):
        fault = functools.partial(_no_room, room, share)
        yield Trial("disk without room for copies", f"{share:.0%} of one fits", fault)


def _flags(folder: Path) -> tuple[str, ...]:
    return (f"--config.train.local_dir={folder}", f"--config.train.local_every={EVERY}")


def _killed(
    room: Room, moment: Callable[[Path, Random], Callable[[], bool]], chance: Random, folder: Path
) -> None:
    run, flags = folder / "run", _flags(folder / "local")
    process = room.start(run, *flags)
    try:
        wait(process, moment(folder, chance))
        time.sleep(chance.uniform(0, 0.02))
    finally:
        process.kill()
    ended(process)
    room.require_resumed(run, *flags)


def _any_time(folder: Path, chance: Random) -> Callable[[], bool]:
    step = chance.randrange(EVERY, STEPS)
    return lambda: _newest(folder) >= step


def _in_a_copy(folder: Path, chance: Random) -> Callable[[], bool]:
    step = chance.randrange(EVERY, STEPS, EVERY)
    return lambda: any(folder.glob(f"local/*/process-0/.{step}.tmp")) or _newest(folder) >= step


def _newest(folder: Path) -> int:
    """The step of the newest whole copy."""
    return max((int(copy.name) for copy in _copies(folder)), default=0)


def _copies(folder: Path) -> list[Path]:
    return [entry for entry in folder.glob("local/*/process-0/*") if entry.name.isdigit()]


def _damaged(room: Room, kind: str, way: str, chance: Random, folder: Path) -> None:
    """The newest copy, which is newer than the newest checkpoint."""
    run, flags = folder / "run", _flags(folder / "local")
    process = room.start(run, *flags)
    newest = STEPS - SAVE_EVERY + EVERY
    try:
        wait(process, lambda: _newest(folder) >= newest)
    finally:
        process.kill()
    ended(process)
    copy = max(_copies(folder), key=lambda copy: int(copy.name))
    file = max(copy.glob(FILES[kind]), key=lambda file: file.stat().st_size)
    WAYS[way](file, chance)
    room.require_resumed(run, *flags)
    if left := _copies(folder):
        raise Lost(f"left {left[0].relative_to(folder)} behind, though the run has ended")


def _no_room(room: Room, share: float, folder: Path) -> None:
    """Costs the copies and a line; the run itself is not held up."""
    state = sum(f.stat().st_size for f in room.whole.glob(f"checkpoints/{STEPS}/**/d/*"))
    with disk(folder / "local", size=int(share * state)) as local:
        said = require_ended(ended(room.start(folder / "run", *_flags(local))))
        if "local" not in said.err + said.out:
            raise Lost(f"did not say that it makes no copies: {said.err[-300:]!r}")
        room.require_whole(folder / "run")
