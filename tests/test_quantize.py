"""Quantization: the bytes that ONNX Runtime's public functions write, or a clear reason why not.

The oracle is the public function itself, called here on the same prepared file with a reader of
our own, and the files beside the real models, which somebody else's script wrote.
"""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

import inspector.prepare as prepare_module
import inspector.quantize as quantize_module
from inspector.calibration import hushed
from inspector.commands import inspector_command, onnxruntime_call, onnxruntime_command
from inspector.errors import (
    Cancelled,
    ExclusionError,
    FeedError,
    ModelError,
    QuantizationError,
    RunError,
)
from inspector.feeds import Feeds, load_feeds, random_feeds
from inspector.model import Model
from inspector.model_files import load_model
from inspector.prepare import prepare
from inspector.quantize import extra_options, quantize_model, quantizer_names, supported_op_types
from inspector.recipe import QuantConfig, config_options, nearest_names, read_recipe
from inspector.runtime import open_session
from tests.samples import conv_relu_gemm
from tests.samples import save as saved

MODELS = Path(
    os.environ.get("QUANT_INSPECTOR_MODELS", Path(__file__).parents[2] / "shared" / "models")
)
needs_models = pytest.mark.skipif(
    not MODELS.is_dir(), reason=f"the real models are not there: no folder {MODELS}"
)


# --- models, each named after what is in it ---------------------------------------------------


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    weights: dict[str, np.ndarray],
    *,
    opset: int = 17,
    dtype: int = TensorProto.FLOAT,
    microsoft: bool = False,
) -> Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(k, dtype, v) for k, v in inputs.items()],
        [helper.make_tensor_value_info(k, dtype, v) for k, v in outputs.items()],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    if microsoft:
        opsets.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return load_model(path)


def gaussian(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def two_convs(path: Path, *, opset: int = 17) -> Model:
    """x -> stem (Conv, BatchNormalization, Relu) -> Dropout -> head (Conv) -> Mul -> Sigmoid."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="stem", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c1", "g", "b", "m", "v"], ["n1"], name="norm"),
        helper.make_node("Relu", ["n1"], ["r1"], name="relu"),
        helper.make_node("Dropout", ["r1"], ["d1"], name="drop"),
        helper.make_node("Conv", ["d1", "w2", "b2"], ["c2"], name="head", pads=[1, 1, 1, 1]),
        helper.make_node("Constant", [], ["two"], name="two", value_float=2.0)
        if opset >= 12
        else helper.make_node(
            "Constant", [], ["two"], name="two", value=numpy_helper.from_array(np.float32([2.0]))
        ),
        helper.make_node("Mul", ["c2", "two"], ["d2"], name="double"),
        helper.make_node("Sigmoid", ["d2"], ["y"], name="squash"),
    ]
    weights = {
        "w1": gaussian(4, 3, 3, 3, seed=1),
        "g": np.abs(gaussian(4, seed=2)) + 0.5,
        "b": gaussian(4, seed=3),
        "m": gaussian(4, seed=4),
        "v": np.abs(gaussian(4, seed=5)) + 0.5,
        "w2": gaussian(2, 4, 3, 3, seed=6),
        "b2": gaussian(2, seed=7),
    }
    return save(path, nodes, {"x": [1, 3, 8, 8]}, {"y": [1, 2, 8, 8]}, weights, opset=opset)


def two_gemms(path: Path) -> Model:
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["y"], name="second"),
    ]
    weights = {
        "w1": gaussian(8, 16, seed=1),
        "b1": gaussian(16, seed=2),
        "w2": gaussian(16, 4, seed=3),
        "b2": gaussian(4, seed=4),
    }
    return save(path, nodes, {"x": [1, 8]}, {"y": [1, 4]}, weights)


def matmul_with_bias(path: Path) -> Model:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="dense/MatMul"),
        helper.make_node("Add", ["h", "b"], ["y"], name="dense/Add"),
    ]
    weights = {"w": gaussian(8, 4), "b": gaussian(4)}
    return save(path, nodes, {"x": [2, 8]}, {"y": [2, 4]}, weights)


def feeds_of(model: Model, samples: int = 3) -> Feeds:
    return random_feeds(model, samples=samples, seed=1)


def make(
    model: Model,
    config: QuantConfig,
    folder: Path,
    *,
    exclude: tuple[str, ...] = (),
    calibration: Feeds | None = None,
    **options: Any,
) -> bytes:
    calibration = calibration or feeds_of(model)
    result = quantize_model(
        model,
        config,
        calibration=calibration,
        exclude=exclude,
        output=folder / "made.onnx",
        cache=folder / "cache",
        **options,
    )
    return result.path.read_bytes()


class Reader(CalibrationDataReader):
    def __init__(self, samples: Any) -> None:
        self.samples = iter(samples)

    def get_next(self) -> Any:
        return next(self.samples, None)


TYPES = {
    "int8": QuantType.QInt8,
    "uint8": QuantType.QUInt8,
    "int16": QuantType.QInt16,
    "uint16": QuantType.QUInt16,
    "int4": QuantType.QInt4,
    "uint4": QuantType.QUInt4,
}


def public(
    prepared: Path, config: QuantConfig, feeds: Any, folder: Path, exclude: list[str]
) -> bytes:
    """What ONNX Runtime's public function writes, written down independently of ours."""
    source = folder / "public-source.onnx"
    source.write_bytes(prepared.read_bytes())
    target = folder / "public.onnx"
    options: dict[str, Any] = {}
    if config.activation_symmetric is not None:
        options["ActivationSymmetric"] = config.activation_symmetric
    if config.weight_symmetric is not None:
        options["WeightSymmetric"] = config.weight_symmetric
    if config.percentile is not None:
        options["CalibPercentile"] = config.percentile
    shared = {
        "op_types_to_quantize": list(config.op_types) or None,
        "nodes_to_quantize": list(config.nodes) or None,
        "nodes_to_exclude": exclude,
        "per_channel": config.per_channel,
        "reduce_range": config.reduce_range,
        "weight_type": TYPES[config.weight_type],
        "extra_options": options,
    }
    with hushed():
        if config.format == "dynamic":
            quantize_dynamic(source, target, **shared)
        else:
            quantize_static(
                source,
                target,
                Reader(feeds),
                quant_format=QuantFormat.QDQ if config.format == "qdq" else QuantFormat.QOperator,
                activation_type=TYPES[config.activation_type],
                calibrate_method={
                    "minmax": CalibrationMethod.MinMax,
                    "entropy": CalibrationMethod.Entropy,
                    "percentile": CalibrationMethod.Percentile,
                }[config.method],
                **shared,
            )
    return target.read_bytes()


RECIPES = {
    "defaults": QuantConfig(),
    "entropy": QuantConfig(method="entropy"),
    "percentile": QuantConfig(method="percentile"),
    "percentile 99": QuantConfig(method="percentile", percentile=99.0),
    "per channel": QuantConfig(per_channel=True),
    "reduced range": QuantConfig(reduce_range=True),
    "uint8 activations": QuantConfig(activation_type="uint8"),
    "uint8 both": QuantConfig(activation_type="uint8", weight_type="uint8"),
    "symmetric activations": QuantConfig(activation_symmetric=True),
    "symmetric uint8": QuantConfig(activation_type="uint8", activation_symmetric=True),
    "asymmetric weights": QuantConfig(weight_symmetric=False),
    "16 bit activations": QuantConfig(activation_type="uint16"),
    "4 bit weights": QuantConfig(weight_type="int4", per_channel=True),
    "Conv only": QuantConfig(op_types=("Conv",)),
    "without pre-processing": QuantConfig(preprocess=False),
    "qoperator": QuantConfig(format="qoperator", activation_type="uint8"),
    "qoperator per channel": QuantConfig(format="qoperator", per_channel=True),
    "dynamic": QuantConfig(format="dynamic"),
    "dynamic uint8": QuantConfig(format="dynamic", weight_type="uint8", reduce_range=True),
}


# --- the same bytes ---------------------------------------------------------------------------


@needs_models
@pytest.mark.parametrize("name", ["mlperf-resnet8", "mlperf-kws-dscnn", "magika", "fastestdet"])
def test_the_defaults_give_the_file_beside_the_real_model(name: str, tmp_path: Path) -> None:
    model = load_model(MODELS / name / "model.onnx")
    feeds = load_feeds(MODELS / name / "inputs", model).subset(range(4))
    made = make(model, QuantConfig(), tmp_path, calibration=feeds)
    assert made == (MODELS / name / "ort_static_qdq.onnx").read_bytes()


@needs_models
@pytest.mark.parametrize("name", ["squeezenet-fp16", "ultraface-rfb320"])
def test_a_model_without_node_names_computes_what_the_file_beside_it_computes(
    name: str, tmp_path: Path
) -> None:
    # Its nodes get names here, so the bytes differ; the values must not.
    model = load_model(MODELS / name / "model.onnx")
    feeds = load_feeds(MODELS / name / "inputs", model)
    make(model, QuantConfig(), tmp_path, calibration=feeds.subset(range(4)))
    ours = open_session(tmp_path / "made.onnx", optimized=False)
    theirs = open_session(MODELS / name / "ort_static_qdq.onnx", optimized=False)
    feed = feeds[len(feeds) - 1]
    wanted = theirs.run(feed)
    for key, value in ours.run(feed).items():
        np.testing.assert_array_equal(value, wanted[key])


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_bytes_are_those_of_the_public_function(recipe: str, tmp_path: Path) -> None:
    config = RECIPES[recipe]
    model = (
        two_gemms(tmp_path / "m.onnx") if "dynamic" in recipe else two_convs(tmp_path / "m.onnx")
    )
    feeds = feeds_of(model)
    first = make(model, config, tmp_path, calibration=feeds)
    prepared = prepare(model, config, tmp_path / "cache").model.path
    assert prepared is not None
    expected = public(prepared, config, feeds, tmp_path, [])
    assert first == expected
    # Once from observing, once from the cache; and once in a new cache.
    assert make(model, config, tmp_path, calibration=feeds) == expected
    (tmp_path / "other").mkdir()
    assert make(model, config, tmp_path / "other", calibration=feeds) == expected


@pytest.mark.parametrize("exclude", [("stem",), ("head",), ("relu",), ("stem", "squash")])
def test_excluded_names_reach_the_public_function(exclude: tuple[str, ...], tmp_path: Path) -> None:
    model = two_convs(tmp_path / "m.onnx")
    feeds = feeds_of(model)
    made = make(model, QuantConfig(), tmp_path, exclude=exclude, calibration=feeds)
    prepared = prepare(model, QuantConfig(), tmp_path / "cache").model.path
    assert prepared is not None
    assert made == public(prepared, QuantConfig(), feeds, tmp_path, list(exclude))
    assert made != make(model, QuantConfig(), tmp_path, calibration=feeds)


def test_a_second_recipe_reuses_the_ranges(tmp_path: Path) -> None:
    model = two_convs(tmp_path / "m.onnx")
    reused = [
        quantize_model(
            model,
            config,
            calibration=feeds_of(model),
            exclude=exclude,
            output=tmp_path / "q.onnx",
            cache=tmp_path / "cache",
        ).calibration_reused
        for config, exclude in (
            (QuantConfig(), ()),
            (QuantConfig(), ("head",)),
            (QuantConfig(reduce_range=True, weight_type="int8"), ()),
            (QuantConfig(method="entropy"), ()),
        )
    ]
    assert reused == [False, True, True, False]


def test_only_the_nodes_asked_for_are_quantized(tmp_path: Path) -> None:
    model = two_convs(tmp_path / "m.onnx")
    make(model, QuantConfig(nodes=("head",)), tmp_path)
    made = load_model(tmp_path / "made.onnx")
    assert made.producers[made.node_by_name["head"].inputs[1]].op_type == "DequantizeLinear"
    assert made.constant(made.node_by_name["stem"].inputs[1]) is not None


def test_excluding_a_gemm_from_dynamic_quantization_excludes_it(tmp_path: Path) -> None:
    # ONNX Runtime renames Gemm `g` to `g_MatMul` first, so its own list does nothing for `g`.
    model = two_gemms(tmp_path / "m.onnx")
    config = QuantConfig(format="dynamic")
    make(model, config, tmp_path)
    assert sum(n.op_type == "MatMulInteger" for n in load_model(tmp_path / "made.onnx").nodes) == 2
    make(model, config, tmp_path, exclude=("first",))
    made = load_model(tmp_path / "made.onnx")
    assert [n.name for n in made.nodes if n.op_type == "MatMul"] == ["first_MatMul"]
    assert sum(n.op_type == "MatMulInteger" for n in made.nodes) == 1


# --- preparing --------------------------------------------------------------------------------


def test_nodes_that_pre_processing_took_away_have_successors(tmp_path: Path) -> None:
    prepared = prepare(two_convs(tmp_path / "m.onnx"), QuantConfig(), tmp_path / "cache")
    assert prepared.successors == {
        "stem": "stem",
        "norm": "stem",  # folded into the Conv before it
        "relu": "relu",
        "drop": None,  # does nothing in inference
        "head": "head",
        "two": None,  # became an initializer
        "double": "head",  # folded into the Conv before it
        "squash": "squash",
    }


def test_a_fused_matmul_stands_for_both_its_nodes(tmp_path: Path) -> None:
    prepared = prepare(matmul_with_bias(tmp_path / "m.onnx"), QuantConfig(), tmp_path / "cache")
    [gemm] = prepared.model.nodes
    assert gemm.op_type == "Gemm"
    assert prepared.successors == {"dense/MatMul": gemm.name, "dense/Add": gemm.name}
    assert prepared.float_names == {gemm.name: "dense/MatMul"}
    assert quantizer_names(prepared, ["dense/Add"], QuantConfig()) == (gemm.name,)


@needs_models
def test_successors_on_real_models_are_the_nodes_that_compute_the_same(tmp_path: Path) -> None:
    model = load_model(MODELS / "gtcrn" / "model.onnx")
    prepared = prepare(model, QuantConfig(), tmp_path)
    gemm = "MatMul_156/MatMulAddFusion"
    assert prepared.successors["MatMul_156"] == prepared.successors["Add_157"] == gemm
    assert prepared.companions[gemm] == ("gemm_input_reshape", "gemm_output_reshape")
    assert prepared.successors["BatchNormalization_1095"] == "ConvTranspose_1094"
    assert prepared.successors["Gather_1"] == "Gather_1761"  # the same computation, there twice
    assert prepared.successors["Transpose_158"] is None  # moved behind the Sigmoid
    assert quantizer_names(prepared, ["Add_157"], QuantConfig()) == (
        "gemm_input_reshape",
        gemm,
        "gemm_output_reshape",
    )
    # Every node that computes with weights is there, or something took it over.
    for node in model.nodes:
        if node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm", "BatchNormalization"):
            successor = prepared.successors[node.name]
            assert successor is not None
            assert prepared.model.node_by_name[successor].op_type != "Reshape"


@needs_models
def test_a_channel_shuffle_that_was_folded_has_one_successor(tmp_path: Path) -> None:
    model = load_model(MODELS / "fastestdet" / "model.onnx")
    prepared = prepare(model, QuantConfig(), tmp_path)
    shuffle = [prepared.successors[n] for n in ("Reshape_13", "Transpose_14", "Reshape_16")]
    assert shuffle == ["Reshape_13_new_reshape"] * 3
    assert prepared.float_names["Reshape_13_new_reshape"] == "Reshape_13"
    assert prepared.successors["Pad_228"] == "AveragePool_229"


@needs_models
def test_failing_symbolic_shapes_are_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model = load_model(MODELS / "magika" / "model.onnx")
    prepared = prepare(model, QuantConfig(), tmp_path / "cache")
    assert prepared.notes == (
        "symbolic shape inference failed (Incomplete symbolic shape inference), so pre-processing "
        "ran without it",
    )
    assert not prepared.symbolic
    # ONNX Runtime writes sym_shape_infer_temp.onnx into the current folder.
    assert os.listdir(tmp_path / "here") == []


def test_a_prepared_model_is_kept_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = two_convs(tmp_path / "m.onnx")
    first = prepare(model, QuantConfig(), tmp_path / "cache")
    monkeypatch.setattr(prepare_module, "_write_prepared", None)
    again = prepare(model, QuantConfig(weight_type="uint8"), tmp_path / "cache")
    assert again.model.path == first.model.path
    assert again.successors == first.successors
    assert again.model.sha256 == first.model.sha256


@pytest.mark.parametrize("name", ["prepared.onnx", "prepared.json"])
def test_a_damaged_prepared_model_is_made_anew(tmp_path: Path, name: str) -> None:
    model = two_convs(tmp_path / "m.onnx")
    first = prepare(model, QuantConfig(), tmp_path / "cache")
    assert first.model.path is not None
    (first.model.path.parent / name).write_bytes(b"{")
    again = prepare(model, QuantConfig(), tmp_path / "cache")
    assert again.model.sha256 == first.model.sha256
    assert len(list((tmp_path / "cache" / "prepared").iterdir())) == 1


def test_an_old_opset_is_lifted_and_said(tmp_path: Path) -> None:
    prepared = prepare(two_convs(tmp_path / "m.onnx", opset=9), QuantConfig(), tmp_path / "cache")
    assert prepared.model.opset == 11
    assert prepared.notes == (
        "opset 9 was lifted to 11 by pre-processing, because the quantizer needs it",
    )


def test_an_old_opset_without_pre_processing_is_refused_and_the_hint_works(tmp_path: Path) -> None:
    model = two_convs(tmp_path / "m.onnx", opset=9)
    with pytest.raises(QuantizationError) as caught:
        make(model, QuantConfig(preprocess=False), tmp_path)
    assert caught.value.message == ("m.onnx uses ai.onnx opset 9; the quantizer needs 10 or newer")
    assert caught.value.hint.startswith("Leave pre-processing on (drop --no-preprocess)")
    assert make(model, QuantConfig(), tmp_path)


@pytest.mark.parametrize(
    ("config", "opset", "note"),
    [
        (QuantConfig(per_channel=True), 13, "per-channel scales need it"),
        (QuantConfig(activation_type="int16"), 21, "16- and 4-bit types need it"),
        (QuantConfig(weight_type="uint4"), 21, "16- and 4-bit types need it"),
        (QuantConfig(per_channel=True, preprocess=False), 13, "per-channel scales need it"),
    ],
)
def test_recipes_that_need_a_newer_opset_get_it_and_load(
    config: QuantConfig, opset: int, note: str, tmp_path: Path
) -> None:
    model = two_convs(tmp_path / "m.onnx", opset=11)
    result = quantize_model(
        model,
        config,
        calibration=feeds_of(model),
        output=tmp_path / "q.onnx",
        cache=tmp_path / "cache",
    )
    assert f"opset 11 was lifted to {opset}, because {note}" in result.notes
    made = load_model(result.path)
    assert made.opset == opset
    assert {n.domain for n in made.nodes if n.op_type == "QuantizeLinear"} == {""}


@needs_models
@pytest.mark.parametrize("name", ["fastestdet", "squeezenet-fp16"])
def test_per_channel_loads_on_models_where_the_public_function_writes_files_that_do_not(
    name: str, tmp_path: Path
) -> None:
    model = load_model(MODELS / name / "model.onnx")
    feeds = load_feeds(MODELS / name / "inputs", model).subset(range(2))
    make(model, QuantConfig(per_channel=True), tmp_path, calibration=feeds)
    assert load_model(tmp_path / "made.onnx").opset == 13


@needs_models
def test_what_the_quantizer_itself_refuses_is_said_with_its_reason(tmp_path: Path) -> None:
    model = load_model(MODELS / "magika" / "model.onnx")
    feeds = load_feeds(MODELS / "magika" / "inputs", model).subset(range(2))
    with pytest.raises(QuantizationError) as caught:
        make(model, QuantConfig(per_channel=True), tmp_path, calibration=feeds)
    assert caught.value.message.startswith("ONNX Runtime's quantizer refuses model.onnx: ")
    assert "drop --per-channel" in caught.value.hint
    assert not (tmp_path / "made.onnx").exists()


# --- what cannot be quantized -----------------------------------------------------------------


def test_a_quantized_model_given_as_float_is_refused(tmp_path: Path) -> None:
    model = two_gemms(tmp_path / "m.onnx")
    make(model, QuantConfig(), tmp_path)
    (tmp_path / "made.onnx").rename(tmp_path / "q.onnx")
    with pytest.raises(QuantizationError) as caught:
        make(load_model(tmp_path / "q.onnx"), QuantConfig(), tmp_path)
    assert caught.value.message == (
        "q.onnx is already quantized (7 DequantizeLinear, 3 QuantizeLinear), expected a float model"
    )
    assert caught.value.hint == "Load the float model it was made from."


def test_excluding_everything_is_an_error_with_its_reason(tmp_path: Path) -> None:
    model = two_gemms(tmp_path / "m.onnx")
    with pytest.raises(QuantizationError) as caught:
        make(model, QuantConfig(), tmp_path, exclude=("first", "relu", "second"))
    assert caught.value.message == ("nothing was quantized: all 3 nodes that could be are excluded")
    assert caught.value.hint == "Take at least one name off the exclusion list."


def fused_only(path: Path) -> Model:
    nodes = [
        helper.make_node("FusedMatMul", ["x", "w"], ["h"], name="fused", domain="com.microsoft"),
        helper.make_node("Sqrt", ["h"], ["y"], name="sqrt"),
    ]
    weights = {"w": np.abs(gaussian(8, 4))}
    return save(path, nodes, {"x": [2, 8]}, {"y": [2, 4]}, weights, microsoft=True)


def computes_in_a_branch(path: Path, *, outside: bool = False) -> Model:
    then = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["t"], name="inner")],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, [2, 4])],
    )
    other = helper.make_graph(
        [helper.make_node("MatMul", ["x", "v"], ["e"], name="inner2")],
        "else",
        [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, [2, 4])],
    )
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], name="sum", keepdims=0),
        helper.make_node("Cast", ["s"], ["c"], name="cast", to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["b"], name="if", then_branch=then, else_branch=other),
        helper.make_node("MatMul" if outside else "Max", ["b", "u"], ["y"], name="last"),
    ]
    weights = {"w": gaussian(8, 4), "v": gaussian(8, 4, seed=1), "u": gaussian(4, 4, seed=2)}
    if not outside:
        weights["u"] = np.zeros(4, np.float32)
    return save(path, nodes, {"x": [2, 8]}, {"y": [2, 4]}, weights)


def test_a_model_of_fused_operators_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError) as caught:
        make(fused_only(tmp_path / "m.onnx"), QuantConfig(), tmp_path)
    assert caught.value.message == (
        "nothing was quantized: 1 FusedMatMul (com.microsoft) stay in float: ONNX Runtime's "
        "quantizer does not take fused operators; export or optimise the model without fusion to "
        "quantize them"
    )


def test_a_model_that_computes_in_branches_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError) as caught:
        make(computes_in_a_branch(tmp_path / "m.onnx"), QuantConfig(), tmp_path)
    assert caught.value.message == (
        "nothing was quantized: 2 MatMul inside bodies of If, Loop or Scan stay in float: "
        "ONNX Runtime's quantizer does not look into them"
    )


def test_nodes_in_branches_beside_quantized_ones_are_a_note(tmp_path: Path) -> None:
    model = computes_in_a_branch(tmp_path / "m.onnx", outside=True)
    result = quantize_model(
        model,
        QuantConfig(),
        calibration=feeds_of(model),
        output=tmp_path / "q.onnx",
        cache=tmp_path / "cache",
    )
    assert any(n.startswith("2 MatMul inside bodies of If, Loop or Scan") for n in result.notes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            QuantConfig(op_types=("LSTM",)),
            "nothing was quantized: no node of the prepared model has op type 'LSTM'",
        ),
        (
            QuantConfig(nodes=("relu",)),
            "nothing was quantized: none of its nodes is of a type it takes",
        ),
    ],
)
def test_asking_for_what_is_not_there_is_an_error(
    config: QuantConfig, message: str, tmp_path: Path
) -> None:
    model = two_gemms(tmp_path / "m.onnx")
    if config.nodes:
        message = "nothing was quantized"
    with pytest.raises(QuantizationError) as caught:
        make(model, config, tmp_path)
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        (
            QuantConfig(format="qoperator", activation_type="int16"),
            "format qoperator takes 8-bit types only, found activations int16 and weights int8",
            "Use --format qdq for 16- and 4-bit types.",
        ),
        (
            QuantConfig(format="dynamic", weight_type="int4"),
            "format dynamic takes 8-bit weights only, found int4",
            "Use --format qdq for 16- and 4-bit types.",
        ),
        (
            QuantConfig(activation_type="int8", weight_type="uint8"),
            "ONNX Runtime has no kernels for int8 activations with uint8 weights",
            "Use --activation-type uint8, or --weight-type int8.",
        ),
    ],
)
def test_types_that_do_not_go_together_are_refused_before_any_work(
    config: QuantConfig, message: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(QuantizationError) as caught:
        make(two_gemms(tmp_path / "m.onnx"), config, tmp_path)
    assert (caught.value.message, caught.value.hint) == (message, hint)
    assert not (tmp_path / "cache").exists()


# --- the result -------------------------------------------------------------------------------


def in_halves(path: Path) -> Model:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul")]
    return save(
        path,
        nodes,
        {"x": [2, 8]},
        {"y": [2, 4]},
        {"w": gaussian(8, 4, dtype=np.float16)},
        dtype=TensorProto.FLOAT16,
    )


def test_a_result_that_does_not_load_is_an_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    # At opset 17 QuantizeLinear takes no float16, yet the quantizer writes it.
    model = in_halves(tmp_path / "m.onnx")
    (tmp_path / "made.onnx").write_bytes(b"what was there before")
    with pytest.raises(QuantizationError) as caught:
        # (Pre-processing casts what the CPU has no float16 kernels for.)
        make(model, QuantConfig(preprocess=False), tmp_path)
    assert caught.value.message.startswith(
        "the quantized m.onnx does not load without optimisations: ONNX Runtime"
    )
    assert "float16" in caught.value.message
    assert caught.value.hint == "Quantize the float32 version of this model."
    assert (tmp_path / "made.onnx").read_bytes() == b"what was there before"
    assert sorted(os.listdir(tmp_path)) == ["cache", "m.onnx", "made.onnx"]


def test_dynamic_quantization_needs_no_feeds(tmp_path: Path) -> None:
    model = two_gemms(tmp_path / "m.onnx")
    result = quantize_model(
        model,
        QuantConfig(format="dynamic"),
        calibration=None,
        output=tmp_path / "q.onnx",
        cache=tmp_path / "cache",
    )
    assert result.sha256 == load_model(tmp_path / "q.onnx").sha256
    assert result.notes == ()


def test_a_model_no_random_feed_fits_is_loaded_but_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_feed(*_: Any, **__: Any) -> Feeds:
        raise FeedError("input 'x' has no known shape", hint="Give real feeds.")

    monkeypatch.setattr(quantize_module, "random_feeds", no_feed)
    result = quantize_model(
        two_gemms(tmp_path / "m.onnx"),
        QuantConfig(format="dynamic"),
        calibration=None,
        output=tmp_path / "q.onnx",
        cache=tmp_path / "cache",
    )
    assert result.notes == ("the result loads; it was not run, because no feed fits the model",)


def test_the_result_says_when_its_outputs_are_not_finite(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="matmul"),
        helper.make_node("Log", ["h"], ["y"], name="log"),
    ]
    model = save(
        tmp_path / "m.onnx", nodes, {"x": [2, 8]}, {"y": [2, 4]}, {"w": np.abs(gaussian(8, 4))}
    )
    result = quantize_model(
        model,
        QuantConfig(),
        calibration=feeds_of(model),
        output=tmp_path / "q.onnx",
        cache=tmp_path / "cache",
    )
    assert any("output 'y' of the quantized model is NaN" in note for note in result.notes)


def test_stopping_leaves_nothing_behind(tmp_path: Path) -> None:
    model = two_gemms(tmp_path / "m.onnx")
    fractions: list[float] = []

    def stop_while_quantizing(fraction: float, message: str) -> None:
        fractions.append(fraction)
        if message == "trying the result on one sample":
            raise Cancelled

    with pytest.raises(Cancelled):
        make(model, QuantConfig(), tmp_path, progress=stop_while_quantizing)
    assert not (tmp_path / "made.onnx").exists()
    assert fractions == sorted(fractions)
    assert len(fractions) >= 6  # one per sample and step


def test_progress_runs_from_0_to_1(tmp_path: Path) -> None:
    fractions: list[float] = []
    make(
        two_gemms(tmp_path / "m.onnx"),
        QuantConfig(),
        tmp_path,
        progress=lambda f, _: fractions.append(f),
    )
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)


def test_the_users_folders_loggers_and_screen_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for folder in ("models", "here", "out"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    model = two_convs(tmp_path / "models" / "m.onnx", opset=9)
    stamp = (tmp_path / "models" / "m.onnx").stat().st_mtime_ns
    for config in (QuantConfig(method="percentile"), QuantConfig(preprocess=True)):
        quantize_model(
            model,
            config,
            calibration=feeds_of(model),
            output=tmp_path / "out" / "q.onnx",
            cache=tmp_path / "cache",
        )
    assert os.listdir(tmp_path / "models") == ["m.onnx"]
    assert os.listdir(tmp_path / "here") == []
    assert os.listdir(tmp_path / "out") == ["q.onnx"]
    assert (tmp_path / "models" / "m.onnx").stat().st_mtime_ns == stamp
    assert (root.handlers, root.level) == before
    assert capfd.readouterr() == ("", "")


def test_the_float_model_is_never_overwritten(tmp_path: Path) -> None:
    model = two_gemms(tmp_path / "m.onnx")
    before = (tmp_path / "m.onnx").read_bytes()
    with pytest.raises(QuantizationError) as caught:
        quantize_model(
            model,
            QuantConfig(),
            calibration=feeds_of(model),
            output=tmp_path / "m.onnx",
            cache=tmp_path / "cache",
        )
    assert caught.value.message == "m.onnx is the float model itself, which is never overwritten"
    assert (tmp_path / "m.onnx").read_bytes() == before


@pytest.mark.parametrize(
    ("output", "message"),
    [(".", "is a folder, expected a file to write"), ("no/q.onnx", "does not exist")],
)
def test_an_output_that_cannot_be_written_is_refused(
    output: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(QuantizationError, match=message):
        quantize_model(
            two_gemms(tmp_path / "m.onnx"),
            QuantConfig(),
            calibration=None,
            output=tmp_path / output,
            cache=tmp_path / "cache",
        )


def test_an_unknown_name_is_an_error_with_the_nearest_names(tmp_path: Path) -> None:
    with pytest.raises(ExclusionError) as caught:
        make(two_gemms(tmp_path / "m.onnx"), QuantConfig(), tmp_path, exclude=("secnd",))
    assert "has no node 'secnd'; the nearest names are 'second', " in caught.value.message
    with pytest.raises(ExclusionError, match="an empty node name was given"):
        make(two_gemms(tmp_path / "m.onnx"), QuantConfig(), tmp_path, exclude=("",))


def test_nearest_names_come_likest_first() -> None:
    assert nearest_names("conv_1", ["Relu_1", "Conv_10", "Conv_1", "x"], 2) == ["Conv_1", "Conv_10"]


# --- recipes ----------------------------------------------------------------------------------


def test_the_defaults_are_onnx_runtimes_own() -> None:
    assert QuantConfig().to_json() == {
        "format": "qdq",
        "activation_type": "int8",
        "weight_type": "int8",
        "method": "minmax",
        "percentile": None,
        "per_channel": False,
        "reduce_range": False,
        "activation_symmetric": None,
        "weight_symmetric": None,
        "op_types": [],
        "nodes": [],
        "preprocess": True,
        "calibration_samples": None,
    }
    assert extra_options(QuantConfig()) == {}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_survives_json(recipe: str) -> None:
    config = replace(RECIPES[recipe], nodes=("a", "b"), calibration_samples=3)
    assert QuantConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "int8"}, "format is 'int8', expected one of qdq, qoperator, dynamic"),
        ({"weight_type": "float8"}, "weight_type is 'float8', expected one of int8, uint8, int16"),
        ({"activation_type": "int4"}, "activation_type is 'int4', expected one of int8, uint8"),
        ({"method": "mse"}, "method is 'mse', expected one of minmax, entropy, percentile"),
        ({"per_channel": "yes"}, "per_channel is 'yes', expected true or false"),
        ({"weight_symmetric": 2}, "weight_symmetric is 2, expected true, false or null"),
        ({"percentile": 0.999}, "percentile is 0.999, expected a number above 50, at most 100"),
        ({"op_types": "Conv"}, "op_types is 'Conv', expected names"),
        ({"nodes": [1]}, r"nodes is \(1,\), expected names"),
        ({"calibration_samples": 0}, "calibration_samples is 0, expected a whole number above 0"),
    ],
)
def test_values_that_are_none_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=f"^the recipe cannot be used: {message}"):
        QuantConfig.from_json(values)
    if "nodes" not in values:
        with pytest.raises(ValueError, match=message):
            QuantConfig(**values)


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(QuantizationError) as caught:
        QuantConfig.from_json({"perchannel": True})
    assert caught.value.message == (
        "a recipe has no option 'perchannel'; the nearest is 'per_channel'"
    )
    with pytest.raises(QuantizationError, match="a recipe is list, expected a JSON object"):
        QuantConfig.from_json([])  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_read_back_from_the_finished_file(recipe: str, tmp_path: Path) -> None:
    config = RECIPES[recipe]
    model = (
        two_gemms(tmp_path / "m.onnx") if "dynamic" in recipe else two_convs(tmp_path / "m.onnx")
    )
    make(model, config, tmp_path)
    read = read_recipe(load_model(tmp_path / "made.onnx"), model)
    expected = replace(config, method="minmax", percentile=None)
    if config.format == "dynamic":
        expected = replace(expected, activation_type="uint8")
    assert read.config == expected
    # And what was read makes the same model again, where calibration agrees.
    if config.method == "minmax":
        (tmp_path / "again").mkdir()
        again = make(model, read.config, tmp_path / "again")
        assert again == (tmp_path / "made.onnx").read_bytes()


@needs_models
def test_recipes_of_real_files_are_what_made_them() -> None:
    made = load_model(MODELS / "fastestdet" / "ort_static_qdq.onnx")
    recipe = read_recipe(made, load_model(MODELS / "fastestdet" / "model.onnx"))
    assert recipe.config == QuantConfig()
    assert recipe.op_types[0] == "Conv"
    assert recipe.notes == (
        "a file does not say how it was calibrated; the method minmax is assumed",
        "48 of 48 Relu and Clip nodes are folded into the quantization of the node before them",
    )
    minilm = MODELS / "minilm-l6"
    dynamic = read_recipe(
        load_model(minilm / "ort_dynamic.onnx"), load_model(minilm / "model.onnx")
    )
    assert (dynamic.config.format, dynamic.config.weight_type) == ("dynamic", "int8")
    assert dynamic.op_types[0] == "MatMul"
    tflite = read_recipe(load_model(MODELS / "mlperf-resnet8" / "quantized.onnx"))
    assert tflite.config.per_channel
    assert any("not by ONNX Runtime's quantizer" in note for note in tflite.notes)


def test_a_float_file_has_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=r"^m\.onnx is not quantized: "):
        read_recipe(two_gemms(tmp_path / "m.onnx"))


# --- the same thing elsewhere -----------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_python_call_writes_the_same_bytes(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RECIPES[recipe]
    dynamic = "dynamic" in recipe
    model = two_gemms(tmp_path / "m.onnx") if dynamic else two_convs(tmp_path / "m.onnx", opset=11)
    if config.op_types:
        exclude: tuple[str, ...] = ("head",)
    else:
        exclude = ("first",) if dynamic else ("relu", "norm")
    feeds = feeds_of(model)
    made = make(model, config, tmp_path, exclude=exclude, calibration=feeds)
    prepared = prepare(model, config, tmp_path / "cache")
    text = onnxruntime_call(config, exclude, prepared=prepared, model="m.onnx", output="out.onnx")
    monkeypatch.chdir(tmp_path)
    with hushed():
        exec(text, {"calibration_data_reader": Reader(feeds)})
    assert (tmp_path / "out.onnx").read_bytes() == made


def test_the_python_call_reads_like_one_a_person_would_write() -> None:
    text = onnxruntime_call(QuantConfig(per_channel=True, activation_symmetric=True), ["Conv_0"])
    assert text == (
        "from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, "
        "quant_pre_process, quantize_static\n"
        "\n"
        "quant_pre_process('model.onnx', 'model.prepared.onnx')\n"
        "quantize_static(\n"
        "    'model.prepared.onnx',\n"
        "    'model.int8.onnx',\n"
        "    calibration_data_reader,  # your CalibrationDataReader over the same feeds\n"
        "    quant_format=QuantFormat.QDQ,\n"
        "    activation_type=QuantType.QInt8,\n"
        "    calibrate_method=CalibrationMethod.MinMax,\n"
        "    weight_type=QuantType.QInt8,\n"
        "    per_channel=True,\n"
        "    nodes_to_exclude=['Conv_0'],\n"
        "    extra_options={'ActivationSymmetric': True},\n"
        ")\n"
    )


def test_onnx_runtimes_own_commands_write_the_same_bytes(tmp_path: Path) -> None:
    model = two_convs(tmp_path / "m.onnx")
    # So small that the runner, left alone, would widen the range (to 1e-4).
    (tmp_path / "feeds").mkdir()
    for number in range(2):
        np.savez(
            tmp_path / "feeds" / f"{number}.npz",
            x=gaussian(1, 3, 8, 8, seed=number) * np.float32(1e-6),
        )
    feeds = load_feeds(tmp_path / "feeds", model)
    for number, feed in enumerate(feeds):
        folder = tmp_path / f"test_data_set_{number}"
        folder.mkdir()
        tensor = numpy_helper.from_array(feed["x"], "x")
        (folder / "input_0.pb").write_bytes(tensor.SerializeToString())
    config = QuantConfig(activation_type="uint8")
    made = make(model, config, tmp_path, exclude=("head",), calibration=feeds)
    prepared = prepare(model, config, tmp_path / "cache")
    text = onnxruntime_command(
        config, ["head"], prepared=prepared, model="./m.onnx", output="cli.onnx"
    )
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "python"
        subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "cli.onnx").read_bytes() == made


def test_what_onnx_runtimes_commands_cannot_say_is_said() -> None:
    text = onnxruntime_command(QuantConfig(reduce_range=True, weight_symmetric=False))
    assert text.splitlines()[1] == (
        "# these commands have no option for reduce_range, WeightSymmetric"
    )
    assert onnxruntime_command(QuantConfig(format="dynamic")).startswith("# ONNX Runtime has no")


def test_our_command_quotes_what_a_shell_would_take_apart() -> None:
    names = ["/layer.0/Conv [1]", "it's", "a*b", "-x"]
    config = QuantConfig(method="percentile", percentile=99.9, weight_symmetric=False)
    text = inspector_command(config, names, float_name="my model.onnx", inputs="in puts")
    assert text == (
        "quant-inspector quantize 'my model.onnx' -o 'my model.int8.onnx' --inputs 'in puts' "
        "--method percentile --percentile 99.9 --no-weight-symmetric "
        "--exclude '/layer.0/Conv [1]' --exclude 'it'\"'\"'s' --exclude 'a*b' --exclude -x"
    )
    assert shlex.split(text)[-8:] == [w for n in names for w in ("--exclude", n)]


def test_options_at_their_defaults_are_left_out_of_our_command() -> None:
    assert config_options(QuantConfig()) == []
    assert config_options(QuantConfig(preprocess=False, op_types=("Conv", "Gemm"))) == [
        "--op-types",
        "Conv",
        "--op-types",
        "Gemm",
        "--no-preprocess",
    ]


def test_op_types_are_those_of_the_format() -> None:
    assert "Conv" in supported_op_types(QuantConfig())
    assert "ConvTranspose" not in supported_op_types(QuantConfig(format="qoperator"))
    assert supported_op_types(QuantConfig(op_types=("Sqrt",))) == {"Sqrt"}
    assert supported_op_types(QuantConfig(format="dynamic", op_types=("Add",))) == frozenset()


def test_a_model_the_runtime_refuses_is_named_before_calibration(tmp_path: Path) -> None:
    proto = conv_relu_gemm()
    proto.graph.node[4].input[1] = "w"  # rank 4, where Gemm takes rank 2
    with pytest.raises(RunError, match=r"refuses broken\.onnx: .*gemm"):
        quantize_model(
            load_model(saved(proto, tmp_path / "broken.onnx")), QuantConfig(format="dynamic"),
            calibration=None, output=tmp_path / "o.onnx", cache=tmp_path / "cache",
        )  # fmt: skip


def test_a_custom_operator_is_named_before_calibration(tmp_path: Path) -> None:
    proto = conv_relu_gemm()
    proto.graph.node[1].op_type, proto.graph.node[1].domain = "MyRelu", "my.ops"
    proto.opset_import.add(domain="my.ops", version=1)
    with pytest.raises(ModelError, match=r"custom\.onnx uses an operator that .*MyRelu"):
        quantize_model(
            load_model(saved(proto, tmp_path / "custom.onnx")), QuantConfig(format="dynamic"),
            calibration=None, output=tmp_path / "o.onnx", cache=tmp_path / "cache",
        )  # fmt: skip
