"""What a quantized file says is wrong: each rule on one file with its fault, and on a near miss.

The truth is what the test wrote into the file, and float64 arithmetic on the file's own integers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantFormat as OrtFormat
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import QuantFormat as NBitsFormat

from inspector.compare import compare_models
from inspector.feeds import Feeds, load_feeds
from inspector.findings import LOOK, NOTE, PROBLEM, SEVERITIES, Case, Finding
from inspector.matching import match_tensors
from inspector.model_files import load_model
from inspector.recipe import QuantConfig
from inspector.weight_rules import WEIGHT_RULES
from tests.known_pairs import IMAGES, Pair, by_hand, constants, rewritten, static
from tests.samples import (
    MODELS,
    ROOT,
    array,
    conv_batchnorm,
    conv_relu_gemm,
    floats,
    model,
    needs_models,
    npz_folder,
    save,
)
from tests.test_known_faults import packed, scalar
from tests.test_switchboard import relu_that_a_body_reads_behind

UINT8 = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8}
ROWS = [{"x": floats((4, 24), s)} for s in range(3)]


def case_of(
    float_path: Path,
    quantized_path: Path,
    feeds: Path,
    *,
    recipe: Mapping[str, Any] | None = None,
    samples: int | None = None,
) -> Case:
    float_model, quantized = load_model(float_path), load_model(quantized_path)
    loaded: Feeds = load_feeds(feeds, float_model)
    if samples is not None:
        loaded = loaded.subset(range(samples))
    result = compare_models(
        float_model, quantized, loaded, measure_latency=False, explain_deployed=False
    )
    return Case(
        comparison=result, float_model=float_model, quantized_model=quantized,
        matching=match_tensors(float_model, quantized), recipe=recipe,
    )  # fmt: skip


def case(pair: Pair, recipe: Mapping[str, Any] | None = None) -> Case:
    feeds = npz_folder(pair.folder / "feeds", pair.feeds)
    return case_of(pair.folder / "f.onnx", pair.folder / "q.onnx", feeds, recipe=recipe)


def findings(pair: Pair, code: str, recipe: Mapping[str, Any] | None = None) -> list[Finding]:
    found = list(WEIGHT_RULES[code](case(pair, recipe)))
    for finding in found:
        check(finding, code)
    return found


def check(finding: Finding, code: str) -> None:
    """What holds for every finding."""
    assert finding.code == code
    assert finding.severity in SEVERITIES
    assert finding.sentence.endswith(".")
    assert finding.remedy.say.endswith(".")
    assert finding.evidence
    json.dumps(finding.to_json())
    if finding.remedy.recipe or finding.remedy.overrides:
        changed = dict(finding.remedy.recipe)
        if finding.remedy.overrides:
            changed["overrides"] = [dict(o) for o in finding.remedy.overrides]
        QuantConfig.from_json(changed)


def problems(case: Case) -> list[Finding]:
    return [f for rule in WEIGHT_RULES.values() for f in rule(case) if f.severity == PROBLEM]


def stored(graph: onnx.GraphProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(i for i in graph.initializer if i.name == name))


def put(graph: onnx.GraphProto, name: str, values: Any) -> None:
    tensor = next(i for i in graph.initializer if i.name == name)
    tensor.CopyFrom(array(name, values))


def scaled(name: str, factor: Any) -> Callable[[onnx.GraphProto], None]:
    """Multiplies a constant."""

    def change(graph: onnx.GraphProto) -> None:
        old = stored(graph, name)
        put(graph, name, np.asarray(old * np.asarray(factor)).astype(old.dtype))

    return change


def set_to(name: str, value: Any) -> Callable[[onnx.GraphProto], None]:
    def change(graph: onnx.GraphProto) -> None:
        old = stored(graph, name)
        put(graph, name, np.full(old.shape, value, old.dtype))

    return change


def healthy(folder: Path, **options: Any) -> Pair:
    return static(folder, conv_relu_gemm(), IMAGES, **options)


def named(found: Sequence[Finding]) -> set[str]:
    return {f.tensor for f in found}


def test_every_code_has_a_rule_of_its_own() -> None:
    assert len(set(WEIGHT_RULES.values())) == len(WEIGHT_RULES) == 19
    assert all(rule.__name__ == code.replace("-", "_") for code, rule in WEIGHT_RULES.items())


# -- qdq-pair-differs --------------------------------------------------------------------------


def reread(what: str, value: Callable[[np.ndarray], Any]) -> Callable[[onnx.GraphProto], None]:
    """Gives the DQ of r a scale or zero point of its own."""

    def change(graph: onnx.GraphProto) -> None:
        at = {"scale": 1, "zero_point": 2}[what]
        dq = next(n for n in graph.node if n.output[0] == "r_DequantizeLinear_Output")
        old = stored(graph, dq.input[at])
        graph.initializer.append(array("own", np.asarray(value(old)).astype(old.dtype)))
        dq.input[at] = "own"

    return change


def test_a_pair_with_two_scales_is_a_problem_with_both(tmp_path: Path) -> None:
    pair = rewritten(healthy(tmp_path), reread("scale", lambda s: s * 2))
    (found,) = findings(pair, "qdq-pair-differs")
    scale = float(constants(onnx.load(tmp_path / "q.onnx"))["r_scale"])
    assert (found.tensor, found.node, found.severity) == ("r", "relu", PROBLEM)
    assert found.evidence["q_scale"] == scale
    assert found.evidence["dq_scale"] == 2 * scale
    assert "2 times" in found.sentence


def test_a_zero_point_dropped_behind_q_is_a_problem(tmp_path: Path) -> None:
    def change(graph: onnx.GraphProto) -> None:
        dq = next(n for n in graph.node if n.output[0] == "r_DequantizeLinear_Output")
        assert stored(graph, dq.input[2]) == -128
        del dq.input[2]

    (found,) = findings(rewritten(healthy(tmp_path), change), "qdq-pair-differs")
    assert found.tensor == "r"
    assert (found.evidence["q_zero_point"], found.evidence["dq_zero_point"]) == (-128, 0)


def test_a_pair_whose_equal_scales_have_two_names_is_healthy(tmp_path: Path) -> None:
    pair = rewritten(healthy(tmp_path), reread("scale", lambda s: s))
    assert findings(pair, "qdq-pair-differs") == []


def test_integer_operators_that_read_another_scale_than_was_written_are_a_problem(
    tmp_path: Path,
) -> None:
    pair = healthy(tmp_path, quant_format=OrtFormat.QOperator)
    assert findings(pair, "qdq-pair-differs") == []

    def change(graph: onnx.GraphProto) -> None:
        pool = next(n for n in graph.node if n.op_type == "QLinearGlobalAveragePool")
        graph.initializer.append(array("own", stored(graph, pool.input[1]) * np.float32(3)))
        pool.input[1] = "own"

    (found,) = findings(rewritten(pair, change), "qdq-pair-differs")
    assert found.tensor == "r"
    assert found.evidence["dq_scale"] == pytest.approx(3 * found.evidence["q_scale"])


# -- weight-gain -------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2.0, 0.5, 1.2, -1.0])
@pytest.mark.parametrize("name", ["w", "gw"])
def test_a_wrong_scale_of_a_weight_is_a_problem_with_its_factor(
    tmp_path: Path, name: str, factor: float
) -> None:
    pair = rewritten(healthy(tmp_path), scaled(f"{name}_scale", factor))
    (found,) = findings(pair, "weight-gain")
    truth = np.polyfit(
        constants(conv_relu_gemm())[name].astype(np.float64).ravel(),
        pair.integers(f"{name}_quantized").ravel(), 1,
    )[0]  # fmt: skip
    assert found.tensor == name
    assert found.severity == PROBLEM
    assert found.evidence["gain"] == pytest.approx(truth, rel=1e-9)
    assert truth == pytest.approx(factor, rel=0.02)


def test_one_wrong_scale_of_many_channels_names_the_channel(tmp_path: Path) -> None:
    factor = np.ones(8)
    factor[5] = 3
    pair = rewritten(healthy(tmp_path, per_channel=True), scaled("w_scale", factor))
    (found,) = findings(pair, "weight-gain")
    assert (found.tensor, found.severity) == ("w", PROBLEM)
    assert "channels 5 of 8" in found.sentence
    assert found.evidence["gain"] == pytest.approx(3, rel=0.05)


def test_a_wrong_scale_of_a_bias_is_a_problem(tmp_path: Path) -> None:
    pair = rewritten(healthy(tmp_path), scaled("b_quantized_scale", 2))
    (found,) = findings(pair, "weight-gain")
    assert (found.tensor, found.severity) == ("b", PROBLEM)


@pytest.mark.parametrize("kind", ["folded", "clipped", "rounded again", "per channel", "uint8"])
def test_weights_that_were_folded_clipped_or_rounded_have_no_gain(
    tmp_path: Path, kind: str
) -> None:
    if kind == "folded":
        feeds = [{"x": floats((1, 3, 6, 6), s)} for s in range(3)]
        pair = static(tmp_path, conv_batchnorm(), feeds, preprocess=True)
    elif kind in ("clipped", "rounded again"):
        pair = regridded(healthy(tmp_path), 0.6 if kind == "clipped" else 1.4)
    else:
        options = {"per channel": {"per_channel": True}, "uint8": UINT8}
        pair = healthy(tmp_path, **options[kind])
    for code in ("weight-gain", "weight-offset"):
        assert findings(pair, code) == []


def regridded(pair: Pair, factor: float, name: str = "w") -> Pair:
    """The weight quantized with another scale, as one would: rounded and clipped again."""
    values = constants(onnx.load(pair.folder / "f.onnx"))[name].astype(np.float64)

    def change(graph: onnx.GraphProto) -> None:
        scaled(f"{name}_scale", factor)(graph)
        codes = np.rint(values / stored(graph, f"{name}_scale").astype(np.float64))
        put(graph, f"{name}_quantized", np.clip(codes, -127, 127).astype(np.int8))

    return rewritten(pair, change)


def test_a_factor_that_was_folded_into_a_weight_is_a_note(tmp_path: Path) -> None:
    """What is computed with it is right: the node that halved the input is gone."""
    ends = [("x", [4, 24])], [("y", [4, 24])]
    weight = floats((24, 24), 1)
    proto = model(
        [
            helper.make_node("Mul", ["x", "half"], ["m"], "mul"),
            helper.make_node("MatMul", ["m", "w"], ["y"], "mm"),
        ],
        *ends, [array("w", weight), array("half", np.float32(0.5))],
    )  # fmt: skip
    folded = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "mm")], *ends, [array("w", weight / 2)]
    )
    pair = static(tmp_path, folded, ROWS)
    save(proto, tmp_path / "f.onnx")
    (found,) = findings(pair, "weight-gain")
    assert (found.tensor, found.severity) == ("w", NOTE)
    assert found.evidence["gain"] == pytest.approx(0.5, rel=0.01)


# -- weight-offset -----------------------------------------------------------------------------


def unzeroed(graph: onnx.GraphProto) -> None:
    """The DequantizeLinear of w loses its zero point."""
    dq = next(n for n in graph.node if n.input[0] == "w_quantized")
    del dq.input[2]


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_dropped_zero_point_of_a_weight_is_a_problem(tmp_path: Path, per_channel: bool) -> None:
    pair = healthy(tmp_path, **UINT8, per_channel=per_channel)
    zero = constants(onnx.load(tmp_path / "q.onnx"))["w_zero_point"].reshape(-1)
    (found,) = findings(rewritten(pair, unzeroed), "weight-offset")
    assert (found.tensor, found.node, found.severity) == ("w", "conv", PROBLEM)
    assert found.evidence["zero_point_in_file"] == 0
    assert found.evidence["zero_point_expected"] in zero
    assert findings(pair, "weight-gain") == []


def test_a_zero_point_one_off_is_a_problem(tmp_path: Path) -> None:
    pair = healthy(tmp_path, **UINT8)
    old = int(constants(onnx.load(tmp_path / "q.onnx"))["w_zero_point"])
    (found,) = findings(rewritten(pair, set_to("w_zero_point", old + 1)), "weight-offset")
    assert found.evidence["zero_point_expected"] == old
    assert found.evidence["offset_steps"] == -1


# -- activation-scale --------------------------------------------------------------------------


def test_a_scale_that_a_bias_contradicts_is_a_problem(tmp_path: Path) -> None:
    pair = rewritten(healthy(tmp_path), scaled("x_scale", 4))
    (found,) = findings(pair, "activation-scale")
    assert (found.tensor, found.severity) == ("x", PROBLEM)
    assert found.evidence["factor"] == pytest.approx(4, rel=1e-5)
    assert found.evidence["reader"] == "conv"
    assert "4 times" in found.sentence


@pytest.mark.parametrize("factor", [4.0, 0.25])
def test_a_scale_that_no_bias_tells_of_is_a_look_by_its_range(
    tmp_path: Path, factor: float
) -> None:
    pair = rewritten(healthy(tmp_path), scaled("r_scale", factor))
    (found,) = findings(pair, "activation-scale")
    assert (found.tensor, found.node, found.severity) == ("r", "relu", LOOK)
    values = np.concatenate([v.ravel() for v in pair.tensor("f", "r")])
    own = constants(onnx.load(tmp_path / "q.onnx"))["r_scale"]
    assert found.evidence["scale_ratio"] == pytest.approx(own / (values.max() / 255), rel=1e-5)
    (override,) = found.remedy.overrides
    assert override["tensor"] == "r"
    assert override["high"] == pytest.approx(values.max(), rel=1e-6)


@pytest.mark.parametrize("factor", [1.0, 1.5, 0.7])
def test_a_scale_near_that_of_the_observed_range_is_healthy(tmp_path: Path, factor: float) -> None:
    pair = rewritten(healthy(tmp_path), scaled("r_scale", factor))
    assert findings(pair, "activation-scale") == []


def test_a_dropped_zero_point_of_an_activation_is_a_problem(tmp_path: Path) -> None:
    pair = rewritten(healthy(tmp_path), set_to("r_zero_point", 0))
    (found,) = findings(pair, "activation-scale")
    assert (found.tensor, found.severity) == ("r", PROBLEM)
    assert (found.evidence["zero_point_in_file"], found.evidence["zero_point_expected"]) == (
        0,
        -128,
    )


@pytest.mark.parametrize("kind", ["wrong scale", "quantized again"])
def test_a_weight_that_its_bias_contradicts_does_not_accuse_the_activation(
    tmp_path: Path, kind: str
) -> None:
    pair = healthy(tmp_path)
    pair = rewritten(pair, scaled("w_scale", 2)) if "wrong" in kind else regridded(pair, 2)
    assert findings(pair, "activation-scale") == []


def test_a_wrong_scale_of_a_weight_and_of_its_input_are_told_apart(tmp_path: Path) -> None:
    pair = rewritten(rewritten(healthy(tmp_path), scaled("w_scale", 2)), scaled("x_scale", 4))
    given = case(pair)
    (gain,) = WEIGHT_RULES["weight-gain"](given)
    (scale,) = WEIGHT_RULES["activation-scale"](given)
    assert (gain.tensor, scale.tensor) == ("w", "x")
    assert gain.evidence["gain"] == pytest.approx(2, rel=0.01)
    assert scale.evidence["factor"] == pytest.approx(4, rel=0.01)


def chain(folder: Path, **options: Any) -> Pair:
    """Twelve Tanh, each times 3, in a row: no bias tells of a scale."""
    nodes, tensor = [], "x"
    for at in range(12):
        nodes.append(helper.make_node("Tanh", [tensor], [f"t{at}"], f"s{at}"))
        nodes.append(helper.make_node("Mul", [f"t{at}", "k"], [f"m{at}"], f"n{at}"))
        tensor = f"m{at}"
    proto = model(nodes, [("x", [4, 24])], [(tensor, [4, 24])], [array("k", np.float32(3))])
    return static(folder, proto, ROWS, **options)


@pytest.mark.parametrize("factor", [8.0, 0.25])
def test_one_scale_of_many_that_are_those_of_the_samples_is_a_problem(
    tmp_path: Path, factor: float
) -> None:
    """Nothing but a change after calibration makes one of them eight times as large."""
    pair = rewritten(chain(tmp_path), scaled("m4_scale", factor))
    (found,) = findings(pair, "activation-scale")
    assert (found.tensor, found.node, found.severity) == ("m4", "n4", PROBLEM)
    assert found.evidence["scale_ratio"] == pytest.approx(factor, rel=1e-2)
    assert "changed after calibration" in found.sentence
    # A range that was asked for is none that was changed.
    asked = [{"tensor": "m4", "low": -3 * factor, "high": 3 * factor}]
    recipe = {**QuantConfig().to_json(), "overrides": asked}
    assert {f.severity for f in findings(pair, "activation-scale", recipe)} == {LOOK}
    # Other samples may have other ranges.
    other = Pair(folder=tmp_path, feeds=[{"x": v["x"] / np.float32(9)} for v in ROWS])
    assert PROBLEM not in {f.severity for f in findings(other, "activation-scale")}


@pytest.mark.parametrize(("old", "new"), [(-40, 0), (0, -40), (0, 0)])
def test_a_zero_point_beside_an_end_that_was_dropped_is_a_problem(
    tmp_path: Path, old: int, new: int
) -> None:
    """The samples of one sign more than the other, so that the zero point is not in the middle."""
    shift = np.float32(0.9 if old else 0)
    rows = [{"x": np.clip(v["x"] + shift, -2 + 2 * shift, 2 + shift)} for v in ROWS]
    nodes, tensor = [], "x"
    for at in range(6):
        nodes.append(helper.make_node("Mul", [tensor, "k"], [f"m{at}"], f"n{at}"))
        nodes.append(helper.make_node("Abs", [f"m{at}"], [f"a{at}"], f"s{at}"))
        nodes.append(helper.make_node("Mul", [f"a{at}", "k"], [f"b{at}"], f"o{at}"))
    ends = [(f"b{at}", [4, 24]) for at in range(6)]
    proto = model(nodes, [("x", [4, 24])], ends, [array("k", np.float32(1.1))])
    pair = static(tmp_path, proto, rows)
    zero = int(constants(onnx.load(tmp_path / "q.onnx"))["m2_zero_point"])
    assert abs(zero) > 20 if old else abs(zero) < 8
    if new != old:
        rewritten(pair, set_to("m2_zero_point", new))
    found = findings(pair, "activation-scale")
    assert [(f.tensor, f.severity) for f in found] == ([("m2", PROBLEM)] if new != old else [])
    assert [f.evidence["zero_point_expected"] for f in found] == [zero] * len(found)


def test_a_scale_that_is_shared_is_named_once_by_the_first_that_has_it(tmp_path: Path) -> None:
    """The bias behind a Reshape tells of the scale that it was given by what it reads."""
    proto = model(
        [
            helper.make_node("Mul", ["x", "k"], ["t"], "times"),
            helper.make_node("Reshape", ["t", "shape"], ["r"], "reshape"),
            helper.make_node("Conv", ["r", "w", "b"], ["c"], "conv"),
            helper.make_node("Conv", ["c", "w", "b"], ["y"], "last"),
        ],
        [("x", [4, 24])], [("y", [1, 4, 4, 6])],
        [array("shape", np.array([1, 4, 4, 6])), array("w", floats((4, 4, 1, 1), 1)),
         array("b", floats((4,), 2)), array("k", np.float32(3))],
    )  # fmt: skip
    pair = rewritten(static(tmp_path, proto, ROWS), scaled("t_scale", 8))
    (found,) = findings(pair, "activation-scale")
    assert (found.tensor, found.node, found.severity) == ("t", "times", PROBLEM)
    assert found.evidence["factor"] == pytest.approx(8, rel=1e-5)


def test_what_only_a_rectifier_reads_has_the_range_behind_it(tmp_path: Path) -> None:
    """ONNX Runtime gives the Conv in front of a kept Relu the Relu's range."""
    pair = healthy(tmp_path, extra_options={"QDQKeepRemovableActivations": True})
    file = constants(onnx.load(tmp_path / "q.onnx"))
    assert file["c_scale"] == file["r_scale"]
    low = min(v.min() for v in pair.tensor("f", "c"))
    assert low < -50 * file["c_scale"]
    assert findings(pair, "activation-scale") == []


def test_scales_that_are_off_together_are_said_once_and_the_worst_by_name(tmp_path: Path) -> None:
    """Ten tensors with ranges from other feeds, and one far off."""
    pair = chain(tmp_path)
    for at in range(10):
        rewritten(pair, scaled(f"m{at}_scale", 2.2 if at != 4 else 8))
    found = findings(pair, "activation-scale")
    assert [f.tensor for f in found[:1]] == ["m4"]
    assert len(found) == 2
    assert found[1].evidence["tensors"] == 9


# -- degenerate-range --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scale"),
    [(n, s) for n in ("y", "w") for s in (0.0, math.nan, math.inf)] + [("y", -0.01)],
)
def test_a_scale_that_is_no_positive_number_is_a_problem(
    tmp_path: Path, name: str, scale: float
) -> None:
    pair = rewritten(healthy(tmp_path), set_to(f"{name}_scale", scale))
    (found,) = findings(pair, "degenerate-range")
    assert (found.tensor, found.severity) == (name, PROBLEM)
    assert found.evidence["scale_in_file"] == pytest.approx(scale, nan_ok=True)


def test_a_small_scale_is_not_degenerate(tmp_path: Path) -> None:
    pair = rewritten(healthy(tmp_path), set_to("y_scale", 1e-30))
    assert findings(pair, "degenerate-range") == []


def branched() -> onnx.ModelProto:
    """One of two branches is zero for inputs below 1000."""
    return model(
        [
            helper.make_node("Sub", ["x", "k"], ["s"], "sub"),
            helper.make_node("Relu", ["s"], ["d"], "dead"),
            helper.make_node("Mul", ["d", "two"], ["m"], "mul"),
            helper.make_node("Sigmoid", ["x"], ["g"], "gate"),
            helper.make_node("Add", ["m", "g"], ["y"], "add"),
        ],
        [("x", [4, 24])], [("y", [4, 24])],
        [array("k", np.float32(1000)), array("two", np.float32(2))],
    )  # fmt: skip


def test_a_tensor_that_was_zero_in_calibration_is_a_look_only_where_it_is_not(
    tmp_path: Path,
) -> None:
    pair = static(tmp_path, branched(), ROWS)
    found = findings(pair, "degenerate-range")
    assert {f.tensor for f in found} >= {"m"}
    assert {f.severity for f in found} == {NOTE}
    live = Pair(folder=tmp_path, feeds=[{"x": r["x"] * np.float32(2000)} for r in ROWS])
    found = findings(live, "degenerate-range")
    assert {f.severity for f in found if f.tensor == "m"} == {LOOK}


# -- channel-range -----------------------------------------------------------------------------


def spread_channels() -> onnx.ModelProto:
    proto = conv_relu_gemm()
    gain = np.float32([1, 1, 1, 1, 1, 1, 1, 300]).reshape(8, 1, 1, 1)
    put(proto.graph, "w", stored(proto.graph, "w") * gain)
    return proto


def test_channels_of_very_different_range_with_one_scale_are_a_look(tmp_path: Path) -> None:
    pair = static(tmp_path, spread_channels(), IMAGES)
    (found,) = findings(pair, "channel-range")
    assert (found.tensor, found.node, found.severity) == ("w", "conv", LOOK)
    reference = constants(spread_channels())["w"].astype(np.float64)
    noise = (reference - pair.integers("w_quantized")) ** 2
    db = 10 * np.log10((reference**2).sum(axis=(1, 2, 3)) / noise.sum(axis=(1, 2, 3)))
    assert found.evidence["channels_below_15_db"] == (db < 15).sum() == 7
    assert found.evidence["worst_channel_sqnr_db"] == pytest.approx(db.min(), abs=1e-6)
    assert found.remedy.recipe == {"per_channel": True}


def test_weights_with_channels_of_very_different_range_are_one_finding(tmp_path: Path) -> None:
    """One option cures them all, so all of them are left in float to see what it may gain."""
    proto = spread_channels()
    gains = np.float32([1] + [0.004] * 7)
    put(proto.graph, "gw", stored(proto.graph, "gw")[:, :] * gains[:5, None])
    (found,) = findings(static(tmp_path, proto, IMAGES), "channel-range")
    assert found.evidence["tensors"] == ["w", "gw"]
    assert (found.node, found.remedy.exclude) == ("", ("conv", "gemm"))
    worst = found.evidence["median_channel_sqnr_db"]
    assert found.tensor in ("w", "gw")
    assert worst < 15


def narrow(folder: Path, spread: float) -> Case:
    """Five MatMuls whose channels differ so much that a scale of their own wins half a bit or more.

    The last one spoils the output, whatever the others do.
    """
    nodes, tensor, weights = [], "x", []
    for at in range(5):
        weight = floats((24, 24), at, 0.2) * np.float32([1] + [1 / spread] * 23)
        weights.append(array(f"w{at}", weight))
        nodes.append(helper.make_node("MatMul", [tensor, f"w{at}"], [f"y{at}"], f"n{at}"))
        tensor = f"y{at}"
    proto = model(nodes, [("x", [4, 24])], [(tensor, [4, 24])], weights)
    pair = static(folder, proto, ROWS)
    return case(rewritten(pair, scaled("y4_scale", 300)))


@pytest.mark.parametrize(("spread", "told"), [(1, 0), (4, 1)])
def test_many_weights_that_lose_a_bit_each_are_told_where_an_output_is_poor(
    tmp_path: Path, spread: float, told: int
) -> None:
    given = narrow(tmp_path, spread)
    found = list(WEIGHT_RULES["channel-range"](given))
    assert [(f.severity, f.node) for f in found] == [(LOOK, "")] * told
    for finding in found:
        check(finding, "channel-range")
        gains = []
        for at in range(5):
            sizes = np.abs(given.float_model.constant(f"w{at}")).max(axis=0).astype(np.float64)
            gains.append(np.median(20 * np.log10(sizes.max() / sizes)))
        assert finding.evidence["typical_gain_db"] == pytest.approx(np.median(gains))
        assert finding.evidence["largest_gain_db"] == pytest.approx(max(gains))
        assert finding.remedy.recipe == {"per_channel": True}


@pytest.mark.parametrize("kind", ["a scale per channel", "alike"])
def test_channels_with_a_fitting_scale_are_healthy(tmp_path: Path, kind: str) -> None:
    proto = conv_relu_gemm() if kind == "alike" else spread_channels()
    pair = static(tmp_path, proto, IMAGES, per_channel=kind != "alike")
    assert findings(pair, "channel-range") == []


# -- not-the-same-model ------------------------------------------------------------------------


def retrained(amount: float) -> onnx.ModelProto:
    proto = conv_relu_gemm()
    for seed, name in enumerate(("w", "gw")):
        old = stored(proto.graph, name)
        new = floats(old.shape, 90 + seed, float(old.std()))
        put(proto.graph, name, (old + amount * (new - old)).astype(np.float32))
    return proto


def test_another_models_weights_are_a_problem(tmp_path: Path) -> None:
    pair = static(tmp_path, retrained(1), IMAGES)
    save(conv_relu_gemm(), tmp_path / "f.onnx")
    (found,) = findings(pair, "not-the-same-model")
    assert found.severity == PROBLEM
    assert found.tensor in ("w", "gw")
    assert found.evidence["weights_with_other_content"] == 2


def test_weights_trained_further_are_a_look(tmp_path: Path) -> None:
    pair = static(tmp_path, retrained(0.1), IMAGES)
    save(conv_relu_gemm(), tmp_path / "f.onnx")
    (found,) = findings(pair, "not-the-same-model")
    assert found.severity == LOOK


@pytest.mark.parametrize("kind", ["healthy", "wrong scales", "4 bits"])
def test_weights_that_are_only_far_off_are_still_the_same_model(tmp_path: Path, kind: str) -> None:
    if kind == "4 bits":
        proto = conv_relu_gemm()
        proto.opset_import[0].version = 21
        pair = static(tmp_path, proto, IMAGES, weight_type=QuantType.QInt4)
    else:
        pair = healthy(tmp_path)
        if kind == "wrong scales":
            for name in ("w", "gw"):
                rewritten(pair, scaled(f"{name}_scale", 3))
    assert findings(pair, "not-the-same-model") == []


# -- nothing-quantized -------------------------------------------------------------------------


def unquantized(folder: Path) -> Pair:
    twin = conv_relu_gemm()
    twin.producer_name = "a quantizer that did nothing"
    return by_hand(folder, conv_relu_gemm(), twin, IMAGES)


def test_a_file_in_which_nothing_is_quantized_although_asked_is_a_problem(tmp_path: Path) -> None:
    pair = unquantized(tmp_path)
    (found,) = findings(pair, "nothing-quantized", QuantConfig().to_json())
    assert found.severity == PROBLEM
    (found,) = findings(pair, "nothing-quantized")
    assert found.severity == NOTE


def test_a_quantized_file_is_not_called_unquantized(tmp_path: Path) -> None:
    assert findings(healthy(tmp_path), "nothing-quantized", QuantConfig().to_json()) == []


def in_a_body(folder: Path) -> Pair:
    """All weights lie in the branches of an If, one small product outside."""

    def branch(name: str, seed: int) -> onnx.GraphProto:
        nodes = [helper.make_node("MatMul", ["m", f"{name}_w"], [f"{name}_y"], f"{name}_mm")]
        out = helper.make_tensor_value_info(f"{name}_y", 1, [4, 24])
        return helper.make_graph(
            nodes, name, [], [out], [array(f"{name}_w", floats((24, 24), seed))]
        )

    proto = model(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"], "mm"),
            helper.make_node("If", ["yes"], ["y"], "if", then_branch=branch("then", 1),
                             else_branch=branch("else", 2)),
        ],
        [("x", [4, 6])], [("y", [4, 24])],
        [array("w", floats((6, 24), 3)), array("yes", np.array(True))],
    )  # fmt: skip
    return static(folder, proto, [{"x": floats((4, 6), s)} for s in range(2)])


def test_weights_that_all_lie_in_bodies_are_a_look(tmp_path: Path) -> None:
    (found,) = findings(in_a_body(tmp_path), "nothing-quantized")
    assert found.severity == LOOK
    assert found.evidence["float_weight_elements_in_bodies"] == 2 * 24 * 24


# -- weights-swapped ---------------------------------------------------------------------------


def twins() -> onnx.ModelProto:
    return model(
        [
            helper.make_node("MatMul", ["x", "w1"], ["a"], "one"),
            helper.make_node("Relu", ["a"], ["r"], "relu"),
            helper.make_node("MatMul", ["r", "w2"], ["b"], "two"),
            helper.make_node("Relu", ["b"], ["s"], "relu2"),
            helper.make_node("MatMul", ["s", "w3"], ["y"], "three"),
        ],
        [("x", [4, 24])], [("y", [4, 24])],
        [array(f"w{at}", floats((24, 24), at)) for at in (1, 2, 3)],
    )  # fmt: skip


def test_swapped_weights_are_problems_that_name_both(tmp_path: Path) -> None:
    pair = static(tmp_path, twins(), ROWS)
    assert findings(pair, "weights-swapped") == []

    def change(graph: onnx.GraphProto) -> None:
        old = {n: stored(graph, f"{n}_quantized") for n in ("w1", "w2")}
        put(graph, "w1_quantized", old["w2"])
        put(graph, "w2_quantized", old["w1"])

    found = findings(rewritten(pair, change), "weights-swapped")
    assert {(f.tensor, f.evidence["other_tensor"]) for f in found} == {("w1", "w2"), ("w2", "w1")}
    assert {f.severity for f in found} == {PROBLEM}
    assert all(f.evidence["other_tensor"] in f.sentence for f in found)
    assert findings(pair, "not-the-same-model") == []


# -- bias-clipped ------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.9, 2.0])
def test_a_bias_beyond_int32_is_a_look(tmp_path: Path, share: float) -> None:
    pair = healthy(tmp_path)
    scale = float(constants(onnx.load(tmp_path / "q.onnx"))["b_quantized_scale"].reshape(-1)[0])
    bias = constants(conv_relu_gemm())["b"].copy()
    bias[3] = share * scale * (2**31 - 1)
    rewritten(pair, lambda graph: put(graph, "b", bias), "f")

    def change(graph: onnx.GraphProto) -> None:
        codes = np.clip(np.rint(bias.astype(np.float64) / scale), -(2**31), 2**31 - 1)
        put(graph, "b_quantized", codes.astype(np.int32))

    found = findings(rewritten(pair, change), "bias-clipped")
    if share < 1:
        assert found == []
        return
    (one,) = found
    assert (one.tensor, one.node, one.severity) == ("b", "conv", LOOK)
    assert one.evidence["bias_by_largest_code"] == pytest.approx(2, rel=1e-4)
    assert one.remedy.exclude == ("conv",)


# -- half-range --------------------------------------------------------------------------------


def test_symmetric_activations_of_one_sign_are_one_look(tmp_path: Path) -> None:
    pair = healthy(tmp_path, extra_options={"ActivationSymmetric": True})
    (found,) = findings(pair, "half-range")
    assert found.severity == LOOK
    assert found.tensor in ("r", "p", "f")
    assert found.remedy.recipe == {"activation_symmetric": False}


def test_asymmetric_activations_of_one_sign_are_healthy(tmp_path: Path) -> None:
    assert findings(healthy(tmp_path), "half-range") == []


# -- fixed-range -------------------------------------------------------------------------------


def attention() -> onnx.ModelProto:
    return model(
        [
            helper.make_node("MatMul", ["x", "w1"], ["a"], "one"),
            helper.make_node("Softmax", ["a"], ["p"], "softmax", axis=-1),
            helper.make_node("MatMul", ["p", "w2"], ["y"], "two"),
        ],
        [("x", [4, 24])], [("y", [4, 24])],
        [array(f"w{at}", floats((24, 24), at, 0.1)) for at in (1, 2)],
    )  # fmt: skip


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_softmax_that_cannot_reach_one_is_a_look(tmp_path: Path, symmetric: bool) -> None:
    options = {"extra_options": {"ActivationSymmetric": True}} if symmetric else {}
    pair = static(tmp_path, attention(), ROWS, **options)
    assert findings(pair, "fixed-range") == []
    (found,) = findings(rewritten(pair, scaled("p_scale", 0.3)), "fixed-range")
    assert (found.tensor, found.node, found.severity) == ("p", "softmax", LOOK)
    assert found.evidence["representable_high"] == pytest.approx(0.3, rel=0.01)
    assert found.remedy.overrides[0] == {"tensor": "p", "low": 0.0, "high": 1.0}


# -- block-axis --------------------------------------------------------------------------------


def square(folder: Path) -> Pair:
    gain = np.float32(10.0 ** np.linspace(-1, 1, 24))
    proto = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "mm")],
        [("x", [4, 24])], [("y", [4, 24])], [array("w", floats((24, 24), 1) * gain)], opset=21,
    )  # fmt: skip
    return static(folder, proto, ROWS, per_channel=True)


def test_scales_along_the_wrong_axis_are_a_problem(tmp_path: Path) -> None:
    pair = square(tmp_path)
    assert findings(pair, "block-axis") == []

    def change(graph: onnx.GraphProto) -> None:
        dq = next(n for n in graph.node if n.input[0] == "w_quantized")
        (axis,) = [a for a in dq.attribute if a.name == "axis"]
        assert axis.i in (1, -1)
        axis.i = 0

    (found,) = findings(rewritten(pair, change), "block-axis")
    assert (found.tensor, found.severity) == ("w", PROBLEM)
    assert (found.evidence["axis_in_file"], found.evidence["axis_expected"]) == (0, 1)


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_of_scales_along_the_wrong_axis_are_a_problem(tmp_path: Path, axis: int) -> None:
    """Blocks of 8 along the rows, written as if they lay along `axis`."""
    gain = 10.0 ** np.linspace(-1, 1, 24).reshape(24, 1)
    weight = (floats((24, 24), 1) * gain).astype(np.float32)
    blocks = weight.astype(np.float64).reshape(3, 8, 24)
    scale = (np.abs(blocks).max(axis=1) / 127).astype(np.float32)
    codes = np.rint(blocks / scale[:, None].astype(np.float64)).reshape(24, 24).astype(np.int8)
    ends = [("x", [4, 24])], [("y", [4, 24])]
    proto = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "mm")], *ends, [array("w", weight)],
        opset=21,
    )  # fmt: skip
    quantized = model(
        [
            helper.make_node("DequantizeLinear", ["wq", "ws"], ["wd"], "dq", axis=axis,
                             block_size=8),
            helper.make_node("MatMul", ["x", "wd"], ["y"], "mm"),
        ],
        *ends,
        [array("wq", codes), array("ws", scale if axis == 0 else scale.reshape(24, 3))],
        opset=21,
    )  # fmt: skip
    found = findings(by_hand(tmp_path, proto, quantized, ROWS), "block-axis")
    assert [f.evidence["axis_expected"] for f in found] == ([] if axis == 0 else [0])


# -- weight-inflated ---------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "many"), [(3.0, 1), (1.3, 0)])
def test_a_scale_much_larger_than_the_weight_needs_is_a_look(
    tmp_path: Path, factor: float, many: int
) -> None:
    pair = regridded(healthy(tmp_path), factor)
    found = findings(pair, "weight-inflated")
    assert len(found) == many
    for one in found:
        assert (one.tensor, one.severity) == ("w", LOOK)
        absmax = np.abs(constants(conv_relu_gemm())["w"]).max()
        assert one.evidence["scale_expected"] == pytest.approx(2 * absmax / 254, rel=1e-6)
        assert one.evidence["scale_ratio"] == pytest.approx(factor, rel=1e-3)
    assert findings(pair, "weight-gain") == []


def test_a_reduced_range_is_not_an_inflated_weight(tmp_path: Path) -> None:
    pair = healthy(tmp_path, reduce_range=True)
    assert findings(pair, "weight-inflated") == []
    assert findings(pair, "weight-inflated", QuantConfig(reduce_range=True).to_json()) == []


# -- negatives-leak ----------------------------------------------------------------------------


def test_a_removed_relu_whose_scale_lets_negatives_through_is_a_look(tmp_path: Path) -> None:
    pair = healthy(tmp_path)
    assert "Relu" not in {n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node}
    assert findings(pair, "negatives-leak") == []
    (found,) = findings(rewritten(pair, set_to("r_zero_point", 0)), "negatives-leak")
    assert (found.tensor, found.node, found.severity) == ("r", "relu", LOOK)
    scale = float(constants(onnx.load(tmp_path / "q.onnx"))["r_scale"])
    assert found.evidence["representable_low"] == -128 * scale


def test_a_relu_that_was_kept_leaks_nothing(tmp_path: Path) -> None:
    pair = healthy(tmp_path, extra_options={"ActivationSymmetric": True})
    assert "Relu" in {n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node}
    assert findings(pair, "negatives-leak") == []


@pytest.mark.parametrize("lost", [True, False])
def test_a_relu_that_a_body_reads_behind_is_lost_to_it_when_folded(
    tmp_path: Path, lost: bool
) -> None:
    feeds = [{"x": floats((1, 4, 8, 8), s)} for s in range(2)]
    options = {} if lost else {"nodes_to_exclude": ["relu"]}
    pair = static(tmp_path, relu_that_a_body_reads_behind(), feeds, **options)
    found = findings(pair, "negatives-leak")
    # What the branch negates is never above zero, unless nobody rectified it.
    assert (max(v.max() for v in pair.tensor("q", "chosen")) > 0) == lost
    assert [(f.tensor, f.node, f.severity) for f in found] == [("z", "relu", PROBLEM)] * lost
    assert all(f.evidence["reader"] == "branch" for f in found)
    assert all(f.remedy.exclude == ("relu",) for f in found)


# -- flag-ignored ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "option"),
    [
        ({"per_channel": True}, "per_channel"),
        ({"reduce_range": True}, "reduce_range"),
        ({"weight_type": "uint8"}, "weight_type"),
        ({"activation_type": "uint8"}, "activation_type"),
        ({"activation_symmetric": True}, "activation_symmetric"),
        ({}, ""),
        ({"weight_symmetric": True}, ""),
    ],
)
def test_an_option_that_the_file_does_not_follow_is_a_look(
    tmp_path: Path, asked: dict[str, Any], option: str
) -> None:
    pair = healthy(tmp_path)
    found = findings(pair, "flag-ignored", QuantConfig(**asked).to_json())
    assert [f.evidence["option"] for f in found] == ([option] if option else [])
    assert {f.severity for f in found} <= {LOOK}
    assert findings(pair, "flag-ignored") == []


# -- preprocess-first --------------------------------------------------------------------------


def test_tensors_that_pre_processing_took_out_are_a_note(tmp_path: Path) -> None:
    pair = healthy(tmp_path)
    assert findings(pair, "preprocess-first") == []
    longer = conv_relu_gemm()
    longer.graph.node[1].output[0] = "r0"
    detour = [helper.make_node("Neg", ["r0"], ["detour"], "neg1"),
              helper.make_node("Neg", ["detour"], ["r"], "neg2")]  # fmt: skip
    nodes = [*longer.graph.node[:2], *detour, *longer.graph.node[2:]]
    del longer.graph.node[:]
    longer.graph.node.extend(nodes)
    save(longer, tmp_path / "f.onnx")
    (found,) = findings(pair, "preprocess-first")
    assert (found.tensor, found.severity) == ("detour", NOTE)


# -- saturation-elsewhere ----------------------------------------------------------------------


def test_large_neighbours_of_int8_weights_are_one_note(tmp_path: Path) -> None:
    pair = healthy(tmp_path)
    found = findings(pair, "saturation-elsewhere")
    values = constants(onnx.load(tmp_path / "q.onnx"))
    over = total = 0
    for codes in (values["w_quantized"].reshape(8, -1), values["gw_quantized"]):
        for row in codes.astype(int):
            for a, b in zip(row[0::2], row[1::2], strict=False):
                over, total = over + (abs(a + b) > 128), total + 1
    assert over > 0
    (one,) = found
    assert (one.evidence["pairs_over_128"], one.evidence["pairs"]) == (over, total)
    assert one.severity == NOTE


def test_a_reduced_range_saturates_nowhere(tmp_path: Path) -> None:
    assert findings(healthy(tmp_path, reduce_range=True), "saturation-elsewhere") == []


# -- off-grid ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stale", [True, False])
def test_a_trained_weight_beside_its_grid_is_a_look(tmp_path: Path, stale: bool) -> None:
    proto = twins()
    for name in ("w1", "w2", "w3"):
        old = stored(proto.graph, name).astype(np.float64)
        scale = float(np.float32(np.abs(old).max() / 127))
        codes = np.rint(old / scale)
        codes.reshape(-1)[np.argmax(np.abs(old))] = 127
        put(proto.graph, name, (codes * scale).astype(np.float32))
    pair = static(tmp_path, proto, ROWS, extra_options={"AddQDQPairToWeight": True})
    if stale:
        rewritten(pair, scaled("w2_scale", 1.03))
    found = findings(pair, "off-grid")
    assert [(f.tensor, f.severity) for f in found] == ([("w2", LOOK)] if stale else [])


def test_weights_that_are_all_rounded_at_run_time_are_healthy(tmp_path: Path) -> None:
    pair = static(tmp_path, twins(), ROWS, extra_options={"AddQDQPairToWeight": True})
    assert findings(pair, "off-grid") == []


# -- other formats and odd files ---------------------------------------------------------------


def dynamic(folder: Path) -> Pair:
    proto = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "mm")],
        [("x", [4, 24])], [("y", [4, 24])], [array("w", floats((24, 24), 1))],
    )  # fmt: skip
    save(proto, folder / "f.onnx")
    quantize_dynamic(folder / "f.onnx", folder / "q.onnx", weight_type=QuantType.QInt8)
    return Pair(folder=folder, feeds=ROWS)


def wide(folder: Path) -> Pair:
    proto = conv_relu_gemm()
    proto.opset_import[0].version = 21
    types = {"activation_type": QuantType.QInt16, "weight_type": QuantType.QInt4}
    return static(folder, proto, IMAGES, **types)


FORMATS: dict[str, Callable[[Path], Pair]] = {
    "integer operators": lambda f: healthy(f, quant_format=OrtFormat.QOperator, per_channel=True),
    "dynamic": dynamic,
    "4 bits in blocks": lambda f: packed(f, 4, False, NBitsFormat.QOperator),
    "8 bits in blocks": lambda f: packed(f, 8, True, NBitsFormat.QOperator),
    "4 bits in blocks, QDQ": lambda f: packed(f, 4, False, NBitsFormat.QDQ),
    "16 and 4 bits": wide,
    "a scalar": scalar,
    "float weights behind Q": lambda f: healthy(f, extra_options={"AddQDQPairToWeight": True}),
    "symmetric": lambda f: healthy(f, extra_options={"ActivationSymmetric": True}),
    "half of the nodes": lambda f: healthy(f, nodes_to_exclude=["gemm"]),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_healthy_files_of_every_format_have_no_problem(tmp_path: Path, kind: str) -> None:
    given = case(FORMATS[kind](tmp_path))
    for code, rule in WEIGHT_RULES.items():
        for finding in rule(given):
            check(finding, code)
            assert finding.severity != PROBLEM


@pytest.mark.parametrize("kind", ["4 bits in blocks, QDQ", "dynamic"])
def test_a_wrong_scale_is_named_in_every_format(tmp_path: Path, kind: str) -> None:
    pair = FORMATS[kind](tmp_path)
    assert findings(pair, "weight-gain") == []

    def change(graph: onnx.GraphProto) -> None:
        name = next(i.name for i in graph.initializer if "scale" in i.name and "w" in i.name)
        scaled(name, 2)(graph)

    (found,) = findings(rewritten(pair, change), "weight-gain")
    assert (found.tensor, found.severity) == ("w", PROBLEM)
    assert found.evidence["gain"] == pytest.approx(2, rel=0.05)


def test_constants_that_are_not_finite_or_all_zero_are_no_fault(tmp_path: Path) -> None:
    proto = model(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"], "mm"),
            helper.make_node("Max", ["m", "floor"], ["n"], "max"),
            helper.make_node("MatMul", ["n", "dead"], ["y"], "dead_mm"),
        ],
        [("x", [4, 24])], [("y", [4, 24])],
        [
            array("w", floats((24, 24), 1)),
            array("floor", np.full((24,), -np.inf, np.float32)),
            array("dead", np.zeros((24, 24), np.float32)),
        ],
    )  # fmt: skip
    given = case(static(tmp_path, proto, ROWS, op_types_to_quantize=["MatMul"]))
    assert problems(given) == []


def test_random_feeds_say_nothing_about_ranges(tmp_path: Path) -> None:
    pair = rewritten(healthy(tmp_path), scaled("r_scale", 4))
    rewritten(pair, scaled("x_scale", 4))
    given = case(pair)
    given = replace(given, comparison=replace(given.comparison, random_feeds=True))
    (found,) = WEIGHT_RULES["activation-scale"](given)
    assert (found.tensor, found.severity) == ("x", PROBLEM)
    assert list(WEIGHT_RULES["half-range"](given)) == []


# -- healthy models ----------------------------------------------------------------------------

REAL = {
    "mlperf-resnet8": ("ort_static_qdq", None),
    "mlperf-kws-dscnn": ("ort_static_qdq", None),
    "mlperf-kws-dscnn by TFLite": ("quantized", None),
    "mlperf-resnet8 by TFLite": ("quantized", None),
    "squeezenet-fp16": ("ort_static_qdq", 3),
    "squeezenet-fp16 in half precision": ("fp16", 2),
    "magika": ("ort_static_qdq", 6),
    "ultraface-rfb320": ("ort_static_qdq", 3),
    "gtcrn": ("ort_static_qdq", 4),
    "fastestdet": ("ort_static_qdq", 4),
    "silero-vad-16k": ("ort_static_qdq", 4),
    "minilm-l6": ("ort_dynamic", 4),
    "minilm-l6 static": ("ort_static_qdq", 4),
}
QUICK = ("mlperf-resnet8", "mlperf-kws-dscnn")


def real(name: str, quantized: str, samples: int | None) -> Case:
    folder = MODELS / name.split()[0]
    return case_of(
        folder / "model.onnx", folder / f"{quantized}.onnx", folder / "inputs", samples=samples
    )


@needs_models
@pytest.mark.parametrize(
    "name",
    # A body of silero-vad-16k reads behind a Relu that was folded away: a problem that is true.
    [
        n if n in QUICK else pytest.param(n, marks=pytest.mark.slow)
        for n in REAL
        if n != "silero-vad-16k"
    ],
)
def test_a_healthy_real_pair_has_no_problem(name: str) -> None:
    given = real(name, *REAL[name])
    for code, rule in WEIGHT_RULES.items():
        for finding in rule(given):
            check(finding, code)
    assert problems(given) == []


def test_the_sample_transformer_has_no_problem() -> None:
    folder = ROOT / "sample_models" / "digit-transformer"
    given = case_of(
        folder / "float.onnx", folder / "quantized.onnx", folder / "feeds.npz", samples=4
    )
    assert problems(given) == []
    # Two nodes that the matching may take for each other are no swapped weights.
    assert {f.severity for f in WEIGHT_RULES["weights-swapped"](given)} <= {NOTE}
