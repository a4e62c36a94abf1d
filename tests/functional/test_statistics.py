"""Student's t against its tables, and intervals against sampling."""

import math
import random

import pytest

from co3d_ensemble.functional.statistics import Interval, mean_interval, student_t_cdf, student_t_quantile


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (7, 2.364624), (30, 2.042272), (200, 1.971896)]
)
def test_the_two_sided_95_percent_quantiles_are_those_of_the_tables(degrees, quantile):
    assert student_t_quantile(0.975, degrees) == pytest.approx(quantile, abs=1e-6)


def test_one_degree_of_freedom_is_the_cauchy_distribution():
    for t in (-3.0, -0.2, 0.0, 0.7, 40.0):
        assert student_t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-12)


@pytest.mark.parametrize("degrees", [2, 3, 6, 9])
def test_the_distribution_is_the_integral_of_its_density(degrees):
    norm = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    step, total = 1e-3, 0.0
    for i in range(1500):  # midpoint rule over [0, 1.5]
        total += norm * (1 + ((i + 0.5) * step) ** 2 / degrees) ** (-(degrees + 1) / 2) * step
    assert student_t_cdf(1.5, degrees) - 0.5 == pytest.approx(total, abs=1e-6)
    assert student_t_cdf(-1.5, degrees) == pytest.approx(0.5 - total, abs=1e-6)


def test_quantile_inverts_the_distribution():
    for degrees in (1, 2, 5, 12):
        for probability in (0.5, 0.6, 0.9, 0.9995):
            assert student_t_cdf(student_t_quantile(probability, degrees), degrees) == pytest.approx(probability, abs=1e-12)


@pytest.mark.parametrize(("probability", "degrees"), [(0.2, 3), (1.0, 3), (0.9, 0)])
def test_a_quantile_that_does_not_exist_is_refused(probability, degrees):
    with pytest.raises(ValueError, match=f"={probability if degrees else degrees}:"):
        student_t_quantile(probability, degrees)


def test_interval_of_three_values_by_hand():
    found = mean_interval([1.0, 2.0, 4.5])
    assert (found.mean, found.count) == (2.5, 3)
    deviation = math.sqrt((1.5**2 + 0.5**2 + 2.0**2) / 2)
    assert found.half_width == pytest.approx(4.302653 * deviation / math.sqrt(3), rel=1e-6)


def test_too_few_values_have_no_interval_rather_than_one_of_zero():
    assert mean_interval([3.0]) == Interval(3.0, None, 1)
    assert not mean_interval([3.0]).excludes_zero
    assert math.isnan(mean_interval([]).mean) and mean_interval([]).half_width is None


def test_an_interval_excludes_zero_only_beyond_its_half_width():
    assert Interval(0.5, 0.4, 4).excludes_zero and Interval(-0.5, 0.4, 4).excludes_zero
    assert not Interval(0.3, 0.4, 4).excludes_zero and not Interval(0.0, 0.0, 4).excludes_zero


def test_it_covers_the_true_mean_as_often_as_it_says():
    rng = random.Random(0)
    trials, covered = 4000, 0
    for _ in range(trials):
        found = mean_interval([rng.gauss(1.0, 2.0) for _ in range(4)])
        covered += abs(found.mean - 1.0) <= found.half_width
    assert covered / trials == pytest.approx(0.95, abs=0.011)  # three standard errors; the normal 1.96 covers 86 %
