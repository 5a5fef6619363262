"""Which tensor is which in two models, and what became of each tensor of the float model.

Runs nothing. Pins come first, then names and graph edges together (`alignment`), then content: of
constants, and of activations where somebody observed them (`to_observe`). Each pair says which
rule found it. Every float tensor of the float model's main graph is in exactly one place: it is
compared as an activation or as a weight, it became a part of a compared tensor, or it is listed
with the reason why it is neither.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.alignment import Alignment, Twin, align
from inspector.comparison import Pin, Skipped, Unmatched
from inspector.content import Summary, find_activations
from inspector.endpoints import InputConversion, by_position, conversion
from inspector.errors import ModelError
from inspector.folding import DQ, Q, constant_value
from inspector.model import FLOAT_DTYPES, Model, Node
from inspector.qparams import QParams
from inspector.scheme import QuantFormat, QuantizedTensor, Scheme, read_scheme
from inspector.structure import (
    MOVEMENT,
    RECTIFIERS,
    Permutation,
    View,
    base_names,
    inverse,
    origin,
)
from inspector.weights import WeightPair, Weights, in_order, weight_channel_axis

__all__ = [
    "RECTIFIERS",
    "ActivationPair",
    "InputConversion",
    "Matching",
    "Observed",
    "WeightPair",
    "activation_channel_axis",
    "clip_limits",
    "constant_value",
    "match_tensors",
    "rectify",
    "to_observe",
    "weight_channel_axis",
]

_CHANNELS_FIRST = frozenset(
    {"Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "GroupNormalization",
     "LRN"}
)  # fmt: skip
# A channel axis survives these from their first input (the first with a rank for binary ones).
_KEEPS_AXIS = frozenset(
    {"Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu",
     "Selu", "Gelu", "Softplus", "Mish", "Add", "Sub", "Mul", "Div", "Max", "Min", "MaxPool",
     "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "Resize", "Upsample", "Pad",
     "Dropout", "Identity", "Cast", "Softmax", "LogSoftmax", "Exp", "Sqrt", "Pow", "Abs", "Neg",
     Q, DQ}
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationPair:
    """A computed float tensor and the tensor of the quantized model that stands for it.

    Attributes:
        name: the float model's tensor.
        node: the float model's node that computes it, None for a graph input.
        before: the quantized model's tensor that Q reads, the first of several Q/DQ pairs in a
            row; None without a Q/DQ pair.
        after: the quantized model's tensor that consumers read (integers where `integers`).
        integers: `after` holds integers, to be dequantized with `qparams`.
        qparams: None where it was left in float.
        rectifiers: the float model's Relu or Clip, or several in a row, that were folded into Q;
            `before` lacks them.
        matched_by: "name", "structure", "content" or "pin".
        note: what has to be known, "" for nothing.
        permutation: axes to apply to the quantized model's arrays to get the float layout; None
            where it is the same.
        stages: parameters of Q and of DQ for each pair between `before` and `after`; () where
            there is none, or only one and its Q has `qparams`.
    """

    name: str
    node: Node | None
    before: str | None
    after: str
    integers: bool
    qparams: QParams | None
    rectifiers: tuple[Node, ...]
    matched_by: str
    note: str
    permutation: Permutation | None = None
    stages: tuple[tuple[QParams, QParams], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """Summaries of what `to_observe` names, over the same feeds.

    Attributes:
        float_values: by tensor of the float model.
        quantized_values: by tensor of the quantized model.
    """

    float_values: Mapping[str, Summary]
    quantized_values: Mapping[str, Summary]


@dataclass(frozen=True, kw_only=True, slots=True)
class Matching:
    """All pairs of two models, and what has none.

    Attributes:
        scheme: of the quantized model.
        activations: in topological order of the float model, graph inputs first.
        weights: in order of their float nodes.
        outputs: float output name -> quantized output name.
        inputs: float input name -> quantized input name.
        unmatched: everything else, with its reason.
        notes: sentences to show beside the result.
        float_tensors: every tensor of the float model's main graph with floating-point elements
            (or of unknown type): graph inputs, node outputs and constants. Each is in exactly one
            of `activations`, `weights`  and `unmatched`.
        node_pairs: float node name -> quantized node name.
        conversions: by float input, what a feed needs to fit the quantized model.
        skipped: quantization nodes that could not be read.
        not_observed: tensors inside bodies, whose values nobody can look at.
        unpaired: tensors of the quantized model that no pair uses, one per value.
    """

    scheme: Scheme
    activations: tuple[ActivationPair, ...]
    weights: tuple[WeightPair, ...]
    outputs: dict[str, str]
    inputs: dict[str, str]
    unmatched: tuple[Unmatched, ...]
    notes: tuple[str, ...]
    float_tensors: tuple[str, ...]
    node_pairs: dict[str, str]
    conversions: dict[str, InputConversion]
    skipped: tuple[Skipped, ...]
    not_observed: tuple[Skipped, ...]
    unpaired: tuple[str, ...]


def rectify(values: NDArray[Any], rectifiers: Sequence[Node], model: Model) -> NDArray[Any]:
    """`values` after the float model's Relu or Clip, one after the other; unchanged without."""
    for rectifier in rectifiers:
        if rectifier.op_type == "Relu":
            values = np.asarray(np.maximum(values, 0))
        else:
            values = np.asarray(np.clip(values, *clip_limits(rectifier, model)))
    return values


def clip_limits(clip: Node, model: Model) -> tuple[float, float]:
    """A Clip's limits from its attributes (opset < 11) or constant inputs; infinite if absent."""
    limits = []
    for position, key, default in ((1, "min", -math.inf), (2, "max", math.inf)):
        limit: Any = clip.attributes.get(key, default)
        if position < len(clip.inputs) and clip.inputs[position]:
            constant = model.constant(clip.inputs[position])
            limit = default if constant is None else constant
        limits.append(float(np.asarray(limit).reshape(-1)[0]))
    return limits[0], limits[1]


def _keeps_first_axes(model: Model, node: Node) -> bool:
    """A Concat along a later axis, or a Reshape that leaves batch and channels as they are."""
    if node.op_type == "Concat":
        return int(node.attributes.get("axis", 1)) not in (0, 1)
    if node.op_type != "Reshape":
        return False
    before, after = (model.info(t).shape for t in (node.inputs[0], node.outputs[0]))
    return before is not None and after is not None and before[:2] == after[:2] != ()


def activation_channel_axis(model: Model, tensor: str, rank: int) -> int | None:
    """The channel axis of an activation: a Concat's own, 1 behind Conv-like producers, else last.

    None for a scalar.
    """
    if rank == 0:
        return None
    node = model.producers.get(tensor)
    if node is not None and node.op_type == "Concat":
        axis = int(node.attributes.get("axis", 1))
        return axis % rank if -rank <= axis < rank else rank - 1
    for _ in range(64):
        if node is None:
            break
        if node.op_type in _CHANNELS_FIRST:
            return 1 if rank > 1 else 0
        if node.op_type not in _KEEPS_AXIS and not _keeps_first_axes(model, node):
            break
        following = [model.producers.get(i) for i in node.inputs if i not in model.constant_names]
        node = next((n for n in following if n is not None), None)
    return rank - 1


def _same_qparams(a: QParams, b: QParams) -> bool:
    return (a.dtype, a.axis) == (b.dtype, b.axis) and all(
        np.array_equal(*pair) for pair in ((a.scale, b.scale), (a.zero_point, b.zero_point))
    )


# -- pairs ---------------------------------------------------------------------------------------


class _Matcher:
    def __init__(self, float_model: Model, quantized_model: Model, pins: Sequence[Pin]) -> None:
        self.f, self.q = float_model, quantized_model
        self.fv, self.qv = View(float_model), View(quantized_model)
        self.scheme = read_scheme(quantized_model)
        self.notes: list[str] = []
        self.quantized: dict[str, list[QuantizedTensor]] = {}
        self.by_base: dict[str, QuantizedTensor] = {}
        for tensor in self.scheme.tensors:
            if tensor.kind == "activation" and not tensor.scope:
                self.know(tensor)
        self.inputs = by_position(self.f.inputs, self.q.inputs, "input", self.notes)
        self.outputs = by_position(self.f.outputs, self.q.outputs, "output", self.notes)
        found = [
            conversion(self.f.info(a), self.q.info(b), next(iter(self.quantized.get(b, ())), None))
            for a, b in self.inputs.items()
        ]
        self.notes += [c.note for c in found if c is not None]
        self.conversions = {c.name: c for c in found if c is not None}
        self.pins = {p.float_name: p.quantized_name for p in pins}
        self.check_pins()
        self.alignment = self.align()
        stuck = {
            self.fv.root[name]: Twin(self.qv.root[other])
            for name, other in self.pins.items()
            if other in self.qv.root and self.fv.root[name] not in self.alignment.values
        }
        if stuck:
            # A pin where the rules found nothing is an anchor for what lies around it.
            self.alignment = self.align(stuck)
        self.weights = Weights(self.alignment, self.scheme)
        self.pairs: dict[str, ActivationPair] = {}
        self.fused: dict[str, Unmatched] = {}

    def know(self, tensor: QuantizedTensor) -> None:
        names = [n for n in (tensor.before, tensor.after, tensor.quantized) if n]
        for name in names:
            if name in self.qv.root:
                there = self.quantized.setdefault(self.qv.root[name], [])
                if tensor not in there:
                    there.append(tensor)
            for base in base_names(name):
                self.by_base.setdefault(base, tensor)

    def align(self, pinned: Mapping[str, Twin] | None = None) -> Alignment:
        anchors = dict(pinned or {})
        for name, other in self.inputs.items():
            changed = self.conversions.get(name)
            order = changed.permutation if changed is not None else None
            twin = Twin(self.qv.root[other], inverse(order) if order is not None else None)
            anchors.setdefault(self.fv.root[name], twin)
        ends = {
            self.fv.root[name]: self.qv.root[other]
            for name, other in self.outputs.items()
            if name in self.fv.root and other in self.qv.root
        }
        return align(self.fv, self.qv, anchors, ends, self.quantized)

    # -- pins ------------------------------------------------------------------------------------

    def check_pins(self) -> None:
        for name, other in self.pins.items():
            known = {*self.fv.root, *self.fv.constants}
            if name not in known:
                raise _unknown(name, self.f, known)
            known = {*self.qv.root, *self.qv.constants}
            if other is not None and other not in known:
                raise _unknown(other, self.q, known)
            if other is not None and (name in self.fv.root) != (other in self.qv.root):
                sides = ["computed" if name in self.fv.root else "constant",
                         "computed" if other in self.qv.root else "constant"]  # fmt: skip
                raise ModelError(
                    f"{name} is {sides[0]} in {self.f.name}, {other} is {sides[1]} in "
                    f"{self.q.name}: they cannot be a pair",
                    hint="Pin a computed tensor to a computed one, or a constant to a constant.",
                )
            end = self.outputs.get(name, "")
            if other is None or not end:
                continue
            if self.qv.root.get(end, end) != self.qv.root.get(other, other):
                raise ModelError(
                    f"{name} is an output of {self.f.name}: it is compared with output {end} of "
                    f"{self.q.name}, not with {other}",
                    hint="Pin the tensor before it: outputs go together by name or position.",
                )

    def refused(self, name: str) -> bool:
        return name in self.pins and self.pins[name] is None

    # -- activations -----------------------------------------------------------------------------

    def activations(self) -> None:
        """Fills `pairs` and `fused` for every computed tensor of the float model."""
        for root, members in self.fv.members.items():
            twin = self.alignment.values.get(root)
            if twin is None or root in self.alignment.folded:
                continue
            chosen = self.compared(root, members, twin.root)
            marks = frozenset(chosen.values())
            for member, other in chosen.items():
                self.pairs[member] = self.pair(member, root, twin, other, marks)
            for member in members:
                end = self.qv.root.get(self.outputs.get(member, ""))
                if end is not None and end != twin.root:
                    # An output is its counterpart's, whatever else holds the same values.
                    self.pairs[member] = self.pair(member, root, Twin(end), self.outputs[member])
            first = next(iter(chosen))
            for member in members:
                if member not in chosen and member not in self.pairs:
                    self.fuse(member, first, f"the same tensor as {first}")
        for name, chosen_by_hand in self.pins.items():
            if chosen_by_hand is not None and name in self.fv.root:
                self.pairs[name] = self.pinned(name, chosen_by_hand)

    def pinned(self, name: str, other: str) -> ActivationPair:
        """The pair that a pin asks for: the tensor itself, or the Q/DQ pair it is a part of."""
        root = self.qv.root[other]
        pair = self.pair(name, self.fv.root[name], Twin(root), other)
        tensors = self.quantized.get(root, [])
        tensor = next((t for t in tensors if other in (t.before, t.after, t.quantized)), None)
        if tensor is not None:
            pair = replace(
                pair,
                before=tensor.before,
                after=tensor.name,
                integers=tensor.after is None,
                qparams=tensor.qparams,
                stages=((tensor.q_qparams, tensor.qparams),) if tensor.q_qparams else (),
            )
        twin = self.alignment.values.get(self.fv.root[name])
        same = twin is not None and twin.root == root
        return replace(
            pair,
            matched_by="pin",
            note="; ".join(
                n
                for n in ("set by hand", pair.note if same else tensor.note if tensor else "")
                if n
            ),
            rectifiers=pair.rectifiers if same else (),
        )

    def compared(self, root: str, members: list[str], other: str) -> dict[str, str]:
        """Those of a value's tensors that the quantized model has, too, with its tensor.

        Identity, Dropout and Cast make further tensors of a value. The quantized model has one of
        them where it has as many nodes of that kind behind the same value.

        Args:
            root: of the float value.
            members: its tensors.
            other: root of the quantized value.
        """

        def by_kind(model: Model, names: list[str]) -> list[tuple[str, str]]:
            makers = ((name, model.producers.get(name)) for name in names)
            return [(name, m.op_type) for name, m in makers if m is not None]

        left = by_kind(self.q, self.qv.members[other][1:])
        real = self.qv.tensor(other)
        found = {}
        for member, kind in by_kind(self.f, members[1:]):
            twin = next((name for name, its in left if its == kind), None)
            if twin is not None:
                left.remove((twin, kind))
                found[member] = twin
        ends = {m: self.qv.root.get(self.outputs[m]) for m in members if m in self.outputs}
        outputs = {m: real for m, end in ends.items() if end == other and m not in found}
        return (outputs or {root: real}) | found

    def by_name(self, name: str, root: str) -> bool:
        """The quantized value has a tensor of this name, or one that was renamed from it."""
        if self.qv.root.get(name) == root:
            return True
        tensor = self.by_base.get(name)
        return tensor is not None and tensor in self.quantized.get(root, ())

    def read(self, tensor: QuantizedTensor) -> tuple[str, ...]:
        """Nodes that compute with a quantized tensor, not those that quantize it once more."""
        nodes = self.q.node_by_name
        return tuple(n for n in tensor.consumers if n in nodes and nodes[n].op_type not in (Q, DQ))

    def way(self, tensor: str) -> Iterator[str]:
        """A tensor of the quantized model and what it is made from without being computed."""
        root = self.qv.root.get(tensor)
        while tensor and self.qv.root.get(tensor) == root:
            yield tensor
            node = self.q.producers.get(tensor)
            if node is None:
                return
            tensor = next((i for i in node.inputs if self.qv.root.get(i) == root), "")

    def stages(self, tensor: QuantizedTensor, plain: str) -> list[QuantizedTensor]:
        """The Q/DQ pairs in a row that end with one, without those that lie before `plain`."""
        pairs = {t.after: t for t in self.quantized.get(self.qv.root[tensor.name], ()) if t.after}
        found = [tensor]
        if tensor.before is None:
            return found
        for name in self.way(tensor.before):
            if name == plain:
                break
            if name in pairs and pairs[name].before is not None:
                found.append(pairs[name])
        return found[::-1]

    def in_float(self, before: str, root: str, plain: str) -> list[str]:
        """Nodes that compute with what Q reads, from `plain` on, before it is quantized."""
        found: list[str] = []
        for name in self.way(before):
            maker = self.q.producers.get(name)
            if maker is not None and maker.op_type == DQ:
                break
            for node in self.q.consumers.get(name, ()):
                moved = any(self.qv.root.get(o) == root for o in node.outputs)
                if node.op_type not in (Q, DQ, "DynamicQuantizeLinear") and not moved:
                    found.append(node.name)
            if name == plain:
                break
        return found

    def pair(
        self,
        name: str,
        root: str,
        twin: Twin,
        plain: str = "",
        marks: Collection[str] = (),
    ) -> ActivationPair:
        """The pair of a float tensor.

        Args:
            name: the float tensor.
            root: of its value.
            twin: the quantized value.
            plain: the quantized model's tensor where nothing quantizes the value.
            marks: the tensors of all pairs of this value, `plain` among them.
        """
        tensors = self.quantized.get(twin.root, [])
        if len(marks) > 1:
            own = [
                t
                for t in tensors
                if next((n for n in self.way(t.name) if n in marks), plain) == plain
            ]
            tensors = own or tensors
        output = self.outputs.get(name)
        tensor = next((t for t in tensors if t.after == output is not None), None)
        # A pair that is only quantized once more is not what consumers read.
        read = [t for t in tensors if self.read(t)] or tensors
        if tensor is None and self.by_base.get(name) in read:
            tensor = self.by_base[name]
        if tensor is None:
            tensor = next(iter(read), None)
        known = self.alignment.rectifiers.get(root)
        rectifiers = (
            tuple(op.node for op in known)
            if known is not None
            else self.folded_rectifier(root, twin.root)
        )
        named = self.by_name(name, twin.root)
        notes = []
        if rectifiers:
            kinds = list(dict.fromkeys(rectifier.op_type for rectifier in rectifiers))
            notes.append(
                f"{' and '.join(kinds)} {'is' if len(kinds) == 1 else 'are'} folded into Q"
            )
        stages = self.stages(tensor, plain if len(marks) > 1 else "") if tensor is not None else []
        notes += dict.fromkeys(stage.note for stage in stages if stage.note)
        if len(stages) > 1:
            notes.append(f"{len(stages)} pairs of Q and DQ in a row")
        if twin.permutation is not None:
            notes.append(f"the quantized model has its axes in another order {twin.permutation}")
        notes += [
            f"{', '.join(self.read(other))} reads {other.name} instead, {other.qparams.dtype} "
            "with a scale of its own"
            for other in read
            if tensor is not None
            and other is not tensor
            and self.read(other)
            and not _same_qparams(other.qparams, tensor.qparams)
        ]
        before = stages[0].before if stages else None
        if before is not None and not rectifiers:
            direct = self.in_float(before, twin.root, plain if len(marks) > 1 else "")
            if direct:
                notes.append(f"{', '.join(direct[:4])} reads it in float")
        both = tuple((s.q_qparams or s.qparams, s.qparams) for s in stages)
        plain = plain or self.qv.tensor(twin.root)
        if output is not None and self.qv.root.get(output) == twin.root and tensor is None:
            plain = output
        maker = self.fv.maker.get(root)
        return ActivationPair(
            name=name,
            node=self.f.producers.get(name) or (maker.node if maker is not None else None),
            before=before,
            after=tensor.name if tensor is not None else plain,
            integers=tensor is not None and tensor.after is None,
            qparams=tensor.qparams if tensor is not None else None,
            rectifiers=rectifiers,
            matched_by="name" if named else "structure",
            note="; ".join(notes),
            permutation=twin.permutation,
            stages=both if len(both) > 1 or any(a is not b for a, b in both) else (),
        )

    def folded_rectifier(self, root: str, other: str) -> tuple[Node, ...]:
        """The float model's Relu or Clip that the quantized model leaves to Q, moved or not."""
        mine = self.fv.maker.get(origin(root, self.fv))
        its = self.qv.maker.get(origin(other, self.qv))
        if mine is None or mine.kind not in RECTIFIERS or other not in self.quantized:
            return ()
        if its is not None and (its.kind in (*RECTIFIERS, "Max", "Min") or its.activation):
            return ()
        return (mine.node,)

    def fuse(self, name: str, into: str, reason: str, kind: str = "activation") -> None:
        self.fused[name] = Unmatched(
            name=name, kind=kind, model="float", reason=reason, fused_into=into
        )

    def folded(self) -> None:
        """Values that became a part of a compared one."""
        for root in self.alignment.folded:
            into = root
            while into in self.alignment.folded:
                into = self.alignment.folded[into]
            target = next((m for m in self.fv.members.get(into, ()) if m in self.pairs), None)
            if target is None:
                continue
            for member in self.fv.members[root]:
                if member in self.pairs:
                    continue
                reason = f"fused into {target}"
                if root in self.alignment.same:
                    reason = f"the same values as {target}: the node between them was removed"
                self.fuse(member, target, reason)

    def observed(self, observed: Observed) -> None:
        """Pairs by content what is still alone."""
        lone = {n: s for n, s in observed.float_values.items() if n in self.fv.root}
        lone = {n: s for n, s in lone.items() if n not in self.pairs and n not in self.fused}
        free = {n: s for n, s in observed.quantized_values.items() if n in self.qv.root}
        used = self.used_roots()
        free = {n: s for n, s in free.items() if self.qv.root[n] not in used}
        for name, found in find_activations(lone, free).items():
            if self.refused(name):
                continue
            twin = Twin(self.qv.root[found.name], found.permutation)
            pair = self.pair(name, self.fv.root[name], twin)
            note = f"found by content (correlation {found.correlation:.4f})"
            note = "; ".join(n for n in (note, pair.note) if n)
            self.pairs[name] = replace(pair, matched_by="content", note=note)

    def used_roots(self) -> set[str]:
        return {
            self.qv.root[name]
            for pair in self.pairs.values()
            for name in (pair.before, pair.after)
            if name in self.qv.root
        }

    def unpaired(self) -> list[str]:
        """One tensor for each computed value of the quantized model that no pair uses."""
        used = self.used_roots()
        found = []
        for root, members in self.qv.members.items():
            if root in used:
                continue
            tensor = next(iter(self.quantized.get(root, ())), None)
            name = self.qv.tensor(root)
            if tensor is not None and tensor.after is not None:
                name = tensor.after
            if self.q.info(name).dtype in (*FLOAT_DTYPES, "unknown") and name in members:
                found.append(name)
        return found

    # -- what has no pair ------------------------------------------------------------------------

    def float_tensors(self) -> list[str]:
        """See `Matching.float_tensors`."""
        names = [i.name for i in self.f.inputs]
        names += [n for n in self.f.constant_names if n not in self.f.producers]
        names[len(self.f.inputs) :] = sorted(names[len(self.f.inputs) :])
        names += [o for n in self.f.nodes for o in n.outputs if o]
        return [n for n in dict.fromkeys(names) if self.floating(n)]

    def floating(self, name: str) -> bool:
        dtype = self.f.info(name).dtype
        if dtype == "unknown" and name in self.fv.constants:
            value = constant_value(self.f, name)
            dtype = "unknown" if value is None else value.dtype.name
        return dtype in (*FLOAT_DTYPES, "unknown")

    def lone(self, name: str) -> Unmatched:
        """Why a float tensor is in no pair."""
        if self.refused(name):
            kind = "activation" if name in self.fv.root else "weight"
            return Unmatched(name=name, kind=kind, model="float", reason="refused by hand")
        if name in self.fused:
            return self.fused[name]
        if name in self.fv.constants:
            return self.lone_constant(name)
        return Unmatched(name=name, kind="activation", model="float", reason=self.why_missing(name))

    def why_missing(self, name: str) -> str:
        root = self.fv.root[name]
        node = self.fv.maker.get(root)
        if not self.fv.readers.get(root) and root not in self.fv.outputs:
            return "nothing reads it"
        if node is None:
            return "the quantized model has no such input"
        values = self.alignment.values
        if node.kind in MOVEMENT:
            return (
                f"layout changed: {node.node.name} ({node.node.op_type}) moves values that the "
                "quantized model moves in other steps"
            )
        inputs = [d for d in node.data if d not in ("=", "")]
        readers = self.fv.readers.get(root, ())
        if all(d in values for d in inputs) and all(
            o in values for r in readers for o in r.outputs if o
        ):
            return "inside a fused or rewritten part of the quantized model"
        if node.node.name in self.q.node_by_name:
            return f"its node {node.node.name} reads or computes something else there"
        return f"its node {node.node.name} was removed or rewritten by pre-processing"

    def lone_constant(self, name: str) -> Unmatched:
        readers = self.f.consumers.get(name, ())
        reader = next(iter(readers), None)
        bias = reader is not None and name in reader.inputs[2:3]
        bias = bias and reader is not None and reader.op_type in ("Conv", "ConvTranspose", "Gemm")
        kind = "bias" if bias else "weight"
        into = self.weights.part_of(name)
        if into:
            return Unmatched(
                name=name, kind=kind, model="float", reason=f"fused into {into}", fused_into=into
            )
        if reader is None:
            reason = "nothing reads it"
            if name in self.outputs:
                reason = "a graph output that is constant"
        else:
            # A limit of a folded Clip, or a parameter of a node that became a part of another.
            for node in readers:
                for output in node.outputs:
                    root = self.fv.root.get(output, "")
                    rectifiers = self.alignment.rectifiers.get(root, ())
                    folded = self.fused.get(output)
                    if any(r.node is node for r in rectifiers) and output in self.pairs:
                        into, what = output, f"limit of {node.op_type} {node.name}, folded into Q"
                    elif folded is not None and folded.fused_into:
                        into, what = folded.fused_into, f"fused into {folded.fused_into}"
                    else:
                        continue
                    return Unmatched(
                        name=name, kind=kind, model="float", reason=what, fused_into=into
                    )
            reason = self.why_constant(name, reader)
        return Unmatched(name=name, kind=kind, model="float", reason=reason)

    def why_constant(self, name: str, reader: Node) -> str:
        if any(o in self.fv.constants for o in reader.outputs):
            return f"what {reader.name} makes of it has no twin"
        if reader.name in self.alignment.apart:
            apart = self.alignment.apart[reader.name].node.name
            return f"folded here, while the quantized model keeps BatchNormalization {apart} apart"
        if name not in reader.inputs:
            return f"read inside {reader.name}, where no constant of the quantized model fits"
        if reader.name in self.alignment.nodes:
            return f"the quantized model's {self.alignment.nodes[reader.name]} has no such constant"
        return f"its node {reader.name} was fused or removed by pre-processing"

    # -- all of it -------------------------------------------------------------------------------

    def matching(self, observed: Observed | None) -> Matching:
        pinned = {n: o for n, o in self.pins.items() if o is not None and n in self.fv.constants}
        self.weights.find(pinned)
        self.activations()
        if observed is not None:
            self.observed(observed)
        self.folded()
        for name in filter(self.refused, self.pins):
            self.pairs.pop(name, None)
            self.weights.pairs.pop(name, None)
            self.weights.scoped[:] = [w for w in self.weights.scoped if w.name != name]
        self.lies()
        for lies in self.alignment.untrusted:
            self.notes.append(
                f"{lies} names of the float model belong to other tensors in the quantized model: "
                "names were not used, graph edges and content decided"
            )
        float_tensors = self.float_tensors()
        weights = {n: w for n, w in self.weights.pairs.items() if n not in self.pairs}
        # A body's own constants may share their names with tensors of the main graph.
        main = self.f.node_by_name
        captured = [w for w in self.weights.scoped if main.get(w.node.name) is w.node]
        known = {*self.pairs, *weights, *(w.name for w in captured)}
        lone = [self.lone(n) for n in float_tensors if n not in known]
        lone = [self.settled(u, known) for u in lone]
        if self.scheme.formats == (QuantFormat.FLOAT,):
            self.notes.append(
                "the second model carries no quantization; two float models are compared"
            )
        order = {name: at for at, name in enumerate(self.fv.root)}
        return Matching(
            scheme=self.scheme,
            activations=tuple(sorted(self.pairs.values(), key=lambda p: order[p.name])),
            weights=(*in_order(weights.values(), self.f), *self.weights.scoped),
            outputs=self.outputs,
            inputs=self.inputs,
            unmatched=(*self.weights.unmatched(), *lone),
            notes=tuple(self.notes),
            float_tensors=tuple(float_tensors),
            node_pairs=dict(self.alignment.nodes),
            conversions=self.conversions,
            skipped=tuple(
                Skipped(name=node, kind="node", model="quantized", reason=reason)
                for node, reason in self.scheme.skipped.items()
            ),
            not_observed=tuple(self.in_bodies()),
            unpaired=tuple(self.unpaired()),
        )

    def settled(self, lone: Unmatched, known: Collection[str]) -> Unmatched:
        """A tensor is fused only into one that is compared: a pin may have refused that."""
        if not lone.fused_into or lone.fused_into in known:
            return lone
        reason = f"a part of {lone.fused_into}, which is not compared"
        return replace(lone, reason=reason, fused_into="")

    def in_bodies(self) -> Iterable[Skipped]:
        for body in self.f.bodies:
            for node in body.nodes:
                if node.op_type != "Constant":
                    for output in filter(None, node.outputs):
                        yield Skipped(
                            name=f"{body.path}/{output}",
                            kind="tensor",
                            model="float",
                            reason=f"it lies inside {body.owner}, whose tensors cannot be read",
                        )

    def lies(self) -> None:
        """Says where names agree and mean something else."""
        found = []
        for name, pair in self.pairs.items():
            other = self.qv.root.get(name)
            mine = self.qv.root.get(pair.after)
            if other is None or mine is None or other == mine or pair.matched_by == "pin":
                continue
            if self.alignment.values.get(self.fv.root[name]) is not None:
                found.append(f"{name} is {pair.after}")
        if found:
            self.notes.append(
                f"{len(found)} tensors have a name that another tensor bears in the quantized "
                f"model; graph edges decided, e.g. {found[0]}"
            )


def _unknown(name: str, model: Model, known: Collection[str]) -> ModelError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    return ModelError(
        f"{model.name} has no tensor {name!r}; the nearest names are "
        + ", ".join(repr(n) for n in near),
        hint="Use one of these names.",
    )


def match_tensors(
    float_model: Model,
    quantized_model: Model,
    *,
    pins: Sequence[Pin] = (),
    observed: Observed | None = None,
) -> Matching:
    """All tensor pairs of two models.

    Args:
        float_model: the float model.
        quantized_model: its quantized twin.
        pins: matches set by hand, which every rule gives way to. Shapes are not checked here.
        observed: what `to_observe` asked for, to find more activations by their values.

    Raises:
        ModelError: a pin names a tensor that is not there, or pairs a constant with a computed one.
    """
    return _Matcher(float_model, quantized_model, pins).matching(observed)


def to_observe(matching: Matching) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names in the float and in the quantized model whose values would help to match more.

    Both are empty where nothing is left on either side.
    """
    names = {
        u.name
        for u in matching.unmatched
        if not u.fused_into
        and u.model == "float"
        and u.kind == "activation"
        and u.reason not in ("refused by hand", "nothing reads it")
    }
    lone = tuple(n for n in matching.float_tensors if n in names)
    return (lone, matching.unpaired) if lone and matching.unpaired else ((), ())
