"""Chosen ranges against ONNX Runtime's calibrator, Max's table and every range that is tried."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import HistogramCollector

from inspector.distribution import Distribution
from inspector.grid_schemes import SCHEMES
from inspector.lab import candidate_noise, trial
from inspector.range_choice import (
    METHODS,
    choose_range,
    entropy_range,
    least_noise_range,
    range_candidates,
)
from inspector.stats import Histogram
from tests.test_lab import KINDS, values


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="method is 'best'"):
        choose_range(np.ones(3), "best")


def collected(x: NDArray[Any], method: str, bins: int, quantized: int, percentile: float = 99.9):
    """What ONNX Runtime's own collector makes of one array: its range, its counts, its edges."""
    collector = HistogramCollector(method, False, bins, quantized, percentile, "same")
    with contextlib.redirect_stdout(io.StringIO()):
        collector.collect({"t": x})
        low, high, *_ = collector.compute_collection_result()["t"]
    counts, edges, *_ = collector.get_histogram_dict()["t"]
    return (float(low), float(high)), counts, edges


@pytest.mark.parametrize("kind", ["normal", "relu", "laplace", "one outlier", "far from 0"])
@pytest.mark.parametrize(("bins", "quantized"), [(128, 128), (255, 128), (512, 128), (400, 64)])
def test_the_entropy_range_is_that_of_onnx_runtimes_calibrator(
    kind: str, bins: int, quantized: int
) -> None:
    x = values(kind, 4000).astype(np.float32)
    theirs, counts, edges = collected(x, "entropy", bins, quantized)
    ours = entropy_range(counts, edges, float(x.min()), float(x.max()), quantized_bins=quantized)
    assert ours == theirs


def test_the_default_bins_of_onnx_runtimes_entropy_leave_only_min_and_max() -> None:
    x = values("laplace", 4000).astype(np.float32)
    theirs, _, _ = collected(x, "entropy", 128, 128)
    assert theirs == (float(x.min()), float(x.max()))
    choice = choose_range(x, "entropy")
    assert (choice.low, choice.high) != theirs
    wide, _, _ = collected(x[:1500], "entropy", 2048, 128)
    few = choose_range(x[:1500], "entropy")
    assert (few.low, few.high) == wide


def test_entropy_of_a_distribution_is_near_that_of_its_values() -> None:
    x = values("laplace").astype(np.float32)
    exact, binned = choose_range(x, "entropy"), choose_range(Distribution.of(x), "entropy")
    assert binned.note
    assert binned.high == pytest.approx(exact.high, rel=0.1)
    with pytest.raises(ValueError, match="quantized bins"):
        entropy_range(np.ones(4, np.int64), np.arange(5.0), 0, 4, quantized_bins=8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percent", [99.9, 99.99, 99.999])
def test_a_percentile_is_the_quantile_and_within_a_bin_of_onnx_runtimes(
    kind: str, percent: float
) -> None:
    x = values(kind)
    choice = choose_range(x, f"percentile-{percent:g}")
    tail = (100 - percent) / 200
    low, high = np.quantile(x, [tail, 1 - tail], method="inverted_cdf")
    room = (x.max() - x.min()) / 1000 + 1e-12
    assert choice.low == pytest.approx(low, abs=room)
    assert choice.high == pytest.approx(high, abs=room)
    assert bool(choice.note) == (x.size * tail < 1)
    theirs, _, edges = collected(x.astype(np.float32), "percentile", 2048, 128, percent)
    width = float(edges[1] - edges[0])
    assert choice.low == pytest.approx(theirs[0], abs=1.01 * width + room)
    assert choice.high == pytest.approx(theirs[1], abs=1.01 * width + room)


def test_minmax_and_symmetric_are_the_ends_and_the_larger_magnitude() -> None:
    x = np.array([-1.0, 0.2, 3.0])
    assert (choose_range(x, "minmax").low, choose_range(x, "minmax").high) == (-1, 3)
    for each in (x, -x):
        choice = choose_range(each, "symmetric")
        assert (choice.low, choice.high) == (-3, 3)


def gaussian_bins() -> Histogram:
    """A standard normal distribution without sampling noise."""
    edges = np.linspace(-8, 8, 2049)
    reached = np.array([0.5 * (1 + math.erf(e / math.sqrt(2))) for e in edges])
    return Histogram(edges=edges, counts=np.rint(np.diff(reached) * 1e12).astype(np.int64))


@pytest.mark.parametrize(
    ("bits", "step", "noise"),
    [(2, 0.9957, 0.1188), (3, 0.5860, 0.03744), (4, 0.3352, 0.01154), (5, 0.1881, 0.003495)],
)
def test_the_range_of_least_noise_has_maxs_step_for_normal_data(
    bits: int, step: float, noise: float
) -> None:
    # J. Max, "Quantizing for minimum distortion" (1960), table II: equally spaced levels.
    scheme = SCHEMES["mid-rise"].with_bits(bits)
    choice = choose_range(gaussian_bins(), "mse", scheme=scheme)
    found = trial(gaussian_bins(), scheme, choice.low, choice.high)
    assert found.scale == pytest.approx(step, rel=0.01)
    assert found.noise == pytest.approx(noise, rel=0.002)


@pytest.mark.parametrize("name", ["ort-uint8", "ort-int8-symmetric", "truncating", "mxnet-uint8",
                                  "tensorflow-uint8", "power-of-two"])  # fmt: skip
@pytest.mark.parametrize("kind", ["relu", "far from 0"])
def test_no_range_that_is_tried_has_less_noise_than_the_chosen_one(name: str, kind: str) -> None:
    known, scheme = Distribution.of(values(kind, 5000)), SCHEMES[name].with_bits(4)
    lows, highs = range_candidates(known, scheme)
    noise = candidate_noise(known, scheme, (lows, highs))
    picks = np.linspace(0, lows.size - 1, 40).astype(int)
    one_by_one = [trial(known, scheme, lows[i], highs[i]).noise for i in picks]
    np.testing.assert_allclose(noise[picks], one_by_one, rtol=1e-9)
    chosen = trial(known, scheme, *least_noise_range(known, scheme)).noise
    assert chosen <= noise.min() * (1 + 1e-12)
    if scheme.rule in ("affine", "offset"):
        assert chosen < 0.999 * noise.min()  # of the second, finer round
    for method in (m for m in METHODS if m != "mse"):
        choice = choose_range(known, method, scheme=scheme)
        other = trial(known, scheme, min(choice.low, choice.high), choice.high)
        assert chosen <= other.noise * 1.02, method


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    st.sampled_from([m for m in METHODS if m != "mse"]),
)
def test_a_chosen_range_lies_within_the_values(numbers: Sequence[float], method: str) -> None:
    x = np.array(numbers)
    choice = choose_range(x, method)
    reach = float(np.abs(x).max())
    assert -reach <= choice.low <= choice.high <= reach or method == "entropy"
