"""Two arrays in, one number out; totals that stream over samples and merge.

All sums are float64. SQNR is pooled (the ratio of sums of squares), never the mean of decibels:
other tools average differently, so their figures are not comparable. `ErrorTotals` keeps the sums
from which every figure derives, so that streaming over samples gives what the whole array gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray


def decibels(signal: float, noise: float) -> float:
    """``10*log10(signal/noise)``; inf where noise is 0, -inf where only signal is 0.

    nan where either is not finite.

    Args:
        signal: sum of squares of the reference, >= 0.
        noise: sum of squares of the difference, >= 0.
    """
    if math.isnan(signal) or math.isnan(noise) or math.isinf(signal) or math.isinf(noise):
        return math.nan
    if noise == 0:
        return math.inf
    if signal == 0:
        return -math.inf
    return 10.0 * (math.log10(signal) - math.log10(noise))


def _same_shape(reference: NDArray[Any], actual: NDArray[Any]) -> None:
    if reference.shape != actual.shape:
        raise ValueError(f"shapes differ: reference {reference.shape}, actual {actual.shape}")


def sqnr_db(reference: NDArray[Any], actual: NDArray[Any]) -> float:
    """Signal to quantization noise in dB, higher is better; +6 dB is about one more bit.

    ``10*log10(sum(reference^2)/sum((reference-actual)^2))`` in float64. inf when identical (also
    both all zero, or empty), -inf when the reference is all zero and the other is not, nan where
    either holds NaN or infinity.

    Raises:
        ValueError: shapes differ.
    """
    return ErrorTotals.of(reference, actual).sqnr_db


def powers(reference: NDArray[Any], actual: NDArray[Any]) -> NDArray[np.float64]:
    """Signal and noise, i.e. sum of reference^2 and of (reference-actual)^2, float64, shape (2,).

    What `sqnr_db` needs and no more; powers of several samples add up.

    Raises:
        ValueError: shapes differ.
    """
    _same_shape(reference, actual)
    x = np.asarray(reference, np.float64).ravel()
    with np.errstate(invalid="ignore", over="ignore"):
        error = x - np.asarray(actual, np.float64).ravel()
        return np.array([_dot(v, v) for v in (x, error)])


# Rows of this length are multiplied without threads: BLAS's and the runtime's own get into each
# other's way. Below the second length einsum is faster.
_ROW = 4096
_SHORT = 64


def _dot(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Sum of a*b of two flat arrays."""
    cut = a.size - a.size % _ROW
    rest = float(np.einsum("i,i->", a[cut:], b[cut:]))
    if not cut:
        return rest
    return rest + float(np.vecdot(a[:cut].reshape(-1, _ROW), b[:cut].reshape(-1, _ROW)).sum())


def _channel_dots(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of a*b per channel, of arrays of shape (outer, channels, inner)."""
    if a.shape[1] == 1:
        return np.array([_dot(a.ravel(), b.ravel())])
    if not _SHORT <= a.shape[2] <= 2 * _ROW:
        sums: NDArray[np.float64] = np.einsum("oci,oci->c", a, b)
        return sums
    return np.asarray(np.vecdot(a, b).sum(axis=0))


def cosine_similarity(reference: NDArray[Any], actual: NDArray[Any]) -> float:
    """Cosine of the angle between the flattened arrays, -1..1, higher is better.

    1 when both are all zero, 0 when one of them is, nan where either holds NaN or infinity.

    Raises:
        ValueError: shapes differ.
    """
    return ErrorTotals.of(reference, actual).cosine_similarity


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorTotals:
    """Sums over the elements of a reference and an actual array, per channel where there is one.

    Attributes:
        signal: sum of reference^2, float64, shape (channels,); one channel where no axis was given.
        noise: sum of (reference - actual)^2, same shape.
        actual_power: sum of actual^2, same shape.
        dot: sum of reference*actual, same shape.
        max_abs_error: largest |reference - actual|; nan where an element is not finite.
        count: number of elements.
        nonfinite_reference: NaN and infinite elements of the reference.
        nonfinite_actual: NaN and infinite elements of the actual array.
    """

    signal: NDArray[np.float64]
    noise: NDArray[np.float64]
    actual_power: NDArray[np.float64]
    dot: NDArray[np.float64]
    max_abs_error: float
    count: int
    nonfinite_reference: int = 0
    nonfinite_actual: int = 0

    @classmethod
    def of(
        cls, reference: NDArray[Any], actual: NDArray[Any], axis: int | None = None
    ) -> ErrorTotals:
        """Totals of one pair of arrays; `axis` (>= 0) keeps channels apart.

        Raises:
            ValueError: shapes differ, or the axis is outside the array.
        """
        _same_shape(reference, actual)
        if axis is not None and not 0 <= axis < reference.ndim:
            raise ValueError(f"axis {axis} is outside an array of shape {reference.shape}")
        channels = 1 if axis is None else reference.shape[axis]
        outer = 1 if axis is None else math.prod(reference.shape[:axis])
        shape = (outer, channels, -1) if reference.size else (outer, channels, 0)
        x = np.asarray(reference, np.float64).reshape(shape)
        y = np.asarray(actual, np.float64).reshape(shape)
        with np.errstate(invalid="ignore", over="ignore"):
            error = x - y
            signal, actual_power = _channel_dots(x, x), _channel_dots(y, y)
            noise, dot = _channel_dots(error, error), _channel_dots(x, y)
            max_abs_error = max(float(error.max()), -float(error.min())) if error.size else 0.0
        finite = bool(np.isfinite(signal).all() and np.isfinite(actual_power).all())
        if not finite:
            max_abs_error = math.nan
        return cls(
            signal=signal,
            noise=noise,
            actual_power=actual_power,
            dot=dot,
            max_abs_error=max_abs_error,
            count=int(reference.size),
            nonfinite_reference=0 if finite else int(np.sum(~np.isfinite(x))),
            nonfinite_actual=0 if finite else int(np.sum(~np.isfinite(y))),
        )

    def merge(self, other: ErrorTotals) -> ErrorTotals:
        """Totals of both; where the channel counts differ (ragged samples) one channel is kept."""

        def add(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
            total: NDArray[np.float64] = (
                a + b if a.shape == b.shape else np.array([a.sum() + b.sum()])
            )
            return total

        return ErrorTotals(
            signal=add(self.signal, other.signal),
            noise=add(self.noise, other.noise),
            actual_power=add(self.actual_power, other.actual_power),
            dot=add(self.dot, other.dot),
            max_abs_error=float(np.maximum(self.max_abs_error, other.max_abs_error)),
            count=self.count + other.count,
            nonfinite_reference=self.nonfinite_reference + other.nonfinite_reference,
            nonfinite_actual=self.nonfinite_actual + other.nonfinite_actual,
        )

    @property
    def sqnr_db(self) -> float:
        """Pooled SQNR over all channels, dB (see `sqnr_db`)."""
        return decibels(float(self.signal.sum()), float(self.noise.sum()))

    @property
    def channel_sqnr_db(self) -> NDArray[np.float64]:
        """SQNR of each channel, dB, shape (channels,)."""
        signal, noise = self.signal, self.noise
        with np.errstate(divide="ignore", invalid="ignore"):
            found: NDArray[np.float64] = 10.0 * (np.log10(signal) - np.log10(noise))
        found[noise == 0] = np.inf
        found[~(np.isfinite(signal) & np.isfinite(noise))] = np.nan
        return found

    @property
    def cosine_similarity(self) -> float:
        """Cosine over all channels (see `cosine_similarity`)."""
        x, y, xy = (float(v.sum()) for v in (self.signal, self.actual_power, self.dot))
        if not (math.isfinite(x) and math.isfinite(y)):
            return math.nan
        if x == 0 and y == 0:
            return 1.0
        if x == 0 or y == 0:
            return 0.0
        if float(self.noise.sum()) == 0:
            return 1.0
        return max(-1.0, min(1.0, xy / math.sqrt(x) / math.sqrt(y)))

    @property
    def mse(self) -> float:
        """Mean squared error, the tensor's unit squared, lower is better; 0 for an empty array.

        nan where either holds NaN or infinity.
        """
        total = float(self.noise.sum())
        if not math.isfinite(total):
            return math.nan
        return total / self.count if self.count else 0.0

    def unknown(self) -> ErrorTotals:
        """The same with no figure to be had, for values that rest on NaN though none shows."""
        nothing = np.full_like(self.signal, math.nan)
        return replace(
            self, signal=nothing, noise=nothing, actual_power=nothing, dot=nothing,
            max_abs_error=math.nan,
        )  # fmt: skip

    def slice(self, start: int, stop: int) -> ErrorTotals:
        """Totals of channels start..stop-1 (`max_abs_error` and counts stay those of the whole)."""
        return ErrorTotals(
            signal=self.signal[start:stop],
            noise=self.noise[start:stop],
            actual_power=self.actual_power[start:stop],
            dot=self.dot[start:stop],
            max_abs_error=self.max_abs_error,
            count=self.count,
            nonfinite_reference=self.nonfinite_reference,
            nonfinite_actual=self.nonfinite_actual,
        )


def merge_totals(parts: Iterable[ErrorTotals]) -> ErrorTotals:
    """Totals of many parts.

    Raises:
        TypeError: no parts.
    """
    return reduce(ErrorTotals.merge, parts)


def worst_and_median(values: NDArray[np.float64]) -> tuple[float, float, int | None]:
    """The lowest value, the median, and the index of the lowest; NaN counts as lowest.

    (nan, nan, None) for no values. The median lies on a value (the lower of the middle two), so
    that infinities need no arithmetic.
    """
    if values.size == 0:
        return math.nan, math.nan, None
    order = np.argsort(np.where(np.isnan(values), -np.inf, values), kind="stable")
    return float(values[order[0]]), float(values[order[(values.size - 1) // 2]]), int(order[0])
