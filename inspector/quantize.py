"""Make a quantized model, exactly as ONNX Runtime's own quantizer would.

Three steps: *prepare* (ONNX Runtime's pre-processing, in a private copy that is kept on disk),
*calibrate* (see `calibration`) and quantizing: QDQ in memory (see `quantizer`), everything else
through the public `quantize_static` or `quantize_dynamic`. The bytes are those that the public
functions write from the same prepared file. Every result is loaded and
run on one sample before it gets the name that was asked for: ONNX Runtime writes files that do
not load (per channel below opset 13, float16 at opset 17) without a word.

Names are the user's: exclusions name nodes of the float *file*, and `Prepared.successors` says
which node of the prepared model took each of them over.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.shape_inference
import onnx.version_converter
from google.protobuf.message import EncodeError
from onnxruntime.quantization import (
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from inspector.calibration import METHODS, SUPPORTED_OP_TYPES, calibrate, copy_model, hushed
from inspector.equalize import CHECKED_FEEDS, equal_db, equalize
from inspector.errors import (
    FeedError,
    InspectorError,
    ModelError,
    QuantizationError,
    RunError,
)
from inspector.feeds import Feeds, random_feeds
from inspector.model import Model, Node, bodies_of
from inspector.model_files import load_model
from inspector.prepare import (
    QUANTIZER_ERRORS,
    Prepared,
    prepare,
    shorten,
    text_of,
    unknown_node,
)
from inspector.publishing import NOT_RUN, check_place, unfinished_file
from inspector.quantizer import Quantizer, UnplannableError
from inspector.recipe import (
    COMPUTE_OPS,
    QuantConfig,
    TensorOverride,
    check_overrides,
    listed,
    override_notes,
)
from inspector.runtime import (
    Feed,
    Progress,
    no_progress,
    open_session,
    part_of,
)
from inspector.scheme import (
    COMPUTES_IN_INTEGERS,
    QUANTIZATION_OPS,
    quant_formats,
    read_scheme,
    stored_values,
)

QUANT_TYPES = {
    "int8": QuantType.QInt8,
    "uint8": QuantType.QUInt8,
    "int16": QuantType.QInt16,
    "uint16": QuantType.QUInt16,
    "int4": QuantType.QInt4,
    "uint4": QuantType.QUInt4,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedModel:
    """A quantized file that loads and runs.

    Attributes:
        path: where it is.
        sha256: of its bytes, followed by those of its external data.
        notes: what to know about how it was made, one sentence each.
        config: the recipe.
        excluded: what ONNX Runtime was given as `nodes_to_exclude`.
        calibration_reused: the ranges were on disk already.
    """

    path: Path
    sha256: str
    notes: tuple[str, ...]
    config: QuantConfig
    excluded: tuple[str, ...] = ()
    calibration_reused: bool = False


def quantizer_names(
    prepared: Prepared, names: Iterable[str], config: QuantConfig
) -> tuple[str, ...]:
    """The names that ONNX Runtime has to be given for nodes of the float file, in graph order.

    A name that pre-processing added is taken as it is; one that it removed is left out. Dynamic
    quantization renames Gemm `g` to `g_MatMul` before it looks at the list, so both are named.

    Raises:
        ExclusionError: a name that neither the float file nor the prepared model has.
    """
    found: dict[str, Node] = {}
    by_name = prepared.model.node_by_name
    for name in names:
        if name in prepared.successors:
            successor = prepared.successors[name]
            if successor is not None:
                for part in (successor, *prepared.companions.get(successor, ())):
                    found[part] = by_name[part]
        elif name in by_name:
            found[name] = by_name[name]
        else:
            raise unknown_node(name, prepared.model)
    result = []
    for node in sorted(found.values(), key=lambda n: n.index):
        result.append(node.name)
        if config.format == "dynamic" and node.op_type == "Gemm":
            result.append(f"{node.name}_MatMul")
    return tuple(result)


def extra_options(config: QuantConfig) -> dict[str, Any]:
    """ONNX Runtime's `extra_options` for a recipe."""
    options: dict[str, Any] = {}
    if config.activation_symmetric is not None and config.static:
        options["ActivationSymmetric"] = config.activation_symmetric
    if config.weight_symmetric is not None:
        options["WeightSymmetric"] = config.weight_symmetric
    if config.method == "percentile" and config.percentile is not None and config.static:
        options["CalibPercentile"] = config.percentile
    if config.overrides:
        options["TensorQuantOverrides"] = {
            each.tensor: [_override_options(each)] for each in config.overrides
        }
    return options


def _override_options(override: TensorOverride) -> dict[str, Any]:
    """One entry of ONNX Runtime's `TensorQuantOverrides`; it takes numbers as numpy arrays only."""
    values: dict[str, Any] = {}
    if override.quant_type:
        values["quant_type"] = QUANT_TYPES[override.quant_type]
    if override.symmetric is not None:
        values["symmetric"] = override.symmetric
    for key, number in (("rmin", override.low), ("rmax", override.high), ("scale", override.scale)):
        if number is not None:
            values[key] = np.array(number, np.float32)
    if override.zero_point is not None:
        name = override.quant_type
        dtype = np.dtype(getattr(ml_dtypes, name)) if name.endswith("int4") else np.dtype(name)
        values["zero_point"] = np.array(override.zero_point, dtype)
    return values


def quantize_model(
    model: Model,
    config: QuantConfig,
    *,
    calibration: Feeds | None,
    exclude: Sequence[str] = (),
    output: Path,
    cache: Path,
    progress: Progress = no_progress,
) -> QuantizedModel:
    """Quantizes a float model and writes it to `output`, which holds all of it or is untouched.

    Args:
        model: the float model.
        config: the recipe.
        calibration: feeds to observe ranges on; may be None for dynamic quantization. Its first
            sample is what the result is tried on.
        exclude: nodes to leave in float, by their names in the float file.
        output: the file to write.
        cache: folder for caches (prepared models, calibrations).
        progress: told the finished share and the step; what it raises ends the work.

    Raises:
        CalibrationError: feeds that ranges cannot be observed on.
        ExclusionError: a name that is not in the model.
        QuantizationError: a recipe or model that the quantizer cannot take, nothing to quantize,
            or a result that does not load or run.
    """
    output = Path(os.path.abspath(output))
    _check_request(model, config, output)
    progress(0.0, "pre-processing the model")
    prepared = prepare(model, config, cache)
    check_overrides(prepared.model, config)
    excluded = quantizer_names(prepared, exclude, config)
    only = quantizer_names(prepared, config.nodes, config)
    notes = [*model.notes, *prepared.notes, *_coverage_notes(prepared.model, config)]
    if config.equalize:
        notes += _checked_equal(model, calibration, progress)
    observed = None
    if config.static:
        observed = calibrate(
            prepared.model,
            calibration,
            method=config.method,
            percentile=config.percentile,
            op_types=config.op_types,
            limit=config.calibration_samples,
            cache=cache,
            progress=part_of(progress, 0.1, 0.7),
        )
        notes += observed.notes
    progress(0.7, "quantizing")
    with (
        tempfile.TemporaryDirectory(prefix="quant-inspector-") as name,
        unfinished_file(output) as target,
    ):
        assert prepared.model.path is not None
        source = copy_model(prepared.model.path, Path(name))
        ranges = None if observed is None else observed.path
        with hushed() as heard:
            try:
                quantized = None
                if ranges is not None:
                    quantized = _in_memory(prepared.model, source, config, ranges, only, excluded)
                if quantized is not None:
                    target.write_bytes(quantized)
                else:
                    _run_quantizer(config, source, target, only, excluded, ranges)
            except QUANTIZER_ERRORS as error:
                raise QuantizationError(
                    f"ONNX Runtime's quantizer refuses {model.name}: {shorten(text_of(error))}",
                    hint=_refusal_hint(config),
                ) from error
        notes += _quantizer_notes(heard)
        progress(0.9, "trying the result on one sample")
        result = load_model(target)
        if _quantization_nodes(result) <= _quantization_nodes(prepared.model):
            raise _nothing_quantized(prepared.model, config, excluded, only)
        notes += _emptied_weights(prepared.model, result)
        notes += _unrectified(prepared.model, result)
        notes += override_notes(prepared.model, result, config)
        notes += _try(model, prepared.model, result, config, calibration)
        progress(0.98, "writing the file")
    progress(1.0, "quantized")
    return QuantizedModel(
        path=output,
        sha256=result.sha256,
        notes=tuple(dict.fromkeys(notes)),
        config=config,
        excluded=excluded,
        calibration_reused=observed is not None and observed.reused,
    )


# Loaded quantizers by what they depend on, the latest last. Each holds its model.
_KEPT_QUANTIZERS = 2
_quantizers: OrderedDict[tuple[Any, ...], Quantizer] = OrderedDict()


def open_quantizer(prepared: Prepared, config: QuantConfig, ranges: Path) -> Quantizer | None:
    """The in-memory quantizer of a prepared model, kept for the next list.

    None where a recipe or a model takes the public route: another format than QDQ, external data,
    or another ONNX Runtime than was tested.

    Args:
        prepared: what `prepare` gave for this recipe.
        config: the recipe.
        ranges: the file that `calibrate` wrote.
    """
    only = quantizer_names(prepared, config.nodes, config)
    assert prepared.model.path is not None
    with tempfile.TemporaryDirectory(prefix="quant-inspector-") as name, hushed():
        source = copy_model(prepared.model.path, Path(name))
        return _quantizer(prepared.model, source, config, ranges, only)


def _quantizer(
    prepared: Model, source: Path, config: QuantConfig, ranges: Path, only: Sequence[str]
) -> Quantizer | None:
    """See `open_quantizer`; `source` is a private copy of the prepared file."""
    if source.with_name(f"{source.name}.data").exists():
        return None
    key = (prepared.sha256, ranges, json.dumps(config.to_json(), sort_keys=True))
    if key in _quantizers:
        _quantizers.move_to_end(key)
        return _quantizers[key]
    try:
        made = Quantizer(source, config, ranges, options=extra_options(config), only=only)
    except UnplannableError:
        return None
    _quantizers[key] = made
    while len(_quantizers) > _KEPT_QUANTIZERS:
        _quantizers.popitem(last=False)
    return made


def _in_memory(
    prepared: Model,
    source: Path,
    config: QuantConfig,
    ranges: Path,
    only: Sequence[str],
    excluded: Sequence[str],
) -> bytes | None:
    """The quantized file's bytes; None where the public route has to be taken.

    That is also so where ONNX Runtime's quantizer gives up: the public function then says why.
    """
    try:
        quantizer = _quantizer(prepared, source, config, ranges, only)
        if quantizer is None:
            return None
        return bytes(quantizer.quantize(excluded).SerializeToString())
    except (*QUANTIZER_ERRORS, EncodeError):
        return None


def _quantization_nodes(model: Model) -> int:
    return sum(node.op_type in QUANTIZATION_OPS for node in model.nodes)


def _check_request(model: Model, config: QuantConfig, output: Path) -> None:
    """Refuses what can be seen to fail before any work is done."""
    # Weights that are stored as integers and read through DequantizeLinear are no obstacle.
    if COMPUTES_IN_INTEGERS.intersection(quant_formats(model)):
        found = Counter(n.op_type for n in model.nodes if n.op_type in QUANTIZATION_OPS)
        raise QuantizationError(
            f"{model.name} is already quantized ({listed(found)}), expected a float model",
            hint="Load the float model it was made from.",
        )
    narrow = {config.activation_type, config.weight_type} <= {"int8", "uint8"}
    if config.format == "qoperator" and not narrow:
        raise QuantizationError(
            f"format qoperator takes 8-bit types only, found activations {config.activation_type} "
            f"and weights {config.weight_type}",
            hint="Use --format qdq for 16- and 4-bit types.",
        )
    if config.format == "dynamic" and config.weight_type not in ("int8", "uint8"):
        raise QuantizationError(
            f"format dynamic takes 8-bit weights only, found {config.weight_type}",
            hint="Use --format qdq for 16- and 4-bit types.",
        )
    if config.static and config.activation_type == "int8" and config.weight_type == "uint8":
        raise QuantizationError(
            "ONNX Runtime has no kernels for int8 activations with uint8 weights",
            hint="Use --activation-type uint8, or --weight-type int8.",
        )
    check_place(output)
    if model.path is not None and output.exists() and output.samefile(model.path):
        raise QuantizationError(
            f"{output.name} is the float model itself, which is never overwritten",
            hint="Name another file to write.",
        )


def _run_quantizer(
    config: QuantConfig,
    source: Path,
    target: Path,
    only: Sequence[str],
    excluded: Sequence[str],
    ranges: Path | None,
) -> None:
    """The call of ONNX Runtime's public function; lists and options are its own to change."""
    large = source.with_name(f"{source.name}.data").exists()
    shared: dict[str, Any] = {
        "op_types_to_quantize": list(config.op_types),
        "nodes_to_quantize": list(only),
        "nodes_to_exclude": list(excluded),
        "per_channel": config.per_channel,
        "reduce_range": config.reduce_range,
        "weight_type": QUANT_TYPES[config.weight_type],
        "use_external_data_format": large,
        "extra_options": extra_options(config),
    }
    if not config.static:
        quantize_dynamic(source, target, **shared)
        return
    quantize_static(
        source,
        target,
        None,
        quant_format=QuantFormat.QDQ if config.format == "qdq" else QuantFormat.QOperator,
        activation_type=QUANT_TYPES[config.activation_type],
        calibrate_method=METHODS[config.method],
        calibration_cache_path=ranges,
        **shared,
    )


def _refusal_hint(config: QuantConfig) -> str:
    if config.per_channel:
        return "Try it per tensor (drop --per-channel), or leave the node in question in float."
    if config.op_types:
        return "Try it without --op-types, or leave the node in question in float."
    return "Leave the node in question in float (--exclude), or try another --format."


def _quantizer_notes(heard: Sequence[str]) -> list[str]:
    """What of the quantizer's chatter a user has to know."""
    untyped = [h.split(":")[1].split(".")[0].strip() for h in heard if "failed to infer the t" in h]
    notes = []
    if untyped:
        notes.append(
            f"{len(set(untyped))} tensors have no inferred type and stay in float "
            f"(first {untyped[0]!r})"
        )
    for line in heard:
        if "exceeds the range of a int32" in line:
            bias = line.split("`")[1] if "`" in line else "a bias"
            notes.append(f"bias {bias!r} does not fit into int32 at its scale and was clipped")
        elif line.startswith("Bias of Gemm node"):
            notes.append(f"{line.split('. ')[0]}, so it stays in float")
    return notes


def _bodies(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes inside the bodies of If, Loop and Scan, at any depth."""
    for node in graph.node:
        for body in bodies_of(node):
            yield from body.node
            yield from _bodies(body)


def supported_op_types(config: QuantConfig) -> frozenset[str]:
    """The op types that ONNX Runtime quantizes with a recipe."""
    known = SUPPORTED_OP_TYPES[config.format]
    if not config.op_types:
        return known
    # The QDQ quantizer wraps nodes of any type that is asked for.
    asked = frozenset(config.op_types)
    return asked if config.format == "qdq" else asked & known


def _coverage_notes(prepared: Model, config: QuantConfig) -> list[str]:
    """Which computing nodes the quantizer will not take, and why."""
    notes = []
    inside = Counter(n.op_type for n in _bodies(prepared.proto.graph) if n.op_type in COMPUTE_OPS)
    if inside:
        notes.append(
            f"{listed(inside)} inside bodies of If, Loop or Scan stay in float: "
            "ONNX Runtime's quantizer does not look into them"
        )
    supported = supported_op_types(config)
    fused = Counter(
        n.op_type
        for n in prepared.nodes
        if n.domain == "com.microsoft" and n.op_type not in supported
    )
    if fused:
        notes.append(
            f"{listed(fused)} (com.microsoft) stay in float: ONNX Runtime's quantizer does not "
            "take fused operators; export or optimise the model without fusion to quantize them"
        )
    present = {n.op_type for n in prepared.nodes}
    for op_type in config.op_types:
        if op_type not in present:
            notes.append(f"no node of the prepared model has op type {op_type!r}")
        elif op_type not in supported:
            notes.append(f"format {config.format} does not quantize nodes of op type {op_type!r}")
    return notes


def _nothing_quantized(
    prepared: Model, config: QuantConfig, excluded: Collection[str], only: Collection[str]
) -> QuantizationError:
    """The error for a result without a single quantized node, with the reason."""
    supported = supported_op_types(config)
    could = [n for n in prepared.nodes if n.op_type in supported]
    coverage = _coverage_notes(prepared, config)
    if not could:
        ops = Counter(n.op_type for n in prepared.nodes if n.op_type != "Constant")
        why = coverage[0] if coverage else f"none of its nodes is of a type it takes: {listed(ops)}"
        hint = "Export the model with standard operators in its main graph."
        if config.op_types:
            hint = "Drop --op-types, or name types that the model has."
    elif excluded and all(n.name in excluded for n in could):
        why = f"all {len(could)} nodes that could be are excluded"
        hint = "Take at least one name off the exclusion list."
    elif only and not any(n.name in only and n.name not in excluded for n in could):
        why = f"none of the {len(could)} nodes that could be is among the nodes asked for"
        hint = "Drop --nodes, or name nodes that compute with weights."
    elif excluded:
        why = f"{len(excluded)} nodes are excluded, and the rest only follow a quantized neighbour"
        hint = "Take at least one name off the exclusion list."
    else:
        why = (
            f"its nodes that could be ({listed(Counter(n.op_type for n in could))}) have no "
            "constant float32 weights or only follow a quantized neighbour"
        )
        hint = "Quantize with another --format (static formats also take computed tensors)."
    return QuantizationError(f"nothing was quantized: {why}", hint=hint)


def _emptied_weights(prepared: Model, result: Model) -> list[str]:
    """Weights of which the quantizer left nothing but zeros, e.g. to make room for a bias."""
    emptied = []
    for tensor in read_scheme(result).tensors:
        name = tensor.quantized.removesuffix("_quantized")
        real = prepared.constant(name) if tensor.kind == "weight" and not tensor.scope else None
        if real is not None and real.any():
            stored = stored_values(result, tensor)
            if stored is not None and not stored.any():
                emptied.append(name)
    return [
        f"weight {name!r} is all zero after quantization: its scale was widened until the int32 "
        "bias fits; leave its node in float"
        for name in emptied
    ]


def _unrectified(prepared: Model, result: Model) -> list[str]:
    """Relus and Clips that were folded although a body reads what is behind them."""
    inside = {i for node in _bodies(prepared.proto.graph) for i in node.input}
    return [
        f"{node.name} was folded into the quantization of {node.inputs[0]!r}, but a body of If, "
        f"Loop or Scan reads {node.outputs[0]!r} and now gets the values before it: leave "
        f"{node.name} in float"
        for node in prepared.nodes
        if node.op_type in ("Relu", "Clip")
        and node.name not in result.node_by_name
        and inside.intersection(node.outputs)
    ]


def _try(
    model: Model, prepared: Model, result: Model, config: QuantConfig, calibration: Feeds | None
) -> list[str]:
    """Notes from running the result on one sample, as debugged and as shipped.

    Raises:
        QuantizationError: it does not load, or does not run where the prepared model does.
    """
    try:
        found: tuple[str, Feed | None] = _one_feed(prepared, calibration)
    except FeedError:
        if calibration is not None:
            raise
        found = ("no feed", None)
    sample, feed = found
    notes = []
    for optimized in (False, True):
        how = "with" if optimized else "without"
        try:
            session = open_session(result, optimized=optimized)
        except (ModelError, RunError) as error:
            raise QuantizationError(
                f"the quantized {model.name} does not load {how} optimisations: "
                f"{shorten(error.message)}",
                hint=_load_hint(model, config),
            ) from error
        if feed is None:
            notes.append(NOT_RUN)
            continue
        try:
            values = session.run(feed, sample=sample)
        except RunError as error:
            if calibration is None and not _runs(prepared, feed):
                return [NOT_RUN]
            raise QuantizationError(
                f"the quantized {model.name} does not run on {sample} {how} optimisations: "
                f"{shorten(error.message)}",
                hint=_load_hint(model, config),
            ) from error
        for name, value in values.items():
            if value.dtype.kind == "f" and not np.all(np.isfinite(value)):
                notes.append(
                    f"output {name!r} of the quantized model is NaN or infinite on {sample}"
                )
    return list(dict.fromkeys(notes))


def _checked_equal(model: Model, calibration: Feeds | None, progress: Progress) -> tuple[str, ...]:
    """How well the equalized model agrees with the float model on calibration feeds.

    Raises:
        QuantizationError: it is another model.
    """
    made = equalize(model)
    if not made.pairs:
        return ()
    try:
        if calibration is None or not len(calibration):
            calibration = random_feeds(model, samples=1, seed=0)
    except FeedError:
        return ("the equalized model was not run beside the float model: there are no feeds",)
    feeds = calibration.subset(range(min(len(calibration), CHECKED_FEEDS)))
    found = equal_db(model, made.model, feeds, progress=part_of(progress, 0.05, 0.1))
    if not found:
        return ()
    return (f"equalized, the float model's outputs are the same to {min(found.values()):.0f} dB",)


def _runs(model: Model, feed: Feed) -> bool:
    try:
        open_session(model, optimized=False).run(feed)
    except InspectorError:
        return False
    return True


def _one_feed(prepared: Model, calibration: Feeds | None) -> tuple[str, Feed]:
    if calibration is not None and len(calibration):
        return f"sample {calibration.names[0]!r}", next(iter(calibration))
    return "a random feed", next(iter(random_feeds(prepared, samples=1, seed=0)))


def _load_hint(model: Model, config: QuantConfig) -> str:
    halves = any(model.info(i.name).dtype == "float16" for i in model.inputs) or any(
        model.info(name).dtype == "float16" for name in model.constant_names
    )
    if halves:
        return "Quantize the float32 version of this model."
    if config.per_channel:
        return "Quantize per tensor (drop --per-channel)."
    if config.format != "qdq":
        return "Use --format qdq."
    return "Use int8 or uint8 types, or leave the node named above in float (--exclude)."
