"""ReMoE (arXiv 2412.14711): every expert whose ReLU is open, as many as a token opens.

    R = ReLU(W x),  E = {i : R_i > 0},  g = R
    L = lambda N / K sum_i f_i mean(R_i),  f_i the share of the tokens that choose expert i
    S = 1 - (experts of a token, mean over tokens and layers) / N
    lambda <- lambda alpha if S < 1 - K/N else lambda / alpha,  after every step

Routing is continuous: an expert comes and goes with gate 0. What keeps it sparse is an L1 penalty,
refined so that busy experts pay more; its coefficient lambda, one for all layers, follows the
sparsity S until K experts are active on average. At first lambda is nothing and about half of the
ReLUs are open: the authors' models train densely for about a hundred steps.

Equations and defaults are of the authors' code (thu-ml/ReMoE: `ReLURouter` in Megatron's
`moe/router.py`, the update in `training.py`). The paper writes alpha^sign(wanted S - S), which
would leave lambda alone at equality; the code, and this, divides. The code sums the layers' terms,
the paper takes their mean, and so does this: lambda finds its own level and takes up the factor,
but arrives a few steps later. `max_experts` is not theirs: it bounds what a token can cost.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moepp_jax.moe import losses, router
from moepp_jax.moe.losses import Statistics
from moepp_jax.moe.param import Param
from moepp_jax.moe.rule import Loss, Params, Routing, option, state_param


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReMoERule(router.Router):
    top_k: int = option(2, at_least=1)  # K, experts a token is to have on average
    max_experts: int = option(0, at_least=0)  # no token has more, only its best; 0: any number
    lambda_start: float = option(1e-8, above=0)
    alpha: float = option(1.2, above=1)  # lambda's step, a factor

    def check(self) -> None:
        super().check()
        router.require_top_k(self, self.top_k)
        self.require(
            not self.max_experts or self.top_k <= self.max_experts <= self.pool.size,
            "max_experts",
            f"must be from top_k = {self.top_k} to the {self.pool.size} experts there are "
            f"({self.pool}), or 0 for no bound",
        )

    @property
    def most(self) -> int:
        return self.max_experts or self.pool.size

    @property
    def load(self) -> tuple[float, ...]:
        return (self.top_k / self.pool.size,) * self.pool.size

    def state(self) -> dict[str, Param]:
        """lambda: every layer has it, of the same value in all."""
        return {"coefficient": state_param(mean=self.lambda_start)}

    def route(self, x_GSD, previous_GSN, params: Params) -> Routing:
        logits = self.logits(x_GSD, previous_GSN, params)
        scores = jax.nn.relu(self.scored(logits))
        experts = router.chosen_where(scores > 0, scores, self.most)
        return Routing(experts, router.at_chosen(scores, experts), scores, logits)

    def losses(self, stats: Statistics, state: Params) -> dict[str, Loss]:
        share = [1 / self.top_k] * self.pool.size
        penalty = losses.weighted_balance(stats.load, stats.prob, share)
        return super().losses(stats, state) | {"l1_loss": Loss(penalty, state["coefficient"])}

    def update(self, state: Params, stats: Statistics) -> Params:
        """lambda alpha if more than K experts are active, too many, else lambda / alpha."""
        active = jnp.mean(jnp.sum(stats.load, axis=-1))  # a token, over all layers
        moved = state["coefficient"] * jnp.where(active > self.top_k, self.alpha, 1 / self.alpha)
        # From 0 it would never come back.
        return {"coefficient": jnp.maximum(moved, jnp.finfo(jnp.float32).tiny)}
