"""Upcycling: a dense or a vanilla MoE checkpoint to a MoE++ model that computes the same at first.

FFN experts are the source's, or copies of its one FFN. Zero-computation experts get a bias on their
logits so low that none is chosen, and gating residuals are zero. Training then moves the biases
(`config.moe.rule.bias_rate`) until tokens go where tau wants them.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moepp_jax.config import Config
from moepp_jax.errors import ConfigError
from moepp_jax.interop import brought, building, families, source, targets, zeda
from moepp_jax.interop import fields as values
from moepp_jax.interop.building import Leaf
from moepp_jax.interop.errors import ConversionError
from moepp_jax.interop.family import Family, family_of
from moepp_jax.interop.fields import Groups
from moepp_jax.interop.layout import with_head
from moepp_jax.moe.rules import fields_of
from moepp_jax.moe.rules.moepp import NEVER, MoEPPRule

POOL = ("n_const", "n_copy", "n_zero")
# What a caller may set: fields of config.moe, and options of its rule.
OPTIONS = ("tau", "bias_rate")
SETTINGS = ("n_ffn", *POOL, *OPTIONS)
# Logits a step where nobody says it: some 300 steps until zero-computation experts are chosen.
BIAS_RATE = 0.1

_FFN, _ROUTER, _CONST = "layers/moe/ffn/", "layers/moe/router/", "layers/moe/const/"


def upcycle(
    path: str | os.PathLike,
    workdir: str | os.PathLike,
    config: Config | None = None,
    dtype: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    report: Callable[[str], Any] = print,
    **settings: Any,
) -> Config:
    """Makes a work directory of a checkpoint of another family, at step 0.

    With no zero-computation experts a MoE checkpoint becomes the same vanilla MoE.

    Args:
      path: a folder with config.json and weights as `transformers` saves them; `families` has the
        model types.
      config: decides what neither the checkpoint nor the settings do, as in `from_hf`.
      dtype: of the arithmetic; by default the one that config.json names.
      tokenizer: a SentencePiece model or a tokenizer.json; by default the folder's tokenizer.model,
        or else its tokenizer.json.
      **settings: of SETTINGS: n_ffn, how many copies of a dense FFN; n_const, n_copy, n_zero; tau;
        bias_rate. By default the config's.

    Returns:
      The configuration of the work directory.

    Raises:
      ConversionError: the checkpoint is damaged, incomplete or of what we do not support, a setting
        does not fit it, or the work directory is there already. Nothing is left of it then.
    """
    folder, target = targets.local(path), targets.local(workdir)
    fields = source.read_config(folder)
    try:
        zeda.require_none(fields)
        family = family_of(fields)
        decided = families.groups(family, fields, dtype)
    except ConfigError as error:
        raise ConversionError(f"{folder / 'config.json'}: {error}") from error
    given = None if tokenizer is None else Path(tokenizer)
    came = brought.read(folder, fields, decided["model"]["vocab_size"], given)
    named = came.named(target)
    try:
        recipe = config or building.recipe_for(families.length(fields))
        pool, rule = _pool(family, decided["moe"]["n_ffn"], recipe, settings)
        decided["moe"] |= pool
        decided["moe.rule"] |= rule
        config = building.configuration(recipe, [decided, named])
    except ConfigError as error:
        raise ConversionError(f"{folder}: {values.in_their_words(error)}") from error

    tensors = {
        name: tensor
        for name, tensor in source.open_tensors(folder).items()
        if not families.is_unread(name)
    }
    fused = families.are_fused(tensors)
    _require_enough(family, decided, fused, tensors, folder)
    places = with_head(families.places(family, config, fused), tensors)
    source.require(tensors, places, folder)
    building.require_tied(config, tensors)
    leaves = _grown(building.leaves_of(places, tensors), family, config)
    building.build(target, config, leaves, came)
    report(f"{folder} ({family.model_type}): {len(tensors)} tensors are now step 0 of {target}")
    if caution := came.caution(target):
        report(f"{caution} Or upcycle with --tokenizer=FILE.")
    return config


def _require_enough(
    family: Family,
    decided: Groups,
    fused: bool,
    tensors: Mapping[str, source.Tensor],
    folder: Path,
) -> None:
    layers, every = decided["model"]["num_layers"], decided["model"]["moe_every"]
    each = decided["moe"]["n_ffn"] if family.experts and not fused else 1
    asked = f"num_hidden_layers = {layers}" + (f" and {each} experts" if each > 1 else "")
    source.require_enough(tensors, max(layers, layers // every * each), asked, folder)


def _pool(
    family: Family, n_ffn: int, recipe: Config, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """In what the model is to be another than its source: fields of config.moe, and of its rule."""
    if unknown := settings.keys() - set(SETTINGS):
        raise TypeError(f"no setting {', '.join(sorted(unknown))}: there are {', '.join(SETTINGS)}")
    given = {name: value for name, value in settings.items() if value is not None}
    rules = MoEPPRule.options() | _options(recipe)
    moe = {name: given.get(name, getattr(recipe.moe, name)) for name in ("n_ffn", *POOL)}
    rule = {name: given.get(name, rules[name]) for name in OPTIONS}
    if family.experts:
        if given.get("n_ffn", n_ffn) != n_ffn:
            raise ConversionError(
                f"n_ffn = {given['n_ffn']} must be {n_ffn}, the experts that it has: only the FFN "
                "of a dense model can be copied"
            )
        moe["n_ffn"] = n_ffn
    else:
        rule["top_k"] = rules["top_k"]
    if any(moe[name] for name in POOL):
        if given.get("bias_rate") == 0:
            raise ConversionError(
                "bias_rate = 0 must be greater than 0: without biases the new experts are chosen "
                "from the first step on"
            )
        rule["residual"] = rules["residual"]
        rule["bias_rate"] = rule["bias_rate"] or BIAS_RATE
    else:
        rule["bias_rate"] = 0.0
    # The new experts serve nobody at first: with capacities the others would drop what they leave.
    moe["dispatch"] = moe["eval_dispatch"] = "dropless"
    return moe, rule


def _options(recipe: Config) -> dict[str, Any]:
    """Those of a recipe's rule, if it is the one that upcycled models have."""
    fields = fields_of(recipe.moe.rule)
    return fields if fields.pop("type") == "moepp" else {}


def _grown(leaves: Mapping[str, Leaf], family: Family, config: Config) -> dict[str, Leaf]:
    """The source's parameters, and those that it lacks."""
    m, e, seed = config.model, config.moe, config.seed
    D, N, J = m.hidden_size, e.num_experts, e.n_const
    grown, rows = dict(leaves), f"{_ROUTER}w"
    # Random rows: copies of one FFN, and experts of one kind, part in training by their tokens.
    if family.experts:
        grown[rows] = _below(leaves[rows], _drawn(seed, rows, m.init_std, N - e.n_ffn, D))
    else:
        grown |= {name: _copied(leaf) for name, leaf in leaves.items() if name.startswith(_FFN)}
        grown[rows] = _drawn(seed, rows, m.init_std, N, D)
    if e.rule.residual != "none":
        grown[f"{_ROUTER}w_residual"] = _always(np.zeros((N, N), np.float32))
    if e.rule.bias_rate:
        grown[f"{_ROUTER}bias"] = _always(np.where(np.arange(N) < e.n_ffn, 0.0, NEVER))
    if J:
        grown[f"{_CONST}w"] = _drawn(seed, f"{_CONST}w", m.init_std, J, 2, D)
        grown[f"{_CONST}v"] = _drawn(seed, f"{_CONST}v", m.const_std, J, D)
    return grown


def _copied(leaf: Leaf) -> Leaf:
    """Every expert is the first."""
    return leaf._replace(piece=lambda index: leaf.piece((index[0], 0, *index[2:])))


def _below(leaf: Leaf, more: Leaf) -> Leaf:
    return leaf._replace(piece=lambda index: np.concatenate([leaf.piece(index), more.piece(index)]))


def _drawn(seed: int, name: str, std: float, *shape: int) -> Leaf:
    """N(0, std), every layer by itself, the same for the same seed and name."""

    def piece(index):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), *index])
        return (std * rng.standard_normal(shape)).astype(np.float32)

    return Leaf(1, piece)


def _always(values: np.ndarray) -> Leaf:
    return Leaf(1, lambda index: values.astype(np.float32))
