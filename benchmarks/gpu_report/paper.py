"""The paper's table of expert throughput (table 3), row by row: milliseconds of a layer forward.

What lies inside the paper's timed region it does not say, nor its hardware: compared are ratios.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from moepp_jax.benchmarks import layer as layers
from moepp_jax.benchmarks import timing
from moepp_jax.benchmarks.gpu_report.sizes import Sizes
from moepp_jax.experiments.studies import throughput


class Row(NamedTuple):
    """A model of the table: its layer, and the paper's milliseconds by tau, None the vanilla's."""

    model: str
    width: int
    ffn_size: int
    n_ffn: int
    zero_computation: tuple[int, int, int]
    milliseconds: dict[float | None, float]


def _row(model: str, pool: str, n_ffn: int, others: tuple[int, int, int]) -> Row:
    vanilla, *rest = throughput.PAPER[pool]
    taken = {None: vanilla} | dict(zip(throughput.TAUS, rest, strict=True))
    return Row(model, 768, 2048, n_ffn, others, taken)


ROWS = (
    _row("0.6B", "8+4", 8, (2, 1, 1)),
    _row("1B", "16+4", 16, (2, 1, 1)),
    _row("2B", "32+8", 32, (6, 1, 1)),
    Row("7B", 1536, 4096, 16, (2, 1, 1), {None: 1859.0, 0.75: 1455.0}),
)


def measure(sizes: Sizes, rounds: int) -> list[dict[str, Any]]:
    return [cell for row in ROWS for cell in cells(row, sizes, rounds)]


def cells(row: Row, sizes: Sizes, rounds: int) -> list[dict[str, Any]]:
    """One for each tau of a row, with capacity as in the paper, vanilla first."""
    small = sizes.memory is None
    width, ffn_size = (32, 64) if small else (row.width, row.ffn_size)
    base = sizes.layer
    shape = layers.Shape(base.tokens, base.groups, width, ffn_size, row.n_ffn, row.zero_computation)
    subjects = {s.tau: s for s in layers.subjects(shape) if s.tau in row.milliseconds}
    dtype = jnp.dtype(sizes.dtype)
    cases = {
        tau: layers.cases_of(subject, shape, "capacity", "forward", dtype)["layer"]
        for tau, subject in subjects.items()
    }
    taken = timing.interleaved(cases, rounds, label=f"paper, {row.model}")
    return [
        {
            "model": row.model,
            "tau": tau,
            "tokens": shape.tokens,
            "milliseconds": 1e3 * taken[tau].median,
            "speedup": taken[None].median / taken[tau].median,
            "theory": subject.theory,
            "paper_milliseconds": row.milliseconds[tau],
            "paper_speedup": row.milliseconds[None] / row.milliseconds[tau],
        }
        for tau, subject in subjects.items()
    ]
