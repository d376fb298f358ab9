"""The processes of one run: joined by JAX's multi-controller runtime, and ended together.

Every process runs the same program on its own devices; arrays span the devices of all.

A process that dies ends the others: where the connection of a collective breaks, with an
`error: ...` and status 1, once `watch` has said who is gone; else JAX aborts them with a message of
its own, at once if it was process 0 that died and at the latest HEARTBEAT_TIMEOUT seconds after
another one fell silent. One that lives, and does nothing any more, is found by `watch`.
"""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NoReturn

import jax

from moepp_jax.errors import ConfigError

MODES = ("auto", "on", "off")

# Seconds that processes wait for each other at the start.
INITIALIZATION_TIMEOUT = 300

# Seconds of waiting after which a process says for whom.
PATIENCE = 5

# Seconds without a sign of life after which a process counts as dead.
HEARTBEAT_TIMEOUT = 30

_LAUNCHERS = (  # of all processes, of this one
    ("SLURM_NTASKS", "SLURM_PROCID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def initialize(
    mode: str = "auto",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = INITIALIZATION_TIMEOUT,
) -> bool:
    """Joins the processes of this run, before JAX touches a device; whether there are any to join.

    Args:
      mode: "auto" joins if the environment says that there are several processes, "on" always lets
        JAX detect them, "off" is a process for itself.
      coordinator: HOST:PORT of process 0. With the two that follow: no detection at all.
      timeout: seconds; a process that waits longer ends with status 1.

    Raises:
      ConfigError: the arguments contradict each other, or the processes cannot be found.
    """
    found = settings(os.environ, mode, coordinator, num_processes, process_id)
    if found is None:
        return False
    # Collectives block a thread of JAX's CPU pools each; sized by the cores, they can deadlock.
    os.environ.setdefault("PJRT_NPROC", "32")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = found["coordinator_address"] or "the detected address"
    said = f"waiting at {where} for {awaited(os.environ, found)}"
    watches = [
        threading.Timer(min(PATIENCE, timeout / 2), print, [said], {"file": sys.stderr}),
        # JAX's own timeout ends the process with a stack trace.
        threading.Timer(timeout, _give_up, [where, timeout]),
    ]
    for watch in watches:
        watch.daemon = True
        watch.start()
    try:
        jax.distributed.initialize(
            **found,
            initialization_timeout=int(2 * timeout),
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except Exception as error:  # of any kind, as each environment is asked in its own way
        raise ConfigError(
            f"--distributed={mode}: JAX cannot join the processes of this run ({error}); give "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I, or set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; a process for itself "
            "takes --distributed=off"
        ) from error
    finally:
        for watch in watches:
            watch.cancel()
    faulthandler.disable()  # absl's: its dump would bury what JAX says when it ends this process
    return True


def settings(
    environ: Mapping[str, str],
    mode: str = "auto",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> dict[str, Any] | None:
    """What jax.distributed.initialize is to be told; None for a process for itself.

    Raises:
      ConfigError: flags or variables that are partial, contradictory or no numbers.
    """
    if mode not in MODES:
        raise ConfigError(f"--distributed={mode} must be one of {', '.join(MODES)}")
    flags = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    given = [name for name, value in flags.items() if value is not None]
    if mode == "off":
        if given:
            raise ConfigError(f"--distributed=off contradicts --{given[0]}={flags[given[0]]}")
        return None
    if given and len(given) < len(flags):
        missing = ", ".join(f"--{name}" for name in flags if name not in given)
        raise ConfigError(f"--{given[0]}={flags[given[0]]} needs {missing} too")
    if not given:
        if mode == "auto" and not several(environ):
            return None
        coordinator = environ.get("JAX_COORDINATOR_ADDRESS") or None
        if coordinator:
            num_processes = _number(environ, "JAX_NUM_PROCESSES")
            process_id = _number(environ, "JAX_PROCESS_ID", "JOB_COMPLETION_INDEX")
    if num_processes is not None and num_processes < 1:
        raise ConfigError(f"num_processes = {num_processes} must be at least 1")
    if coordinator and not coordinator.rpartition(":")[2].isdigit():
        raise ConfigError(f"the coordinator {coordinator!r} must be HOST:PORT")
    if None not in (num_processes, process_id) and not 0 <= process_id < num_processes:
        raise ConfigError(
            f"process_id = {process_id} must be at least 0 and less than num_processes = "
            f"{num_processes}"
        )
    known = None not in (coordinator, num_processes, process_id)
    return {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate" if known else None,
    }


def several(environ: Mapping[str, str]) -> bool:
    """Whether the environment is that of one process of several, or a Cloud TPU VM, which may be.

    Raises:
      ConfigError: a number in it is none.
    """
    if environ.get("JAX_COORDINATOR_ADDRESS") or environ.get("JAX_NUM_PROCESSES"):
        return _number(environ, "JAX_NUM_PROCESSES") != 1
    if all(environ.get(name) for name in _SLURM):
        return _number(environ, "SLURM_NTASKS") > 1
    if environ.get("OMPI_COMM_WORLD_SIZE"):
        return _number(environ, "OMPI_COMM_WORLD_SIZE") > 1
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if hosts:
        return "," in hosts or (_number(environ, "MEGASCALE_NUM_SLICES") or 1) > 1
    # JAX marks a Cloud TPU VM like this; how many there are, it asks the metadata server.
    if environ.get("TPU_ML_PLATFORM"):
        return True
    return bool(environ.get("KUBERNETES_SERVICE_HOST")) and _of_several_pods(environ)


def _of_several_pods(environ: Mapping[str, str]) -> bool:
    """Whether JAX is to find the other pods of a Kubernetes job, for which it asks its server.

    Pod 0 may be the only one, and is taken for that where the server cannot be asked.

    Raises:
      ConfigError: there are others, and it cannot.
    """
    index = _number(environ, "JOB_COMPLETION_INDEX")
    can_ask = find_spec("kubernetes") is not None
    if index and not can_ask:
        raise ConfigError(
            f"JOB_COMPLETION_INDEX={index}: this is one of several pods of a Kubernetes job, and "
            "nothing says where the others are: set JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES "
            "(launch/jobset_gpu.yaml does), or install the package kubernetes; a process for "
            "itself takes --distributed=off"
        )
    return index is not None and can_ask


def awaited(environ: Mapping[str, str], found: Mapping[str, Any]) -> str:
    """Whom a process with these settings waits for, who says so, and what to do without them."""
    number, processes = found["process_id"], found["num_processes"]
    told = f"num_processes = {processes}"
    for of_all, of_this in _LAUNCHERS:
        if processes is None and environ.get(of_all):
            processes, number = _number(environ, of_all), _number(environ, of_this)
            told = f"{of_all}={processes}"
    others = "the other processes of this run"
    if processes is not None and number is not None:
        last = f" to {processes - 1}" if processes > 2 else ""
        others = "process 0" if number else (f"processes 1{last}" if last else "process 1")
        others = f"{others} of this run, as {told} and this is process {number}"
    if environ.get("SLURM_PTY_PORT"):
        others += "; in a shell of `srun --pty` they never come: start the command with srun"
    return f"{others}; a process for itself takes --distributed=off"


def _number(environ: Mapping[str, str], *names: str) -> int | None:
    """The first of these variables that is set."""
    for name in names:
        if value := environ.get(name):
            try:
                return int(value)
            except ValueError:
                raise ConfigError(f"{name}={value} must be a whole number") from None
    return None


def _give_up(where: str, timeout: float) -> NoReturn:
    _end(
        f"not all processes of this run met at {where} within {timeout:g} s; each must be started "
        "with the same coordinator and number of processes, and an id of its own"
    )


def abandon(error: BaseException) -> NoReturn:
    """Ends this process now, which ends the others: an orderly exit would wait for them."""
    if said := of_a_lost_peer(error):
        _end(f"another process of this run is gone: {said}")
    if isinstance(error, ConfigError | OSError):  # the latter of a disk that is full, say
        _end(f"process {jax.process_index()}: {error}")
    traceback.print_exception(error)
    _end(f"{type(error).__name__} in process {jax.process_index()}: the whole run ends")


def of_a_lost_peer(error: BaseException | None) -> str:
    """What an error says, or one that it comes of, if that is that another process is gone."""
    while error is not None:
        said = " ".join(str(error).split())
        if re.search("Gloo|coordination service", said):
            return said
        error = error.__cause__
    return ""


def _end(message: str) -> NoReturn:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)
