"""Prompt in, text out: prefill and decode, each compiled once for a shape, with a key-value cache.

Prompts of different lengths are padded on the left, to a power of two: all rows then write the same
place of the cache, and a padded place is seen by nobody.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moepp_jax import model as model_lib
from moepp_jax import vocabulary
from moepp_jax.config import ConfigError, GenerateConfig


def sampler(settings: GenerateConfig) -> Callable[[Array, Array], Array]:
    """A function (logits (B, V), key) -> tokens (B,).

    Greedy at temperature 0. Otherwise logits are divided by the temperature, then only the top_k
    best stay (0: all), then the smallest set of them whose probability reaches top_p.
    """
    if settings.temperature == 0:
        return lambda logits, key: jnp.argmax(logits, axis=-1)
    filters = [lambda logits: logits / settings.temperature]
    if settings.top_k:
        filters.append(functools.partial(_keep_top_k, k=settings.top_k))
    if settings.top_p < 1:
        filters.append(functools.partial(_keep_top_p, p=settings.top_p))

    def sample(logits, key):
        for keep in filters:
            logits = keep(logits)
        return jax.random.categorical(key, logits, axis=-1)

    return sample


def _keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits >= least, logits, -jnp.inf)


def _keep_top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # The best token always stays; a token stays if those before it do not reach p.
    least = jnp.min(jnp.where(before < p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


class Generator:
    """Generation with one model: the compiled functions live as long as this object.

    Args:
      model: built for dropless dispatch.
    """

    def __init__(self, model: model_lib.LanguageModel, params: dict[str, Any]):
        self._model = model
        self._params = params
        # Compiled once for a prompt's shape, and once for one token.
        self._run = jax.jit(self._forward, static_argnames="sample", donate_argnames="cache")
        self._sampler = functools.lru_cache(sampler)

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerateConfig,
        end: int | None = None,
        on_token: Callable[[np.ndarray], None] | None = None,
    ) -> list[list[int]]:
        """Continues every prompt by up to settings.max_new_tokens tokens.

        Args:
          prompts: token ids; each at least one.
          end: the token that ends a text; it is not returned.
          on_token: called with the (B,) tokens of every step as they come.

        Raises:
          ConfigError: a prompt is empty, or holds an id outside the vocabulary.
        """
        vocab_size = self._model.config.vocab_size
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ConfigError(f"prompt {i} is empty: give at least one token")
            if not all(0 <= t < vocab_size for t in prompt):
                raise ConfigError(f"prompt {i} holds ids outside the vocabulary of {vocab_size}")
        if not prompts:
            return []
        # Fewer shapes, fewer compilations: the lengths are rounded up, the padding is masked.
        width = _power_of_two(max(map(len, prompts)))
        places = width + _power_of_two(settings.max_new_tokens)
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[width - len(prompt) :] = prompt
        first = np.array([width - len(prompt) for prompt in prompts], np.int32)

        cache = model_lib.empty_cache(self._model.config, len(prompts), places)
        sample = self._sampler(dataclasses.replace(settings, max_new_tokens=1, seed=0))
        key = jax.random.key(settings.seed)
        texts: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        start = 0
        for i in range(settings.max_new_tokens):
            step_key = jax.random.fold_in(key, i)
            tokens, cache = self._run(
                self._params, cache, tokens, first, start, step_key, sample=sample
            )
            start = width + i
            new = np.asarray(tokens)[:, 0]
            open_rows -= {row for row in open_rows if new[row] == end}
            for row in open_rows:
                texts[row].append(int(new[row]))
            if on_token:
                on_token(new)
            if not open_rows:
                break
        return texts

    def _forward(
        self,
        params,
        cache,
        tokens_BL: Int[Array, "B L"],
        first_B: Int[Array, " B"],
        start,
        key,
        *,
        sample,
    ):
        """These tokens from place `start` on; row b's real tokens begin at place first_B[b]."""
        L, places = tokens_BL.shape[1], cache.keys.shape[3]
        place_L = start + jnp.arange(L)
        positions_BL = jnp.maximum(place_L - first_B[:, None], 0)
        seen_LM = jnp.arange(places) <= place_L[:, None]
        mask_BLM = seen_LM & (jnp.arange(places) >= first_B[:, None])[:, None, :]
        out = self._model.apply({"params": params}, tokens_BL, positions_BL, mask_BLM, cache, start)
        logits = vocabulary.logits(params, out.hidden[:, -1])
        return sample(logits, key).astype(jnp.int32)[:, None], out.cache


def _power_of_two(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())
