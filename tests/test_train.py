"""A run from its first step to its last: what it leaves behind, and how it stops and goes on."""

import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from moepp_jax import evaluate as evaluate_lib
from moepp_jax import mesh as mesh_lib
from moepp_jax import optim, processes
from moepp_jax import state as state_lib
from moepp_jax.checkpoint import Checkpoints
from moepp_jax.data import DataError, Dataset, Tokenizer
from moepp_jax.data.reading import Training
from moepp_jax.errors import ConfigError
from moepp_jax.interrupt import Stopped, StopRequest
from moepp_jax.metrics import DivergedError, MetricsWriter, read_metrics
from moepp_jax.train import train
from moepp_jax.workdir import open_workdir, read_config
from tests import tiny

# What every training row holds; others may join them.
ROW = {"step", "loss", "balance_loss", "z_loss", "grad_norm", "lr", "tokens", "tokens_per_s"}
ROW |= {"drop_rate_by_part", "drop_rate_by_kind", "router_entropy", "router_entropy_by_layer"}
ROW |= {"load_largest_by_layer", "load_smallest_by_layer", "dead_experts_by_layer"}
ROW |= {"grad_norm_by_block"}
ROW |= {"ffn_experts_per_token", "drop_rate", "seconds", "data_wait", "tokens/text", "epochs/text"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def config(data, **changes):
    steps = {"train.steps": 8, "train.eval_every": 4, "train.save_every": 4}
    learning = {"optim.lr": 1e-2, "model.init_std": 0.1}
    return tiny.config(**{"data.dir": str(data)}, **(steps | learning | changes))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a run on eight devices, its last state, and what was reported."""
    folder, lines = tmp_path_factory.mktemp("runs") / "a", []
    state = train(config(data), folder, lines.append)
    return folder, jax.device_get(state), lines


def training_rows(folder):
    return [row for row in read_metrics(folder) if "loss" in row]


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_loss_falls_and_every_number_is_there(finished, data):
    folder, *_ = finished
    c = config(data)
    rows = training_rows(folder)
    assert [row["step"] for row in rows] == [*range(1, 9)]
    assert all(row.keys() >= ROW for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert rows[0]["loss"] == pytest.approx(np.log(c.model.vocab_size), rel=0.05)
    assert [row["tokens"] for row in rows] == [256 * row["step"] for row in rows]
    schedule = optim.schedule(c)
    for row in rows:
        assert row["lr"] == pytest.approx(float(schedule(row["step"] - 1)))
        assert 0 <= row["drop_rate"] < 1 and 0 < row["ffn_experts_per_token"] < 2
        assert row["grad_norm"] > 0 and row["balance_loss"] > 0 and row["z_loss"] > 0
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0
    for before, row in itertools.pairwise(rows):
        rate = 256 / (row["seconds"] - before["seconds"])
        assert row["tokens_per_s"] == pytest.approx(rate, rel=1e-3)


def test_held_out_text_is_evaluated_on_the_way_and_at_the_end(finished):
    folder, *_ = finished
    rows = [row for row in read_metrics(folder) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [4, 8]
    assert rows[1]["eval_loss"] < rows[0]["eval_loss"]
    assert all(row["eval_bits_per_byte"] > 0 for row in rows)


def test_what_a_run_leaves_behind(finished, data):
    folder, state, lines = finished
    assert read_config(folder) == config(data)
    assert Tokenizer.load(folder / "tokenizer.model").vocab_size == 384
    assert list((folder / "tensorboard").glob("events.*"))
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(
        [
            "checkpoints",
            "config.json",
            "data.json",
            "metrics.jsonl",
            "tensorboard",
            "tokenizer.model",
        ]
    )
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.steps() == [4, 8] and checkpoints.best_step() == 8
    assert state.step == 8
    assert "mesh data 8 x fsdp 1 x expert 1" in lines[-1] and "step 0 of 8; compiling" in lines[-1]


def test_a_finished_run_returns_at_once(finished, data, monkeypatch):
    folder, state, _ = finished
    before = files(folder)
    monkeypatch.setattr(state_lib, "make_train_step", lambda *args: pytest.fail("trained again"))
    lines = []
    again = train(config(data), folder, lines.append)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), state)
    assert files(folder) == before
    assert "step 8 of 8; nothing is left to train: to go on, --config=run:" in lines[-1]


def test_another_configuration_changes_nothing(finished, data):
    folder, *_ = finished
    before = files(folder)
    with pytest.raises(ConfigError, match=r"config.moe.rule.tau: 0.75 there, 0.5 now"):
        train(config(data, **{"moe.rule.tau": 0.5}), folder)
    assert files(folder) == before


HOLDS = """
import sys, time
from moepp_jax.workdir import alone
with alone(sys.argv[1]):
    print("trains", flush=True)
    time.sleep(60)
"""


def test_no_two_processes_train_in_one_folder(finished, data, tmp_path):
    """However they call it; what the second one finds is left as it is, and death lets go."""
    folder, *_ = finished
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    longer = config(data, **{"train.steps": 9})
    other = subprocess.Popen([sys.executable, "-c", HOLDS, str(link)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"trains\n"
        before = files(folder)
        for name in (folder, link):
            said = rf"workdir {name}: process {other.pid} of .*, since .*, trains there: wait for"
            with pytest.raises(ConfigError, match=said):
                train(longer, name, lambda line: None)
        assert files(folder) == before
    finally:
        other.kill()
        other.wait()
    train(config(data), folder, lambda line: None)


def test_text_that_is_not_there_leaves_no_run(data, tmp_path):
    with pytest.raises(ConfigError, match=r"config.data.sources.text.path = .*nowhere"):
        train(
            config(data, **{"data.sources.text.path": str(tmp_path / "nowhere")}), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def after_steps(monkeypatch, count, action):
    """Does something when a run has started its `count`-th step from here."""
    make = state_lib.make_train_step

    def made(*args):
        step, calls = make(*args), []

        def counted(*args):
            calls.append(1)
            if len(calls) == count:
                action()
            return step(*args)

        return counted

    monkeypatch.setattr(state_lib, "make_train_step", made)


def test_a_run_asked_to_stop_saves_and_goes_on_on_fewer_devices(
    finished, data, tmp_path, monkeypatch
):
    whole, *_ = finished
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        after_steps(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="SIGTERM: stopped and saved at step 3") as e:
            train(config(data), tmp_path, report=lambda line: None)
    assert e.value.status == 143
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert training_rows(tmp_path)[-1]["step"] == 3
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [3]

    fewer = config(data, **{"mesh.data": 1, "mesh.expert": 2})
    two = functools.partial(mesh_lib.make_mesh, devices=jax.devices()[:2])
    monkeypatch.setattr(mesh_lib, "make_mesh", two)
    lines = []
    train(fewer, tmp_path, lines.append)
    assert "mesh data 1 x fsdp 1 x expert 2" in lines[-1] and "step 3 of 8" in lines[-1]
    rows, expected = training_rows(tmp_path), training_rows(whole)
    assert [row["step"] for row in rows] == [*range(1, 9)]
    for name in ("loss", "grad_norm", "drop_rate"):
        np.testing.assert_allclose(
            [row[name] for row in rows], [row[name] for row in expected], rtol=1e-3, err_msg=name
        )
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)


init_state = state_lib.init_state


@functools.cache
def fresh_state(mesh):
    """As `config` has it: what a pretended step returns as it got it is compiled for all once."""
    return init_state(state_lib.assemble(config(""), mesh))


def pretended(
    monkeypatch, seconds_of_step=0.0, seconds_of_evaluation=0.0, seconds_of_batch=0.0, at_step=None
):
    """A step and an evaluation that are quick to compile, and like reading seem to take their time.

    `at_step` is called when a step begins.
    """
    clock = [0.0]

    def perf_counter():
        clock[0] += 1e-9  # no two readings are the same
        return clock[0]

    def make_train_step(parts):
        def step(state, batch):
            jax.block_until_ready(batch)
            clock[0] += seconds_of_step
            if at_step:
                at_step()
            names = ("loss", "grad_norm", "lr", "ffn_experts_per_token", "drop_rate")
            load = np.full((2, parts.model.rule.pool.size), 0.2)
            values = dict.fromkeys(names, 1.0) | {"load": load}
            return state, values | {"guard": jax.device_get(state.guard)}

        return step

    def make_evaluate(parts):
        def evaluate(params, batches, through):
            clock[0] += seconds_of_evaluation
            names = ("eval_loss", "eval_perplexity", "eval_ffn_experts_per_token", "eval_tokens")
            return dict.fromkeys(names, 1.0)

        return evaluate

    read = Dataset.train_batches

    def train_batches(*args):
        for batch in read(*args):
            clock[0] += seconds_of_batch
            yield batch

    monkeypatch.setattr(Dataset, "train_batches", train_batches)
    monkeypatch.setattr(state_lib, "init_state", lambda parts: fresh_state(parts.mesh))
    monkeypatch.setattr(state_lib, "make_train_step", make_train_step)
    monkeypatch.setattr(evaluate_lib, "make_evaluate", make_evaluate)
    monkeypatch.setattr("moepp_jax.log.time", SimpleNamespace(perf_counter=perf_counter))


def test_rows_are_written_every_so_often_and_at_the_end(data, tmp_path, monkeypatch):
    pretended(monkeypatch, seconds_of_step=0.02, seconds_of_evaluation=0.5)
    c = config(data, **{"train.log_every": 3, "train.save_every": 5, "train.eval_every": 2})
    train(c, tmp_path, report=lambda line: None)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == [3, 6, 8]
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4, 6, 8]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [5, 8]
    # Evaluations are no part of the time that training took: there were three before this row.
    assert rows[-2]["seconds"] == pytest.approx(8 * 0.02)


def test_time_goes_on_where_it_was(data, tmp_path, monkeypatch):
    pretended(monkeypatch, seconds_of_step=1.0)
    open_workdir(tmp_path, config(data))
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, seconds=1000.0)
    train(config(data), tmp_path, report=lambda line: None)
    assert all(1000 < row["seconds"] < 1100 for row in training_rows(tmp_path))


def test_the_share_of_the_time_that_went_by_waiting_for_data_is_told(data, tmp_path, monkeypatch):
    pretended(monkeypatch, seconds_of_step=0.03, seconds_of_batch=0.01)
    train(config(data, **{"train.log_every": 2}), tmp_path, report=lambda line: None)
    waits = [row["data_wait"] for row in training_rows(tmp_path)]
    assert waits[1:3] == pytest.approx([0.25, 0.25])  # the last step waits for none to follow it


def test_the_next_batch_is_on_its_way_to_the_devices_when_a_step_begins(
    data, tmp_path, monkeypatch
):
    placed, at_steps = [], []
    place = processes.Rows.place

    def counted(rows, batch):
        placed.append(place(rows, batch))
        return placed[-1]

    monkeypatch.setattr(processes.Rows, "place", counted)
    pretended(monkeypatch, at_step=lambda: at_steps.append(len(placed)))
    train(config(data), tmp_path, report=lambda line: None)
    assert at_steps == [*range(2, 9), 8]


def test_damaged_data_ends_the_run_and_its_checkpoints_are_kept(data, tmp_path, monkeypatch):
    pretended(monkeypatch)
    intact = Training.batches

    def damaged(training, steps, rows):
        if 6 in steps:
            raise DataError("shard 5, record 7")
        return intact(training, steps, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "batches", damaged)
        with pytest.raises(DataError, match="shard 5, record 7"):
            train(config(data), tmp_path, report=lambda line: None)
    assert training_rows(tmp_path)[-1]["step"] == 4  # a batch is fetched one step ahead
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [4]
    train(config(data), tmp_path, report=lambda line: None)
    assert [row["step"] for row in training_rows(tmp_path)] == [*range(1, 9)]


@pytest.mark.parametrize("name", ["loss", "grad_norm", "eval_loss"])
def test_a_run_that_diverges_stops_before_it_is_saved(data, tmp_path, monkeypatch, name):
    """Between two rows, so that it is noticed where the checkpoint is to be saved."""
    steps = []
    pretended(monkeypatch, at_step=lambda: steps.append(1))
    after(monkeypatch, steps, 6, name)
    c = config(data, **{"train.log_every": 5, "train.save_every": 2, "train.eval_every": 6})
    with pytest.raises(DivergedError, match=rf"step 6: {name} = nan: .*checkpoint 4 is the newest"):
        train(c, tmp_path, report=lambda line: None)
    assert len(steps) == 6
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.steps() == [2, 4]


def test_a_loss_that_is_not_finite_is_in_the_metrics_where_the_run_ends(
    data, tmp_path, monkeypatch
):
    steps = []
    pretended(monkeypatch, at_step=lambda: steps.append(1))
    after(monkeypatch, steps, 3, "loss")
    with pytest.raises(DivergedError, match=r"step 3: loss = nan: .* there is no checkpoint yet"):
        train(config(data), tmp_path, report=lambda line: None)
    assert len(steps) == 4  # a step is looked at while the next one runs
    assert [row["loss"] for row in training_rows(tmp_path)] == [1.0, 1.0, None]


def after(monkeypatch, steps, count, name):
    """A number of the pretended steps, or of their evaluations, is lost from this step on."""

    def lost(make):
        def made(*args):
            work = make(*args)

            def worked(*args, **kwargs):
                result = work(*args, **kwargs)
                numbers = result[1] if isinstance(result, tuple) else result
                if len(steps) >= count and name in numbers:
                    numbers[name] = math.nan
                return result

            return worked

        return made

    monkeypatch.setattr(state_lib, "make_train_step", lost(state_lib.make_train_step))
    monkeypatch.setattr(evaluate_lib, "make_evaluate", lost(evaluate_lib.make_evaluate))


def test_the_first_signal_asks_and_the_second_one_insists():
    # What a shell starts in the background ignores it, and so would this test.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert Stopped(signal.SIGINT, 1).status == 130


def test_metrics_are_json_that_anyone_can_read(finished):
    folder, *_ = finished
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_evaluation_that_cannot_be_done_is_found_before_anything_is_trained(
    data, tmp_path, monkeypatch
):
    def on_device(parts):
        def sums(params, batch):
            raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: ragged all-to-all\nmore")

        return sums

    evaluate_lib.make_evaluate.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_lib, "make_sums", on_device)
        with pytest.raises(ConfigError, match=r"evaluation does not run .*: UNIMPLEMENTED: .*all$"):
            train(config(data), tmp_path / "run", print)
    evaluate_lib.make_evaluate.cache_clear()
    assert not read_metrics(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
