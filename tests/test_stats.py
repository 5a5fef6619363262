from __future__ import annotations

import math

import numpy as np
import pytest

from inspector.qparams import QParams
from inspector.stats import Histogram, TensorStats, saturated_fraction

INT8 = QParams(scale=np.array(0.5), zero_point=np.array(0, np.int64), dtype="int8")


def test_values_at_the_limits_are_not_saturated_and_beyond_half_a_step_are() -> None:
    # int8 at 0.5: -64.0 .. 63.5
    assert saturated_fraction(np.array([-64.0, 63.5, 63.75, -64.25]), INT8) == (0.0, 0.0)
    assert saturated_fraction(np.array([63.76, 70.0, -64.26, 0.0]), INT8) == (0.25, 0.5)


def test_nothing_is_saturated_in_an_empty_array() -> None:
    assert saturated_fraction(np.zeros((0, 3)), INT8) == (0.0, 0.0)


def test_statistics_of_parts_equal_those_of_the_whole() -> None:
    x = np.random.default_rng(0).normal(3, 2, 1000)
    whole = TensorStats.of(x)
    parts = TensorStats.of(x[:300]).merge(TensorStats.of(x[300:]))
    assert parts.low == x.min()
    assert parts.high == x.max()
    assert parts.mean == pytest.approx(float(x.mean()))
    assert parts.std == pytest.approx(float(x.std()))
    assert whole.count == parts.count == 1000


def test_statistics_leave_out_and_count_what_is_not_finite() -> None:
    stats = TensorStats.of(np.array([1.0, math.nan, math.inf, 2.0]))
    assert (stats.low, stats.high, stats.nonfinite, stats.mean) == (1.0, 2.0, 2, 1.5)
    assert math.isnan(TensorStats.of(np.array([])).low)


def test_a_histogram_counts_every_element_once() -> None:
    x = np.array([-5.0, 0.0, 0.4, 1.0, 2.0, 9.0, math.nan])
    edges = np.array([0.0, 1.0, 2.0])
    histogram = Histogram.of(x, edges).merge(Histogram.of(x, edges))
    np.testing.assert_array_equal(histogram.counts, [4, 4])
    assert (histogram.below, histogram.above, histogram.nonfinite) == (2, 2, 2)
    with pytest.raises(ValueError, match="different edges"):
        histogram.merge(Histogram.of(x, np.array([0.0, 1.0])))
