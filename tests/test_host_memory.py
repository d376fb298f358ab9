import subprocess
import sys

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
    """In a process of its own: the setting stays."""
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    given_back, kept, _, after = out.stdout.split()
    pages = 5 * 100_000_000 // 4096
    assert kept == "True"
    assert int(given_back) > 0.5 * pages
    assert int(after) < 0.01 * pages
