"""One door for configurations: what does not fit is told in one error, before anything runs."""

import dataclasses
import json
import math
from typing import get_args, get_origin, get_type_hints

import numpy as np
import pytest

from moepp_jax import config as config_lib
from moepp_jax import limits
from moepp_jax.config import Config, differences
from moepp_jax.configs import base, tiny
from moepp_jax.errors import ConfigError
from moepp_jax.moe import Rule, rules
from tests import tiny as small


def fields(**changes) -> dict:
    """The tiny configuration as a dictionary, with the fields of dotted names set."""
    tree = small.config().to_dict()
    for name, value in changes.items():
        *groups, leaf = name.split(".")
        node = tree
        for group in groups:
            node = node[group]
        node[leaf] = value
    return tree


def refused(tree) -> str:
    with pytest.raises(ConfigError) as error:
        Config.parse(tree)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_base_names_every_field_once():
    def names(cls):
        return {name: below(kind) for name, kind in get_type_hints(cls).items()}

    def below(kind):
        if get_origin(kind) is config_lib.Named:
            return {"text": below(get_args(kind)[1])}  # the name that the base has
        if kind is Rule:
            return dict.fromkeys(["type", *rules.find("moepp").options()])
        return names(kind) if dataclasses.is_dataclass(kind) else None

    def keys(tree):
        return {k: keys(v) if isinstance(v, dict) else None for k, v in tree.items()}

    assert keys(base.get_config().to_dict()) == names(Config)


def test_a_configuration_comes_back_from_its_json():
    config = Config.parse(tiny.get_config())
    assert Config.parse(json.loads(config.to_json())) == config
    assert hash(config) == hash(Config.parse(tiny.get_config()))


def test_whole_numbers_are_numbers():
    config = Config.parse(fields(**{"moe.gamma": 2}))
    assert type(config.moe.gamma) is float


def test_unknown_field_is_named_with_its_likeliest_meaning():
    said = refused(fields(**{"moe.tua": 0.5}))
    assert said == "unknown field config.moe.tua = 0.5: did you mean moe.rule.tau?"
    said = refused(fields(**{"moe.warmup_steps": 5}))
    assert said == "unknown field config.moe.warmup_steps = 5: did you mean optim.warmup_steps?"
    said = refused(fields(**{"mesh.zebra": 1}))
    assert said == "unknown field config.mesh.zebra = 1: there are data, fsdp, expert"
    assert "unknown field config.mode = {}: did you mean mode" in refused(fields(mode={}))


def test_missing_field_and_missing_group():
    tree = fields()
    del tree["optim"]["eps"]
    assert refused(tree) == "config.optim.eps is missing: configs/base.py has a value"
    tree = fields()
    del tree["optim"]
    assert refused(tree) == "config.optim is missing: configs/base.py has a value"
    tree = fields()
    del tree["data"]["sources"]["text"]["weight"]
    assert refused(tree).startswith(
        "config.data.sources.text.weight is missing: configs/base.py makes sources: base.source("
    )


# name, value, what the message says besides both.
WRONG = [
    # types
    ("seed", 1.5, "must be of type int"),
    ("seed", True, "must be of type int"),
    ("seed", None, "must be of type int"),
    ("seed", 2**32, "must be at least 0 and less than 2**32"),
    ("generate.seed", -1, "must be at least 0 and less than 2**32"),
    ("model.dtype", 32, "must be of type str"),
    ("model.tied_embeddings", 1, "must be of type bool"),
    ("moe.rule.tau", "0.5", "must be of type float"),
    ("moe", 3, "must be a group of fields"),
    ("optim.lr", math.nan, "must be finite"),
    ("optim.clip_norm", math.inf, "must be finite"),
    # choices
    ("model.dtype", "int8", "must be one of 'float32', 'bfloat16'"),
    ("model.remat", "all", "must be one of 'none', 'qkv', 'residual', 'w_in'"),
    ("moe.dispatch", "dropfull", "must be one of 'capacity', 'dropless'"),
    ("moe.eval_dispatch", "", "must be one of 'capacity', 'dropless'"),
    ("optim.schedule", "wsd", "must be one of 'cosine', 'linear', 'constant'"),
    ("moe.rule.gate", "softmax", "must be one of 'raw', 'renormalise_all'"),
    ("moe.rule.residual", "probs", "must be one of 'logits', 'detached', 'none'"),
    ("moe.rule.router_layers", 3, "must be one of 1, 2"),
    # ranges
    ("moe.rule.tau", 0.0, "must be greater than 0 and at most 1"),
    ("moe.rule.tau", 1.5, "must be greater than 0 and at most 1"),
    ("moe.gamma", 0.0, "must be greater than 0"),
    ("moe.gamma", -1.0, "must be greater than 0"),
    ("moe.rule.top_k", 0, "must be at least 1"),
    ("data.eval_fraction", 0.0, "must be greater than 0 and at most 0.5"),
    ("optim.beta1", 1.0, "must be at least 0 and less than 1"),
    ("optim.beta2", -0.5, "must be at least 0 and less than 1"),
    ("optim.final_lr_ratio", 1.5, "must be from 0 to 1"),
    ("optim.decay_steps", -1, "must be at least 0"),
    ("train.steps", 0, "must be at least 1"),
    ("train.first_batch", -1, "must be at least 0"),
    ("moe.exchange_parts", 0, "must be at least 1"),
    ("train.keep", 0, "must be at least 1"),
    ("train.local_every", 0, "must be at least 1"),
    ("train.local_dir", "gs://bucket/local", "must be a folder on each host's own disk"),
    ("generate.temperature", -1.0, "must be at least 0"),
    ("generate.top_p", 0.0, "must be greater than 0 and at most 1"),
    ("generate.min_p", 1.0, "must be at least 0 and less than 1"),
    ("generate.repetition_penalty", 0.0, "must be greater than 0"),
    ("generate.max_new_tokens", 0, "must be at least 1"),
    ("mesh.fsdp", 0, "must be at least 1, or -1"),
    ("mesh.data", -2, "must be at least 1, or -1"),
    # contradictions
    (
        "moe.rule.top_k",
        13,
        "is more than the 12 experts there are (8 FFN + 2 constant + 1 copy + 1",
    ),
    ("moe.group_size", 12, "must divide config.data.seq_len = 32, or be a multiple of it"),
    ("moe.group_size", 48, "must divide config.data.seq_len = 32, or be a multiple of it"),
    ("model.loss_chunk", 12, "must divide config.data.seq_len = 32"),
    ("model.num_heads", 3, "must divide config.model.hidden_size = 32"),
    ("model.num_heads", 32, "makes heads 1 wide, and rotary positions need an even width"),
    ("model.num_kv_heads", 3, "must divide config.model.num_heads = 4"),
    ("model.num_kv_heads", 8, "must divide config.model.num_heads = 4"),
    ("model.moe_every", 3, "must divide config.model.num_layers = 2"),
    ("train.accumulate", 3, "must divide config.train.batch_size = 8"),
    ("optim.decay_steps", 3, "is of config.optim.schedule = 'constant', and it is 'cosine': set"),
    ("mesh.expert", 3, "must divide the FFN experts, config.moe.n_ffn = 8"),
]


@pytest.mark.parametrize(("name", "value", "remedy"), WRONG, ids=lambda x: str(x)[:24])
def test_a_wrong_value_is_named_with_its_remedy(name, value, remedy):
    said = refused(fields(**{name: value}))
    assert said.startswith(f"config.{name} = {value!r} ") and remedy in said


def test_warm_up_and_decay_fit_into_the_steps():
    wsd = {"optim.schedule": "constant", "optim.warmup_steps": 2, "train.steps": 6}
    Config.parse(fields(**wsd, **{"optim.decay_steps": 4}))
    said = refused(fields(**wsd, **{"optim.decay_steps": 5}))
    assert said.startswith(
        "config.optim.decay_steps = 5 and config.optim.warmup_steps = 2 must fit"
    )
    assert "into config.train.steps = 6: lower one of them" in said


def test_one_expert_has_no_deviation_to_divide_by():
    alone = {
        "moe.n_ffn": 1,
        "moe.n_const": 0,
        "moe.n_copy": 0,
        "moe.n_zero": 0,
        "moe.rule.top_k": 1,
    }
    Config.parse(fields(**alone))
    said = refused(fields(**alone, **{"moe.rule.logit_norm": 1.0}))
    assert said.startswith("config.moe.rule.logit_norm = 1.0 needs at least two experts")


def test_every_number_has_a_bound_and_every_text_that_is_a_choice_its_choices():
    """A field added without a check would let nonsense through to the compiler."""
    free = {"data.sources", "data.dir", "data.tfds_dir", "data.tokenizer"}
    free |= {"model.tied_embeddings", "train.local_dir"}
    free |= {"moe.rule", "moe.n_ffn", "moe.n_const", "moe.n_copy", "moe.n_zero"}  # see `_rule`
    by_hand = {"mesh.data", "mesh.fsdp", "mesh.expert", "optim.final_lr_ratio"}
    checked = {*limits.CHOICES, *limits.AT_LEAST, *limits.WITHIN, *limits.BELOW}
    tree = small.config().to_dict()
    options = dataclasses.fields(rules.find("moepp"))
    assert all(field.metadata for field in options if field.name != "pool")
    names = {"seed"} | {f"{g}.{n}" for g, group in tree.items() if g != "seed" for n in group}
    assert names == checked | free | by_hand


def test_sources_are_groups_under_names_of_the_users_own():
    def of(**weights):
        named = {n: {"path": n, "weight": w, "text_field": "text"} for n, w in weights.items()}
        return fields(**{"data.sources": named})

    assert list(Config.parse(of(books=1.0, web=2)).data.sources) == ["books", "web"]
    assert refused(of(books=-1.0)) == "config.data.sources.books.weight = -1.0 must be at least 0"
    assert "the weights of books, web are all 0" in refused(of(books=0, web=0))
    assert "config.data.sources = {} must be groups of fields, at least one" in refused(of())
    assert "config.data.sources.books.pth" in refused(
        fields(**{"data.sources": {"books": {"pth": "x"}}})
    )


def test_numpy_numbers_are_refused_with_their_type():
    assert "must be of type float" in refused(fields(**{"moe.rule.tau": np.float32(0.5)}))


def test_differences_names_leaves_with_both_values():
    a, b = fields(), fields(**{"moe.rule.tau": 0.5, "seed": 3})
    del b["train"]["keep"]
    assert differences(a, b) == {
        "moe.rule.tau": (0.75, 0.5),
        "seed": (0, 3),
        "train.keep": (2, None),
    }
    assert differences(a, a) == {}


def test_a_whole_number_may_be_too_large_for_a_real_one():
    fields = tiny.get_config().to_dict()
    fields["optim"]["lr"] = 10**400
    with pytest.raises(ConfigError, match=r"config\.optim\.lr is a number above 1e308"):
        Config.parse(fields)
