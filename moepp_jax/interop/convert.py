"""A checkpoint in the authors' layout to a work directory, and a work directory to others' layouts.

Tensor by tensor: a model is never in memory whole.
"""

from __future__ import annotations

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
    building,
    families,
    hf_config,
    mixtral,
    safetensors_file,
    shards,
    source,
    streams,
    targets,
    tokenizer_config,
)
from moepp_jax.interop import fields as values
from moepp_jax.interop.errors import ConversionError
from moepp_jax.interop.layout import EMBEDDING, Places, layout, with_head
from moepp_jax.run import open_run
from moepp_jax.workdir import tokenizer_file


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
    folder, target = targets.local(path), targets.local(workdir)
    fields = source.read_json(folder / "config.json")
    tokenizer = folder / "tokenizer.model"
    config = _config(folder, fields, target, config, dtype)
    found = source.open_tensors(folder)
    # Tables of the rotary embedding are computed anew.
    tensors = {name: t for name, t in found.items() if not families.is_unread(name)}
    _require_enough(config, tensors, folder)
    places = with_head(layout(config), tensors)
    source.require(tensors, places, folder)
    building.require_tied(config, tensors)
    record = {"config": fields, "dtypes": {name: tensor.dtype for name, tensor in tensors.items()}}
    building.build(target, config, building.leaves_of(places, tensors), tokenizer, record)
    report(f"{folder}: {len(tensors)} tensors are now step 0 of {target}")
    return config


def _config(folder: Path, fields, target: Path, given: Config | None, dtype) -> Config:
    tokenizer = folder / "tokenizer.model"
    try:
        decided = hf_config.groups(fields, dtype)
        changes = [] if given else [values.sequences_of(hf_config.length(fields))]
        changes.append(decided)
        if tokenizer.exists():
            changes.append(building.tokenizer_of(target, tokenizer))
        config = building.configuration(given, changes)
        hf_config.require_agreement(fields, config)
    except ConfigError as error:
        why = values.in_their_words(error)
        raise ConversionError(f"{folder / 'config.json'}: {why}") from error
    return config


def _require_enough(config: Config, tensors: Mapping[str, source.Tensor], folder: Path) -> None:
    m, e = config.model, config.moe
    least = max(m.num_layers, m.num_layers // m.moe_every * (e.n_ffn + e.n_const))
    asked = f"num_hidden_layers = {m.num_layers} and num_experts = {e.num_experts}"
    source.require_enough(tensors, least, asked, folder)


class _Written(NamedTuple):
    """A model in a layout: its tensors, its config.json, and whom that is of no use to, if so."""

    places: Places
    fields: dict[str, Any]
    caution: str | None = None


def _as_authors(config: Config, original: values.Fields) -> _Written:
    fields, why = hf_config.fields_of(config, original)
    if why is not None:
        why = f"the authors' code cannot load it: {why}. `convert from-hf` can."
    return _Written(layout(config), fields, why)


def _as_mixtral(config: Config, original: values.Fields) -> _Written:
    fields = mixtral.fields_of(config)
    return _Written(families.places(families.MIXTRAL, config), fields)


LAYOUTS = {"moepp": _as_authors, "mixtral": _as_mixtral}


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
      layout: "moepp", the authors', or "mixtral", for a vanilla MoE.

    Raises:
      ConversionError, ConfigError, CheckpointError: there is no such checkpoint or it is damaged,
        the layout has no room for the model, a value does not fit its type, or the target is there
        already. Nothing is left of it then.
    """
    folder, target = targets.local(workdir), targets.local(path)
    _require_one_of("dtype", dtype, (None, *safetensors_file.TYPES.values()))
    _require_one_of("layout", layout, tuple(LAYOUTS))
    run = open_run(folder, step)
    config = run.config
    original, types = building.read_record(folder)
    places, fields, caution = LAYOUTS[layout](config, original)
    places = with_head(places, types)
    tensors = {name: (dtype or types.get(name, "float32"), p.shape) for name, p in places.items()}
    said = [name for name in ("torch_dtype", "dtype") if name in fields]
    if dtype is not None or (not said and fields != original):
        fields |= dict.fromkeys(said or ["torch_dtype"], dtype or tensors[EMBEDDING][0])
    stored = streams.Stored(run.params_folder())

    def produce(name: str) -> np.ndarray:
        place, kind = places[name], tensors[name][0]
        return shards.cast(name, stored.read(place.leaf, place.index).reshape(place.shape), kind)

    with targets.beside(target) as made:
        made.mkdir()
        _write_json(made / "config.json", fields)
        if tokenizer_file(folder).exists():
            shutil.copyfile(tokenizer_file(folder), made / "tokenizer.model")
            named = tokenizer_config.settings(tokenizer_file(folder), config.data.seq_len)
            if named is not None:
                _write_json(made / "tokenizer_config.json", named)
        shards.write(made, tensors, produce, shard_bytes)
    if caution is not None:
        report(f"{target}: {caution}")
    report(f"{folder}: {len(tensors)} tensors are now in {target}")


def _write_json(file: Path, fields: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _require_one_of(flag: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        known = ", ".join(str(choice) for choice in choices if choice is not None)
        raise ConversionError(f"--{flag}={value} must be one of {known}")
