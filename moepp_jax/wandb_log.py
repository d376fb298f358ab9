"""Numbers of a run for Weights & Biases, another copy of metrics.jsonl: no run ends for it.

A process of its own, `wandb_process`, reads that file as it grows and sends what it has not sent
yet. It alone imports wandb: whatever that does with signals, threads and a network that is away, it
does not do it to training. wandb.json in the run's folder says which run of which project this is
and up to which step it was sent, so that one which goes on, here or elsewhere, goes on there too
and sends nothing twice. No key is in it, nor in anything else that is written: wandb itself looks
for that, in WANDB_API_KEY or where `wandb login` has put it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import secrets
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moepp_jax import metrics, regular, seal, worker
from moepp_jax.errors import ConfigError
from moepp_jax.storage import Staging, open_path, write_atomic

FILE = "wandb.json"
MODES = ("online", "offline")

# Seconds that the end of a run may take to send what is left. All of it is in metrics.jsonl, too.
_PATIENCE = 20.0
_PATIENCE_OF_SENDING = 300.0  # where nothing else is done


@dataclasses.dataclass(frozen=True)
class Wandb:
    """What a run was asked to send where.

    Attributes:
      mode: one of MODES; offline, it is written to the run's folder, for `wandb sync`.
    """

    project: str
    mode: str = "online"


def given(project: str | None, mode: str | None = None) -> Wandb | None:
    """What flags ask for; None: nothing, or WANDB_MODE says that it is disabled.

    Args:
      mode: None: what WANDB_MODE says, online by default.

    Raises:
      ConfigError: the package is missing, there can be no such project, or no such mode; or a mode
        is given without a project.
    """
    if project is None:
        if mode is not None:
            raise ConfigError(f"--wandb_mode={mode} of which project? Give --wandb=PROJECT too")
        return None
    mode = mode or {"": "online", "dryrun": "offline"}.get(said := _said("MODE"), said)
    if mode == "disabled":
        return None
    if mode not in MODES:
        raise ConfigError(f"WANDB_MODE={mode} is none of {', '.join(MODES)}, disabled")
    if not re.fullmatch(r"[^/\\#?%:\s]{1,128}", project):
        raise ConfigError(
            f"--wandb={project!r} cannot be a project: write a name of at most 128 characters "
            "without spaces or any of / \\ # ? % : (WANDB_ENTITY says whose it is)"
        )
    package = importlib.util.find_spec("wandb")
    if package is None or package.origin is None:  # a folder of that name is no package
        raise ConfigError("--wandb needs a package that is not installed: pip install wandb")
    return Wandb(project, mode)


def check(workdir: str | os.PathLike, wanted: Wandb | None) -> None:
    """Refuses to send a run that is there elsewhere than before; writes nothing.

    Raises:
      ConfigError: it is of another project or has another id; or wandb.json cannot be read.
    """
    file = open_path(workdir) / FILE
    if wanted is None or not file.exists():
        return
    there, named = read(file), _said("RUN_ID")
    if there["project"] != wanted.project:
        raise ConfigError(
            f"--wandb={wanted.project}, but {workdir} is a run of the project "
            f"{there['project']!r}: give that one; for a run of its own remove {file}"
        )
    if named and named != there["id"]:
        raise ConfigError(
            f"WANDB_RUN_ID={named}, but {workdir} is the run {there['id']!r} ({file}): unset it"
        )


def read(file: Any) -> dict[str, Any]:
    """What wandb.json says: id, project, and step, the last one that was sent (-1: none).

    Raises:
      ConfigError: it is damaged.
    """
    try:
        there = regular.read_json(file)
        return {"id": str(there["id"]), "project": there["project"], "step": int(there["step"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{file} cannot be read as id, project and step: {error!r}; remove it, and all rows "
            "are sent anew, as another run"
        ) from error


@contextlib.contextmanager
def following(
    wanted: Wandb | None,
    workdir: str | os.PathLike,
    staging: Staging,
    report: Callable[[str], Any] = print,
    files: Sequence[Path] = (),
    patience: float = _PATIENCE,
) -> Iterator[None]:
    """Every row of metrics is sent, those that were not sent yet and those written meanwhile.

    Args:
      wanted: None: nothing is done.
      staging: of the run's folder, where these rows grow.
      report: told, in one line each, where the run is to be seen and what goes wrong.
      files: sent too, at the end.
      patience: seconds that may take, past which it is given up.

    Raises:
      ConfigError: as `check`.
    """
    if wanted is None:
        yield
        return
    file = staging.fetch(FILE)
    check(file.parent, wanted)
    if not file.exists():
        fresh = {"id": _said("RUN_ID") or secrets.token_hex(4), "project": wanted.project}
        write_atomic(file, json.dumps(fresh | {"step": -1}, indent=2) + "\n")
    config = (open_path(workdir) / "config.json").read_text(encoding="utf-8")
    job = {
        "mode": wanted.mode,
        "name": os.path.basename(os.path.abspath(workdir)),
        "folder": str(file.parent.absolute()),
        "config": seal.opened(json.loads(config)),
        "files": [str(path.absolute()) for path in files],
    }
    try:
        process = _Process(job, report)
    except OSError as error:
        report(f"Weights & Biases: its process cannot be started: {error}; the run goes on without")
        yield
        return
    try:
        yield
    finally:
        process.end(patience)


def send(
    wanted: Wandb,
    workdir: str | os.PathLike,
    report: Callable[[str], Any] = print,
    files: Sequence[Path] = (),
) -> None:
    """Sends the rows of a run that nobody trains, as far as they were not sent, and files.

    Raises:
      ConfigError: as `check`.
    """
    staging = Staging(workdir)
    try:
        metrics.fetch(staging, workdir)
        with following(wanted, workdir, staging, report, files, _PATIENCE_OF_SENDING):
            pass
    finally:
        staging.close()


class _Process:
    """The one that has wandb: it ends with this one, however that ends, and is never waited for."""

    def __init__(self, job: dict[str, Any], report: Callable[[str], Any]):
        self._report = report
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            worker.command("moepp_jax.wandb_process"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,  # a terminal's Ctrl-C is for this process
        )
        self._say(json.dumps(job))
        self._telling = threading.Thread(target=self._tell, daemon=True)
        self._telling.start()

    def end(self, patience: float) -> None:
        self._say("end")
        try:
            status = self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._report(
                f"Weights & Biases: not all was sent within {patience:.0f} s; the same command "
                "sends the rest"
            )
            status = 0
        finally:  # also of what ends this wait
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)  # wandb's own processes too
            self._process.wait()
        self._telling.join(timeout=1)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if status:
            self._report(f"Weights & Biases: its process has ended with status {status}")

    def _say(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # `end` tells of it
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _tell(self) -> None:
        with self._process.stdout as lines:
            for line in lines:
                self._report(line.rstrip("\n"))


def _said(variable: str) -> str:
    return os.environ.get(f"WANDB_{variable}", "")
