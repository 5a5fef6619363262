"""How often which real values occur, so that a tensor need not be kept to try ranges on it.

Apart from `stats`, whose histograms draw pictures: here single values that pile up are counted
apart from the bins, which is what makes noise computed from them exact enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.stats import Histogram

_Array = NDArray[np.float64]

BINS = 2048
"""Even bins of a `Distribution` of raw values; a quarter as many at quantiles come on top."""
MAX_ATOMS = 4096
_ATOM_SHARE, _OUTERMOST = 1000, 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """How often which real values occur: bins of uniform density, and single values.

    Single values (atoms) matter: the zeros of a ReLU have no rounding noise, but spread over their
    bin they would have as much as all others.

    Attributes:
        edges: float64, shape (bins + 1,), strictly ascending; the bins may be of any widths.
        counts: float64, shape (bins,), atoms not among them.
        atoms: float64, shape (atoms,).
        atom_counts: float64, shape (atoms,).
        low: smallest finite value; nan for none.
        high: largest finite value; nan for none.
        nonfinite: NaN and infinite elements, which count nowhere else.
    """

    edges: _Array
    counts: _Array
    atoms: _Array
    atom_counts: _Array
    low: float
    high: float
    nonfinite: int = 0

    @classmethod
    def of(
        cls,
        values: NDArray[Any],
        *,
        edges: _Array | None = None,
        atoms: Sequence[float] | None = None,
    ) -> Distribution:
        """The distribution of an array of any shape and real dtype.

        Args:
            values: sorted once where `atoms` are to be found, so not for hundreds of millions.
            edges: bins to use, so that parts merge; what lies outside is counted at the outermost
                edge. By default even bins together with bins at quantiles, so that one outlier
                does not put all others into a single bin.
            atoms: values to count apart, so that parts merge; by default those that make up a
                thousandth each and the 16 outermost at either end, or all where there are few.
        """
        flat = np.asarray(values).astype(np.float64).ravel()
        finite = np.isfinite(flat)
        nonfinite = int(flat.size - np.count_nonzero(finite))
        flat = flat[finite] if nonfinite else flat
        if atoms is None:
            found, times, rest = _find_atoms(np.sort(flat))
        else:
            found, rest = np.unique(np.asarray(atoms, np.float64)), flat
            times = np.zeros(found.size)
            if found.size:
                at = np.minimum(np.searchsorted(found, flat), found.size - 1)
                hit = found[at] == flat
                times += np.bincount(at[hit], minlength=found.size)
                rest = flat[~hit]
        if edges is None:
            edges = _own_edges(rest)
        counts = np.zeros(max(edges.size - 1, 0))
        if rest.size and counts.size:
            counts = np.histogram(np.clip(rest, edges[0], edges[-1]), edges)[0] * 1.0
        return cls(
            edges=edges, counts=counts, atoms=found, atom_counts=times,
            low=float(flat.min()) if flat.size else math.nan,
            high=float(flat.max()) if flat.size else math.nan,
            nonfinite=nonfinite,
        )  # fmt: skip

    @classmethod
    def from_histogram(
        cls,
        histogram: Histogram,
        *,
        atoms: Mapping[float, int] | None = None,
        low: float | None = None,
        high: float | None = None,
    ) -> Distribution:
        """The distribution behind a histogram.

        What lies below or above the bins is taken to lie at the outermost edge.

        Args:
            histogram: of the values.
            atoms: how often single values occur; they are taken out of their bins.
            low: the smallest value where it is known, else the left edge of the first full bin.
            high: the largest one likewise.
        """
        edges = np.asarray(histogram.edges, np.float64)
        counts = np.asarray(histogram.counts, np.float64).copy()
        points: dict[float, float] = {}
        if edges.size > 1:
            flat = np.flatnonzero(np.diff(edges) <= 0)  # a constant tensor: no width, no density
            for where, times in zip(edges[flat].tolist(), counts[flat].tolist(), strict=True):
                points[where] = points.get(where, 0.0) + times
            kept = np.diff(edges) > 0
            counts, edges = counts[kept], np.r_[edges[:1], edges[1:][kept]]
        for value, number in (atoms or {}).items():
            place = int(np.searchsorted(edges, value, side="right")) - 1
            at = min(place, counts.size - 1) if value == edges[-1] else place
            # A bin cannot hold fewer than none: what it lacks was not counted in it.
            taken = min(float(number), float(counts[at])) if 0 <= at < counts.size else 0.0
            if taken:
                counts[at] -= taken
                points[float(value)] = points.get(float(value), 0.0) + taken
        for beyond, end in ((histogram.below, 0), (histogram.above, -1)):
            if beyond:
                points[float(edges[end])] = points.get(float(edges[end]), 0.0) + beyond
        places = np.array(sorted(points), np.float64)
        weights = np.array([points[p] for p in sorted(points)], np.float64)
        full = np.flatnonzero(counts)
        ends = [*places[weights > 0]]
        ends += [float(edges[full[0]]), float(edges[full[-1] + 1])] if full.size else []
        return cls(
            edges=edges, counts=counts, atoms=places, atom_counts=weights,
            low=low if low is not None else min(ends, default=math.nan),
            high=high if high is not None else max(ends, default=math.nan),
            nonfinite=int(histogram.nonfinite),
        )  # fmt: skip

    @classmethod
    def over(cls, low: float, high: float) -> Distribution:
        """An empty one for values that stream: even bins from low to high, zeros and ends apart.

        Parts are merged into it with `with_values`. Its ends count apart because values pile up
        where a Clip cuts them. `low` and `high` of it are nan until values come.

        Raises:
            ValueError: low > high, or a limit that is not finite.
        """
        if not (math.isfinite(low) and math.isfinite(high)) or low > high:
            raise ValueError(f"not a range: low={low}, high={high}")
        edges = np.linspace(low, high, BINS + 1)
        if not (np.diff(edges) > 0).all():  # too narrow for as many, or of no width
            edges = np.array([low, max(high, float(np.nextafter(low, math.inf)))])
        return cls.of(np.empty(0), edges=edges, atoms=(low, 0.0, high))

    def with_values(self, values: NDArray[Any]) -> Distribution:
        """This one and the values of an array together."""
        return self.merge(Distribution.of(values, edges=self.edges, atoms=self.atoms.tolist()))

    def to_json(self) -> dict[str, Any]:
        """As strict JSON values."""
        return {
            "edges": self.edges.tolist(),
            "counts": self.counts.tolist(),
            "atoms": self.atoms.tolist(),
            "atom_counts": self.atom_counts.tolist(),
            "low": self.low if math.isfinite(self.low) else None,
            "high": self.high if math.isfinite(self.high) else None,
            "nonfinite": self.nonfinite,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Distribution:
        """What `to_json` wrote."""
        low, high = (math.nan if values[k] is None else float(values[k]) for k in ("low", "high"))
        return cls(
            edges=np.asarray(values["edges"], np.float64),
            counts=np.asarray(values["counts"], np.float64),
            atoms=np.asarray(values["atoms"], np.float64),
            atom_counts=np.asarray(values["atom_counts"], np.float64),
            low=low,
            high=high,
            nonfinite=int(values["nonfinite"]),
        )

    def merge(self, other: Distribution) -> Distribution:
        """Counts of both.

        Raises:
            ValueError: edges or atoms differ.
        """
        if not (
            np.array_equal(self.edges, other.edges) and np.array_equal(self.atoms, other.atoms)
        ):
            raise ValueError("distributions over different edges or atoms do not merge")
        return replace(
            self,
            counts=self.counts + other.counts,
            atom_counts=self.atom_counts + other.atom_counts,
            low=float(np.fmin(self.low, other.low)),
            high=float(np.fmax(self.high, other.high)),
            nonfinite=self.nonfinite + other.nonfinite,
        )

    @property
    def count(self) -> float:
        """How many finite values there are."""
        return float(self.counts.sum() + self.atom_counts.sum())

    @property
    def signal(self) -> float:
        """Mean square of the finite values, the tensor's unit squared; 0 for none."""
        if not self.count:
            return 0.0
        a, b = self.edges[:-1], self.edges[1:]
        with np.errstate(over="ignore"):
            total = self.counts @ ((a * a + a * b + b * b) / 3) + self.atom_counts @ self.atoms**2
        return float(total) / self.count

    def quantile(self, share: float) -> float:
        """The value that this share of the values, 0..1, does not exceed; nan for no values.

        A value of the tensor where that is an atom, else interpolated within its bin.
        """
        total = self.count
        if not total:
            return math.nan
        # Edges and atoms in one ascending row, with what lies at each and what is reached with it.
        places = np.r_[self.edges, self.atoms]
        at_place = np.r_[np.zeros(self.edges.size), self.atom_counts]
        order = np.argsort(places, kind="stable")
        places, at_place = places[order], at_place[order]
        reached = np.cumsum(at_place)
        if self.counts.size:
            reached += np.interp(places, self.edges, np.r_[0.0, np.cumsum(self.counts)])
        wanted = min(max(share, 0.0), 1.0) * total
        at = int(np.searchsorted(reached, wanted * (1 - 1e-15)))
        at = min(at, places.size - 1)
        before = reached[at] - at_place[at]
        if at == 0 or before < wanted:
            return float(min(max(places[at], self.low), self.high))
        span = before - reached[at - 1]
        share_of = (wanted - reached[at - 1]) / span if span > 0 else 1.0
        found = places[at - 1] + share_of * (places[at] - places[at - 1])
        return float(min(max(found, self.low), self.high))


def distribution_of_detail(detail: Mapping[str, Any]) -> Distribution:
    """The float values behind a tensor's pictures.

    Args:
        detail: one tensor's detail as the workbench writes it. Where it holds a "distribution" (of
            `Distribution.to_json`), that one. Else the 192 bins of its picture, with "float_atoms"
            (pairs of a value and how often it occurs) apart from them: coarse, and without those
            a tensor with many equal values (a ReLU's zeros) looks noisier than it is, by 3 dB in
            one tensor of twenty.
    """
    if detail.get("distribution"):
        return Distribution.from_json(detail["distribution"])
    edges = np.asarray(detail.get("edges") or [], np.float64)
    counts = np.asarray(detail.get("float_counts") or [], np.int64)
    if edges.size != counts.size + 1 or not counts.size:
        edges, counts = np.empty(0), np.empty(0, np.int64)
    histogram = Histogram(
        edges=edges,
        counts=counts,
        below=int(detail.get("float_below") or 0) if edges.size else 0,
        above=int(detail.get("float_above") or 0) if edges.size else 0,
        nonfinite=int(detail.get("nonfinite") or 0),
    )
    atoms = {float(value): int(times) for value, times in detail.get("float_atoms") or ()}
    return Distribution.from_histogram(histogram, atoms=atoms if edges.size else None)


def _find_atoms(ordered: _Array) -> tuple[_Array, _Array, _Array]:
    """Values to count apart and how often they occur, and all others, of sorted values.

    The outermost ones are among them: they lie where grids end, and each may be most of the power.
    """
    if not ordered.size:
        return ordered, ordered, ordered
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    repeats = np.diff(np.r_[starts, ordered.size])
    apart = repeats * _ATOM_SHARE >= ordered.size
    apart[:_OUTERMOST] = apart[-_OUTERMOST:] = True
    if starts.size <= MAX_ATOMS:
        apart[:] = True
    return ordered[starts[apart]], repeats[apart] * 1.0, ordered[~np.repeat(apart, repeats)]


def _own_edges(ordered: _Array) -> _Array:
    """Even edges and those at quantiles; one bin for no values."""
    if not ordered.size:
        return np.array([0.0, 1.0])
    low, high = float(ordered.min()), float(ordered.max())
    even = np.linspace(low, high, BINS + 1)
    at_quantiles = np.quantile(ordered, np.linspace(0, 1, BINS // 4 + 1))
    edges: _Array = np.unique(np.r_[even, at_quantiles])
    edges = edges[(edges >= low) & (edges <= high)]
    return edges if edges.size > 1 else np.array([low, np.nextafter(low, math.inf)])


Values = NDArray[Any] | Histogram | Distribution
"""What can be tried: raw values (exact), a histogram, or a histogram with single values apart."""


def distribution_of(values: Values) -> Distribution:
    """The distribution of values of any of these kinds; itself where it is one."""
    if isinstance(values, Distribution):
        return values
    if isinstance(values, Histogram):
        return Distribution.from_histogram(values)
    return Distribution.of(values)
