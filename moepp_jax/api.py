"""A trained model for Python users: `moepp_jax.load(workdir)`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from moepp_jax import mesh as mesh_lib
from moepp_jax import model as model_lib
from moepp_jax import vocabulary
from moepp_jax.config import Config, GenerateConfig
from moepp_jax.data import Tokenizer
from moepp_jax.errors import ConfigError
from moepp_jax.generation import Generator, Reader, Speed
from moepp_jax.run import open_run
from moepp_jax.verified import only_verified

if TYPE_CHECKING:
    from moepp_jax.analysis.shown import Routing


class Model:
    """A language model with its parameters and its tokenizer.

    Attributes:
      config: of the run that trained it.
      params: a plain nested dictionary of arrays; None in a model that only generates.
      tokenizer: None where the work directory has none; texts then cannot be given, tokens can.
      ends: tokens that end what the model writes, beside the tokenizer's end of a text.
      mesh: that the parameters are cut over, None for one device.
      name, step: of the run and its checkpoint.
      speed: of the last generation.
    """

    def __init__(
        self,
        config: Config,
        params: dict[str, Any],
        tokenizer: Tokenizer | None = None,
        mesh: Mesh | None = None,
        only_generate: bool = False,
        name: str = "",
        step: int = 0,
        ends: Collection[int] = (),
    ):
        """
        Args:
          mesh: over which the parameters are cut as in training; None is one device.
          only_generate: params are given up to `generate` and `stream`; there is no `logits`.
        """
        self.config = config
        self.params = None if only_generate else params
        self.tokenizer, self.ends = tokenizer, frozenset(ends)
        self.name, self.step = name, step
        self.network = model_lib.build(config, mesh, dispatch="dropless")
        self.mesh = mesh
        self._devices = 1 if mesh is None else mesh.size
        forward = self._forward
        if mesh is not None:
            rows = mesh_lib.BATCH
            specs = (mesh_lib.specs(self.network.described), rows, rows)
            forward = jax.shard_map(forward, mesh=mesh, in_specs=specs, out_specs=rows)
        self._logits = jax.jit(forward)
        surplus = tokenizer and tokenizer.surplus(config.model.vocab_size)
        self._generator = Generator(
            self.network, params, mesh, use_up=only_generate, surplus=surplus
        )
        self.speed = Speed()

    def logits(self, tokens, mask=None) -> Float[Array, "B S V"]:
        """Next-token logits, float32, of every place.

        Args:
          tokens: (B, S) ids.
          mask: (B, S), true or 1 for real tokens; padding, on either side, is seen by no real
            token, and positions are counted from the first real one. By default all are real.
        """
        if self.params is None:
            raise ValueError("this model was loaded with only_generate: it has no logits")
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
        more = ((0, -len(tokens) % self._devices), (0, 0))
        tokens, real = np.pad(tokens.astype(np.int32), more), np.pad(real, more)
        return self._logits(self.params, tokens, real)[: tokens.shape[0] - more[0][1]]

    def generate(
        self,
        prompts: str | Sequence[Any],
        stop: str | Sequence[str | int] = (),
        num_samples: int | None = None,
        batch_size: int = 16,
        progress: Callable[[int], None] | None = None,
        **settings: Any,
    ) -> Any:
        """Continues prompts; the settings are fields of config.generate.

        What is drawn for a prompt depends on it and on the seed, not on the other prompts.

        Args:
          prompts: one text, or several texts, or several lists of token ids.
          stop: texts and token ids that end a text, beside `ends` and the tokenizer's end of a
            text; what is returned ends before them. Of ids, those stay in which a stop text came.
          num_samples: so many texts of each prompt, as a list in the place of one.
          batch_size: texts that are made together.
          progress: called with the number of new tokens, whenever there are some.
          **settings: max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed.

        Returns:
          The new text for a text, a list of them for several, lists of ids for ids.

        Raises:
          ConfigError: a prompt or a setting is of no use; the message names it.
        """
        alone = isinstance(prompts, str)
        listed = [prompts] if alone else list(prompts)
        as_text = all(isinstance(p, str) for p in listed)
        samples = 1 if num_samples is None else num_samples
        for name, value in (("num_samples", samples), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"{name} = {value} must be at least 1")
        request = self._request(listed, as_text, stop, samples, settings)
        self.speed = Speed()
        made: list[list[int]] = [[] for _ in request.prompts]
        for first in range(0, len(made), batch_size):
            part = slice(first, first + batch_size)
            for new in self._stream(request, part):
                for text, tokens in zip(made[part], new, strict=True):
                    text += tokens
                if progress:
                    progress(sum(map(len, new)))
            self.speed += self._generator.speed
        if as_text:
            made = [reader.finished() for reader in request.readers]
        if num_samples is not None:
            made = [made[i : i + samples] for i in range(0, len(made), samples)]
        return made[0] if alone else made

    def stream(
        self, prompt: str, stop: str | Sequence[str | int] = (), **settings: Any
    ) -> Iterator[str]:
        """The text that `generate` gives for one prompt, in pieces as they come.

        Raises:
          ConfigError: as `generate`, before anything is computed.
        """
        if not isinstance(prompt, str):
            raise ConfigError(f"prompt = {prompt!r} must be one text to be streamed")
        return self._pieces(self._request([prompt], True, stop, 1, settings))

    def routing(self, texts: Any) -> Routing:
        """How the tokens of texts were routed; in a notebook the result shows itself.

        Args:
          texts: one, or several; each is a document, in rows as long as those of training.

        Raises:
          ConfigError: there is no tokenizer, or no text.
        """
        # Matplotlib and Parquet are for those who ask.
        from moepp_jax.observe import loaded

        if self.params is None:
            raise ValueError("this model was loaded with only_generate: it has no routing")
        if self.tokenizer is None:
            raise ConfigError("this model has no tokenizer: its tokens cannot be shown")
        alone = isinstance(texts, str) or not isinstance(texts, Iterable)
        listed = [texts] if alone else list(texts)
        return loaded.routing(self, listed)

    def _pieces(self, request: _Request) -> Iterator[str]:
        (reader,) = request.readers
        for _ in self._stream(request, slice(None)):
            self.speed = self._generator.speed
            if piece := reader.take():
                yield piece
        reader.close()
        if piece := reader.take():
            yield piece

    def _stream(self, request: _Request, part: slice) -> Iterator[list[list[int]]]:
        return self._generator.stream(
            request.prompts[part],
            request.settings,
            request.ends,
            samples=request.samples[part],
            watch=request.readers and request.readers[part],
        )

    def _request(self, prompts, as_text, stop, samples, settings) -> _Request:
        chosen = self.config.replace("generate", **settings).generate
        stop = [stop] if isinstance(stop, str) else list(stop)
        texts = [s for s in stop if not isinstance(s, int)]
        ends = self.ends | {s for s in stop if isinstance(s, int)}
        if self.tokenizer is not None:
            ends |= {self.tokenizer.eos_id}
        elif texts or (as_text and prompts):
            what = "token ids to stop at" if texts else "lists of token ids"
            raise ConfigError(f"this model has no tokenizer: give {what}")
        if as_text:
            ids = [self.tokenizer.prompt(text) for text in prompts]
        else:
            ids = [_ids(i, p) for i, p in enumerate(prompts)]
        ids = [prompt for prompt in ids for _ in range(samples)]
        readers = None
        if as_text or texts:
            readers = [Reader(self.tokenizer, prompt, texts) for prompt in ids]
        return _Request(ids, list(range(samples)) * len(prompts), chosen, ends, readers)

    def _forward(self, params, tokens, real):
        positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
        out = self.network(params, tokens, positions, real.astype(jnp.int32))
        return vocabulary.logits(out.matrix, out.hidden)


class _Request(NamedTuple):
    """What the generator is asked for, and who reads what comes: a reader for each prompt."""

    prompts: list[list[int]]
    samples: list[int]
    settings: GenerateConfig
    ends: frozenset[int]
    readers: list[Reader] | None


def _ids(i: int, prompt: Any) -> list[int]:
    ids = np.asarray(prompt)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ConfigError(
            f"prompt {i} = {prompt!r} is no list of token ids: give one text, several texts, or "
            "several lists of ids"
        )
    return ids.tolist()


def load(
    workdir: str | Path,
    step: int | None = None,
    all_devices: bool = False,
    only_generate: bool = False,
    zero_offset: float | None = None,
    strict: bool = False,
) -> Model:
    """The model of a work directory.

    Args:
      step: which checkpoint; by default the best on held-out text, or the newest if none was
        evaluated.
      all_devices: every parameter is cut over all devices, and put together where it is used: for
        models that one device cannot hold. By default it is on the first device.
      only_generate: the model has no `logits` and no `params`, and needs half the memory: it is
        held once, as generation reads it, and in the dtype of arithmetic.
      zero_offset: instead of config.moe.rule.zero_offset, on the logits of zero-computation
        experts: above 0 tokens run fewer FFN experts, below 0 more.
      strict: a checkpoint without checksums, which cannot be verified, is refused.

    Raises:
      ConfigError, CheckpointError: the directory holds no run, no checkpoint, not that step, or a
        damaged one; the model has no zero-computation experts to offset.
    """
    run = open_run(workdir, step)
    if zero_offset is not None:
        run = run._replace(config=run.config.replace("moe.rule", zero_offset=zero_offset))
    mesh = over_all_devices(run.config) if all_devices else None
    with only_verified("strict=True" if strict else ""):
        params = run.params(mesh, as_used=only_generate)
    name, at = Path(run.workdir).name, run.step or 0
    return Model(run.config, params, run.tokenizer(), mesh, only_generate, name, at, run.ends())


def over_all_devices(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh that cuts every parameter, whatever the run was trained on.

    Args:
      devices: by default all that there are.
    """
    devices = jax.devices() if devices is None else devices
    alone = config.replace("train", batch_size=len(devices), accumulate=1)
    cut = alone.replace("mesh", data=1, fsdp=-1, expert=1).replace("moe", dispatch="dropless")
    return mesh_lib.make_mesh(cut, devices)
