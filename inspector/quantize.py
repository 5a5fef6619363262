"""Make a quantized model, exactly as ONNX Runtime's own quantizer would.

Three steps: *prepare* (ONNX Runtime's pre-processing, in a private copy that is kept on disk),
*calibrate* (see `calibration`) and the public `quantize_static` or `quantize_dynamic`. The bytes
are those that the public functions write from the same prepared file. Every result is loaded and
run on one sample before it gets the name that was asked for: ONNX Runtime writes files that do
not load (per channel below opset 13, float16 at opset 17) without a word.

Names are the user's: exclusions name nodes of the float *file*, and `Prepared.successors` says
which node of the prepared model took each of them over.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
import onnx.version_converter
from onnxruntime.quantization import (
    QuantFormat,
    QuantType,
    quant_pre_process,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.registry import (
    IntegerOpsRegistry,
    QDQRegistry,
    QLinearOpsRegistry,
)

from inspector.calibration import METHODS, calibrate, copy_model, hushed
from inspector.errors import (
    ExclusionError,
    FeedError,
    InspectorError,
    ModelError,
    QuantizationError,
    RunError,
)
from inspector.feeds import Feeds, random_feeds
from inspector.model import FLOAT_DTYPES, Model, Node, load_model, write_proto
from inspector.runtime import (
    ORT_ERRORS,
    Feed,
    Progress,
    no_progress,
    open_session,
    runtime_version,
)
from inspector.scheme import (
    COMPUTES_IN_INTEGERS,
    QUANTIZATION_OPS,
    Scheme,
    quant_formats,
    read_scheme,
)
from inspector.scheme import QuantFormat as Format

FORMATS = ("qdq", "qoperator", "dynamic")
ACTIVATION_TYPES = ("int8", "uint8", "int16", "uint16")
WEIGHT_TYPES = ("int8", "uint8", "int16", "uint16", "int4", "uint4")
# The oldest ai.onnx opset that QuantizeLinear exists in, and those of its later abilities.
OLDEST_OPSET = 10
PER_CHANNEL_OPSET = 13
WIDE_TYPES_OPSET = 21

_QUANT_TYPES = {
    "int8": QuantType.QInt8,
    "uint8": QuantType.QUInt8,
    "int16": QuantType.QInt16,
    "uint16": QuantType.QUInt16,
    "int4": QuantType.QInt4,
    "uint4": QuantType.QUInt4,
}
_SUPPORTED: dict[str, frozenset[str]] = {
    "qdq": frozenset({*QLinearOpsRegistry, *QDQRegistry}),
    "qoperator": frozenset(QLinearOpsRegistry),
    # Gemm is split into MatMul and Add before dynamic quantization.
    "dynamic": frozenset({*IntegerOpsRegistry, "Gemm"}),
}
# Nodes that only move values about: what a fused region is *for* is never one of them.
MOVEMENT_OPS = frozenset(
    {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
_COMPUTE_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN"})

# Change it whenever what is prepared, or how it is stored, changes.
_PREPARED_VERSION = 1
# From this size on a protobuf needs its tensors outside.
LARGE_BYTES = 2**31 - 1

_QUANTIZER_ERRORS = (
    *ORT_ERRORS,
    onnx.shape_inference.InferenceError,
    onnx.version_converter.ConvertError,
    onnx.checker.ValidationError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def nearest_names(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` names most like `name`, the likest first; case does not matter."""
    by_lower: dict[str, list[str]] = {}
    for candidate in names:
        by_lower.setdefault(candidate.lower(), []).append(candidate)
    close = difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.0)
    return [original for lower in close for original in by_lower[lower]][:count]


def unknown_node(name: str, model: Model) -> ExclusionError:
    """The error for a node name that the model does not have, with the three nearest names."""
    if not name:
        return ExclusionError(
            "an empty node name was given; ONNX Runtime would take it for every unnamed node",
            hint="Name the node; `quant-inspector show` lists the names, also of unnamed nodes.",
        )
    near = nearest_names(name, (n.name for n in model.nodes if n.op_type != "Constant"))
    listed = ", ".join(repr(n) for n in near)
    return ExclusionError(
        f"{model.name} has no node {name!r}; the nearest names are {listed}",
        hint="Use one of these names, or a pattern with * and ?.",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantConfig:
    """A recipe: everything about a quantization but the exclusions.

    Attributes:
        format: one of `FORMATS`.
        activation_type: one of `ACTIVATION_TYPES`; dynamic quantization always takes uint8.
        weight_type: one of `WEIGHT_TYPES`.
        method: how ranges follow from what was observed, one of `calibration.METHODS`.
        percentile: share of values kept, in percent, for the method "percentile"; None takes
            ONNX Runtime's 99.999.
        per_channel: a scale per output channel of a weight.
        reduce_range: 7-bit weights, for CPUs whose 8-bit kernels saturate.
        activation_symmetric: zero point in the middle; None takes ONNX Runtime's default (no).
        weight_symmetric: the same; None takes ONNX Runtime's default (yes for signed types).
        op_types: quantize only nodes of these types; empty for all the quantizer knows.
        nodes: quantize only these nodes of the float file; empty for all.
        preprocess: run ONNX Runtime's pre-processing first.
        calibration_samples: calibrate on at most as many feeds; None for all.

    Raises:
        ValueError: a value that is none of those.
    """

    format: str = "qdq"
    activation_type: str = "int8"
    weight_type: str = "int8"
    method: str = "minmax"
    percentile: float | None = None
    per_channel: bool = False
    reduce_range: bool = False
    activation_symmetric: bool | None = None
    weight_symmetric: bool | None = None
    op_types: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    preprocess: bool = True
    calibration_samples: int | None = None

    def __post_init__(self) -> None:
        for key, known in (
            ("format", FORMATS),
            ("activation_type", ACTIVATION_TYPES),
            ("weight_type", WEIGHT_TYPES),
            ("method", tuple(METHODS)),
        ):
            if getattr(self, key) not in known:
                raise ValueError(
                    f"{key} is {getattr(self, key)!r}, expected one of {', '.join(known)}"
                )
        for key in ("per_channel", "reduce_range", "preprocess"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key} is {getattr(self, key)!r}, expected true or false")
        for key in ("activation_symmetric", "weight_symmetric"):
            if getattr(self, key) not in (None, True, False):
                raise ValueError(f"{key} is {getattr(self, key)!r}, expected true, false or null")
        for key in ("op_types", "nodes"):
            value = getattr(self, key)
            if not isinstance(value, tuple) or not all(isinstance(v, str) and v for v in value):
                raise ValueError(f"{key} is {value!r}, expected names")
        if self.percentile is not None and not (
            _is_number(self.percentile) and 50 < self.percentile <= 100
        ):
            raise ValueError(
                f"percentile is {self.percentile!r}, expected a number above 50, at most 100"
            )
        samples = self.calibration_samples
        if samples is not None and (
            not isinstance(samples, int) or isinstance(samples, bool) or samples < 1
        ):
            raise ValueError(f"calibration_samples is {samples!r}, expected a whole number above 0")

    @property
    def static(self) -> bool:
        """It needs calibration feeds."""
        return self.format != "dynamic"

    def to_json(self) -> dict[str, Any]:
        """The recipe as strict JSON values; keys are our options with underscores."""
        return {
            f.name: list(value) if isinstance(value := getattr(self, f.name), tuple) else value
            for f in fields(self)
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> QuantConfig:
        """The recipe that `to_json` wrote; absent keys take their defaults.

        Raises:
            QuantizationError: no object, an unknown key, or a value out of its range.
        """
        if not isinstance(values, Mapping):
            raise QuantizationError(
                f"a recipe is {type(values).__name__}, expected a JSON object",
                hint='Write an object like {"format": "qdq", "per_channel": true}.',
            )
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                near = nearest_names(str(key), known, 1)[0]
                raise QuantizationError(
                    f"a recipe has no option {key!r}; the nearest is {near!r}",
                    hint=f"Use one of: {', '.join(f.name for f in fields(cls))}.",
                )
        plain: dict[str, Any] = {
            key: tuple(value) if key in ("op_types", "nodes") and isinstance(value, list) else value
            for key, value in values.items()
        }
        try:
            return cls(**plain)
        except (ValueError, TypeError) as error:
            raise QuantizationError(
                f"the recipe cannot be used: {error}", hint="Correct this option of the recipe."
            ) from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---------------------------------------------------------------------------------------------
# Prepare


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """The model that the quantizer is given.

    Attributes:
        model: loaded from a private file in the cache, which nobody changes.
        notes: what was done or could not be done, one sentence each.
        successors: by node of the float file, the node of the prepared model that took it over;
            None where pre-processing removed it without one (constants, Dropout, folded shapes).
        companions: by node of the prepared model, the Reshapes and Transposes that pre-processing
            put around it; they are left in float together with it.
        symbolic: symbolic shape inference worked.
        lifted_to: the ai.onnx opset it was converted to; None where it was not.
    """

    model: Model
    notes: tuple[str, ...]
    successors: Mapping[str, str | None]
    companions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    symbolic: bool = True
    lifted_to: int | None = None

    @property
    def float_names(self) -> dict[str, str]:
        """By node of the prepared model, the name to write into an exclusion list.

        That is its own name where the float file has it, else the first float node it took over
        or accompanies, else its own name (pre-processing added it; `quantize_model` accepts that).
        """
        names = {node.name: node.name for node in self.model.nodes}
        for float_name, successor in reversed(list(self.successors.items())):
            if successor is None or successor in self.successors:
                continue
            for name in (successor, *self.companions.get(successor, ())):
                names[name] = float_name
        return names


def prepare(model: Model, config: QuantConfig, cache: Path) -> Prepared:
    """The prepared model of a float model, from the cache where it is there.

    Args:
        model: the float model.
        config: its `preprocess`, and the types that need a newer opset, matter here.
        cache: folder for caches.

    Raises:
        QuantizationError: the opset is too old or cannot be lifted.
        ModelError: ONNX cannot read the model's shapes at all.
    """
    wanted = _wanted_opset(config)
    lift = wanted if wanted is not None and model.opset < wanted else None
    if not config.preprocess and model.opset < OLDEST_OPSET:
        raise QuantizationError(
            f"{model.name} uses ai.onnx opset {model.opset}; the quantizer needs "
            f"{OLDEST_OPSET} or newer",
            hint="Leave pre-processing on (drop --no-preprocess): it converts the model to "
            "opset 11.",
        )
    identity = (
        model.sha256
        or hashlib.sha256(model.proto.SerializeToString(deterministic=True)).hexdigest()
    )
    parts = [_PREPARED_VERSION, identity, config.preprocess, lift, runtime_version()]
    key = hashlib.sha256(json.dumps([*parts, onnx.__version__]).encode()).hexdigest()
    folder = cache / "prepared" / key
    found = _read_prepared(folder)
    if found is not None:
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
    try:
        _write_prepared(model, config.preprocess, lift, part)
        try:
            os.rename(part, folder)
        except OSError:
            # Somebody else finished the same work first, or left a folder that cannot be read.
            if _read_prepared(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    found = _read_prepared(folder)
    if found is None:
        raise QuantizationError(
            f"the prepared copy of {model.name} cannot be read back",
            hint="Check that the disk with the cache is not full.",
        )
    return found


def _wanted_opset(config: QuantConfig) -> int | None:
    wide = {"int16", "uint16", "int4", "uint4"}
    if config.format != "qdq":
        return None
    if config.activation_type in wide or config.weight_type in wide:
        return WIDE_TYPES_OPSET
    return PER_CHANNEL_OPSET if config.per_channel else None


def _read_prepared(folder: Path) -> Prepared | None:
    try:
        stored = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
        return Prepared(
            model=load_model(folder / "prepared.onnx"),
            notes=tuple(stored["notes"]),
            successors=stored["successors"],
            companions={k: tuple(v) for k, v in stored["companions"].items()},
            symbolic=stored["symbolic"],
            lifted_to=stored["lifted_to"],
        )
    except (OSError, ValueError, LookupError, ModelError):
        return None


def _write_prepared(model: Model, preprocess: bool, lift: int | None, folder: Path) -> None:
    notes: list[str] = []
    symbolic = True
    with tempfile.TemporaryDirectory(prefix="quant-inspector-") as name:
        work = Path(name)
        write_proto(model.proto, work / "float.onnx")
        proto = model.proto
        if preprocess:
            if model.opset <= OLDEST_OPSET:
                notes.append(
                    f"opset {model.opset} was lifted to 11 by pre-processing, because the "
                    "quantizer needs it"
                )
            symbolic = _pre_process(work / "float.onnx", work / "first.onnx", notes)
            proto = load_model(work / "first.onnx").proto
        if lift is not None:
            proto = _lift(proto, lift, model, notes)
            if preprocess:
                # The conversion leaves constants and pairs of nodes that the optimiser folds.
                write_proto(Model(proto).proto, work / "lifted.onnx")
                _pre_process(work / "lifted.onnx", work / "second.onnx", [], symbolic=symbolic)
                proto = load_model(work / "second.onnx").proto
        # The quantizer sees the stable names that `Model` gives.
        prepared = Model(proto)
        write_proto(prepared.proto, folder / "prepared.onnx")
    successors = _successors(model, prepared)
    stored = {
        "notes": notes,
        "successors": successors,
        "companions": _companions(model, prepared, successors),
        "symbolic": symbolic,
        "lifted_to": lift,
    }
    (folder / "prepared.json").write_text(json.dumps(stored), encoding="utf-8")


def _pre_process(source: Path, target: Path, notes: list[str], *, symbolic: bool = True) -> bool:
    """Whether ONNX Runtime's pre-processing worked with symbolic shapes; what did not is noted."""
    large = source.stat().st_size >= LARGE_BYTES or source.with_name(f"{source.name}.data").exists()
    options: dict[str, Any] = {}
    if large:
        options = {
            "save_as_external_data": True,
            "all_tensors_to_one_file": True,
            "external_data_location": f"{target.name}.data",
        }
    # It writes "sym_shape_infer_temp.onnx" into the current folder when it fails.
    with contextlib.chdir(source.parent), hushed() as heard:
        if symbolic:
            try:
                quant_pre_process(source, target, **options)
            except Exception as error:  # ONNX Runtime raises bare Exception and what not here
                symbolic = False
                reason = " ".join(str(error).split()) or type(error).__name__
                notes.append(
                    f"symbolic shape inference failed ({_shorten(reason)}), so pre-processing ran "
                    "without it"
                )
        if not symbolic:
            heard.clear()
            try:
                quant_pre_process(source, target, skip_symbolic_shape=True, **options)
            except _QUANTIZER_ERRORS as error:
                raise QuantizationError(
                    f"ONNX Runtime's pre-processing fails: {_shorten(_text(error))}",
                    hint="Try it with --no-preprocess.",
                ) from error
    if any("Optimization Failed" in line for line in heard):
        cause = next((line for line in heard if "Traceback" in line), "")
        last = cause.strip().splitlines()[-1] if cause.strip() else "no reason given"
        notes.append(
            f"the optimisation in pre-processing failed and was left out: {_shorten(last)}"
        )
    return symbolic


def _lift(proto: onnx.ModelProto, opset: int, model: Model, notes: list[str]) -> onnx.ModelProto:
    why = "per-channel scales need" if opset == PER_CHANNEL_OPSET else "16- and 4-bit types need"
    try:
        lifted = onnx.version_converter.convert_version(proto, opset)
    except _QUANTIZER_ERRORS as error:
        raise QuantizationError(
            f"{why} opset {opset}, and {model.name} (opset {model.opset}) cannot be converted: "
            f"{_shorten(_text(error))}",
            hint=f"Export the model with opset {opset} or newer, or quantize "
            + ("per tensor." if opset == PER_CHANNEL_OPSET else "to 8 bits."),
        ) from error
    notes.append(f"opset {model.opset} was lifted to {opset}, because {why} it")
    return lifted


def _text(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if isinstance(error, LookupError) or not text else text


def _shorten(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _successors(model: Model, prepared: Model) -> dict[str, str | None]:
    """Which node of the prepared model took over each node of the float model.

    In this order: the node of the same name; the node that a fusion named after it
    ("<name>/MatMulAddFusion"); the producer of its output; going forward through nodes that are
    gone, the producer of the first tensor that is still there, or the new node that feeds the
    first consumer that is still there.
    """
    known = prepared.node_by_name
    new = {n.name: n for n in prepared.nodes if n.name not in model.node_by_name}
    fused = {name.rpartition("/")[0]: node for name, node in new.items() if "Fusion" in name}
    produced = {output for node in model.nodes for output in node.outputs if output}
    regions = _regions(prepared, new)

    def inside(candidate: Node, wanted: Node) -> Node:
        """The node of the candidate's new region that does what `wanted` did."""
        region = regions.get(candidate.name, (candidate,))
        if candidate.op_type == wanted.op_type:
            return candidate
        for same in (
            [n for n in region if n.op_type == wanted.op_type],
            [n for n in region if n.op_type not in MOVEMENT_OPS],
        ):
            if same and wanted.op_type not in MOVEMENT_OPS:
                return same[0]
        return candidate

    def take_over(node: Node) -> Node | None:
        if node.name in known:
            return known[node.name]
        if node.op_type == "Constant":
            return None
        if node.name in fused:
            return fused[node.name]
        for output in node.outputs:
            if output in prepared.producers:
                return inside(prepared.producers[output], node)
        gone, seen = [node], {node.name}
        while gone:
            step = gone.pop(0)
            for output in step.outputs:
                for consumer in model.consumers.get(output, ()):
                    if consumer.name in seen:
                        continue
                    seen.add(consumer.name)
                    if consumer.name in known:
                        feeder = _feeder(consumer, output, known[consumer.name], prepared)
                        if feeder is None:
                            continue
                        if feeder.name in new:
                            if not produced.intersection(feeder.outputs):
                                return inside(feeder, node)
                        elif feeder.op_type == node.op_type:
                            # The same computation was there twice; one of them is left.
                            return feeder
                        elif node.op_type == "Pad":
                            # The one operator that is fused into the node after it.
                            return known[consumer.name]
                        continue
                    still = [o for o in consumer.outputs if o in prepared.producers]
                    if still:
                        return inside(prepared.producers[still[0]], node)
                    if consumer.op_type != "Constant":
                        gone.append(consumer)
        return None

    found: dict[str, str | None] = {}
    for node in model.nodes:
        successor = take_over(node)
        found[node.name] = None if successor is None else successor.name
    return found


def _companions(
    model: Model, prepared: Model, successors: Mapping[str, str | None]
) -> dict[str, list[str]]:
    """The new nodes that only move values around a fused node, by that node."""
    new = {n.name: n for n in prepared.nodes if n.name not in model.node_by_name}
    taken = set(successors.values())
    found: dict[str, list[str]] = {}
    for region in {nodes[0].name: nodes for nodes in _regions(prepared, new).values()}.values():
        centre = [n for n in region if n.name in taken and n.op_type not in MOVEMENT_OPS]
        if len(centre) == 1:
            found[centre[0].name] = [
                n.name for n in region if n.op_type in MOVEMENT_OPS and n.name not in taken
            ]
    return found


def _feeder(consumer: Node, tensor: str, counterpart: Node, prepared: Model) -> Node | None:
    """What computes, in the prepared model, the input that `tensor` was to this consumer."""
    for position, name in enumerate(consumer.inputs):
        if name == tensor and position < len(counterpart.inputs):
            return prepared.producers.get(counterpart.inputs[position])
    return None


def _regions(prepared: Model, new: Mapping[str, Node]) -> dict[str, tuple[Node, ...]]:
    """Nodes that pre-processing made and that touch each other, in graph order, by name."""
    found: dict[str, tuple[Node, ...]] = {}
    for start in new:
        if start in found:
            continue
        group, open_ends = {start}, [new[start]]
        while open_ends:
            node = open_ends.pop()
            around = [prepared.producers[i] for i in node.inputs if i in prepared.producers]
            around += [c for o in node.outputs for c in prepared.consumers.get(o, ())]
            for other in around:
                if other.name in new and other.name not in group:
                    group.add(other.name)
                    open_ends.append(new[other.name])
        members = tuple(sorted((new[name] for name in group), key=lambda n: n.index))
        found.update((name, members) for name in group)
    return found


# ---------------------------------------------------------------------------------------------
# Quantize


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
    return options


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
    excluded = quantizer_names(prepared, exclude, config)
    only = quantizer_names(prepared, config.nodes, config)
    notes = [*model.notes, *prepared.notes, *_coverage_notes(prepared.model, config)]
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
            progress=_span(progress, 0.1, 0.7),
        )
        notes += observed.notes
    progress(0.7, "quantizing")
    with tempfile.TemporaryDirectory(prefix="quant-inspector-") as name:
        folder = Path(name)
        assert prepared.model.path is not None
        source = copy_model(prepared.model.path, folder)
        (folder / "out").mkdir()
        target = folder / "out" / output.name
        with hushed() as heard:
            try:
                _run_quantizer(
                    config,
                    source,
                    target,
                    only,
                    excluded,
                    None if observed is None else observed.path,
                )
            except _QUANTIZER_ERRORS as error:
                raise QuantizationError(
                    f"ONNX Runtime's quantizer refuses {model.name}: {_shorten(_text(error))}",
                    hint=_refusal_hint(config),
                ) from error
        notes += _quantizer_notes(heard)
        progress(0.9, "trying the result on one sample")
        result = load_model(target)
        if _quantization_nodes(result) <= _quantization_nodes(prepared.model):
            raise _nothing_quantized(prepared.model, config, excluded, only)
        notes += _try(model, prepared.model, result, config, calibration)
        progress(0.98, "writing the file")
        _publish(target, output)
    progress(1.0, "quantized")
    return QuantizedModel(
        path=output,
        sha256=result.sha256,
        notes=tuple(dict.fromkeys(notes)),
        config=config,
        excluded=excluded,
        calibration_reused=observed is not None and observed.reused,
    )


def _quantization_nodes(model: Model) -> int:
    return sum(node.op_type in QUANTIZATION_OPS for node in model.nodes)


def _span(progress: Progress, start: float, stop: float) -> Progress:
    def part(fraction: float, message: str) -> None:
        progress(start + (stop - start) * min(max(fraction, 0.0), 1.0), message)

    return part


def _check_request(model: Model, config: QuantConfig, output: Path) -> None:
    """Refuses what can be seen to fail before any work is done."""
    # Weights that are stored as integers and read through DequantizeLinear are no obstacle.
    if COMPUTES_IN_INTEGERS.intersection(quant_formats(model)):
        listed = _listed(Counter(n.op_type for n in model.nodes if n.op_type in QUANTIZATION_OPS))
        raise QuantizationError(
            f"{model.name} is already quantized ({listed}), expected a float model",
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
    if output.is_dir():
        raise QuantizationError(
            f"{output} is a folder, expected a file to write", hint="Name the .onnx file to write."
        )
    if not output.parent.is_dir():
        raise QuantizationError(
            f"the folder {output.parent} does not exist", hint="Create it, or name another folder."
        )
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
        "weight_type": _QUANT_TYPES[config.weight_type],
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
        activation_type=_QUANT_TYPES[config.activation_type],
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
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.HasField("g") else []
            for body in (*inner, *attribute.graphs):
                yield from body.node
                yield from _bodies(body)


def supported_op_types(config: QuantConfig) -> frozenset[str]:
    """The op types that ONNX Runtime quantizes with a recipe."""
    known = _SUPPORTED[config.format]
    if not config.op_types:
        return known
    # The QDQ quantizer wraps nodes of any type that is asked for.
    asked = frozenset(config.op_types)
    return asked if config.format == "qdq" else asked & known


def _listed(counts: Mapping[str, int], limit: int = 4) -> str:
    common = Counter(counts).most_common()
    shown = ", ".join(f"{count} {op}" for op, count in common[:limit])
    return shown if len(common) <= limit else f"{shown}, …"


def _coverage_notes(prepared: Model, config: QuantConfig) -> list[str]:
    """Which computing nodes the quantizer will not take, and why."""
    notes = []
    inside = Counter(n.op_type for n in _bodies(prepared.proto.graph) if n.op_type in _COMPUTE_OPS)
    if inside:
        notes.append(
            f"{_listed(inside)} inside bodies of If, Loop or Scan stay in float: "
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
            f"{_listed(fused)} (com.microsoft) stay in float: ONNX Runtime's quantizer does not "
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
        why = (
            coverage[0] if coverage else f"none of its nodes is of a type it takes: {_listed(ops)}"
        )
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
            f"its nodes that could be ({_listed(Counter(n.op_type for n in could))}) have no "
            "constant float32 weights or only follow a quantized neighbour"
        )
        hint = "Quantize with another --format (static formats also take computed tensors)."
    return QuantizationError(f"nothing was quantized: {why}", hint=hint)


_NOT_RUN = "the result loads; it was not run, because no feed fits the model"


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
                f"{_shorten(error.message)}",
                hint=_load_hint(model, config),
            ) from error
        if feed is None:
            notes.append(_NOT_RUN)
            continue
        try:
            values = session.run(feed, sample=sample)
        except RunError as error:
            if calibration is None and not _runs(prepared, feed):
                return [_NOT_RUN]
            raise QuantizationError(
                f"the quantized {model.name} does not run on {sample} {how} optimisations: "
                f"{_shorten(error.message)}",
                hint=_load_hint(model, config),
            ) from error
        for name, value in values.items():
            if value.dtype.kind == "f" and not np.all(np.isfinite(value)):
                notes.append(
                    f"output {name!r} of the quantized model is NaN or infinite on {sample}"
                )
    return list(dict.fromkeys(notes))


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


def _publish(target: Path, output: Path) -> None:
    """Moves a finished file (its external data first) to where it was asked for, atomically."""
    try:
        for file in sorted(target.parent.iterdir(), key=lambda f: f == target):
            descriptor, part = tempfile.mkstemp(dir=output.parent, prefix=".part-")
            os.close(descriptor)
            try:
                shutil.copyfile(file, part)
                # mkstemp makes files that only their owner can read.
                mask = os.umask(0)
                os.umask(mask)
                os.chmod(part, 0o666 & ~mask)
                os.replace(part, output.with_name(file.name))
            except BaseException:
                Path(part).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise QuantizationError(
            f"{output} cannot be written: {error.strerror or error}",
            hint="Check the folder's permissions and the free space on its disk.",
        ) from error


# ---------------------------------------------------------------------------------------------
# Read a recipe back


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What a finished file says about how it was made.

    Attributes:
        config: the recipe, as far as the file tells; options it does not tell have their defaults.
        op_types: op types of the float model that are quantized in it, most frequent first.
        notes: what is assumed or cannot be repeated, one sentence each.
    """

    config: QuantConfig
    op_types: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())


# Op types that ONNX Runtime quantizes wherever they compute with float tensors; the others only
# follow a quantized neighbour, so their absence says nothing.
_ALWAYS_QUANTIZED: dict[str, frozenset[str]] = {
    "qdq": frozenset(
        {"Add", "Concat", "Conv", "ConvTranspose", "Gemm", "GlobalAveragePool",
         "InstanceNormalization", "LayerNormalization", "LeakyRelu", "MatMul", "Mul", "Sigmoid",
         "Softmax"}
    ),
    "qoperator": frozenset({"Add", "Conv", "Gemm", "MatMul", "Mul", "Sigmoid", "Softmax"}),
    "dynamic": frozenset({"Conv", "MatMul"}),
}  # fmt: skip
_INTEGER_TWINS = {
    "MatMulInteger": "MatMul",
    "MatMulIntegerToFloat": "MatMul",
    "DynamicQuantizeMatMul": "MatMul",
    "ConvInteger": "Conv",
    "DynamicQuantizeLSTM": "LSTM",
    "QAttention": "Attention",
    "QGemm": "Gemm",
}


def quantizer_format(model: Model) -> str:
    """Which of `FORMATS` a finished file was made with; "" where activations are float.

    Dynamic files hold DequantizeLinear too (behind an embedding), but no QuantizeLinear.
    """
    formats = quant_formats(model)
    static = any(node.op_type == "QuantizeLinear" for node in model.nodes)
    if Format.DYNAMIC in formats and not static:
        return "dynamic"
    if Format.QOPERATOR in formats:
        return "qoperator"
    return "qdq" if Format.QDQ in formats else ""


def read_recipe(quantized: Model, float_model: Model | None = None) -> Recipe:
    """The recipe of a finished file.

    Symmetry is read from the zero points, `reduce_range` from the codes that weights use,
    `per_channel` from the scales. The calibration method is not in a file: minmax is assumed, and
    this is said.

    Args:
        quantized: the finished file.
        float_model: what it was made from; tells which activations were folded.

    Raises:
        QuantizationError: nothing in it is quantized.
    """
    scheme = read_scheme(quantized)
    notes: list[str] = []
    kind = quantizer_format(quantized)
    if not kind and Format.WEIGHT_ONLY in scheme.formats:
        kind = "qdq"
        notes.append(
            "the file stores weights as integers and computes in float, which static quantization "
            "cannot repeat; the recipe quantizes activations as well"
        )
    if not kind:
        raise QuantizationError(
            f"{quantized.name} is not quantized: it has no QuantizeLinear, DequantizeLinear or "
            "integer operator",
            hint="Load the quantized model here and the float model on the other side.",
        )
    made_here = quantized.proto.producer_name == "onnx.quantize"
    if not made_here:
        made_by = f"by {quantized.producer}" if quantized.producer else "by another tool"
        notes.append(
            f"the file was written {made_by}, not by ONNX Runtime's quantizer: re-quantizing with "
            "this recipe gives another model"
        )
    if kind != "dynamic":
        notes.append("a file does not say how it was calibrated; the method minmax is assumed")

    weights = _weight_facts(quantized, scheme)
    activations = [t.qparams for t in scheme.tensors if t.kind == "activation"]
    activation_type = _most_common([q.dtype for q in activations], ACTIVATION_TYPES)
    activation_symmetric: bool | None = None
    alike = [q for q in activations if q.dtype == activation_type]
    if kind == "dynamic":
        activation_type = "uint8"
    elif alike:
        middle = 0 if activation_type.startswith("int") else 2 ** (_bits(activation_type) - 1)
        # Tensors without a range get scale 1 and zero point 0 in any scheme.
        ranged = [q for q in alike if not (np.all(q.scale == 1.0) and np.all(q.zero_point == 0))]
        if ranged and all(np.all(q.zero_point == middle) for q in ranged):
            activation_symmetric = True
    if len({q.dtype for q in activations}) > 1:
        kinds = Counter(q.dtype for q in activations)
        notes.append(f"activations are of mixed types ({_listed(kinds)}); the commonest is taken")

    op_types = _quantized_op_types(
        quantized, scheme, folds=made_here and activation_symmetric is None
    )
    if made_here:
        op_types = {t: n for t, n in op_types.items() if t in _SUPPORTED[kind]}
    pre_processed = any(p.key == "onnx.quant.pre_process" for p in quantized.proto.metadata_props)
    left_out = _left_out(quantized, op_types, kind)
    wanted = tuple(sorted(op_types)) if left_out else ()
    if left_out:
        notes.append(f"no {', '.join(sorted(left_out))} node is quantized in the file")
    if float_model is not None:
        folded = [
            sum(n.op_type in ("Relu", "Clip") for n in m.nodes) for m in (float_model, quantized)
        ]
        if folded[0] > folded[1]:
            notes.append(
                f"{folded[0] - folded[1]} of {folded[0]} Relu and Clip nodes are folded into the "
                "quantization of the node before them"
            )
    return Recipe(
        config=QuantConfig(
            format=kind,
            activation_type=activation_type,
            weight_type=weights.dtype,
            per_channel=weights.per_channel,
            reduce_range=weights.reduce_range,
            activation_symmetric=activation_symmetric,
            weight_symmetric=weights.symmetric,
            op_types=wanted,
            preprocess=pre_processed or not made_here,
        ),
        op_types=tuple(op_types),
        notes=tuple(notes),
    )


def _bits(dtype: str) -> int:
    return int(dtype.removeprefix("u").removeprefix("int"))


def _most_common(dtypes: Sequence[str], known: Sequence[str]) -> str:
    counts = Counter(d for d in dtypes if d in known)
    return counts.most_common(1)[0][0] if counts else "int8"


@dataclass(frozen=True, kw_only=True, slots=True)
class _WeightFacts:
    dtype: str
    symmetric: bool | None
    per_channel: bool
    reduce_range: bool


def _weight_facts(quantized: Model, scheme: Scheme) -> _WeightFacts:
    """What the weights of computing nodes have in common.

    Constants of Add, Mul and the like are left aside: ONNX Runtime quantizes those as activations.
    """
    by_name = quantized.node_by_name
    weighted = {*_COMPUTE_OPS, *_INTEGER_TWINS, "QLinearConv", "QLinearMatMul"}
    found = [
        t
        for t in scheme.tensors
        if t.kind == "weight"
        and t.qparams.dtype in WEIGHT_TYPES
        and any(by_name[c].op_type in weighted for c in t.consumers if c in by_name)
    ]
    found = found or [t for t in scheme.tensors if t.kind == "weight"]
    dtype = _most_common([t.qparams.dtype for t in found], WEIGHT_TYPES)
    alike = [t for t in found if t.qparams.dtype == dtype]
    if not alike:
        return _WeightFacts(dtype=dtype, symmetric=None, per_channel=False, reduce_range=False)
    signed = dtype.startswith("int")
    middle = 0 if signed else 2 ** (_bits(dtype) - 1)
    centred = all(np.all(t.qparams.zero_point == middle) for t in alike)
    # None where it is what ONNX Runtime does unasked: symmetric for signed types only.
    symmetric = None if centred == signed else centred
    low, high = (-64, 64) if signed else (0, 127)
    codes = [c for c in (_codes(quantized, t.quantized) for t in alike) if c is not None and c.size]
    reduce_range = (
        dtype in ("int8", "uint8")
        and bool(codes)
        and all(int(c.min()) >= low and int(c.max()) <= high for c in codes)
    )
    return _WeightFacts(
        dtype=dtype,
        symmetric=symmetric,
        per_channel=any(t.qparams.scale.size > 1 for t in alike),
        reduce_range=reduce_range,
    )


def _codes(model: Model, name: str) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    values = model.constant(name)
    return None if values is None or values.dtype.kind == "f" else values.astype(np.int64)


def _quantized_op_types(quantized: Model, scheme: Scheme, *, folds: bool) -> dict[str, int]:
    """How many quantized nodes there are by the float model's op type, most frequent first.

    Args:
        quantized: the finished file.
        scheme: its quantization.
        folds: whoever wrote it folds a quantized Relu or Clip into the node before it, so that
            one which is still there and could have been folded is in float.
    """
    reads = {t.name for t in scheme.tensors}
    weights = {t.name for t in scheme.tensors if t.kind != "activation"}
    writes = {t.before for t in scheme.tensors if t.before}
    counts: Counter[str] = Counter()
    for node in quantized.nodes:
        if node.op_type in _INTEGER_TWINS:
            counts[_INTEGER_TWINS[node.op_type]] += 1
        elif node.op_type.startswith("QLinear"):
            counts[node.op_type.removeprefix("QLinear")] += 1
        elif node.op_type in QUANTIZATION_OPS or node.op_type == "Constant":
            continue
        elif any(i in weights for i in node.inputs):
            counts[node.op_type] += 1
        elif any(i in reads for i in node.inputs) and any(o in writes for o in node.outputs):
            # A node in float between quantized neighbours reads and feeds Q/DQ as well; what tells
            # it apart is a float weight.
            unfolded = (
                folds
                and node.op_type in ("Relu", "Clip")
                and len(quantized.consumers[node.inputs[0]]) == 1
            )
            if not unfolded and not _float_constants(quantized, node):
                counts[node.op_type] += 1
    return dict(counts.most_common())


def _left_out(quantized: Model, op_types: Mapping[str, int], kind: str) -> set[str]:
    """Op types that compute in the file with float tensors, though they are always quantized."""
    return {
        node.op_type
        for node in quantized.nodes
        if node.op_type in _ALWAYS_QUANTIZED[kind]
        and node.op_type not in op_types
        and node.outputs
        and quantized.info(node.outputs[0]).dtype in FLOAT_DTYPES
        # What dynamic and integer formats add are scalar or unnamed helpers.
        and (
            kind == "qdq" or any(quantized.info(i).shape for i in _float_constants(quantized, node))
        )
    }


def _float_constants(model: Model, node: Node) -> list[str]:
    return [
        i for i in node.inputs if i in model.constant_names and model.info(i).dtype in FLOAT_DTYPES
    ]


# ---------------------------------------------------------------------------------------------
# The same thing elsewhere


def onnxruntime_call(
    config: QuantConfig,
    exclude: Sequence[str] = (),
    *,
    prepared: Prepared | None = None,
    model: str = "model.onnx",
    output: str = "model.int8.onnx",
) -> str:
    """Python that makes the same model with ONNX Runtime alone, to copy.

    `calibration_data_reader` is left for the reader to define. It writes the same bytes where all
    nodes of the file have names.

    Args:
        config: the recipe.
        exclude: nodes of the float file; of the prepared model where `prepared` is not given.
        prepared: turns names of the float file into those that ONNX Runtime has to be given.
        model: the float model's file, as the text shall name it.
        output: the file to write.
    """
    names = list(exclude if prepared is None else quantizer_names(prepared, exclude, config))
    only = list(
        config.nodes if prepared is None else quantizer_names(prepared, config.nodes, config)
    )
    source = model
    head: list[str] = []
    body: list[str] = []
    lift = prepared.lifted_to if prepared is not None else None
    if config.preprocess:
        source = "model.prepared.onnx"
        skip = "" if prepared is None or prepared.symbolic else ", skip_symbolic_shape=True"
        body.append(f"quant_pre_process({model!r}, {source!r}{skip})")
        if lift is not None:
            body.append(
                f"onnx.save(onnx.version_converter.convert_version(onnx.load({source!r}), {lift}), "
                f"{source!r})"
            )
            body.append(f"quant_pre_process({source!r}, {source!r}{skip})")
    elif lift is not None:
        source = "model.prepared.onnx"
        body.append(
            f"onnx.save(onnx.version_converter.convert_version(onnx.load({model!r}), {lift}), "
            f"{source!r})"
        )
    if lift is not None:
        head += ["import onnx", "import onnx.version_converter"]
    arguments = [f"    {source!r},", f"    {output!r},"]
    imports = ["QuantType"]
    if config.static:
        imports += ["CalibrationMethod", "QuantFormat", "quantize_static"]
        arguments += [
            "    calibration_data_reader,",
            f"    quant_format=QuantFormat.{'QDQ' if config.format == 'qdq' else 'QOperator'},",
            f"    activation_type=QuantType.{_QUANT_TYPES[config.activation_type].name},",
            f"    calibrate_method=CalibrationMethod.{METHODS[config.method].name},",
        ]
    else:
        imports.append("quantize_dynamic")
    arguments.append(f"    weight_type=QuantType.{_QUANT_TYPES[config.weight_type].name},")
    if config.per_channel:
        arguments.append("    per_channel=True,")
    if config.reduce_range:
        arguments.append("    reduce_range=True,")
    if config.op_types:
        arguments.append(f"    op_types_to_quantize={list(config.op_types)!r},")
    if only:
        arguments.append(f"    nodes_to_quantize={only!r},")
    arguments.append(f"    nodes_to_exclude={names!r},")
    options = extra_options(config)
    if options:
        arguments.append(f"    extra_options={options!r},")
    if config.preprocess:
        imports.append("quant_pre_process")
    function = "quantize_static" if config.static else "quantize_dynamic"
    head.append(f"from onnxruntime.quantization import {', '.join(sorted(imports))}")
    return "\n".join([*head, "", *body, f"{function}(", *arguments, ")", ""])


def onnxruntime_command(
    config: QuantConfig,
    exclude: Sequence[str] = (),
    *,
    prepared: Prepared | None = None,
    model: str = "model.onnx",
    output: str = "model.int8.onnx",
) -> str:
    """Shell lines that make the same model with ONNX Runtime's own commands, to copy.

    Its runner reads samples from folders ``test_data_set_*`` beside the model. What it has no
    option for is said in a comment line.
    """
    if not config.static:
        return "# ONNX Runtime has no command for dynamic quantization; use the Python call.\n"
    missing = []
    if config.reduce_range:
        missing.append("reduce_range")
    if config.activation_symmetric is not None:
        missing.append("ActivationSymmetric")
    if config.weight_symmetric is not None:
        missing.append("WeightSymmetric")
    if config.method == "percentile" and config.percentile is not None:
        missing.append("CalibPercentile")
    if config.op_types:
        missing.append("op_types_to_quantize")
    if prepared is not None and prepared.lifted_to is not None:
        missing.append(f"a conversion to opset {prepared.lifted_to}")
    names = list(exclude if prepared is None else quantizer_names(prepared, exclude, config))
    only = list(
        config.nodes if prepared is None else quantizer_names(prepared, config.nodes, config)
    )
    lines = [f"# these commands have no option for {', '.join(missing)}"] if missing else []
    # The runner lists the folder of its model's path, so the path needs one.
    folder = os.path.dirname(model) or "."
    source = model = os.path.join(folder, os.path.basename(model))
    if config.preprocess:
        source = os.path.join(folder, "model.prepared.onnx")
        words = ["python", "-m", "onnxruntime.quantization.preprocess"]
        words += ["--input", model, "--output", source]
        if prepared is not None and not prepared.symbolic:
            words += ["--skip_symbolic_shape", "True"]
        lines.append(shlex.join(words))
    words = ["python", "-m", "onnxruntime.quantization.static_quantize_runner"]
    words += ["-i", source, "-o", output, "--quant_format", config.format]
    words += ["--activation_type", f"q{config.activation_type}"]
    words += ["--weight_type", f"q{config.weight_type}"]
    words += ["--calibration_method", config.method]
    # The runner's own default widens small ranges, which the Python function does not.
    words += ["--minimum_real_range", "0"]
    if config.per_channel:
        words.append("--per_channel")
    if only:
        words += ["--nodes_to_quantize", *only]
    if names:
        words += ["--nodes_to_exclude", *names]
    lines.append(shlex.join(words))
    return "\n".join([*lines, ""])


def config_options(config: QuantConfig) -> list[str]:
    """The recipe as words of our command line; options at their defaults are left out."""
    words: list[str] = []
    defaults = QuantConfig()
    for item in fields(config):
        value = getattr(config, item.name)
        if value == getattr(defaults, item.name):
            continue
        option = f"--{item.name.replace('_', '-')}"
        if item.name == "preprocess":
            words.append("--no-preprocess")
        elif isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, tuple):
            for entry in value:
                words += [option, entry]
        else:
            words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
    return words


def inspector_command(
    config: QuantConfig,
    exclude: Sequence[str] = (),
    *,
    float_name: str = "model.onnx",
    output: str = "",
    inputs: str | None = None,
    calibration: str | None = None,
) -> str:
    """One shell line that makes the same model with our command line, to copy.

    Args:
        config: the recipe.
        exclude: nodes of the float file.
        float_name: the float model's file.
        output: the file to write; by default "<float model>.int8.onnx" (its weight type).
        inputs: where the feeds are.
        calibration: where the calibration feeds are, if elsewhere.
    """
    output = output or f"{Path(float_name).stem}.{config.weight_type}.onnx"
    words = ["quant-inspector", "quantize", float_name, "-o", output]
    if inputs is not None:
        words += ["--inputs", inputs]
    if calibration is not None:
        words += ["--calibration", calibration]
    words += config_options(config)
    for name in exclude:
        words += ["--exclude", name]
    return shlex.join(words)
