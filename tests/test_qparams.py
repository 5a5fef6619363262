from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnxruntime.quantization.quant_utils import compute_scale_zp, get_qmin_qmax_for_qType

from inspector.qparams import (
    INTEGER_DTYPES,
    QParams,
    code_range,
    integer_range,
    qparams_from_constants,
    qparams_from_range,
)
from tests.samples import array

ONNX_TYPES = {
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int16": TensorProto.INT16,
    "uint16": TensorProto.UINT16,
}


def kernel(op: str, values: np.ndarray, scale: np.ndarray, zero: np.ndarray, **attributes: int):
    """ONNX Runtime's own QuantizeLinear or DequantizeLinear."""
    source = helper.np_dtype_to_tensor_dtype(values.dtype)
    target = helper.np_dtype_to_tensor_dtype(
        zero.dtype if op == "QuantizeLinear" else np.dtype(np.float32)
    )
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "s", "z"], ["y"], **attributes)],
        "g",
        [helper.make_tensor_value_info("x", source, values.shape)],
        [helper.make_tensor_value_info("y", target, values.shape)],
        [array("s", scale), array("z", zero)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": values})[0]


@pytest.mark.parametrize("dtype", ONNX_TYPES)
@pytest.mark.parametrize("granularity", ["tensor", "axis", "blocked"])
def test_dequantize_equals_the_runtime_kernel(dtype: str, granularity: str) -> None:
    rng = np.random.default_rng(0)
    low, high = INTEGER_DTYPES[dtype]
    q = rng.integers(low, high + 1, (6, 8)).astype(dtype)
    shape: tuple[int, ...] = {"tensor": (), "axis": (6,), "blocked": (3, 8)}[granularity]
    scale = rng.uniform(0.01, 0.1, shape).astype(np.float32)
    zero = rng.integers(low, high + 1, shape).astype(dtype)
    attributes = {"tensor": {}, "axis": {"axis": 0}, "blocked": {"axis": 0, "block_size": 2}}
    expected = kernel("DequantizeLinear", q, scale, np.asarray(zero), **attributes[granularity])
    qparams = QParams(
        scale=scale.astype(np.float64),
        zero_point=np.asarray(zero).astype(np.int64),
        dtype=dtype,
        axis=None if granularity == "tensor" else 0,
        block_size=2 if granularity == "blocked" else None,
    )
    np.testing.assert_allclose(qparams.dequantize(q), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ONNX_TYPES)
def test_quantize_equals_the_runtime_kernel(dtype: str) -> None:
    real = np.random.default_rng(1).uniform(-20, 20, (5, 7)).astype(np.float32)
    scale = np.float32(0.125)  # a power of two: no rounding difference between float32 and 64
    zero = np.array(3, dtype)
    expected = kernel("QuantizeLinear", real, scale, zero)
    qparams = QParams(scale=np.array(float(scale)), zero_point=np.array(3, np.int64), dtype=dtype)
    np.testing.assert_array_equal(qparams.quantize(real), expected)


@given(
    low=st.floats(-1e3, 0),
    high=st.floats(0, 1e3),
    dtype=st.sampled_from(["int8", "uint8", "int16"]),
)
def test_a_round_trip_stays_within_half_a_step(low: float, high: float, dtype: str) -> None:
    qparams = qparams_from_range(low, high, dtype=dtype)
    real = np.linspace(low, high, 50)
    error = np.abs(qparams.dequantize(qparams.quantize(real)) - real)
    # The zero point is rounded, so the ends of the range may miss by half a step more.
    assert error.max() <= float(qparams.scale) * (1 + 1e-9)
    inside = (real >= qparams.representable_range()[0]) & (real <= qparams.representable_range()[1])
    assert np.all(error[inside] <= float(qparams.scale) * 0.5 * (1 + 1e-6))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("limits", [(-1.5, 0.7), (0.2, 3.0), (-4.0, -1.0), (0.0, 0.0)])
def test_parameters_from_a_range_equal_onnx_runtimes(
    dtype: str, symmetric: bool, limits: tuple[float, float]
) -> None:
    qmin, qmax = get_qmin_qmax_for_qType(ONNX_TYPES[dtype], symmetric=symmetric)
    zero, scale = compute_scale_zp(
        np.array(limits[0], np.float32), np.array(limits[1], np.float32),
        np.array(qmin), np.array(qmax), symmetric=symmetric,
    )  # fmt: skip
    ours = qparams_from_range(*limits, dtype=dtype, symmetric=symmetric)
    assert float(ours.scale) == pytest.approx(float(scale), rel=1e-6)
    assert int(ours.zero_point) == int(zero)


def test_uint8_weights_do_not_wrap_around() -> None:
    q = np.array([0, 1, 255], np.uint8)
    qparams = QParams(scale=np.array(0.5), zero_point=np.array(128, np.int64), dtype="uint8")
    np.testing.assert_array_equal(qparams.dequantize(q), [-64.0, -63.5, 63.5])


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown integer dtype 'int7'"):
        integer_range("int7")


def test_a_range_upside_down_is_refused() -> None:
    with pytest.raises(ValueError, match="not a range"):
        qparams_from_range(1.0, -1.0, dtype="int8")


def test_an_unknown_code_type_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown quantized dtype 'int7'"):
        code_range("int7")


@pytest.mark.parametrize(
    ("shape", "scale_shape", "axis", "block"),
    [
        ((4, 6), (4,), 1, None),
        ((4, 6), (6,), 2, None),
        ((4, 6), (4, 4), 1, 2),
        ((4,), (4,), None, None),
    ],
)
def test_parameters_that_do_not_fit_an_array_are_refused_with_both_shapes(
    shape: tuple[int, ...], scale_shape: tuple[int, ...], axis: int | None, block: int | None
) -> None:
    qparams = QParams(
        scale=np.ones(scale_shape), zero_point=np.zeros(scale_shape, np.int64), dtype="int8",
        axis=axis, block_size=block,
    )  # fmt: skip
    for compute in (qparams.quantize, qparams.dequantize):
        with pytest.raises(ValueError, match=r"a scale of shape .* does not fit a tensor of shape"):
            compute(np.zeros(shape))


def test_arrays_in_any_memory_order_are_read_by_index_and_left_alone() -> None:
    codes = np.asfortranarray(np.arange(24, dtype=np.int8).reshape(4, 6))
    qparams = QParams(
        scale=np.array([[1.0, 10.0, 100.0]] * 4), zero_point=np.ones((4, 3), np.int64),
        dtype="int8", axis=1, block_size=2,
    )  # fmt: skip
    expected = (np.arange(24).reshape(4, 6) - 1) * np.repeat([1.0, 10.0, 100.0], 2)
    np.testing.assert_array_equal(qparams.dequantize(codes), expected)
    np.testing.assert_array_equal(codes, np.arange(24).reshape(4, 6))
    real = np.asfortranarray(expected)
    np.testing.assert_array_equal(qparams.quantize(real), codes)
    np.testing.assert_array_equal(real, expected)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_arrays_stay_empty(shape: tuple[int, int]) -> None:
    qparams = QParams(
        scale=np.ones(shape[0]), zero_point=np.zeros(shape[0], np.int64), dtype="int8", axis=0
    )
    assert qparams.dequantize(np.zeros(shape, np.int8)).shape == shape
    assert qparams.quantize(np.zeros(shape)).shape == shape
    assert np.isnan(QParams(
        scale=np.ones(0), zero_point=np.zeros(0, np.int64), dtype="int8", axis=0
    ).representable_range()).all()  # fmt: skip


def test_constants_of_a_node_become_parameters() -> None:
    fits = qparams_from_constants(
        np.ones((1, 1), np.float16), np.array([3], np.uint8), dtype="uint8", shape=None
    )
    assert fits.per_tensor
    assert (fits.scale.dtype, fits.scale.shape, fits.zero_point) == (np.float64, (), 3)
    last = qparams_from_constants(
        np.ones(5, np.float32), None, dtype="int8", shape=("batch", 5), axis=-1
    )
    assert (last.axis, last.zero_point.tolist()) == (1, [0] * 5)
    blocked = qparams_from_constants(
        np.ones((2, 3), np.float32), None, dtype="int4", shape=(2, 5), axis=1, block_size=2
    )
    assert (blocked.axis, blocked.block_size) == (1, 2)


@pytest.mark.parametrize(
    ("scale", "zero", "more", "message"),
    [
        (np.ones(()), np.ones(()), {"dtype": "float8_e5m2"}, "zero point of float8_e5m2 is not 0"),
        (np.ones(3), None, {"axis": -1, "shape": None}, "axis -1 of a tensor of unknown rank"),
        (np.ones(3), None, {"axis": -3}, "axis -3 is outside a tensor of rank 2"),
        (np.ones(4), None, {}, "scale of shape (4,) for a tensor of shape (2, 3)"),
        (np.ones((2, 3)), None, {"block_size": 2}, "for a tensor of shape (2, 3)"),
        (np.ones(2), None, {"block_size": 2}, "expected 2 axes, blocks of 2"),
        (np.ones(()), None, {"block_size": -1}, "block size -1 is negative"),
        (np.ones(()), None, {"dtype": "float32"}, "unknown quantized dtype 'float32'"),
    ],
)
def test_constants_that_do_not_fit_say_what_was_found(
    scale: np.ndarray, zero: np.ndarray | None, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        qparams_from_constants(scale, zero, **{"dtype": "int8", "shape": (2, 3), **more})
