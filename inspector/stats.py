"""One array in, its description out; descriptions merge, so that samples stream."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.qparams import FLOAT_CODES, QParams, code_range


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorStats:
    """Range and moments of the finite elements of one tensor.

    Attributes:
        low: smallest finite element; nan for none.
        high: largest finite element; nan for none.
        total: sum of the finite elements.
        total_squares: sum of their squares.
        count: number of elements, finite or not.
        nonfinite: NaN and infinite elements.
    """

    low: float
    high: float
    total: float
    total_squares: float
    count: int
    nonfinite: int

    @classmethod
    def of(cls, array: NDArray[Any]) -> TensorStats:
        """Statistics of one array of any shape and real dtype, in float64."""
        values = array.astype(np.float64).ravel()
        finite = np.isfinite(values)
        nonfinite = int(values.size - np.count_nonzero(finite))
        if nonfinite:
            values = values[finite]
        return cls(
            low=float(values.min()) if values.size else math.nan,
            high=float(values.max()) if values.size else math.nan,
            total=float(values.sum()),
            total_squares=float(values @ values),
            count=int(array.size),
            nonfinite=nonfinite,
        )

    def merge(self, other: TensorStats) -> TensorStats:
        """Statistics of both arrays together."""
        return TensorStats(
            low=float(np.fmin(self.low, other.low)),
            high=float(np.fmax(self.high, other.high)),
            total=self.total + other.total,
            total_squares=self.total_squares + other.total_squares,
            count=self.count + other.count,
            nonfinite=self.nonfinite + other.nonfinite,
        )

    @property
    def mean(self) -> float:
        finite = self.count - self.nonfinite
        return self.total / finite if finite else math.nan

    @property
    def std(self) -> float:
        finite = self.count - self.nonfinite
        if not finite:
            return math.nan
        return math.sqrt(max(0.0, self.total_squares / finite - self.mean**2))


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """Counts between edges, and how many elements lie beyond them.

    Attributes:
        edges: float64, shape (bins + 1,), ascending.
        counts: int64, shape (bins,); the last bin includes its right edge.
        below: finite elements < edges[0].
        above: finite elements > edges[-1].
        nonfinite: NaN and infinite elements.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    below: int = 0
    above: int = 0
    nonfinite: int = 0

    @classmethod
    def of(cls, array: NDArray[Any], edges: NDArray[np.float64]) -> Histogram:
        """Histogram of one array of any shape over the given edges."""
        values = array.astype(np.float64).ravel()
        finite = values[np.isfinite(values)]
        counts, _ = np.histogram(finite, edges)
        return cls(
            edges=edges,
            counts=counts.astype(np.int64),
            below=int(np.count_nonzero(finite < edges[0])),
            above=int(np.count_nonzero(finite > edges[-1])),
            nonfinite=int(values.size - finite.size),
        )

    def merge(self, other: Histogram) -> Histogram:
        """Counts of both.

        Raises:
            ValueError: the edges differ.
        """
        if not np.array_equal(self.edges, other.edges):
            raise ValueError("histograms over different edges do not merge")
        return Histogram(
            edges=self.edges,
            counts=self.counts + other.counts,
            below=self.below + other.below,
            above=self.above + other.above,
            nonfinite=self.nonfinite + other.nonfinite,
        )


def saturated_masks(
    real: NDArray[Any], qparams: QParams
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which elements lie more than half a step below and above the representable range.

    Values merely at the limits are not clipped (ReLU zeros, softmax tails), NaN is neither. The
    step of a float type is the one between its two largest codes. `real` is the tensor before Q,
    rectified where a Relu or Clip was folded into Q. Both have its shape.

    Raises:
        ValueError: the parameters do not fit the array's shape.
    """
    if not real.size:
        none = np.zeros(real.shape, np.bool_)
        return none, none
    view, scale, zero_point = qparams.aligned(real)
    first, last = code_range(qparams.dtype)
    half = FLOAT_CODES[qparams.dtype][1] / 2 if qparams.dtype in FLOAT_CODES else 0.5
    ends = (first - zero_point - half) * scale, (last - zero_point + half) * scale
    # A negative scale turns the two round; of NaN, neither comparison is true.
    low, high = np.minimum(*ends), np.maximum(*ends)
    return (view < low).reshape(real.shape), (view > high).reshape(real.shape)


def saturated_counts(real: NDArray[Any], qparams: QParams) -> tuple[int, int]:
    """How many elements are clipped at the low and at the high end (see `saturated_masks`).

    (0, 0) for an empty array.

    Raises:
        ValueError: the parameters do not fit the array's shape.
    """
    low, high = saturated_masks(real, qparams)
    return int(np.count_nonzero(low)), int(np.count_nonzero(high))


def saturated_fraction(real: NDArray[Any], qparams: QParams) -> tuple[float, float]:
    """Share of values clipped at the low and at the high end, 0..1 each (see `saturated_counts`).

    (0.0, 0.0) for an empty array.
    """
    low, high = saturated_counts(real, qparams)
    return (low / real.size, high / real.size) if real.size else (0.0, 0.0)
