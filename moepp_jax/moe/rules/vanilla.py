"""A vanilla top-K mixture of experts: the K most probable, and the balance loss of Switch.

    G = W x,  P = softmax(G),  E = Top-K(P),  g by `gate`
    L = beta N / K sum_i f_i P_i,  f_i the share of the tokens that choose expert i

The loss is that of Switch Transformers (arXiv 2101.03961, eq. 4 to 6), whose tokens choose one
expert. Here f_i counts each of a token's K choices, so f sums to K; divided by K, the value is 1 at
balance and a weight means the same for any K. Megatron does so too
(`switch_load_balancing_loss_func`, f over T K); `load_balancing_loss_func` of Mixtral in
transformers does not, and is K at balance. Losses are averaged over the layers, Megatron sums them.

The gates are P over their sum, as Mixtral's. Of a single choice that is 1, which tells the router
nothing: with top_k = 1 take "raw", as Switch does. `moepp` with tau = 1, of FFN experts alone, is
this rule with K times this loss.
"""

import dataclasses

import jax

from moepp_jax.moe import losses, router
from moepp_jax.moe.losses import Statistics
from moepp_jax.moe.rule import Loss, Params, Routing, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class VanillaRule(router.TopK):
    gate: str = option("renormalise_all", choices=tuple(router.GATES))
    balance_weight: float = option(0.01, at_least=0)  # beta

    def check(self) -> None:
        super().check()
        router.require_kinds(self)

    def route(self, x_GSD, previous_GSN, params: Params) -> Routing:
        logits = self.logits(x_GSD, previous_GSN, params)
        scored = self.scored(logits)
        scores = jax.nn.softmax(scored, axis=-1)
        experts = router.top_k(scores, self.top_k)
        gates = router.gates_of(self.gate, scored, scores, experts, self.pool.first_zero)
        return Routing(experts, gates, scores, logits)

    def losses(self, stats: Statistics, state: Params) -> dict[str, Loss]:
        share = [1 / self.top_k] * self.pool.size
        balance = losses.weighted_balance(stats.load, stats.prob, share)
        return super().losses(stats, state) | {"balance_loss": Loss(balance, self.balance_weight)}
