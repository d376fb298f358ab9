"""The text of a corpus as a TFDS data set with the splits `train` and `validation`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from moepp_jax.config import ConfigError, DataConfig
from moepp_jax.data import storage
from moepp_jax.data.packages import DefaultCorpus
from moepp_jax.data.sources import Corpus, LocalCorpus, Report

SPLITS = ("train", "validation")

# Raise it when the same documents would be stored or split in another way.
FORMAT_VERSION = 1


def text_hash(text: str) -> float:
    """Uniform in [0, 1); of the text itself, so equal documents always share a split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


class MoeppText(storage.ArrayRecordBuilder, skip_registration=True):
    """One example a document: its text, the name of its source and its id.

    TFDS stores them ordered by a hash of the id, so any first part of a split is a fair sample.
    """

    def __init__(self, folder: Path, corpus: Corpus, held_out: float):
        self._corpus = corpus
        self._held_out = held_out
        super().__init__(folder)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._corpus.description,
            citation=self._corpus.citation,
            features=tfds.features.FeaturesDict(
                {name: tfds.features.Text() for name in ("text", "source", "id")}
            ),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict]]:
        for document in self._corpus.documents():
            if (text_hash(document.text) <= self._held_out) == (split == "validation"):
                yield document.id, document._asdict()


class Texts(storage.Split):
    """The texts of one split, by index."""

    def __init__(self, folder: Path, split: str):
        super().__init__(MoeppText, folder, split)

    def __getitem__(self, index: int) -> str:
        return super().__getitem__(index)["text"].decode()


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that `config.data.corpus` names.

    Raises:
      ConfigError: there is no such path, or it holds no text.
    """
    if config.corpus == "default":
        return DefaultCorpus(Path(config.dir) / "raw")
    return LocalCorpus(Path(config.corpus))


def text_folder(config: DataConfig, corpus: Corpus) -> Path:
    """Where the text data set of this corpus is, or would be."""
    name = storage.fingerprint(FORMAT_VERSION, corpus.fingerprint, config.eval_fraction)
    return Path(config.dir) / f"text-{name}"


def prepare_text(config: DataConfig, corpus: Corpus, report: Report) -> Path:
    """Makes the text data set if it is missing; returns its folder.

    Raises:
      ConfigError: the corpus cannot be read, or is too small for two splits.
    """
    folder = text_folder(config, corpus)
    if not folder.exists():
        start = time.perf_counter()
        corpus.fetch(report)
        report(f"text: reading {corpus.name}")
        held_out = _threshold(corpus, config)
        storage.publish(folder, lambda made: MoeppText(made, corpus, held_out).write())
        counts = " and ".join(f"{len(Texts(folder, s)):,} {s}" for s in SPLITS)
        report(f"text: {counts} documents in {folder} ({time.perf_counter() - start:.1f} s)")
    return folder


def _threshold(corpus: Corpus, config: DataConfig) -> float:
    """Documents whose hash is at most this are held out.

    It is `eval_fraction` (a document keeps its split when others come or go), or more where that
    would hold out nothing: then the document with the smallest hash is.
    """
    hashes = [text_hash(document.text) for document in corpus.documents()]
    threshold = max(config.eval_fraction, min(hashes))
    if max(hashes) <= threshold:
        raise ConfigError(
            f"config.data.corpus = {config.corpus!r} is too small to hold text out: "
            f"config.data.eval_fraction = {config.eval_fraction} leaves none of its "
            f"{len(hashes)} document(s) to train on; give more text (a folder of *.txt files, or "
            "a file whose paragraphs are separated by blank lines)"
        )
    return threshold
