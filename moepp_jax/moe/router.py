"""What rules share: logits of tokens, choices among experts and gates of the chosen, in float32.

Each is a small function; `Router` is the rule that makes logits of them, with the options that can
be crossed with any choice of experts: projection, gating residual, logit normalisation, z-loss.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moepp_jax.moe.losses import Statistics
from moepp_jax.moe.param import Param
from moepp_jax.moe.products import tokens_first
from moepp_jax.moe.rule import Loss, Params, Rule, RuleError, option

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


RESIDUALS = {"logits": add_logits, "detached": add_detached, "none": no_residual}


def divided_by_deviation(logits: Float[Array, "G S N"], std: float) -> Float[Array, "G S N"]:
    """Divides by (the unbiased standard deviation over the experts / std); the mean stays."""
    # Squares of huge ones would be infinite; all others stay as they are.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(logits), axis=-1, keepdims=True))
    logits = logits / jnp.where(largest > 1e15, largest, 1.0)
    variance = jnp.var(logits, axis=-1, ddof=1, keepdims=True)
    return logits * (std * jax.lax.rsqrt(variance + 1e-12))  # equal logits stay finite


# Choices.


def top_k(scores: Float[Array, "G S N"], k: int) -> Int[Array, "G S K"]:
    """The k best scores; of equal ones, the expert with the lower number."""
    return checkpoint_name(jax.lax.top_k(scores, k)[1], "routing")


def chosen_where(chosen_GSN: Bool[Array, "G S N"], scores, most: int) -> Int[Array, "G S K"]:
    """Those experts of a token that are chosen, best score first, as far as `most`; then N."""
    N = scores.shape[-1]
    best = top_k(jnp.where(chosen_GSN, scores, -jnp.inf), most)
    return jnp.where(at_chosen(chosen_GSN, best), best, N)


def at_chosen(values_GSN: Array, experts_GSK: Int[Array, "G S K"]) -> Array:
    """The values of the chosen experts, 0 (or False) for an unused choice.

    A masked sum over N reads them: its gradient needs no scatter.
    """
    one_hot = experts_GSK[..., None] == jnp.arange(values_GSN.shape[-1])
    masked = jnp.where(one_hot, values_GSN[..., None, :], 0)
    return jnp.any(masked, axis=-1) if values_GSN.dtype == bool else jnp.sum(masked, axis=-1)


# Gates.


class Chosen(NamedTuple):
    """What a gate rule may look at, of each choice; a choice that is not used has no scores.

    Attributes:
      logits: those that were scored.
      scores: of `Routing`.
      used: whether it is a choice at all.
      is_zero: whether it is a zero expert.
    """

    logits: Float[Array, "G S K"]
    scores: Float[Array, "G S K"]
    used: Bool[Array, "G S K"]
    is_zero: Bool[Array, "G S K"]


def raw(chosen: Chosen) -> Float[Array, "G S K"]:
    """The scores as they are (eq. 1)."""
    return chosen.scores


def renormalise_all(chosen: Chosen) -> Float[Array, "G S K"]:
    """The scores over their sum."""
    return over_sum(chosen.scores)


def renormalise_nonzero(chosen: Chosen) -> Float[Array, "G S K"]:
    """Zero experts weigh 0, the others' scores are divided by their sum (authors' code).

    So an FFN expert chosen beside a zero expert weighs 1. All gates are 0 where only zero experts
    were chosen.
    """
    return over_sum(jnp.where(chosen.is_zero, 0.0, chosen.scores))


def softmax_selected(chosen: Chosen) -> Float[Array, "G S K"]:
    """Softmax over the chosen logits; a zero expert's share is lost (Mixtral's gating)."""
    return jax.nn.softmax(chosen.logits, axis=-1, where=chosen.used)


GATES: Mapping[str, Callable[[Chosen], Float[Array, "G S K"]]] = {
    "raw": raw,
    "renormalise_all": renormalise_all,
    "renormalise_nonzero": renormalise_nonzero,
    "softmax_selected": softmax_selected,
}


def gates_of(how: str, logits_GSN, scores_GSN, experts_GSK, first_zero: int):
    """Gates of the chosen experts, by one of GATES.

    Args:
      first_zero: experts from this number on are zero experts.
    """
    N = scores_GSN.shape[-1]
    used = experts_GSK < N
    is_zero = (experts_GSK >= first_zero) & used
    values = (at_chosen(values, experts_GSK) for values in (logits_GSN, scores_GSN))
    return jnp.where(used, GATES[how](Chosen(*values, used, is_zero)), 0.0)


def over_sum(weights: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    """Weights over their sum; all 0 where they are."""
    # Over the largest first, which changes nothing but keeps tiny ones' gradients finite.
    largest = jax.lax.stop_gradient(jnp.max(weights, axis=-1, keepdims=True))
    weights = weights / jnp.where(largest > 0, largest, 1.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router(Rule):
    """Rules that start from logits: W x, the gating residual, and what is divided out of them."""

    router_layers: int = option(1, choices=(1, 2))  # 1 matrix, or 2 with tanh between, 8 N wide
    residual: str = option("none", choices=tuple(RESIDUALS))  # gating residual (eq. 6)
    logit_norm: float = option(0.0, at_least=0)  # standard deviation given to the logits; 0: none
    z_weight: float = option(0.0, at_least=0)  # of the z-loss, mean over the layers
    # Added to the scored logits of zero-computation experts: a trained model is made to use more of
    # them, or fewer (below 0), and so fewer or more FFN experts.
    zero_offset: float = option(0.0)

    def check(self) -> None:
        self.require(
            not self.logit_norm or self.pool.size > 1,
            "logit_norm",
            "needs at least two experts: one logit has no standard deviation",
        )
        self.require(
            not self.zero_offset or self.pool.n_zero_computation > 0,
            "zero_offset",
            f"is for zero-computation experts, and there are none ({self.pool}): set it to 0",
        )

    def params(self, width: int, std: float) -> dict[str, Param]:
        N = self.pool.size
        gate = {"w": Param((N, width), std, cut=1, float32=True)}
        if self.router_layers == 2:
            gate = {
                "w_hidden": Param((8 * N, width), std, cut=1, float32=True),
                "w_logits": Param((N, 8 * N), std, float32=True),
            }
        if self.residual != "none":
            gate["w_residual"] = Param((N, N), std, float32=True)
        return gate

    def logits(self, x_GSD, previous_GSN, params: Params) -> Float[Array, "G S N"]:
        """The layer's logits with the residual in them."""
        project = two_layer if self.router_layers == 2 else linear
        own = project(x_GSD.astype(jnp.float32), params)
        return RESIDUALS[self.residual](own, previous_GSN.astype(jnp.float32), params)

    def scored(self, logits: Float[Array, "G S N"]) -> Float[Array, "G S N"]:
        """What scores are made of: the logits, normalised, and the offset."""
        if self.logit_norm:
            logits = divided_by_deviation(logits, self.logit_norm)
        if self.zero_offset:
            is_ffn = jnp.arange(self.pool.size) < self.pool.n_ffn
            logits = logits + jnp.where(is_ffn, 0.0, self.zero_offset)
        return logits

    def losses(self, stats: Statistics, state: Params) -> dict[str, Loss]:
        """The z-loss: keeps logits small, and tells how large they are at any weight."""
        return {"z_loss": Loss(stats.z, self.z_weight)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(Router):
    """Rules by which every token has the same number of experts, at balance spread evenly."""

    top_k: int = option(2, at_least=1)  # K, experts a token, of all kinds

    def check(self) -> None:
        super().check()
        require_top_k(self, self.top_k)

    @property
    def most(self) -> int:
        return self.top_k

    @property
    def load(self) -> tuple[float, ...]:
        return (self.top_k / self.pool.size,) * self.pool.size


def require_top_k(rule: Rule, top_k: int) -> None:
    """Refuses more choices than there are experts."""
    rule.require(
        top_k <= rule.pool.size,
        "top_k",
        f"is more than the {rule.pool.size} experts there are ({rule.pool}): choose fewer a token",
    )


def require_kinds(rule: Rule, *kinds: str) -> None:
    """Refuses a pool that has none of these kinds beside its FFN experts, or has another one.

    Args:
      kinds: of "n_const", "n_copy" and "n_zero"; none: FFN experts alone.
    """
    counts = rule.pool._asdict()
    others = [name for name in counts if name not in ("n_ffn", *kinds)]
    if any(counts[name] for name in others) or (kinds and not any(counts[k] for k in kinds)):
        wanted = f"{' or '.join(kinds)} to at least 1, " if kinds else ""
        raise RuleError(
            f"type: {type(rule).__name__} is not for a pool of {rule.pool}: set {wanted}"
            f"{' and '.join(others)} to 0"
        )


def _product(x, w):
    """x W^T at full float32 precision, which accelerators do not give by default."""
    return tokens_first(x, w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
