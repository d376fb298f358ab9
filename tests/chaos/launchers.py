"""The environments of launchers: who runs alone trains, who joins says for whom it waits."""

from __future__ import annotations

import functools
import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moepp_jax import distributed
from tests.chaos.room import Room, Said, ended, require_ended, require_one_line
from tests.chaos.trial import Lost, Trial
from tests.environments import ALONE, LAUNCHERS

# Seconds from its start in which a process has said for whom it waits: imports, and its patience.
_SOON = distributed.PATIENCE + 40


def trials(room: Room, kills: int, seed: int) -> Iterator[Trial]:
    for name, (environ, expected) in LAUNCHERS.items():
        fault = functools.partial(_started, room, environ, expected)
        yield Trial("environment of a launcher", name, fault)


def _started(
    room: Room, environ: Mapping[str, str], expected: Mapping[str, Any] | str | None, folder: Path
) -> None:
    run = folder / "run"
    process = room.start(run, environ=environ)
    if expected is ALONE:
        require_ended(ended(process))
        room.require_whole(run)
        return
    if isinstance(expected, str):
        said = ended(process)
        if expected not in said.err:
            raise Lost(f"did not say {expected!r}: {said.err[-300:]}")
        require_one_line(said)
    else:
        _require_waits_or_told(process)
    if run.exists():
        raise Lost("began a run without the others")


def _require_waits_or_told(process: subprocess.Popen) -> None:
    """It says for whom it waits, and ends when it is asked to; or why it cannot join them."""
    late = threading.Timer(_SOON, process.kill)
    late.start()
    first = process.stderr.readline()
    late.cancel()
    waits = re.match("waiting at .* for .* of this run.* takes --distributed=off$", first)
    if waits:
        process.send_signal(signal.SIGTERM)
    said = ended(process, seconds=30)
    if not waits:
        require_one_line(Said(said.status, said.out, first + said.err))
    elif (said.status, said.err) != (143, "\nterminated\n"):
        raise Lost(f"was asked to end, and did with {said.status}: {said.err[-300:]}")
