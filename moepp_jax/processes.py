"""What the processes of a run do in agreement; a process alone agrees with itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from moepp_jax.errors import ConfigError

T = TypeVar("T")

# Bytes of an error's text that the other processes are told.
_MESSAGE = 2000

# Bytes that one process sends all others at a time.
_PIECE = 64 * 2**20

# Seconds of a process's work after which the others hear that it goes on.
_PATIENCE = 10.0


def is_first() -> bool:
    """Whether this is the process that writes what the run writes once."""
    return jax.process_index() == 0


def agree(work: Callable[[], T]) -> T:
    """What `work` returns here, when it has succeeded in every process.

    Processes wait for the slowest as long as it lives, but never long in one collective.

    Raises:
      ConfigError: it was raised here or in another process, so in all.
    """
    if jax.process_count() == 1:
        return work()
    future, heard = _in_all(work, lambda result: "")
    if not future.exception():
        for process, said in enumerate(heard):
            if said:
                raise ConfigError(f"process {process}: {said}")
    return future.result()


def of_each(work: Callable[[], str]) -> list[str]:
    """What `work` returns in each process, in all of them; of long texts the beginning.

    They wait as in `agree`; what `work` raises ends the process.
    """
    if jax.process_count() == 1:
        return [work()]
    future, heard = _in_all(work, str)
    future.result()
    return heard


def _in_all(work: Callable[[], T], say: Callable[[T], str]) -> tuple[Future, list[str]]:
    """Some work when it is done everywhere, and what each process says of its."""
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        future = pool.submit(work)
        while True:
            wait([future], timeout=_PATIENCE)
            heard = _gather(_said(future, say))
            if None not in heard:
                return future, heard
    finally:
        pool.shutdown(wait=False)


def _said(future: Future, say: Callable[[T], str]) -> str | None:
    """What is said of some work or of the error that ended it, None while it goes on."""
    if not future.done():
        return None
    error = future.exception()
    if error is not None and not isinstance(error, ConfigError):
        raise error  # a fault, which ends this process
    return str(error) if error else say(future.result())


def _gather(said: str | None) -> list[str | None]:
    """What each process says."""
    message = np.zeros(_MESSAGE, np.uint8)
    if said is not None:
        text = said.encode()[: _MESSAGE - 1]
        message[: len(text) + 1] = np.frombuffer(b"!" + text, np.uint8)
    with jax.transfer_guard("allow"):
        messages = multihost_utils.process_allgather(message)
    texts = [m.tobytes().rstrip(b"\0").decode(errors="replace") for m in messages]
    return [text[1:] if text else None for text in texts]


def require_alike(text: str) -> None:
    """Refuses processes that were started with something else.

    Raises:
      ConfigError: this text is not that of the first process; in all processes.
    """
    mine = hashlib.sha256(text.encode()).hexdigest()
    digests = _gather(mine) if jax.process_count() > 1 else [mine]
    others = [process for process, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ConfigError(
            f"process {others[0]} was started with another configuration, --workdir or --init_from "
            "than process 0: give every process the same command"
        )


def on_first(work: Callable[[], T]) -> T | None:
    """As `agree`, but only the first process works; the others get None."""
    return agree(lambda: work() if is_first() else None)


def of_first(number: int | None) -> int | None:
    """The first process's number, in all of them; -1 stands for none on the way."""
    if jax.process_count() == 1:
        return number
    with jax.transfer_guard("allow"):
        told = multihost_utils.broadcast_one_to_all(np.int32(-1 if number is None else number))
    return None if told < 0 else int(told)


def of_all(numbers: np.ndarray) -> np.ndarray:
    """An array of each process, stacked: [process, ...]."""
    if jax.process_count() == 1:
        return numbers[None]
    with jax.transfer_guard("allow"):
        return multihost_utils.process_allgather(numbers)


def from_one(content: np.ndarray | None, nbytes: int, source: int) -> np.ndarray:
    """The bytes (uint8) that one process has, in all of them; the others give None."""
    taken = np.empty(nbytes, np.uint8)
    for start in range(0, nbytes, _PIECE):
        end = min(start + _PIECE, nbytes)
        # Sums of zeros and one number: exact for integers, where floats would lose the sign of 0.
        piece = np.zeros(min(_PIECE, -(-nbytes // 4) * 4), np.uint8)
        if content is not None:
            piece[: end - start] = content[start:end]
        with jax.transfer_guard("allow"):
            told = multihost_utils.broadcast_one_to_all(
                piece.view(np.uint32), is_source=jax.process_index() == source
            )
        taken[start:end] = np.asarray(told).view(np.uint8)[: end - start]
    return taken


class Rows:
    """The rows of a global batch that lie on this process's devices: all that it has to load.

    Attributes:
      indices: of these rows in the batch, ascending; a mesh may leave gaps between them.
    """

    def __init__(self, sharding: Sharding, batch_size: int):
        self._sharding = sharding
        self._all = np.arange(batch_size)
        parts = sharding.addressable_devices_indices_map((batch_size,)).values()
        self.indices = np.unique(np.concatenate([self._all[part] for part in parts]))

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """The global arrays [batch_size, ...] of which these are this process's rows."""
        return {name: self._array(here) for name, here in batch.items()}

    def _array(self, here: np.ndarray) -> jax.Array:
        if len(here) != len(self.indices):
            raise ValueError(f"{len(here)} rows for the {len(self.indices)} of this process")

        def part(index):
            return here[np.searchsorted(self.indices, self._all[index[0]])]

        shape = (len(self._all), *here.shape[1:])
        return jax.make_array_from_callback(shape, self._sharding, part)
