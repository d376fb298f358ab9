"""Parameters that are never in memory whole: written to and read from a checkpoint by pieces."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from moepp_jax.storage import AnyPath

_MOST_BYTES = 64 << 20  # of a chunk that is compressed and stored at once


class Streamed:
    """Stands for a float32 array in a tree that is saved, whose pieces are made when needed.

    Args:
      shape: of the array.
      stacked: how many leading axes are walked through, a piece for each of their indices.
      piece: makes the piece of an index.
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self,
        shape: tuple[int, ...],
        stacked: int,
        piece: Callable[[tuple[int, ...]], np.ndarray],
    ):
        self.shape = shape
        self.stacked = stacked
        self.piece = piece
        self.size = math.prod(shape)
        self.nbytes = self.size * self.dtype.itemsize

    @property
    def chunk(self) -> tuple[int, ...]:
        """A piece, or as many rows of its first axis as are not too much."""
        rows, *rest = self.shape[self.stacked :]
        most = max(1, _MOST_BYTES // (math.prod(rest) * self.dtype.itemsize))
        return (1,) * self.stacked + (min(rows, most), *rest)


class _Handler(ocp.type_handlers.NumpyHandler):
    """Orbax's for numpy arrays, but for the writing."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self._failed = False

    async def _open_and_write(self, value: Streamed, tspec: dict[str, Any], ts_context) -> None:
        # No awaits: leaves are written one after the other, and none is left waiting when another
        # fails: it would complain of its closed loop.
        if self._failed:
            return  # orbax asks for all leaves, and then raises what one of them raised
        tspec = tspec | {"metadata": tspec["metadata"] | {"chunks": list(value.chunk)}}
        try:
            spec = tensorstore.Spec(tspec)
            store = tensorstore.open(spec, create=True, context=ts_context).result()
            for index in np.ndindex(value.shape[: value.stacked]):
                store[index].write(value.piece(index)).result()
        except BaseException:
            self._failed = True
            raise


def handlers() -> Any:
    """What `Checkpoints` needs in order to save a tree of Streamed."""
    leaves = ocp.type_handlers.create_type_handler_registry(
        (Streamed, _Handler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # else orbax warns that there is none
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    trees = ocp.PyTreeCheckpointHandler(type_handler_registry=leaves)
    registry.add("params", ocp.args.PyTreeSave, trees)
    registry.add("meta", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    return registry


class Stored:
    """Parameters in a checkpoint's folder, of which pieces are read."""

    def __init__(self, folder: AnyPath):
        self._base = f"file://{folder}/"
        self._open = functools.lru_cache(self._open)

    def read(self, leaf: str, index: tuple[int, ...]) -> np.ndarray:
        """The piece of a parameter (its path joined by slashes) at an index."""
        return self._open(leaf)[index].read().result()

    def _open(self, leaf: str):
        base = {"driver": "ocdbt", "base": self._base, "path": leaf.replace("/", ".") + "/"}
        return tensorstore.open({"driver": "zarr", "kvstore": base}).result()
