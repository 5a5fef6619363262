"""Edges of a comparison: what is not finite, empty, padded, carried over, stacked or foreign."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization import quantize_dynamic

from inspector.compare import compare_models
from inspector.comparison import Comparison, Pin
from inspector.devices import load_dump
from inspector.errors import FeedError, ModelError, RunError
from inspector.feeds import load_feeds
from inspector.model import Model
from inspector.model_files import load_model
from inspector.render import basis_lines, headline
from inspector.states import likely_states
from inspector.watches import choices
from tests.samples import (
    MODELS,
    array,
    conv_relu_gemm,
    floats,
    model,
    needs_models,
    npz_folder,
    qdq_of,
    save,
)

Arrays = dict[str, np.ndarray]


def compared(
    tmp_path: Path,
    float_proto: onnx.ModelProto,
    quantized_proto: onnx.ModelProto,
    feeds: Sequence[Arrays],
    *,
    labels: Sequence[int] | None = None,
    **options: Any,
) -> Comparison:
    folder = npz_folder(tmp_path / "feeds", feeds)
    if labels is not None:
        (folder / "labels.json").write_text(str(list(labels)))
    float_model = load_model(save(float_proto, tmp_path / "f.onnx"))
    quantized = load_model(save(quantized_proto, tmp_path / "q.onnx"))
    loaded = load_feeds(folder, float_model)
    options = {"measure_latency": False, "explain_deployed": False} | options
    return compare_models(float_model, quantized, loaded, **options)


def db(reference: np.ndarray, actual: np.ndarray) -> float:
    x, y = reference.astype(np.float64), actual.astype(np.float64)
    return 10 * math.log10(float((x**2).sum()) / float(((x - y) ** 2).sum()))


def fake(x: np.ndarray, scale: float, low: int = -128, high: int = 127) -> np.ndarray:
    """Q/DQ per tensor with zero point 0, in float64."""
    step = float(np.float32(scale))
    return np.clip(np.rint(x.astype(np.float64) / step), low, high) * step


def raw(proto: onnx.ModelProto, feed: Arrays, *, optimized: bool = False) -> list[np.ndarray]:
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    return list(ort.InferenceSession(proto.SerializeToString(), options).run(None, feed))


def negation(shape: Sequence[int | str], scale: float = 0.1) -> list[onnx.ModelProto]:
    """y = -x, and the same with y quantized in steps of `scale`."""
    qdq, constants = qdq_of("n", "y", scale, 0)
    return [
        model([helper.make_node("Neg", ["x"], ["y"], "neg")], [("x", shape)], [("y", shape)]),
        model([helper.make_node("Neg", ["x"], ["n"], "neg"), *qdq],
              [("x", shape)], [("y", shape)], constants),
    ]  # fmt: skip


# -- not finite --------------------------------------------------------------------------------


def root_of_a_difference() -> list[onnx.ModelProto]:
    """y = -sqrt(x); the quantized model takes the root of x - 1 and quantizes the root."""
    root, after = (
        helper.make_node("Sqrt", ["x"], ["s"], "root"), helper.make_node("Neg", ["s"], ["y"], "neg")
    )  # fmt: skip
    qdq, constants = qdq_of("s", "s_DequantizeLinear_Output", 0.1, 0)
    nodes = [
        helper.make_node("Sub", ["x", "one"], ["d"], "sub"),
        helper.make_node("Sqrt", ["d"], ["s"], "root"),
        *qdq,
        helper.make_node("Neg", ["s_DequantizeLinear_Output"], ["y"], "neg"),
    ]
    return [
        model([root, after], [("x", [3])], [("y", [3])]),
        model(nodes, [("x", [3])], [("y", [3])], [*constants, array("one", np.float32(1))]),
    ]


def test_a_nan_that_vanishes_in_q_makes_its_tensor_unknown_and_names_its_node(
    tmp_path: Path,
) -> None:
    feeds = [{"x": np.float32([5, 2, 3])}, {"x": np.float32([5, 0.5, 3])}]
    protos = root_of_a_difference()
    behind = raw(protos[1], feeds[1])[0]
    assert np.isfinite(behind).all(), "the runtime's Q hides it"
    result = compared(tmp_path, *protos, feeds)
    s = next(a for a in result.activations if a.name == "s")
    assert math.isnan(s.accumulated_sqnr_db)
    assert s.local_sqnr_db is not None
    assert math.isnan(s.local_sqnr_db)
    assert s.saturated_fraction is not None
    assert math.isnan(s.saturated_fraction)
    assert math.isnan(s.cosine_similarity)
    assert math.isnan(s.max_abs_error)
    assert s.nonfinite_quantized == 1
    (record,) = result.nonfinite
    assert (record.tensor, record.node, record.op_type, record.model) == (
        "s", "root", "Sqrt", "quantized"
    )  # fmt: skip
    assert (record.nan, record.infinite, record.first_sample) == (1, 0, "01.npz")
    assert record.origin
    (warning,) = [w for w in result.warnings if "NaN" in w]
    assert "tensor s (Sqrt root)" in warning
    assert "sample 01.npz" in warning


def test_the_first_not_finite_tensor_is_of_the_first_sample(tmp_path: Path) -> None:
    """The root comes first in the graph and fails last: Div gives infinity two samples before."""
    nodes = [
        helper.make_node("Sqrt", ["x"], ["r"], "root"),
        helper.make_node("Div", ["r", "z"], ["h"], "div"),
    ]
    qdq, constants = qdq_of("h", "hd", 0.1, 0)
    last, z = helper.make_node("Neg", ["h"], ["y"], "neg"), array("z", np.float32([1, 0, 1]))
    twin = helper.make_node("Neg", ["hd"], ["y"], "neg")
    io: tuple[Any, Any] = ([("x", [3])], [("y", [3])])
    protos = [
        model([*nodes, last], *io, [z]),
        model([*nodes, *qdq, twin], *io, [z, *constants]),
    ]
    feeds = [{"x": np.float32(x)} for x in ([1, 0, 1], [1, 2, 1], [-1, 1, 1])]
    result = compared(tmp_path, *protos, feeds)
    origins = [(r.model, r.node, r.first_sample) for r in result.nonfinite if r.origin]
    assert origins == [
        ("float", "root", "02.npz"), ("float", "div", "00.npz"),
        ("quantized", "root", "02.npz"), ("quantized", "div", "00.npz"),
    ]  # fmt: skip
    assert headline(result).endswith("on 3 of 3 samples, first at div on sample 00.npz")
    warnings = [w for w in result.warnings if "NaN" in w]
    panel = [line for line in basis_lines(result) if line.startswith("NaN")]
    assert (len(warnings), len(panel)) == (2, 2)
    for warning, line in zip(warnings, panel, strict=True):
        assert "tensor h (Div div) is the first" in warning
        assert "on sample 00.npz (2 NaN and 2 infinite in all)" in warning
        assert "first at div (Div) in sample 00.npz with 2 NaN and 2 infinite" in line


def test_infinity_is_traced_to_the_node_that_makes_it_through_tensors_without_partner(
    tmp_path: Path,
) -> None:
    nodes = [
        helper.make_node("Sub", ["x", "x"], ["zero"], "minus"),
        helper.make_node("Reciprocal", ["zero"], ["far"], "over"),
        helper.make_node("Max", ["far", "x"], ["m"], "max"),
        helper.make_node("Neg", ["m"], ["y"], "neg"),
    ]
    twin = [
        helper.make_node("Sub", ["x", "x"], ["q_zero"], "q_minus"),
        helper.make_node("Reciprocal", ["q_zero"], ["q_far"], "q_over"),
        helper.make_node("Max", ["q_far", "x"], ["q_m"], "q_max"),
        helper.make_node("Neg", ["q_m"], ["y"], "neg"),
    ]
    protos = [model(n, [("x", [2])], [("y", [2])]) for n in (nodes, twin)]
    feeds = [{"x": np.float32([1, 2])}, {"x": np.float32([3, 4])}]
    # Nothing else looks at these two.
    pins = [Pin(float_name="far", quantized_name=None)]
    result = compared(tmp_path, *protos, feeds, pins=pins)
    assert "far" not in {a.name for a in result.activations}
    found = [(r.model, r.tensor, r.origin, r.infinite) for r in result.nonfinite]
    assert found == [
        ("float", "far", True, 4), ("float", "m", False, 4), ("float", "y", False, 4),
        ("quantized", "q_far", True, 4), ("quantized", "q_m", False, 4),
        ("quantized", "y", False, 4),
    ]  # fmt: skip
    (output,) = result.outputs
    for figure in (output.sqnr_db, output.cosine_similarity, output.max_abs_error):
        assert math.isnan(figure)
    assert any("far (Reciprocal over) is the first" in w for w in result.warnings)
    assert any("q_far (Reciprocal q_over) is the first" in w for w in result.warnings)


def test_a_sample_without_nan_keeps_its_figure_beside_one_with(tmp_path: Path) -> None:
    nodes = [helper.make_node("Sqrt", ["x"], ["y"], "root")]
    qdq, constants = qdq_of("x", "xd", 0.3, 0)
    twin = [*qdq, helper.make_node("Sqrt", ["xd"], ["y"], "root")]
    protos = [
        model(nodes, [("x", [2])], [("y", [2])]),
        model(twin, [("x", [2])], [("y", [2])], constants),
    ]
    feeds = [{"x": np.float32([4, 9])}, {"x": np.float32([-4, 9])}]
    result = compared(tmp_path, *protos, feeds)
    (output,) = result.outputs
    y = next(a for a in result.activations if a.name == "y")
    assert math.isnan(y.observed_low)
    assert math.isnan(y.observed_high)
    root = np.sqrt(feeds[0]["x"].astype(np.float64))
    assert output.per_sample_sqnr_db[0] == pytest.approx(
        db(root, np.sqrt(fake(feeds[0]["x"], 0.3))), abs=1e-4
    )
    assert math.isnan(output.per_sample_sqnr_db[1])
    assert math.isnan(output.sqnr_db)


def test_half_precision_tensors_do_not_overflow_in_the_sums(tmp_path: Path) -> None:
    def proto(gain: float) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Cast", ["x"], ["h"], "half", to=TensorProto.FLOAT16),
            helper.make_node("Mul", ["h", "gain"], ["m"], "mul"),
            helper.make_node("Cast", ["m"], ["y"], "back", to=TensorProto.FLOAT),
        ]
        constants = [array("gain", np.float16(gain))]
        return model(nodes, [("x", [999])], [("y", [999])], constants)

    x = np.full(999, 60000, np.float32)
    result = compared(tmp_path, proto(1), proto(0.5), [{"x": x}])
    m = next(a for a in result.activations if a.name == "m")
    # In float16 already one square is infinite.
    assert m.accumulated_sqnr_db == pytest.approx(db(np.full(999, 60000), np.full(999, 30000)))
    assert m.mse == pytest.approx(30000.0**2, rel=1e-3)


# -- shapes ------------------------------------------------------------------------------------


def test_zero_against_zero_is_exact(tmp_path: Path) -> None:
    result = compared(tmp_path, *negation([4]), [{"x": np.zeros(4, np.float32)}])
    (output,) = result.outputs
    y = next(a for a in result.activations if a.name == "y")
    assert output.sqnr_db == y.accumulated_sqnr_db == y.local_sqnr_db == math.inf
    assert output.cosine_similarity == 1
    assert output.max_abs_error == 0
    assert not output.deployed_differs


def with_something_else(protos: Sequence[onnx.ModelProto]) -> list[onnx.ModelProto]:
    """The same models with a further input `t`, because a feed must hold some values."""
    for proto in protos:
        proto.graph.node.append(helper.make_node("Abs", ["t"], ["u"], "abs"))
        proto.graph.input.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, [1]))
        proto.graph.output.append(helper.make_tensor_value_info("u", TensorProto.FLOAT, [1]))
    return list(protos)


def test_empty_tensors_are_exact_and_hold_no_range(tmp_path: Path) -> None:
    feed = {"x": np.zeros((0, 3), np.float32), "t": np.ones(1, np.float32)}
    result = compared(tmp_path, *with_something_else(negation(["n", 3])), [feed])
    output = next(o for o in result.outputs if o.name == "y")
    y = next(a for a in result.activations if a.name == "y")
    assert output.sqnr_db == y.accumulated_sqnr_db == math.inf
    assert y.mse == y.max_abs_error == 0
    assert math.isnan(y.observed_low)
    assert y.shape == (0, 3)
    assert result.nonfinite == ()


def test_an_empty_sample_among_others_changes_no_figure(tmp_path: Path) -> None:
    x = floats((4, 3), 1)
    t = np.ones(1, np.float32)
    feeds = [{"x": x, "t": t}, {"x": np.zeros((0, 3), np.float32), "t": t}]
    result = compared(tmp_path, *with_something_else(negation(["n", 3])), feeds)
    output = next(o for o in result.outputs if o.name == "y")
    assert output.sqnr_db == pytest.approx(db(-x, fake(-x, 0.1)), abs=1e-4)
    assert output.per_sample_sqnr_db[1] == math.inf


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scalars_and_single_elements_have_figures(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = np.full(shape, 0.234, np.float32)
    result = compared(tmp_path, *negation(list(shape)), [{"x": x}])
    (output,) = result.outputs
    assert output.sqnr_db == pytest.approx(db(-x, fake(-x, 0.1)), abs=1e-3)
    assert output.max_abs_error == pytest.approx(0.034, abs=1e-6)


def test_ragged_samples_are_pooled_over_all_elements(tmp_path: Path) -> None:
    xs = [floats((2, n), n) for n in (3, 5, 1)]
    result = compared(tmp_path, *negation([2, "n"]), [{"x": x} for x in xs])
    y = next(a for a in result.activations if a.name == "y")
    joined = np.concatenate([-x.ravel() for x in xs])
    assert y.accumulated_sqnr_db == pytest.approx(db(joined, fake(joined, 0.1)), abs=1e-4)
    assert y.channel_axis is None
    assert (y.observed_low, y.observed_high) == (joined.min(), joined.max())
    assert len(result.outputs[0].per_sample_sqnr_db) == 3


def test_several_inputs_and_outputs_are_told_apart(tmp_path: Path) -> None:
    def proto(scale: float | None) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Neg", ["a"], ["y"], "neg_a"),
            helper.make_node("Abs", ["b"], ["z" if scale is None else "z0"], "abs_b"),
        ]
        qdq, constants = qdq_of("z0", "z", scale, 0) if scale else ([], [])
        return model([*nodes, *qdq], [("a", [2]), ("b", [3])], [("y", [2]), ("z", [3])], constants)

    feed = {"a": floats((2,), 1), "b": floats((3,), 2)}
    result = compared(tmp_path, proto(None), proto(0.2), [feed])
    found = {o.name: o.sqnr_db for o in result.outputs}
    assert found["y"] == math.inf
    z = np.abs(feed["b"])
    assert found["z"] == pytest.approx(db(z, fake(z, 0.2)), abs=1e-3)


def test_outputs_of_other_types_are_listed_and_not_judged(tmp_path: Path) -> None:
    protos = negation([3])
    for proto in protos:
        proto.graph.node.extend(
            [
                helper.make_node("ArgMax", ["y"], ["best"], "best", axis=0),
                helper.make_node("Greater", ["y", "half"], ["is_high"], "compare"),
                helper.make_node("Constant", [], ["words"], "say", value_strings=[b"a", b"b"]),
            ]
        )
        proto.graph.initializer.append(array("half", np.float32(0.5)))
        for name, kind, shape in (
            ("best", TensorProto.INT64, [1]), ("is_high", TensorProto.BOOL, [3]),
            ("words", TensorProto.STRING, [2]),
        ):  # fmt: skip
            proto.graph.output.append(helper.make_tensor_value_info(name, kind, shape))
    result = compared(tmp_path, *protos, [{"x": floats((3,))}] * 2)
    assert [o.name for o in result.outputs] == ["y"]
    reasons = {s.name: s.reason for s in result.skipped if s.kind == "output"}
    assert reasons == {
        "best": "it holds int64 values, no floating-point ones",
        "is_high": "it holds bool values, no floating-point ones",
        "words": "it holds string values, no floating-point ones",
    }


def test_an_output_whose_shape_differs_on_one_sample_has_no_figure(tmp_path: Path) -> None:
    def proto(op_type: str) -> onnx.ModelProto:
        nodes = [
            helper.make_node("NonZero", ["x"], ["where"], "where"),
            helper.make_node("Shape", ["where"], ["size"], "size"),
            helper.make_node("Cast", ["size"], ["n"], "cast", to=TensorProto.FLOAT),
            helper.make_node(op_type, ["x"], ["r"], "op"),
            helper.make_node("Compress", ["r", "keep"], ["y"], "select", axis=0),
            helper.make_node("Greater", ["r", "limit"], ["keep"], "choose"),
        ]
        nodes = [*nodes[:4], nodes[5], nodes[4]]
        constants = [array("limit", np.float32(0.5))]
        return model(nodes, [("x", [3])], [("y", ["n"])], constants)

    feeds = [{"x": np.float32([1, 2, 3])}, {"x": np.float32([0.4, 2, 3])}]
    result = compared(tmp_path, proto("Identity"), proto("Ceil"), feeds)
    assert result.outputs == ()
    (said,) = [s for s in result.skipped if s.name == "y"]
    assert said.reason == "shapes differ: float (2,), quantized (3,)"


def test_top_1_is_judged_per_row_of_a_batch(tmp_path: Path) -> None:
    x = np.float32([[1, 3, 2], [5, 4, 0], [0, 1, 2], [2, 1, 2.04]])
    qdq, constants = qdq_of("i", "y", 0.1, 0)
    protos = [
        model([helper.make_node("Abs", ["x"], ["y"], "abs")], [("x", [4, 3])], [("y", [4, 3])]),
        model([helper.make_node("Abs", ["x"], ["i"], "abs"), *qdq],
              [("x", [4, 3])], [("y", [4, 3])], constants),
    ]  # fmt: skip
    labels = [1, 0, 0, 2, 0, 0, 0, 2]
    result = compared(tmp_path, *protos, [{"x": x}, {"x": x}], labels=labels)
    assert result.task is not None
    assert result.task.samples == 8
    assert result.task.top1_float == 5 / 8  # rows: right, right, wrong, right; wrong, right, …
    quantized = fake(x, 0.1).argmax(axis=1)
    both = np.concatenate([quantized, quantized])
    assert result.task.top1_quantized == np.mean(both == labels)
    assert result.task.top1_agreement == np.mean(both == np.tile(x.argmax(axis=1), 2))


def test_choices_are_made_per_row_and_only_where_a_row_is_one_vector() -> None:
    rows = np.arange(6.0).reshape(2, 3)
    assert choices(rows, 2) is not None
    assert choices(rows[:, ::-1], 2).tolist() == [0, 0]  # type: ignore[union-attr]
    assert choices(rows.reshape(1, 6, 1, 1), 1).tolist() == [5]  # type: ignore[union-attr]
    assert choices(rows, 1) is None, "a map of 2 x 3 makes no choice"
    assert choices(np.zeros((20, 1)), 1) is None, "20 rows of one number make no choice"
    assert choices(np.zeros((0, 3)), 1) is None


# -- inputs that differ ------------------------------------------------------------------------


def test_a_half_precision_input_is_fed_and_said(tmp_path: Path) -> None:
    float_proto = negation([4])[0]
    half = onnx.ModelProto()
    half.CopyFrom(float_proto)
    for value in (*half.graph.input, *half.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    x = floats((4,), 3)
    result = compared(tmp_path, float_proto, half, [{"x": x}])
    assert result.outputs[0].sqnr_db == pytest.approx(db(x, x.astype(np.float16)), abs=1e-6)
    assert any("float16" in w and "x" in w for w in result.warnings)


def test_an_input_of_8_bit_exponent_floats_is_fed_and_said(tmp_path: Path) -> None:
    float_proto = negation([4])[0]
    nodes = [
        helper.make_node("Cast", ["x"], ["real"], "real", to=TensorProto.FLOAT),
        helper.make_node("Neg", ["real"], ["y"], "neg"),
    ]
    short = model(nodes, [("x", [4])], [("y", [4])])
    short.graph.input[0].type.tensor_type.elem_type = TensorProto.BFLOAT16
    x = np.float32([1.0078125, -3.1, 0.1, 7])
    result = compared(tmp_path, float_proto, short, [{"x": x}])
    codes = x.view(np.uint32)
    nearest = (codes + 0x7FFF + ((codes >> 16) & 1)) & np.uint32(0xFFFF0000)
    assert result.outputs[0].sqnr_db == pytest.approx(db(x, nearest.view(np.float32)), abs=1e-6)
    assert next(a for a in result.activations if a.name == "x").accumulated_sqnr_db == (
        pytest.approx(db(x, nearest.view(np.float32)), abs=1e-6)
    )
    assert any("bfloat16" in w for w in result.warnings)


def test_an_integer_input_is_quantized_with_its_own_scale(tmp_path: Path) -> None:
    float_proto = negation([5])[0]
    qdq, constants = qdq_of("unused", "xd", 0.1, 3)
    nodes = [qdq[1], helper.make_node("Neg", ["xd"], ["y"], "neg")]
    quantized = model(nodes, [("xd_q", [5])], [("y", [5])], constants)
    quantized.graph.input[0].type.tensor_type.elem_type = TensorProto.INT8
    x = np.float32([0.04, -0.26, 20, -1.55, 0.9])
    result = compared(tmp_path, float_proto, quantized, [{"x": x}])
    step = float(np.float32(0.1))
    codes = np.clip(np.rint(x.astype(np.float64) / step) + 3, -128, 127)
    expected = db(-x, -(codes - 3) * step)
    assert result.outputs[0].sqnr_db == pytest.approx(expected, abs=1e-4)
    assert any("xd_q" in w for w in result.warnings)


def channels_last() -> list[onnx.ModelProto]:
    """A Conv on NCHW, and the same on NHWC with Transposes around it."""
    conv = helper.make_node("Conv", ["x", "w"], ["c"], "conv")
    relu = helper.make_node("Relu", ["c"], ["y"], "relu")
    into = helper.make_node("Transpose", ["x"], ["t"], "into", perm=[0, 3, 1, 2])
    inner = helper.make_node("Conv", ["t", "w"], ["c"], "conv")
    relu_inner = helper.make_node("Relu", ["c"], ["r"], "relu")
    outof = helper.make_node("Transpose", ["r"], ["y"], "outof", perm=[0, 2, 3, 1])
    weights = [array("w", floats((4, 3, 1, 1), 1))]
    return [
        model([conv, relu], [("x", [1, 3, 5, 6])], [("y", [1, 4, 5, 6])], weights),
        model([into, inner, relu_inner, outof], [("x", [1, 5, 6, 3])], [("y", [1, 5, 6, 4])],
              weights),
    ]  # fmt: skip


def test_channels_last_is_transposed_and_said(tmp_path: Path) -> None:
    float_proto, twin = channels_last()
    twin.graph.initializer[0].CopyFrom(array("w", floats((4, 3, 1, 1), 1) * np.float32(1.01)))
    x = floats((1, 3, 5, 6), 2)
    result = compared(tmp_path, float_proto, twin, [{"x": x}])
    a = raw(float_proto, {"x": x})[0]
    b = raw(twin, {"x": x.transpose(0, 2, 3, 1)})[0].transpose(0, 3, 1, 2)
    (output,) = result.outputs
    assert output.sqnr_db == pytest.approx(db(a, b), abs=1e-6)
    assert output.sqnr_db == pytest.approx(40, abs=0.1)
    assert output.deployed_sqnr_db == pytest.approx(40, abs=0.1)
    assert any("input x" in w and "order (0, 2, 3, 1)" in w for w in result.warnings)
    (y,) = [a for a in result.activations if a.name == "x"]
    assert y.accumulated_sqnr_db == math.inf


@needs_models
def test_squeezenet_in_half_precision_has_its_known_figure() -> None:
    folder = MODELS / "squeezenet-fp16"
    float_model = load_model(folder / "model.onnx")
    feeds = load_feeds(folder / "inputs", float_model)
    result = compare_models(
        float_model, load_model(folder / "fp16.onnx"), feeds, measure_latency=False
    )
    assert result.outputs[0].sqnr_db == pytest.approx(76.29, abs=0.02)
    assert len(result.weights) == 52
    assert not result.outputs[0].deployed_differs


# -- padding -----------------------------------------------------------------------------------


def attention(tokens: int | str = "tokens") -> list[onnx.ModelProto]:
    """Embedding, scores among all positions, the mean over those that count; one Q/DQ inside.

    Padded positions hold whatever the projection makes of row 0 and change no other position.
    """

    def proto(quantized: bool) -> onnx.ModelProto:
        ids = [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, tokens]),
               helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1, tokens])]  # fmt: skip
        qdq, constants = qdq_of("p0", "p", 0.25, 0)
        nodes = [
            helper.make_node("Gather", ["table", "ids"], ["e"], "embed"),
            helper.make_node("MatMul", ["e", "w"], ["p0" if quantized else "p"], "project"),
            *(qdq if quantized else []),
            helper.make_node("Transpose", ["p"], ["pt"], "turn", perm=[0, 2, 1]),
            helper.make_node("MatMul", ["p", "pt"], ["scores"], "scores"),
            helper.make_node("Unsqueeze", ["mask", "last"], ["m3"], "widen"),
            helper.make_node("Mul", ["p", "m3"], ["kept"], "keep"),
            helper.make_node("ReduceSum", ["kept", "middle"], ["y"], "sum", keepdims=0),
        ]
        constants = [
            array("table", floats((9, 4), 1)), array("w", floats((4, 6), 2)),
            array("last", np.int64([2])), array("middle", np.int64([1])),
            *(constants if quantized else []),
        ]  # fmt: skip
        graph = helper.make_graph(
            nodes, "g", ids,
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, tokens, tokens]),
             helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6])],
            constants,
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)

    return [proto(False), proto(True)]


def sentences(lengths: Sequence[int], to: Sequence[int]) -> list[Arrays]:
    feeds = []
    for seed, (length, padded) in enumerate(zip(lengths, to, strict=True)):
        ids = np.zeros((1, padded), np.int64)
        ids[0, :length] = np.random.default_rng(seed).integers(1, 9, length)
        mask = np.zeros((1, padded), np.float32)
        mask[0, :length] = 1
        feeds.append({"ids": ids, "mask": mask})
    return feeds


def figures(result: Comparison) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for a in result.activations:
        if a.name == "mask":
            continue
        found[a.name] = (
            a.accumulated_sqnr_db, a.local_sqnr_db, a.channel_sqnr_db, a.channel_low,
            a.channel_high, a.saturated_fraction, a.observed_low, a.observed_high, a.mse,
            a.max_abs_error, a.cosine_similarity,
        )  # fmt: skip
    for o in result.outputs:
        found["output " + o.name] = (
            o.sqnr_db, o.deployed_sqnr_db, o.per_sample_sqnr_db, o.channel_sqnr_db, o.max_abs_error,
            o.worst_sample,
        )  # fmt: skip
    return found


def test_padded_feeds_with_a_mask_have_the_figures_of_the_unpadded_ones(tmp_path: Path) -> None:
    lengths = (2, 5, 3)
    alone = compared(tmp_path / "alone", *attention(), sentences(lengths, lengths))
    feeds = sentences(lengths, (7, 8, 5))
    masked = compared(tmp_path / "masked", *attention(), feeds, mask="mask")
    assert figures(masked) == figures(alone)
    assert masked.mask == "mask"
    assert not any("mask" in s.reason for s in masked.skipped)
    unmasked = compared(tmp_path / "plain", *attention(), feeds)
    assert figures(unmasked)["p"] != figures(alone)["p"]
    assert figures(unmasked)["output scores"] != figures(alone)["output scores"]


def test_padding_in_a_batch_is_left_out_row_by_row(tmp_path: Path) -> None:
    protos = attention()
    for proto in protos:
        for value in (*proto.graph.input, *proto.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    lengths = (2, 5, 3)
    alone = compared(tmp_path / "alone", *protos, sentences(lengths, lengths))
    rows = sentences(lengths, (6, 6, 6))
    batch = {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}
    together = compared(tmp_path / "batch", *protos, [batch], mask="mask")
    known = {a.name: a for a in alone.activations if a.name != "mask"}
    assert {"p", "kept"} < known.keys()
    assert not [s for s in together.skipped if "mask" in s.reason]
    for name, a in known.items():
        (found,) = [t for t in together.activations if t.name == name]
        assert found.accumulated_sqnr_db == pytest.approx(a.accumulated_sqnr_db), name
        assert found.observed_low == pytest.approx(a.observed_low), name
    (scores,) = [o for o in together.outputs if o.name == "scores"]
    assert scores.sqnr_db == pytest.approx(known["scores"].accumulated_sqnr_db)


def test_an_axis_as_long_as_the_features_is_not_taken_for_the_positions(tmp_path: Path) -> None:
    # 6 positions and 6 features: which of p's two axes the mask is about cannot be seen.
    fixed = attention(6)
    result = compared(tmp_path / "fixed", *fixed, sentences((2, 4), (6, 6)), mask="mask")
    reasons = {s.name: s.reason for s in result.skipped if s.kind == "figure"}
    assert "mask not applied" in reasons["p"]
    assert "equally long" in reasons["p"]
    # Unequal lengths tell, with a symbol for the positions or without.
    for named in ("tokens", ""):
        protos = attention()
        for proto in protos:
            for value in (*proto.graph.input, *proto.graph.output):
                for dim in value.type.tensor_type.shape.dim:
                    if dim.dim_param == "tokens":
                        dim.dim_param = named
        told = compared(tmp_path / f"told{named}", *protos, sentences((2, 4), (6, 8)), mask="mask")
        alone = compared(tmp_path / f"alone{named}", *protos, sentences((2, 4), (2, 4)))
        assert figures(told) == figures(alone)


def test_a_mask_that_is_no_input_is_named_with_its_neighbours(tmp_path: Path) -> None:
    with pytest.raises(FeedError) as caught:
        compared(tmp_path, *attention(), sentences((2,), (3,)), mask="maks")
    assert caught.value.message == (
        "f.onnx has no input 'maks' that could mark padding, the nearest are mask, ids"
    )


@pytest.mark.slow
@needs_models
def test_a_padded_sentence_model_has_the_figures_of_its_own_positions(tmp_path: Path) -> None:
    folder = MODELS / "minilm-l6"
    float_model = load_model(folder / "model.onnx")
    quantized = load_model(folder / "ort_static_qdq.onnx")
    own = [dict(f) for f in load_feeds(folder / "inputs", float_model).subset(range(4))]
    longer = [
        {k: np.pad(v, ((0, 0), (0, 4 + 3 * at))) for k, v in f.items()} for at, f in enumerate(own)
    ]
    options: dict[str, Any] = {"measure_latency": False, "explain_deployed": False}
    results = [
        compare_models(
            float_model, quantized, load_feeds(npz_folder(tmp_path / name, feeds), float_model),
            **options, **more,
        )
        for name, feeds, more in (("own", own, {}), ("longer", longer, {"mask": "attention_mask"}))
    ]  # fmt: skip
    alone, masked = ({a.name: a for a in r.activations} for r in results)
    assert alone.keys() == masked.keys()
    assert not [s for s in results[1].skipped if "mask" in s.reason]
    for name, a in alone.items():
        # The float model gives the same at its own positions, to float32's rounding.
        span = max(abs(a.observed_low), abs(a.observed_high))
        assert masked[name].observed_low == pytest.approx(a.observed_low, abs=1e-4 * span), name
        assert masked[name].observed_high == pytest.approx(a.observed_high, abs=1e-4 * span), name
        assert masked[name].channel_axis == a.channel_axis, name
    # And the error is that of the padded run at exactly these positions.
    tensor = "/m/encoder/layer.2/attention/self/Softmax_output_0"
    other = masked[tensor].quantized_name
    sums = np.zeros(2)
    sessions = []
    for path, name in ((folder / "model.onnx", tensor), (folder / "ort_static_qdq.onnx", other)):
        proto = onnx.load(path)
        proto.graph.output.add(name=name)
        options_ = ort.SessionOptions()
        options_.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        sessions.append((ort.InferenceSession(proto.SerializeToString(), options_), name))
    for feed, padded in zip(own, longer, strict=True):
        n = feed["attention_mask"].shape[1]
        a, b = (s.run([name], padded)[0][:, :, :n, :n].astype(float) for s, name in sessions)
        sums += [(a**2).sum(), ((a - b) ** 2).sum()]
    expected = 10 * math.log10(sums[0] / sums[1])
    assert masked[tensor].accumulated_sqnr_db == pytest.approx(expected, abs=0.05)


# -- state -------------------------------------------------------------------------------------


def leaky_sum() -> list[onnx.ModelProto]:
    """hn = 0.5 h + x and y = -hn; the quantized model rounds hn to steps of 0.5."""

    def proto(quantized: bool) -> onnx.ModelProto:
        qdq, constants = qdq_of("hn0", "hn", 0.5, 0)
        nodes = [
            helper.make_node("Mul", ["h", "half"], ["m"], "mul"),
            helper.make_node("Add", ["m", "x"], ["hn0" if quantized else "hn"], "add"),
            *(qdq if quantized else []),
            helper.make_node("Neg", ["hn"], ["y"], "neg"),
        ]
        constants = [array("half", np.float32(0.5)), *(constants if quantized else [])]
        return model(nodes, [("x", [4]), ("h", [4])], [("y", [4]), ("hn", [4])], constants)

    return [proto(False), proto(True)]


def test_carried_states_let_each_model_live_with_its_own_errors(tmp_path: Path) -> None:
    feeds = [{"x": floats((4,), s), "h": np.zeros(4, np.float32)} for s in range(6)]
    protos = leaky_sum()
    carried = compared(tmp_path / "carried", *protos, feeds, states=[("hn", "h")])
    fresh = compared(tmp_path / "fresh", *protos, feeds)
    h, q = np.zeros(4), np.zeros(4)
    per_sample = []
    for feed in feeds:
        h = 0.5 * h + feed["x"].astype(np.float64)
        q = fake(0.5 * q + feed["x"].astype(np.float64), 0.5)
        per_sample.append(db(h, q))
    found = {o.name: o for o in carried.outputs}
    assert found["y"].per_sample_sqnr_db == pytest.approx(per_sample, abs=1e-3)
    assert found["y"].deployed_sqnr_db == pytest.approx(found["y"].sqnr_db, abs=1e-3)
    alone = [db(f["x"], fake(f["x"], 0.5)) for f in feeds]
    assert {o.name: o for o in fresh.outputs}["y"].per_sample_sqnr_db == pytest.approx(
        alone, abs=1e-3
    )
    assert carried.states == (("hn", "h"),)
    assert not any("named as a state" in w for w in carried.warnings)
    assert any(w.startswith("hn=h: an output that looks like the state") for w in fresh.warnings)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([("hm", "h")], "f.onnx has no output 'hm' to carry a state, the nearest are hn, y"),
        ([("hn", "hh")], "f.onnx has no input 'hh' to carry a state, the nearest are h, x"),
        ([("hn", "h"), ("y", "h")], "input h is to get the state of several outputs, expected one"),
    ],
)
def test_wrong_names_of_states_are_refused(
    tmp_path: Path, states: list[tuple[str, str]], message: str
) -> None:
    feeds = [{"x": floats((4,)), "h": np.zeros(4, np.float32)}]
    with pytest.raises(FeedError) as caught:
        compared(tmp_path, *leaky_sum(), feeds, states=states)
    assert caught.value.message == message


def test_a_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    protos = leaky_sum()
    for proto in protos:
        proto.graph.node.append(helper.make_node("ReduceSum", ["y"], ["total"], "total"))
        proto.graph.output.append(helper.make_tensor_value_info("total", TensorProto.FLOAT, [1]))
    feeds = [{"x": floats((4,)), "h": np.zeros(4, np.float32)}]
    with pytest.raises(FeedError, match=r"output total \(float32 \(1,\)\) cannot be the state of"):
        compared(tmp_path, *protos, feeds, states=[("total", "h")])


@pytest.mark.parametrize(
    ("output", "given", "is_state"),
    [
        ("hn", "h", True), ("stateN", "state", True), ("conv_cache_out", "conv_cache", True),
        ("h_out", "h_in", True), ("present_key_0", "past_key_0", True),
        ("new_state", "state", True),
        ("next_state", "prev_state", True), ("out_cache", "in_cache", True),
        ("output", "input", False), ("y", "x", False), ("logits", "logits_mask", False),
        ("boxes", "box", False),
    ],
)  # fmt: skip
def test_a_state_is_recognised_by_its_names(output: str, given: str, is_state: bool) -> None:
    nodes = [helper.make_node("Neg", [given], [output], "neg")]
    found = likely_states(Model(model(nodes, [(given, [2])], [(output, [2])])))
    assert found == (((output, given),) if is_state else ())


@needs_models
def test_a_speech_enhancer_loses_more_when_it_lives_with_its_own_state() -> None:
    folder = MODELS / "gtcrn"
    float_model = load_model(folder / "model.onnx")
    quantized = load_model(folder / "ort_static_qdq.onnx")
    feeds = load_feeds(folder / "inputs", float_model).subset(range(5))
    states = likely_states(float_model)
    assert states == (
        ("conv_cache_out", "conv_cache"), ("tra_cache_out", "tra_cache"),
        ("inter_cache_out", "inter_cache"),
    )  # fmt: skip
    result = compare_models(
        float_model, quantized, feeds, states=states, measure_latency=False, explain_deployed=False
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    outputs = []
    for name in ("model.onnx", "ort_static_qdq.onnx"):
        session = ort.InferenceSession(str(folder / name), options)
        held: Arrays = {}
        each = []
        for feed in feeds:
            values = session.run(None, {**feed, **held})
            named = dict(zip([o.name for o in session.get_outputs()], values, strict=True))
            held = {given: named[output] for output, given in states}
            each.append(named["enh"])
        outputs.append(np.stack(each))
    found = {o.name: o.sqnr_db for o in result.outputs}
    assert found["enh"] == pytest.approx(db(*outputs), abs=0.01)


# -- batches -----------------------------------------------------------------------------------


def dynamic_product() -> list[onnx.ModelProto]:
    """y = x w, and the same with x quantized over whatever runs together."""
    w = np.float32([[20], [-20], [1]])  # the first two inputs nearly cancel
    codes = (w * 4).astype(np.int8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"], "range"),
        helper.make_node("MatMulInteger", ["xq", "wq", "xz"], ["acc"], "product"),
        helper.make_node("Cast", ["acc"], ["accf"], "real", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xs", "ws"], ["scale"], "scales"),
        helper.make_node("Mul", ["accf", "scale"], ["y"], "rescale"),
    ]
    io: tuple[Any, Any] = ([("x", ["batch", 3])], [("y", ["batch", 1])])
    return [
        model([helper.make_node("MatMul", ["x", "w"], ["y"], "product")], *io, [array("w", w)]),
        model(nodes, *io, [array("wq", codes), array("ws", np.float32(0.25))]),
    ]


def test_a_dynamic_range_makes_a_sample_depend_on_its_batch(tmp_path: Path) -> None:
    feeds = [{"x": np.float32([[1, 1.04 + 0.01 * at, 2]])} for at in range(3)]
    feeds.append({"x": np.float32([[1, 1, 50]])})
    protos = dynamic_product()
    result = compared(tmp_path, *protos, feeds)
    batch = np.concatenate([f["x"] for f in feeds])
    apart = []
    for proto in protos:
        together = raw(proto, {"x": batch}, optimized=True)[0].astype(np.float64)
        alone = np.concatenate([raw(proto, f, optimized=True)[0] for f in feeds])
        apart.append(np.abs(together - alone))
    assert result.batch is not None
    assert (result.batch.samples, result.batch.padded) == (4, False)
    (found,) = result.batch.outputs
    assert found.float_max_abs_difference == pytest.approx(apart[0].max(), abs=1e-9)
    assert found.quantized_max_abs_difference == pytest.approx(apart[1].max())
    assert found.quantized_max_abs_difference > 0.1
    assert found.worst_sample == f"{int(apart[1].max(axis=1).argmax()):02}.npz"
    (warning,) = [w for w in result.warnings if "shares its batch" in w]
    assert "output y" in warning
    assert any(s.name == "x" and "run time" in s.reason for s in result.skipped)


def test_a_fixed_batch_or_lone_sample_says_why_there_is_no_batch_effect(tmp_path: Path) -> None:
    protos = dynamic_product()
    feeds = [{"x": floats((1, 3), s)} for s in range(2)]
    one = compared(tmp_path / "one", *protos, feeds[:1])
    assert one.batch is None
    (said,) = [s for s in one.skipped if s.name == "batch effect"]
    assert said.reason == "there is one sample"
    for proto in protos:
        for value in (*proto.graph.input, *proto.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 1
    fixed = compared(tmp_path / "fixed", *protos, feeds)
    (said,) = [s for s in fixed.skipped if s.name == "batch effect"]
    assert said.reason == "the first axis of f.onnx's input x is fixed to 1"
    static = compared(tmp_path / "static", *negation(["n", 3]), feeds)
    assert static.batch is None
    assert not [s for s in static.skipped if s.name == "batch effect"]


def test_a_first_axis_that_moves_the_float_model_as_well_is_no_batch(tmp_path: Path) -> None:
    """Sums along time, which comes first: behind another sample they begin elsewhere."""
    w = floats((4, 4), 1)
    nodes = [
        helper.make_node("CumSum", ["x", "axis"], ["c"], "sums"),
        helper.make_node("MatMul", ["c", "w"], ["y"], "product"),
    ]
    constants = [array("axis", np.int64(0)), array("w", w)]
    proto = model(nodes, [("x", ["time", 4])], [("y", ["time", 4])], constants)
    source, target = save(proto, tmp_path / "source.onnx"), tmp_path / "dynamic.onnx"
    quantize_dynamic(source, target)
    feeds = [{"x": floats((3, 4), seed)} for seed in range(3)]
    result = compared(tmp_path, proto, onnx.load(target), feeds)
    together = raw(proto, {"x": np.concatenate([f["x"] for f in feeds])})[0]
    alone = np.concatenate([raw(proto, f)[0] for f in feeds])
    moved = np.abs(together - alone).max()
    assert moved > 1
    assert result.batch is None
    assert not [w for w in result.warnings if "batch" in w]
    (said,) = [s for s in result.skipped if s.name == "batch effect"]
    assert said.reason == (
        f"in a batch output y of the float model itself moves by up to {moved:.2g}: "
        "the first axis is no batch"
    )
    assert "batch" not in headline(result)


@pytest.mark.slow
@needs_models
def test_sentences_in_a_padded_batch_differ_from_the_same_alone() -> None:
    folder = MODELS / "minilm-l6"
    float_model = load_model(folder / "model.onnx")
    feeds = load_feeds(folder / "inputs", float_model)
    result = compare_models(
        float_model, load_model(folder / "ort_dynamic.onnx"), feeds,
        measure_latency=False, explain_deployed=False,
    )  # fmt: skip
    assert result.batch is not None
    assert (result.batch.samples, result.batch.padded) == (24, True)
    (found,) = result.batch.outputs
    assert found.quantized_max_abs_difference == pytest.approx(0.031, abs=0.0005)
    assert found.float_max_abs_difference < 1e-6
    assert any("output embedding depends on what shares its batch" in w for w in result.warnings)


# -- what ships --------------------------------------------------------------------------------


@needs_models
def test_the_graph_transformer_behind_other_deployed_outputs_is_named() -> None:
    folder = MODELS / "mlperf-resnet8"
    float_model = load_model(folder / "model.onnx")
    feeds = load_feeds(folder / "inputs", float_model)
    result = compare_models(
        float_model, load_model(folder / "quantized.onnx"), feeds, measure_latency=False
    )
    (output,) = result.outputs
    assert output.deployed_differs
    assert output.deployed_max_steps is not None
    assert output.deployed_max_steps > 3
    assert output.deployed_cause
    # Without it, deployed and simulated agree: that is what the warning's remedy does.
    values = []
    for level, without in (("ORT_DISABLE_ALL", []), ("ORT_ENABLE_ALL", [output.deployed_cause])):
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        session = ort.InferenceSession(
            str(folder / "quantized.onnx"), options, disabled_optimizers=without
        )
        name = session.get_inputs()[0].name
        values.append([session.run(None, {name: next(iter(f.values()))})[0] for f in feeds])
    scale = next(a.scale for a in result.activations if a.is_output)
    assert isinstance(scale, float)
    assert np.abs(np.array(values[0], np.float64) - np.array(values[1])).max() <= 3 * scale * 1.001
    (warning,) = [w for w in result.warnings if "simulated and deployed" in w]
    assert f'disabled_optimizers=["{output.deployed_cause}"]' in warning


def test_an_execution_provider_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"NoSuchProvider.; it has .*CPUExecutionProvider"):
        compared(tmp_path, *negation([2]), [{"x": floats((2,))}], provider="NoSuchProvider")


def test_tensors_of_a_device_stand_beside_ours(tmp_path: Path) -> None:
    protos = negation([6])
    x = floats((6,), 7)
    dumped = fake(-x, 0.1) + 0.3
    dump = npz_folder(tmp_path / "dump", [{"y": dumped, "nonsense": dumped}])
    result = compared(tmp_path, *protos, [{"x": x}], actual=load_dump(dump, ["00.npz"]))
    (record,) = result.device
    assert record.verdict == "device"
    assert record.device_sqnr_db == pytest.approx(db(fake(-x, 0.1), dumped), abs=1e-3)
    assert record.total_sqnr_db == pytest.approx(db(-x, dumped), abs=1e-3)
    assert any(s.name == "nonsense" for s in result.skipped)
    codes = np.rint(fake(-x, 0.1) / 0.1).astype(np.int8)
    dump = npz_folder(tmp_path / "codes", [{"y_q": codes}])
    again = compared(tmp_path / "again", *protos, [{"x": x}], actual=load_dump(dump, ["00.npz"]))
    (record,) = again.device
    assert (record.name, record.device_name) == ("y", "y_q")
    assert record.device_sqnr_db > 120, "the same to float32's rounding"
    assert record.verdict == "quantization"


def test_a_dump_of_which_nothing_is_compared_is_refused(tmp_path: Path) -> None:
    dump = npz_folder(tmp_path / "dump", [{"Y2": floats((6,))}])
    with pytest.raises(FeedError) as caught:
        compared(
            tmp_path, *negation([6]), [{"x": floats((6,))}], actual=load_dump(dump, ["00.npz"])
        )
    assert "holds 1 tensor, none of which is compared here: Y2" in caught.value.message
    assert "nearest to the first one: " in caught.value.hint


# -- nothing is dropped ------------------------------------------------------------------------


def test_counts_add_up_and_pins_are_recorded(tmp_path: Path) -> None:
    pins = [Pin(float_name="y", quantized_name=None)]
    result = compared(tmp_path, *negation([4]), [{"x": floats((4,))}], pins=pins)
    assert result.pins == tuple(pins)
    counts = result.counts
    assert counts is not None
    assert (counts.matched, counts.fused, counts.unmatched, counts.float_tensors) == (1, 0, 1, 2)
    assert [u.name for u in result.unmatched if u.model == "float"] == ["y"]


def test_a_pin_to_a_tensor_of_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    float_proto = conv_relu_gemm()
    other = conv_relu_gemm()
    for node in other.graph.node:
        if node.name == "flatten":
            node.op_type = "Squeeze"
            node.input.append("axes")
    other.graph.initializer.append(array("axes", np.int64([2])))
    for node in other.graph.node:
        if node.name == "gemm":
            node.input[0] = "f2"
    other.graph.node.insert(4, helper.make_node("Flatten", ["f"], ["f2"], "again"))
    pins = [Pin(float_name="f", quantized_name="f")]
    with pytest.raises(ModelError) as caught:
        compared(tmp_path, float_proto, other, [{"x": floats((1, 3, 8, 8))}], pins=pins)
    reason = "shapes differ: float (1, 8), quantized (1, 8, 1)"
    assert caught.value.message == f"f cannot be compared with f: {reason}"


def test_a_pin_to_a_weight_that_another_one_has_as_well_is_told(tmp_path: Path) -> None:
    weights = [array(f"w{at}", floats((4, 4), at)) for at in (1, 2)]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], "one"),
        helper.make_node("MatMul", ["h", "w2"], ["y"], "two"),
    ]
    proto = model(nodes, [("x", [2, 4])], [("y", [2, 4])], weights)
    twin = onnx.ModelProto.FromString(proto.SerializeToString())
    twin.producer_name = "another"  # the same file twice is refused
    pins = [Pin(float_name="w1", quantized_name="w2")]
    result = compared(tmp_path, proto, twin, [{"x": floats((2, 4))}], pins=pins)
    told = "w2 is pinned to w1 and is compared with w2 as well: one of the matches is likely wrong"
    assert told in result.warnings
    mine, its = (floats((4, 4), at).astype(np.float64) for at in (1, 2))
    truth = 10 * math.log10(float((mine**2).sum() / ((mine - its) ** 2).sum()))
    found = {w.name: w.sqnr_db for w in result.weights}
    assert found == {"w1": pytest.approx(truth), "w2": math.inf}


PAIRS = [
    (folder.name, twin.stem)
    for folder in sorted(MODELS.glob("*"))
    if (folder / "model.onnx").exists()
    for twin in sorted(folder.glob("*.onnx"))
    if twin.name not in ("model.onnx", "gtcrn.onnx")
]


@needs_models
@pytest.mark.parametrize(
    ("folder", "twin"),
    [pytest.param(*p, marks=pytest.mark.slow if p[0] == "minilm-l6" else ()) for p in PAIRS],
)
def test_every_float_tensor_of_a_real_pair_is_accounted_for(folder: str, twin: str) -> None:
    float_model = load_model(MODELS / folder / "model.onnx")
    feeds = load_feeds(MODELS / folder / "inputs", float_model).subset([0])
    result = compare_models(
        float_model, load_model(MODELS / folder / f"{twin}.onnx"), feeds,
        measure_latency=False, explain_deployed=False,
    )  # fmt: skip
    counts = result.counts
    assert counts is not None
    assert counts.matched + counts.fused + counts.unmatched == counts.float_tensors
    floating = {i.name for i in float_model.inputs if i.dtype.startswith("float")}
    floating |= {
        name
        for name, info in float_model.tensor_infos.items()
        if info.dtype.startswith("float")
        and (name in float_model.producers or name in float_model.constant_names)
    }
    named = {a.name for a in result.activations} | {w.name for w in result.weights}
    lost = {u.name: u for u in result.unmatched if u.model == "float"}
    assert floating <= named | set(lost)
    assert not named & set(lost)
    fused = {n for n in floating & set(lost) if lost[n].fused_into}
    assert all(lost[n].fused_into in named for n in fused)
    assert all(lost[n].reason for n in lost)
    assert counts.float_tensors >= len(floating)
    assert counts.matched >= len(floating & named)
