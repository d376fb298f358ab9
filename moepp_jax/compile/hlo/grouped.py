"""What kernels and loops over rows sorted by expert compute and move, from the shapes of arrays.

The kernels are those of `moepp_jax.moe.triton` and `moepp_jax.moe.filled`, and XLA's own for
`jax.lax.ragged_dot` on TPU. How many rows of a buffer are filled no program tells; who reads one
may (`Module.load`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from moepp_jax.compile.hlo.text import Computation, Instruction, Load, Module, Shape

_KNOWN = re.compile(r"experts_(rows|hidden|product|hidden_gradient|parameters)|ragged-dot-none")
_INTO = "experts_product"  # its result has the memory of an operand, which is not read


def is_known(name: str) -> bool:
    """Whether a kernel of this name is one of them."""
    return bool(_KNOWN.fullmatch(name))


def flops(computation: Computation, call: Instruction, load: Load | None) -> int:
    """Each multiplies all rows with a matrix, or makes one of a product of rows, or neither."""
    parameters = _parameters(computation, call)
    if parameters is None:
        return 0
    _, *matrix = parameters.dims
    return int(2 * _filled(computation, call, load) * math.prod(matrix))


def factors(computation: Computation, call: Instruction) -> str:
    """The type of what is multiplied."""
    return _rows(computation, call)[0].type


def traffic(computation: Computation, call: Instruction, name: str, load: Load | None) -> int:
    """Bytes: each filled row and each parameter once."""
    rows = sum(shape.stored for shape in _rows(computation, call))
    rows -= call.shapes[0].stored if name == _INTO else 0
    share = _filled(computation, call, load) / _rows(computation, call)[0].dims[0]
    parameters = _parameters(computation, call)
    return (parameters.stored if parameters else 0) + int(rows * share)


def blocks(module: Module, loop: Instruction) -> int | None:
    """Rounds of a loop over blocks of rows, of an expert's or on their way to all; None of others.

    Nor does anybody know them without `Module.load`.
    """
    where = re.findall(r"\b(dispatch|experts|combine)\b", loop.scope)
    sizes = set(_block_sizes(module, loop.called["body"][0]))
    if module.load is None or not where or not sizes:
        return None
    apart = module.load.experts if where[-1] == "experts" else 1
    return math.ceil(module.load.rows / apart / max(sizes))


def _block_sizes(module: Module, name: str) -> Iterator[int]:
    """How many rows a computation cuts out of many, or puts into them."""
    computation = module.computations[name]
    for i in computation.instructions:
        block = None
        if i.opcode == "dynamic-slice":
            block = i
        elif i.opcode == "dynamic-update-slice":
            block = computation.by_name[i.operands[1]]
        if block and len(block.shapes[0].dims) == 2 and block.shapes[0].dims[0] > 1:
            yield block.shapes[0].dims[0]
        for inner in i.called.get("calls", ()):
            yield from _block_sizes(module, inner)


def _filled(computation: Computation, call: Instruction, load: Load | None) -> float:
    there = float(_rows(computation, call)[0].dims[0])
    return there if load is None else min(load.rows, there)


def _rows(computation: Computation, call: Instruction) -> list[Shape]:
    """(R, numbers of a row) each, given and made."""
    return [shape for shape in _arrays(computation, call) if len(shape.dims) == 2]


def _parameters(computation: Computation, call: Instruction) -> Shape | None:
    """(E, a matrix), given or made."""
    return next((s for s in _arrays(computation, call) if len(s.dims) == 3), None)


def _arrays(computation: Computation, call: Instruction) -> list[Shape]:
    given = (shape for name in call.operands for shape in computation.by_name[name].shapes)
    return [shape for shape in (*given, *call.shapes) if not shape.type.startswith("s")]
