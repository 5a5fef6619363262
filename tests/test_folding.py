from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from inspector import folding
from inspector.folding import constant_value, folded_from, folded_names
from inspector.model import Model
from inspector.model_files import load_model
from tests.samples import MODELS, array, conv_relu_gemm, floats, model, needs_models, qdq_of


def graph(
    nodes: Sequence[onnx.NodeProto], constants: dict[str, Any], *, opset: int = 17
) -> onnx.ModelProto:
    """Nodes on constants; the model's own output is its input, so that nothing else runs."""
    arrays = [array(name, values) for name, values in constants.items()]
    through = helper.make_node("Identity", ["x"], ["out"], "through")
    return model([*nodes, through], [("x", [1])], [("out", [1])], arrays, opset=opset)


def of_kernel(proto: onnx.ModelProto, tensor: str) -> np.ndarray:
    """What ONNX Runtime computes for a tensor without optimising the graph."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.output.add(name=tensor)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(copy.SerializeToString(), options)
    return np.asarray(session.run([tensor], {"x": np.zeros(1, np.float32)})[0])


node = helper.make_node
W = floats((4, 6), 1)
CHAINS: dict[str, tuple[list[onnx.NodeProto], dict[str, Any]]] = {
    "identity": ([node("Identity", ["w"], ["y"])], {}),
    "transpose": ([node("Transpose", ["w"], ["y"], perm=[1, 0])], {}),
    "cast to half": ([node("Cast", ["w"], ["y"], to=TensorProto.FLOAT16)], {}),
    "reshape": ([node("Reshape", ["w", "s"], ["y"])], {"s": np.array([2, -1])}),
    "squeeze": (
        [node("Unsqueeze", ["w", "a"], ["u"]), node("Squeeze", ["u", "a"], ["y"])],
        {"a": np.array([1])},
    ),
    "slice": (
        [node("Slice", ["w", "b", "e", "a"], ["y"])],
        {"b": np.array([1]), "e": np.array([9]), "a": np.array([-1])},
    ),
    "concat": ([node("Concat", ["w", "v"], ["y"], axis=1)], {"v": floats((4, 2), 2)}),
    "gather": ([node("Gather", ["w", "i"], ["y"], axis=1)], {"i": np.array([[5, 0]])}),
    "split": ([node("Split", ["w"], ["y", "z"], axis=1)], {}),
    "second output of a split": ([node("Split", ["w"], ["z", "y"], axis=1)], {}),
    "arithmetic": (
        [
            node("Mul", ["w", "g"], ["m"]), node("Add", ["m", "g"], ["n"]),
            node("Sqrt", ["g"], ["r"]), node("Div", ["n", "r"], ["y"]),
        ],
        {"g": np.abs(floats((4, 1), 3)) + 1},
    ),
    "constant of shape": (
        [
            node("Shape", ["w"], ["s"]), node("ConstantOfShape", ["s"], ["c"]),
            node("Add", ["c", "w"], ["y"]),
        ],
        {},
    ),
    "where": (
        [node("Greater", ["w", "g"], ["t"]), node("Where", ["t", "w", "g"], ["y"])],
        {"g": np.float32(0.2)},
    ),
    "expand": ([node("Expand", ["w", "s"], ["y"])], {"s": np.array([3, 1, 1])}),
    "matmul": ([node("MatMul", ["w", "v"], ["y"])], {"v": floats((6, 3), 4)}),
    "absent optional input": ([node("Clip", ["w", "", "g"], ["y"])], {"g": np.float32(0.5)}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_a_value_computed_from_constants_is_the_kernels(name: str) -> None:
    nodes, constants = CHAINS[name]
    proto = graph(nodes, {"w": W, **constants})
    value, expected = constant_value(Model(proto), "y"), of_kernel(proto, "y")
    assert value is not None
    assert value.dtype == expected.dtype
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_a_constant_is_its_own_value() -> None:
    loaded = Model(graph([], {"w": W}))
    np.testing.assert_array_equal(constant_value(loaded, "w"), W)
    assert folded_from(loaded, "w") == ("w",)


def test_a_computed_or_unknown_tensor_has_no_value() -> None:
    loaded = Model(graph([node("Add", ["x", "w"], ["y"])], {"w": W}))
    for name in ("y", "x", "out", "nothing", ""):
        assert constant_value(loaded, name) is None
        assert folded_from(loaded, name) == ()
        assert name not in folded_names(loaded)


def test_a_weight_behind_q_dq_and_transpose_keeps_float64() -> None:
    pair, constants = qdq_of("w", "d", 0.013, 3)
    nodes = [*pair, node("Transpose", ["d"], ["t"]), node("Cast", ["t"], ["c"], to=1),
             node("Mul", ["c", "g"], ["y"])]  # fmt: skip
    gain = np.float32(1.1)
    proto = graph(nodes, {"w": W, "g": gain})
    proto.graph.initializer.extend(constants)
    loaded = Model(proto)
    scale = float(np.float32(0.013))
    codes = np.clip(np.rint(W.astype(np.float64) / scale) + 3, -128, 127)
    truth = (codes - 3).T * scale * float(gain)
    value = constant_value(loaded, "y")
    assert value is not None
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, truth, rtol=1e-15)
    np.testing.assert_allclose(value, of_kernel(proto, "y"), rtol=1e-6)
    quantized = constant_value(loaded, "d_q")
    assert quantized is not None
    assert quantized.dtype == np.int8
    np.testing.assert_array_equal(quantized, codes)
    assert folded_from(loaded, "y") == ("w", "d_s", "d_z", "g")


def test_half_precision_arithmetic_behind_a_dequantized_weight_is_computed() -> None:
    nodes = [node("DequantizeLinear", ["q", "s"], ["d"]), node("Mul", ["d", "g"], ["y"])]
    constants = {"q": np.array([[3, -7]], np.int8), "s": np.float16(0.1), "g": np.float16(3)}
    value = constant_value(Model(graph(nodes, constants, opset=21)), "y")
    np.testing.assert_array_equal(value, np.array([[3, -7]]) * float(np.float16(0.1)) * 3)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("RandomNormalLike", ["w"], ["y"])],
        [node("RandomNormal", [], ["y"], shape=[2])],
        [node("Bernoulli", ["w"], ["y"])],
        [node("MadeUp", ["w"], ["y"])],
        [node("MadeUp", ["w"], ["y"], domain="somebody.else")],
        [node("Neg", ["w"], ["y"], domain="somebody.else")],
        [node("Reshape", ["w", "s"], ["y"])],
        [node("Gather", ["w", "s"], ["y"])],
        [node("Add", ["w", "s"], ["y"])],
        [node("DequantizeLinear", ["q", "three"], ["y"])],
        [node("DequantizeLinear", ["q"], ["y"])],
        [node("Cast", ["w"], ["y"])],
        [node("Transpose", ["w"], ["y"], perm=[5, 0])],
        [node("SequenceConstruct", ["w", "w"], ["y"])],
        [node("Transpose", ["y"], ["z"]), node("Transpose", ["z"], ["y"])],
    ],
    ids=lambda nodes: " ".join(n.op_type for n in nodes),
)
def test_odd_random_and_unknown_nodes_give_no_value_and_no_error(
    nodes: list[onnx.NodeProto],
) -> None:
    constants = {"w": W, "s": np.array([7, 1000]), "q": np.zeros((4, 6), np.int8)}
    loaded = Model(graph(nodes, {**constants, "three": np.ones(3, np.float32)}))
    assert constant_value(loaded, "y") is None
    assert constant_value(loaded, "y") is None


@pytest.mark.parametrize(
    ("op_type", "inputs"),
    [("ConstantOfShape", ["huge"]), ("Expand", ["w", "huge"]), ("Tile", ["w", "huge"]),
     ("Range", ["zero", "many", "one"])],
)  # fmt: skip
def test_a_value_too_large_is_given_up_before_it_is_computed(
    op_type: str, inputs: list[str]
) -> None:
    """Terabytes, from a file of a hundred bytes."""
    constants = {"w": np.ones((1, 1), np.float32), "huge": np.array([2**21, 2**21]),
                 "zero": np.array(0), "many": np.array(2**41), "one": np.array(1)}  # fmt: skip
    nodes = [node(op_type, inputs, ["y"]), node("Neg", ["w"], ["fine"])]
    loaded = Model(graph(nodes, constants))
    assert constant_value(loaded, "y") is None
    np.testing.assert_array_equal(constant_value(loaded, "fine"), [[-1]])


def test_many_values_that_are_large_together_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "MAX_ELEMENTS", 1000)
    chain = [node("Neg", [f"t{at}" if at else "w"], [f"t{at + 1}"]) for at in range(60)]
    loaded = Model(graph(chain, {"w": W}))
    assert constant_value(loaded, "t60") is None
    assert constant_value(Model(graph(chain, {"w": W})), "t40") is not None


def test_a_chain_of_thousands_needs_no_recursion_and_is_computed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    computed: list[str] = []
    evaluate = folding._evaluate

    def counting(node: Any, *rest: Any) -> Any:
        computed.append(node.name)
        return evaluate(node, *rest)

    monkeypatch.setattr(folding, "_evaluate", counting)
    chain = [node("Neg", [f"t{at}" if at else "w"], [f"t{at + 1}"]) for at in range(3000)]
    loaded = Model(graph(chain, {"w": np.float32(1)}))
    assert constant_value(loaded, "t3000") == 1
    assert constant_value(loaded, "t2999") == -1
    assert constant_value(loaded, "t3000") == 1
    assert len(computed) == 3000


def test_kept_values_are_bounded_and_cannot_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "MAX_KEPT_BYTES", 10_000)
    nodes = [node("Neg", ["w"], [f"t{at}"]) for at in range(50)]
    loaded = Model(graph(nodes, {"w": np.ones(1000, np.float32)}))
    for at in range(50):
        value = constant_value(loaded, f"t{at}")
        assert value is not None
        with pytest.raises(ValueError, match="read-only"):
            value[0] = 5
    assert folding._folder(loaded).kept_bytes <= 10_000
    assert len(folding._folder(loaded).kept) <= 2


def test_nothing_is_kept_of_a_model_that_is_gone() -> None:
    loaded = Model(graph([node("Neg", ["w"], ["y"])], {"w": W}))
    constant_value(loaded, "y")
    folder = weakref.ref(folding._folder(loaded))
    del loaded
    gc.collect()
    assert folder() is None


def in_a_branch(nodes: list[onnx.NodeProto], constants: dict[str, Any]) -> Model:
    """An If whose branches hold `nodes`, which compute y; g and its negative lie outside."""
    body = helper.make_graph(
        nodes, "branch", [], [helper.make_tensor_value_info("y", 1, None)],
        [array(name, values) for name, values in constants.items()],
    )  # fmt: skip
    choose = node(
        "If", ["c"], ["out"], "choose", then_branch=body, else_branch=body
    )  # fmt: skip
    outside = [node("Neg", ["g"], ["negative"]), node("Greater", ["x", "g"], ["c"]), choose]
    return Model(model(outside, [("x", [1])], [("out", None)], [array("g", np.float32([2]))]))


def test_a_body_folds_its_own_constants_and_those_around_it() -> None:
    nodes = [node("Mul", ["w", "negative"], ["m"]), node("Add", ["m", "g"], ["y"]),
             node("Add", ["m", "x"], ["z"])]  # fmt: skip
    loaded = in_a_branch(nodes, {"w": W})
    for body in loaded.bodies:
        np.testing.assert_array_equal(constant_value(body, "y"), W * -2 + 2)
        np.testing.assert_array_equal(constant_value(body, "negative"), [-2])
        assert constant_value(body, "z") is None
        assert folded_from(body, "y") == ("w", "negative", "g")
    assert constant_value(loaded, "y") is None


def test_a_bodys_own_name_hides_the_one_around_it() -> None:
    loaded = in_a_branch([node("Abs", ["x"], ["g"]), node("Neg", ["g"], ["y"])], {})
    for body in loaded.bodies:
        assert constant_value(body, "g") is None
        assert constant_value(body, "y") is None
        assert not {"g", "y"} & folded_names(body)


def test_a_float_models_activations_are_no_constants() -> None:
    loaded = Model(conv_relu_gemm())
    assert folded_names(loaded) == {"w", "b", "gw", "gb"}


@needs_models
def test_every_constant_part_of_the_real_models_is_computed() -> None:
    found = 0
    for file in sorted(MODELS.glob("*/*.onnx")):
        loaded = load_model(file)
        for name in sorted(folded_names(loaded) - loaded.constant_names):
            assert constant_value(loaded, name) is not None, (file, name)
            found += 1
    assert found > 500
