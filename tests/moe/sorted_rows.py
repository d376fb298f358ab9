"""Grouped functions over sorted rows: loads, a plain loop to compare with, steps of a model."""

import jax
import jax.numpy as jnp
import numpy as np

from moepp_jax import mesh as mesh_lib
from moepp_jax import moe
from moepp_jax import state as state_lib
from moepp_jax.moe import kernels
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


def as_the_plain_loop(grouped, counts, dtype, D, F, limit):
    """Values and gradients of 70 rows; those past the last one are no numbers, and would show."""
    got = both(grouped, dtype, 70, D, F, counts)
    wanted = both(lambda p, x, _: by_loop(p, x, counts), dtype, 70, D, F, counts)
    cases.trees_close(jax.tree.map(np.float32, got), jax.tree.map(np.float32, wanted), limit)


def stepped(axes):
    """State and metrics after one step on a mesh."""
    sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.expert"), axes, strict=True))
    few = {"moe.dispatch": "dropless", "optim.eps": 1e-3, "optim.warmup_steps": 0}
    c = tiny.config(**few, **sizes)
    mesh = mesh_lib.make_mesh(c, jax.devices()[: np.prod(axes)])
    parts = state_lib.assemble(c, mesh)
    batch = jax.device_put(tiny.batch(c), mesh_lib.batch_sharding(mesh))
    return jax.device_get(state_lib.make_train_step(parts)(state_lib.init_state(parts), batch))


def a_step_is_that_of_blocks(grouped, axes, monkeypatch):
    """In the shard_map of the whole step, of which a kernel says nothing in its types."""
    expected, expected_metrics = stepped(axes)
    monkeypatch.setattr(kernels, "grouped_function", lambda platform, scanned: grouped)
    state, metrics = stepped(axes)
    for a, b in ((metrics, expected_metrics), (state.opt_state, expected.opt_state)):
        jax.tree.map(lambda x, y: cases.close(x, y, 3e-5) if np.any(y) else None, a, b)
