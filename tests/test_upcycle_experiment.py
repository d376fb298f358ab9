"""The sweep of upcycled models in small: its files, and what a killed one keeps."""

import csv
import re

import pytest

from moepp_jax.experiments import rows as rows_lib
from moepp_jax.experiments import upcycling
from moepp_jax.train import train
from tests import tiny

SETTINGS = upcycling.Settings(steps=30, lr=3e-4, bias_rate=1 / 3)


def run(name, tau, experts, loss, settings=SETTINGS):
    """A run's rows: one at its start, three at its end."""
    shared = {"run": name, "tau": tau, "wanted": 1.0, "tokens_per_s": 123.456789, **vars(settings)}
    start = {"step": 0, "eval_loss": 3.0, "ffn_experts_per_token": 2.0}
    end = {"step": settings.steps, "eval_loss": loss, "ffn_experts_per_token": experts}
    around = [end | {"eval_loss": loss + more} for more in (0.1, -0.1)]
    return [shared | row for row in (start, *around, end)]


ROWS = run("control", "", 2.0, 2.9) + run("tau 0.5", 0.5, 1.04, 2.95)


def test_finished_runs_are_read_again(tmp_path):
    file = tmp_path / "x" / "upcycling.csv"
    half = run("tau 0.1", 0.1, 0.5, 3.1)[:1]
    other = run("tau 1", 1.0, 1.3, 2.9, upcycling.Settings(30, 1e-3, 1 / 3))
    rows_lib.write(file, upcycling.COLUMNS, ROWS + half + other)
    assert not upcycling.finished(upcycling.read(file), SETTINGS, before=2.99)
    kept = upcycling.finished(upcycling.read(file), SETTINGS, before=3.0000001)
    assert list(kept) == ["control", "tau 0.5"]
    assert kept["tau 0.5"][3]["ffn_experts_per_token"] == 1.04
    assert kept["control"][0]["tau"] == ""
    rows_lib.write(
        tmp_path / "again.csv", upcycling.COLUMNS, [row for rows in kept.values() for row in rows]
    )
    lines = file.read_text().splitlines()
    assert (tmp_path / "again.csv").read_text().splitlines() == lines[:9]


def test_page_and_picture():
    page = upcycling.page(ROWS, tiny.config(), SETTINGS)
    assert "| before | 2.00 |  |  | 3.000 |  |" in page
    assert "| control | 2.00 |  | 100% | 2.900 |  |" in page
    assert "| tau 0.5 | 1.04 | 1.00 | 52% | 2.950 | +0.050 |" in page
    assert "nats at tau = 1) holds: FFN experts a token are at most +4.0% from" in page
    assert upcycling.figure(ROWS).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("experts", "loss", "said"),
    [
        (1.0, 2.915, r"holds: .* at most \+4\.0% .*\(tau 0.5\); .* tau = 1 ends \+0\.0150 nats"),
        (1.0, 2.9205, r"does not hold: .* tau = 1 ends \+0\.0205 nats"),
        (1.06, 2.9, r"does not hold: .* at most \+6\.0% .*\(tau 1\)"),
    ],
)
def test_the_verdict(experts, loss, said):
    rows = ROWS + run("tau 1", 1.0, experts, loss)
    assert re.search(rf"\) {said}", upcycling.verdict(upcycling.by_run(rows)))


@pytest.mark.slow
def test_the_sweep(tmp_path):
    vanilla = {"moe.n_const": 0, "moe.n_copy": 0, "moe.n_zero": 0, "moe.rule.residual": "none"}
    source, silent = tmp_path / "source", {"report": lambda line: None}
    config = tiny.config(**vanilla, **{"data.dir": str(tmp_path / "data")})
    train(config, source, **silent)

    settings = upcycling.Settings(steps=6, lr=1e-3, bias_rate=10.0)
    folders = (source, tmp_path / "runs", tmp_path / "docs")
    rows = upcycling.upcycling(*folders, [0.5], settings, **silent)
    by_run = upcycling.by_run(rows)
    assert list(by_run) == ["control", "tau 0.5"]
    for points in by_run.values():  # the same function, then trained
        assert [p["step"] for p in points] == list(range(7))
        assert points[0]["ffn_experts_per_token"] == 2
        assert points[1]["eval_loss"] == pytest.approx(points[0]["eval_loss"], abs=0.1)
    assert by_run["control"][-1]["ffn_experts_per_token"] == pytest.approx(2)
    assert min(p["ffn_experts_per_token"] for p in by_run["tau 0.5"]) < 1.5

    with (tmp_path / "docs" / "upcycling.csv").open() as lines:
        assert len(list(csv.DictReader(lines))) == len(rows) == 14
    assert {f.name for f in folders[2].iterdir()} == {
        "upcycling.csv",
        "upcycling.png",
        "README.md",
    }
    # Kept rows need no runs any more.
    again = upcycling.upcycling(source, tmp_path / "none", folders[2], [0.5], settings, **silent)
    assert [row["step"] for row in again] == [row["step"] for row in rows]
    assert not (tmp_path / "none").exists()
