"""LongCat-Flash (arXiv 2509.01322): copy experts, and biases that keep to a budget of FFN experts.

    R = softmax(W x),  E = Top-K(R + b),  g_i = scale R_i
    b_i += mu ((K_e / K) / N_FFN - T_i / (K T))  for FFN experts after each step, copies stay at 0
    L = alpha sum_j f_j P_j,  over D groups of FFN experts and one of all copies    (eq. 3-5)
    f_j = D / K_e (choices of the group a token),  1 / (K - K_e) of them for the copies
    P_j = the sum of the group's mean scores

K_e is the number of FFN experts that a token is to have. There the biases rest, every f_j is 1, and
as all P_j sum to 1, L = alpha and pulls nowhere. The paper writes f_j with an indicator of "token
selects group j"; it is read as a count of choices, without which the target is no balance point.

The paper calls the law a PID controller; what it publishes is the proportional part. Its errors are
shares of all K T choices, about 1 / N_FFN, where DeepSeek's are signs: mu must be far larger than
their 1e-3. "mu decays" is all that is said of its course; here it is multiplied by `rate_decay`
after each step. alpha is not published, only that the loss's gradient on the router is to stay
below a tenth of the language model's.

`scale` makes up for gates that finer experts dilute: the paper has the number of parts that an
expert was split into, the release 6. It multiplies the whole sum in the paper's equation (written
without copies), and FFN and copy experts alike in transformers (modular_longcat_flash.py), vLLM
(zero_expert_router.py) and here; SGLang (models/longcat_flash.py) scales the FFN experts alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moepp_jax.moe import router
from moepp_jax.moe.losses import Statistics
from moepp_jax.moe.param import Param
from moepp_jax.moe.rule import Loss, Params, Routing, option, state_param


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongCatRule(router.TopK):
    ffn_experts: float = option(1.2, above=0)  # K_e, FFN experts that a token is to have
    scale: float = option(1.0, above=0)  # of all gates
    rate: float = option(0.1, at_least=0)  # mu at the start
    rate_decay: float = option(0.9995, above=0, at_most=1)  # of mu, a step
    groups: int = option(1, at_least=1)  # D, groups of FFN experts that the loss balances
    balance_weight: float = option(1e-3, at_least=0)  # alpha

    def check(self) -> None:
        super().check()
        router.require_kinds(self, "n_copy")
        self.require(
            self.ffn_experts < self.top_k,
            "ffn_experts",
            f"leaves the copies none of the top_k = {self.top_k} choices: it must be less",
        )
        self.require(
            max(self.load) <= 1,
            "ffn_experts",
            f"cannot be had with top_k = {self.top_k} of {self.pool}: an expert would be chosen "
            "more than once a token",
        )
        self.require(
            self.pool.n_ffn % self.groups == 0,
            "groups",
            f"must divide the FFN experts, n_ffn = {self.pool.n_ffn}",
        )

    @property
    def load(self) -> tuple[float, ...]:
        n_ffn, n_copy = self.pool.n_ffn, self.pool.n_copy
        copies = self.top_k - self.ffn_experts
        return (self.ffn_experts / n_ffn,) * n_ffn + (copies / n_copy,) * n_copy

    def state(self) -> dict[str, Param]:
        return {"bias": state_param(self.pool.size), "rate": state_param(mean=self.rate)}

    def route(self, x_GSD, previous_GSN, params: Params) -> Routing:
        logits = self.logits(x_GSD, previous_GSN, params)
        scored = self.scored(logits)
        scores = jax.nn.softmax(scored, axis=-1)
        experts = router.top_k(scores + params["bias"], self.top_k)
        gates = router.gates_of("raw", scored, scores, experts, self.pool.first_zero)
        return Routing(experts, self.scale * gates, scores, logits)

    def losses(self, stats: Statistics, state: Params) -> dict[str, Loss]:
        wanted = self._by_group(jnp.array(self.load, jnp.float32))
        f = jax.lax.stop_gradient(self._by_group(stats.load)) / wanted
        balance = jnp.sum(f * self._by_group(stats.prob), axis=-1)
        return super().losses(stats, state) | {"balance_loss": Loss(balance, self.balance_weight)}

    def update(self, state: Params, stats: Statistics) -> Params:
        is_ffn = jnp.arange(self.pool.size) < self.pool.n_ffn
        missing = (jnp.array(self.load, jnp.float32) - stats.load) / self.top_k
        step = state["rate"][..., None] * jnp.where(is_ffn, missing, 0.0)
        return {"bias": state["bias"] + step, "rate": state["rate"] * self.rate_decay}

    def _by_group(self, values: Float[Array, "*L N"]) -> Float[Array, "*L groups"]:
        """Sums over each group of FFN experts, and over the copies."""
        ffn, copies = jnp.split(values, [self.pool.n_ffn], axis=-1)
        ffn = ffn.reshape(*ffn.shape[:-1], self.groups, -1).sum(axis=-1)
        return jnp.concatenate([ffn, copies.sum(axis=-1, keepdims=True)], axis=-1)
