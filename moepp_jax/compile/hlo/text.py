"""HLO text as computations of instructions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

_BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "s2": 2, "u2": 2}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_NAME = re.compile(r"%([\w.\-]+)")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(
    r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|\b(branch_computations|called_computations)=\{([^}]*)\}"
)


@dataclass(frozen=True)
class Shape:
    """An array.

    Attributes:
      space: the memory that holds it; 0 is the main one, others are on the chip.
      room: elements that there is room for, where tiles are filled up; None: as many as there are.
    """

    type: str
    dims: tuple[int, ...]
    space: int = 0
    room: int | None = None

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return self._bytes(self.size)

    @property
    def stored(self) -> int:
        """Bytes as it lies in memory: on a TPU in whole tiles, of a width of 96 a third more."""
        return self._bytes(self.size if self.room is None else self.room)

    def _bytes(self, elements: int) -> int:
        bits = _BITS.get(self.type)
        if bits is None:
            bits = int(re.search(r"\d+", self.type)[0])
        return math.ceil(elements * bits / 8)


@dataclass(frozen=True)
class Instruction:
    """One line.

    Attributes:
      result: its text, of an array or a nested tuple.
      arguments: the text in the parentheses; operands are the names in it.
      attributes: the text after them.
    """

    name: str
    opcode: str
    result: str
    arguments: str
    attributes: str
    is_root: bool

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The arrays of the result, nested tuples flattened."""
        return _shapes(self.result)

    @cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(_NAME.findall(self.arguments))

    @cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Names of the computations that it calls, by how."""
        found: dict[str, tuple[str, ...]] = {}
        for how, one, hows, several in _CALLED.findall(self.attributes):
            names = (one,) if one else tuple(re.findall(r"[\w.\-]+", several))
            found[how or hows] = found.get(how or hows, ()) + names
        return found

    @property
    def scope(self) -> str:
        """Where in the traced program it comes from: the named scopes, joined by slashes."""
        found = _SCOPE.search(self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str | None:
        """The text of an attribute that is a word or stands in braces."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return found[1] if found else None


@dataclass
class Computation:
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @cached_property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.arguments): i for i in self.instructions if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each one."""
        found: dict[str, list[Instruction]] = {}
        for i in self.instructions:
            for name in set(i.operands):
                found.setdefault(name, []).append(i)
        return found


@dataclass(frozen=True)
class Load:
    """How full a buffer of rows sorted by expert is; by a program's text all of it may be.

    Attributes:
      rows: that are filled.
      experts: whose rows they are, evenly.
    """

    rows: float
    experts: int


@dataclass
class Module:
    """A compiled program; in a scheduled one, instructions stand in the order they run in.

    Attributes:
      load: where that is known from elsewhere.
    """

    name: str
    entry: str
    num_devices: int
    computations: dict[str, Computation]
    load: Load | None = None

    def called_by(self, opcode: str) -> set[str]:
        """The computations that instructions of a kind wrap."""
        return {
            name
            for computation in self.computations.values()
            for instruction in computation.instructions
            if instruction.opcode == opcode
            for name in self.wrapped_in(instruction)
        }

    def wrapped_in(self, instruction: Instruction) -> Iterator[str]:
        """The computations that an instruction wraps, and those that are called in these.

        What runs on a core of its own, as a TPU's sparse ones, is wrapped in such a call once more.
        """
        for name in instruction.called.get("calls", ()):
            yield name
            for inner in self.computations[name].instructions:
                if inner.opcode == "call":
                    yield from inner.called.get("to_apply", ())


def scopes(module: Module, instruction: Instruction) -> set[str]:
    """Where an instruction comes from, and what is fused into it."""
    found = {instruction.scope}
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called["calls"][0]]
        found = found.union(*(scopes(module, i) for i in inner.instructions))
    return found


def parse(text: str) -> Module:
    """The computations of HLO text.

    Raises:
      ValueError: it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in _lines(text):
        if current is None:
            if head := _HEAD.match(line):
                current = computations[head[2]] = Computation(head[2])
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            current.instructions.append(_instruction(found, line))
    if entry is None:
        raise ValueError("this is no HLO text: it has no ENTRY computation")
    header = text[: text.index("\n")]
    counts = [re.search(rf"\b{c}=(\d+)", header) for c in ("replica_count", "num_partitions")]
    name = re.match(r"HloModule ([^\s,]*)", header)
    devices = math.prod(int(c[1]) for c in counts if c)
    return Module(name[1] if name else "", entry, devices, computations)


def _lines(text: str) -> Iterator[str]:
    """The lines, each instruction as one: a kernel's metadata may span several."""
    lines = iter(text.splitlines())
    for line in lines:
        if _INSTRUCTION.match(line):
            while _open_braces(line) > 0 and (more := next(lines, None)) is not None:
                line += more
        yield line


def _open_braces(line: str) -> int:
    outside = _QUOTED.sub("", line)
    return outside.count("{") - outside.count("}")


def _instruction(found: re.Match, line: str) -> Instruction:
    rest = line[found.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = _closing(rest, start)
    return Instruction(
        name=found[2],
        opcode=rest[:start],
        result=result,
        arguments=rest[start + 1 : end],
        attributes=rest[end + 1 :],
        is_root=bool(found[1]),
    )


def _closing(text: str, start: int = 0) -> int:
    """Where the parenthesis that opens at `start` is closed."""
    depth = 0
    for mark in re.finditer(r'[()]|"(?:[^"\\]|\\.)*"', text[start:]):
        depth += {"(": 1, ")": -1}.get(mark[0], 0)
        if depth == 0 and mark[0] == ")":
            return start + mark.start()
    raise ValueError(f"unbalanced parentheses in {text[start : start + 80]!r}")


def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for kind, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        found.append(Shape(kind, sizes, int(space[1]) if space else 0, _room(sizes, layout)))
    return tuple(found)


def _room(dims: tuple[int, ...], layout: str) -> int | None:
    """Elements of an array whose innermost dimensions are filled up to tiles; None without tiles.

    Of {2,1,0:T(8,128)(2,1)} dimension 2 is the innermost, filled up to 128, and 1 to 8.
    """
    found = re.match(r"\{([\d,]+):T\((\d+(?:,\d+)*)\)", layout)
    if not found:
        return None
    innermost, tile = ([int(n) for n in group.split(",")] for group in found.groups())
    filled = list(dims)
    for dimension, size in zip(innermost, reversed(tile), strict=False):
        filled[dimension] = math.ceil(filled[dimension] / size) * size
    return math.prod(filled)
