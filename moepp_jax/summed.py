"""Orbax's handler of arrays, which sums up what its process has written before all go on."""

from collections.abc import Callable, Sequence
from typing import Any

import orbax.checkpoint as ocp


def handlers(items: Sequence[str], sum_up: Callable[[str], None]) -> Any:
    """Orbax's registry for these items of arrays, and `meta`.

    Args:
      sum_up: called with an item's name in each process, in the thread that saves, when all that
        the process writes of the item is written.
    """
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in items:
        handler = _Summed(item, sum_up)
        for args in (ocp.args.StandardSave, ocp.args.StandardRestore):
            registry.add(item, args, handler)
    of_meta = ocp.JsonCheckpointHandler()
    for args in (ocp.args.JsonSave, ocp.args.JsonRestore):
        registry.add("meta", args, of_meta)
    return registry


class _Summed(ocp.StandardCheckpointHandler):
    def __init__(self, item: str, sum_up: Callable[[str], None]):
        super().__init__()
        self._item, self._sum_up = item, sum_up

    async def async_save(self, *args: Any, **named: Any) -> list[ocp.future.Future]:
        written = await super().async_save(*args, **named) or []
        summed = ocp.future.ChainedFuture(written, cb=lambda: self._sum_up(self._item))
        return [summed]
