"""A config.json by which a class of `transformers` computes what a vanilla MoE of ours does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from moepp_jax.config import Config
from moepp_jax.interop import fields as values
from moepp_jax.interop.errors import ConversionError
from moepp_jax.interop.family import MIXTRAL, OLMOE, QWEN3_MOE, Family
from moepp_jax.moe import rules

# Without zero experts these gates are one: softmax over all, the chosen ones over their sum.
_RENORMALISED = ("renormalise_nonzero", "renormalise_all", "softmax_selected")


class Layout(NamedTuple):
    """A family that is written.

    Attributes:
      gates: of config.moe.rule.gate, those that its class has.
      window: whether attention may have one.
      free_head: whether a head may have another width than hidden_size / heads.
      always: fields whose values do not depend on the model.
    """

    family: Family
    gates: tuple[str, ...] = (*_RENORMALISED, "raw")
    window: bool = False
    free_head: bool = True
    always: Mapping[str, Any] = {}


LAYOUTS = {
    layout.family.model_type: layout
    for layout in (
        Layout(MIXTRAL, gates=_RENORMALISED, window=True),
        Layout(OLMOE, free_head=False, always={"clip_qkv": None, "attention_bias": False}),
        Layout(
            QWEN3_MOE,
            always={
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "attention_bias": False,
                "sliding_window": None,
                "use_sliding_window": False,
            },
        ),
    )
}


def fields_of(layout: Layout, config: Config, special: Mapping[str, Any]) -> dict[str, Any]:
    """
    Args:
      special: fields with the ids of special tokens.

    Raises:
      ConversionError: the model is none of that family; the message names the field.
    """
    m, e, family = config.model, config.moe, layout.family
    _require_of(layout, config)
    r = e.rule
    of_gate = {"norm_topk_prob": r.gate != "raw"} if "raw" in layout.gates else {}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": m.vocab_size,
        "hidden_size": m.hidden_size,
        "intermediate_size": e.ffn_size,
        family.width: e.ffn_size,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads,
        **({"head_dim": m.head_dim} if m.head_dim else {}),
        family.experts[0]: e.n_ffn,
        "num_experts_per_tok": r.top_k,
        **of_gate,
        "hidden_act": "silu",
        "max_position_embeddings": config.data.seq_len,
        "initializer_range": m.init_std,
        "rms_norm_eps": m.norm_eps,
        "rope_theta": m.rope_theta,
        "rope_scaling": values.rope_scaling(m),
        **({"sliding_window": m.sliding_window or None} if layout.window else {}),
        "router_aux_loss_coef": r.balance_weight,
        "tie_word_embeddings": m.tied_embeddings,
        **layout.always,
        **special,
    }


def _require_of(layout: Layout, config: Config) -> None:
    m, e = config.model, config.moe
    family, kind = layout.family, rules.fields_of(e.rule)["type"]
    none = f"it cannot be written as {family.model_type}"
    if kind != "moepp":
        raise ConversionError(f"{none}, whose config.moe.rule.type is always 'moepp', not {kind!r}")
    r, width = e.rule, m.hidden_size // m.num_heads
    beyond = values.first_beyond(
        (
            ("model.moe_every", m.moe_every, (1,)),
            ("model.qk_norm", m.qk_norm, (family.qk_norm,)),
            ("model.head_dim", m.head_dim, (m.head_dim,) if layout.free_head else (0, width)),
            ("model.sliding_window", m.sliding_window, (m.sliding_window if layout.window else 0,)),
            ("moe.n_const", e.n_const, (0,)),
            ("moe.n_copy", e.n_copy, (0,)),
            ("moe.n_zero", e.n_zero, (0,)),
            ("moe.rule.residual", r.residual, ("none",)),
            ("moe.rule.router_layers", r.router_layers, (1,)),
            ("moe.rule.logit_norm", r.logit_norm, (0.0,)),
            ("moe.rule.bias_rate", r.bias_rate, (0.0,)),
            ("moe.rule.gate", r.gate, layout.gates),
            ("moe.input_scale", e.input_scale, (1.0,)),
        )
    )
    if beyond is not None:
        raise ConversionError(f"{none}: {beyond}")
