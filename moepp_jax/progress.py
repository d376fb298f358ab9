"""How a run is getting on: a bar on a terminal, one plain line an update elsewhere."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich import progress
from rich.console import Console, RenderableType
from rich.text import Text

# key of a training row: how it is shown
_SHOWN = {
    "loss": "loss {:.3f}",
    "tokens_per_s": "tok/s {:,.0f}",
    "ffn_experts_per_token": "FFN/token {:.2f}",
    "drop_rate": "drops {:.1%}",
    "data_wait": "data wait {:.1%}",
}


class Progress:
    """Shows the steps of a run; a context manager, which leaves the terminal as it was.

    Args:
      total_steps: the last step there is.
      start_step: the step that the run goes on from.
      description: what is going on, one word.
      console: where to; standard output if None.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        description: str = "train",
        console: Console | None = None,
    ):
        self._console = console or Console()
        self._total = total_steps
        self._pace = _Pace(start_step)
        self._bar = None
        if self._console.is_terminal:
            self._bar = _Bar(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=30),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("{task.fields[eta]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(
                description, completed=start_step, total=total_steps, eta=""
            )

    def update(self, step: int, **values: Any) -> None:
        """Step `step` is done; of a training row's values those worth a look are shown."""
        summary = "  ".join(
            form.format(float(values[key])) for key, form in _SHOWN.items() if key in values
        ).replace("%", " %")
        eta = f"ETA {self._pace.until(self._total, after=step)}"
        if self._bar:
            self._bar.summary = summary
            self._bar.update(self._task, completed=step, eta=eta)
        else:
            self.message(f"step {step:>{len(str(self._total))}}/{self._total}  {summary}  {eta}")

    def message(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()


@contextlib.contextmanager
def passing_bar(unit: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A bar on standard error if that is a terminal, else nothing; it goes when its context ends.

    Yields:
      A function of how many units were done since the last call, and of their total if that was
      not known before.
    """
    console = Console(stderr=True)
    bar = progress.Progress(
        progress.TextColumn(unit),
        progress.BarColumn(bar_width=30),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(unit, total=total)
        yield lambda done, total=total: bar.update(task, advance=done, total=total)


class _Bar(progress.Progress):
    """A bar with a line of numbers under it, as both beside each other outgrow a terminal."""

    summary = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.summary)


class _Pace:
    """Seconds a step, over the last few updates."""

    def __init__(self, start_step: int):
        self._start = (time.monotonic(), start_step)
        self._marks: deque[tuple[float, int]] = deque(maxlen=8)

    def until(self, total: int, after: int) -> str:
        """How long it takes until step `total`, it being step `after` now."""
        self._marks.append((time.monotonic(), after))
        # The time before the first update is mostly compilation: used only while there is no other.
        alone = len(self._marks) == 1
        since, first = self._start if alone else self._marks[0]
        now, last = self._marks[-1]
        left = _clock((total - after) * (now - since) / max(last - first, 1))
        return f"at most {left}" if alone and total > after else left


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
