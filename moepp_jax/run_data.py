"""The data of a run: what it began with, noted as data.json in its folder."""

from __future__ import annotations

import os

from moepp_jax import regular
from moepp_jax.config import Config
from moepp_jax.data import Dataset, Tokenizer, open_dataset, prepare
from moepp_jax.data.pins import Pins, pinned_sources, prepare_pinned
from moepp_jax.data.sources import Report
from moepp_jax.errors import ConfigError
from moepp_jax.metrics import was_measured
from moepp_jax.storage import AnyPath, write_atomic
from moepp_jax.workdir import (
    DATA,
    data_file,
    holds_run,
    holds_start,
    keep_tokenizer,
    own_tokenizer,
    tokenizer_file,
)


def prepare_data(config: Config, workdir: str | os.PathLike, report: Report = print) -> Dataset:
    """The data of a run that is there or is to be; what is missing of it is made.

    Raises:
      ConfigError: it cannot be made, or not as it was when the run began.
      DataError: what was prepared is damaged.
    """
    pins = _pins(workdir)
    if pins is not None:
        prepared = prepare_pinned(config, pins, _tokenizer(workdir), str(workdir), report)
        return Dataset(config, prepared)
    config = _with_own_tokenizer(config, workdir)
    if was_measured(workdir):  # by a version that noted nothing: it read what was prepared last
        try:
            return open_dataset(config)
        except ConfigError as error:
            report(f"{workdir} does not say which data it began with, and {error}")
    return prepare(config, report)


def open_data(config: Config, workdir: str | os.PathLike) -> Dataset:
    """The data of a run that is there; makes nothing.

    Raises:
      ConfigError, DataError: as `prepare_data`.
    """
    pins = _pins(workdir)
    if pins is None:
        return open_dataset(_with_own_tokenizer(config, workdir))
    prepared = pinned_sources(config, pins, _tokenizer(workdir), str(workdir))
    return Dataset(config, prepared)


def files(dataset: Dataset) -> dict[str, str | bytes]:
    """What a new run's folder has of its data before its config.json."""
    return dataset.tokenizer.files | {DATA: Pins.of(dataset.prepared).to_json()}


def keep(folder: AnyPath, dataset: Dataset) -> None:
    """Puts that into the folder of a run that is there, where it is missing.

    Raises:
      ConfigError: the run was started with another tokenizer.
    """
    keep_tokenizer(folder, dataset.tokenizer)
    if holds_start(folder) or not data_file(folder).exists():
        write_atomic(data_file(folder), Pins.of(dataset.prepared).to_json())


def _with_own_tokenizer(config: Config, workdir: str | os.PathLike) -> Config:
    """Where a tokenizer was named, the run's copy of it: that one may be gone."""
    if not (config.data.tokenizer and holds_run(workdir) and tokenizer_file(workdir).exists()):
        return config
    return config.replace("data", tokenizer=own_tokenizer(workdir))


def _tokenizer(workdir: str | os.PathLike) -> Tokenizer | None:
    file = tokenizer_file(workdir)
    return Tokenizer.load(file) if file.exists() else None


def _pins(workdir: str | os.PathLike) -> Pins | None:
    file = data_file(workdir)
    # A start that was killed left it, or one whose data may still be another.
    if not file.exists() or not holds_run(workdir) or holds_start(workdir):
        return None
    try:
        return Pins.parse(regular.read_json(file))
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"{file} cannot be read as what data the run began with: {regular.why(error)}; put it "
            "there again from a copy, or remove it to go on with the data that was prepared last"
        ) from error
