"""What becomes of memory that a program on CPU has freed."""

import ctypes
import os
from pathlib import Path

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

# For the environment of a process that computes on CPU: glibc then asks for pages of 2 MiB, where
# the kernel has them for those who ask. It is read when the process starts.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

# Accelerators that a process could use: NVIDIA, TPU (two ways), AMD.
_ACCELERATORS = ("nvidia[0-9]*", "accel*", "vfio/[0-9]*", "kfd")


def keep_freed_on_cpu() -> bool:
    """Lets glibc keep what is freed for the next allocation, rather than give it back at once.

    XLA on CPU takes the temporary buffers of a program from malloc at every call. glibc has the
    large ones mapped anew each time, and the kernel fills page after page with zeros. Memory that
    was needed once stays with the process. All threads share one arena, as any of them may run the
    next step: hosts that feed an accelerator are left alone.

    To be called while there is one thread: what others have allocated from by then remains an
    arena, later threads share it too, and it gives back what is freed whatever was asked for.

    Returns:
      Whether it was done: other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not _on_cpu():
        return False
    never = -1
    return all(
        [mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, never), mallopt(_M_ARENA_MAX, 1)]
    )


def _on_cpu() -> bool:
    """Told without asking JAX, which would start its threads."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms == "cpu"
    return not any(True for name in _ACCELERATORS for _ in Path("/dev").glob(name))
