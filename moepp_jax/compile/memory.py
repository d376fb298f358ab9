"""What other programs than the step need of a device's memory, or why they cannot be compiled."""

from __future__ import annotations

from typing import Any

import jax

from moepp_jax.compile import findings, gpu


def of(lowered: jax.stages.Lowered, platform: str, limit: int | None, beside: int = 0) -> dict:
    """After compiling it, as JSON has it.

    Args:
      limit: bytes of a device.
      beside: bytes of it that are taken while the program runs.

    Returns:
      fits, hbm_bytes (with those beside) and temporary_bytes; or fits and error, what the compiler
      said.
    """
    try:
        compiled = lowered.compile(gpu.COMPILER_OPTIONS if platform == "gpu" else None)
    except jax.errors.JaxRuntimeError as error:
        return {"fits": False, "error": str(error).strip().splitlines()[0]}
    found: dict[str, Any] = findings.memory(compiled.memory_analysis(), platform)
    needed = found["hbm_bytes"] + beside
    return {
        "fits": limit is None or needed <= limit,
        "hbm_bytes": needed,
        "temporary_bytes": found["temporary_bytes"],
    }
