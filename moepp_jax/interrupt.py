"""Ending a run politely: the first SIGINT or SIGTERM asks, the second one insists."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """A run that a signal ended before its last step, after saving it.

    Attributes:
      status: what the process should exit with, 128 + the signal's number as of a process that the
        signal killed (143 for SIGTERM): a scheduler sees that the work is not done.
    """

    def __init__(self, number: signal.Signals, step: int):
        self.status = 128 + number
        super().__init__(
            f"{number.name}: stopped and saved at step {step}; the same command goes on from there"
        )


class StopRequest:
    """A context in which a signal is noted instead of ending the process.

    Among several processes JAX's runtime catches SIGTERM, tells the others and names a step that
    all can reach, so that one signal to one process stops the run; a SIGINT is passed on as such.

    Attributes:
      signal: that asked to stop, None so far.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._several = jax.distributed.is_initialized()
        self._before: dict[int, object] = {}
        self._told = -1

    def __enter__(self) -> StopRequest:
        # Python delivers signals to the main thread alone.
        if threading.current_thread() is threading.main_thread():
            self._told = signal.set_wakeup_fd(-1)  # no thread of `ending` hears of these
            for number in [signal.SIGINT] + [signal.SIGTERM] * (not self._several):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def after(self, step: int) -> bool:
        """Whether to stop after this step, alike in all processes; to be asked after each."""
        if not self._several:
            return self.signal is not None
        reached = multihost_utils.reached_preemption_sync_point(step)
        if reached and self.signal is None:
            self.signal = signal.SIGTERM
        return reached

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()
        said = f"{self.signal.name}: stops after this step and saves; a second one stops at once"
        os.write(2, f"\n{said}\n".encode())  # print may be what was interrupted
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
