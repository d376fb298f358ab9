"""Means, paired differences and power laws: by hand, and where they are known."""

import math

import numpy as np
import pytest

from moepp_jax.experiments import stats


def test_a_mean_by_hand():
    assert stats.mean([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7 / 3)), 3)
    value, error, count = stats.mean([4.0])
    assert (value, count) == (4.0, 1) and math.isnan(error)
    with pytest.raises(ValueError, match="no mean of no values"):
        stats.mean([])


def test_paired_differences_by_hand():
    """-1, -2 and -3: mean -2, standard error 1 / sqrt 3, t of 2 degrees 4.302653."""
    ours, theirs = {0: 4.0, 1: 3.0, 2: 2.0, 7: 9.0}, {0: 5.0, 1: 5.0, 2: 5.0, 8: 1.0}
    d = stats.paired(ours, theirs)
    assert d == (pytest.approx(-2.0), pytest.approx(1 / math.sqrt(3)), 3)
    half = 4.302653 / math.sqrt(3)
    assert d.low == pytest.approx(-2 - half, rel=1e-6)
    assert d.high == pytest.approx(-2 + half, rel=1e-6)
    # t of 2 degrees beyond which 1 in 100 lies is 9.924843.
    assert d.interval(0.99)[1] == pytest.approx(-2 + 9.924843 / math.sqrt(3), rel=1e-6)
    one = stats.paired({0: 1.0}, {0: 3.0})
    assert (one.value, one.low, one.high, one.count) == (-2.0, -math.inf, math.inf, 1)
    assert stats.paired({0: 1.0}, {1: 1.0}) is None


def test_a_probability_by_hand():
    """It is 5 % at the ends of the 95 % interval, 1 at the mean, and says nothing of one seed."""
    d = stats.mean([1.0, 2.0, 6.0])
    assert d.p(d.low) == pytest.approx(0.05) and d.p(d.high) == pytest.approx(0.05)
    assert d.p(3.0) == 1 and d.p(30.0) < 0.01
    assert stats.mean([4.0]).p(100.0) == 1
    assert stats.mean([4.0, 4.0]).p(4.0) == 1 and stats.mean([4.0, 4.0]).p(5.0) == 0


def test_pooled_scatter_by_hand():
    """Variants 1, 2 and 3, seeds 10 apart, and a scatter of +-1 in the first two that sums to 0:
    four of six squares are 1, over (3 - 1) (2 - 1) = 2 degrees of freedom, whose t is 4.302653."""
    found = stats.pooled([{0: 1 + 1, 1: 11 - 1}, {0: 2 - 1, 1: 12 + 1}, {0: 3.0, 1: 13.0, 2: 0.0}])
    assert found.freedom == 2 and found.deviation == pytest.approx(math.sqrt(4 / 2))
    assert found.half == pytest.approx(4.302653 * math.sqrt(2) * math.sqrt(2 / 2), rel=1e-6)
    assert stats.pooled([{0: 1.0, 1: 2.0}] * 2) is None and stats.pooled([{0: 1.0}] * 3) is None
    assert stats.pooled([]) is None


def test_a_pooled_interval_covers_what_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(500):
        seeds, own = rng.normal(0, 1, 3), np.arange(5.0)
        losses = own[:, None] + seeds + rng.normal(0, 0.1, (5, 3))
        variants = [dict(enumerate(map(float, row))) for row in losses]
        d = stats.paired(variants[4], variants[1])
        inside += abs(d.value - 3) <= stats.pooled(variants).half
    assert 0.92 <= inside / 500 <= 0.98


def test_an_interval_covers_what_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        d = stats.paired(dict(enumerate(rng.normal(0.1, 1, 5))), dict.fromkeys(range(5), 0.0))
        inside += d.low <= 0.1 <= d.high
    assert 0.93 <= inside / 1000 <= 0.97


@pytest.mark.parametrize("unit", [1.0, 1e13])
@pytest.mark.parametrize("law", [(0.0, 5.0, 0.2), (2.0, 4.0, 0.5), (4.0, 1.5, 0.9)])
def test_a_power_law_is_found_again(law, unit):
    floor, scale, exponent = law
    true = stats.PowerLaw(floor, scale * unit**exponent, exponent)
    compute = unit * np.array([0.5, 1, 2, 4, 8, 16])
    found = stats.power_law(compute, true.loss(compute))
    np.testing.assert_allclose(found.loss(compute), true.loss(compute), rtol=1e-6)
    assert found.exponent == pytest.approx(exponent, rel=0.02)
    assert found.loss(3 * unit) == pytest.approx(true.loss(3 * unit), rel=1e-6)


def test_a_power_law_needs_three_points():
    with pytest.raises(ValueError, match="needs 3 amounts of compute"):
        stats.power_law([1, 1, 2], [5, 5, 4])


def test_drawn_seeds_are_the_same_every_time():
    rng = np.random.default_rng(1)
    true = stats.PowerLaw(1.0, 4.0, 0.5)
    by_seed = {
        s: [(c, float(true.loss(c) * rng.normal(1, 0.01))) for c in (1.0, 2.0, 4.0, 8.0)]
        for s in range(3)
    }
    fits = stats.bootstrapped(by_seed, times=20)
    assert fits == stats.bootstrapped(by_seed, times=20)
    low, high = stats.interval([float(fit.loss(3.0)) for fit in fits])
    assert low < true.loss(3.0) * 1.05 and high > true.loss(3.0) * 0.95 and low < high


def test_an_interval_of_values():
    assert stats.interval(range(201)) == (5.0, 195.0)
