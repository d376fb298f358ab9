"""The language model one layer after the other, each with arrays of its own, and its cache.

`model.LanguageModel` scans over stacked layers, which compiles fast and differentiates. Generation
reads every parameter for every token and does little else: there each array is to be read where it
lies. On CPU XLA copies what it cuts out of a stack, so layers, and experts too, lie apart.

Shapes: as in `model`, and M places of a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from moepp_jax import mesh as mesh_lib
from moepp_jax import model as model_lib
from moepp_jax import moe as moe_lib
from moepp_jax.config import ModelConfig
from moepp_jax.moe import kernels
from moepp_jax.moe.experts import one_swiglu

Params = dict[str, Any]


class Cache(NamedTuple):
    """Keys and values of one layer, of the key heads of each sequence, one after the other.

    This is how products over a batch of heads read them: of any other shape XLA on CPU makes copies
    of the cache, at every step.
    """

    keys: Float[Array, "B*KV M W"]
    values: Float[Array, "B*KV M W"]


def taken_apart(
    params: Params,
    config: ModelConfig,
    experts: bool,
    mesh: Mesh | None = None,
    use_up: bool = False,
) -> Params:
    """The parameters with a list of layers, each a tree of its own, in the dtype of arithmetic.

    Args:
      experts: the FFN experts of a layer become a list as well.
      mesh: over which the parameters are cut, and stay so.
      use_up: each array is deleted when its copy is there, so that one alone is ever held twice.
    """
    dtype = jnp.dtype(config.dtype)
    num_layers = config.num_layers // config.moe_every

    def made(key_path, leaf):
        path = mesh_lib.path_of(key_path)
        used_in = mesh_lib.used_in(path, dtype)
        stacked, with_experts = path.startswith("layers/"), experts and "/ffn/" in path
        if not stacked and leaf.dtype == used_in:
            return leaf

        def make(p):
            p = p.astype(used_in)
            if not stacked:
                return p
            return [list(p[i]) if with_experts else p[i] for i in range(num_layers)]

        spec = mesh_lib.spec_of(path, leaf.ndim - stacked)
        sharding = None if mesh is None else NamedSharding(mesh, spec)
        copy = jax.block_until_ready(jax.jit(make, out_shardings=sharding)(leaf))
        if use_up:
            leaf.delete()
        return copy

    copies = jax.tree_util.tree_map_with_path(made, params)

    def layer(i):
        mine = jax.tree.map(lambda _, copy: copy[i], params["layers"], copies["layers"])
        if experts:
            ffn = mine["moe"]["ffn"]
            apart = [dict(zip(ffn, one, strict=True)) for one in zip(*ffn.values(), strict=True)]
            mine["moe"]["ffn"] = apart
        return mine

    return copies | {"layers": [layer(i) for i in range(num_layers)]}


class Work(NamedTuple):
    """What one call computed.

    Attributes:
      logits: after the last token of each sequence, in float32.
      caches: of every layer.
      ffn_experts: FFN experts that each sequence's tokens chose, summed over tokens and MoE layers.
      experts_read: FFN experts that any token chose, summed over MoE layers.
    """

    logits: Float[Array, "B V"]
    caches: list[Cache]
    ffn_experts: Float[Array, " B"]
    experts_read: Float[Array, ""]


# (queries (B, L, H, W), keys, values (B, L, KV, W)) -> (answers (B, L, H, W), the cache)
Attend = Callable[..., tuple[Array, Cache]]


def into_new(mask_BLL: Bool[Array, "B L L"], places: int) -> Attend:
    """A prompt: its tokens see each other, and fill the first of `places` places."""

    def attend(q, k, v):
        y, _ = model_lib.attend_to_each_other(mask_BLL)(q, k, v)
        rest = [(0, 0), (0, places - k.shape[1]), (0, 0)]
        return y, Cache(*(jnp.pad(_by_head(a), rest) for a in (k, v)))

    return attend


def into_place(cache: Cache, place: Int[Array, ""], mask_BM: Bool[Array, "B M"]) -> Attend:
    """One token a sequence: put at its place, it sees the places that the mask says."""

    def attend(q_B1HW, k_B1KW, v_B1KW):
        put = jax.lax.dynamic_update_slice_in_dim
        keys_HMW = put(cache.keys, _by_head(k_B1KW), place, axis=1)
        values_HMW = put(cache.values, _by_head(v_B1KW), place, axis=1)
        heads, _, W = keys_HMW.shape
        q_HGW = q_B1HW.reshape(heads, -1, W)  # G queries share a key head
        scores = jnp.einsum("hgw,hmw->hgm", q_HGW, keys_HMW, preferred_element_type=jnp.float32)
        mask = jnp.repeat(mask_BM, heads // len(mask_BM), axis=0)[:, None]
        scores = jnp.where(mask, scores * W**-0.5, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(values_HMW.dtype)
        y_HGW = jnp.einsum("hgm,hmw->hgw", weights, values_HMW)
        return y_HGW.reshape(q_B1HW.shape), Cache(keys_HMW, values_HMW)

    return attend


def _by_head(x_BLKW: Float[Array, "B L KV W"]) -> Float[Array, "B*KV L W"]:
    B, L, heads, W = x_BLKW.shape
    return x_BLKW.swapaxes(1, 2).reshape(B * heads, L, W)


@dataclass(frozen=True)
class Layers:
    """The model as a function of its parameters taken apart.

    Attributes:
      platform: of the device, which says how products are taken.
      whole, axis: as of `model.LanguageModel`.
    """

    config: ModelConfig
    moe: moe_lib.MoE
    platform: str
    whole: Callable[[Any], Any] | None = None
    axis: str | None = None

    @property
    def experts_apart(self) -> bool:
        return self.whole is None and kernels.experts_apart(self.platform)

    def __call__(
        self,
        params: Params,
        tokens_BL: Int[Array, "B L"],
        positions_BL: Int[Array, "B L"],
        attends: Sequence[Attend],
    ) -> Work:
        """
        Args:
          attends: for each layer.
        """
        product = kernels.product(self.platform)
        moe = self._moe_for(tokens_BL.size)
        gather = self.whole or (lambda tree: tree)
        outside = gather({name: p for name, p in params.items() if name != "layers"})
        x = outside["embedding"][tokens_BL]
        previous = jnp.zeros((*tokens_BL.shape, moe.pool.size), jnp.float32)
        caches, attends = [], iter(attends)
        ffn_experts, experts_read = jnp.zeros(len(x)), jnp.zeros(())
        for mine in params["layers"]:
            mine = gather(mine)
            for i in range(self.config.moe_every):
                last = i == self.config.moe_every - 1
                prefix = "" if last else f"dense_{i}_"
                h = self._norm(mine[prefix + "attention_norm"], x)
                attention = model_lib.Attention(self.config, product)
                h, cache = attention.apply(
                    {"params": mine[prefix + "attention"]}, h, positions_BL, next(attends)
                )
                caches.append(cache)
                x += h
                h = self._norm(mine[prefix + "ffn_norm"], x)
                if last:
                    y, previous, stats = moe_lib.local(h, previous, mine["moe"], moe, self.axis)
                    load_BE = stats.load[:, : moe.pool.n_ffn]
                    ffn_experts += jnp.sum(load_BE, axis=1) * tokens_BL.shape[1]
                    experts_read += jnp.sum(jnp.any(load_BE > 0, axis=0))
                else:
                    y = one_swiglu(product)(mine[prefix + "dense"], h)
                x += y
        hidden = self._norm(outside["final"], x[:, -1])
        matrix = outside.get("output", outside["embedding"])
        logits = product(hidden, matrix, jnp.float32)
        return Work(logits, caches, ffn_experts, experts_read)

    def on_any_device(self, flags: Bool[Array, " B"]) -> Bool[Array, ""]:
        """Whether a flag is set, the same on all devices of the mesh."""
        here = jnp.any(flags)
        return here if self.whole is None else jax.lax.pmax(here, mesh_lib.AXES)

    def _norm(self, params, x):
        return model_lib.RMSNorm(self.config.norm_eps).apply({"params": params}, x)

    def _moe_for(self, tokens: int) -> moe_lib.MoE:
        """The layer that reads no expert which nobody chose; on a mesh, that of training."""
        if self.whole is not None:
            return self.moe
        grouped = kernels.reading_chosen(self.platform, tokens)
        return replace(self.moe, path=moe_lib.dropless(grouped))
