"""Packed rows against a token-by-token rule."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moepp_jax.data.packing import ranges
from tests import tiny

PAD = 99

documents_of = st.lists(st.integers(1, 12), min_size=1, max_size=12).map(
    lambda lengths: [np.arange(n) + 1000 * d for d, n in enumerate(lengths)]
)


def pack(documents, row_length, drop_last):
    return tiny.packed(documents, row_length, pad_id=PAD, drop_last=drop_last)


def rows_of(packed):
    """The rows, each read alone."""
    read = [packed.read(np.array([r])) for r in range(len(packed))]
    return [{name: value[0] for name, value in row.items()} for row in read]


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
    for row, wanted in zip(rows_of(packed), expected, strict=True):
        assert row.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_array_equal(row[name], wanted[name], err_msg=name)
            assert row[name].dtype == (np.float32 if name == "loss_mask" else np.int32)


@given(documents_of, st.integers(1, 20))
def test_in_evaluation_every_pair_in_a_document_is_predicted_exactly_once(documents, row_length):
    packed = pack(documents, row_length, drop_last=False)
    predicted = []
    for row in rows_of(packed):
        kept = row["loss_mask"] > 0
        predicted += zip(row["tokens"][kept].tolist(), row["targets"][kept].tolist(), strict=True)
    pairs = [
        (a, b) for d in documents for a, b in zip(d[:-1].tolist(), d[1:].tolist(), strict=True)
    ]
    assert predicted == pairs


@given(documents_of, st.integers(1, 20), st.booleans())
def test_counts_agree_with_the_rows(documents, row_length, drop_last):
    packed = pack(documents, row_length, drop_last)
    rows = rows_of(packed)
    for n in range(len(rows) + 1):
        assert packed.num_targets(n) == sum(row["loss_mask"].sum() for row in rows[:n])
    if rows:
        filled = np.mean([row["segments"] > 0 for row in rows])
        np.testing.assert_allclose(packed.efficiency, filled)


@given(documents_of, st.integers(1, 20), st.lists(st.integers(0, 40), max_size=6))
def test_rows_read_together_are_those_read_alone_and_past_the_end_there_is_padding(
    documents, row_length, numbers
):
    packed = pack(documents, row_length, drop_last=True)
    together, alone = packed.read(np.array(numbers, int)), rows_of(packed)
    padding = {"tokens": PAD, "targets": PAD, "segments": 0, "positions": 0, "loss_mask": 0}
    for name, values in together.items():
        assert values.shape == (len(numbers), row_length)
        for number, value in zip(numbers, values, strict=True):
            expected = alone[number][name] if number < len(packed) else padding[name]
            np.testing.assert_array_equal(value, np.broadcast_to(expected, row_length))


@given(documents_of, st.integers(1, 20), st.data())
def test_editing_a_document_changes_nothing_but_its_own_places(documents, row_length, data):
    edited = data.draw(st.integers(0, len(documents) - 1))
    others = [d + 500 if i == edited else d for i, d in enumerate(documents)]
    rows = np.arange(len(pack(documents, row_length, drop_last=False)))
    before, after = (pack(d, row_length, drop_last=False).read(rows) for d in (documents, others))
    own = before["tokens"] // 1000 == edited
    for name in ("segments", "positions", "loss_mask"):
        np.testing.assert_array_equal(before[name], after[name])
    np.testing.assert_array_equal(before["tokens"][~own], after["tokens"][~own])
    # Where a loss is taken, the target is of the same document.
    counted = ~own & (before["loss_mask"] > 0)
    np.testing.assert_array_equal(before["targets"][counted], after["targets"][counted])


def test_one_call_fetches_the_spans_of_the_rows_and_no_other(monkeypatch):
    calls, read = [], tiny.InMemory.read

    def noted(self, begin, size):
        calls.append((begin.tolist(), size.tolist()))
        return read(self, begin, size)

    monkeypatch.setattr(tiny.InMemory, "read", noted)
    packed = pack([np.arange(8) for _ in range(100)], 16, drop_last=False)
    packed.read(np.array([20, 3, 49, 50, 20]))  # the last of 50 is not full
    assert calls == [([320, 48, 784, 320], [17, 17, 16, 17])]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=9))
def test_ranges_are_those_of_each_pair(pairs):
    begin, size = np.array(pairs, int).reshape(-1, 2).T
    assert ranges(begin, size).tolist() == [i for b, n in pairs for i in range(b, b + n)]
