"""A column of text of Parquet files, some rows at a time; pyarrow is imported when it is needed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moepp_jax.data import columns, parquet_pages, thrift
from moepp_jax.errors import ConfigError

# Bytes that are read ahead of the page that is being unpacked: not the column of a whole row group.
_AHEAD = 2**20


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
        groups = enumerate(itertools.islice(parquet_pages.chunks(file, wanted), start, stop), start)
        for number, chunks in groups:
            count = parquet_pages.rows_together(file, field, number, chunks, nulls)
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
    except (OSError, UnicodeDecodeError, arrow.ArrowException, thrift.DamagedError) as error:
        said = str(error).strip().split("\n")[0]
        raise ConfigError(f"{file} is no Parquet file, or is damaged: {said}") from None
