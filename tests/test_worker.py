"""A process that works for another one ends with it, whatever ends that and whatever it does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moepp_jax import worker

ROOT = Path(__file__).parents[1]

# What the workers are doing when their parent ends.
SLEEPING = "time.sleep(60)"
HOLDING_THE_INTERPRETER = "sum(range(10**12))"

POOL = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from moepp_jax import worker

def work(i):
    os.write(1, b"%d\\n" % os.getpid())
    {doing}

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, worker.start, (1,)) as pool:
        list(pool.map(work, range(2)))
"""

OF_ANOTHER_PROGRAM = """
import subprocess, sys
from moepp_jax import worker
for _ in range(2):
    process = subprocess.Popen(worker.command("timeit", "-n1", "-r1", "import os, time",
        "os.write(1, str(os.getpid()).encode() + bytes([10]))", "time.sleep(60)"))
process.wait()
"""


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "program",
    [
        POOL.format(doing=SLEEPING),
        pytest.param(
            POOL.format(doing=HOLDING_THE_INTERPRETER),
            marks=pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part"),
        ),
        OF_ANOTHER_PROGRAM,
    ],
    ids=["sleeping", "holding the interpreter", "another program"],
)
def test_it_ends_with_its_parent(tmp_path, program, number):
    file = tmp_path / "program.py"
    file.write_text(program)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(file)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        workers = [process.stdout.readline().strip() for _ in range(2)]
        assert all(map(is_alive, workers))
        # What waits for its workers when it is interrupted is killed: these must not count on it.
        process.send_signal(number)
        time.sleep(0.2)
        process.kill()
    deadline = time.monotonic() + 10
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = [pid for pid in workers if is_alive(pid)]
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert not left


def test_another_program_gets_its_arguments_and_its_status():
    command = worker.command("timeit", "-n1", "-r1", "import sys", "print(sys.argv)")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "'-n1', '-r1', 'import sys'" in done.stdout
    wrong = subprocess.run(worker.command("timeit", "--wrong"), capture_output=True, text=True)
    assert wrong.returncode == 2 and "--wrong not recognized" in wrong.stderr + wrong.stdout


def test_it_imports_nothing_of_ours():
    program = (
        "import sys, moepp_jax.worker; print([m for m in sys.modules if m[:9] == 'moepp_jax'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "['moepp_jax', 'moepp_jax.worker']"
