"""The process that sends a run to Weights & Biases: `wandb_log` starts it, and says when to end.

Its standard input has a job, a line of JSON, and then the line `end`; what it prints is for the
user. Steps are those of training; both rows of a step, of training and of an evaluation, are one
there, so the newest waits until a later one is written, or the end.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moepp_jax import wandb_log
from moepp_jax.metrics import series
from moepp_jax.storage import write_atomic

# Seconds between two looks at metrics.jsonl, and before a first and a last try to reach a server.
_LOOK_EVERY = 1.0
_TRY_AFTER, _TRY_AT_LEAST_EVERY = 30.0, 1800.0


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # of a job: the run says when to end
        signal.signal(number, signal.SIG_IGN)
    job = json.loads(_line())
    said = sys.stdout
    sys.stdout = io.StringIO()  # wandb's own lines

    def report(line: str) -> None:
        print(f"Weights & Biases: {line}", file=said, flush=True)

    run = None
    try:
        run = _opened(job, report)
        if run is None:
            report("nothing could be sent; the same command tries again")
        else:
            _send(run, job)
    except Exception as error:
        report(f"{_short(error)}; the run goes on without it, and metrics.jsonl has all numbers")
    # Its threads and handlers of exits may wait for a server for long; what was sent is sent.
    os._exit(0)


def _opened(job: dict[str, Any], report) -> Any:
    """The run of wandb, as soon as it can be had; None if it could not be until the end."""
    import wandb

    folder = Path(job["folder"])
    place = Path(os.environ.get("WANDB_DIR") or folder)
    # Where files wait for `wandb sync`, which are a run's own, and not the user's.
    os.environ.setdefault("WANDB_DATA_DIR", str(place / "wandb"))
    os.environ.setdefault("WANDB_CACHE_DIR", str(place / "wandb" / "cache"))
    known = wandb_log.read(folder / wandb_log.FILE)
    # Of a run that is there its owner may have changed the name.
    name = os.environ.get("WANDB_NAME") or (job["name"] if known["step"] < 0 else None)
    wait, told = _TRY_AFTER, False
    while True:
        try:
            run = wandb.init(
                project=known["project"],
                id=known["id"],
                name=name,
                resume="allow",
                mode=job["mode"],
                dir=place,
                # Nothing of the terminal, which may show a key, and no copy of anybody's code.
                settings=wandb.Settings(
                    console="off", silent=True, symlink=False, save_code=False, disable_git=True
                ),
            )
            run.config.update(job["config"], allow_val_change=True)
            where = run.url if job["mode"] == "online" else f"offline, in {Path(run.dir).parent}"
            report(f"run {known['id']} of {known['project']}, {where}")
            return run
        except Exception as error:
            if job["mode"] == "offline":
                raise
            if not told:
                report(f"{_short(error)}; the run goes on, and this is tried again meanwhile")
                told = True
        if _ends_within(wait):
            return None
        wait = min(2 * wait, _TRY_AT_LEAST_EVERY)


def _send(run: Any, job: dict[str, Any]) -> None:
    folder = Path(job["folder"])
    file = folder / wandb_log.FILE
    known = wandb_log.read(file)
    last = -1
    for step, values in _steps(_rows(folder / "metrics.jsonl")):
        last = step
        if step > known["step"]:
            # First: what a kill then loses is lost, and nothing is there twice.
            known["step"] = step
            write_atomic(file, json.dumps(known, indent=2) + "\n")
            run.log(values, step=step)
    whole = last >= job["config"]["train"]["steps"]
    if whole:
        _add(run, "curves", [_curves(folder, job["name"])])
    if job["files"]:
        _add(run, "analysis", [Path(path) for path in job["files"]])
    run.finish(exit_code=0 if whole else 1)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that grows, until the end; a line that is not whole is no row yet."""
    place, ending = 0, False
    while True:
        if file.exists():
            with file.open("rb") as lines:
                lines.seek(place)
                for line in lines:
                    if line.endswith(b"\n"):
                        place += len(line)
                        yield json.loads(line)
        if ending:
            return
        ending = _ends_within(_LOOK_EVERY)


def _steps(rows: Iterator[dict[str, Any]]) -> Iterator[tuple[int, dict[str, float]]]:
    """Each step with all its numbers, by TensorBoard's names."""
    step, values = None, {}
    for row in rows:
        if step is not None and row["step"] != step:
            yield step, values
            values = {}
        step = row.pop("step")
        for name, value in row.items():
            values |= {tag: math.nan if v is None else v for tag, v in series(name, value)}
    if step is not None:
        yield step, values


def _curves(folder: Path, name: str) -> Path:
    from moepp_jax.analysis.curves import plot_curves

    return plot_curves({name: folder}, folder / "wandb" / "curves.png")


def _add(run: Any, name: str, files: list[Path]) -> None:
    import wandb

    artifact = wandb.Artifact(f"{name}-{run.id}", type="report")
    for file in files:
        artifact.add_file(str(file), name=file.name, skip_cache=True)
    run.log_artifact(artifact)


def _line() -> str:
    """One line of standard input, and no byte of the next, which `select` would not see."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:  # who started us is gone
            os._exit(1)
        line += byte
    return line.decode()


def _ends_within(seconds: float) -> bool:
    return bool(select.select([0], [], [], seconds)[0] and _line())


def _short(error: Exception) -> str:
    """An error in one line, without a key."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    with contextlib.suppress(KeyError):
        said = said.replace(os.environ["WANDB_API_KEY"] or "\0", "...")
    return said if len(said) <= 300 else f"{said[:300]}..."


if __name__ == "__main__":
    main()
