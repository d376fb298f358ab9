"""SwiGLU experts over sorted rows by `jax.lax.ragged_dot`, a real kernel on TPU.

A grouped function as those of `moepp_jax.moe.grouped`.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Float, Int

from moepp_jax.moe.experts import activate, as_one


def everywhere(f: Callable, filled: Int[Array, ""], *arrays_RW: Float[Array, "R _"]):
    """f of all rows, also of those behind the filled ones."""
    return f(*arrays_RW)


@dataclass(frozen=True)
class Ragged:
    """`experts.swiglu`; the products' work follows the rows that exist.

    The parameters' gradients are summed block by block: of `ragged_dot` they are, on TPU too, a
    product of all rows of the buffer with every expert.

    Attributes:
      between: computes what lies between the products: (f, how many rows are filled, arrays (R, W),
        ...) -> f(arrays, ...), of the filled rows at least. `everywhere`, or `filled.by_blocks`.
    """

    between: Callable = everywhere

    def __call__(
        self, params, rows_RD: Float[Array, "R D"], counts_E: Int[Array, " E"]
    ) -> Float[Array, "R D"]:
        return _swiglu(self.between, params, rows_RD, counts_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(between, params, rows_RD, counts_E):
    return _swiglu_fwd(between, params, rows_RD, counts_E)[0]


def _swiglu_fwd(between, params, rows_RD, counts_E):
    h = _ragged_dot(rows_RD, as_one(params["w_in"]).swapaxes(1, 2), counts_E)
    h = checkpoint_name(h, "w_in")
    [a] = between(_activated, jnp.sum(counts_E), h)
    y = _ragged_dot(a, params["w_out"].swapaxes(1, 2), counts_E)
    return y, (params, rows_RD, counts_E, h)


def _swiglu_bwd(between, saved, d_y):
    params, rows_RD, counts_E, h = saved
    w_in, w_out = params["w_in"], params["w_out"]
    d_a = _ragged_dot(d_y, w_out, counts_E)
    d_h, a = between(_activation_gradient, jnp.sum(counts_E), h, d_a)
    d_in = _products_of_rows(d_h, rows_RD, counts_E).reshape(w_in.shape)
    d_out = _products_of_rows(d_y, a, counts_E)
    d_x = _ragged_dot(d_h, as_one(w_in), counts_E).astype(rows_RD.dtype)
    return {"w_in": d_in.astype(w_in.dtype), "w_out": d_out.astype(w_out.dtype)}, d_x, None


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def _activated(h_RH):
    return (activate(h_RH),)


def _activation_gradient(h_RH, d_a_RF):
    """The gradient of h, and the activation once more."""
    a, pullback = jax.vjp(activate, h_RH)
    return *pullback(d_a_RF.astype(a.dtype)), a


def _ragged_dot(
    x_RK: Float[Array, "R K"], w_EKN: Float[Array, "E K N"], counts_E: Int[Array, " E"]
) -> Float[Array, "R N"]:
    """`jax.lax.ragged_dot` in tiles of our choice, where they divide the product.

    Those that XLA chooses on TPU have 128 rows, and with 8,192 numbers a row run at half speed.
    """
    tiles = _tiles(len(x_RK), *w_EKN.shape[1:])
    # Read by the TPU's compiler alone.
    with set_xla_metadata(ragged_dot_tiling=tiles) if tiles else contextlib.nullcontext():
        return jax.lax.ragged_dot(x_RK, w_EKN, counts_E)


def _tiles(rows: int, k: int, n: int) -> str:
    """Rows, contracted numbers and results of a tile; "" where none divides the product.

    As many numbers of a matrix as are in 1,536 x 1,024, of which a TPU's own memory has room for
    two, with two times 512 rows.
    """
    own_k = _divisor(k, 2048)
    own_n = _divisor(n, min(1024, 1536 * 1024 // own_k)) if own_k else 0
    own_rows = _divisor(rows, 512)
    return f"{own_rows},{own_k},{own_n}" if own_rows and own_n else ""


def _divisor(size: int, most: int) -> int:
    """The largest multiple of 128 that divides it and is no larger; 0 if there is none."""
    return max((tile for tile in range(128, most + 1, 128) if size % tile == 0), default=0)


def _products_of_rows(
    a_RF: Float[Array, "R F"], b_RD: Float[Array, "R D"], counts_E: Int[Array, " E"]
) -> Float[Array, "E F D"]:
    """For each expert the sum of a b^T over its rows, in float32; work follows the rows there are.

    Blocks are so large that a TPU multiplies for longer than it reads and writes the sum.
    """
    block = min(2048, a_RF.shape[0])
    # Zeros that vary over the mesh as counts do: shard_map asks that of what a loop carries.
    zeros = jnp.broadcast_to(counts_E[0] * jnp.float32(0), (a_RF.shape[1], b_RD.shape[1]))

    def of_expert(start_and_count):
        start, count = start_and_count

        def add_block(i, total):
            first = start + i * block
            at = jnp.minimum(first, a_RF.shape[0] - block)
            row = at + jnp.arange(block)
            mine = (row >= first) & (row < start + count)
            a, b = (
                jnp.where(mine[:, None], jax.lax.dynamic_slice_in_dim(x, at, block), 0)
                for x in (a_RF, b_RD)
            )
            return total + jnp.einsum("rf,rd->fd", a, b, preferred_element_type=jnp.float32)

        return jax.lax.fori_loop(0, (count + block - 1) // block, add_block, zeros)

    return jax.lax.map(of_expert, (jnp.cumsum(counts_E) - counts_E, counts_E))
