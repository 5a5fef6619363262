"""What every tensor of a model holds over many samples, gathered one sample at a time.

ONNX Runtime's calibrators for entropy and percentile keep every activation of every sample until
the last one has run, and stack them, which fails where samples differ in shape. Here a first pass
finds each tensor's range and a second one counts into the histogram that this range defines: with
the same edges, counts of single samples add up to the counts of all of them. Memory is that of one
sample. What is chosen from a histogram is left to ONNX Runtime's own functions, so the ranges are
theirs to the last bit; `calibration` checks this against the public route before it relies on it.

Apart from `calibration` because nothing here knows of caches or keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationMethod, TensorsData
from onnxruntime.quantization import calibrate as ort_calibrate

from inspector.errors import CalibrationError, RunError
from inspector.model import Model, shown
from inspector.runtime import CPU, Feed, Session

# What `quantize_static` takes where it is told nothing.
DEFAULT_PERCENTILE = 99.999
_ENTROPY_BINS = 128
_PERCENTILE_BINS = 2048

# Initializers of at most so many elements go into shape inference with their values: shapes, axes,
# scales of a Resize.
_SHAPE_VALUES = 4096
_REAL_TYPES = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16})

# A pass over the samples: each with its name, read when it is its turn.
Samples = Iterator[tuple[str, Feed]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeMethod:
    """How a range is chosen from what a tensor held.

    Attributes:
        name: "minmax", "entropy" or "percentile", as ONNX Runtime understands them.
        symmetric: the same distance from zero to both ends; None takes what `quantize_static`
            does, which is True for percentile and False for the others.
        percentile: share of values kept, in percent, for "percentile".
    """

    name: str
    symmetric: bool | None = None
    percentile: float = DEFAULT_PERCENTILE

    @property
    def is_symmetric(self) -> bool:
        """`symmetric`, or the default of `quantize_static`."""
        return self.name == "percentile" if self.symmetric is None else self.symmetric

    @property
    def bins(self) -> int:
        """Bins of the histogram; 0 where none is needed."""
        return {"entropy": _ENTROPY_BINS, "percentile": _PERCENTILE_BINS}.get(self.name, 0)

    @property
    def absolute(self) -> bool:
        """The histogram is one of absolute values."""
        return self.name == "percentile" and self.is_symmetric


def passes_over(methods: Sequence[RangeMethod]) -> int:
    """How often `observe` runs every sample: twice where a method needs histograms, else once."""
    return 2 if any(method.bins for method in methods) else 1


def tensors_to_observe(model: Model, op_types: Sequence[str]) -> tuple[str, ...]:
    """The tensors that ONNX Runtime calibrates, in the order in which the nodes touch them.

    Inputs and outputs of the main graph's nodes of these types (all types where there are none)
    that are float32 or float16, are no initializers, and whose type the file or ONNX's shape
    inference gives.
    """
    proto = onnx.shape_inference.infer_shapes(_without_weights(model.proto))
    graph = proto.graph
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in chain(graph.value_info, graph.output, graph.input)
        if value.type.HasField("tensor_type")
    }
    constants = {tensor.name for tensor in graph.initializer}
    wanted = frozenset(op_types)
    touched = (
        name
        for node in graph.node
        if not wanted or node.op_type in wanted
        for name in chain(node.input, node.output)
    )
    return tuple(
        dict.fromkeys(n for n in touched if kinds.get(n) in _REAL_TYPES and n not in constants)
    )


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy for shape inference, whose large initializers have their type and shape only."""
    light = onnx.ModelProto(ir_version=proto.ir_version)
    light.opset_import.extend(proto.opset_import)
    graph, copy = proto.graph, light.graph
    copy.name = graph.name
    copy.node.extend(graph.node)
    copy.input.extend(graph.input)
    copy.output.extend(graph.output)
    copy.value_info.extend(graph.value_info)
    for tensor in graph.initializer:
        if np.prod(tensor.dims, dtype=np.float64) <= _SHAPE_VALUES:
            copy.initializer.add().CopyFrom(tensor)
        else:
            copy.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    return light


# ------------------------------------------------------------------------------ running the model


@dataclass(frozen=True, kw_only=True, slots=True)
class _Probe:
    """A model that gives its tensors, or the least and the largest value of each.

    Attributes:
        session: the open session.
        ends: by tensor, the outputs that hold its least and its largest value.
    """

    session: Session
    ends: Mapping[str, tuple[str, str]]

    def run(self, feed: Feed, outputs: Sequence[str], sample: str) -> dict[str, NDArray[Any]]:
        try:
            return self.session.run(feed, outputs, sample="it")
        except RunError as error:
            raise CalibrationError(
                f"calibration fails on sample {sample!r}: {error.message}",
                hint="Check the sample against the model's inputs (`quant-inspector show`).",
            ) from error


def _open_probe(model: Model, tensors: Sequence[str], *, ends: bool, values: bool) -> _Probe:
    """A session as ONNX Runtime's calibrators open it: no optimisations, one of its own.

    What the runtime's ReduceMin and ReduceMax make of NaN depends on where it lies, so MinMax has
    to ask them.
    """
    taken = set(chain.from_iterable((*n.input, *n.output) for n in model.proto.graph.node))
    taken.update(v.name for v in (*model.proto.graph.input, *model.proto.graph.output))
    extra = onnx.ModelProto()
    found: dict[str, tuple[str, str]] = {}
    for at, tensor in enumerate(tensors if ends else ()):
        names = []
        for op_type in ("ReduceMin", "ReduceMax"):
            name = f"observed/{at}/{op_type}"
            while name in taken:
                name += "_"
            extra.graph.node.append(helper.make_node(op_type, [tensor], [name], keepdims=1))
            extra.graph.output.add(name=name)
            names.append(name)
        found[tensor] = (names[0], names[1])
    given = {output.name for output in model.proto.graph.output}
    for tensor in tensors if values else ():
        if tensor not in given:
            extra.graph.output.add(name=tensor)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Between the runs numpy works.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if model.external and model.path is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path",
            str(model.path.parent.resolve()),
        )
    session = ort.InferenceSession(
        # Protobuf merges what is written one after the other.
        model.proto.SerializeToString() + extra.SerializePartialToString(),
        options,
        providers=[CPU],
    )
    return _Probe(session=Session(session, model.name), ends=found)


# ------------------------------------------------------------------------------------- collecting


@dataclass(slots=True)
class _Ends:
    """The merged results of ReduceMin and ReduceMax, one element each."""

    low: NDArray[Any] | None = None
    high: NDArray[Any] | None = None

    def add(self, low: NDArray[Any], high: NDArray[Any]) -> None:
        low, high = low.reshape(-1), high.reshape(-1)
        # fmin and fmax leave out NaN where there is a number, as nanmin and nanmax do.
        self.low = low.copy() if self.low is None else np.fmin(self.low, low)
        self.high = high.copy() if self.high is None else np.fmax(self.high, high)


@dataclass(slots=True)
class _Extremes:
    """Running extremes of one tensor; scalars of its own type, None before the first value.

    Attributes:
        low, high: without NaN; NaN where there is nothing else.
        near, far: of the absolute values, NaN where one of them is; only where asked for.
    """

    absolute: bool
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float32))
    low: Any = None
    high: Any = None
    near: Any = None
    far: Any = None

    def add(self, values: NDArray[Any]) -> None:
        self.dtype = values.dtype
        if values.size == 0:
            return
        low, high = values.min(), values.max()
        near, far = low, high
        if np.isnan(low):
            low, high = np.fmin.reduce(values, axis=None), np.fmax.reduce(values, axis=None)
        elif self.absolute:
            far = max(abs(low), abs(high))
            if low >= 0 or high <= 0:
                near = min(abs(low), abs(high))
            elif self.near is not None and self.near == 0:
                near = self.near
            else:
                near = np.absolute(values).min()
        if self.low is None:
            self.low, self.high, self.near, self.far = low, high, near, far
        else:
            self.low, self.high = np.fmin(self.low, low), np.fmax(self.high, high)
            self.near, self.far = np.minimum(self.near, near), np.maximum(self.far, far)

    def unusable(self, method: RangeMethod) -> bool:
        """No histogram can be laid over what was seen so far, whatever follows."""
        if self.low is None:
            return False
        if method.absolute:
            return not (np.isfinite(self.near) and np.isfinite(self.far))
        return bool(np.isinf(self.low) or np.isinf(self.high))


@dataclass(slots=True)
class _Counts:
    """One tensor's histogram, as ONNX Runtime's HistogramCollector holds it.

    Where a tensor's own type cannot tell the edges of the bins apart (most float16 tensors, large
    values close together), ONNX Runtime gives up; the bins are laid in float64 then, and their
    edges rounded afterwards.
    """

    method: RangeMethod
    extremes: _Extremes
    limits: Any = field(init=False)
    dtype: np.dtype[Any] = field(init=False)
    counts: NDArray[Any] = field(init=False)
    edges: NDArray[Any] = field(init=False)
    rest: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        seen, bins = self.extremes, self.method.bins
        self.dtype = seen.dtype
        zero = np.array(0, dtype=seen.dtype)
        low, high = (zero, zero) if seen.low is None else (seen.low, seen.high)
        if self.method.absolute:
            self.limits = None if seen.low is None else (seen.near, seen.far)
            self.rest = (low, high)
        else:
            threshold = np.array(max(abs(low), abs(high)), dtype=seen.dtype)
            self.limits = (-threshold, threshold)
            self.rest = (low, high, threshold)
        try:
            self.counts, edges = np.histogram(np.zeros(0, self.dtype), bins, range=self.limits)
        except ValueError:
            self.dtype = np.dtype(np.float64)
            first, last = (np.float64(limit) for limit in self.limits)
            # numpy widens a single value by 0.5 to both sides, which large ones swallow.
            room = abs(first) / 1024 if first == last else 0
            self.limits = (first - room, last + room)
            self.counts, edges = np.histogram(np.zeros(0, self.dtype), bins, range=self.limits)
        self.edges = edges.astype(seen.dtype, copy=False)

    def add(self, values: NDArray[Any]) -> None:
        counted = np.absolute(values) if self.method.absolute else values
        counted = counted.astype(self.dtype, copy=False)
        self.counts += np.histogram(counted, self.method.bins, range=self.limits)[0]

    def collected(self) -> tuple[Any, ...]:
        return (self.counts, self.edges, *self.rest)


def _choose(method: RangeMethod, histograms: Mapping[str, _Counts]) -> TensorsData:
    """The ranges that ONNX Runtime's own functions choose from histograms."""
    kind = CalibrationMethod.Entropy
    if method.name == "percentile":
        kind = CalibrationMethod.Percentile
    if not histograms:
        return TensorsData(kind, {})
    collector = ort_calibrate.HistogramCollector(
        method=method.name,
        symmetric=method.is_symmetric,
        num_bins=method.bins,
        num_quantized_bins=_ENTROPY_BINS,
        percentile=method.percentile,
        scenario="same",
    )
    collector.histogram_dict = {name: counts.collected() for name, counts in histograms.items()}
    return TensorsData(kind, collector.compute_collection_result())


def _minmax(method: RangeMethod, ends: Mapping[str, _Ends]) -> TensorsData:
    pairs = {}
    for name, seen in ends.items():
        low, high = seen.low, seen.high
        if low is None or high is None:
            continue
        if method.is_symmetric:
            high = np.fmax(np.abs(low), np.abs(high))
            low = -high
        pairs[name] = (low, high)
    return TensorsData(CalibrationMethod.MinMax, pairs)


def observe(
    model: Model,
    samples: Callable[[], Samples],
    methods: Sequence[RangeMethod],
    *,
    op_types: Sequence[str] = (),
) -> list[TensorsData | CalibrationError]:
    """The ranges by each method, as ONNX Runtime's calibrators give them for the same samples.

    Every tensor is a float32 or float16 array of whatever shape it has in a sample; empty ones
    count for nothing. Contents and types are those of ONNX Runtime, up to the sign of a zero. A
    model that draws random numbers gives other values in the second pass; those outside the range
    of the first are not counted.

    Args:
        model: the model, with unique node names.
        samples: called once for each pass (see `passes_over`); gives the same samples each time.
        methods: what to choose ranges by.
        op_types: only tensors that nodes of these types touch; empty for all nodes.

    Returns:
        For each method its ranges by tensor, or the error that it alone ends in: a histogram
        cannot hold infinity, one of absolute values no NaN either, and MinMax takes both.

    Raises:
        CalibrationError: a sample that the model does not run on.
    """
    tensors = tensors_to_observe(model, op_types)
    counting = [m for m in dict.fromkeys(methods) if m.bins]
    plain = len(counting) < len(set(methods))
    absolute = any(m.absolute for m in counting)
    ends = {name: _Ends() for name in tensors}
    extremes = {name: _Extremes(absolute=absolute) for name in tensors}
    failed: dict[RangeMethod, CalibrationError] = {}
    probe = _open_probe(model, tensors, ends=plain, values=bool(counting))

    outputs = [*chain.from_iterable(probe.ends.values()), *(tensors if counting else ())]
    for sample, feed in samples():
        found = probe.run(feed, outputs, sample)
        for name, (least, largest) in probe.ends.items():
            ends[name].add(found[least], found[largest])
        for name in tensors if counting else ():
            extremes[name].add(found.pop(name))
            for method in counting:
                if method not in failed and extremes[name].unusable(method):
                    failed[method] = _not_finite(method, name, sample)
        if failed and not plain and len(failed) == len(counting):
            return [failed[m] for m in methods]
    for method in counting:
        for name, seen in extremes.items():
            if method not in failed and seen.low is not None and np.isnan(seen.low):
                failed[method] = _not_finite(method, name, None)

    counts = {
        method: {name: _Counts(method, extremes[name]) for name in tensors}
        for method in counting
        if method not in failed
    }
    # Methods that choose from one histogram differently share it.
    histograms = {(m.bins, m.absolute): histogram for m, histogram in counts.items()}
    for sample, feed in samples() if histograms and tensors else ():
        found = probe.run(feed, tensors, sample)
        for name in tensors:
            values = found.pop(name).reshape(-1)
            for histogram in histograms.values():
                histogram[name].add(values)
    results: dict[RangeMethod, TensorsData | CalibrationError] = {**failed}
    for method in methods:
        if not method.bins:
            results[method] = _minmax(method, ends)
        elif method not in failed:
            results[method] = _choose(method, histograms[method.bins, method.absolute])
    return [results[method] for method in methods]


def _not_finite(method: RangeMethod, tensor: str, sample: str | None) -> CalibrationError:
    where = "" if sample is None else f", first on sample {sample!r}"
    return CalibrationError(
        f"calibration with method {method.name} fails: tensor {shown(tensor)} inside the model is "
        f"infinite or NaN on the calibration feeds{where}",
        hint="Calibrate with --method minmax, and leave the nodes around that tensor in float.",
    )
