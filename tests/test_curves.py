"""The figure of training curves: what is drawn where, without JAX."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from rich.console import Console

from moepp_jax.analysis import curves
from moepp_jax.commands import curves as command
from moepp_jax.errors import ConfigError
from moepp_jax.metrics import MetricsWriter
from tests import tiny


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with MetricsWriter(folder) as metrics:
        metrics.write(5, eval_loss=6.0)
        for step in (10, 20, 30):
            loss = np.nan if step == 20 else 5.0
            values = {"ffn_experts_per_token": 1.2, "drop_rate": 0.02}
            metrics.write(step, loss=loss, tokens=step * 100, **values)
        metrics.write(25, eval_loss=4.5)
    return folder


def test_curves_stand_at_the_tokens_seen(workdir, tmp_path, monkeypatch):
    figures = []
    save = curves._save
    monkeypatch.setattr(
        curves, "_save", lambda figure, out: (figures.append(figure), save(figure, out))[1]
    )
    out = curves.plot_curves(
        {"MoE++": workdir}, tmp_path / "new" / "curves.png", references={"unigram": 6.5}
    )
    assert out.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in out.parent.iterdir()] == ["curves.png"]
    loss, experts, drops = figures[0].axes
    training, held_out = loss.lines[0], loss.lines[1]
    np.testing.assert_array_equal(training.get_xydata()[:, 0], [1000, 2000, 3000])
    np.testing.assert_array_equal(training.get_xydata()[:, 1], [5, np.nan, 5])
    np.testing.assert_array_equal(held_out.get_xydata(), [[500, 6.0], [2500, 4.5]])
    assert 6.5 in [line.get_ydata()[0] for line in loss.lines if len(line.get_ydata())]
    assert "MoE++" in [text.get_text() for text in loss.get_legend().get_texts()]
    assert experts.lines[0].get_ydata().tolist() == [1.2] * 3
    assert drops.lines[0].get_ydata().tolist() == [0.02] * 3


def test_one_row_of_training_is_a_point(tmp_path, monkeypatch):
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(9, loss=5.0, tokens=900, ffn_experts_per_token=1.2, drop_rate=0.02)
    figures = []
    monkeypatch.setattr(curves, "_save", lambda figure, out: figures.append(figure) or out)
    curves.plot_curves({"mine": tmp_path}, tmp_path / "a.png")
    assert [axes.lines[0].get_marker() for axes in figures[0].axes] == ["."] * 3


def test_a_run_without_training_rows_is_named(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(0, eval_loss=9.0)
    with pytest.raises(ValueError, match=rf"{tmp_path} \(mine\) has no training row"):
        curves.plot_curves({"mine": tmp_path}, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_analysis_needs_no_jax():
    code = "import sys, moepp_jax.analysis.curves; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(autouse=True)
def parsed():
    flags.FLAGS.mark_as_parsed()


@pytest.fixture
def seeds(tmp_path, workdir):
    """Two runs as `train` leaves them."""
    folders = [tmp_path / "s0", tmp_path / "s1"]
    for folder, loss in zip(folders, (4.0, 4.5), strict=True):
        shutil.copytree(workdir, folder)
        (folder / "config.json").write_text(tiny.config().to_json())
        with MetricsWriter(folder) as metrics:
            metrics.write(30, eval_loss=loss, eval_ffn_experts_per_token=1.25)
    return [str(folder) for folder in folders]


def test_runs_of_a_label_have_a_mean_and_a_colour(seeds, tmp_path, monkeypatch, capsys):
    figures = []
    save = curves._save
    monkeypatch.setattr(
        curves, "_save", lambda figure, out: figures.append(figure) or save(figure, out)
    )
    monkeypatch.setattr(command, "Console", lambda **options: Console(width=400, **options))
    with flagsaver.flagsaver(figure=str(tmp_path / "c.png")):
        command.run([f"rule={seeds[0]}", f"rule={seeds[1]}", seeds[0]])
    said = capsys.readouterr().out
    assert re.search(rf"rule +{seeds[0]} +30 +4.0000 +1.25", said)
    assert "mean of 2" in said and "4.2500 (from 4.0000 to 4.5000)" in said
    assert (tmp_path / "c.png").exists() and "c.png" in said
    held_out = [line for line in figures[0].axes[0].lines if 4.5 in line.get_ydata()]
    assert {line.get_color() for line in held_out[:2]} == {"C0"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no run was given: write curves runs/NAME"),
        (["no"], "workdir no is no folder"),
        (["a=no"], "workdir no is no folder"),
    ],
)
def test_what_is_no_run_is_named(arguments, said, tmp_path):
    with (
        flagsaver.flagsaver(figure=str(tmp_path / "c.png")),
        pytest.raises(ConfigError, match=said),
    ):
        command.run(arguments)
    assert not (tmp_path / "c.png").exists()


def test_a_run_that_trained_nothing_yet_and_a_figure_that_is_none(seeds, tmp_path):
    (tmp_path / "s0" / "metrics.jsonl").unlink()
    with pytest.raises(
        ConfigError, match=r"s0 has trained nothing yet: there is no .*metrics.jsonl"
    ):
        command.labelled(seeds)
    with (
        flagsaver.flagsaver(figure="curves.pdf"),
        pytest.raises(ConfigError, match=r"--figure=curves.pdf must be the name of a .png file"),
    ):
        command.run(seeds)
