"""A run's data and its folder: what it keeps to when sources change, and when it is moved."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from moepp_jax import processes, run_data
from moepp_jax import state as state_lib
from moepp_jax.data import Tokenizer, open_dataset, prepare
from moepp_jax.data import prepare as prepare_data
from moepp_jax.errors import ConfigError
from moepp_jax.evaluate import evaluate_run
from moepp_jax.metrics import read_metrics
from moepp_jax.parent import given
from moepp_jax.train import train
from moepp_jax.workdir import read_config
from tests import tiny

SILENT = {"report": lambda line: None}


@pytest.fixture
def text(tmp_path):
    return Path(shutil.copytree(tiny.TEXT, tmp_path / "text"))


def config(tmp_path, **changes):
    where = {"data.dir": f"{tmp_path}/data", "data.sources.text.path": f"{tmp_path}/text"}
    steps = {"train.steps": 4, "train.eval_every": 2, "train.save_every": 2}
    return tiny.config(**(where | steps | changes))


@pytest.fixture
def fed(monkeypatch):
    """The rows that training is given, and a step that returns the state as it is, at once."""
    rows, place = [], processes.Rows.place

    def noted(self, batch):
        rows.append(batch["tokens"].tolist())
        return place(self, batch)

    def make_train_step(parts):
        def step(state, batch):
            names = ("loss", "grad_norm", "lr", "ffn_experts_per_token", "drop_rate")
            load = np.full((2, parts.model.rule.pool.size), 0.2)
            values = dict.fromkeys(names, 1.0) | {"load": load}
            return state, values | {"guard": jax.device_get(state.guard)}

        return step

    monkeypatch.setattr(processes.Rows, "place", noted)
    monkeypatch.setattr(state_lib, "make_train_step", make_train_step)
    monkeypatch.setattr(
        "moepp_jax.evaluate.make_evaluate",
        lambda parts: (
            lambda params, batches, **_: {
                "eval_loss": float(sum(batch["tokens"].sum() for batch in batches)),
                "eval_tokens": 1,
                "eval_ffn_experts_per_token": 1.0,
            }
        ),
    )
    return rows


def add(text):
    (text / "more.txt").write_text("What nobody has read so far, of ships and the sea.\n\n" * 200)


def test_a_run_goes_on_with_the_rows_it_began_with(text, tmp_path, fed):
    """Whatever was added to its source, and whoever prepared that; evaluation too."""
    c, run = config(tmp_path), tmp_path / "run"
    expected = [batch.tolist() for batch in first_batches(c, 8)]
    train(c, run, **SILENT)
    before = evaluate_run(c, run)
    noted = (run / "data.json").read_bytes()
    add(text)
    changed = prepare_data(c, **SILENT)
    assert [b.tolist() for b in first_batches(c, 8)] != expected
    assert changed.prepared.tokens["text"].name not in noted.decode()
    fed.clear()
    longer = c.replace("train", steps=8)
    train(longer, run, **SILENT)
    assert fed == expected[4:]
    assert evaluate_run(longer, run)["eval_loss"] == before["eval_loss"]
    assert (run / "data.json").read_bytes() == noted
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == [*range(1, 9)]


def first_batches(c, count):
    dataset = prepare(c, **SILENT)
    return [dataset.train_batch(step)["tokens"] for step in range(count)]


def test_data_that_is_gone_is_made_again_only_as_it_was(text, tmp_path, fed):
    c, run = config(tmp_path), tmp_path / "run"
    train(c, run, **SILENT)
    longer = c.replace("train", steps=6)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"there is no .*tokens-.*`train` makes it again"):
        evaluate_run(c, run)
    train(longer, run, **SILENT)  # the source is what it was
    add(text)
    shutil.rmtree(tmp_path / "data")
    before = (run / "config.json").read_bytes()
    with pytest.raises(ConfigError) as error:
        train(c.replace("train", steps=8), run, **SILENT)
    said = str(error.value)
    name = json.loads((run / "data.json").read_text())["sources"]["text"]["tokens"]
    assert f"there is no {tmp_path}/data/{name}, the tokens of config.data.sources.text" in said
    assert f"'{text}' has changed since" in said and f"--init_from={run}" in said
    assert (run / "config.json").read_bytes() == before
    shutil.rmtree(text)
    with pytest.raises(ConfigError, match=r"its text text-.* is not there either, and .*not exist"):
        train(c.replace("train", steps=8), run, **SILENT)
    # What the message says: another run takes the data as it is now.
    shutil.copytree(tiny.TEXT, text)
    add(text)
    train(read_config(run), tmp_path / "new", parent=given(str(run)), **SILENT)
    assert (tmp_path / "new" / "data.json").read_bytes() != (run / "data.json").read_bytes()


def test_data_of_the_same_name_and_other_content_is_refused(text, tmp_path, fed):
    c, run = config(tmp_path), tmp_path / "run"
    train(c, run, **SILENT)
    pins = json.loads((run / "data.json").read_text())
    pins["sources"]["text"]["content"] = "0" * 12
    (run / "data.json").write_text(json.dumps(pins))
    with pytest.raises(ConfigError, match=r"tokens-\w+ holds other records than it held, of confi"):
        train(c.replace("train", steps=6), run, **SILENT)
    for damaged in ("{", "[]", '{"tokenizer": "a", "sources": {"text": {"text": 1}}}'):
        (run / "data.json").write_text(damaged)
        with pytest.raises(ConfigError, match=r"data.json cannot be read as what data the run"):
            evaluate_run(c, run)


def test_a_run_that_noted_nothing_keeps_to_what_was_prepared_last(text, tmp_path, fed):
    """As earlier versions left it."""
    c, run = config(tmp_path), tmp_path / "run"
    train(c, run, **SILENT)
    noted = (run / "data.json").read_bytes()
    (run / "data.json").unlink()
    add(text)
    train(c.replace("train", steps=6), run, **SILENT)
    assert (run / "data.json").read_bytes() == noted


def test_what_a_killed_start_noted_binds_no_one(text, tmp_path, fed):
    c, run = config(tmp_path), tmp_path / "run"
    train(c, run, **SILENT)
    (run / "config.json").unlink()
    for left in ("checkpoints", "tensorboard"):
        shutil.rmtree(run / left)
    (run / "metrics.jsonl").unlink()
    before = (run / "data.json").read_bytes()
    add(text)
    train(c, run, **SILENT)
    assert (run / "data.json").read_bytes() != before


def test_a_run_and_its_data_can_be_moved(text, tmp_path, fed):
    """It goes on without any file of its old place, its tokenizer's among them."""
    file = tmp_path / "old" / "some.model"
    file.parent.mkdir()
    prepare(config(tmp_path), **SILENT).tokenizer.save(file)
    c, run = config(tmp_path, **{"data.tokenizer": str(file)}), tmp_path / "old" / "run"
    expected = [b.tolist() for b in first_batches(c, 6)]
    train(c, run, **SILENT)
    shutil.move(run, tmp_path / "new")
    shutil.move(tmp_path / "data", tmp_path / "there")
    shutil.rmtree(tmp_path / "old")
    shutil.rmtree(text)
    run = tmp_path / "new"
    for held in run.rglob("*"):
        if held.is_file() and held.suffix == ".json":
            assert str(tmp_path / "old") not in held.read_text()
    moved = read_config(run)
    assert moved.data.tokenizer == str(run / "tokenizer.model")
    fed.clear()
    longer = moved.replace("train", steps=6).replace("data", dir=str(tmp_path / "there"))
    train(longer, run, **SILENT)
    assert fed == expected[4:]
    same = c.replace("train", steps=6).replace("data", dir=str(tmp_path / "there"))
    train(same, run, **SILENT)  # the recipe's own words, which name the tokenizer's old place
    assert (
        run_data.open_data(same, run).tokenizer.fingerprint
        == Tokenizer.load(run / "tokenizer.model").fingerprint
    )


def test_the_text_of_a_moved_run_may_lie_elsewhere(text, tmp_path, fed):
    c, run = config(tmp_path), tmp_path / "run"
    train(c, run, **SILENT)
    shutil.move(text, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "data")
    source = {"path": str(tmp_path / "elsewhere"), "weight": 1.0, "text_field": "text"}
    longer = c.replace("train", steps=6).replace("data", sources={"text": source})
    noted = (run / "data.json").read_bytes()
    train(longer, run, **SILENT)
    assert (run / "data.json").read_bytes() == noted
    with pytest.raises(ConfigError, match=r"config.data.sources.text.text_field: 'text' there, 'b"):
        other = c.replace("data", sources={"text": source | {"text_field": "body"}})
        train(other.replace("train", steps=6), run, **SILENT)


def test_another_tokenizer_than_the_runs_is_an_error(text, tmp_path, fed):
    file = tmp_path / "some.model"
    prepare(config(tmp_path), **SILENT).tokenizer.save(file)
    c, run = config(tmp_path, **{"data.tokenizer": str(file)}), tmp_path / "run"
    train(c, run, **SILENT)
    Tokenizer.train(["other text about cats and dogs and birds"] * 9, 290).save(file)
    with pytest.raises(ConfigError, match=f"tokenizer: '{run}/tokenizer.model' there, '{file}' no"):
        train(c.replace("train", steps=6), run, **SILENT)
    (run / "tokenizer.model").write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match=r"is not the one that the run began with, \w+: put that"):
        train(read_config(run).replace("train", steps=6), run, **SILENT)


def test_a_lost_copy_of_the_tokenizer_is_that_of_the_data(text, tmp_path, fed):
    c, run = config(tmp_path), tmp_path / "run"
    train(c, run, **SILENT)
    before = (run / "tokenizer.model").read_bytes()
    (run / "tokenizer.model").unlink()
    train(c.replace("train", steps=6), run, **SILENT)
    assert (run / "tokenizer.model").read_bytes() == before
    assert open_dataset(c).tokenizer.files == {"tokenizer.model": before}
