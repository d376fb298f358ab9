"""Reading HLO: written by hand, every number known; and programs compiled for 8 devices."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moepp_jax.compile import hlo

MESH = {"data": 2, "fsdp": 2, "expert": 2}

# Two loops in one another, 3 x 4 rounds: the outer one's length is noted, the inner one's is not.
LOOPS = """HloModule loops, is_scheduled=true, replica_count=1, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_body (p.1: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %p.1 = (s32[]{:T(128)}, bf16[16,8]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %two = s32[] constant(2)
  %copied = s32[] copy(%i.1)
  %next.1 = s32[] add(%copied, %two), metadata={op_name="jit(f)/while/add)("}
  %rows = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.1), index=1
  %exchanged = bf16[16,8]{1,0} all-to-all(%rows), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}, metadata={op_name="jit(f)/while/to_experts/all_to_all"}
  ROOT %out.1 = (s32[], bf16[16,8]) tuple(%next.1, %exchanged)
}

%inner_condition (p.2: (s32[], bf16[16,8])) -> pred[] {
  %p.2 = (s32[], bf16[16,8]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %limit = s32[] constant(9)
  ROOT %less = pred[] compare(%i.2, %limit), direction=LT
}

%outer_body (p.3: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %p.3 = (s32[], bf16[16,8]{1,0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  %rows.3 = bf16[16,8]{1,0} get-tuple-element(%p.3), index=1
  %one = s32[] constant(1)
  %start = s32[] copy(%one)
  %init = (s32[], bf16[16,8]{1,0}) tuple(%start, /*index=1*/%rows.3)
  %while.1 = (s32[], bf16[16,8]{1,0}) while(%init), condition=%inner_condition, body=%inner_body
  %rows.4 = bf16[16,8]{1,0} get-tuple-element(%while.1), index=1
  %gather-start = (bf16[16,8]{1,0}, bf16[64,8]{1,0}) all-gather-start(%rows.4), replica_groups=[2,4]<=[2,2,2]T(1,0,2), dimensions={0}
  %meanwhile = bf16[16,8]{1,0} multiply(%rows.4, %rows.4), metadata={op_name="jit(f)/zero_computation/mul"}
  %gather-done = bf16[64,8]{1,0} all-gather-done(%gather-start)
  ROOT %out.3 = (s32[], bf16[16,8]) tuple(%i.3, %meanwhile)
}

%outer_condition (p.4: (s32[], bf16[16,8])) -> pred[] {
  %p.4 = (s32[], bf16[16,8]{1,0}) parameter(0)
  ROOT %never = pred[] constant(false)
}

%wrapped (w: f32[10]) -> f32[5] {
  %w = f32[10]{0} parameter(0)
  ROOT %scattered = f32[5]{0} reduce-scatter(%w), replica_groups=mesh['a'=2,'b'=4], device_ids=([2,2,2]T(2,1,0)) {'b':(2)2}, to_apply=%add, dimensions={0}
}

%fused (q: f32[10]) -> f32[10] {
  %q = f32[10]{0} parameter(0), metadata={op_name="jit(f)/inside"}
  ROOT %reduced = f32[10]{0} all-reduce(%q), replica_groups={}, to_apply=%add
}

%forgotten (q: f32[10]) -> f32[10] {
  %q.9 = f32[10]{0} parameter(0)
  ROOT %reduced.9 = f32[10]{0} all-reduce(%q.9), replica_groups={}, to_apply=%add
}

ENTRY %main (a: bf16[16,8], b: f32[10]) -> (bf16[16,8], f32[10]) {
  %a = bf16[16,8]{1,0} parameter(0)
  %b = f32[10]{0} parameter(1)
  %zero = s32[] constant(0)
  %t = (s32[], bf16[16,8]{1,0}) tuple(%zero, %a)
  %while.2 = (s32[], bf16[16,8]{1,0}) while(%t), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"3"},"text":"a \\" ("}
  %r = bf16[16,8]{1,0} get-tuple-element(%while.2), index=1
  %async-start = ((f32[10]), f32[5], u32[]) async-start(%b), calls=%wrapped
  %async-done = f32[5]{0} async-done(%async-start), calls=%wrapped
  %moved = f32[10]{0} collective-permute(%b), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %ragged = bf16[16,8]{1,0} ragged-all-to-all(%r, %a, %b, %b, %b, %b), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %f = f32[10]{0} fusion(%b), kind=kLoop, calls=%fused
  ROOT %result = (bf16[16,8], f32[10]) tuple(%r, %f)
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def found() -> dict[str, hlo.Collective]:
    return {c.kind: c for c in hlo.collectives(hlo.parse(LOOPS))}


def test_executions_multiply_loops_and_leave_out_what_is_never_called():
    module = hlo.parse(LOOPS)
    assert module.num_devices == 8
    assert hlo.executions(module) == {
        "main": 1,
        "outer_body": 3,
        "outer_condition": 3,
        "inner_body": 12,  # from 1 to 9 by 2
        "inner_condition": 12,
        "wrapped": 1,
        "fused": 1,
    }
    assert hlo.unknown_loops(module) == []


def test_of_a_ragged_exchange_the_filled_rows_cross():
    module = dataclasses.replace(hlo.parse(LOOPS), load=hlo.Load(rows=4.0, experts=2))
    found = {c.kind: c.operand_bytes for c in hlo.collectives(module)}
    assert found["ragged-all-to-all"] == 4 * 8 * 2
    assert found["all-to-all"] == 256


def test_what_a_sparse_core_runs_is_wrapped_twice():
    """In a call, and that in what runs beside the others: started and awaited as any other."""
    wrapped = LOOPS.replace("%wrapped (", "%inner (", 1).replace(
        "ENTRY",
        """%wrapped (q: f32[10]) -> f32[5] {
  %q = f32[10]{0} parameter(0)
  ROOT %run = f32[5]{0} call(%q), to_apply=%inner
}

ENTRY""",
        1,
    )
    module = hlo.parse(wrapped)
    [found] = (c for c in hlo.collectives(module) if c.kind == "reduce-scatter")
    assert (found.computation, found.times, found.asynchronous) == ("inner", 1, True)
    [(where, start, beside)] = hlo.overlapped(module, "reduce-scatter")
    assert (where, start.name, beside) == ("main", "async-start", [])


# kind: times, bytes of the operand, of the result, on the wire, axes, asynchronous
EXPECTED = {
    "all-to-all": (12, 256, 256, 128, ("expert",), False),
    "all-gather": (3, 256, 1024, 768, ("data", "expert"), True),
    "reduce-scatter": (1, 40, 20, 20, ("data",), True),
    "all-reduce": (1, 40, 40, 70, ("data", "fsdp", "expert"), False),
    "collective-permute": (1, 40, 40, 40, ("expert",), False),
    "ragged-all-to-all": (1, 256, 256, 128, ("expert",), False),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_collective(found, kind):
    c = found[kind]
    got = (c.times, c.operand_bytes, c.result_bytes, c.wire_bytes, c.axes(MESH), c.asynchronous)
    assert got == EXPECTED[kind]


def test_all_collectives_are_found(found):
    assert found.keys() == EXPECTED.keys()
    assert found["all-to-all"].scope == "jit(f)/while/to_experts/all_to_all"


ACROSS_SLICES = """HloModule sums, num_partitions=4

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %token = token[] after-all()
  %recv = (bf16[8,128]{1,0}, u32[], token[]) recv(%token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send = (bf16[8,128]{1,0}, u32[], token[]) send(%a, %token), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=3, is_host_transfer=true
  %received = (bf16[8,128]{1,0}, token[]) recv-done(%recv), channel_id=2, is_host_transfer=true
  ROOT %sum = bf16[8,128]{1,0} get-tuple-element(%received), index=0
}
"""  # noqa: E501


def test_sums_over_tpu_slices_go_through_the_hosts():
    [sum_] = hlo.collectives(hlo.parse(ACROSS_SLICES))
    assert (sum_.kind, sum_.operand_bytes, sum_.wire_bytes) == ("all-reduce", 2048, 2048)
    assert sum_.groups.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert sum_.axes({"data": 2, "fsdp": 4, "expert": 1}) == ("data",)
    assert sum_.asynchronous


KERNEL = """HloModule kernels, num_partitions=1

%body (p.1: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p.1 = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %rows = bf16[8,128]{1,0} get-tuple-element(%p.1), index=1
  %attended = bf16[8,128]{1,0} custom-call(%rows), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"of\\": {"
}}, metadata={op_name="jit(f)/while/body/splash"}
  %one = s32[] constant(1)
  %next = s32[] add(%i.1, %one)
  ROOT %out = (s32[], bf16[8,128]) tuple(%next, %attended)
}

%condition (p.2: (s32[], bf16[8,128])) -> pred[] {
  %p.2 = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %limit = s32[] constant(6)
  ROOT %less = pred[] compare(%i.2, %limit), direction=LT
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], bf16[8,128]{1,0}) tuple(%zero, %a)
  %while = (s32[], bf16[8,128]{1,0}) while(%t), condition=%condition, body=%body
  ROOT %r = bf16[8,128]{1,0} get-tuple-element(%while), index=1
}
"""  # noqa: E501


def test_a_kernel_whose_metadata_spans_lines():
    """The computation goes on after it, so that its loop's length is known."""
    module = hlo.parse(KERNEL)
    body = module.computations["body"]
    assert body.root.name == "out" and len(body.instructions) == 7
    assert body.by_name["attended"].scope == "jit(f)/while/body/splash"
    assert hlo.executions(module)["body"] == 6
    assert hlo.unknown_loops(module) == []


def splash(name: str, blocks: str, *results: str) -> hlo.Module:
    """Of 3 sequences with 4 heads of 64, 2,048 tokens in blocks of 256."""
    heads = "bf16[3,4,2048,64]{3,2,1,0}"
    target = 'custom_call_target="tpu_custom_call"'
    made = f"({', '.join([*results, 'f32[3,256,64]{2,1,0}'])})"
    text = f"""HloModule attention

ENTRY %main (next: {blocks}, q: {heads}) -> {made} {{
  %next = {blocks}{{2,1,0}} parameter(0)
  %q = {heads} parameter(1)
  %k = bf16[3,2,2048,64]{{3,2,1,0}} parameter(2)
  ROOT %{name}.7 = {made} custom-call(%next, %next, %q, %k, %k), {target}
}}
"""
    return hlo.parse(text)


Q, Q_APART = "bf16[3,4,2048,64]{3,2,1,0}", "bf16[8,3,4,2048,64]{4,3,2,1,0}"
FWD, DKV, DQ = (f"splash_mha_{kind}_segmented" for kind in ("fwd", "dkv", "dq"))


@pytest.mark.parametrize(
    ("name", "blocks", "results", "met", "products"),
    [
        (FWD, "s8[1,8,8]", [Q], 36, 2),
        # A window in which three blocks are met: 1 + 2 + 6 x 3.
        (FWD, "s8[1,8,3]", [Q], 21, 2),
        (DKV, "s8[1,3,8]", [Q, Q], 21, 4),
        # Queries' gradient in the same kernel, once for each block of keys.
        (DKV, "s8[1,8,8]", [Q_APART, Q, Q], 36, 5),
        (DQ, "s8[1,8,8]", [Q], 36, 3),
    ],
)
def test_products_of_attention_in_the_blocks_that_its_kernel_computes(
    name, blocks, results, met, products
):
    module = splash(name, blocks, *results)
    assert hlo.attended(module.computations["main"], module.computations["main"].root) == (
        3 * 4 * met * 256**2
    )
    assert hlo.product_flops(module) == 3 * 4 * met * 256**2 * products * 2 * 64


# A gather in three fusions: one starts it, a product runs meanwhile, one waits for it.
CHAIN = """HloModule chain, num_partitions=4

%starting (s: bf16[4,128]) -> (bf16[4,128], bf16[16,128], u32[]) {
  %s = bf16[4,128]{1,0} parameter(0)
  %gather.1 = bf16[16,128]{1,0} all-gather(%s), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %start = (bf16[4,128]{1,0}, bf16[16,128]{1,0}, u32[]) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion (m: bf16[4,128], n: bf16[16,128], x: bf16[8,16], y: bf16[16,32]) -> (bf16[8,32], bf16[16,128]) {
  %m = bf16[4,128]{1,0} parameter(0)
  %n = bf16[16,128]{1,0} parameter(1)
  %x = bf16[8,16]{1,0} parameter(2)
  %y = bf16[16,32]{1,0} parameter(3)
  %product = bf16[8,32]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %gather.2 = bf16[16,128]{1,0} all-gather(%m), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %both = (bf16[8,32]{1,0}, bf16[16,128]{1,0}) tuple(%product, %gather.2)
}

%waiting (d: bf16[4,128], e: bf16[16,128]) -> bf16[16,128] {
  %d = bf16[4,128]{1,0} parameter(0)
  %e = bf16[16,128]{1,0} parameter(1)
  %gather.3 = bf16[16,128]{1,0} all-gather(%d), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %done = bf16[16,128]{1,0} custom-call(%d, %e, %gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[4,128], b: bf16[8,16], c: bf16[16,32]) -> bf16[16,128] {
  %a = bf16[4,128]{1,0} parameter(0)
  %b = bf16[8,16]{1,0} parameter(1)
  %c = bf16[16,32]{1,0} parameter(2)
  %f.1 = (bf16[4,128]{1,0}, bf16[16,128]{1,0}, u32[]) fusion(%a), kind=kCustom, calls=%starting
  %begun = bf16[16,128]{1,0} get-tuple-element(%f.1), index=1
  %f.2 = (bf16[8,32]{1,0}, bf16[16,128]{1,0}) fusion(%a, %begun, %b, %c), kind=kOutput, calls=%async_collective_fusion
  %going = bf16[16,128]{1,0} get-tuple-element(%f.2), index=1
  %alone = bf16[16,128]{1,0} all-gather(%a), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="8"}
  ROOT %f.3 = bf16[16,128]{1,0} fusion(%a, %going), kind=kCustom, calls=%waiting
}
"""  # noqa: E501


def test_a_collective_that_is_fused_into_several_is_counted_once():
    """The one of a chain that is nowhere started is a collective like others."""
    found = hlo.collectives(hlo.parse(CHAIN))
    assert [(c.name, c.wire_bytes, c.asynchronous) for c in found] == [
        ("gather.1", 3 * 4 * 128 * 2, True),
        ("alone", 3 * 4 * 128 * 2, False),
    ]


def test_what_runs_while_a_fused_collective_does():
    module = hlo.parse(CHAIN)
    [(computation, start, between)] = hlo.overlapped(module, "all-gather")
    assert (computation, start.name) == ("main", "f.1")
    assert [i.name for i in between] == ["begun", "f.2", "going", "alone"]
    assert hlo.overlapped(module, "all-reduce") == []


def test_what_runs_between_start_and_done():
    module = hlo.parse(LOOPS)
    [(computation, start, between)] = hlo.overlapped(module, "all-gather")
    assert (computation, start.name) == ("outer_body", "gather-start")
    assert [i.scope for i in between] == ["jit(f)/zero_computation/mul"]
    assert [start.name for _, start, _ in hlo.overlapped(module, "reduce-scatter")] == [
        "async-start"
    ]
    assert hlo.overlapped(module, "all-to-all") == []


def test_where_an_instruction_comes_from():
    module = hlo.parse(LOOPS)
    main = module.computations["main"].by_name
    assert hlo.scopes(module, main["f"]) == {"", "jit(f)/inside"}
    body = module.computations["inner_body"].by_name
    assert hlo.scopes(module, body["exchanged"]) == {"jit(f)/while/to_experts/all_to_all"}


def groups(attributes: str) -> list[list[int]]:
    text = LOOPS.replace("replica_groups={}, to_apply=%add\n}\n\n%forgotten", attributes, 1)
    text = text.replace(attributes, attributes + ", to_apply=%add\n}\n\n%forgotten", 1)
    [c] = [c for c in hlo.collectives(hlo.parse(text)) if c.kind == "all-reduce"]
    return c.groups.tolist()


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("replica_groups={{0,3},{1,2}}", [[0, 3], [1, 2]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['x'=2,'y'=1,'z'=4] {'x','y','z'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=mesh['x'=8] {'x':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['x'=8] {'x':(4)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (
            "replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
        ),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_replica_groups(written, expected):
    assert groups(written) == expected


@pytest.mark.parametrize(
    ("direction", "limit", "trips"), [("LT", 9, 4), ("LT", 8, 4), ("LE", 9, 5), ("LT", 1, 0)]
)
def test_trip_counts(direction, limit, trips):
    text = LOOPS.replace("constant(9)", f"constant({limit})")
    text = text.replace("direction=LT", f"direction={direction}")
    assert hlo.executions(hlo.parse(text)).get("inner_body", 0) == 3 * trips


def test_a_limit_that_is_compared_first():
    text = LOOPS.replace(
        "compare(%i.2, %limit), direction=LT", "compare(%limit, %i.2), direction=GT"
    )
    assert hlo.executions(hlo.parse(text))["inner_body"] == 12


def test_a_comparison_in_a_fusion():
    fusion = "fusion(%limit, %i.2), kind=kLoop, calls=%less.than"
    text = LOOPS.replace("compare(%i.2, %limit), direction=LT", fusion)
    text = text.replace(
        "%outer_body (p.3",
        """%less.than (l: s32[], k: s32[]) -> pred[] {
  %l = s32[] parameter(0)
  %k = s32[] parameter(1)
  ROOT %c = pred[] compare(%k, %l), direction=LT
}

%outer_body (p.3""",
        1,
    )
    assert hlo.executions(hlo.parse(text))["inner_body"] == 12


def test_a_loop_that_depends_on_data_counts_once_and_is_named():
    module = hlo.parse(LOOPS.replace("add(%copied, %two)", "multiply(%copied, %two)"))
    assert hlo.executions(module)["inner_body"] == 3
    assert hlo.unknown_loops(module) == ["while.1"]


BLOCKS = """HloModule blocks

%body (p: (s32[], s32[], bf16[640,64])) -> (s32[], s32[], bf16[640,64]) {
  %p = (s32[], s32[], bf16[640,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %x = bf16[640,64]{1,0} get-tuple-element(%p), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %start = s32[] multiply(%i, %n)
  %cut = bf16[32,64]{1,0} dynamic-slice(%x, %start, %i), dynamic_slice_sizes={32,64}
  %put = bf16[640,64]{1,0} dynamic-update-slice(%x, %cut, %start, %i)
  ROOT %r = (s32[], s32[], bf16[640,64]{1,0}) tuple(%next, %n, %put)
}

%condition (q: (s32[], s32[], bf16[640,64])) -> pred[] {
  %q = (s32[], s32[], bf16[640,64]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %m = s32[] get-tuple-element(%q), index=1
  ROOT %less = pred[] compare(%j, %m), direction=LT
}

ENTRY %main (x: bf16[640,64], n: s32[]) -> bf16[640,64] {
  %x = bf16[640,64]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %t = (s32[], s32[], bf16[640,64]{1,0}) tuple(%zero, %n, %x)
  %loop = (s32[], s32[], bf16[640,64]{1,0}) while(%t), condition=%condition, body=%body, metadata={op_name="jit(f)/transpose(jvp(experts))/while"}
  ROOT %y = bf16[640,64]{1,0} get-tuple-element(%loop), index=2
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("scope", "load", "times"),
    [
        ("experts", None, 1),
        ("experts", hlo.Load(rows=300.0, experts=4), 3),  # of 75 rows each, in blocks of 32
        ("experts", hlo.Load(rows=10.0, experts=4), 1),
        ("experts)/(combine", hlo.Load(rows=300.0, experts=4), 10),
        ("loss", hlo.Load(rows=300.0, experts=4), 1),
    ],
)
def test_loops_over_rows_have_rounds_as_rows_are_filled(scope, load, times):
    text = BLOCKS.replace("jvp(experts)", f"jvp({scope})")
    module = dataclasses.replace(hlo.parse(text), load=load)
    assert hlo.executions(module)["body"] == times
    assert hlo.unknown_loops(module) == ([] if load and scope != "loss" else ["loop"])


def test_text_that_is_no_hlo():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("nothing\n")


PRODUCTS = """HloModule products

%slicing (big: f32[10,64], at: s32[]) -> f32[1,64] {
  %big = f32[10,64]{1,0} parameter(0)
  %at = s32[] parameter(1)
  ROOT %cut = f32[1,64]{1,0} dynamic-slice(%big, %at, %at), dynamic_slice_sizes={1,64}
}

%updating (old: f32[10,64], new: f32[1,64], where: s32[]) -> f32[10,64] {
  %old = f32[10,64]{1,0} parameter(0)
  %new = f32[1,64]{1,0} parameter(1)
  %where = s32[] parameter(2)
  ROOT %put = f32[10,64]{1,0} dynamic-update-slice(%old, %new, %where, %where)
}

ENTRY %main (x: bf16[4,5], y: bf16[5,6], l: f32[3,7,8], r: f32[3,8,9], s: f32[10,64], k: s32[], m: f32[2,9,8,1], n: f32[3,2,7,8]) -> f32[] {
  %x = bf16[4,5]{1,0} parameter(0)
  %y = bf16[5,6]{1,0} parameter(1)
  %l = f32[3,7,8]{2,1,0} parameter(2)
  %r = f32[3,8,9]{2,1,0} parameter(3)
  %s = f32[10,64]{1,0} parameter(4)
  %k = s32[] parameter(5)
  %m = f32[2,9,8,1]{3,2,1,0:S(1)} parameter(6)
  %n = f32[3,2,7,8]{3,2,1,0:S(1)} parameter(7)
  %plain = bf16[4,6]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %batched = f32[3,7,9]{2,1,0:S(1)} convolution(%l, %r), window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf
  %two = f32[2,9,3,7]{3,2,1,0:S(1)} convolution(%m, %n), window={size=3x2 pad=2_2x0_0 lhs_dilate=1x2 rhs_reversal=1x0}, dim_labels=1bf0_01oi->1b0f
  %f.1 = f32[1,64]{1,0:S(1)} fusion(%s, %k), kind=kLoop, calls=%slicing
  %f.2 = f32[10,64]{1,0} fusion(%s, %f.1, %k), kind=kLoop, calls=%updating
  ROOT %done = f32[] constant(0)
}
"""  # noqa: E501


def test_products_and_memory_by_hand():
    module = hlo.parse(PRODUCTS)
    # A batch written as a window: of its 3 x 3 (output, window) places 3 are real.
    # Two such dimensions, the result's in another order: 2 x 1 of 2 matrices against 3.
    two = 2 * 3 * 2 * 7 * 8 * 9
    assert hlo.product_flops(module) == 2 * 4 * 5 * 6 + 3 * 2 * 7 * 8 * 9 + two
    main = module.computations["main"].by_name
    assert hlo.flops_of(module, "main", main["plain"]) == 2 * 4 * 5 * 6
    assert hlo.flops_of(module, "main", main["f.1"]) == 0
    plain = 2 * (4 * 5 + 5 * 6 + 4 * 6)
    batched = 4 * (3 * 7 * 8 + 3 * 8 * 9)  # its result stays on the chip
    sliced = 4 * 64 + 4  # read from the stack, with the index; the slice stays on the chip
    updated = 4 * 64 + 4  # written into the stack
    assert hlo.memory_bytes(module) == plain + batched + sliced + updated


@pytest.mark.parametrize(
    ("shape", "elements"),
    [
        ("bf16[32,2048,16,96]{3,1,2,0:T(8,128)(2,1)}", 32 * 16 * 2048 * 128),
        ("bf16[32,2048,16,96]{1,3,2,0:T(8,128)(2,1)}", 32 * 16 * 96 * 2048),
        ("f32[4,3,5]{0,1,2:T(4,128)S(1)}", 5 * 4 * 128),
        ("s32[1000]{0:T(1024)}", 1024),
        ("f32[]{:T(128)}", 1),
        ("f32[3,5]{1,0}", 15),
        ("f32[3,5]", 15),
    ],
)
def test_memory_holds_whole_tiles(shape, elements):
    """On a TPU the innermost dimensions are filled up: a width of 96 to 128, where it is one."""
    text = f"ENTRY %main (a: f32[2]) -> f32[2] {{\n  ROOT %a = {shape} parameter(0)\n}}\n"
    (found,) = hlo.parse(text).computations["main"].root.shapes
    width = 2 if shape.startswith("bf16") else 4
    assert found.stored == width * elements
    assert found.bytes == width * found.size


def compiled(f, mesh, in_specs, out_specs, *arguments) -> hlo.Module:
    mapped = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return hlo.parse(jax.jit(mapped).lower(*arguments).compile().as_text())


@pytest.fixture(scope="module")
def mesh():
    kinds = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=kinds)


def test_compiled_loops_of_collectives(mesh):
    """Three rounds, in each two of an exchange; then a gradient scattered and a sum of scalars."""

    def f(w, x):
        def outer(x, w):
            def inner(x, _):
                y = jax.lax.all_to_all(x, "expert", split_axis=0, concat_axis=0, tiled=True)
                return jnp.sin(y), None

            x, _ = jax.lax.scan(inner, x, None, length=2)
            whole = jax.lax.all_gather(w, ("fsdp", "expert"), axis=0, tiled=True)
            return jnp.tanh(x @ whole), None

        x, _ = jax.lax.scan(outer, x, w)
        g = jax.lax.psum_scatter(x.T @ x, ("fsdp", "expert"), scatter_dimension=0, tiled=True)
        return g, jax.lax.psum(jnp.sum(x), ("data", "fsdp", "expert"))

    cut = P(("fsdp", "expert"))
    layers = P(None, ("fsdp", "expert"))
    rows = P(("data", "fsdp", "expert"))
    w, x = jnp.ones((3, 64, 64)), jnp.ones((8 * 16, 64))
    module = compiled(f, mesh, (layers, rows), (cut, P()), w, x)
    got = {(c.kind, c.axes(MESH)): (c.times, c.wire_bytes) for c in hlo.collectives(module)}
    assert got == {
        ("all-to-all", ("expert",)): (6, 4 * 16 * 64 / 2),
        ("all-gather", ("fsdp", "expert")): (3, 4 * 16 * 64 * 3),
        ("reduce-scatter", ("fsdp", "expert")): (1, 4 * 64 * 64 * 3 / 4),
        ("all-reduce", ("data", "fsdp", "expert")): (1, 4 * 2 * 7 / 8),
    }
    assert hlo.product_flops(module) == 3 * 2 * 16 * 64 * 64 + 2 * 64 * 16 * 64


def test_compiled_gradient_through_a_loop():
    """A scan's gradient is a second loop of as many rounds, with two products for one."""

    def loss(w, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
        return x.sum()

    w, x = jnp.ones((5, 32, 32)), jnp.ones((7, 32))
    module = hlo.parse(jax.jit(jax.grad(loss, (0, 1))).lower(w, x).compile().as_text())
    assert hlo.product_flops(module) == 5 * 3 * 2 * 7 * 32 * 32
    assert hlo.collectives(module) == []


def test_compiled_memory_follows_the_rounds(mesh):
    """Each round reads the matrix of its own, not the whole stack."""

    def f(w, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    def bytes_of(layers):
        w, x = jnp.ones((layers, 256, 256)), jnp.ones((4, 256))
        return hlo.memory_bytes(hlo.parse(jax.jit(f).lower(w, x).compile().as_text()))

    difference = bytes_of(9) - bytes_of(5)
    matrices = 4 * 4 * 256 * 256
    assert matrices <= difference <= 3.2 * matrices  # one read, and a copy of the slice at most


def test_compiled_permutation(mesh):
    ring = [(i, (i + 1) % 2) for i in range(2)]
    f = partial(jax.lax.ppermute, axis_name="fsdp", perm=ring)
    [c] = hlo.collectives(compiled(f, mesh, P("fsdp"), P("fsdp"), jnp.ones((4, 3))))
    assert (c.kind, c.times, c.wire_bytes, c.axes(MESH)) == (
        "collective-permute",
        1,
        2 * 3 * 4,
        ("fsdp",),
    )
    assert np.array_equal(np.sort(c.groups[:, 0]), np.arange(8))
