"""Files that may come from anywhere: regular ones of a bounded size are read, and nothing else.

A FIFO would be waited for, a device may never end, and a file of JSON takes some twenty times its
size in memory. Links are followed, wherever they lead: a cache of Hugging Face is made of them.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Bytes that are read of what describes something: configurations, indices, sums.
SMALL = 32 * 2**20

# Of a tokenizer, and of all that a run has measured.
LARGE = 128 * 2**20
LARGEST = 2**30


class IrregularError(OSError):
    """A file that is not read; `strerror` says why, in words that follow on its name."""

    def __init__(self, file: Any, why: str):
        super().__init__(errno.EINVAL, why, os.fspath(file))

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def kind(mode: int) -> str:
    """What a file is called, of its mode (`stat`)."""
    if stat.S_ISREG(mode):
        return "a regular file"
    if stat.S_ISDIR(mode):
        return "a folder"
    is_device = stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
    return "a FIFO" if stat.S_ISFIFO(mode) else "a device" if is_device else "a socket"


def require(file: Any, most: int | None = None) -> None:
    """Looks at a file before it is opened: a path of `storage.AnyPath`.

    Raises:
      IrregularError: it is no regular file, or larger than `most` bytes.
      OSError: it is not there.
    """
    status = file.stat()
    if isinstance(file, Path):
        if not stat.S_ISREG(status.st_mode):
            raise IrregularError(file, f"it is {kind(status.st_mode)}, no regular file")
        size = status.st_size
    else:
        size = status.length
    if most is not None and size > most:
        raise _too_large(file, most)


def _too_large(file: Any, most: int) -> IrregularError:
    return IrregularError(file, f"it is larger than the {most:,} bytes that such a file may have")


def read_bytes(file: Any, most: int = SMALL) -> bytes:
    """
    Raises:
      IrregularError, OSError: as `require`.
    """
    require(file, most)
    if not isinstance(file, Path):
        return file.read_bytes()
    with file.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:  # some files of the system say that they have 0 bytes
        raise _too_large(file, most)
    return content


def read_text(file: Any, most: int = SMALL) -> str:
    """
    Raises:
      IrregularError, OSError: as `require`.
      ValueError: it is no UTF-8.
    """
    return _text(read_bytes(file, most))


def read_json(file: Any, most: int = SMALL, pairs: Callable | None = None) -> Any:
    """
    Args:
      pairs: `object_pairs_hook` of `json.loads`.

    Raises:
      IrregularError, OSError: as `require`.
      ValueError: it is no JSON, or nested too deep.
    """
    return parsed(read_bytes(file, most), pairs)


def parsed(content: bytes | str, pairs: Callable | None = None) -> Any:
    """
    Raises:
      ValueError: it is no JSON, or nested too deep.
    """
    text = content if isinstance(content, str) else _text(content)
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("its values are nested too deep to be read") from None


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 (byte {error.start})") from None


def why(error: Exception) -> str:
    """Of what these functions raise: the reason, without the file's name."""
    return getattr(error, "strerror", None) or str(error)
