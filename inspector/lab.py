"""What a tensor's values would lose under another range, bit width or scheme of quantization.

Nothing is run and no model is read: values or their distribution in, decibels out, fast enough to
follow a slider.

Every scheme ends in one grid of evenly spaced levels, so the noise over a bin of a histogram has
a closed form. A bin [a, b] of uniform density, in steps of the grid, adds the integral of
``(v - Q(v))^2``, whose antiderivative is ``n/12 + r^3/3`` with n the level of v and r its distance
to it; beyond the last level n stays and r grows, which is clipping. The cost is per bin edge,
whatever the number of levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from inspector.distribution import Distribution, Values, distribution_of
from inspector.grid_schemes import SCHEMES, GridScheme, dequantized, scheme_parameters
from inspector.metrics import decibels

_Array = NDArray[np.float64]

MAX_LEVELS = 65_536
_CHUNK = 30_000  # edges times ranges at once: what stays in a core's cache


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What a scheme makes of a tensor's values with one range.

    Noise is the mean square of (dequantized - value) over all finite values, in the tensor's unit
    squared, and ``rounding_noise + clipping_noise`` is all of it.

    Attributes:
        scheme: the scheme, with the bit width that was tried.
        low: the range that was asked for.
        high: its upper end.
        scale: the step between two levels.
        zero_point: the code of 0.0; not whole for MXNet's uint8.
        quant_type: the ONNX type that, with `scale` and `zero_point`, is this grid; "" for none.
        level_low: the lowest level.
        level_high: the highest level.
        clip_low: values below it are clipped: half a step below the lowest level (a whole one where
            values are truncated), as in `stats.saturated_fraction`.
        clip_high: values above it are clipped.
        level_count: how many levels there are.
        levels: the real values of the levels in view, float64, ascending; empty where none is.
        count: finite values.
        nonfinite: NaN and infinite ones, left out of every figure.
        signal: mean square of the values.
        sqnr_db: signal to all noise, dB; inf where nothing is lost.
        clipped_low_fraction: share of the values below `clip_low`, 0..1.
        clipped_high_fraction: share above `clip_high`.
        rounding_noise: noise of the values that are not clipped.
        clipping_noise: noise of those that are.
        predicted_noise: what rounding gives where values spread evenly over each step: step²/12,
            step²/3 where values are truncated.
        predicted_sqnr_db: signal to predicted noise, dB.
    """

    scheme: GridScheme
    low: float
    high: float
    scale: float
    zero_point: float
    quant_type: str
    level_low: float
    level_high: float
    clip_low: float
    clip_high: float
    level_count: int
    levels: _Array = field(repr=False)
    count: int
    nonfinite: int
    signal: float
    sqnr_db: float
    clipped_low_fraction: float
    clipped_high_fraction: float
    rounding_noise: float
    clipping_noise: float
    predicted_noise: float
    predicted_sqnr_db: float

    @property
    def clipped_fraction(self) -> float:
        """Share of the values that are clipped, 0..1."""
        return self.clipped_low_fraction + self.clipped_high_fraction

    @property
    def noise(self) -> float:
        """All of the noise, mean square."""
        return self.rounding_noise + self.clipping_noise


def trial(
    values: Values,
    scheme: GridScheme,
    low: float,
    high: float,
    *,
    view: tuple[float, float] | None = None,
) -> Trial:
    """What a scheme makes of values with the range low..high.

    Raw values are quantized one by one, in float64. Bins of a histogram are integrated with
    uniform density, also across the steps and ends of the grid within them.

    Args:
        values: of any shape and real dtype, or their distribution; may be empty.
        scheme: how to quantize.
        low: lower end of the range; formulas that need 0 in it widen it.
        high: upper end.
        view: the real values between which levels are listed; all where None and at most 256,
            else those from the smallest to the largest value.

    Raises:
        ValueError: low > high, or a limit that is not finite.
    """
    scale, zero_point = scheme.parameters(low, high)
    grid = _Grid.of(scheme, np.array([scale]), np.array([zero_point]))
    if isinstance(values, np.ndarray):
        flat = values.astype(np.float64).ravel()
        finite = flat[np.isfinite(flat)]
        nonfinite = flat.size - finite.size
        with np.errstate(over="ignore"):
            count, signal = float(finite.size), float(finite @ finite) / max(finite.size, 1)
        ends = (float(finite.min()), float(finite.max())) if finite.size else (math.nan, math.nan)
        found = _point_noise(grid, finite, np.ones(1))
    else:
        known = distribution_of(values)
        nonfinite, count, signal = known.nonfinite, known.count, known.signal
        ends = known.low, known.high
        found = _noise(grid, known)
    rounding, clipping, below, above = (float(part[0]) / max(count, 1.0) for part in found)
    square = scale * scale  # infinite where ** would raise
    rounding, clipping = rounding * square, clipping * square
    predicted = square / (3 if scheme.rounding == "truncating" else 12)
    first, last = scheme.codes
    shift = zero_point - (0.5 if scheme.rounding == "mid-rise" else 0.0)
    room = 1.0 if scheme.rounding == "truncating" else 0.5
    if view is None and last - first >= 256:
        view = ends
    return Trial(
        scheme=scheme,
        low=float(low),
        high=float(high),
        scale=scale,
        zero_point=zero_point,
        quant_type=scheme.quant_type,
        level_low=(first - shift) * scale,
        level_high=(last - shift) * scale,
        clip_low=(first - shift - room) * scale,
        clip_high=(last - shift + room) * scale,
        level_count=last - first + 1,
        levels=_levels(scale, shift, (first, last), view),
        count=round(count),
        nonfinite=int(nonfinite),
        signal=signal,
        sqnr_db=decibels(signal, rounding + clipping),
        clipped_low_fraction=min(below, 1.0),
        clipped_high_fraction=min(above, 1.0),
        rounding_noise=rounding,
        clipping_noise=clipping,
        predicted_noise=predicted,
        predicted_sqnr_db=decibels(signal, predicted),
    )


def _levels(
    scale: float, shift: float, codes: tuple[int, int], view: tuple[float, float] | None
) -> _Array:
    """The levels in view, ascending."""
    first, last = codes
    if view is not None:
        if not (math.isfinite(view[0]) and math.isfinite(view[1])):
            return np.empty(0)
        # Before they are made whole: a view may lie millions of steps away.
        first = max(first, math.ceil(max(view[0] / scale + shift - 1e-9, first)))
        last = min(last, math.floor(min(view[1] / scale + shift + 1e-9, last)))
    levels: _Array = (np.arange(first, last + 1, dtype=np.float64) - shift) * scale
    return levels[:MAX_LEVELS]


# --- noise, in steps -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Grid:
    """Many grids of one scheme, arrays of shape (grids, 1).

    `zero` holds the half step of a mid-rise grid, so that level q lies at ``(q - zero) * scale``.
    """

    scale: _Array
    zero: _Array
    first: int
    last: int
    truncating: bool
    scheme: GridScheme

    @classmethod
    def of(cls, scheme: GridScheme, scale: _Array, zero_point: _Array) -> _Grid:
        first, last = scheme.codes
        return cls(
            scale=scale.reshape(-1, 1),
            zero=zero_point.reshape(-1, 1) - (0.5 if scheme.rounding == "mid-rise" else 0.0),
            first=first,
            last=last,
            truncating=scheme.rounding == "truncating",
            scheme=scheme,
        )


_Parts = tuple[_Array, _Array, _Array, _Array]


def _noise(grid: _Grid, values: Distribution) -> _Parts:
    """Sums per grid: rounding and clipping noise in steps², how many lie below and above."""
    total = _point_noise(grid, values.atoms, values.atom_counts)
    full = values.counts > 0
    if not full.any():
        return total
    # Edges of empty bins add nothing; only runs of them can go, for bins share their edges.
    needed = np.r_[full, False] | np.r_[False, full]
    edges, counts = values.edges[needed], np.where(full, values.counts, 0.0)
    starts = np.flatnonzero(needed)[:-1]
    counts = np.where(np.diff(np.flatnonzero(needed)) == 1, counts[starts], 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        density = counts / np.diff(edges) * grid.scale
        steps = edges / grid.scale
        parts = _truncated(grid, steps) if grid.truncating else _rounded(grid, steps)
        bins = tuple(np.einsum("gb,gb->g", density, part) for part in parts)
    return (total[0] + bins[0], total[1] + bins[1], total[2] + bins[2], total[3] + bins[3])


def _rounded(grid: _Grid, steps: _Array) -> _Parts:
    """Integrals over each bin, in steps: rounding, clipping, length below and length above."""
    v = steps + grid.zero
    low, high = grid.first - 0.5, grid.last + 0.5
    inside = np.clip(v, low, high)
    level = np.clip(np.rint(inside), grid.first, grid.last)
    rest = inside - level
    rounding = np.diff(level) / 12 + np.diff(rest * rest * rest) / 3
    over, under = np.maximum(v, high), np.minimum(v, low)
    clipping = _cubes(over - grid.last) + _cubes(under - grid.first)
    return rounding, clipping, np.diff(under), np.diff(over)


def _truncated(grid: _Grid, steps: _Array) -> _Parts:
    """The same where values go towards 0: each side of 0 apart, as distances from it."""
    parts = []
    for side, most in ((-1.0, grid.zero - grid.first), (1.0, grid.last - grid.zero)):
        t = np.maximum(side * steps, 0.0)
        inside = np.minimum(t, most + 1)
        level = np.minimum(np.floor(inside), most)
        rest = inside - level
        rounding = side * (np.diff(level) + np.diff(rest * rest * rest)) / 3
        over = np.maximum(t, most + 1)
        parts.append((rounding, side * _cubes(over - most), side * np.diff(over)))
    low, high = parts
    return low[0] + high[0], low[1] + high[1], low[2], high[2]


def _cubes(distance: _Array) -> _Array:
    """The integral of distance² between neighbours, without the cancellation of cubes."""
    a, b = distance[:, :-1], distance[:, 1:]
    found: _Array = (b - a) * (a * a + a * b + b * b) / 3
    return found


def _point_noise(grid: _Grid, values: _Array, counts: _Array) -> _Parts:
    """Sums over single values, as `_noise`; values are quantized as they would be."""
    if not values.size:
        none = np.zeros(grid.scale.shape[0])
        return none, none.copy(), none.copy(), none.copy()
    room = 1.0 if grid.truncating else 0.5
    found = []
    for scale, zero in zip(grid.scale[:, 0], grid.zero[:, 0], strict=True):
        half = 0.5 if grid.scheme.rounding == "mid-rise" else 0.0
        real = dequantized(values, grid.scheme, scale, zero + half)
        with np.errstate(over="ignore"):
            squares = ((values - real) / scale) ** 2 * counts
        below = values < (grid.first - zero - room) * scale
        above = values > (grid.last - zero + room) * scale
        clipped = below | above
        weights = np.broadcast_to(counts, values.shape)
        found.append(
            (
                squares[~clipped].sum(), squares[clipped].sum(),
                weights[below].sum(), weights[above].sum(),
            )
        )  # fmt: skip
    sums = np.array(found, np.float64)
    return sums[:, 0], sums[:, 1], sums[:, 2], sums[:, 3]


def candidate_noise(
    values: Distribution, scheme: GridScheme, candidates: tuple[_Array, _Array]
) -> _Array:
    """The noise (mean square) of many ranges at once, float64, shape (ranges,)."""
    scale, zero_point = scheme_parameters(scheme, *candidates)
    size = max(1, _CHUNK // max(values.edges.size, 1))
    found = []
    for start in range(0, scale.size, size):
        grid = _Grid.of(scheme, scale[start : start + size], zero_point[start : start + size])
        rounding, clipping, _, _ = _noise(grid, values)
        with np.errstate(over="ignore", invalid="ignore"):
            found.append((rounding + clipping) * grid.scale[:, 0] ** 2)
    return np.concatenate(found) / max(values.count, 1.0)


# --- all schemes -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class SchemeRow:
    """One scheme beside the others.

    Attributes:
        scheme: which one.
        published: what its formula gives.
        correct: what the formula that was meant gives; None where the published one is right.
    """

    scheme: GridScheme
    published: Trial
    correct: Trial | None = None


def compare_schemes(
    values: Values,
    low: float,
    high: float,
    *,
    bits: int | None = None,
    names: Sequence[str] | None = None,
) -> tuple[SchemeRow, ...]:
    """What every scheme makes of values with one range, in the order of `SCHEMES`.

    Args:
        values: see `trial`.
        low: lower end of the range.
        high: upper end.
        bits: the width for all of them; their own where None.
        names: which ones; all where None.

    Raises:
        ValueError: low > high, a limit that is not finite, or a width outside 2 to 16.
        KeyError: an unknown name.
    """
    known = values if isinstance(values, np.ndarray) else distribution_of(values)
    rows = []
    seen = set()
    for name in SCHEMES if names is None else names:
        scheme = SCHEMES[name] if bits is None else SCHEMES[name].with_bits(bits)
        if (scheme.title, scheme.rule) in seen:
            continue  # two widths of one formula, made the same by `bits`
        seen.add((scheme.title, scheme.rule))
        correct = None
        if scheme.corrected:
            meant = SCHEMES[scheme.corrected].with_bits(scheme.bits)
            correct = trial(known, meant, low, high)
        rows.append(
            SchemeRow(scheme=scheme, published=trial(known, scheme, low, high), correct=correct)
        )
    return tuple(rows)
