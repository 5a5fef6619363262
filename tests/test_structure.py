"""Pairs that only edges can find: every quantized model here has other names than the float one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from inspector.folding import constant_value
from inspector.matching import Matching, match_tensors
from inspector.model import Model
from inspector.model_files import load_model
from inspector.scheme import stored_values
from tests.samples import (
    array,
    boxes_and_scores_in_one_concat,
    conv_relu_gemm,
    floats,
    model,
    qdq_of,
    save,
)
from tests.test_renaming import renamed

Node = onnx.NodeProto


def node(op_type: str, inputs: str, outputs: str, name: str = "", **attributes: Any) -> Node:
    return helper.make_node(
        op_type, inputs.split(), outputs.split(), name or outputs.split()[0] + "_node", **attributes
    )


def model_copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(proto.SerializeToString())


def matched(
    float_proto: onnx.ModelProto, quantized_proto: onnx.ModelProto
) -> tuple[Matching, dict[str, str], Model, Model]:
    """The matching without common names, and the old name by new tensor name; all accounted for."""
    float_model = Model(float_proto)
    quantized, back, _ = renamed(Model(quantized_proto), seed=3, prefix="q")
    matching = match_tensors(float_model, quantized)
    places = Counter(
        [
            *(p.name for p in matching.activations if p.name in matching.float_tensors),
            *{w.name for w in matching.weights if w.name in matching.float_tensors},
            *(u.name for u in matching.unmatched if u.model == "float"),
        ]
    )
    assert places == Counter(matching.float_tensors)
    assert all(u.reason for u in matching.unmatched)
    compared = {p.name for p in matching.activations} | {w.name for w in matching.weights}
    assert {u.fused_into for u in matching.unmatched} <= {"", *compared}
    return matching, back, float_model, quantized


def activations(matching: Matching, back: dict[str, str]) -> dict[str, str]:
    return {p.name: back[p.after] for p in matching.activations}


def weights(matching: Matching, back: dict[str, str]) -> dict[str, str]:
    return {w.name: back[w.quantized_name] for w in matching.weights}


def fused(matching: Matching) -> dict[str, str]:
    return {u.name: u.fused_into for u in matching.unmatched if u.fused_into}


def lone(matching: Matching) -> set[str]:
    return {u.name for u in matching.unmatched if not u.fused_into}


def worst_weight_db(matching: Matching, quantized: Model) -> float:
    """The lowest SQNR of all pairs, from what the quantized file holds."""
    found = []
    for pair in matching.weights:
        reference = np.asarray(pair.reference(), np.float64)
        actual = (
            stored_values(quantized, pair.quantized)
            if pair.quantized is not None
            else constant_value(quantized, pair.quantized_name)
        )
        assert actual is not None
        assert actual.shape == reference.shape, pair.name
        noise = float(((reference - actual) ** 2).sum())
        found.append(10 * np.log10(float((reference**2).sum()) / max(noise, 1e-300)))
    return min(found)


class Reader(CalibrationDataReader):
    def __init__(self, shape: Sequence[int]) -> None:
        self.feeds = iter([{"x": floats(shape, seed)} for seed in range(3)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def quantized_by_ort(proto: onnx.ModelProto, tmp_path: Path, **options: Any) -> onnx.ModelProto:
    source = save(proto, tmp_path / "f.onnx")
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    quantize_static(source, tmp_path / "q.onnx", Reader(shape), **options)
    return onnx.load(tmp_path / "q.onnx")


# -- formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_format", [QuantFormat.QDQ, QuantFormat.QOperator])
def test_a_quantized_model_without_names_is_matched_whole(
    tmp_path: Path, quant_format: QuantFormat
) -> None:
    proto = conv_relu_gemm()
    twin = quantized_by_ort(proto, tmp_path, quant_format=quant_format)
    matching, back, _, quantized = matched(proto, twin)
    assert {p.name for p in matching.activations} == {"x", "r", "p", "f", "y"}
    assert fused(matching) == {"c": "r"}
    assert set(weights(matching, back)) == {"w", "b", "gw", "gb"}
    assert lone(matching) == set()
    assert worst_weight_db(matching, quantized) > 25
    found = {p.name: p for p in matching.activations}
    assert len(found["r"].rectifiers) == 1
    assert {p.matched_by for p in matching.activations} == {"structure"}


@pytest.mark.parametrize(
    "options",
    [
        {"extra_options": {"AddQDQPairToWeight": True}},
        {"extra_options": {"DedicatedQDQPair": True}},
        {"per_channel": True},
        {"per_channel": True, "quant_format": QuantFormat.QOperator},
        {"activation_type": QuantType.QInt16, "extra_options": {"UseQDQContribOps": True}},
    ],
    ids=["qdq on the float weight", "one pair per reader", "per channel", "qoperator", "16 bit"],
)
def test_weights_are_found_wherever_a_format_keeps_them(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    proto = conv_relu_gemm()
    matching, back, _, quantized = matched(proto, quantized_by_ort(proto, tmp_path, **options))
    assert set(weights(matching, back)) == {"w", "b", "gw", "gb"}
    assert lone(matching) == set()
    assert worst_weight_db(matching, quantized) > 40


def test_packed_weights_are_found() -> None:
    proto = model(
        [node("MatMul", "x w1", "m"), node("Relu", "m", "r"), node("MatMul", "r w2", "y")],
        [("x", [2, 64])],
        [("y", [2, 32])],
        [array("w1", floats((64, 64), 1)), array("w2", floats((64, 32), 2))],
    )
    packer = MatMulNBitsQuantizer(model_copy(proto), bits=4, block_size=32, is_symmetric=True)
    packer.process()
    matching, back, _, quantized = matched(proto, packer.model.model)
    assert weights(matching, back) == {"w1": "w1_Q4", "w2": "w2_Q4"}
    assert activations(matching, back) == {n: n for n in ("x", "m", "r", "y")}
    assert worst_weight_db(matching, quantized) > 15


def test_a_dynamic_lstm_is_an_lstm(tmp_path: Path) -> None:
    proto = model(
        [helper.make_node("LSTM", ["x", "W", "R", "B"], ["Y", "h"], "lstm", hidden_size=8),
         node("Sigmoid", "Y", "y")],
        [("x", [5, 1, 6])],
        [("y", [5, 1, 1, 8])],
        [array("W", floats((1, 32, 6), 1)), array("R", floats((1, 32, 8), 2)),
         array("B", floats((1, 64), 3))],
    )  # fmt: skip
    quantize_dynamic(save(proto, tmp_path / "f.onnx"), tmp_path / "q.onnx")
    matching, back, _, quantized = matched(proto, onnx.load(tmp_path / "q.onnx"))
    assert weights(matching, back) == {"W": "W_quantized", "R": "R_quantized", "B": "B"}
    assert {p.name for p in matching.activations} == {"x", "Y", "h", "y"}
    assert worst_weight_db(matching, quantized) > 30


def test_dynamic_products_are_matched_behind_their_rescaling(tmp_path: Path) -> None:
    proto = model(
        [
            node("MatMul", "x w1", "m"),
            node("Add", "m b", "a"),
            node("Relu", "a", "r"),
            node("MatMul", "r w2", "y"),
        ],
        [("x", [2, 16])],
        [("y", [2, 4])],
        [
            array("w1", floats((16, 8), 1)),
            array("b", floats((8,), 2)),
            array("w2", floats((8, 4), 3)),
        ],
    )
    source = save(proto, tmp_path / "f.onnx")
    quantize_dynamic(source, tmp_path / "q.onnx")
    matching, back, _, quantized = matched(proto, onnx.load(tmp_path / "q.onnx"))
    found = activations(matching, back)
    assert set(found) == {"x", "m", "a", "r", "y"}
    assert "_output_0_quantized" not in found["m"]
    makers = {o: n.op_type for n in quantized.nodes for o in n.outputs}
    new = {p.name: makers.get(p.after) for p in matching.activations}
    assert new["m"] == new["y"] == "Mul", "the integer product is not in the float model's unit"
    assert weights(matching, back) == {"w1": "w1_quantized", "b": "b", "w2": "w2_quantized"}
    assert worst_weight_db(matching, quantized) > 25


# -- folds -------------------------------------------------------------------------------------


def normalization(channels: int) -> tuple[Node, list[onnx.TensorProto], np.ndarray, np.ndarray]:
    """A BatchNormalization of `c` into `n`, its constants, its gain and its shift in float64."""
    gamma, beta, mean = (floats((channels,), s) for s in (11, 12, 13))
    variance = np.abs(floats((channels,), 14)) + 0.5
    gain = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + 1e-5)
    constants = [array("ga", gamma), array("be", beta), array("me", mean), array("va", variance)]
    return node("BatchNormalization", "c ga be me va", "n"), constants, gain, beta - mean * gain


@pytest.mark.parametrize(
    ("op_type", "shape", "spread"),
    [
        ("Conv", (4, 3, 3, 3), (-1, 1, 1, 1)),
        ("ConvTranspose", (3, 4, 3, 3), (1, -1, 1, 1)),
        ("Gemm", (3, 4), (1, -1)),
    ],
)
def test_a_normalization_folded_into_a_node_is_compared_after_the_same_fold(
    op_type: str, shape: tuple[int, ...], spread: tuple[int, ...]
) -> None:
    weight, bias = floats(shape, 1), floats((4,), 2)
    bn, constants, gain, shift = normalization(4)
    size = [1, 3, *((5, 5) if op_type != "Gemm" else ())]
    out = [1, 4, None, None][: len(size)]
    float_proto = model(
        [node(op_type, "x w b", "c"), bn, node("Relu", "n", "y")],
        [("x", size)],
        [("y", out)],  # type: ignore[list-item]
        [array("w", weight), array("b", bias), *constants],
    )
    folded = (weight * gain.reshape(spread)).astype(np.float32)
    twin = model(
        [node(op_type, "x w b", "n"), node("Relu", "n", "y")],
        [("x", size)],
        [("y", out)],  # type: ignore[list-item]
        [array("w", folded), array("b", (bias * gain + shift).astype(np.float32))],
    )
    matching, back, _, quantized = matched(float_proto, twin)
    assert activations(matching, back) == {"x": "x", "n": "n", "y": "y"}
    assert fused(matching) == {"c": "n", "ga": "w", "be": "w", "me": "w", "va": "w"}
    assert weights(matching, back) == {"w": "w", "b": "b"}
    assert worst_weight_db(matching, quantized) > 100
    assert {w.note for w in matching.weights} == {
        "compared after folding BatchNormalization n_node"
    }


@pytest.mark.parametrize("turned", [False, True])
def test_a_matmul_and_an_add_are_one_gemm_on_either_side(turned: bool) -> None:
    weight, bias = floats((6, 4), 1), floats((4,), 2)
    two = model(
        [node("MatMul", "x w", "m"), node("Add", "m b", "a"), node("Sigmoid", "a", "y")],
        [("x", [3, 6])],
        [("y", [3, 4])],
        [array("w", weight), array("b", bias)],
    )
    one = model(
        [node("Gemm", "x w b", "a", transB=int(turned)), node("Sigmoid", "a", "y")],
        [("x", [3, 6])],
        [("y", [3, 4])],
        [array("w", weight.T if turned else weight), array("b", bias)],
    )
    matching, back, _, quantized = matched(two, one)
    assert activations(matching, back) == {"x": "x", "a": "a", "y": "y"}
    assert fused(matching) == {"m": "a"}
    assert weights(matching, back) == {"w": "w", "b": "b"}
    assert worst_weight_db(matching, quantized) > 200
    matching, back, _, quantized = matched(one, two)
    assert activations(matching, back) == {"x": "x", "a": "a", "y": "y"}
    assert weights(matching, back) == {"w": "w", "b": "b"}
    assert worst_weight_db(matching, quantized) > 200


@pytest.mark.parametrize("op_type", ["Add", "Mul"])
def test_a_constant_folded_into_a_conv_is_a_part_of_it(op_type: str) -> None:
    weight, bias, constant = floats((4, 3, 1, 1), 1), floats((4,), 2), floats((4, 1, 1), 3)
    float_proto = model(
        [node("Conv", "x w b", "c"), node(op_type, "c k", "d"), node("Sigmoid", "d", "y")],
        [("x", [1, 3, 4, 4])],
        [("y", [1, 4, 4, 4])],
        [array("w", weight), array("b", bias), array("k", constant)],
    )
    by = constant.reshape(-1)
    parts = (weight, bias + by) if op_type == "Add" else (weight * constant[:, None], bias * by)
    twin = model(
        [node("Conv", "x w b", "d"), node("Sigmoid", "d", "y")],
        [("x", [1, 3, 4, 4])],
        [("y", [1, 4, 4, 4])],
        [array("w", parts[0]), array("b", parts[1])],
    )
    matching, back, _, quantized = matched(float_proto, twin)
    assert activations(matching, back) == {"x": "x", "d": "d", "y": "y"}
    assert fused(matching) == {"c": "d", "k": "w"}
    assert worst_weight_db(matching, quantized) > 100


def test_limits_of_a_folded_clip_are_a_part_of_its_result() -> None:
    qdq, constants = qdq_of("c", "d", 6 / 255, -128)
    ends = [("x", [1, 3, 4, 4])], [("y", [1, 4, 4, 4])]
    weight = array("w", floats((4, 3, 1, 1), 1))
    float_proto = model(
        [node("Conv", "x w", "c"), node("Clip", "c low high", "r"), node("Sigmoid", "r", "y")],
        *ends,
        [weight, array("low", np.float32(0)), array("high", np.float32(6))],
    )
    twin = model(
        [node("Conv", "x w", "c"), *qdq, node("Sigmoid", "d", "y")], *ends, [weight, *constants]
    )
    matching, back, _, _ = matched(float_proto, twin)
    assert fused(matching) == {"c": "r", "low": "r", "high": "r"}
    found = {p.name: p for p in matching.activations}
    assert len(found["r"].rectifiers) == 1
    assert found["r"].rectifiers[0].op_type == "Clip"
    assert back[found["r"].before or ""] == "c"


def test_nodes_that_change_nothing_are_no_gap() -> None:
    base = [("x", [2, 4])], [("y", [2, 4])]
    float_proto = model(
        [
            node("Identity", "x", "i"),
            node("Neg", "i", "n"),
            node("Dropout", "n", "d"),
            node("Cast", "d", "half", to=onnx.TensorProto.FLOAT16),
            node("Cast", "half", "full", to=onnx.TensorProto.FLOAT),
            node("Slice", "full zero all", "s"),
            node("Sigmoid", "s", "y"),
        ],
        *base,
        [array("zero", np.array([0])), array("all", np.array([2**31 - 1]))],
    )
    twin = model([node("Neg", "x", "n"), node("Sigmoid", "n", "y")], *base)
    matching, back, _, _ = matched(float_proto, twin)
    assert activations(matching, back) == {"x": "x", "n": "n", "y": "y"}
    assert fused(matching) == {"i": "x", "d": "n", "half": "n", "full": "n", "s": "n"}


def test_what_the_float_model_computes_twice_may_be_computed_once() -> None:
    ends = [("x", [2, 4])], [("y", [2, 4])]
    float_proto = model(
        [node("Mul", "x k1", "a"), node("Mul", "x k2", "b"), node("Add", "a b", "y")],
        *ends,
        [array("k1", np.float32(2.5)), array("k2", np.float32(2.5))],
    )
    twin = model(
        [node("Mul", "x k", "a"), node("Add", "a a", "y")], *ends, [array("k", np.float32(2.5))]
    )
    matching, back, _, _ = matched(float_proto, twin)
    assert activations(matching, back) == {"x": "x", "a": "a", "b": "a", "y": "y"}
    assert weights(matching, back) == {"k1": "k", "k2": "k"}


# -- layouts -----------------------------------------------------------------------------------


def test_an_input_with_its_channels_last_is_fed_and_compared_in_its_own_order() -> None:
    weight = array("w", floats((4, 3, 3, 3), 1))
    float_proto = model(
        [node("Conv", "x w", "c"), node("Sigmoid", "c", "y")],
        [("x", [1, 3, 8, 8])], [("y", [1, 4, 6, 6])], [weight],
    )  # fmt: skip
    qdq, constants = qdq_of("x", "d", 0.1, 0)
    twin = model(
        [
            *qdq,
            node("Transpose", "d", "t", perm=[0, 3, 1, 2]),
            node("Conv", "t w", "c"),
            node("Transpose", "c", "last", perm=[0, 2, 3, 1]),
            node("Sigmoid", "last", "s"),
            node("Transpose", "s", "y", perm=[0, 3, 1, 2]),
        ],
        [("x", [1, 8, 8, 3])], [("y", [1, 4, 6, 6])], [weight, *constants],
    )  # fmt: skip
    matching, back, _, _ = matched(float_proto, twin)
    conversion = matching.conversions["x"]
    assert conversion.permutation == (0, 2, 3, 1)
    assert any("axes in the order (0, 2, 3, 1)" in note for note in matching.notes)
    found = {p.name: p for p in matching.activations}
    assert found["x"].permutation == (0, 3, 1, 2)
    assert back[found["x"].before or ""] == "x"
    assert (back[found["c"].after], found["c"].permutation) == ("c", None)
    assert lone(matching) == set()


def test_transposes_that_moved_through_a_graph_keep_its_tensors_comparable() -> None:
    ends = [("x", [1, 2, 3, 4])], [("y", [1, 3, 4, 2])]
    float_proto = model(
        [
            node("Transpose", "x", "t", perm=[0, 2, 3, 1]),
            node("Sigmoid", "t", "s"),
            node("ReduceMean", "s", "m", axes=[3], keepdims=1),
            node("Sub", "s m", "y"),
        ],
        *ends,
    )
    twin = model(
        [
            node("Sigmoid", "x", "s"),
            node("ReduceMean", "s", "m", axes=[1], keepdims=1),
            node("Sub", "s m", "d"),
            node("Transpose", "d", "y", perm=[0, 2, 3, 1]),
        ],
        *ends,
    )
    matching, back, _, _ = matched(float_proto, twin)
    found = {p.name: (back[p.after], p.permutation) for p in matching.activations}
    moved = (0, 2, 3, 1)
    assert found == {
        "x": ("x", None), "t": ("x", moved), "s": ("s", moved), "m": ("m", moved), "y": ("y", None),
    }  # fmt: skip


def test_a_product_made_a_gemm_between_reshapes_is_found_with_its_bias() -> None:
    weight, bias = floats((6, 4), 1), floats((4,), 2)
    ends = [("x", [2, 3, 6])], [("y", [2, 3, 4])]
    float_proto = model(
        [node("MatMul", "x w", "m"), node("Add", "m b", "a"), node("Sigmoid", "a", "y")],
        *ends,
        [array("w", weight), array("b", bias)],
    )
    twin = model(
        [
            node("Reshape", "x flat", "f"),
            node("Gemm", "f w b", "g"),
            node("Reshape", "g deep", "a"),
            node("Sigmoid", "a", "y"),
        ],
        *ends,
        [
            array("w", weight),
            array("b", bias),
            array("flat", np.array([6, 6])),
            array("deep", np.array([2, 3, 4])),
        ],
    )
    matching, back, _, _ = matched(float_proto, twin)
    assert activations(matching, back) == {"x": "x", "a": "a", "y": "y"}
    assert fused(matching) == {"m": "a"}
    assert weights(matching, back) == {"w": "w", "b": "b"}


# -- ambiguity ---------------------------------------------------------------------------------


def branches(seeds: Sequence[int], letters: str, *, crossed: bool = False) -> onnx.ModelProto:
    """Parallel Convs that look alike, joined by a Sum: only weights tell them apart."""
    order = list(letters)
    nodes = [node("Conv", f"x w{c}", c) for c in order]
    if crossed:
        nodes.reverse()
    return model(
        [*nodes, node("Mean", " ".join(order), "y")],
        [("x", [1, 3, 5, 5])],
        [("y", [1, 4, 3, 3])],
        [array(f"w{c}", floats((4, 3, 3, 3), s)) for c, s in zip(order, seeds, strict=True)],
    )


def test_parallel_branches_are_told_apart_by_their_weights() -> None:
    matching, back, _, _ = matched(branches([1, 2, 3], "abc"), branches([3, 1, 2], "def"))
    assert weights(matching, back) == {"wa": "we", "wb": "wf", "wc": "wd"}
    found = activations(matching, back)
    assert (found["a"], found["b"], found["c"]) == ("e", "f", "d")


def test_edges_decide_before_weights() -> None:
    def two(a: int, b: int, names: str) -> onnx.ModelProto:
        one, other = names
        return model(
            [
                node("Conv", f"x w{one}", one),
                node("Conv", f"x w{other}", other),
                node("Sigmoid", one, f"s{one}"),
                node("Sub", f"s{one} {other}", "y"),
            ],
            [("x", [1, 3, 5, 5])],
            [("y", [1, 4, 3, 3])],
            [
                array(f"w{one}", floats((4, 3, 3, 3), a)),
                array(f"w{other}", floats((4, 3, 3, 3), b)),
            ],
        )

    matching, back, _, quantized = matched(two(1, 2, "ab"), two(2, 1, "cd"))
    assert weights(matching, back) == {"wa": "wc", "wb": "wd"}
    assert worst_weight_db(matching, quantized) < 3, "swapped weights must be seen"


def test_names_decide_before_weights() -> None:
    straight, swapped = Model(branches([1, 2], "ab")), Model(branches([2, 1], "ab"))
    matching = match_tensors(straight, swapped)
    assert {w.name: w.quantized_name for w in matching.weights} == {"wa": "wa", "wb": "wb"}
    assert worst_weight_db(matching, swapped) < 3


def test_a_name_that_belongs_to_another_node_loses_to_edges_and_this_is_said() -> None:
    ends = [("x", [1, 3, 5, 5])], [("y", [1, 4, 3, 3])]
    weight = array("w", floats((4, 3, 3, 3), 1))
    mine = [("Conv", "x w", "1"), ("Relu", "1", "2"), ("Sigmoid", "2", "3"), ("Neg", "3", "y")]
    shifted = {"1": "2", "2": "3", "3": "1"}
    nodes = [node(op, i, o, f"{op}_{o}") for op, i, o in mine]
    others = [
        node(op, " ".join(shifted.get(n, n) for n in i.split()), shifted.get(o, o), f"{op}_{o}")
        for op, i, o in mine
    ]
    matching = match_tensors(
        Model(model(nodes, *ends, [weight])), Model(model(others, *ends, [weight]))
    )
    found = {p.name: p.after for p in matching.activations}
    assert found == {"x": "x", "1": "2", "2": "3", "3": "1", "y": "y"}
    assert any("names were not used" in note or "graph edges" in note for note in matching.notes)


def test_a_single_lying_name_is_named() -> None:
    ends = [("x", [2, 4])], [("y", [2, 4])]
    chain = ["Neg", "Sigmoid", "Tanh", "Exp", "Abs"]

    def proto(names: Sequence[str]) -> Model:
        tensors = ["x", *names, "y"]
        return Model(
            model(
                [node(op, a, b) for op, a, b in zip(chain, tensors[:-1], tensors[1:], strict=True)],
                *ends,
            )
        )

    matching = match_tensors(proto("abcd"), proto("abdc"))
    found = {p.name: p.after for p in matching.activations}
    assert (found["c"], found["d"]) == ("d", "c")
    assert any("c is d" in note for note in matching.notes)


def test_the_same_two_models_are_always_matched_the_same() -> None:
    proto = boxes_and_scores_in_one_concat()
    results = [matched(proto, proto)[0] for _ in range(3)]
    for one in results[1:]:
        assert [p.after for p in one.activations] == [p.after for p in results[0].activations]
        assert [w.quantized_name for w in one.weights] == [
            w.quantized_name for w in results[0].weights
        ]
        assert one.unmatched == results[0].unmatched


# -- bodies ------------------------------------------------------------------------------------


def with_body(weight: np.ndarray, *, inside: bool) -> onnx.ModelProto:
    """A product inside an If; its weight lies in the body or in the main graph."""
    constant = [array("bw", weight)]
    branches = [
        helper.make_graph(
            [node("MatMul", "x bw", f"{side}_m")] if side == "then" else [node("Neg", "n", "e_m")],
            side,
            [],
            [helper.make_tensor_value_info(
                "then_m" if side == "then" else "e_m", onnx.TensorProto.FLOAT, None)],
            constant if inside and side == "then" else [],
        )
        for side in ("then", "else")
    ]  # fmt: skip
    return model(
        [
            node("Neg", "x", "n"),
            node("ReduceSum", "x", "total", keepdims=0),
            node("Greater", "total zero", "flag"),
            helper.make_node(
                "If", ["flag"], ["y"], "choice", then_branch=branches[0], else_branch=branches[1]
            ),
        ],
        [("x", [6, 6])],
        [("y", [6, 6])],
        [array("zero", np.float32(0)), *([] if inside else constant)],
    )


@pytest.mark.parametrize("inside", [True, False])
def test_a_constant_inside_a_body_is_found_in_the_other_models_body_or_main_graph(
    inside: bool,
) -> None:
    weight = floats((6, 6), 1)
    float_proto, twin = with_body(weight, inside=inside), with_body(weight, inside=True)
    matching = match_tensors(Model(float_proto), Model(twin))
    scoped = {(w.name, w.quantized_name, w.scope) for w in matching.weights if w.scope}
    assert scoped == {("bw", "bw", "choice/then_branch")}
    found, _, _, quantized = matched(float_proto, twin)
    (pair,) = (w for w in found.weights if w.scope)
    assert pair.name == "bw"
    np.testing.assert_array_equal(pair.reference(), weight)
    assert quantized.bodies
    assert any(s.name.endswith("then_m") for s in matching.not_observed)


# -- size --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_twenty_thousand_nodes_are_matched_in_seconds() -> None:
    def chain(letter: str) -> Model:
        names = ["x", *(f"{letter}{n}" for n in range(19_999)), "y"]
        ops = ["Neg", "Sigmoid", "Tanh", "Abs"]
        nodes = [
            node(ops[at % 4], a, b, f"{letter}n{at}") for at, (a, b) in enumerate(pairwise(names))
        ]
        return Model(model(nodes, [("x", [4])], [("y", [4])]))

    one, other = chain("a"), chain("b")
    begin = time.perf_counter()
    matching = match_tensors(one, other)
    assert time.perf_counter() - begin < 30
    assert [p.after.replace("b", "a") for p in matching.activations] == [
        p.name for p in matching.activations
    ]


@pytest.mark.parametrize("kind", ["Relu", "MatMul", "Pow"])
def test_look_alikes_that_one_node_joins_in_any_order_are_matched_in_seconds(kind: str) -> None:
    count, constants = 150, []
    if kind == "MatMul":
        constants = [array(f"w{at}", floats((4, 4), at)) for at in range(count)]
    elif kind == "Pow":
        constants = [array("w0", np.float32(2))]
    ends = [f"r{at}" for at in range(count)]
    nodes = [
        node(kind, "x" if kind == "Relu" else f"x w{at % len(constants)}", end)
        for at, end in enumerate(ends)
    ]
    proto = model(
        [*nodes, node("Max", " ".join(ends), "y")], [("x", [4, 4])], [("y", [4, 4])], constants
    )
    begin = time.perf_counter()
    matching, back, *_ = matched(proto, proto)
    assert time.perf_counter() - begin < 30
    found = {p.name: back[p.after] for p in matching.activations}
    assert sorted(found.values()) == sorted(["x", *ends, "y"])
    if kind == "MatMul":
        assert all(name == other for name, other in found.items())  # their weights tell


def test_a_loaded_file_gives_the_same_as_one_in_memory(tmp_path: Path) -> None:
    proto = conv_relu_gemm()
    twin = quantized_by_ort(proto, tmp_path)
    again = match_tensors(load_model(tmp_path / "f.onnx"), load_model(tmp_path / "q.onnx"))
    direct = match_tensors(Model(proto), Model(twin))
    assert [p.after for p in again.activations] == [p.after for p in direct.activations]


def test_constants_that_have_no_node_in_common_are_found_by_content() -> None:
    weight = floats((8, 8), 1)
    ends = [("x", [2, 8])], [("y", [2, 8])]
    float_proto = model(
        [node("MatMul", "x w", "m"), node("Sin", "m", "y")], *ends, [array("w", weight)]
    )
    twin = model(
        [node("Einsum", "x w", "m", equation="ij,kj->ik"), node("Cos", "m", "y")],
        *ends,
        [array("w", np.ascontiguousarray(weight.T))],
    )
    matching, back, _, quantized = matched(float_proto, twin)
    (pair,) = matching.weights
    assert (pair.name, back[pair.quantized_name], pair.matched_by) == ("w", "w", "content")
    assert worst_weight_db(matching, quantized) > 200


def test_a_normalization_that_only_the_quantized_model_has_is_stepped_over() -> None:
    bn, constants, gain, shift = normalization(4)
    weight = floats((4, 3, 1, 1), 1)
    ends = [("x", [1, 3, 4, 4])], [("y", [1, 4, 4, 4])]
    folded = (weight * gain.reshape(-1, 1, 1, 1)).astype(np.float32)
    float_proto = model(
        [node("Conv", "x w b", "n"), node("Sigmoid", "n", "y")],
        *ends,
        [array("w", folded), array("b", shift.astype(np.float32))],
    )
    twin = model(
        [node("Conv", "x w", "c"), bn, node("Sigmoid", "n", "y")],
        *ends,
        [array("w", weight), *constants],
    )
    matching, back, _, _ = matched(float_proto, twin)
    assert activations(matching, back) == {"x": "x", "n": "n", "y": "y"}
    reasons = {u.name: u.reason for u in matching.unmatched if u.model == "float"}
    assert set(reasons) == {"w", "b"}
    assert all("keeps BatchNormalization" in reason for reason in reasons.values())


def test_a_constant_that_the_quantized_model_computes_is_compared() -> None:
    value = floats((3, 4), 1)
    ends = [("x", [3, 4])], [("y", [3, 4])]
    float_proto = model([node("Mul", "x k", "y")], *ends, [array("k", value)])
    twin = model(
        [node("Concat", "k1 k2", "k", axis=0), node("Mul", "x k", "y")],
        *ends,
        [array("k1", value[:1]), array("k2", value[1:])],
    )
    matching, back, _, quantized = matched(float_proto, twin)
    assert weights(matching, back) == {"k": "k"}
    assert worst_weight_db(matching, quantized) > 200
    matching, back, _, quantized = matched(twin, float_proto)
    assert weights(matching, back) == {"k": "k"}
    assert fused(matching) == {"k1": "k", "k2": "k"}


def test_an_output_is_compared_with_its_counterpart_whatever_it_equals() -> None:
    ends = [("x", [4])], [("y", [4])]
    float_proto = model([node("Identity", "x", "y")], *ends)
    twin = model([node("Neg", "x", "n"), node("Neg", "n", "y")], *ends)
    matching, back, _, _ = matched(float_proto, twin)
    assert activations(matching, back) == {"x": "x", "y": "y"}


def test_nodes_that_nothing_tells_apart_are_paired_in_their_order() -> None:
    matching, back, _, _ = matched(branches([1, 1, 1], "abc"), branches([1, 1, 1], "def"))
    assert weights(matching, back) == {"wa": "wd", "wb": "we", "wc": "wf"}

    def dead(letters: str) -> onnx.ModelProto:
        # Nothing reads the two, so no edge behind them tells them apart.
        proto = branches([1, 1], letters)
        proto.graph.node[2].CopyFrom(node("Sigmoid", "x", "y"))
        proto.graph.output[0].type.tensor_type.shape.CopyFrom(
            proto.graph.input[0].type.tensor_type.shape
        )
        return proto

    matching, back, _, _ = matched(dead("ab"), dead("cd"))
    assert weights(matching, back) == {"wa": "wc", "wb": "wd"}
