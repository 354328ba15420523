"""Figures over seeds: mean and deviation, Student's t interval of a few values, ranks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is NaN for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def spread(values: Sequence[float], digits: int = 2) -> str:
    """ "12.34 +- 0.56" for a table; one value alone without a deviation."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(deviation) else f" +- {deviation:.{digits}f}")


def t_probability(t: float, degrees: int) -> float:
    """P(|T| < t) of Student's t with so many degrees of freedom; a finite sum (Abramowitz, Stegun, 26.7.3-4).

    Raises:
        ValueError: for degrees below 1.
    """
    if degrees < 1:
        raise ValueError(f"degrees {degrees}: must be at least 1")
    if math.isinf(t):
        return 1.0
    angle = math.atan2(abs(t), math.sqrt(degrees))
    cosine_squared = math.cos(angle) ** 2
    odd = degrees % 2
    total = term = 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine_squared * (k - 1) / k
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * math.cos(angle) * total if degrees > 1 else 0.0))


def t_quantile(confidence: float, degrees: int) -> float:
    """The t with P(|T| < t) = confidence: 4.303 for 0.95 and 2 degrees of freedom.

    Raises:
        ValueError: for a confidence outside (0, 1) or degrees below 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}: must be between 0 and 1")
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < confidence:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < confidence else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and how sure it is.

    Attributes:
        mean: of the values; deviation: their sample standard deviation, NaN for one value.
        low, high: ends of Student's t interval of the mean, mean +- t deviation / sqrt(count); NaN for one.
        p_value: two-sided, of a mean of zero; NaN for one value.
        count: of values.
    """

    mean: float
    deviation: float
    low: float
    high: float
    p_value: float
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves zero out, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean, deviation and t interval of independent values, such as the paired changes of several seeds.

    Raises:
        ValueError: without a value.
    """
    if not values:
        raise ValueError("no value to estimate a mean from")
    mean, deviation = mean_and_deviation(values)
    if len(values) == 1:
        return Estimate(mean, math.nan, math.nan, math.nan, math.nan, 1)
    error = deviation / math.sqrt(len(values))
    half = t_quantile(confidence, len(values) - 1) * error
    t = abs(mean) / error if error else math.inf if mean else 0.0
    p_value = 1 - t_probability(t, len(values) - 1)
    return Estimate(mean, deviation, mean - half, mean + half, p_value, len(values))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number by Holm's step-down method (Scand. J. Statist. 6, 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def ranks(values: Mapping[str, float]) -> dict[str, float]:
    """1 for the lowest value; equal ones share their mean rank."""
    below = {name: sum(other < value for other in values.values()) for name, value in values.items()}
    equal = {name: sum(other == value for other in values.values()) for name, value in values.items()}
    return {name: below[name] + (equal[name] + 1) / 2 for name in values}
