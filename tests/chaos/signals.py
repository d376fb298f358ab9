"""Signals at any moment of a run: it goes on and ends with the same bits, each step logged once."""

from __future__ import annotations

import functools
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from moepp_jax.checkpoint import CheckpointError
from tests.chaos.recipe import EVAL_EVERY, SAVE_EVERY, STEPS
from tests.chaos.room import Room, Said, ended
from tests.chaos.trial import Lost, Missed, Trial, dice

_SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}

Moment = Callable[[Room, subprocess.Popen, Path, random.Random], None]


def trials(room: Room, kills: int, seed: int) -> Iterator[Trial]:
    for number in range(kills):
        where = [*MOMENTS][number % len(MOMENTS)]
        chance = dice(seed, "SIGKILL", number)
        fault = functools.partial(_killed, room, MOMENTS[where], chance)
        yield Trial(f"SIGKILL {where}", str(number), fault)
    for asked in (signal.SIGTERM, signal.SIGINT):
        for second in range(10):
            fault = functools.partial(_asked, room, asked, float(second))
            yield Trial(f"{asked.name} in each second", f"after {second} s", fault)
        for number in range(kills // 2):
            chance = dice(seed, asked.name, number)
            fault = functools.partial(_asked, room, asked, chance)
            yield Trial(f"{asked.name} at random", str(number), fault)


def _killed(room: Room, moment: Moment, chance: random.Random, folder: Path) -> None:
    run = folder / "run"
    process = room.start(run)
    try:
        moment(room, process, run, chance)
    finally:
        process.kill()
    ended(process)
    room.require_resumed(run)


def _asked(room: Room, number: signal.Signals, when: float | random.Random, folder: Path) -> None:
    run = folder / "run"
    process = room.start(run)
    wait(process, lambda: _hears(process))
    time.sleep(when if isinstance(when, float) else when.uniform(0, room.seconds[1]))
    process.send_signal(number)
    said = ended(process)
    if said.status == 0 or (said.status == -number and _is_over(room, run)):
        raise Missed("the run had ended")
    _require_polite(said, number)
    room.require_resumed(run)


def _is_over(room: Room, run: Path) -> bool:
    """Whether all was done, and Python was about to end the process, without its handlers."""
    try:
        room.require_whole(run)
    except (Lost, CheckpointError):
        return False
    return True


def _require_polite(said: Said, number: signal.Signals) -> None:
    if said.status != 128 + number:
        raise Lost(f"ended with status {said.status}, not {128 + number}: {said.err[-600:]}")
    if not re.search(r"stops after this step", said.err):
        if said.err != f"\n{_SAID[number]}\n":
            raise Lost(f"said something else than {_SAID[number]!r}: {said.err!r}")
        return
    if len(said.err.strip().splitlines()) != 1:
        raise Lost(f"said more than one line: {said.err!r}")
    if not re.search(rf"^{number.name}: stopped and saved at step \d+; the same", said.out, re.M):
        raise Lost(f"did not say where it stopped: {said.out[-300:]!r}")


def _hears(process: subprocess.Popen) -> bool:
    """Whether the process catches SIGTERM, which Python by itself does not."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except FileNotFoundError:
        return False
    caught = re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)
    return bool(caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def wait(process: subprocess.Popen, until: Callable[[], bool]) -> None:
    while not until():
        if process.poll() is not None:
            raise Missed("the run had ended")
        time.sleep(0.001)


def _at_start(room: Room, process: subprocess.Popen, run: Path, chance: random.Random) -> None:
    time.sleep(chance.uniform(0, room.seconds[0]))


def _in_steps(room: Room, process: subprocess.Popen, run: Path, chance: random.Random) -> None:
    step = chance.randrange(1, STEPS)
    wait(process, lambda: logged(run) >= step)


def _in_save(room: Room, process: subprocess.Popen, run: Path, chance: random.Random) -> None:
    step, delay = chance.randrange(SAVE_EVERY, STEPS + 1, SAVE_EVERY), chance.uniform(0, 0.15)
    half = run / "checkpoints" / f"{step}.orbax-checkpoint-tmp"
    wait(process, half.exists)
    time.sleep(delay)


def _in_evaluation(room: Room, process: subprocess.Popen, run: Path, chance: random.Random) -> None:
    step, delay = chance.randrange(EVAL_EVERY, STEPS + 1, EVAL_EVERY), chance.uniform(0, 0.03)
    wait(process, lambda: logged(run) >= step)  # that is done before the step is evaluated
    time.sleep(delay)


def logged(run: Path) -> int:
    """Steps that the run has logged."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b'"grad_norm":') if file.exists() else 0


MOMENTS: dict[str, Moment] = {
    "at start": _at_start,
    "in steps": _in_steps,
    "in a save": _in_save,
    "in an evaluation": _in_evaluation,
}
