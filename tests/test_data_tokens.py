"""Tokens of documents in records of one size, read as documents and as a stream."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepp_jax.data import records, tokens
from moepp_jax.data.prepare import prepare_sources
from tests import tiny

RECORD = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A book among notes, in records that are longer than a note and shorter than the book."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "text").mkdir()
    text = "".join(file.read_text() for file in sorted(tiny.TEXT.glob("*.txt")))
    for i in range(30):
        (folder / "text" / f"{i}.txt").write_text(text if i == 7 else text[30 * i :][: 5 + 9 * i])
    data = {"data.dir": str(folder / "data"), "data.sources.text.path": str(folder / "text")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_RECORD", RECORD)
        made = prepare_sources(tiny.config(**data), lambda line: None, workers=1)
    return made.tokens["text"]


@pytest.fixture(scope="module")
def documents(folder) -> tokens.TokenDocuments:
    return tokens.TokenDocuments(folder, "train")


@pytest.fixture(scope="module")
def stored(folder) -> list[np.ndarray]:
    """The tokens of all records, as TFDS reads them."""
    return [example["tokens"] for example in records.Split(folder, "train")]


def test_records_are_of_one_size_but_the_last(stored, documents):
    assert {len(ids) for ids in stored[:-1]} == {RECORD} and 0 < len(stored[-1]) <= RECORD
    assert max(documents.lengths) > 10 * RECORD and min(documents.lengths) < RECORD / 2


def test_documents_are_whole_wherever_records_end(stored, documents, monkeypatch):
    expected = np.split(np.concatenate(stored), documents.starts[1:-1])
    assert len(expected) == len(documents)
    for batch in (1, 100, 1_000_000):  # tokens that are read together
        monkeypatch.setattr(tokens, "_BATCH", batch)
        for found, ids in zip(documents, expected, strict=True):
            assert found.tobytes() == ids.tobytes() and (ids[0], ids[-1]) == (1, 2)
    assert documents[-1].tobytes() == expected[-1].tobytes()
    with pytest.raises(IndexError):
        documents[len(documents)]


@given(st.data())
def test_spans_are_those_of_the_stream(stored, documents, data):
    stream = np.concatenate(stored)
    spans = data.draw(
        st.lists(st.tuples(st.integers(0, len(stream) - 1), st.integers(1, 300)), max_size=5)
    )
    begin = np.array([b for b, _ in spans], int)
    size = np.minimum(np.array([n for _, n in spans], int), len(stream) - begin)
    expected = [stream[b : b + n] for b, n in zip(begin, size, strict=True)]
    found = documents.read(begin, size)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, np.concatenate([stream[:0], *expected]))


def test_a_span_of_a_book_reads_the_records_it_touches_and_no_other(documents, monkeypatch):
    read = []
    fetch = documents._records.records
    monkeypatch.setattr(documents._records, "records", lambda n: read.append(n) or fetch(n))
    book = documents.starts[documents.lengths.argmax()]
    first = -(-book // RECORD)  # the first record that begins in the book
    documents.read(np.array([first * RECORD + 5, first * RECORD]), np.array([RECORD, RECORD]))
    assert read == [[first, first + 1]]
