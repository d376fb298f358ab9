"""Other families' checkpoints as MoE++ models: the same function at first, and bad ones refused."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import moepp_jax
from moepp_jax import flops, interop, run_data, seal
from moepp_jax import mesh as mesh_lib
from moepp_jax import model as model_lib
from moepp_jax import state as state_lib
from moepp_jax.commands import convert
from moepp_jax.config import Config
from moepp_jax.data import Tokenizer, prepare
from moepp_jax.errors import ConfigError
from moepp_jax.interop import ConversionError, families
from moepp_jax.interop.family import FAMILIES
from moepp_jax.moe.rules.moepp import NEVER
from moepp_jax.workdir import open_workdir, read_config
from tests import tiny
from tests.published import ROOT, checkpoint, fields_in, tensors_in, with_rows

NAMES = ("llama", "mixtral", "olmoe", "qwen3_moe")
POOL = {"n_const": 2, "n_copy": 1, "n_zero": 1}
NO_POOL = dict.fromkeys(POOL, 0)
SILENT = {"report": lambda line: None}
NORM = "model.norm.weight"


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.fixture(scope="module", params=NAMES)
def upcycled(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("upcycle") / "run"
    interop.upcycle(ROOT / request.param, folder, n_ffn=None, tau=0.25, **POOL, **SILENT)
    return request.param, moepp_jax.load(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "some.model"
    Tokenizer.train([(tiny.TEXT / "bees.txt").read_text()], 320).save(file)
    return file


# The function


def test_it_computes_the_same(upcycled):
    name, model = upcycled
    want = np.load(ROOT / name / "expected.npz")
    close(model.logits(want["input_ids"]), want["logits"])


def test_what_is_new_has_no_part_yet_and_can_get_one(upcycled):
    name, model = upcycled
    e, router = model.config.moe, model.params["layers"]["moe"]["router"]
    bias = np.asarray(router["bias"])
    assert (bias[:, : e.n_ffn] == 0).all() and (bias[:, e.n_ffn :] == NEVER).all()
    assert bias.shape == (2, e.n_ffn + 4) and e.rule.bias_rate > 0 and e.rule.tau == 0.25
    assert not np.asarray(router["w_residual"]).any() and e.rule.residual == "logits"
    # Rows of their own, all unlike: experts of one kind part by them.
    new = np.asarray(router["w"])[:, 0 if name == "llama" else e.n_ffn :].reshape(-1, 24)
    assert len(np.unique(new[:, 0])) == len(new) and 0.1 < new.std() < 0.3
    v = np.asarray(model.params["layers"]["moe"]["const"]["v"])
    assert v.shape == (2, 2, 24) and 0.7 < v.std() < 1.3


def test_gates_are_the_sources(upcycled):
    name, model = upcycled
    e = model.config.moe
    gate = "raw" if name == "olmoe" else "renormalise_nonzero"
    pool = {"llama": (8, 2), "mixtral": (6, 2), "olmoe": (8, 3), "qwen3_moe": (6, 2)}
    assert (e.rule.gate, (e.n_ffn, e.rule.top_k)) == (gate, pool[name])
    # With capacities the FFN experts, which all are sent to, would drop tokens.
    assert e.dispatch == e.eval_dispatch == "dropless"


def test_a_dense_model_is_copied_to_every_expert(tmp_path):
    source = checkpoint(tmp_path / "source", "llama")
    interop.upcycle(source, tmp_path / "run", n_ffn=3, **POOL, **SILENT)
    ffn = moepp_jax.load(tmp_path / "run").params["layers"]["moe"]["ffn"]
    tensors = tensors_in(source)
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp."
        for i in range(3):
            for half, name in enumerate(("gate_proj", "up_proj")):
                np.testing.assert_array_equal(
                    ffn["w_in"][layer, i, half], tensors[f"{mlp}{name}.weight"]
                )
            np.testing.assert_array_equal(ffn["w_out"][layer, i], tensors[f"{mlp}down_proj.weight"])


@pytest.mark.parametrize("upcycled", ["olmoe", "qwen3_moe"], indirect=True)
def test_cached_decoding_normalises_keys_as_the_forward_does(upcycled):
    name, model = upcycled
    prompt = np.load(ROOT / name / "expected.npz")["input_ids"][:, :6]
    new = np.asarray(model.generate(prompt.tolist(), max_new_tokens=5))
    padded = np.concatenate([prompt, new, np.zeros((2, 13), int)], axis=1)  # a length compiled for
    logits = np.asarray(model.logits(padded))
    np.testing.assert_array_equal(logits[:, 5:10].argmax(-1), new)


def test_a_tied_output_matrix_is_the_embedding(tmp_path):
    name = "model.embed_tokens.weight"
    moved = {"lm_head.weight": tensors_in(ROOT / "llama")[name], name: None}
    source = checkpoint(tmp_path / "source", "llama", moved)
    interop.upcycle(source, tmp_path / "run", **POOL, **SILENT)
    want = np.load(ROOT / "llama" / "expected.npz")
    close(moepp_jax.load(tmp_path / "run").logits(want["input_ids"]), want["logits"])


# Windows and scaled positions, which the committed Mistral has both


def test_windows_and_scaled_positions_in_training_and_generation(tmp_path):
    c = interop.upcycle(ROOT / "mistral", tmp_path / "run", n_ffn=2, **POOL, **SILENT)
    m = c.model
    assert (m.sliding_window, m.rope_type, m.rope_original_length) == (5, "llama3", 16)
    model, want = moepp_jax.load(tmp_path / "run"), np.load(ROOT / "mistral" / "expected.npz")
    close(model.logits(want["input_ids"]), want["logits"])
    prompts = want["input_ids"][0, :9].tolist(), want["input_ids"][1, :3].tolist()
    for prompt, new in zip(prompts, model.generate(prompts, max_new_tokens=8), strict=True):
        text = np.array([prompt + new + [0] * (24 - len(prompt) - len(new))])  # is not seen yet
        logits = np.asarray(model.logits(text))[0]
        assert logits[len(prompt) - 1 :][: len(new)].argmax(-1).tolist() == new


def test_what_a_family_says_of_its_window():
    def window(name, **fields):
        family = FAMILIES[name]
        return families.groups(family, fields_in(ROOT / "qwen3_moe") | fields)["model"][
            "sliding_window"
        ]

    on = {"use_sliding_window": True, "sliding_window": 32}
    assert window("mistral", sliding_window=32) == window("mixtral", sliding_window=32) == 32
    assert window("mistral", max_position_embeddings=32_768, sliding_window=None) == 0
    assert window("qwen3_moe", **on) == 32 and window("qwen3_moe", sliding_window=32) == 0
    assert window("qwen3", **on, max_window_layers=0) == 32
    assert window("qwen3", **on, max_window_layers=2) == window("qwen3", **on) == 0
    assert window("qwen3", **on, layer_types=["sliding_attention"] * 2) == 32
    with pytest.raises(ConversionError, match="all layers must be alike"):
        window("qwen3", **on, max_window_layers=1)


@pytest.mark.parametrize("layout", ["moepp", "mixtral"])
def test_windows_and_scaled_positions_are_written_back(tmp_path, layout):
    changes = {"rope_parameters": None, **llama3(), "sliding_window": 7}
    source, said = checkpoint(tmp_path / "source", **changes), []
    c = interop.upcycle(source, tmp_path / "run", **NO_POOL, **SILENT)
    interop.to_hf(tmp_path / "run", tmp_path / "out", layout=layout, report=said.append)
    written = fields_in(tmp_path / "out")
    assert (written["sliding_window"], written["rope_scaling"]) == (7, llama3()["rope_scaling"])
    if layout == "mixtral":
        again = interop.upcycle(tmp_path / "out", tmp_path / "again", **NO_POOL, **SILENT)
    else:
        assert written["model_type"] == "moepp_jax"
        again = interop.from_hf(tmp_path / "out", tmp_path / "again", c, **SILENT)
    assert again.model == c.model


# Dense layers between


def test_dense_layers_between_keep_their_places(tmp_path):
    tensors = tensors_in(ROOT / "qwen3_moe")
    mine = {n for n in tensors if n.startswith("model.layers.0.mlp.")}
    dense = {f"{n}_proj": np.random.default_rng(0).normal(size=(40, 24)) for n in ("gate", "up")}
    dense["down_proj"] = dense["up_proj"].T.copy()
    named = {f"model.layers.0.mlp.{n}.weight": a.astype(np.float32) for n, a in dense.items()}
    tensors = dict.fromkeys(mine) | named
    for i, how in enumerate(({"decoder_sparse_step": 2}, {"mlp_only_layers": [0]})):
        fields = how | {"intermediate_size": 40}
        source = checkpoint(tmp_path / f"source{i}", "qwen3_moe", tensors, **fields)
        c = interop.upcycle(source, tmp_path / f"run{i}", **POOL, **SILENT)
        assert (c.model.moe_every, c.model.dense_ffn_size) == (2, 40)
        layers = moepp_jax.load(tmp_path / f"run{i}").params["layers"]
        got = layers["dense_0_dense"]["w_in"][0, 1]
        np.testing.assert_array_equal(got, named["model.layers.0.mlp.up_proj.weight"])
        assert len(layers["moe"]["router"]["w"]) == 1


# As a Mixtral


def test_out_and_in_again_are_the_same_bytes(tmp_path):
    c = interop.upcycle(ROOT / "mixtral", tmp_path / "run", **NO_POOL, **SILENT)
    assert (c.moe.num_experts, c.moe.rule.residual, c.moe.rule.bias_rate) == (6, "none", 0.0)
    interop.to_hf(tmp_path / "run", tmp_path / "out", layout="mixtral", **SILENT)
    before, after = tensors_in(ROOT / "mixtral"), tensors_in(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    again = interop.upcycle(tmp_path / "out", tmp_path / "again", **NO_POOL, **SILENT)
    assert (again.model, again.moe) == (c.model, c.moe)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "config.moe.n_const is always 0, not 2"),
        ({"moe.n_const": 0, "moe.n_zero": 0}, "config.moe.n_copy is always 0, not 1"),
        (
            {"moe.rule.residual": "logits"},
            "config.moe.rule.residual is always 'none', not 'logits'",
        ),
        (
            {"moe.rule.gate": "raw"},
            "config.moe.rule.gate is always 'renormalise_nonzero' or .* not 'raw'",
        ),
        ({"model.qk_norm": "full"}, "config.model.qk_norm is always 'none', not 'full'"),
        ({"moe.rule.router_layers": 2}, "config.moe.rule.router_layers is always 1, not 2"),
        ({"moe.rule.logit_norm": 1.0}, "config.moe.rule.logit_norm is always 0.0, not 1.0"),
        ({"moe.input_scale": 2.0}, "config.moe.input_scale is always 1.0, not 2.0"),
        ({"model.moe_every": 2}, "config.model.moe_every is always 1, not 2"),
    ],
)
def test_what_is_no_mixtral(tmp_path, changes, said):
    vanilla = {f"moe.{name}": 0 for name in POOL} | {"moe.rule.residual": "none"}
    config = tiny.config(**(vanilla if changes and "moe.n_const" not in changes else {}) | changes)
    open_workdir(tmp_path / "run", config)
    with pytest.raises(ConversionError, match=said):
        interop.to_hf(tmp_path / "run", tmp_path / "out", layout="mixtral", **SILENT)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_what_is_upcycled_goes_and_comes_back(tmp_path):
    run, said = tmp_path / "run", []
    config = interop.upcycle(ROOT / "qwen3_moe", run, **POOL, **SILENT)
    interop.to_hf(run, tmp_path / "out", report=said.append)
    assert "their config.model.head_dim is always 0 or 6, not 8" in said[0]
    again = interop.from_hf(tmp_path / "out", tmp_path / "again", config, **SILENT)
    assert (again.model, again.moe) == (config.model, config.moe)
    a, b = (moepp_jax.load(tmp_path / name).params for name in ("run", "again"))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_layout_that_is_not_known(tmp_path):
    with pytest.raises(ConversionError, match="--layout=gpt2 must be one of moepp, mixtral"):
        interop.to_hf(tmp_path / "run", tmp_path / "out", layout="gpt2", **SILENT)


# Tokenizers


def test_the_tokenizer_comes_along(tmp_path, tokenizer):
    source = with_rows(tmp_path / "source", 330)
    shutil.copyfile(tokenizer, source / "tokenizer.model")
    said = []
    config = interop.upcycle(source, tmp_path / "run", report=said.append, **POOL)
    assert len(said) == 1
    assert config.data.tokenizer == str(tmp_path / "run" / "tokenizer.model")
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


def test_a_run_that_was_moved_has_its_tokenizer_with_it(tmp_path, tokenizer):
    """What was upcycled, or converted, and has not begun to train."""
    recipe = tiny.config(**{"data.dir": str(tmp_path / "data")})
    there, names = tensors_in(ROOT / "mixtral"), ("model.embed_tokens.weight", "lm_head.weight")
    tensors = {name: np.resize(there[name], (320, there[name].shape[1])) for name in names}
    source = checkpoint(tmp_path / "source", tensors=tensors, vocab_size=320)
    where = {"tokenizer": tokenizer, **SILENT}
    interop.upcycle(source, tmp_path / "old", recipe, **where, **POOL)
    assert str(tmp_path / "old") not in (tmp_path / "old" / "config.json").read_text()
    new = tmp_path / "new"
    shutil.move(tmp_path / "old", new)
    config = read_config(new)
    assert config.data.tokenizer == str(new / "tokenizer.model")
    kept = Tokenizer.load(tokenizer).fingerprint
    assert run_data.prepare_data(config, new, **SILENT).tokenizer.fingerprint == kept
    # One of an earlier version names the place where it was.
    fields = seal.opened(json.loads((new / "config.json").read_text()))
    fields["data"]["tokenizer"] = str(tmp_path / "old" / "tokenizer.model")
    (new / "config.json").write_text(json.dumps(fields))
    assert read_config(new) == config


def test_a_tokenizer_from_elsewhere(tmp_path, tokenizer):
    said = []
    where = {"tokenizer": tokenizer, "report": said.append}
    source = with_rows(tmp_path / "source", 330)
    interop.upcycle(source, tmp_path / "run", **where, **POOL)
    assert len(said) == 1 and (tmp_path / "run" / "tokenizer.model").exists()
    for bad, why in ((tmp_path / "none.model", "cannot be read"), (ROOT / "make.py", "is not a")):
        with pytest.raises(ConfigError, match=f"tokenizer {bad} {why}"):
            interop.upcycle(source, tmp_path / "2", tokenizer=bad, **POOL, **SILENT)
    with pytest.raises(ConfigError, match=r"some\.model has 320 pieces, more than .* = 64"):
        interop.upcycle(ROOT / "mixtral", tmp_path / "2", tokenizer=tokenizer, **POOL, **SILENT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "source"]


def test_without_a_tokenizer_nothing_else_is_taken_for_it(tmp_path):
    said = []
    config = interop.upcycle(ROOT / "olmoe", tmp_path / "run", report=said.append, **POOL)
    missing = tmp_path / "run" / "tokenizer.model"
    assert "has no tokenizer.model and no tokenizer.json" in said[1]
    assert f"put the one that it was trained with into {missing.parent}, as " in said[1]
    assert "--tokenizer=FILE" in said[1]
    # Training would else learn a tokenizer of its own, whose ids mean nothing to this model.
    with pytest.raises(ConfigError, match=f"the tokenizer {missing} cannot be read"):
        prepare(config.replace("data", dir=str(tmp_path / "data")), report=lambda line: None)


def test_a_tokenizer_that_cannot_be_read_is_left_out_and_said(tmp_path):
    said, source = [], shutil.copytree(ROOT / "olmoe", tmp_path / "source")
    (source / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    interop.upcycle(source, tmp_path / "run", report=said.append, **POOL)
    assert "tensors are now step 0" in said[0]
    assert f"no tokenizer: the tokenizer {source / 'tokenizer.json'} cannot be read by" in said[1]
    assert not (tmp_path / "run" / "tokenizer.json").exists()


# What is given besides


def test_the_command(tmp_path, capsys):
    flags.FLAGS.mark_as_parsed()
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    with flagsaver.flagsaver(n_const=1, n_copy=0, n_zero=0, tau=0.5, bias_rate=0.3):
        convert.run(["upcycle", str(ROOT / "mixtral"), run])
    e = read_config(run).moe
    assert (e.n_const, e.n_copy, e.n_zero, e.rule.tau, e.rule.bias_rate) == (1, 0, 0, 0.5, 0.3)
    assert "(mixtral): 53 tensors are now step 0 of" in capsys.readouterr().out
    with flagsaver.flagsaver(layout="mixtral"), pytest.raises(ConversionError, match="n_const"):
        convert.run(["to-hf", run, out])
    with pytest.raises(ConfigError, match="or convert upcycle PATH WORKDIR, not convert upcycle x"):
        convert.run(["upcycle", "x"])


def test_a_recipe_decides_what_neither_checkpoint_nor_settings_do(tmp_path):
    changes = {
        "moe.rule.tau": 0.5,
        "moe.n_const": 5,
        "moe.rule.bias_rate": 0.02,
        "moe.rule.residual": "detached",
    }
    recipe = tiny.config(**changes, **{"mesh.expert": 2, "optim.lr": 7e-5})
    how = {"n_copy": 0, "n_zero": 3, "dtype": "bfloat16"}
    c = interop.upcycle(ROOT / "llama", tmp_path / "run", recipe, **how, **SILENT)
    e = c.moe
    assert (e.n_ffn, e.n_const, e.n_copy, e.n_zero) == (recipe.moe.n_ffn, 5, 0, 3)
    assert (e.rule.tau, e.rule.bias_rate, e.rule.residual) == (0.5, 0.02, "detached")
    assert (c.optim, c.mesh, c.data.seq_len) == (recipe.optim, recipe.mesh, 32)
    assert (c.model.dtype, c.model.head_width, c.model.tied_embeddings) == ("bfloat16", 10, True)
    assert read_config(tmp_path / "run") == c


def test_the_same_seed_draws_the_same(tmp_path):
    drawn = {}
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        recipe = Config.parse(tiny.config().to_dict() | {"seed": seed})
        interop.upcycle(ROOT / "olmoe", tmp_path / run, recipe, **SILENT)
        drawn[run] = moepp_jax.load(tmp_path / run).params["layers"]["moe"]["const"]["v"]
    np.testing.assert_array_equal(drawn["a"], drawn["b"])
    assert (np.asarray(drawn["a"]) != np.asarray(drawn["c"])).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"model.head_dim": 6},
        {"model.qk_norm": "head", "model.num_kv_heads": 2},
        {"model.qk_norm": "full", "model.num_kv_heads": 2, "moe.rule.bias_rate": 0.1},
    ],
)
def test_parameters_are_counted_and_have_a_place_on_the_mesh(changes):
    config = tiny.config(**changes)
    model = model_lib.build(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert flops.parameters(config).total == total
    mesh_lib.specs(model.described)


@pytest.mark.slow
def test_training_from_there_is_the_same_on_every_mesh(tmp_path):
    changes = {"data.seq_len": 16, "moe.rule.bias_rate": 0.5, "moe.group_size": 16}
    recipe = tiny.config(**changes)
    c = interop.upcycle(ROOT / "qwen3_moe", tmp_path / "run", recipe, **POOL, **SILENT)
    params = jax.device_get(moepp_jax.load(tmp_path / "run").params)
    batch = tiny.batch(c)
    found = []
    for axes in ({"data": 1}, {"data": 1, "fsdp": 2, "expert": 2}):
        config = c.replace("mesh", **axes)
        mesh = mesh_lib.make_mesh(config, jax.devices()[: 1 if len(axes) == 1 else 4])
        laid = jax.device_put(params, mesh_lib.shardings(model_lib.describe(config), mesh))
        parts = state_lib.assemble(config, mesh)
        state = state_lib.state_of(laid, parts)
        step = state_lib.make_train_step(parts)
        placed = jax.device_put(batch, mesh_lib.batch_sharding(mesh))
        for _ in range(2):
            state, metrics = step(state, placed)
        found.append((float(metrics["loss"]), jax.device_get(state.params)))
    (a, one), (b, many) = found
    assert a == pytest.approx(b, rel=1e-5)
    norms = [p["layers"]["attention"]["q_norm"]["norm"] for p in (one, many)]
    np.testing.assert_allclose(*norms, rtol=1e-4)
    assert np.abs(norms[0] - params["layers"]["attention"]["q_norm"]["norm"]).max() > 0
    assert (one["layers"]["moe"]["router"]["bias"][:, c.moe.n_ffn :] == NEVER + 1.0).all()


# Bad input


def refused(source: Path, folder: Path, said: str, **settings) -> None:
    there = {*folder.iterdir()}
    with pytest.raises(ConversionError, match=said) as caught:
        interop.upcycle(source, folder / "run", **POOL | settings, **SILENT)
    assert str(folder) in str(caught.value)
    assert {*folder.iterdir()} == there


WINDOW = {"sliding_window": 32}
MIXED = ["sliding_attention", "full_attention"]


def llama3(**changes):
    said = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    said |= {"rope_type": "llama3", "original_max_position_embeddings": 8192} | changes
    return {"rope_scaling": said}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llama", {"model_type": "gpt2"}, "model_type = 'gpt2' must be one of llama, mistral"),
        ("llama", {"attention_bias": True}, "attention_bias = True is not supported, only False"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True is not supported"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu'"),
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers = '2' must be of type int"),
        ("llama", {"head_dim": 7}, r"head_dim = 7 makes heads 7 wide"),
        ("mixtral", {"num_attention_heads": 5}, r"num_attention_heads = 5 must divide"),
        ("llama", WINDOW, r"sliding_window = 32 is not supported: LlamaForCausalLM does not"),
        ("mixtral", {"sliding_window": 0}, "sliding_window = 0 must be null or at least 1"),
        ("mixtral", {"sliding_window": "all"}, "sliding_window = 'all' must be null or at"),
        ("mixtral", WINDOW | {"layer_types": MIXED}, "all layers must be alike"),
        ("qwen3_moe", {"layer_types": ["sliding_attention"] * 2}, "'sliding_attention', and there"),
        ("qwen3_moe", {"layer_types": ["linear_attention"] * 2}, "has 'linear_attention', only"),
        ("mixtral", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0 must be at least 1"),
        ("qwen3_moe", {"decoder_sparse_step": 3}, "of 2 layers none would be sparse"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"of 2 layers \[0\] would be sparse, and it must"),
        ("qwen3_moe", {"mlp_only_layers": "0"}, "mlp_only_layers = '0' must be a list of layers"),
        ("qwen3_moe", {"model_type": "qwen2_moe"}, "'qwen2_moe' is not supported: no bias of"),
        (
            "qwen3_moe",
            {"model_type": "longcat_flash"},
            "no multi-head latent .*'longcat'",
        ),
        ("qwen3_moe", {"model_type": "deepseek_v2"}, "no multi-head latent attention .* no shared"),
        ("qwen3_moe", {"zce_nums": [2]}, r"zce_nums = \[2\]: it has .* `convert from-hf` reads it"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size"),
        ("qwen3_moe", {"num_local_experts": None}, "num_experts is missing"),
        ("qwen3_moe", {"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
        ("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob = 'yes' must be of type bool"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported, only None"),
        ("olmoe", {"rope_parameters": {"rope_type": "yarn"}}, "of type 'yarn' is not supported"),
        ("olmoe", {"rope_scaling": {"type": "dynamic"}}, "of type 'dynamic' is not supported"),
        ("olmoe", {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: factor is missing"),
        ("olmoe", llama3(low_freq_factor=None), "rope_scaling: low_freq_factor is missing"),
        ("olmoe", llama3(factor=0), "rope_scaling: factor = 0 must be greater than 0"),
        ("olmoe", llama3(original_max_position_embeddings=9.5), "= 9.5 must be of type int"),
        ("mistral", {"rope_parameters": None} | llama3(high_freq_factor=1), "must be greater than"),
        ("olmoe", {"rope_parameters": {"a": {}}}, "is not supported: it differs by layer"),
        ("olmoe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ("olmoe", {"quantization_config": {"bits": 4}}, "quantization_config = .* not supported"),
        ("olmoe", {"dtype": "int8"}, "torch_dtype = 'int8' must be one of"),
        ("olmoe", {"num_experts": 6}, r"has shape \[8, .*, and by config.json it must have \[6, "),
    ],
)
def test_fields_that_are_refused(tmp_path, name, changes, said):
    refused(checkpoint(tmp_path / "source", name, **changes), tmp_path, said)


def test_a_window_that_no_sequence_fills_is_none(tmp_path):
    source = checkpoint(tmp_path / "source", sliding_window=64)
    interop.upcycle(source, tmp_path / "run", **POOL, **SILENT)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({NORM: None}, rf"source lacks tensor {NORM}, which config.json asks for"),
        ({NORM: np.zeros(23, np.float32)}, rf"{NORM} has shape \[23\], .* must have \[24\]"),
        ({NORM: np.zeros(24, int)}, rf"tensor {NORM} is of type I64"),
        (
            {"model.layers.0.self_attn.q_proj.bias": np.zeros(24, np.float32)},
            "unexpected tensor model.layers.0.self_attn.q_proj.bias",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, tensors, said):
    refused(checkpoint(tmp_path / "source", tensors=tensors), tmp_path, said)


def test_tables_of_old_checkpoints_are_not_read(tmp_path):
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    source = checkpoint(tmp_path / "source", tensors=table)
    interop.upcycle(source, tmp_path / "run", **POOL, **SILENT)


def test_settings_that_do_not_fit(tmp_path):
    source = checkpoint(tmp_path / "source")
    refused(source, tmp_path, "source: n_ffn = 4 must be 6, the experts that it has", n_ffn=4)
    refused(source, tmp_path, "config.moe.n_const = -1 must be at least 0", n_const=-1)
    refused(source, tmp_path, "config.moe.rule.tau = 2.0 must be greater than 0", tau=2.0)
    refused(source, tmp_path, "config.moe.rule.bias_rate = -1.0 must be", bias_rate=-1.0)
    refused(source, tmp_path, "source: bias_rate = 0 must be greater than 0", bias_rate=0.0)
    with pytest.raises(TypeError, match="no setting n_cnst: there are n_ffn, n_const"):
        interop.upcycle(source, tmp_path / "run", n_cnst=1)


def test_a_folder_that_is_in_use_stays_as_it_is(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    refused(checkpoint(tmp_path / "source"), tmp_path, "run is there already")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes"]


def test_a_source_that_fails_half_way(tmp_path, twentieth_read_fails):
    source = checkpoint(tmp_path / "source")
    refused(source, tmp_path, "tensor .* cannot be read: .*Input/output error")
    assert len(twentieth_read_fails) == 20


# transformers itself


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("upcycle_make", ROOT / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e2}}),
        ("llama", {"rope_parameters": llama3(rope_theta=5e2)["rope_scaling"]}),
        ("mistral", {}),
        ("mistral", {"sliding_window": None}),
        ("mixtral", {"sliding_window": 3}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
        ("mixtral", {"head_dim": 10, "num_key_value_heads": 4}),
        ("olmoe", {"norm_topk_prob": True, "num_key_value_heads": 1}),
        ("qwen3_moe", {"norm_topk_prob": False, "rms_norm_eps": 0.01}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 6}),
        ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4, "intermediate_size": 40}),
    ],
)
def test_transformers_computes_the_same(maker, tmp_path, name, fields):
    maker.make(name, tmp_path / "source", seed=1, **fields)
    want = np.load(tmp_path / "source" / "expected.npz")
    interop.upcycle(tmp_path / "source", tmp_path / "run", **POOL, **SILENT)
    close(moepp_jax.load(tmp_path / "run").logits(want["input_ids"]), want["logits"])


@pytest.mark.torch
def test_the_committed_numbers_are_those_of_transformers(maker, tmp_path):
    for name in maker.COMMITTED:
        maker.make(name, tmp_path / name)
        a, b = (dict(np.load(f / name / "expected.npz")) for f in (tmp_path, ROOT))
        np.testing.assert_array_equal(a["input_ids"], b["input_ids"])
        close(a["logits"], b["logits"])


@pytest.mark.torch
def test_bin_files(tmp_path):
    import torch

    source = checkpoint(tmp_path / "source", "llama")
    tensors = {n: torch.from_numpy(a) for n, a in tensors_in(source).items()}
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    interop.upcycle(source, tmp_path / "run", **POOL, **SILENT)
    want = np.load(ROOT / "llama" / "expected.npz")
    close(moepp_jax.load(tmp_path / "run").logits(want["input_ids"]), want["logits"])


@pytest.mark.torch
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.head_dim": 6, "model.num_kv_heads": 2, "model.tied_embeddings": True},
        {"moe.rule.gate": "softmax_selected", "model.rope_scaling": 2.0, "moe.rule.top_k": 3},
        {"model.rope_type": "llama3", "model.rope_scaling": 8.0, "model.rope_original_length": 24},
        {"model.sliding_window": 5},
    ],
)
def test_transformers_loads_a_mixtral_of_ours(tmp_path, changes):
    import torch
    from transformers import MixtralForCausalLM

    vanilla = {f"moe.{name}": 0 for name in POOL} | {"moe.rule.residual": "none"}
    config = tiny.config(**vanilla | changes, **{"data.dir": str(tmp_path / "data")})
    run = tiny.run_folder(tmp_path / "run", config)
    interop.to_hf(run, tmp_path / "out", layout="mixtral", **SILENT)
    theirs, said = MixtralForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(said.values()), said
    tokens = np.random.default_rng(0).integers(3, config.model.vocab_size, (2, 24))
    with torch.no_grad():
        want = theirs.eval()(torch.from_numpy(tokens)).logits.numpy()
    close(moepp_jax.load(run).logits(tokens), want)
