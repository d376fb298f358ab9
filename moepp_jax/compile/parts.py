"""Which part of a training step an instruction belongs to, by the named scopes of the model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from moepp_jax.compile import hlo

ROUTER = "router"
DISPATCH = "dispatch"
EXPERTS = "experts"
COMBINE = "combine"
ZERO_COMPUTATION = "zero-computation"
EXCHANGE = "exchange not hidden"
CORE = "attention core"
PROJECTIONS = "attention projections"
LOSS = "loss"
OPTIMIZER = "optimizer"
COLLECTIVES = "collectives"
REST = "the rest"

# In the order of a table.
ALL = (
    ROUTER,
    DISPATCH,
    EXPERTS,
    ZERO_COMPUTATION,
    COMBINE,
    EXCHANGE,
    CORE,
    PROJECTIONS,
    LOSS,
    OPTIMIZER,
    COLLECTIVES,
    REST,
)

# Scopes of `jax.named_scope`, the innermost of which counts.
_SCOPES = {
    "router": ROUTER,
    "dispatch": DISPATCH,
    "to_experts": DISPATCH,  # copies about the exchange; itself it is a collective
    "experts": EXPERTS,
    "from_experts": COMBINE,
    "combine": COMBINE,
    "zero_computation": ZERO_COMPUTATION,
    "attention_core": CORE,
    "attention": PROJECTIONS,
    "loss": LOSS,
    "optimizer": OPTIMIZER,
}
_SCOPE = re.compile(rf"\b({'|'.join(_SCOPES)})\b")
_PRODUCTS = ("dot", "convolution")
_INDEXED = ("gather", "scatter")


def of(module: hlo.Module, instruction: hlo.Instruction) -> str:
    """The part of an instruction that is no collective.

    Of a fusion it is that of the products in it, else of the gathers and scatters, else its own;
    where the compiler has given it none, that of most of what is in it.
    """
    inside = list(_inside(module, instruction))
    for opcodes in (_PRODUCTS, _INDEXED):
        if found := _most(i for i in inside if i.opcode in opcodes):
            return found
    return _most([instruction]) or _most(inside) or REST


def of_collective(collective: hlo.Collective) -> str:
    return EXCHANGE if collective.kind.endswith("all-to-all") else COLLECTIVES


def _most(instructions: Iterable[hlo.Instruction]) -> str | None:
    scopes = (_SCOPE.findall(i.scope) for i in instructions)
    found = Counter(_SCOPES[names[-1]] for names in scopes if names)
    return found.most_common(1)[0][0] if found else None


def _inside(module: hlo.Module, instruction: hlo.Instruction) -> Iterator[hlo.Instruction]:
    if instruction.opcode == "fusion":
        for i in module.computations[instruction.called["calls"][0]].instructions:
            yield i
            yield from _inside(module, i)
