"""Causal attention of the 0.6B model, forward and backward, by each kernel that the model may have.

Of rows that are one document each, and of rows of four, of which no token sees another's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moepp_jax import attend
from moepp_jax.benchmarks import timing
from moepp_jax.benchmarks.gpu_report.sizes import Sizes
from moepp_jax.chips import of_kind

# By platform, of `moepp_jax.attend`.
KERNELS = {
    "gpu": {"xla": attend.xla, "cudnn": attend.cudnn},
    "cpu": {"xla": attend.xla},
    "tpu": {"xla": attend.xla},
}
DOCUMENTS = (1, 4)


def measure(sizes: Sizes, rounds: int) -> list[dict[str, Any]]:
    """A row for each; one that does not run here says why."""
    device = jax.devices()[0]
    rows, ready = [], {}
    for name in KERNELS[device.platform]:
        for documents in DOCUMENTS:
            case = timing.Case(jax.jit(both(name, sizes)), arguments(sizes, documents))
            try:
                jax.block_until_ready(case.function(*case.arguments))
                ready[name, documents] = case
            except Exception as error:  # whatever a library refuses with
                why = str(error).strip().splitlines()[0]
                rows.append({"kernel": name, "documents": documents, "refused": why})
    for (name, documents), taken in timing.interleaved(ready, rounds, label="attention").items():
        rows.append({"kernel": name, "documents": documents} | _speed(taken, sizes, device))
    return rows


def arguments(sizes: Sizes, documents: int, dtype: str | None = None) -> tuple[jax.Array, ...]:
    """Queries, keys, values and a cotangent (B, L, H, W), and the document of each token (B, L)."""
    s = sizes.attention
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (s.batch, s.length, s.heads, s.width)
    heads = (jax.random.normal(key, shape, jnp.dtype(dtype or sizes.dtype)) for key in keys)
    # The first is half of the row, the second half of the rest, and so on: none is a whole block.
    ends = s.length - s.length // 2 ** jnp.arange(1, documents) + 3
    of_token = jnp.searchsorted(ends, jnp.arange(s.length), side="right").astype(jnp.int32)
    return *heads, jnp.broadcast_to(1 + of_token, shape[:2])


def both(name: str, sizes: Sizes) -> Callable:
    """What attention by this kernel gives for `arguments`, and its gradients."""
    kernel = next(kernels[name] for kernels in KERNELS.values() if name in kernels)
    packed = kernel(sizes.step.model)

    def both(q, k, v, cotangent, segments):
        y, back = jax.vjp(lambda q, k, v: packed(segments)(q, k, v)[0], q, k, v)
        return y, back(cotangent)

    return both


def flops(sizes: Sizes) -> int:
    """Two products forward and four backward, of the half that a causal mask leaves.

    Of several documents less is needed, and no kernel here leaves it out.
    """
    s = sizes.attention
    return 6 * 2 * s.batch * s.heads * s.width * s.length * (s.length + 1) // 2


def _speed(taken: timing.Seconds, sizes: Sizes, device: jax.Device) -> dict[str, Any]:
    chip = of_kind(device.device_kind)
    row = {"seconds": taken.median, "seconds_quartiles": [taken.low, taken.high]}
    row["tflop_per_second"] = flops(sizes) / taken.median / 1e12
    row["of_peak"] = chip and flops(sizes) / taken.median / chip.flops
    return row
