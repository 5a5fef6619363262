"""One session in which every Q/DQ pair and every quantized weight is an input.

Leaving a node in float takes no rebuild: an exclusion list is another set of switches, scales, zero
points and weight values, which the quantizer's own decisions give (`quantizer.Plan`). The base is
the model with every pair that any list can ask for, Relu and Clip kept as nodes. A pair is an If:
quantize and dequantize, or hand on, so that a tensor in float costs a copy and no arithmetic.

What comes out is what the re-quantized file computes with optimisations off; deployed figures take
the real file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from inspector.quantizer import Grid, Plan, Quantizer, UnplannableError
from inspector.runtime import BoundSession, Feed, open_session

_Q_SUFFIX = "_QuantizeLinear"
# ONNX Runtime packs the constant second input of these.
_PACKED = ("MatMul", "Gemm")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    """One Q/DQ pair of the base: the inputs that stand for its switch, scale and zero point."""

    on: str
    scale: str
    zero_point: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Constant:
    """One quantized constant of the base, as one node reads it.

    Attributes:
        initializer: of the float model.
        reader: the node.
    """

    initializer: str
    reader: str


class Switchboard:
    """The session of one recipe, for any exclusion list.

    Args:
        quantizer: of the recipe.

    Attributes:
        plan: what is switched on now.
        whole: the plan without exclusions.
        output_names: of the model, in order.

    Raises:
        UnplannableError: the base cannot be given switches.
        RunError: the runtime refuses it.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self._quantizer = quantizer
        self.whole = quantizer.plan()
        base = _Base(quantizer)
        self._pairs = base.pairs
        self._constants = base.constants
        self._grids = dict(base.grids)
        self._folds = base.folds
        self._plain = base.plain
        session = open_session(base.proto, optimized=False, name="the switchboard")
        self._session = BoundSession(session, base.input_names)
        self.output_names = self._session.output_names
        self._on: dict[str, bool] = {}
        self._held: dict[str, tuple[Any, ...]] = {}
        self._values: dict[tuple[Any, ...], Any] = {}
        for name, pair in self._pairs.items():
            self._put(name, pair, self._grids[name])
        self.plan = self.whole
        self._switch(self.whole)

    def plan_of(
        self, exclude: Iterable[str], overrides: Mapping[str, Mapping[str, Any]] | None = None
    ) -> Plan:
        """What the quantizer would do with a list.

        Args:
            exclude: nodes of the prepared model.
            overrides: see `Quantizer.plan`.

        Raises:
            UnplannableError: a tensor would get a pair that the base does not have, or another
                integer type.
        """
        plan = self._quantizer.plan(exclude, overrides)
        for name, grid in plan.activations.items():
            if name not in self._pairs:
                raise UnplannableError(f"the list gives {name} a Q/DQ pair of its own")
            if grid.zero_point.dtype != self._grids[name].zero_point.dtype:
                raise UnplannableError(f"{name} would be {grid.zero_point.dtype}")
        return plan

    def run(self, plan: Plan, feed: Feed, *, sample: str = "a feed") -> dict[str, NDArray[Any]]:
        """The outputs of the model that the quantizer makes by this plan.

        Args:
            plan: of `plan_of`.
            feed: the prepared model's inputs.
            sample: the feed's name, for messages.

        Raises:
            RunError: the runtime refuses the feed.
        """
        if plan is not self.plan:
            self._switch(plan)
        return self._session.run(feed, sample=sample)

    def _put(self, name: str, pair: _Pair, grid: Grid) -> None:
        self._grids[name] = grid
        self._session.set(pair.scale, grid.scale)
        self._session.set(pair.zero_point, grid.zero_point)

    def _flip(self, switch: str, on: bool) -> None:
        if self._on.get(switch) is not on:
            self._on[switch] = on
            self._session.set(switch, np.array(on))

    def _switch(self, plan: Plan) -> None:
        for name, pair in self._pairs.items():
            grid = plan.activations.get(name)
            self._flip(pair.on, grid is not None)
            known = self._grids[name]
            if grid is not None and grid is not known and not known.same(grid):
                self._put(name, pair, grid)
        for name, switch in self._folds.items():
            self._flip(switch, name in plan.folded)
        for name, constant in self._constants.items():
            grid, is_bias = plan.grid_read(constant.reader, constant.initializer)
            if name in self._plain:
                self._flip(self._plain[name], grid is None)
                if grid is None:
                    continue
            key = (
                constant.initializer,
                is_bias,
                None if grid is None else (grid.scale.tobytes(), grid.zero_point.tobytes()),
            )
            if self._held.get(name) == key:
                continue
            self._held[name] = key
            if grid is not None and is_bias:
                # Changes with the range of what its node reads: not worth keeping.
                values = self._quantizer.bias_values(constant.initializer, grid)
                self._session.bind(name, self._session.hold(values))
                continue
            if key not in self._values:
                values = self._quantizer.values(constant.initializer, grid)
                self._values[key] = self._session.hold(values)
            self._session.bind(name, self._values[key])
        self.plan = plan


class _Base:
    """The quantized model with inputs in place of what lists change.

    Attributes:
        proto: the model.
        pairs: inputs by tensor with a Q/DQ pair.
        grids: what the base itself has there.
        constants: by graph input, what it stands for.
        plain: by graph input of a matrix, the switch that has its node read the initializer
            instead. ONNX Runtime packs constant matrices, and its packed kernels round otherwise.
        folds: by Relu or Clip that a body reads behind, the switch that takes it away. The
            quantizer folds it all the same, and the body then reads values that nobody rectified.
        input_names: all inputs that were added.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        whole = quantizer.quantize(keep_rectifiers=True)
        own = quantizer.nodes
        self.pairs: dict[str, _Pair] = {}
        self.grids: dict[str, Grid] = {}
        self.constants: dict[str, _Constant] = {}
        self.plain: dict[str, str] = {}
        self.folds: dict[str, str] = {}
        self._stored = {i.name: i for i in whole.graph.initializer}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._taken = {n for node in whole.graph.node for n in (*node.input, *node.output)}
        self._taken.update(self._stored)
        self._count = 0
        readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        # One Python object per node, so that a node is told by its identity.
        every = list(whole.graph.node)
        for node in every:
            for at, name in enumerate(node.input):
                readers.setdefault(name, []).append((node, at))
        nodes: list[onnx.NodeProto] = []
        places: dict[int, int] = {}
        matrices: list[tuple[onnx.NodeProto, str]] = []
        self._needed: dict[str, onnx.TensorProto] = {}
        for node in every:
            if node.name in own:
                places[id(node)] = len(nodes)
                nodes.append(node)
            elif node.op_type == "QuantizeLinear":
                after = [reader for reader, _ in readers.get(node.output[0], [])]
                if len(after) != 1 or after[0].op_type != "DequantizeLinear":
                    raise UnplannableError(f"{node.name} is not read by one DequantizeLinear")
                nodes.append(self._pair(node, after[0]))
            elif node.op_type != "DequantizeLinear":
                raise UnplannableError(f"{node.name} is a {node.op_type} that nothing explains")
            elif node.input[0] in self._stored:
                for reader, at in readers.get(node.output[0], []):
                    if reader.name not in own:
                        raise UnplannableError(f"{reader.name} reads a constant and was added")
                    original = own[reader.name]
                    reader.input[at] = self._constant(quantizer, original, at)
                    if reader.op_type in _PACKED and at == 1:
                        self._needed[original.input[at]] = quantizer.initializer(original.input[at])
                        matrices.append((reader, original.input[at]))
        for reader, matrix in matrices:
            nodes[places[id(reader)]] = self._matrix(reader, matrix)
        nodes = self._bodies(nodes, quantizer)
        self.proto = onnx.ModelProto(ir_version=whole.ir_version)
        self.proto.opset_import.extend(whole.opset_import)
        self.proto.functions.extend(whole.functions)
        graph = self.proto.graph
        graph.name = whole.graph.name
        graph.node.extend(nodes)
        graph.input.extend([*whole.graph.input, *self._inputs])
        graph.output.extend(whole.graph.output)
        used = _names_read(graph)
        stored = {**self._needed, **self._stored}
        graph.initializer.extend(i for name, i in stored.items() if name in used)
        self.input_names = tuple(i.name for i in self._inputs)

    def _fresh(self, what: str) -> str:
        while True:
            self._count += 1
            name = f"{what}_{self._count}"
            if name not in self._taken:
                return name

    def _input(self, what: str, dtype: int, shape: Sequence[int]) -> str:
        name = self._fresh(what)
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def _pair(self, quantize: onnx.NodeProto, dequantize: onnx.NodeProto) -> onnx.NodeProto:
        """An If in place of two nodes."""
        scale, zero_point = (self._stored[n] for n in quantize.input[1:3])
        pair = _Pair(
            on=self._input("on", onnx.TensorProto.BOOL, ()),
            scale=self._input("scale", scale.data_type, scale.dims),
            zero_point=self._input("zero_point", zero_point.data_type, zero_point.dims),
        )
        tensor = quantize.name.removesuffix(_Q_SUFFIX)
        self.pairs[tensor] = pair
        self.grids[tensor] = Grid(
            scale=numpy_helper.to_array(scale), zero_point=numpy_helper.to_array(zero_point)
        )
        integers, real, plain = (self._fresh(n) for n in ("integers", "real", "plain"))
        inside = []
        for node, source, result in (
            (quantize, quantize.input[0], integers), (dequantize, integers, real)
        ):  # fmt: skip
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            del copy.input[:], copy.output[:]
            copy.input.extend([source, pair.scale, pair.zero_point])
            copy.output.append(result)
            inside.append(copy)
        hand_on = helper.make_node("Identity", [quantize.input[0]], [plain])
        return self._either(
            pair.on, (inside, real), ([hand_on], plain), dequantize.output[0], scale.data_type
        )

    def _either(
        self,
        switch: str,
        yes: tuple[list[onnx.NodeProto], str],
        no: tuple[list[onnx.NodeProto], str],
        output: str,
        dtype: int,
    ) -> onnx.NodeProto:
        """An If of two branches, each its nodes and the tensor that it gives."""
        branches = [
            helper.make_graph(
                nodes, result, [], [helper.make_tensor_value_info(result, dtype, None)]
            )
            for nodes, result in (yes, no)
        ]
        return helper.make_node(
            "If", [switch], [output], name=self._fresh("either"),
            then_branch=branches[0], else_branch=branches[1],
        )  # fmt: skip

    def _matrix(self, node: onnx.NodeProto, initializer: str) -> onnx.NodeProto:
        """A MatMul or Gemm that reads its matrix from the input or, in float, as a constant."""
        given = node.input[1]
        switch = self._input("plain", onnx.TensorProto.BOOL, ())
        self.plain[given] = switch
        branches = []
        for name in (initializer, given):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[1] = name
            copy.output[0] = self._fresh("product")
            branches.append(([copy], copy.output[0]))
        dtype = self._needed[initializer].data_type
        return self._either(switch, branches[0], branches[1], node.output[0], dtype)

    def _bodies(
        self, nodes: Sequence[onnx.NodeProto], quantizer: Quantizer
    ) -> list[onnx.NodeProto]:
        """The nodes with bodies that read what folding a Relu or Clip leaves them."""
        renamed: dict[str, str] = {}
        found: list[onnx.NodeProto] = []
        for node in nodes:
            original = quantizer.nodes.get(node.name)
            if original is not None and renamed:
                for attribute in node.attribute:
                    for body in _inner(attribute):
                        _rename(body, renamed)
            found.append(node)
            if (
                original is None
                or original.op_type not in ("Relu", "Clip")
                or original.output[0] not in quantizer.names_in_bodies
            ):
                continue
            before, after = original.input[0], original.output[0]
            switch = self._input("folded", onnx.TensorProto.BOOL, ())
            self.folds[node.name] = switch
            renamed[after] = self._fresh("behind")
            branches = []
            for name in (before, after):
                result = self._fresh("read")
                branches.append(([helper.make_node("Identity", [name], [result])], result))
            dtype = quantizer.source.tensor_type(after).elem_type
            found.append(self._either(switch, branches[0], branches[1], renamed[after], dtype))
        return found

    def _constant(self, quantizer: Quantizer, reader: onnx.NodeProto, at: int) -> str:
        """A graph input for what a node of the float model reads at a place."""
        proto = quantizer.initializer(reader.input[at])
        name = self._input("constant", proto.data_type, proto.dims)
        self.constants[name] = _Constant(initializer=proto.name, reader=reader.name)
        return name


def _names_read(graph: onnx.GraphProto) -> set[str]:
    found = {o.name for o in graph.output}
    for node in graph.node:
        found.update(node.input)
        for attribute in node.attribute:
            for body in _inner(attribute):
                found |= _names_read(body)
    return found


def _inner(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    own = [attribute.g] if attribute.HasField("g") else []
    return [*own, *attribute.graphs]


def _rename(body: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Renames what a body reads from outside, at any depth."""
    for node in body.node:
        for at, name in enumerate(node.input):
            node.input[at] = names.get(name, name)
        for attribute in node.attribute:
            for inner in _inner(attribute):
                _rename(inner, names)
    for output in body.output:
        output.name = names.get(output.name, output.name)
