"""How long a scheduled program takes: its instructions one after the other, links beside them.

What is asynchronous runs beside the instructions that are scheduled until something waits for it,
and costs what is then left of it. The links along a dimension of the torus serve one collective at
a time, and the engine that copies to and from the chip's own memory one copy.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from moepp_jax.chips import Chip
from moepp_jax.compile import hlo, needs, parts
from moepp_jax.compile.needs import HBM, LINKS, Needs
from moepp_jax.compile.roofline import Interconnect

_CONTROL = {"while": ("body", "condition"), "call": ("to_apply",)}
_CONTROL["conditional"] = ("branch_computations", "true_computation", "false_computation")


class Spent(NamedTuple):
    """What one execution of an instruction adds to the time of its computation.

    Attributes:
      engines: what it keeps from others meanwhile, if others can run beside it.
    """

    part: str
    needs: Needs
    engines: tuple[str, ...] = ()

    def taking(self, seconds: float) -> Spent:
        return self._replace(needs=dataclasses.replace(self.needs, seconds=seconds))


_NOTHING = Spent(parts.REST, needs.NOTHING)


@dataclass(frozen=True, eq=False)
class Timeline:
    """A program on a chip that `rates` knows.

    Attributes:
      links: how fast they are, as a share of their peak.
    """

    module: hlo.Module
    chip: Chip
    network: Interconnect
    links: float = 1.0

    def spent(self) -> Iterator[tuple[Spent, int]]:
        """All that a run of the program spends, and how often."""
        for name, times in hlo.executions(self.module).items():
            if name in self._walked:
                for spent in self._walked[name][1]:
                    yield spent, times

    def exchange(self) -> float:
        """Seconds that the links are busy exchanging tokens, hidden or not."""
        exchanges = (
            c for c in self._collectives.values() if parts.of_collective(c) == parts.EXCHANGE
        )
        return sum((c.times * self._on_links(c).seconds for c in exchanges), 0.0)

    def unknown(self) -> dict[str, int]:
        """Kernels that are not known, and how often they run."""
        found: Counter[str] = Counter()
        for spent, times in self.spent():
            if spent.needs.kernel:
                found[spent.needs.kernel] += times
        return dict(found)

    @cached_property
    def _collectives(self) -> dict[tuple[str, str], hlo.Collective]:
        return {(c.computation, c.name): c for c in hlo.collectives(self.module)}

    @cached_property
    def _walked(self) -> dict[str, tuple[float, list[Spent]]]:
        """Of every computation that is scheduled: its seconds, and what spends them."""
        walked: dict[str, tuple[float, list[Spent]]] = {}

        def seconds(name: str) -> float:
            if name not in walked:
                walked[name] = self._walk(self.module.computations[name], seconds)
            return walked[name][0]

        seconds(self.module.entry)
        return walked

    def _walk(
        self, computation: hlo.Computation, seconds_of: Callable[[str], float]
    ) -> tuple[float, list[Spent]]:
        awaited = hlo.awaited(self.module, computation)
        started = {start.name for start in awaited.values()}
        clock, spent = 0.0, []
        held: dict[str, tuple[float, Spent]] = {}  # by engine: until when, and by what
        ends: dict[str, tuple[float, Spent]] = {}
        for i in computation.instructions:
            if i.opcode in _CONTROL:
                called = (name for how in _CONTROL[i.opcode] for name in i.called.get(how, ()))
                rounds = hlo.rounds(self.module, computation, i)
                clock += rounds * sum(map(seconds_of, called))
                continue
            beside = i.name in started
            if i.name in awaited:
                waits, own = [ends.pop(awaited[i.name].name, (clock, _NOTHING))], _NOTHING
            else:
                own = self._alone(computation, i, beside)
                waits = [held[engine] for engine in own.engines if engine in held]
            begin, by = max([(clock, _NOTHING), *waits], key=lambda wait: wait[0])
            end = begin + own.needs.seconds
            held |= dict.fromkeys(own.engines, (end, own))
            if beside:
                ends[i.name] = end, own
            else:
                spent += [by.taking(begin - clock), own]
                clock = end
        return clock, [s for s in spent if s.needs.seconds]

    def _alone(
        self, computation: hlo.Computation, instruction: hlo.Instruction, beside: bool
    ) -> Spent:
        """What an instruction needs if nothing is in its way.

        Args:
          beside: it runs beside others.
        """
        if collective := self._collective(computation, instruction):
            part = parts.of_collective(collective)
            return Spent(part, self._on_links(collective), self._engines(collective))
        of = needs.moving if beside else needs.of
        need = of(self.module, computation, instruction, self.chip)
        return Spent(parts.of(self.module, instruction), need, (HBM,) if beside else ())

    def _collective(
        self, computation: hlo.Computation, instruction: hlo.Instruction
    ) -> hlo.Collective | None:
        """The collective that an instruction is, or that it wraps."""
        places = [(computation.name, instruction.name)]
        for name in self.module.wrapped_in(instruction):
            places += [(name, i.name) for i in self.module.computations[name].instructions]
        return next((self._collectives[at] for at in places if at in self._collectives), None)

    def _on_links(self, collective: hlo.Collective) -> Needs:
        """Seconds of one execution; among devices that are one, none."""
        if collective.group_size == 1:
            return Needs(0.0, LINKS)
        load, slow = self.network.seconds(collective)
        seconds = max(float(load.max()), slow) / collective.times / self.links
        return Needs(seconds, LINKS)

    def _engines(self, collective: hlo.Collective) -> tuple[str, ...]:
        load, slow = self.network.seconds(collective)
        dimensions = tuple(f"links {d}" for d in np.flatnonzero(load))
        return (*dimensions, "network") if slow else dimensions
