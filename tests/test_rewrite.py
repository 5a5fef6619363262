"""Nodes left in float inside finished quantized files: against numpy, ONNX Runtime and the truth.

The oracle of a whole file is the float model (everything freed); of one node it is float64 numpy or
a graph written by hand; of a preview it is the file that is written for the same list.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantFormat, QuantType
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from inspector.errors import ExclusionError, ModelError, QuantizationError
from inspector.exclusions import (
    FLOAT_NOW,
    NO_SUCH_NODE,
    NOTHING_CHANGED,
    STILL_FED,
    EntryEffect,
)
from inspector.feeds import Feeds, load_feeds
from inspector.freed_file import write_freed
from inspector.matching import Matching, match_tensors
from inspector.model import Model
from inspector.model_files import load_model
from inspector.pairs import feed_for_quantized
from inspector.rewrite import Freed, Switchable, free_nodes, switchable
from tests.known_pairs import IMAGES, Arrays, Pair, by_hand, constants, static
from tests.samples import (
    MODELS,
    array,
    conv_batchnorm,
    conv_relu_gemm,
    floats,
    model,
    needs_models,
    qdq_of,
    save,
)
from tests.test_operators import CASES, dynamic

TWINS = ("mlperf-resnet8", "mlperf-kws-dscnn")


class Loaded:
    """Both models of a pair with their matching."""

    def __init__(self, f: Path, q: Path) -> None:
        self.f, self.q = load_model(f), load_model(q)
        self.matching: Matching = match_tensors(self.f, self.q)

    @property
    def names(self) -> list[str]:
        return [n.name for n in self.f.nodes if n.op_type != "Constant"]

    def free(self, *names: str) -> Freed:
        return free_nodes(self.f, self.q, self.matching, names)

    def switches(self) -> Switchable:
        return switchable(self.f, self.q, self.matching)


def loaded(pair: Pair) -> Loaded:
    return Loaded(pair.folder / "f.onnx", pair.folder / "q.onnx")


def run(source: Model | onnx.ModelProto, feed: Arrays) -> list[np.ndarray]:
    """All outputs, with optimisations off."""
    proto = source.proto if isinstance(source, Model) else source
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(proto.SerializeToString(), options).run(None, feed)


def op_types(source: Model) -> list[str]:
    return [n.op_type for n in source.nodes]


def effect(freed: Freed, name: str) -> EntryEffect:
    return next(e for e in freed.effects if e.name == name)


def check_switches(pair: Loaded, feed: Arrays, lists: Sequence[Sequence[str]]) -> None:
    """One session gives for every list, bit for bit, what the file for it gives."""
    both = pair.switches()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(both.model.proto.SerializeToString(), options)
    for names in lists:
        preview = session.run(None, {**feed, **both.feed(names)})
        file = run(both.freed(names).model, feed)
        for ours, theirs in zip(preview, file, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=str(names))


def each_alone(pair: Loaded) -> list[list[str]]:
    return [[], pair.names, *([name] for name in pair.names)]


# -- real files of other tools -----------------------------------------------------------------


@cache
def twin(network: str, file: str) -> tuple[Loaded, Feeds, Arrays]:
    pair = Loaded(MODELS / network / "model.onnx", MODELS / network / file)
    feeds = load_feeds(MODELS / network / "inputs", pair.f)
    return pair, feeds, feed_for_quantized(pair.matching, feeds[0])


REAL = [
    *((network, "quantized.onnx") for network in TWINS),
    ("minilm-l6", "ort_dynamic.onnx"),
    ("silero-vad-16k", "ort_static_qdq.onnx"),
    ("ultraface-rfb320", "ort_static_qdq.onnx"),
    ("squeezenet-fp16", "ort_static_qdq.onnx"),
]


@needs_models
@pytest.mark.parametrize(
    ("network", "file"),
    [pytest.param(*r, marks=pytest.mark.slow if r[0] == "minilm-l6" else ()) for r in REAL],
)
def test_with_every_node_freed_a_real_file_computes_what_the_float_model_does(
    network: str, file: str
) -> None:
    pair, feeds, feed = twin(network, file)
    freed = pair.free(*pair.names)
    assert not {"QuantizeLinear", "DequantizeLinear", "MatMulInteger"} & set(op_types(freed.model))
    for reference, actual in zip(run(pair.f, feeds[0]), run(freed.model, feed), strict=True):
        error = np.abs(reference - actual).max() / np.abs(reference).max()
        assert error < 1e-5


def random_lists(names: Sequence[str], count: int) -> list[list[str]]:
    draw = random.Random(4)
    most = min(30, len(names) // 2)
    return [draw.sample(list(names), draw.randint(1, most)) for _ in range(count)]


@needs_models
@pytest.mark.parametrize("network", TWINS)
def test_the_preview_of_a_tflite_file_is_bit_for_bit_the_freed_file(network: str) -> None:
    pair, _, feed = twin(network, "quantized.onnx")
    np.testing.assert_array_equal(run(pair.free().model, feed)[0], run(pair.q, feed)[0])
    check_switches(pair, feed, [[], pair.names, *random_lists(pair.names, 12)])


@needs_models
@pytest.mark.slow
@pytest.mark.parametrize(("network", "file"), REAL[:3], ids=[f"{n}-{f}" for n, f in REAL[:3]])
def test_random_lists_are_previewed_bit_for_bit(network: str, file: str) -> None:
    pair, _, feed = twin(network, file)
    names = pair.switches().can_be_freed
    check_switches(pair, feed, [[], names, *random_lists(names, 30)])


@needs_models
def test_an_integer_product_is_freed_alone() -> None:
    pair, _, _ = twin("minilm-l6", "ort_dynamic.onnx")
    names = [n.name for n in pair.f.nodes if n.op_type == "MatMul"]
    weighted = next(n for n in names if pair.f.node_by_name[n].inputs[1] in pair.f.constant_names)
    freed = pair.free(weighted)
    assert effect(freed, weighted).status == FLOAT_NOW
    before, after = op_types(pair.q), op_types(freed.model)
    assert before.count("MatMulInteger") == after.count("MatMulInteger") + 1
    assert after.count("MatMul") == before.count("MatMul") + 1
    weight = pair.f.constant(pair.f.node_by_name[weighted].inputs[1])
    node = freed.model.node_by_name[pair.matching.node_pairs[weighted]]
    np.testing.assert_array_equal(freed.model.constant(node.inputs[1]), weight)


@needs_models
def test_a_conv_of_a_tflite_file_reads_its_float_weight_and_leaves_all_other_scales_alone() -> None:
    pair, _, _ = twin("mlperf-resnet8", "quantized.onnx")
    freed = pair.free("Conv_9")
    node = freed.model.node_by_name[pair.matching.node_pairs["Conv_9"]]
    own = pair.f.node_by_name["Conv_9"]
    for ours, theirs in zip(node.inputs[1:], own.inputs[1:], strict=True):
        np.testing.assert_array_equal(freed.model.constant(ours), pair.f.constant(theirs))
    old, new = constants(pair.q.proto), constants(freed.model.proto)
    gone = set(old) - set(new)
    quantized = pair.q.node_by_name[node.name]
    expected = {
        name for operand in quantized.inputs[1:] for name in pair.q.producers[operand].inputs
    }
    assert gone == expected
    for name in set(old) & set(new):
        np.testing.assert_array_equal(old[name], new[name])
    # The Conv and the Conv of the shortcut read one tensor: the other one keeps its pair.
    other = freed.model.node_by_name[pair.matching.node_pairs["Conv_12"]]
    assert freed.model.producers[other.inputs[0]].op_type == "DequantizeLinear"
    assert freed.model.producers[node.inputs[0]].op_type == "Relu"
    assert freed.removed == tuple(
        pair.q.producers[operand].name for operand in quantized.inputs[1:]
    )


@needs_models
def test_a_half_precision_file_has_nothing_to_free() -> None:
    pair, _, _ = twin("squeezenet-fp16", "fp16.onnx")
    with pytest.raises(ModelError, match="nothing is quantized in fp16") as caught:
        pair.free(pair.names[0])
    assert "float16" in caught.value.message
    with pytest.raises(ModelError, match="nothing is quantized"):
        pair.switches()


# -- every operator and format -----------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in CASES if k not in ("Loop", "Scan")])
def test_integer_operators_become_the_float_operators_they_stand_for(
    tmp_path: Path, kind: str
) -> None:
    case = CASES[kind][1](tmp_path)
    pair, feed = loaded(case.pair), case.pair.feeds[0]
    freed = pair.free(*pair.names)
    reference, actual = run(pair.f, feed)[0], run(freed.model, feed)[0]
    np.testing.assert_allclose(actual, reference, rtol=1e-5, atol=1e-6)
    assert sorted(op_types(freed.model)) == sorted(
        ["Reshape", *op_types(pair.f), "Add"] if kind == "ConvInteger" else op_types(pair.f)
    )  # ONNX Runtime makes a Conv's bias an Add
    check_switches(pair, feed, each_alone(pair))


@pytest.mark.parametrize("kind", ["Loop", "Scan"])
def test_bodies_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    case = CASES[kind][1](tmp_path)
    pair = loaded(case.pair)
    inside = next(n.name for n in pair.f.bodies[0].nodes if n.op_type == "MatMul")
    outside = pair.f.bodies[0].owner
    freed = pair.free(inside, outside)
    assert effect(freed, inside).status == NOTHING_CHANGED
    assert effect(freed, inside).details == (
        f"not freed: it lies inside {outside}, whose bodies are left as they are",
    )
    assert "holds a body" in effect(freed, outside).details[0]
    assert freed.freed == ()
    with pytest.raises(ExclusionError, match="the list changes nothing"):
        write_freed(freed, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


OPTIONS: dict[str, dict[str, Any]] = {
    "per tensor": {},
    "per channel": {"per_channel": True},
    "symmetric": {"extra_options": {"ActivationSymmetric": True}},
    "weights through Q": {"extra_options": {"AddQDQPairToWeight": True}},
    "a pair for each reader": {"extra_options": {"DedicatedQDQPair": True}},
    "removable kept": {"extra_options": {"QDQKeepRemovableActivations": True}},
    "16 bits": {
        "activation_type": QuantType.QUInt16,
        "extra_options": {"UseQDQContribOps": True},
    },
    "operators": {"quant_format": QuantFormat.QOperator},
    "operators per channel": {"quant_format": QuantFormat.QOperator, "per_channel": True},
}


@pytest.mark.parametrize("how", OPTIONS)
def test_every_form_of_a_static_file_is_the_float_model_with_all_nodes_freed(
    tmp_path: Path, how: str
) -> None:
    pair = loaded(static(tmp_path, conv_relu_gemm(), IMAGES, **OPTIONS[how]))
    freed = pair.free(*pair.names)
    np.testing.assert_allclose(
        run(freed.model, IMAGES[1])[0], run(pair.f, IMAGES[1])[0], rtol=1e-5, atol=1e-6
    )
    assert sorted(op_types(freed.model)) == sorted(op_types(pair.f))
    assert {e.status for e in freed.effects} <= {FLOAT_NOW, NOTHING_CHANGED}
    check_switches(pair, IMAGES[1], [*each_alone(pair), *random_lists(pair.names, 6)])


@pytest.mark.parametrize("form", list(QuantFormat), ids=str)
def test_a_normalization_that_was_folded_in_comes_back_folded(
    tmp_path: Path, form: QuantFormat
) -> None:
    pair = loaded(
        static(
            tmp_path,
            conv_batchnorm(),
            [{"x": floats((1, 3, 6, 6), s)} for s in range(3)],
            preprocess=True,
            quant_format=form,
        )
    )
    feed = {"x": floats((1, 3, 6, 6), 7)}
    for names in (["conv"], ["bn"], ["conv", "relu"]):
        freed = pair.free(*names)
        np.testing.assert_allclose(
            run(freed.model, feed)[0], run(pair.f, feed)[0], rtol=1e-5, atol=1e-5
        )
    assert "a part of" in effect(pair.free("bn"), "bn").details[0]


def test_a_packed_weight_becomes_the_float_weight(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "mm")
    proto = model([node], [("x", [2, 64])], [("y", [2, 8])], [array("w", floats((64, 8), 1))])
    quantizer = MatMulNBitsQuantizer(
        onnx.load(save(proto, tmp_path / "f.onnx")), bits=4, block_size=32
    )
    quantizer.process()
    feed = {"x": floats((2, 64), 2)}
    pair = loaded(by_hand(tmp_path, proto, quantizer.model.model, [feed]))
    freed = pair.free("mm")
    assert op_types(freed.model) == ["MatMul"]
    np.testing.assert_array_equal(run(freed.model, feed)[0], run(pair.f, feed)[0])
    check_switches(pair, feed, each_alone(pair))


def embedding(*, tanh: bool) -> onnx.ModelProto:
    """A table of which a MatMul reads rows, right away or behind a Tanh."""
    proto = model(
        [
            helper.make_node("Gather", ["t", "x"], ["e"], "gather"),
            helper.make_node("Tanh", ["e"], ["h"], "tanh"),
            helper.make_node("MatMul", ["h" if tanh else "e", "w"], ["y"], "mm"),
        ],
        [("x", [5])],
        [("y", [5, 3])],
        [array("t", floats((40, 6), 1)), array("w", floats((6, 3), 2))],
    )
    if not tanh:
        del proto.graph.node[1]
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    return proto


ROWS = [{"x": np.arange(5) + s} for s in range(3)]


def test_an_embedding_stored_as_integers_is_read_in_float(tmp_path: Path) -> None:
    pair = loaded(dynamic(tmp_path, embedding(tanh=True), ROWS))
    freed = pair.free("gather")
    assert effect(freed, "gather").status == FLOAT_NOW
    assert "DequantizeLinear" not in op_types(freed.model)
    assert "MatMulInteger" in op_types(freed.model)
    everything = pair.free(*pair.names)
    np.testing.assert_array_equal(run(everything.model, ROWS[0])[0], run(pair.f, ROWS[0])[0])
    check_switches(pair, ROWS[0], each_alone(pair))


def test_integers_picked_from_a_table_are_read_as_reals_by_a_freed_operator(
    tmp_path: Path,
) -> None:
    made = static(tmp_path, embedding(tanh=False), ROWS, quant_format=QuantFormat.QOperator)
    pair = loaded(made)
    assert "QLinearMatMul" in op_types(pair.q)
    reader = next(n for n in pair.q.nodes if n.op_type == "QLinearMatMul")
    table = pair.q.producers[reader.inputs[0]].inputs[0]
    stored, scale, zero = (pair.q.constant(n) for n in (table, reader.inputs[1], reader.inputs[2]))
    rows = (stored.astype(np.float64) - zero) * scale
    freed = pair.free("mm")
    np.testing.assert_allclose(
        run(freed.model, ROWS[0])[0], rows[:5] @ floats((6, 3), 2), rtol=1e-5, atol=1e-5
    )
    everything = pair.free("gather", "mm")
    np.testing.assert_array_equal(run(everything.model, ROWS[0])[0], run(pair.f, ROWS[0])[0])
    check_switches(pair, ROWS[0], each_alone(pair))


def test_a_node_that_no_node_of_the_file_computes_is_refused_by_name(tmp_path: Path) -> None:
    pair = loaded(dynamic(tmp_path, embedding(tanh=False), ROWS))
    found = effect(pair.free("mm"), "mm")
    assert found.status == NOTHING_CHANGED
    assert found.details == ("not freed: nothing of the quantized model computes it alone",)
    assert effect(pair.free("gather"), "gather").status == NOTHING_CHANGED


# -- one node against numpy --------------------------------------------------------------------


def grid(values: np.ndarray, scale: float, zero: int = 0) -> np.ndarray:
    """int8 Q/DQ in float64."""
    steps = np.float32(scale).astype(np.float64)
    return (np.clip(np.rint(values / steps) + zero, -128, 127) - zero) * steps


def codes(values: np.ndarray, scale: float) -> np.ndarray:
    return np.clip(np.rint(values / np.float32(scale)), -127, 127).astype(np.int8)


def two_products(folder: Path, *, between: str = "", factor: float = 1.0) -> Pair:
    """x -> mm1 -> (Relu or Clip, folded) -> mm2 -> y, in a QAT tool's QDQ."""
    w1, w2 = floats((8, 6), 1), floats((6, 4), 2)
    middle: list[onnx.NodeProto] = []
    limits: list[onnx.TensorProto] = []
    if between == "Relu":
        middle = [helper.make_node("Relu", ["h"], ["r"], "act")]
    elif between == "Clip":
        middle = [helper.make_node("Clip", ["h", "low", "high"], ["r"], "act")]
        limits = [array("low", np.float32(0)), array("high", np.float32(2))]
    after = "r" if middle else "h"
    proto = model(
        [
            helper.make_node("MatMul", ["x", "w1"], ["h"], "mm1"),
            *middle,
            helper.make_node("MatMul", [after, "w2"], ["y"], "mm2"),
        ],
        [("x", [3, 8])],
        [("y", [3, 4])],
        [array("w1", w1), array("w2", w2), *limits],
    )
    # The scale of a folded rectifier ends where it does.
    scale, zero = {"": (0.1, 0), "Relu": (0.05, -128), "Clip": (2 / 255, -128)}[between]
    first, first_constants = qdq_of("x", "xd", 0.03, 0)
    second, second_constants = qdq_of("h", "hd", scale, zero)
    third, third_constants = qdq_of("o", "y", 0.2, 0)
    quantized = model(
        [
            *first,
            helper.make_node("DequantizeLinear", ["w1_c", "w1_s"], ["w1_d"], "w1_dq"),
            helper.make_node("MatMul", ["xd", "w1_d"], ["h"], "mm1"),
            *second,
            helper.make_node("DequantizeLinear", ["w2_c", "w2_s"], ["w2_d"], "w2_dq"),
            helper.make_node("MatMul", ["hd", "w2_d"], ["o"], "mm2"),
            *third,
        ],
        [("x", [3, 8])],
        [("y", [3, 4])],
        [
            array("w1_c", codes(w1 * factor, 0.03)), array("w1_s", np.float32(0.03)),
            array("w2_c", codes(w2, 0.03)), array("w2_s", np.float32(0.03)),
            *first_constants, *second_constants, *third_constants,
        ],
    )  # fmt: skip
    return by_hand(folder, proto, quantized, [{"x": floats((3, 8), 5, 0.8)}])


RECTIFIED: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float, int]] = {
    "": (lambda v: v, 0.1, 0),
    "Relu": (lambda v: np.maximum(v, 0), 0.05, -128),
    "Clip": (lambda v: np.clip(v, 0, 2), 2 / 255, -128),
}


@pytest.mark.parametrize("between", RECTIFIED)
@pytest.mark.parametrize("names", [("mm1",), ("mm2",), ("mm1", "mm2")], ids="+".join)
def test_a_freed_node_computes_what_numpy_does(
    tmp_path: Path, between: str, names: tuple[str, ...]
) -> None:
    made = two_products(tmp_path, between=between)
    pair, feed = loaded(made), made.feeds[0]
    rectify, scale, zero = RECTIFIED[between]
    x, w1, w2 = (v.astype(np.float64) for v in (feed["x"], floats((8, 6), 1), floats((6, 4), 2)))
    stored1, stored2 = (codes(w, 0.03) * np.float64(np.float32(0.03)) for w in (w1, w2))
    h = x @ w1 if "mm1" in names else grid(x, 0.03) @ stored1
    truth = grid(grid(h, scale, zero) @ stored2, 0.2)
    if "mm2" in names:
        truth = rectify(h) @ w2  # the last pair goes with it: nobody asks for it
    freed = pair.free(*names)
    np.testing.assert_allclose(run(freed.model, feed)[0], truth, rtol=1e-5, atol=1e-5)
    # mm2 freed alone: mm1 still computes in integers and reads x behind its pair.
    assert ("x_s" in constants(freed.model.proto)) is False
    assert ("xd_s" in constants(freed.model.proto)) is ("mm1" not in names)
    again = between if between and "mm2" in names else ""
    assert [o for o in op_types(freed.model) if o in ("Relu", "Clip")] == ([again] if again else [])
    check_switches(pair, feed, each_alone(pair))


def test_what_a_neighbour_keeps_quantized_is_said(tmp_path: Path) -> None:
    pair = loaded(two_products(tmp_path))
    found = effect(pair.free("mm1"), "mm1")
    assert found.status == STILL_FED
    assert found.details == (
        "its output h is still quantized to int8, because mm2 needs it quantized",
    )
    assert (found.neighbours, found.output_dtype) == (("mm2",), "int8")
    assert (found.weight_dtype, found.input_dtypes) == ("float32", ("float32",))
    assert effect(pair.free("mm1", "mm2"), "mm1").status == FLOAT_NOW


def test_a_rectifier_that_is_folded_away_changes_nothing_alone_and_is_a_node_with_its_neighbour(
    tmp_path: Path,
) -> None:
    pair = loaded(two_products(tmp_path, between="Relu"))
    alone = effect(pair.free("act"), "act")
    assert alone.status == NOTHING_CHANGED
    assert alone.neighbours == ("mm2",)
    freed = pair.free("act", "mm2")
    assert effect(freed, "act").status == FLOAT_NOW
    assert "Relu" in op_types(freed.model)


def test_a_weight_that_holds_a_factor_is_refused(tmp_path: Path) -> None:
    pair = loaded(two_products(tmp_path, factor=0.5))
    found = effect(pair.free("mm1"), "mm1")
    assert found.status == NOTHING_CHANGED
    assert "w1 times 0.499: a factor" in found.details[0]
    assert "a factor was moved into it" in found.details[0]
    both = pair.switches()
    assert set(both.refused) == {"mm1"}
    assert both.can_be_freed == ("mm2",)


def test_readers_of_a_shared_tensor_and_weight_keep_what_they_had(tmp_path: Path) -> None:
    w = floats((6, 6), 1)
    proto = model(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], "left"),
            helper.make_node("Sigmoid", ["x"], ["s"], "sigmoid"),
            helper.make_node("MatMul", ["s", "w"], ["b"], "right"),
        ],
        [("x", [2, 6])],
        [("a", [2, 6]), ("b", [2, 6])],
        [array("w", w)],
    )
    feeds = [{"x": floats((2, 6), s)} for s in range(3)]
    pair = loaded(static(tmp_path, proto, feeds))
    before, freed = run(pair.q, feeds[0]), pair.free("left")
    left, right = run(freed.model, feeds[0])
    np.testing.assert_allclose(left, feeds[0]["x"] @ w, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(right, before[1])
    assert {"w", "w_quantized"} <= set(constants(freed.model.proto))
    both = pair.free("left", "right")
    held = constants(both.model.proto)
    assert [n for n, v in held.items() if v.shape == (6, 6)] == ["w"]
    check_switches(pair, feeds[0], each_alone(pair))


def test_integers_at_the_borders_of_a_file_stay(tmp_path: Path) -> None:
    w = floats((4, 4), 1)
    proto = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "mm")],
        [("x", [2, 4])],
        [("y", [2, 4])],
        [array("w", w)],
    )
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "s", "z"], ["xd"], "in"),
        helper.make_node("DequantizeLinear", ["wc", "ws"], ["wd"], "wdq"),
        helper.make_node("MatMul", ["xd", "wd"], ["m"], "mm"),
        helper.make_node("QuantizeLinear", ["m", "os", "z"], ["y"], "out"),
    ]
    quantized = model(
        nodes,
        [("x", [2, 4])],
        [("y", [2, 4])],
        [
            array("s", np.float32(0.02)), array("z", np.int8(0)), array("os", np.float32(0.1)),
            array("wc", codes(w, 0.03)), array("ws", np.float32(0.03)),
        ],
    )  # fmt: skip
    for value in (quantized.graph.input[0], quantized.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.INT8
    pair = loaded(by_hand(tmp_path, proto, quantized, []))
    freed = pair.free("mm")
    assert op_types(freed.model) == ["DequantizeLinear", "MatMul", "QuantizeLinear"]
    stored = codes(floats((2, 4), 3), 0.02)
    truth = np.rint(stored * np.float64(np.float32(0.02)) @ w / np.float32(0.1))
    actual = run(freed.model, {"x": stored})[0]
    np.testing.assert_array_equal(actual, np.clip(truth, -128, 127).astype(np.int8))
    assert effect(freed, "mm").status == STILL_FED


def test_unknown_names_are_records_and_an_empty_list_is_the_file(tmp_path: Path) -> None:
    made = two_products(tmp_path)
    pair = loaded(made)
    found = effect(pair.free("mm3"), "mm3")
    assert (found.status, found.details) == (NO_SUCH_NODE, ("the nearest names are mm2, mm1",))
    same = pair.free()
    assert same.effects == same.removed == same.freed == ()
    assert [n.SerializeToString() for n in same.model.proto.graph.node] == [
        n.SerializeToString() for n in pair.q.proto.graph.node
    ]


def test_names_with_any_character_and_names_that_are_taken_are_no_obstacle(
    tmp_path: Path,
) -> None:
    made = two_products(tmp_path, between="Relu")
    proto = onnx.load(made.folder / "f.onnx")
    proto.graph.node[0].name = "a\nb/*?[1]="
    save(proto, made.folder / "f.onnx")
    quantized = onnx.load(made.folder / "q.onnx")
    quantized.graph.initializer.append(array("w1", np.float32(1)))  # the float weight's name
    quantized.graph.node.append(helper.make_node("Identity", ["w1"], ["r_float"], "act"))
    quantized.graph.output.append(helper.make_tensor_value_info("r_float", TensorProto.FLOAT, []))
    save(quantized, made.folder / "q.onnx")
    proto.graph.output.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [3, 6]))
    pair = loaded(made)
    freed = pair.free("a\nb/*?[1]=", "mm2")
    onnx.checker.check_model(freed.model.proto)
    np.testing.assert_allclose(
        run(freed.model, made.feeds[0])[0], run(pair.f, made.feeds[0])[0], rtol=1e-5, atol=1e-6
    )


# -- writing -----------------------------------------------------------------------------------


def test_a_written_file_loads_and_holds_what_was_freed(tmp_path: Path) -> None:
    made = two_products(tmp_path)
    pair = loaded(made)
    freed = pair.free("mm1", "mm2")
    sizes = [p.stat().st_size for p in (made.folder / "f.onnx", made.folder / "q.onnx")]
    assert write_freed(freed, tmp_path / "out.onnx", inputs=[pair.f, pair.q]) == ()
    written = load_model(tmp_path / "out.onnx")
    np.testing.assert_array_equal(
        run(written, made.feeds[0])[0], run(freed.model, made.feeds[0])[0]
    )
    assert sizes == [p.stat().st_size for p in (made.folder / "f.onnx", made.folder / "q.onnx")]
    assert not list(tmp_path.glob(".part-*"))
    assert (tmp_path / "out.onnx").stat().st_mode & 0o777 == save(
        written.proto, tmp_path / "plain.onnx"
    ).stat().st_mode & 0o777


@pytest.mark.parametrize("which", ["f.onnx", "q.onnx", ".", "none/out.onnx"])
def test_inputs_and_folders_are_never_written_to(tmp_path: Path, which: str) -> None:
    made = two_products(tmp_path)
    pair = loaded(made)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(QuantizationError):
        write_freed(pair.free("mm1"), tmp_path / which, inputs=[pair.f, pair.q])
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def test_weights_on_disk_stay_on_disk(tmp_path: Path) -> None:
    """As in models over 2 GB: values outside the proto, of both files."""
    made = two_products(tmp_path)
    sources = []
    for name in ("f", "q"):
        proto = onnx.load(made.folder / f"{name}.onnx")
        big = np.tile(floats((1, 64), 9), (512, 1))
        proto.graph.initializer.append(array("big", big))
        proto.graph.node.append(helper.make_node("MatMul", ["z", "big"], ["o2"], "large"))
        proto.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 512]))
        proto.graph.output.append(helper.make_tensor_value_info("o2", TensorProto.FLOAT, [1, 64]))
        path = made.folder / f"{name}.onnx"
        onnx.save(
            proto, path, save_as_external_data=True, location=f"{name}.bin", size_threshold=100
        )
        sources.append(load_model(path, inside_bytes=1000))
    f, q = sources
    assert q.external
    freed = free_nodes(f, q, match_tensors(f, q), ["mm1", "mm2"])
    assert "big" in freed.model.external
    write_freed(freed, tmp_path / "out.onnx", inputs=[f, q])
    assert (tmp_path / "out.onnx.data").stat().st_size >= 512 * 64 * 4
    feed = {**made.feeds[0], "z": floats((1, 512), 3)}
    found = ort.InferenceSession(tmp_path / "out.onnx").run(None, feed)
    wanted = ort.InferenceSession(made.folder / "f.onnx").run(None, feed)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(QuantizationError, match="never overwritten"):
        write_freed(freed, tmp_path / "f.bin", inputs=[f, q])
