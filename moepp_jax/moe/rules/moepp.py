"""MoE++ (arXiv 2410.07348): the default rule.

    G = W x + W_g G_previous,  P = softmax(G),  E = Top-K(P),  g by `gate`          (eq. 1, 6)
    L = beta N sum_i eta_i f_i P_i,  eta = 1 for FFN experts, tau for the others    (eq. 7)

At its balance point each FFN expert has K tau / (tau N_FFN + N_ZC) of the tokens, each other expert
K / (tau N_FFN + N_ZC). With no zero-computation experts and tau = 1 it is a vanilla top-K MoE.

`bias_rate` leads a model that has just been given zero-computation experts to use them: they have a
bias on their logits, which after each step moves towards the load that tau asks for. It is
DeepSeek's idea (arXiv 2408.15664), but by less the nearer the load is: steps of one size swing
around it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moepp_jax.moe import losses, router
from moepp_jax.moe.losses import Statistics
from moepp_jax.moe.param import Param
from moepp_jax.moe.rule import Loss, Params, Routing, option, state_param

# A bias so low that an expert is never chosen and its softmax is nothing, in float32.
NEVER = -30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEPPRule(router.TopK):
    residual: str = option("logits", choices=tuple(router.RESIDUALS))
    tau: float = option(
        0.75, above=0, at_most=1
    )  # weight of an FFN expert, of one of another kind 1
    gate: str = option("renormalise_nonzero", choices=tuple(router.GATES))
    balance_weight: float = option(0.01, at_least=0)  # beta
    bias_rate: float = option(0.0, at_least=0)  # logits a step, at most; 0: there is no bias

    def check(self) -> None:
        super().check()
        self.require(
            not self.bias_rate or self.pool.n_zero_computation > 0,
            "bias_rate",
            f"moves biases of zero-computation experts, and there are none ({self.pool}): set it "
            "to 0",
        )

    @property
    def load(self) -> tuple[float, ...]:
        pool = self.pool
        other = self.top_k / (self.tau * pool.n_ffn + pool.n_zero_computation)
        return (self.tau * other,) * pool.n_ffn + (other,) * pool.n_zero_computation

    def state(self) -> dict[str, Param]:
        return {"bias": state_param(self.pool.size)} if self.bias_rate else {}

    def route(self, x_GSD, previous_GSN, params: Params) -> Routing:
        logits = self.logits(x_GSD, previous_GSN, params)
        scored = self.scored(logits)
        if self.bias_rate:
            scored = scored + params["bias"]
        scores = jax.nn.softmax(scored, axis=-1)
        experts = router.top_k(scores, self.top_k)
        gates = router.gates_of(self.gate, scored, scores, experts, self.pool.first_zero)
        return Routing(experts, gates, scores, logits)

    def losses(self, stats: Statistics, state: Params) -> dict[str, Loss]:
        balance = losses.heterogeneous_balance(stats.load, stats.prob, self.pool, self.tau)
        return super().losses(stats, state) | {"balance_loss": Loss(balance, self.balance_weight)}

    def update(self, state: Params, stats: Statistics) -> Params:
        """b_i + u (1 - f_i / wanted) for zero-computation experts, u at most."""
        if not self.bias_rate:
            return state
        is_ffn = jnp.arange(self.pool.size) < self.pool.n_ffn
        wanted = jnp.array(self.load, jnp.float32)
        step = self.bias_rate * jnp.clip(1.0 - stats.load / wanted, -1.0, 1.0)
        return {"bias": state["bias"] + jnp.where(is_ffn, 0.0, step)}
