"""The model over all devices, tokens crossing to the experts by both exchanges, against one CPU."""

from __future__ import annotations

from typing import Any

import jax

from moepp_jax.benchmarks import layer as layers
from moepp_jax.benchmarks.gpu_report import equality
from moepp_jax.benchmarks.gpu_report.sizes import Sizes


def measure(sizes: Sizes, rounds: int) -> list[dict[str, Any]]:
    """No rows where there is one device."""
    devices = jax.devices()
    axes = {n for n in (2, 4, 8) if len(devices) % n == 0}
    rows = []
    for n in sorted(axes):
        for mode in layers.MODES:
            alone = sizes.equal.replace("moe", dispatch=mode)
            alone = alone.replace("train", batch_size=8 * len(devices))
            over = alone.replace("mesh", data=len(devices) // n, fsdp=1, expert=n)
            name = f"{mode}, experts over {n} of {len(devices)}"
            rows += equality.compared(name, over, devices, alone, jax.devices("cpu")[0])
    return rows
