"""A tokenizer.json, as most published models have it, read by the `tokenizers` library."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers

from moepp_jax import special_tokens
from moepp_jax.data.tokenizer_file import TokenizerFile
from moepp_jax.errors import ConfigError
from moepp_jax.special_tokens import SETTINGS

NAME = "tokenizer.json"

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what some write for a space


class TokenizerJson(TokenizerFile):
    """
    A text is encoded as `transformers` does it: special tokens that stand in it are read. BOS is
    what the file puts before a text. EOS is what the files beside it name, else what it puts behind
    a text.

    Raises:
      ConfigError: it is damaged, of a kind that the library cannot read, or has no EOS.
    """

    kind = NAME

    def __init__(self, content: bytes, beside: Mapping[str, bytes], named: object = NAME):
        """
        Args:
          beside: of its folder, those of `special_tokens.FILES` that there are.
          named: the file, for messages.
        """
        self._named = named
        said = {
            name: special_tokens.read(raw, _beside(named, name)) for name, raw in beside.items()
        }
        settings = said.get(SETTINGS, {})
        self._tokenizer = _opened(content, named)
        self._require_ids(json.loads(content).get("added_tokens") or ())
        self._add(settings.get("added_tokens_decoder") or {})
        self._make_special(special_tokens.named(settings))
        self.beginning, behind = self._around()
        self.eos_id = self.pad_id = self._end(said, behind)
        eos = self._tokenizer.id_to_token(self.eos_id)
        self._make_special([eos])
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = frozenset(added)
        self._specials = {i for i, token in added.items() if token.special} | {*self.beginning}
        self._numbers = sorted(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.vocab_size = self._numbers[-1] + 1
        self._bytes = _bytes_of(self._tokenizer.decoder)
        names_end = special_tokens.text(settings.get("eos_token")) is not None
        kept = beside[SETTINGS] if names_end else _settings(settings, eos)
        self.files = {NAME: content, SETTINGS: kept}
        differs = json.dumps([self.eos_id, sorted((i, str(t)) for i, t in added.items())])
        self.fingerprint = hashlib.sha256(content + differs.encode()).hexdigest()[:12]

    def _require_ids(self, added: Iterable[Mapping[str, Any]]) -> None:
        """Refuses added tokens whose numbers the library does not keep."""
        for token in added:
            found = self._tokenizer.token_to_id(token["content"])
            if found != token["id"]:
                raise self._error(
                    f"its added token {token['content']!r} has the id {token['id']}, which does "
                    f"not follow on the others: the tokenizers library reads it as {found}"
                )

    def _add(self, decoder: Any) -> None:
        """Tokens that only SETTINGS knows."""
        there = {t.content for t in self._tokenizer.get_added_tokens_decoder().values()}
        try:
            wanted = sorted((int(number), dict(token)) for number, token in decoder.items())
            new = [(number, t) for number, t in wanted if t["content"] not in there]
            for number, token in new:
                token.pop("__type", None)
                self._tokenizer.add_tokens([tokenizers.AddedToken(**token)])
                if self._tokenizer.token_to_id(token["content"]) != number:
                    raise ValueError(f"{token['content']!r} cannot be token {number}")
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise self._error(
                f"added_tokens_decoder in {SETTINGS} does not fit it: {error}"
            ) from None

    def _make_special(self, names: Iterable[str]) -> None:
        """Those of these tokens that are in the vocabulary and were not added already."""
        there = {t.content for t in self._tokenizer.get_added_tokens_decoder().values()}
        for name in dict.fromkeys(names):
            if name not in there and self._tokenizer.token_to_id(name) is not None:
                token = tokenizers.AddedToken(name, normalized=False, special=True)
                self._tokenizer.add_special_tokens([token])

    def _around(self) -> tuple[list[int], list[int]]:
        """What the file puts before a text, and behind it."""
        with _refusing(
            f"the tokenizer {self._named} cannot be used: the tokenizers library "
            "cannot encode a text"
        ):
            inner = self._tokenizer.encode("a", add_special_tokens=False).ids
            outer = self._tokenizer.encode("a").ids
        for start in range(len(outer) - len(inner) + 1):
            end = start + len(inner)
            if outer[start:end] == inner:
                return outer[:start], outer[end:]
        return [], []

    def _end(self, said: Mapping[str, Any], behind: Sequence[int]) -> int:
        found = special_tokens.end_of_document(said)
        if found is None and not behind:
            raise self._error(
                f"no token is known to end a document: put a {SETTINGS} with its eos_token beside "
                'it, as {"eos_token": "</s>"}'
            )
        if found is None:
            return behind[-1]
        where, token = found
        number = self._tokenizer.token_to_id(token) if isinstance(token, str) else token
        if number is None or self._tokenizer.id_to_token(number) is None:
            raise self._error(f"it has no such token as {where} beside it")
        return number

    def _error(self, what: str) -> ConfigError:
        return ConfigError(f"the tokenizer {self._named} cannot be used: {what}")

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        if threads == 1:
            one = self._tokenizer.encode
            return [one(text, add_special_tokens=False).ids for text in texts]
        batch = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i not in self._specials])

    def piece(self, token: int) -> tuple[str, bytes | None]:
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return f"<{token}>", None
        if token in self._specials:
            return name, None
        return name, name.encode() if token in self._added else self._bytes(name)

    def numbers(self) -> Iterable[int]:
        return self._numbers


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Errors of the library as one ConfigError; its own is no Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        why = str(error).removeprefix("Cannot instantiate Tokenizer from buffer: ")
        raise ConfigError(f"{what}: {why:.500}") from None


def _beside(named: object, name: str) -> str:
    return f"{name} beside the tokenizer {named}"


def _settings(settings: Mapping[str, Any], eos: str) -> bytes:
    """A tokenizer_config.json that names EOS, by which `transformers` takes the file as it is."""
    whole = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings | {"eos_token": eos}
    return (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode()


def _opened(content: bytes, named: object) -> tokenizers.Tokenizer:
    with _refusing(f"the tokenizer {named} cannot be read by the tokenizers library"):
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    if not tokenizer.get_vocab_size():
        raise ConfigError(f"the tokenizer {named} has no tokens")
    # What a training left there. Texts are taken whole, and alike each time.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


def _bytes_of(decoder: Any) -> Callable[[str], bytes]:
    """What a token's name says of its bytes, which the decoder turns to text."""
    said = b"" if decoder is None else decoder.__getstate__()
    if b'"ByteLevel"' in said:
        table = _byte_level()
        return lambda name: b"".join(table.get(c, c.encode()) for c in name)

    def spaced(name: str) -> bytes:
        is_byte = len(name) == 6 and name.startswith("<0x") and b'"ByteFallback"' in said
        return bytes([int(name[3:5], 16)]) if is_byte else name.replace(_SPACE, " ").encode()

    return spaced


def _byte_level() -> dict[str, bytes]:
    """The characters by which byte-level BPE writes bytes: the visible ones are themselves."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in seen]
    table = {chr(b): bytes([b]) for b in seen}
    return table | {chr(256 + n): bytes([b]) for n, b in enumerate(others)}
