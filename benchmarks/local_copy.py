"""What a local copy (`train.local_dir`) holds training up for, and how long its disk takes.

    python -m benchmarks.local_copy [--megabytes N] [--rounds N] [--dir FOLDER]

Of one process with all its devices: milliseconds a GB of state that training waits for, which are
those of copying the state to the host's memory and what the step after it takes longer than others;
seconds a GB until the copy is on the disk, in the background; and seconds a GB that a start reads,
verifies and places. On CPU nothing is copied, but the step after has to find other memory for its
results; on accelerators the link to the host decides.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moepp_jax.benchmarks import timing
from moepp_jax.cells import Cells
from moepp_jax.local_disk import Disk

_ARRAYS = 16


class Taken(NamedTuple):
    """Seconds of one round."""

    blocks: float
    writes: float
    restores: float


def measure(folder: Path, megabytes: float, rounds: int) -> tuple[float, list[Taken]]:
    """The GB of a state of about so many megabytes, and what each round took."""
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))
    rows = max(1, round(megabytes * 1e6 / _ARRAYS / 4096 / mesh.size)) * mesh.size
    lies = NamedSharding(mesh, P("x"))
    state = [jax.device_put(jnp.full((rows, 1024), float(i)), lies) for i in range(_ARRAYS)]
    cells, disk = Cells(_abstract(state), mesh), Disk(folder, 0)
    taken = []
    advance = jax.jit(lambda arrays: [array + 1 for array in arrays], donate_argnums=0)
    state = jax.block_until_ready(advance(state))  # compiled
    for step in range(rounds):
        marks = [time.perf_counter()]
        state = jax.block_until_ready(advance(state))
        marks.append(time.perf_counter())
        copied = cells.copied(state)
        state = jax.block_until_ready(advance(state))
        marks.append(time.perf_counter())
        disk.prune(step - 1, step - 1)
        disk.write(step, copied, {})
        marks.append(time.perf_counter())
        copy = disk.copies()[-1]
        assert not any(copy.damage(cell) for cell in cells.here)
        placed = cells.placed({cell: copy.read(cell) for cell in cells.here})
        jax.block_until_ready(placed)
        marks.append(time.perf_counter())
        step_alone, with_copy, *others = np.diff(marks).tolist()
        taken.append(Taken(with_copy - step_alone, *others))
        del placed, copied
    return sum(array.nbytes for array in state) / 1e9, taken


def _abstract(state: list[jax.Array]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for a in state]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="on the disk to measure; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        gb, taken = measure(Path(folder), args.megabytes, args.rounds)
    print(f"{gb:.2f} GB on {jax.device_count()} devices, {timing.machine()}")
    for name, form in (("blocks", "{:,.0f} ms"), ("writes", "{:.2f} s"), ("restores", "{:.2f} s")):
        each = [getattr(one, name) / gb * (1e3 if form.endswith("ms") else 1) for one in taken]
        low, median, high = (form.format(q) for q in np.quantile(each, (0, 0.5, 1)))
        print(f"{name:8} {median} a GB ({low} to {high})")


if __name__ == "__main__":
    main()
