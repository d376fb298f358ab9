"""What the kernels of `moepp_jax.moe.triton` compute and move, from the shapes of their arrays.

How many rows of a buffer are filled no program tells; who reads one may (`Module.expert_rows`).
"""

from __future__ import annotations

import math
import re

from moepp_jax.compile.hlo.text import Computation, Instruction, Shape

_OWN = re.compile(r"experts_(hidden|product|hidden_gradient|parameters)")
_INTO = "experts_product"  # its result has the memory of an operand, which is not read


def is_own(name: str) -> bool:
    """Whether a Triton kernel of this name is one of them."""
    return bool(_OWN.fullmatch(name))


def flops(computation: Computation, call: Instruction, expert_rows: float | None) -> int:
    """Each multiplies all rows with a matrix, or makes one of a product of rows."""
    _, *matrix = _parameters(computation, call).dims
    return int(2 * _filled(computation, call, expert_rows) * math.prod(matrix))


def factors(computation: Computation, call: Instruction) -> str:
    """The type of what is multiplied."""
    return _rows(computation, call)[0].type


def traffic(
    computation: Computation, call: Instruction, name: str, expert_rows: float | None
) -> int:
    """Bytes: each filled row and each parameter once."""
    rows = sum(shape.bytes for shape in _rows(computation, call))
    rows -= call.shapes[0].bytes if name == _INTO else 0
    share = _filled(computation, call, expert_rows) / _rows(computation, call)[0].dims[0]
    return _parameters(computation, call).bytes + int(rows * share)


def _filled(computation: Computation, call: Instruction, expert_rows: float | None) -> float:
    there = float(_rows(computation, call)[0].dims[0])
    return there if expert_rows is None else min(expert_rows, there)


def _rows(computation: Computation, call: Instruction) -> list[Shape]:
    """(R, numbers of a row) each, given and made."""
    return [shape for shape in _arrays(computation, call) if len(shape.dims) == 2]


def _parameters(computation: Computation, call: Instruction) -> Shape:
    """(E, a matrix), given or made."""
    return next(shape for shape in _arrays(computation, call) if len(shape.dims) == 3)


def _arrays(computation: Computation, call: Instruction) -> list[Shape]:
    given = (shape for name in call.operands for shape in computation.by_name[name].shapes)
    return [*given, *call.shapes]
