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
from moepp_jax.checkpoint import SaveError
from moepp_jax.errors import ConfigError
from moepp_jax.mesh import AXES, batch_sharding
from tests.environments import DETECT, JOBSET, LAUNCHERS, MPI, POD, SLURM, known


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_who_joins_who_runs_alone_and_who_is_told_what(launcher, monkeypatch):
    monkeypatch.setattr(distributed, "find_spec", lambda name: None)  # without `kubernetes`
    environ, expected = LAUNCHERS[launcher]
    assert distributed.settings(environ, "off") is None
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=re.escape(expected)):
            distributed.settings(environ)
        return
    assert distributed.settings(environ) == expected
    assert distributed.settings(environ, "on") is not None


@pytest.mark.parametrize("index", ["0", "2"])
def test_where_the_server_of_a_kubernetes_job_can_be_asked_it_is(index, monkeypatch):
    monkeypatch.setattr(distributed, "find_spec", lambda name: name == "kubernetes" or None)
    assert distributed.settings(POD | {"JOB_COMPLETION_INDEX": index}) == DETECT


@pytest.mark.parametrize(
    "environ, found, said",
    [
        (SLURM, DETECT, "process 0 of this run, as SLURM_NTASKS=4 and this is process 1;"),
        (
            SLURM | {"SLURM_PROCID": "0", "SLURM_PTY_PORT": "1"},
            DETECT,
            "processes 1 to 3 of this run, as SLURM_NTASKS=4 and this is process 0; in a shell of "
            "`srun --pty` they never come: start the command with srun;",
        ),
        (MPI, DETECT, "process 1 of this run, as OMPI_COMM_WORLD_SIZE=2 and this is process 0;"),
        ({}, known("a:1", 3, 2), "process 0 of this run, as num_processes = 3 and this is"),
        ({"TPU_ML_PLATFORM": "JAX"}, DETECT, "the other processes of this run;"),
    ],
)
def test_who_waits_says_for_whom_and_how_to_do_without(environ, found, said):
    awaited = distributed.awaited(environ, found)
    assert awaited.startswith(said) and "a process for itself takes --distributed=off" in awaited


def test_what_is_told_is_not_detected():
    assert distributed.settings(JOBSET) == known("run-pod-0-0.run:1234", 4, 3)
    assert distributed.settings(JOBSET | {"JAX_PROCESS_ID": "2"})["process_id"] == 2
    flags = {"coordinator": "a:1", "num_processes": 2, "process_id": 0}
    assert distributed.settings(JOBSET, "auto", **flags) == known("a:1", 2, 0)
    assert distributed.settings({}, "on", **flags) == known("a:1", 2, 0)


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
    waits, error = run.stderr.splitlines()
    assert waits == (
        "waiting at localhost:1 for process 0 of this run, as num_processes = 2 and this is "
        "process 1; a process for itself takes --distributed=off"
    )
    assert error.startswith("error: not all processes of this run met at localhost:1 ")


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


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device", "/x"), ConfigError("bad")]
)
def test_what_one_process_cannot_read_or_write_ends_all_with_one_line(monkeypatch, capsys, error):
    def end(message):
        raise SystemExit(message)

    monkeypatch.setattr(distributed, "_end", end)
    with pytest.raises(SystemExit, match=r"process 0: (\[Errno 28\] No space .*'/x'|bad)$"):
        distributed.abandon(error)
    assert not capsys.readouterr().err


def test_an_error_is_of_a_lost_peer_if_what_it_comes_of_is():
    torn = RuntimeError("UNKNOWN: Gloo AllGather failed:\n Connection closed by peer")
    save = SaveError("checkpoint 15 cannot be saved: no room")
    assert distributed.of_a_lost_peer(save) == ""
    save.__cause__ = torn
    assert distributed.of_a_lost_peer(save) == (
        "UNKNOWN: Gloo AllGather failed: Connection closed by peer"
    )
    assert distributed.of_a_lost_peer(None) == ""
