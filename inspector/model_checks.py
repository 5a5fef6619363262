"""What a model file may not say.

A file is somebody else's: every size, type and place it names is checked here, before anything is
allocated or opened. `model_files` goes through these checks; what does not hold is a ModelError.
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
import onnx.defs
from onnx import AttributeProto, TensorProto

from inspector.errors import ModelError
from inspector.model import DTYPES, PACKED_BITS, ExternalTensor, bodies_of, dtype_name, shown

# No tensor that can be compared is larger; numpy counts bytes in 63 bits and 64 dimensions.
_MAX_ELEMENTS = 2**38
_MAX_RANK = 64

EXPORT_AGAIN = "Export the model again, or check the file with `check-model FILE`."
_BESIDE = "Save the model again with its external data beside it."

# What holds a tensor: nothing (an initializer), "" and a name (a sparse one), or an attribute's
# name and its node's. Messages are made from it only where there is something to say.
Holder = tuple[str, ...]


@dataclass(kw_only=True, slots=True)
class Contents:
    """What one pass over a graph finds in it; checks go through these instead of the proto.

    Attributes:
        graph: the graph.
        bodies: contents of the bodies of its nodes, by position of the node.
        attributes: positions of nodes with attributes.
        tensors: its initializers and those in attributes, with what holds them.
    """

    graph: onnx.GraphProto
    bodies: dict[int, list[Contents]] = field(default_factory=dict)
    attributes: list[int] = field(default_factory=list)
    tensors: list[tuple[TensorProto, Holder]] = field(default_factory=list)

    def all(self) -> Iterator[Contents]:
        """This graph and all bodies inside it, outer ones first."""
        yield self
        for bodies in self.bodies.values():
            for body in bodies:
                yield from body.all()


# Attributes of these types hold neither tensors nor bodies.
_PLAIN_TYPES = frozenset(
    {
        *(AttributeProto.FLOAT, AttributeProto.INT, AttributeProto.STRING),
        *(AttributeProto.FLOATS, AttributeProto.INTS, AttributeProto.STRINGS),
    }
)


def contents_of(graph: onnx.GraphProto) -> Contents:
    found = Contents(graph=graph)
    found.tensors += [(tensor, ()) for tensor in graph.initializer]
    for sparse in graph.sparse_initializer:
        holder = ("", sparse.values.name)
        found.tensors += [(sparse.values, holder), (sparse.indices, holder)]
    for at, node in enumerate(graph.node):
        attributes = node.attribute
        if not attributes:
            continue
        found.attributes.append(at)
        for attribute in attributes:
            kind = attribute.type or _type_of_value(attribute)
            if kind in _PLAIN_TYPES:
                continue
            tensors: list[TensorProto] = []
            sparse_tensors: list[onnx.SparseTensorProto] = []
            if kind == AttributeProto.TENSOR:
                tensors.append(attribute.t)
            elif kind == AttributeProto.TENSORS:
                tensors += attribute.tensors
            elif kind == AttributeProto.SPARSE_TENSOR:
                sparse_tensors.append(attribute.sparse_tensor)
            elif kind == AttributeProto.SPARSE_TENSORS:
                sparse_tensors += attribute.sparse_tensors
            for sparse in sparse_tensors:
                tensors += [sparse.values, sparse.indices]
            found.tensors += [(tensor, (attribute.name, node.name)) for tensor in tensors]
        bodies = [contents_of(body) for body in bodies_of(node)]
        if bodies:
            found.bodies[at] = bodies
    return found


def _type_of_value(attribute: AttributeProto) -> int:
    """Sets the type that files of the first ONNX versions leave out; 0 where it cannot be told."""
    fields = {d.name for d, _ in attribute.ListFields()} & set(_TYPE_OF_FIELD)
    if len(fields) == 1:
        attribute.type = _TYPE_OF_FIELD[fields.pop()]
    return int(attribute.type)


# Attributes that this package reads, where ONNX does not define them (for an operator of another
# domain, or of a later opset than the file's); all of them are integers.
_INTEGER_ATTRIBUTES = frozenset(
    {
        *("K", "N", "accuracy_level", "axis", "bits", "block_size", "gather_axis", "quantize_axis"),
        *("output_dtype", "precision", "saturate"),
    }
)
_FIELD_OF_TYPE: dict[int, str] = {
    AttributeProto.FLOAT: "f",
    AttributeProto.INT: "i",
    AttributeProto.STRING: "s",
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    AttributeProto.TYPE_PROTO: "tp",
    AttributeProto.FLOATS: "floats",
    AttributeProto.INTS: "ints",
    AttributeProto.STRINGS: "strings",
    AttributeProto.TENSORS: "tensors",
    AttributeProto.GRAPHS: "graphs",
    AttributeProto.SPARSE_TENSORS: "sparse_tensors",
    AttributeProto.TYPE_PROTOS: "type_protos",
}
# Types whose value has no default to read in place of a missing one.
_SINGLE_FIELDS = frozenset(
    {
        *(AttributeProto.TENSOR, AttributeProto.GRAPH),
        *(AttributeProto.SPARSE_TENSOR, AttributeProto.TYPE_PROTO),
    }
)
_TYPE_OF_FIELD = {name: number for number, name in _FIELD_OF_TYPE.items()}


# How many inputs those operators have at least that are looked into although ONNX does not define
# them (in this version or domain); the first two must have names.
_CONTRIB_INPUTS = {
    "QuantizeLinear": 2,
    "DequantizeLinear": 2,
    "DynamicQuantizeLinear": 1,
    "MatMulNBits": 3,
    "GatherBlockQuantized": 3,
    "MatMulIntegerToFloat": 4,
    "DynamicQuantizeMatMul": 3,
    "DynamicQuantizeLSTM": 12,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ends:
    """The inputs or the outputs an operator has: how many, and which of them must have names."""

    least: int
    most: int = 2**31 - 1
    named: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Signature:
    """What a node of an operator may look like.

    Attributes:
        inputs, outputs: each of them.
        types: of the attributes it may have; others are not ONNX's business.
        required: attributes it must have.
    """

    inputs: _Ends
    outputs: _Ends
    types: Mapping[str, int] = field(default_factory=dict)
    required: tuple[str, ...] = ()


@lru_cache(maxsize=2048)
def _signature(op_type: str, domain: str, opset: int) -> _Signature:
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        least = _CONTRIB_INPUTS.get(op_type, 0)
        return _Signature(
            inputs=_Ends(least=least, named=tuple(range(least))[:2]), outputs=_Ends(least=1)
        )
    single = onnx.defs.OpSchema.FormalParameterOption.Single

    def ends(parameters: Sequence[Any], least: int, most: int) -> _Ends:
        named = tuple(at for at, each in enumerate(parameters) if each.option == single)
        return _Ends(least=least, most=most, named=named)

    return _Signature(
        inputs=ends(schema.inputs, schema.min_input, schema.max_input),
        # Where all are optional: without any it computes nothing.
        outputs=ends(schema.outputs, max(1, schema.min_output), schema.max_output),
        types={name: int(a.type.value) for name, a in schema.attributes.items()},
        required=tuple(name for name, a in schema.attributes.items() if a.required),
    )


def check_nodes(contents: Contents, proto: onnx.ModelProto, what: str) -> None:
    """Every node has the inputs, outputs and attributes that its operator must have.

    ONNX Runtime refuses any other; here it is said before anybody looks into the graph.
    """
    opsets = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in proto.opset_import}
    for each in contents.all():
        for node in each.graph.node:
            domain = "" if node.domain == "ai.onnx" else node.domain
            opset = min(max(opsets.get(domain, 1), 1), 2**31 - 1)
            signature = _signature(node.op_type, domain, opset)
            _check_ends(node, node.input, signature.inputs, "input", what)
            _check_ends(node, node.output, signature.outputs, "output", what)
            if node.attribute:
                _check_attributes(node, signature.types, what)
            if signature.required:
                there = {attribute.name for attribute in node.attribute}
                missing = [name for name in signature.required if name not in there]
                if missing:
                    raise _wrong(node, f"lacks the attribute {shown(missing[0])}", "one", what)


def _wrong(node: onnx.NodeProto, found: str, wanted: str, what: str) -> ModelError:
    return ModelError(
        f"{what}: node {shown(node.name)} ({node.op_type[:80]}) {found}, expected {wanted}",
        hint=EXPORT_AGAIN,
    )


def _check_ends(
    node: onnx.NodeProto, names: Sequence[str], ends: _Ends, kind: str, what: str
) -> None:
    if not ends.least <= len(names) <= ends.most:
        wanted = f"at least {ends.least}" if len(names) < ends.least else f"at most {ends.most}"
        raise _wrong(node, f"has {len(names)} {kind}s", wanted, what)
    for at in ends.named:
        if not names[at]:
            raise _wrong(node, f"leaves out its {kind} {at}", "a name", what)


def _check_attributes(node: onnx.NodeProto, expected: Mapping[str, int], what: str) -> None:
    seen: set[str] = set()
    for attribute in node.attribute:
        name, kind = attribute.name, attribute.type
        wanted = expected.get(name)
        if wanted is None and name in _INTEGER_ATTRIBUTES:
            wanted = AttributeProto.INT
        reference = attribute.ref_attr_name
        empty = kind in _SINGLE_FIELDS and not attribute.HasField(_FIELD_OF_TYPE[kind])
        if kind and not (reference or empty or name in seen) and wanted in (None, kind):
            seen.add(name)
            continue
        found = f"of type {AttributeProto.AttributeType.Name(kind)}"
        if empty:
            found = "without a value"
        elif reference:
            found = "a reference to an attribute of a function"
        elif name in seen:
            found = "given twice"
        if wanted is None:
            wanted = kind or AttributeProto.INT
        raise ModelError(
            f"{what}: attribute {shown(name)} of node {shown(node.name)} ({node.op_type[:80]}) is "
            f"{found}, expected one {AttributeProto.AttributeType.Name(wanted)}",
            hint=EXPORT_AGAIN,
        )


def called(tensor: TensorProto, holder: Holder) -> str:
    if not holder:
        return f"weight {shown(tensor.name)}"
    attribute, name = holder
    if not attribute:
        return f"sparse weight {shown(name)}"
    return f"attribute {shown(attribute)} of node {shown(name)}"


def element_count(tensor: TensorProto, holder: Holder, what: str) -> int:
    """How many elements a tensor claims, once its type and dimensions are found possible."""
    if tensor.data_type not in DTYPES:
        raise ModelError(
            f"{what}: {called(tensor, holder)} has element type {tensor.data_type}, expected one "
            f"of the {len(DTYPES)} that onnx {onnx.__version__} knows",
            hint=EXPORT_AGAIN,
        )
    dims = list(tensor.dims)
    # Zeros do not count here: a numpy array cannot have such a shape even where it is empty.
    large = math.prod(filter(None, dims)) > _MAX_ELEMENTS
    if large or len(dims) > _MAX_RANK or min(dims, default=0) < 0:
        text = " x ".join(map(str, dims[:8])) + (" …" if len(dims) > 8 else "")
        raise ModelError(
            f"{what}: {called(tensor, holder)} has the dimensions {text}, expected up to "
            f"{_MAX_RANK} that are not negative and make up at most {_MAX_ELEMENTS:,} elements",
            hint=EXPORT_AGAIN,
        )
    return math.prod(dims)


def byte_count(data_type: int, elements: int) -> int:
    bits = PACKED_BITS.get(data_type, DTYPES[data_type].itemsize * 8)
    return (elements * bits + 7) // 8


def check_tensor(tensor: TensorProto, holder: Holder, what: str) -> None:
    elements = element_count(tensor, holder, what)
    kind = tensor.data_type
    if tensor.HasField("segment"):
        raise ModelError(
            f"{what}: {called(tensor, holder)} is stored in segments, expected one piece",
            hint=EXPORT_AGAIN,
        )
    if tensor.HasField("raw_data") and kind != TensorProto.STRING:
        found, wanted, unit = len(tensor.raw_data), byte_count(kind, elements), "bytes"
    else:
        found = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(kind)))
        wanted, unit = elements, "values"
        if kind in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
            wanted *= 2
        elif PACKED_BITS.get(kind) in (2, 4):
            wanted = byte_count(kind, elements)
    if found != wanted:
        raise ModelError(
            f"{what}: {called(tensor, holder)} holds {found:,} {unit}, expected {wanted:,} for "
            f"{' x '.join(map(str, tensor.dims)) or 'one element'} of {dtype_name(kind)}",
            hint=EXPORT_AGAIN,
        )


def check_ends(graph: onnx.GraphProto, what: str) -> None:
    for value in chain(graph.input, graph.output):
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim if d.HasField("dim_value")]
        if math.prod(max(d, 1) for d in dims) > _MAX_ELEMENTS or len(dims) > _MAX_RANK:
            text = " x ".join(map(str, dims[:8])) + (" …" if len(dims) > 8 else "")
            raise ModelError(
                f"{what}: its input or output {shown(value.name)} has the dimensions {text}, "
                f"expected at most {_MAX_ELEMENTS:,} elements",
                hint=EXPORT_AGAIN,
            )


# -- external data -----------------------------------------------------------------------------


def external_places(
    contents: Contents, path: Path
) -> list[tuple[TensorProto, ExternalTensor, bool]]:
    """The tensors with external data, where these lie, and if they are the main graph's weights.

    Args:
        contents: of the main graph.
        path: the model's file, in whose folder all of them have to be.

    Raises:
        ModelError: a file is missing, no plain file, outside the folder, or of another size.
    """
    tensors = [
        (tensor, holder, each is contents and not holder)
        for each in contents.all()
        for tensor, holder in each.tensors
        if tensor.data_location == TensorProto.EXTERNAL
    ]
    files: dict[str, Path] = {}
    for tensor, holder, _ in tensors:
        location = external_entries(tensor).get("location", "")
        if location not in files:
            files[location] = _data_file(location, path, called(tensor, holder))
    return [(t, _place(t, holder, path, files), main) for t, holder, main in tensors]


def external_entries(tensor: TensorProto) -> dict[str, str]:
    """What a tensor says about its external data; the last of each key counts."""
    return {
        key: value
        for key, value in ((e.key, e.value) for e in tensor.external_data)
        if isinstance(key, str) and isinstance(value, str)
    }


def _data_file(location: str, path: Path, tensor: str) -> Path:
    """The file at a location, which must be a plain one in the model's folder."""
    what = path.name
    pure = PurePosixPath(location)
    # A star is what ONNX Runtime begins its own marks for addresses in memory with.
    suspect = re.match(r"[A-Za-z]:|\*", location) or re.search(r"[\\\x00-\x1f\x7f]", location)
    escapes = ModelError(
        f"{what}: {tensor} names external data {shown(location)}, "
        "which lies outside the model's folder, expected a file beside it",
        hint=_BESIDE,
    )
    if not location or suspect or pure.is_absolute() or ".." in pure.parts:
        raise escapes
    try:
        folder = path.parent.resolve()
        target = (folder / location).resolve()
        if folder not in target.parents:
            raise escapes
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelError(
            f"{what}: its external data {shown(location)} is missing from the folder",
            hint=f"Put {location[:80]} beside {what} and load it again.",
        ) from error
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ModelError(
            f"{what}: its external data {shown(location)} cannot be read: {error}"[:300],
            hint=_BESIDE,
        ) from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise ModelError(
            f"{what}: {tensor} names external data {shown(location)}, which is {kind}, "
            "expected a file",
            hint=_BESIDE,
        )
    return target


def _place(
    tensor: TensorProto, holder: Holder, path: Path, files: Mapping[str, Path]
) -> ExternalTensor:
    where = f"{path.name}: external data of {called(tensor, holder)}"
    elements = element_count(tensor, holder, path.name)
    if tensor.data_type == TensorProto.STRING:
        raise ModelError(f"{where} are strings, expected numbers", hint=_BESIDE)
    entries = external_entries(tensor)
    numbers: dict[str, int] = {}
    for key in ("offset", "length"):
        text = entries.get(key, "")
        if text and not re.fullmatch(r"[0-9]{1,18}", text):
            raise ModelError(
                f"{where} have the {key} {shown(text)}, expected a whole number from 0",
                hint=_BESIDE,
            )
        if text:
            numbers[key] = int(text)
    need = byte_count(tensor.data_type, elements)
    file = files[entries["location"]]
    offset, length = numbers.get("offset", 0), numbers.get("length", need)
    size = file.stat().st_size
    if length != need or offset + need > size:
        raise ModelError(
            f"{where} are {length:,} bytes from {offset:,} of {shown(entries['location'])} "
            f"({size:,} bytes), expected {need:,} bytes within the file for "
            f"{' x '.join(map(str, tensor.dims)) or 'one element'} of "
            f"{dtype_name(tensor.data_type)}",
            hint="Copy the model and its external data again; they do not belong together.",
        )
    return ExternalTensor(
        name=tensor.name,
        file=file,
        offset=offset,
        length=need,
        dtype=dtype_name(tensor.data_type),
        shape=tuple(tensor.dims),
    )
