"""The vanilla rule: by hand, against float64, its loss and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import moe
from moepp_jax.config import Config
from moepp_jax.configs.routing import vanilla as recipe
from moepp_jax.moe import RuleError, rules
from tests import oracle
from tests.moe.rules import held

# Four tokens' probabilities of three experts, whose logarithms are the logits; then the chosen
# experts and their gates. Of equal probabilities the lower number is chosen.
PROBS = [
    [0.5, 0.3, 0.2],  # 0, 1   .5/.8, .3/.8
    [0.2, 0.6, 0.2],  # 1, 0   .6/.8, .2/.8
    [0.1, 0.1, 0.8],  # 2, 0   .8/.9, .1/.9
    [0.4, 0.5, 0.1],  # 1, 0   .5/.9, .4/.9
]


def rule(pool=(3,), **options) -> moe.Rule:
    return rules.make("vanilla", moe.Pool(*pool), **options)


def test_by_hand():
    """f = 4/4, 3/4, 1/4 and P = .3, .375, .325, so sum f P = .6625, and N / K = 3/2."""
    r = held.by_hand(rule(), np.log(PROBS))
    assert r.experts[0].tolist() == [[0, 1], [1, 0], [2, 0], [1, 0]]
    gates = [[0.625, 0.375], [0.75, 0.25], [8 / 9, 1 / 9], [5 / 9, 4 / 9]]
    np.testing.assert_allclose(r.gates[0], gates, rtol=1e-6)
    terms = rule(balance_weight=0.3).losses(held.statistics(rule(), r), {})
    np.testing.assert_allclose(terms["balance_loss"].value, [0.99375], rtol=1e-6)
    assert terms["balance_loss"].weight == 0.3


def test_as_switch_one_expert_with_its_probability():
    r = held.by_hand(rule(top_k=1, gate="raw"), np.log(PROBS))
    assert r.experts[0].tolist() == [[0], [1], [2], [1]]
    np.testing.assert_allclose(r.gates[0, :, 0], [0.5, 0.6, 0.8, 0.5], rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_loss_is_one_at_balance(k):
    stats = statistics(load=np.full((2, 8), k / 8), prob=np.full((2, 8), 1 / 8))
    terms = rule((8,), top_k=k).losses(stats, {})
    np.testing.assert_allclose(terms["balance_loss"].value, [1.0, 1.0], rtol=1e-6)


OPTIONS = [
    {},
    {"residual": "logits"},
    {"logit_norm": 0.5},
    {"router_layers": 2, "top_k": 1, "gate": "raw"},
    {"top_k": 3, "gate": "softmax_selected", "logit_norm": 0.5},
    {"top_k": 6},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_float64(options):
    r = rule((6,), **options)

    def route64(x_D, previous_N, p):
        logits, scored = held.logits64(r, x_D, previous_N, p)
        probs = oracle.softmax(scored)
        chosen = np.argsort(-probs)[: r.top_k]
        gates = {
            "raw": probs[chosen],
            "renormalise_all": probs[chosen] / probs[chosen].sum(),
            "softmax_selected": oracle.softmax(scored[chosen]),
        }[r.gate]
        return logits, probs, dict(zip(chosen, gates, strict=True))

    held.to_float64(r, route64)
    assert r.load == (r.top_k / 6,) * 6


def statistics(load, prob) -> moe.Statistics:
    layers = jnp.arange(len(load), dtype=jnp.float32)
    load, prob = jnp.float32(load), jnp.float32(prob)
    return moe.Statistics(load, load, prob, entropy=layers, z=layers, own={})


def test_the_loss_and_its_gradient():
    """Per layer; dL/dP_i = N / K f_i, and f has none."""
    load, prob = np.random.default_rng(0).uniform(size=(2, 3, 5))
    r = rule((5,), top_k=2, z_weight=0.5)

    def total(load, prob):
        terms = r.losses(statistics(load, prob), {})
        return terms["balance_loss"].value.sum(), terms

    gradients, terms = jax.grad(total, argnums=(0, 1), has_aux=True)(jnp.array(load), prob)
    np.testing.assert_allclose(terms["balance_loss"].value, 2.5 * (load * prob).sum(-1), rtol=1e-6)
    np.testing.assert_array_equal(terms["z_loss"].value, [0, 1, 2])
    assert terms["z_loss"].weight == 0.5
    np.testing.assert_array_equal(gradients[0], 0)
    np.testing.assert_allclose(gradients[1], 2.5 * load, rtol=1e-6)


def test_nothing_is_moved():
    assert rule().state() == {} == rule().update({}, statistics([[1, 1, 0]], [[0.4, 0.3, 0.3]]))


@pytest.mark.parametrize(
    "pool, options, message",
    [
        (
            (8, 0, 1),
            {},
            r"VanillaRule is not for a pool of .* 1 copy .* n_const and n_copy and n_zero to 0",
        ),
        ((8,), {"top_k": 9}, r"top_k = 9 is more than the 8 experts"),
        ((8,), {"top_k": 0}, r"top_k = 0 must be at least 1"),
        ((8,), {"gate": "all"}, r"gate = 'all' must be one of 'raw', "),
        ((8,), {"balance_weight": -0.1}, r"balance_weight = -0.1 must be at least 0"),
        ((1,), {"top_k": 1, "logit_norm": 1.0}, r"logit_norm = 1.0 needs at least two experts"),
        ((8,), {"tau": 0.5}, r"tau = 0.5 is no option of 'vanilla'"),
    ],
)
def test_refused(pool, options, message):
    with pytest.raises(RuleError, match=message):
        rule(pool, **options)


def test_recipe():
    """Every option is written out, and each has its default."""
    fields = recipe.get_config()
    r = Config.parse(fields).moe.rule
    assert rules.fields_of(r) == fields.moe.rule.to_dict()
    assert rules.parse(rules.fields_of(r), r.pool) == r == rule((8,))
