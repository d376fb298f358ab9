"""One file of a data set: ArrayRecord with the examples that TFDS would have written there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from moepp_jax.data.storage import file_sha256

# How TFDS finds the files, and `shard_name` names them.
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"

# A record at a time can be read at random: larger groups are up to five times slower.
_WRITER_OPTIONS = "group_size:1"


class Shard(NamedTuple):
    """What is known of one file of a data set."""

    file: str
    size: int  # bytes on disk
    sha256: str
    records: int
    num_bytes: int  # of the records' text or tokens, before compression


class ShardWriter:
    """Writes one shard, which has its name only when it is whole."""

    def __init__(self, file: Path):
        self._file = file
        self._temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        self._writer = ArrayRecordWriter(os.fspath(self._temporary), _WRITER_OPTIONS)
        self._records = self._num_bytes = 0

    def write(self, example: dict[str, bytes | int], num_bytes: int) -> None:
        self._writer.write(encode(example))
        self._records += 1
        self._num_bytes += num_bytes

    def close(self) -> Shard:
        self._writer.close()
        with self._temporary.open("rb") as file:
            os.fsync(file.fileno())
        size, sha256 = self._temporary.stat().st_size, file_sha256(self._temporary)
        os.replace(self._temporary, self._file)
        return Shard(self._file.name, size, sha256, self._records, self._num_bytes)

    def discard(self) -> None:
        """Leaves nothing of a shard that was not closed."""
        self._temporary.unlink(missing_ok=True)


def encode(example: dict[str, bytes | int]) -> bytes:
    """An example as TFDS stores it; equal ones as equal bytes, which TFDS does not promise."""
    proto = tf_example_pb2.Example()
    for name, value in example.items():
        feature = proto.features.feature[name]
        values = feature.bytes_list if isinstance(value, bytes) else feature.int64_list
        values.value.append(value)
    return proto.SerializeToString(deterministic=True)


def decode_bytes(record: bytes, name: str) -> bytes:
    """One field of an example; as TFDS would decode it, in a tenth of the time."""
    example = tf_example_pb2.Example.FromString(record)
    return example.features.feature[name].bytes_list.value[0]


def shard_name(dataset: str, split: str, index: int, count: int) -> str:
    return f"{dataset}-{split}.array_record-{index:05}-of-{count:05}"
