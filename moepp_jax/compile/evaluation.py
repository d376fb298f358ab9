"""Evaluation compiled for devices that are not there: a run must not end at its first one."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from moepp_jax import evaluate, state
from moepp_jax.compile import findings, gpu
from moepp_jax.compile.abstract import abstract_batch
from moepp_jax.config import Config


def examine(config: Config, mesh: Mesh, limit: int | None) -> dict[str, Any]:
    """What is known of a batch's evaluation after compiling it, as JSON has it.

    Args:
      limit: bytes of a device.

    Returns:
      fits, hbm_bytes (with the optimizer's state, which stays there) and temporary_bytes; or fits
      and error, what the compiler said.
    """
    parts = state.assemble(config, mesh)
    lowered = evaluate.make_sums(parts).lower(parts.abstract.params, abstract_batch(config, mesh))
    try:
        compiled = lowered.compile(gpu.COMPILER_OPTIONS if parts.platform == "gpu" else None)
    except jax.errors.JaxRuntimeError as error:
        return {"fits": False, "error": str(error).strip().splitlines()[0]}
    found = findings.memory(compiled.memory_analysis(), parts.platform)
    needed = found["hbm_bytes"] + findings.bytes_of(parts.abstract.opt_state)
    return {
        "fits": limit is None or needed <= limit,
        "hbm_bytes": needed,
        "temporary_bytes": found["temporary_bytes"],
    }
