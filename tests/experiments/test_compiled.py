"""Runs compiled for devices instead of trained: once each, and in the report."""

import dataclasses

import pytest

from moepp_jax import mesh
from moepp_jax.chips import GIB
from moepp_jax.compile import parts
from moepp_jax.config import Config
from moepp_jax.errors import ConfigError
from moepp_jax.experiments import compiled, measure, report, run, runs, study
from moepp_jax.experiments.measure import Measured
from moepp_jax.experiments.scale import PAPER
from moepp_jax.experiments.studies import gpus, pods, step_changes, step_time
from tests.experiments import small

TPU = {"fits": True, "hbm_bytes": 24 * GIB, "hbm_limit_bytes": 95 * GIB, "wire_ratio": 1.1}
TPU |= {"bounds": {"arithmetic": 3.0, "hbm": 4.5, "interconnect": 1.0}, "step_seconds": 4.5}
TPU |= {"tokens_per_second": 1e6, "mfu": 0.5}


@pytest.fixture
def planned():
    return run.plan([small.Twins()], small.scale(**{"mesh.data": 8}))


def compile_all(planned, tmp_path, topology="cpu:8"):
    file = compiled.file_of("small", tmp_path)
    compiled.compile_missing(planned, topology, file, tmp_path / "lock", "CPU")
    return measure.read(file)


def test_a_variant_is_compiled_once(planned, tmp_path, monkeypatch):
    rows = compile_all(planned, tmp_path)
    on = "cpu:8, mesh 8x1x1, remat none, accumulate 1"
    assert {row.name for row in rows} == {on} and {row.seed for row in rows} == {0}
    assert {row.fingerprint for row in rows} == {one.key[0] for one in planned}
    assert len(rows) == 3 and all(row.values["fits"] == 1.0 for row in rows)
    assert all(0 < row.values["hbm_gib"] < 1 for row in rows)
    monkeypatch.setattr(compiled, "examined", lambda *_: pytest.fail("it is compiled already"))
    assert compile_all(planned, tmp_path) == rows


def test_what_a_pod_would_need_is_in_the_report(tmp_path, monkeypatch):
    """4.5 s a step at least, 4 steps; and one that does not fit, of which nothing else is known."""
    scale = small.scale(**{"mesh.data": -1, "train.batch_size": 64})
    planned = run.plan([small.Twins()], scale)
    steps = planned[0].config.train.steps
    found = iter([TPU, TPU, TPU | {"fits": False, "hbm_bytes": 99 * GIB, "bounds": None}])

    def examine(*_, **__):
        one = next(found)
        return {name: value for name, value in one.items() if value is not None}

    monkeypatch.setattr(compiled.compile, "examine", examine)
    monkeypatch.setattr(compiled, "devices", lambda topology: [])
    rows = compile_all(planned, tmp_path, "v5p:4x4x4")
    of = small.Twins()
    page = report.page(of, study.results_of(of, scale, []), rows)
    hours = f"{4.5 * steps / 3600:.1f}"
    on = "v5p:4x4x4, mesh 64x1x1, remat none, accumulate 1"
    assert f"| vanilla | {on} | 24.0 of 95 | yes | 1e+06 | {hours} |" in page
    assert f"| tau .25 | {on} | 99.0 of 95 | **no** |  |  |" in page
    assert "Compiled" not in report.page(of, study.results_of(of, scale, []), [])


def test_a_topology_that_does_not_go_with_a_run_is_named(planned, tmp_path):
    with pytest.raises(ConfigError, match="--topology=v5p:big is not known"):
        compile_all(planned, tmp_path, "v5p:big")
    with pytest.raises(ConfigError, match=r"^vanilla: .*mesh"):
        compile_all(planned, tmp_path, "cpu:6")
    assert not compiled.file_of("small", tmp_path).exists()


def test_meshes_lie_on_their_slices():
    usual = PAPER.variant("7B", of=PAPER.sizes["16+4, larger"]).config
    for name, size in pods.SIZES.items():
        topology = compiled.Topology.parse(name)
        assert size.chips == topology.num_devices
        config = pods.on(usual, size)
        assert config.train.batch_size >= size.chips
        remat = "w_in" if size.accumulate == 1 else "exchanged"
        assert config.model == dataclasses.replace(usual.model, remat=remat)
        same = dataclasses.replace(config, mesh=usual.mesh, train=usual.train, model=usual.model)
        assert same == usual
        assert runs.fingerprint(config) == runs.fingerprint(
            dataclasses.replace(usual, train=config.train)
        )


def predicted(config: Config, vanilla: float = 1.0) -> dict[str, float]:
    """Of a step: the experts as the theory has it, or off by a factor, and 50 ms of all else."""
    experts = 50 * config.moe.rule.ffn_load * vanilla
    row = {"fits": 1.0, "hbm_gib": 40.0, "kernels_not_estimated": 0.0, "remat_w_in": 1.0}
    row |= {step_time.column(part): 0.0 for part in parts.ALL}
    row |= {"experts_ms": experts, "attention_core_ms": 50.0}
    row |= {"exchange_not_hidden_ms_slow": 5.0, "collectives_ms_slow": 0.0}
    for name in ("exchange_ms", "tokens_per_second_per_chip", "mfu_realised", "mfu"):
        row |= {f"{name}_peak": 0.5, f"{name}_slow": 0.4}
    return row | {"predicted_ms_peak": experts + 50, "predicted_ms_slow": experts + 55}


@pytest.mark.parametrize(("vanilla", "outcome"), [(1.0, study.HOLDS), (1.05, study.FAILS)])
def test_predicted_steps_beside_the_theory(vanilla, outcome):
    of, rows = study.find("step_time"), []
    for one in of.measurements(PAPER):
        config = one.take.args[0]
        off = vanilla if config.moe.pool.n_zero_computation == 0 else 1.0
        rows.append(Measured(*one.key, "m", predicted(config, off)))
    found = study.results_of(of, PAPER, [], rows)
    experts, step = of.verdicts(found)
    assert experts.outcome == outcome
    # 150 ms against 125: 1.2 times as fast, where the experts are 1.33 times.
    assert vanilla != 1 or (step.outcome, step.said[:40]) == (
        study.HOLDS,
        "a step at 0.75 is 1.20 times as fast, 60",
    )
    page = "\n".join(of.more(found))
    assert vanilla != 1 or "| 1.20 to 1.19 | 1.20 | 1.33 |" in page
    assert page.count("\n| 7B, v5p:4x4x4, ") == 6 and "| 0.6B, vanilla |" in page
    assert page.count(" | 40.0 | w_in |") > 6
    assert len(of.figure(found).axes) == 2
    some = study.results_of(of, PAPER, [], rows[:3])
    assert [v.outcome for v in of.verdicts(some)] == [study.MISSING]
    assert of.more(study.results_of(of, PAPER, [], [])) == []


def test_changes_of_a_step_one_on_the_other():
    of = study.find("step_changes")
    wanted = of.measurements(PAPER)
    configs = [one.take.args[0] for one in wanted]
    usual = PAPER.variant("", of=PAPER.sizes["16+4, larger"]).config
    recipe = configs[len(step_changes.CHANGES) - 1]
    kept = usual.replace("model", remat="residual")  # that of its own recipe, of both twins less
    assert recipe == kept.replace("moe.rule", tau=0.75)
    assert len(set(configs)) == len(configs) == 12
    assert {c.batch_tokens for c in configs} == {usual.batch_tokens}

    def found(faster: float, lacking: float):
        rows = []
        for number, one in enumerate(wanted):
            row = predicted(recipe) | {"predicted_ms_peak": 500 - faster * number}
            rows.append(Measured(*one.key, "m", row | ({"fits": 0.0} if lacking == number else {})))
        return study.results_of(of, PAPER, [], rows)

    good = found(10.0, -1)
    assert [v.outcome for v in of.verdicts(good)] == [study.HOLDS, study.HOLDS]
    assert [v.outcome for v in of.verdicts(found(0.0, 8))] == [study.FAILS, study.FAILS]
    page = "\n".join(of.more(good))
    assert "| fused attention | 490 to " in page and page.count("model.remat residual | ") == 2
    assert len(of.figure(good).axes[0].get_yticklabels()) == len(step_changes.CHANGES)
    some = study.results_of(of, PAPER, [], good.measured[:3])
    assert [v.outcome for v in of.verdicts(some)] == [study.MISSING]
    assert of.more(study.results_of(of, PAPER, [], [])) == []


def test_meshes_lie_on_their_hosts():
    """FFN experts within a host, and what the launchers start among the sizes."""
    for size in gpus.SIZES:
        topology = compiled.Topology.parse(size.topology)
        config = gpus.on(PAPER, size)
        assert size.data * size.fsdp * size.expert == topology.num_devices
        assert mesh.mesh_shape(config, topology.num_devices) == (size.data, size.fsdp, size.expert)
        assert size.expert <= topology.dims[0]
        assert config.train.batch_size == 2048


def _row(size, **values):
    usual = {"fits": 1.0, "hbm_gib": 50.0, "limit_gib": 79.1, "preallocated_gib": 59.3}
    usual |= {f"{name}_ms": 1.0 for name in ("arithmetic", "hbm", "interconnect")}
    usual |= {"bf16_tflop": 3.0, "tf32_tflop": 0.0, "f32_tflop": 0.1, "unread": 0.0}
    usual |= {"wire_ratio": 1.0, "tokens_per_second": 1e6, "mfu": 0.3, "hours": 1.0}
    usual |= {"exchanges": 384.0, "exchanges_alone": 119.0}
    usual |= {"least ms: experts": 2.5, "GB: all-to-all": 1.25, "times: all-to-all": 96.0}
    return measure.Measured(size.name, measure.NO_RUN, 0, "machine", usual | values)


def test_what_is_said_of_gpus():
    of = gpus.Gpus()
    rows = [_row(size) for size in gpus.SIZES]
    said = of.verdicts(study.results_of(of, PAPER, [], rows))
    assert {v.outcome for v in said} == {study.HOLDS} and len(said) == 6
    # More than JAX takes is refuted though the card has it; what does not fit has no bounds.
    rows[0] = _row(gpus.SIZES[0], hbm_gib=70.0)
    rows[-1] = _row(gpus.SIZES[-1], hbm_gib=200.0, fits=0.0)
    found = study.results_of(of, PAPER, [], rows)
    assert study.outcome(of.verdicts(found)) == study.FAILS
    page = "\n".join(of.more(found))
    assert "| 0.6B | h100:8 | 1 x 1 x 8 | 8 | 70.0 | 79.1 | 59.3 | 3.00 | 0.00 | 0.10 | 0 |" in page
    assert page.count("does not fit") == 6
    assert f"\n| experts |{' 2.5 |' * len(gpus.SIZES)}\n" in page
    assert f"\n| all-to-all |{' 1.25 (96) |' * len(gpus.SIZES)}\n" in page
    assert of.figure(found).axes
    missing = study.results_of(of, PAPER, [], rows[1:])
    assert study.outcome(of.verdicts(missing)) == study.MISSING and of.more(missing)
