"""From logits to tokens. A rule that is not asked for is not compiled; values are no constants.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moepp_jax.config import GenerateConfig

# A rule that is in use, by its name in config.generate -> its value. Greedy has no temperature.
Rules = dict[str, Any]


def rules(settings: GenerateConfig, surplus: np.ndarray | None = None) -> Rules:
    """The rules that these settings ask for.

    Args:
      surplus: (V,) which ids are no token; none by default.
    """
    found: Rules = {}
    if surplus is not None and surplus.any():
        found["surplus"] = np.asarray(surplus, bool)
    if settings.repetition_penalty != 1:
        found["repetition_penalty"] = np.float32(settings.repetition_penalty)
    if settings.temperature > 0:
        found["temperature"] = np.float32(settings.temperature)
        if settings.top_k > 0:
            found["top_k"] = np.float32(settings.top_k)
        if settings.top_p < 1:
            found["top_p"] = np.float32(settings.top_p)
        if settings.min_p > 0:
            found["min_p"] = np.float32(settings.min_p)
    return found


def number_of(prompt: Sequence[int]) -> int:
    """A number of 32 bits that two prompts hardly ever share."""
    return zlib.crc32(np.asarray(prompt, "<i4").tobytes())


def draw_key(seed, prompt, sample, step) -> Array:
    """The key of one draw.

    It is of the prompt (`number_of`) and of which of its samples this is, not of what else is in
    the batch nor of the place there: the text is the same in any company.
    """
    key = jax.random.key(seed)
    for number in (prompt, sample, step):
        key = jax.random.fold_in(key, number)
    return key


def sample(
    logits: Float[Array, "B V"],
    keys: Any,
    rules: Rules,
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """One token a row, each drawn with its own key.

    The rules apply in this order: what is surplus is never drawn; repetition_penalty divides the
    positive logits of tokens that the text holds already, and multiplies the negative ones;
    temperature divides; top_k leaves the best k; top_p, of these, the smallest set that has so much
    of their probability; min_p, of these, those that are at least so probable as this share of the
    best. Equal ones stay or go together.

    Args:
      keys: (B,) keys of this step, `draw_key`.
      seen: tokens that the text holds; read by repetition_penalty alone.
    """
    if "surplus" in rules:
        logits = jnp.where(rules["surplus"], -jnp.inf, logits)
    if "repetition_penalty" in rules:
        penalty = rules["repetition_penalty"]
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, penalised, logits)
    if "temperature" not in rules:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / rules["temperature"]
    if "top_k" in rules:
        logits = _keep_best(logits, jnp.ones_like(logits), rules["top_k"])
    if "top_p" in rules:
        logits = _keep_best(logits, jax.nn.softmax(logits, axis=-1), rules["top_p"])
    if "min_p" in rules:
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(rules["min_p"])
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _keep_best(
    logits: Float[Array, "B V"], weights: Float[Array, "B V"], enough
) -> Float[Array, "B V"]:
    """The fewest of the largest logits whose weights add up to `enough`; all, if none do.

    Looks for the least of them bit by bit, which is quicker than sorting them all.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    # Whole numbers in the order of the floats.
    order = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def try_bit(i, least):
        tried = least | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        weight = jnp.sum(jnp.where(order >= tried, weights, 0), axis=-1, keepdims=True)
        return jnp.where(weight >= enough, tried, least)

    least = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros_like(order[:, :1]))
    return jnp.where(order >= least, logits, -jnp.inf)
