"""Costs grow no faster than they must, by the compiler at small sizes; and the command."""

import json

import pytest

from moepp_jax.benchmarks import bare, curves, layer
from moepp_jax.moe import dispatch

BASE = {"T": 512, "N": 8, "K": 2, "D": 128}
VALUES = {"T": (512, 2048), "N": (8, 32), "K": (1, 4), "D": (64, 128)}


@pytest.fixture(autouse=True)
def short_sequences(monkeypatch):
    monkeypatch.setattr(curves, "SEQUENCE", 256)


def _grows_no_faster(mode, way, values):
    found = curves.slopes(curves.measure(mode, way, values, BASE, rounds=0))
    assert {(s["size"], s["cost"]) for s in found} == {
        (size, cost) for size in values for cost in ("flops", "memory_bytes")
    }
    assert not curves.too_steep(found)
    least = {"T": 0.9, "N": -0.1, "K": 0.8, "D": 1.7}
    assert all(s["slope"] > least[s["size"]] for s in found if s["cost"] == "flops")


@pytest.mark.parametrize("mode", layer.MODES)
def test_nothing_grows_faster_than_it_must(mode):
    """Of tokens and experts, forward."""
    _grows_no_faster(mode, "forward", {name: VALUES[name] for name in ("T", "N")})


@pytest.mark.slow
@pytest.mark.parametrize("way", layer.PASSES)
@pytest.mark.parametrize("mode", layer.MODES)
def test_nothing_grows_faster_than_it_must_in_anything(mode, way):
    _grows_no_faster(mode, way, VALUES)


def test_slots_for_all_tokens_are_found(monkeypatch):
    """Then every token's row is multiplied with every expert."""
    monkeypatch.setattr(dispatch, "capacity", lambda load, gamma, tokens: (tokens,) * len(load))
    rows = curves.measure("capacity", "forward", {"N": VALUES["N"]}, BASE, rounds=0)
    flops, memory = curves.too_steep(curves.slopes(rows))
    assert flops.startswith("capacity, forward: flops grows as N^1.0")
    assert flops.endswith("and need not grow faster than N^0")
    assert "memory_bytes grows as N^" in memory


def test_slopes_by_hand():
    rows = [
        {"mode": "capacity", "pass": "forward", "size": "T", "value": v, "flops": 3.0 * v**p}
        for v, p in ((2, 2), (4, 2), (8, 2))
    ]
    (found,) = curves.slopes(rows)
    assert found["slope"] == pytest.approx(2) and found["most"] == 1
    assert curves.too_steep([found | {"slope": 1.1}]) == []
    assert curves.slopes([row | {"flops": None} for row in rows]) == []


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bare, "SIDE", 64)
    monkeypatch.setattr(bare, "NUMBERS", 4096)
    monkeypatch.setattr(curves, "BASE", BASE | {"D": 32})
    monkeypatch.setattr(curves, "VALUES", {"T": (256, 512)})
    out, stem = tmp_path / "curves.json", tmp_path / "curves"
    given = f"curves --clock --rounds=1 --sizes T --modes capacity --json {out} --figure {stem}"
    monkeypatch.setattr("sys.argv", given.split())
    curves.main()
    report = json.loads(out.read_text())
    assert [row["value"] for row in report["rows"]] == [256, 512] * 2
    assert all(row["seconds"] > 0 and row["memory_bytes"] > 0 for row in report["rows"])
    assert [s["cost"] for s in report["slopes"]] == list(curves.COSTS) * 2
    assert stem.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert "memory bytes" in stem.with_suffix(".svg").read_text()
    assert "capacity" in capsys.readouterr().out
    monkeypatch.setattr(curves, "ROOM", -1.0)
    with pytest.raises(SystemExit, match=r"flops grows as T\^(0\.[89]\d|1\.00), and need not"):
        curves.main()
