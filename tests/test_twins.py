"""The main job in small: both models trained, compared and shown."""

import io
import json
import math

import pytest
from rich.console import Console

from moepp_jax import seal
from moepp_jax.config import Config
from moepp_jax.configs import tiny as recipes
from moepp_jax.errors import ConfigError
from moepp_jax.experiments import twins
from tests import tiny


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("twins")
    recipe = recipes.get_config()
    small = {"data.dir": str(workdir / "data"), "train.steps": 4, "optim.lr": 1e-4}
    recipe.update_from_flattened_dict(tiny.CHANGES | small)
    said = []
    return workdir, recipe, twins.twins(recipe, workdir, said.append), said


def test_summary(job):
    workdir, recipe, summary, _ = job
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert set(summary["held_out_loss"]) == {"moepp", "moe", "unigram", "bigram", "trigram"}
    guessing = math.log(recipe.model.vocab_size)
    for name in twins.TWINS:  # hardly trained
        assert summary["held_out_loss"][name] == pytest.approx(guessing, abs=1)
    assert summary["ffn_experts_per_token"]["moe"] == pytest.approx(recipe.moe.rule.top_k)
    assert 0 < summary["ffn_experts_per_token"]["moepp"] < recipe.moe.rule.top_k
    seconds = summary["expert_forward_seconds"]
    assert summary["time_ratio"] == seconds["moepp"] / seconds["moe"]
    for name in twins.TWINS:
        rate = summary["tokens_per_s"][name]
        batch = recipe.train.batch_size * recipe.data.seq_len
        assert rate == pytest.approx(batch / summary["step_seconds"][name])
    e = recipe.moe
    ffn = e.rule.tau * e.n_ffn
    assert summary["theory"] == pytest.approx(ffn / (ffn + e.n_const + e.n_copy + e.n_zero))


def test_files(job):
    workdir, *_ = job
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = (workdir / "sample.txt").read_text()
    assert all(prompt in text for prompt in twins.PROMPTS)
    analysis = workdir / "moepp" / "analysis"
    assert "</html>" in (analysis / "page.html").read_text()
    assert "# Routing of moepp" in (analysis / "REPORT.md").read_text()


def test_table(job):
    workdir, _, summary, _ = job
    console = Console(width=120, record=True, file=io.StringIO())
    twins.show(summary, workdir, console)
    shown = console.export_text()
    for word in ("MoE++", "vanilla MoE", "unigram", "trigram", "curves.png", "sample.txt"):
        assert word in shown
    assert f"{summary['held_out_loss']['moepp']:.3f}" in shown


def test_twins_differ_in_the_pool_alone(job):
    workdir, *_ = job
    written = {n: json.loads((workdir / n / "config.json").read_text()) for n in twins.TWINS}
    configs = {name: seal.opened(fields) for name, fields in written.items()}
    assert configs["moepp"]["data"] == configs["moe"]["data"]
    assert configs["moepp"]["train"] == configs["moe"]["train"]
    assert configs["moepp"]["model"] == configs["moe"]["model"]
    moe = Config.parse(configs["moe"]).moe
    assert (moe.n_const, moe.n_copy, moe.n_zero, moe.n_ffn) == (
        0,
        0,
        0,
        configs["moepp"]["moe"]["n_ffn"],
    )


def test_a_finished_job_is_not_trained_again(job, monkeypatch):
    workdir, recipe, _, _ = job
    monkeypatch.setattr(twins, "sample", lambda folder: "")
    monkeypatch.setattr(twins, "show_routing", lambda config, folder: folder)
    before = {f: f.read_bytes() for f in workdir.glob("*/metrics.jsonl")}
    twins.twins(recipe, workdir, lambda text: None)
    assert len(before) == 2 and before == {f: f.read_bytes() for f in before}


def test_another_recipe_is_refused(job):
    workdir, recipe, _, _ = job
    other = recipe.copy_and_resolve_references()
    other.moe.rule.tau = 0.25
    with pytest.raises(ConfigError, match=r"moe\.rule\.tau"):
        twins.twins(other, workdir, lambda text: None)
