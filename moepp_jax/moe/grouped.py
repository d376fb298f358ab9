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

    Experts are taken in order and their last block runs over into the next expert's rows, which
    that expert then overwrites. The gradient recomputes each block. For CPUs, where
    `jax.lax.ragged_dot` multiplies every row with every expert.

    Attributes:
      expert: (params stacked over E, rows (E, B, D)) -> rows (E, B, D).
      block: rows of a block, at most.
    """

    expert: Callable
    block: int = 256

    def __call__(
        self, params, rows_RD: Float[Array, "R D"], counts_E: Int[Array, " E"]
    ) -> Float[Array, "R D"]:
        R = rows_RD.shape[0]
        block = min(self.block, R)
        room = jnp.pad(rows_RD, ((0, block), (0, 0)))  # for the last block to run over into
        return _blocked(self.expert, block, params, room, counts_E)[:R]


def ragged_swiglu(
    params, rows_RD: Float[Array, "R D"], counts_E: Int[Array, " E"]
) -> Float[Array, "R D"]:
    """`experts.swiglu` with `jax.lax.ragged_dot`, a real kernel on TPU."""
    E, _, F, D = params["w_in"].shape
    w_in = params["w_in"].reshape(E, 2 * F, D).swapaxes(1, 2)
    h = jax.lax.ragged_dot(rows_RD, w_in, counts_E)
    a = jax.nn.silu(h[:, :F]) * h[:, F:]
    return jax.lax.ragged_dot(a, params["w_out"].swapaxes(1, 2), counts_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(expert, block, params, rows_RD, counts_E):
    def work(params_e, at, left, out):
        y = expert(params_e, jax.lax.dynamic_slice_in_dim(rows_RD, at, block)[None])[0]
        return jax.lax.dynamic_update_slice_in_dim(out, y.astype(out.dtype), at, 0)

    def per_expert(e, params_e, blocks, out):
        return blocks(functools.partial(work, params_e), out)

    return _over_experts(per_expert, block, params, counts_E, _zeros_like(rows_RD, counts_E))


def _blocked_fwd(expert, block, params, rows_RD, counts_E):
    return _blocked(expert, block, params, rows_RD, counts_E), (params, rows_RD, counts_E)


def _blocked_bwd(expert, block, saved, d_out):
    params, rows_RD, counts_E = saved

    def work(params_e, at, left, carry):
        d_params, d_rows = carry
        x = jax.lax.dynamic_slice_in_dim(rows_RD, at, block)
        d_y = jax.lax.dynamic_slice_in_dim(d_out, at, block)
        # The block's tail may hold the next expert's rows: not this expert's to learn from.
        d_y = jnp.where((jnp.arange(block) < left)[:, None], d_y, 0)
        _, pullback = jax.vjp(lambda p, x: expert(p, x[None])[0].astype(x.dtype), params_e, x)
        d_p, d_x = pullback(d_y)
        d_rows = jax.lax.dynamic_update_slice_in_dim(d_rows, d_x, at, 0)
        return jax.tree.map(jnp.add, d_params, d_p), d_rows

    def per_expert(e, params_e, blocks, carry):
        d_params, d_rows = carry
        # In float32: a bfloat16 sum stops growing at 256 times its terms.
        zeros = jax.tree.map(
            lambda p: _zeros_like(p.astype(jnp.promote_types(p.dtype, jnp.float32)), counts_E),
            params_e,
        )
        d_p, d_rows = blocks(functools.partial(work, params_e), (zeros, d_rows))

        def put(d_params, d_p):
            return jax.lax.dynamic_update_slice_in_dim(d_params, d_p.astype(d_params.dtype), e, 0)

        return jax.tree.map(put, d_params, d_p), d_rows

    zeros = jax.tree.map(lambda p: _zeros_like(p, counts_E), (params, rows_RD))
    d_params, d_rows = _over_experts(per_expert, block, params, counts_E, zeros)
    return d_params, d_rows, None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def _over_experts(per_expert, block, params, counts_E, carry):
    """Calls per_expert(e, its params, blocks, carry) for each expert that has rows, in order."""
    starts_E = jnp.cumsum(counts_E) - counts_E
    with_rows_first = jnp.argsort(counts_E == 0, stable=True)

    def body(i, carry):
        e = with_rows_first[i]
        params_e = jax.tree.map(lambda p: jax.lax.dynamic_slice_in_dim(p, e, 1), params)

        def blocks(work, carry):
            def one(b, carry):
                return work(starts_E[e] + b * block, counts_E[e] - b * block, carry)

            return jax.lax.fori_loop(0, -(-counts_E[e] // block), one, carry)

        return per_expert(e, params_e, blocks, carry)

    return jax.lax.fori_loop(0, jnp.sum(counts_E > 0), body, carry)


def _zeros_like(x, counts_E):
    """Zeros that vary over the mesh as counts do: shard_map asks that of what a loop carries."""
    return jnp.broadcast_to((counts_E[0] * 0).astype(x.dtype), x.shape)
