"""The graph alone: what stays, what never leaves, and names that hold over the whole file."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from inspector.errors import ModelError
from inspector.model import Model
from inspector.model_files import load_model
from inspector.skeleton import (
    KEPT_ELEMENTS,
    all_node_names,
    main_nodes,
    names_in_file,
    neighbourhood,
    skeleton_of,
)
from tests.samples import (
    MODELS,
    PEAK_BYTES,
    ROOT,
    array,
    conv_relu_gemm,
    floats,
    model,
    needs_models,
    save,
)


def graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and all bodies, found without the code under test."""
    waiting = [proto.graph]
    while waiting:
        graph = waiting.pop(0)
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                waiting += [attribute.g] if attribute.type == AttributeProto.GRAPH else []
                waiting += attribute.graphs


def tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    for graph in graphs(proto):
        yield from graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.TENSOR:
                    yield attribute.t


def is_hollow(tensor: TensorProto) -> bool:
    fields = {f.name for f, _ in tensor.ListFields()}
    return fields <= {"name", "data_type", "dims"}


def branch(name: str, nodes: list[onnx.NodeProto], output: str, *more: Any) -> onnx.GraphProto:
    end = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    return helper.make_graph(nodes, name, [], [end], *more)


def if_model() -> onnx.ModelProto:
    """An If with equal names in both branches, one of them nested, and a thief in the main graph.

    The node "if/then_branch/twice" of the main graph has the name that a body's node would get.
    """
    inner = branch("inner", [helper.make_node("Neg", ["x"], ["n"], "deep")], "n")
    nested = helper.make_node("If", ["c"], ["o"], "nested", then_branch=inner, else_branch=inner)
    big = array("big", floats((9, 9), 3))
    then = branch(
        "then",
        [helper.make_node("Mul", ["x", "big"], ["t"], "twice"), nested,
         helper.make_node("Add", ["t", "o"], ["u"], "twice")],
        "u",
        [big],
    )  # fmt: skip
    otherwise = branch("else", [helper.make_node("Relu", ["x"], ["r"])], "r")
    nodes = [
        helper.make_node("Abs", ["a"], ["x"], "if/then_branch/twice"),
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Cast", ["m"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], "if", then_branch=then, else_branch=otherwise),
        helper.make_node("Relu", ["y"], ["z"], "if"),
    ]
    return model(nodes, [("a", [9, 9])], [("z", [9, 9])])


def test_values_of_large_tensors_are_gone_and_their_shapes_and_types_stay() -> None:
    proto = conv_relu_gemm()
    proto.graph.initializer.append(array("edge", np.arange(KEPT_ELEMENTS, dtype=np.int64)))
    proto.graph.initializer.append(array("over", np.arange(KEPT_ELEMENTS + 1, dtype=np.uint8)))
    small = skeleton_of(Model(proto))
    after = {t.name: t for t in small.graph.initializer}
    assert list(after) == ["w", "b", "gw", "gb", "edge", "over"]
    for tensor in proto.graph.initializer:
        its = after[tensor.name]
        assert (its.data_type, its.dims) == (tensor.data_type, tensor.dims)
        values = numpy_helper.to_array(tensor)
        if values.size > 64:
            assert is_hollow(its)
        else:
            np.testing.assert_array_equal(numpy_helper.to_array(its), values)
    assert is_hollow(after["w"])
    assert is_hollow(after["over"])
    assert not is_hollow(after["edge"])
    assert [n.name for n in small.graph.node] == ["conv", "relu", "pool", "flatten", "gemm"]
    assert list(small.graph.node[0].attribute[0].ints) == [1, 1, 1, 1]
    assert small.graph.input == proto.graph.input
    assert small.graph.output == proto.graph.output


def test_the_models_own_proto_is_left_as_it_was() -> None:
    proto = if_model()
    loaded = Model(proto)
    before = loaded.proto.SerializeToString(deterministic=True)
    skeleton_of(loaded)
    skeleton_of(loaded, only=["if"])
    assert loaded.proto.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("opset", [7, 10, 13, 17, 21, 24])
def test_types_between_nodes_are_kept_in_every_opset(opset: int) -> None:
    proto = model(
        [helper.make_node("Neg", ["x"], ["n"], "neg"), helper.make_node("Abs", ["n"], ["y"], "a")],
        [("x", ["batch", 3])], [("y", None)], opset=opset,
    )  # fmt: skip
    proto.graph.value_info.append(helper.make_tensor_value_info("n", 1, ["batch", 3]))
    small = skeleton_of(Model(proto))
    assert small.graph.value_info == proto.graph.value_info
    assert small.opset_import == proto.opset_import
    assert small.ir_version == proto.ir_version


def test_no_place_on_disk_leaves_with_the_graph(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    proto = conv_relu_gemm()
    proto.graph.initializer[0].CopyFrom(array("w", floats((64, 3, 3, 3))))
    onnx.save(proto, path, save_as_external_data=True, location="secret.bin", size_threshold=0)
    for inside in (2**31, 0):
        loaded = load_model(path, inside_bytes=inside)
        assert list(loaded.external) == ([] if inside else ["w"])
        written = skeleton_of(loaded).SerializeToString()
        assert b"secret" not in written
        assert b"location" not in written
        small = onnx.load_model_from_string(written)
        assert [list(t.dims) for t in small.graph.initializer] == [
            [64, 3, 3, 3], [8], [5, 8], [5]
        ]  # fmt: skip
        assert all(t.data_location == TensorProto.DEFAULT for t in small.graph.initializer)
        assert [is_hollow(t) for t in small.graph.initializer] == [True, False, False, False]


def test_a_model_beyond_two_gigabytes_has_a_skeleton_and_its_data_need_not_be_there() -> None:
    proto = conv_relu_gemm()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.dims[:] = [2**16, 2**16, 4]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/elsewhere/weights.bin")
    written = skeleton_of(Model(proto)).SerializeToString()
    assert b"someone" not in written
    assert len(written) < 2000
    small = onnx.load_model_from_string(written)
    assert list(small.graph.initializer[0].dims) == [2**16, 2**16, 4]


def test_doc_strings_and_metadata_stay_behind_wherever_they_are() -> None:
    proto = if_model()
    function = helper.make_function(
        "own", "Fn", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"], doc_string="SECRET")],
        [helper.make_opsetid("", 17)], attributes=["alpha"],
    )  # fmt: skip
    function.doc_string = "SECRET"
    function.metadata_props.add(key="SECRET", value="SECRET")
    proto.functions.append(function)
    proto.doc_string = "SECRET"
    proto.metadata_props.add(key="SECRET", value="SECRET")
    proto.training_info.add().algorithm.doc_string = "SECRET"
    proto.graph.initializer.append(array("k", np.float32([1.0])))
    proto.graph.value_info.append(helper.make_tensor_value_info("x", 1, None))
    for graph in graphs(proto):
        graph.doc_string = "SECRET"
        graph.metadata_props.add(key="SECRET", value="SECRET")
        for entry in (*graph.node, *graph.initializer, *graph.input, *graph.output,
                      *graph.value_info):  # fmt: skip
            entry.doc_string = "SECRET"
            entry.metadata_props.add(key="SECRET", value="SECRET")
        for node in graph.node:
            for attribute in node.attribute:
                attribute.doc_string = "SECRET"
    assert b"SECRET" in proto.SerializeToString()
    small = skeleton_of(Model(proto))
    assert b"SECRET" not in small.SerializeToString()
    assert small.functions[0].node[0].op_type == "Neg"
    assert list(small.functions[0].attribute) == ["alpha"]


def test_node_names_are_unique_over_bodies_and_main_graph() -> None:
    loaded = Model(if_model())
    small = skeleton_of(loaded)
    names = [node.name for graph in graphs(small) for node in graph.node]
    assert len(names) == len(set(names)) == 11
    assert all(names)
    assert set(names) == all_node_names(small)
    main, *inner = names_in_file(loaded)
    then = inner[[body.path for body in loaded.bodies].index("if/then_branch")]
    assert list(main.values()) == [n.name for n in loaded.nodes], "the main graph keeps its names"
    assert main["if/then_branch/twice"] == "if/then_branch/twice"
    assert then["twice"] == "if/then_branch/twice_2", "the name is taken in the main graph"
    assert then["twice_u"] == "if/then_branch/twice_u"
    deep = [n for g in graphs(small) for n in g.node if n.op_type == "Neg"]
    assert {n.name for n in deep} == {
        "if/then_branch/nested/then_branch/deep",
        "if/then_branch/nested/else_branch/deep",
    }
    unnamed = next(n for g in graphs(small) for n in g.node if n.name.startswith("if/else"))
    assert unnamed.name == "if/else_branch/Relu_r"
    assert main_nodes(loaded)[deep[0].name] == "if"
    assert main_nodes(loaded)["ReduceMax_m"] == "ReduceMax_m"
    hollow = next(t for t in tensors(small) if t.name == "big")
    assert is_hollow(hollow)
    assert list(hollow.dims) == [9, 9]


def test_nodes_of_functions_have_names_of_their_own() -> None:
    proto = model([helper.make_node("Fn", ["x"], ["y"], "own.Fn/Neg", domain="own")],
                  [("x", [2])], [("y", [2])])  # fmt: skip
    proto.opset_import.add(domain="own", version=1)
    nodes = [helper.make_node("Neg", ["a"], ["t"]), helper.make_node("Neg", ["t"], ["b"])]
    body = branch("then", [helper.make_node("Abs", ["a"], ["q"])], "q")
    nodes.append(helper.make_node("If", ["c"], ["i"], then_branch=body, else_branch=body))
    nodes[-1].doc_string = "gone"
    opsets = [helper.make_opsetid("", 17)]
    proto.functions.append(helper.make_function("own", "Fn", ["a", "c"], ["b"], nodes, opsets))
    small = skeleton_of(Model(proto))
    names = [n.name for n in small.functions[0].node]
    names += [a.g.node[0].name for a in small.functions[0].node[2].attribute]
    assert names == ["own.Fn/Neg_2", "own.Fn/Neg_3", "own.Fn/If", "own.Fn/If/Abs",
                     "own.Fn/If/Abs_2"]  # fmt: skip


def sparse(count: int) -> SparseTensorProto:
    return helper.make_sparse_tensor(
        array("sp", floats((count,))), array("at", np.arange(count, dtype=np.int64)), [1000]
    )


def test_constants_in_attributes_lose_their_values_in_every_form() -> None:
    long = [float(i) for i in range(65)]
    nodes = [
        helper.make_node("Constant", [], ["a"], "a", value=array("", floats((65,)))),
        helper.make_node("Constant", [], ["b"], "b", value_floats=long),
        helper.make_node("Constant", [], ["c"], "c", value_ints=list(range(65))),
        helper.make_node("Constant", [], ["d"], "d", value_strings=["s"] * 65),
        helper.make_node("Constant", [], ["e"], "e", sparse_value=sparse(65)),
        helper.make_node("Constant", [], ["f"], "f", value_string="x" * 9000),
        helper.make_node("Constant", [], ["g"], "g", value_strings=["x" * 9000]),
    ]
    small_ones = [
        helper.make_node("Constant", [], ["h"], "h", value_floats=long[:64]),
        helper.make_node("Constant", [], ["i"], "i", sparse_value=sparse(64)),
        helper.make_node("Constant", [], ["j"], "j", value_string="short"),
    ]
    tree = helper.make_node("Tree", ["x"], ["t"], "tree", domain="ai.onnx.ml", thresholds=long)
    proto = model([*nodes, *small_ones, tree], [("x", [2])], [("t", [2])])
    proto.graph.sparse_initializer.append(sparse(65))
    proto.graph.sparse_initializer[0].values.name = "large"
    proto.graph.sparse_initializer.append(sparse(2))
    small = skeleton_of(Model(proto))
    made = {n.name: n.attribute[0] for n in small.graph.node}
    shapes = {"a": [65], "b": [65], "c": [65], "d": [65], "e": [1000], "f": [9000], "g": [1]}
    for name, dims in shapes.items():
        assert (made[name].name, made[name].type) == ("value", AttributeProto.TENSOR)
        assert is_hollow(made[name].t)
        assert list(made[name].t.dims) == dims
    types = [made[name].t.data_type for name in "bcdf"]
    assert types == [TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING, TensorProto.UINT8]
    assert (made["tree"].name, made["tree"].type) == ("thresholds", AttributeProto.TENSOR)
    for node in small_ones:
        assert made[node.name] == node.attribute[0]
    assert [(t.name, list(t.dims)) for t in small.graph.initializer] == [("large", [1000])]
    assert [s.values.name for s in small.graph.sparse_initializer] == ["sp"]


def test_every_kind_of_attribute_passes() -> None:
    kinds = {
        "one": 1, "half": 0.5, "text": "é", "ones": [1, 2], "halves": [0.5], "texts": ["a", "b"],
        "tensor": array("k", np.int8([3])), "tensors": [array("k", np.int8([3]))],
        "sparse": sparse(3), "sparses": [sparse(3), sparse(4)],
        "type": helper.make_tensor_type_proto(1, [2]),
        "types": [helper.make_tensor_type_proto(1, [2])],
    }  # fmt: skip
    node = helper.make_node("Odd", ["x"], ["y"], "odd", domain="d", **kinds)
    node.attribute.append(AttributeProto(name="big", type=AttributeProto.SPARSE_TENSORS))
    node.attribute[-1].sparse_tensors.extend([sparse(65), sparse(1)])
    node.attribute.append(AttributeProto(name="list", type=AttributeProto.GRAPHS))
    inner = branch("g", [helper.make_node("Neg", ["x"], ["n"])], "n")
    node.attribute[-1].graphs.extend([inner, inner])
    small = skeleton_of(Model(model([node], [("x", [2])], [("y", [2])])))
    after = {a.name: a for a in small.graph.node[0].attribute}
    for attribute in node.attribute[:-2]:
        assert after[attribute.name] == attribute
    assert after["big"].type == AttributeProto.TENSORS
    assert all(is_hollow(t) for t in after["big"].tensors)
    assert [g.node[0].name for g in after["list"].graphs] == [
        "odd/list_0/Neg_n",
        "odd/list_1/Neg_n",
    ]


# -- a part of a graph -----------------------------------------------------------------------------


def chain() -> onnx.ModelProto:
    """x -> a -> b -> c -> d -> e -> y; "split" reads b too, and three nodes share a Constant."""
    nodes = [
        helper.make_node("Constant", [], ["k"], "k", value=array("", np.float32([2.0]))),
        helper.make_node("Neg", ["k"], ["k2"], "from_k"),
        helper.make_node("Abs", ["x"], ["ta"], "a"),
        helper.make_node("Mul", ["ta", "k2"], ["tb"], "b"),
        helper.make_node("Add", ["tb", "w"], ["tc"], "c"),
        helper.make_node("Mul", ["tc", "k2"], ["td"], "d"),
        helper.make_node("Mul", ["td", "k2"], ["y"], "e"),
        helper.make_node("Sigmoid", ["tb"], ["side"], "split"),
    ]
    weight = array("w", floats((3,)))
    return model(nodes, [("x", [3])], [("y", [3]), ("side", [3])], [weight])


@pytest.mark.parametrize(
    ("hops", "found"),
    [
        (0, {"c"}),
        (1, {"b", "c", "d", "k", "from_k"}),
        (2, {"a", "b", "c", "d", "e", "split", "k", "from_k"}),
        (9, {"a", "b", "c", "d", "e", "split", "k", "from_k"}),
    ],
)
def test_a_neighbourhood_goes_both_ways_but_not_through_constants(
    hops: int, found: set[str]
) -> None:
    assert neighbourhood(Model(chain()), "c", hops) == found
    # Two edges from b lies d, and e only by way of the constant that both read.
    assert neighbourhood(Model(chain()), "b", 2) == {"a", "b", "c", "d", "split", "k", "from_k"}


def test_a_constant_is_its_own_neighbourhood_with_its_readers() -> None:
    assert neighbourhood(Model(chain()), "from_k", 1) == {"k", "from_k", "b", "d", "e"}


def test_a_node_in_a_body_stands_for_the_node_that_holds_the_body() -> None:
    loaded = Model(if_model())
    inner = "if/then_branch/nested/else_branch/deep"
    assert neighbourhood(loaded, inner, 0) == {"if"}
    around = neighbourhood(loaded, inner, 1)
    assert around == {"if", "if/then_branch/twice", "Cast_c", "if_z"}


def test_a_cut_reads_its_surroundings_as_inputs_and_gives_what_is_read_outside() -> None:
    small = skeleton_of(Model(chain()), only=["b", "c"])
    assert [n.name for n in small.graph.node] == ["b", "c"]
    assert [i.name for i in small.graph.input] == ["ta", "k2"]
    assert [o.name for o in small.graph.output] == ["tb", "tc"], "split reads tb, d reads tc"
    assert [i.name for i in small.graph.initializer] == ["w"]
    assert [d.dim_value for d in small.graph.input[0].type.tensor_type.shape.dim] == [3]
    assert small.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT


def test_a_cut_with_all_nodes_has_the_ends_of_the_model() -> None:
    loaded = Model(chain())
    small = skeleton_of(loaded, only=[n.name for n in loaded.nodes])
    assert [i.name for i in small.graph.input] == ["x"]
    assert {o.name for o in small.graph.output} == {"y", "side"}
    whole = skeleton_of(loaded)
    assert small.graph.node == whole.graph.node


def test_bodies_in_a_cut_keep_their_names_and_what_they_capture_is_an_input() -> None:
    loaded = Model(if_model())
    small = skeleton_of(loaded, only=["if"])
    assert [i.name for i in small.graph.input] == ["c", "x"]
    assert all_node_names(small) <= all_node_names(skeleton_of(loaded))
    assert "if/then_branch/nested/else_branch/deep" in all_node_names(small)
    # A cut without the If takes the names of nobody's body.
    assert all_node_names(skeleton_of(loaded, only=["if_z"])) == {"if_z"}


def test_each_body_keeps_its_own_names_whatever_is_cut_before_it() -> None:
    nodes = [helper.make_node("ReduceMax", ["x"], ["m"], "max", keepdims=0),
             helper.make_node("Cast", ["m"], ["c"], "cast", to=TensorProto.BOOL)]  # fmt: skip
    for at, kind in enumerate(("Neg", "Abs")):
        inner = branch("b", [helper.make_node(kind, ["x"], ["o"], kind)], "o")
        body = branch("b", [helper.make_node("If", ["c"], ["p"], "in", then_branch=inner,
                                             else_branch=inner)], "p")  # fmt: skip
        nodes.append(helper.make_node("If", ["c"], [f"y{at}"], f"if{at}", then_branch=body,
                                      else_branch=body))  # fmt: skip
    loaded = Model(model(nodes, [("x", [3])], [("y0", [3]), ("y1", [3])]))
    whole = {n.name: n for n in skeleton_of(loaded).graph.node}
    assert skeleton_of(loaded, only=["if1"]).graph.node[0] == whole["if1"]
    assert "if1/then_branch/in/else_branch/Abs" in all_node_names(skeleton_of(loaded))


def test_unknown_nodes_are_named() -> None:
    loaded = Model(chain())
    with pytest.raises(ModelError, match="no node 'nobody'"):
        neighbourhood(loaded, "nobody", 1)
    with pytest.raises(ModelError, match="no node 'nobody' in its main graph"):
        skeleton_of(loaded, only=["a", "nobody"])


# -- what Netron makes of it -----------------------------------------------------------------------

# Netron's own parser on a file, with the least of a page around it; prints what it found.
NETRON = """
import fs from "node:fs";
const [, , folder, file] = process.argv;
const load = (name) => import(`${folder}/${name}.js`);
const { ModelFactory } = await load("onnx");
const { BinaryReader } = await load("protobuf");
const { Tensor } = await load("base");
const bytes = new Uint8Array(fs.readFileSync(file));
const stream = { length: bytes.length, seek() {}, peek: (n) => bytes.subarray(0, n) };
const context = {
  identifier: "m.onnx", stream, set(name, value) { this.value = value; return name; },
  tags: async (kind) => kind === "pb" ? BinaryReader.open(bytes).signature() : new Map(),
  read: async () => BinaryReader.open(bytes), peek: async () => null,
  require: (name) => load(name.slice(2)),
  fetch() { throw new Error("it asks for another file"); },
  asset: async (name) => fs.readFileSync(`${folder}/${name}`, "utf8"),
};
const factory = new ModelFactory();
await factory.match(context);
const model = await factory.open(context);
const found = { names: [], empty: {}, shapes: {} };
const look = (name, value) => {
  const tensor = new Tensor(value);
  found.empty[name] = tensor.empty;
  found.shapes[name] = value.type.toString();
  if (!tensor.empty) { tensor.toString(); }
};
const walk = (graph) => {
  for (const node of graph.nodes) {
    found.names.push(node.name);
    for (const value of node.inputs.flatMap((each) => each.value)) {
      if (value.initializer) { look(value.name, value.initializer); }
    }
    for (const { name, value, type } of node.attributes) {
      if (type === "graph") { walk(value); }
      if (type === "tensor") { look(`${node.name}.${name}`, value); }
    }
  }
};
model.modules.forEach(walk);
console.log(JSON.stringify(found));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js runs Netron's parser here")
def test_netron_shows_shapes_of_tensors_without_values_and_all_names(tmp_path: Path) -> None:
    folder = Path(str(importlib.util.find_spec("netron").origin)).parent
    script = tmp_path / "look.mjs"
    script.write_text(NETRON)

    def look(proto: onnx.ModelProto) -> dict[str, Any]:
        path = save(skeleton_of(Model(proto)), tmp_path / "m.onnx")
        command = ["node", str(script), str(folder), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    found = look(if_model())
    assert set(found["names"]) == all_node_names(skeleton_of(Model(if_model())))
    assert found["empty"] == {"big": True}
    assert found["shapes"] == {"big": "float32[9,9]"}
    kinds = [k for k in TensorProto.DataType.values() if k != TensorProto.UNDEFINED]
    hollow = [TensorProto(name=f"k{k}", data_type=k, dims=[100, 2]) for k in kinds]
    nodes = [
        helper.make_node("Sum", [t.name for t in hollow], ["s"], "sum"),
        helper.make_node("Constant", [], ["d"], "dense", value=array("", floats((65,)))),
        helper.make_node("Constant", [], ["e"], "sparse", sparse_value=sparse(65)),
        helper.make_node("Constant", [], ["f"], "few", sparse_value=sparse(3)),
        helper.make_node("Sum", ["d", "e", "f", "large", "sp", "s"], ["y"], "last"),
    ]
    proto = model(nodes, [], [("y", None)], hollow)
    proto.graph.sparse_initializer.extend([sparse(65), sparse(3)])
    proto.graph.sparse_initializer[0].values.name = "large"
    for ir_version, producer in ((4, "torch"), (10, ""), (13, "\x00é")):
        proto.ir_version, proto.producer_name = ir_version, producer
        found = look(proto)
        assert found["names"] == ["sum", "last"], "it draws Constants as tensors"
        assert {n for n, empty in found["empty"].items() if not empty} == {"f", "sp"}
        assert len(found["empty"]) == len(kinds) + 5
        assert found["shapes"]["e"] == "float32[1000]"


# -- cost and real models --------------------------------------------------------------------------


def test_big_weights_are_never_copied(tmp_path: Path) -> None:
    big = [array("w", np.zeros((2**22, 4), np.float32)), array("v", np.ones(2**24, np.float32))]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "m"),
        helper.make_node("Constant", [], ["c"], "c", value=big[1]),
        helper.make_node("Add", ["m", "c"], ["y"], "y"),
    ]
    path = save(model(nodes, [("x", [1, 2**22])], [("y", None)], big[:1]), tmp_path / "m.onnx")
    script = f"""
import sys
from inspector.model_files import load_model
from inspector.skeleton import skeleton_of
{PEAK_BYTES}
model = load_model(sys.argv[1])
before = peak_bytes()
size = len(skeleton_of(model).SerializeToString())
print(size, peak_bytes() - before)
"""
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    size, grown = map(int, done.stdout.split())
    assert size < 500
    assert grown < 8 * 2**20, "128 MB of weights stay where they are"


@needs_models
@pytest.mark.parametrize(
    "file",
    ["silero-vad-16k/model.onnx", "ultraface-rfb320/model.onnx", "gtcrn/ort_static_qdq.onnx"],
)
def test_skeletons_of_real_models_have_the_same_edges(file: str) -> None:
    loaded = load_model(MODELS / file)
    small = skeleton_of(loaded)
    for mine, its in zip(graphs(loaded.proto), graphs(small), strict=True):
        assert [(n.op_type, list(n.input), list(n.output)) for n in mine.node] == [
            (n.op_type, list(n.input), list(n.output)) for n in its.node
        ]
        assert [(t.name, t.data_type, t.dims) for t in mine.initializer] == [
            (t.name, t.data_type, t.dims) for t in its.initializer
        ]
    names = [n.name for g in graphs(small) for n in g.node]
    assert len(names) == len(set(names))
    assert "" not in names
    assert all(np.prod(t.dims) <= 64 or is_hollow(t) for t in tensors(small))
    assert len(small.SerializeToString()) < 400_000
