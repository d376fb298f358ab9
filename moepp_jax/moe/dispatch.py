"""Where each assignment goes: capacities and slots, and rows of buffers, all of them integers.

An assignment is one of a token's K choices; assignment t K + k is choice k of token t. Where they
go has the name "routing" in checkpoint policies: kept, queues are not counted again in backward.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Int

from moepp_jax.moe.rows import Rows


def capacity(load: Sequence[float], gamma: float, tokens: int) -> tuple[int, ...]:
    """Slots that each of the N experts has for a group: ceil(gamma load_i S), the rule's load.

    Of MoE++ that is the heterogeneous capacity (eq. 8), C_FFN = ceil(gamma tau A / (tau N_FFN +
    N_ZC)) and C_ZC = ceil(gamma A / (tau N_FFN + N_ZC)), with A = K S assignments in the group
    (GShard's convention; with the A = S that the paper writes, K = 2 would drop at least 45 % of
    all assignments). No expert is given more than S, since a token chooses an expert once.

    Args:
      load: share of the tokens that each expert has at balance (`Rule.load`).
      gamma: capacity factor, > 0.
      tokens: S, tokens of a group.
    """
    # A product such as 1.1 * 10 must not gain a slot from its last bit.
    return tuple(min(max(math.ceil(round(gamma * f * tokens, 6)), 1), tokens) for f in load)


class Plan(NamedTuple):
    """Place of every assignment in its expert's queue, and whether there was room for it."""

    slot: Int[Array, "G S K"]
    kept: Bool[Array, "G S K"]


def queue(experts_GSK: Int[Array, "G S K"], num_experts: int) -> Int[Array, "G S K"]:
    """How many earlier tokens of the group chose the same expert.

    Queues are in token order, all choices of a token before those of the next: a later token never
    takes an earlier one's place, so the layer stays causal when it drops.
    """
    one_hot = experts_GSK[..., None] == jnp.arange(num_experts)
    chosen_GSN = jnp.any(one_hot, axis=2).astype(jnp.int32)
    before_GSN = jnp.cumsum(chosen_GSN, axis=1) - chosen_GSN
    return jnp.sum(jnp.where(one_hot, before_GSN[:, :, None, :], 0), axis=-1)


def assign(experts_GSK: Int[Array, "G S K"], capacity_N: Sequence[int], sequences: int = 1) -> Plan:
    """Gives the assignments their slots; those past an expert's capacity are dropped.

    Slots are given position by position across the sequences of a group, so a token can lose its
    place to another sequence's of the same position or an earlier one, and never to a later token.

    Args:
      capacity_N: slots of each expert. An unused choice is one of expert N, which has none.
      sequences: n, that a group holds, one after the other.
    """
    if sequences > 1:
        plan = assign(_swapped(experts_GSK, sequences), capacity_N)
        return Plan(*(_swapped(a, a.shape[1] // sequences) for a in plan))
    slot = queue(experts_GSK, len(capacity_N))
    return Plan(slot, checkpoint_name(slot < _room(experts_GSK, capacity_N), "routing"))


def _room(experts_GSK: Int[Array, "G S K"], capacity_N: Sequence[int]) -> Int[Array, "G S K"]:
    """The capacity of each assignment's expert: experts of a kind have the same, and a comparison
    for each kind is nothing beside a gather, for which a TPU fetches number by number.
    """
    runs, end = [], 0
    for slots, experts in itertools.groupby(capacity_N):
        end += len(list(experts))
        runs.append((end, slots))
    room = jnp.zeros_like(experts_GSK)  # of an unused choice
    for end, slots in reversed(runs):
        room = jnp.where(experts_GSK < end, slots, room)
    return room


def _swapped(a_GSK: Array, runs: int) -> Array:
    """Tokens of S = runs x P in the order P x runs: integers are turned round, never tokens."""
    G, S, K = a_GSK.shape
    return a_GSK.reshape(G, runs, S // runs, K).swapaxes(1, 2).reshape(G, S, K)


def capacity_rows(
    experts_GSK: Int[Array, "G S K"], plan: Plan, n_ffn: int, slots: int, tile: int = 1
) -> Rows:
    """Rows of a buffer (E, B), the order in which the exchange and the experts read it.

    An expert's B rows are its slots (G, C), then empty rows up to a multiple of `tile`.
    """
    G, S, K = experts_GSK.shape
    group = jnp.arange(G)[:, None, None]
    of_expert = -(-G * slots // tile) * tile
    row = experts_GSK * of_expert + group * slots + plan.slot
    row = jnp.where(plan.kept & (experts_GSK < n_ffn), row, n_ffn * of_expert)
    return _rows(row.reshape(G * S, K), n_ffn * of_expert)


def sorted_rows(
    experts_TK: Int[Array, "T K"], n_ffn: int, few: bool = False
) -> tuple[Rows, Int[Array, " E"]]:
    """Rows sorted by expert, then token, with no gaps; and how many each FFN expert has.

    Experts from n_ffn on get no row. The buffer has T min(K, E) rows, the most there can be.

    Args:
      few: whether the rows that are filled can be few of these.
    """
    place = queue(experts_TK[None], n_ffn)[0]
    counts_E = jnp.sum(experts_TK[..., None] == jnp.arange(n_ffn), axis=(0, 1), dtype=jnp.int32)
    counts_E = checkpoint_name(counts_E, "routing")
    starts_E = jnp.cumsum(counts_E) - counts_E
    size = len(experts_TK) * min(experts_TK.shape[1], n_ffn)
    is_ffn = experts_TK < n_ffn
    row = jnp.where(is_ffn, starts_E[jnp.where(is_ffn, experts_TK, 0)] + place, size)
    rows = _rows(row, size)
    return (rows._replace(few=jnp.sum(counts_E)) if few else rows), counts_E


def _rows(row_TK: Int[Array, "T K"], size: int) -> Rows:
    """Inverts row numbers, by a scatter of integers."""
    assignments = jnp.arange(row_TK.size, dtype=jnp.int32)
    empty = jnp.full((size,), row_TK.size, jnp.int32)
    assignment = empty.at[row_TK.reshape(-1)].set(assignments, mode="drop")
    return Rows(*checkpoint_name((assignment, row_TK), "routing"))
