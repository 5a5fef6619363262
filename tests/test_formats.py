"""Stored and quantized values against the kernels that run them, truth in float64."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import (
    MatMulNBitsQuantizer,
)
from onnxruntime.quantization.matmul_nbits_quantizer import QuantFormat as OrtFormat

from inspector.folding import constant_value
from inspector.model import Model
from inspector.model_files import load_model
from inspector.qparams import FLOAT_CODES, INTEGER_DTYPES, QParams, code_range
from inspector.scheme import QuantFormat, QuantizedTensor, read_scheme, stored_values
from tests.samples import array, floats, model, rng, save

SHAPE = (5, 6, 7)
GRANULARITIES = [("tensor", 0, 0)]
GRANULARITIES += [("channel", axis, 0) for axis in range(3)]
# Blocks that fit, blocks with a short last one, and one that is longer than the axis.
GRANULARITIES += [("block", axis, size) for axis in range(3) for size in (1, 2, 3, 4, 8)]
# ONNX's evaluator stands in where the runtime has no kernel.
NO_KERNEL = ("float4_e2m1fn",)


def run(proto: onnx.ModelProto, feed: dict[str, Any] | None = None) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, feed or {})[0])


def evaluated(proto: onnx.ModelProto) -> np.ndarray:
    """What ONNX's reference evaluator makes of a model without inputs."""
    with np.errstate(all="ignore"):
        return np.asarray(ReferenceEvaluator(proto).run(None, {})[0])


def one_node(
    op_type: str,
    arrays: dict[str, np.ndarray],
    *,
    opset: int = 25,
    domain: str = "",
    **attributes: Any,
) -> onnx.ModelProto:
    """One node on constants; integers and small floats leave the model as float32."""
    inputs = [name if name in arrays else "" for name in ("x", "s", "z")]
    node = helper.make_node(op_type, inputs, ["y"], "node", domain=domain, **attributes)
    nodes = [node, helper.make_node("Cast", ["y"], ["out"], to=TensorProto.FLOAT)]
    constants = [array(name, values) for name, values in arrays.items()]
    return model(nodes, [], [("out", None)], constants, opset=opset, contrib=bool(domain))


def parameter_shape(granularity: tuple[str, int, int]) -> tuple[int, ...]:
    kind, axis, size = granularity
    if kind == "tensor":
        return ()
    if kind == "channel":
        return (SHAPE[axis],)
    return tuple(-(-n // size) if at == axis else n for at, n in enumerate(SHAPE))


def spread(values: np.ndarray, granularity: tuple[str, int, int]) -> np.ndarray:
    """One parameter per element, written out without regard to memory."""
    kind, axis, size = granularity
    out = np.empty(SHAPE, values.dtype)
    for at in itertools.product(*map(range, SHAPE)):
        if kind == "tensor":
            out[at] = values
        elif kind == "channel":
            out[at] = values[at[axis]]
        else:
            out[at] = values[tuple(i // size if n == axis else i for n, i in enumerate(at))]
    return out


def attributes_of(granularity: tuple[str, int, int]) -> dict[str, int]:
    kind, axis, size = granularity
    if kind == "tensor":
        return {}
    return {"axis": axis - 3} | ({"block_size": size} if kind == "block" else {})


def codes_of(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random codes of a type with both its ends among them."""
    low, high = code_range(dtype)
    if dtype in FLOAT_CODES:
        codes = rng(seed).normal(0, high / 4, shape).clip(low, high)
    else:
        codes = rng(seed).integers(int(low), int(high) + 1, shape).astype(np.float64)
    if codes.size > 1:
        codes.flat[0], codes.flat[-1] = low, high
    return codes.astype(np.int64 if dtype in INTEGER_DTYPES else np.float64).astype(np.dtype(dtype))


def parameters(
    dtype: str, granularity: tuple[str, int, int], zero: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    shape = parameter_shape(granularity)
    scale = np.asarray(rng(1).uniform(0.001, 0.1, shape), np.float32)
    if not zero:
        return scale, None
    zeros = (dtype in INTEGER_DTYPES and dtype != "int32") * np.ones(shape)
    return scale, (codes_of(dtype, shape, 2).astype(np.float64) * zeros + 0.0).astype(
        np.dtype(dtype)
    )


@pytest.mark.parametrize("dtype", [*INTEGER_DTYPES, *FLOAT_CODES])
@pytest.mark.parametrize("zero", [True, False], ids=["zero_point", "no_zero_point"])
def test_stored_values_are_the_kernels_at_every_granularity(dtype: str, zero: bool) -> None:
    for granularity in GRANULARITIES:
        codes = codes_of(dtype, SHAPE)
        scale, zeros = parameters(dtype, granularity, zero)
        arrays = {"x": codes, "s": scale} | ({} if zeros is None else {"z": zeros})
        proto = one_node("DequantizeLinear", arrays, **attributes_of(granularity))
        loaded = Model(proto)
        scheme = read_scheme(loaded)
        (tensor,) = scheme.tensors
        ours = stored_values(loaded, tensor)
        assert ours is not None
        truth = codes.astype(np.float64) * spread(scale.astype(np.float64), granularity)
        if zeros is not None:
            difference = codes.astype(np.float64) - spread(zeros.astype(np.float64), granularity)
            truth = difference * spread(scale.astype(np.float64), granularity)
        np.testing.assert_array_equal(ours, truth, str(granularity))
        np.testing.assert_array_equal(constant_value(loaded, "y"), truth, str(granularity))
        theirs = evaluated(proto) if dtype in NO_KERNEL else run(proto)
        # An int32 beyond 2^24 is rounded by a kernel that computes in float32.
        np.testing.assert_allclose(ours, theirs, rtol=2**-22, err_msg=str(granularity))


def reals(dtype: str, scale: np.ndarray) -> np.ndarray:
    """Ties, ordinary values, both ends, and values beyond them, in steps of a scale."""
    low, high = code_range(dtype)
    size = int(np.prod(SHAPE))
    half = np.arange(size) / 2 - size / 4
    beyond = np.array([low - 1, low - 0.5, low, high, high + 0.5, high + 1, -0.0, 1e6, -1e6])
    steps = np.concatenate([beyond, half])[:size]
    return np.asarray(rng(3).permutation(steps).reshape(SHAPE) * scale, np.float32)


@pytest.mark.parametrize("dtype", [*sorted({*INTEGER_DTYPES} - {"int32"}), *FLOAT_CODES])
@pytest.mark.parametrize("zero", [True, False], ids=["zero_point", "no_zero_point"])
def test_quantized_codes_are_the_kernels_at_every_granularity(dtype: str, zero: bool) -> None:
    for granularity in GRANULARITIES:
        _, zeros = parameters(dtype, granularity, zero)
        # Powers of two: the quotient is exact in float32, so that ties are ties for both.
        scale = np.asarray(2.0 ** rng(4).integers(-6, 1, parameter_shape(granularity)), np.float32)
        x = reals(dtype, spread(scale, granularity))
        attributes = attributes_of(granularity)
        if zeros is None:
            attributes["output_dtype"] = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        arrays = {"x": x, "s": scale} | ({} if zeros is None else {"z": zeros})
        proto = one_node("QuantizeLinear", arrays, **attributes)
        theirs = evaluated(proto) if dtype in NO_KERNEL else run(proto)
        ours = constant_value(Model(proto), "y")
        assert ours is not None
        assert ours.dtype.name == dtype
        np.testing.assert_array_equal(ours.astype(np.float64), theirs, str(granularity))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
def test_codes_differ_from_the_kernels_only_at_ties_that_float32_cannot_tell(dtype: str) -> None:
    scale = np.float32(0.0173)
    x = rng(5).uniform(-3, 3, 200_000).astype(np.float32)
    qparams = QParams(scale=np.array(float(scale)), zero_point=np.array(3), dtype=dtype)
    ours = qparams.quantize(x)
    theirs = run(one_node("QuantizeLinear", {"x": x, "s": scale, "z": np.array(3, dtype)}))
    odd = ours != theirs
    quotient = x[odd].astype(np.float64) / float(scale)
    assert np.all(np.abs(ours[odd] - theirs[odd]) == 1)
    assert np.all(np.abs(np.abs(quotient - np.floor(quotient)) - 0.5) < 1e-4)
    assert np.count_nonzero(odd) < 20


NOT_FINITE = np.array([np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, -0.0, 0.0], np.float32)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize("scale", [1.0, 0.0, 1e-42])
def test_nan_infinity_and_odd_scales_become_what_the_kernel_makes_of_them(
    dtype: str, scale: float
) -> None:
    """NaN becomes the lowest code, infinities the ends; 0 over a scale of 0 is NaN."""
    zero = np.array(3, dtype)
    theirs = run(
        one_node("QuantizeLinear", {"x": NOT_FINITE, "s": np.array(scale, np.float32), "z": zero})
    )
    exact = float(np.float32(scale))
    qparams = QParams(scale=np.array(exact), zero_point=np.array(3), dtype=dtype)
    np.testing.assert_array_equal(qparams.quantize(NOT_FINITE), theirs)
    low, high = INTEGER_DTYPES[dtype]
    assert qparams.quantize(NOT_FINITE)[:3].tolist() == [low, high, low]


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2", "uint2"])
def test_codes_of_few_bits_saturate_where_the_kernel_overflows(dtype: str) -> None:
    """ONNX says saturate; ONNX Runtime goes through int32 and wraps beyond 2^31 steps."""
    x = np.full(3, 3.4e38, np.float32)
    arrays = {"x": x, "s": np.float32(1), "z": np.zeros((), np.int8).astype(np.dtype(dtype))}
    qparams = QParams(scale=np.array(1.0), zero_point=np.array(0), dtype=dtype)
    low, high = INTEGER_DTYPES[dtype]
    assert qparams.quantize(x).tolist() == [high] * 3
    assert low in run(one_node("QuantizeLinear", arrays))
    assert qparams.quantize(NOT_FINITE).tolist() == [low, high, low, high, low, 0, 0]
    within = np.array([-1e9, 1e9], np.float32)
    theirs = run(one_node("QuantizeLinear", arrays | {"x": within}))
    np.testing.assert_array_equal(qparams.quantize(within), theirs)


@pytest.mark.parametrize("dtype", [name for name in FLOAT_CODES if name not in NO_KERNEL])
@pytest.mark.parametrize("saturate", [1, 0])
def test_float8_saturates_or_overflows_as_onnx_says(dtype: str, saturate: int) -> None:
    x = np.concatenate([NOT_FINITE, floats((200,), 6, 200), np.array([1e-9, 464, 465, 61440])])
    zero = np.zeros((), np.float32).astype(np.dtype(dtype))
    proto = one_node(
        "QuantizeLinear", {"x": x.astype(np.float32), "s": np.float32(0.5), "z": zero},
        saturate=saturate,
    )  # fmt: skip
    ours = constant_value(Model(proto), "y")
    assert ours is not None
    # Without saturation ONNX Runtime makes 448 of 480 and NaN of 465; ONNX's evaluator does not.
    theirs = run(proto) if saturate else evaluated(proto)
    np.testing.assert_array_equal(ours.astype(np.float64), theirs)


def test_extreme_integers_keep_their_last_bit() -> None:
    """Where float32 would round: int32 near 2^31, and differences of unsigned 16-bit codes."""
    bias = QParams(scale=np.array(2.0**-20), zero_point=np.array(0), dtype="int32")
    codes = np.array([2**31 - 1, -(2**31), 2**24 + 1], np.int32)
    assert bias.dequantize(codes).tolist() == [(2**31 - 1) / 2**20, -2048.0, 16 + 2.0**-20]
    wide = QParams(scale=np.array(1.0), zero_point=np.array(65535), dtype="uint16")
    assert wide.dequantize(np.array([0, 65535], np.uint16)).tolist() == [-65535.0, 0.0]
    low = QParams(scale=np.array(1e-42), zero_point=np.array(32767), dtype="int16")
    assert low.dequantize(np.array([-32768], np.int16)).tolist() == [-65535e-42]


@pytest.mark.parametrize("scale_type", [np.float16, "bfloat16"])
def test_half_precision_scales_give_the_kernels_values_before_its_rounding(
    scale_type: Any,
) -> None:
    codes = codes_of("int8", (4, 6))
    scale = np.array([0.1, 0.02, 0.003, 0.4]).astype(np.dtype(scale_type))
    proto = one_node("DequantizeLinear", {"x": codes, "s": scale}, axis=0)
    loaded = Model(proto)
    (tensor,) = read_scheme(loaded).tensors
    ours = stored_values(loaded, tensor)
    np.testing.assert_array_equal(ours, codes * scale.astype(np.float64)[:, None])
    theirs = run(proto) if scale_type is np.float16 else evaluated(proto)
    np.testing.assert_allclose(ours, theirs, rtol=2**-8 if scale_type == "bfloat16" else 2**-11)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int4", "uint4"])
def test_the_microsoft_domain_means_the_same(dtype: str) -> None:
    codes, scale = codes_of(dtype, (3, 4)), np.float32(0.37)
    zero = np.array(2).astype(np.dtype(dtype))
    proto = one_node(
        "DequantizeLinear", {"x": codes, "s": scale, "z": zero}, opset=17, domain="com.microsoft"
    )
    loaded = Model(proto)
    scheme = read_scheme(loaded)
    assert scheme.formats == (QuantFormat.WEIGHT_ONLY,)
    ours = stored_values(loaded, scheme.tensors[0])
    np.testing.assert_allclose(ours, run(proto), rtol=2**-22)


# -- weight-only ---------------------------------------------------------------------------------


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of a last axis into bytes, low bits first, the last byte padded with zeros."""
    out = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] * bits // 8)), np.uint8)
    for at in range(codes.shape[-1]):
        place, shift = divmod(at * bits, 8)
        out[..., place] |= (codes[..., at].astype(np.int64) << shift).astype(np.uint8)
    return out


def matmul_nbits(
    *, bits: int, block: int, rows: int, columns: int, zero: str, **more: Any
) -> tuple[onnx.ModelProto, np.ndarray]:
    """Identity times a packed weight, and the weight in float64, [rows, columns]."""
    blocks = -(-rows // block)
    codes = rng(1).integers(0, 2**bits, (columns, blocks * block))
    scale = rng(2).uniform(0.01, 0.1, (columns, blocks)).astype(np.float32)
    constants = [array("scales", scale)]
    zeros = np.full((columns, blocks), 2.0 ** (bits - 1))
    inputs = ["x", "w", "scales"]
    if zero == "packed":
        zeros = rng(3).integers(0, 2**bits, (columns, blocks)).astype(np.float64)
        constants.append(array("zeros", pack(zeros, bits)))
        inputs.append("zeros")
    elif zero == "float":
        zeros = rng(3).uniform(0, 2**bits - 1, (columns, blocks)).astype(np.float32)
        constants.append(array("zeros", zeros))
        inputs.append("zeros")
    packed = pack(codes.reshape(columns, blocks, block), bits)
    node = helper.make_node(
        "MatMulNBits", inputs, ["y"], "mm", domain="com.microsoft", K=rows, N=columns, bits=bits,
        block_size=block, **more,
    )  # fmt: skip
    proto = model(
        [node], [("x", [rows, rows])], [("y", [rows, columns])],
        [array("w", packed), *constants], opset=21, contrib=True,
    )  # fmt: skip
    each = np.arange(rows) // block
    truth = (codes[:, :rows] - zeros.astype(np.float64)[:, each]) * scale.astype(np.float64)[
        :, each
    ]
    return proto, truth.T


def only_weight(loaded: Model) -> QuantizedTensor:
    (tensor,) = [t for t in read_scheme(loaded).tensors if t.kind == "weight"]
    return tensor


@pytest.mark.parametrize("zero", ["", "packed", "float"])
@pytest.mark.parametrize(("rows", "block"), [(64, 32), (48, 32), (16, 16), (40, 16)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_weights_are_what_the_kernel_multiplies_with(
    bits: int, rows: int, block: int, zero: str
) -> None:
    proto, truth = matmul_nbits(bits=bits, block=block, rows=rows, columns=24, zero=zero)
    loaded = Model(proto)
    scheme = read_scheme(loaded)
    assert scheme.formats == (QuantFormat.WEIGHT_ONLY,)
    assert not scheme.skipped
    tensor = only_weight(loaded)
    assert (tensor.quantized, tensor.qparams.dtype) == ("w", f"uint{bits}")
    values = stored_values(loaded, tensor)
    np.testing.assert_allclose(values, truth, rtol=1e-15, atol=1e-15)
    if (bits, zero) != (8, "float"):  # the kernel has no such combination
        theirs = run(proto, {"x": np.eye(rows, dtype=np.float32)})
        np.testing.assert_allclose(values, theirs, rtol=2**-20, atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "more", "reason"),
    [
        (["x", "w", "scales", "", "g"], {}, "g_idx"),
        (["x", "w", "scales"], {"weight_prepacked": 1}, "one kind of GPU"),
        (["x", "w", "scales"], {"K": 128}, "scales, expected N"),
        (["x", "w", "scales"], {"bits": 3}, "bits=3"),
    ],
)
def test_packed_weights_that_cannot_be_read_say_why(
    inputs: list[str], more: dict[str, int], reason: str
) -> None:
    proto, _ = matmul_nbits(bits=4, block=32, rows=64, columns=8, zero="")
    node = proto.graph.node[0]
    del node.input[:]
    node.input.extend(inputs)
    for name, value in more.items():
        for old in [a for a in node.attribute if a.name == name]:
            node.attribute.remove(old)
        node.attribute.append(helper.make_attribute(name, value))
    proto.graph.initializer.append(array("g", np.zeros(64, np.int32)))
    scheme = read_scheme(Model(proto))
    assert scheme.tensors == ()
    assert reason in scheme.skipped["mm"]
    assert scheme.formats == (QuantFormat.WEIGHT_ONLY,)


@pytest.mark.parametrize("op_type", ["MatMulBnb4", "QMoE", "MatMulNBitsMlp"])
def test_operators_with_unreadable_packing_are_listed_with_a_reason(op_type: str) -> None:
    node = helper.make_node(op_type, ["x", "w", "a"], ["y"], "mm", domain="com.microsoft")
    constants = [array("w", np.zeros(8, np.uint8)), array("a", np.ones(1, np.float32))]
    proto = model([node], [("x", [1, 4])], [("y", [1, 4])], constants, contrib=True)
    scheme = read_scheme(Model(proto))
    assert scheme.formats == (QuantFormat.WEIGHT_ONLY,)
    assert set(scheme.skipped) == {"mm"}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("form", "bits"), [(OrtFormat.QOperator, 4), (OrtFormat.QOperator, 8), (OrtFormat.QDQ, 4)]
)
def test_the_weight_only_quantizers_files_stay_within_half_a_step(
    form: OrtFormat, bits: int, symmetric: bool
) -> None:
    weight = floats((96, 40), 1)
    proto = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "mm")],
        [("x", [96, 96])], [("y", [96, 40])], [array("w", weight)], opset=21,
    )  # fmt: skip
    quantizer = MatMulNBitsQuantizer(
        proto, bits=bits, block_size=32, is_symmetric=symmetric, quant_format=form
    )
    quantizer.process()
    done = quantizer.model.model
    loaded = Model(done)
    scheme = read_scheme(loaded)
    assert scheme.formats == (QuantFormat.WEIGHT_ONLY,)
    assert not scheme.skipped
    tensor = only_weight(loaded)
    values = stored_values(loaded, tensor)
    assert values is not None
    theirs = run(done, {"x": np.eye(96, dtype=np.float32)})
    read = values if values.shape == weight.shape else values.T
    np.testing.assert_allclose(read, theirs, rtol=1e-5, atol=1e-5)
    # The largest value of a symmetric block may lie a whole step outside the codes.
    assert np.abs(read - weight).max() <= 1.01 * tensor.qparams.scale.max()


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("dtype", ["int4", "uint4", "uint8 of 2", "uint8 of 4", "uint8 of 8"])
@pytest.mark.parametrize("axis", [1, -1])
def test_block_quantized_tables_are_what_the_kernel_gathers(
    dtype: str, zero: bool, axis: int
) -> None:
    rows, columns, block = 6, 48, 16
    bits = int(dtype[-1])
    low = -8 if dtype == "int4" else 0
    codes = rng(1).integers(low, low + 2**bits, (rows, columns))
    scale = rng(2).uniform(0.01, 0.1, (rows, columns // block)).astype(np.float32)
    zeros = np.zeros(scale.shape, np.int64)
    if dtype.startswith("uint8"):
        zeros += 2 ** (bits - 1)
    if zero:
        zeros = rng(3).integers(low, low + 2**bits, scale.shape)

    def stored(values: np.ndarray) -> np.ndarray:
        if dtype.startswith("uint8"):
            return pack(values, bits)
        return values.astype(np.dtype(dtype))

    constants = [array("w", stored(codes)), array("scales", scale)]
    constants.append(array("i", np.arange(rows)))
    if zero:
        constants.append(array("zeros", stored(zeros)))
    node = helper.make_node(
        "GatherBlockQuantized", ["w", "i", "scales", *(["zeros"] if zero else [])], ["y"], "take",
        domain="com.microsoft", bits=bits, block_size=block, gather_axis=0, quantize_axis=axis,
    )  # fmt: skip
    proto = model([node], [], [("y", [rows, columns])], constants, opset=21, contrib=True)
    each = np.arange(columns) // block
    truth = (codes - zeros[:, each]) * scale.astype(np.float64)[:, each]
    loaded = Model(proto)
    values = stored_values(loaded, only_weight(loaded))
    np.testing.assert_array_equal(values, truth)
    np.testing.assert_allclose(values, run(proto), rtol=2**-22)


@pytest.mark.parametrize("rows_share", [True, False])
def test_a_table_of_float8_is_read_with_a_scale_per_row_or_for_all_rows(rows_share: bool) -> None:
    codes = codes_of("float8_e4m3fn", (4, 32))
    scale = rng(2).uniform(0.01, 0.1, (1 if rows_share else 4, 2)).astype(np.float32)
    node = helper.make_node(
        "GatherBlockQuantized", ["w", "i", "scales"], ["y"], "take", domain="com.microsoft",
        block_size=16, gather_axis=0, quantize_axis=-1,
    )  # fmt: skip
    constants = [array("w", codes), array("scales", scale), array("i", np.arange(4))]
    proto = model([node], [], [("y", None)], constants, opset=21, contrib=True)
    loaded = Model(proto)
    values = stored_values(loaded, only_weight(loaded))
    truth = codes.astype(np.float64) * np.repeat(scale.astype(np.float64), 16, axis=1)
    np.testing.assert_array_equal(values, truth)
    np.testing.assert_allclose(values, run(proto), rtol=2**-22)


# -- dynamic -------------------------------------------------------------------------------------


def lstm(directions: int) -> onnx.ModelProto:
    hidden, inputs = 6, 5
    direction = "bidirectional" if directions == 2 else "forward"
    node = helper.make_node(
        "LSTM", ["x", "w", "r", "b"], ["y"], "lstm", hidden_size=hidden, direction=direction
    )
    return model(
        [node],
        [("x", [4, 1, inputs])],
        [("y", [4, directions, 1, hidden])],
        [
            array("w", floats((directions, 4 * hidden, inputs), 1)),
            array("r", floats((directions, 4 * hidden, hidden), 2, 0.4)),
            array("b", floats((directions, 8 * hidden), 3)),
        ],
    )


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("per_channel", [False, True])
def test_dynamic_lstm_weights_come_back_in_the_float_layout(
    tmp_path: Path, directions: int, per_channel: bool
) -> None:
    proto = lstm(directions)
    quantize_dynamic(
        save(proto, tmp_path / "f.onnx"), tmp_path / "q.onnx", per_channel=per_channel,
        op_types_to_quantize=["LSTM"],
    )  # fmt: skip
    loaded = load_model(tmp_path / "q.onnx")
    scheme = read_scheme(loaded)
    assert scheme.formats == (QuantFormat.DYNAMIC,)
    assert not scheme.skipped
    assert scheme.activations_at_run_time == {"x"}
    weights = {t.quantized: t for t in scheme.tensors}
    assert set(weights) == {"w_quantized", "r_quantized"}
    again = onnx.ModelProto()
    again.CopyFrom(proto)
    for at, (name, shape) in enumerate([("w", (5,)), ("r", (6,))]):
        tensor = weights[f"{name}_quantized"]
        values = stored_values(loaded, tensor)
        assert values is not None
        assert values.shape == (directions, 24, *shape)
        reference = onnx.numpy_helper.to_array(proto.graph.initializer[at])
        _, step, _ = tensor.qparams.aligned(np.zeros(values.shape))
        assert tensor.qparams.scale.size == directions * (24 if per_channel else 1)
        error = np.abs(values - reference)
        assert np.all(error <= 0.5001 * step.reshape(-1, 1, 1)) if not per_channel else True
        assert error.max() <= 0.5001 * tensor.qparams.scale.max()
        again.graph.initializer[at].CopyFrom(array(name, values.astype(np.float32)))
    # The kernel agrees: its output is that of the float LSTM with these weights, but for the
    # rounding of its input to 8 bits.
    x = {"x": floats((4, 1, 5), 7)}
    kernel = run(loaded.proto, x)
    assert np.abs(kernel - run(again, x)).max() < 0.02
    assert np.abs(kernel).max() > 0.3


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("weight_type", [QuantType.QInt8, QuantType.QUInt8])
def test_every_weight_of_a_dynamic_file_is_read(
    tmp_path: Path, per_channel: bool, weight_type: QuantType
) -> None:
    proto = model(
        [
            helper.make_node("Conv", ["x", "cw", "cb"], ["c"], "conv"),
            helper.make_node("Flatten", ["c"], ["f"], "flatten"),
            helper.make_node("Gemm", ["f", "gw", "gb"], ["g"], "gemm", transB=1),
            helper.make_node("MatMul", ["g", "mw"], ["m"], "mm"),
            helper.make_node("ArgMax", ["m"], ["i"], "index", axis=1, keepdims=0),
            helper.make_node("Gather", ["table", "i"], ["e"], "take"),
            helper.make_node("Add", ["m", "e"], ["y"], "add"),
        ],
        [("x", [1, 2, 4, 4])],
        [("y", [1, 6])],
        [
            array("cw", floats((3, 2, 3, 3), 1)), array("cb", floats((3,), 2)),
            array("gw", floats((7, 12), 3)), array("gb", floats((7,), 4)),
            array("mw", floats((7, 6), 5)), array("table", floats((9, 6), 6)),
        ],
    )  # fmt: skip
    source = save(proto, tmp_path / "f.onnx")
    quantize_dynamic(
        source, tmp_path / "q.onnx", per_channel=per_channel, weight_type=weight_type,
        op_types_to_quantize=["Conv", "MatMul", "Gemm", "Gather"],
    )  # fmt: skip
    loaded = load_model(tmp_path / "q.onnx")
    scheme = read_scheme(loaded)
    assert scheme.formats == (QuantFormat.DYNAMIC,)
    assert not scheme.skipped
    assert scheme.activations_at_run_time == {"x", "f", "g"}
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    read = {}
    for tensor in scheme.tensors:
        if tensor.kind == "weight":
            base = tensor.quantized.removesuffix("_quantized")
            read[base] = values = stored_values(loaded, tensor)
            assert values is not None
            reference = (
                constants[base] if values.shape == constants[base].shape else constants[base].T
            )
            error = np.abs(values - reference)
            assert error.max() <= 1.01 * tensor.qparams.scale.max(), tensor
    assert set(read) == {"cw", "gw", "mw", "table"}
    assert run(loaded.proto, {"x": floats((1, 2, 4, 4))}).shape == (1, 6)
