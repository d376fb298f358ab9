"""A column of text of Parquet files, some rows at a time; pyarrow is imported when it is needed."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Collection, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

from moepp_jax.data import columns, opening
from moepp_jax.errors import ConfigError

# Bytes that are read ahead of the page that is being unpacked: not the column of a whole row group.
_AHEAD = 2**20

# Bytes of rows that are decoded together, about; a longer row is by itself.
_TOGETHER = 16 * 2**20

# Of Parquet's format: kinds of a page, and which field of its header tells more of that kind.
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_ABOUT = {_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}


def row_groups(file: Path) -> int:
    with _opened(file) as table:
        return table.num_row_groups


def rows(file: Path, field: str, start: int, stop: int) -> Iterator[tuple[int, float, memoryview]]:
    """Of each row in these row groups: its number in the file, the share of the rows that have been
    read with it, its text.

    Raises:
      ConfigError: the file is damaged, has no such column of text, or has a page of it that unpacks
        to more than `opening.AT_ONCE`.
    """
    with _opened(file) as table:
        columns.check(file, table.schema_arrow, field)
        leaves = [table.schema.column(i) for i in range(table.metadata.num_columns)]
        wanted = {i for i, leaf in enumerate(leaves) if leaf.path == field}
        nulls = any(leaves[i].max_definition_level for i in wanted)
        counts = [table.metadata.row_group(i).num_rows for i in range(stop)]
        row, done, total = sum(counts[:start]), 0, sum(counts[start:])
        groups = enumerate(itertools.islice(_chunks(file, wanted), start, stop), start)
        for number, chunks in groups:
            count = _rows_together(file, field, number, chunks, nulls)
            for batch in table.iter_batches(count, [number], [field], use_threads=False):
                for text in columns.as_bytes(batch.column(0)):
                    done += 1
                    yield row, done / total, text
                    row += 1


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    import pyarrow as arrow
    import pyarrow.parquet as arrow_parquet

    # Text is not asked for as a dictionary: Arrow's would grow with every page that has none.
    options = {"pre_buffer": False, "buffer_size": _AHEAD, "page_checksum_verification": True}
    try:
        with arrow_parquet.ParquetFile(file, **options) as table:
            yield table
    # Names may be no UTF-8.
    except (OSError, UnicodeDecodeError, arrow.ArrowException, _DamagedError) as error:
        said = str(error).strip().split("\n")[0]
        raise ConfigError(f"{file} is no Parquet file, or is damaged: {said}") from None


class _DamagedError(Exception):
    """A page that is none; the message says why."""


# --- pages ----------------------------------------------------------------------------------------


class _Chunk(NamedTuple):
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
    about: _Fields

    @property
    def values(self) -> int:
        return self.about.get((1, _I32), 0)

    @property
    def size(self) -> int:
        """Bytes in memory; some encodings unpack to a length for each value before the first."""
        return max(self.packed, self.unpacked, 4 * self.values)


def _rows_together(file: Path, field: str, number: int, chunks: list[_Chunk], nulls: bool) -> int:
    """How many rows of a row group may be decoded at once; pages are unpacked as wholes, and what
    the file's end says of their sizes need not be so.

    Raises:
      ConfigError: one of its pages unpacks to too much.
      _DamagedError: they cannot be told apart.
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


def _chunks(file: Path, leaves: Collection[int]) -> Iterator[list[_Chunk]]:
    """Of each row group these columns. pyarrow would end the process at some that are damaged."""
    with file.open("rb") as stream:
        stream.seek(-8, io.SEEK_END)
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(-8 - length, io.SEEK_END)
        footer = io.BytesIO(stream.read(length))
    for number, kind in _fields(footer):
        if (number, kind) != (4, _LIST):
            _value(footer, kind)
            continue
        for of_item in _items(footer):
            group = _value(footer, of_item)
            of_columns = group.get((1, _LIST), []) if isinstance(group, dict) else []
            yield [_chunk(column) for i, column in enumerate(of_columns) if i in leaves]


def _chunk(column: Any) -> _Chunk:
    about = column.get((3, _STRUCT)) if isinstance(column, dict) else None
    about = about or {}
    start, values, codec = (about.get(key) for key in ((9, _I64), (5, _I64), (4, _I32)))
    if start is None or values is None or codec is None:
        raise _DamagedError("a column has no place")
    dictionary = about.get((11, _I64), 0)
    return _Chunk(dictionary if 0 < dictionary < start else start, values, codec)


def _pages(file: Path, chunk: _Chunk) -> Iterator[_Page]:
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
    header = _struct(stream)
    kind, unpacked, packed = (header.get((number, _I32), -1) for number in (1, 2, 3))
    about = header.get((_ABOUT.get(kind, 0), _STRUCT), {})
    page = _Page(stream.tell(), packed, unpacked, kind, about)
    if min(kind, unpacked, packed, page.values) < 0:
        raise _DamagedError("the header of a page has no kind or sizes")
    return page


# --- encodings that begin with the length of each value -------------------------------------------

# How often lengths come, by the encoding: of values; of what they share with the one before, too.
_LENGTHS = {6: 1, 7: 2}

_CODECS = {0: None, 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}


def _check_lengths(file: Path, page: _Page, codec: int, nulls: bool) -> None:
    """That a page has no more lengths than values: how many there are is said once more inside of
    it, and Arrow allots them all.

    Raises:
      _DamagedError: it has more, or cannot be read.
    """
    import pyarrow as arrow

    is_second = page.kind == _DATA_V2
    times = _LENGTHS.get(page.about.get((4 if is_second else 2, _I32)), 0)
    if page.kind == _DICTIONARY or not times:
        return
    with file.open("rb") as stream:
        stream.seek(page.at)
        content = stream.read(page.packed)
    levels = [page.about.get((field, _I32), 0) if is_second else 0 for field in (5, 6)]
    if min(levels) < 0 or sum(levels) > min(len(content), page.unpacked):
        raise _DamagedError("a page is cut off")
    content, size = content[sum(levels) :], page.unpacked - sum(levels)
    if codec not in _CODECS:
        raise _DamagedError(f"pages of its encoding and of codec {codec} are not read")
    if _CODECS[codec] and size and not (is_second and (7, _FALSE) in page.about):
        content = arrow.decompress(content, size, _CODECS[codec], asbytes=True)
    inside = io.BytesIO(content)
    if nulls and not is_second:
        inside.seek(int.from_bytes(inside.read(4), "little"), io.SEEK_CUR)
    for _ in range(times if inside.tell() < len(content) else 0):
        _skip_lengths(inside, page.values)


def _skip_lengths(stream: BufferedIOBase, most: int) -> None:
    """Numbers as Parquet's DELTA_BINARY_PACKED has them, at most so many."""
    block, parts, count, _ = (_varint(stream) for _ in range(4))
    if count > most:
        raise _DamagedError(f"a page of {most:,} values has {count:,} lengths")
    of_part = block // parts if parts else 0
    if not of_part:
        raise _DamagedError("a page has blocks of no lengths")
    left = count - 1
    while left > 0:
        _varint(stream)
        widths = stream.read(parts)
        if len(widths) < parts:
            raise _DamagedError("a page is cut off")
        for width in widths[: -(-left // of_part)]:
            stream.seek(of_part * width // 8, io.SEEK_CUR)
            left -= of_part


# --- Thrift's compact protocol, in which headers and a file's end are written ---------------------

_TRUE, _FALSE, _I8, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET = range(1, 11)
_STRUCT = 12

# By number and kind: a reader leaves out what is of another kind than it knows.
_Fields = dict[tuple[int, int], Any]

_DEEPEST = 16


def _struct(stream: BufferedIOBase, depth: int = 0) -> _Fields:
    return {(n, kind): _value(stream, kind, depth + 1) for n, kind in _fields(stream)}


def _fields(stream: BufferedIOBase) -> Iterator[tuple[int, int]]:
    """Number and kind of each field; its value is to be read before the next."""
    number, seen = 0, set()
    while head := _byte(stream):
        kind, step = head & 15, head >> 4
        number = number + step if step else _signed(_varint(stream))
        if number in seen:
            raise _DamagedError("its structure has a field twice")
        seen.add(number)
        yield number, kind


def _value(stream: BufferedIOBase, kind: int, depth: int = 0) -> Any:
    """None of what is not needed here."""
    if depth > _DEEPEST:
        raise _DamagedError("its structure is nested too deep")
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE
    if kind == _I8:
        return _byte(stream)
    if kind in (_I16, _I32, _I64):
        value = _signed(_varint(stream))
        if not -(2**63) <= value < 2**63 or (kind == _I32 and not -(2**31) <= value < 2**31):
            raise _DamagedError("a number of its structure is out of range")
        return value
    if kind == _DOUBLE:
        stream.seek(8, io.SEEK_CUR)
        return None
    if kind == _BINARY:
        stream.seek(min(_varint(stream), 2**31), io.SEEK_CUR)
        return None
    if kind in (_LIST, _SET):
        return [_value(stream, of_item, depth + 1) for of_item in _items(stream)]
    if kind == _STRUCT:
        return _struct(stream, depth)
    raise _DamagedError("its structure has a field that Parquet does not have")


def _items(stream: BufferedIOBase) -> Iterator[int]:
    """The kind of each item of a list; it is to be read before the next."""
    head = _byte(stream)
    size = head >> 4
    kind = head & 15
    for _ in range(_varint(stream) if size == 15 else size):
        yield _I8 if kind in (_TRUE, _FALSE) else kind


def _byte(stream: BufferedIOBase) -> int:
    read = stream.read(1)
    if not read:
        raise _DamagedError("its structure is cut off")
    return read[0]


def _varint(stream: BufferedIOBase) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = _byte(stream)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise _DamagedError("a number of its structure has no end")


def _signed(value: int) -> int:
    return (value >> 1) ^ -(value & 1)
