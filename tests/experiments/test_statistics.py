"""Figures over seeds against scipy and against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from megatron_sharedproj.experiments.statistics import (
    estimate,
    holm,
    ranks,
    spread,
    t_probability,
    t_quantile,
)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 10, 29, 100])
def test_student_t_is_scipys(degrees: int) -> None:
    t = pytest.importorskip("scipy.stats").t(degrees)
    for value in (0.0, 0.1, 1.0, 2.5, 12.7, 400.0):
        assert t_probability(value, degrees) == pytest.approx(t.cdf(value) - t.cdf(-value), abs=1e-12)
        assert t_probability(-value, degrees) == t_probability(value, degrees)
    for confidence in (0.05, 0.5, 0.95, 0.999):
        assert t_quantile(confidence, degrees) == pytest.approx(t.ppf((1 + confidence) / 2), rel=1e-9)


def test_estimate_of_three_values() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = [2.1, 2.6, 1.9]
    found, expected = estimate(values), stats.ttest_1samp(values, 0.0)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.mean, found.count, found.sign) == (pytest.approx(2.2), 3, 1)
    # t = 4.3027 for two degrees of freedom, not the normal's 1.96.
    assert found.high - found.mean == pytest.approx(4.302653 * found.deviation / math.sqrt(3))


def test_estimates_that_say_nothing_about_the_sign() -> None:
    one = estimate([3.0])
    assert one.mean == 3.0 and math.isnan(one.deviation) and math.isnan(one.low) and one.sign == 0
    assert estimate([-1.0, 2.0, 0.5]).sign == 0
    assert estimate([-1.0, -1.1, -0.9]).sign == -1
    same = estimate([0.0, 0.0])
    assert (same.low, same.high, same.p_value, same.sign) == (0.0, 0.0, 1.0, 0)
    assert estimate([1.0, 1.0]).p_value == 0.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_ranks_share_ties() -> None:
    assert ranks({"a": 3.0, "b": 1.0, "c": 3.0, "d": 5.0}) == {"a": 2.5, "b": 1.0, "c": 2.5, "d": 4.0}


def test_spread_of_one_value_has_no_deviation() -> None:
    assert spread([1.234]) == "1.23"
    assert spread([1.0, 2.0], 1) == "1.5 +- 0.7"


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="no value"):
        estimate([])
    with pytest.raises(ValueError, match="degrees 0"):
        t_probability(1.0, 0)
    with pytest.raises(ValueError, match="confidence 1"):
        t_quantile(1.0, 3)
