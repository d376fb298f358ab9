"""The layer against the per-token loop: every gate rule, path, K, pool and option."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import moe
from tests import oracle
from tests.moe import cases
from tests.oracle import Spec

VALUES = 1e-6  # float32 against float64, as a share of the largest magnitude
GRADIENTS = 2e-7

POOLS = [(8, 2, 1, 1), (4, 0, 0, 0), (4, 0, 2, 3), (2, 3, 0, 0)]


def compare(got, want: oracle.Output):
    y, logits, stats = got
    np.testing.assert_array_equal(stats.load, np.float32(want.load))
    np.testing.assert_array_equal(stats.kept, np.float32(want.served))
    cases.close(y, want.y, VALUES, "y")
    cases.close(logits, want.logits, VALUES, "logits")
    cases.close(stats.prob, want.prob, VALUES, "prob")
    cases.close(stats.entropy, want.entropy, VALUES, "entropy")
    cases.close(stats.z, want.z, VALUES, "z")


# With drops every pool with every K. The other paths see each pool and each K, for the routing in
# front of them is the same.
PATHS = [(pool, k, "capacity", 0.5) for pool in POOLS for k in (1, 2, 3)] + [
    (pool, k, path, None)
    for path in cases.PATHS
    for pool, k in zip(POOLS, (2, 1, 3, 2), strict=True)
]


@pytest.mark.parametrize("pool, top_k, path, gamma", PATHS, ids=str)
def test_every_gate_rule(pool, top_k, path, gamma):
    spec = Spec(*pool, top_k=top_k, gamma=gamma)
    p, x, previous = cases.case(spec)

    specs = [dataclasses.replace(spec, gate=name) for name in cases.GATES]

    @jax.jit
    def run(x, previous, p):  # one compilation for the four rules
        return [moe.local(x, previous, p, cases.layer(spec, path)) for spec in specs]

    for spec, got in zip(specs, run(x, previous, p), strict=True):
        want = oracle.layer(spec, x, previous, p)
        assert want.kept.all() == (gamma is None), "the case must drop where it says so"
        compare(got, want)


OPTIONS = {
    "two-layer gate": dict(two_layer=True),
    "logit norm": dict(logit_std=0.8),
    "no residual": dict(residual=False),
    "input scale": dict(input_scale=2.0),
    "all, Mixtral's gates": dict(
        two_layer=True, logit_std=1.0, input_scale=2.0, gate="softmax_selected"
    ),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("gamma", [0.5, None], ids=["drops", "no drops"])
def test_options(options, gamma):
    spec = Spec(8, 2, 1, 1, gamma=gamma, **options)
    p, x, previous = cases.case(spec)
    got = jax.jit(lambda *a: moe.local(*a, cases.layer(spec)))(x, previous, p)
    compare(got, oracle.layer(spec, x, previous, p))


GRADIENT_CASES = {
    "capacity, drops": (Spec(8, 2, 1, 1, gamma=0.5), "capacity"),
    "capacity, two-layer, norm, K = 3": (
        Spec(4, 2, 1, 1, top_k=3, gamma=0.7, two_layer=True, logit_std=0.8, gate="raw"),
        "capacity",
    ),
    "blocked": (Spec(8, 2, 1, 1, input_scale=2.0), "blocked"),
    "blocked, K = 1": (Spec(4, 0, 2, 3, top_k=1, gate="raw"), "blocked"),
    "ragged": (Spec(4, 1, 1, 1, gate="softmax_selected"), "ragged"),
}


@pytest.mark.parametrize("spec, path", GRADIENT_CASES.values(), ids=GRADIENT_CASES)
def test_gradients(spec, path):
    """Of every output to every input, along a random direction, against the oracle's slope."""
    p, x, previous = cases.case(spec)
    inputs = {"params": p, "x": x, "previous": previous}
    want = oracle.layer(spec, x, previous, p)
    rng = np.random.default_rng(2)
    names = ("y", "logits", "prob", "entropy", "z")
    weights = {n: np.float32(rng.normal(size=getattr(want, n).shape)) for n in names}

    def weigh(outputs):
        return sum((weights[n] * outputs[n]).sum() for n in names)

    def loss(inputs):
        y, logits, s = moe.local(
            inputs["x"], inputs["previous"], inputs["params"], cases.layer(spec, path)
        )
        return weigh(dict(y=y, logits=logits, prob=s.prob, entropy=s.entropy, z=s.z))

    def exact_loss(inputs):
        out = oracle.layer(spec, inputs["x"], inputs["previous"], inputs["params"])
        return weigh(out._asdict())

    gradients = jax.jit(jax.grad(loss))(inputs)
    flat, tree = jax.tree.flatten(inputs)
    step = 1e-5
    for i, (leaf, gradient) in enumerate(zip(flat, jax.tree.leaves(gradients), strict=True)):
        direction = rng.normal(size=leaf.shape)

        def moved(by, i=i, direction=direction):
            values = [np.float64(f) for f in flat]
            values[i] = values[i] + by * direction
            return exact_loss(jax.tree.unflatten(tree, values))

        slope = (moved(step) - moved(-step)) / (2 * step)
        scale = np.linalg.norm(gradient) * np.sqrt(np.prod(leaf.shape))
        assert scale > 0
        assert abs(np.vdot(np.float64(gradient), direction) - slope) < GRADIENTS * scale


def test_detached_residual():
    """The same values as with the gradient, none of it into the layer before."""
    spec = Spec(4, 1, 1, 1)
    p, x, previous = cases.case(spec)
    layer = cases.layer(spec)
    detached = dataclasses.replace(layer, rule=dataclasses.replace(layer.rule, residual="detached"))

    def total(previous, p, layer):
        y, logits, _ = moe.local(jnp.asarray(x), previous, p, layer)
        return jnp.sum(y**2) + jnp.sum(logits**2), (y, logits)

    values = {}
    for name, each in {"attached": layer, "detached": detached}.items():
        run = jax.jit(jax.grad(lambda v, p, m=each: total(v, p, m), (0, 1), has_aux=True))
        values[name] = run(previous, p)
    (into_previous, into_params), outputs = values["detached"]
    assert not np.any(into_previous)
    assert np.any(values["attached"][0][0])
    assert jax.tree.all(jax.tree.map(np.array_equal, outputs, values["attached"][1]))
    cases.trees_close(into_params, values["attached"][0][1], 1e-6)


@pytest.mark.parametrize("path", cases.PATHS)
def test_double_precision(path):
    """All but the router, which is float32 by design: for its choices the output is exact.

    The constant experts' mixture is float32 too, so the pool has none.
    """
    spec = Spec(4, 0, 2, 1, gamma=0.5 if path == "capacity" else None, input_scale=2.0)
    p, x, previous = cases.case(spec)
    layer = cases.layer(spec, path)
    with jax.enable_x64(True):
        doubles = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (x, previous, p))
        r = layer.rule.route(*doubles[:2], doubles[2]["router"])
        y, _, _ = jax.jit(lambda *a: moe.local(*a, layer))(*doubles)
        assert y.dtype == jnp.float64
    chosen = np.asarray(r.experts), np.float64(r.gates)
    want, _ = oracle.serve(spec, np.float64(x), *chosen, jax.tree.map(np.float64, p))
    cases.close(y, want, 1e-14)


@pytest.mark.parametrize("path", ["capacity", "blocked"])
def test_half_precision(path):
    """bfloat16 tokens and experts: the router is float32 all the same, so choices are exact."""
    spec = Spec(8, 2, 1, 1, gamma=0.5 if path == "capacity" else None)
    p = cases.params(spec)
    x, previous = cases.tokens(spec, p, 2, 16, dtype=jnp.bfloat16)
    half = {g: jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), p[g]) for g in ("ffn", "const")}
    run = jax.jit(lambda *a: moe.local(*a, cases.layer(spec, path)))
    y, logits, stats = run(jnp.asarray(x, jnp.bfloat16), previous, p | half)
    want = oracle.layer(spec, x, previous, p)
    assert y.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    cases.close(logits, want.logits, VALUES)
    np.testing.assert_array_equal(stats.kept, np.float32(want.served))
    cases.close(np.float32(y), want.y, 1e-2)
