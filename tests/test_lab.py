"""The lab's arithmetic against raw values and many points in every bin."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from inspector import metrics, stats
from inspector.distribution import Distribution
from inspector.grid_schemes import SCHEMES, dequantized
from inspector.lab import compare_schemes, trial
from inspector.qparams import QParams
from inspector.range_choice import (
    METHODS,
    choose_range,
)
from inspector.stats import Histogram

# One for every way of rounding, of clipping and of placing the grid.
UNLIKE = (
    "affine-uint8", "ort-int8-symmetric", "ort-int8-reduced", "tflite-weights", "mxnet-uint8",
    "tensorflow-uint8", "mid-rise", "truncating", "power-of-two",
)  # fmt: skip


def values(kind: str, count: int = 39_990) -> NDArray[np.float64]:
    rng = np.random.default_rng(0)
    normal = rng.normal(0, 1, count)
    return {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "relu6": np.clip(normal * 4, 0, 6),
        "laplace": rng.laplace(0, 1, count),
        "uniform": rng.uniform(-1, 1, count),
        "far from 0": rng.uniform(3, 5, count),
        "one outlier": np.r_[rng.normal(0, 0.01, count), 10.0],
        "few values": rng.integers(-3, 9, count) * 0.37,
        "constant": np.full(count, 0.7),
        "one": np.array([-2.5]),
    }[kind]


KINDS = (
    "normal", "relu", "relu6", "laplace", "uniform", "far from 0", "one outlier", "few values",
    "constant", "one",
)  # fmt: skip


def test_a_range_that_cannot_be_is_refused() -> None:
    for low, high in ((1.0, 0.0), (-math.inf, 1.0), (0.0, math.nan)):
        with pytest.raises(ValueError, match="not a range"):
            trial(np.ones(3), SCHEMES["ort-int8"], low, high)


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_trial_of_raw_values_is_what_quantizing_them_gives(
    name: str, bits: int, share: float
) -> None:
    x = values("laplace", 3000)
    scheme = SCHEMES[name].with_bits(bits)
    found = trial(x, scheme, x.min() * share, x.max() * share)
    real = dequantized(x, scheme, found.scale, found.zero_point)
    assert found.sqnr_db == pytest.approx(metrics.sqnr_db(x, real), abs=1e-9)
    assert found.noise == pytest.approx(float(np.mean((x - real) ** 2)))
    clipped = (x < found.clip_low) | (x > found.clip_high)
    assert found.clipping_noise == pytest.approx(float(np.sum((x - real)[clipped] ** 2)) / x.size)
    assert found.level_low <= real.min()
    assert real.max() <= found.level_high
    if scheme.quant_type and not scheme.narrow:
        qparams = QParams(
            scale=np.array(found.scale), zero_point=np.array(int(found.zero_point)),
            dtype=scheme.quant_type,
        )  # fmt: skip
        ends = stats.saturated_fraction(x, qparams)
        assert (found.clipped_low_fraction, found.clipped_high_fraction) == ends
        if scheme.ties == "even":
            np.testing.assert_allclose(real, qparams.dequantize(qparams.quantize(x)), atol=1e-12)


@pytest.mark.parametrize("bits", [2, 5])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_closed_form_is_what_many_points_in_every_bin_give(name: str, bits: int) -> None:
    edges = np.array([-2.0, -1.1, -0.3, 0.05, 0.06, 1.0, 2.5])
    counts = np.array([3, 0, 5, 100, 7, 2])
    points = 50_000
    inside = (np.arange(points) + 0.5) / points
    x = (edges[:-1, None] + np.diff(edges)[:, None] * inside).ravel()
    weights = np.repeat(counts / points, points)
    scheme = SCHEMES[name].with_bits(bits)
    found = trial(Histogram(edges=edges, counts=counts), scheme, -1.2, 1.9)
    squares = (x - dequantized(x, scheme, found.scale, found.zero_point)) ** 2
    below, above = x < found.clip_low, x > found.clip_high
    total = counts.sum()
    assert found.rounding_noise == pytest.approx(
        float(weights @ (squares * ~(below | above))) / total, rel=6e-4
    )
    assert found.clipping_noise == pytest.approx(
        float(weights @ (squares * (below | above))) / total, rel=6e-4, abs=1e-9
    )
    assert found.clipped_low_fraction == pytest.approx(weights @ below / total, abs=4e-5)
    assert found.clipped_high_fraction == pytest.approx(weights @ above / total, abs=4e-5)
    assert found.signal == pytest.approx(float(weights @ x**2) / total, rel=1e-4)


def test_what_is_clipped_is_counted_exactly_where_the_end_is_an_edge() -> None:
    # int8 symmetric of a = 127: step 1, clipped below -128.5 and above 127.5.
    edges = np.array([-200.0, -128.5, 0.0, 127.5, 300.0])
    histogram = Histogram(edges=edges, counts=np.array([3, 10, 20, 7]), below=2, above=8)
    found = trial(histogram, SCHEMES["ort-int8-symmetric"], -127, 127)
    assert (found.clipped_low_fraction, found.clipped_high_fraction) == (5 / 50, 15 / 50)
    assert (found.clip_low, found.clip_high) == (-128.5, 127.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_distribution_gives_the_decibels_of_its_values_within_a_tenth(kind: str) -> None:
    x = values(kind)
    known = Distribution.of(x)
    assert known.count == x.size
    assert (known.low, known.high) == (x.min(), x.max())
    assert known.signal == pytest.approx(float(np.mean(x**2)), rel=1e-3)
    for name in UNLIKE:
        scheme = SCHEMES[name]
        for bits in (3, 8, 16):
            for share in (1.0, 0.5) if bits == 8 else (0.7,):
                ends = x.min() * share, x.max() * share
                if ends[0] > ends[1]:
                    continue
                exact = trial(x, scheme.with_bits(bits), *ends)
                binned = trial(known, scheme.with_bits(bits), *ends)
                where = (name, bits, share)
                assert binned.sqnr_db == pytest.approx(exact.sqnr_db, abs=0.1), where
                assert binned.clipped_fraction == pytest.approx(exact.clipped_fraction, abs=2e-3), (
                    where
                )


def test_zeros_of_a_relu_have_no_noise_where_they_are_counted_apart() -> None:
    x = np.maximum(np.random.default_rng(0).normal(-1, 1, 200_000), 0)  # 84 % zeros
    edges = np.linspace(-0.02, x.max() + 0.02, 193)
    histogram = Histogram.of(x, edges)
    exact = trial(x, SCHEMES["ort-uint8"], 0, x.max()).sqnr_db
    zeros = int((x == 0).sum())
    apart = Distribution.from_histogram(histogram, atoms={0.0: zeros})
    assert trial(apart, SCHEMES["ort-uint8"], 0, x.max()).sqnr_db == pytest.approx(exact, abs=0.1)
    spread = trial(histogram, SCHEMES["ort-uint8"], 0, x.max()).sqnr_db
    assert spread < exact - 5  # 10*log10(1/0.16) = 8 dB at most


def test_even_values_have_the_noise_that_is_predicted() -> None:
    edges = np.linspace(-1, 1, 2049)
    flat = Histogram(edges=edges, counts=np.full(2048, 1000))
    for bits in (4, 8, 12):
        for name in ("affine-int8", "mid-rise", "truncating"):
            found = trial(flat, SCHEMES[name].with_bits(bits), -1, 1)
            assert found.rounding_noise == pytest.approx(found.predicted_noise, rel=0.02)
        found = trial(flat, SCHEMES["mid-rise"].with_bits(bits), -1, 1)
        assert found.sqnr_db == pytest.approx(6.0206 * bits, abs=1e-3)
        worse = trial(flat, SCHEMES["truncating"].with_bits(bits), -1, 1)
        assert found.sqnr_db - worse.sqnr_db == pytest.approx(6.02, abs=0.1)


def test_intels_table_loses_what_its_mistakes_cost() -> None:
    x = values("uniform", 200_000)
    rows = {row.scheme.name: row for row in compare_schemes(x, -1.0, 1.0)}
    for name, published, correct in (
        ("intel-int8-asymmetric", 42.1, 48.1),
        ("intel-uint8-symmetric", 9.0, 48.1),
        ("tensorflow-uint8", 3.0, 48.1),
    ):
        row = rows[name]
        assert row.correct is not None
        assert row.published.sqnr_db == pytest.approx(published, abs=0.1)
        assert row.correct.sqnr_db == pytest.approx(correct, abs=0.1)
        assert row.scheme.error
    assert all(row.correct is None for row in rows.values() if not row.scheme.corrected)
    positive = {r.scheme.name: r for r in compare_schemes(np.abs(x), 0.0, 1.0)}["tensorflow-uint8"]
    assert positive.correct is not None
    assert positive.published.sqnr_db == positive.correct.sqnr_db


def test_schemes_of_one_width_are_not_listed_twice() -> None:
    rows = compare_schemes(values("normal", 500), -3, 3, bits=8)
    titles = [row.scheme.title for row in rows]
    assert len(titles) == len(set(titles)) < len(SCHEMES)
    assert {row.scheme.bits for row in rows} == {8}
    with pytest.raises(KeyError):
        compare_schemes(np.ones(2), 0, 1, names=["nobody's"])


def test_levels_are_all_up_to_256_and_else_those_in_view() -> None:
    x = np.linspace(-0.5, 2.0, 100)
    found = trial(x, SCHEMES["ort-int8"], -1, 3)
    assert found.levels.size == found.level_count == 256
    np.testing.assert_allclose(found.levels[[0, -1]], [found.level_low, found.level_high])
    wide = trial(x, SCHEMES["ort-uint16"], -1, 3)
    assert wide.level_count == 65_536
    assert wide.levels.size == pytest.approx(2.5 / wide.scale, abs=2)
    assert wide.levels.min() >= -0.5 - 1e-9
    np.testing.assert_allclose(np.diff(wide.levels), wide.scale, rtol=1e-6)
    some = trial(x, SCHEMES["ort-uint16"], -1, 3, view=(0.0, 0.001))
    assert some.levels.size == 17
    assert trial(x, SCHEMES["ort-uint16"], -1, 3, view=(50.0, 60.0)).levels.size == 0
    assert trial(x, SCHEMES["ort-uint16"], -1, 3, view=(-1e300, 1e300)).levels.size == 65_536
    rise = trial(x, SCHEMES["mid-rise"].with_bits(2), -1, 1)
    assert rise.levels.tolist() == [-0.75, -0.25, 0.25, 0.75]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_tensor_without_finite_values_loses_nothing(name: str) -> None:
    for x in (np.empty((0, 3), np.float32), np.array([np.nan, np.inf, -np.inf])):
        for known in (x, Distribution.of(x)):
            found = trial(known, SCHEMES[name].with_bits(16), -1, 1)
            assert found.count == 0
            assert found.nonfinite == x.size
            assert found.sqnr_db == math.inf
            assert (found.clipped_fraction, found.noise, found.levels.size) == (0, 0, 0)
        for method in METHODS:
            choice = choose_range(x, method)
            assert (choice.low, choice.high, choice.note) == (0, 0, "there is no finite value")


def test_any_real_dtype_and_shape_is_tried() -> None:
    scheme = SCHEMES["ort-int8"]
    for x in (
        np.array(0.5), np.array([[True, False]]), np.arange(-8, 8, dtype=np.int8).reshape(2, 8),
        np.array([1.5, -2.5], np.float16), np.array([1e30, -1e30]),
    ):  # fmt: skip
        ends = min(float(x.min()), 0.0), float(x.max())
        exact, binned = trial(x, scheme, *ends), trial(Distribution.of(x), scheme, *ends)
        assert exact.count == x.size
        assert binned.sqnr_db == pytest.approx(exact.sqnr_db)
    mixed = trial(np.array([1.0, np.nan, 0.5]), scheme, 0, 1)
    assert (mixed.count, mixed.nonfinite) == (2, 1)
    huge = np.array([1e308, -1e308])
    found = trial(huge, scheme, -1e308, 1e308)
    assert found.scale == pytest.approx(1e308 / 127.5)
    assert math.isnan(found.sqnr_db)  # the squares are infinite
    assert math.isnan(trial(Distribution.of(huge), scheme, -1e308, 1e308).sqnr_db)
