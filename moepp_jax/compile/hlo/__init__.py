"""Reading compiled HLO: what a program moves and computes, every loop counted as often as it runs.

module = hlo.parse(compiled.as_text())
for c in hlo.collectives(module): print(c.kind, c.times, c.wire_bytes, c.axes(mesh.shape))
hlo.product_flops(module), hlo.memory_bytes(module), hlo.overlapped(module, "all-to-all")
"""

from moepp_jax.compile.hlo.collectives import Collective, collectives, overlapped
from moepp_jax.compile.hlo.costs import flops_of, memory_bytes, product_flops
from moepp_jax.compile.hlo.kernels import Kernel, kernels
from moepp_jax.compile.hlo.loops import executions, unknown_loops
from moepp_jax.compile.hlo.text import Instruction, Module, parse, scopes

__all__ = [
    "Collective",
    "Instruction",
    "Kernel",
    "Module",
    "collectives",
    "executions",
    "flops_of",
    "kernels",
    "memory_bytes",
    "overlapped",
    "parse",
    "product_flops",
    "scopes",
    "unknown_loops",
]
