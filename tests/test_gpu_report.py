"""The report of a machine with GPUs, in small on CPUs: that it measures, and that it can fail."""

import json
from types import SimpleNamespace

import jax
import pytest

from moepp_jax import attend
from moepp_jax.benchmarks.gpu_report import __main__ as command
from moepp_jax.benchmarks.gpu_report import attention, equality, exchanges, paper, running, writing
from moepp_jax.benchmarks.gpu_report import sizes as sizes_lib
from moepp_jax.benchmarks.gpu_report import step as steps
from moepp_jax.chips import GIB
from moepp_jax.errors import ConfigError


@pytest.fixture(scope="module")
def small() -> sizes_lib.Sizes:
    return sizes_lib.sizes(jax.devices())


def test_without_a_gpu_it_asks_to_be_told(tmp_path, capsys):
    assert command.main([f"--out={tmp_path / 'none'}"]) == 2
    assert "--allow-cpu" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_the_whole_report_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paper, "ROWS", paper.ROWS[-1:])  # the 7B: one tau
    where = [f"--out={tmp_path}", "--allow-cpu", "--rounds=1"]
    assert command.main([*where, "--parts", "paper", "attention", "equality"]) == 0
    assert "everything measured, all equal" in capsys.readouterr().out
    report = json.loads((tmp_path / writing.JSON).read_text())
    assert list(report["parts"]) == ["equality", "paper", "attention"]
    assert all(part["rows"] and part["seconds"] > 0 for part in report["parts"].values())
    what = [row["what"] for row in report["parts"]["equality"]["rows"]]
    for mode in ("capacity", "dropless"):
        for one in ("layer, {}, forward", "layer, {}, backward", "model, {}, gradients"):
            assert one.format(mode) in what
    [vanilla, ours] = report["parts"]["paper"]["rows"]
    assert (vanilla["tau"], vanilla["speedup"], ours["tau"]) == (None, 1.0, 0.75)
    assert ours["paper_speedup"] == 1859 / 1455 and ours["theory"] == pytest.approx(4 / 3)
    page = (tmp_path / writing.PAGE).read_text()
    assert "Small sizes on a CPU" in page and "| 7B | 0.75 | 256 |" in page
    assert (tmp_path / "paper.png").stat().st_size > 1000


def test_the_papers_table_is_whole():
    """Twenty cells: three models at five taus and the vanilla, the 7B at one."""
    assert sum(len(row.milliseconds) for row in paper.ROWS) == 3 * 6 + 2
    assert {row.model: row.milliseconds[0.75] for row in paper.ROWS} == {
        "0.6B": 427.6,
        "1B": 500.3,
        "2B": 561.0,
        "7B": 1455.0,
    }


@pytest.mark.slow
def test_exchanges_over_several_devices_are_compared_with_one(small, monkeypatch):
    two = jax.devices("cpu")[:2]
    monkeypatch.setattr(exchanges.jax, "devices", lambda platform=None: two)
    rows = exchanges.measure(small, 1)
    assert all(row["holds"] for row in rows)
    assert {row["what"].rpartition(",")[0] for row in rows} == {
        f"{mode}, experts over 2 of 2" for mode in ("capacity", "dropless")
    }
    monkeypatch.setattr(exchanges.jax, "devices", lambda platform=None: two[:1])
    assert exchanges.measure(small, 1) == []


def test_steps_are_timed(small):
    config = small.step.replace("mesh", data=1, fsdp=1, expert=8)
    row = steps.of(config, rounds=2)
    assert row["tokens"] == 8 * 64 and row["tokens_per_second"] == row["tokens"] / row["seconds"]
    assert row["last_loss"] != row["first_loss"] and row["planned_bytes"] > 0
    assert row["bounds"] is None and row["mfu"] is None  # no CPU has published peaks here


def test_what_differs_is_told(tmp_path, monkeypatch, small):
    """A wrong gradient, and one that is no number."""
    exact = equality.layer_on

    factors = iter((1.001, 1.0, float("nan"), 1.0))  # the device's and the CPU's, of each mode

    def wrong(device, sizes, mode):
        y, grads = exact(device, sizes, mode)
        by = next(factors)
        return y, jax.tree.map(lambda g: by * g, grads)

    monkeypatch.setattr(equality, "layer_on", wrong)
    monkeypatch.setattr(running, "loss_and_gradients", lambda config, devices: (1.0, {"w": 2.0}))
    rows = equality.measure(small, 1)
    assert [row["what"] for row in rows if not row["holds"]] == [
        "layer, capacity, backward",
        "layer, dropless, backward",
    ]
    report = {"machine": "m", "platform": "cpu", "sizes": {}, "parts": {"equality": {"rows": rows}}}
    assert not writing.is_sound(report)
    assert "layer, capacity, backward is 1.0e-03 off" in writing.summary(report)
    writing.write(report, tmp_path)
    assert "**no**" in (tmp_path / writing.PAGE).read_text()


def test_a_part_that_fails_and_one_that_has_no_time(tmp_path, small):
    def fails(sizes, rounds):
        raise RuntimeError("cuDNN is\nmissing")

    found = command.taken({"step": fails, "layer": fails}, small, 1, seconds=60.0)
    assert found["step"]["failed"] == "RuntimeError: cuDNN is"
    found |= command.taken({"attention": fails}, small, 1, seconds=-1.0)
    assert "minutes were over" in found["attention"]["skipped"]
    report = {"machine": "m", "platform": "cpu", "sizes": {}, "parts": found}
    assert "step failed: RuntimeError" in writing.summary(report)
    writing.write(report, tmp_path)
    assert "**failed**: RuntimeError: cuDNN is" in (tmp_path / writing.PAGE).read_text()


def test_a_kernel_that_is_refused_says_why(small, monkeypatch):
    monkeypatch.setitem(attention.KERNELS, "cpu", attention.KERNELS["gpu"])
    rows = attention.measure(small, 1)
    assert [(row["kernel"], row["documents"], "refused" in row) for row in rows] == [
        ("cudnn", 1, True),
        ("cudnn", 4, True),
        ("xla", 1, False),
        ("xla", 4, False),
    ]
    assert rows[2]["seconds"] > 0 and rows[2]["of_peak"] is None


def test_attention_of_documents_is_compared(small, monkeypatch):
    """That a kernel knows them shows: one that takes a row for one document is far off."""
    device = jax.devices()[0]
    rows = equality.attentions(small._replace(dtype="bfloat16"), device, device)
    assert len(rows) == 4 and all(row["holds"] for row in rows)
    assert {row["what"].rpartition(",")[0] for row in rows} == {
        "attention, xla, documents: 1",
        "attention, xla, documents: 4",
    }
    *_, segments = attention.arguments(small, 4)
    assert len(set(segments[0].tolist())) == 4

    def of_one(model):
        return lambda segments: attend.xla(model)(segments * 0)

    monkeypatch.setitem(attention.KERNELS, "gpu", {"blind": of_one})
    monkeypatch.setitem(attention.KERNELS, "cpu", {"blind": of_one, "xla": attend.xla})
    rows = {row["what"]: row["holds"] for row in equality.attentions(small, device, device)}
    assert rows["attention, blind, documents: 1, forward"]
    assert not rows["attention, blind, documents: 4, forward"]
    assert not rows["attention, blind, documents: 4, backward"]


def gpu(memory: int | None, kind: str = "NVIDIA H100 80GB HBM3"):
    stats = None if memory is None else {"bytes_limit": memory}
    return SimpleNamespace(platform="gpu", device_kind=kind, memory_stats=lambda: stats)


@pytest.mark.parametrize(
    ("memory", "count", "tokens", "layers", "rows"),
    [(59 * GIB, 1, 32_768, 12, 32), (59 * GIB, 8, 32_768, 12, 32), (12 * GIB, 1, 8192, 6, 2)],
)
def test_sizes_follow_the_memory(memory, count, tokens, layers, rows):
    got = sizes_lib.sizes([gpu(memory)] * count)
    assert (got.memory, got.tokens, got.dtype) == (memory, tokens, "bfloat16")
    assert got.step.model.num_layers == layers and got.step.train.batch_size == rows * count
    assert got.layer.tokens % got.layer.groups == 0


def test_memory_that_is_not_told_is_the_published_or_an_error():
    assert sizes_lib.memory_of(gpu(None)) == 84_942_979_072
    with pytest.raises(ConfigError, match="NVIDIA X does not say how much memory"):
        sizes_lib.memory_of(gpu(None, "NVIDIA X"))
    with pytest.raises(ConfigError, match="hold no training step"):
        sizes_lib.sizes([gpu(GIB)])
