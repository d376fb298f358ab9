"""A command on a terminal of its own, and what it holds while its progress bar moves."""

from __future__ import annotations

import collections
import contextlib
import os
import pty
import re
import subprocess
import termios
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import psutil

_SHOWN = re.compile(rb"(\d+)/(\d+)\b")  # 120/10000: of rich's bars and of tqdm's


class Sample(NamedTuple):
    """What a command and its children hold together.

    Attributes:
      done: the share of the job.
      memory: MB (10^6 bytes) that are resident, counted once for each process.
    """

    done: float
    memory: float
    handles: int
    threads: int


class Ended(Exception):  # noqa: N818 (it says what became of the command)
    """The command ended with another status than 0; the message has its last words."""


def watch(command: Sequence[str], least: int, every: float) -> Iterator[Sample]:
    """Samples of the command until it ends, from the first move of its bar on.

    Args:
      least: bars of fewer units are not the job's.
      every: seconds between two samples.

    Raises:
      Ended: it failed.
    """
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 120))  # tqdm draws no bar where there is no room for one
    environment = os.environ | {"TERM": "xterm", "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        said = _Said(ours, least)
        try:
            while _still_runs(process, every):
                if said.done is not None and (sample := _sample(process.pid, said.done)):
                    yield sample
        finally:
            process.kill()
            said.end()
    if process.returncode != 0:
        raise Ended(f"{' '.join(command)} ended with {process.returncode}: {said.last_words()}")


def _still_runs(process: subprocess.Popen, seconds: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is None


def _sample(number: int, done: float) -> Sample | None:
    """None once the process has ended."""
    try:
        command = psutil.Process(number)
        all_of = [command, *command.children(recursive=True)]
        memory = sum(one.memory_info().rss for one in all_of) / 1e6
        handles = sum(one.num_fds() for one in all_of)
        return Sample(done, memory, handles, sum(one.num_threads() for one in all_of))
    except psutil.NoSuchProcess:
        return None


class _Said:
    """Reads a terminal.

    Attributes:
      done: the share of the job by its bar; None before it has moved.
    """

    def __init__(self, terminal: int, least: int):
        self.done: float | None = None
        self._terminal, self._least = terminal, least
        self._tail = collections.deque[bytes](maxlen=20)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        # A terminal whose other end is closed is an error to read, on Linux.
        with contextlib.suppress(OSError):
            while text := os.read(self._terminal, 1 << 16):
                self._tail.append(text)
                shown = (map(int, pair) for pair in _SHOWN.findall(text))
                for count, total in shown:
                    if total >= self._least and 0 < count <= total:
                        self.done = count / total

    def end(self) -> None:
        self._reader.join()
        os.close(self._terminal)

    def last_words(self) -> str:
        return b"".join(self._tail).decode(errors="replace")[-600:].strip()
