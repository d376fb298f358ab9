"""What is observed is what evaluation measures, on any mesh; and beside it, what a mask changes."""

import io
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from moepp_jax import api, interop, observe
from moepp_jax import evaluate as evaluate_lib
from moepp_jax import mesh as mesh_lib
from moepp_jax.analysis import record
from moepp_jax.data import Tokenizer, open_dataset
from moepp_jax.errors import ConfigError
from moepp_jax.moe import rules
from moepp_jax.moe.experts import Pool
from moepp_jax.observe import beside
from moepp_jax.workdir import read_config, tokenizer_file
from tests import reference, tiny


def config(data, axes=(1, 1, 1), **changes):
    mesh = dict(zip(("mesh.data", "mesh.fsdp", "mesh.expert"), axes, strict=True))
    return tiny.config(**{"data.dir": str(data / "data")} | mesh | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("observe")
    tiny.run_folder(folder / "run", config(folder))
    return folder


@pytest.fixture(autouse=True)
def as_many_devices_as_the_mesh_says(monkeypatch):
    make_mesh = mesh_lib.make_mesh

    def of(c, devices=None):
        count = math.prod((c.mesh.data, c.mesh.fsdp, c.mesh.expert))
        return make_mesh(c, devices or jax.devices()[: count if count > 0 else None])

    monkeypatch.setattr(mesh_lib, "make_mesh", of)


def made(root, axes=(1, 1, 1), name="one"):
    file, text = root / f"{name}.parquet", observe.Text(tokens=100_000)
    observe.analyze(config(root, axes), root / "run", None, text, [file])
    return record.read(file)


@pytest.fixture(scope="module")
def one(root):
    with pytest.MonkeyPatch.context() as patch:
        make_mesh = mesh_lib.make_mesh
        patch.setattr(mesh_lib, "make_mesh", lambda c: make_mesh(c, jax.devices()[:1]))
        return made(root)


def test_it_is_what_evaluation_measures(root, one):
    want = evaluate_lib.evaluate_run(config(root), root / "run")
    losses = one.rows.loss[~np.isnan(one.rows.loss)]
    assert len(losses) == want["eval_tokens"]
    assert losses.mean() == pytest.approx(want["eval_loss"], rel=1e-5)
    # Evaluation averages over groups: the padding of the last row has a part in them.
    by_layer = one.ffn.mean(axis=1)
    np.testing.assert_allclose(by_layer, want["eval_ffn_experts_per_token_by_layer"], rtol=1e-2)
    np.testing.assert_allclose(one.load(), want["eval_load"], atol=2e-2)
    entropy = one.rows.entropy.mean(axis=1)
    np.testing.assert_allclose(entropy, want["eval_router_entropy_by_layer"], rtol=1e-2)
    assert one.meta.wanted == config(root).moe.rule.ffn_load
    assert one.meta.layers == (1, 2) and one.meta.step == 3 and one.meta.name == "run"


def test_a_tokens_row_holds_its_own_way(root, one):
    """Nothing is dropped, the best score is first, and gates are what the rule makes of them."""
    rows = one.rows
    assert rows.kept.all() and (rows.experts < one.meta.num_experts).all()
    assert (rows.scores[..., 0] >= rows.scores[..., 1]).all()
    gates = rows.gates.sum(axis=-1)  # of the rule's "renormalise_nonzero": 1, or 0 of zeros alone
    only_zero = (one.kind == 3).all(axis=-1)
    np.testing.assert_allclose(gates, np.where(only_zero, 0.0, 1.0), atol=2e-3)


def test_documents_are_those_of_the_text(root, one):
    dataset = open_dataset(config(root))
    tokenizer = dataset.tokenizer
    text = b"".join(one.bytes_of(t) for t in one.rows.token.tolist()).decode()
    documents = dataset.sources["text"].eval_documents
    assert text == "".join(tokenizer.decode(documents[i]) for i in range(len(documents)))
    assert one.text_of(tokenizer.bos_id) == "<s>"
    whole = list(one.documents())
    assert len(whole) == len(documents)
    for part in whole:
        size = part.stop - part.start
        assert one.rows.position[part].tolist() == list(range(size))
        # A row's last token is followed by the first of the next row; a document's by nothing.
        assert np.isnan(one.rows.loss[part]).tolist() == [False] * (size - 1) + [True]


@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 1, 4)])
def test_any_mesh_observes_the_same(root, one, axes):
    other = made(root, axes, name="mesh")
    for name in ("token", "document", "position", "place", "experts", "kept"):
        np.testing.assert_array_equal(getattr(other.rows, name), getattr(one.rows, name))
    for name in ("loss", "gates", "scores", "entropy"):
        np.testing.assert_allclose(
            getattr(other.rows, name), getattr(one.rows, name), rtol=2e-3, atol=1e-6
        )
    for kind, found in one.meta.more["switched_off"].items():
        assert other.meta.more["switched_off"][kind] == pytest.approx(found, rel=1e-5)


def test_every_kind_is_switched_off_in_turn(root, one):
    found = one.meta.more["switched_off"]
    assert list(found) == ["tokens", "none", "constant", "copy", "zero"]
    losses = one.rows.loss[~np.isnan(one.rows.loss)]
    assert found["none"]["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert found["none"]["ffn_experts"] == pytest.approx(one.ffn.mean(), rel=1e-5)
    for kind in ("constant", "copy", "zero"):
        assert found[kind]["ffn_experts"] > found["none"]["ffn_experts"]
        assert abs(found[kind]["loss"] - found["none"]["loss"]) > 1e-4
    assert "saturation" not in one.meta.more  # there is one checkpoint


def test_a_masked_expert_is_never_chosen():
    rule = rules.make("moepp", Pool(4, 2, 1, 1), top_k=2)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        n: p.std * jax.random.normal(k, p.shape)
        for k, (n, p) in zip(keys, rule.params(8, 1.0).items(), strict=False)
    }
    x, previous = jax.random.normal(keys[2], (1, 500, 8)), jnp.zeros((1, 500, 8))
    assert np.isin([4, 5], rule.route(x, previous, params).experts).all()
    off = beside.masked(rule, range(4, 6))
    routing = off.route(x, previous, params)
    assert not np.isin([4, 5], routing.experts).any()
    assert np.isfinite(routing.gates).all()
    # Who had not chosen them chooses as before.
    before = rule.route(x, previous, params).experts[0]
    free = ~np.isin(before, [4, 5]).any(axis=-1)
    np.testing.assert_array_equal(routing.experts[0][free], before[free])
    assert beside.kinds_to_mask(rule) == {
        "constant": range(4, 6), "copy": range(6, 7), "zero": range(7, 8)
    }  # fmt: skip
    assert beside.kinds_to_mask(rules.make("vanilla", Pool(4), top_k=2)) == {}


@pytest.mark.parametrize("name", ["deepseek", "longcat"])
def test_a_bias_on_the_scores_brings_no_masked_expert_back(name):
    pool = Pool(4, 0, 1, 0) if name == "longcat" else Pool(5)
    rule = rules.make(name, pool, top_k=2)
    keys = jax.random.split(jax.random.key(0), 3)
    described = rule.params(8, 1.0)
    params = {
        n: p.mean + p.std * jax.random.normal(k, p.shape)
        for k, (n, p) in zip(keys, described.items(), strict=False)
    }
    params |= {n: jnp.full(p.shape, p.mean) for n, p in rule.state().items()}
    params["bias"] = jnp.where(jnp.arange(pool.size) < 4, -0.6, 0.6)
    x, previous = jax.random.normal(keys[2], (1, 200, 8)), jnp.zeros((1, 200, pool.size))
    assert (rule.route(x, previous, params).experts == 4).any()
    found = beside.masked(rule, range(4, 5)).route(x, previous, params).experts
    assert not (found == 4).any()


def test_no_two_analyses_write_into_one_folder(root, tmp_path):
    out, text = tmp_path / "out", observe.Text(tokens=64, sample=0)
    out.mkdir()
    (out / ".analyze-left").mkdir()
    hold = (
        "import sys, time, pathlib\nfrom moepp_jax.claim import claimed\n"
        "with claimed(pathlib.Path(sys.argv[1])):\n    print('has', flush=True)\n    time.sleep(60)"
    )
    lock = out / ".analyze.lock"
    other = subprocess.Popen([sys.executable, "-c", hold, lock], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"has\n"
        with pytest.raises(ConfigError, match=rf"process {other.pid} of .*, writes there: wait"):
            observe.analyze(config(root), root / "run", None, text, [out / "routing.parquet"])
    finally:
        other.kill()
        other.wait()
    (out / "against.parquet").write_bytes(b"of an earlier text")
    observe.analyze(config(root), root / "run", None, text, [out / "routing.parquet"])
    # What a killed one left is gone, and what is of another text.
    assert [entry.name for entry in out.iterdir()] == ["routing.parquet"]


def test_a_folder_that_cannot_be_written_is_named(root, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"--out=.*file cannot be written: "):
        observe.analyze(
            config(root), root / "run", None, observe.Text(tokens=64), [tmp_path / "file" / "x"]
        )


def test_saturation_by_hand():
    """One layer, two tokens, K = 2: of the last four choices two were there, then three."""
    at = {1: [[0, 1], [5, 6]], 2: [[1, 0], [2, 6]], 3: [[0, 1], [2, 3]]}
    found = beside.saturation(lambda step: [np.array([at[step]])], [1, 2, 3], 7)
    assert found == {"steps": [1, 2, 3], "overlap": [[0.5], [0.75], [1.0]], "tokens": 2}


def test_earlier_checkpoints_are_compared_with(root, tmp_path):
    c = config(tmp_path)
    tiny.run_folder(tmp_path / "run", c)
    tiny.run_folder(tmp_path / "run", c, step=5)
    found = made(tmp_path, name="two").meta.more["saturation"]
    assert found["steps"] == [3, 5]
    assert found["overlap"] == [[1.0, 1.0], [1.0, 1.0]]  # the same parameters


def test_two_runs_are_observed_on_the_same_tokens(root, tmp_path):
    other = tiny.run_folder(tmp_path / "other", config(root, **{"seed": 1}))
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    text = observe.Text(tokens=200)
    observe.analyze(config(root), root / "run", None, text, files, [str(other)])
    a, b = map(record.read, files)
    np.testing.assert_array_equal(a.rows.token, b.rows.token)
    assert (a.rows.experts != b.rows.experts).any()
    assert (a.meta.name, b.meta.name) == ("run", "other")
    changed = config(tmp_path, **{"model.vocab_size": 400})
    foreign = tiny.run_folder(tmp_path / "foreign", changed)
    with pytest.raises(ConfigError, match="--against=nowhere: workdir nowhere is no folder"):
        observe.analyze(config(root), root / "run", None, text, files, ["nowhere"])
    with pytest.raises(ConfigError, match=r"foreign: its tokenizer is another than that of"):
        observe.analyze(config(root), root / "run", None, text, files, [str(foreign)])


def test_a_loaded_model_tells_its_routing(root, one):
    model = api.load(root / "run")
    told = model.routing("In the beginning")
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode("In the beginning")]
    assert told.record.rows.token.tolist() == [*ids, model.tokenizer.eos_id]
    assert repr(told).startswith("Routing(run, step 3: ")
    again = model.routing(["In the beginning", "Of two", "and the third of all of these"])
    first = slice(0, len(ids))
    np.testing.assert_array_equal(
        again.record.rows.experts[:, first], told.record.rows.experts[:, first]
    )
    third = again.record.rows.document == 2
    alone = model.routing("and the third of all of these").record.rows
    np.testing.assert_array_equal(again.record.rows.experts[:, third], alone.experts)
    np.testing.assert_allclose(again.record.rows.loss[third], alone.loss, rtol=1e-4)
    for wrong in (5, ["a", 3], None, b"abc"):
        with pytest.raises(ConfigError, match="must be one text or several"):
            model.routing(wrong)
    with pytest.raises(ConfigError, match="the texts are empty"):
        model.routing(["", ""])
    whole = api.load(root / "run", all_devices=True).routing("In the beginning")
    np.testing.assert_array_equal(whole.record.rows.experts, told.record.rows.experts)
    with pytest.raises(ValueError, match="only_generate"):
        api.load(root / "run", only_generate=True).routing("x")


def test_a_model_without_a_tokenizer(root, tmp_path):
    c = config(root)
    folder = tiny.run_folder(tmp_path / "run", c)
    tokenizer_file(folder).unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.model is missing: put the tokenizer"):
        observe.analyze(c, folder, None, observe.Text(), [tmp_path / "x.parquet"])
    with pytest.raises(ConfigError, match="no tokenizer"):
        api.load(folder).routing("x")
    assert not (tmp_path / "x.parquet").exists()


def test_a_released_checkpoint(tmp_path):
    """In the authors' layout, with a tokenizer for its vocabulary; a larger one is refused."""
    folder = tmp_path / "released"
    interop.from_hf(reference.ROOT / "default", folder)
    write_characters(folder, 100)
    c = read_config(folder).replace("mesh", data=1).replace("train", batch_size=1)
    file, note = tmp_path / "x.parquet", tmp_path / "note.txt"
    note.write_text("the beginning of all " * 20)
    observe.analyze(c, folder, None, observe.Text(files=[str(note)]), [file])
    found = record.read(file)
    assert found.meta.counts == tuple(c.moe.rule.pool) and found.num_layers == 3
    assert found.rows.experts.max() < found.meta.num_experts
    seen = b"".join(found.bytes_of(token) for token in found.rows.token.tolist()).decode()
    assert seen.strip() in note.read_text() and len(seen) > 300
    write_characters(folder, 100, like=tiny.TEXT)
    with pytest.raises(ConfigError, match=r"pieces, more than config\.model\.vocab_size = 128"):
        observe.analyze(c, folder, None, observe.Text(files=[str(note)]), [file])


def write_characters(folder, size, like=None):
    """A tokenizer of characters, or that of a text with bytes."""
    if like is not None:
        lines = [file.read_text(errors="ignore") for file in sorted(like.iterdir())]
        Tokenizer.train(lines, 384).save(tokenizer_file(folder))
        return
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the beginning of all things was here"] * 9),
        model_writer=made,
        model_type="char",
        vocab_size=size,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer_file(folder).write_bytes(made.getvalue())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (observe.Text(tokens=0), "--tokens=0 must be at least 1"),
        (observe.Text(sources=["wiki"]), "--source=wiki: the run has the sources text"),
        (observe.Text(sources=["text", "text"]), "two parts of the text are called 'text'"),
        (observe.Text(suite=True, benchmarks="nowhere"), "--benchmarks=nowhere has no files"),
    ],
)
def test_what_cannot_be_looked_at(root, text, said):
    with pytest.raises(ConfigError, match=said):
        observe.analyze(config(root), root / "run", None, text, [root / "none.parquet"])
    assert not (root / "none.parquet").exists()
