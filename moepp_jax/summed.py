"""Orbax's handler of arrays, which sums up what its process has written before all go on.

A process that cannot write tells it aside, and goes on as if it could: it would leave the others
waiting for it, ten minutes long. That the step is not complete is seen when it is to be committed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import orbax.checkpoint as ocp


def handlers(
    items: Sequence[str], sum_up: Callable[[str], None], failed: Callable[[Exception], None]
) -> Any:
    """Orbax's registry for these items of arrays, and `meta`.

    Args:
      sum_up: called with an item's name in each process, in the thread that saves, when all that
        the process writes of the item is written.
      failed: called there with what kept it from being written or summed up.
    """
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in items:
        handler = _Summed(item, sum_up, failed)
        for args in (ocp.args.StandardSave, ocp.args.StandardRestore):
            registry.add(item, args, handler)
    of_meta = ocp.JsonCheckpointHandler()
    for args in (ocp.args.JsonSave, ocp.args.JsonRestore):
        registry.add("meta", args, of_meta)
    return registry


class _Summed(ocp.StandardCheckpointHandler):
    def __init__(
        self, item: str, sum_up: Callable[[str], None], failed: Callable[[Exception], None]
    ):
        super().__init__()
        self._item, self._sum_up, self._failed = item, sum_up, failed

    async def async_save(self, *args: Any, **named: Any) -> list[ocp.future.Future]:
        written = await super().async_save(*args, **named) or []
        summed = ocp.future.ChainedFuture(written, cb=lambda: self._sum_up(self._item))
        return [_Told(summed, self._failed)]

    def finalize(self, directory: Any) -> None:
        try:
            super().finalize(directory)
        except Exception as error:  # of what a process has not written, too
            self._failed(error)


class _Told(ocp.future.Future):
    """A future whose error is told aside."""

    def __init__(self, future: ocp.future.ChainedFuture, failed: Callable[[Exception], None]):
        self._future, self._failed = future, failed

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._future.result(timeout)
        except Exception as error:  # orbax and TensorStore raise bare ones
            self._failed(error)


def barrier() -> Callable[..., None]:
    """Where the processes of a save wait for each other.

    For the commit by the first one they do not wait alone: where it failed they would for ten
    minutes. They meet once more after it, whatever came of it.
    """
    wait = ocp.multihost.get_barrier_sync_fn()

    def meet(*, key: str, timeout_ms: int) -> None:
        if "async_commit_complete" not in key:
            wait(key=key, timeout_ms=timeout_ms)

    return meet
