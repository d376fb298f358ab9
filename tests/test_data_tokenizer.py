"""The tokenizer loses nothing, has the released ids, and says what vocabulary a text allows."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from moepp_jax.data.tokenizer import Tokenizer
from moepp_jax.errors import ConfigError

TEXTS = [file.read_text() for file in sorted((Path(__file__).parent / "data/text").glob("*.txt"))]


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=500)


@given(st.text())
@example("a\n\nb\n")
@example("  two  spaces \t\r\n")
@example("\N{LOWER ONE EIGHTH BLOCK}a \N{LOWER ONE EIGHTH BLOCK}")
@example("<s></s><unk><pad><0x41>\0")
@example("\ufeff\u200b🙂 é e\u0301")
def test_every_string_comes_back(text):
    ids = tokenizer().encode(text)
    assert tokenizer().decode(ids) == text
    assert all(3 < i < 500 for i in ids)


def test_text_of_the_corpus_comes_back_shorter_than_its_bytes():
    batch = tokenizer().encode_batch(TEXTS)
    assert [tokenizer().decode(ids) for ids in batch] == TEXTS
    assert batch == [tokenizer().encode(text) for text in TEXTS]
    assert sum(map(len, batch)) < 0.6 * sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("name", ["trained", "llama"])
def test_a_long_text_is_encoded_in_pieces_to_the_same_ids(name, llama, monkeypatch):
    t = tokenizer() if name == "trained" else llama
    texts = ["short", " ".join(TEXTS), "", "a  b   c" * 99, " ".join(TEXTS[:3])]
    whole = t.encode_batch(texts)
    monkeypatch.setattr("moepp_jax.data.sentencepiece_file._PIECE", 200)
    assert len(t._file._pieces(texts[1])) > 20
    assert t.encode_batch(texts, threads=1) == whole
    without_spaces = "x" * 999
    assert t.decode(t.encode(without_spaces)).replace(" ", "") == without_spaces


def test_specials_have_the_released_ids_and_no_text():
    t = tokenizer()
    assert (t.pad_id, t.bos_id, t.eos_id, t.vocab_size) == (0, 1, 2, 500)
    ids = np.array([1, *t.encode("so it goes"), 2, 0, 0])
    assert t.decode(ids) == "so it goes"


def test_the_same_text_gives_the_same_tokenizer_and_another_another():
    again = Tokenizer.train(iter(TEXTS), vocab_size=500)
    assert again.fingerprint == tokenizer().fingerprint
    assert Tokenizer.train(TEXTS[:6], vocab_size=500).fingerprint != tokenizer().fingerprint


def test_saved_and_loaded_it_is_the_same(tmp_path):
    file = tmp_path / "new" / "t.model"
    tokenizer().save(file)
    tokenizer().save(file)
    loaded = Tokenizer.load(file)
    assert loaded.fingerprint == tokenizer().fingerprint
    assert loaded.encode(TEXTS[0]) == tokenizer().encode(TEXTS[0])
    assert [path.name for path in file.parent.iterdir()] == ["t.model"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Tokenizer:
    """A model with the settings of LLaMA's: it puts a space before every text."""
    tmp_path = tmp_path_factory.mktemp("llama")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "llama"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return Tokenizer.load(tmp_path / "llama.model")


def test_a_model_without_a_padding_piece_pads_with_id_0(llama):
    assert (llama.pad_id, llama.bos_id, llama.eos_id) == (0, 1, 2)
    assert llama.decode([1, *llama.encode("so it goes"), 2, 0]) == "so it goes"


def test_too_large_a_vocabulary_names_the_largest_that_works():
    with pytest.raises(ConfigError, match=r"config.model.vocab_size = 9999 is more than") as caught:
        Tokenizer.train(TEXTS, vocab_size=9999)
    most = int(re.search(r"at most (\d+)", str(caught.value))[1])
    assert Tokenizer.train(TEXTS, most).vocab_size == most
    with pytest.raises(ConfigError, match=f"at most {most} "):
        Tokenizer.train(TEXTS, most + 1)


def test_too_small_a_vocabulary_names_the_smallest_that_works():
    with pytest.raises(ConfigError, match=r"config.model.vocab_size = 64 is too small") as caught:
        Tokenizer.train(TEXTS, vocab_size=64)
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])
    assert Tokenizer.train(TEXTS, least).vocab_size == least
    with pytest.raises(ConfigError, match="too small"):
        Tokenizer.train(TEXTS, least - 1)


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_what_is_no_model_is_one_clear_error(tmp_path, content):
    file = tmp_path / "t.model"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"the tokenizer .*t\.model (cannot be read|is not a)"):
        Tokenizer.load(file)


@pytest.mark.parametrize("lacks", ["bos_id", "eos_id"])
def test_a_model_may_lack_bos_but_not_eos(tmp_path, lacks):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "t"),
        vocab_size=200,
        model_type="bpe",
        minloglevel=2,
        **{lacks: -1},
    )
    if lacks == "eos_id":
        with pytest.raises(ConfigError, match=r"t\.model lacks an EOS piece"):
            Tokenizer.load(tmp_path / "t.model")
        return
    t = Tokenizer.load(tmp_path / "t.model")
    ids = t.encode("so it goes")
    assert (t.bos_id, t.beginning, t.prefix_id) == (None, [], t.eos_id)
    assert t.document(ids) == [*ids, t.eos_id] and t.prompt("so it goes") == ids
    assert t.prompt("") == [t.eos_id]
