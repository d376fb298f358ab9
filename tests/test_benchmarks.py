"""The layer benchmark in small: that it times what it says, not how fast anything is."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax.benchmarks import bare, decode, layer, timing, variable

SHAPE = layer.Shape(
    tokens=128, groups=2, width=16, ffn_size=24, n_ffn=4, zero_computation=(1, 1, 1)
)
KEYS = {
    "experts",
    "tau",
    "mode",
    "pass",
    "seconds",
    "speedup",
    "theory",
    "fraction_of_theory",
    "over_bare_products",
    "roofline",
    "compiler_flops_over_ideal",
    "temp_bytes",
}


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    monkeypatch.setattr(bare, "SIDE", 64)
    monkeypatch.setattr(bare, "NUMBERS", 4096)


@pytest.mark.parametrize("mode", layer.MODES)
def test_rows(mode, monkeypatch):
    monkeypatch.setattr(layer, "TAUS", (0.25, 1.0))
    rows = layer.measure(SHAPE, mode, "forward_backward", rounds=1)
    assert json.loads(json.dumps(rows)) == rows
    assert all(row.keys() >= KEYS and row["seconds"] > 0 for row in rows)
    assert [row["tau"] for row in rows] == [None, 0.25, 1.0]
    assert [row["experts"] for row in rows] == ["4+0", "4+3", "4+3"]
    assert [row["theory"] for row in rows] == [1, 4, 1.75]
    for row in rows:
        assert row["speedup"] == rows[0]["seconds"] / row["seconds"]
        assert row["fraction_of_theory"] == row["speedup"] / row["theory"]
        assert row["roofline"] == rows[0]["roofline_seconds"] / row["roofline_seconds"]
        # Blocks and slots of few rows; dropless backward computes the products of x once more.
        most = 1.6 if mode == "dropless" else 1.35
        assert 0.99 < row["compiler_flops_over_ideal"] < most
        assert row["temp_bytes"] > 0


def test_roofline_is_the_slower_of_both():
    limits = bare.Limits(flops=100.0, bandwidth=10.0)
    assert limits.seconds(1000.0, 50.0) == 10 and limits.seconds(100.0, 50.0) == 5
    timed = {"peak": timing.Seconds(3.0, 2.0, 4.0), "memory": timing.Seconds(3.0, 1.0, 4.0)}
    assert bare.Limits.of(timed) == (2 * 64**3 / 2, 8 * 4096)


def test_subjects_of_a_shape_share_their_experts():
    """And each has the rest of its own pool."""
    mine = [
        layer.cases_of(s, SHAPE, "capacity", "forward")["layer"].arguments[1]
        for s in layer.subjects(SHAPE)[:2]
    ]
    assert mine[0]["ffn"]["w_in"] is mine[1]["ffn"]["w_in"]
    assert "const" not in mine[0] and mine[1]["router"]["w"].shape == (7, 16)


def test_models_are_the_papers():
    pools = {name: layer.subjects(shape)[1].pool for name, shape in layer.MODELS.items()}
    assert {name: (p.n_ffn, p.n_zero_computation) for name, p in pools.items()} == {
        "0.6B": (8, 4),
        "1B": (16, 4),
        "2B": (32, 8),
        "7B": (16, 4),
    }


def test_the_layer_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(layer, "TAUS", (0.75,))
    monkeypatch.setitem(layer.MODELS, "1B", SHAPE)
    out = tmp_path / "layer.json"
    others = [{"mode": "capacity", "pass": "forward", "tau": tau} for tau in (0.5, 0.25)]
    there = [{"model": model} | row for model in ("7B", "1B", "0.6B") for row in others]
    out.write_text(json.dumps(there))
    given = f"layer --rounds=1 --models 1B --modes capacity --passes forward --json {out}"
    monkeypatch.setattr("sys.argv", given.split())
    layer.main()
    rows = json.loads(out.read_text())
    assert [(row["model"], row["tau"]) for row in rows] == [
        *(("0.6B", tau) for tau in (0.5, 0.25)),
        *(("1B", tau) for tau in (None, 0.75)),
        *(("7B", tau) for tau in (0.5, 0.25)),
    ]
    assert "roofline" in capsys.readouterr().out


@pytest.mark.parametrize("mode", layer.MODES)
def test_a_layer_in_another_type(mode):
    """The router stays in float32; what is multiplied is not."""
    subject = layer.subjects(SHAPE)[1]
    cases = layer.cases_of(subject, SHAPE, mode, "forward_backward", jnp.dtype(jnp.bfloat16))
    for name, case in cases.items():
        y, _ = jax.eval_shape(case.function, *case.arguments)
        assert {leaf.dtype for leaf in jax.tree.leaves(y)} == {jnp.dtype(jnp.bfloat16)}, name
    _, _, params = cases["layer"].arguments
    assert params["router"]["w"].dtype == jnp.float32
    assert params["ffn"]["w_in"].dtype == jnp.bfloat16


def test_theory_by_hand():
    """1 / (tau 4 / (tau 4 + 3))."""
    theory = [round(subject.theory, 3) for subject in layer.subjects(SHAPE)]
    assert [None, *layer.TAUS] == [None, 0.1, 0.25, 0.5, 0.75, 1.0]
    assert theory == [1, 8.5, 4, 2.5, 2, 1.75]


def test_router_is_set_to_the_balance_point():
    shape = SHAPE._replace(tokens=4096)
    for subject in layer.subjects(shape):
        logits = layer.balanced_logits(subject, shape)
        _, experts = jax.lax.top_k(logits, layer.TOP_K)
        ffn = float(jnp.mean(jnp.sum(experts < subject.pool.n_ffn, axis=-1)))
        assert ffn == pytest.approx(layer.TOP_K / subject.theory, rel=0.02)


def test_bare_products_are_those_of_the_experts():
    ffn = {"w_in": jnp.zeros((4, 2, 24, 16)), "w_out": jnp.zeros((4, 16, 24))}
    for way, passes in (("forward", 1), ("forward_backward", 3)):
        case = bare.products(ffn, 40, way)
        cost = case.function.lower(*case.arguments).compile().cost_analysis()
        assert cost["flops"] == pytest.approx(passes * 4 * 40 * 6 * 16 * 24, rel=0.01)


SMALL = decode.Shape(1, 32, 2, 48, 64, 4, (1, 1, 1))


def test_bytes_of_a_step_are_those_of_the_arrays():
    shared = decode.shared_params(SMALL)
    for subject in decode.subjects(SMALL)[:2]:
        generator = decode.generator_of(subject, SMALL, shared)
        params = generator._programs._params
        expert = sum(p.nbytes for p in jax.tree.leaves(params["layers"][0]["moe"]["ffn"][0]))
        every = sum(p.nbytes for p in jax.tree.leaves(params)) - 4 * expert
        every -= params["embedding"].nbytes  # of which a step reads one row a token
        counted = decode.Bytes.of(SMALL, subject)
        assert counted.expert == expert
        assert counted.every_step == every
        assert counted.place == 2 * 4 * 32


def test_routers_are_set_to_the_theory():
    for subject in decode.subjects(SMALL):
        noise = np.random.default_rng(1).normal(size=(5000, subject.pool.size)).astype(np.float32)
        noise -= noise.mean(axis=1, keepdims=True)
        rule, N = decode.rule_of(subject), subject.pool.size
        shift = decode.balancing_shift(subject)
        params = {"w": jnp.eye(N), "bias": shift * (jnp.arange(N) < subject.pool.n_ffn)}
        x = jnp.asarray(noise)[None]
        chosen = np.asarray(rule.route(x, jnp.zeros_like(x), params).experts[0])
        ffn = (chosen < subject.pool.n_ffn).sum(axis=1).mean()
        assert ffn == pytest.approx(decode.TOP_K / subject.theory, rel=0.1)


@pytest.mark.slow
def test_decoding_is_timed():
    rows = decode.measure(SMALL, (1, 2), rounds=1, floats=1 << 16)
    assert json.loads(json.dumps(rows)) == rows
    assert [(row["batch"], row["tau"]) for row in rows] == [
        (batch, tau) for batch in (1, 2) for tau in (None, *decode.TAUS)
    ]
    for row in rows:
        assert row["seconds_per_step"] > 0 and row["speedup"] > 0
        assert row["ffn_experts_per_token"] <= row["experts_read_per_layer"] * 1.001 <= 4.01


def test_interleaved_runs_every_case_each_round():
    calls = []
    cases = {name: timing.Case(lambda name=name: calls.append(name), ()) for name in "abc"}
    seconds = timing.interleaved(cases, rounds=7)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 8  # one to compile
    assert all(sorted(each) == list("abc") for each in rounds)
    assert len(set(rounds)) > 2  # in an order of its own
    assert all(s.low <= s.median <= s.high for s in seconds.values())


def test_summary_is_of_median_and_quartiles():
    assert timing.summary([5.0, 1.0, 3.0, 2.0, 4.0]) == timing.Seconds(3.0, 2.0, 4.0)
    assert np.isfinite(timing.summary([1.0])).all()


def test_machine_is_named(monkeypatch):
    assert "jax" in timing.machine()
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(timing.os, "sched_getaffinity", lambda process: {0, 2}, raising=False)
    assert ", 2 of 4 cores, jax" in timing.machine()


def test_unused_choices(monkeypatch):
    """Both rules compute the same, whatever room there is, and rows say which is which."""
    shape = variable.Shape(tokens=64, width=16, ffn_size=24, n_ffn=4)
    monkeypatch.setattr(variable, "USED", (1, 4))
    some, exact = (variable.case(shape, 1, most, "forward") for most in (4, 1))
    y, want = (case.function(*case.arguments) for case in (some, exact))
    np.testing.assert_allclose(y, want, atol=1e-6)
    assert np.abs(want).max() > 0
    rows = variable.measure(shape, "forward_backward", rounds=1)
    assert json.loads(json.dumps(rows)) == rows
    assert [row["used"] for row in rows] == [1, 4]
    assert all(row["ratio"] == row["seconds"] / row["exact_seconds"] for row in rows)
