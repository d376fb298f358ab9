"""What a trial of a fault is, what came of it, and the table of all."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from moepp_jax.storage import write_atomic


class Lost(Exception):  # noqa: N818 (what a run is that did not survive)
    """Something that must hold does not; the message says what."""


class Missed(Exception):  # noqa: N818 (nothing went wrong)
    """Nothing was broken: the run had ended before, or this machine cannot break it so."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One try at breaking a run.

    Attributes:
      fault: of which there are many trials; a row of the table.
      case: tells it from the fault's others.
      survive: breaks a run in an empty folder, and raises Lost if it does not survive.
    """

    fault: str
    case: str
    survive: Callable[[Path], None]

    @property
    def name(self) -> str:
        return f"{self.fault}: {self.case}"

    def result(self, folder: Path) -> Result:
        """What comes of it, in a folder for it alone; everything unforeseen is lost too."""
        folder.mkdir(parents=True)
        began = time.monotonic()
        try:
            self.survive(folder)
            verdict, why = "survived", ""
        except Missed as missed:
            verdict, why = "missed", str(missed)
        except Exception as error:
            verdict, why = "lost", f"{'' if isinstance(error, Lost) else repr(error)[:80]} {error}"
        seconds = round(time.monotonic() - began, 1)
        return Result(self.fault, self.case, verdict, why.strip(), seconds)


@dataclasses.dataclass(frozen=True)
class Result:
    """
    Attributes:
      verdict: survived, lost, or missed, which counts as not tried.
      why: it was lost or missed.
    """

    fault: str
    case: str
    verdict: str
    why: str
    seconds: float


def dice(seed: int, *names: object) -> random.Random:
    """Chance that is the same for the same trial of the same seed."""
    return random.Random("/".join(map(str, (seed, *names))))


def table(results: Iterable[Result]) -> str:
    """Fault, tried, survived, lost; in Markdown, and aligned for a terminal."""
    counts: dict[str, list[int]] = {}
    for result in results:
        row = counts.setdefault(result.fault, [0, 0, 0])
        if result.verdict != "missed":
            row[0] += 1
            row[1 if result.verdict == "survived" else 2] += 1
    counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)] or [0, 0, 0]
    rows = [["fault", "tried", "survived", "lost"]]
    rows += [[fault, *map(str, row)] for fault, row in counts.items()]
    width = max(len(row[0]) for row in rows)
    lines = [f"| {row[0]:<{width}} |" + "".join(f" {n:>8} |" for n in row[1:]) for row in rows]
    return "\n".join([lines[0], f"|{'-' * (width + 2)}|" + "---------:|" * 3, *lines[1:]])


def put_table(page: Path, results: Iterable[Result]) -> None:
    """Puts the table in the place of the page's own."""
    lines = page.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first:])
    lines[first : first + len([*rows])] = table(results).splitlines()
    page.write_text("\n".join(lines) + "\n")


def merged(earlier: Iterable[Result], results: Iterable[Result]) -> list[Result]:
    """These results, and earlier ones of other trials."""
    all_of = {(result.fault, result.case): result for result in [*earlier, *results]}
    faults = list(dict.fromkeys(fault for fault, _ in all_of))
    return sorted(all_of.values(), key=lambda result: faults.index(result.fault))


def write(file: Path, results: Iterable[Result]) -> None:
    """As JSON, each result on a line of its own."""
    lines = ",\n".join(json.dumps(dataclasses.asdict(result)) for result in results)
    write_atomic(file, f"[\n{lines}\n]\n")


def read(file: Path) -> list[Result]:
    """What `write` has written."""
    return [Result(**fields) for fields in json.loads(file.read_text())]
