"""The router's bias, moved after each step by the load that the experts had: a rule, no gradient.

As in DeepSeek's auxiliary-loss-free balancing (arXiv 2408.15664), but of zero-computation experts
only, towards the share that tau asks for, and by less the nearer it is: steps of one size swing
around it. A model that has just been given such experts can start with a bias so low that none of
them is chosen, and is led to use them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moepp_jax.moe.experts import Pool

# So low that an expert is never chosen and its softmax is nothing, in float32.
NEVER = -30.0


def wanted_load(pool: Pool, top_k: int, tau: float) -> float:
    """Share of the tokens that each zero-computation expert has where the balance loss balances.

    K / (tau N_FFN + N_ZC): the paper's capacity of such an expert a token, at capacity factor 1.
    """
    return top_k / (tau * pool.n_ffn + pool.n_zero_computation)


def moved(
    bias_N: Float[Array, "*L N"],
    load_N: Float[Array, "*L N"],
    pool: Pool,
    wanted: float,
    rate: float,
) -> Float[Array, "*L N"]:
    """The bias after a step: b_i + u (1 - f_i / wanted) for zero-computation experts.

    The step is at most u, which is that of an expert which nobody chooses.
    """
    is_ffn = jnp.arange(pool.size) < pool.n_ffn
    return bias_N + jnp.where(is_ffn, 0.0, rate * jnp.clip(1.0 - load_N / wanted, -1.0, 1.0))
