"""The order of an epoch is a permutation, of its own, and looks like one drawn at random."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepp_jax.data.shuffle import shuffled

seeds = st.integers(0, 2**32 - 1)


@given(st.integers(1, 600), seeds, st.integers(0, 10**6))
def test_an_epoch_has_every_row_once(length, seed, epoch):
    rows = shuffled(epoch * length + np.arange(length), length, seed)
    assert sorted(rows.tolist()) == [*range(length)]


@given(st.integers(1, 10**10), seeds, st.lists(st.integers(0, 2**40), max_size=20))
def test_a_row_is_a_function_of_its_number(length, seed, numbers):
    together = shuffled(np.array(numbers, np.int64), length, seed)
    assert together.tolist() == [int(shuffled(np.array([n]), length, seed)[0]) for n in numbers]
    assert ((together >= 0) & (together < length)).all()


def test_seeds_and_epochs_have_orders_of_their_own():
    n = 1000
    orders = [shuffled(e * n + np.arange(n), n, seed) for seed in range(4) for e in range(4)]
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).sum() < 10  # 1 is expected
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)


def chi_squared(counts, expected: float) -> float:
    """Per degree of freedom: 1 where all is as likely."""
    return float(((np.array(counts) - expected) ** 2).sum() / expected / (len(counts) - 1))


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_all_orders_are_about_as_likely(length):
    epochs = 4000
    rows = shuffled(np.arange(length * epochs), length, 0).reshape(epochs, length)
    found = Counter(map(tuple, rows.tolist()))
    orders = [*itertools.permutations(range(length))]
    assert chi_squared([found[order] for order in orders], epochs / len(orders)) < 5


@pytest.mark.parametrize("length", [1000, 65_536, 100_000])
def test_neighbours_are_anywhere(length):
    for epoch in range(5):
        rows = shuffled(epoch * length + np.arange(length), length, 7)
        for apart in (1, 2, 8, 64):
            distances = (np.roll(rows, -apart) - rows) % length
            counts, _ = np.histogram(distances, 16, (0, length))
            assert chi_squared(counts, length / 16) < 4


def test_far_rows_of_many_cost_what_the_first_of_a_few_do():
    start = time.perf_counter()
    shuffled(10**15 + np.arange(2048), 10**9, 0)
    assert time.perf_counter() - start < 0.1
