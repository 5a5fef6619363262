"""Which node computes what another model's node computes: by edges, with names to break ties.

Looks at no values but constants. `align` grows pairs of nodes from the graph inputs forward and
from the graph outputs backward, through what pre-processing and quantizers do to a graph: folded
rectifiers, normalizations and biases, MatMul and Add as one Gemm, moved Transposes and Reshapes.
Where several nodes look alike, names decide, then the content of their constants, then their order
in the file. A separate module because matching pairs *tensors*, whichever way nodes were found.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from inspector.folding import constant_value
from inspector.likeness import Likeness
from inspector.structure import (
    COMMUTATIVE,
    HEAVY,
    MOVEMENT,
    RECTIFIERS,
    Op,
    Permutation,
    View,
    compose,
    dims_agree,
    key_of,
    origin,
    perm_of,
    reshapes,
    settings_of,
    slices_of,
)


@dataclass(frozen=True, slots=True)
class Twin:
    """The quantized model's value that stands for a float value.

    Attributes:
        root: its root.
        permutation: axes to apply to it to get the float layout; None where it is the same.
    """

    root: str
    permutation: Permutation | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Alignment:
    """What is the same in two graphs.

    Attributes:
        float_view, quantized_view: the graphs.
        nodes: by float node name, the quantized node's name.
        ops: the pairs of computing nodes, in the order in which they were found.
        values: by root of a float value, the quantized value.
        folded: by root of a float value that the quantized model does not have, the root of the
            value that it became a part of.
        same: those of `folded` that hold the same numbers as what they became a part of.
        rectifiers: by root of a float value, the Relu or Clip, or several in a row, that were
            folded into Q, in order.
        folds: by name of a float node, the nodes whose constants went into its own.
        biases: by name of a float node, the quantized model's Add that holds its bias.
        apart: by name of a float node with a folded normalization, the quantized model's
            BatchNormalization that is not folded.
        untrusted: how many names meant something else, where that made names worthless.
    """

    float_view: View
    quantized_view: View
    nodes: dict[str, str] = field(default_factory=dict)
    ops: list[tuple[Op, Op]] = field(default_factory=list)
    values: dict[str, Twin] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    same: set[str] = field(default_factory=set)
    rectifiers: dict[str, list[Op]] = field(default_factory=dict)
    folds: dict[str, list[Op]] = field(default_factory=dict)
    untrusted: list[int] = field(default_factory=list)
    biases: dict[str, Op] = field(default_factory=dict)
    apart: dict[str, Op] = field(default_factory=dict)


def align(
    float_view: View,
    quantized_view: View,
    anchors: Mapping[str, Twin],
    ends: Mapping[str, str],
    quantized: Collection[str],
) -> Alignment:
    """The nodes and values that are the same in two graphs.

    Args:
        float_view, quantized_view: the graphs.
        anchors: by root of a float value, what is known to be the same (inputs, pins).
        ends: by root of a float value, the root of the quantized value: graph outputs.
        quantized: roots of the quantized model's values that go through Q.
    """
    return _Aligner(float_view, quantized_view, quantized).run(anchors, ends)


def _has_bias(op: Op) -> bool:
    return len(op.inputs) > 2 and bool(op.inputs[2])


class _Side:
    """Nodes of one model, in order, with how many there are of each kind of traits."""

    def __init__(self) -> None:
        self.traits: dict[Op, int] = {}
        self.alike: dict[int, dict[Op, None]] = {}

    def add(self, op: Op, traits: int) -> None:
        self.traits[op] = traits
        self.alike.setdefault(traits, {})[op] = None

    def remove(self, op: Op) -> None:
        traits = self.traits.pop(op, None)
        if traits is not None:
            del self.alike[traits][op]
            if not self.alike[traits]:
                del self.alike[traits]


class _Group:
    """Nodes that compute the same from the same operands, as far as edges tell.

    Attributes:
        waiting: those of the float model that have no partner yet.
        free: those of the quantized model that have none.
        single: float nodes that no node of the quantized model stands for, found for good.
        doubts: by float node and what was asked, the two nodes with equal claims: while both are
            there, nothing is decided.
    """

    def __init__(self) -> None:
        self.waiting, self.free = _Side(), _Side()
        self.single: set[Op] = set()
        self.doubts: dict[tuple[Op, str], tuple[Op, ...]] = {}

    def doubted(self, op: Op, how: str) -> bool:
        """The question was asked before, and what left it open is still so."""
        both = self.doubts.get((op, how))
        return both is not None and all(
            q in self.free.traits or q in self.waiting.traits for q in both
        )


class _Aligner(Likeness):
    def __init__(self, f: View, q: View, quantized: Collection[str]) -> None:
        super().__init__(f, q, quantized)
        self.found = Alignment(float_view=f, quantized_view=q)
        self.values = self.found.values
        self.pair_of: dict[Op, Op] = {}  # float -> quantized
        self.taken: dict[Op, Op] = {}  # quantized -> float
        self.index: dict[tuple[Any, ...], list[Op]] = {}
        for op in q.ops:
            self.index.setdefault(op.key, []).append(op)
        self.transposes = any(op.kind == "Transpose" for op in q.ops)
        self.groups: dict[tuple[Any, ...], _Group] = {}
        self.open: dict[tuple[Any, ...], None] = {}  # groups in which float nodes wait
        self.tried: dict[tuple[Any, ...], str] = {}
        self.group_of: dict[Op, tuple[Any, ...]] = {}  # of float nodes
        self.moved: dict[str, None] = {}  # matched float values that were only moved
        self.movers = [op for op in f.ops if op.kind in MOVEMENT]
        self.named: list[tuple[Op, Op]] | None = None  # pairs that names propose
        self.aliased: dict[Op, dict[Op, Permutation | None]] = {}
        # Operands of commutative nodes that edges could not tell apart, by each float operand.
        self.later: dict[Op, tuple[list[str], list[str]]] = {}
        self.waits: dict[str, dict[Op, None]] = {}
        self.queue: deque[str] = deque()
        self.twins: dict[str, str] = {}  # by quantized value, the float value that came first
        self.fixed: set[str] = set()  # float values that the caller matched
        # By float value, the rectifiers that give it once more.
        self.copies: dict[str, list[Op]] = {}
        self.reshaped: set[Op] = set()  # float nodes whose twin reads a reshaped operand

    def run(self, anchors: Mapping[str, Twin], ends: Mapping[str, str]) -> Alignment:
        self.fixed.update(anchors)
        for root, twin in anchors.items():
            self.match(root, twin)
        self.forward_from_nothing()
        self.spread()
        self.trust_names()
        for root, other in ends.items():
            if root not in self.values and root not in self.found.folded:
                self.match(root, Twin(other))
        while True:
            self.spread()
            if not (
                (not self.found.untrusted and self.by_names())
                or self.bridge()
                or self.decide("content")
                or self.unify_later("order")
                or self.decide("order")
            ):
                self.name_the_same()
                return self.found

    def by_names(self) -> bool:
        return self.decide("name") or self.unify_later("name") or self.anchor_names()

    def name_the_same(self) -> None:
        """Marks float values that equal what they were moved from, however that was found."""
        for root, extras in self.f.extras.items():
            twin = self.values.get(root)
            its = self.q.extras.get(twin.root, ()) if twin is not None else ()
            for mine, other in zip(extras, its, strict=False):
                self.match(mine, Twin(other))
        for op in self.f.ops:
            computed = [d for d in op.data if d not in ("=", "")]
            if op.kind not in MOVEMENT or len(computed) != 1 or op in self.pair_of:
                continue
            twin = self.values.get(op.outputs[0])
            if twin is not None and self.values.get(computed[0]) == twin:
                self.found.folded[op.outputs[0]] = computed[0]
                self.found.same.add(op.outputs[0])

    def trust_names(self) -> None:
        """Stops using names where edges have shown that most of them mean something else."""
        agree = lie = 0
        for root, twin in self.values.items():
            if root not in self.fixed:
                for name in self.f.members[root]:
                    other = self.q.by_name.get(name)
                    agree += other == twin.root
                    lie += other not in (None, twin.root)
        if lie > agree:
            self.found.untrusted.append(lie)

    def forward_from_nothing(self) -> None:
        """Nodes that read constants alone and yet compute (random numbers, bodies)."""
        for op in self.f.ops:
            if all(d in ("=", "") for d in op.data):
                self.consider(op)

    # -- spreading along edges -----------------------------------------------------------------

    def spread(self) -> None:
        while self.queue:
            root = self.queue.popleft()
            if root not in self.values:
                continue  # folded meanwhile
            for op in self.f.readers.get(root, ()):
                self.consider(op)
            if root in self.values:
                self.backward(root)
            self.retry_later(root)

    def moved_only(self, root: str, known: str) -> bool:
        """Two float values hold the same numbers: nothing but moves lies between them."""
        return origin(root, self.f) == origin(known, self.f)

    def match(self, root: str, twin: Twin, again: bool = False) -> None:
        if root in self.values or root in self.found.folded:
            return
        if twin.permutation is not None and root not in self.fixed:
            # The value may be there in the float layout, too.
            for other, permutation in self.transposed(twin.root, twin.permutation):
                if permutation is None and (
                    other in self.quantized or twin.root not in self.quantized
                ):
                    twin = Twin(other)
                    break
        if root not in self.fixed and twin.permutation is None and not self.alike(root, twin.root):
            return
        if root not in self.fixed and not again:
            known = self.twins.get(twin.root)
            if known is not None and known in self.values and not self.moved_only(root, known):
                return
        self.twins.setdefault(twin.root, root)
        self.know(root, twin)

    def know(self, root: str, twin: Twin) -> None:
        self.values[root] = twin
        self.queue.append(root)
        maker = self.f.maker.get(root)
        if maker is not None and maker.kind in (*MOVEMENT, "Gather"):
            self.moved[root] = None

    def consider(self, op: Op) -> None:
        """Pairs a float node whose data operands are all known, if one node is alone with it."""
        if op in self.pair_of or op in self.group_of:
            return
        twins: list[Twin | str] = []
        for name in op.data:
            if name in ("=", ""):
                twins.append(name)
            elif name in self.values:
                twins.append(self.values[name])
            else:
                return
        if all(isinstance(t, str) or t.permutation is None for t in twins):
            key = key_of(op, [t if isinstance(t, str) else t.root for t in twins])
            if self.index.get(key):
                self.tried.pop(key, None)
                self.wait(op, key)
                return
        if op.kind == "Transpose" and isinstance(twins[0], Twin):
            self.transpose(op, twins[0])
        else:
            if self.transposes:
                self.through_transposes(op, twins)
            if op.kind == "MatMul" and op not in self.pair_of and op.data[1:] == ("=",):
                self.through_reshape(op, twins)

    def through_reshape(self, op: Op, twins: list[Twin | str]) -> None:
        """A MatMul over many axes that pre-processing made a Gemm between two Reshapes."""
        twin = twins[0]
        if not isinstance(twin, Twin):
            return
        aliases = self.transposed(twin.root, twin.permutation)
        exact = next((root for root, permutation in aliases if permutation is None), "")
        found: list[tuple[tuple[Any, ...], Op]] = []
        for reader in self.q.readers.get(exact, ()):
            if reader.kind == "Reshape":
                key = key_of(op, [reader.outputs[0], "="])
                found += [(key, q) for q in self.index.get(key, ()) if q not in self.taken]
        if not found:
            return
        if len({key for key, _ in found}) > 1:
            # Each Gemm has a Reshape of its own, so that the operand does not tell them apart.
            found.sort(key=lambda c: (-self.name_score(op, c[1]), -self.content_score(op, c[1])))
        # Values of another shape: nothing of the operands but their weights is the same.
        self.reshaped.add(op)
        self.wait(op, found[0][0])

    def transpose(self, op: Op, twin: Twin) -> None:
        """A float Transpose that the quantized model does elsewhere, or not at all."""
        perm = perm_of(op, self.f)
        if perm is None or (twin.permutation and len(twin.permutation) != len(perm)):
            return
        wanted = compose(twin.permutation, perm)
        for other, permutation in self.transposed(twin.root, wanted):
            if permutation is None:
                self.match(op.outputs[0], Twin(other))
                return
        self.match(op.outputs[0], Twin(twin.root, wanted))

    def through_transposes(self, op: Op, twins: list[Twin | str]) -> None:
        """A float node whose twin reads its operands in another axis order."""
        options: list[dict[Permutation | None, str]] = []
        for twin in twins:
            if isinstance(twin, str):
                options.append({None: twin})
            else:
                found: dict[Permutation | None, str] = {}
                for other, permutation in self.transposed(twin.root, twin.permutation):
                    found.setdefault(permutation, other)
                options.append(found)
        orders = dict.fromkeys([None, *(p for o in options for p in o)])
        for order in orders:
            names = [
                o[None] if isinstance(t, str) else o.get(order)
                for o, t in zip(options, twins, strict=True)
            ]
            if any(n is None for n in names):
                continue
            key = key_of(op, [n for n in names if n is not None])
            free = [q for q in self.index.get(key, ()) if q not in self.taken]
            fits = [q for q in free if self.carried(op, q, order) is not False]
            if len(fits) == 1:
                carried = self.carried(op, fits[0], order)
                self.pair(op, fits[0], None if carried is False else carried)
                return

    def wait(self, op: Op, key: tuple[Any, ...]) -> None:
        """Puts a float node among those of the same class and operands, and settles what it can."""
        group = self.groups.get(key)
        if group is None:
            self.groups[key] = group = _Group()
            for q in self.index[key]:
                if q not in self.taken:
                    group.free.add(q, self.traits(q, self.q))
        group.waiting.add(op, self.traits(op, self.f))
        self.group_of[op] = key
        self.open[key] = None
        self.settle(key, "")

    def settle(self, key: tuple[Any, ...], how: str) -> bool:
        """Pairs the nodes of a group that have one partner each; True if any was paired."""
        group, paired = self.groups[key], False
        while group.waiting.traits:
            if not group.free.traits:
                return self.repeat(group, key) or paired
            found = self.only(group)
            if found is None:
                break
            self.join(*found)
            paired = True
        if not group.waiting.traits:
            self.open.pop(key, None)
            return paired
        found = self.chosen(group, how) if how else None
        if found is None:
            return paired
        self.pair(*found)  # one, and let the edges say the rest
        return True

    def only(self, group: _Group) -> tuple[Op, Op] | None:
        """A node that fits one node alone, which fits no other."""
        for mine, ops in group.waiting.alike.items():
            if len(ops) > 1:
                continue
            fits = [its for its in group.free.alike if self.traits_agree(mine, its)]
            if len(fits) != 1 or len(group.free.alike[fits[0]]) > 1:
                continue
            rivals = (other for other in group.waiting.alike if other != mine)
            if not any(self.traits_agree(other, fits[0]) for other in rivals):
                return next(iter(ops)), next(iter(group.free.alike[fits[0]]))
        return None

    def chosen(self, group: _Group, how: str) -> tuple[Op, Op] | None:
        """The first node of a group that has a partner by name, content or order."""
        for op, mine in group.waiting.traits.items():
            if how == "content" and not self.f.constants.intersection(op.inputs):
                continue
            if group.doubted(op, how):
                continue
            if how == "name":
                rows = [q for q in self.named_like(op, self.q) if q in group.free.traits]
            else:
                rows = list(group.free.traits)
            choices = (q for q in rows if self.traits_agree(mine, group.free.traits[q]))
            if how == "order":
                chosen = next(choices, None)
            else:
                chosen = self.best(op, list(choices), group, how)
            if chosen is not None:
                return op, chosen
        return None

    def repeat(self, group: _Group, key: tuple[Any, ...]) -> bool:
        done = False
        for op in list(group.waiting.traits):
            if op not in group.single:
                if self.repeated(op, self.index[key]):
                    done = True
                else:
                    group.single.add(op)
        return done

    def decide(self, how: str) -> bool:
        """Settles one group whose nodes look alike, by names, content or file order."""
        for key in list(self.open):
            if self.tried.get(key) == how:
                continue
            if self.settle(key, how):
                return True
            if key in self.open:
                self.tried[key] = how
        return False

    def best(self, op: Op, choices: list[Op], group: _Group, how: str) -> Op | None:
        """The choice that names or content prefer, where no other node has as good a claim."""
        score = self.name_score if how == "name" else self.content_score
        ranked = sorted(((score(op, q), q) for q in choices), key=lambda pair: -pair[0])
        if not ranked or ranked[0][0] < 0.5:
            group.doubts[op, how] = ()  # for good: choices only become fewer
            return None
        best, chosen = ranked[0]
        # Of content, what is left unexplained counts: fine-tuned copies correlate at 0.99.
        below = best - 0.5 if how == "name" else min(best - 1e-6, 1 - 3 * (1 - best))
        tied = [q for found, q in ranked if found > below]
        if len(tied) > 1:
            group.doubts[op, how] = tuple(tied[-2:])
            return None
        rivals = self.named_like(chosen, self.f) if how == "name" else group.waiting.traits
        for other in rivals:
            if other is not op and other in group.waiting.traits and score(other, chosen) > below:
                group.doubts[op, how] = (chosen, other)
                return None
        return chosen

    def repeated(self, op: Op, twins: list[Op]) -> bool:
        """A float node that computes what another does, where the quantized model does it once."""
        for q in twins:
            other = self.taken.get(q)
            if other is None or len(other.inputs) != len(op.inputs):
                continue
            constants = [
                (a, b)
                for a, b in zip(op.inputs, other.inputs, strict=True)
                if a in self.f.constants and a != b
            ]
            values = [
                (constant_value(self.f.model, a), constant_value(self.f.model, b))
                for a, b in constants
            ]
            equal = all(a is not None and b is not None and np.array_equal(a, b) for a, b in values)
            shape = self.f.shape(op.inputs[0]) if op.inputs and op.inputs[0] else None
            if equal and settings_of(op, self.f, shape) == settings_of(other, self.f, shape):
                self.done(op, q)
                self.found.nodes[op.node.name] = q.node.name
                self.found.ops.append((op, q))
                for mine, its in zip(op.outputs, other.outputs, strict=False):
                    target = self.found.folded.get(its, its)
                    if target == its and its in self.values:
                        self.match(mine, self.values[its], again=True)
                    elif mine and target in self.values:
                        self.rectified_repeat(mine, target)
                return True
        return False

    def rectified_repeat(self, root: str, target: str) -> None:
        """The repeated node's own rectifier was folded as the other one's was."""
        reader = self.f.sole_reader(root)
        if reader is not None and reader.kind in RECTIFIERS and target in self.found.rectifiers:
            self.fold(root, reader)
            self.found.rectifiers[reader.outputs[0]] = [reader]
            self.match(reader.outputs[0], self.values[target], again=True)

    # -- pairing -------------------------------------------------------------------------------

    def done(self, op: Op, q: Op) -> None:
        """A float node needs no partner any more."""
        self.pair_of[op] = q
        if op in self.group_of:
            self.groups[self.group_of[op]].waiting.remove(op)

    def take(self, q: Op, op: Op) -> None:
        """A node of the quantized model is no partner for others any more."""
        self.taken[q] = op
        group = self.groups.get(q.key)
        if group is not None:
            group.free.remove(q)

    def pair(self, op: Op, q: Op, order: Permutation | None = None) -> None:
        """Pairs two nodes, and those of the same group that this leaves with one partner each."""
        self.join(op, q, order)
        key = self.group_of.get(op)
        if key in self.open:
            self.settle(key, "")

    def join(self, op: Op, q: Op, order: Permutation | None = None) -> None:
        self.done(op, q)
        self.take(q, op)
        self.found.nodes[op.node.name] = q.node.name
        self.found.ops.append((op, q))
        key = self.group_of.get(op)
        if key is not None:
            self.tried.pop(key, None)
        if op not in self.reshaped:
            self.unify_operands(op, q, order)
        for at, (mine, its) in enumerate(zip(op.outputs, q.outputs, strict=False)):
            if not mine or not its or mine in self.found.folded:
                continue
            if at == 0 and order is None:
                mine, its = self.settle_folds(op, q, mine, its)
            self.match(mine, Twin(its, order))
            for copy in self.copies.pop(mine, ()):
                self.same_as(copy, mine, Twin(its, order))

    def unify_operands(self, op: Op, q: Op, order: Permutation | None) -> None:
        if order is not None:
            if op.kind in COMMUTATIVE or op.kind == "Reshape" or len(op.data) != len(q.data):
                return
            for a, b in zip(op.data, q.data, strict=True):
                if a not in ("=", "") and b not in ("=", ""):
                    self.match(a, Twin(b, order))
            return
        if op.kind == "If":
            pairs = [
                [v.root[c] for c in o.node.captured if c in v.root]
                for o, v in ((op, self.f), (q, self.q))
            ]
            if len(pairs[0]) == len(pairs[1]):
                self.unify(op, *pairs)
        if op.kind in COMMUTATIVE:
            mine, its = ([d for d in o.data if d not in ("=", "")] for o in (op, q))
            self.unify(op, mine, its)
            return
        for a, b in zip(op.inputs, q.inputs, strict=False):
            if a and b and a not in self.f.constants and b not in self.q.constants:
                self.match(a, Twin(self.before_movement(a, b)))

    def unify(self, op: Op, mine: list[str], its: list[str]) -> None:
        """Matches the operands of two commutative nodes as far as edges tell."""
        mine, its = list(mine), list(its)
        for a in list(mine):
            if a in self.values and self.values[a].root in its:
                its.remove(self.values[a].root)
                mine.remove(a)
        if len(mine) == len(its) == 1:
            self.match(mine[0], Twin(its[0]))
            return
        alike: tuple[dict[Any, list[str]], ...] = ({}, {})
        for a in mine:
            alike[0].setdefault(self.made(a), []).append(a)
        for b in its:
            alike[1].setdefault(self.made_there(b), []).append(b)
        for mark, rows in alike[0].items():
            fits = [other for other in alike[1] if self.makings_agree(mark, other)]
            if len(rows) > 1 or len(fits) != 1 or len(alike[1][fits[0]]) > 1:
                continue
            if sum(self.makings_agree(other, fits[0]) for other in alike[0]) == 1:
                a, b = rows[0], alike[1][fits[0]][0]
                self.match(a, Twin(b))
                if a in self.values:
                    mine.remove(a)
                    its.remove(b)
        if len(mine) > 1 and len(its) > 1:
            self.later[op] = (mine, its)
            for root in mine:
                self.waits.setdefault(root, {})[op] = None

    def retry_later(self, root: str) -> None:
        for op in self.waits.pop(root, ()):
            if op in self.later:
                self.unify(op, *self.later.pop(op))

    def unify_later(self, how: str) -> bool:
        for mine, its in self.later.values():
            for at, a in enumerate(mine):
                if a in self.values:
                    continue
                if how == "order":
                    chosen = its[at] if at < len(its) else None
                else:
                    named = {self.q.by_name.get(name) for name in self.names_of(a)}
                    chosen = next((b for b in its if b in named), None)
                if chosen is not None:
                    self.match(a, Twin(chosen))
                    if a in self.values:
                        return True
        return False

    # -- folds ---------------------------------------------------------------------------------

    def fold(self, root: str, into: Op) -> None:
        self.found.folded[root] = into.outputs[0]
        self.values.pop(root, None)
        self.done(into, self.pair_of.get(into, into))

    def same_as(self, op: Op, root: str, twin: Twin) -> None:
        """A float node without a twin whose result equals a matched value: readers read that."""
        self.done(op, op)
        self.found.folded[op.outputs[0]] = root
        self.found.same.add(op.outputs[0])
        self.know(op.outputs[0], twin)

    def settle_folds(self, op: Op, q: Op, mine: str, its: str) -> tuple[str, str]:
        """Which value of the float model a new pair's result really is, and of the quantized one.

        What follows the float node may be a part of the quantized one (a normalization, a bias, a
        rectifier), and the other way round (a Gemm's bias as an Add).
        """
        if op.kind in HEAVY and _has_bias(op) and not _has_bias(q):
            reader = self.q.sole_reader(its)
            if reader is not None and reader.kind == "Add" and "=" in reader.data:
                self.found.biases[op.node.name] = reader
                self.take(reader, op)
                its = reader.outputs[0]
        after, reader = self.f.sole_reader(mine), self.q.sole_reader(its)
        normal = reader is not None and reader.kind == "BatchNormalization" and op.kind in HEAVY
        if reader is not None and normal and (after is None or after.kind != reader.kind):
            self.found.apart[op.node.name] = reader
            self.take(reader, op)
            its = reader.outputs[0]
        rectifiers: list[Op] = []
        while (reader := self.following(mine)) is not None and reader not in self.pair_of:
            if rectifiers and reader.kind not in RECTIFIERS:
                break
            if not self.folds_into(op, q, reader, its):
                break
            copies = [r for r in self.f.readers[mine] if r is not reader]
            self.fold(mine, reader)
            mine = reader.outputs[0]
            if reader.kind in RECTIFIERS:
                rectifiers.append(reader)
                if copies:
                    self.copies[mine] = copies
                if not q.activation:
                    self.found.rectifiers[mine] = rectifiers
                continue
            self.found.folds.setdefault(op.node.name, []).append(reader)
        if op.kind == "Reshape":
            a, b = reshapes(mine, self.f), reshapes(its, self.q)
            if len(a) != len(b):
                # One Reshape in two steps: only where they end is the same.
                for root, into in pairwise(a):
                    self.fold(root, self.f.maker[into])
                return a[-1], b[-1]
        wide, flat = self.f.shape(mine), self.q.shape(its)
        if op.kind == "MatMul" and wide is not None and flat is not None and len(wide) != len(flat):
            ends = [r for r in self.q.readers.get(its, ()) if r.kind == "Reshape"]
            after = self.f.sole_reader(mine)
            for reader in ends:
                there = self.q.shape(reader.outputs[0])
                if there in (wide, None):
                    return mine, reader.outputs[0]
                if after is None or after.kind != "Reshape":
                    continue
                free = self.pair_of.get(after, reader) is reader
                if free and dims_agree(self.f.shape(after.outputs[0]), there):
                    self.fold(mine, after)
                    self.take(reader, after)
                    return after.outputs[0], reader.outputs[0]
        return mine, its

    def following(self, root: str) -> Op | None:
        """The only node that reads a value, or the first of rectifiers that are the same."""
        sole = self.f.sole_reader(root)
        if sole is not None or root in self.f.outputs:
            return sole
        readers = self.f.readers.get(root, [])
        same = {(r.kind, r.inputs, r.hard) for r in readers}
        return readers[0] if len(same) == 1 and readers[0].kind in RECTIFIERS else None

    def folds_into(self, op: Op, q: Op, reader: Op, its: str) -> bool:
        """`reader`, which follows float node `op`, has no node of its own after `q`."""
        like = [r for r in self.q.readers.get(its, ()) if r.kind == reader.kind]
        if reader.kind in RECTIFIERS:
            # Of several in a row, the first ones are folded and the last ones are left.
            mine, left = self.rectified(self.f, reader.inputs[0]), self.rectified(self.q, its)
            if len(mine) > len(left) and mine[len(mine) - len(left) :] == left:
                like = []
            return not like and (bool(q.activation) or its in self.quantized)
        if op.kind not in HEAVY:
            return False
        if not self.linear(reader) or "=" not in op.data:
            return False  # the product of two computed values has no constant to take it up
        apart = [r for r in self.q.readers.get(its, ()) if self.linear(r)]
        if apart and self.counted(reader) <= self.counted(apart[0]):
            return False  # the same, spelled in another way
        if reader.kind == "BatchNormalization":
            return not like
        late_bias = reader.kind == "Add" and _has_bias(q) and not _has_bias(op)
        constant = next(i for i in reader.inputs if i in self.f.constants)
        shape = self.f.shape(constant)
        if shape is None or math.prod(d for d in shape if isinstance(d, int)) == 1:
            late_bias = False
        if late_bias and op.node.name not in self.found.folds:
            return True
        return not any("=" in r.data for r in like)

    @staticmethod
    def rectified(view: View, root: str) -> list[str]:
        """The classes of the rectifiers in a row, eight at most, that a value goes through."""
        found: list[str] = []
        while len(found) < 8:
            readers = [r for r in view.readers.get(root, ()) if r.kind in RECTIFIERS]
            if not readers:
                break
            found.append(readers[0].kind)
            root = readers[0].outputs[0]
        return found

    @staticmethod
    def linear(op: Op) -> bool:
        """A constant times, plus, minus or divides: it may become a part of the node before it."""
        if op.kind == "Div":
            return op.data[1:] == ("=",)
        return op.kind == "BatchNormalization" or (
            op.kind in ("Add", "Sub", "Mul") and "=" in op.data
        )

    def counted(self, op: Op) -> int:
        """How many nodes in a row, from this one on, could be folded."""
        view, found = (self.f, 1) if self.f.maker.get(op.outputs[0]) is op else (self.q, 1)
        while (following := view.sole_reader(op.outputs[0])) is not None and self.linear(following):
            op, found = following, found + 1
        return found

    def backward(self, root: str) -> None:
        """Pairs the makers of a matched value."""
        twin = self.values[root]
        op, q = self.f.maker.get(root), self.q.maker.get(twin.root)
        if op is None or q is None or op in self.pair_of:
            return
        order = twin.permutation
        while q is not None and q.kind == "Transpose" != op.kind:
            own = perm_of(q, self.q)
            if own is None or (order is not None and len(order) != len(own)):
                return
            order = compose(own, order)
            q = self.q.maker.get(q.inputs[0])
        if order is None and q is not None and q.kind != op.kind:
            q = self.q.maker.get(self.before_movement(root, q.outputs[0]), q)
        if q is None or q in self.taken:
            return
        if order is not None:
            if op.kind == q.kind and op.hard == q.hard and self.pattern(op) == self.pattern(q):
                carried = self.carried(op, q, order)
                if carried is not False and carried == order:
                    self.pair(op, q, order)
            return
        if op.kind == q.kind and op.hard == q.hard:
            if self.pattern(op) == self.pattern(q) and self.compatible(op, q):
                self.pair(op, q)
            return
        chain: list[tuple[str, Op]] = []
        at, source = op, root
        while at.kind != q.kind:
            foldable = self.linear(at)
            if at.kind in RECTIFIERS and all(into.kind in RECTIFIERS for _, into in chain):
                foldable = twin.root in self.quantized or bool(q.activation)
            elif q.kind not in HEAVY:
                foldable = False
            source = next((i for i in at.inputs if i and i not in self.f.constants), "")
            before = self.f.maker.get(source)
            if not foldable or before is None or before in self.pair_of or source in self.values:
                return
            if at.kind not in RECTIFIERS and before.kind in HEAVY and "=" not in before.data:
                return
            if self.f.sole_reader(source) is not at:
                return
            chain.append((source, at))
            at = before
        if at.hard != q.hard or not self.compatible(at, q):
            return
        rectifiers = [into for _, into in reversed(chain) if into.kind in RECTIFIERS]
        if rectifiers and not q.activation:
            self.found.rectifiers[root] = rectifiers
        for folded, into in chain:
            self.fold(folded, into)
            if into.kind not in RECTIFIERS:
                self.found.folds.setdefault(at.node.name, []).insert(0, into)
        self.pair(at, q)

    # -- where edges end -----------------------------------------------------------------------

    def anchor_names(self) -> bool:
        """Pairs nodes out of reach whose names and classes agree and whose edges do not object."""
        if self.named is None:
            self.named = list(self.proposals())
        self.named = [(op, q) for op, q in self.named if op not in self.pair_of]
        progress = False
        for op, q in self.named:
            if op in self.pair_of or q in self.taken or op.outputs[0] in self.found.folded:
                continue
            if not self.objected(op, q):
                self.pair(op, q)
                self.spread()
                progress = True
        return progress

    def proposals(self) -> Iterator[tuple[Op, Op]]:
        """Nodes of one class whose names agree and of which nothing that is known contradicts."""
        for op in self.f.ops:
            if not op.outputs:
                continue
            named = [self.q.by_name.get(n) for n in self.names_of(op.outputs[0])]
            rows = [self.by_node.get(op.node.name), *(self.q.maker.get(n) for n in named if n)]
            for q in dict.fromkeys(rows):
                if q is None or q.kind != op.kind or q.hard != op.hard:
                    continue
                if self.pattern(op) != self.pattern(q) or not self.compatible(op, q):
                    continue
                if self.name_score(op, q) >= 1:
                    yield op, q

    def objected(self, op: Op, q: Op) -> bool:
        """An operand's twin is known and is none of the other node's operands."""
        there = {
            alias for d in q.data if d not in ("=", "") for alias, _ in self.transposed(d, None)
        }
        known = [self.values[d].root for d in op.data if d in self.values]
        if any(k not in there for k in known):
            return True
        output = self.values.get(op.outputs[0])
        return output is not None and output.root != q.outputs[0]

    def bridge(self) -> bool:
        """Steps over nodes that only move values and that one of the models does not have."""
        return self.bridge_down() or self.bridge_up()

    def bridge_up(self) -> bool:
        """Matches what two regions of moved values come from, where they are built otherwise."""
        for root in list(self.moved):
            twin = self.values.get(root)
            op, q = self.f.maker[root], self.q.maker.get(twin.root) if twin is not None else None
            if twin is None or op in self.pair_of:
                del self.moved[root]  # folded or paired, for good
                continue
            if q is None or q in self.taken:
                continue
            a, b = origin(root, self.f), origin(twin.root, self.q)
            if a == root or a in self.values or a in self.found.folded or not self.makers_fit(a, b):
                continue
            if all(t.root != b for t in self.values.values()):
                self.match(a, Twin(b))
                if a in self.values:
                    return True
        return False

    def bridge_down(self) -> bool:
        self.movers = [op for op in self.movers if op not in self.pair_of]
        for op in self.movers:
            source = op.inputs[0] if op.inputs else ""
            if source not in self.values or len([d for d in op.data if d not in ("=", "")]) != 1:
                continue
            twin = self.values[source]
            before, after = self.f.shape(source), self.f.shape(op.outputs[0])
            unchanged = before is not None and before == after and None not in before
            if op.kind == "Slice":
                unchanged = slices_of(op, self.f, before) == ()
            if op.outputs[0] in self.values or op.outputs[0] in self.found.folded:
                continue
            if unchanged and op.kind != "Transpose":
                self.same_as(op, source, twin)
                return True
        return False
