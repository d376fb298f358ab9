"""Tokens as text: shown on one line whatever they are, and joined to words as they should be."""

import dataclasses
import importlib.util

import numpy as np

from moepp_jax.analysis import words
from moepp_jax.analysis.record import Record
from tests.analysis import made_up


def record_of(pieces, document=None, special=()):
    """One token of each of these pieces, in this order."""
    T = len(pieces)
    meta = made_up.meta(
        pieces=tuple(piece.encode().decode("latin-1") for piece in pieces),
        special={number: f"<{number}>" for number in special},
        layers=(1,),
    )
    rows = made_up.record(T, layers=(1,)).rows
    document = np.zeros(T) if document is None else document
    return Record(
        meta, rows._replace(token=np.arange(T, dtype=np.int32), document=np.array(document))
    )


def forms(spelling):
    return [words.FORMS[form] for form in spelling.form]


def units(spelling):
    return [spelling.units[unit] if unit >= 0 else None for unit in spelling.unit]


def test_words_and_their_parts():
    pieces = ["the", " ho", "use", ".", " It", " is", " 4", "2", "\n", " x-", "ray"]
    spelling = words.spell(record_of(pieces))
    assert spelling.units == ["the", "house", ".", "It", "is", "42", "x", "-", "ray"]
    assert forms(spelling) == [
        *("word", "fragment", "fragment", "punctuation", "word", "word"),
        *("number", "number", "white space", "fragment", "word"),
    ]
    assert units(spelling) == ["the", None, None, ".", "It", "is", *[None] * 4, "ray"]


def test_words_end_with_documents_and_special_tokens():
    pieces = ["hou", "se", "the", "n", "", "ever"]
    spelling = words.spell(record_of(pieces, document=[0, 1, 1, 2, 2, 2], special=[4]))
    assert spelling.units == ["hou", "sethe", "n", "ever"]
    assert units(spelling) == ["hou", None, None, "n", None, "ever"]
    assert forms(spelling)[4] == "special"


def test_contractions_are_cut_as_taggers_know_them():
    spelling = words.spell(
        record_of(["do", "n't", " house", "'s", " ca", "n\u2019t", " can", "'t"])
    )
    assert spelling.units == ["do", "n't", "house", "'s", "ca", "n\u2019t", "ca", "n't"]
    assert units(spelling)[:4] == ["do", "n't", "house", "'s"]
    assert units(spelling)[6:] == [None, None]


def test_characters_of_several_bytes_and_halves_of_them():
    one = record_of([" été", " caf", "é", "x", "中"])
    halves = list(one.meta.pieces)
    halves[2], halves[3] = "\xc3", "\xa9"  # one é in two tokens
    cut = Record(dataclasses.replace(one.meta, pieces=tuple(halves)), one.rows)
    assert words.spell(one).units == ["été", "caféx中"]
    assert words.spell(cut).units == ["été", "café中"]
    assert units(words.spell(cut)) == ["été", *[None] * 4]
    assert forms(words.spell(cut)) == ["word", *["fragment"] * 4]
    assert [words.shown(cut, token) for token in (0, 2)] == ["␣été", "\\xc3"]


def test_a_byte_that_is_no_character_is_one_byte():
    record = record_of(["x", "the", " of"])
    meta = dataclasses.replace(record.meta, pieces=("\xff", " the", " of"))
    spelling = words.spell(Record(meta, record.rows))
    assert forms(spelling) == ["fragment", "word", "word"]
    assert units(spelling)[1:] == ["the", "of"]


def test_only_chosen_tokens_are_read():
    record = record_of(["a", " b", " c", " d"])
    assert words.spell(record, np.array([0, 1, 3])).units == ["a", "b", "d"]
    assert words.spell(record, slice(0, 0)).units == []


def test_what_is_shown_is_on_one_line():
    record = record_of(["\n", "\t", "\x1b[0m", "\u2028", "|", "<script>", "‮", ""], special=[7])
    shown = [words.shown(record, token) for token in range(8)]
    assert shown == ["⏎", "⇥", "\\x1b[0m", "\\u2028", "|", "<script>", "\\u202e", "<7>"]
    assert all(text.isprintable() for text in shown)


def test_context_stays_in_its_document():
    record = record_of(["a", " b", " c", " d", "\ne"], document=[0, 1, 1, 1, 1])
    assert words.context(record, 2) == "b »c« d⏎e"
    assert words.context(record, 3, around=1) == "c »d«⏎e"
    assert words.context(record, 1) == "»b« c d⏎e"


def test_parts_of_speech():
    units = ["the", "green", "house", "ran", "quickly", ".", "did", "n't", "/", "go"]
    parts = words.parts_of_speech(units)
    assert len(parts) == len(units)
    assert parts[:5] == ["determiner", "adjective", "noun", "verb", "adverb"]
    assert parts[6] == "verb"
    assert words.parts_of_speech([]) == []


def test_without_the_tagger(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not words.can_tag()
