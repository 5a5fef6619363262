"""The formulas of the frameworks against their own code, kernels and textbooks."""

from __future__ import annotations

import math

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnxruntime.quantization.quant_utils import compute_scale_zp, get_qmin_qmax_for_qType

from inspector.grid_schemes import SCHEMES, GridScheme, dequantized

ONNX_TYPES = {
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int16": TensorProto.INT16,
    "uint16": TensorProto.UINT16,
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
}
ORT = [name for name in SCHEMES if name.startswith("ort-")]


@given(
    low=st.floats(-1e4, 1e4, width=32),
    width=st.floats(0, 1e4, width=32),
    name=st.sampled_from(ORT),
)
def test_scale_and_zero_point_are_those_of_onnx_runtimes_quantizer(
    low: float, width: float, name: str
) -> None:
    scheme = SCHEMES[name]
    symmetric = scheme.rule == "symmetric"
    qmin, qmax = get_qmin_qmax_for_qType(
        ONNX_TYPES[scheme.type_name], reduce_range=scheme.reduced, symmetric=symmetric
    )
    ends = np.array(low, np.float64), np.array(low + width, np.float64)
    whole = (np.array(int(q), np.int64) for q in (qmin, qmax))
    zero, scale = compute_scale_zp(*ends, *whole, symmetric)
    ours = scheme.parameters(*map(float, ends))
    if 0 < max(abs(low), abs(low + width)) < 1e-30:
        return  # its limit depends on the dtype: float64 here, float32 in a model
    assert ours == (pytest.approx(float(scale), rel=1e-12), float(zero))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("name", ORT)
def test_the_codes_are_those_of_onnx_runtimes_tables_at_any_width(name: str, bits: int) -> None:
    scheme = SCHEMES[name].with_bits(bits)
    if bits == 4 and scheme.restricted:
        return  # ONNX Runtime leaves -8 in; here the formula is the same at every width
    theirs = get_qmin_qmax_for_qType(
        ONNX_TYPES[scheme.type_name],
        reduce_range=scheme.reduced,
        symmetric=scheme.rule == "symmetric" and scheme.restricted,
    )
    assert scheme.span == tuple(int(q) for q in theirs)


@pytest.mark.parametrize("name", [n for n in ORT if SCHEMES[n].bits != 4])
def test_values_become_what_onnx_runtimes_kernels_make_of_them(name: str) -> None:
    scheme = SCHEMES[name]
    scale, zero = scheme.parameters(-1.3, 2.1)
    scale = float(np.float32(scale))
    x = (np.random.default_rng(1).normal(0, 3, 5000)).astype(np.float32)  # much of it clipped
    kind = ONNX_TYPES[scheme.type_name]
    constants = [
        helper.make_tensor("s", TensorProto.FLOAT, [], [scale]),
        helper.make_tensor("z", kind, [], [int(zero)]),
    ]
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
        constants,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (theirs,) = session.run(None, {"x": x})
    apart = np.abs(dequantized(x, scheme, scale, zero) - theirs) / scale
    # Their division is in float32: near a tie of 16 bits the two may differ by one code.
    assert apart.max() < 1.01
    assert np.mean(apart > 0.01) <= (0.01 if scheme.bits == 16 else 0)


def test_mxnet_rounds_as_its_operators_say() -> None:
    x = np.random.default_rng(2).normal(0, 1, 4000)
    a, low, high = 2.0, -1.5, 2.5
    codes = np.trunc(np.sign(x) * np.minimum(np.abs(x) * 127 / a + 0.5, 127))
    scheme = SCHEMES["mxnet-int8"]
    ours = dequantized(x, scheme, *scheme.parameters(-1.0, a))
    np.testing.assert_allclose(ours, codes * a / 127, atol=1e-12)
    inside = x[(x >= low) & (x <= high)]
    codes = np.trunc((inside - low) * 255 / (high - low) + 0.5)
    scheme = SCHEMES["mxnet-uint8"]
    ours = dequantized(inside, scheme, *scheme.parameters(low, high))
    np.testing.assert_allclose(ours, codes * (high - low) / 255 + low, atol=1e-12)


@pytest.mark.parametrize("a", [0.3, 0.5, 1.0, 1.7, 2.0, 100.0])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_ristretto_trims_to_its_fixed_point(a: float, bits: int) -> None:
    x = np.linspace(-a, a, 1001)
    for kind, extra in (("parameters", 1), ("activations", 0)):
        length = math.ceil(math.log2(a) + extra)
        step = 2.0 ** -(bits - length)
        ends = -(2 ** (bits - 1)) * step, (2 ** (bits - 1) - 1) * step
        expected = np.rint(np.clip(x, *ends) / step) * step
        scheme = SCHEMES[f"ristretto-{kind}"].with_bits(bits)
        np.testing.assert_array_equal(dequantized(x, scheme, *scheme.parameters(-a, a)), expected)


def test_the_formulas_of_the_frameworks_by_hand() -> None:
    def of(name: str, low: float, high: float) -> tuple[float, float]:
        return SCHEMES[name].parameters(low, high)

    assert of("pytorch-int8-symmetric", -1, 2) == (pytest.approx(2 / 127.5), 0)
    assert of("pytorch-uint8", -1, 2) == (pytest.approx(3 / 255), 85)
    # Below it PyTorch takes its epsilon; ONNX Runtime does not.
    assert of("pytorch-uint8", 0, 1e-6)[0] == np.finfo(np.float32).eps
    assert of("ort-uint8", 0, 1e-6)[0] == pytest.approx(1e-6 / 255)
    assert of("tflite-weights", -0.5, 2) == (pytest.approx(2 / 127), 0)
    assert of("tflite-activations", -1, 2) == (pytest.approx(3 / 255), -43)
    assert of("tensorflow-int8", -0.5, 2) == (pytest.approx(4 / 254), 0)
    assert of("tensorflow-uint8", -0.5, 2) == (pytest.approx(2 / 255), 0)
    assert of("mxnet-uint8", 1, 2) == (pytest.approx(1 / 255), pytest.approx(-255))
    assert of("power-of-two", -1, 127 / 16) == (2.0**-4, 0)
    assert of("power-of-two", -1, 127.01 / 16) == (2.0**-3, 0)
    assert of("intel-int8-asymmetric", -1, 1) == (pytest.approx(2 / 127), -64)
    assert of("intel-uint8-symmetric", -1, 0.5) == (pytest.approx(1 / 255), 128)
    assert SCHEMES["ort-int8-reduced"].formula == "s = 2a / 128, z = 0"
    assert SCHEMES["ort-int4-symmetric"].formula == "s = 2a / 15, z = 0"
    assert SCHEMES["ort-uint8"].with_bits(4).title == "ONNX Runtime uint4 asymmetric"


@pytest.mark.parametrize("name", SCHEMES)
def test_an_empty_range_gives_scale_one_and_zeros_stay_zero(name: str) -> None:
    scheme = SCHEMES[name]
    scale, zero = scheme.parameters(0.0, 0.0)
    if scheme.smallest_scale:
        assert scale in (1.0, scheme.smallest_scale)
    else:
        assert scale == 1.0
    if scheme.rounding != "mid-rise":
        assert dequantized(np.zeros(3), scheme, scale, zero).tolist() == [0, 0, 0]


def test_a_scheme_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="1 bits, expected 2 to 16"):
        SCHEMES["ort-int8"].with_bits(1)
    with pytest.raises(ValueError, match="17 bits"):
        SCHEMES["ort-int8"].with_bits(17)
    with pytest.raises(ValueError, match="rule is 'cubic'"):
        GridScheme(name="x", family="x", variant="x", rule="cubic")


def test_only_grids_that_onnx_can_hold_name_a_type() -> None:
    assert SCHEMES["ristretto-parameters"].quant_type == "int8"
    assert SCHEMES["ort-uint16"].quant_type == "uint16"
    for name in ("mid-rise", "truncating", "mxnet-uint8"):
        assert SCHEMES[name].quant_type == ""
    assert SCHEMES["ort-int8"].with_bits(5).quant_type == ""
