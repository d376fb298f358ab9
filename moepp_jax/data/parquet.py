"""A column of text of Parquet files, some rows at a time; pyarrow is imported when it is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moepp_jax.errors import ConfigError

# Rows that are decoded at once.
_ROWS = 256


def row_groups(file: Path) -> int:
    with _opened(file) as table:
        return table.num_row_groups


def rows(file: Path, field: str, start: int, stop: int) -> Iterator[tuple[int, float, bytes]]:
    """Of each row in these row groups: its number in the file, the share of the rows that have been
    read with it, its text.

    Raises:
      ConfigError: the file is damaged, or has no such column of text.
    """
    with _opened(file) as table:
        _check_column(file, table.schema_arrow, field)
        counts = [table.metadata.row_group(i).num_rows for i in range(stop)]
        row, done, total = sum(counts[:start]), 0, sum(counts[start:])
        for batch in table.iter_batches(_ROWS, range(start, stop), [field], use_threads=False):
            for text in _as_bytes(batch.column(0)):
                done += 1
                yield row, done / total, text or b""
                row += 1


def _check_column(file: Path, schema: Any, field: str) -> None:
    from pyarrow import types

    if field not in schema.names:
        raise ConfigError(
            f"{file}: no column {field!r}; there is {', '.join(map(repr, schema.names))}: set "
            "text_field of the source to the one that holds the text"
        )
    of_column = schema.field(field).type
    of_values = of_column.value_type if types.is_dictionary(of_column) else of_column
    if not (types.is_string(of_values) or types.is_large_string(of_values)):
        raise ConfigError(f"{file}: the column {field!r} is {of_column}, not text")


def _as_bytes(column: Any) -> list[bytes | None]:
    """Undecoded, as Arrow does not check that text is UTF-8."""
    import pyarrow as arrow

    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(arrow.large_binary()).to_pylist()


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    import pyarrow as arrow
    import pyarrow.parquet as arrow_parquet

    try:
        with arrow_parquet.ParquetFile(file, page_checksum_verification=True) as table:
            yield table
    except (OSError, arrow.ArrowException) as error:
        said = str(error).strip().split("\n")[0]
        raise ConfigError(f"{file} is no Parquet file, or is damaged: {said}") from None
