"""Rows of training read here, or in worker processes that give back the same."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from moepp_jax.config import ConfigError
from moepp_jax.data import work
from moepp_jax.data.packing import Batch, PackedRows
from moepp_jax.data.tokens import TokenDocuments

# Seconds that a worker lives on after SIGTERM. It may have been sent to all processes of a job, and
# the one that trains needs data until it has saved its state.
_GRACE = 30


class Wanted(NamedTuple):
    """Rows of one source.

    Attributes:
      rows: their numbers.
      places: where they belong among the rows of all sources.
    """

    source: str
    rows: np.ndarray
    places: np.ndarray


Read = Callable[[list[Wanted]], Batch]

T, R = TypeVar("T"), TypeVar("R")


def open_rows(folder: Path, row_length: int, pad_id: int) -> PackedRows:
    """The training split of a token data set."""
    documents = TokenDocuments(folder, "train")
    return PackedRows(documents, documents.starts, row_length, pad_id=pad_id, drop_last=True)


def read(sources: Mapping[str, PackedRows], wanted: list[Wanted]) -> Batch:
    """Rows of several sources in their places."""
    parts = [sources[w.source].read(w.rows) for w in wanted]
    order = np.argsort(np.concatenate([w.places for w in wanted]))
    return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}


def ahead(do: Callable[[T], R], items: Iterator[T], threads: int) -> Iterator[tuple[T, Future[R]]]:
    """Each of endless items with what `do` makes of it, while threads work on the next ones."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="train-batches")
    started = collections.deque()
    try:
        for item in items:
            started.append((item, pool.submit(do, item)))
            if len(started) > threads:
                yield started.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def in_processes(
    count: int, folders: Mapping[str, Path], row_length: int, pad_id: int
) -> Iterator[Read]:
    """As `read`, in so many processes, each of which opens the sources once.

    Args:
      folders: of the sources' token data sets.

    Raises:
      ConfigError: when it is called, one of them was killed.
      DataError: as `read`.
    """
    # Not forked: this process has threads. What they need loads neither JAX nor TensorFlow.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, _open, (folders, row_length, pad_id))

    def read_there(wanted: list[Wanted]) -> Batch:
        try:
            return pool.submit(_read, wanted).result()
        except BrokenProcessPool:
            raise ConfigError(
                f"one of config.data.worker_processes = {count} was killed, as a machine does that "
                "runs out of memory: lower it (0 reads on threads), and give the same command again"
            ) from None

    try:
        yield read_there
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # who trains need not wait


def _open(folders: Mapping[str, Path], row_length: int, pad_id: int) -> None:
    global _sources
    work.end_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))
    _sources = {n: open_rows(folder, row_length, pad_id) for n, folder in folders.items()}


def _read(wanted: list[Wanted]) -> Batch:
    return read(_sources, wanted)
