"""Tiny random checkpoints in the released layout, over every flag of config.json."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from tests import authors

# Choices that are drawn one by one; those of shapes depend on each other and are in `fields`.
_CHOICES = {
    "vocab_size": (5, 17, 64, 101, 257),
    "intermediate_size": (1, 3, 8, 20, 37),
    "num_hidden_layers": (1, 2, 3, 4, 5),
    "moe_use_mixtral_gating": (False, True),
    "moe_2layer_gate": (False, True),
    "moe_use_logits_norm": (False, True),
    "moe_gate_norm_std": (1.0, 0.3, 0.8, 2.5, 2),
    "moe_feature_no_mul_topk": (False, True),
    "moe_expert_interval": (1,),
    "initializer_range": (0.01, 0.02, 1),
    "rms_norm_eps": (1e-6, 1e-5, 1e-2, 1e-12),
    "rope_theta": (10_000.0, 10_000, 100.0, 50_000.0, 1e6, 7.5),
    "rope_scaling": (
        None,
        {"type": "linear", "factor": 2.0},
        {"type": "linear", "factor": 8},
        {"type": "linear", "factor": 1.0},
        {"rope_type": "linear", "factor": 1.5},
    ),
    "tie_word_embeddings": (False, False, True),
    "max_position_embeddings": (4, 7, 64, 333, 2048),
    "hidden_act": ("silu",),
    "torch_dtype": ("float32", "bfloat16", "float16"),
    "bos_token_id": (1, 0, None),
    "eos_token_id": (2, [2, 3], None),
    "pad_token_id": (0, None, -1),
    "pretraining_tp": (1, 2),
    "use_cache": (True, False),
}
# What their class takes for absent fields, and what says nothing: half of them are left out.
_LEFT_OUT = authors.DEFAULTS | {
    "moe_expert_interval": 1,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "use_cache": True,
}
# Of no effect on what is computed.
_HARMLESS = {
    "architectures": ["MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.1,
    "sliding_window": None,
    "quantization_config": None,
    "auto_map": {"AutoConfig": "configuration_moe_plus_plus.MoeConfig"},
    "notes": {"of": ["mine", 1, None]},
    "transformers_version": "4.40.2",
}


def fields(rng: np.random.Generator, **forced) -> dict:
    """A config.json that is one of theirs."""
    c = {name: _one(rng, choices) for name, choices in _CHOICES.items()} | forced
    heads, width = _one(rng, (1, 2, 3, 4, 6, 8)), _one(rng, (2, 4, 6, 8, 16))
    N = _one(rng, (5, 6, 8, 12, 23))
    drawn = {
        "model_type": "MoE++",
        "hidden_size": heads * width,
        "num_attention_heads": heads,
        "num_key_value_heads": _one(rng, [n for n in range(1, heads + 1) if heads % n == 0]),
        "num_experts": _one(rng, ([N], [N] * c["num_hidden_layers"], N)),
    }
    c = drawn | c
    for name, value in (_LEFT_OUT | {"num_key_value_heads": c["num_attention_heads"]}).items():
        if c[name] == value and rng.random() < 0.5:
            del c[name]
    return c | {name: value for name, value in _HARMLESS.items() if rng.random() < 0.3}


def tensors(rng: np.random.Generator, fields: dict) -> dict[str, np.ndarray]:
    """Such that signals keep their size; in the types that config.json names, or some in others."""
    c = authors.DEFAULTS | fields
    D, F, V = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    N, H = np.ravel(c["num_experts"])[0], c["num_attention_heads"]
    kv_width = D // H * c.get("num_key_value_heads", H)
    made = {"model.embed_tokens.weight": rng.normal(size=(V, D))}

    def matrix(name, *shape, scale=1.2):
        made[f"{name}.weight"] = scale / np.sqrt(shape[-1]) * rng.normal(size=shape)

    def norm(name):
        made[f"{name}.weight"] = rng.uniform(0.5, 1.5, D)

    norm("model.norm")
    if not c["tie_word_embeddings"]:
        matrix("lm_head", V, D)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        norm(f"{layer}input_layernorm")
        norm(f"{layer}post_attention_layernorm")
        for part, width in (("q", D), ("k", kv_width), ("v", kv_width), ("o", D)):
            matrix(f"{layer}self_attn.{part}_proj", width, D)
        gate = f"{layer}mlp.moe.gate."
        if c["moe_2layer_gate"]:
            matrix(f"{gate}wg.0", 8 * N, D)
            matrix(f"{gate}wg.2", N, 8 * N)
        else:
            matrix(f"{gate}wg", N, D)
        matrix(f"{gate}gate_map", N, N, scale=0.7)
        for e in range(N - 2):
            expert = f"{layer}mlp.moe.experts.experts.{e}."
            if e < N - 4:
                matrix(f"{expert}up_proj", 2 * F, D)
                matrix(f"{expert}down_proj", D, F)
            else:
                matrix(f"{expert}wg", 2, D)
                made[f"{expert}constant"] = rng.normal(size=D)
    mixed = rng.random() < 0.2
    types = _CHOICES["torch_dtype"] if mixed else (c["torch_dtype"],)
    return {name: a.astype(jnp.dtype(_one(rng, types))) for name, a in made.items()}


def save(
    rng: np.random.Generator, folder: Path, fields: dict, tensors: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Writes a checkpoint, of one file or several; returns its tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    if fields.get("tie_word_embeddings") and rng.random() < 0.5:
        tensors = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    names, count = rng.permutation(sorted(tensors)).tolist(), _one(rng, (1, 1, 2, 5))
    if count == 1:
        save_file({name: tensors[name] for name in names}, folder / "model.safetensors")
        return tensors
    files = {}
    for i in range(count):
        file, part = f"model-{i + 1:05}-of-{count:05}.safetensors", names[i::count]
        save_file({name: tensors[name] for name in part}, folder / file)
        files |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def make(
    seed: int, folder: Path, length: int = 10, new: int = 4, **forced
) -> tuple[dict, dict[str, np.ndarray]]:
    """Writes a checkpoint with the expected.npz of `experiments.reference`.

    Nothing in it hangs by a thread: choices and greedy tokens are the same in float32.

    Returns:
      Its config.json and its tensors.
    """
    rng = np.random.default_rng(seed)
    while True:
        c = fields(rng, **forced)
        weights = tensors(rng, c)
        model = authors.Model(c, weights)
        tokens = rng.integers(c["vocab_size"], size=(2, length), dtype=np.int32)
        mask = np.arange(length) >= np.array([[length // 3], [0]])
        padded = np.where(mask, tokens, 0).astype(np.int32)
        prompt = tokens[:, : length // 2]
        plain, left_padded = model(tokens), model(padded, mask)
        greedy, lead = model.greedy(prompt, new)
        if min(plain.margin.min(), left_padded.margin[:, mask].min(), lead) > 5e-5:
            break
    weights = save(rng, folder, c, weights)
    np.savez(
        folder / "expected.npz",
        input_ids=tokens,
        **{name: a for name, a in plain._asdict().items() if name != "margin"},
        lm_loss=authors.loss(plain.logits, tokens),
        padded_ids=padded,
        padded_mask=mask,
        padded_logits=left_padded.logits,
        greedy_prompt=prompt,
        greedy_tokens=greedy,
    )
    return c, weights


def _one(rng: np.random.Generator, choices):
    return choices[rng.integers(len(choices))]
