import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from moepp_jax import host_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        b"1" * 100_000_000
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), host_memory.keep_freed_on_cpu(), faults(), faults())
"""


def test_freed_memory_is_used_again_without_a_page_fault():
    """In a process of its own: the setting stays. Pages of 2 MiB would be few from the start."""
    small = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=small
    )
    given_back, kept, _, after = out.stdout.split()
    pages = 5 * 100_000_000 // 4096
    assert kept == "True"
    assert int(given_back) > 0.5 * pages
    assert int(after) < 0.01 * pages


ARENAS = """
import atexit, ctypes, runpy, sys, tempfile

def say_arenas():
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    libc.malloc_info.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.fclose.argtypes = [ctypes.c_void_p]
    with tempfile.NamedTemporaryFile() as file:
        stream = libc.fopen(file.name.encode(), b"w")
        libc.malloc_info(0, stream)
        libc.fclose(stream)
        print("arenas", file.read().count(b"<heap nr"))

atexit.register(say_arenas)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "command",
    [
        "moepp_jax.main train --config=none.py",
        "moepp_jax.experiments.worker none",
        "moepp_jax.experiments.twins --config=none.py",
    ],
)
def test_a_command_that_computes_has_one_arena_whatever_it_imports(command):
    """One of a thread gives memory back at every step, and the next step fills it with zeros."""
    out = subprocess.run(
        [sys.executable, "-c", ARENAS, *command.split()], capture_output=True, text=True
    )
    assert out.stdout.splitlines()[-1:] == ["arenas 1"], out.stderr
