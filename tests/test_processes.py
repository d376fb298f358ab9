"""Several real processes with two virtual devices each compute what one process with all does.

They meet as under SLURM, in a Kubernetes JobSet, by Open MPI and by flags, with the same command.
All have a time limit and are killed after it. Numbers of float32 are compared to 3e-6: gloo adds
the devices' parts in another order than one process does.
"""

import functools
import hashlib
import json
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from moepp_jax import distributed
from moepp_jax import evaluate as evaluate_lib
from moepp_jax import mesh as mesh_lib
from moepp_jax import state as state_lib
from moepp_jax.checkpoint import Checkpoints
from moepp_jax.data import open_dataset, prepare
from moepp_jax.data.prepare import prepared_sources
from moepp_jax.metrics import read_metrics
from moepp_jax.parent import Parent
from moepp_jax.train import train
from moepp_jax.workdir import read_config
from tests import tiny
from tests.jobs import GLOO, SECONDS, Job, free_port, jobset, open_mpi

MESH = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.expert": 2}
STEPS = {"train.steps": 8, "train.eval_every": 4, "train.save_every": 4}
CLOSE = 3e-6
# What rows have of several processes alone.
HOSTS = {f"host_seconds_{n}" for n in ("smallest", "median", "largest")} | {"slowest_process"}


def changes(folder, **more):
    return {"data.dir": str(folder / "data")} | MESH | STEPS | more


def command(folder, workdir, **more):
    fields = tiny.CHANGES | changes(folder, **more)
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["train", "--config=configs/tiny.py", *flags, f"--workdir={folder / workdir}"]


def in_one_process(folder, workdir, devices=4, parent=None, **more):
    """The run on devices of this process, goes on from where it is."""
    with pytest.MonkeyPatch.context() as patch:
        some = functools.partial(mesh_lib.make_mesh, devices=jax.devices()[:devices])
        patch.setattr(mesh_lib, "make_mesh", some)
        c = tiny.config(**changes(folder, **more))
        return train(c, folder / workdir, lambda line: None, parent=parent)


def state_of(folder, step, devices=4, **more):
    c = tiny.config(**changes(folder, **more))
    mesh = mesh_lib.make_mesh(c, jax.devices()[:devices])
    with Checkpoints(folder, keep=2) as checkpoints:
        return checkpoints.restore(step, state_lib.assemble(c, mesh).abstract)


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def assert_same_story(actual, expected):
    assert [row["step"] for row in actual] == [row["step"] for row in expected]
    for a, b in zip(actual, expected, strict=True):
        assert a.keys() - HOSTS == b.keys() - HOSTS
        for name in a.keys() - HOSTS - {"seconds", "tokens_per_s", "data_wait"}:
            np.testing.assert_allclose(a[name], b[name], rtol=CLOSE, atol=CLOSE, err_msg=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def by_two(folder):
    """What was said by a run of two processes, which also prepared its data; and its folder."""
    with Job([*command(folder, "two"), "--profile=5:7"]) as job:
        return job.ended(0, 0), folder / "two"


@pytest.fixture(scope="module")
def by_one(folder, by_two):
    in_one_process(folder, "one")
    return folder / "one"


def test_two_processes_tell_the_story_of_one(by_two, by_one):
    _, two = by_two
    rows, expected = read_metrics(two), read_metrics(by_one)
    assert_same_story(rows, expected)
    assert [row["step"] for row in rows if "loss" in row] == [*range(1, 9)]
    totals = [row["eval_tokens"] for row in rows if "eval_loss" in row]
    assert len(totals) == 2 and totals == [r["eval_tokens"] for r in expected if "eval_loss" in r]


def test_two_processes_start_from_another_run_as_one_does(by_two, folder):
    """On other parts of the mesh, with its optimizer."""
    _, two = by_two
    few = {"train.steps": 2, "mesh.fsdp": 4, "mesh.expert": 1}
    heir = [*command(folder, "heir", **few), f"--init_from={two}@4", "--init_optimizer"]
    with Job(heir) as job:
        ended = job.ended(0, 0)
    # Gloo's threads write at once: of two of its lines one may be empty.
    said = [[s for s in out.splitlines() if s and not GLOO.search(s)] for out, _ in ended]
    assert f"starting from {two}@4, with its optimizer" in said[0] and not said[1]
    in_one_process(folder, "heir_of_one", parent=Parent(str(two), 4, True), **few)
    assert_same_story(read_metrics(folder / "heir"), read_metrics(folder / "heir_of_one"))
    records = [(folder / name / "parent.json").read_text() for name in ("heir", "heir_of_one")]
    assert records[0] == records[1]


def test_one_process_writes_and_reports(by_two, by_one):
    said, two = by_two
    assert "mesh data 1 x fsdp 2 x expert 2" in said[0][0] and "step 8: held-out" in said[0][0]
    assert not [line for line in said[1][0].splitlines() if line and not GLOO.search(line)]
    names, expected = ({entry.name for entry in run.iterdir()} for run in (two, by_one))
    assert names == expected | {"profile"}
    assert len(list((two / "profile").rglob("*.xplane.pb"))) == 1
    assert len(list((two / "tensorboard").iterdir())) == 1
    assert read_config(two) == read_config(by_one)


def test_a_checkpoint_of_two_processes_is_verified_and_restored_by_one(by_two, by_one):
    _, two = by_two
    folder = two / "checkpoints" / "8"
    items = {path.parts[len(folder.parts)] for path in folder.rglob("*")}
    files = [p for i in items & {"params", "rest", "meta"} for p in (folder / i).rglob("*")]
    sums = json.loads((folder / "checksums.json").read_text())
    assert sums.keys() == {f.relative_to(folder).as_posix() for f in files if f.is_file()}
    for process in (0, 1):
        assert any(f"ocdbt.process_{process}" in name for name in sums)
    on_four, on_one = state_of(two, 8), state_of(two, 8, 1, **dict.fromkeys(MESH, 1))
    assert_same_bits(on_four, on_one)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        jax.device_get(on_four),
        jax.device_get(state_of(by_one, 8)),
    )


def test_a_signal_to_one_process_stops_all_at_one_step_and_one_process_goes_on(folder, by_one):
    workdir = folder / "stopped"
    with Job(command(folder, "stopped"), environment=jobset) as job:
        job.wait_for(workdir / "config.json")
        job.processes[1].send_signal(signal.SIGTERM)
        said = job.ended(143, 143)
    saved = int(re.search(r"SIGTERM: stopped and saved at step (\d+)", said[0][0])[1])
    assert "stopped" not in said[1][0]
    assert 1 <= saved < 8
    with Checkpoints(workdir, keep=2) as checkpoints:
        assert checkpoints.steps() == [saved]
    in_one_process(folder, "stopped")
    rows = [row for row in read_metrics(workdir) if "loss" in row]
    assert_same_story(rows, [row for row in read_metrics(by_one) if "loss" in row])


def test_evaluation_by_two_processes_has_the_totals_of_one(by_two, folder):
    _, two = by_two
    file = folder / "result.json"

    def flags(number):
        return [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={number}"]

    port = free_port()
    arguments = ["evaluate", f"--workdir={two}", f"--json={file}"]
    with Job(arguments, environment=lambda *_: {}, flags=flags) as job:
        said = job.ended(0, 0)
    result = json.loads(file.read_text())
    assert json.loads(said[0][0][said[0][0].index("{") :]) == result
    assert "{" not in said[1][0]
    with pytest.MonkeyPatch.context() as patch:
        four = functools.partial(mesh_lib.make_mesh, devices=jax.devices()[:4])
        patch.setattr(mesh_lib, "make_mesh", four)
        expected = evaluate_lib.evaluate_run(read_config(two), two)
    assert result.keys() == expected.keys()
    assert result["eval_tokens"] == expected["eval_tokens"]
    for name in result:
        np.testing.assert_allclose(result[name], expected[name], rtol=CLOSE, err_msg=name)


def test_what_the_first_process_refuses_ends_all(folder):
    with Job(command(folder, "refused", **{"data.sources.text.path": "/nowhere"})) as job:
        said = job.ended(1, 1)
    refusal = "config.data.sources.text.path = '/nowhere' does not exist"
    for number, start in enumerate([f"error: {refusal}", f"error: process 0: {refusal}"]):
        assert said[number][1].startswith(start), said
    assert not (folder / "refused").exists()


AGREE = """
import time
import jax
import numpy as np
from moepp_jax import distributed, processes
from moepp_jax.errors import ConfigError

distributed.initialize()
processes._PATIENCE = 0.1
print("first:", processes.on_first(lambda: time.sleep(1) or "done"))
print("each:", processes.agree(jax.process_index))

def refuse():
    if jax.process_index() == 1:
        raise ConfigError("not here")

for work in (lambda: processes.agree(refuse), lambda: processes.require_alike(str(refuse))):
    try:
        work()
    except ConfigError as error:
        print("error:", error)

processes._PIECE = 16  # of 45 bytes
content = np.arange(45, dtype=np.uint8) if jax.process_index() == 1 else None
print("sent:", processes.from_one(content, 45, source=1).tolist() == list(range(45)))
print("all:", processes.of_all(np.array([jax.process_index(), 7])).tolist())
"""


def test_processes_wait_for_slow_work_and_learn_of_each_others_errors():
    with Job([], program=["-c", AGREE]) as job:
        said = [[s for s in out.splitlines() if not GLOO.search(s)] for out, _ in job.ended(0, 0)]
    unlike = "error: process 1 was started with another configuration, --workdir or --init_from "
    unlike += "than process 0"
    assert said[0][:3] == ["first: done", "each: 0", "error: process 1: not here"]
    assert said[1][:3] == ["first: None", "each: 1", "error: not here"]
    assert said[0][3].startswith(unlike) and said[0][3] == said[1][3]
    assert said[0][4:] == said[1][4:] == ["sent: True", "all: [[0, 7], [1, 7]]"]


# A mixture, four processes, and what kills them: minutes.

MIXED = """
from moepp_jax.configs import base, tiny

def get_config():
    c = tiny.get_config()
    weights = {"a": 3.0, "b": 2.0, "c": 1.0}
    c.data.sources = {name: base.source(f"FOLDER/{name}", w) for name, w in weights.items()}
    return c
"""

# Of every batch that several processes place together.
BATCHES = """
import hashlib, sys
from jax.experimental import multihost_utils
from moepp_jax import distributed, mesh, processes, workdir
from moepp_jax.data import open_dataset, prepare

distributed.initialize()
config = workdir.read_config(sys.argv[1])
rows = processes.Rows(mesh.batch_sharding(mesh.make_mesh(config)), config.train.batch_size)
dataset = open_dataset(config)
for step in range(8):
    placed = rows.place(dataset.train_batch(step, rows.indices))
    whole = multihost_utils.process_allgather(placed, tiled=True)
    print("batch", *(hashlib.sha256(whole[name].tobytes()).hexdigest() for name in sorted(whole)))
"""


def hashes(batch) -> str:
    return " ".join(hashlib.sha256(batch[name].tobytes()).hexdigest() for name in sorted(batch))


@pytest.fixture(scope="module")
def mixed(folder):
    """The command of a run on three sources, and what it said to two processes."""
    for i, file in enumerate(sorted(tiny.TEXT.glob("*.txt"))):
        (folder / "abc"[i % 3]).mkdir(exist_ok=True)
        shutil.copy(file, folder / "abc"[i % 3])
    (folder / "recipe.py").write_text(MIXED.replace("FOLDER", str(folder)))
    arguments = [a for a in command(folder, "mixed") if not a.startswith("--config.data.sources.")]
    arguments[1] = f"--config={folder / 'recipe.py'}"
    with Job(arguments) as job:
        return arguments, job.ended(0, 0)


@pytest.mark.slow
def test_a_mixture_is_the_same_batches_and_losses_for_any_processes(mixed, folder):
    rows = read_metrics(folder / "mixed")
    c = read_config(folder / "mixed")
    with pytest.MonkeyPatch.context() as patch:
        some = functools.partial(mesh_lib.make_mesh, devices=jax.devices()[:4])
        patch.setattr(mesh_lib, "make_mesh", some)
        train(c, folder / "mixed-one", lambda line: None)
    assert_same_story(rows, read_metrics(folder / "mixed-one"))
    assert [rows[-1][f"eval_tokens/{name}"] > 0 for name in "abc"] == [True] * 3
    tokens = [rows[-2][f"tokens/{name}"] for name in "abc"]
    np.testing.assert_allclose(np.array(tokens) / (8 * 8 * 32), [3 / 6, 2 / 6, 1 / 6], atol=1 / 64)

    dataset = open_dataset(c)
    expected = [f"batch {hashes(dataset.train_batch(step))}" for step in range(8)]
    with Job([folder / "mixed"], program=["-c", BATCHES]) as job:
        for out, _ in job.ended(0, 0):
            assert [line for line in out.splitlines() if line.startswith("batch")] == expected


@pytest.mark.slow
def test_a_damaged_record_ends_all_processes_with_its_name(mixed, folder):
    arguments, _ = mixed
    tokens = prepared_sources(read_config(folder / "mixed")).tokens["a"]
    (file,) = tokens.glob("*-train.array_record-*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with Job([*arguments[:-1], f"--workdir={folder / 'damaged'}"]) as job:
        said = [process.communicate(timeout=SECONDS)[1] for process in job.processes]
    for process, err in zip(job.processes, said, strict=True):
        assert process.returncode in (1, -signal.SIGABRT), err  # the latter: by JAX, of another
    assert any(re.search(rf"error: process \d: .*{file}, record \d+, cannot", err) for err in said)


CUBE = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.expert": 2, "train.steps": 24, "train.eval_every": 24}

# Bytes of a restored state as every process of several has it.
RESTORE = """
import hashlib, sys
import jax
from jax.experimental import multihost_utils
from moepp_jax import distributed, mesh, state, workdir
from moepp_jax.checkpoint import Checkpoints

distributed.initialize()
folder, step = sys.argv[1], int(sys.argv[2])
config = workdir.read_config(folder).replace("mesh", data=1)
mesh = mesh.make_mesh(config)
with Checkpoints(folder, keep=2) as checkpoints:
    restored = checkpoints.restore(step, state.assemble(config, mesh).abstract)
whole = multihost_utils.process_allgather(restored, tiled=True)
print("digest", hashlib.sha256(b"".join(a.tobytes() for a in jax.tree.leaves(whole))).hexdigest())
"""


@pytest.fixture(scope="module")
def by_four(folder, by_two):
    with Job(command(folder, "four", **CUBE), of=4) as job:
        job.ended(0, 0, 0, 0)
    return folder / "four"


def digest(state) -> str:
    leaves = jax.tree.leaves(jax.device_get(state))
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_is_restored_by_two_and_by_one(by_four):
    with Job([by_four, 24], program=["-c", RESTORE]) as job:
        said = job.ended(0, 0)
    expected = digest(state_of(by_four, 24, 1, **CUBE | dict.fromkeys(MESH, 1)))
    for out, _ in said:
        assert re.search(r"^digest (\w+)$", out, re.MULTILINE)[1] == expected


@pytest.mark.slow
def test_four_processes_tell_the_story_of_one(by_four, folder):
    in_one_process(folder, "eight", devices=8, **CUBE)
    assert_same_story(read_metrics(by_four), read_metrics(folder / "eight"))


def assert_all_end(job: Job, victim: int) -> None:
    """The others end with an error in the time that the package states, and some to spare."""
    others = [p for number, p in enumerate(job.processes) if number != victim]
    deadline = time.monotonic() + distributed.HEARTBEAT_TIMEOUT + 15
    said = [p.communicate(timeout=deadline - time.monotonic())[1] for p in others]
    for process, err in zip(others, said, strict=True):
        assert process.returncode in (1, -signal.SIGABRT)
        reason = "^error: another process of this run is gone" if process.returncode == 1 else GONE
        assert re.search(reason, err, re.MULTILINE), err


GONE = "another task died"  # what JAX says


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_restart_ends_with_the_same_bits(by_four, folder):
    with Job(command(folder, "killed", **CUBE), of=4) as job:
        job.wait_for(folder / "killed" / "checkpoints" / "4")
        job.processes[2].kill()
        assert_all_end(job, victim=2)
    with Job(command(folder, "killed", **CUBE), of=4) as job:
        said = job.ended(0, 0, 0, 0)
    began = int(re.search(r"step (\d+) of 24", said[0][0])[1])
    assert 4 <= began < 24
    assert_same_bits(state_of(folder / "killed", 24, 8, **CUBE), state_of(by_four, 24, 8, **CUBE))
    assert_same_story(read_metrics(folder / "killed"), read_metrics(by_four))


@pytest.mark.slow
def test_an_interrupt_of_one_process_stops_all(folder):
    with Job(
        command(folder, "interrupted", **{"train.steps": 10_000}), environment=open_mpi
    ) as job:
        job.wait_for(folder / "interrupted" / "checkpoints" / "4")
        job.processes[0].send_signal(signal.SIGINT)
        said = job.ended(130, 143)
    assert re.search(r"SIGINT: stopped and saved at step \d+;", said[0][0])


@pytest.mark.slow
@pytest.mark.parametrize("victim, number", [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_without_the_first_process_or_a_sign_of_life_jax_ends_the_others(folder, victim, number):
    workdir = f"gone{victim}"
    with Job(command(folder, workdir, **{"train.steps": 10_000})) as job:
        job.wait_for(folder / workdir / "checkpoints" / "4")
        job.processes[victim].send_signal(number)
        assert_all_end(job, victim)


# The command, which says how often all processes have met before the first step.
STARTS = """
import sys
from moepp_jax import main, processes, train

processes._PATIENCE = 1e3  # or all would hear, again and again, that one still works
meetings, gather, loop = [], processes._gather, train._loop
processes._gather = lambda said: meetings.append(said) or gather(said)
train._loop = lambda *args: print("meetings", len(meetings), flush=True) or loop(*args)
sys.argv[0] = "moepp"
main.main()
"""


@pytest.mark.slow
def test_eight_processes_start_train_two_steps_and_end_and_two_go_on(folder):
    few = CUBE | {"train.steps": 2, "train.eval_every": 2, "train.save_every": 2}
    prepare(tiny.config(**changes(folder, **few)), lambda line: None)
    with Job(command(folder, "of_eight", **few), 8, program=["-c", STARTS], devices=1) as job:
        said = job.ended(*[0] * 8, seconds=500.0)  # on two cores each has a quarter of one
    workdir = folder / "of_eight"
    assert [row["step"] for row in read_metrics(workdir) if "loss" in row] == [1, 2]
    sums = json.loads((workdir / "checkpoints" / "2" / "checksums.json").read_text())
    wrote = {int(n) for n in re.findall(r"ocdbt\.process_(\d+)/d/", " ".join(sums))}
    assert wrote == set(range(8))
    # As docs/PODS.md has it.
    assert [re.findall(r"^meetings (\d+)$", out, re.MULTILINE) for out, _ in said] == [["10"]] * 8
    more = few | {"train.steps": 3}
    with Job(command(folder, "of_eight", **more), program=["-c", STARTS], devices=4) as job:
        said = job.ended(0, 0)
    assert "step 2 of 3" in said[0][0]
    assert [re.findall(r"^meetings (\d+)$", out, re.MULTILINE) for out, _ in said] == [["11"]] * 2
    assert [row["step"] for row in read_metrics(workdir) if "loss" in row] == [1, 2, 3]
