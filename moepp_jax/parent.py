"""The run that another one starts from: its parent.

`train --init_from=WORKDIR[@STEP]` starts from a checkpoint's parameters, the routing rule's state
among them, and with `--init_optimizer` from AdamW's moments too, on any mesh. The new run begins at
step 0, and its learning rate where its own schedule begins.

A parameter must mean what it meant: `alike` says which fields must be the parent's. The new run's
tokenizer is the parent's: an empty config.data.tokenizer is filled in with the copy of it that the
new run keeps.

parent.json in the new run's folder remembers the parent. It is written before config.json, as the
tokenizer is: a folder that has this one is whole. When the new run has a checkpoint of its own, it
needs its parent no more.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from typing import Any

import jax

from moepp_jax import alike, checksums, model, processes, regular
from moepp_jax import state as state_lib
from moepp_jax.checkpoint import Checkpoints
from moepp_jax.config import Config
from moepp_jax.data import Tokenizer
from moepp_jax.errors import ConfigError
from moepp_jax.moe import param
from moepp_jax.special_tokens import GENERATION
from moepp_jax.storage import open_path, same_place
from moepp_jax.workdir import holds_run, own_tokenizer, read_config, tokenizer_file

FILE = "parent.json"


@dataclasses.dataclass(frozen=True)
class Parent:
    """A checkpoint to start from.

    Attributes:
      workdir: of the parent, as it was given.
      step: of the checkpoint; None: the best on held-out text, else the newest, not chosen yet.
      optimizer: whether the moments are taken along.
      checksum: of the checkpoint; empty until it has been looked for.
    """

    workdir: str
    step: int | None = None
    optimizer: bool = False
    checksum: str = ""

    def __str__(self) -> str:
        return self.workdir if self.step is None else f"{self.workdir}@{self.step}"


def given(init_from: str | None, init_optimizer: bool = False) -> Parent | None:
    """The parent that flags name: WORKDIR or WORKDIR@STEP.

    The last @ counts, and only before a number; a folder whose own name ends so is written with a
    slash behind it.

    Raises:
      ConfigError: the flag names nothing, or the optimizer of no parent is asked for.
    """
    if init_from == "":
        raise ConfigError(
            "--init_from= is empty: give --init_from=WORKDIR[@STEP], or leave it out to start anew"
        )
    if init_from is None:
        if init_optimizer:
            raise ConfigError(
                "--init_optimizer takes along the optimizer of the run that --init_from names: "
                "give --init_from=WORKDIR[@STEP] too"
            )
        return None
    named = re.fullmatch(r"(.+)@(\d+)", init_from)
    workdir, step = (named[1], int(named[2])) if named else (init_from, None)
    return Parent(workdir, step, init_optimizer)


def of_run(workdir: str | os.PathLike, wanted: Parent | None) -> Parent | None:
    """The parent of the run in this folder, as it was when it started; of a new run, the wanted.

    Raises:
      ConfigError: the run there has another parent than the wanted one, or none; or a run would be
        its own parent.
    """
    if wanted and same_place(wanted.workdir, workdir):
        raise ConfigError(
            f"--init_from={wanted} is the --workdir of the run itself: give a new --workdir, or "
            "leave --init_from out to go on with that run"
        )
    if not holds_run(workdir):
        return wanted
    there = _read(workdir)
    if wanted and there is None:
        raise ConfigError(
            f"workdir {workdir} holds a run that was not started from another one, so "
            f"--init_from={wanted} cannot be: leave it out to go on, or give another --workdir"
        )
    if wanted and not _is(wanted, there):
        raise ConfigError(
            f"workdir {workdir} holds a run that was started with {_flags(there)}, not with "
            f"{_flags(wanted)}: give the same again, or another --workdir"
        )
    if wanted is None or same_place(wanted.workdir, there.workdir):
        return there
    return dataclasses.replace(there, workdir=wanted.workdir)


def _is(wanted: Parent, there: Parent) -> bool:
    """Whether they are one checkpoint, whose folder may have been moved."""
    if wanted.step not in (None, there.step) or wanted.optimizer != there.optimizer:
        return False
    if same_place(wanted.workdir, there.workdir):
        return True
    return there.checksum != "" and _checksum(wanted.workdir, there.step) == there.checksum


def _checksum(workdir: str, step: int | None) -> str:
    return checksums.of_all(open_path(workdir) / "checkpoints" / str(step))


def _flags(parent: Parent) -> str:
    return f"--init_from={parent}{' --init_optimizer' if parent.optimizer else ''}"


def _read(workdir: str | os.PathLike) -> Parent | None:
    file = open_path(workdir) / FILE
    if not file.exists():
        return None
    try:
        return Parent(**regular.read_json(file))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{file} cannot be read as the parent of a run: {regular.why(error)}"
        ) from error


def files(parent: Parent) -> dict[str, str | bytes]:
    """What the new run's folder has of it before its config.json."""
    written: dict[str, str | bytes] = {
        FILE: json.dumps(dataclasses.asdict(parent), indent=2) + "\n"
    }
    generation = open_path(parent.workdir) / GENERATION
    if generation.exists():
        try:
            written[GENERATION] = regular.read_bytes(generation)
        except OSError as error:
            raise ConfigError(f"{generation} cannot be read: {error.strerror}") from error
    return written


def with_tokenizer(config: Config, workdir: str | os.PathLike, parent: Parent | None) -> Config:
    """The configuration of a run with this parent: the tokenizer is its own copy of the parent's,
    where none is named or that one is."""
    named = config.data.tokenizer
    if parent is None or (named and not same_place(named, tokenizer_file(parent.workdir))):
        return config
    return config.replace("data", tokenizer=_copy(workdir, parent))


def to_prepare(config: Config, workdir: str | os.PathLike, parent: Parent | None) -> Config:
    """The same, with the parent's tokenizer as long as there is no copy."""
    if parent is None or config.data.tokenizer != _copy(workdir, parent):
        return config
    if tokenizer_file(workdir).exists():
        return config
    return config.replace("data", tokenizer=str(tokenizer_file(parent.workdir)))


def _copy(workdir: str | os.PathLike, parent: Parent) -> str:
    return own_tokenizer(workdir, tokenizer_file(parent.workdir).name)


def located(parent: Parent, config: Config, workdir: str | os.PathLike) -> Parent:
    """The parent with its step and checksum, if a run of this configuration can start from it.

    Every process calls it. Parameters and moments are not read yet.

    Raises:
      ConfigError: it holds no run, is of another model or tokenizer, has no optimizer state that is
        wanted, or is not the checkpoint that it was.
      CheckpointError: the step is not there.
    """
    processes.agree(lambda: _require_alike(parent, config, workdir))
    with _checkpoints(parent) as checkpoints:
        # Of a parent that is still trained the next process might see another newest one.
        step = processes.of_first(checkpoints.choose(parent.step))
        found = dataclasses.replace(parent, step=step, checksum=checkpoints.checksum(step))
        if parent.optimizer and checkpoints.has_only_params(step):
            raise ConfigError(
                f"--init_from={found} has no optimizer state, as it was converted and not trained: "
                "leave out --init_optimizer"
            )
    if parent.checksum not in ("", found.checksum):
        raise ConfigError(
            f"--init_from={found} is not the checkpoint any more that {workdir} was started from: "
            "give another --workdir"
        )
    return found


def state(parent: Parent, parts: state_lib.Assembly) -> state_lib.State:
    """The state in which a run with this parent starts. Every process calls it.

    Raises:
      CheckpointError: the step is not there, or is damaged.
    """
    with _checkpoints(parent) as checkpoints:
        if parent.optimizer:
            later = state_lib.LATER
            state = checkpoints.restore(parent.step, parts.abstract, optional=later)
            return state_lib.restarted(state, parts)
        params = checkpoints.restore_params(parent.step, parts.abstract.params)
    return state_lib.state_of(params, parts)


def _checkpoints(parent: Parent) -> Checkpoints:
    return Checkpoints(parent.workdir, keep=1)  # nothing is saved there


def _require_alike(parent: Parent, config: Config, workdir: str | os.PathLike) -> None:
    try:
        theirs = read_config(parent.workdir)
    except ConfigError as error:
        raise ConfigError(f"--init_from={parent}: {error}") from error
    lines = [
        f"  config.{name}: {there!r} there, {here!r} here"
        for name, (there, here) in alike.unlike(theirs, config).items()
    ] + _shapes(theirs, config)
    if lines:
        raise ConfigError(
            f"--init_from={parent} is of another model, whose parameters mean something else:\n"
            + "\n".join(lines)
            + f"\nGive its values; --config=run:{parent.workdir} has them all."
        )
    file = tokenizer_file(parent.workdir)
    if not file.exists():
        raise ConfigError(f"--init_from={parent}: {file} is missing: put its tokenizer there")
    named = to_prepare(config, workdir, parent).data.tokenizer
    if Tokenizer.load(named).fingerprint != Tokenizer.load(file).fingerprint:
        raise ConfigError(
            f"config.data.tokenizer = {named!r} is not the tokenizer of --init_from={parent}: "
            f"leave the field empty, which takes {file}"
        )


def _shapes(theirs: Config, ours: Config) -> list[str]:
    """The parameters whose shapes differ, five of them at most."""
    there, here = (_shapes_of(config) for config in (theirs, ours))
    lines = [
        f"  {name}: {there.get(name, 'absent')} there, {here.get(name, 'absent')} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    return lines[:5] + ([f"  and {len(lines) - 5} more shapes"] if len(lines) > 5 else [])


def _shapes_of(config: Config) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(model.describe(config))
    return {param.path_of(path): p.shape for path, p in leaves}
