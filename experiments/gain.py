"""Compute-equivalent gain: the compute that a vanilla MoE needs for a loss, over what it took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from moepp_jax.experiments import runs, stats
from moepp_jax.experiments.results import Row
from moepp_jax.experiments.scale import VANILLA, Scale, Variant


class Curve(NamedTuple):
    """The vanilla MoE of the scale's usual size, trained for its several lengths.

    Attributes:
      fits: to seeds drawn with replacement.
      least, most: realised training FLOPs of its points.
    """

    law: stats.PowerLaw
    fits: Sequence[stats.PowerLaw]
    least: float
    most: float


class Gain(NamedTuple):
    """
    Attributes:
      inside: whether the curve has points on both sides.
    """

    value: float
    low: float
    high: float
    inside: bool


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


def curve(scale: Scale, rows: Sequence[Row]) -> Curve | None:
    """The vanilla curve of the scale; None as long as a length has no row."""
    lengths = [runs.fingerprint(of_length(scale, n, VANILLA).config) for n in scale.lengths]
    points = [row for row in rows if row.fingerprint in lengths and row.done]
    if {row.fingerprint for row in points} != set(lengths):
        return None
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for row in points:
        by_seed.setdefault(row.seed, []).append((row.realised_flops, row.eval_loss))
    # A seed that has not all lengths yet would bend what is drawn of it alone.
    whole = {seed: found for seed, found in by_seed.items() if len(found) == len(lengths)}
    if whole:
        points = [row for row in points if row.seed in whole]
    compute = [row.realised_flops for row in points]
    law = stats.power_law(compute, [row.eval_loss for row in points])
    fits = stats.bootstrapped(whole) if whole else []
    return Curve(law, fits, min(compute), max(compute))


def gain(known: Curve, loss: float, realised: float) -> Gain:
    """How many times `realised` the vanilla MoE would need for `loss`."""
    each = [fit.compute(loss) / realised for fit in known.fits]
    low, high = stats.interval(each) if each else (math.nan, math.nan)
    needed = known.law.compute(loss)
    return Gain(needed / realised, low, high, known.least <= needed <= known.most)
