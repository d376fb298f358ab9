"""What becomes of memory that a program on CPU has freed."""

import ctypes

import jax

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_on_cpu() -> bool:
    """Lets glibc keep what is freed for the next allocation, rather than give it back at once.

    XLA on CPU takes the temporary buffers of a program from malloc at every call. glibc has the
    large ones mapped anew each time, and the kernel fills page after page with zeros: a tenth of
    a training step. Memory that was needed once stays with the process. All threads share one
    arena, as any of them may run the next step: hosts that feed an accelerator are left alone.

    Returns:
      Whether it was done: other C libraries are left as they are.
    """
    if jax.default_backend() != "cpu":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    never = -1
    return all(
        [mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, never), mallopt(_M_ARENA_MAX, 1)]
    )
