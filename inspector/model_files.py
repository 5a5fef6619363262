"""Model files: read into a `Model`, and written.

The user's file is never written. A file is somebody else's: nothing it says is believed before
`model_checks` has looked at it. Local functions are inlined, sparse tensors made dense and nodes
sorted in the private copy, so that nobody else has to know of them.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx.inliner
import onnx.numpy_helper
from google.protobuf.message import DecodeError, EncodeError
from onnx import AttributeProto, TensorProto

from inspector.errors import ModelError
from inspector.model import (
    ONNX_ERRORS,
    PROTO_BYTES,
    ExternalTensor,
    Model,
    array_of,
    bodies_of,
    bytes_at,
    forget_place,
    shown,
)
from inspector.model_checks import (
    EXPORT_AGAIN,
    Contents,
    Holder,
    byte_count,
    called,
    check_ends,
    check_nodes,
    check_tensor,
    contents_of,
    element_count,
    external_entries,
    external_places,
)

MAX_OPSET: int = onnx.defs.onnx_opset_version()

# External data stay on disk where a file's tensors together hold more than this. Smaller models
# are read in, so that everything that takes a whole proto works on them.
INSIDE_BYTES = 2**29
# External tensors up to this size are read in all the same: shapes and axes are among them.
_SMALL_BYTES = 1024
# Sparse tensors are made dense, all of them together, and functions are inlined up to these sizes.
_MAX_DENSE_BYTES = 2**28
_MAX_INLINED_NODES = 1_000_000
_MAX_CALL_DEPTH = 100
_BLOCK_BYTES = 2**22

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


def _what_is_it(head: bytes) -> tuple[str, str]:
    for offset, magic, what, hint in _SIGNATURES:
        if head[offset : offset + len(magic)] == magic:
            return what, hint
    if head.lstrip()[:1] == b"<":
        return "an HTML or XML page", "Download the file itself, not the page that shows it."
    return "of no known kind", "Load a file written by an ONNX exporter (it usually ends in .onnx)."


def _file_bytes(path: Path, what: str) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ModelError(
                f"{what} is a folder, expected an ONNX file", hint="Name the .onnx file in it."
            )
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(
                f"{what} is a pipe or a device, expected an ONNX file",
                hint="Write the model to a file and name that.",
            )
        if status.st_size > PROTO_BYTES:
            what_else, hint = _what_is_it(_head(path))
            if what_else == "of no known kind":
                what_else = f"{status.st_size:,} bytes large; one protobuf holds {PROTO_BYTES:,}"
                hint = "Save the model with its weights outside (`save_as_external_data=True`)."
            raise ModelError(f"{what} is {what_else}, expected an ONNX model", hint=hint)
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelError(
            f"{path} does not exist", hint="Check the path and its spelling."
        ) from error
    except OSError as error:
        raise ModelError(
            f"{what} cannot be read: {error.strerror}", hint="Check the file's permissions."
        ) from error
    except ValueError as error:  # a path with a zero character
        raise ModelError(
            f"{shown(what)} is no path: {error}", hint="Check the path and its spelling."
        ) from error
    if not data:
        raise ModelError(
            f"{what} is empty (0 bytes), expected an ONNX model",
            hint="Export or download the file again.",
        )
    return data


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def _parsed(data: bytes, what: str) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        if "MaxDepth" in str(error):
            raise ModelError(
                f"{what} nests bodies or types deeper than a protobuf may (100 levels of messages)",
                hint="Export the model again with fewer If, Loop or Scan inside each other.",
            ) from error
        kind, hint = _what_is_it(data[:512])
        if kind == "of no known kind" and data[:1] == b"\x08" and len(data) > 16:
            kind, hint = (
                f"a truncated or damaged ONNX model ({len(data):,} bytes)",
                "Export or download the file again.",
            )
        raise ModelError(f"{what} is {kind}, expected an ONNX model", hint=hint) from error
    if not proto.HasField("graph") or not proto.opset_import:
        kind, hint = _what_is_it(data[:512])
        raise ModelError(f"{what} is {kind}, expected an ONNX model", hint=hint)
    if not proto.graph.node:
        raise ModelError(
            f"{what} has a graph without nodes", hint="Export the model again with its graph."
        )
    for opset in proto.opset_import:
        if opset.domain in ("", "ai.onnx") and not 1 <= opset.version <= MAX_OPSET:
            raise ModelError(
                f"{what} uses ai.onnx opset {opset.version}; "
                f"this installation knows up to {MAX_OPSET} (onnx {onnx.__version__})",
                hint=f"Export the model with opset_version={min(MAX_OPSET, 21)} or lower.",
            )
    return proto


def load_model(path: str | os.PathLike[str], *, inside_bytes: int = INSIDE_BYTES) -> Model:
    """The model in a file.

    Weights in external data stay on disk where all of a file's external tensors together hold more
    than `inside_bytes`; `Model.external` says which. Local functions are inlined, sparse tensors
    made dense and nodes sorted in the private copy; `Model.notes` says so.

    Args:
        path: the .onnx file.
        inside_bytes: up to how many bytes external data are read in.

    Raises:
        ModelError: the file is missing, empty, truncated, of another kind, of an opset newer than
            this installation knows, contradicts itself, or its external data are missing, outside
            its folder or of another size than it says.
    """
    path = Path(path)
    what = path.name or str(path)
    data = _file_bytes(path, what)
    proto = _parsed(data, what)
    digest, size = hashlib.sha256(data), len(data)
    del data
    notes: list[str] = []
    if proto.training_info:
        del proto.training_info[:]
        notes.append("the graph for training is left out")
    contents = contents_of(proto.graph)
    if _has_broken_text(proto, contents):
        _decode_fields(proto)
        contents = contents_of(proto.graph)
        notes.append("names that are not UTF-8 are written with \\x escapes here")
    if proto.functions:
        _inline_functions(proto, contents, what, notes)
        contents = contents_of(proto.graph)
    check_nodes(contents, proto, what)
    external, files = _take_external_data(contents, path, inside_bytes)
    for file in files:
        with file.open("rb") as part:
            while block := part.read(_BLOCK_BYTES):
                digest.update(block)
                size += len(block)
    for part_of in contents.all():
        for tensor, holder in part_of.tensors:
            if tensor.data_location == TensorProto.DEFAULT:
                check_tensor(tensor, holder, what)
    _make_dense(contents, what, notes)
    for part_of in contents.all():
        _drop_repeated_initializers(part_of.graph, notes)
    external = {
        tensor.name: external[tensor.name]
        for tensor in proto.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    }
    check_ends(proto.graph, what)
    missing = _order(contents, what, notes)
    if missing:
        raise ModelError(
            f"{what}: nothing gives the tensor {shown(missing[0])}, which a node reads or which is "
            f"an output ({len(missing):,} such tensors), expected a node, an input or a weight",
            hint=EXPORT_AGAIN,
        )
    return Model(
        proto, path=path, sha256=digest.hexdigest(), size_bytes=size, external=external, notes=notes
    )


# -- what is changed in the private copy -------------------------------------------------------


def _has_broken_text(proto: onnx.ModelProto, contents: Contents) -> bool:
    """Some name is not UTF-8: protobuf returns those as bytes."""
    texts: list[str | bytes] = [proto.producer_name, proto.producer_version]
    texts += [o.domain for o in proto.opset_import]
    nodes: list[Iterable[onnx.NodeProto]] = []
    for function in proto.functions:
        texts += [function.name, function.domain, *function.input, *function.output]
        nodes.append(function.node)
    for each in contents.all():
        graph = each.graph
        for value in chain(graph.input, graph.output, graph.value_info):
            texts.append(value.name)
            texts += [d.dim_param for d in value.type.tensor_type.shape.dim]
        texts += [tensor.name for tensor, _ in each.tensors]
        texts += [a.name for at in each.attributes for a in graph.node[at].attribute]
        nodes.append(graph.node)
    for node in chain.from_iterable(nodes):
        texts += node.input
        texts += node.output
        texts += (node.name, node.op_type, node.domain)
    return bytes in set(map(type, texts))


def _decode_fields(message: Any) -> None:
    for descriptor, value in message.ListFields():
        if descriptor.type == descriptor.TYPE_STRING:
            if isinstance(value, bytes):
                setattr(message, descriptor.name, value.decode("utf-8", "backslashreplace"))
            elif not isinstance(value, str):
                for at, each in enumerate(value):
                    if isinstance(each, bytes):
                        value[at] = each.decode("utf-8", "backslashreplace")
        elif descriptor.type == descriptor.TYPE_MESSAGE:
            for each in [value] if hasattr(value, "ListFields") else value:
                _decode_fields(each)


def _inline_functions(
    proto: onnx.ModelProto, contents: Contents, what: str, notes: list[str]
) -> None:
    """Puts what local functions compute in place of their calls."""
    hint = "Export the model without local functions, or inline them with `onnx.inliner`."
    bodies = {(f.domain, f.name, f.overload): f.node for f in proto.functions}
    sizes: dict[tuple[str, str, str], tuple[int, int, int]] = {}
    too_deep = ModelError(
        f"{what}: its functions call each other over {_MAX_CALL_DEPTH} levels deep", hint=hint
    )

    def size(
        nodes: Iterable[onnx.NodeProto], callers: Sequence[tuple[str, str, str]], depth: int
    ) -> tuple[int, int, int]:
        """Nodes, bytes and levels once inlined; a body is a level, too."""
        count = held = levels = 0
        if depth > _MAX_CALL_DEPTH:
            raise too_deep
        for node in nodes:
            key = (node.domain, node.op_type, node.overload)
            parts = [(1, node.ByteSize(), 0)]
            if key in callers:
                raise ModelError(
                    f"{what}: its function {shown(node.op_type)} calls itself", hint=hint
                )
            if key in bodies:
                if key not in sizes:
                    sizes[key] = size(bodies[key], (*callers, key), depth + 1)
                parts.append(sizes[key])
            parts += [size(body.node, callers, depth + 1) for body in bodies_of(node)]
            count += sum(part[0] for part in parts)
            held += sum(part[1] for part in parts)
            levels = max(levels, *(part[2] for part in parts))
        if depth + levels > _MAX_CALL_DEPTH:
            raise too_deep
        return count, held, levels + 1

    calls = sum(
        (n.domain, n.op_type, n.overload) in bodies for c in contents.all() for n in c.graph.node
    )
    count, held, _ = size(proto.graph.node, (), 0)
    for found, most, unit in ((count, _MAX_INLINED_NODES, "nodes"), (held, PROTO_BYTES, "bytes")):
        if found > most:
            raise ModelError(
                f"{what} has {found:,} {unit} once its functions are inlined; "
                f"at most {most:,} are read",
                hint=hint,
            )
    try:
        inlined = onnx.inliner.inline_local_functions(proto)
        if inlined.functions:
            # Those of another opset; the conversion needs types that not all files tell.
            inlined = onnx.inliner.inline_local_functions(proto, convert_version=True)
    except ONNX_ERRORS as error:
        raise ModelError(
            f"{what}: its local functions cannot be inlined: {' '.join(str(error).split())}"[:1000],
            hint=hint,
        ) from error
    if inlined.functions:
        left = ", ".join(shown(f.name) for f in inlined.functions[:3])
        raise ModelError(
            f"{what}: its local functions {left} cannot be inlined: they need another opset",
            hint=hint,
        )
    proto.CopyFrom(inlined)
    if calls:
        notes.append(
            f"{calls} calls of local functions are inlined; "
            "their nodes have names that the file does not have"
        )


def _dense(sparse: onnx.SparseTensorProto, holder: Holder, left: int, what: str) -> TensorProto:
    """A sparse tensor as a dense one of at most `left` bytes."""
    dims = TensorProto(data_type=sparse.values.data_type, dims=sparse.dims)
    elements = element_count(dims, holder, what)
    where = f"{what}: {called(dims, holder)}"
    values, indices = array_of(sparse.values), array_of(sparse.indices)
    size = byte_count(dims.data_type, elements)
    if size > left or dims.data_type == TensorProto.STRING:
        raise ModelError(
            f"{where} is sparse and takes {size:,} bytes when dense, expected numbers of at most "
            f"{_MAX_DENSE_BYTES:,} bytes in all such weights together",
            hint="Export the model with dense weights.",
        )
    shape = tuple(dims.dims)
    linear = indices.ndim == 1 and indices.size == values.size
    tuples = indices.shape == (values.size, len(shape))
    if values.ndim != 1 or indices.dtype != np.int64 or not (linear or tuples):
        raise ModelError(
            f"{where} is sparse with {values.size} values and indices {indices.dtype} "
            f"{indices.shape}, expected int64 indices ({values.size},) or "
            f"{(values.size, len(shape))}",
            hint=EXPORT_AGAIN,
        )
    limits = np.array([elements] if linear else shape, np.int64)
    if np.any(indices < 0) or np.any(indices >= limits):
        raise ModelError(
            f"{where} is sparse with an index outside its shape {shape}", hint=EXPORT_AGAIN
        )
    dense = np.zeros(shape, values.dtype)
    if linear:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return onnx.numpy_helper.from_array(dense, sparse.values.name)


def _make_dense(contents: Contents, what: str, notes: list[str]) -> None:
    count, left = 0, _MAX_DENSE_BYTES
    for graph in (each.graph for each in contents.all()):
        for sparse in graph.sparse_initializer:
            dense = _dense(sparse, ("", sparse.values.name), left, what)
            graph.initializer.append(dense)
            count, left = count + 1, left - len(dense.raw_data)
        del graph.sparse_initializer[:]
        for node in graph.node:
            for attribute in node.attribute if node.op_type == "Constant" else ():
                if attribute.type == AttributeProto.SPARSE_TENSOR:
                    holder = (attribute.name, node.name)
                    dense = _dense(attribute.sparse_tensor, holder, left, what)
                    attribute.CopyFrom(onnx.helper.make_attribute("value", dense))
                    count, left = count + 1, left - len(dense.raw_data)
    if count:
        notes.append(f"{count} sparse tensors are made dense")


def _drop_repeated_initializers(graph: onnx.GraphProto, notes: list[str]) -> None:
    last = {tensor.name: at for at, tensor in enumerate(graph.initializer)}
    repeated = len(graph.initializer) - len(last)
    if repeated:
        kept = [graph.initializer[at] for at in sorted(last.values())]
        copies = []
        for tensor in kept:
            copies.append(TensorProto())
            copies[-1].CopyFrom(tensor)
        del graph.initializer[:]
        graph.initializer.extend(copies)
        notes.append(
            f"{repeated} initializers repeat the name of another; "
            "the last of each name counts, as in ONNX Runtime"
        )


def _order(contents: Contents, what: str, notes: list[str]) -> list[str]:
    """Checks that each tensor has one source, and sorts nodes that stand before their inputs.

    Returns:
        The tensors of the graphs around it that it reads.
    """
    graph = contents.graph
    own = {i.name for i in graph.initializer}
    inputs = [i.name for i in graph.input]
    own.update(inputs)
    made_by: dict[str, int] = {}
    for at, node in enumerate(graph.node):
        for name in node.output:
            if name and (name in made_by or name in own):
                other = "an input or a weight"
                if name in made_by:
                    other = f"node {shown(graph.node[made_by[name]].name)}"
                raise ModelError(
                    f"{what}: tensor {shown(name)} is computed by node {shown(node.name)} and is "
                    f"that of {other} as well, expected one source",
                    hint=EXPORT_AGAIN,
                )
            if name:
                made_by[name] = at
    name, times = max(Counter(inputs).items(), key=lambda item: item[1], default=("", 0))
    if times > 1:
        raise ModelError(
            f"{what}: input {shown(name)} is listed twice, expected one", hint=EXPORT_AGAIN
        )
    outer: dict[str, None] = {}
    reads: list[set[int]] = []
    is_sorted = True
    for at, node in enumerate(graph.node):
        names = list(node.input)
        for body in contents.bodies.get(at, ()):
            names += _order(body, what, notes)
        sources: set[int] = set()
        for name in names:
            if name in made_by:
                sources.add(made_by[name])
                is_sorted = is_sorted and made_by[name] < at
            elif name and name not in own:
                outer[name] = None
        reads.append(sources)
    if not is_sorted:
        _sort(graph, reads, what)
        notes.append("nodes that stand before a node they read from are sorted")
    for output in graph.output:
        if output.name not in own and output.name not in made_by:
            outer[output.name] = None
    return list(outer)


def _sort(graph: onnx.GraphProto, reads: Sequence[set[int]], what: str) -> None:
    """Sorts nodes topologically, in file order where that is free."""
    waiting = [len(sources) for sources in reads]
    readers: dict[int, list[int]] = {}
    for at, sources in enumerate(reads):
        for source in sources:
            readers.setdefault(source, []).append(at)
    ready = [at for at, count in enumerate(waiting) if not count]
    order: list[int] = []
    while ready:
        at = heapq.heappop(ready)
        order.append(at)
        for reader in readers.get(at, ()):
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(reads):
        # Going from a node that still waits to one it waits for ends up on the cycle.
        at, seen = next(a for a, count in enumerate(waiting) if count), set[int]()
        while at not in seen:
            seen.add(at)
            at = next(source for source in sorted(reads[at]) if waiting[source])
        node = graph.node[at]
        raise ModelError(
            f"{what}: node {shown(node.name)} ({node.op_type[:80]}) reads from itself through "
            "other nodes, expected a graph without cycles",
            hint=EXPORT_AGAIN,
        )
    nodes = []
    for at in order:
        nodes.append(onnx.NodeProto())
        nodes[-1].CopyFrom(graph.node[at])
    del graph.node[:]
    graph.node.extend(nodes)


def _take_external_data(
    contents: Contents, path: Path, inside_bytes: int
) -> tuple[dict[str, ExternalTensor], list[Path]]:
    """Reads external data in, or checks that they can be read later.

    Returns:
        Initializers of the main graph that stayed outside, and all files in order of first use.
    """
    places = external_places(contents, path)
    large = sum(place.length for _, place, _ in places) > inside_bytes
    external: dict[str, ExternalTensor] = {}
    taken = 0
    for tensor, place, main in places:
        if large and main and place.length > _SMALL_BYTES:
            external[tensor.name] = place
            # Only what was checked is left for ONNX Runtime to read.
            location = external_entries(tensor)["location"]
            _set_place(tensor, location, place.offset, place.length)
            continue
        taken += place.length
        if taken > PROTO_BYTES // 2:
            raise ModelError(
                f"{path.name} names over {PROTO_BYTES // 2:,} bytes of external data in bodies and "
                "attributes, which have to be read in",
                hint="Keep large weights among the initializers of the main graph.",
            )
        tensor.raw_data = bytes_at(place, path.name).tobytes()
        forget_place(tensor)
    return external, list(dict.fromkeys(place.file for _, place, _ in places))


def _set_place(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


# -- writing -----------------------------------------------------------------------------------


def save_model(model: Model, path: str | os.PathLike[str]) -> None:
    """Writes the private copy to `path`, atomically.

    What stayed outside is copied in blocks to ``<name>.data`` beside it.
    """
    path = Path(path)
    if not model.external:
        write_proto(model.proto, path)
        return
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    data = f"{path.name}.data"
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".part-", delete=False) as part:
        for tensor in proto.graph.initializer:
            if tensor.name not in model.external:
                continue
            stored = bytes_at(model.external[tensor.name], model.name)
            # Pages can only be mapped from these places on.
            part.seek(-(-part.tell() // 4096) * 4096)
            offset = part.tell()
            for start in range(0, stored.size, _BLOCK_BYTES):
                part.write(stored[start : start + _BLOCK_BYTES].data)
            _set_place(tensor, data, offset, stored.size)
    os.replace(part.name, path.parent / data)
    _write(proto, path)


def write_proto(proto: onnx.ModelProto, path: Path) -> None:
    """Writes a model so that `path` holds all of it or what it held before.

    Raises:
        ModelError: values are outside the proto (take `save_model` or `Model.complete`), or it is
            larger than a protobuf can be.
    """
    outside = next(
        (t.name for t in proto.graph.initializer if t.data_location == TensorProto.EXTERNAL), None
    )
    if outside is not None:
        raise ModelError(
            f"{path.name} cannot be written in one piece: the values of weight {shown(outside)} "
            "and perhaps others are in a file beside the model",
            hint="Use a model whose external data hold at most "
            f"{INSIDE_BYTES:,} bytes for this step.",
        )
    _write(proto, path)


def _write(proto: onnx.ModelProto, path: Path) -> None:
    try:
        data = proto.SerializeToString()
    except EncodeError as error:
        raise ModelError(
            f"{path.name} cannot be written: it is larger than the {PROTO_BYTES:,} bytes that one "
            "protobuf holds",
            hint="Use a smaller model for this step.",
        ) from error
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".part-", delete=False) as part:
        part.write(data)
    os.replace(part.name, path)
