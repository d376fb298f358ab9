"""What converting a checkpoint of many gigabytes takes: seconds, and memory at its peak.

    python -m benchmarks.conversion [--layers N] [--dir FOLDER] [--json FILE]

Makes a checkpoint in the released layout with the shapes of the 7B model, in bfloat16, of fewer
layers (6 are 4.1 GB; its numbers are random), converts it and writes it back, each in a process of
its own. Beside their memory at its peak stand that of a process which only imports the package, and
a layer of the model in float32: conversion goes tensor by tensor. FOLDER needs four times the room
of the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from moepp_jax.benchmarks import timing
from moepp_jax.config import Config
from moepp_jax.configs import moepp_7b
from moepp_jax.interop import hf_config, shards
from moepp_jax.interop.layout import layout

_DTYPE = "bfloat16"


class Taken(NamedTuple):
    seconds: float
    peak_gb: float


def checkpoint(folder: Path, config: Config) -> tuple[float, float]:
    """Writes one; returns the gigabytes of it, and of one of its layers in float32."""
    places = layout(config)
    rng = np.random.default_rng(0)
    noise = (config.model.init_std * rng.standard_normal(2**20)).astype(jnp.dtype(_DTYPE))

    def produce(name: str) -> np.ndarray:
        return np.resize(noise, places[name].shape)

    folder.mkdir()
    written, _ = hf_config.fields_of(config, {"torch_dtype": _DTYPE}, special={})
    (folder / "config.json").write_text(json.dumps(written))
    shards.write(folder, {name: (_DTYPE, at.shape) for name, at in places.items()}, produce)
    size = sum(file.stat().st_size for file in folder.iterdir())
    in_layer = sum(np.prod(at.shape) for name, at in places.items() if ".layers.0." in name)
    return size / 1e9, float(4 * in_layer / 1e9)


def run(*command: str) -> Taken:
    """A process of its own, and what it took at its peak."""
    measured = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, *sys.argv[1:]], check=True, stdout=sys.stderr)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", measured, *command], check=True, stdout=subprocess.PIPE, text=True
    )
    return Taken(time.perf_counter() - start, int(done.stdout) * 1024 / 1e9)


def measure(config: Config, folder: Path) -> dict[str, float | Taken]:
    """What the conversion to and fro takes, and how large what was converted is."""
    source, workdir, back = (str(folder / name) for name in ("source", "run", "back"))
    size, layer = checkpoint(Path(source), config)
    convert = ("-m", "moepp_jax.main", "convert")
    return {
        "gb": size,
        "layer_gb": layer,
        "imports alone": run("-c", "import moepp_jax.main"),
        "from-hf": run(*convert, "from-hf", source, workdir),
        "to-hf": run(*convert, "to-hf", workdir, back),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dir", type=Path, help="where there is room; by default temporary files'")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    fields = moepp_7b.get_config()
    fields.model.num_layers = args.layers
    with tempfile.TemporaryDirectory(dir=args.dir) as temporary:
        found = measure(Config.parse(fields), Path(temporary))
    size, layer = found["gb"], found["layer_gb"]
    print(f"{size:.2f} GB in {_DTYPE}, a layer {layer:.2f} GB in float32; {timing.machine()}")
    taken = {name: value for name, value in found.items() if isinstance(value, Taken)}
    for name, (seconds, peak) in taken.items():
        print(f"{name:14} {seconds:6.1f} s, at most {peak:.2f} GB resident")
    if args.json:
        numbers = found | {name: value._asdict() for name, value in taken.items()}
        args.json.write_text(json.dumps({"machine": timing.machine(), **numbers}, indent=1) + "\n")


if __name__ == "__main__":
    main()
