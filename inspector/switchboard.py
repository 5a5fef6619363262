"""One session in which every Q/DQ pair and every quantized weight is an input.

Leaving a node in float takes no rebuild: an exclusion list is another set of switches, scales, zero
points and weight values, which the quantizer's own decisions give (`quantizer.Plan`). The base is
the model with every pair that any list can ask for, Relu and Clip kept as nodes. A pair is an If:
quantize and dequantize, or hand on, so that a tensor in float costs a copy and no arithmetic. Where
tensors may be of a second integer type, the pair's first branch is an If between the two.

What comes out is what the re-quantized file computes with optimisations off; deployed figures take
the real file.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from inspector.quantizer import Grid, Plan, Quantizer, UnplannableError
from inspector.runtime import Feed, held_value
from inspector.stages import StagedSession

_Q_SUFFIX, _DQ_SUFFIX = "_QuantizeLinear", "_DequantizeLinear_Output"
# ONNX Runtime packs the constant second input of these.
_PACKED = ("MatMul", "Gemm")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    """One Q/DQ pair of the base: the inputs that stand for its switches, scale and zero point.

    Attributes:
        on: quantize, or hand on.
        scale: of whatever type.
        zero_points: by integer type, the recipe's own last.
        switches: by integer type other than the recipe's, what chooses it.
    """

    on: str
    scale: str
    zero_points: Mapping[str, str]
    switches: Mapping[str, str]


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
        types: integer types, beside the recipe's own, that overrides may put an activation on.
            16-bit types need opset 21, to which `prepare` lifts a model for them.

    Attributes:
        plan: what is switched on now.
        whole: the plan without exclusions.
        output_names: of the model, in order.

    Raises:
        UnplannableError: the base cannot be given switches.
        RunError: the runtime refuses it.
    """

    def __init__(self, quantizer: Quantizer, types: Collection[str] = ()) -> None:
        self._quantizer = quantizer
        self.whole = quantizer.plan()
        base = _Base(quantizer, types)
        self._pairs = base.pairs
        self._constants = base.constants
        self._grids = dict(base.grids)
        self._folds = base.folds
        self._plain = base.plain
        self._session = StagedSession(
            base.proto, base.input_names, shapes=base.shapes, name="the switchboard"
        )
        self.output_names = self._session.output_names
        self._on: dict[str, bool] = {}
        self._held: dict[str, bytes] = {}
        self._values: dict[tuple[str, bytes], Any] = {}
        for name, pair in self._pairs.items():
            grid = self._grids[name]
            for dtype, zero_point in pair.zero_points.items():
                # The branch of a type that is not chosen needs one as well.
                self._session.set(zero_point, grid.zero_point.astype(dtype))
            self._put(name, pair, grid)
        self.plan = self.whole
        self._switch(self.whole)
        self._session.keep()
        self._kept_float = False
        self._lock = threading.Lock()

    def plan_of(
        self, exclude: Iterable[str], overrides: Mapping[str, Mapping[str, Any]] | None = None
    ) -> Plan:
        """What the quantizer would do with a list.

        Args:
            exclude: nodes of the prepared model.
            overrides: see `Quantizer.plan`.

        Raises:
            UnplannableError: a tensor would get a pair or an integer type that the base does not
                have.
        """
        plan = self._quantizer.plan(exclude, overrides)
        for name, grid in plan.activations.items():
            if name not in self._pairs:
                raise UnplannableError(f"the list gives {name} a Q/DQ pair of its own")
            if grid.dtype not in self._pairs[name].zero_points:
                raise UnplannableError(f"{name} would be {grid.dtype}")
        return plan

    def run(
        self, plan: Plan, feed: Feed, *, sample: str = "a feed", remember: bool = True
    ) -> dict[str, NDArray[Any]]:
        """The outputs of the model that the quantizer makes by this plan.

        Several threads may run one plan at a time.

        Args:
            plan: of `plan_of`.
            feed: the prepared model's inputs; not to be changed in place afterwards.
            sample: the feed's name, for messages.
            remember: the same feed may come again under another plan.

        Raises:
            RunError: the runtime refuses the feed.
        """
        with self._lock:
            if not self._kept_float and 2 * len(plan.activations) < len(self._pairs):
                # Plans with few pairs share what comes before them with the float model.
                self._switch(_in_float(plan))
                self._session.keep()
                self._kept_float = True
            if plan is not self.plan:
                self._switch(plan)
        return self._session.run(feed, sample=sample, remember=remember)

    def _put(self, name: str, pair: _Pair, grid: Grid) -> None:
        self._grids[name] = grid
        self._session.set(pair.scale, grid.scale)
        self._session.set(pair.zero_points[grid.dtype], grid.zero_point)
        for dtype, switch in pair.switches.items():
            self._flip(switch, dtype == grid.dtype)

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
            mark = b"" if grid is None else _mark(grid, is_bias)
            if self._held.get(name) == mark:
                continue
            self._held[name] = mark
            if grid is not None and is_bias:
                # Changes with the range of what its node reads: not worth keeping.
                values = self._quantizer.bias_values(constant.initializer, grid)
                self._session.bind(name, held_value(values), mark)
                continue
            key = (constant.initializer, mark)
            if key not in self._values:
                values = self._quantizer.values(constant.initializer, grid)
                self._values[key] = held_value(values)
            self._session.bind(name, self._values[key], mark)
        self.plan = plan


def _in_float(plan: Plan) -> Plan:
    """The plan without anything quantized."""
    nothing: dict[Any, Any] = {}
    return replace(
        plan, activations=nothing, weights=nothing, biases=nothing, bias_readers=nothing,
        folded=frozenset(), shares=nothing,
    )  # fmt: skip


def _mark(grid: Grid, is_bias: bool) -> bytes:
    """The same for the same values of one constant, and for no others; not empty."""
    kind = b"bias " if is_bias else f"{grid.axis} {grid.dtype} ".encode()
    return kind + grid.scale.tobytes() + grid.zero_point.tobytes()


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
        shapes: of tensors, as far as the model tells.
    """

    def __init__(self, quantizer: Quantizer, types: Collection[str]) -> None:
        whole = quantizer.quantize(keep_rectifiers=True)
        own = quantizer.nodes
        self.pairs: dict[str, _Pair] = {}
        self.grids: dict[str, Grid] = {}
        self.constants: dict[str, _Constant] = {}
        self.plain: dict[str, str] = {}
        self.folds: dict[str, str] = {}
        self._types = sorted(types)
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
        self.shapes = _shapes(quantizer, nodes)

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
        """An If in place of two nodes, with one more inside for every further type."""
        scale, zero_point = (self._stored[n] for n in quantize.input[1:3])
        grid = Grid(
            scale=numpy_helper.to_array(scale), zero_point=numpy_helper.to_array(zero_point)
        )
        types = [*(t for t in self._types if t != grid.dtype), grid.dtype]
        pair = _Pair(
            on=self._input("on", onnx.TensorProto.BOOL, ()),
            scale=self._input("scale", scale.data_type, scale.dims),
            zero_points={
                t: self._input("zero_point", _element_type(t), zero_point.dims) for t in types
            },
            switches={t: self._input("as", onnx.TensorProto.BOOL, ()) for t in types[:-1]},
        )
        tensor = quantize.name.removesuffix(_Q_SUFFIX)
        self.pairs[tensor] = pair
        self.grids[tensor] = grid

        def through(dtype: str) -> tuple[list[onnx.NodeProto], str]:
            integers, real = self._fresh("integers"), self._fresh("real")
            inside = []
            for node, source, result in (
                (quantize, quantize.input[0], integers), (dequantize, integers, real)
            ):  # fmt: skip
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                del copy.input[:], copy.output[:]
                copy.input.extend([source, pair.scale, pair.zero_points[dtype]])
                copy.output.append(result)
                inside.append(copy)
            return inside, real

        found = through(grid.dtype)
        for dtype, switch in pair.switches.items():
            real = self._fresh("real")
            found = (
                [self._either(switch, through(dtype), found, real, scale.data_type)], real
            )  # fmt: skip
        plain = self._fresh("plain")
        hand_on = helper.make_node("Identity", [quantize.input[0]], [plain])
        return self._either(
            pair.on, found, ([hand_on], plain), dequantize.output[0], scale.data_type
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


def _shapes(
    quantizer: Quantizer, nodes: Iterable[onnx.NodeProto]
) -> dict[str, tuple[int | str | None, ...]]:
    """Shapes of what the nodes give; a pair gives what it reads."""
    found: dict[str, tuple[int | str | None, ...]] = {}
    for node in nodes:
        for output in node.output:
            kind = quantizer.source.tensor_type(output.removesuffix(_DQ_SUFFIX))
            if kind is not None and kind.HasField("shape"):
                found[output] = tuple(d.dim_value or None for d in kind.shape.dim)
    return found


def _element_type(dtype: str) -> int:
    """ONNX's number of a numpy type."""
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


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
