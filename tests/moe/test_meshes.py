"""On every mesh the same layer: values, gradients, statistics and drops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moepp_jax import moe
from tests.moe import cases
from tests.oracle import Spec

AXES = ("data", "fsdp", "expert")
MESHES = [(1, 1, 1), (8, 1, 1), (1, 1, 8), (2, 1, 4), (4, 1, 2), (2, 2, 2)]
SPECS = {
    "capacity": Spec(8, 2, 1, 1, gamma=0.5),
    "by device": Spec(8, 2, 1, 1, gamma=0.5),
    "roomy": Spec(8, 2, 1, 1),
    "blocked": Spec(8, 2, 1, 1),
    "ragged": Spec(8, 2, 1, 1),
}
DROPS = ("capacity", "by device")
# The rest does not know the kernel, nor the order of slots: the second sees one mesh of each sort.
PAIRS = [(path, mesh) for path in ("capacity", "blocked") for mesh in MESHES]
PAIRS += [(path, m) for path in ("ragged", "by device") for m in ((1, 1, 1), (1, 1, 8), (2, 1, 4))]

# Biases of the router's logits by expert: the 8 FFN experts, 2 constants, copy, zero.
SKEWS = {
    "all to one expert": [0, 0, 0, 0, 0, 90, 0, 0, 0, 0, 80, 0],
    "two experts, on one or two devices": [0, 0, 9, 9.5, 0, 0, 0, 0, 0, 0, 0, 0],
    "an expert and a device with none": [1, 2, 3, 4, -9, -9, -9, -9, 0, 0, 0, 0],
    "no FFN expert at all": [0, 0, 0, 0, 0, 0, 0, 0, 9, 9, 9, 9],
}


def mesh_of(shape):
    devices = jax.devices()[: np.prod(shape)]
    return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=devices)


@functools.cache
def compiled(path, mesh_shape):
    """Values, statistics and gradients of the layer; mesh None is `local` on one device."""
    layer = cases.layer(SPECS[path], path.replace("roomy", "capacity"))

    def total(params, x, previous, weights):
        if mesh_shape is None:
            out = moe.local(x, previous, params, layer)
        else:
            out = moe.sharded(x, previous, params, layer, mesh_of(mesh_shape))
        y, logits, stats = out
        losses = (y, logits, stats.prob, stats.entropy, stats.z)
        return sum(jnp.sum(w * a) for w, a in zip(weights, losses, strict=True)), out

    return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))


def run(path, mesh_shape, skew=None):
    p, x, previous = cases.case(SPECS[path], groups=16, size=4)
    if skew:
        p, x = cases.steer(p, x, np.array(SKEWS[skew], np.float32))
        # Tokens differ by a little, for a tie in every token would prove less.
        p["router"]["w"][:, 1:] = 0.1 * cases.params(SPECS[path])["router"]["w"][:, 1:]
    rng = np.random.default_rng(3)
    G = len(x)
    shapes = (x.shape, previous.shape, (G, previous.shape[-1]), (G,), (G,))
    weights = [np.float32(rng.normal(size=shape)) for shape in shapes]
    (d_params, d_x, d_previous), (y, logits, stats) = jax.device_get(
        compiled(path, mesh_shape)(p, x, previous, weights)
    )
    return {
        "exact": {"load": stats.load, "kept": stats.kept},
        "close": {
            "y": y,
            "logits": logits,
            "stats": stats,
            "params": d_params,
            "x": d_x,
            "previous": d_previous,
        },
    }


def check_same(got, want):
    for name, value in want["exact"].items():
        np.testing.assert_array_equal(got["exact"][name], value)
    cases.trees_close(got["close"], want["close"], 1e-6)


@pytest.mark.parametrize("path, mesh", PAIRS, ids=str)
def test_same_as_on_one_device(path, mesh):
    got, want = run(path, mesh), run(path, None)
    dropped = want["exact"]["load"] - want["exact"]["kept"]
    assert (dropped.sum() > 0.1 * want["exact"]["load"].sum()) == (path in DROPS)
    check_same(got, want)


@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize(
    "path, mesh",
    [(p, m) for p, m in PAIRS if p not in DROPS and m in ((1, 1, 1), (1, 1, 8), (2, 1, 4))],
    ids=str,
)
def test_dropless_under_extreme_skew(path, mesh, skew):
    """Against capacities on one device with room for all, which know no skew."""
    got, want = run(path, mesh, skew), run("roomy", None, skew)
    assert (want["exact"]["load"][:, :8].sum(axis=0) == 0).any(), "an expert must have nothing"
    check_same(got, want)


def drop_rate(mesh_shape):
    exact = run("capacity", mesh_shape)["exact"]
    return 1 - exact["kept"].sum() / exact["load"].sum()


def test_drops_do_not_depend_on_the_mesh():
    rates = {drop_rate(mesh) for mesh in [None, *MESHES]}
    assert len(rates) == 1
    assert 0.1 < rates.pop() < 0.9


def test_experts_must_divide():
    layer = cases.layer(Spec(6, 1, 1, 1))
    p, x, previous = cases.case(Spec(6, 1, 1, 1), groups=8, size=4)
    with pytest.raises(ValueError, match=r"6 FFN experts .* 4 devices .*'expert'"):
        moe.sharded(jnp.asarray(x), jnp.asarray(previous), p, layer, mesh_of((2, 1, 4)))


def test_groups_must_divide():
    spec = SPECS["blocked"]
    p, x, previous = cases.case(spec, groups=6, size=4)
    with pytest.raises(ValueError, match=r"6 groups .* 8 devices"):
        moe.sharded(jnp.asarray(x), jnp.asarray(previous), p, cases.layer(spec), mesh_of((2, 1, 4)))
