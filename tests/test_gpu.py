"""GPUs that are not there: their descriptions, their programs as stored text, their network."""

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from moepp_jax.chips import CHIPS, GB
from moepp_jax.compile import by_part, findings, gpu, hlo, parts, tables
from moepp_jax.compile import step as compile_lib
from moepp_jax.compile.hlo import custom_calls
from moepp_jax.compile.switched import Switched
from moepp_jax.compile.topology import Topology, devices
from moepp_jax.errors import ConfigError
from tests import tiny


def matmul(name: str, operands: str, result: str, contracted: int, precision="DEFAULT") -> str:
    """As XLA for CUDA writes a product that cuBLAS makes."""
    config = {
        "gemm_backend_config": {
            "beta": 0,
            "dot_dimension_numbers": {"lhs_contracting_dimensions": [str(contracted)]},
            "precision_config": {"operand_precision": ["DEFAULT", precision]},
        }
    }
    text = json.dumps(config, separators=(",", ":"))
    return (
        f"  %{name} = ({result}, s8[4194304]{{0}}) custom-call({operands}), "
        f'custom_call_target="__cublas$lt$matmul", backend_config={text}'
    )


def attention(name: str, operands: str, result: str, mask: str) -> str:
    """As XLA for CUDA writes attention that cuDNN computes: 2 sequences, 12 heads, 2,048 tokens."""
    config = {
        "cudnn_fmha_backend_config": {
            "intermediate_tensor_shape": {"dimensions": ["2", "12", "2048", "2048"]},
            "mask_type": mask,
            "sliding_window_length": 0,
        }
    }
    backward = "Backward" if "bwd" in name else ""
    return (
        f"  %{name} = ({result}, u8[0]{{0}}) custom-call({operands}), "
        f'custom_call_target="__cudnn$fmhaSoftmax{backward}", backend_config={json.dumps(config)}'
    )


QKV = "%q, %k, %v"
HEADS = "bf16[2,12,2048,64]{3,1,2,0}"
PROGRAM = f"""HloModule step, is_scheduled=true, num_partitions=8

%fused (l: bf16[32,64], r: bf16[64,16]) -> bf16[32,16] {{
  %l = bf16[32,64]{{1,0}} parameter(0)
  %r = bf16[64,16]{{1,0}} parameter(1)
  ROOT %inner = bf16[32,16]{{1,0}} dot(%l, %r), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

%body (p: (s32[], bf16[32,64])) -> (s32[], bf16[32,64]) {{
  %p = (s32[], bf16[32,64]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[32,64]{{1,0}} get-tuple-element(%p), index=1
  %w = bf16[5,64,16]{{2,1,0}} constant(0)
  %xs = bf16[5,32,64]{{2,1,0}} broadcast(%x), dimensions={{1,2}}
{matmul("many", "%xs, %w", "bf16[5,32,16]{2,1,0}", 2)}
  ROOT %next = (s32[], bf16[32,64]{{1,0}}) tuple(%i, %x)
}}

%condition (c: (s32[], bf16[32,64])) -> pred[] {{
  %c = (s32[], bf16[32,64]{{1,0}}) parameter(0)
  ROOT %never = pred[] constant(false)
}}

ENTRY %main (a: bf16[32,64], b: bf16[64,16], f: f32[16,64], q: bf16[2,2048,12,64], k: bf16[2,2048,4,64], v: bf16[2,2048,4,64]) -> f32[] {{
  %a = bf16[32,64]{{1,0}} parameter(0)
  %b = bf16[64,16]{{1,0}} parameter(1)
  %f = f32[16,64]{{1,0}} parameter(2)
  %q = bf16[2,2048,12,64]{{3,2,1,0}} parameter(3)
  %k = bf16[2,2048,4,64]{{3,2,1,0}} parameter(4)
  %v = bf16[2,2048,4,64]{{3,2,1,0}} parameter(5)
{matmul("plain", "%a, %b", "bf16[32,16]{1,0}", 1)}
{matmul("rounded", "%f, %f", "f32[64,64]{1,0}", 0)}
{matmul("exact", "%f, %f", "f32[16,16]{1,0}", 1, "HIGHEST")}
{attention("fwd", QKV, f"{HEADS}, f32[2,12,2048]{{2,1,0}}", "CAUSAL")}
{attention("bwd", QKV, f"{HEADS}, {HEADS}, {HEADS}", "NO_MASK")}
  %zero = s32[] constant(0)
  %t = (s32[], bf16[32,64]{{1,0}}) tuple(%zero, %a)
  %while = (s32[], bf16[32,64]{{1,0}}) while(%t), condition=%condition, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
  %tiles = bf16[32,16]{{1,0}} fusion(%a, %b), kind=kCustom, calls=%fused, backend_config={{"fusion_backend_config":{{"kind":"__triton_nested_gemm_fusion"}}}}
  %loop = bf16[32,16]{{1,0}} fusion(%a, %b), kind=kLoop, calls=%fused
  %own = bf16[32,16]{{1,0}} custom-call(%a, %b), custom_call_target="__gpu$xla.gpu.triton", metadata={{op_name="jit(f)/blocks/pallas_call"}}, backend_config={{grid_x = 4 : i32, ir = "ML\\EFR(\\22"}}
  %foreign = bf16[32,16]{{1,0}} custom-call(%a, %b), custom_call_target="somebody's"
  %sorted = (bf16[32,16]{{1,0}}, s8[64]{{0}}) custom-call(%a), custom_call_target="__cub$DeviceRadixSort"
  ROOT %done = f32[] constant(0)
}}
"""  # noqa: E501

MANY = 3 * 2 * 5 * 32 * 16 * 64
PLAIN = 2 * 32 * 16 * 64
CAUSAL = 2 * 2 * 2 * 12 * 64 * 2048 * 2049 // 2  # to the diagonal
BACKWARD = 5 * 2 * 2 * 12 * 64 * 2048 * 2048


@pytest.fixture(scope="module")
def module() -> hlo.Module:
    return hlo.parse(PROGRAM)


def test_which_kernel_computes_what(module):
    got = {(k.name, k.arithmetic): (k.times, k.flops) for k in hlo.kernels(module)}
    assert got == {
        ("cuDNN attention", "bf16"): (2, CAUSAL + BACKWARD),
        ("cuBLAS", "bf16"): (4, MANY + PLAIN),
        ("cuBLAS", "tf32"): (1, 2 * 64 * 64 * 16),
        ("cuBLAS", "f32"): (1, 2 * 16 * 16 * 64),
        ("XLA's Triton", "bf16"): (1, PLAIN),
        ("XLA", "bf16"): (1, PLAIN),
        ("Triton kernel blocks", ""): (1, None),
        ("somebody's", ""): (1, None),
    }
    assert sum(flops or 0 for _, flops in got.values()) == hlo.product_flops(module)


def test_most_is_computed_by_the_first_and_what_is_unknown_comes_last(module):
    flops = [k.flops for k in hlo.kernels(module)]
    known = [f for f in flops if f is not None]
    assert known == sorted(known, reverse=True) and flops[len(known) :] == [None, None]


def test_a_sliding_window_is_all_that_attention_computes():
    text = PROGRAM.replace(
        '"CAUSAL", "sliding_window_length": 0', '"X", "sliding_window_length": 9'
    )
    [row] = [k for k in hlo.kernels(hlo.parse(text)) if k.name == "cuDNN attention"]
    assert row.flops == 2 * 2 * 2 * 12 * 64 * 2048 * 9 + BACKWARD


def test_workspaces_are_no_traffic(module):
    main = module.computations["main"].by_name
    assert custom_calls.workspace_bytes(main["plain"]) == 4 * 2**20
    assert custom_calls.workspace_bytes(main["sorted"]) == 0
    text = PROGRAM.replace("s8[4194304]", "s8[8388608]")
    assert hlo.memory_bytes(hlo.parse(text)) == hlo.memory_bytes(module)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("operand_precision={highest,default}", "highest"),
        ("operand_precision={default,high}", "high"),
        ('backend_config={"operand_precision":["DEFAULT","HIGHEST"]}', "highest"),
        ("lhs_contracting_dims={1}", "default"),
    ],
)
def test_precision(attributes, expected):
    line = f"  %d = f32[2,2]{{1,0}} dot(%a, %a), {attributes}"
    text = f"HloModule m\n\nENTRY %m (a: f32[2,2]) -> f32[2,2] {{\n{line}\n}}\n"
    [instruction] = hlo.parse(text).computations["m"].instructions
    assert custom_calls.precision(instruction) == expected


@pytest.mark.parametrize("name", gpu.CARDS)
def test_every_card_is_described_whole(name):
    card = gpu.CARDS[name]
    text = gpu.description(card)
    fields = dict(re.findall(r"(\w+): ([\d.]+)", text))
    assert int(fields["device_memory_size"]) == card.chip.hbm_bytes
    assert int(fields["active_links"]) == card.chip.links
    for needed in ("threads_per_block_limit", "block_dim_limit_x", "shared_memory_per_block_optin"):
        assert int(fields[needed]) > 0  # without these XLA crashes, or says what is not so
    assert card.source and card.chip.torus == 0
    assert card.shared_of_block < card.shared_of_core
    # A float32 unit multiplies and adds once a clock: the data sheet's peak, within a tenth.
    by_hand = 2 * card.cores * card.lanes * card.clock * 1e9
    assert card.chip.float32_flops == pytest.approx(by_hand, rel=0.1)
    assert card.chip.flops == pytest.approx(2 * card.chip.tf32_flops, rel=0.01)


def test_topologies():
    one, many = Topology.parse("h100:4"), Topology.parse("a100-40gb:2x8")
    assert (one.slices, one.dims, one.num_devices, one.platform) == (1, (4,), 4, "gpu")
    assert (many.slices, many.dims, many.num_devices, many.platform) == (2, (8,), 16, "gpu")
    assert many.chip is CHIPS["A100-40GB"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("h300:8", "not known: .*a100, a100-40gb, b200, h100, h200"),
        ("h100", "not known"),
        ("2*h100:8", "not known: .*h100:8x8 for eight hosts"),
        ("h100:2x2x2", "not known"),
        ("h100:64", "from one GPU to 8: .* h100:8x8"),
        ("h100:0x8", "one host or more"),
        ("h100:8x0", "from one GPU to 8"),
    ],
)
def test_topologies_that_are_none(text, said):
    with pytest.raises(ConfigError, match=said):
        Topology.parse(text)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NotImplementedError("topology not implemented for cuda"), r"pip install 'jax\[cuda12\]'"),
        (
            RuntimeError("INVALID_ARGUMENT: no\nsuch card"),
            "H100 80GB HBM3: INVALID_ARGUMENT: no such",
        ),
    ],
)
def test_what_the_plugin_says(monkeypatch, error, said):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)

    def fail(**_):
        raise error

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", fail)
    with pytest.raises(ConfigError, match=said) as caught:
        devices(Topology.parse("h100:8"))
    assert "\n" not in str(caught.value)


def test_a_plugin_that_found_no_card_when_jax_started(monkeypatch):
    def fail(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", fail)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="set JAX_PLATFORMS=cpu before it starts"):
        devices(Topology.parse("h100:8"))


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr(compile_lib, "devices", lambda topology: [None] * topology.num_devices)
    config = tiny.config(**{"mesh.data": 3, "mesh.fsdp": 1, "mesh.expert": 2})
    with pytest.raises(ConfigError, match="does not multiply to the 16 devices"):
        compile_lib.run(config, "h100:2x8")


def collective(kind: str, groups, operand_bytes: int, times: int = 1) -> hlo.Collective:
    return hlo.Collective(
        kind, "c", "main", operand_bytes, ("bf16",), np.array(groups), times, False, ""
    )


@pytest.fixture
def network() -> Switched:
    """Two hosts of four H100: 450 GB/s to each other, 50 GB/s to the other host."""
    return Switched([SimpleNamespace(process_index=i // 4) for i in range(8)], CHIPS["H100"])


def test_within_a_host_only_its_links_count(network):
    exchange = collective("all-to-all", [[0, 1, 2, 3], [4, 5, 6, 7]], GB, times=3)
    assert network.seconds(exchange) == (pytest.approx(3 * 0.75 / 450), 0.0)
    assert network.bound([exchange, exchange]) == pytest.approx(6 * 0.75 / 450)
    assert network.bound([]) == 0.0


def test_counterparts_in_hosts_use_the_network_alone(network):
    gather = collective("all-gather", [[0, 4], [1, 5], [2, 6], [3, 7]], GB)
    assert network.seconds(gather) == (0.0, pytest.approx(1 / 50))


def test_between_hosts_every_byte_crosses_as_rarely_as_can_be(network):
    everyone = [list(range(8))]
    # Half of what each sends is for the other host.
    assert network.seconds(collective("all-to-all", everyone, GB))[1] == pytest.approx(0.5 / 50)
    # Each of four has a quarter of the host's sum, and exchanges halves of it, there and back.
    assert network.seconds(collective("all-reduce", everyone, GB))[1] == pytest.approx(0.25 / 50)
    # A host lacks the other's four parts, of which each of its four fetches one.
    assert network.seconds(collective("all-gather", everyone, GB))[1] == pytest.approx(1 / 50)
    scatter = collective("reduce-scatter", everyone, 8 * GB)
    assert network.seconds(scatter)[1] == pytest.approx(1 / 50)
    assert network.seconds(collective("collective-permute", everyone, GB))[1] == 1 / 50


REPORT = {"fits": True, "hbm_limit_bytes": 80 * GB, "preallocated_bytes": 60 * GB}


@pytest.mark.parametrize(
    ("needed", "fits", "said"),
    [
        (50 * GB, True, "It fits.*takes 55.88 GiB when it starts: enough."),
        (70 * GB, True, "It fits.*too little; set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"),
        (90 * GB, False, "It does not fit"),
    ],
)
def test_the_card_and_what_jax_takes_of_it(needed, fits, said):
    told = REPORT | {"hbm_bytes": needed, "fits": fits}
    assert re.search(said, tables.verdict(told))


def test_bounds_are_of_each_arithmetic_and_what_is_unknown_is_named(module, capsys):
    topology = Topology.parse("h100:8")
    rows = findings.kernels(module, topology)
    peaks = {"bf16": 989e12, "tf32": 494.5e12, "f32": 67e12}
    seconds = [row["flops"] / peaks[row["arithmetic"]] for row in rows if row["flops"]]
    assert [row["seconds"] for row in rows if row["flops"]] == pytest.approx(seconds)
    assert math.isclose(findings.arithmetic({"kernels": rows}, topology.chip), sum(seconds))
    tables.show_kernels(rows, Console(width=120))
    out = " ".join(capsys.readouterr().out.split())
    assert "cuDNN attention bf16 2" in out
    assert "Not counted" in out and "Triton kernel blocks (1 times), somebody's (1 times)" in out
    assert findings.kernels(module, Topology.parse("cpu:8")) == []


SCOPED = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%fused (l: bf16[4096,1024]) -> bf16[4096,1024] {
  %l = bf16[4096,1024]{1,0} parameter(0)
  ROOT %twice = bf16[4096,1024]{1,0} add(%l, %l), metadata={op_name="jit(step)/combine/add"}
}

ENTRY %main (a: bf16[4096,1024], f: f32[1024,1024]) -> bf16[4096,1024] {
  %a = bf16[4096,1024]{1,0} parameter(0)
  %f = f32[1024,1024]{1,0} parameter(1)
  %x = bf16[4096,4096]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}, metadata={op_name="jit(step)/experts/dot"}
  %r = f32[1024,1024]{1,0} dot(%f, %f), lhs_contracting_dims={1}, rhs_contracting_dims={0}, operand_precision={highest,highest}, metadata={op_name="jit(step)/router/dot"}
  %sent = bf16[4096,1024]{1,0} all-to-all(%a), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %y = bf16[4096,1024]{1,0} fusion(%sent), kind=kLoop, calls=%fused
}
"""  # noqa: E501


def test_each_part_at_the_peaks_of_its_arithmetic_of_memory_and_of_links():
    """Of a product of 4,096 x 1,024 x 4,096 in bfloat16 its operations, of one in float32 too; of a
    sum what it reads and writes; of an exchange seven eighths of its rows over 450 GB/s.
    """
    chip = Topology.parse("h100:8").chip
    devices = [SimpleNamespace(process_index=0)] * 8
    module = hlo.parse(SCOPED)
    found = by_part.roofline(module, chip, Switched(devices, chip))
    rows = 4096 * 1024 * 2
    expected = {
        parts.ROUTER: (2 * 1024**3 / 67e12, "products"),
        parts.EXPERTS: (2 * 4096 * 1024 * 4096 / 989e12, "products"),
        parts.COMBINE: (2 * rows / 3350e9, "HBM"),
        by_part.EXCHANGE: (rows * 7 / 8 / 450e9, "links"),
    }
    assert list(found) == list(expected)
    for part, (seconds, bound) in expected.items():
        assert found[part]["ms"] == pytest.approx(1e3 * seconds), part
        assert found[part]["bound_by"] == bound
    console = Console(width=120, record=True)
    console.print(tables._roofline({"roofline": found}))
    assert "experts" in console.export_text()


def own(name: str, result: str, operands: str) -> str:
    return (
        f'  %{name} = {result} custom-call({operands}), custom_call_target="__gpu$xla.gpu.triton", '
        f'metadata={{op_name="jit(f)/experts/experts_{name}/pallas_call"}}, backend_config={{}}'
    )


GROUPED = f"""\
HloModule step, is_scheduled=true

ENTRY %main (e: s32[9], c: s32[4], x: bf16[640,64], w: bf16[4,256,64], v: bf16[4,64,128]) -> f32[] {{
  %e = s32[9]{{0}} parameter(0)
  %c = s32[4]{{0}} parameter(1)
  %x = bf16[640,64]{{1,0}} parameter(2)
  %w = bf16[4,256,64]{{2,1,0}} parameter(3)
  %v = bf16[4,64,128]{{2,1,0}} parameter(4)
  %zeros = bf16[640,64]{{1,0}} broadcast(%x), dimensions={{0,1}}
{own("hidden", "(bf16[640,256]{1,0}, bf16[640,128]{1,0})", "%e, %e, %e, %x, %w")}
  %h = bf16[640,256]{{1,0}} get-tuple-element(%hidden), index=0
  %a = bf16[640,128]{{1,0}} get-tuple-element(%hidden), index=1
{own("product", "bf16[640,64]{1,0}", "%e, %e, %e, %a, %v, %zeros")}
{own("hidden_gradient", "(bf16[640,256]{1,0}, bf16[640,128]{1,0})", "%e, %e, %e, %x, %v, %h")}
{own("parameters", "bf16[4,256,64]{2,1,0}", "%c, %c, %h, %x")}
  ROOT %done = f32[] constant(0)
}}
"""  # noqa: E501


@pytest.mark.parametrize(("filled", "rows"), [(None, 640), (160.0, 160), (1000.0, 640)])
def test_our_kernels_over_rows_sorted_by_expert(filled, rows):
    """A row of 64 numbers, experts of 128: of rows that are filled, where that is known."""
    load = None if filled is None else hlo.Load(filled, experts=4)
    module = dataclasses.replace(hlo.parse(GROUPED), load=load)
    matrix = {"hidden": 256 * 64, "product": 64 * 128, "hidden_gradient": 64 * 128}
    matrix["parameters"] = 256 * 64
    numbers = {"hidden": 64 + 256 + 128, "product": 128 + 64, "parameters": 256 + 64}
    numbers["hidden_gradient"] = 64 + 256 + 256 + 128
    found = {k.name.removeprefix("Triton kernel experts_"): k for k in hlo.kernels(module)}
    main = module.computations["main"]
    for name, size in matrix.items():
        assert (found[name].flops, found[name].arithmetic) == (2 * rows * size, "bf16")
        moved = hlo.traffic(module, main, main.by_name[name])
        assert moved == 2 * (4 * size + rows * numbers[name]), name
    assert hlo.product_flops(module) == 2 * rows * sum(matrix.values())
