"""Cross-layer equalization: the same outputs from evened-out channels, from rule to file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import streamlit as st
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization import CalibrationDataReader

from inspector import workbench
from inspector.calibration import hushed
from inspector.cli import main
from inspector.commands import inspector_command, onnxruntime_call, onnxruntime_command
from inspector.compare import compare_models
from inspector.diagnosis import RecipeGainOf, diagnose, requantized_gain
from inspector.equalize import (
    MARK,
    Equalized,
    comparable_float,
    equal_db,
    equalize,
    equalized_notes,
    is_equalized,
)
from inspector.errors import QuantizationError
from inspector.feeds import load_feeds, split_calibration
from inspector.findings import LOOK, NOTE, PROBLEM, Case, Finding, Remedy, case_of
from inspector.live import diagnose_run, preview_list
from inspector.metrics import sqnr_db
from inspector.model import Model
from inspector.model_files import load_model
from inspector.prepare import prepare
from inspector.quantize import quantize_model
from inspector.recipe import QuantConfig, config_options, read_recipe
from inspector.runtime import open_session
from inspector.store import FeedSource, Workspace
from inspector.web import forms, session
from inspector.weight_rules import channel_range
from tests.samples import MODELS, array, floats, model, needs_models, npz_folder, save
from tests.test_pages import app, wait, words

Values = NDArray[np.float64]


# -- models -------------------------------------------------------------------------------------


def unequal_depthwise(spread: float = 1000.0) -> onnx.ModelProto:
    """Pointwise, Relu, depthwise, Relu, pointwise, with channels of `spread` to 1 in all of them.

    Made of even weights: channel i of a layer grows by what the next one divides it by.
    """
    first, second = (
        np.geomspace(1, spread, 16)[np.random.default_rng(seed).permutation(16)] for seed in (1, 2)
    )
    w1 = floats((16, 3, 1, 1), 3) * first[:, None, None, None]
    b1 = floats((16,), 4, 0.1) * first
    w2 = floats((16, 1, 3, 3), 5) * (second / first)[:, None, None, None]
    b2 = floats((16,), 6, 0.1) * second
    w3 = floats((4, 16, 1, 1), 7) / second[:, None, None]
    constants = {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "w3": w3}
    return model(
        [
            helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "wide"),
            helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
            helper.make_node(
                "Conv", ["r1", "w2", "b2"], ["c2"], "depthwise", group=16, pads=[1, 1, 1, 1]
            ),
            helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
            helper.make_node("Conv", ["r2", "w3"], ["y"], "narrow"),
        ],
        [("x", [1, 3, 8, 8])],
        [("y", [1, 4, 8, 8])],
        [array(name, values.astype(np.float32)) for name, values in constants.items()],
    )


IMAGES = [{"x": floats((1, 3, 8, 8), 20 + seed)} for seed in range(6)]


def constants_of(made: Model) -> dict[str, Values]:
    values = {n: made.constant(n) for n in made.constant_names}
    return {n: np.asarray(v, np.float64) for n, v in values.items()}


def between(
    nodes: Sequence[onnx.NodeProto], constants: Sequence[onnx.TensorProto], *, opset: int = 17
) -> onnx.ModelProto:
    """Two Convs with nodes between them, from tensor "a" to tensor "z"; channels 300 to 1."""
    gain = np.geomspace(1, 300, 6).astype(np.float32)[:, None, None, None]
    return model(
        [
            helper.make_node("Conv", ["x", "v1", "d1"], ["a"], "one", pads=[1, 1, 1, 1]),
            *nodes,
            helper.make_node("Conv", ["z", "v2"], ["y"], "two"),
        ],
        [("x", [1, 3, 8, 8])],
        [("y", None)],
        [
            array("v1", floats((6, 3, 3, 3), 1) * gain),
            array("d1", floats((6,), 2)),
            array("v2", floats((5, 6, 1, 1), 3)),
            *constants,
        ],
        opset=opset,
    )


def node(op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, list(inputs), [output], f"{op_type}_{output}", **attributes)


def reference(proto: onnx.ModelProto, feed: dict[str, Any]) -> Values:
    """The first output in float64, by ONNX's reference evaluator."""
    wide = onnx.ModelProto()
    wide.CopyFrom(proto)
    for tensor in wide.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float64), tensor.name))
    for each in (*wide.graph.input, *wide.graph.output):
        each.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    found = ReferenceEvaluator(wide).run(None, {k: v.astype(np.float64) for k, v in feed.items()})
    return np.asarray(found[0], np.float64)


def reasons(made: Equalized) -> dict[str, str]:
    return {each.node: each.reason for each in made.skipped}


# -- what is computed ----------------------------------------------------------------------------


def test_one_pair_is_divided_by_the_root_of_both_ranges() -> None:
    proto = between([node("Relu", ["a"], "z")], [])
    float_model = Model(proto)
    made = equalize(float_model)
    (pair,) = made.pairs
    old, new = constants_of(float_model), constants_of(made.model)
    first = np.maximum(np.abs(old["v1"]).max(axis=(1, 2, 3)), np.abs(old["d1"]))
    second = np.abs(old["v2"]).max(axis=(0, 2, 3))
    factors = np.sqrt(first / second)
    np.testing.assert_allclose(pair.factors, factors, rtol=1e-9)
    np.testing.assert_allclose(new["v1"], old["v1"] / factors[:, None, None, None], rtol=1e-6)
    np.testing.assert_allclose(new["d1"], old["d1"] / factors, rtol=1e-6)
    np.testing.assert_allclose(new["v2"], old["v2"] * factors[None, :, None, None], rtol=1e-6)
    assert (pair.first, pair.second, pair.through) == ("one", "two", ("Relu_z",))
    assert pair.first_ratio_before == pytest.approx(first.max() / first.min())
    assert pair.second_ratio_before == pytest.approx(second.max() / second.min())
    roots = np.sqrt(first * second)
    assert pair.first_ratio_after == pytest.approx(roots.max() / roots.min())
    assert pair.second_ratio_after == pytest.approx(roots.max() / roots.min())


def test_a_chain_settles_where_all_neighbours_have_the_same_ranges() -> None:
    made = equalize(Model(unequal_depthwise()))
    assert [(p.first, p.second) for p in made.pairs] == [
        ("wide", "depthwise"),
        ("depthwise", "narrow"),
    ]
    new = constants_of(made.model)
    wide = np.maximum(np.abs(new["w1"]).max(axis=(1, 2, 3)), np.abs(new["b1"]))
    deep = np.abs(new["w2"]).max(axis=(1, 2, 3))
    np.testing.assert_allclose(wide, deep, rtol=1e-3)
    deep = np.maximum(deep, np.abs(new["b2"]))
    np.testing.assert_allclose(deep, np.abs(new["w3"]).max(axis=(0, 2, 3)), rtol=1e-3)
    assert all(p.first_ratio_after < 10 < 100 < p.first_ratio_before for p in made.pairs)


def test_the_outputs_stay_those_of_float64() -> None:
    proto = unequal_depthwise()
    made = equalize(Model(proto))
    for feed in IMAGES:
        expected = reference(proto, feed)
        assert sqnr_db(expected, reference(made.model.proto, feed)) > 120
    found = equal_db(Model(proto), made.model, IMAGES)
    assert found["y"] > 110


ROUTES: dict[str, tuple[list[onnx.NodeProto], list[onnx.TensorProto]]] = {
    "nothing": ([node("Identity", ["a"], "z")], []),
    "LeakyRelu": ([node("LeakyRelu", ["a"], "z", alpha=0.3)], []),
    "PRelu": (
        [node("PRelu", ["a", "slope"], "z")],
        [array("slope", floats((6, 1, 1), 9))],
    ),
    "Clip without an upper limit": (
        [node("Clip", ["a", "zero"], "z")],
        [array("zero", np.float32(0))],
    ),
    "BatchNormalization": (
        [node("BatchNormalization", ["a", "g", "be", "m", "v"], "n"), node("Relu", ["n"], "z")],
        [
            array("g", floats((6,), 4)),
            array("be", floats((6,), 5)),
            array("m", floats((6,), 6)),
            array("v", np.abs(floats((6,), 7)) + 0.1),
        ],
    ),
    "arithmetic per channel": (
        [
            node("Mul", ["a", "k"], "b"),
            node("Sub", ["t", "b"], "c"),
            node("Relu", ["c"], "d"),
            node("Add", ["d", "one"], "e"),
            node("Div", ["e", "k"], "z"),
        ],
        [
            array("k", np.abs(floats((1, 6, 1, 1), 4)) + 0.1),
            array("t", floats((6, 1, 1), 5)),
            array("one", np.float32(0.7)),
        ],
    ),
    "pools and padding": (
        [
            node("MaxPool", ["a"], "b", kernel_shape=[2, 2]),
            node("Pad", ["b", "pads"], "c"),
            node("AveragePool", ["c"], "d", kernel_shape=[2, 2], pads=[1, 1, 1, 1]),
            node("Abs", ["d"], "e"),
            node("Dropout", ["e"], "z"),
        ],
        [array("pads", np.int64([0, 0, 1, 0, 0, 0, 0, 1]))],
    ),
}


@pytest.mark.parametrize("route", ROUTES)
def test_channels_keep_their_outputs_through(route: str) -> None:
    proto = between(*ROUTES[route])
    made = equalize(Model(proto))
    (pair,) = made.pairs
    assert len(pair.through) == len(ROUTES[route][0])
    feed = {"x": floats((1, 3, 8, 8), 30)}
    assert sqnr_db(reference(proto, feed), reference(made.model.proto, feed)) > 120
    assert pair.first_ratio_after < pair.first_ratio_before


def test_a_batch_normalization_counts_as_folded_into_its_layer() -> None:
    proto = between(*ROUTES["BatchNormalization"])
    made = equalize(Model(proto), alike_ratio=1.0)
    old = constants_of(Model(proto))
    gain = old["g"] / np.sqrt(old["v"] + 1e-5)
    weights = np.abs(old["v1"]).max(axis=(1, 2, 3)) * np.abs(gain)
    bias = np.abs((old["d1"] - old["m"]) * gain + old["be"])
    second = np.abs(old["v2"]).max(axis=(0, 2, 3))
    expected = np.sqrt(np.maximum(weights, bias) / second)
    np.testing.assert_allclose(made.pairs[0].factors, expected, rtol=1e-6)


@pytest.mark.parametrize("trans", [0, 1])
def test_gemms_are_layers_whichever_way_their_weights_lie(trans: int) -> None:
    gain = np.geomspace(1, 500, 7)
    weights = (floats((7, 4), 1) * gain[:, None], floats((3, 7), 2))
    stored = [w if trans else w.T for w in weights]
    proto = model(
        [
            helper.make_node("Gemm", ["x", "w", "b"], ["a"], "one", transB=trans, alpha=0.5),
            helper.make_node("Relu", ["a"], ["r"], "relu"),
            helper.make_node("Gemm", ["r", "u"], ["y"], "two", transB=trans),
        ],
        [("x", [2, 4])],
        [("y", [2, 3])],
        [
            array("w", stored[0].astype(np.float32)),
            array("b", np.float32(0.25)),
            array("u", stored[1].astype(np.float32)),
        ],
    )
    made = equalize(Model(proto))
    feed = {"x": floats((2, 4), 8)}
    assert sqnr_db(reference(proto, feed), reference(made.model.proto, feed)) > 120
    first = np.maximum(0.5 * np.abs(weights[0]).max(axis=1), 0.25)
    expected = np.sqrt(first / np.abs(weights[1]).max(axis=0))
    np.testing.assert_allclose(made.pairs[0].factors, expected, rtol=1e-6)


def test_groups_and_transposed_convolutions_are_layers() -> None:
    gain = np.geomspace(1, 500, 8).astype(np.float32)
    proto = model(
        [
            helper.make_node("Conv", ["x", "w"], ["a"], "one", group=2),
            helper.make_node("Relu", ["a"], ["r"], "relu"),
            helper.make_node("ConvTranspose", ["r", "u", "b"], ["t"], "two", group=4),
            helper.make_node("LeakyRelu", ["t"], ["l"], "leaky"),
            helper.make_node("Conv", ["l", "k"], ["y"], "three", group=3),
        ],
        [("x", [1, 4, 5, 5])],
        [("y", None)],
        [
            array("w", floats((8, 2, 1, 1), 1) * gain[:, None, None, None]),
            array("u", floats((8, 3, 2, 2), 2)),
            array("b", floats((12,), 3, 30.0)),
            array("k", floats((6, 4, 1, 1), 4)),
        ],
    )
    made = equalize(Model(proto))
    assert [(p.first, p.channels) for p in made.pairs] == [("one", 8), ("two", 12)]
    # ONNX's reference evaluator knows no groups in a ConvTranspose.
    found = equal_db(Model(proto), made.model, [{"x": floats((1, 4, 5, 5), 9)}])
    assert found["y"] > 110


def test_dead_channels_are_left_alone() -> None:
    proto = between([node("Relu", ["a"], "z")], [])
    first, last = proto.graph.initializer[0], proto.graph.initializer[2]
    w1, w2 = (onnx.numpy_helper.to_array(t).copy() for t in (first, last))
    w1[1], w2[:, 4] = 0, 0
    first.CopyFrom(array("v1", w1))
    last.CopyFrom(array("v2", w2))
    made = equalize(Model(proto))
    (pair,) = made.pairs
    assert (pair.channels, pair.dead) == (6, 2)
    w1[[0, 2, 3]] = 0
    buried = onnx.ModelProto()
    buried.CopyFrom(proto)
    buried.graph.initializer[0].CopyFrom(array("v1", w1))
    assert reasons(equalize(Model(buried)))["one"].startswith("has fewer than two channels")
    assert (pair.factors[1], pair.factors[4]) == (1.0, 1.0)
    assert np.isfinite(pair.factors).all()
    assert equal_db(Model(proto), made.model, [{"x": floats((1, 3, 8, 8), 3)}])["y"] > 110


def test_whole_numbers_are_judged_only_where_there_are_no_others() -> None:
    def with_place(gain: float, *, alone: bool) -> Model:
        proto = model(
            [
                helper.make_node("Mul", ["x", "k"], ["y"]),
                helper.make_node("ArgMax", ["y"], ["place"], axis=1),
                helper.make_node("NonZero", ["y"], ["found"]),
            ],
            [("x", [1, 3])],
            [] if alone else [("y", [1, 3])],
            [array("k", np.float32([[1, gain, 0]]))],
        )
        for name in ("place", "found"):
            proto.graph.output.append(helper.make_tensor_value_info(name, 7, None))
        return Model(proto)

    feeds = [{"x": np.float32([[1, 1, 1]])}]
    close = with_place(1.000001, alone=False), with_place(0.999999, alone=False)
    found = equal_db(*close, feeds)
    assert (found["found"], found["place"]) == (np.inf, 0.0)
    with pytest.raises(QuantizationError, match="output 'place' of model"):
        equal_db(with_place(1.000001, alone=True), with_place(0.999999, alone=True), feeds)
    with pytest.raises(QuantizationError, match=r"output 'found' of model .* nan dB"):
        equal_db(with_place(0.5, alone=True), with_place(0.0, alone=True), feeds)


# -- what is left alone --------------------------------------------------------------------------


def test_every_layer_is_in_a_pair_or_says_why_not() -> None:
    made = equalize(Model(unequal_depthwise()))
    assert reasons(made) == {"narrow": "gives an output of the model"}


LEFT: dict[str, tuple[list[onnx.NodeProto], list[onnx.TensorProto], str]] = {
    "Relu6": (
        [node("Clip", ["a", "low", "high"], "z")],
        [array("low", np.float32(0)), array("high", np.float32(6))],
        "is followed by Clip Clip_z with limits 0 and 6",
    ),
    "Sigmoid": ([node("Sigmoid", ["a"], "z")], [], "is followed by Sigmoid Sigmoid_z"),
    "two readers": (
        [node("Relu", ["a"], "r"), node("Neg", ["r"], "n"), node("Add", ["r", "n"], "z")],
        [],
        "is read by 2 nodes",
    ),
    "a computed gate": (
        [node("ReduceMean", ["x"], "g", keepdims=1), node("Mul", ["a", "g"], "z")],
        [],
        "is joined with a computed tensor by Mul Mul_z",
    ),
    "padding with ones": (
        [node("Pad", ["a", "pads", "one"], "z")],
        [array("pads", np.int64([0, 0, 1, 0, 0, 0, 0, 1])), array("one", np.float32(1))],
        "is followed by Pad Pad_z",
    ),
    "a divisor": (
        [node("Div", ["k", "a"], "z")],
        [array("k", np.float32(3))],
        "is divided by in Div_z",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_does_not_scale_is_left_with_its_reason(case: str) -> None:
    nodes, constants, reason = LEFT[case]
    float_model = Model(between(nodes, constants))
    made = equalize(float_model)
    assert made.pairs == ()
    assert made.model is float_model
    assert reasons(made)["one"].startswith(reason)
    assert equalized_notes(made)[0].startswith("equalization is without effect")


def test_channels_that_are_alike_have_nothing_to_gain() -> None:
    proto = unequal_depthwise(spread=1.0)
    made = equalize(Model(proto))
    assert made.pairs == ()
    assert reasons(made)["wide"] == "has channels of much the same range"
    assert len(equalize(Model(proto), alike_ratio=1.0).pairs) == 2


def test_a_tensor_that_is_an_output_too_keeps_its_values() -> None:
    proto = between([node("Relu", ["a"], "z")], [])
    proto.graph.output.append(helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None))
    made = equalize(Model(proto))
    assert reasons(made)["one"] == "gives an output of the model"


def test_shared_weights_are_left_alone_and_a_shared_bias_stays_with_the_other() -> None:
    proto = between([node("Relu", ["a"], "z")], [])
    proto.graph.node.append(helper.make_node("Conv", ["x", "v1", "d1"], ["s"], "twin"))
    proto.graph.output.append(helper.make_tensor_value_info("s", onnx.TensorProto.FLOAT, None))
    shared = equalize(Model(proto))
    assert reasons(shared)["one"] == "shares its weight with another node"
    proto.graph.node[-1].input[1] = "other"
    proto.graph.initializer.append(array("other", floats((6, 3, 3, 3), 8)))
    float_model = Model(proto)
    made = equalize(float_model)
    assert len(made.pairs) == 1
    np.testing.assert_array_equal(made.model.constant("d1"), float_model.constant("d1"))
    assert made.model.node_by_name["one"].inputs[2] == "d1_equalized"
    assert min(equal_db(float_model, made.model, IMAGES).values()) > 110


def test_odd_weights_are_left_with_their_reasons() -> None:
    proto = between([node("Relu", ["a"], "z")], [])
    values = onnx.numpy_helper.to_array(proto.graph.initializer[0]).copy()
    values[0, 0, 0, 0] = np.nan
    proto.graph.initializer[0].CopyFrom(array("v1", values))
    assert reasons(equalize(Model(proto)))["one"] == "has NaN or infinity in its weight"
    proto.graph.node[0].input[1] = "w"
    proto.graph.input.append(helper.make_tensor_value_info("w", 1, [6, 3, 3, 3]))
    assert reasons(equalize(Model(proto)))["one"] == "has a weight that is computed"


def test_weights_in_constant_nodes_are_rewritten_where_they_are() -> None:
    proto = between([node("Relu", ["a"], "z")], [])
    for tensor in list(proto.graph.initializer):
        constant = helper.make_node("Constant", [], [tensor.name], f"c_{tensor.name}", value=tensor)
        proto.graph.node.insert(0, constant)
    del proto.graph.initializer[:]
    made = equalize(Model(proto))
    assert len(made.pairs) == 1
    assert len(made.model.proto.graph.initializer) == 0
    assert equal_db(Model(proto), made.model, IMAGES)["y"] > 110


# -- the check -----------------------------------------------------------------------------------


def test_another_model_is_refused_with_its_figure() -> None:
    proto = unequal_depthwise()
    other = onnx.ModelProto()
    other.CopyFrom(proto)
    values = onnx.numpy_helper.to_array(other.graph.initializer[4])
    other.graph.initializer[4].CopyFrom(array("w3", values * np.float32(1.001)))
    with pytest.raises(QuantizationError, match=r"agrees .* to 60\.0 dB only, expected 80 or more"):
        equal_db(Model(proto), Model(other), IMAGES)


def test_the_float_file_is_never_touched_and_a_model_is_equalized_once(tmp_path: Path) -> None:
    path = save(unequal_depthwise(), tmp_path / "m.onnx")
    before = path.read_bytes()
    float_model = load_model(path)
    made = equalize(float_model)
    assert path.read_bytes() == before
    assert float_model.proto.SerializeToString() == load_model(path).proto.SerializeToString()
    assert is_equalized(made.model)
    assert not is_equalized(float_model)
    assert equalize(made.model).model is made.model
    assert comparable_float(float_model, float_model) is float_model
    assert comparable_float(float_model, made.model) is made.model
    assert comparable_float(made.model, made.model) is made.model


DEPTHWISE = ["fastestdet", "mlperf-kws-dscnn", "ultraface-rfb320", "gtcrn"]


@needs_models
@pytest.mark.parametrize("name", DEPTHWISE)
def test_real_models_give_the_same_with_all_their_pairs_evened_out(name: str) -> None:
    float_model = load_model(MODELS / name / "model.onnx")
    feeds = load_feeds(MODELS / name / "inputs", float_model, limit=2)
    made = equalize(float_model, alike_ratio=1.0)
    expected = {"fastestdet": 41, "mlperf-kws-dscnn": 8, "ultraface-rfb320": 35, "gtcrn": 6}
    assert len(made.pairs) == expected[name]
    layers = [n for n in float_model.nodes if n.op_type in ("Conv", "ConvTranspose", "Gemm")]
    assert len(made.pairs) + len(made.skipped) == len(layers)
    assert min(equal_db(float_model, made.model, feeds).values()) > 110


# -- in a recipe ---------------------------------------------------------------------------------


def quantized(
    float_model: Model, config: QuantConfig, folder: Path, feeds: Sequence[dict[str, Any]] = IMAGES
) -> tuple[Model, tuple[str, ...]]:
    folder.mkdir(exist_ok=True)
    calibration = load_feeds(npz_folder(folder / "feeds", feeds), float_model)
    made = quantize_model(
        float_model, config, calibration=calibration, output=folder / "q.onnx", cache=folder / "c"
    )
    return load_model(made.path), made.notes


def output_db(float_model: Model, quantized_model: Model) -> float:
    sessions = [open_session(m, optimized=False) for m in (float_model, quantized_model)]
    values = [np.stack([s.run(feed)["y"] for feed in IMAGES]) for s in sessions]
    return sqnr_db(*values)


def test_a_depthwise_model_that_int8_ruins_per_tensor_is_saved(tmp_path: Path) -> None:
    float_model = load_model(save(unequal_depthwise(), tmp_path / "m.onnx"))
    plain, _ = quantized(float_model, QuantConfig(), tmp_path / "plain")
    made, notes = quantized(float_model, QuantConfig(equalize=True), tmp_path / "equalized")
    assert output_db(float_model, plain) < 10
    assert output_db(float_model, made) > 30
    assert any(note.startswith("2 pairs of layers were equalized") for note in notes)
    assert any("outputs are the same to 1" in note for note in notes)


def test_a_finished_file_says_that_it_was_equalized(tmp_path: Path) -> None:
    float_model = load_model(save(unequal_depthwise(), tmp_path / "m.onnx"))
    for config in (
        QuantConfig(equalize=True),
        QuantConfig(equalize=True, preprocess=False, per_channel=True),
        QuantConfig(equalize=True, format="qoperator"),
        QuantConfig(equalize=True, format="dynamic"),
    ):
        made, _ = quantized(float_model, config, tmp_path / config.format)
        assert read_recipe(made, float_model).config.equalize
    made, _ = quantized(float_model, QuantConfig(), tmp_path / "plain")
    assert not read_recipe(made, float_model).config.equalize


def test_inner_tensors_are_compared_with_the_equalized_model(tmp_path: Path) -> None:
    float_model = load_model(save(unequal_depthwise(), tmp_path / "m.onnx"))
    made, _ = quantized(float_model, QuantConfig(equalize=True), tmp_path / "q")
    feeds = load_feeds(tmp_path / "q" / "feeds", float_model)
    found = compare_models(float_model, made, feeds, measure_latency=False)
    assert found.float_model.sha256 == float_model.sha256
    assert found.outputs[0].sqnr_db == pytest.approx(output_db(float_model, made), abs=0.01)
    assert min(w.sqnr_db for w in found.weights) > 25
    assert min(a.accumulated_sqnr_db for a in found.activations) > 25
    assert any("whose outputs are the float model's to 1" in w for w in found.warnings)
    # Set beside the float model as it is, all this is nonsense.
    unmarked = onnx.ModelProto()
    unmarked.CopyFrom(made.proto)
    kept = [p for p in unmarked.metadata_props if p.key != MARK]
    del unmarked.metadata_props[:]
    unmarked.metadata_props.extend(kept)
    plain = compare_models(float_model, Model(unmarked), feeds, measure_latency=False)
    assert min(w.sqnr_db for w in plain.weights) < 5


def test_a_file_that_says_so_falsely_is_still_compared(tmp_path: Path) -> None:
    float_model = load_model(save(unequal_depthwise(), tmp_path / "m.onnx"))
    plain, _ = quantized(float_model, QuantConfig(), tmp_path / "q")
    lying = onnx.ModelProto()
    lying.CopyFrom(plain.proto)
    lying.metadata_props.append(onnx.StringStringEntryProto(key=MARK, value="1"))
    feeds = load_feeds(tmp_path / "q" / "feeds", float_model)
    found = compare_models(float_model, Model(lying), feeds, measure_latency=False)
    assert found.outputs[0].sqnr_db == pytest.approx(output_db(float_model, plain), abs=0.01)


def test_the_option_goes_through_json_and_the_command_line() -> None:
    config = QuantConfig(equalize=True)
    assert config.to_json()["equalize"] is True
    assert "equalize" not in QuantConfig().to_json()
    assert QuantConfig.from_json(config.to_json()) == config
    assert config_options(config) == ["--equalize"]
    assert "--equalize" in inspector_command(config)
    with pytest.raises(QuantizationError, match="equalize is 'yes', expected true or false"):
        QuantConfig.from_json({"equalize": "yes"})


def test_exclusions_name_the_same_nodes_with_and_without(tmp_path: Path) -> None:
    float_model = load_model(save(unequal_depthwise(), tmp_path / "m.onnx"))
    config = QuantConfig(equalize=True)
    plain = prepare(float_model, replace(config, equalize=False), tmp_path)
    made = prepare(float_model, config, tmp_path)
    assert made.successors == plain.successors
    assert made.model.sha256 != plain.model.sha256


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.feeds = iter(IMAGES)

    def get_next(self) -> Any:
        return next(self.feeds, None)


def test_the_python_call_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    float_model = load_model(save(unequal_depthwise(), tmp_path / "m.onnx"))
    config = QuantConfig(equalize=True, per_channel=True)
    quantized(float_model, config, tmp_path / "q")
    prepared = prepare(float_model, config, tmp_path / "q" / "c")
    text = onnxruntime_call(config, prepared=prepared, model="m.onnx", output="out.onnx")
    monkeypatch.chdir(tmp_path)
    with hushed():
        exec(text, {"calibration_data_reader": Reader()})
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "q" / "q.onnx").read_bytes()
    assert "no option for equalization" in onnxruntime_command(config)


def test_the_command_line_equalizes_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUANT_INSPECTOR_DATA", str(tmp_path / "data"))
    path = save(unequal_depthwise(), tmp_path / "m.onnx")
    feeds = npz_folder(tmp_path / "feeds", IMAGES)
    words = ["quantize", str(path), "-o", str(tmp_path / "q.onnx"), "--inputs", str(feeds)]
    assert main([*words, "--equalize"]) == 0
    first = capsys.readouterr()
    assert "2 pairs of layers were equalized" in first.err
    assert is_equalized(load_model(tmp_path / "q.onnx"))
    # The file's own recipe equalizes, unless it is told not to.
    again = ["--recipe", str(tmp_path / "q.onnx"), "-o", str(tmp_path / "again.onnx")]
    assert main([*words[:2], *again, "--inputs", str(feeds)]) == 0
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "q.onnx").read_bytes()
    assert main([*words[:2], *again, "--inputs", str(feeds), "--no-equalize"]) == 0
    assert not is_equalized(load_model(tmp_path / "again.onnx"))


def test_an_equalized_run_works_in_the_app(tmp_path: Path) -> None:
    path = save(unequal_depthwise(), tmp_path / "m.onnx")
    feeds = npz_folder(tmp_path / "feeds", IMAGES)
    root = tmp_path / "workspace"
    source = FeedSource(kind="path", path=str(feeds), title="feeds")
    first = workbench.load_pair(root, float_path=path, quantized_path=None, inputs=source)
    config = QuantConfig(equalize=True).to_json()
    run_id = workbench.requantize(root, run_id=first, config=config, exclude=["narrow"])
    run = Workspace(root).run(run_id)
    before, after = run.summary["before"][0]["sqnr_db"], run.summary["outputs"][0]["sqnr_db"]
    assert after > before > 25
    assert "--equalize" in run.summary["commands"]["inspector"]
    for tensor, kind in (("r1", "activation"), ("w2", "weight")):
        detail = workbench.inspect_tensor(root, run_id=run_id, tensor=tensor, kind=kind)
        # Rounding moves a weight by half a step at most; other weights would be far off.
        edges = np.asarray(detail["error_edges"])
        assert kind == "activation" or np.abs(edges).max() < 0.6
    graph = workbench.graph_of_run(root, run_id=run_id)
    assert graph["links"]["float"]["depthwise"]["partners"]
    assert onnx.load(graph["float"]).graph.node[0].name == "wide"


def test_nodes_of_an_equalized_file_are_freed_with_the_weights_it_was_made_of(
    tmp_path: Path,
) -> None:
    path = save(unequal_depthwise(), tmp_path / "m.onnx")
    float_model = load_model(path)
    made, _ = quantized(float_model, QuantConfig(equalize=True), tmp_path / "q")
    feeds, out = tmp_path / "q" / "feeds", tmp_path / "freed.onnx"
    words = ["free", str(path), str(made.path), "-o", str(out), "--exclude", "depthwise"]
    assert main([*words, "--inputs", str(feeds)]) == 0
    freed = load_model(out)
    assert is_equalized(freed)
    source = equalize(float_model).model.constant("w2")
    assert source is not None
    kept = [freed.constant(name) for name in freed.constant_names]
    assert any(v is not None and v.shape == source.shape and (v == source).all() for v in kept)
    assert output_db(float_model, freed) > 30

    root = tmp_path / "workspace"
    inputs = FeedSource(kind="path", path=str(feeds), title="feeds")
    loaded = workbench.load_pair(root, float_path=path, quantized_path=made.path, inputs=inputs)
    run = Workspace(root).run(workbench.free_in_file(root, run_id=loaded, exclude=["depthwise"]))
    assert run.summary["outputs"][0]["sqnr_db"] == pytest.approx(
        output_db(float_model, freed), abs=0.01
    )
    preview = preview_list(root, run_id=loaded, config=None, exclude=["depthwise"])
    assert preview["outputs"][0]["sqnr_db"] == pytest.approx(
        run.summary["outputs"][0]["sqnr_db"], abs=0.05
    )
    # The loaded file's recipe equalizes: so does a preview of re-quantizing it.
    recipe = Workspace(root).run(loaded).recipe
    assert recipe["equalize"] is True
    again = preview_list(root, run_id=loaded, config=recipe, exclude=[])
    assert again["outputs"][0]["sqnr_db"] == pytest.approx(output_db(float_model, made), abs=0.05)


def test_weights_beside_the_model_are_read_and_their_file_is_not_written(tmp_path: Path) -> None:
    proto = between([node("Relu", ["a"], "z")], [array("big", floats((64, 3, 3, 3), 6))])
    proto.graph.node.append(helper.make_node("Conv", ["x", "big"], ["s"], "other"))
    proto.graph.output.append(helper.make_tensor_value_info("s", onnx.TensorProto.FLOAT, None))
    inside = equalize(Model(proto)).model
    onnx.save_model(
        proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )
    before = (tmp_path / "m.data").read_bytes()
    outside = equalize(load_model(tmp_path / "m.onnx", inside_bytes=0)).model
    for name in ("v1", "d1", "v2", "big"):
        np.testing.assert_array_equal(outside.constant(name), inside.constant(name))
    assert (tmp_path / "m.data").read_bytes() == before


# -- as a remedy ---------------------------------------------------------------------------------


def diagnosed(
    proto: onnx.ModelProto, config: QuantConfig, folder: Path
) -> tuple[Case, Model, RecipeGainOf]:
    """What the rules look at, and what measures recipes."""
    float_model = load_model(save(proto, folder / "m.onnx"))
    made, _ = quantized(float_model, config, folder / "q")
    feeds = load_feeds(folder / "q" / "feeds", float_model)
    found = compare_models(float_model, made, feeds, measure_latency=False)
    case = case_of(found, float_model, made, config.to_json())
    gain_of = requantized_gain(
        case, config, feeds, split_calibration(feeds), cache=folder / "q" / "c",
        float_model=float_model, made_so=True,
    )  # fmt: skip
    return case, float_model, gain_of


def offers(findings: Sequence[Finding]) -> list[Finding]:
    return [f for f in findings if f.remedy.recipe == {"equalize": True}]


def test_weights_with_one_scale_between_layers_get_the_remedy_measured(tmp_path: Path) -> None:
    case, float_model, gain_of = diagnosed(unequal_depthwise(), QuantConfig(), tmp_path)
    (offer,) = offers(list(channel_range(case)))
    assert offer.severity == LOOK
    assert offer.evidence["pairs"] == 2
    (found,) = offers(diagnose(case, recipe_gain_of=gain_of))
    assert found.severity == PROBLEM
    assert found.evidence["recipe_before_db"] == pytest.approx(
        output_db(float_model, case.quantized_model), abs=0.01
    )
    after, _ = quantized(float_model, QuantConfig(equalize=True), tmp_path / "after")
    assert found.evidence["recipe_after_db"] == pytest.approx(
        output_db(float_model, after), abs=0.01
    )
    gain = found.evidence["recipe_after_db"] - found.evidence["recipe_before_db"]
    assert found.evidence["recipe_gain_db"] == pytest.approx(gain)
    assert gain > 20


def test_with_a_scale_per_channel_uneven_activations_get_the_remedy(tmp_path: Path) -> None:
    proto = unequal_depthwise(spread=1e5)
    config = QuantConfig(per_channel=True)
    case, _, gain_of = diagnosed(proto, config, tmp_path)
    (found,) = offers(diagnose(case, recipe_gain_of=gain_of))
    record = next(a for a in case.comparison.activations if a.name == found.tensor)
    ranges = np.maximum(np.abs(record.channel_low), np.abs(record.channel_high))
    assert found.evidence["largest_by_median"] == pytest.approx(ranges.max() / np.median(ranges))
    assert found.evidence["median_channel_sqnr_db"] < 20
    assert found.evidence["recipe_gain_db"] > 3


def test_an_equalized_or_even_model_gets_no_offer(tmp_path: Path) -> None:
    for name, proto, config in (
        ("done", unequal_depthwise(), QuantConfig(equalize=True)),
        ("even", unequal_depthwise(spread=1.0), QuantConfig()),
    ):
        folder = tmp_path / name
        folder.mkdir()
        case, _, _ = diagnosed(proto, config, folder)
        assert is_equalized(case.float_model) is config.equalize
        assert offers(list(channel_range(case))) == []


def test_layers_that_nothing_can_be_given_to_get_no_offer(tmp_path: Path) -> None:
    nodes, constants, _ = LEFT["Relu6"]
    case, _, _ = diagnosed(between(nodes, constants), QuantConfig(), tmp_path)
    found = list(channel_range(case))
    assert found
    assert offers(found) == []


def test_a_recipe_that_is_not_measured_says_why(tmp_path: Path) -> None:
    case, _, gain_of = diagnosed(unequal_depthwise(), QuantConfig(), tmp_path)
    refused = gain_of(Remedy(say="", recipe={"weight_type": "uint8"}))
    assert refused["reason"].startswith("ONNX Runtime has no kernels for int8 activations")
    same = gain_of(Remedy(say="", recipe={"per_channel": False}))
    assert same == {"reason": "the recipe has this already"}
    (found,) = offers(diagnose(case, recipe_gain_of=lambda _: {"reason": "no time"}))
    assert (found.severity, found.evidence["recipe_not_measured"]) == (LOOK, "no time")
    (found,) = offers(
        diagnose(case, recipe_gain_of=lambda _: {"before_db": 10.0, "after_db": 10.5})
    )
    assert found.severity == NOTE


def test_what_would_take_long_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inspector.diagnosis.MOST_SECONDS", 0.0)
    _, _, gain_of = diagnosed(unequal_depthwise(), QuantConfig(), tmp_path)
    reason = gain_of(Remedy(say="", recipe={"equalize": True}))["reason"]
    assert reason.startswith("re-quantizing takes about ")


def test_a_diagnosis_requantizes_each_recipe_once_and_three_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, _, _ = diagnosed(unequal_depthwise(), QuantConfig(), tmp_path)
    asked: list[dict[str, Any]] = []

    def gain_of(remedy: Remedy) -> dict[str, Any]:
        asked.append(dict(remedy.recipe))
        return {"before_db": 1.0, "after_db": 9.0}

    def planted(_: Case) -> Iterator[Finding]:
        for at, percentile in enumerate((99.0, 99.0, 98.0, 97.0, 96.0)):
            remedy = Remedy(say="", recipe={"method": "percentile", "percentile": percentile})
            yield Finding(
                code="clipped", severity=LOOK, node="", tensor=f"t{at}", sentence="", evidence={},
                remedy=remedy,
            )  # fmt: skip

    monkeypatch.setattr("inspector.diagnosis.RULES", {"clipped": planted})
    found = {f.tensor: f.evidence for f in diagnose(case, recipe_gain_of=gain_of)}
    assert [each["percentile"] for each in asked] == [99.0, 98.0, 97.0]
    assert [t for t in sorted(found) if found[t].get("recipe_gain_db") == 8.0] == [
        "t0", "t1", "t2", "t3"
    ]  # fmt: skip
    assert found["t4"]["recipe_not_measured"] == "3 other recipes were measured before it"


def test_the_app_measures_the_remedy_and_the_run_that_applies_it_has_its_figure(
    tmp_path: Path,
) -> None:
    path = save(unequal_depthwise(), tmp_path / "m.onnx")
    feeds = npz_folder(tmp_path / "feeds", IMAGES)
    root = tmp_path / "workspace"
    source = FeedSource(kind="path", path=str(feeds), title="feeds")
    first = workbench.load_pair(root, float_path=path, quantized_path=None, inputs=source)
    found = [
        f for f in diagnose_run(root, run_id=first) if "equalize" in f["remedy"].get("recipe", {})
    ]
    assert [f["severity"] for f in found] == [PROBLEM]
    run = Workspace(root).run(first)
    config = {**run.recipe, **found[0]["remedy"]["recipe"]}
    again = Workspace(root).run(workbench.requantize(root, run_id=first, config=config, exclude=[]))
    assert again.summary["outputs"][0]["sqnr_db"] == pytest.approx(
        found[0]["evidence"]["recipe_after_db"], abs=0.01
    )


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """A workspace with the model quantized by the defaults, which the app uses."""
    path = save(unequal_depthwise(), tmp_path / "m.onnx")
    source = FeedSource(kind="path", path=str(npz_folder(tmp_path / "feeds", IMAGES)), title="f")
    root = tmp_path / "data"
    workbench.load_pair(root, float_path=path, quantized_path=None, inputs=source)
    monkeypatch.setenv("QUANT_INSPECTOR_DATA", str(root))
    yield Workspace(root)
    session.close_workers()
    session._started.clear()
    st.cache_resource.clear()


@pytest.mark.slow
def test_the_overview_shows_the_measured_gain_and_makes_the_run(opened: Workspace) -> None:
    pair = opened.current_pair() or ""
    test = app("overview", run=opened.runs(pair)[0].id)
    wait(test, lambda page: any(b.label == "Re-quantize so" for b in page.button))
    shown = re.search(r"Equalize 2 pairs .* re-quantized so: \S+ dB → (\S+) dB", words(test))
    assert shown is not None
    apply = [b for b in test.button if b.label == "Re-quantize so"]
    # The rows stand in the order of the findings.
    findings = diagnose_run(opened.root, run_id=opened.runs(pair)[0].id)
    recipes = [f["remedy"]["recipe"] for f in findings if "recipe" in f["remedy"]]
    apply[recipes.index({"equalize": True})].click().run()
    wait(test, lambda page: len(opened.runs(pair)) == 2)
    run = opened.runs(pair)[1]
    assert run.recipe["equalize"] is True
    assert f"{run.summary['outputs'][0]['sqnr_db']:.1f}" == shown[1]
    assert "equalized" in forms.recipe_summary(run.recipe)
