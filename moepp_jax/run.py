"""A run that is there: its configuration, tokenizer and parameters, read in one place."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moepp_jax import mesh as mesh_lib
from moepp_jax import model, special_tokens
from moepp_jax.checkpoint import Checkpoints
from moepp_jax.config import Config
from moepp_jax.data import Tokenizer
from moepp_jax.errors import ConfigError
from moepp_jax.moe import param
from moepp_jax.special_tokens import GENERATION
from moepp_jax.storage import AnyPath, open_path
from moepp_jax.workdir import read_config, tokenizer_file


class Run(NamedTuple):
    """A checkpoint of a run, of which nothing large is read yet.

    Attributes:
      config: of the run, or as it was asked for.
      step: of the checkpoint.
    """

    workdir: str
    config: Config
    step: int | None

    def tokenizer(self, required_for: str = "") -> Tokenizer | None:
        """That of the work directory, None where it has none.

        Raises:
          ConfigError: it has none, and it is required; or it cannot be that of this model.
        """
        file = tokenizer_file(self.workdir)
        if file.exists():
            tokenizer = Tokenizer.load(file)
            tokenizer.require_fits(self.config.model.vocab_size, file)
            return tokenizer
        if required_for:
            raise ConfigError(f"{file} is missing: {required_for}")
        return None

    def ends(self) -> frozenset[int]:
        """Tokens that end what the model writes, by the folder's generation_config.json.

        Raises:
          ConfigError: it cannot be read, or names a token that the model has not.
        """
        file = open_path(self.workdir) / GENERATION
        if not file.exists():
            return frozenset()
        found = special_tokens.ids(special_tokens.of_file(file), "eos_token_id", file)
        special_tokens.require_below(found, self.config.model.vocab_size, file)
        return frozenset(found)

    def params(self, mesh: Mesh | None = None, as_used: bool = False) -> dict[str, Any]:
        """The parameters, each on the devices that hold it.

        Args:
          mesh: over which they are cut as in training; None: all on the first device.
          as_used: in the types of their use instead of float32.

        Raises:
          CheckpointError: the step is not there, is damaged, or is of another architecture.
        """
        described = model.describe(self.config)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

        def asked(p, array):
            lies = here if mesh is None else jax.NamedSharding(mesh, mesh_lib.spec_of(p))
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=lies)

        arrays = param.shapes(described)
        if as_used:
            dtype = jnp.dtype(self.config.model.dtype)
            arrays = jax.eval_shape(lambda a: param.used(described, a, dtype), arrays)
        with self._checkpoints() as checkpoints:
            return checkpoints.restore_params(self.step, jax.tree.map(asked, described, arrays))

    def params_folder(self) -> AnyPath:
        """Where the parameters lie, if they are intact. Raises as `params` does."""
        shapes = param.shapes(model.describe(self.config))
        with self._checkpoints() as checkpoints:
            return checkpoints.params_folder(self.step, shapes)

    def _checkpoints(self) -> Checkpoints:
        return Checkpoints(self.workdir, self.config.train.keep)


def open_run(
    workdir: str | os.PathLike, step: int | None = None, config: Config | None = None
) -> Run:
    """A checkpoint of a work directory.

    Args:
      step: by default the best on held-out text, or the newest if none was evaluated.
      config: by default the work directory's; one that computes the same.

    Raises:
      ConfigError: the directory holds no run, or its config.json cannot be read.
    """
    if config is None:
        # Of the machine that trained it; this one may have another.
        config = read_config(workdir).replace("model", attention="auto")
    with Checkpoints(workdir, config.train.keep) as checkpoints:
        return Run(str(workdir), config, checkpoints.choose(step))
