"""Float against quantized: every matched weight, activation and output, streamed over the feeds.

Activations never outlive their sample: only sums are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.comparison import (
    ActivationError,
    Comparison,
    Latency,
    ModelFile,
    OutputError,
    SliceError,
    Task,
    Unmatched,
    WeightError,
)
from inspector.errors import ModelError
from inspector.feeds import Feeds
from inspector.matching import (
    ActivationPair,
    Matching,
    WeightPair,
    activation_channel_axis,
    match_tensors,
    rectify,
)
from inspector.metrics import ErrorTotals, decibels, merge_totals, powers, worst_and_median
from inspector.model import FLOAT_DTYPES, Model
from inspector.qparams import QParams
from inspector.runtime import Feed, Progress, Session, no_progress, open_session
from inspector.scheme import COMPUTES_IN_INTEGERS, quant_formats, stored_values
from inspector.stats import saturated_counts
from inspector.timing import measure_latency as time_sessions

# -- weights -----------------------------------------------------------------------------------


def plain(values: NDArray[Any]) -> Any:
    """One Python number, or a tuple of them, as records hold scales and zero points."""
    return values.item() if values.ndim == 0 or values.size == 1 else tuple(values.ravel().tolist())


def _scale_and_zero_point(qparams: QParams | None) -> tuple[Any, Any]:
    return (None, None) if qparams is None else (plain(qparams.scale), plain(qparams.zero_point))


def _weight_error(pair: WeightPair, quantized_model: Model) -> WeightError | Unmatched:
    reference = pair.reference()
    if pair.quantized is None:
        actual = quantized_model.constant(pair.quantized_name)
        dtype, axis, qparams = str(reference.dtype.name), None, None
        if actual is not None:
            dtype = str(actual.dtype.name)
    else:
        qparams = pair.quantized.qparams
        actual = stored_values(quantized_model, pair.quantized)
        dtype, axis = qparams.dtype, qparams.axis
    if actual is None:
        reason = f"the values of {pair.quantized_name} cannot be read"
        return Unmatched(name=pair.name, kind=pair.kind, model="float", reason=reason)
    if actual.shape != reference.shape:
        reason = f"shapes differ: float {reference.shape}, quantized {actual.shape}"
        return Unmatched(name=pair.name, kind=pair.kind, model="float", reason=reason)
    channel_axis = pair.channel_axis if pair.channel_axis is not None else axis
    totals = ErrorTotals.of(reference, actual, channel_axis)
    channels = totals.channel_sqnr_db if channel_axis is not None else np.array([])
    worst, median, worst_channel = worst_and_median(channels)
    absmax: tuple[float, ...] = ()
    if channel_axis is not None and reference.size:
        others = tuple(a for a in range(reference.ndim) if a != channel_axis)
        absmax = tuple(np.abs(reference.astype(np.float64)).max(axis=others).tolist())
    scale, zero_point = _scale_and_zero_point(qparams)
    return WeightError(
        name=pair.name,
        node=pair.node.name,
        op_type=pair.node.op_type,
        kind=pair.kind,
        quantized_name=pair.quantized_name,
        dtype=dtype,
        shape=tuple(reference.shape),
        axis=axis,
        channel_axis=channel_axis,
        scale=scale,
        zero_point=zero_point,
        sqnr_db=totals.sqnr_db,
        worst_channel_sqnr_db=worst,
        median_channel_sqnr_db=median,
        worst_channel=worst_channel,
        channel_sqnr_db=tuple(channels.tolist()),
        channel_absmax=absmax,
        max_abs_error=totals.max_abs_error,
        mse=totals.mse,
        cosine_similarity=totals.cosine_similarity,
        matched_by=pair.matched_by,
        note=pair.note,
    )


def compare_weights(
    matching: Matching, quantized_model: Model
) -> tuple[tuple[WeightError, ...], tuple[Unmatched, ...]]:
    """Every matched weight and bias, and those that could not be compared after all."""
    found = [_weight_error(pair, quantized_model) for pair in matching.weights]
    return (
        tuple(w for w in found if isinstance(w, WeightError)),
        tuple(w for w in found if isinstance(w, Unmatched)),
    )


# -- activations -------------------------------------------------------------------------------


class _Watch:
    """The running sums of one activation pair."""

    def __init__(self, pair: ActivationPair, float_model: Model) -> None:
        self.pair = pair
        self.model = float_model
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

    def add(
        self,
        reference: NDArray[Any],
        before: NDArray[Any] | None,
        after: NDArray[Any],
        float_values: Mapping[str, NDArray[Any]],
    ) -> None:
        if self.broken:
            return
        qparams = self.pair.qparams
        if self.pair.integers and qparams is not None:
            after = qparams.dequantize(after)
        if reference.shape != after.shape:
            self.broken = f"shapes differ: float {reference.shape}, quantized {after.shape}"
            return
        if self.accumulated is None:
            self.shape = tuple(reference.shape)
            self.axis = activation_channel_axis(self.model, self.pair.name, reference.ndim)
            self.parts = self._parts(float_values)
        axis = self.axis
        if axis is not None and reference.shape[axis] != self.shape[axis]:
            self.ragged = True
        reference = np.asarray(reference, np.float64)
        after = np.asarray(after, np.float64)
        totals = ErrorTotals.of(reference, after, None if self.ragged else axis)
        self.accumulated = totals if self.accumulated is None else self.accumulated.merge(totals)
        if reference.size:
            others = tuple(a for a in range(reference.ndim) if a != axis)
            with np.errstate(invalid="ignore"):
                low, high = reference.min(axis=others), reference.max(axis=others)
            if self.ragged or axis is None:
                low, high = low.min(keepdims=True), high.max(keepdims=True)
                low, high = low.reshape(-1)[:1], high.reshape(-1)[:1]
            if self.low is None or self.high is None:
                self.low, self.high = np.atleast_1d(low), np.atleast_1d(high)
            elif self.low.shape == np.shape(low):
                self.low, self.high = np.fmin(self.low, low), np.fmax(self.high, high)
            else:
                self.low = np.atleast_1d(min(float(self.low.min()), float(low.min())))
                self.high = np.atleast_1d(max(float(self.high.max()), float(high.max())))
        if before is not None and qparams is not None and before.shape == after.shape:
            real = rectify(before, self.pair.rectifier, self.model)
            self.local += powers(real, after)
            self.saturated += saturated_counts(real, qparams)
            self.count += int(real.size)

    def _parts(self, float_values: Mapping[str, NDArray[Any]]) -> list[tuple[str, int, int]] | None:
        """Where each input of the Concat that makes this tensor lies along its axis."""
        node = self.model.producers.get(self.pair.name)
        if node is None or node.op_type != "Concat" or self.axis is None:
            return None
        parts, start = [], 0
        for name in node.inputs:
            value = float_values.get(name)
            shape = value.shape if value is not None else (self.model.info(name).shape or ())
            size = shape[self.axis] if self.axis < len(shape) else None
            if not isinstance(size, int):
                return None
            parts.append((name, start, start + size))
            start += size
        return parts if start == self.shape[self.axis] else None

    def slices(self) -> tuple[SliceError, ...]:
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
                    max(np.abs(self.low[start:stop]).max(), np.abs(self.high[start:stop]).max())
                ),
            )
            for name, start, stop in self.parts
            if stop > start
        )

    def channels(self) -> NDArray[np.float64]:
        if self.accumulated is None or self.axis is None or self.ragged:
            return np.array([])
        return self.accumulated.channel_sqnr_db

    def error(self, output_names: frozenset[str]) -> ActivationError | Unmatched:
        pair, totals = self.pair, self.accumulated
        if totals is None or self.broken:
            reason = self.broken or "no sample reached it"
            return Unmatched(name=pair.name, kind="activation", model="float", reason=reason)
        channels = self.channels()
        worst, median, worst_channel = worst_and_median(channels)
        scale, zero_point = _scale_and_zero_point(pair.qparams)
        low = high = math.nan
        if self.low is not None and self.high is not None:
            low, high = float(np.min(self.low)), float(np.max(self.high))
        known = self.low is not None and self.low.size == channels.size
        share: tuple[float, float] | None = None
        if self.count:
            share = (float(self.saturated[0] / self.count), float(self.saturated[1] / self.count))
        representable = pair.qparams.representable_range() if pair.qparams is not None else None
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
            nonfinite_quantized=totals.nonfinite_actual,
            is_output=pair.name in output_names,
            matched_by=pair.matched_by,
            note=pair.note,
        )


class PairRunner:
    """Both models, opened so that one feed gives the tensors of every pair.

    Holds no activation: each call returns those of one feed.
    """

    def __init__(
        self,
        float_model: Model,
        quantized_model: Model,
        matching: Matching,
        pairs: Sequence[ActivationPair] | None = None,
    ) -> None:
        self.matching = matching
        wanted = matching.activations if pairs is None else pairs
        self._float = _debug_session(float_model, [p.name for p in wanted])
        q_names = [n for p in wanted for n in (p.before, p.after) if n]
        self._quantized = _debug_session(quantized_model, q_names)
        self.float_outputs = tuple(matching.outputs)
        self.pairs = tuple(p for p in wanted if self._observable(p))
        inputs = {i.name for i in float_model.inputs}
        self._float_names = [
            n
            for n in dict.fromkeys((*(p.name for p in self.pairs), *self.float_outputs))
            if n not in inputs
        ]
        q_inputs = {i.name for i in quantized_model.inputs}
        self._quantized_names = [
            n
            for n in dict.fromkeys(
                (
                    *(n for p in self.pairs for n in (p.before, p.after) if n),
                    *matching.outputs.values(),
                )
            )
            if n not in q_inputs
        ]

    def _observable(self, pair: ActivationPair) -> bool:
        """Only floating-point values are compared; shapes and indices are not quantized."""
        floats = ("tensor(float)", "tensor(float16)", "tensor(double)")
        dtype = self._float.output_dtypes.get(pair.name)
        return dtype is None or dtype in floats

    def run(
        self, feed: Feed, sample: str
    ) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """The float model's and the quantized model's tensors by name, for one feed."""
        renamed = {self.matching.inputs.get(k, k): v for k, v in feed.items()}
        reference = dict(feed) | self._float.run(feed, self._float_names, sample=sample)
        actual = dict(renamed) | self._quantized.run(renamed, self._quantized_names, sample=sample)
        return reference, actual


def _debug_session(model: Model, tensors: Sequence[str]) -> Session:
    inputs = {i.name for i in model.inputs}
    names = [t for t in dict.fromkeys(tensors) if t in model.producers and t not in inputs]
    return open_session(model.with_outputs(names), optimized=False, name=model.name)


# -- the whole ---------------------------------------------------------------------------------


def check_pair(float_model: Model, quantized_model: Model) -> None:
    """Refuses two files that cannot be a float model and its quantized twin.

    Raises:
        ModelError: the same file twice, the two swapped, or a float side that is quantized.
    """
    left, right = quant_formats(float_model), quant_formats(quantized_model)
    if float_model.sha256 and float_model.sha256 == quantized_model.sha256:
        raise ModelError(
            f"{float_model.name} and {quantized_model.name} hold the same bytes, "
            "expected a float model and its quantized twin",
            hint="Name the float file first and the quantized file second.",
        )
    if COMPUTES_IN_INTEGERS.intersection(left):
        swapped = not COMPUTES_IN_INTEGERS.intersection(right)
        raise ModelError(
            f"the float model {float_model.name} is quantized ({'+'.join(left)})"
            + (f" and {quantized_model.name} is not: they are swapped" if swapped else ""),
            hint="Name the float file first and the quantized file second.",
        )
    if len(float_model.inputs) != len(quantized_model.inputs):
        raise ModelError(
            f"{float_model.name} has {len(float_model.inputs)} inputs "
            f"({', '.join(i.name for i in float_model.inputs)}), {quantized_model.name} has "
            f"{len(quantized_model.inputs)} ({', '.join(i.name for i in quantized_model.inputs)})",
            hint="Load the float model that this quantized model was made from.",
        )
    for info, twin in zip(float_model.inputs, quantized_model.inputs, strict=True):
        if info.shape is None or twin.shape is None:
            continue
        both = [
            (a, b)
            for a, b in zip(info.shape, twin.shape, strict=False)
            if isinstance(a, int) and isinstance(b, int)
        ]
        if len(info.shape) != len(twin.shape) or any(a != b for a, b in both):
            raise ModelError(
                f"input {info.name}: {float_model.name} takes {list(info.shape)}, "
                f"{quantized_model.name} takes {list(twin.shape)}",
                hint="Load two models of the same input shape.",
            )


def _check_related(
    float_model: Model, quantized_model: Model, weights: Sequence[WeightError]
) -> None:
    weighted = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (1,), "MatMul": (0, 1)}
    names = {
        node.inputs[at]
        for node in float_model.nodes
        for at in weighted.get(node.op_type, ())
        if at < len(node.inputs)
        and node.inputs[at] in float_model.constant_names
        and float_model.info(node.inputs[at]).dtype in (*FLOAT_DTYPES, "unknown")
    }
    matched = names & {w.name for w in weights}
    if names and len(matched) * 2 < len(names):
        raise ModelError(
            f"only {len(matched)} of {len(names)} weights of {float_model.name} have a partner in "
            f"{quantized_model.name}: these look like unrelated models",
            hint="Load the float model that this quantized model was made from.",
        )


def model_file(model: Model) -> ModelFile:
    """What identifies a loaded file in a comparison."""
    return ModelFile(
        path=model.name,
        sha256=model.sha256,
        size_bytes=model.size_bytes,
        quant_format="+".join(quant_formats(model)),
    )


def _seen_label(seen: Sequence[bool] | None) -> str:
    if seen is None:
        return "unknown"
    if all(seen):
        return "seen"
    return "mixed" if any(seen) else "unseen"


class _OutputWatch:
    def __init__(self, name: str, watch: _Watch | None, output_step: float | None) -> None:
        self.name = name
        self.watch = watch
        self.output_step = output_step
        self.simulated: list[ErrorTotals] = []
        self.deployed: list[ErrorTotals] = []
        self.differs = False

    def add(
        self,
        reference: NDArray[Any],
        simulated: NDArray[Any],
        deployed_reference: NDArray[Any],
        deployed: NDArray[Any],
    ) -> None:
        self.simulated.append(ErrorTotals.of(reference, simulated))
        self.deployed.append(ErrorTotals.of(deployed_reference, deployed))
        if simulated.size and self.output_step is not None:
            with np.errstate(invalid="ignore"):
                apart = np.abs(simulated.astype(np.float64) - deployed)
            self.differs |= bool(np.nanmax(apart) > 3 * self.output_step)
        if simulated.ndim and simulated.size == simulated.shape[-1] > 1:
            # One vector per sample: its largest element is the choice.
            self.differs |= bool(np.argmax(simulated) != np.argmax(deployed))

    def error(self, sample_names: Sequence[str], seen: Sequence[bool] | None) -> OutputError:
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
            deployed_sqnr_db=merge_totals(self.deployed).sqnr_db,
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
        )


class _TaskWatch:
    """Top-1 of both models against labels, on the first output with enough classes."""

    def __init__(self, labels: Sequence[int]) -> None:
        self.labels = labels
        self.output = ""
        self.right_float = self.right_quantized = self.agree = self.samples = 0

    def add(
        self, at: int, reference: Mapping[str, NDArray[Any]], actual: Mapping[str, NDArray[Any]]
    ) -> None:
        if not self.output:
            most = max(self.labels)
            fitting = [
                n for n, v in reference.items() if v.ndim and v.shape[-1] > max(1, most)
                and v.size == v.shape[-1]
            ]  # fmt: skip
            if not fitting:
                return
            self.output = fitting[0]
        a = int(np.argmax(reference[self.output]))
        b = int(np.argmax(actual[self.output]))
        self.samples += 1
        self.right_float += a == self.labels[at]
        self.right_quantized += b == self.labels[at]
        self.agree += a == b

    def task(self) -> Task | None:
        if not self.samples:
            return None
        return Task(
            output=self.output,
            samples=self.samples,
            top1_float=self.right_float / self.samples,
            top1_quantized=self.right_quantized / self.samples,
            top1_agreement=self.agree / self.samples,
        )


def _feed_warnings(at: str, feed: Feed) -> list[str]:
    found = []
    for name, value in feed.items():
        if value.dtype.kind == "f":
            bad = int(value.size - np.count_nonzero(np.isfinite(value)))
            if bad:
                found.append(
                    f"sample {at}: input {name} holds {bad} NaN or infinite values of {value.size}"
                )
    return found


def compare_models(
    float_model: Model,
    quantized_model: Model,
    feeds: Feeds,
    *,
    seen: Sequence[bool] | None = None,
    measure_latency: bool = True,
    progress: Progress = no_progress,
) -> Comparison:
    """Every matched weight, activation and output of two models, over all feeds.

    Activations are compared with optimisations off (simulated), outputs also with all
    optimisations on (deployed; both models). One sample's activations are held at a time.

    Args:
        float_model: the float model.
        quantized_model: its quantized twin.
        feeds: at least one.
        seen: for each feed whether it was used in calibration; None where that is unknown.
        measure_latency: time both models, deployed, on the first feed.
        progress: see `runtime.Progress`.

    Raises:
        ModelError: the two files cannot be a float model and its quantized twin.
        RunError: the runtime refuses a model or a feed.
    """
    check_pair(float_model, quantized_model)
    progress(0.0, "matching tensors")
    matching = match_tensors(float_model, quantized_model)
    weights, lost_weights = compare_weights(matching, quantized_model)
    _check_related(float_model, quantized_model, weights)
    progress(0.05, "opening sessions")
    runner = PairRunner(float_model, quantized_model, matching)
    deployed = open_session(quantized_model, optimized=True)
    deployed_float = open_session(float_model, optimized=True)
    watches = {p.name: _Watch(p, float_model) for p in runner.pairs}
    outputs = {}
    for name in matching.outputs:
        watch = watches.get(name)
        scale = watch.pair.qparams.scale if watch and watch.pair.qparams else None
        step = float(np.max(scale)) if scale is not None else None
        outputs[name] = _OutputWatch(name, watch, step)
    task = _TaskWatch(feeds.labels) if feeds.labels else None
    warnings = [*float_model.notes, *matching.notes, *feeds.notes]
    skipped_outputs: set[str] = set()
    first: Feed | None = None
    for at, feed in enumerate(feeds):
        sample = feeds.names[at]
        progress(0.1 + 0.8 * at / len(feeds), f"comparing sample {at + 1} of {len(feeds)}")
        first = feed if first is None else first
        warnings += _feed_warnings(sample, feed)
        reference, actual = runner.run(feed, sample)
        for pair in runner.pairs:
            if pair.name in reference and pair.after in actual:
                before = actual.get(pair.before) if pair.before else None
                watches[pair.name].add(reference[pair.name], before, actual[pair.after], reference)
        renamed = {matching.inputs.get(k, k): v for k, v in feed.items()}
        shipped = deployed.run(renamed, sample=sample)
        shipped_float = deployed_float.run(feed, sample=sample)
        for name, other in matching.outputs.items():
            pair_of = (reference[name], actual[other])
            if not _comparable(*pair_of):
                skipped_outputs.add(name)
                continue
            outputs[name].add(*pair_of, shipped_float[name], shipped[other])
        if task is not None:
            task.add(
                at,
                {n: reference[n] for n in matching.outputs},
                {n: actual[o] for n, o in matching.outputs.items()},
            )
        del reference, actual
    latency = None
    if measure_latency and first is not None:
        progress(0.92, "timing both models")
        renamed = {matching.inputs.get(k, k): v for k, v in first.items()}
        a, b = time_sessions([deployed_float, deployed], [first, renamed])
        latency = Latency(
            float_seconds=a.median_seconds,
            quantized_seconds=b.median_seconds,
            float_spread_seconds=a.spread_seconds,
            quantized_spread_seconds=b.spread_seconds,
            runs=a.runs,
        )
    output_names = frozenset(o.name for o in float_model.outputs)
    results = [w.error(output_names) for w in watches.values()]
    activations = tuple(r for r in results if isinstance(r, ActivationError))
    compared = tuple(o.error(feeds.names, seen) for o in outputs.values() if o.simulated)
    for name in sorted(skipped_outputs):
        warnings.append(f"output {name} is not compared: it holds no floating-point values")
    warnings += [
        f"output {o.name}: simulated and deployed values differ by more than 3 output steps "
        "or choose another largest element"
        for o in compared
        if o.deployed_differs
    ]
    first_bad = next((a for a in activations if a.nonfinite_quantized or a.nonfinite_float), None)
    if first_bad is not None:
        who = "the float model" if first_bad.nonfinite_float else "the quantized model"
        warnings.append(
            f"tensor {first_bad.name} ({first_bad.op_type}) is the first with NaN or infinite "
            f"values, in {who}: its figures and those behind it are unknown"
        )
    if task is not None and task.task() is None:
        warnings.append("labels are given, but no output has as many classes: no top-1 figures")
    progress(1.0, "compared")
    return Comparison(
        float_model=model_file(float_model),
        quantized_model=model_file(quantized_model),
        samples=len(feeds),
        sample_names=tuple(feeds.names),
        random_feeds=feeds.random,
        seen=_seen_label(seen),
        weights=weights,
        activations=activations,
        outputs=compared,
        unmatched=(
            *matching.unmatched,
            *lost_weights,
            *(r for r in results if isinstance(r, Unmatched)),
        ),
        task=task.task() if task is not None else None,
        latency=latency,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _comparable(reference: NDArray[Any], actual: NDArray[Any]) -> bool:
    return (
        reference.dtype.kind == "f" and actual.dtype.kind == "f" and reference.shape == actual.shape
    )
