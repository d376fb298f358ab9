"""Trains one run to its end, in a process of its own, and leaves its row in the run's folder.

`experiments.sweep` starts it, as `python -m experiments.worker --scale=tiny FOLDER`.
"""

from __future__ import annotations

from moepp_jax import host_memory

if __name__ == "__main__":
    host_memory.keep_freed_on_cpu()  # before an import starts a thread

import dataclasses
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from moepp_jax import cli, devices, flops
from moepp_jax.benchmarks import timing
from moepp_jax.claim import TakenError, claimed
from moepp_jax.config import Config
from moepp_jax.errors import ConfigError
from moepp_jax.experiments import runs, scale
from moepp_jax.experiments.results import DIVERGED, DONE, Row
from moepp_jax.metrics import DivergedError, read_metrics
from moepp_jax.storage import write_atomic
from moepp_jax.train import train
from moepp_jax.workdir import read_config

ROW, LOCK = "row.json", ".lock"
TAKEN = 75  # exit status: another process is at this run


def work(folder: Path, scale: scale.Scale) -> Row:
    """Trains the run of a folder, goes on with it, or takes note that it is trained.

    Raises:
      TakenError: another process is at it.
      ConfigError, CheckpointError, DataError, Stopped: as `train`.
    """
    with claimed(folder / LOCK):
        if (row := finished(folder)) is not None:
            return row
        config, start = read_config(folder), time.perf_counter()
        # That the training of its logged steps took, before it was stopped.
        before = max((row.get("seconds", 0.0) for row in logged(folder)), default=0.0)
        status = DONE
        try:
            train(config, folder)
        except DivergedError as error:
            print(error)
            status = DIVERGED
        seconds = before + time.perf_counter() - start
        row = measured(config, scale, logged(folder), status, seconds, timing.machine())
        write_atomic(folder / ROW, json.dumps(dataclasses.asdict(row), indent=2) + "\n")
        return row


def finished(folder: Path) -> Row | None:
    """The row of a run that is through; None if it is not.

    Raises:
      ConfigError: the row's file is damaged.
    """
    file = folder / ROW
    if not file.exists():
        return None
    try:
        return Row(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{file} is no row of a run ({error}): take it away, and the run ends once more from "
            "its last checkpoint"
        ) from error


def measured(
    config: Config,
    scale: scale.Scale,
    metrics: Sequence[dict[str, Any]],
    status: str,
    seconds: float,
    machine: str,
) -> Row:
    """The row of a run that has ended, from what it logged."""
    training = [row for row in metrics if "tokens_per_s" in row]
    late = [row for row in training if row["step"] > 0.8 * config.train.steps]
    in_training = _mean(row["ffn_experts_per_token"] for row in training)
    tokens = training[-1]["tokens"] if training else 0
    speeds = [row["tokens_per_s"] for row in training] or [math.inf]
    eighths = [row["drop_rate_by_part"] for row in late]
    by_part = map(_mean, zip(*eighths, strict=True))
    fingerprint, seed = runs.Run(config).key
    return Row(
        fingerprint=fingerprint,
        seed=seed,
        changes=runs.changes(config, scale),
        status=status,
        tokens=tokens,
        nominal_flops=tokens * flops.per_token(config).train,
        realised_flops=tokens * flops.per_token(config, in_training).train,
        training_ffn_experts=in_training,
        drop_rate=_mean(row["drop_rate"] for row in late),
        worst_eighth=max(by_part, default=0.0),
        step_seconds=config.batch_tokens / statistics.median(speeds),
        seconds=seconds,
        machine=machine,
        **_held_out(config, metrics if status == DONE else []),
    )


def _held_out(config: Config, metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the last evaluation says; nothing of a run that has none."""
    row = next((row for row in reversed(metrics) if "eval_loss" in row), None)
    if row is None:
        return dict.fromkeys(("eval_loss", "bits_per_byte", "ffn_experts", "experts")) | {
            "held_out": ""
        }
    names = list(config.data.mixed)
    each = row if len(names) > 1 else row | {f"eval_loss/{names[0]}": row["eval_loss"]}
    return {
        "eval_loss": row["eval_loss"],
        "bits_per_byte": row["eval_bits_per_byte"],
        "held_out": " ".join(f"{name}={each[f'eval_loss/{name}']}" for name in names),
        "ffn_experts": row["eval_ffn_experts_per_token"],
        "experts": statistics.fmean(map(sum, row["eval_load"])),
    }


def _mean(values) -> float:
    """Of those there are: what chose nothing at all has no drop rate, and dropped nothing."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else 0.0


def logged(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, none before its first."""
    try:
        return read_metrics(folder)
    except FileNotFoundError:
        return []


def stop_with_parent() -> None:
    """Has this process stop politely when the one that started it is gone."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _SCALE = flags.DEFINE_string("scale", "tiny", "whose recipe the run changes")

    def main(arguments: Sequence[str]) -> None:
        stop_with_parent()
        folder = Path(arguments[1])
        devices.start(read_config(folder))
        try:
            work(folder, scale.find(_SCALE.value))
        except TakenError as error:
            print(error)
            sys.exit(TAKEN)

    cli.run(main)
