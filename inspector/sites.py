"""The places of a quantized file that a list of nodes in float changes, each in both its forms.

A node is freed where it stands: it reads its inputs before Q/DQ and the float model's weight; what
a removed Q clipped is clipped by the float model's Relu or Clip again. Which of the two forms a
list wants is no business of this module, so both are made once for all lists.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.helper

from inspector.float_constants import FloatConstants, NewNames, RefusedError
from inspector.integer_operators import (
    AS_IT_IS,
    INTEGER_ATTRIBUTES,
    PRODUCTS,
    FloatOperator,
    float_operator,
)
from inspector.matching import Matching, clip_limits
from inspector.model import FLOAT_DTYPES, Model, Node
from inspector.quantized_flow import DYNAMIC_QUANTIZER, QuantizedFlow, carries
from inspector.scheme import BETWEEN, DQ, QUANTIZATION_OPS, Q


@dataclass(kw_only=True, slots=True)
class Site:
    """One place in the graph that has two forms with the same outputs.

    Attributes:
        at: index of the quantized model's node in whose place it stands.
        outputs: names that both forms give.
        moved: indices of the nodes that its quantized form is made of.
        quantized: further nodes behind those of `moved`, in the quantized form.
        freed: the other form.
        unit: the quantized model's node whose freeing decides; "" for a Q/DQ pair.
        codes: of a Q/DQ pair, the integer tensor that decides.
    """

    at: int
    outputs: tuple[str, ...]
    moved: tuple[int, ...]
    quantized: list[onnx.NodeProto] = field(default_factory=list)
    freed: list[onnx.NodeProto] = field(default_factory=list)
    unit: str = ""
    codes: str = ""


class Sites:
    """Every place of a quantized model that a list can change, in both forms.

    Attributes:
        by_place: the sites, by index of the node in whose place they stand; half an index more
            where they stand behind it.
        before, after: further nodes in front of and behind a node, by its index.
        copies: by output of a copied carrier, the original's.
        identities: names of nodes that hand a tensor on in the place of a pair.
        rerouted: what to read in the place of a tensor that a rectifier was folded behind.
        own_nodes: names of nodes that read such a tensor as it is.
        float_names: by node of the quantized model, those of the float model that it computes.
        changed_units: nodes of the quantized model that have two forms.
    """

    def __init__(self, float_model: Model, quantized: Model, matching: Matching) -> None:
        self.f, self.q, self.matching = float_model, quantized, matching
        self.protos = quantized.proto.graph.node
        self.producers, self.consumers = quantized.producers, quantized.consumers
        self.outputs = {o.name for o in quantized.outputs}
        self.float_names: dict[str, list[str]] = {}
        for mine, its in matching.node_pairs.items():
            if its in quantized.node_by_name:
                self.float_names.setdefault(its, []).append(mine)
        self.names = NewNames(quantized)
        self.floats = FloatConstants(float_model, quantized, matching, self.float_names, self.names)
        self.flow = QuantizedFlow(quantized, matching, self.floats.weights)
        self.constants = self.flow.constants
        self.before: dict[int, list[onnx.NodeProto]] = {}
        self.after: dict[int, list[onnx.NodeProto]] = {}
        self.copies: dict[str, str] = {}
        self.identities: set[str] = set()
        self.plains: dict[str, str] = {}
        self.plain_of_codes: dict[str, str | None] = {}
        self.by_place: dict[float, Site] = {}
        self.site_of: dict[str, Site] = {}  # by node of the quantized model
        self.rerouted: dict[str, str] = {}
        self.own_nodes: set[str] = set()
        self.reasons: dict[str, str] = {}
        self.changed_units: set[str] = set()
        for node in quantized.nodes:
            if node.op_type not in (Q, DQ) and node.name in self.float_names:
                self._unit(node)
        for node in quantized.nodes:
            if node.op_type == DQ and node.index not in self.by_place:
                self._pair(node)
        for node in quantized.nodes:
            if node.op_type == Q and node.inputs[0] in self.flow.rectifiers:
                self._raw_readers(node)

    # -- values before Q/DQ ----------------------------------------------------------------------

    def plain(self, tensor: str) -> str:
        """A float tensor as it is before the pair in front of who reads it; itself without."""
        # Carriers in a row are walked with a list: there may be any number of them.
        walked: list[Node] = []
        at = tensor
        while at not in self.plains:
            node = self.producers.get(at)
            if node is None or at in self.constants:
                self.plains[at] = at
            elif node.op_type == DQ:
                self.plains[at] = self.codes_as_float(node.inputs[0]) or at
            elif carries(node) and node.inputs[0] not in self.constants:
                walked.append(node)
                at = node.inputs[0]
            else:
                self.plains[at] = at
        for node in reversed(walked):
            source = self.plains[node.inputs[0]]
            if source == node.inputs[0]:
                self.plains.update((o, o) for o in node.outputs if o)
            else:
                self._copy(node, source, self.plains)
        return self.plains[tensor]

    def _copy(self, node: Node, source: str, known: dict[str, Any]) -> None:
        """A carrier once more, on another tensor."""
        copy = onnx.NodeProto()
        copy.CopyFrom(self.protos[node.index])
        copy.name = self.names.fresh(f"{node.name}_float")
        copy.input[0] = source
        for at, output in enumerate(node.outputs):
            if output:
                name = self.names.fresh(f"{output}_float")
                copy.output[at] = known[output] = name
                self.copies[name] = output
        self.after.setdefault(node.index, []).append(copy)

    def codes_as_float(self, codes: str) -> str | None:
        """The float tensor that integers were made from; None where the file holds only them."""
        walked: list[Node] = []
        at = codes
        while at not in self.plain_of_codes:
            node = self.producers.get(at)
            found: str | None = None
            if node is None or at in self.constants:
                pass
            elif node.op_type == Q:
                found = self.rectified(node)
            elif node.op_type == DYNAMIC_QUANTIZER:
                found = self.plain(node.inputs[0]) if at == node.outputs[0] else None
            elif at in self.flow.real:
                found = self.flow.real[at]
            elif node.op_type in BETWEEN or carries(node):
                walked.append(node)
                at = node.inputs[0]
                continue
            self.plain_of_codes[at] = found
        for node in reversed(walked):
            source = self.plain_of_codes[node.inputs[0]]
            if source is None or node.op_type in BETWEEN:
                self.plain_of_codes.update((o, source) for o in node.outputs if o)
            else:
                self._copy(node, source, self.plain_of_codes)
        return self.plain_of_codes[codes]

    def rectified(self, quantizer: Node) -> str:
        """What a Q reads, behind the Relu or Clip that was folded into it."""
        tensor = quantizer.inputs[0]
        source = tensor
        maker = self.producers.get(tensor)
        if maker is not None and maker.op_type == DQ:
            source = self.plain(tensor)  # pairs in a row belong to one tensor
        key = f"rectified {tensor}"
        if key not in self.plains:
            nodes, self.plains[key] = self.put_back(tensor, source)
            self.before.setdefault(quantizer.index, []).extend(nodes)
        return self.plains[key]

    def put_back(self, folded: str, tensor: str) -> tuple[list[onnx.NodeProto], str]:
        """The rectifiers folded at one tensor as nodes on another, and their last output."""
        nodes = []
        for rectifier in self.flow.rectifiers.get(folded, ()):
            output = self.names.fresh(f"{rectifier.outputs[0]}_float")
            name = self.names.fresh(rectifier.name)
            self.own_nodes.add(name)
            if rectifier.op_type == "Relu":
                nodes.append(onnx.helper.make_node("Relu", [tensor], [output], name))
            else:
                nodes.append(self._clip(rectifier, tensor, output, name))
            tensor = output
        return nodes, tensor

    def _clip(self, clip: Node, tensor: str, output: str, name: str) -> onnx.NodeProto:
        low, high = clip_limits(clip, self.f)
        if self.q.opset < 11:
            limits = {k: v for k, v in (("min", low), ("max", high)) if math.isfinite(v)}
            return onnx.helper.make_node("Clip", [tensor], [output], name, **limits)
        inputs = [tensor]
        dtype = np.dtype(self.float_dtype(tensor))
        for limit in (low, high):
            if math.isfinite(limit):
                inputs.append(self.floats.constant(f"{name}_limit", np.asarray(limit, dtype)))
            else:
                inputs.append("")
        while not inputs[-1]:
            inputs.pop()
        return onnx.helper.make_node("Clip", inputs, [output], name)

    def float_dtype(self, *tensors: str) -> str:
        """The first float type among the tensors' own; "float32" where none is known."""
        found = (self.q.info(t).dtype for t in tensors if t)
        return next((d for d in found if d in FLOAT_DTYPES), "float32")

    def refusal(self, node: str) -> str:
        """Why a node of the quantized model cannot be freed; "" where it can.

        Values of weights are looked at here, when somebody asks.
        """
        if node not in self.reasons:
            self.reasons[node] = self.floats.refusal(node)
        return self.reasons[node]

    # -- units -----------------------------------------------------------------------------------

    def _unit(self, node: Node) -> None:
        """Both forms of a node that has a float twin, or the reason why it has one form only."""
        try:
            if node.op_type in PRODUCTS:
                self._product(node)
            elif (kind := float_operator(node.op_type, len(node.inputs))) is not None:
                self._integer_operator(node, kind)
            elif node.op_type in QUANTIZATION_OPS:
                raise RefusedError(f"{node.op_type} cannot be replaced by a float operator here")
            elif self._reads_table(node):
                self._table(node)
            else:
                self._float_operator(node)
        except RefusedError as reason:
            self.reasons[node.name] = str(reason)

    def _reads_table(self, node: Node) -> bool:
        """It picks elements of a constant that is stored as integers."""
        if not carries(node):
            return False
        pairs = self.floats.weights.get(node.inputs[0], ())
        return any(p.quantized is not None and p.quantized.after is None for p in pairs)

    def _table(self, node: Node) -> None:
        if any(o in self.outputs for o in node.outputs):
            raise RefusedError("the integers that it picks are an output of the file")
        readers = [(o, r) for o in node.outputs for r in self.consumers.get(o, ())]
        dtype = self.float_dtype(*(o for _, r in readers if r.op_type == DQ for o in r.outputs))
        table, nodes = self.floats.placed(node.inputs[0], node, dtype)

        def picked(output: str, name: str) -> list[onnx.NodeProto]:
            """The table's values for one output, under another name."""
            pick = copied([self.protos[node.index]])[0]
            pick.input[0] = table
            for at, other in enumerate(node.outputs):
                if other:
                    pick.output[at] = (
                        name if other == output else self.names.fresh(f"{other}_float")
                    )
            return [*nodes, pick]

        for output, reader in readers:
            if reader.op_type == DQ:
                self.by_place[reader.index] = Site(
                    at=reader.index, outputs=reader.outputs, moved=(reader.index,),
                    freed=picked(output, reader.outputs[0]), unit=node.name,
                )  # fmt: skip
        direct = list(dict.fromkeys(o for o, r in readers if r.op_type != DQ))
        if len(direct) == 1:
            self._picked_for_integers(node, direct[0], dtype, picked)
        elif direct:
            raise RefusedError("several of its outputs are read as integers")
        self.changed_units.add(node.name)

    def _picked_for_integers(
        self,
        node: Node,
        output: str,
        dtype: str,
        picked: Callable[[str, str], list[onnx.NodeProto]],
    ) -> None:
        """What a freed operator reads in the place of picked integers."""
        tensor = next(
            p.quantized for p in self.floats.weights[node.inputs[0]] if p.quantized is not None
        )
        qparams = tensor.qparams
        if not qparams.per_tensor:
            raise RefusedError(f"its table {node.inputs[0]} has several scales")
        real = self.names.fresh(f"{output}_real")
        scale = self.floats.constant(f"{output}_scale", np.asarray(qparams.scale, np.dtype(dtype)))
        zero = self.floats.constant(
            f"{output}_zero_point", np.asarray(qparams.zero_point).astype(np.dtype(qparams.dtype))
        )
        again = self.names.fresh(f"{output}_{DQ}")
        self.by_place[node.index + 0.5] = Site(
            at=node.index, outputs=(real,), moved=(), freed=picked(output, real), unit=node.name,
            quantized=[onnx.helper.make_node(DQ, [output, scale, zero], [real], again)],
        )  # fmt: skip
        self.plain_of_codes[output] = real

    def _float_operator(self, node: Node) -> None:
        """A float operator between Q/DQ, or with a weight that goes through DQ."""
        proto = self.protos[node.index]
        if any(a.type in (a.GRAPH, a.GRAPHS) for a in proto.attribute):
            raise RefusedError(f"it holds a body ({node.op_type}), which is left as it is")
        dtype = self.float_dtype(*node.outputs)
        inputs, nodes = [], []
        for name in node.inputs:
            if name in self.constants:
                name, more = self.floats.placed(name, node, dtype)
                nodes += more
            elif name:
                name = self.plain(name)
            inputs.append(name)
        if inputs == list(node.inputs):
            return
        freed = onnx.NodeProto()
        freed.CopyFrom(proto)
        del freed.input[:]
        freed.input.extend(inputs)
        own = [i for i in node.inputs if i in self.constants]
        self._add(node, [*nodes, freed], [*self._lone_makers(own, node), node.index])

    def _lone_makers(self, tensors: Iterable[str], reader: Node) -> list[int]:
        """The nodes that make constants for one reader alone, in graph order."""
        found: set[int] = set()
        waiting = deque((t, reader) for t in tensors)
        while waiting:
            tensor, by = waiting.popleft()
            maker = self.producers.get(tensor)
            if maker is None or maker.op_type == "Constant" or tensor in self.outputs:
                continue
            readers = self.consumers.get(tensor, ())
            lone = all(r is by for r in readers) and len([o for o in maker.outputs if o]) == 1
            if lone and maker.index not in found:
                found.add(maker.index)
                waiting.extend((i, maker) for i in maker.inputs if i in self.constants)
        return sorted(found)

    def _add(
        self,
        node: Node,
        freed: list[onnx.NodeProto],
        moved: list[int],
        outputs: Sequence[str] | None = None,
        quantized: Sequence[onnx.NodeProto] = (),
    ) -> None:
        last = max(moved)
        self.by_place[last] = self.site_of[node.name] = Site(
            at=last,
            outputs=tuple(o for o in (node.outputs if outputs is None else outputs) if o),
            moved=tuple(sorted(moved)),
            quantized=list(quantized),
            freed=freed,
            unit=node.name,
        )
        self.changed_units.add(node.name)

    def _operand(
        self, node: Node, tensor: str, scale: str, zero: str, dtype: str
    ) -> tuple[str, list[onnx.NodeProto]]:
        """An integer operand as the float operator reads it."""
        if tensor in self.constants:
            return self.floats.placed(tensor, node, dtype)
        found = self.codes_as_float(tensor)
        if found is not None:
            return found, []
        # The file holds only the integers: they are what there is.
        maker = self.producers.get(tensor)
        if scale not in self.constants and (maker is None or maker.op_type != DYNAMIC_QUANTIZER):
            raise RefusedError(f"its input {tensor} has a scale that is computed while it runs")
        name = self.names.fresh(f"{tensor}_float")
        inputs = [tensor, scale, zero] if zero else [tensor, scale]
        return name, [onnx.helper.make_node(DQ, inputs, [name], self.names.fresh(f"{tensor}_{DQ}"))]

    def _integer_operator(self, node: Node, kind: FloatOperator) -> None:
        """An operator on integers, or on a packed weight."""
        if node.attributes.get("channels_last", 0):
            raise RefusedError("it works with channels last, which the float operator does not")

        def given(at: int) -> str:
            return node.inputs[at] if 0 <= at < len(node.inputs) else ""

        scales = [given(s) for _, s, _ in kind.operands if s != AS_IT_IS]
        dtype = self.float_dtype(*scales)
        nodes: list[onnx.NodeProto] = []
        inputs: list[str] = []
        for at, scale, zero in kind.operands:
            name = given(at)
            if scale == AS_IT_IS and name and name not in self.constants:
                name = self.plain(name)
            elif scale == AS_IT_IS and name and self.q.info(name).dtype in FLOAT_DTYPES:
                name, more = self.floats.placed(name, node, dtype)
                nodes += more
            elif scale != AS_IT_IS and name:
                name, more = self._operand(node, name, given(scale), given(zero), dtype)
                nodes += more
            inputs.append(name)
        bias = ""
        if kind.bias is not None and given(kind.bias):
            bias, more = self.floats.placed(given(kind.bias), node, dtype)
            nodes += more
        copy = copied([self.protos[node.index]])[0]
        attributes = {a.name: a for a in copy.attribute if a.name not in INTEGER_ATTRIBUTES}
        if kind.op_type == "ReduceMean" and self.q.opset >= 18 and "axes" in attributes:
            axes = np.asarray(attributes.pop("axes").ints, np.int64)
            inputs.append(self.floats.constant(f"{node.name}_axes", axes))
        if "gather_axis" in attributes:
            attributes["gather_axis"].name = "axis"
        if bias and not kind.added:
            inputs.append(bias)
        while inputs and not inputs[-1]:
            inputs.pop()
        integer = kind.output is not None and bool(given(kind.output[0]))
        output = node.outputs[0]
        result = self.names.fresh(f"{output}_float") if integer else output
        product = result
        if bias and kind.added:
            product = self.names.fresh(f"{output}_product")
        made = onnx.helper.make_node(kind.op_type, inputs, [product, *node.outputs[1:]], node.name)
        for attribute in attributes.values():
            made.attribute.add().CopyFrom(attribute)
        nodes.append(made)
        if bias and kind.added:
            nodes.append(
                onnx.helper.make_node(
                    "Add", [product, bias], [result], self.names.fresh(f"{node.name}_Add")
                )
            )
        if not integer:
            self._add(node, nodes, [node.index])
            return
        assert kind.output is not None
        scale_name, zero_name = (given(at) for at in kind.output)
        nodes += self.put_back(output, result)[0]
        real = self.names.fresh(f"{output}_real")
        nodes[-1].output[0] = real
        parameters = [scale_name, zero_name] if zero_name else [scale_name]
        back = self.names.fresh(f"{output}_{Q}")
        nodes.append(onnx.helper.make_node(Q, [real, *parameters], [output], back))
        self.flow.real[output] = real
        again = self.names.fresh(f"{output}_{DQ}")
        dequantized = onnx.helper.make_node(DQ, [output, *parameters], [real], again)
        self._add(node, nodes, [node.index], [output, real], [dequantized])

    def _product(self, node: Node) -> None:
        """MatMulInteger or ConvInteger with the Cast and Mul behind it."""
        moved, tensor, scales = [node.index], node.outputs[0], 0
        while scales < 2:
            readers = self.consumers.get(tensor, ())
            if len(readers) != 1 or tensor in self.outputs:
                raise RefusedError(f"what is made of its integers {tensor} is read in several ways")
            step = readers[0]
            if step.op_type == "Mul":
                other = next((i for i in step.inputs if i != tensor), "")
                scales += self._factors(other)
            elif step.op_type != "Cast":
                raise RefusedError(
                    f"its integers go into {step.name} ({step.op_type}), where a product with both "
                    "scales was expected"
                )
            moved.append(step.index)
            tensor = step.outputs[0]
        dtype = self.float_dtype(tensor)
        nodes: list[onnx.NodeProto] = []
        inputs = []
        for name in node.inputs[:2]:
            if name in self.constants:
                name, more = self.floats.placed(name, node, dtype)
                nodes += more
            else:
                found = self.codes_as_float(name)
                if found is None:
                    raise RefusedError(f"its input {name} is there as integers only")
                name = found
            inputs.append(name)
        made = onnx.helper.make_node(PRODUCTS[node.op_type], inputs, [tensor], node.name)
        for attribute in self.protos[node.index].attribute:
            made.attribute.add().CopyFrom(attribute)
        self._add(node, [*nodes, made], moved, [tensor])

    def _factors(self, tensor: str) -> int:
        """How many scales a factor behind an integer product holds."""
        maker = self.producers.get(tensor)
        for _ in range(4):
            if maker is None or maker.op_type not in ("Reshape", "Unsqueeze", "Squeeze"):
                break
            maker = self.producers.get(maker.inputs[0])
        return 2 if maker is not None and maker.op_type == "Mul" else 1

    # -- pairs -----------------------------------------------------------------------------------

    def _pair(self, node: Node) -> None:
        """Both forms of an activation's DQ: itself, or the tensor that Q reads."""
        output = node.outputs[0]
        if output in self.constants:
            return
        plain = self.plain(output)
        if plain == output:
            return
        codes = self.flow.origin(node.inputs[0])
        readers = self.consumers.get(output, ())
        units = [self.site_of.get(r.name) for r in readers]
        moved = [node.index]
        maker = self.producers.get(node.inputs[0])
        if (
            maker is not None
            and maker.op_type == Q
            and self.consumers[node.inputs[0]] == (node,)
            and node.inputs[0] not in self.outputs
        ):
            moved.append(maker.index)
        if (
            readers
            and output not in self.outputs
            and all(u is not None for u in units)
            and {r.name for r in readers} <= self.flow.askers(codes)
        ):
            # Whoever reads it either asks for it or reads the plain tensor. With one reader it is
            # a part of that reader's quantized form, so that it is not computed in vain.
            if len(units) == 1 and units[0] is not None:
                units[0].moved = tuple(sorted({*units[0].moved, *moved}))
            return
        name = self.names.fresh(f"{node.name}_plain")
        self.identities.add(name)
        self.by_place[node.index] = Site(
            at=node.index,
            outputs=(output,),
            moved=tuple(sorted(moved)),
            freed=[onnx.helper.make_node("Identity", [plain], [output], name)],
            codes=codes,
        )

    def _raw_readers(self, quantizer: Node) -> None:
        """Nodes that read in float what a folded rectifier was to clip: once it is a node again,
        they read behind it, as in the float model."""
        tensor = quantizer.inputs[0]
        maker = self.producers.get(tensor)
        readers = [r for r in self.consumers[tensor] if r.op_type != Q]
        if not readers or maker is None or tensor in self.rerouted:
            return
        nodes = self.put_back(tensor, tensor)[0]
        chosen = self.names.fresh(f"{tensor}_read")
        nodes[-1].output[0] = chosen
        name = self.names.fresh(f"{tensor}_as_it_is")
        self.identities.add(name)
        self.own_nodes.add(name)
        self.rerouted[tensor] = chosen
        self.by_place[maker.index + 0.5] = Site(
            at=maker.index, outputs=(chosen,), moved=(), freed=nodes, unit=maker.name,
            quantized=[onnx.helper.make_node("Identity", [tensor], [chosen], name)],
            codes=quantizer.outputs[0],
        )  # fmt: skip


def copied(nodes: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Nodes that may be changed without the originals."""
    found = []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        found.append(copy)
    return found
