"""What a layer tells of its routing, and the balance losses made of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moepp_jax.moe.experts import Pool


class Statistics(NamedTuple):
    """Means over the tokens of a group. Means over groups are taken by the caller, who has all.

    Attributes:
      load: share of the tokens that choose expert i, drops included: f_i.
      kept: share of the tokens whose choice of expert i was served.
      prob: mean score of expert i: P_i.
      entropy: of the scores over their sum, nats.
      z: squared log-sum-exp of the logits.
      own: what the rule measures beside, by name.
    """

    load: Float[Array, "*G N"]
    kept: Float[Array, "*G N"]
    prob: Float[Array, "*G N"]
    entropy: Float[Array, "*G"]
    z: Float[Array, "*G"]
    own: dict[str, Any]


def statistics(routing, kept_GSK, own: dict[str, Any]) -> Statistics:
    """
    Args:
      routing: a `rule.Routing`.
      own: what the rule measured.
    """
    one_hot = routing.experts[..., None] == jnp.arange(routing.scores.shape[-1])
    tokens = routing.experts.shape[1]
    tiny = jnp.finfo(jnp.float32).tiny
    p = routing.scores / jnp.maximum(jnp.sum(routing.scores, axis=-1, keepdims=True), tiny)
    plogp = p * jnp.log(jnp.maximum(p, tiny))
    return Statistics(
        load=jnp.sum(one_hot, axis=(1, 2), dtype=jnp.float32) / tokens,
        kept=jnp.sum(one_hot & kept_GSK[..., None], axis=(1, 2), dtype=jnp.float32) / tokens,
        prob=jnp.mean(routing.scores, axis=1),
        entropy=-jnp.mean(jnp.sum(plogp, axis=-1), axis=1),
        z=jnp.mean(jnp.square(jax.nn.logsumexp(routing.logits, axis=-1)), axis=1),
        own=own,
    )


def weighted_balance(
    load_N: Float[Array, "*L N"], prob_N: Float[Array, "*L N"], eta: Sequence[float]
) -> Float[Array, "*L"]:
    """N sum_i eta_i f_i P_i; only P carries a gradient.

    With the factor N, which is Switch's, it is K at perfect balance of equal experts, whatever
    their number.
    """
    eta_N = jnp.array(eta, jnp.float32)
    return len(eta) * jnp.sum(eta_N * jax.lax.stop_gradient(load_N) * prob_N, axis=-1)


def heterogeneous_balance(
    load_N: Float[Array, "*L N"], prob_N: Float[Array, "*L N"], pool: Pool, tau: float
) -> Float[Array, "*L"]:
    """`weighted_balance` with eta = 1 for FFN experts and tau for the others (eq. 7).

    The paper leaves the scale open. Its balance point puts tau N_FFN / (tau N_FFN + N_ZC) of the
    assignments on FFN experts.
    """
    return weighted_balance(load_N, prob_N, [1.0] * pool.n_ffn + [tau] * pool.n_zero_computation)


def summarise(stats: Statistics, pool: Pool) -> dict[str, Float[Array, "*L"]]:
    """Drop rate (share of all assignments), FFN experts that served a token, router entropy."""
    kept = jnp.sum(stats.kept, axis=-1)
    return {
        "drop_rate": 1.0 - kept / jnp.sum(stats.load, axis=-1),
        "ffn_experts_per_token": jnp.sum(stats.kept[..., : pool.n_ffn], axis=-1),
        "router_entropy": stats.entropy,
    }
