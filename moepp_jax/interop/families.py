"""Models of others that are ours but for their names: a family is one row of a table.

A row says which fields of config.json and which tensors a family has; it is read to upcycle, and
written where a model of ours is one of that family. All are pre-norm transformers with RMSNorm,
rotary positions and SwiGLU, as in `transformers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from moepp_jax.config import Config
from moepp_jax.interop import fields as values
from moepp_jax.interop.errors import ConversionError
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
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "n_shared_experts": 0,
    "num_shared_experts": 0,
    "shared_expert_intermediate_size": 0,
}
# Tables of the rotary embedding, which old checkpoints hold and nothing reads.
_UNREAD = ".rotary_emb.inv_freq"


class Family(NamedTuple):
    """How models of one kind are written down.

    Attributes:
      model_type: in config.json.
      architecture: its class.
      ffn: prefix of the tensors behind a layer's second norm.
      matrices: the SiLU half, the linear half, the matrix out.
      qk_norm: as config.model.qk_norm.
      width: the field with the width of one FFN.
      experts: fields that may have the number of experts; a dense model has none.
      window: whether its class reads sliding_window: "never", "always", or "switched" on by
        use_sliding_window.
      absent: what its class takes for absent fields, where that is not in _FIELDS.
    """

    model_type: str
    architecture: str
    ffn: str = "mlp."
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    qk_norm: str = "none"
    width: str = "intermediate_size"
    experts: tuple[str, ...] = ()
    window: str = "never"
    absent: Mapping[str, Any] = {}


LLAMA = Family("llama", "LlamaForCausalLM")
MISTRAL = Family("mistral", "MistralForCausalLM", window="always", absent={"sliding_window": 4096})
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    qk_norm="head",
    window="switched",
    absent={"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
)
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    ffn="block_sparse_moe.",
    matrices=("w1", "w3", "w2"),
    experts=("num_local_experts", "num_experts"),
    window="always",
    absent={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "norm_topk_prob": True},
)
OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    qk_norm="full",
    experts=("num_experts", "num_local_experts"),
    absent={"rms_norm_eps": 1e-5},
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    qk_norm="head",
    width="moe_intermediate_size",
    experts=("num_experts", "num_local_experts"),
    window="switched",
    absent={"sliding_window": 4096},
)
FAMILIES = {f.model_type: f for f in (LLAMA, MISTRAL, QWEN3, MIXTRAL, OLMOE, QWEN3_MOE)}


def family_of(fields: Fields) -> Family:
    """
    Raises:
      ConversionError: the model_type is none of these.
    """
    named = fields.get("model_type")
    if named not in FAMILIES:
        raise ConversionError(f"model_type = {named!r} must be one of {', '.join(FAMILIES)}")
    return FAMILIES[named]


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
            "moe_every": 1,
            "tied_embeddings": got["tie_word_embeddings"],
            **values.rope(fields, got["rope_theta"], ("linear", "llama3")),
            "sliding_window": _window(family, fields, got),
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

    def moe(block: int) -> Places:
        if not family.experts:
            return expert(family.ffn, block, 0)
        if fused:
            return {
                "mlp.gate.weight": _of_ffn(ours.place(router, block), config),
                "mlp.experts.gate_up_proj": ours.place(w_in, block, merged=1),
                "mlp.experts.down_proj": ours.place(w_out, block),
            }
        found = {f"{family.ffn}gate.weight": _of_ffn(ours.place(router, block), config)}
        for i in range(config.moe.n_ffn):
            found |= expert(f"{family.ffn}experts.{i}.", block, i)
        return found

    return around(config, ours, moe)


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


def _window(family: Family, fields: Fields, got: Mapping[str, Any]) -> int:
    """How many tokens each sees, itself among them; 0: sequences of the model's length all.

    Raises:
      ConversionError: it differs by layer, is no number, or is one that the class does not read.
    """
    name, longest = "sliding_window", got["max_position_embeddings"]
    window = fields.get(name, family.absent.get(name))
    if family.window == "switched" and not fields.get("use_sliding_window"):
        window = None
    kinds = set(fields.get("layer_types") or _kinds(family, fields, got, window))
    full, sliding = "full_attention", "sliding_attention"
    for kind in kinds - {full, sliding}:
        raise ConversionError(f"layer_types has {kind!r}, only {full!r} and {sliding!r} are known")
    if len(kinds) > 1:
        raise ConversionError(
            f"layer_types, or max_window_layers, gives some layers {full} and others {sliding}, "
            "which is not supported: all layers must be alike"
        )
    if kinds == {sliding} and window is None:
        raise ConversionError(f"layer_types has {sliding!r}, and there is no {name}")
    if window is None or kinds == {full}:
        return 0
    if type(window) is not int or window < 1:
        raise ConversionError(f"{name} = {window!r} must be null or at least 1")
    if window >= longest:
        return 0
    if family.window == "never":
        raise ConversionError(
            f"{name} = {window} is not supported: {family.architecture} does not read it"
        )
    return window


def _kinds(family: Family, fields: Fields, got: Mapping[str, Any], window: Any) -> list[str]:
    """Each layer's attention where layer_types does not say it."""
    layers, first = got["num_hidden_layers"], 0
    if "max_window_layers" in family.absent:
        default = family.absent["max_window_layers"]
        first = values.number(fields, "max_window_layers", int, default)
    return [
        "sliding_attention" if window is not None and i >= first else "full_attention"
        for i in range(layers)
    ]
