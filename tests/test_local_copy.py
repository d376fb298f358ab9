"""Copies on a host's own disk: gone on from bit for bit, or not at all, and then it is said why."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from moepp_jax import local_copy, local_disk
from moepp_jax import mesh as mesh_lib
from moepp_jax import state as state_lib
from moepp_jax.checkpoint import Checkpoints
from moepp_jax.errors import ConfigError
from moepp_jax.local_copy import LocalCopies
from moepp_jax.metrics import read_metrics
from moepp_jax.train import train
from tests import tiny

CUBE = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.expert": 2}
MESHES = [{"mesh.data": 8}, CUBE]


class KilledError(Exception):
    """Stands for a kill: nothing is saved or tidied up behind it."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test's own disk has one name, and so all have the same step, compiled once."""
    monkeypatch.chdir(tmp_path)


def config(data, local="local", **changes):
    """Ten steps, checkpoints after 4 and 8, local copies after every third."""
    steps = {"train.steps": 10, "train.save_every": 4, "train.local_every": 3}
    places = {"data.dir": str(data), "train.local_dir": local}
    return tiny.config(**places | steps | changes)


def killed(c, run, step: int, said=None) -> None:
    """Trains a run until it is killed before this step is done, its copies being written by then.

    Args:
      said: takes what is reported.
    """

    def is_due(copies, at, real=LocalCopies.is_due):
        if at == step:
            copies._wait()
            raise KilledError
        return real(copies, at)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KilledError):
        patch.setattr(LocalCopies, "is_due", is_due)
        train(c, run, (said if said is not None else []).append)
        pytest.fail("it was not killed")


def ended(c, run) -> tuple[state_lib.State, list[str]]:
    said: list[str] = []
    return jax.device_get(train(c, run, said.append)), said


def assert_same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(_bits(x), _bits(y)), a, b)


def _bits(x):
    return np.atleast_1d(x).view(np.uint8)


def objections(said: list[str]) -> list[str]:
    return [line for line in said if "local copy" in line]


def began(said: list[str]) -> int:
    (line,) = [line for line in said if "; mesh " in line]
    return int(line.partition("; step ")[2].split()[0])


def steps_there(local: Path) -> list[int]:
    return sorted(int(f.name) for f in local.glob("*/process-0/*") if f.name.isdigit())


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The last states of runs that nobody killed, by mesh."""
    made = {}

    def of(mesh):
        key = str(mesh)
        if key not in made:
            c = config(data, "", **mesh)
            made[key] = jax.device_get(train(c, tmp_path_factory.mktemp("whole"), [].append))
        return made[key]

    return of


@pytest.fixture(scope="module")
def of_seven(data, tmp_path_factory):
    """Killed in step 7: checkpoint 4, a copy of step 6 alone. The run's folder and the disk."""
    folder = tmp_path_factory.mktemp("seven")
    with contextlib.chdir(folder):
        killed(config(data, **CUBE), folder / "run", 7)
    shutil.rmtree(next((folder / "local").glob("*/*/3")))
    return folder


@pytest.fixture
def seven(of_seven, tmp_path, monkeypatch):
    """A copy of that, which is known by the same name."""
    monkeypatch.setattr(local_copy, "_name", lambda workdir: Path(workdir).name)
    (original,) = (of_seven / "local").iterdir()
    shutil.copytree(original, tmp_path / "local" / "run")
    shutil.copytree(of_seven / "run", tmp_path / "run")
    return tmp_path


@pytest.mark.parametrize(
    "mesh", [MESHES[-1], *(pytest.param(m, marks=pytest.mark.slow) for m in MESHES[:-1])], ids=str
)
def test_a_killed_run_goes_on_from_its_local_copy_and_ends_with_the_same_bits(
    data, tmp_path, undisturbed, mesh
):
    c, run, local = config(data, **mesh), tmp_path / "run", tmp_path / "local"
    killed(c, run, 7)
    assert steps_there(local) == [3, 6]
    with Checkpoints(run, keep=2) as checkpoints:
        assert checkpoints.steps() == [4]
    state, said = ended(c, run)
    assert began(said) == 6 and objections(said) == ["going on from the local copy of step 6"]
    assert_same_bits(state, undisturbed(mesh))
    rows = [row["step"] for row in read_metrics(run) if "loss" in row]
    assert rows == [*range(1, 11)]
    # What was saved needs no copies any more.
    assert not list(local.iterdir()) and not (run / "local.json").exists()


def test_no_copy_outlives_the_rows_before_it(data, tmp_path):
    run, seen = tmp_path / "run", []

    def save(copies, step, state, real=LocalCopies.save):
        seen.append((step, read_metrics(run)[-1]["step"]))
        real(copies, step, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalCopies, "save", save)
        killed(config(data, **CUBE), run, 7)
    assert seen == [(3, 3), (6, 6)]


def test_a_replica_writes_what_another_one_holds_once(of_seven):
    (folder,) = (of_seven / "local").glob("*/process-0/6")
    assert sorted(f.name for f in folder.iterdir() if f.is_dir()) == ["0", "1", "2", "3"]
    sums = json.loads((folder / "checksums.json").read_text())
    assert sums.keys() == {f"{cell}/arrays" for cell in range(4)}


def test_a_run_that_is_killed_before_its_first_checkpoint_goes_on_too(data, tmp_path, undisturbed):
    c, run = config(data, **CUBE), tmp_path / "run"
    killed(c, run, 4)
    assert not (run / "checkpoints").exists()
    said: list[str] = []
    killed(c, run, 5, said)  # in the save of step 4's checkpoint, or soon after
    assert began(said) == 3
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    state, said = ended(c, run)  # once more, from the copy that was gone on from
    assert began(said) == 3
    assert_same_bits(state, undisturbed(CUBE))


def flip(folder: Path) -> None:
    file = folder / "2" / "arrays"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(folder: Path) -> None:
    file = folder / "2" / "arrays"
    file.write_bytes(file.read_bytes()[:-1])


def replace(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


DAMAGES = {
    "a flipped bit": (flip, "the local copy of step 6 is not used: .*2/arrays is not as it was"),
    "a short file": (cut, "the local copy of step 6 is not used: .*2/arrays is not as it was"),
    "no file": (
        lambda folder: shutil.rmtree(folder / "2"),
        "the local copy of step 6 is not used: no host's disk has what process 0 held",
    ),
    "no sums": (
        lambda folder: (folder / "checksums.json").unlink(),
        r"the local copy of step 6 is not used: .* it has no checksums.json",
    ),
    "half a note": (
        lambda folder: (folder / "copy.json").write_text("{"),
        "no local copy is used: .*/6 is damaged: its copy.json is not as it was written",
    ),
    "a note without its sum": (
        lambda folder: replace(folder / "copy.json", '"checksum"', '"checksun"'),
        "no local copy is used: .*/6 is damaged: its copy.json is not as it was written",
    ),
    "another note": (
        lambda folder: replace(folder / "copy.json", '"after": ', '"after": 1'),
        "no local copy is used: .*/6 is damaged: its copy.json is not as it was written",
    ),
    "no copy": (shutil.rmtree, "no local copy is used: no host has one"),
}


@pytest.mark.parametrize("damage, line", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_copy_is_not_used_and_the_checkpoint_is(data, seven, undisturbed, damage, line):
    damage(seven / "local" / "run" / "process-0" / "6")
    _falls_back(config(data, **CUBE), seven / "run", line, undisturbed(CUBE))


def _falls_back(c, run, line, expected, step=4):
    state, said = ended(c, run)
    (objection,) = objections(said)
    assert re.match(line, objection), objection
    assert began(said) == step
    if expected is not None:
        assert_same_bits(state, expected)


def test_a_copy_of_another_run_is_not_used(data, seven, undisturbed):
    """Of one that had this folder before."""
    shutil.rmtree(seven / "run")
    line = "no local copy is used: .*/6 is of another run, or of a past that this one has discarded"
    _falls_back(config(data, **CUBE), seven / "run", line, undisturbed(CUBE), 0)


def test_a_copy_of_another_mesh_is_not_used(data, seven):
    c = config(data, **{"mesh.data": 8})
    line = "no local copy is used: .*/6 is of mesh data 2 x fsdp 2 x expert 2 in 1 process, and "
    _falls_back(c, seven / "run", line + "this run is of mesh data 8 x fsdp 1 x expert 1", None)


def test_a_copy_that_is_no_newer_than_the_checkpoint_is_not_used(data, tmp_path, undisturbed):
    c = config(data, **CUBE)
    killed(c, tmp_path / "run", 5)
    line = "no local copy is used: .*/3 is no newer than checkpoint 4"
    _falls_back(c, tmp_path / "run", line, undisturbed(CUBE), 4)


def test_a_copy_after_a_checkpoint_that_was_removed_is_not_used(data, tmp_path, undisturbed):
    """Whoever removes it wants the run to go on from before."""

    def saved(checkpoints, *args, real=Checkpoints.save):
        real(checkpoints, *args)
        checkpoints.wait()

    c = config(data, **CUBE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", saved)
        killed(c, tmp_path / "run", 7)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    shutil.rmtree(next((tmp_path / "local").glob("*/*/3")))  # which came before it
    line = "no local copy is used: .*/6 came after checkpoint 4, which is gone and discards it"
    _falls_back(c, tmp_path / "run", line, undisturbed(CUBE), 0)


def test_a_copy_of_steps_that_were_computed_again_without_copies_is_not_used(data, seven):
    """Its steps were discarded when the run went on from the checkpoint before."""
    killed(config(data, "", **CUBE), seven / "run", 6)
    line = "no local copy is used: .*/6 is of another run, or of a past"
    _falls_back(config(data, **CUBE), seven / "run", line, None)


def test_a_copy_is_used_where_every_checkpoint_is_damaged(data, seven, undisturbed):
    (seven / "run" / "checkpoints" / "4" / "params" / "_METADATA").write_bytes(b"")
    state, said = ended(config(data, **CUBE), seven / "run")
    assert began(said) == 6
    assert_same_bits(state, undisturbed(CUBE))


def test_what_a_kill_left_half_written_is_no_copy(data, seven):
    disk = seven / "local" / "run" / "process-0"
    shutil.copytree(disk / "6", disk / ".9.tmp")
    killed(config(data, **CUBE), seven / "run", 7, said := [])
    assert began(said) == 6
    assert sorted(f.name for f in disk.iterdir()) == ["6"]


def test_a_disk_that_is_full_costs_the_copy_and_not_the_run(
    data, tmp_path, monkeypatch, capsys, undisturbed
):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local_disk, "_write", full)
    state, _ = ended(config(data, **CUBE), tmp_path / "run")
    assert_same_bits(state, undisturbed(CUBE))
    said = capsys.readouterr().err
    assert said.count("no local copy can be written to") == 1
    assert "No space left on device; the run goes on, and tries it again every 3 steps" in said
    assert not list((tmp_path / "local").iterdir())


def test_a_place_that_cannot_be_written_is_refused_before_anything_is(data, tmp_path):
    (tmp_path / "file").write_text("")
    c = config(data, "file", **CUBE)
    with pytest.raises(ConfigError, match=r"config.train.local_dir = '.*file' cannot be written"):
        train(c, tmp_path / "run", [].append)
    assert not (tmp_path / "run").exists()


def test_the_newest_copy_is_kept_and_other_runs_copies_too(data, tmp_path):
    c, local = config(data, **CUBE), tmp_path / "local"
    c = c.replace("train", local_every=1, save_every=100)
    killed(c, tmp_path / "a", 6)
    assert steps_there(local) == [4, 5]
    killed(c, tmp_path / "b", 3)
    assert steps_there(local) == [1, 2, 4, 5]
    ended(c, tmp_path / "a")
    assert steps_there(local) == [1, 2]


@pytest.mark.parametrize("mesh", [dict.fromkeys(CUBE, 1), CUBE], ids=str)
def test_signs_of_zero_and_bits_of_what_is_no_number_are_kept(tmp_path, mesh):
    c = tiny.config(**mesh, **{"train.local_dir": str(tmp_path)})
    some = jax.devices()[: int(np.prod(list(mesh.values())))]
    parts = state_lib.assemble(c, mesh_lib.make_mesh(c, some))
    state = state_lib.init_state(parts)
    odd = np.array([-0.0, np.nan, -np.nan, np.inf], np.float32)
    odd = np.concatenate([odd, np.array([0x7FC12345], np.uint32).view(np.float32)])
    params = jax.tree.map(
        lambda a: jax.device_put(np.resize(odd, a.shape).astype(a.dtype), a.sharding), state.params
    )
    state = state.replace(params=params)
    copies = LocalCopies(parts, tmp_path / "run")
    (tmp_path / "run").mkdir()
    copies.begin()
    for step in (2, 3):
        copies.save(step, state)
    copies._wait()
    restored, step = LocalCopies(parts, tmp_path / "run").newest(None, [].append)
    assert step == 3
    assert_same_bits(jax.device_get(restored), jax.device_get(state))
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
