"""The scaling table: what is compiled is kept, what is not is told from it."""

import csv

import pytest
from rich.console import Console

from experiments import rows as rows_lib
from experiments import scaling
from tests import tiny

CONFIG = tiny.config(**{"train.batch_size": 2048, "moe.n_ffn": 16})
SILENT = Console(quiet=True)


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """Topologies that were asked to be compiled, with made-up numbers for each."""
    asked = []

    def report(tokens: float) -> dict:
        bounds = {"arithmetic": tokens / 1e6, "hbm": tokens / 9e5, "interconnect": 0.01}
        return {
            "hbm_bytes": 2**30,
            "flops": tokens * 1e9,
            "hbm_traffic_bytes": tokens * 1e6,
            "wire_bytes": 1e9,
            "wire_ratio": 1.1,
            "bounds": bounds,
            "tokens_per_second": 1 / max(bounds.values()),
            "mfu": 0.5,
        }

    def tokens_of(config, topology):
        return config.train.batch_size * config.data.seq_len / topology.num_devices

    def compile_row(config, size, topology):
        asked.append(size.topology)
        return scaling._row(config, size, topology, "compiled", report(tokens_of(config, topology)))

    def extrapolate(config, size, topology, known, base):
        assert known["how"] == "compiled"
        told = report(tokens_of(config, topology))
        return scaling._row(config, size, topology, "extrapolated", told)

    monkeypatch.setattr(scaling, "_compiled", compile_row)
    monkeypatch.setattr(scaling, "_extrapolated", extrapolate)
    return asked


def test_finished_rows_are_kept(compiled, tmp_path):
    rows = scaling.scaling(CONFIG, tmp_path, 32, SILENT)
    assert compiled == ["v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4"]
    assert [row["how"] for row in rows] == ["compiled"] * 3 + ["extrapolated"] * 7
    assert [row["chips"] for row in rows] == [8 * 2**i for i in range(10)]
    assert rows[-1]["tokens_per_step"] == 2 * rows[0]["tokens_per_step"]  # one sequence a chip
    scaling.scaling(CONFIG, tmp_path, 128, SILENT)
    assert compiled[3:] == ["v5p:4x4x4", "v5p:4x4x8"]
    with (tmp_path / "scaling.csv").open() as lines:
        written = list(csv.DictReader(lines))
    assert [row["how"] for row in written] == ["compiled"] * 5 + ["extrapolated"] * 5
    assert tuple(written[0]) == scaling.COLUMNS
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_an_interruption_loses_no_row(compiled, tmp_path, monkeypatch):
    scaling.scaling(CONFIG, tmp_path, 64, SILENT)
    file = tmp_path / "scaling.csv"
    lost = [row for row in scaling._read(file) if row["topology"] != "v5p:2x2x4"]
    rows_lib.write(file, scaling.COLUMNS, lost)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling, "_compiled", interrupt)
    with pytest.raises(KeyboardInterrupt):
        scaling.scaling(CONFIG, tmp_path, 64, SILENT)
    there = [row["topology"] for row in scaling._read(file) if row["how"] == "compiled"]
    assert there == ["v5p:2x2x2", "v5p:2x4x4", "v5p:4x4x4"]


def test_meshes_lie_on_their_slices():
    for size in scaling.SIZES:
        topology = scaling.Topology.parse(size.topology)
        assert size.data * size.fsdp * size.expert == topology.num_devices
