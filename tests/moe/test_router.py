"""Routing at its edges: ties, certainty, tokens of zeros, zero experts alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import moe
from moepp_jax.moe import router
from tests.moe import cases


def route(logits_N, first_zero, k=2, **rules):
    """Routes one token of given logits."""
    x = jnp.asarray(logits_N, jnp.float32)[None, None]
    own = {"w": jnp.eye(x.shape[-1])}
    rules = moe.Router(router.top_k(k), residual=router.no_residual, **rules)
    return moe.route(x, jnp.zeros_like(x), own, rules, first_zero)


def test_of_equal_scores_the_lower_number_wins():
    assert route([1.0, 3.0, 3.0, 3.0], first_zero=4, k=3).experts.tolist() == [[[1, 2, 3]]]
    assert route([0.0] * 4, first_zero=4).experts.tolist() == [[[0, 1]]]


@pytest.mark.parametrize("rule", cases.GATES)
def test_zero_experts_alone(rule):
    """What only zero experts serve has a gate of 0 where zero experts weigh nothing."""

    def gates(logits):
        return route(logits, first_zero=2, gate=cases.GATES[rule]).gates[0, 0]

    logits = jnp.array([0.0, 0.0, 3.0, 2.0])
    if rule == "renormalise_nonzero":
        np.testing.assert_array_equal(gates(logits), [0.0, 0.0])
    else:
        assert np.all(gates(logits) > 0)
    assert np.all(np.isfinite(jax.jit(jax.jacobian(gates))(logits)))


def test_beside_a_zero_expert_the_other_weighs_one():
    gates = route([2.0, 0.0, 3.0], first_zero=2).gates
    np.testing.assert_array_equal(gates, [[[0.0, 1.0]]])


@pytest.mark.parametrize("rule", cases.GATES)
def test_gradients_are_finite_however_sure_the_router_is(rule):
    """The best expert leads by `gap`: the second's probability is exp(-gap), in the end 0."""

    @jax.jit
    @jax.jacobian
    def slopes(logits):
        return route(logits, first_zero=3, gate=cases.GATES[rule]).gates[0, 0]

    for gap in (20.0, 50.0, 80.0, 200.0):
        for logits in ([gap, 0.0, -1.0, -2.0], [0.0, -1.0, -2.0, gap]):  # FFN first, zero first
            assert np.all(np.isfinite(slopes(jnp.array(logits)))), logits


@pytest.mark.parametrize(
    "normalise",
    [router.as_they_are, router.divided_by_deviation(1.0)],
    ids=["as they are", "normalised"],
)
def test_a_token_of_zeros(normalise):
    """A padding token whose embedding is zeros has equal logits, with no deviation to divide by."""

    def probs(logits):
        return route(logits, first_zero=3, normalise=normalise).probs[0, 0]

    np.testing.assert_allclose(probs(jnp.zeros(4)), np.full(4, 0.25))
    assert np.all(np.isfinite(jax.jit(jax.jacobian(probs))(jnp.zeros(4))))


def test_rules_of_ones_own():
    """Sigmoid scores, selected with a bias that the gates do not have (arXiv 2408.15664)."""
    bias = jnp.array([0.0, 0.0, 1.0, 0.0])
    rules = moe.Router(
        select=lambda scores: jax.lax.top_k(scores + bias, 2)[1],
        residual=router.no_residual,
        score=jax.nn.sigmoid,
        gate=router.raw,
    )
    x = jnp.array([[[1.0, 2.0, -3.0, 0.0]]])
    r = moe.route(x, jnp.zeros_like(x), {"w": jnp.eye(4)}, rules, 4)
    assert r.experts.tolist() == [[[2, 1]]]
    np.testing.assert_allclose(r.gates, [[[1 / (1 + np.exp(3.0)), 1 / (1 + np.exp(-2.0))]]], 1e-6)
