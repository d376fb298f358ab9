"""Text, JSON, Parquet and Arrow files on local disks as a corpus."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from moepp_jax.data import folders, opening, readers, splits
from moepp_jax.data.opening import kind
from moepp_jax.data.sources import Document, Report
from moepp_jax.data.storage import fingerprint
from moepp_jax.errors import ConfigError

# Raise it when the same files would give other documents.
_READER_VERSION = 1

# Bytes of files, as they are stored, that one part reads: this many at least, and more where the
# corpus would be more than so many parts. A part becomes one file of the data set, which readers
# keep open; and what a killed process did of a part is lost.
_PART_BYTES = 64_000_000
_MAX_PARTS = 512

# Tables whose rows are not told apart, whoever names them.
_TABLES = {".csv", ".tsv"}

# Bytes at the start, in the middle and at the end of a file that its fingerprint covers.
_SAMPLE = 65_536


@dataclasses.dataclass(frozen=True)
class FilesPart:
    """Files, or pieces of them, that one process reads."""

    pieces: tuple[readers.Piece, ...]
    field: str

    @property
    def name(self) -> str:
        first = self.pieces[0]
        return f"{first.name}@{first.start}"

    @property
    def num_bytes(self) -> int:
        return sum(piece.size for piece in self.pieces)

    def documents(self) -> Iterator[Document]:
        before = 0
        for piece in self.pieces:
            source = Path(piece.name).name.split(".")[0]
            for key, text, read in readers.texts(piece, self.field):
                yield Document(f"{piece.name}{key}", source, text, before + read, piece.split)
            before += piece.size


class FilesCorpus:
    """A file, a folder or a pattern of files.

    Of JSON, Parquet and Arrow, each record is a document; of text, each file. A text file that is
    the whole source, or a whole split of it, is cut at blank lines into runs of paragraphs of about
    2,000 characters, because a held-out split needs more than one document. Files are UTF-8; text
    and JSON may be compressed.

    Where the files' names say splits (`splits.of_files`), those of the test split are not read, and
    those of the validation split are held out.

    Args:
      path: a folder is searched with the folders in it, hidden ones excepted; a pattern as of
        `glob`, where ** stands for any folders.
      field: of the configuration, for messages.
      text_field: of a record: the text.
    """

    citation = "Local files."

    def __init__(self, path: str, field: str = "the path", text_field: str = "text"):
        self.name = path
        found = folders.find(path, field)
        self._splits = splits.of_files(found.files, found.declared)
        self._files = {
            name: file
            for name, file in found.files.items()
            if self._splits.get(name) != splits.TEST
        }
        self._counts = collections.Counter(map(self._splits.get, self._files))
        self._text_field = text_field
        self._cut = Path(path).is_file()
        self._check(field)
        self.description = f"Local files: {', '.join(list(self._files)[:10])}."
        self.notes = [
            *_split_notes(found.files, self._splits),
            *_table_notes(self._files),
            *found.notes(),
        ]
        self.fingerprint = fingerprint(
            _READER_VERSION,
            [self._cut, text_field, _MAX_PARTS, _PART_BYTES],
            list(self._files),
            _samples(list(self._files.values())),
            *self._not_of_first_version(),
        )

    def _check(self, field: str) -> None:
        if self._counts[splits.VALIDATION] == len(self._files):
            named = ", ".join(sorted(set(self._splits.values())))
            raise ConfigError(
                f"{field} holds nothing to train on, only files of the splits {named}: give the "
                "file or folder of the split that is meant by itself"
            )
        kinds = {kind(file): file for file in reversed(self._files.values())}
        if len(kinds) > 1 and Path(self.name).is_dir():
            raise ConfigError(
                f"{field} is a folder of several kinds of files "
                f"({', '.join(map(str, kinds.values()))}): give a pattern of those that are meant, "
                f"as {self.name}/**/*.{'parquet' if 'parquet' in kinds else 'jsonl'}"
            )

    def _not_of_first_version(self) -> list[Any]:
        """What version 1 of the reader made something else of; nothing, where it did not."""
        with concurrent.futures.ThreadPoolExecutor() as pool:
            other = pool.map(_reads_otherwise, self._files.values())
            names = [name for name, o in zip(self._files, other, strict=True) if o]
        of_split = {name: self._splits.get(name) for name in self._files} if self._splits else {}
        return [what for what in (names, sorted(of_split.items(), key=str)) if what]

    def fetch(self, report: Report) -> None:
        """Local files are here already."""

    def parts(self) -> list[FilesPart]:
        total = sum(file.stat().st_size for file in self._files.values())
        target = max(_PART_BYTES, total // _MAX_PARTS)
        groups: list[list[readers.Piece]] = [[]]
        for name, file in self._files.items():
            for piece in readers.pieces(file, name, target, self._is_cut(name), self._split(name)):
                if groups[-1] and sum(p.size for p in groups[-1]) + piece.size > 1.5 * target:
                    groups.append([])
                groups[-1].append(piece)
        return [FilesPart(tuple(group), self._text_field) for group in groups]

    def _is_cut(self, name: str) -> bool:
        return self._cut or (name in self._splits and self._counts[self._splits[name]] == 1)

    def _split(self, name: str) -> str | None:
        """The split of the file's documents; their hashes choose where none is held out by name."""
        if not self._counts[splits.VALIDATION]:
            return None
        return self._splits.get(name, splits.TRAIN)


def _split_notes(files: dict[str, Path], chosen: dict[str, str]) -> list[str]:
    notes = []
    if chosen:
        of = collections.defaultdict(list)
        for name in files:
            of[chosen.get(name)].append(name)
        said = {
            splits.TRAIN: "trained on",
            splits.VALIDATION: "held out, in place of config.data.eval_fraction",
            splits.TEST: "not read",
        }
        told = [
            f"{split}, {len(of[split]):,} ({folders.examples(of[split])}), {done}"
            for split, done in said.items()
            if of[split]
        ]
        if of[None]:
            told.append(f"none, {len(of[None]):,} ({folders.examples(of[None])}), trained on")
        notes.append(f"splits by the files' names: {'; '.join(told)}")
    if alone := splits.accidental(files, chosen):
        notes.append(
            f"trained on though named as a split, for no name beside it says another one: "
            f"{len(alone):,} ({folders.examples(alone)})"
        )
    return notes


def _table_notes(files: Iterable[str]) -> list[str]:
    tables = [name for name in files if opening.ending(name).lower() in _TABLES]
    if not tables:
        return []
    return [
        f"read as plain text, not row by row: {len(tables):,} ({folders.examples(tables)}); for a "
        "document a row make it JSON lines or Parquet"
    ]


def _reads_otherwise(file: Path) -> bool:
    """Whether version 1 of the reader took capitals in its name, or a mark before it, as text."""
    if kind(file) == "text":
        return opening.begins_with_mark(file)
    return opening.ending(file.name) != opening.ending(file.name).lower()


def _samples(files: list[Path]) -> list[tuple[int, str]]:
    """Size, and a hash of the start, the middle and the end, of each file.

    Terabytes are not read before a run; an edit elsewhere that keeps the size goes unnoticed.
    """

    def sample(file: Path) -> tuple[int, str]:
        try:
            size = file.stat().st_size
            with file.open("rb") as stream:
                return size, _sampled(stream, size)
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}") from None

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(sample, files))


def _sampled(stream: BufferedIOBase, size: int) -> str:
    seen = hashlib.sha256()
    if size <= 3 * _SAMPLE:
        seen.update(stream.read())
    else:
        for start in (0, (size - _SAMPLE) // 2, size - _SAMPLE):
            stream.seek(start)
            seen.update(stream.read(_SAMPLE))
    return seen.hexdigest()
