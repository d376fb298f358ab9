"""Numbers of a run for TensorBoard, a second copy of what metrics.jsonl has: no run ends for it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

# Seconds between two visits to the disk.
_FLUSH_EVERY = 10.0

# Bytes after which another file is begun, which TensorBoard reads after the one before: under an
# object store the newest one is written again and again, as long as it grows.
_LARGE = 16 * 2**20


class Events:
    """Writes event files; where that fails it says so once, and writes no more.

    tensorboardX's own writer has a thread, which dies of a full disk and then lets the run wait for
    it without end.

    Args:
      folder: made if it is missing.
      purge_step: what TensorBoard has of this step and later ones is of no use any more.
      report: told when it cannot be written.
    """

    def __init__(
        self, folder: Path, purge_step: int | None = None, report: Callable[[str], Any] = print
    ):
        self._folder, self._report = folder, report
        self._writer: EventsWriter | None = None
        self._files = self._size = 0  # how many there are, and bytes of the newest one
        self._flushed = time.monotonic()
        self._try(self._open)
        if purge_step is not None:
            start = SessionLog(status=SessionLog.SessionStatus.Value("START"))
            self._write(Event(step=purge_step, session_log=start))

    def add(self, tag: str, value: int | float, step: int) -> None:
        self._write(Event(step=step, summary=scalar(tag, value)))

    def flush(self) -> None:
        if self._writer is not None:
            self._flushed = time.monotonic()
            self._try(self._writer.flush)

    def close(self) -> None:
        if self._writer is not None:
            self._try(self._writer.close)
            self._writer = None

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        # By name a file is behind all of before: it begins with the second in which it was begun.
        self._writer = EventsWriter(str(self._folder / "events"), f".{self._files:06}")
        self._files, self._size = self._files + 1, 0

    def _open_another(self) -> None:
        self._writer.close()
        self._open()

    def _write(self, event: Event) -> None:
        if self._writer is not None and self._size >= _LARGE:
            self._try(self._open_another)
        if self._writer is None:
            return
        event.wall_time = time.time()
        self._size += event.ByteSize()
        self._try(lambda: self._writer.write_event(event))
        if time.monotonic() - self._flushed > _FLUSH_EVERY:
            self.flush()

    def _try(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except OSError as error:
            self._writer = None
            self._report(
                f"{self._folder} cannot be written ({error.strerror or error}): the run goes on "
                "without TensorBoard's events; metrics.jsonl has all numbers"
            )
