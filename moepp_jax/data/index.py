"""Long rows of numbers on disk, of which only what is looked at is read, and verified then.

Where a billion documents begin are 16 GB: to sum up such a file before a run's first step would
take as long as many steps, in every process. So beside NAME.npy lies NAME-blocks.npy, which is
small: of each block of the numbers its first one, to find the block to look in, and its XXH3-64.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

# Numbers of a block: 64 KiB. A row of a batch looks into two or three of them.
_BLOCK = 2**13

Damaged = Callable[[Path, str], Exception]


def write(file: Path, numbers: np.ndarray) -> None:
    """Writes a file of rows of int64, or of one such row, and the file of its blocks."""
    np.save(file, numbers)
    mapped = np.load(file, mmap_mode="r")
    flat = mapped.reshape(-1)
    sums = [_sum(flat[start : start + _BLOCK]) for start in range(0, len(flat), _BLOCK)]
    # What comes before the numbers is the last block: its length and its sum.
    firsts = np.append(flat[::_BLOCK], mapped.offset)
    sums = np.array([*sums, _sum_of_header(file, mapped.offset)], np.uint64).view(np.int64)
    np.save(file.with_name(blocks_file(file.name)), np.stack([firsts, sums]))


def blocks_file(name: str) -> str:
    """The file of the blocks of such a file."""
    return f"{name.removesuffix('.npy')}-blocks.npy"


def open_rows(file: Path, damaged: Damaged) -> list[Row]:
    """The rows of a file, none of which is read yet; with its blocks verified where it has any.

    Args:
      damaged: makes the error that says something of a file.

    Raises:
      Exception: of `damaged`: the file cannot be read as an array, now or where it is looked at.
    """
    known = file.with_name(blocks_file(file.name))
    firsts = sums = None
    if known.exists():
        firsts, sums = np.load(known)
        sums = sums.view(np.uint64)
        if _sum_of_header(file, int(firsts[-1])) != sums[-1]:
            raise damaged(file, " is not as it was written: its first bytes have changed")
    try:
        mapped = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise damaged(file, f" cannot be read as an array: {error}") from None
    flat = np.asarray(mapped).reshape(-1)
    blocks = _Blocks(flat, firsts, sums, functools.partial(damaged, file))
    length = mapped.shape[-1]
    rows = len(flat) // length if length else 1
    return [Row(blocks, row * length, (row + 1) * length) for row in range(rows)]


def _sum_of_header(file: Path, length: int) -> int:
    with file.open("rb") as stream:
        return xxhash.xxh3_64_intdigest(stream.read(length))


def _sum(numbers: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(memoryview(numbers).cast("B"))


class _Blocks:
    """The numbers of a file; blocks are verified once, unless there is nothing to verify them by.

    Attributes:
      numbers: all of them; look at none before `verify`.
    """

    def __init__(self, numbers, firsts, sums, damaged: Callable[[str], Exception]):
        self.numbers = numbers
        self._firsts, self._sums, self._damaged = firsts, sums, damaged
        self._verified = np.zeros(-(-len(numbers) // _BLOCK), bool)

    def verify(self, blocks: np.ndarray) -> None:
        if self._sums is None:
            return
        for block in np.unique(blocks[~self._verified[blocks]]).tolist():
            first = block * _BLOCK
            if _sum(self.numbers[first : first + _BLOCK]) != self._sums[block]:
                raise self._damaged(
                    f" is not as it was written: numbers {first:,} and following have changed"
                )
            self._verified[block] = True

    def of(self, first: int, last: int, values: np.ndarray, side: str) -> np.ndarray:
        """The block in which each value is to be searched, among numbers first ... last - 1."""
        if self._firsts is None:
            return np.zeros(values.shape, np.int64)
        begin, end = first // _BLOCK, (last - 1) // _BLOCK
        return begin + np.searchsorted(self._firsts[begin + 1 : end + 1], values, side)

    def bounds(self, block: int) -> tuple[int, int]:
        if self._firsts is None:
            return 0, len(self.numbers)
        return block * _BLOCK, (block + 1) * _BLOCK


@dataclasses.dataclass(frozen=True)
class Row:
    """Some numbers of a file, of one row, which numpy's functions take for an array."""

    _blocks: _Blocks
    _first: int
    _last: int

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, at):
        """A number, numbers at an array of places, or, of a slice, others that are not read yet."""
        if isinstance(at, slice):
            first, last, step = at.indices(len(self))
            if step != 1:
                raise IndexError(f"a slice of every {step} numbers")
            return Row(self._blocks, self._first + first, self._first + max(first, last))
        at = np.asarray(at)
        if at.size and not -len(self) <= at.min() <= at.max() < len(self):
            raise IndexError(f"{at} of {len(self)} numbers")
        places = self._first + np.where(at < 0, at + len(self), at)
        self._blocks.verify((places // _BLOCK).ravel())
        return self._blocks.numbers[places]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if len(self):
            self._blocks.verify(np.arange(self._first // _BLOCK, (self._last - 1) // _BLOCK + 1))
        numbers = self._blocks.numbers[self._first : self._last]
        return np.array(numbers, dtype, copy=copy)

    def searchsorted(self, values, side: str = "left", sorter: None = None):
        """As of an array, of numbers that ascend; looks into the one block each value is in."""
        shape, values = np.shape(values), np.ravel(values)
        found = np.zeros(values.shape, np.int64)
        of_values = self._blocks.of(self._first, self._last, values, side)
        for block in np.unique(of_values).tolist() if len(self) else ():
            begin, end = self._blocks.bounds(block)
            begin, end = max(begin, self._first), min(end, self._last)
            self._blocks.verify(np.array([begin // _BLOCK]))
            inside = of_values == block
            numbers = self._blocks.numbers[begin:end]
            found[inside] = begin - self._first + np.searchsorted(numbers, values[inside], side)
        return found.reshape(shape)[()]
