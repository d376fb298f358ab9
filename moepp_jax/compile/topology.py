"""Devices to compile for: TPU pods and GPUs that need not be there, and virtual CPUs."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from moepp_jax.chips import CHIPS, Chip
from moepp_jax.compile import gpu
from moepp_jax.errors import ConfigError

EXAMPLES = (
    "v5p:4x4x4, v5e:4x4, v6e:16x16, 2*v5p:4x4x4 for two slices; h100:8, or h100:8x8 for eight "
    f"hosts of eight ({', '.join(sorted(gpu.CARDS))}); or cpu:8"
)
_FORM = re.compile(r"(?:(\d+)\*)?(v5p|v5e|v6e):(\d+(?:x\d+)*)|cpu:(\d+)")
_GPUS = re.compile(rf"({'|'.join(gpu.CARDS)}):(?:(\d+)x)?(\d+)")


@dataclass(frozen=True)
class Topology:
    """Parsed from the text that a user gives.

    Attributes:
      chip: None for CPUs.
      slices: of a TPU pod, or hosts of GPUs: what a slower network joins.
      dims: chips along each dimension of a slice; for CPUs and the GPUs of a host their number.
      card: of GPUs alone.
    """

    text: str
    chip: Chip | None
    slices: int
    dims: tuple[int, ...]
    card: gpu.Card | None = None

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Raises ConfigError where the text is no topology."""
        if found := _GPUS.fullmatch(text):
            return _of_gpus(text, gpu.CARDS[found[1]], int(found[2] or 1), int(found[3]))
        found = _FORM.fullmatch(text)
        if not found:
            raise ConfigError(f"--topology={text} is not known: write {EXAMPLES}")
        slices, kind, dims, cpus = found.groups()
        chip = CHIPS.get(kind)
        sizes = tuple(int(d) for d in (cpus or dims).split("x"))
        if 0 in sizes or slices == "0" or (chip and len(sizes) > chip.torus):
            limit = f", with at most {chip.torus} dimensions" if chip else ""
            raise ConfigError(f"--topology={text}: sizes must be at least 1{limit}")
        return cls(text, chip, int(slices or 1), sizes)

    @property
    def num_devices(self) -> int:
        return self.slices * math.prod(self.dims)

    @property
    def platform(self) -> str:
        if self.card:
            return "gpu"
        return "tpu" if self.chip else "cpu"


def _of_gpus(text: str, card: gpu.Card, hosts: int, per_host: int) -> Topology:
    if not (hosts and 0 < per_host <= gpu.PER_HOST):
        raise ConfigError(
            f"--topology={text}: there is one host or more, with from one GPU to {gpu.PER_HOST}: "
            f"eight hosts of {gpu.PER_HOST} are {text.partition(':')[0]}:8x{gpu.PER_HOST}"
        )
    return Topology(text, card.chip, hosts, (per_host,), card)


def devices(topology: Topology) -> Sequence[jax.Device]:
    """The devices, which can be compiled for but not run on unless they are CPUs.

    This process then runs on CPUs: call it before anything else has made JAX look for devices.

    Raises:
      ConfigError: the TPU compiler is not installed or another process holds it, there is no such
        slice; XLA's plugin for CUDA is not installed; or JAX has started already with fewer CPUs.
    """
    jax.config.update("jax_platforms", "cpu")
    if topology.card:
        return gpu.devices(topology.card, topology.slices, *topology.dims)
    return _tpus(topology) if topology.chip else _cpus(topology)


def _cpus(topology: Topology) -> Sequence[jax.Device]:
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # If JAX has started already, it may have enough of them.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", topology.num_devices)
    there = jax.devices("cpu")
    if len(there) < topology.num_devices:
        raise ConfigError(f"--topology={topology.text}: this process has {len(there)} CPU devices")
    return there[: topology.num_devices]


def _tpus(topology: Topology) -> Sequence[jax.Device]:
    # libtpu looks for a TPU's metadata server, which is not there, unless it is told all this.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"v5p-{2 * topology.num_devices}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    name = topology.text.rpartition("*")[2]
    slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **slices)
    except RuntimeError as error:
        raise ConfigError(f"--topology={topology.text}: {_reason(str(error))}") from error
    return found.devices


def _reason(error: str) -> str:
    if "not installed" in error:
        return (
            "the TPU compiler is not installed: pip install 'jax[tpu]' (it compiles without a TPU)"
        )
    if "lockfile" in error or "already in use" in error:
        return (
            "another process is using libtpu, which serves one at a time: wait for it to end "
            "(if there is none, remove /tmp/libtpu_lockfile)"
        )
    return " ".join(error.split())
