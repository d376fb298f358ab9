"""Held-out loss is that of each document alone; padding counts for nothing; any mesh says so."""

import functools
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import evaluate as evaluate_lib
from moepp_jax import mesh as mesh_lib
from moepp_jax import model as model_lib
from moepp_jax import state as state_lib
from moepp_jax import vocabulary
from moepp_jax.checkpoint import CheckpointError
from moepp_jax.data import Dataset, open_dataset
from moepp_jax.errors import ConfigError
from tests import tiny


@functools.cache
def parameters():
    model = model_lib.build(tiny.config())
    return jax.jit(model.init)(jax.random.key(0))


def batches():
    """A full batch of packed rows, and one with three rows and then padding."""
    c = tiny.config()
    full = tiny.batch(c, seed=1)
    part = {name: np.where(np.arange(8)[:, None] < 3, v, 0) for name, v in full.items()}
    return [tiny.batch(c), {k: v.astype(full[k].dtype) for k, v in part.items()}]


def evaluated(axes=(1, 1, 1), dispatch="dropless", of=None, **changes):
    c = tiny.config(
        **dict(zip(("mesh.data", "mesh.fsdp", "mesh.expert"), axes, strict=True)),
        **{"moe.eval_dispatch": dispatch} | changes,
    )
    mesh = mesh_lib.make_mesh(c, jax.devices()[: math.prod(axes)])
    abstract = jax.tree.map(jnp.asarray, parameters())
    params = jax.device_put(abstract, mesh_lib.shardings(model_lib.describe(c), mesh))
    return evaluate_lib.make_evaluate(state_lib.assemble(c, mesh))(
        params, batches() if of is None else of
    )


@functools.cache
def on_one_device():
    return evaluated()


def naive():
    """(nats, targets, FFN experts by layer, real tokens), one document at a time."""
    c = tiny.config(**{"moe.dispatch": "dropless"})
    model = model_lib.build(c)

    @jax.jit
    def run(tokens):
        L = tokens.size
        places = jnp.arange(L)[None]
        out = model(parameters(), tokens[None], places, jnp.zeros_like(places))
        return vocabulary.logits(out.matrix, out.hidden[0]), out.router_logits[:, 0]

    nats, targets, real, experts = 0.0, 0, 0, np.zeros(c.model.num_layers)
    for batch in batches():
        for row in range(8):
            segments = batch["segments"][row]
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                length = here.sum()
                tokens = np.zeros(c.data.seq_len, np.int32)
                tokens[:length] = batch["tokens"][row][here]
                logits, router = (np.asarray(a, np.float64) for a in run(tokens))
                logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
                for place, target in enumerate(batch["targets"][row][here]):
                    if batch["loss_mask"][row][here][place]:
                        nats -= logp[place, target]
                        targets += 1
                best = np.argsort(-router[:, :length], axis=-1)[..., : c.moe.rule.top_k]
                experts += (best < c.moe.n_ffn).sum(axis=(1, 2))
                real += length
    return nats, targets, experts / real


def test_it_is_the_loss_of_every_document_alone():
    got = on_one_device()
    nats, targets, experts = naive()
    assert got["eval_tokens"] == targets
    assert got["eval_loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert got["eval_perplexity"] == pytest.approx(math.exp(nats / targets), rel=1e-4)
    np.testing.assert_allclose(got["eval_ffn_experts_per_token_by_layer"], experts, rtol=1e-5)
    assert got["eval_ffn_experts_per_token"] == pytest.approx(experts.mean(), rel=1e-5)
    np.testing.assert_allclose(got["eval_load"].sum(axis=1), 2.0, rtol=1e-6)
    assert got["eval_drop_rate"] == 0


def test_the_number_of_devices_does_not_matter():
    assert_close(evaluated((2, 2, 2)), on_one_device())


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 1, 2)])
def test_a_batch_in_parts_is_evaluated_as_a_whole_one(axes):
    """It takes the memory of a part, as training does."""
    found = evaluated(axes, **{"train.accumulate": 2})
    for name, value in on_one_device().items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    c = tiny.config(**{"train.accumulate": 4})
    parts = state_lib.assemble(c, mesh_lib.make_mesh(c, jax.devices()[:1]))
    whole = state_lib.assemble(tiny.config(), parts.mesh)
    batch = tiny.batch(c)
    taken = [
        evaluate_lib.make_sums(one).lower(one.abstract.params, batch).compile().memory_analysis()
        for one in (parts, whole)
    ]
    assert taken[0].temp_size_in_bytes < 0.5 * taken[1].temp_size_in_bytes


def test_capacity_can_be_evaluated_too_and_drops():
    got = evaluated(dispatch="capacity")
    assert got["eval_drop_rate"] > 0.03
    # The first eighth drops least, and all eight together what the mean says, weighed by choices.
    by_part = got["eval_drop_rate_by_part"]
    assert by_part.shape == (8,) and by_part[0] == by_part.min() < by_part.max()
    assert got["eval_drop_rate_by_kind"].shape == (4,)
    # What is dropped is not served, but was asked for.
    np.testing.assert_allclose(got["eval_load"].sum(axis=1), 2.0, rtol=1e-6)
    asked = got["eval_load"][:, : tiny.config().moe.n_ffn].sum(axis=1)
    assert (got["eval_ffn_experts_per_token_by_layer"] < asked).all()


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="no held-out text"):
        evaluated(of=[])


def test_sources_are_averaged_by_their_shares_of_training_not_of_the_held_out_text():
    read = []

    def source(name, bytes_per_target):
        def eval_batches(part, rows):
            read.append((name, part))
            return [name]

        return SimpleNamespace(eval_batches=eval_batches, bytes_per_target=bytes_per_target)

    def evaluate(params, batches):
        loss, tokens, load = {"a": (2.0, 1000, 1.0), "b": (4.0, 10, 3.0)}[next(iter(batches))]
        return {"eval_loss": loss, "eval_perplexity": 0, "eval_tokens": tokens, "load": [load]}

    dataset = object.__new__(Dataset)
    dataset.shares = {"a": 0.9, "b": 0.1}
    dataset.sources = {"a": source("a", 4.0), "b": source("b", 2.0)}

    def evaluate_arrays(*args):
        return {k: np.array(v) if k == "load" else v for k, v in evaluate(*args).items()}

    got = evaluate_lib.evaluate_mixture(evaluate_arrays, None, dataset, 5, np.arange(8))
    assert read == [("a", 4), ("b", 1)]  # a batch at least
    assert got["eval_loss"] == pytest.approx(2.2) and got["load"] == pytest.approx([1.2])
    assert got["eval_perplexity"] == pytest.approx(math.exp(2.2))
    assert got["eval_tokens"] == 1010
    assert got["eval_bits_per_byte"] == pytest.approx(2.2 / math.log(2) / 3.8)
    assert (got["eval_loss/a"], got["eval_loss/b"], got["eval_tokens/b"]) == (2.0, 4.0, 10)
    assert got["eval_bits_per_byte/b"] == pytest.approx(4 / math.log(2) / 2)


def test_a_loss_that_is_too_large_for_a_perplexity_or_lost_is_told_as_it_is():
    assert evaluate_lib._perplexity(1e4) == math.inf and math.isnan(
        evaluate_lib._perplexity(math.nan)
    )


def test_an_offset_is_a_budget(tmp_path):
    """The higher it is, the fewer FFN experts a token runs, from all of its choices to none."""
    c = tiny.config(**{"data.dir": str(tmp_path / "data"), "mesh.expert": 2})
    tiny.run_folder(tmp_path / "run", c)
    experts = [
        evaluate_lib.evaluate_run(
            c.replace("moe.rule", zero_offset=offset), tmp_path / "run", num_batches=1
        )["eval_ffn_experts_per_token"]
        for offset in (-1e4, -0.5, 0.0, 0.5, 1e4)
    ]
    assert experts == sorted(experts, reverse=True) and len(set(experts)) == 5
    assert (experts[0], experts[-1]) == (2.0, 0.0)


def test_a_run_is_evaluated_on_all_of_its_held_out_text(tmp_path):
    c = tiny.config(**{"data.dir": str(tmp_path / "data"), "mesh.expert": 2})
    with pytest.raises(ConfigError, match="is not prepared"):
        evaluate_lib.evaluate_run(c, tmp_path / "run")
    tiny.run_folder(tmp_path / "run", c)
    with pytest.raises(CheckpointError, match=r"checkpoint 4 .* steps that may be used .*: 3"):
        evaluate_lib.evaluate_run(c, tmp_path / "run", step=4)
    with pytest.raises(ConfigError, match=r"-1 batches cannot be evaluated: .* 0 for all"):
        evaluate_lib.evaluate_run(c, tmp_path / "run", num_batches=-1)
    heard = []
    first = evaluate_lib.evaluate_run(
        c, tmp_path / "run", progress=lambda *done: heard.append(done), num_batches=1
    )
    assert heard == [(1, 1)]
    heard.clear()
    got = evaluate_lib.evaluate_run(c, tmp_path / "run", progress=lambda *done: heard.append(done))
    assert heard == [(1, len(heard))] * len(heard) and heard
    assert json.loads(json.dumps(got)) == got
    dataset = open_dataset(c)
    documents = dataset.sources["text"].eval_documents
    assert got["step"] == 3
    one = next(dataset.eval_batches())
    assert first["eval_tokens"] == one["loss_mask"].sum() < got["eval_tokens"]
    assert got["eval_tokens"] == sum(documents.lengths) - len(documents)
    bits = got["eval_loss"] * got["eval_tokens"] / math.log(2)
    assert got["eval_bits_per_byte"] == pytest.approx(bits / sum(documents.num_bytes))
    # The fresh parameters of seed 0, which the helper put there, on the same batches:
    assert_close(
        {k: np.asarray(v) for k, v in got.items() if k not in ("step", "eval_bits_per_byte")},
        evaluated(of=dataset.eval_batches()),
    )
