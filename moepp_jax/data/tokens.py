"""The token ids of every document as a second TFDS data set, made from the text data set."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from moepp_jax.config import DataConfig
from moepp_jax.data import storage
from moepp_jax.data.corpus import SPLITS, Texts
from moepp_jax.data.sources import Report
from moepp_jax.data.tokenizer import Tokenizer

# Raise it when the same documents would give other tokens or another layout.
FORMAT_VERSION = 1

# Documents that are encoded together, for the sake of the cores.
_BATCH = 1024


class MoeppTokens(storage.ArrayRecordBuilder, skip_registration=True):
    """One example a document: BOS, its token ids, EOS; and the UTF-8 bytes of its text.

    Documents stay in the order of the text data set. Their lengths, which packing needs without
    reading every document, are collected in `lengths` and `num_bytes` as they are written.
    """

    def __init__(self, folder: Path, texts: dict[str, Texts], tokenizer: Tokenizer):
        self._texts = texts
        self._tokenizer = tokenizer
        self.lengths: dict[str, list[int]] = {split: [] for split in texts}
        self.num_bytes: dict[str, list[int]] = {split: [] for split in texts}
        super().__init__(folder)

    def _info(self) -> tfds.core.DatasetInfo:
        dtype = np.uint16 if self._tokenizer.vocab_size <= 2**16 else np.uint32
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Token ids of the tokenizer {self._tokenizer.fingerprint}.",
            features=tfds.features.FeaturesDict(
                {
                    "tokens": tfds.features.Tensor(shape=(None,), dtype=dtype, encoding="bytes"),
                    "num_bytes": tfds.features.Scalar(np.int64),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in self._texts}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        dtype = self.info.features["tokens"].np_dtype
        bos, eos = [self._tokenizer.bos_id], [self._tokenizer.eos_id]
        n = len(self._texts[split])
        for start in range(0, n, _BATCH):
            texts = [self._texts[split][i] for i in range(start, min(start + _BATCH, n))]
            for i, ids in enumerate(self._tokenizer.encode_batch(texts)):
                tokens = np.array(bos + ids + eos, dtype)
                num_bytes = len(texts[i].encode())
                self.lengths[split].append(len(tokens))
                self.num_bytes[split].append(num_bytes)
                yield start + i, {"tokens": tokens, "num_bytes": num_bytes}


class TokenDocuments(storage.Split):
    """The documents of one split by index, each a vector of token ids from BOS to EOS."""

    def __init__(self, folder: Path, split: str):
        super().__init__(MoeppTokens, folder, split)
        with np.load(folder / f"{split}.npz") as index:
            self.lengths = index["lengths"]  # tokens of each document
            self.num_bytes = index["num_bytes"]  # UTF-8 bytes of each document's text

    def __getitem__(self, index: int) -> np.ndarray:
        return super().__getitem__(index)["tokens"]


def tokens_folder(config: DataConfig, text: Path, tokenizer: Tokenizer) -> Path:
    """Where the tokens of the text data set `text` are, or would be."""
    name = storage.fingerprint(FORMAT_VERSION, text.name, tokenizer.fingerprint)
    return Path(config.dir) / f"tokens-{name}"


def prepare_tokens(config: DataConfig, text: Path, tokenizer: Tokenizer, report: Report) -> Path:
    """Makes the token data set if it is missing; returns its folder."""
    folder = tokens_folder(config, text, tokenizer)
    if not folder.exists():
        start = time.perf_counter()
        report(f"tokens: encoding the text with {tokenizer.vocab_size:,} pieces")
        storage.publish(folder, lambda made: _write(made, text, tokenizer))
        counts = " and ".join(
            f"{TokenDocuments(folder, split).lengths.sum():,} {split}" for split in SPLITS
        )
        report(f"tokens: {counts} tokens in {folder} ({time.perf_counter() - start:.1f} s)")
    return folder


def _write(folder: Path, text: Path, tokenizer: Tokenizer) -> None:
    builder = MoeppTokens(folder, {split: Texts(text, split) for split in SPLITS}, tokenizer)
    builder.write()
    for split in SPLITS:
        np.savez(
            folder / f"{split}.npz",
            lengths=np.array(builder.lengths[split], np.int64),
            num_bytes=np.array(builder.num_bytes[split], np.int64),
        )
