"""Expert threshold routing: a table by hand, float64, cutoffs that find the load."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax.config import Config
from moepp_jax.configs.routing import threshold as recipe
from moepp_jax.moe import Pool, RuleError, rules
from moepp_jax.moe.rules.threshold import ThresholdRule
from tests.moe.rules import held

# Logits of four tokens, of an FFN, a constant and a zero expert.
SMALL = Pool(1, 1, 0, 1)
LOGITS = [[1.0, 0.0, 0.0], [0.0, -2.0, 3.0], [0.0, -2.0, 0.0], [2.0, 1.0, 2.5]]
# With a = 1/2, after one update: c = C / (1 - 1/2) = 1, -1, 2.
STATE = {"cutoff": [0.5, -0.5, 1.0], "updates": 1.0}


def table(**options) -> ThresholdRule:
    return ThresholdRule(pool=SMALL, **{"top_k": 1.0, "tau": 0.5, "decay": 0.5} | options)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def test_table():
    # 1 is at its cutoff, which is enough, 0 passes -1; 3 passes 2; none; all, the largest first.
    routing = held.by_hand(table(), LOGITS, **STATE)
    experts = [[0, 1, 3], [2, 3, 3], [3, 3, 3], [2, 0, 1]]
    np.testing.assert_array_equal(routing.experts[0], experts)
    gates = sigmoid([[1, 0, 0], [3, 0, 0], [0, 0, 0], [2.5, 2, 1]]) * (np.array(experts) < 3)
    np.testing.assert_allclose(routing.gates[0], gates, rtol=1e-6)
    np.testing.assert_allclose(routing.scores[0], sigmoid(LOGITS), rtol=1e-6)
    np.testing.assert_array_equal(routing.logits[0], LOGITS)


def test_renormalised_gates():
    routing = held.by_hand(table(gate="renormalise_all"), LOGITS, **STATE)
    total = sigmoid(1) + sigmoid(0)
    np.testing.assert_allclose(
        routing.gates[0, 0], [sigmoid(1) / total, sigmoid(0) / total, 0], rtol=1e-6
    )
    np.testing.assert_array_equal(routing.gates[0, 2], [0, 0, 0])


def test_the_best_are_kept_of_too_many():
    routing = held.by_hand(table(max_experts=2), LOGITS, **STATE)
    np.testing.assert_array_equal(routing.experts[0], [[0, 1], [2, 3], [3, 3], [2, 0]])


def test_large_logits_keep_their_order():
    # Their sigmoids are all 1 in float32.
    routing = held.by_hand(table(max_experts=2), [[30.0, 50.0, 40.0]], **STATE)
    np.testing.assert_array_equal(routing.experts[0], [[1, 2]])


def test_cutoffs_are_zero_before_the_first_update():
    routing = held.by_hand(table(), LOGITS, cutoff=[0.0] * 3, updates=0.0)
    experts = [[0, 1, 2], [2, 0, 3], [0, 2, 3], [2, 0, 1]]
    np.testing.assert_array_equal(routing.experts[0], experts)


def test_measure_and_update():
    # Wanted loads .5 / (.5 + 2) = .2 and 1 / 2.5 = .4: of 4 tokens 1 (.8) and 2 (1.6).
    # The largest of 1 0 0 2, the second of 0 -2 -2 1 and of 0 3 0 2.5 are 2, 0 and 2.5.
    # C = 1/2 (.5, -.5, 1) + 1/2 (2, 0, 2.5) = 1.25, -.25, 1.75, and n = 2: c = C / (3/4).
    rule = table()
    np.testing.assert_allclose(rule.load, [0.2, 0.4, 0.4])
    stats = held.statistics(rule, held.by_hand(rule, LOGITS, **STATE))
    np.testing.assert_array_equal(stats.own["cutoff"], [[2, 0, 2.5]])
    state = {name: jnp.array(value) for name, value in STATE.items()}
    moved = rule.update(state, jax.tree.map(lambda a: a[0], stats))
    np.testing.assert_allclose(moved["cutoff"], [1.25, -0.25, 1.75])
    assert moved["updates"] == 2
    # c = 5/3, -1/3, 7/3: the second token's zero expert and all of the fourth, and 1 of the first.
    routing = held.by_hand(rule, LOGITS, **moved)
    np.testing.assert_array_equal(routing.experts[0], [[1, 3, 3], [2, 3, 3], [3, 3, 3], [2, 0, 1]])
    # Layers move by themselves.
    layers = {"cutoff": jnp.array([[0.5, -0.5, 1], [0, 0, 0]]), "updates": jnp.array([1.0, 0.0])}
    own = {"cutoff": jnp.array([[2, 0, 2.5], [4, 6, 8]])}
    moved = rule.update(layers, stats._replace(own=own))
    np.testing.assert_allclose(moved["cutoff"], [[1.25, -0.25, 1.75], [2, 3, 4]])
    np.testing.assert_array_equal(moved["updates"], [2, 1])


def test_measure_is_of_each_group_and_of_what_is_scored():
    rule = ThresholdRule(pool=Pool(3, 1, 1, 1), top_k=1.5, tau=0.5, logit_norm=2.0)
    logits = np.random.default_rng(6).normal(size=(3, 16, 6)).astype(np.float32)
    params = {"w": jnp.eye(6), "cutoff": jnp.zeros(6), "updates": jnp.zeros(())}
    measured = rule.measure(rule.route(jnp.array(logits), jnp.zeros((3, 16, 6)), params))
    exact = np.float64(logits)
    scored = 2 * exact / exact.std(axis=-1, ddof=1, keepdims=True)
    # Loads 1.5 / 4.5 = 1/3 of other kinds, 1/6 of an FFN expert: 5 and 3 of 16 tokens.
    for group in range(3):
        for expert in range(6):
            largest = np.sort(scored[group, :, expert])[::-1]
            want = largest[2 if expert < 3 else 4]
            np.testing.assert_allclose(measured["cutoff"][group, expert], want, rtol=1e-5)


def test_one_token_has_a_cutoff():
    rule = table()
    measured = rule.measure(held.by_hand(rule, [[1.0, -3.0, 0.5]], **STATE))
    np.testing.assert_array_equal(measured["cutoff"], [[1, -3, 0.5]])


def test_cutoffs_have_no_gradient_and_gates_do():
    rule = table(z_weight=0.1)
    state = {name: jnp.array(value) for name, value in STATE.items()}

    def measured(w):
        routing = rule.route(jnp.array([LOGITS]), jnp.zeros((1, 4, 3)), {"w": w} | state)
        return rule.measure(routing)["cutoff"].sum()

    def gates(w):
        return rule.route(jnp.array([LOGITS]), jnp.zeros((1, 4, 3)), {"w": w} | state).gates.sum()

    np.testing.assert_array_equal(jax.grad(measured)(jnp.eye(3)), 0)
    # d gate / d w_0 = s (1 - s) x of the tokens that chose expert 0: the first and the last.
    into = jax.grad(gates)(jnp.eye(3))
    slope = sigmoid([1, 2]) * (1 - sigmoid([1, 2]))
    np.testing.assert_allclose(into[0], slope @ np.array(LOGITS)[[0, 3]], rtol=1e-5)


def test_there_is_no_balance_loss():
    rule = table(z_weight=0.1)
    terms = rule.losses(held.statistics(rule, held.by_hand(rule, LOGITS, **STATE)), {})
    z = np.mean(np.log(np.exp(LOGITS).sum(axis=1)) ** 2)
    np.testing.assert_allclose(terms["z_loss"].value, [z], rtol=1e-5)
    assert set(terms) == {"z_loss"} and terms["z_loss"].weight == 0.1


def test_cutoffs_find_the_load():
    rule = Config.parse(recipe.get_config()).moe.rule
    rng = np.random.default_rng(7)
    offsets = np.linspace(-2, 2, 12)

    @jax.jit
    def step(state, logits):
        stats = held.statistics(rule, held.by_hand(rule, logits, **state))
        return rule.update(state, jax.tree.map(lambda a: a[0], stats)), stats.load[0]

    state = {"cutoff": jnp.zeros(12), "updates": jnp.zeros(())}
    loads = []
    for _ in range(60):
        state, load = step(state, rng.normal(size=(512, 12)) + offsets)
        loads.append(load)
    assert np.abs(loads[0] - np.array(rule.load)).max() > 0.5
    # From the second step on: the first cutoffs count whole.
    np.testing.assert_allclose(loads[1], rule.load, atol=0.08)
    np.testing.assert_allclose(np.mean(loads[30:], axis=0), rule.load, rtol=0.1)
    assert np.mean(loads[30:], axis=0).sum() == pytest.approx(2, rel=0.03)


def route64(rule: ThresholdRule):
    def route(x, previous, p):
        logits, scored = held.logits64(rule, x, previous, p)
        n = p["updates"]
        c = p["cutoff"] / (1 - rule.decay**n) if n else np.zeros(rule.pool.size)
        chosen = [i for i in np.argsort(-scored) if scored[i] >= c[i]][: rule.most]
        total = sum(sigmoid(scored[chosen])) if rule.gate == "renormalise_all" else 1
        return logits, sigmoid(scored), {i: sigmoid(scored[i]) / total for i in chosen}

    return route


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"residual": "logits", "gate": "renormalise_all"},
        {"residual": "detached", "router_layers": 2},
        {"logit_norm": 0.5},
        {"zero_offset": 0.7, "logit_norm": 0.5},
        {"max_experts": 3},
        {"pool": Pool(4), "tau": 1.0},
    ],
)
def test_float64(options):
    rule = ThresholdRule(**{"pool": Pool(4, 1, 1, 1), "top_k": 1.5, "decay": 0.9} | options)
    held.to_float64(rule, route64(rule))
    cutoff = np.random.default_rng(8).normal(size=rule.pool.size) / 4
    held.to_float64(rule, route64(rule), held.params_of(rule, cutoff=cutoff, updates=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k = 0.0 must be greater than 0"),
        ({"top_k": 6.5}, r"top_k = 6.5 cannot be had with tau = 0.75 of 4 FFN . 1 constant"),
        ({"tau": 1.5}, "tau = 1.5 must be greater than 0 and at most 1"),
        ({"decay": 1.0}, "decay = 1.0 must be less than 1"),
        ({"decay": 0.0}, "decay = 0.0 must be greater than 0"),
        ({"max_experts": 1}, "max_experts = 1 must be from top_k = 2.0 to the 7 experts"),
        ({"max_experts": 8}, "max_experts = 8 must be from top_k = 2.0 to the 7 experts"),
        ({"gate": "softmax_selected"}, "must be one of 'raw', 'renormalise_all'"),
    ],
)
def test_refused(options, message):
    with pytest.raises(RuleError, match=message):
        rules.make("threshold", Pool(4, 1, 1, 1), **options)


def test_recipe():
    config = Config.parse(recipe.get_config())
    rule = config.moe.rule
    assert isinstance(rule, ThresholdRule) and rule.most == 12
    assert config.moe.dispatch == "dropless"
    assert rules.parse(rules.fields_of(rule), rule.pool) == rule
    np.testing.assert_allclose(rule.load, [0.15] * 8 + [0.2] * 4)  # those of the default job
