"""What is said of checkpoints that cannot be converted, and what fields and files may be."""

import json
import resource
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from moepp_jax import interop
from moepp_jax.interop import ConversionError
from moepp_jax.workdir import read_config
from tests import reference, tiny
from tests.released import NORM, SILENT, checkpoint, fields_in, refused, tensors_in

# Weights, files and folders


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


def test_a_source_that_fails_half_way(tmp_path, twentieth_read_fails):
    source = checkpoint(tmp_path / "source")
    refused(source, tmp_path, "tensor .* cannot be read: .*Input/output error")
    assert len(twentieth_read_fails) == 20


def test_a_target_that_is_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    interop.from_hf(checkpoint(tmp_path / "source"), tmp_path / "run", **SILENT)
    assert (tmp_path / "run").is_symlink() and read_config(tmp_path / "disk").moe.n_ffn == 8
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    there = {*tmp_path.iterdir()}
    with pytest.raises(ConversionError, match="loop cannot be written: Symlink loop"):
        interop.from_hf(tmp_path / "source", tmp_path / "loop", **SILENT)
    with pytest.raises(ConversionError, match="source is there already"):
        interop.from_hf(tmp_path / "source", tmp_path / "source", **SILENT)
    assert {*tmp_path.iterdir()} == there


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("[", "hf.json cannot be read as JSON"),
        ({"config": []}, "hf.json must hold a config and dtypes"),
        ({"dtypes": {NORM: "int8"}}, f"hf.json: tensor {NORM} is said to be of type 'int8'"),
    ],
)
def test_a_damaged_record_of_where_a_model_came_from(tmp_path, record, said):
    interop.from_hf(checkpoint(tmp_path / "source"), tmp_path / "run", **SILENT)
    text = record if isinstance(record, str) else json.dumps(record)
    (tmp_path / "run" / "hf.json").write_text(text)
    with pytest.raises(ConversionError, match=said):
        interop.to_hf(tmp_path / "run", tmp_path / "out", **SILENT)
    assert not (tmp_path / "out").exists()


def test_an_asked_type_is_what_config_json_says(tmp_path):
    source = checkpoint(tmp_path / "source", torch_dtype=None, dtype="float32")
    interop.from_hf(source, tmp_path / "run", **SILENT)
    interop.to_hf(tmp_path / "run", tmp_path / "out", dtype="bfloat16", **SILENT)
    said = fields_in(tmp_path / "out")
    assert (said["torch_dtype"], said["dtype"]) == ("bfloat16", "bfloat16")


def test_tables_of_the_rotary_embedding_are_not_read(tmp_path):
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    source = checkpoint(tmp_path / "source", table)
    interop.from_hf(source, tmp_path / "run", **SILENT)


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
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling: factor = 2.0 is not supported"),
        ({"rope_parameters": {"rope_type": "ntk"}}, "rope_parameters of type 'ntk'"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {}},
            "rope_scaling and rope_parameters contradict each other",
        ),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers = 1000000000000 and .* ask for more"),
        (
            {"num_experts": [10**12]},
            r"num_experts = 1000000000000 ask for more than the \d+ tensors",
        ),
        ({"head_dim": {}}, r"head_dim = \{\} must be of type int"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 must divide num_attention_heads = 4"),
        ({"max_position_embeddings": 1}, "max_position_embeddings = 1 must be at least 2"),
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
        ({"num_attention_heads": 3}, "num_attention_heads = 3 must divide hidden_size = 64"),
        ({"moe_2layer_gate": True}, "lacks tensor .*gate.wg.0.weight and 5 more"),
        ({"torch_dtype": "int8"}, "torch_dtype = 'int8' must be one of"),
    ],
)
def test_fields_that_are_refused(tmp_path, changes, said):
    refused(checkpoint(tmp_path / "source", **changes), tmp_path, said)


def test_a_field_that_is_there_twice(tmp_path):
    source = checkpoint(tmp_path / "source")
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace("{", '{"rope_theta": 5.0, ', 1))
    refused(source, tmp_path, "config.json cannot be read as JSON: 'rope_theta' is there twice")


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
    assert (c.moe.rule.router_layers, c.moe.rule.logit_norm, c.moe.rule.gate) == (
        2,
        0.0,
        "renormalise_nonzero",
    )
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
    assert fields_in(tmp_path / "back") == fields_in(source)


def test_our_fields_may_not_contradict_the_plain_ones(tmp_path):
    config = tiny.config(**{"moe.rule.top_k": 3, "data.dir": str(tmp_path / "data")})
    run = tiny.run_folder(tmp_path / "run1", config)
    interop.to_hf(run, tmp_path / "source", **SILENT)
    fields = fields_in(tmp_path / "source") | {"rope_theta": 5.0}
    (tmp_path / "source" / "config.json").write_text(json.dumps(fields))
    refused(tmp_path / "source", tmp_path, "rope_theta = 5.0 contradicts moepp_jax")
