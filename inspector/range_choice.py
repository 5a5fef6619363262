"""The range that a method chooses for a tensor's values.

Apart from `calibration`, which runs ONNX Runtime's own calibrator on a model: here the same methods
look at one tensor's values alone, fast enough for a page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.distribution import Distribution, Values, distribution_of
from inspector.grid_schemes import RULES, SCHEMES, GridScheme
from inspector.lab import candidate_noise

_Array = NDArray[np.float64]

METHODS = (
    "minmax", "symmetric", "percentile-99.9", "percentile-99.99", "percentile-99.999", "entropy",
    "mse",
)  # fmt: skip
"""What `choose_range` can do."""

# Ends of the search for the least noise: shares of the observed range, evenly spaced in log.
_SMALLEST_SHARE = 1e-3
_ENDS, _ENDS_OF_ONE, _FINE_ENDS = 40, 400, 21
# As ONNX Runtime's calibrator: merged bins, and what smoothing puts into an empty one.
_ENTROPY_BINS, _QUANTIZED_BINS, _SMOOTHING = 2048, 128, 0.0001


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeChoice:
    """A range and how it came about.

    Attributes:
        method: one of `METHODS`.
        low: lower end; 0 where there is no finite value.
        high: upper end.
        note: what to know about it, one sentence; "" for nothing.
    """

    method: str
    low: float
    high: float
    note: str = ""


def choose_range(values: Values, method: str, *, scheme: GridScheme | None = None) -> RangeChoice:
    """The range that a method chooses for values.

    - minmax: the smallest and the largest value.
    - symmetric: plus and minus the largest magnitude.
    - percentile-P: both tails cut, (100-P)/2 percent each. Quantiles of the values, where ONNX
      Runtime's calibrator takes the edges of its 2,048 bins.
    - entropy: see `entropy_range`; over 2,048 bins, for ONNX Runtime's own 128 leave one candidate,
      which is min and max.
    - mse: the range of least noise under `scheme`, see `least_noise_range`.

    Args:
        values: of any shape and real dtype, or their distribution.
        method: one of `METHODS`.
        scheme: only for "mse"; int8 affine where None.

    Raises:
        ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    known = distribution_of(values)
    if not known.count:
        return RangeChoice(method=method, low=0.0, high=0.0, note="there is no finite value")
    low, high, note = known.low, known.high, ""
    if method == "symmetric":
        high = max(abs(low), abs(high))
        low = -high
    elif method.startswith("percentile-"):
        tail = (100 - float(method.removeprefix("percentile-"))) / 200
        low, high = known.quantile(tail), known.quantile(1 - tail)
        if known.count * tail < 1:
            note = f"{known.count:,.0f} values are too few to cut this little off"
    elif method == "entropy":
        if isinstance(values, np.ndarray):
            finite = values[np.isfinite(values)]
            counts, edges = _symmetric_histogram(finite)
        else:
            counts, edges = _rebinned(known)
            note = "from bins as fine as this histogram's, not from the values"
        low, high = entropy_range(counts, edges, low, high)
    elif method == "mse":
        low, high = least_noise_range(known, scheme or SCHEMES["affine-int8"])
    return RangeChoice(method=method, low=low, high=high, note=note)


def _symmetric_histogram(
    values: NDArray[Any], bins: int = _ENTROPY_BINS
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Counts and edges between plus and minus the largest magnitude, in the values' own dtype."""
    if values.dtype.kind != "f":
        values = values.astype(np.float64)
    reach = np.array(max(abs(values.min()), abs(values.max())), values.dtype)
    # The reach stays of the values' dtype: so do the edges, and which bin a value falls into.
    ends: Any = (-reach, reach)
    counts, edges = np.histogram(values.ravel(), bins, range=ends)
    return counts.astype(np.int64), edges


def _rebinned(values: Distribution, bins: int = _ENTROPY_BINS) -> tuple[NDArray[np.int64], _Array]:
    """The same of a distribution, as whole counts."""
    reach = max(abs(values.low), abs(values.high)) or 0.5
    edges = np.linspace(-reach, reach, bins + 1)
    reached = np.zeros(bins + 1)
    if values.counts.any():
        reached += np.interp(edges, values.edges, np.r_[0.0, np.cumsum(values.counts)])
    counts = np.diff(np.rint(reached)).astype(np.int64)
    at = np.clip(np.searchsorted(edges, values.atoms, side="right") - 1, 0, bins - 1)
    np.add.at(counts, at, np.rint(values.atom_counts).astype(np.int64))
    return counts, edges


def entropy_range(
    counts: NDArray[np.int64],
    edges: NDArray[Any],
    low: float,
    high: float,
    *,
    quantized_bins: int = _QUANTIZED_BINS,
) -> tuple[float, float]:
    """The range of least Kullback-Leibler divergence, as ONNX Runtime's calibrator finds it.

    Of every run of bins that is symmetric about the middle, the values with both tails put into
    the outermost bins are compared with the values merged into `quantized_bins` and spread out
    again. The same integer divisions and the same float32 as in
    `onnxruntime.quantization.calibrate.HistogramCollector` (which credits TensorRT and MXNet).

    Args:
        counts: shape (bins,), bins symmetric about 0.
        edges: shape (bins + 1,).
        low: the smallest value; a chosen range never ends below it.
        high: the largest value.
        quantized_bins: how many bins stand for the codes, at most `bins`.

    Raises:
        ValueError: fewer bins than quantized ones, or counts and edges that do not fit.
    """
    bins, middle, half = counts.size, counts.size // 2, quantized_bins // 2
    if edges.size != bins + 1 or not 2 <= quantized_bins <= bins:
        raise ValueError(f"{bins} bins, {edges.size} edges and {quantized_bins} quantized bins")
    reached = np.r_[0, np.cumsum(counts, dtype=np.int64)]
    best, chosen = math.inf, (0, min(2 * half + 1, bins))
    for number, reach in enumerate(range(half, middle + 1)):
        start, end = middle - reach, min(middle + reach + 1, bins)
        inside = counts[start:end].astype(np.int64)
        p = inside.copy()
        p[0] += reached[start]
        p[-1] += reached[-1] - reached[end]
        merged = inside.size // quantized_bins
        cut = merged * quantized_bins
        quantized = inside[:cut].reshape(quantized_bins, merged).sum(axis=1)
        quantized[-1] += inside[cut:].sum()
        full = (p[:cut].reshape(quantized_bins, merged) != 0).sum(axis=1)
        q = np.zeros(p.size, np.int64)
        spread = np.divide(quantized, full, out=np.zeros(quantized_bins), where=full != 0)
        q[:cut] = np.repeat(spread.astype(np.int64), merged)
        divergence = _divergence(p, q)
        if number == 0 or divergence < best:
            best, chosen = divergence, (start, end)
    found = float(edges[chosen[0]]), float(edges[chosen[1]])
    return max(found[0], low), min(found[1], high)


def _divergence(p: NDArray[np.int64], q: NDArray[np.int64]) -> float:
    """Kullback-Leibler divergence of smoothed counts; inf where one of them is all zero."""
    smooth = []
    for counts in (p, q):
        zeros = counts == 0
        empty = int(zeros.sum())
        if empty == counts.size:
            return math.inf
        taken = _SMOOTHING * empty / (counts.size - empty)
        smoothed = counts.astype(np.float32)
        smoothed += _SMOOTHING * zeros.astype(np.float32) + (-taken) * (~zeros).astype(np.float32)
        smooth.append(1.0 * smoothed / np.sum(smoothed, axis=0, keepdims=True))
    return float(np.sum(smooth[0] * np.log(smooth[0] / smooth[1]), axis=0))


def least_noise_range(values: Values, scheme: GridScheme) -> tuple[float, float]:
    """The range under which a scheme has the least noise, of all that are tried.

    The ends are shares of the observed ones, from a thousandth to the whole, evenly spaced in
    log: 400 where only the larger magnitude counts, else 40 for each end in all combinations; then
    as finely again around the best. All are computed, none is skipped; of equals the widest.

    Args:
        values: see `trial`; raw ones are binned first.
        scheme: how to quantize.
    """
    known = distribution_of(values)
    if not known.count:
        return 0.0, 0.0
    coarse = range_candidates(known, scheme)
    at = int(np.argmin(candidate_noise(known, scheme, coarse)))
    fine = range_candidates(known, scheme, around=(float(coarse[0][at]), float(coarse[1][at])))
    both = np.r_[coarse[0][at], fine[0]], np.r_[coarse[1][at], fine[1]]
    at = int(np.argmin(candidate_noise(known, scheme, both)))
    return float(both[0][at]), float(both[1][at])


def range_candidates(
    values: Distribution, scheme: GridScheme, *, around: tuple[float, float] | None = None
) -> tuple[_Array, _Array]:
    """The ranges that `least_noise_range` tries: low and high ends, of one shape, widest first.

    Args:
        values: with at least one finite value.
        scheme: how to quantize.
        around: the best range of the first round, for the second.
    """
    rule = RULES[scheme.rule]
    low, high = values.low, values.high
    if rule.symmetric:
        reach = max(abs(low), abs(high))
        ends = _shares(_ENDS_OF_ONE, None if around is None else around[1], reach)
        return -ends, ends
    # Formulas that need 0 shrink towards it; MXNet's offset has no need of it.
    anchor = 0.0 if rule.whole or low <= 0 <= high else (low + high) / 2
    low, high = min(low, anchor), max(high, anchor)
    below = _shares(_ENDS, None if around is None else anchor - around[0], anchor - low)
    above = _shares(_ENDS, None if around is None else around[1] - anchor, high - anchor)
    if scheme.rule == "non-negative":
        below = below[:1]
    lows, highs = np.meshgrid(anchor - below, anchor + above, indexing="ij")
    return lows.ravel(), highs.ravel()


def _shares(count: int, around: float | None, reach: float) -> _Array:
    """Lengths to try, longest first; one where there is none to choose."""
    if reach <= 0:
        return np.zeros(1)
    ratio = _SMALLEST_SHARE ** (1 / (count - 1))
    if around is None:
        coarse: _Array = reach * ratio ** np.arange(count)
        return coarse
    fine: _Array = np.minimum(around * ratio ** np.linspace(-1, 1, _FINE_ENDS), reach)
    return fine
