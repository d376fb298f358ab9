"""Prepared token documents of several sources as batches, each a function of its step."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moepp_jax.config import Config, ConfigError
from moepp_jax.data.mixture import Mixture
from moepp_jax.data.packing import Batch, PackedRows
from moepp_jax.data.prepare import Prepared
from moepp_jax.data.tokens import TokenDocuments

# The rows of a batch that are wanted: a slice, or their indices.
Rows = slice | np.ndarray

_ALL = slice(None)

# Pieces of work that `Dataset.train_batches` reads ahead, and the threads that read them: most of
# their time goes by in storage and in code that lets other threads run. A piece is a batch, or
# several small ones of this many tokens together: a call to the reader costs as much as a few
# thousand tokens.
_AHEAD = 4
_THREADS = 4
_PIECE = 2**16


class Taken(NamedTuple):
    """What training has taken of a source."""

    tokens: int
    epochs: float  # how often it has gone through the training split


class Source:
    """One source: its two splits as packed rows, each row of this source alone.

    Attributes:
      train_documents, eval_documents: the token documents.
      train, eval: the same as rows.
    """

    def __init__(self, config: Config, tokens: Path, pad_id: int):
        pack = functools.partial(PackedRows, row_length=config.data.seq_len, pad_id=pad_id)
        self.train_documents = TokenDocuments(tokens, "train")
        self.eval_documents = TokenDocuments(tokens, "validation")
        self.train = pack(self.train_documents, self.train_documents.starts, drop_last=True)
        self.eval = pack(self.eval_documents, self.eval_documents.starts, drop_last=False)
        self._batch_size = config.train.batch_size
        self._seed = config.seed % 2**32

    @functools.cached_property
    def _shuffled(self) -> Any:
        """Row numbers, through all epochs: their order is that of the seed, of no other source."""
        import grain  # here, as it brings JAX: processes that prepare data start without

        return grain.MapDataset.range(len(self.train)).seed(self._seed).shuffle().repeat(None)

    def train_rows(self, numbers: np.ndarray) -> Batch:
        """Rows of training, numbered through all epochs.

        Every row comes once before any comes again, in a new order each time.
        """
        return self.train.read(np.array([self._shuffled[i] for i in numbers.tolist()], np.int64))

    def eval_batches(self, num_batches: int = 0, rows: Rows = _ALL) -> Iterator[Batch]:
        """The first batches of the held-out split, always the same; 0 is the whole split.

        The last one is filled up with rows of padding.
        """
        end = len(self.eval)
        if num_batches:
            end = min(end, num_batches * self._batch_size)
        for start in range(0, end, self._batch_size):
            yield self.eval.read(start + np.arange(self._batch_size)[rows])

    @functools.cached_property
    def bytes_per_target(self) -> float:
        """UTF-8 bytes of the held-out text for each token that is predicted in it."""
        return self.eval_documents.total_bytes / self.eval.num_targets(len(self.eval))


class Dataset:
    """What is trained and evaluated on: sources, mixed by their weights.

    A batch has rows of all sources in the order of `Mixture`, so over time each source has its
    share of the tokens to within a batch. `rows` picks the rows of the global batch that this
    process needs; the others are not read.

    Attributes:
      sources: those with a weight, by name.
      shares: of the training tokens, by name; they sum to 1.
    """

    def __init__(self, config: Config, prepared: Prepared):
        self.tokenizer = prepared.tokenizer
        self._config = config
        self._mixture = Mixture({n: s.weight for n, s in config.data.sources.items()})
        self.shares = self._mixture.shares
        pad_id = self.tokenizer.pad_id
        self.sources = {n: Source(config, prepared.tokens[n], pad_id) for n in self.shares}

    def train_batch(self, step: int, rows: Rows = _ALL) -> Batch:
        """The batch of a step, a function of the seed and the step alone.

        Raises:
          ConfigError: a source has fewer rows than its part of a batch.
          DataError: a record is damaged.
        """
        self.require_rows()
        [batch] = self._train_batches(range(step, step + 1), rows)
        return batch

    def _train_batches(self, steps: range, rows: Rows) -> list[Batch]:
        """The batches of several steps, read together."""
        batch_size = self._config.train.batch_size
        in_batch = np.arange(batch_size)[rows]
        numbers = np.add.outer(np.array(steps) * batch_size, in_batch).ravel()
        of_source, row = self._mixture.select(numbers)
        parts, places = [], []
        for i, name in enumerate(self._mixture.names):
            places.append(np.flatnonzero(of_source == i))
            parts.append(self.sources[name].train_rows(row[places[-1]]))
        order = np.argsort(np.concatenate(places))
        together = {k: np.concatenate([part[k] for part in parts])[order] for k in parts[0]}
        starts = range(0, len(numbers), len(in_batch))
        return [{k: v[s : s + len(in_batch)] for k, v in together.items()} for s in starts]

    def train_batches(self, start_step: int = 0, rows: Rows = _ALL) -> Iterator[Batch]:
        """`train_batch` of each step from `start_step` on, without end, read ahead on threads.

        Raises:
          ConfigError, DataError: as `train_batch`; the latter where the batch would come, or a few
            small batches before.
        """
        self.require_rows()  # raise here, not at the first batch
        return self._read_ahead(start_step, rows)

    def _read_ahead(self, start_step: int, rows: Rows) -> Iterator[Batch]:
        pool = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="train-batches")
        tokens = len(np.arange(self._config.train.batch_size)[rows]) * self._config.data.seq_len
        count = max(1, _PIECE // tokens)
        firsts = itertools.count(start_step, count)
        pieces = collections.deque()
        try:
            while True:
                while len(pieces) <= _AHEAD:
                    first = next(firsts)
                    steps = range(first, first + count)
                    pieces.append(pool.submit(self._train_batches, steps, rows))
                yield from pieces.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def require_rows(self) -> None:
        """
        Raises:
          ConfigError: as `train_batch`.
        """
        batch_size = self._config.train.batch_size
        for name, share in self.shares.items():
            train = self.sources[name].train
            if len(train) < share * batch_size:
                raise ConfigError(
                    f"config.train.batch_size = {batch_size} takes {share * batch_size:,.0f} rows "
                    f"of config.data.sources.{name} at once, more than the {len(train)} of "
                    f"config.data.seq_len = {train.row_length} in its {train.num_tokens:,} "
                    "training tokens: lower one of them or its weight, or give more text"
                )

    def taken(self, step: int) -> dict[str, Taken]:
        """Of each source, what the steps before this one have taken."""
        rows = self._mixture.counts(step * self._config.train.batch_size)
        length = self._config.data.seq_len
        return {n: Taken(r * length, r / len(self.sources[n].train)) for n, r in rows.items()}

    def eval_batches(self, rows: Rows = _ALL) -> Iterator[Batch]:
        """All held-out text, one source after the other."""
        for source in self.sources.values():
            yield from source.eval_batches(rows=rows)

    def train_documents(self) -> Iterator[np.ndarray]:
        """All training text, one source after the other."""
        for source in self.sources.values():
            yield from source.train_documents
