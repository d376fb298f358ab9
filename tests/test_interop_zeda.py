"""ZEDA's checkpoints, which have zero-computation experts: read as they are, or refused."""

import numpy as np
import pytest

import moepp_jax
from moepp_jax import interop
from tests.released import SILENT, refused
from tests.test_upcycle import ROOT, checkpoint, close, fields_in, tensors_in

ZCE = {
    "architectures": ["Qwen3MoePlusPlusForCausalLM"],
    "num_local_experts": 4,
    "zce_nums": [2],
    "zce_types": ["zero"],
    "use_zce_mask": False,
}
DOWN = "mlp.experts.{}.down_proj.weight"


def zeda(folder, tensors=None, **changes):
    """The committed Qwen3-MoE without its last two experts' tensors; their rows are there."""
    without = [
        n for n in tensors_in(ROOT / "qwen3_moe") if ".experts.4." in n or ".experts.5." in n
    ]
    return checkpoint(
        folder, "qwen3_moe", dict.fromkeys(without) | (tensors or {}), **ZCE | changes
    )


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen3_moe_plus_plus"])
@pytest.mark.parametrize("renormalised", [True, False])
def test_zero_experts_are_experts_that_add_nothing(tmp_path, model_type, renormalised):
    how = {"norm_topk_prob": renormalised}
    tensors = tensors_in(ROOT / "qwen3_moe")
    silent = {n: 0 * a for n, a in tensors.items() if n.endswith((DOWN.format(4), DOWN.format(5)))}
    vanilla = checkpoint(tmp_path / "vanilla", "qwen3_moe", silent, **how)
    none = {"n_const": 0, "n_copy": 0, "n_zero": 0}
    interop.upcycle(vanilla, tmp_path / "a", **none, **SILENT)
    source = zeda(tmp_path / "source", model_type=model_type, **how)
    c = interop.from_hf(source, tmp_path / "b", **SILENT)
    assert (c.moe.pool, type(c.moe.rule).__name__) == ((4, 0, 0, 2), "ZEDARule")
    ids = np.load(ROOT / "qwen3_moe" / "expected.npz")["input_ids"]
    a, b = (moepp_jax.load(tmp_path / name) for name in ("a", "b"))
    close(b.logits(ids), np.asarray(a.logits(ids)))
    assert 0 < b.generate([[5, 6, 7]], max_new_tokens=3)[0][0] < 64


def test_copies_and_zero_experts_come_in_our_order(tmp_path):
    source = zeda(tmp_path / "source", zce_nums=[1, 1], zce_types=["copy", "zero"])
    c = interop.from_hf(source, tmp_path / "run", **SILENT)
    assert c.moe.pool == (4, 0, 1, 1) and c.moe.dispatch == "dropless"
    rows = moepp_jax.load(tmp_path / "run").params["layers"]["moe"]["router"]["w"]
    gate = tensors_in(source)["model.layers.1.mlp.gate.weight"]
    np.testing.assert_array_equal(rows[1], gate)
    out = []
    interop.to_hf(tmp_path / "run", tmp_path / "out", report=out.append)
    assert "their pool is always" in out[0]
    assert fields_in(tmp_path / "out")["model_type"] == "moepp_jax"
    again = interop.from_hf(tmp_path / "out", tmp_path / "again", c, **SILENT)
    assert (again.model, again.moe) == (c.model, c.moe)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_zce_mask": True}, "use_zce_mask = True must be false"),
        ({"use_zce_mask": None}, "use_zce_mask = None must be false"),
        ({"zce_nums": None}, "zce_nums = None must be a list"),
        ({"zce_nums": [0]}, r"zce_nums = \[0\] must be a list"),
        ({"zce_nums": [1, 1]}, r"zce_nums = \[1, 1\] must have one for each of \['zero'\]"),
        ({"zce_types": ["constant"]}, r"zce_types = \['constant'\] is not supported"),
        ({"zce_types": ["zero", "copy"]}, r"zce_types = \['zero', 'copy'\] is not supported"),
        ({"zce_nums": [3]}, r"gate.weight has shape \[6, 24\], .* must have \[7, 24\]"),
        ({"num_experts_per_tok": 5}, "zero_weight"),
    ],
)
def test_what_is_refused(tmp_path, changes, said):
    refused(zeda(tmp_path / "source", **changes), tmp_path, said)
