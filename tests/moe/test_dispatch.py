"""Queues, slots and rows for any routing; the moves between tokens and rows and their adjoints."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from moepp_jax import moe
from moepp_jax.moe import dispatch, losses
from moepp_jax.moe import rows as rows_lib

D = 3
SETTINGS = settings(max_examples=30, deadline=None)


class Case(NamedTuple):
    """A routing of G groups of S tokens, K of N experts each, the first n_ffn of them FFN."""

    experts: np.ndarray
    n_ffn: int
    capacity: tuple[int, ...]

    @property
    def pool(self):
        return moe.Pool(self.n_ffn, 0, len(self.capacity) - self.n_ffn)


@st.composite
def routings(draw):
    """Few shapes, so that each compiles once; any choices, from even to all on one expert."""
    G, S, K, n_ffn, capacity = draw(
        st.sampled_from(
            [(1, 5, 1, 2, (2, 2, 1)), (2, 8, 2, 4, (2, 2, 2, 2, 3, 3)), (3, 4, 3, 4, (3, 3, 3, 3))]
        )
    )
    N = len(capacity)
    skew = draw(st.sampled_from([0.0, 1.0, 5.0, 50.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    popularity = skew * rng.normal(size=N)
    noise = rng.gumbel(size=(G, S, N))
    experts = np.argsort(-(popularity + noise), axis=-1)[..., :K].astype(np.int32)
    return Case(experts, n_ffn, capacity)


def capacity_plan(case):
    return jax.jit(dispatch.assign, static_argnums=1)(jnp.asarray(case.experts), case.capacity)


def capacity_rows(case, tile=1):
    rows = jax.jit(dispatch.capacity_rows, static_argnums=(2, 3, 4))
    plan = capacity_plan(case)
    return rows(jnp.asarray(case.experts), plan, case.n_ffn, case.capacity[0], tile), plan


def sorted_rows(case):
    K = case.experts.shape[-1]
    return jax.jit(dispatch.sorted_rows, static_argnums=1)(
        jnp.asarray(case.experts.reshape(-1, K)), case.n_ffn
    )


@given(routings())
@SETTINGS
def test_queues_are_in_token_order(case):
    """Slots of an expert in a group are 0, 1, 2, ... as its tokens come; those < C are kept."""
    slot, kept = (np.asarray(a) for a in capacity_plan(case))
    for g in range(case.experts.shape[0]):
        for i, room in enumerate(case.capacity):
            mine = case.experts[g] == i  # token-major, as numpy reads it
            np.testing.assert_array_equal(slot[g][mine], np.arange(mine.sum()))
            np.testing.assert_array_equal(kept[g][mine], np.arange(mine.sum()) < room)


def served_in_turn(experts_GSK, capacity, sequences):
    """The slot of each choice that is served, else -1, one after the other."""
    G, S, K = experts_GSK.shape
    positions = S // sequences
    slots = np.full((G, S, K), -1)
    for g in range(G):
        given_out = [0] * len(capacity)
        for s in (s for t in range(positions) for s in range(t, S, positions)):
            for k, i in enumerate(experts_GSK[g, s]):
                if i < len(given_out) and given_out[i] < capacity[i]:
                    slots[g, s, k] = given_out[i]
                    given_out[i] += 1
    return slots


def test_each_expert_has_its_own_room():
    """Of a group whose tokens all choose one expert; expert N, of an unused choice, has none."""
    capacity = (3, 3, 1, 2, 2, 3)
    chosen = jnp.broadcast_to(jnp.arange(7)[:, None, None], (7, 5, 1))
    kept = dispatch.assign(chosen, capacity).kept
    np.testing.assert_array_equal(kept.sum(axis=(1, 2)), [*capacity, 0])


@pytest.mark.parametrize("sequences", [1, 2, 4])
@given(seed=st.integers(0, 2**32 - 1), skew=st.sampled_from([0.0, 1.0, 5.0]))
@settings(max_examples=15, deadline=None)
def test_slots_are_given_position_by_position(sequences, seed, skew):
    """Across the sequences of a group; some choices are unused."""
    S, N = 8, 3
    rng = np.random.default_rng(seed)
    popularity = skew * rng.normal(size=N + 1) + rng.gumbel(size=(2, S, N + 1))
    experts = np.argsort(-popularity, axis=-1)[..., :2].astype(np.int32)
    capacity = (4, 2, 2)
    plan = jax.jit(lambda e: dispatch.assign(e, capacity, sequences))(experts)
    wanted = served_in_turn(experts, capacity, sequences)
    np.testing.assert_array_equal(plan.kept, wanted >= 0)
    np.testing.assert_array_equal(np.where(plan.kept, plan.slot, -1), wanted)


def check_inverse(rows, has_row):
    """Each row's assignment has that row; each assignment has a row or none, as it should."""
    assignment, row = np.asarray(rows.assignment), np.asarray(rows.row).reshape(-1)
    R = len(assignment)
    np.testing.assert_array_equal(row < R, has_row.reshape(-1))
    np.testing.assert_array_equal(row[~has_row.reshape(-1)], R)
    filled = assignment < row.size
    assert filled.sum() == has_row.sum()
    np.testing.assert_array_equal(row[assignment[filled]], np.flatnonzero(filled))
    np.testing.assert_array_equal(assignment[~filled], row.size)


@given(routings(), st.sampled_from([1, 8]))
@SETTINGS
def test_capacity_rows(case, tile):
    """Row (expert, group and slot) for every kept assignment to an FFN expert, none for others."""
    rows, plan = capacity_rows(case, tile)
    has_row = np.asarray(plan.kept) & (case.experts < case.n_ffn)
    check_inverse(rows, has_row)
    G, slots = len(case.experts), case.capacity[0]
    of_expert = len(rows.assignment) // case.n_ffn
    assert of_expert % tile == 0 and 0 <= of_expert - G * slots < tile
    group = np.broadcast_to(np.arange(G)[:, None, None], has_row.shape)
    place = case.experts * of_expert + group * slots + plan.slot
    got = np.asarray(rows.row)[has_row.reshape(-1, has_row.shape[-1])]
    np.testing.assert_array_equal(got, place[has_row])


@given(routings())
@SETTINGS
def test_sorted_rows(case):
    """All assignments to FFN experts by expert, then token, without a gap."""
    rows, counts = sorted_rows(case)
    flat = case.experts.reshape(-1)
    check_inverse(rows, flat < case.n_ffn)
    wanted = [a for e in range(case.n_ffn) for a in np.flatnonzero(flat == e)]
    np.testing.assert_array_equal(rows.assignment[: len(wanted)], wanted)
    np.testing.assert_array_equal(counts, [(flat == e).sum() for e in range(case.n_ffn)])


@given(routings())
@SETTINGS
def test_statistics(case):
    """Loads sum to K, probabilities to 1, and what is served is what was kept."""
    G, S, K = case.experts.shape
    N = len(case.capacity)
    probs = jax.nn.softmax(jnp.linspace(0.0, 3.0, G * S * N).reshape(G, S, N))
    plan = capacity_plan(case)
    routing = moe.Routing(jnp.asarray(case.experts), jnp.ones((G, S, K)), probs, probs)
    stats = jax.jit(losses.statistics)(routing, plan.kept, {})
    np.testing.assert_allclose(stats.load.sum(-1), K, rtol=1e-6)
    np.testing.assert_allclose(stats.prob.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(stats.kept.sum(-1) * S, plan.kept.sum((1, 2)), rtol=1e-6)
    dropless = jax.jit(losses.statistics)(routing, jnp.ones((G, S, K), bool), {})
    np.testing.assert_array_equal(dropless.kept, dropless.load)
    assert np.all(stats.kept <= stats.load)
    assert np.all(stats.kept <= np.array(case.capacity) / S + 1e-6)


def gather(x_TD, rows, take=rows_lib.taken):
    """One part, of tokens in one group."""
    return rows_lib.gather(x_TD[None], [rows], take)[0]


def combine(y_RD, gates_TK, rows, take=rows_lib.taken):
    return rows_lib.combine([y_RD], gates_TK[None], [rows], take)[0]


def naive_gather(x_TD, rows):
    """`gather` as an indexing that autodiff sees through; empty rows hold zeros."""
    K = rows.row.shape[1]
    filled = rows.assignment < rows.row.size
    return jnp.where(filled[:, None], x_TD[jnp.where(filled, rows.assignment // K, 0)], 0.0)


def naive_combine(y_RD, gates_TK, rows):
    has_row = rows.row < y_RD.shape[0]
    y_TKD = y_RD[jnp.where(has_row, rows.row, 0)]
    return jnp.sum(jnp.where(has_row, gates_TK, 0.0)[..., None] * y_TKD, axis=1)


@jax.jit
def moves(x, y, gates, d_x, d_y, rows):
    """gather, combine and their gradients: ours, as a TPU is told to make them, and naive ones."""
    out = []
    on_tpu = {"take": rows_lib.taken_as_they_are}
    for there, back in [
        (gather, combine),
        (functools.partial(gather, **on_tpu), functools.partial(combine, **on_tpu)),
        (naive_gather, naive_combine),
    ]:
        gathered, gather_back = jax.vjp(lambda x, f=there: f(x, rows), x)
        combined, combine_back = jax.vjp(lambda y, g, f=back: f(y, g, rows), y, gates)
        out.append((gathered, gather_back(d_y), combined, combine_back(d_x)))
    return out


@given(routings(), st.sampled_from(["capacity", "sorted"]), st.integers(0, 2**32 - 1))
@SETTINGS
def test_moves_and_their_gradients(case, order, seed):
    """Against autodiff of indexing, as adjoints of each other, and combine after gather."""
    rows = capacity_rows(case)[0] if order == "capacity" else sorted_rows(case)[0]
    rng = np.random.default_rng(seed)
    (T, K), R = rows.row.shape, len(rows.assignment)
    shapes = dict(x=(T, D), y=(R, D), gates=(T, K), d_x=(T, D), d_y=(R, D))
    a = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    filled = np.asarray(rows.assignment) < T * K
    ours, on_tpu, naive = moves(**a, rows=rows)
    for out in (ours, on_tpu):
        np.testing.assert_array_equal(out[0][filled], naive[0][filled])
        for got, want in zip(jax.tree.leaves(out[1:]), jax.tree.leaves(naive[1:]), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    # <gather(x), y> = <x, gather^T(y)>, y zero in the empty rows, of which gather promises nothing.
    left = np.vdot(ours[0][filled], np.asarray(a["d_y"])[filled])
    np.testing.assert_allclose(left, np.vdot(a["x"], ours[1][0]), rtol=1e-4, atol=1e-4)
    # combine(gather(x)) is x times the sum of the gates that have a row.
    total = np.where(np.asarray(rows.row) < R, a["gates"], 0).sum(-1, keepdims=True)
    back = jax.jit(combine)(ours[0], a["gates"], rows)
    np.testing.assert_allclose(back, a["x"] * total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [capacity_rows, sorted_rows])
def test_gradients_by_differences(order):
    """In float64, where a difference quotient is worth something."""
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.normal(size=(2, 6, 5)), axis=-1)[..., :2].astype(np.int32)
    rows, _ = order(Case(experts, 3, (2, 2, 2, 3, 3)))
    empty = np.asarray(rows.assignment) == rows.row.size
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(12, D)))
        y = jnp.asarray(rng.normal(size=(len(rows.assignment), D)))
        gates = jnp.asarray(rng.normal(size=(12, 2)))
        filled = jnp.asarray(~empty, jnp.float64)[:, None]
        there = jax.jit(lambda x: gather(x, rows) * filled)
        back = jax.jit(lambda y, gates: combine(y, gates, rows))
        check_grads(there, (x,), 1, ["rev"], 1e-8, 1e-8)
        check_grads(back, (y, gates), 1, ["rev"], 1e-6, 1e-6)  # float32 to the gates


def test_parts_read_and_write_what_is_theirs():
    """Two parts of three groups each, against one of all six: values and gradients."""
    rng = np.random.default_rng(0)
    G, S, K, E = 6, 4, 2, 3
    experts = jnp.asarray(np.argsort(rng.random((G, S, 5)), axis=-1)[..., :K], jnp.int32)
    x, d = (jnp.asarray(rng.normal(size=(G, S, D)), jnp.float32) for _ in range(2))
    gates = jnp.asarray(rng.random((G, S, K)), jnp.float32)

    def out(x, gates, parts):
        rows = [dispatch.sorted_rows(e.reshape(-1, K), E)[0] for e in jnp.split(experts, parts)]
        y = [jnp.sin(b) for b in rows_lib.gather(x, rows)]
        return jnp.sum(d * rows_lib.combine(y, gates, rows))

    one, two = (
        jax.jit(jax.value_and_grad(lambda *a, n=n: out(*a, n), (0, 1)))(x, gates) for n in (1, 2)
    )
    for got, want in zip(jax.tree.leaves(two), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_combine_sums_in_float32():
    """Of bfloat16 rows, 256 + 1 + 1 is 258, and not 256 as it would be one by one."""
    rows = rows_lib.Rows(jnp.array([0, 1, 2]), jnp.array([[0, 1, 2]]))
    y = jnp.array([[256.0], [1.0], [1.0]], jnp.bfloat16)
    out = combine(y, jnp.ones((1, 3)), rows)
    assert out.dtype == jnp.bfloat16
    assert float(out[0, 0]) == 258


@pytest.mark.parametrize("block", [4, 1024])
@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.0, 0.1, 0.4, 1.0]))
@settings(max_examples=15, deadline=None)
def test_few_rows_move_as_all_do(block, seed, share):
    """Values and gradients of loops over the rows there are, and those of all at once."""
    T, K, N = 12, 5, 6
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((T, N)), axis=-1)[:, :K].astype(np.int32)
    experts = jnp.asarray(np.where(rng.random((T, K)) < share, experts, N))
    x, d = (jnp.asarray(rng.normal(size=(T, D)), jnp.float32) for _ in range(2))
    gates = jnp.asarray(rng.random((T, K)), jnp.float32)

    def out(x, gates, few):
        rows, counts = dispatch.sorted_rows(experts, 4, few)
        y = gather(x, rows)
        filled = jnp.arange(len(y)) < counts.sum()
        y = jnp.where(filled[:, None], y**2, 0)  # what experts make of empty rows is not read
        return jnp.sum(d * combine(y, gates, rows))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_lib, "_BLOCK", block)
        got = jax.jit(jax.value_and_grad(lambda *a: out(*a, True), (0, 1)))(x, gates)
    want = jax.jit(jax.value_and_grad(lambda *a: out(*a, False), (0, 1)))(x, gates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)
