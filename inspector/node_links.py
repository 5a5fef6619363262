"""Which node of one model belongs to which of the other.

`matching` says which tensors are the same; here every node of both files, bodies included, gets
the nodes of the other file that it stands for. Nodes that compute are linked first: by the graphs'
alignment, by the tensors they compute, by what was fused into what. All that only stores, scales,
converts or moves values (QuantizeLinear and DequantizeLinear, the nodes around an integer product,
inserted Transposes, constants) then goes to the node it serves. Links are symmetric. Runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inspector.folding import DQ, Q, folded_names
from inspector.matching import ActivationPair, Matching
from inspector.model import Body, Graph, Model, Node
from inspector.skeleton import names_in_file
from inspector.structure import MOVEMENT

# They serve who reads them.
_FOR_READERS = frozenset({"Constant", "DynamicQuantizeLinear"})
# They hand on what they read, stored in another way or moved.
_STORAGE = frozenset({Q, DQ, "Identity", "Dropout", "Cast", "CastLike"})
_MOVING = MOVEMENT | {"Flatten", "Squeeze", "Unsqueeze"}
# How well a link is founded; the best comes first.
_ALIGNED, _COMPUTES, _FUSED, _SERVES = range(4)

_KINDS = {
    "QLinearConv": "Conv", "ConvInteger": "Conv", "FusedConv": "Conv", "QGemm": "Gemm",
    "FusedGemm": "Gemm", "QLinearMatMul": "MatMul", "MatMulInteger": "MatMul",
    "MatMulIntegerToFloat": "MatMul", "DynamicQuantizeMatMul": "MatMul", "MatMulNBits": "MatMul",
    "FusedMatMul": "MatMul", "GatherBlockQuantized": "Gather", "DynamicQuantizeLSTM": "LSTM",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeLink:
    """One node and what it belongs to.

    Attributes:
        op_type: the node's.
        tensor: the compared float tensor it stands for, "" for none. A fused node stands for the
            tensor it became a part of; a Q or DQ for the one it quantizes.
        scope: path of the body it lies in, "" for the main graph.
        partners: nodes of the other model, the one to look at first; () for none.
        serves: it only serves its partners: it stores, scales, converts or moves values for them.
        sources: nodes of the same model (and graph) whose tensors it reads.
        outputs: names of the tensors it computes.
    """

    op_type: str
    tensor: str = ""
    scope: str = ""
    partners: tuple[str, ...] = ()
    serves: bool = False
    sources: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The record with lists for tuples."""
        return {
            "op_type": self.op_type,
            "tensor": self.tensor,
            "scope": self.scope,
            "partners": list(self.partners),
            "serves": self.serves,
            "sources": list(self.sources),
            "outputs": list(self.outputs),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeLinks:
    """Every node of two models, in file order, main graph first; names as in their skeletons.

    Attributes:
        float_nodes: of the float model.
        quantized_nodes: of the quantized model.
    """

    float_nodes: Mapping[str, NodeLink]
    quantized_nodes: Mapping[str, NodeLink]

    def to_json(self) -> dict[str, Any]:
        """``{"float": {node: link}, "quantized": {node: link}}``, see `NodeLink`."""
        return {
            "float": {name: link.to_json() for name, link in self.float_nodes.items()},
            "quantized": {name: link.to_json() for name, link in self.quantized_nodes.items()},
        }


def only_nodes(
    links: Mapping[str, Mapping[str, Any]],
    float_names: Collection[str],
    quantized_names: Collection[str],
) -> dict[str, dict[str, Any]]:
    """Links as JSON of these nodes alone; what leads out of them is left out of each."""
    kept = {"float": set(float_names), "quantized": set(quantized_names)}
    found: dict[str, dict[str, Any]] = {}
    for side, other in (("float", "quantized"), ("quantized", "float")):
        found[side] = {
            name: {
                **link,
                "partners": [p for p in link["partners"] if p in kept[other]],
                "sources": [s for s in link["sources"] if s in kept[side]],
            }
            for name, link in links[side].items()
            if name in kept[side]
        }
    return found


def twins_around(
    links: Mapping[str, Mapping[str, Any]], side: str, names: Collection[str]
) -> set[str]:
    """The partners of some nodes of one side, and what has no partner between two of those.

    Args:
        links: as JSON.
        side: "float" or "quantized", of which `names` are.
        names: the nodes.
    """
    other = links["quantized" if side == "float" else "float"]
    found = {p for name in names for p in links[side][name]["partners"]}
    readers: dict[str, list[str]] = {}
    for name, link in other.items():
        for source in link["sources"]:
            readers.setdefault(source, []).append(name)

    def lone(start: Iterable[str], following: Callable[[str], Iterable[str]]) -> set[str]:
        seen: set[str] = set()
        waiting = list(start)
        while waiting:
            for name in following(waiting.pop()):
                if name not in seen and not other[name]["partners"]:
                    seen.add(name)
                    waiting.append(name)
        return seen

    behind = lone(found, lambda name: readers.get(name, ()))
    before = lone(found, lambda name: other[name]["sources"])
    return found | (behind & before)


def link_nodes(float_model: Model, quantized_model: Model, matching: Matching) -> NodeLinks:
    """The partners of every node of both models.

    A node that computes goes to the node of the same operator: the one that the alignment of the
    graphs found, that computes the compared tensor (before its Q where it has one), or into which
    it was fused (a folded Relu, Clip or BatchNormalization; Identity and Dropout). In bodies nodes
    go together by the weights they read, by their names, and where that is unambiguous by order.

    A Q or DQ of an activation goes to the node that computes the activation, one of a graph input
    to all nodes that read the input, a DQ of a constant to the node that reads it; so do all other
    nodes that only serve. Where a node has several partners, one that does not only serve comes
    first, then one of the same op type.

    Args:
        float_model: the float model.
        quantized_model: its quantized twin.
        matching: of the two.
    """
    linker = _Linker(float_model, quantized_model, matching)
    linker.main_graphs()
    linker.bodies()
    linker.served()
    return linker.result()


class _Side:
    """One graph of a model: the main graph or a body, with its nodes by what they are for."""

    def __init__(self, graph: Graph, names: Mapping[str, str], scope: str = "") -> None:
        self.graph = graph
        self.names = names  # in the skeleton, by own name
        self.scope = scope
        self.constants = folded_names(graph)
        self.scales: set[str] = set()  # computed at run time: scales and zero points
        self.scale_nodes: set[str] = set()
        self.scaling: set[str] = set()
        for node in graph.nodes:
            self._see(node)

    def _see(self, node: Node) -> None:
        """Finds scales that are computed at run time, and the products with them."""
        if node.op_type == "DynamicQuantizeLinear":
            self.scales.update(node.outputs[1:])
            return
        computed = self.computed(node)
        known = [name for name in computed if name in self.scales]
        if not known or node.op_type in ("MatMulInteger", "ConvInteger"):
            return
        if len(known) == len(computed):
            self.scales.update(node.outputs)
            self.scale_nodes.add(node.name)
        elif node.op_type == "Mul":
            self.scaling.add(node.name)

    def computed(self, node: Node) -> list[str]:
        """What it reads that is no constant."""
        return [n for n in (*node.inputs, *node.captured) if n and n not in self.constants]

    def for_readers(self, node: Node) -> bool:
        """It serves who reads it: constants and what is computed from them, scales."""
        fixed = any(o in self.constants for o in node.outputs)
        return node.op_type in _FOR_READERS or fixed or node.name in self.scale_nodes

    def stores(self, node: Node) -> bool:
        """It hands on what it reads, in another type or unit."""
        return not self.for_readers(node) and (
            node.op_type in _STORAGE or node.name in self.scaling
        )

    def moves(self, node: Node) -> bool:
        return not self.for_readers(node) and node.op_type in _MOVING

    def serves(self, node: Node) -> bool:
        """It may serve another node instead of computing something."""
        return self.for_readers(node) or self.stores(node) or self.moves(node)

    def handed_on(self, node: Node) -> str:
        """The tensor that a node which stores or moves hands on, "" for none."""
        computed = [name for name in self.computed(node) if name not in self.scales]
        return next(iter(computed), "")

    def maker(self, tensor: str, through: Callable[[Node], bool]) -> tuple[Node | None, str]:
        """The node behind a tensor, or the graph input, seen through nodes of a kind."""
        for _ in range(len(self.graph.nodes) + 1):
            node = self.graph.producers.get(tensor)
            if node is None or not through(node):
                return node, tensor
            tensor = self.handed_on(node)
        return None, ""

    def origins(self, linked: Collection[str]) -> dict[str, tuple[Node | None, str]]:
        """What the nodes that hand on come from, seen through those that are not linked.

        Args:
            linked: names (of the skeleton) of the nodes that have partners.

        Returns:
            By own name, the node behind it and its tensor; None where that is no node's.
        """
        found: dict[str, tuple[Node | None, str]] = {}
        for node in self.graph.nodes:
            if self.names[node.name] in linked or not (self.stores(node) or self.moves(node)):
                continue
            tensor = self.handed_on(node)
            maker = self.graph.producers.get(tensor)
            known = found.get(maker.name) if maker is not None else None
            found[node.name] = known or (maker, tensor)
        return found

    def readers(self, node: Node, through: Callable[[Node], bool]) -> list[Node]:
        """The nodes that read a node's tensors, seen through nodes of a kind."""
        found: dict[str, Node] = {}
        seen, waiting = {node.name}, [node]
        while waiting:
            for name in waiting.pop(0).outputs:
                for reader in self.graph.consumers.get(name, ()):
                    if reader.name in seen:
                        continue
                    seen.add(reader.name)
                    if through(reader):
                        waiting.append(reader)
                    else:
                        found[reader.name] = reader
        return list(found.values())


class _Linker:
    def __init__(self, float_model: Model, quantized_model: Model, matching: Matching) -> None:
        self.matching = matching
        self.f, self.q = _sides(float_model), _sides(quantized_model)
        # Rank of a link, by (float node, quantized node) as the skeletons call them.
        self.links: dict[tuple[str, str], int] = {}
        self.float_tensor: dict[str, str] = {}
        self.quantized_tensor: dict[str, str] = {}
        self.serving: tuple[set[str], set[str]] = (set(), set())
        self.float_model, self.quantized_model = float_model, quantized_model

    def link(self, f: str, q: str, rank: int) -> None:
        self.links[f, q] = min(rank, self.links.get((f, q), rank))

    # -- nodes that compute ------------------------------------------------------------------------

    def main_graphs(self) -> None:
        f, q = self.f[0], self.q[0]
        for one, other in self.matching.node_pairs.items():
            if one in f.names and other in q.names:
                self.link(f.names[one], q.names[other], _ALIGNED)
        aligned = {mine for mine, _ in self.links}
        pairs = {pair.name: pair for pair in self.matching.activations}
        for pair in self.matching.activations:
            self.by_tensor(pair, aligned)
        for lone in self.matching.unmatched:
            node = f.graph.producers.get(lone.name) if lone.model == "float" else None
            if node is None or lone.fused_into not in pairs:
                continue
            self.float_tensor.setdefault(f.names[node.name], lone.fused_into)
            its = self.computing(pairs[lone.fused_into], node)
            if its is not None and f.names[node.name] not in aligned:
                self.link(f.names[node.name], q.names[its.name], _FUSED)

    def by_tensor(self, pair: ActivationPair, aligned: Collection[str]) -> None:
        """Links the nodes that compute a compared tensor, and says who stands for it."""
        f, q = self.f[0], self.q[0]
        for tensor in (pair.before, pair.after):
            for node in self.chain(tensor):
                self.quantized_tensor.setdefault(q.names[node.name], pair.name)
        if pair.node is None:
            return
        mine = f.names[pair.node.name]
        self.float_tensor.setdefault(mine, pair.name)
        its = self.computing(pair, pair.node)
        if its is None:
            return
        self.quantized_tensor.setdefault(q.names[its.name], pair.name)
        # What only scales or moves behind the node that is known already serves that one.
        beside = (q.stores(its) or q.moves(its)) and its.op_type != pair.node.op_type
        if not (mine in aligned and beside):
            self.link(mine, q.names[its.name], _COMPUTES)

    def computing(self, pair: ActivationPair, node: Node) -> Node | None:
        """The quantized node that computes a pair's tensor: behind Q, DQ and what only converts.

        A node of the same op type as the float one is not looked through.
        """
        q = self.q[0]
        tensor = pair.before if pair.before is not None else pair.after
        return q.maker(tensor, lambda its: q.stores(its) and its.op_type != node.op_type)[0]

    def chain(self, tensor: str | None) -> Iterator[Node]:
        """The Q, DQ and converting nodes that give a tensor of the quantized model, and its Q."""
        q = self.q[0]
        for reader in q.graph.consumers.get(tensor or "", ()):
            if reader.op_type == Q and reader.inputs[0] == tensor:
                yield reader
        for _ in range(len(q.graph.nodes)):
            node = q.graph.producers.get(tensor or "")
            if node is None or not q.stores(node):
                return
            yield node
            tensor = q.handed_on(node)

    # -- bodies ------------------------------------------------------------------------------------

    def bodies(self) -> None:
        """Links nodes in bodies of nodes that are linked, from the outside inwards."""
        for side in self.q[1:]:
            twin = self.twin_body(side)
            if twin is not None:
                self.in_body(twin, side)

    def twin_body(self, side: _Side) -> _Side | None:
        body = side.graph
        assert isinstance(body, Body)
        around = next(s for s in self.q if s.graph is body.outer)
        owner = around.names[body.owner]
        attribute = body.path.rsplit("/", 1)[-1]
        mine = [f for f, q in sorted(self.links, key=lambda k: self.links[k]) if q == owner]
        for twin in self.f[1:]:
            other = twin.graph
            assert isinstance(other, Body)
            outside = next(s for s in self.f if s.graph is other.outer)
            if outside.names[other.owner] in mine[:1] and (
                other.path.rsplit("/", 1)[-1] == attribute
            ):
                return twin
        return None

    def in_body(self, f: _Side, q: _Side) -> None:
        left = {n.name: n for n in f.graph.nodes if not f.for_readers(n) and not f.stores(n)}
        right = {n.name: n for n in q.graph.nodes if not q.for_readers(n) and not q.stores(n)}

        def take(mine: Node, its: Node, rank: int) -> None:
            free = left.get(mine.name) is mine and right.get(its.name) is its
            if free and _kind(mine) == _kind(its):
                del left[mine.name], right[its.name]
                self.link(f.names[mine.name], q.names[its.name], rank)

        for mine, its in self.same_weight(f, q):
            take(mine, its, _ALIGNED)
        for mine in list(left.values()):
            if mine.name in right:
                take(mine, right[mine.name], _ALIGNED)
        made = {o: node for node in right.values() for o in node.outputs if o}
        for mine in list(left.values()):
            same = next((made[o] for o in mine.outputs if o in made), None)
            if same is not None:
                take(mine, same, _COMPUTES)
        for mine, its in _in_order(list(left.values()), list(right.values())):
            take(mine, its, _COMPUTES)
        # What converts in both.
        for node in f.graph.nodes:
            other = q.graph.node_by_name.get(node.name)
            if other is not None and f.stores(node) and other.op_type == node.op_type:
                self.link(f.names[node.name], q.names[other.name], _COMPUTES)

    def same_weight(self, f: _Side, q: _Side) -> Iterator[tuple[Node, Node]]:
        """Nodes of two bodies that read the same weight, where the matching found it."""
        for pair in self.matching.weights:
            if pair.scope != q.scope or f.graph.node_by_name.get(pair.node.name) is not pair.node:
                continue
            names = [pair.quantized_name]
            if pair.quantized is not None:
                names += [n for n in (pair.quantized.after, pair.quantized.quantized) if n]
            readers = [r for n in names for r in q.graph.consumers.get(n, ())]
            readers = [r for r in readers if not q.stores(r) and not q.for_readers(r)]
            if len({r.name for r in readers}) == 1:
                yield pair.node, readers[0]

    # -- nodes that serve --------------------------------------------------------------------------

    def served(self) -> None:
        """Sends every node without a partner that only serves to the partners of whom it serves."""
        direct: tuple[dict[str, list[str]], dict[str, list[str]]] = ({}, {})
        for f, q in sorted(self.links, key=lambda k: self.links[k]):
            direct[0].setdefault(f, []).append(q)
            direct[1].setdefault(q, []).append(f)
        found: list[tuple[str, str]] = []
        for number, sides in enumerate((self.f, self.q)):
            for side in sides:
                origins = side.origins(direct[number])
                targets: dict[str, list[str]] = {}
                for node in reversed(side.graph.nodes):  # who reads it is settled before it
                    name = side.names[node.name]
                    if name in direct[number] or not side.serves(node):
                        continue
                    partners: list[str] = []
                    if node.name in origins:
                        maker, tensor = origins[node.name]
                        if maker is not None:
                            partners = list(direct[number].get(side.names[maker.name], ()))
                        elif not side.scope:
                            partners = self.of_input(tensor, number)
                    targets[name] = partners or _of_readers(side, node, direct[number], targets)
                    if targets[name] or not side.moves(node):
                        self.serving[number].add(name)
                    for partner in targets[name]:
                        found.append((name, partner) if number == 0 else (partner, name))
        for f, q in found:
            self.link(f, q, _SERVES)

    def of_input(self, tensor: str, number: int) -> list[str]:
        """The other model's nodes that read a graph input."""
        inputs = self.matching.inputs
        if number:
            inputs = {its: mine for mine, its in inputs.items()}
        other = (self.q, self.f)[number][0]
        readers = other.graph.consumers.get(inputs.get(tensor, ""), ())
        found: dict[str, None] = {}
        for reader in readers:
            nodes = [reader]
            if other.stores(reader) and number == 0:
                nodes = other.readers(reader, other.stores)
            found.update(dict.fromkeys(other.names[n.name] for n in nodes))
        return list(found)

    # -- all of it ---------------------------------------------------------------------------------

    def result(self) -> NodeLinks:
        return NodeLinks(
            float_nodes=self.records(0, self.f, self.float_tensor),
            quantized_nodes=self.records(1, self.q, self.quantized_tensor),
        )

    def records(
        self, number: int, sides: Sequence[_Side], tensors: Mapping[str, str]
    ) -> dict[str, NodeLink]:
        partners: dict[str, list[tuple[str, int]]] = {}
        for (f, q), rank in self.links.items():
            mine, its = ((f, q), (q, f))[number]
            partners.setdefault(mine, []).append((its, rank))
        kinds = {
            other.names[node.name]: node
            for other in (self.q, self.f)[number]
            for node in other.graph.nodes
        }
        found = {}
        for side in sides:
            for node in side.graph.nodes:
                name = side.names[node.name]

                def worth(link: tuple[str, int], mine: Node = node) -> tuple[bool, bool, bool, int]:
                    other, rank = kinds[link[0]], link[1]
                    alike = _kind(other) == _kind(mine)
                    return rank == _SERVES, other.op_type != mine.op_type, not alike, rank

                ordered = [its for its, _ in sorted(partners.get(name, ()), key=worth)]
                sources = (side.graph.producers.get(n) for n in (*node.inputs, *node.captured))
                own = dict.fromkeys(side.names[s.name] for s in sources if s is not None)
                serves = name in self.serving[number]
                tensor = tensors.get(name, "")
                if not tensor and ordered and serves and number == 1:
                    tensor = self.float_tensor.get(ordered[0], "")
                found[name] = NodeLink(
                    op_type=node.op_type,
                    tensor=tensor,
                    scope=side.scope,
                    partners=tuple(ordered),
                    serves=serves,
                    sources=tuple(own),
                    outputs=tuple(o for o in node.outputs if o),
                )
        return found


def _of_readers(
    side: _Side,
    node: Node,
    direct: Mapping[str, Sequence[str]],
    targets: Mapping[str, Sequence[str]],
) -> list[str]:
    """The partners of those who read a node's tensors.

    A constant belongs to its reader, not to what was fused into that one.

    Args:
        side: the graph.
        node: the node.
        direct: partners of the nodes that have them.
        targets: those of the nodes behind it that serve as well.
    """
    readers = (r for o in node.outputs for r in side.graph.consumers.get(o, ()))
    names = dict.fromkeys(side.names[reader.name] for reader in readers)
    served = (direct.get(name, ())[:1] or targets.get(name, ()) for name in names)
    return list(dict.fromkeys(partner for each in served for partner in each))


def _sides(model: Model) -> list[_Side]:
    main, *inner = names_in_file(model)
    sides = [_Side(model, main)]
    for body, names in zip(model.bodies, inner, strict=True):
        sides.append(_Side(body, names, body.path))
    return sides


def _kind(node: Node) -> str:
    """The operator that a node is, also where it computes in integers."""
    stripped = node.op_type.removeprefix("QLinear")
    return _KINDS.get(node.op_type) or _KINDS.get(stripped, stripped)


def _in_order(left: Sequence[Node], right: Sequence[Node]) -> Iterator[tuple[Node, Node]]:
    """Nodes of the same operator in the same order, where both bodies have as many of it left."""
    for kind in dict.fromkeys(_kind(node) for node in left):
        mine = [n for n in left if _kind(n) == kind]
        its = [n for n in right if _kind(n) == kind]
        if len(mine) == len(its):
            yield from zip(mine, its, strict=True)
