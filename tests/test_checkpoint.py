"""Checkpoints: equal bit for bit on any mesh, and never wrong in silence."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moepp_jax import checksums
from moepp_jax.checkpoint import CheckpointError, Checkpoints, SaveError
from moepp_jax.errors import ConfigError
from moepp_jax.verified import only_verified
from moepp_jax.workdir import holds_start
from tests.unprivileged import unprivileged


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState


def _mesh(*shape: int) -> jax.sharding.Mesh:
    names = ("x", "y")[: len(shape)]
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def _init(width: int = 16) -> State:
    params = {
        "layer": {"kernel": jax.random.normal(jax.random.key(0), (8, width))},
        "norm": jnp.ones((width,), jnp.bfloat16),
    }
    mask = {"layer": True, "norm": False}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mask=mask))
    return State(jnp.int32(3), params, optimizer.init(params))


def _shardings(tree, mesh):
    """Matrices split over the first axis of the mesh, the rest on every device."""
    spec = PartitionSpec(mesh.axis_names[0])
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, spec if leaf.ndim == 2 else PartitionSpec()), tree
    )


def _state(mesh=None, **sizes) -> State:
    state = _init(**sizes)
    return jax.device_put(state, _shardings(state, mesh or _mesh(8)))


def _abstract(tree, mesh=None):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        _shardings(tree, mesh or _mesh(8)),
    )


def _assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def _save(workdir, *steps, state=None, keep=9):
    with Checkpoints(workdir, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state or _state())


def _array_file(workdir: Path, step: int, item: str) -> Path:
    """The file that holds most of an item's arrays."""
    files = (workdir / "checkpoints" / str(step) / item).rglob("d/*")
    return max(files, key=lambda file: file.stat().st_size)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("target", [(8,), (2,), (1,), (4, 2)])
def test_a_state_restores_onto_any_mesh_bit_for_bit(tmp_path, target):
    state = _state(_mesh(2, 4))
    _save(tmp_path, 3, state=state)
    abstract = _abstract(state, _mesh(*target))
    with Checkpoints(tmp_path, 1) as checkpoints:
        restored = checkpoints.restore(checkpoints.latest_step(), abstract)
    _assert_equal(restored, state)
    jax.tree.map(lambda leaf, want: _assert_sharded(leaf, want.sharding), restored, abstract)


def _assert_sharded(leaf, sharding):
    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_a_state_may_be_a_dictionary(tmp_path):
    state = {"params": _state().params, "step": _state().step}
    _save(tmp_path, 1, state=state)
    with Checkpoints(tmp_path, 1) as checkpoints:
        _assert_equal(checkpoints.restore(1, _abstract(state)), state)


def test_parameters_restore_without_a_look_at_the_optimizer_state(tmp_path):
    state = _state()
    _save(tmp_path, 3, state=state)
    _flip(_array_file(tmp_path, 3, "rest"))
    with Checkpoints(tmp_path, 1) as checkpoints:
        _assert_equal(checkpoints.restore_params(3, _abstract(state.params)), state.params)
        with pytest.raises(CheckpointError, match=r"checkpoint 3 .* is damaged: rest/"):
            checkpoints.restore(3, _abstract(state))


@pytest.mark.parametrize(
    "damage, verdict",
    [(_flip, "not as it was saved"), (_truncate, "not as it was saved"), (Path.unlink, "missing")],
)
def test_a_damaged_file_is_named_with_its_step_and_the_others(tmp_path, damage, verdict):
    _save(tmp_path, 10, 20)
    file = _array_file(tmp_path, 20, "params")
    damage(file)
    name = file.relative_to(tmp_path / "checkpoints" / "20")
    with (
        Checkpoints(tmp_path, 2) as checkpoints,
        pytest.raises(CheckpointError, match=f"checkpoint 20 .*{name} is {verdict}; .*: 10$"),
    ):
        checkpoints.restore_params(20, _abstract(_state().params))


@pytest.mark.parametrize("name", ["meta/metadata", "checksums.json", "params/_METADATA"])
def test_an_empty_file_in_a_step_costs_that_step_only(tmp_path, name):
    _save(tmp_path, 10, 20)
    (tmp_path / "checkpoints" / "20" / name).write_bytes(b"")
    reports = []
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.latest_intact_step(reports.append) == 10
        with pytest.raises(CheckpointError, match=f"checkpoint 20 .*{name.split('/')[-1]}"):
            checkpoints.restore(20, _abstract(_state()))
    assert len(reports) == 1 and "checkpoint 20 is damaged" in reports[0] and name in reports[0]


@pytest.mark.parametrize("name", ["meta/metadata", "checksums.json", "params/_METADATA"])
def test_a_pipe_in_a_step_is_not_waited_for(tmp_path, name):
    _save(tmp_path, 10, 20)
    file = tmp_path / "checkpoints" / "20" / name
    file.unlink()
    os.mkfifo(file)
    reports = []
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.latest_intact_step(reports.append) == 10
    assert len(reports) == 1 and "checkpoint 20 is damaged" in reports[0]


def test_training_goes_on_from_an_older_step_and_replaces_the_damaged_one(tmp_path):
    _save(tmp_path, 10, 20, 30)
    _flip(_array_file(tmp_path, 20, "rest"))
    _truncate(_array_file(tmp_path, 30, "rest"))
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.latest_intact_step(lambda _: None) == 10
        checkpoints.save(15, _state())  # between the one resumed from and the damaged ones
        assert checkpoints.steps() == [10, 15]
        checkpoints.save(20, _state())
        assert checkpoints.latest_intact_step() == 20
        _assert_equal(checkpoints.restore(20, _abstract(_state())), _state())


def test_saving_a_damaged_step_again_replaces_it_at_once(tmp_path):
    _save(tmp_path, 10, 20)
    _flip(_array_file(tmp_path, 20, "params"))
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.latest_intact_step(lambda _: None)
        checkpoints.save(20, _state())
        assert checkpoints.latest_intact_step() == 20


def test_if_all_steps_are_damaged_nothing_starts_anew_in_silence(tmp_path):
    _save(tmp_path, 10)
    _flip(_array_file(tmp_path, 10, "params"))
    with (
        Checkpoints(tmp_path, 2) as checkpoints,
        pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"),
    ):
        checkpoints.latest_intact_step(lambda _: None)


def _forget_one(file):
    sums = json.loads(file.read_text())
    sums.pop(next(name for name in sums if name.startswith("params/d/")))
    file.write_text(json.dumps(sums))


LOST = [Path.unlink, lambda file: file.write_text("{}"), _forget_one]


@pytest.mark.parametrize("lose", LOST)
def test_a_step_without_checksums_is_accepted_and_its_damage_still_one_clear_error(
    tmp_path, capsys, lose
):
    """As versions left it that wrote none: it is used, and who uses it is told."""
    _save(tmp_path, 10)
    lose(tmp_path / "checkpoints" / "10" / "checksums.json")
    reports = []
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.choose(None) == 10
        assert checkpoints.latest_intact_step(reports.append) == 10
        assert "checkpoint 10 cannot be verified, looking for an older one" in reports[0]
        assert "cannot be verified, as " in reports[1] and "(--strict would ref" in reports[1]
        _assert_equal(checkpoints.restore(10, _abstract(_state())), _state())
        assert not capsys.readouterr().err  # that was said
        _truncate(_array_file(tmp_path, 10, "params"))
        with pytest.raises(CheckpointError, match=r"checkpoint 10 .* (cannot be read|not as it w)"):
            checkpoints.restore(10, _abstract(_state()))
    with Checkpoints(tmp_path, 2) as checkpoints, contextlib.suppress(CheckpointError):
        checkpoints.restore_params(10, _abstract(_state().params))
    if lose is not _forget_one:  # whose other files were looked at, and the error came first
        assert "checkpoint 10 in" in capsys.readouterr().err


@pytest.mark.parametrize("lose", LOST)
def test_a_step_that_can_be_verified_is_preferred(tmp_path, lose, capsys):
    _save(tmp_path, 10, 20)
    with Checkpoints(tmp_path, 9) as checkpoints:
        checkpoints.save(30, _state(), {"eval_loss": 1.0})
    for step in (20, 30):
        lose(tmp_path / "checkpoints" / str(step) / "checksums.json")
    reports = []
    with Checkpoints(tmp_path, 2) as checkpoints:
        if lose is not _forget_one:  # seen without a look at any other file
            assert checkpoints.choose(None) == 10
            assert "best checkpoint, 30, cannot be verified: --step" in capsys.readouterr().err
        assert checkpoints.choose(20) == 20
        assert checkpoints.latest_intact_step(reports.append) == 10
        assert [r.split(",")[0] for r in reports] == [
            f"checkpoint {step} cannot be verified" for step in (30, 20)
        ]
        checkpoints.save(20, _state())  # what was passed over is written again
        assert checkpoints.latest_intact_step(reports.append) == 20
        assert checkpoints.steps() == [10, 20]


def test_what_cannot_be_verified_is_refused_where_that_is_asked_for(tmp_path):
    _save(tmp_path, 10)
    with only_verified():
        with Checkpoints(tmp_path, 2) as checkpoints:
            assert checkpoints.latest_intact_step() == 10
        (tmp_path / "checkpoints" / "10" / "checksums.json").unlink()
        said = (
            r"checkpoint 10 in .* cannot be verified: it has no checksums.json; without strict it"
        )
        with Checkpoints(tmp_path, 2) as checkpoints:
            with pytest.raises(CheckpointError, match=said):
                checkpoints.latest_intact_step(lambda line: None)
            with pytest.raises(CheckpointError, match=said):
                checkpoints.restore_params(10, _abstract(_state().params))
            with pytest.raises(CheckpointError, match=said):
                checkpoints.params_folder(10, _abstract(_state().params))
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.latest_intact_step(lambda line: None) == 10


def test_a_step_of_an_earlier_version_is_verified_by_its_sha_256(tmp_path):
    _save(tmp_path, 10)
    file = tmp_path / "checkpoints" / "10" / "checksums.json"
    file.write_text(
        json.dumps(
            {
                name: hashlib.sha256((file.parent / name).read_bytes()).hexdigest()
                for name in json.loads(file.read_text())
            }
        )
    )
    with only_verified():
        with Checkpoints(tmp_path, 2) as checkpoints:
            assert checkpoints.latest_intact_step() == 10
            _assert_equal(checkpoints.restore(10, _abstract(_state())), _state())
        _flip(_array_file(tmp_path, 10, "params"))
        with (
            Checkpoints(tmp_path, 2) as checkpoints,
            pytest.raises(
                CheckpointError, match=r"checkpoint 10 .*params/\S+ is not as it was sav"
            ),
        ):
            checkpoints.restore(10, _abstract(_state()))


def test_what_a_resume_has_verified_is_not_read_again_to_restore_it(tmp_path, monkeypatch):
    _save(tmp_path, 10)
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.latest_intact_step() == 10
        with monkeypatch.context() as patch:
            patch.setattr(checksums, "verdict", lambda *_: pytest.fail("it is read again"))
            checkpoints.restore(10, _abstract(_state()))
        checkpoints.save(20, _state())
        checkpoints.wait()
        _flip(_array_file(tmp_path, 20, "params"))
        with pytest.raises(CheckpointError, match=r"checkpoint 20 .* is damaged: params/"):
            checkpoints.restore(20, _abstract(_state()))


@pytest.mark.parametrize("left", [[], ["meta"], ["params"]])
def test_a_folder_with_nothing_in_it_is_a_damaged_step(tmp_path, left):
    _save(tmp_path, 10)
    for item in left:
        (tmp_path / "checkpoints" / "99" / item).mkdir(parents=True)
    (tmp_path / "checkpoints" / "99").mkdir(exist_ok=True)
    reports = []
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.choose(None) == 10
        with pytest.raises(CheckpointError, match=r"checkpoint 99 .* is damaged: meta/ is missing"):
            checkpoints.restore(99, _abstract(_state()))
        assert checkpoints.latest_intact_step(reports.append) == 10
        assert len(reports) == 1 and "checkpoint 99 is damaged" in reports[0]
        checkpoints.save(11, _state())
        checkpoints.wait()
        assert checkpoints.steps() == [10, 11]


def test_a_disk_that_is_not_mounted_is_no_new_beginning(tmp_path):
    _save(tmp_path, 10)
    disk = tmp_path / "disk"
    (tmp_path / "checkpoints").rename(disk)
    (tmp_path / "checkpoints").symlink_to(disk, target_is_directory=True)
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.steps() == [10]
    disk.rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=rf"checkpoints is a link to {disk}, which is no fol"):
        Checkpoints(tmp_path, 2)
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoints is no folder: a run keeps its"):
        Checkpoints(tmp_path, 2)


def test_what_orbax_notes_of_a_step_may_be_anything(tmp_path):
    _save(tmp_path, 10)
    (tmp_path / "checkpoints" / "10" / "_CHECKPOINT_METADATA").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="checkpoints cannot be read: maximum recursion"):
        Checkpoints(tmp_path, 2)


def test_an_old_step_that_cannot_be_removed_ends_no_run(tmp_path, capsys):
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, _state())
        checkpoints.wait()
        kept = tmp_path / "checkpoints" / "1"
        kept.chmod(0o500)
        with unprivileged():
            for step in (2, 3):
                checkpoints.save(step, _state())
                checkpoints.wait()
            kept.chmod(0o700)
        said = capsys.readouterr().err
        assert checkpoints.steps() == [1, 3] and checkpoints.latest_intact_step() == 3
    assert said.count("checkpoint 2 is saved, but 1 in ") == said.count("cannot all be rem") == 1


@pytest.mark.parametrize("put", [os.mkfifo, lambda file: file.symlink_to("/dev/zero")])
def test_what_orbax_would_wait_for_or_read_for_ever_is_refused(tmp_path, put):
    _save(tmp_path, 10)
    file = tmp_path / "checkpoints" / "10" / "_CHECKPOINT_METADATA"
    file.unlink()
    put(file)
    with pytest.raises(CheckpointError, match=r"cannot be read: it is a .*_CHECKPOINT_METADATA"):
        Checkpoints(tmp_path, 2)


def test_a_step_that_may_not_be_read_is_a_damaged_one(tmp_path):
    _save(tmp_path, 10, 20)
    reports = []
    for name in ("20/params", "20/checksums.json", "20"):
        (tmp_path / "checkpoints" / name).chmod(0)
        with unprivileged(), Checkpoints(tmp_path, 2) as checkpoints:
            assert checkpoints.latest_intact_step(reports.append) == 10
            assert "checkpoint 20 is damaged" in reports.pop(0), name
            if name == "20":
                with pytest.raises(
                    SaveError, match=r"20 in .* nor be removed to be .*: Permission d"
                ):
                    checkpoints.save(20, _state())
        (tmp_path / "checkpoints" / name).chmod(0o700)
    (tmp_path / "checkpoints").chmod(0)
    with unprivileged(), pytest.raises(CheckpointError, match=r"checkpoints cannot be read: Permi"):
        Checkpoints(tmp_path, 2)
    (tmp_path / "checkpoints").chmod(0o700)


def test_a_save_that_was_killed_is_no_step_and_can_be_repeated(tmp_path, caplog):
    _save(tmp_path, 10)
    (tmp_path / "checkpoints" / "10").rename(tmp_path / "checkpoints" / "20.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.latest_intact_step() is None
        checkpoints.save(20, _state())
        _assert_equal(checkpoints.restore(20, _abstract(_state())), _state())
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["20"]
    assert "already exists" not in caplog.text  # orbax's complaint of what the kill left


def test_the_newest_and_the_best_are_kept_also_after_a_restart(tmp_path):
    losses = {10: float("nan"), 20: 3.0, 30: 5.0, 40: 4.0}
    with Checkpoints(tmp_path, 2) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, _state(), {"eval_loss": np.float32(loss)})
        checkpoints.save(50, _state())
        checkpoints.wait()
        assert checkpoints.steps() == [20, 40, 50]
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.best_step() == 20
        assert (checkpoints.choose(None), checkpoints.choose(50)) == (20, 50)
        checkpoints.save(60, _state(), {"eval_loss": 3.5})
        checkpoints.save(70, _state(), {"eval_loss": 2.5})
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (70, 70)
    assert {entry.name for entry in (tmp_path / "checkpoints").iterdir()} == {"60", "70"}


def test_a_step_of_which_one_sum_is_gone_is_chosen_after_those_with_all(tmp_path, capsys):
    _save(tmp_path, 10, 20)
    file = tmp_path / "checkpoints" / "20" / "checksums.json"
    sums = json.loads(file.read_text())
    file.write_text(json.dumps(dict([*sums.items()][1:])))
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.choose(None) == 10 and checkpoints.choose(20) == 20


def test_an_old_step_that_cannot_be_read_is_no_hindrance(tmp_path):
    """Neither its metadata nor what is in it is asked for, where a newer step is whole."""
    _save(tmp_path, 10, 20)
    old = tmp_path / "checkpoints" / "10"
    (old / "_CHECKPOINT_METADATA").unlink()
    os.mkfifo(old / "_CHECKPOINT_METADATA")
    (tmp_path / "config.json").write_text("{}")
    old.chmod(0)
    try:
        with unprivileged(), Checkpoints(tmp_path, 2) as checkpoints:
            assert checkpoints.latest_intact_step() == 20
            for share in (checksums.Share(0, 2), checksums.Share(1, 2)):
                found = checksums.verdict(old, ["params"], ["params"], share)
                assert "cannot be read: Permission denied" in found.damage
            shutil.rmtree(tmp_path / "checkpoints" / "20")  # which is looked into first or last
            assert not holds_start(tmp_path)
    finally:
        old.chmod(0o700)


def test_a_step_that_is_there_stays_as_it_is(tmp_path):
    _save(tmp_path, 10)
    changed = jax.tree.map(lambda leaf: leaf + 1, _state())
    _save(tmp_path, 10, state=changed)
    with Checkpoints(tmp_path, 2) as checkpoints:
        _assert_equal(checkpoints.restore(10, _abstract(_state())), _state())


def test_another_architecture_names_the_paths_before_any_array_is_read(tmp_path):
    _save(tmp_path, 10)
    _array_file(tmp_path, 10, "params").unlink()  # reading an array would raise something else
    wanted = _abstract(_state(width=24).params)
    wanted["gate"] = wanted["norm"]
    with Checkpoints(tmp_path, 2) as checkpoints:
        with pytest.raises(CheckpointError, match="another architecture") as error:
            checkpoints.restore_params(10, wanted)
        assert str(error.value).splitlines()[1:] == [
            "  params/gate: absent saved, [24] wanted",
            "  params/layer/kernel: [8, 16] saved, [8, 24] wanted",
            "  params/norm: [16] saved, [24] wanted",
        ]
        with pytest.raises(CheckpointError, match=r"(?s)rest/opt_state/.* and 1 more$"):
            checkpoints.restore(10, _abstract(_state(width=24)))


def test_a_step_that_is_not_there_names_those_that_are(tmp_path):
    _save(tmp_path, 10, 20)
    with (
        Checkpoints(tmp_path, 2) as checkpoints,
        pytest.raises(CheckpointError, match=r"checkpoint 15 .* is not there; .*: 10, 20$"),
    ):
        checkpoints.restore(15, _abstract(_state()))


def test_without_any_checkpoint_the_error_says_so_and_nothing_is_made(tmp_path):
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.best_step() is None
        assert checkpoints.latest_intact_step() is None
        with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}.*: training"):
            checkpoints.restore_params(checkpoints.latest_step(), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"No space left on device, where [\d,]+ bytes.* fit and it takes up to [\d,]+ bytes; s",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "/x"),
            r"Read-only file system \(/x\); steps",
        ),
        (
            ValueError(
                'Error writing "/a": Failed to write: No space left on device [os_error_code'
            ),
            r"No space left on device, where",
        ),
    ],
)
def test_a_save_that_fails_is_told_and_leaves_the_steps_before(tmp_path, monkeypatch, error, said):
    _save(tmp_path, 10)

    def fail(*_):
        raise error

    with Checkpoints(tmp_path, 1) as checkpoints:
        monkeypatch.setattr(checksums, "write_atomic", fail)
        checkpoints.save(20, _state())
        with pytest.raises(SaveError, match=f"checkpoint 20 in .* cannot be saved: {said}"):
            checkpoints.wait()
        assert checkpoints.latest_intact_step() == 10
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["10"]


def test_a_save_that_fails_beside_another_error_leaves_nothing(tmp_path, monkeypatch):
    """The other one is told."""

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    _save(tmp_path, 10)
    with pytest.raises(ConfigError, match="no rows"), Checkpoints(tmp_path, 1) as checkpoints:
        monkeypatch.setattr(checksums, "write_atomic", fail)
        checkpoints.save(20, _state())
        raise ConfigError("no rows")
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["10"]


def test_who_cannot_save_does_not_wait_for_it(tmp_path, monkeypatch):
    """It would wait for ever where the write cannot be finished."""
    with pytest.raises(SaveError), Checkpoints(tmp_path, 1) as checkpoints:
        monkeypatch.setattr(checkpoints, "close", lambda: pytest.fail("it waits"))
        raise SaveError("no room")


def test_saving_and_restoring_move_no_array_implicitly(tmp_path):
    state = _state()
    with jax.transfer_guard("disallow"):
        _save(tmp_path, 1, state=state)
        with Checkpoints(tmp_path, 1) as checkpoints:
            restored = checkpoints.restore(1, _abstract(state))
    _assert_equal(restored, state)


def test_a_state_that_is_donated_while_it_is_being_saved_is_saved_as_it_was(tmp_path):
    mesh = _mesh(8)
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    kernel = np.arange(2**20, dtype=np.float32).reshape(1024, 1024)
    saved = {"params": {"kernel": kernel}, "count": np.zeros(8, np.int32)}
    state = jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), saved)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )
    train = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, state)
        for _ in range(5):
            state = train(state)
        _assert_equal(checkpoints.restore(1, abstract), saved)


UNFINISHED = """
import os, sys, time
import jax.numpy as jnp
from moepp_jax import cli, ending
from moepp_jax.checkpoint import Checkpoints
from moepp_jax.errors import ConfigError

def fails(path, *args, real=os.mkdir, **options):
    # As on a disk that has no room for a folder more: some threads fail, others wait for them.
    if os.path.basename(path).startswith(("params", "rest")):
        raise OSError(28, "No space left on device", str(path))
    real(path, *args, **options)

def main(argv):
    state = {"params": {"a": jnp.ones(8)}, "step": jnp.int32(1)}
    with Checkpoints(folder, 2) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        os.mkdir = fails
        checkpoints.save(2, state)
        if ends != "save":
            raise ConfigError("something else went wrong")
        checkpoints.wait()

folder, ends = sys.argv.pop(), sys.argv.pop()
with ending.EndsSoon(seconds=3):
    cli.run(main)
"""


@pytest.mark.parametrize(
    ("ends", "status", "said"),
    [
        (
            "save",
            74,
            r"error: checkpoint 2 in .* cannot be saved: No space left on device .*; steps 1",
        ),
        ("other", 1, "error: something else went wrong"),
    ],
)
def test_a_save_that_cannot_be_finished_holds_no_process_up(tmp_path, ends, status, said):
    """Orbax's threads wait 300 s for each other, and Python for them."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", UNFINISHED, ends, tmp_path],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert ended.returncode == status
    assert re.match(said, ended.stderr) and ended.stderr.count("\n") == 1, ended.stderr


def test_a_step_wants_as_many_inodes_as_the_newest_one_has(tmp_path, monkeypatch):
    _save(tmp_path, 10)
    folder = tmp_path / "checkpoints" / "10"
    for number in range(50):
        (folder / f"more-{number}").touch()
    needed = len([*folder.rglob("*")])

    def left(free, of=1000):
        disk = SimpleNamespace(f_files=of, f_favail=free)
        monkeypatch.setattr(os, "statvfs", lambda path: disk)

    with Checkpoints(tmp_path, 2) as checkpoints:
        for free, of in ((needed, 1000), (0, 0), (10**6, 10**7)):  # 0 where nobody counts them
            left(free, of)
            checkpoints._steps._require_inodes()
        left(needed - 1)
        said = rf"No space left on device for {needed} files, but for {needed - 1}"
        with pytest.raises(OSError, match=said):
            checkpoints._steps._require_inodes()
