"""The released layout: its numbers, its bytes, and what is said of a checkpoint that is damaged."""

import json
import resource
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import moepp_jax
from configs import base
from moepp_jax import interop, train
from moepp_jax.checkpoint import Checkpoints
from moepp_jax.config import Config
from moepp_jax.interop import ConversionError, safetensors_file, streams
from moepp_jax.workdir import read_config
from tests import reference, tiny

SILENT = {"report": lambda line: None}
NORM = "model.norm.weight"


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    return {n: a for f in folder.glob("*.safetensors") for n, a in load_file(f).items()}


def fields_in(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def checkpoint(folder: Path, tensors=None, **changes) -> Path:
    """The reference with little in it, in one file, with other tensors or fields of config.json."""
    folder.mkdir()
    fields = fields_in(reference.ROOT / "mixtral_gating") | changes
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(tensors_in(reference.ROOT / "mixtral_gating") | (tensors or {}), folder / "x")
    (folder / "x").rename(folder / "model.safetensors")
    return folder


def same_bytes(a, b) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes()
        for n in a
    )


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


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"moe.n_copy": 0}, "2 constant, 1 copy and 1 zero expert, not 2, 0 and 1"),
        (
            {"moe.n_const": 0, "moe.n_copy": 0, "moe.n_zero": 0, "moe.residual": "none"},
            "2 constant, 1 copy and 1 zero expert, not 0, 0 and 0",
        ),
        ({"moe.top_k": 3}, "moe.top_k is always 2, not 3"),
        ({"moe.gate": "raw"}, "moe.gate is always"),
        ({"moe.residual": "none"}, "moe.residual is always"),
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
        "from-hf", source, run, recipe, "--config.moe.tau=0.25", "--dtype=bfloat16"
    )
    config = read_config(run)
    assert (config.moe.tau, config.model.dtype, config.data.seq_len) == (0.25, "bfloat16", 256)
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


class _Harmful:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


# Bad input


def refused(source: Path, folder: Path, said: str) -> None:
    there = {*folder.iterdir()}
    with pytest.raises(ConversionError, match=said) as caught:
        interop.from_hf(source, folder / "run", **SILENT)
    assert str(folder) in str(caught.value)
    assert {*folder.iterdir()} == there


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({NORM: None}, rf"source lacks tensor {NORM}, which config.json asks for"),
        ({"model.extra": np.zeros(2)}, "model.safetensors: unexpected tensor model.extra"),
        (
            {NORM: np.zeros(63, np.float32)},
            rf"model.safetensors: tensor {NORM} has shape \[63\], and by config.json it must have "
            r"\[64\]",
        ),
        ({NORM: np.zeros(64, int)}, rf"model.safetensors: tensor {NORM} is of type I64; it must"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, tensors, said):
    all_of_them = tensors_in(reference.ROOT / "mixtral_gating") | tensors
    source = checkpoint(tmp_path / "source")
    save_file({n: a for n, a in all_of_them.items() if a is not None}, source / "model.safetensors")
    refused(source, tmp_path, said)


@pytest.mark.parametrize("kept", [0, 5, 3_000, 100_000, -1])
def test_truncated_files(tmp_path, kept):
    source = checkpoint(tmp_path / "source")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(source, tmp_path, "model.safetensors is truncated")


def test_files_that_are_something_else(tmp_path):
    source = checkpoint(tmp_path / "source")
    (source / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    refused(source, tmp_path, "model.safetensors is no safetensors file")
    (source / "model.safetensors").unlink()
    refused(source, tmp_path, "source holds no weights: there is no model.safetensors or")
    (source / "config.json").write_text("{")
    refused(source, tmp_path, "config.json cannot be read as JSON")
    (source / "config.json").unlink()
    refused(source, tmp_path, "config.json cannot be read: No such file")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({NORM: "../x.safetensors"}, rf"{NORM} is said to be in '../x.safetensors', which is no"),
        ({NORM: "/etc/passwd"}, "is said to be in '/etc/passwd'"),
        ({NORM: "gone.safetensors"}, f"gone.safetensors, which has tensor {NORM}, is missing"),
        ({NORM: "model-00001-of-00012.safetensors"}, f"has tensor {NORM}; .* says it is in"),
        ({NORM: None}, f"has tensor {NORM}; .* does not know it"),
        ({"x": "model-00001-of-00012.safetensors"}, "lacks tensor x, which .* names"),
    ],
)
def test_an_index_that_lies(tmp_path, change, said):
    source = tmp_path / "source"
    shutil.copytree(reference.ROOT / "default", source)
    file = source / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    files = index["weight_map"] | change
    index["weight_map"] = {name: f for name, f in files.items() if f is not None}
    file.write_text(json.dumps(index))
    refused(source, tmp_path, said)


def test_a_disk_that_is_full_half_way(tmp_path):
    source = checkpoint(tmp_path / "source")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # bytes a file
    try:
        refused(source, tmp_path, r"run cannot be written: .*File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_source_that_fails_half_way(tmp_path, monkeypatch):
    source = checkpoint(tmp_path / "source")
    reads = []

    def read(file, entry, real=safetensors_file.read):
        reads.append(entry)
        if len(reads) == 20:
            raise OSError(5, "Input/output error")
        return real(file, entry)

    monkeypatch.setattr(safetensors_file, "read", read)
    refused(source, tmp_path, "tensor .* cannot be read: .*Input/output error")
    assert len(reads) == 20


def test_a_folder_that_is_in_use_stays_as_it_is(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    with pytest.raises(ConversionError, match="run is there already"):
        interop.from_hf(checkpoint(tmp_path / "source"), tmp_path / "run", **SILENT)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes"]


# Config fields


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mixtral"}, r"model_type = 'mixtral' must be 'MoE\+\+'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling of type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling of type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"moe_expert_interval": 2}, "moe_expert_interval = 2 is not supported, only 1"),
        ({"moe_new_idea": True}, "moe_new_idea = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"head_dim": 8}, "head_dim = 8 is not supported"),
        ({"num_experts": [12, 8, 12]}, "num_experts = .* every layer must have the same"),
        ({"num_experts": [4]}, r"num_experts = \[4\] must be at least \[5\]"),
        ({"num_experts": None}, "num_experts = None must be"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"hidden_size": "64"}, "hidden_size = '64' must be of type int"),
        ({"num_attention_heads": 3}, "must divide config.model.hidden_size = 64"),
        ({"moe_2layer_gate": True}, "lacks tensor .*gate.wg.0.weight and 5 more"),
        ({"torch_dtype": "int8"}, "torch_dtype = 'int8' must be one of"),
    ],
)
def test_fields_that_are_refused(tmp_path, changes, said):
    refused(checkpoint(tmp_path / "source", **changes), tmp_path, said)


def test_what_absent_fields_mean(tmp_path):
    source = checkpoint(tmp_path / "source")
    kept = {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_experts"}
    kept |= {"num_hidden_layers", "num_attention_heads"}
    fields = {name: value for name, value in fields_in(source).items() if name in kept}
    (source / "config.json").write_text(json.dumps(fields))
    gate = "model.layers.{}.mlp.moe.gate.wg.{}weight"
    tensors = tensors_in(source)
    for i in range(3):
        del tensors[gate.format(i, "")]
        tensors[gate.format(i, "0.")] = np.ones((96, 64), np.float32)
        tensors[gate.format(i, "2.")] = np.ones((12, 96), np.float32)
        for name in ("k", "v"):
            full = f"model.layers.{i}.self_attn.{name}_proj.weight"
            tensors[full] = np.ones((64, 64), np.float32)
    save_file(tensors, source / "model.safetensors")
    c = interop.from_hf(source, tmp_path / "run", **SILENT)
    assert (c.moe.router_layers, c.moe.logit_norm, c.moe.gate) == (2, False, "renormalise_nonzero")
    assert (c.moe.input_scale, c.model.init_std, c.model.num_kv_heads) == (2.0, 0.02, 4)
    assert (c.model.rope_theta, c.model.dtype, c.data.seq_len) == (10_000.0, "float32", 2048)


@pytest.mark.parametrize(
    "field",
    [
        {"rope_scaling": {"type": "linear", "factor": 4}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50_000.0}},
    ],
)
def test_linear_scaling_goes_and_comes_back(tmp_path, field):
    source = checkpoint(tmp_path / "source", **field)
    c = interop.from_hf(source, tmp_path / "run", **SILENT)
    assert (c.model.rope_scaling, c.model.rope_theta) == (4.0, 50_000.0)
    interop.to_hf(tmp_path / "run", tmp_path / "back", **SILENT)
    assert fields_in(tmp_path / "back")["rope_scaling"] == {"type": "linear", "factor": 4.0}


def test_our_fields_may_not_contradict_the_plain_ones(tmp_path):
    config = tiny.config(**{"moe.top_k": 3, "data.dir": str(tmp_path / "data")})
    run = tiny.run_folder(tmp_path / "run1", config)
    interop.to_hf(run, tmp_path / "source", **SILENT)
    fields = fields_in(tmp_path / "source") | {"rope_theta": 5.0}
    (tmp_path / "source" / "config.json").write_text(json.dumps(fields))
    refused(tmp_path / "source", tmp_path, "rope_theta = 5.0 contradicts moepp_jax")


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
