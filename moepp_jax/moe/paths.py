"""The two ways of a token to its FFN experts and back: fixed capacity, or dropless.

A path is a function (x, experts, gates, params of the FFN experts, pool, axis) -> (what the FFN
experts add to the output, which assignments were kept).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moepp_jax.moe import dispatch, exchange
from moepp_jax.moe.experts import Pool, swiglu
from moepp_jax.moe.grouped import Blocked

Path = Callable[..., tuple[Float[Array, "G S D"], Bool[Array, "G S K"]]]


def with_capacity(tau: float, gamma: float, expert: Callable = swiglu) -> Path:
    """Every expert has a fixed number of slots a group (eq. 8); what does not fit is dropped.

    A dropped assignment adds nothing, and the gates of the kept ones stay as they were. Capacity
    holds for zero-computation experts too, though nothing of theirs is put into a buffer.

    Args:
      expert: (params stacked over E, rows (E, B, D)) -> rows (E, B, D).
    """

    def path(x_GSD, experts_GSK, gates_GSK, params, pool: Pool, axis: str | None):
        G, S, D = x_GSD.shape
        K = experts_GSK.shape[-1]
        capacity_N = dispatch.capacity(pool, tau, gamma, S, K)
        plan = dispatch.assign(experts_GSK, capacity_N)
        rows = dispatch.capacity_rows(experts_GSK, plan, pool.n_ffn, capacity_N[0])
        buffer = dispatch.gather(x_GSD.reshape(G * S, D), rows).reshape(pool.n_ffn, -1, D)
        y = exchange.from_experts(expert(params, exchange.to_experts(buffer, axis)), axis)
        y = dispatch.combine(y.reshape(-1, D), gates_GSK.reshape(G * S, K), rows)
        return y.reshape(G, S, D), plan.kept

    return path


def dropless(grouped: Callable | None = None) -> Path:
    """Every assignment is served, whatever the load.

    On an expert axis each device reserves room for all its assignments going to any one device: n
    times the rows that it has, the worst case, so nothing can overflow.

    Args:
      grouped: a grouped function of `grouped.py`; by default `Blocked(swiglu)`.
    """
    grouped = grouped or Blocked(swiglu)

    def path(x_GSD, experts_GSK, gates_GSK, params, pool: Pool, axis: str | None):
        G, S, D = x_GSD.shape
        K = experts_GSK.shape[-1]
        serve = _serve_here if axis is None else _serve_across
        y = serve(
            grouped,
            x_GSD.reshape(G * S, D),
            experts_GSK.reshape(G * S, K),
            gates_GSK.reshape(G * S, K),
            params,
            pool.n_ffn,
            axis,
        )
        return y.reshape(G, S, D), jnp.ones_like(experts_GSK, dtype=bool)

    return path


def _serve_here(grouped, x_TD, experts_TK, gates_TK, params, n_ffn, axis=None):
    rows, counts_E = dispatch.sorted_rows(experts_TK, n_ffn)
    y_RD = grouped(params, dispatch.gather(x_TD, rows), counts_E)
    return dispatch.combine(y_RD, gates_TK, rows)


def _serve_across(grouped, x_TD, experts_TK: Int[Array, "T K"], gates_TK, params, n_ffn, axis):
    devices = jax.lax.axis_size(axis)
    rows, counts = dispatch.device_rows(experts_TK, n_ffn, devices)
    there = exchange.swap(dispatch.gather(x_TD, rows), axis)
    # Row j of a part belongs to the first local expert whose running count exceeds j.
    ends = jnp.cumsum(exchange.swap(counts, axis), axis=1)
    place = jnp.arange(experts_TK.size)
    experts = jnp.sum(place[None, :, None] >= ends[:, None, :], axis=-1).reshape(-1, 1)
    unweighted = (experts >= 0).astype(jnp.float32)
    y = _serve_here(grouped, there, experts, unweighted, params, n_ffn // devices)
    return dispatch.combine(exchange.swap(y, axis), gates_TK, rows)
