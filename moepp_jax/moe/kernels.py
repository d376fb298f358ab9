"""Which arithmetic of the SwiGLU experts a platform gets, in one place.

On CPU `python -m benchmarks.layer` measures it; TPU and GPU are not measured yet.
"""

from collections.abc import Callable

from moepp_jax.moe.experts import swiglu
from moepp_jax.moe.grouped import Blocked, ragged_swiglu


def grouped_function(platform: str) -> Callable:
    """For dropless: (params, rows (R, D) sorted by expert, counts (E,)) -> rows.

    `jax.lax.ragged_dot` is a kernel on TPU; elsewhere it multiplies every row with every expert.
    """
    return ragged_swiglu if platform == "tpu" else Blocked(swiglu)
