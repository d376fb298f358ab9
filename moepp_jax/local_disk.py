"""Copies of a run's state on a disk of this host: whole ones with sums, or none.

FOLDER/process-N/STEP has of each cell (`cells`) its bytes, CELL/arrays, their sums in
checksums.json, and in copy.json what else must be known of the copy. It is written beside, brought
to the disk and renamed, so that a copy which has its name is whole. Several processes may share the
disk: each writes under its own number and reads what any has left, as the number of a host may
change from start to start.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moepp_jax import checksums, regular, seal
from moepp_jax.storage import write_atomic

_NOTE = "copy.json"
_ARRAYS = "arrays"


class Copy(NamedTuple):
    """What one process has left of a step.

    Attributes:
      note: of what it is, as it was given to `write`; empty if that is damaged.
    """

    folder: Path
    step: int
    note: Mapping[str, Any]

    def cells(self) -> set[int]:
        return {int(entry.name) for entry in self.folder.iterdir() if entry.name.isdigit()}

    def damage(self, cell: int) -> str | None:
        """What is wrong with the bytes of a cell, in words."""
        found = checksums.verdict(self.folder, {str(cell)}, {str(cell)})
        said = found.damage or found.doubt
        return f"{self.folder}: {said}" if said else None

    def read(self, cell: int) -> np.ndarray:
        """The bytes (uint8) of a cell."""
        return np.fromfile(self.folder / str(cell) / _ARRAYS, np.uint8)


class Disk:
    """The copies of one run on this host's disk.

    Args:
      folder: of this run alone.
      process: the number that this process writes under.

    Raises:
      OSError: here and elsewhere: the folder cannot be written or read.
    """

    def __init__(self, folder: Path, process: int):
        self._folder, self._own = folder, folder / f"process-{process}"
        self._own.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self._own).close()  # or the first copy would find out

    def __str__(self) -> str:
        return str(self._folder)

    def copies(self) -> list[Copy]:
        """All there are, of any process, this one's first."""
        own_first = sorted(self._folder.glob("process-*"), key=lambda f: (f != self._own, f.name))
        folders = [entry for of_one in own_first for entry in _entries(of_one)]
        return [Copy(f, int(f.name), _note(f / _NOTE)) for f in folders if f.name.isdigit()]

    def write(
        self, step: int, cells: Mapping[int, list[np.ndarray]], note: Mapping[str, Any]
    ) -> None:
        """Writes this process's copy of a step; what is there of it goes."""
        half, whole = self._own / f".{step}.tmp", self._own / str(step)
        try:
            for folder in (half, whole):
                shutil.rmtree(folder, ignore_errors=True)
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda of: _write(half / str(of[0]), of[1]), cells.items()))
            checksums.write(half, map(str, cells))
            (half / _NOTE).write_text(seal.sealed(note), encoding="utf-8")
            for path in (*half.iterdir(), half):
                _sync(path)
            half.rename(whole)
            _sync(self._own)
        except OSError:
            shutil.rmtree(half, ignore_errors=True)
            raise

    def keep_only(self, kept: Collection[Copy], **noted: Any) -> None:
        """Notes something of these copies; all others, and what is left of half ones, go."""
        for copy in kept:
            write_atomic(copy.folder / _NOTE, seal.sealed(dict(copy.note) | noted))
        folders = {copy.folder for copy in kept}
        for folder in (*(copy.folder for copy in self.copies()), *self._own.glob(".*.tmp")):
            if folder not in folders:
                shutil.rmtree(folder, ignore_errors=True)

    def prune(self, whole: int, own: int) -> None:
        """Removes copies that nobody needs any more.

        Args:
          whole: the newest step of which all processes have written their copy.
          own: that of which this one has.
        """
        for copy in self.copies():
            mine = copy.folder.parent == self._own
            if copy.step < whole or (mine and copy.step not in (whole, own)):
                shutil.rmtree(copy.folder, ignore_errors=True)

    def clear(self) -> None:
        """Removes all copies, of which none is needed any more."""
        for copy in self.copies():
            shutil.rmtree(copy.folder, ignore_errors=True)
        shutil.rmtree(self._own, ignore_errors=True)
        for folder in (*self._folder.glob("process-*"), self._folder):
            with contextlib.suppress(OSError):  # it is not empty, or gone
                folder.rmdir()


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # another process has removed it
        return []


def _note(file: Path) -> dict[str, Any]:
    """What a file says; nothing if it does not say what it was given."""
    try:
        read = regular.read_json(file)
        return seal.opened(read) if seal.CHECKSUM in read else {}
    except (OSError, ValueError, TypeError):
        return {}


def _write(folder: Path, arrays: Iterable[np.ndarray]) -> None:
    folder.mkdir(parents=True)
    with (folder / _ARRAYS).open("wb") as file:
        for array in arrays:
            file.write(array.data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
