"""Who joins whom is clear before anything is joined, and each process gets the rows it holds."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, Sharding

from moepp_jax import distributed, processes
from moepp_jax.errors import ConfigError
from moepp_jax.mesh import AXES, batch_sharding

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[1-4]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
JOBSET = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "JOB_COMPLETION_INDEX": "3",
    "JAX_COORDINATOR_ADDRESS": "run-pod-0-0.run:1234",
    "JAX_NUM_PROCESSES": "4",
}
DETECT = dict.fromkeys(
    ("coordinator_address", "num_processes", "process_id", "cluster_detection_method")
)


def known(coordinator, processes, number):
    return {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": number,
        "cluster_detection_method": "deactivate",
    }


@pytest.mark.parametrize(
    "environ",
    [
        SLURM,
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
        {"TPU_WORKER_HOSTNAMES": "t-0,t-1", "TPU_WORKER_ID": "0"},
        {"TPU_WORKER_HOSTNAMES": "t-0", "MEGASCALE_NUM_SLICES": "2"},
        {"TPU_PROCESS_ADDRESSES": "t-0:1,t-1:1", "TPU_WORKER_HOSTNAMES": "t-0"},
        {"TPU_ML_PLATFORM": "JAX"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
    ],
)
def test_several_processes_that_jax_detects(environ):
    assert distributed.settings(environ) == DETECT
    assert distributed.settings(environ, "off") is None


@pytest.mark.parametrize(
    "environ",
    [
        {},
        SLURM | {"SLURM_NTASKS": "1"},
        {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # not under srun
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ML_PLATFORM": "JAX"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
    ],
)
def test_a_process_for_itself(environ):
    assert distributed.settings(environ) is None
    assert distributed.settings(environ, "on") is not None


def test_what_is_told_is_not_detected():
    assert distributed.settings(JOBSET) == known("run-pod-0-0.run:1234", 4, 3)
    assert distributed.settings(JOBSET | {"JAX_PROCESS_ID": "2"})["process_id"] == 2
    flags = {"coordinator": "a:1", "num_processes": 2, "process_id": 0}
    assert distributed.settings(JOBSET, "auto", **flags) == known("a:1", 2, 0)
    assert distributed.settings({}, "on", **flags) == known("a:1", 2, 0)
    # An address alone leaves the rest to JAX, which knows this environment.
    partly = distributed.settings(SLURM | {"JAX_COORDINATOR_ADDRESS": "a:1"})
    assert partly == DETECT | {"coordinator_address": "a:1"}


@pytest.mark.parametrize(
    "environ, flags, message",
    [
        ({}, {"mode": "maybe"}, "--distributed=maybe must be one of auto, on, off"),
        ({}, {"coordinator": "a:1"}, "--coordinator=a:1 needs --num_processes, --process_id too"),
        ({}, {"process_id": 0}, "--process_id=0 needs --coordinator, --num_processes too"),
        ({}, {"mode": "off", "process_id": 0}, "--distributed=off contradicts --process_id=0"),
        ({}, ("auto", "host", 2, 0), "the coordinator 'host' must be HOST:PORT"),
        ({}, ("auto", "a:1", 2, 2), "process_id = 2 must be at least 0 and less than num_proce"),
        ({}, ("auto", "a:1", 2, -1), "process_id = -1 must be at least 0"),
        (SLURM | {"SLURM_NTASKS": "x"}, {}, "SLURM_NTASKS=x must be a whole number"),
        (JOBSET | {"JAX_NUM_PROCESSES": "all"}, {}, "JAX_NUM_PROCESSES=all must be a whole"),
    ],
)
def test_contradictions_are_errors(environ, flags, message):
    flags = flags if isinstance(flags, dict) else dict(zip(FLAGS, flags, strict=True))
    with pytest.raises(ConfigError, match=re.escape(message)):
        distributed.settings(environ, **flags)


FLAGS = ("mode", "coordinator", "num_processes", "process_id")


def test_nothing_to_detect_and_nobody_to_meet_are_clear_errors():
    code = (
        "import sys, time\n"
        "from moepp_jax import distributed\n"
        "try:\n    distributed.initialize('on')\n"
        "except ValueError as error:\n    print(error)\n"
        "print(time.time(), flush=True)\n"
        "distributed.initialize('auto', 'localhost:1', 2, 1, timeout=1)\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "TPU"))}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env=clean,
        capture_output=True,
        text=True,
        timeout=60,
    )
    detected, began = run.stdout.strip().splitlines()
    assert re.match("--distributed=on: JAX cannot join .* give --coordinator=HOST:PORT", detected)
    assert run.returncode == 1 and time.time() - float(began) < 10
    assert re.fullmatch(r"error: not all processes of this run met at localhost:1 .*\n", run.stderr)


def test_alone_everything_is_agreed():
    assert processes.is_first() and processes.on_first(lambda: 3) == 3
    with pytest.raises(ConfigError, match=r"^no$"):
        processes.agree(lambda: (_ for _ in ()).throw(ConfigError("no")))


def mesh_of(devices):
    return Mesh(np.array(devices).reshape(2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("order", [range(8), (3, 1, 4, 0, 5, 7, 2, 6)])
def test_rows_become_the_global_batch_whatever_the_order_of_the_devices(order):
    sharding = batch_sharding(mesh_of([jax.devices()[i] for i in order]))
    rows = processes.Rows(sharding, 16)
    np.testing.assert_array_equal(rows.indices, np.arange(16))
    batch = {"tokens": np.arange(64, dtype=np.int32).reshape(16, 4), "mask": np.ones(16, bool)}
    placed = rows.place(batch)
    for name, array in placed.items():
        assert array.sharding == sharding and array.dtype == batch[name].dtype
        np.testing.assert_array_equal(array, batch[name])


class OfOneProcess(Sharding):
    """A sharding whose process holds the devices given only, wherever in the mesh they are."""

    def __init__(self, sharding, devices):
        self._sharding, self._devices = sharding, devices

    def addressable_devices_indices_map(self, shape):
        parts = self._sharding.addressable_devices_indices_map(shape)
        return {device: parts[device] for device in self._devices}


def test_a_process_loads_what_its_devices_hold_and_no_other_row(monkeypatch):
    devices = jax.devices()
    sharding = batch_sharding(mesh_of(devices))
    mine = OfOneProcess(sharding, [devices[i] for i in (6, 1, 2)])
    rows = processes.Rows(mine, 16)
    assert rows.indices.tolist() == [2, 3, 4, 5, 12, 13]
    whole = np.arange(16) * 10
    asked = {}

    def make(shape, of, part):
        for device, index in of.addressable_devices_indices_map(shape).items():
            asked[device] = (part(index), whole[index])
        return jax.numpy.zeros(shape)

    monkeypatch.setattr(jax, "make_array_from_callback", make)
    rows.place({"tokens": whole[rows.indices]})
    assert {device.id for device in asked} == {1, 2, 6}
    for given, wanted in asked.values():
        np.testing.assert_array_equal(given, wanted)
