from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization import QuantFormat as OrtFormat

from inspector.model import Model
from inspector.model_files import load_model
from inspector.runtime import open_session
from inspector.scheme import (
    QuantFormat,
    count_scheme,
    quant_formats,
    read_scheme,
    scale_names,
    stored_values,
)
from tests.samples import MODELS, array, conv_relu_gemm, floats, model, needs_models, qdq_of, save


class Reader(CalibrationDataReader):
    def __init__(self) -> None:
        self.feeds = iter([{"x": floats((1, 3, 8, 8), s)} for s in range(3)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def quantized(tmp_path: Path, **options: object) -> Model:
    source = save(conv_relu_gemm(), tmp_path / "f.onnx")
    target = tmp_path / "q.onnx"
    quantize_static(source, target, Reader(), **options)  # type: ignore[arg-type]
    return load_model(target)


def test_a_float_file_has_no_quantization() -> None:
    scheme = read_scheme(Model(conv_relu_gemm()))
    assert scheme.formats == (QuantFormat.FLOAT,)
    assert scheme.tensors == ()
    assert scheme.label == "float"


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("weight_type", [QuantType.QInt8, QuantType.QUInt8])
def test_weights_of_a_qdq_file_dequantize_within_half_a_step(
    tmp_path: Path, per_channel: bool, weight_type: QuantType
) -> None:
    # uint8 weights need uint8 activations; int8 activations with uint8 weights are refused.
    loaded = quantized(
        tmp_path, per_channel=per_channel, weight_type=weight_type,
        activation_type=QuantType.QUInt8,
    )  # fmt: skip
    scheme = read_scheme(loaded)
    assert scheme.formats == (QuantFormat.QDQ,)
    weights = {t.quantized: t for t in scheme.tensors if t.kind == "weight"}
    assert set(weights) == {"w_quantized", "gw_quantized"}
    conv = weights["w_quantized"]
    assert conv.qparams.per_tensor is not per_channel
    assert conv.qparams.axis == (0 if per_channel else None)
    values = stored_values(loaded, conv)
    assert values is not None
    step = conv.qparams.scale if not per_channel else conv.qparams.scale.reshape(-1, 1, 1, 1)
    assert np.all(np.abs(values - floats((8, 3, 3, 3), 1, 0.3)) <= 0.5001 * step)
    assert {t.kind for t in scheme.tensors} == {"weight", "bias", "activation"}


def test_a_qoperator_file_is_read_without_dequantize_nodes(tmp_path: Path) -> None:
    loaded = quantized(tmp_path, quant_format=OrtFormat.QOperator)
    scheme = read_scheme(loaded)
    assert scheme.formats == (QuantFormat.QOPERATOR,)
    weights = [t for t in scheme.tensors if t.kind == "weight"]
    assert {t.quantized for t in weights} == {"w_quantized", "gw_quantized"}
    conv = next(t for t in weights if t.quantized == "w_quantized")
    values = stored_values(loaded, conv)
    assert values is not None
    assert np.abs(values - floats((8, 3, 3, 3), 1, 0.3)).max() <= 0.5001 * float(conv.qparams.scale)
    assert any(t.kind == "activation" and t.after is None for t in scheme.tensors)


def test_a_dynamic_file_gives_the_weights_with_their_scales(tmp_path: Path) -> None:
    proto = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "mm")],
        [("x", [2, 4])],
        [("y", [2, 3])],
        [array("w", floats((4, 3), 1))],
    )
    quantize_dynamic(save(proto, tmp_path / "f.onnx"), tmp_path / "q.onnx")
    loaded = load_model(tmp_path / "q.onnx")
    scheme = read_scheme(loaded)
    assert scheme.formats == (QuantFormat.DYNAMIC,)
    (weight,) = scheme.tensors
    values = stored_values(loaded, weight)
    assert values is not None
    assert np.abs(values - floats((4, 3), 1)).max() <= 0.5001 * float(weight.qparams.scale)


def test_an_absent_axis_means_one() -> None:
    nodes = [helper.make_node("DequantizeLinear", ["wq", "s", "z"], ["w"], "dq"),
             helper.make_node("MatMul", ["x", "w"], ["m"], "mm")]  # fmt: skip
    more, constants = qdq_of("m", "y", 0.1, 0)
    proto = model(
        [*nodes, *more],
        [("x", [1, 2])],
        [("y", [1, 2])],
        [
            array("wq", np.array([[10, 10], [20, 20]], np.int8)),
            array("s", np.array([0.1, 1.0], np.float32)),
            array("z", np.zeros(2, np.int8)),
            *constants,
        ],
    )
    loaded = Model(proto)
    weight = next(t for t in read_scheme(loaded).tensors if t.kind == "weight")
    assert weight.qparams.axis == 1
    np.testing.assert_allclose(stored_values(loaded, weight), [[1, 10], [2, 20]], rtol=1e-6)


def test_a_float_weight_behind_its_own_qdq_pair_is_a_weight() -> None:
    pair, constants = qdq_of("w", "wd", 0.05, 0)
    more, others = qdq_of("m", "y", 0.1, 0)
    proto = model(
        [*pair, helper.make_node("MatMul", ["x", "wd"], ["m"], "mm"), *more],
        [("x", [1, 4])],
        [("y", [1, 3])],
        [array("w", floats((4, 3), 1)), *constants, *others],
    )
    loaded = Model(proto)
    weight = next(t for t in read_scheme(loaded).tensors if t.kind == "weight")
    values = stored_values(loaded, weight)
    assert values is not None
    assert np.abs(values - floats((4, 3), 1)).max() <= 0.0251


def test_a_scale_computed_at_run_time_is_skipped_with_its_reason() -> None:
    proto = model(
        [
            helper.make_node("ReduceMax", ["x"], ["s"], keepdims=0),
            helper.make_node("QuantizeLinear", ["x", "s"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s"], ["y"], "dq"),
        ],
        [("x", [3])],
        [("y", [3])],
    )
    scheme = read_scheme(Model(proto))
    assert scheme.tensors == ()
    assert "dq" in scheme.skipped


def test_integer_storage_of_weights_alone_is_weight_only() -> None:
    proto = model(
        [
            helper.make_node("DequantizeLinear", ["wq", "s"], ["w"]),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        [("x", [1, 2])],
        [("y", [1, 2])],
        [array("wq", np.eye(2, dtype=np.int8)), array("s", np.float32(0.5))],
    )
    assert quant_formats(Model(proto)) == (QuantFormat.WEIGHT_ONLY,)


def test_counts_tell_quantized_nodes_from_float_ones(tmp_path: Path) -> None:
    loaded = quantized(tmp_path, nodes_to_exclude=["gemm", "flatten"])
    counts = count_scheme(loaded, read_scheme(loaded))
    assert counts.weights == 2
    assert counts.quantized_weights == 1
    assert counts.op_types["Gemm"] == 1
    assert "Gemm" not in counts.quantized_op_types
    assert 0 < counts.quantized_nodes < counts.nodes


@needs_models
def test_every_real_quantized_file_is_read_completely() -> None:
    for file in sorted(MODELS.glob("*/ort_static_qdq.onnx")):
        loaded = load_model(file)
        scheme = read_scheme(loaded)
        assert scheme.formats == (QuantFormat.QDQ,), file
        assert not scheme.skipped, file
        pairs = sum(n.op_type == "DequantizeLinear" for n in loaded.nodes)
        assert len(scheme.tensors) == pairs, file
        bias = [t for t in scheme.tensors if t.kind == "bias"]
        assert all(t.qparams.dtype == "int32" for t in bias)


def test_onnx_checks_the_hand_made_models() -> None:
    onnx.checker.check_model(conv_relu_gemm())


def test_a_node_that_only_reads_dequantized_values_is_not_quantized(tmp_path: Path) -> None:
    """An excluded node between quantized neighbours computes in float."""
    nodes = ["conv", "relu", "pool", "flatten", "gemm"]
    loaded = quantized(tmp_path, nodes_to_exclude=["pool"])
    counts = count_scheme(loaded, read_scheme(loaded))
    assert "GlobalAveragePool" in counts.op_types
    assert "GlobalAveragePool" not in counts.quantized_op_types
    assert counts.quantized_nodes < len(nodes)


# -- Q and DQ ------------------------------------------------------------------------------------


def dequantized_by_runtime(loaded: Model) -> dict[str, np.ndarray]:
    """What ONNX Runtime, optimisations off, computes for each tensor behind a DequantizeLinear."""
    names = [n.outputs[0] for n in loaded.nodes if n.op_type == "DequantizeLinear"]
    session = open_session(loaded, optimized=False, outputs=names)
    return session.run({"x": floats((1, 3, 8, 8), 0)}, names)


@pytest.mark.parametrize(
    "options",
    [
        {"per_channel": True},
        {"activation_type": QuantType.QUInt16, "weight_type": QuantType.QInt8},
        {"weight_type": QuantType.QInt4},
        {"activation_type": QuantType.QInt16, "weight_type": QuantType.QInt16},
        {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8},
        {"extra_options": {"AddQDQPairToWeight": True}},
        {"extra_options": {"AddQDQPairToWeight": True}, "per_channel": True},
        {"extra_options": {"DedicatedQDQPair": True}},
        {"extra_options": {"UseQDQContribOps": True}},
        {"extra_options": {"QuantizeBias": False}},
        {"extra_options": {"ActivationSymmetric": True, "WeightSymmetric": False}},
        {
            "extra_options": {
                "TensorQuantOverrides": {
                    "r": [
                        {
                            "quant_type": QuantType.QUInt8,
                            "convert": {
                                "quant_type": QuantType.QUInt16, "recv_nodes": {"pool"},
                            },
                        }
                    ]
                }
            }
        },
    ],
    ids=str,
)  # fmt: skip
def test_every_pair_of_onnx_runtimes_quantizer_is_read(
    tmp_path: Path, options: dict[str, object]
) -> None:
    loaded = quantized(tmp_path, **options)
    scheme = read_scheme(loaded)
    assert scheme.formats == (QuantFormat.QDQ,)
    assert not scheme.skipped
    nodes = [n for n in loaded.nodes if n.op_type == "DequantizeLinear"]
    assert [t.after for t in scheme.tensors] == [n.outputs[0] for n in nodes]
    assert all(t.note == "" for t in scheme.tensors)
    computed = dequantized_by_runtime(loaded)
    for tensor in scheme.tensors:
        assert tensor.after is not None
        values = stored_values(loaded, tensor)
        if tensor.kind == "activation":
            assert values is None
            assert tensor.before is not None
        else:
            np.testing.assert_allclose(values, computed[tensor.after], rtol=2**-22)
    weights = {w for t in scheme.tensors if t.kind == "weight" for w in (t.before or t.quantized,)}
    assert {w.removesuffix("_quantized") for w in weights} == {"w", "gw"}


def test_a_tensor_converted_between_types_has_both_pairs(tmp_path: Path) -> None:
    overrides = {
        "p": [{"quant_type": QuantType.QUInt8, "convert": {"quant_type": QuantType.QUInt16}}]
    }
    loaded = quantized(
        tmp_path, activation_type=QuantType.QUInt16,
        extra_options={"TensorQuantOverrides": overrides},
    )  # fmt: skip
    scheme = read_scheme(loaded)
    both = [t for t in scheme.tensors if t.name.startswith("p_")]
    assert {t.qparams.dtype for t in both} == {"uint8", "uint16"}
    assert any("_convert" in t.name for t in both)


def test_dedicated_pairs_of_one_tensor_are_listed_each_with_its_readers(tmp_path: Path) -> None:
    proto = conv_relu_gemm()
    proto.graph.node.append(helper.make_node("Sigmoid", ["r"], ["second"], "sigmoid"))
    proto.graph.output.add(name="second").type.tensor_type.elem_type = 1
    quantize_static(
        save(proto, tmp_path / "f.onnx"), tmp_path / "q.onnx", Reader(),
        extra_options={"DedicatedQDQPair": True},
    )  # fmt: skip
    scheme = read_scheme(load_model(tmp_path / "q.onnx"))
    pairs = [t for t in scheme.tensors if t.before == "r"]
    assert sorted(t.consumers for t in pairs) == [("pool",), ("sigmoid",)]


def pair(
    quantize: Sequence[str],
    dequantize: Sequence[str],
    constants: dict[str, object],
    *,
    between: Sequence[onnx.NodeProto] = (),
    opset: int = 21,
    **attributes: object,
) -> Model:
    """x through Q and DQ with the given inputs behind the tensor, to y."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *quantize], ["q"], "Q", **attributes),
        *between,
        helper.make_node("DequantizeLinear", ["c" if between else "q", *dequantize], ["y"], "DQ"),
    ]
    arrays = [array(name, value) for name, value in constants.items()]
    return Model(model(nodes, [("x", [2, 3])], [("y", [2, 3])], arrays, opset=opset))


def test_q_and_dq_of_different_scales_are_noted_and_read_as_the_consumer_does() -> None:
    constants = {"a": np.float32(0.5), "b": np.float32(0.25), "z": np.int8(1), "w": np.int8(2)}
    (scales,) = read_scheme(pair(["a", "z"], ["b", "z"], constants)).tensors
    assert scales.note == "Q and DQ carry different scales (Q, DQ)"
    assert scales.qparams.scale == 0.25
    (zeros,) = read_scheme(pair(["a", "z"], ["a", "w"], constants)).tensors
    assert zeros.note == "Q and DQ carry different zero points (Q, DQ)"
    (same,) = read_scheme(
        pair(["a", "z"], ["a2", "z"], constants | {"a2": np.float32(0.5)})
    ).tensors
    assert same.note == ""


def test_a_scale_given_by_a_constant_node_or_shared_through_identity_is_read() -> None:
    proto = pair(["s", "z"], ["s", "z"], {"s0": np.float32(0.5)}).proto
    proto.graph.node.insert(0, helper.make_node("Identity", ["s0"], ["s"], "share"))
    proto.graph.node.insert(
        0, helper.make_node("Constant", [], ["z"], "zero", value=array("", np.array(7, np.uint8)))
    )
    loaded = Model(proto)
    (tensor,) = read_scheme(loaded).tensors
    assert (tensor.qparams.scale, tensor.qparams.zero_point, tensor.qparams.dtype) == (
        0.5,
        7,
        "uint8",
    )
    assert scale_names(loaded) == {"s", "s0", "z"}


@pytest.mark.parametrize(
    ("attributes", "dtype"), [({}, "uint8"), ({"output_dtype": TensorProto.INT16}, "int16")]
)
def test_a_q_without_zero_point_says_its_type_or_writes_uint8(
    attributes: dict[str, object], dtype: str
) -> None:
    (tensor,) = read_scheme(pair(["s"], ["s"], {"s": np.float32(0.5)}, **attributes)).tensors
    assert tensor.qparams.dtype == dtype
    assert tensor.qparams.zero_point == 0


def test_codes_clipped_between_q_and_dq_belong_to_the_pair_and_say_so() -> None:
    clip = helper.make_node("Clip", ["q", "low", "high"], ["c"], "narrow")
    constants = {"s": np.float32(0.5), "z": np.int8(0), "low": np.int8(-8), "high": np.int8(7)}
    (tensor,) = read_scheme(pair(["s", "z"], ["s", "z"], constants, between=[clip])).tensors
    assert (tensor.before, tensor.after) == ("x", "y")
    assert tensor.note == "narrow clips the codes between Q and DQ"


def test_an_absent_axis_is_the_second_of_three_as_in_the_kernel() -> None:
    codes, scale = np.arange(24, dtype=np.int8).reshape(2, 3, 4), np.float32([1, 10, 100])
    node = helper.make_node("DequantizeLinear", ["q", "s"], ["y"], "DQ")
    proto = model([node], [], [("y", [2, 3, 4])], [array("q", codes), array("s", scale)])
    loaded = Model(proto)
    (tensor,) = read_scheme(loaded).tensors
    kernel = ort.InferenceSession(proto.SerializeToString()).run(None, {})[0]
    np.testing.assert_array_equal(stored_values(loaded, tensor), kernel)


def test_the_type_of_integers_that_leave_the_model_is_what_their_q_says() -> None:
    proto = pair(["s"], ["s"], {"s": np.float32(0.5)}, output_dtype=TensorProto.INT16).proto
    del proto.graph.node[1]
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("q", TensorProto.INT16, [2, 3]))
    (tensor,) = read_scheme(Model(proto)).tensors
    assert tensor.qparams.dtype == "int16"


def test_integers_that_leave_the_model_are_an_activation_without_after() -> None:
    proto = pair(["s", "z"], ["s", "z"], {"s": np.float32(0.5), "z": np.int8(3)}).proto
    del proto.graph.node[1]
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("q", TensorProto.INT8, [2, 3]))
    (tensor,) = read_scheme(Model(proto)).tensors
    assert (tensor.kind, tensor.before, tensor.after, tensor.name) == ("activation", "x", None, "q")


def test_a_zero_dimensional_constant_is_a_weight() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["d"], "DQ"),
        helper.make_node("Mul", ["x", "d"], ["y"], "mul"),
    ]
    constants = [array("q", np.int8(5)), array("s", np.float32(0.5))]
    loaded = Model(model(nodes, [("x", [2])], [("y", [2])], constants))
    (tensor,) = read_scheme(loaded).tensors
    assert stored_values(loaded, tensor) == 2.5


@pytest.mark.parametrize(
    ("scale", "zero", "axis", "reason"),
    [
        (np.ones(4, np.float32), None, 1, r"scale of shape \(4,\) for a tensor of shape \(2, 3\)"),
        (np.ones(3, np.float32), None, 5, "axis 5 is outside a tensor of rank 2"),
        (np.ones(3, np.float32), np.zeros(2, np.int8), 1, r"zero point of shape \(2,\)"),
        (np.ones((3, 1), np.float32), None, 1, "expected one axis"),
    ],
)
def test_parameters_that_do_not_fit_are_skipped_with_what_was_found(
    scale: np.ndarray, zero: np.ndarray | None, axis: int, reason: str
) -> None:
    constants = [array("q", np.zeros((2, 3), np.int8)), array("s", scale)]
    inputs = ["q", "s"]
    if zero is not None:
        constants.append(array("z", zero))
        inputs.append("z")
    nodes = [
        helper.make_node("DequantizeLinear", inputs, ["d"], "DQ", axis=axis),
        helper.make_node("Add", ["x", "d"], ["y"], "add"),
    ]
    loaded = Model(model(nodes, [("x", [2, 3])], [("y", [2, 3])], constants))
    scheme = read_scheme(loaded)
    assert scheme.tensors == ()
    assert re.search(reason, scheme.skipped["DQ"])


def test_weights_computed_from_constants_are_weights() -> None:
    """Transposed between the integers and DQ, or before a Q that runs."""
    stored, real = np.array([[1, 2, 3], [4, 5, 6]], np.int8), floats((3, 2), 1)
    more, constants = qdq_of("real_t", "b", 0.05, 0)
    nodes = [
        helper.make_node("Transpose", ["stored"], ["stored_t"]),
        helper.make_node("DequantizeLinear", ["stored_t", "s"], ["a"], "DQ"),
        helper.make_node("Transpose", ["real"], ["real_t"]),
        *more,
        helper.make_node("MatMul", ["x", "a"], ["m"], "mm"),
        helper.make_node("MatMul", ["m", "b"], ["y"], "mm2"),
    ]
    constants += [array("stored", stored), array("real", real), array("s", np.float32(0.5))]
    loaded = Model(model(nodes, [("x", [1, 3])], [("y", [1, 3])], constants))
    a, b = read_scheme(loaded).tensors
    assert (a.kind, b.kind) == ("weight", "weight")
    np.testing.assert_array_equal(stored_values(loaded, a), stored.T * 0.5)
    values = stored_values(loaded, b)
    assert values is not None
    assert np.abs(values - real.T).max() <= 0.0251


# -- integer operators ---------------------------------------------------------------------------


def schemas() -> dict[str, list[str]]:
    """Names of the inputs of every integer operator, from ONNX and from ONNX Runtime."""
    found = {s.name: [i.name for i in s.inputs] for s in get_all_operator_schema()}
    return {name: inputs for name, inputs in found.items() if name.startswith(("QLinear", "QGemm",
            "QAttention", "QEmbed"))}  # fmt: skip


@pytest.mark.parametrize(
    "op_type",
    ["QLinearConv", "QLinearMatMul", "QGemm", "QLinearAdd", "QLinearMul", "QLinearSigmoid",
     "QLinearLeakyRelu", "QLinearSoftmax", "QLinearAveragePool", "QLinearGlobalAveragePool",
     "QLinearReduceMean", "QLinearWhere", "QAttention", "QEmbedLayerNormalization"],
)  # fmt: skip
def test_parameters_are_at_the_positions_of_the_operators_schema(op_type: str) -> None:
    inputs = schemas()[op_type]
    lower = [name.lower().removesuffix("_quant") for name in inputs]
    scales = [at for at, name in enumerate(lower) if name.endswith("_scale")]
    # Unlike numbers everywhere: whatever is read from the wrong place shows.
    constants = [array(inputs[at], np.float32(0.5 + at)) for at in scales]
    zeros = [at for at, name in enumerate(lower) if name.endswith("_zero_point")]
    constants += [array(inputs[at], np.array(at, np.uint8)) for at in zeros]
    node = helper.make_node(op_type, inputs, ["out"], "node", domain="com.microsoft")
    loaded = Model(model([node], [("x_in", [1])], [("out", None)], constants, contrib=True))
    scheme = read_scheme(loaded)
    assert not scheme.skipped
    read = {t.quantized: t.qparams for t in scheme.tensors if t.qparams.dtype != "int32"}
    for at in scales:
        base = lower[at].removesuffix("_scale")
        tensor = inputs[lower.index(base)] if base in lower else "out"
        assert read.pop(tensor).scale == 0.5 + at, tensor
    assert not read
    for tensor in scheme.tensors:
        if tensor.qparams.dtype == "int32":
            assert tensor.quantized == ("B" if op_type == "QLinearConv" else "C")
            assert tensor.qparams.scale == (0.5 + scales[0]) * (0.5 + scales[1])
    for tensor in scheme.tensors:
        name = tensor.quantized.lower().removesuffix("_quant")
        at = lower.index(f"{name}_zero_point") if f"{name}_zero_point" in lower else None
        if at is not None and tensor.qparams.dtype != "int32":
            assert tensor.qparams.zero_point == at
    assert scale_names(loaded) == {inputs[at] for at in (*scales, *zeros)}


def test_a_concat_of_integers_has_its_outputs_parameters_first() -> None:
    node = helper.make_node(
        "QLinearConcat", ["ys", "yz", "a", "as", "az", "b", "bs", "bz"], ["y"], "join",
        domain="com.microsoft", axis=0,
    )  # fmt: skip
    constants = [array(f"{t}s", np.float32(at + 1)) for at, t in enumerate("yab")]
    constants += [array(f"{t}z", np.array(at, np.uint8)) for at, t in enumerate("yab")]
    loaded = Model(model([node], [("x", [1])], [("y", None)], constants, contrib=True))
    read = {t.quantized: float(t.qparams.scale) for t in read_scheme(loaded).tensors}
    assert read == {"y": 1, "a": 2, "b": 3}


def test_integers_moved_by_a_reshape_keep_their_parameters() -> None:
    nodes = [
        helper.make_node("QLinearSigmoid", ["x8", "s", "z", "t", "z"], ["q"], "sigmoid",
                         domain="com.microsoft"),
        helper.make_node("Reshape", ["q", "shape"], ["r"], "reshape"),
    ]  # fmt: skip
    constants = [array("s", np.float32(0.5)), array("t", np.float32(0.25)),
                 array("z", np.array(2, np.uint8)), array("shape", np.array([-1]))]  # fmt: skip
    loaded = Model(model(nodes, [("x", [1])], [("r", None)], constants, contrib=True))
    moved = next(t for t in read_scheme(loaded).tensors if t.quantized == "r")
    assert moved.qparams.scale == 0.25


def test_scales_of_columns_may_be_a_row() -> None:
    """As the batched form of QLinearMatMul has them."""
    node = helper.make_node(
        "QLinearMatMul", ["a", "s", "z", "b", "bs", "bz", "s", "z"], ["y"], "mm"
    )
    constants = [array("s", np.float32(0.5)), array("z", np.array(2, np.uint8)),
                 array("b", np.ones((2, 3), np.int8)), array("bs", np.float32([[1, 10, 100]])),
                 array("bz", np.int8([[0, 0, 2]]))]  # fmt: skip
    loaded = Model(model([node], [("x", [1])], [("y", None)], constants))
    weight = next(t for t in read_scheme(loaded).tensors if t.quantized == "b")
    np.testing.assert_array_equal(stored_values(loaded, weight), [[1, 10, -100]] * 2)


@pytest.mark.parametrize("transposed", [0, 1])
def test_the_channels_and_bias_of_an_integer_gemm_are_those_of_its_kernel(transposed: int) -> None:
    rows, columns = 5, 4
    b = np.arange(-10, 10, dtype=np.int8).reshape(rows, columns)
    scale, zero = np.float32([0.1, 0.2, 0.4, 0.8]), np.array([1, 0, -3, 5], np.int8)
    node = helper.make_node(
        "QGemm", ["a", "as", "az", "b", "bs", "bz", "c"], ["y"], "gemm", domain="com.microsoft",
        transB=transposed, alpha=0.5,
    )  # fmt: skip
    proto = model(
        [helper.make_node("QuantizeLinear", ["x", "as", "az"], ["a"], "Q"), node],
        [("x", [rows, rows])], [("y", [rows, columns])],
        [
            array("as", np.float32(1.0)), array("az", np.array(0, np.uint8)),
            array("b", np.ascontiguousarray(b.T) if transposed else b),
            array("bs", scale), array("bz", zero),
            array("c", np.array([100, -200, 300, 7], np.int32)),
        ],
        contrib=True,
    )  # fmt: skip
    loaded = Model(proto)
    read = {t.quantized: t for t in read_scheme(loaded).tensors}
    weight, bias = stored_values(loaded, read["b"]), stored_values(loaded, read["c"])
    assert read["b"].qparams.axis == (0 if transposed else 1)
    assert weight is not None
    assert bias is not None
    session = ort.InferenceSession(proto.SerializeToString())
    kernel = session.run(None, {"x": np.eye(rows, dtype=np.float32)})[0]
    ours = 0.5 * (weight.T if transposed else weight) + bias
    np.testing.assert_allclose(kernel, ours, rtol=1e-6)


def test_every_node_of_a_qoperator_file_has_its_parameters(tmp_path: Path) -> None:
    """Per channel, through nodes that only move integers."""
    loaded = quantized(tmp_path, quant_format=OrtFormat.QOperator, per_channel=True)
    scheme = read_scheme(loaded)
    assert not scheme.skipped
    read = {t.quantized: t for t in scheme.tensors}
    assert read["w_quantized"].qparams.axis == 0
    assert read["w_quantized"].qparams.scale.shape == (8,)
    values = stored_values(loaded, read["w_quantized"])
    assert values is not None
    step = read["w_quantized"].qparams.scale.reshape(-1, 1, 1, 1)
    assert np.all(np.abs(values - floats((8, 3, 3, 3), 1, 0.3)) <= 0.5001 * step)
    flat = next(n for n in loaded.nodes if n.op_type == "Flatten")
    before, after = (read[name].qparams for name in (flat.inputs[0], flat.outputs[0]))
    assert (before.scale, before.zero_point) == (after.scale, after.zero_point)
    biases = [t for t in scheme.tensors if t.kind == "bias"]
    assert len(biases) == 2
    bias = stored_values(loaded, next(t for t in biases if t.quantized.startswith("b_")))
    np.testing.assert_allclose(bias, floats((8,), 2, 0.1), atol=1e-3)


def test_a_quantized_table_behind_a_gather_is_read_in_a_qoperator_file() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "i"], ["g"], "take"),
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "Q"),
        helper.make_node("QLinearAdd", ["q", "s", "z", "g", "gs", "z", "s", "z"], ["a"], "add",
                         domain="com.microsoft"),
        helper.make_node("DequantizeLinear", ["a", "s", "z"], ["y"], "DQ"),
        helper.make_node("ArgMax", ["x"], ["i"], "index", axis=0),
    ]  # fmt: skip
    nodes.insert(0, nodes.pop())
    constants = [array("table", np.arange(8, dtype=np.uint8).reshape(4, 2)),
                 array("s", np.float32(0.5)), array("gs", np.float32(0.25)),
                 array("z", np.array(2, np.uint8))]  # fmt: skip
    loaded = Model(model(nodes, [("x", [1, 2])], [("y", [1, 2])], constants, contrib=True))
    table = next(t for t in read_scheme(loaded).tensors if t.quantized == "table")
    values = stored_values(loaded, table)
    np.testing.assert_array_equal(values, (np.arange(8).reshape(4, 2) - 2) * 0.25)


def test_attention_quantized_dynamically_is_a_dynamic_weight(tmp_path: Path) -> None:
    weight = floats((8, 24), 1)
    attention = helper.make_node(
        "Attention", ["x", "w", "b"], ["y"], "attention", domain="com.microsoft", num_heads=2
    )
    proto = model(
        [attention], [("x", [1, 3, 8])], [("y", [1, 3, 8])],
        [array("w", weight), array("b", floats((24,), 2))], contrib=True,
    )  # fmt: skip
    quantize_dynamic(save(proto, tmp_path / "f.onnx"), tmp_path / "q.onnx", per_channel=True)
    loaded = load_model(tmp_path / "q.onnx")
    assert "QAttention" in {n.op_type for n in loaded.nodes}
    scheme = read_scheme(loaded)
    assert scheme.formats == (QuantFormat.DYNAMIC,)
    assert not scheme.skipped
    assert scheme.activations_at_run_time == {"x"}
    (tensor,) = scheme.tensors
    assert tensor.qparams.axis == 1
    values = stored_values(loaded, tensor)
    assert values is not None
    assert np.all(np.abs(values - weight) <= 0.5001 * tensor.qparams.scale)


@pytest.mark.parametrize("combined", [True, False])
def test_the_scale_behind_an_integer_matmul_is_found_in_either_order(combined: bool) -> None:
    cast = helper.make_node("Cast", ["i"], ["f"], "cast", to=1)
    if combined:
        scaled = [helper.make_node("Mul", ["xs", "ws"], ["m"], "scales"),
                  helper.make_node("Mul", ["f", "m"], ["y"], "scale")]  # fmt: skip
    else:
        scaled = [helper.make_node("Mul", ["xs", "f"], ["m"], "scale_x"),
                  helper.make_node("Mul", ["ws", "m"], ["y"], "scale_w")]  # fmt: skip
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"], "dynamic"),
        helper.make_node("MatMulInteger", ["xq", "w", "xz", "wz"], ["i"], "mm"),
        cast,
        *scaled,
    ]
    constants = [array("w", np.array([[3, 4]], np.int8)), array("ws", np.float32([0.5, 0.25])),
                 array("wz", np.int8([1, 0]))]  # fmt: skip
    loaded = Model(model(nodes, [("x", [1, 1])], [("y", [1, 2])], constants))
    scheme = read_scheme(loaded)
    (tensor,) = scheme.tensors
    np.testing.assert_array_equal(stored_values(loaded, tensor), [[1.0, 1.0]])
    assert scale_names(loaded) == {"ws", "wz"}
    assert scheme.activations_at_run_time == {"x"}


def test_two_activations_quantized_at_run_time_are_nothing_to_skip() -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"], "one"),
        helper.make_node("DynamicQuantizeLinear", ["v"], ["vq", "vs", "vz"], "two"),
        helper.make_node("MatMulInteger", ["xq", "vq", "xz", "vz"], ["y"], "mm"),
    ]
    scheme = read_scheme(Model(model(nodes, [("x", [2, 2]), ("v", [2, 2])], [("y", None)])))
    assert (scheme.tensors, scheme.skipped) == ((), {})
    assert scheme.activations_at_run_time == {"x", "v"}


@pytest.mark.parametrize("op_type", ["MatMulIntegerToFloat", "DynamicQuantizeMatMul"])
def test_fused_dynamic_operators_have_their_scales_where_the_kernel_reads_them(
    op_type: str,
) -> None:
    b = np.array([[10, -20], [30, 40]], np.int8)
    scale, zero = np.float32([0.5, 0.25]), np.int8([2, -4])
    bias = np.float32([1, 2])
    names = {
        "MatMulIntegerToFloat": ["xq", "b", "xs", "bs", "xz", "bz", "bias"],
        "DynamicQuantizeMatMul": ["x", "b", "bs", "bz", "bias"],
    }[op_type]
    proto = model(
        [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"], "dynamic"),
            helper.make_node(op_type, names, ["y"], "mm", domain="com.microsoft"),
        ],
        [("x", [2, 2])], [("y", [2, 2])],
        [array("b", b), array("bs", scale), array("bz", zero), array("bias", bias)], contrib=True,
    )  # fmt: skip
    loaded = Model(proto)
    scheme = read_scheme(loaded)
    assert scheme.formats == (QuantFormat.DYNAMIC,)
    (tensor,) = scheme.tensors
    values = stored_values(loaded, tensor)
    kernel = ort.InferenceSession(proto.SerializeToString()).run(
        None, {"x": np.eye(2, dtype=np.float32)}
    )[0]
    np.testing.assert_allclose(kernel - bias, values, rtol=1e-5)
    assert scale_names(loaded) == {"bs", "bz"}


# -- bodies, counts, size ------------------------------------------------------------------------


def test_quantized_tensors_in_bodies_are_listed_with_their_path() -> None:
    """A weight of the branch, its scale outside, and a pair on an activation."""
    more, _ = qdq_of("m", "y", 0.1, 0)
    body = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w", "s"], ["d"], "DQ"),
            helper.make_node("Mul", ["x", "d"], ["m"], "mul"),
            *more,
        ],
        "branch",
        [],
        [helper.make_tensor_value_info("y", 1, [2])],
        [array("w", np.array([3, -4], np.int8))],
    )
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], "sum", keepdims=0),
        helper.make_node("Cast", ["sum"], ["c"], "cast", to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["out"], "choose", then_branch=body, else_branch=body),
    ]
    constants = [array("s", np.float32(0.5)), array("y_s", np.float32(0.1)),
                 array("y_z", np.int8(0))]  # fmt: skip
    proto = model(nodes, [("x", [2])], [("out", [2])], constants)
    onnx.checker.check_model(proto)
    loaded = Model(proto)
    scheme = read_scheme(loaded)
    assert scheme.formats == (QuantFormat.QDQ,)
    assert not scheme.skipped
    paths = [body.path for body in loaded.bodies]
    assert [(t.scope, t.kind) for t in scheme.tensors] == [
        (path, kind) for path in paths for kind in ("weight", "activation")
    ]
    for tensor in scheme.tensors:
        expected = [1.5, -2.0] if tensor.kind == "weight" else None
        values = stored_values(loaded, tensor)
        assert (None if values is None else values.tolist()) == expected
    assert scale_names(loaded) == {"s", "y_s", "y_z"}
    counts = count_scheme(loaded, scheme)
    assert counts.op_types["Mul"] == 2
    assert counts.quantized_weights == 2


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
def test_a_half_precision_file_is_float_and_its_weights_say_so(dtype: object) -> None:
    narrow = np.dtype(dtype)  # type: ignore[call-overload]
    proto = conv_relu_gemm()
    for at, initializer in enumerate(proto.graph.initializer):
        values = onnx.numpy_helper.to_array(initializer).astype(narrow)
        proto.graph.initializer[at].CopyFrom(array(initializer.name, values))
    loaded = Model(proto)
    scheme = read_scheme(loaded)
    assert (scheme.formats, scheme.tensors, scheme.skipped) == ((QuantFormat.FLOAT,), (), {})
    counts = count_scheme(loaded, scheme)
    assert counts.weight_dtypes == {narrow.name: 2}
    assert counts.quantized_nodes == counts.quantized_weights == 0


def test_counts_know_a_float_weight_behind_a_transpose(tmp_path: Path) -> None:
    """Quantized activations on both sides do not make a node with a float weight quantized."""
    one, a = qdq_of("x", "xd", 0.1, 0)
    two, b = qdq_of("m", "y", 0.1, 0)
    nodes = [
        *one,
        helper.make_node("Transpose", ["w"], ["wt"], "turn"),
        helper.make_node("MatMul", ["xd", "wt"], ["m"], "mm"),
        *two,
    ]
    constants = [array("w", floats((2, 3), 1)), *a, *b]
    loaded = Model(model(nodes, [("x", [1, 3])], [("y", [1, 2])], constants))
    counts = count_scheme(loaded, read_scheme(loaded))
    assert "MatMul" not in counts.quantized_op_types
    assert counts.weight_dtypes == {"float32": 1}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_twenty_thousand_nodes_are_read_in_time_that_grows_with_their_number(form: str) -> None:
    """Work, not seconds: how often a tensor is looked at, at two sizes."""

    def chain(length: int) -> Model:
        nodes, last = [], "x"
        for at in range(length // 2):
            q, d = f"q{at}", f"d{at}"
            if form == "qdq":
                first = helper.make_node("QuantizeLinear", [last, "s", "z"], [q], f"Q{at}")
                second = helper.make_node("DequantizeLinear", [q, "s", "z"], [d], f"DQ{at}")
            else:
                first = helper.make_node(
                    "QLinearSigmoid", [last, "s", "z", "s", "z"], [q], f"S{at}",
                    domain="com.microsoft",
                )  # fmt: skip
                second = helper.make_node("Identity", [q], [d], f"I{at}")
            nodes += [first, second]
            last = d
        constants = [array("s", np.float32(0.5)), array("z", np.array(0, np.uint8))]
        return Model(model(nodes, [("x", [1])], [(last, None)], constants, contrib=True))

    def calls(length: int) -> int:
        loaded = chain(length)
        loaded.tensor_infos  # noqa: B018 - shape inference is the model's own work
        count = 0

        def count_call(*_: object) -> None:
            nonlocal count
            count += 1

        sys.setprofile(count_call)
        try:
            scheme = read_scheme(loaded)
        finally:
            sys.setprofile(None)
        assert len(scheme.tensors) >= length // 2
        return count

    small, large = calls(1000), calls(4000)
    assert large < 4.5 * small
    assert len(read_scheme(chain(20_000)).tensors) >= 10_000
