"""A work directory at step 0, of parameters that are made piece by piece."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from moepp_jax.checkpoint import Checkpoints
from moepp_jax.config import Config
from moepp_jax.configs import base
from moepp_jax.interop import safetensors_file, source, streams, targets
from moepp_jax.interop.brought import Brought
from moepp_jax.interop.errors import ConversionError
from moepp_jax.interop.fields import Groups
from moepp_jax.interop.layout import EMBEDDING, HEAD, Place
from moepp_jax.model import describe
from moepp_jax.moe import Param
from moepp_jax.moe.param import path_of
from moepp_jax.workdir import open_workdir

# What the work directory of a converted model remembers of where it came from.
RECORD = "hf.json"


class Leaf(NamedTuple):
    """How one of our parameters is made.

    Attributes:
      stacked: how many leading axes are walked through, a piece for each of their indices.
      piece: makes the piece of an index, float32.
    """

    stacked: int
    piece: Callable[[tuple[int, ...]], np.ndarray]


def leaves_of(places: Mapping[str, Place], tensors: Mapping[str, source.Tensor]) -> dict[str, Leaf]:
    """Parameters by path, read from these tensors when they are written."""
    at: dict[str, dict[tuple[int, ...], str]] = {}
    for name, place in places.items():
        at.setdefault(place.leaf, {})[place.index] = name

    def leaf(names: Mapping[tuple[int, ...], str]) -> Leaf:
        def piece(index):
            name = names[index]
            return tensors[name].read().astype(np.float32).reshape(places[name].piece)

        return Leaf(len(next(iter(names))), piece)

    return {path: leaf(names) for path, names in at.items()}


def require_tied(config: Config, tensors: Mapping[str, source.Tensor]) -> None:
    """Refuses an output matrix that is not the embedding once more, where they are tied.

    Raises:
      ConversionError: it is another one.
    """
    if not config.model.tied_embeddings or not {HEAD, EMBEDDING} <= tensors.keys():
        return
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    if head.dtype != embedding.dtype or not np.array_equal(head.read(), embedding.read()):
        raise ConversionError(
            f"{head.file}: tensor {HEAD} is not {EMBEDDING}, though tie_word_embeddings is true"
        )


def recipe_for(length: int) -> Config:
    """That of configs/base.py, with sequences of the length that a model was made for.

    A batch has as many tokens as there.
    """
    tree = base.get_config().to_dict()
    tokens = tree["train"]["batch_size"] * tree["data"]["seq_len"]
    tree["data"]["seq_len"] = tree["moe"]["group_size"] = length
    tree["model"]["loss_chunk"] = math.gcd(tree["model"]["loss_chunk"], length)
    tree["train"]["batch_size"] = max(1, tokens // length)
    return Config.parse(tree)


def configuration(recipe: Config, changes: list[Groups]) -> Config:
    """A recipe with groups' fields changed."""
    tree = recipe.to_dict()
    for change in changes:
        for group, values in change.items():
            if group != "moe.rule":
                tree[group] = tree[group] | values
                continue
            moe = tree["moe"]
            # The options of another rule than the one that is wanted mean nothing to it.
            rule = moe["rule"] if moe["rule"]["type"] == values.get("type", "moepp") else {}
            tree["moe"] = moe | {"rule": rule | {"type": "moepp"} | values}
    return Config.parse(tree)


def build(
    target: Path,
    config: Config,
    leaves: Mapping[str, Leaf],
    brought: Brought,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Makes the work directory; nothing is left of it if that fails.

    Args:
      leaves: every parameter of the model.
      brought: what it came with.
      record: what is to be remembered in RECORD.

    Raises:
      ConversionError: the work directory is there already or cannot be written, or a leaf raised.
    """
    with targets.beside(target) as made:
        open_workdir(made, config)
        for name, content in brought.files().items():
            (made / name).write_bytes(content)
        if record is not None:
            (made / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        opened = Checkpoints(made, config.train.keep, streams.handlers())
        with _errors_are_raised_only(), opened as checkpoints:
            checkpoints.save_params(0, _streamed(config, leaves))
            checkpoints.wait()


def read_record(workdir: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Of a work directory, config.json and tensors' types of what it was converted from, if it was.

    Raises:
      ConversionError: what remembers them is damaged.
    """
    file = workdir / RECORD
    record = source.read_json(file) if file.exists() else {}
    fields, types = (record.get(name, {}) for name in ("config", "dtypes"))
    if not isinstance(fields, dict) or not isinstance(types, dict):
        raise ConversionError(f"{file} must hold a config and dtypes, both by name")
    for name, kind in types.items():
        if kind not in safetensors_file.TYPES.values():
            raise ConversionError(f"{file}: tensor {name} is said to be of type {kind!r}")
    return fields, types


def _streamed(config: Config, leaves: Mapping[str, Leaf]) -> Any:
    def streamed(key_path, p: Param):
        leaf = leaves[path_of(key_path)]
        return streams.Streamed(p.shape, leaf.stacked, leaf.piece)

    return jax.tree_util.tree_map_with_path(streamed, describe(config))


@contextlib.contextmanager
def _errors_are_raised_only() -> Iterator[None]:
    """Orbax would log the traceback of each thread that an error comes through."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
