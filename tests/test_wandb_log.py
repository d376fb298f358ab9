"""Weights & Biases, with a module in its place that notes what it is told."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moepp_jax import seal, train, wandb_log
from moepp_jax.errors import ConfigError
from moepp_jax.metrics import MetricsWriter
from moepp_jax.storage import open_path, write_atomic
from moepp_jax.wandb_log import FILE, Wandb
from tests import tiny
from tests.test_main import ENVIRONMENT, ROOT, flags
from tests.test_storage import bucket as _bucket
from tests.test_storage import objects

KEY = "a-key-that-nobody-may-see-0123456789"

bucket = _bucket

STAND_IN = '''
"""Notes what it is told in STAND_IN; what STAND_IN_DOES says goes wrong."""
import json, os, signal, time
from pathlib import Path

def _note(**what):
    with open(os.environ["STAND_IN"], "a") as file:
        file.write(json.dumps(what) + "\\n")

class Settings(dict):
    pass

class Artifact:
    def __init__(self, name, type):
        self.name, self.files = name, []
    def add_file(self, path, name, skip_cache):
        self.files.append([name, Path(path).stat().st_size > 0])

class Config:
    def update(self, values, allow_val_change):
        _note(config=values)

class Run:
    url, dir, config = "https://wandb.invalid/run", "/there/run/files", Config()
    def __init__(self, id):
        self.id = id
    def log(self, values, step):
        if os.environ.get("STAND_IN_DOES") == "lose":
            raise BrokenPipeError("the service is gone")
        _note(step=step, values=values)
    def log_artifact(self, artifact):
        _note(artifact=artifact.name, files=artifact.files)
    def finish(self, exit_code):
        _note(finished=exit_code)

def init(**given):
    place, settings = str(given.pop("dir")), given.pop("settings")
    does = os.environ.get("STAND_IN_DOES")
    _note(init=given | {"dir": place, "console": settings["console"], "pid": os.getpid()})
    if does == "fail":
        raise ConnectionError("no such host, with " + os.environ["WANDB_API_KEY"])
    if does == "hang":
        time.sleep(600)
    print("wandb: a line of its own")
    return Run(given["id"])
'''


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """What the module in wandb's place has been told so far, of some kind."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    place = tmp_path / "site"
    place.mkdir()
    (place / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("PYTHONPATH", str(place))
    monkeypatch.setenv("STAND_IN", str(tmp_path / "notes"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)

    def read(kind: str) -> list:
        file = tmp_path / "notes"
        lines = file.read_text().splitlines() if file.exists() else []
        return [note[kind] for note in map(json.loads, lines) if kind in note]

    return read


CONFIG = {"train": {"steps": 9}, "moe": {"rule": {"type": "moepp", "tau": 0.75}}}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def row(step):
    return {"loss": float(step), "ffn_experts_per_token": 1.0, "drop_rate": 0.0, "tokens": step}


def measure(folder, steps, resume_step, wanted=None, said=None, **options):
    """Writes rows as training does, and sends them."""
    report = (said if said is not None else []).append
    with (
        MetricsWriter(folder, resume_step) as writer,
        wandb_log.following(wanted, folder, writer.staging, report, **options),
    ):
        for step in steps:
            writer.write(step, **row(step))
            if step % 3 == 0:
                writer.write(step, eval_loss=step / 2)


ONLINE = Wandb("proj", "online")


def test_a_run_is_sent_whole(run, notes):
    said = []
    measure(run, range(1, 10), 0, ONLINE, said)
    (init,) = notes("init")
    known = json.loads((run / FILE).read_text())
    assert known == {"id": init["id"], "project": "proj", "step": 9}
    asked = {"project": "proj", "name": "run", "mode": "online", "resume": "allow"}
    assert asked.items() <= init.items()
    assert init["dir"] == str(run) and init["console"] == "off"
    assert notes("config") == [CONFIG]
    assert notes("step") == [*range(1, 10)]
    assert notes("values")[2] == row(3) | {"eval_loss": 1.5}  # both rows of a step are one
    assert notes("artifact") == [f"curves-{init['id']}"]
    assert notes("files") == [[["curves.png", True]]] and notes("finished") == [0]
    assert said == [
        f"Weights & Biases: run {init['id']} of proj, https://wandb.invalid/run",
    ]
    assert "wandb" not in sys.modules


def test_of_layers_there_is_a_series_each_and_what_is_not_finite_stays_so(run, notes):
    with (
        MetricsWriter(run, 0) as writer,
        wandb_log.following(ONLINE, run, writer.staging),
    ):
        writer.write(1, loss=float("nan"), dead_experts_by_layer=[0, 2], drop_rate_by_part=[0.0])
    (values,) = notes("values")
    assert values.pop("loss") != 0 and set(values) == {f"dead_experts_by_layer/{i}" for i in (1, 2)}
    assert notes("finished") == [1]  # after step 1 of 9


def test_no_step_is_sent_twice_however_a_run_was_stopped(run, notes):
    measure(run, range(1, 8), 0, ONLINE)
    moved = run.rename(run.with_name("moved"))
    measure(moved, range(5, 10), 4, ONLINE)  # steps 5 to 7 lay past the newest checkpoint
    assert notes("step") == [*range(1, 10)]
    first, second = notes("init")
    assert first["id"] == second["id"] and second["dir"] == str(moved)
    assert notes("finished") == [1, 0]


def test_what_was_measured_before_it_was_asked_for_is_sent_too(run, notes):
    measure(run, range(1, 5), 0)
    assert not (run / FILE).exists() and not notes("init")
    measure(run, range(5, 7), 4, ONLINE)
    wandb_log.send(ONLINE, run)
    assert notes("step") == [*range(1, 7)]


def test_files_are_sent_with_a_run_that_has_ended(run, notes):
    measure(run, range(1, 10), 0)
    (run / "REPORT.md").write_text("# Report")
    wandb_log.send(ONLINE, run, files=[run / "REPORT.md"])
    assert notes("step") == [*range(1, 10)]
    assert notes("files") == [[["curves.png", True]], [["REPORT.md", True]]]


def test_a_server_that_is_away_is_one_line_and_what_it_missed_is_sent_later(
    run, notes, monkeypatch
):
    said = []
    monkeypatch.setenv("STAND_IN_DOES", "fail")
    measure(run, range(1, 5), 0, ONLINE, said)
    assert said == [
        "Weights & Biases: ConnectionError: no such host, with ...; the run goes on, and this is "
        "tried again meanwhile",
        "Weights & Biases: nothing could be sent; the same command tries again",
    ]
    monkeypatch.delenv("STAND_IN_DOES")
    measure(run, range(5, 10), 4, ONLINE)
    assert notes("step") == [*range(1, 10)]


def test_a_server_that_does_not_answer_holds_no_run_up(run, notes, monkeypatch):
    said = []
    monkeypatch.setenv("STAND_IN_DOES", "hang")
    began = time.monotonic()
    with (
        MetricsWriter(run, 0) as writer,
        wandb_log.following(ONLINE, run, writer.staging, said.append, patience=1.0),
    ):
        wait_for(lambda: notes("init"))
        for step in range(1, 10):
            writer.write(step, **row(step))
    assert time.monotonic() - began < 30
    assert said == [
        "Weights & Biases: not all was sent within 1 s; the same command sends the rest"
    ]
    assert not is_there(notes("init")[0]["pid"])


def test_a_service_that_dies_is_one_line(run, notes, monkeypatch):
    said = []
    monkeypatch.setenv("STAND_IN_DOES", "lose")
    measure(run, range(1, 10), 0, ONLINE, said)
    assert said[1:] == [
        "Weights & Biases: BrokenPipeError: the service is gone; the run goes on without it, and "
        "metrics.jsonl has all numbers"
    ]


def test_a_run_in_a_bucket_keeps_its_id_there(bucket, notes):
    write_atomic(open_path(bucket) / "config.json", json.dumps(CONFIG))
    measure(bucket, range(1, 6), 0, ONLINE)
    assert json.loads(objects()[FILE])["step"] == 5
    measure(bucket, range(4, 10), 3, ONLINE)
    assert notes("step") == [*range(1, 10)]
    assert len({init["id"] for init in notes("init")}) == 1 and notes("init")[0]["name"] == "a"
    assert "wandb/curves.png" in objects()


def test_a_process_that_cannot_be_started_is_one_line(run, notes, monkeypatch):
    def full(*arguments, **options):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", full)
    said = []
    measure(run, range(1, 10), 0, ONLINE, said)
    assert said == [
        "Weights & Biases: its process cannot be started: [Errno 11] Resource temporarily "
        "unavailable; the run goes on without"
    ]


def test_a_name_is_given_once(run, notes):
    """Its owner may change it."""
    measure(run, range(1, 5), 0, ONLINE)
    measure(run, range(5, 7), 4, ONLINE)
    assert [init["name"] for init in notes("init")] == ["run", None]


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(what):
    for _ in range(600):
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("it never came")


RUN = """
import sys, time
from pathlib import Path
from moepp_jax import wandb_log
from moepp_jax.metrics import MetricsWriter
run = Path(sys.argv[1])
with MetricsWriter(run, 0) as writer:
    with wandb_log.following(wandb_log.Wandb("proj"), run, writer.staging):
        for step in range(1, 6):
            writer.write(step, loss=float(step))
        time.sleep(600)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_signals_of_a_job_do_not_end_it_and_a_kill_leaves_nothing_behind(run, notes):
    process = subprocess.Popen([sys.executable, "-c", RUN, str(run)], cwd=ROOT)
    try:
        wait_for(lambda: len(notes("step")) == 4)  # the fifth may have a second row yet
        pid = notes("init")[0]["pid"]
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(pid, number)
        time.sleep(0.5)
        assert is_there(pid) and os.getpgid(pid) != os.getpgid(process.pid)
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not is_there(pid))
    assert json.loads((run / FILE).read_text())["step"] == 4
    measure(run, range(4, 10), 3, ONLINE)
    assert notes("step") == [*range(1, 10)]


def test_training_sends_what_it_measures_and_nobody_finds_a_key(tmp_path, notes):
    c = tiny.config(**{"data.dir": str(tmp_path / "data"), "train.steps": 3, "train.eval_every": 2})
    folder, said = tmp_path / "trained", []
    train.train(c, folder, said.append, wandb=ONLINE)
    assert notes("step") == [1, 2, 3] and "eval_loss" in notes("values")[1]
    assert "load_largest_by_layer/1" in notes("values")[0]
    assert notes("config")[0] == seal.opened(json.loads((folder / "config.json").read_text()))
    train.train(c.replace("train", steps=4), folder, said.append, wandb=ONLINE)
    train.train(c.replace("train", steps=4), folder, said.append, wandb=ONLINE)  # has ended
    assert notes("step") == [1, 2, 3, 4]
    assert len({init["id"] for init in notes("init")}) == 1 and len(notes("init")) == 3
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files and not any(KEY.encode() in file.read_bytes() for file in files)
    assert KEY not in "".join(said)
    with pytest.raises(ConfigError, match=r"--wandb=other, but .* is a run of the project 'proj'"):
        train.train(c.replace("train", steps=5), folder, said.append, wandb=Wandb("other"))
    assert json.loads((folder / "config.json").read_text())["train"]["steps"] == 4


@pytest.mark.parametrize(
    ("flags", "environment", "wanted"),
    [
        ((None, None), {}, None),
        (("p", None), {}, Wandb("p", "online")),
        (("p", None), {"WANDB_MODE": "offline"}, Wandb("p", "offline")),
        (("p", None), {"WANDB_MODE": "dryrun"}, Wandb("p", "offline")),
        (("p", "online"), {"WANDB_MODE": "offline"}, Wandb("p", "online")),
        (("p", None), {"WANDB_MODE": "disabled"}, None),
    ],
)
def test_what_is_asked_for(notes, monkeypatch, flags, environment, wanted):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_log.given(*flags) == wanted


@pytest.mark.parametrize(
    ("flags", "mode", "message"),
    [
        ((None, "offline"), "", r"--wandb_mode=offline of which project\? Give --wandb=PROJECT"),
        (("p", None), "sometimes", "WANDB_MODE=sometimes is none of online, offline, disabled"),
        (("team/p", None), "", r"--wandb='team/p' cannot be a project: .* \(WANDB_ENTITY says"),
        (("", None), "", r"--wandb='' cannot be a project"),
    ],
)
def test_what_cannot_be_asked_for(notes, monkeypatch, flags, mode, message):
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(ConfigError, match=message):
        wandb_log.given(*flags)


@pytest.mark.parametrize("folder", [False, True])
def test_a_missing_package_is_one_error(tmp_path, monkeypatch, folder):
    """A folder of that name, as wandb itself makes them, is no package."""
    if folder:
        (tmp_path / "wandb").mkdir()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    hidden = [place for place in sys.path if not (Path(place or ".") / "wandb").exists()]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *hidden])
    with pytest.raises(ConfigError, match="package that is not installed: pip install wandb"):
        wandb_log.given("p", "offline")


def test_of_a_missing_package_the_command_says_so_before_it_trains(tmp_path):
    """With a folder of that name where it would be found first."""
    (tmp_path / "hidden" / "wandb").mkdir(parents=True)
    code = (
        "import importlib.util, sys; real = importlib.util.find_spec;"
        "importlib.util.find_spec = lambda name: None if name == 'wandb' else real(name);"
        "from moepp_jax import main; main.main()"
    )
    arguments = ["train", *flags(tmp_path), f"--workdir={tmp_path / 'run'}", "--wandb=p"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT | {k: "" for k in os.environ if k.startswith("WANDB_")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = "error: --wandb needs a package that is not installed: pip install wandb\n"
    assert (done.returncode, done.stderr) == (1, said)
    assert not (tmp_path / "run").exists() and not (tmp_path / "data").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"id": "x"}', '{"id": 1, "project": 2, "step": ""}'])
def test_a_damaged_note_is_one_error(run, notes, text):
    (run / FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"wandb.json cannot be read as id, project and step"):
        wandb_log.check(run, ONLINE)


def test_an_id_of_the_environment_is_that_of_a_new_run(run, notes, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    measure(run, range(1, 3), 0, ONLINE)
    assert notes("init")[0]["id"] == "mine"
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    with pytest.raises(ConfigError, match=r"WANDB_RUN_ID=another, but .* is the run 'mine'"):
        measure(run, range(3, 5), 2, ONLINE)
