"""Integer operators and bodies: compared with the truth, which is float64 on plain sessions.

Every case is a float model and its quantized twin around one operator. A weight's truth is
(q - zero_point) * scale on the integers in the file, an output's is what both files give with
optimisations off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from tests.known_pairs import Arrays, Pair, by_hand, constants, db, spread, static, weight_of
from tests.samples import array, floats, model, save

# The runtime computes in float32; what the file stores is exact.
WEIGHT_DB = 1e-6
OUTPUT_DB = 1e-4
ROWS = [{"x": floats((4, 6), s)} for s in range(3)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pair, and (float values, what the quantized file stores for them) of its weights."""

    pair: Pair
    weights: dict[str, tuple[np.ndarray, np.ndarray]]


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of bodies too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)


def stored(pair: Pair, name: str, axis: int | None = None) -> np.ndarray:
    """(q - zero_point) * scale of a constant, from the three constants that a quantizer wrote."""
    values = constants(onnx.load(pair.folder / "q.onnx"))
    codes, scale, zero = (
        values[f"{name}_{part}"].astype(np.float64) for part in ("quantized", "scale", "zero_point")
    )
    given = {} if axis is None else {"axis": axis}
    return (codes - spread(zero, codes, given)) * spread(scale, codes, given)


def int8(values: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Symmetric codes per tensor and their scale."""
    scale = np.float32(np.abs(values).max() / 127)
    return np.clip(np.rint(values / scale), -127, 127).astype(np.int8), scale


# -- QLinear operators -------------------------------------------------------------------------


def after_matmul(
    after: Sequence[onnx.NodeProto], extra: Sequence[onnx.TensorProto] = (), columns: int = 5
) -> onnx.ModelProto:
    """m = x w, and `after` on it; w is not centred on zero."""
    matmul = helper.make_node("MatMul", ["x", "w"], ["m"], "mm")
    w = array("w", floats((6, 5), 1) + np.float32(0.4))
    return model([matmul, *after], [("x", [4, 6])], [("y", [4, columns])], [w, *extra])


def qlinear(*weights: str, axis: int | None = None, **options: Any) -> Callable[..., Case]:
    """The operator-oriented form that ONNX Runtime's static quantizer makes of a model."""

    def build(folder: Path, proto: onnx.ModelProto) -> Case:
        pair = static(folder, proto, ROWS, quant_format=QuantFormat.QOperator, **options)
        values = constants(proto)
        return Case(
            pair=pair,
            weights={n: (values[n], stored(pair, n, axis if n == "w" else None)) for n in weights},
        )

    return build


def qlinear_matmul(folder: Path) -> Case:
    proto = after_matmul([helper.make_node("Sigmoid", ["m"], ["y"], "sigmoid")])
    kinds = {"weight_type": QuantType.QUInt8, "activation_type": QuantType.QUInt8}
    return qlinear("w", **kinds)(folder, proto)


def qlinear_matmul_per_channel(folder: Path) -> Case:
    proto = after_matmul([helper.make_node("Sigmoid", ["m"], ["y"], "sigmoid")])
    return qlinear("w", axis=1, per_channel=True)(folder, proto)


def qlinear_add(folder: Path) -> Case:
    node = helper.make_node("Add", ["m", "a"], ["y"], "add")
    return qlinear("w", "a")(folder, after_matmul([node], [array("a", floats((4, 5), 2))]))


def qlinear_mul(folder: Path) -> Case:
    node = helper.make_node("Mul", ["m", "a"], ["y"], "mul")
    return qlinear("w", "a")(folder, after_matmul([node], [array("a", floats((4, 5), 2))]))


def qlinear_concat(folder: Path) -> Case:
    node = helper.make_node("Concat", ["m", "a"], ["y"], "join", axis=1)
    proto = after_matmul([node], [array("a", floats((4, 3), 2))], columns=8)
    return qlinear("w", "a")(folder, proto)


def qlinear_sigmoid(folder: Path) -> Case:
    return qlinear("w")(folder, after_matmul([helper.make_node("Sigmoid", ["m"], ["y"], "s")]))


def qlinear_softmax(folder: Path) -> Case:
    node = helper.make_node("Softmax", ["m"], ["y"], "softmax", axis=-1)
    return qlinear("w")(folder, after_matmul([node]))


# -- ranges found at run time ------------------------------------------------------------------


def dynamic(folder: Path, proto: onnx.ModelProto, feeds: Sequence[Arrays], **options: Any) -> Pair:
    quantize_dynamic(save(proto, folder / "f.onnx"), folder / "q.onnx", **options)
    return Pair(folder=folder, feeds=feeds)


def conv_integer(folder: Path) -> Case:
    proto = model(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
            helper.make_node("Tanh", ["c"], ["y"], "tanh"),
        ],
        [("x", [1, 2, 5, 5])],
        [("y", [1, 3, 5, 5])],
        [array("w", floats((3, 2, 3, 3), 1) + np.float32(0.2)), array("b", floats((3,), 2))],
    )
    pair = dynamic(
        folder,
        proto,
        [{"x": floats((1, 2, 5, 5), s)} for s in range(3)],
        op_types_to_quantize=["Conv"],
        weight_type=QuantType.QUInt8,
    )
    return Case(pair=pair, weights={"w": (constants(proto)["w"], stored(pair, "w"))})


def dynamic_quantize_matmul(folder: Path) -> Case:
    """As ONNX Runtime fuses it, with one scale and zero point per column."""
    w, b = floats((6, 5), 1) + np.float32(0.4), floats((5,), 2)
    low, high = np.minimum(w.min(axis=0), 0), np.maximum(w.max(axis=0), 0)
    scale = ((high - low) / 255).astype(np.float32)
    zero = np.rint(-128 - low / scale).astype(np.int8)
    codes = np.clip(np.rint(w / scale) + zero, -128, 127).astype(np.int8)
    proto = model(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"], "mm"),
            helper.make_node("Add", ["m", "b"], ["a"], "add"),
            helper.make_node("Tanh", ["a"], ["y"], "tanh"),
        ],
        [("x", [4, 6])],
        [("y", [4, 5])],
        [array("w", w), array("b", b)],
    )
    quantized = model(
        [
            helper.make_node(
                "DynamicQuantizeMatMul",
                ["x", "w_quantized", "w_scale", "w_zero_point", "b"],
                ["a"],
                "mm_quantized",
                domain="com.microsoft",
            ),
            helper.make_node("Tanh", ["a"], ["y"], "tanh"),
        ],
        [("x", [4, 6])],
        [("y", [4, 5])],
        [
            array("w_quantized", codes),
            array("w_scale", scale),
            array("w_zero_point", zero),
            array("b", b),
        ],
        contrib=True,
    )
    pair = by_hand(folder, proto, quantized, ROWS)
    return Case(pair=pair, weights={"w": (w, stored(pair, "w", 1))})


def dynamic_quantize_lstm(folder: Path) -> Case:
    """Both directions; the operator reads its weights transposed."""
    proto = model(
        [
            helper.make_node(
                "LSTM",
                ["x", "w", "r", "b"],
                ["l"],
                "lstm",
                hidden_size=8,
                direction="bidirectional",
            ),
            helper.make_node("Sigmoid", ["l"], ["y"], "sigmoid"),
        ],
        [("x", [4, 1, 6])],
        [("y", [4, 2, 1, 8])],
        [
            array("w", floats((2, 32, 6), 1)),
            array("r", floats((2, 32, 8), 2, 0.4)),
            array("b", floats((2, 64), 3)),
        ],
    )
    feeds = [{"x": floats((4, 1, 6), s)} for s in range(3)]
    pair = dynamic(folder, proto, feeds, op_types_to_quantize=["LSTM"])
    return Case(
        pair=pair,
        weights={
            n: (constants(proto)[n], stored(pair, n, 0).transpose(0, 2, 1)) for n in ("w", "r")
        },
    )


# -- blocks and small floats -------------------------------------------------------------------


def gather_block_quantized(folder: Path) -> Case:
    """4-bit codes in blocks of 32 along the rows of a table."""
    table = floats((50, 64), 1) + np.float32(0.3)
    proto = model(
        [
            helper.make_node("Gather", ["t", "x"], ["e"], "gather"),
            helper.make_node("Tanh", ["e"], ["y"], "tanh"),
        ],
        [("x", [5])],
        [("y", [5, 64])],
        [array("t", table)],
        opset=21,
        contrib=True,
    )
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    quantizer = MatMulNBitsQuantizer(
        onnx.load(save(proto, folder / "f.onnx")),
        bits=4,
        block_size=32,
        is_symmetric=False,
        op_types_to_quantize=("Gather",),
        quant_axes=(("Gather", 1),),
    )
    quantizer.process()
    quantized = quantizer.model.model
    pair = by_hand(folder, proto, quantized, [{"x": np.arange(5) + s} for s in range(3)])
    node = next(n for n in quantized.graph.node if n.op_type == "GatherBlockQuantized")
    values = constants(quantized)
    codes, scale, zero = (values[node.input[at]].astype(np.float64) for at in (0, 2, 3))
    assert (codes.shape, scale.shape, zero.shape) == ((50, 64), (50, 2), (50, 2))
    actual = (codes - np.repeat(zero, 32, axis=1)) * np.repeat(scale, 32, axis=1)
    return Case(pair=pair, weights={"t": (table, actual)})


def small_floats(dtype: Any) -> Callable[[Path], Case]:
    def build(folder: Path) -> Case:
        proto = after_matmul([helper.make_node("Tanh", ["m"], ["y"], "tanh")])
        proto.opset_import[0].version = 21
        w, scale = constants(proto)["w"], np.float32(0.01)
        codes = (w / scale).astype(dtype)
        zero = np.zeros((), dtype)
        quantized = model(
            [
                helper.make_node("QuantizeLinear", ["x", "x_s", "x_z"], ["x_q"], "x_q"),
                helper.make_node("DequantizeLinear", ["x_q", "x_s", "x_z"], ["x_d"], "x_dq"),
                helper.make_node("DequantizeLinear", ["w_q", "w_s", "w_z"], ["w_d"], "w_dq"),
                helper.make_node("MatMul", ["x_d", "w_d"], ["m"], "mm"),
                helper.make_node("Tanh", ["m"], ["y"], "tanh"),
            ],
            [("x", [4, 6])],
            [("y", [4, 5])],
            [
                array("x_s", np.float32(0.02)), array("x_z", zero),
                array("w_q", codes), array("w_s", scale), array("w_z", zero),
            ],
            opset=21,
        )  # fmt: skip
        actual = codes.astype(np.float64) * float(scale)
        return Case(pair=by_hand(folder, proto, quantized, ROWS), weights={"w": (w, actual)})

    return build


def conv_transpose(folder: Path) -> Case:
    """Two groups, one scale per output channel of a group: axis 1."""
    gains = np.float32([0.1, 1, 10]).reshape(1, 3, 1, 1)
    w = floats((4, 3, 3, 3), 1) * gains
    proto = model(
        [
            helper.make_node("ConvTranspose", ["x", "w"], ["c"], "deconv", group=2),
            helper.make_node("Relu", ["c"], ["y"], "relu"),
        ],
        [("x", [1, 4, 6, 6])],
        [("y", [1, 6, 8, 8])],
        [array("w", w)],
    )
    feeds = [{"x": floats((1, 4, 6, 6), s)} for s in range(3)]
    pair = static(folder, proto, feeds, per_channel=True)
    return Case(pair=pair, weights={"w": (w, pair.integers("w_quantized"))})


# -- bodies ------------------------------------------------------------------------------------

SQUARE = floats((6, 6), 1, 0.3)


def value(name: str, shape: Sequence[int], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def body_weight(quantized: bool) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes and constants of a body that give the tensor w_used."""
    if not quantized:
        return [helper.make_node("Identity", ["w"], ["w_used"], "w_id")], [array("w", SQUARE)]
    codes, scale = int8(SQUARE)
    names = ["w_quantized", "w_scale", "w_zero_point"]
    return (
        [helper.make_node("DequantizeLinear", names, ["w_used"], "w_dequantize")],
        [array(n, v) for n, v in zip(names, (codes, scale, np.int8(0)), strict=True)],
    )


def loop(quantized: bool) -> onnx.ModelProto:
    """state = tanh(state w), three times."""
    nodes, values = body_weight(quantized)
    nodes += [
        helper.make_node("MatMul", ["state", "w_used"], ["m"], "mm"),
        helper.make_node("Tanh", ["m"], ["state_out"], "tanh"),
        helper.make_node("Identity", ["go"], ["go_out"], "go_on"),
    ]
    body = helper.make_graph(
        nodes,
        "body",
        [value("at", [], TensorProto.INT64), value("go", [], TensorProto.BOOL),
         value("state", [4, 6])],
        [value("go_out", [], TensorProto.BOOL), value("state_out", [4, 6])],
        values,
    )  # fmt: skip
    return model(
        [
            helper.make_node("Loop", ["times", "yes", "x"], ["l"], "loop", body=body),
            helper.make_node("Sigmoid", ["l"], ["y"], "sigmoid"),
        ],
        [("x", [4, 6])],
        [("y", [4, 6])],
        [
            helper.make_tensor("times", TensorProto.INT64, [], [3]),
            helper.make_tensor("yes", TensorProto.BOOL, [], [True]),
        ],
    )


def scan(quantized: bool) -> onnx.ModelProto:
    """state = tanh(state w + row) over the rows of x."""
    nodes, values = body_weight(quantized)
    nodes += [
        helper.make_node("MatMul", ["state", "w_used"], ["m"], "mm"),
        helper.make_node("Add", ["m", "row"], ["a"], "add"),
        helper.make_node("Tanh", ["a"], ["state_out"], "tanh"),
        helper.make_node("Identity", ["state_out"], ["row_out"], "keep"),
    ]
    body = helper.make_graph(
        nodes,
        "body",
        [value("state", [1, 6]), value("row", [6])],
        [value("state_out", [1, 6]), value("row_out", [1, 6])],
        values,
    )
    return model(
        [
            helper.make_node(
                "Scan", ["start", "x"], ["end", "rows"], "scan", body=body, num_scan_inputs=1
            ),
            helper.make_node("Sigmoid", ["rows"], ["y"], "sigmoid"),
        ],
        [("x", [4, 6])],
        [("y", [4, 1, 6])],
        [array("start", np.zeros((1, 6), np.float32))],
    )


def in_body(of: Callable[[bool], onnx.ModelProto]) -> Callable[[Path], Case]:
    def build(folder: Path) -> Case:
        codes, scale = int8(SQUARE)
        actual = codes.astype(np.float64) * float(scale)
        pair = by_hand(folder, of(False), of(True), ROWS)
        return Case(pair=pair, weights={"w": (SQUARE, actual)})

    return build


# -- the comparison ----------------------------------------------------------------------------

# What each case is about: an operator of the quantized model, and how the pair is made.
CASES: dict[str, tuple[str, Callable[[Path], Case]]] = {
    "QLinearMatMul": ("QLinearMatMul", qlinear_matmul),
    "QLinearMatMul per channel": ("QLinearMatMul", qlinear_matmul_per_channel),
    "QLinearAdd": ("QLinearAdd", qlinear_add),
    "QLinearMul": ("QLinearMul", qlinear_mul),
    "QLinearConcat": ("QLinearConcat", qlinear_concat),
    "QLinearSigmoid": ("QLinearSigmoid", qlinear_sigmoid),
    "QLinearSoftmax": ("QLinearSoftmax", qlinear_softmax),
    "ConvInteger": ("ConvInteger", conv_integer),
    "DynamicQuantizeMatMul": ("DynamicQuantizeMatMul", dynamic_quantize_matmul),
    "DynamicQuantizeLSTM": ("DynamicQuantizeLSTM", dynamic_quantize_lstm),
    "GatherBlockQuantized": ("GatherBlockQuantized", gather_block_quantized),
    "float8_e4m3fn": ("QuantizeLinear", small_floats(ml_dtypes.float8_e4m3fn)),
    "float8_e5m2": ("QuantizeLinear", small_floats(ml_dtypes.float8_e5m2)),
    "ConvTranspose": ("ConvTranspose", conv_transpose),
    "Loop": ("Loop", in_body(loop)),
    "Scan": ("Scan", in_body(scan)),
}


def floating(proto: onnx.ModelProto) -> set[str]:
    """Names of the float tensors of a main graph."""
    graph = onnx.shape_inference.infer_shapes(proto).graph
    computed = (*graph.input, *graph.value_info, *graph.output)
    kinds = {v.name: v.type.tensor_type.elem_type for v in computed}
    kinds |= {i.name: i.data_type for i in graph.initializer}
    made = {n for node in graph.node for n in node.output if n}
    made |= {i.name for i in (*graph.input, *graph.initializer)}
    return {n for n in made if kinds[n] == TensorProto.FLOAT}


@pytest.mark.parametrize("kind", CASES)
def test_weights_and_outputs_have_their_true_error(tmp_path: Path, kind: str) -> None:
    operator, build = CASES[kind]
    case = build(tmp_path)
    pair = case.pair
    quantized = onnx.load(pair.folder / "q.onnx")
    assert operator in {n.op_type for n in nodes_of(quantized.graph)}
    result = pair.compared()
    for name, (reference, actual) in case.weights.items():
        truth = db([reference], [actual])
        assert 10 < truth < 80
        found = weight_of(result, name)
        assert found.sqnr_db == pytest.approx(truth, abs=WEIGHT_DB)
        assert found.max_abs_error == pytest.approx(
            np.abs(reference.astype(np.float64) - actual).max(), rel=1e-6
        )
    for found in result.weights:
        if found.name not in case.weights:  # left in float
            assert (found.dtype, found.sqnr_db) == ("float32", math.inf)
    (output,) = result.outputs
    truth = db(pair.tensor("f", "y"), pair.tensor("q", "y"))
    assert 5 < truth < 80
    assert output.sqnr_db == pytest.approx(truth, abs=OUTPUT_DB)


@pytest.mark.parametrize("kind", CASES)
def test_every_float_tensor_is_matched_fused_or_unmatched(tmp_path: Path, kind: str) -> None:
    case = CASES[kind][1](tmp_path)
    result = case.pair.compared()
    names = floating(onnx.load(case.pair.folder / "f.onnx"))
    counts = result.counts
    assert counts is not None
    assert counts.matched + counts.fused + counts.unmatched == counts.float_tensors == len(names)
    left = [u for u in result.unmatched if u.model == "float" and u.name in names]
    assert counts.fused == sum(bool(u.fused_into) for u in left)
    assert counts.unmatched == sum(not u.fused_into for u in left)
    compared = {w.name for w in (*result.weights, *result.activations)} & names
    assert not compared & {u.name for u in left}
    assert counts.matched == len(compared)
