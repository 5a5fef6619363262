"""Each rule on a pair made to trigger it, and on a near miss; figures against plain sessions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic

from inspector.activation_rules import ACTIVATION_RULES
from inspector.comparison import Comparison, Latency
from inspector.findings import LOOK, NOTE, PROBLEM, SEVERITIES, Case, Finding
from inspector.matching import match_tensors
from inspector.model_files import load_model
from tests.known_pairs import (
    IMAGES,
    Arrays,
    Pair,
    activation_of,
    by_hand,
    close,
    constants,
    db,
    rewritten,
    static,
)
from tests.samples import (
    array,
    boxes_and_scores_in_one_concat,
    conv_relu_gemm,
    floats,
    model,
    qdq_of,
    save,
)

Change = Callable[[Comparison], Comparison]


def case_of(
    pair: Pair,
    *,
    recipe: dict[str, Any] | None = None,
    change: Change = lambda c: c,
    **options: Any,
) -> Case:
    comparison = change(pair.compared(**options))
    models = load_model(pair.folder / "f.onnx"), load_model(pair.folder / "q.onnx")
    return Case(
        comparison=comparison, float_model=models[0], quantized_model=models[1],
        matching=match_tensors(*models), recipe=recipe,
    )  # fmt: skip


def found(case: Case, code: str) -> list[Finding]:
    """What a rule finds; every finding of every rule has to keep the contract."""
    findings = {name: list(rule(case)) for name, rule in ACTIVATION_RULES.items()}
    for name, each in findings.items():
        for finding in each:
            assert finding.code == name
            assert finding.severity in SEVERITIES
            assert finding.node in {"", *case.float_model.node_by_name}
            assert set(finding.remedy.exclude) <= set(case.float_model.node_by_name)
            assert finding.sentence.endswith(".")
            assert finding.remedy.say.endswith(".")
            finding.to_json()
    return findings[code]


def one(case: Case, code: str) -> Finding:
    (finding,) = found(case, code)
    return finding


# -- one scale for unlike branches -------------------------------------------------------------

PICTURES = [{"x": floats((1, 3, 6, 6), s)} for s in range(3)]


def test_scores_beside_boxes_in_one_concat_are_drowned(tmp_path: Path) -> None:
    pair = static(tmp_path, boxes_and_scores_in_one_concat(), PICTURES)
    finding = one(case_of(pair), "concat-shared-scale")
    truth = [[v[:, 4:] for v in pair.tensor(file, "y")] for file in ("f", "q")]
    assert (finding.node, finding.tensor, finding.severity) == ("join", "y", LOOK)
    evidence = finding.evidence
    assert evidence["part"] == "scores"
    assert (evidence["first_channel"], evidence["last_channel"]) == (4, 6)
    assert evidence["part_sqnr_db"] == close(db(*truth))
    assert evidence["part_absmax"] == pytest.approx(max(v.max() for v in truth[0]))
    assert evidence["part_steps"] < 1
    assert evidence["part_sqnr_before_db"] > 30
    assert finding.remedy.exclude == ("join",)
    assert "scores" in finding.sentence


def alike() -> onnx.ModelProto:
    proto = boxes_and_scores_in_one_concat()
    proto.graph.initializer[2].CopyFrom(array("gain", np.float32(1.0)))
    return proto


def test_a_concat_of_like_branches_is_left_alone(tmp_path: Path) -> None:
    case = case_of(static(tmp_path, alike(), PICTURES))
    assert len(activation_of(case.comparison, "y").slices) == 2
    assert found(case, "concat-shared-scale") == []


def graded(folder: Path, gain: float, scores: float | None) -> Pair:
    """Boxes times `gain`, scores with a range of their own, or with that of the Concat."""
    proto = boxes_and_scores_in_one_concat()
    proto.graph.initializer[2].CopyFrom(array("gain", np.float32(gain)))
    override: dict[str, Any] = {
        "scores": [{"rmin": np.float32(0), "rmax": np.float32(scores or 1)}]
    }
    pair = static(folder, proto, PICTURES, extra_options={"TensorQuantOverrides": override})
    if scores is None:

        def share(graph: onnx.GraphProto) -> None:
            own = {i.name: i for i in graph.initializer}
            for part in ("scale", "zero_point"):
                values = numpy_helper.to_array(own[f"y_{part}"])
                own[f"scores_{part}"].CopyFrom(array(f"scores_{part}", values))

        rewritten(pair, share)
    return pair


def test_a_part_that_was_drowned_before_the_concat_does_not_accuse_it(tmp_path: Path) -> None:
    case = case_of(graded(tmp_path, 10, 250))
    record = activation_of(case.comparison, "y")
    part = record.slices[1]
    assert part.sqnr_db < 10
    assert activation_of(case.comparison, "scores").accumulated_sqnr_db < part.sqnr_db + 3
    assert found(case, "concat-shared-scale") == []


def test_a_part_that_was_given_the_concats_scale_accuses_it(tmp_path: Path) -> None:
    """Runtimes that want one scale for all inputs and the output."""
    case = case_of(graded(tmp_path, 300, None))
    assert activation_of(case.comparison, "scores").accumulated_sqnr_db < 1
    assert one(case, "concat-shared-scale").evidence["part"] == "scores"


def test_what_is_quantized_behind_a_concat_is_left_in_float_up_to_the_next_weights(
    tmp_path: Path,
) -> None:
    proto = boxes_and_scores_in_one_concat()
    graph = proto.graph
    del graph.output[:]
    graph.node[-1].output[0] = "j"
    graph.node.extend(
        [
            helper.make_node("Mul", ["j", "two"], ["t"], "twice"),
            helper.make_node("Conv", ["t", "w3"], ["y"], "mix"),
            helper.make_node("Mul", ["y", "two"], ["z"], "after"),
        ]
    )
    graph.initializer.extend([array("two", np.float32(2)), array("w3", floats((2, 7, 1, 1), 5))])
    graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 2, 6, 6]))
    finding = one(case_of(static(tmp_path, proto, PICTURES)), "concat-shared-scale")
    assert finding.remedy.exclude == ("join", "twice")


# -- NaN and infinity --------------------------------------------------------------------------


def root(bad: float, folder: Path) -> Pair:
    """y = -sqrt(x), quantized; a negative element makes NaN in the float model."""
    proto = model(
        [
            helper.make_node("Sqrt", ["x"], ["s"], "root"),
            helper.make_node("Neg", ["s"], ["y"], "n"),
        ],
        [("x", [3])], [("y", [3])],
    )  # fmt: skip
    feeds = [{"x": np.float32([0.5, 1, 4])}, {"x": np.float32([0.5, bad, 4])}]
    return static(folder, proto, feeds, calibration=feeds[:1], op_types_to_quantize=["Neg"])


def test_nan_is_told_where_it_begins(tmp_path: Path) -> None:
    finding = one(case_of(root(-1.0, tmp_path)), "nan")
    assert (finding.node, finding.tensor, finding.severity) == ("root", "s", PROBLEM)
    assert (finding.evidence["model"], finding.evidence["nan_values"]) == ("float", 1)
    assert finding.evidence["first_sample"] == "01.npz"
    assert finding.evidence["outputs"] == ["y"]


def test_finite_values_are_not_told(tmp_path: Path) -> None:
    assert found(case_of(root(1.0, tmp_path)), "nan") == []


def normalized(spread: float, folder: Path, way: str = "Sqrt") -> Pair:
    """y = x / sqrt(mean(x^2)) in parts; the samples differ by `spread`."""
    parts = {
        "Sqrt": [("Sqrt", ["m"], "d", "root"), ("Div", ["x", "d"], "y", "div")],
        "Pow": [("Pow", ["m", "half"], "d", "root"), ("Div", ["x", "d"], "y", "div")],
        "Reciprocal": [
            ("Sqrt", ["m"], "d", "root"), ("Reciprocal", ["d"], "r", "inverse"),
            ("Mul", ["x", "r"], "y", "product"),
        ],
        "negative Pow": [
            ("Pow", ["m", "minus"], "r", "inverse"), ("Mul", ["x", "r"], "y", "product"),
        ],
        "divided square": [
            ("Pow", ["m", "two"], "r", "squared"), ("Div", ["x", "r"], "y", "div"),
        ],
        "square": [("Pow", ["m", "two"], "r", "squared"), ("Sub", ["x", "r"], "y", "less")],
    }[way]  # fmt: skip
    constants_of = {"half": 0.5, "minus": -0.5, "two": 2.0}
    proto = model(
        [
            helper.make_node("Mul", ["x", "x"], ["sq"], "square"),
            helper.make_node("ReduceMean", ["sq"], ["m"], "mean", axes=[1]),
            *(helper.make_node(kind, given, [made], name) for kind, given, made, name in parts),
        ],
        [("x", [1, 16])], [("y", [1, 16])],
        [array(n, np.float32(v)) for n, v in constants_of.items() if any(n in p[1] for p in parts)],
    )  # fmt: skip
    feeds = [{"x": floats((1, 16), 1)}, {"x": floats((1, 16), 2, spread)}]
    kinds = ["Mul", "ReduceMean", *(p[0] for p in parts)]
    return static(
        folder, proto, feeds, op_types_to_quantize=kinds, activation_type=QuantType.QUInt8,
    )  # fmt: skip


def test_infinity_of_the_quantized_model_alone_is_told_at_the_float_models_node(
    tmp_path: Path,
) -> None:
    finding = one(case_of(normalized(1e-4, tmp_path)), "nan")
    assert (finding.node, finding.tensor, finding.severity) == ("div", "y", PROBLEM)
    assert finding.evidence["model"] == "quantized"
    assert finding.remedy.exclude == ("div",)


# -- divisors ----------------------------------------------------------------------------------


def test_a_divisor_that_rounds_to_zero_is_named_with_its_chain(tmp_path: Path) -> None:
    pair = normalized(1e-4, tmp_path)
    findings = found(case_of(pair), "divisor-zero")
    assert [(f.node, f.tensor) for f in findings] == [("div", "m"), ("div", "d")]
    smallest = min(v.min() for v in pair.tensor("f", "d"))
    assert findings[1].evidence["smallest_absolute"] == pytest.approx(smallest)
    assert smallest < findings[1].evidence["scale"] / 2
    # The quantized divisor really is 0.
    assert min(v.min() for v in pair.tensor("q", "d_DequantizeLinear_Output")) == 0
    assert findings[0].remedy.exclude == ("square", "mean", "root", "div")


@pytest.mark.parametrize(("way", "chain"), [
    ("Pow", ("square", "mean", "root", "div")),
    ("Reciprocal", ("square", "mean", "root", "inverse", "product")),
    ("negative Pow", ("square", "mean", "inverse")),
    ("divided square", ("square", "mean", "squared", "div")),
])  # fmt: skip
def test_other_ways_to_divide_are_known(tmp_path: Path, way: str, chain: tuple[str, ...]) -> None:
    finding = found(case_of(normalized(1e-4, tmp_path, way)), "divisor-zero")[0]
    assert finding.tensor == "m"
    assert finding.remedy.exclude == chain


def test_a_mean_by_a_product_leads_on_to_the_square(tmp_path: Path) -> None:
    """Exporters write the sum times 1 / n; the square is in front of that."""
    proto = model(
        [
            helper.make_node("Mul", ["x", "x"], ["sq"], "square"),
            helper.make_node("ReduceSum", ["sq", "axes"], ["s"], "sum"),
            helper.make_node("Mul", ["s", "share"], ["m"], "mean"),
            helper.make_node("Sqrt", ["m"], ["d"], "root"),
            helper.make_node("Div", ["x", "d"], ["y"], "div"),
        ],
        [("x", [1, 16])], [("y", [1, 16])],
        [array("axes", np.array([1])), array("share", np.float32(1 / 16))],
    )  # fmt: skip
    feeds = [{"x": floats((1, 16), 1)}, {"x": floats((1, 16), 2, 1e-4)}]
    kinds = ["Mul", "ReduceSum", "Sqrt", "Div"]
    pair = static(
        tmp_path, proto, feeds, op_types_to_quantize=kinds, activation_type=QuantType.QUInt8
    )
    finding = found(case_of(pair), "divisor-zero")[-1]
    assert finding.tensor == "d"
    assert finding.remedy.exclude == ("square", "sum", "mean", "root", "div")


def test_a_square_is_no_division(tmp_path: Path) -> None:
    assert found(case_of(normalized(1e-4, tmp_path, "square")), "divisor-zero") == []


def test_a_divisor_well_above_a_step_is_left_alone(tmp_path: Path) -> None:
    assert found(case_of(normalized(0.5, tmp_path)), "divisor-zero") == []


# -- ranges ------------------------------------------------------------------------------------


def louder(folder: Path, times: float) -> Pair:
    """Calibrated on quiet samples, compared on others `times` as loud."""
    quiet = [{"x": v["x"] / np.float32(times)} for v in IMAGES]
    return static(folder, conv_relu_gemm(), IMAGES, calibration=quiet)


def test_values_beyond_the_calibrated_range_are_clipped(tmp_path: Path) -> None:
    pair = louder(tmp_path, 4)
    case = case_of(pair, recipe={"format": "qdq"})
    finding = one(case, "clipped")
    # Many tensors are: one finding about the model.
    assert finding.node == ""
    tensors = finding.evidence["tensors"]
    assert len(tensors) > 3
    assert finding.tensor == tensors[0]
    assert {o["tensor"] for o in finding.remedy.overrides} == set(tensors)
    given = next(o for o in finding.remedy.overrides if o["tensor"] == "x")
    values = np.concatenate(pair.tensor("f", "x"))
    assert (given["low"], given["high"]) == pytest.approx((values.min(), values.max()))
    record = activation_of(case.comparison, finding.tensor)
    own = constants(onnx.load(tmp_path / "q.onnx"))
    zero = int(own[f"{record.name}_zero_point"])
    ends = [(c - zero) * float(own[f"{record.name}_scale"]) for c in (-128.5, 127.5)]
    before = np.concatenate([v.ravel() for v in pair.tensor("f", record.name)])
    share = np.mean((before < ends[0]) | (before > ends[1]))
    assert finding.evidence["saturated_fraction"] == pytest.approx(share, abs=0.02)


def test_a_single_clipped_tensor_is_told_at_its_node(tmp_path: Path) -> None:
    override = {"c": [{"rmin": np.float32(-0.5), "rmax": np.float32(0.5)}]}
    proto = conv_relu_gemm()
    proto.graph.node[1].op_type = "Tanh"
    pair = static(tmp_path, proto, IMAGES, extra_options={"TensorQuantOverrides": override})
    finding = one(case_of(pair, recipe={"format": "qdq"}), "clipped")
    assert (finding.node, finding.tensor, finding.severity) == ("conv", "c", LOOK)
    before = np.concatenate([v.ravel() for v in pair.tensor("q", "c")])
    scale = float(constants(onnx.load(tmp_path / "q.onnx"))["c_scale"])
    after = np.concatenate([v.ravel() for v in pair.tensor("q", "c_DequantizeLinear_Output")])
    rms = math.sqrt(np.mean((before - after) ** 2)) / scale
    assert finding.evidence["local_error_steps"] == pytest.approx(rms, rel=0.02)
    assert finding.evidence["saturated_fraction"] == pytest.approx(
        np.mean(np.abs(before) > 0.5 + scale / 2), abs=0.01
    )


def test_the_local_error_in_steps_is_told_apart_from_what_came_in(tmp_path: Path) -> None:
    """A coarse input adds to the accumulated error, not to the local one."""
    override = {
        name: [{"rmin": np.float32(-own), "rmax": np.float32(own)}]
        for name, own in (("x", 250), ("c", 2))
    }
    proto = conv_relu_gemm()
    proto.graph.node[1].op_type = "Tanh"
    pair = static(tmp_path, proto, IMAGES, extra_options={"TensorQuantOverrides": override})
    case = case_of(pair)
    record = activation_of(case.comparison, "c")
    assert record.local_sqnr_db is not None
    assert record.local_sqnr_db > record.accumulated_sqnr_db + 2
    finding = next(f for f in found(case, "clipped") if f.tensor == "c")
    before, after = (
        np.concatenate(pair.tensor("q", n)) for n in ("c", "c_DequantizeLinear_Output")
    )
    scale = float(constants(onnx.load(tmp_path / "q.onnx"))["c_scale"])
    rms = math.sqrt(np.mean((before - after) ** 2)) / scale
    assert finding.evidence["local_error_steps"] == pytest.approx(rms, rel=0.04)


def test_a_fitting_range_clips_nothing(tmp_path: Path) -> None:
    assert found(case_of(louder(tmp_path, 1)), "clipped") == []


def test_an_error_from_upstream_that_is_clipped_accuses_no_range(tmp_path: Path) -> None:
    case = case_of(spoilt(tmp_path, 60))
    record = activation_of(case.comparison, "c")
    assert record.saturated_fraction is not None
    assert record.saturated_fraction > 0.001
    assert found(case, "clipped") == []


def test_a_range_four_times_too_wide_is_told(tmp_path: Path) -> None:
    override = {"c": [{"rmin": np.float32(-40), "rmax": np.float32(40)}]}
    proto = conv_relu_gemm()
    proto.graph.node[1].op_type = "Tanh"
    pair = static(tmp_path, proto, IMAGES, extra_options={"TensorQuantOverrides": override})
    finding = one(case_of(pair), "too-wide")
    values = np.concatenate([v.ravel() for v in pair.tensor("f", "c")])
    assert (finding.node, finding.tensor) == ("conv", "c")
    assert finding.evidence["cover_fraction"] == pytest.approx(np.ptp(values) / 80, rel=0.01)


def test_a_third_of_a_range_is_not_too_wide(tmp_path: Path) -> None:
    """Few large values and many small ones, so that the local SQNR is low all the same."""
    feeds = [{"x": v["x"] * np.float32(0.01)} for v in IMAGES]
    feeds[0]["x"][0, :, 0, 0] = 3
    override = {"c": [{"rmin": np.float32(-5), "rmax": np.float32(5)}]}
    proto = conv_relu_gemm()
    proto.graph.node[1].op_type = "Tanh"
    pair = static(tmp_path, proto, feeds, extra_options={"TensorQuantOverrides": override})
    case = case_of(pair)
    record = activation_of(case.comparison, "c")
    assert record.local_sqnr_db is not None
    assert record.local_sqnr_db < 30
    assert 0.25 < (record.observed_high - record.observed_low) / 10 < 0.8
    assert found(case, "too-wide") == []


def test_pinned_and_shared_ranges_are_not_too_wide(tmp_path: Path) -> None:
    """A Softmax over many classes is pinned to [0, 1], and a pool keeps the scale it reads."""
    proto = model(
        [
            helper.make_node("Softmax", ["x"], ["s"], "softmax"),
            helper.make_node("MaxPool", ["s"], ["m"], "pool", kernel_shape=[1]),
            helper.make_node("Neg", ["m"], ["y"], "negated"),
        ],
        [("x", [1, 1, 64])], [("y", [1, 1, 64])],
    )  # fmt: skip
    case = case_of(static(tmp_path, proto, [{"x": floats((1, 1, 64), s, 0.5)} for s in range(2)]))
    for name in "sm":
        record = activation_of(case.comparison, name)
        assert record.observed_high < 0.25 * (record.representable_high or 0)
        assert record.local_sqnr_db is not None
    assert activation_of(case.comparison, "s").local_sqnr_db < 30
    assert found(case, "too-wide") == []


# -- deployed against simulated ----------------------------------------------------------------


def deployed(pair: Pair, sqnr: float, **changes: Any) -> Case:
    """A real comparison whose deployed run is said to differ."""

    def change(comparison: Comparison) -> Comparison:
        (output,) = comparison.outputs
        other = replace(output, deployed_sqnr_db=output.sqnr_db - sqnr, **changes)
        return replace(comparison, outputs=(other,))

    return case_of(pair, change=change)


def test_an_output_that_differs_as_deployed_is_told_with_the_transformer(tmp_path: Path) -> None:
    pair = static(tmp_path, conv_relu_gemm(), IMAGES)
    same = case_of(pair)
    assert found(same, "kernel-differs") == []
    case = deployed(
        pair, 35, deployed_differs=True, deployed_max_steps=9.0, deployed_cause="QDQS8ToU8"
    )
    finding = one(case, "kernel-differs")
    assert (finding.tensor, finding.severity) == ("y", PROBLEM)
    assert finding.evidence["difference_steps"] == 9
    assert 'disabled_optimizers=["QDQS8ToU8"]' in finding.remedy.say
    assert one(deployed(pair, 0.5, deployed_differs=True), "kernel-differs").severity == NOTE
    # Below 30 dB it is no more than that where less than 1 dB is lost, either way.
    poor = one(deployed(pair, 35, deployed_differs=True), "kernel-differs").evidence
    for lost, severity in ((0.9, NOTE), (-0.9, NOTE), (1.1, LOOK), (3.1, PROBLEM)):

        def change(comparison: Comparison, lost: float = lost) -> Comparison:
            (output,) = comparison.outputs
            own = replace(output, sqnr_db=20.0, deployed_sqnr_db=20.0 - lost, deployed_differs=True)
            return replace(comparison, outputs=(own,))

        assert one(case_of(pair, change=change), "kernel-differs").severity == severity
    assert poor["deployed_sqnr_db"] < 30
    # Flips without a loss are worth a look; without a known cause, fewer bits avoid saturation.
    finding = one(deployed(pair, 0.5, deployed_differs=True, deployed_flips=1), "kernel-differs")
    assert finding.severity == LOOK
    assert finding.remedy.recipe == {"reduce_range": True}


# -- speed -------------------------------------------------------------------------------------


def timed(pair: Pair, quantized: float) -> Case:
    latency = Latency(
        float_seconds=0.002, quantized_seconds=quantized, float_spread_seconds=1e-5,
        quantized_spread_seconds=1e-5, runs=50,
    )  # fmt: skip
    return case_of(pair, change=lambda c: replace(c, latency=latency))


def test_a_quantized_model_that_is_not_faster_is_told(tmp_path: Path) -> None:
    pair = static(tmp_path, conv_relu_gemm(), IMAGES)
    finding = one(timed(pair, 0.003), "int8-not-faster")
    assert (finding.node, finding.severity) == ("", LOOK)
    assert finding.evidence["times"] == pytest.approx(1.5)
    assert found(timed(pair, 0.0019), "int8-not-faster") == []
    assert found(case_of(pair), "int8-not-faster") == []


def elementwise(folder: Path, op_type: str) -> Pair:
    """A chain of one operator, all quantized."""
    names = ["x", "a", "b", "c", "y"]
    nodes = [
        helper.make_node(op_type, [i], [o], f"n{at}")
        for at, (i, o) in enumerate(itertools.pairwise(names))
    ]
    proto = model(nodes, [("x", [1, 8])], [("y", [1, 8])])
    feeds = [{"x": floats((1, 8), s)} for s in range(2)]
    pairs: list[tuple[list[onnx.NodeProto], list[onnx.TensorProto]]] = []
    quantized = onnx.ModelProto()
    quantized.CopyFrom(proto)
    del quantized.graph.node[:]
    for node in nodes:
        at = node.input[0]
        pairs.append(qdq_of(at, f"{at}_dq", 0.02, 0))
        own = helper.make_node(op_type, [f"{at}_dq"], list(node.output), node.name)
        quantized.graph.node.extend([*pairs[-1][0], own])
        quantized.graph.initializer.extend(pairs[-1][1])
    return by_hand(folder, proto, quantized, feeds)


def test_islands_without_integer_kernels_are_listed(tmp_path: Path) -> None:
    finding = one(case_of(elementwise(tmp_path, "Tanh")), "slower")
    assert finding.severity == NOTE
    # The last one's output is not quantized, so its DQ goes with nothing behind it.
    assert (finding.evidence["island_nodes"], finding.evidence["computing_nodes"]) == (3, 4)
    assert finding.remedy.exclude == ("n0", "n1", "n2")


def test_nodes_with_integer_kernels_are_no_islands(tmp_path: Path) -> None:
    assert found(case_of(elementwise(tmp_path, "Sigmoid")), "slower") == []


def test_convolutions_with_ranges_at_run_time_are_told(tmp_path: Path) -> None:
    save(conv_relu_gemm(), tmp_path / "f.onnx")
    quantize_dynamic(
        tmp_path / "f.onnx", tmp_path / "q.onnx", op_types_to_quantize=["Conv"],
        weight_type=QuantType.QUInt8,
    )  # fmt: skip
    finding = one(case_of(Pair(folder=tmp_path, feeds=IMAGES)), "slower")
    assert (finding.node, finding.evidence) == ("conv", {"conv_integer_nodes": 1})


@pytest.mark.parametrize(("kind", "told"), [(QuantType.QInt8, 1), (QuantType.QUInt8, 0)])
def test_signed_activations_in_qoperator_files_are_told(
    tmp_path: Path, kind: QuantType, told: int
) -> None:
    pair = static(
        tmp_path, conv_relu_gemm(), IMAGES, quant_format=QuantFormat.QOperator, activation_type=kind
    )
    findings = found(case_of(pair), "slower")
    assert len(findings) == told
    assert [f.remedy.recipe for f in findings] == [{"activation_type": "uint8"}] * told


def test_a_model_that_was_measured_to_be_faster_has_nothing_slow(tmp_path: Path) -> None:
    pair = elementwise(tmp_path, "Tanh")
    assert found(timed(pair, 0.0019), "slower") == []
    assert len(found(timed(pair, 0.003), "slower")) == 1


# -- batches and samples -----------------------------------------------------------------------


def rows(folder: Path, last: Sequence[float]) -> Pair:
    """y = x w with the range of x found at run time; the first two inputs nearly cancel."""
    w = np.float32([[20], [-20], [1]])
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"], "range"),
        helper.make_node("MatMulInteger", ["xq", "wq", "xz"], ["acc"], "product"),
        helper.make_node("Cast", ["acc"], ["accf"], "real", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xs", "ws"], ["scale"], "scales"),
        helper.make_node("Mul", ["accf", "scale"], ["y"], "rescale"),
    ]
    io: tuple[Any, Any] = ([("x", ["batch", 3])], [("y", ["batch", 1])])
    quantized = model(nodes, *io, [array("wq", (w * 4).astype(np.int8)),
                                   array("ws", np.float32(0.25))])  # fmt: skip
    proto = model([helper.make_node("MatMul", ["x", "w"], ["y"], "product")], *io, [array("w", w)])
    feeds = [{"x": np.float32([[1, 1.04 + 0.01 * at, 2]])} for at in range(3)]
    return by_hand(folder, proto, quantized, [*feeds, {"x": np.float32([last])}])


def test_an_output_that_depends_on_its_batch_is_told(tmp_path: Path) -> None:
    case = case_of(rows(tmp_path, [1, 1, 20]))
    assert case.comparison.batch is not None
    (record,) = case.comparison.batch.outputs
    finding = one(case, "dynamic-batch")
    assert (finding.node, finding.tensor) == ("product", "y")
    peak = max(abs(v).max() for v in Pair(folder=tmp_path, feeds=rows(
        tmp_path, [1, 1, 20]).feeds).tensor("f", "y"))  # fmt: skip
    assert finding.evidence["difference_fraction"] == pytest.approx(
        record.quantized_max_abs_difference / peak
    )
    assert finding.remedy.recipe == {"format": "qdq"}


def test_samples_of_one_range_do_not_depend_on_their_batch(tmp_path: Path) -> None:
    case = case_of(rows(tmp_path, [1, 1, 2]))
    assert case.comparison.batch is not None
    assert found(case, "dynamic-batch") == []


def test_seen_samples_that_are_far_better_are_told(tmp_path: Path) -> None:
    feeds = [*IMAGES[:2], {"x": IMAGES[2]["x"] * 6}]
    pair = static(tmp_path, conv_relu_gemm(), feeds, calibration=feeds[:2])
    finding = one(case_of(pair, seen=[True, True, False]), "calibration-gap")
    sides = [pair.tensor(file, "y") for file in ("f", "q")]
    truth = db(*(s[:2] for s in sides)) - db(*(s[2:] for s in sides))
    assert finding.tensor == "y"
    assert finding.evidence["gap_db"] == close(truth)
    assert truth > 3


def test_seen_and_unseen_samples_alike_are_left_alone(tmp_path: Path) -> None:
    feeds = [IMAGES[0], IMAGES[1], IMAGES[1], IMAGES[0]]
    pair = static(tmp_path, conv_relu_gemm(), feeds)
    case = case_of(pair, seen=[True, True, False, False])
    assert case.comparison.outputs[0].unseen_sqnr_db is not None
    assert found(case, "calibration-gap") == []


def test_halves_of_the_samples_that_disagree_are_told(tmp_path: Path) -> None:
    quiet = [{"x": v["x"] / np.float32(30)} for v in IMAGES]
    feeds = [IMAGES[0], quiet[0], IMAGES[1], quiet[1]]
    pair = static(tmp_path, conv_relu_gemm(), feeds)
    finding = one(case_of(pair), "unstable-ranking")
    each = [db([a], [b]) for a, b in zip(pair.tensor("f", "y"), pair.tensor("q", "y"), strict=True)]
    assert finding.evidence["first_half_median_sqnr_db"] == close(np.mean(each[::2]).item())
    assert finding.severity == NOTE
    same = case_of(Pair(folder=tmp_path, feeds=[feeds[0], feeds[0], feeds[2], feeds[2]]))
    assert found(same, "unstable-ranking") == []


# -- where an error comes from -----------------------------------------------------------------


def spoilt(folder: Path, width: float, last: float = 2) -> Pair:
    """Three Convs; the first one's output has a range of plus and minus `width`, y of `last`."""
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], "spoilt"),
        helper.make_node("Tanh", ["a"], ["b"], "tanh"),
        helper.make_node("Conv", ["b", "w1"], ["c"], "carrier"),
        helper.make_node("Conv", ["c", "w2"], ["y"], "last"),
    ]
    proto = model(
        nodes, [("x", [1, 3, 6, 6])], [("y", [1, 4, 6, 6])],
        [array("w0", floats((4, 3, 1, 1), 1, 0.3)), array("w1", floats((4, 4, 1, 1), 2, 0.5)),
         array("w2", floats((4, 4, 1, 1), 3, 0.5))],
    )  # fmt: skip
    override = {
        name: [{"rmin": np.float32(-own), "rmax": np.float32(own)}]
        for name, own in (("a", width), ("y", last))
    }
    return static(folder, proto, PICTURES, extra_options={"TensorQuantOverrides": override})


@pytest.mark.parametrize("isolated", [False, True])
def test_an_inherited_error_leads_to_where_it_begins(tmp_path: Path, isolated: bool) -> None:
    pair = spoilt(tmp_path, 60)
    finding = one(case_of(pair, isolated=isolated), "inherited")
    assert (finding.node, finding.tensor) == ("last", "y")
    assert (finding.evidence["origin_node"], finding.evidence["origin_tensor"]) == ("spoilt", "a")
    truth = db(pair.tensor("f", "a"), pair.tensor("q", "a_DequantizeLinear_Output"))
    assert finding.evidence["origin_sqnr_db"] == close(truth)
    assert finding.remedy.exclude == ("spoilt",)


@pytest.mark.parametrize(("width", "last"), [(4, 2), (9, 2), (4, 100), (60, 100)])
def test_an_output_that_is_good_or_spoils_itself_inherits_nothing(
    tmp_path: Path, width: float, last: float
) -> None:
    case = case_of(spoilt(tmp_path, width, last))
    figure = activation_of(case.comparison, "y").accumulated_sqnr_db
    assert (figure < 20) == (last > 2)
    if width == 9:
        # What is 6 dB worse than its inputs lies on the way, but the output is good enough.
        assert activation_of(case.comparison, "a").accumulated_sqnr_db < 26
    assert found(case, "inherited") == []


# -- single patterns ---------------------------------------------------------------------------


def attention(folder: Path, mask: float, **options: Any) -> Pair:
    """softmax(x w x^T + m) over four positions, the last of them masked; also through Reshape."""
    proto = model(
        [
            helper.make_node("MatMul", ["x", "w"], ["k"], "key"),
            helper.make_node("MatMul", ["k", "xt"], ["l"], "logits"),
            helper.make_node("Add", ["l", "m"], ["s"], "mask"),
            helper.make_node("Reshape", ["s", "shape"], ["r"], "flat"),
            helper.make_node("Softmax", ["r"], ["y"], "softmax", axis=-1),
        ],
        [("x", [4, 8]), ("xt", [8, 4])], [("y", [1, 4, 4])],
        [array("w", floats((8, 8), 3, 0.4)), array("m", np.float32([[0, 0, 0, mask]])),
         array("shape", np.int64([1, 4, 4]))],
    )  # fmt: skip
    feeds: list[Arrays] = []
    for seed in range(2):
        x = floats((4, 8), seed)
        feeds.append({"x": x, "xt": np.ascontiguousarray(x.T)})
    return static(folder, proto, feeds, **options)


def test_a_mask_that_takes_the_range_of_the_logits_is_told(tmp_path: Path) -> None:
    pair = attention(tmp_path, -10000)
    finding = one(case_of(pair), "attention-mask")
    logits = max(abs(v).max() for v in pair.tensor("f", "l"))
    assert finding.node == "mask"
    assert finding.evidence["largest_logit"] == pytest.approx(logits, rel=1e-5)
    assert finding.evidence["scale"] > 39
    assert finding.remedy.exclude == ("mask", "flat", "softmax")


def test_a_clamped_mask_or_sixteen_bits_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "clamped").mkdir()
    (tmp_path / "wide").mkdir()
    assert found(case_of(attention(tmp_path / "clamped", -20)), "attention-mask") == []
    # 16 bits hold -2000 and the logits in steps of 0.03.
    wide = attention(
        tmp_path / "wide", -2000, activation_type=QuantType.QInt16,
        extra_options={"UseQDQContribOps": True},
    )  # fmt: skip
    case = case_of(wide)
    assert activation_of(case.comparison, "s").dtype == "int16"
    assert found(case, "attention-mask") == []


def loud_channel(folder: Path, times: float) -> Pair:
    weight = floats((16, 3, 1, 1), 1, 0.3)
    weight[5] *= times
    proto = model(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
            helper.make_node("Tanh", ["c"], ["y"], "tanh"),
        ],
        [("x", [1, 3, 6, 6])], [("y", [1, 16, 6, 6])], [array("w", weight)],
    )  # fmt: skip
    return static(folder, proto, PICTURES, per_channel=True, op_types_to_quantize=["Conv"])


def test_a_channel_that_sets_the_scale_for_all_is_told(tmp_path: Path) -> None:
    pair = loud_channel(tmp_path, 100)
    finding = one(case_of(pair), "outlier")
    assert (finding.node, finding.tensor) == ("conv", "c")
    sizes = np.abs(np.concatenate(pair.tensor("f", "c"))).max(axis=(0, 2, 3))
    assert finding.evidence["channel"] == 5
    assert finding.evidence["outlier_channels"] == 1
    assert finding.evidence["largest_absmax"] == pytest.approx(sizes[5])
    assert finding.evidence["median_channel_absmax"] == pytest.approx(np.median(sizes))
    assert finding.remedy.exclude == ("conv", "tanh")


def test_a_channel_that_is_large_all_along_a_stream_is_one_finding(tmp_path: Path) -> None:
    proto = model(
        [
            helper.make_node("Mul", [i, "g"] if i == "x" else [i, "h"], [o], f"n{o}")
            for i, o in (("x", "a"), ("a", "b"), ("b", "c"), ("c", "d"), ("d", "y"))
        ],
        [("x", [4, 16])], [("y", [4, 16])],
        [array("g", np.float32([1] * 3 + [200] + [1] * 12)), array("h", np.float32(1.1))],
    )  # fmt: skip
    feeds = [{"x": floats((4, 16), s)} for s in range(2)]
    finding = one(case_of(static(tmp_path, proto, feeds)), "outlier")
    assert finding.node == ""
    assert finding.evidence["channel"] == 3
    assert finding.evidence["tensors"] == ["a", "b", "c", "d", "y"]
    assert finding.remedy.exclude == ("na", "nb", "nc", "nd", "ny")


def test_two_tensors_with_the_same_large_channel_are_one_finding(tmp_path: Path) -> None:
    """A square and its sum inside a normalization: one of them in float gains little."""
    weight = floats((16, 3, 1, 1), 1, 0.3)
    weight[5] *= 100
    weight[9] *= 30
    proto = model(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
            helper.make_node("Mul", ["c", "k"], ["m"], "times"),
            helper.make_node("Mul", ["m", "turn"], ["y"], "turned"),
        ],
        [("x", [1, 3, 6, 6])], [("y", [1, 16, 6, 6])],
        [array("w", weight), array("k", np.float32(2)),
         array("turn", np.float32([[[[1 if c != 5 else 1e-3]] for c in range(16)]]))],
    )  # fmt: skip
    case = case_of(static(tmp_path, proto, PICTURES))
    together, alone = found(case, "outlier")
    assert (together.evidence["tensors"], together.node) == (["c", "m"], "")
    assert together.remedy.exclude == ("conv", "times", "turned")
    assert (alone.tensor, alone.node) == ("y", "turned")


def test_a_channel_less_than_ten_times_as_large_is_left_alone(tmp_path: Path) -> None:
    case = case_of(loud_channel(tmp_path, 18))
    record = activation_of(case.comparison, "c")
    sizes = np.maximum(np.abs(record.channel_low), np.abs(record.channel_high))
    assert 8 < sizes.max() / np.median(sizes) < 10
    assert record.median_channel_sqnr_db < 25
    assert found(case, "outlier") == []


def units(folder: Path, times: float, offset: float = 0.0) -> Pair:
    """Samples 0 to 1 (less the offset), calibrated `times` as large, without the offset."""
    own = [np.random.default_rng(s).random((1, 3, 8, 8)).astype(np.float32) for s in range(3)]
    calibration = [{"x": v * np.float32(times)} for v in own]
    feeds = [{"x": (v - np.float32(offset)) * (2 if offset else 1)} for v in own]
    return static(
        folder, conv_relu_gemm(), feeds, calibration=calibration,
        activation_type=QuantType.QUInt8,
    )  # fmt: skip


@pytest.mark.parametrize(("times", "offset", "words"), [
    (255.0, 0.0, "divided by 255"), (1 / 255, 0.0, "samples were not"), (2.0, 0.5, "mean"),
])  # fmt: skip
def test_an_input_calibrated_in_other_units_is_told(
    tmp_path: Path, times: float, offset: float, words: str
) -> None:
    pair = units(tmp_path, times, offset)
    finding = one(case_of(pair), "wrong-preprocessing")
    assert (finding.tensor, finding.severity) == ("x", PROBLEM)
    assert words in finding.sentence
    own = constants(onnx.load(tmp_path / "q.onnx"))
    high = (255 - int(own["x_zero_point"])) * float(own["x_scale"])
    assert finding.evidence["representable_high"] == pytest.approx(high)


def test_an_input_in_the_units_of_calibration_is_left_alone(tmp_path: Path) -> None:
    assert found(case_of(units(tmp_path, 1.2)), "wrong-preprocessing") == []


def test_random_samples_accuse_no_preprocessing(tmp_path: Path) -> None:
    case = case_of(units(tmp_path, 255), change=lambda c: replace(c, random_feeds=True))
    assert found(case, "wrong-preprocessing") == []


def stream(folder: Path, large: float) -> Pair:
    """A stream that is large in one place only, and a small branch added to it."""
    proto = model(
        [
            helper.make_node("Mul", ["x", "g"], ["a"], "stream"),
            helper.make_node("Mul", ["x", "h"], ["b"], "branch"),
            helper.make_node("Add", ["a", "b"], ["y"], "residual"),
        ],
        [("x", [1, 512])], [("y", [1, 512])],
        [array("g", np.float32(large)), array("h", np.float32(1))],
    )  # fmt: skip
    feeds = [{"x": floats((1, 512), s)} for s in range(2)]
    pair = static(folder, proto, feeds)
    path = folder / "q.onnx"
    quantized = onnx.load(path)
    own = {i.name: i for i in quantized.graph.initializer}
    # The sum's own scale is that of a far larger stream.
    own["y_scale"].CopyFrom(array("y_scale", np.float32(large / 2)))
    onnx.save(quantized, path)
    return pair


def test_a_residual_add_far_worse_than_its_inputs_is_told(tmp_path: Path) -> None:
    pair = stream(tmp_path, 100)
    finding = one(case_of(pair), "residual-add")
    assert finding.node == "residual"
    peaks = [max(abs(v).max() for v in pair.tensor("f", n)) for n in "ab"]
    assert finding.evidence["times"] == pytest.approx(peaks[0] / peaks[1])
    assert finding.evidence["drop_db"] > 10
    assert finding.remedy.exclude == ("residual",)


def test_a_residual_add_of_like_branches_is_left_alone(tmp_path: Path) -> None:
    case = case_of(stream(tmp_path, 8))
    assert activation_of(case.comparison, "y").accumulated_sqnr_db < 20
    assert found(case, "residual-add") == []


# -- nothing at all ----------------------------------------------------------------------------


def test_a_healthy_pair_has_nothing_worth_a_look(tmp_path: Path) -> None:
    case = case_of(static(tmp_path, conv_relu_gemm(), IMAGES))
    for code in ACTIVATION_RULES:
        assert found(case, code) == []


def test_two_float_models_are_silent(tmp_path: Path) -> None:
    proto = conv_relu_gemm()
    other = onnx.ModelProto()
    other.CopyFrom(proto)
    other.producer_name = "other"
    case = timed(by_hand(tmp_path, proto, other, IMAGES), 0.004)
    for code in ACTIVATION_RULES:
        assert found(case, code) == []


ODD = [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e30]
OPTIONAL = [
    "scale", "zero_point", "local_sqnr_db", "channel_axis", "saturated_fraction",
    "representable_low", "representable_high", "isolated_sqnr_db", "added_sqnr_db",
]  # fmt: skip


def odd(record: Any, value: float) -> Any:
    """A record with a value in place of every figure; parts and channels too."""
    changes: dict[str, Any] = {}
    for item in fields(record):
        before = getattr(record, item.name)
        if isinstance(before, float):
            changes[item.name] = value
        elif isinstance(before, tuple) and before and isinstance(before[0], float):
            changes[item.name] = (value,) * len(before)
    if getattr(record, "slices", ()):
        changes["slices"] = tuple(odd(s, value) for s in record.slices)
    return replace(record, **changes)


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Pairs that have what each rule looks at."""

    def folder() -> Path:
        return tmp_path_factory.mktemp("varied")

    return [
        case_of(static(folder(), boxes_and_scores_in_one_concat(), PICTURES)),
        case_of(louder(folder(), 4), recipe={"format": "qdq"}),
        case_of(attention(folder(), -10000)),
        case_of(loud_channel(folder(), 100)),
        case_of(normalized(1e-4, folder())),
        case_of(stream(folder(), 100)),
        case_of(spoilt(folder(), 60), isolated=True),
        case_of(rows(folder(), [1, 1, 20])),
        case_of(units(folder(), 255)),
    ]


@pytest.mark.parametrize("value", ODD)
def test_rules_stand_figures_that_say_nothing(varied: list[Case], value: float) -> None:
    for case in varied:
        comparison = replace(
            case.comparison,
            activations=tuple(odd(a, value) for a in case.comparison.activations),
            outputs=tuple(odd(o, value) for o in case.comparison.outputs),
        )
        changed = replace(case, comparison=comparison)
        for code in ACTIVATION_RULES:
            found(changed, code)


@pytest.mark.parametrize("absent", OPTIONAL)
def test_rules_stand_figures_that_are_not_there(varied: list[Case], absent: str) -> None:
    for case in varied:
        without = [replace(a, **{absent: None}) for a in case.comparison.activations]
        changed = replace(case, comparison=replace(case.comparison, activations=tuple(without)))
        for code in ACTIVATION_RULES:
            found(changed, code)


def test_rules_stand_a_comparison_that_holds_nothing(varied: list[Case]) -> None:
    for case in varied:
        empty = replace(
            case.comparison, activations=(), outputs=(), weights=(), unmatched=(), batch=None
        )
        for code in ACTIVATION_RULES:
            found(replace(case, comparison=empty), code)


def test_names_from_a_file_are_shown_in_one_line(tmp_path: Path) -> None:
    proto = boxes_and_scores_in_one_concat()
    proto.graph.node[-1].name = "a\nb" + "c" * 300
    finding = one(case_of(static(tmp_path, proto, PICTURES)), "concat-shared-scale")
    assert "a\\nb" in finding.sentence
    assert "\n" not in finding.sentence
    assert len(finding.sentence) < 500
    assert finding.node == proto.graph.node[-1].name
