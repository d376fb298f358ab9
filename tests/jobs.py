"""Several real processes of one run, as the launchers start them."""

import itertools
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAIN = ("-m", "moepp_jax.main")
LOCAL_DEVICES = 2
GLOO = re.compile("Gloo|peer ranks")  # its threads write over each other's lines
# What a started process gets from its test, or nothing.
SET_HERE = ("XLA_FLAGS", "PJRT_NPROC", "SLURM_", "OMPI_", "TPU_", "KUBERNETES_", "JAX_COORDINATOR")
# Of one started process, for which all wait for each other.
SECONDS = 180

# For `Job.program`: the command, of which a process with --stuck, after it has placed so many
# batches, says so and does nothing any more.
STUCK_AFTER = """
import sys, time
from moepp_jax import main, processes
if "--stuck" in sys.argv:
    sys.argv.remove("--stuck")
    place, placed = processes.Rows.place, []
    def stuck(*args):
        placed.append(1)
        if len(placed) > {batches}:
            print("stuck", file=sys.stderr, flush=True)
            time.sleep(1e6)
        return place(*args)
    processes.Rows.place = stuck
sys.argv[0] = "moepp"
main.main()
"""


def slurm(port: int, number: int, of: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": str(port - 61440),  # JAX makes the port of the job's number
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(of),
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
    }


def jobset(port: int, number: int, of: int) -> dict[str, str]:
    return {
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(of),
        "JOB_COMPLETION_INDEX": str(number),
    }


def open_mpi(port: int, number: int, of: int) -> dict[str, str]:
    return {
        "OMPI_MCA_orte_hnp_uri": f"{(port - 61440) * 4096}.0;tcp://127.0.0.1:9",
        "OMPI_COMM_WORLD_SIZE": str(of),
        "OMPI_COMM_WORLD_RANK": str(number),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(number),
    }


# In the range of which JAX takes one under SLURM; no two jobs of a test have the same, nor have
# those of another process that tests at the same time, whose number is near.
PORTS = itertools.count(61440 + os.getpid() * 101 % 4000)


def free_port() -> int:
    for port in PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)):
                return port


class Job:
    """The processes of one command, with so many devices each; on leaving, they are killed.

    Each may be run by a command (`under`), as `setpriv`, which becomes it.
    """

    def __init__(
        self,
        arguments,
        of=2,
        environment=slurm,
        program=MAIN,
        flags=lambda number: [],
        devices=LOCAL_DEVICES,
        under=(),
    ):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(SET_HERE)}
        xla = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
        self.port = free_port()
        self.processes = [
            subprocess.Popen(
                [*under, sys.executable, *program, *map(str, arguments), *flags(i)],
                cwd=ROOT,
                env=clean | {"XLA_FLAGS": xla} | environment(self.port, i, of),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(of)
        ]

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def ended(self, *statuses: int, seconds: float = SECONDS) -> list[tuple[str, str]]:
        """What each has said, once all have ended as they should."""
        deadline = time.monotonic() + seconds
        said = [p.communicate(timeout=deadline - time.monotonic()) for p in self.processes]
        assert [p.returncode for p in self.processes] == list(statuses), said
        return said

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + SECONDS
        while not path.exists():
            running = [process.poll() is None for process in self.processes]
            assert all(running) and time.monotonic() < deadline, [
                process.communicate() for process in self.processes if process.poll() is not None
            ]
            time.sleep(0.01)
