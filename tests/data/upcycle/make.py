"""Makes the checkpoints of this folder and what `transformers` computes with them.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/data/upcycle/make.py [mistral ...]

Every folder is a tiny random model as `save_pretrained` writes it, and in expected.npz the ids
`input_ids` (2, 24) and their `logits` in float32. Matrices are large, so that tokens are routed
unlike, and norms are not all one.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

_SHARED = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE = {"num_local_experts": 6, "num_experts_per_tok": 2}
# model_type -> class, fields, and how it is saved.
MODELS = {
    "llama": (
        transformers.LlamaForCausalLM,
        {"intermediate_size": 40, "tie_word_embeddings": True, "head_dim": 10},
        {"max_shard_size": "10KB"},
    ),
    "mixtral": (
        transformers.MixtralForCausalLM,
        _MOE | {"intermediate_size": 20, "rope_theta": 50_000.0},
        {},
    ),
    "olmoe": (
        transformers.OlmoeForCausalLM,
        {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3},
        {"save_original_format": False},  # a layer's experts in two tensors
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeForCausalLM,
        _MOE | {"moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True},
        {},
    ),
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS["mistral"] = (
    transformers.MistralForCausalLM,
    {"intermediate_size": 40, "sliding_window": 5, "rope_parameters": _LLAMA3},
    {},
)
MODELS["qwen3"] = (transformers.Qwen3ForCausalLM, {"intermediate_size": 40, "head_dim": 8}, {})
COMMITTED = ("llama", "mistral", "mixtral", "olmoe", "qwen3_moe")


def make(name: str, folder: Path, seed: int = 0, **fields) -> None:
    """A model's checkpoint, with expected.npz."""
    torch.manual_seed(seed)
    kind, own, how = MODELS[name]
    model = kind(kind.config_class(**_SHARED | own | fields)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith("gate.weight"):
                parameter.normal_(0.0, 0.5)
        ids = torch.randint(3, _SHARED["vocab_size"], (2, 24))
        logits = model(ids).logits
    model.save_pretrained(folder, **how)
    (folder / "generation_config.json").unlink()
    np.savez(folder / "expected.npz", input_ids=ids.numpy(), logits=logits.numpy())


if __name__ == "__main__":
    root = Path(__file__).parent
    for model_type in COMMITTED:
        if sys.argv[1:] and model_type not in sys.argv[1:]:
            continue
        make(model_type, root / model_type)
        fields = json.loads((root / model_type / "config.json").read_text())
        print(model_type, "transformers", fields["transformers_version"], file=sys.stderr)
