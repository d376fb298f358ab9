"""AdaMoE: a table by hand, float64, the averaged null load, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax.config import Config
from moepp_jax.configs.routing import adamoe as recipe
from moepp_jax.moe import Pool, RuleError, rules
from moepp_jax.moe.rules.adamoe import AdaMoERule
from tests.moe.rules import held

SMALL = Pool(2, n_zero=2)
# The softmax of a logarithm is the number itself: P of three tokens, of 2 FFN experts and 2 nulls.
P = [[0.4, 0.1, 0.3, 0.2], [0.3, 0.4, 0.2, 0.1], [0.1, 0.2, 0.4, 0.3]]


def table(**options) -> AdaMoERule:
    return AdaMoERule(pool=SMALL, top_k=2, **options)


def test_table():
    # 0 and a null: 0 has the whole gate; 1 and 0: .4 / .7, .3 / .7; two nulls: no gate at all
    routing = held.by_hand(table(), np.log(P))
    np.testing.assert_array_equal(routing.experts[0], [[0, 2], [1, 0], [2, 3]])
    np.testing.assert_allclose(routing.gates[0], [[1, 0], [4 / 7, 3 / 7], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(routing.scores[0], P, rtol=1e-6)
    raw = held.by_hand(table(gate="raw"), np.log(P))
    np.testing.assert_allclose(raw.gates[0], [[0.4, 0.3], [0.4, 0.3], [0.4, 0.3]], rtol=1e-6)


def test_balance_loss():
    # f = 2/3, 1/3, and of the nulls (2/3 + 1/3) / 2 = 1/2 each; P = .8/3, .7/3, .9/3, .6/3.
    # L = 4 (1.6/9 + .7/9 + 1/2 (1.5/3)) = 18.2 / 9. Each null with its own f it would be 18.8 / 9.
    rule = table(balance_weight=0.5)
    loss = rule.losses(held.statistics(rule, held.by_hand(rule, np.log(P))), {})["balance_loss"]
    np.testing.assert_allclose(loss.value, [18.2 / 9], rtol=1e-6)
    assert loss.weight == 0.5


def test_gradient_is_through_scores_alone():
    rule = table()
    stats = held.statistics(rule, held.by_hand(rule, np.log(P)))

    def loss(load, prob):
        return rule.losses(stats._replace(load=load, prob=prob), {})["balance_loss"].value.sum()

    into_load, into_prob = jax.grad(loss, argnums=(0, 1))(stats.load, stats.prob)
    np.testing.assert_array_equal(into_load, 0)
    np.testing.assert_allclose(into_prob, [[8 / 3, 4 / 3, 2, 2]], rtol=1e-6)  # 4 f~


def test_which_nulls_are_chosen_does_not_matter():
    rule = AdaMoERule(pool=Pool(2, n_zero=3), top_k=2)
    stats = held.statistics(rule, held.by_hand(rule, np.eye(5)))
    stats = jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), stats)  # two layers
    load = jnp.array([[0.5, 0.3, 1.0, 0.2, 0.0], [0.5, 0.3, 0.3, 0.4, 0.5]])
    first, second = rule.losses(stats._replace(load=load), {})["balance_loss"].value
    np.testing.assert_allclose(first, second, rtol=1e-6)
    at_balance = rule.losses(stats._replace(load=jnp.array([rule.load] * 2)), {})["balance_loss"]
    np.testing.assert_allclose(at_balance.value, [2.0, 2.0], rtol=1e-6)  # K


def test_loss_of_random_tokens_in_float64():
    rule = AdaMoERule(pool=Pool(5, n_zero=4), top_k=3, z_weight=0.1)
    logits = np.random.default_rng(3).normal(size=(64, 9))
    terms = rule.losses(held.statistics(rule, held.by_hand(rule, logits)), {})
    e = np.exp(np.float64(np.float32(logits)))
    probs = e / e.sum(axis=1, keepdims=True)
    f = np.zeros(9)
    for row in probs:
        f[np.argsort(-row)[:3]] += 1 / 64
    f[5:] = f[5:].sum() / 4
    np.testing.assert_allclose(terms["balance_loss"].value, [9 * f @ probs.mean(0)], rtol=1e-5)
    np.testing.assert_allclose(terms["z_loss"].value, [np.mean(np.log(e.sum(1)) ** 2)], rtol=1e-5)
    assert terms["z_loss"].weight == 0.1


def route64(rule: AdaMoERule):
    def route(x, previous, p):
        logits, scored = held.logits64(rule, x, previous, p)
        scores = np.exp(scored) / np.exp(scored).sum()
        best = np.argsort(-scores)[: rule.top_k]
        true = sum(scores[i] for i in best if i < rule.pool.n_ffn)
        return logits, scores, {i: scores[i] / true if i < rule.pool.n_ffn else 0.0 for i in best}

    return route


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"residual": "logits"},
        {"residual": "detached", "router_layers": 2},
        {"logit_norm": 0.5, "top_k": 4},
        {"zero_offset": 0.7, "logit_norm": 0.5},
        {"pool": Pool(2, n_zero=6), "top_k": 1},
    ],
)
def test_float64(options):
    rule = AdaMoERule(**{"pool": Pool(4, n_zero=3)} | options)
    held.to_float64(rule, route64(rule))


@pytest.mark.parametrize(
    ("pool", "options", "message"),
    [
        (Pool(4, 0, 0, 0), {}, "n_zero to at least 1"),
        (Pool(4, 1, 0, 1), {}, "4 FFN . 1 constant . 0 copy . 1 zero"),
        (Pool(4, 0, 1, 1), {}, "n_const and n_copy to 0"),
        (Pool(4, 0, 0, 2), {"top_k": 7}, "top_k = 7 is more than the 6 experts"),
        (Pool(4, 0, 0, 2), {"gate": "none"}, "gate = 'none' must be one of 'raw'"),
        (Pool(4, 0, 0, 2), {"balance_weight": -1}, "balance_weight = -1.0 must be at least 0"),
    ],
)
def test_refused(pool, options, message):
    with pytest.raises(RuleError, match=message):
        rules.make("adamoe", pool, **options)


def test_recipe():
    rule = Config.parse(recipe.get_config()).moe.rule
    assert isinstance(rule, AdaMoERule) and rule.most == 3 and not rule.state()
    assert rules.parse(rules.fields_of(rule), rule.pool) == rule
    np.testing.assert_allclose(rule.load, [3 / 20] * 20)
    assert rule.ffn_load == pytest.approx(1.2)
