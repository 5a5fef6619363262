"""A model as it is looked at: nodes, tensors, bodies, constants.

A `Model` is a private, read-only view of one file: nodes have unique non-empty names, look-ups by
tensor or node are dictionaries, and large external data stay on disk until they are asked for.
What had to be changed in the private copy is said in `Model.notes`. Files are read and written by
`model_files`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.numpy_helper
import onnx.shape_inference
import onnx.version_converter
from google.protobuf.message import DecodeError, EncodeError
from numpy.typing import NDArray
from onnx import AttributeProto, TensorProto

from inspector.errors import ModelError

FLOAT_DTYPES = frozenset({"float16", "bfloat16", "float32", "float64"})
# A protobuf message cannot be larger.
PROTO_BYTES = 2**31 - 1

# What ONNX's own passes raise on graphs they cannot handle.
ONNX_ERRORS = (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    onnx.version_converter.ConvertError,
    RuntimeError,
    ValueError,
    TypeError,
    DecodeError,
    EncodeError,
)


# numpy's type by ONNX's number; those that numpy lacks come from ml_dtypes.
DTYPES: dict[int, np.dtype[Any]] = {
    number: np.dtype(onnx.helper.tensor_dtype_to_np_dtype(number))
    for number in TensorProto.DataType.values()
    if number != TensorProto.UNDEFINED
}
# How many bits an element takes in raw data, where that is not the size of numpy's type.
PACKED_BITS: dict[int, int] = {
    **dict.fromkeys((TensorProto.INT2, TensorProto.UINT2), 2),
    **dict.fromkeys((TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1), 4),
    **dict.fromkeys((TensorProto.FLOAT6E2M3, TensorProto.FLOAT6E3M2), 6),
}


def shown(name: str) -> str:
    """A name from a file as messages show it: quoted, control characters escaped, cut at 80."""
    return repr(name if len(name) <= 80 else f"{name[:77]}…")


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """Name, element type and shape of a tensor.

    Attributes:
        name: the tensor's name.
        dtype: numpy's name of the element type (``"float32"``, ``"int64"``, ``"bfloat16"``,
            ``"float8_e4m3fn"``, ``"int4"`` …), ``"string"`` for strings; ``"unknown"`` where it
            cannot be inferred.
        shape: dimensions, None or a symbol where dynamic; None where the rank is unknown.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExternalTensor:
    """Where the values of an initializer lie that stayed on disk.

    Attributes:
        name: the tensor's name.
        file: the file, links resolved.
        offset: of its first byte.
        length: in bytes.
        dtype: numpy's name of the element type.
        shape: its dimensions.
    """

    name: str
    file: Path
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One node of a graph.

    Attributes:
        index: position in the graph, which is a topological order.
        name: unique in its graph and not empty.
        op_type: e.g. ``"Conv"``.
        domain: ``""`` for ai.onnx.
        inputs: tensor names; ``""`` for an absent optional input.
        outputs: tensor names; may be empty.
        captured: tensors of the graphs around it that bodies of If, Loop or Scan read.
        attributes: plain Python values; tensors as arrays, bodies left out.
    """

    index: int
    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    captured: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)


def dtype_name(elem_type: int) -> str:
    if elem_type == TensorProto.STRING:
        return "string"
    return str(DTYPES[elem_type].name) if elem_type in DTYPES else "unknown"


def _tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    shape: tuple[int | str | None, ...] | None = None
    if tensor.HasField("shape"):
        # A negative dimension is what some exporters write for a dynamic one.
        shape = tuple(
            (d.dim_value if d.dim_value >= 0 else None)
            if d.HasField("dim_value")
            else (d.dim_param or None)
            for d in tensor.shape.dim
        )
    return TensorInfo(name=value.name, dtype=dtype_name(tensor.elem_type), shape=shape)


def _named_bodies(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    for attribute in node.attribute:
        # A file may fill fields that the type does not read; nobody else looks at them either.
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.name, attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            for at, body in enumerate(attribute.graphs):
                yield f"{attribute.name}_{at}", body


def bodies_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    return (body for _, body in _named_bodies(node))


def _captured(graph: onnx.GraphProto) -> Iterator[str]:
    own = {i.name for i in graph.initializer} | {i.name for i in graph.input}
    own.update(output for node in graph.node for output in node.output)
    for node in graph.node:
        for name in (*node.input, *(n for body in bodies_of(node) for n in _captured(body))):
            if name and name not in own:
                yield name
    for output in graph.output:
        if output.name not in own:
            yield output.name


def array_of(tensor: TensorProto) -> NDArray[Any]:
    if tensor.data_type == TensorProto.STRING:
        # Bytes that are not UTF-8 are shown with marks instead of refused: nothing computes them.
        strings = [s.decode("utf-8", "replace") for s in tensor.string_data]
        return np.array(strings, dtype=object).reshape(tuple(tensor.dims))
    return np.asarray(onnx.numpy_helper.to_array(tensor))


def _attribute(attribute: AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.type == AttributeProto.TENSOR:
        return array_of(value)
    if attribute.type == AttributeProto.TENSORS:
        return tuple(array_of(each) for each in value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if attribute.type == AttributeProto.STRINGS:
        return tuple(each.decode("utf-8", "replace") for each in value)
    if attribute.type in (AttributeProto.INTS, AttributeProto.FLOATS):
        return tuple(value)
    return value


def _stable_names(nodes: Sequence[onnx.NodeProto]) -> tuple[list[str], int, int]:
    """A unique non-empty name for every node; how many had none, how many shared theirs."""
    taken: set[str] = set()
    later: list[int] = []
    names = [node.name for node in nodes]
    unnamed = duplicated = 0
    for at, name in enumerate(names):
        if not name:
            unnamed += 1
            later.append(at)
        elif name in taken:
            duplicated += 1
            later.append(at)
        taken.add(name)
    counters: dict[str, int] = {}
    for at in later:
        node = nodes[at]
        output = next((o for o in node.output if o), str(len(taken)))
        stem = name = f"{node.name or node.op_type}_{output}"
        while name in taken:
            counters[stem] = counters.get(stem, 1) + 1
            name = f"{stem}_{counters[stem]}"
        names[at] = name
        taken.add(name)
    return names, unnamed, duplicated


_CONSTANT_FIELDS: tuple[tuple[str, Any], ...] = (
    ("value", None),
    ("value_float", np.float32),
    ("value_floats", np.float32),
    ("value_int", np.int64),
    ("value_ints", np.int64),
    ("value_string", object),
    ("value_strings", object),
)


class Graph:
    """What a model's main graph and the bodies inside it have in common: nodes and look-ups."""

    def __init__(self, proto: onnx.GraphProto, names: Sequence[str]) -> None:
        self._graph = proto
        self._node_names = names

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes of this graph in file order."""
        nodes = []
        for index, (name, node) in enumerate(zip(self._node_names, self._graph.node, strict=True)):
            captured = dict.fromkeys(n for body in bodies_of(node) for n in _captured(body))
            nodes.append(
                Node(
                    index=index,
                    name=name,
                    op_type=node.op_type,
                    domain="" if node.domain == "ai.onnx" else node.domain,
                    inputs=tuple(node.input),
                    outputs=tuple(node.output),
                    captured=tuple(captured),
                    attributes={
                        a.name: _attribute(a)
                        for a in node.attribute
                        if a.type not in (AttributeProto.GRAPH, AttributeProto.GRAPHS)
                    },
                )
            )
        return tuple(nodes)

    @cached_property
    def node_by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def producers(self) -> dict[str, Node]:
        """The node that computes a tensor, by tensor name; Constant nodes included."""
        return {output: node for node in self.nodes for output in node.outputs if output}

    @cached_property
    def consumers(self) -> dict[str, tuple[Node, ...]]:
        """The nodes that read a tensor (bodies included), by tensor name."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys((*node.inputs, *node.captured)):
                if name:
                    found.setdefault(name, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @cached_property
    def _initializers(self) -> dict[str, TensorProto]:
        return {i.name: i for i in self._graph.initializer}

    @cached_property
    def constant_names(self) -> frozenset[str]:
        """Initializers and outputs of Constant nodes of this graph."""
        outputs = (n.outputs[0] for n in self.nodes if _is_constant(n))
        return frozenset(self._initializers).union(outputs)

    def constant(self, tensor: str) -> NDArray[Any] | None:
        """The value of an initializer or Constant node; None for any other tensor.

        Types that numpy lacks (bfloat16, float8, int4 …) are arrays of ml_dtypes' types, one
        element each; strings are objects. The array cannot be written to.
        """
        if tensor in self._initializers:
            return array_of(self._initializers[tensor])
        node = self.producers.get(tensor)
        if node is None or not _is_constant(node) or node.outputs[0] != tensor:
            return None
        for key, dtype in _CONSTANT_FIELDS:
            if key in node.attributes:
                return np.asarray(node.attributes[key], dtype)
        return None


def _is_constant(node: Node) -> bool:
    return node.op_type == "Constant" and not node.domain and any(node.outputs[:1])


class Body(Graph):
    """The body of an If, Loop or Scan, or any other graph that a node holds.

    Names of tensors may repeat those of other bodies; look-ups start inside and go outwards.

    Attributes:
        path: unique in the model: the nodes around it and the attribute it is, joined by "/",
            e.g. ``"/model/decoder/If_1/then_branch"``.
        owner: name of the node that holds it.
        outer: the graph that node is in.
        inputs: names of its own inputs (those of Loop and Scan).
        outputs: names of its outputs.
    """

    def __init__(self, proto: onnx.GraphProto, *, path: str, owner: str, outer: Graph) -> None:
        super().__init__(proto, _stable_names(proto.node)[0])
        self.path = path
        self.owner = owner
        self.outer = outer
        self.inputs = tuple(i.name for i in proto.input)
        self.outputs = tuple(o.name for o in proto.output)

    @cached_property
    def _own(self) -> frozenset[str]:
        return frozenset((*self.inputs, *self.producers, *self._initializers))

    def constant(self, tensor: str) -> NDArray[Any] | None:
        """As `Graph.constant`, for a name as the nodes of this body read it."""
        return super().constant(tensor) if tensor in self._own else self.outer.constant(tensor)


def _all_bodies(graph: Graph, prefix: str) -> Iterator[Body]:
    for name, node in zip(graph._node_names, graph._graph.node, strict=True):
        for attribute, proto in _named_bodies(node):
            body = Body(proto, path=f"{prefix}{name}/{attribute}", owner=name, outer=graph)
            yield body
            yield from _all_bodies(body, f"{body.path}/")


class Model(Graph):
    """A private, read-only view of one ONNX file.

    Attributes:
        proto: the model with unique node names. Do not change it. Values of the initializers in
            `external` are not in it: writers of whole models take `complete()`.
        path: where it was loaded from; None for one made in memory.
        sha256: of the file's bytes followed by those of its external data.
        size_bytes: size of the file and its external data.
        external: initializers whose values stayed on disk, by name; empty for all but large models.
        notes: what was changed in the private copy, one sentence each.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        *,
        path: Path | None = None,
        sha256: str = "",
        size_bytes: int = 0,
        external: Mapping[str, ExternalTensor] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        names, more = _name_nodes(proto)
        super().__init__(proto.graph, names)
        self.proto = proto
        self.path = path
        self.sha256 = sha256
        self.size_bytes = size_bytes
        self.external: Mapping[str, ExternalTensor] = dict(external or {})
        self.notes: tuple[str, ...] = (*notes, *more)

    @property
    def name(self) -> str:
        """The file's name, or "model" for one made in memory."""
        return self.path.name if self.path is not None else "model"

    @property
    def opset(self) -> int:
        """Version of the ai.onnx operator set; 1 where the file names none."""
        return self.opsets.get("", 1)

    @cached_property
    def opsets(self) -> dict[str, int]:
        """Version by domain, ``""`` for ai.onnx."""
        return {
            "" if o.domain == "ai.onnx" else o.domain: o.version for o in self.proto.opset_import
        }

    @property
    def producer(self) -> str:
        """What wrote the file, e.g. ``"pytorch 1.11.0"``; ``""`` where unsaid."""
        return f"{self.proto.producer_name} {self.proto.producer_version}".strip()

    @cached_property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Inputs a feed must give: graph inputs without those that have an initializer."""
        return tuple(
            _tensor_info(i) for i in self.proto.graph.input if i.name not in self._initializers
        )

    @cached_property
    def outputs(self) -> tuple[TensorInfo, ...]:
        return tuple(_tensor_info(o) for o in self.proto.graph.output)

    @cached_property
    def bodies(self) -> tuple[Body, ...]:
        """The bodies of If, Loop and Scan, nested ones after the body around them."""
        return tuple(_all_bodies(self, ""))

    @cached_property
    def tensor_infos(self) -> dict[str, TensorInfo]:
        """Type and shape by tensor name, as far as ONNX's shape inference can tell."""
        graph = self.proto.graph
        known = [*graph.input, *graph.output, *graph.value_info]
        try:
            inferred = onnx.shape_inference.infer_shapes(self._skeleton(), data_prop=True).graph
            known += [*inferred.value_info, *inferred.output]
        except ONNX_ERRORS:
            # A model that ONNX cannot infer may still run: types stay "unknown".
            pass
        infos = {value.name: _tensor_info(value) for value in known}
        for name, tensor in self._initializers.items():
            infos[name] = TensorInfo(
                name=name, dtype=dtype_name(tensor.data_type), shape=tuple(tensor.dims)
            )
        return infos

    def _skeleton(self) -> onnx.ModelProto:
        """The model without large weights: shape inference reads only shapes, and copies all."""
        graph = self.proto.graph
        skeleton = onnx.ModelProto(
            ir_version=self.proto.ir_version,
            opset_import=self.proto.opset_import,
            functions=self.proto.functions,
        )
        copy = skeleton.graph
        copy.node.extend(graph.node)
        copy.output.extend(graph.output)
        copy.value_info.extend(graph.value_info)
        copy.input.extend(graph.input)
        listed = {i.name for i in graph.input}
        for tensor in graph.initializer:
            if tensor.data_location == TensorProto.DEFAULT and math.prod(tensor.dims) <= 1024:
                copy.initializer.append(tensor)
            elif tensor.name not in listed:
                copy.input.append(
                    onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                )
        return skeleton

    def info(self, tensor: str) -> TensorInfo:
        """Type and shape of a tensor, ``"unknown"`` and None where they cannot be inferred."""
        return self.tensor_infos.get(tensor) or TensorInfo(name=tensor, dtype="unknown", shape=None)

    def constant(self, tensor: str) -> NDArray[Any] | None:
        """As `Graph.constant`. Values on disk are mapped, so that only what is used is read.

        Raises:
            ModelError: a file with external data is gone or shorter than it was.
        """
        if tensor in self.external:
            return _mapped(self.external[tensor], self._initializers[tensor], self.name)
        return super().constant(tensor)

    def complete(self) -> onnx.ModelProto:
        """The model with all values inside, for writers of whole models. Do not change it.

        Raises:
            ModelError: it is larger than a protobuf can be, or a file with external data is gone.
        """
        if not self.external:
            return self.proto
        size = sum(e.length for e in self.external.values())
        if size + self.proto.ByteSize() > PROTO_BYTES:
            raise ModelError(
                f"{self.name} holds {size:,} bytes of weights; one protobuf holds at most "
                f"{PROTO_BYTES:,}",
                hint="Use a smaller model here: this step needs the whole model in one piece.",
            )
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        for tensor in proto.graph.initializer:
            if tensor.name in self.external:
                place = self.external[tensor.name]
                tensor.raw_data = bytes_at(place, self.name).tobytes()
                forget_place(tensor)
        return proto


def _name_nodes(proto: onnx.ModelProto) -> tuple[list[str], tuple[str, ...]]:
    """Gives every node of the main graph a unique non-empty name; returns what was changed."""
    names, unnamed, duplicated = _stable_names(proto.graph.node)
    if unnamed or duplicated:
        for node, name in zip(proto.graph.node, names, strict=True):
            if node.name != name:
                node.name = name
    notes = []
    if unnamed:
        notes.append(
            f"{unnamed} of {len(names)} nodes have no name; "
            "they are called <op type>_<first output> here"
        )
    if duplicated:
        notes.append(
            f"{duplicated} of {len(names)} nodes share a name with another; "
            "they are called <name>_<first output> here"
        )
    return names, tuple(notes)


# -- values on disk ----------------------------------------------------------------------------


def forget_place(tensor: TensorProto) -> None:
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def bytes_at(place: ExternalTensor, what: str) -> NDArray[np.uint8]:
    """A tensor's bytes, mapped and read-only."""
    if not place.length:
        return np.empty(0, np.uint8)
    try:
        # A file cut while it is mapped would end the process.
        if place.file.stat().st_size >= place.offset + place.length:
            mapped = np.memmap(place.file, np.uint8, "r", place.offset, (place.length,))
            return np.asarray(mapped)
        found = f"only {place.file.stat().st_size:,} bytes large"
    except OSError as error:
        found = f"not readable: {error.strerror}"
    raise ModelError(
        f"{what}: the external data {place.file.name} of weight {shown(place.name)} is now {found}",
        hint=f"Put {place.file.name} back beside {what} and load it again.",
    )


def _mapped(place: ExternalTensor, tensor: TensorProto, what: str) -> NDArray[Any]:
    stored = bytes_at(place, what)
    if tensor.data_type in PACKED_BITS:
        # Several elements share a byte: they are unpacked, one tensor at a time.
        packed = TensorProto(data_type=tensor.data_type, dims=tensor.dims)
        packed.raw_data = stored.tobytes()
        return array_of(packed)
    return stored.view(DTYPES[tensor.data_type]).reshape(place.shape)
