"""Are two nodes, or two values, of two graphs alike: in what is known, in names, in constants.

Answers questions about one pair at a time and keeps no state but what was answered before;
`alignment` asks them in an order that makes the answers decide.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.content import correlation
from inspector.folding import constant_value
from inspector.model import FLOAT_DTYPES
from inspector.structure import (
    AXES_INPUT,
    COMMUTATIVE,
    DATA_OPERANDS,
    ELEMENTWISE,
    HEAVY,
    NEUTRAL,
    RECTIFIERS,
    SETTINGS,
    CarriedOrder,
    Op,
    Permutation,
    View,
    axes_of,
    base_names,
    compose,
    dims_agree,
    inverse,
    perm_of,
    relabelled,
    reshapes,
    settings_of,
    weight_shapes_agree,
)

# Is it a float (None: unknown), and its shape.
_Type = tuple[bool | None, tuple[int | str | None, ...] | None]
# Nodes that read one constant, above which it is no name to tell them apart by.
_MANY = 100


class Likeness:
    """What speaks for and against two nodes or values being the same.

    Attributes:
        f, q: the graphs of the float and of the quantized model.
        quantized: roots of the quantized model's values that go through Q.
    """

    def __init__(self, f: View, q: View, quantized: Collection[str]) -> None:
        self.f, self.q, self.quantized = f, q, quantized
        self.by_node = {op.node.name: op for op in q.ops}
        self.scores: dict[tuple[str, str], float | None] = {}  # of constants
        self._traits: dict[Op, int] = {}
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._examples: list[Op] = []  # by traits, the first node that has them
        self._agree: dict[tuple[int, int], bool] = {}
        self._made: dict[Op, frozenset[str | None]] = {}
        self._links: dict[Op, list[Op]] = {}
        self._reading: dict[View, dict[str, list[Op]]] = {}

    def alike(self, root: str, other: str) -> bool:
        """Type and shape do not contradict."""
        return self._types_agree(self._type(root), self._type_there(other))

    def _type(self, root: str) -> _Type:
        info = self.f.model.info(root)
        return (None if info.dtype == "unknown" else info.dtype in FLOAT_DTYPES, info.shape)

    def _type_there(self, root: str) -> _Type:
        info = self.q.model.info(self.q.tensor(root))
        stored = info.dtype in ("int8", "uint8", "int16", "uint16", "int32")
        real = info.dtype in FLOAT_DTYPES or (stored and root in self.quantized)
        return (None if info.dtype == "unknown" else real, info.shape)

    @staticmethod
    def _types_agree(mine: _Type, its: _Type) -> bool:
        if None not in (mine[0], its[0]) and mine[0] != its[0]:
            return False
        return dims_agree(mine[1], its[1])

    def makers_fit(self, root: str, other: str) -> bool:
        """Two values may have been made by the same node, as far as its class and type tell."""
        return self.makings_agree(self.made(root), self.made_there(other))

    def made(self, root: str) -> tuple[_Type, frozenset[str | None]]:
        """A float value's type, and the classes of the nodes that may really have made it.

        A rectifier, normalization or bias may have been folded into the node before it; None is
        for a value that no node makes.
        """
        path: list[Op | None] = [self.f.maker.get(root)]
        while (op := path[-1]) is not None and op not in self._made:
            if op.kind not in (*RECTIFIERS, "BatchNormalization", "Add", "Mul"):
                break
            path.append(next((m for i in op.inputs if (m := self.f.maker.get(i))), None))
        found: frozenset[str | None] = frozenset()
        for op in reversed(path):
            if op is None:
                found = frozenset({None})
            else:
                found = self._made.setdefault(op, found | {op.kind})
        return self._type(root), found

    def made_there(self, root: str) -> tuple[_Type, str | None]:
        """The type of the quantized model's value, and the class of the node that makes it."""
        maker = self.q.maker.get(root)
        return self._type_there(root), None if maker is None else maker.kind

    def makings_agree(
        self, mine: tuple[_Type, frozenset[str | None]], its: tuple[_Type, str | None]
    ) -> bool:
        """What `made` and `made_there` tell of two values does not contradict."""
        return its[1] in mine[1] and self._types_agree(mine[0], its[0])

    def pattern(self, op: Op) -> list[str]:
        """Which data operands are computed; a bias may be anywhere, so it does not count."""
        found = ["=" if d == "=" else "." for d in op.data if d]
        return sorted(found) if op.kind in COMMUTATIVE else found

    def settings(self, op: Op, q: Op) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What else decides both nodes' results, read with all that is known of the shapes."""
        mine = self.f.shape(op.inputs[0]) if op.inputs and op.inputs[0] else None
        its = self.q.shape(q.inputs[0]) if q.inputs and q.inputs[0] else None
        if mine is None or its is None or len(mine) != len(its):
            mine = its = mine if its is None else its if mine is None else None
        else:
            mine = its = tuple(
                a if isinstance(a, int) else b for a, b in zip(mine, its, strict=True)
            )
        return settings_of(op, self.f, mine), settings_of(q, self.q, its)

    def traits(self, op: Op, view: View) -> int:
        """A number for all that `compatible` asks of a node; it is the same for look-alikes."""
        found = self._traits.get(op)
        if found is not None:
            return found
        shape = view.shape(op.inputs[0]) if op.inputs and op.inputs[0] else None
        key: list[Any] = [view is self.q, op.kind, op.node.op_type, len(op.inputs), shape]
        key += [view.shape(i) if i in view.constants else False for i in op.inputs[:2]]
        if op.outputs:
            chain = reshapes(op.outputs[0], view) if op.kind == "Reshape" else op.outputs[:1]
            key += [len(chain), view.shape(chain[0]), view.shape(chain[-1])]
        if settings_of(op, view, shape):
            key += [repr(op.node.attributes.get(name)) for name in SETTINGS]
            key += [view.integers(i) for i in op.inputs[1:5]]
        found = self._traits[op] = self._numbers.setdefault(tuple(key), len(self._numbers))
        if found == len(self._examples):
            self._examples.append(op)
        return found

    def traits_agree(self, mine: int, its: int) -> bool:
        """Nothing that is known of nodes with these traits contradicts."""
        found = self._agree.get((mine, its))
        if found is None:
            found = not self._contradict(self._examples[mine], self._examples[its])
            self._agree[mine, its] = found
        return found

    def compatible(self, op: Op, q: Op) -> bool:
        """Nothing that is known of two nodes of one class contradicts."""
        return self.traits_agree(self.traits(op, self.f), self.traits(q, self.q))

    def _contradict(self, op: Op, q: Op) -> bool:
        for a, b in zip(*self.settings(op, q), strict=True):
            if a is not None and b is not None and a != b:
                return True
        for at, (mine, its) in enumerate(zip(op.inputs, q.inputs, strict=False)):
            if at > 1 or mine not in self.f.constants or its not in self.q.constants:
                continue
            if (
                op.kind in DATA_OPERANDS and at not in DATA_OPERANDS[op.kind]
            ) or op.kind == "Where":
                continue
            if not weight_shapes_agree(op, q, self.f.shape(mine), self.q.shape(its)):
                return True
        if op.kind in HEAVY or not op.outputs or not q.outputs:
            return False
        mine, its = op.outputs[0], q.outputs[0]
        if op.kind == "Reshape":
            a, b = reshapes(mine, self.f), reshapes(its, self.q)
            if len(a) != len(b):
                mine, its = a[-1], b[-1]
        return not dims_agree(self.f.shape(mine), self.q.shape(its))

    def carried(self, op: Op, q: Op, order: Permutation | None) -> CarriedOrder:
        """The axis order of a node's result when its operands come in `order`; False: none fits."""
        if order is None:
            return None if self.compatible(op, q) else False
        if op.kind in ELEMENTWISE:
            return order
        if op.kind == "Reshape":
            if op.node.op_type != q.node.op_type or op.node.op_type not in AXES_INPUT:
                return False
            shapes = self.f.shape(op.outputs[0]), self.q.shape(q.outputs[0])
            if op.node.op_type == "Unsqueeze" and None in shapes:
                return False
            ranks = [len(s or ()) for s in shapes]
            if op.node.op_type == "Squeeze":
                ranks = [len(order)] * 2
            axes = axes_of(op, self.f, ranks[0]), axes_of(q, self.q, ranks[1])
            return relabelled(op.node.op_type, order, *axes)
        a, b = axes_of(op, self.f, len(order)), axes_of(q, self.q, len(order))
        if a is None or b is None or tuple(sorted(order[axis] for axis in a)) != b:
            return False
        if op.kind in ("Concat", "Softmax", "LogSoftmax"):
            return order
        if op.kind.startswith("Reduce"):
            keep = [o.node.attributes.get("keepdims", 1) for o in (op, q)]
            if keep[0] != keep[1]:
                return False
            return order if keep[0] else relabelled("Squeeze", order, a, b)
        return False

    def transposed(
        self, root: str, permutation: Permutation | None
    ) -> Iterator[tuple[str, Permutation | None]]:
        """The values that are `root` but for their axis order, with what gives the float layout.

        Args:
            root: of the quantized model's value.
            permutation: what gives the float layout from `root`.
        """
        seen, front = {root}, deque([(root, permutation)])
        while front and len(seen) < 32:
            at, perm = front.popleft()
            yield at, perm
            steps = [(r.outputs[0], r, False) for r in self.q.readers.get(at, ())]
            maker = self.q.maker.get(at)
            if maker is not None and maker.inputs:
                steps.append((maker.inputs[0], maker, True))
            for other, step, up in steps:
                if step.kind != "Transpose" or other in seen:
                    continue
                own = perm_of(step, self.q)
                if own is None or (perm is not None and len(perm) != len(own)):
                    continue
                seen.add(other)
                front.append((other, compose(own if up else inverse(own), perm)))

    def before_movement(self, root: str, other: str) -> str:
        """`other`, or what it was before nodes that the float model does not have moved it."""
        maker, at = self.f.maker.get(root), other
        for _ in range(4):
            step = self.q.maker.get(at)
            if maker is None or step is None or step.kind == maker.kind:
                return other if step is None or maker is None else at
            if step.kind not in NEUTRAL or not step.inputs[0] or not self.alike(root, at):
                return other
            at = step.inputs[0]
        return other

    def names_of(self, root: str) -> list[str]:
        """Names under which a value may live on: its own, and that of what it was folded into."""
        names = list(self.f.members.get(root, [root]))
        reader = self.f.sole_reader(root)
        if reader is not None and reader.kind in RECTIFIERS:
            names += self.f.members.get(reader.outputs[0], [])
        return names

    def name_score(self, op: Op, q: Op) -> float:
        score = float(q.node.name.removesuffix("_quant") == op.node.name)
        for at, output in enumerate(op.outputs):
            for name in self.names_of(output):
                if at < len(q.outputs) and self.q.by_name.get(name) == q.outputs[at]:
                    score += 1
        for mine, its in zip(op.inputs, q.inputs, strict=False):
            if mine in self.f.constants and its in self.q.constants:
                score += mine in base_names(its)
        return score

    def named_like(self, op: Op, view: View) -> list[Op]:
        """The nodes of one graph that share a name with a node of the other.

        A constant that very many nodes read tells no two of them apart, and is left out.
        """
        if not self._reading:
            self._index_names()
        found = dict.fromkeys(self._links.get(op, ()))
        for name in op.inputs:
            if view is self.q and name in self.f.constants:
                bases: Iterable[str] = (name,)
            elif view is self.f and name in self.q.constants:
                bases = base_names(name)
            else:
                continue
            for base in bases:
                reading = self._reading[view].get(base, ())
                if len(reading) <= _MANY:
                    found.update(dict.fromkeys(reading))
        return list(found)

    def _index_names(self) -> None:
        for view in (self.f, self.q):
            reading = self._reading[view] = {}
            for op in view.ops:
                for name in op.inputs:
                    if name in view.constants:
                        for base in (name,) if view is self.f else base_names(name):
                            reading.setdefault(base, []).append(op)
        for op in self.f.ops:
            names = [self.q.by_name.get(n) for o in op.outputs for n in self.names_of(o)]
            rows = [self.by_node.get(op.node.name + suffix) for suffix in ("", "_quant")]
            rows += [self.q.maker.get(name) for name in names if name]
            for q in dict.fromkeys(rows):
                if q is not None:
                    self._links.setdefault(op, []).append(q)
                    self._links.setdefault(q, []).append(op)

    def content_score(self, op: Op, q: Op) -> float:
        """The lowest correlation of two nodes' constants, 0 where they have none."""
        scores = []
        for mine, its in zip(op.inputs, q.inputs, strict=False):
            if mine in self.f.constants and its in self.q.constants:
                if (mine, its) not in self.scores:
                    a, b = constant_value(self.f.model, mine), constant_value(self.q.model, its)
                    self.scores[mine, its] = None if a is None or b is None else _alikeness(a, b)
                scores.append(self.scores[mine, its])
        return min((s for s in scores if s is not None), default=0.0)


def _alikeness(a: NDArray[Any], b: NDArray[Any]) -> float:
    """How well two constants agree, 0..1."""
    if a.dtype.kind not in "fiuV" or b.dtype.kind not in "fiuV" or a.size != b.size:
        return float(a.dtype.kind == b.dtype.kind and np.array_equal(a, b))
    x, y = a.squeeze(), b.squeeze()
    if x.shape != y.shape and x.ndim == 2:
        y = y.T
    if x.shape != y.shape:
        y = y.reshape(x.shape)
    likeness = correlation(np.asarray(x, np.float64), np.asarray(y, np.float64), None)
    return 0.0 if math.isnan(likeness) else max(0.0, likeness)
