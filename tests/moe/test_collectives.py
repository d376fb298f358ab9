"""What crosses between devices in the gradient of one layer, read from the compiled program."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from moepp_jax import moe
from tests.moe import cases
from tests.moe.test_meshes import mesh_of
from tests.oracle import Spec

KINDS = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")


def collectives(path, mesh_shape, gradient=True):
    """How often each collective stands in the program, in its own or its -start form."""
    spec = Spec(8, 2, 1, 1, gamma=1.1 if path == "capacity" else None)
    p, x, previous = cases.case(spec, groups=8, size=4)
    layer = cases.layer(spec, path)

    def total(p, x, previous):
        y, logits, stats = moe.sharded(x, previous, p, layer, mesh_of(mesh_shape))
        return jnp.sum(y**2) + jnp.sum(logits**2) + jnp.sum(stats.prob**2)

    def forward(p, x, previous):
        return moe.sharded(x, previous, p, layer, mesh_of(mesh_shape))

    run = jax.grad(total, (0, 1, 2)) if gradient else forward
    mesh = mesh_of(mesh_shape)
    P, Sharding = jax.P, jax.NamedSharding
    tokens = Sharding(mesh, P(mesh.axis_names))
    replicated, experts = Sharding(mesh, P()), Sharding(mesh, P("expert"))
    params = {group: experts if group == "ffn" else replicated for group in p}
    compiled = jax.jit(run, in_shardings=(params, tokens, tokens)).lower(p, x, previous).compile()
    found = re.findall(rf"= .*?\b({'|'.join(KINDS)})(?:-start)?\(", compiled.as_text())
    return Counter(found)


@pytest.mark.parametrize("mesh", [(1, 1, 8), (2, 1, 4), (2, 2, 2)], ids=str)
def test_capacity_needs_four_exchanges(mesh):
    """To the experts and back, and the same for the gradients; no tokens are gathered."""
    count = collectives("capacity", mesh)
    assert count["all-to-all"] == 4
    assert count["all-gather"] == count["collective-permute"] == 0


def test_forward_needs_two():
    count = collectives("capacity", (2, 1, 4), gradient=False)
    assert count == {"all-to-all": 2}


def test_dropless_exchanges_its_counts_too():
    """Rows both ways, forward and backward, and once how many there are for each expert."""
    count = collectives("blocked", (2, 1, 4))
    assert count["all-to-all"] == 5
    assert count["all-gather"] == count["collective-permute"] == 0


@pytest.mark.parametrize("path", ["capacity", "blocked"])
def test_without_an_expert_axis_tokens_stay(path):
    """All that crosses is the sum of the replicated parameters' gradients."""
    count = collectives(path, (4, 2, 1))
    assert set(count) == {"all-reduce"}
