"""Running a command-line program whose errors are for its user: one line, no traceback."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from moepp_jax import distributed, processes
from moepp_jax.checkpoint import CheckpointError
from moepp_jax.config import ConfigError
from moepp_jax.data.storage import DataError
from moepp_jax.interrupt import Stopped


def define_config(default: str | None = None) -> flags.FlagHolder:
    """The flag --config, a recipe, with a flag for each of its fields."""
    # Unknown fields pass here, so that Config.parse, the one door, can say what is near them.
    return config_flags.DEFINE_config_file(
        "config",
        default,
        "recipe: a file of configs/",
        lock_config=False,
        accept_new_attributes=True,
    )


def run(main: Callable[[Sequence[str]], None]) -> None:
    """As `absl.app.run`; what the user got wrong is told as `error: ...`, with exit status 1.

    One of several processes that fails otherwise ends the whole run.
    """

    def quietly(argv):
        logging.set_verbosity(logging.WARNING)
        main(argv)

    try:
        app.run(quietly, flags_parser=_parse)
    except Stopped as stopped:
        if processes.is_first():
            print(stopped)
        sys.exit(stopped.status)
    except (ConfigError, CheckpointError) as error:
        # A damaged record is read by one process alone; all else is an error in each.
        if isinstance(error, DataError) and jax.distributed.is_initialized():
            distributed.abandon(error)
        sys.exit(f"error: {error}")
    except (Exception, KeyboardInterrupt) as error:
        if not jax.distributed.is_initialized():
            raise
        distributed.abandon(error)


def _parse(argv: Sequence[str]) -> list[str]:
    # The flag itself would only tell later, and without the name of the file.
    recipe = re.search(r"\0--?config[=\0]([^\0:]*)", "\0".join(argv))
    if recipe and not Path(recipe[1]).is_file():
        raise ConfigError(f"--config={recipe[1]}: there is no such file; recipes are in configs/")
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        # What a recipe raises comes with its traceback, the error itself in the last line.
        raise ConfigError(str(error).strip().splitlines()[-1]) from error
    except (ImportError, OSError, SyntaxError) as error:
        raise ConfigError(f"--config cannot be read: {error}") from error
    except KeyError as error:
        said = " ".join(str(error.args[0]).split())
        raise ConfigError(f"a flag names no field of the configuration: {said}") from error
