"""Which tokens are special, as files beside a published model say it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moepp_jax import regular
from moepp_jax.errors import ConfigError
from moepp_jax.storage import AnyPath

SETTINGS = "tokenizer_config.json"
GENERATION = "generation_config.json"
_MAP = "special_tokens_map.json"
_MODEL = "config.json"

# In the order in which the end of a document is looked for.
FILES = (SETTINGS, _MAP, _MODEL, GENERATION)

# Fields of SETTINGS by which `transformers` makes tokens special.
_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

Fields = Mapping[str, Any]


def of_file(file: AnyPath) -> dict[str, Any]:
    """
    Raises:
      ConfigError: it cannot be read, or holds no JSON object.
    """
    try:
        return read(regular.read_bytes(file), file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None


def read(content: bytes, file: Any) -> dict[str, Any]:
    """
    Args:
      file: for messages.

    Raises:
      ConfigError: it holds no JSON object.
    """
    try:
        fields = regular.parsed(content)
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{file} holds a {type(fields).__name__}, not a JSON object")
    return fields


def ids(fields: Fields, name: str, file: Any) -> list[int]:
    """The tokens of a field that has one id, or several; none where it is absent or null.

    Raises:
      ConfigError: it has something else.
    """
    said = fields.get(name)
    found = said if isinstance(said, list) else [] if said is None else [said]
    if any(type(i) is not int or i < 0 for i in found):
        raise ConfigError(f"{file}: {name} = {said!r} must be a token id or a list of them")
    return found


def require_below(found: Iterable[int], rows: int, file: Any) -> None:
    """
    Raises:
      ConfigError: an end is beyond the embedding.
    """
    for token in found:
        if token >= rows:
            raise ConfigError(
                f"{file}: eos_token_id = {token} is beyond the {rows} rows of the embedding"
            )


def ends(model: Fields, generation: Fields, folder: Any) -> list[int]:
    """The tokens that end what a model writes, of its config.json and its generation_config.json.

    Raises:
      ConfigError: as `ids`.
    """
    of_model = ids(model, "eos_token_id", f"{folder}/{_MODEL}")
    return ids(generation, "eos_token_id", f"{folder}/{GENERATION}") or of_model


def text(token: Any) -> str | None:
    """Of a token that is written as a text or as an object with one."""
    said = token.get("content") if isinstance(token, Mapping) else token
    return said if isinstance(said, str) else None


def end_of_document(said: Mapping[str, Fields]) -> tuple[str, str | int] | None:
    """The token that ends a document, as a text or an id, behind the file and field that name it.

    Args:
      said: what is in those of FILES that there are.
    """
    for name in FILES:
        fields = said.get(name, {})
        if (token := text(fields.get("eos_token"))) is not None:
            return f"{name}: eos_token = {token!r}", token
        if numbers := ids(fields, "eos_token_id", name):
            return f"{name}: eos_token_id = {numbers[0]}", numbers[0]
    return None


def named(settings: Fields) -> list[str]:
    """The tokens that SETTINGS says to be special."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    tokens = [settings.get(role) for role in _ROLES] + (extra if isinstance(extra, list) else [])
    return [found for token in tokens if (found := text(token)) is not None]
