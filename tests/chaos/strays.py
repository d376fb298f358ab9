"""What nobody saved among the checkpoints, and sums that are gone: passed over, or refused."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.chaos.recipe import SAVE_EVERY, STEPS
from tests.chaos.room import Room, require_one_line
from tests.chaos.trial import Lost, Trial

_NEWEST = str(STEPS - SAVE_EVERY)


def _half(checkpoints: Path) -> None:
    shutil.copytree(checkpoints / _NEWEST, checkpoints / f"{STEPS}.orbax-checkpoint-tmp")


STRAYS: dict[str, Callable[[Path], object]] = {
    "an empty folder 99": lambda checkpoints: (checkpoints / "99").mkdir(),
    "an empty folder of the next step": lambda checkpoints: (checkpoints / str(STEPS)).mkdir(),
    "a file 99": lambda checkpoints: (checkpoints / "99").write_text("not a step"),
    "a folder that is no number": lambda checkpoints: (checkpoints / "notes").mkdir(),
    "a file that is no number": lambda checkpoints: (checkpoints / ".DS_Store").write_text("x"),
    "a FIFO 99": lambda checkpoints: os.mkfifo(checkpoints / "99"),
    "a link to nowhere 99": lambda checkpoints: (checkpoints / "99").symlink_to("nowhere"),
    "a half-written step": _half,
}


def trials(room: Room, kills: int, seed: int) -> Iterator[Trial]:
    for stray in STRAYS:
        yield Trial("stray beside checkpoints", stray, functools.partial(_stray, room, stray))
    for content in (None, "{}"):
        case = "removed" if content is None else content
        for strict in (False, True):
            fault = functools.partial(_unverified, room, content, strict)
            yield Trial("no sums", f"{case}{', --strict' if strict else ''}", fault)


def _stray(room: Room, stray: str, folder: Path) -> None:
    run = folder / "run"
    room.interrupted(run)
    STRAYS[stray](run / "checkpoints")
    room.require_resumed(run)


def without_sums(run: Path, content: str | None) -> None:
    """Of no checkpoint they are left: nothing, or this, is in their place."""
    for sums in (run / "checkpoints").glob("*/checksums.json"):
        sums.unlink() if content is None else sums.write_text(content)


def _unverified(room: Room, content: str | None, strict: bool, folder: Path) -> None:
    """None of the checkpoints can be verified: a warning, or an error where that is asked for."""
    run = folder / "run"
    room.interrupted(run)
    without_sums(run, content)
    if strict:
        said = room.said([*room.arguments(run), "--strict"])
        require_one_line(said)
        if "cannot be verified" not in said.err:
            raise Lost(f"did not say that it cannot be verified: {said.err}")
        return
    said = room.require_resumed(run)
    if "cannot be verified" not in said.out + said.err:
        raise Lost("did not say that it was not verified")
