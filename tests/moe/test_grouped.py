"""Grouped expert functions: any counts, any block, values and gradients against a plain loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from moepp_jax import moe
from moepp_jax.moe import grouped, kernels, ragged, triton
from tests.moe import cases
from tests.oracle import Spec

E, R, D = 4, 12, cases.D

COUNTS = {
    "even": [3, 3, 3, 3],
    "gaps": [0, 5, 0, 7],
    "all on the first": [12, 0, 0, 0],
    "all on the last": [0, 0, 0, 12],
    "rows to spare": [1, 0, 4, 2],
    "no rows": [0, 0, 0, 0],
}


@pytest.mark.parametrize(
    ("rows", "k", "n", "tiles"),
    [
        (131_072, 1536, 8192, "512,1536,1024"),
        (131_072, 8192, 1536, "512,2048,768"),
        (131_072, 4096, 1536, "512,2048,768"),
        (45_952, 768, 4096, "128,768,1024"),  # 359 x 128
        (45_952, 768, 4160, ""),
        (45_952, 700, 4096, ""),
        (100, 1536, 8192, ""),
    ],
)
def test_tiles_divide_the_product(rows, k, n, tiles):
    assert ragged._tiles(rows, k, n) == tiles


def gelu_mlp(params, x_EBD):
    y = jnp.einsum("ebd,efd->ebf", x_EBD, params["w"]) + params["b"][:, None]
    return jax.nn.gelu(y) @ params["out"]


def swiglu_params():
    return cases.params(Spec(E))["ffn"]


def gelu_params():
    rng = np.random.default_rng(0)
    shapes = {"w": (E, 8, D), "b": (E, 8), "out": (E, 8, D)}
    return {k: np.float32(rng.normal(size=s)) for k, s in shapes.items()}


GROUPED = {
    f"blocks of {b}": (moe.Blocked(moe.swiglu, b), moe.swiglu, swiglu_params) for b in (1, 5)
}
GROUPED |= {
    "one block": (moe.Blocked(moe.swiglu, 256), moe.swiglu, swiglu_params),
    "blocks of a GELU MLP": (moe.Blocked(gelu_mlp, 4), gelu_mlp, gelu_params),
    "blocks of 5, kept": (moe.Blocked(moe.KEEPING_SWIGLU, 5), moe.swiglu, swiglu_params),
    "one block, kept": (moe.Blocked(moe.KEEPING_SWIGLU, 256), moe.swiglu, swiglu_params),
    "ragged": (moe.Ragged(), moe.swiglu, swiglu_params),
    "Triton's kernels, interpreted": (triton.Tiled(interpret=True), moe.swiglu, swiglu_params),
}


@functools.cache
def compiled(name, R=R):
    """(values and gradients of a grouped function, the same of every expert on every row)."""
    grouped, expert, make = GROUPED[name]

    def ours(params, rows, counts, d):
        existing = jnp.arange(R) < counts.sum()
        y = jnp.where(existing[:, None], grouped(params, rows, counts), 0.0)
        return jnp.sum(d * y), y

    def naive(params, rows, counts, d):
        of = jnp.searchsorted(jnp.cumsum(counts), jnp.arange(R), side="right")
        y_ERD = expert(params, jnp.broadcast_to(rows, (E, R, D)))
        y = jnp.sum(jnp.where((of == jnp.arange(E)[:, None])[..., None], y_ERD, 0.0), axis=0)
        return jnp.sum(d * y), y

    params = jax.tree.map(jnp.asarray, make())
    return params, *(jax.jit(jax.grad(f, (0, 1), has_aux=True)) for f in (ours, naive))


def _arguments(counts, R=R):
    """Rows, counts, and the gradient of the rows that are returned."""
    rng = np.random.default_rng(1)
    rows, d = (jnp.asarray(rng.normal(size=(R, D)), jnp.float32) for _ in range(2))
    return rows, jnp.array(counts, jnp.int32), d


def as_the_plain_loop(name, counts, R=R, tolerance=1e-6):
    params, ours, naive = compiled(name, R)
    arguments = _arguments(counts, R)
    gradients, y = ours(params, *arguments)
    wanted, y_naive = naive(params, *arguments)
    cases.close(y, y_naive, 1e-6)
    cases.trees_close(gradients, wanted, tolerance)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_values_and_gradients(name, counts):
    as_the_plain_loop(name, counts)


@pytest.mark.parametrize("name", ["one block", "one block, kept"])
@pytest.mark.parametrize("counts", [[3, 70, 600, 20], [256, 1, 200, 243], [0, 0, 700, 0]], ids=str)
def test_odd_blocks_of_all_sizes_beside_full_ones(counts, name):
    """In the middle of the buffer and at its end."""
    as_the_plain_loop(name, counts, R=700, tolerance=1e-5)  # sums of more terms


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_what_is_kept_is_what_would_be_computed_again(counts):
    kept, again = (
        compiled(name)[1](jax.tree.map(jnp.asarray, swiglu_params()), *_arguments(counts))
        for name in ("blocks of 5, kept", "blocks of 5")
    )
    jax.tree.map(np.testing.assert_array_equal, kept, again)


@given(data=st.data(), experts=st.integers(1, 20), block=st.integers(1, 300))
def test_there_is_room_for_what_is_kept_of_any_counts(data, experts, block):
    counts = data.draw(st.lists(st.integers(0, 900), min_size=experts, max_size=experts))
    rows = sum(counts) + data.draw(st.integers(0, 50))
    sizes = grouped._sizes(min(block, max(rows, 1)))
    fulls, odds = zip(*(divmod(max(c - 1, 0), sizes[-1]) for c in counts), strict=True)
    whole = [min(s for s in sizes if s > odd) for odd, c in zip(odds, counts, strict=True) if c]
    assert sum(whole) + sum(fulls) * sizes[-1] <= grouped._room(rows, experts, sizes)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_rows_past_the_last_one_come_back(counts):
    params = jax.tree.map(jnp.asarray, swiglu_params())
    rows = jnp.arange(R * D, dtype=jnp.float32).reshape(R, D)
    y = jax.jit(moe.Blocked(moe.swiglu, 5))(params, rows, jnp.array(counts, jnp.int32))
    assert np.array_equal(y[sum(counts) :], rows[sum(counts) :])


@pytest.mark.parametrize("name", GROUPED)
def test_rows_to_spare_are_finite(name):
    grouped, _, make = GROUPED[name]
    params = jax.tree.map(jnp.asarray, make())
    y = jax.jit(grouped)(params, jnp.ones((R, D)), jnp.array([1, 0, 4, 2], jnp.int32))
    assert np.all(np.isfinite(y))


def test_gradients_by_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), swiglu_params())
        rows = jnp.asarray(rng.normal(size=(R, D)))
        counts = jnp.array([2, 0, 7, 3], jnp.int32)
        blocked = jax.jit(lambda p, x: moe.Blocked(moe.swiglu, block=3)(p, x, counts))
        check_grads(blocked, (params, rows), 1, ["rev"], atol=1e-7, rtol=1e-7)


def test_gradients_of_bfloat16_parameters_add_up():
    """1024 equal rows in blocks of one: in bfloat16 a sum stops growing at 256 times its terms."""
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), swiglu_params())
    blocked = moe.Blocked(moe.swiglu, block=1)
    counts = jnp.array([1024, 0, 0, 0], jnp.int32)

    @jax.jit
    @jax.grad
    def gradient(params):
        y = blocked(params, jnp.ones((1024, D), jnp.bfloat16), counts)
        return jnp.sum(y.astype(jnp.float32))

    of_one_row = jax.grad(lambda p: jnp.sum(moe.swiglu(p, jnp.ones((E, 1, D)))))(
        jax.tree.map(jnp.asarray, swiglu_params())
    )
    wanted = jax.tree.map(lambda g: 1024 * g.at[1:].set(0), of_one_row)
    cases.trees_close(jax.tree.map(np.float32, gradient(params)), wanted, 3e-2)


def test_a_layer_alone_keeps_what_those_of_a_scan_make_again():
    alone, scanned = (kernels.grouped_function("cpu", scanned=s) for s in (False, True))
    assert (alone.expert, scanned.expert) == (moe.KEEPING_SWIGLU, moe.swiglu)
