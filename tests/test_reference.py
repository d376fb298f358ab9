"""The authors' arithmetic: their checkpoints, converted, give their numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moepp_jax
from moepp_jax import interop
from moepp_jax import model as model_lib
from moepp_jax.errors import ConfigError
from moepp_jax.experiments import reference as experiment
from tests import reference


@pytest.fixture(scope="module", params=reference.NAMES)
def converted(request, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reference") / "run"
    interop.from_hf(
        reference.ROOT / request.param, workdir, dtype="float32", report=lambda line: None
    )
    return request.param, workdir


def test_every_tensor_is_where_it_belongs(converted):
    name, workdir = converted
    params = reference.params(name)
    jax.tree.map(np.testing.assert_array_equal, moepp_jax.load(workdir).params, params)
    model = model_lib.build(reference.config(name))
    declared = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, declared) == jax.tree.map(jnp.shape, params)


def test_the_numbers_are_the_authors(converted):
    name, workdir = converted
    found = experiment.differences(reference.ROOT / name, workdir)
    assert len(found) == 9
    assert {key: d for key, d in found.items() if d.relative > experiment.TOLERANCE} == {}


def test_a_difference_is_seen():
    want = np.array([1.0, -4.0], np.float32)
    assert experiment._difference(np.add(want, [0.0, 1e-3]), want).relative == pytest.approx(2.5e-4)
    tokens = np.array([[1, 2, 3, 4]])
    assert experiment._difference(np.add(tokens, [0, 0, 0, 1]), tokens) == (1.0, 0.25)
    with pytest.raises(ConfigError, match="of shape"):
        experiment._difference(tokens[0], tokens)
