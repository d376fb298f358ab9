"""Tokens as text: how they are shown, which of them are whole words, and of which kind."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moepp_jax.analysis.record import Record

NO_TAGGER = "The part-of-speech tagger is not installed: `pip install textblob`."
FORMS = ("word", "fragment", "number", "punctuation", "white space", "special")
_WORD, _FRAGMENT, _NUMBER, _PUNCTUATION, _SPACE, _SPECIAL = range(len(FORMS))
# As the Penn treebank cuts them: do n't, house 's. What is no character is no sign either.
_UNIT = re.compile(
    r"[^\W\d_]+?(?=n['\u2019]t\b)|n['\u2019]t\b|['\u2019](?:s|re|ve|ll|d|m)\b"
    r"|[^\W\d_]+|\d+|[^\w\s\udc80-\udcff]|_",
    re.IGNORECASE,
)
_SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
# Tags of the Penn treebank by their beginnings, the first that fits.
_PARTS = (
    ("NNP", "proper noun"),
    ("NN", "noun"),
    ("VB", "verb"),
    ("MD", "verb"),
    ("JJ", "adjective"),
    ("RB", "adverb"),
    ("WRB", "adverb"),
    ("PRP", "pronoun"),
    ("WP", "pronoun"),
    ("DT", "determiner"),
    ("PDT", "determiner"),
    ("WDT", "determiner"),
    ("IN", "preposition"),
    ("TO", "preposition"),
    ("CC", "conjunction"),
    ("CD", "number"),
)


def on_line(text: str) -> str:
    """On one line: line ends as ⏎, other characters that cannot be printed escaped."""
    return "".join(
        c if c.isprintable() else _SIGNS.get(c) or c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def shown(record: Record, token: int) -> str:
    """A token by itself, with nothing unseen: spaces as ␣, half characters as their bytes."""
    if token in record.meta.special:
        return on_line(record.meta.special[token])
    text = record.bytes_of(token).decode("utf-8", errors="backslashreplace")
    return on_line(text).replace(" ", _SIGNS[" "])


def context(record: Record, at: int, around: int = 8) -> str:
    """The text around a token of the record, which is marked, within its document."""
    document = record.rows.document
    before = slice(max(at - around, 0), at)
    after = slice(at + 1, at + 1 + around)

    def text(place: slice) -> str:
        tokens = record.rows.token[place][document[place] == document[at]]
        said = b"".join(record.bytes_of(int(token)) for token in tokens)
        return on_line(said.decode("utf-8", errors="replace"))

    token = int(record.rows.token[at])
    here = shown(record, token).replace(_SIGNS[" "], " ")
    bare = here.lstrip(" ")
    space = here[: len(here) - len(bare)]
    return f"{text(before)}{space}»{bare}«{text(after)}".strip()


class Spelling(NamedTuple):
    """T tokens as the words that they make up.

    Attributes:
      form: numbers in FORMS.
      unit: the number of the word, or sign, that a token is, white space aside; -1 if it is a part
        of one, or more.
      units: the words and signs, in their order.
    """

    form: np.ndarray  # [T]
    unit: np.ndarray  # [T]
    units: Sequence[str]


def spell(record: Record, tokens: np.ndarray | slice = slice(None)) -> Spelling:
    """The words of these tokens, all by default; their order must be that of the text."""
    token, document = record.rows.token[tokens], record.rows.document[tokens]
    pieces, forms, leading, trailing = _pieces(record)
    first = np.append(True, document[1:] != document[:-1]) if len(token) else np.zeros(0, bool)
    lengths = np.array([len(piece) for piece in pieces])[token] + first
    ends = np.cumsum(lengths)
    parts = [pieces[one] for one in token.tolist()]
    for at in np.flatnonzero(first).tolist():
        parts[at] = b"\n" + parts[at]
    text = b"".join(parts).decode("utf-8", errors="surrogateescape")
    found = list(_UNIT.finditer(text))
    edges = _byte_offsets(text)
    starts_of = edges[np.array([m.start() for m in found], np.int64)]
    ends_of = edges[np.array([m.end() for m in found], np.int64)]
    starts = ends - lengths + first + leading[token]
    at = np.minimum(np.searchsorted(starts_of, starts), max(len(found) - 1, 0))
    unit = np.full(len(token), -1)
    if found:
        whole = (starts_of[at] == starts) & (ends_of[at] == ends - trailing[token])
        unit[whole] = at[whole]
    form = forms[token]
    form = np.where((form == _FRAGMENT) & (unit >= 0), _WORD, form)
    return Spelling(form, unit, [m.group() for m in found])


def _pieces(record: Record) -> tuple[list[bytes], np.ndarray, np.ndarray, np.ndarray]:
    """By id: the bytes, the form if it is no whole word, white space before, and after."""
    pieces = [piece.encode("latin-1") for piece in record.meta.pieces]
    forms = np.array([_form(piece) for piece in pieces], np.int64)
    for token in record.meta.special:
        pieces[token], forms[token] = b"\n", _SPECIAL  # a word does not go on across it
    leading = np.array([len(piece) - len(piece.lstrip()) for piece in pieces], np.int64)
    trailing = np.array([len(piece) - len(piece.rstrip()) for piece in pieces], np.int64)
    return pieces, forms, leading, trailing


def _form(piece: bytes) -> int:
    text = piece.decode("utf-8", errors="surrogateescape")
    if not text:
        return _SPECIAL
    bare = text.strip()
    if not bare:
        return _SPACE
    if bare.isdecimal():
        return _NUMBER
    # Bytes of half a character may be of a letter.
    lettered = any(c.isalnum() or "\udc80" <= c <= "\udcff" for c in bare)
    return _FRAGMENT if lettered else _PUNCTUATION


def _byte_offsets(text: str) -> np.ndarray:
    """Where each character begins in UTF-8, and the end."""
    code = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    size = 1 + (code >= 0x80).astype(np.int64) + (code >= 0x800) + (code >= 0x10000)
    size[(code >= 0xDC80) & (code <= 0xDCFF)] = 1  # a byte that is no character
    return np.append(0, np.cumsum(size))


def can_tag() -> bool:
    """Whether the tagger is installed."""
    try:
        return importlib.util.find_spec("textblob") is not None
    except ValueError:  # what Python says of a module that was set to None
        return False


def parts_of_speech(units: Sequence[str]) -> list[str]:
    """Of each word or sign: noun, verb, ...; "other" where the tagger has another name.

    Raises:
      ImportError: textblob is not installed.
    """
    from textblob.en.taggers import PatternTagger

    tagger, parts = PatternTagger(), []
    for sentence in _sentences(units):
        # A slash would end the word, and other signs are not what is asked.
        words = [
            unit if unit[0].isalnum() or unit in ".,'!?" else _plain(unit) for unit in sentence
        ]
        tags = tagger.tag(" ".join(words), tokenize=False)
        aligned = len(tags) == len(words)
        parts += [_part(tag) for _, tag in tags] if aligned else ["other"] * len(words)
    return parts


def _plain(unit: str) -> str:
    """A clitic as the tagger knows it; any other sign as a dash."""
    return unit.replace("\u2019", "'") if len(unit) > 1 else "-"


def _sentences(units: Sequence[str]) -> list[list[str]]:
    sentences: list[list[str]] = [[]]
    for unit in units:
        sentences[-1].append(unit)
        if unit in (".", "!", "?"):
            sentences.append([])
    return [sentence for sentence in sentences if sentence]


def _part(tag: str) -> str:
    return next((part for start, part in _PARTS if tag.startswith(start)), "other")
