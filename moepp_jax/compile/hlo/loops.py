"""How often each computation runs: calls followed, loops multiplied by their trip counts."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from moepp_jax.compile.hlo import grouped
from moepp_jax.compile.hlo.text import Computation, Instruction, Module

_SAME = {"copy", "bitcast", "convert", "copy-done", "reshape", "optimization-barrier"}
_REDUCERS = {"call"}  # of those with to_apply, the one that calls it once


class UnknownTripCountError(ValueError):
    """How often a loop runs is not in the text, or depends on data."""


def executions(module: Module) -> dict[str, int]:
    """For each computation how often it runs in one run of the program.

    A branch of a conditional counts as taken, and a loop of unknown length (`unknown_loops`) as one
    round. Functions of reductions, which run for every element, are left out, as are computations
    that nothing calls.
    """
    callers: dict[str, list[tuple[str, Instruction]]] = {}
    for computation in module.computations.values():
        for instruction in computation.instructions:
            for name in _called(instruction):
                callers.setdefault(name, []).append((computation.name, instruction))

    @cache
    def times(name: str) -> int:
        if name == module.entry:
            return 1
        total = 0
        for caller, instruction in callers.get(name, ()):
            if outside := times(caller):
                total += outside * rounds(module, module.computations[caller], instruction)
        return total

    return {name: n for name in module.computations if (n := times(name))}


def rounds(module: Module, caller: Computation, instruction: Instruction) -> int:
    """How often what an instruction calls runs each time: of a loop of unknown length, once."""
    known = _known_rounds(module, caller, instruction)
    return 1 if known is None else known


def unknown_loops(module: Module) -> list[str]:
    """The loops whose length the text does not tell, or that depends on data."""
    found = []
    for name in executions(module):
        computation = module.computations[name]
        for instruction in computation.instructions:
            if _known_rounds(module, computation, instruction) is None:
                found.append(instruction.name)
    return found


def _known_rounds(module: Module, caller: Computation, instruction: Instruction) -> int | None:
    """None of a loop whose length neither the text tells nor the load of the experts."""
    if instruction.opcode != "while":
        return 1
    try:
        return trip_count(module, caller, instruction)
    except UnknownTripCountError:
        return grouped.blocks(module, instruction)


def _called(instruction: Instruction) -> list[str]:
    if instruction.opcode.endswith(("-done", "-update")):
        return []
    return [
        name
        for how, names in instruction.called.items()
        if how != "to_apply" or instruction.opcode in _REDUCERS
        for name in names
    ]


def trip_count(module: Module, caller: Computation, loop: Instruction) -> int:
    """How often the body of a while loop runs.

    Where the compiler has not noted it, it is derived: a counter that starts at a constant, grows
    by a constant and is compared with a constant.

    Raises:
      UnknownTripCountError: it cannot be.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    body = module.computations[loop.called["body"][0]]
    condition = module.computations[loop.called["condition"][0]]

    def initial(index: int) -> int:
        return _constant(caller, caller.by_name[loop.operands[0]], index)

    direction, left, right = _comparison(module, condition)
    index = _element(condition, left)
    if index is None:  # limit > counter
        left, right = right, left
        direction = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}.get(direction, direction)
        index = _element(condition, left)
    if index is None:
        raise UnknownTripCountError(f"while {loop.name}: its condition compares no counter")
    limit = _value(condition, right, initial)
    span = limit - initial(index)
    step = _step(body, index, initial)
    trips = {
        "LT": -(-span // step),
        "LE": span // step + 1,
        "GT": -(-span // step),
        "GE": span // step + 1,
        "NE": span // step,
    }
    if direction not in trips:
        raise UnknownTripCountError(f"while {loop.name}: compared by {direction}")
    return max(0, trips[direction])


def _comparison(module: Module, condition: Computation) -> tuple[str, Instruction, Instruction]:
    """Direction and both sides, as instructions of the condition."""
    root, names = condition.root, condition.root.operands
    if root.opcode in ("fusion", "call"):
        how = "calls" if root.opcode == "fusion" else "to_apply"
        inner = module.computations[root.called[how][0]]
        parameters = {p.name: names[i] for i, p in inner.parameters.items()}
        if inner.root.opcode != "compare" or not all(
            name in parameters for name in inner.root.operands
        ):
            raise UnknownTripCountError(f"condition {condition.name} is no plain comparison")
        root, names = inner.root, tuple(parameters[name] for name in inner.root.operands)
    if root.opcode != "compare":
        raise UnknownTripCountError(f"condition {condition.name} is no plain comparison")
    left, right = (condition.by_name[name] for name in names)
    return root.attribute("direction"), left, right


def _origin(computation: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode in _SAME:
        instruction = computation.by_name[instruction.operands[0]]
    if instruction.opcode == "copy-start":
        return _origin(computation, computation.by_name[instruction.operands[0]])
    return instruction


def _element(computation: Computation, instruction: Instruction) -> int | None:
    """Which element of the computation's only parameter this is, if it is one."""
    origin = _origin(computation, instruction)
    if origin.opcode != "get-tuple-element":
        return None
    source = _origin(computation, computation.by_name[origin.operands[0]])
    return int(origin.attribute("index")) if source.opcode == "parameter" else None


def _value(computation: Computation, instruction: Instruction, initial: Callable) -> int:
    """A constant, written there or handed in."""
    index = _element(computation, instruction)
    return initial(index) if index is not None else _literal(computation, instruction)


def _constant(computation: Computation, operand: Instruction, index: int) -> int:
    """Element `index` of a loop's initial values."""
    tuple_ = _origin(computation, operand)
    if tuple_.opcode != "tuple":
        raise UnknownTripCountError(f"{operand.name} in {computation.name} is no plain tuple")
    return _literal(computation, computation.by_name[tuple_.operands[index]])


def _literal(computation: Computation, instruction: Instruction) -> int:
    origin = _origin(computation, instruction)
    if origin.opcode != "constant" or not re.fullmatch(r"-?\d+", origin.arguments):
        raise UnknownTripCountError(f"{instruction.name} in {computation.name} is no constant")
    return int(origin.arguments)


def _step(body: Computation, index: int, initial: Callable) -> int:
    new = body.root
    if new.opcode != "tuple":
        raise UnknownTripCountError(f"the root of loop body {body.name} is no plain tuple")
    new = _origin(body, body.by_name[new.operands[index]])
    if new.opcode == "add":
        sides = [body.by_name[name] for name in new.operands]
        for counter, step in (sides, sides[::-1]):
            if _element(body, counter) == index:
                return _value(body, step, initial)
    raise UnknownTripCountError(f"loop body {body.name} does not add a constant to its counter")
