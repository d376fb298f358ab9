"""Without zero-computation experts the layer is a vanilla top-K mixture of experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import moe
from moepp_jax.moe import experts
from tests import vanilla
from tests.moe import cases
from tests.oracle import Spec


@pytest.mark.parametrize("gate", ["renormalise_nonzero", "renormalise_all", "softmax_selected"])
@pytest.mark.parametrize("path, slots", [("capacity", 6), ("capacity", 16), ("blocked", 16)])
def test_equals_vanilla(path, slots, gate):
    """Slots: ceil(gamma K S / E), 0.75 * 2 * 16 / 4 = 6 of the 16 tokens."""
    gamma = 0.75 if slots == 6 else None
    spec = Spec(4, top_k=2, tau=1.0, gamma=gamma, gate=gate, residual=False)
    p, x, previous = cases.case(spec)
    y, _, stats = jax.jit(lambda *a: moe.local(*a, cases.layer(spec, path)))(x, previous, p)
    exact = [np.float64(w) for w in (p["router"]["w"], p["ffn"]["w_in"], p["ffn"]["w_out"])]
    want = np.array([vanilla.moe(np.float64(group), *exact, 2, slots) for group in x])
    cases.close(y, want, 1e-6)
    dropped = np.asarray(stats.load - stats.kept).sum()
    assert (dropped > 0) == (slots == 6)


def _outputs_and_gradients(forward, p, x):
    def total(p, x):
        y = forward(p, x)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.grad(total, (0, 1), has_aux=True)).lower(p, x).compile()


@pytest.mark.parametrize("path", ["capacity", "blocked"])
@pytest.mark.parametrize("n_zero", [0, 2])
def test_nothing_is_computed_for_experts_that_add_nothing(path, n_zero):
    """The baseline pays for no zero-computation branch, and has the same bits as if it did."""
    spec = Spec(4, n_zero=n_zero, gamma=0.75 if path == "capacity" else None, residual=False)
    layer = cases.layer(spec, path)
    p, x, previous = jax.tree.map(jnp.asarray, cases.case(spec))

    def with_branch(p, x):
        r = layer.rule.route(x, previous, p["router"])
        y, kept = layer.path(x, r, p["ffn"], layer.rule, None)
        return y + experts.zero_computation(x, r.experts, r.gates, kept, {}, layer.pool)

    ours = _outputs_and_gradients(lambda p, x: moe.local(x, previous, p, layer)[0], p, x)
    wanted = _outputs_and_gradients(with_branch, p, x)
    assert "zero_computation" in wanted.as_text()
    assert "zero_computation" not in ours.as_text()
    for a, b in zip(*map(jax.tree.leaves, (ours(p, x), wanted(p, x))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_layers_of_one_pool_are_equal():
    """What follows from the pool is no part of what a layer is called or compared by."""
    a, b = (moe.MoE(cases.rule(Spec(4)), path=moe.dropless) for _ in range(2))
    assert a == b and hash(a) == hash(b) and "others" not in repr(a)
