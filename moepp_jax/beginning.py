"""What `moepp` does before all else, imports included, which take seconds and may start threads."""

import sys

from moepp_jax import ending, host_memory

_COMPUTE = {"train", "evaluate", "analyze", "generate", "lm_eval", "experiments"}


def begin() -> None:
    """From here on signals end it, and on CPU it keeps its memory; twice is as good as once."""
    if _COMPUTE & set(sys.argv):
        host_memory.keep_freed_on_cpu()
    ending.from_now_on()  # it starts a thread
