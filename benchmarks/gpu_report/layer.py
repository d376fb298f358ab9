"""A MoE++ layer beside a vanilla one and the bare products in it, forward and with backward."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from moepp_jax.benchmarks import layer as layers
from moepp_jax.benchmarks.gpu_report.sizes import Sizes


def measure(sizes: Sizes, rounds: int) -> list[dict[str, Any]]:
    dtype = jnp.dtype(sizes.dtype)
    return [
        row
        for mode in layers.MODES
        for way in layers.PASSES
        for row in layers.measure(sizes.layer, mode, way, rounds, dtype)
    ]
