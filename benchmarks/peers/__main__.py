"""The command `python -m benchmarks.peers`."""

from __future__ import annotations

from moepp_jax import host_memory

if __name__ == "__main__":
    host_memory.keep_freed_on_cpu()  # before an import starts a thread

import argparse
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from moepp_jax.analysis import drawing
from moepp_jax.benchmarks import timing
from moepp_jax.benchmarks.peers import inputs, jax_layers, torch_layers, writing

PASSES = ("forward", "forward_backward")
Named = dict[tuple[str, str], timing.Case]
# Of the largest number: float32 products of thousands of numbers, in another order.
TOLERANCE = 1e-4


class UnequalError(AssertionError):
    """Layers that should compute the same do not."""


def cases(sizes: inputs.Sizes, made: inputs.Inputs, way: str) -> Named:
    """(kind, name) -> the layer with its arguments; those in PyTorch where that is installed."""
    own = jax_layers.layers(sizes) | jax_layers.alone(sizes)
    found = {
        key: jax_layers.case(layer, jax_layers.params_of(key[0], made), made, way)
        for key, layer in own.items()
    }
    if not torch_layers.missing():
        others = torch_layers.layers(sizes, made)
        found |= {key: torch_layers.case(layer, made, way) for key, layer in others.items()}
    return found


def require_equal(named: Named, way: str) -> dict[tuple[str, str], float]:
    """By how much layers differ from the first one of their kind, in outputs and in gradients of
    the tokens, as shares of the largest number.

    Raises:
      UnequalError: by more than TOLERANCE.
    """
    first: dict[str, list[np.ndarray]] = {}
    errors = {}
    for (kind, name), case in named.items():
        out = case.function(*case.arguments)
        arrays = [np.asarray(a) for a in ((out,) if way == "forward" else out[:2])]
        wanted = first.setdefault(kind, arrays)
        pairs = zip(arrays, wanted, strict=True)
        error = max(float(np.abs(a - w).max() / np.abs(w).max()) for a, w in pairs)
        if not error <= TOLERANCE:
            raise UnequalError(
                f"{name} ({kind}, {way}) is {error:.1e} of the largest number off from the first "
                f"layer of its kind: at most {TOLERANCE:.0e} may be"
            )
        errors[kind, name] = error
    return errors


def measure(sizes: inputs.Sizes, way: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each layer, with its time over that of this package's layer of the same kind."""
    named = cases(sizes, inputs.make(sizes), way)
    errors = require_equal(named, way)
    seconds = timing.interleaved(named, rounds, label=way)
    own = {kind: seconds[kind, name] for kind, name in named if name.startswith("moepp_jax")}
    return [
        {
            "pass": way,
            "kind": kind,
            "layer": name,
            "seconds": seconds[kind, name].median,
            "seconds_quartiles": [seconds[kind, name].low, seconds[kind, name].high],
            "over_own": seconds[kind, name].median / own[kind].median,
            "over_moepp": seconds[kind, name].median / own["moepp"].median,
            "relative_error": errors[kind, name],
        }
        for kind, name in named
    ]


def about(sizes: inputs.Sizes) -> dict[str, Any]:
    """What the times hang on."""
    return {
        "machine": timing.machine(),
        "threads": os.cpu_count(),
        "versions": {name: _version(name) for name in ("jax", "torch", "transformers")},
        "sizes": sizes._asdict(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--figure", type=Path, help="draw them: STEM.png and STEM.svg")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    default = inputs.Sizes()
    for name in ("tokens", "width", "ffn_size", "n_ffn"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    given = parser.parse_args()
    if line := torch_layers.missing():
        print(line, file=sys.stderr)
    sizes = default._replace(
        tokens=given.tokens, width=given.width, ffn_size=given.ffn_size, n_ffn=given.n_ffn
    )
    rows = [row for way in given.passes for row in measure(sizes, way, given.rounds)]
    report = about(sizes) | {"rows": rows}
    writing.show(report, Console(width=140))
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    if given.figure:
        drawing.write(writing.figure(report), given.figure)


if __name__ == "__main__":
    main()
