"""SwiGLU experts over sorted rows on GPUs: Pallas kernels, compiled by Triton.

A grouped function as those of `moepp_jax.moe.grouped`, whose work follows the rows that exist. Each
expert's rows are cut into tiles that begin where they begin, so that no tile has two experts' rows
and none is written twice. As many programs are started as there can be tiles; those without rows
end at once. Between the products nothing runs over the buffer: the activation and its gradient are
computed where a product's tile is at hand.

Sums are in float32. Operands of float32 are multiplied as such, not as TensorFloat-32.

Shapes: M tiles of rows; H = 2 F; the letters of `moepp_jax.moe` besides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from moepp_jax.moe.experts import as_one
from moepp_jax.moe.unchecked import axes_of, unchecked, varying

# Rows and columns of a tile of results, and how much of the contracted axis is read at once: what
# fits the shared memory of a block three times, of an A100's 164 KB or an H100's 227 KB.
_ROWS, _COLUMNS, _CONTRACTED = 128, 128, 64
_HOW = triton.CompilerParams(num_warps=8, num_stages=3)

# Tiles of rows whose programs follow each other: they read the same columns of parameters, out of
# the second-level cache.
_TOGETHER = 8


@dataclass(frozen=True)
class Tiled:
    """`experts.swiglu` over rows sorted by expert.

    Attributes:
      interpret: run without a GPU, slowly: for tests.
    """

    interpret: bool = False

    def __call__(
        self, params, rows_RD: Float[Array, "R D"], counts_E: Int[Array, " E"]
    ) -> Float[Array, "R D"]:
        given = varying((params, rows_RD, counts_E), axes_of((params, rows_RD, counts_E)))
        return _swiglu(self.interpret, *given)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(interpret, params, rows_RD, counts_E):
    return _swiglu_fwd(interpret, params, rows_RD, counts_E)[0]


def _swiglu_fwd(interpret, params, rows_RD, counts_E):
    forward = unchecked(functools.partial(_forward, interpret), axes_of(rows_RD))
    y, h = forward(params, rows_RD, counts_E)
    return y, (params, rows_RD, counts_E, checkpoint_name(h, "w_in"))


def _swiglu_bwd(interpret, saved, d_y):
    backward = unchecked(functools.partial(_backward, interpret), axes_of(d_y))
    return (*backward(*saved, d_y), None)


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def _forward(interpret, params, x_RD, counts_E):
    """The rows, and what backward keeps: the products of x (R, H)."""
    tiles, w_out = _tiles(counts_E, len(x_RD)), params["w_out"]
    h_RH, a_RF = _hidden(interpret, tiles, x_RD, as_one(params["w_in"]))
    return _product(interpret, tiles, a_RF, w_out, transposed=True), h_RH


def _backward(interpret, params, x_RD, counts_E, h_RH, d_y_RD):
    w_in, w_out = params["w_in"], params["w_out"]
    tiles = _tiles(counts_E, len(x_RD))
    d_h_RH, a_RF = _hidden_gradient(interpret, tiles, d_y_RD, w_out, h_RH)
    d_params = {
        "w_in": _of_parameters(interpret, counts_E, d_h_RH, x_RD, w_in.dtype).reshape(w_in.shape),
        "w_out": _of_parameters(interpret, counts_E, d_y_RD, a_RF, w_out.dtype),
    }
    return d_params, _product(interpret, tiles, d_h_RH, as_one(w_in), transposed=False)


# --- tiles ----------------------------------------------------------------------------------------


class _Tiles(NamedTuple):
    """Runs of rows of one expert each; those that there are come first, the others have no rows."""

    expert: Int[Array, " M"]
    first: Int[Array, " M"]
    count: Int[Array, " M"]


def _tiles(counts_E: Int[Array, " E"], rows: int) -> _Tiles:
    """As many as there can be: an expert's last tile may be of few rows."""
    E, size = len(counts_E), _power_of_two(rows, _ROWS)
    tiles_E = (counts_E + size - 1) // size
    tile = jnp.arange(rows // size + E, dtype=jnp.int32)
    ends_E = jnp.cumsum(tiles_E)
    expert = jnp.searchsorted(ends_E, tile, side="right").astype(jnp.int32)
    there, expert = expert < E, jnp.minimum(expert, E - 1)
    before = (tile - (ends_E - tiles_E)[expert]) * size
    first = (jnp.cumsum(counts_E) - counts_E)[expert] + before
    count = jnp.minimum(counts_E[expert] - before, size)
    return _Tiles(expert, jnp.where(there, first, 0), jnp.where(there, count, 0))


def _power_of_two(size: int, most: int) -> int:
    """The smallest one that is no less, of those that a tile may have, and no more than most."""
    return min(max(16, 1 << (size - 1).bit_length()), most)


class _Span(NamedTuple):
    """A part of an axis of an array in memory; what is not inside is read as 0."""

    at: pl.Slice
    inside: Array | None = None


def _span(number: Any, size: int, of: int, offset: int = 0) -> _Span:
    """The tile of this number, of an axis of that size, or of a part of one from an offset on."""
    first = number * size
    inside = None if of % size == 0 else first + jnp.arange(size) < of
    return _Span(pl.ds(offset + first, size), inside)


def _read(ref: Any, *spans: _Span, expert: Any = None) -> Array:
    mask = _mask(*spans)
    return triton.load(_part(ref, spans, expert), mask=mask, other=None if mask is None else 0.0)


def _write(ref: Any, *spans: _Span, value: Array, expert: Any = None) -> None:
    triton.store(_part(ref, spans, expert), value.astype(ref.dtype), mask=_mask(*spans))


def _part(ref: Any, spans: Sequence[_Span], expert: Any) -> Any:
    places = tuple(span.at for span in spans)
    return ref.at[places if expert is None else (expert, *places)]


def _mask(rows: _Span, columns: _Span) -> Array | None:
    shape = (rows.at.size, columns.at.size)
    sides = [
        jnp.broadcast_to(jnp.expand_dims(span.inside, axis), shape)
        for axis, span in ((1, rows), (0, columns))
        if span.inside is not None
    ]
    return functools.reduce(jnp.logical_and, sides) if sides else None


# --- products of rows -----------------------------------------------------------------------------


def _hidden(interpret: bool, tiles: _Tiles, x_RD, w_EHD) -> Sequence[Array]:
    """x times both matrices of its expert, (R, H), and the activation of that, (R, F)."""
    (R, D), F = x_RD.shape, w_EHD.shape[1] // 2
    size = _power_of_two(F, _COLUMNS // 2)  # of two halves at once

    def of_tile(expert, rows, column, x, w, h, a):
        halves = [_span(column, size, F, offset) for offset in (0, F)]

        def product(part):
            x_part = _read(x, rows, part)
            return [
                _dot(x_part, _read(w, half, part, expert=expert), trans_b=True) for half in halves
            ]

        values = [total.astype(h.dtype) for total in _summed(product, D, [(rows, size)] * 2)]
        for half, value in zip(halves, values, strict=True):
            _write(h, rows, half, value=value)
        gate, linear = (value.astype(jnp.float32) for value in values)
        _write(a, rows, halves[0], value=jax.nn.silu(gate) * linear)

    results = _results(x_RD, (R, 2 * F), (R, F))
    return _over_tiles("hidden", interpret, of_tile, tiles, F, size, results, x_RD, w_EHD)


def _hidden_gradient(interpret: bool, tiles: _Tiles, d_y_RD, w_EDF, h_RH) -> Sequence[Array]:
    """The gradient of h (R, H), and the activation (R, F) once more."""
    (R, D), F = d_y_RD.shape, w_EDF.shape[2]
    size = _power_of_two(F, _COLUMNS)

    def of_tile(expert, rows, column, d_y, w, h, d_h, a):
        halves = [_span(column, size, F, offset) for offset in (0, F)]

        def product(part):
            return [_dot(_read(d_y, rows, part), _read(w, part, halves[0], expert=expert))]

        [d_a] = _summed(product, D, [(rows, size)])
        gate, linear = (_read(h, rows, half).astype(jnp.float32) for half in halves)
        gated = jax.nn.sigmoid(gate)
        silu = gate * gated
        _write(a, rows, halves[0], value=silu * linear)
        _write(d_h, rows, halves[0], value=d_a * linear * (gated + silu * (1.0 - gated)))
        _write(d_h, rows, halves[1], value=d_a * silu)

    results = _results(d_y_RD, (R, 2 * F), (R, F))
    return _over_tiles(
        "hidden_gradient", interpret, of_tile, tiles, F, size, results, d_y_RD, w_EDF, h_RH
    )


def _product(interpret: bool, tiles: _Tiles, x_RK, w_E, transposed: bool) -> Float[Array, "R N"]:
    """x times the matrix of its expert; rows that are none are 0.

    Args:
      w_E: (E, K, N), or (E, N, K) if it is to be transposed.
    """
    (R, K), N = x_RK.shape, w_E.shape[1 if transposed else 2]
    size = _power_of_two(N, _COLUMNS)

    def of_tile(expert, rows, column, x, w, zeros, y):
        columns = _span(column, size, N)

        def product(part):
            across = (columns, part) if transposed else (part, columns)
            w_part = _read(w, *across, expert=expert)
            return [_dot(_read(x, rows, part), w_part, trans_b=transposed)]

        [total] = _summed(product, K, [(rows, size)])
        _write(y, rows, columns, value=total)

    results, zeros = _results(x_RK, (R, N)), jnp.zeros((R, N), x_RK.dtype)
    [y] = _over_tiles("product", interpret, of_tile, tiles, N, size, results, x_RK, w_E, into=zeros)
    return y


def _results(like: Array, *shapes: tuple[int, int]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, like.dtype) for shape in shapes]


def _over_tiles(
    name: str,
    interpret: bool,
    of_tile: Callable,
    tiles: _Tiles,
    columns: int,
    size: int,
    results: Sequence[jax.ShapeDtypeStruct],
    *operands: Array,
    into: Array | None = None,
) -> Sequence[Array]:
    """What of_tile(expert, rows, number of a tile of columns, *operands, *results) writes.

    Args:
      size: of a tile of columns.
      name: of the kernel, by which `moepp_jax.compile` knows what it computes.
      into: an operand whose memory the first result has: what is not written is as it was there.
    """
    M, N, tall = (
        len(tiles.expert),
        pl.cdiv(columns, size),
        _power_of_two(results[0].shape[0], _ROWS),
    )
    operands = operands if into is None else (*operands, into)

    def kernel(experts, firsts, counts, *arrays):
        tile, column = _in_turn(pl.program_id(0), M, N)
        count = counts[tile]

        @pl.when(count > 0)
        def _():
            rows = _Span(pl.ds(firsts[tile], tall), jnp.arange(tall) < count)
            of_tile(experts[tile], rows, column, *arrays)

    return pl.pallas_call(
        kernel,
        results,
        grid=(M * N,),
        input_output_aliases={} if into is None else {len(tiles) + len(operands) - 1: 0},
        interpret=interpret,
        name=f"experts_{name}",
        compiler_params=_HOW,
    )(*tiles, *operands)


def _in_turn(program: Any, M: int, N: int) -> tuple[Any, Any]:
    """Which tile of rows and which of columns a program computes."""
    group, place = _divided(program, _TOGETHER * N)
    together = jnp.minimum(M - group * _TOGETHER, _TOGETHER)
    column, row = _divided(place, together)
    return group * _TOGETHER + row, column


def _divided(a: Any, b: Any) -> tuple[Any, Any]:
    b = jnp.asarray(b, a.dtype)
    return jax.lax.div(a, b), jax.lax.rem(a, b)


def _summed(product: Callable, K: int, sides: Sequence[tuple[_Span, int]]) -> Sequence[Array]:
    """The sums of product(part of the contracted axis), a list of tiles with these sides."""
    size = _power_of_two(K, _CONTRACTED)
    zeros = [jnp.zeros((rows.at.size, columns), jnp.float32) for rows, columns in sides]

    def add(number, totals):
        return [t + p for t, p in zip(totals, product(_span(number, size, K)), strict=True)]

    return jax.lax.fori_loop(0, pl.cdiv(K, size), add, zeros)


def _dot(a: Array, b: Array, **how: bool) -> Array:
    return triton.dot(a, b, precision=jax.lax.Precision.HIGHEST, **how)


# --- gradients of parameters ----------------------------------------------------------------------


def _of_parameters(
    interpret: bool, counts_E: Int[Array, " E"], a_RF, b_RD, dtype: Any
) -> Float[Array, "E F D"]:
    """For each expert the sum of a b^T over its rows."""
    E, F, D = len(counts_E), a_RF.shape[1], b_RD.shape[1]
    tall, wide = _power_of_two(F, _ROWS), _power_of_two(D, _COLUMNS)
    M, N, size = pl.cdiv(F, tall), pl.cdiv(D, wide), _power_of_two(len(a_RF), _CONTRACTED)

    def kernel(starts, counts, a, b, out):
        expert, place = _divided(pl.program_id(0), M * N)
        f, d = _in_turn(place, M, N)
        f, d = _span(f, tall, F), _span(d, wide, D)
        start, count = starts[expert], counts[expert]

        def add(number, total):
            first = number * size
            rows = _Span(pl.ds(start + first, size), first + jnp.arange(size) < count)
            return total + _dot(_read(a, rows, f), _read(b, rows, d), trans_a=True)

        zeros = jnp.zeros((tall, wide), jnp.float32)
        total = jax.lax.fori_loop(0, (count + size - 1) // size, add, zeros)
        _write(out, f, d, value=total, expert=expert)

    return pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((E, F, D), dtype),
        grid=(E * M * N,),
        interpret=interpret,
        name="experts_parameters",
        compiler_params=_HOW,
    )(jnp.cumsum(counts_E) - counts_E, counts_E, a_RF, b_RD)
