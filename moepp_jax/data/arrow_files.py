"""A column of text of Arrow files, as `save_to_disk` of Hugging Face's data sets writes them."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moepp_jax import regular
from moepp_jax.data import columns, opening
from moepp_jax.errors import ConfigError

# What such a folder holds beside its *.arrow files, and one of several splits in their folders.
STATE, INFO, DICT = "state.json", "dataset_info.json", "dataset_dict.json"

# What `map` and its like leave there begin so.
CACHE = "cache-"

_FILE_FORMAT = b"ARROW1"


def rows(file: Path, field: str) -> Iterator[tuple[int, float, memoryview]]:
    """Of each row: its number, the share of the file that has been read with it, its text.

    Raises:
      ConfigError: the file is damaged, has no such column of text, or has a record batch that
        unpacks to more than `opening.AT_ONCE`.
    """
    row = 0
    with _opened(file, field) as (batches, schema, source):
        for batch in batches:
            column = batch.column(schema.names.index(field))
            del batch  # or it would stay beside the next one
            # Offsets out of range would be read as they are; whether it is UTF-8 is told by row.
            columns.as_binary(column).validate(full=True)
            for start in range(0, len(column), columns.ROWS):
                for text in columns.as_bytes(column.slice(start, columns.ROWS)):
                    yield row, source.tell() / source.size(), text
                    row += 1
            del column


@contextlib.contextmanager
def _opened(file: Path, field: str) -> Iterator[tuple[Iterator[Any], Any, Any]]:
    """Record batches with this column alone, their schema, and the file: of either format."""
    import pyarrow as arrow

    try:
        with file.open("rb") as raw:
            is_file = raw.read(len(_FILE_FORMAT)) == _FILE_FORMAT
        with arrow.memory_map(str(file)) as source:
            opened = arrow.ipc.open_file if is_file else arrow.ipc.open_stream
            schema = opened(source).schema
            columns.check(file, schema, field)
            source.seek(0)
            _require_bounded(file, _blocks(source) if is_file else _messages(source))
            source.seek(0)
            alone = arrow.ipc.IpcReadOptions(
                included_fields=[schema.names.index(field)], use_threads=False
            )
            table = opened(source, options=alone)
            found = map(table.get_batch, range(table.num_record_batches)) if is_file else table
            yield found, table.schema, source
    except (OSError, EOFError, UnicodeDecodeError, arrow.ArrowException, struct.error) as error:
        said = str(error).strip().split("\n")[0]
        raise ConfigError(f"{file} is no Arrow file, or is damaged: {said}") from None


# --- what unpacks to how much, told without unpacking it ------------------------------------------

# Of Arrow's format: what a message's header is, and what Arrow 0.17 wrote where it was packed.
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_OLD_COMPRESSION = b"ARROW:experimental_compression"


def _require_bounded(file: Path, messages: Iterable[Any]) -> None:
    """
    Raises:
      ConfigError: a record batch, or what dictionaries are in memory together, would be too much.
    """
    dictionaries: dict[int, int] = {}
    number = 0
    for message in messages:
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
    tail = source.read_at(len(_FILE_FORMAT) + 4, size - len(_FILE_FORMAT) - 4)
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


# --- folders --------------------------------------------------------------------------------------


def saved(folder: Path) -> set[str] | None:
    """The files that are the data set in this folder; None where there is none.

    Raises:
      ConfigError: one of them is missing, or rows of them were chosen by another file.
    """
    state = _read(folder / STATE)
    if state is None or not isinstance(state.get("_data_files"), list):
        return None
    if state.get("_indices_data_files"):
        raise ConfigError(
            f"{folder / STATE} says that only some rows are meant: save it again after "
            "flatten_indices()"
        )
    files = {str(entry["filename"]) for entry in state["_data_files"]}
    if missing := sorted(name for name in files if not (folder / name).is_file()):
        raise ConfigError(f"{folder / missing[0]}, which {folder / STATE} names, is missing")
    return files


def is_split(folder: Path) -> bool:
    """Whether the folders in this one are the splits of one saved data set."""
    said = _read(folder / DICT)
    return said is not None and isinstance(said.get("splits"), list)


def _read(file: Path) -> dict | None:
    try:
        content = regular.read_json(file)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
