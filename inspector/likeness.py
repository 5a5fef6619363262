"""Are two nodes, or two values, of two graphs alike: in what is known, in names, in constants.

Answers questions about one pair at a time and keeps no state but what was answered before;
`alignment` asks them in an order that makes the answers decide.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator
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


class Likeness:
    """What speaks for and against two nodes or values being the same.

    Attributes:
        f, q: the graphs of the float and of the quantized model.
        quantized: roots of the quantized model's values that go through Q.
    """

    def __init__(self, f: View, q: View, quantized: Collection[str]) -> None:
        self.f, self.q, self.quantized = f, q, quantized
        self.scores: dict[tuple[Op, Op], float] = {}

    def alike(self, root: str, other: str) -> bool:
        """Type and shape do not contradict."""
        a, b = self.f.model.info(root), self.q.model.info(self.q.tensor(other))
        if b.dtype in ("int8", "uint8", "int16", "uint16", "int32") and other in self.quantized:
            b_float = True
        else:
            b_float = b.dtype in FLOAT_DTYPES
        if "unknown" not in (a.dtype, b.dtype) and (a.dtype in FLOAT_DTYPES) != b_float:
            return False
        return dims_agree(a.shape, b.shape)

    def makers_fit(self, root: str, other: str) -> bool:
        if not self.alike(root, other):
            return False
        a, b = self.f.maker.get(root), self.q.maker.get(other)
        while a is not None and (b is None or a.kind != b.kind):
            # A node that may have been folded into the one before it.
            if a.kind not in (*RECTIFIERS, "BatchNormalization", "Add", "Mul"):
                return False
            a = next((m for i in a.inputs if (m := self.f.maker.get(i)) is not None), None)
        return (a is None) == (b is None)

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

    def compatible(self, op: Op, q: Op) -> bool:
        """Nothing that is known of two nodes of one class contradicts."""
        for a, b in zip(*self.settings(op, q), strict=True):
            if a is not None and b is not None and a != b:
                return False
        for at, (mine, its) in enumerate(zip(op.inputs, q.inputs, strict=False)):
            if at > 1 or mine not in self.f.constants or its not in self.q.constants:
                continue
            if (
                op.kind in DATA_OPERANDS and at not in DATA_OPERANDS[op.kind]
            ) or op.kind == "Where":
                continue
            if not weight_shapes_agree(op, q, self.f.shape(mine), self.q.shape(its)):
                return False
        if op.kind in HEAVY or not op.outputs or not q.outputs:
            return True
        mine, its = op.outputs[0], q.outputs[0]
        if op.kind == "Reshape":
            a, b = reshapes(mine, self.f), reshapes(its, self.q)
            if len(a) != len(b):
                mine, its = a[-1], b[-1]
        return dims_agree(self.f.shape(mine), self.q.shape(its))

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

    def content_score(self, op: Op, q: Op) -> float:
        """The lowest correlation of two nodes' constants, 0 where they have none."""
        known = self.scores.get((op, q))
        if known is not None:
            return known
        scores = []
        for mine, its in zip(op.inputs, q.inputs, strict=False):
            if mine in self.f.constants and its in self.q.constants:
                a, b = constant_value(self.f.model, mine), constant_value(self.q.model, its)
                if a is not None and b is not None:
                    scores.append(_alikeness(a, b))
        self.scores[op, q] = found = min(scores, default=0.0)
        return found


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
