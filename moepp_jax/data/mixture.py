"""Which source each training row comes from: exact shares at any moment, by arithmetic alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

# Weights become whole numbers with about this sum: row numbers below _ROWS can be multiplied by
# them in 64 bits, and even there their rounding amounts to two rows at most.
_TOTAL = 2**30
_ROWS = 2**32


class Mixture:
    """A fixed order in which rows of several sources follow each other.

    Row n is a function of n and the weights alone. Of the first n rows, each source has its share
    of them to within two rows, for up to a dozen sources, whatever n: no draw is random, so no
    share drifts. All rows have the same number of places, so shares of rows are shares of tokens.

    Sources are split off one by one, the heaviest first: of the rows that are left, it gets those
    at which the rounded multiple of its share of them grows.

    Attributes:
      names: the sources with a weight, in the order in which they were given.
      shares: of all rows, each source's.
    """

    def __init__(self, weights: Mapping[str, float]):
        """
        Args:
          weights: at least 0 each and not all 0, in any unit.
        """
        self.names = [name for name, weight in weights.items() if weight > 0]
        positive = np.array([weights[name] for name in self.names], np.float64)
        self.shares = dict(zip(self.names, (positive / positive.sum()).tolist(), strict=True))
        # The same for any order in which sources are named.
        self._order = sorted(range(len(positive)), key=lambda i: (-positive[i], self.names[i]))
        parts = np.round(positive / positive.sum() * _TOTAL).astype(np.int64)
        self._parts = np.maximum(parts, 1)

    def select(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers -> number of each one's source in `names`, and of the row in that source.

        Raises:
          ValueError: a row number is less than 0, or 2^32 or more.
        """
        if rows.size and not 0 <= rows.min() <= rows.max() < _ROWS:
            raise ValueError(f"rows {rows.min()} to {rows.max()}: numbers must be below {_ROWS:,}")
        source, row = np.full(rows.shape, -1), np.empty(rows.shape, np.int64)
        here = rows.astype(np.int64)  # among the rows that are left
        for i, part, left in self._splits():
            before, after = _multiple(here, part, left), _multiple(here + 1, part, left)
            taken = (source < 0) & (after > before)
            source[taken], row[taken] = i, before[taken]
            here = here - before
        return source, row

    def counts(self, rows: int) -> dict[str, int]:
        """How many of the first so many rows each source has."""
        counts, left_rows = {}, np.int64(rows)
        for i, part, left in self._splits():
            counts[self.names[i]] = int(_multiple(left_rows, part, left))
            left_rows -= counts[self.names[i]]
        return {name: counts[name] for name in self.names}

    def _splits(self) -> Iterator[tuple[int, int, int]]:
        """(source, its part, all that is left with it), in the order of splitting off."""
        left = int(self._parts.sum())
        for i in self._order:
            yield i, int(self._parts[i]), left
            left -= int(self._parts[i])


def _multiple(rows, part: int, of: int):
    """rows part / of, rounded: grows with rows by 0 or 1."""
    return (rows * part + of // 2) // of
