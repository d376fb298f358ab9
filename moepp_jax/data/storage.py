"""What every prepared thing shares: a name that covers its content, and an all-or-nothing write."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds


def fingerprint(*parts: Any) -> str:
    """Short hash of JSON-able values: part of the name of whatever was made from them."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(target: Path, make: Callable[[Path], None]) -> None:
    """Lets `make` write a file or folder at a temporary path, then renames it to `target`.

    The rename is atomic, so whatever has the name `target` is whole, even if a process is killed
    half-way (it leaves a hidden folder `.making-*`). Of two processes that make the same thing at
    once one copy stays: the names cover the content, so both are equal.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as temporary:
        made = Path(temporary) / target.name
        make(made)
        try:
            os.replace(made, target)
        except OSError:
            if not target.exists():
                raise


class ArrayRecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder that writes ArrayRecord files, downloads nothing and needs no TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, folder: Path):
        super().__init__(data_dir=os.fspath(folder), file_format="array_record")

    def write(self) -> None:
        tfds.disable_progress_bar()
        with tempfile.TemporaryDirectory() as unused, contextlib.redirect_stdout(io.StringIO()):
            self.download_and_prepare(
                download_dir=unused,
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )


class Split(Sequence):
    """The examples of one split that a builder of this kind wrote into a folder, by index."""

    def __init__(self, kind: type[ArrayRecordBuilder], folder: Path, split: str):
        builder = tfds.builder_from_directory(folder / kind.name / str(kind.VERSION))
        self._source = builder.as_data_source(split)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[index]

    def __iter__(self) -> Iterator:
        return map(self.__getitem__, range(len(self)))
