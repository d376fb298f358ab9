"""The token ids of every document as a second TFDS data set, made from the text data set."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from moepp_jax.config import DataConfig
from moepp_jax.data import records, storage, work
from moepp_jax.data.records import SPLITS
from moepp_jax.data.shards import Shard, ShardWriter, decode_bytes, shard_name
from moepp_jax.data.sources import Report
from moepp_jax.data.tokenizer import Tokenizer

# Raise it when the same documents would give other tokens or another layout.
FORMAT_VERSION = 3

_NAME = "moepp_tokens"

# Bytes of text that are encoded together, for the sake of the cores.
_BATCH = 1_000_000


def _features(vocab_size: int) -> tfds.features.FeaturesDict:
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    return tfds.features.FeaturesDict(
        {
            "tokens": tfds.features.Tensor(shape=(None,), dtype=dtype, encoding="bytes"),
            "num_bytes": tfds.features.Scalar(np.int64),
        }
    )


class TokenDocuments(records.Split):
    """The documents of one split by index, each a vector of token ids from BOS to EOS.

    Attributes:
      starts: [documents + 1], where each begins in the split's stream of tokens, and its end. It
        stays on disk: a billion documents would be 8 GB of it.
    """

    def __init__(self, folder: Path, split: str):
        super().__init__(folder, split)
        self._dtype = self.features["tokens"].np_dtype
        # As plain arrays: a memmap's own way of indexing is slow.
        self.starts, self._byte_starts = np.asarray(np.load(folder / _index(split), mmap_mode="r"))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return np.diff(self.starts)

    @property
    def num_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document's text."""
        return np.diff(self._byte_starts)

    @property
    def total_bytes(self) -> int:
        return int(self._byte_starts[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        [document] = self.__getitems__([index])
        return document

    def __getitems__(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Several documents with one call to the reader, which is ten times as fast.

        Raises:
          DataError: a record cannot be read, or is not the document that was written there.
        """
        stored = self.records(indices)
        documents = [np.frombuffer(decode_bytes(r, "tokens"), self._dtype) for r in stored]
        numbers = np.array(indices, np.int64)
        lengths = self.starts[numbers + 1] - self.starts[numbers]
        for index, document, length in zip(indices, documents, lengths, strict=True):
            if len(document) != length:
                raise self.damaged(index, f"holds {len(document)} tokens, not those written there")
        return documents


def _index(split: str) -> str:
    return f"{split}-index.npy"


def tokens_folder(config: DataConfig, text: str, tokenizer: Tokenizer) -> Path:
    """Where the tokens of the text data set of this name are, or would be."""
    name = storage.fingerprint(FORMAT_VERSION, text, tokenizer.fingerprint)
    return Path(config.dir) / f"tokens-{name}"


def prepare_tokens(
    config: DataConfig, text: Path, tokenizer: Tokenizer, report: Report, workers: int = 1
) -> Path:
    """Makes the token data set if it is missing; returns its folder."""
    folder = tokens_folder(config, text.name, tokenizer)
    if not folder.exists():
        start = time.perf_counter()
        report(f"tokens: encoding {text} with {tokenizer.vocab_size:,} pieces")
        storage.publish_in_parts(
            folder, lambda partial: _make(partial, text, tokenizer, workers, report)
        )
        counts = " and ".join(
            f"{TokenDocuments(folder, split).starts[-1]:,} {split}" for split in SPLITS
        )
        report(f"tokens: {counts} tokens in {folder} ({time.perf_counter() - start:.1f} s)")
    return folder


def _make(folder: Path, text: Path, tokenizer: Tokenizer, workers: int, report: Report) -> None:
    shards = {split: records.shards(text, split) for split in SPLITS}
    parts = [
        dict(zip(shards, of_part, strict=True)) for of_part in zip(*shards.values(), strict=True)
    ]
    threads = 1 if min(workers, len(parts)) > 1 else -1
    jobs = [
        _TokensJob(folder, text, part, i, len(parts), tokenizer.model, threads)
        for i, part in enumerate(parts)
    ]
    results = work.run(folder, jobs, workers, "tokens", report)
    for split in SPLITS:
        counts = [np.load(job.counts(split)) for job in jobs]
        starts = np.cumulative_sum(np.concatenate(counts, axis=1), axis=1, include_initial=True)
        np.save(folder / _index(split), starts)
    records.finish(
        folder,
        _NAME,
        _features(tokenizer.vocab_size),
        {split: [Shard(**result[split]) for result in results] for split in SPLITS},
        files=map(_index, SPLITS),
        description=f"Token ids of the tokenizer {tokenizer.fingerprint} for {text.name}.",
    )


@dataclasses.dataclass(frozen=True)
class _TokensJob:
    """Encodes one shard of each split: BOS, the ids of a document, EOS; in the same order."""

    folder: Path
    text: Path
    shards: dict[str, Shard]  # of the text
    index: int
    count: int
    model: bytes  # of the tokenizer
    threads: int

    @property
    def name(self) -> str:
        return f"{self.index:05}"

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards.values())

    def counts(self, split: str) -> Path:
        """File of the tokens and the bytes of each document: packing needs them."""
        return self.folder / storage.DONE / f"{self.name}-{split}.npy"

    def __call__(self, advance: work.Advance) -> dict[str, Any]:
        return {split: self._encode(split, advance)._asdict() for split in self.shards}

    def _encode(self, split: str, advance: work.Advance) -> Shard:
        tokenizer = _tokenizer(self.model)
        bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
        dtype = _features(tokenizer.vocab_size)["tokens"].np_dtype
        stored = records.read_shard(self.text, self.shards[split])
        counts: list[tuple[int, int]] = []
        with contextlib.ExitStack() as stack:
            name = shard_name(_NAME, split, self.index, self.count)
            writer = ShardWriter(self.folder / name)
            stack.callback(writer.discard)
            for texts in _batches(decode_bytes(record, "text") for record in stored):
                encoded = tokenizer.encode_batch([text.decode() for text in texts], self.threads)
                for text, ids in zip(texts, encoded, strict=True):
                    tokens = np.array(bos + ids + eos, dtype)
                    example = {"tokens": tokens.tobytes(), "num_bytes": len(text)}
                    writer.write(example, tokens.nbytes)
                    counts.append((len(tokens), len(text)))
                advance(sum(map(len, texts)))
            shard = writer.close()
        np.save(self.counts(split), np.array(counts, np.int64).reshape(-1, 2).T)
        return shard


def _batches(texts: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Texts of `_BATCH` bytes together, at least."""
    batch: list[bytes] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@functools.lru_cache(maxsize=1)
def _tokenizer(model: bytes) -> Tokenizer:
    return Tokenizer(model)
