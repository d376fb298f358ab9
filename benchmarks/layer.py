"""What a MoE++ layer costs: beside the bare matrix products in it, and beside a vanilla MoE.

    python -m benchmarks.layer [--json FILE] [--rounds N] [--models 0.6B 1B 2B 7B]

For each tau, and for the vanilla MoE of the same FFN experts, it times in one process, interleaved:
the whole layer; its FFN path (from the chosen experts to the combined output); and the matrix
products that the path contains, bare, over the same number of rows, operands ready in memory. The
products are the physical limit of the path, the vanilla layer is the baseline of the speed-up.

In capacity mode the rows are the slots, whatever the router does. In dropless mode they are the
assignments that FFN experts get, so the router is set to the balance point of its tau.

Beside the times stands what the compiler makes of the layer: operations of its products over those
needed, and temporary memory. The roofline is what the needed operations and bytes take at the rates
of a large product and of a large array, measured in the same run.
"""

from __future__ import annotations

from moepp_jax import host_memory

if __name__ == "__main__":
    host_memory.keep_freed_on_cpu()  # before an import starts a thread

import argparse
import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from moepp_jax import moe
from moepp_jax.benchmarks import bare, layer_table, needed, programs, timing
from moepp_jax.moe import kernels, param
from moepp_jax.storage import write_atomic

TAUS = (0.1, 0.25, 0.5, 0.75, 1.0)
GAMMA = 1.1
TOP_K = 2
_FLOAT32 = jnp.dtype(jnp.float32)
MODES = ("capacity", "dropless")
PASSES = ("forward", "forward_backward")


class Shape(NamedTuple):
    """Sizes of the layer; tokens come as `groups` sequences."""

    tokens: int
    groups: int
    width: int
    ffn_size: int
    n_ffn: int
    zero_computation: tuple[int, int, int]


class Subject(NamedTuple):
    """A pool at a tau; tau is None for the vanilla MoE."""

    pool: moe.Pool
    tau: float | None
    top_k: int = TOP_K

    @property
    def weight(self) -> float:
        return 1.0 if self.tau is None else self.tau

    @property
    def theory(self) -> float:
        """Speed-up over the vanilla MoE: one over the share of assignments on FFN experts."""
        ffn = self.weight * self.pool.n_ffn
        return (ffn + self.pool.n_zero_computation) / ffn


# The paper's layers; fewer tokens of the 7B's, which has eight times the operations of the 0.6B's.
MODELS = {
    "0.6B": Shape(4096, 2, 768, 2048, 8, (2, 1, 1)),
    "1B": Shape(4096, 2, 768, 2048, 16, (2, 1, 1)),
    "2B": Shape(4096, 2, 768, 2048, 32, (6, 1, 1)),
    "7B": Shape(2048, 1, 1536, 4096, 16, (2, 1, 1)),
}


def subjects(shape: Shape) -> list[Subject]:
    pool = moe.Pool(shape.n_ffn, *shape.zero_computation)
    return [Subject(moe.Pool(shape.n_ffn), None), *(Subject(pool, tau) for tau in TAUS)]


def rule_of(subject: Subject) -> moe.Rule:
    return moe.rules.make("moepp", subject.pool, top_k=subject.top_k, tau=float(subject.weight))


def grouped_here():
    """The dropless arithmetic of this platform."""
    return kernels.grouped_function(jax.default_backend())


def layer_of(subject: Subject, mode: str) -> moe.MoE:
    platform = jax.default_backend()
    expert, take = kernels.experts_function(platform), kernels.taking(platform)
    paths = {
        "capacity": moe.with_capacity(GAMMA, expert, tile=kernels.slots_tile(platform), take=take),
        "dropless": moe.dropless(grouped_here(), take=take),
    }
    return moe.MoE(rule_of(subject), paths[mode])


def balanced_logits(subject: Subject, shape: Shape) -> jax.Array:
    """Router logits whose choices meet the balance point of tau: noise, FFN experts shifted."""
    noise = np.random.default_rng(0).gumbel(size=(shape.tokens, subject.pool.size))
    target = subject.top_k / subject.theory
    low, high = -10.0, 10.0
    for _ in range(40):
        shift = (low + high) / 2
        logits = noise + shift * (np.arange(subject.pool.size) < subject.pool.n_ffn)
        chosen = np.argsort(-logits, axis=1)[:, : subject.top_k]
        low, high = (
            (shift, high) if (chosen < subject.pool.n_ffn).sum(1).mean() < target else (low, shift)
        )
    return jnp.asarray(logits, jnp.float32).reshape(shape.groups, -1, subject.pool.size)


def balanced_counts(subject: Subject, shape: Shape) -> np.ndarray:
    """Rows of each FFN expert under `balanced_logits`."""
    _, experts = jax.lax.top_k(balanced_logits(subject, shape), subject.top_k)
    return np.bincount(np.ravel(experts), minlength=subject.pool.size)[: subject.pool.n_ffn]


def cases_of(
    subject: Subject, shape: Shape, mode: str, way: str, dtype: jnp.dtype = _FLOAT32
) -> dict[str, timing.Case]:
    """The layer, its FFN path and the bare products, ready to be timed; the router in float32."""
    layer = layer_of(subject, mode)
    described = moe.describe(layer.rule, shape.width, shape.ffn_size)
    others = {group: of for group, of in described.items() if group != "ffn"}
    params = param.used(others, moe.init(jax.random.key(0), others), dtype)
    params["ffn"] = _ffn_params(shape, dtype)
    # Choices come from the residual alone, which is how they can be set: W_g is the identity.
    params["router"]["w"] *= 0
    params["router"]["w_residual"] = jnp.eye(subject.pool.size)
    x = jax.random.normal(
        jax.random.key(1), (shape.groups, shape.tokens // shape.groups, shape.width), dtype
    )
    previous = balanced_logits(subject, shape)
    routing = layer.rule.route(x, previous, params["router"])

    def whole(x, params):
        return moe.local(x, previous, params, layer)[0]

    def path(x, gates, ffn):
        return layer.path(x, routing._replace(gates=gates), ffn, layer.rule, None)[0]

    if mode == "capacity":
        tokens = x.shape[1]
        slots = moe.capacity(layer.rule.load, GAMMA, tokens)[0]
        rows = slots * shape.groups
    else:
        rows = round(int(balanced_counts(subject, shape).sum()) / subject.pool.n_ffn)
    return {
        "layer": _timed(whole, way, x, params),
        "path": _timed(path, way, x, routing.gates, params["ffn"]),
        "products": bare.products(params["ffn"], rows, way),
    }


@functools.lru_cache(1)
def _ffn_params(shape: Shape, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """The same for all subjects of a shape: a layer of the 7B's has 1.2 GB of them."""
    described = moe.describe(rule_of(subjects(shape)[0]), shape.width, shape.ffn_size)
    ffn = {"ffn": described["ffn"]}
    return param.used(ffn, moe.init(jax.random.key(0), ffn), dtype)["ffn"]


class Work(NamedTuple):
    """What a layer needs, and what the compiler makes of it.

    Attributes:
      flops, size: operations and bytes that are needed.
      over_ideal: operations of the program's products over `flops`; None where kernels hide them.
    """

    flops: float
    size: int
    over_ideal: float | None
    temp_bytes: int

    def columns(self) -> dict[str, float | int | None]:
        return {"compiler_flops_over_ideal": self.over_ideal, "temp_bytes": self.temp_bytes}


def work_of(subject: Subject, shape: Shape, mode: str, way: str, case: timing.Case) -> Work:
    """Of the case "layer": compiles it. With capacity the padding of gamma is needed."""
    rule, blocks, hidden = rule_of(subject), programs.NO_BLOCKS, False
    rows = shape.tokens * GAMMA * rule.ffn_load
    if mode == "dropless":
        counts, grouped = balanced_counts(subject, shape), grouped_here()
        rows, hidden = float(counts.sum()), not isinstance(grouped, moe.Blocked)
        if not hidden:
            room = shape.tokens * min(subject.top_k, shape.n_ffn)
            blocks = programs.blocks(grouped, counts, room)
    read = programs.read(case.function.lower(*case.arguments).compile(), blocks)
    size = (shape.width, shape.ffn_size, shape.tokens)
    least = needed.flops(rule, *size, rows, way)
    itemsize = case.arguments[0].dtype.itemsize
    return Work(
        least,
        needed.bytes_moved(rule, *size, way, itemsize),
        None if hidden else read.flops / least,
        read.temp_bytes,
    )


def _timed(function, way: str, *arguments) -> timing.Case:
    if way == "forward":
        return timing.Case(jax.jit(function), arguments)
    result = jax.eval_shape(function, *arguments)
    cotangent = jax.random.normal(jax.random.key(2), result.shape, result.dtype)

    def both(cotangent, *arguments):
        y, pullback = jax.vjp(function, *arguments)
        return y, pullback(cotangent)

    return timing.Case(jax.jit(both), (cotangent, *arguments))


def measure(
    shape: Shape, mode: str, way: str, rounds: int, dtype: jnp.dtype = _FLOAT32
) -> list[dict]:
    """One row a subject."""
    each = subjects(shape)
    cases = {
        (i, name): case
        for i, subject in enumerate(each)
        for name, case in cases_of(subject, shape, mode, way, dtype).items()
    }
    works = [work_of(s, shape, mode, way, cases[i, "layer"]) for i, s in enumerate(each)]
    seconds = timing.interleaved(cases | bare.limits(dtype), rounds, label=f"{mode} {way}")
    limits = bare.Limits.of(seconds)
    floors = [limits.seconds(work.flops, work.size) for work in works]
    vanilla = seconds[0, "layer"].median
    rows = []
    for i, (subject, work) in enumerate(zip(each, works, strict=True)):
        layer, path, products = (seconds[i, name] for name in ("layer", "path", "products"))
        speedup = vanilla / layer.median
        rows.append(
            {
                "experts": f"{subject.pool.n_ffn}+{subject.pool.n_zero_computation}",
                "tau": subject.tau,
                "mode": mode,
                "pass": way,
                "seconds": layer.median,
                "seconds_quartiles": [layer.low, layer.high],
                "path_seconds": path.median,
                "products_seconds": products.median,
                "speedup": speedup,
                "theory": subject.theory,
                "fraction_of_theory": speedup / subject.theory,
                "roofline": floors[0] / floors[i],
                "roofline_seconds": floors[i],
                "over_bare_products": path.median / products.median,
                **work.columns(),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="put the rows into this file, as they come")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["0.6B"])
    args = parser.parse_args()
    for model in args.models:
        shape, rows = MODELS[model], []
        for mode, way in itertools.product(args.modes, args.passes):
            new = [{"model": model} | row for row in measure(shape, mode, way, args.rounds)]
            jax.clear_caches()  # programs that are kept leave the 7B's no room
            if args.json:
                put(args.json, new)
            rows += new
        title = (
            f"MoE++ layer of the {model} model, T={shape.tokens}, D={shape.width}, "
            f"F={shape.ffn_size}, K={TOP_K}, float32, {timing.machine()}"
        )
        layer_table.show(rows, title, Console(width=160))


def put(file: Path, rows: Sequence[dict]) -> None:
    """Writes them beside those that the file has of other models, modes and passes."""

    def of(row: dict) -> tuple[int, int, int]:
        place = [*MODELS].index(row["model"])
        return place, MODES.index(row["mode"]), PASSES.index(row["pass"])

    new = {of(row) for row in rows}
    there = json.loads(file.read_text()) if file.exists() else []
    kept = [row for row in there if of(row) not in new]
    write_atomic(file, json.dumps(sorted([*kept, *rows], key=of), indent=1) + "\n")


if __name__ == "__main__":
    main()
