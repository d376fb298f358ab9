"""What a checkpoint brings beside its weights: a tokenizer, and the tokens that end a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from moepp_jax import special_tokens
from moepp_jax.data import Tokenizer
from moepp_jax.errors import ConfigError
from moepp_jax.interop import source
from moepp_jax.interop.errors import ConversionError
from moepp_jax.interop.fields import Fields, Groups
from moepp_jax.special_tokens import GENERATION
from moepp_jax.workdir import TOKENIZERS, tokenizer_file


class Brought(NamedTuple):
    """
    Attributes:
      tokenizer: None if there is none that can be read.
      generation: the fields of generation_config.json, with the tokens that end a text; empty if no
        file says anything.
      missing: why there is no tokenizer.
    """

    tokenizer: Tokenizer | None
    generation: dict[str, Any]
    missing: str = ""

    def files(self) -> dict[str, bytes]:
        """What a work directory keeps of it."""
        files = {} if self.tokenizer is None else dict(self.tokenizer.files)
        if self.generation:
            files[GENERATION] = (json.dumps(self.generation, indent=2) + "\n").encode()
        return files

    def caution(self, workdir: Path) -> str | None:
        """What is to be said of a model without a tokenizer."""
        if self.tokenizer is not None:
            return None
        return (
            f"The model has no tokenizer: {self.missing}. To train, or to evaluate or generate "
            f"text, put the one that it was trained with into {workdir}, as "
            f"{' or '.join(TOKENIZERS)}."
        )

    def named(self, workdir: Path) -> Groups:
        """The field that names the tokenizer of this work directory, there or to be put there."""
        name = TOKENIZERS[0] if self.tokenizer is None else next(iter(self.tokenizer.files))
        return {"data": {"tokenizer": str(workdir.absolute() / name)}}


def read(folder: Path, fields: Fields, rows: int, tokenizer: Path | None = None) -> Brought:
    """What is in a checkpoint's folder.

    Args:
      fields: of its config.json.
      rows: of its embedding.
      tokenizer: a file that is taken instead of the folder's. That one need not be readable: the
        weights are worth having without it.

    Raises:
      ConversionError: a file is there, or given, and cannot be used; names it.
    """
    generation = folder / GENERATION
    said = source.read_json(generation) if generation.exists() else {}
    try:
        opened, missing = _tokenizer(folder, rows, tokenizer)
        ends = special_tokens.ends(fields, said, folder)
        special_tokens.require_below(ends, rows, folder)
    except ConfigError as error:
        raise ConversionError(str(error)) from error
    if ends and not special_tokens.ids(said, "eos_token_id", generation):
        said["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return Brought(opened, said, missing)


def _tokenizer(folder: Path, rows: int, given: Path | None) -> tuple[Tokenizer | None, str]:
    """It, or why there is none."""
    file = tokenizer_file(folder) if given is None else given
    if given is None and not file.exists():
        return None, f"{folder} has no {' and no '.join(TOKENIZERS)}"
    try:
        opened = Tokenizer.load(file)
    except ConfigError as error:
        if given is not None:
            raise
        return None, str(error)
    opened.require_fits(rows, file)
    return opened, ""
