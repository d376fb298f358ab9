"""A column of text of Parquet files, some rows at a time; pyarrow is imported when it is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moepp_jax.data import columns
from moepp_jax.errors import ConfigError


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
        columns.check(file, table.schema_arrow, field)
    # As a dictionary: a value that is stored once, for many rows, is in memory once.
    with _opened(file, read_dictionary=[field]) as table:
        counts = [table.metadata.row_group(i).num_rows for i in range(stop)]
        row, done, total = sum(counts[:start]), 0, sum(counts[start:])
        groups = range(start, stop)
        for batch in table.iter_batches(columns.ROWS, groups, [field], use_threads=False):
            for text in columns.as_bytes(batch.column(0)):
                done += 1
                yield row, done / total, text or b""
                row += 1


@contextlib.contextmanager
def _opened(file: Path, **options: Any) -> Iterator[Any]:
    import pyarrow as arrow
    import pyarrow.parquet as arrow_parquet

    try:
        with arrow_parquet.ParquetFile(file, page_checksum_verification=True, **options) as table:
            yield table
    except (OSError, arrow.ArrowException) as error:
        said = str(error).strip().split("\n")[0]
        raise ConfigError(f"{file} is no Parquet file, or is damaged: {said}") from None
