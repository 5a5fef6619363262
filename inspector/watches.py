"""The running sums behind the figures of one tensor pair, one output, or the labels.

Fed with one sample's arrays at a time and keep none of them. Apart from `compare`, which opens the
models and says which arrays belong to which watch. NaN and infinity are never left out of a sum: a
figure that rests on them is nan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.comparison import ActivationError, OutputError, SliceError, Task, Unmatched
from inspector.matching import ActivationPair, activation_channel_axis, rectify
from inspector.metrics import ErrorTotals, decibels, merge_totals, powers, worst_and_median
from inspector.model import Model
from inspector.padding import Padding
from inspector.qparams import QParams
from inspector.runtime import Tensors
from inspector.stats import saturated_counts, saturated_masks

# Deployed outputs differ from simulated ones where they are further apart than this many steps of
# the output's scale; an output without one is given the steps of 8 bits over its own range.
DIFFERENT_STEPS = 3.0
STEPS_WITHOUT_SCALE = 255


def plain(values: NDArray[Any]) -> Any:
    """One Python number, or a tuple of them, as records hold scales and zero points."""
    return values.item() if values.ndim == 0 or values.size == 1 else tuple(values.ravel().tolist())


def scale_and_zero_point(qparams: QParams | None) -> tuple[Any, Any]:
    """Both as records hold them; None for both without parameters."""
    return (None, None) if qparams is None else (plain(qparams.scale), plain(qparams.zero_point))


def in_float_layout(pair: ActivationPair, values: NDArray[Any]) -> NDArray[Any]:
    """A tensor of the quantized model with its axes in the float model's order."""
    return values if pair.permutation is None else values.transpose(pair.permutation)


def real_values(pair: ActivationPair, values: NDArray[Any]) -> NDArray[Any]:
    """What `pair.after` stands for: integers dequantized (float64), axes in the float order."""
    if pair.integers and pair.qparams is not None and values.dtype.kind in "iu":
        values = pair.qparams.dequantize(values)
    elif values.dtype.kind == "V":
        values = values.astype(np.float32)  # bfloat16 and float8 as a feed holds them
    return in_float_layout(pair, values)


def vectors(values: NDArray[Any], rows: int) -> NDArray[Any] | None:
    """An output that holds one vector per row of a batch, as (rows, classes).

    Also with axes of length 1 around; None for any other output.
    """
    classes = values.size // rows if rows else 0
    where = values.shape if values.ndim == 1 else values.shape[1:]
    if classes < 2 or classes * rows != values.size or classes not in where:
        return None
    if rows > 1 and values.shape[0] != rows:
        return None
    return values.reshape(rows, classes)


def choices(values: NDArray[Any], rows: int) -> NDArray[np.int64] | None:
    """The largest element of each row of a batch, where an output holds one vector per row.

    (rows,); None for any other output.
    """
    found = vectors(values, rows)
    return None if found is None else np.asarray(found.argmax(axis=1), np.int64)


def _moved(qparams: QParams, pair: ActivationPair) -> QParams:
    """Parameters of the quantized model's tensor with their axis where the float model has it."""
    if qparams.axis is None or not pair.permutation:
        return qparams
    return replace(qparams, axis=pair.permutation.index(qparams.axis))


def _nonfinite(values: NDArray[Any]) -> int:
    return int(values.size - np.count_nonzero(np.isfinite(values)))


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSums:
    """What one sample adds to the figures of an activation pair.

    Attributes:
        totals: the float model's tensor against what the quantized model's consumers read, per
            channel where channels are kept apart.
        low, high: range of the float tensor per channel, float64; None for an empty tensor.
        local: sums of squares of the tensor before Q (rectified) and of its difference from the
            one after it, float64, shape (2,); None where there is none.
        clipped: elements that any Q clips at its low and at its high end.
        quantized: elements before Q.
        nonfinite_before, nan_before: of those, the NaN and infinite ones, and the NaN.
    """

    totals: ErrorTotals
    low: NDArray[np.float64] | None
    high: NDArray[np.float64] | None
    local: NDArray[np.float64] | None = None
    clipped: tuple[int, int] = (0, 0)
    quantized: int = 0
    nonfinite_before: int = 0
    nan_before: int = 0


class TensorWatch:
    """The running sums of one activation pair.

    Attributes:
        pair: the pair.
        axis: channel axis of the float tensor, known after the first sample.
        unknown: the latest sample held NaN or infinity that Q turned into integers.
    """

    def __init__(
        self, pair: ActivationPair, float_model: Model, padding: Padding | None = None
    ) -> None:
        self.pair = pair
        self.model = float_model
        self.padding = padding
        self.qparams = _moved(pair.qparams, pair) if pair.qparams is not None else None
        self.stages = [(_moved(a, pair), _moved(b, pair)) for a, b in pair.stages]
        if not self.stages and self.qparams is not None:
            self.stages = [(self.qparams, self.qparams)]
        self.limits = None
        if len(self.stages) == 1 and self.stages[0][0].per_tensor:
            self.limits = self.stages[0][0].representable_range()
        # What `twin` can take: for the others masks and limits per element are wanted.
        self.reducible = padding is None and (self.qparams is None or self.limits is not None)
        self.accumulated: ErrorTotals | None = None
        self.local = np.zeros(2)
        self.low: NDArray[np.float64] | None = None
        self.high: NDArray[np.float64] | None = None
        self.saturated = np.zeros(2, np.int64)
        self.count = 0
        self.shape: tuple[int, ...] = ()
        self.axis: int | None = None
        self.parts: list[tuple[str, int, int]] | None = None
        self.ragged = False
        self.broken = ""
        self.unknown = False
        self.nonfinite_before = self.nan_before = 0
        self._channels = 0

    def add(
        self,
        reference: NDArray[Any],
        before: NDArray[Any] | None,
        after: NDArray[Any],
        float_values: Mapping[str, NDArray[Any]],
    ) -> tuple[bool, bool]:
        """One sample's arrays; whether the float and the quantized model's hold NaN or infinity."""
        self.unknown = False
        if self.broken:
            return False, False
        after = real_values(self.pair, after)
        if after.dtype.kind != "f":
            self.broken = f"the quantized model holds {after.dtype.name} values in its place"
        elif reference.shape != after.shape:
            self.broken = f"shapes differ: float {reference.shape}, quantized {after.shape}"
        if self.broken:
            return False, False
        if before is not None and self.qparams is not None:
            before = in_float_layout(self.pair, before)
            if before.shape != after.shape:
                before = None
        else:
            before = None
        self.meet(reference.shape)
        if self.padding is None:
            return self._add(reference, before, after, float_values)
        name = self.pair.name
        references, afters = (self.padding.parts(name, v) for v in (reference, after))
        befores: Sequence[NDArray[Any] | None] = [None] * len(afters)
        if before is not None:
            befores = self.padding.parts(name, before)
        flags = [
            self._add(*arrays, float_values)
            for arrays in zip(references, befores, afters, strict=True)
        ]
        return any(a for a, _ in flags), any(b for _, b in flags)

    def meet(self, shape: tuple[int, ...]) -> None:
        """Learns the channel axis from the shape of the first sample."""
        if self.accumulated is None:
            self.shape = tuple(shape)
            self.axis = activation_channel_axis(self.model, self.pair.name, len(shape))

    def kept_axis(
        self, shape: tuple[int, ...], float_values: Mapping[str, NDArray[Any]]
    ) -> int | None:
        """The axis whose channels are kept apart in a sample; None once samples are ragged.

        Args:
            shape: of the float tensor, without padding.
            float_values: tensors of the float model, of which only shapes are looked at.
        """
        axis = self.axis
        if self.accumulated is None:
            self._channels = 0 if axis is None else shape[axis]
            self.parts = self._parts(float_values)
        if axis is not None and (
            len(shape) != len(self.shape) or shape[axis] != self._channels
        ):  # fmt: skip
            self.ragged = True
        return None if self.ragged else axis

    def _add(
        self,
        reference: NDArray[Any],
        before: NDArray[Any] | None,
        after: NDArray[Any],
        float_values: Mapping[str, NDArray[Any]],
    ) -> tuple[bool, bool]:
        axis = self.kept_axis(reference.shape, float_values)
        return self.take(self.sums_of(reference, before, after, axis))

    def sums_of(
        self,
        reference: NDArray[Any],
        before: NDArray[Any] | None,
        after: NDArray[Any],
        axis: int | None,
    ) -> SampleSums:
        """The sums of one sample's arrays in float64; nothing is added to the running ones.

        Args:
            reference: the float model's tensor.
            before: the quantized model's before Q, in the same layout; None for no local error.
            after: what its consumers read, as real numbers in the same layout.
            axis: whose channels are kept apart.
        """
        low = high = None
        if reference.size:
            others = tuple(a for a in range(reference.ndim) if a != axis)
            with np.errstate(invalid="ignore"):
                low = np.atleast_1d(reference.min(axis=others)).astype(np.float64)
                high = np.atleast_1d(reference.max(axis=others)).astype(np.float64)
        reference = np.asarray(reference, np.float64)
        after = np.asarray(after, np.float64)
        totals = ErrorTotals.of(reference, after, axis)
        if before is None or self.qparams is None:
            return SampleSums(totals=totals, low=low, high=high)
        real = rectify(before, self.pair.rectifiers, self.model)
        local = powers(real, after)
        lost = nans = 0
        if not math.isfinite(local[0]):
            lost = _nonfinite(before)
            nans = int(np.count_nonzero(np.isnan(before)))
        return SampleSums(
            totals=totals,
            low=low,
            high=high,
            local=local,
            clipped=(0, 0) if self._within(real) else self._clipped(real),
            quantized=int(real.size),
            nonfinite_before=lost,
            nan_before=nans,
        )

    def take(self, sums: SampleSums) -> tuple[bool, bool]:
        """Adds one sample's sums; whether the float and the quantized model's are not finite."""
        self.unknown = False
        totals = sums.totals
        if sums.low is not None and sums.high is not None:
            self._range(sums.low, sums.high)
        if sums.local is not None:
            # NaN becomes some integer in Q: nothing behind it shows it any more. Infinity becomes
            # the end of the range, which is as true as any clipped value.
            if sums.nan_before and not totals.nonfinite_actual:
                totals = totals.unknown()
                self.unknown = True
            self.nan_before += sums.nan_before
            self.nonfinite_before += sums.nonfinite_before
            self.local += sums.local
            self.saturated += sums.clipped
            self.count += sums.quantized
        self.accumulated = totals if self.accumulated is None else self.accumulated.merge(totals)
        return (
            totals.nonfinite_reference > 0,
            totals.nonfinite_actual > 0 or sums.nonfinite_before > 0,
        )

    def _clipped(self, real: NDArray[Any]) -> tuple[int, int]:
        """How many elements any Q clips at its low and at its high end."""
        if len(self.stages) == 1:
            return saturated_counts(real, self.stages[0][0])
        low, high = np.zeros(real.shape, np.bool_), np.zeros(real.shape, np.bool_)
        for quantize, dequantize in self.stages:
            below, above = saturated_masks(real, quantize)
            low |= below & ~high  # an element is clipped once
            high |= above & ~low
            real = dequantize.dequantize(quantize.quantize(real))
        return int(np.count_nonzero(low)), int(np.count_nonzero(high))

    def _representable(self) -> tuple[float, float] | None:
        """What every Q can hold; of one channel or another, where they have scales of their own."""
        ranges = [quantize.representable_range() for quantize, _ in self.stages]
        if not ranges:
            return None
        return max(low for low, _ in ranges), min(high for _, high in ranges)

    def _within(self, real: NDArray[Any]) -> bool:
        """Whether two looks are enough to say that nothing is clipped, as is most often true."""
        if self.limits is None or not real.size:
            return not real.size
        low, high = self.limits
        return bool(real.min() >= low and real.max() <= high)

    def _range(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> None:
        if self.low is None or self.high is None:
            self.low, self.high = low, high
            return
        if self.low.shape != low.shape:
            self.low, self.high = self.low.min(keepdims=True), self.high.max(keepdims=True)
            low, high = low.min(keepdims=True), high.max(keepdims=True)
        # Not fmin and fmax: a range that leaves NaN out would look like all of it.
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)

    def _parts(self, float_values: Mapping[str, NDArray[Any]]) -> list[tuple[str, int, int]] | None:
        """Where each input of the Concat that makes this tensor lies along its axis."""
        node = self.model.producers.get(self.pair.name)
        if node is None or node.op_type != "Concat" or self.axis is None:
            return None
        parts, start = [], 0
        for name in node.inputs:
            shape: Sequence[int | str | None] = self.model.info(name).shape or ()
            if name in float_values:
                if isinstance(float_values, Tensors):
                    shape = float_values.shape_of(name)
                else:
                    shape = float_values[name].shape
            size = shape[self.axis] if self.axis < len(shape) else None
            if not isinstance(size, int):
                return None
            parts.append((name, start, start + size))
            start += size
        return parts if start == self._channels else None

    def slices(self) -> tuple[SliceError, ...]:
        """Where a Concat makes the tensor: each input's part; () where samples are ragged."""
        totals = self.accumulated
        if totals is None or not self.parts or self.ragged or self.low is None or self.high is None:
            return ()
        if self.parts[-1][2] != totals.signal.size or self.low.size != totals.signal.size:
            return ()
        return tuple(
            SliceError(
                source=name,
                start=start,
                stop=stop,
                sqnr_db=totals.slice(start, stop).sqnr_db,
                absmax=float(
                    np.abs(np.concatenate([self.low[start:stop], self.high[start:stop]])).max()
                ),
            )
            for name, start, stop in self.parts
            if stop > start
        )

    def channels(self) -> NDArray[np.float64]:
        """SQNR per channel, dB; empty where there are none or samples are ragged."""
        if self.accumulated is None or self.axis is None or self.ragged:
            return np.array([])
        return self.accumulated.channel_sqnr_db

    def error(self, output_names: frozenset[str]) -> ActivationError | Unmatched:
        """The record of all samples."""
        pair, totals = self.pair, self.accumulated
        if totals is None or self.broken:
            reason = self.broken or "no sample reached it"
            return Unmatched(name=pair.name, kind="activation", model="float", reason=reason)
        channels = self.channels()
        worst, median, worst_channel = worst_and_median(channels)
        scale, zero_point = scale_and_zero_point(pair.qparams)
        low = high = math.nan
        if self.low is not None and self.high is not None:
            low, high = float(np.min(self.low)), float(np.max(self.high))
        known = self.low is not None and self.low.size == channels.size
        share: tuple[float, float] | None = None
        if self.count:
            share = (float(self.saturated[0] / self.count), float(self.saturated[1] / self.count))
            if self.nan_before:
                share = (math.nan, math.nan)
        representable = self._representable()
        return ActivationError(
            name=pair.name,
            node=pair.node.name if pair.node else "",
            op_type=pair.node.op_type if pair.node else "Input",
            depth=pair.node.index if pair.node else -1,
            quantized_name=pair.after,
            dtype=pair.qparams.dtype if pair.qparams else "float32",
            shape=self.shape,
            scale=scale,
            zero_point=zero_point,
            local_sqnr_db=decibels(*self.local.tolist()) if share is not None else None,
            accumulated_sqnr_db=totals.sqnr_db,
            worst_channel_sqnr_db=worst,
            median_channel_sqnr_db=median,
            worst_channel=worst_channel,
            channel_axis=None if self.ragged else self.axis,
            channel_sqnr_db=tuple(channels.tolist()),
            channel_low=tuple(self.low.tolist()) if known and self.low is not None else (),
            channel_high=tuple(self.high.tolist()) if known and self.high is not None else (),
            slices=self.slices(),
            cosine_similarity=totals.cosine_similarity,
            mse=totals.mse,
            max_abs_error=totals.max_abs_error,
            saturated_fraction=None if share is None else share[0] + share[1],
            saturated_low_fraction=None if share is None else share[0],
            saturated_high_fraction=None if share is None else share[1],
            observed_low=low,
            observed_high=high,
            representable_low=None if representable is None else representable[0],
            representable_high=None if representable is None else representable[1],
            nonfinite_float=totals.nonfinite_reference,
            nonfinite_quantized=max(totals.nonfinite_actual, self.nonfinite_before),
            is_output=pair.name in output_names,
            matched_by=pair.matched_by,
            note=pair.note,
        )


class OutputWatch:
    """The running sums of one graph output: per sample, simulated and deployed.

    Args:
        name: the float model's output.
        watch: of the same tensor among the activations; None where it is not compared there.
        output_step: the output's scale, None where it has none.
        padding: which positions to leave out.

    Attributes:
        apart: largest |simulated - deployed| so far; inf where only one of them is finite.
        flips: rows in which the largest element changes place between simulated and deployed.
    """

    def __init__(
        self,
        name: str,
        watch: TensorWatch | None,
        output_step: float | None,
        padding: Padding | None = None,
    ) -> None:
        self.name = name
        self.watch = watch
        self.output_step = output_step
        self.padding = padding
        self.simulated: list[ErrorTotals] = []
        self.deployed: list[ErrorTotals] = []
        self.apart = 0.0
        self.flips = 0
        self._low, self._high = math.inf, -math.inf

    def add(
        self,
        reference: NDArray[Any],
        simulated: NDArray[Any],
        deployed_reference: NDArray[Any] | None,
        deployed: NDArray[Any] | None,
        *,
        rows: int = 1,
    ) -> float:
        """One sample's arrays, all of one shape; how far simulated and deployed are apart, steps.

        Args:
            reference: the float model's output, simulated.
            simulated: the quantized model's.
            deployed_reference: the float model's output, deployed; None where it does not run so.
            deployed: the quantized model's, likewise.
            rows: how many rows of the output's first axis are samples of their own.
        """
        pieces = [self._whole_or_parts(v) for v in (reference, simulated)]
        totals = merge_totals(ErrorTotals.of(a, b) for a, b in zip(*pieces, strict=True))
        if self.watch is not None and self.watch.unknown:
            totals = totals.unknown()
        self.simulated.append(totals)
        for part in pieces[1]:
            finite = part[np.isfinite(part)]
            if finite.size:
                self._low = min(self._low, float(finite.min()))
                self._high = max(self._high, float(finite.max()))
        if deployed_reference is None or deployed is None:
            return 0.0
        shipped = [self._whole_or_parts(v) for v in (deployed_reference, deployed)]
        self.deployed.append(
            merge_totals(ErrorTotals.of(a, b) for a, b in zip(*shipped, strict=True))
        )
        apart = self.apart_by(simulated, deployed)
        self.apart = max(self.apart, apart)
        self.flips += self.flips_between(simulated, deployed, rows)
        return self.steps(apart)

    def _whole_or_parts(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        return [values] if self.padding is None else self.padding.parts(self.name, values)

    def apart_by(self, simulated: NDArray[Any], deployed: NDArray[Any]) -> float:
        """Largest |simulated - deployed| of one sample; inf where only one of them is finite."""
        largest = 0.0
        parts = (self._whole_or_parts(v) for v in (simulated, deployed))
        for a, b in zip(*parts, strict=True):
            x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
            with np.errstate(invalid="ignore"):
                distance = np.abs(x - y)
            distance[(x == y) | (np.isnan(x) & np.isnan(y))] = 0.0
            distance[np.isnan(distance)] = math.inf
            largest = max(largest, float(distance.max(initial=0.0)))
        return largest

    @staticmethod
    def flips_between(simulated: NDArray[Any], deployed: NDArray[Any], rows: int) -> int:
        """In how many rows the largest element changes place; 0 where there is none per row."""
        a, b = choices(simulated, rows), choices(deployed, rows)
        return int(np.count_nonzero(a != b)) if a is not None and b is not None else 0

    def steps(self, apart: float) -> float:
        """A distance in steps of the output's scale, or of 8 bits over its range so far."""
        step = self.output_step
        if step is None:
            step = max(0.0, self._high - self._low) / STEPS_WITHOUT_SCALE
            if step == 0 and math.isfinite(self._high):
                step = abs(self._high) / STEPS_WITHOUT_SCALE
        if apart == 0:
            return 0.0
        return apart / step if step else math.inf

    @property
    def peak(self) -> float:
        """Largest absolute finite value of the quantized model, simulated; 0 for none."""
        return max(abs(self._low), abs(self._high)) if self._low <= self._high else 0.0

    @property
    def differs(self) -> bool:
        """Whether deployed outputs are not the simulated ones, rounding aside."""
        return self.steps(self.apart) > DIFFERENT_STEPS or self.flips > 0

    def error(
        self, sample_names: Sequence[str], seen: Sequence[bool] | None, *, cause: str = ""
    ) -> OutputError:
        """The record of all samples."""
        per_sample = np.array([t.sqnr_db for t in self.simulated])
        worst_sample, median_sample, at = worst_and_median(per_sample)
        channels = self.watch.channels() if self.watch is not None else np.array([])
        worst, median, worst_channel = worst_and_median(channels)
        totals = merge_totals(self.simulated)

        def pooled(which: bool) -> float | None:
            if seen is None:
                return None
            parts = [t for t, s in zip(self.simulated, seen, strict=True) if s is which]
            return merge_totals(parts).sqnr_db if parts else None

        return OutputError(
            name=self.name,
            sqnr_db=totals.sqnr_db,
            deployed_sqnr_db=merge_totals(self.deployed).sqnr_db if self.deployed else math.nan,
            seen_sqnr_db=pooled(True),
            unseen_sqnr_db=pooled(False),
            worst_channel_sqnr_db=worst,
            median_channel_sqnr_db=median,
            worst_channel=worst_channel,
            channel_axis=self.watch.axis if self.watch is not None and channels.size else None,
            channel_sqnr_db=tuple(channels.tolist()),
            slices=self.watch.slices() if self.watch is not None else (),
            median_sample_sqnr_db=median_sample,
            worst_sample_sqnr_db=worst_sample,
            worst_sample=sample_names[at] if at is not None else "",
            per_sample_sqnr_db=tuple(per_sample.tolist()),
            cosine_similarity=totals.cosine_similarity,
            max_abs_error=totals.max_abs_error,
            deployed_differs=self.differs,
            deployed_max_steps=(
                self.steps(self.apart) if self.output_step is not None and self.deployed else None
            ),
            deployed_flips=self.flips,
            deployed_cause=cause,
        )


class TaskWatch:
    """Top-1 of both models against labels, on the first output with enough classes.

    Args:
        labels: one class per row of every sample, in order.
    """

    def __init__(self, labels: Sequence[int]) -> None:
        self.labels = labels
        self.output = ""
        self.right_float = self.right_quantized = self.agree = self.samples = 0
        self._at = 0

    def add(
        self,
        rows: int,
        reference: Mapping[str, NDArray[Any]],
        actual: Mapping[str, NDArray[Any]],
    ) -> None:
        """The outputs of one sample, which holds so many rows."""
        labels = np.asarray(self.labels[self._at : self._at + rows])
        self._at += rows
        if not self.output:
            most = max(self.labels)
            fitting = [
                n for n, v in reference.items()
                if choices(v, rows) is not None and v.size // rows > max(1, most)
            ]  # fmt: skip
            if not fitting:
                return
            self.output = fitting[0]
        a = choices(reference[self.output], rows)
        b = choices(actual[self.output], rows)
        if a is None or b is None or a.shape != labels.shape:
            return
        self.samples += rows
        self.right_float += int(np.count_nonzero(a == labels))
        self.right_quantized += int(np.count_nonzero(b == labels))
        self.agree += int(np.count_nonzero(a == b))

    def task(self) -> Task | None:
        """The record of all samples; None where no output has as many classes."""
        if not self.samples:
            return None
        return Task(
            output=self.output,
            samples=self.samples,
            top1_float=self.right_float / self.samples,
            top1_quantized=self.right_quantized / self.samples,
            top1_agreement=self.agree / self.samples,
        )
