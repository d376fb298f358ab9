"""The released layout: what goes in and comes back, and files of torch."""

import collections
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moepp_jax
from moepp_jax import interop, train
from moepp_jax.checkpoint import Checkpoints
from moepp_jax.config import Config
from moepp_jax.configs import base
from moepp_jax.errors import ConfigError
from moepp_jax.interop import ConversionError, streams
from moepp_jax.workdir import read_config
from tests import reference, tiny
from tests.released import NORM, SILENT, checkpoint, fields_in, refused, same_bytes, tensors_in


@pytest.fixture(scope="module", params=reference.NAMES)
def converted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interop") / "run"
    interop.from_hf(reference.ROOT / request.param, folder, dtype="float32", **SILENT)
    return request.param, folder


def test_the_configuration_is_theirs(converted):
    name, folder = converted
    found, want = read_config(folder), reference.config(name)
    length = fields_in(reference.ROOT / name)["max_position_embeddings"]
    assert found.data.seq_len == found.moe.group_size == length
    assert found.moe == want.replace("moe", group_size=24).moe.__class__(
        **(vars(want.moe) | {"group_size": length})
    )
    ours = vars(want.model) | {"init_std": found.model.init_std, "loss_chunk": 64}
    assert vars(found.model) == ours


# There and back


def test_what_comes_back_is_what_went_in(converted, tmp_path):
    name, folder = converted
    interop.to_hf(folder, tmp_path / "back", **SILENT)
    assert same_bytes(tensors_in(reference.ROOT / name), tensors_in(tmp_path / "back"))
    assert fields_in(tmp_path / "back") == fields_in(reference.ROOT / name)


def test_every_tensor_keeps_its_type(tmp_path):
    tensors = tensors_in(reference.ROOT / "mixtral_gating")
    for i, name in enumerate(sorted(tensors)):
        tensors[name] = tensors[name].astype(("float32", jnp.bfloat16, "float16")[i % 3])
    source = checkpoint(tmp_path / "source", tensors)
    interop.from_hf(source, tmp_path / "run", **SILENT)
    interop.to_hf(tmp_path / "run", tmp_path / "back", shard_bytes=300_000, **SILENT)
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 3
    assert same_bytes(tensors, tensors_in(tmp_path / "back"))
    # Ours reads what ours wrote, index and all.
    interop.from_hf(tmp_path / "back", tmp_path / "again", **SILENT)
    interop.to_hf(tmp_path / "again", tmp_path / "once_more", dtype="bfloat16", **SILENT)
    once_more = tensors_in(tmp_path / "once_more")
    assert {a.dtype for a in once_more.values()} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(once_more[NORM], tensors[NORM].astype(jnp.bfloat16))
    assert fields_in(tmp_path / "once_more")["torch_dtype"] == "bfloat16"


def test_a_value_that_its_type_cannot_hold(tmp_path):
    large = np.full(64, 1e6, np.float32)
    interop.from_hf(checkpoint(tmp_path / "source", {NORM: large}), tmp_path / "run", **SILENT)
    with pytest.raises(ConversionError, match=f"{NORM} has values that float16 cannot hold"):
        interop.to_hf(tmp_path / "run", tmp_path / "back", dtype="float16", **SILENT)
    assert {p.name for p in tmp_path.iterdir()} == {"source", "run"}


def test_tied_embeddings_may_come_written_out(tmp_path):
    tensors = tensors_in(reference.ROOT / "mixtral_gating")
    tied = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    source = checkpoint(tmp_path / "source", tied, tie_word_embeddings=True)
    assert interop.from_hf(source, tmp_path / "run", **SILENT).model.tied_embeddings
    interop.to_hf(tmp_path / "run", tmp_path / "back", **SILENT)
    assert same_bytes(tensors | tied, tensors_in(tmp_path / "back"))
    other = checkpoint(tmp_path / "other", tie_word_embeddings=True)
    with pytest.raises(ConversionError, match=r"lm_head.weight is not model.embed_tokens"):
        interop.from_hf(other, tmp_path / "run2", **SILENT)


def test_a_tied_embedding_may_come_as_the_output_matrix_alone(tmp_path):
    tensors = tensors_in(reference.ROOT / "mixtral_gating")
    head = tensors.pop("model.embed_tokens.weight")
    moved = {"lm_head.weight": head, "model.embed_tokens.weight": None}
    source = checkpoint(tmp_path / "source", moved, tie_word_embeddings=True)
    interop.from_hf(source, tmp_path / "run", **SILENT)
    np.testing.assert_array_equal(moepp_jax.load(tmp_path / "run").params["embedding"], head)
    interop.to_hf(tmp_path / "run", tmp_path / "back", **SILENT)
    assert same_bytes(tensors | {"lm_head.weight": head}, tensors_in(tmp_path / "back"))
    untied = checkpoint(tmp_path / "untied", moved, tie_word_embeddings=False)
    refused(untied, tmp_path, "untied lacks tensor model.embed_tokens.weight")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"moe.n_copy": 0}, "2 constant, 1 copy and 1 zero expert, not 2, 0 and 1"),
        (
            {"moe.n_const": 0, "moe.n_copy": 0, "moe.n_zero": 0, "moe.rule.residual": "none"},
            "2 constant, 1 copy and 1 zero expert, not 0, 0 and 0",
        ),
        ({"moe.rule.top_k": 3}, "moe.rule.top_k is always 2, not 3"),
        ({"moe.rule.gate": "raw"}, "moe.rule.gate is always"),
        ({"moe.rule.residual": "none"}, "moe.rule.residual is always"),
        (
            {"model.num_layers": 4, "model.moe_every": 2, "model.tied_embeddings": True},
            "model.moe_every is always 1, not 2",
        ),
    ],
)
def test_our_own_models_go_and_come_back(tmp_path, changes, why):
    config = tiny.config(**changes, **{"data.dir": str(tmp_path / "data")})
    run = tiny.run_folder(tmp_path / "run", config)
    said = []
    interop.to_hf(run, tmp_path / "out", report=said.append)
    assert fields_in(tmp_path / "out")["model_type"] == ("MoE++" if why is None else "moepp_jax")
    assert len(said) == (1 if why is None else 2) and (why or "") in said[0]
    again = interop.from_hf(tmp_path / "out", tmp_path / "again", config, **SILENT)
    assert (again.model, again.moe) == (config.model, config.moe)
    a, b = moepp_jax.load(run), moepp_jax.load(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert b.tokenizer.fingerprint == a.tokenizer.fingerprint


def test_training_goes_on_from_a_converted_model(tmp_path):
    changes = {"data.dir": str(tmp_path / "data"), "train.steps": 2, "mesh.fsdp": 2}
    config = tiny.config(**changes)
    run = tiny.run_folder(tmp_path / "run", config)
    interop.to_hf(run, tmp_path / "out", **SILENT)
    config = interop.from_hf(tmp_path / "out", tmp_path / "new", config, **SILENT)
    began = moepp_jax.load(tmp_path / "new").params
    state = train.train(config, tmp_path / "new", report=lambda line: None)
    assert state.step == 2
    both = jax.device_get((began, state.params))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *both)
    assert 0 < max(jax.tree.leaves(moved)) < 0.01  # two steps from there, not from elsewhere
    # The checkpoint that it wrote is one like any other.
    assert train.train(config, tmp_path / "new", report=lambda line: None).step == 2


def test_what_trains_a_converted_model_can_be_chosen_until_it_was_trained(tmp_path):
    config = tiny.config(**{"data.dir": str(tmp_path / "data")})
    interop.to_hf(tiny.run_folder(tmp_path / "run", config), tmp_path / "out", **SILENT)
    new = tmp_path / "new"
    there = interop.from_hf(tmp_path / "out", new, config, **SILENT)
    batch = there.replace("train", batch_size=16, steps=2)
    chosen = batch.replace("moe", group_size=8).replace("data", seq_len=8).replace("optim", lr=1e-4)
    with pytest.raises(ConfigError, match="batch_size = 80000 takes"):
        train.train(there.replace("train", batch_size=80_000), new, report=lambda line: None)
    assert read_config(new) == there  # what could not begin has changed nothing
    assert train.train(chosen, new, report=lambda line: None).step == 2
    assert read_config(new) == chosen
    with pytest.raises(ConfigError, match=r"config.optim.lr: 0.0001 there, 0.002 now"):
        train.train(chosen.replace("optim", lr=2e-3), new, report=lambda line: None)


def test_batches_of_long_sequences_have_as_many_tokens(tmp_path):
    source = checkpoint(tmp_path / "source", max_position_embeddings=32_768)
    c = interop.from_hf(source, tmp_path / "run", **SILENT)
    assert (c.data.seq_len, c.train.batch_size, c.moe.group_size) == (32_768, 128, 32_768)


def test_the_commands(tmp_path):
    def said(*arguments, status=0):
        command = [sys.executable, "-m", "moepp_jax.main", "convert", *map(str, arguments)]
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    source, run, out = reference.ROOT / "default", tmp_path / "run", tmp_path / "out"
    recipe = "--config=configs/tiny.py"
    assert "90 tensors are now step 0" in said(
        "from-hf", source, run, recipe, "--config.moe.rule.tau=0.25", "--dtype=bfloat16"
    )
    config = read_config(run)
    assert (config.moe.rule.tau, config.model.dtype, config.data.seq_len) == (0.25, "bfloat16", 256)
    assert "90 tensors are now in" in said("to-hf", run, out)
    assert same_bytes(tensors_in(source), tensors_in(out))
    again = said("to-hf", run, out, status=1)
    assert again.splitlines() == [f"error: {out} is there already: give the name of a new folder"]


# Files of torch


def test_a_bin_file_without_torch(tmp_path, monkeypatch):
    source = checkpoint(tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(source, tmp_path, r"pytorch_model.bin can only be read by PyTorch.*pip install torch")


@pytest.mark.torch
def test_bin_files(tmp_path):
    import torch

    source, config = tmp_path / "source", fields_in(reference.ROOT / "released_flags")
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    tensors = tensors_in(reference.ROOT / "released_flags")
    shards, names = {}, sorted(tensors)
    for i in range(3):
        file = f"pytorch_model-{i + 1:05}-of-00003.bin"
        part = {n: torch.from_numpy(tensors[n]).to(torch.bfloat16) for n in names[i::3]}
        torch.save(part, source / file)
        shards |= dict.fromkeys(part, file)
    index = source / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    interop.from_hf(source, tmp_path / "run", **SILENT)
    interop.to_hf(tmp_path / "run", tmp_path / "back", **SILENT)
    wanted = {n: a.astype(jnp.bfloat16) for n, a in tensors.items()}
    assert same_bytes(wanted, tensors_in(tmp_path / "back"))

    shutil.rmtree(tmp_path / "run"), shutil.rmtree(tmp_path / "back")
    torch.save({NORM: _Harmful(tmp_path / "harm")}, source / shards[NORM])
    refused(source, tmp_path, f"{shards[NORM]} cannot be read as tensors")
    assert not (tmp_path / "harm").exists()


@pytest.mark.torch
def test_bin_files_of_all_sorts(tmp_path):
    """Old archives, parameters, matrices that lie transposed, an ordered dictionary."""
    import torch

    source = checkpoint(tmp_path / "source")
    tensors = tensors_in(source)
    stored = collections.OrderedDict((n, torch.from_numpy(a)) for n, a in tensors.items())
    stored[NORM] = torch.nn.Parameter(stored[NORM])
    stored["lm_head.weight"] = stored["lm_head.weight"].T.contiguous().T
    (source / "model.safetensors").unlink()
    for i, zipped in enumerate((True, False)):
        torch.save(stored, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        interop.from_hf(source, tmp_path / f"run{i}", **SILENT)
        interop.to_hf(tmp_path / f"run{i}", tmp_path / f"back{i}", **SILENT)
        assert same_bytes(tensors, tensors_in(tmp_path / f"back{i}"))
    stored[NORM] = stored[NORM].detach().to_sparse()
    torch.save(stored, source / "pytorch_model.bin")
    refused(source, tmp_path, f"pytorch_model.bin: tensor {NORM} is sparse")


@pytest.mark.torch
@pytest.mark.parametrize("layout", ["moepp", "mixtral"])
def test_transformers_reads_our_tokenizer(tmp_path, layout):
    from transformers import AutoTokenizer

    vanilla = {"moe.n_const": 0, "moe.n_copy": 0, "moe.n_zero": 0, "moe.rule.residual": "none"}
    changes = vanilla if layout == "mixtral" else {}
    config = tiny.config(**changes, **{"data.dir": str(tmp_path / "data")})
    run = tiny.run_folder(tmp_path / "run", config)
    interop.to_hf(run, tmp_path / "out", layout=layout, **SILENT)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), moepp_jax.load(run).tokenizer
    for text in ("And God said", " two  spaces\n\n", "Ünïcödé 漢字 and\ttabs", ""):
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == [ours.bos_id, *ids], text
        assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert (theirs.pad_token_id, theirs.model_max_length) == (ours.pad_id, config.data.seq_len)


class _Harmful:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


# Memory


def test_pieces_are_in_memory_one_at_a_time(tmp_path):
    alive, most = weakref.WeakSet(), 0

    class Piece(np.ndarray):  # hashed by identity, as a WeakSet needs
        __hash__ = object.__hash__

    def piece(index):
        nonlocal most
        made = np.full((3, 5), 10 * index[0] + index[1], np.float32).view(Piece)
        alive.add(made)
        most = max(most, len(alive))
        return made

    tree = {"a": {"b": streams.Streamed((40, 4, 3, 5), 2, piece)}}
    with Checkpoints(tmp_path, 1, streams.handlers()) as checkpoints:
        checkpoints.save_params(0, tree)
        checkpoints.wait()
    assert most <= 2
    stored = streams.Stored(tmp_path / "checkpoints" / "0" / "params")
    assert (stored.read("a/b", (7, 3)) == 73).all() and stored.read("a/b", ()).shape == (
        40,
        4,
        3,
        5,
    )


def test_the_recipe_of_the_conversion_is_the_base(tmp_path):
    c = interop.from_hf(checkpoint(tmp_path / "source"), tmp_path / "run", **SILENT)
    assert c.optim == Config.parse(base.get_config()).optim


def test_a_model_without_a_tokenizer_is_said_to_have_none(tmp_path):
    said = []
    config = interop.from_hf(reference.ROOT / "default", tmp_path / "run", report=said.append)
    assert "The model has no tokenizer: " in said[1] and f"into {tmp_path / 'run'}, as " in said[1]
    # Training would else learn a tokenizer of its own, whose ids mean nothing to this model.
    assert config.data.tokenizer == str(tmp_path / "run" / "tokenizer.model")
