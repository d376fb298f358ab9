"""What a machine can do: bare products of experts, and its limits as measured in the same run."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moepp_jax.benchmarks import timing

SIDE = 1536  # of the square matrices of the peak
NUMBERS = 1 << 25  # far more than a cache holds


class Limits(NamedTuple):
    """Operations and bytes a second."""

    flops: float
    bandwidth: float

    @classmethod
    def of(cls, seconds: dict) -> Limits:
        """From the times of `limits`."""
        itemsize = 4
        return cls(
            2 * SIDE**3 / seconds["peak"].low, 2 * itemsize * NUMBERS / seconds["memory"].low
        )

    def seconds(self, flops: float, size: float) -> float:
        """The roofline: no less than either takes."""
        return max(flops / self.flops, size / self.bandwidth)


def limits(dtype: jnp.dtype) -> dict[str, timing.Case]:
    """A product of large square matrices; an array read and written, float32."""
    matrix = jax.random.normal(jax.random.key(4), (SIDE, SIDE), dtype)
    array = jnp.zeros(NUMBERS)
    return {
        "peak": timing.Case(jax.jit(jnp.matmul), (matrix, matrix)),
        "memory": timing.Case(jax.jit(lambda a: a + 1), (array,)),
    }


def products(ffn: dict[str, jax.Array], rows: int, way: str) -> timing.Case:
    """The matrix products of SwiGLU experts over `rows` rows each, and nothing else.

    Forward: x W_in and a W_out. Backward: each one's two gradients. All operands are inputs.
    """
    E, _, F, D = ffn["w_in"].shape
    w_in, w_out = ffn["w_in"].reshape(E, 2 * F, D), ffn["w_out"]
    keys = jax.random.split(jax.random.key(3), 4)
    dtype = w_in.dtype
    x, dy = (jax.random.normal(k, (E, rows, D), dtype) for k in keys[:2])
    a = jax.random.normal(keys[2], (E, rows, F), dtype)
    dh = jax.random.normal(keys[3], (E, rows, 2 * F), dtype)
    product = jnp.einsum

    def forward(x, a, w_in, w_out):
        return product("erd,efd->erf", x, w_in), product("erf,edf->erd", a, w_out)

    def both(x, a, w_in, w_out, dy, dh):
        backward = (
            product("erd,edf->erf", dy, w_out),
            product("erd,erf->edf", dy, a),
            product("erf,efd->erd", dh, w_in),
            product("erf,erd->efd", dh, x),
        )
        return forward(x, a, w_in, w_out), backward

    if way == "forward":
        return timing.Case(jax.jit(forward), (x, a, w_in, w_out))
    return timing.Case(jax.jit(both), (x, a, w_in, w_out, dy, dh))
