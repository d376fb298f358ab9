"""What a token becomes depends on no later token, although they compete for slots."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import moe
from tests.moe import cases
from tests.oracle import Spec

SPEC = Spec(4, 1, 1, 1, gamma=0.4, top_k=2)


@functools.cache
def two_layers(sequences=1):
    """Two layers, residual connections and the router's gating residual between them."""
    layer = dataclasses.replace(cases.layer(SPEC), sequences=sequences)
    params = [jax.tree.map(jnp.asarray, cases.params(SPEC, seed)) for seed in (0, 1)]

    @jax.jit
    def run(x, previous):
        drops = []
        for p in params:
            y, previous, stats = moe.local(x, previous, p, layer)
            x = x + y
            drops.append(moe.summarise(stats, layer.pool)["drop_rate"])
        return x, previous, jnp.stack(drops)

    return run


@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("t", [1, 2, 7, 12, 15])
def test_editing_the_future_leaves_the_past(t, sequences):
    """Of every sequence, in whatever groups they are: `x` has two of 16 tokens."""

    def run(x, previous):
        grouped = (a.reshape(-1, 16 * sequences, a.shape[-1]) for a in (x, previous))
        y, logits, drops = two_layers(sequences)(*grouped)
        return y.reshape(x.shape), logits.reshape(previous.shape), drops

    _, x, previous = cases.case(SPEC)
    _, other_x, other_previous = cases.case(SPEC, groups=4)
    edited_x, edited_previous = np.array(x), np.array(previous)
    edited_x[:, t:], edited_previous[:, t:] = other_x[2:, t:], other_previous[2:, t:]
    before = run(x, previous)
    after = run(edited_x, edited_previous)
    assert np.min(before[2]) > 0.25, "the test is of a layer that drops"
    for b, a in zip(before[:2], after[:2], strict=True):
        np.testing.assert_array_equal(a[:, :t], b[:, :t])
        assert np.all(np.any(a[:, t:] != b[:, t:], axis=-1))


def test_groups_do_not_compete():
    _, x, previous = cases.case(SPEC)
    edited = np.array(x)
    edited[0] = edited[0, ::-1]
    before, after = two_layers()(x, previous), two_layers()(edited, previous)
    np.testing.assert_array_equal(after[0][1], before[0][1])
    assert np.any(after[0][0] != before[0][0])
