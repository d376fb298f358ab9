"""A released checkpoint to a work directory and back, tensor by tensor."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from moepp_jax import mesh as mesh_lib
from moepp_jax import model as model_lib
from moepp_jax.checkpoint import Checkpoints
from moepp_jax.config import Config, ConfigError
from moepp_jax.data import Tokenizer
from moepp_jax.interop import hf_config, safetensors_file, source, streams
from moepp_jax.interop.errors import ConversionError
from moepp_jax.interop.layout import Place, layout
from moepp_jax.storage import is_local, open_path
from moepp_jax.workdir import open_workdir, read_config, tokenizer_file

# What a work directory of a converted model has besides: its config.json, and its tensors' types.
_RECORD = "hf.json"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SHARD_BYTES = 5_000_000_000


def from_hf(
    path: str | os.PathLike,
    workdir: str | os.PathLike,
    config: Config | None = None,
    dtype: str | None = None,
    report: Callable[[str], Any] = print,
) -> Config:
    """Makes a work directory of a checkpoint in the authors' layout, at step 0.

    Args:
      config: decides what the checkpoint does not: data, optimizer, training, mesh, losses. By
        default that of configs/base.py, with sequences of the length that the model was made for.
      dtype: of the arithmetic; by default the one that config.json names.

    Returns:
      The configuration of the work directory.

    Raises:
      ConversionError: the checkpoint is damaged, incomplete or of what we do not support, or the
        work directory is there already. Nothing is left of it then.
    """
    folder, target = Path(path), _local(workdir)
    fields = source.read_json(folder / "config.json")
    config = _config(folder, fields, target, config, dtype)
    places = layout(config)
    tensors = source.open_tensors(folder)
    types = {name: tensor.dtype for name, tensor in tensors.items()}
    _untie(config, tensors)
    source.require(tensors, places, folder)
    with _beside(target) as made:
        open_workdir(made, config)
        if (folder / "tokenizer.model").exists():
            shutil.copyfile(folder / "tokenizer.model", tokenizer_file(made))
        record = {"config": fields, "dtypes": types}
        (made / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        opened = Checkpoints(made, config.train.keep, streams.handlers())
        with _errors_are_raised_only(), opened as checkpoints:
            checkpoints.save_params(0, _streamed(config, places, tensors))
            checkpoints.wait()
    report(f"{folder}: {len(tensors)} tensors are now step 0 of {target}")
    return config


def to_hf(
    workdir: str | os.PathLike,
    path: str | os.PathLike,
    step: int | None = None,
    dtype: str | None = None,
    report: Callable[[str], Any] = print,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a work directory's model in the authors' layout, as safetensors.

    Args:
      step: by default the best, or the newest if none was evaluated.
      dtype: of all tensors; by default each has the type that it came with, or float32 if the model
        was not converted.
      shard_bytes: more go into several files, with an index.

    Raises:
      ConversionError, ConfigError, CheckpointError: there is no such checkpoint or it is damaged, a
        value does not fit its type, or the target is there already. Nothing is left of it then.
    """
    folder, target = _local(workdir), _local(path)
    if dtype is not None and dtype not in safetensors_file.TYPES.values():
        known = ", ".join(safetensors_file.TYPES.values())
        raise ConversionError(f"--dtype={dtype} must be one of {known}")
    config = read_config(folder)
    record = source.read_json(folder / _RECORD) if (folder / _RECORD).exists() else {}
    types = record.get("dtypes", {})
    places = layout(config)
    if _HEAD in types and _HEAD not in places:
        places[_HEAD] = places[_EMBEDDING]  # tied, and came written out
    tensors = {name: (dtype or types.get(name, "float32"), p.shape) for name, p in places.items()}
    fields, why = hf_config.fields_of(config, record.get("config", {}))
    if dtype is not None or "torch_dtype" not in fields:
        fields["torch_dtype"] = dtype or tensors[_EMBEDDING][0]
    with Checkpoints(folder, config.train.keep) as checkpoints:
        stored = streams.Stored(
            checkpoints.params_folder(checkpoints.choose(step), _abstract(config))
        )

    def produce(name: str) -> np.ndarray:
        place, kind = places[name], tensors[name][0]
        return _cast(name, stored.read(place.leaf, place.index).reshape(place.shape), kind)

    with _beside(target) as made:
        made.mkdir()
        text = json.dumps(fields, indent=2) + "\n"
        (made / "config.json").write_text(text, encoding="utf-8")
        if tokenizer_file(folder).exists():
            shutil.copyfile(tokenizer_file(folder), made / "tokenizer.model")
        _write_shards(made, tensors, produce, shard_bytes)
    if why is not None:
        report(f"the authors' code cannot load {target}: {why}. `convert from-hf` can.")
    report(f"{folder}: {len(tensors)} tensors are now in {target}")


def _config(folder: Path, fields, target: Path, given: Config | None, dtype) -> Config:
    try:
        decided = hf_config.groups(fields, dtype)
        tree = given.to_dict() if given else _base()
        changes = [decided] if given else [hf_config.places_to_train(fields), decided]
        if (folder / "tokenizer.model").exists():
            Tokenizer.load(folder / "tokenizer.model")
            file = tokenizer_file(target.absolute())
            changes.append({"data": {"tokenizer": str(file)}})
        for change in changes:
            tree |= {group: tree[group] | values for group, values in change.items()}
        config = Config.parse(tree)
        hf_config.require_agreement(fields, config)
    except ConfigError as error:
        raise ConversionError(f"{folder / 'config.json'}: {error}") from error
    return config


def _base() -> dict[str, Any]:
    try:
        from configs import base
    except ImportError as error:  # used without the repository
        raise ConversionError("no recipe was given, and there is no configs/base.py") from error
    return base.get_config().to_dict()


def _untie(config: Config, tensors: dict[str, source.Tensor]) -> None:
    """Takes away an output matrix that is the embedding once more."""
    if not config.model.tied_embeddings or _HEAD not in tensors:
        return
    head, embedding = tensors.pop(_HEAD), tensors.get(_EMBEDDING)
    if embedding is not None and not (
        head.dtype == embedding.dtype and np.array_equal(head.read(), embedding.read())
    ):
        raise ConversionError(
            f"{head.file}: tensor {_HEAD} is not {_EMBEDDING}, though tie_word_embeddings is true"
        )


def _streamed(
    config: Config, places: Mapping[str, Place], tensors: Mapping[str, source.Tensor]
) -> Any:
    """The tree of parameters, of which each leaf reads its tensors when it is written."""
    at = {(place.leaf, place.index): name for name, place in places.items()}

    def leaf(key_path, shape):
        path = mesh_lib.path_of(key_path)
        stacked = next(len(index) for name, index in at if name == path)

        def piece(index):
            name = at[path, index]
            try:
                tensor = tensors[name].read()
            except (OSError, ValueError) as error:
                file = tensors[name].file
                raise ConversionError(f"{file}: tensor {name} cannot be read: {error}") from error
            return tensor.astype(np.float32).reshape(places[name].piece)

        return streams.Streamed(shape.shape, stacked, piece)

    return jax.tree_util.tree_map_with_path(leaf, _abstract(config))


def _abstract(config: Config) -> Any:
    model = model_lib.build(config, dispatch="dropless")
    return jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0)))


def _cast(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(jnp.dtype(dtype))
    if not np.array_equal(np.isfinite(values), np.isfinite(cast)):
        raise ConversionError(
            f"tensor {name} has values that {dtype} cannot hold: convert with --dtype=float32"
        )
    return cast


def _write_shards(folder: Path, tensors, produce, shard_bytes: int) -> None:
    shards: list[dict] = [{}]
    total = filled = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * jnp.dtype(dtype).itemsize
        if shards[-1] and filled + size > shard_bytes:
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


@contextlib.contextmanager
def _errors_are_raised_only() -> Iterator[None]:
    """Orbax would log the traceback of each thread that an error comes through."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _local(path: str | os.PathLike) -> Path:
    folder = open_path(path)
    if not is_local(folder):
        raise ConversionError(f"{path} must be a local folder: copy it to or from there yourself")
    return folder


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A new folder's temporary name; it gets its own when all went well, and goes when not."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(f"{target} is there already: give the name of a new folder")
    made = target.absolute().with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        yield made
        os.replace(made, target)
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise ConversionError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
