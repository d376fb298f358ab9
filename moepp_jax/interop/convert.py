"""A checkpoint in the authors' layout to a work directory, and a work directory to others' layouts.

Tensor by tensor: a model is never in memory whole.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moepp_jax.config import Config
from moepp_jax.errors import ConfigError
from moepp_jax.interop import (
    brought,
    building,
    families,
    hf_config,
    safetensors_file,
    shards,
    source,
    streams,
    targets,
    tokenizer_config,
    vanilla,
    zeda,
)
from moepp_jax.interop import fields as values
from moepp_jax.interop.errors import ConversionError
from moepp_jax.interop.layout import EMBEDDING, HEAD, Places, layout, with_head
from moepp_jax.run import open_run
from moepp_jax.special_tokens import GENERATION
from moepp_jax.workdir import read_config


def from_hf(
    path: str | os.PathLike,
    workdir: str | os.PathLike,
    config: Config | None = None,
    dtype: str | None = None,
    report: Callable[[str], Any] = print,
) -> Config:
    """Makes a work directory of a checkpoint in the authors' layout, or in ZEDA's, at step 0.

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
    folder, target = targets.local(path), targets.local(workdir)
    fields = source.read_config(folder)
    kind = _ZEDAS if zeda.is_zeda(fields) else _AUTHORS
    config, came = _config(kind, folder, fields, target, config, dtype)
    found = source.open_tensors(folder)
    # Tables of the rotary embedding are computed anew.
    tensors = {name: t for name, t in found.items() if not families.is_unread(name)}
    _require_enough(config, tensors, folder)
    places = with_head(kind.places(config, tensors), tensors)
    source.require(tensors, places, folder)
    building.require_tied(config, tensors)
    types = {name: tensor.dtype for name, tensor in tensors.items()}
    record = {"config": fields, "dtypes": types} if kind.is_written else None
    building.build(target, config, building.leaves_of(places, tensors), came, record)
    report(f"{folder}: {len(tensors)} tensors are now step 0 of {target}")
    if caution := came.caution(target):
        report(caution)
    return config


class _Kind(NamedTuple):
    """How checkpoints of a kind are read.

    Attributes:
      groups: of config.json and a dtype, the fields that it decides.
      length: of config.json, that of the sequences that the model was made for.
      places: of a configuration and the tensors, where they lie.
      is_written: `to_hf` writes the kind, so what a checkpoint was is remembered.
    """

    groups: Callable[..., values.Groups]
    length: Callable[[values.Fields], int]
    places: Callable[..., Places]
    is_written: bool


_AUTHORS = _Kind(hf_config.groups, hf_config.length, lambda config, names: layout(config), True)
_ZEDAS = _Kind(zeda.groups, families.length, zeda.places, False)


def _config(
    kind: _Kind, folder: Path, fields, target: Path, given: Config | None, dtype
) -> tuple[Config, brought.Brought]:
    try:
        decided = kind.groups(fields, dtype)
    except ConfigError as error:
        raise ConversionError(f"{folder / 'config.json'}: {error}") from error
    came = brought.read(folder, fields, decided["model"]["vocab_size"])
    try:
        recipe = given or building.recipe_for(kind.length(fields))
        # Named though it is missing: training would else learn one, whose ids mean nothing here.
        config = building.configuration(recipe, [decided, came.named(target)])
        hf_config.require_agreement(fields, config)
    except ConfigError as error:
        why = values.in_their_words(error)
        raise ConversionError(f"{folder / 'config.json'}: {why}") from error
    return config, came


def _require_enough(config: Config, tensors: Mapping[str, source.Tensor], folder: Path) -> None:
    m, e = config.model, config.moe
    experts = 1 if families.are_fused(tensors) else e.n_ffn + e.n_const
    least = max(m.num_layers, m.num_layers // m.moe_every * experts)
    asked = f"num_hidden_layers = {m.num_layers} and num_experts = {e.num_experts}"
    source.require_enough(tensors, least, asked, folder)


class _Written(NamedTuple):
    """A model in a layout: its tensors, its config.json, and whom that is of no use to, if so."""

    places: Places
    fields: dict[str, Any]
    caution: str | None = None


def _as_authors(config: Config, original: values.Fields, special: values.Fields) -> _Written:
    fields, why = hf_config.fields_of(config, original, special)
    if why is not None:
        why = f"the authors' code cannot load it: {why}. `convert from-hf` can."
    return _Written(layout(config), fields, why)


def _as_vanilla(
    layout: vanilla.Layout, config: Config, original: values.Fields, special: values.Fields
) -> _Written:
    fields = vanilla.fields_of(layout, config, special)
    return _Written(families.places(layout.family, config), fields)


LAYOUTS = {"moepp": _as_authors} | {
    name: functools.partial(_as_vanilla, layout) for name, layout in vanilla.LAYOUTS.items()
}


def to_hf(
    workdir: str | os.PathLike,
    path: str | os.PathLike,
    step: int | None = None,
    dtype: str | None = None,
    report: Callable[[str], Any] = print,
    shard_bytes: int = shards.BYTES,
    layout: str = "moepp",
) -> None:
    """Writes a work directory's model in a layout of Hugging Face, as safetensors.

    Args:
      step: by default the best, or the newest if none was evaluated.
      dtype: of all tensors; by default each has the type that it came with, or float32 if the model
        was not converted.
      shard_bytes: more go into several files, with an index.
      layout: "moepp", the authors', or "mixtral", "olmoe" or "qwen3_moe", for a vanilla MoE.

    Raises:
      ConversionError, ConfigError, CheckpointError: there is no such checkpoint or it is damaged,
        the layout has no room for the model, a value does not fit its type, or the target is there
        already. Nothing is left of it then.
    """
    folder, target = targets.local(workdir), targets.local(path)
    _require_one_of("dtype", dtype, (None, *safetensors_file.TYPES.values()))
    _require_one_of("layout", layout, tuple(LAYOUTS))
    _require_run(folder, target)
    run = open_run(folder, step)
    config = run.config
    original, types = building.read_record(folder)
    tokenizer = run.tokenizer()
    special = tokenizer_config.ids(tokenizer)
    places, fields, caution = LAYOUTS[layout](config, original, special)
    places = with_head(places, types)
    tensors = {name: (dtype or types.get(name, "float32"), p.shape) for name, p in places.items()}
    said = [name for name in ("torch_dtype", "dtype") if name in fields]
    if dtype is not None or (not said and fields != original):
        embedding = EMBEDDING if EMBEDDING in tensors else HEAD
        fields |= dict.fromkeys(said or ["torch_dtype"], dtype or tensors[embedding][0])
    stored = streams.Stored(run.params_folder())

    def produce(name: str) -> np.ndarray:
        place, kind = places[name], tensors[name][0]
        return shards.cast(name, stored.read(place.leaf, place.index).reshape(place.shape), kind)

    with targets.beside(target) as made:
        made.mkdir()
        _write_json(made / "config.json", fields)
        for name, content in tokenizer_config.files(tokenizer, config.data.seq_len).items():
            (made / name).write_bytes(content)
        if (folder / GENERATION).exists():
            shutil.copyfile(folder / GENERATION, made / GENERATION)
        shards.write(made, tensors, produce, shard_bytes)
    if caution is not None:
        report(f"{target}: {caution}")
    report(f"{folder}: {len(tensors)} tensors are now in {target}")


def _require_run(folder: Path, target: Path) -> None:
    """
    Raises:
      ConversionError: the folders were given the wrong way round.
      ConfigError: there is no run.
    """
    try:
        read_config(folder)
    except ConfigError as error:
        if not _is_run(target):
            raise
        raise ConversionError(
            f"{folder} holds no run, and {target} is one: write convert to-hf {target} PATH, with "
            "PATH a new folder"
        ) from error


def _is_run(folder: Path) -> bool:
    try:
        read_config(folder)
    except ConfigError:
        return False
    return True


def _write_json(file: Path, fields: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _require_one_of(flag: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        known = ", ".join(str(choice) for choice in choices if choice is not None)
        raise ConversionError(f"--{flag}={value} must be one of {known}")
