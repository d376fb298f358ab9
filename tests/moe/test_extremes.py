"""Every rule and both paths at the edges: one token, one expert, equal and huge logits, no room.

What comes is finite, gradients too, and is what the float64 loop makes of the same choices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moepp_jax import moe
from moepp_jax.moe import Pool, RuleError, rules
from tests import oracle
from tests.moe import cases
from tests.oracle import Spec

KINDS = {
    "adamoe": ["n_zero"],
    "deepseek": [],
    "longcat": ["n_copy"],
    "moepp": ["n_const", "n_copy", "n_zero"],
    "remoe": ["n_const", "n_copy", "n_zero"],
    "threshold": ["n_const", "n_copy", "n_zero"],
    "tied_null": ["n_zero"],
    "top_p": ["n_const", "n_copy", "n_zero"],
    "vanilla": [],
    "zeda": ["n_copy", "n_zero"],
}
SIZES = (0.0, 1e-30, 1.0, 1e4, -1e4, 1e30, -1e30)
GATES = {"adamoe", "deepseek", "moepp", "vanilla", "zeda"}  # rules with any of `router.GATES`
D = 8


def test_every_rule_is_here():
    assert sorted(KINDS) == rules.names()


@st.composite
def layers(draw):
    """A layer that a recipe may have, of few sizes: each is compiled."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    counts = {name: draw(st.sampled_from((0, 1, 2))) for name in KINDS[kind]}
    pool = Pool(draw(st.sampled_from((1, 2, 4))), **counts)
    options = {}
    if kind != "top_p":
        options["top_k"] = draw(st.sampled_from((1, 2, pool.size)))
    if kind in GATES:
        options["gate"] = draw(st.sampled_from(cases.GATES))
    if draw(st.booleans()):
        options["logit_norm"] = 0.5
    if kind == "threshold":
        options["top_k"] = float(options["top_k"])
    if kind == "longcat":
        options["ffn_experts"] = 0.5
    gamma = draw(st.sampled_from((None, 1e-6, 1.0)))
    try:
        rule = rules.make(kind, pool, **options)
    except RuleError:
        return None  # a pool that the rule is not for
    blocked = moe.dropless(moe.Blocked(moe.swiglu, block=3))
    path = blocked if gamma is None else moe.with_capacity(gamma)
    return moe.MoE(rule, path)


@st.composite
def logits(draw, tokens: int, experts: int):
    rows = st.lists(st.sampled_from(SIZES), min_size=experts, max_size=experts)
    if draw(st.booleans()):  # all tokens alike: all go to one expert, or all are padding
        return np.float32([draw(rows)] * tokens)
    return np.float32([draw(rows) for _ in range(tokens)])


def computed(layer: moe.MoE, x, own, params):
    """All that training takes of a layer whose router's logits are `own`."""
    rule = layer.rule

    def loss(x, own, params):
        router = params["router"] | {"w": own}  # one hot tokens: W x is a row of it
        y, r = moe.routed(x, jnp.zeros((*x.shape[:2], rule.pool.size)), params | {"router": router},
                          layer)  # fmt: skip
        stats = jax.tree.map(lambda a: a.mean(axis=0)[None], r.statistics)
        state = {name: params["router"][name] for name in rule.state()}
        terms = rule.losses(stats, state)
        total = sum(jnp.mean(t.weight * t.value) for t in terms.values())
        moved = rule.update({n: jnp.asarray(v)[None] for n, v in state.items()}, stats)
        return jnp.sum(y * jnp.cos(jnp.arange(D))) + total, (y, r, moved)

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, own, params)


def check(layer: moe.MoE, tokens: int, own: np.ndarray) -> None:
    rule = layer.rule
    described = moe.describe(rule, D, 4, std=0.4)
    params = jax.device_get(moe.init(jax.random.key(0), described))
    # The s-th token is the s-th unit vector, so that column s of W is its logits.
    x = np.eye(tokens, D, dtype=np.float32)[None]
    rows = params["router"]["w"].shape[0]
    w = np.zeros((rows, D), np.float32)
    w[:, :tokens] = own[:, :rows].T
    (total, (y, r, moved)), gradients = jax.jit(computed, static_argnums=0)(layer, x, w, params)
    for name, tree in {"loss": total, "y": y, "gradient": gradients, "state": moved}.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            assert np.isfinite(leaf).all(), (name, jax.tree_util.keystr(path))
    experts, gates = np.asarray(r.routing.experts), np.float64(r.routing.gates)
    N = rule.pool.size
    assert experts.min() >= 0 and experts.max() <= N and not gates[experts == N].any()
    for token in experts[0]:
        used = token[token < N]
        assert len({*used.tolist()}) == len(used)
    assert not np.isnan(np.asarray(r.statistics.entropy)).any()
    exact = jax.tree.map(np.float64, params)
    want = np.zeros((tokens, D))
    spec = Spec(*rule.pool)
    for s, k in np.argwhere(np.asarray(r.kept)[0]):
        served = oracle.expert(spec, experts[0, s, k], np.float64(x[0, s]), exact)
        want[s] += gates[0, s, k] * served
    cases.close(y[0], want, 2e-6)


@st.composite
def examples(draw):
    layer = draw(layers())
    tokens = draw(st.sampled_from((1, 2, 8)))
    return layer, tokens, layer and draw(logits(tokens, layer.pool.size))


def held(count: int):
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(
        max_examples=count, deadline=None, derandomize=True, suppress_health_check=quiet
    )


@given(examples())
@held(6)
def test_some(example):
    if example[0] is not None:
        check(*example)


@pytest.mark.slow
@given(examples())
@held(2000)
def test_many(example):
    if example[0] is not None:
        check(*example)
