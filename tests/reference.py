"""The authors' tiny checkpoints of tests/data/reference as our configurations and parameters."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from moepp_jax.config import Config
from moepp_jax.configs import base

ROOT = Path(__file__).parent / "data" / "reference"
NAMES = ("default", "mixtral_gating", "released_flags")


def expected(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(ROOT / name / "expected.npz"))


def config(name: str) -> Config:
    theirs = json.loads((ROOT / name / "config.json").read_text())
    mixtral = theirs["moe_use_mixtral_gating"]
    scaled = not (mixtral or theirs["moe_feature_no_mul_topk"])
    c = base.get_config()
    c.model.update(
        num_layers=theirs["num_hidden_layers"],
        hidden_size=theirs["hidden_size"],
        num_heads=theirs["num_attention_heads"],
        num_kv_heads=theirs["num_key_value_heads"],
        vocab_size=theirs["vocab_size"],
        rope_theta=theirs["rope_theta"],
        norm_eps=theirs["rms_norm_eps"],
        dtype="float32",
        loss_chunk=8,
    )
    c.moe.update(
        n_ffn=theirs["num_experts"][0] - 4,
        ffn_size=theirs["intermediate_size"],
        group_size=24,
        input_scale=2.0 if scaled else 1.0,
    )
    c.moe.rule.update(
        router_layers=2 if theirs["moe_2layer_gate"] else 1,
        logit_norm=theirs["moe_gate_norm_std"] if theirs["moe_use_logits_norm"] else 0.0,
        gate="softmax_selected" if mixtral else "renormalise_nonzero",
    )
    c.data.seq_len = 24
    return Config.parse(c)


def params(name: str) -> dict:
    """Their tensors under our names, every layer's stacked."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted((ROOT / name).glob("*.safetensors")):
        tensors |= load_file(file)
    c = config(name)
    D, E, J, F = c.model.hidden_size, c.moe.n_ffn, c.moe.n_const, c.moe.ffn_size

    def layer(i):
        def get(key):
            return tensors[f"model.layers.{i}.{key}.weight"]

        def expert(e, key):
            return tensors[f"model.layers.{i}.mlp.moe.experts.experts.{e}.{key}"]

        router = {"w_residual": get("mlp.moe.gate.gate_map")}
        if c.moe.rule.router_layers == 2:
            router["w_hidden"] = get("mlp.moe.gate.wg.0")
            router["w_logits"] = get("mlp.moe.gate.wg.2")
        else:
            router["w"] = get("mlp.moe.gate.wg")
        up = [expert(e, "up_proj.weight").reshape(2, F, D) for e in range(E)]
        down = [expert(e, "down_proj.weight") for e in range(E)]
        constants = range(E, E + J)
        return {
            "attention": {
                "q": get("self_attn.q_proj"),
                "k": get("self_attn.k_proj"),
                "v": get("self_attn.v_proj"),
                "o": get("self_attn.o_proj"),
            },
            "attention_norm": {"norm": get("input_layernorm")},
            "ffn_norm": {"norm": get("post_attention_layernorm")},
            "moe": {
                "router": router,
                "ffn": {"w_in": np.stack(up), "w_out": np.stack(down)},
                "const": {
                    "w": np.stack([expert(e, "wg.weight") for e in constants]),
                    "v": np.stack([expert(e, "constant") for e in constants]),
                },
            },
        }

    layers = [layer(i) for i in range(c.model.num_layers)]
    return {
        "embedding": tensors["model.embed_tokens.weight"],
        "output": tensors["lm_head.weight"],
        "final": {"norm": tensors["model.norm.weight"]},
        "layers": _stack(layers),
    }


def _stack(trees):
    if isinstance(trees[0], dict):
        return {key: _stack([t[key] for t in trees]) for key in trees[0]}
    return np.stack(trees)
