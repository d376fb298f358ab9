"""Checkpoints of ZEDA: a Qwen3-MoE with zero-computation experts, whose routers have rows for them.

Tensors are a Qwen3-MoE's; `mlp.gate.weight` has `num_experts` rows and then those of the others,
which have no tensors: `zce_nums` of each of `zce_types`. The authors' config.json has the
architecture below, and a model_type that may be the base model's.
"""

from __future__ import annotations

from typing import Any

from moepp_jax.config import Config
from moepp_jax.interop import families
from moepp_jax.interop.errors import ConversionError
from moepp_jax.interop.family import QWEN3_MOE
from moepp_jax.interop.fields import Fields, Groups
from moepp_jax.interop.layout import Places

ZEDA = QWEN3_MOE._replace(
    model_type="qwen3_moe_plus_plus",
    architecture="Qwen3MoePlusPlusForCausalLM",
    zero_computation=True,
)
# In the order that our experts have.
_KINDS = {"copy": "n_copy", "zero": "n_zero"}


def is_zeda(fields: Fields) -> bool:
    named = fields.get("model_type")
    if named == QWEN3_MOE.model_type:
        return "zce_nums" in fields or ZEDA.architecture in (fields.get("architectures") or ())
    return named == ZEDA.model_type


def require_none(fields: Fields) -> None:
    """
    Raises:
      ConversionError: it is such a checkpoint, and not one to be upcycled.
    """
    if is_zeda(fields):
        raise ConversionError(
            f"zce_nums = {fields.get('zce_nums')!r}: it has zero-computation experts already, so "
            "it cannot be upcycled; `convert from-hf` reads it as it is"
        )


def groups(fields: Fields, dtype: str | None = None) -> Groups:
    """The fields of config.model and config.moe by which a model of ours computes the same.

    Raises:
      ConversionError: a field is missing, ill-typed, or asks for what we do not have.
    """
    read = families.groups(ZEDA, fields, dtype)
    counts = _counts(fields.get("zce_nums"), fields.get("zce_types"))
    hidden = fields.get("use_zce_mask")
    if hidden is not False:
        raise ConversionError(
            f"use_zce_mask = {hidden!r} must be false: the class hides its zero-computation "
            "experts where it is true, or is not there"
        )
    rule = read["moe.rule"]
    # Nothing balances the experts one by one, so with capacities many tokens would be dropped.
    read["moe"] |= counts | {"dispatch": "dropless", "eval_dispatch": "dropless"}
    read["moe.rule"] = {
        "type": "zeda",
        "top_k": rule["top_k"],
        "router_layers": 1,
        "logit_norm": 0.0,
        "residual": "none",
        "gate": "raw" if rule["gate"] == "raw" else "renormalise_all",
    }
    return read


def places(config: Config, names: Any) -> Places:
    """Every tensor's name and place, given the names that there are."""
    return families.places(ZEDA, config, families.are_fused(names))


def _counts(numbers: Any, kinds: Any) -> dict[str, int]:
    if not isinstance(numbers, list) or not all(type(n) is int and n > 0 for n in numbers):
        raise ConversionError(f"zce_nums = {numbers!r} must be a list of numbers of experts")
    if kinds not in (["zero"], ["copy"], ["copy", "zero"]):
        raise ConversionError(
            f"zce_types = {kinds!r} is not supported, only ['zero'], ['copy'] or ['copy', 'zero']"
        )
    if len(numbers) != len(kinds):
        raise ConversionError(f"zce_nums = {numbers!r} must have one for each of {kinds!r}")
    found = dict(zip(kinds, numbers, strict=True))
    return {ours: found.get(kind, 0) for kind, ours in _KINDS.items()}
