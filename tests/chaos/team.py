"""The job in several processes: how it is started, broken and given again, and how it must end."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests import jobs
from tests.chaos.recipe import STEPS
from tests.chaos.room import Room, Said
from tests.chaos.trial import Lost, Missed

# What is said of a process that has ended for a reason of its own.
GONE = "^error: another process of this run is gone|another task died"

_MAIN = jobs.STUCK_AFTER.format(batches=12)


class Team:
    """So many processes of the job, on one disk.

    Attributes:
      room: what all trials share; its lock `several` is held while a team is at work.
      of: how many they are.
    """

    def __init__(self, room: Room, of: int):
        self.room, self.of = room, of

    def job(self, run: Path, *flags: str, silent: int = -1, under: Sequence[str] = ()) -> jobs.Job:
        """The processes, new or to go on.

        Args:
          silent: the one that does nothing any more after some batches.
          under: a command that runs each of them.
        """
        compiled = {k: v for k, v in self.room.environment.items() if k.startswith("JAX_")}
        mesh = [f"--config.mesh.{axis}=2" for axis in ("fsdp", "expert")]
        arguments = [*self.room.arguments(run), *mesh, "--config.mesh.data=-1", *flags]
        return jobs.Job(
            arguments,
            of=self.of,
            environment=lambda port, number, of: jobs.slurm(port, number, of) | compiled,
            program=["-c", _MAIN],
            flags=lambda number: ["--stuck"] if number == silent else [],
            under=under,
        )

    def whole(self) -> Path:
        """The run that nobody disturbed."""
        run = self.room.folder / f"whole-of-{self.of}"
        if not (run / "ended").exists():
            with self.job(run) as job:
                require_ended(job)
            (run / "ended").touch()
        return run

    def interrupted(self, run: Path) -> None:
        """A copy of the whole run as a kill before its last save would have left it."""
        shutil.copytree(self.whole(), run, symlinks=True)
        shutil.rmtree(run / "checkpoints" / str(STEPS))
        (run / "ended").unlink()

    def require_resumed(self, run: Path, *flags: str) -> Said:
        """Goes on with a run; it must end as the one that nobody disturbed. What process 0 says.

        Raises:
          Lost: it does not.
        """
        with self.job(run, *flags) as job:
            said = require_ended(job)
        self.room.require_whole(run, self.whole())
        return said[0]


def wait_for(job: jobs.Job, until: Callable[[], bool]) -> None:
    """
    Raises:
      Missed, Lost: the run has ended before; it hangs.
    """
    deadline = time.monotonic() + jobs.SECONDS
    while not until():
        if any(process.poll() is not None for process in job.processes):
            raise Missed("the run had ended")
        if time.monotonic() > deadline:
            raise Lost("the run hangs before anything was broken")
        time.sleep(0.01)


def all_said(job: jobs.Job) -> list[Said]:
    """What each has said, when all have ended.

    Raises:
      Lost: one hangs.
    """
    said, deadline = [], time.monotonic() + jobs.SECONDS
    for number, process in enumerate(job.processes):
        try:
            out, err = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            raise Lost(f"process {number} still ran {jobs.SECONDS} s after its start") from None
        said.append(Said(process.returncode, out, err))
    return said


def require_ended(job: jobs.Job) -> list[Said]:
    """
    Raises:
      Lost: one hangs, or its status is not 0.
    """
    said = all_said(job)
    for number, (status, _, err) in enumerate(said):
        if status != 0:
            raise Lost(f"process {number} ended with {status}: {err[-400:]}")
    return said


def require_told(job: jobs.Job, why: str, *statuses: int) -> list[Said]:
    """All end in good order, or all with one line: why, or that one is gone which has said it.

    Args:
      statuses: of those that say why.

    Raises:
      Lost: they do not.
    """
    said, told = all_said(job), 0
    if all(each.status == 0 for each in said):
        return said
    for number, (status, _, err) in enumerate(said):
        lines = re.findall(r"^error: .*", err, re.MULTILINE)
        knows = len(lines) == 1 and re.search(why, lines[0]) and status in statuses
        told += bool(knows)
        left = re.search(GONE, err, re.MULTILINE) and status in (1, -signal.SIGABRT)
        if not (knows or left) or "Traceback" in err:
            raise Lost(f"process {number} ended with {status}: {err[-600:]}")
    if not told:
        raise Lost(f"nobody says why: {[each.err[-300:] for each in said]}")
    return said
