"""In what the layers of a family may differ, and how all must be alike: our blocks are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moepp_jax.interop import fields as values
from moepp_jax.interop.errors import ConversionError
from moepp_jax.interop.family import Family
from moepp_jax.interop.fields import Fields

# What these may be, or absent or null, where all layers of a family are of one kind.
_ALIKE = {"decoder_sparse_step": 1, "mlp_only_layers": []}


def moe_every(family: Family, fields: Fields, layers: int) -> int:
    """How many layers there are to one that is sparse, which is the last of them.

    Raises:
      ConversionError: it is not every so-manieth layer that is.
    """
    if not family.between:
        values.require_only(fields, _ALIKE)
        return 1
    step = values.number(fields, "decoder_sparse_step", int, 1)
    dense = fields.get("mlp_only_layers") or []
    if step < 1:
        raise ConversionError(f"decoder_sparse_step = {step} must be at least 1")
    if not isinstance(dense, list) or any(type(i) is not int for i in dense):
        raise ConversionError(f"mlp_only_layers = {dense!r} must be a list of layers")
    sparse = [i for i in range(layers) if i not in dense and (i + 1) % step == 0]
    every = sparse[0] + 1 if sparse else 0
    if not every or layers % every or sparse != [*range(every - 1, layers, every)]:
        raise ConversionError(
            f"mlp_only_layers = {dense!r} with decoder_sparse_step = {step} is not supported: of "
            f"{layers} layers {sparse or 'none'} would be sparse, and it must be every n-th, the "
            "last one too"
        )
    return every


def window(family: Family, fields: Fields, got: Mapping[str, Any]) -> int:
    """How many tokens each sees, itself among them; 0: sequences of the model's length all.

    Raises:
      ConversionError: it differs by layer, is no number, or is one that the class does not read.
    """
    name, longest = "sliding_window", got["max_position_embeddings"]
    size = fields.get(name, family.absent.get(name))
    if family.window == "switched" and not fields.get("use_sliding_window"):
        size = None
    kinds = set(fields.get("layer_types") or _kinds(family, fields, got, size))
    full, sliding = "full_attention", "sliding_attention"
    for kind in kinds - {full, sliding}:
        raise ConversionError(f"layer_types has {kind!r}, only {full!r} and {sliding!r} are known")
    if len(kinds) > 1:
        raise ConversionError(
            f"layer_types, or max_window_layers, gives some layers {full} and others {sliding}, "
            "which is not supported: all layers must be alike"
        )
    if kinds == {sliding} and size is None:
        raise ConversionError(f"layer_types has {sliding!r}, and there is no {name}")
    if size is None or kinds == {full}:
        return 0
    if type(size) is not int or size < 1:
        raise ConversionError(f"{name} = {size!r} must be null or at least 1")
    if size >= longest:
        return 0
    if family.window == "never":
        raise ConversionError(
            f"{name} = {size} is not supported: {family.architecture} does not read it"
        )
    return size


def _kinds(family: Family, fields: Fields, got: Mapping[str, Any], size: Any) -> list[str]:
    """Each layer's attention where layer_types does not say it."""
    layers, first = got["num_hidden_layers"], 0
    if "max_window_layers" in family.absent:
        default = family.absent["max_window_layers"]
        first = values.number(fields, "max_window_layers", int, default)
    return [
        "sliding_attention" if size is not None and i >= first else "full_attention"
        for i in range(layers)
    ]
