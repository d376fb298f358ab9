"""Whatever a rule is, it trains alike on every mesh, and its state is kept and used.

The rules are those that `moepp_jax/moe/rules` has, each as its recipe in `configs/routing` says and
as small as `tests/tiny.py`. What a rule computes is tested in `tests/moe/rules`.
"""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import moepp_jax
from moepp_jax import api
from moepp_jax import evaluate as evaluate_lib
from moepp_jax import mesh as mesh_lib
from moepp_jax import state as state_lib
from moepp_jax.checkpoint import CheckpointError, Checkpoints
from moepp_jax.config import Config
from moepp_jax.data import prepare
from moepp_jax.errors import ConfigError
from moepp_jax.moe import rules
from moepp_jax.run import open_run
from moepp_jax.workdir import keep_tokenizer, open_workdir, require_same
from tests import tiny
from tests.test_state import close

ONE, REPLICAS, EXPERTS = (1, 1, 1), (8, 1, 1), (2, 1, 4)
STEPS = 3

# Learning rates are 0, 1/256 and 2/256 in the first steps, exactly, and HUGE after the warm-up.
# Adam divides by sqrt(v) + eps: with a usual eps the first steps are the gradient's sign, noise.
WARM_UP, HUGE = 8192, 32.0
SMALL = tiny.CHANGES | {
    "optim.lr": HUGE,
    "optim.initial_lr": 0.0,
    "optim.warmup_steps": WARM_UP,
    "optim.eps": 1e-3,
    "train.batch_size": 16,
}

# What a recipe leaves out of a rule and has state.
MORE = {"moepp with biases": {"moe.rule.bias_rate": 0.1}}


def module_of(name: str) -> str:
    return "moepp_jax.configs.tiny" if name == "moepp" else f"moepp_jax.configs.routing.{name}"


def recipe(name: str, **changes) -> Config:
    """A rule's recipe in small."""
    fields = importlib.import_module(module_of(name.split()[0])).get_config()
    own = {"moe.dispatch": fields.moe.dispatch} | MORE.get(name, {})
    fields.update_from_flattened_dict(SMALL | own | changes)
    return Config.parse(fields)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


EVERY = rules.names()
WITH_STATE = [name for name in EVERY if recipe(name).moe.rule.state()]
# Of replicas alone a rule without state knows nothing that it does not know of EXPERTS.
CASES = [(name, EXPERTS) for name in EVERY]
CASES += [(name, REPLICAS) if name in WITH_STATE else slow(name, REPLICAS) for name in EVERY]
WITH_STATE += map(slow, MORE)


def label(value) -> str:
    return value if isinstance(value, str) else "x".join(map(str, value))


@functools.cache
def on_mesh(name: str, axes: tuple[int, int, int] = ONE, parts: int = 1, **changes):
    """A configuration put together on a mesh, and its compiled step."""
    changes |= dict(zip(("mesh.data", "mesh.fsdp", "mesh.expert"), axes, strict=True))
    c = recipe(name, **changes, **{"train.accumulate": parts})
    whole = state_lib.assemble(c, mesh_lib.make_mesh(c, jax.devices()[: math.prod(axes)]))
    step = state_lib.make_train_step(whole)
    return whole, step.lower(whole.abstract, batch(whole, 0)).compile()


def batch(whole: state_lib.Assembly, number: int):
    return jax.device_put(
        tiny.batch(whole.config, seed=number), mesh_lib.batch_sharding(whole.mesh)
    )


@functools.cache
def fresh(name: str) -> state_lib.State:
    return jax.device_get(state_lib.init_state(on_mesh(name)[0]))


def stepped(name: str, state: state_lib.State, number: int, **where):
    """State and metrics after one step from a state, all on the host."""
    whole, step = on_mesh(name, **where)
    placed = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, whole.abstract))
    return jax.device_get(step(placed, batch(whole, number)))


@functools.cache
def trained(name: str, **where):
    """The state after three steps, and the metrics of each."""
    state, rows = fresh(name), []
    for number in range(STEPS):
        state, metrics = stepped(name, state, number, **where)
        rows.append(metrics)
    return state, rows


def own(name: str, params: dict) -> dict:
    """The state of the rule, of all layers."""
    router = params["layers"]["moe"]["router"]
    return {key: router[key] for key in recipe(name).moe.rule.state()}


def with_own(params: dict, state: dict) -> dict:
    router = params["layers"]["moe"]["router"] | state
    moe = params["layers"]["moe"] | {"router": router}
    return params | {"layers": params["layers"] | {"moe": moe}}


def differ(a, b) -> bool:
    return not all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize("name", EVERY)
def test_the_recipe_is_of_the_rule_and_says_how_it_is_run(name):
    module = importlib.import_module(module_of(name))
    config = Config.parse(module.get_config())
    said = rules.fields_of(config.moe.rule)
    assert said["type"] == name
    assert dict(module.get_config().moe.rule) == said  # every option stands there, to be changed
    assert Config.parse(config.to_dict()) == config
    called = module.__name__.removeprefix("moepp_jax.configs.").replace(".", "/")
    assert f"    moepp train --config={called} --workdir=runs/" in module.__doc__


@pytest.mark.parametrize(("name", "axes"), CASES, ids=label)
def test_three_steps_are_the_same_on_every_mesh(name, axes):
    state, rows = trained(name, axes=axes)
    expected, expected_rows = trained(name)
    close(rows, expected_rows)
    close(state, expected)
    assert all(np.isfinite(row["loss"]) for row in rows)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, fresh(name).params)
    assert all(distance > 0 for distance in jax.tree.leaves(moved))


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_three_steps_that_drop_are_the_same_on_a_mesh(name):
    few = {"moe.dispatch": "capacity", "moe.gamma": 0.5}
    state, rows = trained(name, axes=EXPERTS, **few)
    expected, expected_rows = trained(name, **few)
    assert all(row["drop_rate"] > 0.1 for row in expected_rows)
    close(rows, expected_rows)
    close(state, expected)


@pytest.mark.parametrize("axes", [EXPERTS, slow(ONE)], ids=label)
@pytest.mark.parametrize("name", WITH_STATE)
def test_parts_move_state_as_the_whole_batch_does(name, axes):
    """In the second step too: the first one's rate is 0, so that it has moved nothing else."""
    in_parts = whole = fresh(name)
    for number in range(2):
        in_parts, _ = stepped(name, in_parts, number, axes=axes, parts=2)
        whole, _ = stepped(name, whole, number)
        close(own(name, in_parts.params), own(name, whole.params))
    assert differ(own(name, whole.params), own(name, fresh(name).params))


@pytest.mark.parametrize("name", WITH_STATE)
def test_state_is_moved_by_the_rule_alone(name):
    """Whatever the learning rate, and whatever weight decay makes of all else."""

    def after(count: int) -> state_lib.State:
        start = trained(name)[0]
        counted = optax.tree_utils.tree_set(start.opt_state, count=np.int32(count))
        return stepped(name, start.replace(opt_state=counted), STEPS)[0]

    still, hurled, before = after(0), after(WARM_UP), trained(name)[0]
    moved = own(name, still.params)
    unmoved = with_own(before.params, moved)
    jax.tree.map(np.testing.assert_array_equal, still.params, unmoved)
    assert differ(moved, own(name, before.params))
    assert np.abs(hurled.params["embedding"] - before.params["embedding"]).max() > 1
    jax.tree.map(np.testing.assert_array_equal, own(name, hurled.params), moved)
    adam = hurled.opt_state[1][0]
    for moment in (adam.mu, adam.nu):
        assert not any(array.any() for array in own(name, moment).values())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> the folder of a run whose checkpoint is the state after three steps."""
    root = tmp_path_factory.mktemp("rules")

    @functools.cache
    def folder(name: str):
        c = on_mesh(name)[0].config.replace("data", dir=str(root / "data"))
        made = open_workdir(root / name.replace(" ", "_"), c)
        keep_tokenizer(made, prepare(c, report=lambda line: None).tokenizer)
        with Checkpoints(made, c.train.keep) as checkpoints:
            checkpoints.save(STEPS, trained(name)[0])
            checkpoints.wait()
        return made

    return folder


def changed(name: str, params: dict) -> dict:
    """With another state of the rule: more by up to 3, more for later experts."""

    def more(array):
        return array + 3 * np.linspace(0, 1, array.size, dtype=np.float32).reshape(array.shape)

    return with_own(params, jax.tree.map(more, own(name, params)))


def routed(name: str, params: dict):
    """Experts and gates of a few random tokens, in the first layer."""
    rule = recipe(name).moe.rule
    router = {key: array[0] for key, array in params["layers"]["moe"]["router"].items()}
    x = jax.random.normal(jax.random.key(0), (2, 16, recipe(name).model.hidden_size))
    routing = rule.route(x, jnp.zeros((2, 16, rule.pool.size)), router)
    return jax.device_get((routing.experts, routing.gates))


@pytest.mark.parametrize("name", WITH_STATE)
def test_state_is_saved_restored_and_used(name, saved):
    state = trained(name)[0]
    with Checkpoints(saved(name), keep=1) as checkpoints:
        restored = checkpoints.restore(STEPS, on_mesh(name, axes=EXPERTS)[0].abstract)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), state)
    params = moepp_jax.load(saved(name)).params
    jax.tree.map(np.testing.assert_array_equal, params, state.params)

    other = changed(name, params)
    model = api.Model(recipe(name), other)
    prompts = np.random.default_rng(0).integers(3, 384, (16, 12))
    logits = model.logits(prompts)
    model.params = params
    logits_before = model.logits(prompts)
    evaluate = evaluate_lib.make_evaluate(on_mesh(name)[0])
    text = [tiny.batch(recipe(name))]
    losses = [evaluate(p, text)["eval_loss"] for p in (params, other)]
    # Some state is of a loss alone: it has no say here.
    routes = differ(routed(name, params), routed(name, other))
    assert differ(logits, logits_before) == (losses[0] != losses[1]) == routes

    best, best_before = (np.asarray(a)[:, -1].argmax(axis=-1) for a in (logits, logits_before))
    new = model.generate(prompts.tolist(), max_new_tokens=1)
    assert [tokens[0] for tokens in new] == best.tolist()
    assert differ(best, best_before) == routes


@pytest.mark.parametrize("name", EVERY)
def test_a_run_of_another_rule_is_refused(name, tmp_path):
    other = "moepp" if name != "moepp" else "vanilla"
    folder = open_workdir(tmp_path / "run", recipe(name))
    wanted = rf"config\.moe\.rule\.type: '{name}' there, '{other}' now"
    with pytest.raises(ConfigError, match=wanted):
        require_same(folder, recipe(other))


@pytest.mark.parametrize("name", WITH_STATE)
def test_a_checkpoint_with_state_that_a_rule_does_not_know_is_refused(name, saved):
    vanilla = recipe("vanilla")
    with pytest.raises(CheckpointError, match="is of another architecture") as error:
        open_run(saved(name), config=vanilla).params()
    assert any(
        f"moe/router/{key}: {[2, *array.shape[1:]]} saved, absent wanted" in str(error.value)
        for key, array in own(name, fresh(name).params).items()
    )
