"""Numbers on disk are an array's, and what has changed on disk is no number of theirs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepp_jax.data import index, records, storage

BLOCK = 8


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "_BLOCK", BLOCK)
        yield


def numbers(length: int, rows: int = 2) -> np.ndarray:
    rng = np.random.default_rng(length)
    return np.cumsum(rng.integers(0, 4, (rows, length)), axis=1, dtype=np.int64)


@pytest.fixture(scope="module", params=[1, 7, 8, 9, 50])
def opened(request, tmp_path_factory):
    """Rows of a file, and what they shall be."""
    file = tmp_path_factory.mktemp("index") / "train-index.npy"
    index.write(file, numbers(request.param))
    return index.open_rows(file, records.damaged), numbers(request.param)


@given(st.data())
def test_rows_are_searched_and_read_like_arrays(opened, data):
    rows, expected = opened
    for row, array in zip(rows, expected, strict=True):
        assert len(row) == len(array)
        np.testing.assert_array_equal(np.asarray(row), array)
        first = data.draw(st.integers(0, len(array)))
        last = data.draw(st.integers(first, len(array)))
        part, of_array = row[first:last], array[first:last]
        np.testing.assert_array_equal(np.asarray(part), of_array)
        values = np.array(data.draw(st.lists(st.integers(-2, 160), max_size=6)), np.int64)
        for side in ("left", "right"):
            for wanted in (values, values.reshape(1, -1), np.int64(5)):
                found = np.searchsorted(part, wanted, side=side)
                np.testing.assert_array_equal(found, np.searchsorted(of_array, wanted, side=side))
        if len(part):
            at = np.array(data.draw(st.lists(st.integers(-len(part), len(part) - 1), max_size=4)))
            np.testing.assert_array_equal(part[at.astype(int)], of_array[at.astype(int)])
            assert part[-1] == of_array[-1]
        with pytest.raises(IndexError):
            part[len(part)]


def test_each_flipped_byte_is_found_where_it_is_looked_at_and_not_before(tmp_path):
    file = tmp_path / "train-index.npy"
    index.write(file, numbers(50))
    good = file.read_bytes()
    header = len(good) - 2 * 50 * 8
    for at in range(0, len(good), 3):
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        if at < header:
            with pytest.raises(storage.DataError, match="its first bytes have changed"):
                index.open_rows(file, records.damaged)
            continue
        rows = index.open_rows(file, records.damaged)
        row, place = divmod((at - header) // 8, 50)
        with pytest.raises(storage.DataError, match=r"train-index\.npy is not as it was written"):
            rows[row][place]
        with pytest.raises(storage.DataError, match=r"train-index\.npy is not as it was written"):
            np.asarray(rows[row])
        far = 49 if (at - header) // 8 < 50 - 2 * BLOCK else 0
        assert rows[0][far] == numbers(50)[0, far]  # in another block, which is as it was
        assert at - header < 8 * BLOCK or np.searchsorted(rows[0], -1) == 0
    file.write_bytes(good)


def test_a_search_looks_into_one_block_of_each_value(tmp_path, monkeypatch):
    file = tmp_path / "train-index.npy"
    index.write(file, numbers(5000, 1))
    [row] = index.open_rows(file, records.damaged)
    read = []
    real = index._sum
    monkeypatch.setattr(index, "_sum", lambda n: read.append(len(n)) or real(n))
    for _ in range(2):
        np.searchsorted(row, np.array([10, 4000, 7000]), "right")
    assert read == [BLOCK] * 3


def test_a_file_without_blocks_is_read_as_it_is(tmp_path):
    np.save(tmp_path / "a.npy", numbers(50))
    rows = index.open_rows(tmp_path / "a.npy", records.damaged)
    np.testing.assert_array_equal(
        np.searchsorted(rows[1], [3, 60]), np.searchsorted(numbers(50)[1], [3, 60])
    )
    (tmp_path / "a.npy").write_bytes(b"no array")
    with pytest.raises(storage.DataError, match=r"a\.npy cannot be read as an array"):
        index.open_rows(tmp_path / "a.npy", records.damaged)
