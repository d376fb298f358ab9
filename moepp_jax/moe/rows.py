"""Tokens to the rows of experts' buffers and back, on one device: gathered, and combined.

Rows are only ever gathered, in gradients too: to add each where it is scattered to takes a TPU more
than twice as long, of 1,536 numbers (`compile/rates.py`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Rows(NamedTuple):
    """A buffer's two sides: which assignment fills each row, and which row each assignment has.

    An empty row names assignment T K, an assignment without a row names row R.

    Attributes:
      few: how many rows are filled, the first ones, if that can be few of them: then what is moved
        follows it. None: all rows are gone through.
    """

    assignment: Int[Array, " R"]
    row: Int[Array, "T K"]
    few: Int[Array, ""] | None = None


def taken(x_TD: Float[Array, "T D"], at: Int[Array, " R"]) -> Float[Array, "R D"]:
    """Rows by their numbers."""
    return x_TD[at]


def taken_as_they_are(x_TD: Float[Array, "T D"], at: Int[Array, " R"]) -> Float[Array, "R D"]:
    """As `taken`, for TPUs, where rows are written before anything is computed of them.

    The compiler would first make them float32 for it, in an array of their own.
    """
    return jax.lax.optimization_barrier(taken(x_TD, at))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gather(
    x_GSD: Float[Array, "G S D"], parts: Sequence[Rows], take: Callable = taken
) -> list[Float[Array, "R D"]]:
    """The token of every row. Empty rows hold some token; nothing reads what comes of them.

    The gradient is a gather too: each token sums the rows that its assignments have.

    Args:
      parts: buffers, each of as many of the groups, in their order. All read x where it is: a part
        of its own would be a copy.
      take: `taken` or `taken_as_they_are`.
    """
    x_TD = _flat(x_GSD)
    return [
        _by_row(lambda at, rows=rows, t=t: take(x_TD, t + _token(rows, at)), rows)
        for t, rows in zip(_starts(parts), parts, strict=True)
    ]


def _flat(x_GSD: Array) -> Array:
    return x_GSD.reshape(-1, x_GSD.shape[-1])


def _starts(parts: Sequence[Rows]) -> list[int]:
    """The first token of each part."""
    return [i * len(rows.row) for i, rows in enumerate(parts)]


def _gather_fwd(x_GSD, parts, take):
    ones_GSK = jnp.ones((*x_GSD.shape[:-1], parts[0].row.shape[-1]), jnp.float32)
    return gather(x_GSD, parts, take), (parts, ones_GSK)


def _gather_bwd(take, saved, d):
    parts, ones_GSK = saved
    return _weighted_sums(d, ones_GSK, parts, take), None


gather.defvjp(_gather_fwd, _gather_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def combine(
    y: Sequence[Float[Array, "R D"]],
    gates_GSK: Float[Array, "G S K"],
    parts: Sequence[Rows],
    take: Callable = taken,
) -> Float[Array, "G S D"]:
    """Every token's sum of its rows, weighed by its gates; assignments without a row add nothing.

    Sums in float32. The gradients are gathers and products, and the gates' go where they belong one
    by one: there are fewer rows than assignments, if any expert costs nothing.

    Args:
      y: one buffer for each part.
      parts, take: as in `gather`.
    """
    return _weighted_sums(y, gates_GSK, parts, take)


def _combine_fwd(y, gates_GSK, parts, take):
    return combine(y, gates_GSK, parts, take), (y, gates_GSK, parts)


def _combine_bwd(take, saved, d_GSD):
    y, gates_GSK, parts = saved
    d_TD, gates = _flat(d_GSD), jnp.split(_flat(gates_GSK), len(parts))
    gradients = [
        _combine_gradients(*of_part, d_TD, take)
        for of_part in zip(y, gates, parts, _starts(parts), strict=True)
    ]
    d_y, d_gates = zip(*gradients, strict=True)
    return list(d_y), jnp.concatenate(d_gates).reshape(gates_GSK.shape), None


def _combine_gradients(y_RD, gates_TK, rows: Rows, first: int, d_TD, take):
    """Of a part that begins with the first token of d."""
    filled = rows.assignment < gates_TK.size
    gate_R = gates_TK.reshape(-1)[jnp.where(filled, rows.assignment, 0)]
    gate_R = jnp.where(filled, gate_R, 0.0)
    wide = jnp.promote_types(jnp.float32, y_RD.dtype)

    # Both gradients while the token's is at hand: to fetch its rows of y again, for the gates,
    # would take as long as to fetch it.
    def of_row(at):
        d = take(d_TD, first + _token(rows, at))
        d_y = gate_R[at][:, None] * d
        return d_y.astype(y_RD.dtype), jnp.sum(d.astype(wide) * y_RD[at], axis=-1)

    d_y, product_R = _by_row(of_row, rows)
    # Each empty row has a place of its own outside, so that none is written to twice.
    outside = gates_TK.size + jnp.arange(len(filled))
    at = jnp.where(filled, rows.assignment, outside)
    d_gates = jnp.zeros((gates_TK.size,), wide)
    d_gates = d_gates.at[at].set(product_R, mode="drop", unique_indices=True)
    return d_y, d_gates.reshape(gates_TK.shape).astype(gates_TK.dtype)


combine.defvjp(_combine_fwd, _combine_bwd)


def _weighted_sums(y, weights_GSK, parts, take):
    """Each part's, one after the other: joined as groups, or XLA writes them a second time."""
    weights = jnp.split(_flat(weights_GSK), len(parts))
    sums = [_weighted_sum(*of_part, take) for of_part in zip(y, weights, parts, strict=True)]
    S, D = weights_GSK.shape[1], sums[0].shape[-1]
    return jnp.concatenate([total.reshape(-1, S, D) for total in sums])


def _weighted_sum(y_RD, weights_TK, rows: Rows, take):
    has_row = rows.row < y_RD.shape[0]

    # One term for each choice, so that no (T, K, D) intermediate is made.
    def term(k):
        row = take(y_RD, _clip(rows.row[:, k], y_RD))
        return jnp.where(has_row[:, k, None], weights_TK[:, k, None] * row, 0)

    dtype = jnp.promote_types(weights_TK.dtype, y_RD.dtype)
    zeros = jnp.zeros((len(weights_TK), y_RD.shape[1]), dtype)
    return _over_choices(lambda k, total: total + term(k), zeros, rows).astype(y_RD.dtype)


def _over_choices(step: Callable, start: Array, rows: Rows) -> Array:
    """step(k, value so far) for every k; of few rows, up to the last k that any token has."""
    K = rows.row.shape[1]
    if rows.few is None:
        for k in range(K):
            start = step(k, start)
        return start
    has_row = jnp.any(rows.row < len(rows.assignment), axis=0)
    last = jnp.max(jnp.where(has_row, jnp.arange(1, K + 1), 0))
    return jax.lax.fori_loop(0, last, step, _varying(start, rows))


# Rows that are gone through at once where few of a buffer's are filled.
_BLOCK = 1024


def _by_row(value: Callable, rows: Rows):
    """value(row numbers) of all rows, or its arrays; of few, block by block, else 0."""
    R = len(rows.assignment)
    if rows.few is None:
        return value(slice(None))
    block = min(_BLOCK, R)

    def put(b, done):
        start = jnp.minimum(b * block, R - block)
        made = value(start + jnp.arange(block))
        return jax.tree.map(
            lambda d, m: jax.lax.dynamic_update_slice_in_dim(d, m, start, axis=0), done, made
        )

    made = jax.eval_shape(value, jnp.arange(block))
    zeros = jax.tree.map(lambda m: jnp.zeros((R, *m.shape[1:]), m.dtype), made)
    start = jax.tree.map(lambda z: _varying(z, rows), zeros)
    return jax.lax.fori_loop(0, (rows.few + block - 1) // block, put, start)


def _varying(zeros: Array, rows: Rows) -> Array:
    """Zeros that vary over the mesh as the rows do: shard_map asks that of what a loop carries."""
    return zeros + (rows.few * 0).astype(zeros.dtype)


def _token(rows: Rows, at):
    T, K = rows.row.shape
    return jnp.minimum(rows.assignment[at] // K, T - 1)


def _clip(row, y_RD):
    return jnp.minimum(row, y_RD.shape[0] - 1)
