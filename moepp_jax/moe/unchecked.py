"""Calling a kernel inside a shard_map of which it knows nothing.

There a kernel has to say over which axes its results vary, and Pallas kernels of others cannot. So
it is called in a shard_map of its own, in which nothing is left to be split and types say nothing
of axes; what comes out is marked as varying again. This holds for forward and for backward each,
not for something that JAX then differentiates: a rule of the gradient is to be around both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


def unchecked(f: Callable, axes: tuple[str, ...]) -> Callable:
    """f of a device's own arrays, in a shard_map over `axes`, whatever kernels it calls."""
    if not axes:
        return f

    def without_axes(*arguments):
        # In types: what an operation makes has none here, and of a product by 1 nothing is left.
        return f(*jax.tree.map(lambda x: x * jnp.ones((), x.dtype), arguments))

    inside = jax.shard_map(without_axes, in_specs=P(), out_specs=P(), check_vma=False)
    return lambda *arguments: varying(inside(*arguments), axes)


def axes_of(tree: Any) -> tuple[str, ...]:
    """The axes over which an array of the tree varies, in order; none outside a shard_map."""
    return tuple(sorted({axis for leaf in jax.tree.leaves(tree) for axis in _varies(leaf)}))


def varying(tree: Any, axes: tuple[str, ...]) -> Any:
    """The arrays, marked as varying over all of the axes."""

    def marked(x):
        missing = tuple(a for a in axes if a not in _varies(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(marked, tree)


def _varies(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
