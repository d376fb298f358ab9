"""What summing up a checkpoint costs, by one process as it was and by each for itself as it is.

    python -m benchmarks.checksums [--json FILE] [--rounds N] [--megabytes N] [--hosts N]
        [--bucket GB_PER_S] [--to_host GB_PER_S]

Measured, with warm file caches: seconds a GB of files by SHA-256, file by file, and by XXH3-128 in
parts, on the threads that are used. Computed from these: what a save and a start of the 7B model
wait for on so many hosts, each of which reads a bucket at the rate of --bucket and copies from its
devices at that of --to_host. Those two rates are given, not measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from moepp_jax import checksums, flops
from moepp_jax.benchmarks import timing
from moepp_jax.config import Config
from moepp_jax.configs import moepp_7b

FILES = 8
BYTES_A_PARAMETER = 12  # in float32, with AdamW's two moments


class Rates(NamedTuple):
    """Seconds a GB, of one host."""

    sha256: float
    xxh3: float
    bucket: float
    to_host: float


class Waits(NamedTuple):
    """Seconds at a save and at a start: that hold training up, and that pass in the background."""

    save_blocks: float
    save_sums: float
    restore_verifies: float
    restore_reads: float


def before(gb: float, hosts: int, rates: Rates) -> Waits:
    """Process 0 reads all of it: once after a save, and twice before what was saved is restored."""
    summed = gb * max(rates.bucket, rates.sha256)
    here = gb / hosts
    return Waits(here * rates.to_host, summed, 2 * summed, here * rates.bucket)


def after(gb: float, hosts: int, rates: Rates) -> Waits:
    """Each process reads its share, once each time."""
    here = gb / hosts
    summed = here * max(rates.bucket, rates.xxh3)
    return Waits(here * rates.to_host, summed, summed, here * rates.bucket)


def measure(folder: Path, megabytes: float, rounds: int) -> dict[str, timing.Seconds]:
    """Seconds a GB, by either sum, of files of so many megabytes together."""
    size = round(megabytes * 1e6 / FILES)
    names = [f"params/{number}" for number in range(FILES)]
    (folder / "params").mkdir()
    for number, name in enumerate(names):
        (folder / name).write_bytes(np.random.default_rng(number).bytes(size))

    def sha256() -> list[str]:
        with ThreadPoolExecutor() as pool:
            return list(pool.map(checksums.sha256, [folder / name for name in names]))

    cases = {
        "sha256": timing.Case(sha256, ()),
        "xxh3": timing.Case(lambda: list(checksums.summed(folder, names).values()), ()),
    }
    taken = timing.interleaved(cases, rounds)
    gb = size * FILES / 1e9
    return {name: timing.Seconds(*(s / gb for s in seconds)) for name, seconds in taken.items()}


def checkpoint_gb(config: Config) -> float:
    return flops.count(config) * BYTES_A_PARAMETER / 1e9


def show(gb: float, hosts: int, taken: dict[str, timing.Seconds], rates: Rates) -> None:
    console = Console(width=110)
    for name, seconds in taken.items():
        console.print(
            f"{name}: {seconds.median:.3f} s/GB ({seconds.low:.3f} to {seconds.high:.3f})"
        )
    table = Table(title=f"{gb:.0f} GB on {hosts} hosts, {timing.machine()}")
    for name in ("seconds", *Waits._fields):
        table.add_column(name, justify="right")
    for way in (before, after):
        table.add_row(way.__name__, *(f"{s:,.1f}" for s in way(gb, hosts, rates)))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=float, default=2000, help="that are summed up a round")
    parser.add_argument("--hosts", type=int, default=16)
    parser.add_argument("--bucket", type=float, default=1.0, help="GB/s that a host reads")
    parser.add_argument("--to_host", type=float, default=10.0, help="GB/s from a host's devices")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        taken = measure(Path(folder), args.megabytes, args.rounds)
    medians = {name: seconds.median for name, seconds in taken.items()}
    rates = Rates(**medians, bucket=1 / args.bucket, to_host=1 / args.to_host)
    gb = checkpoint_gb(Config.parse(moepp_7b.get_config()))
    show(gb, args.hosts, taken, rates)
    if args.json:
        seconds = {way.__name__: way(gb, args.hosts, rates)._asdict() for way in (before, after)}
        numbers = {
            "machine": timing.machine(),
            "seconds_per_gb": {name: seconds._asdict() for name, seconds in taken.items()},
            "given_seconds_per_gb": {"bucket": rates.bucket, "to_host": rates.to_host},
            "checkpoint_gb": gb,
            "hosts": args.hosts,
            "seconds": seconds,
        }
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
