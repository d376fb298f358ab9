"""Cases for the tests of the layer: the package's layer for an oracle's spec, and its inputs.

Inputs are float32 numbers, of which the oracle takes the float64 value. Tokens whose choice of
experts could hang on rounding are never drawn, so nothing need be excluded from a comparison.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moepp_jax import moe
from moepp_jax.moe import exchange, router
from tests import oracle
from tests.oracle import Spec

D, F = 16, 12

GATES = tuple(router.GATES)


def _spoiled(x_RD, counts_E):
    return jnp.where((jnp.arange(len(x_RD)) < jnp.sum(counts_E))[:, None], x_RD, jnp.nan)


@jax.custom_vjp
def _spoiling(x_RD, counts_E):
    return x_RD


_spoiling.defvjp(lambda x, counts: (x, counts), lambda counts, d: (_spoiled(d, counts), None))


def as_on_tpu(grouped):
    """A grouped function that leaves behind the last row what is no number, and so its gradient."""
    return lambda params, rows, counts: _spoiled(
        grouped(params, _spoiling(rows, counts), counts), counts
    )


DROPLESS = {"blocked": moe.Blocked(moe.KEEPING_SWIGLU, block=3), "ragged": as_on_tpu(moe.Ragged())}
EXCHANGED = {"capacity": exchange.by_expert, "by device": exchange.by_device}
PATHS = ("capacity", *DROPLESS)


def rule(spec: Spec) -> moe.Rule:
    """The package's routing rule of a spec."""
    return moe.rules.make(
        "moepp",
        moe.Pool(spec.n_ffn, spec.n_const, spec.n_copy, spec.n_zero),
        top_k=spec.top_k,
        tau=spec.tau,
        router_layers=2 if spec.two_layer else 1,
        residual="logits" if spec.residual else "none",
        logit_norm=spec.logit_std or 0.0,
        gate=spec.gate,
    )


def layer(spec: Spec, path: str = "capacity") -> moe.MoE:
    """The package's layer of a spec; capacity with no gamma has room for every assignment."""
    if path in EXCHANGED:
        chosen = moe.with_capacity(spec.gamma or 1e3, exchanged=EXCHANGED[path])
    else:
        assert spec.gamma is None, "a dropless path has no capacity"
        chosen = moe.dropless(DROPLESS[path])
    return moe.MoE(rule(spec), chosen, spec.input_scale)


def params(spec: Spec, seed: int = 0) -> dict:
    """Matrices that make logits and outputs of order 1."""
    rng = np.random.default_rng(seed)
    E, J, N = spec.n_ffn, spec.n_const, len(spec.kinds)

    def matrix(*shape):
        return np.float32(rng.normal(size=shape) / np.sqrt(shape[-1]))

    gate = {"w": 2 * matrix(N, D)}
    if spec.two_layer:
        gate = {"w_hidden": matrix(8 * N, D), "w_logits": 4 * matrix(N, 8 * N)}
    if spec.residual:
        gate["w_residual"] = matrix(N, N)
    p = {"router": gate, "ffn": {"w_in": matrix(E, 2, F, D), "w_out": matrix(E, D, F)}}
    if J:
        p["const"] = {"w": matrix(J, 2, D), "v": np.float32(rng.normal(size=(J, D)))}
    return p


def tokens(spec: Spec, p: dict, groups: int, size: int, dtype=np.float32, gap: float = 1e-3):
    """x (G, S, D) of numbers that dtype has, previous logits (G, S, N); every choice is clear.

    The K chosen probabilities and the best one not chosen differ by a relative `gap` at least.
    """
    rng = np.random.default_rng(1)
    found = []
    while len(found) < groups * size:
        x = np.float32(rng.normal(size=D).astype(dtype))
        previous = np.float32(rng.normal(size=len(spec.kinds)))
        _, probs, _, _ = oracle.route(spec, x.astype(float), previous, p["router"])
        best = np.sort(probs)[::-1][: spec.top_k + 1]
        if np.all(best[1:] < best[:-1] * (1 - gap)):
            found.append((x, previous))
    xs, previous = (np.array(a) for a in zip(*found, strict=True))
    return xs.reshape(groups, size, -1), previous.reshape(groups, size, -1)


@functools.cache
def case(spec: Spec, groups: int = 2, size: int = 16):
    """(params, x, previous logits) of a spec; 1 / size is exact, so shares of tokens are too."""
    p = params(spec)
    return (p, *tokens(spec, p, groups, size))


def close(actual, expected, tolerance: float, what: str = "") -> None:
    """Equal to a share of the largest magnitude there is."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=tolerance * np.abs(expected).max(initial=1e-30), err_msg=what
    )


def trees_close(actual, expected, tolerance: float) -> None:
    """`close` for every leaf of two trees of the same form."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        close(a, e, tolerance, jax.tree_util.keystr(path))


def steer(p: dict, x_GSD, bias_N) -> tuple[dict, np.ndarray]:
    """Parameters and tokens for which the router's own logits are bias_N, whatever the token."""
    bias_N = np.asarray(bias_N, np.float32)
    w = np.zeros((len(bias_N), x_GSD.shape[-1]), np.float32)
    w[:, 0] = bias_N
    x = np.array(x_GSD)
    x[..., 0] = 1
    gate = {"w": w}
    if "w_residual" in p["router"]:
        gate["w_residual"] = np.zeros_like(p["router"]["w_residual"])
    return p | {"router": gate}, x
