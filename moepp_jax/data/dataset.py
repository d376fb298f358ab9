"""Prepared token documents of several sources as batches, each a function of its step."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moepp_jax.config import Config
from moepp_jax.data.mixture import Mixture
from moepp_jax.data.packing import Batch, PackedRows
from moepp_jax.data.prepare import Prepared
from moepp_jax.data.reading import Rows, Training
from moepp_jax.data.tokens import TokenDocuments
from moepp_jax.errors import ConfigError

_ALL = slice(None)


class Taken(NamedTuple):
    """What training has taken of a source."""

    tokens: int
    epochs: float  # how often it has gone through the training split


class Origin(NamedTuple):
    """Where a row of a batch is from.

    Attributes:
      source: its name.
      row: number in the source's training split.
      first, last: numbers of the documents there that it is of.
    """

    source: str
    row: int
    first: int
    last: int


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
        self.train = pack(self.train_documents, drop_last=True)
        self.eval = pack(self.eval_documents, drop_last=False)
        self._batch_size = config.train.batch_size

    def eval_batches(self, num_batches: int = 0, rows: Rows = _ALL) -> Iterator[Batch]:
        """The first batches of the held-out split, always the same; 0 is the whole split.

        The last one is filled up with rows of padding.
        """
        for batch in range(self.count_eval_batches(num_batches)):
            start = batch * self._batch_size
            yield self.eval.read(start + np.arange(self._batch_size)[rows])

    def count_eval_batches(self, num_batches: int = 0) -> int:
        """How many `eval_batches` gives."""
        there = -(-len(self.eval) // self._batch_size)
        return min(num_batches, there) if num_batches else there

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
      prepared: what it is read from.
      sources: those with a weight, by name.
      shares: of the training tokens, by name; they sum to 1.
    """

    def __init__(self, config: Config, prepared: Prepared):
        self.prepared = prepared
        self.tokenizer = prepared.tokenizer
        self._config = config
        self._mixture = Mixture({n: s.weight for n, s in config.data.sources.items()})
        self.shares = self._mixture.shares
        pad_id = self.tokenizer.pad_id
        self.sources = {n: Source(config, prepared.tokens[n], pad_id) for n in self.shares}
        train = {name: source.train for name, source in self.sources.items()}
        self._training = Training(train, self._mixture, config.train.batch_size, config.seed)
        self._first = config.train.first_batch

    def train_batch(self, step: int, rows: Rows = _ALL) -> Batch:
        """The batch of a step, a function of the seed and its number alone.

        Its number is the step's, counted from `config.train.first_batch`.

        Raises:
          ConfigError: a source has fewer rows than its part of a batch.
          DataError: a record is damaged.
        """
        self.require_rows()
        return self._training.batch(self._first + step, rows)

    def train_batches(self, start_step: int = 0, rows: Rows = _ALL) -> Iterator[Batch]:
        """`train_batch` of each step from `start_step` on, without end, read ahead.

        Raises:
          ConfigError, DataError: as `train_batch`, the latter where the batch would come.
          ConfigError: one of `config.data.worker_processes` was killed.
        """
        self.require_rows()  # raise here, not at the first batch
        start = self._first + start_step
        return self._training.ahead(start, rows, self._config.data.worker_processes)

    def of_batch(self, step: int) -> list[Origin]:
        """Where each row of `train_batch` is from."""
        self.require_rows()
        size = self._config.train.batch_size
        numbers = (self._first + step) * size + np.arange(size)
        origins = {}
        for name, (places, rows) in self._training.rows(numbers).items():
            documents, _ = self.sources[name].train.standing(rows)
            for place, row, of_row in zip(places, rows, documents, strict=True):
                origins[int(place)] = Origin(name, int(row), int(of_row[0]), int(of_row[-1]))
        return [origins[place] for place in range(size)]

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
        """Of each source, what the steps of this run before this one have taken."""
        batch_size, length = self._config.train.batch_size, self._config.data.seq_len
        before = self._mixture.counts(self._first * batch_size)
        rows = self._mixture.counts((self._first + step) * batch_size)
        rows = {name: count - before[name] for name, count in rows.items()}
        return {n: Taken(r * length, r / len(self.sources[n].train)) for n, r in rows.items()}

    def eval_batches(self, rows: Rows = _ALL) -> Iterator[Batch]:
        """All held-out text, one source after the other."""
        for source in self.sources.values():
            yield from source.eval_batches(rows=rows)

    def train_documents(self) -> Iterator[np.ndarray]:
        """All training text, one source after the other."""
        for source in self.sources.values():
            yield from source.train_documents
