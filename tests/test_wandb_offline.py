"""Weights & Biases itself, without a server: what its files have, and how its processes end."""

import contextlib
import json
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moepp_jax import seal
from moepp_jax.metrics import read_metrics
from tests.test_main import ENVIRONMENT, ROOT, flags

pytestmark = [
    pytest.mark.wandb,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc"),
]

KEY = "0123456789abcdef0123456789abcdefcafecafe"  # of the form that it takes
LONG = ("--config.train.steps=1000000", "--config.train.eval_every=1000000")


def start(tmp_path, *arguments, **variables) -> subprocess.Popen:
    environment = {k: v for k, v in ENVIRONMENT.items() if not k.startswith("WANDB_")}
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "moepp_jax.main", *map(str, arguments)],
        cwd=ROOT,
        env=environment | {"WANDB_API_KEY": KEY, "HOME": str(home)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(tmp_path, *more, **variables) -> subprocess.Popen:
    asked = ["--wandb=proj", f"--workdir={tmp_path / 'run'}", *more]
    return start(tmp_path, "train", *flags(tmp_path), *asked, **variables)


def ended(process, status=0) -> tuple[str, str]:
    out, err = process.communicate(timeout=180)
    assert process.returncode == status, out + err
    assert KEY not in out + err
    return out, err


def records(run: Path) -> list:
    """What all of a run's offline files have, in the order in which it was written."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        for record in _log(file.read_bytes()):
            found.append(wandb_internal_pb2.Record.FromString(record))
    return found


def _log(content: bytes):
    """The records of a LevelDB log: blocks of 32 KiB, a header of 7 bytes, records in parts."""
    place, record = 7, b""  # behind its own name
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        if kind == 0:
            return
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # all of it, or the last part
            yield record
            record = b""


def steps(run: Path) -> list[int]:
    return [r.history.step.num for r in records(run) if r.WhichOneof("record_type") == "history"]


def artifacts(run: Path) -> dict[str, set[str]]:
    """Their names, with their files'."""
    found = {}
    for record in records(run):
        if record.WhichOneof("record_type") == "request":
            artifact = record.request.log_artifact.artifact
        else:
            artifact = record.artifact
        if artifact.name:
            found[artifact.name] = {entry.path for entry in artifact.manifest.contents}
    return found


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that belong to a test, by its HOME."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"HOME={folder / 'home'}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
    return found


def require_nothing_left(folder: Path) -> None:
    for _ in range(50):
        if not (left := processes_of(folder)):
            return
        time.sleep(0.1)
    raise AssertionError(left)


def require_no_key(folder: Path) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 5
    assert [file for file in files if KEY.encode() in file.read_bytes()] == []


def wait_for_rows(tmp_path, process, count: int) -> None:
    for _ in range(1800):
        assert process.poll() is None, process.communicate()
        with contextlib.suppress(OSError, ValueError, KeyError):
            if json.loads((tmp_path / "run" / "wandb.json").read_text())["step"] >= count:
                return
        time.sleep(0.1)
    raise AssertionError("no rows were sent")


def test_stopped_killed_and_extended_a_run_has_each_step_once(tmp_path):
    run, offline = tmp_path / "run", "--wandb_mode=offline"
    process = train(tmp_path, offline, *LONG)
    wait_for_rows(tmp_path, process, 5)
    process.send_signal(signal.SIGTERM)
    out, err = ended(process, 143)
    assert re.search(r"SIGTERM: stopped and saved at step \d+", out)
    assert len(err.strip().splitlines()) == 1
    require_nothing_left(tmp_path)
    saved = read_metrics(run)[-1]["step"]
    assert steps(run) == [*range(1, saved + 1)]

    process = train(tmp_path, offline, *LONG)
    wait_for_rows(tmp_path, process, saved + 5)
    process.kill()
    ended(process, -signal.SIGKILL)
    require_nothing_left(tmp_path)
    sent = json.loads((run / "wandb.json").read_text())["step"]
    # What was on its way when it was killed may be lost.
    assert steps(run) == [*range(1, len(steps(run)) + 1)] and sent >= len(steps(run)) > saved

    more = (f"--config.train.steps={sent + 5}", "--config.train.eval_every=1000000")
    config = seal.opened(json.loads((run / "config.json").read_text()))
    config["train"]["steps"] = saved  # as if it had been asked for so many
    (run / "config.json").write_text(json.dumps(config))
    moved = run.rename(tmp_path / "moved")
    asked = ["--wandb=proj", offline, f"--workdir={moved}"]
    ended(start(tmp_path, "train", *flags(tmp_path), *more, *asked))
    found = steps(moved)
    assert found == sorted(set(found)) and found[-5:] == [*range(sent + 1, sent + 6)]
    known = json.loads((moved / "wandb.json").read_text())
    assert {r.run.run_id for r in records(moved) if r.run.run_id} == {known["id"]}
    assert artifacts(moved) == {f"curves-{known['id']}": {"curves.png"}}
    require_no_key(moved)
    require_no_key(tmp_path)


def test_analyze_adds_its_report(tmp_path):
    asked = [f"--workdir={tmp_path / 'run'}", "--tokens=300", "--page", "--wandb=proj"]
    ended(start(tmp_path, "train", *flags(tmp_path), asked[0]))
    ended(start(tmp_path, "analyze", *asked, WANDB_MODE="offline"))
    run = tmp_path / "run"
    assert steps(run) == [*range(1, 7)]  # though training sent none
    ((_, shown),) = [item for item in artifacts(run).items() if item[0].startswith("analysis-")]
    assert {"REPORT.md", "page.html"} < shown and any(name.endswith(".png") for name in shown)
    assert not any(name.endswith(".parquet") for name in shown)
    require_no_key(tmp_path)
    require_nothing_left(tmp_path)


def test_a_server_that_is_away_is_one_line(tmp_path):
    away = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "4"}
    out, err = ended(train(tmp_path, **away))
    said = [line for line in out.splitlines() if line.startswith("Weights & Biases: ")]
    assert "; the run goes on, and this is tried again" in said[0], out
    assert said[1:] == ["Weights & Biases: nothing could be sent; the same command tries again"]
    assert len(read_metrics(tmp_path / "run")) >= 6 and not err
    require_no_key(tmp_path)
    require_nothing_left(tmp_path)
    out, _ = ended(train(tmp_path, WANDB_MODE="offline"))  # a run that has ended
    assert steps(tmp_path / "run") == [*range(1, 7)]
