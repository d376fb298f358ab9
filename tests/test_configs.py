"""Every recipe builds, and the paper's have the paper's parameter counts."""

import dataclasses
import importlib
from pathlib import Path

import jax
import pytest

from moepp_jax import flops, mesh, optim, state
from moepp_jax.config import Config
from moepp_jax.configs import moepp_7b, run
from moepp_jax.configs import moepp_7b_1t as first_1t
from moepp_jax.configs import moepp_7b_1t_final as last_1t
from moepp_jax.configs.data import paper_mixture
from moepp_jax.data.mixture import Mixture
from moepp_jax.data.prepare import prepare_sources
from moepp_jax.errors import ConfigError
from moepp_jax.moe.param import path_of
from moepp_jax.workdir import open_workdir

# Billions of parameters, total and active at most (paper, table 2).
PAPER = {
    "moepp_0p6b": (0.582, 0.242),
    "moepp_1b": (1.035, 0.242),
    "moepp_2b": (1.941, 0.242),
    "moepp_7b": (7.676, 1.334),
}
# The 1T tokens of the 7B model.
LONG = ("moepp_7b_1t", "moepp_7b_1t_final")
FILES = sorted(
    p.stem
    for p in (Path(__file__).parents[1] / "configs").glob("*.py")
    if p.stem not in ("__init__", "base", "run")
)


def recipe(name: str) -> Config:
    return Config.parse(importlib.import_module(f"moepp_jax.configs.{name}").get_config())


def count(config: Config) -> int:
    """By hand, from the paper's shapes."""
    m, e = config.model, config.moe
    D, N = m.hidden_size, e.num_experts
    attention = 2 * D * m.head_width * (m.num_heads + m.num_kv_heads)
    experts = e.n_ffn * 3 * D * e.ffn_size + e.n_const * 3 * D
    router = N * D + (N * N if e.rule.residual != "none" else 0)
    embeddings = m.vocab_size * D * (1 if m.tied_embeddings else 2)
    return embeddings + m.num_layers * (attention + 2 * D + experts + router) + D


def test_all_recipes_are_found():
    vanilla = {name.replace("moepp", "moe") for name in PAPER}
    assert set(FILES) == set(PAPER) | vanilla | set(LONG) | {"tiny", "english"}


def test_the_recipe_of_a_run_is_that_of_its_folder(tmp_path):
    config = recipe("tiny")
    assert Config.parse(run.get_config(str(open_workdir(tmp_path, config)))) == config


@pytest.mark.parametrize("name", FILES)
def test_builds_and_is_counted(name):
    config = recipe(name)
    assert flops.parameters(config).total == count(config)


@pytest.mark.parametrize("name", PAPER)
def test_paper_sizes(name):
    total, active = flops.parameters(recipe(name))
    assert total / 1e9 == pytest.approx(PAPER[name][0], rel=1e-3)
    assert active / 1e9 == pytest.approx(PAPER[name][1], abs=1e-3)  # given to three digits


@pytest.mark.parametrize("name", FILES)
def test_every_parameter_and_moment_has_its_place(name):
    config = recipe(name).replace("mesh", data=-1, fsdp=2, expert=4)
    devices = mesh.make_mesh(config)
    abstract = state.assemble(config, devices).abstract
    specs = {
        path_of(path): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.params)
    }
    assert any("expert" in spec for spec in specs.values())
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.opt_state):
        name = path_of(path)
        match = [spec for key, spec in specs.items() if name.endswith("/" + key)]
        assert leaf.ndim == 0 or [leaf.sharding.spec] == match


@pytest.mark.parametrize("name", PAPER)
def test_vanilla_twin(name):
    moepp, moe = recipe(name), recipe(name.replace("moepp", "moe"))
    assert moe.moe.num_experts == moe.moe.n_ffn == moepp.moe.n_ffn
    same = dataclasses.replace(moe.model, remat=moepp.model.remat)  # it has less memory to spare
    assert same == moepp.model and moe.train == moepp.train
    assert flops.cost_ratio(moe, moe) == 1
    assert flops.cost_ratio(moepp, moe) == pytest.approx(moepp.moe.rule.ffn_load / 2)


def test_the_papers_models_train_on_its_mixture():
    for name in FILES:
        if name not in ("tiny", "english"):
            module = importlib.import_module(f"moepp_jax.configs.{name}")
            sources = Config.parse(module.get_config("/mnt/corpora")).data.sources
            assert sources["redpajama_books"].path == "/mnt/corpora/redpajama/book"
            assert sources["dolma"].weight == (41.53 if name == LONG[1] else 61.28)
            assert set(recipe(name).data.sources) == {"text"}
    for weights in paper_mixture.WEIGHTS:
        of_source = [s["weight"] for s in paper_mixture.sources("/x", weights).values()]
        assert sum(of_source) == pytest.approx(100) and len(of_source) == 7


def test_a_trillion_tokens_are_two_runs_of_one_model():
    first, last = (Config.parse(moepp.get_config("/corpora")) for moepp in (first_1t, last_1t))
    base_recipe = recipe("moepp_7b")
    assert first.model == last.model == base_recipe.model
    assert first.moe == last.moe == base_recipe.moe
    for config, tokens, warm_up, rates in (
        (base_recipe, 100e9, 2000, (5e-4, 5e-5)),  # strategies 1, 2 and 3
        (first, 900e9, 500, (5e-4, 5e-5)),
        (last, 100e9, 200, (1e-4, 1e-5)),
    ):
        batch = config.train.batch_size * config.data.seq_len
        assert 0 <= config.train.steps * batch - tokens < batch
        rate = optim.schedule(config)
        assert (config.optim.schedule, config.optim.warmup_steps) == ("cosine", warm_up)
        said = [float(rate(step)) for step in (0, warm_up, config.train.steps)]
        assert said == pytest.approx([1e-7, *rates], rel=1e-4)


def test_the_last_tokens_are_new_ones_of_every_source():
    first, last = (Config.parse(moepp.get_config("/corpora")) for moepp in (first_1t, last_1t))

    def read(config, steps):
        mixture = Mixture({n: s.weight for n, s in config.data.sources.items()})
        return mixture.counts(steps * config.train.batch_size)

    before, start = read(first, first.train.steps), read(last, last.train.first_batch)
    assert all(start[name] >= before[name] for name in before)
    assert any(start[name] < 1.001 * before[name] for name in before)


def test_a_corpus_that_is_not_there_is_named_with_its_place(tmp_path):
    fields = moepp_7b.get_config(str(tmp_path / "corpora"))
    fields.data.dir = str(tmp_path / "data")
    missing = rf"sources\.dolma\.path = '{tmp_path}/corpora/dolma' does not exist"
    with pytest.raises(ConfigError, match=missing):
        prepare_sources(Config.parse(fields), report=lambda line: None)


# FFN experts a token for tau .10 to 1.0 (paper, section 3.4).
@pytest.mark.parametrize(
    ("n_ffn", "others", "expected"),
    [
        (8, (2, 1, 1), [0.333, 0.667, 1.000, 1.200, 1.333]),
        (16, (2, 1, 1), [0.571, 1.000, 1.333, 1.500, 1.600]),
        (32, (6, 1, 1), [0.571, 1.000, 1.333, 1.500, 1.600]),
    ],
)
def test_ffn_experts_at_balance(n_ffn, others, expected):
    fields = recipe("moepp_0p6b").to_dict()
    fields["moe"] |= dict(zip(("n_const", "n_copy", "n_zero"), others, strict=True), n_ffn=n_ffn)
    got = []
    for tau in (0.1, 0.25, 0.5, 0.75, 1.0):
        fields["moe"]["rule"]["tau"] = tau
        got.append(Config.parse(fields).moe.rule.ffn_load)
    assert got == pytest.approx(expected, abs=5e-4)


def test_flops_follow_the_parameters():
    config = recipe("moepp_1b")
    f = flops.per_token(config, ffn_experts=float(config.moe.rule.top_k))
    scores = config.model.num_layers * 4 * config.data.seq_len * config.model.hidden_size
    embedding = config.model.vocab_size * config.model.hidden_size
    active = flops.parameters(config).active - embedding
    # Two operations a parameter that a token passes through; norms and W_c's vectors are the rest.
    assert f.forward - scores == pytest.approx(2 * active, rel=1e-3)


def test_executed_experts_count_the_padding():
    config = recipe("moepp_0p6b")
    assert flops.executed_ffn_experts(config) == pytest.approx(
        config.moe.gamma * config.moe.rule.ffn_load, rel=1e-2
    )


def test_utilisation():
    assert flops.utilisation(459e12, "TPU v5p", 2) == 0.5
    assert flops.utilisation(1e12, "cpu", 1) is None
