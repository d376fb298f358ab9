"""AdaMoE (arXiv 2406.13233): null experts and a larger K, so tokens differ in their FFN experts.

    P = softmax(W x),  E = Top-K(P),  g_i = P_i / (the sum of P over the chosen FFN experts)
    L = beta N sum_i f~_i P_i,  f~_i = f_i of an FFN expert, the mean f of all nulls of a null

A null is a zero expert; a token that chooses nothing else gets 0. As every null counts with the
nulls' mean load, it does not matter which of them tokens take, only how many: K n_zero / N of a
token's choices at balance, where L = K beta.

The authors' code (CengZihao/AdaMoE) has two versions of the loss. exp_1
(mola_modeling_llama_hacked.py, Llama 2 with LoRA) averages the null load as here, with f as shares
of all choices (1 at balance), weight 1e-3, summed over the layers. exp_2
(adaptive_moe_utils.py, Mixtral), with f as here and weight 1e-4, slices the axis of the K choices
where it means that of the experts, so nothing is averaged and its loss is Switch's. This is the
paper's formula; its weights are of fine-tuning, and the default is that of MoE++ for training from
scratch. An annealing schedule that the authors mention is in neither.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moepp_jax.moe import losses, router
from moepp_jax.moe.losses import Statistics
from moepp_jax.moe.rule import Loss, Params, Routing, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaMoERule(router.TopK):
    top_k: int = option(3, at_least=1)  # K, experts a token, nulls among them
    gate: str = option("renormalise_nonzero", choices=tuple(router.GATES))
    balance_weight: float = option(0.01, at_least=0)  # beta

    def check(self) -> None:
        super().check()
        router.require_kinds(self, "n_zero")

    def route(self, x_GSD, previous_GSN, params: Params) -> Routing:
        logits = self.logits(x_GSD, previous_GSN, params)
        scored = self.scored(logits)
        scores = jax.nn.softmax(scored, axis=-1)
        experts = router.top_k(scores, self.top_k)
        gates = router.gates_of(self.gate, scored, scores, experts, self.pool.first_zero)
        return Routing(experts, gates, scores, logits)

    def losses(self, stats: Statistics, state: Params) -> dict[str, Loss]:
        null = jnp.mean(stats.load[..., self.pool.first_zero :], axis=-1, keepdims=True)
        is_null = jnp.arange(self.pool.size) >= self.pool.first_zero
        load = jnp.where(is_null, null, stats.load)
        balance = losses.weighted_balance(load, stats.prob, [1.0] * self.pool.size)
        return super().losses(stats, state) | {"balance_loss": Loss(balance, self.balance_weight)}
