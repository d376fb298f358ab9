"""What every prepared thing shares: a name that covers its content, and an all-or-nothing write."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moepp_jax.errors import ConfigError

DONE = "done"  # in a folder that is being made: what of it is there


class DataError(ConfigError):
    """Prepared data that is not as it was written; the message names file, record and remedy."""


def fingerprint(*parts: Any) -> str:
    """Short hash of JSON-able values: part of the name of whatever was made from them."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(target: Path, make: Callable[[Path], None]) -> None:
    """Lets `make` write a file or folder at a temporary path, then renames it to `target`.

    The rename is atomic, so whatever has the name `target` is whole, even if a process is killed
    half-way (it leaves a hidden folder `.making-*`). Of two processes that make the same thing at
    once one copy stays: the names cover the content, so both are equal.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as temporary:
        made = Path(temporary) / target.name
        make(made)
        try:
            os.replace(made, target)
        except OSError:
            if not target.exists():
                raise


def publish_in_parts(target: Path, make: Callable[[Path], None]) -> None:
    """Like `publish`, but `make` finds again what it had made when it was stopped.

    It works in `NAME.partial` beside the target, where its folder `DONE` is for what it needs to go
    on only. A second process that makes the same waits for the first.

    Raises:
      ConfigError: the disk is full.
    """
    partial = target.with_name(f"{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some shared file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return
        partial.mkdir(exist_ok=True)
        for leftover in partial.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        with naming_a_full_disk(target.parent):
            make(partial)
        try:
            os.replace(partial, target)
        except OSError:
            if not target.exists():
                raise
        discard(target / DONE)
    finally:
        os.close(lock)
        if not any(path.is_file() for path in partial.rglob("*")):
            discard(partial)


def discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def naming_a_full_disk(folder: Path) -> Iterator[None]:
    """A full disk as a ConfigError that says what to do; ArrayRecord and Arrow raise their own."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        full = os.strerror(errno.ENOSPC) in str(error) or os.strerror(errno.EDQUOT) in str(error)
        if not full:
            raise
        raise ConfigError(
            f"{folder} is full: {os.strerror(errno.ENOSPC)}. What is done is kept: free some space "
            "and give the same command again (data prepare --dry_run says how much is needed)"
        ) from error
