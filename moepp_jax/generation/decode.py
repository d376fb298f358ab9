"""What runs on the device: a prompt into a cache, then token after token out of it.

Shapes: B sequences, L places of the prompts, M places of the cache, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moepp_jax.block import sight
from moepp_jax.generation import sampling
from moepp_jax.generation.layers import Cache, Layers, Params, into_new, into_place

# Tokens of each sequence that one call makes at most.
CHUNK = 32


class Rows(NamedTuple):
    """What is to be made of each sequence.

    Attributes:
      first: the place of its first token; those before it are padding.
      limit: tokens to be made.
      seed, prompt, sample: of `sampling.draw_key`.
    """

    first: Int[Array, " B"]
    limit: Int[Array, " B"]
    seed: Int[Array, " B"]
    prompt: Int[Array, " B"]
    sample: Int[Array, " B"]


class State(NamedTuple):
    """How far all sequences are.

    Attributes:
      caches: of every layer.
      token: the last ones, not yet in the cache.
      place: the place where they go.
      step: tokens made of each sequence.
      open: sequences that go on.
      ffn_experts, experts_read: of all calls so far but the prompts', see `layers.Work`.
      seen: tokens that each text holds, if a rule asks for them.
    """

    caches: list[Cache]
    token: Int[Array, " B"]
    place: Int[Array, ""]
    step: Int[Array, ""]
    open: Bool[Array, " B"]
    ffn_experts: Float[Array, " B"]
    experts_read: Float[Array, ""]
    seen: Bool[Array, "B V"] | None


def prefill(
    layers: Layers,
    places: int,
    params: Params,
    tokens_BL: Int[Array, "B L"],
    rows: Rows,
    ends: Int[Array, " n"],
    rules: sampling.Rules,
) -> State:
    """Prompts, padded on the left, into a cache of so many places; and their first new tokens."""
    L = tokens_BL.shape[1]
    place_L = jnp.arange(L)
    positions = jnp.maximum(place_L - rows.first[:, None], 0)
    mask = (place_L <= place_L[:, None]) & (place_L >= rows.first[:, None])[:, None, :]
    mask = sight(layers.config)(mask, place_L[:, None], place_L)
    attends = [into_new(mask, places)] * layers.config.num_layers
    work = layers(params, tokens_BL, positions, attends)
    seen = None
    if "repetition_penalty" in rules:
        real = place_L >= rows.first[:, None]
        seen = jnp.zeros(work.logits.shape, bool)
        seen = seen.at[jnp.arange(len(seen))[:, None], tokens_BL].max(real)
    zero = jnp.zeros((), jnp.int32)
    state = State(
        work.caches,
        token=jnp.zeros_like(rows.first),
        place=zero + L,
        step=zero,
        open=jnp.ones(rows.first.shape, bool),
        ffn_experts=jnp.zeros(rows.first.shape),
        experts_read=jnp.zeros(()),
        seen=seen,
    )
    return _draw(state, work.logits, rows, ends, rules)


def decode(
    layers: Layers,
    params: Params,
    state: State,
    rows: Rows,
    ends: Int[Array, " n"],
    rules: sampling.Rules,
    count: Int[Array, ""],
) -> tuple[State, Int[Array, "B chunk"]]:
    """Up to `count` tokens more of every sequence that is open, of CHUNK at most.

    Returns:
      The state, and the tokens; -1 where there are none.
    """

    def any_left(carry):
        state, i, _ = carry
        return (i < count) & layers.on_any_device(state.open)

    def one(carry):
        state, i, made = carry
        place_M = jnp.arange(state.caches[0].keys.shape[1])
        mask = (place_M <= state.place) & (place_M >= rows.first[:, None])
        mask = sight(layers.config)(mask, state.place, place_M)
        attends = [into_place(cache, state.place, mask) for cache in state.caches]
        positions = (state.place - rows.first)[:, None]
        work = layers(params, state.token[:, None], positions, attends)
        was_open = state.open
        state = state._replace(
            caches=work.caches,
            place=state.place + 1,
            ffn_experts=state.ffn_experts + jnp.where(was_open, work.ffn_experts, 0),
            experts_read=state.experts_read + work.experts_read,
        )
        state = _draw(state, work.logits, rows, ends, rules)
        new = jnp.where(was_open, state.token, -1)
        return state, i + 1, jax.lax.dynamic_update_index_in_dim(made, new, i, axis=1)

    made = jnp.full((len(rows.first), CHUNK), -1, jnp.int32)
    state, _, made = jax.lax.while_loop(any_left, one, (state, jnp.zeros((), jnp.int32), made))
    return state, made


def grow(caches: list[Cache]) -> list[Cache]:
    """The caches with twice the places."""
    return jax.tree.map(
        lambda a: jnp.pad(a, [(0, 0), (0, a.shape[1]), (0, 0)]),
        caches,
    )


def _draw(state: State, logits, rows: Rows, ends, rules: sampling.Rules) -> State:
    """The next token of every sequence, and whether it is the last."""
    keys = jax.vmap(sampling.draw_key, (0, 0, 0, None))(
        rows.seed, rows.prompt, rows.sample, state.step
    )
    token = sampling.sample(logits, keys, rules, state.seen)
    step = state.step + 1
    goes_on = state.open & (step < rows.limit) & ~jnp.any(token[:, None] == ends, axis=1)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    return state._replace(token=token, step=step, open=goes_on, seen=seen)
