"""Running a command-line program whose errors are for its user: one line, no traceback."""

from __future__ import annotations

import difflib
import inspect
import itertools
import logging as logging_of_python
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from moepp_jax import distributed, ending, processes, recipes, workdir
from moepp_jax.checkpoint import CheckpointError, SaveError
from moepp_jax.config import near_field
from moepp_jax.data.storage import DataError
from moepp_jax.errors import ConfigError
from moepp_jax.interrupt import Stopped
from moepp_jax.metrics import DivergedError

flags.disclaim_key_flags()  # those that it defines are of the module that asks for it

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
        "recipe: one of the package's, or a file; each field is a flag too: "
        "--config.moe.rule.tau=0.5",
        lock_config=False,
        accept_new_attributes=True,
    )


class _Path(flags.ArgumentParser):
    syntactic_help = "a path"

    def parse(self, argument: str) -> str:
        return os.path.expanduser(argument)  # no shell does so behind a "="


def define_path(name: str, default: str | None, said: str) -> flags.FlagHolder:
    """A flag that holds a path, in which ~ is the user's own folder."""
    return flags.DEFINE(_Path(), name, default, said, serializer=flags.ArgumentSerializer())


class _OptionalValue(flags.Flag):
    """`--flag` alone is "true": absl asks a flag that is boolean for no value."""

    def __init__(self, name: str, said: str):
        super().__init__(flags.ArgumentParser(), flags.ArgumentSerializer(), name, None, said)
        self.boolean = True


def define_with_optional_value(name: str, said: str) -> flags.FlagHolder:
    """A flag of text, "true" where it is given without any."""
    return flags.DEFINE_flag(_OptionalValue(name, said))


def define_paths(name: str, said: str) -> flags.FlagHolder:
    """A flag of a path, which may be given several times."""
    return flags.DEFINE_multi(_Path(), flags.ArgumentSerializer(), name, [], said)


def run(main: Callable[[Sequence[str]], None], describe: Callable[[], str] | None = None) -> None:
    """As `absl.app.run`; what the user got wrong is told as `error: ...`, with exit status 1.

    One of several processes that fails otherwise ends the whole run.

    Args:
      describe: the text of --help; by default absl's.
    """

    def parse(argv):
        if describe and _HELP & set(argv):
            print(describe())
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

    ending.on_interrupt()
    try:
        app.run(quietly, flags_parser=parse)
    except Stopped as stopped:
        if processes.is_first():
            print(stopped)
        sys.exit(stopped.status)
    except SaveError as error:
        # A save that waited for a process which is gone: that one says why.
        if jax.distributed.is_initialized() and distributed.of_a_lost_peer(error):
            distributed.abandon(error)
        # Threads that still write would be waited for, and tell of it in a thousand lines.
        of = f"process {jax.process_index()}: " if jax.distributed.is_initialized() else ""
        ending.at_once(f"error: {of}{_visible(error)}\n", SaveError.STATUS)
    except (ConfigError, CheckpointError, DivergedError) as error:
        # A damaged record is read by one process alone; all else is an error in each.
        if isinstance(error, DataError) and jax.distributed.is_initialized():
            distributed.abandon(error)
        sys.exit(f"error: {_visible(error)}")
    except Exception as error:
        if jax.distributed.is_initialized():
            distributed.abandon(error)
        if isinstance(error, OSError):  # a disk that is full, a folder that may not be written
            sys.exit(f"error: {_visible(error)}")
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            sys.exit(f"error: a device's memory is too small: {error}\n{_LARGER}")
        raise


def _visible(error: Exception) -> str:
    """Its message; what a name in it would tell a terminal to do is shown instead."""
    said = str(error)
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in said)


def _but_of_orbax(said: logging_of_python.LogRecord) -> bool:
    """Its threads tell of an error, in a traceback each, before it is raised: see `SaveError`.

    And it warns of metadata that a damaged step lacks, and of parts of one that could not be
    written, of which the run tells itself.
    """
    _, orbax, where = Path(said.pathname).as_posix().rpartition("/orbax/checkpoint/")
    told = "metadata/" in where or where.endswith("/ocdbt_utils.py")
    return not (orbax and (said.exc_info or told))


def _but_of_closed_loops(what: Any) -> None:
    """TensorStore's threads tell a save of their ends, when it has failed and gone already."""
    if str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)


def describe(module: ModuleType) -> str:
    """The text of --help of a command, with its flags."""
    _, _, shown = flags.FLAGS.module_help(module).lstrip().partition("\n")  # the module's name
    return f"{inspect.cleandoc(module.__doc__)}\n\n{shown}"


def _parse(argv: Sequence[str]) -> list[str]:
    _require_values(argv)
    argv = _with_file_of_recipe(argv)
    logging.set_verbosity(logging.ERROR)  # what it warns of is an error below
    try:
        words = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        if _recipe(argv) or not error.flagname.startswith("config."):
            raise ConfigError(f"there is no flag --{error.flagname}{_like(error)}") from error
        run = _given(argv, "workdir")
        way = f"--config=run:{run or 'WORKDIR'} for that of a run"
        if not run or not workdir.holds_run(run):
            way = f"--config=tiny, or {way}"
        raise ConfigError(
            f"--{error.flagname} changes a field of a recipe, and none was given: write {way}"
        ) from error
    except flags.Error as error:
        _require_values(argv)  # the recipe's fields are flags only now
        # What a recipe raises comes with its traceback, the error itself in the last line.
        said = str(error).strip().splitlines()[-1]
        raise ConfigError(_in_plain_words(re.sub(r"^[\w.]+Error: ", "", said))) from error
    except (ImportError, OSError, SyntaxError) as error:
        raise ConfigError(f"--config cannot be read: {error}") from error
    except Exception as error:
        if said := _wrong_in_recipe(error, _recipe(argv)):
            raise ConfigError(said) from error
        if isinstance(error, KeyError):
            said = " ".join(str(error.args[0]).split())
            raise ConfigError(_no_group(said, argv)) from error
        raise
    if _recipe(argv) and flags.FLAGS.config is None:
        raise ConfigError(f"--config={_recipe(argv)}: its get_config returns no configuration")
    _require_values(argv)
    return words


def _require_values(argv: Sequence[str]) -> None:
    """Refuses a flag whose value would be the flag behind it, which absl takes for it.

    Raises:
      ConfigError: names both.
    """
    words = list(argv[1:])
    end = words.index("--") if "--" in words else len(words)
    for word, following in itertools.pairwise(words[:end]):
        name = word.lstrip("-")
        takes_one = word.startswith("-") and name in flags.FLAGS and not flags.FLAGS[name].boolean
        if takes_one and re.match("--?[A-Za-z]", following):
            raise ConfigError(
                f"--{name} lacks its value, and {following} follows: write --{name}=VALUE "
                f"(--{name}={following} if that is meant)"
            )


def _wrong_in_recipe(error: Exception, file: str) -> str | None:
    """The error of a recipe's own code, with its line; None for one that comes from elsewhere."""
    if isinstance(error, AttributeError) and error.name == "get_config":
        return f"--config={file}: a recipe has a function get_config, and there is none in it"
    frames = traceback.extract_tb(error.__traceback__)
    path = os.path.abspath(file)
    lines = [f.lineno for f in frames if file and os.path.abspath(f.filename) == path]
    said = " ".join(str(error).split())
    return f"--config={file}, line {lines[-1]}: {type(error).__name__}: {said}" if lines else None


def _place_of(argv: Sequence[str], flag: str) -> tuple[int, int] | None:
    """The word with what a flag gives, and where in it that begins; None if it gives nothing."""
    for number, word in enumerate(argv):
        match = re.match(rf"--?{flag}(=|$)", word)
        if match and (match[1] or number + 1 < len(argv)):
            return (number, match.end()) if match[1] else (number + 1, 0)
    return None


def _given(argv: Sequence[str], flag: str) -> str:
    """What a flag gives, "" if it gives nothing; before flags are parsed."""
    place = _place_of(argv, flag)
    return os.path.expanduser(argv[place[0]][place[1] :]) if place else ""


def _recipe(argv: Sequence[str]) -> str:
    """The file that --config names, "" if there is none."""
    return _given(argv, "config").partition(":")[0]


def _with_file_of_recipe(argv: Sequence[str]) -> list[str]:
    """The arguments, with the file of the recipe that --config names.

    Raises:
      ConfigError: there is no such recipe; the flag itself would tell later, and not its name.
    """
    words = list(argv)
    if place := _place_of(argv, "config"):
        number, start = place
        words[number] = words[number][:start] + recipes.with_file(words[number][start:])
    return words


def _in_plain_words(said: str) -> str:
    """A flag's error, without what Python and absl call a value of another type."""
    said = re.sub(r"invalid literal for int\(\).*", "must be an integer, in digits alone", said)
    said = re.sub(
        r"flag --([\w.]+)=(.*): Failed to parse .* as a ConfigDict.*",
        r"--\1=\2: it is a group of fields: write --\1.FIELD=VALUE",
        said,
    )
    said = re.sub(r"\('Non-boolean argument.*", "must be true or false", said)
    return re.sub(r"could not convert string to float.*", "must be a number", said)


def _like(error: flags.UnrecognizedFlagError) -> str:
    """A hint at what an unknown flag may have meant: another flag, else a field of the recipe."""
    named = list(flags.FLAGS)
    like = difflib.get_close_matches(error.flagname.replace("-", "_"), named, n=1, cutoff=0.8)
    if not like and "config" in flags.FLAGS and (near := near_field(error.flagname)):
        like = [f"config.{near}"]
    return f"; did you mean --{like[0]}?" if like else "; --help lists those that there are"


def _no_group(said: str, argv: Sequence[str]) -> str:
    """The error for a flag below a group that the recipe has not; `said` begins with its name."""
    name = re.sub(r"^'([^']*)'.*", r"\1", said)
    words = [re.sub(r"^--?|=.*", "", word) for word in argv if re.match(r"--?config\.", word)]
    flag = next((word for word in words if name in word.split(".")), "")
    if flag.startswith("config.data.sources."):
        return (
            f"--{flag}: the recipe has no source {name!r}; flags change the sources that it has, "
            "and others are named in a recipe of your own (docs/DATA.md)"
        )
    near = re.search(r'mean "([^"]*)"', said)
    hint = f"; did you mean --{flag.replace(name, near[1], 1)}?" if flag and near else ""
    return f"--{flag or 'config'}: there is no group of fields {name!r}{hint}"
