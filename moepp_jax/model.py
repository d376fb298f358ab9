"""The language model: RMSNorm, rotary attention and MoE++ in pre-norm layers, scanned over depth.

Shapes: B sequences, L tokens, D width, H query heads and KV key heads of width W, V vocabulary;
the letters of `moepp_jax.moe` besides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from moepp_jax import mesh as mesh_lib
from moepp_jax import moe as moe_lib
from moepp_jax import vocabulary
from moepp_jax.config import Config, ModelConfig, MoEConfig
from moepp_jax.moe import kernels
from moepp_jax.moe import router as router_lib
from moepp_jax.moe.products import tokens_first

_PROJECT = {1: router_lib.linear, 2: router_lib.two_layer}
_RESIDUAL = {
    "logits": router_lib.add_logits,
    "detached": router_lib.add_detached,
    "none": router_lib.no_residual,
}
_SCORE = {"softmax": router_lib.softmax}
_GATE = {
    "renormalise_nonzero": router_lib.renormalise_nonzero,
    "renormalise_all": router_lib.renormalise_all,
    "raw": router_lib.raw,
    "softmax_selected": router_lib.softmax_selected,
}


def _all_but_weights(primitive, *_, **__) -> bool:
    """Keeps everything for backward, but gathers parameters again: whole, they are another model.

    What only copies them (XLA's or ours) is not kept either; for activations it costs little.
    """
    return primitive.name not in _COPIES


_COPIES = {"all_gather", "convert_element_type", "reshape", "transpose", "squeeze", "pvary"}
# What came over the expert axis: tokens at their experts, and the experts' answers.
_exchanged = jax.checkpoint_policies.save_only_these_names("to_experts", "from_experts")
_REMAT = {
    "none": _all_but_weights,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _exchanged
    ),
    "exchanged": _exchanged,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Output(NamedTuple):
    """What the model computes before the vocabulary.

    Attributes:
      hidden: after the final norm.
      statistics: of every MoE layer's routing, leading axes (layer, group).
      router_logits: of every MoE layer.
      states: the input of every layer: the stack of residual streams.
    """

    hidden: Float[Array, "B L D"]
    statistics: moe_lib.Statistics
    router_logits: Float[Array, "layers B L N"]
    states: Float[Array, "layers B L D"]


def pool_of(c: MoEConfig) -> moe_lib.Pool:
    return moe_lib.Pool(c.n_ffn, c.n_const, c.n_copy, c.n_zero)


def moe_of(c: MoEConfig, dispatch: str, platform: str) -> moe_lib.MoE:
    """The layer that a configuration asks for, with the kernels and exchange of the platform."""
    norm = router_lib.divided_by_deviation(c.logit_norm_std)
    router = moe_lib.Router(
        select=router_lib.top_k(c.top_k),
        project=_PROJECT[c.router_layers],
        residual=_RESIDUAL[c.residual],
        normalise=norm if c.logit_norm else router_lib.as_they_are,
        bias=router_lib.add_bias if c.bias_rate else router_lib.no_bias,
        score=_SCORE[c.score],
        gate=_GATE[c.gate],
    )
    if dispatch == "capacity":
        path = moe_lib.with_capacity(c.tau, c.gamma, exchanged=kernels.exchanged(platform))
    else:
        path = moe_lib.dropless(
            kernels.grouped_function(platform), kernels.move(platform), c.exchange_buffer or None
        )
    return moe_lib.MoE(pool_of(c), router, path, c.input_scale)


def build(config: Config, mesh: Mesh | None = None, dispatch: str | None = None) -> LanguageModel:
    """The model of a configuration.

    Args:
      mesh: the model is to run on a device's part of its parameters and of the batch, inside a
        shard_map on this mesh; None is one device that has all.
      dispatch: "capacity" or "dropless"; by default that of training.
    """
    dispatch = dispatch or config.moe.dispatch
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return LanguageModel(
        config.model,
        moe_of(config.moe, dispatch, platform),
        ffn_size=config.moe.ffn_size,
        group_size=config.moe.group_size if dispatch == "capacity" else None,
        whole=None
        if mesh is None
        else functools.partial(mesh_lib.whole, dtype=jnp.dtype(config.model.dtype)),
        axis="expert" if mesh is not None and mesh.shape["expert"] > 1 else None,
    )


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("norm", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


def rotate(
    x_BLHW: Float[Array, "B L H W"], positions_BL: Int[Array, "B L"], theta: float, scaling: float
) -> Float[Array, "B L H W"]:
    """Rotary position embedding, rotate-half convention: pairs are (i, i + W/2).

    Positions are divided by `scaling`.
    """
    W = x_BLHW.shape[-1]
    frequency = theta ** (-jnp.arange(0, W, 2, dtype=jnp.float32) / W)
    angle = positions_BL[..., None, None].astype(jnp.float32) / scaling * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x_BLHW.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x_BLHW.dtype)


class Attention(nn.Module):
    """Multi-head or grouped-query attention with rotary positions, and normalised queries and keys.

    What is attended to is the caller's affair: `attend` takes queries (B, L, H, W), keys and values
    (B, L, KV, W) to (answers (B, L, H, W), what it keeps), and the latter is handed on.

    Attributes:
      product: (x (B, L, D), w (F, D)) -> x W^T.
    """

    config: ModelConfig
    product: Callable = tokens_first

    @nn.compact
    def __call__(self, x_BLD, positions_BL, attend):
        c = self.config
        D, H, KV, W = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_width
        matrix = nn.initializers.normal(c.init_std)

        def project(name, heads):
            w = self.param(name, matrix, (heads * W, D), jnp.float32).astype(x_BLD.dtype)
            return self.product(x_BLD, w).reshape(*x_BLD.shape[:2], heads, W)

        def placed(name, heads):
            x_BLHW = project(name, heads)
            if c.qk_norm != "none":
                rows = x_BLHW if c.qk_norm == "head" else x_BLHW.reshape(*x_BLD.shape[:2], -1)
                x_BLHW = RMSNorm(c.norm_eps, name=f"{name}_norm")(rows).reshape(x_BLHW.shape)
            return rotate(x_BLHW, positions_BL, c.rope_theta, c.rope_scaling)

        y, kept = attend(placed("q", H), placed("k", KV), project("v", KV))
        o = self.param("o", matrix, (D, H * W), jnp.float32).astype(x_BLD.dtype)
        return self.product(y.reshape(*y.shape[:2], H * W), o), kept


def attend_to_each_other(mask_BLL: Bool[Array, "B L L"]) -> Callable:
    """For `Attention`: the tokens see each other where the mask says so; nothing is kept."""

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=mask_BLL[:, None]), None

    return attend


class DenseFFN(nn.Module):
    """One SwiGLU for all tokens: an expert function with a single expert."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BLD):
        c = self.config
        matrix = nn.initializers.normal(c.init_std)
        D, F = c.hidden_size, c.dense_ffn_size
        params = {
            "w_in": self.param("w_in", matrix, (2, F, D), jnp.float32),
            "w_out": self.param("w_out", matrix, (D, F), jnp.float32),
        }
        params = jax.tree.map(lambda p: p[None].astype(x_BLD.dtype), params)
        return moe_lib.swiglu(params, x_BLD.reshape(1, -1, D)).reshape(x_BLD.shape)


class Block(nn.Module):
    """What the model repeats: moe_every - 1 dense layers, then one MoE++ layer."""

    config: ModelConfig
    moe: moe_lib.MoE
    ffn_size: int
    group_size: int | None
    axis: str | None

    @nn.compact
    def __call__(self, carry, positions_BL, mask_BLL):
        x, previous_BLN = carry
        c, L = self.config, x.shape[1]
        attend = attend_to_each_other(mask_BLL)
        states = []
        for i in range(c.moe_every):
            states.append(x)
            prefix = "" if i == c.moe_every - 1 else f"dense_{i}_"
            attention = Attention(c, name=prefix + "attention")
            h = RMSNorm(c.norm_eps, name=prefix + "attention_norm")(x)
            x += attention(h, positions_BL, attend)[0]
            h = RMSNorm(c.norm_eps, name=prefix + "ffn_norm")(x)
            if i < c.moe_every - 1:
                x += DenseFFN(c, name=prefix + "dense")(h)
        moe = moe_lib.MoEPP(
            self.moe,
            ffn_size=self.ffn_size,
            group_size=self.group_size or L,
            axis=self.axis,
            init_std=c.init_std,
            dtype=x.dtype,
            name="moe",
        )
        y, logits_BLN, stats = moe(h, previous_BLN)
        x += y
        return (x, logits_BLN), (stats, logits_BLN, jnp.stack(states))


class LanguageModel(nn.Module):
    """Tokens to hidden states; `vocabulary` takes those to logits and losses.

    Attributes:
      group_size: tokens that share a capacity; None, for dropless dispatch, is the sequence.
      whole: puts a subtree of parameters together, of which each device has a part: applied here to
        a layer's when it runs, and by `unite` to the others. None: the parameters are whole.
      axis: mesh axis over which the FFN experts are sharded.
    """

    config: ModelConfig
    moe: moe_lib.MoE
    ffn_size: int
    group_size: int | None = None
    whole: Callable[[Any], Any] | None = None
    axis: str | None = None

    @nn.compact
    def __call__(
        self,
        tokens_BL: Int[Array, "B L"],
        positions_BL: Int[Array, "B L"],
        mask_BLL: Bool[Array, "B L L"],
    ) -> Output:
        """Runs all layers.

        Args:
          positions_BL: of the tokens in their documents, for the rotary embedding.
          mask_BLL: which of the tokens each may see.
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        matrix = nn.initializers.normal(c.init_std)
        embedding = self.param("embedding", matrix, (c.vocab_size, c.hidden_size), jnp.float32)
        if not c.tied_embeddings:
            self.param("output", matrix, (c.vocab_size, c.hidden_size), jnp.float32)
        x = vocabulary.look_up(embedding, tokens_BL, dtype)
        no_logits = jnp.zeros((*tokens_BL.shape, self.moe.pool.size), jnp.float32)
        if self.whole is not None:
            # In a shard_map, what a scan carries must vary over the devices from the start.
            no_logits = jax.lax.pcast(no_logits, mesh_lib.AXES, to="varying")

        blocks = nn.scan(
            self._block(),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=c.num_layers // c.moe_every,
        )(c, self.moe, self.ffn_size, self.group_size, self.axis, name="layers")
        (x, _), (stats, logits, states) = blocks((x, no_logits), positions_BL, mask_BLL)
        hidden = RMSNorm(c.norm_eps, name="final")(x)
        return Output(hidden, stats, logits, states.reshape(c.num_layers, *x.shape))

    def _block(self) -> type[nn.Module]:
        """A block that gathers its parameters, and gathers or computes them again in backward."""
        block, remat = Block, self.config.remat
        if self.whole is not None:
            block = nn.map_variables(block, "params", lambda v: {"params": self.whole(v["params"])})
        if self.whole is not None or remat != "none":
            block = nn.remat(block, policy=_REMAT[remat], prevent_cse=False)
        return block


def init(model: LanguageModel, key: Array) -> dict[str, Any]:
    """Fresh parameters, a plain nested dictionary, of a model built for one device."""
    L = model.group_size or 1
    tokens = jnp.zeros((1, L), jnp.int32)
    return model.init(key, tokens, tokens, jnp.ones((1, L, L), bool))["params"]


def unite(model: LanguageModel, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters as `apply` and `vocabulary` want them: all that are outside the layers whole.

    In a shard_map; on one device they are so already.
    """
    if model.whole is None:
        return params
    outside = {name: p for name, p in params.items() if name != "layers"}
    return model.whole(outside) | {"layers": params["layers"]}


def packed_mask(segments_BL: Int[Array, "B L"]) -> Bool[Array, "B L L"]:
    """Causal, and within a document: tokens see the earlier ones of their own segment.

    Under capacity the documents of a group still share its slots, earlier ones first.
    """
    L = segments_BL.shape[1]
    same = segments_BL[:, :, None] == segments_BL[:, None, :]
    return same & jnp.tril(jnp.ones((L, L), bool))
