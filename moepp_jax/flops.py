"""Parameters and floating-point operations of a configuration, counted by hand.

A product of (a, b) with (b, c) is 2 a b c operations; everything else is left out, as is customary.
Backward costs twice forward. Attention is counted over the whole sequence, causal or not.
"""

from __future__ import annotations

from typing import NamedTuple

from moepp_jax import chips
from moepp_jax.config import Config, ModelConfig
from moepp_jax.model import pool_of
from moepp_jax.moe import capacity

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
    m, e = config.model, config.moe
    D, N = m.hidden_size, e.num_experts
    moe_layers = m.num_layers // m.moe_every
    expert = 3 * D * e.ffn_size
    gate = N * D if e.router_layers == 1 else 8 * N * D + 8 * N * N
    residual = N * N if e.residual != "none" else 0
    bias = N if e.bias_rate else 0
    moe_layer = e.n_ffn * expert + e.n_const * 3 * D + gate + residual + bias
    attention = 2 * D * m.head_width * (m.num_heads + m.num_kv_heads) + _qk_norms(m)
    total = (
        m.vocab_size * D * (1 if m.tied_embeddings else 2)
        + m.num_layers * (attention + 2 * D)
        + moe_layers * moe_layer
        + (m.num_layers - moe_layers) * 3 * D * m.dense_ffn_size
        + D
    )
    idle = max(e.n_ffn - e.top_k, 0) * expert
    return Parameters(total, total - moe_layers * idle)


def _qk_norms(m: ModelConfig) -> int:
    heads = {"none": 0, "head": 2, "full": m.num_heads + m.num_kv_heads}
    return heads[m.qk_norm] * m.head_width


def ffn_experts_at_balance(config: Config) -> float:
    """FFN experts a token at the balance point: K tau N_FFN / (tau N_FFN + N_ZC)."""
    e, pool = config.moe, pool_of(config.moe)
    return e.top_k * e.tau * e.n_ffn / (e.tau * e.n_ffn + pool.n_zero_computation)


def cost_ratio(config: Config) -> float:
    """FFN work relative to a vanilla MoE's, by theory (paper, section 3.4)."""
    return ffn_experts_at_balance(config) / config.moe.top_k


def per_token(config: Config, ffn_experts: float | None = None) -> Flops:
    """Forward operations of one token.

    Args:
      ffn_experts: FFN experts that a token visits on average; by default those that the balance
        point promises. `executed_ffn_experts` counts the padding of capacity too.
    """
    m, e = config.model, config.moe
    D, N = m.hidden_size, e.num_experts
    moe_layers = m.num_layers // m.moe_every
    ffn_experts = ffn_experts_at_balance(config) if ffn_experts is None else ffn_experts
    projections = 4 * D * m.head_width * (m.num_heads + m.num_kv_heads)
    scores = 4 * config.data.seq_len * m.num_heads * m.head_width
    gate = 2 * N * D if e.router_layers == 1 else 16 * N * D + 16 * N * N
    residual = 2 * N * N if e.residual != "none" else 0
    return Flops(
        attention=m.num_layers * (projections + scores),
        router=moe_layers * (gate + residual),
        ffn_experts=moe_layers * ffn_experts * 6 * D * e.ffn_size,
        zero_computation=moe_layers * 6 * e.n_const * D,
        dense_ffn=(m.num_layers - moe_layers) * 6 * D * m.dense_ffn_size,
        vocabulary=2 * m.vocab_size * D,
    )


def executed_ffn_experts(config: Config) -> float:
    """FFN experts a token that the hardware computes under capacity: slots, filled or not."""
    e = config.moe
    slots = capacity(pool_of(e), e.tau, e.gamma, e.group_size, e.top_k)[0]
    return e.n_ffn * slots / e.group_size


def utilisation(flops_per_second: float, device_kind: str, num_devices: int) -> float | None:
    """Model FLOPs utilisation (MFU), None where the chip's peak is not known."""
    peak = PEAK.get(device_kind)
    return flops_per_second / (peak * num_devices) if peak else None
