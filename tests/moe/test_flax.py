"""The Flax module and `init`: the parameters of `local`, and nothing else beside it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import linen, moe
from tests.moe import cases
from tests.moe.test_meshes import mesh_of
from tests.oracle import Spec

B, L, S, D, F = 4, 16, 8, cases.D, cases.F

SPECS = {
    "all kinds": Spec(4, 2, 1, 1),
    "vanilla": Spec(4, residual=False),
    "two-layer gate": Spec(4, 0, 1, 1, two_layer=True),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_parameters(spec):
    """Those that the oracle wants, matrices of the given deviation and constants N(0, 1)."""
    layer = cases.layer(spec)
    params = moe.init(jax.random.key(0), moe.describe(layer.rule, D, F, std=0.03))
    N = len(spec.kinds)
    x, previous = jnp.zeros((B, L, D)), jnp.zeros((B, L, N))
    module = linen.MoEPP(layer, F, S, init_std=0.03)
    declared = jax.eval_shape(module.init, jax.random.key(0), x, previous)["params"]
    wanted = jax.tree.map(np.shape, cases.params(spec))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, declared) == wanted
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        std = 1.0 if path[-1].key == "v" else 0.03
        assert abs(np.std(leaf) / std - 1) < 4 / np.sqrt(2 * leaf.size), path


@pytest.mark.parametrize("mesh", [None, (2, 1, 4)], ids=str)
def test_equals_local(mesh):
    """Sequences are cut into groups in order; on a mesh it is the same."""
    spec = Spec(4, 2, 1, 1, gamma=0.6)
    layer = cases.layer(spec)
    p, x, previous = cases.case(spec, groups=B * L // S, size=S)
    module = linen.MoEPP(layer, F, S, mesh=mesh and mesh_of(mesh))
    y, logits, stats = jax.jit(module.apply)(
        {"params": p}, x.reshape(B, L, D), previous.reshape(B, L, -1)
    )
    assert len(logits.sharding.device_set) == (8 if mesh else 1)
    want_y, want_logits, want = jax.jit(lambda *a: moe.local(*a, layer))(x, previous, p)
    cases.close(y.reshape(x.shape), want_y, 1e-6)
    cases.close(logits.reshape(previous.shape), want_logits, 1e-6)
    np.testing.assert_array_equal(stats.kept, want.kept)
    assert np.any(want.kept < want.load)


def test_the_first_layer_has_no_logits_before_it():
    spec = SPECS["all kinds"]
    p, x, previous = cases.case(spec, groups=B, size=L)
    x, module = jnp.asarray(x), linen.MoEPP(cases.layer(spec), F, S)
    y, logits, _ = jax.jit(module.apply)({"params": p}, x)
    zeros = jnp.zeros_like(previous)
    want_y, want_logits, _ = jax.jit(module.apply)({"params": p}, x, zeros)
    np.testing.assert_array_equal(y, want_y)
    np.testing.assert_array_equal(logits, want_logits)


def test_computes_in_its_dtype():
    spec = SPECS["all kinds"]
    p, x, previous = cases.case(spec, groups=B, size=L)
    module = linen.MoEPP(cases.layer(spec), F, S, dtype=jnp.bfloat16)
    y, logits, _ = jax.eval_shape(
        module.apply, {"params": p}, jnp.asarray(x, jnp.bfloat16), jnp.asarray(previous)
    )
    assert (y.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)


def test_a_group_never_spans_two_sequences():
    """4 sequences of 6 tokens would make 3 groups of 8. Unless it holds whole ones."""
    layer = cases.layer(SPECS["all kinds"])
    x, previous = jnp.zeros((4, 6, D)), jnp.zeros((4, 6, 8))
    with pytest.raises(ValueError, match=r"8.*6"):
        jax.eval_shape(linen.MoEPP(layer, F, S).init, jax.random.key(0), x, previous)
    two = dataclasses.replace(layer, sequences=2)
    with pytest.raises(ValueError, match=r"6.*6.*moe.sequences = 2"):
        jax.eval_shape(linen.MoEPP(two, F, 6).init, jax.random.key(0), x, previous)
    shapes = jax.eval_shape(linen.MoEPP(two, F, 12).init, jax.random.key(0), x, previous)
    assert shapes["params"].keys() == {"router", "ffn", "const"}
