"""Rows sorted by expert, as many as there are, to the devices of the experts and back.

Every device knows from all devices' counts where its rows land, so they arrive sorted by expert. A
`Transfer` says which chunks of rows go where; `ragged` and `dense` are two ways to move them, of
which `kernels.py` says which a platform gets.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moepp_jax.moe import dispatch


class Chunks(NamedTuple):
    """One side of a transfer: runs of rows, as many for each device, device 0's first.

    Attributes:
      start: the first row, in this device's buffer.
      size: how many rows.
      there: the first row, in the other device's buffer.
    """

    start: Int[Array, " n*c"]
    size: Int[Array, " n*c"]
    there: Int[Array, " n*c"]


class Transfer(NamedTuple):
    """What a device sends to each device and what it receives from each."""

    sent: Chunks
    received: Chunks

    def back(self) -> "Transfer":
        """The same rows the other way."""
        return Transfer(self.received, self.sent)


def to_experts(counts_E: Int[Array, " E"], axis: str) -> tuple[Transfer, Int[Array, " e"]]:
    """From rows sorted by expert on every device, to rows sorted by expert on the expert's device.

    An expert's rows lie in the order of the devices that they come from, without gaps.

    Args:
      counts_E: how many of this device's rows each expert has.

    Returns:
      The transfer, and how many rows each expert of this device receives.
    """
    n, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    # Axes: the device that sends, the device that receives, the expert there.
    counts = checkpoint_name(jax.lax.all_gather(counts_E, axis), "routing").reshape(n, n, -1)
    leaves = _before(counts.reshape(n, -1)).reshape(counts.shape)
    by_expert = counts.transpose(1, 2, 0)
    lands = _before(by_expert.reshape(n, -1)).reshape(by_expert.shape).transpose(2, 0, 1)
    sent = Chunks(leaves[me], counts[me], lands[me])
    received = Chunks(lands[:, me], counts[:, me], leaves[:, me])
    transfer = jax.tree.map(lambda a: a.reshape(-1), Transfer(sent, received))
    return transfer, counts[:, me].sum(axis=0)


def admitted(experts_TK: Int[Array, "T K"], n_ffn: int, rows: int, axis: str) -> Bool[Array, "T K"]:
    """Which assignments go to their FFN experts when no device may receive more than `rows` rows.

    A device asked for more shares its rows out evenly: one number, the same for all that send to
    it, bounds what each may send, and is as large as can be. Each sends its first ones in token
    order, so a later token never takes an earlier one's place.
    """
    n = jax.lax.axis_size(axis)
    device = (experts_TK // (n_ffn // n)).reshape(1, -1, 1)
    place = dispatch.queue(device, n).reshape(experts_TK.shape)
    asked = jnp.sum(device[0] == jnp.arange(n), axis=0, dtype=jnp.int32)
    bound = even_shares(jax.lax.all_gather(asked, axis), rows)
    return (experts_TK >= n_ffn) | (place < bound[jnp.minimum(device, n - 1)].reshape(place.shape))


def even_shares(asked: Int[Array, "n m"], rows: int) -> Int[Array, " m"]:
    """For each column the largest b for which the sum of min(asked, b) does not exceed `rows`.

    Where the sum of what is asked does not, b is no less than the largest of it.
    """
    ascending = jnp.sort(asked, axis=0)
    sharing = (asked.shape[0] - jnp.arange(asked.shape[0]))[:, None]
    return jnp.max((rows - _before(ascending.T).T) // sharing, axis=0)


# (rows, rows of the result, transfer, axis) -> rows of the result, zero where nothing was received.
Move = Callable[[Array, int, Transfer, str], Array]


def move(
    how: Move, rows_RD: Float[Array, "r D"], size: int, transfer: Transfer, axis: str
) -> Float[Array, "R D"]:
    """`how` moves the rows into a buffer of `size` rows, and moves the gradient back."""
    here = rows_RD.shape[0]

    @jax.custom_vjp
    def there(rows, transfer):
        return how(rows, size, transfer, axis)

    def back(transfer, d_rows):
        return how(d_rows, here, transfer.back(), axis), None

    there.defvjp(lambda rows, transfer: (there(rows, transfer), transfer), back)
    return there(rows_RD, transfer)


def ragged(rows_RD: Array, size: int, transfer: Transfer, axis: str) -> Array:
    """`jax.lax.ragged_all_to_all`: only the rows that exist cross. Not implemented on CPU."""
    sent, received = transfer
    # Zeros that vary over the mesh as the sizes do, which shard_map asks of them.
    zeros = jnp.broadcast_to((sent.size[0] * 0).astype(rows_RD.dtype), (size, rows_RD.shape[1]))
    return jax.lax.ragged_all_to_all(
        rows_RD, zeros, sent.start, sent.size, sent.there, received.size, axis_name=axis
    )


def dense(rows_RD: Array, size: int, transfer: Transfer, axis: str) -> Array:
    """The same by an all-to-all of equal parts, each as long as any could be: for CPUs."""
    n, D = jax.lax.axis_size(axis), rows_RD.shape[1]
    part = min(len(rows_RD), size)
    of_device = jax.tree.map(lambda a: a.reshape(n, -1), transfer)
    sent, received = of_device
    packed = jax.vmap(functools.partial(_source, part))(_before(sent.size), sent.size, sent.start)
    parts = rows_RD[jnp.maximum(packed, 0)]
    parts = jax.lax.all_to_all(parts, axis, split_axis=0, concat_axis=0, tiled=True)
    starts = _before(received.size) + part * jnp.arange(n)[:, None]
    flat = (received.start.reshape(-1), received.size.reshape(-1), starts.reshape(-1))
    unpacked = _source(size, *flat)
    rows = parts.reshape(-1, D)[jnp.maximum(unpacked, 0)]
    return jnp.where((unpacked >= 0)[:, None], rows, 0)


def _source(size: int, first, sizes, source) -> Int[Array, " size"]:
    """For rows 0 to size - 1, of which chunks cover some: the row each comes from, else -1."""
    row = jnp.arange(size)[:, None]
    covered = (row >= first) & (row < first + sizes)
    return jnp.sum(jnp.where(covered, row - first + source + 1, 0), axis=1) - 1


def _before(counts: Int[Array, "*b c"]) -> Int[Array, "*b c"]:
    """The sum of all earlier counts, along the last axis."""
    return jnp.cumsum(counts, axis=-1) - counts
