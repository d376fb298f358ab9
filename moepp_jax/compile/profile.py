"""The predicted time of a training step by part, as plain values for JSON, and what it rests on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from moepp_jax import flops
from moepp_jax.chips import Chip
from moepp_jax.compile import hlo, parts, rates
from moepp_jax.compile.roofline import Interconnect
from moepp_jax.compile.timeline import Timeline
from moepp_jax.compile.topology import Topology
from moepp_jax.config import Config
from moepp_jax.errors import ConfigError

LIMITS = """\
Nothing ran. Of each instruction that the compiler scheduled the slowest of products, main memory,
rows by index and links counts, at rates of the compiler's own (moepp_jax/compile/rates.py); sorts,
running sums and kernels that are not known count as the bytes that they move. How fast links are no
compiler knows: the range is links at their peak and at a quarter of it. Waiting for other devices
and for data is left out, and tokens are taken to be spread evenly. Good for comparing
configurations, and within about 15 % for arithmetic; not for exchanges."""


def require_rates(topology: Topology) -> Chip:
    """The chip of a topology, if estimates can be made for it.

    Raises:
      ConfigError: they cannot.
    """
    if topology.chip is None or rates.of(topology.chip) is None:
        raise ConfigError(
            f"--profile predicts times of TPUs: --topology={topology.text} is none; write "
            "v5p:4x4x4, v5e:4x4 or v6e:16x16"
        )
    return topology.chip


def predict(config: Config, mesh: Mesh, chip: Chip, module: hlo.Module) -> dict[str, Any]:
    """Of a step, from its scheduled program; times in ms, with links at their peak and slower.

    `parts_ms` add up to `predicted_ms`; `exchange_ms` is that of all exchanges, hidden or not.
    """
    network = Interconnect(list(mesh.devices.flat), chip)
    at = [Timeline(module, chip, network, share) for share in rates.LINKS]
    by_part = [_by_part(timeline) for timeline in at]
    steps = [sum(sum(bounds.values()) for bounds in found.values()) for found in by_part]
    tokens = config.batch_tokens / mesh.size
    return {
        "parts_ms": {
            part: [1e3 * sum(found[part].values()) for found in by_part] for part in parts.ALL
        },
        "bound_by": {
            part: found.most_common(1)[0][0]
            for part in parts.ALL
            if (found := by_part[0][part] or by_part[-1][part])
        },
        "exchange_ms": [1e3 * timeline.exchange() for timeline in at],
        "predicted_ms": [1e3 * step for step in steps],
        "tokens_per_second_per_chip": [tokens / step for step in steps],
        "mfu_nominal": [_per_token(config, None) * tokens / step / chip.flops for step in steps],
        "mfu_realised": [
            _per_token(config, executed_ffn_experts(config)) * tokens / step / chip.flops
            for step in steps
        ],
        "not_estimated": at[0].unknown(),
    }


def predicted(report: Mapping[str, Any]) -> dict[str, Any]:
    """Of a report, what `predict` found."""
    return {name: value for name, value in report.items() if name in _FOUND}


_FOUND = ("parts_ms", "bound_by", "exchange_ms", "predicted_ms", "tokens_per_second_per_chip")
_FOUND += ("mfu_nominal", "mfu_realised", "not_estimated")


def _by_part(timeline: Timeline) -> dict[str, Counter]:
    """Seconds of each part, by what bounds them."""
    found: dict[str, Counter] = defaultdict(Counter)
    for spent, times in timeline.spent():
        found[spent.part][spent.needs.bound] += times * spent.needs.seconds
    return found


def _per_token(config: Config, ffn_experts: float | None) -> float:
    return float(flops.per_token(config, ffn_experts).train)


def executed_ffn_experts(config: Config) -> float | None:
    """FFN experts a token that are computed: under capacity those of empty slots too."""
    return flops.executed_ffn_experts(config) if config.moe.dispatch == "capacity" else None


def by_the_compiler(compiled: jax.stages.Compiled, module: hlo.Module, chip: Chip) -> dict:
    """The compiler's own numbers of a program that was compiled to its end."""
    costs = compiled.cost_analysis() or {}
    clock = rates.of(chip).clock
    return {
        "optimal_ms": 1e3 * float(costs.get("optimal_seconds", 0.0)),
        "products_ms": 1e3 * hlo.product_cycles(module) / clock,
    }


def vanilla_twin(config: Config) -> Config | None:
    """The same without zero-computation experts and gating residual; None if it is one itself."""
    if not config.moe.pool.n_zero_computation:
        return None
    tree = config.to_dict()
    tree["moe"] |= {"n_const": 0, "n_copy": 0, "n_zero": 0}
    rule = tree["moe"]["rule"]
    rule |= {name: value for name, value in _VANILLA.items() if name in rule}
    try:
        return Config.parse(tree)
    except ConfigError:  # a rule that cannot do without them
        return None


_VANILLA = {"tau": 1.0, "residual": "none"}
