"""Texts through a loaded model, and how they were routed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moepp_jax import mesh as mesh_lib
from moepp_jax.analysis.record import Record
from moepp_jax.analysis.record import Rows as RecordRows
from moepp_jax.analysis.shown import Routing
from moepp_jax.errors import ConfigError
from moepp_jax.observe import routed, texts
from moepp_jax.processes import Rows

_TOGETHER = 8  # rows that run at once on a device


def routing(model: Any, given: Sequence[Any]) -> Routing:
    """Of a `moepp_jax.api.Model`.

    Raises:
      ConfigError: there is nothing in the texts.
    """
    if not all(isinstance(text, str) for text in given):
        raise ConfigError(f"{given!r} must be one text or several")
    documents = model.tokenizer.encode_batch(given)
    if not any(documents):
        raise ConfigError("there is no text to route: the texts are empty")
    longest = max(map(len, map(model.tokenizer.document, documents)))
    chunk = model.config.model.loss_chunk  # which has to divide the row
    length = min(model.config.data.seq_len, -(-longest // chunk) * chunk)
    part = texts.listed("text", "file", documents, model.tokenizer, length)
    size = _TOGETHER * (1 if model.mesh is None else model.mesh.size)
    place = model.mesh and Rows(mesh_lib.batch_sharding(model.mesh), size)
    run = routed.running(routed.make_observe(model.network, model.mesh), model.params, place)
    rows = routed.observe_parts(run, [part], len(part.rows) * length, size)
    about = routed.describe(model.config, model.name, model.step, model.tokenizer, {"text": "file"})
    return Routing(Record(about, _joined(list(rows))))


def _joined(batches: Sequence[RecordRows]) -> RecordRows:
    """Batches one after the other: tokens are the first axis, or the one after the layers."""
    return RecordRows(
        *(
            np.concatenate(each, axis=min(each[0].ndim - 1, 1))
            for each in zip(*batches, strict=True)
        )
    )
