"""What one execution of an instruction needs of a chip, in seconds of each thing it keeps busy."""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass

from moepp_jax.chips import Chip
from moepp_jax.compile import hlo, rates

MXU, HBM, ROWS, LINKS, LAUNCH = "MXU", "HBM", "rows", "links", "launch"

# Calls of the compiler to itself: names for buffers, and facts about indices.
_NO_KERNELS = {
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "AsyncCollectiveDone",
    "AsyncCollectiveStart",
    "ConcatBitcast",
    "GatherScatterIndicesBitpacked",
    "PrepareAsyncCallDone",
    "PrepareAsyncCallStart",
}

# Kernels of some scalars, which take no time to speak of.
_SCALARS = {"ragged-dot-metadata"}


@dataclass(frozen=True)
class Needs:
    """
    Attributes:
      seconds: the slowest of what it needs, and its launch.
      bound: what that is.
      kernel: the name of a kernel that is not known: it counts as what it moves alone.
    """

    seconds: float
    bound: str
    kernel: str | None = None


NOTHING = Needs(0.0, LAUNCH)


def of(
    module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction, chip: Chip
) -> Needs:
    """Of an instruction that is no collective, on a chip that `rates` knows."""
    rate = rates.of(chip)
    opcode = instruction.opcode
    if opcode in hlo.FREE - {"iota"} or opcode.endswith(("-done", "-update")):
        return NOTHING
    if opcode == "custom-call" and _target(instruction) in _NO_KERNELS:
        return NOTHING
    moved = hlo.traffic(module, computation, instruction)
    busy = {
        MXU: hlo.padded_flops(module, computation, instruction, rate.width)
        / (rates.PRODUCTS * chip.flops),
        HBM: moved / (rate.memory * chip.hbm_bandwidth),
    }
    kernel = None
    if opcode == "custom-call":
        own = re.sub(r"[.\d]+$", "", instruction.name)
        kernel = _target(instruction) if own == "custom-call" else own
        if cycles := rates.block_cycles(kernel):
            blocks = hlo.attended(computation, instruction) / rates.BLOCK**2
            blocks *= math.ceil(hlo.head_width(computation, instruction) / rates.HEAD)
            busy[MXU] = cycles * blocks / rate.cores / rate.clock
            kernel = None
        if hlo.is_grouped(instruction) or kernel in _SCALARS:
            kernel = None
    else:
        each = rates.GATHERED_ROW, rates.SCATTERED_ROW, rates.GATHERED, rates.SCATTERED
        several = hlo.indexed(module, computation, instruction)
        cycles = sum(map(operator.mul, several, each))
        busy[ROWS] = cycles / rate.clock
    bound = max(busy, key=busy.get)
    if busy[bound] < rates.LAUNCH:
        return Needs(busy[bound] + rates.LAUNCH, LAUNCH, kernel)
    return Needs(busy[bound] + rates.LAUNCH, bound, kernel)


def moving(
    module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction, chip: Chip
) -> Needs:
    """Of what is started to run beside others and is no collective: copies, mostly."""
    inner = instruction.called.get("calls", ())
    if instruction.opcode == "async-start" and inner:
        there = module.computations[inner[0]]
        return Needs(sum(of(module, there, i, chip).seconds for i in there.instructions), HBM)
    moved = hlo.traffic(module, computation, instruction)
    return Needs(moved / (rates.of(chip).memory * chip.hbm_bandwidth), HBM)


def _target(kernel: hlo.Instruction) -> str:
    return (kernel.attribute("custom_call_target") or "").strip('"')
