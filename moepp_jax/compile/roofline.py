"""Lower bounds of a step's time from what it computes and moves, and a chip's peak figures.

The interconnect is a torus. A ring algorithm over k of its dimensions spreads its bytes over all
links of these; an exchange is bounded by the links that cross the middle of each dimension.
Different dimensions work at the same time, and so do links, memory and arithmetic: what overlaps
less takes longer, so these are bounds and no forecast.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moepp_jax.chips import Chip
from moepp_jax.compile.hlo import Collective

_EXCHANGES = ("all-to-all", "ragged-all-to-all")


class Interconnect:
    """Where the devices of a mesh stand, and how long their links are busy.

    Args:
      devices: in the order of the flattened mesh; they have coordinates if they are TPUs.
    """

    def __init__(self, devices: Sequence, chip: Chip):
        self._chip = chip
        self._places = np.array([getattr(d, "coords", (0, 0, 0)) for d in devices])
        self._slices = np.array([getattr(d, "slice_index", None) or 0 for d in devices])
        self._sizes = self._places.max(axis=0) + 1

    def seconds(self, collective: Collective) -> tuple[np.ndarray, float]:
        """Of all its executions: for the links of each dimension, and for the slow network."""
        chip, times = self._chip, collective.times
        group = collective.groups[0]
        spans = [len(set(self._places[group, d])) for d in range(self._places.shape[1])]
        slices = len(set(self._slices[group]))
        slow = 0.0
        if slices > 1:
            alone = slices == len(group)  # one device of each slice: nothing stays within
            crossing = collective.wire_bytes * (1 if alone else (slices - 1) / slices)
            slow = times * crossing / chip.dcn_bandwidth if chip.dcn_bandwidth else float("inf")
        if not chip.torus:
            busy = collective.wire_bytes / (chip.links * chip.link_bandwidth)
            return np.array([times * busy]), slow
        spanned = sum(span > 1 for span in spans)
        load = np.zeros(len(spans))
        for d, span in enumerate(spans):
            if span == 1:
                continue
            rings = 2 if span == self._sizes[d] and span % chip.wraps_at == 0 else 1
            if collective.kind in _EXCHANGES:
                load[d] = collective.operand_bytes * span / (4 * rings)
            else:
                load[d] = collective.wire_bytes / (spanned * rings)
        return times * load / chip.link_bandwidth, slow

    def bound(self, collectives: Sequence[Collective]) -> float:
        """Seconds that the busiest links need for all of them."""
        loads = [self.seconds(c) for c in collectives]
        if not loads:
            return 0.0
        busiest = sum(load for load, _ in loads).max()
        return float(max(busiest, sum(slow for _, slow in loads)))
