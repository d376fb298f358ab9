"""The table of routing rules in small: what is kept, goes on, is written and is refused."""

import math
import os
import re
import signal
import statistics
import threading
import time
from pathlib import Path

import jax
import pytest

from experiments import routing_rules
from experiments import rows as rows_lib
from moepp_jax import mesh as mesh_lib
from moepp_jax.errors import ConfigError
from moepp_jax.interrupt import Stopped
from moepp_jax.metrics import read_metrics
from tests import hurry, tiny

IN_CHILD = routing_rules.in_child
STEPS = 3
RULE, MESH = "deepseek", "2x4"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Recipes as small as the tests' model, trained in this process."""
    data = str(tmp_path_factory.mktemp("data"))
    full, make_mesh = routing_rules.recipe, mesh_lib.make_mesh

    def recipe(name):
        fields = full(name)
        own = {"data.dir": data, "moe.dispatch": fields.moe.dispatch}
        fields.update_from_flattened_dict(tiny.CHANGES | own)
        return fields

    def in_child(run, folder):
        routing_rules.train_here(folder)
        yield run.steps

    def on_its_devices(config):
        return make_mesh(config, jax.devices()[: config.mesh.data * config.mesh.expert])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing_rules, "recipe", recipe)
        patch.setattr(routing_rules, "in_child", in_child)
        patch.setattr(mesh_lib, "make_mesh", on_its_devices)
        yield


def runs():
    table, compared = routing_rules.planned([RULE], ["1", MESH], STEPS, STEPS)
    return [*table, *compared]


@pytest.fixture(scope="module")
def job(small, tmp_path_factory):
    """The folders of finished runs, on one device and on a mesh, and of their rows."""
    root = tmp_path_factory.mktemp("rules")
    said = []
    routing_rules.train_missing(runs(), root / "docs" / "rows.csv", root / "runs", said.append)
    assert said == [f"2 of 3 runs are to be trained, in {root / 'runs'}"]  # one of them is in both
    return root / "runs", root / "docs" / "rows.csv"


def row_of(rule, loss, ffn=1.2, mesh="1", steps=STEPS, **changes):
    """A made-up row of the plan."""
    run = routing_rules.run_of(rule, mesh, steps)
    return {
        "rule": rule,
        "mesh": mesh,
        "steps": steps,
        "fingerprint": routing_rules.fingerprint(run.config),
        "seed": 0,
        "eval_loss": loss,
        "ffn_experts_per_token": ffn,
        "experts_per_token": 2.0,
        "drop_rate": 0.01,
        "seconds_per_step": 0.25,
        "machine": "CPU, 2 cores",
        "losses": "6 5 4",
    } | changes


def test_a_row_is_what_was_measured(job):
    workdir, file = job
    one, other = routing_rules.read(file)
    assert (one["rule"], one["mesh"], one["steps"], one["seed"]) == (RULE, "1", STEPS, 0)
    assert (other["rule"], other["mesh"], other["steps"]) == (RULE, MESH, STEPS)
    assert one["fingerprint"] == other["fingerprint"]
    run = next(run for run in runs() if run.made(one))
    rows = read_metrics(workdir / run.folder)
    held_out = next(row for row in rows if "eval_loss" in row)
    assert held_out["step"] == STEPS
    assert one["eval_loss"] == pytest.approx(held_out["eval_loss"], rel=1e-5)
    assert one["ffn_experts_per_token"] == pytest.approx(2)
    assert one["experts_per_token"] == pytest.approx(2)
    assert one["drop_rate"] == 0  # dropless
    speed = statistics.median(row["tokens_per_s"] for row in rows if "loss" in row)
    assert one["seconds_per_step"] == pytest.approx(8 * 32 / speed, rel=1e-5)
    assert [float(loss) for loss in one["losses"].split()] == pytest.approx(
        [row["loss"] for row in rows if "loss" in row], rel=1e-8
    )
    ((where, (training, _)),) = routing_rules.compared_losses([one, other]).items()
    assert where == (RULE, MESH) and training < 1e-5


def test_rows_are_kept(job, tmp_path, monkeypatch):
    _, file = job
    monkeypatch.setattr(routing_rules, "in_child", None)
    before = file.read_bytes()
    routing_rules.train_missing(runs(), file, tmp_path / "none", lambda line: None)
    assert file.read_bytes() == before and not (tmp_path / "none").exists()


def test_what_was_stopped_goes_on(job, tmp_path, monkeypatch):
    """The first run is kept as a row; the second, whose row was lost, is trained already."""
    workdir, file = job
    mine = tmp_path / "rows.csv"
    trained = routing_rules.in_child

    def stopped(run, folder):
        if run.mesh == MESH:
            raise Stopped(signal.SIGTERM, 1)
        yield from trained(run, folder)

    monkeypatch.setattr(routing_rules, "in_child", stopped)
    with pytest.raises(Stopped):
        routing_rules.train_missing(runs(), mine, workdir, lambda line: None)
    assert [row["mesh"] for row in routing_rules.read(mine)] == ["1"]
    monkeypatch.setattr(routing_rules, "in_child", trained)
    routing_rules.train_missing(runs(), mine, workdir, lambda line: None)
    assert mine.read_bytes() == file.read_bytes()


def test_another_configuration_is_another_run(small):
    one, other = (routing_rules.run_of(RULE, mesh, STEPS) for mesh in ("1", MESH))
    print_of = routing_rules.fingerprint
    assert print_of(one.config) == print_of(other.config) and one.folder != other.folder
    assert print_of(one.config.replace("data", dir="elsewhere")) == print_of(one.config)
    for group, changes in {
        "moe.rule": {"bias_rate": 0.5},
        "optim": {"lr": 1.0},
        "train": {"steps": 4},
        "model": {"head_dim": 16},
    }.items():
        assert print_of(one.config.replace(group, **changes)) != print_of(one.config)
    assert not other.made(row_of(RULE, 5.0)) and one.made(row_of(RULE, 5.0))
    assert not one.made(row_of(RULE, 5.0, fingerprint="00000000"))


def reported(rows, folder):
    rows_lib.write(folder / "rows.csv", routing_rules.COLUMNS, rows)
    plan = routing_rules.planned(["moepp", RULE, "vanilla"], ["1", MESH], STEPS, STEPS)
    page = routing_rules.write_report(routing_rules.read(folder / "rows.csv"), *plan, folder)
    assert (folder / "README.md").read_text() == page
    return page, (folder / "rules.png").read_bytes()


def test_the_report(small, tmp_path):
    rows = [
        row_of("moepp", 5.0),
        row_of(RULE, 4.9, 2.0),
        row_of(RULE, 4.901, 2.0, MESH, losses="6.006 5 4"),
        row_of("vanilla", 4.5, 2.0, fingerprint="00000000"),
    ]
    page, picture = reported(rows, tmp_path / "a")
    assert (page, picture) == reported(rows[::-1], tmp_path / "b")
    assert picture.startswith(b"\x89PNG")
    lines = page.splitlines()
    assert "    python -m experiments.routing_rules --steps=3 --mesh_steps=3" in lines
    at = lines.index(f"| {RULE} | 4.900 | 2.00 | 2.00 | 1.0% | 0.25 | 0 |")
    assert lines[at + 1] == "| moepp | 5.000 | 1.20 | 2.00 | 1.0% | 0.25 | 0 |"
    assert f"| {RULE} | 1.0e-03 | 2.0e-04 |" in lines
    assert f"No row yet (on its mesh): vanilla (1, 3 steps), moepp ({MESH}, 3 steps), " in page
    assert "Machine: CPU, 2 cores." in lines and "The claim is open: " in page
    assert "- vanilla, mesh 1, 3 steps, 00000000" in lines and "4.500" not in page
    elsewhere, _ = reported([*rows, row_of("vanilla", 5.1, 2.0, machine="GPU")], tmp_path / "c")
    assert "| vanilla | 5.100 | 2.00 | 2.00 | 1.0% | 0.25 | 0 | 2 |" in elsewhere
    assert "2. GPU" in elsewhere.splitlines()
    assert "There are no such rows yet." in reported([], tmp_path / "d")[0]


@pytest.mark.parametrize(
    ("loss", "ffn", "there", "said"),
    [
        (4.99, 1.25, "6", r"holds: .*, longcat has the lowest loss, -0\.010 nats .* 0\.0e\+00 at"),
        (4.97, 1.25, "6", r"does not hold: .* longcat has the lowest loss, -0\.030 nats"),
        (4.5, 1.3, "6", "holds: no other rule uses as few FFN experts"),
        (5.1, 1.2, "6.1", r"does not hold: .*losses on meshes differ by 1\.7e-02 at most"),
    ],
)
def test_the_verdict(small, loss, ffn, there, said):
    shown = [row_of("moepp", 5.0), row_of("longcat", loss, ffn)]
    beside = [
        row_of(rule, 5.0, mesh=mesh, losses=there if mesh == "8x1" else "6")
        for rule in ("moepp", "longcat")
        for mesh in routing_rules.MESHES
    ]
    assert re.match(f"The claim {said}", routing_rules.verdict(shown, beside))
    assert routing_rules.verdict(shown, beside, missing=True).startswith("The claim is open")
    assert routing_rules.verdict(shown, []).startswith("The claim is open")
    assert routing_rules.verdict(shown[1:], beside).startswith("The claim is open: MoE++ has no")


def test_names_keep_apart_in_the_picture(small):
    """A point each, and room for none: it is drawn all the same."""
    crowd = [row_of("moepp", 5.0) | {"rule": f"rule number {i}"} for i in range(25)]
    for rows in ([], crowd[:1], crowd):
        assert routing_rules.figure(rows).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("line", "spoilt", "said"),
    [
        (1, lambda line: line.replace("rule", "rlue"), "line 1: the columns are 'rlue,mesh"),
        (2, lambda line: line.replace(",1,", ",one,").replace(",3,", ",x,"), "line 2: steps = 'x'"),
        (3, lambda line: line[:20], "line 3: there are 4 cells for 12 columns"),
        (3, lambda line: line.replace("6 5 4", "6 5 ?"), "line 3: losses = '6 5 .' are no numbers"),
        (2, lambda line: line.replace(",5,", ",nan,"), "line 2: eval_loss = 'nan' must be finite"),
        (3, lambda line: line + '"', "line 3: "),
    ],
)
def test_a_damaged_line_is_named(small, tmp_path, line, spoilt, said):
    file = tmp_path / "rows.csv"
    rows_lib.write(file, routing_rules.COLUMNS, [row_of("moepp", 5.0), row_of(RULE, 5.0)])
    lines = file.read_text().splitlines()
    lines[line - 1] = spoilt(lines[line - 1])
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=rf"{file}, {said}"):
        routing_rules.read(file)


def test_a_run_has_one_row(small, tmp_path):
    file = tmp_path / "rows.csv"
    rows_lib.write(file, routing_rules.COLUMNS, [row_of(RULE, 5.0), row_of(RULE, 5.1)])
    with pytest.raises(ConfigError, match="line 3: another line is of the same run"):
        routing_rules.read(file)
    assert routing_rules.read(tmp_path / "none.csv") == []


@pytest.mark.parametrize(
    ("names", "meshes", "steps", "said"),
    [
        (["depseek"], ["1"], (3, 3), "--only=depseek: .*; did you mean deepseek"),
        (["zzzz"], ["1"], (3, 3), "--only=zzzz: .*; there are adamoe, "),
        (["moepp"], ["2*4"], (3, 3), r"--meshes=2\*4 must be 1, or devices as DATAxEXPERT"),
        (["moepp"], ["1x1"], (3, 3), "--meshes=1x1 must be 1"),
        (["moepp"], ["2x3"], (3, 3), "config.mesh.expert = 3 must divide"),
        (["moepp"], ["1"], (0, 3), "--steps=0 must be at least 1"),
    ],
)
def test_flags_of_no_use(names, meshes, steps, said):
    with pytest.raises(ConfigError, match=said):
        routing_rules.planned(names, meshes, *steps)


def test_a_run_has_the_devices_of_its_mesh(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    assert routing_rules.environment(1).items() >= {("JAX_NUM_CPU_DEVICES", "1")}
    assert "JAX_PLATFORMS" not in routing_rules.environment(1)
    several = routing_rules.environment(math.prod(routing_rules.axes_of(MESH)))
    assert several["JAX_NUM_CPU_DEVICES"] == "8" and several["JAX_PLATFORMS"] == "cpu"


@pytest.mark.slow
def test_a_run_is_a_process(small, tmp_path, monkeypatch):
    """It trains on the mesh's devices, says why it failed, and is saved when it is stopped."""
    monkeypatch.setattr(routing_rules, "in_child", IN_CHILD)
    monkeypatch.setenv("XLA_FLAGS", hurry.XLA_FLAGS)  # without the devices of the tests
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    file, workdir = tmp_path / "rows.csv", tmp_path / "runs"
    run = routing_rules.run_of(RULE, MESH, STEPS)
    routing_rules.train_missing([run], file, workdir, lambda line: None)
    assert [row["mesh"] for row in routing_rules.read(file)] == [MESH]
    said = (workdir / run.folder / "log.txt").read_text()
    assert "mesh data 2 x fsdp 1 x expert 4" in said and f"step {STEPS}: held-out loss" in said

    long = routing_rules.run_of(RULE, "1", 6000)
    folder = workdir / long.folder

    def stop():
        while not routing_rules.steps_done(folder):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(Stopped, match="stopped and saved at step"):
        routing_rules.train_missing([long], file, workdir, lambda line: None)
    assert "SIGTERM: stopped and saved at step" in (folder / "log.txt").read_text()
    saved = [int(step.name) for step in (folder / "checkpoints").iterdir()]
    assert 0 < max(saved) < 6000
    assert len(routing_rules.read(file)) == 1

    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"status 1: error: .*config\.json cannot be read"):
        list(IN_CHILD(long, folder))
