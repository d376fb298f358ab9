"""LongCat-Flash: a table by hand, float64, the budget that the biases keep, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax.config import Config
from moepp_jax.configs.routing import longcat as recipe
from moepp_jax.moe import Pool, RuleError, rules
from moepp_jax.moe.rules.longcat import LongCatRule
from tests.moe.rules import held

SMALL = Pool(2, n_copy=2)
# The softmax of a logarithm is the number itself: R of three tokens, of 2 FFN experts and 2 copies.
R = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.5, 0.25, 0.15], [0.3, 0.1, 0.45, 0.15]]
BIAS = [0.0, -0.2, 0.0, 0.0]


def table(**options) -> LongCatRule:
    return LongCatRule(pool=SMALL, **{"top_k": 2, "ffn_experts": 0.5, "scale": 2.0} | options)


def routed(rule: LongCatRule):
    return held.by_hand(rule, np.log(R), bias=BIAS, rate=0.3)


def test_table():
    # R + b   .4 .1 .2 .1      -> 0 and 2, gates 2 R = .8, .4
    #         .1 .3 .25 .15    -> 1 and 2, gates 1, .5: the bias is in no gate
    #         .3 -.1 .45 .15   -> 2 and 0, gates .9, .6
    routing = routed(table())
    np.testing.assert_array_equal(routing.experts[0], [[0, 2], [1, 2], [2, 0]])
    np.testing.assert_allclose(routing.gates[0], [[0.8, 0.4], [1.0, 0.5], [0.9, 0.6]], rtol=1e-6)
    np.testing.assert_allclose(routing.scores[0], R, rtol=1e-6)


def test_balance_loss():
    # Choices a token: 2/3, 1/3 of the FFN experts, 1, 0 of the copies; P = .8/3, .9/3, .9/3, .4/3.
    # D = 1: f = (1/.5) 1 = 2 and 1/1.5 = 2/3;      L = 2 (1.7/3) + 2/3 (1.3/3) = 12.8 / 9
    # D = 2: f = (2/.5) (2/3, 1/3) = 8/3, 4/3, and 2/3;  L = (6.4 + 3.6 + 2.6) / 9 = 12.6 / 9
    for groups, expected in ((1, 12.8 / 9), (2, 12.6 / 9)):
        rule = table(groups=groups, balance_weight=0.25)
        loss = rule.losses(held.statistics(rule, routed(rule)), {})["balance_loss"]
        np.testing.assert_allclose(loss.value, [expected], rtol=1e-6)
        assert loss.weight == 0.25


def test_gradient_is_through_scores_alone():
    rule = table(groups=2)
    stats = held.statistics(rule, routed(rule))

    def loss(load, prob):
        stats_ = stats._replace(load=load, prob=prob)
        return rule.losses(stats_, {})["balance_loss"].value.sum()

    into_load, into_prob = jax.grad(loss, argnums=(0, 1))(stats.load, stats.prob)
    np.testing.assert_array_equal(into_load, 0)
    np.testing.assert_allclose(into_prob, [[8 / 3, 4 / 3, 2 / 3, 2 / 3]], rtol=1e-6)  # f_j


def test_loss_is_alpha_and_pulls_nowhere_at_the_target():
    rule = LongCatRule(pool=Pool(4, n_copy=3), top_k=3, ffn_experts=1.8, groups=2)
    prob = jnp.array([[0.3, 0.1, 0.05, 0.05, 0.2, 0.2, 0.1]])

    def loss(prob):
        stats = held.statistics(rule, held.by_hand(rule, np.zeros((1, 7)), bias=0.0))
        stats = stats._replace(load=jnp.array([rule.load]), prob=prob)
        return rule.losses(stats, {})["balance_loss"].value.sum()

    value, gradient = jax.value_and_grad(loss)(prob)
    np.testing.assert_allclose(value, 1.0, rtol=1e-6)
    np.testing.assert_allclose(gradient, 1.0, rtol=1e-6)  # alike for all: a softmax cannot follow


def test_update():
    # Wanted shares of all choices .5 / 2 / 2 = .125 each; had 1/3 and 1/6. With mu = .3:
    # .3 (.125 - .33333) = -.0625 and .3 (.125 - .16667) = -.0125; copies stay. mu -> .3 / 2.
    rule = table(rate_decay=0.5)
    stats = held.statistics(rule, routed(rule))
    state = {"bias": jnp.array(BIAS), "rate": jnp.array(0.3)}
    one = rule.update(state, jax.tree.map(lambda a: a[0], stats))
    np.testing.assert_allclose(one["bias"], [-0.0625, -0.2125, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(one["rate"], 0.15, rtol=1e-6)
    # Layers move by themselves: one with mu = 0 stays, one that has its target too.
    layers = {"bias": jnp.array([BIAS] * 3), "rate": jnp.array([0.3, 0.0, 0.3])}
    load = jnp.stack([stats.load[0], stats.load[0], jnp.array(rule.load)])
    moved = rule.update(layers, stats._replace(load=load))
    np.testing.assert_allclose(moved["bias"], [[-0.0625, -0.2125, 0, 0], BIAS, BIAS], rtol=1e-5)
    np.testing.assert_allclose(moved["rate"], [0.15, 0.0, 0.15], rtol=1e-6)


def test_state_starts_at_the_options():
    params = held.params_of(table(rate=0.3))["router"]
    np.testing.assert_array_equal(params["bias"], np.zeros(4))
    assert params["rate"] == np.float32(0.3)


def test_biases_keep_to_the_budget():
    rule = Config.parse(recipe.get_config()).moe.rule
    logits = np.random.default_rng(0).normal(size=(512, 12)) + np.linspace(-1, 1, 12)

    @jax.jit
    def step(state):
        stats = held.statistics(rule, held.by_hand(rule, logits, **state))
        moved = rule.update(state, jax.tree.map(lambda a: a[0], stats))
        return moved, stats.load[0]

    state = {"bias": jnp.zeros(12), "rate": jnp.array(rule.rate)}
    first = step(state)[1]
    for _ in range(200):
        state, load = step(state)
    assert abs(first[:8].sum() - 1.2) > 0.2
    np.testing.assert_allclose(load[:8], rule.load[:8], rtol=0.04)


def route64(rule: LongCatRule):
    def route(x, previous, p):
        logits, scored = held.logits64(rule, x, previous, p)
        scores = np.exp(scored) / np.exp(scored).sum()
        best = np.argsort(-(scores + p["bias"]))[: rule.top_k]
        return logits, scores, {i: rule.scale * scores[i] for i in best}

    return route


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"residual": "logits", "scale": 6.0},
        {"zero_offset": 0.7, "logit_norm": 0.5},
        {"residual": "detached", "router_layers": 2},
        {"logit_norm": 0.5, "top_k": 4, "ffn_experts": 2.5},
        {"pool": Pool(3, n_copy=1), "top_k": 1, "ffn_experts": 0.7},
    ],
)
def test_float64(options):
    rule = LongCatRule(**{"pool": Pool(4, n_copy=3)} | options)
    held.to_float64(rule, route64(rule))
    bias = np.random.default_rng(2).normal(size=rule.pool.size) / 4
    held.to_float64(rule, route64(rule), held.params_of(rule, bias=bias, rate=0.01))


@pytest.mark.parametrize(
    ("pool", "options", "message"),
    [
        (Pool(4, 0, 0, 0), {}, "n_copy to at least 1"),
        (Pool(4, 1, 1, 0), {}, "4 FFN . 1 constant . 1 copy . 0 zero"),
        (Pool(4, 0, 1, 1), {}, "n_const and n_zero to 0"),
        (Pool(4, 0, 2, 0), {"top_k": 7}, "top_k = 7 is more than the 6 experts"),
        (Pool(4, 0, 2, 0), {"ffn_experts": 2}, "leaves the copies none of the top_k = 2"),
        (Pool(4, 0, 1, 0), {"top_k": 3}, r"ffn_experts = 1.2 cannot be had with top_k = 3"),
        (Pool(4, 0, 2, 0), {"groups": 3}, "groups = 3 must divide the FFN experts, n_ffn = 4"),
        (Pool(4, 0, 2, 0), {"scale": 0.0}, "scale = 0.0 must be greater than 0"),
        (Pool(4, 0, 2, 0), {"rate_decay": 1.5}, "rate_decay = 1.5 must be .* at most 1"),
        (Pool(4, 0, 2, 0), {"gate": "raw"}, "gate = 'raw' is no option of 'longcat'"),
    ],
)
def test_refused(pool, options, message):
    with pytest.raises(RuleError, match=message):
        rules.make("longcat", pool, **options)


def test_recipe():
    rule = Config.parse(recipe.get_config()).moe.rule
    assert isinstance(rule, LongCatRule) and rule.most == 2
    assert rules.parse(rules.fields_of(rule), rule.pool) == rule
    np.testing.assert_allclose(rule.load, [1.2 / 8] * 8 + [0.8 / 4] * 4)
    assert rule.ffn_load == pytest.approx(1.2)
