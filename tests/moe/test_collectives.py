"""What crosses between devices in the gradient of one layer, read from the compiled program."""

import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from moepp_jax import moe
from tests.moe import cases
from tests.moe.test_meshes import AXES, mesh_of
from tests.oracle import Spec

KINDS = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")


def program(spec, path, mesh_shape, gradient=True, groups=8, size=4, remat=lambda layer: layer):
    """The compiled layer, or its gradient, as text."""
    mesh, layer, p = mesh_of(mesh_shape), cases.layer(spec, path), cases.params(spec)

    @remat
    def forward(p, x, previous):
        return moe.sharded(x, previous, p, layer, mesh)

    def total(p, x, previous):
        y, logits, stats = forward(p, x, previous)
        return jnp.sum(y**2) + jnp.sum(logits**2) + jnp.sum(stats.prob**2)

    def shape(a, *axes):
        return jax.ShapeDtypeStruct(a, jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(*axes)))

    params = {
        group: {k: shape(a.shape, *(["expert"] if group == "ffn" else [])) for k, a in of.items()}
        for group, of in p.items()
    }
    tokens = [shape((groups, size, width), AXES) for width in (cases.D, len(spec.kinds))]
    run = jax.grad(total, (0, 1, 2)) if gradient else forward
    return jax.jit(run).lower(params, *tokens).compile().as_text()


def collectives(path, mesh_shape, gradient=True):
    """How often each collective stands in the program, in its own or its -start form."""
    spec = Spec(8, 2, 1, 1, gamma=1.1 if path in cases.EXCHANGED else None)
    text = program(spec, path, mesh_shape, gradient)
    return Counter(re.findall(rf"= .*?\b({'|'.join(KINDS)})(?:-start)?\(", text))


def moved(text, kind):
    """Elements of the results of every collective of a kind, on one device."""
    results = re.findall(rf"= (.*?) {kind}(?:-start)?\(", text)
    return [
        sum(math.prod(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", result))
        for result in results
    ]


@pytest.mark.parametrize("path", cases.EXCHANGED)
@pytest.mark.parametrize("mesh", [(1, 1, 8), (2, 1, 4), (2, 2, 2)], ids=str)
def test_capacity_needs_four_exchanges(path, mesh):
    """To the experts and back, and the same for the gradients; no tokens are gathered."""
    count = collectives(path, mesh)
    assert count["all-to-all"] == 4
    assert count["all-gather"] == count["collective-permute"] == 0


def test_forward_needs_two():
    count = collectives("capacity", (2, 1, 4), gradient=False)
    assert count == {"all-to-all": 2}


def test_dropless_exchanges_its_counts_too():
    """Rows both ways, forward and backward, and how many each device has for each expert."""
    text = program(Spec(8, 2, 1, 1), "blocked", (2, 1, 4))
    assert len(moved(text, "all-to-all")) == 4
    assert moved(text, "all-gather") == [4 * 8]
    assert not moved(text, "collective-permute")


@pytest.mark.parametrize("path", [*cases.EXCHANGED, "blocked"])
def test_what_has_crossed_can_be_kept(path):
    """A checkpointed layer that keeps the two named buffers exchanges no more than one that keeps
    everything; one that keeps nothing exchanges both again."""
    names = jax.checkpoint_policies.save_only_these_names("to_experts", "from_experts")
    spec = Spec(8, 2, 1, 1, gamma=1.1 if path in cases.EXCHANGED else None)
    for policy, count in [(names, 4), (None, 6)]:
        remat = functools.partial(jax.checkpoint, policy=policy)
        assert len(moved(program(spec, path, (2, 1, 4), remat=remat), "all-to-all")) == count


@pytest.mark.parametrize("path", ["capacity", "blocked"])
def test_without_an_expert_axis_tokens_stay(path):
    """All that crosses is the sum of the replicated parameters' gradients."""
    count = collectives(path, (4, 2, 1))
    assert set(count) == {"all-reduce"}


def test_less_is_exchanged_as_tau_falls():
    """Each of the four exchanges carries the slots of the capacity formula, and nothing else.

    The table has the share of the vanilla MoE's elements: what the formula says, what crosses.
    """
    size, gamma, n_ffn, mesh = 512, 1.1, 8, (1, 1, 4)

    def exchanged(spec):
        """Elements that cross, and slots of one expert."""
        text = program(spec, "capacity", mesh, groups=4, size=size)
        found = moved(text, "all-to-all")
        assert len(found) == 4 and len(set(found)) == 1
        slots = moe.capacity(cases.rule(spec).load, gamma, size)[0]
        assert found[0] == n_ffn * slots * cases.D
        return found[0], slots

    elements, slots = exchanged(Spec(n_ffn, tau=1.0, gamma=gamma, residual=False))
    table = {}
    for tau in (0.1, 0.25, 0.5, 0.75, 1.0):
        crossing, ours = exchanged(Spec(n_ffn, 2, 1, 1, tau=tau, gamma=gamma))
        # Of the formula without its rounding: tau (E) / (tau E + 4), the vanilla's is 1.
        table[tau] = (tau * n_ffn / (tau * n_ffn + 4), ours / slots, crossing / elements)
    for tau, (share, of_slots, of_elements) in table.items():
        print(f"tau {tau:4}: {share:.3f} {of_slots:.3f} {of_elements:.3f}")
        assert abs(of_slots - share) < 2 / slots
        assert abs(of_elements - share) < 2 / slots
    assert sorted(table) == sorted(table, key=lambda tau: table[tau][2])
