"""What each part of a step takes at least, at published peak figures: of programs for GPUs.

Of programs for TPUs, whose schedule says more, see `profile`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from moepp_jax.chips import Chip
from moepp_jax.compile import hlo, parts
from moepp_jax.compile.needs import HBM, LINKS
from moepp_jax.compile.switched import Switched

# Here the exchange counts in full: nothing is said of what hides it.
EXCHANGE = "exchange"
_PRODUCTS = "products"


def roofline(module: hlo.Module, chip: Chip, network: Switched) -> dict[str, dict[str, Any]]:
    """Of each part that there is, in the order of `parts.ALL`: ms, and what bounds most of them.

    Of an instruction the slower counts of its products, at the peak of their arithmetic, and of its
    bytes; of a collective its links. In a step parts run beside each other: they do not add up.
    """
    found: dict[str, Counter[str]] = defaultdict(Counter)
    collectives = {(c.computation, c.name): c for c in hlo.collectives(module)}
    for collective in collectives.values():
        if collective.group_size > 1:
            seconds = max(network.seconds(collective))
            found[parts.of_collective(collective)][LINKS] += seconds
    times, fused = hlo.executions(module), module.called_by("fusion")
    for name, computation in module.computations.items():
        if name not in times or name in fused:
            continue
        for i in computation.instructions:
            if (name, i.name) in collectives or i.opcode in _CALLS:
                continue
            products = hlo.operations(module, computation, i)
            busy = {
                _PRODUCTS: sum(n / chip.peak(arithmetic) for arithmetic, n in products.items()),
                HBM: hlo.traffic(module, computation, i) / chip.hbm_bandwidth,
            }
            bound = max(busy, key=busy.__getitem__)
            found[parts.of(module, i)][bound] += times[name] * busy[bound]
    return {
        EXCHANGE if part == parts.EXCHANGE else part: {
            "ms": 1e3 * sum(found[part].values()),
            "bound_by": found[part].most_common(1)[0][0],
        }
        for part in parts.ALL
        if sum(found[part].values())
    }


# What they run is counted where it stands.
_CALLS = ("while", "call", "conditional", "async-start", "async-done", "async-update")
