"""Who works on what, among processes that share a disk: locks that end with their process.

They are POSIX record locks, which Linux keeps over NFS too; what dies, killed or with its machine,
holds none. Whoever holds one is written in the file for others to read.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path


class TakenError(Exception):
    """Another process has it; the message says which, and since when.

    Attributes:
      holder: of the lock, in words.
    """

    def __init__(self, file: os.PathLike, holder: str):
        super().__init__(f"{file}: {holder} has it")
        self.holder = holder


@contextlib.contextmanager
def claimed(file: Path, leave: bool = True) -> Iterator[None]:
    """Holds a lock while the context lasts.

    Args:
      leave: the file stays; else it goes with the lock.

    Raises:
      TakenError: another process does.
    """
    with _opened(file) as held:
        if not _lock(held):
            raise TakenError(file, _read(held) or "another process")
        if not _is_at(held, file):  # who had it took it away in between
            with claimed(file, leave):
                yield
            return
        host, now = socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(held, 0)
        os.pwrite(held, f"process {os.getpid()} of {host}, since {now}\n".encode(), 0)
        try:
            yield
        finally:
            if not leave:
                file.unlink(missing_ok=True)


def is_taken(file: Path) -> bool:
    """Whether another process holds the lock now."""
    if not file.exists():
        return False
    with _opened(file) as held:
        return not _lock(held)


@contextlib.contextmanager
def waiting_for(file: Path) -> Iterator[None]:
    """Holds a lock, which others have for moments, when it is free."""
    with _opened(file) as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[int]:
    file.parent.mkdir(parents=True, exist_ok=True)
    opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield opened
    finally:
        os.close(opened)  # and with it goes the lock


def _lock(opened: int) -> bool:
    """Whether it is ours now."""
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of them is the system's choice
        return False
    return True


def _is_at(opened: int, file: Path) -> bool:
    """Whether what is open is the file of this name."""
    try:
        return os.path.samestat(os.fstat(opened), os.stat(file))
    except FileNotFoundError:
        return False


def _read(opened: int) -> str:
    return os.pread(opened, 200, 0).decode(errors="replace").strip()
