"""The token ids of every document as a second TFDS data set, made from the text data set.

The documents are laid end to end, and this stream of tokens is stored in records of equal size: a
row costs reading the one or two records that it touches, be it of a book or of a hundred notes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import xxhash

from moepp_jax.config import DataConfig
from moepp_jax.data import index, records, storage, work
from moepp_jax.data.packing import ranges
from moepp_jax.data.records import SPLITS
from moepp_jax.data.shards import Shard, ShardWriter, decode_bytes, shard_name
from moepp_jax.data.sources import Report
from moepp_jax.data.tokenizer import Tokenizer

# Raise it when the same documents would give other tokens or another layout.
FORMAT_VERSION = 4

_NAME = "moepp_tokens"

# Tokens of a record. With fewer, a row of 2,048 touches more records; with more, a row of 256 reads
# more that it does not need.
_RECORD = 4096

# Bytes of text that are encoded together, for the sake of the cores; tokens that are read together
# where all are.
_BATCH = 1_000_000


def _features(vocab_size: int) -> tfds.features.FeaturesDict:
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    return tfds.features.FeaturesDict(
        {"tokens": tfds.features.Tensor(shape=(None,), dtype=dtype, encoding="bytes")}
    )


class TokenDocuments(Sequence):
    """The documents of one split by index, each a vector of token ids, as `Tokenizer.document`.

    Laid end to end they are a stream, which `read` reads anywhere. Another process to which they
    are sent opens them for itself.

    Attributes:
      starts: [documents + 1], where each begins in the stream, and its end. It stays on disk, as a
        billion documents would be 8 GB of it, and is verified where it is read.
    """

    def __init__(self, folder: Path, split: str):
        self._opened = folder, split
        self._records = records.Split(folder, split)
        self._dtype = self._records.features["tokens"].np_dtype
        self.starts, self._byte_starts = index.open_rows(folder / _index(split), records.damaged)
        [self._record_starts] = index.open_rows(folder / _cuts(split), records.damaged)
        self._sums = None  # of earlier versions' records
        if (folder / _sums(split)).exists():
            [self._sums] = index.open_rows(folder / _sums(split), records.damaged)

    def __reduce__(self):
        return type(self), self._opened

    def __len__(self) -> int:
        return len(self.starts) - 1

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
        index = range(len(self))[index]
        [document] = self._documents(index, index + 1)
        return document

    def __iter__(self) -> Iterator[np.ndarray]:
        first = 0
        while first < len(self):
            last = int(np.searchsorted(self.starts, self.starts[first] + _BATCH, "right")) - 1
            last = max(last, first + 1)
            yield from self._documents(first, last)
            first = last

    def _documents(self, first: int, last: int) -> list[np.ndarray]:
        starts = np.asarray(self.starts[first : last + 1])
        tokens = self.read(starts[:1], starts[-1:] - starts[:1])
        return np.split(tokens, starts[1:-1] - starts[0])

    def read(self, begin: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Spans of the stream, one after the other; one call to the reader fetches them all.

        Args:
          begin, size: [spans], in tokens, at least 1 each.

        Raises:
          DataError: a record cannot be read, or is not what was written there.
        """
        first = np.searchsorted(self._record_starts, begin, side="right") - 1
        last = np.searchsorted(self._record_starts, begin + size, side="left")
        wanted = np.unique(ranges(first, last - first))
        starts = self._record_starts[wanted]
        lengths = self._record_starts[wanted + 1] - starts
        fetched = self._fetch(wanted, lengths)
        # Records that follow each other in the stream do so in `fetched`.
        of_span = np.searchsorted(wanted, first)
        at = (np.cumsum(lengths) - lengths - starts)[of_span] + begin
        return self._joined(
            fetched[a:b] for a, b in zip(at.tolist(), (at + size).tolist(), strict=True)
        )

    def _fetch(self, numbers: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Whole records, one after the other."""
        stored = self._records.records(numbers.tolist())
        tokens = [np.frombuffer(decode_bytes(record, "tokens"), self._dtype) for record in stored]
        found = np.fromiter(map(len, tokens), np.int64)
        for wrong in np.flatnonzero(found != lengths):
            raise self._records.damaged(
                int(numbers[wrong]), f"holds {found[wrong]} tokens, not those written there"
            )
        if self._sums is not None:  # or a shard that is another one would be read as this one
            sums = np.fromiter(map(_sum, tokens), np.uint64).view(np.int64)
            for wrong in np.flatnonzero(sums != self._sums[numbers]):
                raise self._records.damaged(
                    int(numbers[wrong]), "holds other tokens than those written there"
                )
        return self._joined(tokens)

    def _joined(self, vectors: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.empty(0, self._dtype), *vectors])


def _index(split: str) -> str:
    """File of where documents begin, in tokens and in bytes."""
    return f"{split}-index.npy"


def _cuts(split: str) -> str:
    """File of where records begin, in tokens."""
    return f"{split}-records.npy"


def _sums(split: str) -> str:
    """File of the XXH3-64 of each record's tokens."""
    return f"{split}-sums.npy"


def _sum(tokens: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(tokens.tobytes())


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
        _TokensJob(folder, text, part, i, len(parts), tokenizer, threads)
        for i, part in enumerate(parts)
    ]
    results = work.run(folder, jobs, workers, "tokens", report)
    for split in SPLITS:
        counts = [np.load(job.counts(split)) for job in jobs]
        starts = np.cumulative_sum(np.concatenate(counts, axis=1), axis=1, include_initial=True)
        index.write(folder / _index(split), starts)
        index.write(folder / _cuts(split), _record_starts([int(c[0].sum()) for c in counts]))
        index.write(folder / _sums(split), np.concatenate([np.load(j.sums(split)) for j in jobs]))
    records.finish(
        folder,
        _NAME,
        _features(tokenizer.vocab_size),
        {split: [Shard(**result[split]) for result in results] for split in SPLITS},
        files=[
            file
            for name in (_index, _cuts, _sums)
            for split in SPLITS
            for file in (name(split), index.blocks_file(name(split)))
        ],
        description=f"Token ids of the tokenizer {tokenizer.fingerprint} for {text.name}: records "
        "of equal size, whatever the documents; each of these begins with BOS and ends with EOS.",
    )


def _record_starts(tokens: Sequence[int]) -> np.ndarray:
    """Where records begin in the stream of shards with so many tokens each, and its end."""
    ends = np.cumsum(tokens)
    starts = [np.arange(end - n, end, _RECORD) for end, n in zip(ends, tokens, strict=True)]
    return np.concatenate([*starts, ends[-1:]])


@dataclasses.dataclass(frozen=True)
class _TokensJob:
    """Encodes one shard of each split, its documents in the same order."""

    folder: Path
    text: Path
    shards: dict[str, Shard]  # of the text
    index: int
    count: int
    tokenizer: Tokenizer
    threads: int

    @property
    def name(self) -> str:
        return f"summed-{self.index:05}"  # earlier versions' jobs, which are not, are done again

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards.values())

    def counts(self, split: str) -> Path:
        """File of the tokens and the bytes of each document: packing needs them."""
        return self.folder / storage.DONE / f"{self.name}-{split}.npy"

    def sums(self, split: str) -> Path:
        """File of the sum of each record's tokens."""
        return self.folder / storage.DONE / f"{self.name}-{split}-sums.npy"

    def __call__(self, advance: work.Advance) -> dict[str, Any]:
        return {split: self._encode(split, advance)._asdict() for split in self.shards}

    def _encode(self, split: str, advance: work.Advance) -> Shard:
        dtype = _features(self.tokenizer.vocab_size)["tokens"].np_dtype
        counts: list[tuple[int, int]] = []
        sums: list[int] = []
        with contextlib.ExitStack() as stack:
            name = shard_name(_NAME, split, self.index, self.count)
            writer = ShardWriter(self.folder / name)
            stack.callback(writer.discard)
            for ids in _cut(self._encoded(split, advance, counts)):
                tokens = np.array(ids, dtype)
                writer.write({"tokens": tokens.tobytes()}, tokens.nbytes)
                sums.append(_sum(tokens))
            shard = writer.close()
        np.save(self.counts(split), np.array(counts, np.int64).reshape(-1, 2).T)
        np.save(self.sums(split), np.array(sums, np.uint64).view(np.int64))
        return shard

    def _encoded(self, split: str, advance: work.Advance, counts: list) -> Iterator[list[int]]:
        """The ids of each document; tells `counts` how many, and of how many bytes."""
        stored = records.read_shard(self.text, self.shards[split])
        for texts in _batches(decode_bytes(record, "text") for record in stored):
            decoded = [text.decode() for text in texts]
            encoded = self.tokenizer.encode_batch(decoded, self.threads)
            for text, ids in zip(texts, encoded, strict=True):
                document = self.tokenizer.document(ids)
                counts.append((len(document), len(text)))
                yield document
            advance(sum(map(len, texts)))


def _cut(documents: Iterable[list[int]]) -> Iterator[list[int]]:
    """Documents laid end to end and cut into records; the last one may be shorter."""
    stream: list[int] = []
    for ids in documents:
        stream += ids
        whole = len(stream) - len(stream) % _RECORD
        for start in range(0, whole, _RECORD):
            yield stream[start : start + _RECORD]
        del stream[:whole]
    if stream:
        yield stream


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
