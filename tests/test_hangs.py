"""Real processes of which one is stopped, stuck or killed: the others name it, and end in time.

JAX would end them itself half a minute after one falls silent, so it is told to wait longer here.
"""

import re
import signal
import time

import pytest

from moepp_jax.metrics import read_metrics
from moepp_jax.watch import STATUS
from tests.jobs import STUCK_AFTER, Job
from tests.test_processes import (
    CUBE,
    HOSTS,
    assert_same_bits,
    assert_same_story,
    command,
    state_of,
)

pytestmark = pytest.mark.slow

HANG = 8.0
# From the last sign of life: the report, and as long again, with looks, sleeps and a busy machine.
BOUND = 2 * HANG + 30

MAIN = "from moepp_jax import distributed; distributed.HEARTBEAT_TIMEOUT = 200\n"
MAIN += STUCK_AFTER.format(batches=10)
FIELDS = CUBE | {"train.eval_every": 6, "train.hang_seconds": HANG}
FIELDS |= {"train.hang_factor": 2.0}  # a step takes seconds where machines are busy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hangs")


def job(folder, workdir, of, stuck=-1, **more):
    return Job(
        command(folder, workdir, **FIELDS | more),
        of=of,
        program=["-c", MAIN],
        flags=lambda number: ["--stuck"] if number == stuck else [],
        devices=8 // of,
    )


def ends(job, numbers):
    """What these processes say until they have ended in time, and their statuses."""
    deadline = time.monotonic() + BOUND
    said = [job.processes[n].communicate(timeout=deadline - time.monotonic())[1] for n in numbers]
    return said, [job.processes[n].returncode for n in numbers]


@pytest.fixture(scope="module")
def whole(folder):
    """The run that nobody disturbed, of two processes and of four: the same devices."""

    def trained(of):
        with job(folder, f"whole{of}", of) as running:
            running.ended(*[0] * of)
        return folder / f"whole{of}"

    return {of: trained(of) for of in (2, 4)}


def bits(workdir):
    return state_of(workdir, 24, 8, **CUBE)


@pytest.mark.parametrize("of, victim", [(2, 1), (4, 0)])
def test_a_stopped_process_is_named_and_the_restart_has_the_same_bits(folder, whole, of, victim):
    workdir = folder / f"stopped-{of}"
    with job(folder, workdir.name, of) as running:
        running.wait_for(workdir / "checkpoints" / "4")
        running.processes[victim].send_signal(signal.SIGSTOP)
        others = [number for number in range(of) if number != victim]
        said, statuses = ends(running, others)
    assert statuses == [STATUS] * len(others), said
    for number, err in zip(others, said, strict=True):
        name = f"process {number} of {of}: no (step|save|batch of the evaluation) has ended for"
        late = rf"late: process {victim} on \S+, silent for \d+ s, last heard at step \d+, "
        assert len(re.findall(rf"^{name}.*; {late}", err, re.M)) == 1, err
        assert len(re.findall(rf"^error: {name}.*; {late}", err, re.M)) == 1, err
    with job(folder, workdir.name, of) as running:
        again = running.ended(*[0] * of)
    assert 4 <= int(re.search(r"step (\d+) of 24", again[0][0])[1]) < 24
    assert_same_bits(bits(workdir), bits(whole[of]))
    assert_same_story(read_metrics(workdir), read_metrics(whole[of]))


def test_a_process_that_lives_and_does_nothing_is_named_by_all(folder, whole):
    workdir = folder / "stuck"
    with job(folder, workdir.name, 4, stuck=2) as running:
        running.wait_for(workdir / "checkpoints" / "8")
        said, statuses = ends(running, range(4))
    assert statuses == [STATUS] * 4, said
    for err in said:
        late = r"late: process 2 on \S+, at step \d+, waiting for its next batch for \d+ s; it is"
        assert re.search(rf"^error: process \d of 4: no step has ended for .*; {late}", err, re.M)
    assert "<string>" not in said[2] and re.search(r"\(train\.py:\d+, _one_ahead\)", said[2])
    with job(folder, workdir.name, 4) as running:
        running.ended(0, 0, 0, 0)
    assert_same_bits(bits(workdir), bits(whole[4]))


def test_a_killed_process_is_named_before_the_others_end(folder, whole):
    workdir = folder / "killed"
    with job(folder, workdir.name, 4) as running:
        running.wait_for(workdir / "checkpoints" / "4")
        running.processes[2].kill()
        others = [0, 1, 3]
        said, statuses = ends(running, others)
    for err, status in zip(said, statuses, strict=True):
        if status == 1:
            assert re.search("no sign of life of process 2 on .*, silent for", err), err
            assert re.search("^error: another process of this run is gone", err, re.M), err
        else:  # another one of them ended first, by then
            assert status == -signal.SIGABRT and "another task died" in err
    assert 1 in statuses
    with job(folder, workdir.name, 4) as running:
        running.ended(0, 0, 0, 0)
    assert_same_bits(bits(workdir), bits(whole[4]))


def test_rows_name_the_slowest_host_and_nothing_is_said_of_a_run_that_goes_on(folder, whole):
    rows = [row for row in read_metrics(whole[4]) if "loss" in row]
    told = [row for row in rows if "slowest_process" in row]
    assert told and all(row.keys() >= HOSTS for row in told)
    for row in told:
        low, middle, high = (row[f"host_seconds_{n}"] for n in ("smallest", "median", "largest"))
        assert 0 <= low <= middle <= high and row["slowest_process"] in range(4)
    with job(folder, "quiet", 2) as running:
        assert all("has ended for" not in err for _, err in running.ended(0, 0))
