"""What a process that works for another one does first, so that it never outlives that one.

It imports nothing of ours: what a worker works with takes seconds to import, and its parent may be
killed in these.

    python worker.py PID MODULE ARGUMENT ...    # as python -m MODULE, for the process PID
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from multiprocessing import connection
from typing import Any

# What the parent shares with all its workers, in them.
shared: tuple[Any, ...] = ()

# Seconds between two looks at whether the parent is there, where nothing wakes us when it ends.
_LOOK_EVERY = 0.1

# Of Linux's prctl: the signal that the kernel sends a process when its parent ends.
_PR_SET_PDEATHSIG = 1


def start(*given: Any) -> None:
    """The initializer of a pool whose parent starts processes in a thread that outlives them."""
    global shared
    shared = given
    end_with_parent()
    _have_the_kernel_end_us(multiprocessing.parent_process().pid)


def end_with_parent() -> None:
    """Ties a worker to its parent, which takes SIGINT for both, and may be killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent takes it
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=_end_after, args=[sentinel], daemon=True).start()


def _end_after(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _have_the_kernel_end_us(parent: int) -> None:
    """At once, whatever code holds the interpreter; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before we asked
            os._exit(1)


def _end_without(parent: int) -> None:
    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def command(module: str, *arguments: str) -> list[str]:
    """The command line of `python -m module` that ends with this process."""
    return [sys.executable, "-P", __file__, str(os.getpid()), module, *arguments]


if __name__ == "__main__":
    _, _parent, *sys.argv = sys.argv
    _end_without(int(_parent))
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
