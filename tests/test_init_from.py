"""Runs that start from another run, or go on for longer than they were to: numbers and refusals."""

import functools
import hashlib
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from moepp_jax import evaluate as evaluate_lib
from moepp_jax import interop, optim, storage
from moepp_jax import mesh as mesh_lib
from moepp_jax import parent as parents
from moepp_jax import state as state_lib
from moepp_jax.checkpoint import CheckpointError, Checkpoints
from moepp_jax.data import Tokenizer, open_dataset, prepare
from moepp_jax.errors import ConfigError
from moepp_jax.evaluate import evaluate_run
from moepp_jax.metrics import read_metrics
from moepp_jax.parent import Parent, given
from moepp_jax.train import train
from moepp_jax.workdir import keep_tokenizer, open_workdir, read_config
from tests import tiny

SILENT = {"report": lambda line: None}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def config(data, **changes):
    few = {"train.steps": 2, "train.save_every": 2, "moe.rule.bias_rate": 0.1}
    return tiny.config(**{"data.dir": str(data)}, **(few | changes))


def randomised(state, seed):
    """The state as it may be after four steps: parameters, moments and biases like no others."""
    rng = np.random.default_rng(seed)

    def some(leaf):
        if leaf.ndim == 0:  # steps, counted here and there
            return jax.device_put(np.int32(4), leaf.sharding)
        values = rng.uniform(0.1, 0.2, leaf.shape).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    return jax.tree.map(some, state)


@pytest.fixture(scope="module")
def family(data, tmp_path_factory):
    """A folder with the run `old`, saved on two devices at the steps 2, its best one, and 4."""
    folder, c = tmp_path_factory.mktemp("family"), config(data, **{"mesh.expert": 2})
    dataset = prepare(c, **SILENT)
    keep_tokenizer(open_workdir(folder / "old", c), dataset.tokenizer)
    fresh = state_lib.init_state(state_lib.assemble(c, mesh_lib.make_mesh(c, jax.devices()[:2])))
    with Checkpoints(folder / "old", keep=2) as checkpoints:
        for step, loss in ((2, 3.0), (4, 3.5)):
            checkpoints.save(step, randomised(fresh, step), {"eval_loss": loss})
        checkpoints.wait()
    return folder


@pytest.fixture
def old(family):
    return family / "old"


def saved(folder, step, c):
    """The state in a checkpoint, on one device."""
    mesh = mesh_lib.make_mesh(tiny.config(), devices=jax.devices()[:1])
    with Checkpoints(folder, keep=2) as checkpoints:
        return checkpoints.restore(step, state_lib.assemble(c, mesh).abstract)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((a, b)))


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class KilledError(Exception):
    pass


@pytest.fixture
def still(monkeypatch):
    """A step that changes nothing and compiles at once; `still.at_step` is called in each."""
    hooks = SimpleNamespace(at_step=lambda step: None)

    def make_train_step(parts):
        def step(state, batch):
            before = int(state.step)
            hooks.at_step(before)
            with jax.transfer_guard("allow"):
                after = jax.device_put(np.int32(before + 1), state.step.sharding)
            names = ("loss", "grad_norm", "lr", "ffn_experts_per_token", "drop_rate")
            load = np.full((2, parts.model.rule.pool.size), 0.2)
            return state.replace(step=after), dict.fromkeys(names, 1.0) | {
                "load": load,
                "guard": jax.device_get(state.guard),
            }

        return step

    monkeypatch.setattr(state_lib, "make_train_step", make_train_step)
    without_evaluation(monkeypatch)
    return hooks


def without_evaluation(monkeypatch):
    names = ("eval_loss", "eval_perplexity", "eval_ffn_experts_per_token", "eval_tokens")
    made = lambda parts: lambda params, batches, **_: dict.fromkeys(names, 1.0)  # noqa: E731
    monkeypatch.setattr(evaluate_lib, "make_evaluate", made)


def on_devices(monkeypatch, count):
    some = functools.partial(mesh_lib.make_mesh, devices=jax.devices()[:count])
    monkeypatch.setattr(mesh_lib, "make_mesh", some)


def start(c, folder, *where, init_optimizer=False):
    """Trains from this parent, which is given as on the command line; what was reported."""
    lines = []
    parent = given("@".join(map(str, where)), init_optimizer) if where else None
    state = train(c, folder, lines.append, parent=parent)
    return state, lines


# What a parent is called


@pytest.mark.parametrize(
    ("written", "workdir", "step"),
    [
        ("runs/a", "runs/a", None),
        ("runs/a@700", "runs/a", 700),
        ("runs/me@home/a", "runs/me@home/a", None),
        ("gs://bucket/me@home/a@0", "gs://bucket/me@home/a", 0),
        ("runs/a@1@20", "runs/a@1", 20),
        ("runs/a@1/", "runs/a@1/", None),
        ("runs/a@best", "runs/a@best", None),
    ],
)
def test_a_parent_is_a_folder_and_a_step(written, workdir, step):
    assert given(written) == Parent(workdir, step)
    assert str(given(written)) == written


def test_no_parent_has_no_optimizer():
    assert given(None) is None
    with pytest.raises(ConfigError, match=r"--init_optimizer takes along .* give --init_from="):
        given(None, init_optimizer=True)


# What comes along


def test_parameters_and_the_rules_state_come_along_to_another_mesh(old, data, tmp_path, still):
    c = config(data, **{"mesh.fsdp": 2, "mesh.expert": 4})
    state, lines = start(c, tmp_path / "new", old, 4)
    parent = saved(old, 4, c)
    same(state.params, parent.params)
    assert np.asarray(state.params["layers"]["moe"]["router"]["bias"]).min() >= 0.1
    assert "mesh data 1 x fsdp 2 x expert 4" in lines[-1] and "step 0 of 2" in lines[-1]
    assert f"starting from {old}@4, with a new optimizer" in lines
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state))
    assert [row["step"] for row in read_metrics(tmp_path / "new") if "loss" in row] == [1, 2]


def test_the_optimizer_comes_along_and_its_learning_rate_starts_anew(old, data, tmp_path, still):
    c = config(data, **{"mesh.fsdp": 4, "mesh.expert": 2})
    state, lines = start(c, tmp_path, old, 4, init_optimizer=True)
    parent = saved(old, 4, c)
    same(state.params, parent.params)
    kinds = (optax.ScaleByAdamState, optax.ScaleByScheduleState)
    is_one = lambda part: isinstance(part, kinds)  # noqa: E731
    adam, schedule = (p for p in jax.tree.leaves(state.opt_state, is_leaf=is_one) if is_one(p))
    before, _ = (p for p in jax.tree.leaves(parent.opt_state, is_leaf=is_one) if is_one(p))
    same((adam.mu, adam.nu), (before.mu, before.nu))
    # AdamW divides its means by what so many gradients make of them.
    assert [int(count) for count in (adam.count, before.count, schedule.count)] == [4, 4, 0]
    assert state.step == 2  # of its own
    assert f"starting from {old}@4, with its optimizer" in lines


def test_the_best_checkpoint_is_the_one_if_none_is_named(old, data, tmp_path, still):
    state, lines = start(config(data), tmp_path, old)
    same(state.params, saved(old, 2, config(data)).params)
    assert f"starting from {old}@2, with a new optimizer" in lines


def test_the_new_run_knows_its_parent_and_has_its_tokenizer(old, data, tmp_path, still):
    folder = tmp_path / "new"
    start(config(data), folder, old)
    told = json.loads((folder / "parent.json").read_text())
    sums = (old / "checkpoints" / "2" / "checksums.json").read_bytes()
    assert told.pop("checksum") == hashlib.sha256(sums).hexdigest()
    assert told == {"workdir": str(old), "step": 2, "optimizer": False}
    copy = folder / "tokenizer.model"
    assert copy.read_bytes() == (old / "tokenizer.model").read_bytes()
    assert read_config(folder) == config(data, **{"data.tokenizer": str(copy)})


def test_other_text_is_read_with_the_parents_tokenizer(old, tmp_path, still):
    shutil.copytree(tiny.TEXT, tmp_path / "text")
    (tmp_path / "text" / "more.txt").write_text("Of which no run has read yet.")
    where = {"data.sources.text.path": str(tmp_path / "text")}
    start(config(tmp_path / "prepared", **where), tmp_path / "new", old)
    assert not list((tmp_path / "prepared").glob("tokenizer-*"))
    dataset = open_dataset(read_config(tmp_path / "new"))
    assert dataset.tokenizer.fingerprint == Tokenizer.load(old / "tokenizer.model").fingerprint


def test_fields_that_only_train_may_differ(old, data, tmp_path, still):
    rule = {"tau": 0.3, "balance_weight": 0.5, "z_weight": 0.1, "bias_rate": 0.01}
    changes = {f"moe.rule.{name}": value for name, value in rule.items()}
    changes |= {"moe.gamma": 2.0, "moe.group_size": 32, "moe.dispatch": "dropless"}
    changes |= {"model.dtype": "bfloat16", "model.remat": "full", "model.init_std": 0.5}
    c = config(data, **changes, **{"data.seq_len": 64, "optim.lr": 1.0, "train.batch_size": 16})
    state, _ = start(c, tmp_path, old, 4)
    same(state.params, saved(old, 4, config(data)).params)


@pytest.fixture(scope="module")
def converted(family):
    interop.to_hf(family / "old", family / "exported", step=4, dtype="float32", **SILENT)
    c = read_config(family / "old").replace("data", tokenizer="")
    interop.from_hf(family / "exported", family / "converted", c, dtype="float32", **SILENT)
    return family / "converted"


def test_a_converted_model_can_be_a_parent_but_has_no_optimizer(
    converted, old, data, tmp_path, still
):
    c = config(data)
    with pytest.raises(ConfigError, match=r"@0 has no optimizer state, .* out --init_optimizer"):
        start(c, tmp_path / "new", converted, init_optimizer=True)
    assert not (tmp_path / "new").exists()
    state, lines = start(c, tmp_path / "new", converted)
    same(state.params, saved(old, 4, c).params)
    assert f"starting from {converted}@0, with a new optimizer" in lines


# What is refused


def refused(c, folder, said, *where, error=ConfigError, init_optimizer=False):
    before = files(folder)
    there = folder.exists()
    with pytest.raises(error, match=said) as caught:
        start(c, folder, *where, init_optimizer=init_optimizer)
    assert files(folder) == before and folder.exists() == there
    return str(caught.value)


# Changes, and the lines that name them.
MEANING = [
    ({"moe.rule.top_k": 1}, ["config.moe.rule.top_k: 2 there, 1 here"]),
    (
        {"moe.rule.gate": "raw", "moe.rule.tau": 0.5, "moe.gamma": 3.0},
        ["config.moe.rule.gate: 'renormalise_nonzero' there, 'raw' here"],
    ),
    ({"moe.input_scale": 2.0}, ["config.moe.input_scale: 1.0 there, 2.0 here"]),
    (
        {"moe.rule.logit_norm": 1.0, "model.rope_theta": 500.0},
        [
            "config.model.rope_theta: 10000.0 there, 500.0 here",
            "config.moe.rule.logit_norm: 0.0 there, 1.0 here",
        ],
    ),
    (
        {"moe.rule.residual": "none"},
        [
            "config.moe.rule.residual: 'logits' there, 'none' here",
            r"layers/moe/router/w_residual: \(2, 12, 12\) there, absent here",
        ],
    ),
    (
        {"moe.rule.bias_rate": 0.0},
        [
            "config.moe.rule.bias_rate: 0.1 there, 0.0 here",
            r"layers/moe/router/bias: \(2, 12\) there, absent here",
        ],
    ),
    (
        {"model.hidden_size": 64},
        [
            "config.model.hidden_size: 32 there, 64 here",
            r"embedding: \(384, 32\) there, \(384, 64\) here",
            *[".*"] * 4,
            r"and \d+ more shapes",
        ],
    ),
    (
        {"moe.n_copy": 2, "moe.n_zero": 0},
        ["config.moe.n_copy: 1 there, 2 here", "config.moe.n_zero: 1 there, 0 here"],
    ),
]


@pytest.mark.parametrize(("changes", "lines"), MEANING)
def test_parameters_must_mean_the_same(old, data, tmp_path, changes, lines):
    said = rf"--init_from={old}@4 is of another model, .*:\n  " + r"\n  ".join(lines)
    said += rf"\nGive its values; --config=run:{old} has them all.$"
    refused(config(data, **changes), tmp_path / "new", said, old, 4)


def test_another_rule_is_named_by_its_type(old, data, tmp_path):
    tree = config(data).to_dict()
    tree["moe"] |= {"n_copy": 0, "n_const": 0, "n_zero": 0, "rule": {"type": "vanilla"}}
    said = refused(type(config(data)).parse(tree), tmp_path / "new", "rule.type: 'moepp' th", old)
    assert "config.moe.n_zero: 1 there, 0 here" in said and "rule.gate" not in said


def test_a_parent_that_is_not_there(old, data, tmp_path):
    c, new = config(data), tmp_path / "new"
    steps = "steps that may be used instead: 2, 4"
    refused(c, new, f"checkpoint 3 in .* is not there; {steps}", old, 3, error=CheckpointError)
    refused(c, new, "--init_from=no@3: workdir no is no folder", "no", 3)
    open_workdir(tmp_path / "empty", c)
    shutil.copyfile(old / "tokenizer.model", tmp_path / "empty" / "tokenizer.model")
    refused(c, new, "there is no checkpoint in", tmp_path / "empty", error=CheckpointError)


def test_a_damaged_parent_leaves_no_run(old, data, tmp_path):
    shutil.copytree(old, tmp_path / "old")
    for file in (tmp_path / "old" / "checkpoints" / "4" / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 10_000:
            file.write_bytes(file.read_bytes()[:-1] + b"x")
    said = "checkpoint 4 in .* is damaged: .*; steps that may be used instead: 2"
    refused(config(data), tmp_path / "new", said, tmp_path / "old", 4, error=CheckpointError)


def test_tokenizers_must_be_the_same(old, data, tmp_path):
    mine = tmp_path / "mine.model"
    Tokenizer.train([(tiny.TEXT / "bees.txt").read_text()], 384).save(mine)
    c = config(data, **{"data.tokenizer": str(mine)})
    said = f"data.tokenizer = '{mine}' is not the tokenizer of --init_from={old}: leave the field"
    refused(c, tmp_path / "new", said, old)
    shutil.copytree(old, tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.model").unlink()
    said = "--init_from=.*mute: .*tokenizer.model is missing: put its tokenizer there"
    refused(config(data), tmp_path / "new", said, tmp_path / "mute")


def test_the_parents_tokenizer_may_be_named(old, data, tmp_path, still):
    same_one = tmp_path / "same.model"
    shutil.copyfile(old / "tokenizer.model", same_one)
    start(config(data, **{"data.tokenizer": str(same_one)}), tmp_path / "a", old)
    assert read_config(tmp_path / "a").data.tokenizer == str(tmp_path / "a" / "tokenizer.model")
    # As configs/run.py:old may have it: the new run does without the parent.
    start(config(data, **{"data.tokenizer": f"{old}/tokenizer.model"}), tmp_path / "b", old)
    assert read_config(tmp_path / "b").data.tokenizer == str(tmp_path / "b" / "tokenizer.model")


def test_no_run_is_its_own_parent_or_gets_one_later(old, data, tmp_path):
    c = config(data, **{"mesh.expert": 2})
    refused(c, old, "is the --workdir of the run itself: give a new --workdir, or", old)
    refused(c, old, "is the --workdir of the run itself", f"{old}/../old", 4)
    shutil.copytree(old, tmp_path / "copy")
    said = f"holds a run that was not started from another one, so --init_from={old}@4 cannot be"
    refused(c, tmp_path / "copy", said, old, 4)


# How it goes on


@pytest.fixture
def killed(old, data, tmp_path, still):
    """A run that was killed after its first checkpoint, and its parent, which can be moved."""
    shutil.copytree(old, tmp_path / "old")
    killed_at(still, 3)
    c = config(data, **{"train.steps": 4})
    with pytest.raises(KilledError):
        start(c, tmp_path / "new", tmp_path / "old", 4)
    still.at_step = lambda step: None
    return c, tmp_path / "new", tmp_path / "old"


def killed_at(still, at):
    def at_step(step):
        if step == at:
            raise KilledError

    still.at_step = at_step


def test_the_same_command_goes_on_without_the_parent(killed, old):
    c, new, parent = killed
    shutil.move(parent, parent.with_name("gone"))
    state, lines = start(c, new, parent, 4)
    assert state.step == 4 and "step 2 of 4" in lines[-1]
    same(state.params, saved(old, 4, c).params)
    assert [row["step"] for row in read_metrics(new) if "loss" in row] == [1, 2, 3, 4]
    _, lines = start(c, new, parent)  # whichever step it was
    assert "step 4 of 4" in lines[-1]
    _, lines = start(read_config(new), new)  # nor does it need the flag
    assert "step 4 of 4" in lines[-1]


def test_another_parent_is_refused(killed, converted):
    c, new, parent = killed
    was = f"holds a run that was started with --init_from={parent}@4, not with"
    refused(c, new, f"{was} --init_from={converted}: give the same", converted)
    refused(c, new, f"{was} --init_from={parent}@2: give", parent, 2)
    refused(c, new, f"{was} --init_from={parent} --init_opt", parent, init_optimizer=True)
    (new / "parent.json").write_text("{")
    refused(c, new, "parent.json cannot be read as the parent of a run", parent, 4)


def test_before_its_first_checkpoint_a_run_starts_from_the_parent_again(old, data, tmp_path, still):
    shutil.copytree(old, tmp_path / "old")
    c, new = config(data), tmp_path / "new"
    killed_at(still, 1)
    with pytest.raises(KilledError):
        start(c, new, tmp_path / "old", 2)
    still.at_step = lambda step: None

    shutil.move(tmp_path / "old", tmp_path / "gone")
    given_none = read_config(new)
    refused(given_none, new, "--init_from=.*old@2: workdir .*old is no folder")
    shutil.copytree(new, tmp_path / "moved")  # where the parent is now may be said
    state, _ = start(read_config(tmp_path / "moved"), tmp_path / "moved", tmp_path / "gone", 2)
    same(state.params, saved(old, 2, c).params)
    shutil.copytree(old, tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "checkpoints" / "2")
    shutil.copytree(*(tmp_path / "old" / "checkpoints" / step for step in ("4", "2")))
    refused(given_none, new, "old@2 is not the checkpoint any more that .*new was started from")
    shutil.rmtree(tmp_path / "old")
    shutil.move(tmp_path / "gone", tmp_path / "old")
    state, _ = start(given_none, new)
    same(state.params, saved(old, 2, c).params)


def test_a_start_that_was_killed_leaves_what_the_same_command_begins_with(
    old, data, tmp_path, still, monkeypatch
):
    c, new, write = config(data), tmp_path / "new", storage.write_atomic

    def killed(file, content):
        if file.name == "config.json" and file.parent == new:
            raise KilledError
        write(file, content)

    with monkeypatch.context() as patch:
        patch.setattr("moepp_jax.workdir.write_atomic", killed)
        with pytest.raises(KilledError):
            start(c, new, old, 4)
    assert {entry.name for entry in new.iterdir()} == {
        "parent.json",
        "tokenizer.model",
        "data.json",
    }
    refused(c, new, "holds files but no config.json")  # not a run without a parent
    state, _ = start(c, new, old, 4)
    same(state.params, saved(old, 4, c).params)


# More steps than it was to have


LR = {"optim.lr": 1e-2, "optim.initial_lr": 0.0, "optim.warmup_steps": 2}


def test_a_run_that_has_ended_goes_on_when_it_gets_more_steps(data, tmp_path, still):
    c = config(data, **LR, **{"train.steps": 6, "train.log_every": 4})
    start(c, tmp_path)
    longer = c.replace("train", steps=11)
    state, lines = start(longer, tmp_path)
    assert state.step == 11 and "step 6 of 11" in lines[-1]
    # By hand: 1 + cos(pi (6 - 2) / (11 - 2)), of 2, between 1e-2 and 1e-3.
    now = 1e-3 + 9e-3 * (1 + np.cos(np.pi * 4 / 9)) / 2
    assert (
        "config.train.steps grows from 6 to 11: at step 6 the learning rate jumps from 0.001 to "
        f"{now:.3g}, as the cosine now ends at 11"
    ) in lines
    assert read_config(tmp_path) == longer
    assert [row["step"] for row in read_metrics(tmp_path) if "loss" in row] == [4, 6, 8, 11]
    assert [row["step"] for row in read_metrics(tmp_path) if "eval_loss" in row] == [6, 11]
    start(longer.replace("mesh", expert=2), tmp_path)
    assert read_config(tmp_path) == longer


def test_a_run_stopped_midway_can_be_longer_but_none_shorter(data, tmp_path, still):
    c = config(data, **LR, **{"train.steps": 6, "optim.schedule": "constant"})
    killed_at(still, 5)
    with pytest.raises(KilledError):
        start(c, tmp_path)
    longer = c.replace("train", steps=8)
    with pytest.raises(KilledError):
        start(longer, tmp_path)
    still.at_step = lambda step: None
    for fewer in (c, c.replace("train", steps=3)):
        said = f"train.steps: 8 there, {fewer.train.steps} now\nGive .* config.train.steps may only"
        refused(fewer, tmp_path, said)
    _, lines = start(longer, tmp_path)
    assert not any("grows" in line for line in lines)  # it had them already
    assert [row["step"] for row in read_metrics(tmp_path) if "loss" in row] == [*range(1, 9)]


def test_no_other_field_changes_with_the_steps(data, tmp_path, still):
    c = config(data)
    start(c, tmp_path)
    more = c.replace("train", steps=4, batch_size=16)
    said = "another configuration:\n  config.train.batch_size: 8 there, 16 now\n"
    refused(more, tmp_path, said)
    assert read_config(tmp_path) == c


@pytest.mark.parametrize(
    ("changes", "step", "said"),
    [
        ({}, 10, "jumps from 0.001 to 0.00628, as the cosine now ends at 20"),
        ({}, 1, "is 0.005 as before; the cosine now ends at 20"),
        (
            {"optim.schedule": "linear"},
            6,
            "jumps from 0.0055 to 0.008, as the linear decay now ends at 20",
        ),
        ({"optim.schedule": "constant"}, 10, "stays at 0.01 until step 20"),
        (
            {"optim.schedule": "constant", "optim.decay_steps": 4},
            6,
            "stays at 0.01 until step 16, then falls until 20",
        ),
        (
            {"optim.schedule": "constant", "optim.decay_steps": 4},
            8,
            "jumps from 0.0055 to 0.01, as it is constant until step 16, then falls until 20",
        ),
        (
            {"optim.schedule": "constant"},
            1,
            "is 0.005 as before; it is constant until step 20",
        ),
    ],
)
def test_what_becomes_of_the_learning_rate(changes, step, said):
    c = tiny.config(**LR, **{"train.steps": 10}, **changes)
    told = optim.change(c, c.replace("train", steps=20), step)
    start_of_it = f"config.train.steps grows from 10 to 20: at step {step} the learning rate "
    assert told == start_of_it + said


# One long run, and branches of it that decay


def test_a_branch_of_a_constant_run_is_the_run_that_decays(data, tmp_path, monkeypatch):
    """Six steps of which three decay, against three of a constant run and a branch of three."""
    without_evaluation(monkeypatch)
    on_devices(monkeypatch, 1)
    wsd = LR | {"optim.schedule": "constant", "train.save_every": 3, "moe.rule.bias_rate": 0.1}
    whole = config(data, **wsd, **{"train.steps": 6, "optim.decay_steps": 3})
    long = config(data, **wsd, **{"train.steps": 3})
    branch = config(
        data,
        **(wsd | {"optim.warmup_steps": 0}),
        **{"train.steps": 3, "optim.decay_steps": 3, "train.first_batch": 3},
    )
    uninterrupted, _ = start(whole, tmp_path / "whole")
    start(long, tmp_path / "long")
    branched, _ = start(branch, tmp_path / "branch", tmp_path / "long", 3, init_optimizer=True)

    a, b = jax.device_get((uninterrupted.params, branched.params))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)
    began = saved(tmp_path / "long", 3, long).params
    assert not np.allclose(began["embedding"], a["embedding"], atol=1e-3)
    rows = {
        name: [row for row in read_metrics(tmp_path / name) if "loss" in row]
        for name in ("whole", "long", "branch")
    }
    for name in ("loss", "grad_norm", "lr"):
        values = {run: [row[name] for row in found] for run, found in rows.items()}
        np.testing.assert_allclose(values["whole"], values["long"] + values["branch"], rtol=1e-5)
    # By hand: 0, half and all of the warm-up, then from 1e-2 to 1e-3 in three steps.
    rates = [0, 5e-3, 1e-2, 1e-2, 7e-3, 4e-3]
    np.testing.assert_allclose([row["lr"] for row in rows["whole"]], rates, rtol=1e-5)
    # What it has trained on is its own three batches.
    assert [row["tokens/text"] for row in rows["branch"]] == [256, 512, 768]


def test_the_first_batch_can_be_any(data):
    c = config(data)
    dataset = prepare(c, **SILENT)
    later = open_dataset(c.replace("train", first_batch=5))
    for name, values in dataset.train_batch(7).items():
        np.testing.assert_array_equal(later.train_batch(2)[name], values)
        np.testing.assert_array_equal(next(later.train_batches(2))[name], values)
    assert later.taken(4) == dataset.taken(4)


def test_a_heir_is_evaluated_like_any_run(old, data, tmp_path, still, monkeypatch):
    start(config(data), tmp_path, old, 4)
    on_devices(monkeypatch, 1)
    assert evaluate_run(read_config(tmp_path), tmp_path)["step"] == 2
    assert parents.of_run(tmp_path, None).step == 4
