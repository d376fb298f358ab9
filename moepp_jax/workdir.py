"""The working directory of a run: a folder with the configuration that made what lies in it.

It is local or in an object store (gs://, s3://).

`config.json` is written once, by the first run. A later run in the same folder continues it, so it
must compute the same thing. It may go on for longer: then the new number of steps is noted there.
Where nothing was trained yet, in a folder that a conversion made, all but what the parameters there
mean may change until training begins (`holds_start`).

The folder can be moved. Its tokenizer is a copy that it keeps, which config.json names by the name
that it has here; `read_config` says where that is now. What data the run works on is noted by
fingerprint in `data.json`, so it may lie elsewhere tomorrow.
"""

import contextlib
import errno
import importlib.util
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from moepp_jax import alike, claim, earlier, lease, regular, seal
from moepp_jax.config import Config, differences
from moepp_jax.errors import ConfigError
from moepp_jax.special_tokens import GENERATION, SETTINGS
from moepp_jax.storage import AnyPath, is_local, open_path, size, write_atomic

TOKENIZERS = ("tokenizer.model", "tokenizer.json")
DATA = "data.json"

# What a new folder gets before its config.json, so that one which has this is whole.
_BEFORE = (*TOKENIZERS, SETTINGS, GENERATION, DATA)

_CONFIG = "config.json"
_METRICS = "metrics.jsonl"
_LOCK, _LEASE = ".train.lock", ".train.lease"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

# Fields (or groups, with the dot) that may change between runs: they say where, how often and on
# what a run works, not what it computes.
_FREE = (
    "mesh.",
    "generate.",
    "model.attention",
    "moe.exchange_parts",
    "data.dir",
    "data.tfds_dir",
    "data.worker_processes",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.save_every",
    "train.keep",
    "train.on_save_error",
    "train.local_dir",
    "train.local_every",
    "train.on_nonfinite",  # a run that has diverged may go on without the batch that it was
    "train.max_skipped",
    "train.skip_above",
    "train.hang_factor",
    "train.hang_seconds",
)

# And this of a run whose data is noted by fingerprint.
_PLACE_OF_TEXT = re.compile(r"data\.sources\..+\.path")


def check_workdir(path: str | os.PathLike, config: Config, may_hold: Collection[str] = ()) -> None:
    """Refuses a folder in which this run cannot be; touches nothing.

    Args:
      may_hold: names of files that a new folder may have beside those, left by a start that was
        killed.

    Raises:
      ConfigError: the folder belongs to a run of another configuration or to something else, or
        cannot be written.
    """
    folder = open_path(path)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"workdir {folder} is a file: give --workdir a folder, or a new name")
    if (folder / _CONFIG).exists():
        require_same(folder, config, may_grow=True)
    elif folder.exists() and any(
        not entry.name.startswith(".") and entry.name not in (*_BEFORE, *may_hold)
        for entry in folder.iterdir()
    ):
        raise ConfigError(
            f"workdir {folder} holds files but no {_CONFIG}, so it is no run of ours: give "
            "--workdir a new or an empty folder"
        )
    if is_local(folder):
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not os.access(there, os.W_OK):
            raise ConfigError(f"workdir {folder} cannot be written: {there} is read-only for you")


def open_workdir(
    path: str | os.PathLike, config: Config, first: Mapping[str, str | bytes] | None = None
) -> AnyPath:
    """The folder of this run, made and given its config.json if it is new.

    One that is there is given the number of steps, if that has grown, and nothing else; one where
    nothing was trained yet is given this configuration.

    Args:
      first: files of a new folder, by name, which are written before its config.json.

    Raises:
      ConfigError: as `check_workdir`, or the folder cannot be written.
    """
    first = dict(first or {})
    check_workdir(path, config, first)
    folder = open_path(path)
    try:
        if not (folder / _CONFIG).exists():
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in first.items():
                write_atomic(folder / name, content)
            write_atomic(folder / _CONFIG, _written(config, folder))
        else:
            there = read_config(path)
            if (now := _noted(path, there, config)) != there:
                write_atomic(folder / _CONFIG, _written(now, folder))
    except OSError as error:
        raise ConfigError(f"workdir {folder} cannot be written: {error}") from error
    return folder


def _noted(path: str | os.PathLike, there: Config, config: Config) -> Config:
    """What config.json is to say when a run that is there goes on with this configuration."""
    if holds_start(path):
        return config
    return there.replace("train", steps=max(there.train.steps, config.train.steps))


def _written(config: Config, folder: AnyPath) -> str:
    """A configuration as the run's folder has it, wherever that is."""
    if config.data.tokenizer:
        config = config.replace("data", tokenizer=tokenizer_file(folder).name)
    return seal.sealed(config.to_dict())


@contextlib.contextmanager
def alone(path: str | os.PathLike, report: Callable[[str], Any] = print) -> Iterator[None]:
    """This process is the only one that trains in a folder while the context lasts.

    What dies lets go of it, however it dies: at once on a disk, and in an object store, or on a
    disk that knows no locks, for others after some time (`lease`).

    Args:
      report: told that others may be waited for.

    Raises:
      ConfigError: another process trains there; or the folder cannot be written.
    """
    folder = open_path(path)
    with contextlib.ExitStack() as held:
        try:
            if not is_local(folder) or not _is_locked(folder, held):
                held.enter_context(lease.held(folder / _LEASE, report))
        except claim.TakenError as error:
            raise ConfigError(
                f"workdir {folder}: {error.holder}, trains there: wait for it, stop it, or give "
                "another --workdir"
            ) from error
        except OSError as error:
            raise ConfigError(f"workdir {folder} cannot be written: {error}") from error
        yield


def _is_locked(folder: AnyPath, held: contextlib.ExitStack) -> bool:
    """Whether a lock is held now; it is not where the disk knows none."""
    try:
        held.enter_context(claim.claimed(folder / _LOCK, leave=False))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def holds_run(path: str | os.PathLike) -> bool:
    return (open_path(path) / _CONFIG).exists()


def holds_start(path: str | os.PathLike) -> bool:
    """Whether a run is there in which nothing was trained: its parameters alone, from elsewhere."""
    folder = open_path(path)
    saved, measured = folder / "checkpoints", folder / _METRICS
    steps = [entry for entry in saved.iterdir() if entry.name.isdigit()] if saved.is_dir() else []
    if not holds_run(path) or not steps or any(map(_has_rest, steps)):
        return False
    return not measured.exists() or not size(measured)


def _has_rest(step: AnyPath) -> bool:
    """Whether it is of a training state; what may not be looked into is none from elsewhere."""
    try:
        return (step / "rest").exists()
    except PermissionError:
        return True


def read_config(
    path: str | os.PathLike, report: Callable[[str], Any] = lambda line: None
) -> Config:
    """The configuration that the run in this folder was made with.

    Args:
      report: told, in one line, of fields that came after the run was made and change nothing.

    Raises:
      ConfigError: there is no run, or its config.json cannot be read, is not as it was written,
        lacks fields whose values cannot be known, or has unknown ones.
    """
    file = open_path(path) / _CONFIG
    if not file.exists():
        if file.parent.exists() and not file.parent.is_dir():
            raise ConfigError(f"workdir {path} is a file: give --workdir the folder of a run")
        if file.parent.is_dir():
            raise ConfigError(
                f"workdir {path} holds no run, as it has no {_CONFIG}: give --workdir the folder "
                "of one, which `moepp train` or `moepp convert` made"
            )
        raise ConfigError(
            f"workdir {path} is no folder: `moepp train --config=RECIPE --workdir={path}` makes it"
        )
    try:
        fields = regular.read_json(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {regular.why(error)}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{file} is no configuration: it must be a JSON object of fields")
    if "model_type" in fields:
        raise ConfigError(
            f"{path} is a model in Hugging Face's layout, not a run: `moepp convert` makes one"
        )
    try:
        fields = seal.opened(fields)
    except ValueError as error:
        raise ConfigError(f"{file} {error}; `--config=RECIPE` then names what differs") from error
    fields, added = earlier.completed(fields)
    _require_no_code(fields, file)
    try:
        config = Config.parse(fields)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    named = config.data.tokenizer
    if named and (named in TOKENIZERS or tokenizer_file(path).exists()):
        config = config.replace("data", tokenizer=own_tokenizer(path))
    told = [field for field in added if not field.startswith(_FREE)]
    if told:
        report(f"{file} is of an earlier version; it is read with {', '.join(told)}")
    return config


def _require_no_code(fields: Mapping[str, Any], file: AnyPath) -> None:
    """Refuses a routing rule that lies in the folder of the run itself, which may be anybody's.

    One that a user wrote is in a package, or in the folder where that user works.
    """
    group = fields.get("moe")
    rule = group.get("rule") if isinstance(group, dict) else None
    kind = rule.get("type") if isinstance(rule, dict) else None
    if not isinstance(kind, str) or ":" not in kind or not is_local(file):
        return
    package = kind.partition(":")[0].partition(".")[0]
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return  # told by who imports it
    places = [found.origin, *(found.submodule_search_locations or ())] if found else []
    folder = file.parent.resolve()
    if any(place and folder in Path(place).resolve().parents for place in places):
        raise ConfigError(
            f"{file}: config.moe.rule.type = {kind!r} is code in the folder of the run, which is "
            "not executed: read it, and move it to where you trust it, as a package or beside it"
        )


def tokenizer_file(path: str | os.PathLike) -> AnyPath:
    """Where a run keeps the tokenizer that its model was trained with, of whichever kind it is.

    A folder without one gets the first of these names.
    """
    files = [open_path(path) / name for name in TOKENIZERS]
    return next((file for file in files if file.exists()), files[0])


def data_file(path: str | os.PathLike) -> AnyPath:
    """Where a run notes the data that it began with."""
    return open_path(path) / DATA


def own_tokenizer(path: str | os.PathLike, name: str = "") -> str:
    """Where a run keeps its tokenizer, as a configuration names it.

    Args:
      name: of the file, by default that which is there.
    """
    file = open_path(path) / name if name else tokenizer_file(path)
    return str(file.absolute() if is_local(file) else file)


def keep_tokenizer(folder: AnyPath, tokenizer: Any) -> None:
    """Puts the Tokenizer into the run's folder, so that the run can be used without its data.

    Its class is not imported here: analysis reads folders of runs, and goes without JAX.

    Raises:
      ConfigError: the run was started with another tokenizer.
    """
    file = tokenizer_file(folder)
    if not file.exists():
        # The tokenizer's own file is the last: where it is, all are.
        for name, content in reversed(tokenizer.files.items()):
            write_atomic(folder / name, content)
    elif type(tokenizer).load(file).fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"{file} is not the tokenizer of the prepared data: the run was started on other text; "
            "give another --workdir, or prepare that text again"
        )


def require_same(folder: str | os.PathLike, config: Config, may_grow: bool = False) -> None:
    """Refuses a configuration that computes something else than the run in this folder did.

    Where nothing was trained yet, one to which the parameters there mean something else.

    Args:
      may_grow: it may have more steps.

    Raises:
      ConfigError: names every field that differs, with both values.
    """
    there = read_config(folder)
    changed = differences(there.to_dict(), config.to_dict())
    if holds_start(folder):
        meant = alike.unlike(there, config).keys() | {"data.tokenizer"}
        changed = {name: values for name, values in changed.items() if name in meant}
    elif may_grow and there.train.steps < config.train.steps:
        changed.pop("train.steps")
    if config.data.tokenizer and _is_copied(config.data.tokenizer, folder):
        changed.pop("data.tokenizer", None)
    pinned = data_file(folder).exists()
    lines = [
        f"  config.{name}: {there!r} there, {now!r} now"
        for name, (there, now) in changed.items()
        if not (name.startswith(_FREE) or (pinned and _PLACE_OF_TEXT.fullmatch(name)))
    ]
    if lines:
        shrinks = may_grow and "train.steps" in changed
        raise ConfigError(
            f"workdir {folder} holds a run of another configuration:\n"
            + "\n".join(lines)
            + "\nGive another --workdir, or the old values."
            + (" config.train.steps may only grow." if shrinks else "")
        )


def _is_copied(named: str, folder: str | os.PathLike) -> bool:
    """Whether the tokenizer that a configuration names is the run's copy, or what was copied.

    On another machine that file may not be there: the copy is.
    """
    copy, file = tokenizer_file(folder), open_path(named)
    if not copy.exists():
        return False
    return not file.exists() or (file.is_file() and file.read_bytes() == copy.read_bytes())
