"""Who works in a folder whose storage knows no locks: one at a time, and what dies lets go."""

import errno
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from moepp_jax import claim, lease
from moepp_jax.claim import TakenError
from moepp_jax.errors import ConfigError
from moepp_jax.workdir import alone


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    for name, seconds in (("RENEWED", 0.05), ("DEAD", 0.6), ("SETTLED", 0.1)):
        monkeypatch.setattr(lease, name, seconds)


@pytest.fixture
def file(tmp_path):
    return tmp_path / ".lease"


def note(file, **fields):
    """Somebody else's."""
    other = {"name": "other", "host": "far", "process": 7, "since": "noon", "renewals": 0}
    file.write_text(json.dumps(other | fields))


def renewed(file, times):
    """The note when its writer has renewed it so often."""
    before, deadline = json.loads(file.read_text())["renewals"], time.monotonic() + 60
    while (now := json.loads(file.read_text()))["renewals"] < before + times:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return now


def silently(line):
    pytest.fail(f"it waits: {line}")


def test_it_is_renewed_while_it_is_held_and_gone_after_that(file):
    with lease.held(file, silently):
        before = json.loads(file.read_text())
        assert before["process"] == os.getpid()
        assert renewed(file, times=2)["name"] == before["name"]
    assert not file.exists()


def test_who_comes_second_is_refused_as_soon_as_the_first_is_heard(file, monkeypatch):
    monkeypatch.setattr(lease, "DEAD", 60)
    said, over = [], threading.Event()
    renewals = iter(range(1, 10**6))

    def renew():
        while not over.wait(0.05):
            note(file, renewals=next(renewals))

    note(file)
    other = threading.Thread(target=renew)
    other.start()
    try:
        with pytest.raises(TakenError) as taken, lease.held(file, said.append):
            pytest.fail("it is held")
    finally:
        over.set()
        other.join()
    assert taken.value.holder == "process 7 of far, since noon"
    assert said == [
        "process 7 of far, since noon, was at work here: waiting up to 60 s to see whether it lives"
    ]
    assert json.loads(file.read_text())["name"] == "other"


def test_who_is_not_heard_of_any_more_is_dead(file):
    note(file)
    said, began = [], time.monotonic()
    with lease.held(file, said.append):
        assert 0.6 < time.monotonic() - began < 20 and len(said) == 1
        assert json.loads(file.read_text())["process"] == os.getpid()


def test_a_process_that_is_gone_from_this_host_is_not_waited_for(file):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    for number in (process.pid, os.getpid()):  # its number may be ours now
        note(file, **lease._here(), process=number)
        with lease.held(file, silently):
            pass
    # One that lives, and one of another container of this host, of which nothing is known.
    for other in ({"process": os.getppid()}, {"process": process.pid, "processes": "pid:[1]"}):
        note(file, **lease._here() | other)
        said = []
        with lease.held(file, said.append):
            assert len(said) == 1


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"host": 3}'])
def test_what_is_no_note_keeps_nobody_out_for_long(file, content):
    file.write_text(content)
    with lease.held(file, lambda line: None):
        assert json.loads(file.read_text())["process"] == os.getpid()


def test_of_two_that_come_at_once_the_last_writer_has_it(file, monkeypatch):
    """The other one has written, and finds another's note when it looks again."""
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: note(file))
    with pytest.raises(TakenError, match="process 7 of far"), lease.held(file, silently):
        pytest.fail("it is held")
    assert json.loads(file.read_text())["name"] == "other"


@pytest.mark.parametrize("there", [True, False])
def test_who_has_lost_it_ends(file, there):
    """Also when who took it has done its work: what we would write now is written."""
    told = threading.Event()
    ended = []

    def end(message, status):
        ended.append((message, status))
        told.set()

    with lease.held(file, silently, end):
        note(file) if there else file.unlink()
        assert told.wait(20)
    why = {
        True: "process 7 of far, since noon, has taken this over, as it heard nothing of us for "
        "0.6 s",
        False: "our note is gone: another process took this over and has ended, or somebody "
        "removed it",
    }[there]
    assert ended == [(f"error: {file}: {why}: this run ends here\n", 1)]
    assert file.exists() == there
    assert not there or json.loads(file.read_text())["name"] == "other"


def test_a_store_that_fails_for_a_moment_costs_a_renewal_alone(file, monkeypatch):
    with lease.held(file, silently, lambda *said: pytest.fail(str(said))):
        with monkeypatch.context() as patch:
            patch.setattr(lease, "write_atomic", lambda *_: 1 / 0)
            time.sleep(0.2)
        renewed(file, times=1)


def test_a_disk_without_locks_has_a_lease(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claim.fcntl, "lockf", no_locks)
    with alone(tmp_path, silently):
        assert (tmp_path / ".train.lease").exists()
        monkeypatch.setattr(lease, "_is_dead_here", lambda found: False)
        with pytest.raises(ConfigError, match=r"process \d+ of .*, since .*, trains there: wait"):
            alone(tmp_path, lambda line: None).__enter__()
    assert not (tmp_path / ".train.lease").exists()
