"""Capacity, drops, statistics and losses by hand, and the paper's table of costs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moepp_jax import moe
from moepp_jax.moe import losses
from tests import oracle
from tests.oracle import Spec

# Two FFN experts (0, 1), copy (2), zero (3); K = 2, tau = 1/2, gamma = 1, one group of 3 tokens.
# 6 assignments to share out over tau * 2 + 2 = 3 parts: an FFN expert has 1/2 * 6 / 3 = 1 slot, a
# zero-computation expert 6 / 3 = 2.
#
#   token  probabilities       chosen     kept
#     0    .5  .1  .3  .1      FFN 0      yes, the first
#                              copy       yes, the first
#     1    .3  .1  .5  .1      copy       yes, the second
#                              FFN 0      no, token 0 has the only slot
#     2    .1  .2  .6  .1      copy       no, it has served two
#                              FFN 1      yes, the first
POOL = moe.Pool(2, 0, 1, 1)
RULE = moe.rules.make("moepp", POOL, top_k=2, tau=0.5, gate="raw", residual="none")
PROBS = np.array([[0.5, 0.1, 0.3, 0.1], [0.3, 0.1, 0.5, 0.1], [0.1, 0.2, 0.6, 0.1]])
# A shift of a token's logits changes no probability; log-sum-exp becomes 1, 0, -2.
LOGITS = np.log(PROBS) + np.array([[1.0], [0.0], [-2.0]])


@pytest.fixture(scope="module")
def table():
    def multiply(params, x_EBD):  # FFN expert 0 doubles, FFN expert 1 triples
        return params[:, None, None] * x_EBD

    layer = moe.MoE(
        RULE,
        moe.with_capacity(1.0, multiply),
    )
    params = {"router": {"w": jnp.eye(4)}, "ffn": jnp.array([2.0, 3.0])}
    x = jnp.asarray(LOGITS, jnp.float32)[None]
    return x, *jax.jit(lambda x: moe.local(x, jnp.zeros((1, 3, 4)), params, layer))(x)


def test_slots():
    assert moe.capacity(RULE.load, gamma=1.0, tokens=3) == (1, 1, 2, 2)


def test_output_with_drops(table):
    x, y, logits, _ = table
    # Token 0: .5 * 2 x + .3 x.  Token 1: .5 x.  Token 2: .2 * 3 x.
    np.testing.assert_allclose(y[0], np.array([[1.3], [0.5], [0.6]]) * x[0], rtol=1e-6)
    np.testing.assert_array_equal(logits, x)


def test_statistics(table):
    *_, stats = table
    third = 1 / 3
    np.testing.assert_allclose(stats.load[0], [2 * third, third, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(stats.kept[0], [third, third, 2 * third, 0], rtol=1e-6)
    np.testing.assert_allclose(stats.prob[0], [0.3, 0.4 / 3, 1.4 / 3, 0.1], rtol=1e-6)
    # Tokens 0 and 1: -(.5 ln .5 + .3 ln .3 + 2 * .1 ln .1) = .34657 + .36119 + .46052 = 1.16828.
    # Token 2: -(2 * .1 ln .1 + .2 ln .2 + .6 ln .6) = .46052 + .32189 + .30650 = 1.08890.
    np.testing.assert_allclose(stats.entropy[0], (2 * 1.16828 + 1.08890) / 3, atol=1e-5)
    np.testing.assert_allclose(stats.z[0], (1 + 0 + 4) / 3, rtol=1e-6)


def test_summary(table):
    summary = moe.summarise(jax.tree.map(lambda s: s.mean(0), table[-1]), POOL)
    # 2 of 6 assignments dropped; FFN 0 served one token and FFN 1 another.
    np.testing.assert_allclose(summary["drop_rate"], 2 / 6, rtol=1e-6)
    np.testing.assert_allclose(summary["ffn_experts_per_token"], 2 / 3, rtol=1e-6)


def test_drops_by_part_and_kind(table):
    """Three tokens in eight parts: parts 0, 2 and 5 have one each, of 2 choices."""
    *_, stats = table
    np.testing.assert_allclose(stats.asked[0] * 3, [2, 0, 2, 0, 0, 2, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(stats.served[0] * 3, [2, 0, 1, 0, 0, 1, 0, 0], rtol=1e-6)
    summary = moe.summarise(jax.tree.map(lambda s: s.mean(0), stats), POOL)
    np.testing.assert_allclose(summary["drop_rate_by_part"], [0, 0, 0.5, 0, 0, 0.5, 0, 0])
    # FFN: token 1's choice of expert 0, of three; no constants; copy: one of three; zero: unasked.
    np.testing.assert_allclose(summary["drop_rate_by_kind"], [1 / 3, 0, 1 / 3, 0], rtol=1e-6)


def test_parts_are_of_each_sequence():
    """Two sequences of 8 tokens in a group: all choices of both first tokens are in part 0."""
    experts = jnp.zeros((1, 16, 1), jnp.int32)
    kept = jnp.arange(16)[None, :, None] % 8 != 3
    ones = jnp.ones((1, 16, 2))
    stats = losses.statistics(moe.Routing(experts, ones[..., :1], ones, ones), kept, {}, 2)
    np.testing.assert_allclose(stats.asked[0], np.full(8, 1 / 8))
    np.testing.assert_allclose(stats.served[0], np.where(np.arange(8) == 3, 0, 1 / 8))


def test_balance_loss(table):
    *_, stats = table
    loss = moe.heterogeneous_balance(stats.load[0], stats.prob[0], POOL, tau=0.5)
    # 4 (2/3 * .3 + 1/3 * .13333 + 1/2 * 1 * .46667 + 1/2 * 0 * .1) = 4 * .477778
    np.testing.assert_allclose(loss, 1.911111, rtol=1e-6)
    spec = Spec(*POOL, tau=0.5)
    want = oracle.balance_loss(spec, [2 / 3, 1 / 3, 1, 0], [0.3, 0.4 / 3, 1.4 / 3, 0.1])
    assert math.isclose(want, 1.911111, rel_tol=1e-6)


def test_balance_gradient_is_the_probabilities():
    """4 eta_i f_i for P_i, none for f: counting has no slope."""
    load, prob = jnp.array([0.5, 0.25, 1.0, 0.25]), jnp.full(4, 0.25)
    into_load, into_prob = jax.grad(moe.heterogeneous_balance, (0, 1))(load, prob, POOL, 0.5)
    np.testing.assert_array_equal(into_load, np.zeros(4))
    np.testing.assert_allclose(into_prob, [2.0, 1.0, 2.0, 0.5])


def test_balance_loss_is_k_at_perfect_balance():
    load, prob = jnp.full(8, 2 / 8), jnp.full(8, 1 / 8)
    np.testing.assert_allclose(moe.heterogeneous_balance(load, prob, moe.Pool(8), 1.0), 2.0)


# Share of the vanilla model's FFN slots, the paper's cost ratio: columns are tau.
TAUS = (0.10, 0.25, 0.50, 0.75, 1.0)
FFN_PER_TOKEN = {
    moe.Pool(8, 2, 1, 1): (0.333, 0.667, 1.000, 1.200, 1.333),
    moe.Pool(16, 2, 1, 1): (0.571, 1.000, 1.333, 1.500, 1.600),
    moe.Pool(32, 6, 1, 1): (0.571, 1.000, 1.333, 1.500, 1.600),
}


def slots(pool, tau, gamma, tokens, top_k):
    rule = moe.rules.make("moepp", pool, top_k=min(top_k, pool.size), tau=tau)
    return moe.capacity(rule.load, gamma, tokens)


@pytest.mark.parametrize("pool", FFN_PER_TOKEN, ids=lambda p: f"{p.n_ffn}+{p.n_zero_computation}")
def test_cost_table(pool):
    """FFN slots over a vanilla model's, in groups so long that rounding up is not seen."""
    length, top_k = 10**6, 2
    vanilla = moe.Pool(pool.n_ffn)
    for tau, per_token in zip(TAUS, FFN_PER_TOKEN[pool], strict=True):
        for gamma in (1.0, 1.1):
            ours = slots(pool, tau, gamma, length, top_k)[: pool.n_ffn]
            theirs = slots(vanilla, 1.0, gamma, length, top_k)
            ratio = sum(ours) / sum(theirs)
            assert math.isclose(top_k * ratio, per_token, abs_tol=6e-4), (tau, gamma)


@given(
    n_ffn=st.integers(1, 64),
    others=st.tuples(st.integers(0, 8), st.integers(0, 3), st.integers(0, 3)),
    tau=st.decimals("0.01", "1", places=2),
    gamma=st.decimals("0.1", "4", places=2),
    tokens=st.integers(1, 4096),
    top_k=st.integers(1, 8),
)
@example(  # as floats the FFN experts' share is 12.000000000000002
    n_ffn=16, others=(2, 1, 1), tau=0.1, gamma=1.0, tokens=336, top_k=2
)
def test_capacity_is_exact(n_ffn, others, tau, gamma, tokens, top_k):
    """Rounded up from the exact fraction: no slot is gained or lost to floating point."""
    pool = moe.Pool(n_ffn, *others)
    spec = Spec(*pool, top_k=min(top_k, pool.size), tau=float(tau), gamma=float(gamma))
    got = slots(pool, spec.tau, spec.gamma, tokens, top_k)
    assert got == tuple(oracle.capacity(spec, i, tokens) for i in range(len(spec.kinds)))


def test_an_expert_always_has_a_slot():
    assert min(slots(moe.Pool(8, 2, 1, 1), 1e-7, 1.0, tokens=1, top_k=1)) == 1
