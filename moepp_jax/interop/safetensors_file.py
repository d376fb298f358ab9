"""Safetensors files, a tensor at a time: memory maps, which the library reads by, would stay.

The format: 8 bytes with the length of a JSON header, the header (tensor -> type, shape and byte
offsets), the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moepp_jax import regular
from moepp_jax.interop.errors import ConversionError

TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CODES = {name: code for code, name in TYPES.items()}
_MOST_HEADER = 100_000_000  # bytes, the format's own limit
_MOST_AXES, _MOST_NAME = 16, 1000  # of a tensor: beyond these nobody means one


class Entry(NamedTuple):
    """A tensor of a file: name of its numpy type, or the file's own for one that we have not.

    Where it lies in the file, and how much it is, are of a safetensors file only.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    bytes: int = 0


def entries(file: Path) -> dict[str, Entry]:
    """What the file holds.

    Raises:
      ConversionError: the file cannot be read, is cut short or is no safetensors file.
    """
    try:
        regular.require(file)
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(length) if length <= min(size - 8, _MOST_HEADER) else b""
    except OSError as error:
        raise ConversionError(f"{file} cannot be read: {error.strerror}") from error
    if size < 8 or len(text) < length:
        raise ConversionError(
            f"{file} is truncated, or no safetensors file: of {size} bytes, it announces a header "
            f"of {length}"
        )
    try:
        header = regular.parsed(text)
    except ValueError as error:
        raise ConversionError(f"{file} is no safetensors file: its header: {error}") from error
    if not isinstance(header, dict):
        raise ConversionError(f"{file} is no safetensors file: its header is {header!s:.200}")
    header.pop("__metadata__", None)
    found = {name: _entry(file, name, fields, 8 + length) for name, fields in header.items()}
    _require_all(file, found, 8 + length, size)
    return found


def _entry(file: Path, name: str, fields: Any, data: int) -> Entry:
    try:
        first, last = fields["data_offsets"]
        shape, kind = tuple(fields["shape"]), str(fields["dtype"])
        whole = len(shape) <= _MOST_AXES and len(name) <= _MOST_NAME and len(kind) <= _MOST_NAME
        whole = whole and all(type(n) is int and 0 <= n < 2**63 for n in (first, last, *shape))
    except (ValueError, LookupError, TypeError):
        whole = False
    if not whole or first > last:
        raise ConversionError(
            f"{file} is no safetensors file: its header says of tensor {name:.200}: {fields!s:.200}"
        )
    entry = Entry(TYPES.get(kind, kind), shape, data + first, last - first)
    if entry.dtype in _CODES:
        needed = math.prod(shape) * jnp.dtype(entry.dtype).itemsize
        if entry.bytes != needed:
            raise ConversionError(
                f"{file}: tensor {name} of shape {list(shape)} and type {entry.dtype} has "
                f"{entry.bytes} bytes, and {needed} are needed"
            )
    return entry


def _require_all(file: Path, found: Mapping[str, Entry], end: int, size: int) -> None:
    """Refuses a file that has other bytes behind its header than those of its tensors."""
    for name, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if entry.start != end:
            raise ConversionError(
                f"{file}: tensor {name} begins at byte {entry.start:,}, and what is before it ends "
                f"at {end:,}"
            )
        end += entry.bytes
        if end > size:
            raise ConversionError(
                f"{file} is truncated: tensor {name} ends at byte {end:,}, the file at {size:,}"
            )
    if end != size:
        raise ConversionError(f"{file}: its tensors end at byte {end:,}, the file at {size:,}")


def read(file: Path, entry: Entry) -> np.ndarray:
    count = math.prod(entry.shape)
    flat = np.fromfile(file, jnp.dtype(entry.dtype), count, offset=entry.start)
    return flat.reshape(entry.shape)


def write(
    file: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    produce: Callable[[str], np.ndarray],
) -> None:
    """Writes a file, asking for one tensor after the other.

    Args:
      tensors: name -> (name of the numpy type, shape).
      produce: the tensor of a name, of that type and shape.
    """
    # Wider types first, so that every tensor begins at a multiple of its width.
    order = sorted(tensors, key=lambda name: -jnp.dtype(tensors[name][0]).itemsize)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        dtype, shape = tensors[name]
        start, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            stream.write(np.ascontiguousarray(produce(name)).view(np.uint8).data)
