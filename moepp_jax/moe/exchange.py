"""To the devices of the experts and back: what crosses the expert axis of the mesh."""

import jax
from jaxtyping import Array, Float


def to_experts(rows_EBD: Float[Array, "E B D"], axis: str | None) -> Float[Array, "e b D"]:
    """From all experts' rows of this device to this device's experts' rows of all devices.

    (E, B, D) becomes (E / n, n B, D) on an axis of n devices. Without an axis nothing moves.
    """
    if axis is None:
        return rows_EBD
    return jax.lax.all_to_all(rows_EBD, axis, split_axis=0, concat_axis=1, tiled=True)


def from_experts(rows_EBD: Float[Array, "e b D"], axis: str | None) -> Float[Array, "E B D"]:
    """The way back: the inverse of `to_experts`."""
    if axis is None:
        return rows_EBD
    return jax.lax.all_to_all(rows_EBD, axis, split_axis=1, concat_axis=0, tiled=True)


def swap(rows: Array, axis: str) -> Array:
    """Part i of the leading axis (n, ...) goes to device i; part i of the result came from it."""
    return jax.lax.all_to_all(rows, axis, split_axis=0, concat_axis=0, tiled=True)
