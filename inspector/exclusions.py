"""The exclusion list: its file, from names and patterns to nodes, and what it really changed.

A list names nodes of the user's float *file*. Dropping a node from quantization removes Q/DQ only
from tensors that no other quantized node wants: an excluded node can still read a dequantized
input, its output can stay quantized, a shared weight stays int8. `effect_of` reads the new graph
back and says so for every entry; `free_fully` names the further nodes it takes.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inspector.comparison import made_with
from inspector.errors import ExclusionError, InspectorError, ReportError
from inspector.model import FLOAT_DTYPES, Model, Node
from inspector.prepare import Prepared, unknown_node
from inspector.publishing import give_name
from inspector.quantize import supported_op_types
from inspector.recipe import QuantConfig, nearest_names, quantizer_format
from inspector.scheme import DQ, Q

FORMAT = "quant-inspector/exclusions"
VERSION = 1
# A list of every node of a large model has under 2 MB; deeper nesting than ours is no list.
MAX_BYTES = 16 * 2**20
MAX_DEPTH = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class ExclusionEntry:
    """One node to leave in float.

    Attributes:
        name: of a node of the float file.
        op_type: that node's, "" where unsaid.
        outputs: its output tensors, for readers that know tensors only.
        reason: why it is on the list, in the user's or the tool's words.
        output_sqnr_gain_db: what leaving it in float alone gave at the outputs; None unmeasured.
    """

    name: str
    op_type: str = ""
    outputs: tuple[str, ...] = ()
    reason: str = ""
    output_sqnr_gain_db: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExclusionList:
    """Nodes to leave in float, what they were chosen for and with what result.

    Attributes:
        nodes: entries by name.
        patterns: further nodes by pattern (``*`` and ``?``).
        float_name: the float model's file name, "" where unknown.
        float_sha256: its hash; None where unknown.
        recipe: what it was tried with; None where unsaid.
        measured: samples and output SQNR before and after; None unmeasured.
        made_with: versions of the tools.
    """

    nodes: tuple[ExclusionEntry, ...] = ()
    patterns: tuple[str, ...] = ()
    float_name: str = ""
    float_sha256: str | None = None
    recipe: QuantConfig | None = None
    measured: Mapping[str, Any] | None = None
    made_with: Mapping[str, Any] = field(default_factory=made_with)


# ---------------------------------------------------------------------------------------------
# The file


def to_json(exclusions: ExclusionList) -> dict[str, Any]:
    """The list as strict JSON values: non-finite numbers are strings."""
    nodes = []
    for entry in exclusions.nodes:
        node: dict[str, Any] = {
            "name": entry.name,
            "op_type": entry.op_type,
            "outputs": list(entry.outputs),
            "reason": entry.reason,
        }
        if entry.output_sqnr_gain_db is not None:
            node["output_sqnr_gain_db"] = entry.output_sqnr_gain_db
        nodes.append(node)
    values: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "float_model": {"name": exclusions.float_name, "sha256": exclusions.float_sha256},
        "nodes": nodes,
        "patterns": list(exclusions.patterns),
        "recipe": None if exclusions.recipe is None else exclusions.recipe.to_json(),
        "measured": None if exclusions.measured is None else dict(exclusions.measured),
        "made_with": dict(exclusions.made_with),
    }
    strict: dict[str, Any] = _strict(values)
    return strict


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return value


class _Reader:
    """Takes a parsed list apart; every complaint names the file and the place."""

    def __init__(self, shown: str) -> None:
        self.shown = shown

    def error(self, what: str, hint: str = "") -> ExclusionError:
        return ExclusionError(
            f"{self.shown}: {what}",
            hint=hint or "Correct the file, or save the list again from the app or the CLI.",
        )

    def get(self, values: Mapping[str, Any], key: str, kind: type, where: str, default: Any) -> Any:
        value = values.get(key)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise self.error(f"{where} is {_kind(value)}, expected {_KINDS[kind]}")
        return value

    def strings(self, values: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
        found = self.get(values, key, list, where, [])
        for position, value in enumerate(found):
            if not isinstance(value, str):
                raise self.error(f"{where}[{position}] is {_kind(value)}, expected a string")
        return tuple(found)

    def number(self, values: Mapping[str, Any], key: str, where: str) -> float | None:
        value = values.get(key)
        if value in ("Infinity", "-Infinity", "NaN"):
            return float(value)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{where} is {_kind(value)}, expected a number")
        return float(value)

    def entry(self, value: Any, position: int) -> ExclusionEntry:
        where = f"nodes[{position}]"
        if not isinstance(value, dict):
            raise self.error(f"{where} is {_kind(value)}, expected an object with a name")
        name = self.get(value, "name", str, f"{where}.name", None)
        if name is None:
            raise self.error(f"{where} has no name")
        if not name:
            raise self.error(
                f"{where} has an empty name; ONNX Runtime would take it for every unnamed node",
                "Name the node; `quant-inspector show MODEL --json -` lists all names.",
            )
        return ExclusionEntry(
            name=name,
            op_type=self.get(value, "op_type", str, f"{where}.op_type", ""),
            outputs=self.strings(value, "outputs", f"{where}.outputs"),
            reason=self.get(value, "reason", str, f"{where}.reason", ""),
            output_sqnr_gain_db=self.number(
                value, "output_sqnr_gain_db", f"{where}.output_sqnr_gain_db"
            ),
        )


_KINDS: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return _KINDS.get(type(value), "something else")


def from_json(values: Any, *, shown: str = "the exclusion list") -> ExclusionList:
    """The list that `to_json` wrote; everything but format, version and nodes may be absent.

    Args:
        values: parsed JSON.
        shown: the file's name, for messages.

    Raises:
        ExclusionError: it is no exclusion list, or something in it has the wrong shape.
    """
    reader = _Reader(shown)
    if not isinstance(values, dict):
        raise reader.error(f"it holds {_kind(values)}, expected a JSON object")
    if values.get("format") != FORMAT:
        raise reader.error(
            f'its "format" is {values.get("format")!r}, expected {FORMAT!r}',
            "Name a list saved by Quant Inspector, or give node names with --exclude.",
        )
    version = values.get("version")
    if version != VERSION or isinstance(version, bool):
        raise reader.error(
            f"it is of version {version!r}, this installation reads version {VERSION}",
            "Update Quant Inspector, or save the list with this version.",
        )
    if "nodes" not in values and "patterns" not in values:
        raise reader.error('it has neither "nodes" nor "patterns"')
    entries = tuple(
        reader.entry(value, position)
        for position, value in enumerate(reader.get(values, "nodes", list, "nodes", []))
    )
    names: set[str] = set()
    for entry in entries:
        if entry.name in names:
            raise reader.error(f"node {entry.name!r} is listed twice", "Take one of the two out.")
        names.add(entry.name)
    patterns = reader.strings(values, "patterns", "patterns")
    if "" in patterns:
        raise reader.error("an empty pattern is listed", "Take it out.")
    model = reader.get(values, "float_model", dict, "float_model", {})
    recipe = reader.get(values, "recipe", dict, "recipe", None)
    if recipe is not None:
        try:
            recipe = QuantConfig.from_json(recipe)
        except InspectorError as error:
            raise reader.error(error.message, error.hint) from error
    return ExclusionList(
        nodes=entries,
        patterns=patterns,
        float_name=reader.get(model, "name", str, "float_model.name", ""),
        float_sha256=reader.get(model, "sha256", str, "float_model.sha256", None),
        recipe=recipe,
        measured=reader.get(values, "measured", dict, "measured", None),
        made_with=reader.get(values, "made_with", dict, "made_with", {}),
    )


def read_exclusions(path: str | os.PathLike[str]) -> ExclusionList:
    """The exclusion list in a file.

    Raises:
        ExclusionError: the file is missing, too large or no exclusion list.
    """
    path = Path(path)
    reader = _Reader(path.name)
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ExclusionError(
            f"the exclusion list {path} cannot be read: {error.strerror}",
            hint="Check the path, or save a list with --save-exclusions.",
        ) from error
    if len(data) > MAX_BYTES:
        raise reader.error(f"it is larger than {MAX_BYTES // 2**20} MB, too large for a list")
    try:
        values = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        text = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise reader.error(f"it is not valid JSON: {text}") from error
    if _depth(values) > MAX_DEPTH:
        raise reader.error(f"it is nested deeper than {MAX_DEPTH} levels")
    return from_json(values, shown=path.name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
        raise ValueError(f"key {twice!r} appears twice in an object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; write it as a string")


def _depth(value: Any) -> int:
    deepest, open_ends = 0, [(value, 1)]
    while open_ends:
        current, depth = open_ends.pop()
        if isinstance(current, dict | list):
            deepest = max(deepest, depth)
            inner = current.values() if isinstance(current, dict) else current
            open_ends.extend((v, depth + 1) for v in inner)
    return deepest


def write_exclusions(exclusions: ExclusionList, path: str | os.PathLike[str]) -> None:
    """Writes a list so that `path` holds all of it or what it held before.

    Raises:
        ReportError: the file cannot be written.
    """
    path = Path(path)
    text = json.dumps(to_json(exclusions), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    part = ""
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=".part-", encoding="utf-8", newline="\n", delete=False
        ) as stream:
            part = stream.name
            stream.write(text)
        give_name(Path(part), path)
    except OSError as error:
        if part:
            Path(part).unlink(missing_ok=True)
        raise ReportError(
            f"the exclusion list {path} cannot be written: {error.strerror}",
            hint="Name a file in a folder that exists and can be written to.",
        ) from error


def check_same_model(
    exclusions: ExclusionList, float_model: Model, accept_other_model: bool = False
) -> tuple[str, ...]:
    """Notes on using a list with a model.

    Raises:
        ExclusionError: it was made for another model, and that was not accepted.
    """
    made_for = exclusions.float_name or "a model"
    if exclusions.float_sha256 is None:
        return (
            f"the exclusion list does not say which model it was made for ({made_for}, no hash); "
            "its names are looked up in this one",
        )
    if exclusions.float_sha256.lower() == float_model.sha256.lower():
        return ()
    hashes = f"{exclusions.float_sha256[:12]}…, this is {float_model.sha256[:12]}…"
    if accept_other_model:
        return (f"the exclusion list was made for another model ({made_for}, {hashes})",)
    raise ExclusionError(
        f"the exclusion list was made for {made_for} (sha256 {hashes}), not for this "
        f"{float_model.name}",
        hint="Load the model it was made for, or use it all the same with --accept-other-model.",
    )


# ---------------------------------------------------------------------------------------------
# Names


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """What names and patterns stand for.

    Attributes:
        names: nodes of the float file, each once, in the order of the entries and within a pattern
            in file order; a node that pre-processing added stands under its own name.
        prepared_names: the nodes of the prepared model that these became, each once; `names` where
            no prepared model was given.
        notes: what patterns matched, and what became of nodes in pre-processing.
    """

    names: tuple[str, ...]
    prepared_names: tuple[str, ...]
    notes: tuple[str, ...]


def is_pattern(text: str) -> bool:
    """It holds ``*`` or ``?`` (a node of exactly that name still wins)."""
    return "*" in text or "?" in text


def matching_names(pattern: str, names: Iterable[str]) -> list[str]:
    """The names a pattern stands for, in order: ``*`` is any text, ``?`` one character.

    Brackets are plain characters, because node names are full of them.
    """
    parts = (".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern)
    expression = re.compile("".join(parts), re.DOTALL)
    return [name for name in names if expression.fullmatch(name)]


def resolve(
    entries: Sequence[str], float_model: Model, *, prepared: Prepared | None = None
) -> Resolved:
    """The nodes that names and patterns stand for.

    Args:
        entries: exact names (which win) or patterns.
        float_model: the float file.
        prepared: says what pre-processing made of the nodes; its own new nodes may be named too.

    Raises:
        ExclusionError: an empty name, a name that is not in the model, or a pattern that matches
            nothing.
    """
    names: dict[str, None] = {}
    notes = []
    # Constants cannot be quantized or left out: a pattern does not mean them.
    candidates = [n.name for n in float_model.nodes if n.op_type != "Constant"]
    for entry in entries:
        if entry in float_model.node_by_name:
            names[entry] = None
        elif entry and prepared is not None and entry in prepared.model.node_by_name:
            names[entry] = None
            notes.append(f"{entry} is a node that pre-processing added to the model")
        elif is_pattern(entry):
            found = matching_names(entry, candidates)
            if not found:
                near = ", ".join(repr(n) for n in nearest_names(entry, candidates))
                raise ExclusionError(
                    f"the pattern {entry!r} matches none of the {len(candidates)} nodes of "
                    f"{float_model.name}; the nearest names are {near}",
                    hint="Correct the pattern; * stands for any text and ? for one character.",
                )
            names.update(dict.fromkeys(found))
            notes.append(f"{entry} stands for {_enumerate(found, 'node')}")
        else:
            raise unknown_node(entry, float_model)
    if prepared is None:
        return Resolved(names=tuple(names), prepared_names=tuple(names), notes=tuple(notes))
    became: dict[str, None] = {}
    gone = []
    for name in names:
        successor = prepared.successors.get(name, name)
        if successor is None:
            gone.append(name)
            continue
        became[successor] = None
        if successor != name:
            notes.append(
                f"{name} became part of {successor} in pre-processing, which is left in float "
                "in its place"
            )
    if gone:
        notes.append(
            f"pre-processing removed {_enumerate(gone, 'node')} or moved "
            f"{'it' if len(gone) == 1 else 'them'} elsewhere: nothing is left there to exclude"
        )
    return Resolved(names=tuple(names), prepared_names=tuple(became), notes=tuple(notes))


def _enumerate(names: Sequence[str], what: str, limit: int = 5) -> str:
    if len(names) == 1:
        return names[0]
    shown = ", ".join(names[:limit])
    return f"{len(names)} {what}s ({shown}{', …' if len(names) > limit else ''})"


def _sentence_list(names: Sequence[str]) -> str:
    if len(names) <= 1:
        return "".join(names)
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} more"
    return f"{', '.join(names[:-1])} and {names[-1]}"


# ---------------------------------------------------------------------------------------------
# What a list really changed

FLOAT_NOW = "float now"
STILL_FED = "still fed by Q/DQ"
WEIGHT_QUANTIZED = "weight still quantized"
NO_SUCH_NODE = "no such node"
NOTHING_CHANGED = "nothing changed"
# Of a tensor that the recipe gives another integer type.
TYPE_KEPT = "keeps its type"


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryEffect:
    """What leaving one node in float really did.

    Attributes:
        name: the node of the prepared model.
        op_type: that node's, "" where there is none.
        status: "float now", "still fed by Q/DQ", "weight still quantized", "no such node" or
            "nothing changed"; of a type set for a tensor, see `override_effects`.
        details: why, one sentence each.
        output_dtype: "float32", or the integer type its output is quantized to right away.
        weight_dtype: of its constant input; None where it has none.
        input_dtypes: of its computed float inputs, in order; the integer type where the values come
            out of a DequantizeLinear.
        neighbours: the nodes that keep its tensors quantized.
    """

    name: str
    op_type: str
    status: str
    details: tuple[str, ...] = ()
    output_dtype: str = ""
    weight_dtype: str | None = None
    input_dtypes: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()


# One input whose values they hand on unchanged: behind them a dequantized tensor is still one.
_CARRIERS = frozenset(
    {"Expand", "Flatten", "Gather", "GatherElements", "Identity", "MaxPool", "Pad", "Reshape",
     "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)  # fmt: skip
# Quantized by ONNX Runtime only where their input already is; they never ask for it themselves.
_FOLLOWERS = frozenset(
    {"AveragePool", "Clip", "Flatten", "Gather", "GatherElements", "MaxPool", "Relu", "Reshape",
     "Resize", "Slice", "Squeeze", "TopK", "Transpose", "Unsqueeze", "Where"}
)  # fmt: skip
# The computed inputs they ask to have quantized; all inputs for others.
_ASKED_INPUTS = {"Conv": (0,), "ConvTranspose": (0,), "Gemm": (0, 1)}


class _Graph:
    """A prepared model beside a model quantized from it: who keeps which tensor quantized.

    Works by graph edges. Which nodes ask for a tensor follows from ONNX Runtime's rules by op
    type; whether such a node is quantized at all is read from the quantized graph.
    """

    def __init__(self, prepared: Model, quantized: Model, config: QuantConfig | None) -> None:
        self.prepared = prepared
        self.quantized = quantized
        kind = quantizer_format(quantized)
        self.qdq = kind in ("qdq", "")
        self.dynamic = kind == "dynamic"
        self.op_types = supported_op_types(config or QuantConfig())
        # QLinearAveragePool quantizes its input itself.
        self.followers = _FOLLOWERS if self.qdq else _FOLLOWERS - {"AveragePool"}
        self.only = frozenset(config.nodes if config is not None else ())

    def is_float(self, tensor: str) -> bool:
        """It is of a float type; ONNX Runtime leaves alone what it cannot infer the type of."""
        return self.prepared.info(tensor).dtype in FLOAT_DTYPES

    def computed_inputs(self, node: Node) -> list[str]:
        """Its float inputs that are not constants, nor stored as integers by the float file."""
        return [
            t
            for t in dict.fromkeys(node.inputs)
            if t
            and t not in self.prepared.constant_names
            and self.is_float(t)
            and not _dq_dtype(self.prepared, t)
        ]

    def constants(self, node: Node) -> list[str]:
        """Its float constants in order, so the weight before the bias."""
        return [
            t
            for t in dict.fromkeys(node.inputs)
            if t in self.prepared.constant_names and self.is_float(t)
        ]

    def counterpart(self, node: Node, quantized: Model | None = None) -> Node | None:
        """The same node in the quantized model; None where it was replaced or folded."""
        by_name = (quantized or self.quantized).node_by_name
        found = by_name.get(node.name)
        if found is None and node.op_type == "Gemm":
            found = by_name.get(f"{node.name}_MatMul")
        return found

    def quantizes(self, node: Node) -> bool:
        """The node is quantized itself (QDQ), so it asks for its tensors."""
        there = self.counterpart(node)
        if there is None:
            return True
        constants = self.constants(node)
        if constants:
            at = list(node.inputs).index(constants[0])
            return at < len(there.inputs) and _dq_dtype(self.quantized, there.inputs[at]) != ""
        if node.op_type not in self.op_types or (self.only and node.name not in self.only):
            return False
        # Without a constant it can only be told by Q/DQ all around it.
        inputs = [
            there.inputs[i]
            for i, t in enumerate(node.inputs)
            if t and i < len(there.inputs) and self.is_float(t)
        ]
        if not all(_dq_dtype(self.quantized, t) for t in inputs):
            return False
        outputs = [
            there.outputs[i]
            for i, t in enumerate(node.outputs)
            if t and i < len(there.outputs) and self.is_float(t)
        ]
        return all(_q_dtype(self.quantized, t) for t in outputs if self._used(t))

    def _used(self, tensor: str) -> bool:
        return bool(self.quantized.consumers.get(tensor))

    def askers(self, tensor: str, but: str) -> list[str]:
        """The nodes other than `but` that keep a computed tensor quantized, in graph order."""
        found: dict[str, Node] = {}
        producer = self.prepared.producers.get(tensor)
        if producer is not None and producer.name != but and self._makes_quantized(producer):
            found[producer.name] = producer
        if self.qdq:
            for consumer in self.prepared.consumers.get(tensor, ()):
                if consumer.name != but and self._asks_for(consumer, tensor):
                    found[consumer.name] = consumer
        return [n.name for n in sorted(found.values(), key=lambda n: n.index)]

    def _makes_quantized(self, producer: Node) -> bool:
        if not self.qdq:
            return any(self._left_integer(o) for o in producer.outputs if o)
        if producer.op_type not in self.followers:
            return self.quantizes(producer)
        there = self.counterpart(producer)
        if there is None:
            return True  # folded into the quantization of the node before it
        source = producer.inputs[0]
        if source in self.prepared.constant_names:
            return _dq_dtype(self.quantized, there.inputs[0]) != ""
        # A follower that reads Q/DQ and whose output is not asked for by anybody else follows.
        return _dq_dtype(self.quantized, there.inputs[0]) != "" and any(
            _q_dtype(self.quantized, o) for o in there.outputs
        )

    def _left_integer(self, tensor: str) -> bool:
        maker = self.quantized.producers.get(tensor)
        return maker is None or maker.op_type == DQ

    def _asks_for(self, consumer: Node, tensor: str) -> bool:
        if consumer.op_type in self.followers:
            return False
        positions = _ASKED_INPUTS.get(consumer.op_type, range(len(consumer.inputs)))
        asked = [consumer.inputs[i] for i in positions if i < len(consumer.inputs)]
        return tensor in asked and self.quantizes(consumer)

    def input_keepers(self, tensor: str, but: str) -> list[str]:
        """The nodes that keep what reaches `but` through this input quantized."""
        found = dict.fromkeys(self.askers(tensor, but))
        producer = self.prepared.producers.get(tensor)
        if producer is None or producer.op_type not in _CARRIERS:
            return list(found)
        source = producer.inputs[0]
        if source in self.prepared.constant_names or not self.is_float(source):
            return list(found)
        if producer.op_type in self.followers:
            # It follows its input; once that is in float, so is it.
            found.pop(producer.name, None)
        found.update(dict.fromkeys(self.input_keepers(source, but)))
        return list(found)

    def output_keepers(self, tensor: str, but: str) -> list[str]:
        """The nodes that have this output of `but` quantized right away."""
        if self.dynamic:
            return []
        return [
            c.name
            for c in self.prepared.consumers.get(tensor, ())
            if c.name != but
            and (
                self._asks_for(c, tensor)
                if self.qdq
                else c.op_type not in self.followers and self.counterpart(c) is None
            )
        ]

    def weight_keepers(self, tensor: str, but: str) -> list[str]:
        """The nodes that share a constant with `but` and have it quantized."""
        node = self.prepared.node_by_name[but]
        return [
            c.name
            for c in self.prepared.consumers.get(tensor, ())
            if c.name != but
            and self._quantizes_constant(c, tensor)
            # With integer operators, nodes before the first that wants integers keep the floats.
            and (self.qdq or c.index < node.index)
        ]

    def _quantizes_constant(self, consumer: Node, tensor: str) -> bool:
        there = self.counterpart(consumer)
        if there is None:
            return not self.qdq
        at = list(consumer.inputs).index(tensor) if tensor in consumer.inputs else len(there.inputs)
        if at >= len(there.inputs):
            return False
        if self.qdq:
            return _dq_dtype(self.quantized, there.inputs[at]) != "" and self.quantizes(consumer)
        # It kept its name and reads the integers: an embedding's Gather.
        return "int" in self.quantized.info(there.inputs[at]).dtype


def _zero_point_dtype(model: Model, node: Node) -> str:
    if len(node.inputs) > 2 and node.inputs[2]:
        zero = model.constant(node.inputs[2])
        if zero is not None:
            return str(zero.dtype.name)
        return model.info(node.inputs[2]).dtype
    return "uint8"


def _dq_dtype(model: Model, tensor: str) -> str:
    """The integer type a tensor was dequantized from; "" where no DequantizeLinear makes it."""
    maker = model.producers.get(tensor)
    if maker is None or maker.op_type != DQ:
        return ""
    stored = model.info(maker.inputs[0]).dtype
    return stored if "int" in stored else _zero_point_dtype(model, maker)


def _q_dtype(model: Model, tensor: str) -> str:
    """The integer type a tensor is quantized to right away; "" where no QuantizeLinear reads it."""
    for consumer in model.consumers.get(tensor, ()):
        if consumer.op_type == Q and consumer.inputs[0] == tensor:
            return _zero_point_dtype(model, consumer)
    return ""


def _source_dtype(model: Model, tensor: str) -> tuple[str, str]:
    """The integer type that a tensor's values come from, and the dequantized tensor they were.

    Looks through nodes that hand their input on unchanged; ("", "") where the values are float.
    """
    while True:
        dtype = _dq_dtype(model, tensor)
        if dtype:
            return dtype, tensor
        maker = model.producers.get(tensor)
        if maker is None or maker.op_type not in _CARRIERS:
            return "", ""
        tensor = maker.inputs[0]


# Behind the name of a graph output where Q reads it: the output's own is that of what DQ gives.
_OUTPUT_Q = "_QuantizeInput"


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """The effective precision of one node in one quantized model."""

    inputs: tuple[str, ...]
    weight: str | None
    output: str


def _state(graph: _Graph, node: Node, quantized: Model) -> _State:
    there = graph.counterpart(node, quantized)
    computed = graph.computed_inputs(node)
    constants = graph.constants(node)
    if there is None:
        # Replaced by an integer operator, or folded: everything about it is quantized, where it
        # was folded to what its output is.
        named = (_q_dtype(quantized, read) for o in node.outputs for read in (o, f"{o}{_OUTPUT_Q}"))
        dtype = next(filter(None, named), "") or next(
            (_zero_point_dtype(quantized, n) for n in quantized.nodes if n.op_type == Q), ""
        )
        dtype = dtype or "uint8"  # dynamic quantization has no QuantizeLinear
        return _State(
            inputs=(dtype,) * len(computed), weight=dtype if constants else None, output=dtype
        )

    def at(tensor: str) -> str:
        position = list(node.inputs).index(tensor)
        return there.inputs[position] if position < len(there.inputs) else ""

    inputs = tuple(
        _source_dtype(quantized, at(t))[0] or _float_dtype(graph.prepared, t) for t in computed
    )
    weight = None
    if constants:
        read = at(constants[0])
        stored = quantized.info(read).dtype
        weight = _dq_dtype(quantized, read) or (
            stored if stored != "unknown" else _float_dtype(graph.prepared, constants[0])
        )
    # Gemm that dynamic quantization split has its outputs behind the Add.
    outputs = [_q_dtype(quantized, o) for o in there.outputs if o]
    first = next((o for o in node.outputs if o), "")
    return _State(
        inputs=inputs,
        weight=weight,
        output=next((o for o in outputs if o), _float_dtype(graph.prepared, first)),
    )


def _float_dtype(model: Model, tensor: str) -> str:
    dtype = model.info(tensor).dtype
    return "float32" if dtype == "unknown" else dtype


def effect_of(
    names: Sequence[str],
    prepared: Model,
    quantized: Model,
    baseline_quantized: Model | None,
    config: QuantConfig | None = None,
) -> tuple[EntryEffect, ...]:
    """What leaving each of these nodes in float really did, read from the new graph.

    Args:
        names: nodes of the prepared model (`Resolved.prepared_names`).
        prepared: the model that the quantizer was given (`Prepared.model`).
        quantized: the file it made.
        baseline_quantized: the file of the same recipe without exclusions; without it "nothing
            changed" is never said.
        config: the recipe; matters where it quantizes some op types or nodes only.
    """
    graph = _Graph(prepared, quantized, config)
    return tuple(_effect(graph, name, baseline_quantized) for name in names)


def _effect(graph: _Graph, name: str, baseline: Model | None) -> EntryEffect:
    node = graph.prepared.node_by_name.get(name)
    if node is None:
        near = nearest_names(name, (n.name for n in graph.prepared.nodes))
        return EntryEffect(
            name=name,
            op_type="",
            status=NO_SUCH_NODE,
            details=(f"the nearest names are {', '.join(near)}",),
        )
    there = graph.counterpart(node)
    state = _state(graph, node, graph.quantized)
    details: list[str] = []
    neighbours: dict[str, None] = {}

    weight_kept = state.weight is not None and state.weight not in FLOAT_DTYPES
    if weight_kept:
        weight = graph.constants(node)[0]
        sharers = graph.weight_keepers(weight, name)
        neighbours.update(dict.fromkeys(sharers))
        why = f", because it is shared with {_sentence_list(sharers)}" if sharers else ""
        details.append(f"its weight {weight} is still {state.weight}{why}")
    fed = False
    for tensor, dtype in zip(graph.computed_inputs(node), state.inputs, strict=True):
        if dtype in FLOAT_DTYPES:
            continue
        fed = True
        keepers = graph.input_keepers(tensor, name)
        neighbours.update(dict.fromkeys(keepers))
        why = _because(keepers)
        through = ""
        if there is not None:
            position = list(node.inputs).index(tensor)
            direct = position < len(there.inputs) and _dq_dtype(
                graph.quantized, there.inputs[position]
            )
            through = "" if direct else " (handed on unchanged)"
        details.append(f"its input {tensor} is still dequantized from {dtype}{through}{why}")
    if state.output not in FLOAT_DTYPES and state.output != "":
        output = next(o for o in node.outputs if o)
        keepers = [k for o in node.outputs if o for k in graph.output_keepers(o, name)]
        if "int" in state.output:
            fed = True
            neighbours.update(dict.fromkeys(keepers))
            why = _because(keepers)
            details.append(f"its output {output} is still quantized to {state.output}{why}")

    status = WEIGHT_QUANTIZED if weight_kept else STILL_FED if fed else FLOAT_NOW
    if baseline is not None:
        before = _state(graph, node, baseline)
        was_there = graph.counterpart(node, baseline) is not None
        if before == state and was_there == (there is not None):
            status = NOTHING_CHANGED
            if not fed and not weight_kept:
                details.append("it was in float without being excluded")
        else:
            details += _side_effects(graph, node, baseline, was_there)
    return EntryEffect(
        name=name,
        op_type=node.op_type,
        status=status,
        details=tuple(details),
        output_dtype=state.output,
        weight_dtype=state.weight,
        input_dtypes=state.inputs,
        neighbours=tuple(neighbours),
    )


def override_effects(
    prepared: Model, quantized: Model, config: QuantConfig
) -> tuple[EntryEffect, ...]:
    """What giving computed tensors another integer type really did, read from the new graph.

    Of every such override of the recipe, in order, under the name of the node that computes the
    tensor (the tensor's own where it is a graph input). The status is "int16 now" (the type), or
    "keeps its type".

    Args:
        prepared: the model that the quantizer was given (`Prepared.model`).
        quantized: the file it made.
        config: the recipe.
    """
    graph = _Graph(prepared, quantized, config)
    return tuple(
        _override_effect(graph, each.tensor, each.quant_type)
        for each in config.overrides
        if each.quant_type not in ("", config.activation_type)
        and each.tensor not in prepared.constant_names
    )


def _override_effect(graph: _Graph, tensor: str, wanted: str) -> EntryEffect:
    node = graph.prepared.producers.get(tensor)
    if node is None:
        state = _State(inputs=(), weight=None, output=_q_dtype(graph.quantized, tensor))
    else:
        state = _state(graph, node, graph.quantized)
    changed = state.output == wanted
    details = [f"{tensor} stays {state.output or 'in float'}, or has the scale of another tensor"]
    if changed:
        alike = [tensor, *_handed_on(graph, tensor, wanted)]
        readers = dict.fromkeys(
            c.name
            for t in alike
            for c in graph.prepared.consumers.get(t, ())
            if not set(alike).issuperset(c.outputs)
        )
        details = [f"{_sentence_list(alike)} {'is' if len(alike) == 1 else 'are'} {wanted}"]
        if readers:
            details.append(f"read so by {_sentence_list(list(readers))}")
        if state.weight is not None:
            details.append(f"the weight it is computed with stays {state.weight}")
        if wanted.endswith("int16"):
            details.append("ONNX Runtime's CPU kernels compute these nodes in float")
    return EntryEffect(
        name=tensor if node is None else node.name,
        op_type="Input" if node is None else node.op_type,
        status=f"{wanted} now" if changed else TYPE_KEPT,
        details=tuple(details),
        output_dtype=state.output,
        weight_dtype=state.weight,
        input_dtypes=state.inputs,
    )


def _handed_on(graph: _Graph, tensor: str, dtype: str) -> list[str]:
    """The tensors of this type behind a tensor that nodes only hand on."""
    found: list[str] = []
    for consumer in graph.prepared.consumers.get(tensor, ()):
        if consumer.op_type in _CARRIERS | _FOLLOWERS:
            for output in consumer.outputs:
                if output not in found and _q_dtype(graph.quantized, output) == dtype:
                    found += [output, *_handed_on(graph, output, dtype)]
    return list(dict.fromkeys(found))


def _because(keepers: Sequence[str]) -> str:
    needs = "needs" if len(keepers) == 1 else "need"
    return f", because {_sentence_list(keepers)} {needs} it quantized" if keepers else ""


def _side_effects(graph: _Graph, node: Node, baseline: Model, was_there: bool) -> list[str]:
    """What else changed around a node: activations that are nodes again, pairs that are new."""
    details = []
    for output in node.outputs:
        for consumer in graph.prepared.consumers.get(output, ()):
            if consumer.op_type in ("Relu", "Clip") and (
                graph.counterpart(consumer, baseline) is None
                and graph.counterpart(consumer) is not None
            ):
                details.append(f"{consumer.name} behind it is no longer folded and runs in float")
    if node.op_type in ("Relu", "Clip") and not was_there and graph.counterpart(node) is not None:
        source = node.inputs[0]
        before = graph.prepared.producers.get(source)
        if before is not None and _source_dtype(graph.quantized, source)[0] == "":
            there = graph.counterpart(node)
            assert there is not None
            if not _dq_dtype(graph.quantized, there.inputs[0]):
                return details
        if before is not None:
            details.append(
                f"its input {source} has a Q/DQ pair of its own now, with the range before "
                f"{node.op_type}: leave {before.name} in float as well"
            )
    return details


def free_fully(
    name: str, prepared: Model, quantized: Model, config: QuantConfig | None = None
) -> tuple[str, ...]:
    """The fewest further nodes to leave in float so that this one really is.

    With them and `name` on the list, no input of the node comes out of a DequantizeLinear (looking
    through nodes that only hand values on), its weight is stored in float and its output is not
    quantized. Every node in the answer asks for one of these tensors itself, so none can be
    spared. A Concat is not looked through: it mixes tensors.

    Args:
        name: a node of the prepared model.
        prepared: the model that the quantizer was given.
        quantized: what it made, with or without `name` on the list.
        config: the recipe; matters where it quantizes some op types or nodes only.

    Returns:
        Names of nodes of the prepared model, in graph order, without `name` itself.

    Raises:
        ExclusionError: the prepared model has no such node.
    """
    node = prepared.node_by_name.get(name)
    if node is None:
        raise unknown_node(name, prepared)
    graph = _Graph(prepared, quantized, config)
    found: set[str] = set()
    for tensor in graph.computed_inputs(node):
        found.update(graph.input_keepers(tensor, name))
    for tensor in graph.constants(node):
        found.update(graph.weight_keepers(tensor, name))
    for tensor in node.outputs:
        if tensor:
            found.update(graph.output_keepers(tensor, name))
    found.discard(name)
    return _in_order(found, prepared)


def _in_order(names: Collection[str], model: Model) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda n: model.node_by_name[n].index))


def free_names(
    name: str, prepared: Prepared, quantized: Model, config: QuantConfig | None = None
) -> tuple[str, ...]:
    """`free_fully` in names of the float file, ready for an exclusion list.

    Args:
        name: a node of the float file.
        prepared: the prepared model and what became of the float file's nodes.
        quantized: what the quantizer made of it.
        config: the recipe; matters where it quantizes some op types or nodes only.

    Raises:
        ExclusionError: no such node, or pre-processing left nothing of it.
    """
    successor = prepared.successors.get(name, name)
    if successor is None:
        raise ExclusionError(
            f"pre-processing removed {name} or moved it elsewhere, so there is nothing to free",
            hint="Choose the node before or after it.",
        )
    names = prepared.float_names
    further = (names[n] for n in free_fully(successor, prepared.model, quantized, config))
    return tuple(n for n in dict.fromkeys(further) if n != name)
