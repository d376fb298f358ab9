"""The training step compiled for GPUs that are not there: `make test-gpu-compile`.

Each test runs the command itself, in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu_compile

ROOT = Path(__file__).parents[2]
GIB = 2**30
# As on a user's machine, without what conftest.py tells the compiler of CPUs.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
SMALL = {"model.num_layers": 2, "train.batch_size": 16, "train.accumulate": 1}
MESH = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.expert": 8}


def command(topology: str, config: str, *flags: str, **environment: str):
    line = [sys.executable, "-m", "moepp_jax.main", "compile", f"--config={config}"]
    line += [f"--topology={topology}", *flags]
    how = {"cwd": ROOT, "env": ENVIRONMENT | environment, "capture_output": True, "text": True}
    return subprocess.run(line, **how)


def compile_for(topology: str, config: str, folder: Path, fields: dict, status: int = 0) -> dict:
    file = folder / "report.json"
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    done = command(topology, config, f"--json={file}", *flags)
    print(done.stdout)
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads(file.read_text()) | {"printed": done.stdout}


def rows_of(report: dict, kind: str) -> list[dict]:
    return [row for row in report["collectives"] if row["kind"] == kind]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict:
    """Two layers of the 0.6B model on eight H100."""
    return compile_for("h100:8", "moepp_0p6b", tmp_path_factory.mktemp("small"), SMALL | MESH)


def test_the_step_fits_and_says_what_jax_takes(small):
    assert small["fits"] and small["devices"] == 8 and small["chip"] == "NVIDIA H100 80GB HBM3"
    assert small["state_bytes"] < small["hbm_bytes"] < small["preallocated_bytes"]
    assert small["preallocated_bytes"] == int(0.75 * small["hbm_limit_bytes"])
    assert (
        "It fits" in small["printed"] and "JAX takes 59.33 GiB when it starts" in small["printed"]
    )


def test_products_are_those_of_the_model_and_all_are_read(small):
    """By hand: a chunk's logits once more, and the padding of capacity; less of attention, whose
    kernel leaves out what no token sees.
    """
    assert 0.95 * small["model_flops"] < small["flops"] < 1.3 * small["model_flops"]
    assert sum(row["flops"] for row in small["kernels"]) == small["flops"]
    assert {row["name"] for row in small["kernels"]} >= {"cuBLAS"}
    assert not any(row["name"] == "XLA's Triton" for row in small["kernels"])
    assert small["loops_counted_once"] == []


def test_no_product_of_the_vocabulary_is_in_float32(small):
    """What is left is the routers', exact, and little."""
    in_bfloat16 = sum(row["flops"] for row in small["kernels"] if row["arithmetic"] == "bf16")
    assert in_bfloat16 > 0.99 * small["flops"]


def test_tokens_are_exchanged_four_times_a_layer_beside_other_work(small):
    [exchange] = rows_of(small, "all-to-all")
    assert exchange["count"] == exchange["asynchronous"] == 4 * 2
    # Rows come in eights, of which two sequences a GPU fill the last ones less.
    assert exchange["bytes"] == pytest.approx(small["least_wire_bytes"]["all-to-all"], rel=0.01)
    assert any(row["zero_computation"] > 0 for row in small["exchanges"])


@pytest.fixture(scope="module")
def dropless(tmp_path_factory) -> dict:
    fields = SMALL | MESH | {"moe.dispatch": "dropless"}
    return compile_for("h100:8", "moepp_0p6b", tmp_path_factory.mktemp("dropless"), fields)


def test_dropless_rows_are_exchanged_raggedly(dropless):
    [exchange] = rows_of(dropless, "ragged-all-to-all")
    assert exchange["count"] == 4 * 2


def test_dropless_experts_are_kernels_and_no_loops(dropless):
    """Forward two of a layer, and backward a product of rows and two of parameters beside the first
    one's gradient; all that they compute of balanced rows is counted.
    """
    kernels = {row["name"]: row for row in dropless["kernels"]}
    times = {"hidden": 1, "product": 2, "hidden_gradient": 1, "parameters": 2}
    for name, count in times.items():
        row = kernels[f"Triton kernel experts_{name}"]
        assert row["times"] == 2 * count and row["arithmetic"] == "bf16"
    assert dropless["loops_counted_once"] == [] and "Not counted" not in dropless["printed"]
    assert 0.95 * dropless["model_flops"] < dropless["flops"] < 1.1 * dropless["model_flops"]


def test_two_hosts_send_each_other_gradients_alone(tmp_path):
    sizes = SMALL | MESH | {"mesh.data": 2}
    report = compile_for("h200:2x8", "moepp_0p6b", tmp_path, sizes)
    across = [row for row in report["collectives"] if "data" in row["axes"]]
    assert {(row["kind"], *row["axes"]) for row in across if row["largest_operand"] > 1e6} == {
        ("all-reduce", "data")
    }
    assert report["bounds"]["interconnect"] > 0


@pytest.mark.parametrize("card", ["a100", "a100-40gb", "b200"])
def test_other_cards(tmp_path, card):
    report = compile_for(f"{card}:8", "moepp_0p6b", tmp_path, SMALL | MESH)
    assert report["fits"] and report["flops"] > 0.95 * report["model_flops"]


def test_what_does_not_fit_and_what_would(tmp_path):
    """The compiler itself only warns; the card's memory is compared with here."""
    fields = SMALL | MESH | {"train.batch_size": 2048, "model.remat": "none"}
    report = compile_for("a100-40gb:8", "moepp_0p6b", tmp_path, fields, status=2)
    assert not report["fits"] and report["hbm_bytes"] > report["hbm_limit_bytes"]
    assert report["remedy"]["hbm_bytes"] <= report["hbm_limit_bytes"]
    assert "This fits: --config." in report["printed"]


def test_without_the_plugin_one_line_says_what_is_missing():
    done = command("h100:8", "moepp_0p6b", PYTHONPATH="")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: compiling for NVIDIA H100 80GB HBM3: XLA's plugin for CUDA is not installed: "
        "pip install 'jax[cuda12]' (it compiles without a GPU)"
    ]


def test_attention_is_cudnns_and_writes_no_scores(small):
    """Forward and the gradient, of two layers: asked for, and counted."""
    [attention] = [row for row in small["kernels"] if row["name"] == "cuDNN attention"]
    assert attention["times"] == 2 * 2 and attention["flops"] > 0
    assert "attention is computed by XLA" not in small["printed"]
