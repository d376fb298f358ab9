"""The kernels for GPUs, interpreted: tiles of every place in the buffer, any sizes, any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import mesh as mesh_lib
from moepp_jax import moe
from moepp_jax import state as state_lib
from moepp_jax.moe import kernels, triton
from tests import tiny
from tests.moe import cases

E = 5
COUNTS = {
    "even": [14, 14, 14, 14, 14],
    "gaps": [0, 33, 0, 37, 0],
    "one has all": [0, 0, 70, 0, 0],
    "one each": [1, 1, 1, 1, 1],
    "whole tiles": [16, 32, 0, 16, 0],
    "no rows": [0, 0, 0, 0, 0],
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for name in ("_ROWS", "_COLUMNS", "_CONTRACTED"):
        monkeypatch.setattr(triton, name, 32 if name == "_COLUMNS" else 16)


def both(grouped, dtype, R, D, F, counts):
    """Values and gradients, of the rows that exist; the others go in as numbers that are none."""
    rng = np.random.default_rng(0)
    there = np.arange(R) < sum(counts)
    arrays = {"w_in": (E, 2, F, D), "w_out": (E, D, F), "x": (R, D), "d": (R, D)}
    made = {n: jnp.asarray(rng.normal(size=s) / 4, dtype) for n, s in arrays.items()}
    x, d = (jnp.where(there[:, None], made.pop(name), np.nan) for name in ("x", "d"))
    y, back = jax.vjp(lambda p, x: grouped(p, x, jnp.array(counts, jnp.int32)), made, x)
    d_params, d_x = back(d)
    return jax.device_get((y[there], d_params, d_x[there]))


def by_loop(params, rows, counts):
    """Each expert on its own rows, in float32."""
    ends = np.cumsum(counts)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    parts = []
    for e, (start, end) in enumerate(zip(ends - np.asarray(counts), ends, strict=True)):
        own = jax.tree.map(lambda p, e=e: p[e : e + 1], wide)
        parts.append(moe.swiglu(own, rows[None, start:end].astype(jnp.float32))[0])
    rest = jnp.zeros((len(rows) - ends[-1], rows.shape[1]))
    return jnp.concatenate([*parts, rest]).astype(rows.dtype)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("D", "F"), [(32, 64), (40, 24)], ids=["whole tiles", "odd sizes"])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_values_and_gradients(counts, D, F, dtype, limit):
    """What is past the last row is never read: it is no number, and would show."""
    got = both(triton.Tiled(interpret=True), dtype, 70, D, F, counts)
    wanted = both(lambda p, x, _: by_loop(p, x, counts), dtype, 70, D, F, counts)
    cases.trees_close(jax.tree.map(np.float32, got), jax.tree.map(np.float32, wanted), limit)


def test_tiles_begin_where_an_experts_rows_begin():
    tiles = triton._tiles(jnp.array([3, 0, 40, 16, 1], jnp.int32), rows=70)
    assert len(tiles.expert) == 70 // 16 + E
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


def stepped(axes):
    """State and metrics after one step on a mesh."""
    sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.expert"), axes, strict=True))
    few = {"moe.dispatch": "dropless", "optim.eps": 1e-3, "optim.warmup_steps": 0}
    c = tiny.config(**few, **sizes)
    mesh = mesh_lib.make_mesh(c, jax.devices()[: np.prod(axes)])
    parts = state_lib.assemble(c, mesh)
    batch = jax.device_put(tiny.batch(c), mesh_lib.batch_sharding(mesh))
    return jax.device_get(state_lib.make_train_step(parts)(state_lib.init_state(parts), batch))


@pytest.mark.parametrize("axes", [(1, 1, 1), (1, 2, 2)])
def test_a_step_is_that_of_blocks(axes, monkeypatch):
    """In the shard_map of the whole step, of which a kernel says nothing in its types."""
    expected, expected_metrics = stepped(axes)
    interpreted = triton.Tiled(interpret=True)
    monkeypatch.setattr(kernels, "grouped_function", lambda platform: interpreted)
    state, metrics = stepped(axes)
    for a, b in ((metrics, expected_metrics), (state.opt_state, expected.opt_state)):
        jax.tree.map(lambda x, y: cases.close(x, y, 3e-5) if np.any(y) else None, a, b)


def test_gpus_get_it():
    assert kernels.grouped_function("gpu") == triton.Tiled()
