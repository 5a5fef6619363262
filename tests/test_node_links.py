"""Which node belongs to which: small pairs with known answers, real ones by their files alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, quantize_dynamic

from inspector import workbench
from inspector.comparison import Pin
from inspector.matching import match_tensors
from inspector.model import Model
from inspector.model_files import load_model
from inspector.node_links import NodeLinks, link_nodes, only_nodes, twins_around
from inspector.skeleton import all_node_names, skeleton_of
from inspector.store import Workspace
from inspector.web import tasks
from tests.known_pairs import static
from tests.samples import (
    MODELS,
    array,
    conv_batchnorm,
    conv_relu_gemm,
    floats,
    model,
    needs_models,
    npz_folder,
    qdq_of,
    save,
)
from tests.test_workbench import load_detector, source

FEEDS = [{"x": floats((1, 3, 8, 8), s)} for s in range(2)]
SMALL_FEEDS = [{"x": floats((1, 3, 6, 6), s)} for s in range(2)]


def linked(float_model: Model | onnx.ModelProto, quantized: Model | onnx.ModelProto) -> NodeLinks:
    models = [m if isinstance(m, Model) else Model(m) for m in (float_model, quantized)]
    return link_nodes(*models, match_tensors(*models))


def of_folder(folder: Path) -> NodeLinks:
    return linked(load_model(folder / "f.onnx"), load_model(folder / "q.onnx"))


def check_whole(links: NodeLinks, float_model: Model, quantized: Model) -> None:
    """Every node of both files is there under its skeleton's name, and links are symmetric."""
    for side, loaded in ((links.float_nodes, float_model), (links.quantized_nodes, quantized)):
        assert set(side) == all_node_names(skeleton_of(loaded))
    there = {(f, q) for f, link in links.float_nodes.items() for q in link.partners}
    back = {(f, q) for q, link in links.quantized_nodes.items() for f in link.partners}
    assert there == back
    for side in (links.float_nodes, links.quantized_nodes):
        for link in side.values():
            assert len(set(link.partners)) == len(link.partners)


def served_by(links: NodeLinks) -> dict[str, tuple[str, ...]]:
    return {n: link.partners for n, link in links.quantized_nodes.items() if link.serves}


def by_tensor(links: NodeLinks) -> dict[str, str]:
    """The quantized nodes by what they compute."""
    return {o: n for n, link in links.quantized_nodes.items() for o in link.outputs}


# -- small pairs with known answers ----------------------------------------------------------------


def test_each_q_and_dq_goes_to_the_node_it_serves(tmp_path: Path) -> None:
    static(tmp_path, conv_relu_gemm(), FEEDS)
    links = of_folder(tmp_path)
    check_whole(links, load_model(tmp_path / "f.onnx"), load_model(tmp_path / "q.onnx"))
    made = by_tensor(links)
    first = {n: link.partners[0] for n, link in links.float_nodes.items()}
    assert first["conv"] == "conv"
    assert first["gemm"] == "gemm"
    assert first["pool"] == "pool"
    assert first["relu"] == "conv", "the Relu went into Q"
    expected = {
        "x_QuantizeLinear_Output": ("conv",), "x_DequantizeLinear_Output": ("conv",),
        "w_DequantizeLinear_Output": ("conv",), "b": ("conv",),
        "r_DequantizeLinear_Output": ("conv", "relu"),
        "p_DequantizeLinear_Output": ("pool",), "f_DequantizeLinear_Output": ("flatten",),
        "gw_DequantizeLinear_Output": ("gemm",), "gb": ("gemm",),
        "y": ("gemm",), "y_QuantizeLinear_Output": ("gemm",),
    }  # fmt: skip
    for tensor, partners in expected.items():
        link = links.quantized_nodes[made[tensor]]
        assert set(link.partners) == set(partners), tensor
        assert link.serves
    assert links.quantized_nodes["conv"].partners == ("conv", "relu")
    assert links.quantized_nodes["conv"].tensor == links.float_nodes["conv"].tensor == "r"
    assert links.float_nodes["relu"].tensor == "r"
    assert links.quantized_nodes[made["x_DequantizeLinear_Output"]].tensor == "x"
    assert links.float_nodes["relu"].sources == ("conv",)
    assert links.quantized_nodes["gemm"].sources[0] == made["f_DequantizeLinear_Output"]


def test_what_was_folded_goes_to_what_it_was_folded_into(tmp_path: Path) -> None:
    static(tmp_path, conv_batchnorm(), SMALL_FEEDS, preprocess=True)
    links = of_folder(tmp_path)
    assert [n for n, link in links.quantized_nodes.items() if not link.serves] == ["conv"]
    for name in ("conv", "bn", "relu"):
        assert links.float_nodes[name].partners[0] == "conv"
        assert links.float_nodes[name].tensor == "y"
        assert not links.float_nodes[name].serves
    assert links.quantized_nodes["conv"].partners[0] == "conv"
    assert set(links.quantized_nodes["conv"].partners) == {"conv", "bn", "relu"}


def test_operators_on_integers_go_to_the_float_ones(tmp_path: Path) -> None:
    static(tmp_path, conv_relu_gemm(), FEEDS, quant_format=QuantFormat.QOperator)
    links = of_folder(tmp_path)
    check_whole(links, load_model(tmp_path / "f.onnx"), load_model(tmp_path / "q.onnx"))
    kinds = {link.op_type: (n, link) for n, link in links.quantized_nodes.items()}
    assert kinds["QLinearConv"][1].partners == ("conv", "relu")
    assert kinds["QGemm"][1].partners[0] == "gemm"
    assert kinds["QLinearGlobalAveragePool"][1].partners[0] == "pool"
    assert kinds["QuantizeLinear"][1].partners == ("conv",)
    assert kinds["DequantizeLinear"][1].partners == ("gemm",)
    assert {link.op_type for link in links.quantized_nodes.values() if link.serves} == {
        "QuantizeLinear", "DequantizeLinear"
    }  # fmt: skip


def test_the_nodes_of_a_dynamic_product_serve_it(tmp_path: Path) -> None:
    proto = model(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"], "first"),
            helper.make_node("Relu", ["m"], ["r"], "relu"),
            helper.make_node("Gemm", ["r", "w2", "b"], ["y"], "second"),
            helper.make_node("MatMul", ["r", "w3"], ["z"], "third"),
        ],
        [("x", [2, 8])],
        [("y", [2, 4]), ("z", [2, 5])],
        [
            array("w", floats((8, 8), 1)),
            array("w2", floats((8, 4), 2)),
            array("b", floats((4,), 3)),
            array("w3", floats((8, 5), 4)),
        ],
    )
    save(proto, tmp_path / "f.onnx")
    quantize_dynamic(tmp_path / "f.onnx", tmp_path / "q.onnx")
    links = of_folder(tmp_path)
    check_whole(links, load_model(tmp_path / "f.onnx"), load_model(tmp_path / "q.onnx"))
    products = {
        link.partners[0]: n
        for n, link in links.quantized_nodes.items()
        if link.op_type == "MatMulInteger"
    }
    assert set(products) == {"first", "second", "third"}
    for mine, its in products.items():
        assert links.float_nodes[mine].partners[0] == its
    assert links.quantized_nodes["relu"].partners[0] == "relu"
    quantizers = {
        link.partners for link in links.quantized_nodes.values()
        if link.op_type == "DynamicQuantizeLinear"
    }  # fmt: skip
    assert quantizers == {("first",), ("second", "third")}, "they serve the products"
    helpers = [k for k in links.quantized_nodes.values() if k.op_type in ("Cast", "Mul")]
    assert len(helpers) == 9, "a Cast, a product of scales and a scaling for each product"
    for link in helpers:
        assert link.serves
        assert len(link.partners) == 1
    assert {k.partners for k in helpers} == {("first",), ("second",), ("third",)}
    assert [k.partners for k in links.quantized_nodes.values() if k.op_type == "Add"] == [
        ("second",)
    ]


def test_a_graph_input_belongs_to_all_its_readers_and_a_shared_weight_to_both() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "left"),
        helper.make_node("MatMul", ["x", "w"], ["b"], "right"),
        helper.make_node("Add", ["a", "b"], ["y"], "add"),
    ]
    ends: Any = ([("x", [2, 3])], [("y", [2, 3])])
    weight = floats((3, 3))
    proto = model(nodes, *ends, [array("w", weight)])
    q, constants = qdq_of("x", "x_dq", 0.05, 0)
    codes = np.clip(np.rint(weight / 0.03), -127, 127).astype(np.int8)
    dq = helper.make_node("DequantizeLinear", ["w_q", "w_s"], ["w_dq"], "DQ_w")
    inner = [
        helper.make_node("MatMul", ["x_dq", "w_dq"], ["a"], "left"),
        helper.make_node("MatMul", ["x_dq", "w_dq"], ["b"], "right"),
        nodes[2],
    ]
    more = [*constants, array("w_q", codes), array("w_s", np.float32(0.03))]
    links = linked(proto, model([*q, dq, *inner], *ends, more))
    for name in ("Q_x_dq", "DQ_x_dq", "DQ_w"):
        assert set(links.quantized_nodes[name].partners) == {"left", "right"}
        assert links.quantized_nodes[name].serves
    assert links.quantized_nodes["DQ_x_dq"].tensor == "x"
    assert links.float_nodes["left"].partners[0] == "left"
    assert set(links.float_nodes["left"].partners) == {"left", "Q_x_dq", "DQ_x_dq", "DQ_w"}


def test_a_relu_folded_behind_an_input_belongs_to_the_inputs_own_q() -> None:
    weight = array("w", floats((4, 3, 1, 1)))
    ends: Any = ([("x", [1, 3, 5, 5])], [("y", [1, 4, 5, 5])])
    proto = model(
        [helper.make_node("Relu", ["x"], ["r"], "relu"),
         helper.make_node("Conv", ["r", "w"], ["y"], "conv")], *ends, [weight],
    )  # fmt: skip
    q, constants = qdq_of("x", "x_dq", 0.05, 0, "uint8")
    conv = helper.make_node("Conv", ["x_dq", "w"], ["y"], "conv")
    links = linked(proto, model([*q, conv], *ends, [weight, *constants]))
    for name in ("Q_x_dq", "DQ_x_dq"):
        assert links.quantized_nodes[name].partners == ("relu",), "it reads the input"
    assert set(links.float_nodes["relu"].partners) == {"Q_x_dq", "DQ_x_dq"}
    assert links.float_nodes["conv"].partners == ("conv",)


def test_several_rectifiers_in_a_row_go_to_the_node_before_them() -> None:
    weight = array("w", floats((4, 3, 1, 1)))
    limits = [array("low", np.float32(0)), array("high", np.float32(6))]
    ends: Any = ([("x", [1, 3, 5, 5])], [("y", [1, 4, 5, 5])])
    conv = helper.make_node("Conv", ["x", "w"], ["c"], "conv")
    proto = model(
        [conv, helper.make_node("Relu", ["c"], ["r"], "relu"),
         helper.make_node("Clip", ["r", "low", "high"], ["k"], "clip"),
         helper.make_node("Sigmoid", ["k"], ["y"], "end")], *ends, [weight, *limits],
    )  # fmt: skip
    q, constants = qdq_of("c", "c_dq", 6 / 255, 0, "uint8")
    end = helper.make_node("Sigmoid", ["c_dq"], ["y"], "end")
    links = linked(proto, model([conv, *q, end], *ends, [weight, *constants]))
    for name in ("conv", "relu", "clip"):
        assert links.float_nodes[name].partners[0] == "conv"
        assert links.float_nodes[name].tensor == "k"
    assert links.quantized_nodes["conv"].partners[0] == "conv"


def test_inserted_transposes_serve_the_node_between_them() -> None:
    weight = array("w", floats((4, 3, 1, 1)))
    proto = model(
        [helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
         helper.make_node("Relu", ["c"], ["y"], "relu")],
        [("x", [1, 3, 5, 5])], [("y", [1, 4, 5, 5])], [weight],
    )  # fmt: skip
    q, constants = qdq_of("c", "c_dq", 0.05, 0)
    twin = model(
        [
            helper.make_node("Transpose", ["x"], ["t"], "to_first", perm=[0, 3, 1, 2]),
            helper.make_node("Conv", ["t", "w"], ["c"], "cv"),
            *q,
            helper.make_node("Relu", ["c_dq"], ["r"], "rl"),
            helper.make_node("Transpose", ["r"], ["y"], "to_last", perm=[0, 2, 3, 1]),
        ],
        [("x", [1, 5, 5, 3])], [("y", [1, 5, 5, 4])], [weight, *constants],
    )  # fmt: skip
    links = linked(proto, twin)
    assert links.quantized_nodes["cv"].partners[0] == "conv"
    assert links.quantized_nodes["rl"].partners[0] == "relu"
    assert links.quantized_nodes["to_first"].partners == ("conv",)
    assert links.quantized_nodes["to_last"].partners == ("relu",)
    assert links.quantized_nodes["to_first"].serves
    assert links.quantized_nodes["to_last"].serves


def body_model(quantized: bool) -> onnx.ModelProto:
    """An If with two MatMuls, two Relus and an Add in each branch.

    The quantized twin has Q/DQ inside, its MatMuls stand in the other order under other names (only
    their weights tell which is which), its Relus in the other order under other tensors.
    """
    branches = {}
    for at, side in enumerate(("then_branch", "else_branch")):
        last = f"{side}_q" if quantized else f"{side}_o"
        end = helper.make_tensor_value_info(last, TensorProto.FLOAT, [2, 8])
        weights = [floats((8, 8), 10 * at + number, 0.2) for number in range(2)]
        constants = [array(f"w{number}", weight) for number, weight in enumerate(weights)]
        nodes = [
            helper.make_node("MatMul", ["x", "w0"], ["m0"], "first"),
            helper.make_node("MatMul", ["x", "w1"], ["m1"], "second"),
            helper.make_node("Relu", ["m0"], ["r0"], "relu0"),
            helper.make_node("Relu", ["m1"], ["r1"], "relu1"),
            helper.make_node("Add", ["r0", "r1"], [last]),
        ]
        if quantized:
            codes = [np.clip(np.rint(w / 0.01), -127, 127).astype(np.int8) for w in weights]
            q, more = qdq_of("p", "p_dq", 0.02, 0)
            constants = [array("c0", codes[0]), array("c1", codes[1]), array("s", np.float32(0.01))]
            constants += more
            nodes = [
                helper.make_node("DequantizeLinear", ["c1", "s"], ["d1"], "DQ_1"),
                helper.make_node("MatMul", ["x", "d1"], ["o"], "mm_a"),
                helper.make_node("DequantizeLinear", ["c0", "s"], ["d0"], "DQ_0"),
                helper.make_node("MatMul", ["x", "d0"], ["p"], "mm_b"),
                *q,
                helper.make_node("Relu", ["o"], ["t"], "relu1"),
                helper.make_node("Relu", ["p_dq"], ["u"], "relu0"),
                helper.make_node("Add", ["u", "t"], [last], "renamed"),
            ]
        branches[side] = helper.make_graph(nodes, side, [], [end], constants)
    nodes = [helper.make_node("If", ["c"], ["y"], "either", **branches)]
    return helper.make_model(
        helper.make_graph(
            nodes, "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8]),
             helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 8])],
        ),
        opset_imports=[helper.make_opsetid("", 17)], ir_version=10,
    )  # fmt: skip


def test_nodes_in_bodies_belong_to_those_of_the_same_body() -> None:
    models = Model(body_model(quantized=False)), Model(body_model(quantized=True))
    links = linked(*models)
    check_whole(links, *models)
    for side in ("then_branch", "else_branch"):
        inside = f"either/{side}"
        pairs = {"mm_b": "first", "mm_a": "second", "relu0": "relu0", "relu1": "relu1",
                 "renamed": f"Add_{side}_o", "Q_p_dq": "first", "DQ_p_dq": "first",
                 "DQ_0": "first", "DQ_1": "second"}  # fmt: skip
        for its, mine in pairs.items():
            link = links.quantized_nodes[f"{inside}/{its}"]
            assert link.partners == (f"{inside}/{mine}",), its
            assert link.scope == inside
            assert link.serves == ("Q" in its)
        assert links.float_nodes[f"{inside}/first"].partners[0] == f"{inside}/mm_b"
        assert links.float_nodes[f"{inside}/relu0"].sources == (f"{inside}/first",)
    assert links.quantized_nodes["either"].partners == ("either",)


def test_a_node_that_stands_for_nothing_has_no_partner() -> None:
    proto = model([helper.make_node("Relu", ["x"], ["y"], "relu")], [("x", [3])], [("y", [3])])
    twin = model(
        [helper.make_node("Relu", ["x"], ["y"], "relu"),
         helper.make_node("Exp", ["y"], ["e"], "extra"),
         helper.make_node("Reshape", ["e", "to"], ["z"], "moved")],
        [("x", [3])], [("y", [3]), ("z", [3, 1])], [array("to", np.int64([3, 1]))],
    )  # fmt: skip
    links = linked(proto, twin)
    for name in ("extra", "moved"):
        extra = links.quantized_nodes[name]
        assert (extra.partners, extra.serves, extra.tensor) == ((), False, "")
    assert links.quantized_nodes["relu"].partners == ("relu",)


def test_constants_go_to_who_reads_them_on_both_sides() -> None:
    weight = array("", floats((3, 3)))
    nodes = [
        helper.make_node("Constant", [], ["w"], "const", value=weight),
        helper.make_node("Transpose", ["w"], ["wt"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "wt"], ["y"], "mm"),
    ]
    proto = model(nodes, [("x", [2, 3])], [("y", [2, 3])])
    models = Model(proto), Model(proto)
    links = linked(*models)
    check_whole(links, *models)
    for side in (links.float_nodes, links.quantized_nodes):
        for name in ("const", "turn"):
            assert side[name].partners[0] == "mm"
            assert side[name].serves
        assert side["mm"].partners[0] == "mm"
        assert not side["mm"].serves


def test_empty_and_identical_models_link_to_themselves() -> None:
    empty = model([], [("x", [2])], [("x", [2])])
    assert linked(empty, empty).to_json() == {"float": {}, "quantized": {}}
    links = linked(conv_relu_gemm(), conv_relu_gemm())
    assert all(link.partners == (n,) for n, link in links.float_nodes.items())


def test_the_json_is_that_of_the_records() -> None:
    links = linked(conv_relu_gemm(), conv_relu_gemm())
    text = json.loads(json.dumps(links.to_json(), allow_nan=False))
    assert text["float"]["relu"] == {
        "op_type": "Relu", "tensor": "r", "scope": "", "partners": ["relu"], "serves": False,
        "sources": ["conv"], "outputs": ["r"],
    }  # fmt: skip
    assert list(text["quantized"]) == ["conv", "relu", "pool", "flatten", "gemm"]


def test_a_part_of_the_links_leads_nowhere_outside(tmp_path: Path) -> None:
    static(tmp_path, conv_relu_gemm(), FEEDS)
    links = of_folder(tmp_path).to_json()
    theirs = twins_around(links, "float", ["conv", "relu"])
    assert "conv" in theirs
    assert "gemm" not in theirs
    part = only_nodes(links, ["conv", "relu"], theirs)
    assert set(part["float"]) == {"conv", "relu"}
    assert set(part["quantized"]) == theirs
    for side, other in (("float", "quantized"), ("quantized", "float")):
        for link in part[side].values():
            assert set(link["partners"]) <= set(part[other])
            assert set(link["sources"]) <= set(part[side])
    alone = only_nodes(links, ["conv"], ["conv"])
    assert alone["float"]["conv"]["partners"] == alone["quantized"]["conv"]["partners"] == ["conv"]


def test_what_has_no_partner_comes_along_where_it_lies_between() -> None:
    def one(partners: list[str], *sources: str) -> dict[str, Any]:
        return {"partners": partners, "sources": list(sources)}

    links = {
        "float": {"a": one(["qa"]), "b": one(["qb"], "a"), "c": one(["qc"], "b")},
        "quantized": {
            "qa": one(["a"]), "odd": one([], "qa"), "odder": one([], "odd"),
            "qb": one(["b"], "odder"), "later": one([], "qb"), "qc": one(["c"], "later"),
        },
    }  # fmt: skip
    assert twins_around(links, "float", ["a", "b"]) == {"qa", "odd", "odder", "qb"}
    assert twins_around(links, "quantized", ["qa", "odd"]) == {"a"}


# -- real pairs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Callable[[str, str], tuple[Model, Model, NodeLinks]]:
    @cache
    def load(network: str, file: str) -> tuple[Model, Model, NodeLinks]:
        models = load_model(MODELS / network / "model.onnx"), load_model(MODELS / network / file)
        return (*models, linked(*models))

    return load


Real = Callable[[str, str], tuple[Model, Model, NodeLinks]]
STORAGE = ("QuantizeLinear", "DequantizeLinear")
COVERED = [
    ("fastestdet", "ort_static_qdq.onnx"),
    ("gtcrn", "ort_static_qdq.onnx"),
    ("ultraface-rfb320", "ort_static_qdq.onnx"),
    ("silero-vad-16k", "ort_static_qdq.onnx"),
    ("minilm-l6", "ort_dynamic.onnx"),
    ("mlperf-resnet8", "quantized.onnx"),
    ("mlperf-kws-dscnn", "quantized.onnx"),
]


@needs_models
@pytest.mark.parametrize(("network", "file"), COVERED)
def test_every_q_and_dq_of_real_pairs_has_a_partner(network: str, file: str, real: Real) -> None:
    float_model, quantized, links = real(network, file)
    check_whole(links, float_model, quantized)
    nodes = links.quantized_nodes
    lone = [n for n, k in nodes.items() if k.op_type in STORAGE and not k.partners]
    assert lone == []
    assert all(k.serves for k in nodes.values() if k.op_type in STORAGE)
    # What is linked as one operator is one in both files.
    for name, link in links.float_nodes.items():
        if link.op_type in ("Conv", "MatMul", "Gemm", "LSTM", "GRU", "ConvTranspose"):
            assert link.partners, name


@needs_models
def test_each_conv_of_a_detector_has_the_conv_with_its_weight(real: Real) -> None:
    float_model, quantized, links = real("fastestdet", "ort_static_qdq.onnx")

    def weights(model: Model) -> dict[str, np.ndarray]:
        """The weight of each Conv, read by onnx from the file alone."""
        graph = model.proto.graph
        values = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        made = {o: n for n in graph.node for o in n.output}
        found = {}
        for node in graph.node:
            if node.op_type == "Conv":
                name = node.input[1]
                if name in made:
                    codes, scale, zero = (values[i].astype(float) for i in made[name].input)
                    found[node.name] = (codes - zero) * scale
                else:
                    found[node.name] = values[name].astype(float)
        return found

    mine, its = weights(float_model), weights(quantized)
    assert len(mine) == len(its) > 50
    taken = []
    for name, weight in mine.items():
        partner = links.float_nodes[name].partners[0]
        assert links.quantized_nodes[partner].op_type == "Conv"
        assert links.quantized_nodes[partner].partners[0] == name
        assert [p for p in links.float_nodes[name].partners if p in its] == [partner]
        noise = np.abs(its[partner] - weight).max()
        assert noise <= np.abs(weight).max() / 100, "the same weight but for its quantization"
        taken.append(partner)
    assert sorted(taken) == sorted(its)


@needs_models
def test_products_in_the_bodies_of_a_real_model_have_the_same_weight(real: Real) -> None:
    _float_model, _quantized, links = real("silero-vad-16k", "ort_static_qdq.onnx")
    inside = [k for k in links.float_nodes.values() if k.scope and k.op_type != "Constant"]
    assert len(inside) > 50
    assert sum(bool(k.partners) for k in inside) >= 0.9 * len(inside)
    for link in inside:
        if link.serves or not link.partners:
            continue
        its = links.quantized_nodes[link.partners[0]]
        assert its.op_type == link.op_type
        assert its.scope.count("/") == link.scope.count("/")


@needs_models
def test_every_node_of_a_dynamic_product_in_a_real_model_has_one_product(real: Real) -> None:
    _, _quantized, links = real("minilm-l6", "ort_dynamic.onnx")
    products = [k for k in links.quantized_nodes.values() if k.op_type == "MatMulInteger"]
    assert len({k.partners[0] for k in products}) == len(products) > 30
    assert all(links.float_nodes[k.partners[0]].op_type == "MatMul" for k in products)
    for kind in ("DynamicQuantizeLinear", "Cast", "Mul"):
        own = [k for n, k in links.quantized_nodes.items() if k.op_type == kind and k.serves]
        assert all(k.partners for k in own)
        assert own


# -- a run's graph ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_runs_graph_is_made_once_and_again_after_a_match_by_hand(tmp_path: Path) -> None:
    run_id = load_detector(tmp_path)
    made = workbench.graph_of_run(tmp_path, run_id=run_id)
    folder = Workspace(tmp_path).run_folder(run_id) / "graph"
    assert sorted(p.name for p in folder.iterdir()) == [
        "float.onnx", "links.json", "quantized.onnx"
    ]  # fmt: skip
    for side in ("float", "quantized"):
        skeleton = onnx.load(made[side])
        assert {n.name for n in skeleton.graph.node} == set(made["links"][side])
        assert made["nodes"][side] == len(skeleton.graph.node)
        assert Path(made[side]).stat().st_size < 60_000
    assert json.loads((folder / "links.json").read_text()) == made["links"]
    assert (made["around"], made["hops"]) == ("", 0)
    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert tasks.graph_of_run(tmp_path, run_id=run_id) == made
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == times

    conv = next(n for n, k in made["links"]["float"].items() if k["op_type"] == "Conv")
    tensor = made["links"]["float"][conv]["tensor"]
    workbench.rematch(tmp_path, run_id=run_id, pins=[Pin(float_name=tensor, quantized_name=None)])
    again = workbench.graph_of_run(tmp_path, run_id=run_id)
    assert again["links"]["float"][conv]["tensor"] != tensor
    assert json.loads((folder / "links.json").read_text()) == again["links"]
    (folder / "float.onnx").unlink()
    assert workbench.graph_of_run(tmp_path, run_id=run_id) == again
    assert (folder / "float.onnx").is_file()
    assert not [*(tmp_path / "temporary").iterdir()]


def load_chain(root: Path) -> str:
    """20 Adds in a row, each with Q and DQ behind it in the quantized file."""
    files = root / "chain"
    files.mkdir(parents=True)
    plain, twin, constants = [], [], [array("one", np.float32([0.1]))]
    for at in range(20):
        name = "y" if at == 19 else f"t{at}"
        before = f"t{at - 1}" if at else "x"
        plain.append(helper.make_node("Add", [before, "one"], [name], f"add{at}"))
        before = f"t{at - 1}_dq" if at else "x"
        twin.append(helper.make_node("Add", [before, "one"], [name], f"add{at}"))
        if at < 19:
            q, more = qdq_of(name, f"{name}_dq", 0.05, 0)
            twin += q
            constants += more
    ends: Any = ([("x", [1, 4])], [("y", [1, 4])])
    save(model(plain, *ends, constants[:1]), files / "float.onnx")
    save(model(twin, *ends, constants), files / "quantized.onnx")
    feeds = npz_folder(files / "feeds", [{"x": floats((1, 4), at)} for at in range(2)])
    return workbench.load_pair(
        root, float_path=files / "float.onnx", quantized_path=files / "quantized.onnx",
        inputs=source(feeds),
    )  # fmt: skip


def test_a_graph_above_the_limit_is_cut_to_the_neighbourhood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = load_chain(tmp_path)
    whole = workbench.graph_of_run(tmp_path, run_id=run_id, around="add5", hops=2)
    assert (whole["around"], whole["nodes"]) == ("", {"float": 20, "quantized": 58})
    monkeypatch.setattr(workbench, "LIMIT_NODES", 15)
    for around in ("add5", "Q_t5_dq"):
        made = workbench.graph_of_run(tmp_path, run_id=run_id, around=around, hops=2)
        assert (made["around"], made["hops"]) == ("add5", 2)
        mine = {n.name for n in onnx.load(made["float"]).graph.node}
        assert mine == {"add3", "add4", "add5", "add6", "add7"} == set(made["links"]["float"])
        theirs = {n.name for n in onnx.load(made["quantized"]).graph.node}
        assert theirs == set(made["links"]["quantized"])
        assert theirs == {k for at in range(3, 8) for k in (f"add{at}", f"Q_t{at}_dq",
                                                            f"DQ_t{at}_dq")}  # fmt: skip
        assert made["nodes"] == whole["nodes"]
    near = workbench.graph_of_run(tmp_path, run_id=run_id, around="add5", hops=9)
    assert near["hops"] == 2, "no further than the limit allows"
    worst = workbench.graph_of_run(tmp_path, run_id=run_id)
    assert worst["around"].startswith("add")
    saved = json.loads((Path(worst["float"]).parent / "links.json").read_text())
    assert saved == whole["links"], "the file keeps all of them"
    with pytest.raises(workbench.InspectorError, match="has no node 'nobody'"):
        workbench.graph_of_run(tmp_path, run_id=run_id, around="nobody")
