"""Running a command-line program whose errors are for its user: one line, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from moepp_jax.checkpoint import CheckpointError
from moepp_jax.config import ConfigError


def run(main: Callable[[Sequence[str]], None]) -> None:
    """As `absl.app.run`; what the user got wrong is told as `error: ...`, with exit status 1."""

    def quietly(argv):
        logging.set_verbosity(logging.WARNING)
        main(argv)

    try:
        app.run(quietly, flags_parser=_parse)
    except (ConfigError, CheckpointError, flags.Error) as error:
        sys.exit(f"error: {error}")


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ConfigError(f"the command line cannot be read: {error}") from error
