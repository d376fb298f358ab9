"""Compute-equivalent gain: the compute that a vanilla MoE needs for a loss, over what it took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moepp_jax.experiments import runs, stats
from moepp_jax.experiments.results import Row
from moepp_jax.experiments.scale import VANILLA, Scale, Variant

# What is drawn for each fit of a curve when a gain's interval is asked for.
_DRAWS = 10


class Curve(NamedTuple):
    """A vanilla MoE, trained for the scale's several lengths.

    Attributes:
      fits: to seeds drawn with replacement.
      misfits: of each length, the compute that the law gives its mean loss over that it took.
      least, most: realised training FLOPs of its points.
    """

    law: stats.PowerLaw
    fits: Sequence[stats.PowerLaw]
    misfits: Sequence[float]
    least: float
    most: float


class Gain(NamedTuple):
    """
    Attributes:
      low, high: the interval of confidence; not a number where one seed alone is known.
      inside: whether the curve has points on both sides.
    """

    value: float
    low: float
    high: float
    inside: bool

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return "beyond the curve"
        text = f"{self.value:.2f}"
        if math.isfinite(self.high):
            text += f" [{self.low:.2f}, {self.high:.2f}]"
        return text if self.inside else f"{text} (extrapolated)"


def of_length(scale: Scale, steps: int, kind: str, size: str = "") -> Variant:
    """A point of a scaling curve: the recipe with another number of steps, its warm-up in keeping.

    Args:
      size: of `scale.growing`; by default the usual one.
    """
    recipe = scale.growing[size] if size else scale.recipe
    usual = recipe()
    warmup = min(usual.optim.warmup_steps, max(1, steps // 8))
    fields = {
        "train.steps": steps,
        "train.eval_every": steps,
        "train.save_every": max(1, steps // 2),
        "optim.warmup_steps": warmup,
    }
    where = f"{size or 'usual'}, {steps} steps"
    if kind == VANILLA:
        return scale.variant(f"vanilla, {where}", kind, fields, of=recipe)
    return scale.variant(f"MoE++, {where}", kind, fields, of=recipe, against=f"vanilla, {where}")


def curve(scale: Scale, rows: Sequence[Row], size: str = "") -> Curve | None:
    """The vanilla curve of a size; None as long as a length has no row.

    Args:
      size: of `scale.growing`; by default the usual one.
    """
    lengths = [runs.fingerprint(of_length(scale, n, VANILLA, size).config) for n in scale.lengths]
    points = [row for row in rows if row.fingerprint in lengths and row.done]
    if {row.fingerprint for row in points} != set(lengths):
        return None
    seeds: dict[int, list[Row]] = {}
    for row in points:
        seeds.setdefault(row.seed, []).append(row)
    # A seed that has not all lengths yet would bend what is drawn of it alone.
    whole = {seed: found for seed, found in seeds.items() if len(found) == len(lengths)}
    if whole:
        points = [row for found in whole.values() for row in found]
    law = stats.power_law(*zip(*map(_point, points), strict=True))
    by_seed = {seed: [_point(row) for row in found] for seed, found in whole.items()}
    compute = [row.realised_flops for row in points]
    return Curve(
        law,
        stats.bootstrapped(by_seed) if by_seed else [],
        [_misfit(law, [row for row in points if row.fingerprint == of]) for of in lengths],
        min(compute),
        max(compute),
    )


def gain(known: Curve, loss: stats.Mean, realised: float) -> Gain:
    """How many times `realised` the vanilla MoE would need for `loss`.

    The interval has three sources: the curve's seeds (its fits), how far the law is off (at one of
    its own points, drawn at random), and the loss's own seeds (Student's t).
    """
    needed = known.law.compute(loss.value)
    inside = known.least <= needed <= known.most
    if not known.fits or loss.count < 2 or not all(map(math.isfinite, known.misfits)):
        return Gain(needed / realised, math.nan, math.nan, inside)
    draw, fits = np.random.default_rng(0), list(known.fits) * _DRAWS
    losses = loss.value + loss.error * draw.standard_t(loss.count - 1, len(fits))
    off = draw.choice(known.misfits, len(fits)).tolist()
    each = [fit.compute(y) / (realised * o) for fit, y, o in zip(fits, losses, off, strict=True)]
    return Gain(needed / realised, *stats.interval(each), inside)


def _point(row: Row) -> tuple[float, float]:
    return row.realised_flops, row.eval_loss


def _misfit(law: stats.PowerLaw, rows: Sequence[Row]) -> float:
    compute, loss = (stats.mean(column).value for column in zip(*map(_point, rows), strict=True))
    return law.compute(loss) / compute
