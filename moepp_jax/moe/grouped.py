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
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moepp_jax.moe.experts import Keeping, swiglu


@dataclass(frozen=True)
class Blocked:
    """Any expert function, over blocks of rows; work and time follow the rows that exist.

    An expert has an odd block of one of a few sizes, and full ones; the odd ones of all experts
    come first, the smallest before all. Blocks replace the rows that they have read: of a buffer
    with room for the worst load, what is empty is not touched, and the rows past the last one come
    back as they were. For CPUs, where `jax.lax.ragged_dot` multiplies every row with every expert.

    Attributes:
      expert: (params stacked over E, rows (E, B, D)) -> rows (E, B, D), which the gradient computes
        again, block by block; or a `Keeping`, whose gradient has what forward kept, in memory for
        as many rows as the buffer has, and an eighth.
      block: rows of a block, at most. The larger, the less often are parameters' gradients added.
    """

    expert: Callable | Keeping
    block: int = 1024

    def __call__(
        self, params, rows_RD: Float[Array, "R D"], counts_E: Int[Array, " E"]
    ) -> Float[Array, "R D"]:
        expert = self.expert if isinstance(self.expert, Keeping) else _Again(self.expert)
        sizes = _sizes(min(self.block, len(rows_RD)))
        return _blocked(expert, sizes, params, rows_RD, counts_E)


@dataclass(frozen=True)
class _Again:
    """As `Keeping`, of an expert function of which nothing is kept."""

    expert: Callable

    def forward(self, params, x):
        return self.expert(params, x), ()

    def backward(self, params, x, kept, d_y):
        y, pullback = jax.vjp(self.expert, params, x)
        return pullback(d_y.astype(y.dtype))


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
    def alone(params, x):
        return expert.forward(params, x)[0], ()

    return _forward(alone, sizes, params, rows_RD, counts_E, ())[0]


def _blocked_fwd(expert, sizes, params, rows_RD, counts_E):
    one = jax.tree.map(lambda p: jax.ShapeDtypeStruct((1, *p.shape[1:]), p.dtype), params)
    row = jax.ShapeDtypeStruct((1, 1, rows_RD.shape[1]), rows_RD.dtype)
    _, kept = jax.eval_shape(expert.forward, one, row)
    room = _room(len(rows_RD), len(counts_E), sizes)
    empty = jax.tree.map(
        lambda k: _zeros_like(jax.ShapeDtypeStruct((room, *k.shape[2:]), k.dtype), counts_E), kept
    )
    y, kept = _forward(expert.forward, sizes, params, rows_RD, counts_E, empty)
    kept = jax.tree.map(lambda k: checkpoint_name(k, "w_in"), kept)
    return y, (params, rows_RD, counts_E, kept)


def _forward(forward, sizes, params, rows_RD, counts_E, kept):
    """The experts' rows, and `kept` with what each block keeps."""

    def of_block(params_e, x, first, mine, _):
        y, of_x = jax.tree.map(lambda a: a[0], forward(params_e, x[None]))
        return (), jnp.where(mine[:, None], y.astype(x.dtype), x), of_x

    _, rows, kept = _over_blocks(of_block, sizes, params, rows_RD, counts_E, (), written=kept)
    return rows, kept


def _blocked_bwd(expert, sizes, saved, d_out):
    params, rows_RD, counts_E, kept = saved

    def of_block(params_e, d_y, first, mine, of_x):
        x = _cut(rows_RD, first, len(d_y))
        of_mine = x, of_x, jnp.where(mine[:, None], d_y, 0)
        d_params, d_x = expert.backward(params_e, *jax.tree.map(lambda a: a[None], of_mine))
        return jax.tree.map(_at_least_float32, d_params), jnp.where(mine[:, None], d_x[0], d_y), ()

    zeros = jax.tree.map(lambda p: _zeros_like(_at_least_float32(p), counts_E), params)
    d_params, d_rows, _ = _over_blocks(of_block, sizes, params, d_out, counts_E, zeros, read=kept)
    return jax.tree.map(lambda d, p: d.astype(p.dtype), d_params, params), d_rows, None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)

_cut = jax.lax.dynamic_slice_in_dim
_put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)


def _room(rows: int, experts: int, sizes: tuple[int, ...]) -> int:
    """The most rows of all blocks: odd ones have up to an eighth more than they need, or 8."""
    return rows + min(rows, experts * sizes[-1]) // 8 + 8 * experts


def _over_blocks(of_block, sizes, params, rows_RD, counts_E, totals, read=(), written=()):
    """Replaces rows block by block, and sums what the blocks of an expert give beside.

    Args:
      of_block: (params of an expert, rows, number of the first one, which are the expert's own,
        its part of `read`) -> (sums, rows, its part of `written`). A block may hold other experts'
        rows, which must come back as they were.
      rows_RD: what the first block sees; a later one sees what the blocks before it have left.
      read: buffers of `_room` rows, in which blocks lie whole, one after the other.
      written: as `read`.

    Returns:
      The totals, with entry e replaced by the sums of expert e's blocks if it has any; the rows;
      what was written.
    """
    full = sizes[-1]
    starts_E = _before(counts_E)
    odd_E = (counts_E - 1) % full + 1
    fulls_E = jnp.where(counts_E > 0, (counts_E - odd_E) // full, 0)
    which_E = jnp.where(counts_E > 0, jnp.searchsorted(jnp.asarray(sizes), odd_E), len(sizes))
    size_E = jnp.asarray((*sizes, 0))[which_E]
    places_E = _before(size_E + fulls_E * full)

    def block(size, e, at, count, place, added, carry):
        """Of the rows from `at` on; at the buffer's end, from earlier on."""
        totals, rows, written = carry
        params_e = jax.tree.map(lambda p: _cut(p, e, 1), params)
        start = jnp.minimum(at, len(rows) - size)
        number = start + jnp.arange(size)
        mine = (number >= at) & (number < at + count)
        of_read = jax.tree.map(lambda r: _cut(r, place, size), read)
        sums, x, of_written = of_block(params_e, _cut(rows, start, size), start, mine, of_read)
        totals = jax.tree.map(lambda t, s: _put(t, added(t, s, e), e), totals, sums)
        written = jax.tree.map(lambda w, new: _put(w, new, place), written, of_written)
        return totals, _put(rows, x, start), written

    by_size = jnp.argsort(which_E, stable=True)
    ends = jnp.searchsorted(which_E[by_size], jnp.arange(len(sizes)), side="right")
    fulls = jnp.cumsum(fulls_E)

    def odd_block(size, i, carry):
        e = by_size[i]
        return block(size, e, starts_E[e], odd_E[e], places_E[e], lambda _, s, e: s, carry)

    def full_block(i, carry):
        e = jnp.searchsorted(fulls, i, side="right")
        earlier = (i - fulls[e] + fulls_E[e]) * full
        at, place = starts_E[e] + odd_E[e] + earlier, places_E[e] + size_E[e] + earlier
        return block(full, e, at, full, place, lambda t, s, e: _cut(t, e, 1) + s, carry)

    # A loop for each size: a conditional in one loop would copy the buffers that it passes on. What
    # a body computes hangs on its number i, or XLA would compute it before all of the loops.
    carry, begin = (totals, rows_RD, written), 0
    for size, end in zip(sizes, ends, strict=True):
        carry = jax.lax.fori_loop(begin, end, functools.partial(odd_block, size), carry)
        begin = end
    return jax.lax.fori_loop(0, fulls[-1], full_block, carry)


def _before(count_E: Int[Array, " E"]) -> Int[Array, " E"]:
    """How many those before each expert have together."""
    return jnp.cumsum(count_E) - count_E


def _at_least_float32(x):
    """For sums over blocks: in bfloat16 they stop growing at 256 times their terms."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _zeros_like(x, counts_E):
    """Zeros that vary over the mesh as counts do: shard_map asks that of what a loop carries."""
    return jnp.broadcast_to((counts_E[0] * 0).astype(x.dtype), x.shape)
