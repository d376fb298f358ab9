"""What record batches of an Arrow file unpack to, by their buffers, before any is unpacked."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moepp_jax.data import opening
from moepp_jax.errors import ConfigError

# With which a file of Arrow's file format begins and ends.
FILE_FORMAT = b"ARROW1"

# Of Arrow's format: what a message's header is, and what Arrow 0.17 wrote where it was packed.
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_OLD_COMPRESSION = b"ARROW:experimental_compression"


def require_bounded(file: Path, source: Any, is_file: bool) -> None:
    """
    Args:
      source: the file, opened by Arrow, at its start.
      is_file: it is of Arrow's file format, not of the one of streams.

    Raises:
      ConfigError: a record batch, or what dictionaries are in memory together, would be too much.
      struct.error: its structure is damaged.
    """
    dictionaries: dict[int, int] = {}
    number = 0
    for message in _blocks(source) if is_file else _messages(source):
        table = _Table.root(memoryview(message.metadata).cast("B"))
        kind, header = table.number(1, "B"), table.table(2)
        if header is None or kind not in (_DICTIONARY_BATCH, _RECORD_BATCH):
            continue
        if kind == _RECORD_BATCH:
            size, what = _unpacked(message, header), f"record batch {number}"
            number += 1
        else:
            name, batch = header.number(0, "q"), header.table(1)
            size = _unpacked(message, batch) if batch else 0
            before = dictionaries.get(name, 0) if header.number(2, "B") else 0  # a delta
            dictionaries[name] = before + size
            size, what = sum(dictionaries.values()), "its dictionaries"
        if size > opening.AT_ONCE:
            raise ConfigError(
                f"{file}: {what} would unpack to {size:,} bytes, more than the "
                f"{opening.AT_ONCE:,} that are unpacked at once: write the file again in record "
                "batches of fewer rows, or uncompressed"
            )


def _unpacked(message: Any, batch: _Table) -> int:
    """Bytes that the packed buffers of a batch say they unpack to, which Arrow then allots."""
    packed = batch.table(3) is not None or _OLD_COMPRESSION in message.metadata.to_pybytes()
    if not packed or message.body is None:  # it is used where it lies
        return 0
    body, total = memoryview(message.body).cast("B"), 0
    for offset, length in batch.pairs(2):
        if length >= 8:
            total += max(0, *struct.unpack_from("<q", body[offset : offset + length]))
    return total


def _messages(source: Any) -> Iterator[Any]:
    """Of a stream, to where Arrow would stop."""
    import pyarrow as arrow

    reader = arrow.ipc.MessageReader.open_stream(source)
    with contextlib.suppress(StopIteration):
        while True:
            yield reader.read_next_message()


def _blocks(source: Any) -> Iterator[Any]:
    """Of a file, those which its end names, dictionaries first: Arrow looks at no others."""
    import pyarrow as arrow

    size = source.size()
    tail = source.read_at(len(FILE_FORMAT) + 4, size - len(FILE_FORMAT) - 4)
    (length,) = struct.unpack_from("<i", tail)
    footer = source.read_at(length, size - len(tail) - length)
    table = _Table.root(memoryview(footer))
    for offset, *_ in (*table.blocks(2), *table.blocks(3)):
        source.seek(offset)
        yield arrow.ipc.read_message(source)


class _Table(NamedTuple):
    """A table of FlatBuffers, in which Arrow writes what its messages hold.

    Raises:
      struct.error: something would lie outside the buffer.
    """

    buffer: memoryview
    at: int

    @classmethod
    def root(cls, buffer: memoryview) -> _Table:
        return cls(buffer, *struct.unpack_from("<I", buffer))

    def _place(self, field: int) -> int | None:
        """Where a field's value is; None if it has the default one."""
        (back,) = struct.unpack_from("<i", self.buffer, self.at)
        places = self.at - back
        if places < 0:
            raise struct.error("a table of it begins outside of it")
        (size,) = struct.unpack_from("<H", self.buffer, places)
        if 4 + 2 * field + 2 > size:
            return None
        (step,) = struct.unpack_from("<H", self.buffer, places + 4 + 2 * field)
        return self.at + step if step else None

    def number(self, field: int, kind: str) -> int:
        place = self._place(field)
        return 0 if place is None else struct.unpack_from(f"<{kind}", self.buffer, place)[0]

    def table(self, field: int) -> _Table | None:
        place = self._place(field)
        if place is None:
            return None
        return _Table(self.buffer, place + struct.unpack_from("<I", self.buffer, place)[0])

    def pairs(self, field: int) -> Iterator[tuple[int, int]]:
        """A vector of structures of two numbers of 64 bits."""
        return self._vector(field, "<qq")

    def blocks(self, field: int) -> Iterator[tuple[int, int, int]]:
        """A vector of where messages lie in a file: offset, bytes of metadata, bytes of body."""
        return self._vector(field, "<qi4xq")

    def _vector(self, field: int, kind: str) -> Iterator[tuple]:
        vector = self.table(field)
        if vector is None:
            return iter(())
        (length,) = struct.unpack_from("<I", self.buffer, vector.at)
        start, size = vector.at + 4, length * struct.calcsize(kind)
        if start + size > len(self.buffer):
            raise struct.error("a vector of it ends outside of it")
        return struct.iter_unpack(kind, self.buffer[start : start + size])
