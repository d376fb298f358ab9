"""Running a command-line program whose errors are for its user: one line, no traceback."""

from __future__ import annotations

import difflib
import logging as logging_of_python
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from moepp_jax import distributed, processes
from moepp_jax.checkpoint import CheckpointError, SaveError
from moepp_jax.data.storage import DataError
from moepp_jax.errors import ConfigError
from moepp_jax.interrupt import Stopped
from moepp_jax.metrics import DivergedError

_LARGER = (
    "Less is needed with more config.mesh.fsdp, a larger config.train.accumulate or a stronger "
    "config.model.remat (`compile` says what fits); of `generate`, with --all_devices."
)

_HELP = {"--help", "-help", "-h", "-?"}


def define_config(default: str | None = None) -> flags.FlagHolder:
    """The flag --config, a recipe, with a flag for each of its fields."""
    # Unknown fields pass here, so that Config.parse, the one door, can say what is near them.
    return config_flags.DEFINE_config_file(
        "config",
        default,
        "recipe: a file of configs/; each field of configs/base.py is a flag too: "
        "--config.moe.rule.tau=0.5",
        lock_config=False,
        accept_new_attributes=True,
    )


def run(
    main: Callable[[Sequence[str]], None], describe: Callable[[Sequence[str]], str] | None = None
) -> None:
    """As `absl.app.run`; what the user got wrong is told as `error: ...`, with exit status 1.

    One of several processes that fails otherwise ends the whole run.

    Args:
      describe: the text of --help, given the other words; by default absl's.
    """

    def parse(argv):
        if describe and _HELP & set(argv):
            print(describe([word for word in argv[1:] if not word.startswith("-")]))
            sys.exit()
        return _parse(argv)

    def quietly(argv):
        logging.set_verbosity(logging.WARNING)
        # Where several arrays of a checkpoint cannot be read, the first is an error, and the others
        # would be tracebacks of asyncio's beside it.
        logging_of_python.getLogger("asyncio").setLevel(logging_of_python.CRITICAL)
        logging.get_absl_logger().addFilter(_but_of_orbax)
        sys.unraisablehook = _but_of_closed_loops
        main(argv)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_now)
    try:
        app.run(quietly, flags_parser=parse)
    except Stopped as stopped:
        if processes.is_first():
            print(stopped)
        sys.exit(stopped.status)
    except SaveError as error:
        # Threads that still write would be waited for, and tell of it in a thousand lines.
        of = f"process {jax.process_index()}: " if jax.distributed.is_initialized() else ""
        _end_at_once(f"error: {of}{error}\n", 1)
    except (ConfigError, CheckpointError, DivergedError) as error:
        # A damaged record is read by one process alone; all else is an error in each.
        if isinstance(error, DataError) and jax.distributed.is_initialized():
            distributed.abandon(error)
        sys.exit(f"error: {error}")
    except Exception as error:
        if jax.distributed.is_initialized():
            distributed.abandon(error)
        if isinstance(error, OSError):  # a disk that is full, a folder that may not be written
            sys.exit(f"error: {error}")
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            sys.exit(f"error: a device's memory is too small: {error}\n{_LARGER}")
        raise


def _but_of_orbax(said: logging_of_python.LogRecord) -> bool:
    """Its threads tell of an error, in a traceback each, before it is raised: see `SaveError`."""
    return not (said.exc_info and "orbax" in Path(said.pathname).parts)


def _but_of_closed_loops(what: Any) -> None:
    """TensorStore's threads tell a save of their ends, when it has failed and gone already."""
    if str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)


def _end_now(number: int, frame: FrameType | None) -> NoReturn:
    """What Ctrl-C does where nothing is to be saved.

    A KeyboardInterrupt is lost where it meets one of JAX's callbacks, and what ends in good order
    may end in the middle of a computation.
    """
    _end_at_once("\ninterrupted\n", 128 + number)


def _end_at_once(message: str, status: int) -> NoReturn:
    sys.stdout.flush()
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
    os.write(2, (show_cursor + message).encode())
    os._exit(status)


def _parse(argv: Sequence[str]) -> list[str]:
    # The flag itself would only tell later, and without the name of the file.
    recipe = re.search(r"\0--?config[=\0]([^\0:]*)", "\0".join(argv))
    if recipe and not Path(recipe[1]).is_file():
        near = difflib.get_close_matches(recipe[1], map(str, Path("configs").glob("*.py")), n=1)
        hint = f"did you mean {near[0]}?" if near else "recipes are in configs/"
        raise ConfigError(f"--config={recipe[1]}: there is no such file; {hint}")
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        if recipe or not error.flagname.startswith("config."):
            raise ConfigError(str(error)) from error
        raise ConfigError(
            f"--{error.flagname} changes a field of a recipe, and none was given: write "
            "--config=configs/tiny.py, or --config=configs/run.py:WORKDIR for that of a run"
        ) from error
    except flags.Error as error:
        # What a recipe raises comes with its traceback, the error itself in the last line.
        said = str(error).strip().splitlines()[-1]
        raise ConfigError(re.sub(r"^[\w.]+Error: ", "", said)) from error
    except (ImportError, OSError, SyntaxError) as error:
        raise ConfigError(f"--config cannot be read: {error}") from error
    except KeyError as error:
        said = " ".join(str(error.args[0]).split())
        raise ConfigError(f"a flag names no field of the configuration: {said}") from error
