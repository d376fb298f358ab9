"""config.json as earlier versions of this project wrote it, read as this one means it.

A field that came later stands here, with the value at which a run computes what it did before the
field was there. One that is missing and does not stand here has no such value: it is an error.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

_LATER = {
    "model.head_dim": 0,
    "model.qk_norm": "none",
    "model.rope_type": "linear",
    "model.rope_scaling": 1.0,
    "model.rope_low_freq_factor": 1.0,
    "model.rope_high_freq_factor": 4.0,
    "model.rope_original_length": 8192,
    "model.sliding_window": 0,
    "model.const_std": 1.0,
    "model.attention": "auto",
    "moe.exchange_buffer": 0.0,
    "moe.exchange_parts": 1,
    "data.tfds_dir": "",
    "data.worker_processes": 0,
    "optim.schedule": "cosine",
    "optim.decay_steps": 0,
    "train.first_batch": 0,
    "train.on_save_error": "stop",
    "train.local_dir": "",
    "train.local_every": 100,
    "train.on_nonfinite": "stop",
    "train.max_skipped": 10,
    "train.skip_above": 0.0,
    "train.hang_factor": 10.0,
    "train.hang_seconds": 300.0,
    "generate.min_p": 0.0,
    "generate.repetition_penalty": 1.0,
}

# Fields of the group moe before there were rules, which are options of the rule "moepp" now.
_OPTIONS = ("top_k", "tau", "router_layers", "residual", "gate", "balance_weight", "bias_rate")
_OPTIONS += ("z_weight",)


def completed(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields as they are called now, and what was put there, as "moe.rule.bias_rate = 0.0"."""
    fields = copy.deepcopy(dict(fields))
    later = dict(_LATER)
    data, moe = fields.get("data"), fields.get("moe")
    if isinstance(data, dict) and "corpus" in data and "sources" not in data:
        path = data.pop("corpus")  # the one source there was
        later["data.sources"] = {"text": {"path": path, "weight": 1.0, "text_field": "text"}}
    if isinstance(moe, dict) and "rule" not in moe:
        fields["moe"] = with_rule(moe)
        later["moe.rule.bias_rate"] = 0.0  # the one option that came later than that
    added = []
    for name, value in later.items():
        *groups, field = name.split(".")
        group = fields
        for part in groups:
            group = group.get(part) if isinstance(group, dict) else None
        if isinstance(group, dict) and field not in group:
            group[field] = value
            added.append(f"{name} = {value!r}")
    return fields, added


def with_rule(moe: Mapping[str, Any]) -> dict[str, Any]:
    """The group moe of a time when the one rule's options were among its fields."""
    moe = dict(moe)
    rule = {"type": "moepp"} | {name: moe.pop(name) for name in _OPTIONS if name in moe}
    if "logit_norm" in moe and "logit_norm_std" in moe:
        std = moe.pop("logit_norm_std")
        rule["logit_norm"] = std if moe.pop("logit_norm") else 0.0
    if moe.pop("balance", "heterogeneous") == "none":
        rule["balance_weight"] = 0.0
    moe.pop("score", None)  # softmax was the only one
    return moe | {"rule": rule}
