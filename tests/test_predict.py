"""`compile --profile`: programs written by hand, the small step by its scopes, and the child."""

import dataclasses
import io
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

from moepp_jax import mesh as mesh_lib
from moepp_jax import worker
from moepp_jax.chips import CHIPS, Chip
from moepp_jax.commands import compile as command
from moepp_jax.compile import figure, hlo, needs, parts, profile, rates, scheduled, tables
from moepp_jax.compile import step as compile_lib
from moepp_jax.compile.roofline import Interconnect
from moepp_jax.compile.timeline import Timeline
from moepp_jax.compile.topology import Topology
from moepp_jax.config import Config
from moepp_jax.configs import moe_7b, moepp_7b
from moepp_jax.errors import ConfigError
from tests import tiny

V5P = CHIPS["v5p"]
LAUNCH = rates.LAUNCH


def need(text: str, name: str, chip: Chip = V5P) -> needs.Needs:
    module = hlo.parse(f"HloModule m\n\n{text}")
    [computation] = [c for c in module.computations.values() if name in c.by_name]
    return needs.of(module, computation, computation.by_name[name], chip)


def product(rows: int, contracted: int, columns: int) -> str:
    a, b, c = f"{rows},{contracted}", f"{contracted},{columns}", f"{rows},{columns}"
    return f"""ENTRY %main (a: bf16[{a}], b: bf16[{b}]) -> bf16[{c}] {{
  %a = bf16[{a}]{{1,0}} parameter(0)
  %b = bf16[{b}]{{1,0}} parameter(1)
  ROOT %c = bf16[{c}]{{1,0}} convolution(%a, %b), dim_labels=bf_io->bf
}}
"""


def test_a_bare_product_is_near_the_peak():
    found = need(product(8192, 4096, 4096), "c")
    assert found.bound == needs.MXU
    assert found.seconds == pytest.approx(
        2 * 8192 * 4096 * 4096 / (rates.PRODUCTS * V5P.flops) + LAUNCH
    )
    assert 2 * 8192 * 4096 * 4096 / found.seconds > 0.9 * V5P.flops


def test_widths_that_do_not_fill_the_mxu_cost_as_if_they_did():
    filled = need(product(65536, 1024, 2048), "c").seconds - LAUNCH
    narrow = need(product(65536, 900, 2048), "c").seconds - LAUNCH  # 900 is 7.03 x 128
    assert narrow == pytest.approx(filled)
    # Of both free widths the one that is worse off streams: 100 rows, but no 100 of 128 columns.
    assert need(product(100, 8192, 8192), "c").bound == needs.HBM


INDEXED = """%gathering (x: bf16[65536,1536], at: s32[108544]) -> bf16[108544,1536] {
  %x = bf16[65536,1536]{1,0} parameter(0)
  %at = s32[108544]{0} parameter(1)
  ROOT %rows = bf16[108544,1536]{1,0} gather(%x, %at), offset_dims={1}, collapsed_slice_dims={0}, start_index_map={0}, index_vector_dim=1, slice_sizes={1,1536}
}

ENTRY %main (x: bf16[65536,1536], at: s32[108544], n: f32[131072], u: f32[64,8,1536], t: f32[65536,1536]) -> f32[65536,1536] {
  %x = bf16[65536,1536]{1,0} parameter(0)
  %at = s32[108544]{0} parameter(1)
  %n = f32[131072]{0} parameter(2)
  %u = f32[64,8,1536]{2,1,0} parameter(3)
  %t = f32[65536,1536]{1,0} parameter(4)
  %moved = bf16[108544,1536]{1,0} fusion(%x, %at), kind=kCustom, calls=%gathering
  %numbers = f32[108544]{0} gather(%n, %at), offset_dims={}, collapsed_slice_dims={0}, start_index_map={0}, index_vector_dim=1, slice_sizes={1}
  %put = f32[131072]{0} scatter(%n, %at, %numbers), update_window_dims={}, inserted_window_dims={0}, scatter_dims_to_operand_dims={0}, index_vector_dim=1
  ROOT %added = f32[65536,1536]{1,0} scatter(%t, %at, %u), update_window_dims={2}, inserted_window_dims={0}, scatter_dims_to_operand_dims={0}, index_vector_dim=2
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("name", "cycles"),
    [
        ("moved", 108544 * rates.GATHERED_ROW),
        ("numbers", 108544 * rates.GATHERED),
        ("put", 108544 * rates.SCATTERED),
        ("added", 64 * 8 * rates.SCATTERED_ROW),
    ],
)
def test_what_is_read_and_written_by_index_costs_by_the_row(name, cycles):
    found = need(INDEXED, name)
    assert found.seconds == pytest.approx(cycles / 1.75e9 + LAUNCH)
    assert found.bound == needs.ROWS


def test_other_instructions_cost_what_they_move():
    text = """ENTRY %main (a: f32[4096,4096]) -> f32[4096,4096] {
  %a = f32[4096,4096]{1,0} parameter(0)
  %b = f32[4096,4096]{1,0} negate(%a)
  %little = f32[2,2]{1,0} constant(0)
  ROOT %d = f32[2,2]{1,0} negate(%little)
}
"""
    found = need(text, "b")
    assert found.bound == needs.HBM
    assert found.seconds == pytest.approx(8 * 4096**2 / (0.85 * 2765e9) + LAUNCH)
    assert need(text, "d").bound == needs.LAUNCH
    assert need(text, "a").seconds == 0


def kernel(name: str) -> str:
    return f"""ENTRY %main (q: bf16[32,16,2048,128], next: s8[1,2,2]) -> bf16[32,16,2048,128] {{
  %q = bf16[32,16,2048,128]{{3,2,1,0}} parameter(0)
  %next = s8[1,2,2]{{2,1,0}} parameter(1)
  ROOT %{name}.3 = bf16[32,16,2048,128]{{3,2,1,0}} custom-call(%next, %q, %q, %q), custom_call_target="tpu_custom_call", metadata={{op_name="jit(step)/attention/attention_core/pallas_call"}}
}}
"""  # noqa: E501


def test_a_kernel_that_is_known_costs_by_its_blocks():
    found = need(kernel("splash_mha_fwd"), "splash_mha_fwd.3")
    # 2 x 2 blocks of 1,024, of which the causal ones are 3; the heads on two cores.
    cycles = 32 * 16 * 3 * rates.block_cycles("splash_mha_fwd")
    assert (found.seconds, found.kernel) == (pytest.approx(cycles / 2 / 1.75e9 + LAUNCH), None)
    wide = need(kernel("splash_mha_fwd").replace(",128]", ",136]"), "splash_mha_fwd.3")
    assert wide.seconds == pytest.approx(2 * cycles / 2 / 1.75e9 + LAUNCH)
    found = need(kernel("splash_mha_fwd"), "splash_mha_fwd.3", CHIPS["v5e"])
    assert found.seconds == pytest.approx(cycles / 1.5e9 + LAUNCH)


def timeline(text: str, links: float = 1.0, dims=(4, 4)) -> Timeline:
    places = np.stack(np.unravel_index(np.arange(np.prod(dims)), dims), axis=1)
    devices = [SimpleNamespace(coords=(*map(int, p), 0), slice_index=0) for p in places]
    module = hlo.parse(f"HloModule m, num_partitions={len(devices)}\n\n{text}")
    return Timeline(module, V5P, Interconnect(devices, V5P), links)


def test_a_kernel_that_is_not_known_is_named():
    found = timeline(kernel("mystery"))
    assert found.unknown() == {"mystery": 1}
    [(spent, times)] = found.spent()
    assert (spent.part, times) == (parts.CORE, 1)
    assert spent.needs.bound == needs.HBM  # what it moves, at least


def test_a_kernel_without_a_name_goes_by_what_it_calls():
    assert timeline(kernel("custom-call")).unknown() == {"tpu_custom_call": 1}
    names = kernel("custom-call").replace("tpu_custom_call", "ConcatBitcast")
    assert not timeline(names).unknown()


# A row of four devices exchanges 1 GB each: 0.5 GB over each link, 5 ms. A product of 3 ms runs
# meanwhile; then a sum of all along the same row, and one along the columns.
EXCHANGE = """%body (p: (s32[], bf16[8192,8192])) -> (s32[], bf16[8192,8192]) {
  %p = (s32[], bf16[8192,8192]{1,0}) parameter(0)
  %i = s32[]{:S(6)} get-tuple-element(%p), index=0
  %a = bf16[8192,8192]{1,0} get-tuple-element(%p), index=1
  %one = s32[]{:S(6)} constant(1)
  %next = s32[]{:S(6)} add(%i, %one)
  %rows = bf16[4,125000000]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %go = (bf16[4,125000000]{1,0}, bf16[4,125000000]{1,0}) all-to-all-start(%rows), replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}, metadata={op_name="jit(step)/while/body/experts/to_experts/all_to_all"}
  %c = bf16[8192,8192]{1,0} convolution(%a, %a), dim_labels=bf_io->bf, metadata={op_name="jit(step)/while/body/experts/dot_general"}
  BETWEEN
  %came = bf16[4,125000000]{1,0} all-to-all-done(%go)
  ROOT %out = (s32[], bf16[8192,8192]) tuple(%next, %c)
}

%condition (q: (s32[], bf16[8192,8192])) -> pred[] {
  %q = (s32[], bf16[8192,8192]{1,0}) parameter(0)
  %j = s32[]{:S(6)} get-tuple-element(%q), index=0
  %limit = s32[]{:S(6)} constant(7)
  ROOT %less = pred[]{:S(6)} compare(%j, %limit), direction=LT
}

ENTRY %main (x: bf16[8192,8192]) -> bf16[8192,8192] {
  %x = bf16[8192,8192]{1,0} parameter(0)
  %zero = s32[]{:S(6)} constant(0)
  %t = (s32[], bf16[8192,8192]{1,0}) tuple(%zero, %x)
  %w = (s32[], bf16[8192,8192]{1,0}) while(%t), condition=%condition, body=%body
  ROOT %y = bf16[8192,8192]{1,0} get-tuple-element(%w), index=1
}
"""  # noqa: E501
GATHER = (
    "%sum = bf16[8192,8192]{1,0} all-gather(%a), replica_groups={GROUPS}, dimensions={0}, "
    'metadata={op_name="jit(step)/all_gather"}'
)
ROW = "{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}"
COLUMN = "{0,4,8,12},{1,5,9,13},{2,6,10,14},{3,7,11,15}"
PRODUCT = 2 * 8192**3 / (rates.PRODUCTS * V5P.flops) + LAUNCH


def by_part(found: Timeline) -> dict[str, float]:
    total: dict[str, float] = {}
    for spent, times in found.spent():
        total[spent.part] = total.get(spent.part, 0.0) + times * spent.needs.seconds
    return total


@pytest.mark.parametrize("links", [1.0, 0.25])
def test_an_exchange_costs_what_is_left_of_it(links):
    """In a loop of seven rounds, each with launches of two scalar instructions."""
    found = timeline(EXCHANGE.replace("BETWEEN", ""), links)
    got = by_part(found)
    assert got[parts.EXPERTS] == pytest.approx(7 * PRODUCT)
    assert got[parts.EXCHANGE] == pytest.approx(7 * (0.005 / links - PRODUCT))
    assert found.exchange() == pytest.approx(7 * 0.005 / links)
    assert set(got) <= {parts.EXPERTS, parts.EXCHANGE, parts.REST}
    assert got[parts.REST] <= 7 * 3 * LAUNCH


def test_what_is_hidden_entirely_costs_nothing():
    text = EXCHANGE.replace("BETWEEN", "").replace("4,125000000", "4,50000000")  # 2 ms
    assert parts.EXCHANGE not in by_part(timeline(text))


@pytest.mark.parametrize(("groups", "in_the_way"), [(ROW, True), (COLUMN, False)])
def test_a_collective_waits_for_links_that_are_busy(groups, in_the_way):
    """The exchange is what it waits for; links of another dimension are free."""
    text = EXCHANGE.replace("BETWEEN", GATHER.replace("GROUPS", groups))
    got = by_part(timeline(text))
    gather = 3 * 2 * 8192**2 / 200e9
    assert got[parts.COLLECTIVES] == pytest.approx(7 * gather)
    left = 0.005 - PRODUCT - (0 if in_the_way else gather)
    assert got[parts.EXCHANGE] == pytest.approx(7 * left)


def test_copies_between_memories_run_beside():
    text = """ENTRY %main (x: bf16[8192,8192]) -> bf16[8192,8192] {
  %x = bf16[8192,8192]{1,0} parameter(0)
  %go = (bf16[8192,8192]{1,0:S(1)}, bf16[8192,8192]{1,0}, u32[]) copy-start(%x)
  BETWEEN
  ROOT %came = bf16[8192,8192]{1,0:S(1)} copy-done(%go)
}
"""
    alone = by_part(timeline(text.replace("BETWEEN", "")))
    assert alone == {parts.REST: pytest.approx(2 * 8192**2 / (0.85 * 2765e9))}
    scope = 'metadata={op_name="jit(step)/loss/dot_general"}'
    work = f"%c = bf16[8192,8192]{{1,0}} convolution(%x, %x), dim_labels=bf_io->bf, {scope}"
    assert by_part(timeline(text.replace("BETWEEN", work))) == {parts.LOSS: pytest.approx(PRODUCT)}


@pytest.fixture(scope="module")
def config() -> Config:
    return tiny.config(**{"mesh.data": 2, "mesh.fsdp": 2, "mesh.expert": 2, "moe.gamma": 1.6})


@pytest.fixture(scope="module")
def module(config) -> hlo.Module:
    return hlo.parse(compile_lib.compile_step(config, mesh_lib.make_mesh(config)).as_text())


@pytest.fixture(scope="module")
def predicted(config, module) -> dict:
    return profile.predict(config, mesh_lib.make_mesh(config), V5P, module)


def test_parts_add_up_to_the_step(config, predicted):
    assert tuple(predicted["parts_ms"]) == parts.ALL
    for end in (0, 1):
        total = sum(ms[end] for ms in predicted["parts_ms"].values())
        assert total == pytest.approx(predicted["predicted_ms"][end])
    step = predicted["predicted_ms"][0] / 1e3
    tokens = config.train.batch_size * config.data.seq_len / 8
    assert predicted["tokens_per_second_per_chip"][0] == pytest.approx(tokens / step)
    nominal, realised = predicted["mfu_nominal"][0], predicted["mfu_realised"][0]
    assert 0 < nominal < realised < 1  # of slots some stay empty
    json.dumps(predicted)


@pytest.mark.parametrize("part", sorted(set(parts.ALL) - {parts.EXCHANGE, parts.COLLECTIVES}))
def test_every_part_of_the_model_is_found(predicted, part):
    """By its scope, in a real program; the links of CPUs take no time."""
    assert predicted["parts_ms"][part][0] > 0


def test_scopes_of_products_come_before_a_fusions_own():
    text = """HloModule m

%inside (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %b = f32[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(f)/transpose(jvp(attention))/dot"}
  ROOT %c = f32[8,8]{1,0} add(%b, %a), metadata={op_name="jit(f)/loss/add"}
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %y = f32[8,8]{1,0} negate(%x), metadata={op_name="jit(f)/attention/attention_core/neg"}
  %z = f32[8,8]{1,0} negate(%y), metadata={op_name="jit(f)/shard_map/neg"}
  ROOT %w = f32[8,8]{1,0} fusion(%z), kind=kLoop, calls=%inside, metadata={op_name="jit(f)/loss/add"}
}
"""  # noqa: E501
    module = hlo.parse(text)
    found = module.computations["main"].by_name
    assert parts.of(module, found["w"]) == parts.PROJECTIONS
    assert parts.of(module, found["y"]) == parts.CORE
    assert parts.of(module, found["z"]) == parts.REST


def test_the_tables_say_what_they_rest_on(config, predicted):
    console = Console(file=io.StringIO(), width=120)
    report = predicted | {"not_estimated": {"mystery": 24}, "vanilla": predicted}
    report |= {"remat": "qkv"}
    report["vanilla"] = predicted | {"remat": "w_in"}
    report |= {"by_the_compiler": {"optimal_ms": 1.0, "products_ms": 2.0}}
    tables.show_profile(report, console)
    out = " ".join(console.file.getvalue().split())
    for words in (
        "(exchange in full)",
        "mystery, 24 times",
        "Nothing ran",
        "vanilla twin, model.remat w_in 1.00 1.00",
    ):
        assert words in out
    assert out.index("router") < out.index("the rest") < out.index("step, s")


def test_the_vanilla_twin_is_that_of_the_recipe():
    """But for what it has no memory to keep."""
    given, twin = Config.parse(moepp_7b.get_config()), Config.parse(moe_7b.get_config())
    assert profile.vanilla_twin(given) == twin.replace("model", remat=given.model.remat)
    assert profile.vanilla_twin(twin) is None


def test_the_figure_has_a_bar_for_each_part(predicted, tmp_path):
    axes = figure.draw({"one": predicted, "other": predicted}, "v5p:4x4x4").axes[0]
    assert len(axes.patches) == 2 * len(parts.ALL)
    assert [t.get_text() for t in axes.get_yticklabels()] == list(parts.ALL)
    figure.write(tmp_path / "x.png", {"one": predicted}, "v5p:4x4x4")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_profile_beside_its_twin(config, module, monkeypatch, tmp_path, capsys):
    """All but the compiler: text that it wrote, of one configuration and of the other."""
    told = []

    def schedule(c, topology, state):
        told.append(c.moe.pool)
        return module, {"temporary_bytes": 1, "hbm_bytes": 2}

    topology = dataclasses.replace(Topology.parse("v5p:2x2x2"))
    monkeypatch.setattr(compile_lib, "_schedule", schedule)
    monkeypatch.setattr(compile_lib, "devices", lambda topology: jax.devices())
    file = tmp_path / "report.json"
    assert compile_lib.run(config, topology.text, str(file), "fast")
    report = json.loads(file.read_text())
    assert [pool.n_zero_computation for pool in told] == [config.moe.pool.n_zero_computation, 0]
    assert report["vanilla"]["predicted_ms"] == report["predicted_ms"]
    assert file.with_suffix(".png").exists()
    assert "Predicted time of a step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("topology", "profiled", "figure_file", "said"),
    [
        ("cpu:8", "fast", None, "--profile predicts times of TPUs: --topology=cpu:8 is none"),
        ("cpu:8", None, "x.png", "--figure=x.png shows what --profile predicts"),
        ("v5p:2x2x2", "fast", "none/x.png", "--figure=none/x.png: there is no such folder"),
        ("v9:2x2x2", "fast", None, "--topology=v9:2x2x2 is not known"),
    ],
)
def test_what_cannot_be_asked_for(config, topology, profiled, figure_file, said):
    with pytest.raises(ConfigError, match=said):
        compile_lib.run(config, topology, None, profiled, figure_file)


def test_a_profile_of_another_kind():
    with pytest.raises(ConfigError, match="--profile=3:9: of compile it is --profile or"):
        command.profiled("3:9")
    assert [command.profiled(given) for given in (None, "true", "full")] == [None, "fast", "full"]


# What the compiler does, without a compiler: DUMPS is where it is told to write.
CHILD = """
import os, re, sys, time
from pathlib import Path
folder = Path(re.search(r"--xla_dump_to=(\\S+)", os.environ["XLA_FLAGS"])[1])
name = "module_0001.jit_step.cl_1.after_optimizations"
def write():
    (folder / f"{name}.txt").write_text("HloModule jit_step")
    (folder / f"{name}-memory-usage-report.txt").write_text(
        "Memory Space: default (color=0)\\nTotal bytes: 4701 (4.59KiB)\\n")
Path(sys.argv[1]).write_text(f"{folder} {os.getpid()}")
"""


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Sets what stands for the compiler; says where it worked, and whether it still does."""

    def stand_in(code: str):
        file = tmp_path / "child.py"
        file.write_text(CHILD + code)
        line = [sys.executable, str(file), str(tmp_path / "told")]
        monkeypatch.setattr(worker, "command", lambda *arguments: line)

    def told() -> tuple[Path, int]:
        folder, pid = (tmp_path / "told").read_text().split()
        return Path(folder), int(pid)

    return SimpleNamespace(stand_in=stand_in, told=told)


def gone(child) -> bool:
    folder, pid = child.told()
    return not folder.exists() and not Path(f"/proc/{pid}").exists()


def test_a_schedule_ends_the_compiler(config, child):
    child.stand_in("write()\ntime.sleep(600)")
    begin = time.monotonic()
    assert scheduled.compile_step(config, "v5p:2x2x2") == ("HloModule jit_step", 4701)
    assert time.monotonic() - begin < 60
    assert gone(child)


def test_a_compiler_that_is_done_already(config, child):
    child.stand_in("write()")
    assert scheduled.compile_step(config, "v5p:2x2x2").hbm_bytes == 4701
    assert gone(child)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('one\\ntwo'); sys.exit(3)", r"ended with status 3: one \| two"),
        ("os.kill(os.getpid(), 9)", "ended with signal 9: it said nothing"),
    ],
)
def test_a_compiler_that_dies(config, child, code, said):
    child.stand_in(code)
    topology = Topology.parse("v5p:2x2x2")
    with pytest.raises(ConfigError, match=f"--topology=v5p:2x2x2: the compiler {said}"):
        compile_lib.examine(config, jax.devices(), topology, profiled="fast")
    assert gone(child)


def test_a_compiler_that_finds_no_room(config, child):
    child.stand_in("print('x: RESOURCE_EXHAUSTED: Used 17.2M of 16M hbm.\\n y'); sys.exit(1)")
    topology = Topology.parse("v5p:2x2x2")
    found = compile_lib.examine(config, jax.devices(), topology, profiled="fast")
    assert (found["fits"], found["hbm_bytes"]) == (False, int(17.2 * 2**20))


def test_a_compiler_that_never_ends(config, child):
    child.stand_in("time.sleep(600)")
    with pytest.raises(ConfigError, match="no schedule after 2 s"):
        scheduled.compile_step(config, "v5p:2x2x2", timeout=2.0)
    assert gone(child)


def test_what_the_child_is_told(config, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--mine")
    told = scheduled._environment(Path("/x"))
    assert told["XLA_FLAGS"].startswith("--mine --xla_dump_to=/x ")
    assert os.getcwd() in told["PYTHONPATH"].split(os.pathsep)
