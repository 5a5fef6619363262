"""Figures that are easily mistaken: of chains of Q and DQ, shared and folded weights, odd scales.

Each truth is computed in float64 from the integers in the file or from plain sessions.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from inspector.cli import main
from inspector.comparison import ActivationError, Comparison
from inspector.model import Model
from inspector.qparams import QParams
from inspector.render import accounting_text, comparison_json, comparison_text, find_headline
from inspector.states import likely_states
from inspector.stats import saturated_counts
from tests.known_pairs import IMAGES, Pair, activation_of, close, constants, db, weight_of
from tests.samples import array, floats, model, qdq_of, save

Arrays = dict[str, np.ndarray]
node = helper.make_node
ROWS = [{"x": floats((4, 8), s)} for s in range(3)]


def codes(weight: np.ndarray, top: int = 127) -> tuple[np.ndarray, np.float32]:
    """A weight in int8, symmetric, and its scale."""
    scale = np.float32(np.abs(weight).max() / top)
    return np.clip(np.rint(weight / scale), -top, top).astype(np.int8), scale


def stored(name: str, weight: np.ndarray, top: int = 127) -> tuple[Any, list[Any]]:
    """A DequantizeLinear that gives `<name>_d`, with its constants."""
    integers, scale = codes(weight, top)
    dq = node("DequantizeLinear", [f"{name}_q", f"{name}_s"], [f"{name}_d"], f"DQ_{name}")
    return dq, [array(f"{name}_q", integers), array(f"{name}_s", scale)]


def real(weight: np.ndarray, top: int = 127) -> np.ndarray:
    integers, scale = codes(weight, top)
    return integers.astype(np.float64) * float(scale)


def pair_of(
    folder: Path, first: onnx.ModelProto, second: onnx.ModelProto, feeds: list[Arrays]
) -> Pair:
    save(first, folder / "f.onnx")
    save(second, folder / "q.onnx")
    return Pair(folder=folder, feeds=feeds)


def rows(
    nodes: list[Any], values: list[Any], y: tuple[int, ...] = (4, 8), opset: int = 17
) -> onnx.ModelProto:
    return model(nodes, [("x", [4, 8])], [("y", y)], values, opset=opset)


# -- an embedding in front of an integer product -----------------------------------------------


def test_a_weight_behind_a_quantized_embedding_has_its_own_scale(tmp_path: Path) -> None:
    """ONNX Runtime multiplies by table scale * weight scale, both constant."""
    table, weight = floats((10, 8), 1), floats((8, 6), 2, 0.05)
    proto = model(
        [node("Gather", ["tab", "i"], ["e"], "take"), node("MatMul", ["e", "w"], ["h"], "mm"),
         node("Tanh", ["h"], ["y"], "tanh")],
        [("i", [2, 5])], [("y", [2, 5, 6])], [array("tab", table), array("w", weight)],
    )  # fmt: skip
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    feeds = [{"i": np.arange(10).reshape(2, 5)}]
    save(proto, tmp_path / "f.onnx")
    quantize_dynamic(tmp_path / "f.onnx", tmp_path / "q.onnx", weight_type=QuantType.QInt8)
    values = constants(onnx.load(tmp_path / "q.onnx"))
    result = Pair(folder=tmp_path, feeds=feeds).compared()
    for name, reference in (("w", weight), ("tab", table)):
        own = (values[f"{name}_quantized"].astype(np.float64) - values[f"{name}_zero_point"]) * (
            float(values[f"{name}_scale"])
        )
        assert weight_of(result, name).sqnr_db == close(db([reference], [own]))
        assert weight_of(result, name).sqnr_db > 35


# -- a rectifier that was folded before a Transpose --------------------------------------------


def test_a_rectifier_folded_behind_a_transpose_is_no_local_error(tmp_path: Path) -> None:
    weight = floats((4, 3, 3, 3), 1, 0.3)
    first = model(
        [node("Conv", ["x", "w"], ["a"], "conv"), node("Relu", ["a"], ["b"], "relu"),
         node("Transpose", ["b"], ["t"], "turn", perm=[0, 2, 3, 1]),
         node("Tanh", ["t"], ["y"], "tanh")],
        [("x", [1, 3, 8, 8])], [("y", None)], [array("w", weight)],
    )  # fmt: skip
    dq, values = stored("w", weight)
    more, parameters = qdq_of("t0", "t1", 0.02, -128)
    second = model(
        [dq, node("Conv", ["x", "w_d"], ["a0"], "c1"),
         node("Transpose", ["a0"], ["t0"], "t1", perm=[0, 2, 3, 1]), *more,
         node("Tanh", ["t1"], ["y"], "t2")],
        [("x", [1, 3, 8, 8])], [("y", None)], [*values, *parameters],
    )  # fmt: skip
    pair = pair_of(tmp_path, first, second, IMAGES)
    found = activation_of(pair.compared(), "t")
    before = [np.maximum(v, 0) for v in pair.tensor("q", "t0")]
    assert found.quantized_name == "t1"
    assert found.local_sqnr_db == close(db(before, pair.tensor("q", "t1")))


# -- pairs of Q and DQ in a row ----------------------------------------------------------------


def in_a_row(folder: Path, scales: tuple[float, float], between: str = "") -> Pair:
    """x is quantized twice before anything reads it; perhaps an Identity of its own between."""
    weight = floats((8, 8), 1)
    dq, values = stored("w", weight)
    one, a = qdq_of("x", "x1", scales[0], 0)
    two, b = qdq_of(between or "x1", "x2", scales[1], 3)
    middle = [node("Identity", ["x1"], [between], "same_q")] if between else []
    also = [node("Tanh", ["x1"], ["side"], "tanh")] if between else []
    second = rows(
        [dq, *one, *middle, *two, *also, node("MatMul", ["x2", "w_d"], ["m"], "mm"),
         node("Add", ["m", "side"], ["y"], "sum") if between else
         node("Identity", ["m"], ["y"], "end")],
        [*values, *a, *b],
    )  # fmt: skip
    start = [node("Identity", ["x"], ["d"], "same"), node("Tanh", ["x"], ["side"], "tanh")]
    first = rows(
        [*(start if between else []), node("MatMul", ["d" if between else "x", "w"], ["m"], "mm"),
         node("Add", ["m", "side"], ["y"], "sum") if between else
         node("Identity", ["m"], ["y"], "end")],
        [array("w", weight)],
    )  # fmt: skip
    return pair_of(folder, first, second, ROWS)


def clipped(values: list[np.ndarray], scale: float, zero: int) -> tuple[np.ndarray, np.ndarray]:
    x, step = np.stack(values), float(np.float32(scale))
    return x < (-128 - zero - 0.5) * step, x > (127 - zero + 0.5) * step


def check_clipping(found: ActivationError, *masks: tuple[np.ndarray, np.ndarray]) -> None:
    low = np.logical_or.reduce([m[0] for m in masks])
    high = np.logical_or.reduce([m[1] for m in masks])
    assert found.saturated_low_fraction == pytest.approx(low.mean(), abs=1e-12)
    assert found.saturated_high_fraction == pytest.approx(high.mean(), abs=1e-12)


@pytest.mark.parametrize("scales", [(0.005, 0.02), (0.02, 0.005), (0.01, 0.01)])
def test_what_any_q_of_a_chain_clips_is_counted(tmp_path: Path, scales: Any) -> None:
    pair = in_a_row(tmp_path, scales)
    found = activation_of(pair.compared(), "x")
    x, between, last = (pair.tensor("q", n) for n in ("x", "x1", "x2"))
    assert found.quantized_name == "x2"
    assert found.local_sqnr_db == close(db(x, last))
    check_clipping(found, clipped(x, scales[0], 0), clipped(between, scales[1], 3))
    assert found.saturated_fraction is not None
    assert found.saturated_fraction > 0.05
    ends = [((-128 - z) * float(np.float32(s)), (127 - z) * float(np.float32(s)))
            for s, z in zip(scales, (0, 3), strict=True)]  # fmt: skip
    limits = (found.representable_low, found.representable_high)
    assert limits == pytest.approx((max(e[0] for e in ends), min(e[1] for e in ends)))


def test_a_member_of_a_chain_is_judged_by_its_own_pair(tmp_path: Path) -> None:
    pair = in_a_row(tmp_path, (0.01, 0.2), "d2")
    result = pair.compared()
    own = activation_of(result, "d")
    assert own.quantized_name == "x2"
    assert own.local_sqnr_db == close(db(pair.tensor("q", "d2"), pair.tensor("q", "x2")))
    check_clipping(own, clipped(pair.tensor("q", "d2"), 0.2, 3))
    assert "instead" not in own.note
    assert "in float" not in own.note
    first = activation_of(result, "x")
    assert first.quantized_name == "x1"
    assert first.local_sqnr_db == close(db(pair.tensor("q", "x"), pair.tensor("q", "x1")))
    assert "instead" not in first.note


# -- several copies of one weight --------------------------------------------------------------


@pytest.mark.parametrize("coarse_first", [True, False])
def test_the_coarser_of_two_copies_of_a_shared_weight_is_shown(
    tmp_path: Path, coarse_first: bool
) -> None:
    weight = floats((8, 8), 1)
    first = rows(
        [node("MatMul", ["x", "w"], ["a"], "one"), node("Tanh", ["a"], ["t"], "tanh"),
         node("MatMul", ["t", "w"], ["y"], "two")], [array("w", weight)],
    )  # fmt: skip
    tops = (7, 127) if coarse_first else (127, 7)
    one, a = stored("w1", weight, tops[0])
    two, b = stored("w2", weight, tops[1])
    second = rows(
        [one, two, node("MatMul", ["x", "w1_d"], ["a"], "one"),
         node("Tanh", ["a"], ["t"], "tanh"), node("MatMul", ["t", "w2_d"], ["y"], "two")],
        [*a, *b],
    )  # fmt: skip
    result = pair_of(tmp_path, first, second, ROWS).compared()
    found = weight_of(result, "w")
    coarse, fine, reader = ("w1_q", "w2_q", "two") if coarse_first else ("w2_q", "w1_q", "one")
    assert (found.quantized_name, found.dtype) == (coarse, "int8")
    assert found.sqnr_db == close(db([weight], [real(weight, 7)]))
    assert found.note == (
        f"also stored as {fine} for {reader}: {db([weight], [real(weight)]):.1f} dB"
    )
    assert len([w for w in result.weights if w.name == "w"]) == 1


def test_one_constant_read_with_two_scales_is_judged_by_the_worse(tmp_path: Path) -> None:
    weight = floats((8, 8), 1)
    first = rows(
        [node("MatMul", ["x", "w"], ["a"], "one"), node("Tanh", ["a"], ["t"], "tanh"),
         node("MatMul", ["t", "w"], ["y"], "two")], [array("w", weight)],
    )  # fmt: skip
    dq, values = stored("w", weight)
    integers, scale = codes(weight)
    wrong = np.float32(scale * 1.1)
    second = rows(
        [dq, node("DequantizeLinear", ["w_q", "wrong"], ["w_e"], "DQ_2"),
         node("MatMul", ["x", "w_d"], ["a"], "one"), node("Tanh", ["a"], ["t"], "tanh"),
         node("MatMul", ["t", "w_e"], ["y"], "two")], [*values, array("wrong", wrong)],
    )  # fmt: skip
    found = weight_of(pair_of(tmp_path, first, second, ROWS).compared(), "w")
    assert found.node == "two"
    assert found.sqnr_db == close(db([weight], [integers.astype(np.float64) * float(wrong)]))
    assert "also stored as w_q for one" in found.note


# -- scales ------------------------------------------------------------------------------------


def test_a_negative_scale_turns_the_ends_round() -> None:
    qparams = QParams(scale=np.array(-0.5), zero_point=np.array(0), dtype="int8")
    # Codes -128..127 stand for 64 down to -63.5; half a step beyond is clipped.
    values = np.array([-70.0, -63.7, -63.0, 0.0, 64.0, 64.2, 65.0, 66.0])
    assert saturated_counts(values, qparams) == (1, 2)
    assert qparams.representable_range() == (-63.5, 64.0)


def judged_twice(folder: Path) -> Pair:
    """Q clips at 1.27, DQ spreads to 2.54, and Tanh reads the tensor before both."""
    weight = floats((8, 8), 1)
    dq, values = stored("w", weight)
    first = rows(
        [node("Sigmoid", ["x"], ["g"], "gate"), node("Mul", ["x", "g"], ["h"], "swish"),
         node("MatMul", ["h", "w"], ["m"], "mm"), node("Tanh", ["h"], ["t"], "tanh"),
         node("Add", ["m", "t"], ["y"], "sum")], [array("w", weight)],
    )  # fmt: skip
    second = rows(
        [dq, node("Sigmoid", ["x"], ["g"], "gate"), node("Mul", ["x", "g"], ["h"], "swish"),
         node("QuantizeLinear", ["h", "qs", "z"], ["hq"], "Q"),
         node("DequantizeLinear", ["hq", "ds", "z"], ["hd"], "DQ"),
         node("MatMul", ["hd", "w_d"], ["m"], "mm"), node("Tanh", ["h"], ["t"], "tanh"),
         node("Add", ["m", "t"], ["y"], "sum")],
        [*values, array("qs", np.float32(0.01)), array("ds", np.float32(0.02)),
         array("z", np.int8(0))],
    )  # fmt: skip
    return pair_of(folder, first, second, ROWS)


def test_clipping_is_what_qs_own_parameters_clip(tmp_path: Path) -> None:
    pair = judged_twice(tmp_path)
    found = activation_of(pair.compared(), "h")
    check_clipping(found, clipped(pair.tensor("q", "h"), 0.01, 0))
    assert found.saturated_high_fraction
    step = float(np.float32(0.01))
    limits = (found.representable_low, found.representable_high)
    assert limits == pytest.approx((-128 * step, 127 * step))
    assert found.local_sqnr_db == close(db(pair.tensor("q", "h"), pair.tensor("q", "hd")))
    assert "Q and DQ carry different scales (Q, DQ)" in found.note


def test_a_reader_of_the_float_tensor_beside_quantized_ones_is_named(tmp_path: Path) -> None:
    assert "tanh reads it in float" in activation_of(judged_twice(tmp_path).compared(), "h").note


# -- factors that went into a weight -----------------------------------------------------------


def test_the_alpha_and_beta_that_a_gemm_lost_are_in_its_weight_and_bias(tmp_path: Path) -> None:
    weight, bias = floats((5, 8), 1), floats((5,), 2)
    first = rows(
        [node("Gemm", ["x", "w", "b"], ["h"], "gemm", transB=1, alpha=2.0, beta=0.5),
         node("Tanh", ["h"], ["y"], "tanh")], [array("w", weight), array("b", bias)], (4, 5),
    )  # fmt: skip
    dq, values = stored("w", weight * 2)
    other, more = stored("b", bias / 2)
    second = rows(
        [dq, other, node("Gemm", ["x", "w_d", "b_d"], ["h"], "gemm", transB=1),
         node("Tanh", ["h"], ["y"], "tanh")], [*values, *more], (4, 5),
    )  # fmt: skip
    result = pair_of(tmp_path, first, second, ROWS).compared()
    found = weight_of(result, "w")
    assert found.sqnr_db == close(db([weight * 2.0], [real(weight * 2)]))
    assert "alpha 2 of gemm, which is 1 in the quantized model" in found.note
    assert weight_of(result, "b").sqnr_db == close(db([bias / 2.0], [real(bias / 2)]))


def test_a_scalar_that_became_the_bias_of_a_turned_gemm_is_compared(tmp_path: Path) -> None:
    weight = floats((5, 8), 1)
    first = rows(
        [node("Gemm", ["x", "w"], ["h"], "gemm", transB=1), node("Add", ["h", "k"], ["g"], "add"),
         node("Tanh", ["g"], ["y"], "tanh")],
        [array("w", weight), numpy_helper.from_array(np.array(0.3, np.float32), "k")], (4, 5),
    )  # fmt: skip
    dq, values = stored("w", weight)
    bias = np.full(5, 0.31, np.float32)
    second = rows(
        [dq, node("Gemm", ["x", "w_d", "bias"], ["h"], "gemm", transB=1),
         node("Tanh", ["h"], ["y"], "tanh")], [*values, array("bias", bias)], (4, 5),
    )  # fmt: skip
    result = pair_of(tmp_path, first, second, ROWS).compared()
    assert weight_of(result, "k").sqnr_db == close(db([np.full(5, np.float32(0.3))], [bias]))


def multiplied(folder: Path, factor: np.ndarray) -> tuple[Comparison, np.ndarray]:
    """A MatMul's weight took up what multiplies the product of it and another."""
    weight = floats((8, 8), 1)
    first = rows(
        [node("MatMul", ["x", "w"], ["m"], "mm"), node("MatMul", ["x", "v"], ["n"], "mn"),
         node("Mul", ["m", "n"], ["p"], "product"), node("Mul", ["p", "k"], ["q"], "scale"),
         node("Tanh", ["q"], ["y"], "tanh")],
        [array("w", weight), array("v", floats((8, 8), 2)), array("k", factor)],
    )  # fmt: skip
    dq, values = stored("w", weight * factor)
    other, more = stored("v", floats((8, 8), 2))
    second = rows(
        [dq, other, node("MatMul", ["x", "w_d"], ["m"], "mm"),
         node("MatMul", ["x", "v_d"], ["n"], "mn"), node("Mul", ["m", "n"], ["p"], "product"),
         node("Tanh", ["p"], ["y"], "tanh")], [*values, *more],
    )  # fmt: skip
    return pair_of(folder, first, second, ROWS).compared(), weight


def test_a_weight_that_took_up_a_factor_says_so(tmp_path: Path) -> None:
    result, weight = multiplied(tmp_path, np.float32([0.125]))
    found = weight_of(result, "w")
    actual = real(weight * np.float32(0.125))
    assert found.sqnr_db == close(db([weight], [actual])), "the figure itself stays"
    wide = weight.astype(np.float64)
    gain = float((wide * actual).sum() / (wide * wide).sum())
    assert found.note == (
        f"{gain:.4g} times the float weight: a factor was folded into it "
        f"({db([wide * gain], [actual]):.1f} dB after that)"
    )


def test_a_weight_whose_channels_took_up_factors_says_so(tmp_path: Path) -> None:
    factor = np.linspace(0.1, 0.4, 8, dtype=np.float32)
    result, _ = multiplied(tmp_path, factor)
    note = weight_of(result, "w").note
    assert note.startswith("each channel is the float one times 0.1")
    assert "factors were folded into it" in note


def test_a_weight_that_is_merely_broken_is_called_no_multiple(tmp_path: Path) -> None:
    weight = floats((8, 8), 1)
    first = rows([node("MatMul", ["x", "w"], ["y"], "mm")], [array("w", weight)])
    dq, values = stored("w", floats((8, 8), 7))
    second = rows([dq, node("MatMul", ["x", "w_d"], ["y"], "mm")], values)
    found = weight_of(pair_of(tmp_path, first, second, ROWS).compared(), "w")
    assert found.sqnr_db < 3
    assert "times" not in found.note


# -- bodies ------------------------------------------------------------------------------------


def nested(weight: np.ndarray, quantized: bool) -> onnx.ModelProto:
    """An If in an If reads a weight of the main graph, behind a DQ there in the quantized model."""

    def body(name: str, nodes: list[Any], output: str) -> onnx.GraphProto:
        info = helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)
        return helper.make_graph(nodes, name, [], [info])

    inner = body("i", [node("MatMul", ["h", "w_d" if quantized else "w"], ["it"], "mm")], "it")
    other = body("o", [node("Identity", ["h"], ["ie"], "same")], "ie")
    outer = body("t", [node("If", ["c"], ["t"], "in", then_branch=inner, else_branch=other)], "t")
    plain = body("e", [node("Tanh", ["h"], ["e"], "tanh")], "e")
    dq, values = stored("w", weight)
    if not quantized:
        values = [array("w", weight)]
    return rows(
        [*([dq] if quantized else []), node("Sigmoid", ["x"], ["h"], "gate"),
         node("ReduceSum", ["h"], ["s"], "total", keepdims=0),
         node("Greater", ["s", "zero"], ["c"], "more"),
         node("If", ["c"], ["y"], "out", then_branch=outer, else_branch=plain)],
        [*values, numpy_helper.from_array(np.array(0, np.float32), "zero")],
    )  # fmt: skip


def test_a_weight_that_a_nested_body_reads_from_outside_is_compared(tmp_path: Path) -> None:
    weight = floats((8, 8), 1)
    result = pair_of(tmp_path, nested(weight, False), nested(weight, True), ROWS).compared()
    found = weight_of(result, "w")
    assert found.quantized_name == "w_q"
    assert found.sqnr_db == close(db([weight], [real(weight)]))
    assert not [u for u in result.unmatched if u.name in ("w", "w_q")]


# -- sessions and states -----------------------------------------------------------------------


def test_an_input_that_is_also_an_output_is_no_state() -> None:
    nodes = [node("Tanh", ["x"], ["y"], "tanh")]
    proto = model(nodes, [("x", [2])], [("y", [2]), ("x", [2])])
    assert likely_states(Model(proto)) == ()


def test_a_model_that_runs_only_without_optimisations_is_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runtime rounds the float bias with an operator that opset 10 does not have."""
    weight, bias = floats((4, 3, 3, 3), 1, 0.3), floats((4,), 2)
    dq, values = stored("w", weight)
    one, a = qdq_of("x", "x1", 0.03, 0)
    two, b = qdq_of("a", "y", 0.05, 0)
    zero = array("w_z", np.int8(0))
    dq.input.append("w_z")
    second = model(
        [dq, *one, node("Conv", ["x1", "w_d", "b"], ["a"], "conv"), *two],
        [("x", [1, 3, 8, 8])], [("y", [1, 4, 6, 6])],
        [*values, *a, *b, zero, array("b", bias)], opset=10,
    )  # fmt: skip
    first = model(
        [node("Conv", ["x", "w", "b"], ["y"], "conv")], [("x", [1, 3, 8, 8])],
        [("y", [1, 4, 6, 6])], [array("w", weight), array("b", bias)], opset=10,
    )  # fmt: skip
    with pytest.raises(Exception, match="Round"):
        ort.InferenceSession(second.SerializeToString())
    pair = pair_of(tmp_path, first, second, IMAGES)
    result = pair.compared(measure_latency=True)
    (output,) = result.outputs
    assert output.sqnr_db == close(db(pair.tensor("f", "y"), pair.tensor("q", "y")))
    assert math.isnan(output.deployed_sqnr_db)
    assert not output.deployed_differs
    assert result.latency is None
    (skipped,) = [s for s in result.skipped if s.name == "deployed figures"]
    assert skipped.model == "quantized"
    assert "ONNX Runtime" in skipped.reason
    found = find_headline(result)
    assert found.severity == "problem"
    assert re.fullmatch(
        r"Output y \d\d\.\d dB, but deployed figures are unknown: the quantized model cannot be "
        "opened with optimisations on",
        found.sentence,
    )
    text = comparison_text(result)
    assert "NaN" not in text
    (line,) = [x for x in text.splitlines() if x.startswith("  y  ") and "#" in x][:1]
    assert line.endswith("–")
    assert comparison_json(result)["outputs"][0]["deployed_sqnr_db"] == "NaN"
    files = [str(tmp_path / "f.onnx"), str(tmp_path / "q.onnx")]
    words = ["compare", *files, "--random", "1", "--fail-under", "20"]
    assert main(words) == 1
    assert "gate failed: deployed figures are unknown: the quantized" in capsys.readouterr().err
    assert main([*words, "--simulated"]) == 0


def looped(stored_weight: bool) -> onnx.ModelProto:
    """y = tanh(x w) three times; `w` lies in the loop, as it is or as integers."""
    weight = floats((6, 6), 1, 0.3)
    dq, values = stored("w", weight)
    operand = "w_d" if stored_weight else "w"
    body = helper.make_graph(
        [*([dq] if stored_weight else []), node("MatMul", ["s", operand], ["m"], "mm"),
         node("Tanh", ["m"], ["t"], "tanh"), node("Identity", ["go"], ["on"], "id")],
        "body",
        [helper.make_tensor_value_info(n, t, d) for n, t, d in (
            ("at", onnx.TensorProto.INT64, []), ("go", onnx.TensorProto.BOOL, []),
            ("s", onnx.TensorProto.FLOAT, [1, 6]))],
        [helper.make_tensor_value_info(n, t, d) for n, t, d in (
            ("on", onnx.TensorProto.BOOL, []), ("t", onnx.TensorProto.FLOAT, [1, 6]))],
        values if stored_weight else [array("w", weight)],
    )  # fmt: skip
    return model(
        [helper.make_node("Loop", ["n", "yes", "x"], ["l"], "loop", body=body),
         node("Sigmoid", ["l"], ["y"], "sg")],
        [("x", [1, 6])], [("y", [1, 6])],
        [numpy_helper.from_array(np.array(v), n) for n, v in (("n", 3), ("yes", True))],
    )  # fmt: skip


def test_weights_inside_bodies_are_counted_apart(tmp_path: Path) -> None:
    feeds = [{"x": floats((1, 6), seed)} for seed in range(2)]
    result = pair_of(tmp_path, looped(False), looped(True), feeds).compared()
    (weight,) = result.weights
    assert (weight.name, weight.in_body) == ("w", True)
    assert accounting_text(result) == (
        "3 float tensors: 3 matched (0 weights, 3 activations; 3 by name; 1 more weight inside "
        "bodies), 0 fused, 0 unmatched"
    )


# -- steps that are spelled in another way, and factors that moved -----------------------------


def test_a_step_spelled_in_another_way_is_not_taken_for_folded(tmp_path: Path) -> None:
    """Sub of c in the float file, Add of -c in the other: `h` is compared before it, `g` behind."""
    weight, c = floats((8, 8), 1, 0.3), floats((8,), 2)
    first = rows(
        [node("MatMul", ["x", "w"], ["h"], "mm"), node("Sub", ["h", "c"], ["g"], "sub"),
         node("Tanh", ["g"], ["y"], "tanh")],
        [array("w", weight), array("c", c)],
    )  # fmt: skip
    dq, values = stored("w", weight)
    second = rows(
        [dq, node("MatMul", ["x", "w_d"], ["r0"], "n0"), node("Add", ["r0", "n"], ["r1"], "n1"),
         node("Tanh", ["r1"], ["y"], "n2")],
        [*values, array("n", -c)],
    )  # fmt: skip
    pair = pair_of(tmp_path, first, second, ROWS)
    result = pair.compared()
    behind = db(pair.tensor("f", "g"), pair.tensor("q", "r1"))
    for record in result.activations:
        if record.name in ("h", "g"):
            truth = db(pair.tensor("f", record.name), pair.tensor("q", record.quantized_name))
            assert record.accumulated_sqnr_db == close(truth)
            assert record.accumulated_sqnr_db > behind - 15
    assert weight_of(result, "w").sqnr_db == close(db([weight], [real(weight)]))


def test_one_quantized_tensor_is_the_twin_of_one_float_tensor(tmp_path: Path) -> None:
    """A factor in front of a MatMul went into its weight: the input itself is not scaled."""
    weight = floats((8, 8), 1, 0.3)
    first = rows(
        [node("Mul", ["x", "k"], ["xn"], "scale"), node("MatMul", ["xn", "w"], ["h"], "mm"),
         node("Tanh", ["h"], ["y"], "tanh")],
        [array("w", weight), array("k", np.float32(1 / 255))],
    )  # fmt: skip
    dq, values = stored("w", weight / np.float32(255))
    second = rows(
        [dq, node("MatMul", ["x", "w_d"], ["h2"], "m2"), node("Tanh", ["h2"], ["y"], "t2")], values
    )
    pair = pair_of(tmp_path, first, second, ROWS)
    result = pair.compared()
    compared = {a.name: a for a in result.activations}
    assert "xn" not in compared
    assert any(u.name == "xn" for u in result.unmatched)
    assert compared["h"].accumulated_sqnr_db == close(
        db(pair.tensor("f", "h"), pair.tensor("q", "h2"))
    )
    assert "times the float weight" in weight_of(result, "w").note


@pytest.mark.parametrize(
    ("op", "one", "other"),
    [
        ("HardSigmoid", {"alpha": 0.2}, {"alpha": 0.5}),
        ("Selu", {"gamma": 1.05}, {"gamma": 2.0}),
        ("ThresholdedRelu", {"alpha": 0.5}, {"alpha": 1.5}),
    ],
)
def test_branches_that_differ_in_a_setting_alone_are_told_apart(
    tmp_path: Path, op: str, one: dict[str, float], other: dict[str, float]
) -> None:
    def made(names: list[str], settings: list[dict[str, float]]) -> onnx.ModelProto:
        nodes = [node(op, ["x"], [n], f"n_{n}", **s) for n, s in zip(names, settings, strict=True)]
        nodes.append(node("Add", names, ["s"], "sum"))
        return rows([*nodes, node("Tanh", ["s"], ["y"], "tanh")], [])

    pair = pair_of(tmp_path, made(["a", "b"], [one, other]), made(["p", "q"], [other, one]), ROWS)
    result = pair.compared()
    assert {a.name: a.quantized_name for a in result.activations if a.name in "ab"} == {
        "a": "q", "b": "p",
    }  # fmt: skip
    assert activation_of(result, "a").accumulated_sqnr_db == math.inf
