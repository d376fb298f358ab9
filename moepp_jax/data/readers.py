"""Files of text, JSON lines and Parquet as streams of texts: one is in memory at a time."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from moepp_jax.data import parquet
from moepp_jax.data.sources import paragraphs
from moepp_jax.errors import ConfigError

COMPRESSED = (".gz", ".zst")
_JSON = (".jsonl", ".json", ".ndjson")


class Piece(NamedTuple):
    """A file, or a range of it.

    Attributes:
      start, stop: bytes of a JSON-lines file, a line being where it starts; row groups of a Parquet
        file; of other files always the whole.
      size: bytes of the file that this is, or about.
    """

    file: Path
    name: str  # of the file in its corpus
    start: int
    stop: int
    size: int


class Text(NamedTuple):
    key: str  # of the text in its file
    text: str
    read: int  # bytes of the piece that were read up to here


def kind(file: Path) -> str:
    """ "text", "json" or "parquet", by the file's name."""
    suffixes = [suffix for suffix in file.suffixes if suffix not in COMPRESSED]
    suffix = suffixes[-1] if suffixes else ""
    return "json" if suffix in _JSON else "parquet" if suffix == ".parquet" else "text"


def pieces(file: Path, name: str, target: int) -> Iterator[Piece]:
    """The file in pieces of about `target` bytes, where it can be read from its middle."""
    size = file.stat().st_size
    units = parquet.row_groups(file) if kind(file) == "parquet" else size
    whole = file.suffix in COMPRESSED or kind(file) == "text"
    count = 1 if whole else max(1, min(round(size / target), units))
    bounds = [units * i // count for i in range(count + 1)]
    for start, stop in itertools.pairwise(bounds):
        yield Piece(file, name, start, stop, size // count)


def texts(piece: Piece, field: str, cut: bool) -> Iterator[Text]:
    """The texts of a piece, without surrounding white space, empty ones too.

    Args:
      field: of a JSON or Parquet record: the text.
      cut: a text file is cut between paragraphs; else it is one text.

    Raises:
      ConfigError: a record is no text, or the file is damaged; the message names file and record.
    """
    match kind(piece.file):
        case "json":
            found = _json(piece, field)
        case "parquet":
            found = _rows(piece, field)
        case _:
            found = _cut(piece) if cut else _whole(piece)
    for key, text, read in found:
        yield Text(key, text.strip(), min(read, piece.size))


# --- text -----------------------------------------------------------------------------------------


def _whole(piece: Piece) -> Iterator[Text]:
    with _opened(piece.file) as (stream, _):
        content = stream.read()
    yield Text("", _decoded(content, piece.file, 0), piece.size)


def _cut(piece: Piece) -> Iterator[Text]:
    with _opened(piece.file) as (stream, raw):
        for i, text in enumerate(filter(str.strip, paragraphs(_decoded_lines(stream, piece.file)))):
            yield Text(f"/{i}", text, raw.tell())


def _decoded_lines(stream: Iterable[bytes], file: Path) -> Iterator[str]:
    at = 0
    for line in stream:
        yield _decoded(line, file, at)
        at += len(line)


def _decoded(content: bytes, file: Path | str, at: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not UTF-8: byte {at + error.start} is 0x{content[error.start]:02x} "
            f"({error.reason}); convert the file to UTF-8"
        ) from None


# --- JSON lines -----------------------------------------------------------------------------------


def _json(piece: Piece, field: str) -> Iterator[Text]:
    prefix = f"@{piece.start}" if piece.start else ""
    for number, line, read in _lines(piece):
        try:
            text = _text_of(line, field)
        except ValueError as error:
            raise ConfigError(
                f"{piece.file}, line {_lines_before(piece) + number + 1}: {error}"
            ) from None
        yield Text(f"{prefix}:{number + 1}", text, read)


def _lines(piece: Piece) -> Iterator[tuple[int, bytes, int]]:
    """Number in the piece, line, and bytes read so far; lines of white space are left out."""
    with _opened(piece.file) as (stream, raw):
        at = piece.start
        if at:  # the line that the byte before is in belongs to the piece before
            stream.seek(at - 1)
            at += len(stream.readline()) - 1
        for number, line in enumerate(stream):
            if stream is raw and at >= piece.stop:
                return
            at += len(line)
            if line.strip():
                yield number, line, at - piece.start if stream is raw else raw.tell()


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


def _text_of(line: bytes, field: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8: byte {error.start} of the line is 0x{line[error.start]:02x}"
        ) from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(record, dict) or field not in record:
        there = ", ".join(map(repr, record)) if isinstance(record, dict) else "no JSON object"
        raise ValueError(
            f"no field {field!r}; there is {there}: set text_field of the source to the one that "
            "holds the text"
        )
    text = "" if record[field] is None else record[field]
    if not isinstance(text, str):
        raise ValueError(f"the field {field!r} is a {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the field {field!r} is not Unicode text: character {error.start} is half of a pair "
            f"({text[error.start]!a})"
        ) from None
    return text


# --- Parquet --------------------------------------------------------------------------------------


def _rows(piece: Piece, field: str) -> Iterator[Text]:
    for row, share, text in parquet.rows(piece.file, field, piece.start, piece.stop):
        text = _decoded(text, f"{piece.file}, row {row},", 0)
        yield Text(f":{row}", text, int(piece.size * share))


# --- opening --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file's content, and the file itself, which is the same where it is not compressed."""
    try:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(file.open("rb"))
            if file.suffix == ".gz":
                yield stack.enter_context(gzip.GzipFile(fileobj=raw)), raw
            elif file.suffix == ".zst":
                import pyarrow as arrow

                inner = arrow.CompressedInputStream(arrow.PythonFile(raw), "zstd")
                yield stack.enter_context(io.BufferedReader(inner)), raw
            else:
                yield raw, raw
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"{file} cannot be read to its end: {error}. It is damaged or cut off: get it again"
        ) from None
