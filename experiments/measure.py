"""What experiments measure beside training: of a run's checkpoint, or of the machine.

Rows are in results/SCALE/NAME/measured.csv. Like runs they are made once: one that is there is
kept. The keys of those without a run have a number that is raised with what they depend on.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from moepp_jax.claim import waiting_for
from moepp_jax.errors import ConfigError
from moepp_jax.experiments.runs import NUMERICS, Run
from moepp_jax.storage import write_atomic

_OWN = ("name", "fingerprint", "seed", "machine")
NO_RUN = f"numerics-{NUMERICS}"  # the fingerprint of what no run is measured for

# Of the layer's speed: one more where a commit makes it faster or slower, on any device, by more
# than a twentieth. Times of another number are measured again.
TIMING = 2
TIMED = f"timing-{TIMING}"


class Measured(NamedTuple):
    """A row.

    Attributes:
      name: of what was measured.
      fingerprint, seed: of the run that it was measured of; if of none, NO_RUN or TIMED, and a
        repetition's number.
    """

    name: str
    fingerprint: str
    seed: int
    machine: str
    values: Mapping[str, float]

    @property
    def key(self) -> tuple[str, str, int]:
        return self.name, self.fingerprint, self.seed


class Measurement(NamedTuple):
    """What is to be measured.

    Attributes:
      name: of its row; of one run no two have the same.
      run: whose checkpoint it needs, None for none.
      take: the run's folder (None for none) -> name of a column -> value.
      without: the fingerprint of one that needs no run.
      repetition: its number, where one without a run is measured several times.
    """

    name: str
    run: Run | None
    take: Callable[[Path | None], Mapping[str, float]]
    without: str = NO_RUN
    repetition: int = 0

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.name, *(self.run.key if self.run else (self.without, self.repetition)))


def file_of(scale: str, study: str, results: Path) -> Path:
    return results / scale / study / "measured.csv"


def read(file: Path) -> list[Measured]:
    """The rows of a file, none if there is none.

    Raises:
      ConfigError: a line is no row; it names the line.
    """
    if not file.is_file():
        return []
    text = io.StringIO(file.read_bytes().decode(errors="replace"), newline="")
    lines, rows = csv.reader(text, strict=True), []
    try:
        header = next(lines, [])
        if tuple(header[: len(_OWN)]) != _OWN:
            raise ValueError(f"the first columns are {','.join(header)!r}, not {','.join(_OWN)!r}")
        for cells in lines:
            if len(cells) != len(header):
                raise ValueError(f"there are {len(cells)} cells for {len(header)} columns")
            name, fingerprint, seed, machine, *rest = cells
            pairs = zip(header[len(_OWN) :], rest, strict=True)
            values = {column: float(cell) for column, cell in pairs if cell}
            if not all(map(math.isfinite, values.values())):
                raise ValueError(f"{values} must be finite")
            rows.append(Measured(name, fingerprint, int(seed), machine, values))
            if sum(row.key == rows[-1].key for row in rows) > 1:
                raise ValueError("another line is of the same measurement")
    except (ValueError, csv.Error) as error:
        raise ConfigError(
            f"{file}, line {max(lines.line_num, 1)}: {error}; mend that line or take it away"
        ) from error
    return rows


def write(file: Path, rows: Iterable[Measured]) -> None:
    """The file is replaced whole; its order does not hang on who came first."""
    rows = sorted(rows, key=lambda row: row.key)
    columns = list(dict.fromkeys(column for row in rows for column in row.values))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_OWN, *columns])
    for row in rows:
        writer.writerow([*row[: len(_OWN)], *(row.values.get(column, "") for column in columns)])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, text.getvalue())


def missing(wanted: Sequence[Measurement], rows: Sequence[Measured]) -> list[Measurement]:
    there = {row.key for row in rows}
    return [one for one in wanted if one.key not in there]


def take_missing(
    wanted: Sequence[Measurement],
    file: Path,
    trained: Callable[[Run], Path],
    lock: Path,
    machine: str,
    report: Callable[[str], None] = print,
) -> None:
    """Measures what has no row yet, and adds each one's row.

    Args:
      trained: the folder of a run that is trained to its end.
      lock: a file that all who add rows share.
    """
    for one in missing(wanted, read(file)):
        values = dict(one.take(trained(one.run) if one.run else None))
        row = Measured(*one.key, machine, values)
        with waiting_for(lock):
            write(file, [*(other for other in read(file) if other.key != row.key), row])
        said = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        report(f"{one.name}, seed {row.seed}: {said}")
