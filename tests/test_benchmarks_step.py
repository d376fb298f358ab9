"""The time of a step by part: traces are read right, and what is said of a step follows."""

import json

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from moepp_jax.benchmarks import step, traced
from moepp_jax.compile import hlo, parts
from moepp_jax.data import prepare
from moepp_jax.errors import ConfigError
from tests import tiny


def test_what_an_instruction_has_begun_is_not_counted_twice():
    """A loop of two rounds, an instruction after it, and one inside another's last nanosecond."""
    loop, after = traced.Event("while", 0, 100), traced.Event("dot", 100, 30)
    rounds = [traced.Event("body", 10, 40), traced.Event("body", 50, 50)]
    inner = traced.Event("call", 60, 40)
    found = traced.exclusive([after, *rounds, loop, inner])
    assert [(e.name, e.start, alone) for e, alone in found] == [
        ("while", 0, 10),
        ("body", 10, 40),
        ("body", 50, 10),
        ("call", 60, 40),
        ("dot", 100, 30),
    ]


def test_a_trace_is_told_by_the_scopes_of_the_program(tmp_path):
    def function(x):
        with jax.named_scope("experts"):
            x = jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ x), x)
        with jax.named_scope("loss"):
            return jnp.sort(x @ x, axis=0)

    x = jnp.ones((300, 300))
    compiled = jax.jit(function).lower(x).compile()
    module = hlo.parse(compiled.as_text())
    assert module.name == "jit_function"
    jax.block_until_ready(compiled(x))
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(2):
            jax.block_until_ready(compiled(x))
    seconds = traced.by_instruction(tmp_path, module.name)
    found = traced.by_part(seconds, module)
    assert found[parts.EXPERTS] > 0 and found[parts.LOSS] > 0
    assert set(found) <= {parts.EXPERTS, parts.LOSS, parts.REST}
    assert sum(found.values()) == pytest.approx(sum(seconds.values()))
    with pytest.raises(ValueError, match="no instruction of jit_other is in the trace"):
        traced.by_instruction(tmp_path, "jit_other")


def test_a_product_that_has_lost_its_name_is_of_what_is_around_it():
    """One by its neighbour, one by what calls its computation, and the third by nothing."""
    text = """HloModule jit_f

%branch (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %second = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (q: f32[8,8]) -> f32[8,8] {
  %q = f32[8,8]{1,0} parameter(0)
  %first = f32[8,8]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %silu = f32[8,8]{1,0} tanh(%first), metadata={op_name="jit(f)/experts/tanh"}
  ROOT %called = f32[8,8]{1,0} call(%silu), to_apply=%branch
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %third = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %y = f32[8,8]{1,0} call(%third), to_apply=%body
}
"""
    seconds = {"first": 1.0, "second": 2.0, "third": 4.0, "silu": 8.0, "gone": 16.0}
    found = traced.by_part(seconds, hlo.parse(text))
    assert found == {parts.EXPERTS: 11.0, parts.REST: 20.0}


FOUND = {
    "moepp": {
        "ffn_experts_per_token": 1.2,
        "seconds": 0.8,
        "traced_seconds": 0.9,
        "parts": {parts.EXPERTS: 0.3, parts.LOSS: 0.4, step.BETWEEN: 0.2},
    },
    "moe": {
        "ffn_experts_per_token": 2.0,
        "seconds": 1.0,
        "traced_seconds": 1.0,
        "parts": {parts.EXPERTS: 0.5, parts.LOSS: 0.4, step.BETWEEN: 0.1},
    },
}


def test_what_a_step_can_gain_is_what_its_experts_are_of_it():
    """Half of the vanilla step at 5/3 of the speed: 1 / (1/2 + 1/2 x 3/5) = 1.25."""
    found = step.bounds(FOUND)
    assert found == pytest.approx(
        {
            "step": 1.25,
            "experts": 5 / 3,
            "experts_in_theory": 5 / 3,
            "experts_share_of_the_vanilla_step": 0.5,
            "step_at_most": 1.25,
        }
    )


def test_tables_and_figures_have_the_parts_that_there_are():
    console = Console(width=110, record=True)
    step.show(FOUND, "a step", console)
    said = " ".join(console.export_text().split())
    assert "by that theory it could be 1.25 times as fast" in said
    assert parts.LOSS in said and parts.ROUTER not in said
    assert [t.get_text() for t in step.figure(FOUND, "a step").axes[0].get_yticklabels()] == [
        parts.EXPERTS,
        parts.LOSS,
        step.BETWEEN,
    ]


def test_both_twins_are_measured(tmp_path):
    c = tiny.config(**{"data.dir": str(tmp_path)})
    dataset = prepare(c, lambda line: None)
    found = step.measure(step.twins(c), dataset, before=2, rounds=2, steps=1)
    for of in found.values():
        assert sum(of["parts"].values()) >= of["traced_seconds"] * (1 - 1e-6)
        assert {parts.EXPERTS, parts.ROUTER, parts.CORE, parts.LOSS} <= set(of["parts"])
    assert found["moe"]["ffn_experts_per_token"] <= 2 > found["moepp"]["ffn_experts_per_token"]
    assert parts.ZERO_COMPUTATION not in found["moe"]["parts"]
    json.dumps(found)


def test_a_vanilla_moe_has_no_twin_to_be_compared_with():
    c = tiny.config(**{"moe.n_const": 0, "moe.n_copy": 0, "moe.n_zero": 0})
    with pytest.raises(ConfigError, match="has no zero-computation experts"):
        step.twins(c)
