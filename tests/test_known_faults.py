"""Pairs on which ONNX Runtime's own debugger (`qdq_loss_debug`) is wrong or silent, and our number.

One section per fault; the truth is that of `known_pairs`. Tests named "the_debugger_..." say what
is wrong with it on the installed version: where one of these alone fails, ONNX Runtime has mended
something.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat as OrtFormat
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.matmul_nbits_quantizer import QuantFormat as NBitsFormat

from tests.known_pairs import (
    IMAGES,
    TOLERANCE_DB,
    Pair,
    activation_of,
    by_hand,
    check_activation,
    check_outputs,
    close,
    constants,
    db,
    debugger_activations,
    debugger_weights,
    renamed,
    rewritten,
    static,
    weight_of,
)
from tests.samples import array, conv_batchnorm, conv_relu_gemm, floats, model, qdq_of, save

# -- uint8, uint4 and asymmetric int8 weights --------------------------------------------------


def shifted(*, opset: int = 17) -> onnx.ModelProto:
    """`conv_relu_gemm` with weights that are not centred on zero."""
    proto = conv_relu_gemm()
    proto.opset_import[0].version = opset
    for tensor in proto.graph.initializer:
        if tensor.name in ("w", "gw"):
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(array(tensor.name, values + np.float32(0.3) * np.abs(values).max()))
    return proto


WRAPPING: dict[str, dict[str, Any]] = {
    "uint8": {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8},
    "uint8 per channel": {
        "activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8, "per_channel": True,
    },
    "uint4": {"weight_type": QuantType.QUInt4},
    "asymmetric int8": {"extra_options": {"WeightSymmetric": False}},
    "asymmetric int4": {
        "weight_type": QuantType.QInt4, "extra_options": {"WeightSymmetric": False},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", WRAPPING)
def test_weights_with_a_zero_point_have_their_true_error(tmp_path: Path, kind: str) -> None:
    """The debugger subtracts the zero point in 8 bits, which wraps: dB below zero."""
    proto = shifted(opset=21)
    pair = static(tmp_path, proto, IMAGES, **WRAPPING[kind])
    result = pair.compared()
    for name in ("w", "gw"):
        truth = db([constants(proto)[name]], [pair.integers(f"{name}_quantized")])
        assert weight_of(result, name).sqnr_db == close(truth)
        assert truth > (15 if "4" in kind else 35)
    check_outputs(pair, result)


@pytest.mark.parametrize("kind", WRAPPING)
def test_the_debugger_wraps_weights_with_a_zero_point(tmp_path: Path, kind: str) -> None:
    pair = static(tmp_path, shifted(opset=21), IMAGES, **WRAPPING[kind])
    found = debugger_weights(pair)
    assert max(found["w"], found["gw"]) < 5


# -- per-channel scales without `axis` ---------------------------------------------------------


def deconvolution() -> onnx.ModelProto:
    return model(
        [helper.make_node("ConvTranspose", ["x", "w"], ["y"], "deconv")],
        [("x", [1, 3, 8, 8])],
        [("y", [1, 3, 10, 10])],
        [array("w", floats((3, 3, 3, 3), 1) * np.float32([0.1, 1, 10]).reshape(1, 3, 1, 1))],
    )


def without_axis(folder: Path) -> Pair:
    pair = static(folder, deconvolution(), IMAGES, per_channel=True)

    def drop(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            for attribute in [a for a in node.attribute if a.name == "axis"]:
                assert attribute.i == 1, "what an absent axis means"
                node.attribute.remove(attribute)

    return rewritten(pair, drop)


def test_an_absent_axis_is_the_second(tmp_path: Path) -> None:
    """The debugger takes the last axis."""
    pair = without_axis(tmp_path)
    result = pair.compared()
    stored = pair.integers("w_quantized")
    found = weight_of(result, "w")
    reference = constants(deconvolution())["w"]
    assert found.sqnr_db == close(db([reference], [stored]))
    assert db([reference], [stored]) > 40
    channels = [db([reference[:, c]], [stored[:, c]]) for c in range(3)]
    assert found.channel_sqnr_db == pytest.approx(channels, abs=TOLERANCE_DB)
    check_outputs(pair, result)


def test_the_debugger_takes_an_absent_axis_for_the_last(tmp_path: Path) -> None:
    assert debugger_weights(without_axis(tmp_path))["w"] < 10


# -- tensors without a twin --------------------------------------------------------------------


def with_a_detour(folder: Path) -> Pair:
    """Quantized from a graph that negates twice where the float model does not."""
    proto = conv_relu_gemm()
    longer = conv_relu_gemm()
    longer.graph.node[1].output[0] = "r0"
    detour = [helper.make_node("Neg", ["r0"], ["detour"], "neg1"),
              helper.make_node("Neg", ["detour"], ["r"], "neg2")]  # fmt: skip
    nodes = [*longer.graph.node[:2], *detour, *longer.graph.node[2:]]
    del longer.graph.node[:]
    longer.graph.node.extend(nodes)
    types = ["Conv", "Relu", "Neg", "GlobalAveragePool", "Gemm"]
    pair = static(folder, longer, IMAGES, op_types_to_quantize=types)
    save(proto, folder / "f.onnx")
    return pair


def test_a_tensor_without_a_float_twin_costs_only_itself(tmp_path: Path) -> None:
    """The debugger dies of it: KeyError: 'float'."""
    pair = with_a_detour(tmp_path)
    result = pair.compared()
    assert "detour" not in {a.name for a in result.activations}
    for name in ("x", "p", "f"):
        check_activation(pair, result, name, name, f"{name}_DequantizeLinear_Output")
    check_activation(pair, result, "y", "y_QuantizeLinear_Input", "y")
    check_outputs(pair, result)


def test_a_float_model_with_other_tensor_names_has_the_same_figures(tmp_path: Path) -> None:
    """The debugger dies of it: KeyError: 'float'."""
    pair = static(tmp_path, conv_relu_gemm(), IMAGES)
    renamed(pair, "f", {"c": "/1", "r": "/2", "p": "/3", "f": "/4"})
    result = pair.compared()
    dequantized = "r_DequantizeLinear_Output"
    found = check_activation(pair, result, "/2", "r", dequantized, limits=(0, math.inf))
    assert found.matched_by == "structure"


@pytest.mark.parametrize("kind", ["no float activations", "one tensor without a twin"])
def test_the_debugger_dies_of_a_tensor_without_a_float_twin(tmp_path: Path, kind: str) -> None:
    pair = with_a_detour(tmp_path)
    with pytest.raises(KeyError, match="float"):
        debugger_activations(pair, with_float=kind != "no float activations")


# -- Relu and Clip folded into Q ---------------------------------------------------------------


def rectified(op_type: str) -> onnx.ModelProto:
    proto = conv_relu_gemm()
    if op_type == "Clip":
        node = proto.graph.node[1]
        node.op_type = "Clip"
        node.input.extend(["low", "high"])
        proto.graph.initializer.extend(
            [array("low", np.float32(0)), array("high", np.float32(0.75))]
        )
    return proto


def folded(folder: Path, op_type: str, convention: str) -> Pair:
    """ORT names the un-rectified tensor after the Relu's output, others after its input."""
    pair = static(folder, rectified(op_type), IMAGES, activation_type=QuantType.QUInt8)
    if convention == "input":
        after = "_DequantizeLinear_Output"
        renamed(pair, "q", {"r": "c", f"r{after}": f"c{after}"})
    return pair


FOLDED = [(o, c) for o in ("Relu", "Clip") for c in ("output", "input")]


@pytest.mark.parametrize(("op_type", "convention"), FOLDED)
def test_a_folded_rectifier_raises_no_alarm(tmp_path: Path, op_type: str, convention: str) -> None:
    """The debugger compares the un-rectified tensor: about 3 dB for a healthy one."""
    pair = folded(tmp_path, op_type, convention)
    assert op_type not in {n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node}
    before = {"output": "r", "input": "c"}[convention]
    result = pair.compared()
    limits = (0, 0.75) if op_type == "Clip" else (0, math.inf)
    found = check_activation(
        pair, result, "r", before, f"{before}_DequantizeLinear_Output", limits=limits
    )
    assert found.local_sqnr_db is not None
    assert found.local_sqnr_db > 35
    assert found.accumulated_sqnr_db > 30
    assert "c" not in {a.name for a in result.activations}
    assert found.saturated_fraction == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(("op_type", "convention"), FOLDED)
def test_the_debugger_takes_a_folded_rectifier_for_damage(
    tmp_path: Path, op_type: str, convention: str
) -> None:
    found = debugger_activations(folded(tmp_path, op_type, convention))
    assert found[{"output": "r", "input": "c"}[convention]]["qdq_err"] < 10


PATCHES = [{"x": floats((1, 4, 6, 6), s)} for s in range(3)]


def two_rectifiers(kinds: str) -> onnx.ModelProto:
    """A Conv whose result goes through two rectifiers "r" and "rr", in a row or "beside"."""
    first, second = ("Relu", "Relu") if kinds == "beside" else kinds.split()[:2]
    source = "c" if kinds == "beside" else "r"
    limits = {"Relu": [], "Clip": ["low", "high"]}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], "conv"),
        helper.make_node(first, ["c", *limits[first]], ["r"], "first"),
        helper.make_node(second, [source, *limits[second]], ["rr"], "second"),
        helper.make_node("Conv", ["rr", "w2"], ["a"], "next"),
    ]
    if kinds in ("Relu Relu branch", "beside"):
        nodes.append(helper.make_node("Conv", ["r", "w3"], ["b"], "branch"))
    nodes.append(helper.make_node("Add", ["a", "b" if len(nodes) == 5 else "x"], ["y"], "add"))
    weights = [array(f"w{at}", floats((4, 4, 1, 1), at)) for at in (1, 2, 3)]
    edges = [array("low", np.float32(0)), array("high", np.float32(1))]
    return model(nodes, [("x", [1, 4, 6, 6])], [("y", [1, 4, 6, 6])], weights + edges)


@pytest.mark.parametrize(
    ("kinds", "compared", "fused"),
    [
        ("Relu Relu", {"rr"}, {"c", "r"}),
        ("Relu Clip", {"rr"}, {"c", "r"}),
        ("Clip Relu", {"rr"}, {"c", "r"}),
        ("Relu Relu branch", {"r", "rr"}, {"c"}),
        ("beside", {"r"}, {"c", "rr"}),
    ],
)
def test_several_folded_rectifiers_are_compared_behind_the_last(
    tmp_path: Path, kinds: str, compared: set[str], fused: set[str]
) -> None:
    """Never the tensor before a rectifier with the one behind it: 3 to 6 dB for a healthy one."""
    pair = static(tmp_path, two_rectifiers(kinds), PATCHES, preprocess=kinds == "beside")
    result = pair.compared()
    high = 1.0 if "Clip" in kinds else math.inf
    for name in compared:
        found = check_activation(
            pair, result, name, name, f"{name}_DequantizeLinear_Output", limits=(0, high)
        )
        assert found.accumulated_sqnr_db > 35
    assert {u.name for u in result.unmatched if u.fused_into} >= fused
    assert {a.name for a in result.activations} == {"x", "a", "y", *compared} | (
        {"b"} if "b" in {o for n in two_rectifiers(kinds).graph.node for o in n.output} else set()
    )


# -- infinity that Q takes for the end of its range ---------------------------------------------


def test_infinity_before_a_q_is_counted_and_what_readers_get_is_measured(tmp_path: Path) -> None:
    """The runtime's debugger gives nan; the finite values behind DQ have a true error."""
    io = ([("x", [1, 4])], [("y", [1, 4])])
    nodes = [
        helper.make_node("Reciprocal", ["x"], ["inverse"], "reciprocal"),
        helper.make_node("Neg", ["inverse"], ["y"], "neg"),
    ]
    feeds = [{"x": np.float32([[0.004, 0.5, 1.0, 2.0]])}, {"x": np.float32([[0.25, 0.5, 1, 2]])}]
    save(model(nodes, *io), tmp_path / "f.onnx")
    pairs, constants_ = [], []
    for tensor, name, scale in (("x", "input", 0.01), ("inverse", "inverse", 1.0)):
        found = qdq_of(tensor, f"{name}_dq", scale, -128)
        pairs.append(found[0])
        constants_ += found[1]
    nodes[0].input[0], nodes[1].input[0] = "input_dq", "inverse_dq"
    ordered = [*pairs[0], nodes[0], *pairs[1], nodes[1]]
    save(model(ordered, *io, constants_), tmp_path / "q.onnx")
    pair = Pair(folder=tmp_path, feeds=feeds)
    result = pair.compared()
    assert math.isinf(pair.tensor("q", "inverse")[0].max())
    found = activation_of(result, "inverse")
    truth = db(pair.tensor("f", "inverse"), pair.tensor("q", "inverse_dq"))
    assert math.isfinite(truth)
    assert found.accumulated_sqnr_db == pytest.approx(truth, abs=1e-6)
    assert found.local_sqnr_db is not None
    assert math.isnan(found.local_sqnr_db)
    assert found.nonfinite_quantized == 1
    assert found.saturated_fraction == 1 / 8
    (record,) = result.nonfinite
    assert (record.tensor, record.infinite, record.nan) == ("inverse", 1, 0)
    check_outputs(pair, result)


# -- block-quantized weights -------------------------------------------------------------------


def matmul(*, rows: int = 40, columns: int = 24, opset: int = 21) -> onnx.ModelProto:
    return model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "mm")],
        [("x", [4, rows])],
        [("y", [4, columns])],
        [array("w", floats((rows, columns), 1) + np.float32(0.5))],
        opset=opset,
    )


ROWS = [{"x": floats((4, 40), s)} for s in range(3)]


def blocks(folder: Path, dtype: str) -> Pair:
    """Blocks of 16 along the first axis; the last one is short."""
    proto = matmul()
    weight = constants(proto)["w"].astype(np.float64)
    low, high = {"int4": (-8, 7), "uint4": (0, 15), "int8": (-128, 127)}[dtype]
    padded = np.pad(weight, ((0, 8), (0, 0))).reshape(3, 16, 24)
    scale = ((padded.max(axis=1) - padded.min(axis=1)) / (high - low)).astype(np.float32)
    zero = np.clip(np.rint(low - padded.min(axis=1) / scale), low, high)
    steps = np.rint(padded / scale[:, None] + zero[:, None]).reshape(48, 24)[:40]
    quantized = model(
        [
            helper.make_node("DequantizeLinear", ["w_quantized", "w_scale", "w_zero_point"],
                             ["w_DequantizeLinear_Output"], "dq", axis=0, block_size=16),
            helper.make_node("MatMul", ["x", "w_DequantizeLinear_Output"], ["y"], "mm"),
        ],
        [("x", [4, 40])], [("y", [4, 24])],
        [array("w_quantized", np.clip(steps, low, high).astype(np.dtype(dtype))),
         array("w_scale", scale), array("w_zero_point", zero.astype(np.dtype(dtype)))],
        opset=21,
    )  # fmt: skip
    return by_hand(folder, proto, quantized, ROWS)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8"])
def test_weights_in_blocks_have_their_true_error(tmp_path: Path, dtype: str) -> None:
    """The debugger stops at an assertion, and every other weight with it."""
    pair = blocks(tmp_path, dtype)
    result = pair.compared()
    truth = db([constants(matmul())["w"]], [pair.integers("w_quantized")])
    assert weight_of(result, "w").sqnr_db == close(truth)
    assert truth > 15
    check_outputs(pair, result)


def test_the_debugger_stops_at_weights_in_blocks(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        debugger_weights(blocks(tmp_path, "int8"))


# -- float weights behind Q and DQ, and constants in other places ------------------------------


def layer(folder: Path, kind: str) -> Pair:
    """A pair with one weight `w`."""
    if kind == "AddQDQPairToWeight":
        return static(folder, matmul(opset=17), ROWS, extra_options={kind: True})
    proto = matmul(opset=17)
    if kind == "Constant nodes":
        pair = static(folder, proto, ROWS)
        for file in ("f", "q"):
            rewritten(pair, into_constant_nodes, file)
        return pair
    weight = constants(proto)["w"]
    qdq, stored = qdq_of("w", "wd", 0.03, 0)
    ends = [("x", [4, 40])], [("y", [4, 24])]
    if kind == "exported after training":
        nodes = [*qdq, helper.make_node("MatMul", ["x", "wd"], ["y"], "mm")]
        return by_hand(folder, proto, model(nodes, *ends, [*stored, array("w", weight)]), ROWS)
    turned = np.ascontiguousarray(weight.T)
    product = helper.make_node("MatMul", ["x", "wt"], ["y"], "mm")
    if kind != "turned by the exporter":
        turn = helper.make_node("Transpose", ["w"], ["wt"], "turn", perm=[1, 0])
        proto = model([turn, product], *ends, [array("w", turned)])
    nodes = [*qdq, helper.make_node("Transpose", ["wd"], ["wt"], "turn", perm=[1, 0]), product]
    if kind == "integers behind a Transpose":
        codes = np.clip(np.rint(turned.astype(np.float64) / 0.03), -128, 127).astype(np.int8)
        twin = model(nodes[1:], *ends, [*stored, array("wd_q", codes)])
    else:
        twin = model(nodes, *ends, [*stored, array("w", turned)])
    return by_hand(folder, proto, twin, ROWS)


def into_constant_nodes(graph: onnx.GraphProto) -> None:
    nodes = [helper.make_node("Constant", [], [i.name], value=i) for i in graph.initializer]
    nodes += graph.node
    del graph.initializer[:]
    del graph.node[:]
    graph.node.extend(nodes)


ELSEWHERE = {
    "AddQDQPairToWeight": "w_DequantizeLinear_Output",
    "exported after training": "wd",
    "behind a Transpose": "wd",
    "turned by the exporter": "wd",
    "integers behind a Transpose": "wd",
    "Constant nodes": "w_DequantizeLinear_Output",
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_weight_that_is_quantized_elsewhere_is_compared(tmp_path: Path, kind: str) -> None:
    """The debugger leaves it out without a word."""
    pair = layer(tmp_path, kind)
    result = pair.compared()
    proto = onnx.load(tmp_path / "q.onnx")
    name = ELSEWHERE[kind]
    dequantize = next(n for n in proto.graph.node if n.output[0] == name)
    codes = pair.tensor("q", dequantize.input[0])[0]
    scale, zero = (constants(proto)[i].astype(np.float64) for i in dequantize.input[1:])
    actual = (codes - zero) * scale
    reference = constants(onnx.load(tmp_path / "f.onnx"))["w"]
    if actual.shape != reference.shape:
        actual = actual.T
    truth = db([reference], [actual])
    assert weight_of(result, "w").sqnr_db == close(truth)
    assert truth > 25
    check_outputs(pair, result)


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_the_debugger_leaves_out_weights_quantized_elsewhere(tmp_path: Path, kind: str) -> None:
    pair = layer(tmp_path, kind)
    assert "w" not in debugger_weights(pair)


# -- Q and DQ of the com.microsoft domain ------------------------------------------------------

WIDE: dict[str, dict[str, Any]] = {
    "int16": {"activation_type": QuantType.QInt16, "weight_type": QuantType.QInt16},
    "uint16": {"activation_type": QuantType.QUInt16, "weight_type": QuantType.QUInt16},
    "uint16 activations": {"activation_type": QuantType.QUInt16},
    "int4 weights": {"weight_type": QuantType.QInt4},
}


def wide(folder: Path, kind: str) -> Pair:
    options = WIDE[kind] | {"extra_options": {"UseQDQContribOps": True}}
    return static(folder, conv_relu_gemm(), IMAGES, **options)


@pytest.mark.parametrize("kind", WIDE)
def test_16_and_4_bit_pairs_below_opset_21_are_compared(tmp_path: Path, kind: str) -> None:
    """The debugger finds no pair: these Q and DQ are of the com.microsoft domain."""
    pair = wide(tmp_path, kind)
    assert "com.microsoft" in {n.domain for n in onnx.load(tmp_path / "q.onnx").graph.node}
    result = pair.compared()
    check_activation(pair, result, "r", "r", "r_DequantizeLinear_Output", limits=(0, math.inf))
    check_activation(pair, result, "y", "y_QuantizeLinear_Input", "y")
    for name in ("w", "gw"):
        truth = db([constants(conv_relu_gemm())[name]], [pair.integers(f"{name}_quantized")])
        assert weight_of(result, name).sqnr_db == close(truth)
    check_outputs(pair, result)


@pytest.mark.parametrize("kind", WIDE)
def test_the_debugger_finds_no_pairs_of_the_microsoft_domain(tmp_path: Path, kind: str) -> None:
    assert debugger_activations(wide(tmp_path, kind)) == {}


# -- integer operators, dynamic and weight-only files ------------------------------------------


def integer_weight(pair: Pair, name: str) -> np.ndarray:
    values = constants(onnx.load(pair.folder / "q.onnx"))
    codes, scale, zero = (
        values[f"{name}_{part}"].astype(np.float64) for part in ("quantized", "scale", "zero_point")
    )
    return (codes - zero) * scale


def test_a_qoperator_file_has_its_true_figures(tmp_path: Path) -> None:
    """The debugger says nothing: {} and no error."""
    pair = static(tmp_path, conv_relu_gemm(), IMAGES, quant_format=OrtFormat.QOperator)
    result = pair.compared()
    values = constants(onnx.load(tmp_path / "q.onnx"))
    for name in ("w", "gw"):
        truth = db([constants(conv_relu_gemm())[name]], [integer_weight(pair, name)])
        assert weight_of(result, name).sqnr_db == close(truth)
    for name, integers in (("x", "x_quantized"), ("p", "p_quantized"), ("r", "c_quantized")):
        parameters = (f"{integers[0]}_scale", f"{integers[0]}_zero_point")
        scale, zero = (values[p].astype(np.float64) for p in parameters)
        actual = [(q - zero) * scale for q in pair.tensor("q", integers)]
        truth = db(pair.tensor("f", name), actual)
        assert activation_of(result, name).accumulated_sqnr_db == close(truth)
    check_outputs(pair, result)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("weight_type", [QuantType.QInt8, QuantType.QUInt8])
def test_a_dynamic_file_has_its_true_figures(
    tmp_path: Path, weight_type: QuantType, per_channel: bool
) -> None:
    """The debugger says nothing: {} and no error."""
    proto = matmul(opset=17)
    save(proto, tmp_path / "f.onnx")
    quantize_dynamic(
        tmp_path / "f.onnx", tmp_path / "q.onnx", weight_type=weight_type, per_channel=per_channel
    )
    pair = Pair(folder=tmp_path, feeds=ROWS)
    result = pair.compared()
    truth = db([constants(proto)["w"]], [integer_weight(pair, "w")])
    assert weight_of(result, "w").sqnr_db == close(truth)
    assert truth > 40
    check_outputs(pair, result)


def packed(folder: Path, bits: int, symmetric: bool, form: NBitsFormat) -> Pair:
    proto = matmul(rows=64)
    save(proto, folder / "f.onnx")
    quantizer = MatMulNBitsQuantizer(
        onnx.load(folder / "f.onnx"), bits=bits, block_size=32, is_symmetric=symmetric,
        quant_format=form,
    )  # fmt: skip
    quantizer.process()
    save(quantizer.model.model, folder / "q.onnx")
    return Pair(folder=folder, feeds=[{"x": floats((4, 64), s)} for s in range(3)])


def unpacked(pair: Pair, bits: int) -> np.ndarray:
    """The weight [rows, columns] that a MatMulNBits multiplies with, by its documentation."""
    proto = onnx.load(pair.folder / "q.onnx")
    (node,) = [n for n in proto.graph.node if n.op_type == "MatMulNBits"]
    values = constants(proto)
    given = {a.name: a.i for a in node.attribute}
    columns, rows, size = given["N"], given["K"], given["block_size"]

    def codes(stored: np.ndarray, count: int) -> np.ndarray:
        if bits == 4:
            stored = np.stack([stored & 15, stored >> 4], axis=-1)
        return stored.reshape(columns, -1)[:, :count].astype(np.float64)

    scale = values[node.input[2]].reshape(columns, -1).astype(np.float64)
    zero = np.full(scale.shape, 2.0 ** (bits - 1))
    if len(node.input) > 3 and node.input[3]:
        zero = codes(values[node.input[3]], scale.shape[1])
    block = np.arange(rows) // size
    return ((codes(values[node.input[1]], rows) - zero[:, block]) * scale[:, block]).T


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_only_file_has_its_true_figures(
    tmp_path: Path, bits: int, symmetric: bool
) -> None:
    """The debugger says nothing: {} and no error."""
    pair = packed(tmp_path, bits, symmetric, NBitsFormat.QOperator)
    result = pair.compared()
    found = weight_of(result, "w")
    reference, actual = constants(matmul(rows=64))["w"], unpacked(pair, bits)
    assert found.sqnr_db == close(db([reference], [actual]))
    assert found.sqnr_db > (15 if bits == 4 else 40)
    channels = [db([reference[:, c]], [actual[:, c]]) for c in range(24)]
    assert found.channel_sqnr_db == pytest.approx(channels, abs=TOLERANCE_DB)
    check_outputs(pair, result)


def test_int4_blocks_of_the_weight_only_quantizer_have_their_true_figures(tmp_path: Path) -> None:
    """The debugger does not know the names that this quantizer gives."""
    pair = packed(tmp_path, 4, True, NBitsFormat.QDQ)
    result = pair.compared()
    proto = onnx.load(tmp_path / "q.onnx")
    (node,) = [n for n in proto.graph.node if n.op_type == "DequantizeLinear"]
    actual = pair.integers(node.input[0])
    reference = constants(matmul(rows=64))["w"]
    if actual.shape != reference.shape:
        actual = actual.T
    assert weight_of(result, "w").sqnr_db == close(db([reference], [actual]))
    check_outputs(pair, result)


@pytest.mark.parametrize("kind", ["qoperator", "dynamic", "weight only", "weight only, QDQ"])
def test_the_debugger_says_nothing_about_other_formats(tmp_path: Path, kind: str) -> None:
    if kind == "qoperator":
        pair = static(tmp_path, conv_relu_gemm(), IMAGES, quant_format=OrtFormat.QOperator)
    elif kind == "dynamic":
        save(matmul(opset=17), tmp_path / "f.onnx")
        quantize_dynamic(tmp_path / "f.onnx", tmp_path / "q.onnx")
        pair = Pair(folder=tmp_path, feeds=ROWS)
    else:
        form = NBitsFormat.QDQ if "QDQ" in kind else NBitsFormat.QOperator
        pair = packed(tmp_path, 4, True, form)
    # In a QOperator file the biases' names happen to be known.
    assert not {"w", "gw"} & set(debugger_weights(pair))
    assert debugger_activations(pair) == {}


# -- folded and fused by pre-processing --------------------------------------------------------


def test_a_folded_batchnorm_is_compared_with_the_original(tmp_path: Path) -> None:
    """The debugger finds no weight: it is called ConvBnFusion_W_w."""
    feeds = [{"x": floats((1, 3, 6, 6), s)} for s in range(3)]
    pair = static(tmp_path, conv_batchnorm(), feeds, preprocess=True)
    result = pair.compared()
    values = {k: v.astype(np.float64) for k, v in constants(conv_batchnorm()).items()}
    gain = values["g"] / np.sqrt(values["v"] + 1e-5)
    codes = [n for n in constants(onnx.load(tmp_path / "q.onnx")) if n.endswith("_quantized")]
    weight, bias = (next(n for n in codes if k in n) for k in ("_W_", "_B_"))
    truth = db([values["w"] * gain.reshape(-1, 1, 1, 1)], [pair.integers(weight)])
    assert weight_of(result, "w").sqnr_db == close(truth)
    assert truth > 35
    truth = db([values["be"] - values["m"] * gain], [pair.integers(bias)])
    assert weight_of(result, "be").sqnr_db == close(truth)
    check_activation(pair, result, "y", "y_QuantizeLinear_Input", "y", limits=(0, math.inf))
    check_outputs(pair, result)


def matmul_add() -> onnx.ModelProto:
    proto = matmul(opset=17)
    proto.graph.node[0].output[0] = "m"
    proto.graph.node.append(helper.make_node("Add", ["m", "b"], ["s"], "add"))
    proto.graph.node.append(helper.make_node("Sigmoid", ["s"], ["y"], "sigmoid"))
    proto.graph.initializer.append(array("b", floats((24,), 5)))
    return proto


def test_a_fused_matmul_and_add_are_compared_with_the_original(tmp_path: Path) -> None:
    """The debugger drops the MatMul's own output; here it is fused, not lost."""
    pair = static(tmp_path, matmul_add(), ROWS, preprocess=True)
    ops = [n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node]
    assert "Gemm" in ops
    assert "MatMul" not in ops
    result = pair.compared()
    for name in ("w", "b"):
        truth = db([constants(matmul_add())[name]], [pair.integers(f"{name}_quantized")])
        assert weight_of(result, name).sqnr_db == close(truth)
    check_activation(pair, result, "s", "s", "s_DequantizeLinear_Output")
    (lone,) = [u for u in result.unmatched if u.name == "m"]
    assert lone.fused_into == "s"
    check_outputs(pair, result)


def test_the_debugger_loses_the_weights_of_a_folded_batchnorm(tmp_path: Path) -> None:
    feeds = [{"x": floats((1, 3, 6, 6), s)} for s in range(3)]
    pair = static(tmp_path, conv_batchnorm(), feeds, preprocess=True)
    assert debugger_weights(pair) == {}


# -- several pairs of one tensor, graph outputs, scalars ---------------------------------------


def fork() -> onnx.ModelProto:
    """r is read by two Convs."""
    return model(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], "one"),
            helper.make_node("Sigmoid", ["c"], ["r"], "sigmoid"),
            helper.make_node("Conv", ["r", "w2"], ["a"], "two"),
            helper.make_node("Conv", ["r", "w3"], ["b"], "three"),
            helper.make_node("Add", ["a", "b"], ["y"], "add"),
        ],
        [("x", [1, 3, 8, 8])], [("y", [1, 3, 8, 8])],
        [array(n, floats((3, 3, 1, 1), s)) for s, n in enumerate(("w", "w2", "w3"))],
    )  # fmt: skip


def converted(folder: Path, readers: set[str]) -> Pair:
    """r in 16 bits, and once more in 8 bits for some of its readers."""
    convert = {"quant_type": QuantType.QUInt8, "recv_nodes": readers}
    overrides = {"r": [{"quant_type": QuantType.QUInt16, "convert": convert}]}
    return static(
        folder, fork(), IMAGES, activation_type=QuantType.QUInt8,
        extra_options={"TensorQuantOverrides": overrides},
    )  # fmt: skip


def test_duplicated_pairs_have_one_true_figure(tmp_path: Path) -> None:
    """The debugger knows the first of the pairs _1 to _n only."""
    pair = static(tmp_path, fork(), IMAGES, extra_options={"DedicatedQDQPair": True})
    result = pair.compared()
    for name in ("r_DequantizeLinear_Output_1", "r_DequantizeLinear_Output_2"):
        check_activation(pair, result, "r", "r", name)
    check_outputs(pair, result)


def test_a_duplicated_pair_without_the_first_is_compared(tmp_path: Path) -> None:
    """The debugger finds no match for _2 alone."""
    pair = static(tmp_path, fork(), IMAGES, extra_options={"DedicatedQDQPair": True})
    names = {f"r_{n}Linear_Output_1": f"r_{n}Linear_Output_3" for n in ("Quantize", "Dequantize")}
    renamed(pair, "q", names)
    check_activation(pair, pair.compared(), "r", "r", "r_DequantizeLinear_Output_2")


def test_a_tensor_that_every_reader_gets_converted_is_judged_as_they_read_it(
    tmp_path: Path,
) -> None:
    """The debugger does not match _convert_ pairs and judges the one that nobody reads."""
    pair = converted(tmp_path, {"two", "three"})
    result = pair.compared()
    read = "r_convert_DequantizeLinear_Output"
    found = activation_of(result, "r")
    truth = db(pair.tensor("f", "r"), pair.tensor("q", read))
    unread = db(pair.tensor("f", "r"), pair.tensor("q", "r_DequantizeLinear_Output"))
    assert abs(truth - unread) > 0.1
    check_outputs(pair, result)
    assert found.accumulated_sqnr_db == close(truth)
    assert found.dtype == "uint8"


def rescaled(folder: Path) -> Pair:
    """Duplicated pairs, of which the second has another scale, as vendors' tools write them."""
    pair = static(folder, fork(), IMAGES, extra_options={"DedicatedQDQPair": True})

    def change(graph: onnx.GraphProto) -> None:
        graph.initializer.append(array("r_scale_2", np.float32(0.05)))
        for node in graph.node:
            if node.output[0] in ("r_QuantizeLinear_Output_2", "r_DequantizeLinear_Output_2"):
                node.input[1] = "r_scale_2"

    return rewritten(pair, change)


@pytest.mark.parametrize("kind", ["converted", "rescaled"])
def test_a_second_pair_that_one_reader_gets_is_said(tmp_path: Path, kind: str) -> None:
    """The debugger does not know of it."""
    pair = converted(tmp_path, {"three"}) if kind == "converted" else rescaled(tmp_path)
    first, second = {
        "converted": ("r_DequantizeLinear_Output", "r_convert_DequantizeLinear_Output"),
        "rescaled": ("r_DequantizeLinear_Output_1", "r_DequantizeLinear_Output_2"),
    }[kind]
    result = pair.compared()
    found = check_activation(pair, result, "r", "r", first)
    assert (
        abs(found.accumulated_sqnr_db - db(pair.tensor("f", "r"), pair.tensor("q", second))) > 0.1
    )
    said = [found.note, *result.warnings]
    said += [f"{u.name} {u.reason}" for u in (*result.unmatched, *result.skipped)]
    assert any(second in s for s in said), f"one of two readers gets {second}"


def test_a_graph_output_is_compared_before_and_behind_its_pair(tmp_path: Path) -> None:
    """The quantizer renames what computes it to y_QuantizeLinear_Input, and y is behind DQ."""
    pair = static(tmp_path, conv_relu_gemm(), IMAGES)
    result = pair.compared()
    found = check_activation(pair, result, "y", "y_QuantizeLinear_Input", "y")
    assert found.is_output
    assert check_outputs(pair, result)["y"].sqnr_db == close(found.accumulated_sqnr_db)


def test_an_output_that_is_also_read_inside_is_compared_as_its_readers_and_users_get_it(
    tmp_path: Path,
) -> None:
    """y is a graph output and the input of another node."""
    proto = fork()
    proto.graph.output.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, [1, 3, 8, 8]))
    pair = static(tmp_path, proto, IMAGES)
    result = pair.compared()
    check_outputs(pair, result)
    check_activation(pair, result, "r", "r_QuantizeLinear_Input", "r")


def scalar(folder: Path) -> Pair:
    """y = x * 0-d constant, as at the end of a face detector."""
    proto = model(
        [helper.make_node("Mul", ["x", "k"], ["y"], "mul")], [("x", [4])], [("y", [4])],
        [numpy_helper.from_array(np.array(0.1, np.float32), "k")],
    )  # fmt: skip
    feeds = [{"x": floats((4,), s)} for s in range(3)]
    return static(folder, proto, feeds, activation_type=QuantType.QUInt8)


def test_a_scalar_weight_has_its_true_error(tmp_path: Path) -> None:
    """The debugger dies of it: TypeError: object of type 'numpy.float32' has no len()."""
    pair = scalar(tmp_path)
    result = pair.compared()
    values = constants(onnx.load(tmp_path / "q.onnx"))
    assert values["k_quantized"].shape == ()
    found = weight_of(result, "k")
    assert found.shape == ()
    assert found.sqnr_db == close(db([np.float32(0.1)], [pair.integers("k_quantized")]))
    check_outputs(pair, result)


def test_the_debugger_dies_of_a_scalar_weight(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="has no len"):
        debugger_weights(scalar(tmp_path))


def test_the_debugger_does_not_match_converted_pairs(tmp_path: Path) -> None:
    found = debugger_activations(converted(tmp_path, {"two", "three"}))
    assert not [name for name in found if "convert" in name]


def test_the_debugger_does_not_match_a_second_pair_alone(tmp_path: Path) -> None:
    pair = static(tmp_path, fork(), IMAGES, extra_options={"DedicatedQDQPair": True})
    names = {f"r_{n}Linear_Output_1": f"r_{n}Linear_Output_3" for n in ("Quantize", "Dequantize")}
    assert "r" not in debugger_activations(renamed(pair, "q", names))
