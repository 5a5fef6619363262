from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from inspector.qparams import FLOAT_CODES, QParams
from inspector.stats import Histogram, TensorStats, saturated_counts, saturated_fraction

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


@pytest.mark.parametrize("dtype", FLOAT_CODES)
def test_a_float_type_saturates_half_of_its_last_step_beyond_its_largest_code(dtype: str) -> None:
    """The last step is the distance of the two largest codes, as ml_dtypes knows them."""
    largest = float(ml_dtypes.finfo(dtype).max)
    narrow = np.dtype(dtype)
    below = np.frombuffer(
        (np.array(largest).astype(narrow).view(np.uint8) - 1).astype(np.uint8).tobytes(), narrow
    )
    edge = largest + (largest - float(below[0].astype(np.float64))) / 2
    scale = 0.25
    qparams = QParams(scale=np.array(scale), zero_point=np.array(0), dtype=dtype)
    assert qparams.representable_range() == (-largest * scale, largest * scale)
    inside = np.array([-edge, -largest, 0.0, largest, edge]) * scale
    assert saturated_counts(inside, qparams) == (0, 0)
    outside = np.nextafter([-edge * scale, edge * scale, edge * scale], [-1e9, 1e9, 1e9])
    assert saturated_counts(outside, qparams) == (1, 2)


def test_saturation_is_counted_with_each_channels_and_each_blocks_own_limits() -> None:
    real = np.array([[100.0, -100.0, 1.0], [100.0, -100.0, 300.0]])
    channel = QParams(scale=np.array([0.5, 2.0]), zero_point=np.array([0, 0]), dtype="int8", axis=0)
    assert saturated_counts(real, channel) == (1, 2)
    blocks = QParams(
        scale=np.array([[0.5, 2.0], [2.0, 2.0]]), zero_point=np.zeros((2, 2), np.int64),
        dtype="int8", axis=1, block_size=2,
    )  # fmt: skip
    assert saturated_counts(real, blocks) == (1, 2)
    assert saturated_counts(real[:, ::-1], blocks) == (1, 1)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_an_empty_array_has_no_saturated_elements_however_it_is_quantized(
    shape: tuple[int, ...],
) -> None:
    for axis, block in ((0, None), (0, 2)):
        qparams = QParams(
            scale=np.ones(3), zero_point=np.zeros(3, np.int64), dtype="uint4", axis=axis,
            block_size=block,
        )  # fmt: skip
        assert saturated_counts(np.zeros(shape, np.float32), qparams) == (0, 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int32"])
def test_saturation_does_not_depend_on_the_arrays_type_or_order(dtype: str) -> None:
    values = np.array([[64.0, -70.0, 3.0], [80.0, 63.0, -64.0]]).astype(np.dtype(dtype))
    assert saturated_counts(values, INT8) == (1, 2)
    assert saturated_counts(np.asfortranarray(values), INT8) == (1, 2)
