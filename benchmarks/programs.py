"""What the compiler makes of a layer: its operations, its temporary memory, what crosses devices.

No clock is read: on a busy machine the numbers are the same.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moepp_jax import moe
from moepp_jax.compile import hlo


class Blocks(NamedTuple):
    """Rows of the blocks that dropless experts work through.

    Attributes:
      compiled: of every block that there is a program for.
      run: of those that run, the padding of odd blocks among them.
    """

    compiled: int
    run: float


NO_BLOCKS = Blocks(1, 1)


def blocks(grouped: moe.Blocked, counts_E: np.ndarray, rows: int) -> Blocks:
    """Of experts with so many rows each, in a buffer of `rows` rows: counted while they run."""
    sizes: set[int] = set()
    run: list[int] = []

    def counted(params, x_EBD):
        size = x_EBD.shape[1]
        sizes.add(size)
        jax.debug.callback(lambda: run.append(size))
        return x_EBD

    experts = dataclasses.replace(grouped, expert=counted)
    jax.block_until_ready(experts({}, jnp.zeros((rows, 1)), jnp.asarray(counts_E, jnp.int32)))
    jax.effects_barrier()
    # An expert has one odd block, of any size, and then full ones.
    return Blocks(sum(sizes) + max(sizes), sum(run))


def product_flops(module: hlo.Module, blocks: Blocks = NO_BLOCKS) -> float:
    """Operations of a program's products as it runs.

    The text has a branch for each size of a block, in loops whose length hangs on the data; the
    work of every branch is in proportion to its rows, so what runs is a share of them all.
    """
    inside = _in_unknown_loops(module)
    by_data = sum(
        times * hlo.flops_of(module, name, i)
        for name, times in hlo.executions(module).items()
        if name in inside
        for i in module.computations[name].instructions
        if i.opcode != "fusion"  # what it calls is counted where it stands
    )
    return hlo.product_flops(module) + by_data * (blocks.run / blocks.compiled - 1)


def _in_unknown_loops(module: hlo.Module) -> set[str]:
    """The computations that run only in loops of unknown length."""
    unknown = set(hlo.unknown_loops(module))
    waiting = [
        name
        for computation in module.computations.values()
        for i in computation.instructions
        if i.name in unknown
        for name in i.called["body"]
    ]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            each = (i.called.values() for i in module.computations[name].instructions)
            waiting += [called for names in each for several in names for called in several]
    return found


class Program(NamedTuple):
    """One device's program.

    Attributes:
      flops: of its products, as they run.
      accessed: bytes that its instructions read and write by the compiler's count, each loop and
        branch once.
      temp_bytes: memory beside arguments and results.
      collectives: kind -> (how many, bytes that one device puts in, of all of them).
    """

    flops: float
    accessed: float
    temp_bytes: int
    collectives: dict[str, tuple[int, int]]


def read(compiled: jax.stages.Compiled, blocks: Blocks = NO_BLOCKS) -> Program:
    module = hlo.parse(compiled.as_text())
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for c in hlo.collectives(module):
        count[c.kind] += c.times
        size[c.kind] += c.times * c.operand_bytes
    return Program(
        product_flops(module, blocks),
        compiled.cost_analysis()["bytes accessed"],
        compiled.memory_analysis().temp_size_in_bytes,
        {kind: (count[kind], size[kind]) for kind in sorted(count)},
    )
