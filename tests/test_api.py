"""A trained model in Python: logits, text, and errors that say what is wrong."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moepp_jax
from moepp_jax import api, seal
from moepp_jax import model as model_lib
from moepp_jax.checkpoint import CheckpointError
from moepp_jax.errors import ConfigError
from tests import reference, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("api")
    return tiny.run_folder(path / "run", tiny.config(**{"data.dir": str(path / "data")}))


@pytest.fixture(scope="module")
def model(folder):
    return moepp_jax.load(folder)


@pytest.fixture(scope="module")
def theirs():
    params = jax.tree.map(jnp.asarray, reference.params("default"))
    return api.Model(reference.config("default"), params), reference.expected("default")


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_logits_are_the_authors(theirs):
    model, want = theirs
    logits = model.logits(want["input_ids"])
    assert logits.shape == want["logits"].shape and logits.dtype == jnp.float32
    close(logits, want["logits"])


def test_padding_on_either_side_is_seen_by_no_token(theirs):
    model, want = theirs
    ids, mask = want["padded_ids"], want["padded_mask"].astype(bool)
    left = np.asarray(model.logits(ids, want["padded_mask"]))
    close(left[mask], want["padded_logits"][mask])

    turned_ids, turned_mask = np.zeros_like(ids), np.zeros_like(mask)
    for row in range(len(ids)):
        count = mask[row].sum()
        turned_ids[row, :count], turned_mask[row, :count] = ids[row][mask[row]], True
    right = np.asarray(model.logits(turned_ids, turned_mask))
    close(right[turned_mask], left[mask])
    turned_ids[~turned_mask] = 7  # whatever stands in the padding
    np.testing.assert_array_equal(
        np.asarray(model.logits(turned_ids, turned_mask))[turned_mask], right[turned_mask]
    )


@pytest.mark.parametrize(
    ("tokens", "mask", "said"),
    [
        (np.zeros(5, int), None, r"tokens of shape \(5,\) must be \(sequences, tokens\)"),
        (np.zeros((2, 5), int), np.ones((2, 4)), r"mask of shape \(2, 4\) must have that of"),
        (np.array([[0, 384]]), None, "tokens hold ids outside the vocabulary of 384"),
        (np.array([[0, -1]]), None, "ids outside the vocabulary of 384"),
        (np.array([[0.5, 1.0]]), None, "tokens of type float64 must be whole numbers"),
    ],
)
def test_tokens_that_are_none(model, tokens, mask, said):
    with pytest.raises(ValueError, match=said):
        model.logits(tokens, mask)


def test_a_loaded_model_is_the_one_that_was_saved(model, folder):
    assert model.config.data.sources["text"].path == str(tiny.TEXT)
    leaves = jax.tree.leaves(model.params)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    assert {device for leaf in leaves for device in leaf.devices()} == {jax.devices()[0]}
    fresh = jax.jit(model_lib.build(model.config).init)
    expected = fresh(jax.random.key(model.config.seed))
    jax.tree.map(np.testing.assert_array_equal, model.params, expected)


def test_a_model_that_only_generates_is_held_once(model, folder):
    text = model.generate("The river")
    slim = moepp_jax.load(folder, only_generate=True)
    stacked = jax.tree.leaves(slim._generator._programs._params["layers"])
    assert slim.generate("The river") == slim.generate("The river") == text
    assert all(leaf.is_deleted() for leaf in stacked)
    assert slim.params is None
    with pytest.raises(ValueError, match="loaded with only_generate: it has no logits"):
        slim.logits([[1, 2]])
    model.logits([[1, 2]])  # the other one is whole


def test_a_model_with_an_offset(model, folder):
    """Its zero-computation experts are used more or less, in logits and in generation."""
    tokens = np.arange(24)[None] % 384
    usual = model.logits(tokens)
    np.testing.assert_array_equal(moepp_jax.load(folder, zero_offset=0.0).logits(tokens), usual)
    never = moepp_jax.load(folder, zero_offset=-1e4)
    assert np.abs(never.logits(tokens) - usual).max() > 1e-3
    slim = moepp_jax.load(folder, only_generate=True, zero_offset=-1e4)
    assert slim.generate("The river") == never.generate("The river") != model.generate("The river")


def test_one_text_several_texts_and_ids(model):
    texts = ["The river", "A much longer beginning of a sentence"]
    continued = model.generate(texts)
    assert [type(text) for text in continued] == [str, str]
    assert model.generate(texts[0]) == continued[0]
    ids = [[1, *model.tokenizer.encode(text)] for text in texts]
    new = model.generate(ids)
    assert [model.tokenizer.decode(tokens) for tokens in new] == continued
    assert model.generate([np.array(ids[0])]) == new[:1]
    assert max(map(len, new)) <= 8 and all(type(t) is int for t in new[0])
    assert len(model.generate("The river", max_new_tokens=2)) < len(continued[0])
    assert model.generate([]) == []


def test_the_stream_is_the_text(model):
    text = model.generate("The river")
    assert "".join(model.stream("The river")) == text
    assert model.speed.decoded_tokens > 0
    stop = text[2:4]
    assert model.generate("The river", stop=stop) == text[: text.index(stop)]
    assert "".join(model.stream("The river", stop=[stop])) == text[: text.index(stop)]


def test_a_stop_token_ends_a_text(model):
    ids = [[1, 5, 6]]
    (whole,) = model.generate(ids)
    assert model.generate(ids, stop=[whole[3]]) == [whole[: whole.index(whole[3])]]


def test_samples_of_a_prompt(model):
    heard = []
    warm = {"temperature": 2.0, "seed": 1, "progress": heard.append}
    texts = model.generate(["The river", "A"], num_samples=3, batch_size=2, **warm)
    assert [len(set(samples)) for samples in texts] == [3, 3]
    assert model.generate("A", num_samples=2, **warm) == texts[1][:2]
    assert model.generate(["A", "A"], **warm) == [texts[1][0]] * 2
    assert sum(heard) > 9 * 2


def test_a_model_over_all_devices_is_the_same(model, folder):
    cut = moepp_jax.load(folder, all_devices=True)
    matrix = cut.params["embedding"]
    assert len(matrix.addressable_shards[0].data) * jax.device_count() == len(matrix)
    tokens = np.arange(3, 33).reshape(3, 10)
    close(cut.logits(tokens), model.logits(tokens))


def test_all_devices_are_enough_where_a_group_is_several_sequences():
    config = tiny.config(**{"moe.dispatch": "capacity", "moe.group_size": 2 * 32})
    assert api.over_all_devices(config).size == jax.device_count()


@pytest.mark.parametrize(
    ("prompts", "settings", "said"),
    [
        ([1, 2, 3], {}, "prompt 0 = 1 is no list of token ids: give one text, several texts"),
        (["text", [1]], {}, "prompt 0 = 'text' is no list of token ids"),
        ([[1.5]], {}, r"prompt 0 = \[1.5\] is no list of token ids"),
        ([[1], []], {}, "prompt 1 is empty: give at least one token"),
        ("a", {"top_p": 0}, "config.generate.top_p = 0.0 must be greater than 0"),
        ("a", {"temperature": -1.0}, "config.generate.temperature = -1.0 must be at least 0"),
        ("a", {"num_samples": 0}, "num_samples = 0 must be at least 1"),
        ("a", {"batch_size": 0}, "batch_size = 0 must be at least 1"),
        ("a", {"stop": ""}, "stop = '' must be a text of at least one character"),
        ("a", {"min_p": 1.0}, "config.generate.min_p = 1.0 must be at least 0 and less than 1"),
        ("a", {"max_new_tokens": 0}, "config.generate.max_new_tokens = 0 must be at least 1"),
        ("a", {"max_tokens": 5}, "unknown field config.generate.max_tokens = 5: did you mean"),
    ],
)
def test_prompts_and_settings_of_no_use(model, prompts, settings, said):
    with pytest.raises(ConfigError, match=said):
        model.generate(prompts, **settings)


def test_no_texts_without_a_tokenizer(theirs):
    with pytest.raises(ConfigError, match="has no tokenizer: give lists of token ids"):
        theirs[0].generate("text")
    with pytest.raises(ConfigError, match="has no tokenizer: give token ids to stop at"):
        theirs[0].generate([[1]], stop="text")


def test_what_cannot_be_verified_is_refused_where_that_is_asked_for(folder, tmp_path, capsys):
    moepp_jax.load(folder, strict=True)
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "3" / "checksums.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"3 .* cannot be verified: .*; without strict=True it"
    ):
        moepp_jax.load(tmp_path / "run", strict=True)
    moepp_jax.load(tmp_path / "run")
    assert "cannot be verified" in capsys.readouterr().err


def test_what_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path} holds no run"):
        moepp_jax.load(tmp_path)
    with pytest.raises(ConfigError, match=f"{tmp_path}/no is no folder"):
        moepp_jax.load(tmp_path / "no")
    fields = seal.opened(json.loads((folder / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=f"there is no checkpoint in {tmp_path}"):
        moepp_jax.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint 7 .* may be used instead: 3"):
        moepp_jax.load(folder, step=7)

    (tmp_path / "checkpoints").symlink_to(folder / "checkpoints")
    fields["model"]["hidden_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"another architecture(.|\n)*\[384, 32\] saved"):
        moepp_jax.load(tmp_path)
