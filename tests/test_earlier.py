"""A run of an earlier version is read as it is, and goes on as that version would have."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import moepp_jax
from moepp_jax.evaluate import evaluate_run
from moepp_jax.train import train
from moepp_jax.workdir import read_config

# Stopped after 4 of 8 steps, before routing rules were a part of the configuration. It has logit
# normalisation, a bias that moves, and drops.
BEFORE_RULES = Path(__file__).parent / "data" / "before_rules"
# What that version's step 8 said of the held-out text when it had gone on itself.
LOSS = 5.982412073734033
LOAD = [
    [0.2176567, 0.4836005, 0.1295553, 0.0829081, 0.4409620, 0.3899416, 0.2553754],
    [0.2424380, 0.2141034, 0.4105320, 0.2656705, 0.3472120, 0.1749271, 0.3451166],
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    shutil.copytree(BEFORE_RULES, tmp_path / "run")
    fields = json.loads((tmp_path / "run" / "config.json").read_text())
    fields["data"]["dir"] = str(tmp_path / "data")
    (tmp_path / "run" / "config.json").write_text(json.dumps(fields))
    return tmp_path / "run"


def test_options_of_a_rule_were_fields_once(folder):
    rule = read_config(folder).moe.rule
    assert (rule.top_k, rule.tau, rule.logit_norm) == (2, 0.75, 0.8)
    assert (rule.bias_rate, rule.z_weight, rule.balance_weight) == (0.1, 1e-3, 0.01)
    assert moepp_jax.load(folder).generate("The river", max_new_tokens=3) is not None


def test_it_goes_on_as_it_would_have(folder, monkeypatch):
    monkeypatch.setattr("moepp_jax.mesh.jax.devices", lambda: jax.local_devices()[:1])
    before = (folder / "config.json").read_bytes()
    config = read_config(folder)
    assert train(config, folder, report=lambda line: None).step == 8
    assert (folder / "config.json").read_bytes() == before
    found = evaluate_run(config, folder, 8)
    assert found["eval_loss"] == pytest.approx(LOSS, rel=1e-6)
    np.testing.assert_allclose(found["eval_load"], LOAD, atol=1e-6)
