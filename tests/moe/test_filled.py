"""Row by row as far as a buffer is filled, interpreted: any load, any size of blocks, any mesh."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import moe
from moepp_jax.moe import filled, kernels
from tests.moe import cases, sorted_rows

by_blocks = functools.partial(filled.by_blocks, interpret=True)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Blocks of 32 rows, the least."""
    for name, value in {"_LANES": 8, "_MEMORY": 1}.items():
        monkeypatch.setattr(filled, name, value)


def two_of_it(x):
    return jnp.sin(x), 2 * x


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 69, 70])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_as_far_as_they_are_filled(count, dtype):
    """What is behind them may be no number."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(70, 16)), dtype).at[count:].set(jnp.nan)
    for got, wanted in zip(by_blocks(two_of_it, jnp.int32(count), x), two_of_it(x), strict=True):
        assert got.dtype == wanted.dtype
        cases.close(np.float32(got[:count]), np.float32(wanted[:count]), 1e-2)


def test_rows_that_fill_no_register_are_computed_as_all_are():
    x = jnp.ones((70, 12))
    assert np.array_equal(by_blocks(two_of_it, jnp.int32(0), x)[1], 2 * x)


@pytest.mark.parametrize("counts", sorted_rows.COUNTS.values(), ids=sorted_rows.COUNTS)
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_between_products(counts, dtype, limit):
    """Also behind what a kernel has written there are none."""
    sorted_rows.as_the_plain_loop(moe.Ragged(by_blocks), counts, dtype, 32, 24, limit)


@pytest.mark.parametrize("axes", [(1, 1, 1), (1, 2, 2)])
def test_a_step_is_that_of_blocks(axes, monkeypatch):
    sorted_rows.a_step_is_that_of_blocks(moe.Ragged(by_blocks), axes, monkeypatch)


def test_tpus_get_it():
    assert kernels.grouped_function("tpu") == moe.Ragged(filled.by_blocks)
