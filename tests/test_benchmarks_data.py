"""The data benchmark in small: that it counts what it says, not how fast anything is."""

import json

import pytest

from moepp_jax.benchmarks import data
from moepp_jax.data import prepare, reading
from tests import tiny


def patched_processes(monkeypatch) -> list[int]:
    """Threads in their place, as starting them takes seconds; how many were wanted."""
    wanted = []
    ahead = reading.Training.ahead

    def on_threads(training, start_step, rows, workers):
        wanted.extend([workers] if workers else [])
        return ahead(training, start_step, rows, workers=0)

    monkeypatch.setattr(reading.Training, "ahead", on_threads)
    return wanted


def test_rows(tmp_path, monkeypatch):
    def config_of(folder, **fields):
        return tiny.config(**{"data.dir": str(folder)} | fields)

    monkeypatch.setattr(data, "config_of", config_of)
    prepare(config_of(tmp_path), report=lambda line: None)
    shape = data.Shape("small", 8, 32, needed=10.0)
    reader = patched_processes(monkeypatch)
    rows = data.reading(config_of(tmp_path), shape, tokens=2000, rounds=1)
    assert [row["case"] for row in rows] == ["raw", "records", "packed", "processes", "device"]
    assert reader == [2]
    far = data.far_into_a_run(tmp_path, rounds=1)
    assert [row["case"] for row in far] == ["step 0", "step 1,000,000"]
    made = data.preparing(tmp_path, megabytes=0.02, rounds=1)
    assert [row["case"] for row in made] == ["raw", "prepare"]
    assert json.loads(json.dumps(rows + far + made)) == rows + far + made
    for row in rows + made:
        assert row["tokens_per_s"] > 0 and row["mb_per_s"] > 0
    # Text of another length than the tokens: bytes a token are those of the text.
    assert made[1]["mb_per_s"] * 1e6 / made[1]["tokens_per_s"] == pytest.approx(2.2, abs=0.8)


def test_what_is_needed_is_that_of_a_host():
    default, host = data.shapes()
    assert (default.batch_size, default.seq_len) == (8, 256)
    assert (host.batch_size, host.seq_len) == (128, 2048)
    assert 200_000 < host.needed < 300_000
