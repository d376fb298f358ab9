"""What it means for a run that a checkpoint cannot be written: its end, or a warning each time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moepp_jax import processes
from moepp_jax.checkpoint import Checkpoints, SaveError
from moepp_jax.storage import UnwritableError


class Saver:
    """Saves the states of a run; every process of the run makes each call.

    What nothing comes after must be written: then errors are raised, whatever `on_error` is.

    Args:
      on_error: `config.train.on_save_error`. With "stop" an error is raised. With "continue" the
        first one of all processes is reported, the step is not saved, and the next one is tried.
    """

    def __init__(self, checkpoints: Checkpoints, on_error: str, report: Callable[[str], Any]):
        self._checkpoints, self._report = checkpoints, report
        self._goes_on = on_error == "continue"
        self._failed = 0  # saves in a row
        self._begun = False  # the save before, which may have failed since

    def keeps(self, rows: Callable[[], None], last: bool) -> bool:
        """Whether the rows of metrics are safe, which no checkpoint may outlive.

        Args:
          rows: makes them so.

        Raises:
          UnwritableError: they are not, and the run stops for that.
        """
        if self._goes_on and not last:
            return self._succeeds(rows)
        rows()
        return True

    def save(self, step: int, state: Any, metrics: Mapping[str, Any], last: bool) -> None:
        """Starts to save a step when the one before is written; of the last step waits for it.

        Raises:
          SaveError: one of the two cannot be, and the run stops for that.
        """
        if self._goes_on and self._succeeds(self._checkpoints.wait) and self._begun:
            self._failed = 0
        if self._goes_on and not last:
            self._begun = self._succeeds(lambda: self._checkpoints.save(step, state, metrics))
            return
        self._checkpoints.save(step, state, metrics)
        if last:
            self._checkpoints.wait()

    def _succeeds(self, work: Callable[[], None]) -> bool:
        """In all processes. If not, that is reported."""
        said = ""
        try:
            work()
        except UnwritableError as error:
            said = error.told
        except SaveError as error:
            said = str(error)
        errors = [heard for heard in processes.of_each(lambda: said) if heard]
        if errors:
            self._failed += 1
            often = f"; {self._failed} saves in a row have failed" if self._failed > 1 else ""
            # Where only another process has failed, the first one knows that something is missing.
            self._report(f"warning: {errors[-1]}; the run goes on{often}")
            self._checkpoints.look_again()
        return not errors
