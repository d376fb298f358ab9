"""Text as it comes: whole characters only, joined it is the text, and it ends at a stop string."""

import functools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moepp_jax.data import Tokenizer
from moepp_jax.errors import ConfigError
from moepp_jax.generation import Reader
from tests import tiny


@functools.cache
def tokenizer():
    texts = [file.read_text() for file in sorted(tiny.TEXT.glob("*.txt"))]
    return Tokenizer.train(texts, 384)


class Llama(Tokenizer):
    """Drops the space that a text begins with, as tokenizers of the LLaMA family do."""

    pieces = (" a", "b", " ", "c ", "")

    def __init__(self):
        pass

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids).removeprefix(" ")


def pieces_of(ids, stop=(), prompt=()):
    reader = Reader(tokenizer(), prompt, stop)
    pieces = []
    for token in ids:
        ended = reader(token)
        pieces.append(reader.take())
        if ended:
            break
    reader.close()
    return [*pieces, reader.take()], reader


WORDS = ["The river", "naïve", "日本", "😀", "\n", "a", "\N{REPLACEMENT CHARACTER}", "stop"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(WORDS)))
def test_pieces_are_whole_characters_and_joined_are_the_text(words):
    text = "".join(words)
    pieces, reader = pieces_of(tokenizer().encode(text))
    assert "".join(pieces) == reader.text == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 383), max_size=20), st.lists(st.integers(0, 383), max_size=12))
def test_any_tokens_read_as_they_do_together(prompt, ids):
    decode = tokenizer().decode
    start = Reader(tokenizer(), prompt)._before
    # A character that the prompt begins and the text ends belongs to neither.
    assume(not decode(start).endswith("\N{REPLACEMENT CHARACTER}"))
    pieces, _ = pieces_of(ids, prompt=prompt)
    assert "".join(pieces) == decode([*start, *ids])[len(decode(start)) :]


def test_only_what_may_change_waits():
    pieces, _ = pieces_of(tokenizer().encode("The river 日 runs"))
    assert pieces[-1] == ""
    assert pieces.index("日") == 2 + pieces.index("")  # its first two bytes
    assert pieces.count("") == 3


@pytest.mark.parametrize("ids", [[0, 0, 1], [1, 0, 2, 0], [2, 2, 0], [3, 0, 4, 0]])
def test_a_space_in_the_text_is_not_that_of_its_beginning(ids):
    reader = Reader(Llama(), prompt=[1, 0])
    for token in ids:
        reader(token)
    assert reader.finished() == "".join(Llama.pieces[i] for i in ids)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("The river runs", ["river"], "The "),
        ("The river runs", ["runs", "river"], "The "),
        ("The river runs", ["the", "riverr"], "The river runs"),
        ("The river runs", ["T"], ""),
        ("The river runs", ["runs on"], "The river runs"),
        ("aab aaab", ["aaab"], "aab "),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("日本語", ["本"], "日"),
        ("The river", [], "The river"),
    ],
)
def test_a_stop_string_cuts_the_text(text, stop, expected):
    pieces, reader = pieces_of(tokenizer().encode(text), stop)
    assert reader.text == "".join(pieces) == expected
    assert reader.ended == (expected != text)
    # Nothing that is no text was handed out, not even for a moment.
    assert expected.startswith("".join(pieces[:3]))


@settings(max_examples=60, deadline=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_the_first_stop_string_that_is_complete_cuts(text, stop):
    _, reader = pieces_of(tokenizer().encode(text), stop)
    starts = [text.find(s) for s in stop if s in text]
    if not starts:
        assert (reader.text, reader.ended) == (text, False)
    else:
        assert reader.ended and reader.text == text[: len(reader.text)]
        assert (
            min(starts) <= len(reader.text) <= min(text.find(s) + len(s) for s in stop if s in text)
        )


def test_stop_strings_of_no_use():
    for stop in ([""], [3], ["a", None]):
        with pytest.raises(ConfigError, match=r"stop = .* must be a text of at least one"):
            Reader(tokenizer(), (), stop)
