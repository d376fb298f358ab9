"""Models of others that are ours but for their names: a family is one row of a table.

A row says which fields of config.json and which tensors a family has; it is read to upcycle, and
written where a model of ours is one of that family. All are pre-norm transformers with RMSNorm,
rotary positions and SwiGLU, as in `transformers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from moepp_jax.interop.errors import ConversionError
from moepp_jax.interop.fields import Fields

# Families that cannot be read, and what of them there is not.
_MLA = "multi-head latent attention (q_lora_rank, kv_lora_rank)"
_MISSING = {
    "longcat_flash": f"{_MLA}, and no layer of two attentions and two dense FFNs round one MoE; "
    "config.moe.rule.type = 'longcat' is its routing alone",
    "deepseek_v2": f"{_MLA}, no shared experts",
    "deepseek_v3": f"{_MLA}, no shared experts",
    "glm4_moe_lite": f"{_MLA}, no shared experts",
    "glm4_moe_lite_plus_plus": f"{_MLA}, no shared experts",
    "qwen2_moe": "bias of queries, keys and values (qkv_bias), and no shared expert "
    "(shared_expert_intermediate_size)",
}


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
      between: the field with the width of the dense layers that may stand between its MoE layers;
        empty: there are none.
      zero_computation: whether its routers have rows for experts beside the FFN experts.
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
    between: str = ""
    zero_computation: bool = False
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
    between="intermediate_size",
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
    if named in _MISSING:
        raise ConversionError(f"model_type = {named!r} is not supported: no {_MISSING[named]}")
    if named not in FAMILIES:
        raise ConversionError(f"model_type = {named!r} must be one of {', '.join(FAMILIES)}")
    return FAMILIES[named]
