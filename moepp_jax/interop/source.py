"""A checkpoint folder in the layout of Hugging Face: its config.json and its tensors by name."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moepp_jax import regular
from moepp_jax.interop import safetensors_file, torch_file
from moepp_jax.interop.errors import ConversionError
from moepp_jax.interop.layout import Place
from moepp_jax.storage import is_name

# In this order: safetensors where there are both.
_FORMATS = ("model.safetensors", "pytorch_model.bin")


class Tensor(NamedTuple):
    """A tensor that is not read yet."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    reader: Callable[[], np.ndarray]

    def read(self) -> np.ndarray:
        """The tensor as it is stored.

        Raises:
          ConversionError: it cannot be read, or a value is no finite number.
        """
        try:
            values = self.reader()
        except ConversionError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise ConversionError(
                f"{self.file}: tensor {self.name} cannot be read: {error}"
            ) from error
        if not np.isfinite(values).all():
            raise ConversionError(
                f"{self.file}: tensor {self.name} has values that are not finite: the model that "
                "was saved had diverged, or the file is damaged"
            )
        return values


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint.

    Raises:
      ConversionError: as `read_json`; or the folder is not there, or is a run of ours.
    """
    if not folder.is_dir():
        raise ConversionError(f"{folder} is no folder: give that of a checkpoint")
    fields = read_json(folder / "config.json")
    if "model_type" not in fields and {"model", "moe", "train"} <= fields.keys():
        raise ConversionError(
            f"{folder} is a run already, no checkpoint of others: `train`, `generate` and "
            f"`convert to-hf {folder} PATH` take it as it is"
        )
    return fields


def read_json(file: Path) -> dict[str, Any]:
    """
    Raises:
      ConversionError: the file is not there, or holds no JSON object, or one with a name twice.
    """
    try:
        fields = regular.read_json(file, pairs=_unambiguous)
    except OSError as error:
        raise ConversionError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConversionError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConversionError(f"{file} holds a {type(fields).__name__}, not a JSON object")
    return fields


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"{counts.most_common(1)[0][0]!r:.200} is there twice")
    return found


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder, of one file or of several with an index.

    Raises:
      ConversionError: no weights; a file is missing or damaged; the index and the files disagree.
    """
    for single in _FORMATS:
        if (folder / f"{single}.index.json").exists():
            return _sharded(folder / f"{single}.index.json")
        if (folder / single).exists():
            return _open_file(folder / single)
    names = " or ".join(f"{name} or {name}.index.json" for name in _FORMATS)
    raise ConversionError(f"{folder} holds no weights: there is no {names}")


def _sharded(index: Path) -> dict[str, Tensor]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ConversionError(f"{index} has no weight_map from tensors to files")
    for name, file in files.items():
        if not is_name(file):
            raise ConversionError(
                f"{index}: tensor {name} is said to be in {file!r:.200}, which is no file of that "
                "folder"
            )
        if not (index.parent / file).exists():
            raise ConversionError(f"{index.parent / file}, which has tensor {name}, is missing")
    found: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        for name, tensor in _open_file(index.parent / file).items():
            if files.get(name) != file:
                said = f"says it is in {files[name]}" if name in files else "does not know it"
                raise ConversionError(f"{index.parent / file} has tensor {name}; {index} {said}")
            found[name] = tensor
    for name, file in files.items():
        if name not in found:
            raise ConversionError(f"{index.parent / file} lacks tensor {name}, which {index} names")
    return found


def _open_file(file: Path) -> dict[str, Tensor]:
    try:
        regular.require(file)
    except OSError as error:
        raise ConversionError(f"{file} cannot be read: {error.strerror}") from error
    if file.suffix == ".safetensors":
        return {
            name: Tensor(name, file, entry.dtype, entry.shape, _safetensors_reader(file, entry))
            for name, entry in safetensors_file.entries(file).items()
        }
    return {
        name: Tensor(name, file, entry.dtype, entry.shape, torch_file.reader(file, name))
        for name, entry in torch_file.entries(file).items()
    }


def _safetensors_reader(file: Path, entry) -> Callable[[], np.ndarray]:
    return lambda: safetensors_file.read(file, entry)


def require_enough(tensors: Mapping[str, Tensor], least: int, asked: str, folder: Path) -> None:
    """Refuses numbers in config.json for which there cannot be places, before any are made.

    Args:
      least: tensors that there must be by such numbers.
      asked: the numbers, in words.
    """
    if least > len(tensors):
        raise ConversionError(
            f"{folder / 'config.json'}: {asked} ask for more than the {len(tensors)} tensors that "
            f"are in {folder}"
        )


def require(tensors: Mapping[str, Tensor], places: Mapping[str, Place], folder: Path) -> None:
    """Refuses tensors that are not exactly those that the configuration has places for.

    Raises:
      ConversionError: one is missing, unexpected, or of another shape or type.
    """
    _refuse(folder, "lacks", [name for name in places if name not in tensors])
    for name, tensor in tensors.items():
        if name not in places:
            raise ConversionError(
                f"{tensor.file}: unexpected tensor {name}, for which the model that config.json "
                "describes has no place"
            )
        if tensor.shape != places[name].shape:
            raise ConversionError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, and by config.json "
                f"it must have {list(places[name].shape)}"
            )
        if tensor.dtype not in safetensors_file.TYPES.values():
            known = ", ".join(safetensors_file.TYPES.values())
            raise ConversionError(
                f"{tensor.file}: tensor {name} is of type {tensor.dtype}; it must be one of {known}"
            )


def _refuse(folder: Path, what: str, names: Iterable[str]) -> None:
    first, *others = [*names] or [None]
    if first is not None:
        more = f" and {len(others)} more" if others else ""
        raise ConversionError(f"{folder} {what} tensor {first}{more}, which config.json asks for")
