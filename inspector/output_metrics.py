"""What the outputs of two models are worth beside each other, as sums that add up over samples.

Sums of samples add up, so that a figure over some samples, over all, or over a resampling of them
takes no second run. Nothing but outputs is looked at: labels and expected values come with the
feeds, and everything else is measured against the float model. Apart from `task_metrics`, where
texts name them.

NaN and infinity are never left out: sums that hold them make a figure of nan, and where choices are
counted (classes, boxes, neighbours) what holds NaN is never right.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from inspector import detections
from inspector.errors import FeedError
from inspector.metrics import cosine_similarity, decibels, powers
from inspector.watches import vectors

Outputs = Mapping[str, NDArray[Any]]
Floats = NDArray[np.float64]
# Cuts an output into what counts of it, e.g. without padding.
Parts = Callable[[str, NDArray[Any]], Sequence[NDArray[Any]]]

# Neighbours that are looked at, at most half of all others.
NEIGHBOURS = 5
# A probability below this counts as this: a quantized one is easily 0.
LEAST_PROBABILITY = 1e-7


def whole(_output: str, values: NDArray[Any]) -> Sequence[NDArray[Any]]:
    """All of an output."""
    return [values]


class TaskMetric(Protocol):
    """One figure of a pair of models; can be pickled."""

    @property
    def text(self) -> str:
        """As it is written on the command line."""
        ...

    @property
    def outputs(self) -> tuple[str, ...]:
        """The float model's outputs that it looks at."""
        ...

    @property
    def unit(self) -> str:
        """Of the figure: "dB", "nats" or "" for none; shares are 0..1."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Which direction is good."""
        ...

    def sums(
        self, sample: int, reference: Outputs, actual: Outputs, parts: Parts = whole
    ) -> Floats:
        """What one sample adds, float64, always of the same length.

        Args:
            sample: its index among the feeds.
            reference: the float model's outputs.
            actual: the other model's.
            parts: what of an output counts.

        Raises:
            FeedError: the outputs do not suit this metric.
        """
        ...

    def figure(self, sums: Floats) -> float:
        """The figure of the summed samples; nan where none counts."""
        ...


def _pairs(
    output: str, reference: Outputs, actual: Outputs, parts: Parts
) -> Iterable[tuple[NDArray[Any], NDArray[Any]]]:
    """What counts of one output in both models."""
    return zip(parts(output, reference[output]), parts(output, actual[output]), strict=True)


def _mean(sums: Floats) -> float:
    """The first of two sums over the second; nan where that is 0."""
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def _unfit(text: str, output: str, values: NDArray[Any], wanted: str, hint: str) -> FeedError:
    return FeedError(
        f"{text}: output {output} has shape {list(values.shape)}, expected {wanted}", hint=hint
    )


# -- SQNR --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputSqnr:
    """SQNR in dB of outputs, pooled over samples; the worst of several outputs.

    Attributes:
        text, outputs: see `TaskMetric`.
    """

    text: str
    outputs: tuple[str, ...]
    unit: str = "dB"
    higher_is_better: bool = True

    def sums(
        self, sample: int, reference: Outputs, actual: Outputs, parts: Parts = whole
    ) -> Floats:
        """Signal and noise of each output."""
        found = []
        for name in self.outputs:
            pairs = _pairs(name, reference, actual, parts)
            found.append(sum((powers(a, b) for a, b in pairs), np.zeros(2)))
        return np.concatenate(found)

    def figure(self, sums: Floats) -> float:
        """Lowest SQNR of the outputs in dB; nan where one holds NaN or infinity."""
        each = [decibels(signal, noise) for signal, noise in sums.reshape(-1, 2)]
        return math.nan if any(math.isnan(v) for v in each) else min(each)


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """``[…]`` behind an output: one entry cuts its channel axis, several its axes from the front.

    The channel axis is axis 1, of an output with one axis that. Axes stay where they are: an index
    cuts a slice of length 1.

    Attributes:
        text: with brackets.
        entries: slices, and Ellipsis at most once.
    """

    text: str
    entries: tuple[slice | EllipsisType, ...]

    def of(self, output: str, values: NDArray[Any]) -> NDArray[Any]:
        """What is selected; never nothing.

        Raises:
            FeedError: more entries than axes, or nothing is left.
        """
        entries = self.entries
        if len(entries) == 1 and entries[0] is not Ellipsis and values.ndim > 1:
            entries = (slice(None), *entries)
        axes = len([e for e in entries if e is not Ellipsis])
        found = values[entries] if axes <= values.ndim else values[:0]
        if axes > values.ndim or (values.size and not found.size):
            raise FeedError(
                f"{output}{self.text} selects nothing of shape {list(values.shape)}",
                hint="Name channels that exist, e.g. [0:4], or one slice per axis, e.g. [:, 0:4].",
            )
        return found


SIGNS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne,
    ">": operator.gt, "<": operator.lt,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """``{…}`` behind an output: positions where the float model's values satisfy a comparison.

    Attributes:
        output: whose values are compared.
        selection: what of it; None for all.
        sign: of the comparison, as Python writes it.
        number: what values are compared with.
    """

    output: str
    selection: Selection | None
    sign: str
    number: float

    def holds(self, values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """Where it holds, in another array's shape.

        Axes of length 1 are repeated. Along one axis the lengths may differ: a position then counts
        where the comparison holds anywhere along it.

        Raises:
            FeedError: the shapes do not suit each other.
        """
        if self.selection is not None:
            values = self.selection.of(self.output, values)
        with np.errstate(invalid="ignore"):
            found = np.asarray(SIGNS[self.sign](values, self.number))
        if found.ndim == len(shape):
            pairs = enumerate(zip(found.shape, shape, strict=True))
            differ = [axis for axis, (a, b) in pairs if a not in (1, b)]
            if len(differ) < 2:
                if differ:
                    found = np.asarray(found.any(axis=differ[0], keepdims=True))
                return np.broadcast_to(found, shape)
        raise FeedError(
            f"the condition on {self.output} has shape {list(found.shape)}, what it chooses from "
            f"has {list(shape)}",
            hint="Compare an output whose shape differs along one axis at most.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectedSqnr:
    """SQNR in dB of a part of one output, pooled over samples.

    Attributes:
        text, outputs: see `TaskMetric`; the output itself comes first.
        selection: what of it; None for all.
        condition: which positions of that; None for all.
    """

    text: str
    outputs: tuple[str, ...]
    selection: Selection | None
    condition: Condition | None
    unit: str = "dB"
    higher_is_better: bool = True

    def sums(
        self, sample: int, reference: Outputs, actual: Outputs, parts: Parts = whole
    ) -> Floats:
        """Signal, noise and how many elements; NaN where the condition is on NaN."""
        name = self.outputs[0]
        pairs = list(_pairs(name, reference, actual, parts))
        told: Sequence[NDArray[Any] | None] = [None] * len(pairs)
        if self.condition is not None:
            told = parts(self.condition.output, reference[self.condition.output])
        total = np.zeros(3)
        for (a, b), compared in zip(pairs, told, strict=True):
            if self.selection is not None:
                a, b = self.selection.of(name, a), self.selection.of(name, b)
            if self.condition is not None and compared is not None:
                chosen = self.condition.holds(compared, a.shape)
                a, b = a[chosen], b[chosen]
                if np.isnan(compared).any():
                    total += math.nan
            total += (*powers(a, b), a.size)
        return total

    def figure(self, sums: Floats) -> float:
        """SQNR in dB; nan where nothing is selected or it holds NaN or infinity."""
        return decibels(float(sums[0]), float(sums[1])) if sums[2] else math.nan


# -- classes -----------------------------------------------------------------------------------


def _vectors(
    text: str, outputs: Sequence[str], reference: Outputs, rows: int, classes: int = 2
) -> tuple[str, NDArray[Any]]:
    """The first output that holds one vector of so many classes per row, and its vectors.

    Raises:
        FeedError: there is none.
    """
    for name in outputs:
        found = vectors(reference[name], rows)
        if found is not None and found.shape[1] >= classes:
            return name, found
    shapes = ", ".join(f"{name} {list(reference[name].shape)}" for name in outputs)
    raise FeedError(
        f"{text}: no output holds {classes} or more classes for each of {rows} row(s): {shapes}",
        hint="Use argmax where an output holds classes at many positions, and check the labels.",
    )


def _hits(values: NDArray[Any], labels: NDArray[np.int64], best: int) -> int:
    """Rows whose label is among the `best` largest values; of equal ones the first count.

    A row with NaN is no hit.
    """
    own = np.take_along_axis(values, labels[:, None], axis=1)
    places = np.arange(values.shape[1])[None, :]
    with np.errstate(invalid="ignore"):
        ahead = (values > own) | ((values == own) & (places < labels[:, None]))
    rank = np.count_nonzero(ahead, axis=1)
    return int(np.count_nonzero((rank < best) & ~np.isnan(values).any(axis=1)))


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelAccuracy:
    """Share of rows whose label is among the largest values, or how far it falls.

    Attributes:
        text, outputs: see `TaskMetric`; the first output with as many classes is judged.
        best: how many of the largest.
        drop: the float model's share minus the other's.
        labels: of each sample's rows.
    """

    text: str
    outputs: tuple[str, ...]
    best: int
    drop: bool
    labels: tuple[tuple[int, ...], ...]
    unit: str = ""

    @property
    def higher_is_better(self) -> bool:
        """A share is, a drop is not."""
        return not self.drop

    def sums(
        self, sample: int, reference: Outputs, actual: Outputs, parts: Parts = whole
    ) -> Floats:
        """Hits of the float model, of the other, and how many rows."""
        labels = np.array(self.labels[sample], np.int64)
        most = max(max(each) for each in self.labels)
        least = max(most + 1, self.best + 1)
        name, values = _vectors(self.text, self.outputs, reference, len(labels), least)
        other = actual[name].reshape(values.shape)
        return np.array(
            [*(_hits(v, labels, self.best) for v in (values, other)), len(labels)], np.float64
        )

    def figure(self, sums: Floats) -> float:
        """A share 0..1, or the difference of two."""
        right_float, right, rows = sums
        if not rows:
            return math.nan
        return float((right_float - right if self.drop else right) / rows)


def _same(a: NDArray[Any], b: NDArray[Any], axis: int) -> tuple[int, int]:
    """At how many positions the largest value along an axis is at the same place, and of how many.

    One of two with NaN is at no place.
    """
    same = a.argmax(axis=axis) == b.argmax(axis=axis)
    known = ~(np.isnan(a).any(axis=axis) | np.isnan(b).any(axis=axis))
    return int(np.count_nonzero(same & known)), same.size


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Share of rows in which both models choose the same class.

    Attributes:
        text, outputs: see `TaskMetric`; the first output with classes is judged.
        rows: of each sample; () for one each.
    """

    text: str
    outputs: tuple[str, ...]
    rows: tuple[int, ...] = ()
    unit: str = ""
    higher_is_better: bool = True

    def sums(
        self, sample: int, reference: Outputs, actual: Outputs, parts: Parts = whole
    ) -> Floats:
        """Equal choices and rows."""
        rows = self.rows[sample] if self.rows else 1
        name, values = _vectors(self.text, self.outputs, reference, rows)
        return np.array(_same(values, actual[name].reshape(values.shape), 1), np.float64)

    def figure(self, sums: Floats) -> float:
        """A share 0..1."""
        return _mean(sums)


def _axis(text: str, output: str, values: NDArray[Any], axis: int) -> int:
    """The axis of the classes, >= 0.

    Raises:
        FeedError: there is no such axis.
    """
    if not -values.ndim <= axis < values.ndim:
        hint = "Name the axis that the classes lie along with @axis=N."
        raise _unfit(text, output, values, f"an axis {axis}", hint)
    return axis % values.ndim


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionAgreement:
    """Share of positions at which both models choose the same class.

    Attributes:
        text, outputs: see `TaskMetric`.
        axis: of the classes.
    """

    text: str
    outputs: tuple[str, ...]
    axis: int = -1
    unit: str = ""
    higher_is_better: bool = True

    def sums(
        self, sample: int, reference: Outputs, actual: Outputs, parts: Parts = whole
    ) -> Floats:
        """Equal choices and positions."""
        (name,) = self.outputs
        total = np.zeros(2)
        for a, b in _pairs(name, reference, actual, parts):
            axis = _axis(self.text, name, a, self.axis)
            total += _same(a, b, axis) if a.size else 0
        return total

    def figure(self, sums: Floats) -> float:
        """A share 0..1."""
        return _mean(sums)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanIou:
    """Intersection over union of every class, pooled over samples, on average over the classes.

    The float model's choices are the truth. Classes that neither model ever chooses do not count.
    Positions at which one of the two holds NaN make a class of their own, without intersection.

    Attributes:
        text, outputs: see `TaskMetric`.
        axis: of the classes.
        threshold: for one channel: the class is whether it is above; None for the largest channel.
    """

    text: str
    outputs: tuple[str, ...]
    axis: int = 1
    threshold: float | None = None
    unit: str = ""
    higher_is_better: bool = True

    def sums(
        self, sample: int, reference: Outputs, actual: Outputs, parts: Parts = whole
    ) -> Floats:
        """Positions in the intersections of all classes, then in their unions."""
        (name,) = self.outputs
        shared, either = [], []
        for a, b in _pairs(name, reference, actual, parts):
            axis = _axis(self.text, name, a, self.axis)
            classes = a.shape[axis]
            if (classes < 2) == (self.threshold is None):
                hint = "Use @threshold=T for one channel and nothing for several, or name @axis=N."
                wanted = "one channel" if classes > 1 else "several classes"
                raise _unfit(self.text, name, a, f"{wanted} on axis {axis}", hint)
            classes = max(classes, 2)
            chosen = [self._classes(v, axis) for v in (a, b)]
            unknown = np.isnan(a).any(axis=axis) | np.isnan(b).any(axis=axis)
            ours, others, same = (
                np.bincount(v.ravel(), minlength=classes)
                for v in (
                    chosen[0][~unknown],
                    chosen[1][~unknown],
                    chosen[0][~unknown & (chosen[0] == chosen[1])],
                )
            )
            shared.append([*same, 0])
            either.append([*(ours + others - same), np.count_nonzero(unknown)])
        return np.concatenate([np.sum(v, axis=0) for v in (shared, either)]).astype(np.float64)

    def _classes(self, values: NDArray[Any], axis: int) -> NDArray[np.int64]:
        if self.threshold is None:
            return np.asarray(values.argmax(axis=axis), np.int64)
        with np.errstate(invalid="ignore"):
            return np.asarray(np.take(values, 0, axis=axis) > self.threshold, np.int64)

    def figure(self, sums: Floats) -> float:
        """Mean of the classes' shares, 0..1."""
        shared, either = sums.reshape(2, -1)
        known = either > 0
        return float(np.mean(shared[known] / either[known])) if known.any() else math.nan


# -- boxes -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionF1:
    """F1 of the boxes of both models: the same class at the same place.

    Boxes are read by `detections.decode` and paired by `detections.matches`; F1 is twice the pairs
    over all boxes of both models.

    Attributes:
        text, outputs: see `TaskMetric`.
        preset: how boxes are written; "" to recognise it from the first sample's shapes.
        score: lowest of a detection; None for the preset's own.
        iou: from which two boxes are one.
        suppression: see `detections.decode`.
        classes: see `detections.decode`.
    """

    text: str
    outputs: tuple[str, ...]
    preset: str = ""
    score: float | None = None
    iou: float = detections.MATCHED_IOU
    suppression: float = detections.SUPPRESSED_IOU
    classes: int | None = None
    unit: str = ""
    higher_is_better: bool = True

    def sums(
        self, sample: int, reference: Outputs, actual: Outputs, parts: Parts = whole
    ) -> Floats:
        """Pairs, boxes of the float model, and boxes of the other."""
        preset, names = self.preset, self.outputs
        if not preset:
            preset, names = detections.recognise({name: reference[name] for name in names})
        detections.check(preset, {name: reference[name] for name in names})
        ours, others = (
            detections.decode(
                preset,
                [side[name] for name in names],
                score=self.score,
                iou=self.suppression,
                classes=self.classes,
            )
            for side in (reference, actual)
        )
        total = np.zeros(3)
        for a, b in zip(ours, others, strict=True):
            total += (detections.matches(a, b, self.iou), len(a), len(b))
        return total

    def figure(self, sums: Floats) -> float:
        """0..1; nan where neither model finds anything."""
        pairs, ours, others = sums
        return float(2 * pairs / (ours + others)) if ours + others else math.nan


# -- embeddings --------------------------------------------------------------------------------

POOLINGS = ("none", "mean", "cls")


def _embeddings(
    text: str, output: str, parts: Sequence[NDArray[Any]], rows: int, pooling: str
) -> list[Floats]:
    """One vector per row of a sample; float64.

    Raises:
        FeedError: there are no positions to pool over.
    """
    found: list[Floats] = []
    for part in parts:
        values = np.asarray(part, np.float64)
        if pooling != "none":
            if values.ndim != 3 or not values.shape[1]:
                hint = "Leave @mean and @cls out where an output holds one vector per row."
                raise _unfit(text, output, part, "(rows, positions, width)", hint)
            values = values.mean(axis=1) if pooling == "mean" else values[:, 0]
        if values.ndim > 1 and values.shape[0] * len(parts) == rows:
            found += list(values.reshape(values.shape[0], -1))
        else:
            found.append(values.ravel())
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanCosine:
    """Cosine of both models' vectors, on average over rows.

    Attributes:
        text, outputs: see `TaskMetric`.
        pooling: of `POOLINGS`: over the positions of each row (without padding), or its first one.
        rows: of each sample; () for one each.
    """

    text: str
    outputs: tuple[str, ...]
    pooling: str = "none"
    rows: tuple[int, ...] = ()
    unit: str = ""
    higher_is_better: bool = True

    def sums(
        self, sample: int, reference: Outputs, actual: Outputs, parts: Parts = whole
    ) -> Floats:
        """Cosines and rows."""
        (name,) = self.outputs
        rows = self.rows[sample] if self.rows else 1
        sides = (
            _embeddings(self.text, name, parts(name, side[name]), rows, self.pooling)
            for side in (reference, actual)
        )
        each = [cosine_similarity(a, b) for a, b in zip(*sides, strict=True)]
        return np.array([sum(each), len(each)], np.float64)

    def figure(self, sums: Floats) -> float:
        """-1..1 (see `metrics.cosine_similarity`)."""
        return _mean(sums)


def _directions(vectors: Sequence[Floats]) -> Floats:
    """The vectors with length 1; of a vector that is all zero it stays 0."""
    stacked = np.stack(vectors)
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.abs(stacked).max(axis=1, keepdims=True, initial=0.0)
        scaled = stacked / np.where(largest > 0, largest, 1.0)
        lengths = np.linalg.norm(scaled, axis=1, keepdims=True)
        return np.asarray(scaled / np.where(lengths > 0, lengths, 1.0), np.float64)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NeighbourOverlap:
    """Share of each row's nearest neighbours that stay, by cosine, on average over rows.

    The neighbours of a row are looked for among the float model's vectors of all other rows of all
    samples: with its own float vector, and with the other model's. `prepared` gives it these.

    Attributes:
        text, outputs: see `TaskMetric`.
        pooling, rows: see `MeanCosine`.
        neighbours: how many; 0 for 5, or half of the others where there are fewer than 10.
        gallery: the float model's vectors, scaled to length 1, of all rows; set by `prepared`.
        starts: of each sample, its first row in the gallery.
    """

    text: str
    outputs: tuple[str, ...]
    pooling: str = "none"
    rows: tuple[int, ...] = ()
    neighbours: int = 0
    gallery: Floats | None = None
    starts: tuple[int, ...] = ()
    unit: str = ""
    higher_is_better: bool = True

    def prepare(self, references: Iterable[tuple[Outputs, Parts]]) -> NeighbourOverlap:
        """The metric with the gallery of all samples.

        Raises:
            FeedError: vectors of unequal length, or too few of them.
        """
        found: list[Floats] = []
        starts = []
        for sample, (reference, parts) in enumerate(references):
            starts.append(len(found))
            found += self._vectors(sample, reference, parts)
        if len({v.size for v in found}) > 1:
            raise FeedError(
                f"{self.text}: samples give vectors of unequal length",
                hint="Pool over the positions: add @mean or @cls.",
            )
        # With one neighbour less than there are others, all but one are kept by chance.
        if len(found) - 1 <= max(self.neighbours, 1):
            raise FeedError(
                f"{self.text}: {len(found)} rows are too few to have "
                f"{self.neighbours or NEIGHBOURS} nearest neighbours among the others",
                hint="Give more samples, or ask for fewer neighbours with @k=N.",
            )
        count = self.neighbours or min(NEIGHBOURS, max(1, (len(found) - 1) // 2))
        return replace(self, gallery=_directions(found), starts=tuple(starts), neighbours=count)

    def _vectors(self, sample: int, outputs: Outputs, parts: Parts) -> list[Floats]:
        (name,) = self.outputs
        rows = self.rows[sample] if self.rows else 1
        return _embeddings(self.text, name, parts(name, outputs[name]), rows, self.pooling)

    def _nearest(self, vector: Floats, own: int) -> frozenset[int]:
        """Rows of the gallery that are nearest to a vector; of equal ones the first."""
        assert self.gallery is not None
        with np.errstate(invalid="ignore"):
            alike = self.gallery @ vector
        alike[own] = -np.inf
        # Rounding must not order what is equal; NaN comes last and is nobody's neighbour.
        order = np.argsort(-np.round(alike, 12), kind="stable")[: self.neighbours]
        return frozenset(int(at) for at in order if np.isfinite(alike[at]))

    def sums(
        self, sample: int, reference: Outputs, actual: Outputs, parts: Parts = whole
    ) -> Floats:
        """Shares that stay, and rows."""
        if self.gallery is None:
            raise FeedError(
                f"{self.text} has not seen the float model's outputs of all samples",
                hint="Use cosine, which needs one sample at a time.",
            )
        total = np.zeros(2)
        for at, vector in enumerate(_directions(self._vectors(sample, actual, parts))):
            own = self.starts[sample] + at
            before, after = self._nearest(self.gallery[own], own), self._nearest(vector, own)
            total += (len(before & after) / self.neighbours, 1)
        return total

    def figure(self, sums: Floats) -> float:
        """A share 0..1."""
        return _mean(sums)


# -- distributions -----------------------------------------------------------------------------


def _log_softmax(values: Floats, axis: int) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        shifted = values - values.max(axis=axis, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True)))


def _are_probabilities(values: Floats, axis: int) -> bool:
    """Whether values look like the output of a Softmax."""
    sums = values.sum(axis=axis)
    return bool(
        values.size
        and values.shape[axis] > 1
        and values.min() >= 0
        and np.allclose(sums, 1.0, rtol=0, atol=1e-3)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class KlDivergence:
    """Kullback-Leibler divergence of the other model's distribution from the float model's.

    In nats and float64, on average over positions. Logits go through a softmax. Probabilities below
    `LEAST_PROBABILITY` count as that and are made to sum to 1.

    Attributes:
        text, outputs: see `TaskMetric`.
        axis: of the classes.
        holds: "logits", "probabilities", or "" where nothing was said: refuses what looks like
            probabilities.
    """

    text: str
    outputs: tuple[str, ...]
    axis: int = -1
    holds: str = ""
    unit: str = "nats"
    higher_is_better: bool = False

    def sums(
        self, sample: int, reference: Outputs, actual: Outputs, parts: Parts = whole
    ) -> Floats:
        """Divergences and positions."""
        (name,) = self.outputs
        total = np.zeros(2)
        for pair in _pairs(name, reference, actual, parts):
            axis = _axis(self.text, name, pair[0], self.axis)
            a, b = (np.asarray(v, np.float64) for v in pair)
            if not a.size:
                continue
            if not self.holds and _are_probabilities(a, axis):
                raise FeedError(
                    f"{self.text}: output {name} looks like probabilities",
                    hint="Say what it holds: add @probabilities or @logits.",
                )
            with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                if self.holds == "probabilities":
                    p, q = (np.maximum(v, LEAST_PROBABILITY) for v in (a, b))
                    logs = [np.log(v / v.sum(axis=axis, keepdims=True)) for v in (p, q)]
                else:
                    logs = [_log_softmax(v, axis) for v in (a, b)]
                share = np.exp(logs[0])
                # What cannot happen adds nothing, whatever the other model says of it.
                each = np.where(share == 0, 0.0, share * (logs[0] - logs[1]))
                total += (each.sum(), a.size // a.shape[axis])
        return total

    def figure(self, sums: Floats) -> float:
        """0 for equal distributions; inf where the other model excludes what can happen."""
        return _mean(sums)


# -- against numbers ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedValues:
    """Mean absolute error against expected values, over all elements of all samples.

    Attributes:
        text, outputs: see `TaskMetric`.
        expected: of each sample.
    """

    text: str
    outputs: tuple[str, ...]
    expected: tuple[tuple[float, ...], ...]
    unit: str = ""
    higher_is_better: bool = False

    def sums(
        self, sample: int, reference: Outputs, actual: Outputs, parts: Parts = whole
    ) -> Floats:
        """Absolute errors and elements."""
        (name,) = self.outputs
        wanted = np.array(self.expected[sample], np.float64)
        values = np.asarray(actual[name], np.float64).ravel()
        if values.size != wanted.size:
            elements = f"{wanted.size} elements, as there are expected values"
            hint = "Write one expected value for each element of the output, or name another one."
            raise _unfit(self.text, name, actual[name], elements, hint)
        with np.errstate(invalid="ignore"):
            return np.array([np.abs(values - wanted).sum(), wanted.size])

    def figure(self, sums: Floats) -> float:
        """In the output's own unit."""
        return _mean(sums)


# -- a user's own ------------------------------------------------------------------------------

# What a user's code raises when it is wrong; errors of its own show where they come from.
OWN_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
# Takes the float model's outputs, the other's and the sample's index; gives a figure.
OwnFunction = Callable[[dict[str, NDArray[Any]], dict[str, NDArray[Any]], int], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnMetric:
    """The mean over samples of what a user's function gives for one.

    Attributes:
        text, outputs: see `TaskMetric`; all outputs, whole.
        function: what gives a number per sample. Its attributes `higher_is_better` (True) and
            `unit` ("") say what that is.
    """

    text: str
    outputs: tuple[str, ...]
    function: OwnFunction
    unit: str = ""
    higher_is_better: bool = True

    def sums(
        self, sample: int, reference: Outputs, actual: Outputs, parts: Parts = whole
    ) -> Floats:
        """The function's figure, and 1."""
        ours, others = ({n: side[n] for n in self.outputs} for side in (reference, actual))
        try:
            return np.array([float(self.function(ours, others, sample)), 1.0])
        except OWN_ERRORS as error:
            raise FeedError(
                f"{self.text} raised {type(error).__name__} on sample {sample}: {error}",
                hint="Return one number for (reference outputs, actual outputs, sample index).",
            ) from error

    def figure(self, sums: Floats) -> float:
        """The mean over samples."""
        return _mean(sums)


# -- before the first sample -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Guided:
    """A metric with the outputs' SQNR beside it, which tells lists apart where a count does not.

    Attributes:
        metric: whose figure counts.
        sqnr: of the outputs that it looks at.
    """

    metric: TaskMetric
    sqnr: OutputSqnr

    @property
    def text(self) -> str:
        """See `TaskMetric`."""
        return self.metric.text

    @property
    def outputs(self) -> tuple[str, ...]:
        """See `TaskMetric`."""
        return self.metric.outputs

    @property
    def unit(self) -> str:
        """See `TaskMetric`."""
        return self.metric.unit

    @property
    def higher_is_better(self) -> bool:
        """See `TaskMetric`."""
        return self.metric.higher_is_better

    def prepare(self, references: Iterable[tuple[Outputs, Parts]]) -> Guided:
        """With the metric made ready for the float model's outputs."""
        return replace(self, metric=prepared(self.metric, references))

    def sums(
        self, sample: int, reference: Outputs, actual: Outputs, parts: Parts = whole
    ) -> Floats:
        """The metric's sums, then signal and noise of each output."""
        own = self.metric.sums(sample, reference, actual, parts)
        return np.concatenate([own, self.sqnr.sums(sample, reference, actual, parts)])

    def figure(self, sums: Floats) -> float:
        """The metric's."""
        return self.metric.figure(sums[: sums.size - 2 * len(self.sqnr.outputs)])

    def noise(self, sums: Floats) -> float:
        """Noise relative to the signal, summed over the outputs; nan where one is not finite."""
        signal, noise = sums[sums.size - 2 * len(self.sqnr.outputs) :].reshape(-1, 2).T
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.where(noise == 0, 0.0, noise / signal).sum())


def guided(metric: TaskMetric, outputs: Collection[str]) -> TaskMetric:
    """The metric with the SQNR of its outputs beside it; itself where it is a SQNR.

    Args:
        metric: as it was parsed.
        outputs: those that hold floating-point values.
    """
    looked_at = tuple(n for n in metric.outputs if n in outputs) or tuple(outputs)
    if metric.unit == "dB" or not looked_at:
        return metric
    return Guided(metric=metric, sqnr=OutputSqnr(text=metric.text, outputs=looked_at))


def prepared(metric: TaskMetric, references: Iterable[tuple[Outputs, Parts]]) -> TaskMetric:
    """The metric once it has seen what it needs of all samples; itself where it needs nothing.

    Args:
        metric: as it was parsed.
        references: of every sample, the float model's outputs and what of them counts; taken one
            after the other.

    Raises:
        FeedError: the samples do not suit it.
    """
    if isinstance(metric, NeighbourOverlap | Guided):
        return metric.prepare(references)
    return metric
