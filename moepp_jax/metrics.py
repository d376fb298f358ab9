"""What a run measured: one JSON object a line in metrics.jsonl, and TensorBoard events beside it.

A training row has step, loss, balance_loss, z_loss, grad_norm, lr, tokens (seen so far),
tokens_per_s, ffn_experts_per_token, drop_rate (a share; also drop_rate_by_part, of each eighth of
the sequences, and drop_rate_by_kind, of FFN, constant, copy and zero experts), router_entropy,
of each MoE layer router_entropy_by_layer, load_largest_by_layer, load_smallest_by_layer and
dead_experts_by_layer (see `analysis.health`), seconds, data_wait (the share of the time since the
row before in which the loop waited for batches) and, of each source of text, tokens/NAME and
epochs/NAME so far; a row of an evaluation has step, eval_loss and what else was measured. A rule
may have other losses than these.
Numbers that are not finite have no form in JSON: they stand as null in metrics.jsonl (and as they
are in TensorBoard).
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from moepp_jax.errors import ConfigError
from moepp_jax.storage import Staging, open_path, write_atomic

_FILE = "metrics.jsonl"

# It warns of each number that is not finite: `require_finite` says it once, and which.
logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)


# What says whether a run is still computing: when its parameters are lost, so are these.
_VITAL = ("loss", "grad_norm", "eval_loss")


class DivergedError(ArithmeticError):
    """A run whose numbers are not finite any more; the message names the step and the numbers."""


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

    Under an object store rows appear there some time later: at once with `flush` and `close`.

    Args:
      workdir: the run's folder.
      resume_step: the step that the run goes on from, -1 for its start. Later rows are dropped, as
        they will be written again; with None every row is kept.

    Attributes:
      seconds_so_far: that the training of the rows which were kept took.
    """

    def __init__(self, workdir: str | os.PathLike, resume_step: int | None = None):
        self._staging = Staging(workdir)
        file = self._staging.fetch(_FILE)
        rows = _repair(file, math.inf if resume_step is None else resume_step)
        self.seconds_so_far = max((row.get("seconds", 0.0) for row in rows), default=0.0)
        self._file = file.open("a", encoding="utf-8")
        self._events = SummaryWriter(
            str(self._staging.folder / "tensorboard"),
            purge_step=None if resume_step is None else resume_step + 1,
            flush_secs=10,
        )

    def write(self, step: int, **values: Any) -> None:
        """One row. Values are numbers or arrays of them: of Python, numpy, or on JAX's host."""
        values = {name: np.asarray(value).tolist() for name, value in values.items()}
        row = {"step": step} | {name: finite(value) for name, value in values.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            for tag, number in _series(name, value):
                self._events.add_scalar(tag, number, step)
        self._staging.copy()

    def flush(self) -> None:
        """Puts the rows so far where they are safe."""
        self._events.flush()
        self._staging.copy(now=True)

    def close(self) -> None:
        self._file.close()
        self._events.close()
        self._staging.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a run in the order in which they were written.

    A last line that a kill cut off is no row.

    Raises:
      FileNotFoundError: nothing was measured in this folder yet.
      ConfigError: another line is not a row; the message names it.
    """
    file = open_path(workdir) / _FILE
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}: training writes it")
    lines = file.read_bytes().decode(errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise ConfigError(
                f"{file}, line {number} is no JSON object with a step: {line[:80]!r}; mend that "
                "line or take it away"
            )
    return rows


def _series(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """What TensorBoard shows of a value: a number, or one of each layer or kind of expert."""
    if not isinstance(value, list):
        yield name, value
    elif name.endswith(("_by_layer", "_by_kind")):
        digits = len(str(len(value)))
        yield from ((f"{name}/{i:0{digits}}", v) for i, v in enumerate(value, 1))


def _repair(file: Path, last_step: int | float) -> list[dict[str, Any]]:
    """Leaves only whole rows up to a step, so that the next row starts on a line of its own."""
    if not file.exists():
        return []
    rows = [row for row in read_metrics(file.parent) if row["step"] <= last_step]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if text != file.read_text(encoding="utf-8", errors="replace"):
        write_atomic(file, text)
    return rows


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def finite(value: Any) -> Any:
    """The number, or lists of numbers, with None in the place of what has no form in JSON."""
    if isinstance(value, list):
        return [finite(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
