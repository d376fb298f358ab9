"""Who works in a folder whose storage knows no locks: a note there, which its writer renews.

Who finds a note waits to see whether it is renewed, and is refused; or whether it is not for `DEAD`
seconds, and takes its place. No clocks are compared, and hosts' need not agree. Two that come at
once both write; the one whose note is still there `SETTLED` seconds later has it. Where all this
failed (a host that was cut off for a minute has come back), who finds another's note in the place
of its own ends, or none: the other may have done its work.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from moepp_jax import ending, regular
from moepp_jax.claim import TakenError
from moepp_jax.storage import AnyPath, in_store, write_atomic

# Seconds: between two renewals; without one, after which a holder is dead; from a note's writing to
# the look at whether it is still there.
RENEWED, DEAD, SETTLED = 10.0, 45.0, 2.0


@contextlib.contextmanager
def held(
    file: AnyPath,
    report: Callable[[str], Any],
    end: Callable[[str, int], Any] = ending.at_once,
) -> Iterator[None]:
    """Holds a lease while the context lasts.

    Args:
      report: told that there is a note of somebody who may be dead.
      end: called with a message and a status, from a thread, when another has taken the lease.

    Raises:
      TakenError: another process has it.
      OSError: the file cannot be written.
    """
    _require_free(file, report)
    note = _Note(file)
    time.sleep(SETTLED)
    there = _read(file)
    if there.get("name") != note.name:
        raise TakenError(file, _holder(there))
    over = threading.Event()
    renewing = threading.Thread(target=_renew, args=(note, over, end), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        over.set()
        renewing.join()
        with contextlib.suppress(Exception):  # of a store; what is left is a dead one's note
            if _read(file).get("name") == note.name:
                file.unlink()


class _Note:
    """Ours, written when it is made.

    Attributes:
      name: that no other has.
    """

    def __init__(self, file: AnyPath):
        self.file, self.name = file, uuid.uuid4().hex
        self._since, self._renewals = time.strftime("%Y-%m-%d %H:%M:%S"), 0
        self.write()

    def write(self) -> None:
        fields = {"name": self.name, **_here(), "process": os.getpid()}
        fields |= {"since": self._since, "renewals": self._renewals}
        write_atomic(self.file, json.dumps(fields) + "\n")
        self._renewals += 1


def _require_free(file: AnyPath, report: Callable[[str], Any]) -> None:
    found = _read(file)
    if not found or _is_dead_here(found):
        return
    report(f"{_holder(found)}, was at work here: waiting up to {DEAD:g} s to see whether it lives")
    deadline = time.monotonic() + DEAD
    while time.monotonic() < deadline:
        time.sleep(RENEWED / 10)
        now = _read(file)
        if now and now != found:
            raise TakenError(file, _holder(now))


def _here() -> dict[str, str]:
    """Among which processes a number is one process's: containers of a host may share its name."""
    try:
        return {"host": socket.gethostname(), "processes": os.readlink("/proc/self/ns/pid")}
    except OSError:
        return {"host": socket.gethostname()}


def _is_dead_here(note: dict[str, Any]) -> bool:
    """Whether it is of a process that would be seen from here, and is there no more."""
    process, here = note.get("process"), _here()
    if len(here) < 2 or not here.items() <= note.items() or not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return process == os.getpid()


def _renew(note: _Note, over: threading.Event, end: Callable[[str, int], Any]) -> None:
    while not over.wait(RENEWED):
        with contextlib.suppress(Exception):  # a store that fails for a moment
            there = _read(note.file)
            if there.get("name") != note.name:
                why = (
                    f"{_holder(there)}, has taken this over, as it heard nothing of us for "
                    f"{DEAD:g} s"
                    if there
                    else "our note is gone: another process took this over and has ended, or "
                    "somebody removed it"
                )
                end(f"error: {note.file}: {why}: this run ends here\n", 1)
                return
            note.write()


def _read(file: AnyPath) -> dict[str, Any]:
    """The note that is there; empty if there is none, or nothing that is one."""
    try:
        with in_store(file):
            content = regular.read_bytes(file)
        found = regular.parsed(content)
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _holder(note: dict[str, Any]) -> str:
    if not note:
        return "another process, which has ended since"
    return f"process {note.get('process')} of {note.get('host')}, since {note.get('since')}"
