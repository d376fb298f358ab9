"""Data sets that TFDS has prepared, in a local folder or a bucket, as a corpus.

They are read, never downloaded: what is not there is an error that says how to make it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from moepp_jax import regular
from moepp_jax.data.sources import Document, Report
from moepp_jax.data.storage import DataError, fingerprint
from moepp_jax.errors import ConfigError
from moepp_jax.storage import AnyPath, is_local, open_path

_READER_VERSION = 1
_INFO, _FEATURES = "dataset_info.json", "features.json"
_CLASS = ("pythonClassName", "python_class_name", "type")
_OF_TFDS = "tensorflow_datasets."
_AHEAD = 256  # records that are read at once


@dataclasses.dataclass(frozen=True)
class TfdsPart:
    """One shard of a split."""

    folder: str
    split: str
    index: int
    field: str
    num_bytes: int
    assign: str | None  # the split that its documents are of; None where their hash chooses

    @property
    def name(self) -> str:
        return f"{self.split}-{self.index}"

    def documents(self) -> Iterator[Document]:
        info = tfds.builder_from_directory(self.folder).info
        split = info.splits[self.split]
        file, count = split.filepaths[self.index], split.shard_lengths[self.index]
        feature = info.features[self.field]
        alone = tfds.features.FeaturesDict({self.field: feature})
        try:
            with _on_disk(open_path(file)) as local:
                reader = ArrayRecordReader(str(local))
                for start in range(0, count, _AHEAD):
                    records = reader.read(start, min(start + _AHEAD, count))
                    for i, record in enumerate(records, start):
                        text = alone.deserialize_example_np(record)[self.field]
                        read = self.num_bytes * (i + 1) // count
                        where = f"{file}, record {i}"
                        text = _text(text, where)
                        yield Document(f"{self.name}:{i}", info.name, text, read, self.assign)
        except (RuntimeError, OSError, IndexError) as error:
            raise DataError(f"{file} cannot be read: {error}") from error


def _text(value: Any, where: str) -> str:
    try:
        return bytes(value).decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8: {error}") from None


@contextlib.contextmanager
def _on_disk(file: AnyPath) -> Iterator[AnyPath]:
    """A copy of what is in a bucket: ArrayRecord reads local files."""
    if is_local(file):
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / file.name
        file.copy(local)
        yield local


class TfdsCorpus:
    """A prepared data set with a feature of text.

    Its split `validation` is held out if it has one; else documents of `train` are, by their hash.
    A split `test` is never read.

    Args:
      folder: the one that holds dataset_info.json.
      text_field: the feature.
    """

    def __init__(self, folder: str, text_field: str = "text"):
        self._folder, self._field = folder, text_field
        content = _described(open_path(folder))
        self._info = tfds.builder_from_directory(folder).info
        self.name = f"{self._info.full_name} in {folder}"
        self.description = f"TFDS data set {self._info.full_name}: {self._info.description}"
        self.citation = self._info.citation
        self.notes = _notes(self._info)
        self._check()
        self.fingerprint = fingerprint(_READER_VERSION, text_field, content)

    def _check(self) -> None:
        if self._info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
            raise ConfigError(
                f"{self.name} is stored as {self._info.file_format.value}, and is read without "
                "TensorFlow only as array_record: give download_and_prepare a builder with "
                "file_format='array_record', or, where TensorFlow is, `tfds convert_format "
                f"--dataset_dir={self._folder} --out_file_format=array_record --out_path=...`"
            )
        texts = sorted(name for name, f in self._info.features.items() if _is_text(f))
        if self._field not in texts:
            raise ConfigError(
                f"{self.name} has no text feature {self._field!r}; there is "
                f"{', '.join(map(repr, texts)) or 'none'}: set text_field of the source to it"
            )
        if "train" not in self._info.splits:
            raise ConfigError(
                f"{self.name} has no split train, only {', '.join(self._info.splits)}"
            )

    def fetch(self, report: Report) -> None:
        """It is there, or the corpus could not have been made."""

    def parts(self) -> list[TfdsPart]:
        own = "validation" in self._info.splits
        return [
            TfdsPart(
                self._folder,
                split,
                index,
                self._field,
                self._info.splits[split].num_bytes // self._info.splits[split].num_shards,
                split if own else None,
            )
            for split in (("train", "validation") if own else ("train",))
            for index in range(self._info.splits[split].num_shards)
        ]


def _described(folder: AnyPath) -> str:
    """What the data set says of itself, before TFDS reads it, which would import what it names.

    Raises:
      ConfigError: it cannot be read, or has features that are not of TFDS.
    """
    file = folder / _INFO
    try:
        content = regular.read_text(file)
        file = folder / _FEATURES
        features = regular.read_json(file) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {regular.why(error)}") from None
    for name in _classes(features):
        if not str(name).startswith(_OF_TFDS):
            raise ConfigError(
                f"{file}: {name!r:.200} is no feature of TFDS ({_OF_TFDS}*), and code of others is "
                "not imported"
            )
    return content


def _classes(features: Any) -> Iterator[Any]:
    """The classes that a description of features names, at whatever depth."""
    left = [features]
    while left:
        fields = left.pop()
        if isinstance(fields, dict):
            yield from (fields[name] for name in _CLASS if name in fields)
        left += fields.values() if isinstance(fields, dict) else ()
        left += fields if isinstance(fields, list) else ()


def _notes(info: Any) -> list[str]:
    said = {"validation": "held out, in place of config.data.eval_fraction"}
    done = {name: said.get(name, "not read") for name in info.splits if name != "train"}
    return [f"splits: {'; '.join(f'{name}, {how}' for name, how in done.items())}"] if done else []


def _is_text(feature: Any) -> bool:
    return isinstance(feature, tfds.features.Text) or (
        getattr(feature, "shape", None) == () and str(getattr(feature, "np_dtype", "")) == "object"
    )


def holds_data_set(folder: str) -> bool:
    return (open_path(folder) / _INFO).exists() and not _of_hugging_face(folder)


def _of_hugging_face(folder: str) -> bool:
    """Whether that file is of a data set of theirs, which has *.arrow beside it."""
    return is_local(open_path(folder)) and any(Path(folder).glob("*.arrow"))


def find(name: str, tfds_dir: str, field: str) -> str:
    """The folder of "NAME[/CONFIG][:VERSION]" below `tfds_dir`; the newest version by default.

    Raises:
      ConfigError: it is not there; the message says how to make it.
    """
    base = tfds_dir or str(tfds.core.constants.DATA_DIR)
    data_set, _, version = name.partition(":")
    folder = open_path(base) / data_set
    entries = folder.iterdir() if folder.is_dir() else ()
    there = [entry.name for entry in entries if not entry.name.startswith(".")]
    versions = [v for v in there if re.fullmatch(r"\d+\.\d+\.\d+", v)]
    wanted = [v for v in versions if not version or v == version]
    wanted = [v for v in wanted if holds_data_set(str(folder / v))]
    if wanted:
        return str(folder / max(wanted, key=lambda v: [int(part) for part in v.split(".")]))
    raise ConfigError(
        f"{field}: there is no such data set in {folder}"
        + (f" (there is {', '.join(sorted(there))})" if there else "")
        + '; make it with `python -c "import tensorflow_datasets as tfds, '
        f"tensorflow_datasets.text; tfds.builder('{data_set}', data_dir='{base}', "
        "file_format='array_record').download_and_prepare()\"`, or set config.data.tfds_dir to the "
        "folder it was made in"
    )
