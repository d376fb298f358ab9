"""What the compiler makes of some layers, and what it made of them when that was written down.

    python -m tests.programs

compiles them all and writes tests/data/programs.json anew: after a gain, which is then held, or
after a loss that is wanted, whose reason belongs into the commit. The tests compare with the file.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from moepp_jax import moe
from moepp_jax.benchmarks import layer, needed, programs
from moepp_jax.moe import kernels

FILE = Path(__file__).parent / "data" / "programs.json"
DEVICES = 8
SHAPE = layer.Shape(2048, DEVICES, 64, 192, 8, (2, 1, 1))
# Full and odd blocks, and few of them: each size is a program of its own to compile.
BLOCK = 32
# A program may need this much more than what is written down; so much less is a gain to be held.
ABOVE, BELOW = 1.03, 0.9


class Case(NamedTuple):
    tau: float | None
    mode: str
    way: str
    devices: int

    def __str__(self) -> str:
        name = "vanilla" if self.tau is None else f"tau {self.tau}"
        where = "one device" if self.devices == 1 else f"{self.devices} devices"
        return f"{name}, {self.mode}, {self.way}, {where}"


CASES = [
    Case(*case)
    for case in itertools.product((None, 0.75, 0.1), layer.MODES, layer.PASSES, (1, DEVICES))
]


def measured(case: Case) -> dict:
    """The numbers of a case, as they stand in the file."""
    subject = next(s for s in layer.subjects(SHAPE) if s.tau == case.tau)
    grouped = dataclasses.replace(kernels.grouped_function("cpu"), block=BLOCK)
    path = moe.with_capacity(layer.GAMMA) if case.mode == "capacity" else moe.dropless(grouped)
    built = moe.MoE(layer.rule_of(subject), path)
    if case.mode == "capacity":
        rows = SHAPE.tokens * layer.GAMMA * built.rule.ffn_load
        blocks = programs.NO_BLOCKS
    else:
        counts = layer.balanced_counts(subject, SHAPE)
        rows, blocks = int(counts.sum()), _blocks(grouped, counts, case.devices)
    read = programs.read(_compiled(built, case), blocks)
    size = (SHAPE.width, SHAPE.ffn_size, SHAPE.tokens, float(rows))
    least = needed.flops(built.rule, *size, case.way) / case.devices
    numbers = read._asdict() | {"flops_over_ideal": read.flops / least}
    return {name: numbers[name] for name in ("flops_over_ideal", "accessed", "temp_bytes")} | {
        f"{kind}, {what}": number
        for kind, both in read.collectives.items()
        for what, number in zip(("count", "bytes"), both, strict=True)
    }


def _blocks(grouped: moe.Blocked, counts: np.ndarray, devices: int) -> programs.Blocks:
    """Of one device, in the mean over the devices."""
    own = counts.reshape(devices, -1)
    rows = SHAPE.tokens * min(layer.TOP_K, own.shape[1])
    each = [programs.blocks(grouped, c, rows) for c in own]
    return programs.Blocks(each[0].compiled, sum(b.run for b in each) / devices)


def _compiled(built: moe.MoE, case: Case) -> jax.stages.Compiled:
    devices, auto = jax.devices()[: case.devices], (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((case.devices,), ("expert",), axis_types=auto, devices=devices)

    def forward(x, previous, params):
        if case.devices == 1:
            return moe.local(x, previous, params, built)[0]
        return moe.sharded(x, previous, params, built, mesh)[0]

    def shape(a, spec):
        return jax.ShapeDtypeStruct(a, jnp.float32, sharding=jax.NamedSharding(mesh, spec))

    tokens, experts = jax.P("expert"), {"ffn": jax.P("expert")}
    described = moe.describe(built.rule, SHAPE.width, SHAPE.ffn_size)
    params = {
        group: {name: shape(p.shape, experts.get(group, jax.P())) for name, p in of.items()}
        for group, of in described.items()
    }
    S = SHAPE.tokens // SHAPE.groups
    x, previous = (
        shape((SHAPE.groups, S, size), tokens) for size in (SHAPE.width, built.pool.size)
    )

    def both(dy, x, previous, params):
        y, pullback = jax.vjp(lambda x, params: forward(x, previous, params), x, params)
        return y, pullback(dy)

    if case.way == "forward":
        return jax.jit(forward).lower(x, previous, params).compile()
    return jax.jit(both).lower(x, x, previous, params).compile()


def losses(case: Case, found: dict, written: dict) -> list[str]:
    """What is worse than what is written down, and what is better and not yet written down."""
    said = []
    for name in {**written, **found}:
        now, then = found.get(name, 0), written.get(name, 0)
        if now > ABOVE * then:
            said.append(f"{case}: {name} is {now:.6g}, and was {then:.6g}")
        elif now < BELOW * then:
            said.append(
                f"{case}: {name} is {now:.6g}, no longer {then:.6g}: a gain; to hold it, run "
                "python -m tests.programs"
            )
    return said


def written() -> dict:
    return json.loads(FILE.read_text())


def main() -> None:
    from tests import conftest  # noqa: F401  the tests' devices and compiler options

    found = {str(case): measured(case) for case in CASES}
    text = {"jaxlib": jaxlib.__version__, "cases": found}
    FILE.write_text(json.dumps(text, indent=1) + "\n")
    print(f"{FILE}: {len(found)} programs")


if __name__ == "__main__":
    main()
