"""Generation's grouped functions: the same numbers, and experts without rows are not read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepp_jax import moe
from moepp_jax.moe import kernels
from moepp_jax.moe.products import few_weights_first, tokens_first
from tests import oracle
from tests.moe import cases
from tests.oracle import Spec

SPEC = Spec(4, 1, 1, 1, top_k=2)
PARAMS = cases.params(SPEC)


def apart(ffn):
    return [jax.tree.map(lambda p, e=e: jnp.asarray(p[e]), ffn) for e in range(len(ffn["w_in"]))]


@functools.cache
def path_for(tokens: int, platform: str = "cpu"):
    path = moe.dropless(kernels.reading_chosen(platform, tokens))
    rule = cases.rule(SPEC)

    def served(x, experts, gates, ffn):
        return path(x, moe.Routing(experts, gates, None, None), ffn, rule, None)[0]

    return jax.jit(served)


@functools.cache
def by_hand(expert):
    """The function of one FFN expert, in float64."""
    return functools.partial(oracle.expert, SPEC, expert, params=oracle64())


@functools.cache
def oracle64():
    return {group: {k: np.float64(v) for k, v in p.items()} for group, p in PARAMS.items()}


def expected(x_TD, experts_TK, gates_TK):
    """What the FFN experts add to each token, one after the other."""
    y = np.zeros(x_TD.shape)
    for t, k in np.ndindex(experts_TK.shape):
        if experts_TK[t, k] < SPEC.n_ffn:
            y[t] += gates_TK[t, k] * by_hand(int(experts_TK[t, k]))(np.float64(x_TD[t]))
    return y


def choices(draw_from, tokens):
    """For each token two experts, distinct."""
    pairs = [(a, b) for a in draw_from for b in draw_from if a != b]
    return st.lists(st.sampled_from(pairs), min_size=tokens, max_size=tokens)


N = len(SPEC.kinds)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_it_is_the_sum_by_hand(tokens, data):
    pools = [range(N), range(SPEC.n_ffn), range(SPEC.n_ffn, N), (0, 5), (3, 6)]
    chosen = data.draw(choices(data.draw(st.sampled_from(pools)), tokens))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    experts = np.array(chosen, np.int32)
    x = rng.normal(size=(tokens, cases.D)).astype(np.float32)
    gates = rng.uniform(size=experts.shape).astype(np.float32)
    arguments = (x[None], experts[None], gates[None], apart(PARAMS["ffn"]))
    y = path_for(tokens)(*arguments)[0]
    np.testing.assert_allclose(y, expected(x, experts, gates), rtol=0, atol=1e-5)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("experts", [[[0, 5], [0, 6], [0, 1]], [[4, 5], [5, 6], [6, 4]]])
def test_other_platforms_take_a_stack(platform, experts):
    x = np.random.default_rng(0).normal(size=(3, cases.D)).astype(np.float32)
    gates = np.ones((3, 2), np.float32)
    y = path_for(3, platform)(x[None], np.array([experts], np.int32), gates[None], PARAMS["ffn"])
    np.testing.assert_allclose(y[0], expected(x, np.array(experts), gates), rtol=0, atol=1e-5)


@pytest.mark.parametrize("counts", [[1, 0, 2, 0], [6, 5, 0, 4], [0, 0, 0, 0], [40, 1, 60, 59]])
@pytest.mark.parametrize("experts", [4, 16])
def test_a_tpu_takes_few_rows_in_other_ways_than_many(counts, experts):
    """A loop over few of many experts, all of few, and the kernel: rows of 3 to 160 at 4 and 16."""
    counts = np.array([*counts, *[0] * (experts - 4)], np.int32)
    rng = np.random.default_rng(0)
    shapes = {"w_in": (experts, 2, 24, cases.D), "w_out": (experts, cases.D, 24)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    there = int(counts.sum())
    rows = rng.normal(size=(there + 1, cases.D)).astype(np.float32)  # one is nobody's
    found = jax.jit(kernels.reading_chosen("tpu", 80))(params, rows, counts)
    own = np.repeat(np.arange(experts), counts)
    h = np.einsum("rd,rzfd->rzf", rows[:there], params["w_in"][own])
    a = h[:, 0] / (1 + np.exp(-h[:, 0])) * h[:, 1]
    wanted = np.einsum("rf,rdf->rd", a, params["w_out"][own])
    np.testing.assert_allclose(found[:there], wanted, rtol=1e-4, atol=1e-4)
    assert np.isfinite(found).all()


def test_the_whole_layer_is_the_oracles():
    layer = dataclasses.replace(
        cases.layer(SPEC, "blocked"), path=moe.dropless(kernels.reading_chosen("cpu", 6))
    )
    x = jax.random.normal(jax.random.key(0), (6, 1, cases.D))
    previous = jnp.zeros((6, 1, N))
    params = jax.tree.map(jnp.asarray, PARAMS) | {"ffn": apart(PARAMS["ffn"])}
    y, *_ = jax.jit(functools.partial(moe.local, moe=layer))(x, previous, params)
    np.testing.assert_allclose(y, oracle.layer(SPEC, x, previous, PARAMS).y, rtol=0, atol=1e-5)


def test_an_expert_without_rows_is_not_read():
    """What no token chose may be anything: nothing of it comes into the sum."""
    ffn = apart(PARAMS["ffn"])
    poisoned = [p if e == 2 else jax.tree.map(lambda a: a * jnp.nan, p) for e, p in enumerate(ffn)]
    x = np.ones((1, 3, cases.D), np.float32)
    experts = np.array([[[2, 5], [4, 6], [6, 2]]], np.int32)
    gates = np.ones(experts.shape, np.float32)
    y = path_for(3)(x, experts, gates, poisoned)
    np.testing.assert_array_equal(y, path_for(3)(x, experts, gates, ffn))
    assert np.isnan(path_for(3)(x, experts - 1, gates, poisoned)).any()


def test_no_parameter_is_copied():
    D, F = 64, 96
    ffn = [{"w_in": jnp.ones((2, F, D)), "w_out": jnp.ones((D, F))} for _ in range(4)]
    shapes = jnp.ones((1, 4, D)), jnp.zeros((1, 4, 2), jnp.int32), jnp.ones((1, 4, 2))
    program = path_for(4).lower(*shapes, ffn).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * 2 * F * D


@pytest.mark.parametrize("rows", [1, 2, 8, 9])
@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_products_of_few_rows(rows, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, rows, 6)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(5, 6)), jnp.bfloat16)
    few, many = few_weights_first(x, w, dtype), tokens_first(x, w, dtype)
    assert few.shape == (1, rows, 5) and few.dtype == (dtype or jnp.bfloat16)
    np.testing.assert_allclose(np.float32(few), np.float32(many), rtol=1e-2, atol=1e-2)
