"""Published OLMoE and Qwen3-MoE, with a tokenizer.json alone: in, trained, used, out again."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moepp_jax
from moepp_jax import interop, train
from moepp_jax.data import Tokenizer
from moepp_jax.errors import ConfigError
from moepp_jax.evaluate import evaluate_run
from moepp_jax.interop import ConversionError
from moepp_jax.run import open_run
from moepp_jax.workdir import open_workdir, read_config
from tests import hurry, published, tiny, tokenizer_files

NO_POOL = {"n_const": 0, "n_copy": 0, "n_zero": 0}
SILENT = {"report": lambda line: None}
FAMILIES = ("olmoe", "qwen3_moe")


def recipe(folder: Path, **changes):
    """Of a training on a JSONL of one's own."""
    lines = [{"text": text} for text in (tiny.TEXT / "bees.txt").read_text().split("\n\n")]
    lines += [{"text": "日本 😀 naïve"}, {"text": "two  spaces"}] * 20
    text = folder / "own.jsonl"
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields = {"data.sources.text.path": str(text), "data.dir": str(folder / "data")}
    fields |= {"train.steps": 3, "train.save_every": 3, "optim.lr": 1e-3, "moe.group_size": 32}
    return tiny.config(**fields | {"data.seq_len": 64} | changes)


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory):
    """The family, the checkpoint it came from, and the folder of a run trained on from there."""
    folder = tmp_path_factory.mktemp(request.param)
    source = published.whole(folder / "source", request.param)
    run, said = folder / "run", []
    config = interop.upcycle(source, run, recipe(folder), report=said.append, **NO_POOL)
    assert len(said) == 1  # nothing is missing
    assert train.train(config, run, report=said.append).step == 3
    assert any("of config.model.vocab_size are no piece" in line for line in said)
    return request.param, source, run


def test_what_is_trained_on_are_the_documents_of_the_family(trained):
    family, source, run = trained
    config = read_config(run)
    tokenizer = Tokenizer.load(run)
    assert config.data.tokenizer == str(run / "tokenizer.json")
    assert tokenizer.files["tokenizer.json"] == (source / "tokenizer.json").read_bytes()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 482 if family == "olmoe" else 480)
    dataset = moepp_jax.data.open_dataset(config)
    documents = [*dataset.train_documents()]
    assert all(d[-1] == tokenizer.eos_id for d in documents)
    lines = Path(config.data.sources["text"].path).read_text().splitlines()
    wanted = [json.loads(line)["text"] for line in lines]
    assert {tokenizer.decode(d) for d in documents} <= set(wanted)
    assert all(np.count_nonzero(d == tokenizer.eos_id) == 1 for d in documents)


def test_it_is_evaluated_and_generates(trained):
    _, _, run = trained
    found = evaluate_run(read_config(run), run)
    assert 0 < found["eval_loss"] < 9 and 0 < found["eval_bits_per_byte"] < 9
    model = moepp_jax.load(run)
    text = model.generate("The bees 日本", max_new_tokens=12, temperature=1.0)
    pieces = list(model.stream("The bees 日本", max_new_tokens=12, temperature=1.0))
    assert "".join(pieces) == text
    assert model.ends == {model.tokenizer.eos_id, 481}
    assert isinstance(model.generate("", max_new_tokens=2), str)


def test_surplus_rows_are_never_drawn(trained):
    _, _, run = trained
    model = moepp_jax.load(run)
    how = {"max_new_tokens": 60, "temperature": 100.0, "num_samples": 4}
    drawn = model.generate([[5], [6]], **how)
    ids = {token for samples in drawn for sample in samples for token in sample}
    assert len(ids) > 100 and max(ids) < model.tokenizer.vocab_size < 512
    without = moepp_jax.api.Model(model.config, model.params)
    drawn = without.generate([[5], [6]], **how)
    assert max(t for samples in drawn for sample in samples for t in sample) > 490
    # Logits are those of the model all the same.
    assert model.logits([[5]]).shape == (1, 1, 512)


def test_it_goes_back_as_it_came(trained, tmp_path):
    family, source, run = trained
    interop.to_hf(run, tmp_path / "out", layout=family, **SILENT)
    for name in ("tokenizer.json", "generation_config.json"):
        same = json.loads((tmp_path / "out" / name).read_text())
        assert same == json.loads((source / name).read_text())
    fields, came = published.fields_in(tmp_path / "out"), published.fields_in(source)
    assert fields["eos_token_id"] == came["eos_token_id"] and fields["bos_token_id"] is None
    names = ("vocab_size", "hidden_size", "num_experts_per_tok", "num_attention_heads")
    assert {n: fields[n] for n in names} == {n: came[n] for n in names}
    before = read_config(run)
    again = interop.upcycle(tmp_path / "out", tmp_path / "again", before, **NO_POOL, **SILENT)
    assert (again.model, again.moe) == (before.model, before.moe)
    ids = np.arange(40).reshape(2, 20)
    a, b = moepp_jax.load(run), moepp_jax.load(tmp_path / "again")
    np.testing.assert_allclose(a.logits(ids), b.logits(ids), atol=1e-5)
    assert a.tokenizer.fingerprint == b.tokenizer.fingerprint and a.ends == b.ends


@pytest.mark.torch
def test_transformers_opens_what_is_written(trained, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    family, source, run = trained
    interop.to_hf(run, tmp_path / "out", layout=family, **SILENT)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    model, tokenizer = moepp_jax.load(run), AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = tokenizer_files.texts(500)
    assert tokenizer(texts)["input_ids"] == model.tokenizer.encode_batch(texts)
    ids = np.asarray(model.tokenizer.encode("The bees 日本 went out in the morning"))[None]
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids)).logits.numpy()
    found = np.asarray(model.logits(ids))
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
    assert theirs.generation_config.eos_token_id == [model.tokenizer.eos_id, 481]
    assert (
        AutoTokenizer.from_pretrained(source)(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    )


@pytest.mark.torch
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saved_comes_back_to_it(family, tmp_path):
    """From a model and a tokenizer of `transformers`' own saving."""
    import torch
    import transformers

    config = {"vocab_size": 512, "hidden_size": 24, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    config |= {"num_experts": 4, "intermediate_size": 16, "max_position_embeddings": 64}
    config |= {"bos_token_id": None, "pad_token_id": None, "eos_token_id": 480}
    if family == "qwen3_moe":
        config |= {"moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True}
    kind = "OlmoeForCausalLM" if family == "olmoe" else "Qwen3MoeForCausalLM"
    torch.manual_seed(0)
    theirs = getattr(transformers, kind)(getattr(transformers, kind).config_class(**config)).eval()
    theirs.save_pretrained(tmp_path / "source")
    library = tokenizer_files.save(tmp_path / "file", family)
    of = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(library), eos_token=tokenizer_files.END
    )
    of.chat_template = "{{ messages }}"
    of.save_pretrained(tmp_path / "source")
    interop.upcycle(tmp_path / "source", tmp_path / "run", **NO_POOL, **SILENT)
    interop.to_hf(tmp_path / "run", tmp_path / "out", layout=family, **SILENT)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.randint(0, 512, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, theirs(ids).logits)
    ours = moepp_jax.load(tmp_path / "run")
    np.testing.assert_allclose(
        ours.logits(ids.numpy()), theirs(ids).logits.detach().numpy(), atol=2e-5
    )
    texts = tokenizer_files.texts(200)
    assert again(texts)["input_ids"] == of(texts)["input_ids"] == ours.tokenizer.encode_batch(texts)
    assert again.eos_token_id == of.eos_token_id == ours.tokenizer.eos_id


# Ends


def greedy(model, **settings):
    return model.generate([[5, 6, 7]], max_new_tokens=12, temperature=0.0, **settings)[0]


@pytest.mark.parametrize("named", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_any_of_the_ends_ends_it(tmp_path, named, with_tokenizer):
    source = published.with_rows(tmp_path / "source", 512, eos_token_id=None)
    interop.upcycle(source, tmp_path / "free", **NO_POOL, **SILENT)
    free = greedy(moepp_jax.load(tmp_path / "free"))
    assert len(free) == 12
    last = next(i for i in range(3, 12) if free[i] not in free[:i])
    fields = published.fields_in(source)
    said = {"eos_token_id": [2, free[last]]}
    (source / named).write_text(json.dumps((fields if named == "config.json" else {}) | said))
    if named != "config.json":  # which is older, and is not asked then
        (source / "config.json").write_text(json.dumps(fields | {"eos_token_id": free[0]}))
    if with_tokenizer:
        texts = [file.read_text() for file in sorted(tiny.TEXT.glob("*.txt"))]
        Tokenizer.train(texts, 512).save(source / "tokenizer.model")
    interop.upcycle(source, tmp_path / "run", **NO_POOL, **SILENT)
    model = moepp_jax.load(tmp_path / "run")
    assert model.ends == {2, free[last]} and (model.tokenizer is not None) == with_tokenizer
    assert greedy(model) == free[:last]
    assert greedy(model, stop=[free[1]]) == free[:1]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"eos_token_id": [2, 512]}, "eos_token_id = 512 is beyond the 512 rows"),
        ({"eos_token_id": "2"}, r"generation_config\.json: eos_token_id = '2' must be a token id"),
        ({"eos_token_id": [True]}, r"eos_token_id = \[True\] must be a token id or a list"),
        ([], r"generation_config\.json holds a list, not a JSON object"),
        ("{", r"generation_config\.json cannot be read as JSON"),
    ],
)
def test_ends_of_no_use(tmp_path, said, why):
    source = published.with_rows(tmp_path / "source", 512)
    text = said if isinstance(said, str) else json.dumps(said)
    (source / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=why):
        interop.upcycle(source, tmp_path / "run", **NO_POOL, **SILENT)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    (source / "generation_config.json").unlink()
    interop.upcycle(source, tmp_path / "run", **NO_POOL, **SILENT)
    (tmp_path / "run" / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=why):
        open_run(tmp_path / "run").ends()


# Bad ones, and other runs


def test_a_tokenizer_that_cannot_be_that_of_the_model(tmp_path):
    source = published.whole(tmp_path / "source", "olmoe", rows=484)
    with pytest.raises(ConfigError, match=r"source/tokenizer\.json has 487 pieces, more than"):
        interop.upcycle(source, tmp_path / "run", **NO_POOL, **SILENT)
    (source / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    damaged, why = source / "tokenizer.json", r"source/tokenizer\.json cannot be read by .*Missing"
    with pytest.raises(ConfigError, match=why):
        interop.upcycle(source, tmp_path / "run", tokenizer=damaged, **NO_POOL, **SILENT)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    said = []
    interop.upcycle(source, tmp_path / "run", report=said.append, **NO_POOL)
    assert re.search(why, said[1])  # the weights are worth having without it
    tokenizer_files.save(tmp_path / "run", "olmoe")  # put there by hand
    with pytest.raises(ConfigError, match=r"run/tokenizer\.json has 487 pieces, more than"):
        moepp_jax.load(tmp_path / "run")


def test_a_tokenizer_that_is_put_there_later(tmp_path):
    source = published.whole(tmp_path / "source", "qwen3_moe")
    (source / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    said, run = [], tmp_path / "run"
    interop.upcycle(source, run, recipe(tmp_path), report=said.append, **NO_POOL)
    assert f"put the one that it was trained with into {run}, as" in said[1]
    (tmp_path / "tokenizer.json").rename(run / "tokenizer.json")
    config = read_config(run)
    assert config.data.tokenizer == str(run / "tokenizer.json")
    tokenizer = moepp_jax.load(run).tokenizer
    assert tokenizer.eos_id == 480  # by the run's generation_config.json
    assert train.train(config, run, **SILENT).step == 3


def test_what_is_no_olmoe(tmp_path):
    open_workdir(tmp_path / "run", tiny.config())
    with pytest.raises(ConversionError, match=r"as olmoe: config.model.qk_norm is always 'full'"):
        interop.to_hf(tmp_path / "run", tmp_path / "out", layout="olmoe", **SILENT)


def test_a_run_that_starts_from_another_has_its_tokenizer(trained, tmp_path):
    from moepp_jax import parent as parent_lib

    _, _, run = trained
    config = read_config(run).replace("data", tokenizer="").replace("train", steps=1)
    parent = parent_lib.given(str(run))
    train.train(config, tmp_path / "child", parent=parent, **SILENT)
    assert read_config(tmp_path / "child").data.tokenizer == str(
        tmp_path / "child" / "tokenizer.json"
    )
    a, b = moepp_jax.load(run), moepp_jax.load(tmp_path / "child")
    assert a.tokenizer.fingerprint == b.tokenizer.fingerprint and a.ends == b.ends


def test_routing_and_what_it_is_read_in(trained):
    _, _, run = trained
    model = moepp_jax.load(run)
    told = model.routing("The bees 日本")
    ids = model.tokenizer.encode("The bees 日本")
    assert told.record.rows.token.tolist() == model.tokenizer.document(ids)


def test_the_commands(tmp_path):
    """What a user types, one process each."""
    source, run, out = (tmp_path / name for name in ("source", "run", "out"))
    published.whole(source, "qwen3_moe")
    text = Path(recipe(tmp_path).data.sources["text"].path)

    def said(*words):
        done = subprocess.run(
            [sys.executable, "-m", "moepp_jax.main", *map(str, words)],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"XLA_FLAGS": hurry.XLA_FLAGS},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    fields = {"data.sources.text.path": text, "data.dir": tmp_path / "data", "data.seq_len": 64}
    fields |= {"train.steps": 2, "train.batch_size": 4, "moe.group_size": 64, "train.save_every": 2}
    fields |= {"model.loss_chunk": 16, "data.eval_fraction": 0.2}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    pool = ["--n_const=0", "--n_copy=0", "--n_zero=0"]
    said("convert", "upcycle", source, run, "--config=configs/tiny.py", *pool, *flags)
    said("train", f"--workdir={run}")
    assert "loss" in said("evaluate", f"--workdir={run}")
    made = said("generate", f"--workdir={run}", "--prompt=The 日本", "--max_new_tokens=4")
    assert made.startswith("The 日本")
    said("convert", "to-hf", run, out, "--layout=qwen3_moe")
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
