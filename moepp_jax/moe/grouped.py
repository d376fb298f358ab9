"""Experts over rows sorted by expert, as many as there are: the arithmetic of dropless dispatch.

A grouped function takes (params stacked over E, rows (R, D), counts (E,)) and returns rows (R, D):
expert 0 has worked on the first counts[0] rows, expert 1 on the next counts[1], and so on. What it
returns for the rows past the last one means nothing, and may be no number.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moepp_jax.moe.experts import swiglu


@dataclass(frozen=True)
class Blocked:
    """Any expert function, over blocks of rows; work and time follow the rows that exist.

    An expert has an odd block of one of a few sizes, then full ones. Blocks replace the rows that
    they have read: of a buffer with room for the worst load, what is empty is not touched, and the
    rows past the last one come back as they were. The gradient recomputes each block. For CPUs,
    where `jax.lax.ragged_dot` multiplies every row with every expert.

    Attributes:
      expert: (params stacked over E, rows (E, B, D)) -> rows (E, B, D).
      block: rows of a block, at most. The larger, the less often are parameters' gradients added.
    """

    expert: Callable
    block: int = 1024

    def __call__(
        self, params, rows_RD: Float[Array, "R D"], counts_E: Int[Array, " E"]
    ) -> Float[Array, "R D"]:
        return _blocked(
            self.expert, _sizes(min(self.block, len(rows_RD))), params, rows_RD, counts_E
        )


@dataclass(frozen=True)
class Apart:
    """Experts whose parameters lie apart, in arrays of their own: each works where it has rows.

    An expert without rows is not read, and one with rows is read where it lies: XLA on CPU copies
    what it cuts out of a stack. Blocks are all of one size; the last one of an expert may run over
    into the next expert's rows, which that expert then overwrites. For generation: no gradient.

    Attributes:
      expert: (parameters of one expert, rows (B, D)) -> rows (B, D).
      tokens: the most rows that an expert can have.
    """

    expert: Callable
    tokens: int

    def __call__(
        self, params: Sequence, rows_RD: Float[Array, "R D"], counts_E: Int[Array, " E"]
    ) -> Float[Array, "R D"]:
        R = rows_RD.shape[0]
        # Half of an even share, or few rows are padded to many; of few rows one block, or an
        # expert's parameters are read twice.
        size = min(self.tokens, max(32, min(R // len(params) // 2, 256)))
        room = jnp.pad(rows_RD, ((0, size), (0, 0)))
        starts_E = jnp.cumsum(counts_E) - counts_E

        def worked_on_by(e, rows):
            def block(b, rows):
                at = starts_E[e] + b * size
                y = self.expert(params[e], jax.lax.dynamic_slice_in_dim(room, at, size))
                return jax.lax.dynamic_update_slice_in_dim(rows, y.astype(rows.dtype), at, 0)

            return jax.lax.fori_loop(0, (counts_E[e] + size - 1) // size, block, rows)

        rows = jnp.zeros_like(room)
        for e in range(len(params)):
            rows = worked_on_by(e, rows)
        return rows[:R]


def all_of_few(
    params, rows_RD: Float[Array, "R D"], counts_E: Int[Array, " E"]
) -> Float[Array, "R D"]:
    """`experts.swiglu` of every row with every expert, of which its own is kept.

    Each expert is read once, where it lies, and its products with a few rows take no longer.
    """
    R, E = len(rows_RD), len(counts_E)
    own_R = jnp.searchsorted(jnp.cumsum(counts_E), jnp.arange(R), side="right")
    y_ERD = swiglu(params, jnp.broadcast_to(rows_RD, (E, *rows_RD.shape)))
    own_ER1 = (own_R == jnp.arange(E)[:, None])[..., None]
    return jnp.sum(jnp.where(own_ER1, y_ERD, 0), axis=0)


def _sizes(block: int) -> tuple[int, ...]:
    """Sizes that an odd block may have, each at most an eighth above the one before or 8 rows.

    The last one is the full block's.
    """
    sizes = [min(8, block)]
    while sizes[-1] < block:
        power_of_two = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(min(sizes[-1] + max(8, power_of_two // 8), block))
    return tuple(sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(expert, sizes, params, rows_RD, counts_E):
    def of_block(params_e, x, first, mine):
        y = expert(params_e, x[None])[0].astype(x.dtype)
        return (), jnp.where(mine[:, None], y, x)

    return _over_blocks(of_block, sizes, params, rows_RD, counts_E, ())[1]


def _blocked_fwd(expert, sizes, params, rows_RD, counts_E):
    return _blocked(expert, sizes, params, rows_RD, counts_E), (params, rows_RD, counts_E)


def _blocked_bwd(expert, sizes, saved, d_out):
    params, rows_RD, counts_E = saved

    def of_block(params_e, d_y, first, mine):
        x = _cut(rows_RD, first, len(d_y))
        _, pullback = jax.vjp(lambda p, x: expert(p, x[None])[0].astype(x.dtype), params_e, x)
        d_params, d_x = pullback(jnp.where(mine[:, None], d_y, 0))
        return jax.tree.map(_at_least_float32, d_params), jnp.where(mine[:, None], d_x, d_y)

    zeros = jax.tree.map(lambda p: _zeros_like(_at_least_float32(p), counts_E), params)
    d_params, d_rows = _over_blocks(of_block, sizes, params, d_out, counts_E, zeros)
    return jax.tree.map(lambda d, p: d.astype(p.dtype), d_params, params), d_rows, None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)

_cut = jax.lax.dynamic_slice_in_dim
_put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)


def _over_blocks(of_block, sizes, params, rows_RD, counts_E, totals):
    """Replaces rows block by block, and sums what the blocks of an expert give beside.

    Args:
      of_block: (params of an expert, rows, number of the first one, which are the expert's own) ->
        (sums, rows). A block may hold other experts' rows, which must come back as they were.
      rows_RD: what the first block sees; a later one sees what the blocks before it have left.

    Returns:
      The totals, with entry e replaced by the sums of expert e's blocks if it has any; the rows.
    """
    starts_E = jnp.cumsum(counts_E) - counts_E
    with_rows_first = jnp.argsort(counts_E == 0, stable=True)
    full = sizes[-1]

    def replaced(size, params_e, rows, window, at, count):
        """Of the rows of a window, those from `at` on; at the buffer's end, from earlier on."""
        start = jnp.minimum(at - window, len(rows) - size)
        number = window + start + jnp.arange(size)
        mine = (number >= at) & (number < at + count)
        sums, block = of_block(params_e, _cut(rows, start, size), window + start, mine)
        return sums, _put(rows, block, start)

    def per_expert(i, carry):
        e = with_rows_first[i]
        params_e = jax.tree.map(lambda p: _cut(p, e, 1), params)
        odd = (counts_E[e] - 1) % full + 1

        def odd_block(of_sizes):
            # A branch is given a window, not the buffer: of that XLA would make a copy for each.
            branches = [functools.partial(replaced, size, params_e) for size in of_sizes]
            fitting = jnp.searchsorted(jnp.asarray(of_sizes), odd)

            def run(_, carry):
                totals, rows = carry
                window = jnp.minimum(starts_E[e], len(rows) - of_sizes[-1])
                around = _cut(rows, window, of_sizes[-1])
                sums, around = jax.lax.switch(fitting, branches, around, window, starts_E[e], odd)
                totals = jax.tree.map(lambda t, s: _put(t, s, e), totals, sums)
                return totals, _put(rows, around, window)

            return run

        def full_block(b, carry):
            totals, rows = carry
            at = starts_E[e] + odd + b * full
            sums, rows = replaced(full, params_e, rows, 0, at, full)
            return jax.tree.map(lambda t, s: _put(t, _cut(t, e, 1) + s, e), totals, sums), rows

        # Loops of no round or one: a conditional that passes the buffer on would copy it.
        for below, of_sizes in _windows(sizes):
            here = (odd > below) & (odd <= of_sizes[-1])
            carry = jax.lax.fori_loop(0, here.astype(jnp.int32), odd_block(of_sizes), carry)
        return jax.lax.fori_loop(0, (counts_E[e] - odd) // full, full_block, carry)

    return jax.lax.fori_loop(0, jnp.sum(counts_E > 0), per_expert, (totals, rows_RD))


def _windows(sizes: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """The sizes of odd blocks in parts, each with the largest size before it, or 0.

    Blocks of a part are cut out of windows of its largest size: few rows out of a small window.
    """
    parts, below = [], 0
    while below < sizes[-1]:
        largest = min(max(64, 4 * below), sizes[-1])
        part = tuple(size for size in sizes if below < size <= largest)
        parts.append((below, part))
        below = part[-1]
    return parts


def _at_least_float32(x):
    """For sums over blocks: in bfloat16 they stop growing at 256 times their terms."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _zeros_like(x, counts_E):
    """Zeros that vary over the mesh as counts do: shard_map asks that of what a loop carries."""
    return jnp.broadcast_to((counts_E[0] * 0).astype(x.dtype), x.shape)
