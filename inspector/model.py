"""The one door to ONNX files.

A `Model` is a private, read-only view of one file: nodes have unique non-empty names, external
data are read in, and look-ups by tensor or node are dictionaries. The user's file is never
written. What had to be changed in the private copy is said in `Model.notes`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx.external_data_helper
import onnx.numpy_helper
import onnx.shape_inference
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from inspector.errors import ModelError

MAX_OPSET: int = onnx.defs.onnx_opset_version()
FLOAT_DTYPES = frozenset({"float16", "bfloat16", "float32", "float64"})

# The first bytes of files that people hand over by mistake, and what each of them is.
_SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"version https://git-lfs", "a Git LFS pointer",
     "Run `git lfs pull` and load the file again."),
    (0, b"PK\x03\x04", "a zip archive (a PyTorch checkpoint or a packed model)",
     "Export the model to ONNX, or unpack the archive and load the .onnx file in it."),
    (4, b"TFL3", "a TensorFlow Lite model", "Convert it to ONNX with tf2onnx and load the result."),
    (0, b"\x80\x02", "a Python pickle", "Export the model to ONNX and load the .onnx file."),
    (0, b"\x89HDF", "an HDF5 file",
     "Convert the Keras model to ONNX with tf2onnx and load the result."),
    (4, b"ORTM", "an ORT-format model", "Load the .onnx file it was converted from."),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """Name, element type and shape of a tensor.

    Attributes:
        name: the tensor's name.
        dtype: numpy's name of the element type (``"float32"``, ``"int64"``, ``"string"``,
            ``"bfloat16"`` …); ``"unknown"`` where it cannot be inferred.
        shape: dimensions, None or a symbol where dynamic; None where the rank is unknown.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One node of the main graph.

    Attributes:
        index: position in the file, which is a topological order.
        name: unique and not empty.
        op_type: e.g. ``"Conv"``.
        domain: ``""`` for ai.onnx.
        inputs: tensor names; ``""`` for an absent optional input.
        outputs: tensor names.
        captured: tensors of the main graph that bodies of If, Loop or Scan read.
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


def _dtype_name(elem_type: int) -> str:
    if elem_type == 0:
        return "unknown"
    if elem_type == onnx.TensorProto.STRING:
        return "string"
    return str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type)).name)


def _tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    shape: tuple[int | str | None, ...] | None = None
    if tensor.HasField("shape"):
        shape = tuple(
            d.dim_value if d.HasField("dim_value") else (d.dim_param or None)
            for d in tensor.shape.dim
        )
    return TensorInfo(name=value.name, dtype=_dtype_name(tensor.elem_type), shape=shape)


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _captured(graph: onnx.GraphProto) -> Iterator[str]:
    own = {i.name for i in graph.initializer} | {i.name for i in graph.input}
    own.update(output for node in graph.node for output in node.output)
    for node in graph.node:
        for name in (*node.input, *(n for body in _bodies(node) for n in _captured(body))):
            if name and name not in own:
                yield name
    for output in graph.output:
        if output.name not in own:
            yield output.name


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.type == onnx.AttributeProto.TENSOR:
        return onnx.numpy_helper.to_array(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if attribute.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS):
        return tuple(value)
    return value


class Model:
    """A private, read-only view of one ONNX file.

    Attributes:
        proto: the model with unique node names and external data read in. Do not change it.
        path: where it was loaded from; None for one made in memory.
        sha256: of the file's bytes followed by those of its external data.
        size_bytes: size of the file and its external data.
        notes: what was changed in the private copy, one sentence each.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        *,
        path: Path | None = None,
        sha256: str = "",
        size_bytes: int = 0,
    ) -> None:
        self.proto = proto
        self.path = path
        self.sha256 = sha256
        self.size_bytes = size_bytes
        self.notes: tuple[str, ...] = _name_nodes(proto)

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
    def nodes(self) -> tuple[Node, ...]:
        """The nodes of the main graph in file order."""
        nodes = []
        for index, node in enumerate(self.proto.graph.node):
            captured = dict.fromkeys(n for body in _bodies(node) for n in _captured(body))
            nodes.append(
                Node(
                    index=index,
                    name=node.name,
                    op_type=node.op_type,
                    domain="" if node.domain == "ai.onnx" else node.domain,
                    inputs=tuple(node.input),
                    outputs=tuple(node.output),
                    captured=tuple(captured),
                    attributes={
                        a.name: _attribute(a)
                        for a in node.attribute
                        if a.type not in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
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
    def _initializers(self) -> dict[str, onnx.TensorProto]:
        return {i.name: i for i in self.proto.graph.initializer}

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
    def tensor_infos(self) -> dict[str, TensorInfo]:
        """Type and shape by tensor name, as far as ONNX's shape inference can tell."""
        graph = self.proto.graph
        known = [*graph.input, *graph.output, *graph.value_info]
        if self.proto.ByteSize() < 2**31 - 1:
            try:
                inferred = onnx.shape_inference.infer_shapes(self.proto, data_prop=True).graph
                known += [*inferred.value_info, *inferred.output]
            except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
                # A model that ONNX cannot infer may still run: types stay "unknown".
                pass
        infos = {value.name: _tensor_info(value) for value in known}
        for name, tensor in self._initializers.items():
            infos[name] = TensorInfo(
                name=name, dtype=_dtype_name(tensor.data_type), shape=tuple(tensor.dims)
            )
        return infos

    def info(self, tensor: str) -> TensorInfo:
        """Type and shape of a tensor, ``"unknown"`` and None where they cannot be inferred."""
        return self.tensor_infos.get(tensor) or TensorInfo(name=tensor, dtype="unknown", shape=None)

    @cached_property
    def constant_names(self) -> frozenset[str]:
        """Initializers and outputs of Constant nodes."""
        outputs = (n.outputs[0] for n in self.nodes if n.op_type == "Constant")
        return frozenset(self._initializers).union(outputs)

    def constant(self, tensor: str) -> NDArray[Any] | None:
        """The value of an initializer or Constant node; None for any other tensor."""
        if tensor in self._initializers:
            return np.asarray(onnx.numpy_helper.to_array(self._initializers[tensor]))
        node = self.producers.get(tensor)
        if node is None or node.op_type != "Constant":
            return None
        for key, dtype in (
            ("value", None),
            ("value_float", np.float32),
            ("value_floats", np.float32),
            ("value_int", np.int64),
            ("value_ints", np.int64),
        ):
            if key in node.attributes:
                return np.asarray(node.attributes[key], dtype)
        return None

    def with_outputs(self, tensors: Iterable[str]) -> onnx.ModelProto:
        """A copy whose graph outputs are the model's own plus `tensors`, in that order."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        have = {o.name for o in proto.graph.output}
        for name in dict.fromkeys(tensors):
            if name not in have:
                proto.graph.output.add(name=name)
        return proto


def _name_nodes(proto: onnx.ModelProto) -> tuple[str, ...]:
    """Gives every node of the main graph a unique non-empty name; returns what was changed."""
    taken: set[str] = set()
    unnamed = duplicated = 0
    later: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        if not node.name:
            unnamed += 1
            later.append(node)
        elif node.name in taken:
            duplicated += 1
            later.append(node)
        taken.add(node.name)
    for node in later:
        output = next((o for o in node.output if o), str(len(taken)))
        stem = name = f"{node.name or node.op_type}_{output}"
        counter = 2
        while name in taken:
            name = f"{stem}_{counter}"
            counter += 1
        node.name = name
        taken.add(name)
    notes = []
    if unnamed:
        notes.append(
            f"{unnamed} of {len(proto.graph.node)} nodes have no name; "
            "they are called <op type>_<first output> here"
        )
    if duplicated:
        notes.append(
            f"{duplicated} of {len(proto.graph.node)} nodes share a name with another; "
            "they are called <name>_<first output> here"
        )
    return tuple(notes)


def _what_is_it(head: bytes) -> tuple[str, str]:
    for offset, magic, what, hint in _SIGNATURES:
        if head[offset : offset + len(magic)] == magic:
            return what, hint
    if head.lstrip()[:1] == b"<":
        return "an HTML or XML page", "Download the file itself, not the page that shows it."
    return "of no known kind", "Load a file written by an ONNX exporter (it usually ends in .onnx)."


def load_model(path: str | os.PathLike[str]) -> Model:
    """The model in a file, with its external data.

    Raises:
        ModelError: the file is missing, empty, truncated, of another kind, of an opset newer than
            this installation knows, or its external data are missing or outside its folder.
    """
    path = Path(path)
    shown = path.name or str(path)
    if path.is_dir():
        raise ModelError(
            f"{shown} is a folder, expected an ONNX file", hint="Name the .onnx file in it."
        )
    if not path.exists():
        raise ModelError(f"{path} does not exist", hint="Check the path and its spelling.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{shown} cannot be read: {error.strerror}", hint="Check the file's permissions."
        ) from error
    if not data:
        raise ModelError(
            f"{shown} is empty (0 bytes), expected an ONNX model",
            hint="Export or download the file again.",
        )
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        what, hint = _what_is_it(data[:512])
        if what == "of no known kind" and data[:1] == b"\x08" and len(data) > 16:
            what, hint = (
                f"a truncated or damaged ONNX model ({len(data):,} bytes)",
                "Export or download the file again.",
            )
        raise ModelError(f"{shown} is {what}, expected an ONNX model", hint=hint) from error
    if not proto.HasField("graph") or not proto.opset_import:
        what, hint = _what_is_it(data[:512])
        raise ModelError(f"{shown} is {what}, expected an ONNX model", hint=hint)
    if not proto.graph.node:
        raise ModelError(
            f"{shown} has a graph without nodes", hint="Export the model again with its graph."
        )
    for opset in proto.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > MAX_OPSET:
            raise ModelError(
                f"{shown} uses ai.onnx opset {opset.version}; "
                f"this installation knows up to {MAX_OPSET} (onnx {onnx.__version__})",
                hint=f"Export the model with opset_version={min(MAX_OPSET, 21)} or lower.",
            )
    digest = hashlib.sha256(data)
    size = len(data)
    for part in _load_external_data(proto, path).values():
        digest.update(part.read_bytes())
        size += part.stat().st_size
    return Model(proto, path=path, sha256=digest.hexdigest(), size_bytes=size)


def _external_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    def outside(tensor: onnx.TensorProto) -> bool:
        return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)

    yield from filter(outside, graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            yield from filter(outside, (attribute.t, *attribute.tensors))
        for body in _bodies(node):
            yield from _external_tensors(body)


def external_files(proto: onnx.ModelProto, path: Path) -> dict[str, Path]:
    """The external-data files a model names, by location, in order of first use.

    Raises:
        ModelError: one is missing, or lies outside the model's folder.
    """
    found: dict[str, Path] = {}
    folder = path.parent.resolve()
    for tensor in _external_tensors(proto.graph):
        location = next((e.value for e in tensor.external_data if e.key == "location"), "")
        if location in found:
            continue
        target = (folder / location).resolve()
        if not location or folder not in target.parents:
            raise ModelError(
                f"{path.name}: weight {tensor.name!r} names external data {location!r}, "
                "which lies outside the model's folder",
                hint="Save the model again with its external data beside it.",
            )
        if not target.is_file():
            raise ModelError(
                f"{path.name}: its external data {location!r} is missing from the folder",
                hint=f"Put {location} beside {path.name} and load it again.",
            )
        found[location] = target
    return found


def _load_external_data(proto: onnx.ModelProto, path: Path) -> dict[str, Path]:
    found = external_files(proto, path)
    if not found:
        return found
    for tensor in _external_tensors(proto.graph):
        try:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise ModelError(
                f"{path.name}: external data of weight {tensor.name!r} cannot be read: {error}",
                hint="Save the model again with its external data beside it.",
            ) from error
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    return found


def save_model(model: Model, path: str | os.PathLike[str]) -> None:
    """Writes the private copy to `path`, atomically; over 2 GB with external data beside it."""
    write_proto(model.proto, Path(path))


def write_proto(proto: onnx.ModelProto, path: Path) -> None:
    """Writes a model so that `path` holds all of it or what it held before."""
    if proto.ByteSize() >= 2**31 - 1:
        onnx.save_model(proto, path, save_as_external_data=True, location=f"{path.name}.data")
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".part-", delete=False) as part:
        part.write(proto.SerializeToString())
    os.replace(part.name, path)
