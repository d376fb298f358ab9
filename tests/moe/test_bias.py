"""The router's bias: what it changes, what it leaves alone, and the rule that moves it."""

import jax
import jax.numpy as jnp
import numpy as np

from moepp_jax import moe
from moepp_jax.moe.rules.moepp import NEVER

POOL = moe.Pool(n_ffn=2, n_const=0, n_copy=1, n_zero=1)


def routed(bias_N):
    """One token with logits 1, 2, 3, 4 of two FFN experts, copy and zero."""
    x = jnp.array([[[1.0, 2.0, 3.0, 4.0]]])
    params = {"w": jnp.eye(4), "w_residual": jnp.zeros((4, 4)), "bias": jnp.array(bias_N)}
    return rule().route(x, jnp.zeros_like(x), params)


def rule(**options):
    return moe.rules.make("moepp", POOL, **({"bias_rate": 0.2} | options))


def test_a_bias_changes_choice_and_gates_and_not_what_the_next_layer_reads():
    r = routed([0.0, 0.0, -1.5, 0.0])
    assert r.experts.tolist() == [[[3, 1]]]
    np.testing.assert_allclose(r.scores[0, 0], jax.nn.softmax(jnp.array([1.0, 2.0, 1.5, 4.0])))
    np.testing.assert_array_equal(r.logits[0, 0], [1.0, 2.0, 3.0, 4.0])


def test_an_expert_that_is_never_chosen_leaves_the_others_as_if_it_were_not_there():
    r = routed([0.0, 0.0, NEVER, NEVER])
    assert r.experts.tolist() == [[[1, 0]]]
    np.testing.assert_allclose(r.gates[0, 0], jax.nn.softmax(jnp.array([2.0, 1.0])), rtol=1e-6)
    np.testing.assert_allclose(r.scores[0, 0, 2:], 0.0, atol=1e-11)


def test_the_bias_has_no_gradient():
    layer = moe.MoE(rule(), moe.dropless())
    params = moe.init(jax.random.key(0), moe.describe(layer.rule, 8, 4))
    x, previous = jnp.ones((1, 2, 8)), jnp.zeros((1, 2, 4))

    def total(params):
        y, _, stats = moe.local(x, previous, params, layer)
        return y.sum() + stats.prob[0, 0] + stats.z.sum()

    gradient = jax.grad(total)(params)["router"]
    np.testing.assert_array_equal(gradient["bias"], 0.0)
    assert np.any(gradient["w"])


def test_the_wanted_load_is_where_the_balance_loss_balances():
    """Every expert's eta f_i is then the same: K tau / (tau E + Z), with f = K / (tau E + Z)."""
    load = rule(top_k=2, tau=0.5).load
    wanted = 2 / (0.5 * 2 + 2)
    assert load == (0.5 * wanted, 0.5 * wanted, wanted, wanted)  # an FFN expert's eta is 1
    assert sum(load) == 2  # K assignments a token
    assert rule(top_k=2, tau=0.5).ffn_load == wanted


def test_biases_move_towards_the_wanted_load_and_ffn_experts_have_none():
    load = jnp.array([[0.9, 0.1, 0.25, 0.75], [0.0, 2.0, 0.5, 0.0], [0.0, 0.0, 2.0, 0.0]])
    stats = moe.Statistics(load, load, load, *[None] * 4, {})
    half = rule(top_k=1, tau=1e-9)  # two zero-computation experts share one choice: 1/2 each
    moved = half.update({"bias": jnp.ones((3, 4))}, stats)["bias"]
    expected = [[1, 1, 1.1, 0.9], [1, 1, 1, 1.2], [1, 1, 0.8, 1.2]]
    np.testing.assert_allclose(moved, expected, rtol=1e-6)
