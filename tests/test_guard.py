"""Gradients that cannot be right: found, told of with layer and texts, and left out if asked."""

import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moepp_jax import guard, run_data
from moepp_jax import mesh as mesh_lib
from moepp_jax import state as state_lib
from moepp_jax.analysis import health
from moepp_jax.checkpoint import Checkpoints
from moepp_jax.data import Dataset, summarise_batch
from moepp_jax.data.dataset import Origin
from moepp_jax.data.reading import Training
from moepp_jax.errors import ConfigError
from moepp_jax.interrupt import Stopped, StopRequest
from moepp_jax.metrics import DivergedError, read_metrics
from moepp_jax.train import train
from tests import tiny

SKIP = {"train.on_nonfinite": "skip"}


def assembled(axes=(1, 1, 1), **changes):
    sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.expert"), axes, strict=True))
    c = tiny.config(**{"moe.dispatch": "dropless"}, **sizes, **changes)
    mesh = mesh_lib.make_mesh(c, jax.devices()[: np.prod(axes)])
    parts = state_lib.assemble(c, mesh)
    step = state_lib.make_train_step(parts)
    lies = mesh_lib.batch_sharding(mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, parts.abstract)

    def taken(state, **changed):
        copy = jax.device_put(jax.device_get(state), shardings)  # what goes in is donated
        return jax.device_get(step(copy, jax.device_put(tiny.batch(c) | changed, lies)))

    return state_lib.init_state(parts), taken


def lost_mask():
    mask = tiny.batch(tiny.config())["loss_mask"].copy()
    mask[0, 0] = np.nan
    return mask


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2)])
def test_an_update_that_is_not_finite_is_left_out_and_the_next_one_made(axes):
    state, step = assembled(axes, **SKIP)
    after, metrics = step(state, loss_mask=lost_mask())
    assert np.isnan(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, after.params, jax.device_get(state.params))
    adam, schedule = optax.tree_utils.tree_get(after.opt_state, "mu"), after.opt_state[1][2]
    assert not any(moment.any() for moment in jax.tree.leaves(adam))
    assert after.step == schedule.count == 1, "steps are counted, the learning rate goes on"
    assert (after.guard.unsound, after.guard.in_a_row, after.guard.first) == (1, 1, 1)
    went_on, metrics = step(after)
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), went_on.params, after.params)
    assert all(distance > 0 for distance in jax.tree.leaves(moved["layers"]))
    assert (went_on.guard.unsound, went_on.guard.in_a_row, went_on.guard.longest) == (1, 0, 1)


def test_where_numbers_are_lost_is_told():
    """Backward the last block is the first; forward the layer whose router sees them."""
    state, step = assembled()
    after, _ = step(state, loss_mask=lost_mask())
    assert (after.guard.forward, after.guard.backward) == (-1, 1)
    assert "backward block 2 is the first" in guard.place(after.guard)
    assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(after.params)), "it was made"
    for layer in (0, 1):
        attention = state.params["layers"]["attention"]
        q = attention["q"].at[layer].set(jnp.inf)
        layers = state.params["layers"] | {"attention": attention | {"q": q}}
        lost, _ = step(state.replace(params=state.params | {"layers": layers}))
        assert lost.guard.forward == layer
        assert f"the router of MoE layer {layer + 1} is the first" in guard.place(lost.guard)


def test_a_gradient_far_above_the_usual_is_left_out():
    state, step = assembled(**SKIP, **{"train.skip_above": 3.0})
    made, metrics = step(state)
    assert made.guard.sound == 1 and made.guard.norm == pytest.approx(metrics["grad_norm"])
    usual = metrics["grad_norm"]
    for sound, norm, count in [(99, usual / 10, 0), (100, usual / 4, 1), (100, usual / 2, 0)]:
        known = state.guard.replace(sound=jnp.int32(sound), norm=jnp.float32(norm))
        after, _ = step(state.replace(guard=known))
        assert after.guard.unsound == count, (sound, norm)


def test_the_running_norm_is_the_mean_of_the_first_hundred():
    g, zero = guard.Guard.fresh(), jnp.int32(0)
    norms = np.random.default_rng(0).uniform(1, 2, 100).astype(np.float32)
    for norm in norms:
        g = g.after(zero, jnp.bool_(True), jnp.float32(norm), zero, zero)
        g = g.after(zero, jnp.bool_(False), jnp.float32(np.nan), zero, zero)
    assert float(g.norm) == pytest.approx(norms.mean(), rel=1e-5)
    assert (g.sound, g.unsound, g.longest) == (100, 100, 1)


def lose(monkeypatch, numbers):
    """The batches of these numbers have targets that count for no number."""
    read = Training.batches

    def lost(training, steps, rows):
        batch = read(training, steps, rows)
        for place in np.flatnonzero(np.isin(steps, numbers)):
            batch["loss_mask"][place, 0, 0] = np.nan
        return batch

    monkeypatch.setattr(Training, "batches", lost)


def config(data, **changes):
    steps = {"train.steps": 8, "train.save_every": 4, "train.log_every": 2}
    return tiny.config(**{"data.dir": str(data)}, **(steps | changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def test_a_run_that_stops_says_at_which_step_and_which_texts(data, tmp_path, monkeypatch):
    lose(monkeypatch, [4])
    said = r"step 6: loss = nan.* \(first at step 5, .* block 2 .*`moepp data batch 5`"
    with pytest.raises(DivergedError, match=said) as error:
        train(config(data), tmp_path, report=lambda line: None)
    assert error.value.began == 5
    named = re.search(r"batch of step 5 has 8 rows of text, documents (.*?);", str(error.value))[1]
    origins = run_data.open_data(config(data), tmp_path).of_batch(4)
    spans = sorted({(origin.first, origin.last) for origin in origins})
    assert named == ", ".join(f"{a} to {b}" if a < b else f"{a}" for a, b in spans)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [4]
    # The same folder goes on without that batch.
    state = train(config(data, **SKIP), tmp_path, report=lambda line: None)
    assert state.step == 8 and state.guard.unsound == 1
    skipped = [row.get("skipped") for row in read_metrics(tmp_path) if "loss" in row]
    assert skipped == [None, None, 1, 1]


def test_a_run_that_skips_is_the_same_when_it_was_interrupted(data, tmp_path, monkeypatch, capsys):
    lose(monkeypatch, [2, 5, 6])
    whole = train(config(data, **SKIP), tmp_path / "whole", report=lambda line: None)
    said = " ".join(capsys.readouterr().out.split())
    assert "step 6: 1 update was left out, first at step 6" in said
    assert "; the batch of step 6 has 8 rows of text, documents" in said

    def asked(request, step):
        request.signal = signal.SIGTERM if step == 6 else None
        return step == 6

    monkeypatch.setattr(StopRequest, "after", asked)
    with pytest.raises(Stopped, match="saved at step 6"):
        train(config(data, **SKIP), tmp_path / "a", report=lambda line: None)
    monkeypatch.undo()
    lose(monkeypatch, [2, 5, 6])
    again = train(config(data, **SKIP), tmp_path / "a", report=lambda line: None)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(whole))
    assert (whole.guard.unsound, whole.guard.longest) == (3, 2)


def test_too_many_in_a_row_end_the_run(data, tmp_path, monkeypatch):
    lose(monkeypatch, [4, 5, 6])
    few = SKIP | {"train.max_skipped": 2}
    said = r"2 updates in a row were left out, and config.train.max_skipped = 2; .* at step 5"
    with pytest.raises(DivergedError, match=said):
        train(config(data, **few), tmp_path, report=lambda line: None)


def test_the_documents_of_a_batch(data, tmp_path):
    c = config(data)
    dataset = run_data.open_data(c, tiny.run_folder(tmp_path, c))
    origins, batch = dataset.of_batch(1), dataset.train_batch(1)
    documents = list(dataset.sources["text"].train_documents)
    for tokens, origin in zip(batch["tokens"], origins, strict=True):
        of_row = np.concatenate(documents[origin.first : origin.last + 1])
        held = np.lib.stride_tricks.sliding_window_view(of_row, len(tokens))
        assert (held == tokens).all(axis=1).any()


def test_the_sources_and_documents_of_a_large_batch_are_a_few_words(data, tmp_path, monkeypatch):
    c = config(data)
    dataset = run_data.open_data(c, tiny.run_folder(tmp_path, c))
    web = [Origin("web", row, 1000 * row, 1000 * row + row % 2) for row in range(12)]
    origins = {6: [*web[::-1], web[0], Origin("books", 3, 4, 4)]}
    monkeypatch.setattr(Dataset, "of_batch", lambda dataset, step: origins[step])
    assert summarise_batch(dataset, 7) == (
        "the batch of step 7 has 1 row of books, documents 4; 13 rows of web, documents 0, 1,000 "
        "to 1,001, 2,000, 3,000 to 3,001, 4,000, 5,000 to 5,001, 6,000, 7,000 to 7,001 and 4 more; "
        "`moepp data batch 7` with this run's --workdir shows how they begin"
    )


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"train.on_nonfinite": "ignore"}, "must be one of 'stop', 'skip'"),
        ({"train.skip_above": 3.0}, "is of config.train.on_nonfinite = 'skip'"),
        (SKIP | {"train.skip_above": 0.5}, "must be 0 (off) or greater than 1"),
        (SKIP | {"train.max_skipped": 0}, "must be at least 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, said):
    with pytest.raises(ConfigError) as error:
        tiny.config(**changes)
    assert said in str(error.value)


def test_a_spike_of_the_loss_is_told_once():
    spikes, rng = health.Spikes(), np.random.default_rng(0)
    losses = 4 + 0.01 * rng.standard_normal(60)
    losses[[3, 30, 31]] = 6.0  # the first comes before it is known what is usual
    losses[50] = np.nan
    told = [i for i, loss in enumerate(losses) if spikes.look(float(loss))]
    assert told == [30]
