"""Expert threshold routing (arXiv 2603.11535): every expert takes what passes its own cutoff.

    r = W x,  E = {i : r_i >= c_i},  g_i = sigmoid(r_i)
    q_i = the k-th largest r_i of the tokens of a group, k = round(load_i S), at least 1
    C_i = a C_i + (1 - a) mean q_i and n += 1 after each step;  c_i = C_i / (1 - a^n), 0 for n = 0

c_i is thus an average of the quantiles that would have given the wanted load in the steps before.
Choices depend on nothing but the token and the cutoffs: they are causal, need no balance loss, and
a token may have any number of experts, none too. The wanted loads are those of MoE++: an expert of
another kind has 1 / tau of an FFN expert's, and a token has `top_k` experts in the mean.

As in the authors' code (src/models/engines/common.py), cutoffs are of logits, and the gate is the
sigmoid as it is. Their code can divide gates by the number of a token's experts too;
"renormalise_all", over the sum of its gates, is the nearest here. Three differences. Their quantile
is of a micro-batch; here it is of each group and then averaged, so loads are met as far as groups
are alike. The paper's runs begin with 4,000 steps of expert choice, top-k over the tokens of the
batch; that looks at later tokens and is left out, so the first step, at c = 0, chooses about half
of all experts. And there is no shared expert here for a token that chooses none.

`dispatch = "dropless"` is meant: how many experts tokens have varies. kexue.fm/archives/11626 has
much the same rule, with a = .9.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moepp_jax.moe import router
from moepp_jax.moe.losses import Statistics
from moepp_jax.moe.param import Param
from moepp_jax.moe.rule import Params, Routing, option, state_param


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThresholdRule(router.Router):
    top_k: float = option(2.0, above=0)  # experts that a token is to have, in the mean
    tau: float = option(0.75, above=0, at_most=1)  # load of an FFN expert; another has 1
    gate: str = option("raw", choices=("raw", "renormalise_all"))
    decay: float = option(0.99, above=0)  # a, of the cutoffs, less than 1
    max_experts: int = option(0, at_least=0)  # K, the most a token can have; 0: all there are

    def check(self) -> None:
        super().check()
        self.require(self.decay < 1, "decay", "must be less than 1: cutoffs would never move")
        self.require(
            max(self.load) <= 1,
            "top_k",
            f"cannot be had with tau = {self.tau} of {self.pool}: an expert would be chosen more "
            "than once a token",
        )
        self.require(
            self.top_k <= self.most <= self.pool.size,
            "max_experts",
            f"must be from top_k = {self.top_k} to the {self.pool.size} experts there are, or 0",
        )

    @property
    def most(self) -> int:
        return self.max_experts or self.pool.size

    @property
    def load(self) -> tuple[float, ...]:
        pool = self.pool
        other = self.top_k / (self.tau * pool.n_ffn + pool.n_zero_computation)
        return (self.tau * other,) * pool.n_ffn + (other,) * pool.n_zero_computation

    def state(self) -> dict[str, Param]:
        return {"cutoff": state_param(self.pool.size), "updates": state_param()}

    def route(self, x_GSD, previous_GSN, params: Params) -> Routing:
        logits = self.logits(x_GSD, previous_GSN, params)
        scored = self.scored(logits)
        scores = jax.nn.sigmoid(scored)
        # Ordered by logits: sigmoids of large ones are equal.
        experts = router.chosen_where(scored >= self._cutoffs(params), scored, self.most)
        gates = router.gates_of(self.gate, scored, scores, experts, self.pool.first_zero)
        return Routing(experts, gates, scores, logits)

    def _cutoffs(self, state: Params) -> Float[Array, " N"]:
        """c: the average without the zeros that it started from."""
        weights = 1.0 - self.decay ** state["updates"]
        return state["cutoff"] / jnp.maximum(weights, jnp.finfo(jnp.float32).tiny)

    def measure(self, routing: Routing) -> dict[str, Float[Array, "G N"]]:
        """The cutoffs that would have given each group the wanted load."""
        scored = self.scored(jax.lax.stop_gradient(routing.logits))
        S = scored.shape[1]
        k = np.maximum(np.round(np.array(self.load) * S).astype(int), 1)
        ascending = jnp.sort(scored, axis=1)
        return {"cutoff": ascending[:, S - k, np.arange(self.pool.size)]}

    def update(self, state: Params, stats: Statistics) -> Params:
        average = self.decay * state["cutoff"] + (1.0 - self.decay) * stats.own["cutoff"]
        return {"cutoff": average, "updates": state["updates"] + 1.0}
