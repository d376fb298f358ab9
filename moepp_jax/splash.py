"""Attention on TPU: JAX's splash kernel, which writes no scores to memory and skips empty blocks.

Shapes: the letters of `moepp_jax.block`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
)
from jaxtyping import Array, Float, Int

from moepp_jax.moe.unchecked import unchecked

# What backward keeps beside the arguments has this name in checkpoint policies.
KEPT = "attention"

# The kernel's blocks are multiples of this, and so are the sequences that it is given.
_LANES = 128
# Tokens of a block, at most, and of those that are computed at once.
_BLOCK, _STEP = 1024, 512
# Backward in one kernel stores the queries' gradient once for each block of keys: so many times at
# most. In longer sequences queries have a kernel of their own.
_STORED = 4


def make(window: int, axes: tuple[str, ...] = (), interpret: bool = False) -> Callable:
    """attention(q (B, L, H, W), k, v (B, L, KV, W), segments (B, L)) -> (B, L, H, W).

    Tokens see the earlier ones of their own segment.

    Args:
      window: how many tokens each sees, itself among them; 0: all before.
      axes: of the shard_map around it, if there is one.
      interpret: run without a TPU, slowly: for tests.
    """

    def of_heads(segments, q, k, v):
        ids = _to_whole_blocks(segments, axis=1, value=-1)
        kernel = _kernel(q.shape[1], q.shape[2], window, interpret)
        return jax.vmap(lambda q, k, v, s: kernel(q, k, v, SegmentIds(s, s)))(q, k, v, ids)

    def forward(q, k, v, segments):
        L, scale = q.shape[1], q.shape[-1] ** -0.5
        q = (q.astype(jnp.float32) * scale).astype(q.dtype)
        heads = [_heads_first(x) for x in (q, k, v)]
        y, pullback = jax.vjp(lambda *heads: of_heads(segments, *heads), *heads)
        return _heads_last(y, L), pullback

    def backward(pullback, d_y):
        L, scale = d_y.shape[1], d_y.shape[-1] ** -0.5
        d_q, d_k, d_v = (_heads_last(x, L) for x in pullback(_heads_first(d_y)))
        return (d_q.astype(jnp.float32) * scale).astype(d_q.dtype), d_k, d_v

    forward, backward = (unchecked(f, axes) for f in (forward, backward))

    @jax.custom_vjp
    def attention(
        q: Float[Array, "B L H W"],
        k: Float[Array, "B L KV W"],
        v: Float[Array, "B L KV W"],
        segments: Int[Array, "B L"],
    ) -> Float[Array, "B L H W"]:
        return forward(q, k, v, segments)[0]

    attention.defvjp(forward, lambda pullback, d_y: (*backward(pullback, d_y), None))
    return attention


def _kernel(heads: int, length: int, window: int, interpret: bool) -> Callable:
    """q (H, l, W), k, v (KV, l, W), segment ids -> (H, l, W), of l tokens in whole blocks."""
    square = (length, length)
    mask = LocalMask(square, (window - 1, 0), 0) if window else CausalMask(square)
    return make_splash_mha_single_device(
        MultiHeadMask([mask] * heads),
        block_sizes=_blocks(length),
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )


def _blocks(length: int) -> BlockSizes:
    size = next(s for s in (_BLOCK, 512, 256, _LANES) if length % s == 0)
    step, apart = min(size, _STEP), length > _STORED * size
    return BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=step,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=step,
        block_q_dq=size if apart else None,
        block_kv_dq=size if apart else None,
        use_fused_bwd_kernel=not apart,
    )


def _heads_first(x: Float[Array, "B L H W"]) -> Float[Array, "B H l W"]:
    return _to_whole_blocks(x.swapaxes(1, 2), axis=2, value=0)


def _heads_last(x: Float[Array, "B H l W"], length: int) -> Float[Array, "B L H W"]:
    return x[:, :, :length].swapaxes(1, 2)


def _to_whole_blocks(x: Array, axis: int, value: Any) -> Array:
    """Padded at the end, where no token sees it that is none of it."""
    more = [(0, 0)] * x.ndim
    more[axis] = (0, -x.shape[axis] % _LANES)
    return jnp.pad(x, more, constant_values=value)
