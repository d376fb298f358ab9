"""SIGINT and SIGTERM at any moment of a command's life: one line, the status, and never lost."""

import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_main import ENVIRONMENT, ROOT, flags, start

SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
BOTH = [signal.SIGINT, signal.SIGTERM]


def has_handler(process: subprocess.Popen) -> bool:
    """Whether the process catches SIGTERM, which Python by itself does not."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def signalled(process: subprocess.Popen, number: signal.Signals, delay: float) -> tuple[str, str]:
    """What a process says that is sent a signal so long after it can hear it, until its end."""
    while not has_handler(process):
        assert process.poll() is None, process.communicate()
        time.sleep(0.0005)
    time.sleep(delay)
    process.send_signal(number)
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"{number.name} after {delay} s was lost: {process.communicate()}")
    assert process.returncode == 128 + number, (delay, out, err)
    return out, err


def train(folder, **changes) -> subprocess.Popen:
    if not sys.platform.startswith("linux"):
        pytest.skip("which signals a process catches is read from /proc")
    more = [f"--config.{name}={value}" for name, value in changes.items()]
    return start("train", *flags(folder), *more, f"--workdir={folder / 'run'}")


@pytest.mark.parametrize(
    "number, delay", [(signal.SIGINT, 0.0), (signal.SIGTERM, 0.3), (signal.SIGINT, 1.0)]
)
def test_a_command_that_still_imports_ends_at_once_with_one_line(tmp_path, number, delay):
    _, err = signalled(train(tmp_path), number, delay)
    assert err == f"\n{SAID[number]}\n"


@pytest.mark.slow
def test_no_signal_is_lost_whenever_it_comes(tmp_path):
    """Through imports, preparing of data, compilation and the first steps."""
    dice = random.Random(0)
    for i in range(24):
        number, delay = BOTH[i % 2], dice.uniform(0, 8) + (i % 6 == 5) * 20
        process = train(tmp_path, **{"train.steps": 1_000_000, "train.eval_every": 1_000_000})
        out, err = signalled(process, number, delay)
        if f"{number.name}: stops after this step" in err:
            assert re.search(rf"{number.name}: stopped and saved at step \d+; the same", out), out
            assert len(err.strip().splitlines()) == 1, err
        else:
            assert err == f"\n{SAID[number]}\n", (delay, err)


def snippet(code: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", f"from moepp_jax import ending\n{code}"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SWALLOWS = """
import time
ending.from_now_on()
class Waits:
    def __del__(self):
        time.sleep(30)
while True:
    try:
        Waits()
        time.sleep(30)
    except BaseException:
        pass
"""
COMPILED = """
import ctypes
ending.from_now_on()
ctypes.CDLL(None).sleep(30)  # no handler of Python's runs in the main thread meanwhile
"""
PRINTS = """
import sys
ending.from_now_on()
while True:
    print("x" * 1000, flush=True)
"""


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("code", [SWALLOWS, COMPILED, PRINTS])
def test_nothing_that_the_main_thread_does_keeps_a_signal_off(code, number):
    began = time.monotonic()
    _, err = signalled(snippet(code), number, 0.5)
    assert err == f"\n{SAID[number]}\n"
    assert time.monotonic() - began < 20


def test_what_is_ignored_stays_ignored_and_a_fork_signals_only_itself():
    code = """
import os, signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
ending.from_now_on()
signal.raise_signal(signal.SIGINT)
child = os.fork()
if not child:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
    signal.raise_signal(signal.SIGTERM)
    time.sleep(30)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
time.sleep(0.2)
print("goes on")
"""
    out, err = snippet(code).communicate(timeout=60)
    assert (out, err) == ("7\ngoes on\n", "")


def test_a_request_hears_of_the_first_signal_and_the_second_ends_at_once():
    code = """
import ctypes, os, signal, time
ending.from_now_on()
from moepp_jax.interrupt import StopRequest
with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    print(stop.signal.name, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    ctypes.CDLL(None).sleep(30)
"""
    process = snippet(code)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and out == "SIGTERM\n"
    assert err == (
        "\nSIGTERM: stops after this step and saves; a second one stops at once\n\nterminated\n"
    )
