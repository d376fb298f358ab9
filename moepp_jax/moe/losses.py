"""What a layer tells of its routing, and the balance losses made of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moepp_jax.moe.experts import Pool

# Parts of a sequence by which drops are told.
PARTS = 8

# Of log-sum-exps that are squared and summed: an infinite z-loss of weight 0 would be NaN.
_LARGEST = 1e15


class Statistics(NamedTuple):
    """Means over the tokens of a group. Means over groups are taken by the caller, who has all.

    Attributes:
      load: share of the tokens that choose expert i, drops included: f_i.
      kept: share of the tokens whose choice of expert i was served.
      prob: mean score of expert i: P_i.
      entropy: of the scores over their sum, nats.
      z: squared log-sum-exp of the logits.
      asked: choices a token of the group by the eighth of its sequences in which they are.
      served: of these, those that were served.
      own: what the rule measures beside, by name.
    """

    load: Float[Array, "*G N"]
    kept: Float[Array, "*G N"]
    prob: Float[Array, "*G N"]
    entropy: Float[Array, "*G"]
    z: Float[Array, "*G"]
    asked: Float[Array, "*G 8"] | None = None
    served: Float[Array, "*G 8"] | None = None
    own: dict[str, Any] = {}  # noqa: RUF012 (nobody writes into it)


def statistics(routing, kept_GSK, own: dict[str, Any], sequences: int = 1) -> Statistics:
    """
    Args:
      routing: a `rule.Routing`.
      own: what the rule measured.
      sequences: of a group.
    """
    one_hot = routing.experts[..., None] == jnp.arange(routing.scores.shape[-1])
    tokens = routing.experts.shape[1]
    positions = tokens // sequences
    part = np.tile(np.arange(positions) * PARTS // positions, sequences)
    in_part = np.float32(part[:, None] == np.arange(PARTS)) / tokens
    asked_GS = jnp.sum(routing.experts < routing.scores.shape[-1], axis=-1, dtype=jnp.float32)
    served_GS = jnp.sum(kept_GSK, axis=-1, dtype=jnp.float32)
    tiny = jnp.finfo(jnp.float32).tiny
    p = routing.scores / jnp.maximum(jnp.sum(routing.scores, axis=-1, keepdims=True), tiny)
    log_sum_exp = jax.nn.logsumexp(routing.logits, axis=-1)
    plogp = p * jnp.log(jnp.maximum(p, tiny))
    return Statistics(
        load=jnp.sum(one_hot, axis=(1, 2), dtype=jnp.float32) / tokens,
        kept=jnp.sum(one_hot & kept_GSK[..., None], axis=(1, 2), dtype=jnp.float32) / tokens,
        prob=jnp.mean(routing.scores, axis=1),
        entropy=-jnp.mean(jnp.sum(plogp, axis=-1), axis=1),
        z=jnp.mean(jnp.square(jnp.clip(log_sum_exp, -_LARGEST, _LARGEST)), axis=1),
        asked=asked_GS @ in_part,
        served=served_GS @ in_part,
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


def summarise(stats: Statistics, pool: Pool) -> dict[str, Float[Array, "..."]]:
    """What is looked at of a layer's routing.

    drop_rate: share of the choices that were dropped; drop_rate_by_part: of each eighth of the
    sequences, in order; drop_rate_by_kind: of FFN, constant, copy and zero experts; 0 where nothing
    is chosen. ffn_experts_per_token: that served a token. router_entropy: nats.
    """
    ends = list(np.cumsum(pool)[:-1])
    kinds = [
        jnp.stack([jnp.sum(a, axis=-1) for a in jnp.split(by_expert, ends, axis=-1)], axis=-1)
        for by_expert in (stats.load, stats.kept)
    ]
    return {
        "drop_rate": _missing(jnp.sum(stats.load, axis=-1), jnp.sum(stats.kept, axis=-1)),
        "drop_rate_by_part": _missing(stats.asked, stats.served),
        "drop_rate_by_kind": _missing(*kinds),
        "ffn_experts_per_token": jnp.sum(stats.kept[..., : pool.n_ffn], axis=-1),
        "router_entropy": stats.entropy,
    }


def _missing(asked, served):
    return 1.0 - jnp.where(asked > 0, served / jnp.maximum(asked, jnp.finfo(jnp.float32).tiny), 1.0)
