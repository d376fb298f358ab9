"""The router's bias: what it changes, what it leaves alone, and the rule that moves it."""

import jax
import jax.numpy as jnp
import numpy as np

from moepp_jax import moe
from moepp_jax.moe import bias, router

POOL = moe.Pool(n_ffn=2, n_const=0, n_copy=1, n_zero=1)


def routed(bias_N):
    """One token with logits 1, 2, 3, 4 of two FFN experts, copy and zero."""
    x = jnp.array([[[1.0, 2.0, 3.0, 4.0]]])
    params = {"w": jnp.eye(4), "w_residual": jnp.zeros((4, 4)), "bias": jnp.array(bias_N)}
    rules = moe.Router(router.top_k(2), bias=router.add_bias)
    return moe.route(x, jnp.zeros_like(x), params, rules, POOL.first_zero)


def test_a_bias_changes_choice_and_gates_and_not_what_the_next_layer_reads():
    r = routed([0.0, 0.0, -1.5, 0.0])
    assert r.experts.tolist() == [[[3, 1]]]
    np.testing.assert_allclose(r.probs[0, 0], jax.nn.softmax(jnp.array([1.0, 2.0, 1.5, 4.0])))
    np.testing.assert_array_equal(r.logits[0, 0], [1.0, 2.0, 3.0, 4.0])


def test_an_expert_that_is_never_chosen_leaves_the_others_as_if_it_were_not_there():
    r = routed([0.0, 0.0, bias.NEVER, bias.NEVER])
    assert r.experts.tolist() == [[[1, 0]]]
    np.testing.assert_allclose(r.gates[0, 0], jax.nn.softmax(jnp.array([2.0, 1.0])), rtol=1e-6)
    np.testing.assert_allclose(r.probs[0, 0, 2:], 0.0, atol=1e-11)


def test_the_bias_has_no_gradient():
    gradient = jax.grad(lambda b: routed(b).gates[0, 0, 0])([0.5, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(gradient, 0.0)


def test_the_wanted_load_is_where_the_balance_loss_balances():
    """Every expert's eta f_i is then the same: K tau / (tau E + Z), with f = K / (tau E + Z)."""
    wanted = bias.wanted_load(POOL, top_k=2, tau=0.5)
    assert wanted == 2 / (0.5 * 2 + 2)
    ffn = 0.5 * wanted  # an FFN expert's load, eta = 1
    assert 2 * ffn + 2 * wanted == 2  # K assignments a token


def test_biases_move_towards_the_wanted_load_and_ffn_experts_have_none():
    load = jnp.array([[0.9, 0.1, 0.25, 0.75], [0.0, 2.0, 0.5, 0.0], [0.0, 0.0, 2.0, 0.0]])
    moved = bias.moved(jnp.ones((3, 4)), load, POOL, wanted=0.5, rate=0.2)
    expected = [[1, 1, 1.1, 0.9], [1, 1, 1, 1.2], [1, 1, 0.8, 1.2]]
    np.testing.assert_allclose(moved, expected, rtol=1e-6)
