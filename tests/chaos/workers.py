"""Signals to `data prepare` while its workers are at work: none outlives it, and it goes on."""

from __future__ import annotations

import functools
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.chaos.room import Room, Said, contents, ended, recipe_of, require_ended
from tests.chaos.signals import wait
from tests.chaos.trial import Lost, Missed, Trial, dice
from tests.tiny import TEXT

_STATUS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}

# Seconds in which a worker notices that nobody waits for it.
_LIMIT = 20.0

# Bytes of the text, and of a part of it: so many parts that its workers are seen at work.
_BYTES, _PART = 12_000_000, 1_000_000
_IN_PARTS = (
    "from moepp_jax.data import files; "
    f"files._PART_BYTES = {_PART}; "
    "from moepp_jax.main import main; "
    "main()"
)


def trials(room: Room, kills: int, seed: int) -> Iterator[Trial]:
    for number in _STATUS:
        for again in range(2):
            chance = dice(seed, "workers", number, again)
            fault = functools.partial(_asked, room, number, chance.uniform(0, 3))
            yield Trial("signal while data are prepared", f"{number.name}, {again}", fault)


def _asked(room: Room, number: signal.Signals, delay: float, folder: Path) -> None:
    text = _text(folder / "text.jsonl")
    process = _start(room, text, folder / "data")
    parent = psutil.Process(process.pid)
    workers: list[psutil.Process] = []

    def at_work() -> bool:
        workers[:] = parent.children(recursive=True)
        return len(workers) > 2  # two, and what multiprocessing has beside them

    wait(process, at_work)
    time.sleep(delay)
    workers[:] = parent.children(recursive=True)
    process.send_signal(number)
    said = ended(process)
    if said.status == 0:
        raise Missed("all was prepared")
    _, alive = psutil.wait_procs(workers, timeout=_LIMIT)
    if alive:
        raise Lost(f"{len(alive)} of its processes still ran after {_LIMIT:g} s")
    _require_polite(said, _STATUS[number])
    for data in ("data", "whole"):
        require_ended(ended(_start(room, text, folder / data)))
    if contents(folder / "data") != contents(folder / "whole"):
        raise Lost("what was made is not what it is without the signal")


def _require_polite(said: Said, status: int) -> None:
    words = {143: "terminated", 130: "interrupted"}.get(status, "")
    if said.status != status or said.err.strip() != words:
        raise Lost(f"ended with status {said.status}, not {status}: {said.err[-600:]}")


def _text(file: Path) -> Path:
    """Of documents that are all different."""
    lines = [line for text in sorted(TEXT.glob("*")) for line in text.read_text().splitlines()]
    with file.open("w") as to:
        for turn in itertools.count():
            for line in lines:
                to.write(json.dumps({"text": f"{turn} {line}"}) + "\n")
            if to.tell() > _BYTES:
                return file


def _start(room: Room, text: Path, data: Path) -> subprocess.Popen:
    (tokenizer,) = room.data.glob("*.model")  # it would take longer to learn than all the rest
    changes = (f"--config.data.sources.text.path={text}", f"--config.data.tokenizer={tokenizer}")
    arguments = ["data", "prepare", "--workers=2", recipe_of(data), *changes]
    return room.popen(arguments, moepp=[sys.executable, "-c", _IN_PARTS])
