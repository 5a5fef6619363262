"""Binned values of one tensor in both models: histograms, error histogram and map.

What a tensor's pictures are drawn from, small enough to be kept with a run. Apart from `compare`,
which goes over all tensors in one pass: one tensor is run again when somebody looks at it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.comparison import Comparison
from inspector.distribution import Distribution
from inspector.errors import ReportError
from inspector.feeds import Feeds
from inspector.matching import ActivationPair, Matching, WeightPair, rectify
from inspector.model import Model
from inspector.padding import Padding
from inspector.pairs import PairRunner, feed_for_quantized
from inspector.qparams import INTEGER_DTYPES, QParams
from inspector.runtime import Progress, part_of
from inspector.scheme import stored_values
from inspector.states import Carried
from inspector.stats import Histogram, saturated_counts
from inspector.watches import in_float_layout, plain, real_values

HISTOGRAM_BINS = 192
MAP_BINS = 96


def weight_detail(pair: WeightPair, quantized: Model) -> dict[str, Any]:
    """A weight's values in both models.

    Args:
        pair: the weight.
        quantized: the quantized model.

    Raises:
        ReportError: its values cannot be read, or the two have other shapes.
    """
    reference = pair.reference()
    qparams = pair.quantized.qparams if pair.quantized is not None else None
    actual = (
        stored_values(quantized, pair.quantized)
        if pair.quantized is not None
        else quantized.constant(pair.quantized_name)
    )
    if actual is None:
        raise ReportError(
            f"the values of {pair.quantized_name} cannot be read",
            hint="Choose another tensor from the table on the overview.",
        )
    _check_shapes(pair.name, pair.quantized_name, reference, actual)
    finite = reference[np.isfinite(reference)]
    low = float(finite.min()) if finite.size else 0.0
    high = float(finite.max()) if finite.size else 0.0
    _, _, spread = _finite_ranges([(reference, actual, None)])
    bins = _Bins(low, high, qparams, spread)
    bins.add(reference, actual, reference if qparams is not None else None)
    return bins.detail(pair.name, pair.node.name, pair.kind)


def activation_detail(
    pair: ActivationPair,
    comparison: Comparison,
    float_model: Model,
    quantized: Model,
    feeds: Feeds,
    matching: Matching,
    progress: Progress,
) -> dict[str, Any]:
    """An activation's values on the feeds that a comparison saw, with its mask and its states.

    Args:
        pair: the activation.
        comparison: of both models.
        float_model: the float model.
        quantized: the quantized model.
        feeds: those of the comparison.
        matching: of both models.
        progress: see `runtime.Progress`.

    Raises:
        ReportError: the two tensors have other shapes.
    """
    known = next(a for a in comparison.activations if a.name == pair.name)
    runner = PairRunner(float_model, quantized, matching, [pair])
    padding = Padding(float_model, comparison.mask) if comparison.mask else None
    if padding is not None:
        masks = [padding.mask_of(feed, feeds.names[at]) for at, feed in enumerate(feeds)]
        for at in padding.telling(masks):
            padding.learn(masks[at], runner.run(feeds[at], feeds.names[at])[0])
    theirs = [(matching.outputs[o], matching.inputs[i]) for o, i in comparison.states]

    def values(told: Progress) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]]:
        """Float values, what consumers read, and the latter before its Q, part by part."""
        states = Carried(comparison.states), Carried(theirs)
        for at, feed in enumerate(feeds):
            told(at / len(feeds), f"sample {at + 1} of {len(feeds)}")
            name = feeds.names[at]
            its_feed = states[1].into(feed_for_quantized(matching, feed), name)
            reference, actual = runner.run(states[0].into(feed, name), name, its_feed)
            states[0].keep(reference)
            states[1].keep(actual)
            after = real_values(pair, actual[pair.after])
            before = actual.get(pair.before) if pair.before else None
            if before is not None:
                before = rectify(in_float_layout(pair, before), pair.rectifiers, float_model)
            _check_shapes(pair.name, pair.after, reference[pair.name], after)
            if padding is None:
                yield reference[pair.name], after, before
                continue
            padding.use(padding.mask_of(feed, name))
            parts = [padding.parts(pair.name, a) for a in (reference[pair.name], after)]
            befores: list[Any] = [None] * len(parts[0])
            if before is not None:
                befores = padding.parts(pair.name, before)
            yield from zip(*parts, befores, strict=True)

    low, high, spread = known.observed_low, known.observed_high, known.max_abs_error
    start = 0.1
    if not all(map(math.isfinite, (low, high, spread))):
        start = 0.55
        low, high, spread = _finite_ranges(values(part_of(progress, 0.1, start)))
    elif math.isfinite(known.mse):
        spread = min(spread, 8 * math.sqrt(known.mse))
    bins = _Bins(low, high, pair.qparams, spread)
    for arrays in values(part_of(progress, start, 1.0)):
        bins.add(*arrays)
    return bins.detail(pair.name, pair.node.name if pair.node else "", "activation")


def _finite_ranges(
    values: Iterable[tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]],
) -> tuple[float, float, float]:
    """Lowest and highest finite float value and the largest finite error; zeros for none."""
    low, high, spread = math.inf, -math.inf, 0.0
    for reference, actual, _ in values:
        finite = reference[np.isfinite(reference)].astype(np.float64)
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
        both = np.isfinite(reference) & np.isfinite(actual)
        error = np.abs(reference[both].astype(np.float64) - actual[both])
        spread = max(spread, float(error.max(initial=0.0)))
    return (low, high, spread) if low <= high else (0.0, 0.0, spread)


def _check_shapes(name: str, other: str, reference: NDArray[Any], actual: NDArray[Any]) -> None:
    if reference.shape != actual.shape:
        raise ReportError(
            f"the values of {other} ({list(actual.shape)}) cannot be set against {name} "
            f"({list(reference.shape)})",
            hint="Choose another tensor, or pin this one to a tensor of its own shape.",
        )


class _Bins:
    """The counts behind a tensor's pictures, summed over samples."""

    def __init__(self, low: float, high: float, qparams: QParams | None, spread: float) -> None:
        self.qparams = qparams
        self.step = float(qparams.scale) if qparams is not None and qparams.per_tensor else None
        low = low if math.isfinite(low) else 0.0
        high = high if math.isfinite(high) else 0.0
        edges = _edges(low, high, qparams)
        self.values = _empty(edges)
        self.distribution = Distribution.over(low, high)
        self.quantized = _empty(edges)
        unit = self.step or 1.0
        reach = spread / unit
        reach = max(reach, 0.5) if self.step else (reach or 1e-12)
        self.errors = _empty(np.linspace(-1.02 * reach, 1.02 * reach, 122))
        self.map_edges = np.linspace(edges[0], edges[-1], MAP_BINS + 1)
        self.map = np.zeros((MAP_BINS, MAP_BINS), np.int64)
        self.saturated = np.zeros(2, np.int64)
        self.before = 0
        self.count = 0

    def add(
        self, reference: NDArray[Any], actual: NDArray[Any], before: NDArray[Any] | None
    ) -> None:
        reference = reference.astype(np.float64)
        actual = actual.astype(np.float64)
        self.values = self.values.merge(Histogram.of(reference, self.values.edges))
        self.distribution = self.distribution.with_values(reference)
        self.quantized = self.quantized.merge(Histogram.of(actual, self.quantized.edges))
        with np.errstate(invalid="ignore"):
            error = (actual - reference) / (self.step or 1.0)
        self.errors = self.errors.merge(Histogram.of(error, self.errors.edges))
        finite = np.isfinite(reference) & np.isfinite(actual)
        counts, _, _ = np.histogram2d(
            reference[finite], actual[finite], [self.map_edges, self.map_edges]
        )
        self.map += counts.astype(np.int64)
        self.count += int(reference.size)
        if before is not None and self.qparams is not None:
            self.saturated += saturated_counts(before, self.qparams)
            self.before += int(before.size)

    def detail(self, tensor: str, node: str, kind: str) -> dict[str, Any]:
        qparams = self.qparams
        return {
            "tensor": tensor,
            "node": node,
            "kind": kind,
            "dtype": qparams.dtype if qparams is not None else "float32",
            "scale": None if qparams is None else plain(qparams.scale),
            "zero_point": None if qparams is None else plain(qparams.zero_point),
            "axis": None if qparams is None else qparams.axis,
            "edges": self.values.edges.tolist(),
            "float_counts": self.values.counts.tolist(),
            "quantized_counts": self.quantized.counts.tolist(),
            "float_below": self.values.below,
            "float_above": self.values.above,
            "quantized_below": self.quantized.below,
            "quantized_above": self.quantized.above,
            "error_edges": self.errors.edges.tolist(),
            "error_counts": self.errors.counts.tolist(),
            "error_below": self.errors.below,
            "error_above": self.errors.above,
            "error_unit": "steps" if self.step else "real",
            "map_float_edges": self.map_edges.tolist(),
            "map_quantized_edges": self.map_edges.tolist(),
            "map_counts": self.map.tolist(),
            "representable": None if qparams is None else list(qparams.representable_range()),
            "saturated": (self.saturated / self.before).tolist() if self.before else None,
            "distribution": self.distribution.to_json(),
            "count": self.count,
            "nonfinite": self.values.nonfinite + self.quantized.nonfinite,
        }


def _empty(edges: NDArray[np.float64]) -> Histogram:
    return Histogram(edges=edges, counts=np.zeros(edges.size - 1, np.int64))


def _edges(low: float, high: float, qparams: QParams | None) -> NDArray[np.float64]:
    """Bin edges over the observed range; between integer codes where there is one step size.

    Bins of whole steps keep the codes from beating against the bins.
    """
    if qparams is None or not qparams.per_tensor or not float(qparams.scale) > 0:
        margin = 0.02 * (high - low) or max(abs(low), 1.0) * 0.02
        return np.linspace(low - margin, high + margin, HISTOGRAM_BINS + 1)
    step = float(qparams.scale)
    qmin, qmax = INTEGER_DTYPES[qparams.dtype]
    zero = int(qparams.zero_point)
    first = math.floor(low / step) - 1
    last = math.ceil(high / step) + 1
    # A range far wider than the data would leave the picture empty: show twice the data at most.
    reach = max(last - first, 4)
    first = min(first, max(qmin - zero, first - reach // 2))
    last = max(last, min(qmax - zero, last + reach // 2))
    per_bin = max(1, math.ceil((last - first) / HISTOGRAM_BINS))
    bins = math.ceil((last - first + 1) / per_bin)
    return np.asarray((first - 0.5 + per_bin * np.arange(bins + 1)) * step, np.float64)
