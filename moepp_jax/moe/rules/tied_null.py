"""Null experts with one logit (arXiv 2601.15370): how many experts a token has, by a learned bar.

    G = W x, of N_FFN + 1 logits;  the last one, the null's, is repeated M = n_zero times   (eq. 2)
    P = softmax(G),  E = Top-K(P),  g_i = P_i / (the sum of P over the chosen FFN experts)  (eq. 3)
    L = beta (N_FFN + M) / K sum_i f_i P_i, over all N_FFN + M experts                      (eq. 6)
    L_z = zeta mean of logsumexp(G)^2, over all of them too                                 (eq. 7)

A token has those of its K best FFN experts whose logits pass the null's (section 4.3), and 0 if
none does. At balance rho = N_FFN / (N_FFN + M) of its choices are FFN experts (eq. 5); the authors
find rho from .5 to .67 best.

Which copies of the null fill its choices is a matter of ties. They are handed out in turn, from a
first one that moves on with the token, so no copy is favoured; output and L are the same for any:
the copies have one P.

Taken here, as eq. 6 could be read only in a copy that garbles its prefactor ("(N + M) / (N + M)"):
it is a fraction, so K divides. L is then beta at balance, as that of `vanilla`, whatever K is.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moepp_jax.moe import losses, router
from moepp_jax.moe.experts import Pool
from moepp_jax.moe.losses import Statistics
from moepp_jax.moe.param import Param
from moepp_jax.moe.rule import Loss, Params, Routing, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiedNullRule(router.TopK):
    z_weight: float = option(1e-3, at_least=0)  # zeta, of the z-loss, mean over the layers
    balance_weight: float = option(2e-2, at_least=0)  # beta

    def check(self) -> None:
        super().check()
        router.require_kinds(self, "n_zero")

    def params(self, width: int, std: float) -> dict[str, Param]:
        """Those of a router that has one null."""
        one_null = Pool(self.pool.n_ffn, n_zero=1)
        own = {"router_layers": self.router_layers, "residual": self.residual}
        return router.Router(pool=one_null, **own).params(width, std)

    def logits(self, x_GSD, previous_GSN, params: Params) -> Float[Array, "G S N"]:
        n_ffn = self.pool.n_ffn
        untied = super().logits(x_GSD, previous_GSN[..., : n_ffn + 1], params)
        nulls = jnp.repeat(untied[..., n_ffn:], self.pool.n_zero, axis=-1)
        return jnp.concatenate([untied[..., :n_ffn], nulls], axis=-1)

    def route(self, x_GSD, previous_GSN, params: Params) -> Routing:
        logits = self.logits(x_GSD, previous_GSN, params)
        scored = self.scored(logits)
        scores = jax.nn.softmax(scored, axis=-1)
        experts = self._in_turn(router.top_k(scores, self.top_k))
        first_zero = self.pool.first_zero
        gates = router.gates_of("renormalise_nonzero", scored, scores, experts, first_zero)
        return Routing(experts, gates, scores, logits)

    def _in_turn(self, experts_GSK: Int[Array, "G S K"]) -> Int[Array, "G S K"]:
        """The choices, with the nulls of token s of a group being copies s, s + 1, ... modulo M.

        A token has at most M nulls, so they stay distinct.
        """
        n_ffn, M = self.pool.n_ffn, self.pool.n_zero
        is_null = experts_GSK >= n_ffn
        before = jnp.cumsum(is_null, axis=-1) - is_null
        token = jnp.arange(experts_GSK.shape[1])[:, None]
        return jnp.where(is_null, n_ffn + (token + before) % M, experts_GSK)

    def losses(self, stats: Statistics, state: Params) -> dict[str, Loss]:
        share = [1 / self.top_k] * self.pool.size
        balance = losses.weighted_balance(stats.load, stats.prob, share)
        return super().losses(stats, state) | {"balance_loss": Loss(balance, self.balance_weight)}
