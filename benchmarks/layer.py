"""What a MoE++ layer costs: beside the bare matrix products in it, and beside a vanilla MoE.

    python -m benchmarks.layer [--json FILE] [--rounds N]

For each tau, and for the vanilla MoE of the same FFN experts, it times in one process, interleaved:
the whole layer; its FFN path (from the chosen experts to the combined output); and the matrix
products that the path contains, bare, over the same number of rows, operands ready in memory. The
products are the physical limit of the path, the vanilla layer is the baseline of the speed-up.

In capacity mode the rows are the slots, whatever the router does. In dropless mode they are the
assignments that FFN experts get, so the router is set to the balance point of its tau.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from moepp_jax import host_memory, moe
from moepp_jax.benchmarks import timing
from moepp_jax.moe import kernels, param

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

    @property
    def weight(self) -> float:
        return 1.0 if self.tau is None else self.tau

    @property
    def theory(self) -> float:
        """Speed-up over the vanilla MoE: one over the share of assignments on FFN experts."""
        ffn = self.weight * self.pool.n_ffn
        return (ffn + self.pool.n_zero_computation) / ffn


def subjects(shape: Shape) -> list[Subject]:
    pool = moe.Pool(shape.n_ffn, *shape.zero_computation)
    return [Subject(moe.Pool(shape.n_ffn), None), *(Subject(pool, tau) for tau in TAUS)]


def rule_of(subject: Subject) -> moe.Rule:
    return moe.rules.make("moepp", subject.pool, top_k=TOP_K, tau=float(subject.weight))


def layer_of(subject: Subject, mode: str) -> moe.MoE:
    paths = {
        "capacity": moe.with_capacity(GAMMA),
        "dropless": moe.dropless(kernels.grouped_function(jax.default_backend())),
    }
    return moe.MoE(rule_of(subject), paths[mode])


def balanced_logits(subject: Subject, shape: Shape) -> jax.Array:
    """Router logits whose choices meet the balance point of tau: noise, FFN experts shifted."""
    noise = np.random.default_rng(0).gumbel(size=(shape.tokens, subject.pool.size))
    target = TOP_K / subject.theory
    low, high = -10.0, 10.0
    for _ in range(40):
        shift = (low + high) / 2
        logits = noise + shift * (np.arange(subject.pool.size) < subject.pool.n_ffn)
        chosen = np.argsort(-logits, axis=1)[:, :TOP_K]
        low, high = (
            (shift, high) if (chosen < subject.pool.n_ffn).sum(1).mean() < target else (low, shift)
        )
    return jnp.asarray(logits, jnp.float32).reshape(shape.groups, -1, subject.pool.size)


def balanced_counts(subject: Subject, shape: Shape) -> np.ndarray:
    """Rows of each FFN expert under `balanced_logits`."""
    _, experts = jax.lax.top_k(balanced_logits(subject, shape), TOP_K)
    return np.bincount(np.ravel(experts), minlength=subject.pool.size)[: subject.pool.n_ffn]


def cases_of(
    subject: Subject, shape: Shape, mode: str, way: str, dtype: jnp.dtype = _FLOAT32
) -> dict[str, timing.Case]:
    """The layer, its FFN path and the bare products, ready to be timed; the router in float32."""
    layer = layer_of(subject, mode)
    described = moe.describe(layer.rule, shape.width, shape.ffn_size)
    params = param.used(described, moe.init(jax.random.key(0), described), dtype)
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
        rows = round(int((routing.experts < subject.pool.n_ffn).sum()) / subject.pool.n_ffn)
    return {
        "layer": _timed(whole, way, x, params),
        "path": _timed(path, way, x, routing.gates, params["ffn"]),
        "products": bare_products(params["ffn"], rows, way),
    }


def _timed(function, way: str, *arguments) -> timing.Case:
    if way == "forward":
        return timing.Case(jax.jit(function), arguments)
    result = jax.eval_shape(function, *arguments)
    cotangent = jax.random.normal(jax.random.key(2), result.shape, result.dtype)

    def both(cotangent, *arguments):
        y, pullback = jax.vjp(function, *arguments)
        return y, pullback(cotangent)

    return timing.Case(jax.jit(both), (cotangent, *arguments))


def bare_products(ffn: dict[str, jax.Array], rows: int, way: str) -> timing.Case:
    """The matrix products of SwiGLU experts over `rows` rows each, and nothing else.

    Forward: x W_in and a W_out. Backward: each one's two gradients. All operands are inputs.
    """
    E, _, F, D = ffn["w_in"].shape
    w_in, w_out = ffn["w_in"].reshape(E, 2 * F, D), ffn["w_out"]
    keys = jax.random.split(jax.random.key(3), 4)
    dtype = w_in.dtype
    x, dy = (jax.random.normal(k, (E, rows, D), dtype) for k in keys[:2])
    a = jax.random.normal(keys[2], (E, rows, F), dtype)
    dh = jax.random.normal(keys[3], (E, rows, 2 * F), dtype)
    product = jnp.einsum

    def forward(x, a, w_in, w_out):
        return product("erd,efd->erf", x, w_in), product("erf,edf->erd", a, w_out)

    def both(x, a, w_in, w_out, dy, dh):
        backward = (
            product("erd,edf->erf", dy, w_out),
            product("erd,erf->edf", dy, a),
            product("erf,efd->erd", dh, w_in),
            product("erf,erd->efd", dh, x),
        )
        return forward(x, a, w_in, w_out), backward

    if way == "forward":
        return timing.Case(jax.jit(forward), (x, a, w_in, w_out))
    return timing.Case(jax.jit(both), (x, a, w_in, w_out, dy, dh))


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
    seconds = timing.interleaved(cases, rounds, label=f"{mode} {way}")
    vanilla = seconds[0, "layer"].median
    rows = []
    for i, subject in enumerate(each):
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
                "over_bare_products": path.median / products.median,
            }
        )
    return rows


def show(rows: list[dict], shape: Shape, console: Console) -> None:
    title = (
        f"MoE++ layer, T={shape.tokens}, D={shape.width}, F={shape.ffn_size}, K={TOP_K}, "
        f"float32, {timing.machine()}"
    )
    table = Table(title=title)
    for name in ("mode", "pass", "experts", "tau", "ms (quartiles)", "path/products"):
        table.add_column(name, justify="right")
    for name in ("speed-up", "theory", "of theory"):
        table.add_column(name, justify="right")
    for r in rows:
        low, high = (1e3 * s for s in r["seconds_quartiles"])
        table.add_row(
            r["mode"],
            r["pass"],
            r["experts"],
            "vanilla" if r["tau"] is None else f"{r['tau']:.2f}",
            f"{1e3 * r['seconds']:.0f} ({low:.0f} to {high:.0f})",
            f"{r['over_bare_products']:.3f}",
            f"{r['speedup']:.2f}",
            f"{r['theory']:.2f}",
            f"{r['fraction_of_theory']:.1%}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    args = parser.parse_args()
    host_memory.keep_freed_on_cpu()  # as `train` does, and before JAX has threads
    shape = Shape(4096, 2, 768, 2048, 8, (2, 1, 1))
    timed = functools.partial(measure, shape, rounds=args.rounds)
    rows = [row for mode in args.modes for way in args.passes for row in timed(mode, way)]
    show(rows, shape, Console(width=130))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
