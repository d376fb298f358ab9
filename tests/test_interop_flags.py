"""Checkpoints with other flags than the reference's: every one gives the authors' numbers."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import moepp_jax
from moepp_jax import interop
from moepp_jax.experiments import reference as experiment
from tests import authors, checkpoints, reference

SILENT = {"report": lambda line: None}

# What the reference has not: scaled positions, tied embeddings, one key head, few or many experts.
FIXED = {
    "smallest pool": {
        "num_experts": 5,
        "moe_2layer_gate": True,
        "moe_use_logits_norm": True,
        "moe_gate_norm_std": 2.5,
        "moe_use_mixtral_gating": False,
        "moe_feature_no_mul_topk": False,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_theta": 100.0,
        "rms_norm_eps": 1e-2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4,
        "torch_dtype": "bfloat16",
    },
    "large pool": {
        "num_experts": [23],
        "moe_2layer_gate": True,
        "moe_use_logits_norm": False,
        "moe_use_mixtral_gating": True,
        "moe_feature_no_mul_topk": False,
        "hidden_size": 18,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "num_hidden_layers": 1,
        "vocab_size": 101,
        "rope_scaling": {"rope_type": "linear", "factor": 1.5},
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    },
}


def require_the_same(folder, fields, tensors):
    """What was converted to and fro: every byte of the tensors, every field."""
    found = {n: a for file in folder.glob("*.safetensors") for n, a in load_file(file).items()}
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        assert found[name].dtype == values.dtype and found[name].shape == values.shape
        assert found[name].tobytes() == values.tobytes(), name
    assert json.loads((folder / "config.json").read_text()) == fields


@pytest.mark.parametrize("name", FIXED)
def test_logits_and_bytes(tmp_path, name):
    source = tmp_path / "source"
    fields, tensors = checkpoints.make(1, source, new=1, **FIXED[name])
    interop.from_hf(source, tmp_path / "run", dtype="float32", **SILENT)
    want = np.load(source / "expected.npz")
    mask = want["padded_mask"]
    both = np.concatenate([want["input_ids"], want["padded_ids"]])
    got = moepp_jax.load(tmp_path / "run").logits(both, np.concatenate([mask | True, mask]))
    for ours, theirs in ((got[:2], want["logits"]), (got[2:][mask], want["padded_logits"][mask])):
        difference = experiment._difference(np.asarray(ours), theirs)
        assert difference.relative <= experiment.TOLERANCE
    interop.to_hf(tmp_path / "run", tmp_path / "back", **SILENT)
    require_the_same(tmp_path / "back", fields, tensors)


# Of the first one's greedy tokens some are ends of a text.
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 60))]
)
def test_everything(tmp_path, seed):
    source = tmp_path / "source"
    fields, tensors = checkpoints.make(seed, source)
    interop.from_hf(source, tmp_path / "run", dtype="float32", **SILENT)
    found = experiment.differences(source, tmp_path / "run")
    assert {key: d for key, d in found.items() if not d.relative <= experiment.TOLERANCE} == {}
    interop.to_hf(tmp_path / "run", tmp_path / "back", **SILENT)
    require_the_same(tmp_path / "back", fields, tensors)


@pytest.mark.parametrize("name", reference.NAMES)
def test_the_model_that_is_compared_with_gives_the_references_numbers(name):
    want = reference.expected(name)
    model = authors.Model.load(reference.ROOT / name)
    got = model(want["input_ids"])
    for key in ("logits", "router_logits", "gates", "hidden_states"):
        assert experiment._difference(getattr(got, key), want[key]).relative < 2e-6, key
    np.testing.assert_array_equal(got.selected, want["selected"])
    assert authors.loss(got.logits, want["input_ids"]) == pytest.approx(want["lm_loss"], rel=1e-6)
    mask = want["padded_mask"].astype(bool)
    padded = model(want["padded_ids"], mask).logits[mask]
    assert experiment._difference(padded, want["padded_logits"][mask]).relative < 2e-6
    tokens, _ = model.greedy(want["greedy_prompt"], 12)
    np.testing.assert_array_equal(tokens, want["greedy_tokens"])
