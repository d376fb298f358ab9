"""What SIGINT and SIGTERM do to a command from its first moment on, where nothing is to be saved.

Imports take seconds, so this is what a command does first, and next to nothing is imported for it;
a signal before that ends Python's own start, of some hundredths of a second. A KeyboardInterrupt
would be a traceback of whatever is being imported, and is lost where it meets a callback or a
`__del__`; and while the main thread is in compiled code, which may wait for minutes, Python runs no
handler in it. So a thread hears of signals, and ends the process at once, whatever the others do.
"""

import _thread  # a signal may come while `threading` is being imported
import os
import signal
import sys

_SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}

_ending: list[int] = []  # the thread that ends the process, and others that would


def from_now_on() -> None:
    """Each signal that would end this process does so at once, with one line and its status.

    Who sets another handler for one, as `interrupt.StopRequest` does, hears of it instead. Signals
    that a parent told this process to ignore stay ignored: those of a shell's background. Twice is
    as good as once.
    """
    if signal.getsignal(signal.SIGTERM) is end_now:
        return
    for number in _SAID:
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, end_now)
    listening, told = os.pipe()
    os.set_blocking(told, False)
    # A forked process has no such thread, but would have the pipe.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    _thread.start_new_thread(_listen, (listening,))
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)


def on_interrupt() -> None:
    """The same of a Ctrl-C alone, and only while the main thread runs Python, for scripts."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_now)


def leave_to_parent() -> None:
    """Of a terminal's interrupt, which all its processes get, a worker says nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _listen(listening: int) -> None:
    while heard := os.read(listening, 1):
        if signal.getsignal(heard[0]) is end_now:
            end_now(heard[0], None)


def end_now(number: int, frame: object) -> None:
    """A signal handler, in any thread."""
    at_once(f"\n{_SAID[signal.Signals(number)]}\n", 128 + number)


def at_once(message: str, status: int) -> None:
    """Ends this process with a message on standard error, and waits for nothing.

    What ends in good order may end in the middle of a computation, and would be held up by it.
    """
    _ending.append(_thread.get_ident())
    if _ending[0] != _thread.get_ident():
        _wait()  # until the process is gone
    # In another thread: a signal may have met the middle of a print, which holds the lock.
    flushed = _thread.allocate_lock()
    flushed.acquire()
    try:
        _thread.start_new_thread(lambda: (_flush(), flushed.release()), ())
        flushed.acquire(timeout=1)
    except RuntimeError:  # at the interpreter's end there are no new threads
        pass
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
    try:
        os.write(2, (show_cursor + message).encode())
    finally:
        os._exit(status)


class EndsSoon:
    """A context that an error leaves only to end the process, in so many seconds at most.

    Python waits for all threads, and those of a save that cannot be finished wait for each other.

    Args:
      seconds: for all that is still to be done, once the error has been told.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        code = getattr(error, "code", 1)  # of a SystemExit, which may be a text
        if kind is None or code in (None, 0):
            return
        import threading

        status = code if isinstance(code, int) else 1
        last = threading.Timer(self._seconds, lambda: (_flush(), os._exit(status)))
        last.daemon = True
        last.start()


def _wait() -> None:
    never = _thread.allocate_lock()
    never.acquire()
    never.acquire()


def _flush() -> None:
    try:  # noqa: SIM105 (contextlib may be what is being imported)
        sys.stdout.flush()
    except (OSError, RuntimeError, ValueError, AttributeError):
        pass  # whoever read it may be gone
