"""Routing at its edges: ties, certainty, tokens of zeros, zero experts alone."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import moe
from moepp_jax.moe import router
from moepp_jax.moe.rule import RuleError, require_sound
from moepp_jax.moe.rules.moepp import MoEPPRule
from tests.moe import cases


def route(logits_N, first_zero, k=2, **options):
    """Routes one token of given logits."""
    x = jnp.asarray(logits_N, jnp.float32)[None, None]
    own = {"w": jnp.eye(x.shape[-1])}
    pool = moe.Pool(first_zero, n_zero=x.shape[-1] - first_zero)
    rule = moe.rules.make("moepp", pool, top_k=k, residual="none", **options)
    return rule.route(x, jnp.zeros_like(x), own)


def test_of_equal_scores_the_lower_number_wins():
    assert route([1.0, 3.0, 3.0, 3.0], first_zero=4, k=3).experts.tolist() == [[[1, 2, 3]]]
    assert route([0.0] * 4, first_zero=4).experts.tolist() == [[[0, 1]]]


@pytest.mark.parametrize("rule", cases.GATES)
def test_zero_experts_alone(rule):
    """What only zero experts serve has a gate of 0 where zero experts weigh nothing."""

    def gates(logits):
        return route(logits, first_zero=2, gate=rule).gates[0, 0]

    logits = jnp.array([0.0, 0.0, 3.0, 2.0])
    if rule == "renormalise_nonzero":
        np.testing.assert_array_equal(gates(logits), [0.0, 0.0])
    else:
        assert np.all(gates(logits) > 0)
    assert np.all(np.isfinite(jax.jit(jax.jacobian(gates))(logits)))


def test_beside_a_zero_expert_the_other_weighs_one():
    gates = route([2.0, 0.0, 3.0], first_zero=2).gates
    np.testing.assert_array_equal(gates, [[[0.0, 1.0]]])


@pytest.mark.parametrize("rule", cases.GATES)
def test_gradients_are_finite_however_sure_the_router_is(rule):
    """The best expert leads by `gap`: the second's probability is exp(-gap), in the end 0."""

    @jax.jit
    @jax.jacobian
    def slopes(logits):
        return route(logits, first_zero=3, gate=rule).gates[0, 0]

    for gap in (20.0, 50.0, 80.0, 200.0):
        for logits in ([gap, 0.0, -1.0, -2.0], [0.0, -1.0, -2.0, gap]):  # FFN first, zero first
            assert np.all(np.isfinite(slopes(jnp.array(logits)))), logits


@pytest.mark.parametrize(
    "logit_norm",
    [0.0, 1.0],
    ids=["as they are", "normalised"],
)
def test_a_token_of_zeros(logit_norm):
    """A padding token whose embedding is zeros has equal logits, with no deviation to divide by."""

    def probs(logits):
        return route(logits, first_zero=3, logit_norm=logit_norm).scores[0, 0]

    np.testing.assert_allclose(probs(jnp.zeros(4)), np.full(4, 0.25))
    assert np.all(np.isfinite(jax.jit(jax.jacobian(probs))(jnp.zeros(4))))


def test_an_offset_moves_tokens_to_zero_computation_experts():
    """By hand: as if the logits of those experts alone were higher; what is handed on is not."""
    logits = [1.0, 0.5, 0.0, -0.5]
    moved = route(logits, first_zero=2, k=1, zero_offset=1.25)
    by_hand = route([1.0, 0.5, 1.25, 0.75], first_zero=2, k=1)
    assert moved.experts.tolist() == by_hand.experts.tolist() == [[[2]]]
    np.testing.assert_allclose(moved.scores, by_hand.scores)
    np.testing.assert_array_equal(moved.logits, [[logits]])
    assert route(logits, first_zero=2, k=1, zero_offset=-9.0).experts.tolist() == [[[0]]]


def test_an_offset_is_of_logits_that_are_normalised():
    """A unit of it is one of the deviation that tokens are given."""
    logits = np.array([4.0, 2.0, 0.0, -2.0])
    moved = route(logits, first_zero=2, logit_norm=1.0, zero_offset=1.0).scores
    scored = logits / np.std(logits, ddof=1) + [0, 0, 1, 1]
    np.testing.assert_allclose(moved[0, 0], np.exp(scored) / np.exp(scored).sum(), rtol=1e-6)


def test_an_offset_without_zero_computation_experts():
    with pytest.raises(RuleError, match=r"zero_offset = 1.0 is for zero-computation experts, and"):
        moe.rules.make("vanilla", moe.Pool(4), zero_offset=1.0)


class SigmoidRule(MoEPPRule):
    """Sigmoid scores, selected with a bias that the gates do not have (arXiv 2408.15664)."""

    def route(self, x_GSD, previous_GSN, params):
        logits = self.logits(x_GSD, previous_GSN, params)
        scores = jax.nn.sigmoid(logits)
        experts = router.top_k(scores + jnp.array([0.0, 0.0, 1.0, 0.0]), self.top_k)
        return moe.Routing(experts, router.at_chosen(scores, experts), scores, logits)


def test_rules_of_ones_own():
    """One that lies anywhere is named by its module and class."""
    kind = f"{__name__}:SigmoidRule"
    rule = moe.rules.parse({"type": kind, "residual": "none"}, moe.Pool(4))
    assert moe.rules.parse(moe.rules.fields_of(rule), moe.Pool(4)) == rule
    require_sound(rule)
    x = jnp.array([[[1.0, 2.0, -3.0, 0.0]]])
    r = rule.route(x, jnp.zeros_like(x), {"w": jnp.eye(4)})
    assert r.experts.tolist() == [[[2, 1]]]
    np.testing.assert_allclose(r.gates, [[[1 / (1 + np.exp(3.0)), 1 / (1 + np.exp(-2.0))]]], 1e-6)


def test_chosen_where_takes_the_best_that_are_chosen():
    scores = jnp.array([[[0.1, 0.4, 0.3, 0.2]]])
    chosen = jnp.array([[[True, False, True, True]]])
    assert router.chosen_where(chosen, scores, 4).tolist() == [[[2, 3, 0, 4]]]
    assert router.chosen_where(chosen, scores, 2).tolist() == [[[2, 3]]]
    assert router.chosen_where(~chosen, scores, 2).tolist() == [[[1, 4]]]


@pytest.mark.parametrize("how", router.GATES)
def test_an_unused_choice_has_no_gate_and_changes_no_other(how):
    logits = jnp.array([[[2.0, 1.0, 0.0, -1.0]]])
    scores = jax.nn.softmax(logits)
    alone = router.gates_of(how, logits, scores, jnp.array([[[0, 2]]]), first_zero=3)
    more = router.gates_of(how, logits, scores, jnp.array([[[0, 2, 4, 4]]]), first_zero=3)
    np.testing.assert_array_equal(more, jnp.pad(alone, [(0, 0), (0, 0), (0, 2)]))


def test_an_option_cannot_take_the_place_of_a_method():
    with pytest.raises(TypeError, match="an option cannot be called most"):
        type("Wrong", (MoEPPRule,), {"__annotations__": {"most": int}})


class Broken(MoEPPRule):
    """Each says what is wrong with it by its name."""

    broken: ClassVar = {
        "gates unused choices": lambda r: r._replace(experts=r.experts.at[..., 1].set(4)),
        "chooses an expert twice": lambda r: r._replace(experts=jnp.zeros_like(r.experts)),
        "chooses expert 7": lambda r: r._replace(experts=r.experts.at[..., 1].set(7)),
        "forgets an expert's score": lambda r: r._replace(scores=r.scores[..., 1:]),
        "chooses three": lambda r: r._replace(experts=jnp.repeat(r.experts, 2, axis=-1)),
    }
    how = ""

    def route(self, *args):
        return self.broken[self.how](super().route(*args))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("gates unused choices", r"gives unused choices \(expert 4\) gates"),
        ("chooses an expert twice", "chooses expert 0 twice"),
        ("chooses expert 7", "chooses expert 7 of 4"),
        ("forgets an expert's score", r"gives scores of shape \(2, 8, 3\), not \(2, 8, 4\)"),
        ("chooses three", r"gives experts of shape \(2, 8, 4\), not \(2, 8, 2\)"),
    ],
)
def test_a_rule_that_breaks_the_contract_is_refused(how, said):
    rule = type("Broken", (Broken,), {"how": how})(pool=moe.Pool(4))
    with pytest.raises(RuleError, match=said):
        require_sound(rule)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"type": "moep"}, "type = 'moep': did you mean 'moepp'"),
        ({"tau": 0.5}, "type is missing"),
        ({"type": "moepp", "tua": 0.5}, "tua = 0.5 is no option of 'moepp': did you mean tau"),
        ({"type": "moepp", "zzz": 0.5}, "zzz = 0.5 is no option of 'moepp': it has .*top_k, tau"),
        ({"type": "moepp", "top_k": 2.0}, "top_k = 2.0 must be of type int"),
        ({"type": "moepp", "tau": float("nan")}, "tau = nan must be finite"),
        ({"type": "moepp", "tau": 0.0}, "tau = 0.0 must be greater than 0 and at most 1"),
        ({"type": "moepp", "balance_weight": -1}, "balance_weight = -1.0 must be at least 0"),
        ({"type": "moepp", "gate": "mean"}, "gate = 'mean' must be one of 'raw'"),
        (
            {"type": "nowhere:Rule"},
            "type = 'nowhere:Rule' cannot be imported: .*; it is looked for in the current folder",
        ),
        ({"type": "math:floor"}, "type = 'math:floor' is no subclass"),
    ],
)
def test_bad_options_are_named(fields, said):
    with pytest.raises(RuleError, match=said):
        moe.rules.parse(fields, moe.Pool(4, 1, 1, 1))
