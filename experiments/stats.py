"""What seeds say: means with their intervals, paired differences, and fitted power laws."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
_MOST_FLOOR = 0.998  # of the lowest loss


class Mean(NamedTuple):
    """Of independent values, such as a difference of each seed.

    Attributes:
      error: its standard error; not a number where there is one value alone.
    """

    value: float
    error: float
    count: int

    @property
    def low(self) -> float:
        return self.interval()[0]

    @property
    def high(self) -> float:
        return self.interval()[1]

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Where the true mean is (Student's t, two-sided); all numbers if there is one value."""
        if self.count == 1:
            return -math.inf, math.inf
        half = self.error * float(stats.t.ppf((1 + confidence) / 2, self.count - 1))
        return self.value - half, self.value + half

    def p(self, mean: float) -> float:
        """How likely a mean so far from this one or further is, were this the true one."""
        if self.count == 1:
            return 1.0
        if self.error == 0:
            return float(self.value == mean)
        return 2 * float(stats.t.sf(abs(self.value - mean) / self.error, self.count - 1))


class Pooled(NamedTuple):
    """The scatter of several variants' seeds, as if all had the same.

    Attributes:
      deviation: of one loss, without what all variants have in common of a seed.
      freedom: its degrees of freedom.
      half: of a 95 % interval of a paired difference of two variants' means.
    """

    deviation: float
    freedom: int
    half: float


class PowerLaw(NamedTuple):
    """loss = floor + scale compute^-exponent."""

    floor: float
    scale: float
    exponent: float

    def loss(self, compute: float | np.ndarray) -> float | np.ndarray:
        return self.floor + self.scale * np.power(compute, -self.exponent)


def mean(values: Sequence[float]) -> Mean:
    """
    Raises:
      ValueError: there are none.
    """
    if not values:
        raise ValueError("there is no mean of no values")
    count = len(values)
    error = statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan
    return Mean(statistics.fmean(values), error, count)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Mean | None:
    """Ours minus theirs, seed by seed; None if they share no seed.

    Args:
      ours, theirs: seed -> value.
    """
    shared = sorted(ours.keys() & theirs.keys())
    return mean([ours[seed] - theirs[seed] for seed in shared]) if shared else None


def pooled(variants: Sequence[Mapping[int, float]]) -> Pooled | None:
    """Of losses = that of the variant + that of the seed + scatter, by least squares.

    Args:
      variants: of each, seed -> loss; seeds that not all have are left out.

    Returns:
      None if there are fewer than three variants or two seeds.
    """
    shared = sorted(set.intersection(*(set(v) for v in variants))) if variants else []
    if len(variants) < 3 or len(shared) < 2:
        return None
    losses = np.array([[v[seed] for seed in shared] for v in variants])
    rest = losses - losses.mean(0) - losses.mean(1, keepdims=True) + losses.mean()
    freedom = (len(variants) - 1) * (len(shared) - 1)
    deviation = math.sqrt(float(np.sum(rest**2)) / freedom)
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
    return Pooled(deviation, freedom, t * deviation * math.sqrt(2 / len(shared)))


def power_law(
    compute: Sequence[float] | np.ndarray,
    loss: Sequence[float] | np.ndarray,
    near: PowerLaw | None = None,
) -> PowerLaw:
    """The least-squares fit, in the logarithm of the loss.

    Args:
      near: where to look first; by default in several places.

    Raises:
      ValueError: fewer than three different amounts of compute.
    """
    if len(set(compute)) < 3:
        raise ValueError(f"a power law needs 3 amounts of compute, and there are {set(compute)}")
    compute, loss = np.asarray(compute, float), np.asarray(loss, float)
    unit = math.exp(np.mean(np.log(compute)))  # of order 1, for the sake of the solver
    x, lowest = np.log(compute / unit), float(loss.min())

    def law(parameters: np.ndarray) -> np.ndarray:
        share, log_scale, exponent = parameters
        return share * lowest + np.exp(log_scale - exponent * x)

    if near is not None:
        starts = [(near.floor / lowest, near.exponent)]
    else:
        starts = [(share, exponent) for share in (0.1, 0.5, 0.9) for exponent in (0.1, 0.5)]
    fits = [
        optimize.least_squares(
            lambda p: np.log(law(p)) - np.log(loss),
            (
                min(share, _MOST_FLOOR),
                math.log(max(float(np.mean(loss)) - share * lowest, 1e-3)),
                exponent,
            ),
            bounds=((0, -20, 1e-3), (1.001 * _MOST_FLOOR, 20, 3.001)),
            x_scale=(0.1, 1, 0.1),
            max_nfev=100,
        )
        for share, exponent in starts
    ]
    share, log_scale, exponent = min(fits, key=lambda fit: fit.cost).x
    scale = math.exp(log_scale) * unit**exponent
    return PowerLaw(share * lowest, scale, float(exponent))


def bootstrapped(
    by_seed: Mapping[int, Sequence[tuple[float, float]]], times: int = 200
) -> list[PowerLaw]:
    """Fits to (compute, loss) of seeds drawn with replacement; the same ones every time.

    Args:
      by_seed: seed -> its points.
    """
    draw, seeds = np.random.default_rng(0), sorted(by_seed)
    near = power_law(*zip(*(p for seed in seeds for p in by_seed[seed]), strict=True))

    @functools.cache  # a few seeds can be drawn in a few ways only
    def fit(*drawn: int) -> PowerLaw:
        points = [p for seed in drawn for p in by_seed[seed]]
        return power_law(*zip(*points, strict=True), near)

    return [fit(*sorted(map(int, draw.choice(seeds, len(seeds))))) for _ in range(times)]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The middle CONFIDENCE of them."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.asarray(values, float), [tail, 1 - tail], method="nearest")
    return float(low), float(high)
