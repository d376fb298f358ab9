"""The authors' config.json and our configuration, each from the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moepp_jax import earlier
from moepp_jax.config import Config
from moepp_jax.interop import fields as values
from moepp_jax.interop.errors import ConversionError
from moepp_jax.interop.fields import Fields, Groups
from moepp_jax.moe import rules
from moepp_jax.moe.rules.moepp import MoEPPRule

THEIRS, OURS = "MoE++", "moepp_jax"  # model_type

# What the authors' classes take for a field that is absent; those without are required.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_DEFAULTS = {
    "max_position_embeddings": 2048,
    "moe_2layer_gate": True,
    "moe_use_mixtral_gating": False,
    "moe_use_logits_norm": False,
    "moe_gate_norm_std": 1.0,
    "moe_feature_no_mul_topk": False,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
# Fields that may only have this value, or be absent or null.
_ONLY = {
    "moe_expert_interval": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}
# The pool of the authors' code behind its FFN experts.
_POOL = {"n_const": 2, "n_copy": 1, "n_zero": 1}


def groups(fields: Fields, dtype: str | None = None) -> Groups:
    """The fields of config.model and config.moe that a config.json decides.

    Args:
      dtype: of the arithmetic; by default the one that the file names as the tensors' type.

    Raises:
      ConversionError: a field is missing, ill-typed, or asks for what we do not have.
    """
    if fields.get("model_type") not in (THEIRS, OURS):
        raise ConversionError(
            f"model_type = {fields.get('model_type')!r} must be {THEIRS!r} (the authors' layout) "
            "or 'qwen3_moe_plus_plus' (ZEDA's); `convert upcycle` reads other families"
        )
    ours = fields["model_type"] == OURS
    # A window is among our own fields.
    allowed = {n: only for n, only in _ONLY.items() if not (ours and n == "sliding_window")}
    values.require_only(fields, allowed)
    known = {*_DEFAULTS, *_ONLY}
    for name in fields:
        if name.startswith("moe_") and name not in known and fields[name] is not None:
            raise ConversionError(f"{name} = {fields[name]!r} is not supported: no such flag known")
    dtype = dtype or values.dtype(fields)
    if ours:
        return _ours(fields, dtype)

    got = {name: values.number(fields, name, int) for name in _REQUIRED}
    got |= {
        name: values.number(fields, name, type(default), default)
        for name, default in _DEFAULTS.items()
    }
    heads = got["num_attention_heads"]
    width = got["hidden_size"] // heads if heads else 0
    if values.number(fields, "head_dim", int, width) != width:
        raise ConversionError(
            f"head_dim = {fields['head_dim']} is not supported, only hidden_size / "
            f"num_attention_heads = {width}"
        )
    if not got["moe_gate_norm_std"] > 0:
        raise ConversionError(
            f"moe_gate_norm_std = {got['moe_gate_norm_std']!r} must be greater than 0"
        )
    mixtral = got["moe_use_mixtral_gating"]
    scaled = not (mixtral or got["moe_feature_no_mul_topk"])
    return {
        "model": {
            "num_layers": got["num_hidden_layers"],
            "hidden_size": got["hidden_size"],
            "num_heads": heads,
            "num_kv_heads": values.number(fields, "num_key_value_heads", int, heads),
            "head_dim": 0,
            "qk_norm": "none",
            "vocab_size": got["vocab_size"],
            "moe_every": 1,
            "tied_embeddings": got["tie_word_embeddings"],
            **values.rope(fields, got["rope_theta"]),
            "sliding_window": 0,
            "norm_eps": got["rms_norm_eps"],
            "init_std": got["initializer_range"],
            "dtype": dtype,
        },
        "moe": {
            **_POOL,
            "n_ffn": _experts(fields, got["num_hidden_layers"]) - sum(_POOL.values()),
            "ffn_size": got["intermediate_size"],
            "input_scale": 2.0 if scaled else 1.0,
        },
        "moe.rule": {
            "type": "moepp",
            "top_k": 2,
            "router_layers": 2 if got["moe_2layer_gate"] else 1,
            "logit_norm": got["moe_gate_norm_std"] if got["moe_use_logits_norm"] else 0.0,
            "bias_rate": 0.0,
            "residual": "logits",
            "gate": "softmax_selected" if mixtral else "renormalise_nonzero",
        },
    }


def length(fields: Fields) -> int:
    """Of the sequences that the model was made for."""
    default = _DEFAULTS["max_position_embeddings"]
    return values.number(fields, "max_position_embeddings", int, default)


def fields_of(
    config: Config, original: Fields, special: Fields
) -> tuple[dict[str, Any], str | None]:
    """A config.json for our configuration.

    Args:
      special: fields with the ids of special tokens.
      original: the fields that the model came with, if it was converted: where they describe the
        model, as they do if nobody changed them or it, they stay as they are.

    Returns:
      The fields, and why the authors' class cannot load them, if so: they then are of a model_type
      of our own, and have our fields under its name.
    """
    why = _beyond_theirs(config)
    if _describe(original, config):
        return dict(original), why
    general = {
        "architectures": ["MoeForCausalLM"],
        "hidden_act": "silu",
        "max_position_embeddings": config.data.seq_len,
        "moe_expert_interval": 1,
        **special,
    }
    fields = general | dict(original) | _plain(config)
    fields.pop("rope_parameters", None)
    fields.pop(OURS, None)
    fields["model_type"] = THEIRS if why is None else OURS
    if why is not None:
        fields.pop("architectures")
        tree = config.to_dict()
        fields[OURS] = {"model": tree["model"], "moe": tree["moe"]}
    return fields, why


def _plain(config: Config) -> dict[str, Any]:
    """What their names can say of a model."""
    m, e = config.model, config.moe
    r = _moepp(config)
    return {
        "vocab_size": m.vocab_size,
        "hidden_size": m.hidden_size,
        "intermediate_size": e.ffn_size,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads,
        "num_experts": [e.num_experts],
        "moe_2layer_gate": r.router_layers == 2,
        "moe_use_mixtral_gating": r.gate == "softmax_selected",
        "moe_use_logits_norm": r.logit_norm > 0,
        "moe_gate_norm_std": r.logit_norm or 1.0,
        "moe_feature_no_mul_topk": e.input_scale == 1.0,
        "initializer_range": m.init_std,
        "rms_norm_eps": m.norm_eps,
        "rope_theta": m.rope_theta,
        "rope_scaling": values.rope_scaling(m),
        "sliding_window": m.sliding_window or None,
        "tie_word_embeddings": m.tied_embeddings,
    }


def _moepp(config: Config) -> MoEPPRule:
    """The rule whose options their fields are; of a model of another rule they say nothing."""
    rule = config.moe.rule
    return rule if isinstance(rule, MoEPPRule) else MoEPPRule(pool=config.moe.pool)


def _describe(fields: Fields, config: Config) -> bool:
    """Whether a config.json is one of this very model."""
    try:
        decided = groups(fields, config.model.dtype)
    except ConversionError:
        return False
    tree = config.to_dict()
    groups_of = {"model": tree["model"], "moe": tree["moe"], "moe.rule": tree["moe"]["rule"]}
    return all(
        groups_of[group].get(name) == value
        for group, wanted in decided.items()
        for name, value in wanted.items()
    )


def _beyond_theirs(config: Config) -> str | None:
    m, e = config.model, config.moe
    pool = {name: getattr(e, name) for name in _POOL}
    if pool != _POOL:
        return (
            "their pool is always 2 constant, 1 copy and 1 zero expert, not "
            f"{e.n_const}, {e.n_copy} and {e.n_zero}"
        )
    kind = rules.fields_of(e.rule)["type"]
    if kind != "moepp":
        return f"their config.moe.rule.type is always 'moepp', not {kind!r}"
    r = e.rule
    scales = (1.0,) if r.gate == "softmax_selected" else (1.0, 2.0)
    beyond = values.first_beyond(
        (
            ("model.moe_every", m.moe_every, (1,)),
            ("model.head_dim", m.head_dim, (0, m.hidden_size // m.num_heads)),
            ("model.qk_norm", m.qk_norm, ("none",)),
            ("model.rope_type", m.rope_type, ("linear",)),
            ("model.sliding_window", m.sliding_window, (0,)),
            ("moe.rule.top_k", r.top_k, (2,)),
            ("moe.rule.bias_rate", r.bias_rate, (0.0,)),
            ("moe.rule.zero_offset", r.zero_offset, (0.0,)),
            ("moe.rule.residual", r.residual, ("logits", "detached")),
            ("moe.rule.gate", r.gate, ("renormalise_nonzero", "softmax_selected")),
            ("moe.input_scale", e.input_scale, scales),
        )
    )
    return beyond and f"their {beyond}"


def _ours(fields: Fields, dtype: str) -> Groups:
    found = fields.get(OURS)
    if not isinstance(found, Mapping) or not all(
        isinstance(found.get(group), Mapping) for group in ("model", "moe")
    ):
        raise ConversionError(f"{OURS} = {found!r} must have the groups model and moe")
    moe = dict(found["moe"])
    moe = moe if "rule" in moe else earlier.with_rule(moe)
    return {"model": dict(found["model"]) | {"dtype": dtype}, "moe": moe}


def require_agreement(fields: Fields, config: Config) -> None:
    """Refuses a config.json of ours whose plain fields say something else than ours in it."""
    if fields["model_type"] == OURS:
        for name, value in _plain(config).items():
            if fields.get(name, value) != value:
                raise ConversionError(
                    f"{name} = {fields[name]!r} contradicts {OURS}, by which it is {value!r}"
                )


def _experts(fields: Fields, layers: int) -> int:
    counts = fields.get("num_experts")
    counts = counts if isinstance(counts, list) else [counts]
    if len(counts) not in (1, layers) or any(type(n) is not int for n in counts):
        raise ConversionError(
            f"num_experts = {fields.get('num_experts')!r} must be [N], all kinds of experts counted"
        )
    if len(set(counts)) > 1:
        raise ConversionError(
            f"num_experts = {counts!r} is not supported: every layer must have the same number"
        )
    if counts[0] <= sum(_POOL.values()):
        raise ConversionError(
            f"num_experts = {counts!r} must be at least [{sum(_POOL.values()) + 1}]: 2 constant, 1 "
            "copy and 1 zero expert are among them"
        )
    return counts[0]
