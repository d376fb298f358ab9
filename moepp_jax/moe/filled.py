"""What is computed of each row by itself, in a buffer of which the first rows are filled.

Shapes: W numbers of a row, of each array its own; the letters of `moepp_jax.moe` besides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from moepp_jax.moe.unchecked import axes_of, unchecked, varying

# Numbers that a vector register has beside each other.
_LANES = 128

# Of the 16 MiB that a kernel has of a TPU core's own memory, for its blocks, each of them twice.
_MEMORY = 8 << 20


def by_blocks(
    f: Callable,
    filled: Int[Array, ""],
    *arrays_RW: Float[Array, "R _"],
    interpret: bool = False,
) -> Sequence[Float[Array, "R _"]]:
    """f of the filled rows, in float32, by a kernel for TPUs that goes no further than they do.

    Behind their last block is whatever was in memory. Rows whose last register is not full are
    computed all, without a kernel.

    Args:
      f: (arrays (R, W), ...) -> (arrays, ...), of each row by itself; to be called in a custom rule
        of the gradient.
      interpret: run without a TPU, slowly: for tests.
    """
    results = jax.eval_shape(f, *arrays_RW)
    if any(x.shape[1] % _LANES for x in (*arrays_RW, *results)):
        return f(*arrays_RW)
    axes = axes_of((filled, arrays_RW))
    kernel = unchecked(functools.partial(_kernel, f, interpret), axes)
    return kernel(*varying((filled, *arrays_RW), axes))


def _kernel(f, interpret, filled, *arrays_RW):
    results = jax.eval_shape(f, *arrays_RW)
    block = _rows(sum(x.shape[1] * x.dtype.itemsize for x in (*arrays_RW, *results)))

    def of_block(*refs):
        given, made = refs[: len(arrays_RW)], refs[len(arrays_RW) :]
        values = f(*(ref[...].astype(jnp.float32) for ref in given))
        for ref, value in zip(made, values, strict=True):
            ref[...] = value.astype(ref.dtype)

    def blocks_of(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((block, x.shape[1]), lambda i: (i, 0))

    return pl.pallas_call(
        of_block,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        grid=((filled + block - 1) // block,),
        in_specs=[blocks_of(x) for x in arrays_RW],
        out_specs=[blocks_of(x) for x in results],
        interpret=interpret,
        name="experts_rows",
    )(*arrays_RW)


def _rows(bytes_of_one: int) -> int:
    """Rows of a block: a power of two of them, in whole registers of any type."""
    fitting = max(_MEMORY // (2 * bytes_of_one), 32)
    return min(1 << (fitting.bit_length() - 1), 512)
