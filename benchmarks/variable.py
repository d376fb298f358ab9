"""What unused choices cost: a rule with room for all experts a token, of which it uses some.

    python -m benchmarks.variable [--json FILE] [--rounds N]

The dropless FFN path, and its gradient, of a rule whose tokens may choose all 8 FFN experts and use
1, 2, 4 or 8 of them, beside a rule of exactly so many. The baseline is the physical limit here: no
choice is left unused. Times of both are of one process, interleaved.
"""

from __future__ import annotations

from moepp_jax import host_memory

if __name__ == "__main__":
    host_memory.keep_freed_on_cpu()  # before an import starts a thread

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from moepp_jax import moe
from moepp_jax.benchmarks import timing
from moepp_jax.moe import kernels

USED = (1, 2, 4, 8)
PASSES = ("forward", "forward_backward")


class Shape(NamedTuple):
    """Sizes of the layer."""

    tokens: int
    width: int
    ffn_size: int
    n_ffn: int


SHAPE = Shape(tokens=4096, width=768, ffn_size=1024, n_ffn=8)


def choices(shape: Shape, used: int, most: int) -> moe.Routing:
    """Of `used` distinct experts a token, evenly, and the rest of `most` choices unused."""
    rng = np.random.default_rng(used)
    best = np.argsort(rng.random((1, shape.tokens, shape.n_ffn)), axis=-1)[..., :used]
    experts = np.full((1, shape.tokens, most), shape.n_ffn, np.int32)
    experts[..., :used] = best
    gates = np.where(experts < shape.n_ffn, np.float32(1 / used), np.float32(0))
    nothing = jnp.zeros((1, shape.tokens, shape.n_ffn))
    return moe.Routing(jnp.asarray(experts), jnp.asarray(gates), nothing, nothing)


def rule_of(shape: Shape, used: int, most: int) -> moe.Rule:
    """One that has so many choices, and uses so many of them at balance."""
    pool = moe.Pool(shape.n_ffn)
    if most == used:
        return moe.rules.make("vanilla", pool, top_k=most)
    return moe.rules.make("remoe", pool, top_k=used)  # may have all of them


def case(shape: Shape, used: int, most: int, way: str) -> timing.Case:
    path = moe.dropless(kernels.grouped_function(jax.default_backend()))
    rule, routing = rule_of(shape, used, most), choices(shape, used, most)
    assert rule.most == most
    ffn = moe.init(jax.random.key(0), moe.describe(rule, shape.width, shape.ffn_size))["ffn"]
    x = jax.random.normal(jax.random.key(1), (1, shape.tokens, shape.width))

    def run(x, gates, ffn):
        return path(x, routing._replace(gates=gates), ffn, rule, None)[0]

    if way == "forward":
        return timing.Case(jax.jit(run), (x, routing.gates, ffn))
    dy = jax.random.normal(jax.random.key(2), x.shape)

    def both(dy, *arguments):
        y, pullback = jax.vjp(run, *arguments)
        return y, pullback(dy)

    return timing.Case(jax.jit(both), (dy, x, routing.gates, ffn))


def measure(shape: Shape, way: str, rounds: int) -> list[dict]:
    """A row for each number of used experts."""
    cases = {(n, most): case(shape, n, most, way) for n in USED for most in {n, shape.n_ffn}}
    seconds = timing.interleaved(cases, rounds, label=way)
    return [
        {
            "pass": way,
            "used": n,
            "seconds": seconds[n, shape.n_ffn].median,
            "seconds_quartiles": [seconds[n, shape.n_ffn].low, seconds[n, shape.n_ffn].high],
            "exact_seconds": seconds[n, n].median,
            "ratio": seconds[n, shape.n_ffn].median / seconds[n, n].median,
        }
        for n in USED
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--rounds", type=int, default=25)
    given = parser.parse_args()
    rows = [row for way in PASSES for row in measure(SHAPE, way, given.rounds)]
    title = f"room for {SHAPE.n_ffn} experts a token, {SHAPE}, {timing.machine()}"
    table = Table(title=title)
    for name in ("pass", "used", "ms (quartiles)", "no room left over, ms", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        low, high = (1e3 * s for s in row["seconds_quartiles"])
        taken = f"{1e3 * row['seconds']:.0f} ({low:.0f} to {high:.0f})"
        exact = f"{1e3 * row['exact_seconds']:.0f}"
        table.add_row(row["pass"], str(row["used"]), taken, exact, f"{row['ratio']:.2f}")
    Console(width=120).print(table)
    if given.json:
        text = {"machine": timing.machine(), "shape": SHAPE._asdict(), "rows": rows}
        given.json.write_text(json.dumps(text, indent=2) + "\n")


if __name__ == "__main__":
    main()
