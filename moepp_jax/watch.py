"""A run that hangs says so, names who is late, and ends: a thread beside the loop sees to it.

The loop says what it is at (`Watch.phase`) and hands over the loss of each step that it begins. The
thread looks every second whether anything has ended since, and tells the other processes how far
this one is (`heartbeat`). It waits for no device and no other process, so that it still runs where
the loop does not. What takes too long:

- a step, from one step's end on the devices to the next one's, so with its waiting for data and its
  row of metrics; and a batch of an evaluation: `hang_factor` times the median of the last ones,
  and `hang_seconds` at least;
- the first of each after a start, which compiles, and saving, in which a bucket may have to be
  asked again and again: ten times `hang_seconds`. A false alarm there would come in each start.

Then one line says so, once. After as long again the process ends with status 75, and as it does the
others do. Time in which the process itself was stopped does not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from moepp_jax import ending, heartbeat, late
from moepp_jax.config import TrainConfig
from moepp_jax.heartbeat import PHASES, Beat, Heartbeats

# Of a process that ends as the run hangs: EX_TEMPFAIL of sysexits.h, "try again".
STATUS = 75

# Seconds between two looks, and as how many a longer one counts: the process was stopped.
_EVERY = 1.0
_AT_MOST = 2 * _EVERY

# Times `hang_seconds` that what compiles, and a save, may take.
_PATIENT = 10

# Steps, or batches, whose median is the usual time.
_RECENT = 50

# Seconds of silence that are told even where nothing takes too long: before JAX ends the others
# (`distributed.HEARTBEAT_TIMEOUT`), which names a number and no host.
_SILENT = 10.0

# Seconds that process 0 outlives the others: where it ends first, JAX aborts them.
_LAST = 5.0

# The phases with a limit of their own, and what is counted there; the others are parts of them.
_KINDS = {"step": "step", "evaluation": "batch of the evaluation", "save": "save"}


class Watch:
    """Watches over a loop, in a context; what breaks in it while the run hangs ends the process.

    Args:
      train: has the limits.
      beats: of this process and its peers.
      step: that the run goes on from.
      say: tells one line; by default on standard error.
      end: ends the process, with a message and a status.

    Attributes:
      hosts: how much each of them holds the others up, for a row of metrics.
    """

    def __init__(
        self,
        train: TrainConfig,
        beats: Heartbeats,
        step: int,
        say: Callable[[str], Any] | None = None,
        end: Callable[[str, int], Any] = ending.at_once,
    ):
        self.hosts = late.Hosts(beats)
        self._on = train.hang_seconds > 0
        self._train = train
        self._beats = beats
        self._say = say or _say
        self._end_process = end
        self._clock = beats.clock
        self._step, self._moves = step, 0
        self._phase, self._kind = "step", "step"
        self._began = self._mark = self._looked = self._clock()
        self._own = 0.0
        self._pending: deque[Any] = deque(maxlen=1000)
        self._usual = {"step": _Usual(), "evaluation": _Usual()}
        self._seen = 0  # moves at the last look
        self._age = 0.0  # seconds since anything ended
        self._told = False  # that it hangs
        self._silent: set[int] = set()  # who that was told of
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._main = threading.get_ident()
        self._stop = threading.Event()

    def __enter__(self) -> Watch:
        if self._on:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        hangs = self._told and self._seen == self._moves
        if isinstance(error, jax.errors.JaxRuntimeError) and not hangs:
            self._name_the_dead()
        self._stop.set()
        if self._on:
            self._thread.join()
        # A collective breaks when the first of them ends: it is the hang that ends the others too.
        if isinstance(error, Exception) and hangs:
            self._end()
        self._beats.close()

    def _name_the_dead(self) -> None:
        """A collective that broke does not say who is gone: that is heard some seconds later."""
        others = range(len(self._beats.peers) if self._on else 0)
        until = self._clock() + 2 * late.MISSED * self._beats.every
        while self._clock() < until and len(others) > 1:
            if any(late.silence(self._beats, number) for number in others):
                self._tell_of_silent(0.0)
                return
            time.sleep(0.1)

    # What the loop calls, in the main thread.

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The loop is at this, of `heartbeat.PHASES`, while the context lasts."""
        before, kind = self._phase, self._kind
        self._enter(name, name if name in _KINDS else kind)
        yield
        self._enter(before, kind)

    def waited_for(self, batches: Iterable) -> Iterator:
        """The batches; that each comes is a phase, and what follows it is one unit of work."""
        batches, nothing = iter(batches), object()
        while True:
            began = self._clock()
            with self.phase("data"):
                batch = next(batches, nothing)
            if batch is nothing:
                return
            yield batch
            if self._kind == "evaluation":  # its numbers were fetched
                self._usual["evaluation"].note(self._clock() - began)

    def began(self, step: int, loss: Any) -> None:
        """A step is under way: its loss is there when it has ended."""
        self._step = step
        if self._on:
            self._pending.append(loss)

    def _enter(self, phase: str, kind: str) -> None:
        now = self._clock()
        if self._kind == "step" and self._phase in ("data", "log"):
            self._own += now - self._began
        if kind == "step" != self._kind:
            self._mark = now  # steps are timed anew
        self._phase, self._kind, self._began = phase, kind, now
        self._moves += 1

    # What the thread does.

    def _look_on(self) -> None:
        while not self._stop.wait(_EVERY):
            self.look()

    def look(self) -> None:
        """Once: whether anything has ended, and what the others tell; reports, and ends."""
        now, moves = self._clock(), self._moves
        passed, self._looked = min(now - self._looked, _AT_MOST), now
        self._beats.hear()
        since = max(now - self._began, 0.0)
        self._beats.tell(Beat(moves, self._step, self._phase, since, self._own))
        if self._ended(now) or moves != self._seen:
            if self._told:
                self._say(f"{self._name()}: goes on, after {self._age:.0f} s")
            self._seen, self._age, self._told = moves, 0.0, False
        else:
            self._age += passed
        limit = self._limit()
        if self._age >= 2 * limit:
            self._end()
        elif self._age >= limit and not self._told:
            self._told = True
            self._say(
                f"{self._hangs()}. The process ends in {limit:.0f} s more, with status {STATUS}"
            )
        self._tell_of_silent(_SILENT)

    def _ended(self, now: float) -> int:
        """How many steps have ended on the devices since the last look."""
        count = 0
        with contextlib.suppress(Exception):  # of a step that failed the main thread will hear
            while self._pending and self._pending[0].is_ready():
                self._pending[0].block_until_ready()  # raises what the step has
                self._pending.popleft()
                count += 1
        if count:
            self._usual["step"].note((now - self._mark) / count)
            self._mark = now
        return count

    def _limit(self) -> float:
        usual = self._usual.get(self._kind)
        median = usual and usual.median()
        if median is None:
            return _PATIENT * self._train.hang_seconds
        return max(self._train.hang_seconds, self._train.hang_factor * median)

    def _tell_of_silent(self, seconds: float) -> None:
        """Of each other process once, when it is silent for so long."""
        for number, peer in enumerate(self._beats.peers):
            silent = late.silence(self._beats, number)
            if not silent:
                self._silent.discard(number)
            elif silent >= seconds and number not in self._silent and peer.beat:
                self._silent.add(number)
                self._say(
                    f"{self._name()}: no sign of life of {late.describe(self._beats, number)}"
                )

    def _end(self) -> None:
        said = f"error: {self._hangs()}; all have to be started again"
        if self._beats.process == 0 and len(self._beats.peers) > 1:
            time.sleep(_LAST)
        self._end_process(f"{said}\n", STATUS)

    # What is said.

    def _name(self) -> str:
        of = len(self._beats.peers)
        return f"process {self._beats.process} of {of}" if of > 1 else "this process"

    def _hangs(self) -> str:
        usual = self._usual.get(self._kind)
        median = usual and usual.median()
        usually = f" (usually {median:.3g} s)" if median else ""
        return (
            f"{self._name()}: no {_KINDS[self._kind]} has ended for {self._age:.0f} s{usually}; "
            f"{late.said(self._beats)}it is at step {self._step}, {PHASES[self._phase]}"
            f"{self._place()}"
        )

    def _place(self) -> str:
        """Where in the code the main thread is: the innermost of this package's own lines."""
        if threading.get_ident() == self._main:  # it has left already, by an error
            return ""
        frame = sys._current_frames().get(self._main)
        ours = Path(__file__).parent
        for line in reversed(traceback.extract_stack(frame) if frame else []):
            file = Path(line.filename)
            if ours in file.parents and file.name != Path(__file__).name:
                return f" ({file.relative_to(ours)}:{line.lineno}, {line.name})"
        return ""


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # who read it may be gone: that is no hang
        print(line, file=sys.stderr, flush=True)


class _Usual:
    """What a unit of work takes: the median of the last ones, but for the first, which compiles."""

    def __init__(self):
        self._compiled = False
        self._last: deque[float] = deque(maxlen=_RECENT)

    def note(self, seconds: float) -> None:
        if self._compiled:
            self._last.append(seconds)
        self._compiled = True

    def median(self) -> float | None:
        return statistics.median(tuple(self._last)) if self._last else None


def over(train: TrainConfig, step: int, explains: bool = False) -> Watch:
    """The watch over a run that goes on from a step; each of its processes calls this.

    Args:
      explains: the run is one of `train --debug`, whose explanation of a step takes what it takes:
        nothing is watched.
    """
    if explains or not train.hang_seconds:
        off = dataclasses.replace(train, hang_seconds=0.0)
        return Watch(off, heartbeat.alone(), step)
    return Watch(train, heartbeat.meet(), step)
