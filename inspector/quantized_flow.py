"""How quantized values flow through a file: who made a pair's integers, who computes with them.

From that follows which pairs of Q and DQ nobody wants any more once nodes are left in float. Apart
from `scheme`, which reads the parameters of each pair by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from functools import cached_property

from inspector.folding import folded_names
from inspector.matching import Matching
from inspector.model import FLOAT_DTYPES, Model, Node
from inspector.scheme import BETWEEN, DQ, QUANTIZATION_OPS, Q

DYNAMIC_QUANTIZER = "DynamicQuantizeLinear"
_CARRIERS = frozenset(
    {"Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "MaxPool", "Pad",
     "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "DepthToSpace",
     "SpaceToDepth", "Dropout"}
)  # fmt: skip
# Never ask for a pair themselves; they are quantized where their input is.
_FOLLOWERS = _CARRIERS | {"Relu", "Clip", "AveragePool", "Resize", "TopK", "Where", "Cast"}


def carries(node: Node) -> bool:
    """It hands its first input on; behind it a value is as quantized as it was."""
    return (
        node.op_type in _CARRIERS
        and not node.captured
        and bool(node.inputs)
        and (node.op_type != "Dropout" or len(node.inputs) < 3)
    )


class QuantizedFlow:
    """Look-ups in one quantized file; nothing of it is changed.

    Args:
        quantized: the file.
        matching: of the float model and the file.
        weights: names of its constants that were matched.

    Attributes:
        rectifiers: the float model's Relu and Clip that were folded into a Q, by the tensor that Q
            reads and by the integers it gives.
        real: by integer tensor that a node writes without a Q, the same values as float; whoever
            makes such tensors puts them in.
    """

    def __init__(self, quantized: Model, matching: Matching, weights: Collection[str]) -> None:
        self.q = quantized
        self.producers, self.consumers = quantized.producers, quantized.consumers
        self.constants = folded_names(quantized)
        self.weights = weights
        self.rectifiers = self._rectifiers(matching)
        self.real: dict[str, str] = {}
        self._asked: dict[str, frozenset[str]] = {}
        self._quantizes: dict[str, bool] = {}

    def _rectifiers(self, matching: Matching) -> dict[str, tuple[Node, ...]]:
        found: dict[str, tuple[Node, ...]] = {}
        for pair in matching.activations:
            if not pair.rectifiers:
                continue
            if pair.before:
                found[pair.before] = pair.rectifiers
            if pair.integers:
                found[pair.after] = pair.rectifiers
            elif (maker := self.producers.get(pair.after)) is not None and maker.op_type == DQ:
                found[maker.inputs[0]] = pair.rectifiers
        return found

    def origin(self, codes: str) -> str:
        """The integers that these were moved from, as Q or an integer operator wrote them."""
        while (node := self.producers.get(codes)) is not None:
            if node.op_type not in BETWEEN and not carries(node):
                break
            codes = node.inputs[0]
        return codes

    def computes_quantized(self, node: Node) -> bool:
        """It is quantized in the file: an integer operator, or a float one between Q/DQ."""
        if node.name not in self._quantizes:
            self._quantizes[node.name] = self._computes_quantized(node)
        return self._quantizes[node.name]

    def _computes_quantized(self, node: Node) -> bool:
        if node.op_type in QUANTIZATION_OPS:
            return node.op_type not in (Q, DQ, DYNAMIC_QUANTIZER)
        floats = [i for i in node.inputs if i and not self._parameter(i)]
        constants = [i for i in floats if i in self.constants]
        computed = [i for i in floats if i not in self.constants]
        if any(self._dequantized(i) for i in constants):
            return True
        if constants and any(i in self.weights for i in constants):
            return False  # its weight was left in float
        return (
            bool(computed)
            and all(self._dequantized(i) for i in computed)
            and any(self._reaches_q(o) for o in node.outputs if o)
        )

    def _parameter(self, tensor: str) -> bool:
        """A shape, index or other integer that says how, and holds no values."""
        return self.q.info(tensor).dtype not in (*FLOAT_DTYPES, "unknown")

    def _dequantized(self, tensor: str) -> bool:
        """It comes out of a DQ, moved or not."""
        while (node := self.producers.get(tensor)) is not None:
            if node.op_type == DQ:
                return True
            if not carries(node):
                return False
            tensor = node.inputs[0]
        return False

    def _reaches_q(self, tensor: str) -> bool:
        """It goes into a Q, through nodes that only follow."""
        waiting, seen = deque([tensor]), {tensor}
        while waiting:
            for reader in self.consumers.get(waiting.popleft(), ()):
                if reader.op_type == Q:
                    return True
                if reader.op_type in _FOLLOWERS:
                    new = [o for o in reader.outputs if o and o not in seen]
                    seen.update(new)
                    waiting.extend(new)
        return False

    def askers(self, codes: str) -> frozenset[str]:
        """The nodes that read a pair's values, moved or not, and compute in integers with them."""
        known = self._asked.get(codes)
        if known is not None:
            return known
        found: set[str] = set()
        waiting, seen = deque([(codes, False)]), {codes}
        while waiting:
            tensor, direct = waiting.popleft()
            for reader in self.consumers.get(tensor, ()):
                onward = reader.op_type == DQ or reader.op_type in _FOLLOWERS
                if reader.op_type == Q:
                    onward = direct  # two pairs in a row
                elif not onward and self.computes_quantized(reader):
                    found.add(reader.name)
                if onward:
                    for output in reader.outputs:
                        if output and output not in seen:
                            seen.add(output)
                            waiting.append((output, reader.op_type == DQ))
        self._asked[codes] = frozenset(found)
        return self._asked[codes]

    def wanted(self, freed: Collection[str], rectifiers: Collection[str]) -> dict[str, bool]:
        """By integer tensor of a pair, whether anybody who is still quantized wants it.

        Args:
            freed: nodes of the quantized model.
            rectifiers: nodes of the float model that were folded into a Q.
        """
        quantized: dict[str, bool] = {}  # by node
        found: dict[str, bool] = {}

        def makes(tensor: str) -> bool:
            folded = self.rectifiers.get(tensor, ())
            if folded and folded[-1].name in rectifiers:
                return False
            maker = self.producers.get(tensor)
            return maker is not None and quantized.get(maker.name, False)

        for node in self.q.nodes:
            if node.op_type == DQ:
                quantized[node.name] = found.get(self.origin(node.inputs[0]), True)
            elif node.op_type == Q:
                codes = node.outputs[0]
                made = makes(node.inputs[0])
                found[codes] = made or not self.askers(codes) <= set(freed)
            elif node.name in freed:
                quantized[node.name] = False
            elif node.op_type in _FOLLOWERS and node.op_type not in QUANTIZATION_OPS:
                source = node.inputs[0] if node.inputs else ""
                maker = self.producers.get(source)
                quantized[node.name] = maker is not None and quantized.get(maker.name, False)
            else:
                quantized[node.name] = self.computes_quantized(node)
            for output in node.outputs:
                if output in self.real:
                    made = makes(output)
                    found[output] = made or not self.askers(output) <= set(freed)
        return found

    @cached_property
    def unchanged(self) -> dict[str, bool]:
        """`wanted` of the file as it is; to be asked for once `real` is complete."""
        return self.wanted(frozenset(), frozenset())

    def dropped(self, freed: Collection[str], rectifiers: Collection[str]) -> set[str]:
        """The integer tensors whose pairs go, where these nodes are left in float."""
        now = self.wanted(freed, rectifiers)
        gone = set()
        for codes, wanted in now.items():
            if wanted:
                continue
            maker = self.producers.get(codes)
            source = maker.inputs[0] if maker is not None and maker.op_type == Q else codes
            by = self.producers.get(source)
            own = by is not None and by.name in freed
            # A pair that nobody wanted to begin with is no business of this list.
            if self.unchanged.get(codes) or own:
                gone.add(codes)
        return gone

    def written_codes(self, node: Node) -> list[str]:
        """The integers that a node's output is quantized to, through nodes that only follow."""
        found = []
        waiting = deque(o for o in node.outputs if o)
        seen = set(waiting)
        while waiting:
            tensor = waiting.popleft()
            if tensor in self.real:
                found.append(tensor)
                continue
            for reader in self.consumers.get(tensor, ()):
                if reader.op_type == Q and reader.inputs[0] == tensor:
                    found.append(reader.outputs[0])
                elif reader.op_type in _FOLLOWERS and tensor == reader.inputs[0]:
                    new = [o for o in reader.outputs if o and o not in seen]
                    seen.update(new)
                    waiting.extend(new)
        return found

    def folded_behind(self, node: Node) -> tuple[Node, ...]:
        """The Relu and Clip that were folded into the Q behind a node."""
        return next((self.rectifiers[o] for o in node.outputs if o in self.rectifiers), ())

    def codes_of_rectifier(self, name: str) -> set[str]:
        """The integers that Q writes where it does a rectifier's work."""
        found = set()
        for tensor, folded in self.rectifiers.items():
            if any(r.name == name for r in folded):
                if tensor in self.real:
                    found.add(tensor)
                found.update(
                    r.outputs[0]
                    for r in self.consumers.get(tensor, ())
                    if r.op_type == Q and r.inputs[0] == tensor
                )
        return found
