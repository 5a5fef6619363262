"""What a graph computes from constants alone: which tensors, from which constants, to what values.

Exporters leave constants behind DequantizeLinear, Transpose, Cast, Concat and whole chains of
arithmetic; whoever compares weights wants the value that the consumer reads. QuantizeLinear and
DequantizeLinear are computed with `QParams` in float64, every other node by ONNX's reference
evaluator, one node at a time, so that nothing is run that the value does not need. A separate
module because it executes nodes, which `model` (reads files) and `scheme` (reads parameters) do
not.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Container, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx
import onnx.defs
import onnx.helper
import onnx.numpy_helper
import onnx.reference
import onnx.shape_inference
from numpy.typing import NDArray

from inspector.model import FLOAT_DTYPES, Body, Graph, Model, Node
from inspector.qparams import QParams, qparams_from_constants

Q, DQ = "QuantizeLinear", "DequantizeLinear"
# A value is given up when it, or all that has to be computed for it, has more elements than this.
MAX_ELEMENTS = 2**28
# Computed values are kept up to so many bytes per model, the least recently asked for go first.
MAX_KEPT_BYTES = 256 * 2**20
# Of what is computed on the way to a value, arrays up to this size are kept as well.
_KEPT_ON_THE_WAY = 2**16
# Shape inference sees the values of inputs up to this size (shapes, axes, repeats, limits).
_SMALL = 1024
# Random, with bodies, reading files, or different in training: never a constant.
_NOT_FOLDED = frozenset(
    {"If", "Loop", "Scan", "SequenceMap", "RandomNormal", "RandomNormalLike", "RandomUniform",
     "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout", "ImageDecoder", "Constant"}
)  # fmt: skip


def constant_value(graph: Graph, tensor: str) -> NDArray[Any] | None:
    """The value of a tensor that is computed from constants alone, of any shape and dtype.

    Behind a DequantizeLinear values are float64, and stay so through float32 arithmetic and casts
    to float32: the real numbers that the file stands for, without the runtime's rounding. All else
    has the dtype that ONNX gives it.

    In a body, names are looked up as its nodes read them, from the inside outwards.

    None for a computed tensor, an unknown one, one that ONNX's reference evaluator refuses, and
    one beyond `MAX_ELEMENTS`. Never raises for what is odd in a graph.
    """
    direct = _constant(graph, tensor)
    return direct if direct is not None else _folder(graph).value(graph, tensor)


def folded_names(graph: Graph) -> frozenset[str]:
    """Every tensor of the graph that is a constant or computed from constants alone.

    For a body also those of the graphs around it that it can read. Computes no value: that of a
    name in it may still be None (see `constant_value`).
    """
    return _folder(graph).names


def folded_from(graph: Graph, tensor: str) -> tuple[str, ...]:
    """The constants that a tensor is computed from, in the order of the nodes that read them.

    The tensor itself for a constant; () for a computed or unknown tensor.
    """
    return _folder(graph).sources(tensor)


def quantization_qparams(
    node: Node,
    scale: NDArray[Any],
    zero_point: NDArray[Any] | None,
    *,
    dtype: str,
    shape: tuple[int | str | None, ...] | None,
) -> QParams:
    """Parameters of a Q or DQ node from the values of its scale and zero point.

    Args:
        node: gives axis (1 where absent), block size and saturation.
        scale: the value of its second input.
        zero_point: the value of its third input, None where absent.
        dtype: of the codes, used where there is no zero point to tell.
        shape: of the tensor it reads, as far as known.

    Raises:
        ValueError: they do not fit one another or the tensor.
    """
    return qparams_from_constants(
        scale,
        zero_point,
        dtype=dtype if zero_point is None else zero_point.dtype.name,
        shape=shape,
        axis=int(node.attributes.get("axis", 1)),
        block_size=int(node.attributes.get("block_size", 0)),
        saturate=bool(node.attributes.get("saturate", 1)),
    )


def code_dtype(node: Node) -> str:
    """The type a Q without zero point writes: its ``output_dtype``, else uint8."""
    elem_type = int(node.attributes.get("output_dtype", 0))
    if not elem_type:
        return "uint8"
    return str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type)).name)


class _Value:
    """An array; `widened` where it is float64 in place of the float32 of the graph."""

    __slots__ = ("array", "widened")

    def __init__(self, array: NDArray[Any], widened: bool = False) -> None:
        self.array = array
        self.widened = widened


class _Folder:
    """The constant part of one graph and the values computed of it so far."""

    def __init__(self, graph: Graph) -> None:
        # Holds no reference to the graph, whose lifetime decides on its own.
        self.opsets = _opsets(graph)
        self.constants = graph.constant_names
        if isinstance(graph, Body):
            own = {*graph.inputs, *graph.producers}
            self.constants |= folded_names(graph.outer) - own
        self.producers: dict[str, Node] = {}
        names = set(self.constants)
        for node in graph.nodes:  # in topological order
            inputs = [name for name in node.inputs if name]
            if (
                inputs
                and node.op_type not in _NOT_FOLDED
                and (node.domain == "" or node.op_type in (Q, DQ))
                and not node.captured
                and all(name in names for name in inputs)
            ):
                for output in filter(None, node.outputs):
                    self.producers[output] = node
                    names.add(output)
        self.names = frozenset(names)
        self.kept: OrderedDict[str, _Value | None] = OrderedDict()
        self.kept_bytes = 0

    def needed(self, tensor: str, have: Container[str] = ()) -> list[Node]:
        """The nodes that have to be computed for a tensor, in topological order.

        Does not look behind the tensors in `have`.
        """
        found: dict[int, Node] = {}
        waiting = [tensor]
        while waiting:
            name = waiting.pop()
            node = None if name in have else self.producers.get(name)
            if node is not None and node.index not in found:
                found[node.index] = node
                waiting += node.inputs
        return [found[index] for index in sorted(found)]

    def sources(self, tensor: str) -> tuple[str, ...]:
        if tensor in self.constants:
            return (tensor,)
        read = (name for node in self.needed(tensor) for name in node.inputs)
        return tuple(dict.fromkeys(name for name in read if name in self.constants))

    def value(self, graph: Graph, tensor: str) -> NDArray[Any] | None:
        if tensor not in self.producers:
            return None
        if tensor in self.kept:
            self.kept.move_to_end(tensor)
        else:
            self._keep(tensor, self._compute(graph, tensor))
        value = self.kept[tensor]
        return None if value is None else value.array

    def _compute(self, graph: Graph, tensor: str) -> _Value | None:
        have: dict[str, _Value | None] = {}
        elements = 0
        for node in self.needed(tensor, self.kept):
            for name in node.inputs:
                if name and name not in have:
                    constant = None if name in self.kept else _constant(graph, name)
                    have[name] = (
                        self.kept[name]
                        if name in self.kept
                        else _Value(constant)
                        if constant is not None
                        else None
                    )
            inputs = [have[name] if name else None for name in node.inputs]
            if any(name and have[name] is None for name in node.inputs):
                computed: dict[str, _Value] = {}
            else:
                computed = _evaluate(node, inputs, self.opsets, MAX_ELEMENTS - elements)
            have.update({name: computed.get(name) for name in node.outputs if name})
            for name, value in computed.items():
                elements += value.array.size
                if value.array.size <= _KEPT_ON_THE_WAY and name != tensor:
                    self._keep(name, value)
        return have.get(tensor)

    def _keep(self, tensor: str, value: _Value | None) -> None:
        if value is not None:
            value.array.setflags(write=False)  # shared by all who ask
        self.kept[tensor] = value
        self.kept_bytes += 0 if value is None else value.array.nbytes
        while self.kept_bytes > MAX_KEPT_BYTES and len(self.kept) > 1:
            _, old = self.kept.popitem(last=False)
            self.kept_bytes -= 0 if old is None else old.array.nbytes


_FOLDERS: WeakKeyDictionary[Graph, _Folder] = WeakKeyDictionary()


def _opsets(graph: Graph) -> dict[str, int]:
    while isinstance(graph, Body):
        graph = graph.outer
    return graph.opsets if isinstance(graph, Model) else {}


def _constant(graph: Graph, tensor: str) -> NDArray[Any] | None:
    """A constant of the graph, or a tensor that the graphs around a body compute from constants."""
    value = graph.constant(tensor)
    if value is None and isinstance(graph, Body) and tensor not in graph.producers:
        return None if tensor in graph.inputs else constant_value(graph.outer, tensor)
    return value


def _folder(graph: Graph) -> _Folder:
    folder = _FOLDERS.get(graph)
    if folder is None:
        folder = _FOLDERS[graph] = _Folder(graph)
    return folder


def _evaluate(
    node: Node, inputs: list[_Value | None], opsets: Mapping[str, int], limit: int
) -> dict[str, _Value]:
    """The outputs of one node by name; without those that are no arrays or cannot be computed."""
    arrays = [None if value is None else value.array for value in inputs]
    if node.op_type in (Q, DQ):
        return _quantization(node, arrays, limit)
    widened = any(value is not None and value.widened for value in inputs)
    if node.op_type == "Cast" and widened and node.attributes.get("to") == onnx.TensorProto.FLOAT:
        return {node.outputs[0]: _Value(np.asarray(arrays[0]), True)}
    if widened:
        arrays = [
            a.astype(np.float64) if a is not None and a.dtype.name in FLOAT_DTYPES else a
            for a in arrays
        ]
    names = [f"input {at}" if a is not None else "" for at, a in enumerate(arrays)]
    feeds = {name: a for name, a in zip(names, arrays, strict=True) if a is not None}
    # The evaluator raises whatever numpy or its own code raises for a node that ONNX forbids, and
    # NotImplementedError for what it does not know; either way the value is not known.
    try:
        proto = _node_proto(node, names)
        if not _fits(proto, feeds, opsets, limit):
            return {}
        evaluator = onnx.reference.ReferenceEvaluator(
            onnx.helper.make_graph([proto], "one node", [], []), opsets={"": opsets.get("", 1)}
        )
        with np.errstate(all="ignore"):
            found = evaluator.run([o for o in node.outputs if o], feeds)
    except Exception:  # an operator of the reference evaluator may raise anything on odd graphs
        return {}
    outputs = {}
    for name, array in zip(filter(None, node.outputs), found, strict=True):
        if isinstance(array, np.ndarray | np.generic):
            array = np.asarray(array)
            outputs[name] = _Value(array, widened and array.dtype == np.float64)
    return outputs


def _quantization(node: Node, arrays: list[NDArray[Any] | None], limit: int) -> dict[str, _Value]:
    """The output of a Q (codes of their own dtype) or a DQ (float64) on constants."""
    values, scale = arrays[0], arrays[1] if len(arrays) > 1 else None
    zero_point = arrays[2] if len(arrays) > 2 else None
    if values is None or scale is None or values.size > limit:
        return {}
    dtype = values.dtype.name if node.op_type == DQ else code_dtype(node)
    try:
        qparams = quantization_qparams(node, scale, zero_point, dtype=dtype, shape=values.shape)
        if node.op_type == DQ:
            return {node.outputs[0]: _Value(qparams.dequantize(values), True)}
        codes = qparams.quantize(values).astype(np.dtype(qparams.dtype))
    except ValueError:
        return {}
    return {node.outputs[0]: _Value(codes)}


def _node_proto(node: Node, names: list[str]) -> onnx.NodeProto:
    attributes = {
        key: onnx.numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
        for key, value in node.attributes.items()
    }
    return onnx.helper.make_node(node.op_type, names, list(node.outputs), **attributes)


def _fits(
    node: onnx.NodeProto, feeds: Mapping[str, NDArray[Any]], opsets: Mapping[str, int], limit: int
) -> bool:
    """Whether all outputs of a node have `limit` elements at most, before it is computed.

    Where their shapes depend on the values of large inputs (NonZero, Unique), the outputs are no
    larger than the inputs times their rank: those may have `_SMALL` squared elements.
    """
    version = opsets.get("", 1)
    schema = onnx.defs.get_schema(node.op_type, version, "")
    types = {
        name: onnx.helper.make_tensor_type_proto(
            onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
        )
        for name, array in feeds.items()
    }
    small = {
        name: onnx.numpy_helper.from_array(array, name)
        for name, array in feeds.items()
        if array.size <= _SMALL
    }
    inferred = onnx.shape_inference.infer_node_outputs(
        schema, node, types, small, opset_imports=[onnx.helper.make_opsetid("", version)]
    )
    for value in inferred.values():
        shape = value.tensor_type.shape
        if value.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in shape.dim):
            if math.prod(d.dim_value for d in shape.dim) > limit:
                return False
        elif sum(array.size for array in feeds.values()) > min(limit, _SMALL**2):
            return False
    return True
