"""Two processes of a run, broken as one is: both say why, and both go on to the same bits.

And four with a disk each, of which a host is lost: the restart reads what a replica holds.
"""

from __future__ import annotations

import functools
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from moepp_jax.checkpoint import SaveError
from tests.chaos import damage, disks, forbidden, strays
from tests.chaos.peers import require_others_end
from tests.chaos.recipe import SAVE_EVERY, STEPS
from tests.chaos.room import Room
from tests.chaos.signals import logged
from tests.chaos.team import Team, all_said, require_told, wait_for
from tests.chaos.trial import Lost, Missed, Trial, dice

_DAMAGED = ("arrays of parameters", "checksums.json")

_LOCAL_EVERY = 2


Survive = Callable[[Team, Path], None]


def trials(room: Room, kills: int, seed: int) -> Iterator[Trial]:
    for fault, case, survive in _of_two(kills, seed):
        alone = functools.partial(_alone, Team(room, 2), survive)
        yield Trial(f"two processes: {fault}", case, alone)
    for victim in range(4):
        fault = functools.partial(_host_lost, Team(room, 4), victim)
        yield Trial("a host of four lost, with its disk", f"process {victim}", fault)


def _of_two(kills: int, seed: int) -> Iterator[tuple[str, str, Survive]]:
    """Faults, cases and trials of them."""
    made, chance = functools.partial, functools.partial(dice, seed, "two")
    for number in range(kills // 10):
        yield "SIGKILL", str(number), made(_killed, chance=chance(number))
    for number in range(kills // 20):
        asked, victim = (signal.SIGTERM, signal.SIGINT)[number // 2 % 2], number % 2
        survive = made(_asked, victim=victim, number=asked, chance=chance("asked", number))
        yield "a signal to one", f"{number}, {asked.name} to process {victim}", survive
    for kind in _DAMAGED:
        for way in damage.WAYS:
            survive = made(_damaged, kind=kind, way=way, chance=chance(kind, way))
            yield f"damaged: {kind}", way, survive
    for stray in strays.STRAYS:
        yield "stray beside checkpoints", stray, made(_stray, stray=stray)
    for content in (None, "{}"):
        case = content or "removed"
        yield "no sums", case, made(_unverified, content=content)
        yield "no sums", f"{case}, --strict", made(_refused, content=content)
    for what in forbidden.BEFORE:
        yield "permission lost before they go on", what, made(_forbidden, what=what)
    for share in (0.3, 0.7):
        for kind in ("bytes", "files"):
            case = f"{share:.0%} of its {kind} fit"
            yield "disk without room", case, made(_no_room, kind=kind, share=share)


def _alone(team: Team, survive: Survive, folder: Path) -> None:
    """While no other trial of several processes is at work."""
    with team.room.several:
        survive(team, folder / "run")


def _killed(team: Team, run: Path, chance: Random) -> None:
    step = chance.randrange(1, STEPS)
    with team.job(run) as job:
        wait_for(job, lambda: logged(run) >= step)
        time.sleep(chance.uniform(0, 0.3))
        for process in job.processes:
            process.kill()
        all_said(job)
    team.require_resumed(run)


def _asked(team: Team, run: Path, victim: int, number: signal.Signals, chance: Random) -> None:
    with team.job(run) as job:
        wait_for(job, (run / "config.json").exists)
        time.sleep(chance.uniform(0, 2))
        job.processes[victim].send_signal(number)
        said = all_said(job)
    statuses = [each.status for each in said]
    if not any(statuses):
        raise Missed("the run had ended")
    # The others hear of it as of a preemption.
    if sorted({*statuses} - {128 + number}) not in ([], [128 + signal.SIGTERM]):
        raise Lost(f"ended with {statuses}: {[each.err[-300:] for each in said]}")
    if not re.search(r"stopped and saved at step \d+; the same", said[0].out):
        raise Lost(f"did not say where they stopped: {said[0].out[-300:]!r}")
    team.require_resumed(run)


def _damaged(team: Team, run: Path, kind: str, way: str, chance: Random) -> None:
    """The checkpoint that they would go on from: an older one serves, or the same bits come."""
    team.interrupted(run)
    newest = run / "checkpoints" / str(STEPS - SAVE_EVERY)
    pattern = damage.FILES[kind].partition(f"/{newest.name}/")[2]
    file = max((f for f in newest.glob(pattern) if f.is_file()), key=lambda f: f.stat().st_size)
    damage.WAYS[way](file, chance)
    said = team.require_resumed(run)
    if kind != "checksums.json" and "is damaged, looking for an older one" not in said.out:
        raise Lost(f"did not say that it is damaged: {said.out[-600:]}")


def _stray(team: Team, run: Path, stray: str) -> None:
    team.interrupted(run)
    strays.STRAYS[stray](run / "checkpoints")
    team.require_resumed(run)


def _unverified(team: Team, run: Path, content: str | None) -> None:
    team.interrupted(run)
    strays.without_sums(run, content)
    said = team.require_resumed(run)
    if "cannot be verified" not in said.out + said.err:
        raise Lost("did not say that it was not verified")


def _refused(team: Team, run: Path, content: str | None) -> None:
    team.interrupted(run)
    strays.without_sums(run, content)
    with team.job(run, "--strict") as job:
        said = require_told(job, "cannot be verified", 1)
    if not said[0].status:
        raise Lost("was not refused")


def _forbidden(team: Team, run: Path, what: str) -> None:
    team.interrupted(run)
    with forbidden.taken(run, what), team.job(run, under=forbidden.for_whom_it_counts()) as job:
        said = require_told(job, forbidden.SAID, SaveError.STATUS, 1)
    if said[0].status and what in forbidden.SPARED:
        raise Lost(f"ended for what they can spare: {said[0].err}")
    team.require_resumed(run)


def _no_room(team: Team, run: Path, kind: str, share: float) -> None:
    whole = team.whole()
    with disks.with_room_for(whole, kind, share, run.parent / "disk") as (disk, make_room):
        with team.job(disk / "run") as job:
            require_told(job, "No space left|room", *disks.ENDS)
        make_room()
        team.require_resumed(disk / "run")
        # Not before: who ends first cannot remove what the other one still writes.
        disks.require_nothing_half(disk / "run")


def _host_lost(team: Team, victim: int, folder: Path) -> None:
    """One of them dies, and its disk with it; what it held has a replica on another's."""
    run = folder / "run"
    local = [f"--config.train.local_dir={folder / 'disk-{process}'}"]
    local += [f"--config.train.local_every={_LOCAL_EVERY}"]
    with team.room.several:
        with team.job(run, *local) as job:
            wait_for(job, lambda: _common_copy(folder) > SAVE_EVERY)
            job.processes[victim].kill()
            require_others_end(job, victim)
        step = _common_copy(folder)
        if step < _newest(run):
            raise Missed("a checkpoint was newer than the copies")
        shutil.rmtree(folder / f"disk-{victim}")
        said = team.require_resumed(run, *local)
    began = int(re.search(rf"; step (\d+) of {STEPS}", said.out)[1])
    if began < step:
        raise Lost(f"went on from step {began}, and all had a copy of step {step}: {said.out}")
    if f"process {victim} has lost what it held" not in said.out:
        raise Lost(f"did not say whose disk is lost: {said.out}")


def _common_copy(folder: Path) -> int:
    """The newest step of which each of the four has a copy."""
    each = [folder.glob(f"disk-{process}/*/process-{process}/*") for process in range(4)]
    steps = [{int(copy.name) for copy in of if copy.name.isdigit()} for of in each]
    return max(set.intersection(*steps), default=0)


def _newest(run: Path) -> int:
    there = (run / "checkpoints").glob("*")
    return max((int(entry.name) for entry in there if entry.name.isdigit()), default=0)
