"""One null logit: a table by hand, float64, nulls handed out in turn, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax.config import Config
from moepp_jax.configs.routing import tied_null as recipe
from moepp_jax.moe import Pool, RuleError, rules
from moepp_jax.moe.rules.tied_null import TiedNullRule
from tests.moe import cases
from tests.moe.rules import held

# Logits of 2 FFN experts and of the null, which is there 3 times: exp(G) of three tokens.
SMALL = Pool(2, n_zero=3)
EXP = [[4, 2, 1], [1, 3, 2], [1, 2, 3]]


def table(**options) -> TiedNullRule:
    return TiedNullRule(pool=SMALL, **options)


def test_table():
    # 4 2 1 1 1 over 9:    0 and 1, gates 2/3 and 1/3
    # 1 3 2 2 2 over 10:   1 and a null, which for token 1 is copy 1, expert 3; gates 1 and 0
    # 1 2 3 3 3 over 12:   two nulls, for token 2 copies 2 and 0, experts 4 and 2; no gate at all
    routing = held.by_hand(table(), np.log(EXP))
    np.testing.assert_array_equal(routing.experts[0], [[0, 1], [1, 3], [4, 2]])
    np.testing.assert_allclose(routing.gates[0], [[2 / 3, 1 / 3], [1, 0], [0, 0]], rtol=1e-6)
    expanded = np.array([[4, 2, 1, 1, 1], [1, 3, 2, 2, 2], [1, 2, 3, 3, 3]])
    np.testing.assert_allclose(routing.logits[0], np.log(expanded), rtol=1e-6)
    np.testing.assert_allclose(routing.scores[0], expanded / np.array([[9], [10], [12]]), rtol=1e-6)


def test_an_ffn_expert_comes_before_a_null_of_the_same_logit():
    routing = held.by_hand(table(), [[0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(routing.experts[0], [[0, 1]])


def test_losses():
    # f = 1/3, 2/3, then 1/3 each; 180 P = (80 + 18 + 15, 40 + 54 + 30, then 20 + 36 + 45) / 3.
    # L = 5/2 (113/3 + 2 124/3 + 3 101/3) / 540 = 5/2 664 / 1620 = 1660 / 1620
    # z over all copies: log(4 + 2 + 3), log(1 + 3 + 6), log(1 + 2 + 9), squared, in the mean.
    rule = table()
    terms = rule.losses(held.statistics(rule, held.by_hand(rule, np.log(EXP))), {})
    np.testing.assert_allclose(terms["balance_loss"].value, [1660 / 1620], rtol=1e-6)
    z = np.mean(np.log([9, 10, 12]) ** 2)
    np.testing.assert_allclose(terms["z_loss"].value, [z], rtol=1e-6)
    assert terms["balance_loss"].weight == 2e-2 and terms["z_loss"].weight == 1e-3


def test_gradient_is_through_scores_alone():
    rule = table()
    stats = held.statistics(rule, held.by_hand(rule, np.log(EXP)))

    def loss(load, prob):
        return rule.losses(stats._replace(load=load, prob=prob), {})["balance_loss"].value.sum()

    into_load, into_prob = jax.grad(loss, argnums=(0, 1))(stats.load, stats.prob)
    np.testing.assert_array_equal(into_load, 0)
    np.testing.assert_allclose(into_prob, np.array([[1, 2, 1, 1, 1]]) * 5 / 6, rtol=1e-6)


def test_losses_of_layers_are_1_at_balance():
    rule = TiedNullRule(pool=Pool(4, n_zero=2), top_k=3)
    stats = held.statistics(rule, held.by_hand(rule, np.eye(5)))
    load = jnp.array([rule.load, [1, 1, 1, 0, 0, 0]])
    prob = jnp.array([[0.5, 0.1, 0.1, 0.1, 0.1, 0.1], [0.5, 0.2, 0.1, 0.1, 0.05, 0.05]])
    value = rule.losses(stats._replace(load=load, prob=prob), {})["balance_loss"].value
    np.testing.assert_allclose(value, [1.0, 6 / 3 * 0.8], rtol=1e-6)


@pytest.mark.parametrize(("top_k", "n_zero"), [(2, 3), (3, 5), (4, 2), (5, 5)])
def test_no_copy_is_favoured(top_k, n_zero):
    rule = TiedNullRule(pool=Pool(3, n_zero=n_zero), top_k=top_k)
    rng = np.random.default_rng(5)
    routing = held.by_hand(rule, rng.normal(size=(4000, 4)))
    experts = np.asarray(routing.experts[0])
    for expert in range(rule.pool.size):
        assert ((experts == expert).sum(axis=1) <= 1).all()
    nulls = np.bincount(experts.ravel(), minlength=rule.pool.size)[3:]
    assert nulls.min() > 0.9 * nulls.max()
    # As many of the K as there are FFN experts that do not pass the null.
    logits = np.asarray(routing.logits[0])
    passing = (logits[:, :3] > logits[:, 3:4]).sum(axis=1)
    wanted = np.minimum(np.maximum(top_k - passing, 0), n_zero)
    np.testing.assert_array_equal((experts >= 3).sum(axis=1), wanted)


def test_params_are_of_one_null():
    rule = TiedNullRule(pool=Pool(4, n_zero=6), router_layers=2, residual="logits")
    shapes = {name: p.shape for name, p in rule.params(16, 0.1).items()}
    assert shapes == {"w_hidden": (40, 16), "w_logits": (5, 40), "w_residual": (5, 5)}


def test_gradient_of_the_null_is_that_of_all_its_copies():
    rule = table(residual="logits")
    params = jax.tree.map(jnp.array, held.params_of(rule)["router"])
    x, previous = (jnp.array(a) for a in held.inputs(rule))
    gradient = jax.grad(lambda p: rule.route(x, previous, p).scores[..., 0].sum())(params)
    # Of expert 0's probability p, each copy's logit has -p p_null.
    scores = rule.route(x, previous, params).scores
    through = -3 * scores[..., 0] * scores[..., 2]
    cases.close(gradient["w"][2], jnp.einsum("gs,gsd->d", through, x), 1e-5)
    cases.close(
        gradient["w_residual"][2], jnp.einsum("gs,gsn->n", through, previous[..., :3]), 1e-5
    )


def route64(rule: TiedNullRule):
    """Nulls by arithmetic: a token has its best FFN experts above the null, and then nulls."""
    E, M, K = rule.pool.n_ffn, rule.pool.n_zero, rule.top_k
    tokens = iter(range(10**6))  # the loop asks token by token

    def route(x, previous, p):
        s = next(tokens) % 16  # the size of a group in held.inputs
        own, _ = held.logits64(rule, x, previous[: E + 1], p)
        logits = np.array([*own[:E], *[own[E]] * M])
        scored = held.scored64(rule, logits)
        scores = np.exp(scored) / np.exp(scored).sum()
        ordered = np.argsort(-own[:E])
        above = [int(i) for i in ordered if scored[i] > scored[E]][:K]
        nulls = min(K - len(above), M)
        real = [int(i) for i in ordered][: K - nulls]
        gates = {i: scores[i] / scores[real].sum() for i in real}
        return logits, scores, gates | {E + (s + r) % M: 0.0 for r in range(nulls)}

    return route


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"residual": "logits"},
        {"residual": "detached", "router_layers": 2},
        {"logit_norm": 0.5, "top_k": 3},
        {"zero_offset": 0.7, "logit_norm": 0.5},
        {"pool": Pool(4, n_zero=1), "top_k": 4},
        {"pool": Pool(2, n_zero=6), "top_k": 5},
    ],
)
def test_float64(options):
    rule = TiedNullRule(**{"pool": Pool(4, n_zero=3)} | options)
    held.to_float64(rule, route64(rule))


@pytest.mark.parametrize(
    ("pool", "options", "message"),
    [
        (Pool(4, 0, 0, 0), {}, "n_zero to at least 1"),
        (Pool(4, 1, 0, 1), {}, "4 FFN . 1 constant . 0 copy . 1 zero"),
        (Pool(4, 0, 1, 1), {}, "n_const and n_copy to 0"),
        (Pool(4, 0, 0, 2), {"top_k": 7}, "top_k = 7 is more than the 6 experts"),
        (Pool(4, 0, 0, 2), {"top_k": 0}, "top_k = 0 must be at least 1"),
        (Pool(4, 0, 0, 2), {"gate": "raw"}, "gate = 'raw' is no option of 'tied_null'"),
    ],
)
def test_refused(pool, options, message):
    with pytest.raises(RuleError, match=message):
        rules.make("tied_null", pool, **options)


def test_recipe():
    rule = Config.parse(recipe.get_config()).moe.rule
    assert isinstance(rule, TiedNullRule) and rule.most == 2 and not rule.state()
    assert rules.parse(rules.fields_of(rule), rule.pool) == rule
    np.testing.assert_allclose(rule.load, [2 / 13] * 13)
    authors = TiedNullRule(pool=Pool(64, n_zero=64), top_k=8)
    assert authors.ffn_load == pytest.approx(8 * 0.5)  # E[K] = k_max rho
