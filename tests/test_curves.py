"""The figure of training curves: what is drawn where, without JAX."""

import subprocess
import sys

import numpy as np
import pytest

from moepp_jax.analysis import curves
from moepp_jax.metrics import MetricsWriter


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with MetricsWriter(folder) as metrics:
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
    training, held_out = loss.lines[0], loss.lines[2]
    np.testing.assert_array_equal(training.get_xydata()[:, 0], [1000, 2000, 3000])
    np.testing.assert_array_equal(training.get_xydata()[:, 1], [5, np.nan, 5])
    np.testing.assert_array_equal(held_out.get_xydata(), [[2500, 4.5]])
    assert 6.5 in [line.get_ydata()[0] for line in loss.lines if len(line.get_ydata())]
    assert "MoE++" in [text.get_text() for text in loss.get_legend().get_texts()]
    assert experts.lines[0].get_ydata().tolist() == [1.2] * 3
    assert drops.lines[0].get_ydata().tolist() == [0.02] * 3


def test_a_run_without_training_rows_is_named(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(0, eval_loss=9.0)
    with pytest.raises(ValueError, match=rf"{tmp_path} \(mine\) has no training row"):
        curves.plot_curves({"mine": tmp_path}, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_analysis_needs_no_jax():
    code = "import sys, moepp_jax.analysis.curves; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
