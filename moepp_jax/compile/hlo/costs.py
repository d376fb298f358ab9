"""Work of a program: operations of its products, and bytes between memory and chip."""

from __future__ import annotations

import math
import operator
import re
from functools import cache
from typing import NamedTuple

from moepp_jax.compile.hlo import custom_calls
from moepp_jax.compile.hlo.loops import executions
from moepp_jax.compile.hlo.text import Computation, Instruction, Module

# They move nothing: names for what others made, or calls whose inside is counted.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "async-start",
    "partition-id",
    "replica-id",
    "after-all",
    "optimization-barrier",
    "iota",
}


_CYCLES = re.compile(r'"window_config":\{.*?"estimated_cycles":"(\d+)"')
PRODUCTS = ("dot", "convolution")


def product_flops(module: Module) -> int:
    """Operations of all matrix products, two for a multiplication and its addition.

    Kernels that are not HLO count where `custom_calls` reads them, and nothing elsewhere.
    """
    return sum(
        times * _product(module, module.computations[name], instruction)
        for name, times in executions(module).items()
        for instruction in module.computations[name].instructions
    )


def product_cycles(module: Module) -> int:
    """Cycles of the products by the compiler's own estimate, where it has written one.

    Only a program that was compiled to its end has them.
    """
    fused = module.called_by("fusion")
    total = 0
    for name, times in executions(module).items():
        if name in fused:
            continue
        for i in module.computations[name].instructions:
            cycles = _CYCLES.search(i.attributes)
            if cycles and flops_of(module, name, i):
                total += times * int(cycles[1])
    return total


def flops_of(module: Module, computation: str, instruction: Instruction) -> int:
    """Operations of the products in one instruction of a computation, a fusion's among them."""
    if instruction.opcode != "fusion":
        return _product(module, module.computations[computation], instruction)
    inner = instruction.called["calls"][0]
    return sum(flops_of(module, inner, i) for i in module.computations[inner].instructions)


def padded_flops(
    module: Module, computation: Computation, instruction: Instruction, width: int
) -> float:
    """As `flops_of`, with the contraction and the narrower output width filled to an MXU's width.

    The other output width streams through the MXU row by row, and needs no filling.
    """
    if instruction.opcode == "convolution":
        found = re.search(r"dim_labels=(\w+)_(\w+)->", instruction.attributes)
        left, right = (computation.by_name[name].shapes[0].dims for name in instruction.operands)
        contracted = right[found[2].index("i")]
        free = right[found[2].index("o")], left[found[1].index("b")]
        filled = min(_filling(n, width) for n in free)
        product = _product(module, computation, instruction)
        return product * _filling(contracted, width) * filled
    if instruction.opcode != "fusion":
        return float(flops_of(module, computation.name, instruction))
    inner = module.computations[instruction.called["calls"][0]]
    return sum((padded_flops(module, inner, i, width) for i in inner.instructions), 0.0)


def _filling(size: int, width: int) -> float:
    return math.ceil(size / width) * width / size if size else 1.0


class Indexed(NamedTuple):
    """What an instruction reads or writes by index: rows, or single numbers."""

    gathered_rows: int = 0
    scattered_rows: int = 0
    gathered: int = 0
    scattered: int = 0

    def __add__(self, other: Indexed) -> Indexed:
        return Indexed(*map(operator.add, self, other))


def indexed(module: Module, computation: Computation, instruction: Instruction) -> Indexed:
    """What is gathered and scattered in an instruction, a fusion's among them."""
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called["calls"][0]]
        return sum((indexed(module, inner, i) for i in inner.instructions), Indexed())
    if instruction.opcode == "gather":
        sizes = re.findall(r"\d+", instruction.attribute("slice_sizes") or "1")
        slice_ = [int(size) for size in sizes]
        several = instruction.shapes[0].size // max(math.prod(slice_), 1)
        rows = _rows(slice_, several)
        return Indexed(gathered_rows=rows) if max(slice_) > 1 else Indexed(gathered=several)
    if instruction.opcode == "scatter":
        updates = computation.by_name[instruction.operands[-1]].shapes[0]
        window = re.findall(r"\d+", instruction.attribute("update_window_dims") or "")
        slice_ = [updates.dims[int(d)] for d in window] or [1]
        several = updates.size // max(math.prod(slice_), 1)
        rows = _rows(slice_, several)
        return Indexed(scattered_rows=rows) if max(slice_) > 1 else Indexed(scattered=several)
    return Indexed()


def _rows(slice_: list[int], several: int) -> int:
    return several * math.prod(slice_[:-1])


def _product(module: Module, computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode == "custom-call":
        return custom_calls.product(computation, instruction, module.load) or 0
    if instruction.opcode not in PRODUCTS:
        return 0
    left, right = (computation.by_name[name].shapes[0] for name in instruction.operands[:2])
    out = instruction.shapes[0]
    if instruction.opcode == "dot":
        axes = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")
        return 2 * out.size * math.prod(left.dims[int(axis)] for axis in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    lhs, rhs, result = labels.groups()
    spatial = [label for label in result if label.isdigit()]
    pairs = 1
    for label in spatial:
        pairs *= _window_pairs(
            _window(instruction, int(label)),
            left.dims[lhs.index(label)],
            right.dims[rhs.index(label)],
            out.dims[result.index(label)],
        )
    others = math.prod(out.dims[i] for i, label in enumerate(result) if not label.isdigit())
    return 2 * others * pairs * right.dims[rhs.index("i")]


def _window(instruction: Instruction, at: int) -> tuple[int, int, int, int]:
    """(stride, padding before, dilation of the left, of the right) of a spatial dimension.

    Batch dimensions are written so: a window as wide as the batch, of which one place is real.
    """

    def value(name: str, default: str) -> str:
        found = re.search(rf"\bwindow=\{{[^}}]*\b{name}=([\dx_\-]+)", instruction.attributes)
        return found[1].split("x")[at] if found else default

    return (
        int(value("stride", "1")),
        int(value("pad", "0_0").split("_")[0]),
        int(value("lhs_dilate", "1")),
        int(value("rhs_dilate", "1")),
    )


@cache
def _window_pairs(window: tuple[int, int, int, int], left: int, right: int, out: int) -> int:
    """How many (place of the output, place of the window) meet an element of the left."""
    stride, pad, dilate_left, dilate_right = window
    length = (left - 1) * dilate_left + 1
    places = (o * stride + k * dilate_right - pad for o in range(out) for k in range(right))
    return sum(0 <= p < length and p % dilate_left == 0 for p in places)


def memory_bytes(module: Module) -> int:
    """Bytes that instructions read from main memory and write to it.

    Each fusion reads its operands and writes its result once, of a slice only what is sliced. What
    stays in memory on the chip is not counted.
    """
    times = executions(module)
    fused = module.called_by("fusion")
    return sum(
        times[name] * traffic(module, computation, instruction)
        for name, computation in module.computations.items()
        if name in times and name not in fused
        for instruction in computation.instructions
    )


def traffic(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes that one execution of an instruction moves between main memory and chip."""
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith(("-done", "-update")):
        return 0
    if opcode == "custom-call" and "AllocateBuffer" in instruction.attributes:
        return 0
    own = custom_calls.traffic(computation, instruction, module.load)
    if own is not None:
        return own
    if opcode == "fusion":
        inner = module.computations[instruction.called["calls"][0]]
        read = sum(
            _read(module, inner, inner.parameters[i])
            for i, name in enumerate(instruction.operands)
            if _in_memory(computation.by_name[name])
        )
        return read + _written(module, inner, instruction)
    operands = [computation.by_name[name] for name in instruction.operands]
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _in_memory(instruction)
    if opcode == "dynamic-update-slice":
        return 2 * _in_memory(operands[1])
    if opcode == "scatter":
        return 2 * _in_memory(operands[-1])
    read = sum(map(_in_memory, operands))
    if opcode.endswith("-start"):
        # The result also names the operand, and counters.
        arrays = [s for s in instruction.shapes if s.dims and s.space == 0]
        return read + max(sum(s.stored for s in arrays) - read, 0)
    return read + _in_memory(instruction) - custom_calls.workspace_bytes(instruction)


def _in_memory(instruction: Instruction) -> int:
    return sum(s.stored for s in instruction.shapes if s.space == 0)


def _read(module: Module, inner: Computation, parameter: Instruction) -> int:
    """How much of a fusion's parameter is read."""
    whole, total = sum(s.stored for s in parameter.shapes), 0
    for user in inner.users.get(parameter.name, ()):
        first = user.operands[0] == parameter.name
        if user.opcode in ("dynamic-slice", "slice", "gather") and first:
            total += user.shapes[0].stored
        elif user.opcode == "dynamic-update-slice" and first:
            continue  # changed in place
        elif user.opcode == "bitcast":
            total += _read(module, inner, user)
        elif user.opcode == "fusion":
            nested = module.computations[user.called["calls"][0]]
            places = [i for i, name in enumerate(user.operands) if name == parameter.name]
            total += sum(_read(module, nested, nested.parameters[i]) for i in places)
        else:
            return whole
    return min(total, whole)


def _written(module: Module, inner: Computation, fusion: Instruction) -> int:
    root = inner.root
    roots = [inner.by_name[n] for n in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for shape, source in zip(fusion.shapes, roots, strict=False):
        update = _update(module, inner, source)
        total += 0 if shape.space else min(shape.stored, update if update else shape.stored)
    return total


def _update(module: Module, inner: Computation, source: Instruction) -> int | None:
    """Bytes of the slice that is written, if the source writes into what is there already."""
    while source.opcode == "bitcast":
        source = inner.by_name[source.operands[0]]
    if source.opcode == "fusion":
        nested = module.computations[source.called["calls"][0]]
        return _update(module, nested, nested.root)
    if source.opcode != "dynamic-update-slice":
        return None
    return inner.by_name[source.operands[1]].shapes[0].stored
