"""What each kind of expert does by itself, and FFN experts of the caller's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import moe
from moepp_jax.moe import dispatch, experts
from tests.moe import cases
from tests.oracle import Spec

D, F, E = cases.D, cases.F, 4


def output_and_gradients(spec, bias_N):
    """Of the layer when every token's logits are bias_N."""
    p, x, _ = cases.case(spec)
    p, x = cases.steer(p, x, bias_N)
    previous = jnp.zeros((*x.shape[:2], len(bias_N)))
    layer = cases.layer(spec)

    def total(p, x):
        y, logits, stats = moe.local(x, previous, p, layer)
        return jnp.sum(y**2) + jnp.sum(stats.entropy) + jnp.sum(logits**2), y

    gradients, y = jax.jit(jax.grad(total, (0, 1), has_aux=True))(p, x)
    return x, y, gradients


# Two FFN experts, one constant, and then as the case needs.
@pytest.mark.parametrize(
    "spec, bias",
    [
        (Spec(2, 1, 1, 1, top_k=1, input_scale=2.0), [0, 0, 0, 5, 0]),
        (Spec(2, 1, 2, 0, top_k=2, input_scale=3.0), [0, 0, 0, 5, 4]),
        (Spec(2, 1, 1, 1, top_k=2), [0, 0, 0, 5, 4]),  # the zero expert's share goes to copy
    ],
    ids=["one copy", "two copies", "copy and zero"],
)
def test_copies_alone_are_the_identity(spec, bias):
    x, y, gradients = output_and_gradients(spec, bias)
    np.testing.assert_allclose(y, spec.input_scale * x, rtol=1e-6)
    assert not any(np.any(g) for g in jax.tree.leaves(gradients[0]["ffn"]))


@pytest.mark.parametrize("gate", cases.GATES)
def test_zeros_alone_are_zero(gate):
    spec = Spec(2, 1, 1, 2, top_k=2, gate=gate)
    _, y, gradients = output_and_gradients(spec, [0, 0, 0, 0, 5, 4])
    np.testing.assert_array_equal(y, np.zeros_like(y))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))


def test_constant_by_hand():
    """W_c x = (ln 3, 0), so [a1, a2] = (3/4, 1/4); with a gate of 1/2 and x = (1, 0)."""
    params = {"w": jnp.array([[[np.log(3.0), 0.0], [0.0, 0.0]]]), "v": jnp.array([[4.0, 8.0]])}
    y = experts.zero_computation(
        jnp.array([[[1.0, 0.0]]]),
        jnp.array([[[1]]]),
        jnp.array([[[0.5]]]),
        jnp.array([[[True]]]),
        params,
        moe.Pool(1, 1),
    )
    np.testing.assert_allclose(y, [[[0.5 * (0.75 * 1 + 0.25 * 4), 0.5 * 0.25 * 8]]], rtol=1e-6)


def test_swiglu_by_hand():
    """F = 1, x = (1, 2): gate 1 * 1 + 0 * 2 = 1, linear 0 * 1 + 3 * 2 = 6; out (1, -2) times a."""
    params = {
        "w_in": jnp.array([[[[1.0, 0.0]], [[0.0, 3.0]]]]),
        "w_out": jnp.array([[[1.0], [-2.0]]]),
    }
    a = 1 / (1 + np.exp(-1.0)) * 6
    y = moe.swiglu(params, jnp.array([[[1.0, 2.0]]]))
    np.testing.assert_allclose(y, [[[a, -2 * a]]], rtol=1e-6)


def gelu_mlp(params, x_EBD):
    """Someone else's expert: biases make it map zeros to something."""
    h = jnp.einsum("ebd,edf->ebf", x_EBD, params["in"]["kernel"]) + params["in"]["bias"][:, None]
    y = jnp.einsum("ebf,efd->ebd", jax.nn.gelu(h), params["out"]["kernel"])
    return y + params["out"]["bias"][:, None]


def gelu_params(rng):
    def linear(fan_in, fan_out):
        kernel = rng.normal(size=(E, fan_in, fan_out)) / np.sqrt(fan_in)
        return {"kernel": np.float32(kernel), "bias": np.float32(rng.normal(size=(E, fan_out)))}

    return {"in": linear(D, F), "out": linear(F, D)}


def plain_swiglu(params, x_EBD):
    """As `moe.swiglu`, its gradient left to autodiff."""
    gate, linear = jnp.einsum("ebd,ehfd->hebf", x_EBD, params["w_in"])
    return jnp.einsum("ebf,edf->ebd", jax.nn.silu(gate) * linear, params["w_out"])


@pytest.mark.parametrize("rows", [5, 600])
def test_swiglu(rows):
    """Values without a gradient, values with one, and the gradient."""
    rng = np.random.default_rng(1)
    x, d = (jnp.asarray(rng.normal(size=(E, rows, D)), jnp.float32) for _ in range(2))
    params = jax.tree.map(jnp.asarray, cases.params(Spec(E))["ffn"])

    def values_and_gradients(expert):
        def total(params, x):
            y = expert(params, x)
            return jnp.sum(d * y), y

        return jax.jit(expert)(params, x), jax.jit(jax.grad(total, (0, 1), has_aux=True))(params, x)

    expected = values_and_gradients(plain_swiglu)
    for own in (moe.swiglu, experts.swiglu_apart, experts.swiglu_in_turn):
        cases.trees_close(values_and_gradients(own), expected, 1e-6 if rows == 5 else 1e-5)


def test_products_are_each_experts_own_where_it_has_many_rows():
    params = jax.tree.map(jnp.asarray, cases.params(Spec(E))["ffn"])
    program = jax.make_jaxpr(experts.swiglu_in_turn)
    few, many = (str(program(params, jnp.zeros((E, rows, D)))) for rows in (5, 600))
    assert few.count("dot_general") == 2
    assert many.count("dot_general") == 2 * E


EXPERTS_IN_PATHS = {
    "capacity": lambda expert: moe.with_capacity(1.1, expert),
    "dropless": lambda expert: moe.dropless(moe.Blocked(expert, block=4)),
}


@pytest.mark.parametrize("path", EXPERTS_IN_PATHS)
@pytest.mark.parametrize(
    "expert",
    [moe.swiglu, experts.swiglu_apart, plain_swiglu],
    ids=["swiglu", "apart", "own"],
)
@pytest.mark.parametrize("finer", ["tokens", "parameters"])
def test_types_may_differ(path, expert, finer):
    """Each gradient is of its argument's type, bfloat16 against float32 either way."""
    spec = Spec(E, 1, 1, 1)
    plain = cases.layer(spec)
    layer = moe.MoE(plain.rule, EXPERTS_IN_PATHS[path](expert))
    p, x, previous = jax.tree.map(jnp.asarray, cases.case(spec))
    if finer == "tokens":
        p["ffn"] = jax.tree.map(lambda a: a.astype(jnp.bfloat16), p["ffn"])
    else:
        x = x.astype(jnp.bfloat16)

    def total(p, x):
        return jnp.sum(moe.local(x, previous, p, layer)[0].astype(jnp.float32))

    gradients = jax.eval_shape(jax.grad(total, (0, 1)), p, x)
    assert jax.tree.map(jnp.dtype, gradients) == jax.tree.map(jnp.dtype, (p, x))


@pytest.mark.parametrize("path", ["capacity", "dropless"])
def test_experts_of_ones_own(path):
    """Values and gradients of a GELU MLP with biases, against every expert on every token."""
    spec = Spec(E, 1, 1, 1)
    p, x, previous = cases.case(spec)
    p = p | {"ffn": gelu_params(np.random.default_rng(0))}
    p, x, previous = jax.tree.map(jnp.asarray, (p, x, previous))
    rule = cases.rule(spec)
    pool = rule.pool
    if path == "capacity":
        slots = moe.capacity(rule.load, 0.6, x.shape[1])
        layer = moe.MoE(rule, moe.with_capacity(0.6, gelu_mlp))
    else:
        slots = (x.shape[1],) * pool.size
        layer = moe.MoE(rule, moe.dropless(moe.Blocked(gelu_mlp, block=3)))

    def ours(p, x):
        y, _, stats = moe.local(x, previous, p, layer)
        return jnp.sum(jnp.sin(y)), (y, stats.load - stats.kept)

    def naive(p, x):
        r = rule.route(x, previous, p["router"])
        kept = dispatch.assign(r.experts, slots).kept
        y_ETD = gelu_mlp(p["ffn"], jnp.broadcast_to(x.reshape(1, -1, D), (E, x.size // D, D)))
        one_hot = (r.experts[..., None] == jnp.arange(E)) & kept[..., None]
        gates_GSE = jnp.sum(jnp.where(one_hot, r.gates[..., None], 0.0), axis=2)
        y = jnp.einsum("te,etd->td", gates_GSE.reshape(-1, E), y_ETD).reshape(x.shape)
        y += experts.zero_computation(x, r.experts, r.gates, kept, p["const"], pool)
        return jnp.sum(jnp.sin(y)), y

    gradients, (y, dropped) = jax.jit(jax.grad(ours, (0, 1), has_aux=True))(p, x)
    wanted, y_naive = jax.jit(jax.grad(naive, (0, 1), has_aux=True))(p, x)
    assert np.any(dropped) == (path == "capacity")
    cases.close(y, y_naive, 1e-6)
    cases.trees_close(gradients, wanted, 1e-6)
