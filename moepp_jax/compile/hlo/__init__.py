"""Reading compiled HLO: what a program moves and computes, every loop counted as often as it runs.

module = hlo.parse(compiled.as_text())
for c in hlo.collectives(module): print(c.kind, c.times, c.wire_bytes, c.axes(mesh.shape))
hlo.product_flops(module), hlo.memory_bytes(module), hlo.overlapped(module, "all-to-all")
"""

from moepp_jax.compile.hlo.collectives import Collective, awaited, collectives, overlapped
from moepp_jax.compile.hlo.costs import (
    FREE,
    flops_of,
    indexed,
    memory_bytes,
    padded_flops,
    product_cycles,
    product_flops,
    traffic,
)
from moepp_jax.compile.hlo.custom_calls import attended, head_width, is_grouped
from moepp_jax.compile.hlo.kernels import Kernel, kernels, operations
from moepp_jax.compile.hlo.loops import executions, rounds, unknown_loops
from moepp_jax.compile.hlo.text import Computation, Instruction, Load, Module, parse, scopes

__all__ = [
    "FREE",
    "Collective",
    "Computation",
    "Instruction",
    "Kernel",
    "Load",
    "Module",
    "attended",
    "awaited",
    "collectives",
    "executions",
    "flops_of",
    "head_width",
    "indexed",
    "is_grouped",
    "kernels",
    "memory_bytes",
    "operations",
    "overlapped",
    "padded_flops",
    "parse",
    "product_cycles",
    "product_flops",
    "rounds",
    "scopes",
    "traffic",
    "unknown_loops",
]
