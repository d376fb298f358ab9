"""What a parameter is, said once: initial values, sharding, optimizer, counts and files follow."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


@dataclass(frozen=True)
class Param:
    """A parameter's description; to `jax.tree` it is a leaf.

    Attributes:
      shape: of the whole parameter.
      std: standard deviation of its initial values, which are normal.
      mean: of these.
      cut: the axis along which devices share it out; None: each has all of it.
      expert: the axis of the FFN experts, which lie on the devices of the expert axis; the devices
        of one expert alone share `cut` out.
      decay: whether weight decay shrinks it.
      float32: whether it is used in float32, whatever the arithmetic of the model is in.
    """

    shape: tuple[int, ...]
    std: float = 0.0
    mean: float = 0.0
    cut: int | None = None
    expert: int | None = None
    decay: bool = True
    float32: bool = False

    def stacked(self, layers: int) -> "Param":
        """That of so many layers, on a new first axis."""
        cut, expert = (None if axis is None else axis + 1 for axis in (self.cut, self.expert))
        return replace(self, shape=(layers, *self.shape), cut=cut, expert=expert)


def path_of(key_path: tuple) -> str:
    """A pytree key path as names joined by slashes."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def init(key: Array, params: Mapping[str, Any]) -> dict[str, Any]:
    """Initial values, float32, of a tree of Param.

    They depend on the key, the parameter's path and its shape, and not on what stands beside it:
    models that share a parameter start with the same one.
    """

    def values(key_path, p: Param):
        own = jax.random.fold_in(key, zlib.crc32(path_of(key_path).encode()))
        return p.mean + p.std * jax.random.normal(own, p.shape, jnp.float32)

    return jax.tree_util.tree_map_with_path(values, dict(params))


def shapes(params: Any) -> Any:
    """The arrays of a tree of Param, with nothing allocated."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), params)


def used(params: Any, arrays: Any, dtype: Any) -> Any:
    """The arrays in the type in which a model whose arithmetic is in `dtype` uses each."""
    return jax.tree.map(lambda p, a: a.astype(jnp.float32 if p.float32 else dtype), params, arrays)
