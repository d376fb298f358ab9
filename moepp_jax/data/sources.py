"""Where text comes from: local files, or the default corpus of three pinned packages.

Both are a `Corpus`, and the rest of the package knows no more of them than that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from moepp_jax.config import ConfigError
from moepp_jax.data.storage import file_sha256, fingerprint

Report = Callable[[str], None]

# Characters that a text is cut into documents of, at least.
DOCUMENT_SIZE = 2000


class Document(NamedTuple):
    id: str  # unique in its corpus
    source: str  # where the text is from, the domain of a mixture
    text: str  # without surrounding white space, never empty


@runtime_checkable
class Corpus(Protocol):
    name: str
    fingerprint: str  # covers the text
    description: str
    citation: str

    def fetch(self, report: Report) -> None:
        """Brings the text here if it is not; only what prepares the text calls it."""

    def documents(self) -> Iterator[Document]:
        """The documents, in the same order every time."""


class LocalCorpus:
    """A folder of *.txt files, one document a file; or one file, cut into documents.

    A single file is cut at blank lines into runs of paragraphs of about 2,000 characters, because a
    held-out split needs more than one document. Files are UTF-8.
    """

    citation = "Local text files."

    def __init__(self, path: Path):
        field = f"config.data.corpus = {str(path)!r}"
        if not path.exists():
            raise ConfigError(
                f"{field} does not exist: name a text file, a folder of *.txt files or 'default'"
            )
        self.name = str(path)
        self._cut = not path.is_dir()
        self._files = [path] if self._cut else sorted(path.glob("*.txt"))
        if not self._files:
            raise ConfigError(f"{field} is a folder without a *.txt file")
        self.description = f"Local text: {', '.join(f.name for f in self._files[:10])}."
        self.fingerprint = fingerprint(
            self._cut, [(file.name, file_sha256(file)) for file in self._files]
        )

    def fetch(self, report: Report) -> None:
        """Local files are here already."""

    def documents(self) -> Iterator[Document]:
        """
        Raises:
          ConfigError: a file is empty or not UTF-8.
        """
        for file in self._files:
            text = _read_utf8(file)
            if self._cut:
                yield from numbered(file.name, file.stem, paragraphs(text))
            else:
                yield Document(file.name, file.stem, text.strip())


def _read_utf8(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x} "
            f"({error.reason}); convert the file to UTF-8"
        ) from None
    if not text.strip():
        raise ConfigError(f"{file} is empty: remove it from config.data.corpus or fill it")
    return text


def paragraphs(text: str) -> Iterator[str]:
    """Runs of whole paragraphs of about `DOCUMENT_SIZE` characters."""
    return grouped(re.split(r"(?<=\n)(?=[ \t]*\r?\n)", text))


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
