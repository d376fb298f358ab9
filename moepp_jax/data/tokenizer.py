"""Text to token ids and back: one class, with a file of either kind behind it."""

from __future__ import annotations

import functools
import heapq
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import SupportsInt

import numpy as np

from moepp_jax import regular, special_tokens
from moepp_jax.data import sentencepiece_file, tokenizer_json
from moepp_jax.data.storage import publish
from moepp_jax.data.tokenizer_file import TokenizerFile
from moepp_jax.errors import ConfigError
from moepp_jax.storage import AnyPath, open_path
from moepp_jax.workdir import tokenizer_file

# Raise it when `Tokenizer.train` would make another model of the same text.
TRAINER_VERSION = 1


class Tokenizer:
    """Text to token ids and back.

    A tokenizer trained here is lossless: `decode(encode(text)) == text` for every string. One from
    elsewhere may normalise, and may read special tokens in a text.

    Attributes:
      kind: "sentencepiece" or "tokenizer.json".
      files: what `load` needs, by name; a run keeps it.
      fingerprint: of the file, and of what ends a document.
      vocab_size: pieces; a model may have more rows in its embedding.
      beginning: what stands before a text: BOS, or nothing.
      bos_id: None where nothing does.
      eos_id, pad_id: end of a document; padding.
    """

    def __init__(self, file: TokenizerFile):
        self._file = file
        self.kind, self.files, self.fingerprint = file.kind, dict(file.files), file.fingerprint
        self.vocab_size = file.vocab_size
        self.beginning = list(file.beginning)
        self.bos_id = self.beginning[0] if self.beginning else None
        self.eos_id, self.pad_id = file.eos_id, file.pad_id

    def __reduce__(self):
        return _of_files, (tuple(self.files.items()),)

    def encode(self, text: str) -> list[int]:
        """Ids without BOS and EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], threads: int = -1) -> list[list[int]]:
        """`encode` of each text, on so many threads; -1 is one a core."""
        return self._file.encode_batch(texts, threads)

    def document(self, ids: Sequence[int]) -> list[int]:
        """The ids of a text as a document: between BOS, where there is one, and EOS."""
        return [*self.beginning, *ids, self.eos_id]

    @property
    def prefix_id(self) -> int:
        """What the first token of a text is predicted from: BOS, or the end of another text."""
        return self.eos_id if self.bos_id is None else self.bos_id

    def prompt(self, text: str) -> list[int]:
        """The ids of a text that is to be continued, at least one."""
        return [*self.beginning, *self.encode(text)] or [self.prefix_id]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of the ids; BOS, EOS, padding and ids beyond the pieces have none."""
        return self._file.decode([i for i in map(int, ids) if i < self.vocab_size])

    def piece(self, token: int) -> tuple[str, bytes | None]:
        """A token's name, and what it adds to a text, which may be a part of a character.

        None for what stands for no text: BOS, EOS, padding, unknown and other special tokens.
        """
        return self._file.piece(token)

    def surplus(self, rows: int) -> np.ndarray:
        """Of the rows of an embedding, those that are no piece: (rows,) bool."""
        found = np.ones(rows, bool)
        numbers = np.array(list(self._file.numbers()))
        found[numbers[numbers < rows]] = False
        return found

    def require_fits(self, rows: int, file: object) -> None:
        """
        Args:
          file: for messages.

        Raises:
          ConfigError: it has ids that an embedding of so many rows has not.
        """
        if self.vocab_size > rows:
            raise ConfigError(
                f"the tokenizer {file} has {self.vocab_size} pieces, more than "
                f"config.model.vocab_size = {rows}: it is not the one that this model was trained "
                "with"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Writes its file under this name, and beside it what else `load` needs."""
        (_, own), *beside = self.files.items()
        for name, content in beside:
            _publish(Path(path).with_name(name), content)
        _publish(Path(path), own)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """
        Args:
          path: a SentencePiece model, a *.json of the `tokenizers` library, or a folder with one.

        Raises:
          ConfigError: there is no such file, it cannot be read, or it has no end of a document.
        """
        file = open_path(path)
        file = tokenizer_file(file) if file.is_dir() else file
        content = _read(file, regular.LARGE)
        if file.suffix != ".json":
            return cls(sentencepiece_file.SentencePieceFile(content, path))
        beside = {name: file.parent / name for name in special_tokens.FILES}
        beside = {name: _read(f, regular.SMALL) for name, f in beside.items() if f.exists()}
        return cls(tokenizer_json.TokenizerJson(content, beside, path))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """As `sentencepiece_file.train`."""
        return cls(sentencepiece_file.train(texts, vocab_size))


@functools.lru_cache(maxsize=1)
def _of_files(files: tuple[tuple[str, bytes], ...]) -> Tokenizer:
    """Read once in a process, however often it is sent there."""
    (name, content), *beside = files
    if name == sentencepiece_file.NAME:
        return Tokenizer(sentencepiece_file.SentencePieceFile(content))
    return Tokenizer(tokenizer_json.TokenizerJson(content, dict(beside)))


def _read(file: AnyPath, most: int) -> bytes:
    try:
        return regular.read_bytes(file, most)
    except OSError as error:
        raise ConfigError(
            f"the tokenizer {file} cannot be read: {error.strerror}; config.data.tokenizer "
            "names a SentencePiece .model file or a tokenizer.json, or is empty to train one"
        ) from None


def _publish(file: Path, content: bytes) -> None:
    publish(file, lambda made: made.write_bytes(content))


def interleaved(sources: Iterable[Iterable[str]]) -> Iterator[str]:
    """The texts of several sources, as many bytes of each as of any other until one runs out.

    The shares do not follow the weights of the mixture: another mixture of the same sources, for
    the last part of a run say, has the same tokenizer.
    """
    heap = [(0, i, iter(texts)) for i, texts in enumerate(sources)]
    while heap:
        given, i, texts = heap[0]
        text = next(texts, None)
        if text is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (given + len(text.encode()), i, texts))
            yield text
