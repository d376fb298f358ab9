"""Dynamic top-p routing (arXiv 2403.07652): as many experts as it takes to be sure enough.

    G = W x,  P = softmax(G)
    E = the most probable experts, until their sum exceeds p;  g = P, or by `gate`
    L = beta N sum_i f_i P_i + gamma H,  f_i the share of the tokens that choose expert i,
    H = -sum_i P_i log P_i, mean over the tokens

The expert that crosses p is among the chosen, so there is one at least. Should rounding keep every
sum from exceeding p, all are. A flat P would take many experts: the entropy loss keeps it sharp.

Selection, raw gates and p = 0.4 are of the authors' code (ZhenweiAn/Dynamic_MoE,
`modeling_moe.py`), which has no losses; these and their weights are the paper's (section 2,
appendix B.3) as others quote it. Taken here, since no source says it: both are means over tokens
and layers, and f sums to the number of experts that tokens have, which the balance loss thus is at
balance. `max_experts` is not theirs: it bounds what a token can cost.

How many experts follow from p is known only by training (the paper: 1.8 of 16 at p = 0.4, 2.3 at
0.5). `expected` tells it in advance: capacity and the FLOPs that are reported derive from it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moepp_jax.moe import losses, router
from moepp_jax.moe.losses import Statistics
from moepp_jax.moe.rule import Loss, Params, Routing, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopPRule(router.Router):
    p: float = option(0.4, above=0, at_most=1)  # the probability that the chosen exceed
    max_experts: int = option(0, at_least=0)  # no token has more, only its best; 0: any number
    expected: float = option(2.0, at_least=1)  # experts a token, as it is expected to come out
    gate: str = option("raw", choices=tuple(router.GATES))
    balance_weight: float = option(1e-2, at_least=0)  # beta
    entropy_weight: float = option(1e-4, at_least=0)  # gamma

    def check(self) -> None:
        super().check()
        self.require(
            self.max_experts <= self.pool.size,
            "max_experts",
            f"is more than the {self.pool.size} experts there are ({self.pool}): set it to 0 for "
            "no bound",
        )
        self.require(
            self.expected <= self.most,
            "expected",
            f"must be at most the {self.most} experts that a token can have",
        )

    @property
    def most(self) -> int:
        return self.max_experts or self.pool.size

    @property
    def load(self) -> tuple[float, ...]:
        return (self.expected / self.pool.size,) * self.pool.size

    def route(self, x_GSD, previous_GSN, params: Params) -> Routing:
        logits = self.logits(x_GSD, previous_GSN, params)
        scored = self.scored(logits)
        scores = jax.nn.softmax(scored, axis=-1)
        best, experts = jax.lax.top_k(jax.lax.stop_gradient(scores), self.pool.size)
        enough = jnp.cumsum(best, axis=-1) > self.p
        # An expert is one too many if those before it were enough already.
        too_many = jnp.pad(enough[..., :-1], [(0, 0), (0, 0), (1, 0)])
        experts = jnp.where(too_many, self.pool.size, experts)[..., : self.most]
        gates = router.gates_of(self.gate, scored, scores, experts, self.pool.first_zero)
        return Routing(experts, gates, scores, logits)

    def losses(self, stats: Statistics, state: Params) -> dict[str, Loss]:
        balance = losses.weighted_balance(stats.load, stats.prob, [1.0] * self.pool.size)
        return super().losses(stats, state) | {
            "balance_loss": Loss(balance, self.balance_weight),
            "entropy_loss": Loss(stats.entropy, self.entropy_weight),
        }
