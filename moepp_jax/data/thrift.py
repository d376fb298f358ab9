"""Thrift's compact protocol, in which the headers of Parquet are written, read with bounds.

pyarrow, which has a reader of its own, ends the process at some headers that are damaged.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any

# Kinds of a value.
TRUE, FALSE, I8, I16, I32, I64, DOUBLE, BINARY, LIST, SET = range(1, 11)
STRUCT = 12

# By number and kind: a reader leaves out what is of another kind than it knows.
Fields = dict[tuple[int, int], Any]

_DEEPEST = 16


class DamagedError(Exception):
    """What is read is no such structure; the message says why."""


def read_struct(stream: BufferedIOBase, depth: int = 0) -> Fields:
    """
    Raises:
      DamagedError: no structure begins here; so does every function of this room.
    """
    return {(n, kind): read_value(stream, kind, depth + 1) for n, kind in read_fields(stream)}


def read_fields(stream: BufferedIOBase) -> Iterator[tuple[int, int]]:
    """Number and kind of each field; its value is to be read before the next."""
    number, seen = 0, set()
    while head := _byte(stream):
        kind, step = head & 15, head >> 4
        number = number + step if step else _signed(read_varint(stream))
        if number in seen:
            raise DamagedError("its structure has a field twice")
        seen.add(number)
        yield number, kind


def read_value(stream: BufferedIOBase, kind: int, depth: int = 0) -> Any:
    """None of what is not needed here."""
    if depth > _DEEPEST:
        raise DamagedError("its structure is nested too deep")
    if kind in (TRUE, FALSE):
        return kind == TRUE
    if kind == I8:
        return _byte(stream)
    if kind in (I16, I32, I64):
        value = _signed(read_varint(stream))
        if not -(2**63) <= value < 2**63 or (kind == I32 and not -(2**31) <= value < 2**31):
            raise DamagedError("a number of its structure is out of range")
        return value
    if kind == DOUBLE:
        stream.seek(8, io.SEEK_CUR)
        return None
    if kind == BINARY:
        stream.seek(min(read_varint(stream), 2**31), io.SEEK_CUR)
        return None
    if kind in (LIST, SET):
        return [read_value(stream, of_item, depth + 1) for of_item in read_items(stream)]
    if kind == STRUCT:
        return read_struct(stream, depth)
    raise DamagedError("its structure has a field that Parquet does not have")


def read_items(stream: BufferedIOBase) -> Iterator[int]:
    """The kind of each item of a list; it is to be read before the next."""
    head = _byte(stream)
    size = head >> 4
    kind = head & 15
    for _ in range(read_varint(stream) if size == 15 else size):
        yield I8 if kind in (TRUE, FALSE) else kind


def _byte(stream: BufferedIOBase) -> int:
    read = stream.read(1)
    if not read:
        raise DamagedError("its structure is cut off")
    return read[0]


def read_varint(stream: BufferedIOBase) -> int:
    """A number of as many bytes as it needs."""
    value = 0
    for shift in range(0, 70, 7):
        byte = _byte(stream)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise DamagedError("a number of its structure has no end")


def _signed(value: int) -> int:
    return (value >> 1) ^ -(value & 1)
