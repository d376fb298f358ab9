"""Which arithmetic and which exchange a platform gets, in one place.

On CPU `python -m benchmarks.layer` measures the arithmetic. For TPU and GPU the choices are read
from what their compilers make of them: nothing was measured there.
"""

import functools
from collections.abc import Callable

from jax.sharding import Mesh

from moepp_jax.moe import exchange, rows, transfer
from moepp_jax.moe.experts import (
    KEEPING_SWIGLU,
    one_swiglu,
    swiglu,
    swiglu_apart,
    swiglu_in_turn,
)
from moepp_jax.moe.grouped import Apart, Blocked, all_of_few
from moepp_jax.moe.products import few_weights_first, tokens_first
from moepp_jax.moe.ragged import Ragged


def experts_function(platform: str) -> Callable:
    """For `paths.with_capacity`: (params stacked over E, rows (E, B, D)) -> rows (E, B, D).

    A TPU's compiler copies what is one half of a product that was kept for backward, and what is
    joined to be multiplied: 73 of the 1,897 ms of the 7B's step. A CPU multiplies the many rows of
    an expert faster alone.
    """
    return {"tpu": swiglu_apart, "cpu": swiglu_in_turn}.get(platform, swiglu)


def grouped_function(platform: str, scanned: bool = False) -> Callable:
    """For `paths.dropless`: (params, rows (R, D) sorted by expert, counts (E,)) -> rows.

    `jax.lax.ragged_dot` is a kernel on TPU; elsewhere it multiplies every row with every expert. A
    loop of `Blocked` has rounds as there are rows, of which a GPU would tell its host one by one.

    Args:
      scanned: the layer is one of a scan over layers, into whose stack a CPU copies what is kept
        for backward, and back. To compute it again takes no longer.
    """
    # The import of kernels takes as long as that of JAX.
    if platform == "gpu":
        from moepp_jax.moe.triton import Tiled

        return Tiled()
    if platform == "tpu":
        from moepp_jax.moe.filled import by_blocks

        return Ragged(by_blocks)
    return Blocked(swiglu if scanned else KEEPING_SWIGLU)


def taking(platform: str) -> Callable:
    """For both paths: how rows are read by their numbers."""
    return rows.taken_as_they_are if platform == "tpu" else rows.taken


def slots_tile(platform: str) -> int:
    """For `paths.with_capacity`: an expert's rows on a device are a multiple of it.

    A TPU keeps rows in tiles of eight: an expert's that do not fill theirs are copied to be
    exchanged. GPUs multiply in tiles of eight or more. CPUs take rows as they come.
    """
    return 1 if platform == "cpu" else 8


def buffer_tile(platform: str) -> int:
    """For `paths.dropless`: rows of a buffer that is none of the worst case are a multiple of it.

    XLA on TPU has a kernel for `jax.lax.ragged_dot` only of whole tiles: in silence it else
    multiplies every row with every expert.
    """
    return 128 if platform == "tpu" else 1


def experts_apart(platform: str) -> bool:
    """Whether `reading_chosen` takes a list of the experts' own parameters, not a stack of them."""
    return platform == "cpu"


def reading_chosen(platform: str, tokens: int) -> Callable:
    """As `grouped_function`, for generation: parameters are read, and not copied to be read.

    Those of experts that nobody chose are not read, but on a TPU where the rows are no less than a
    third of the experts.

    Args:
      tokens: in a call; no expert has more rows.
    """
    if platform == "cpu":
        return Apart(one_swiglu(product(platform)), tokens)
    blocked = Blocked(swiglu, min(1024, max(8, tokens)))
    return functools.partial(_by_rows, blocked) if platform == "tpu" else blocked


def _by_rows(blocked: Callable, params, rows_RD, counts_E):
    """By what the TPU's compiler makes of each; nothing was measured.

    Of fewer rows than a tile `jax.lax.ragged_dot` is a product of all with every expert, before
    which all parameters are copied, twice. A loop copies those of an expert with rows: three times
    as much moves as is read.
    """
    R, E = len(rows_RD), len(counts_E)
    if buffer_tile("tpu") <= R:
        return Ragged()(params, rows_RD, counts_E)
    return (blocked if 3 * R < E else all_of_few)(params, rows_RD, counts_E)


def product(platform: str) -> Callable:
    """For generation: x W^T of a few tokens or many."""
    return few_weights_first if platform == "cpu" else tokens_first


def move(platform: str, mesh: Mesh | None = None) -> transfer.Move:
    """For `paths.dropless`: how rows cross the expert axis. A CPU has no ragged all-to-all."""
    limited = mesh is not None and limited_routing(mesh)
    return transfer.dense if platform == "cpu" or limited else transfer.ragged


def limited_routing(mesh: Mesh) -> bool:
    """Whether chips cannot reach all others over their links: v5e, of more than 16 chips.

    Its compiler refuses ragged exchanges there, and asynchronous ones: of 4x8, 8x8 and 16x16
    ("not supported on limited ICI"), not of 2x4 and 4x4.
    """
    return mesh.devices.flat[0].device_kind in ("TPU v5 lite", "TPU v5e") and mesh.size > 16


def exchanged(platform: str) -> Callable:
    """For `paths.with_capacity`: the order of the rows that the experts read and write.

    Libraries of matrix products want an expert's rows in one run; a TPU's products do not, and are
    spared the copies.
    """
    return exchange.by_device if platform == "tpu" else exchange.by_expert
