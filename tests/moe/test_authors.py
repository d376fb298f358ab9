"""The authors' numbers: tests/data/reference holds tiny checkpoints and what their code computed.

Their router logits must give their choices and gates, in the package and in the oracle; and with
an attention written here, their hidden states must give whole layers.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from moepp_jax import moe
from tests import oracle
from tests.moe import cases
from tests.oracle import Spec

ROOT = Path(__file__).parents[1] / "data" / "reference"
NAMES = ("default", "mixtral_gating", "released_flags")


@functools.cache
def checkpoint(name):
    """(config.json, Spec, expected numbers)."""
    theirs = json.loads((ROOT / name / "config.json").read_text())
    mixtral = theirs["moe_use_mixtral_gating"]
    spec = Spec(
        n_ffn=theirs["num_experts"][0] - 4,
        n_const=2,
        n_copy=1,
        n_zero=1,
        gate="softmax_selected" if mixtral else "renormalise_nonzero",
        two_layer=theirs["moe_2layer_gate"],
        logit_std=theirs["moe_gate_norm_std"] if theirs["moe_use_logits_norm"] else None,
        input_scale=1.0 if mixtral or theirs["moe_feature_no_mul_topk"] else 2.0,
    )
    return theirs, spec, dict(np.load(ROOT / name / "expected.npz"))


@functools.cache
def tensors(name):
    files = sorted((ROOT / name).glob("*.safetensors"))
    return {key: value for file in files for key, value in load_file(file).items()}


def layer_params(name, i):
    """One MoE++ layer's tensors under the package's names."""
    _, spec, _ = checkpoint(name)
    E = spec.n_ffn

    def get(key):
        return tensors(name)[f"model.layers.{i}.mlp.moe.{key}"]

    def experts(numbers, key):
        return np.stack([get(f"experts.experts.{e}.{key}") for e in numbers])

    if spec.two_layer:
        gate = {"w_hidden": get("gate.wg.0.weight"), "w_logits": get("gate.wg.2.weight")}
    else:
        gate = {"w": get("gate.wg.weight")}
    up = experts(range(E), "up_proj.weight")  # the SiLU half first
    constants = range(E, E + spec.n_const)
    return {
        "router": gate | {"w_residual": get("gate.gate_map.weight")},
        "ffn": {
            "w_in": up.reshape(E, 2, -1, up.shape[-1]),
            "w_out": experts(range(E), "down_proj.weight"),
        },
        "const": {
            "w": experts(constants, "wg.weight"),
            "v": experts(constants, "constant"),
        },
    }


def after_attention(name, i, h_BLD):
    """The residual stream that layer i's MoE++ layer adds to: h + attention(norm(h))."""
    config, _, _ = checkpoint(name)
    B, L, D = h_BLD.shape
    H, KV = config["num_attention_heads"], config["num_key_value_heads"]
    W = D // H
    angle = np.arange(L)[:, None] * config["rope_theta"] ** (-np.arange(0, W, 2) / W)
    x = normalised(name, f"layers.{i}.input_layernorm", h_BLD)

    def project(key, heads):
        w = np.float64(tensors(name)[f"model.layers.{i}.self_attn.{key}_proj.weight"])
        return (x @ w.T).reshape(B, L, heads, W).swapaxes(1, 2).repeat(H // heads, axis=1)

    def rotate(a):
        real, imaginary = np.split(a, 2, axis=-1)
        turned = (real + 1j * imaginary) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    q, k, v = rotate(project("q", H)), rotate(project("k", KV)), project("v", KV)
    scores = np.where(np.tri(L, dtype=bool), q @ k.swapaxes(2, 3) / np.sqrt(W), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(B, L, D)
    return h_BLD + y @ np.float64(tensors(name)[f"model.layers.{i}.self_attn.o_proj.weight"]).T


def normalised(name, key, h):
    eps = checkpoint(name)[0]["rms_norm_eps"]
    scale = tensors(name)[f"model.{key}.weight"]
    return h / np.sqrt((h**2).mean(-1, keepdims=True) + eps) * scale


def dense(experts, values, n):
    """values of the chosen at the places of their experts, zeros elsewhere."""
    return (np.asarray(values)[..., None] * (experts[..., None] == np.arange(n))).sum(axis=-2)


@pytest.mark.parametrize("name", NAMES)
def test_choices_and_gates(name):
    """`selected` and `gates` of every token, the chosen zero experts among the selected.

    A selected zero expert's gate is 0 in their default gating; with Mixtral's it has a gate, of
    which nothing comes.
    """
    _, spec, want = checkpoint(name)
    logits = want["router_logits"]
    N = logits.shape[-1]
    own = {"w": jnp.eye(N)}  # the residual is in these logits already
    as_given = cases.rule(dataclasses.replace(spec, residual=False, two_layer=False))
    x = jnp.asarray(logits.reshape(-1, 24, N))
    r = as_given.route(x, jnp.zeros_like(x), own)
    experts = np.asarray(r.experts)
    selected = want["selected"].reshape(-1, 24, N)
    gates = want["gates"].reshape(-1, 24, N)
    np.testing.assert_array_equal(r.logits, x)
    np.testing.assert_array_equal(dense(experts, np.ones_like(experts), N) > 0, selected)
    np.testing.assert_allclose(dense(experts, r.gates, N), gates, atol=1e-6)

    zeros = selected[..., -spec.n_zero :]
    assert zeros.any(), "the data must hold tokens that choose the zero expert"
    assert (gates[..., -spec.n_zero :][zeros] > 0).all() == (spec.gate == "softmax_selected")

    plain = Spec(*as_given.pool, gate=spec.gate, logit_std=spec.logit_std, residual=False)
    for g, s in np.ndindex(x.shape[:2]):
        _, _, chosen, gate = oracle.route(plain, np.float64(x[g, s]), None, {"w": np.eye(N)})
        np.testing.assert_array_equal(np.flatnonzero(selected[g, s]), sorted(chosen))
        np.testing.assert_allclose(gate, gates[g, s, chosen], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_layers(name):
    """Router logits and output of every layer, from the hidden states before it.

    The last hidden states are those after the final norm, so it is applied to ours too.
    """
    _, spec, want = checkpoint(name)
    states, theirs = np.float64(want["hidden_states"]), want["router_logits"]
    depth = len(theirs)
    previous = np.zeros_like(theirs[0])
    run = jax.jit(lambda *a: moe.local(*a, cases.layer(spec, "blocked")))
    for i in range(depth):
        p = layer_params(name, i)
        stream = after_attention(name, i, states[i])
        x = np.float32(normalised(name, f"layers.{i}.post_attention_layernorm", stream))
        exact = oracle.layer(spec, x, previous, p)
        y, logits, _ = run(x, previous, p)
        for layer_y, layer_logits in [(exact.y, exact.logits), (np.float64(y), logits)]:
            after = stream + layer_y
            if i == depth - 1:
                after = normalised(name, "norm", after)
            cases.close(layer_logits, theirs[i], 1e-6, f"router logits of layer {i}")
            cases.close(after, states[i + 1], 1e-6, f"output of layer {i}")
        previous = theirs[i]
