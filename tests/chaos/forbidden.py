"""What a run may not read or write any more: one line, or the run goes on without it."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from moepp_jax.checkpoint import SaveError
from tests.chaos.recipe import SAVE_EVERY, STEPS
from tests.chaos.room import Room, Said, ended, require_one_line
from tests.chaos.signals import wait
from tests.chaos.trial import Lost, Missed, Trial

# What permission is taken from, and those that are left.
BEFORE = {
    "the run's folder": (".", 0o500),
    "checkpoints": ("checkpoints", 0),
    "the newest checkpoint": (f"checkpoints/{STEPS - SAVE_EVERY}", 0),
    "the oldest checkpoint": (f"checkpoints/{SAVE_EVERY}", 0),
    "metrics.jsonl": ("metrics.jsonl", 0),
    "tensorboard": ("tensorboard", 0),
    "config.json": ("config.json", 0),
    "tokenizer.model": ("tokenizer.model", 0),
}
# A run that goes on ends in good order without these.
SPARED = ("the oldest checkpoint", "tensorboard")

SAID = "Permission denied|read-only for you"

WHILE = ("the run's folder", "checkpoints", "the oldest checkpoint", "metrics.jsonl", "tensorboard")


def trials(room: Room, kills: int, seed: int) -> Iterator[Trial]:
    for what in BEFORE:
        yield Trial(
            "permission lost before it goes on", what, functools.partial(_before, room, what)
        )
    for what in WHILE:
        yield Trial("permission lost while it trains", what, functools.partial(_while, room, what))


def _before(room: Room, what: str, folder: Path) -> None:
    run = folder / "run"
    room.interrupted(run)
    with taken(run, what):
        said = _require_told(_start(room, run))
    if said.status != 0 and what in SPARED:
        raise Lost(f"ended for what it can spare: {said.err}")
    room.require_resumed(run)


def _while(room: Room, what: str, folder: Path) -> None:
    run = folder / "run"
    process = _start(room, run)
    wait(process, (run / "checkpoints" / str(SAVE_EVERY) / "checksums.json").exists)
    with taken(run, what):
        _require_told(process)
    room.require_resumed(run)


@contextlib.contextmanager
def taken(run: Path, what: str) -> Iterator[None]:
    """Permission for a part of a run is gone, and in the end there again."""
    name, mode = BEFORE[what]
    path = run / name
    had = path.stat().st_mode
    path.chmod(mode)
    try:
        yield
    finally:
        path.chmod(had)


def for_whom_it_counts() -> tuple[str, ...]:
    """A command that runs another as one for whom permissions count, as they do not for root.

    Raises:
      Missed: there is none here.
    """
    if os.geteuid() != 0:
        return ()
    if not shutil.which("setpriv"):
        raise Missed("root's permissions cannot be put down here: no setpriv")
    return ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


def _start(room: Room, run: Path) -> subprocess.Popen:
    return room.start(run, under=for_whom_it_counts())


def _require_told(process: subprocess.Popen) -> Said:
    """It ends in good order, or with one line that says why."""
    said = ended(process)
    if said.status != 0:
        require_one_line(said, SaveError.STATUS, 1)
        if not re.search(SAID, said.err):
            raise Lost(f"did not say why: {said.err}")
    return said
