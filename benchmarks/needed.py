"""What a layer needs, counted by hand: operations and bytes, whatever computes it.

A product of (a, b) with (b, c) is 2 a b c operations, and backward costs twice forward. Bytes are
the least: every parameter and every token read once a pass, every result written once.
"""

from __future__ import annotations

import math

from moepp_jax import moe
from moepp_jax.moe import param


def matrices(rule: moe.Rule, width: int, ffn_size: int) -> int:
    """Numbers in the matrices that every token meets, whatever it chooses."""
    described = moe.describe(rule, width, ffn_size)
    router = sum(math.prod(p.shape) for p in rule.params(width, 0.0).values() if len(p.shape) == 2)
    return router + sum(math.prod(p.shape) for p in described.get("const", {}).values())


def flops(
    rule: moe.Rule, width: int, ffn_size: int, tokens: int, ffn_rows: float, way: str
) -> float:
    """Operations of the products of `tokens` tokens, of which FFN experts work on `ffn_rows` rows.

    Args:
      way: "forward" or "forward_backward".
    """
    forward = 2 * tokens * matrices(rule, width, ffn_size) + 6 * ffn_rows * width * ffn_size
    return forward * (1 if way == "forward" else 3)


def bytes_moved(
    rule: moe.Rule, width: int, ffn_size: int, tokens: int, way: str, itemsize: int = 4
) -> int:
    """Forward reads parameters and tokens and writes as many tokens. Backward reads parameters,
    tokens and the gradient of the output, and writes the gradients of parameters and tokens.
    """
    described = param.shapes(moe.describe(rule, width, ffn_size))
    params = sum(math.prod(p.shape) for group in described.values() for p in group.values())
    rows = tokens * width
    forward = params + 2 * rows
    return itemsize * (forward if way == "forward" else forward + 2 * params + 3 * rows)
