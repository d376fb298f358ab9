"""What a family's config.json and tensors are in a model of ours."""

from __future__ import annotations

from collections.abc import Iterable

from moepp_jax.config import Config
from moepp_jax.interop import fields as values
from moepp_jax.interop import patterns
from moepp_jax.interop.family import Family
from moepp_jax.interop.fields import Fields, Groups
from moepp_jax.interop.layout import Ours, Place, Places, around

# Fields that describe a model, with what a class takes for an absent one if its row says nothing.
# None: such a field must be there.
_FIELDS = {
    "vocab_size": None,
    "hidden_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
# Fields that may only have this value, or be absent or null.
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "clip_qkv": None,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "n_shared_experts": 0,
    "num_shared_experts": 0,
    "shared_expert_intermediate_size": 0,
}
# Tables of the rotary embedding, which old checkpoints hold and nothing reads.
_UNREAD = ".rotary_emb.inv_freq"


def groups(family: Family, fields: Fields, dtype: str | None = None) -> Groups:
    """The fields of config.model and config.moe by which a model of ours computes the same.

    It has a vanilla pool; a dense model's has one expert.

    Args:
      dtype: of the arithmetic; by default the one that the file names as the tensors' type.

    Raises:
      ConversionError: a field is missing, ill-typed, or asks for what we do not have.
    """
    got = {
        name: values.number(
            fields,
            name,
            int if default is None else type(default),
            family.absent.get(name, default),
        )
        for name, default in _FIELDS.items()
    }
    values.require_only(fields, _ONLY)
    every = patterns.moe_every(family, fields, got["num_hidden_layers"])
    between = {"dense_ffn_size": values.number(fields, family.between, int)} if every > 1 else {}
    heads = got["num_attention_heads"]
    experts = top_k = 1
    renormalised = True
    if family.experts:
        name = next((n for n in family.experts if fields.get(n) is not None), family.experts[0])
        experts = values.number(fields, name, int)
        top_k = values.number(fields, "num_experts_per_tok", int)
        default = family.absent.get("norm_topk_prob", False)
        renormalised = values.number(fields, "norm_topk_prob", bool, default)
    return {
        "model": {
            "num_layers": got["num_hidden_layers"],
            "hidden_size": got["hidden_size"],
            "num_heads": heads,
            "num_kv_heads": values.number(fields, "num_key_value_heads", int, heads),
            "head_dim": values.number(fields, "head_dim", int, family.absent.get("head_dim", 0)),
            "qk_norm": family.qk_norm,
            "vocab_size": got["vocab_size"],
            "moe_every": every,
            **between,
            "tied_embeddings": got["tie_word_embeddings"],
            **values.rope(fields, got["rope_theta"], ("linear", "llama3")),
            "sliding_window": patterns.window(family, fields, got),
            "norm_eps": got["rms_norm_eps"],
            "init_std": got["initializer_range"],
            "dtype": dtype or values.dtype(fields),
        },
        "moe": {
            "n_ffn": experts,
            "n_const": 0,
            "n_copy": 0,
            "n_zero": 0,
            "ffn_size": values.number(fields, family.width, int),
            "input_scale": 1.0,
        },
        "moe.rule": {
            "type": "moepp",
            "top_k": top_k,
            "router_layers": 1,
            "logit_norm": 0.0,
            "bias_rate": 0.0,
            "residual": "none",
            "gate": "renormalise_nonzero" if renormalised else "raw",
        },
    }


def length(fields: Fields) -> int:
    """Of the sequences that the model was made for."""
    name = "max_position_embeddings"
    return values.number(fields, name, int, _FIELDS[name])


def places(family: Family, config: Config, fused: bool = False) -> Places:
    """Every tensor's name and place in a model of ours with a vanilla pool.

    Args:
      fused: a layer's experts are in two tensors, as `transformers` 5 has them in memory and, asked
        for it, saves them; else every expert has its own, as published.
    """
    ours, (gate, up, out) = Ours(config), family.matrices
    w_in, w_out, router = (f"layers/moe/{leaf}" for leaf in ("ffn/w_in", "ffn/w_out", "router/w"))

    def expert(prefix: str, block: int, i: int) -> Places:
        return {
            f"{prefix}{out}.weight": ours.place(w_out, block, i),
            f"{prefix}{gate}.weight": ours.place(w_in, block, i, 0),
            f"{prefix}{up}.weight": ours.place(w_in, block, i, 1),
        }

    def gates(block: int) -> Place:
        place = ours.place(router, block)
        return place if family.zero_computation else _of_ffn(place, config)

    def dense(leaf: str, block: int) -> Places:
        return {
            f"{family.ffn}{gate}.weight": ours.place(f"{leaf}/w_in", block, 0),
            f"{family.ffn}{up}.weight": ours.place(f"{leaf}/w_in", block, 1),
            f"{family.ffn}{out}.weight": ours.place(f"{leaf}/w_out", block),
        }

    def moe(block: int) -> Places:
        if not family.experts:
            return expert(family.ffn, block, 0)
        if fused:
            return {
                "mlp.gate.weight": gates(block),
                "mlp.experts.gate_up_proj": ours.place(w_in, block, merged=1),
                "mlp.experts.down_proj": ours.place(w_out, block),
            }
        found = {f"{family.ffn}gate.weight": gates(block)}
        for i in range(config.moe.n_ffn):
            found |= expert(f"{family.ffn}experts.{i}.", block, i)
        return found

    return around(config, ours, moe, dense)


def _of_ffn(router: Place, config: Config) -> Place:
    """The rows that a vanilla pool has."""
    shape = (config.moe.n_ffn, *router.shape[1:])
    return router._replace(piece=shape, shape=shape)


def are_fused(names: Iterable[str]) -> bool:
    """Whether these tensors' names are those of fused experts."""
    return any(name.endswith(".mlp.experts.gate_up_proj") for name in names)


def is_unread(name: str) -> bool:
    """Whether a tensor is nothing that a model learnt, and is computed anew."""
    return name.endswith(_UNREAD)
