"""The authors' arithmetic: their checkpoints through our model give their numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import model as model_lib
from moepp_jax import vocabulary
from tests import reference


@pytest.fixture(scope="module", params=reference.NAMES)
def case(request):
    config = reference.config(request.param)
    params = jax.tree.map(jnp.asarray, reference.params(request.param))
    model = model_lib.build(config, dispatch="dropless")

    @jax.jit
    def run(tokens, positions, mask):
        out = model.apply({"params": params}, tokens, positions, mask)
        return out, vocabulary.logits(params, out.hidden)

    return config, params, run, reference.expected(request.param)


def close(actual, expected, tolerance=2e-5):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def test_declared_parameters_are_theirs(case):
    config, params, *_ = case
    model = model_lib.build(config)
    declared = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, declared) == jax.tree.map(jnp.shape, params)


def test_forward(case):
    _, params, run, want = case
    tokens = jnp.asarray(want["input_ids"])
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    mask = np.broadcast_to(np.tril(np.ones((24, 24), bool)), (2, 24, 24))
    out, logits = run(tokens, positions, mask)
    close(out.router_logits, want["router_logits"])
    close(out.states, want["hidden_states"][:-1])
    close(out.hidden, want["hidden_states"][-1])
    close(logits, want["logits"])
    kept = np.asarray(out.statistics.kept).mean(axis=1)
    np.testing.assert_allclose(kept, want["selected"].mean(axis=(1, 2)), atol=1e-6)
    losses = vocabulary.token_losses(params, out.hidden, jnp.roll(tokens, -1, axis=1), chunk=8)
    np.testing.assert_allclose(np.mean(losses[:, :-1]), want["lm_loss"], rtol=2e-6)


def test_left_padding(case):
    _, _, run, want = case
    real = want["padded_mask"].astype(bool)
    positions = np.where(real, np.cumsum(real, axis=1) - 1, 1)
    mask = np.tril(np.ones((24, 24), bool)) & real[:, None, :]
    _, logits = run(want["padded_ids"], positions, mask)
    close(np.asarray(logits)[real], want["padded_logits"][real])
