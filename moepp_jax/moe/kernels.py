"""Which arithmetic and which exchange a platform gets, in one place.

On CPU `python -m benchmarks.layer` measures the arithmetic. For TPU the choices are read from what
its compiler makes of them. Nothing is measured on GPU yet.
"""

from collections.abc import Callable

from moepp_jax.moe import exchange, transfer
from moepp_jax.moe.experts import swiglu
from moepp_jax.moe.grouped import Blocked, ragged_swiglu


def grouped_function(platform: str) -> Callable:
    """For `paths.dropless`: (params, rows (R, D) sorted by expert, counts (E,)) -> rows.

    `jax.lax.ragged_dot` is a kernel on TPU; elsewhere it multiplies every row with every expert.
    """
    return ragged_swiglu if platform == "tpu" else Blocked(swiglu)


def move(platform: str) -> transfer.Move:
    """For `paths.dropless`: how rows cross the expert axis. A CPU has no ragged all-to-all."""
    return transfer.dense if platform == "cpu" else transfer.ragged


def exchanged(platform: str) -> Callable:
    """For `paths.with_capacity`: the order of the rows that the experts read and write.

    Libraries of matrix products want an expert's rows in one run; a TPU's products do not, and are
    spared the copies.
    """
    return exchange.by_device if platform == "tpu" else exchange.by_expert
