"""`train --debug` names the first operation with a NaN, and the line that it was written on."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moepp_jax import debugging
from moepp_jax import mesh as mesh_lib
from moepp_jax import state as state_lib
from moepp_jax.metrics import DivergedError
from tests import planted, tiny


def line(said: str) -> int:
    """The line of this file with a mark."""
    lines = Path(__file__).read_text().splitlines()
    return next(n for n, text in enumerate(lines, 1) if text.endswith(f"# {said}"))


def mesh():
    return jax.make_mesh((2,), ("d",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])


def summed(w, x):
    """A loop in a shard_map, differentiated: what `checkify` cannot look into."""

    @jax.checkpoint
    def body(carry, by):
        far = jnp.where(by > 0, carry, -jnp.inf).max()  # infinite on purpose
        logarithm = jnp.log(carry - by)  # forward
        root = jnp.sqrt(jnp.maximum(w - by, 0.0))  # backward
        return carry + 0.0 * logarithm + root, far

    y, _ = jax.lax.scan(body, x, jnp.arange(1.0, 4.0))
    return jax.lax.psum(y.sum(), "d")


def gradient(w, x):
    specs = dict(mesh=mesh(), in_specs=(P(), P("d")), out_specs=(P(), P()))
    return jax.shard_map(jax.value_and_grad(summed), **specs)(w, x)


def test_forward_in_one_round_of_a_loop_on_one_device():
    x = jnp.array([9.0, 9.0, 9.0, 1.5])
    said = debugging.first(gradient, mesh(), jnp.float32(1.0), x)
    place = f"tests/{Path(__file__).name}"
    assert said.startswith(f"the first NaN is the result of log at {place}:{line('forward')} ")
    assert re.search(r"in round 2 of 3 of the loop at \S+ \(summed\)", said) is not None, said
    assert "\n" not in said


def test_on_the_way_back():
    said = debugging.first(gradient, mesh(), jnp.float32(2.0), jnp.full(4, 90.0))
    assert f":{line('backward')} " in said and said.endswith("on the way back"), said


def test_an_infinite_number_of_finite_ones():
    def f(x):
        hidden = jnp.where(x > 0, x, -jnp.inf)
        return hidden, jnp.exp(x)  # too large

    said = debugging.first(f, mesh(), jnp.array([1.0, 100.0]))
    assert said.startswith("the first infinite number is the result of exp at ")
    assert f":{line('too large')} " in said


def test_what_was_there_before():
    said = debugging.first(lambda x: x["w"] + 1, mesh(), {"w": jnp.array([jnp.nan])})
    assert said == "w has such numbers before the step: an earlier one made them"
    assert "all are" in debugging.first(lambda x: x + 1, mesh(), jnp.ones(2))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["PlantedRule", "PlantedBackwardRule"])
def test_a_step_of_training(rule):
    """Over two devices that share the experts; the state before is still there to be looked at."""
    c = tiny.config(**{"moe.rule.type": f"tests.planted:{rule}", "mesh.expert": 2})
    mesh = mesh_lib.make_mesh(c, jax.devices()[:2])
    parts = state_lib.assemble(c, mesh)
    sharding = mesh_lib.batch_sharding(mesh)
    batch = {name: jax.device_put(a, sharding) for name, a in tiny.batch(c).items()}
    step = debugging.explained(parts)
    plain, _ = state_lib.make_train_step(parts)(state_lib.init_state(parts), batch)
    state, _ = step(state_lib.init_state(parts), batch)
    assert jax.tree.all(jax.tree.map(np.array_equal, state.params, plain.params))
    router = state.params["layers"]["moe"]["router"]
    router["w"] = router["w"].at[1, 0, 0].set(-1000.0)
    with pytest.raises(DivergedError) as error:
        step(state, batch)
    assert error.value.began == 2
    said = str(error.value)
    marks = {"PlantedRule": "sqrt", "PlantedBackwardRule": "mul"}
    assert said.startswith(f"step 2: the first NaN is the result of {marks[rule]} at tests/planted")
    assert f"({rule}.logits), in round 2 of 2 of the loop at moepp_jax/model.py:" in said
    assert said.endswith("on the way back") == (rule == "PlantedBackwardRule")
    assert planted.__name__ and "\n" not in said
