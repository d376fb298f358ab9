"""Ending a process at once, and quietly: what a Ctrl-C does where nothing is to be saved.

It stands alone, without JAX, so that it is in force before anything is imported that takes long.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def on_interrupt() -> None:
    """Has a Ctrl-C end the process in one line; one that is ignored, as in the background, stays.

    A KeyboardInterrupt shows where the program was; it is lost where it meets one of JAX's
    callbacks, and what ends in good order may end in the middle of a computation.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def at_once(message: str, status: int) -> NoReturn:
    """Ends the process without waiting for its threads."""
    sys.stdout.flush()
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
    os.write(2, (show_cursor + message).encode())
    os._exit(status)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    at_once("\ninterrupted\n", 128 + number)
