"""An XProf trace of a few steps of a run, for TensorBoard's profiler or Perfetto."""

from __future__ import annotations

import os
import re
from typing import Any

import jax

from moepp_jax import processes
from moepp_jax.errors import ConfigError
from moepp_jax.storage import Staging


def parse(text: str) -> range:
    """The steps of START:STOP, STOP excluded.

    Raises:
      ConfigError: it is not two whole numbers, the first the smaller one.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ConfigError(
            f"--profile={text} must be START:STOP, whole numbers with START < STOP: 10:13 traces "
            "three steps, after the first ten that this command takes"
        )
    return range(int(match[1]), int(match[2]))


class Profile:
    """Traces steps, counted from 0 where this command goes on, into WORKDIR/profile.

    The first process traces itself; the others do the same on their devices.

    Args:
      steps: None traces nothing.
      left: steps that there are.

    Raises:
      ConfigError: the run ends before these steps do.
    """

    def __init__(self, workdir: str | os.PathLike, steps: range | None, left: int):
        if steps is not None and steps.stop > left:
            raise ConfigError(
                f"--profile={steps.start}:{steps.stop}: only {left} steps of the run are left"
            )
        self._steps = steps if steps is not None and processes.is_first() else range(0)
        self._workdir = workdir
        self._staging: Staging | None = None
        self._count = 0

    def before_step(self) -> None:
        if self._count in self._steps and self._staging is None:
            self._staging = Staging(self._workdir)
            # Of the host what JAX does, not every call in Python: to trace those the profiler looks
            # into all threads, and was seen to crash (signal 11) while some read batches.
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            jax.profiler.start_trace(self._staging.folder / "profile", profiler_options=options)

    def after_step(self, state: Any) -> None:
        """
        Args:
          state: what the step gave, waited for when it was the last one of the trace.
        """
        self._count += 1
        if self._staging is not None and self._count == self._steps.stop:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._staging.close()
        self._staging = None

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *error: object) -> None:
        if self._staging is not None:
            self._stop()
