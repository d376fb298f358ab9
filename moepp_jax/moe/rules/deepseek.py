"""DeepSeek's balance without a balance loss (arXiv 2408.15664), as DeepSeek-V3 has it (2412.19437).

    s = sigmoid(W x),  E = Top-K(s + b),  g = scale s / sum_E s by `gate`        (V3 eq. 13, 15, 16)
    b_i <- b_i + u sign(mean(f) - f_i) after every step, f_i the share of the tokens that choose i
    L = w N / K sum_i f'_i P'_i of every sequence                                (V3 eq. 17 to 20)

The bias b decides who is chosen and is no part of a gate. It has no gradient; each layer moves its
own by the load of the whole batch. An expert whose load is exactly the mean keeps its bias.

The loss only guards against extremes within a sequence: P' is the mean of s over its sum, and f'
counts the K best of s itself, what would be chosen without the bias. It is 1 at balance; only P'
carries a gradient. A sequence is here what a group is: the whole of it without capacity, else
`group_size` tokens.

Where sources differ: 2408.15664 writes the gates as they are ("raw"), V3 over their sum, which is
the default. `scale` is in no equation, but in V3's code (`route_scale`; 2.5 in the released model).
2408.15664 moves the bias by u times the error where scores are a softmax; this is the sign rule
alone. V3 trains without drops, and with u = 0 for the last 500 of its 14,800 billion tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moepp_jax.moe import losses, router
from moepp_jax.moe.losses import Statistics
from moepp_jax.moe.param import Param
from moepp_jax.moe.rule import Loss, Params, Routing, option, state_param


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekRule(router.TopK):
    gate: str = option("renormalise_all", choices=tuple(router.GATES))
    scale: float = option(1.0, above=0)  # multiplies the gates
    bias_rate: float = option(1e-3, at_least=0)  # u, of the bias on the scores, a step
    sequence_weight: float = option(1e-4, at_least=0)  # w

    def check(self) -> None:
        super().check()
        router.require_kinds(self)

    def state(self) -> dict[str, Param]:
        return {"bias": state_param(self.pool.size)}

    def route(self, x_GSD, previous_GSN, params: Params) -> Routing:
        logits = self.logits(x_GSD, previous_GSN, params)
        scored = self.scored(logits)
        scores = jax.nn.sigmoid(scored)
        experts = router.top_k(scores + params["bias"], self.top_k)
        gates = router.gates_of(self.gate, scored, scores, experts, self.pool.first_zero)
        return Routing(experts, self.scale * gates, scores, logits)

    def measure(self, routing: Routing) -> dict[str, Float[Array, " G"]]:
        """The loss of every sequence: the batch's means are not enough, for it is their product."""
        unbiased = router.top_k(routing.scores, self.top_k)
        chosen_GSN = jnp.any(unbiased[..., None] == jnp.arange(self.pool.size), axis=-2)
        load = jnp.mean(chosen_GSN, axis=1, dtype=jnp.float32)
        prob = jnp.mean(router.over_sum(routing.scores), axis=1)
        share = [1 / self.top_k] * self.pool.size
        return {"sequence_loss": losses.weighted_balance(load, prob, share)}

    def losses(self, stats: Statistics, state: Params) -> dict[str, Loss]:
        sequence = Loss(stats.own["sequence_loss"], self.sequence_weight)
        return super().losses(stats, state) | {"sequence_loss": sequence}

    def update(self, state: Params, stats: Statistics) -> Params:
        error = jnp.mean(stats.load, axis=-1, keepdims=True) - stats.load
        # Rounding differs between meshes: it must not choose the sign of no error at all.
        error = jnp.where(jnp.abs(error) > 1e-6, error, 0.0)
        return {"bias": state["bias"] + self.bias_rate * jnp.sign(error)}
