"""Batches of training, read ahead by grain: on threads, or in worker processes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from absl import flags

from moepp_jax import worker
from moepp_jax.data.mixture import Mixture
from moepp_jax.data.packing import Batch, PackedRows
from moepp_jax.data.shuffle import shuffled
from moepp_jax.data.storage import DataError
from moepp_jax.errors import ConfigError

# The rows of a batch that are wanted: a slice, or their indices.
Rows = slice | np.ndarray

# Threads that read ahead, a piece of work each: most of their time goes by in storage and in code
# that lets other threads run. A piece is a batch, or several small ones of this many tokens
# together: a call to the reader costs as much as a few thousand tokens.
_THREADS = 4
_PIECE = 2**16

# More pieces than any run has: grain asks for a length.
_ENDLESS = 2**40

# Seconds that a worker lives on after SIGTERM. It may have been sent to all processes of a job, and
# the one that trains needs data until it has saved its state.
_GRACE = 30


class Training(NamedTuple):
    """What every step trains on, a function of the step alone.

    Attributes:
      sources: the training split of each source.
    """

    sources: Mapping[str, PackedRows]
    mixture: Mixture
    batch_size: int
    seed: int

    def batch(self, step: int, rows: Rows) -> Batch:
        """The wanted rows of one step's batch, [rows, L] each.

        Raises:
          DataError: a record is damaged.
        """
        [batch] = _apart(self.batches(range(step, step + 1), rows))
        return batch

    def batches(self, steps: range, rows: Rows) -> Batch:
        """As `batch` of several steps, read together: [steps, rows, L] each."""
        in_batch = np.arange(self.batch_size)[rows]
        numbers = np.add.outer(np.array(steps) * self.batch_size, in_batch)
        parts, places = [], []
        for name, (place, row) in self.rows(numbers.ravel()).items():
            places.append(place)
            parts.append(self.sources[name].read(row))
        order = np.argsort(np.concatenate(places))
        return {
            name: np.concatenate([part[name] for part in parts])[order].reshape(*numbers.shape, -1)
            for name in parts[0]
        }

    def rows(self, numbers: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Rows of the training by number -> of each source, which of them are its own, and its row.

        The first step's batch has the numbers from 0 on, the second goes on from there.
        """
        of_source, row = self.mixture.select(numbers)
        places = {name: np.flatnonzero(of_source == i) for i, name in enumerate(self.sources)}
        return {
            name: (place, shuffled(row[place], len(self.sources[name]), self.seed))
            for name, place in places.items()
        }

    def ahead(self, start_step: int, rows: Rows, workers: int) -> Iterator[Batch]:
        """The batch of each step from `start_step` on, without end.

        Args:
          workers: processes that read; 0 reads on threads of this one.

        Raises:
          DataError: a record is damaged; where its batch would come.
          ConfigError: a worker was killed.
        """
        [source, *_] = self.sources.values()
        tokens = len(np.arange(self.batch_size)[rows]) * source.row_length
        pieces = Pieces(self, rows, start_step, max(1, _PIECE // tokens))
        number = 0
        while True:
            try:
                for batches in _read_ahead(pieces, number, workers):
                    yield from _apart(batches)
                    number += 1
            except DataError:  # of one step; the batches before it are good
                for step in pieces.steps(number):
                    yield self.batch(step, rows)
                number += 1


@dataclass(frozen=True)
class Pieces:
    """Pieces of the training from a step on, as grain reads data: by number."""

    training: Training
    rows: Rows
    start_step: int
    size: int  # steps of a piece

    def steps(self, number: int) -> range:
        first = self.start_step + number * self.size
        return range(first, first + self.size)

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, number: int) -> Batch:
        return self.training.batches(self.steps(number), self.rows)


def _apart(batches: Batch) -> Iterator[Batch]:
    for i in range(len(batches["tokens"])):
        yield {name: value[i] for name, value in batches.items()}


def _read_ahead(pieces: Pieces, first: int, workers: int) -> Iterator[Batch]:
    """The pieces from the first on, in their order."""
    import grain  # here, as it brings JAX: processes that prepare data start without

    threads = 1 if workers else _THREADS
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    dataset = grain.MapDataset.source(pieces)[first:].to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # under a program without; grain asks for its own
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(processes, worker_init_fn=_start_worker)
    with contextlib.closing(iter(dataset)) as read:
        try:
            yield from read
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise ConfigError(
                f"one of config.data.worker_processes = {workers} was killed, as a machine does "
                "that runs out of memory: lower it (0 reads on threads), and give the same command "
                "again"
            ) from None


def _start_worker(index: int, count: int) -> None:
    worker.end_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))
