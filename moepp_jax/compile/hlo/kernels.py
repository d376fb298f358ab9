"""Which kernels make a program's matrix products, in which arithmetic."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

from moepp_jax.compile.hlo import custom_calls
from moepp_jax.compile.hlo.costs import PRODUCTS, flops_of
from moepp_jax.compile.hlo.loops import executions
from moepp_jax.compile.hlo.text import Computation, Instruction, Module

_FUSION_KIND = re.compile(r'"kind":"(__[\w$]+)"')


@dataclass(frozen=True)
class Kernel:
    """Products of a kind.

    Attributes:
      name: whose kernel it is: of a library, of XLA's Triton, of one's own; `XLA` for its others.
      arithmetic: the type of the factors; `tf32` for float32 that may be rounded to it.
      times: how often a run of the program starts one.
      flops: of all these; None where the program's text does not tell.
    """

    name: str
    arithmetic: str
    times: int
    flops: int | None


def kernels(module: Module) -> list[Kernel]:
    """All that multiply matrices, or may: those that most is computed by first."""
    times = executions(module)
    fused = module.called_by("fusion")
    found: dict[tuple[str, str, bool], list[int]] = defaultdict(lambda: [0, 0])
    for name, computation in module.computations.items():
        if name not in times or name in fused:
            continue
        for instruction in computation.instructions:
            for product in _products(module, computation, instruction):
                who, arithmetic, flops = product
                row = found[who, arithmetic, flops is None]
                row[0] += times[name]
                row[1] += times[name] * (flops or 0)
    rows = [
        Kernel(who, arithmetic, count, None if unknown else flops)
        for (who, arithmetic, unknown), (count, flops) in found.items()
    ]
    return sorted(rows, key=lambda row: (row.flops is None, -(row.flops or 0)))


def operations(module: Module, computation: Computation, instruction: Instruction) -> Counter[str]:
    """Of an instruction's products, by their arithmetic; those that the text does not tell as 0."""
    found: Counter[str] = Counter()
    for _, arithmetic, flops in _products(module, computation, instruction):
        found[arithmetic] += flops or 0
    return found


def _products(module: Module, computation: Computation, instruction: Instruction):
    """(kernel, arithmetic, operations) of an instruction; of a fusion those fused into it."""
    if instruction.opcode == "custom-call":
        if who := custom_calls.kernel(instruction):
            flops = custom_calls.product(computation, instruction, module.load)
            known = flops is not None
            yield who, custom_calls.arithmetic(computation, instruction) if known else "", flops
    elif instruction.opcode in PRODUCTS:
        flops = flops_of(module, computation.name, instruction)
        yield "XLA", _arithmetic(computation, instruction), flops
    elif instruction.opcode == "fusion":
        kind = _FUSION_KIND.search(instruction.attributes)
        who = "XLA's Triton" if kind and "triton" in kind[1] else "XLA"
        inner = module.computations[instruction.called["calls"][0]]
        for each in inner.instructions:
            for _, arithmetic, flops in _products(module, inner, each):
                yield who, arithmetic, flops


def _arithmetic(computation: Computation, instruction: Instruction) -> str:
    types = [computation.by_name[name].shapes[0].type for name in instruction.operands[:2]]
    return custom_calls.rounded(types, instruction)
