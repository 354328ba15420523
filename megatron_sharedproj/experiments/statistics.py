"""Figures over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is NaN for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def spread(values: Sequence[float], digits: int = 2) -> str:
    """ "12.34 +- 0.56" for a table; one value alone without a deviation."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(deviation) else f" +- {deviation:.{digits}f}")
