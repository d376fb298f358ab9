"""The training step: the same on every mesh, whole or in parts; what it communicates and keeps."""

import functools
import math
import re
from collections import Counter

import jax
import numpy as np
import pytest

from moepp_jax import mesh as mesh_lib
from moepp_jax import state as state_lib
from tests import tiny

MESHES = [(8, 1, 1), (1, 1, 8), (2, 1, 4), (4, 1, 2), (2, 2, 2)]
# Adam divides by sqrt(v) + eps: with a usual eps the first step is the gradient's sign, noise.
SMOOTH = {"optim.eps": 1e-3, "optim.warmup_steps": 0, "moe.z_weight": 1e-3}


@functools.cache
def case(axes: tuple[int, int, int], dispatch: str, **changes):
    """A configuration, its abstract state, a batch, and its compiled step."""
    changes |= dict(zip(("mesh.data", "mesh.fsdp", "mesh.expert"), axes, strict=True))
    c = tiny.config(**{"moe.dispatch": dispatch}, **(SMOOTH | changes))
    mesh = mesh_lib.make_mesh(c, jax.devices()[: np.prod(axes)])
    batch = jax.device_put(tiny.batch(c), mesh_lib.batch_sharding(mesh))
    abstract = state_lib.abstract_state(c, mesh)
    lowered = state_lib.make_train_step(c, mesh).lower(abstract, batch)
    return c, abstract, batch, lowered.compile()


@functools.cache
def fresh_state():
    mesh = mesh_lib.make_mesh(tiny.config(), jax.devices()[:1])
    return jax.device_get(state_lib.init_state(tiny.config(), mesh))


@functools.cache
def stepped(*args, **changes):
    """State and metrics after one step, on the host."""
    _, abstract, batch, step = case(*args, **changes)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.device_get(step(jax.device_put(fresh_state(), shardings), batch))


def close(actual, expected, tolerance=3e-5):
    """Leaf by leaf, relative to the leaf's largest value."""

    def check(path, a, b):
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * np.abs(b).max() + 1e-9, err_msg=mesh_lib.path_of(path)
        )

    jax.tree_util.tree_map_with_path(check, actual, expected)


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
@pytest.mark.parametrize("axes", MESHES, ids=lambda axes: "x".join(map(str, axes)))
def test_every_mesh_takes_the_same_step(axes, dispatch):
    state, metrics = stepped(axes, dispatch)
    expected, expected_metrics = stepped((1, 1, 1), dispatch)
    assert (expected_metrics["drop_rate"] > 0.03) == (dispatch == "capacity")
    close(metrics, expected_metrics)
    # The first moment is a tenth of the clipped gradient: gradients first, as they say more.
    close(state.opt_state, expected.opt_state)
    close(state.params, expected.params)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, fresh_state().params)
    assert all(distance > 0 for distance in jax.tree.leaves(moved))


def test_parts_add_up_to_the_batch():
    whole = {"moe.balance_weight": 0.0, "moe.z_weight": 0.0}
    for axes in [(1, 1, 1), (2, 1, 1)]:
        c, _, batch, step = case(axes, "capacity", **whole, **{"train.accumulate": 4})
        # A part has sequences of every device: none is moved.
        assert {kind for kind, _ in collectives(step.as_text())} <= {"all-reduce"}
        targets = np.asarray(batch["loss_mask"]).reshape(-1, 4, c.data.seq_len).sum(axis=(0, 2))
        assert len(set(targets.tolist())) > 1  # else a mean of the parts' means would pass too
        state, metrics = stepped(axes, "capacity", **whole, **{"train.accumulate": 4})
        expected, expected_metrics = stepped((1, 1, 1), "capacity", **whole)
        # The balance loss is of a part's own loads; here it has no weight.
        close(metrics | {"balance_loss": 0}, expected_metrics | {"balance_loss": 0})
        close(state, expected)


def test_the_state_lies_as_the_table_says_and_the_step_keeps_it_there():
    c, abstract, batch, step = case((2, 2, 2), "capacity")
    state = state_lib.init_state(c, mesh_lib.make_mesh(c))
    before = state.params["embedding"]
    after, _ = step(state, batch)
    assert before.is_deleted()  # donated: the state exists once

    def check(path, leaf, wanted):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), path

    jax.tree_util.tree_map_with_path(check, after, abstract)
    ffn = after.params["layers"]["moe"]["ffn"]["w_in"]  # layers, experts, 2, F, D
    assert ffn.addressable_shards[0].data.shape == (2, 4, 2, 12, 32)
    mu = after.opt_state[1][0].mu["layers"]["attention"]["q"]  # layers, rows, D
    assert mu.addressable_shards[0].data.shape == (2, 8, 32)


def test_a_fresh_state_does_not_depend_on_the_mesh():
    c = tiny.config(**{"mesh.fsdp": 2, "mesh.expert": 2})
    made = jax.device_get(state_lib.init_state(c, mesh_lib.make_mesh(c)))
    jax.tree.map(np.testing.assert_array_equal, made, fresh_state())
    assert made.step == 0 and made.params["embedding"].std() == pytest.approx(0.2, rel=0.02)


def collectives(text: str) -> list[tuple[str, str]]:
    """(kind, shape of the result) of what crosses devices in HLO; a loop's body counts once."""
    kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    found = re.findall(rf"^\s*(?:ROOT )?\S+ = (.+?) ({kinds})(?:-start)?\((.*)$", text, re.M)
    alone = re.compile(r"replica_groups=\{(\{\d+\},?)+\}")  # on an axis of one device
    return [(kind, shape) for shape, kind, rest in found if not alone.search(rest)]


def parameter_shapes(c, expert: int) -> Counter:
    """Of one layer, and of what is outside: on a device of so many on the expert axis, whole."""
    m, e = c.model, c.moe
    D, N, E = m.hidden_size, e.num_experts, e.n_ffn // expert
    layer = [(D, D)] * 4 + [(D,)] * 2 + [(N, D), (e.n_const, D), (e.n_const, 2, D)]
    ffn = [(E, 2, e.ffn_size, D), (E, D, e.ffn_size)]
    return Counter(layer), Counter(ffn), Counter([(m.vocab_size, D)] * 2 + [(D,)])


def shapes_of(found, kind: str) -> Counter:
    numbers = [re.search(r"\[([\d,]+)\]", shape) for k, shape in found if k == kind]
    return Counter(tuple(map(int, n[1].split(","))) for n in numbers)


@pytest.mark.parametrize("axes", [(1, 1, 8), (1, 8, 1), (2, 2, 2)], ids=str)
def test_every_byte_that_moves(axes):
    """Parameters are gathered once forward and once backward (those outside the layers once), and
    their gradients reduce-scattered once; tokens go to the experts and back. Nothing else is large.
    """
    _, fsdp, expert = axes
    c, *_, step = case(axes, "capacity")
    found = collectives(step.as_text())
    layer, ffn, outside = parameter_shapes(c, expert)
    if fsdp == 1:
        ffn = Counter()
    once = layer + ffn
    gathered = shapes_of(found, "all-gather")
    assert 3 <= gathered.pop((c.model.hidden_size,)) <= 5  # norms, which backward may have kept
    assert gathered == Counter({s: n for s, n in (once + once + outside).items() if len(s) > 1})
    scattered = Counter({math.prod(s): 0 for s in once + outside})
    for shape, n in shapes_of(found, "reduce-scatter").items():
        whole = math.prod(shape) * (fsdp if len(shape) > 2 and shape[0] > 2 else fsdp * expert)
        scattered[whole] += n
    assert scattered == Counter(math.prod(s) for s in (once + outside).elements())
    kinds = Counter(kind for kind, _ in found)
    assert kinds["all-to-all"] == (4 if expert > 1 else 0) and not kinds["collective-permute"]


@pytest.mark.parametrize("axes", [(1, 1, 8), (2, 2, 2)], ids=str)
def test_no_sharded_gradient_is_reduced_whole(axes):
    """Over replicas the parts of gradients are summed, and N x N matrices are the largest else."""
    c, *_, step = case(axes, "capacity")
    data, fsdp, expert = axes
    N = c.moe.num_experts
    layer, ffn, outside = parameter_shapes(c, expert)
    parts = {math.prod(s) // (fsdp * expert) for s in layer + outside}
    parts |= {math.prod(s) // fsdp for s in ffn}
    for kind, shape in collectives(step.as_text()):
        if kind == "all-reduce":
            for numbers in re.findall(r"\[([\d,]+)\]", shape):
                size = math.prod(map(int, numbers.split(",")))
                assert size <= N * N or (data > 1 and size in parts), shape


def test_nothing_is_kept_that_training_does_not_use():
    """Output.states and Output.router_logits are for analysis: backward has copies of its own."""
    c, *_, step = case((1, 1, 1), "capacity", **{"model.num_layers": 3, "model.remat": "full"})
    text = step.as_text()
    for width in (c.model.hidden_size, c.moe.num_experts):
        shape = rf"f32\[3,{c.train.batch_size},{c.data.seq_len},{width}\]"
        assert len(re.findall(rf"= {shape}\S* dynamic-update-slice\(", text)) == 1


def test_the_step_counts_its_learning_rate():
    state, metrics = stepped((1, 1, 1), "capacity")
    assert state.step == 1
    assert metrics["lr"] == pytest.approx(2e-3)
    assert metrics["grad_norm"] > 1  # so the moments hold a clipped gradient:
    first = state.opt_state[1][0].mu
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(first)))
    assert norm == pytest.approx(0.1, rel=1e-4)
