"""A trained model for Python users: `moepp_jax.load(workdir)`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moepp_jax import model as model_lib
from moepp_jax import vocabulary
from moepp_jax.checkpoint import Checkpoints
from moepp_jax.config import Config, ConfigError, GenerateConfig
from moepp_jax.data import Tokenizer
from moepp_jax.generate import Generator
from moepp_jax.workdir import read_config, tokenizer_file


class Model:
    """A language model with its parameters and its tokenizer.

    Attributes:
      config: of the run that trained it.
      params: a plain nested dictionary of arrays.
      tokenizer: None where the work directory has none; texts then cannot be given, tokens can.
    """

    def __init__(self, config: Config, params: dict[str, Any], tokenizer: Tokenizer | None = None):
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self._model = model_lib.build(config, dispatch="dropless")
        self._logits = jax.jit(self._forward)
        self._generator = Generator(self._model, params)

    def logits(self, tokens, mask=None) -> Float[Array, "B S V"]:
        """Next-token logits, float32, of every place.

        Args:
          tokens: (B, S) ids.
          mask: (B, S), true or 1 for real tokens; padding, on either side, is seen by no real
            token, and positions are counted from the first real one. By default all are real.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2:
            raise ValueError(f"tokens of shape {tokens.shape} must be (sequences, tokens)")
        if tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens of type {tokens.dtype} must be whole numbers")
        vocab_size = self.config.model.vocab_size
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise ValueError(f"tokens hold ids outside the vocabulary of {vocab_size}")
        real = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask).astype(bool)
        if real.shape != tokens.shape:
            raise ValueError(f"mask of shape {real.shape} must have that of tokens, {tokens.shape}")
        return self._logits(self.params, tokens.astype(np.int32), real)

    def generate(self, prompts: str | Sequence[Any], **settings: Any) -> Any:
        """Continues prompts; the settings are fields of config.generate.

        Args:
          prompts: one text, or several texts, or several lists of token ids.
          **settings: max_new_tokens, temperature, top_k, top_p, seed.

        Returns:
          The new text for a text, a list of them for several, lists of ids for ids.

        Raises:
          ConfigError: a prompt or a setting is of no use; the message names it.
        """
        chosen = self.config.replace("generate", **settings).generate
        if isinstance(prompts, str):
            return self._continue_texts([prompts], chosen)[0]
        if all(isinstance(p, str) for p in prompts):
            return self._continue_texts(prompts, chosen)
        return self._continue_ids([_ids(i, p) for i, p in enumerate(prompts)], chosen)

    def _continue_texts(self, texts: Sequence[str], settings: GenerateConfig) -> list[str]:
        if self.tokenizer is None:
            raise ConfigError("this model has no tokenizer: give lists of token ids")
        ids = [[self.tokenizer.bos_id, *self.tokenizer.encode(text)] for text in texts]
        return [self.tokenizer.decode(new) for new in self._continue_ids(ids, settings)]

    def _continue_ids(self, ids: list[list[int]], settings: GenerateConfig) -> list[list[int]]:
        end = self.tokenizer.eos_id if self.tokenizer else None
        return self._generator(ids, settings, end)

    def _forward(self, params, tokens, real):
        S = tokens.shape[1]
        positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
        mask = jnp.tril(jnp.ones((S, S), bool)) & real[:, None, :]
        out = self._model.apply({"params": params}, tokens, positions, mask)
        return vocabulary.logits(params, out.hidden)


def _ids(i: int, prompt: Any) -> list[int]:
    ids = np.asarray(prompt)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ConfigError(
            f"prompt {i} = {prompt!r} is no list of token ids: give one text, several texts, or "
            "several lists of ids"
        )
    return ids.tolist()


def load(workdir: str | Path, step: int | None = None) -> Model:
    """The model of a work directory, on one device.

    Args:
      step: which checkpoint; by default the best on held-out text, or the newest if none was
        evaluated.

    Raises:
      ConfigError, CheckpointError: the directory holds no run, no checkpoint, not that step, or a
        damaged one.
    """
    config = read_config(workdir)
    model = model_lib.build(config, dispatch="dropless")
    shapes = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0)))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), shapes)
    with Checkpoints(workdir, keep=config.train.keep) as checkpoints:
        params = checkpoints.restore_params(checkpoints.choose(step), abstract)
    file = tokenizer_file(workdir)
    return Model(config, params, Tokenizer.load(file) if file.exists() else None)
