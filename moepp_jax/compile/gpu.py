"""GPUs that need not be there: what XLA has to be told of a card, and of what compiling for it.

XLA for CUDA compiles without a card if it is given a description of one. It needs the two wheels of
its plugin and NVIDIA's assembler (`make .venv/gpu`), no driver and none of CUDA's libraries.
What only a card can tell is missing: kernels are not autotuned, and libraries' workspaces unknown.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from moepp_jax.chips import CHIPS, Chip
from moepp_jax.errors import ConfigError

# Of the compilation alone. With Triton's products XLA would choose tiles by trying them on a card,
# and without one it takes the first: every product would be an untuned kernel, which no run has.
COMPILER_OPTIONS: dict[str, bool | str] = {"xla_gpu_enable_triton_gemm": False}

# JAX takes this share of a card's memory when it starts (XLA_PYTHON_CLIENT_MEM_FRACTION).
PREALLOCATED = 0.75
_PLUGIN = "jax_cuda12_plugin"
PER_HOST = 8  # GPUs that NVLink joins: DGX and HGX A100, H100, H200, B200

_CUDA = (12, 9, 0)  # as pinned in requirements/cuda.txt, and the next too
_CUDNN = (9, 28, 0)


@dataclass(frozen=True)
class Card:
    """What the compiler is told of a card beside its chip's peak figures.

    Attributes:
      capability: of CUDA, major and minor.
      cores: streaming multiprocessors.
      lanes: float32 units of a core.
      shared_of_core, shared_of_block: bytes of shared memory, the second for blocks that ask.
      l2: bytes of the second cache.
      clock: GHz, boosted.
      host_bandwidth: bytes a second to the host, in one direction.
      source: the documents.
    """

    chip: Chip
    capability: tuple[int, int]
    cores: int
    lanes: int
    shared_of_core: int
    shared_of_block: int
    l2: int
    clock: float
    host_bandwidth: int
    source: str


_KIB, _MIB = 2**10, 2**20
_PROGRAMMING = "CUDA C++ Programming Guide, technical specifications per compute capability"


def _ampere(name: str) -> Card:
    return Card(
        chip=CHIPS[name],
        capability=(8, 0),
        cores=108,
        lanes=64,
        shared_of_core=164 * _KIB,
        shared_of_block=163 * _KIB,
        l2=40 * _MIB,
        clock=1.41,
        host_bandwidth=32 * 2**30,
        source=f"NVIDIA A100 architecture white paper; {_PROGRAMMING}",
    )


def _hopper(name: str) -> Card:
    return Card(
        chip=CHIPS[name],
        capability=(9, 0),
        cores=132,
        lanes=128,
        shared_of_core=228 * _KIB,
        shared_of_block=227 * _KIB,
        l2=50 * _MIB,
        clock=1.98,
        host_bandwidth=32 * 2**30,
        source=f"NVIDIA H100 architecture white paper; {_PROGRAMMING}",
    )


# By the name in --topology; all SXM, as 8 of them stand in a host.
CARDS: dict[str, Card] = {
    "a100": _ampere("A100-80GB"),
    "a100-40gb": _ampere("A100-40GB"),
    "h100": _hopper("H100"),
    "h200": _hopper("H200"),
    "b200": Card(
        chip=CHIPS["B200"],
        capability=(10, 0),
        cores=148,
        lanes=128,
        shared_of_core=228 * _KIB,
        shared_of_block=227 * _KIB,
        l2=132_644_864,  # as the driver reports it
        clock=1.965,
        host_bandwidth=64 * 2**30,
        source=f"OpenXLA's description of the B200, read from a card; {_PROGRAMMING}",
    ),
}


def devices(card: Card, hosts: int, per_host: int) -> Sequence[jax.Device]:
    """GPUs that can be compiled for, those of a host next to each other.

    Raises:
      ConfigError: the plugin is not installed, or does not know such a card.
    """
    how = {"target_config": description(card), "topology": f"1x{hosts}x{per_host}"}
    try:
        return topologies.get_topology_desc(platform="cuda", **how).devices
    except RuntimeError as error:
        raise ConfigError(f"compiling for {card.chip.kinds[0]}: {_reason(str(error))}") from error


def _reason(error: str) -> str:
    if "not implemented for cuda" in error and importlib.util.find_spec(_PLUGIN):
        return (
            "JAX has started with XLA's plugin for CUDA and found no GPU: set JAX_PLATFORMS=cpu "
            "before it starts"
        )
    if "not implemented for cuda" in error:
        return (
            "XLA's plugin for CUDA is not installed: pip install 'jax[cuda12]' (it compiles "
            "without a GPU)"
        )
    return " ".join(error.split())


def description(card: Card) -> str:
    """A card as XLA's GpuTargetConfigProto, in text.

    It is given in full: without the limits of threads and blocks XLA divides by zero, without the
    shared memory of a block kernels seem not to fit, without the capability ptxas seems too old.
    """
    chip = card.chip
    device = {
        "threads_per_warp": 32,
        "threads_per_block_limit": 1024,
        "threads_per_core_limit": 2048,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "core_count": card.cores,
        "fpus_per_core": card.lanes,
        "clock_rate_ghz": card.clock,
        "shared_memory_per_core": card.shared_of_core,
        "shared_memory_per_block": 48 * _KIB,
        "shared_memory_per_block_optin": card.shared_of_block,
        "l2_cache_size": card.l2,
        "device_memory_size": chip.hbm_bytes,
        "memory_bandwidth": int(chip.hbm_bandwidth),
        "pcie_bandwidth": card.host_bandwidth,
        "device_address_bits": 64,
        "ecc_enabled": "true",
        "cuda_compute_capability": _version(("major", "minor"), card.capability),
        "device_interconnect_info": f"{{ active_links: {chip.links} }}",
    }
    parts = ("major", "minor", "patch")
    target = {
        "gpu_device_info": _message(device),
        "platform_name": '"CUDA"',
        "dnn_version_info": _version(parts, _CUDNN),
        "runtime_version": _version(parts, _CUDA),
        "device_description_str": f'"{chip.kinds[0]}"',
    }
    return "\n".join(f"{name}: {value}" for name, value in target.items())


def _version(names: Sequence[str], numbers: Sequence[int]) -> str:
    return _message(dict(zip(names, numbers, strict=True)))


def _message(fields: dict) -> str:
    return f"{{ {' '.join(f'{name}: {value}' for name, value in fields.items())} }}"
