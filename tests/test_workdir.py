"""A run's folder: made once, continued by the same configuration only, never overwritten."""

import errno
import json
import os
from pathlib import Path

import pytest

from moepp_jax.config import Config, SourceConfig, differences
from moepp_jax.configs import tiny
from moepp_jax.configs.base import source
from moepp_jax.data import Tokenizer
from moepp_jax.errors import ConfigError
from moepp_jax.workdir import (
    keep_tokenizer,
    open_workdir,
    read_config,
    require_same,
    tokenizer_file,
    write_atomic,
)


@pytest.fixture
def config() -> Config:
    return Config.parse(tiny.get_config())


def _with(config: Config, group: str, **fields) -> Config:
    return config.replace(group, **fields)


def test_a_new_folder_gets_the_configuration(tmp_path, config):
    folder = open_workdir(tmp_path / "runs" / "a", config)
    assert [entry.name for entry in folder.iterdir()] == ["config.json"]
    assert read_config(folder) == config


def test_an_empty_folder_is_new_whatever_a_killed_run_left_there(tmp_path, config):
    (tmp_path / ".config.json.0.tmp").write_text("{")
    assert read_config(open_workdir(tmp_path, config)) == config


def test_a_pipe_instead_of_its_configuration_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"config.json cannot be read .*it is a FIFO, no"):
        read_config(tmp_path)


def test_the_same_configuration_continues_the_run(tmp_path, config):
    open_workdir(tmp_path, config)
    (tmp_path / "metrics.jsonl").write_text("")
    assert open_workdir(str(tmp_path), config) == tmp_path


@pytest.mark.parametrize(
    "group, fields",
    [
        ("mesh", {"data": 2, "expert": 4}),
        ("generate", {"temperature": 1.0}),
        ("data", {"dir": "elsewhere"}),
        (
            "train",
            {"log_every": 1, "eval_every": 2, "eval_batches": 3, "save_every": 4, "keep": 5},
        ),
        ("train", {"local_dir": "/local", "local_every": 6}),
    ],
)
def test_fields_that_change_no_number_may_change(tmp_path, config, group, fields):
    open_workdir(tmp_path, config)
    open_workdir(tmp_path, _with(config, group, **fields))
    assert read_config(tmp_path) == config


def test_another_configuration_is_refused_and_nothing_is_overwritten(tmp_path, config):
    open_workdir(tmp_path, config)
    before = (tmp_path / "config.json").read_bytes()
    other = _with(_with(config, "moe.rule", tau=0.5), "train", steps=7, keep=9)
    with pytest.raises(ConfigError) as error:
        open_workdir(tmp_path, other)
    assert "config.moe.rule.tau: 0.75 there, 0.5 now" in str(error.value)
    assert f"config.train.steps: {config.train.steps} there, 7 now" in str(error.value)
    assert "keep" not in str(error.value)
    assert "another --workdir, or the old values" in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_more_steps_are_noted_and_nothing_else(tmp_path, config):
    open_workdir(tmp_path, config)
    longer = _with(config, "train", steps=config.train.steps + 1)
    open_workdir(tmp_path, _with(longer, "train", keep=9))
    assert read_config(tmp_path) == longer
    with pytest.raises(ConfigError, match=r"steps: 701 there, 700 now\nGive .* may only grow"):
        open_workdir(tmp_path, config)
    with pytest.raises(ConfigError, match=r"steps: 701 there, 702 now\nGive .* old values\.$"):
        require_same(tmp_path, _with(config, "train", steps=702))  # who asks what it computed
    assert read_config(tmp_path) == longer


@pytest.fixture
def start(tmp_path, config) -> Path:
    """What a conversion leaves: parameters alone."""
    folder = open_workdir(tmp_path / "start", config)
    (folder / "checkpoints" / "0" / "params").mkdir(parents=True)
    return folder


def test_before_training_all_but_what_parameters_mean_can_be_chosen(start, config):
    (start / "metrics.jsonl").write_text("")  # of a first try that ran out of memory
    other = _with(config, "optim", lr=1e-5, warmup_steps=1)
    other = _with(other, "train", batch_size=4, steps=3)
    other = _with(other, "data", seq_len=64, sources={"x": source("elsewhere")})
    other = _with(other, "model", dtype="bfloat16", loss_chunk=64)
    other = _with(_with(other, "moe", group_size=64, gamma=1.5), "moe.rule", tau=0.5)
    require_same(start, other)
    assert read_config(start) == config
    open_workdir(start, other)
    assert read_config(start) == other


def test_before_training_what_parameters_mean_stays(start, config):
    other = _with(_with(config, "model", rope_theta=5.0), "optim", lr=1e-5)
    other = _with(_with(other, "moe.rule", gate="raw"), "data", tokenizer="other.model")
    with pytest.raises(ConfigError) as error:
        open_workdir(start, other)
    assert [line.strip() for line in str(error.value).split("\n")][1:-1] == [
        "config.data.tokenizer: '' there, 'other.model' now",
        "config.model.rope_theta: 10000.0 there, 5.0 now",
        "config.moe.rule.gate: 'renormalise_nonzero' there, 'raw' now",
    ]
    assert read_config(start) == config


@pytest.mark.parametrize("left", ["checkpoints/0/rest", "checkpoints/5/rest", "metrics.jsonl"])
def test_what_was_trained_keeps_its_configuration(start, config, left):
    if left == "metrics.jsonl":
        (start / left).write_text('{"step": 1}\n')
    else:
        (start / left).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"config.optim.lr: 0.003 there, 1e-05 now"):
        open_workdir(start, _with(config, "optim", lr=1e-5))


def test_files_that_go_first_may_be_there_from_a_start_that_was_killed(tmp_path, config):
    (tmp_path / "parent.json").write_text("old")
    with pytest.raises(ConfigError, match="holds files but no config"):
        open_workdir(tmp_path, config)
    open_workdir(tmp_path, config, {"parent.json": "new"})
    assert (tmp_path / "parent.json").read_text() == "new" and read_config(tmp_path) == config
    open_workdir(tmp_path, config, {"parent.json": "newer"})
    assert (tmp_path / "parent.json").read_text() == "new"


def test_a_folder_of_something_else_is_refused(tmp_path, config):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=f"{tmp_path} holds files but no config.json"):
        open_workdir(tmp_path, config)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_refused(tmp_path, config):
    (tmp_path / "run").write_text("x")
    with pytest.raises(ConfigError, match="run is a file"):
        open_workdir(tmp_path / "run", config)
    with pytest.raises(ConfigError, match="cannot be written"):
        open_workdir(tmp_path / "run" / "inner", config)


@pytest.mark.parametrize("open_or_read", [open_workdir, lambda path, _: read_config(path)])
@pytest.mark.parametrize("content", [b"", b'{"seed": 0', b"\xff\xfe\x00"])
def test_a_corrupt_configuration_names_the_file(tmp_path, config, open_or_read, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=f"{tmp_path}/config.json cannot be read as JSON"):
        open_or_read(tmp_path, config)
    assert (tmp_path / "config.json").read_bytes() == content


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda fields: fields["moe"].pop("gamma"), "config.moe.gamma is missing"),
        (lambda fields: fields.update(colour=1), "unknown field config.colour"),
        (lambda fields: fields["data"].update(corpus="x"), "unknown field config.data.corpus"),
        (lambda fields: fields.update(moe=1), "config.moe = 1 must be a group"),
    ],
)
def test_a_configuration_of_another_version_names_file_and_field(tmp_path, config, change, message):
    fields = config.to_dict()
    change(fields)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=f"{tmp_path}/config.json: {message}"):
        open_workdir(tmp_path, config)


def test_a_number_that_changed_on_disk(tmp_path, config):
    open_workdir(tmp_path, config)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    fields["optim"]["lr"] *= 201
    file.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=rf"{file} has changed since it was written.*'checksum'"):
        open_workdir(tmp_path, config)
    del fields["checksum"]  # the change is meant
    file.write_text(json.dumps(fields))
    assert read_config(tmp_path).optim.lr == 201 * config.optim.lr
    with pytest.raises(ConfigError, match=r"config\.optim\.lr: "):
        open_workdir(tmp_path, config)


def test_a_run_of_the_first_version_is_read_and_told_of_in_one_line(tmp_path, config):
    """Its file is of that version: a field that comes without a line in `earlier` breaks this."""
    first = Path(__file__).parent / "data" / "first_version_config.json"
    (tmp_path / "config.json").write_bytes(first.read_bytes())
    lines = []
    read = read_config(tmp_path, lines.append)
    assert read.data.sources["text"] == SourceConfig("default", 1.0, "text")
    was = json.loads(first.read_text())
    changed = differences(read.to_dict(), config.to_dict()).keys()
    # What the recipe changed since was a field already: all that came later means nothing.
    assert changed == {name for name in changed if name.split(".")[-1] in was[name.split(".")[0]]}
    assert len(lines) == 1 and "moe.rule.bias_rate = 0.0" in lines[0] and "corpus" not in lines[0]
    assert (tmp_path / "config.json").read_bytes() == first.read_bytes()
    open_workdir(tmp_path, read)  # and it goes on


def test_a_run_of_this_version_is_told_nothing(tmp_path, config):
    lines = []
    read_config(open_workdir(tmp_path, config), lines.append)
    assert not lines


def test_reading_where_no_run_is_says_what_makes_one(tmp_path):
    with pytest.raises(
        ConfigError, match=f"{tmp_path} holds no run, as it has no config.json: .*train"
    ):
        read_config(tmp_path)
    with pytest.raises(ConfigError, match=f"{tmp_path}/no is no folder: .*train"):
        read_config(tmp_path / "no")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="file is a file: give --workdir the folder of a run"):
        read_config(tmp_path / "file")


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    file = tmp_path / "a"
    write_atomic(file, "old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match=f"No space left on device: '{file}'"):
        write_atomic(file, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert file.read_text() == "old"


def test_a_run_keeps_its_tokenizer_and_takes_no_other(tmp_path):
    text = ["one text about cats and dogs and birds", "another one about ships and the sea"]
    kept = Tokenizer.train(text, 300)
    keep_tokenizer(tmp_path, kept)
    keep_tokenizer(tmp_path, kept)
    assert Tokenizer.load(tokenizer_file(tmp_path)).fingerprint == kept.fingerprint
    with pytest.raises(ConfigError, match=r"tokenizer.model is not the tokenizer"):
        keep_tokenizer(tmp_path, Tokenizer.train(text, 290))
    assert Tokenizer.load(tokenizer_file(tmp_path)).fingerprint == kept.fingerprint


def test_a_published_model_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mixtral", "architectures": []}')
    with pytest.raises(ConfigError, match=f"{tmp_path} is a model in Hugging Face's layout, not a"):
        read_config(tmp_path)
