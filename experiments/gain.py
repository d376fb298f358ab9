"""Compute-equivalent gain: the compute that a vanilla MoE needs for a loss, over what it took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moepp_jax.experiments import runs, stats
from moepp_jax.experiments.results import Row
from moepp_jax.experiments.scale import VANILLA, Scale, Variant


class Curve(NamedTuple):
    """A vanilla MoE, trained for several lengths.

    Attributes:
      seeds: seed -> (realised training FLOPs, held-out loss) of each length, shortest first.
    """

    seeds: Mapping[int, Sequence[tuple[float, float]]]

    def needed(self, seed: int, loss: float) -> float:
        """Training FLOPs for a loss, between the seed's runs on a line of logarithms.

        Of a loss that none of them has, those of the nearest.
        """
        compute, losses = np.array(self.seeds[seed]).T
        # The least compute for it, should a longer run have ended worse.
        falling = -np.log(np.minimum.accumulate(losses))
        return math.exp(np.interp(-math.log(loss), falling, np.log(compute)))

    def ends(self, seed: int) -> tuple[float, float]:
        """The lowest and the highest loss of a seed's runs."""
        losses = [loss for _, loss in self.seeds[seed]]
        return min(losses), max(losses)


class Gain(NamedTuple):
    """
    Attributes:
      logs: of the seeds' gains, their natural logarithms.
      bound: AT_LEAST or AT_MOST, if the loss of a seed is beyond its curve's runs, on that side;
        BEYOND if on both; else empty.
    """

    logs: stats.Mean
    bound: str

    @property
    def value(self) -> float:
        return math.exp(self.logs.value)

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 %; all positive numbers where one seed alone is known."""
        return math.exp(self.logs.low), math.exp(self.logs.high)

    def __str__(self) -> str:
        if self.bound == BEYOND:
            return self.bound
        text = f"{self.bound} {self.value:.2f}".lstrip()
        return text if self.logs.count == 1 else "{} [{:.2f}, {:.2f}]".format(text, *self.interval)


AT_LEAST, AT_MOST, BEYOND = "at least", "at most", "beyond the curve"


def lengths(scale: Scale) -> tuple[int, ...]:
    """Of a vanilla curve, in steps: half the shortest too, as MoE++'s shortest run may end above
    that of the vanilla MoE."""
    return (max(1, scale.lengths[0] // 2), *scale.lengths)


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
    """The vanilla curve of a size, of seeds that have all lengths; None if there is no such seed.

    Args:
      size: of `scale.growing`; by default the usual one.
    """
    known = [runs.fingerprint(of_length(scale, n, VANILLA, size).config) for n in lengths(scale)]
    done = {row.key: (row.realised_flops, row.eval_loss) for row in rows if row.done}
    seeds = sorted({seed for fingerprint, seed in done if fingerprint == known[0]})
    points = {seed: [done.get((fingerprint, seed)) for fingerprint in known] for seed in seeds}
    whole = {seed: found for seed, found in points.items() if None not in found}
    return Curve(whole) if whole else None


def gain(known: Curve, rows: Sequence[Row]) -> Gain | None:
    """How many times a variant's compute the vanilla MoE would need for its loss.

    Seed by seed, as the same seed trains both on the same text; their mean and its interval
    (Student's t) are of logarithms. None if they share no seed.

    Args:
      rows: of the variant, those that did not diverge.
    """
    logs, beyond = [], set()
    for row in rows:
        if row.seed in known.seeds:
            logs.append(math.log(known.needed(row.seed, row.eval_loss) / row.realised_flops))
            lowest, highest = known.ends(row.seed)
            beyond |= {AT_LEAST} if row.eval_loss < lowest else set()
            beyond |= {AT_MOST} if row.eval_loss > highest else set()
    if not logs:
        return None
    return Gain(stats.mean(logs), BEYOND if len(beyond) > 1 else next(iter(beyond), ""))
