"""The data that a run keeps to: which prepared data sets, by name and by content.

A configuration says where text is; what lies there changes, and so does what `data prepare` makes
of it. A run notes what it began with. From then on these data sets are its data: they are opened by
name, and where one is gone it is made again only if exactly the same comes out.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moepp_jax.config import Config
from moepp_jax.data import records
from moepp_jax.data.corpus import open_corpus, prepare_text, text_folder
from moepp_jax.data.prepare import Prepared, check_folder, load_tokenizer, tokenizer_file
from moepp_jax.data.sources import Report
from moepp_jax.data.tokenizer import Tokenizer
from moepp_jax.data.tokens import prepare_tokens, tokens_folder
from moepp_jax.errors import ConfigError
from moepp_jax.storage import is_name


class Pin(NamedTuple):
    """The data of one source.

    Attributes:
      text, tokens: names of its text data set and of its token data set.
      content: fingerprint of the latter's every record.
    """

    text: str
    tokens: str
    content: str


@dataclasses.dataclass(frozen=True)
class Pins:
    """What a run trains and evaluates on.

    Attributes:
      tokenizer: fingerprint of the tokenizer.
      sources: those with a weight, by name.
    """

    tokenizer: str
    sources: Mapping[str, Pin]

    @classmethod
    def of(cls, prepared: Prepared) -> Pins:
        return cls(
            prepared.tokenizer.fingerprint,
            {
                name: Pin(prepared.texts[name], folder.name, records.content(folder))
                for name, folder in prepared.tokens.items()
            },
        )

    @classmethod
    def parse(cls, fields: Any) -> Pins:
        """
        Raises:
          ValueError, TypeError, KeyError, AttributeError: these are none.
        """
        sources = {name: Pin(**pin) for name, pin in fields["sources"].items()}
        values = [fields["tokenizer"], *(value for pin in sources.values() for value in pin)]
        if not all(isinstance(value, str) for value in values):
            raise TypeError("a name or fingerprint is no text")
        names = [name for pin in sources.values() for name in (pin.text, pin.tokens)]
        if outside := [name for name in names if not is_name(name)]:
            raise ValueError(f"{outside[0]!r:.200} is no name of a data set")
        return cls(values[0], sources)

    def to_json(self) -> str:
        sources = {name: pin._asdict() for name, pin in self.sources.items()}
        return json.dumps({"tokenizer": self.tokenizer, "sources": sources}, indent=1) + "\n"


def prepare_pinned(
    config: Config, pins: Pins, tokenizer: Tokenizer | None, run: str, report: Report = print
) -> Prepared:
    """These data sets; what is missing is made again, of the same text with the same tokenizer.

    Where a token data set is there neither its text nor its source is looked at.

    Args:
      tokenizer: the run's; None where it has lost it.
      run: its folder, for messages.

    Raises:
      ConfigError: something is missing and cannot be made again, or is not what it was; the message
        names it and says how to go on.
    """
    return _opened(config, pins, tokenizer, run, report)


def pinned_sources(config: Config, pins: Pins, tokenizer: Tokenizer | None, run: str) -> Prepared:
    """As `prepare_pinned`, but makes nothing."""
    return _opened(config, pins, tokenizer, run, None)


def _opened(
    config: Config, pins: Pins, tokenizer: Tokenizer | None, run: str, report: Report | None
) -> Prepared:
    tokenizer = _tokenizer(config, pins, tokenizer, run)
    texts, tokens = {}, {}
    for name in config.data.mixed:
        if name not in pins.sources:
            raise ConfigError(
                f"the run {run} began with the sources {', '.join(pins.sources)}, and "
                f"config.data.sources.{name} is another one"
            )
        pin = pins.sources[name]
        folder = Path(config.data.dir) / pin.tokens
        if not folder.exists():
            why = _make_again(config, name, pin, tokenizer, report)
            if why is not None:
                raise _lost(f"there is no {folder}, the tokens of", name, why, run)
        if records.content(folder) != pin.content:
            raise _lost(f"{folder} holds other records than it held, of", name, "", run)
        texts[name], tokens[name] = pin.text, folder
    return Prepared(tokenizer, tokens, texts)


def _tokenizer(config: Config, pins: Pins, mine: Tokenizer | None, run: str) -> Tokenizer:
    if mine is None:
        texts = [pin.text for pin in pins.sources.values()]
        mine = load_tokenizer(config, tokenizer_file(config, texts))
    if mine.fingerprint != pins.tokenizer:
        raise ConfigError(
            f"the tokenizer {mine.fingerprint} in {run} is not the one that the run began with, "
            f"{pins.tokenizer}: put that one there again"
        )
    return mine


def _make_again(
    config: Config, name: str, pin: Pin, tokenizer: Tokenizer, report: Report | None
) -> str | None:
    """Makes a token data set that is gone; why that cannot be, if so."""
    data = config.data
    if report is None:
        return "nothing is made here: `train` makes it again, if its text is still the same"
    if tokens_folder(data, pin.text, tokenizer).name != pin.tokens:
        return "this version of the program writes token data sets in another layout"
    text = Path(data.dir) / pin.text
    if not text.exists():
        try:
            corpus = open_corpus(data, name)
        except ConfigError as error:
            return f"its text {pin.text} is not there either, and {error}"
        if text_folder(data, corpus).name != pin.text:
            path = data.sources[name].path
            return f"its text {pin.text} is not there either, and {path!r} has changed since"
        check_folder(data.dir)
        prepare_text(data, corpus, report, os.cpu_count() or 1)
    prepare_tokens(data, text, tokenizer, report, os.cpu_count() or 1)
    return None


def _lost(what: str, name: str, why: str, run: str) -> ConfigError:
    return ConfigError(
        f"the data that the run {run} began with is not there: {what} config.data.sources.{name}"
        f"{f' ({why})' if why else ''}. Put it there again, or set config.data.dir to where it is. "
        "Or train another run from this one's checkpoint on the data as it is now: "
        f"`moepp train --config=run:{run} --init_from={run} "
        "--workdir=NEW`"
    )
