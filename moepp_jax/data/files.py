"""Text, JSON-lines and Parquet files on local disks as a corpus."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from moepp_jax.data import readers
from moepp_jax.data.sources import Document, Report
from moepp_jax.data.storage import fingerprint
from moepp_jax.errors import ConfigError

# Raise it when the same files would give other documents.
_READER_VERSION = 1

# What of a folder is text, with the compressed forms of the first two.
_PATTERNS = ("*.txt", "*.jsonl", "*.json", "*.ndjson", "*.parquet")

# Bytes of files, as they are stored, that one part reads: this many at least, and more where the
# corpus would be more than so many parts. A part becomes one file of the data set, which readers
# keep open; and what a killed process did of a part is lost.
_PART_BYTES = 64_000_000
_MAX_PARTS = 512

# Bytes at the start, in the middle and at the end of a file that its fingerprint covers.
_SAMPLE = 65_536


@dataclasses.dataclass(frozen=True)
class FilesPart:
    """Files, or pieces of them, that one process reads."""

    pieces: tuple[readers.Piece, ...]
    field: str
    cut: bool

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
            for key, text, read in readers.texts(piece, self.field, self.cut):
                yield Document(f"{piece.name}{key}", source, text, before + read)
            before += piece.size


class FilesCorpus:
    """A file, a folder or a pattern of files.

    Of JSON lines (.jsonl, .json) and Parquet, each record is a document; of text, each file. One
    single text file is cut at blank lines into runs of paragraphs of about 2,000 characters,
    because a held-out split needs more than one document. Files are UTF-8; text and JSON may be
    compressed (.gz, .zst).

    Args:
      path: a folder is searched with the folders in it, hidden ones excepted; a pattern as of
        `glob`, where ** stands for any folders.
      field: of the configuration, for messages.
      text_field: of a JSON or Parquet record: the text.
    """

    citation = "Local files."

    def __init__(self, path: str, field: str = "the path", text_field: str = "text"):
        self.name = path
        self._files = _find(path, field)
        self._text_field = text_field
        self._cut = Path(path).is_file()
        self.description = f"Local files: {', '.join(list(self._files)[:10])}."
        self.fingerprint = fingerprint(
            _READER_VERSION,
            [self._cut, text_field, _MAX_PARTS, _PART_BYTES],
            list(self._files),
            _samples(list(self._files.values())),
        )

    def fetch(self, report: Report) -> None:
        """Local files are here already."""

    def parts(self) -> list[FilesPart]:
        total = sum(file.stat().st_size for file in self._files.values())
        target = max(_PART_BYTES, total // _MAX_PARTS)
        groups: list[list[readers.Piece]] = [[]]
        for name, file in self._files.items():
            for piece in readers.pieces(file, name, target):
                if groups[-1] and sum(p.size for p in groups[-1]) + piece.size > 1.5 * target:
                    groups.append([])
                groups[-1].append(piece)
        return [FilesPart(tuple(group), self._text_field, self._cut) for group in groups]


def _find(path: str, field: str) -> dict[str, Path]:
    """The files by their name in the corpus, in the order of these names."""
    if Path(path).is_file():
        return {Path(path).name: Path(path)}
    if Path(path).is_dir():
        found, root = _in_folder(path, field), path
    elif files := [Path(f) for f in glob.glob(path, recursive=True) if os.path.isfile(f)]:
        found, root = files, os.path.commonpath([file.parent for file in files])
    else:
        raise ConfigError(
            f"{field} does not exist: name a text, JSON-lines or Parquet file, a folder or a "
            "pattern (*) of them, a TFDS data set (tfds:NAME, or its folder) or 'default'"
        )
    return dict(sorted((file.relative_to(root).as_posix(), file) for file in found))


def _in_folder(path: str, field: str) -> list[Path]:
    found: dict[str, list[Path]] = {}
    for root, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(root) / name for name in names):
            plain = file.with_suffix("") if file.suffix in readers.COMPRESSED else file
            if any(plain.match(pattern) for pattern in _PATTERNS):
                found.setdefault(readers.kind(file), []).append(file)
    if not found:
        raise ConfigError(
            f"{field} is a folder without text: there is no {', '.join(_PATTERNS)} (or .gz, .zst) "
            f"in it; for files of other names give a pattern, as {path}/**/*.py"
        )
    if len(found) > 1:
        examples = ", ".join(str(files[0]) for files in found.values())
        raise ConfigError(
            f"{field} is a folder of several kinds of files ({examples}): give a pattern of those "
            f"that are meant, as {path}/**/*.{'parquet' if 'parquet' in found else 'jsonl'}"
        )
    [files] = found.values()
    return files


def _samples(files: list[Path]) -> list[tuple[int, str]]:
    """Size, and a hash of the start, the middle and the end, of each file.

    Terabytes are not read before a run; an edit elsewhere that keeps the size goes unnoticed.
    """

    def sample(file: Path) -> tuple[int, str]:
        size = file.stat().st_size
        seen = hashlib.sha256()
        with file.open("rb") as stream:
            if size <= 3 * _SAMPLE:
                seen.update(stream.read())
            else:
                for start in (0, (size - _SAMPLE) // 2, size - _SAMPLE):
                    stream.seek(start)
                    seen.update(stream.read(_SAMPLE))
        return size, seen.hexdigest()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(sample, files))
