"""What each device holds of a state, as bytes of the host, and a state made of them again.

A device's cell is its parts of all arrays, one after another. Replicas have the same cell, so a
mesh has as many as its other axes have devices. The bytes are those of the arrays: what is made of
them again is the same bit for bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh


class Cells:
    """How a state lies on a mesh.

    Args:
      abstract: its shapes, types and shardings, in any tree.

    Attributes:
      count: of all cells, which are numbered from 0.
      of_process: the cells of each process's devices.
      layout: two states have the same cells if theirs are equal; plain values, for JSON.
    """

    def __init__(self, abstract: Any, mesh: Mesh):
        self._leaves, self._tree = jax.tree.flatten(abstract)
        kinds = {(leaf.shape, leaf.sharding) for leaf in self._leaves}
        maps = [sharding.devices_indices_map(shape) for shape, sharding in kinds]
        numbers: dict[str, int] = {}
        self._of: dict[jax.Device, int] = {}
        self.of_process: list[set[int]] = [set() for _ in range(jax.process_count())]
        for device in mesh.devices.flat:
            held = str([indices[device] for indices in maps])
            self._of[device] = numbers.setdefault(held, len(numbers))
            self.of_process[device.process_index].add(self._of[device])
        self.count = len(numbers)
        self.layout = {
            "mesh": dict(mesh.shape),
            "processes": [device.process_index for device in mesh.devices.flat],
            "arrays": _digest(abstract),
        }

    @property
    def here(self) -> set[int]:
        """The cells of this process's devices."""
        return self.of_process[jax.process_index()]

    @property
    def nbytes(self) -> int:
        """Of one cell; all are of one size."""
        return sum(math.prod(shape) * leaf.dtype.itemsize for leaf, shape in self._parts())

    def copied(self, state: Any) -> dict[int, list[np.ndarray]]:
        """The bytes (uint8) of this process's cells, array by array; the state may go then."""
        shards = [
            {self._of[shard.device]: shard.data for shard in leaf.addressable_shards}
            for leaf in jax.tree.leaves(state)
        ]
        for of_leaf in shards:
            for part in of_leaf.values():
                part.copy_to_host_async()
        # On CPU these are views of the devices' memory, which JAX gives to no step while they last.
        return {cell: [_bytes(of_leaf[cell]) for of_leaf in shards] for cell in self.here}

    def placed(self, cells: Mapping[int, np.ndarray]) -> Any:
        """The state of which these are this process's cells, `nbytes` of uint8 each."""
        mine = [(d, c) for d, c in self._of.items() if d.process_index == jax.process_index()]
        arrays, start = [], 0
        for leaf, shape in self._parts():
            end = start + math.prod(shape) * leaf.dtype.itemsize
            # A copy each: replicas on one host would share memory that a step gives away.
            parts = [
                jax.device_put(
                    cells[cell][start:end].view(leaf.dtype).reshape(shape), device, may_alias=False
                )
                for device, cell in mine
            ]
            whole = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
            arrays.append(whole)
            start = end
        return jax.tree.unflatten(self._tree, arrays)

    def _parts(self) -> list[tuple[jax.ShapeDtypeStruct, tuple[int, ...]]]:
        """Each array with the shape of a device's part."""
        return [(leaf, leaf.sharding.shard_shape(leaf.shape)) for leaf in self._leaves]


def _bytes(part: jax.Array) -> np.ndarray:
    """A device's array in the host's memory."""
    return np.asarray(part).reshape(-1).view(np.uint8)


def _digest(abstract: Any) -> str:
    """Of the names, shapes and types of all arrays."""
    named = [
        f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    ]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()
