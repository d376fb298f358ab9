"""The two ways of a token to its FFN experts and back: fixed capacity, or dropless.

A path is a function (x, routing, params of the FFN experts, rule, axis, sequences of a group) ->
(what the FFN experts add to the output, which assignments were kept).
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from moepp_jax.moe import dispatch, exchange, transfer
from moepp_jax.moe.experts import swiglu
from moepp_jax.moe.grouped import Blocked
from moepp_jax.moe.rule import Routing, Rule

Path = Callable[..., tuple[Float[Array, "G S D"], Bool[Array, "G S K"]]]


def with_capacity(
    gamma: float,
    expert: Callable = swiglu,
    exchanged: Callable = exchange.by_expert,
    tile: int = 1,
    take: Callable = dispatch.taken,
) -> Path:
    """Every expert has slots for gamma times its load at balance; what does not fit is dropped.

    A dropped assignment adds nothing, and the gates of the kept ones stay as they were. Capacity
    holds for zero-computation experts too, though nothing of theirs is put into a buffer.

    Args:
      expert: (params stacked over E, rows (E, B, D)) -> rows (E, B, D).
      exchanged: (expert, params, rows (E, B, D), axis) -> rows (E, B, D): `exchange.by_expert` or
        `exchange.by_device`.
      tile: an expert's rows on a device are a multiple of it; what its slots do not fill is empty.
      take: how rows are read by their numbers: `dispatch.taken` or `taken_as_they_are`.
    """

    def path(x_GSD, routing: Routing, params, rule: Rule, axis: str | None, sequences: int = 1):
        G, S, D = x_GSD.shape
        n_ffn = rule.pool.n_ffn
        capacity_N = dispatch.capacity(rule.load, gamma, S)
        slots = max(capacity_N[:n_ffn])
        with jax.named_scope("dispatch"):
            plan = dispatch.assign(routing.experts, capacity_N, sequences)
            rows = dispatch.capacity_rows(routing.experts, plan, n_ffn, slots, tile)
            buffer = dispatch.gather(x_GSD.reshape(G * S, D), rows, take).reshape(n_ffn, -1, D)
        with jax.named_scope("experts"):
            y = exchanged(expert, params, buffer, axis)
        with jax.named_scope("combine"):
            gates_TK = routing.gates.reshape(G * S, -1)
            y = dispatch.combine(y.reshape(-1, D), gates_TK, rows, take)
        return y.reshape(G, S, D), plan.kept

    return path


def in_parts(path: Path, parts: int) -> Path:
    """The path, taken by one part of the groups after the other.

    Parts do not depend on each other, so that experts can compute one while the rows of another
    cross the expert axis. Where there is no such axis nothing is split. Each part reads the
    experts' parameters anew, and of a `dropless` path with a buffer has its own, which drops other
    assignments than one for all would.

    Args:
      parts: at most; the groups are split evenly.
    """

    def each(x_GSD, routing: Routing, params, rule: Rule, axis: str | None, sequences: int = 1):
        G = len(x_GSD)
        size = G if axis is None else G // max(n for n in range(1, parts + 1) if G % n == 0)
        done = []
        for start in range(0, G, size):
            x, of_part = jax.tree.map(lambda a, s=start: a[s : s + size], (x_GSD, routing))
            done.append(path(x, of_part, params, rule, axis, sequences))
        y, kept = zip(*done, strict=True)
        return jnp.concatenate(y), jnp.concatenate(kept)

    return path if parts == 1 else each


def dropless(
    grouped: Callable | None = None,
    moved: transfer.Move = transfer.dense,
    buffer: float | None = None,
    tile: int = 1,
    take: Callable = dispatch.taken,
) -> Path:
    """Every assignment is served, whatever the load, unless `buffer` says otherwise.

    On an expert axis of n devices the most rows that a device can be sent are n T min(K, E / n):
    every token of every device chooses its experts. Room for all of them costs memory n times what
    a balanced load needs; `buffer` gives the device less. Assignments past that are dropped: they
    add nothing, and are not among the kept.

    Args:
      grouped: a grouped function of `grouped.py`; by default `Blocked(swiglu)`.
      moved: how rows cross the expert axis: `transfer.ragged`, or `transfer.dense`.
      buffer: rows that a device has room for, in units of T K: 1 is what it receives if all
        choices go to FFN experts, evenly. By default there is room for the worst case.
      tile: that room is a multiple of so many rows.
      take: as in `with_capacity`.

    Raises:
      ValueError: `buffer` is not positive.
    """
    grouped = grouped or Blocked(swiglu)
    if buffer is not None and buffer <= 0:
        raise ValueError(f"buffer = {buffer} leaves no room for a row: give a number above 0")

    def path(x_GSD, routing: Routing, params, rule: Rule, axis: str | None, sequences: int = 1):
        G, S, D = x_GSD.shape
        K, pool = rule.most, rule.pool
        experts_TK = routing.experts.reshape(G * S, K)
        kept_TK = experts_TK < pool.size
        work = functools.partial(grouped, params)
        if axis is not None:
            devices = jax.lax.axis_size(axis)
            room = worst = devices * G * S * min(K, pool.n_ffn // devices)
            if buffer is not None:
                room = min(worst, math.ceil(buffer * experts_TK.size / tile) * tile)
            if room < worst:
                kept_TK &= transfer.admitted(experts_TK, pool.n_ffn, room, axis)
                kept_TK = checkpoint_name(kept_TK, "routing")
            work = _elsewhere(work, moved, room, axis)
        served_TK = jnp.where(kept_TK, experts_TK, pool.n_ffn)
        few = 2 * sum(rule.load) < K  # a rule that leaves most choices unused
        with jax.named_scope("dispatch"):
            rows, counts_E = dispatch.sorted_rows(served_TK, pool.n_ffn, few)
            rows_RD = dispatch.gather(x_GSD.reshape(G * S, D), rows, take)
        with jax.named_scope("experts"):
            y_RD = work(rows_RD, counts_E)
        with jax.named_scope("combine"):
            y_TD = dispatch.combine(y_RD, routing.gates.reshape(G * S, K), rows, take)
        return y_TD.reshape(G, S, D), kept_TK.reshape(G, S, K)

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
