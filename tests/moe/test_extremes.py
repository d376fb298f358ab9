"""Every rule and both paths at the edges: one token, one expert, equal and huge logits, no room.

Choices, gates, losses, outputs and gradients are those of `exact`, the layer in float64, which
knows the rules by their equations alone.
"""

import dataclasses
import functools
import itertools
import random
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from moepp_jax import moe
from moepp_jax.moe import Pool, rules
from tests import oracle
from tests.moe import cases, exact
from tests.moe.rules import held
from tests.oracle import Spec

# Pools from the smallest that a rule is for; the last has every kind that it may have.
ANY = [(1,), (4,), (1, 2, 0, 2), (2, 1, 1, 1)]
POOLS = {
    "adamoe": [(1, 0, 0, 1), (2, 0, 0, 2), (4, 0, 0, 1)],
    "deepseek": [(1,), (2,), (4,)],
    "longcat": [(1, 0, 1), (2, 0, 2), (4, 0, 1)],
    "moepp": ANY,
    "remoe": ANY,
    "threshold": ANY,
    "tied_null": [(1, 0, 0, 1), (2, 0, 0, 2), (4, 0, 0, 3)],
    "top_p": ANY,
    "vanilla": [(1,), (2,), (4,)],
    "zeda": [(1, 0, 1), (4, 0, 0, 2), (2, 0, 1, 1)],
}
# The smallest gamma leaves every expert one slot: none has 0, for ceil(gamma load S) is 1 at least.
GAMMAS = (None, 1e-9, 1.0)
# No two differ by 87 to 104: there a probability is below the normal numbers of float32.
SIZES = (0.0, 1e-30, 0.5, 1.0, -2.0, 50.0, 1e4, -1e4, 1e30, -1e30)
D, F, TOKENS = 16, 3, 8

# Float32 against float64. Gates are products and quotients of a few numbers, each right to some
# 1e-7 of itself, and exponentials of differences of up to 52, right to 52 times that.
VALUES = 1e-5
# Gradients are sums over experts, tokens and D, about a hundred roundings of 6e-8, which are shares
# of the terms' magnitudes and not of what is left where they cancel.
GRADIENTS = 1e-5


class Config(NamedTuple):
    """A layer that a recipe may have."""

    kind: str
    pool: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]
    gamma: float | None


def config(kind, pool, top_k, gamma, pick) -> Config:
    """With options that suit the rule and the pool; pick(values) takes one of each."""
    pool = Pool(*pool)
    N, others = pool.size, pool.n_zero_computation
    options = {
        "logit_norm": pick((0.0, 0.0, 0.5)) if N > 1 else 0.0,
        "z_weight": pick((0.0, 0.1)),
        "residual": pick(("none", "logits", "detached")),
    }
    # Equal logits over a deviation of nothing are so large that float32 adds nothing to them.
    if others and not options["logit_norm"]:
        options["zero_offset"] = pick((0.0, 0.75))
    if kind in ("adamoe", "deepseek", "moepp", "top_p", "vanilla", "zeda"):
        options["gate"] = pick(cases.GATES)
    if kind not in ("top_p", "threshold"):
        options["top_k"] = top_k
    if kind == "deepseek":
        options |= {"scale": pick((1.0, 2.5)), "sequence_weight": 0.1}
    if kind == "longcat":
        # The same load of all experts: of K = N choices no other can be had.
        options |= {"ffn_experts": top_k * pool.n_ffn / N, "scale": pick((1.0, 6.0))}
        options |= {"groups": pick((1, pool.n_ffn)), "balance_weight": 0.1}
    if kind == "moepp":
        options["bias_rate"] = 0.1 if options.get("zero_offset") else 0.0
    if kind == "remoe":
        options["max_experts"] = pick((0, top_k))
    if kind == "threshold":
        fits = top_k <= 0.75 * pool.n_ffn + others  # or an expert would be chosen twice
        options |= {"top_k": float(top_k), "gate": pick(("raw", "renormalise_all"))}
        options |= {"tau": 0.75 if fits else 1.0, "max_experts": pick((0, top_k))}
    if kind == "top_p":
        options |= {"p": {1: 0.4, 2: 0.7}.get(top_k, 1.0), "max_experts": pick((0, top_k))}
        options |= {"expected": float(top_k), "entropy_weight": 0.1}
    if kind == "zeda":
        fits = top_k * 2 <= pool.n_ffn + 2 * others
        options |= {"zero_weight": 2.0 if fits else 1.0, "ffn_balance_weight": pick((0.0, 0.1))}
    return Config(kind, tuple(pool), tuple(options.items()), gamma)


def picking(kind: str):
    """A function that takes one of some values, and each of them before it takes one again."""
    rng, left = random.Random(kind), {}

    def pick(values):
        if not left.get(values):
            left[values] = rng.sample(values, len(values))
        return left[values].pop()

    return pick


@functools.cache
def configs(kind: str) -> list[Config]:
    """Every pool with every K; capacities and options as they come, for each is compiled."""
    pick = picking(kind)
    return [
        config(kind, pool, top_k, pick(GAMMAS), pick)
        for pool in POOLS[kind]
        for top_k in sorted({1, 2, sum(pool)})
        if top_k <= sum(pool)
    ]


@functools.cache
def corners(kind: str) -> list[Config]:
    """One expert, or as few as there can be; K = N of experts of few kinds; one slot an expert."""
    pick = picking(f"corners of {kind}")
    least, few, every = (POOLS[kind][i] for i in (0, 1, -1))
    return [
        config(kind, least, sum(least), 1.0, pick),
        config(kind, few, sum(few), None, pick),
        config(kind, every, 2, GAMMAS[1], pick),
    ]


class Layer(NamedTuple):
    """What is made once of a configuration."""

    moe: moe.MoE
    params: dict
    run: Any


@functools.lru_cache(maxsize=64)
def layer(config: Config) -> Layer:
    rule = rules.make(config.kind, Pool(*config.pool), **dict(config.options))
    dropless = moe.dropless(moe.Blocked(moe.swiglu, block=3))
    path = dropless if config.gamma is None else moe.with_capacity(config.gamma)
    built = moe.MoE(rule, path)
    params = jax.device_get(moe.init(jax.random.key(0), moe.describe(rule, D, F, std=0.4)))
    return Layer(built, params, jax.jit(functools.partial(trained, built)))


def trained(layer: moe.MoE, x, previous, params, weights):
    """All that training takes of a layer, with the gradients to tokens and parameters."""
    rule = layer.rule

    def loss(x, previous, params):
        y, r = moe.routed(x[None], previous[None], params, layer)
        stats = jax.tree.map(lambda a: a.mean(axis=0)[None], r.statistics)
        state = {name: jax.lax.stop_gradient(params["router"][name]) for name in rule.state()}
        terms = rule.losses(stats, state)
        total = sum(jnp.mean(t.weight * t.value) for t in terms.values())
        moved = rule.update({n: jnp.asarray(v)[None] for n, v in state.items()}, stats)
        return jnp.sum(y * weights) + total, (y[0], r, terms, moved)

    (total, aux), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, previous, params)
    return total, *aux, gradients


class Example(NamedTuple):
    """
    Attributes:
      logits: of every token; those of the last `padding` ones are zeros, as such tokens are.
      seed: of all that is random; the rule's state is that of the start where it is even.
    """

    config: Config
    logits: tuple[tuple[float, ...], ...]
    padding: int = 0
    seed: int = 0


def inputs(example: Example):
    """x (S, D), previous logits (S, N), parameters and the weights of y in the loss."""
    made, tokens = layer(example.config), len(example.logits)
    rule = made.moe.rule
    rng = np.random.default_rng(example.seed)
    # The s-th token begins with the s-th unit vector, so that column s of W is its logits.
    x = np.concatenate([np.eye(tokens, TOKENS), rng.normal(size=(tokens, D - TOKENS))], axis=1)
    x[tokens - example.padding :] = 0
    router = dict(made.params["router"])
    router["w"] = np.zeros_like(router["w"])
    logits = np.array(example.logits, np.float32)
    if example.config.kind == "remoe" and rule.logit_norm:
        # Over a deviation of nothing, a gate is what rounding makes of it, unless it is 0.
        logits[logits.min(axis=1) == logits.max(axis=1)] = 0
    router["w"][:, :tokens] = logits[:, : len(router["w"])].T
    if "w_residual" in router:
        router["w_residual"] = np.zeros_like(router["w_residual"])
    if example.seed % 2:
        router |= {name: state(name, router[name].shape, rng) for name in rule.state()}
    previous = rng.normal(size=(tokens, rule.pool.size))
    weights = rng.normal(size=(tokens, D))
    return (
        np.float32(x),
        np.float32(previous),
        made.params | {"router": router},
        np.float32(weights),
    )


def state(name: str, shape, rng) -> np.ndarray:
    """As it may be after some steps."""
    drawn = {
        "bias": lambda: rng.integers(-3, 4, shape) / 8,  # exact beside a logit of 1e4
        "coefficient": lambda: np.exp(rng.normal(0, 2, shape)),
        "cutoff": lambda: rng.normal(0, 0.03, shape),  # of 3 updates: cutoffs of order 1
        "rate": lambda: rng.uniform(0.01, 0.1, shape),
        "updates": lambda: np.full(shape, 3.0),
    }
    return np.float32(drawn[name]())


def check(example: Example) -> None:
    kind, gamma = example.config.kind, example.config.gamma
    made = layer(example.config)
    rule, N = made.moe.rule, made.moe.rule.pool.size
    arguments = inputs(example)
    total, y, r, terms, moved, gradients = jax.device_get(made.run(*arguments))
    results = {
        "loss": total,
        "y": y,
        "gradient": gradients,
        "state": moved,
        "own": r.statistics.own,
    }
    for name, tree in results.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            assert np.isfinite(leaf).all(), (name, jax.tree_util.keystr(path))

    x, previous, params, weights = jax.tree.map(np.float64, arguments)
    experts = r.routing.experts[0]
    chosen = (experts[..., None] == np.arange(N)).any(axis=1)
    used = experts < N
    assert experts.min() >= 0 and experts.max() <= N
    assert (used.sum(axis=1) == chosen.sum(axis=1)).all(), "chosen once"
    logits = (x @ params["router"]["w"].T)[:, exact.tied(rule, params)]
    assert (r.routing.logits[0] == logits).all(), "one product of each is not 0"
    want = exact.route(kind, rule, logits, params["router"], chosen)
    exact.require_best(kind, rule, want, chosen)
    served = exact.kept(kind, rule, chosen, gamma)
    assert (held.by_expert(experts[None], r.kept, N)[0] == served).all(), (chosen, served)

    gates = held.by_expert(experts[None], r.routing.gates, N)[0]
    assert not r.routing.gates[0][~used].any()
    near(gates, want.gates, "gates")
    near(r.routing.scores[0], want.scores, "scores")
    stats = r.statistics
    near(stats.load[0], chosen.mean(axis=0), "load")
    near(stats.kept[0], served.mean(axis=0), "kept")
    near(stats.prob[0], want.scores.mean(axis=0), "prob")
    near(stats.z[0], exact.z(logits), "z")
    near(stats.entropy[0], exact.entropy(want.scores), "entropy", VALUES)
    assert terms.keys() == want.losses.keys()
    for name, (value, weight) in want.losses.items():
        near(terms[name].value[0], value, name)
        near(terms[name].weight, weight, f"weight of {name}")

    spec = Spec(*rule.pool)
    for s in range(len(x)):
        parts = [
            want.gates[s, i] * oracle.expert(spec, i, x[s], params)
            for i in np.flatnonzero(served[s])
        ]
        magnitude = sum(np.abs(part).max() for part in parts)
        near(y[s], sum(parts, np.zeros(D)), f"y of token {s}", VALUES * magnitude)
    compare_gradients(example, gradients, (x, previous, params, weights), chosen, served)


def near(actual, expected, what: str, tolerance=None) -> None:
    """Each to VALUES of itself, or as given. np.testing would take a third of all the time."""
    tolerance = VALUES * np.abs(expected) + 1e-36 if tolerance is None else tolerance
    assert (np.abs(actual - expected) <= tolerance).all(), (what, actual, expected)


def compare_gradients(example: Example, gradients, given, chosen, served) -> None:
    rule = layer(example.config).moe.rule
    x, previous, params, weights = given
    to_x, to_previous, to_params = gradients
    rng = np.random.default_rng(1)
    directions = {
        group: {n: rng.normal(size=(3, *a.shape)) for n, a in params[group].items()}
        for group in ("ffn", "const")
        if group in params
    }
    want = exact.gradients(
        example.config.kind, rule, x, previous, params, chosen, served, weights, directions
    )
    got = {"x": to_x, "w": to_params["router"]["w"]}
    if "w_residual" in params["router"]:
        got["w_residual"] = to_params["router"]["w_residual"][
            :, : want["w_residual"].value.shape[1]
        ]
    for group, tree in directions.items():
        for name, direction in tree.items():
            product = np.float64(to_params[group][name]) * direction
            got[f"{group} {name}"] = product.reshape(*product.shape[:2], -1).sum(axis=-1)
    assert got.keys() == want.keys()
    for name, (value, scale) in want.items():
        near(got[name], value, f"gradient to {name}", GRADIENTS * scale + 1e-36)
    assert not to_previous.any()  # through a residual's matrix of zeros
    for name in rule.state():
        assert not to_params["router"][name].any(), name


@st.composite
def examples(draw, layers):
    """Of layers, each with its numbers of tokens."""
    config, tokens = draw(st.sampled_from(layers))
    row = st.tuples(*[st.sampled_from(SIZES)] * sum(config.pool))
    alike = draw(st.booleans())  # so that all go to one expert
    logits = (draw(row),) * tokens if alike else draw(st.tuples(*[row] * tokens))
    padding = draw(st.sampled_from((0, 0, 0, tokens // 2, tokens)))
    return Example(config, logits, padding, draw(st.integers(0, 9999)))


def named(config: Config, tokens: int) -> dict[str, Example]:
    """What must be tried of every layer."""
    N = sum(config.pool)
    ordinary = tuple(SIZES[2:5][(s + i) % 3] + s for s in range(tokens) for i in range(N))
    one = (50.0,) + (0.0,) * (N - 1)
    cases = {
        "ordinary": [ordinary[s * N : s * N + N] for s in range(tokens)],
        "all to the first": [one] * tokens,
        "all to the last": [one[::-1]] * tokens,
        "equal": [(1.0,) * N] * tokens,
        "equal and huge": [(1e30,) * N] * tokens,
        "equal and huge, below 0": [(-1e30,) * N] * tokens,
        "huge": [tuple(SIZES[-4:][(s + i) % 4] for i in range(N)) for s in range(tokens)],
    }
    cases = {name: Example(config, tuple(rows)) for name, rows in cases.items()}
    ordinary = cases["ordinary"]
    return cases | {
        "padding": ordinary._replace(padding=tokens),
        "padding, later": ordinary._replace(padding=tokens, seed=1),
        "ordinary, later": ordinary._replace(seed=3),
    }


def hold(layers, count: int) -> int:
    """Checks the named examples of layers and `count` drawn ones; how many different ones."""
    checked = set()

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),  # a smaller example would be of another layer
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(examples(layers))
    def drawn(example):
        check(example)
        checked.add(example)

    for config, tokens in layers:
        for name, case in named(config, tokens).items():
            drawn = hypothesis.example(case).via(name)(drawn)
    drawn()
    return len(checked)


@pytest.mark.parametrize("kind", sorted(POOLS))
def test_some(kind):
    one, few, every = corners(kind)
    hold([(one, 1), (few, TOKENS), (every, TOKENS)], 6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(POOLS))
def test_many(kind):
    layers = [*itertools.product(corners(kind), (1, TOKENS))]
    layers += [(config, TOKENS) for config in configs(kind)]
    assert hold(layers, 2000) >= 2000
    layer.cache_clear()


def test_every_rule_is_here():
    assert sorted(POOLS) == sorted(exact.RULES) == rules.names()


def test_the_least_room_is_for_one():
    """gamma load S is at most 8e-9 here, and all of it is rounded up."""
    assert moe.capacity((0.25, 0.5, 1.0), GAMMAS[1], 8) == (1, 1, 1)
    assert moe.capacity((0.25, 0.5, 1.0), 1.0, 1) == (1, 1, 1)


@pytest.mark.parametrize("gate", cases.GATES)
def test_exact_is_the_loop(gate):
    """The reference here and the loop over tokens, which share nothing: outputs and slopes."""
    spec = Spec(4, 2, 1, 1, gate=gate, gamma=0.5, logit_std=0.8)
    params, x, previous = jax.tree.map(np.float64, cases.case(spec))
    rule = dataclasses.replace(cases.rule(spec), balance_weight=0.0)
    x, previous = x[0], previous[0]
    weights = np.random.default_rng(0).normal(size=x.shape)
    params["router"]["w_residual"] *= 0  # the reference takes logits to be W x

    def loop(x, w):
        router = params["router"] | {"w": w}
        return oracle.layer(spec, x[None], previous[None], params | {"router": router})

    w = params["router"]["w"]
    want = loop(x, w)
    chosen = (want.experts[0][..., None] == np.arange(8)).any(axis=1)
    got = exact.route("moepp", rule, x @ w.T, {}, chosen)
    exact.require_best("moepp", rule, got, chosen)
    served = exact.kept("moepp", rule, chosen, spec.gamma)
    assert not served[chosen].all()
    y = np.einsum("sn,snd->sd", got.gates * served, exact.experts(rule.pool, x, params))
    np.testing.assert_allclose(y, want.y[0], rtol=1e-9, atol=1e-12)

    slopes = exact.gradients(
        "moepp", rule, x, previous, params, chosen, served, weights, {"ffn": {}}
    )
    for name, at in {"x": x, "w": w}.items():
        direction = np.random.default_rng(1).normal(size=at.shape)
        step = 1e-6 * direction
        sides = [
            loop(x + by * step, w) if name == "x" else loop(x, w + by * step) for by in (1, -1)
        ]
        slope = (weights * (sides[0].y[0] - sides[1].y[0])).sum() / 2e-6
        np.testing.assert_allclose((slopes[name].value * direction).sum(), slope, rtol=1e-6)
