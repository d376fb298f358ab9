"""A column of text of Arrow files, as `save_to_disk` of Hugging Face's data sets writes them."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moepp_jax import regular
from moepp_jax.data import arrow_batches, columns
from moepp_jax.errors import ConfigError

# What such a folder holds beside its *.arrow files, and one of several splits in their folders.
STATE, INFO, DICT = "state.json", "dataset_info.json", "dataset_dict.json"

# What `map` and its like leave there begin so.
CACHE = "cache-"


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
            is_file = raw.read(len(arrow_batches.FILE_FORMAT)) == arrow_batches.FILE_FORMAT
        with arrow.memory_map(str(file)) as source:
            opened = arrow.ipc.open_file if is_file else arrow.ipc.open_stream
            schema = opened(source).schema
            columns.check(file, schema, field)
            source.seek(0)
            arrow_batches.require_bounded(file, source, is_file)
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
