"""Experts over rows sorted by expert, as many as there are: the arithmetic of dropless dispatch.

A grouped function takes (params stacked over E, rows (R, D), counts (E,)) and returns rows (R, D):
expert 0 has worked on the first counts[0] rows, expert 1 on the next counts[1], and so on. What it
returns for the rows past the last one means nothing, but is finite.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Blocked:
    """Any expert function, over blocks of rows; work and time follow the rows that exist.

    Experts are taken in order: an odd block of one of a few sizes, then full ones. The odd block
    may run over into the next expert's rows, which that expert then overwrites. The gradient
    recomputes each block. For CPUs, where `jax.lax.ragged_dot` multiplies every row with every
    expert.

    Attributes:
      expert: (params stacked over E, rows (E, B, D)) -> rows (E, B, D).
      block: rows of a block, at most. The larger, the less often are parameters' gradients added.
    """

    expert: Callable
    block: int = 1024

    def __call__(
        self, params, rows_RD: Float[Array, "R D"], counts_E: Int[Array, " E"]
    ) -> Float[Array, "R D"]:
        R = rows_RD.shape[0]
        sizes = _sizes(min(self.block, R))
        room = jnp.pad(rows_RD, ((0, sizes[-1]), (0, 0)))  # for the last block to run over into
        return _blocked(self.expert, sizes, params, room, counts_E)[:R]


def ragged_swiglu(
    params, rows_RD: Float[Array, "R D"], counts_E: Int[Array, " E"]
) -> Float[Array, "R D"]:
    """`experts.swiglu` with `jax.lax.ragged_dot`, a real kernel on TPU."""
    E, _, F, D = params["w_in"].shape
    w_in = params["w_in"].reshape(E, 2 * F, D).swapaxes(1, 2)
    h = jax.lax.ragged_dot(rows_RD, w_in, counts_E)
    a = jax.nn.silu(h[:, :F]) * h[:, F:]
    return jax.lax.ragged_dot(a, params["w_out"].swapaxes(1, 2), counts_E)


def _sizes(block: int) -> tuple[int, ...]:
    """Sizes that an odd block may have, each at most an eighth above the one before or 8 rows.

    The last one is the full block's.
    """
    sizes = [8]
    while sizes[-1] < block:
        power_of_two = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(sizes[-1] + max(8, power_of_two // 8))
    return tuple(sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(expert, sizes, params, rows_RD, counts_E):
    def of_block(params_e, at, size, real):
        x = jax.lax.dynamic_slice_in_dim(rows_RD, at, size)
        return (), expert(params_e, x[None])[0].astype(x.dtype)

    return _over_blocks(of_block, sizes, params, rows_RD, counts_E, ())[1]


def _blocked_fwd(expert, sizes, params, rows_RD, counts_E):
    return _blocked(expert, sizes, params, rows_RD, counts_E), (params, rows_RD, counts_E)


def _blocked_bwd(expert, sizes, saved, d_out):
    params, rows_RD, counts_E = saved

    def of_block(params_e, at, size, real):
        x = jax.lax.dynamic_slice_in_dim(rows_RD, at, size)
        d_y = jax.lax.dynamic_slice_in_dim(d_out, at, size)
        # Past its own rows a block holds the next expert's: not this expert's to learn from.
        d_y = jnp.where((jnp.arange(size) < real)[:, None], d_y, 0)
        _, pullback = jax.vjp(lambda p, x: expert(p, x[None])[0].astype(x.dtype), params_e, x)
        d_params, d_x = pullback(d_y)
        return jax.tree.map(_at_least_float32, d_params), d_x

    zeros = jax.tree.map(lambda p: _zeros_like(p, counts_E), params)
    d_params, d_rows = _over_blocks(of_block, sizes, params, rows_RD, counts_E, zeros)
    return d_params, d_rows, None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def _over_blocks(of_block, sizes, params, rows_RD, counts_E, totals):
    """of_block(params of an expert, first row, size, real rows) -> (sums, rows), over all blocks.

    Returns:
      The totals, with entry e replaced by the sums of expert e's blocks if it has any, and all
      blocks' rows in their places.
    """
    starts_E = jnp.cumsum(counts_E) - counts_E
    with_rows_first = jnp.argsort(counts_E == 0, stable=True)
    block = sizes[-1]
    put = jax.lax.dynamic_update_slice_in_dim

    def per_expert(i, carry):
        totals, out = carry
        e = with_rows_first[i]
        params_e = jax.tree.map(lambda p: jax.lax.dynamic_slice_in_dim(p, e, 1), params)
        odd = (counts_E[e] - 1) % block + 1

        def odd_block(size):
            def run(at):
                sums, y = of_block(params_e, at, size, odd)
                return sums, jnp.pad(y, ((0, block - size), (0, 0)))

            return run

        def full_block(b, carry):
            sums, out = carry
            at = starts_E[e] + odd + b * block
            more, y = of_block(params_e, at, block, block)
            return jax.tree.map(jnp.add, sums, more), put(out, y, at, 0)

        fitting = jnp.searchsorted(jnp.asarray(sizes), odd)
        sums, y = jax.lax.switch(fitting, [odd_block(s) for s in sizes], starts_E[e])
        carry = sums, put(out, y, starts_E[e], 0)
        sums, out = jax.lax.fori_loop(0, (counts_E[e] - odd) // block, full_block, carry)
        totals = jax.tree.map(lambda t, s: put(t, s.astype(t.dtype), e, 0), totals, sums)
        return totals, out

    carry = totals, _zeros_like(rows_RD, counts_E)
    return jax.lax.fori_loop(0, jnp.sum(counts_E > 0), per_expert, carry)


def _at_least_float32(x):
    """For sums over blocks: in bfloat16 they stop growing at 256 times their terms."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _zeros_like(x, counts_E):
    """Zeros that vary over the mesh as counts do: shard_map asks that of what a loop carries."""
    return jnp.broadcast_to((counts_E[0] * 0).astype(x.dtype), x.shape)
