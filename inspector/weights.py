"""Which constant of the float model each constant of the quantized model stands for.

Follows the pairs of nodes that `alignment` found: constants at the same operand are the same
weight, wherever each file keeps it (an initializer, a Constant node, behind DequantizeLinear,
Transpose or Cast, in an Add of its own) and whatever was folded into it. What no pair of nodes
reads is found by name, then by content; so are constants inside bodies of If, Loop and Scan. A
separate module because constants need no running model, and tensors of `matching` do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.alignment import Alignment
from inspector.comparison import Unmatched
from inspector.content import Candidates, ContentMatch, find_constant
from inspector.folding import DQ, Q, constant_value, folded_from
from inspector.model import FLOAT_DTYPES, Body, Model, Node
from inspector.scheme import QuantizedTensor, Scheme, scale_names, stored_values
from inspector.structure import HEAVY, Op, base_names, inverse, permutation_of

# Ops through which a constant keeps its values.
_CARRIERS = frozenset(
    {"Identity", "Cast", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"}
)
_PACKED = frozenset({"MatMulNBits", "MatMulBnb4", "GatherBlockQuantized", "DynamicQuantizeLSTM"})
_GATED = frozenset({"LSTM", "GRU", "DynamicQuantizeLSTM"})
# Fewer values than this say too little to find a constant by its content.
_TELLING = 26

Step = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightPair:
    """A constant of the float model and what the quantized model reads in its place.

    Attributes:
        name: the float model's tensor.
        node: the float model's first node that reads it.
        kind: "weight" or "bias".
        quantized: the quantized tensor; None where it was left in float under `quantized_name`.
        quantized_name: the quantized model's constant.
        reference: gives the float values, in the quantized tensor's layout and after the same fold
            where there was one.
        channel_axis: output-channel axis, None where the node has none.
        matched_by: "name", "structure", "content" or "pin".
        note: what has to be known, "" for nothing.
        scope: path of the quantized model's body (`Model.bodies`) it lies in, "" for none.
        copies: further constants of the quantized model that stand for the same float tensor,
            stored once per reader; `name` is the same in all of them.
    """

    name: str
    node: Node
    kind: str
    quantized: QuantizedTensor | None
    quantized_name: str
    reference: Callable[[], NDArray[Any]]
    channel_axis: int | None
    matched_by: str
    note: str
    scope: str = ""
    copies: tuple[WeightPair, ...] = ()


def weight_channel_axis(node: Node, position: int, rank: int) -> int | None:
    """The output-channel axis of a constant at an input of a node; None where it has none."""
    if rank == 0:
        return None
    if position == 2 and node.op_type in ("Conv", "ConvTranspose", "Gemm"):
        return rank - 1
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm" and position == 1:
        return 0 if node.attributes.get("transB", 0) else 1
    if node.op_type == "MatMul":
        return rank - 1 if position == 1 else (rank - 2 if rank > 1 else None)
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """Where a quantized model keeps an operand.

    Attributes:
        name: the constant.
        tensor: None where it is left in float.
        steps: what brings the operand into the constant's layout.
    """

    name: str
    tensor: QuantizedTensor | None
    steps: tuple[Step, ...]

    def names(self) -> set[str]:
        """Names of the float constant that this one may have been made from."""
        own = [self.name]
        if self.tensor is not None:
            own += [n for n in (self.tensor.before, self.tensor.name) if n]
        return {base for name in own for base in base_names(name)}


class Weights:
    """All pairs of constants of two models; call `find` once."""

    def __init__(self, alignment: Alignment, scheme: Scheme) -> None:
        self.alignment = alignment
        self.f = alignment.float_view.model
        self.q = alignment.quantized_view.model
        self.f_constants = alignment.float_view.constants
        self.q_constants = alignment.quantized_view.constants
        self.scheme = scheme
        self.parameters = scale_names(self.q)
        self.pairs: dict[str, WeightPair] = {}
        self.scoped: list[WeightPair] = []
        self.fused: dict[str, str] = {}  # float constants that went into a compared one
        self.used: set[str] = set()  # constants of the quantized model
        self.read_by: dict[str, str] = {}  # quantized constant -> the op type that reads it
        self.tensors: dict[str, QuantizedTensor] = {}
        for tensor in scheme.tensors:
            if tensor.kind in ("weight", "bias") and not tensor.scope:
                for name in (tensor.quantized, tensor.before, tensor.after):
                    if name:
                        self.tensors.setdefault(name, tensor)

    def find(self, pinned: Mapping[str, str]) -> None:
        """Fills `pairs` and `fused`.

        Args:
            pinned: by float constant, the quantized model's constant or tensor chosen by hand.
        """
        for name, other in pinned.items():
            self.pin(name, other)
        for op, q in sorted(self.alignment.ops, key=lambda pair: pair[0].node.index):
            self.of_nodes(op, q)
        if not self.alignment.untrusted:
            self.by_name()
        self.by_content()
        names = [n for n in self.lone_constants() if _size(self.shape(self.f, n)) >= _TELLING]
        for body in self.q.bodies:
            self.in_body(body, names)

    # -- operands of paired nodes ----------------------------------------------------------------

    def of_nodes(self, op: Op, q: Op) -> None:
        if op.node.name in self.alignment.apart:
            return  # no constant of the one model has the values of one of the other
        folds = self.alignment.folds.get(op.node.name, [])
        fold = _Fold(op, folds, self, q) if op.kind in HEAVY else None
        if fold is not None and not fold.changes:
            fold = None
        for at, (mine, its) in enumerate(zip(op.inputs, q.inputs, strict=False)):
            if mine not in self.f_constants or its not in self.q_constants:
                continue
            turned = op.kind == "MatMul" and at == 1 and _turned(op, q)
            values = None
            if fold is not None and at == 2 and (folds or fold.beta != 1):
                values = fold.bias
            elif fold is not None and at == 1 and fold.scales:
                values = fold.weight
            note = fold.note if fold is not None and values is not None else ""
            self.add(op, at, mine, q, its, turned, values, note)
        bias = q.inputs[2] if len(q.inputs) > 2 else ""
        if (
            fold is not None
            and bias in self.q_constants
            and not (len(op.inputs) > 2 and op.inputs[2])
        ):
            source = fold.bias_source()
            if source is not None:
                plain = len(folds) == 1 and folds[0].kind == "Add" and fold.is_plain(source[2])
                values, note = (None, "") if plain else (fold.bias, fold.note)
                self.add(*source, q, bias, False, values, note, True)
        if op.node.name in self.alignment.biases:
            add = self.alignment.biases[op.node.name]
            its = next(i for i in add.inputs if i in self.q_constants)
            self.add(op, 2, op.inputs[2], add, its, False)
        target = self.fold_target(op)
        for folded in folds if target else ():
            for name in folded.inputs:
                if name in self.f_constants and name not in self.pairs:
                    self.fused.setdefault(name, target)

    def fold_target(self, op: Op) -> str:
        weight = op.inputs[1] if len(op.inputs) > 1 else ""
        return next((n for n in self.path(weight) if n in self.pairs), "")

    def path(self, tensor: str) -> list[str]:
        """A float constant and what it is computed from, as far as it keeps its values."""
        found = [tensor]
        while (node := self.f.producers.get(found[-1])) is not None:
            if node.op_type not in _CARRIERS or node.inputs[0] not in self.f_constants:
                break
            found.append(node.inputs[0])
        return found

    def stored(self, operand: str) -> _Stored | None:
        at = operand
        steps: list[Step] = []
        for _ in range(32):
            if at in self.tensors:
                tensor = self.tensors[at]
                return _Stored(name=tensor.quantized, tensor=tensor, steps=tuple(steps))
            if at in self.q.constant_names:
                return _Stored(name=at, tensor=None, steps=tuple(steps))
            node = self.q.producers.get(at)
            if node is None or node.op_type in (Q, DQ):
                return None
            if node.op_type not in _CARRIERS:
                # Computed from several constants: it is one itself.
                return _Stored(name=at, tensor=None, steps=tuple(steps))
            if node.op_type not in ("Identity", "Cast"):
                shape = self.shape(self.q, node.inputs[0])
                if shape is None:
                    return None
                if node.op_type == "Transpose":
                    perm = permutation_of(node, len(shape))
                    if perm is None:
                        return None
                    steps.append(("transpose", inverse(perm)))
                else:
                    steps.append(("reshape", shape))
            at = node.inputs[0]
        return None

    def shape(self, model: Model, tensor: str) -> tuple[int, ...] | None:
        shape = model.info(tensor).shape
        if shape is not None and all(isinstance(d, int) for d in shape):
            return tuple(d for d in shape if isinstance(d, int))
        value = constant_value(model, tensor)
        return None if value is None else value.shape

    def add(
        self,
        op: Op,
        at: int,
        mine: str,
        q: Op,
        its: str,
        turned: bool,
        values: Callable[[], NDArray[Any]] | None = None,
        note: str = "",
        bias: bool = False,
    ) -> None:
        """Pairs the constant at an input of a float node with the quantized node's."""
        if not self.is_float(mine):
            return
        stored = self.stored(its)
        if stored is None or (stored.tensor is None and not _holds_floats(self.q, stored.name)):
            return
        path = [name for name in self.path(mine) if self.is_float(name)]
        perms = [sum(self.f.producers[n].op_type == "Transpose" for n in path[:i])
                 for i in range(len(path))]  # fmt: skip
        wanted = sum(kind == "transpose" for kind, _ in stored.steps)
        name = next((n for n, p in zip(path[::-1], perms[::-1], strict=True) if p == wanted), mine)
        known = self.pairs.get(name)
        if known is not None and (
            known.matched_by == "pin"
            or any(_same_stored(stored, own) for own in (known, *known.copies))
        ):
            self.used.add(stored.name)
            return
        shape = self.shape(self.f, mine)
        if shape is None:
            return
        steps = list(stored.steps)
        if turned:
            steps.insert(0, ("transpose", (1, 0)))
        target = None
        if q.node.op_type not in _PACKED:
            target = self.shape(self.q, stored.name)

        def reference() -> NDArray[Any]:
            array = values() if values is not None else constant_value(self.f, mine)
            assert array is not None
            for kind, how in steps:
                array = array.transpose(how) if kind == "transpose" else array.reshape(how)
            if (
                target is not None
                and array.shape != target
                and _same_but_for_ones(array.shape, target)
            ):
                array = array.reshape(target)
            return np.asarray(array)

        axis = weight_channel_axis(op.node, 2 if bias else at, len(shape))
        for kind, how in steps:
            if kind == "transpose" and axis is not None:
                axis = how.index(axis)
            elif kind == "reshape" and len(how) != len(shape):
                axis = None
        if target is not None and len(target) != len(shape) and not steps:
            axis = None if axis is None or len(target) < 1 else min(axis, len(target) - 1)
        kind = stored.tensor.kind if stored.tensor is not None else "weight"
        conv_like = op.node.op_type in ("Conv", "ConvTranspose", "Gemm")
        if (kind == "weight" and at == 2 and conv_like) or bias:
            kind = "bias"
        named = not stored.names().isdisjoint([name, mine])
        self.used.update((stored.name, *folded_from(self.q, stored.name)))
        self.read_by[stored.name] = q.node.op_type
        pair = WeightPair(
            name=name,
            node=op.node,
            kind=kind,
            quantized=stored.tensor,
            quantized_name=stored.name,
            reference=reference,
            channel_axis=axis,
            matched_by="name" if named and values is None else "structure",
            note=note,
        )
        if known is not None:
            first, second = known, pair
            if known.quantized is None and pair.quantized is not None:
                first, second = pair, known
            pair = replace(first, copies=(*known.copies, replace(second, copies=())))
        self.pairs[name] = pair

    def is_float(self, tensor: str) -> bool:
        dtype = self.f.info(tensor).dtype
        if dtype == "unknown":
            value = constant_value(self.f, tensor)
            dtype = "unknown" if value is None else value.dtype.name
        return dtype in FLOAT_DTYPES

    # -- what no pair of nodes reads -------------------------------------------------------------

    def left(self) -> Iterator[_Stored]:
        """Constants of the quantized model that nodes read and no pair has."""
        seen: set[str] = set()
        for node in self.q.nodes:
            if node.op_type in (Q, DQ) or all(o in self.q_constants for o in node.outputs):
                continue
            for name in (*node.inputs, *node.captured):
                if name in seen or name not in self.q_constants:
                    continue
                seen.add(name)
                stored = self.stored(name)
                if stored is None or stored.name in self.used or stored.name in self.parameters:
                    continue
                if stored.tensor is None and not _holds_floats(self.q, stored.name):
                    continue
                if stored.name != name and stored.name in seen:
                    continue
                seen.add(stored.name)
                self.read_by[stored.name] = node.op_type
                yield stored

    def reader(self, tensor: str) -> Node | None:
        return next(iter(self.f.consumers.get(tensor, ())), None)

    def simple(
        self, name: str, stored: _Stored, how: str, note: str = "", scope: str = "",
        apply: Callable[[], NDArray[Any]] | None = None, node: Node | None = None,
    ) -> WeightPair | None:  # fmt: skip
        """A pair whose two sides have one layout, or are brought into it by `apply`."""
        node = node or self.reader(name)
        if node is None:
            return None

        def value() -> NDArray[Any]:
            array = constant_value(self.f, name)
            assert array is not None
            return array

        at = node.inputs.index(name) if name in node.inputs else 0
        shape = self.shape(self.f, name) or ()
        kind = stored.tensor.kind if stored.tensor is not None else "weight"
        if kind == "weight" and at == 2 and node.op_type in ("Conv", "ConvTranspose", "Gemm"):
            kind = "bias"
        return WeightPair(
            name=name,
            node=node,
            kind=kind,
            quantized=stored.tensor,
            quantized_name=stored.name,
            reference=apply or value,
            channel_axis=None if scope or apply else weight_channel_axis(node, at, len(shape)),
            matched_by=how,
            note=note,
            scope=scope,
        )

    def by_name(self) -> None:
        for stored in list(self.left()):
            for name in sorted(stored.names(), key=len):
                if name in self.f_constants and name not in self.pairs and self.is_float(name):
                    mine, its = self.shape(self.f, name), self.shape(self.q, stored.name)
                    packed = self.read_by.get(stored.name) in _PACKED
                    if self.fused.get(name) or not (packed or mine == its):
                        continue
                    pair = self.simple(name, stored, "name")
                    if pair is not None:
                        self.pairs[name] = pair
                        self.used.add(stored.name)
                        break

    def by_content(self) -> None:
        left = list(self.left())
        lone = [n for n in self.lone_constants() if _size(self.shape(self.f, n)) >= _TELLING]
        if not left or not lone:
            return
        candidates = Candidates(
            {n: v for n in lone if (v := constant_value(self.f, n)) is not None}
        )
        for stored in left:
            actual = self.values(stored)
            if actual is None or actual.size < _TELLING:
                continue
            axis = stored.tensor.qparams.axis if stored.tensor is not None else None
            gates = self.read_by.get(stored.name) in _GATED
            found = find_constant(actual, candidates, channel_axis=axis, gates=gates)
            if found is not None and not any(name in self.pairs for name in found.names):
                self.add_found(found, stored, candidates)

    def values(self, stored: _Stored) -> NDArray[Any] | None:
        if stored.tensor is not None:
            return stored_values(self.q, stored.tensor)
        return constant_value(self.q, stored.name)

    def add_found(
        self,
        found: ContentMatch,
        stored: _Stored,
        candidates: Candidates,
        body: tuple[Body, Body | None] | None = None,
    ) -> None:
        """Pairs what content found.

        Args:
            found: names of float constants, and what brings them into the other's layout.
            stored: the quantized model's constant.
            candidates: what `found` was chosen from.
            body: the quantized model's body that holds it, with the float model's.
        """
        names = found.names

        def apply() -> NDArray[Any]:
            return found.apply(*(candidates[name] for name in names))

        twin = body[1] if body is not None else None
        nodes = [*self.f.nodes, *(twin.nodes if twin is not None else ())]
        node = next((n for n in nodes if not {*n.inputs, *n.captured}.isdisjoint(names)), None)
        note = f"found by content: {found.transform}" if found.transform else "found by content"
        scope = body[0].path if body is not None else ""
        pair = self.simple(names[0], stored, "content", note, scope, apply, node)
        if pair is None:
            return
        if body is not None:
            self.scoped.append(pair)
        elif names[0] not in self.pairs and names[0] not in self.fused:
            self.pairs[names[0]] = pair
        for name in names[1:]:
            self.fused.setdefault(name, names[0])
        self.used.add(stored.name)

    def lone_constants(self) -> list[str]:
        """Float constants of the main graph that are read and have no part in any pair."""
        return [
            name
            for name in self.f.constant_names
            if name not in self.pairs and name not in self.fused and self.is_float(name)
        ]

    # -- bodies ----------------------------------------------------------------------------------

    def twin_body(self, body: Body) -> Body | None:
        """The float model's body at the same place: of the twin of the node that holds it."""
        outer: Model | Body | None = self.f
        around: Model | Body = self.q
        if isinstance(body.outer, Body):
            outer, around = self.twin_body(body.outer), body.outer
        if outer is None:
            return None
        back = {its: mine for mine, its in self.alignment.nodes.items()}
        there = {b.owner for b in self.f.bodies if b.outer is outer}
        owner = back.get(body.owner, body.owner) if around is self.q else body.owner
        if owner not in there:
            mine = [n.name for n in outer.nodes if n.name in there]
            here = {b.owner for b in self.q.bodies if b.outer is around}
            its = [n.name for n in around.nodes if n.name in here]
            if len(mine) != len(its):
                return None
            owner = mine[its.index(body.owner)]
        attribute = body.path.rsplit("/", 1)[-1]
        found = (b for b in self.f.bodies if b.outer is outer and b.owner == owner)
        return next((b for b in found if b.path.rsplit("/", 1)[-1] == attribute), None)

    def in_body(self, body: Body, names: list[str]) -> None:
        """Constants inside a body: by name in the float model's body, else by content.

        Args:
            body: of the quantized model.
            names: constants of the float model's main graph that have no pair there.
        """
        twin = self.twin_body(body)
        tensors = {
            name: t
            for t in self.scheme.tensors
            if t.scope == body.path and t.kind != "activation"
            for name in (t.quantized, t.after, t.before)
            if name
        }
        lone: Candidates | None = None
        for node in body.nodes:
            if node.op_type in (Q, DQ, "Constant"):
                continue
            for at, name in enumerate((*node.inputs, *node.captured)):
                tensor = tensors.get(name)
                if tensor is None and name not in body.constant_names:
                    continue
                actual = (
                    stored_values(self.q, tensor)
                    if tensor is not None
                    else constant_value(body, name)
                )
                if actual is None or actual.dtype.kind not in "fV":
                    continue
                stored = _Stored(name=tensor.quantized if tensor else name, tensor=tensor, steps=())
                if twin is not None and self.body_by_name(stored, twin, body, actual):
                    continue
                if actual.size < _TELLING:
                    continue
                if lone is None:
                    lone = self.body_candidates(twin, names)
                gates = node.op_type in _GATED and at in (1, 2, 3)
                found = find_constant(actual, lone, gates=gates)
                if found is not None:
                    self.add_found(found, stored, lone, (body, twin))

    def body_by_name(self, stored: _Stored, twin: Body, body: Body, actual: NDArray[Any]) -> bool:
        for name in sorted(stored.names(), key=len):
            if name not in twin.constant_names:
                continue
            value = constant_value(twin, name)
            node = next((n for n in twin.nodes if name in n.inputs), None)
            if value is None or node is None or value.shape != actual.shape:
                continue
            pair = self.simple(
                name, stored, "name", scope=body.path, node=node,
                apply=lambda value=value: value,  # type: ignore[misc]
            )  # fmt: skip
            if pair is not None:
                self.scoped.append(pair)
                return True
        return False

    def body_candidates(self, twin: Body | None, names: list[str]) -> Candidates:
        found = {n: v for n in names if (v := constant_value(self.f, n)) is not None}
        for name in twin.constant_names if twin is not None else ():
            value = constant_value(twin, name) if twin is not None else None
            if value is not None and value.dtype.kind in "fV" and value.size >= _TELLING:
                found.setdefault(name, value)
        return Candidates(found)

    def pin(self, name: str, other: str) -> None:
        stored = self.stored(other)
        if stored is None:
            return
        pair = self.simple(name, stored, "pin", "set by hand")
        if pair is not None:
            self.pairs[name] = replace(pair, channel_axis=pair.channel_axis)
            self.used.add(stored.name)

    # -- accounting ------------------------------------------------------------------------------

    def part_of(self, tensor: str) -> str:
        """The compared constant that a float constant is a part of; "" for none."""
        found = self.fused.get(tensor, "")
        if found:
            return found
        for source in self.path(tensor)[1:]:
            if source in self.pairs:
                return source
        for source in folded_from(self.f, tensor):
            if source != tensor and source in self.pairs:
                return source
        seen, front = {tensor}, [tensor]
        while front:
            at = front.pop()
            for node in self.f.consumers.get(at, ()):
                for output in node.outputs:
                    if output in self.f_constants and output not in seen:
                        if output in self.pairs:
                            return output
                        if output in self.fused:
                            return self.fused[output]
                        seen.add(output)
                        front.append(output)
        return ""

    def unmatched(self) -> list[Unmatched]:
        """Quantized weights and biases of the quantized model without a float constant."""
        used = self.used | {p.quantized_name for p in self.scoped}
        return [
            Unmatched(
                name=t.quantized,
                kind=t.kind,
                model="quantized",
                reason=f"no float constant found for what {', '.join(t.consumers[:2])} reads",
            )
            for t in self.scheme.tensors
            if t.kind in ("weight", "bias") and t.quantized not in used
        ]


class _Fold:
    """A weight and a bias after what followed their node was folded into them.

    Attributes:
        alpha: what the quantized model's Gemm leaves of the float one's `alpha` to the weight.
        beta: the same of `beta`, to the bias.
        scales: the weight is changed.
        changes: the weight or the bias is.
    """

    def __init__(self, op: Op, folds: list[Op], weights: Weights, q: Op) -> None:
        self.op = op
        self.folds = folds
        self.weights = weights
        self.own_beta, self.their_beta = (_factor(o, "beta") for o in (op, q))
        self.alpha = _factor(op, "alpha") / _factor(q, "alpha")
        self.beta = self.own_beta / self.their_beta
        self.scales = self.alpha != 1 or any(f.kind not in ("Add", "Sub") for f in folds)
        self.changes = bool(folds) or self.scales or self.beta != 1
        names = [f"{f.node.op_type} {f.node.name}" for f in folds]
        names += [
            f"{key} {_factor(op, key):g} of {op.node.name}, which is {_factor(q, key):g} in the "
            "quantized model"
            for key, ratio in (("alpha", self.alpha), ("beta", self.beta))
            if ratio != 1
        ]
        self.note = f"compared after folding {', '.join(names)}"

    def is_plain(self, bias: str) -> bool:
        """Whether a constant that was added is the bias as it stands: one value per channel."""
        return self.their_beta == 1 and _size(self.weights.shape(self.weights.f, bias)) > 1

    def value(self, tensor: str) -> NDArray[np.float64]:
        value = constant_value(self.weights.f, tensor)
        assert value is not None
        return np.asarray(value, np.float64)

    def gain_and_offset(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Per output channel: what multiplies the product, and what is added to it then."""
        gain = np.ones(1)
        has_bias = len(self.op.inputs) > 2 and self.op.inputs[2]
        offset = np.zeros(1)
        if has_bias:
            offset = self.value(self.op.inputs[2]).reshape(-1) * self.own_beta
        for fold in self.folds:
            if fold.kind == "BatchNormalization":
                scale, shift, mean, variance = (self.value(i) for i in fold.inputs[1:5])
                own = scale / np.sqrt(variance + float(fold.node.attributes.get("epsilon", 1e-5)))
                gain, offset = gain * own, (offset - mean) * own + shift
                continue
            at = next(n for n, i in enumerate(fold.inputs) if i in self.weights.f_constants)
            constant = self.value(fold.inputs[at]).reshape(-1)
            if fold.kind == "Add":
                offset = offset + constant
            elif fold.kind == "Sub":
                offset = offset - constant if at else constant - offset
                gain = gain if at else -gain
            else:
                own = constant if fold.kind == "Mul" else 1 / constant
                gain, offset = gain * own, offset * own
        return gain, offset

    def weight(self) -> NDArray[Any]:
        weight = self.value(self.op.inputs[1])
        gain = self.gain_and_offset()[0] * self.alpha
        if self.op.kind == "MatMul":
            rows = self.op.node.attributes.get("transB", 0)
            return np.asarray(weight * (gain.reshape(-1, 1) if rows else gain))
        tail = (1,) * (weight.ndim - 2)
        if self.op.kind == "Conv":
            return np.asarray(weight * gain.reshape(-1, 1, *tail))
        groups = int(self.op.node.attributes.get("group", 1))
        if gain.size == 1:
            return np.asarray(weight * gain.reshape(()))
        rows = np.repeat(gain.reshape(groups, -1), weight.shape[0] // groups, axis=0)
        return np.asarray(weight * rows.reshape(rows.shape + tail))

    def bias(self) -> NDArray[Any]:
        if not self.folds:
            return self.value(self.op.inputs[2]) * self.beta
        offset = self.gain_and_offset()[1] / self.their_beta
        weight = self.weights.shape(self.weights.f, self.op.inputs[1]) or (1,)
        if offset.size > 1:
            return offset
        groups = int(self.op.node.attributes.get("group", 1))
        rows = self.op.kind == "Conv" or self.op.node.attributes.get("transB", 0)
        channels = weight[0] if rows else weight[-1]
        if self.op.kind == "ConvTranspose":
            channels = weight[1] * groups
        return np.full(channels, offset.reshape(-1)[0])

    def bias_source(self) -> tuple[Op, int, str] | None:
        """The constant that gives the folded bias its name: the first that was added."""
        for fold in self.folds:
            if fold.kind == "BatchNormalization":
                return fold, 2, fold.inputs[2]
            if fold.kind in ("Add", "Sub"):
                at = next(n for n, i in enumerate(fold.inputs) if i in self.weights.f_constants)
                return fold, at, fold.inputs[at]
        return None


def _factor(op: Op, name: str) -> float:
    """A Gemm's alpha or beta; 1 where it has none, or none that could have been taken out."""
    return float(op.node.attributes.get(name, 1.0)) or 1.0


def _turned(op: Op, q: Op) -> bool:
    """The two nodes read their weight in transposed layouts."""
    sides = [bool(o.node.attributes.get("transB", 0)) for o in (op, q)]
    return sides[0] != sides[1]


def _same_stored(stored: _Stored, pair: WeightPair) -> bool:
    """The same constant, read with the same parameters."""
    if stored.name != pair.quantized_name:
        return False
    if stored.tensor is None or pair.quantized is None or stored.tensor is pair.quantized:
        return stored.tensor is pair.quantized
    a, b = stored.tensor.qparams, pair.quantized.qparams
    return (
        (a.axis, a.block_size) == (b.axis, b.block_size)
        and np.array_equal(a.scale, b.scale)
        and np.array_equal(a.zero_point, b.zero_point)
    )


def _holds_floats(model: Model, name: str) -> bool:
    dtype = model.info(name).dtype
    if dtype == "unknown":
        value = constant_value(model, name)
        dtype = "unknown" if value is None else value.dtype.name
    return dtype in FLOAT_DTYPES


def _same_but_for_ones(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return [d for d in a if d != 1] == [d for d in b if d != 1]


def _size(shape: tuple[int, ...] | None) -> int:
    return 0 if shape is None else int(np.prod(shape, dtype=np.int64))


def in_order(pairs: Iterable[WeightPair], model: Model) -> list[WeightPair]:
    """Pairs in the order of their float nodes, then of the node's inputs."""

    def place(pair: WeightPair) -> tuple[int, int]:
        inputs = pair.node.inputs
        return (pair.node.index, inputs.index(pair.name) if pair.name in inputs else len(inputs))

    return sorted(pairs, key=place)
