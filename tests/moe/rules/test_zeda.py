"""ZEDA: a table by hand, float64, both balance losses, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax.config import Config
from moepp_jax.configs.routing import zeda as recipe
from moepp_jax.moe import Pool, RuleError, rules
from moepp_jax.moe.rules.zeda import ZEDARule
from tests.moe.rules import held

SMALL = Pool(2, n_zero=2)
# The softmax of a logarithm is the number itself: P of three tokens, of 2 FFN and 2 zero experts.
P = [[0.4, 0.1, 0.3, 0.2], [0.3, 0.4, 0.2, 0.1], [0.1, 0.2, 0.4, 0.3]]


def table(**options) -> ZEDARule:
    return ZEDARule(pool=SMALL, **options)


def losses(rule: ZEDARule):
    return rule.losses(held.statistics(rule, held.by_hand(rule, np.log(P))), {})


def test_table():
    # Each token's two best have .7 in all, zero experts counted: gates are 4/7 and 3/7.
    routing = held.by_hand(table(), np.log(P))
    np.testing.assert_array_equal(routing.experts[0], [[0, 2], [1, 0], [2, 3]])
    np.testing.assert_allclose(routing.gates[0], [[4 / 7, 3 / 7]] * 3, rtol=1e-6)
    np.testing.assert_allclose(routing.scores[0], P, rtol=1e-6)
    real = held.by_hand(table(gate="renormalise_nonzero"), np.log(P))
    np.testing.assert_allclose(real.gates[0], [[1, 0], [4 / 7, 3 / 7], [0, 0]], rtol=1e-6)


def test_losses():
    # f = 2/3, 1/3, 2/3, 1/3 and P = .8/3, .7/3, .9/3, .6/3: f_E = f_Z = 1, P_E = P_Z = 1/2.
    # w = 2: L = (2 + 4) / 2 (1/2 / 2 + 1/2 / 4) = 9/8; w = 1: L = 4 / 2 (1/2 / 2 + 1/2 / 2) = 1.
    # Among the FFN experts: 2 (2/3 8/15 + 1/3 7/15) = 46 / 45.
    terms = losses(table(balance_weight=0.3, ffn_balance_weight=0.2))
    np.testing.assert_allclose(terms["balance_loss"].value, [9 / 8], rtol=1e-6)
    np.testing.assert_allclose(terms["ffn_balance_loss"].value, [46 / 45], rtol=1e-6)
    assert terms["balance_loss"].weight == 0.3 and terms["ffn_balance_loss"].weight == 0.2
    np.testing.assert_allclose(losses(table(zero_weight=1.0))["balance_loss"].value, [1], rtol=1e-6)


def test_gradient_is_through_scores_alone():
    rule = table()
    stats = held.statistics(rule, held.by_hand(rule, np.log(P)))

    def loss(load, prob, name):
        return rule.losses(stats._replace(load=load, prob=prob), {})[name].value.sum()

    gradient = jax.grad(loss, argnums=(0, 1))
    into_load, into_prob = gradient(stats.load, stats.prob, "balance_loss")
    np.testing.assert_array_equal(into_load, 0)
    np.testing.assert_allclose(into_prob, [[1.5, 1.5, 0.75, 0.75]], rtol=1e-6)  # 3 f / (2 or 4)
    into_load, into_prob = gradient(stats.load, stats.prob, "ffn_balance_loss")
    np.testing.assert_array_equal(into_load, 0)
    # 2 (f_i / f_E) / P_E less L / P_E: 8/3 - 92/45 = 28/45, 4/3 - 92/45 = -32/45; none for zeros.
    np.testing.assert_allclose(into_prob, [[28 / 45, -32 / 45, 0, 0]], rtol=1e-5)
    # So it moves nothing from one group to the other.
    np.testing.assert_allclose(jnp.sum(into_prob * stats.prob), 0, atol=1e-6)


def test_losses_are_1_at_balance_and_pull_nowhere():
    rule = ZEDARule(pool=Pool(4, n_copy=1, n_zero=2), top_k=3, zero_weight=1.5)
    stats = held.statistics(rule, held.by_hand(rule, np.eye(7)))
    prob = jnp.array([[0.1, 0.1, 0.1, 0.1, 0.3, 0.2, 0.1]])

    def loss(prob, name):
        balanced = stats._replace(load=jnp.array([rule.load]), prob=prob)
        return rule.losses(balanced, {})[name].value.sum()

    value, gradient = jax.value_and_grad(loss)(prob, "balance_loss")
    np.testing.assert_allclose(value, 1.0, rtol=1e-6)
    np.testing.assert_allclose(gradient, 1.0, rtol=1e-6)  # alike for all: a softmax cannot follow
    value, gradient = jax.value_and_grad(loss)(prob, "ffn_balance_loss")
    np.testing.assert_allclose(value, 1.0, rtol=1e-6)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_losses_stay_finite_with_no_ffn_expert_chosen():
    rule = table()
    stats = held.statistics(rule, held.by_hand(rule, np.log(P)))
    load = jnp.array([[0.0, 0.0, 1.0, 1.0]])

    def loss(prob):
        terms = rule.losses(stats._replace(load=load, prob=prob), {})
        return terms["balance_loss"].value.sum() + terms["ffn_balance_loss"].value.sum()

    value, gradient = jax.value_and_grad(loss)(stats.prob)
    # f_Z = 2: 3 (2 (1/2) / 4) = 3/4, and nothing from the FFN experts.
    np.testing.assert_allclose(value, 0.75, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0, 0, 1.5, 1.5]], rtol=1e-6)


def test_losses_of_layers():
    rule = ZEDARule(pool=Pool(3, n_copy=1, n_zero=1), top_k=2, zero_weight=2.0)
    rng = np.random.default_rng(4)
    load, prob = rng.random((2, 5)), rng.dirichlet(np.ones(5), size=2)
    stats = held.statistics(rule, held.by_hand(rule, np.eye(5)))
    stats = stats._replace(load=jnp.float32(load), prob=jnp.float32(prob))
    terms = rule.losses(stats, {})
    for layer, (f, q) in enumerate(zip(load, prob, strict=True)):
        groups = 7 / 2 * (f[:3].sum() * q[:3].sum() / 3 + f[3:].sum() * q[3:].sum() / 4)
        ffn = 3 * (f[:3] / f[:3].sum()) @ (q[:3] / q[:3].sum())
        np.testing.assert_allclose(terms["balance_loss"].value[layer], groups, rtol=1e-5)
        np.testing.assert_allclose(terms["ffn_balance_loss"].value[layer], ffn, rtol=1e-5)


def route64(rule: ZEDARule):
    def route(x, previous, p):
        logits, scored = held.logits64(rule, x, previous, p)
        scores = np.exp(scored) / np.exp(scored).sum()
        best = np.argsort(-scores)[: rule.top_k]
        return logits, scores, {i: scores[i] / scores[best].sum() for i in best}

    return route


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"residual": "logits"},
        {"residual": "detached", "router_layers": 2},
        {"logit_norm": 0.5, "top_k": 4, "zero_weight": 1.0},
        {"pool": Pool(4, n_copy=2, n_zero=1), "top_k": 3},
        {"pool": Pool(4, n_copy=2)},
        {"zero_offset": 0.7, "logit_norm": 0.5},
    ],
)
def test_float64(options):
    rule = ZEDARule(**{"pool": Pool(4, n_zero=3)} | options)
    held.to_float64(rule, route64(rule))


@pytest.mark.parametrize(
    ("pool", "options", "message"),
    [
        (Pool(4, 0, 0, 0), {}, "n_zero or n_copy to at least 1"),
        (Pool(4, 1, 0, 1), {}, "4 FFN . 1 constant . 0 copy . 1 zero: .* n_const to 0"),
        (Pool(4, 0, 0, 2), {"top_k": 7}, "top_k = 7 is more than the 6 experts"),
        (Pool(4, 0, 0, 2), {"zero_weight": 0}, "zero_weight = 0.0 must be greater than 0"),
        (Pool(2, 0, 0, 1), {"zero_weight": 3.0}, "zero_weight = 3.0 cannot be had with top_k = 2"),
        (Pool(4, 0, 0, 2), {"gate": "none"}, "gate = 'none' must be one of 'raw'"),
    ],
)
def test_refused(pool, options, message):
    with pytest.raises(RuleError, match=message):
        rules.make("zeda", pool, **options)


def test_recipe():
    rule = Config.parse(recipe.get_config()).moe.rule
    assert isinstance(rule, ZEDARule) and rule.most == 2 and not rule.state()
    assert rules.parse(rules.fields_of(rule), rule.pool) == rule
    np.testing.assert_allclose(rule.load, [1 / 7] * 8 + [2 / 7] * 3)
    authors = ZEDARule(pool=Pool(128, n_zero=64), top_k=8)
    assert authors.ffn_load == pytest.approx(4)  # half of the choices
