"""Documents of any length as rows of one length, without preparing anything again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Row = dict[str, np.ndarray]


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
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        lengths: np.ndarray,
        row_length: int,
        *,
        pad_id: int,
        drop_last: bool,
    ):
        self._documents = documents
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
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

    def __getitem__(self, row: int) -> Row:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        begin = row * self.row_length
        end = min(begin + self.row_length + 1, self.num_tokens)
        first = int(np.searchsorted(self._starts, begin, side="right")) - 1
        last = int(np.searchsorted(self._starts, end, side="left"))
        stream = np.concatenate([self._documents[i] for i in range(first, last)])
        stream = stream[begin - self._starts[first] :][: end - begin]
        bounds = np.clip(self._starts[first : last + 1], begin, end) - begin
        segments = np.repeat(np.arange(1, last - first + 1), np.diff(bounds))
        positions = np.arange(end - begin) - bounds[segments - 1]
        return self._row(stream, segments, positions)

    def padding(self) -> Row:
        """A row of padding only, which fills up a batch."""
        nothing = np.empty(0)
        return self._row(nothing, nothing, nothing)

    def _row(self, stream: np.ndarray, segments: np.ndarray, positions: np.ndarray) -> Row:
        """Up to L + 1 tokens and their places as a row of L."""
        return {
            "tokens": self._fill(stream[: self.row_length], self._pad_id),
            "targets": self._fill(stream[1:], self._pad_id),
            "segments": self._fill(segments[: self.row_length], 0),
            "positions": self._fill(positions[: self.row_length], 0),
            "loss_mask": self._fill(segments[1:] == segments[:-1], 0, np.float32),
        }

    def _fill(self, values: np.ndarray, padding: int, dtype: type = np.int32) -> np.ndarray:
        full = np.full(self.row_length, padding, dtype)
        full[: len(values)] = values
        return full
