"""Prompts in, tokens out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moepp_jax.config import GenerateConfig
from moepp_jax.errors import ConfigError
from moepp_jax.generation import sampling
from moepp_jax.generation.batch import Batch
from moepp_jax.generation.layers import Layers
from moepp_jax.generation.programs import Programs, Speed
from moepp_jax.model import LanguageModel

# Called with a new token of its sequence; true ends it.
Watch = Callable[[int], bool]


class Generator:
    """Generation with one model: the compiled functions live as long as this object.

    Prompts are padded on the left, their number, their length and the cache to powers of two; for
    each of these sizes a program is compiled once, and runs many tokens a call. A cache that is
    full moves into one twice its size.

    Attributes:
      speed: of the last call.
    """

    def __init__(
        self,
        model: LanguageModel,
        params: dict[str, Any],
        mesh: Mesh | None = None,
        least_places: int = 256,
        use_up: bool = False,
        surplus: np.ndarray | None = None,
    ):
        """
        Args:
          model: built for dropless dispatch, and for the mesh if there is one.
          params: its parameters; on a mesh sharded as in training. When they are first used they
            are copied, in the dtype of arithmetic; not if they are `layers.taken_apart` already.
          mesh: sequences are split over its devices, which are of one process.
          least_places: of a cache.
          use_up: the arrays of params are deleted when they are copied.
          surplus: (V,) rows of the embedding that are no token, which are never drawn.
        """
        devices = jax.devices() if mesh is None else mesh.devices.flat
        layers = Layers(model, devices[0].platform)
        self._config = model.config
        self._programs = Programs(layers, params, mesh, use_up)
        self._least_places = least_places
        self._surplus = surplus

    @property
    def speed(self) -> Speed:
        return self._programs.speed

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerateConfig,
        end: int | Collection[int] | None = None,
        **options: Any,
    ) -> list[list[int]]:
        """The new tokens of every prompt; arguments and errors are those of `stream`."""
        texts: list[list[int]] = [[] for _ in prompts]
        for new in self.stream(prompts, settings, end, **options):
            for text, tokens in zip(texts, new, strict=True):
                text += tokens
        return texts

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerateConfig,
        end: int | Collection[int] | None = None,
        limits: Sequence[int] | None = None,
        samples: Sequence[int] | None = None,
        watch: Sequence[Watch] | None = None,
    ) -> Iterator[list[list[int]]]:
        """Continues every prompt, a few tokens at a time.

        What is drawn for a prompt depends on the seed, the prompt and its number in `samples`, not
        on the other prompts.

        Args:
          prompts: token ids; each at least one.
          end: the token that ends a text, or several; it is not returned.
          limits: for each prompt, the most new tokens; settings.max_new_tokens by default.
          samples: for each prompt, which of its samples this is; the first, 0, by default.
          watch: for each prompt, a function that is called with each of its new tokens and ends it
            by returning true. A `text.Reader` does so when it reads a stop string.

        Yields:
          The next tokens of each prompt.

        Raises:
          ConfigError: a prompt is empty, or holds an id outside the vocabulary, or a limit is not
            positive.
        """
        ends = {end} if isinstance(end, int) else set(end or ())
        limits = list(limits or [settings.max_new_tokens] * len(prompts))
        self._check(prompts, limits)
        self._programs.speed = Speed()
        if not prompts:
            return
        samples = samples or [0] * len(prompts)
        watch = watch or [_see_no_end] * len(prompts)
        left = dict(enumerate(limits))  # sequences that go on, and their tokens to come

        def read(made):
            """The tokens that count, of what the device made: it knows nothing of `watch`."""
            new = [[] for _ in prompts]
            for row in list(left):
                for token in made[row].tolist():
                    if token in ends or token < 0:
                        left.pop(row)
                        break
                    new[row].append(token)
                    left[row] -= 1
                    if watch[row](token) or not left[row]:
                        left.pop(row)
                        break
            return new

        rules = sampling.rules(settings, self._surplus)
        batch = Batch(self._programs, prompts, limits, samples, ends, settings.seed, rules)
        yield read(batch.start(self._least_places))
        while left:
            yield read(batch.go_on(left))

    def _check(self, prompts, limits) -> None:
        vocab_size = self._config.vocab_size
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ConfigError(f"prompt {i} is empty: give at least one token")
            if not all(0 <= t < vocab_size for t in prompt):
                raise ConfigError(f"prompt {i} holds ids outside the vocabulary of {vocab_size}")
        for i, limit in enumerate(limits):
            if limit < 1:
                raise ConfigError(f"limit {i} = {limit} must be at least 1 new token")


def _see_no_end(token: int) -> bool:
    return False
