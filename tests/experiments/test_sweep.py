"""A sweep: what has a row is kept, what was stopped goes on, what another is at is left to it."""

import errno
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest
from rich.console import Console

from moepp_jax import mesh as mesh_lib
from moepp_jax.claim import claimed
from moepp_jax.errors import ConfigError
from moepp_jax.experiments import board, results, run, runs, study, sweep, worker
from moepp_jax.experiments.results import DIVERGED, DONE
from moepp_jax.experiments.scale import TINY
from moepp_jax.interrupt import Stopped
from moepp_jax.metrics import read_metrics
from tests import hurry
from tests.experiments import small

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scale(tmp_path_factory):
    return small.scale(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    make_mesh = mesh_lib.make_mesh
    monkeypatch.setattr(mesh_lib, "make_mesh", lambda c: make_mesh(c, jax.devices()[:1]))


def here(one, folder, scale):
    """Trains in this process."""
    worker.work(folder, scale)
    yield one.config.train.steps


def never(one, folder, scale):
    raise AssertionError(one)
    yield


@pytest.fixture(scope="module")
def swept(scale, tmp_path_factory):
    """The plan, and the folders of a sweep that is through."""
    root = tmp_path_factory.mktemp("sweep")
    planned = run.plan([small.Twins()], scale, seeds=1)
    make_mesh = mesh_lib.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_lib, "make_mesh", lambda c: make_mesh(c, jax.devices()[:1]))
        left = sweep.train_missing(planned, scale, root / "runs.csv", root / "runs", here)
    assert left == 0
    return planned, root


def test_a_row_is_what_was_measured(swept, scale):
    planned, root = swept
    rows = {row.key: row for row in results.read(root / "runs.csv")}
    assert list(rows) == [one.key for one in sorted(planned, key=lambda r: rows[r.key].changes)]
    row = rows[planned[2].key]
    assert (row.changes, row.status, row.seed) == ("moe.rule.tau=0.25", DONE, 0)
    logged = read_metrics(root / "runs" / planned[2].folder)
    held_out, training = logged[-1], [r for r in logged if "loss" in r]
    assert row.eval_loss == held_out["eval_loss"] and row.by_source == {"text": row.eval_loss}
    assert row.bits_per_byte == held_out["eval_bits_per_byte"]
    assert row.ffn_experts == held_out["eval_ffn_experts_per_token"]
    assert row.experts == pytest.approx(2)
    assert row.tokens == 4 * 8 * 32 == training[-1]["tokens"]
    in_training = sum(r["ffn_experts_per_token"] for r in training) / 4
    assert row.training_ffn_experts == pytest.approx(in_training)
    # 2 layers of 3 matrices of 32 x 24, of multiply and add, forward and twice that backward.
    an_expert = 2 * 3 * 32 * 24 * 2 * 3 * row.tokens
    load = planned[2].config.moe.rule.ffn_load
    assert row.nominal_flops - row.realised_flops == pytest.approx((load - in_training) * an_expert)
    assert row.nominal_flops == pytest.approx(planned[2].nominal_flops)
    assert row.drop_rate == pytest.approx(training[-1]["drop_rate"])  # of the last fifth
    assert row.worst_eighth == max(training[-1]["drop_rate_by_part"])
    assert row.seconds > row.step_seconds > 0


def test_one_seed_gives_all_variants_the_same_start_and_text(swept, scale):
    """The first loss differs by the experts alone; shared parameters and rows are the same."""
    import moepp_jax
    from moepp_jax.data import open_dataset

    planned, root = swept
    vanilla, moepp, _ = planned
    batches = [open_dataset(one.config).train_batch(2)["tokens"] for one in (vanilla, moepp)]
    assert (batches[0] == batches[1]).all()
    from moepp_jax import model as model_lib

    a, b = (
        model_lib.build(one.config).init(jax.random.key(one.config.seed))
        for one in (vanilla, moepp)
    )
    for part in ("embedding", "output", "final"):
        assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), a[part], b[part])), part
    assert (a["layers"]["moe"]["ffn"]["w_in"] == b["layers"]["moe"]["ffn"]["w_in"]).all()
    assert moepp_jax.load(root / "runs" / vanilla.folder) is not None


def test_what_has_a_row_is_not_trained(swept, scale, tmp_path):
    planned, root = swept
    before = (root / "runs.csv").read_bytes()
    assert sweep.train_missing(planned, scale, root / "runs.csv", tmp_path / "none", never) == 0
    assert (root / "runs.csv").read_bytes() == before and not (tmp_path / "none").exists()


def test_a_row_that_was_lost_is_taken_from_its_run(swept, scale, tmp_path):
    planned, root = swept
    assert sweep.train_missing(planned, scale, tmp_path / "r.csv", root / "runs", never) == 0
    assert (tmp_path / "r.csv").read_bytes() == (root / "runs.csv").read_bytes()


def test_a_stopped_sweep_keeps_its_rows(swept, scale, tmp_path):
    planned, root = swept
    file = tmp_path / "runs.csv"

    def stopped(one, folder, scale):
        if one is planned[1]:
            raise Stopped(signal.SIGTERM, 1)
        (folder / worker.ROW).write_bytes((root / "runs" / one.folder / worker.ROW).read_bytes())
        yield 4

    with pytest.raises(Stopped):
        sweep.train_missing(planned, scale, file, tmp_path / "runs", stopped)
    assert [row.key for row in results.read(file)] == [planned[0].key]


def test_what_another_process_is_at_is_left_to_it(swept, scale, tmp_path):
    planned, root = swept
    workdir, file = tmp_path / "runs", tmp_path / "runs.csv"
    lock = workdir / planned[0].folder / worker.LOCK
    code = (
        "import sys, pathlib\nfrom moepp_jax.claim import claimed\n"
        "with claimed(pathlib.Path(sys.argv[1])):\n    print(flush=True)\n    sys.stdin.read()\n"
    )
    there = {one.folder: (root / "runs" / one.folder / worker.ROW).read_bytes() for one in planned}

    def copied(one, folder, scale):
        (folder / worker.ROW).write_bytes(there[one.folder])
        yield 4

    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        assert sweep.train_missing(planned, scale, file, workdir, copied) == 1
        assert {r.key for r in results.read(file)} == {one.key for one in planned[1:]}
        other.stdin.close()
        other.wait()
    assert sweep.train_missing(planned, scale, file, workdir, copied) == 0
    assert len(results.read(file)) == 3


def test_a_run_that_diverges_is_a_row(scale, tmp_path):
    data = scale.recipe().data.dir
    diverging = small.scale(data, **{"optim.lr": 1e30, "optim.warmup_steps": 0})
    planned = run.plan([small.Twins()], diverging, seeds=1)[:1]
    file, workdir = tmp_path / "runs.csv", tmp_path / "runs"
    assert sweep.train_missing(planned, diverging, file, workdir, here) == 0
    (row,) = results.read(file)
    assert (row.status, row.eval_loss, row.held_out) == (DIVERGED, None, "")
    assert 0 < row.tokens < 4 * 8 * 32 and row.step_seconds > 0
    assert sweep.train_missing(planned, diverging, file, workdir, never) == 0


def test_a_run_that_fails_is_named(scale, tmp_path, monkeypatch):
    """In a process of its own; its error, not its traceback, is told."""
    (one, *_) = run.plan([small.Twins()], scale, seeds=1)
    monkeypatch.setenv("XLA_FLAGS", hurry.XLA_FLAGS)
    folder = tmp_path / "runs" / one.folder
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=rf"{one.folder} ended with status 1: error: .*config"):
        list(sweep.in_child(one, folder, scale))


def test_a_sweep_under_nice_stays_nice(scale, tmp_path, monkeypatch):
    """A run is in the sweep's session, of whose priority it is, and of no Ctrl-C in its group."""
    (one, *_) = run.plan([small.Twins()], scale, seeds=1)
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        "open(sys.argv[-1] + '/ids', 'w').write(f'{os.getsid(0)} {os.getpgid(0)}')\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    list(sweep.in_child(one, tmp_path, scale))
    session, group = map(int, (tmp_path / "ids").read_text().split())
    assert session == os.getsid(0) and group != os.getpgid(0)


@pytest.mark.slow
def test_killed_and_resumed_and_shared(scale, tmp_path, monkeypatch):
    """Two processes work on one sweep; one is killed with SIGKILL, a third takes its place."""
    steps = 40
    (tmp_path / "shared.py").write_text(
        "import sys\nfrom pathlib import Path\n"
        "from moepp_jax.experiments import run, sweep\nfrom tests.experiments import small\n"
        f"scale = small.scale({str(tmp_path / 'data')!r}, **{{'train.steps': {steps},"
        f" 'train.eval_every': {steps}, 'train.save_every': 5}})\n"
        "planned = run.plan([small.Twins()], scale)\n"
        f"root = Path({str(tmp_path)!r})\n"
        "print('started', flush=True)\n"
        "print(sweep.train_missing(planned, scale, root / 'runs.csv', root / 'runs'))\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": hurry.XLA_FLAGS}
    command = [sys.executable, str(tmp_path / "shared.py")]

    def start():
        return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL)

    first, second = start(), start()
    deadline = time.monotonic() + 240
    while not any(sweep.steps_done(f) > 7 for f in (tmp_path / "runs").glob("*-*")):
        assert time.monotonic() < deadline, "no run got to step 8"
        time.sleep(0.2)
    first.kill()
    first.wait()
    third = start()
    assert second.wait(300) == 0 and third.wait(300) == 0
    planned = run.plan(
        [small.Twins()],
        small.scale(
            tmp_path / "data",
            **{"train.steps": steps, "train.eval_every": steps, "train.save_every": 5},
        ),
    )
    rows = results.read(tmp_path / "runs.csv")
    assert {row.key for row in rows} == {one.key for one in planned}
    for one in planned:
        logged = [r["step"] for r in read_metrics(tmp_path / "runs" / one.folder) if "loss" in r]
        assert logged == list(range(1, steps + 1)), one.folder


def test_numbers_of_runs(scale):
    planned = run.plan([small.Twins()], scale)
    assert run.chosen(planned, None) == planned
    assert run.chosen(planned, "1") == planned[1:2]
    assert run.chosen(planned, "0, 2-4") == [planned[i] for i in (0, 2, 3, 4)]
    for wrong in ("6", "-1", "x", "3-1", "", "1,"):
        with pytest.raises(ConfigError, match=r"is no run; numbers are 0 to 5"):
            run.chosen(planned, wrong)


def test_an_experiment_that_does_not_exist():
    with pytest.raises(ConfigError, match="no experiment 'taus'; did you mean tau"):
        run.experiments(["taus"], TINY)
    with pytest.raises(ConfigError, match="pods is not of scale tiny: --scale=paper"):
        run.experiments(["tau", "pods"], TINY)
    assert [one.name for one in run.experiments(["tau", "tau"], TINY)] == ["tau"]
    everything = {one.name for one in run.experiments([run.ALL], TINY)}
    assert set(study.names()) - everything == {"gpus", "pods", "step_changes", "step_time"}


def said(of, terminal=False):
    out = io.StringIO()
    of(Console(file=out, width=120, force_terminal=terminal))
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())


def test_lists(scale):
    of = small.Twins()
    rows = [small.row(v, loss=5.25, seconds=600.0) for v in of.variants(scale)[:2]]
    text = said(lambda console: console.print(run.listed([of], scale, rows)))
    assert re.search(r"twins +Are twins alike\? +6 +2 +\d+ min", text)
    text = said(lambda console: console.print(run.listed_runs(of, scale, rows)))
    assert re.search(r"1 +MoE\+\+ +0 +5.2500 +10 min", text)
    assert re.search(r"4 +MoE\+\+ +1 +10 min", text)
    assert "?" in said(lambda console: console.print(run.listed([of], scale, [])))
    # With another number of seeds the numbers are those that --only takes with it.
    text = said(lambda console: console.print(run.listed_runs(of, scale, rows, 3)))
    assert len(re.findall(r"MoE\+\+ +[012] ", text)) == 3
    text = said(lambda console: console.print(run.listed([of], scale, rows, 3)))
    assert re.search(r"twins +Are twins alike\? +9 +2 ", text)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_board(scale, terminal):
    of = small.Twins()
    variants = of.variants(scale)
    planned = run.plan([of], scale, seeds=1)
    first = small.row(variants[0], nominal_flops=planned[0].nominal_flops)

    def show(console):
        with board.Board(planned, [first], console) as shown:
            shown.started(planned[1])
            shown.at(planned[1], 3)
            shown.ended(planned[1], [first, small.row(variants[1], loss=4.5)])

    text = said(show, terminal)
    assert "1 of 3 runs are done; the other 2 take about 1 min" in text
    assert "2 of 3: MoE++, seed 0: held-out loss 4.5000, 30 s; left" in text
    if terminal:
        assert "3/4" in text and "2 of 3 done, ETA" in text


def test_the_rest_is_estimated_at_the_pace_of_what_ended_here(scale):
    """Rows may be of a slower machine: here the one run took a tenth of what they say."""
    of = small.Twins()
    planned = run.plan([of], scale)
    others = [small.row(v, seed=1, seconds=6000.0) for v in of.variants(scale)]
    mine = small.row(of.variants(scale)[0], seconds=600.0)

    def show(console):
        with board.Board(planned, others, console) as shown:
            shown.started(planned[0])
            shown.ended(planned[0], [*others, mine])

    assert "the other 3 take about 5 h 00 min" in said(show)
    assert re.search(r"600 s; left \d+ min", said(show))


def test_times():
    assert [board.clock(s) for s in (None, 29, 61, 3600, 3660 * 2)] == [
        "?",
        "0 min",
        "1 min",
        "1 h 00 min",
        "2 h 02 min",
    ]
    one = runs.Run(small.scale().variant("x").config)
    half = one.nominal_flops / 2
    own, other = (
        small.row(one.key[0], seconds=50.0),
        small.row("b", seconds=10.0, nominal_flops=half),
    )
    assert board.seconds_of(one, [own, other]) == 50
    assert board.seconds_of(one, [other]) == pytest.approx(20)
    assert board.seconds_of(one, []) is None
    # One that diverged before its first log has no work to go by.
    none = small.row("c", seconds=1.0, nominal_flops=0.0)
    assert board.seconds_of(one, [none, other]) == pytest.approx(20)
    assert board.seconds_of(one, [none]) is None


def test_again_trains_anew(tmp_path, monkeypatch, capsys):
    """Whatever an earlier one left there; and what it ends with can differ from the row."""
    scale = small.scale()
    planned = run.plan([small.Twins()], scale, seeds=1)[:1]
    file, losses = tmp_path / "runs.csv", iter([5.0, 5.5])
    results.write(file, [small.row(planned[0].key[0], 0, 5.0)])

    def in_child(one, folder, scale):
        assert not (folder / worker.ROW).exists()
        row = small.row(one.key[0], 0, next(losses))
        (folder / worker.ROW).write_text(json.dumps(vars(row)))
        yield 4

    monkeypatch.setattr(sweep, "in_child", in_child)
    run.again(planned, scale, file, tmp_path)
    assert "eval_loss: 5.0 in the row, 5.0 again: the same to the last" in capsys.readouterr().out
    run.again(planned, scale, file, tmp_path)
    assert "eval_loss: 5.0 in the row, 5.5 again: 1.0e-01 away" in capsys.readouterr().out
    results.write(file, [])
    with pytest.raises(ConfigError, match=r"has no row in .* that it could be compared with"):
        run.again(planned, scale, file, tmp_path)


def test_a_worker_that_is_refused(scale, tmp_path):
    """Its own process holds no lock twice: another's does, and its status says so."""
    assert worker.TAKEN not in (0, 1, 128 + signal.SIGTERM)
    assert worker.finished(tmp_path) is None
    (tmp_path / worker.ROW).write_text(json.dumps(small.row("a").__dict__))
    with claimed(tmp_path / worker.LOCK):
        pass
    assert worker.work(tmp_path, scale) == small.row("a")


@pytest.mark.parametrize("text", ['{"fingerprint": "a"', '{"fingerprint": "a"}', "[1]", ""])
def test_a_damaged_row_of_a_run_is_named(tmp_path, text):
    (tmp_path / worker.ROW).write_text(text)
    with pytest.raises(ConfigError, match=r"row.json is no row of a run .*: take it away, and"):
        worker.finished(tmp_path)


def test_a_disk_that_is_full_keeps_the_rows_there_are(tmp_path, monkeypatch):
    """The run has its row in its own folder: the next command adds it without training."""
    file = tmp_path / "runs.csv"
    results.write(file, [small.row("a")])
    before = file.read_bytes()

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=f"No space left on device: '{file}'"):
        results.add(file, small.row("b"), tmp_path / "lock")
    assert file.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"runs.csv", "lock"}


def test_means_of_what_is_there():
    assert worker._mean([1.0, None, 3.0]) == 2.0 and worker._mean([None]) == 0.0
    assert math.isfinite(worker._mean([]))


def test_a_worker_ends_with_its_parent(monkeypatch):
    parents, ended = [os.getppid()], threading.Event()
    monkeypatch.setattr(worker.os, "getppid", lambda: parents[-1])
    monkeypatch.setattr(worker.os, "kill", lambda *asked: (gone.append(asked), ended.set()))
    gone = []
    worker.stop_with_parent()
    parents.append(1)
    assert ended.wait(5) and gone == [(os.getpid(), signal.SIGTERM)]
