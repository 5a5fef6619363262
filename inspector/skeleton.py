"""A model as its graph alone, light enough for a browser.

What a picture of the graph needs is kept: nodes with names that are unique over the whole file,
names, types and shapes of tensors, small constants. Values of larger tensors, places on disk, doc
strings and metadata stay behind. Apart from `rewrite`, because nothing that is written here runs.
No value of a large tensor is touched, so a file of any size costs what its graph costs.

A tensor without its values keeps its name, type and dims and has no data in the file at all, which
Netron shows as "Tensor data is empty". A skeleton is no valid model for a runtime.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator

import onnx
import onnx.helper
from onnx import AttributeProto, SparseTensorProto, TensorProto

from inspector.errors import ModelError
from inspector.model import DTYPES, Body, Model, Node, bodies_of, shown

KEPT_ELEMENTS = 64
# Strings have no size of their own; what is larger than this loses its values, too.
KEPT_BYTES = 8192

_ELEM_TYPES = {dtype.name: number for number, dtype in DTYPES.items()} | {
    "string": TensorProto.STRING
}
_LISTS = {
    AttributeProto.FLOATS: ("floats", TensorProto.FLOAT),
    AttributeProto.INTS: ("ints", TensorProto.INT64),
    AttributeProto.STRINGS: ("strings", TensorProto.STRING),
}


def names_in_file(model: Model) -> tuple[dict[str, str], ...]:
    """Node names that are unique over the whole file: by the node's own name, one per graph.

    The main graph comes first, where every node keeps its name; then each of `Model.bodies`, where
    nodes are called ``<path of the body>/<name>``, with ``_2``, ``_3`` … behind it where another
    node has that name already. The same model always gives the same names.
    """
    main = {node.name: node.name for node in model.proto.graph.node}
    taken = set(main)
    found = [main]
    for body in model.bodies:
        names = {}
        for node in body.nodes:
            names[node.name] = _unique(f"{body.path}/{node.name}", taken)
        found.append(names)
    return tuple(found)


def all_node_names(skeleton: onnx.ModelProto) -> set[str]:
    """Names of all nodes of a skeleton, those in bodies included, without those in functions."""
    found: set[str] = set()
    waiting = [skeleton.graph]
    while waiting:
        for node in waiting.pop().node:
            found.add(node.name)
            waiting.extend(bodies_of(node))
    return found


def _unique(wanted: str, taken: set[str]) -> str:
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    taken.add(name)
    return name


def skeleton_of(model: Model, only: Collection[str] | None = None) -> onnx.ModelProto:
    """The model without the values of tensors of more than 64 elements, and with unique node names.

    Names are those of `names_in_file`; nodes of local functions, which `load_model` inlines, are
    called ``<domain>.<function>/<name>``. Values that stay keep their types; a long list in an
    attribute (`Constant`'s ``value_floats``, a tree's thresholds) becomes a tensor without values.

    Args:
        model: the model.
        only: nodes of the main graph to cut down to, e.g. from `neighbourhood`; all that they read
            from elsewhere becomes an input, all that others read of them (and graph outputs that
            they compute) an output. None keeps all.

    Raises:
        ModelError: a name in `only` is no node of the main graph.
    """
    if only is not None:
        _check_known(model, only)
    source = model.proto
    copy = onnx.ModelProto(
        ir_version=source.ir_version,
        producer_name=source.producer_name,
        producer_version=source.producer_version,
    )
    for opset in source.opset_import:
        copy.opset_import.add(domain=opset.domain, version=opset.version)
    bodies = iter(names_in_file(model)[1:])
    if only is None:
        _copy_graph(source.graph, copy.graph, bodies)
    else:
        _copy_cut(model, copy.graph, bodies, set(only))
    taken = {node.name for node in copy.graph.node}
    for function in source.functions:
        copy.functions.append(_function(function, taken))
    return copy


def _check_known(model: Model, names: Iterable[str]) -> None:
    known = {node.name for node in model.proto.graph.node}
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise ModelError(
            f"{model.name} has no node {shown(unknown)} in its main graph",
            hint="Name a node of the main graph, or the If, Loop or Scan around it.",
        )


# -- a part of a graph -----------------------------------------------------------------------------


def neighbourhood(model: Model, node: str, hops: int) -> set[str]:
    """Names of the nodes of the main graph that are at most so many edges away from one of them.

    Edges are taken forwards and backwards; a body's node stands for the node that holds it. Nodes
    that compute from constants alone come along with whoever reads them and lead no further.

    Args:
        model: the model.
        node: a name as `names_in_file` gives it.
        hops: 0 gives the node itself and the constants it reads.

    Raises:
        ModelError: there is no such node.
    """
    start = main_nodes(model).get(node)
    if start is None:
        raise ModelError(
            f"{model.name} has no node {shown(node)}", hint="Choose a node from the list of nodes."
        )
    fixed = _constant_nodes(model)
    found, edge = {start}, [start]
    for _ in range(hops):
        following = []
        for name in edge:
            for other in _beside(model, model.node_by_name[name]):
                if other not in found and other not in fixed:
                    found.add(other)
                    following.append(other)
        edge = following
    waiting = list(found)
    while waiting:
        for name in _reads(model.node_by_name[waiting.pop()]):
            maker = model.producers.get(name)
            if maker is not None and maker.name in fixed and maker.name not in found:
                found.add(maker.name)
                waiting.append(maker.name)
    return found


def main_nodes(model: Model) -> dict[str, str]:
    """By name as in `names_in_file`: the node of the main graph that each is or lies in."""
    main, *inner = names_in_file(model)
    found = dict(main)
    for body, names in zip(model.bodies, inner, strict=True):
        around = body
        while isinstance(around.outer, Body):
            around = around.outer
        found.update(dict.fromkeys(names.values(), around.owner))
    return found


def _constant_nodes(model: Model) -> frozenset[str]:
    """Nodes of the main graph that compute from constants alone."""
    constants = set(model.constant_names)
    found = set()
    for node in model.nodes:
        read = _reads(node)
        alone = node.op_type == "Constant" or (read and all(name in constants for name in read))
        if alone and not node.op_type.startswith("Random"):
            found.add(node.name)
            constants.update(node.outputs)
    return frozenset(found)


def _reads(node: Node) -> list[str]:
    return [name for name in (*node.inputs, *node.captured) if name]


def _beside(model: Model, node: Node) -> Iterator[str]:
    """Nodes that this one reads from or that read from it."""
    for name in _reads(node):
        if name in model.producers:
            yield model.producers[name].name
    for name in node.outputs:
        for reader in model.consumers.get(name, ()):
            yield reader.name


def _copy_cut(
    model: Model, copy: onnx.GraphProto, bodies: Iterator[dict[str, str]], only: set[str]
) -> None:
    """The main graph cut down to some nodes, from left to right as they stand."""
    graph = model.proto.graph
    copy.name = graph.name
    made: dict[str, None] = {}
    read: dict[str, None] = {}
    for node, proto in zip(model.nodes, graph.node, strict=True):
        if node.name in only:
            copy.node.append(_node(proto, proto.name, bodies))
            made.update(dict.fromkeys(name for name in node.outputs if name))
            read.update(dict.fromkeys(_reads(node)))
        else:
            _skip(proto, bodies)
    for tensor in graph.initializer:
        if tensor.name in read:
            copy.initializer.append(_tensor(tensor))
    for sparse in graph.sparse_initializer:
        if sparse.values.name in read:
            _copy_sparse_initializer(sparse, copy)
    held = {t.name for t in copy.initializer} | {s.values.name for s in copy.sparse_initializer}
    listed = {i.name for i in graph.input if i.name in read}
    for name in read:
        if name in listed or (name not in made and name not in held):
            copy.input.append(_value_of(model, name))
    ends = {o.name for o in graph.output}
    for name in made:
        readers = model.consumers.get(name, ())
        if name in ends or any(reader.name not in only for reader in readers):
            copy.output.append(_value_of(model, name))
    known = {*made, *read}
    copy.value_info.extend(_value(v) for v in graph.value_info if v.name in known)


def _skip(node: onnx.NodeProto, bodies: Iterator[dict[str, str]]) -> None:
    for body in bodies_of(node):
        next(bodies)
        for inner in body.node:
            _skip(inner, bodies)


def _value_of(model: Model, name: str) -> onnx.ValueInfoProto:
    info = model.info(name)
    elem_type = _ELEM_TYPES.get(info.dtype)
    if elem_type is None:
        return onnx.ValueInfoProto(name=name)
    return onnx.helper.make_tensor_value_info(name, elem_type, info.shape)


# -- copies without values -------------------------------------------------------------------------


def _copy_graph(
    graph: onnx.GraphProto,
    copy: onnx.GraphProto,
    bodies: Iterator[dict[str, str]],
    names: Iterable[str] | None = None,
) -> None:
    """Fills `copy` with a graph.

    Args:
        graph: the graph.
        copy: empty.
        bodies: new names of the nodes of each body, in the order of `Model.bodies`.
        names: new names of this graph's nodes; None keeps them.
    """
    copy.name = graph.name
    for node, name in zip(graph.node, names or (n.name for n in graph.node), strict=True):
        copy.node.append(_node(node, name, bodies))
    for tensor in graph.initializer:
        copy.initializer.append(_tensor(tensor))
    for sparse in graph.sparse_initializer:
        _copy_sparse_initializer(sparse, copy)
    for kind in ("input", "output", "value_info"):
        getattr(copy, kind).extend(_value(value) for value in getattr(graph, kind))


def _value(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto(name=value.name)
    if value.HasField("type"):
        copy.type.CopyFrom(value.type)
    return copy


def _node(node: onnx.NodeProto, name: str, bodies: Iterator[dict[str, str]]) -> onnx.NodeProto:
    copy = onnx.NodeProto(
        name=name,
        op_type=node.op_type,
        domain=node.domain,
        overload=node.overload,
        input=node.input,
        output=node.output,
    )
    copy.attribute.extend(_attribute(a, bodies, node.op_type) for a in node.attribute)
    return copy


def _attribute(
    attribute: AttributeProto, bodies: Iterator[dict[str, str]], op_type: str
) -> AttributeProto:
    copy = AttributeProto(name=attribute.name, type=attribute.type)
    if attribute.ref_attr_name:
        copy.ref_attr_name = attribute.ref_attr_name
    kind = attribute.type
    if kind == AttributeProto.GRAPH:
        _copy_graph(attribute.g, copy.g, bodies, next(bodies).values())
    elif kind == AttributeProto.GRAPHS:
        for graph in attribute.graphs:
            _copy_graph(graph, copy.graphs.add(), bodies, next(bodies).values())
    elif kind == AttributeProto.TENSOR:
        copy.t.CopyFrom(_tensor(attribute.t))
    elif kind == AttributeProto.TENSORS:
        copy.tensors.extend(_tensor(each) for each in attribute.tensors)
    elif kind == AttributeProto.SPARSE_TENSOR:
        if _is_small(attribute.sparse_tensor.values):
            copy.sparse_tensor.CopyFrom(_sparse(attribute.sparse_tensor))
        else:
            _without_values(copy, _hollow_sparse(attribute.sparse_tensor), op_type)
    elif kind == AttributeProto.SPARSE_TENSORS:
        if all(_is_small(each.values) for each in attribute.sparse_tensors):
            copy.sparse_tensors.extend(_sparse(each) for each in attribute.sparse_tensors)
        else:
            copy.type = AttributeProto.TENSORS
            copy.tensors.extend(_hollow_sparse(each) for each in attribute.sparse_tensors)
    elif kind in _LISTS:
        field, elem_type = _LISTS[kind]
        items = getattr(attribute, field)
        long = kind == AttributeProto.STRINGS and sum(len(s) for s in items) > KEPT_BYTES
        if len(items) <= KEPT_ELEMENTS and not long:
            getattr(copy, field).extend(items)
        else:
            hollow = TensorProto(data_type=elem_type, dims=[len(items)])
            _without_values(copy, hollow, op_type)
    elif kind == AttributeProto.STRING:
        if len(attribute.s) <= KEPT_BYTES:
            copy.s = attribute.s
        else:
            hollow = TensorProto(data_type=TensorProto.UINT8, dims=[len(attribute.s)])
            _without_values(copy, hollow, op_type)
    elif kind == AttributeProto.FLOAT:
        copy.f = attribute.f
    elif kind == AttributeProto.INT:
        copy.i = attribute.i
    elif kind == AttributeProto.TYPE_PROTO:
        copy.tp.CopyFrom(attribute.tp)
    elif kind == AttributeProto.TYPE_PROTOS:
        copy.type_protos.extend(attribute.type_protos)
    return copy


def _without_values(copy: AttributeProto, hollow: TensorProto, op_type: str) -> None:
    """Makes an attribute a tensor without values; a Constant's is then called ``value``."""
    copy.type = AttributeProto.TENSOR
    copy.t.CopyFrom(hollow)
    if op_type == "Constant":
        copy.name = "value"


def _is_small(tensor: TensorProto) -> bool:
    few = tensor.data_location == TensorProto.DEFAULT and math.prod(tensor.dims) <= KEPT_ELEMENTS
    return bool(few and tensor.ByteSize() <= KEPT_BYTES)


def _tensor(tensor: TensorProto) -> TensorProto:
    if not _is_small(tensor):
        return TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.ClearField("doc_string")
    del copy.external_data[:]
    del copy.metadata_props[:]
    return copy


def _sparse(sparse: SparseTensorProto) -> SparseTensorProto:
    return SparseTensorProto(
        values=_tensor(sparse.values), indices=_tensor(sparse.indices), dims=sparse.dims
    )


def _hollow_sparse(sparse: SparseTensorProto) -> TensorProto:
    """A dense tensor without values: Netron stumbles over a sparse one without them."""
    return TensorProto(name=sparse.values.name, data_type=sparse.values.data_type, dims=sparse.dims)


def _copy_sparse_initializer(sparse: SparseTensorProto, copy: onnx.GraphProto) -> None:
    if _is_small(sparse.values):
        copy.sparse_initializer.append(_sparse(sparse))
    else:
        copy.initializer.append(_hollow_sparse(sparse))


def _function(function: onnx.FunctionProto, taken: set[str]) -> onnx.FunctionProto:
    copy = onnx.FunctionProto(
        name=function.name,
        domain=function.domain,
        overload=function.overload,
        input=function.input,
        output=function.output,
        attribute=function.attribute,
    )
    for opset in function.opset_import:
        copy.opset_import.add(domain=opset.domain, version=opset.version)
    copy.value_info.extend(_value(value) for value in function.value_info)
    stem = f"{function.domain}.{function.name}"
    copy.node.extend(_function_nodes(function.node, stem, taken))
    no_bodies: Iterator[dict[str, str]] = iter(())
    copy.attribute_proto.extend(_attribute(a, no_bodies, "") for a in function.attribute_proto)
    return copy


def _function_nodes(
    nodes: Iterable[onnx.NodeProto], stem: str, taken: set[str]
) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        name = _unique(f"{stem}/{node.name or node.op_type}", taken)
        yield _node(node, name, iter(_inner_names(node, name, taken)))


def _inner_names(node: onnx.NodeProto, stem: str, taken: set[str]) -> list[dict[str, str]]:
    """Names for the bodies inside a function's node, in the order in which they are copied."""
    found: list[dict[str, str]] = []
    for body in bodies_of(node):
        names: dict[str, str] = {}
        found.append(names)
        for at, inner in enumerate(body.node):
            name = _unique(f"{stem}/{inner.name or inner.op_type}", taken)
            names[str(at)] = name
            found += _inner_names(inner, name, taken)
    return found
