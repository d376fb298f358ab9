"""Tokens are drawn from the distribution that the settings ask for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepp_jax.generation import sampling
from tests import tiny

GREEDY = tiny.config().generate


def drawn(probs, n=20_000, **asked):
    """Frequencies of n draws from logits whose softmax is probs."""
    rules = sampling.rules(dataclasses.replace(GREEDY, **asked))
    logits = jnp.log(jnp.asarray(probs)) + 3.0
    keys = jax.random.split(jax.random.key(0), n)
    tokens = sampling.sample(jnp.broadcast_to(logits, (n, len(probs))), keys, rules)
    return np.bincount(tokens, minlength=len(probs)) / n


PROBS = [0.1, 0.5, 0.15, 0.25]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 1.0}, PROBS),
        # p^2 over its sum, p^(1/2) over its sum
        ({"temperature": 0.5}, [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
        ({"temperature": 2.0}, [0.3162 / 1.9106, 0.7071 / 1.9106, 0.3873 / 1.9106, 0.5 / 1.9106]),
        ({"temperature": 1.0, "top_k": 1}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"temperature": 1.0, "top_k": 4}, PROBS),
        ({"temperature": 1.0, "top_k": 9}, PROBS),
        ({"temperature": 1.0, "top_p": 1e-6}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.49}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.7}, [0, 2 / 3, 0, 1 / 3]),
        ({"temperature": 1.0, "top_p": 0.85}, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        ({"temperature": 1.0, "top_p": 0.95}, PROBS),
        # After the temperature: 0.725 of the mass is the best token's.
        ({"temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0]),
        # Of the three that top_k leaves, 5/9 is the best one's.
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.55}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.56}, [0, 2 / 3, 0, 1 / 3]),
        ({"temperature": 1.0, "min_p": 0.19}, PROBS),
        ({"temperature": 1.0, "min_p": 0.21}, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        ({"temperature": 0.5, "min_p": 0.21}, [0, 0.8, 0, 0.2]),
    ],
)
def test_the_distribution_is_the_one_by_hand(asked, expected):
    expected = np.array(expected)
    frequencies = drawn(PROBS, **asked)
    assert (frequencies[expected == 0] == 0).all()  # never outside the allowed set
    np.testing.assert_allclose(frequencies, expected, atol=0.012)  # over 3 deviations


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.floats(0.01, 0.99))
def test_the_best_are_those_of_a_sort(seed, k, p):
    logits = np.random.default_rng(seed).normal(size=(3, 40)).astype(np.float32)
    logits[1] -= 100.0
    keep_best = jax.jit(sampling._keep_best)
    kept = np.asarray(keep_best(logits, np.ones_like(logits), np.float32(k)))
    assert (np.isfinite(kept) == (logits >= -np.sort(-logits)[:, k - 1 : k])).all()
    probs = np.asarray(jax.nn.softmax(logits))
    kept = np.asarray(keep_best(logits, probs, np.float32(p)))
    ordered = -np.sort(-probs)
    needed = (np.cumsum(ordered, axis=1) < p - 1e-5).sum(axis=1)
    most = (np.cumsum(ordered, axis=1) < p + 1e-5).sum(axis=1) + 1
    counts = np.isfinite(kept).sum(axis=1)
    assert (needed < counts).all() and (counts <= most).all()
    least = np.where(np.isfinite(kept), probs, 9).min(axis=1, keepdims=True)
    assert (np.isfinite(kept) == (probs >= least)).all()


def test_rows_are_filtered_and_drawn_each_on_its_own():
    rules = sampling.rules(dataclasses.replace(GREEDY, temperature=1.0, top_p=0.6))
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.05, 0.15, 0.8]] * 2000))
    keys = jax.random.split(jax.random.key(0), len(logits))
    tokens = np.asarray(sampling.sample(logits, keys, rules)).reshape(-1, 2)
    assert set(tokens[:, 0]) == {0, 1} and set(tokens[:, 1]) == {2}


def test_tokens_that_the_text_holds_are_penalised():
    rules = sampling.rules(dataclasses.replace(GREEDY, repetition_penalty=2.0))
    logits = jnp.array([[3.0, 2.0, -1.0], [-1.0, -1.5, -9.0], [3.0, 1.0, 0.0]])
    seen = jnp.array([[True, False, False], [True, True, False], [True, False, False]])
    # 1.5 against 2; -2 against -3; 1.5 against 1
    assert sampling.sample(logits, None, rules, seen).tolist() == [1, 0, 0]


def test_no_two_draws_share_a_key():
    keys = {
        tuple(jax.random.key_data(sampling.draw_key(*numbers)).tolist())
        for numbers in np.ndindex(3, 3, 3, 3)
    }
    assert len(keys) == 81
    assert sampling.number_of([1, 2]) != sampling.number_of([2, 1])
