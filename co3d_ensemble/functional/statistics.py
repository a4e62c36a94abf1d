"""Means of few measurements with their uncertainty: Student's t, in closed form."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval ``mean +- half_width``.

    Attributes:
        mean: of the values; nan without any.
        half_width: None where fewer than two values leave the spread unknown.
        count: values.
    """

    mean: float
    half_width: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0: the sign of the mean is beyond what the spread explains."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """``mean +- t s / sqrt(n)``: s the sample's standard deviation (n - 1), t the quantile of Student's t at n - 1.

    Covers the mean of what the values were drawn from with probability ``confidence`` if they are independent and normal;
    for few values t is far above the normal 1.96 (4.30 for three of them).
    """
    count = len(values)
    if count == 0:
        return Interval(math.nan, None, 0)
    mean = statistics.fmean(values)
    if count == 1:
        return Interval(mean, None, 1)
    quantile = student_t_quantile((1 + confidence) / 2, count - 1)
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(count), count)


def student_t_cdf(t: float, degrees: int) -> float:
    """P(T <= t) for Student's t with whole ``degrees`` of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    theta = math.atan2(t, math.sqrt(degrees))
    square = math.cos(theta) ** 2
    term, total = 1.0, 0.0
    if degrees % 2:  # theta + sin (cos + 2/3 cos^3 + 2*4/(3*5) cos^5 + ...), up to cos^(degrees - 2)
        term = math.cos(theta)
        for k in range(1, degrees - 1, 2):
            total += term
            term *= square * (k + 1) / (k + 2)
        between = 2 / math.pi * (theta + math.sin(theta) * total)
    else:  # sin (1 + 1/2 cos^2 + 1*3/(2*4) cos^4 + ...), up to cos^(degrees - 2)
        for k in range(0, degrees - 1, 2):
            total += term
            term *= square * (k + 1) / (k + 2)
        between = math.sin(theta) * total
    return 0.5 + between / 2


def student_t_quantile(probability: float, degrees: int) -> float:
    """The t with P(T <= t) = ``probability``, by bisection to the last bit.

    Raises:
        ValueError: ``probability`` outside [0.5, 1), or no degree of freedom.
    """
    if not 0.5 <= probability < 1:
        raise ValueError(f"probability={probability}: must lie in [0.5, 1)")
    if degrees < 1:
        raise ValueError(f"degrees={degrees}: must be positive")
    low, high = 0.0, 1.0
    while student_t_cdf(high, degrees) < probability:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if student_t_cdf(middle, degrees) < probability else (low, middle)
    return high
