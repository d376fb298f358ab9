"""The training step: the same on every mesh, whole or in parts; what it communicates and keeps."""

import functools
import math
import re
from collections import Counter

import jax
import numpy as np
import pytest

from moepp_jax import mesh as mesh_lib
from moepp_jax import model
from moepp_jax import state as state_lib
from moepp_jax.block import ON_TPU
from moepp_jax.compile import hlo, remedies
from moepp_jax.config import Config
from moepp_jax.moe.param import path_of
from moepp_jax.moe.rules.moepp import NEVER
from tests import tiny

MESHES = [(8, 1, 1), (1, 1, 8), (2, 1, 4), (4, 1, 2), (2, 2, 2)]
# Adam divides by sqrt(v) + eps: with a usual eps the first step is the gradient's sign, noise.
SMOOTH = {"optim.eps": 1e-3, "optim.warmup_steps": 0, "moe.rule.z_weight": 1e-3}


@functools.cache
def case(axes: tuple[int, int, int], dispatch: str, **changes):
    """A configuration, its abstract state, a batch, and its compiled step."""
    changes |= dict(zip(("mesh.data", "mesh.fsdp", "mesh.expert"), axes, strict=True))
    c = tiny.config(**{"moe.dispatch": dispatch}, **(SMOOTH | changes))
    mesh = mesh_lib.make_mesh(c, jax.devices()[: np.prod(axes)])
    batch = jax.device_put(tiny.batch(c), mesh_lib.batch_sharding(mesh))
    abstract = state_lib.assemble(c, mesh).abstract
    lowered = state_lib.make_train_step(state_lib.assemble(c, mesh)).lower(abstract, batch)
    return c, abstract, batch, lowered.compile()


@functools.cache
def fresh_state():
    mesh = mesh_lib.make_mesh(tiny.config(), jax.devices()[:1])
    return jax.device_get(state_lib.init_state(state_lib.assemble(tiny.config(), mesh)))


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
            a, b, rtol=0, atol=tolerance * np.abs(b).max() + 1e-9, err_msg=path_of(path)
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


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2)], ids=["1x1x1", "2x2x2"])
def test_a_block_as_a_tpu_computes_it(axes, monkeypatch):
    monkeypatch.setattr(model, "PLAIN", ON_TPU)
    _, abstract, batch, step = case.__wrapped__(axes, "capacity")
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state, metrics = step(jax.device_put(fresh_state(), shardings), batch)
    expected, expected_metrics = stepped((1, 1, 1), "capacity")
    close(metrics, expected_metrics)
    close(state.opt_state, expected.opt_state)
    close(state.params, expected.params)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sequences_that_share_slots_are_the_same_on_every_mesh(accumulate):
    """Two of a device's; of every second one where the batch has two parts."""
    shared = {"moe.group_size": 64, "train.batch_size": 16, "train.accumulate": accumulate}
    expected, expected_metrics = stepped((1, 1, 1), "capacity", **shared)
    assert expected_metrics["drop_rate"] > 0.03
    apart = stepped((1, 1, 1), "capacity", **shared | {"moe.group_size": 32})[1]
    assert expected_metrics["drop_rate"] < apart["drop_rate"]
    axes = (1, 2, 2)
    state, metrics = stepped(axes, "capacity", **shared)
    close(metrics, expected_metrics)
    close(state.params, expected.params)
    *_, step = case(axes, "capacity", **shared)
    *_, alone = case(axes, "capacity", **shared | {"moe.group_size": 32})
    kinds, without = (sorted(k for k, *_ in collectives(s.as_text())) for s in (step, alone))
    assert kinds == without, "sharing slots moves nothing between devices"


@pytest.mark.parametrize("remat", [policy for policy in remedies.REMAT if policy != "none"])
def test_what_backward_computes_again_changes_nothing_but_memory_and_traffic(remat):
    """Only "full" sends the tokens to their experts and back again in backward."""
    state, metrics = stepped((2, 2, 2), "capacity", **{"model.remat": remat})
    expected, expected_metrics = stepped((1, 1, 1), "capacity")
    close(metrics, expected_metrics)
    close(state.opt_state, expected.opt_state)
    *_, step = case((2, 2, 2), "capacity", **{"model.remat": remat})
    kinds = [kind for kind, *_ in collectives(step.as_text())]
    assert kinds.count("all-to-all") == (6 if remat == "full" else 4)


@pytest.mark.parametrize(
    ("dispatch", "parts", "buffer"), [("capacity", 2, 0.0), ("dropless", 3, 1.5)]
)
def test_groups_that_cross_the_expert_axis_in_parts_change_nothing(dispatch, parts, buffer):
    """Of two groups a device, each of which crosses by itself: three parts there are not.

    Each has its share of a buffer, of which the worst case would need a third more.
    """
    axes, shared = (1, 2, 2), {"train.batch_size": 8}
    expected, expected_metrics = stepped((1, 1, 1), dispatch, **shared)
    shared |= {"moe.exchange_buffer": buffer}
    *_, whole = case(axes, dispatch, **shared)
    split = shared | {"moe.exchange_parts": parts}
    state, metrics = stepped(axes, dispatch, **split)
    close(metrics, expected_metrics)
    close(state.opt_state, expected.opt_state)
    *_, step = case(axes, dispatch, **split)
    once, twice = (
        [kind for kind, *_ in collectives(s.as_text())].count("all-to-all") for s in (whole, step)
    )
    assert twice == 2 * once > 0


def test_what_is_kept_is_not_computed_again():
    """Of a layer: which experts a token chooses, the answers of attention, the first product, what
    comes after attention and before it.
    """

    def products(remat):
        *_, step = case((2, 2, 2), "capacity", **{"model.remat": remat})
        text = step.as_text()
        return text.count('custom_call_target="TopK"'), len(re.findall(r" dot\(", text))

    choices, dots = products("exchanged")
    assert choices == 2
    assert products("routing") == (1, dots)
    assert products("attention") == (1, dots - 1)
    assert products("w_in") == (1, dots - 2)
    assert products("residual") == (1, dots - 3)
    assert products("qkv") == (1, dots - 6)


def test_rows_past_the_buffer_of_the_exchange_are_counted():
    """Where a device has room for a tenth of what it is sent, the drop rate of the step says so."""
    _, metrics = stepped((1, 1, 8), "dropless", **{"moe.exchange_buffer": 0.1})
    assert 0.3 < metrics["drop_rate"] < 1 and np.isfinite(metrics["loss"])
    assert stepped((1, 1, 8), "dropless")[1]["drop_rate"] == 0


def test_parts_add_up_to_the_batch():
    whole = {"moe.rule.balance_weight": 0.0, "moe.rule.z_weight": 0.0}
    for axes in [(1, 1, 1), (2, 1, 1)]:
        c, _, batch, step = case(axes, "capacity", **whole, **{"train.accumulate": 4})
        # A part has sequences of every device: none is moved.
        assert {kind for kind, *_ in collectives(step.as_text())} <= {"all-reduce"}
        targets = np.asarray(batch["loss_mask"]).reshape(-1, 4, c.data.seq_len).sum(axis=(0, 2))
        assert len(set(targets.tolist())) > 1  # else a mean of the parts' means would pass too
        state, metrics = stepped(axes, "capacity", **whole, **{"train.accumulate": 4})
        expected, expected_metrics = stepped((1, 1, 1), "capacity", **whole)
        # The balance loss is of a part's own loads; here it has no weight.
        close(metrics | {"balance_loss": 0}, expected_metrics | {"balance_loss": 0})
        close(state, expected)


def test_the_same_step_is_not_compiled_twice():
    c, *_ = case((2, 2, 2), "capacity")
    again = Config.parse(c.to_dict())
    step = state_lib.make_train_step(state_lib.assemble(c, mesh_lib.make_mesh(c)))
    assert state_lib.make_train_step(state_lib.assemble(again, mesh_lib.make_mesh(again))) is step
    other = tiny.config(**{"optim.lr": 1e-5})
    assert state_lib.make_train_step(state_lib.assemble(other, mesh_lib.make_mesh(c))) is not step


def test_the_state_lies_as_the_table_says_and_the_step_keeps_it_there():
    c, abstract, batch, step = case((2, 2, 2), "capacity")
    state = state_lib.init_state(state_lib.assemble(c, mesh_lib.make_mesh(c)))
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
    made = jax.device_get(state_lib.init_state(state_lib.assemble(c, mesh_lib.make_mesh(c))))
    jax.tree.map(np.testing.assert_array_equal, made, fresh_state())
    assert made.step == 0 and made.params["embedding"].std() == pytest.approx(0.2, rel=0.02)


def collectives(text: str) -> list[tuple[str, str, int]]:
    """(kind, shape of the result, devices that take part) of what crosses devices in HLO.

    A loop's body counts once.
    """
    devices = {c.name: c.group_size for c in hlo.collectives(hlo.parse(text))}
    kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    lines = re.findall(rf"^\s*(?:ROOT )?%?(\S+) = (.+?) ({kinds})(?:-start)?\(", text, re.M)
    return [(kind, shape, devices[name]) for name, shape, kind in lines if devices[name] != 1]


def numbers_of(c, expert: int) -> tuple[int, int, int]:
    """Parameters of a layer's FFN experts on a device, of the rest of a layer, of no layer."""
    m, e = c.model, c.moe
    D, N = m.hidden_size, e.num_experts
    ffn = e.n_ffn // expert * 3 * e.ffn_size * D
    return ffn, 4 * D * D + N * D + 3 * e.n_const * D, 2 * m.vocab_size * D


def received(text: str, kind: str) -> float:
    """Numbers that a device gets from others by all collectives of a kind on matrices, in a ring.

    Of a gather's result those that were not its own; of what is scattered likewise.
    """
    total = 0.0
    for found, shape, devices in collectives(text):
        numbers = re.match(r"\w+\[(\d+,[\d,]+)\]", shape)
        if found == kind and numbers:
            size = math.prod(map(int, numbers[1].split(",")))
            whole = size if kind == "all-gather" else size * devices
            total += whole * (1 - 1 / devices)
    return total


@pytest.mark.parametrize("axes", [(1, 1, 8), (1, 8, 1), (2, 2, 2)], ids=str)
def test_every_byte_that_moves(axes):
    """Parameters are gathered once forward and once backward (those outside the layers once), and
    their gradients reduce-scattered once; tokens go to the experts and back.
    """
    _, fsdp, expert = axes
    c, *_, step = case(axes, "capacity")
    ffn, layer, outside = numbers_of(c, expert)
    once = ffn * (1 - 1 / fsdp) + layer * (1 - 1 / (fsdp * expert))
    outside *= 1 - 1 / (fsdp * expert)
    text = step.as_text()
    assert received(text, "all-gather") == 2 * once + outside
    assert received(text, "reduce-scatter") == once + outside
    kinds = Counter(kind for kind, *_ in collectives(text))
    assert kinds["all-to-all"] == (4 if expert > 1 else 0)
    assert set(kinds) <= {"all-gather", "reduce-scatter", "all-to-all", "all-reduce"}


@pytest.mark.parametrize("axes", [(1, 1, 8), (2, 2, 2)], ids=str)
def test_no_sharded_gradient_is_reduced_whole(axes):
    """Over replicas the parts of gradients are summed, and N x N matrices are the largest else."""
    c, *_, step = case(axes, "capacity")
    data, fsdp, expert = axes
    m, e = c.model, c.moe
    D, N, cut = m.hidden_size, e.num_experts, fsdp * expert
    whole = [D * D, m.vocab_size * D, N * D, e.n_const * D, 2 * e.n_const * D, D]
    parts = {size // cut for size in whole}
    parts |= {n * e.n_ffn * e.ffn_size * D // cut for n in (1, 2)}
    for kind, shape, _ in collectives(step.as_text()):
        if kind == "all-reduce":
            for numbers in re.findall(r"\[([\d,]+)\]", shape):
                size = math.prod(map(int, numbers.split(",")))
                assert size <= N * N or (data > 1 and size in parts), shape


def test_nothing_is_kept_that_training_does_not_use():
    """Output.states and Output.routed are for analysis: backward has copies of its own."""
    c, *_, step = case((1, 1, 1), "capacity", **{"model.num_layers": 3, "model.remat": "full"})
    text = step.as_text()
    for width in (c.model.hidden_size, c.moe.num_experts):
        shape = rf"f32\[3,{c.train.batch_size},{c.data.seq_len},{width}\]"
        assert len(re.findall(rf"= {shape}\S* dynamic-update-slice\(", text)) == 1
    choices = rf"\w+\[3,{c.train.batch_size},{c.data.seq_len},{c.moe.rule.most}\]"
    assert not re.search(choices, text)


def test_the_step_counts_its_learning_rate():
    state, metrics = stepped((1, 1, 1), "capacity")
    assert state.step == 1
    assert metrics["lr"] == pytest.approx(2e-3)
    assert metrics["grad_norm"] > 1  # so the moments hold a clipped gradient:
    first = state.opt_state[1][0].mu
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(first)))
    assert norm == pytest.approx(0.1, rel=1e-4)


def test_biases_lead_tokens_to_experts_that_were_never_chosen():
    """From FFN experts alone to the share that tau asks for."""
    axes = (2, 2, 2)
    changes = {"moe.rule.bias_rate": 0.5, "optim.lr": 1e-6, "moe.rule.balance_weight": 0.0}
    c, _, batch, step = case(axes, "dropless", **changes)
    mesh = mesh_lib.make_mesh(c, jax.devices()[: np.prod(axes)])
    state = state_lib.init_state(state_lib.assemble(c, mesh))
    start = np.zeros((2, c.moe.num_experts), np.float32)
    start[:, c.moe.n_ffn :] = NEVER
    router = state.params["layers"]["moe"]["router"]
    router["bias"] = jax.device_put(start, router["bias"].sharding)
    seen = []
    for _ in range(70):
        state, metrics = step(state, batch)
        seen.append(float(metrics["ffn_experts_per_token"]))
    assert seen[0] == c.moe.rule.top_k
    wanted = c.moe.rule.ffn_load
    assert abs(np.mean(seen[-6:]) - wanted) < 0.1 < c.moe.rule.top_k - wanted
    bias = jax.device_get(state.params["layers"]["moe"]["router"]["bias"])
    np.testing.assert_array_equal(bias[:, : c.moe.n_ffn], 0.0)
    assert np.all(bias[:, c.moe.n_ffn :] > NEVER + 20)
