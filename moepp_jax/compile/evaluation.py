"""Evaluation compiled for devices that are not there: a run must not end at its first one."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh

from moepp_jax import evaluate, state
from moepp_jax.compile import findings, memory
from moepp_jax.compile.abstract import abstract_batch
from moepp_jax.config import Config


def examine(config: Config, mesh: Mesh, limit: int | None) -> dict[str, Any]:
    """What a batch's evaluation needs, beside the optimizer's state, which stays: `memory.of`.

    Args:
      limit: bytes of a device.
    """
    parts = state.assemble(config, mesh)
    lowered = evaluate.make_sums(parts).lower(parts.abstract.params, abstract_batch(config, mesh))
    kept = findings.bytes_of(parts.abstract.opt_state)
    return memory.of(lowered, parts.platform, limit, kept)
