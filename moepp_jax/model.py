"""The language model: blocks scanned over depth, between an embedding and an output matrix.

Shapes: V vocabulary; the letters of `moepp_jax.block` and `moepp_jax.moe` besides.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from moepp_jax import attend, remat, vocabulary
from moepp_jax import mesh as mesh_lib
from moepp_jax import moe as moe_lib
from moepp_jax.block import ON_TPU, PLAIN, Block, describe_norm, rms_norm
from moepp_jax.config import Config, ModelConfig
from moepp_jax.errors import ConfigError
from moepp_jax.moe import Param, Rule, RuleError, kernels, param
from moepp_jax.moe.rule import require_sound


class Output(NamedTuple):
    """What the model computes before the vocabulary.

    Attributes:
      hidden: after the final norm.
      matrix: the output matrix, whole: `vocabulary` takes both to logits and losses.
      routed: by every MoE layer: the tokens' arrays as (layer, B, L), the statistics' leading axes
        (layer, group).
      states: the input of every layer: the stack of residual streams.
    """

    hidden: Float[Array, "B L D"]
    matrix: Float[Array, "V D"]
    routed: moe_lib.Routed
    states: Float[Array, "layers B L D"]

    @property
    def statistics(self) -> moe_lib.Statistics:
        return self.routed.statistics

    @property
    def router_logits(self) -> Float[Array, "layers B L N"]:
        """With the gating residual in them."""
        return self.routed.routing.logits


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Tokens to hidden states: a function of its parameters, which it describes.

    Attributes:
      block: what is repeated.
      attend: how the tokens of a row attend to each other.
      sharded: each device has a part of the parameters and runs in a shard_map: a block's are put
        together when it runs. Else the parameters are whole.
    """

    block: Block
    attend: attend.Packed
    sharded: bool = False

    @property
    def config(self) -> ModelConfig:
        return self.block.config

    @property
    def rule(self) -> Rule:
        return self.block.moe.rule

    @property
    def num_blocks(self) -> int:
        return self.config.num_layers // self.config.moe_every

    @functools.cached_property
    def described(self) -> dict[str, Any]:
        """Every parameter, described: a tree like that of the arrays."""
        c = self.config
        matrix = Param((c.vocab_size, c.hidden_size), c.init_std, cut=0)
        outside = {"embedding": matrix, "final": describe_norm(c.hidden_size)}
        if not c.tied_embeddings:
            outside["output"] = matrix
        layers = jax.tree.map(lambda p: p.stacked(self.num_blocks), self.block.describe())
        return outside | {"layers": layers}

    @property
    def outside(self) -> dict[str, Any]:
        """What is described outside the layers."""
        return {name: p for name, p in self.described.items() if name != "layers"}

    def init(self, key: Array) -> dict[str, Any]:
        """Fresh parameters, whole."""
        return param.init(key, self.described)

    def __call__(
        self,
        params: dict[str, Any],
        tokens_BL: Int[Array, "B L"],
        positions_BL: Int[Array, "B L"],
        segments_BL: Int[Array, "B L"],
    ) -> Output:
        """Runs all layers.

        Args:
          params: like `described`.
          positions_BL: of the tokens in their documents, for the rotary embedding.
          segments_BL: their documents: each sees the earlier tokens of its own, in its window.
        """
        outside = self.whole_outside(params)
        dtype = jnp.dtype(self.config.dtype)
        x = vocabulary.look_up(outside["embedding"], tokens_BL, dtype)
        no_logits = jnp.zeros((*tokens_BL.shape, self.rule.pool.size), jnp.float32)
        if self.sharded:
            # In a shard_map, what a scan carries must vary over the devices from the start.
            no_logits = jax.lax.pcast(no_logits, mesh_lib.AXES, to="varying")
        attends = [self.attend(segments_BL)] * self.config.moe_every
        of_block = self.block.describe()

        def run(carry, params):
            out = self.block(self.whole(of_block, params), *carry, positions_BL, attends)
            return (out.x, out.routed.routing.logits), (out.routed, jnp.stack(out.states))

        if self.sharded or self.config.remat != "none":
            run = jax.checkpoint(run, policy=remat.POLICIES[self.config.remat], prevent_cse=False)
        (x, _), (routed, states) = jax.lax.scan(run, (x, no_logits), params["layers"])
        hidden = rms_norm(outside["final"], x, self.config.norm_eps)
        matrix = outside.get("output", outside["embedding"])
        states = states.reshape(self.config.num_layers, *x.shape)
        return Output(hidden, matrix, routed, states)

    def of_batch(self, params: dict[str, Any], batch: dict[str, Array]) -> tuple[Output, Array]:
        """A batch of packed documents: what is computed, and the loss of every target, in nats."""
        out = self(params, batch["tokens"], batch["positions"], batch["segments"])
        chunk = self.config.loss_chunk
        with jax.named_scope("loss"):
            return out, vocabulary.token_losses(out.matrix, out.hidden, batch["targets"], chunk)

    def loss_of_batch(
        self, params: dict[str, Any], batch: dict[str, Array], weights_BL: Float[Array, "B L"]
    ) -> tuple[Output, Float[Array, ""]]:
        """As `of_batch`, with the weighted sum of the losses, which can be differentiated."""
        out = self(params, batch["tokens"], batch["positions"], batch["segments"])
        given = (out.matrix, out.hidden, batch["targets"], weights_BL, self.config.loss_chunk)
        with jax.named_scope("loss"):
            return out, vocabulary.weighted_loss(*given)

    def whole(self, described: Any, params: Any) -> Any:
        """A subtree of the parameters as arithmetic wants it: whole, in the types of its use."""
        dtype = jnp.dtype(self.config.dtype)
        if self.sharded:
            return mesh_lib.whole(described, params, dtype)
        return param.used(described, params, dtype)

    def whole_outside(self, params: dict[str, Any]) -> dict[str, Any]:
        """`whole` of the parameters outside the layers."""
        return self.whole(self.outside, {name: params[name] for name in self.outside})

    def rule_state(self, params: dict[str, Any]) -> dict[str, Array]:
        """What the rule's `update` moves, of all layers."""
        return {name: params["layers"]["moe"]["router"][name] for name in self.rule.state()}

    def with_rule_state(self, params: dict[str, Any], state: dict[str, Array]) -> dict[str, Any]:
        layers, layer = params["layers"], params["layers"]["moe"]
        layer = layer | {"router": layer["router"] | dict(state)}
        return params | {"layers": layers | {"moe": layer}}


def describe(config: Config) -> dict[str, Any]:
    """The parameters of a configuration, described: no kernel or mesh has a say in them."""
    block = _block(config, config.moe.dispatch, "cpu")
    return LanguageModel(block, attend.xla(config.model)).described


def moe_of(config: Config, dispatch: str, platform: str, mesh: Mesh | None = None) -> moe_lib.MoE:
    """The layer that a configuration asks for, with the kernels and exchange of the platform."""
    c, sequences = config.moe, 1
    if dispatch == "capacity":
        path = moe_lib.with_capacity(
            c.gamma,
            kernels.experts_function(platform),
            kernels.exchanged(platform),
            kernels.slots_tile(platform),
            kernels.taking(platform),
            c.exchange_parts,
        )
        sequences = max(1, c.group_size // config.data.seq_len)
    else:
        path = moe_lib.dropless(
            kernels.grouped_function(platform, scanned=True),
            kernels.move(platform, mesh),
            c.exchange_buffer or None,
            kernels.buffer_tile(platform),
            kernels.taking(platform),
            c.exchange_parts,
        )
    return moe_lib.MoE(c.rule, path, c.input_scale, sequences)


def build(
    config: Config,
    mesh: Mesh | None = None,
    dispatch: str | None = None,
    platform: str | None = None,
) -> LanguageModel:
    """The model of a configuration.

    Args:
      mesh: the model is to run on a device's part of its parameters and of the batch, inside a
        shard_map on this mesh; None is one device that has all.
      dispatch: "capacity" or "dropless"; by default that of training.
      platform: of the device where there is no mesh; by default JAX's first.

    Raises:
      ConfigError: the routing rule breaks what every layer relies on; or the attention kernel that
        is asked for cannot be had here (`attend.kernel`).
    """
    try:
        _require_sound(config.moe.rule)
    except RuleError as error:
        raise ConfigError(f"config.moe.rule: {error}") from error
    dispatch = dispatch or config.moe.dispatch
    if mesh is not None:
        platform = mesh.devices.flat[0].platform
    platform = platform or jax.default_backend()
    block = _block(config, dispatch, platform, mesh)
    axes = () if mesh is None else mesh_lib.AXES
    return LanguageModel(block, attend.kernel(config.model, platform, axes), mesh is not None)


def _block(config: Config, dispatch: str, platform: str, mesh: Mesh | None = None) -> Block:
    return Block(
        config.model,
        moe_of(config, dispatch, platform, mesh),
        ffn_size=config.moe.ffn_size,
        group_size=config.moe.group_size if dispatch == "capacity" else None,
        axis="expert" if mesh is not None and mesh.shape["expert"] > 1 else None,
        by=ON_TPU if platform == "tpu" else PLAIN,
    )


_require_sound = functools.cache(require_sound)
