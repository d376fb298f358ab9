"""What the model repeats: RMSNorm, attention and MoE++ in pre-norm layers, as functions.

Training scans over blocks, generation walks through them with a cache: both run this one. What a
part is made of is described beside what it computes.

Shapes: B sequences, L tokens, D width, H query heads and KV key heads of width W; the letters of
`moepp_jax.moe` besides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moepp_jax import moe as moe_lib
from moepp_jax import rotary
from moepp_jax.config import ModelConfig
from moepp_jax.moe import Param
from moepp_jax.moe.layouts import as_written
from moepp_jax.moe.products import any_axes, tokens_first

Params = dict[str, Any]

# (queries (B, L, H, W), keys, values (B, L, KV, W)) -> (answers (B, L, H, W), what it keeps)
Attend = Callable[..., tuple[Float[Array, "B L H W"], Any]]


def describe_norm(width: int, cut: bool = True) -> Params:
    return {"norm": Param((width,), mean=1.0, cut=0 if cut else None, decay=False, float32=True)}


def rms_norm(params: Params, x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    """x / rms(x) * scale, in float32."""
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * params["norm"]).astype(x.dtype)


def rms_norm_as_written(params: Params, x: Float[Array, "*B D"], eps: float):
    """As `rms_norm`, for TPUs, whose compiler would turn what attention's products read, and copy
    it for everything else.
    """
    return as_written(rms_norm(params, x, eps))


# (mask, places of its queries, places of its keys) -> the mask
Sight = Callable[..., Bool[Array, "*B"]]


def sight(c: ModelConfig) -> Sight:
    """How far back tokens see: leaves of a mask what is in their sliding window."""

    def of_all(mask, query, key):
        return mask

    def of_window(mask, query, key):
        return mask & (query - key < c.sliding_window)

    return of_window if c.sliding_window else of_all


def describe_attention(c: ModelConfig) -> Params:
    """Matrices as (H W, D), and norms of queries and keys, whose width need not divide."""
    D, W, std = c.hidden_size, c.head_width, c.init_std
    heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
    described = {name: Param((H * W, D), std, cut=0) for name, H in heads.items()}
    described["o"] = Param((D, c.num_heads * W), std, cut=0)
    if c.qk_norm != "none":
        for name in ("q", "k"):
            width = W if c.qk_norm == "head" else heads[name] * W
            described[f"{name}_norm"] = describe_norm(width, cut=False)
    return described


@jax.named_scope("attention")
def attention(
    c: ModelConfig,
    params: Params,
    x_BLD: Float[Array, "B L D"],
    positions_BL: Int[Array, "B L"],
    attend: Attend,
    by: Arithmetic,
) -> tuple[Float[Array, "B L D"], Any]:
    """Multi-head or grouped-query attention with rotary positions, and normalised queries and keys.

    What is attended to is the affair of `attend`; what it keeps is handed on.
    """
    B, L, _ = x_BLD.shape
    W = c.head_width
    turn = rotary.ANGLES[c.rope_type]
    angle_BL1 = turn(c, positions_BL[..., None].astype(jnp.float32))

    def placed(name, heads):
        rows = by.product(x_BLD, params[name])
        if c.qk_norm == "head":
            rows = rows.reshape(B, L, heads, W)
        if c.qk_norm != "none":
            rows = rms_norm(params[f"{name}_norm"], rows, c.norm_eps)
        return by.rotate(rows.reshape(B, L, heads, W), angle_BL1)

    q, k = placed("q", c.num_heads), placed("k", c.num_kv_heads)
    v = by.product(x_BLD, params["v"]).reshape(B, L, c.num_kv_heads, W)
    q, k, v = (checkpoint_name(heads, "qkv") for heads in (q, k, v))
    with jax.named_scope("attention_core"):
        y, kept = attend(q, k, v)
    return by.product(y.reshape(B, L, -1), params["o"]), kept


def attend_to_each_other(mask_BLL: Bool[Array, "B L L"]) -> Attend:
    """The tokens see each other where the mask says so; nothing is kept."""

    def attend(q, k, v):
        y = jax.nn.dot_product_attention(q, k, v, mask=mask_BLL[:, None])
        return checkpoint_name(y, "attention"), None

    return attend


def describe_dense(c: ModelConfig) -> Params:
    D, F, std = c.hidden_size, c.dense_ffn_size, c.init_std
    return {"w_in": Param((2, F, D), std, cut=1), "w_out": Param((D, F), std, cut=0)}


def dense(params: Params, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """One SwiGLU for all tokens: an expert function with a single expert."""
    params = jax.tree.map(lambda p: p[None], params)
    return moe_lib.swiglu(params, x_BLD.reshape(1, -1, x_BLD.shape[-1])).reshape(x_BLD.shape)


class Arithmetic(NamedTuple):
    """How a platform computes what a block is made of; the defaults do on every one.

    Attributes:
      product: (x (*B, D), w (F, D)) -> x W^T.
      norm: as `rms_norm`.
      rotate: as `rotary.rotate`.
      dense: as the function of this name.
    """

    product: Callable = tokens_first
    norm: Callable = rms_norm
    rotate: Callable = rotary.rotate
    dense: Callable = dense


PLAIN = Arithmetic()
# A TPU's compiler, left alone, writes and copies heads several times, in other orders.
ON_TPU = Arithmetic(any_axes, rms_norm_as_written, rotary.rotate_by_product)


class BlockOutput(NamedTuple):
    """What a block computes.

    Attributes:
      x: the residual stream.
      routed: by the MoE layer: the tokens' arrays as (B, L), the statistics' leading axis the
        groups.
      states: the input of every layer.
      kept: of every layer, what its `attend` keeps.
    """

    x: Float[Array, "B L D"]
    routed: moe_lib.Routed
    states: list[Float[Array, "B L D"]]
    kept: list[Any]


@dataclasses.dataclass(frozen=True)
class Block:
    """moe_every - 1 dense layers, then one MoE++ layer.

    Attributes:
      ffn_size: F, of the FFN experts.
      group_size: S, tokens that share a capacity; None, for dropless dispatch, is the sequence.
      axis: mesh axis over which the FFN experts are sharded.
      by: how its parts are computed.
    """

    config: ModelConfig
    moe: moe_lib.MoE
    ffn_size: int
    group_size: int | None = None
    axis: str | None = None
    by: Arithmetic = PLAIN

    @property
    def prefixes(self) -> list[str]:
        """Of the layers' parameters; the last layer is the MoE++ one."""
        return [f"dense_{i}_" for i in range(self.config.moe_every - 1)] + [""]

    def describe(self) -> Params:
        """The block's parameters."""
        c, described = self.config, {}
        for prefix in self.prefixes:
            described[f"{prefix}attention"] = describe_attention(c)
            described[f"{prefix}attention_norm"] = describe_norm(c.hidden_size)
            described[f"{prefix}ffn_norm"] = describe_norm(c.hidden_size)
            if prefix:
                described[f"{prefix}dense"] = describe_dense(c)
        sizes, spread = (c.hidden_size, self.ffn_size), (c.init_std, c.const_std)
        layer = moe_lib.describe(self.moe.rule, *sizes, *spread)
        return described | {"moe": layer}

    def __call__(
        self,
        params: Params,
        x: Float[Array, "B L D"],
        previous_BLN: Float[Array, "B L N"],
        positions_BL: Int[Array, "B L"],
        attends: Iterator[Attend] | Sequence[Attend],
    ) -> BlockOutput:
        """
        Args:
          params: of `describe`, each in the type in which it is used.
          attends: one for each layer.
        """
        states, kept = [], []
        for prefix, attend in zip(self.prefixes, attends, strict=False):
            states.append(x)
            h = self._norm(params[f"{prefix}attention_norm"], x)
            y, held = attention(
                self.config, params[f"{prefix}attention"], h, positions_BL, attend, self.by
            )
            kept.append(held)
            x = checkpoint_name(x + y, "residual")
            h = self._norm(params[f"{prefix}ffn_norm"], x)
            if prefix:
                x += self.by.dense(params[f"{prefix}dense"], h)
        y, routed = self._moe(params["moe"], h, previous_BLN)
        return BlockOutput(x + y, routed, states, kept)

    def _moe(self, params, x_BLD, previous_BLN):
        size = self.group_size or x_BLD.shape[1]
        grouped = (a.reshape(-1, size, a.shape[-1]) for a in (x_BLD, previous_BLN))
        y, (routing, kept, statistics) = moe_lib.routed(*grouped, params, self.moe, self.axis)
        y, routing, kept = jax.tree.map(
            lambda a: a.reshape(*x_BLD.shape[:2], a.shape[-1]), (y, routing, kept)
        )
        return y, moe_lib.Routed(routing, kept, statistics)

    def _norm(self, params, x):
        return self.by.norm(params, x, self.config.norm_eps)
