"""The kernels for GPUs, interpreted: tiles of every place in the buffer, any sizes, any mesh."""

import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax.moe import kernels, triton
from tests.moe import sorted_rows


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for name in ("_ROWS", "_COLUMNS", "_CONTRACTED"):
        monkeypatch.setattr(triton, name, 32 if name == "_COLUMNS" else 16)


@pytest.mark.parametrize("counts", sorted_rows.COUNTS.values(), ids=sorted_rows.COUNTS)
@pytest.mark.parametrize(("D", "F"), [(32, 64), (40, 24)], ids=["whole tiles", "odd sizes"])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_values_and_gradients(counts, D, F, dtype, limit):
    sorted_rows.as_the_plain_loop(triton.Tiled(interpret=True), counts, dtype, D, F, limit)


def test_tiles_begin_where_an_experts_rows_begin():
    tiles = triton._tiles(jnp.array([3, 0, 40, 16, 1], jnp.int32), rows=70)
    assert len(tiles.expert) == 70 // 16 + 5
    there = np.asarray(tiles.count) > 0
    found = [
        tuple(map(int, row)) for row in zip(*(np.asarray(t)[there] for t in tiles), strict=True)
    ]
    assert found == [(0, 0, 3), (2, 3, 16), (2, 19, 16), (2, 35, 8), (3, 43, 16), (4, 59, 1)]


@pytest.mark.parametrize(("M", "N"), [(1, 1), (20, 3), (8, 5), (9, 1)])
def test_every_tile_is_some_programs(M, N):
    """Those of eight tiles of rows follow each other, so that they read the same columns."""
    turns = [
        tuple(int(i) for i in triton._in_turn(jnp.int32(program), M, N)) for program in range(M * N)
    ]
    assert sorted(turns) == [(row, column) for row in range(M) for column in range(N)]
    for first in range(0, M * N, 8):
        assert len({column for _, column in turns[first : first + 8]}) <= 2


@pytest.mark.parametrize("axes", [(1, 1, 1), (1, 2, 2)])
def test_a_step_is_that_of_blocks(axes, monkeypatch):
    sorted_rows.a_step_is_that_of_blocks(triton.Tiled(interpret=True), axes, monkeypatch)


def test_gpus_get_it():
    assert kernels.grouped_function("gpu") == triton.Tiled()
