"""The model the quantizer is given: pre-processed in a private copy, and what became of each node.

ONNX Runtime's own pre-processing (symbolic shapes, basic optimisation, shape inference) runs on a
copy with stable node names, which is kept on disk. Exclusions name nodes of the user's file, so
`Prepared.successors` says which node of the prepared model took each of them over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx.shape_inference
import onnx.version_converter
from onnxruntime.quantization import (
    quant_pre_process,
)

from inspector.calibration import CALIBRATOR_ERRORS, hushed
from inspector.equalize import MARK_VERSION, equalize, equalized_notes
from inspector.errors import (
    ExclusionError,
    ModelError,
    QuantizationError,
)
from inspector.model import Model, Node
from inspector.model_files import load_model, write_proto
from inspector.recipe import QuantConfig, nearest_names
from inspector.runtime import open_session, runtime_version

# The oldest ai.onnx opset that QuantizeLinear exists in, and those of its later abilities.
OLDEST_OPSET = 10
PER_CHANNEL_OPSET = 13
WIDE_TYPES_OPSET = 21

# Nodes that only move values about: what a fused region is *for* is never one of them.
MOVEMENT_OPS = frozenset(
    {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)

# What the quantizer and its pre-processing raise on graphs they cannot handle.
QUANTIZER_ERRORS = (
    *CALIBRATOR_ERRORS,
    onnx.shape_inference.InferenceError,
    onnx.version_converter.ConvertError,
    onnx.checker.ValidationError,
)

# Change it whenever what is prepared, or how it is stored, changes.
_PREPARED_VERSION = 1
# From this size on a protobuf needs its tensors outside.
LARGE_BYTES = 2**31 - 1


def unknown_node(name: str, model: Model) -> ExclusionError:
    """The error for a node name that the model does not have, with the three nearest names."""
    if not name:
        return ExclusionError(
            "an empty node name was given; ONNX Runtime would take it for every unnamed node",
            hint="Name the node; `quant-inspector show MODEL --json -` lists all names.",
        )
    near = nearest_names(name, (n.name for n in model.nodes if n.op_type != "Constant"))
    listed = ", ".join(repr(n) for n in near)
    return ExclusionError(
        f"{model.name} has no node {name!r}; the nearest names are {listed}",
        hint="Use one of these names, or a pattern with * and ?.",
    )


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
        config: its `preprocess`, `equalize` and the types that need a newer opset matter here.
        cache: folder for caches.

    Raises:
        QuantizationError: the opset is too old or cannot be lifted.
        ModelError: ONNX cannot read the model's shapes at all.
    """
    wanted = wanted_opset(config)
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
        or hashlib.sha256(model.complete().SerializeToString(deterministic=True)).hexdigest()
    )
    parts = [_PREPARED_VERSION, identity, config.preprocess, lift, runtime_version()]
    if config.equalize:
        parts += ["equalize", MARK_VERSION]
    key = hashlib.sha256(json.dumps([*parts, onnx.__version__]).encode()).hexdigest()
    folder = cache / "prepared" / key
    found = _read_prepared(folder)
    if found is not None:
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
    try:
        _write_prepared(model, config, lift, part)
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


def wanted_opset(config: QuantConfig) -> int | None:
    """The oldest opset that a recipe's types and scales can be stored in; None where any can."""
    wide = {"int16", "uint16", "int4", "uint4"}
    if config.format != "qdq":
        return None
    given = {each.quant_type for each in config.overrides}
    if wide & {config.activation_type, config.weight_type, *given}:
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


def _write_prepared(model: Model, config: QuantConfig, lift: int | None, folder: Path) -> None:
    notes: list[str] = []
    preprocess = config.preprocess
    symbolic = True
    # What is too large, and what the runtime refuses, is said here, before a later step blames
    # something else.
    proto = model.complete()
    open_session(model, optimized=False)
    if config.equalize:
        # On the user's own graph: its nodes keep their names, so successors are found as ever.
        made = equalize(model)
        proto = made.model.complete()
        notes += equalized_notes(made)
    with tempfile.TemporaryDirectory(prefix="quant-inspector-") as name:
        work = Path(name)
        write_proto(proto, work / "float.onnx")
        if preprocess:
            if model.opset <= OLDEST_OPSET:
                notes.append(
                    f"opset {model.opset} was lifted to 11 by pre-processing, because the "
                    "quantizer needs it"
                )
            symbolic = _pre_process(work / "float.onnx", work / "first.onnx", notes)
            proto = load_model(work / "first.onnx").complete()
        if lift is not None:
            proto = _lift(proto, lift, model, notes)
            if preprocess:
                # The conversion leaves constants and pairs of nodes that the optimiser folds.
                write_proto(Model(proto).proto, work / "lifted.onnx")
                _pre_process(work / "lifted.onnx", work / "second.onnx", [], symbolic=symbolic)
                proto = load_model(work / "second.onnx").complete()
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
                    f"symbolic shape inference failed ({shorten(reason)}), so pre-processing ran "
                    "without it"
                )
        if not symbolic:
            heard.clear()
            try:
                quant_pre_process(source, target, skip_symbolic_shape=True, **options)
            except QUANTIZER_ERRORS as error:
                raise QuantizationError(
                    f"ONNX Runtime's pre-processing fails: {shorten(text_of(error))}",
                    hint="Try it with --no-preprocess.",
                ) from error
    if any("Optimization Failed" in line for line in heard):
        cause = next((line for line in heard if "Traceback" in line), "")
        last = cause.strip().splitlines()[-1] if cause.strip() else "no reason given"
        notes.append(f"the optimisation in pre-processing failed and was left out: {shorten(last)}")
    return symbolic


def _lift(proto: onnx.ModelProto, opset: int, model: Model, notes: list[str]) -> onnx.ModelProto:
    why = "per-channel scales need" if opset == PER_CHANNEL_OPSET else "16- and 4-bit types need"
    try:
        lifted = onnx.version_converter.convert_version(proto, opset)
    except QUANTIZER_ERRORS as error:
        raise QuantizationError(
            f"{why} opset {opset}, and {model.name} (opset {model.opset}) cannot be converted: "
            f"{shorten(text_of(error))}",
            hint=f"Export the model with opset {opset} or newer, or quantize "
            + ("per tensor." if opset == PER_CHANNEL_OPSET else "to 8 bits."),
        ) from error
    notes.append(f"opset {model.opset} was lifted to {opset}, because {why} it")
    return lifted


def text_of(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if isinstance(error, LookupError) or not text else text


def shorten(text: str, limit: int = 300) -> str:
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
