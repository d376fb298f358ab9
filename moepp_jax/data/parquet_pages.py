"""What pages of a Parquet file unpack to, by their headers, before any of them is unpacked."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

from moepp_jax.data import columns, opening, thrift
from moepp_jax.errors import ConfigError

# Bytes of rows that are decoded together, about; a longer row is by itself.
_TOGETHER = 16 * 2**20

# Of Parquet's format: kinds of a page, and which field of its header tells more of that kind.
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_ABOUT = {_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}

# How often lengths come, by the encoding: of values; of what they share with the one before, too.
_LENGTHS = {6: 1, 7: 2}

_CODECS = {0: None, 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}


class Chunk(NamedTuple):
    """A column of a row group, by the file's end: where its first page is, and what all hold."""

    at: int
    values: int
    codec: int


class _Page(NamedTuple):
    """A page by its header.

    Attributes:
      at: where its bytes begin in the file.
      packed, unpacked: how many they are.
      about: the fields of its kind.
    """

    at: int
    packed: int
    unpacked: int
    kind: int
    about: thrift.Fields

    @property
    def values(self) -> int:
        return self.about.get((1, thrift.I32), 0)

    @property
    def size(self) -> int:
        """Bytes in memory; some encodings unpack to a length for each value before the first."""
        return max(self.packed, self.unpacked, 4 * self.values)


def rows_together(file: Path, field: str, number: int, chunks: list[Chunk], nulls: bool) -> int:
    """How many rows of a row group may be decoded at once; pages are unpacked as wholes, and what
    the file's end says of their sizes need not be so.

    Raises:
      ConfigError: one of its pages unpacks to too much.
      thrift.DamagedError: they cannot be told apart.
    """
    largest = {True: 0, False: 0}
    for chunk in chunks:
        for page in _pages(file, chunk):
            is_dictionary = page.kind == _DICTIONARY
            largest[is_dictionary] = max(largest[is_dictionary], page.size)
            if (size := sum(largest.values())) > opening.AT_ONCE:
                raise ConfigError(
                    f"{file}: in row group {number} a page of {field!r} with its dictionary "
                    f"unpacks to {size:,} bytes, more than the {opening.AT_ONCE:,} that are "
                    "unpacked at once: write the file again in row groups of fewer rows"
                )
            _check_lengths(file, page, chunk.codec, nulls)
    # A row is no longer than its page or the dictionary, however the page is encoded.
    return max(1, min(columns.ROWS, _TOGETHER // max(*largest.values(), 1)))


def chunks(file: Path, leaves: Collection[int]) -> Iterator[list[Chunk]]:
    """Of each row group these columns. pyarrow would end the process at some that are damaged."""
    with file.open("rb") as stream:
        stream.seek(-8, io.SEEK_END)
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(-8 - length, io.SEEK_END)
        footer = io.BytesIO(stream.read(length))
    for number, kind in thrift.read_fields(footer):
        if (number, kind) != (4, thrift.LIST):
            thrift.read_value(footer, kind)
            continue
        for of_item in thrift.read_items(footer):
            group = thrift.read_value(footer, of_item)
            of_columns = group.get((1, thrift.LIST), []) if isinstance(group, dict) else []
            yield [_chunk(column) for i, column in enumerate(of_columns) if i in leaves]


def _chunk(column: Any) -> Chunk:
    about = column.get((3, thrift.STRUCT)) if isinstance(column, dict) else None
    about = about or {}
    start, values, codec = (
        about.get(key) for key in ((9, thrift.I64), (5, thrift.I64), (4, thrift.I32))
    )
    if start is None or values is None or codec is None:
        raise thrift.DamagedError("a column has no place")
    dictionary = about.get((11, thrift.I64), 0)
    return Chunk(dictionary if 0 < dictionary < start else start, values, codec)


def _pages(file: Path, chunk: Chunk) -> Iterator[_Page]:
    """The pages that Arrow will read, in their order, by their headers."""
    at, values = chunk.at, 0
    with file.open("rb") as stream:
        while values < chunk.values:
            stream.seek(at)
            page = _page(stream)
            yield page
            at = page.at + page.packed
            values += 0 if page.kind == _DICTIONARY else page.values


def _page(stream: BufferedIOBase) -> _Page:
    """The page whose header begins here."""
    header = thrift.read_struct(stream)
    kind, unpacked, packed = (header.get((number, thrift.I32), -1) for number in (1, 2, 3))
    about = header.get((_ABOUT.get(kind, 0), thrift.STRUCT), {})
    page = _Page(stream.tell(), packed, unpacked, kind, about)
    if min(kind, unpacked, packed, page.values) < 0:
        raise thrift.DamagedError("the header of a page has no kind or sizes")
    return page


def _check_lengths(file: Path, page: _Page, codec: int, nulls: bool) -> None:
    """That a page has no more lengths than values: how many there are is said once more inside of
    it, and Arrow allots them all.

    Raises:
      thrift.DamagedError: it has more, or cannot be read.
    """
    import pyarrow as arrow

    is_second = page.kind == _DATA_V2
    times = _LENGTHS.get(page.about.get((4 if is_second else 2, thrift.I32)), 0)
    if page.kind == _DICTIONARY or not times:
        return
    with file.open("rb") as stream:
        stream.seek(page.at)
        content = stream.read(page.packed)
    levels = [page.about.get((field, thrift.I32), 0) if is_second else 0 for field in (5, 6)]
    if min(levels) < 0 or sum(levels) > min(len(content), page.unpacked):
        raise thrift.DamagedError("a page is cut off")
    content, size = content[sum(levels) :], page.unpacked - sum(levels)
    if codec not in _CODECS:
        raise thrift.DamagedError(f"pages of its encoding and of codec {codec} are not read")
    if _CODECS[codec] and size and not (is_second and (7, thrift.FALSE) in page.about):
        content = arrow.decompress(content, size, _CODECS[codec], asbytes=True)
    inside = io.BytesIO(content)
    if nulls and not is_second:
        inside.seek(int.from_bytes(inside.read(4), "little"), io.SEEK_CUR)
    for _ in range(times if inside.tell() < len(content) else 0):
        _skip_lengths(inside, page.values)


def _skip_lengths(stream: BufferedIOBase, most: int) -> None:
    """Numbers as Parquet's DELTA_BINARY_PACKED has them, at most so many."""
    block, parts, count, _ = (thrift.read_varint(stream) for _ in range(4))
    if count > most:
        raise thrift.DamagedError(f"a page of {most:,} values has {count:,} lengths")
    of_part = block // parts if parts else 0
    if not of_part:
        raise thrift.DamagedError("a page has blocks of no lengths")
    left = count - 1
    while left > 0:
        thrift.read_varint(stream)
        widths = stream.read(parts)
        if len(widths) < parts:
            raise thrift.DamagedError("a page is cut off")
        for width in widths[: -(-left // of_part)]:
            stream.seek(of_part * width // 8, io.SEEK_CUR)
            left -= of_part
