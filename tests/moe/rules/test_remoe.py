"""ReMoE: by hand, against float64, its penalty and the coefficient that follows the sparsity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import moe
from moepp_jax.config import Config
from moepp_jax.configs.routing import remoe as recipe
from moepp_jax.moe import RuleError, rules
from tests.moe.rules import held

# Four tokens' logits of three experts; then the chosen ones, best first. A gate is the logit.
LOGITS = [
    [2.0, -1.0, 1.0],  # 0, 2
    [1.0, 3.0, -2.0],  # 1, 0
    [-1.0, -2.0, 0.0],  # none: a ReLU is closed at 0
    [1.0, 4.0, 2.0],  # 1, 2, 0
]


def rule(pool=(3,), **options) -> moe.Rule:
    return rules.make("remoe", moe.Pool(*pool), **options)


def test_by_hand():
    """f = 3/4, 2/4, 2/4 and the means of R are 4/4, 7/4, 3/4: sum f R = .75 + .875 + .375 = 2.

    The penalty is 2 N / K: 3 for K = 2, and 6 for K = 1.
    """
    r = held.by_hand(rule(), LOGITS, coefficient=0.5)
    assert r.experts[0].tolist() == [[0, 2, 3], [1, 0, 3], [3, 3, 3], [1, 2, 0]]
    gates = [[2, 1, 0], [3, 1, 0], [0, 0, 0], [4, 2, 1]]
    np.testing.assert_array_equal(r.gates[0], gates)
    np.testing.assert_array_equal(r.scores[0], np.maximum(LOGITS, 0))
    stats = held.statistics(rule(), r)
    for k, value in ((2, 3.0), (1, 6.0)):
        term = rule(top_k=k).losses(stats, {"coefficient": jnp.array([0.5])})["l1_loss"]
        np.testing.assert_allclose(term.value, [value], rtol=1e-6)
        np.testing.assert_array_equal(term.weight, [0.5])
    # A token has 7/4 experts: fewer than 2, so the penalty is eased; more than 1, so it grows.
    for k, moved in ((2, 0.5 / 1.25), (1, 0.5 * 1.25)):
        state = rule(top_k=k, alpha=1.25).update({"coefficient": jnp.array([0.5])}, stats)
        np.testing.assert_allclose(state["coefficient"], [moved], rtol=1e-6)


def test_a_bound_cuts_the_weakest():
    r = held.by_hand(rule(max_experts=2), LOGITS, coefficient=0.5)
    assert r.experts[0].tolist() == [[0, 2], [1, 0], [3, 3], [1, 2]]
    np.testing.assert_array_equal(r.gates[0], [[2, 1], [3, 1], [0, 0], [4, 2]])


OPTIONS = [
    ((6,), {}, {}),
    ((3, 1, 1, 1), {"residual": "logits"}, {}),
    ((6,), {"logit_norm": 0.5}, {}),
    ((2,), {"top_k": 1}, {"coefficient": 0.3}),  # many tokens with no expert
    ((6,), {"max_experts": 2, "router_layers": 2}, {"coefficient": 7.0}),
]


@pytest.mark.parametrize("pool, options, state", OPTIONS, ids=str)
def test_equals_float64(pool, options, state):
    r = rule(pool, **options)

    def route64(x_D, previous_N, p):
        logits, scored = held.logits64(r, x_D, previous_N, p)
        scores = np.maximum(scored, 0)
        best = sorted((i for i in range(len(scores)) if scores[i] > 0), key=lambda i: -scores[i])
        return logits, scores, {i: scores[i] for i in best[: r.max_experts or None]}

    held.to_float64(r, route64, held.params_of(r, **state))
    assert r.load == (r.top_k / r.pool.size,) * r.pool.size


def test_the_penalty_reaches_open_relus_alone():
    """d/dR_e = N / K f_e / T, with N / K = 3/2 and T = 4; where a ReLU is closed, 0."""

    def penalty(logits):
        stats = held.statistics(rule(), held.by_hand(rule(), logits, coefficient=1.0))
        return rule().losses(stats, {"coefficient": jnp.ones(1)})["l1_loss"].value.sum()

    one_open = np.array([0.28125, 0.1875, 0.1875])  # 3/8 f
    slopes = jax.grad(penalty)(jnp.array(LOGITS))
    np.testing.assert_allclose(slopes, one_open * (np.array(LOGITS) > 0), rtol=1e-6)


def statistics(load) -> moe.Statistics:
    load = jnp.float32(load)
    zeros = jnp.zeros(load.shape[:-1])
    return moe.Statistics(load, load, load, entropy=zeros, z=zeros, own={})


def test_the_loss_of_every_layer_and_no_gradient_into_the_load():
    load, prob = np.random.default_rng(0).uniform(size=(2, 3, 5))
    r = rule((5,), top_k=2, z_weight=0.5)

    def total(load, prob):
        stats = statistics(load)._replace(prob=prob)
        terms = r.losses(stats, {"coefficient": jnp.full(3, 0.1)})
        return terms["l1_loss"].value.sum(), terms

    (to_load, to_prob), terms = jax.grad(total, argnums=(0, 1), has_aux=True)(
        jnp.array(load), jnp.float32(prob)
    )
    np.testing.assert_allclose(terms["l1_loss"].value, 2.5 * (load * prob).sum(-1), rtol=1e-6)
    assert terms["z_loss"].weight == 0.5
    np.testing.assert_array_equal(to_load, 0)
    np.testing.assert_allclose(to_prob, 2.5 * load, rtol=1e-6)


@pytest.mark.parametrize(
    "loads, factor",
    [
        ([[1, 0.25, 0.25], [1, 1, 1]], 1.25),  # 1.5 and 3, 2.25 in the mean: too many
        ([[0.5, 0.25, 0.25], [1, 1, 1]], 0.8),  # 2 in the mean: equality divides
        ([[1, 1, 0.25], [0, 0.25, 0]], 0.8),  # 1.25 in the mean, 2.25 in the first layer
    ],
)
def test_one_coefficient_follows_the_mean_over_the_layers(loads, factor):
    r = rule(top_k=2, alpha=1.25)
    moved = r.update({"coefficient": jnp.full(2, 0.5)}, statistics(loads))
    np.testing.assert_allclose(moved["coefficient"], [0.5 * factor] * 2, rtol=1e-6)


@pytest.mark.parametrize("load, moved", [([1, 1, 0.5], 0.625), ([0.5, 0.5, 0.5], 0.4)])
def test_one_layer_alone(load, moved):
    state = rule(top_k=2, alpha=1.25).update({"coefficient": jnp.array(0.5)}, statistics(load))
    np.testing.assert_allclose(state["coefficient"], moved, rtol=1e-6)
    assert state["coefficient"].shape == ()


def test_a_coefficient_comes_back_from_however_low():
    r, state = rule(top_k=2), {"coefficient": jnp.array(1.2e-38)}
    for load in ([0, 0, 0], [0, 0, 0], [1, 1, 1]):
        state = r.update(state, statistics(load))
    assert state["coefficient"] > 1.2e-38


def test_a_token_of_zeros_has_no_expert_and_finite_gradients():
    r = rule(logit_norm=1.0)
    assert held.by_hand(r, np.zeros((1, 3)), coefficient=1.0).experts.tolist() == [[[3, 3, 3]]]
    slopes = jax.jacobian(lambda x: held.by_hand(r, x, coefficient=1.0).gates)(jnp.zeros((1, 3)))
    np.testing.assert_array_equal(slopes, 0)


@pytest.mark.parametrize(
    "pool, options, message",
    [
        ((8,), {"top_k": 9}, r"top_k = 9 is more than the 8 experts"),
        ((8,), {"max_experts": 1}, r"max_experts = 1 must be from top_k = 2 to the 8 experts"),
        ((6, 1, 1, 1), {"max_experts": 10}, r"max_experts = 10 must be .* 9 experts .* 1 constant"),
        ((8,), {"alpha": 1.0}, r"alpha = 1.0 must be greater than 1"),
        ((8,), {"lambda_start": 0.0}, r"lambda_start = 0.0 must be greater than 0"),
        ((8,), {"gate": "raw"}, r"gate = 'raw' is no option of 'remoe'"),
    ],
)
def test_refused(pool, options, message):
    with pytest.raises(RuleError, match=message):
        rule(pool, **options)


def test_recipe():
    """Every option is written out, and each has its default; training starts at lambda_start."""
    fields = recipe.get_config()
    config = Config.parse(fields)
    r = config.moe.rule
    assert rules.fields_of(r) == fields.moe.rule.to_dict()
    assert rules.parse(rules.fields_of(r), r.pool) == r == rule((8,))
    assert config.moe.dispatch == "dropless"
    assert r.state()["coefficient"].mean == 1e-8
