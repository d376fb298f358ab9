"""Saved on any mesh by any number of processes, restored on any other: the same bits."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from tests import jobs
from tests.chaos.room import Room
from tests.chaos.trial import Lost, Trial

MESHES = [(8, 1, 1), (1, 1, 8), (2, 1, 4), (4, 1, 2), (2, 2, 2)]  # as tests/test_state.py's
PROCESSES = (1, 2, 4)

# Each number of a state is known from its name, so a process compares what it has got by itself.
_COMMON = """
import json, sys, zlib
from pathlib import Path
import jax, numpy as np
from moepp_jax import distributed, mesh as mesh_lib, state as state_lib
from moepp_jax.checkpoint import CheckpointError, Checkpoints
from tests import tiny

distributed.initialize()
folder, meshes = Path(sys.argv[1]), json.loads(sys.argv[2])

def abstract(shape):
    axes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.expert"), shape))
    c = tiny.config(**{"model.num_layers": 1, "moe.n_ffn": 8} | axes)
    return state_lib.assemble(c, mesh_lib.make_mesh(c)).abstract

def value(path, leaf):
    chance = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
    return chance.normal(0, 1000, leaf.shape).astype(leaf.dtype)

def array(path, leaf):
    whole = value(path, leaf)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: whole[index])

def same(path, leaf):
    whole = value(path, leaf)
    return all(np.array_equal(s.data, whole[s.index]) for s in leaf.addressable_shards)
"""

_SAVE = """
for shape in meshes:
    with Checkpoints(folder / "x".join(map(str, shape)), 2) as checkpoints:
        checkpoints.save(1, jax.tree_util.tree_map_with_path(array, abstract(shape)))
        checkpoints.wait()
"""

_RESTORE = """
for run in sorted(folder.glob("*/*")):
    for shape in meshes:
        try:
            with Checkpoints(run, 2) as checkpoints:
                state = checkpoints.restore(1, abstract(shape))
            ok = jax.tree_util.tree_map_with_path(same, state)
            verdict = "same" if all(jax.tree.leaves(ok)) else "other numbers"
        except CheckpointError as error:
            verdict = " ".join(str(error).split())
        names = [f"{run.parent.name}/{run.name}", "x".join(map(str, shape))]
        print("\\nverdict", json.dumps([*names, verdict]), flush=True)
"""


def trials(room: Room, kills: int, seed: int) -> Iterator[Trial]:
    for saved, restored in itertools.product(PROCESSES, PROCESSES):
        for one, other in itertools.product(map(_name, MESHES), map(_name, MESHES)):
            fault = f"saved by {saved}, restored by {restored} processes"
            moved = functools.partial(_moved, room, f"{saved}/{one}", restored, other)
            yield Trial(fault, f"{one} to {other}", moved)


def _name(mesh: tuple[int, ...]) -> str:
    return "x".join(map(str, mesh))


def _moved(room: Room, saved: str, processes: int, mesh: str, folder: Path) -> None:
    with room.several:
        verdicts = [v[saved, mesh] for v in _verdicts(room, processes) if (saved, mesh) in v]
    if verdicts != ["same"] * processes:
        raise Lost(f"restored as {verdicts}")


@functools.cache
def _verdicts(room: Room, processes: int) -> list[dict[tuple[str, str], str]]:
    """Of each process: what became of what was saved where, on which mesh."""
    said = _all_meshes(_saved(room), processes, _RESTORE)
    lines = [re.findall(r"^verdict (.*)$", out, re.MULTILINE) for out in said]
    found = [[json.loads(line) for line in of_process] for of_process in lines]
    return [{(run, mesh): verdict for run, mesh, verdict in of_process} for of_process in found]


@functools.cache
def _saved(room: Room) -> Path:
    folder = room.folder / "meshes"
    for processes in PROCESSES:
        _all_meshes(folder / str(processes), processes, _SAVE)
    return folder


def _all_meshes(folder: Path, processes: int, code: str) -> list[str]:
    """Does something for every mesh in so many processes; what each said."""
    program, devices = ["-c", _COMMON + code], 8 // processes
    arguments = [folder, json.dumps(MESHES)]
    with jobs.Job(arguments, processes, program=program, devices=devices) as job:
        said = [process.communicate(timeout=600) for process in job.processes]
        for process, (_, err) in zip(job.processes, said, strict=True):
            if process.returncode != 0:
                raise Lost(f"{processes} processes ended with {process.returncode}: {err[-400:]}")
    return [out for out, _ in said]
