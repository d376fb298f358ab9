"""Packed rows against a token-by-token rule."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moepp_jax.data.packing import PackedRows

PAD = 99

documents_of = st.lists(st.integers(1, 12), min_size=1, max_size=12).map(
    lambda lengths: [np.arange(n) + 1000 * d for d, n in enumerate(lengths)]
)


def pack(documents, row_length, drop_last):
    lengths = np.array([len(document) for document in documents])
    return PackedRows(documents, lengths, row_length, pad_id=PAD, drop_last=drop_last)


def one_by_one(documents, row_length, drop_last):
    """The rows, made by walking over the stream."""
    stream = [(d, token) for d, document in enumerate(documents) for token in document]
    rows = []
    for begin in range(0, len(stream) - 1, row_length):
        if drop_last and begin + row_length >= len(stream):
            break
        row = {name: [] for name in ("tokens", "targets", "segments", "positions", "loss_mask")}
        segment, position = 0, 0
        for i in range(begin, begin + row_length):
            here = stream[i] if i < len(stream) else None
            following = stream[i + 1] if i + 1 < len(stream) else None
            if here is None:
                segment, position = 0, 0
            elif i == begin or stream[i - 1][0] != here[0]:
                segment, position = segment + 1, 0
            else:
                position += 1
            row["tokens"].append(here[1] if here else PAD)
            row["targets"].append(following[1] if following else PAD)
            row["segments"].append(segment)
            row["positions"].append(position)
            row["loss_mask"].append(float(bool(here and following and here[0] == following[0])))
        rows.append(row)
    return rows


@given(documents_of, st.integers(1, 20), st.booleans())
def test_rows_are_those_of_the_walk(documents, row_length, drop_last):
    packed = pack(documents, row_length, drop_last)
    expected = one_by_one(documents, row_length, drop_last)
    assert len(packed) == len(expected)
    for row, wanted in zip((packed[r] for r in range(len(packed))), expected, strict=True):
        assert row.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_array_equal(row[name], wanted[name], err_msg=name)
            assert row[name].dtype == (np.float32 if name == "loss_mask" else np.int32)


@given(documents_of, st.integers(1, 20))
def test_in_evaluation_every_pair_in_a_document_is_predicted_exactly_once(documents, row_length):
    packed = pack(documents, row_length, drop_last=False)
    predicted = []
    for r in range(len(packed)):
        row = packed[r]
        kept = row["loss_mask"] > 0
        predicted += zip(row["tokens"][kept].tolist(), row["targets"][kept].tolist(), strict=True)
    pairs = [
        (a, b) for d in documents for a, b in zip(d[:-1].tolist(), d[1:].tolist(), strict=True)
    ]
    assert predicted == pairs


@given(documents_of, st.integers(1, 20), st.booleans())
def test_counts_agree_with_the_rows(documents, row_length, drop_last):
    packed = pack(documents, row_length, drop_last)
    rows = [packed[r] for r in range(len(packed))]
    for n in range(len(rows) + 1):
        assert packed.num_targets(n) == sum(row["loss_mask"].sum() for row in rows[:n])
    if rows:
        filled = np.mean([row["segments"] > 0 for row in rows])
        np.testing.assert_allclose(packed.efficiency, filled)


def test_a_row_of_padding_predicts_nothing():
    row = pack([np.arange(5)], 4, drop_last=False).padding()
    assert row["tokens"].tolist() == row["targets"].tolist() == [PAD] * 4
    assert not any(row[name].any() for name in ("segments", "positions", "loss_mask"))


def test_only_the_documents_of_a_row_are_read():
    class Counting(list):
        read = 0

        def __getitem__(self, index):
            Counting.read += 1
            return super().__getitem__(index)

    packed = pack(Counting([np.arange(8) for _ in range(100)]), 16, drop_last=True)
    Counting.read = 0
    _ = packed[20]  # 17 tokens
    assert Counting.read == 3
