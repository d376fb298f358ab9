"""Training steps of the 0.6B model over all devices, beside the bounds of the compiled program."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax

from moepp_jax import flops, state
from moepp_jax.benchmarks import layer as layers
from moepp_jax.benchmarks import timing
from moepp_jax.benchmarks.gpu_report import running
from moepp_jax.benchmarks.gpu_report.sizes import Sizes
from moepp_jax.chips import of_kind
from moepp_jax.compile import findings, gpu, hlo
from moepp_jax.compile.topology import Topology
from moepp_jax.config import Config


def measure(sizes: Sizes, rounds: int) -> list[dict[str, Any]]:
    return [of(sizes.step.replace("moe", dispatch=mode), rounds) for mode in layers.MODES]


def of(config: Config, rounds: int) -> dict[str, Any]:
    devices = jax.devices()
    parts = running.assembled(config, devices)
    batch = running.placed(parts, running.batch_of(config))
    compiled = state.make_train_step(parts).lower(parts.abstract, batch).compile()
    held, losses, taken = state.init_state(parts), [], []
    for number in range(rounds + 2):
        start = time.perf_counter()
        held, metrics = compiled(held, batch)
        losses.append(float(metrics["loss"]))  # waits for it
        if number >= 2:  # the first ones set libraries up
            taken.append(time.perf_counter() - start)
    seconds = timing.summary(taken)
    tokens = config.batch_tokens
    speed = flops.per_token(config).train * tokens / seconds.median
    return {
        "dispatch": config.moe.dispatch,
        "mesh": dict(parts.mesh.shape),
        "layers": config.model.num_layers,
        "tokens": tokens,
        "seconds": seconds.median,
        "seconds_quartiles": [seconds.low, seconds.high],
        "tokens_per_second": tokens / seconds.median,
        "mfu": flops.utilisation(speed, devices[0].device_kind, len(devices)),
        "bounds": bounds(config, parts, compiled),
        "planned_bytes": findings.memory(compiled.memory_analysis(), devices[0].platform)[
            "hbm_bytes"
        ],
        "peak_bytes": (devices[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def bounds(config: Config, parts: state.Assembly, compiled) -> Mapping[str, float] | None:
    """Seconds at least, by what limits; None where the device's peak figures are not known."""
    device = jax.devices()[0]
    chip = of_kind(device.device_kind)
    if chip is None:
        return None
    card = next((card for card in gpu.CARDS.values() if card.chip is chip), None)
    there = Topology(device.device_kind, chip, 1, (jax.device_count(),), card)
    module = hlo.parse(compiled.as_text())
    return findings.work(config, parts.mesh, there, module)["bounds"]
