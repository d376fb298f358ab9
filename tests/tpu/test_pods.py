"""The training step compiled for TPU pods that are not there: `make test-tpu-compile`.

Each test runs the command itself, in a process of its own: the compiler serves one at a time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tpu_compile

ROOT = Path(__file__).parents[2]
GIB = 2**30
# As on a user's machine, without what conftest.py tells the compiler of CPUs.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}


def compile_for(
    topology: str, config: str, folder: Path, *more: str, status: int = 0, **fields
) -> dict:
    file = folder / "report.json"
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    command = [sys.executable, "-m", "moepp_jax.main", "compile", f"--config=configs/{config}.py"]
    command += [f"--topology={topology}", f"--json={file}", *flags, *more]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads(file.read_text()) | {"printed": done.stdout}


def rows_of(report: dict, kind: str) -> list[dict]:
    return [row for row in report["collectives"] if row["kind"] == kind]


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> dict:
    """The 7B model on 64 TPU v5p."""
    return compile_for("v5p:4x4x4", "moepp_7b", tmp_path_factory.mktemp("7b"))


def test_7b_fits_64_v5p(large):
    assert large["fits"] and large["devices"] == 64
    assert large["state_bytes"] < large["hbm_bytes"] < 95 * GIB == large["hbm_limit_bytes"]
    for words in ("Memory of a device", "Collectives of a device", "MFU, at most", "It fits"):
        assert words in large["printed"]
    assert 0.2 < large["mfu"] < 1
    assert large["loops_counted_once"] == []


def test_7b_moves_little_more_than_it_must(large):
    assert large["wire_ratio"] <= 1.15


def test_7b_exchanges_tokens_four_times_a_layer_in_four_parts_and_gathers_none(large):
    [exchange] = rows_of(large, "all-to-all")
    assert exchange["axes"] == ["expert"]
    assert exchange["count"] == exchange["asynchronous"] == 4 * 4 * 24 * large["accumulate"]
    assert exchange["bytes"] == pytest.approx(large["least_wire_bytes"]["all-to-all"])
    # A gather's operand is a part of a layer's, or of the vocabulary's matrix: no tokens.
    parameters_a_layer = 2 * 2 * 16 * 4096 * 1536 / large["mesh"]["expert"]
    vocabulary = 2 * 65536 * 1536
    for row in rows_of(large, "all-gather"):
        assert row["largest_operand"] <= max(parameters_a_layer, vocabulary)


def test_7b_reduces_no_sharded_gradient_whole(large):
    """All-reduced are scalars, norms, routers and constant experts: the least matrix has 4.7 MB."""
    for row in rows_of(large, "all-reduce"):
        if row["axes"] != ["data"]:
            assert row["largest_operand"] < 1e6, row


def test_7b_computes_zero_computation_experts_while_tokens_are_exchanged(large):
    assert any(row["zero_computation"] > 0 for row in large["exchanges"])


def test_2b_fits_16_v5e(tmp_path):
    report = compile_for("v5e:4x4", "moepp_2b", tmp_path)
    assert report["fits"] and report["devices"] == 16
    assert report["state_bytes"] < report["hbm_bytes"] < 16 * GIB == report["hbm_limit_bytes"]
    assert report["wire_ratio"] <= 1.15
    assert "It fits" in report["printed"]


def test_dropless_layers_with_their_gradients(tmp_path):
    """Two layers, tokens split over four chips: four ragged exchanges of each."""
    sizes = {"mesh__data": 1, "mesh__fsdp": 1, "mesh__expert": 4}
    small = {"model__num_layers": 2, "train__batch_size": 8, "data__seq_len": 1024}
    report = compile_for(
        "v5p:2x2x1",
        "moepp_0p6b",
        tmp_path,
        moe__dispatch="dropless",
        moe__group_size=1024,
        **sizes,
        **small,
    )
    [exchange] = rows_of(report, "ragged-all-to-all")
    assert exchange["count"] == 4 * 2


def test_a_large_slice_of_v5e_evaluates_without_a_ragged_exchange(tmp_path):
    """Its compiler refuses one, and evaluation drops nothing."""
    sizes = {"mesh__data": 1, "mesh__fsdp": 4, "mesh__expert": 8}
    small = {"model__num_layers": 2, "train__batch_size": 32, "data__seq_len": 512}
    report = compile_for("v5e:4x8", "moepp_0p6b", tmp_path, moe__group_size=512, **sizes, **small)
    assert report["fits"] and report["evaluation"]["fits"]
    assert report["evaluation"]["temporary_bytes"] > 0


def test_two_slices_share_nothing_but_gradients(tmp_path):
    """Only sums of gradients' parts cross from slice to slice, each once."""
    sizes = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__expert": 8, "model__num_layers": 2}
    report = compile_for("2*v5e:4x4", "moepp_0p6b", tmp_path, train__batch_size=64, **sizes)
    across = [row for row in report["collectives"] if "data" in row["axes"]]
    assert {(row["kind"], *row["axes"]) for row in across} == {("all-reduce", "data")}
    sent = sum(row["bytes"] for row in across)
    assert sent == pytest.approx(report["least_wire_bytes"]["all-reduce"], rel=0.02)


def test_what_does_not_fit_and_what_would(tmp_path):
    """2,048 sequences at once on four chips of 16 GiB."""
    sizes = {"mesh__data": -1, "mesh__fsdp": 1, "mesh__expert": 1, "model__num_layers": 2}
    fields = {"train__accumulate": 1, "model__remat": "none", "train__batch_size": 512}
    report = compile_for("v5e:2x2", "moepp_0p6b", tmp_path, status=2, **sizes, **fields)
    assert not report["fits"] and report["hbm_bytes"] > 16 * GIB
    assert report["remedy"]["hbm_bytes"] <= 16 * GIB
    assert "This fits: --config." in report["printed"]


def test_a_slice_that_does_not_exist(tmp_path):
    command = [sys.executable, "-m", "moepp_jax.main", "compile"]
    command += ["--config=configs/moepp_7b.py", "--topology=v5p:3x5x7"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --topology=v5p:3x5x7: ")
    assert len(done.stderr.splitlines()) == 1


def test_while_another_process_has_the_compiler(tmp_path):
    holder = (
        "import sys; from moepp_jax.compile.topology import Topology, devices\n"
        "devices(Topology.parse('v5e:2x2')); print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", holder], cwd=ROOT, env=ENVIRONMENT, **pipes) as p:
        assert p.stdout.readline() == "held\n"
        command = [sys.executable, "-m", "moepp_jax.main", "compile"]
        command += ["--config=configs/moepp_7b.py", "--topology=v5e:2x2"]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        p.stdin.close()
    assert done.returncode == 1
    assert "another process is using libtpu" in done.stderr
