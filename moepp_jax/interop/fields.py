"""Values of a config.json: what other models' and the authors' have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from moepp_jax.config import ModelConfig
from moepp_jax.errors import ConfigError
from moepp_jax.interop.errors import ConversionError

Fields = Mapping[str, Any]
Groups = dict[str, dict[str, Any]]  # of a configuration: fields by group, "moe.rule" one of them

_DTYPES = ("float32", "bfloat16", "float16")
_ROPE = ("rope_scaling", "rope_parameters")  # the latter in `transformers` 5, with the base

# Our fields, and what they are called in a config.json.
_NAMES = {
    "model.vocab_size": "vocab_size",
    "model.hidden_size": "hidden_size",
    "model.num_layers": "num_hidden_layers",
    "model.num_heads": "num_attention_heads",
    "model.num_kv_heads": "num_key_value_heads",
    "model.head_dim": "head_dim",
    "model.rope_theta": "rope_theta",
    "model.rope_scaling": "rope_scaling",
    "model.rope_low_freq_factor": "low_freq_factor",
    "model.rope_high_freq_factor": "high_freq_factor",
    "model.rope_original_length": "original_max_position_embeddings",
    "model.sliding_window": "sliding_window",
    "model.norm_eps": "rms_norm_eps",
    "model.init_std": "initializer_range",
    "moe.ffn_size": "intermediate_size",
    "moe.rule.logit_norm": "moe_gate_norm_std",
    "data.seq_len": "max_position_embeddings",
}


def number(fields: Fields, name: str, kind: type, default: Any = None) -> Any:
    """A field's value, of one type: a number or a truth.

    Raises:
      ConversionError: it is of another type, or absent and there is no default.
    """
    value = fields.get(name)
    value = default if value is None else value
    if value is None:
        raise ConversionError(f"{name} is missing")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConversionError(f"{name} = {value!r} must be of type {kind.__name__}")
    return value


def dtype(fields: Fields) -> str:
    """Of the tensors, by the file; float32 if it says nothing."""
    named = fields.get("torch_dtype") or fields.get("dtype") or "float32"
    name = str(named).removeprefix("torch.")
    if name not in _DTYPES:
        raise ConversionError(f"torch_dtype = {named!r} must be one of {', '.join(_DTYPES)}")
    return name


def require_only(fields: Fields, allowed: Mapping[str, Any]) -> None:
    """Refuses fields that are neither absent nor null, and have another value than this one."""
    for name, only in allowed.items():
        if fields.get(name) not in (None, only):
            raise ConversionError(f"{name} = {fields[name]!r} is not supported, only {only!r}")


def rope(fields: Fields, theta: float, kinds: Iterable[str] = ("linear",)) -> dict[str, Any]:
    """The fields of config.model that say how positions turn.

    Args:
      theta: the base, if none is named.
      kinds: of scaling, that the model's class has.
    """
    said = {n: _rope(fields, n, theta, kinds) for n in _ROPE if fields.get(n) is not None}
    first, *others = said.values() or [_UNSCALED | {"rope_theta": theta}]
    if any(other != first for other in others):
        raise ConversionError(f"{' and '.join(said)} contradict each other")
    return first


# Fields of config.model where nothing is scaled, and what they are called in a rope_scaling.
_UNSCALED = {
    "rope_type": "linear",
    "rope_scaling": 1.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_length": 8192,
}
_OF_TYPE = {
    "linear": {"rope_scaling": "factor"},
    "llama3": {
        "rope_scaling": "factor",
        "rope_low_freq_factor": "low_freq_factor",
        "rope_high_freq_factor": "high_freq_factor",
        "rope_original_length": "original_max_position_embeddings",
    },
}


def _rope(fields: Fields, name: str, theta: float, kinds: Iterable[str]) -> dict[str, Any]:
    said = fields[name]
    if not isinstance(said, Mapping):
        raise ConversionError(f"{name} = {said!r} must be null or have a type and a factor")
    if any(isinstance(value, Mapping) for value in said.values()):
        raise ConversionError(f"{name} = {dict(said)!r} is not supported: it differs by layer")
    kind = said.get("rope_type", said.get("type"))
    if kind not in (None, "default", *kinds):
        known = " or ".join(map(repr, kinds))
        raise ConversionError(f"{name} of type {kind!r} is not supported, only {known} or null")
    try:
        require_only(said, {"partial_rotary_factor": 1.0})
        read = {"rope_theta": number(said, "rope_theta", float, theta)}
        if kind not in kinds:
            require_only(said, {"factor": 1.0})
            return _UNSCALED | read
        for ours, theirs in _OF_TYPE[kind].items():
            read[ours] = number(said, theirs, type(_UNSCALED[ours]))
            if not 0 < read[ours] < math.inf:
                raise ConversionError(f"{theirs} = {said[theirs]!r} must be greater than 0")
    except ConversionError as error:
        raise ConversionError(f"{name}: {error}") from error
    return _UNSCALED | read | {"rope_type": kind}


def in_their_words(error: ConfigError) -> str:
    """The message, with a config.json's names for the fields that are read from it."""
    return re.sub(r"config\.([\w.]*\w)", lambda found: _NAMES.get(found[1], found[0]), str(error))


def rope_scaling(m: ModelConfig) -> dict[str, Any] | None:
    """The field of that name."""
    if m.rope_type == "linear" and m.rope_scaling == 1.0:
        return None
    named = {theirs: getattr(m, ours) for ours, theirs in _OF_TYPE[m.rope_type].items()}
    return {"type" if m.rope_type == "linear" else "rope_type": m.rope_type} | named


def first_beyond(choices: Iterable[tuple[str, Any, tuple]]) -> str | None:
    """The first field whose value another format has no room for, in words.

    Args:
      choices: of each field its name, its value and the values that there is room for.
    """
    for name, value, allowed in choices:
        if value not in allowed:
            return f"config.{name} is always {' or '.join(map(repr, allowed))}, not {value!r}"
    return None
