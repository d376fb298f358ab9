"""What preparing would read and write, from a sample of each source: `data prepare --dry_run`."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from datetime import timedelta
from pathlib import Path

from moepp_jax.config import Config
from moepp_jax.data.corpus import open_corpus, text_folder
from moepp_jax.data.prepare import load_tokenizer, tokenizer_file
from moepp_jax.data.sources import Corpus, Report
from moepp_jax.data.tokenizer import Tokenizer
from moepp_jax.errors import ConfigError

# Up to so many bytes of text a source are looked at, from so many places in it.
_SAMPLE = 32_000_000
_PLACES = 16

# Bytes of text whose tokens are counted, if there is a tokenizer.
_ENCODED = 500_000

# Bytes of the text data set on disk per byte of text: ArrayRecord compresses record by record.
_STORED = 0.65

# Seconds a byte of text, of everything but the encoding, as measured on one core.
_READING = 1 / 15e6


@dataclasses.dataclass
class Estimate:
    """Of one source.

    Attributes:
      exact: the whole source was read; else these are extrapolated from a sample of it.
      seconds: of one core; None if encoding could not be timed.
    """

    documents: int
    empty: int
    text_bytes: int
    tokens: int
    exact: bool
    seconds: float | None


def estimate(config: Config, report: Report = print) -> dict[str, Estimate]:
    """Reports documents, bytes, tokens, disk and time of each source; writes nothing but what the
    default corpus downloads.

    Raises:
      ConfigError: a source cannot be read; the message says why.
    """
    corpora = {name: open_corpus(config.data, name) for name in config.data.mixed}
    tokenizer = _tokenizer(config, corpora)
    found = {}
    for name, corpus in corpora.items():
        corpus.fetch(report)
        found[name] = _estimate(corpus, tokenizer, config.model.vocab_size)
        done = " (prepared already)" if text_folder(config.data, corpus).exists() else ""
        report(f"{name}: {corpus.name}: {_said(found[name])}{done}")
        for note in corpus.notes:
            report(f"{name}: {note}")
    width = 2 if config.model.vocab_size <= 2**16 else 4
    text = sum(e.text_bytes for e in found.values()) * _STORED
    tokens = sum(e.tokens * width + e.documents * 16 for e in found.values())
    free = shutil.disk_usage(_existing(Path(config.data.dir).absolute())).free
    report(
        f"disk: about {_bytes(text)} for the text and {_bytes(tokens)} for the tokens in "
        f"{config.data.dir}, where {_bytes(free)} are free"
    )
    if tokenizer is None:
        report(f"tokens: guessed, as there is no tokenizer of {config.model.vocab_size:,} pieces")
    return found


def _tokenizer(config: Config, corpora: dict[str, Corpus]) -> Tokenizer | None:
    texts = [text_folder(config.data, corpus).name for corpus in corpora.values()]
    file = tokenizer_file(config, texts)
    return load_tokenizer(config, file) if config.data.tokenizer or file.exists() else None


def _estimate(corpus: Corpus, tokenizer: Tokenizer | None, vocab_size: int) -> Estimate:
    parts = corpus.parts()
    places = [parts[len(parts) * i // _PLACES] for i in range(_PLACES)]
    places = parts if len(parts) <= _PLACES else places
    documents = empty = text_bytes = read = encoded = tokens = 0
    around = len(tokenizer.document([])) if tokenizer else 2
    exact, seconds = len(places) == len(parts), 0.0
    for part in places:
        of_part = last = 0
        for document in part.documents():
            size = len(document.text.encode())
            documents, empty, last = documents + 1, empty + (not size), document.read
            of_part += size
            if tokenizer and encoded < _ENCODED and size:
                start = time.perf_counter()
                tokens += len(tokenizer.encode_batch([document.text], 1)[0])
                seconds += time.perf_counter() - start
                encoded += size
            if of_part >= _SAMPLE // len(places):
                exact = exact and last >= part.num_bytes
                break
        else:
            last = part.num_bytes
        text_bytes, read = text_bytes + of_part, read + last
    if not text_bytes:
        raise ConfigError(f"{corpus.name} holds no text in what was looked at")
    scale = 1.0 if exact else sum(part.num_bytes for part in parts) / read
    a_token = encoded / tokens if tokens else _bytes_a_token(vocab_size)
    total = round(text_bytes * scale)
    return Estimate(
        documents=round(documents * scale),
        empty=round(empty * scale),
        text_bytes=total,
        tokens=round(total / a_token + around * documents * scale),
        exact=exact,
        seconds=total * (seconds / encoded + _READING) if encoded else None,
    )


def _bytes_a_token(vocab_size: int) -> float:
    """Of English, as found with 4,096 (3.24), 16,384 (3.97) and 65,536 pieces (4.37)."""
    return 0.28 * math.log2(vocab_size) - 0.1


def _said(e: Estimate) -> str:
    about = "" if e.exact else "about "
    empty = f", {e.empty:,} of them empty" if e.empty else ""
    took = f", about {timedelta(seconds=round(e.seconds))} h of one core" if e.seconds else ""
    return (
        f"{about}{e.documents:,} documents{empty}, {about}{_bytes(e.text_bytes)} of text, "
        f"about {e.tokens:,} tokens{took}"
    )


def _bytes(count: int | float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)
