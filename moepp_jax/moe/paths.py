"""The two ways of a token to its FFN experts and back: fixed capacity, or dropless.

A path is a function (x, routing, params of the FFN experts, rule, axis, sequences of a group) ->
(what the FFN experts add to the output, which assignments were kept).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from moepp_jax.moe import dispatch, exchange, transfer
from moepp_jax.moe.experts import KEEPING_SWIGLU, swiglu
from moepp_jax.moe.grouped import Blocked
from moepp_jax.moe.rows import combine, gather, taken
from moepp_jax.moe.rule import Routing, Rule

Path = Callable[..., tuple[Float[Array, "G S D"], Bool[Array, "G S K"]]]


def with_capacity(
    gamma: float,
    expert: Callable = swiglu,
    exchanged: Callable = exchange.by_expert,
    tile: int = 1,
    take: Callable = taken,
    parts: int = 1,
) -> Path:
    """Every expert has slots for gamma times its load at balance; what does not fit is dropped.

    A dropped assignment adds nothing, and the gates of the kept ones stay as they were. Capacity
    holds for zero-computation experts too, though nothing of theirs is put into a buffer.

    Args:
      expert: (params stacked over E, rows (E, B, D)) -> rows (E, B, D).
      exchanged: (expert, params, rows (E, B, D), axis) -> rows (E, B, D): `exchange.by_expert` or
        `exchange.by_device`.
      tile: an expert's rows on a device are a multiple of it; what its slots do not fill is empty.
      take: how rows are read by their numbers: `rows.taken` or `taken_as_they_are`.
      parts: at most so many buffers share the groups of a device evenly. They do not depend on each
        other, so that experts can compute one while the rows of another cross the expert axis, and
        each reads the experts' parameters anew. Where there is no such axis there is one buffer.
    """

    def path(x_GSD, routing: Routing, params, rule: Rule, axis: str | None, sequences: int = 1):
        _, S, D = x_GSD.shape
        n_ffn = rule.pool.n_ffn
        capacity_N = dispatch.capacity(rule.load, gamma, S)
        slots = max(capacity_N[:n_ffn])
        with jax.named_scope("dispatch"):
            plan = dispatch.assign(routing.experts, capacity_N, sequences)
            rows = [
                dispatch.capacity_rows(experts, of_part, n_ffn, slots, tile)
                for experts, of_part in _split((routing.experts, plan), axis, parts)
            ]
            buffers = gather(x_GSD, rows, take)
        with jax.named_scope("experts"):
            buffers = [buffer.reshape(n_ffn, -1, D) for buffer in buffers]
            y = [exchanged(expert, params, buffer, axis).reshape(-1, D) for buffer in buffers]
        with jax.named_scope("combine"):
            y_GSD = combine(y, routing.gates, rows, take)
        return y_GSD, plan.kept

    return path


def _split(arrays: Any, axis: str | None, parts: int) -> list[Any]:
    """A tree of arrays of groups, divided evenly into so many parts at most, by whole groups."""
    groups = len(jax.tree.leaves(arrays)[0])
    n = 1 if axis is None else max(n for n in range(1, parts + 1) if groups % n == 0)
    size = groups // n
    starts = range(0, groups, size)
    return [jax.tree.map(lambda a, s=s: a[s : s + size], arrays) for s in starts]


def dropless(
    grouped: Callable | None = None,
    moved: transfer.Move = transfer.dense,
    buffer: float | None = None,
    tile: int = 1,
    take: Callable = taken,
    parts: int = 1,
) -> Path:
    """Every assignment is served, whatever the load, unless `buffer` says otherwise.

    On an expert axis of n devices the most rows that a device can be sent are n T min(K, E / n):
    every token of every device chooses its experts. Room for all of them costs memory n times what
    a balanced load needs; `buffer` gives the device less. Assignments past that are dropped: they
    add nothing, and are not among the kept.

    Args:
      grouped: a grouped function of `grouped.py`; by default `Blocked(KEEPING_SWIGLU)`.
      moved: how rows cross the expert axis: `transfer.ragged`, or `transfer.dense`.
      buffer: rows that a device has room for, in units of T K: 1 is what it receives if all
        choices go to FFN experts, evenly. By default there is room for the worst case.
      tile: that room is a multiple of so many rows.
      take: as in `with_capacity`.
      parts: as in `with_capacity`. Each has its own buffer, which drops other assignments than one
        for all would.

    Raises:
      ValueError: `buffer` is not positive.
    """
    grouped = grouped or Blocked(KEEPING_SWIGLU)
    if buffer is not None and buffer <= 0:
        raise ValueError(f"buffer = {buffer} leaves no room for a row: give a number above 0")

    def path(x_GSD, routing: Routing, params, rule: Rule, axis: str | None, sequences: int = 1):
        G, S, _ = x_GSD.shape
        K, pool = rule.most, rule.pool
        few = 2 * sum(rule.load) < K  # a rule that leaves most choices unused

        experts = [part.reshape(-1, K) for part in _split(routing.experts, axis, parts)]
        kept = [experts_TK < pool.size for experts_TK in experts]
        work = functools.partial(grouped, params)
        if axis is not None:
            devices, assignments = jax.lax.axis_size(axis), experts[0].size
            room = worst = devices * assignments // K * min(K, pool.n_ffn // devices)
            if buffer is not None:
                room = min(worst, math.ceil(buffer * assignments / tile) * tile)
            if room < worst:
                admitted = [transfer.admitted(e, pool.n_ffn, room, axis) for e in experts]
                kept = [a & k for a, k in zip(admitted, kept, strict=True)]
                kept = checkpoint_name(kept, "routing")
            work = _elsewhere(work, moved, room, axis)
        served = [jnp.where(k, e, pool.n_ffn) for k, e in zip(kept, experts, strict=True)]
        with jax.named_scope("dispatch"):
            placed = [dispatch.sorted_rows(served_TK, pool.n_ffn, few) for served_TK in served]
            rows, counts = map(list, zip(*placed, strict=True))
            buffers = gather(x_GSD, rows, take)
        with jax.named_scope("experts"):
            y = [work(rows_RD, counts_E) for rows_RD, counts_E in zip(buffers, counts, strict=True)]
        with jax.named_scope("combine"):
            y_GSD = combine(y, routing.gates, rows, take)
        return y_GSD, jnp.concatenate(kept).reshape(G, S, K)

    return path


def _elsewhere(work: Callable, moved: transfer.Move, room: int, axis: str) -> Callable:
    """work(rows, counts), done by the devices of the experts, in buffers of `room` rows."""

    def done(rows_RD, counts_E):
        there, counts_e = transfer.to_experts(counts_E, axis)
        with jax.named_scope("to_experts"):
            received = transfer.move(moved, rows_RD, room, there, axis)
        y = work(checkpoint_name(received, "to_experts"), counts_e)
        with jax.named_scope("from_experts"):
            y = transfer.move(moved, y, len(rows_RD), there.back(), axis)
        return checkpoint_name(y, "from_experts")

    return done
