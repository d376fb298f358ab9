"""python -m benchmarks.gpu_report --out=DIR: measures a machine with GPUs, and writes a report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from moepp_jax.benchmarks import timing
from moepp_jax.benchmarks.gpu_report import (
    attention,
    equality,
    exchanges,
    layer,
    paper,
    step,
    writing,
)
from moepp_jax.benchmarks.gpu_report.sizes import Sizes, sizes
from moepp_jax.errors import ConfigError

Measure = Callable[[Sizes, int], list[dict[str, Any]]]

# In the order in which they are worth most, should time run out.
PARTS: dict[str, Measure] = {
    "equality": equality.measure,
    "exchanges": exchanges.measure,
    "step": step.measure,
    "paper": paper.measure,
    "attention": attention.measure,
    "layer": layer.measure,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 if all that was to be measured was, and is right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=10.0, help="no part begins after these")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--allow-cpu", action="store_true", help="small, to see that it works")
    args = parser.parse_args(arguments)
    platform = jax.default_backend()
    if platform == "cpu" and not args.allow_cpu:
        print("error: JAX sees no GPU here; --allow-cpu tries the report in small", file=sys.stderr)
        return 2
    try:
        chosen = sizes(jax.devices())
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    parts = {name: PARTS[name] for name in PARTS if name in args.parts}
    report = {
        "machine": timing.machine(),
        "platform": platform,
        "devices": jax.device_count(),
        "sizes": {"tokens": chosen.tokens, "dtype": chosen.dtype, "memory": chosen.memory},
        "parts": taken(parts, chosen, args.rounds, 60 * args.minutes),
    }
    writing.write(report, args.out)
    print(f"{args.out / writing.PAGE}: {writing.summary(report)}")
    return 0 if writing.is_sound(report) else 1


def taken(
    parts: Mapping[str, Measure], chosen: Sizes, rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Each part's rows and duration; what failed or found no time says so instead."""
    begin, found = time.monotonic(), {}
    for name, measure in parts.items():
        start = time.monotonic()
        if start - begin > seconds:
            found[name] = {"skipped": f"{seconds / 60:g} minutes were over"}
            continue
        try:
            found[name] = {"rows": measure(chosen, rounds)}
        except Exception as error:  # one part's failure is a finding, and no reason to lose others
            first = (str(error).strip() or "no message").splitlines()[0]
            found[name] = {"failed": f"{type(error).__name__}: {first}"}
        found[name]["seconds"] = time.monotonic() - start
    return found


if __name__ == "__main__":
    sys.exit(main())
