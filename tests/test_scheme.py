from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization import QuantFormat as OrtFormat

from inspector.model import Model, load_model
from inspector.scheme import QuantFormat, count_scheme, quant_formats, read_scheme, stored_values
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
