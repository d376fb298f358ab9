"""The local copy that a run goes on from: which one the processes agree on, and its bytes.

A process reads its cells from its own disk. Who has lost some is sent them by one that has them,
through the devices: a host may be lost where another one has a replica of what it held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from moepp_jax import processes
from moepp_jax.cells import Cells
from moepp_jax.local_disk import Copy, Disk

Report = Callable[[str], Any]


class Sought(NamedTuple):
    """What a copy must be to be gone on from.

    Attributes:
      start: the name of the start of the run that it must be of; None: there was none with copies.
      newer_than: a step; -1 is none, here and in what follows.
      newest: the newest checkpoint that there is, be it damaged.
    """

    start: str | None
    newer_than: int
    newest: int

    def objection(self, copy: Copy, layout: Mapping[str, Any]) -> str | None:
        """Why a copy is not it."""
        note = copy.note
        if not note:
            return "is damaged: its copy.json is not as it was written"
        if self.start not in note["starts"]:
            return "is of another run, or of a past that this one has discarded"
        if note["after"] > self.newest:
            return f"came after checkpoint {note['after']}, which is gone and discards it"
        if note["layout"] != layout:
            there, here = (_described(of) for of in (note["layout"], layout))
            other = "of other arrays or devices" if there == here else there
            return f"is {other}, and this run is {here}"
        if copy.step <= self.newer_than:
            return f"is no newer than checkpoint {self.newer_than}"
        return None


class Found(NamedTuple):
    """
    Attributes:
      copies: of the step, that lie on this process's disk.
      cells: the bytes (uint8) of this process's cells.
    """

    step: int
    copies: list[Copy]
    cells: dict[int, np.ndarray]


def newest(disk: Disk, cells: Cells, sought: Sought, report: Report) -> Found | None:
    """The newest step that is whole; every process calls this, and all find the same.

    Of each step that is not used, or if there should be copies and are none, a line says why.
    """
    usable, why = _sorted_out(disk, cells, sought)
    # Steps in one line, why others are none in the next.
    mine = " ".join(str(copy.step) for copy in usable)
    told = [said.partition("\n") for said in processes.of_each(lambda: f"{mine}\n{why}")]
    steps = {int(step) for of_one, _, _ in told for step in of_one.split()}
    for step in sorted(steps, reverse=True):
        copies = [copy for copy in usable if copy.step == step]
        here, held, damage = _held(copies, cells)
        lost = set(range(cells.count)).difference(*held)
        if not lost:
            return Found(step, copies, _brought(here, held, cells, report))
        first = next(p for p, needed in enumerate(cells.of_process) if needed & lost)
        why = damage or f"no host's disk has what process {first} held"
        report(f"the local copy of step {step} is not used: {why}")
    if not steps:
        why = next((why for _, _, why in told if why), "")
        if why or sought.start:
            report(f"no local copy is used: {why or 'no host has one'}")
    return None


def _sorted_out(disk: Disk, cells: Cells, sought: Sought) -> tuple[list[Copy], str]:
    """The copies on this disk that may be gone on from, and what is wrong with the newest other."""
    objections = [(copy, sought.objection(copy, cells.layout)) for copy in disk.copies()]
    wrong = {copy.step: f"{copy.folder} {why}" for copy, why in objections if why}
    return [copy for copy, why in objections if not why], wrong[max(wrong)] if wrong else ""


def _described(layout: Mapping[str, Any]) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in layout["mesh"].items())
    count = len(set(layout["processes"]))
    return f"of mesh {mesh} in {count} process{'es' if count > 1 else ''}"


def _held(copies: list[Copy], cells: Cells) -> tuple[dict[int, Copy], list[set[int]], str]:
    """Where each whole cell lies here, which ones each process has, and the first damage found.

    Each looks at those that it needs; at others that lie here only if somebody has lost his.
    """
    here: dict[int, Copy] = {}
    damages: list[str] = []

    def look(numbers: Iterable[int]) -> list[set[int]]:
        processes.agree(lambda: _verify(copies, numbers, here, damages))
        marks = np.isin(np.arange(cells.count), list(here)).astype(np.uint8)
        return [set(np.flatnonzero(row).tolist()) for row in processes.of_all(marks)]

    held = look(cells.here)
    if len(set().union(*held)) < cells.count:
        held = look(set(range(cells.count)) - cells.here)
    if len(set().union(*held)) == cells.count:
        return here, held, ""
    told = processes.of_each(lambda: damages[0] if damages else "")
    return here, held, next(filter(None, told), "")


def _verify(
    copies: list[Copy], numbers: Iterable[int], here: dict[int, Copy], damages: list[str]
) -> None:
    """Adds where those of these cells lie that are as they were written, and what is not so."""
    for number in numbers:
        for copy in copies:
            if number in here or number not in copy.cells():
                continue
            damage = copy.damage(number)
            if damage is None:
                here[number] = copy
            else:
                damages.append(damage)


def _brought(
    here: dict[int, Copy], held: list[set[int]], cells: Cells, report: Report
) -> dict[int, np.ndarray]:
    """The bytes of this process's cells, of which all are held by somebody."""
    me = jax.process_index()
    brought = processes.agree(lambda: {n: here[n].read(n) for n in cells.here & held[me]})
    needs = [needed - has for needed, has in zip(cells.of_process, held, strict=True)]
    sources = {n: next(p for p, has in enumerate(held) if n in has) for n in set().union(*needs)}
    for process, source in sorted({(p, sources[n]) for p, of in enumerate(needs) for n in of}):
        report(f"process {process} has lost what it held, and process {source} sends it")
    for number, source in sorted(sources.items()):
        content = here[number].read(number) if me == source else None
        content = processes.from_one(content, cells.nbytes, source)
        if number in needs[me]:
            brought[number] = content
    return brought
