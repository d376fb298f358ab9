"""Files of text, JSON, Parquet and Arrow as streams of texts: one is in memory at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple

from moepp_jax.data import arrow_files, json_records, opening, parquet
from moepp_jax.data.opening import (
    BYTE_ORDER_MARK,
    is_compressed,
    kind,
    lines,
    opened,
    too_long,
)
from moepp_jax.data.sources import paragraphs
from moepp_jax.errors import ConfigError


class Piece(NamedTuple):
    """A file, or a range of it.

    Attributes:
      start, stop: bytes of a JSON-lines file, a line being where it starts; row groups of a Parquet
        file; of other files always the whole.
      size: bytes of the file that this is, or about.
      cut: a text file is cut between paragraphs; else it is one text.
      split: of all its texts; None where their hashes are to choose.
    """

    file: Path
    name: str  # of the file in its corpus
    start: int
    stop: int
    size: int
    cut: bool = False
    split: str | None = None


class Text(NamedTuple):
    key: str  # of the text in its file
    text: str
    read: int  # bytes of the piece that were read up to here


def pieces(
    file: Path, name: str, target: int, cut: bool = False, split: str | None = None
) -> Iterator[Piece]:
    """The file in pieces of about `target` bytes, where it can be read from its middle."""
    size = file.stat().st_size
    units = parquet.row_groups(file) if kind(file) == "parquet" else size
    count = max(1, min(round(size / target), units)) if _has_a_middle(file, size, target) else 1
    bounds = [units * i // count for i in range(count + 1)]
    for start, stop in itertools.pairwise(bounds):
        yield Piece(file, name, start, stop, size // count, cut, split)


def _has_a_middle(file: Path, size: int, target: int) -> bool:
    match kind(file):
        case "parquet":
            return True
        case "json":
            return not is_compressed(file) and (size < target or not json_records.is_array(file))
        case _:
            return False


def texts(piece: Piece, field: str) -> Iterator[Text]:
    """The texts of a piece, without surrounding white space, empty ones too.

    Args:
      field: of a JSON record or a column: the text.

    Raises:
      ConfigError: a record is no text, or the file is damaged; the message names file and record.
    """
    match kind(piece.file):
        case "json":
            found = _json(piece, field)
        case "parquet":
            found = _rows(piece, parquet.rows(piece.file, field, piece.start, piece.stop))
        case "arrow":
            found = _rows(piece, arrow_files.rows(piece.file, field))
        case _:
            found = _cut(piece) if piece.cut else _whole(piece)
    for key, text, read in found:
        yield Text(key, text.strip(), min(read, piece.size))


# --- text -----------------------------------------------------------------------------------------


def _whole(piece: Piece) -> Iterator[Text]:
    with opened(piece.file) as (stream, _):
        content = stream.read(opening.LONGEST + 1)
    if len(content) > opening.LONGEST:
        raise too_long(f"{piece.file}, which is one document among others of its source,")
    yield Text("", _unmarked(_decoded(content, piece.file, 0)), piece.size)


def _cut(piece: Piece) -> Iterator[Text]:
    with opened(piece.file) as (stream, raw):
        found = paragraphs(_decoded_lines(stream, piece.file), opening.LONGEST)
        for i, text in enumerate(filter(str.strip, found)):
            yield Text(f"/{i}", text, raw.tell())


def _decoded_lines(stream: BufferedIOBase, file: Path) -> Iterator[str]:
    at = 0
    for line in lines(stream, lambda number: f"{file}, line {number + 1},"):
        text = _decoded(line, file, at)
        yield text if at else _unmarked(text)
        at += len(line)


def _decoded(content: bytes, file: Path | str, at: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not UTF-8: byte {at + error.start} is 0x{content[error.start]:02x} "
            f"({error.reason}); convert the file to UTF-8"
        ) from None


def _unmarked(text: str) -> str:
    return text.removeprefix(BYTE_ORDER_MARK.decode())


# --- JSON -----------------------------------------------------------------------------------------


def _json(piece: Piece, field: str) -> Iterator[Text]:
    if piece.start == 0 and json_records.is_array(piece.file):
        return _records(piece, field)
    return _json_lines(piece, field)


def _json_lines(piece: Piece, field: str) -> Iterator[Text]:
    prefix = f"@{piece.start}" if piece.start else ""

    def where(number: int) -> str:
        return f"{piece.file}, line {_lines_before(piece) + number + 1}"

    with opened(piece.file) as (stream, raw):
        at = _first_line(stream, piece)
        for number, line in enumerate(lines(stream, where)):
            if stream is raw and at >= piece.stop:
                return
            first, at = at == 0, at + len(line)
            if not line.strip():
                continue
            line = line.removeprefix(BYTE_ORDER_MARK) if first else line
            try:
                text = json_records.text_of(json_records.parsed(line), field)
            except ValueError as error:
                raise ConfigError(f"{where(number)}: {error}") from None
            read = at - piece.start if stream is raw else raw.tell()
            yield Text(f"{prefix}:{number + 1}", text, read)


def _first_line(stream: BufferedIOBase, piece: Piece) -> int:
    """Goes to where the first line of a piece begins.

    Raises:
      ConfigError: the line before is too long, whatever it is: its end may be a terabyte away.
    """
    if not piece.start:
        return 0
    stream.seek(piece.start - 1)  # the line that this byte is in belongs to the piece before
    rest = stream.readline(opening.LONGEST + 1)
    if len(rest) > opening.LONGEST:
        raise too_long(f"{piece.file}, the line that byte {piece.start - 1:,} is in,")
    return piece.start - 1 + len(rest)


def _lines_before(piece: Piece) -> int:
    with piece.file.open("rb") as file:
        left, count = piece.start, 0
        while left > 0:
            block = file.read(min(left, 2**20))
            left, count = left - len(block), count + block.count(b"\n")
    with piece.file.open("rb") as file:  # the line that was skipped at the start
        if piece.start:
            file.seek(piece.start - 1)
            count += file.read(1) != b"\n"
    return count


def _records(piece: Piece, field: str) -> Iterator[Text]:
    number = 1
    with opened(piece.file) as (stream, raw):
        try:
            for record in json_records.elements(stream):
                yield Text(f":{number}", json_records.text_of(record, field), raw.tell())
                number += 1
        except json_records.RecordError as error:
            raise ConfigError(f"{piece.file}, record {number}: {error}") from None


# --- tables ---------------------------------------------------------------------------------------


def _rows(piece: Piece, found: Iterator[tuple[int, float, memoryview]]) -> Iterator[Text]:
    for row, share, content in found:
        where = f"{piece.file}, row {row},"
        if len(content) > opening.LONGEST:
            raise too_long(where)
        yield Text(f":{row}", _decoded(bytes(content), where, 0), int(piece.size * share))
