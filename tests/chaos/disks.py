"""Disks that are full, of bytes or of files, or read-only: one line, and the run goes on later.

Small disks in memory, which root alone can mount.
"""

from __future__ import annotations

import contextlib
import functools
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from moepp_jax.checkpoint import SaveError
from tests.chaos import recipe
from tests.chaos.room import Room, ended, require_ended, require_one_line
from tests.chaos.trial import Lost, Missed, Trial

# What does not fit is a checkpoint, or something else of the run.
ENDS = (SaveError.STATUS, 1)

# Of what the whole run takes.
SHARES = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9)


def trials(room: Room, kills: int, seed: int) -> Iterator[Trial]:
    for share in SHARES:
        for kind in ("bytes", "files"):
            fault = functools.partial(_no_room, room, kind, share)
            yield Trial(
                f"disk without room for more {kind}", f"{share:.0%} of its {kind} fit", fault
            )
    for share in SHARES:
        fault = functools.partial(_small_files, room, share)
        yield Trial("files may not grow (RLIMIT_FSIZE)", f"{share:.0%} of the largest", fault)
    for kind in ("bytes", "files"):
        fault = functools.partial(_goes_on, room, kind)
        yield Trial("disk full, and the run is to go on", f"no {kind} more fit", fault)
    for share in (0.05, 0.5):
        fault = functools.partial(_data_on_full_disk, room, share)
        yield Trial("disk full while data are prepared", f"{share:.0%} of it fits", fault)
    yield Trial("read-only", "the whole run", functools.partial(_read_only, room, ""))
    yield Trial("read-only", "checkpoints", functools.partial(_read_only, room, "checkpoints"))
    yield Trial("read-only", "an empty folder", functools.partial(_empty_read_only, room))


@contextlib.contextmanager
def disk(folder: Path, **options: int | str) -> Iterator[Path]:
    """A disk in memory, mounted here.

    Raises:
      Missed: that is not allowed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = ",".join(f"{name}={value}" for name, value in options.items())
    command = ["mount", "-t", "tmpfs", "-o", named, "chaos", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Missed(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def _size(folder: Path) -> int:
    """Bytes of a folder on a disk in memory, which has whole pages."""
    sizes = (file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return sum(-(-size // 4096) * 4096 for size in sizes)


@contextlib.contextmanager
def with_room_for(
    whole: Path, kind: str, share: float, folder: Path
) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A disk for a share of a run's bytes or files, and what makes it large enough."""
    options: dict[str, int | str] = {"size": int(share * _size(whole))}
    if kind == "files":
        options = {"size": "1g", "nr_inodes": int(share * _files(whole)) + 2}
    with disk(folder, **options) as there:
        yield there, lambda: _remount(there, "size=1g,nr_inodes=100000")


def _no_room(room: Room, kind: str, share: float, folder: Path) -> None:
    with with_room_for(room.whole, kind, share, folder / "disk") as (there, make_room):
        _require_stopped(room.start(there / "run"), there / "run")
        make_room()
        room.require_resumed(there / "run")


def _small_files(room: Room, share: float, folder: Path) -> None:
    largest = max(f.stat().st_size for f in room.whole.rglob("*") if f.is_file())
    limit = int(share * largest)
    process = room.start(folder / "run")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    _require_stopped(process, folder / "run")
    room.require_resumed(folder / "run")


def _require_stopped(process: subprocess.Popen, run: Path) -> None:
    """It may end in good order, or with one line and nothing half-written."""
    said = ended(process)
    if said.status == 0:
        return
    require_one_line(said, *ENDS)
    require_nothing_half(run)


def require_nothing_half(run: Path) -> None:
    """
    Raises:
      Lost: something half-written was left.
    """
    half = [file for file in run.rglob("*") if file.name.endswith(("-tmp", ".tmp"))]
    if half:
        raise Lost(f"left {half[0].relative_to(run)} behind")


def _goes_on(room: Room, kind: str, folder: Path) -> None:
    """Checkpoints on a disk that has room for the first one alone, until the run has ended."""
    run, flags = folder / "run", ("--config.train.on_save_error=continue",)
    room.interrupted(run)
    with disk(folder / "disk", size="1g") as there:
        kept = run / "checkpoints"
        shutil.copytree(kept / str(recipe.SAVE_EVERY), there / str(recipe.SAVE_EVERY))
        shutil.rmtree(kept)
        kept.symlink_to(there, target_is_directory=True)
        limits = {"bytes": f"size={_size(there) + 8192}", "files": f"nr_inodes={_files(there) + 4}"}
        _remount(there, limits[kind])
        said = ended(room.start(run, *flags, "--config.train.save_every=3"))
        require_one_line(said, *ENDS)
        warned = re.findall(r"^warning: checkpoint (\d+) .* cannot be saved", said.out, re.M)
        if warned != [str(step) for step in range(6, recipe.STEPS, 3)]:
            raise Lost(f"did not warn at each checkpoint and go on: {said.out[-900:]}")
        _remount(there, "size=1g,nr_inodes=100000")
        room.require_resumed(run, *flags)


def _files(folder: Path) -> int:
    return len([*folder.rglob("*")])


def _data_on_full_disk(room: Room, share: float, folder: Path) -> None:
    run = folder / "run"
    with disk(folder / "disk", size=int(share * _size(room.data))) as there:
        said = room.said(room.arguments(run, there / "data"))
        require_one_line(said, *ENDS)
        if run.exists():
            raise Lost("there is a run without its data")
        _remount(there, "size=1g")
        require_ended(room.said(room.arguments(run, there / "data")))
        room.require_whole(run)


def _read_only(room: Room, what: str, folder: Path) -> None:
    run = folder / "run"
    room.interrupted(folder / "copy")
    with disk(run if not what else folder / "disk", size="1g") as there:
        shutil.copytree(folder / "copy" / what, there, dirs_exist_ok=True)
        if what:
            shutil.copytree(folder / "copy", run, ignore=shutil.ignore_patterns(what))
            (run / what).symlink_to(there, target_is_directory=True)
        _remount(there, "ro")
        require_one_line(room.said(room.arguments(run)), *ENDS)
        _remount(there, "rw")
        room.require_resumed(run)


def _empty_read_only(room: Room, folder: Path) -> None:
    with disk(folder / "disk", size="1g") as there:
        _remount(there, "ro")
        require_one_line(room.said(room.arguments(there / "run")), *ENDS)
        _remount(there, "rw")
        room.require_resumed(there / "run")
