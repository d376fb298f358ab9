"""Fixed slots to the devices of the experts and back: two orders of the same rows.

`kernels.py` says which a platform gets. What has crossed has a name, "to_experts" or
"from_experts", in profiles and in checkpoint policies: kept, it need not cross again in backward.
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from moepp_jax.moe.layouts import as_written


def by_expert(
    expert: Callable, params, rows_EBD: Float[Array, "E B D"], axis: str | None
) -> Float[Array, "E B D"]:
    """All experts on their slots, wherever they live, each seeing its rows in one run.

    (E, B, D) becomes (E / n, n B, D) on an axis of n devices. Without an axis nothing moves.

    Args:
      expert: (params stacked over E, rows (E, B, D)) -> rows (E, B, D).
    """
    if axis is None:
        return expert(params, rows_EBD)
    with jax.named_scope("to_experts"):
        there = jax.lax.all_to_all(rows_EBD, axis, split_axis=0, concat_axis=1, tiled=True)
    y = expert(params, checkpoint_name(there, "to_experts"))
    with jax.named_scope("from_experts"):
        y = jax.lax.all_to_all(y, axis, split_axis=1, concat_axis=0, tiled=True)
    return checkpoint_name(y, "from_experts")


def by_device(
    expert: Callable, params, rows_EBD: Float[Array, "E B D"], axis: str | None
) -> Float[Array, "E B D"]:
    """As `by_expert`, but the expert's rows stay in the order in which the network brings them.

    A TPU exchanges between devices what is outermost in memory, and its matrix products read and
    write rows in any order of the outer axes: so nothing is copied before or after the exchange.

    Args:
      expert: as for `by_expert`, and the same for rows (n, E, B, D), as `experts.swiglu` is.
        `jax.vmap(expert, (None, 0))` makes the second of the first.
    """
    if axis is None:
        return expert(params, rows_EBD)
    E, B, D = rows_EBD.shape
    n = jax.lax.axis_size(axis)
    with jax.named_scope("to_experts"):
        there = _swap(rows_EBD.reshape(n, E // n, B, D), axis)
    y = expert(params, checkpoint_name(there, "to_experts"))
    with jax.named_scope("from_experts"):
        y = _swap(y, axis)
    return checkpoint_name(y, "from_experts").reshape(E, B, D)


def _swap(rows: Array, axis: str) -> Array:
    """Part i of the leading axis goes to device i; part i of the result came from it.

    In memory axes are as in the shape: left alone, XLA has products write other orders, and copies.
    """
    rows = jax.lax.all_to_all(as_written(rows), axis, split_axis=0, concat_axis=0, tiled=True)
    return as_written(rows)
