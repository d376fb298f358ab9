"""The text of a source as a TFDS data set with the splits `train` and `validation`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from moepp_jax.config import DataConfig
from moepp_jax.data import records, storage, tfds_sets, work
from moepp_jax.data.files import FilesCorpus
from moepp_jax.data.packages import default_corpus
from moepp_jax.data.records import SPLITS
from moepp_jax.data.shards import Shard, ShardWriter, decode_bytes, shard_name
from moepp_jax.data.sources import Corpus, Document, Part, Report
from moepp_jax.errors import ConfigError

# Raise it when the same documents would be stored or split in another way.
FORMAT_VERSION = 2

_NAME = "moepp_text"
FEATURES = tfds.features.FeaturesDict(
    {name: tfds.features.Text() for name in ("text", "source", "id")}
)

# Characters of text that are shuffled at once, and so in memory.
_BLOCK = 64_000_000

# Bytes that are read between two words to whoever shows the progress.
_ADVANCE_EVERY = 1_000_000


def text_hash(text: str) -> float:
    """Uniform in [0, 1); of the text itself, so equal documents always share a split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


class Texts(records.Split):
    """The texts of one split, by index."""

    def __getitem__(self, index: int) -> str:
        [record] = self.records([index])
        return decode_bytes(record, "text").decode()


def open_corpus(config: DataConfig, name: str) -> Corpus:
    """The text of the source of this name.

    Raises:
      ConfigError: there is no such path, or it holds no text.
    """
    source = config.sources[name]
    path, field = source.path, f"config.data.sources.{name}.path = {source.path!r}"
    if path == "default" or path.startswith("default/"):
        return default_corpus(path, Path(config.dir) / "raw", field)
    if path.startswith("tfds:"):
        path = tfds_sets.find(path.removeprefix("tfds:"), config.tfds_dir, field)
    if tfds_sets.holds_data_set(path):
        return tfds_sets.TfdsCorpus(path, source.text_field)
    if "://" in path:
        raise ConfigError(
            f"{field} holds no TFDS data set (no dataset_info.json); other files than those of "
            "TFDS are read from local disks only"
        )
    return FilesCorpus(path, field, source.text_field)


def text_folder(config: DataConfig, corpus: Corpus) -> Path:
    """Where the text data set of this corpus is, or would be."""
    name = storage.fingerprint(FORMAT_VERSION, corpus.fingerprint, config.eval_fraction)
    return Path(config.dir) / f"text-{name}"


def prepare_text(config: DataConfig, corpus: Corpus, report: Report, workers: int = 1) -> Path:
    """Makes the text data set if it is missing; returns its folder.

    Raises:
      ConfigError: the corpus cannot be read, or is too small for two splits.
    """
    folder = text_folder(config, corpus)
    if not folder.exists():
        start = time.perf_counter()
        corpus.fetch(report)
        report(f"text: reading {corpus.name}")
        for note in corpus.notes:
            report(f"text: {corpus.name}: {note}")
        empty = 0

        def make(partial: Path) -> None:
            nonlocal empty
            empty = _make(partial, corpus, config.eval_fraction, workers, report)

        storage.publish_in_parts(folder, make)
        counts = " and ".join(
            f"{sum(s.records for s in records.shards(folder, split)):,} {split}" for split in SPLITS
        )
        skipped = f", {empty:,} empty ones left out" if empty else ""
        seconds = time.perf_counter() - start
        report(f"text: {counts} documents in {folder}{skipped} ({seconds:.1f} s)")
    return folder


def _make(folder: Path, corpus: Corpus, held_out: float, workers: int, report: Report) -> int:
    """The data set in this folder; returns how many documents were empty."""
    results = _read(folder, corpus, held_out, workers, report)
    count = sum(r[split]["records"] for r in results for split in SPLITS)
    if not count:
        storage.discard(folder)
        raise ConfigError(f"{corpus.name} is empty: none of its documents holds any text")
    if not any(r["validation"]["records"] for r in results):
        # A document keeps its split when others come or go. Only where that holds out nothing,
        # the document with the smallest hash is held out.
        results = _read(folder, corpus, min(r["least_hash"] for r in results), workers, report)
    if not any(r["validation"]["records"] for r in results):
        storage.discard(folder)
        raise ConfigError(f"{corpus.name}: none of the documents of its validation split has text")
    if not any(r["train"]["records"] for r in results):
        storage.discard(folder)
        raise ConfigError(
            f"{corpus.name} is too small to hold text out: "
            f"config.data.eval_fraction = {held_out} leaves none of its "
            f"{count} document(s) to train on; give more text (a folder of *.txt files, or "
            "a file whose paragraphs are separated by blank lines)"
        )
    records.finish(
        folder,
        _NAME,
        FEATURES,
        {split: [Shard(**result[split]) for result in results] for split in SPLITS},
        description=corpus.description,
        citation=corpus.citation,
    )
    return sum(result["empty"] for result in results)


def _read(
    folder: Path, corpus: Corpus, held_out: float, workers: int, report: Report
) -> list[dict]:
    # In an order of their own, so that neighbouring files are not neighbours in training.
    parts = sorted(corpus.parts(), key=lambda part: _order("part", part.name))
    jobs = [_TextJob(folder, part, i, len(parts), held_out) for i, part in enumerate(parts)]
    return work.run(folder, jobs, workers, "text", report)


@dataclasses.dataclass(frozen=True)
class _TextJob:
    """Reads a part into one shard of each split."""

    folder: Path
    part: Part
    index: int
    count: int
    held_out: float  # documents whose hash is at most this are

    @property
    def name(self) -> str:
        return f"{self.index:05}-{self.held_out}"

    @property
    def num_bytes(self) -> int:
        return self.part.num_bytes

    def __call__(self, advance: work.Advance) -> dict[str, Any]:
        empty, least_hash = 0, 1.0

        def placed() -> Iterator[tuple[str, Document]]:
            nonlocal empty, least_hash
            read = 0
            for document in self.part.documents():
                if document.read - read >= _ADVANCE_EVERY:
                    advance(document.read - read)
                    read = document.read
                if not document.text:
                    empty += 1
                    continue
                place = text_hash(document.text)
                least_hash = min(least_hash, place)
                held_out = place <= self.held_out
                yield document.split or ("validation" if held_out else "train"), document
            advance(self.num_bytes - read)

        with contextlib.ExitStack() as stack:
            writers = {}
            for split in SPLITS:
                name = shard_name(_NAME, split, self.index, self.count)
                writers[split] = ShardWriter(self.folder / name)
                stack.callback(writers[split].discard)
            for split, document in _shuffled(placed()):
                example = {name: getattr(document, name).encode() for name in FEATURES}
                writers[split].write(example, len(example["text"]))
            shards = {split: writer.close()._asdict() for split, writer in writers.items()}
        return {**shards, "empty": empty, "least_hash": least_hash}


def _shuffled(placed: Iterable[tuple[str, Document]]) -> Iterator[tuple[str, Document]]:
    """In an order of their own within each split, as far as they fit into memory."""
    block: list[tuple[str, Document]] = []
    size = 0
    for split, document in placed:
        block.append((split, document))
        size += len(document.text)
        if size >= _BLOCK:
            yield from sorted(block, key=lambda d: _order(d[0], d[1].id))
            block, size = [], 0
    yield from sorted(block, key=lambda d: _order(d[0], d[1].id))


def _order(salt: str, name: str) -> bytes:
    return hashlib.md5((salt + name).encode(), usedforsecurity=False).digest()
