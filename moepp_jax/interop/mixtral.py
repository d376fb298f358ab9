"""A config.json by which `transformers`' MixtralForCausalLM computes what a model of ours does."""

from __future__ import annotations

from typing import Any

from moepp_jax.config import Config
from moepp_jax.interop import fields as values
from moepp_jax.interop.errors import ConversionError
from moepp_jax.interop.families import MIXTRAL
from moepp_jax.moe import rules


def fields_of(config: Config) -> dict[str, Any]:
    """
    Raises:
      ConversionError: the model is none of that family; the message names the field.
    """
    m, e = config.model, config.moe
    kind = rules.fields_of(e.rule)["type"]
    if kind != "moepp":
        raise ConversionError(
            f"a Mixtral's config.moe.rule.type is always 'moepp', not {kind!r}: it cannot be "
            "written as one"
        )
    r = e.rule
    # Without zero experts these gates are one: softmax over all, the chosen ones over their sum.
    gates = ("renormalise_nonzero", "renormalise_all", "softmax_selected")
    beyond = values.first_beyond(
        (
            ("model.moe_every", m.moe_every, (1,)),
            ("model.qk_norm", m.qk_norm, ("none",)),
            ("moe.n_const", e.n_const, (0,)),
            ("moe.n_copy", e.n_copy, (0,)),
            ("moe.n_zero", e.n_zero, (0,)),
            ("moe.rule.residual", r.residual, ("none",)),
            ("moe.rule.router_layers", r.router_layers, (1,)),
            ("moe.rule.logit_norm", r.logit_norm, (0.0,)),
            ("moe.rule.bias_rate", r.bias_rate, (0.0,)),
            ("moe.rule.gate", r.gate, gates),
            ("moe.input_scale", e.input_scale, (1.0,)),
        )
    )
    if beyond is not None:
        raise ConversionError(f"a Mixtral's {beyond}: it cannot be written as one")
    return {
        "architectures": [MIXTRAL.architecture],
        "model_type": MIXTRAL.model_type,
        "vocab_size": m.vocab_size,
        "hidden_size": m.hidden_size,
        "intermediate_size": e.ffn_size,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads,
        "head_dim": m.head_dim or None,
        "num_local_experts": e.n_ffn,
        "num_experts_per_tok": r.top_k,
        "hidden_act": "silu",
        "max_position_embeddings": config.data.seq_len,
        "initializer_range": m.init_std,
        "rms_norm_eps": m.norm_eps,
        "rope_theta": m.rope_theta,
        "rope_scaling": values.rope_scaling(m.rope_scaling),
        "sliding_window": None,
        "router_aux_loss_coef": r.balance_weight,
        "tie_word_embeddings": m.tied_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
