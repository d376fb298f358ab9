"""Which experts a token visits, and with what weight: the pathway-aware router, in float32.

A `Router` is seven functions, one for each decision that routing rules of the literature make
differently. A new rule is a new function of the same signature; `route` stays as it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moepp_jax.moe.products import tokens_first

Params = Mapping[str, Float[Array, "..."]]


class Routing(NamedTuple):
    """What the router decided for every token.

    Attributes:
      logits: raw logits with the gating residual in them; the next layer's router reads these.
      probs: scores over all experts (softmax), for losses and statistics.
      experts: the chosen experts, best first; the K of one token are distinct.
      gates: their weights in the layer's output, 0 for a chosen zero expert where the rule says so.
    """

    logits: Float[Array, "G S N"]
    probs: Float[Array, "G S N"]
    experts: Int[Array, "G S K"]
    gates: Float[Array, "G S K"]


class Chosen(NamedTuple):
    """What a gate rule may look at: logits, probabilities and zero-expert mask of the chosen K."""

    logits: Float[Array, "G S K"]
    probs: Float[Array, "G S K"]
    is_zero: Bool[Array, "G S K"]


# Projections: x W, the paper's G_1.


def linear(x_GSD: Float[Array, "G S D"], p: Params) -> Float[Array, "G S N"]:
    """One matrix: W x."""
    return _product(x_GSD, p["w"])


def two_layer(x_GSD: Float[Array, "G S D"], p: Params) -> Float[Array, "G S N"]:
    """Two matrices with tanh between, 8 N wide (the authors' `moe_2layer_gate`)."""
    return _product(jnp.tanh(_product(x_GSD, p["w_hidden"])), p["w_logits"])


# Gating residuals: G_j = W_j x_j + W_g G_{j-1} (eq. 6). The first layer is given zeros.


def add_logits(own, previous, p: Params) -> Float[Array, "G S N"]:
    return own + _product(previous, p["w_residual"])


def add_detached(own, previous, p: Params) -> Float[Array, "G S N"]:
    """As `add_logits`, with no gradient into the layer before."""
    return add_logits(own, jax.lax.stop_gradient(previous), p)


def no_residual(own, previous, p: Params) -> Float[Array, "G S N"]:
    return own


# Logit normalisation.


def as_they_are(logits: Float[Array, "G S N"]) -> Float[Array, "G S N"]:
    return logits


def divided_by_deviation(std: float) -> Callable[[Float[Array, "G S N"]], Float[Array, "G S N"]]:
    """Divides by (the unbiased standard deviation over the experts / std); the mean stays."""

    def normalise(logits):
        variance = jnp.var(logits, axis=-1, ddof=1, keepdims=True)
        return logits * (std * jax.lax.rsqrt(variance + 1e-12))  # equal logits stay finite

    return normalise


# Bias: added to what is scored, and to nothing else. A rule moves it (`bias`), not the gradient.


def no_bias(logits: Float[Array, "G S N"], p: Params) -> Float[Array, "G S N"]:
    return logits


def add_bias(logits: Float[Array, "G S N"], p: Params) -> Float[Array, "G S N"]:
    """One number an expert, of all tokens: p["bias"] (N,)."""
    return logits + jax.lax.stop_gradient(p["bias"])


# Scores over all experts.


def softmax(logits: Float[Array, "G S N"]) -> Float[Array, "G S N"]:
    return jax.nn.softmax(logits, axis=-1)


# Selection.


def top_k(k: int) -> Callable[[Float[Array, "G S N"]], Int[Array, "G S K"]]:
    """The k best scores; of equal ones, the expert with the lower number."""

    def select(scores):
        return jax.lax.top_k(scores, k)[1]

    return select


# Gates.


def raw(chosen: Chosen) -> Float[Array, "G S K"]:
    """The probabilities as they are (eq. 1)."""
    return chosen.probs


def renormalise_all(chosen: Chosen) -> Float[Array, "G S K"]:
    """The probabilities over their sum."""
    return _over_sum(chosen.probs)


def renormalise_nonzero(chosen: Chosen) -> Float[Array, "G S K"]:
    """Zero experts weigh 0, the others' probabilities are divided by their sum (authors' code).

    So an FFN expert chosen beside a zero expert weighs 1. All gates are 0 where only zero experts
    were chosen.
    """
    return _over_sum(jnp.where(chosen.is_zero, 0.0, chosen.probs))


def softmax_selected(chosen: Chosen) -> Float[Array, "G S K"]:
    """Softmax over the chosen logits; a zero expert's share is lost (Mixtral's gating)."""
    return jax.nn.softmax(chosen.logits, axis=-1)


@dataclass(frozen=True)
class Router:
    """The decisions of a router, each a function of this module or of the caller's.

    Attributes:
      select: scores (G, S, N) -> experts (G, S, K).
      project: (x, params) -> own logits (G, S, N).
      residual: (own logits, previous layer's logits, params) -> logits.
      normalise: logits -> logits; the residual handed on is the one before.
      bias: (normalised logits, params) -> logits that are scored.
      score: logits -> probabilities over all experts.
      gate: Chosen -> gates (G, S, K).
    """

    select: Callable
    project: Callable = linear
    residual: Callable = add_logits
    normalise: Callable = as_they_are
    bias: Callable = no_bias
    score: Callable = softmax
    gate: Callable = renormalise_nonzero


def route(
    x_GSD: Float[Array, "G S D"],
    previous_GSN: Float[Array, "G S N"],
    params: Params,
    router: Router,
    first_zero: int,
) -> Routing:
    """Routes every token (paper, section 3.2).

    Args:
      x_GSD: the layer's input, any float type; the arithmetic here is float32.
      previous_GSN: raw logits of the MoE layer before, zeros for the first.
      params: "w" (N, D); for the two-layer gate "w_hidden" (8 N, D) and "w_logits" (N, 8 N); with a
        gating residual "w_residual" (N, N), with a bias "bias" (N,).
      first_zero: experts from this number on are zero experts.
    """
    own = router.project(x_GSD.astype(jnp.float32), params)
    logits = router.residual(own, previous_GSN.astype(jnp.float32), params)
    scored = router.bias(router.normalise(logits), params)
    probs = router.score(scored)
    experts = router.select(probs)
    # A masked sum over N reads the chosen values: its gradient needs no scatter.
    one_hot = experts[..., None] == jnp.arange(probs.shape[-1])

    def at_chosen(values):
        return jnp.sum(jnp.where(one_hot, values[..., None, :], 0.0), axis=-1)

    chosen = Chosen(at_chosen(scored), at_chosen(probs), experts >= first_zero)
    return Routing(logits, probs, experts, router.gate(chosen))


def _product(x, w):
    """x W^T at full float32 precision, which accelerators do not give by default."""
    return tokens_first(x, w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _over_sum(weights):
    # Over the largest first, which changes nothing but keeps tiny ones' gradients finite.
    largest = jax.lax.stop_gradient(jnp.max(weights, axis=-1, keepdims=True))
    weights = weights / jnp.where(largest > 0, largest, 1.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)
