"""A routing rule with a NaN in it, which comes where a layer's first weight is below -100."""

import dataclasses

import jax.numpy as jnp

from moepp_jax.moe.rules.moepp import MoEPPRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlantedRule(MoEPPRule):
    def logits(self, x_GSD, previous_GSN, params):
        root = jnp.sqrt(params["w"][0, 0] + 100.0)  # NaN
        return super().logits(x_GSD, previous_GSN, params) + 0.0 * root


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlantedBackwardRule(MoEPPRule):
    """The same, but its numbers are finite: only the gradient is not."""

    def logits(self, x_GSD, previous_GSN, params):
        flat = jnp.sqrt(jnp.maximum(params["w"][0, 0] + 100.0, 0.0))  # NaN
        return super().logits(x_GSD, previous_GSN, params) + 0.0 * flat
