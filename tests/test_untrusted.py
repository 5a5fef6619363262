"""Files that somebody else made: whatever they hold, a comparison or one error with a hint.

Models and feeds are mutated at random (fields, edges, names, bytes) and go the whole way, from
`load_model` to a comparison that is written and read back, in a worker process as in the app: what
ends that process is found, and so is what writes, waits, or takes memory without bound.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, quantize_dynamic, quantize_static

from inspector.compare import compare_models
from inspector.errors import InspectorError
from inspector.feeds import load_feeds
from inspector.jobs import Worker
from inspector.matching import match_tensors
from inspector.model_files import load_model
from inspector.render import (
    comparison_csv,
    comparison_json,
    comparison_text,
    dump_json,
    read_comparison,
    show_text,
)
from inspector.scheme import count_scheme, quant_formats, read_scheme, stored_values
from inspector.workbench import describe_model
from tests.samples import (
    MODELS,
    ROOT,
    THOROUGH,
    array,
    conv_relu_gemm,
    floats,
    model,
    npz_folder,
    qdq_of,
    save,
)

# The address space of a worker, of which about 2 GiB are libraries and stacks of threads; what one
# example may take, in seconds; the longest message.
MEMORY_BYTES = 8 * 2**30
SECONDS = 30
LONGEST_MESSAGE = 2500

# ------------------------------------------------------------------------------------- mutations

ODD_NAMES = (
    *(
        "",
        " ",
        "\x1b[31m",
        "a\0b",
        "a\nb\tc",
        "<script>alert(1)</script>",
        "[red]x[/red]",
        "é'\"\\",
    ),
    *("x" * 10_000, "\u202egpj.exe", "=1+1", "../../up", "/", "NaN", "{0}%s", "\u2028", "x", "y"),
)
ODD_INTEGERS = (
    *(-1, 0, 1, 2, 3, 7, 16, 255, 10**6, 2**31 - 1, 2**31, -(2**31), 2**40, 2**63 - 1, -(2**63)),
)
ODD_FLOATS = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), -1.0, 1e-45, 3e38, 1e-9)
ODD_BYTES = (b"", b"\0", b"\xff\xfe", b"abc", b"\xff" * 1000, b"../../up")
OP_TYPES = (
    *(
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "QLinearConv",
        "QLinearMatMul",
    ),
    *("ConvInteger", "MatMulInteger", "MatMulNBits", "GatherBlockQuantized", "DynamicQuantizeLSTM"),
    *(
        "Constant",
        "Identity",
        "Reshape",
        "Transpose",
        "Concat",
        "Gather",
        "Slice",
        "Split",
        "Expand",
    ),
    *(
        "Conv",
        "Gemm",
        "MatMul",
        "Add",
        "Clip",
        "Relu",
        "If",
        "Loop",
        "Scan",
        "LSTM",
        "Cast",
        "Shape",
    ),
    *("Range", "ConstantOfShape", "Tile", "Pad", "Resize", "SequenceConstruct", "Dropout", ""),
)
LOCATIONS = ("../w.bin", "/etc/passwd", "w.bin", "", "a\0b", "link.bin", "folder", "x" * 5000, "*")

Mutate = Callable[[onnx.ModelProto, random.Random], None]


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in ([attribute.g] if attribute.HasField("g") else []) + [*attribute.graphs]:
                yield from graphs_of(body)


def messages_of(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for each in [value] if hasattr(value, "ListFields") else value:
                yield from messages_of(each)


def a_graph(proto: onnx.ModelProto, rng: random.Random) -> onnx.GraphProto:
    return rng.choice([g for g in graphs_of(proto.graph) if g.node] or [proto.graph])


def a_node(proto: onnx.ModelProto, rng: random.Random) -> onnx.NodeProto:
    """Any node; every other time one that quantizes."""
    nodes = [n for g in graphs_of(proto.graph) for n in g.node] or [proto.graph.node.add()]
    some = [n for n in nodes if "Quant" in n.op_type or "Linear" in n.op_type or "Int" in n.op_type]
    return rng.choice(some if some and rng.random() < 0.5 else nodes)


def a_tensor(proto: onnx.ModelProto, rng: random.Random) -> TensorProto:
    """Any initializer; every other time a small one: scales and zero points are."""
    tensors = [i for g in graphs_of(proto.graph) for i in g.initializer]
    tensors = tensors or [proto.graph.initializer.add()]
    small = [t for t in tensors if int(np.prod(list(t.dims), dtype=object)) <= 64]
    return rng.choice(small if small and rng.random() < 0.5 else tensors)


def tensor_names(graph: onnx.GraphProto) -> list[str]:
    found = [v.name for v in (*graph.input, *graph.initializer)]
    return [*found, *(o for n in graph.node for o in n.output)] or ["x"]


def odd_field(proto: onnx.ModelProto, rng: random.Random) -> None:
    """Any field of any message holds another value of its type."""
    message = rng.choice(list(messages_of(proto)))
    field = rng.choice(message.DESCRIPTOR.fields)
    many = field.is_repeated if hasattr(field, "is_repeated") else field.label == 3
    if field.type == field.TYPE_MESSAGE:
        if many:
            place = getattr(message, field.name)
            if len(place) and rng.random() < 0.5:
                place.add().CopyFrom(rng.choice(place))
            else:
                place.add()
        else:
            getattr(message, field.name).SetInParent()
        return
    value: Any = rng.choice(ODD_INTEGERS)
    if field.type == field.TYPE_STRING:
        value = rng.choice(ODD_NAMES)
    elif field.type == field.TYPE_BYTES:
        value = rng.choice(ODD_BYTES)
    elif field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        value = rng.choice(ODD_FLOATS)
    elif field.type == field.TYPE_ENUM:
        value = rng.choice([*field.enum_type.values_by_number])
    elif field.cpp_type == field.CPPTYPE_INT32:
        value = max(-(2**31), min(2**31 - 1, value))
    elif field.cpp_type == field.CPPTYPE_UINT64:
        value = abs(value)
    if many:
        place = getattr(message, field.name)
        if len(place) and rng.random() < 0.7:
            place[rng.randrange(len(place))] = value
        else:
            place.append(value)
    else:
        setattr(message, field.name, value)


def cleared_field(proto: onnx.ModelProto, rng: random.Random) -> None:
    message = rng.choice([m for m in messages_of(proto) if m.ListFields()])
    message.ClearField(rng.choice(message.ListFields())[0].name)


def renamed_everywhere(proto: onnx.ModelProto, rng: random.Random) -> None:
    """A tensor has an odd name wherever it is named."""
    old = rng.choice(tensor_names(a_graph(proto, rng)))
    new = rng.choice((*ODD_NAMES, rng.choice(tensor_names(proto.graph))))
    for graph in graphs_of(proto.graph):
        for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
            value.name = new if value.name == old else value.name
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]


def odd_node_name(proto: onnx.ModelProto, rng: random.Random) -> None:
    a_node(proto, rng).name = rng.choice((*ODD_NAMES, a_node(proto, rng).name))


def other_operator(proto: onnx.ModelProto, rng: random.Random) -> None:
    node = a_node(proto, rng)
    node.op_type = rng.choice(OP_TYPES)
    node.domain = rng.choice(("", "", "com.microsoft", "ai.onnx", "ai.onnx.ml", "\x1b[31m"))


def rewired(proto: onnx.ModelProto, rng: random.Random) -> None:
    """A node reads another tensor, perhaps its own."""
    graph = a_graph(proto, rng)
    node = rng.choice(graph.node) if graph.node else a_node(proto, rng)
    if not node.input:
        node.input.append("")
    names = (*tensor_names(graph), "", "nowhere")
    node.input[rng.randrange(len(node.input))] = rng.choice(names)


def other_arity(proto: onnx.ModelProto, rng: random.Random) -> None:
    node = a_node(proto, rng)
    names = rng.choice((node.input, node.output))
    if rng.random() < 0.5 and names:
        del names[rng.randrange(len(names)) :]
    else:
        names.extend(rng.choice(([""], ["new"], ["", "", "new"], ["x"] * 50)))


def removed_node(proto: onnx.ModelProto, rng: random.Random) -> None:
    graph = a_graph(proto, rng)
    if graph.node:
        del graph.node[rng.randrange(len(graph.node))]


def repeated_node(proto: onnx.ModelProto, rng: random.Random) -> None:
    graph = a_graph(proto, rng)
    if graph.node:
        copy = graph.node.add()
        copy.CopyFrom(rng.choice(graph.node))
        if rng.random() < 0.7:
            copy.output[:] = [f"{name}_again" for name in copy.output]


def shuffled_nodes(proto: onnx.ModelProto, rng: random.Random) -> None:
    graph = a_graph(proto, rng)
    nodes = [onnx.NodeProto.FromString(n.SerializePartialToString()) for n in graph.node]
    rng.shuffle(nodes)
    del graph.node[:]
    graph.node.extend(nodes)


def other_dims(proto: onnx.ModelProto, rng: random.Random) -> None:
    tensor = a_tensor(proto, rng)
    dims = list(tensor.dims)
    if rng.random() < 0.5:
        rng.shuffle(dims)
        dims = rng.choice((dims, [1, *dims], [*dims, 1], dims[::-1]))
    elif dims:
        dims[rng.randrange(len(dims))] = rng.choice(ODD_INTEGERS)
    else:
        dims = [rng.choice(ODD_INTEGERS)]
    tensor.dims[:] = dims


def other_data_type(proto: onnx.ModelProto, rng: random.Random) -> None:
    a_tensor(proto, rng).data_type = rng.choice((*range(28), 99, -1, 2**31 - 1))


def cut_data(proto: onnx.ModelProto, rng: random.Random) -> None:
    tensor = a_tensor(proto, rng)
    data = tensor.raw_data
    tensor.raw_data = rng.choice((data[:-1], data[: len(data) // 2], data + b"\0", b"", data * 2))


def other_values(proto: onnx.ModelProto, rng: random.Random) -> None:
    """A tensor of the same type and shape (or of another one) with odd values."""
    tensor = a_tensor(proto, rng)
    if tensor.data_location == TensorProto.EXTERNAL:
        return
    try:
        values = np.array(numpy_helper.to_array(tensor))
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError):
        return  # mutated before
    if values.dtype.kind == "f":
        odd = values.dtype.type(rng.choice((*ODD_FLOATS, rng.uniform(-1, 1))))
        if rng.random() < 0.5:
            values[...] = odd
        elif values.size:
            values.reshape(-1)[rng.randrange(values.size)] = odd
    elif values.dtype.kind in "iu" and values.size:
        limits = np.iinfo(values.dtype)
        low, high = int(limits.min), int(limits.max)
        values[...] = rng.choice((0, 1, low, high, max(low, -1), min(high, 2**31)))
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def other_kind(proto: onnx.ModelProto, rng: random.Random) -> None:
    """A valid tensor of another type or shape: zero points, scales and weights of all kinds."""
    tensor = a_tensor(proto, rng)
    dims = rng.choice(([], [0], [1], [2], [8], [1, 8], [3, 3], list(tensor.dims)))
    kind = rng.choice((*range(1, 8), *range(9, 14), *range(16, 27)))
    try:
        size = int(np.prod(dims))
        zeros = helper.make_tensor(tensor.name, kind, dims, [rng.choice((0, 1))] * size)
    except (ValueError, TypeError, KeyError, OverflowError, MemoryError):
        return
    tensor.CopyFrom(zeros)


def other_attribute(proto: onnx.ModelProto, rng: random.Random) -> None:
    """Axes, block sizes, bits, pads … out of range, of another type, or new."""
    node = a_node(proto, rng)
    names = ("axis", "block_size", "bits", "K", "N", "to", "perm", "axes", "pads", "value", "alpha")
    if node.attribute and rng.random() < 0.7:
        attribute = rng.choice(node.attribute)
        if attribute.type == AttributeProto.INT:
            attribute.i = rng.choice(ODD_INTEGERS)
            return
        if attribute.type == AttributeProto.INTS and attribute.ints:
            attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(ODD_INTEGERS)
            return
        name = attribute.name
        node.attribute.remove(attribute)
    else:
        name = rng.choice(names)
    kind = rng.choice(("i", "f", "s", "ints", "floats", "t", "none"))
    made: dict[str, Any] = {
        "i": rng.choice(ODD_INTEGERS),
        "f": rng.choice(ODD_FLOATS),
        "s": rng.choice(ODD_NAMES),
        "ints": [rng.choice(ODD_INTEGERS) for _ in range(rng.randrange(1, 4))],
        "floats": [0.5, float("nan")],
        "t": array("", np.float32([1, 2])),
    }
    if kind != "none":
        node.attribute.append(helper.make_attribute(name, made[kind]))


def other_opset(proto: onnx.ModelProto, rng: random.Random) -> None:
    opset = rng.choice(proto.opset_import) if proto.opset_import else proto.opset_import.add()
    if rng.random() < 0.3:
        opset.domain = rng.choice(("", "ai.onnx", "com.microsoft", "my", "\x1b[31m"))
    else:
        opset.version = rng.choice((*ODD_INTEGERS, *range(1, 27)))


def other_interface(proto: onnx.ModelProto, rng: random.Random) -> None:
    """Inputs, outputs and value infos of another type or shape, twice, or gone."""
    graph = a_graph(proto, rng)
    values = rng.choice([v for v in (graph.input, graph.output, graph.value_info) if v] or [None])
    if values is None:
        graph.value_info.append(helper.make_tensor_value_info("x", rng.randrange(27), [2**40]))
        return
    value = rng.choice(values)
    what = rng.randrange(5)
    if what == 0:
        value.type.tensor_type.elem_type = rng.choice((*range(27), 99))
    elif what == 1 and value.type.tensor_type.shape.dim:
        dim = rng.choice(value.type.tensor_type.shape.dim)
        dim.dim_value = rng.choice(ODD_INTEGERS)
    elif what == 2 and value.type.tensor_type.shape.dim:
        rng.choice(value.type.tensor_type.shape.dim).dim_param = rng.choice(ODD_NAMES)
    elif what == 3:
        values.add().CopyFrom(value)
    else:
        values.remove(value)


def other_type(proto: onnx.ModelProto, rng: random.Random) -> None:
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    if values:
        kind = rng.choice(("sequence_type", "optional_type", "map_type", "sparse_tensor_type"))
        getattr(rng.choice(values).type, kind).SetInParent()


def made_external(proto: onnx.ModelProto, rng: random.Random) -> None:
    tensor = a_tensor(proto, rng)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    tensor.external_data.add(key="location", value=rng.choice(LOCATIONS))
    for key in ("offset", "length"):
        if rng.random() < 0.5:
            value = rng.choice(("0", "4", "-1", "x", str(2**62), "1" * 40))
            tensor.external_data.add(key=key, value=value)


MUTATIONS: dict[str, Mutate] = {
    each.__name__: each
    for each in (
        *(odd_field, cleared_field, renamed_everywhere, odd_node_name, other_operator, rewired),
        *(other_arity, removed_node, repeated_node, shuffled_nodes, other_dims, other_data_type),
        *(cut_data, other_values, other_kind, other_attribute, other_opset, other_interface),
        *(other_type, made_external),
    )
}


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 30))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def inserted(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.choice((1, 2, 8, 100))) + data[at:]


def spliced(data: bytes, rng: random.Random) -> bytes:
    size = rng.randrange(1, max(2, min(len(data), 500)))
    a, b = (rng.randrange(max(1, len(data) - size)) for _ in range(2))
    return data[:a] + data[b : b + size] + data[a + size :]


BYTE_MUTATIONS = {each.__name__: each for each in (flipped, truncated, inserted, spliced)}


@dataclass(frozen=True, kw_only=True)
class Example:
    """What is done to a pair.

    Attributes:
        pair: the name of its folder.
        sides: "f", "q" or both: the files that are mutated, each in the same way.
        changes: names of mutations, each with a seed.
        feeds: mutations of the bytes of the first feed.
    """

    pair: str
    sides: str
    changes: tuple[tuple[str, int], ...]
    feeds: tuple[tuple[str, int], ...] = ()


def write_example(example: Example, source: Path, folder: Path) -> None:
    """The mutated files of an example in a new folder."""
    folder.mkdir()
    (folder / "folder").mkdir()
    (folder / "w.bin").write_bytes(bytes(4096))
    (folder / "link.bin").symlink_to("/etc/passwd")
    for side in "fq":
        data = (source / f"{side}.onnx").read_bytes()
        if side in example.sides:
            proto = onnx.ModelProto.FromString(data)
            for name, seed in example.changes:
                if name in MUTATIONS:
                    MUTATIONS[name](proto, random.Random(seed))
            data = proto.SerializePartialToString()
            for name, seed in example.changes:
                if name in BYTE_MUTATIONS and data:
                    data = BYTE_MUTATIONS[name](data, random.Random(seed))
        (folder / f"{side}.onnx").write_bytes(data)
    (folder / "feeds").mkdir()
    for at, feed in enumerate(sorted((source / "feeds").glob("*.npz"))[:2]):
        data = feed.read_bytes()
        for name, seed in example.feeds if at == 0 else ():
            if data:
                data = BYTE_MUTATIONS[name](data, random.Random(seed))
        (folder / "feeds" / feed.name).write_bytes(data)


# ---------------------------------------------------------------------------------- the whole way


def no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def check_texts(comparison: Any) -> None:
    """The three forms of a comparison hold together, whatever the names in it are."""
    text = comparison_text(comparison, top=10)
    assert all(line.isprintable() for line in text.split("\n")), "the text holds control characters"
    assert max(map(len, text.split("\n"))) < 20_000
    table = comparison_csv(comparison)
    rows = list(csv.reader(io.StringIO(table, newline="")))
    assert len({len(row) for row in rows}) == 1, "rows of different lengths"
    json.loads(dump_json(comparison_json(comparison)), parse_constant=no_constant)
    dumped = dump_json(comparison_json(comparison, detail=True))
    back = read_comparison(json.loads(dumped, parse_constant=no_constant))
    assert dump_json(comparison_json(back, detail=True)) == dumped
    assert comparison_text(back, top=10) == text


def the_whole_way(folder: Path, *, deployed: bool) -> str:
    """ "compared", or "refused: " and the message; anything else that is raised is a fault."""
    try:
        models = []
        for side in "fq":
            loaded = load_model(folder / f"{side}.onnx")
            quant_formats(loaded)
            scheme = read_scheme(loaded)
            count_scheme(loaded, scheme)
            for tensor in scheme.tensors:
                stored_values(loaded, tensor)
            description = describe_model(folder / f"{side}.onnx")
            json.loads(dump_json(description), parse_constant=no_constant)
            assert all(line.isprintable() for line in show_text(description).split("\n"))
            models.append(loaded)
        match_tensors(models[0], models[1])
        feeds = load_feeds(folder / "feeds", models[0])
        comparison = compare_models(
            models[0], models[1], feeds, measure_latency=deployed, explain_deployed=deployed
        )
    except InspectorError as error:
        if not error.hint or len(error.message) > LONGEST_MESSAGE:
            raise ValueError(f"{len(error.message)} characters, hint {error.hint!r}") from error
        return f"refused: {error.message}"
    check_texts(comparison)
    return "compared"


def run_example(folder: Path, deployed: bool, progress: Any) -> tuple[str, float, int]:
    """How an example ended, the seconds it took, and how many files it left open."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    warnings.simplefilter("error")
    open_before = len(os.listdir("/proc/self/fd"))
    begin = time.perf_counter()
    try:
        ended = the_whole_way(folder, deployed=deployed)
    except Exception:
        ended = f"fault: {traceback.format_exc()}"
    left = len(os.listdir("/proc/self/fd")) - open_before
    return ended, time.perf_counter() - begin, left


# ------------------------------------------------------------------------------------------ pairs


class Reader:
    def __init__(self, feeds: list[dict[str, Any]]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        return next(self.feeds, None)


IMAGES = [{"x": floats((1, 3, 8, 8), seed)} for seed in range(2)]
ROWS = [{"x": floats((4, 32), seed)} for seed in range(2)]


def branches(weight: str) -> onnx.ModelProto:
    """A MatMul in both branches of an If, behind one outside; weights of a kind."""

    def product(source: str, target: str, at: int) -> list[onnx.NodeProto]:
        name = f"mm{at}"
        if weight == "nbits":
            attributes = {"K": 32, "N": 32, "bits": 4, "block_size": 16}
            return [helper.make_node("MatMulNBits", [source, f"b{at}", f"s{at}"], [target], name,
                                     domain="com.microsoft", **attributes)]  # fmt: skip
        made = []
        if weight == "int8":
            made = [
                helper.make_node("DequantizeLinear", [f"q{at}", f"c{at}"], [f"w{at}"], f"dq{at}")
            ]
        return [*made, helper.make_node("MatMul", [source, f"w{at}"], [target], name)]

    constants = [array("t", np.array(True)), array("k", np.float32(0.5))]
    for at in range(3):
        values = floats((32, 32), at, 0.2)
        if weight == "float":
            constants.append(array(f"w{at}", values))
        elif weight == "int8":
            constants.append(array(f"q{at}", np.clip(np.round(values * 100), -128, 127)
                                   .astype(np.int8)))  # fmt: skip
            constants.append(array(f"c{at}", np.float32(0.01)))
        else:
            blocks = values.T.reshape(32, 2, 16)
            scales = (np.abs(blocks).max(2) / 7).astype(np.float32)
            codes = (np.clip(np.round(blocks / scales[..., None]), -8, 7) + 8).astype(np.uint8)
            constants.append(array(f"b{at}", codes[..., ::2] | codes[..., 1::2] << 4))
            constants.append(array(f"s{at}", scales.reshape(-1)))
    both = [
        helper.make_graph([*product("h", f"o{at}", at)], f"g{at}", [],
                          [helper.make_tensor_value_info(f"o{at}", TensorProto.FLOAT, [4, 32])])
        for at in (1, 2)
    ]  # fmt: skip
    nodes = [
        *product("x", "m", 0),
        helper.make_node("Relu", ["m"], ["h"], "relu"),
        helper.make_node("If", ["t"], ["i"], "if", then_branch=both[0], else_branch=both[1]),
        helper.make_node("Mul", ["i", "k"], ["p"], "mul"),
    ]
    if weight == "int8":
        pair, extra = qdq_of("p", "y", 0.05, 3)
        nodes += pair
        constants += extra
    else:
        nodes.append(helper.make_node("Identity", ["p"], ["y"], "end"))
    return model(nodes, [("x", [4, 32])], [("y", [4, 32])], constants, opset=21, contrib=True)


def make_small_pairs(root: Path) -> None:
    """Folders with f.onnx, q.onnx and feeds: QDQ, integer operators, dynamic, bodies, 4 bits."""
    for name in ("qdq", "qoperator", "dynamic", "int8", "nbits"):
        folder = root / name
        folder.mkdir()
        images = name in ("qdq", "qoperator", "dynamic")
        npz_folder(folder / "feeds", IMAGES if images else ROWS)
        if not images:
            save(branches("float"), folder / "f.onnx")
            save(branches(name), folder / "q.onnx")
            continue
        path = save(conv_relu_gemm(), folder / "f.onnx")
        if name == "dynamic":
            quantize_dynamic(path, folder / "q.onnx")
            continue
        form = QuantFormat.QDQ if name == "qdq" else QuantFormat.QOperator
        quantize_static(path, folder / "q.onnx", Reader(IMAGES), quant_format=form,
                        per_channel=name == "qdq")  # fmt: skip


REAL = (
    *(("mlperf-kws-dscnn", "quantized"), ("mlperf-resnet8", "ort_static_qdq")),
    *(("fastestdet", "ort_static_qdq"), ("gtcrn", "ort_static_qdq"), ("gtcrn", "gtcrn")),
    *(("silero-vad-16k", "ort_static_qdq"), ("magika", "ort_static_qdq")),
)


def make_real_pairs(root: Path) -> None:
    for name, twin in REAL if MODELS.is_dir() else ():
        folder = root / f"{name}-{twin}"
        folder.mkdir()
        for side, file in (("f", "model"), ("q", twin)):
            (folder / f"{side}.onnx").write_bytes((MODELS / name / f"{file}.onnx").read_bytes())
        loaded = load_model(folder / "f.onnx")
        npz_folder(folder / "feeds", list(load_feeds(MODELS / name / "inputs", loaded, limit=2)))


# --------------------------------------------------------------------------------- the properties


@dataclass(frozen=True, kw_only=True)
class Ground:
    """Where examples run: pairs, a worker, and all places where something could be written."""

    pairs: Path
    worker: Worker
    places: tuple[Path, ...]

    def listing(self, *more: Path) -> dict[Path, tuple[int, int]]:
        files = [f for place in (*self.places, *more) for f in place.rglob("*")]
        return {f: (f.lstat().st_size, f.lstat().st_mtime_ns) for f in files}

    def run(self, example: Example, *, deployed: bool) -> str:
        """How it ended: "compared", "refused: …" or "died: …" (the process, in a library)."""
        with tempfile.TemporaryDirectory(dir=self.pairs.parent) as name:
            folder = Path(name) / "pair"
            write_example(example, self.pairs / example.pair, folder)
            before = self.listing(folder)
            job = self.worker.submit(run_example, folder, deployed)
            status = self.worker.wait(job, SECONDS)
            assert status.state != "running", f"still at work after {SECONDS} seconds"
            if status.state == "failed":
                # ONNX Runtime itself crashed: the app says so and goes on with a new process.
                assert re.match(r"the worker process ended \(signal (6|8|11)\)", str(status.error))
                return f"died: {status.error}"
            ended, _, left = status.result
            assert ended.startswith(("compared", "refused")), ended
            assert left == 0, f"{left} files are left open"
            assert self.listing(folder) == before
            return str(ended)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    root = tmp_path_factory.mktemp("untrusted")
    places = tuple(root / name for name in ("home", "tmp", "cwd"))
    pairs = root / "pairs"
    for folder in (*places, pairs):
        folder.mkdir()
    make_small_pairs(pairs)
    make_real_pairs(pairs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(places[0]))
        patch.setenv("TMPDIR", str(places[1]))
        patch.chdir(places[2])
        with Worker() as worker:
            made = Ground(pairs=pairs, worker=worker, places=places)
            # Libraries may leave their caches the first time.
            for pair in sorted(p.name for p in pairs.iterdir()):
                untouched = Example(pair=pair, sides="", changes=())
                assert made.run(untouched, deployed=True) == "compared"
            yield made


SMALL = ("qdq", "qoperator", "dynamic", "int8", "nbits")
seeds = st.integers(0, 2**20)


def examples(pairs: Sequence[str]) -> st.SearchStrategy[Example]:
    changes = st.tuples(st.sampled_from(sorted(MUTATIONS)), seeds)
    in_bytes = st.tuples(st.sampled_from(sorted(BYTE_MUTATIONS)), seeds)
    # Mostly fields: what is cut at random seldom gets beyond the parser.
    mostly = st.one_of(changes, changes, changes, changes, changes, in_bytes)
    return st.builds(
        Example,
        pair=st.sampled_from(pairs),
        sides=st.sampled_from(("q", "fq", "f")),
        changes=st.lists(mostly, min_size=1, max_size=4).map(tuple),
        feeds=st.one_of(st.just(()), st.just(()), st.lists(in_bytes, max_size=1).map(tuple)),
    )


@pytest.mark.slow
@settings(max_examples=160 * THOROUGH, deadline=None, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(example=examples(SMALL))
def test_whatever_a_small_pair_holds_it_is_compared_or_refused(
    ground: Ground, example: Example
) -> None:
    ground.run(example, deployed=False)


@pytest.mark.slow
@pytest.mark.parametrize("deployed", [False, True])
@settings(max_examples=100 * THOROUGH, deadline=None, database=None,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(data=st.data())
def test_whatever_a_pair_holds_it_is_compared_or_refused(
    ground: Ground, data: st.DataObject, deployed: bool
) -> None:
    pairs = sorted(p.name for p in ground.pairs.iterdir())
    ground.run(data.draw(examples(pairs)), deployed=deployed)


# -------------------------------------------------------------------------- what was found so far


def pair_of(ground: Ground, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """The dynamic pair in a new folder, both models changed in the same way."""
    write_example(Example(pair="dynamic", sides="", changes=()), ground.pairs / "dynamic", folder)
    for path in (folder / "f.onnx", folder / "q.onnx"):
        proto = onnx.load(path)
        change(proto)
        path.write_bytes(proto.SerializePartialToString())
    return folder


def replaced(name: str, values: Any) -> Callable[[onnx.ModelProto], None]:
    """Puts other values in place of an initializer, where there is one of the name."""

    def change(proto: onnx.ModelProto) -> None:
        for tensor in proto.graph.initializer:
            if tensor.name == name:
                tensor.CopyFrom(array(name, values))

    return change


def weight_of_one_element(proto: onnx.ModelProto) -> None:
    """Gemm's, float and quantized: neither can be transposed."""
    replaced("gw", np.float32([1]))(proto)
    replaced("gw_quantized", np.uint8([1]))(proto)


def wrong_permutation(proto: onnx.ModelProto) -> None:
    turn = helper.make_node("Transpose", ["x"], ["xt"], "t1", perm=[0, 1, 3, 2])
    back = helper.make_node("Transpose", ["xt"], ["xu"], "t2", perm=[0, 1, 9])
    for node in proto.graph.node:
        node.input[:] = ["xu" if name == "x" else name for name in node.input]
    proto.graph.node.extend([turn, back])  # which loading sorts


@pytest.mark.parametrize(
    ("change", "ends"),
    [
        (replaced("w_scale", np.float32(np.inf)), "compared"),
        (replaced("w_scale", np.float32(np.nan)), "compared"),
        (replaced("w_scale", np.float32(-0.0)), "compared"),
        (replaced("w_scale", np.zeros(0, np.float32)), "refused"),
        (replaced("gw", np.float16([1])), "refused"),
        (replaced("b", np.full(8, np.inf, np.float32)), "compared"),
        (weight_of_one_element, "refused"),
        (wrong_permutation, "refused"),
    ],
)
def test_an_odd_tensor_or_attribute_is_named_or_compared(
    ground: Ground, tmp_path: Path, change: Callable[[onnx.ModelProto], None], ends: str
) -> None:
    folder = pair_of(ground, tmp_path / "pair", change)
    ended, _, left = ground.worker.result(ground.worker.submit(run_example, folder, False), SECONDS)
    assert ended.startswith(ends), ended
    assert left == 0


def describe_in_worker(path: Path, progress: Any) -> str:
    return str(describe_model(path)["path"])


def crashing() -> onnx.ModelProto:
    """A dimension below 0 behind Conv ends the process in ONNX's inference of shapes for Slice."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Slice", ["c", "s", "e", "a"], ["y"]),
    ]
    ends = [array(n, np.int64([v])) for n, v in (("s", 0), ("e", 9), ("a", 2))]
    proto = model(nodes, [("x", [1, 1, 0])], [("y", None)], [array("w", floats((1, 1, 5))), *ends])
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return proto


def test_a_file_that_crashes_a_library_costs_one_job(ground: Ground, tmp_path: Path) -> None:
    bad = ground.worker.submit(describe_in_worker, save(crashing(), tmp_path / "m.onnx"))
    good = ground.worker.submit(describe_in_worker, ground.pairs / "qdq" / "q.onnx")
    status = ground.worker.wait(bad, SECONDS)
    # Another version of ONNX may read it.
    assert status.state in ("done", "failed")
    if status.state == "failed":
        assert "the worker process ended (signal 6)" in str(status.error)
    assert ground.worker.result(good, SECONDS) == "q.onnx"


# ------------------------------------------------------------------------------ on a command line


def command(
    *arguments: str, folder: Path, memory_bytes: int = 4 * 2**30
) -> subprocess.CompletedProcess[str]:
    """A command as a user would give it, in a folder, with so much address space."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))

    return subprocess.run(
        [sys.executable, "-m", "inspector.cli", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        preexec_fn=limit,
    )


def assert_refused(done: subprocess.CompletedProcess[str], said: str) -> None:
    """Exit code 2 and two lines."""
    lines = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert [line.split(": ")[0] for line in lines] == ["error", "hint"], done.stderr
    assert said in lines[0]
    assert all(line.isprintable() and len(line) < 1000 for line in lines)
    assert done.stdout == ""


def test_a_file_that_crashes_a_library_ends_its_command_with_two_lines(tmp_path: Path) -> None:
    save(crashing(), tmp_path / "m.onnx")
    done = command("show", "m.onnx", "--json", "-", folder=tmp_path)
    if done.returncode == 0:  # another version of ONNX may read it
        return
    assert done.returncode == 2, done.stderr
    # The library says something of its own first.
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("error: quant-inspector show m.onnx --json -: ")
    assert "SIGABRT" in error
    assert hint.startswith("hint: ")
    assert done.stdout == ""


def with_location(location: str) -> Callable[[Path], None]:
    def place(folder: Path) -> None:
        (folder.parent / "outside.bin").write_bytes(bytes(4096))
        (folder / "link.bin").symlink_to(folder.parent / "outside.bin")
        proto = onnx.load(folder / "q.onnx")
        tensor = proto.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location.replace("HERE", str(folder.parent)))
        save(proto, folder / "q.onnx")

    return place


def absurd_dims(folder: Path) -> None:
    proto = onnx.load(folder / "q.onnx")
    proto.graph.initializer.add(name="huge", data_type=1, dims=[10**9, 10**9])
    save(proto, folder / "q.onnx")


def absurd_input(folder: Path) -> None:
    proto = onnx.load(folder / "f.onnx")
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2**60
    save(proto, folder / "f.onnx")


def pickled(folder: Path) -> None:
    np.savez(folder / "feeds" / "00.npz", x=np.array([{"a": 1}], object))


def bomb(folder: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (1, 3, 8, 8, 2**20)}
    )
    with (
        zipfile.ZipFile(folder / "feeds" / "00.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as member,
    ):
        member.write(header.getvalue())
        for _ in range(192 * 4):
            member.write(bytes(2**20))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (absurd_dims, "q.onnx: weight 'huge' has the dimensions 1000000000 x 1000000000"),
        (absurd_input, "f.onnx: its input or output 'x' has the dimensions 11529215046068469"),
        (
            with_location("../outside.bin"),
            "'../outside.bin', which lies outside the model's",
        ),
        (with_location("HERE/outside.bin"), "', which lies outside the model's folder"),
        (with_location("link.bin"), "'link.bin', which lies outside the model's folder"),
        (pickled, "00.npz: 'x' holds text or pickled objects, expected float32"),
        (bomb, "'x.npy' claims 805,306,496 bytes in 782,"),
    ],
)
def test_a_file_made_to_do_harm_gives_two_lines_and_takes_little(
    ground: Ground, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    folder = tmp_path / "in"
    shutil.copytree(ground.pairs / "qdq", folder)
    change(folder)
    before = ground.listing(tmp_path)
    start = time.perf_counter()
    done = command("compare", "f.onnx", "q.onnx", "--inputs", "feeds", folder=folder)
    assert_refused(done, said)
    assert time.perf_counter() - start < 20
    assert ground.listing(tmp_path) == before


LONG_AND_ODD = (
    *("n" * 10_000, "\x1b[2J\x1b[31mred", "a\nerror: b\r\t", "<img src=x onerror=alert(1)>"),
    *('=HYPERLINK("http://x")', "\u202efdp.exe", "[bold]b[/bold]", "é\0\x7f\x9b", "'\"\\,;"),
)


def test_long_and_odd_names_go_through_text_csv_and_json(ground: Ground, tmp_path: Path) -> None:
    nodes, constants = [], []
    chain = ["x", *LONG_AND_ODD, "y"]
    for at, (source, target) in enumerate(itertools.pairwise(chain)):
        constants.append(array(f"{target}w", floats((8, 8), at, 0.4)))
        nodes.append(helper.make_node("MatMul", [source, f"{target}w"], [target], f"{target}n"))
    path = save(model(nodes, [("x", [4, 8])], [("y", [4, 8])], constants), tmp_path / "f.onnx")
    feeds = [{"x": floats((4, 8), at)} for at in range(2)]
    npz_folder(tmp_path / "feeds", feeds)
    quantize_static(path, tmp_path / "q.onnx", Reader(feeds), quant_format=QuantFormat.QDQ)
    done = command(
        *("compare", "f.onnx", "q.onnx", "--inputs", "feeds", "--top", "50"),
        *("--json", "c.json", "--csv", "c.csv"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert all(line.isprintable() and len(line) < 2000 for line in done.stdout.split("\n"))
    assert all(line.isprintable() for line in done.stderr.split("\n"))
    text = (tmp_path / "c.json").read_text(encoding="utf-8")
    record = json.loads(text, parse_constant=no_constant)
    assert {a["name"] for a in record["activations"]} >= {*LONG_AND_ODD}
    with (tmp_path / "c.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert len({len(row) for row in rows}) == 1
    assert not any(cell.startswith(("=", "+", "@")) for row in rows for cell in row)
    assert any("n" * 10_000 in cell for row in rows for cell in row)


# ------------------------------------------------------------------------------------------- size


def many_nodes(count: int, kind: str, *, quantized: bool) -> onnx.ModelProto:
    """Half as many Relus as Adds of them and "x", one behind the other or all from "x"."""
    nodes, last, ends = [], "x", []
    constants = [array("s", np.float32(0.02)), array("z", np.int8(0))] if quantized else []
    for at in range(count // (4 if quantized else 2)):
        nodes.append(helper.make_node("Relu", [last], [f"r{at}"], f"relu{at}"))
        tensor = f"r{at}"
        if quantized:
            nodes.append(helper.make_node("QuantizeLinear", [tensor, "s", "z"], [f"q{at}"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"q{at}", "s", "z"], [f"d{at}"]))
            tensor = f"d{at}"
        nodes.append(helper.make_node("Add", [tensor, "x"], [f"a{at}"], f"add{at}"))
        ends.append(f"a{at}")
        last = f"a{at}" if kind == "chain" else "x"
    nodes.append(helper.make_node("Sum", ends if kind == "wide" else ends[-1:], ["y"], "sum"))
    return model(nodes, [("x", [4])], [("y", [4])], constants)


@pytest.mark.parametrize("kind", ["chain", "wide"])
@pytest.mark.parametrize(
    ("count", "seconds"), [(2_000, 20), pytest.param(8_000, 120, marks=pytest.mark.slow)]
)
def test_many_nodes_are_compared_in_bounded_time_and_memory(
    ground: Ground, tmp_path: Path, kind: str, count: int, seconds: int
) -> None:
    folder = tmp_path / "pair"
    folder.mkdir()
    save(many_nodes(count // 2, kind, quantized=False), folder / "f.onnx")
    save(many_nodes(count, kind, quantized=True), folder / "q.onnx")
    npz_folder(folder / "feeds", [{"x": floats((4,), at)} for at in range(2)])
    job = ground.worker.submit(run_example, folder, False)
    try:
        assert ground.worker.result(job, seconds)[0] == "compared"
    except TimeoutError:
        ground.worker.cancel(job)  # by force: it does not listen
        ground.worker.wait(job)
        raise
