"""Four real processes, each with a disk of its own, are all killed, and go on from these disks."""

import re
import shutil
import signal
import time
from pathlib import Path

import jax
import pytest

from moepp_jax.metrics import read_metrics
from tests.jobs import SECONDS, Job
from tests.test_processes import command, state_of

pytestmark = pytest.mark.slow

STEPS = {"train.steps": 18, "train.save_every": 18, "train.eval_every": 100}
REPLICAS = STEPS | {"mesh.data": 2, "mesh.fsdp": 2, "mesh.expert": 2}
NO_REPLICAS = STEPS | {"mesh.data": 1, "mesh.fsdp": 2, "mesh.expert": 4}


def job(folder: Path, **mesh) -> Job:
    local = {"train.local_dir": folder / "disk-{process}", "train.local_every": 3}
    return Job(command(folder, "run", **mesh, **local), of=4)


def copies(folder: Path, process: int) -> list[int]:
    there = folder.glob(f"disk-{process}/*/process-{process}/*")
    return sorted(int(entry.name) for entry in there if entry.name.isdigit())


def killed(folder: Path, **mesh) -> int:
    """Kills all processes of a run once all have a copy; the newest step of which all have one.

    Copies of later steps are removed, which some had time to write.
    """
    with job(folder, **mesh) as running:
        deadline = time.monotonic() + SECONDS
        while not all(copies(folder, process) for process in range(4)):
            ended = [p for p in running.processes if p.poll() is not None]
            assert not ended and time.monotonic() < deadline, [p.communicate() for p in ended]
            time.sleep(0.01)
        for process in running.processes:
            process.send_signal(signal.SIGKILL)
        for process in running.processes:
            process.wait()
    assert not (folder / "run" / "checkpoints").exists()
    step = max(set.intersection(*(set(copies(folder, process)) for process in range(4))))
    for copy in folder.glob("disk-*/*/process-*/*"):
        if copy.name.isdigit() and int(copy.name) > step:
            shutil.rmtree(copy)
    return step


def restarted(folder: Path, **mesh) -> str:
    """What is said by a run that goes on to its end."""
    with job(folder, **mesh) as running:
        said = running.ended(0, 0, 0, 0)
    rows = [row["step"] for row in read_metrics(folder / "run") if "loss" in row]
    assert rows == [*range(1, 19)]
    assert not [copies(folder, process) for process in range(4) if copies(folder, process)]
    return said[0][0]


def began(said: str) -> int:
    return int(re.search(r"; step (\d+) of 18", said)[1])


def assert_ended_like(undisturbed: Path, folder: Path, **mesh) -> None:
    a, b = (jax.device_get(state_of(f / "run", 18, 8, **mesh)) for f in (undisturbed, folder))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with Job(command(folder, "run", **REPLICAS), of=4) as whole:
        whole.ended(0, 0, 0, 0)
    return folder


@pytest.fixture(scope="module")
def dead(tmp_path_factory, undisturbed):
    """A run of which all processes were killed, its newest common copy, and a copy of all that."""
    folder = tmp_path_factory.mktemp("dead")
    shutil.copytree(undisturbed / "data", folder / "data")
    step = killed(folder, **REPLICAS)
    spare = tmp_path_factory.mktemp("spare") / "all"
    shutil.copytree(folder, spare)
    return folder, step, spare


@pytest.fixture
def as_killed(dead):
    """The run's folder as the kill left it, under the name that it had, and the step."""
    folder, step, spare = dead
    shutil.rmtree(folder)
    shutil.copytree(spare, folder)
    return folder, step


def test_all_killed_go_on_from_their_copies_and_end_with_the_same_bits(as_killed, undisturbed):
    folder, step = as_killed
    said = restarted(folder, **REPLICAS)
    assert f"going on from the local copy of step {step}\n" in said and "lost" not in said
    assert began(said) == step >= 3
    assert_ended_like(undisturbed, folder, **REPLICAS)


def test_a_host_that_has_lost_its_disk_is_sent_what_a_replica_holds(as_killed, undisturbed):
    folder, step = as_killed
    shutil.rmtree(folder / "disk-3")
    said = restarted(folder, **REPLICAS)
    assert began(said) == step
    assert "process 3 has lost what it held, and process 1 sends it\n" in said
    assert_ended_like(undisturbed, folder, **REPLICAS)


def test_hosts_may_change_places(as_killed, undisturbed):
    """As pods do that are started again on other hosts of a slice."""
    folder, step = as_killed
    (folder / "disk-0").rename(folder / "disk")
    (folder / "disk-1").rename(folder / "disk-0")
    (folder / "disk").rename(folder / "disk-1")
    shutil.rmtree(folder / "disk-3")  # and one is lost, too
    said = restarted(folder, **REPLICAS)
    assert began(said) == step
    for sent in ("process 0 has lost what it held, and process 1", "process 1 has lost what it"):
        assert sent in said
    assert_ended_like(undisturbed, folder, **REPLICAS)


def test_without_a_replica_a_lost_disk_costs_the_copies(tmp_path, undisturbed):
    shutil.copytree(undisturbed / "data", tmp_path / "data")
    step = killed(tmp_path, **NO_REPLICAS)
    shutil.rmtree(tmp_path / "disk-2")
    said = restarted(tmp_path, **NO_REPLICAS)
    line = f"the local copy of step {step} is not used: no host's disk has what process 2 held\n"
    assert line in said
    assert began(said) == 0
