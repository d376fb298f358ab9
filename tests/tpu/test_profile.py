"""What `compile --profile` predicts of programs that the TPU compiler schedules."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moepp_jax import flops
from moepp_jax.chips import CHIPS
from moepp_jax.config import Config
from moepp_jax.configs import moe_7b, moepp_7b
from tests.tpu.test_pods import ENVIRONMENT, ROOT, compile_for

pytestmark = pytest.mark.tpu_compile

TWO_LAYERS = {"model__num_layers": 2, "model__remat": "exchanged", "moe__exchange_parts": 1}
SMALL = TWO_LAYERS | {"train__batch_size": 32, "train__accumulate": 1}
SMALL |= {"mesh__data": 1, "mesh__fsdp": 2, "mesh__expert": 2}


def text_of(function: str, *shapes: str) -> str:
    """The scheduled program of a function of bfloat16 arrays, compiled for a chip."""
    program = f"""
import jax, jax.numpy as jnp
from moepp_jax.compile.topology import Topology, devices
chip = devices(Topology.parse("v5p:2x2x1"))[0]
lies = jax.sharding.SingleDeviceSharding(chip)
arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=lies) for s in [{", ".join(shapes)}]]
print(jax.jit({function}).lower(*arrays).compile().as_text())
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("n", [4096, 8192])
def test_a_bare_product_is_predicted_near_the_peak(n):
    from moepp_jax.compile import hlo
    from moepp_jax.compile.roofline import Interconnect
    from moepp_jax.compile.timeline import Timeline

    module = hlo.parse(text_of("lambda a, b: a @ b", f"({n}, {n})", f"({n}, {n})"))
    timeline = Timeline(module, CHIPS["v5p"], Interconnect([None], CHIPS["v5p"]))
    seconds = sum(times * spent.needs.seconds for spent, times in timeline.spent())
    assert 0.9 <= 2 * n**3 / seconds / CHIPS["v5p"].flops <= 1


@pytest.mark.parametrize("tau", [0.1, 0.75])
def test_experts_follow_the_theory(tau, tmp_path):
    report = compile_for(
        "v5p:4x4x4",
        "moepp_7b",
        tmp_path,
        "--profile",
        moe__rule__tau=tau,
        **TWO_LAYERS,
    )
    fields = moepp_7b.get_config()
    fields.moe.rule.tau = tau
    theory = 1 / flops.cost_ratio(Config.parse(fields), Config.parse(moe_7b.get_config()))
    ours, vanilla = (r["parts_ms"]["experts"][0] for r in (report, report["vanilla"]))
    assert vanilla / ours == pytest.approx(theory, rel=0.03)
    assert sum(ms[0] for ms in report["parts_ms"].values()) == pytest.approx(
        report["predicted_ms"][0]
    )
    assert report["not_estimated"] == {}
    assert (tmp_path / "report.png").exists()
    assert "Predicted time of a step" in report["printed"]


def test_dropless_experts_take_time_as_they_have_rows(tmp_path):
    """In a buffer that holds all choices, of which FFN experts get two sevenths at this tau.

    What is read whatever the load, parameters and their gradients, is a tenth of it.
    """
    dropless = {"moe__dispatch": "dropless", "moe__exchange_buffer": 1.0, "moe__rule__tau": 0.1}
    report = compile_for("v5p:4x4x4", "moepp_7b", tmp_path, "--profile", **TWO_LAYERS | dropless)
    ours, vanilla = (r["parts_ms"]["experts"][0] for r in (report, report["vanilla"]))
    assert vanilla / ours >= 0.9 * 3.5
    assert report["not_estimated"] == {} and report["loops_counted_once"] == []


def test_sparse_cores_exchange_dropless_rows_behind_the_experts(tmp_path, monkeypatch):
    flag = "--xla_tpu_enable_sparse_core_collective_offload_ragged_all_to_all=true"
    monkeypatch.setitem(ENVIRONMENT, "LIBTPU_INIT_ARGS", flag)
    fields = {"moe__dispatch": "dropless", "moe__exchange_buffer": 1.0, "moe__exchange_parts": 2}
    fields |= {"model__remat": "attention"}
    report = compile_for("v5p:4x4x4", "moepp_7b", tmp_path, "--profile", **fields)
    assert report["parts_ms"]["exchange not hidden"][0] <= 0.2 * report["exchange_ms"][0]
    assert report["not_estimated"] == {}


@pytest.mark.parametrize(
    ("tau", "remat", "mfu", "faster"), [(0.75, "residual", 0.58, 1.13), (0.1, "qkv", 0.54, 1.65)]
)
def test_the_7b_is_as_fast_as_it_was_made(tau, remat, mfu, faster, tmp_path):
    """On 64 v5p, with links at their peak: its arithmetic, the exchange behind products, and how
    much faster it is than its vanilla twin, which keeps for backward what it has memory for.
    """
    fields = {"moe__rule__tau": tau, "model__remat": remat}
    report = compile_for("v5p:4x4x4", "moepp_7b", tmp_path, "--profile", **fields)
    assert report["fits"] and report["mfu_nominal"][0] >= mfu
    assert report["parts_ms"]["exchange not hidden"][0] <= 0.2 * report["exchange_ms"][0]
    vanilla = report["vanilla"]
    assert vanilla["remat"] == "w_in"
    assert vanilla["predicted_ms"][0] / report["predicted_ms"][0] >= faster


@pytest.mark.parametrize("length", [8192, 32_768])
def test_long_sequences_fit(length, tmp_path):
    """As many tokens a step as the recipe has."""
    recipe = Config.parse(moepp_7b.get_config())
    fields = {"data__seq_len": length, "train__batch_size": recipe.batch_tokens // length}
    report = compile_for("v5p:4x4x4", "moepp_7b", tmp_path, "--profile", **fields)
    assert report["fits"] and report["hbm_bytes"] < report["hbm_limit_bytes"]


def test_the_shape_of_mixtral_is_where_others_measured_theirs(tmp_path):
    """MaxText's README has 54.9 % MFU for its Mixtral 8x7B on v5p-128, 64 chips.

    Its public configuration of the model with drops has a capacity factor of 1.25 and computes all
    again in backward; sharding and kernels are its own: the same within 15 %, no more.
    """
    model = {"num_layers": 32, "hidden_size": 4096, "num_heads": 32, "num_kv_heads": 8}
    model |= {"dense_ffn_size": 14336, "vocab_size": 32000, "remat": "full"}
    moe = {"n_ffn": 8, "ffn_size": 14336, "gamma": 1.25, "group_size": 4096}
    fields = {f"model__{name}": value for name, value in model.items()}
    fields |= {f"moe__{name}": value for name, value in moe.items()}
    fields |= {"mesh__data": 1, "mesh__fsdp": 8, "mesh__expert": 8}
    fields |= {"data__seq_len": 4096, "train__batch_size": 768}
    report = compile_for("v5p:4x4x4", "moe_7b", tmp_path, "--profile", **fields)
    for mfu in report["mfu_nominal"]:
        assert mfu == pytest.approx(0.549, rel=0.15)


def test_a_schedule_needs_what_the_whole_program_needs(tmp_path):
    """To the end: the same time, and the compiler's own numbers beside.

    The plan of the memory has gaps between arrays, which the peak of the whole program has not.
    """
    fast = compile_for("v5p:2x2x1", "moepp_0p6b", tmp_path, "--profile", **SMALL)
    full = compile_for("v5p:2x2x1", "moepp_0p6b", tmp_path, "--profile=full", **SMALL)
    assert 0.95 <= (full["hbm_bytes"] - full["code_bytes"]) / fast["hbm_bytes"] <= 1
    assert full["predicted_ms"] == pytest.approx(fast["predicted_ms"])
    assert 0 < full["by_the_compiler"]["products_ms"] < full["predicted_ms"][0]
    assert "by the compiler" in full["printed"]


def test_what_does_not_fit_is_still_predicted(tmp_path):
    """64 sequences at once on each of four chips of 16 GiB."""
    fields = SMALL | {"train__batch_size": 256, "model__remat": "none"}
    report = compile_for("v5e:2x2", "moepp_0p6b", tmp_path, "--profile", status=2, **fields)
    assert not report["fits"] and report["hbm_bytes"] > 16 * 2**30


def test_without_the_compiler(tmp_path):
    """One line, and nothing is left behind."""
    told = ("XLA_FLAGS", "PYTHONPATH", "TPU_LIBRARY_PATH")
    elsewhere = {k: v for k, v in os.environ.items() if k not in told}
    command = [sys.executable, "-m", "moepp_jax.main", "compile", "--config=configs/moepp_7b.py"]
    command += ["--topology=v5p:2x2x1", "--profile", f"--json={tmp_path / 'x.json'}"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=elsewhere | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "the TPU compiler is not installed" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(Path(tmp_path).glob("*moepp*"))
