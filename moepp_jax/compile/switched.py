"""Lower bounds of how long GPUs' links are busy: switches in a host, one network between hosts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moepp_jax.chips import Chip
from moepp_jax.compile.hlo import Collective

_EXCHANGES = ("all-to-all", "ragged-all-to-all")


class Switched:
    """Every GPU reaches every other of its host by all its links, and the rest by its own share of
    the host's network.

    Args:
      devices: in the order of the flattened mesh. Those of a process are a host's: of GPUs that are
        described and not there, `slice_index` is always 0.
    """

    def __init__(self, devices: Sequence, chip: Chip):
        self._chip = chip
        self._hosts = np.array([device.process_index for device in devices])

    def seconds(self, collective: Collective) -> tuple[float, float]:
        """Of all its executions: for a GPU's links, and for its share of the network."""
        chip, times = self._chip, collective.times
        sizes = np.unique(self._hosts[collective.groups[0]], return_counts=True)[1]
        slow = self._crossing(collective, len(sizes), int(sizes.max())) if len(sizes) > 1 else 0.0
        # With one member in each host nothing stays within.
        within = collective.wire_bytes if sizes.max() > 1 else 0.0
        return (
            times * within / (chip.links * chip.link_bandwidth),
            times * slow / chip.dcn_bandwidth if slow else 0.0,
        )

    def _crossing(self, collective: Collective, hosts: int, members: int) -> float:
        """Bytes that a GPU sends to other hosts.

        Of an exchange all but what is for its own host; a gather or a sum can be made within hosts
        first, so that each of a host's members sends its share once between the hosts.
        """
        if collective.kind in _EXCHANGES:
            return collective.operand_bytes * (hosts - 1) / hosts
        if collective.kind == "collective-permute" or members == 1:
            return collective.wire_bytes
        whole = max(collective.operand_bytes, collective.result_bytes)
        passes = 2 if collective.kind == "all-reduce" else 1
        return passes * whole / members * (hosts - 1) / hosts

    def bound(self, collectives: Sequence[Collective]) -> float:
        """Seconds that the busiest of both needs for all of them."""
        loads = np.array([self.seconds(c) for c in collectives]).reshape(-1, 2)
        return float(loads.sum(axis=0).max())
