"""A SentencePiece model: BPE trained here without losing a byte, or a .model file of others."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece

from moepp_jax.data.tokenizer_file import TokenizerFile
from moepp_jax.errors import ConfigError

# UTF-8 bytes of text that are enough to learn the merges from.
TRAINING_BYTES = 50_000_000

# Characters that are encoded at once, at most: more are slower, and 65 times their size in memory.
_PIECE = 100_000

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space

NAME = "tokenizer.model"


class SentencePieceFile(TokenizerFile):
    """
    Raises:
      ConfigError: it is none, or has no BOS or EOS.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, named: object = NAME):
        """
        Args:
          named: the file, for messages.
        """
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
            self._processor.id_to_piece([*range(self._processor.vocab_size())])  # all are text
            of_letter = self._processor.encode("a", out_type=str)
        except (RuntimeError, UnicodeDecodeError):
            raise ConfigError(
                f"the tokenizer {named} is not a SentencePiece .model file; a tokenizer.json keeps "
                "its name"
            ) from None
        self.files = {NAME: model}
        self.fingerprint = hashlib.sha256(model).hexdigest()[:12]
        self.vocab_size = self._processor.vocab_size()
        bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        if self.eos_id < 0:
            raise ConfigError(f"the tokenizer {named} lacks an EOS piece, which documents end with")
        self.beginning = [] if bos_id < 0 else [bos_id]
        # LLaMA-style models have no padding piece: theirs is id 0, as in the released checkpoint.
        self.pad_id = max(self._processor.pad_id(), 0)
        self._specials = {*self.beginning, self.eos_id, self.pad_id}
        self._adds_space = "".join(of_letter).startswith(_SPACE)
        self._space_ids = [self._processor.piece_to_id(f"<0x{b:02X}>") for b in _SPACE.encode()]

    def encode_batch(self, texts: Sequence[str], threads: int = -1) -> list[list[int]]:
        pieces = [self._pieces(text) for text in texts]
        encoded = iter(self._encode_pieces(list(itertools.chain(*pieces)), threads))
        batch = []
        for of_text in pieces:
            ids = next(encoded)
            for _ in of_text[1:]:
                ids += next(encoded)
            batch.append(ids)
        return batch

    def _pieces(self, text: str) -> list[str]:
        """A long text in pieces, cut before spaces.

        A model that puts a space before every text gets the one that was cut off by doing so.
        """
        pieces, start = [], 0
        while len(text) - start > _PIECE:
            end = text.rfind(" ", start + 1, start + _PIECE)
            end = start + _PIECE if end < 0 else end
            pieces.append(text[start:end])
            start = end + (self._adds_space and text[end] == " ")
        return [*pieces, text[start:]]

    def _encode_pieces(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        batch = self._processor.encode(texts, num_threads=threads)
        for i, text in enumerate(texts):
            if _SPACE in text:
                batch[i] = self._encode_literal_space_symbol(text)
        return batch

    def _encode_literal_space_symbol(self, text: str) -> list[int]:
        """SentencePiece would read the symbol as a space; its bytes survive."""
        first, *rest = self._processor.encode(text.split(_SPACE))
        return first + [i for ids in rest for i in self._space_ids + ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([i for i in ids if i not in self._specials])

    def piece(self, token: int) -> tuple[str, bytes | None]:
        name, of = self._processor.id_to_piece(token), self._processor
        if token in self._specials or of.is_control(token) or of.is_unknown(token):
            return name, None
        if of.is_byte(token):
            return name, bytes([int(name[1:-1], 16)])
        return name, name.replace(_SPACE, " ").encode()

    def numbers(self) -> Iterable[int]:
        return range(self.vocab_size)


def train(texts: Iterable[str], vocab_size: int) -> SentencePieceFile:
    """BPE of exactly `vocab_size` pieces; the same texts give the same model.

    Uses texts up to 50 MB. Runs of line ends and punctuation may become pieces; what no piece
    covers falls back to bytes. The ids are the released model's: padding 0, BOS 1, EOS 2.

    Raises:
      ConfigError: the texts do not allow that many pieces, or need more.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_limited(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=2**30,  # bytes; longer documents would be left out
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _vocabulary_error(str(error), vocab_size) from None
    return SentencePieceFile(model.getvalue())


def _limited(texts: Iterable[str]) -> Iterator[str]:
    left = TRAINING_BYTES
    for text in texts:
        if left <= 0:
            return
        left -= len(text.encode())
        yield text


def _vocabulary_error(message: str, vocab_size: int) -> ConfigError:
    field = f"config.model.vocab_size = {vocab_size}"
    if most := re.search(r"value <= (\d+)", message):
        return ConfigError(
            f"{field} is more than the training text allows: at most {most[1]} pieces can be "
            "learnt from it; lower it or give more text"
        )
    if least := re.search(r"required_chars. \d+ vs (\d+)", message):
        return ConfigError(
            f"{field} is too small for the 256 bytes, 4 special pieces and the characters of the "
            f"training text: it must be at least {least[1]}"
        )
    return ConfigError(f"{field}: SentencePiece could not be trained: {message}")
