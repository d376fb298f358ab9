"""DeepSeek's rule: by hand, against float64, the bias that balances and the loss of a sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import moe
from moepp_jax.config import Config
from moepp_jax.configs.routing import deepseek as recipe
from moepp_jax.moe import RuleError, rules
from tests.moe.rules import held

# Two tokens' scores s of four experts; then s + b, the chosen experts and their gates.
SCORES = [
    [0.8, 0.6, 0.4, 0.2],  # .8, .35, .65, .2   0, 2   .8/1.2, .4/1.2
    [0.4, 0.75, 0.2, 0.25],  # .4, .5, .45, .25   1, 2   .75/.95, .2/.95
]
BIAS = [0.0, -0.25, 0.25, 0.0]


def logits_of(scores):
    return np.log(scores) - np.log1p(-np.asarray(scores))


def rule(pool=(4,), **options) -> moe.Rule:
    return rules.make("deepseek", moe.Pool(*pool), **options)


def test_by_hand():
    """Scores over their sums, 2 and 1.6, are .4 .3 .2 .1 and .25 .46875 .125 .15625.

    Without the bias both tokens choose 0 and 1: f' = 1, 1, 0, 0 and P' = .325, .384375, ..., so the
    loss is N / K = 2 times .709375. With it f = .5, .5, 1, 0, whose mean is .5: the first two keep
    their bias, the third loses u and the fourth gains it.
    """
    r = held.by_hand(rule(), logits_of(SCORES), bias=BIAS)
    assert r.experts[0].tolist() == [[0, 2], [1, 2]]
    gates = np.array([[2 / 3, 1 / 3], [15 / 19, 4 / 19]])
    np.testing.assert_allclose(r.gates[0], gates, rtol=1e-6)
    np.testing.assert_allclose(r.scores[0], SCORES, rtol=1e-6)
    stats = held.statistics(rule(), r)
    term = rule(sequence_weight=0.3).losses(stats, {})["sequence_loss"]
    np.testing.assert_allclose(term.value, [1.41875], rtol=1e-6)
    assert term.weight == 0.3
    moved = rule(bias_rate=0.125).update({"bias": jnp.array([BIAS])}, stats)
    np.testing.assert_array_equal(moved["bias"], [[0.0, -0.25, 0.125, 0.125]])


def test_gates_as_they_are_and_scaled():
    raw = held.by_hand(rule(gate="raw", scale=2.5), logits_of(SCORES), bias=BIAS)
    np.testing.assert_allclose(raw.gates[0], [[2.0, 1.0], [1.875, 0.5]], rtol=1e-6)
    over_sum = held.by_hand(rule(scale=2.5), logits_of(SCORES), bias=BIAS)
    np.testing.assert_allclose(over_sum.gates.sum(axis=-1), 2.5, rtol=1e-6)


OPTIONS = [
    {},
    {"residual": "logits"},
    {"logit_norm": 0.5, "scale": 2.5},
    {"router_layers": 2, "gate": "raw"},
    {"top_k": 3, "gate": "softmax_selected", "logit_norm": 0.5},
    {"top_k": 1},
]


@pytest.mark.parametrize("bias", [0.0, 0.2], ids=["at the start", "moved"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_float64(options, bias):
    r = rule((6,), **options)

    def route64(x_D, previous_N, p):
        logits, scored = held.logits64(r, x_D, previous_N, p)
        scores = 1 / (1 + np.exp(-scored))
        chosen = np.argsort(-(scores + p["bias"]))[: r.top_k]
        gates = {
            "raw": scores[chosen],
            "renormalise_all": scores[chosen] / scores[chosen].sum(),
            "softmax_selected": np.exp(scored[chosen]) / np.exp(scored[chosen]).sum(),
        }[r.gate]
        return logits, scores, dict(zip(chosen, r.scale * gates, strict=True))

    bias_N = bias * np.random.default_rng(3).normal(size=6)
    held.to_float64(r, route64, held.params_of(r, bias=bias_N))
    assert r.load == (r.top_k / 6,) * 6


def test_the_loss_is_of_each_sequence():
    """Two that are one-sided, each in its way, 2 (.4 + .4) each, though the batch is balanced."""
    r = rule()
    logits = jnp.float32(logits_of([[[0.8, 0.8, 0.2, 0.2]], [[0.2, 0.2, 0.8, 0.8]]]))
    params = {"w": jnp.eye(4), "bias": jnp.zeros(4)}
    routing = r.route(logits, jnp.zeros_like(logits), params)
    np.testing.assert_allclose(r.measure(routing)["sequence_loss"], [1.6, 1.6], rtol=1e-6)
    terms = r.losses(held.statistics(r, routing), {})
    np.testing.assert_allclose(terms["sequence_loss"].value, [1.6], rtol=1e-6)


def measured(r: moe.Rule, logits, bias=0.0):
    return r.measure(held.by_hand(r, logits, bias=bias))["sequence_loss"][0]


def test_the_loss_and_its_gradient():
    """Through P' alone: dL/ds_tj = N / (K T) (f'_j - sum_i f'_i s'_ti) / sum_i s_ti."""
    logits = np.random.default_rng(0).normal(size=(7, 5))
    r = rule((5,), top_k=2)
    s = 1 / (1 + np.exp(-logits))
    shares = s / s.sum(axis=1, keepdims=True)
    load = (np.argsort(np.argsort(-s)) < 2).mean(axis=0)
    value, slopes = jax.value_and_grad(lambda a: measured(r, a))(jnp.float32(logits))
    np.testing.assert_allclose(value, 2.5 * (load * shares.mean(axis=0)).sum(), rtol=1e-6)
    to_s = 2.5 / 7 * (load - shares @ load[:, None]) / s.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(slopes, to_s * s * (1 - s), rtol=1e-4, atol=1e-7)
    # The bias is no part of it, though it changes every choice.
    assert measured(r, logits, bias=[9.0, -9.0, 9.0, -9.0, 0.0]) == value


@pytest.mark.parametrize("low", [-30.0, -80.0, -200.0])
def test_gradients_are_finite_however_low_the_scores(low):
    def outputs(logits):
        r = held.by_hand(rule(), logits, bias=BIAS)
        return r.gates, rule().measure(r)

    slopes = jax.jacobian(outputs)(low - jnp.arange(4.0)[None])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


def test_the_bias_has_no_gradient_and_no_part_in_the_gates():
    def gates(bias):
        return held.by_hand(rule(gate="raw"), logits_of(SCORES), bias=bias).gates

    np.testing.assert_array_equal(jax.jacobian(gates)(jnp.array(BIAS)), 0)
    # The same choice by another bias.
    np.testing.assert_array_equal(gates(np.array(BIAS) + 5), gates(BIAS))


def statistics(load) -> moe.Statistics:
    load = jnp.float32(load)
    zeros = jnp.zeros(load.shape[:-1])
    return moe.Statistics(load, load, load, zeros, zeros, own={"sequence_loss": zeros + 1})


def test_every_layer_moves_its_own_bias():
    """Means of .5 and of .25: the same load is too low in one layer and too high in the other."""
    loads = [[0.375, 0.625, 0.5, 0.5], [0.375, 0.125, 0.25, 0.25]]
    r = rule(bias_rate=0.25)
    moved = r.update({"bias": jnp.ones((2, 4))}, statistics(loads))["bias"]
    np.testing.assert_array_equal(moved, [[1.25, 0.75, 1, 1], [0.75, 1.25, 1, 1]])
    alone = r.update({"bias": jnp.ones(4)}, statistics(loads[0]))["bias"]
    np.testing.assert_array_equal(alone, moved[0])


def test_terms():
    terms = rule(z_weight=0.5).losses(statistics([[0.5] * 4] * 3), {})
    assert {name: term.weight for name, term in terms.items()} == {
        "z_loss": 0.5,
        "sequence_loss": 1e-4,
    }
    np.testing.assert_array_equal(terms["sequence_loss"].value, [1, 1, 1])


@pytest.mark.parametrize(
    "pool, options, message",
    [
        ((8, 0, 0, 1), {}, r"DeepSeekRule is not for a pool of .* 1 zero: set n_const and"),
        ((8,), {"top_k": 9}, r"top_k = 9 is more than the 8 experts"),
        ((8,), {"gate": "all"}, r"gate = 'all' must be one of 'raw', "),
        ((8,), {"scale": 0.0}, r"scale = 0.0 must be greater than 0"),
        ((8,), {"bias_rate": -0.1}, r"bias_rate = -0.1 must be at least 0"),
        ((8,), {"sequence_weight": -0.1}, r"sequence_weight = -0.1 must be at least 0"),
    ],
)
def test_refused(pool, options, message):
    with pytest.raises(RuleError, match=message):
        rule(pool, **options)


def test_recipe():
    """Every option is written out, and each has its default; biases start at 0."""
    fields = recipe.get_config()
    r = Config.parse(fields).moe.rule
    assert rules.fields_of(r) == fields.moe.rule.to_dict()
    assert rules.parse(rules.fields_of(r), r.pool) == r == rule((8,))
    assert (r.state()["bias"].shape, r.state()["bias"].mean, r.state()["bias"].std) == ((8,), 0, 0)


def test_rounding_moves_no_bias():
    """Loads at the mean but for their last bits, as another order of summation leaves them."""
    rule = moe.rules.make("deepseek", moe.Pool(3), top_k=1)
    third = jnp.float32(1 / 3)
    load = jnp.stack([third, jnp.nextafter(third, 1.0), jnp.nextafter(third, 0.0)])
    stats = moe.Statistics(load, load, load, None, None)
    np.testing.assert_array_equal(rule.update({"bias": jnp.zeros(3)}, stats)["bias"], 0.0)
