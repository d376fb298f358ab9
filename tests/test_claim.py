"""Locks between processes: one holds it, the others are told who, and death gives it back."""

import os
import signal
import subprocess
import sys
import time

import pytest

from moepp_jax import claim
from moepp_jax.claim import TakenError, claimed, is_taken, waiting_for

HOLD = """
import sys, time
from moepp_jax.claim import claimed
with claimed(__import__("pathlib").Path(sys.argv[1])):
    print("has it", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A lock that another process has, and that process."""
    file = tmp_path / "run" / ".lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"has it\n"
    yield file, process
    process.kill()
    process.wait()


def test_one_has_it_until_it_dies(holder):
    file, process = holder
    before = file.read_text()
    assert is_taken(file) and file.read_text() == before
    said = rf"\.lock: process {process.pid} of .*, since .* has it"
    with pytest.raises(TakenError, match=said), claimed(file):
        raise AssertionError
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not is_taken(file)
    with claimed(file):
        assert f"process {os.getpid()} of" in file.read_text()
    assert not is_taken(file)


def test_what_was_never_held_is_free(tmp_path):
    assert not is_taken(tmp_path / "none" / ".lock")
    assert not (tmp_path / "none").exists()


def test_waiting_for_another(tmp_path):
    file = tmp_path / ".lock"
    code = (
        "import sys, time, pathlib\n"
        "from moepp_jax.claim import waiting_for\n"
        "with waiting_for(pathlib.Path(sys.argv[1])):\n"
        "    print('has it', flush=True)\n"
        "    time.sleep(0.5)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        start = time.monotonic()
        with waiting_for(file):
            assert time.monotonic() - start > 0.2


def test_a_file_that_is_not_to_stay_goes_with_the_lock(tmp_path):
    """And who opened it before it went takes the new one of its name."""
    file = tmp_path / ".lock"
    with claimed(file, leave=False):
        assert file.exists()
    assert list(tmp_path.iterdir()) == []
    lock = claim._lock

    def too_late(opened):
        file.unlink(missing_ok=True)  # its holder has just ended
        claim._lock = lock
        return lock(opened)

    claim._lock = too_late
    with claimed(file):
        assert f"process {os.getpid()} of" in file.read_text()
