"""What a run measured: one JSON object a line in metrics.jsonl, and TensorBoard events beside it.

A training row has step, loss, balance_loss, z_loss, grad_norm (also grad_norm_by_block), lr, tokens
(seen so far), tokens_per_s, ffn_experts_per_token, drop_rate (a share; also drop_rate_by_part, of
each eighth of the sequences, and drop_rate_by_kind, of FFN, constant, copy and zero experts),
router_entropy, of each MoE layer router_entropy_by_layer, load_largest_by_layer,
load_smallest_by_layer and dead_experts_by_layer (see `analysis.health`), where updates may be left
out the number that were, skipped (see `guard`), seconds, data_wait (the share of the time since the
row before in which the loop waited for batches), of several processes host_seconds_smallest,
host_seconds_median, host_seconds_largest and slowest_process (seconds a step in which a process's
host waited for data or wrote rows while it waited for no device and no other process, and the
number of the process where these are most) and, of each source of text, tokens/NAME and
epochs/NAME so far; a row of an evaluation has step, eval_loss and what else was measured. A rule
may have other losses than these.
Numbers that are not finite have no form in JSON: they stand as null in metrics.jsonl (and as they
are in TensorBoard).
"""

import contextlib
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moepp_jax import parts, regular
from moepp_jax.errors import ConfigError
from moepp_jax.storage import AnyPath, Staging, open_path, reason, write_atomic, writing
from moepp_jax.tensorboard import Events

_FILE = parts.FILE

# It warns of each number that is not finite: `require_finite` says it once, and which.
logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)


# What says whether a run is still computing: when its parameters are lost, so are these.
_VITAL = ("loss", "grad_norm", "eval_loss")


class DivergedError(ArithmeticError):
    """A run whose numbers are not finite any more; the message names the step and the numbers.

    Attributes:
      began: the step in whose batch that began, if it is known.
    """

    def __init__(self, said: str, began: int | None = None):
        super().__init__(said)
        self.began = began


def require_finite(step: int, values: Mapping[str, Any]) -> None:
    """
    Raises:
      DivergedError: the loss, the gradient's norm or the held-out loss of a row is not finite.
    """
    vital = {name: float(values[name]) for name in _VITAL if name in values}
    lost = [f"{name} = {value}" for name, value in vital.items() if not math.isfinite(value)]
    if lost:
        raise DivergedError(f"step {step}: {', '.join(lost)}")


class MetricsWriter:
    """Appends rows to a run's metrics; one process of a run has one.

    What a kill or a disk has damaged is mended first: whole rows stay, each once, and a file that
    had a line which is none is kept beside the new one, as metrics.jsonl.damaged.

    Under an object store rows appear there some time later, at once with `flush` and `close`; in
    parts (`parts`), so that what was written there before is not written again. A store that fails
    in between is told of, and tried again.

    Args:
      workdir: the run's folder.
      resume_step: the step that the run goes on from, -1 for its start. Later rows are dropped, as
        they will be written again; with None every row is kept.
      reach: the last step that can have been logged since then; where there are later ones, the
        checkpoints of these are gone, and the file as it was is kept beside, too.
      report: told, in one line each, of rows that are lost and of what cannot be written.
      patient: rows that a disk does not take wait until it does, or until `flush` or `close`.

    Attributes:
      staging: of the run's folder, where the rows grow.
      seconds_so_far: that the training of the rows which were kept took.

    Raises:
      UnwritableError: the file cannot be written.
      ConfigError: it cannot be read.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        resume_step: int | None = None,
        report: Callable[[str], Any] = print,
        patient: bool = False,
        reach: int | float = math.inf,
    ):
        self._report, self._patient = report, patient
        self._troubled = False
        self._owed = b""  # rows that the file has not taken yet
        self._name = open_path(workdir) / _FILE
        with self._writing():
            self.staging = Staging(workdir)
            file = fetch(self.staging, workdir)
            mended = any(row is None for _, row in _lines(file)) if file.exists() else False
            if file.exists() and _newest(file) > reach:
                kept = _keep_beside(file, workdir, f"{_FILE}.before")
                report(
                    f"{self._name} goes on to step {_newest(file)}, and no checkpoint is there of "
                    f"one after {resume_step}; the file as it was is {kept} now"
                )
            rows = _repair(file, math.inf if resume_step is None else resume_step, workdir, report)
            self._file = file.open("ab", buffering=0)
            if self.staging.copies:
                last = max((row["step"] for row in rows), default=-1)
                start = last if resume_step is None else resume_step
                self._part = _begin(self.staging, workdir, file, start, mended)
                _grow(self.staging, self._part)
        self.seconds_so_far = max((row.get("seconds", 0.0) for row in rows), default=0.0)
        purged = None if resume_step is None else resume_step + 1
        self._events = Events(self.staging.folder / "tensorboard", purged, report)

    def write(self, step: int, **values: Any) -> None:
        """One row. Values are numbers or arrays of them: of Python, numpy, or on JAX's host."""
        values = {name: np.asarray(value).tolist() for name, value in values.items()}
        row = {"step": step} | {name: finite(value) for name, value in values.items()}
        self._owed += (json.dumps(row, allow_nan=False) + "\n").encode()
        if not self._patient:
            with self._writing():
                self._pay()
        for name, value in values.items():
            for tag, number in series(name, value):
                self._events.add(tag, number, step)
        with self._trying():
            self._pay()
            self.staging.copy()
            if self.staging.copies:
                self._begin_another(step)

    def _pay(self) -> None:
        while self._owed:  # of a disk that is nearly full a part may fit
            self._owed = self._owed[self._file.write(self._owed) :]

    def _begin_another(self, step: int) -> None:
        """Where this part is large."""
        part = self._part.after(self._file.tell(), step)
        if part != self._part:
            self.staging.copy(now=True)
            self._part = part
            _grow(self.staging, part)

    def flush(self) -> None:
        """Puts the rows so far where they are safe.

        Raises:
          UnwritableError: that cannot be done.
        """
        self._events.flush()
        with self._writing():
            self._pay()
            self.staging.copy(now=True)

    def close(self) -> None:
        self._events.close()
        with self._writing():
            try:
                self._pay()
            finally:
                self._file.close()
                self.staging.close()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing(
            str(self._name),
            "the run ends here, its checkpoints are kept, and the same command goes on when that "
            "is mended",
        )

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        """What goes wrong is told, once until all is well again."""
        try:
            yield
            self._troubled = False
        except OSError as error:
            if not self._troubled:
                self._report(
                    f"warning: {self._name} cannot be written: {reason(error)}; its rows wait, and "
                    "it is tried again"
                )
            self._troubled = True

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def was_measured(workdir: str | os.PathLike) -> bool:
    """Whether a run has begun to train."""
    return (open_path(workdir) / _FILE).exists()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a run in the order in which they were written.

    A last line that a kill cut off is no row.

    Raises:
      FileNotFoundError: nothing was measured in this folder yet.
      ConfigError: another line is not a row; the message names it.
    """
    folder = open_path(workdir)
    there = parts.of(folder)
    if not there:
        raise FileNotFoundError(f"there is no {folder / _FILE}: training writes it")
    rows: list[dict[str, Any]] = []
    for part in there:
        rows = [row for row in rows if row["step"] <= part.start] + _whole_rows(part.file)
    return rows


def fetch(staging: Staging, workdir: str | os.PathLike) -> Path:
    """The local metrics.jsonl of a run, with the lines of all its parts."""
    there = parts.of(open_path(workdir))
    if len(there) < 2:
        file = staging.fetch(_FILE)
    else:
        lines: list[tuple[str, dict[str, Any] | None]] = []
        for part in there:
            lines = [(t, row) for t, row in lines if row is None or row["step"] <= part.start]
            lines += _lines(part.file)
        file = staging.folder / _FILE
        write_atomic(file, "".join(f"{text}\n" for text, _ in lines))
    if there and staging.copies:
        _grow(staging, parts.following(there[-1].number, -1, file.stat().st_size))
    elif not staging.copies:
        for part in there[1:]:  # of a folder that was copied from a store
            part.file.unlink()
    return file


def _grow(staging: Staging, part: parts.Growing) -> None:
    staging.parts[_FILE] = (part.name, part.offset)


def _begin(
    staging: Staging, workdir: str | os.PathLike, file: Path, step: int, mended: bool
) -> parts.Growing:
    """The part of an object store that a run which goes on from a step writes."""
    folder = open_path(workdir)
    there = parts.of(folder)
    if mended:
        write_atomic(folder / _FILE, file.read_bytes())
        for part in there[1:]:
            part.file.unlink()
        del there[1:]
    if not there:
        return parts.Growing(1, _FILE, 0)
    return parts.following(there[-1].number, step, file.stat().st_size)


def _whole_rows(file: AnyPath) -> list[dict[str, Any]]:
    """
    Raises:
      ConfigError: a line is no row, and not the last one.
    """
    lines = _lines(file)
    for number, (line, row) in enumerate(lines, start=1):
        if row is None and number < len(lines):
            raise ConfigError(
                f"{file}, line {number} is no JSON object with a step: {line[:80]!r}; mend that "
                "line or take it away (`train` goes on without it)"
            )
    return [row for _, row in lines if row is not None]


def _lines(file: AnyPath) -> list[tuple[str, dict[str, Any] | None]]:
    """Each line, with the row that it is if it is one."""
    try:
        content = regular.read_bytes(file, regular.LARGEST)
    except regular.IrregularError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    lines = content.decode(errors="replace").split("\n")
    if not lines[-1]:
        lines.pop()
    return [(line, _row(line)) for line in lines]


def series(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """What is drawn of a value as a curve: a number, or one of each layer or kind of expert."""
    if not isinstance(value, list):
        yield name, value
    elif name.endswith(("_by_layer", "_by_block", "_by_kind")):
        digits = len(str(len(value)))
        yield from ((f"{name}/{i:0{digits}}", v) for i, v in enumerate(value, 1))


def _repair(
    file: AnyPath, last_step: int | float, workdir: str | os.PathLike, report: Callable[[str], Any]
) -> list[dict[str, Any]]:
    """Leaves only whole rows up to a step, so that the next row starts on a line of its own."""
    if not file.exists():
        return []
    lines = _lines(file)
    if any(row is None for _, row in lines[:-1]):
        kept = _keep_beside(file, workdir, f"{_FILE}.damaged")
        report(f"{open_path(workdir) / _FILE}: {_lost(lines)}; the file as it was is {kept} now")
    rows = _each_once([row for _, row in lines if row is not None and row["step"] <= last_step])
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if text.encode() != file.read_bytes():
        write_atomic(file, text)
    return rows


def _each_once(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a step's row of training, and of its evaluation, the one that was written last."""
    last = {(row["step"], "eval_loss" in row): row for row in rows}
    return [row for row in rows if last[row["step"], "eval_loss" in row] is row]


def _keep_beside(file: AnyPath, workdir: str | os.PathLike, name: str) -> str:
    """Keeps a copy under this name, or with a number if that is taken; the name."""
    numbers = (f".{number}" if number > 1 else "" for number in itertools.count(1))
    names = (f"{name}{number}" for number in numbers)
    kept = next(name for name in names if not (open_path(workdir) / name).exists())
    write_atomic(file.with_name(kept), file.read_bytes())
    return kept


def _newest(file: AnyPath) -> int:
    """The last step that has a row; -1 if none has."""
    return max((row["step"] for _, row in _lines(file) if row is not None), default=-1)


def _lost(lines: list[tuple[str, dict[str, Any] | None]]) -> str:
    """Which rows damaged lines have cost, by the steps of those around them."""
    said = []
    for damaged, run in itertools.groupby(enumerate(lines, start=1), lambda x: x[1][1] is None):
        numbers = [number for number, _ in run]
        if not damaged:
            continue
        before = [row["step"] for _, row in lines[: numbers[0] - 1] if row is not None]
        after = [row["step"] for _, row in lines[numbers[-1] :] if row is not None]
        steps = [f"from step {before[-1]} on" if before else "from the start on"]
        steps += [f"up to step {after[0]}"] if after else []
        which = f"lines {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"line {numbers[0]}"
        said.append(f"{which} cannot be read, and what was measured {' '.join(steps)} is lost")
    return "; ".join(said)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = regular.parsed(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def finite(value: Any) -> Any:
    """The number, or lists of numbers, with None in the place of what has no form in JSON."""
    if isinstance(value, list):
        return [finite(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
