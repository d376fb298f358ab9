"""How a sweep is getting on: a table on a terminal that keeps up to date, else a line a run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moepp_jax.experiments.results import Row
from moepp_jax.experiments.runs import Run

_SHOWN = 8  # finished runs, and those to come, in the table


def seconds_of(run: Run, rows: Sequence[Row]) -> float | None:
    """How long a run takes, by what was measured of others; None if nothing was."""
    own = [row.seconds for row in rows if row.fingerprint == run.key[0] and row.done]
    if own:
        return sum(own) / len(own)
    rows = [row for row in rows if row.nominal_flops]  # one may have diverged before its first log
    if not rows:
        return None
    # Of the others those count that are nearest in work: what a step costs beside it stays alike.
    nominal = run.nominal_flops
    near = min(rows, key=lambda row: abs(row.nominal_flops - nominal))
    return near.seconds * max(nominal / near.nominal_flops, 0.2)


def clock(seconds: float | None) -> str:
    """As 1 h 05 min; "?" if it is not known."""
    if seconds is None:
        return "?"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


class Board:
    """Shows a sweep; a context manager, which leaves the terminal as it was."""

    def __init__(
        self,
        runs: Sequence[Run],
        rows: Sequence[Row],
        console: Console | None = None,
    ):
        self._console = console or Console()
        self._runs = {run.key: run for run in runs}
        self._rows = {row.key: row for row in rows}
        self._running: tuple[Run, int, float] | None = None
        self._others: set[tuple[str, int]] = set()
        # Seconds of the runs that ended here, and those that their estimates gave: rows may be of
        # slower machines, or of busier ones.
        self._took = self._expected = 0.0
        self._live = None
        left = self._left()
        self._say(
            f"{len(self._runs) - len(left)} of {len(self._runs)} runs are done; the other "
            f"{len(left)} take about {clock(self._estimate())}"
            if left
            else f"all {len(self._runs)} runs are done"
        )

    def started(self, run: Run) -> None:
        self._running = run, 0, time.monotonic()
        self._draw()

    def at(self, run: Run, step: int) -> None:
        """So many steps of the run are done."""
        self._running = run, step, self._running[2]
        self._draw()

    def taken(self, runs: Iterable[Run]) -> None:
        """These are at work in other processes."""
        self._others = {run.key for run in runs}

    def ended(self, run: Run, rows: Sequence[Row]) -> None:
        """The run is over; these are all rows now, others' too."""
        self._running = None
        expected = seconds_of(run, list(self._rows.values()))
        self._rows = {row.key: row for row in rows}
        row = self._rows.get(run.key)
        if row is not None:
            self._took += row.seconds
            self._expected += row.seconds if expected is None else expected
            loss = f"held-out loss {row.eval_loss:.4f}" if row.done else row.status
            left = len(self._left())
            self._say(
                f"{len(self._runs) - left} of {len(self._runs)}: {run.name}, seed "
                f"{row.seed}: {loss}, {row.seconds:.0f} s; left {clock(self._estimate())}"
            )
        self._draw()

    def __enter__(self) -> Board:
        if self._console.is_terminal:
            self._live = Live(self._table(), console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def _say(self, line: str) -> None:
        console = self._live.console if self._live else self._console
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _draw(self) -> None:
        if self._live:
            self._live.update(self._table(), refresh=True)

    def _left(self) -> list[Run]:
        return [run for key, run in self._runs.items() if key not in self._rows]

    def _estimate(self) -> float | None:
        """Seconds for what is left, of which what runs has begun."""
        rows = list(self._rows.values())
        each = [seconds_of(run, rows) for run in self._left()]
        if None in each:
            return None
        begun = time.monotonic() - self._running[2] if self._running else 0.0
        pace = self._took / self._expected if self._expected else 1.0
        return max(pace * sum(each) - begun, 0.0)

    def _table(self) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("run", "seed", "", "held-out loss", "time"):
            table.add_column(column, overflow="fold")
        done = [row for key, row in self._rows.items() if key in self._runs]
        for row in done[-_SHOWN:]:
            loss = f"{row.eval_loss:.4f}" if row.done else "-"
            name, taken = self._runs[row.key].name, f"{row.seconds:.0f} s"
            table.add_row(name, str(row.seed), row.status, loss, taken, style="dim")
        if self._running:
            run, step, since = self._running
            bar = ProgressBar(total=run.config.train.steps, completed=step, width=20)
            taken = f"{time.monotonic() - since:.0f} s"
            steps = f"{step}/{run.config.train.steps}"
            table.add_row(run.name, str(run.config.seed), bar, steps, taken)
        waiting = [r for r in self._left() if not (self._running and r == self._running[0])]
        for run in waiting[:3]:
            how = "another process" if run.key in self._others else "to come"
            table.add_row(run.name, str(run.config.seed), how, "", "", style="dim")
        left = len(self._left())
        line = f"{len(self._runs) - left} of {len(self._runs)} done, ETA {clock(self._estimate())}"
        return Group(table, Text(line))
