"""Where runs are broken: the job's command, its data, and the run that nobody disturbed."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moepp_jax import mesh as mesh_lib
from moepp_jax import state as state_lib
from moepp_jax.checkpoint import Checkpoints
from moepp_jax.config import Config
from moepp_jax.metrics import read_metrics
from tests import hurry
from tests.chaos import recipe
from tests.chaos.forked import Forked
from tests.chaos.trial import Lost

ROOT = Path(__file__).parents[2]
MAIN = [sys.executable, "-m", "moepp_jax.main"]

# Seconds after which a command of the job hangs: it takes a few of them, more on a busy machine.
LIMIT = 240.0

# What orbax says on a busy machine.
_SLOW = re.compile(r"^W.* Waiting for previous save to complete took .*\n", re.MULTILINE)

_JAX = threading.Lock()  # trials run in threads


class Said(NamedTuple):
    """What a process said until it ended."""

    status: int
    out: str
    err: str


class Room:
    """A folder with what all trials share.

    Attributes:
      data: the prepared data.
      whole: the folder of the run that nobody disturbed.
      seconds: from its start to its first step, and to its end, where all is compiled.
      several: held by a trial of several processes, which keep a small machine busy: beside others
        of their kind they would end later than they must.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.data, self.whole = folder / "data", folder / "whole"
        of_tests = ("XLA_FLAGS", "PJRT_NPROC")
        self.environment = {k: v for k, v in os.environ.items() if k not in of_tests} | {
            "XLA_FLAGS": hurry.XLA_FLAGS,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        self.seconds = (0.0, 0.0)
        self.several = threading.Lock()

    def begin(self) -> None:
        """Makes all of it.

        Raises:
          Lost: the job does not run, or two runs of it differ.
        """
        require_ended(ended(self.start(self.whole)))
        again, began = self.folder / "again", time.monotonic()
        process = self.start(again)
        while not (again / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        stepped = time.monotonic() - began
        require_ended(ended(process))
        self.seconds = (stepped, time.monotonic() - began)
        self.require_whole(again)

    def arguments(self, run: Path, data: Path | None = None) -> list[str]:
        """Of the command that is the job, new or to go on."""
        return ["train", recipe_of(data or self.data), f"--workdir={run}"]

    def start(self, run: Path, *flags: str, **how: Any) -> subprocess.Popen:
        """The job, with more flags, in a process to be broken; how: as for `popen`."""
        return self.popen([*self.arguments(run), *flags], **how)

    def popen(
        self,
        arguments: Sequence[str],
        under: Sequence[str] = (),
        moepp: Sequence[str] = MAIN,
        environ: Mapping[str, str] | None = None,
    ) -> subprocess.Popen:
        """`moepp` with these arguments, in a process to be broken.

        Args:
          under: a command that runs it.
          moepp: how it is started, if not as it is.
          environ: what is in its environment besides.
        """
        command, pipe = [*under, *moepp, *arguments], subprocess.PIPE
        variables = self.environment | dict(environ or {})
        return subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=pipe, stderr=pipe, text=True
        )

    def said(self, arguments: list[str]) -> Said:
        """What the command with these arguments said until it ended.

        Raises:
          Lost: it hangs.
        """
        process = Forked(arguments, self.environment, Path(tempfile.mkdtemp(dir=self.folder)) / "s")
        status = process.wait(LIMIT)
        if status is None:
            raise Lost(f"still ran after {LIMIT:g} s: {process.err()[-300:]}")
        return Said(status, process.out(), _SLOW.sub("", process.err()))

    def interrupted(self, run: Path) -> None:
        """A copy of the whole run as a kill before its last save would have left it."""
        shutil.copytree(self.whole, run, symlinks=True)
        shutil.rmtree(run / "checkpoints" / str(recipe.STEPS))

    def require_resumed(self, run: Path, *flags: str) -> Said:
        """Goes on with a run, with more flags; it must end as the one that nobody disturbed.

        Raises:
          Lost: it does not.
        """
        said = require_ended(self.said([*self.arguments(run), *flags]))
        self.require_whole(run)
        return said

    def require_whole(self, run: Path, whole: Path | None = None) -> None:
        """
        Args:
          whole: the undisturbed run, if it is another one than the job's.

        Raises:
          Lost: the run's last state is not that of the undisturbed one, bit for bit, or a step was
            not logged once.
        """
        self.require_equal(run, whole)
        rows = read_metrics(run)
        steps = [row["step"] for row in rows if "loss" in row]
        evaluated = [row["step"] for row in rows if "eval_loss" in row]
        if steps != [*range(1, recipe.STEPS + 1)]:
            raise Lost(f"steps are not logged once each: {steps}")
        if evaluated != [*range(recipe.EVAL_EVERY, recipe.STEPS + 1, recipe.EVAL_EVERY)]:
            raise Lost(f"evaluations are not logged once each: {evaluated}")

    def require_equal(self, run: Path, whole: Path | None = None) -> None:
        """
        Raises:
          Lost: the run's last state is not that of the undisturbed one, bit for bit.
        """
        with _JAX:
            mine, expected = self._state(run), self._state(whole or self.whole)
        for name, value in expected.items():
            if mine[name].tobytes() != value.tobytes():
                raise Lost(f"{name} is not what it is in the undisturbed run")

    @functools.cached_property
    def _abstract(self):
        config = Config.parse(recipe.get_config(str(self.data)))
        return state_lib.assemble(config, mesh_lib.make_mesh(config, jax.devices()[:1])).abstract

    def _state(self, run: Path) -> dict[str, np.ndarray]:
        with Checkpoints(run, keep=3) as checkpoints:
            state = checkpoints.restore(recipe.STEPS, self._abstract)
        leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def recipe_of(data: Path) -> str:
    """The flag of the job's recipe, with its data in this folder."""
    return f"--config={Path(recipe.__file__).relative_to(ROOT)}:{data}"


def contents(folder: Path) -> dict[Path, str]:
    """A sum of every file."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {f.relative_to(folder): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def require_ended(said: Said) -> Said:
    """
    Raises:
      Lost: its status is not 0.
    """
    if said.status != 0:
        raise Lost(f"ended with status {said.status}: {said.err[-600:]}")
    return said


def ended(process: subprocess.Popen, seconds: float = LIMIT) -> Said:
    """
    Raises:
      Lost: it still runs after so long.
    """
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        _, err = process.communicate()
        raise Lost(f"still ran after {seconds:g} s: {err[-300:]}") from None
    return Said(process.returncode, out, _SLOW.sub("", err))


# An error with a line of its own for each field that differs.
_FIELDS = re.compile(r"\n  config\.[^\n]*|\nGive another --workdir, or the old values\.[^\n]*")


def require_one_line(said: Said, *statuses: int) -> None:
    """
    Raises:
      Lost: it did not end with one of these statuses, by default 1, and one line about why.
    """
    allowed = statuses or (1,)
    if said.status not in allowed:
        wanted = " or ".join(map(str, allowed))
        raise Lost(f"ended with status {said.status}, not {wanted}: {said.err[-300:]}")
    lines = _FIELDS.sub("", said.err).strip().splitlines()
    if len(lines) != 1 or not lines[0].startswith("error: "):
        raise Lost(f"said not one line: {said.err[-600:]}")
