"""The language model one layer after the other, each with arrays of its own, and its cache.

`model.LanguageModel` scans over stacked layers, which compiles fast and differentiates. Generation
reads every parameter for every token and does little else: there each array is to be read where it
lies. On CPU XLA copies what it cuts out of a stack, so layers, and experts too, lie apart.

Shapes: as in `model`, and M places of a cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from moepp_jax import mesh as mesh_lib
from moepp_jax import moe as moe_lib
from moepp_jax.block import Arithmetic, Attend, Block, attend_to_each_other, rms_norm
from moepp_jax.config import ModelConfig
from moepp_jax.model import LanguageModel
from moepp_jax.moe import Param, kernels, param
from moepp_jax.moe.experts import one_swiglu

Params = dict[str, Any]


class Cache(NamedTuple):
    """Keys and values of one layer, of the key heads of each sequence, one after the other.

    This is how products over a batch of heads read them: of any other shape XLA on CPU makes copies
    of the cache, at every step.
    """

    keys: Float[Array, "B*KV M W"]
    values: Float[Array, "B*KV M W"]


def described(model: LanguageModel, experts: bool) -> dict[str, Any]:
    """What `taken_apart` gives, as a tree of Param."""
    layer = model.block.describe()
    if experts:  # on one device, which they are not cut over
        one = {
            name: replace(p, shape=p.shape[1:], cut=None, expert=None)
            for name, p in layer["moe"]["ffn"].items()
        }
        layer["moe"] = layer["moe"] | {"ffn": [one] * model.rule.pool.n_ffn}
    return model.outside | {"layers": [layer] * model.num_blocks}


def taken_apart(
    params: Params,
    model: LanguageModel,
    experts: bool,
    mesh: Mesh | None = None,
    use_up: bool = False,
) -> Params:
    """The parameters with a list of layers, each a tree of its own, in the types of their use.

    Args:
      experts: the FFN experts of a layer become a list as well.
      mesh: over which the parameters are cut, and stay so.
      use_up: each array is deleted when its copy is there, so that one alone is ever held twice.
    """
    dtype = jnp.dtype(model.config.dtype)

    def copied(leaf, p: Param, layers: int):
        """The array, or a list of its layers, of which each is as described."""

        def make(leaf):
            if not layers:
                return param.used(p, leaf, dtype)
            parts = [param.used(p, leaf[i], dtype) for i in range(layers)]
            return [list(part) for part in parts] if experts and p.expert is not None else parts

        sharding = None if mesh is None else NamedSharding(mesh, mesh_lib.spec_of(p))
        copy = jax.block_until_ready(jax.jit(make, out_shardings=sharding)(leaf))
        if use_up:
            leaf.delete()
        return copy

    def outside(p, leaf):
        same = leaf.dtype == jax.eval_shape(lambda a: param.used(p, a, dtype), leaf).dtype
        return leaf if same else copied(leaf, p, 0)

    apart = jax.tree.map(outside, model.outside, {name: params[name] for name in model.outside})
    block = model.block.describe()
    stacks = jax.tree.map(
        lambda p, leaf: copied(leaf, p, model.num_blocks), block, params["layers"]
    )

    def layer(i):
        mine = jax.tree.map(lambda _, copy: copy[i], block, stacks)
        if experts:
            ffn = mine["moe"]["ffn"]
            each = [dict(zip(ffn, one, strict=True)) for one in zip(*ffn.values(), strict=True)]
            mine["moe"]["ffn"] = each
        return mine

    return apart | {"layers": [layer(i) for i in range(model.num_blocks)]}


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


def into_new(mask_BLL: Bool[Array, "B L L"], places: int) -> Attend:
    """A prompt: its tokens see each other, and fill the first of `places` places."""

    def attend(q, k, v):
        y, _ = attend_to_each_other(mask_BLL)(q, k, v)
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
    """

    model: LanguageModel
    platform: str

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def experts_apart(self) -> bool:
        return not self.model.sharded and kernels.experts_apart(self.platform)

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
        model, pool = self.model, self.model.rule.pool
        block, of_block = self._block(tokens_BL.size), self.model.block.describe()
        outside = model.whole_outside(params)
        x = outside["embedding"][tokens_BL]
        previous = jnp.zeros((*tokens_BL.shape, pool.size), jnp.float32)
        caches, attends = [], iter(attends)
        ffn_experts, experts_read = jnp.zeros(len(x)), jnp.zeros(())
        for mine in params["layers"]:
            # Experts that lie apart are no tree like the description, and whole already.
            mine = mine if self.experts_apart else model.whole(of_block, mine)
            of_this = itertools.islice(attends, self.config.moe_every)
            out = block(mine, x, previous, positions_BL, of_this)
            x, previous = out.x, out.routed.routing.logits
            caches += out.kept
            load_BE = out.routed.statistics.load[:, : pool.n_ffn]
            ffn_experts += jnp.sum(load_BE, axis=1) * tokens_BL.shape[1]
            experts_read += jnp.sum(jnp.any(load_BE > 0, axis=0))
        hidden = rms_norm(outside["final"], x[:, -1], self.config.norm_eps)
        matrix = outside.get("output", outside["embedding"])
        logits = kernels.product(self.platform)(hidden, matrix, jnp.float32)
        return Work(logits, caches, ffn_experts, experts_read)

    def on_any_device(self, flags: Bool[Array, " B"]) -> Bool[Array, ""]:
        """Whether a flag is set, the same on all devices of the mesh."""
        here = jnp.any(flags)
        return jax.lax.pmax(here, mesh_lib.AXES) if self.model.sharded else here

    def _block(self, tokens: int) -> Block:
        """The block that reads no expert which nobody chose; on a mesh, that of training."""
        product = kernels.product(self.platform)
        by = Arithmetic(product=product, dense=one_swiglu(product))
        block = replace(self.model.block, by=by)
        if self.model.sharded:
            return block
        grouped = kernels.reading_chosen(self.platform, tokens)
        return replace(block, moe=replace(block.moe, path=moe_lib.dropless(grouped)))
