"""Files of `torch.save` with tensors by name; PyTorch, an optional package, reads them.

Nothing in them is executed: `weights_only` refuses every pickle that does more than hold tensors.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moepp_jax.interop.errors import ConversionError
from moepp_jax.interop.safetensors_file import Entry


def entries(file: Path) -> dict[str, Entry]:
    """What the file holds.

    Raises:
      ConversionError: PyTorch is not installed; the file cannot be read or holds something else.
    """
    return {
        name: Entry(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in _load(file).items()
    }


def reader(file: Path, name: str) -> Callable[[], np.ndarray]:
    """Reads one tensor. The file is opened anew for each: a map of it would stay in memory."""

    def read() -> np.ndarray:
        import torch

        tensor = _load(file)[name].detach().contiguous()
        bits = tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()
        return bits.view(jnp.dtype(str(tensor.dtype).removeprefix("torch."))).copy()

    return read


def _load(file: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            f"{file} can only be read by PyTorch, which is not installed: pip install torch (its "
            "CPU build is enough), or save the checkpoint as safetensors"
        ) from error
    try:
        # What PyTorch wrote before 1.6 is no zip archive, and cannot be mapped.
        mapped = zipfile.is_zipfile(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # of many kinds, some bare
        why, *_ = str(error).strip().splitlines() or [type(error).__name__]
        raise ConversionError(
            f"{file} cannot be read as tensors; it is damaged, or holds more than tensors and is "
            f"not opened for safety: {why}"
        ) from error
    if not isinstance(loaded, dict):
        raise ConversionError(f"{file} holds a {type(loaded).__name__}, not tensors by name")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ConversionError(f"{file}: {name} is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.is_meta:
            raise ConversionError(f"{file}: tensor {name} is sparse or empty, not plain numbers")
        stored = value.untyped_storage().nbytes()
        if value.numel() * value.element_size() > stored:
            raise ConversionError(
                f"{file}: tensor {name} of shape {list(value.shape)} has {stored:,} bytes of "
                "numbers, which it repeats: save it with .contiguous()"
            )
    return loaded
