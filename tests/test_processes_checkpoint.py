"""Several real processes sum up what each wrote, and check a checkpoint together before its use."""

import json
import re

import pytest

from tests.jobs import GLOO, Job

# Bytes of a part, so that the files of small arrays have several.
PART = 4096

COMMON = f"""
import sys
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from moepp_jax import checksums, distributed
from moepp_jax.checkpoint import CheckpointError, Checkpoints

distributed.initialize()
checksums._PART = {PART}
workdir = Path(sys.argv[1])
real, read = checksums._xxh3, []
def _xxh3(part, last, file):
    folder = next(parent for parent in file.parents if parent.name.startswith("7"))
    name = file.relative_to(folder).as_posix().replace(".orbax-checkpoint-tmp", "")
    read.append([name, part])
    return real(part, last, file)
checksums._xxh3 = _xxh3

mesh = jax.make_mesh((jax.device_count(),), ("x",))
sharding = NamedSharding(mesh, PartitionSpec("x"))
def value(number):
    rows = np.random.default_rng(number).normal(size=(24, 1024)).astype(np.float32)
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])
state = dict(params=dict(a=value(1), b=value(2)), count=value(3))
"""

SAVE = """
with Checkpoints(workdir, 2) as checkpoints:
    checkpoints.save(7, state)
    checkpoints.wait()
print("summed", *(f"{name}:{part}" for name, part in read), flush=True)
"""

RESTORE = """
def restored():
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), state
    )
    with Checkpoints(workdir, 2) as checkpoints:
        assert checkpoints.latest_intact_step(print) == 7
        return checkpoints.restore(7, abstract)

same = jax.tree.map(lambda a, b: bool((a == b).all()), restored(), state)
print("same", all(jax.tree.leaves(same)))
print("read", *(f"{name}:{part}" for name, part in read), flush=True)

step = workdir / "checkpoints" / "7"
for number in range(int(sys.argv[2])):
    file = max(step.glob(f"*/ocdbt.process_{number}/d/*"), key=lambda f: (f.stat().st_size, f))
    content = file.read_bytes()
    multihost_utils.sync_global_devices("before")
    if jax.process_index() == 0:
        at = len(content) * 2 // 3
        file.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
    multihost_utils.sync_global_devices("flipped")
    try:
        restored()
    except CheckpointError as error:
        print("refused", number, error, flush=True)
    multihost_utils.sync_global_devices("after")
    if jax.process_index() == 0:
        file.write_bytes(content)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder that four processes have saved to, and what each has summed up."""
    workdir = tmp_path_factory.mktemp("saved")
    with Job([workdir], of=4, program=["-c", COMMON + SAVE]) as job:
        return workdir, [parts(out, "summed") for out, _ in job.ended(0, 0, 0, 0)]


def parts(out: str, word: str) -> list[str]:
    return re.search(rf"^{word}(.*)$", out, re.MULTILINE)[1].split()


def test_each_process_sums_up_what_it_wrote_and_each_part_has_one_sum(saved):
    workdir, summed = saved
    folder = workdir / "checkpoints" / "7"
    sums = json.loads((folder / "checksums.json").read_text())
    files = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
    assert sums.keys() == {name for name in files if name.startswith(("params/", "rest/", "meta/"))}
    assert {name for name in files if "checksums" in name} == {"checksums.json"}
    for name, of_file in sums.items():
        assert len(of_file) == max(1, -(-files[name].stat().st_size // PART))
    assert max(map(len, sums.values())) > 2
    expected = [f"{name}:{part}" for name in sums for part in range(len(sums[name]))]
    assert sorted(part for of_process in summed for part in of_process) == sorted(expected)
    for process, of_process in enumerate(summed):
        own = [part for part in expected if f"/ocdbt.process_{process}/" in part]
        others = [part for part in expected if "/ocdbt.process_" not in part]
        assert own and sorted(of_process) == sorted(own + (others if process == 0 else []))


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_reads_each_part_once_and_all_refuse_a_flipped_bit(
    saved, processes
):
    workdir, summed = saved
    with Job([workdir, 4], of=processes, program=["-c", COMMON + RESTORE]) as job:
        said = [out for out, _ in job.ended(*[0] * processes)]
    read = [parts(out, "read") for out in said]
    everything = [part for of_process in summed for part in of_process]
    assert sorted(part for of_process in read for part in of_process) == sorted(everything)
    assert max(map(len, read)) - min(map(len, read)) <= 1
    lines = [[line for line in out.splitlines() if not GLOO.search(line)] for out in said]
    refused = [[line for line in of_process if line.startswith("refused")] for of_process in lines]
    assert all("same True" in of_process for of_process in lines)
    assert len(refused[0]) == 4 and all(r == refused[0] for r in refused)
    assert all("every checkpoint in" in line for line in refused[0])
    damaged = [line for line in lines[-1] if line.startswith("checkpoint 7 is damaged")]
    for number, line in enumerate(damaged):
        assert re.search(rf"/ocdbt.process_{number}/d/\w+ is not as it was saved$", line)
    assert len(damaged) == 4


GO_ON = """
import errno, time
from moepp_jax.saving import Saver

def full(step, process):
    return step in (71, 72) and jax.process_index() == process

write_own = checksums.write_own
def sum_up(folder, who, *args):
    if full(int(folder.name.partition(".")[0]), int(sys.argv[2])):
        raise OSError(errno.ENOSPC, "No space left on device")
    write_own(folder, who, *args)

saving = 70
mkdir = Path.mkdir
def make(folder, *args, **named):
    if folder.name == "d" and full(saving, 0):
        raise OSError(errno.ENOSPC, "No space left on device")
    mkdir(folder, *args, **named)

if sys.argv[3] == "sums":
    checksums.write_own = sum_up
else:
    Path.mkdir = make

began = time.monotonic()
with Checkpoints(workdir, 9) as checkpoints:
    saver = Saver(checkpoints, "continue", lambda line: print("said", line, flush=True))
    for saving in range(70, 74):
        step = saving
        saver.save(step, state, {}, last=step == 73)
    print("steps", checkpoints.steps(), flush=True)
print("seconds", time.monotonic() - began, flush=True)
"""


@pytest.mark.parametrize(("process", "what"), [(0, "sums"), (1, "sums"), (0, "folders")])
def test_a_process_that_cannot_write_holds_no_other_up(tmp_path, process, what):
    """Orbax's others would wait for it for ten minutes. All go on, and hear the reason."""
    with Job([tmp_path, process, what], of=2, program=["-c", COMMON + GO_ON]) as job:
        for out, _ in job.ended(0, 0):
            assert re.search(r"^steps \[70, 73\]$", out, re.MULTILINE), out
            said = re.findall(r"^said (.*)$", out, re.MULTILINE)
            assert [re.search(r"checkpoint (\d+) .*; ", line)[1] for line in said] == ["71", "72"]
            assert all("cannot be saved: No space left on device" in line for line in said), said
            assert said[0].endswith("steps 70 are kept; the run goes on")
            assert said[1].endswith("; 2 saves in a row have failed")
            assert float(re.search(r"^seconds (.*)$", out, re.MULTILINE)[1]) < 100
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["70", "73"]


# Root's permissions are put down in every thread, before there is a second one.
STUCK = """
from moepp_jax.checkpoint import SaveError

with Checkpoints(workdir, 2) as checkpoints:
    assert checkpoints.latest_intact_step(print) == 70
    try:
        checkpoints.save(71, state)
    except SaveError as error:
        print("refused", error, flush=True)
    checkpoints.look_again()
    checkpoints.save(72, state)
    checkpoints.wait()
    print("steps", *checkpoints.steps(), flush=True)
"""


def test_a_step_that_no_process_may_read_or_remove_is_told_in_all_and_they_go_on(tmp_path):
    lowered = "from tests import unprivileged\nnow = unprivileged.unprivileged()\nnow.__enter__()\n"
    program = ["-c", lowered + COMMON + STUCK]
    both = "".join(SAVE.replace("7", step) for step in ("70", "71"))
    with Job([tmp_path], of=2, program=["-c", COMMON + both]) as job:
        job.ended(0, 0)
    (tmp_path / "checkpoints" / "71").chmod(0)
    try:
        with Job([tmp_path], of=2, program=program) as job:
            said = [out for out, _ in job.ended(0, 0)]
    finally:
        (tmp_path / "checkpoints" / "71").chmod(0o700)
    for out in said:
        assert "checkpoint 71 is damaged, looking for an older one: it cannot be read: Perm" in out
        assert re.search(
            r"^refused checkpoint 71 in .* nor be removed .*: Permission den", out, re.M
        )
        assert re.search(r"^steps .*72$", out, re.M)
