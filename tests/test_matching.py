from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from inspector.matching import (
    activation_channel_axis,
    match_tensors,
    rectify,
    weight_channel_axis,
)
from inspector.model import FLOAT_DTYPES, Model, Node, load_model
from inspector.qparams import qparams_from_range
from tests.samples import (
    MODELS,
    array,
    boxes_and_scores_in_one_concat,
    conv_batchnorm,
    conv_relu_gemm,
    floats,
    model,
    needs_models,
    qdq_of,
    save,
)


class Reader(CalibrationDataReader):
    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.feeds = iter([{name: floats(shape, s)} for s in range(3)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def pair(proto, tmp_path: Path, *, preprocess: bool = True) -> tuple[Model, Model]:
    source = save(proto, tmp_path / "f.onnx")
    ready = tmp_path / "p.onnx"
    if preprocess:
        quant_pre_process(source, ready)
    loaded = load_model(source)
    shape = tuple(int(d) for d in loaded.inputs[0].shape or ())
    target = tmp_path / "q.onnx"
    quantize_static(ready if preprocess else source, target, Reader("x", shape))
    return loaded, load_model(target)


def test_a_folded_relu_is_paired_behind_the_rectifier(tmp_path: Path) -> None:
    float_model, quantized = pair(conv_relu_gemm(), tmp_path)
    matching = match_tensors(float_model, quantized)
    found = {p.name: p for p in matching.activations}
    assert found["r"].rectifier is not None
    assert found["r"].rectifier.op_type == "Relu"
    assert found["r"].note == "Relu is folded into Q"
    assert "c" not in found
    lone = {u.name: u.reason for u in matching.unmatched}
    assert lone["c"] == "fused into r"
    assert found["y"].before == "y_QuantizeLinear_Input"
    assert found["x"].node is None


def test_a_relu_that_stays_in_the_graph_is_not_taken_for_folded(tmp_path: Path) -> None:
    qdq, constants = qdq_of("r", "y", 0.1, 0)
    base = [helper.make_node("Neg", ["x"], ["n"], "neg"),
            helper.make_node("Relu", ["n"], ["r"], "relu")]  # fmt: skip
    float_model = Model(
        model([*base, helper.make_node("Neg", ["r"], ["z"], "out")], [("x", [4])], [("z", [4])])
    )
    quantized = Model(
        model(
            [*base, *qdq, helper.make_node("Neg", ["y"], ["z"], "out")],
            [("x", [4])],
            [("z", [4])],
            constants,
        )
    )
    found = {p.name: p for p in match_tensors(float_model, quantized).activations}
    assert found["r"].rectifier is None
    assert found["r"].before == "r"
    assert "n" in found


def test_a_batchnorm_folded_by_preprocessing_is_compared_after_the_same_fold(
    tmp_path: Path,
) -> None:
    float_model, quantized = pair(conv_batchnorm(), tmp_path)
    weights = {w.name: w for w in match_tensors(float_model, quantized).weights}
    assert weights["w"].matched_by == "structure"
    assert weights["w"].note == "compared after folding BatchNormalization bn"
    gain = float_model.constant("g") / np.sqrt(float_model.constant("v") + 1e-5)
    expected = float_model.constant("w") * gain.reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(weights["w"].reference(), expected, rtol=1e-6)
    folded = weights["be"]  # the Conv had no bias: the fold made one of the normalization's
    expected = (0 - float_model.constant("m")) * gain + float_model.constant("be")
    np.testing.assert_allclose(folded.reference(), expected, rtol=1e-6)


def test_weights_swapped_between_two_nodes_stay_with_their_names(tmp_path: Path) -> None:
    proto = model(
        [
            helper.make_node("MatMul", ["x", "a"], ["m"], "first"),
            helper.make_node("MatMul", ["m", "b"], ["y"], "second"),
        ],
        [("x", [1, 4])],
        [("y", [1, 4])],
        [array("a", floats((4, 4), 1)), array("b", floats((4, 4), 2))],
    )
    float_model, quantized = pair(proto, tmp_path)
    swap = {i.name: i for i in quantized.proto.graph.initializer}
    a, b = swap["a_quantized"].raw_data, swap["b_quantized"].raw_data
    swap["a_quantized"].raw_data, swap["b_quantized"].raw_data = b, a
    found = {w.name: w.quantized_name for w in match_tensors(float_model, quantized).weights}
    assert found == {"a": "a_quantized", "b": "b_quantized"}


def test_inputs_and_outputs_of_another_name_are_mapped_by_position_and_this_is_said() -> None:
    float_model = Model(
        model([helper.make_node("Relu", ["x"], ["y"], "r")], [("x", [2])], [("y", [2])])
    )
    other = Model(
        model([helper.make_node("Relu", ["x8"], ["y8"], "r")], [("x8", [2])], [("y8", [2])])
    )
    matching = match_tensors(float_model, other)
    assert matching.inputs == {"x": "x8"}
    assert matching.outputs == {"y": "y8"}
    assert "input x is called x8 in the quantized model (by position)" in matching.notes
    assert [p.after for p in matching.activations if p.name == "y"] == ["y8"]


@pytest.mark.parametrize(
    ("op_type", "position", "rank", "attributes", "axis"),
    [
        ("Conv", 1, 4, {}, 0),
        ("ConvTranspose", 1, 4, {}, 1),
        ("Gemm", 1, 2, {}, 1),
        ("Gemm", 1, 2, {"transB": 1}, 0),
        ("MatMul", 1, 3, {}, 2),
        ("Conv", 2, 1, {}, 0),
        ("Mul", 1, 1, {}, None),
        ("Conv", 1, 0, {}, None),
    ],
)
def test_the_output_channel_axis_of_a_weight(
    op_type: str, position: int, rank: int, attributes: dict[str, int], axis: int | None
) -> None:
    node = Node(index=0, name="n", op_type=op_type, domain="", inputs=("x", "w"),
                outputs=("y",), attributes=attributes)  # fmt: skip
    assert weight_channel_axis(node, position, rank) == axis


def test_the_channel_axis_of_an_activation_follows_its_producer() -> None:
    loaded = Model(boxes_and_scores_in_one_concat())
    assert activation_channel_axis(loaded, "y", 4) == 1
    assert activation_channel_axis(loaded, "boxes", 4) == 1  # Mul behind Conv
    assert activation_channel_axis(loaded, "x", 4) == 3
    assert activation_channel_axis(loaded, "x", 0) is None
    assert activation_channel_axis(Model(conv_relu_gemm()), "y", 2) == 1


def test_a_clip_rectifies_to_its_limits_in_both_spellings() -> None:
    new = Model(
        model([helper.make_node("Clip", ["x", "lo", "hi"], ["y"], "c")], [("x", [3])],
              [("y", [3])], [array("lo", np.float32(0)), array("hi", np.float32(6))])
    )  # fmt: skip
    x = np.array([-1.0, 3.0, 9.0])
    np.testing.assert_array_equal(rectify(x, new.nodes[0], new), [0, 3, 6])
    old = Node(index=0, name="c", op_type="Clip", domain="", inputs=("x",), outputs=("y",),
               attributes={"max": 6.0})  # fmt: skip
    np.testing.assert_array_equal(rectify(x, old, new), [-1, 3, 6])
    assert rectify(x, None, new) is x


def test_a_constant_behind_dequantize_counts_as_a_weight_of_the_float_model() -> None:
    qparams = qparams_from_range(-1, 1, dtype="int8", symmetric=True)
    float_model = Model(
        model(
            [helper.make_node("DequantizeLinear", ["wq", "s"], ["w"], "dq"),
             helper.make_node("MatMul", ["x", "w"], ["y"], "mm")],
            [("x", [1, 3])], [("y", [1, 3])],
            [array("wq", np.eye(3, dtype=np.int8)), array("s", np.float32(0.5))],
        )
    )  # fmt: skip
    other = Model(
        model(
            [helper.make_node("DequantizeLinear", ["w_quantized", "s2"], ["wd"], "dq2"),
             helper.make_node("MatMul", ["x", "wd"], ["y"], "mm")],
            [("x", [1, 3])], [("y", [1, 3])],
            [array("w_quantized", qparams.quantize(np.eye(3) * 0.5).astype(np.int8)),
             array("s2", np.float32(qparams.scale))],
        )
    )  # fmt: skip
    (weight,) = match_tensors(float_model, other).weights
    assert weight.name == "w"
    np.testing.assert_allclose(weight.reference(), np.eye(3) * 0.5)


@needs_models
@pytest.mark.parametrize("folder", sorted(p.name for p in MODELS.glob("*") if p.is_dir()))
def test_every_quantized_weight_and_tensor_of_a_real_pair_is_matched_or_has_a_reason(
    folder: str,
) -> None:
    float_model = load_model(MODELS / folder / "model.onnx")
    quantized = load_model(MODELS / folder / "ort_static_qdq.onnx")
    matching = match_tensors(float_model, quantized)
    weights = [t for t in matching.scheme.tensors if t.kind == "weight"]
    matched = {w.quantized.quantized for w in matching.weights if w.quantized is not None}
    assert {t.quantized for t in weights} <= matched
    assert all(u.reason for u in matching.unmatched)
    assert set(matching.outputs) == {o.name for o in float_model.outputs}
    names = [p.name for p in matching.activations]
    assert len(names) == len(set(names))
    lone = {u.name for u in matching.unmatched if u.kind == "activation" and u.model == "float"}
    assert not lone & set(names)
    computed = [o for n in float_model.nodes if n.op_type != "Constant" for o in n.outputs if o]
    floating = {t for t in computed if float_model.info(t).dtype in FLOAT_DTYPES}
    folded = {t for t in floating if t not in lone and t not in names}
    assert all("/Constant" in t or _is_constant(float_model, t) for t in folded), folded


def _is_constant(loaded: Model, tensor: str) -> bool:
    from inspector.matching import constant_value

    return constant_value(loaded, tensor) is not None


def test_a_value_that_is_not_a_number_does_not_pass_for_a_limit() -> None:
    assert math.isinf(rectify(np.array([math.inf]), None, Model(conv_relu_gemm()))[0])
