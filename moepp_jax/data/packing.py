"""Documents of any length as rows of one length, without preparing anything again."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

Batch = dict[str, np.ndarray]


@runtime_checkable
class Stream(Protocol):
    """Documents laid end to end.

    Attributes:
      starts: [documents + 1], where each begins, and the end of the last. Only the few entries that
        a row needs are looked at, so it may be a file that is mapped into memory.
    """

    starts: np.ndarray

    def read(self, begin: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Spans of tokens, one after the other, of where each begins and how long it is."""


class PackedRows:
    """The documents of a split, laid end to end and cut into rows of `row_length` tokens.

    Row r covers the tokens r L ... r L + L of the stream: rows overlap by one, so that the last
    token of a row is still followed by its target. A row holds, each [L]:

      tokens     int32
      targets    int32, the next token
      segments   int32, 1, 2, ... for the documents in the row; 0 is padding
      positions  int32, from 0 in each segment
      loss_mask  float32, 1 where token and target belong to the same document

    so no prediction crosses documents, and every neighbouring pair in a document is predicted in
    exactly one row. A row that the stream does not fill is left out if `drop_last`, else padded.
    """

    def __init__(self, stream: Stream, row_length: int, *, pad_id: int, drop_last: bool):
        self._stream = stream
        self._pad_id = pad_id
        self.row_length = row_length
        pairs = max(self.num_tokens - 1, 0)
        self._len = pairs // row_length if drop_last else -(-pairs // row_length)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole stream, BOS and EOS included."""
        return int(self._stream.starts[-1])

    @property
    def efficiency(self) -> float:
        """Share of the places in all rows that hold a token, not padding."""
        places = len(self) * self.row_length
        return min(places, self.num_tokens) / places if places else 0.0

    def num_targets(self, rows: int) -> int:
        """Targets with loss mask 1 in the first `rows` rows."""
        last = min(rows * self.row_length, self.num_tokens - 1)
        firsts_of_documents = np.searchsorted(self._stream.starts[1:-1], last, side="right")
        return last - int(firsts_of_documents)

    def __len__(self) -> int:
        return self._len

    def read(self, rows: np.ndarray) -> Batch:
        """Rows by number, stacked: [rows, L] each. Numbers past the last row give padding.

        The stream is asked once for all of them.
        """
        places = np.arange(self.row_length + 1)
        inside = np.flatnonzero(rows < len(self))
        begin = rows[inside].astype(np.int64) * self.row_length
        size = np.minimum(self.num_tokens - begin, len(places))
        real = np.zeros((len(rows), len(places)), bool)
        real[inside] = places < size[:, None]
        tokens = np.full(real.shape, self._pad_id, np.int32)
        tokens[real] = self._stream.read(begin, size)
        return self._described(tokens, self._opens(inside, begin, size, real.shape), real)

    def standing(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the tokens of rows, [rows, L]: number of the document in the stream, and place in it.

        Unlike `positions` the place goes on from row to row. What is past the stream is as if the
        last document went on.
        """
        at = rows.astype(np.int64)[:, None] * self.row_length + np.arange(self.row_length)
        document = np.searchsorted(self._stream.starts[1:-1], at, side="right")
        return document, at - self._stream.starts[document]

    def _opens(self, rows: np.ndarray, begin, size, shape: tuple[int, int]) -> np.ndarray:
        """Where segments begin: at the start of each of these rows, and of documents in it."""
        opens = np.zeros(shape, bool)
        opens[rows, 0] = True
        first = np.searchsorted(self._stream.starts, begin, side="right")
        count = np.searchsorted(self._stream.starts, begin + size, side="left") - first
        places = self._stream.starts[ranges(first, count)] - np.repeat(begin, count)
        opens[np.repeat(rows, count), places] = True
        return opens

    def _described(self, tokens: np.ndarray, opens: np.ndarray, real: np.ndarray) -> Batch:
        """L + 1 places of every row -> what is said of its L tokens."""
        places = np.arange(self.row_length, dtype=np.int32)
        here = opens[:, :-1]
        segments = np.cumsum(here, axis=1, dtype=np.int32)
        since = np.maximum.accumulate(np.where(here, places, 0), axis=1)
        return {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segments": np.where(real[:, :-1], segments, 0),
            "positions": np.where(real[:, :-1], places - since, 0),
            "loss_mask": (real[:, 1:] & ~opens[:, 1:]).astype(np.float32),
        }


def ranges(begin: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The numbers begin ... begin + size - 1 of every pair, one after the other."""
    return np.repeat(begin - (np.cumsum(size) - size), size) + np.arange(size.sum())
