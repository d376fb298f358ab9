"""Rows on their way to the experts' devices: where they land, who is turned away, and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from moepp_jax import moe
from moepp_jax.moe import dispatch, transfer
from tests.moe import cases
from tests.moe.test_meshes import mesh_of
from tests.oracle import Spec

DEVICES, E, K, T, D = 4, 8, 2, 6, 3
BUFFER = 1.25
LOCAL = E // DEVICES
SPEC = Spec(E, 2, 1, 1)
N = len(SPEC.kinds)
SETTINGS = settings(max_examples=20, deadline=None)


def specified(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all` as its documentation says, one row at a time; for CPUs.

    NaN if the sizes that devices receive are not those that are sent to them.
    """
    everyone = functools.partial(jax.lax.all_gather, axis_name=axis_name)
    n, me = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    operands, starts, sizes, lands = map(
        everyone, (operand, input_offsets, send_sizes, output_offsets)
    )
    mine = jnp.arange(n * (len(send_sizes) // n)).reshape(n, -1)[me]
    row = jnp.arange(len(operand))
    for sender in range(n):
        for chunk in range(len(send_sizes) // n):
            i = mine[chunk]
            to = jnp.where(row < sizes[sender, i], lands[sender, i] + row, len(output))
            rows = operands[sender][jnp.minimum(starts[sender, i] + row, len(operand) - 1)]
            output = output.at[to].set(rows, mode="drop")
    told = jax.lax.all_to_all(recv_sizes, axis_name, 0, 0, tiled=True)
    return jnp.where(jnp.all(told == send_sizes), output, jnp.nan)


@pytest.fixture
def ragged(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", specified)


def routing(seed, skew):
    """Choices (devices, T, K) of distinct experts of all kinds."""
    rng = np.random.default_rng(seed)
    logits = skew * rng.normal(size=N) + rng.gumbel(size=(DEVICES, T, N))
    return np.argsort(-logits, axis=-1)[..., :K].astype(np.int32)


def on_devices(f):
    """f of each device's part, under jit, on four devices."""
    mesh = mesh_of((1, 1, DEVICES))
    return jax.jit(
        jax.shard_map(f, mesh=mesh, in_specs=(P("expert"), P("expert")), out_specs=P("expert"))
    )


@functools.cache
def there_and_back(how, size):
    """Rows as they arrive, how many each expert has, rows come back, gradient of what arrived."""

    def run(rows, experts_TK):
        _, counts_E = dispatch.sorted_rows(experts_TK, E)
        way, counts_e = transfer.to_experts(counts_E, "expert")
        arrived, pullback = jax.vjp(lambda r: transfer.move(how, r, size, way, "expert"), rows)
        back = transfer.move(how, arrived, len(rows), way.back(), "expert")
        return arrived, counts_e, back, pullback(2 * arrived)[0]

    return on_devices(run)


@pytest.mark.parametrize("how", [transfer.dense, transfer.ragged])
@pytest.mark.parametrize("skew", [0.0, 3.0, 50.0])
def test_rows_arrive_by_expert_and_come_back(ragged, how, skew):
    """An expert's rows come from device 0 first, in each device's order; nothing else is there."""
    experts = routing(1, skew)
    size = DEVICES * T * K
    rows = np.zeros((DEVICES, T * K, D), np.float32)
    wanted = [[] for _ in range(E)]
    for s in range(DEVICES):
        mine = np.sort(experts[s][experts[s] < E])
        rows[s, : len(mine)] = 1 + 100 * s + np.arange(len(mine))[:, None] + np.arange(D) / 8
        for e, row in zip(mine, rows[s], strict=False):
            wanted[e].append(row)
    run = there_and_back(how, size)
    arrived, counts, back, gradient = run(rows.reshape(-1, D), experts.reshape(-1, K))
    np.testing.assert_array_equal(counts, [len(w) for w in wanted])
    for d, got in enumerate(np.asarray(arrived).reshape(DEVICES, size, D)):
        local = [row for e in range(d * LOCAL, (d + 1) * LOCAL) for row in wanted[e]]
        np.testing.assert_array_equal(got[: len(local)], np.reshape(local, (-1, D)))
        np.testing.assert_array_equal(got[len(local) :], 0)
    np.testing.assert_array_equal(back, rows.reshape(-1, D))
    np.testing.assert_array_equal(gradient, 2 * rows.reshape(-1, D))


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=4, max_size=4),
    st.integers(1, 40),
)
@SETTINGS
def test_even_shares(asked, rows):
    """Against trying every bound."""
    asked = np.array(asked, np.int32)
    got = np.asarray(jax.jit(transfer.even_shares, static_argnums=1)(jnp.asarray(asked), rows))
    for share, column in zip(got, asked.T, strict=True):
        fits = [b for b in range(10) if np.minimum(column, b).sum() <= rows]
        np.testing.assert_array_equal(np.minimum(column, share), np.minimum(column, max(fits)))


@functools.cache
def bounded(rows):
    return on_devices(lambda experts, _: transfer.admitted(experts, E, rows, "expert"))


def admitted(experts, rows):
    flat = experts.reshape(-1, K)
    return np.asarray(bounded(rows)(flat, flat)).reshape(experts.shape)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 3.0, 50.0]), st.sampled_from([1, 5, 12]))
@SETTINGS
def test_who_is_admitted(seed, skew, rows):
    """No device gets more than its rows, none is turned away while there is room for all."""
    experts = routing(seed, skew)
    kept = admitted(experts, rows)
    assert np.all(kept[experts >= E]), "zero-computation experts have no buffer"
    for d in range(DEVICES):
        to_d = experts // LOCAL == d
        asked, got = to_d.sum(axis=(1, 2)), (to_d & kept).sum(axis=(1, 2))
        assert got.sum() <= rows
        if asked.sum() <= rows:
            np.testing.assert_array_equal(asked, got)
        else:
            # All who were cut have the same, none has more, and one more for each would not fit.
            share = got[got < asked]
            assert np.all(share == share[0]) and np.all(got <= share[0])
            assert got.sum() + len(share) > rows
        for s in range(DEVICES):
            mine = kept[s][to_d[s]]  # in token order
            np.testing.assert_array_equal(mine, np.arange(len(mine)) < got[s])


def test_admission_is_causal():
    """What later tokens choose turns no earlier token of their device away, nor lets one in."""
    experts = routing(0, 3.0)
    before = admitted(experts, 5)
    assert not before.all()
    for seed in range(1, 6):
        edited = experts.copy()
        edited[:, T // 2 :] = routing(seed, 3.0)[:, T // 2 :]
        for s in range(DEVICES):  # one device at a time: other devices have other sequences
            one = experts.copy()
            one[s] = edited[s]
            np.testing.assert_array_equal(admitted(one, 5)[s, : T // 2], before[s, : T // 2])


@functools.cache
def layer_of(buffer, moved):
    layer = cases.layer(SPEC)
    path = moe.dropless(moe.Blocked(moe.swiglu, block=3), moved, buffer)
    return moe.MoE(layer.rule, path)


def skewed():
    p, x, previous = cases.case(SPEC, groups=8, size=16)
    p, x = cases.steer(p, x, [0, 2, 0, 1.5, -2, 0, 0, 0, 0, 0, 1, 0])
    p["router"]["w"][:, 1:] = 0.5 * cases.params(SPEC)["router"]["w"][:, 1:]
    return jax.tree.map(jnp.asarray, (p, x, previous))


@pytest.mark.parametrize("moved", [transfer.dense, transfer.ragged])
@pytest.mark.parametrize("mesh", [(1, 1, 8), (2, 1, 4)], ids=str)
def test_a_bound_drops_and_says_so(ragged, moved, mesh):
    """As without a bound where assignments were kept; what was not is no one's output or gradient.

    The share of drops is in the layer's statistics.
    """
    p, x, previous = skewed()
    layer = layer_of(BUFFER, moved)
    weights = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)

    def ours(p, x):
        y, _, stats = moe.sharded(x, previous, p, layer, mesh_of(mesh))
        return jnp.sum(weights * y), (y, stats)

    gradients, (y, stats) = jax.jit(jax.grad(ours, (0, 1), has_aux=True))(p, x)
    r = layer.rule.route(x, previous, p["router"])
    kept = np.concatenate([admit(r.experts, mesh, part) for part in range(mesh[0])])
    assert 0.05 < 1 - kept.mean() < 0.6
    kept = jnp.asarray(kept)

    def naive(p, x):
        r = layer.rule.route(x, previous, p["router"])
        gates = jnp.where(kept, r.gates, 0.0)
        y, _ = layer.path(x, r._replace(gates=gates), p["ffn"], layer.rule, None)
        y += moe.experts.zero_computation(x, r.experts, gates, kept, p["const"], layer.pool)
        return jnp.sum(weights * y), y

    wanted, y_naive = jax.jit(jax.grad(naive, (0, 1), has_aux=True))(p, x)
    cases.close(y, y_naive, 1e-6)
    cases.trees_close(gradients, wanted, 1e-6)
    summary = moe.summarise(jax.tree.map(lambda s: s.mean(0), stats), layer.pool)
    np.testing.assert_allclose(summary["drop_rate"], 1 - kept.mean(), atol=1e-6)


def admit(experts_GSK, mesh, part):
    """Who is admitted on the devices of one replica, by loops."""
    n = mesh[2]
    experts = np.asarray(experts_GSK).reshape(mesh[0], n, -1, experts_GSK.shape[-1])[part]
    rows = int(np.ceil(BUFFER * experts[0].size))
    kept = np.ones(experts.shape, bool)
    for d in range(n):
        to_d = experts // (E // n) == d
        asked = to_d.sum(axis=(1, 2))
        share = max(b for b in range(experts[0].size + 1) if np.minimum(asked, b).sum() <= rows)
        for s in range(n):
            kept[s][np.nonzero(to_d[s])] = np.arange(asked[s]) < share
    return kept.reshape(-1, experts_GSK.shape[1], experts_GSK.shape[2])


@pytest.mark.parametrize("buffer", [0.0, -1.0])
def test_a_buffer_has_room(buffer):
    with pytest.raises(ValueError, match=f"buffer = {buffer} .* above 0"):
        moe.dropless(buffer=buffer)


@pytest.mark.parametrize(
    ("buffer", "tile", "rows"), [(1.25, 1, 40), (1.25, 16, 48), (9.0, 48, 128)]
)
def test_a_bound_is_of_whole_tiles(buffer, tile, rows):
    """Of 8 devices, each with 16 tokens of 2 choices; 128 rows are the worst case."""
    seen = []

    def noted(params, rows_RD, counts_E):
        seen.append(len(rows_RD))
        return rows_RD

    p, x, previous = skewed()
    layer = moe.MoE(
        layer_of(BUFFER, transfer.dense).rule, moe.dropless(noted, buffer=buffer, tile=tile)
    )
    jax.eval_shape(lambda p, x: moe.sharded(x, previous, p, layer, mesh_of((1, 1, 8))), p, x)
    assert seen == [rows]
