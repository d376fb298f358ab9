"""From a configuration to batches: prepare what is missing, then read by step."""

from __future__ import annotations

import collections
import functools
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grain
import numpy as np

from moepp_jax.config import Config, ConfigError
from moepp_jax.data import storage
from moepp_jax.data.corpus import Texts, open_corpus, prepare_text, text_folder
from moepp_jax.data.packing import PackedRows
from moepp_jax.data.sources import Report
from moepp_jax.data.tokenizer import TRAINER_VERSION, Tokenizer
from moepp_jax.data.tokens import TokenDocuments, prepare_tokens, tokens_folder

Batch = dict[str, np.ndarray]  # what PackedRows says of a row, each [batch_size, seq_len]

# The rows of a batch that are wanted: a slice, or their indices.
Rows = slice | np.ndarray

_ALL = slice(None)

# Batches that `Dataset.train_batches` reads ahead.
_AHEAD = 4


class Dataset:
    """The two splits as batches of packed rows.

    `rows` picks the rows of the global batch that this process needs; the others are not read.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, tokens: Path):
        self.tokenizer = tokenizer
        self.train_documents = TokenDocuments(tokens, "train")
        self.eval_documents = TokenDocuments(tokens, "validation")
        self._config = config
        self._batch_size = config.train.batch_size
        self._train = self._pack(self.train_documents, drop_last=True)
        self._eval = self._pack(self.eval_documents, drop_last=False)

    def _pack(self, documents: TokenDocuments, drop_last: bool) -> PackedRows:
        return PackedRows(
            documents,
            documents.lengths,
            self._config.data.seq_len,
            pad_id=self.tokenizer.pad_id,
            drop_last=drop_last,
        )

    @property
    def num_train_tokens(self) -> int:
        return self._train.num_tokens

    def train_batch(self, step: int, rows: Rows = _ALL) -> Batch:
        """The batch of a step, a function of the seed and the step alone.

        Every row comes once before any comes again, in a new order each time.

        Raises:
          ConfigError: the split has fewer rows than a batch.
        """
        start = step * self._batch_size
        return _stack([self._shuffled[start + i] for i in self._chosen(rows)])

    def train_batches(self, start_step: int = 0, rows: Rows = _ALL) -> Iterator[Batch]:
        """`train_batch` of each step from `start_step` on, without end, read ahead on a thread.

        Raises:
          ConfigError: the split has fewer rows than a batch.
        """
        _ = self._shuffled  # raise here, not at the first batch
        return self._read_ahead(start_step, rows)

    def _read_ahead(self, start_step: int, rows: Rows) -> Iterator[Batch]:
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="train-batches")
        steps = itertools.count(start_step)
        batches = collections.deque()
        try:
            while True:
                while len(batches) <= _AHEAD:
                    batches.append(pool.submit(self.train_batch, next(steps), rows))
                yield batches.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    @functools.cached_property
    def _shuffled(self) -> grain.MapDataset:
        if len(self._train) < self._batch_size:
            raise ConfigError(
                f"config.train.batch_size = {self._batch_size} is more than the "
                f"{len(self._train)} rows of config.data.seq_len = {self._train.row_length} in "
                f"the training split's {self.num_train_tokens:,} tokens: lower one of them or "
                "give more text"
            )
        source = grain.MapDataset.source(self._train)
        return source.seed(self._config.seed % 2**32).shuffle().repeat(None)

    def eval_batches(self, num_batches: int = 0, rows: Rows = _ALL) -> Iterator[Batch]:
        """The first batches of the validation split, always the same; 0 is the whole split.

        The last one is filled up with rows of padding.
        """
        padding = self._eval.padding()
        for start in range(0, self._num_eval_rows(num_batches), self._batch_size):
            indices = [start + i for i in self._chosen(rows)]
            yield _stack([self._eval[i] if i < len(self._eval) else padding for i in indices])

    def _chosen(self, rows: Rows) -> list[int]:
        return np.arange(self._batch_size)[rows].tolist()

    def eval_bytes(self, num_batches: int = 0) -> float:
        """UTF-8 bytes of the text that these batches predict: nats / ln 2 / this is bits per byte.

        Exact for the whole split; of a part, the part's targets at the split's bytes per target.
        """
        share = self._eval.num_targets(self._num_eval_rows(num_batches)) / self._eval.num_targets(
            len(self._eval)
        )
        return float(self.eval_documents.num_bytes.sum()) * share

    def _num_eval_rows(self, num_batches: int) -> int:
        return min(num_batches * self._batch_size or len(self._eval), len(self._eval))

    def describe(self) -> str:
        """One line a split: documents, bytes, tokens, rows."""
        parts = {
            "train": (self.train_documents, self._train),
            "validation": (self.eval_documents, self._eval),
        }
        return "\n".join(_describe(split, *part) for split, part in parts.items())


def _stack(rows: list[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _describe(split: str, documents: TokenDocuments, rows: PackedRows) -> str:
    num_bytes = documents.num_bytes.sum()
    return (
        f"{split}: {len(documents):,} documents, {num_bytes:,} bytes, {rows.num_tokens:,} tokens "
        f"({num_bytes / rows.num_tokens:.2f} bytes a token), {len(rows):,} rows of "
        f"{rows.row_length}, {rows.efficiency:.1%} of their places filled"
    )


def prepare(config: Config, report: Report = print) -> Dataset:
    """Text, tokenizer and tokens as the configuration wants them; makes what is missing.

    Everything goes into `config.data.dir`, under names that cover the content: a changed corpus,
    held-out share, vocabulary or tokenizer gives new files, a changed `seq_len` none.

    Raises:
      ConfigError: the corpus or the tokenizer cannot be used; the message says why.
    """
    data = config.data
    _check_folder(data.dir)
    if data.tokenizer:
        _load_tokenizer(config, Path(data.tokenizer))  # a wrong one is an error before any work
    text = prepare_text(data, open_corpus(data), report)
    tokenizer = _prepare_tokenizer(config, text, report)
    prepare_tokens(data, text, tokenizer, report)
    return open_dataset(config)


def open_dataset(config: Config) -> Dataset:
    """What `prepare` has made; makes nothing.

    Raises:
      ConfigError: something is missing; the message names it and says how to make it.
    """
    data = config.data
    text = _require(text_folder(data, open_corpus(data)), "text data set")
    tokenizer = _load_tokenizer(config, _require(_tokenizer_file(config, text), "tokenizer"))
    tokens = _require(tokens_folder(data, text, tokenizer), "token data set")
    return Dataset(config, tokenizer, tokens)


def _require(path: Path, what: str) -> Path:
    if not path.exists():
        raise ConfigError(
            f"the {what} of this configuration is missing: there is no {path}; make it with "
            "`python -m moepp_jax.main prepare --config=...` where the corpus can be read, or set "
            "config.data.dir to where that was done"
        )
    return path


def _check_folder(name: str) -> None:
    folder = Path(name)
    if "://" in name:
        raise ConfigError(
            f"config.data.dir = {name!r} must be a folder: mount the bucket, or prepare the data "
            "on a disk that all processes see"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"config.data.dir = {name!r} cannot be made a folder: {error.strerror}"
        ) from None


def _tokenizer_file(config: Config, text: Path) -> Path:
    if config.data.tokenizer:
        return Path(config.data.tokenizer)
    name = storage.fingerprint(TRAINER_VERSION, text.name, config.model.vocab_size)
    return Path(config.data.dir) / f"tokenizer-{name}.model"


def _prepare_tokenizer(config: Config, text: Path, report: Report) -> Tokenizer:
    file = _tokenizer_file(config, text)
    if not config.data.tokenizer and not file.exists():
        start = time.perf_counter()
        report(f"tokenizer: learning {config.model.vocab_size:,} pieces from the training split")
        Tokenizer.train(Texts(text, "train"), config.model.vocab_size).save(file)
        report(f"tokenizer: {file} ({time.perf_counter() - start:.1f} s)")
    return _load_tokenizer(config, file)


def _load_tokenizer(config: Config, file: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(file)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"config.model.vocab_size = {config.model.vocab_size} is not the "
            f"{tokenizer.vocab_size} pieces of the tokenizer {file}: set it to "
            f"{tokenizer.vocab_size}, or change config.data.tokenizer"
        )
    return tokenizer
