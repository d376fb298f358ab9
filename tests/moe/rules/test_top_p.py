"""Top-p routing: by hand, against float64, its two losses and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import moe
from moepp_jax.config import Config
from moepp_jax.configs.routing import top_p as recipe
from moepp_jax.moe import RuleError, rules
from tests import oracle
from tests.moe.rules import held

# Four tokens' probabilities of four experts, whose logarithms are the logits; then the experts that
# are chosen until their sum exceeds 1/2, that sum, and the entropy.
PROBS = [
    [0.6, 0.2, 0.1, 0.1],  # 0   .6   1.088900
    [0.1, 0.4, 0.3, 0.2],  # 1, 2   .4, .7   1.279854
    [0.25, 0.25, 0.25, 0.25],  # 0, 1, 2   .25, .5, .75, for .5 does not exceed   1.386294
    [0.2, 0.1, 0.1, 0.6],  # 3   .6   1.088900
]


def rule(pool=(4,), **options) -> moe.Rule:
    return rules.make("top_p", moe.Pool(*pool), **options)


def test_by_hand():
    """f = .5, .5, .5, .25 and P = .2875, .2375, .1875, .2875: N sum f P = 4 (.35625 + .071875)."""
    r = held.by_hand(rule(p=0.5), np.log(PROBS))
    assert r.experts[0].tolist() == [[0, 4, 4, 4], [1, 2, 4, 4], [0, 1, 2, 4], [3, 4, 4, 4]]
    gates = [[0.6, 0, 0, 0], [0.4, 0.3, 0, 0], [0.25, 0.25, 0.25, 0], [0.6, 0, 0, 0]]
    np.testing.assert_allclose(r.gates[0], gates, rtol=1e-6)
    terms = rule(balance_weight=0.3, entropy_weight=0.2).losses(held.statistics(rule(), r), {})
    np.testing.assert_allclose(terms["balance_loss"].value, [1.7125], rtol=1e-6)
    np.testing.assert_allclose(terms["entropy_loss"].value, [1.210987], rtol=1e-6)
    assert (terms["balance_loss"].weight, terms["entropy_loss"].weight) == (0.3, 0.2)


def test_other_gates():
    r = held.by_hand(rule(p=0.5, gate="renormalise_all"), np.log(PROBS))
    third = 1 / 3
    gates = [[1, 0, 0, 0], [4 / 7, 3 / 7, 0, 0], [third, third, third, 0], [1, 0, 0, 0]]
    np.testing.assert_allclose(r.gates[0], gates, rtol=1e-6)


def test_a_bound_cuts_the_least_probable():
    r = held.by_hand(rule(p=0.5, max_experts=2), np.log(PROBS))
    assert r.experts[0].tolist() == [[0, 4], [1, 2], [0, 1], [3, 4]]


def test_where_no_sum_exceeds_p_all_are_chosen():
    r = held.by_hand(rule(p=1.0), np.zeros((1, 4)))
    assert r.experts.tolist() == [[[0, 1, 2, 3]]]


@pytest.mark.parametrize("p", [1e-6, 0.4, 0.99])
def test_a_sure_router_takes_one_expert_and_there_is_always_one(p):
    r = held.by_hand(rule(p=p), [[0.0, 200.0, 0.0, 0.0]])
    assert r.experts.tolist() == [[[1, 4, 4, 4]]]


OPTIONS = [
    ((6,), {}),
    ((3, 1, 1, 1), {"residual": "logits", "gate": "renormalise_nonzero"}),
    ((6,), {"logit_norm": 0.5, "p": 0.7}),
    ((6,), {"router_layers": 2, "max_experts": 2, "p": 0.9}),
    ((3, 1, 1, 1), {"gate": "softmax_selected", "p": 0.8, "logit_norm": 0.5}),
]


@pytest.mark.parametrize("pool, options", OPTIONS, ids=str)
def test_equals_float64(pool, options):
    r = rule(pool, **options)

    def route64(x_D, previous_N, p):
        logits, scored = held.logits64(r, x_D, previous_N, p)
        probs = oracle.softmax(scored)
        chosen, mass = [], 0.0
        for i in np.argsort(-probs):
            if mass <= r.p and len(chosen) < (r.max_experts or len(probs)):
                chosen.append(i)
            mass += probs[i]
        weights = probs[chosen]
        if r.gate == "renormalise_nonzero":
            weights = np.where(np.array(chosen) >= r.pool.first_zero, 0, weights)
            weights = weights / (weights.sum() or 1)
        elif r.gate == "softmax_selected":
            weights = weights / weights.sum()
        return logits, probs, dict(zip(chosen, weights, strict=True))

    held.to_float64(r, route64)
    assert r.load == (2 / 6,) * 6


def statistics(load, prob, entropy) -> moe.Statistics:
    load, prob, entropy = jnp.float32(load), jnp.float32(prob), jnp.float32(entropy)
    return moe.Statistics(load, load, prob, entropy, z=entropy, own={})


def test_the_losses_of_every_layer_and_where_their_gradients_go():
    """Of the balance loss into P alone, N f_i, where f sums to the experts a token has."""
    load, prob = np.random.default_rng(0).uniform(size=(2, 3, 5))
    r = rule((5,), z_weight=0.5)

    def total(load, prob):
        terms = r.losses(statistics(load, prob, [1, 2, 3]), {})
        return terms["balance_loss"].value.sum(), terms

    gradients, terms = jax.grad(total, argnums=(0, 1), has_aux=True)(jnp.array(load), prob)
    np.testing.assert_allclose(terms["balance_loss"].value, 5 * (load * prob).sum(-1), rtol=1e-6)
    np.testing.assert_array_equal(terms["entropy_loss"].value, [1, 2, 3])
    weights = {name: term.weight for name, term in terms.items()}
    assert weights == {"z_loss": 0.5, "balance_loss": 1e-2, "entropy_loss": 1e-4}
    np.testing.assert_array_equal(gradients[0], 0)
    np.testing.assert_allclose(gradients[1], 5 * load, rtol=1e-6)


def test_at_balance_the_loss_is_the_number_of_experts():
    stats = statistics(np.full((2, 8), 1.75 / 8), np.full((2, 8), 1 / 8), np.zeros(2))
    np.testing.assert_allclose(rule((8,)).losses(stats, {})["balance_loss"].value, 1.75, rtol=1e-6)


def entropy_loss(logits):
    stats = held.statistics(rule(), held.by_hand(rule(), logits))
    return rule().losses(stats, {})["entropy_loss"].value.sum()


def test_the_gradient_of_the_entropy():
    """Of token t's logit j, with T tokens: -p_j (log p_j + H_t) / T."""
    slopes = jax.grad(entropy_loss)(jnp.float32(np.log(PROBS)))
    p = np.array(PROBS)
    H = -(p * np.log(p)).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(slopes, -p * (np.log(p) + H) / 4, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("gap", [0.0, 20.0, 80.0, 200.0])
def test_gradients_are_finite_however_sure_the_router_is(gap):
    logits = jnp.array([[gap, 0.0, -1.0, -2.0]])
    assert np.isfinite(jax.grad(entropy_loss)(logits)).all()
    for r in (rule(), rule(gate="renormalise_all")):
        slopes = jax.jacobian(lambda a, r=r: held.by_hand(r, a).gates)(logits)
        assert np.isfinite(slopes).all()


def test_nothing_is_moved():
    stats = statistics([[1, 0.5, 0, 0]], [[0.4, 0.3, 0.2, 0.1]], [1])
    assert rule().state() == {} == rule().update({}, stats)


@pytest.mark.parametrize(
    "pool, options, message",
    [
        ((8,), {"p": 0.0}, r"p = 0.0 must be greater than 0 and at most 1"),
        ((8,), {"p": 1.5}, r"p = 1.5 must be greater than 0 and at most 1"),
        ((6, 1, 1, 1), {"max_experts": 10}, r"max_experts = 10 is more than the 9 experts .*copy"),
        ((8,), {"expected": 9.0}, r"expected = 9.0 must be at most the 8 experts"),
        ((8,), {"max_experts": 1}, r"expected = 2.0 must be at most the 1 experts"),
        ((8,), {"expected": 0.5}, r"expected = 0.5 must be at least 1"),
        ((8,), {"gate": "all"}, r"gate = 'all' must be one of 'raw', "),
        ((8,), {"entropy_weight": -0.1}, r"entropy_weight = -0.1 must be at least 0"),
        ((8,), {"top_k": 2}, r"top_k = 2 is no option of 'top_p'"),
    ],
)
def test_refused(pool, options, message):
    with pytest.raises(RuleError, match=message):
        rule(pool, **options)


def test_recipe():
    """Every option is written out, and each has its default."""
    fields = recipe.get_config()
    config = Config.parse(fields)
    r = config.moe.rule
    assert rules.fields_of(r) == fields.moe.rule.to_dict()
    assert rules.parse(rules.fields_of(r), r.pool) == r == rule((8,))
    assert config.moe.dispatch == "dropless"
