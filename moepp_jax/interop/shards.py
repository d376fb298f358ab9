"""Tensors to safetensors files of a bounded size, with an index where there are several."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from moepp_jax.interop import safetensors_file
from moepp_jax.interop.errors import ConversionError

BYTES = 5_000_000_000  # of a file at most


def write(
    folder: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    produce: Callable[[str], np.ndarray],
    most_bytes: int = BYTES,
) -> None:
    """Writes the files, asking for one tensor after the other.

    Args:
      tensors: name -> (name of the numpy type, shape).
      produce: the tensor of a name, of that type and shape.
    """
    shards: list[dict] = [{}]
    total = filled = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * jnp.dtype(dtype).itemsize
        if shards[-1] and filled + size > most_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (dtype, shape)
        filled, total = filled + size, total + size
    if len(shards) == 1:
        safetensors_file.write(folder / "model.safetensors", tensors, produce)
        return
    files = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        safetensors_file.write(folder / file, shard, produce)
        files |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": files}
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def cast(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    """
    Raises:
      ConversionError: the type cannot hold a value of the tensor.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        made = values.astype(jnp.dtype(dtype))
    if not np.array_equal(np.isfinite(values), np.isfinite(made)):
        raise ConversionError(
            f"tensor {name} has values that {dtype} cannot hold: convert with --dtype=float32"
        )
    return made
