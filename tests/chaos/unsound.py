"""Batches whose loss is no number: a run stops and says where, or leaves them out and goes on."""

from __future__ import annotations

import functools
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from moepp_jax.metrics import read_metrics
from tests.chaos.room import Room, ended, require_ended, require_one_line
from tests.chaos.signals import logged, wait
from tests.chaos.trial import Lost, Trial

_FAULT = "a loss that is no number"
_SKIP = "--config.train.on_nonfinite=skip"

# The command, of which the batches of these numbers, from 0, have a target that counts for NaN.
_WITH_LOST = """
import sys
import numpy as np
from moepp_jax import main
from moepp_jax.data.reading import Training
lost, read = {numbers}, Training.batches
def batches(training, steps, rows):
    batch = read(training, steps, rows)
    for place in np.flatnonzero(np.isin(steps, lost)):
        batch["loss_mask"][place, 0, 0] = np.nan
    return batch
Training.batches = batches
sys.argv[0] = "moepp"
main.main()
"""


def trials(room: Room, kills: int, seed: int) -> Iterator[Trial]:
    for number in (0, 6, 14):
        fault = functools.partial(_stops, room, number)
        yield Trial(_FAULT, f"at step {number + 1}, stop and go on without it", fault)
    for number in (signal.SIGKILL, signal.SIGTERM):
        fault = functools.partial(_skips, room, number)
        yield Trial(_FAULT, f"three are left out, {number.name} between", fault)
    yield Trial(_FAULT, "too many in a row", functools.partial(_too_many, room))


def _start(room: Room, run: Path, numbers: list[int], *flags: str) -> subprocess.Popen:
    program = [sys.executable, "-c", _WITH_LOST.format(numbers=numbers)]
    return room.start(run, *flags, moepp=program)


def _stops(room: Room, number: int, folder: Path) -> None:
    run = folder / "run"
    said = ended(_start(room, run, [number]))
    require_one_line(said)
    told = rf"step {number + 1}: .*; the batch of step {number + 1} has 8 rows of text, documents "
    if not re.search(told, said.err):
        raise Lost(f"did not say which step and which documents: {said.err}")
    require_ended(ended(_start(room, run, [number], _SKIP)))
    _require_left_out(run, {number + 1: 1})


def _skips(room: Room, number: signal.Signals, folder: Path) -> None:
    lost = [3, 8, 9]
    whole, run = folder / "whole", folder / "run"
    require_ended(ended(_start(room, whole, lost, _SKIP)))
    process = _start(room, run, lost, _SKIP)
    wait(process, lambda: logged(run) >= 7)
    process.send_signal(number)
    ended(process)
    require_ended(ended(_start(room, run, lost, _SKIP)))
    room.require_whole(run, whole)
    _require_left_out(run, {4: 1, 9: 2, 10: 3})


def _require_left_out(run: Path, expected: dict[int, int]) -> None:
    """At these steps one update more was left out, and at no other."""
    counts = {row["step"]: row.get("skipped", 0) for row in read_metrics(run) if "loss" in row}
    before, found = 0, {}
    for step, count in sorted(counts.items()):
        if count != before:
            found[step] = before = count
    if found != expected:
        raise Lost(f"updates left out, by step: {found}, not {expected}")


def _too_many(room: Room, folder: Path) -> None:
    said = ended(_start(room, folder / "run", [8, 9, 10], _SKIP, "--config.train.max_skipped=2"))
    if said.status != 1 or "Traceback" in said.err:
        raise Lost(f"ended with status {said.status}: {said.err[-600:]}")
    if not re.search(r"^error: .*2 updates in a row were left out", said.err, re.MULTILINE):
        raise Lost(f"did not say how many were left out: {said.err}")
