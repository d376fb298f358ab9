"""Causal attention of the 0.6B model, forward and backward, by each implementation there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moepp_jax.benchmarks import timing
from moepp_jax.benchmarks.gpu_report.sizes import Sizes
from moepp_jax.chips import of_kind

# By platform: what `jax.nn.dot_product_attention` is asked for.
IMPLEMENTATIONS = {"gpu": ("xla", "cudnn"), "cpu": ("xla",), "tpu": ("xla",)}


def measure(sizes: Sizes, rounds: int) -> list[dict[str, Any]]:
    """A row for each; one that does not run here says why."""
    device = jax.devices()[0]
    names = IMPLEMENTATIONS[device.platform]
    cases = {name: both_passes(name, sizes) for name in names}
    rows, ready = [], {}
    for name, case in cases.items():
        try:
            jax.block_until_ready(case.function(*case.arguments))
            ready[name] = case
        except Exception as error:  # whatever a library refuses with
            rows.append({"implementation": name, "refused": str(error).strip().splitlines()[0]})
    for name, taken in timing.interleaved(ready, rounds, label="attention").items():
        rows.append({"implementation": name} | _speed(taken, sizes, device))
    return rows


def both_passes(implementation: str, sizes: Sizes) -> timing.Case:
    s = sizes.attention
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (s.batch, s.length, s.heads, s.width)
    q, k, v, cotangent = (jax.random.normal(key, shape, jnp.dtype(sizes.dtype)) for key in keys)
    return timing.Case(jax.jit(_both(implementation)), (q, k, v, cotangent))


def _both(implementation: str) -> Callable:
    def attend(q, k, v):
        how = {"is_causal": True, "implementation": implementation}
        return jax.nn.dot_product_attention(q, k, v, **how)

    def both(q, k, v, cotangent):
        y, back = jax.vjp(attend, q, k, v)
        return y, back(cotangent)

    return both


def flops(sizes: Sizes) -> int:
    """Two products forward and four backward, of the half that a causal mask leaves."""
    s = sizes.attention
    return 6 * 2 * s.batch * s.heads * s.width * s.length * (s.length + 1) // 2


def _speed(taken: timing.Seconds, sizes: Sizes, device: jax.Device) -> dict[str, Any]:
    chip = of_kind(device.device_kind)
    row = {"seconds": taken.median, "seconds_quartiles": [taken.low, taken.high]}
    row["tflop_per_second"] = flops(sizes) / taken.median / 1e12
    row["of_peak"] = chip and flops(sizes) / taken.median / chip.flops
    return row
