"""What a comparison of a float and a quantized model holds.

Apart from the pass that fills these records (`compare`), because pages, figures and texts show
them without loading ONNX or its runtime. Names are the float model's; directions are in `metrics`.
Local and accumulated error are defined in the README's glossary.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Below 20 dB an output is worth a look.
LOOK_DB = 20.0
# A part this far below the whole is hidden by the pooled figure.
FAR_BELOW_DB = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceError:
    """The part of a Concat that came from one of its inputs.

    Attributes:
        source: the float tensor that was joined.
        start: first channel along the Concat's axis.
        stop: one after the last.
        sqnr_db: accumulated SQNR of this part.
        absmax: largest absolute float value in this part.
    """

    source: str
    start: int
    stop: int
    sqnr_db: float
    absmax: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightError:
    """A constant of the float model against what the quantized model reads in its place.

    Attributes:
        name: the float model's tensor.
        node: the float model's (first) node that reads it.
        op_type: that node's.
        kind: "weight" or "bias".
        quantized_name: the quantized model's tensor.
        dtype: stored integer type; the float type where it was left in float.
        shape: of the float tensor.
        axis: channel axis of the scales, None per tensor.
        channel_axis: output-channel axis of the node, for the per-channel figures.
        scale: one value, or one per channel; None where left in float.
        zero_point: like `scale`.
        sqnr_db, max_abs_error, mse, cosine_similarity: over the whole tensor.
        channel_sqnr_db: SQNR per output channel.
        channel_absmax: largest absolute float value per output channel.
        worst_channel: index of the lowest channel SQNR, None where there are no channels.
        matched_by: "name", "structure" or "content".
        note: what has to be known ("" for nothing), e.g. a folded BatchNormalization.
        scope: the body of an If, Loop or Scan that holds the quantized model's tensor; "" for the
            main graph.
        in_body: the float model's tensor lies in such a body, whose tensors `MatchCounts` leaves
            out.
    """

    name: str
    node: str
    op_type: str
    kind: str
    quantized_name: str
    dtype: str
    shape: tuple[int, ...]
    axis: int | None
    channel_axis: int | None
    scale: float | tuple[float, ...] | None
    zero_point: int | tuple[int, ...] | None
    sqnr_db: float
    worst_channel_sqnr_db: float
    median_channel_sqnr_db: float
    worst_channel: int | None
    channel_sqnr_db: tuple[float, ...]
    channel_absmax: tuple[float, ...]
    max_abs_error: float
    mse: float
    cosine_similarity: float
    matched_by: str
    note: str = ""
    scope: str = ""
    in_body: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationError:
    """A computed tensor of the float model against what the quantized model's consumers read.

    Attributes:
        name: the float model's tensor.
        node: the float model's node that computes it ("" for a graph input).
        op_type: that node's ("Input" for a graph input).
        depth: position of that node in topological order, -1 for a graph input.
        quantized_name: the quantized model's tensor, after its DequantizeLinear where it has one.
        dtype: stored integer type; the float type where it has no Q/DQ pair.
        shape: of the first sample.
        scale, zero_point: per tensor or per channel; None where it has no Q/DQ pair.
        local_sqnr_db: before against after its own Q/DQ; None where it has no Q/DQ pair.
        accumulated_sqnr_db: the float model's tensor against the quantized model's.
        channel_axis: axis of the per-channel figures, None where samples are ragged.
        channel_sqnr_db: accumulated SQNR per channel.
        channel_low, channel_high: observed float range per channel.
        slices: for a Concat, each input's part.
        saturated_fraction: share of values clipped (low + high), 0..1; None without a Q/DQ pair.
        saturated_low_fraction, saturated_high_fraction: the two ends apart.
        observed_low, observed_high: range of the float tensor over all samples.
        representable_low, representable_high: what the scale and zero point can hold.
        nonfinite_float, nonfinite_quantized: NaN and infinite elements seen.
        is_output: it is a graph output.
        matched_by, note: as for `WeightError`.
        isolated_sqnr_db: the float model's tensor against the quantized node's output before its
            own Q, rectified, when it reads the float model's tensors (quantized as it reads them);
            None for a graph input and where it was not computed.
        added_sqnr_db: what the quantized model's consumers read against what the float node makes
            of the tensors that the quantized node read, relative to the float model's tensor; None
            as for `isolated_sqnr_db`.
    """

    name: str
    node: str
    op_type: str
    depth: int
    quantized_name: str
    dtype: str
    shape: tuple[int, ...]
    scale: float | tuple[float, ...] | None
    zero_point: int | tuple[int, ...] | None
    local_sqnr_db: float | None
    accumulated_sqnr_db: float
    worst_channel_sqnr_db: float
    median_channel_sqnr_db: float
    worst_channel: int | None
    channel_axis: int | None
    channel_sqnr_db: tuple[float, ...]
    channel_low: tuple[float, ...]
    channel_high: tuple[float, ...]
    slices: tuple[SliceError, ...]
    cosine_similarity: float
    mse: float
    max_abs_error: float
    saturated_fraction: float | None
    saturated_low_fraction: float | None
    saturated_high_fraction: float | None
    observed_low: float
    observed_high: float
    representable_low: float | None
    representable_high: float | None
    nonfinite_float: int
    nonfinite_quantized: int
    is_output: bool
    matched_by: str
    note: str = ""
    isolated_sqnr_db: float | None = None
    added_sqnr_db: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputError:
    """A graph output of both models.

    Attributes:
        name: the float model's.
        sqnr_db: pooled over all samples, simulated (optimisations off).
        deployed_sqnr_db: pooled, deployed (all optimisations on).
        seen_sqnr_db, unseen_sqnr_db: pooled over the samples used in calibration and over the
            others; None where there are none of them or it is unknown which are which.
        worst_channel_sqnr_db, median_channel_sqnr_db, worst_channel, channel_axis,
            channel_sqnr_db: per channel, simulated.
        slices: where a Concat makes this output, each input's part.
        per_sample_sqnr_db: simulated, in feed order.
        median_sample_sqnr_db, worst_sample_sqnr_db, worst_sample: over samples.
        deployed_differs: simulated and deployed outputs differ by more than three output steps,
            or the largest element changes place.
        deployed_max_steps: the largest |simulated - deployed| in steps of the output's scale;
            None where the output has none.
        deployed_flips: samples on which the largest element changes place.
        deployed_cause: the graph transformer of ONNX Runtime whose disabling alone removes the
            difference; "" where none does or it was not searched.
    """

    name: str
    sqnr_db: float
    deployed_sqnr_db: float
    seen_sqnr_db: float | None
    unseen_sqnr_db: float | None
    worst_channel_sqnr_db: float
    median_channel_sqnr_db: float
    worst_channel: int | None
    channel_axis: int | None
    channel_sqnr_db: tuple[float, ...]
    slices: tuple[SliceError, ...]
    median_sample_sqnr_db: float
    worst_sample_sqnr_db: float
    worst_sample: str
    per_sample_sqnr_db: tuple[float, ...]
    cosine_similarity: float
    max_abs_error: float
    deployed_differs: bool
    deployed_max_steps: float | None = None
    deployed_flips: int = 0
    deployed_cause: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unmatched:
    """A tensor that is not compared, and why.

    Attributes:
        name: the tensor.
        kind: "weight", "bias" or "activation".
        model: "float" or "quantized".
        reason: one clause, e.g. "fused into 485".
        fused_into: the compared float tensor that this one became a part of, by folding or
            fusion; "" where there is none, i.e. where it is truly unmatched.
    """

    name: str
    kind: str
    model: str
    reason: str
    fused_into: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pin:
    """A match set by hand, which every rule gives way to.

    Attributes:
        float_name: the float model's tensor.
        quantized_name: the quantized model's; None refuses whatever match the rules find.
    """

    float_name: str
    quantized_name: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchCounts:
    """Where the float tensors of the float model's main graph went; the three parts add up.

    Counted are floating-point initializers and Constant outputs, graph inputs and node outputs.

    Attributes:
        matched: compared with a tensor of the quantized model.
        fused: became a part of a compared tensor.
        unmatched: neither; each is in `Comparison.unmatched` with its reason.
        float_tensors: all of them.
    """

    matched: int
    fused: int
    unmatched: int
    float_tensors: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """Something no figure speaks of, and why.

    Attributes:
        name: of the node, tensor, output or figure.
        kind: "node", "tensor", "output" or "figure".
        model: "float", "quantized" or "" for both.
        reason: one clause.
    """

    name: str
    kind: str
    model: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NonFinite:
    """A tensor in which a model gave NaN or infinity.

    Attributes:
        tensor: the tensor's name in its own model.
        node: the node that computes it; "" for a graph input.
        op_type: that node's ("Input" for a graph input).
        model: "float" or "quantized".
        nan, infinite: elements over all samples.
        first_sample: the first sample with one.
        origin: its node's own inputs are finite: here it begins.
    """

    tensor: str
    node: str
    op_type: str
    model: str
    nan: int
    infinite: int
    first_sample: str
    origin: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchError:
    """One output for samples alone against the same samples in one batch; lower is better.

    Attributes:
        output: the float model's name.
        float_max_abs_difference, quantized_max_abs_difference: largest |alone - in the batch|
            over all samples, in the output's own unit.
        quantized_sqnr_db: of the batch against alone, pooled; higher is better.
        worst_sample: the sample with the largest difference in the quantized model.
    """

    output: str
    float_max_abs_difference: float
    quantized_max_abs_difference: float
    quantized_sqnr_db: float
    worst_sample: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchEffect:
    """What ranges found at run time make of a sample's company (dynamic quantization).

    Attributes:
        samples: how many samples share the batch.
        padded: shorter samples were padded with zeros to the longest.
        outputs: one record per output whose first axis is the batch.
    """

    samples: int
    padded: bool
    outputs: tuple[BatchError, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceError:
    """A tensor dumped from a device beside what this machine computes for it.

    Attributes:
        name: the float model's tensor.
        quantized_name: the quantized model's.
        device_name: its key in the dump.
        samples: how many samples the dump holds it for.
        quantization_sqnr_db: float against simulated.
        kernel_sqnr_db: simulated against deployed here; None for a tensor that is no output.
        device_sqnr_db: deployed here (simulated where `kernel_sqnr_db` is None) against device.
        total_sqnr_db: float against device.
        verdict: which of the three steps adds the most noise: "quantization", "kernel" or
            "device"; "exact" where there is none.
    """

    name: str
    quantized_name: str
    device_name: str
    samples: int
    quantization_sqnr_db: float
    kernel_sqnr_db: float | None
    device_sqnr_db: float
    total_sqnr_db: float
    verdict: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Top-1 against labels, on the output with as many classes.

    Attributes:
        output: the output that was judged.
        samples: how many samples had a label.
        top1_float, top1_quantized: share of samples right, 0..1, higher is better.
        top1_agreement: share of samples where both models choose the same class, 0..1.
    """

    output: str
    samples: int
    top1_float: float
    top1_quantized: float
    top1_agreement: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFigure:
    """What the outputs are worth by one task metric (see `task_metrics`).

    Attributes:
        metric: its text, e.g. "detection_f1:output0@yolov8".
        unit: "dB", "nats" or "" for none; shares are 0..1.
        higher_is_better: which direction is good.
        float_figure: of the float model, simulated; against itself where it is the measure.
        simulated, deployed: of the quantized model with optimisations off and on; None where it
            was not run deployed. nan where nothing counts or NaN spoils it.
        samples: feeds that it was summed over.
    """

    metric: str
    unit: str
    higher_is_better: bool
    float_figure: float
    simulated: float
    deployed: float | None
    samples: int

    def to_json(self) -> dict[str, Any]:
        """As values that `render.strict` takes; the float model's figure is called "float"."""
        names = ("metric", "unit", "higher_is_better", "float", "simulated", "deployed", "samples")
        return {n: getattr(self, "float_figure" if n == "float" else n) for n in names}


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Deployed latency of one feed on this machine, interleaved runs.

    Attributes:
        float_seconds, quantized_seconds: medians; lower is better.
        float_spread_seconds, quantized_spread_seconds: interquartile ranges.
        runs: how many timed runs of each.
    """

    float_seconds: float
    quantized_seconds: float
    float_spread_seconds: float
    quantized_spread_seconds: float
    runs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFile:
    """What identifies one of the two files.

    Attributes:
        path: as the user named the file: its name, or its path on the command line.
        sha256: of the file's bytes followed by its external data's.
        size_bytes: with external data.
        quant_format: value of `scheme.QuantFormat` ("float" for the float model), "+"-joined where
            a file mixes formats.
    """

    path: str
    sha256: str
    size_bytes: int
    quant_format: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One float model against one quantized model on some feeds.

    Attributes:
        samples: feeds compared.
        sample_names: their names, in order.
        random_feeds: the feeds are seeded noise, not data.
        seen: "seen" (all feeds were used in calibration), "unseen" (none), "mixed", or "unknown".
        weights, activations, outputs: matched pairs; activations in topological order.
        unmatched: everything that is not compared, with its reason.
        task: None without labels.
        latency: None where it was not measured.
        warnings: sentences a user should read before trusting a figure.
        counts: what became of every float tensor.
        skipped: what no figure speaks of although it was there, with the reason.
        not_observed: tensors whose values could not be looked at, e.g. inside If and Loop bodies.
        nonfinite: tensors with NaN or infinity, float model first, in topological order.
        provider: ONNX Runtime's execution provider of the deployed run.
        mask: the input that says which positions are padding; "" where none was named.
        states: (output, input) pairs of the float model through which each sample receives what
            the same model gave for the one before; () where samples are independent.
        batch: None where ranges are fixed or samples cannot share a batch.
        device: tensors dumped from a device; () without a dump.
        pins: matches set by hand.
        metrics: the task metrics that were asked for.
    """

    float_model: ModelFile
    quantized_model: ModelFile
    samples: int
    sample_names: tuple[str, ...]
    random_feeds: bool
    seen: str
    weights: tuple[WeightError, ...]
    activations: tuple[ActivationError, ...]
    outputs: tuple[OutputError, ...]
    unmatched: tuple[Unmatched, ...]
    task: Task | None
    latency: Latency | None
    warnings: tuple[str, ...]
    counts: MatchCounts | None = None
    skipped: tuple[Skipped, ...] = ()
    not_observed: tuple[Skipped, ...] = ()
    nonfinite: tuple[NonFinite, ...] = ()
    provider: str = "CPUExecutionProvider"
    mask: str = ""
    states: tuple[tuple[str, str], ...] = ()
    batch: BatchEffect | None = None
    device: tuple[DeviceError, ...] = ()
    pins: tuple[Pin, ...] = ()
    metrics: tuple[TaskFigure, ...] = ()


def judged_db(record: OutputError | ActivationError | WeightError) -> float:
    """What a tensor is judged by, dB: its SQNR, or the lowest of the parts joined into it."""
    if isinstance(record, WeightError):
        return record.sqnr_db
    whole = record.sqnr_db if isinstance(record, OutputError) else record.accumulated_sqnr_db
    # A part that is all zero in the float model has no SQNR to speak of.
    return min([whole, *(p.sqnr_db for p in record.slices if p.sqnr_db != -math.inf)])


def low_slices(output: OutputError | ActivationError) -> tuple[SliceError, ...]:
    """Parts of a Concat far below the whole and below 20 dB, lowest first."""
    whole = output.sqnr_db if isinstance(output, OutputError) else output.accumulated_sqnr_db
    low = [
        s
        for s in output.slices
        if s.sqnr_db < min(LOOK_DB, whole - FAR_BELOW_DB) and s.sqnr_db != -math.inf
    ]
    return tuple(sorted(low, key=lambda s: s.sqnr_db))


def first_nonfinite(records: Sequence[NonFinite], samples: Sequence[str]) -> NonFinite | None:
    """Where NaN or infinity begins: on the first sample that has any, the first node of the graph.

    Args:
        records: of one model, in the order of its graph.
        samples: names of all samples, in their order.
    """
    order = {name: at for at, name in reversed(list(enumerate(samples)))}
    origins = [r for r in records if r.origin] or records
    return min(origins, key=lambda r: order.get(r.first_sample, len(order)), default=None)


def made_with() -> dict[str, str]:
    """Versions of this tool and of what its figures depend on, for files that it writes."""
    versions = {}
    for package in ("quant-inspector", "onnxruntime", "onnx"):
        try:
            versions[package.replace("-", "_")] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package.replace("-", "_")] = "unknown"
    return versions
