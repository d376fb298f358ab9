"""A column of text, however Arrow holds it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moepp_jax.errors import ConfigError

# Rows that are decoded at once.
ROWS = 256


def check(file: Path, schema: Any, field: str) -> None:
    """
    Raises:
      ConfigError: there is no such column, or it holds no text.
    """
    from pyarrow import types

    if field not in schema.names:
        raise ConfigError(
            f"{file}: no column {field!r}; there is {', '.join(map(repr, schema.names))}: set "
            "text_field of the source to the one that holds the text"
        )
    of_column = schema.field(field).type
    of_values = of_column.value_type if types.is_dictionary(of_column) else of_column
    strings = (types.is_string, types.is_large_string, types.is_string_view)
    raw = (types.is_binary, types.is_large_binary, types.is_binary_view)
    if not any(holds(of_values) for holds in (*strings, *raw)):
        raise ConfigError(f"{file}: the column {field!r} is {of_column}, not text")


def as_bytes(column: Any) -> Iterator[bytes | None]:
    """Row by row, as a dictionary's values may be many times as large together as it is; undecoded,
    as Arrow does not check that text is UTF-8.
    """
    import pyarrow as arrow

    if arrow.types.is_dictionary(column.type):
        values = column.dictionary.cast(arrow.large_binary())
        for index in column.indices.to_pylist():
            yield None if index is None else values[index].as_py()
    else:
        for value in column.cast(arrow.large_binary()):
            yield value.as_py()
