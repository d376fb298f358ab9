"""Rows of finished runs, results/SCALE/runs.csv: all that reports are made of.

Losses are written to the last digit, so that a run made again can be held to its row.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from moepp_jax.claim import waiting_for
from moepp_jax.errors import ConfigError
from moepp_jax.storage import write_atomic

_COMMITTED = Path(__file__).resolve().parent / "results"
RESULTS = _COMMITTED if _COMMITTED.is_dir() else Path("experiments", "results")  # if installed
DONE, DIVERGED = "done", "diverged"
# What a run that diverged does not have.
_MEASURED_AT_THE_END = ("eval_loss", "bits_per_byte", "ffn_experts", "experts")


@dataclasses.dataclass(frozen=True)
class Row:
    """What is kept of a run.

    Attributes:
      changes: to the recipe of its scale.
      status: DONE or DIVERGED; a run that diverged has no losses.
      eval_loss: on all held-out text, sources weighed as in training, in nats a token.
      held_out: "NAME=nats" of each source.
      ffn_experts: FFN experts a token on held-out text; `experts` are of all kinds.
      training_ffn_experts: the same in training, the mean of all logged steps.
      nominal_flops: of training, forward and backward, with the FFN experts that the rule has at
        balance; realised_flops with those that it had.
      drop_rate: in the last fifth of training; `worst_eighth` that of the eighth of a sequence
        that has the highest.
      step_seconds: the median of training.
      seconds: of the whole run, with compilation and evaluation.
    """

    fingerprint: str
    seed: int
    changes: str
    status: str
    eval_loss: float | None
    bits_per_byte: float | None
    held_out: str
    tokens: int
    nominal_flops: float
    realised_flops: float
    ffn_experts: float | None
    experts: float | None
    training_ffn_experts: float
    drop_rate: float
    worst_eighth: float
    step_seconds: float
    seconds: float
    machine: str

    @property
    def key(self) -> tuple[str, int]:
        """Of `runs.Run`."""
        return self.fingerprint, self.seed

    @property
    def done(self) -> bool:
        return self.status == DONE

    @property
    def by_source(self) -> dict[str, float]:
        """Source -> held-out loss."""
        pairs = (pair.rpartition("=") for pair in self.held_out.split())
        return {name: float(loss) for name, _, loss in pairs}


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
_KINDS = {field.name: field.type for field in dataclasses.fields(Row)}


def file_of(scale: str, results: Path = RESULTS) -> Path:
    return results / scale / "runs.csv"


def read(file: Path) -> list[Row]:
    """The rows of a file, none if there is none.

    Raises:
      ConfigError: a line is no row, or of a run that another line is of; it names the line.
    """
    if not file.is_file():
        return []
    text = io.StringIO(file.read_bytes().decode(errors="replace"), newline="")
    lines = csv.reader(text, strict=True)
    rows: dict[tuple[str, int], Row] = {}
    try:
        if (header := next(lines, [])) != list(COLUMNS):
            raise ValueError(f"the columns are {','.join(header)!r}, not {','.join(COLUMNS)!r}")
        for cells in lines:
            row = _row(cells)
            if row.key in rows:
                raise ValueError("another line is of the same run")
            rows[row.key] = row
    except (ValueError, csv.Error) as error:
        raise ConfigError(
            f"{file}, line {max(lines.line_num, 1)}: {error}; mend that line or take it away"
        ) from error
    return list(rows.values())


def write(file: Path, rows: Iterable[Row]) -> None:
    """In an order that does not hang on who came first; the file is replaced whole."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in sorted(rows, key=lambda row: (row.changes, *row.key)):
        writer.writerow(map(_cell, dataclasses.astuple(row)))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, text.getvalue())


def add(file: Path, row: Row, lock: Path) -> None:
    """One row more, or in the place of that of the same run.

    Args:
      lock: a file that all who add rows share.
    """
    with waiting_for(lock):
        write(file, [*(other for other in read(file) if other.key != row.key), row])


def _row(cells: Sequence[str]) -> Row:
    """A row of its cells; a ValueError says what is wrong with them."""
    if len(cells) != len(COLUMNS):
        raise ValueError(f"there are {len(cells)} cells for {len(COLUMNS)} columns")
    values = dict(zip(COLUMNS, cells, strict=True))
    row = Row(**{name: _value(name, cell) for name, cell in values.items()})
    if row.status not in (DONE, DIVERGED):
        raise ValueError(f"status = {row.status!r} must be {DONE} or {DIVERGED}")
    for name in _MEASURED_AT_THE_END:
        if row.done == (getattr(row, name) is None):
            raise ValueError(f"{name} = {values[name]!r} of a run that is {row.status}")
    try:
        row.by_source  # noqa: B018 (numbers?)
    except ValueError:
        raise ValueError(f"held_out = {row.held_out!r} is not NAME=nats of each source") from None
    return row


def _value(name: str, cell: str) -> str | int | float | None:
    kind = _KINDS[name]
    if kind == "str":
        return cell
    if not cell and "None" in kind:
        return None
    try:
        value = int(cell) if kind == "int" else float(cell)
    except ValueError:
        raise ValueError(f"{name} = {cell!r} is no {kind.split(' ')[0]}") from None
    if not math.isfinite(value):
        raise ValueError(f"{name} = {cell!r} must be finite")
    return value


def _cell(value: str | int | float | None) -> str:
    return "" if value is None else str(value)
