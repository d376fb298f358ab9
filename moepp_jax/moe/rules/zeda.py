"""ZEDA (arXiv 2605.18643): zero experts, and a loss that balances them as a group with the others.

    P = softmax(W x),  E = Top-K(P),  g_i = P_i / (the sum of P over all chosen experts)
    L = alpha (N_E + w N_Z) / K (f_E P_E / N_E + f_Z P_Z / (w N_Z))

f and P are sums over the FFN experts (E) and over the zero-computation experts (Z). At balance Z
has w N_Z / (N_E + w N_Z) of the choices, one half with the authors' w = 2 and N_Z = N_E / 2, and
L = alpha. Z may be zero experts, copies (the authors' zce_types has both; they found copies worse)
or some of each.

The sum that gates are divided by has the zero experts in it (modular_qwen3_moe_plus_plus.py: the
top-k's norm_topk_prob): dividing by the real experts alone would inflate what they add. L is as in
the README and in grouped_load_balancing_loss_func (moe_utils.py), where K divides once; the
latter's docstring would have it divide twice. The authors sum L over the layers; here it is a mean.

They start from a trained MoE, whose FFN experts nothing balances any more. From scratch something
must: `ffn_balance_weight` is of Switch's loss within that group, N_E sum_i (f_i / f_E) (P_i / P_E),
of shares, which leaves the balance with the other group alone. It is ours, and 0 by default.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moepp_jax.moe import losses, router
from moepp_jax.moe.losses import Statistics
from moepp_jax.moe.rule import Loss, Params, Routing, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZEDARule(router.TopK):
    gate: str = option("renormalise_all", choices=tuple(router.GATES))
    zero_weight: float = option(2.0, above=0)  # w, load of a zero expert against an FFN expert's
    balance_weight: float = option(0.1, at_least=0)  # alpha, of the loss between the groups
    ffn_balance_weight: float = option(0.0, at_least=0)  # of the loss among the FFN experts

    def check(self) -> None:
        super().check()
        router.require_kinds(self, "n_zero", "n_copy")
        self.require(
            max(self.load) <= 1,
            "zero_weight",
            f"cannot be had with top_k = {self.top_k} of {self.pool}: an expert would be chosen "
            "more than once a token",
        )

    @property
    def load(self) -> tuple[float, ...]:
        n_ffn, n_zero = self.pool.n_ffn, self.pool.n_zero_computation
        ffn = self.top_k / (n_ffn + self.zero_weight * n_zero)
        return (ffn,) * n_ffn + (self.zero_weight * ffn,) * n_zero

    def route(self, x_GSD, previous_GSN, params: Params) -> Routing:
        logits = self.logits(x_GSD, previous_GSN, params)
        scored = self.scored(logits)
        scores = jax.nn.softmax(scored, axis=-1)
        experts = router.top_k(scores, self.top_k)
        gates = router.gates_of(self.gate, scored, scores, experts, self.pool.first_zero)
        return Routing(experts, gates, scores, logits)

    def losses(self, stats: Statistics, state: Params) -> dict[str, Loss]:
        return super().losses(stats, state) | {
            "balance_loss": Loss(self._between_groups(stats), self.balance_weight),
            "ffn_balance_loss": Loss(self._among_ffn(stats), self.ffn_balance_weight),
        }

    def _between_groups(self, stats: Statistics) -> Float[Array, "*L"]:
        n_ffn, n_zero = self.pool.n_ffn, self.zero_weight * self.pool.n_zero_computation
        f_E, f_Z = self._by_group(jax.lax.stop_gradient(stats.load))
        P_E, P_Z = self._by_group(stats.prob)
        return (n_ffn + n_zero) / self.top_k * (f_E * P_E / n_ffn + f_Z * P_Z / n_zero)

    def _among_ffn(self, stats: Statistics) -> Float[Array, "*L"]:
        n_ffn = self.pool.n_ffn
        f, P = (router.over_sum(values[..., :n_ffn]) for values in (stats.load, stats.prob))
        return losses.weighted_balance(f, P, [1.0] * n_ffn)

    def _by_group(self, values: Float[Array, "*L N"]) -> tuple[Array, Array]:
        """Sums over the FFN experts and over the others."""
        ffn, others = jnp.split(values, [self.pool.n_ffn], axis=-1)
        return jnp.sum(ffn, axis=-1), jnp.sum(others, axis=-1)
