"""`compile`: what it says of a small step on CPUs, what it advises, and its errors."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

from moepp_jax import compiler, flops, remat, state
from moepp_jax import mesh as mesh_lib
from moepp_jax import model as model_lib
from moepp_jax.chips import CHIPS, GB, GIB, of_kind
from moepp_jax.compile import (
    choice,
    evaluation,
    findings,
    generation,
    hlo,
    remedies,
    tables,
    traffic,
)
from moepp_jax.compile import step as compile_lib
from moepp_jax.compile.roofline import Interconnect
from moepp_jax.compile.topology import Topology, devices
from moepp_jax.errors import ConfigError
from moepp_jax.generation import layers as generation_layers
from tests import tiny

SIZES = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.expert": 2}


@pytest.fixture(scope="module")
def config():
    return tiny.config(**SIZES)


@pytest.fixture(scope="module")
def report(config, tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("compile") / "report.json"
    assert compile_lib.run(config, "cpu:8", str(file))
    return json.loads(file.read_text())


def test_state_bytes_are_those_of_the_arrays(config, report):
    held = state.init_state(state.assemble(config, mesh_lib.make_mesh(config)))
    mine = [a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(held)]
    assert report["state_bytes"] == sum(mine)
    parameters = [a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(held.params)]
    assert report["parameter_bytes"] == sum(parameters)
    assert report["optimizer_bytes"] == pytest.approx(2 * sum(parameters), rel=1e-3)
    assert report["hbm_bytes"] > report["state_bytes"]
    assert report["hbm_limit_bytes"] is None


def test_products_are_those_of_the_model(config, report):
    """By hand: three times forward, of slots filled or not."""
    tokens = config.train.batch_size * config.data.seq_len / 8
    slots = flops.executed_ffn_experts(config)
    by_hand = flops.per_token(config, ffn_experts=slots)
    # Zero-computation experts are no products.
    products = 3 * (by_hand.forward - by_hand.zero_computation)
    assert report["flops"] == pytest.approx(tokens * products, rel=0.05)


def test_exchanges_are_the_least_there_are(config, report):
    """Of each of 2 layers to the experts and back, forward and backward: 8, in float32."""
    [row] = [row for row in report["collectives"] if row["kind"] == "all-to-all"]
    assert (row["axes"], row["types"], row["count"]) == (["expert"], ["f32"], 8)
    assert row["bytes"] == report["least_wire_bytes"]["all-to-all"]


def refused(*arguments):
    raise jax.errors.JaxRuntimeError("INTERNAL: not supported here\nand more")


def test_the_evaluation_is_compiled_too(config, report, monkeypatch):
    found = report["evaluation"]
    assert found["fits"] and found["hbm_bytes"] > report["state_bytes"] - 8
    assert found["temporary_bytes"] < report["temporary_bytes"]
    # A limit between the two: the step would fit, the first evaluation would end the run.
    told = report | {"evaluation": {"fits": False, "hbm_bytes": 7}, "hbm_limit_bytes": 6}
    assert "Its evaluation does not fit: 0.00 GiB" in tables.of_evaluation(told)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refused)
    found = evaluation.examine(config, mesh_lib.make_mesh(config), None)
    assert found == {"fits": False, "error": "INTERNAL: not supported here"}
    said = tables.of_evaluation(report | {"evaluation": found})
    assert "cannot be compiled: INTERNAL: not supported here" in said


def test_generation_on_one_device_and_on_all_of_a_host(config, capsys, tmp_path):
    """Two sequences a group, of which a device may have one alone: nothing is dropped there."""
    config = config.replace("moe", group_size=2 * config.data.seq_len)
    config = config.replace("train", batch_size=16)
    file = tmp_path / "report.json"
    assert compile_lib.run(config, "cpu:8", str(file), generates=True)
    m, alone, cut = config.model, *json.loads(file.read_text())["generation"]
    assert (alone["devices"], cut["devices"]) == (1, 8)
    cache = 2 * m.num_layers * 16 * m.num_kv_heads * config.data.seq_len * m.head_width * 4
    assert (alone["texts"], alone["cache_bytes"], 8 * cut["cache_bytes"]) == (16, cache, cache)
    assert alone["parameter_bytes"] == 4 * flops.parameters(config).total
    for way in (alone, cut):
        held = way["parameter_bytes"] + way["cache_bytes"]
        assert way["decode"]["hbm_bytes"] > held and way["prefill"]["hbm_bytes"] > held
    assert "8 of a host, --all_devices" in capsys.readouterr().out


@pytest.mark.parametrize("experts", (False, True))
def test_generation_is_compiled_for_the_parameters_that_it_runs_with(config, experts):
    model = model_lib.build(config, dispatch="dropless")
    params = model.init(jax.random.key(0))
    apart = generation_layers.taken_apart(params, model, experts)
    said = jax.tree.map(lambda p: p.shape, generation_layers.described(model, experts))
    assert said == jax.tree.map(lambda a: a.shape, apart)


def test_generation_that_fits_nowhere_or_cannot_be_compiled(config, monkeypatch):
    small = generation.examine(config, jax.devices(), 1000)
    assert not any(way["fits"] for way in small)
    assert "Generation does not fit" in tables.of_generation({"generation": small})

    monkeypatch.setattr(jax.stages.Lowered, "compile", refused)
    report = {"generation": generation.examine(config, jax.devices()[:1], None)}
    said = tables.of_generation(report)
    assert said == "Generation cannot be compiled: INTERNAL: not supported here"


def test_collectives_add_up(report):
    assert report["wire_bytes"] == sum(row["bytes"] for row in report["collectives"])
    assert report["wire_ratio"] * sum(report["least_wire_bytes"].values()) == pytest.approx(
        report["wire_bytes"]
    )
    assert report["loops_counted_once"] == []


def test_least_traffic_by_hand():
    c = tiny.config(**{"train.accumulate": 2, "train.batch_size": 16})
    sizes = {"data": 2, "fsdp": 2, "expert": 2}
    ffn = 2 * 8 * 3 * 32 * 24  # layers, experts, matrices
    rest = flops.parameters(c).total - ffn
    gathered = 4 * (ffn / 2 / 2 + rest * 3 / 4)
    slots = flops.executed_ffn_experts(c) * 16 * 32 / 8  # of a device
    assert traffic.least(c, sizes) == {
        "all-gather": 2 * 2 * gathered,
        "reduce-scatter": 2 * gathered,
        "all-reduce": 2 * 4 * (ffn + rest) / 4 / 2,
        "all-to-all": pytest.approx(4 * 2 * slots * 32 * 4 / 2),
    }
    alone = traffic.least(c, {"data": 1, "fsdp": 1, "expert": 1})
    assert set(alone.values()) == {0}


def test_the_tables(report):
    console = Console(file=io.StringIO(), width=120)
    tables.show(report, console)
    out = console.file.getvalue()
    assert "mesh data=2 x fsdp=2 x expert=2" in " ".join(out.split())
    assert "all-to-all" in out and "…" not in out
    assert "a CPU device has no limit" in out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v9:4x4x4", "not known: write v5p:4x4x4"),
        ("v5p", "not known"),
        ("v5e:4x4x4", "at most 2 dimensions"),
        ("v5p:4x0", "at least 1"),
        ("cpu:0", "at least 1"),
        ("cpu:1000", "this process has 8 CPU devices"),
    ],
)
def test_topologies_that_are_none(config, text, said):
    with pytest.raises(ConfigError, match=said):
        compile_lib.run(config, text)


def test_topology_parts():
    t = Topology.parse("2*v5p:4x4x4")
    assert (t.slices, t.dims, t.num_devices, t.platform) == (2, (4, 4, 4), 128, "tpu")
    assert t.chip is CHIPS["v5p"]
    assert Topology.parse("cpu:3").num_devices == 3


def test_a_batch_that_does_not_divide(config):
    with pytest.raises(ConfigError, match=r"train\.batch_size = 8.*multiple of the 6 devices"):
        compile_lib.run(config.replace("mesh", data=3, fsdp=2, expert=1), "cpu:6")


def test_a_folder_that_is_missing(config, tmp_path):
    with pytest.raises(ConfigError, match=r"--json=.*no such folder"):
        compile_lib.run(config, "cpu:8", str(tmp_path / "none" / "x.json"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("JAX TPU support not installed; cannot", r"pip install 'jax\[tpu\]'"),
        (
            "ABORTED: Internal error when accessing libtpu multi-process lockfile.",
            "another process",
        ),
        ("INVALID_ARGUMENT: no such\nslice", "v5p:1x1x3: INVALID_ARGUMENT: no such slice"),
    ],
)
def test_what_libtpu_says(monkeypatch, error, said):
    def fail(**_):
        raise RuntimeError(error)

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", fail)
    for name in ("SKIP_MDS_QUERY", "ACCELERATOR_TYPE", "WORKER_HOSTNAMES", "WORKER_ID"):
        monkeypatch.setenv(f"TPU_{name}", "")  # so that they are put back
    with pytest.raises(ConfigError, match=said):
        devices(Topology.parse("v5p:1x1x3"))


def test_temporaries_take_each_others_places():
    """As the TPU compiler tells it of a step: all temporaries, and the most there is at a time."""
    told = SimpleNamespace(
        argument_size_in_bytes=300,
        output_size_in_bytes=280,
        alias_size_in_bytes=270,
        temp_size_in_bytes=9000,
        generated_code_size_in_bytes=20,
        peak_memory_in_bytes=4310,
    )
    got = findings.memory(told, "tpu")
    assert got == {
        "argument_bytes": 300,
        "temporary_bytes": 4000,
        "code_bytes": 20,
        "hbm_bytes": 4330,
    }
    got = findings.memory(told, "cpu")
    assert (got["temporary_bytes"], got["hbm_bytes"]) == (9000, 9330)


def limited(topology: Topology, limit: int) -> Topology:
    return dataclasses.replace(topology, chip=dataclasses.replace(CHIPS["v5p"], hbm_bytes=limit))


def test_what_does_not_fit_comes_with_what_does(config, report, monkeypatch, tmp_path, capsys):
    """A chip a little too small: half of the batch at a time is found to fit, by compiling it."""
    c = config.replace("train", batch_size=64)
    topology = Topology.parse("cpu:8")
    compile_step, compiled = compile_lib.compile_step, {}

    def once(c, mesh):  # the size of the chip is known only when the step is compiled
        if c.train not in compiled:
            compiled[c.train] = compile_step(c, mesh)
        return compiled[c.train]

    monkeypatch.setattr(compile_lib, "compile_step", once)
    needed = compile_lib.examine(c, jax.devices(), topology)["hbm_bytes"]
    small = limited(topology, needed - 1)
    monkeypatch.setattr(Topology, "parse", lambda text: small)
    monkeypatch.setattr(compile_lib, "devices", lambda topology: jax.devices())
    monkeypatch.setattr(remedies, "estimate", lambda config, sizes: 0.0)
    file = tmp_path / "report.json"
    assert not compile_lib.run(c, "cpu:8", str(file))
    told = json.loads(file.read_text())
    assert told["remedy"]["flags"] == ["--config.train.accumulate=2"]
    assert told["remedy"]["hbm_bytes"] < told["hbm_limit_bytes"] < told["hbm_bytes"]
    out = " ".join(capsys.readouterr().out.split())
    assert "It does not fit" in out and "This fits: --config.train.accumulate=2" in out
    bounds = told["bounds"]
    assert bounds["arithmetic"] == told["flops"] / 459e12
    assert told["step_seconds"] == max(bounds.values())
    assert told["mfu"] == pytest.approx(told["model_flops"] / told["step_seconds"] / 459e12)


def test_the_compiler_running_out_of_memory(config, monkeypatch):
    def fail(config, mesh):
        raise compile_lib.OutOfMemoryError(
            "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (150.5G) exceeds"
        )

    monkeypatch.setattr(compile_lib, "compile_step", fail)
    got = compile_lib.examine(config, jax.devices(), Topology.parse("cpu:8"))
    assert not got["fits"] and got["hbm_bytes"] == 150.5 * 2**30
    assert compile_lib.OutOfMemoryError("Used 17.2M of 16M hbm").needed == int(17.2 * 2**20)
    assert compile_lib.OutOfMemoryError("no more").needed is None


def test_remedies_go_from_cheap_to_dear():
    c = tiny.config(**{"train.batch_size": 32, "mesh.expert": 2})
    tried = []

    def needed(changed):
        tried.append(tuple(remedies.flags(c, changed)))
        return 10**12 if len(tried) < 3 else 5

    estimates = iter([10.0**15, 900.0, 800.0, 400.0, 100.0, 1.0])
    original = remedies.estimate
    try:
        remedies.estimate = lambda config, sizes: next(estimates)
        found = remedies.find(c, 8, 10**6, needed)
    finally:
        remedies.estimate = original
    # Without more parts; then 2 parts (estimated too large), 4; with "dots": 1, 2 and so on.
    assert tried[0] == ("--config.train.accumulate=4",)
    assert len(tried) == 3
    assert found == {"flags": list(tried[-1]), "hbm_bytes": 5}


@pytest.mark.parametrize(
    ("found", "chosen", "asked"),
    [
        # Of room enough at once; squeezed, and slower than what keeps less; squeezed, but faster.
        ({"qkv": (60, 1100.0)}, "qkv", 1),
        ({"qkv": (94, 2300.0), "residual": (92, 1950.0), "w_in": (80, 1900.0)}, "w_in", 3),
        ({"qkv": (120, None), "residual": (93, 1800.0), "w_in": (80, 1900.0)}, "residual", 3),
        ({"qkv": (120, None), "residual": (119, None), "w_in": (118, None)}, "w_in", 3),
        # What the compiler could make, though it is too large for the chip.
        ({"qkv": (96, 900.0), "residual": (85, 1800.0)}, "residual", 2),
    ],
)
def test_the_fastest_of_those_that_leave_room_and_those_before(found, chosen, asked):
    c, seen = tiny.config(), []

    def examined(changed):
        assert changed.replace("model", remat=c.model.remat) == c
        seen.append(changed.model.remat)
        gib, ms = found[changed.model.remat]
        report = {"hbm_bytes": gib * GIB, "hbm_limit_bytes": 95 * GIB, "fits": gib <= 95}
        return report | ({} if ms is None else {"predicted_ms": [ms, ms]})

    of, report = choice.fastest(c, examined, ("qkv", "residual", "w_in"))
    assert of == c.replace("model", remat=chosen) and len(seen) == asked
    assert report["hbm_bytes"] == found[chosen][0] * GIB


def test_the_fastest_remat_that_fits_is_named():
    c = tiny.config(**{"model.remat": "dots"})
    own = {"hbm_bytes": 48 * GIB, "fits": True, "predicted_ms": [2100.0, 2300.0], "kernels": []}
    own |= {"mfu_nominal": [0.47, 0.43]}
    found = {
        "none": {"hbm_bytes": 150 * GIB, "fits": False, "error": "RESOURCE_EXHAUSTED"},
        "w_in": {"hbm_bytes": 74 * GIB, "fits": True, "predicted_ms": [2000.0, 2300.0]},
        "attention": {"hbm_bytes": 96 * GIB, "fits": False, "predicted_ms": [1900.0, 1950.0]},
    }
    asked = []

    def examined(changed):
        assert changed.replace("model", remat="dots") == c
        asked.append(changed.model.remat)
        return found.get(changed.model.remat, own)

    rows = choice.of_remat(c, own, examined)
    assert [row["remat"] for row in rows] == list(remedies.REMAT) and "dots" not in asked
    assert set(remedies.REMAT) == set(remat.POLICIES)
    assert rows[4] == {"remat": "dots"} | {k: v for k, v in own.items() if k != "kernels"}
    assert rows[0] == {"remat": "none", "hbm_bytes": 150 * GIB, "fits": False}
    assert choice.best(rows)["remat"] == "w_in"
    said = "The fastest that fits, by this prediction: --config.model.remat=w_in"
    assert tables.of_remat({"remat_choices": rows}) == said and tables.of_remat({}) == ""
    assert tables.of_remat({"remat_choices": rows[:1]}) == "With no model.remat does it fit."
    console = Console(width=120, record=True)
    console.print(tables._remat({"remat_choices": rows}))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["none", "150.0", "does", "not", "fit"] in lines
    assert ["dots", "48.0", "2.100", "2.300", "47.0%"] in lines


def test_remat_is_chosen_of_what_is_predicted(config):
    with pytest.raises(ConfigError, match="--choose_remat compares what --profile predicts"):
        compile_lib.run(config, "v5p:2x2x2", chooses_remat=True)


def test_nothing_helps():
    c = tiny.config(**{"train.batch_size": 8})
    assert remedies.find(c, 8, 1, lambda changed: 2) is None
    told = {"hbm_bytes": 2, "hbm_limit_bytes": 1, "fits": False, "remedy": None}
    assert "use more chips" in tables.verdict(told)


def test_estimates_fall_where_they_should():
    c = tiny.config(**{"train.batch_size": 64})
    guess = remedies.estimate(c, (8, 1, 1))
    assert remedies.estimate(c.replace("train", accumulate=4), (8, 1, 1)) < guess
    assert remedies.estimate(c.replace("model", remat="full"), (8, 1, 1)) < guess
    assert remedies.estimate(c, (1, 8, 1)) < guess


def devices_of(shape, slices: int = 1):
    """Chips of a torus in the order of the flattened mesh, the last dimension fastest."""
    places = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), axis=1)
    return [
        SimpleNamespace(coords=tuple(map(int, place)), slice_index=s)
        for s in range(slices)
        for place in places
    ]


def collective(kind: str, groups, operand_bytes: int, times: int = 1) -> hlo.Collective:
    return hlo.Collective(
        kind, "c", "main", operand_bytes, ("bf16",), np.array(groups), times, False, ""
    )


def test_interconnect_by_hand():
    chip = CHIPS["v5p"]  # 100 GB/s a link
    network = Interconnect(devices_of((4, 4, 4)), chip)
    ring = [[0, 1, 2, 3]]
    # A gather sends three parts of 1 GB, over the two directions of a ring of four.
    gather = collective("all-gather", ring, GB)
    assert network.bound([gather]) == pytest.approx(3 / 200)
    # Each half sends a quarter of its 4 GB across two links ... both ways: 0.5 GB a link.
    exchange = collective("all-to-all", ring, GB)
    assert network.bound([exchange]) == pytest.approx(0.5 / 100)
    # A plane has twice the links.
    plane = collective("all-gather", [list(range(16))], GB // 15)
    assert network.bound([plane]) == pytest.approx(1 / 400, rel=1e-6)
    # Other dimensions work at the same time, the same one does not.
    across = collective("all-gather", [[0, 4, 8, 12]], GB)
    assert network.bound([gather, across]) == pytest.approx(3 / 200)
    assert network.bound([gather, collective("all-gather", ring, GB, times=2)]) == pytest.approx(
        9 / 200
    )
    assert network.bound([]) == 0


def test_a_line_has_half_the_links_of_a_ring():
    network = Interconnect(devices_of((4, 4)), CHIPS["v5e"])  # it closes at 16
    assert network.bound([collective("all-gather", [[0, 1, 2, 3]], GB)]) == pytest.approx(3 / 50)


def test_between_slices_the_slow_network_counts():
    network = Interconnect(devices_of((2, 2, 1), slices=2), CHIPS["v5p"])
    counterparts = collective("all-reduce", [[0, 4]], GB)  # sends 1 GB, all over the network
    assert network.bound([counterparts]) == pytest.approx(1 / 6.25)
    # Of what eight devices on two slices send, half crosses.
    everyone = collective("all-reduce", [list(range(8))], GB)
    assert network.bound([everyone]) == pytest.approx(2 * 7 / 8 / 2 / 6.25)


def test_peak_figures():
    assert flops.PEAK["TPU v5"] == flops.PEAK["TPU v5p"] == 459e12
    assert of_kind("TPU v5 lite") is CHIPS["v5e"] and of_kind("abacus") is None
    for chip in CHIPS.values():
        assert chip.source
        assert chip.torus == 0 or chip.links == 2 * chip.torus
        # Arithmetic is quicker than memory, memory than links, links than the slow network.
        assert chip.flops > 100 * chip.hbm_bandwidth > chip.links * chip.link_bandwidth
        assert chip.links * chip.link_bandwidth > (chip.dcn_bandwidth or 0)


def test_compiler_options():
    assert compiler.options("cpu") == {}
    assert compiler.options("tpu")["xla_tpu_enable_async_all_to_all"] is True
    assert not any("async" in name for name in compiler.options("tpu", limited_routing=True))
    assert compiler.options("cuda") == compiler.options("gpu") != {}
    plain = compiler.options("tpu", plain_attention=True)
    assert plain == compiler.options("tpu") | {"xla_tpu_scoped_vmem_limit_kib": "65536"}
    for platform in ("cpu", "gpu"):
        assert compiler.options(platform, plain_attention=True) == compiler.options(platform)
    # Names of options are checked by the compiler; those of GPUs are known to all of them.
    assert jax.jit(lambda x: x + 1, compiler_options=compiler.options("gpu"))(1) == 2


def test_the_command():
    """In a process of its own, which makes itself the devices."""
    flags = [f"--config.{k}={v}" for k, v in (tiny.CHANGES | SIZES | {"mesh.data": -1}).items()]
    command = [sys.executable, "-m", "moepp_jax.main", "compile", "--config=configs/tiny.py"]
    command += [*flags, "--topology=cpu:4"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "data=1 x fsdp=2 x expert=2" in done.stdout
