from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from inspector.metrics import (
    ErrorTotals,
    cosine_similarity,
    decibels,
    merge_totals,
    powers,
    sqnr_db,
    worst_and_median,
)


def test_sqnr_of_identical_arrays_is_infinite() -> None:
    x = np.arange(5.0)
    assert sqnr_db(x, x) == math.inf
    assert sqnr_db(np.zeros(3), np.zeros(3)) == math.inf
    assert sqnr_db(np.zeros(0), np.zeros(0)) == math.inf


def test_sqnr_of_a_zero_reference_is_minus_infinity() -> None:
    assert sqnr_db(np.zeros(3), np.ones(3)) == -math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_sqnr_with_a_nonfinite_value_is_unknown(bad: float) -> None:
    assert math.isnan(sqnr_db(np.array([1.0, bad]), np.array([1.0, 1.0])))
    assert math.isnan(sqnr_db(np.array([1.0, 1.0]), np.array([1.0, bad])))


def test_sqnr_of_half_precision_does_not_overflow() -> None:
    x = np.full(1000, 300.0, np.float16)
    assert sqnr_db(x, (x * np.float16(0.5)).astype(np.float16)) == pytest.approx(20 * math.log10(2))


def test_sqnr_of_different_shapes_is_misuse() -> None:
    with pytest.raises(ValueError, match=r"shapes differ: reference \(3,\), actual \(4,\)"):
        sqnr_db(np.zeros(3), np.zeros(4))


def test_scaled_values_are_not_taken_for_identical() -> None:
    x = np.random.default_rng(0).standard_normal(1000)
    assert sqnr_db(x, 3 * x + 7) < 0


def test_cosine_of_edge_cases() -> None:
    assert cosine_similarity(np.zeros(3), np.zeros(3)) == 1.0
    assert cosine_similarity(np.zeros(3), np.ones(3)) == 0.0
    assert cosine_similarity(np.ones(3), -np.ones(3)) == -1.0
    assert math.isnan(cosine_similarity(np.array([math.nan]), np.ones(1)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_figure_leaves_out_what_is_not_finite(bad: float) -> None:
    for pair in (([bad, 1.0], [1.0, 1.0]), ([0.0, 0.0], [bad, 0.0]), ([bad, 1.0], [bad, 1.0])):
        totals = ErrorTotals.of(np.array(pair[0]), np.array(pair[1]))
        assert math.isnan(totals.sqnr_db)
        assert math.isnan(totals.cosine_similarity)
        assert math.isnan(totals.mse)
        assert math.isnan(totals.max_abs_error)
        later = ErrorTotals.of(np.ones(2), np.zeros(2)).merge(totals)
        assert math.isnan(later.sqnr_db)
        assert math.isnan(later.max_abs_error)


def test_totals_without_worth_make_every_sum_they_join_unknown() -> None:
    good = ErrorTotals.of(np.ones((2, 3)), np.zeros((2, 3)), 1)
    joined = good.merge(good.unknown())
    for figure in (joined.sqnr_db, joined.mse, joined.cosine_similarity, joined.max_abs_error):
        assert math.isnan(figure)
    assert np.isnan(joined.channel_sqnr_db).all()
    assert joined.count == 12


def test_channels_tell_exact_silent_and_unknown_ones_apart() -> None:
    x = np.array([[1.0, 0.0, 0.0, math.nan, 2.0]])
    y = np.array([[1.0, 0.0, 1.0, 1.0, 1.0]])
    with np.errstate(all="raise"):
        found = ErrorTotals.of(x, y, 1).channel_sqnr_db
    assert found[:3].tolist() == [math.inf, math.inf, -math.inf]
    assert math.isnan(found[3])
    assert found[4] == pytest.approx(10 * math.log10(4))


values = arrays(np.float64, array_shapes(max_dims=3), elements=st.floats(-1e6, 1e6))


@given(values, st.integers(0, 1000))
def test_streaming_equals_the_whole_array(x: np.ndarray, seed: int) -> None:
    y = x + np.random.default_rng(seed).standard_normal(x.shape)
    whole = ErrorTotals.of(x, y)
    flat_x, flat_y = x.ravel(), y.ravel()
    cut = flat_x.size // 2
    parts = merge_totals(
        ErrorTotals.of(a, b)
        for a, b in ((flat_x[:cut], flat_y[:cut]), (flat_x[cut:], flat_y[cut:]))
    )
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db)
    assert parts.cosine_similarity == pytest.approx(whole.cosine_similarity, abs=1e-9)
    assert parts.mse == pytest.approx(whole.mse)
    assert parts.max_abs_error == whole.max_abs_error
    assert parts.count == whole.count


@given(arrays(np.float32, (2, 3, 4), elements=st.floats(-100, 100, width=32)), st.integers(0, 2))
def test_channels_add_up_to_the_whole_and_equal_a_loop(x: np.ndarray, axis: int) -> None:
    y = x + np.float32(0.25)
    totals = ErrorTotals.of(x, y, axis)
    moved_x = np.moveaxis(x.astype(np.float64), axis, 0)
    moved_y = np.moveaxis(y.astype(np.float64), axis, 0)
    expected = [decibels(float((a**2).sum()), float(((a - b) ** 2).sum()))
                for a, b in zip(moved_x, moved_y, strict=True)]  # fmt: skip
    np.testing.assert_allclose(totals.channel_sqnr_db, expected)
    assert totals.sqnr_db == pytest.approx(ErrorTotals.of(x, y).sqnr_db)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((2, 3, 70), 1), ((2, 3, 5), 1), ((9001,), None), ((2, 4096), None), ((1, 2, 9000), 1),
     ((5, 1, 300), 1), ((3, 200), 1)],
)  # fmt: skip
def test_sums_of_every_size_equal_exactly_rounded_ones(
    shape: tuple[int, ...], axis: int | None
) -> None:
    random = np.random.default_rng(3)
    x, y = random.standard_normal(shape), random.standard_normal(shape)
    totals = ErrorTotals.of(x, y, axis)
    moved = [np.moveaxis(v, axis, 0) if axis is not None else v[None] for v in (x, y)]

    def exact(values: np.ndarray) -> list[float]:
        return [math.fsum(channel.ravel().tolist()) for channel in values]

    np.testing.assert_allclose(totals.signal, exact(moved[0] ** 2), rtol=1e-13)
    np.testing.assert_allclose(totals.actual_power, exact(moved[1] ** 2), rtol=1e-13)
    np.testing.assert_allclose(totals.noise, exact((moved[0] - moved[1]) ** 2), rtol=1e-13)
    np.testing.assert_allclose(totals.dot, exact(moved[0] * moved[1]), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(powers(x, y), [totals.signal.sum(), totals.noise.sum()], rtol=1e-13)


def test_nonfinite_values_are_counted_on_their_side() -> None:
    totals = ErrorTotals.of(np.array([1.0, math.nan]), np.array([math.inf, 1.0]))
    assert (totals.nonfinite_reference, totals.nonfinite_actual) == (1, 1)


def test_totals_of_ragged_channels_merge_to_one() -> None:
    merged = ErrorTotals.of(np.ones((2, 3)), np.zeros((2, 3)), 1).merge(
        ErrorTotals.of(np.ones((2, 4)), np.zeros((2, 4)), 1)
    )
    assert merged.signal.shape == (1,)
    assert merged.signal[0] == 14


def test_the_worst_value_is_named_and_nan_counts_as_worst() -> None:
    assert worst_and_median(np.array([3.0, 1.0, math.inf])) == (1.0, 3.0, 1)
    worst, _, at = worst_and_median(np.array([3.0, math.nan]))
    assert math.isnan(worst)
    assert at == 1
    assert worst_and_median(np.array([]))[2] is None


@given(values, st.integers(0, 1000))
def test_powers_are_what_the_totals_hold(x: np.ndarray, seed: int) -> None:
    y = x + np.random.default_rng(seed).standard_normal(x.shape)
    totals = ErrorTotals.of(x, y)
    np.testing.assert_allclose(powers(x, y), [totals.signal.sum(), totals.noise.sum()], rtol=1e-12)
