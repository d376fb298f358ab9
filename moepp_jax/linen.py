"""The MoE++ layer as a Flax module, for models that are made of such."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from moepp_jax.moe import param
from moepp_jax.moe.layer import MoE, describe, local, sharded
from moepp_jax.moe.losses import Statistics


class MoEPP(nn.Module):
    """The layer over sequences, with its parameters declared.

    The parameters are those of `moe.local`: a dictionary of the groups router, ffn and const. The
    rule's state is among them: give it to `Rule.update` after a step, and its gradient is zero.

    Attributes:
      moe: what is computed.
      ffn_size: F.
      group_size: S, tokens that share a capacity: divides L, or is moe.sequences times L.
      mesh: run under a shard_map on it, or on this device if None.
      axis: inside the caller's own shard_map, the mesh axis over which the FFN experts are sharded;
        their parameters are then this device's.
      init_std: standard deviation of every matrix.
      dtype: of the experts' arithmetic; parameters and router are float32.
    """

    moe: MoE
    ffn_size: int
    group_size: int
    mesh: Mesh | None = None
    axis: str | None = None
    init_std: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], previous_BLN: Float[Array, "B L N"] | None = None
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L N"], Statistics]:
        """The layer's output, its router's logits for the next layer, and its statistics.

        Args:
          previous_BLN: the logits of the layer before; None in the first one.
        """
        D, N = x_BLD.shape[-1], self.moe.pool.size
        described = describe(self.moe.rule, D, self.ffn_size, self.init_std)
        here = jax.lax.axis_size(self.axis) if self.axis else 1

        def initial(key, group):
            made = param.init(key, described[group])
            return made if group != "ffn" else {n: _own(p, here) for n, p in made.items()}

        params = {group: self.param(group, initial, group) for group in described}
        params = {g: param.used(described[g], params[g], self.dtype) for g in described}
        L, several = x_BLD.shape[1], self.moe.sequences
        if self.group_size != several * L if several > 1 else L % self.group_size:
            raise ValueError(
                f"groups of {self.group_size} tokens do not divide sequences of {L}, nor are they "
                f"moe.sequences = {several} of them"
            )
        x_GSD = x_BLD.reshape(-1, self.group_size, D)
        if previous_BLN is None:
            previous_BLN = jnp.zeros((*x_BLD.shape[:2], N))
        previous_GSN = previous_BLN.reshape(-1, self.group_size, N)
        if self.mesh is None:
            y, logits, stats = local(x_GSD, previous_GSN, params, self.moe, self.axis)
        else:
            y, logits, stats = sharded(x_GSD, previous_GSN, params, self.moe, self.mesh)
        return y.reshape(x_BLD.shape), logits.reshape(previous_BLN.shape), stats


def _own(p: Float[Array, "E ..."], devices: int) -> Float[Array, "e ..."]:
    """As many experts as this device has."""
    return p[: len(p) // devices]
