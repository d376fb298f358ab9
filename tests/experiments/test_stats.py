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
    half = 4.302653 / math.sqrt(3)
    assert d == (
        pytest.approx(-2.0),
        pytest.approx(-2 - half, rel=1e-6),
        pytest.approx(-2 + half, rel=1e-6),
        3,
    )
    one = stats.paired({0: 1.0}, {0: 3.0})
    assert one == (-2.0, -math.inf, math.inf, 1)
    assert stats.paired({0: 1.0}, {1: 1.0}) is None


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
    assert found.compute(float(true.loss(3 * unit))) == pytest.approx(3 * unit, rel=1e-4)
    assert stats.PowerLaw(2.0, 1.0, 0.5).compute(1.9) == math.inf


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
    low, high = stats.interval([fit.compute(2.5) for fit in fits])
    assert low < true.compute(2.5) * 1.2 and high > true.compute(2.5) * 0.8 and low < high


def test_an_interval_of_values():
    assert stats.interval(range(201)) == (5.0, 195.0)
