"""What the instructions of a program took, read from a trace, and what each part of a step did."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from moepp_jax.compile import hlo, parts


class Event(NamedTuple):
    """An instruction at work on a thread; it may have begun others there.

    Attributes:
      start, length: nanoseconds.
    """

    name: str
    start: float
    length: float


def by_part(seconds: Mapping[str, float], module: hlo.Module) -> dict[str, float]:
    """Seconds of each part of a step, in the order of `parts.ALL`.

    Args:
      seconds: of each instruction, from `by_instruction`.
      module: the program that was traced.
    """
    there = {i.name: c for c in module.computations.values() for i in c.instructions}
    around = _around(module)
    found: Counter[str] = Counter()
    for name, taken in seconds.items():
        part = parts.REST
        if name in there:
            instruction = there[name].by_name[name]
            named = any(hlo.scopes(module, instruction))
            part = parts.of(module, instruction) if named else around(there[name].name)
        found[part] += taken
    return {part: found[part] for part in parts.ALL if found[part]}


def _around(module: hlo.Module) -> Callable[[str], str]:
    """The part of what has lost its name, by the computation that it is in.

    XLA on CPU names none of the products that it has rewritten: most others there tell, or else
    those around what calls it.
    """
    callers = {
        called: computation.name
        for computation in module.computations.values()
        for instruction in computation.instructions
        for names in instruction.called.values()
        for called in names
    }

    @functools.cache
    def part(name: str) -> str:
        own = [parts.of(module, i) for i in module.computations[name].instructions]
        known = Counter(part for part in own if part != parts.REST)
        if known:
            return known.most_common(1)[0][0]
        return part(callers[name]) if name in callers else parts.REST

    return part


def by_instruction(folder: Path, program: str) -> dict[str, float]:
    """Seconds of each instruction in a trace, without those that it has begun: a loop's, a call's.

    Args:
      folder: where `jax.profiler` has written.
      program: its name in HLO, such as "jit_step".

    Raises:
      ValueError: the trace has nothing of that program.
    """
    found: Counter[str] = Counter()
    for events in _threads(folder, program):
        for event, alone in exclusive(events):
            found[event.name] += alone / 1e9
    if not found:
        raise ValueError(f"no instruction of {program} is in the trace in {folder}")
    return dict(found)


def exclusive(events: Iterable[Event]) -> list[tuple[Event, float]]:
    """Each with what it took without those inside it."""
    alone: list[list] = []
    open_: list[list] = []
    for event in sorted(events, key=lambda e: (e.start, -e.length)):
        while open_ and event.start >= open_[-1][0].start + open_[-1][0].length:
            open_.pop()
        if open_:
            open_[-1][1] -= event.length
        open_.append([event, event.length])
        alone.append(open_[-1])
    return [(event, taken) for event, taken in alone]


def _threads(folder: Path, program: str) -> Iterator[list[Event]]:
    for file in sorted(folder.rglob("*.xplane.pb")):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                yield [
                    Event(said["hlo_op"], event.start_ns, event.duration_ns)
                    for event in line.events
                    if (said := dict(event.stats)).get("hlo_module") == program and "hlo_op" in said
                ]
