"""Documents of any length as rows of one length, without preparing anything again."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

Batch = dict[str, np.ndarray]


@runtime_checkable
class Documents(Protocol):
    def __getitems__(self, indices: list[int]) -> list[np.ndarray]:
        """Documents, each a vector of token ids."""


class PackedRows:
    """The documents of a split, laid end to end and cut into rows of `row_length` tokens.

    Row r covers the tokens r L ... r L + L of that stream: rows overlap by one, so that the last
    token of a row is still followed by its target. A row holds, each [L]:

      tokens     int32
      targets    int32, the next token
      segments   int32, 1, 2, ... for the documents in the row; 0 is padding
      positions  int32, from 0 in each segment
      loss_mask  float32, 1 where token and target belong to the same document

    so no prediction crosses documents, and every neighbouring pair in a document is predicted in
    exactly one row. A row that the stream does not fill is left out if `drop_last`, else padded.

    Args:
      starts: [documents + 1], where each begins in the stream, and its end. Only the few entries
        that a row needs are looked at, so it may be a file that is mapped into memory.
    """

    def __init__(
        self,
        documents: Documents,
        starts: np.ndarray,
        row_length: int,
        *,
        pad_id: int,
        drop_last: bool,
    ):
        self._documents = documents
        self._starts = starts
        self._pad_id = pad_id
        self.row_length = row_length
        pairs = max(self.num_tokens - 1, 0)
        self._len = pairs // row_length if drop_last else -(-pairs // row_length)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole stream, BOS and EOS included."""
        return int(self._starts[-1])

    @property
    def efficiency(self) -> float:
        """Share of the places in all rows that hold a token, not padding."""
        places = len(self) * self.row_length
        return min(places, self.num_tokens) / places if places else 0.0

    def num_targets(self, rows: int) -> int:
        """Targets with loss mask 1 in the first `rows` rows."""
        last = min(rows * self.row_length, self.num_tokens - 1)
        firsts_of_documents = np.searchsorted(self._starts[1:-1], last, side="right")
        return last - int(firsts_of_documents)

    def __len__(self) -> int:
        return self._len

    def read(self, rows: np.ndarray) -> Batch:
        """Rows by number, stacked: [rows, L] each. Numbers past the last row give padding.

        One call to the documents fetches all that the rows need.
        """
        L = self.row_length
        begin = np.minimum(rows.astype(np.int64) * L, self.num_tokens)
        size = np.where(rows < len(self), np.minimum(self.num_tokens - begin, L + 1), 0)
        first = np.searchsorted(self._starts, begin, side="right") - 1
        last = np.searchsorted(self._starts, begin + size, side="left")
        wanted = sorted({d for a, b in zip(first, last, strict=True) for d in range(a, b)})
        fetched = dict(zip(wanted, self._documents.__getitems__(wanted), strict=True))
        stream = np.full((len(rows), L + 1), self._pad_id, np.int32)
        opens = np.zeros((len(rows), L + 1), bool)  # where a segment begins
        for r in range(len(rows)):
            bounds = (self._starts[first[r] : last[r] + 1] - begin[r]).tolist()
            for d, start, end in zip(range(first[r], last[r]), bounds, bounds[1:], strict=False):
                low, high = max(start, 0), min(end, size[r])
                stream[r, low:high] = fetched[d][low - start : high - start]
                opens[r, low] = True
        return self._described(stream, opens, np.arange(L + 1) < size[:, None])

    def _described(self, stream: np.ndarray, opens: np.ndarray, real: np.ndarray) -> Batch:
        """L + 1 places of every row -> what is said of its L tokens."""
        places = np.arange(self.row_length, dtype=np.int32)
        here = opens[:, :-1]
        segments = np.cumsum(here, axis=1, dtype=np.int32)
        since = np.maximum.accumulate(np.where(here, places, 0), axis=1)
        return {
            "tokens": stream[:, :-1],
            "targets": stream[:, 1:],
            "segments": np.where(real[:, :-1], segments, 0),
            "positions": np.where(real[:, :-1], places - since, 0),
            "loss_mask": (real[:, 1:] & ~opens[:, 1:]).astype(np.float32),
        }
