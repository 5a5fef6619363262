from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from inspector.comparison import Pin
from inspector.content import Summary
from inspector.errors import ModelError
from inspector.matching import (
    Matching,
    Observed,
    activation_channel_axis,
    constant_value,
    match_tensors,
    rectify,
    to_observe,
    weight_channel_axis,
)
from inspector.model import FLOAT_DTYPES, Model, Node
from inspector.model_files import load_model
from inspector.prepare import prepare
from inspector.qparams import qparams_from_range
from inspector.recipe import QuantConfig
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
    assert len(found["r"].rectifiers) == 1
    assert found["r"].rectifiers[0].op_type == "Relu"
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
    assert not found["r"].rectifiers
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
    np.testing.assert_array_equal(rectify(x, [new.nodes[0]], new), [0, 3, 6])
    old = Node(index=0, name="c", op_type="Clip", domain="", inputs=("x",), outputs=("y",),
               attributes={"max": 6.0})  # fmt: skip
    np.testing.assert_array_equal(rectify(x, [old], new), [-1, 3, 6])
    assert rectify(x, (), new) is x


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
    return constant_value(loaded, tensor) is not None


def test_a_value_that_is_not_a_number_does_not_pass_for_a_limit() -> None:
    assert math.isinf(rectify(np.array([math.inf]), (), Model(conv_relu_gemm()))[0])


# -- matches set by hand -----------------------------------------------------------------------


def chain(names: str, *, other: bool = False) -> Model:
    """x through Neg, Sigmoid and Tanh; `other` puts an operator between that nobody knows."""
    a, b, c = names
    nodes = [helper.make_node("Neg", ["x"], [a], f"{a}_n")]
    source = a
    if other:
        nodes.append(helper.make_node("Softsign", [a], ["odd"], "odd_n"))
        source = "odd"
    nodes += [
        helper.make_node("Sigmoid", [source], [b], f"{b}_n"),
        helper.make_node("Tanh", [b], [c], f"{c}_n"),
        helper.make_node("Concat", [c, b], ["y"], "y_n", axis=0),
    ]
    return Model(model(nodes, [("x", [4])], [("y", [8])]))


def test_a_pin_overrules_names_and_edges() -> None:
    free = {p.name: p.after for p in match_tensors(chain("abc"), chain("abc")).activations}
    assert free["b"] == "b"
    matching = match_tensors(
        chain("abc"), chain("abc"), pins=[Pin(float_name="b", quantized_name="c")]
    )
    found = {p.name: p for p in matching.activations}
    assert (found["b"].after, found["b"].matched_by, found["b"].note) == ("c", "pin", "set by hand")
    assert found["a"].after == "a"


def test_a_pin_overrules_the_match_of_a_weight() -> None:
    proto = model(
        [
            helper.make_node("MatMul", ["x", "a"], ["m"], "first"),
            helper.make_node("MatMul", ["m", "b"], ["y"], "second"),
        ],
        [("x", [1, 4])], [("y", [1, 4])],
        [array("a", floats((4, 4), 1)), array("b", floats((4, 4), 2))],
    )  # fmt: skip
    pins = [Pin(float_name="a", quantized_name="b")]
    (a, b) = match_tensors(Model(proto), Model(proto), pins=pins).weights
    assert (a.name, a.quantized_name, a.matched_by) == ("a", "b", "pin")
    assert (b.name, b.quantized_name) == ("b", "b")


def test_a_refused_tensor_is_not_compared_and_nothing_is_a_part_of_it(tmp_path: Path) -> None:
    float_model, quantized = pair(conv_relu_gemm(), tmp_path)
    pins = [Pin(float_name="r", quantized_name=None), Pin(float_name="gw", quantized_name=None)]
    matching = match_tensors(float_model, quantized, pins=pins)
    assert "r" not in {p.name for p in matching.activations}
    assert "gw" not in {w.name for w in matching.weights}
    found = {u.name: u for u in matching.unmatched}
    assert found["r"].reason == found["gw"].reason == "refused by hand"
    assert (found["gw"].kind, found["r"].kind) == ("weight", "activation")
    assert found["c"].fused_into == ""
    assert found["c"].reason == "a part of r, which is not compared"


@pytest.mark.parametrize(
    ("mine", "its", "message"),
    [
        ("rr", "r", "model has no tensor 'rr'; the nearest names are 'r'"),
        ("r", "prr", "model has no tensor 'prr'; the nearest names are "),
        ("r", "w", "r is computed in model, w is constant in model: they cannot be a pair"),
        ("y", "f", "y is an output of model: it is compared with output y of model, not with f"),
    ],
)
def test_a_pin_that_cannot_be_is_refused_with_the_nearest_names(
    mine: str, its: str, message: str
) -> None:
    loaded = Model(conv_relu_gemm())
    with pytest.raises(ModelError) as caught:
        match_tensors(loaded, loaded, pins=[Pin(float_name=mine, quantized_name=its)])
    assert message in caught.value.message
    assert caught.value.hint


# -- by their values ---------------------------------------------------------------------------


def observed(matching: Matching, values: dict[str, np.ndarray]) -> Observed:
    mine, its = to_observe(matching)
    return Observed(
        float_values={n: Summary.of(values[n]) for n in mine},
        quantized_values={n: Summary.of(values[n]) for n in its},
    )


def rewritten() -> tuple[Model, Model, dict[str, np.ndarray]]:
    """a*b + b against b*(a+1): one result, other steps; `p` and `q` are the same but transposed."""
    ends = [("x", [6, 7])], [("y", [6, 7])]
    float_model = Model(
        model(
            [
                helper.make_node("Softplus", ["x"], ["s"], "sp"),
                helper.make_node("LpNormalization", ["s"], ["p"], "lp", axis=1),
                helper.make_node("Sin", ["p"], ["y"], "sin"),
            ],
            *ends,
        )
    )
    other = Model(
        model(
            [
                helper.make_node("Elu", ["x"], ["e"], "elu"),
                helper.make_node("Transpose", ["e"], ["q"], "t", perm=[1, 0]),
                helper.make_node("Cos", ["q"], ["c"], "cos"),
                helper.make_node("Transpose", ["c"], ["y"], "t2", perm=[1, 0]),
            ],
            *ends,
        )
    )
    p = floats((6, 7), 5)
    values = {
        "s": floats((6, 7), 1), "p": p, "e": floats((6, 7), 2), "q": p.T + 0.01 * floats((7, 6), 3),
        "c": floats((7, 6), 4),
    }  # fmt: skip
    return float_model, other, values


def test_activations_that_nothing_else_identifies_are_paired_by_their_values() -> None:
    float_model, other, values = rewritten()
    blind = match_tensors(float_model, other)
    assert {p.name for p in blind.activations} == {"x", "y"}
    assert to_observe(blind)[0] == ("s", "p")
    assert "q" in to_observe(blind)[1]
    seen = match_tensors(float_model, other, observed=observed(blind, values))
    found = {p.name: p for p in seen.activations}
    assert (found["p"].after, found["p"].permutation) == ("q", (1, 0))
    assert found["p"].matched_by == "content"
    assert {u.name for u in seen.unmatched} == {"s"}


def test_a_refusal_holds_against_content_too() -> None:
    float_model, other, values = rewritten()
    pins = [Pin(float_name="p", quantized_name=None)]
    seen = observed(match_tensors(float_model, other), values)
    matching = match_tensors(float_model, other, pins=pins, observed=seen)
    assert {p.name for p in matching.activations} == {"x", "y"}


def test_nothing_is_to_be_observed_where_everything_is_matched() -> None:
    loaded = Model(conv_relu_gemm())
    assert to_observe(match_tensors(loaded, loaded)) == ((), ())


# -- inputs ------------------------------------------------------------------------------------


def test_a_half_precision_input_is_said_and_converted() -> None:
    half = conv_relu_gemm()
    half.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    half.graph.node.insert(0, helper.make_node("Cast", ["x"], ["full"], "cast", to=1))
    half.graph.node[1].input[0] = "full"
    matching = match_tensors(Model(conv_relu_gemm()), Model(half))
    conversion = matching.conversions["x"]
    assert (conversion.dtype, conversion.permutation, conversion.qparams) == ("float16", None, None)
    assert conversion.note in matching.notes


def test_an_integer_input_comes_with_its_scale() -> None:
    ends = [("x", [4])], [("y", [4])]
    float_model = Model(model([helper.make_node("Neg", ["x"], ["y"], "n")], *ends))
    proto = model(
        [
            helper.make_node("DequantizeLinear", ["x", "s", "z"], ["d"], "dq"),
            helper.make_node("Neg", ["d"], ["y"], "n"),
        ],
        *ends,
        [array("s", np.float32(0.5)), array("z", np.uint8(3))],
    )
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    matching = match_tensors(float_model, Model(proto))
    conversion = matching.conversions["x"]
    assert conversion.dtype == "uint8"
    assert conversion.qparams is not None
    np.testing.assert_array_equal(conversion.qparams.quantize(np.array([0.0, 1.0])), [3, 5])
    assert next(p for p in matching.activations if p.name == "x").after == "d"


@pytest.mark.parametrize(
    ("mine", "its", "order"),
    [
        ([1, 3, 32, 32], [1, 32, 32, 3], (0, 2, 3, 1)),
        (["n", 3, "h", "w"], ["n", "h", "w", 3], (0, 2, 3, 1)),
        ([1, 32, 32, 3], [1, 3, 32, 32], (0, 3, 1, 2)),
        ([1, 3, 3, 3], [1, 3, 3, 3], None),
        (["n", "c", "t"], ["n", "t", "c"], None),
    ],
)
def test_the_axis_order_of_an_input_is_what_makes_the_known_sizes_meet(
    mine: list[int | str], its: list[int | str], order: tuple[int, ...] | None
) -> None:
    one, other = (
        Model(model([helper.make_node("Neg", ["x"], ["y"], "n")], [("x", s)], [("y", None)]))
        for s in (mine, its)
    )
    conversion = match_tensors(one, other).conversions.get("x")
    assert (conversion.permutation if conversion is not None else None) == order


# -- accounting --------------------------------------------------------------------------------


@needs_models
@pytest.mark.parametrize("folder", sorted(p.name for p in MODELS.glob("*") if p.is_dir()))
def test_every_float_tensor_of_a_real_model_is_in_one_place_also_after_pre_processing(
    folder: str, tmp_path: Path
) -> None:
    float_model = load_model(MODELS / folder / "model.onnx")
    prepared = prepare(float_model, QuantConfig(), tmp_path).model
    for path in sorted((MODELS / folder).glob("*.onnx")):
        if path.name == "model.onnx":
            continue
        for source in (float_model, prepared):
            matching = match_tensors(source, load_model(path))
            places = Counter(
                [
                    *(p.name for p in matching.activations if p.name in matching.float_tensors),
                    *{w.name for w in matching.weights if w.name in matching.float_tensors},
                    *(u.name for u in matching.unmatched if u.model == "float"),
                ]
            )
            assert places == Counter(matching.float_tensors)
            compared = {p.name for p in matching.activations} | {w.name for w in matching.weights}
            assert {u.fused_into for u in matching.unmatched} <= {"", *compared}
            assert not [u for u in matching.unmatched if u.model == "quantized"]
            if path.name == "gtcrn.onnx" and source is prepared:
                continue  # one is optimized, the other is as exported: much has no twin
            # What is left is dead, computed, or moved in other steps (fastestdet's shuffles).
            lone = [u for u in matching.unmatched if u.model == "float" and not u.fused_into]
            known = ("nothing reads it", "layout changed: ", "the quantized model's GRU_700 has no")
            assert all(u.reason.startswith(known) for u in lone), lone[:3]


@needs_models
def test_weights_inside_bodies_are_found_with_their_gates_in_order() -> None:
    float_model = load_model(MODELS / "silero-vad-16k" / "model.onnx")
    quantized = load_model(MODELS / "silero-vad-16k" / "ort_static_qdq.onnx")
    matching = match_tensors(float_model, quantized)
    scoped = [w for w in matching.weights if w.scope]
    assert {w.scope for w in scoped} == {
        "/model/decoder/If_1/then_branch", "/model/decoder/If_1/else_branch",
    }  # fmt: skip
    assert {w.name for w in scoped} == {
        "model.decoder.rnn.weight_ih", "model.decoder.rnn.weight_hh", "model.decoder.rnn.bias_ih",
    }  # fmt: skip
    assert all("gate order i, o, f, c here" in w.note for w in scoped)
    joined = {u.name: u.fused_into for u in matching.unmatched}
    assert joined["model.decoder.rnn.bias_hh"] == "model.decoder.rnn.bias_ih"
    bodies = {b.path: b for b in quantized.bodies}
    for weight in scoped:
        actual = constant_value(bodies[weight.scope], weight.quantized_name)
        np.testing.assert_allclose(weight.reference(), actual, rtol=1e-6)


# -- where edges end ---------------------------------------------------------------------------


def islands(names: str, ops: tuple[str, str], *, between: str = "Sigmoid") -> Model:
    """x and y, each behind an operator that the other has not; `between` lies out of reach."""
    a, b, c = names
    return Model(
        model(
            [
                helper.make_node(ops[0], ["x"], [a], f"{a}_n"),
                helper.make_node(between, [a], [b], f"{b}_n"),
                helper.make_node("Mul", [b, "k"], [c], f"{c}_n"),
                helper.make_node(ops[1], [c], ["y"], "y_n"),
            ],
            [("x", [4])],
            [("y", [4])],
            [array("k", floats((4,), 1))],
        )
    )


def test_names_reach_where_edges_do_not() -> None:
    matching = match_tensors(islands("abc", ("Neg", "Sin")), islands("abc", ("Abs", "Cos")))
    found = {p.name: p.after for p in matching.activations}
    assert found == {"x": "x", "a": "a", "b": "b", "c": "c", "y": "y"}
    others = match_tensors(islands("abc", ("Neg", "Sin")), islands("def", ("Abs", "Cos")))
    assert {p.name for p in others.activations} == {"x", "y"}


def test_a_name_on_another_operator_is_no_match() -> None:
    other = islands("abc", ("Abs", "Cos"), between="Tanh")
    matching = match_tensors(islands("abc", ("Neg", "Sin")), other)
    assert "a" not in {p.name for p in matching.activations}
    assert {u.name for u in matching.unmatched} == {"a"}


def test_a_pin_where_edges_end_is_where_they_begin_again() -> None:
    pins = [Pin(float_name="a", quantized_name="d")]
    mine, its = islands("abc", ("Neg", "Sin")), islands("def", ("Abs", "Cos"))
    found = {p.name: p for p in match_tensors(mine, its, pins=pins).activations}
    assert (found["a"].matched_by, found["a"].after) == ("pin", "d")
    assert (found["b"].matched_by, found["b"].after) == ("structure", "e")
    assert found["c"].after == "f"


def test_a_weight_whose_node_has_no_twin_is_found_by_its_name() -> None:
    ends = [("x", [2])], [("y", [2])]
    small = array("k", floats((2,), 1))
    one = model([helper.make_node("Mul", ["x", "k"], ["y"], "n")], *ends, [small])
    other = model([helper.make_node("Div", ["x", "k"], ["y"], "n")], *ends, [small])
    (weight,) = match_tensors(Model(one), Model(other)).weights
    assert (weight.name, weight.quantized_name, weight.matched_by) == ("k", "k", "name")
