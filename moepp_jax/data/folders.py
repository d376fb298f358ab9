"""What a source's path names: the files that are read, and what beside them is not."""

from __future__ import annotations

import collections
import dataclasses
import glob
import os
from collections.abc import Iterable
from pathlib import Path

from moepp_jax import regular
from moepp_jax.data import arrow_files
from moepp_jax.data.opening import COMPRESSED, KINDS, ending, of_text
from moepp_jax.data.splits import Folder
from moepp_jax.errors import ConfigError

# Kinds of what is not read, and examples of each, that a note names.
_NAMED, _EXAMPLES = 8, 3

_UNNAMED = ".arrow that no saved data set names"


@dataclasses.dataclass
class Found:
    """Of a path.

    Attributes:
      files: by their names in the corpus, in the order of these.
      unread: files that are not read, by what kind they are of.
      declared: folders of the corpus whose folders are the splits of a saved data set.
    """

    files: dict[str, Path]
    unread: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    declared: set[Folder] = dataclasses.field(default_factory=set)

    def notes(self) -> list[str]:
        if not self.unread:
            return []
        kinds = sorted(self.unread.items(), key=lambda item: (-len(item[1]), item[0]))
        said = [f"{of}, {len(names):,} ({examples(names)})" for of, names in kinds[:_NAMED]]
        if rest := kinds[_NAMED:]:
            said.append(f"other kinds, {sum(len(names) for _, names in rest):,}")
        return [f"not read: {'; '.join(said)}"]


def examples(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:_EXAMPLES]) + (", ..." if len(names) > _EXAMPLES else "")


def find(path: str, field: str) -> Found:
    """
    Args:
      path: a file, a folder, or a pattern of files.
      field: of the configuration, for messages.

    Raises:
      ConfigError: there is nothing to read, or something that cannot be.
    """
    if Path(path).is_file():
        return Found({Path(path).name: Path(path)})
    if Path(path).is_dir():
        return _in_folder(Path(path), field)
    if os.path.lexists(path):
        raise _irregular(Path(path), field)
    matches = [Path(match) for match in glob.glob(path, recursive=True)]
    files = [match for match in matches if not os.path.isdir(match)]
    if not files:
        raise ConfigError(
            f"{field} does not exist: name a text, JSON-lines, Parquet or Arrow file, a folder or "
            "a pattern (*) of them, a TFDS data set (tfds:NAME, or its folder) or 'default'"
        )
    for file in files:
        if not os.path.isfile(file):
            raise _irregular(file, field)
    return Found(_named(files, Path(os.path.commonpath([file.parent for file in files]))))


def _named(files: Iterable[Path], root: Path) -> dict[str, Path]:
    return dict(sorted((file.relative_to(root).as_posix(), file) for file in files))


def _irregular(file: Path, field: str) -> ConfigError:
    return ConfigError(
        f"{field}: {file} is {_what(file)}, and only regular files are read: take it away, or give "
        "a pattern without it"
    )


def _what(file: Path) -> str:
    try:
        mode = file.stat().st_mode
    except OSError as error:
        return f"{'a link to nothing' if file.is_symlink() else 'out of reach'} ({error.strerror})"
    return regular.kind(mode)


def _in_folder(root: Path, field: str) -> Found:
    walk = _Walk(root, field)
    for folder, folders, names in os.walk(root, onerror=walk.refuse):
        walk.visit(Path(folder), folders, names)
    files = walk.text or walk.loose
    if walk.text and walk.loose:
        walk.leave(_UNNAMED, walk.loose)
    if not files:
        ends = ", ".join(f"*{suffix}" for suffix in KINDS)
        notes = "".join(f" ({note})" for note in Found({}, walk.unread).notes())
        raise ConfigError(
            f"{field} is a folder without text: there is no {ends} (or {', '.join(COMPRESSED)}) "
            f"in it{notes}; for files of other names give a pattern, as {root}/**/*.py"
        )
    return Found(_named(files, root), dict(walk.unread), walk.declared)


class _Walk:
    """Through a folder and those in it.

    Attributes:
      text: files to read.
      loose: *.arrow that no data set names; they are read where there is nothing else.
      unread, declared: as of `Found`.
    """

    def __init__(self, root: Path, field: str):
        self._root, self._field = root, field
        self.text: list[Path] = []
        self.loose: list[Path] = []
        self.unread: dict[str, list[str]] = collections.defaultdict(list)
        self.declared: set[Folder] = set()

    def visit(self, folder: Path, folders: list[str], names: list[str]) -> None:
        """Sorts what is in one folder; leaves those in `folders` that are to be visited."""
        hidden = [name for name in folders if name.startswith(".")]
        links = [n for n in folders if n not in hidden and (folder / n).is_symlink()]
        self.leave("hidden folders", (folder / name for name in hidden))
        self.leave("links to folders", (folder / name for name in links))
        folders[:] = [name for name in folders if name not in (*hidden, *links)]
        saved = arrow_files.saved(folder) if arrow_files.STATE in names else None
        about = {arrow_files.STATE} if saved is not None else set()
        if any(of_text(name) == "arrow" for name in names):
            about.add(arrow_files.INFO)
        if arrow_files.DICT in names and arrow_files.is_split(folder):
            self.declared.add(folder.relative_to(self._root).parts)
            about.add(arrow_files.DICT)
        for file in (folder / name for name in names):
            self._sort(file, saved, about)

    def _sort(self, file: Path, saved: set[str] | None, about: set[str]) -> None:
        if file.name in about:
            self.leave("descriptions of a saved data set", [file])
        elif of_text(file.name) is None:
            self.leave(_kind_of_unread(file), [file])
        elif not os.path.isfile(file):
            raise _irregular(file, self._field)
        elif of_text(file.name) != "arrow" or (saved and file.name in saved):
            self.text.append(file)
        elif saved is not None or file.name.startswith(arrow_files.CACHE):
            self.leave(_UNNAMED, [file])
        else:
            self.loose.append(file)

    def leave(self, of: str, files: Iterable[Path]) -> None:
        names = [file.relative_to(self._root).as_posix() for file in files]
        if names:
            self.unread[of] += names

    def refuse(self, error: OSError) -> None:
        raise ConfigError(
            f"{self._field}: the folder {error.filename} cannot be read: {error.strerror}"
        )


def _kind_of_unread(file: Path) -> str:
    if not os.path.isfile(file):
        return _what(file)
    said = ending(file.name).lower()
    return said or "without an ending"
