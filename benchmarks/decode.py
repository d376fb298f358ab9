"""What a decoded token costs: beside the bytes that it has to read, and beside a vanilla MoE.

    python -m benchmarks.decode [--json FILE] [--rounds N]

A language model writes text with a batch of 1 and of 4, once as a vanilla MoE and once for each
tau, all with the same sizes; routers are set so that tokens choose as many FFN experts as the
theory says. Decoding few tokens reads parameters and does little else, so its limit is the memory:
every parameter outside the FFN experts, those of the experts that any of the sequences chose, and
the cache in use, at the bandwidth that a read of a large array reaches. All is timed in one
process, interleaved.
"""

from __future__ import annotations

from moepp_jax import host_memory

if __name__ == "__main__":
    host_memory.keep_freed_on_cpu()  # before an import starts a thread

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moepp_jax import model as model_lib
from moepp_jax import moe
from moepp_jax.benchmarks import timing
from moepp_jax.benchmarks.layer import TAUS, TOP_K, Subject
from moepp_jax.config import Config
from moepp_jax.configs import base
from moepp_jax.generation import Generator

PROMPT = 16  # tokens
NEW = 97  # the first comes with the prompt


class Shape(NamedTuple):
    """Sizes of the model."""

    layers: int
    width: int
    heads: int
    ffn_size: int
    vocab_size: int
    n_ffn: int
    zero_computation: tuple[int, int, int]

    def config(self, vanilla: bool) -> Config:
        c = base.get_config()
        c.model.update(
            num_layers=self.layers,
            hidden_size=self.width,
            num_heads=self.heads,
            num_kv_heads=self.heads,
            vocab_size=self.vocab_size,
            dtype="float32",
        )
        n_const, n_copy, n_zero = (0, 0, 0) if vanilla else self.zero_computation
        c.moe.update(
            n_ffn=self.n_ffn,
            n_const=n_const,
            n_copy=n_copy,
            n_zero=n_zero,
            ffn_size=self.ffn_size,
            dispatch="dropless",
        )
        c.moe.rule.top_k = TOP_K
        return Config.parse(c)


SHAPE = Shape(6, 1024, 16, 2560, 32000, 8, (2, 1, 1))


def subjects(shape: Shape) -> list[Subject]:
    """One at each tau, and the vanilla MoE, first."""
    pool = moe.Pool(shape.n_ffn, *shape.zero_computation)
    return [Subject(moe.Pool(shape.n_ffn), None), *(Subject(pool, tau) for tau in TAUS)]


def rule_of(subject: Subject) -> moe.Rule:
    """Choices as good as random; a bias makes them of as many FFN experts as the theory has it."""
    biased = 0.0 if subject.tau is None else 1.0
    return moe.rules.make(
        "moepp", subject.pool, top_k=TOP_K, residual="none", logit_norm=1.0, bias_rate=biased
    )


def balancing_shift(subject: Subject) -> float:
    """What FFN experts' logits are raised by, so that tokens choose as many as the theory says."""
    noise = np.random.default_rng(0).normal(size=(20_000, subject.pool.size))
    noise /= noise.std(axis=1, ddof=1, keepdims=True)
    is_ffn = np.arange(subject.pool.size) < subject.pool.n_ffn
    low, high = -10.0, 10.0
    for _ in range(30):
        shift = (low + high) / 2
        chosen = np.argsort(-(noise + shift * is_ffn), axis=1)[:, :TOP_K]
        few = is_ffn[chosen].sum(axis=1).mean() < TOP_K / subject.theory
        low, high = (shift, high) if few else (low, shift)
    return shift


def shared_params(shape: Shape) -> dict[str, Any]:
    """What all subjects have: everything but routers and constants, taken apart."""
    D, F, std = shape.width, shape.ffn_size, 0.02
    keys = iter(jax.random.split(jax.random.key(0), 2 + shape.layers * (4 + 2 * shape.n_ffn)))

    def matrix(*size):
        return std * jax.random.normal(next(keys), size)

    def layer():
        return {
            "attention_norm": {"norm": jnp.ones(D)},
            "attention": {name: matrix(D, D) for name in ("q", "k", "v", "o")},
            "ffn_norm": {"norm": jnp.ones(D)},
            "ffn": [{"w_in": matrix(2, F, D), "w_out": matrix(D, F)} for _ in range(shape.n_ffn)],
        }

    return {
        "embedding": matrix(shape.vocab_size, D),
        "output": matrix(shape.vocab_size, D),
        "final": {"norm": jnp.ones(D)},
        "layers": [layer() for _ in range(shape.layers)],
    }


def generator_of(subject: Subject, shape: Shape, shared: dict[str, Any]) -> Generator:
    """A model of the shared parameters, with routers for this pool."""
    model = model_lib.build(shape.config(vanilla=subject.tau is None), dispatch="dropless")
    block, rule = model.block, rule_of(subject)
    block = dataclasses.replace(block, moe=dataclasses.replace(block.moe, rule=rule))
    model = dataclasses.replace(model, block=block)
    is_ffn = jnp.arange(subject.pool.size) < subject.pool.n_ffn
    state = {"bias": balancing_shift(subject) * is_ffn} if rule.bias_rate else {}
    layers = []
    for i, layer in enumerate(shared["layers"]):
        router, w, v = (jax.random.key(n) for n in range(3 * i, 3 * i + 3))
        J, N, D = subject.pool.n_const, subject.pool.size, shape.width
        gate = {"w": jax.random.normal(router, (N, D))} | state
        own = {"router": gate, "ffn": layer["ffn"]}
        if J:
            own["const"] = {
                "w": 0.02 * jax.random.normal(w, (J, 2, D)),
                "v": jax.random.normal(v, (J, D)),
            }
        layers.append({name: p for name, p in layer.items() if name != "ffn"} | {"moe": own})
    return Generator(model, shared | {"layers": layers})


class Bytes(NamedTuple):
    """What a decoding step reads at least."""

    every_step: int  # parameters that are read whatever is chosen
    expert: int  # one FFN expert
    place: int  # keys and values of one token of a sequence

    @classmethod
    def of(cls, shape: Shape, subject: Subject) -> Bytes:
        D, N, J = shape.width, subject.pool.size, subject.pool.n_const
        bias = 0 if subject.tau is None else N
        layer = 4 * D * D + N * D + bias + 3 * J * D + 2 * D
        return cls(
            4 * (shape.layers * layer + shape.vocab_size * D + D),
            4 * 3 * D * shape.ffn_size,
            4 * 2 * D * shape.layers,
        )


def bandwidth_cases(floats: int) -> dict[str, timing.Case]:
    """Reads of a large array, of which the fastest is the machine's bandwidth."""
    array = jnp.ones((floats // 1024, 1024))
    return {
        "sum": timing.Case(jax.jit(jnp.sum), (array,)),
        "matrix times vector": timing.Case(jax.jit(jnp.matmul), (array, jnp.ones(1024))),
    }


def measure(shape: Shape, batches: Sequence[int], rounds: int, floats: int) -> list[dict]:
    """One row a batch size and subject.

    Args:
      floats: of the array that is read to know the bandwidth.
    """
    shared = shared_params(shape)
    each = subjects(shape)
    generators = [generator_of(subject, shape, shared) for subject in each]
    reads = bandwidth_cases(floats)
    prompts = np.random.default_rng(0).integers(3, shape.vocab_size, (max(batches), PROMPT))
    settings = shape.config(vanilla=True).replace("generate", max_new_tokens=NEW).generate
    taken: dict[Any, list[float]] = {}
    speeds = {}

    def run_all():
        for name, case in reads.items():
            start = time.perf_counter()
            jax.block_until_ready(case.function(*case.arguments))
            taken.setdefault(name, []).append(time.perf_counter() - start)
        for batch in batches:
            for i, generate in enumerate(generators):
                generate(prompts[:batch].tolist(), settings)
                speeds[batch, i] = speed = generate.speed
                taken.setdefault((batch, i), []).append(speed.decode_seconds / speed.decode_steps)

    run_all()  # compiles
    taken.clear()
    for _ in track(range(rounds), "decode", transient=True):
        run_all()
    seconds = {name: timing.summary(times) for name, times in taken.items()}
    bandwidth = 4 * floats / min(seconds[name].median for name in reads)
    return [
        _row(shape, subject, batch, seconds[batch, i], speeds[batch, i], bandwidth)
        | {"speedup": seconds[batch, 0].median / seconds[batch, i].median}
        for batch in batches
        for i, subject in enumerate(each)
    ]


def _row(shape, subject, batch, seconds, speed, bandwidth) -> dict:
    parts = Bytes.of(shape, subject)
    experts = speed.experts_read_per_step * shape.layers
    places = batch * (PROMPT + NEW / 2)
    read = parts.every_step + experts * parts.expert + places * parts.place
    return {
        "experts": f"{subject.pool.n_ffn}+{subject.pool.n_zero_computation}",
        "tau": subject.tau,
        "batch": batch,
        "ffn_experts_per_token": speed.ffn_experts_per_token,
        "experts_read_per_layer": speed.experts_read_per_step,
        "seconds_per_step": seconds.median,
        "seconds_quartiles": [seconds.low, seconds.high],
        "bytes_per_step": read,
        "bandwidth": read / seconds.median,
        "machine_bandwidth": bandwidth,
        "fraction_of_bandwidth": read / seconds.median / bandwidth,
        "theory_of_experts": subject.theory,
    }


def show(rows: list[dict], shape: Shape, console: Console) -> None:
    title = (
        f"Decoding: {shape.layers} layers, D={shape.width}, F={shape.ffn_size}, "
        f"V={shape.vocab_size}, K={TOP_K}, float32, {timing.machine()}, which reads "
        f"{rows[0]['machine_bandwidth'] / 1e9:.1f} GB/s"
    )
    table = Table(title=title)
    for name in ("batch", "experts", "tau", "FFN/token", "read/layer", "ms/step (quartiles)"):
        table.add_column(name, justify="right")
    for name in ("MB/step", "GB/s", "of limit", "speed-up", "by bytes"):
        table.add_column(name, justify="right")
    vanilla = {row["batch"]: row for row in rows if row["tau"] is None}
    for r in rows:
        low, high = (1e3 * s for s in r["seconds_quartiles"])
        table.add_row(
            str(r["batch"]),
            r["experts"],
            "vanilla" if r["tau"] is None else f"{r['tau']:.2f}",
            f"{r['ffn_experts_per_token']:.2f}",
            f"{r['experts_read_per_layer']:.2f}",
            f"{1e3 * r['seconds_per_step']:.1f} ({low:.1f} to {high:.1f})",
            f"{r['bytes_per_step'] / 1e6:.0f}",
            f"{r['bandwidth'] / 1e9:.1f}",
            f"{r['fraction_of_bandwidth']:.0%}",
            f"{r['speedup']:.2f}",
            f"{vanilla[r['batch']]['bytes_per_step'] / r['bytes_per_step']:.2f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 4))
    args = parser.parse_args()
    rows = measure(SHAPE, args.batches, args.rounds, floats=1 << 28)
    show(rows, SHAPE, Console(width=150))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
