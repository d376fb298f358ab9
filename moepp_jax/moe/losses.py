"""What a layer tells of its routing, and the auxiliary losses made of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moepp_jax.moe.experts import Pool
from moepp_jax.moe.router import Routing


class Statistics(NamedTuple):
    """Means over the tokens of a group. Means over groups are taken by the caller, who has all.

    Attributes:
      load: share of the tokens that choose expert i, drops included: f_i, sums to K.
      kept: share of the tokens whose choice of expert i was served.
      prob: mean probability of expert i: P_i, sums to 1.
      entropy: of the probabilities, nats.
      z: squared log-sum-exp of the logits.
    """

    load: Float[Array, "*G N"]
    kept: Float[Array, "*G N"]
    prob: Float[Array, "*G N"]
    entropy: Float[Array, "*G"]
    z: Float[Array, "*G"]


def statistics(routing: Routing, kept_GSK: Bool[Array, "G S K"]) -> Statistics:
    one_hot = routing.experts[..., None] == jnp.arange(routing.probs.shape[-1])
    tokens = routing.experts.shape[1]
    plogp = routing.probs * jnp.log(jnp.maximum(routing.probs, jnp.finfo(jnp.float32).tiny))
    return Statistics(
        load=jnp.sum(one_hot, axis=(1, 2), dtype=jnp.float32) / tokens,
        kept=jnp.sum(one_hot & kept_GSK[..., None], axis=(1, 2), dtype=jnp.float32) / tokens,
        prob=jnp.mean(routing.probs, axis=1),
        entropy=-jnp.mean(jnp.sum(plogp, axis=-1), axis=1),
        z=jnp.mean(jnp.square(jax.nn.logsumexp(routing.logits, axis=-1)), axis=1),
    )


def heterogeneous_balance(
    load_N: Float[Array, "*L N"], prob_N: Float[Array, "*L N"], pool: Pool, tau: float
) -> Float[Array, "*L"]:
    """N sum_i eta_i f_i P_i, with eta = 1 for FFN experts and tau for the others (eq. 7).

    The paper leaves the scale open; the factor N is Switch's, and makes the loss K at perfect
    balance of a vanilla pool whatever its size. Its balance point puts
    tau N_FFN / (tau N_FFN + N_ZC) of the assignments on FFN experts. Only P carries a gradient.
    """
    eta = jnp.array([1.0] * pool.n_ffn + [tau] * pool.n_zero_computation, jnp.float32)
    return pool.size * jnp.sum(eta * jax.lax.stop_gradient(load_N) * prob_N, axis=-1)


def summarise(stats: Statistics, pool: Pool) -> dict[str, Float[Array, "*L"]]:
    """Drop rate (share of all assignments), FFN experts that served a token, router entropy."""
    kept = jnp.sum(stats.kept, axis=-1)
    return {
        "drop_rate": 1.0 - kept / jnp.sum(stats.load, axis=-1),
        "ffn_experts_per_token": jnp.sum(stats.kept[..., : pool.n_ffn], axis=-1),
        "router_entropy": stats.entropy,
    }
