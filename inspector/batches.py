"""What a sample's company makes of its result, where ranges are found at run time.

Dynamic quantization takes one range over everything that runs together, so a sample in a batch is
quantized with the range of its neighbours and of the padding. Measured as deployed: the same
samples alone and in one batch, in both models; the float model's difference is the rounding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.comparison import BatchEffect, BatchError, Skipped
from inspector.feeds import Feeds
from inspector.metrics import decibels, powers
from inspector.model import Model
from inspector.padding import padded
from inspector.runtime import Feed, Progress, Session, no_progress

MOST_SAMPLES = 32
MOST_BYTES = 64 * 2**20
# An output that moves by more than this share of its peak depends on the batch.
NOTABLE_SHARE = 0.01
# The float model's outputs move as well where they do by more than these shares of what the
# quantized model's do and of their own peak, which is far above the rounding.
FLOAT_SHARE = 0.1
ROUNDING_SHARE = 0.001


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSide:
    """One of the two models, opened as deployed.

    Attributes:
        session: with all optimisations.
        feed_of: makes its feed of the float model's.
        outputs: its output by the float model's name.
    """

    session: Session
    feed_of: Callable[[Feed], Feed]
    outputs: Mapping[str, str]


def _skipped(reason: str) -> Skipped:
    return Skipped(name="batch effect", kind="figure", model="", reason=reason)


def measure_batch(
    float_side: BatchSide,
    quantized_side: BatchSide,
    float_model: Model,
    quantized_model: Model,
    feeds: Feeds,
    *,
    mask: str = "",
    progress: Progress = no_progress,
) -> BatchEffect | Skipped:
    """Up to 32 samples alone and in one batch.

    Samples of unequal length are padded behind with zeros where an input marks padding; without
    one only those of the most frequent shape share the batch. Where the float model's outputs move
    as well, what was joined is no batch (time may come first), and there is no effect to tell.

    Args:
        float_side: the float model as deployed.
        quantized_side: the quantized model as deployed.
        float_model: for the shapes of its inputs.
        quantized_model: likewise.
        feeds: the float model's.
        mask: the input that marks padding; "" looks for one with "mask" in its name.
        progress: see `runtime.Progress`.
    """
    for model in (float_model, quantized_model):
        for info in model.inputs:
            if not info.shape or (isinstance(info.shape[0], int) and info.shape[0] > 0):
                shown = "has no axes" if not info.shape else f"is fixed to {info.shape[0]}"
                return _skipped(f"the first axis of {model.name}'s input {info.name} {shown}")
    mask = mask or next((i.name for i in float_model.inputs if "mask" in i.name.lower()), "")
    chosen, reason = _chosen(feeds, padding=bool(mask))
    if len(chosen) < 2:
        return _skipped(reason)
    some = feeds.subset(chosen)
    batch, rows, is_padded = _stacked(some)
    names = [n for n in float_side.outputs if n in quantized_side.outputs]
    together = [
        side.session.run(side.feed_of(batch), [side.outputs[n] for n in names], sample="a batch")
        for side in (float_side, quantized_side)
    ]
    sums = {n: _Differences() for n in names}
    start = 0
    for at, feed in enumerate(some):
        progress(at / len(some), f"alone and in a batch: sample {at + 1} of {len(some)}")
        stop = start + rows[at]
        for side, whole, is_float in (
            (float_side, together[0], True),
            (quantized_side, together[1], False),
        ):
            wanted = [side.outputs[n] for n in names]
            alone = side.session.run(side.feed_of(feed), wanted, sample=some.names[at])
            for name in names:
                one, many = alone[side.outputs[name]], whole[side.outputs[name]]
                sums[name].add(one, many, start, stop, sum(rows), some.names[at], is_float)
        start = stop
    outputs = tuple(s.error(n) for n, s in sums.items() if s.fits)
    if not outputs:
        return _skipped("no output has the batch as its first axis")
    moved = next((n for n, s in sums.items() if s.fits and s.float_moves()), None)
    if moved is not None:
        company = "a padded batch" if is_padded else "a batch"
        why = "padding is not left out, or " if is_padded else ""
        return _skipped(
            f"in {company} output {moved} of the float model itself moves by up to "
            f"{sums[moved].largest[True]:.2g}: {why}the first axis is no batch"
        )
    return BatchEffect(samples=len(some), padded=is_padded, outputs=outputs)


def _chosen(feeds: Feeds, *, padding: bool) -> tuple[list[int], str]:
    """Samples that can share a batch, and why there are not two of them."""
    shapes: list[tuple[Any, ...]] = []
    total = 0
    for at, feed in enumerate(feeds):
        total += sum(v.nbytes for v in feed.values())
        if at == MOST_SAMPLES or (at > 1 and total > MOST_BYTES):
            break
        if any(not v.ndim for v in feed.values()):
            return [], "an input is a scalar"
        # Samples of several rows need them in all inputs alike.
        if len({v.shape[0] for v in feed.values()}) > 1:
            return [], "the inputs of a sample differ in their first axis"
        shapes.append(
            tuple(
                (n, v.ndim if padding and v.dtype.kind in "fiub" else v.shape[1:])
                for n, v in sorted(feed.items())
            )
        )
    if len(shapes) < 2:
        return [], "there is one sample"
    common, count = Counter(shapes).most_common(1)[0]
    if count < 2:
        return [], "samples differ in shape and no input marks padding"
    return [at for at, shape in enumerate(shapes) if shape == common], ""


def _stacked(feeds: Feeds) -> tuple[dict[str, NDArray[Any]], list[int], bool]:
    """The feeds in one batch, the rows of each, and whether any was padded."""
    arrays = list(feeds)
    rows = [next(iter(feed.values())).shape[0] for feed in arrays]
    batch = {}
    is_padded = False
    for name in arrays[0]:
        values = [feed[name] for feed in arrays]
        longest = tuple(int(n) for n in np.max([v.shape[1:] for v in values], axis=0))
        is_padded |= any(v.shape[1:] != longest for v in values)
        batch[name] = np.concatenate([padded(v, (v.shape[0], *longest)) for v in values])
    return batch, rows, is_padded


class _Differences:
    """Alone against in the batch, for one output of both models."""

    def __init__(self) -> None:
        self.fits = True
        self.largest = {True: 0.0, False: 0.0}
        self.float_peak = 0.0
        self.sums = np.zeros(2)
        self.worst = ""

    def add(
        self,
        alone: NDArray[Any],
        together: NDArray[Any],
        start: int,
        stop: int,
        rows: int,
        sample: str,
        is_float: bool,
    ) -> None:
        floating = alone.dtype.kind == together.dtype.kind == "f"
        self.fits &= (
            floating
            and alone.ndim == together.ndim > 0
            and together.shape[0] == rows
            and alone.shape[0] == stop - start
            and all(a <= b for a, b in zip(alone.shape[1:], together.shape[1:], strict=True))
        )
        if not self.fits:
            return
        # Behind the sample's own positions lies what the padding gave.
        own = together[(slice(start, stop), *(slice(n) for n in alone.shape[1:]))]
        with np.errstate(invalid="ignore"):
            distance = np.abs(alone.astype(np.float64) - own.astype(np.float64))
        largest = float(distance.max(initial=0.0))
        if is_float:
            peak = np.abs(alone).max(initial=0.0)
            self.float_peak = float(np.maximum(self.float_peak, peak))
        else:
            self.sums += powers(alone, own)
            if not self.worst or largest > self.largest[False]:
                self.worst = sample
        self.largest[is_float] = float(np.maximum(self.largest[is_float], largest))

    def float_moves(self) -> bool:
        """Whether the batch changes the float model's output as well, and not by rounding."""
        moved, quantized = self.largest[True], self.largest[False]
        return moved > FLOAT_SHARE * quantized and moved > ROUNDING_SHARE * self.float_peak

    def error(self, name: str) -> BatchError:
        return BatchError(
            output=name,
            float_max_abs_difference=self.largest[True],
            quantized_max_abs_difference=self.largest[False],
            quantized_sqnr_db=decibels(*self.sums.tolist()),
            worst_sample=self.worst,
        )


def batch_warnings(effect: BatchEffect, peaks: Mapping[str, float]) -> Iterator[str]:
    """Sentences about outputs that depend on what shares the batch.

    Args:
        effect: what was measured.
        peaks: largest absolute value by output.
    """
    for output in effect.outputs:
        peak = peaks.get(output.output, math.nan)
        if output.quantized_max_abs_difference > NOTABLE_SHARE * peak:
            company = "a padded batch" if effect.padded else "a batch"
            yield (
                f"output {output.output} depends on what shares its batch: alone and in {company} "
                f"of {effect.samples} it differs by up to {output.quantized_max_abs_difference:.3g}"
                f" (sample {output.worst_sample}; float model "
                f"{output.float_max_abs_difference:.2g}), because ranges are found at run time"
            )
