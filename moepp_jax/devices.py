"""The devices of a command that computes: joined to other processes' and, on CPU, virtual."""

import os

import jax
from absl import flags

from moepp_jax import distributed, mesh
from moepp_jax.config import Config

_DISTRIBUTED = flags.DEFINE_string(
    "distributed", "auto", f"join other processes: {', '.join(distributed.MODES)}"
)
_PROCESSES = {
    "coordinator": flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0"),
    "num_processes": flags.DEFINE_integer("num_processes", None, "processes of the run"),
    "process_id": flags.DEFINE_integer("process_id", None, "number of this one, from 0"),
}


def start(config: Config) -> None:
    """Joins the processes of the run, if there are several, and sees to their virtual devices.

    CPUs are as many devices as one says; a mesh that leaves the number open gets its fill of them,
    or one a process.
    """
    given = {name: flag.value for name, flag in _PROCESSES.items()}
    joined = distributed.initialize(_DISTRIBUTED.value, **given)
    said = "JAX_NUM_CPU_DEVICES" in os.environ or (
        "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    )
    devices = 1 if joined else mesh.virtual_cpu_devices(config)
    if not said:
        jax.config.update("jax_num_cpu_devices", devices)
    # Collectives block a thread of JAX's pools each. The pools are sized by the cores, and with
    # fewer than two threads a device they can deadlock; more than it takes is slower.
    if said or devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(32, 4 * devices)))
    # XLA's CPU programs take part in collectives in their written order only if they were compiled
    # here: read from a compilation cache, each device has its own, and they wait for ever.
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
