"""Data sets on disk: shards of ArrayRecord that TFDS reads, with a manifest of every file.

A folder holds dataset_info.json and features.json as TFDS writes them, so that

    tfds.builder_from_directory(folder).as_data_source("train")

reads it, and manifest.json: size and SHA-256 of every other file. On opening, all files must be
there with their size, and small ones are summed up; of long indices each block is when it is read
(`index`). A record that was changed since fails ArrayRecord's own checksum when it is read. What is
not as it was written is never trained on.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from moepp_jax import regular
from moepp_jax.data import index
from moepp_jax.data.shards import TEMPLATE, Shard
from moepp_jax.data.storage import DataError, file_sha256, fingerprint
from moepp_jax.storage import is_name, write_atomic

SPLITS = ("train", "validation")

_MANIFEST, _INFO = "manifest.json", "dataset_info.json"

# Files that say where documents and records begin, and so are content; others follow from it.
_INDICES = ("-index.npy", "-records.npy")

# Bytes of records that are read at once, about, where a shard is read from its start to its end.
_AHEAD = 1_000_000


def finish(
    folder: Path,
    dataset: str,
    features: tfds.features.FeaturesDict,
    shards: dict[str, list[Shard]],
    files: Iterable[str] = (),
    **about: Any,
) -> None:
    """Makes shards (of each split, in their order) a data set.

    Args:
      files: other files of the data set.
      about: what else TFDS shall know: description, citation.
    """
    infos = [_split_info(folder, dataset, split, of_split) for split, of_split in shards.items()]
    tfds.folder_dataset.write_metadata(
        data_dir=os.fspath(folder),
        features=features,
        split_infos=infos,
        filename_template=TEMPLATE,
        check_data=False,  # it would need TensorFlow
        disable_shuffling=True,
        **about,
    )
    small = {
        name: {"size": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
        for name in (_INFO, "features.json", *files)
    }
    large = {split: [shard._asdict() for shard in shards[split]] for split in shards}
    write_atomic(folder / _MANIFEST, json.dumps({"files": small, "shards": large}, indent=1))


def _split_info(folder: Path, dataset: str, split: str, shards: list[Shard]) -> Any:
    return tfds.core.SplitInfo(
        name=split,
        shard_lengths=[shard.records for shard in shards],
        num_bytes=sum(shard.num_bytes for shard in shards),
        filename_template=tfds.core.ShardedFileTemplate(
            dataset_name=dataset,
            split=split,
            filetype_suffix="array_record",
            data_dir=folder,
            template=TEMPLATE,
        ),
    )


def shards(folder: Path, split: str) -> list[Shard]:
    """
    Raises:
      DataError: the manifest is missing or cannot be read.
    """
    manifest = _manifest(folder)
    try:
        found = [Shard(**shard) for shard in manifest["shards"][split]]
    except (KeyError, TypeError) as error:
        raise damaged(folder / _MANIFEST, f" cannot be read ({error})") from None
    for shard in found:
        if not is_name(shard.file):
            raise damaged(folder / _MANIFEST, f" names {shard.file!r:.200}, no file of its folder")
    lengths = _lengths(folder, split, manifest)
    if lengths not in (None, [shard.records for shard in found]):
        how = f" has not the {len(lengths)} shards of {split} that {_INFO} has"
        raise damaged(folder / _MANIFEST, how)
    return found


def _lengths(folder: Path, split: str, manifest: dict) -> list[int] | None:
    """Records of each shard, as TFDS knows them; None of a file that is not as it was written,
    which is told where its sum is.
    """
    file, written = folder / _INFO, manifest["files"].get(_INFO)
    if written is None or not file.is_file() or file_sha256(file) != written["sha256"]:
        return None
    named = {about["name"]: about for about in regular.read_json(file)["splits"]}
    return [int(length) for length in named.get(split, {}).get("shardLengths", [])]


def _manifest(folder: Path) -> dict:
    try:
        manifest = regular.read_json(folder / _MANIFEST)
        files = {
            n: {"size": int(f["size"]), "sha256": f["sha256"]} for n, f in manifest["files"].items()
        }
        return {"files": files, "shards": dict(manifest["shards"])}
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder / _MANIFEST, f" cannot be read ({error})") from None


def content(folder: Path) -> str:
    """Fingerprint of all records and of where they begin, as the manifest has their SHA-256.

    Raises:
      DataError: the manifest is missing or cannot be read.
    """
    files = _manifest(folder)["files"]
    indices = [(name, files[name]["sha256"]) for name in sorted(files) if name.endswith(_INDICES)]
    of_shards = [[shard.sha256 for shard in shards(folder, split)] for split in SPLITS]
    return fingerprint(indices, *of_shards)


def damaged(file: Path, how: str) -> DataError:
    """The error that says this of a data file."""
    return DataError(
        f"the data file {file}{how}; copy it again from where it was prepared, or remove "
        f"{file.parent} and prepare it anew"
    )


def read_shard(folder: Path, shard: Shard) -> Iterator[bytes]:
    """The records of a shard in their order.

    Raises:
      DataError: the file is missing or one of its records is damaged.
    """
    check_size(folder / shard.file, shard.size)
    ahead = max(1, _AHEAD * shard.records // max(shard.num_bytes, 1))
    first = 0
    try:
        reader = ArrayRecordReader(os.fspath(folder / shard.file))
        for first in range(0, shard.records, ahead):
            yield from reader.read(first, min(first + ahead, shard.records))
        reader.close()
    except (RuntimeError, ValueError, IndexError) as error:
        where = f", record {first} or one of the {ahead - 1} after it, cannot be read: {error}"
        raise damaged(folder / shard.file, where) from error


def check_size(file: Path, size: int) -> None:
    if not file.is_file():
        raise damaged(file, " is missing")
    if file.stat().st_size != size:
        raise damaged(file, f" has {file.stat().st_size:,} bytes, not its {size:,}")


def _check_sum(file: Path, sha256: str) -> None:
    if file_sha256(file) != sha256:
        raise damaged(file, " is not as it was written: its SHA-256 is another")


class Split(Sequence):
    """The examples of one split, by index.

    Raises:
      DataError: on opening, a file is missing or of another size; on reading, a record is damaged.
    """

    def __init__(self, folder: Path, split: str):
        self._folder = folder
        manifest = _manifest(folder)
        others = tuple(f"{other}-" for other in SPLITS if other != split)
        for name, file in manifest["files"].items():
            if not name.startswith(others):
                check_size(folder / name, file["size"])
                if index.blocks_file(name) not in manifest["files"]:
                    _check_sum(folder / name, file["sha256"])
        self._shards = shards(folder, split)
        for shard in self._shards:
            check_size(folder / shard.file, shard.size)
        _allow_open_files()
        self._source = tfds.builder_from_directory(folder).as_data_source(split)

    def __len__(self) -> int:
        return len(self._source)

    @property
    def features(self) -> tfds.features.FeaturesDict:
        return self._source.dataset_info.features

    def records(self, indices: Sequence[int]) -> Sequence[bytes]:
        """The records as they are stored, with one call to the reader, which checks their hashes.

        Raises:
          DataError: one of them cannot be read.
        """
        if not indices:
            return []
        try:
            return self._source.data_source.__getitems__(indices)
        except RuntimeError as error:
            for index in indices if len(indices) > 1 else ():
                self.records([index])
            raise self.damaged(indices[0], f"cannot be read: {error}") from None

    def damaged(self, number: int, how: str) -> DataError:
        """The error that says this of a record."""
        for shard in self._shards:
            if number < shard.records:
                break
            number -= shard.records
        return damaged(self._folder / shard.file, f", record {number}, {how}")

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.features.deserialize_example_np(self.records([index])[0])

    def __iter__(self) -> Iterator:
        return map(self.__getitem__, range(len(self)))


def _allow_open_files() -> None:
    """Shards stay open once they are read: of a mixture more than the usual limit of 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def files(folder: Path) -> dict[Path, tuple[int, str]]:
    """Every file of a data set but its manifest: size and SHA-256.

    Raises:
      DataError: the manifest is missing or cannot be read.
    """
    manifest = _manifest(folder)
    sums = {name: (file["size"], file["sha256"]) for name, file in manifest["files"].items()}
    for split in manifest["shards"]:
        sums |= {shard.file: (shard.size, shard.sha256) for shard in shards(folder, split)}
    return {folder / name: of_file for name, of_file in sums.items()}
