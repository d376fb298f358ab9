"""From a configuration to token documents on disk: text, tokenizer and tokens of every source.

    source --(parts, read in parallel)--> text-X/ --(sample)--> tokenizer-Y.model
                                          text-X/ --(shards, encoded in parallel)--> tokens-Z/

all in `config.data.dir`, under names that cover the content. source-W.json says which text data set
the source of a configuration became, so that a run needs neither the source nor, once there are
tokens, the text.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import NamedTuple

from moepp_jax import regular
from moepp_jax.config import Config, DataConfig
from moepp_jax.data import storage
from moepp_jax.data.corpus import Texts, open_corpus, prepare_text, text_folder
from moepp_jax.data.sources import Corpus, Report
from moepp_jax.data.tokenizer import TRAINER_VERSION, Tokenizer, interleaved
from moepp_jax.data.tokens import prepare_tokens, tokens_folder
from moepp_jax.errors import ConfigError
from moepp_jax.storage import AnyPath, open_path, write_atomic


class Prepared(NamedTuple):
    """What training needs of the text.

    Attributes:
      tokenizer: of all sources.
      tokens: folder of each source's token data set.
      texts: name of each source's text data set, which may be gone.
    """

    tokenizer: Tokenizer
    tokens: dict[str, Path]
    texts: dict[str, str]


def prepare_sources(config: Config, report: Report = print, workers: int | None = None) -> Prepared:
    """Text, tokenizer and tokens as the configuration wants them; makes what is missing.

    A changed corpus, held-out share, vocabulary or tokenizer gives new files, a changed mixture or
    `seq_len` none. When it was stopped it goes on where it was. It starts processes where there is
    work for several, so a script that calls it has `if __name__ == "__main__":`.

    Args:
      workers: processes; by default one a core.

    Raises:
      ConfigError: a source or the tokenizer cannot be used; the message says why.
    """
    data, workers = config.data, workers or os.cpu_count() or 1
    check_folder(data.dir)
    if data.tokenizer:
        load_tokenizer(config, open_path(data.tokenizer))  # a wrong one is an error before any work
    unused = [name for name in data.sources if name not in data.mixed]
    if unused:
        report(f"sources: {', '.join(unused)} left out, as config.data.sources.*.weight is 0")
    texts = {name: _Text(config, name, report, workers) for name in data.mixed}
    file = tokenizer_file(config, [text.name for text in texts.values()])
    if not data.tokenizer and not file.exists():
        _train_tokenizer(config, file, [text.made() for text in texts.values()], report)
    tokenizer = load_tokenizer(config, file)
    if surplus := int(tokenizer.surplus(config.model.vocab_size).sum()):
        report(f"tokenizer: {surplus:,} of config.model.vocab_size are no piece of {file}")
    tokens = {}
    for name, text in texts.items():
        tokens[name] = tokens_folder(data, text.name, tokenizer)
        if not tokens[name].exists():
            prepare_tokens(data, text.made(), tokenizer, report, workers)
        text.note()
    return Prepared(tokenizer, tokens, {name: text.name for name, text in texts.items()})


def prepared_sources(config: Config) -> Prepared:
    """What `prepare_sources` has made; makes nothing, and looks at no source.

    Raises:
      ConfigError: something is missing; the message names it and says how to make it.
    """
    data = config.data
    names = {name: noted_text(data, name) for name in data.mixed}
    for name, text in names.items():
        _require(text is not None, f"{_note(data, name)}, of config.data.sources.{name}")
    file = tokenizer_file(config, list(names.values()))
    _require(file.exists() or bool(data.tokenizer), f"the tokenizer {file}")
    tokenizer = load_tokenizer(config, file)
    tokens = {name: tokens_folder(data, text, tokenizer) for name, text in names.items()}
    for name, folder in tokens.items():
        _require(folder.exists(), f"{folder}, the tokens of config.data.sources.{name}")
    return Prepared(tokenizer, tokens, names)


def _require(there: bool, what: str) -> None:
    if not there:
        raise ConfigError(
            f"the data of this configuration is not prepared: there is no {what}; make it with "
            "`moepp data prepare --config=...` where its sources can be read, "
            "or set config.data.dir to where that was done"
        )


class _Text:
    """The text data set of a source, made when it is first needed."""

    def __init__(self, config: Config, source: str, report: Report, workers: int):
        self._config, self._source = config, source
        self._report, self._workers = report, workers
        noted = noted_text(config.data, source)
        self._corpus = self._open(noted)
        self.name = text_folder(config.data, self._corpus).name if self._corpus else noted
        if noted not in (None, self.name):
            report(f"text: {self._corpus.name} has changed since {noted} was made of it")

    def _open(self, noted: str | None) -> Corpus | None:
        try:
            return open_corpus(self._config.data, self._source)
        except ConfigError as error:
            if noted is None:
                raise
            self._report(f"text: using {noted}, which was made before: {error}")
            return None

    def made(self) -> Path:
        if self._corpus is None:
            folder = Path(self._config.data.dir) / self.name
            _require(folder.exists(), f"{folder}, the text of config.data.sources.{self._source}")
            return folder
        return prepare_text(self._config.data, self._corpus, self._report, self._workers)

    def note(self) -> None:
        """Remembers which text data set belongs to this source."""
        if noted_text(self._config.data, self._source) != self.name:
            description = _description(self._config.data, self._source)
            content = json.dumps({**description, "text": self.name}, indent=1)
            write_atomic(_note(self._config.data, self._source), content)


def _description(data: DataConfig, source: str) -> dict:
    """What the text data set of a source depends on, as the configuration says it."""
    said = data.sources[source]
    return {"path": said.path, "text_field": said.text_field, "eval_fraction": data.eval_fraction}


def _note(data: DataConfig, source: str) -> Path:
    return Path(data.dir) / f"source-{storage.fingerprint(_description(data, source))}.json"


def noted_text(data: DataConfig, source: str) -> str | None:
    """Name of the text data set that was made of a source; None if none was."""
    file = _note(data, source)
    if not file.exists():
        return None
    try:
        return str(regular.read_json(file)["text"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise storage.DataError(
            f"{file} is damaged ({error}): remove it and give `data prepare` again"
        ) from None


def check_folder(name: str) -> None:
    """Makes the folder config.data.dir, if it is not there.

    Raises:
      ConfigError: it is in a bucket, or cannot be made.
    """
    folder = Path(name)
    if "://" in name:
        raise ConfigError(
            f"config.data.dir = {name!r} must be a folder: mount the bucket, or prepare the data "
            "on a disk that all processes see"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"config.data.dir = {name!r} cannot be made a folder: {error.strerror}"
        ) from None


def tokenizer_file(config: Config, texts: list[str]) -> AnyPath:
    """The tokenizer of these text data sets, or where it would be."""
    if config.data.tokenizer:
        return open_path(config.data.tokenizer)
    name = storage.fingerprint(TRAINER_VERSION, *sorted(texts), config.model.vocab_size)
    return Path(config.data.dir) / f"tokenizer-{name}.model"


def _train_tokenizer(config: Config, file: Path, texts: list[Path], report: Report) -> None:
    start = time.perf_counter()
    report(f"tokenizer: learning {config.model.vocab_size:,} pieces from the training split")
    training = [Texts(text, "train") for text in sorted(texts)]
    Tokenizer.train(interleaved(training), config.model.vocab_size).save(file)
    report(f"tokenizer: {file} ({time.perf_counter() - start:.1f} s)")


def load_tokenizer(config: Config, file: AnyPath) -> Tokenizer:
    """The tokenizer; the model may have more rows in its embedding than there are pieces.

    Raises:
      ConfigError: it cannot be read, or has pieces that the model has no row for.
    """
    tokenizer = Tokenizer.load(file)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"config.model.vocab_size = {config.model.vocab_size} is less than the "
            f"{tokenizer.vocab_size} pieces of the tokenizer {file}: set it to "
            f"{tokenizer.vocab_size} or more, or change config.data.tokenizer"
        )
    return tokenizer
