"""A checkpoint that cannot be written ends a run, or is told of each time, as the run has asked."""

import errno

import jax.numpy as jnp
import pytest

from moepp_jax import checksums
from moepp_jax.checkpoint import Checkpoints, SaveError
from moepp_jax.saving import Saver
from moepp_jax.storage import UnwritableError

STATE = {"params": {"kernel": jnp.ones((4, 2))}, "step": jnp.int32(3)}


@pytest.fixture
def full(monkeypatch):
    """Steps for which there is no room, once their arrays are written."""
    steps, write = set(), checksums.write_atomic

    def there_is_no_room_for_some(file, content):
        if int(file.parent.name.partition(".")[0]) in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, content)

    monkeypatch.setattr(checksums, "write_atomic", there_is_no_room_for_some)
    return steps


def saved(folder, on_error, said=None):
    """Saves steps 1 to 6 of a run, or fewer."""
    with Checkpoints(folder, 9) as checkpoints:
        saver = Saver(checkpoints, on_error, (said if said is not None else []).append)
        try:
            for step in range(1, 7):
                saver.save(step, STATE, {}, last=step == 6)
        finally:
            there = checkpoints.steps()
        return there


def test_a_run_goes_on_and_says_so_each_time(tmp_path, full):
    full.update({2, 3, 5})
    said = []
    assert saved(tmp_path, "continue", said) == [1, 4, 6]
    folder = tmp_path / "checkpoints"
    starts = [f"warning: checkpoint {step} in {folder} cannot be saved: No" for step in (2, 3, 5)]
    assert [line[: len(start)] for line, start in zip(said, starts, strict=True)] == starts
    ends = [
        "steps 1 are kept; the run goes on",
        "steps 1 are kept; the run goes on; 2 saves in a row have failed",
        "steps 1, 4 are kept; the run goes on",
    ]
    assert [line.rpartition(" bytes; ")[2] for line in said] == ends
    assert sorted(entry.name for entry in folder.iterdir()) == ["1", "4", "6"]


def test_arrays_that_cannot_be_written_are_the_reason_that_is_told(tmp_path, monkeypatch):
    """And no later save is blamed for them."""
    said, real = [], checksums.write_own

    def full(folder, who, *args):
        if folder.name.startswith("2."):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(folder, who, *args)

    monkeypatch.setattr(checksums, "write_own", full)
    assert saved(tmp_path, "continue", said) == [1, 3, 4, 5, 6]
    (line,) = said
    assert "checkpoint 2 in" in line and "cannot be saved: No space left on device, where" in line


def test_a_step_without_the_part_of_a_process_is_none(tmp_path, monkeypatch):
    said, real = [], checksums.write_own

    def silent(folder, who, *args):
        if not folder.name.startswith("2.") or who != "rest.0":
            real(folder, who, *args)

    monkeypatch.setattr(checksums, "write_own", silent)
    assert saved(tmp_path, "continue", said) == [1, 3, 4, 5, 6]
    assert "cannot be saved: not every process has written its part (" in said[0]
    assert "checksums.rest.0.json" in said[0] and len(said) == 1


def test_saves_that_cannot_even_begin_are_counted_too(tmp_path, monkeypatch):
    said, real = [], Checkpoints.save

    def save(checkpoints, step, *args):
        if step in (2, 3, 4):
            raise SaveError(f"checkpoint {step} cannot be saved")
        real(checkpoints, step, *args)

    monkeypatch.setattr(Checkpoints, "save", save)
    assert saved(tmp_path, "continue", said) == [1, 5, 6]
    assert [line.partition("; ")[2] for line in said] == [
        "the run goes on",
        "the run goes on; 2 saves in a row have failed",
        "the run goes on; 3 saves in a row have failed",
    ]


def test_who_only_closes_is_told_too(tmp_path, full):
    full.add(2)
    told = pytest.raises(SaveError, match=r"checkpoint 2 .* cannot be saved: No space left")
    with told, Checkpoints(tmp_path, 9) as checkpoints:
        checkpoints.save(2, STATE)
    assert not [*(tmp_path / "checkpoints").iterdir()]


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_the_last_one_must_be_written(tmp_path, full, on_error):
    full.add(6)
    with pytest.raises(SaveError, match=r"checkpoint 6 .* cannot be saved: No space left"):
        saved(tmp_path, on_error)


def test_a_run_that_is_to_stop_does_so_at_the_next_one(tmp_path, full):
    full.add(2)
    with pytest.raises(SaveError, match=r"checkpoint 2 .* steps 1 are kept"):
        saved(tmp_path, "stop")
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_no_step_is_saved_whose_rows_are_not(tmp_path):
    def lost():
        raise UnwritableError("metrics.jsonl cannot be written: no room", "mend that")

    said = []
    with Checkpoints(tmp_path, 1) as none:
        patient, strict = (Saver(none, way, said.append) for way in ("continue", "stop"))
    assert not patient.keeps(lost, last=False) and not patient.keeps(lost, last=False)
    assert patient.keeps(lambda: None, last=True) and strict.keeps(lambda: None, last=False)
    for saver, last in ((patient, True), (strict, False)):
        with pytest.raises(UnwritableError, match="no room; mend that"):
            saver.keeps(lost, last)
    assert said == [
        "warning: metrics.jsonl cannot be written: no room; the run goes on",
        "warning: metrics.jsonl cannot be written: no room; the run goes on; 2 saves in a row have "
        "failed",
    ]
