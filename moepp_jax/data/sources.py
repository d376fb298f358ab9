"""What a source of text is to the rest of the package: a corpus, cut into parts, of documents."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

Report = Callable[[str], None]

# Characters that a text is cut into documents of, at least.
DOCUMENT_SIZE = 2000


class Document(NamedTuple):
    id: str  # unique in its corpus
    source: str  # where the text is from: a file, a domain
    text: str  # without surrounding white space; may be empty
    read: int = 0  # bytes of its part that have been read so far, as they are stored
    split: str | None = None  # None where the hash of its text is to choose


@runtime_checkable
class Part(Protocol):
    """A share of a corpus that one process reads on its own, however many there are.

    Attributes:
      name: unique in the corpus.
      num_bytes: of the text as it is stored.
    """

    name: str
    num_bytes: int

    def documents(self) -> Iterator[Document]:
        """The documents, in the same order every time.

        Raises:
          ConfigError: a record cannot be used; the message names the file and the record.
        """


@runtime_checkable
class Corpus(Protocol):
    """
    Attributes:
      name: for messages.
      fingerprint: covers the text and what is made of it.
      notes: what of the source is not read, or is not trained on, in words.
      description, citation: for the metadata of the text data set.
    """

    name: str
    fingerprint: str
    notes: Sequence[str]
    description: str
    citation: str

    def fetch(self, report: Report) -> None:
        """Brings the text here if it is not; only what prepares the text calls it."""

    def parts(self) -> Sequence[Part]:
        """The whole corpus, cut in the same way every time."""


def paragraphs(lines: Iterable[str], longest: int) -> Iterator[str]:
    """Runs of whole paragraphs of about `DOCUMENT_SIZE` characters, from the lines of a text.

    Args:
      longest: a paragraph of more characters is cut before a line.
    """
    return grouped(_split_at_blank_lines(lines, longest))


def _split_at_blank_lines(lines: Iterable[str], longest: int) -> Iterator[str]:
    paragraph: list[str] = []
    size = 0
    for line in lines:
        blank = re.fullmatch(r"[ \t]*\r?\n", line)
        if paragraph and (blank or size + len(line) > longest):
            yield "".join(paragraph)
            paragraph, size = [], 0
        paragraph.append(line)
        size += len(line)
    yield "".join(paragraph)


def grouped(pieces: Iterable[str]) -> Iterator[str]:
    """Consecutive pieces joined until they have `DOCUMENT_SIZE` characters."""
    run = ""
    for piece in pieces:
        run += piece
        if len(run) >= DOCUMENT_SIZE:
            yield run
            run = ""
    if run:
        yield run


def numbered(name: str, source: str, texts: Iterable[str]) -> Iterator[Document]:
    """The texts that are more than white space, as documents `name/0`, `name/1`, ..."""
    stripped = filter(None, map(str.strip, texts))
    return (Document(f"{name}/{i}", source, text) for i, text in enumerate(stripped))
