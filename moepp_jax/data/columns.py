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


def as_bytes(column: Any) -> Iterator[memoryview]:
    """The bytes of each row, where they lie; none of a row without a value. Row by row, as a value
    that is stored once may be the text of many; undecoded, as Arrow does not check that text is
    UTF-8.
    """
    import pyarrow as arrow

    if arrow.types.is_dictionary(column.type):
        values, indices = as_binary(column.dictionary), column.indices.to_pylist()
    else:
        values, indices = as_binary(column), range(len(column))
    for index in indices:
        buffer = None if index is None else values[index].as_buffer()
        yield memoryview(b"" if buffer is None else buffer)


def as_binary(values: Any) -> Any:
    """Text as bytes, without a copy: views may show the same bytes many times."""
    from pyarrow import binary, binary_view, large_binary, types

    if types.is_string_view(values.type):
        return values.view(binary_view())
    if types.is_large_string(values.type):
        return values.view(large_binary())
    return values.view(binary()) if types.is_string(values.type) else values
