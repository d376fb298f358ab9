"""Copies of a run's state on its hosts' own disks, for the steps between two checkpoints.

Each process writes the cells of its devices (`cells`) to its disk (`local_disk`) every so many
steps: training waits while they are copied to the host's memory, not for the disk. When the run is
started again the newest step goes on that is whole on the disks of all (`local_search`).

A start of a run is known by a random name, which the run's folder has (local.json) and each copy
bears. A start that goes on from a copy gives it its own name too; one that goes on from elsewhere
has thereby discarded all copies before it. So has one whose newest checkpoint is older than the one
that a copy came after: somebody has removed that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from moepp_jax import local_search, processes, regular
from moepp_jax.cells import Cells
from moepp_jax.local_disk import Copy, Disk
from moepp_jax.state import Assembly, State
from moepp_jax.storage import AnyPath, is_local, open_path, reason, write_atomic, writing

_FILE = "local.json"


class LocalCopies:
    """The local copies of a run; every process of the run makes each call.

    Without `config.train.local_dir` there are none, and each call does nothing.

    Raises:
      ConfigError: config.train.local_dir cannot be written; in all processes.
    """

    def __init__(self, parts: Assembly, workdir: str | os.PathLike):
        t = parts.config.train
        self._dir, self._every, self._workdir = t.local_dir, t.local_every, open_path(workdir)
        self._disk: Disk | None = None
        self._taken: list[Copy] = []  # that the run goes on from
        self._start: str | None = None  # the name of this one, until `begin` of the last one
        self._writing: Future | None = None
        self._written = -1  # the newest step that this process has written
        self._failed = False
        if self._dir:
            self._cells = Cells(parts.abstract, parts.mesh)
            self._disk = processes.agree(self._opened)
            self._pool = ThreadPoolExecutor(max_workers=1)

    def newest(self, than: int | None, report: Callable[[str], Any]) -> tuple[State, int] | None:
        """The state and step of the newest whole copy of this run, if it is newer than a step.

        If there are copies, or should be, and none is used, a line says why.
        """
        if self._disk is None:
            return None
        self._start, checkpoint = _start(self._workdir), _newest_checkpoint(self._workdir)
        sought = local_search.Sought(self._start, -1 if than is None else than, checkpoint)
        found = local_search.newest(self._disk, self._cells, sought, report)
        if found is None:
            return None
        report(f"going on from the local copy of step {found.step}")
        self._taken, self._written = found.copies, found.step
        return self._cells.placed(found.cells), found.step

    def begin(self) -> None:
        """Names this start, in the copies that it goes on from too; others go. Before training.

        Raises:
          ConfigError: a disk cannot be written; in all processes.
        """
        file = self._workdir / _FILE
        if self._disk is None:
            if processes.is_first():
                file.unlink(missing_ok=True)
            return
        before, self._start = self._start, processes.of_each(lambda: uuid.uuid4().hex)[0]

        def adopt() -> None:
            with self._writing_there():
                self._disk.keep_only(self._taken, starts=[before, self._start])

        processes.agree(adopt)
        # Only now: if this is as far as it comes, the copies are still those of a start.
        processes.on_first(lambda: write_atomic(file, json.dumps({"start": self._start})))

    def is_due(self, step: int) -> bool:
        return self._disk is not None and step % self._every == 0

    def save(self, step: int, state: State) -> None:
        """Starts to write this step, when all processes have written the one before."""
        self._wait()
        checkpoint = _newest_checkpoint(self._workdir) if processes.is_first() else -1
        told = processes.of_each(lambda: f"{self._written} {checkpoint}")
        numbers = [tuple(map(int, said.split())) for said in told]
        whole, own = min(written for written, _ in numbers), self._written
        note = {"starts": [self._start], "after": numbers[0][1], "layout": self._cells.layout}
        cells = self._cells.copied(state)

        def write() -> None:
            self._disk.prune(whole, own)
            self._disk.write(step, cells, note)
            self._written = step

        self._writing = self._pool.submit(write)

    def close(self) -> None:
        """Removes all copies, when what they are for has been saved."""
        if self._disk is None:
            return
        self._wait()
        self._disk.clear()
        if processes.is_first():
            (self._workdir / _FILE).unlink(missing_ok=True)

    def _wait(self) -> None:
        """Until nothing is being written. A disk that is full costs its copies, not the run."""
        writing, self._writing = self._writing, None
        try:
            if writing:
                writing.result()
        except OSError as error:
            if not self._failed:
                print(
                    f"process {jax.process_index()}: no local copy can be written to {self._disk}: "
                    f"{reason(error)}; the run goes on, and tries it again every {self._every} "
                    "steps",
                    file=sys.stderr,
                )
            self._failed = True

    def _opened(self) -> Disk:
        process = jax.process_index()
        folder = Path(self._dir.replace("{process}", str(process))).absolute()
        with self._writing_there():
            return Disk(folder / _name(self._workdir), process)

    def _writing_there(self) -> contextlib.AbstractContextManager[None]:
        return writing(
            f"config.train.local_dir = {self._dir!r}",
            "give a folder on a disk of each host, or an empty one for no local copies",
        )


def _name(workdir: AnyPath) -> str:
    """Of a run's folder on a disk on which other runs may have theirs."""
    place = workdir.resolve() if is_local(workdir) else workdir
    digest = hashlib.sha256(str(place).rstrip("/").encode()).hexdigest()
    return f"{place.name}-{digest[:12]}"


def _start(workdir: AnyPath) -> str | None:
    """The name of the last start; None if it had no local copies."""
    try:
        return str(regular.read_json(workdir / _FILE)["start"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _newest_checkpoint(workdir: AnyPath) -> int:
    """That is written to its end, be it damaged by now; -1 if there is none."""
    folder = workdir / "checkpoints"
    return max(ocp.utils.checkpoint_steps(folder), default=-1) if folder.exists() else -1
