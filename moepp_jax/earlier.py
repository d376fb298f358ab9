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
    "model.rope_scaling": 1.0,
    "moe.exchange_buffer": 0.0,
    "moe.bias_rate": 0.0,
    "data.tfds_dir": "",
    "data.worker_processes": 0,
    "generate.min_p": 0.0,
    "generate.repetition_penalty": 1.0,
}


def completed(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields as they are called now, and what was put there, as "moe.bias_rate = 0.0"."""
    fields = copy.deepcopy(dict(fields))
    later = dict(_LATER)
    data = fields.get("data")
    if isinstance(data, dict) and "corpus" in data and "sources" not in data:
        path = data.pop("corpus")  # the one source there was
        later["data.sources"] = {"text": {"path": path, "weight": 1.0, "text_field": "text"}}
    added = []
    for name, value in later.items():
        group, field = name.split(".")
        if isinstance(fields.get(group), dict) and field not in fields[group]:
            fields[group][field] = value
            added.append(f"{name} = {value!r}")
    return fields, added
