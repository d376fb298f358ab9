"""Ending a run politely: the first SIGINT or SIGTERM asks, the second one insists."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopRequest:
    """A context in which a signal sets `name` instead of ending the process.

    Attributes:
      name: of the signal that asked to stop, None so far.
    """

    def __init__(self):
        self.name: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        # Python delivers signals to the main thread alone.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
