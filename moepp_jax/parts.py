"""A run's metrics in an object store, where nothing can be appended to: in parts, read as one.

metrics.jsonl is the first part. Each start of the run, and every few megabytes, begins another one,
metrics-00002-from-1400.jsonl: the second, written by a run that went on from step 1400. What parts
before it have of later steps was computed again, and is in it. No part is written twice but the
last, so a run of any length writes little at a time. A folder on a disk has metrics.jsonl alone,
unless it was copied from a store.
"""

import re
from typing import NamedTuple

from moepp_jax.storage import AnyPath

FILE = "metrics.jsonl"

# Bytes after which a part is left as it is, and another one begun.
_LARGE = 4_000_000

_NAME = re.compile(r"metrics-(\d{5,})-from-(-?\d+)\.jsonl")


class Part(NamedTuple):
    """One part.

    Attributes:
      number: from 1.
      start: the step that it goes on from.
    """

    number: int
    start: int
    file: AnyPath


def of(folder: AnyPath) -> list[Part]:
    """The parts that are there, in their order; none if nothing was measured."""
    if not (folder / FILE).exists():
        return []
    named = [(_NAME.fullmatch(entry.name), entry) for entry in folder.iterdir()]
    later = [Part(int(name[1]), int(name[2]), entry) for name, entry in named if name]
    return [Part(1, -1, folder / FILE), *sorted(later)]


class Growing(NamedTuple):
    """The part that grows: bytes of the local file from `offset` on."""

    number: int
    name: str
    offset: int

    def after(self, size: int, step: int) -> "Growing":
        """What grows next, when the local file has so many bytes and ends with this step."""
        if size - self.offset < _LARGE:
            return self
        return following(self.number, step, size)


def following(number: int, step: int, offset: int) -> Growing:
    """The part after that of this number."""
    return Growing(number + 1, f"metrics-{number + 1:05}-from-{step}.jsonl", offset)
