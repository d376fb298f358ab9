"""Safetensors files, a tensor at a time: memory maps, which the library reads by, would stay.

The format: 8 bytes with the length of a JSON header, the header (tensor -> type, shape and byte
offsets), the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from moepp_jax.interop.errors import ConversionError

TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CODES = {name: code for code, name in TYPES.items()}
_MOST_HEADER = 100_000_000  # bytes, the format's own limit


class Entry(NamedTuple):
    """A tensor of a file: name of its numpy type, or the file's own for one that we have not."""

    dtype: str
    shape: tuple[int, ...]
    start: int


def entries(file: Path) -> dict[str, Entry]:
    """What the file holds.

    Raises:
      ConversionError: the file cannot be read, is cut short or is no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER):
                raise ConversionError(
                    f"{file} is truncated, or no safetensors file: of {size} bytes, it announces "
                    f"a header of {length}"
                )
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return _entries(file, header, 8 + length, size)
    except OSError as error:
        raise ConversionError(f"{file} cannot be read: {error.strerror}") from error
    except ConversionError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConversionError(f"{file} is no safetensors file: its header: {error!r}") from error


def _entries(file: Path, header: Mapping, data: int, size: int) -> dict[str, Entry]:
    found, stored = {}, 0
    for name, fields in header.items():
        first, last = fields["data_offsets"]
        entry = Entry(
            TYPES.get(fields["dtype"], fields["dtype"]), tuple(fields["shape"]), data + first
        )
        if data + last > size:
            raise ConversionError(
                f"{file} is truncated: tensor {name} ends at byte {data + last:,}, the file at "
                f"{size:,}"
            )
        if entry.dtype in _CODES:
            needed = math.prod(entry.shape) * jnp.dtype(entry.dtype).itemsize
            if first < 0 or last - first != needed:
                raise ConversionError(
                    f"{file}: tensor {name} of shape {list(entry.shape)} and type {entry.dtype} "
                    f"has {last - first} bytes, and {needed} are needed"
                )
        found[name] = entry
        stored += last - first
    if data + stored != size:
        raise ConversionError(
            f"{file}: its tensors are {stored:,} bytes, and {size - data:,} are behind the header"
        )
    return found


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
