"""Parameters and floating-point operations of a configuration, counted by hand.

A product of (a, b) with (b, c) is 2 a b c operations; everything else is left out, as is customary.
Backward costs twice forward. Attention is counted over the whole sequence, causal, in a window or
not: that is what is computed, and then masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax

from moepp_jax import chips, model
from moepp_jax.config import Config
from moepp_jax.moe import Param, capacity
from moepp_jax.moe.param import path_of

# Dense bfloat16 peak of one chip in FLOP/s, by what JAX calls it.
PEAK = {kind: chip.flops for chip in chips.CHIPS.values() for kind in chip.kinds}


class Parameters(NamedTuple):
    """Total, and the most that one token passes through (K FFN experts a layer)."""

    total: int
    active: int


class Flops(NamedTuple):
    """Forward operations of one token, by what does them."""

    attention: float
    router: float
    ffn_experts: float
    zero_computation: float
    dense_ffn: float
    vocabulary: float

    @property
    def forward(self) -> float:
        return sum(self)

    @property
    def train(self) -> float:
        """Forward and backward, without what remat recomputes."""
        return 3 * self.forward


def parameters(config: Config) -> Parameters:
    total = count(config)
    experts = count(config, lambda path, p: p.expert is not None)
    idle = max(1 - config.moe.rule.most / config.moe.n_ffn, 0)
    return Parameters(total, total - round(idle * experts))


def count(config: Config, which: Callable[[str, Param], bool] = lambda path, p: True) -> int:
    """The numbers in the parameters.

    Args:
      which: (path, Param) -> whether to count this one.
    """
    described = jax.tree_util.tree_leaves_with_path(model.describe(config))
    return sum(math.prod(p.shape) for path, p in described if which(path_of(path), p))


def cost_ratio(config: Config, than: Config) -> float:
    """FFN work at balance relative to another model's, by theory (paper, section 3.4)."""
    return config.moe.rule.ffn_load / than.moe.rule.ffn_load


def per_token(config: Config, ffn_experts: float | None = None) -> Flops:
    """Forward operations of one token: two for each number in the matrices that it meets.

    Args:
      ffn_experts: FFN experts that a token visits on average; by default those that the rule has at
        balance. `executed_ffn_experts` counts the padding of capacity too.
    """
    m, e = config.model, config.moe
    ffn_experts = e.rule.ffn_load if ffn_experts is None else ffn_experts

    def of(*parts: str) -> int:
        def meant(path: str, p: Param) -> bool:
            is_vector = len(p.shape) - path.startswith("layers/") < 2 and "const" not in path
            return not is_vector and any(part in path for part in parts)

        return 2 * count(config, meant)

    scores = 4 * config.data.seq_len * m.num_heads * m.head_width
    return Flops(
        attention=of("attention/") + m.num_layers * scores,
        router=of("moe/router/"),
        ffn_experts=of("moe/ffn/") * ffn_experts / e.n_ffn,
        zero_computation=of("moe/const/"),
        dense_ffn=of("_dense/"),
        vocabulary=2 * m.vocab_size * m.hidden_size,
    )


def executed_ffn_experts(config: Config) -> float:
    """FFN experts a token that the hardware computes under capacity: slots, filled or not."""
    e = config.moe
    slots = max(capacity(e.rule.load, e.gamma, e.group_size)[: e.n_ffn])
    return e.n_ffn * slots / e.group_size


def utilisation(flops_per_second: float, device_kind: str, num_devices: int) -> float | None:
    """Model FLOPs utilisation (MFU), None where the chip's peak is not known."""
    peak = PEAK.get(device_kind)
    return flops_per_second / (peak * num_devices) if peak else None
