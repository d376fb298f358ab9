"""Damaged files of a run and of its data: found before they are used, or harmless.

Found is one line and status 1, and the run goes on when the file is as it was. Harmless is the same
last state, bit for bit.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from tests.chaos.recipe import SAVE_EVERY, STEPS
from tests.chaos.room import Room, contents, require_ended, require_one_line
from tests.chaos.trial import Trial, dice

# The checkpoint that an interrupted run goes on from.
_NEWEST = f"run/checkpoints/{STEPS - SAVE_EVERY}"

# Kind of file: where it lies.
FILES = {
    "arrays of parameters": f"{_NEWEST}/params/**/d/*",
    "arrays of the optimizer": f"{_NEWEST}/rest/**/d/*",
    "manifest.ocdbt": f"{_NEWEST}/params/manifest.ocdbt",
    "params/_METADATA": f"{_NEWEST}/params/_METADATA",
    "meta/metadata": f"{_NEWEST}/meta/metadata",
    "checksums.json": f"{_NEWEST}/checksums.json",
    "_CHECKPOINT_METADATA": f"{_NEWEST}/_CHECKPOINT_METADATA",
    "config.json": "run/config.json",
    "data.json": "run/data.json",
    "tokenizer.model": "run/tokenizer.model",
    "metrics.jsonl": "run/metrics.jsonl",
    "shard of tokens": "data/tokens-*/*-train.array_record-*",
    "index of tokens": "data/tokens-*/train-index.npy",
    "manifest.json of tokens": "data/tokens-*/manifest.json",
    "features.json of tokens": "data/tokens-*/features.json",
    "dataset_info.json of tokens": "data/tokens-*/dataset_info.json",
}


def trials(room: Room, kills: int, seed: int) -> Iterator[Trial]:
    for kind in FILES:
        for way in WAYS:
            fault = functools.partial(_damaged, room, kind, way, dice(seed, kind, way))
            yield Trial(f"damaged: {kind}", way, fault)
    for number in range(4):
        chance = dice(seed, "config.json", number)
        fault = functools.partial(_number_changed, room, chance)
        yield Trial("damaged: a number of config.json, no --config", str(number), fault)


def _damaged(room: Room, kind: str, way: str, chance: Random, folder: Path) -> None:
    run, data = folder / "run", folder / "data"
    room.interrupted(run)
    shutil.copytree(room.data, data)
    file = _file(folder, kind)
    _require_found_or_harmless(
        room, room.arguments(run, data), file, lambda: WAYS[way](file, chance)
    )


def _number_changed(room: Room, chance: Random, folder: Path) -> None:
    run = folder / "run"
    room.interrupted(run)
    file, arguments = run / "config.json", ["train", f"--workdir={run}"]
    _require_found_or_harmless(room, arguments, file, lambda: _change_digit(file, chance))


def _file(folder: Path, kind: str) -> Path:
    """The largest of its kind."""
    files = [file for file in folder.glob(FILES[kind]) if file.is_file()]
    return max(files, key=lambda file: (file.stat().st_size, file))


def _require_found_or_harmless(
    room: Room, arguments: list[str], file: Path, damage: Callable[[], None]
) -> None:
    run, intact = Path(arguments[-1].removeprefix("--workdir=")), file.read_bytes()
    damage()
    before = contents(run)
    said = room.said(arguments)
    if said.status == 0:
        return room.require_equal(run)
    require_one_line(said)
    if contents(run) == before:
        return None
    _remove(file)
    file.write_bytes(intact)
    require_ended(room.said(arguments))
    return room.require_whole(run)


def _remove(file: Path) -> None:
    if file.is_dir():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)


def _flip(file: Path, chance: Random) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def _change_digit(file: Path, chance: Random) -> None:
    """One bit of a number, which is another number then."""
    content = bytearray(file.read_bytes())
    at = chance.choice([m.start(1) for m in re.finditer(rb": [\d.]*([2-7])", content)])
    content[at] ^= 1
    file.write_bytes(content)


def _cut(file: Path, chance: Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(1, len(content))])


def _replace(file: Path, put: Callable[[Path], None]) -> None:
    file.unlink()
    put(file)


WAYS: dict[str, Callable[[Path, Random], None]] = {
    "a flipped bit": _flip,
    "cut short": _cut,
    "emptied": lambda file, chance: file.write_bytes(b"") and None,
    "removed": lambda file, chance: file.unlink(),
    "a folder in its place": lambda file, chance: _replace(file, Path.mkdir),
    "a FIFO in its place": lambda file, chance: _replace(file, os.mkfifo),
    "a link to nowhere in its place": lambda file, chance: _replace(
        file, lambda link: link.symlink_to("nowhere")
    ),
}
