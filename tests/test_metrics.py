"""What a run measured: rows that survive kills and resumes, and what is shown meanwhile."""

import io
import json
import math
import os
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from moepp_jax import log, progress, tensorboard, watch
from moepp_jax.data import prepare
from moepp_jax.errors import ConfigError
from moepp_jax.guard import Guard
from moepp_jax.metrics import MetricsWriter, read_metrics
from moepp_jax.progress import Progress
from tests import tiny


def _run(workdir, steps, resume_step=None):
    with MetricsWriter(workdir, resume_step) as metrics:
        for step in steps:
            metrics.write(step, loss=float(step))


def _steps(workdir):
    return [row["step"] for row in read_metrics(workdir)]


def test_rows_are_written_at_once_and_read_back_as_plain_numbers(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(1, loss=jnp.float32(0.5), lr=np.float32(0.25), tokens=7, z=jnp.bfloat16(2))
        metrics.write(2, load=jnp.arange(3.0))
        rows = read_metrics(tmp_path)  # before the writer is closed
    assert rows == [
        {"step": 1, "loss": 0.5, "lr": 0.25, "tokens": 7, "z": 2.0},
        {"step": 2, "load": [0.0, 1.0, 2.0]},
    ]
    assert isinstance(rows[0]["tokens"], int)


def test_of_layers_and_kinds_tensorboard_has_a_series_each(tmp_path, monkeypatch):
    """And of other arrays none: loads of every layer and expert would be thousands."""
    seen = {}
    with MetricsWriter(tmp_path) as metrics:
        monkeypatch.setattr(metrics._events, "add", lambda *a: seen.update({a[0]: a[1]}))
        by_layer = np.arange(12.0)
        metrics.write(1, loss=2.0, entropy_by_layer=by_layer, drop_rate_by_kind=[0, 1, 2, 3])
        metrics.write(1, eval_load=np.ones((12, 20)), drop_rate_by_part=by_layer)
    kinds = {f"drop_rate_by_kind/{i + 1}": i for i in range(4)}
    layers = {f"entropy_by_layer/{i + 1:02}": float(i) for i in range(12)}
    assert seen == {"loss": 2.0} | kinds | layers


def test_what_is_not_finite_is_null_in_strict_json(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(1, loss=math.nan, grad_norm=jnp.inf, load=np.array([1.0, -np.inf]))
    line = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(line, parse_constant=refuse)
    assert row == {"step": 1, "loss": None, "grad_norm": None, "load": [1.0, None]}


def test_a_resumed_run_has_every_step_once(tmp_path):
    _run(tmp_path, range(1, 8))
    _run(tmp_path, range(5, 10), resume_step=4)
    assert _steps(tmp_path) == list(range(1, 10))


def test_a_run_that_starts_again_drops_all_and_without_a_resume_step_nothing(tmp_path):
    _run(tmp_path, range(3))
    _run(tmp_path, [3])
    assert _steps(tmp_path) == [0, 1, 2, 3]
    _run(tmp_path, [0], resume_step=-1)
    assert _steps(tmp_path) == [0]


@pytest.mark.parametrize("cut", [1, 5, 14])
def test_a_kill_in_the_middle_of_a_line_costs_that_line_only(tmp_path, cut):
    _run(tmp_path, [1, 2, 3])
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    whole = [1, 2, 3] if cut == 1 else [1, 2]  # the newline alone was cut off: a whole row
    assert _steps(tmp_path) == whole
    _run(tmp_path, [4])
    assert _steps(tmp_path) == [*whole, 4]


BROKEN = b'{"step": 1}\nnot json\n{"step": 3}\n\xff\x00\n\n{"step": 5}\n{"step": 7}\n{"ste'


def test_who_reads_a_broken_line_elsewhere_is_told_which(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(BROKEN)
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 2 .*'not json'"):
        read_metrics(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == BROKEN


def test_a_run_goes_on_without_broken_lines_and_keeps_them_beside(tmp_path):
    file, said = tmp_path / "metrics.jsonl", []
    for name in ("metrics.jsonl.damaged", "metrics.jsonl.damaged.2"):
        file.write_bytes(BROKEN)
        with MetricsWriter(tmp_path, 5, said.append) as metrics:
            metrics.write(6, loss=1.0)
        assert _steps(tmp_path) == [1, 3, 5, 6]
        assert (tmp_path / name).read_bytes() == BROKEN
        assert said.pop() == (
            f"{file}: line 2 cannot be read, and what was measured from step 1 on up to step 3 is "
            "lost; lines 4 to 5 cannot be read, and what was measured from step 3 on up to step 5 "
            "is lost; line 8 cannot be read, and what was measured from step 7 on is lost; the "
            f"file as it was is {name} now"
        )
    assert not said


def test_what_two_resumes_have_written_is_there_once(tmp_path):
    """The later one counts, of training and of evaluations."""
    rows = [(1, "loss"), (2, "loss"), (2, "eval_loss"), (2, "loss"), (3, "loss"), (2, "eval_loss")]
    lines = [json.dumps({"step": step, name: i}) for i, (step, name) in enumerate(rows)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with MetricsWriter(tmp_path, 9):
        pass
    found = read_metrics(tmp_path)
    assert [row.get("loss", row.get("eval_loss")) for row in found] == [0, 3, 4, 5]


def test_a_file_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"metrics.jsonl cannot be read: it is a folder, no"):
        MetricsWriter(tmp_path, 1)
    assert not any((tmp_path / "metrics.jsonl").iterdir())
    (tmp_path / "metrics.jsonl").rmdir()
    os.mkfifo(tmp_path / "metrics.jsonl")  # of which reading would wait
    with pytest.raises(ConfigError, match=r"metrics.jsonl cannot be read: it is a FIFO, no"):
        MetricsWriter(tmp_path, 1)


def test_a_disk_that_fills_up_ends_the_run_with_one_error(tmp_path, monkeypatch):
    full = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    metrics = MetricsWriter(tmp_path, 1)
    metrics._file.close()
    metrics._file = full
    with pytest.raises(ConfigError, match=r"metrics.jsonl cannot be written: No space left on dev"):
        metrics.write(2, loss=1.0)
    with pytest.raises(ConfigError, match=r"metrics.jsonl cannot be written: No space left on dev"):
        metrics.close()


def test_rows_wait_for_a_disk_that_is_full_for_a_while(tmp_path):
    said = []
    with MetricsWriter(tmp_path, 0, said.append, patient=True) as metrics:
        metrics.write(1, loss=1.0)
        file = metrics._file
        for step in (2, 20):
            with open("/dev/full", "ab", buffering=0) as metrics._file:
                metrics.write(step, loss=1.0)
                metrics.write(step + 1, loss=1.0)
                with pytest.raises(ConfigError, match=r"metrics.jsonl cannot be written: No sp"):
                    metrics.flush()
            metrics._file = file
            metrics.write(step + 2, loss=1.0)
    assert said == 2 * [
        f"warning: {tmp_path / 'metrics.jsonl'} cannot be written: No space left on device; its "
        "rows wait, and it is tried again"
    ]
    assert _steps(tmp_path) == [1, 2, 3, 4, 20, 21, 22]


def test_rows_of_checkpoints_that_are_gone_are_kept_beside(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        for step in (1, 5, 9):
            metrics.write(step, loss=1.0)
    file, said = tmp_path / "metrics.jsonl", []
    before = file.read_bytes()
    for reach in (9, 8):  # as far as it can have come, and too far
        file.write_bytes(before)
        with MetricsWriter(tmp_path, 1, said.append, reach=reach):
            assert _steps(tmp_path) == [1]
    assert said == [
        f"{file} goes on to step 9, and no checkpoint is there of one after 1; the file as it was "
        "is metrics.jsonl.before now"
    ]
    assert (tmp_path / "metrics.jsonl.before").read_bytes() == before


@pytest.mark.parametrize("when", ["at first", "later"])
def test_events_that_cannot_be_written_are_told_once_and_end_no_run(tmp_path, monkeypatch, when):
    said, folder = [], tmp_path / "tensorboard"
    if when == "at first":
        folder.write_text("a file")
    with MetricsWriter(tmp_path, 0, said.append) as metrics:
        metrics.write(1, loss=1.0)
        if when == "later":
            full = open("/dev/full", "wb")  # noqa: SIM115
            metrics._events._writer._py_recordio_writer._writer = full
        for step in range(2, 99):
            metrics.write(step, loss=1.0)
        metrics.flush()
    why = {"at first": "File exists", "later": "No space left on device"}[when]
    assert said == [
        f"{folder} cannot be written ({why}): the run goes on without TensorBoard's events; "
        "metrics.jsonl has all numbers"
    ]
    assert _steps(tmp_path) == [*range(1, 99)]


def test_no_metrics_yet_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics.jsonl: training writes it"):
        read_metrics(tmp_path)


def test_scalars_go_to_tensorboard_too(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(1, loss=0.5, load=[1.0, 2.0])
    (events,) = (tmp_path / "tensorboard").iterdir()
    written = events.read_bytes()
    assert b"loss" in written and b"load" not in written


def test_a_large_event_file_is_followed_by_another(tmp_path, monkeypatch):
    """What TensorBoard reads is every number once, in their order; an old file never grows."""
    monkeypatch.setattr(tensorboard, "_LARGE", 1000)
    with MetricsWriter(tmp_path, resume_step=0) as metrics:
        for step in range(1, 101):
            metrics.write(step, loss=float(step))
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert len(files) >= 3 and max(file.stat().st_size for file in files) < 2500
    records = [record for file in files for record in _records(file.read_bytes())]
    events = [Event.FromString(record) for record in records]
    logged = [(e.step, e.summary.value[0].simple_value) for e in events if e.summary.value]
    assert logged == [(step, float(step)) for step in range(1, 101)]
    assert sum(e.HasField("session_log") for e in events) == 1  # later files purge nothing


def _records(content: bytes):
    """Of TensorFlow's record format: length, its sum, the record, its sum."""
    while content:
        end = 12 + int.from_bytes(content[:8], "little")
        yield content[12:end]
        content = content[end + 4 :]


def _console(**options):
    return Console(file=io.StringIO(), width=80, **options)


def test_off_a_terminal_an_update_is_one_line(monkeypatch):
    clock = iter([0.0, 50.0, 60.0, 80.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    console = _console()
    with Progress(500, start_step=100, console=console) as shown:
        values = {"ffn_experts_per_token": np.float32(1.19), "drop_rate": 0.021, "lr": 1.0}
        shown.update(110, loss=jnp.float32(5.3125), tokens_per_s=14210.4, **values)
        shown.message("saved [red]x")
        shown.update(120)
        shown.update(130)
    # The first estimate has only the 50 s of the first ten steps, which compiled; the second is
    # 1 s a step; the third (10 + 20 s for 20 steps) 1.5.
    assert console.file.getvalue().splitlines() == [
        "step 110/500  loss 5.312  tok/s 14,210  FFN/token 1.19  drops 2.1 %  ETA at most 32:30",
        "saved [red]x",
        "step 120/500    ETA 6:20",
        "step 130/500    ETA 9:15",
    ]


def test_on_a_terminal_an_interrupt_gives_the_cursor_back():
    console = _console(force_terminal=True)
    with (
        pytest.raises(KeyboardInterrupt),
        Progress(500, start_step=100, description="train", console=console) as shown,
    ):
        shown.update(250, loss=2.0)
        shown.message("saved")
        raise KeyboardInterrupt
    output = console.file.getvalue()
    assert "train" in output and "250/500" in output and "loss 2.000" in output
    assert "saved" in output
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l") >= 0


@pytest.mark.parametrize(
    ("mean", "by_part", "said"),
    [
        (0.02, [0.02] * 8, None),
        (0.2, [0.2] * 7 + [0.4], None),  # twice the mean is not much more
        (0.01, [0.0] * 7 + [0.04], None),  # little is lost anywhere
        (0.1, [0.05] * 7 + [0.45], "part 8 of 8 of the sequences loses 45% .* the mean is 10%"),
        (0.1, [0.3] + [0.07] * 7, "part 1 of 8 .* raise config.moe.group_size or"),
        (0.0, [], None),
    ],
)
def test_a_part_of_the_sequences_that_starves_is_told(mean, by_part, said):
    line = log._starving(mean, by_part)
    assert (line is None) if said is None else re.match(said, line)


def test_a_router_that_stops_using_an_expert_is_told_once(tmp_path):
    """And the rows have its numbers by layer, but not its loads."""
    c = tiny.config(**{"data.dir": str(tmp_path / "data")})
    out, dataset = io.StringIO(), prepare(c, lambda line: None)
    mesh = SimpleNamespace(devices=np.array([jax.devices()[0]]), size=1)
    with MetricsWriter(tmp_path) as writer:
        shown = Progress(9, console=Console(file=out, width=200))
        log_of_run = log.Log(c, mesh, dataset, writer, shown, watch.over(c.train, 0), 0)
        load = np.full((2, c.moe.num_experts), 0.2)
        for step in range(1, 7):
            if step > 2:
                load[1, 3] = 0.0
            values = {"loss": 1.0, "grad_norm": 1.0, "ffn_experts_per_token": 1.0}
            values |= {"guard": Guard.fresh()}
            log_of_run.note(step, values | {"drop_rate": 0.0, "load": load.copy()})
            log_of_run.flush()
    said = [line for line in out.getvalue().splitlines() if "MoE layer" in line]
    assert len(said) == 1 and said[0].startswith("step 5: MoE layer 2: no token chooses expert 3")
    last = read_metrics(tmp_path)[-1]
    assert last["dead_experts_by_layer"] == [0, 1] and "load" not in last
    assert last["load_smallest_by_layer"] == pytest.approx([1.0, 0.0])
    assert last["load_largest_by_layer"] == pytest.approx([1.0, 8 / 7])
