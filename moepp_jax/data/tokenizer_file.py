"""What a tokenizer's file of any kind says."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar


class TokenizerFile(abc.ABC):
    """
    Attributes:
      kind: of the file.
      files: all that is needed to open it again, by name.
      fingerprint: alike for those that give the same documents.
      vocab_size: the largest id, and 1.
      beginning: what stands before a text, BOS; nothing where it begins with its first token.
      eos_id: what ends one.
      pad_id: what fills rows up, where nobody looks.
    """

    kind: ClassVar[str]
    files: Mapping[str, bytes]
    fingerprint: str
    vocab_size: int
    beginning: Sequence[int]
    eos_id: int
    pad_id: int

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """Ids of each text, without BOS and EOS, on so many threads; -1 is one a core."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids below `vocab_size`; special tokens have none."""

    @abc.abstractmethod
    def piece(self, token: int) -> tuple[str, bytes | None]:
        """A token's name, and what it adds to a text; None for what stands for no text."""

    @abc.abstractmethod
    def numbers(self) -> Iterable[int]:
        """The ids that are tokens, all below `vocab_size`."""
