"""What a run is known by, and which runs an experiment needs."""

import dataclasses

import pytest

from moepp_jax.errors import ConfigError
from moepp_jax.experiments import runs
from moepp_jax.experiments.scale import Variant
from moepp_jax.experiments.scale import find as find_scale
from tests import tiny
from tests.experiments import small

COSMETIC = {
    "mesh": {"data": 1},
    "data": {"dir": "elsewhere", "worker_processes": 3},
    "train": {"log_every": 7, "save_every": 9, "keep": 5, "local_every": 2, "hang_seconds": 0.0},
    "generate": {"seed": 3},
}
OF_WHAT_IS_COMPUTED = {
    "moe.rule": {"tau": 0.5},
    "moe": {"n_const": 1},
    "model": {"const_std": 0.5},
    "optim": {"lr": 1.0},
    "train": {"eval_batches": 3},
    "data": {"seq_len": 16},
}


def test_a_fingerprint_is_of_what_is_computed(monkeypatch):
    config = tiny.config()
    own = runs.fingerprint(config)
    for group, fields in COSMETIC.items():
        assert runs.fingerprint(config.replace(group, **fields)) == own, group
    assert runs.fingerprint(dataclasses.replace(config, seed=5)) == own
    others = [
        runs.fingerprint(config.replace(group, **f)) for group, f in OF_WHAT_IS_COMPUTED.items()
    ]
    assert len({own, *others}) == 1 + len(others)
    monkeypatch.setattr(runs, "NUMERICS", -1)
    assert runs.fingerprint(config) != own


def test_a_field_that_is_added_makes_no_row_a_stranger(monkeypatch):
    """Where it has the value that stands for its absence."""
    from moepp_jax import earlier

    config = tiny.config()
    own = runs.fingerprint(config)
    later = {name: value for name, value in earlier._LATER.items() if name != "model.const_std"}
    monkeypatch.setattr(earlier, "_LATER", later)
    assert runs.fingerprint(config) != own  # it is known as a later one by that table alone
    monkeypatch.setattr(earlier, "_LATER", later | {"model.const_std": 1.0})
    assert runs.fingerprint(config) == own


def test_each_run_is_planned_once_and_seeds_come_round_by_round():
    one = Variant("one", tiny.config(), 3)
    same = Variant("another name", tiny.config(**{"train.keep": 4}), 2)
    other = Variant("other", tiny.config(**{"moe.rule.tau": 0.5}), 2)
    planned = runs.plan([one, same, other])
    assert [run.config.seed for run in planned] == [0, 0, 1, 1, 2]
    assert len({run.key for run in planned}) == len({run.folder for run in planned}) == 5
    assert [run.config.seed for run in runs.plan([one, other], seeds=1)] == [0, 0]
    left = runs.missing(planned, [planned[0].key, ("00000000", 0)])
    assert left == planned[1:]


def test_changes_are_said_as_fields():
    scale = small.scale()
    assert runs.changes(scale.variant("usual").config, scale) == ""
    of_tau = scale.variant("tau", fields={"moe.rule.tau": 0.25, "train.keep": 9})
    assert runs.changes(of_tau.config, scale) == "moe.rule.tau=0.25"
    said = runs.changes(scale.routed_by("longcat").config, scale).split()
    assert {"moe.n_copy=4", "moe.rule.type=longcat", "moe.rule.rate_decay=0.9995"} <= set(said)


def test_a_scale_that_does_not_exist():
    with pytest.raises(
        ConfigError, match=r"--scale=tinny: there is no such scale; did you mean tiny"
    ):
        find_scale("tinny")
    with pytest.raises(ConfigError, match=r"--scale=x: .* there are tiny, small, paper"):
        find_scale("x")
