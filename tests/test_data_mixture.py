"""Every source has its share of the rows at any moment, in its own order, without a draw."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepp_jax.configs.data import paper_mixture
from moepp_jax.data.mixture import Mixture

weights_of = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12).map(
    lambda weights: {f"s{i}": w for i, w in enumerate(weights)}
)
PAPER = {n: s["weight"] for n, s in paper_mixture.sources("corpora").items()}


def so_far(mixture, begin, size):
    """[size, sources]: rows that each has of all up to `begin`, and up to each of the next."""
    source, _ = mixture.select(begin + np.arange(size))
    ahead = np.array(list(mixture.counts(begin).values()))
    return ahead + np.cumsum(source[:, None] == np.arange(len(mixture.names)), axis=0)


@given(weights_of, st.integers(0, 2**32 - 300))
def test_after_any_number_of_rows_each_source_is_within_two_rows_of_its_share(weights, begin):
    mixture = Mixture(weights)
    rows = begin + 1 + np.arange(200)
    wanted = rows[:, None] * np.array(list(mixture.shares.values()))
    assert np.abs(so_far(mixture, begin, 200) - wanted).max() < 2 + begin * len(weights) / 2**31


@given(weights_of, st.integers(0, 2**32 - 300))
def test_each_source_gives_its_rows_one_after_the_other(weights, begin):
    mixture = Mixture(weights)
    source, row = mixture.select(begin + np.arange(200))
    counts = so_far(mixture, begin, 200)
    np.testing.assert_array_equal(row + 1, counts[np.arange(200), source])
    assert list(mixture.counts(begin + 200).values()) == counts[-1].tolist()


@given(weights_of, st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_a_row_is_a_function_of_its_number(weights, numbers):
    mixture = Mixture(weights)
    together = mixture.select(np.array(numbers, np.int64))
    alone = [mixture.select(np.array([n])) for n in numbers]
    for part, values in enumerate(together):
        assert values.tolist() == [one[part][0] for one in alone]


@given(weights_of)
def test_the_order_in_which_sources_are_named_does_not_matter(weights):
    backwards = dict(reversed(weights.items()))
    here, there = (Mixture(w) for w in (weights, backwards))
    rows = np.arange(100)
    names = [np.array(m.names)[m.select(rows)[0]] for m in (here, there)]
    np.testing.assert_array_equal(*names)


def test_one_source_is_not_mixed():
    source, row = Mixture({"text": 0.3}).select(np.arange(7, 20))
    assert not source.any() and row.tolist() == [*range(7, 20)]


def test_a_source_of_weight_zero_is_not_there():
    mixture = Mixture({"a": 2.0, "b": 0.0, "c": 1.0})
    assert mixture.names == ["a", "c"] and mixture.shares == {"a": 2 / 3, "c": 1 / 3}


def test_the_papers_mixture_is_exact_after_a_hundred_billion_tokens():
    mixture = Mixture(PAPER)
    rows = 48_828_125  # of 2,048 tokens
    for name, count in mixture.counts(rows).items():
        assert abs(count - rows * PAPER[name] / 100) < 2


def test_far_rows_cost_what_the_first_ones_do():
    mixture = Mixture(PAPER)
    batch = np.arange(2048)
    start = time.perf_counter()
    mixture.select(10**6 * 2048 + batch)  # of step 10^6
    assert time.perf_counter() - start < 0.1


def test_rows_past_what_64_bits_allow_are_refused():
    with pytest.raises(ValueError, match="below 4,294,967,296"):
        Mixture({"a": 1.0, "b": 2.0}).select(np.array([2**32]))
