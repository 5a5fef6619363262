"""Exclusions: the list's file, names and patterns, and what leaving nodes in float really does.

The oracle for effects and for `free_fully` reads the new file with plain onnx, written here on its
own: which DequantizeLinear a node's values come out of, and which QuantizeLinear reads them.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from inspector.errors import ExclusionError, ReportError
from inspector.exclusions import (
    MAX_BYTES,
    EntryEffect,
    ExclusionEntry,
    ExclusionList,
    check_same_model,
    effect_of,
    free_fully,
    free_names,
    from_json,
    matching_names,
    read_exclusions,
    resolve,
    to_json,
    write_exclusions,
)
from inspector.feeds import Feeds, load_feeds, random_feeds
from inspector.model import Model
from inspector.model_files import load_model
from inspector.prepare import Prepared, prepare
from inspector.quantize import quantize_model, supported_op_types
from inspector.recipe import QuantConfig

MODELS = Path(
    os.environ.get("QUANT_INSPECTOR_MODELS", Path(__file__).parents[2] / "shared" / "models")
)
needs_models = pytest.mark.skipif(
    not MODELS.is_dir(), reason=f"the real models are not there: no folder {MODELS}"
)


# --- a bench: one model, quantized with one list after another --------------------------------


class Bench:
    def __init__(self, model: Model, feeds: Feeds, config: QuantConfig, folder: Path) -> None:
        self.model, self.feeds, self.config, self.folder = model, feeds, config, folder
        self.prepared: Prepared = prepare(model, config, folder / "cache")

    def quantize(self, *exclude: str) -> Model:
        result = quantize_model(
            self.model,
            self.config,
            calibration=self.feeds,
            exclude=exclude,
            output=self.folder / "q.onnx",
            cache=self.folder / "cache",
        )
        return load_model(result.path)

    def effects(self, *exclude: str) -> dict[str, EntryEffect]:
        baseline, made = self.quantize(), self.quantize(*exclude)
        names = resolve(exclude, self.model, prepared=self.prepared).prepared_names
        found = effect_of(names, self.prepared.model, made, baseline, self.config)
        return {e.name: e for e in found}


def real(name: str, folder: Path, config: QuantConfig | None = None) -> Bench:
    model = load_model(MODELS / name / "model.onnx")
    feeds = load_feeds(MODELS / name / "inputs", model).subset(range(2))
    return Bench(model, feeds, config or QuantConfig(), folder)


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bench(
    folder: Path,
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    *,
    inputs: dict[str, list[int]],
    outputs: dict[str, list[int]],
    config: QuantConfig | None = None,
) -> Bench:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in inputs.items()],
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in outputs.items()],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    path = folder / "m.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    model = load_model(path)
    return Bench(model, random_feeds(model, samples=2, seed=3), config or QuantConfig(), folder)


def conv_chain(folder: Path, config: QuantConfig | None = None) -> Bench:
    """x -> one -> relu -> two -> three -> y."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="one"),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="two"),
        helper.make_node("Conv", ["c2", "w3"], ["y"], name="three"),
    ]
    weights = {f"w{i}": gaussian(3, 3, 1, 1, seed=i) for i in (1, 2, 3)}
    shapes = [1, 3, 4, 4]
    return bench(folder, nodes, weights, inputs={"x": shapes}, outputs={"y": shapes}, config=config)


def shared_weight(folder: Path, config: QuantConfig | None = None) -> Bench:
    """MatMuls a and b with one weight, and c with its own."""
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["s1"], name="before_a"),
        helper.make_node("MatMul", ["s1", "w"], ["m1"], name="a"),
        helper.make_node("Tanh", ["m1"], ["t1"], name="tanh"),
        helper.make_node("MatMul", ["t1", "w"], ["m2"], name="b"),
        helper.make_node("MatMul", ["m2", "v"], ["y"], name="c"),
    ]
    return bench(
        folder,
        nodes,
        {"w": gaussian(4, 4), "v": gaussian(4, 4, seed=1)},
        inputs={"x": [2, 4]},
        outputs={"y": [2, 4]},
        config=config,
    )


CARRIERS = {
    "Expand", "Flatten", "Gather", "GatherElements", "Identity", "MaxPool", "Pad", "Reshape",
    "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
}  # fmt: skip


def why_not_float(made: Model, name: str) -> str:
    """ "" where the node reads no dequantized value and no QuantizeLinear reads its output."""
    graph = made.proto.graph
    makers = {o: n for n in graph.node for o in n.output}
    [node] = [n for n in graph.node if n.name in (name, f"{name}_MatMul")]
    for tensor in node.input:
        at = tensor
        while at in makers and makers[at].op_type in CARRIERS:
            at = makers[at].input[0]
        if at in makers and makers[at].op_type == "DequantizeLinear":
            return f"it reads {tensor}"
    for reader in graph.node:
        if reader.op_type == "QuantizeLinear" and reader.input[0] in node.output:
            return f"{reader.name} reads it"
    return ""


# --- the file ---------------------------------------------------------------------------------


FULL = ExclusionList(
    nodes=(
        ExclusionEntry(
            name="/layer.0/Conv [1]",
            op_type="Conv",
            outputs=("y",),
            reason="worst channel",
            output_sqnr_gain_db=3.5,
        ),
        ExclusionEntry(name="ä*", output_sqnr_gain_db=float("inf")),
    ),
    patterns=("/head/*",),
    float_name="m.onnx",
    float_sha256="ab" * 32,
    recipe=QuantConfig(per_channel=True, op_types=("Conv",)),
    measured={"samples": 3, "output_sqnr_db": {"before": 10.5, "after": 20.0}},
    made_with={"onnx": "1"},
)


def test_a_list_survives_its_file(tmp_path: Path) -> None:
    write_exclusions(FULL, tmp_path / "list.json")
    assert read_exclusions(tmp_path / "list.json") == FULL
    assert os.listdir(tmp_path) == ["list.json"]


def test_the_file_is_the_documented_format(tmp_path: Path) -> None:
    write_exclusions(FULL, tmp_path / "list.json")
    text = (tmp_path / "list.json").read_text(encoding="utf-8")
    values = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no strict JSON"))
    assert values["format"] == "quant-inspector/exclusions"
    assert values["version"] == 1
    assert values["float_model"] == {"name": "m.onnx", "sha256": "ab" * 32}
    assert values["nodes"] == [
        {
            "name": "/layer.0/Conv [1]",
            "op_type": "Conv",
            "outputs": ["y"],
            "reason": "worst channel",
            "output_sqnr_gain_db": 3.5,
        },
        {
            "name": "ä*",
            "op_type": "",
            "outputs": [],
            "reason": "",
            "output_sqnr_gain_db": "Infinity",
        },
    ]
    assert values["patterns"] == ["/head/*"]
    assert values["recipe"] == QuantConfig(per_channel=True, op_types=("Conv",)).to_json()
    assert text.endswith("}\n")


def test_versions_are_written_without_being_asked(tmp_path: Path) -> None:
    assert {"onnx", "onnxruntime"} <= set(to_json(ExclusionList())["made_with"])


@pytest.mark.parametrize(
    "values",
    [
        {"nodes": [{"name": "a"}]},
        {"patterns": ["a*"]},
        {"nodes": [], "patterns": []},
        {"nodes": [{"name": "a"}], "float_model": {"sha256": None}, "recipe": None, "later": 1},
    ],
)
def test_everything_but_names_may_be_absent(values: dict[str, Any]) -> None:
    found = from_json({"format": "quant-inspector/exclusions", "version": 1, **values})
    assert found.float_sha256 is None
    assert len(found.nodes) + len(found.patterns) <= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "l.json: it is not valid JSON: "),
        ("{", "l.json: it is not valid JSON: "),
        ("[1]", "l.json: it holds a list, expected a JSON object"),
        ('{"a": NaN}', "l.json: it is not valid JSON: NaN is not JSON; write it as a string"),
        ('{"a": 1, "a": 2}', "key 'a' appears twice in an object"),
        ('{"format": "x"}', "l.json: its \"format\" is 'x', expected 'quant-inspector/exclusions'"),
        ('{F, "version": 2}', "l.json: it is of version 2, this installation reads version 1"),
        ('{F, "version": true}', "l.json: it is of version True"),
        ("{F, V}", 'l.json: it has neither "nodes" nor "patterns"'),
        ('{F, V, "nodes": {}}', "l.json: nodes is an object, expected a list"),
        ('{F, V, "nodes": ["a"]}', "l.json: nodes[0] is a string, expected an object with a name"),
        ('{F, V, "nodes": [{}]}', "l.json: nodes[0] has no name"),
        ('{F, V, "nodes": [{"name": 3}]}', "l.json: nodes[0].name is a number, expected a string"),
        ('{F, V, "nodes": [{"name": ""}]}', "l.json: nodes[0] has an empty name; ONNX Runtime"),
        (
            '{F, V, "nodes": [{"name": "a"}, {"name": "b"}, {"name": "a"}]}',
            "l.json: node 'a' is listed twice",
        ),
        (
            '{F, V, "nodes": [{"name": "a", "output_sqnr_gain_db": "much"}]}',
            "l.json: nodes[0].output_sqnr_gain_db is a string, expected a number",
        ),
        ('{F, V, "patterns": [1]}', "l.json: patterns[0] is a number, expected a string"),
        ('{F, V, "patterns": [""]}', "l.json: an empty pattern is listed"),
        (
            '{F, V, "nodes": [], "recipe": {"perchannel": true}}',
            "l.json: a recipe has no option 'perchannel'; the nearest is 'per_channel'",
        ),
        ("[" * 100_000, "l.json: it is nested too deeply"),
        ('{"a": ' * 20 + "1" + "}" * 20, "l.json: it is nested deeper than 12 levels"),
    ],
)
def test_a_file_that_is_no_list_is_refused_by_place(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "l.json"
    text = text.replace("F", '"format": "quant-inspector/exclusions"').replace("V", '"version": 1')
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ExclusionError) as caught:
        read_exclusions(path)
    # Some Python versions find deep nesting no problem and complain about the end instead.
    if "[[" not in text:
        assert message in caught.value.message
    assert caught.value.hint


def test_a_file_that_is_too_large_or_missing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large.json").write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(ExclusionError, match="larger than 16 MB"):
        read_exclusions(tmp_path / "large.json")
    with pytest.raises(ExclusionError, match="cannot be read: No such file"):
        read_exclusions(tmp_path / "no.json")


def test_a_list_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot be written: No such file or directory"):
        write_exclusions(FULL, tmp_path / "no" / "list.json")


# --- the right model --------------------------------------------------------------------------


def test_a_list_made_for_another_model_is_refused_unless_asked(tmp_path: Path) -> None:
    model = conv_chain(tmp_path).model
    with pytest.raises(ExclusionError) as caught:
        check_same_model(FULL, model)
    assert caught.value.message == (
        f"the exclusion list was made for m.onnx (sha256 abababababab…, this is "
        f"{model.sha256[:12]}…), not for this m.onnx"
    )
    assert "--accept-other-model" in caught.value.hint
    [note] = check_same_model(FULL, model, accept_other_model=True)
    assert note.startswith("the exclusion list was made for another model")


def test_a_list_without_a_hash_is_accepted_with_a_note(tmp_path: Path) -> None:
    model = conv_chain(tmp_path).model
    [note] = check_same_model(ExclusionList(), model)
    assert "does not say which model it was made for" in note
    own = ExclusionList(float_name="m.onnx", float_sha256=model.sha256.upper())
    assert check_same_model(own, model) == ()


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("Conv_*", ["Conv_1", "Conv_10", "Conv_[1]"]),
        ("Conv_?", ["Conv_1"]),
        ("Conv_[1]", ["Conv_[1]"]),
        ("conv*", []),
        ("*", ["Conv_1", "Conv_10", "Conv_[1]", "a.b", "a\nb"]),
        ("a.b", ["a.b"]),
        ("a?b", ["a.b", "a\nb"]),
        ("Conv", []),
    ],
)
def test_patterns_know_the_asterisk_and_the_question_mark_only(
    pattern: str, expected: list[str]
) -> None:
    names = ["Conv_1", "Conv_10", "Conv_[1]", "a.b", "a\nb"]
    assert matching_names(pattern, names) == expected


def starred(folder: Path) -> Bench:
    """Node names that look like patterns."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="n*"),
        helper.make_node("Relu", ["a"], ["b"], name="n1"),
        helper.make_node("Relu", ["b"], ["y"], name="n[1]"),
    ]
    return bench(folder, nodes, {}, inputs={"x": [2]}, outputs={"y": [2]})


def test_an_exact_name_wins_over_the_pattern_it_looks_like(tmp_path: Path) -> None:
    model = starred(tmp_path).model
    assert resolve(["n*"], model).names == ("n*",)
    assert resolve(["n?"], model).names == ("n*", "n1")
    assert resolve(["n[1]"], model).names == ("n[1]",)


def test_names_come_once_in_the_order_given_and_patterns_are_shown(tmp_path: Path) -> None:
    model = conv_chain(tmp_path).model
    found = resolve(["two", "t*", "one"], model)
    assert found.names == found.prepared_names == ("two", "three", "one")
    assert found.notes == ("t* stands for 2 nodes (two, three)",)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("", "an empty node name was given; ONNX Runtime would take it for every unnamed node"),
        ("onne", "m.onnx has no node 'onne'; the nearest names are 'one', 'two', 'relu'"),
        (
            "thre?x*",
            "the pattern 'thre?x*' matches none of the 4 nodes of m.onnx; the nearest names are "
            "'three', 'relu', 'two'",
        ),
    ],
)
def test_an_entry_that_means_nothing_is_an_error(entry: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExclusionError) as caught:
        resolve([entry], conv_chain(tmp_path).model)
    assert caught.value.message == message
    assert caught.value.hint


@needs_models
def test_unnamed_nodes_are_named_by_their_stable_names(tmp_path: Path) -> None:
    model = load_model(MODELS / "squeezenet-fp16" / "model.onnx")
    name = next(n.name for n in model.nodes if n.op_type == "Conv")
    assert resolve([name], model).names == (name,)


@needs_models
def test_names_that_pre_processing_took_away_are_said(tmp_path: Path) -> None:
    model = load_model(MODELS / "gtcrn" / "model.onnx")
    prepared = prepare(model, QuantConfig(), tmp_path)
    found = resolve(["Add_157", "Transpose_158", "Transpose_2"], model, prepared=prepared)
    assert found.prepared_names[0] == "MatMul_156/MatMulAddFusion"
    assert found.notes[0] == (
        "Add_157 became part of MatMul_156/MatMulAddFusion in pre-processing, which is left in "
        "float in its place"
    )
    assert found.notes[-1] == (
        "pre-processing removed 2 nodes (Transpose_158, Transpose_2) or moved them elsewhere: "
        "nothing is left there to exclude"
    )
    added = resolve(["gemm_input_reshape"], model, prepared=prepared)
    assert added.prepared_names == ("gemm_input_reshape",)
    assert added.notes == ("gemm_input_reshape is a node that pre-processing added to the model",)


# --- what a list really changed ---------------------------------------------------------------


def test_a_node_between_quantized_neighbours_is_still_fed(tmp_path: Path) -> None:
    effect = conv_chain(tmp_path).effects("two")["two"]
    assert effect.status == "still fed by Q/DQ"
    assert (effect.input_dtypes, effect.weight_dtype, effect.output_dtype) == (
        ("int8",),
        "float32",
        "int8",
    )
    assert effect.neighbours == ("relu", "three")
    assert effect.details == (
        "its input r1 is still dequantized from int8, because relu needs it quantized",
        "its output c2 is still quantized to int8, because three needs it quantized",
    )


def test_a_node_whose_neighbours_are_out_as_well_is_float(tmp_path: Path) -> None:
    effect = conv_chain(tmp_path).effects("two", "relu", "three")["two"]
    assert (effect.status, effect.details, effect.neighbours) == ("float now", (), ())
    assert (effect.input_dtypes, effect.weight_dtype, effect.output_dtype) == (
        ("float32",),
        "float32",
        "float32",
    )


def test_excluding_a_conv_frees_its_relu_and_this_is_said(tmp_path: Path) -> None:
    effect = conv_chain(tmp_path).effects("one")["one"]
    assert "relu behind it is no longer folded and runs in float" in effect.details


def test_excluding_only_a_relu_adds_a_pair_and_this_is_said(tmp_path: Path) -> None:
    chain = conv_chain(tmp_path)
    pairs = [sum(n.op_type == "QuantizeLinear" for n in m.nodes) for m in (
        chain.quantize(), chain.quantize("relu"))]  # fmt: skip
    assert pairs[1] == pairs[0] + 1
    effect = chain.effects("relu")["relu"]
    assert effect.status == "still fed by Q/DQ"
    assert effect.neighbours == ("one", "two")
    assert effect.details[-1] == (
        "its input c1 has a Q/DQ pair of its own now, with the range before Relu: leave one in "
        "float as well"
    )


@pytest.mark.parametrize("kind", ["qdq", "qoperator", "dynamic"])
def test_a_shared_weight_stays_quantized_and_the_sharer_is_named(kind: str, tmp_path: Path) -> None:
    shared = shared_weight(tmp_path, QuantConfig(format=kind))
    effect = shared.effects("b")["b"]
    assert (effect.status, effect.weight_dtype) == ("weight still quantized", "int8")
    assert "a" in effect.neighbours
    assert effect.details[0] == "its weight w is still int8, because it is shared with a"
    answer = free_fully("b", shared.prepared.model, shared.quantize())
    assert answer == (("a",) if kind == "dynamic" else ("a", "c"))
    assert shared.effects("a", "b")["b"].weight_dtype == "float32"


def test_a_node_that_was_float_anyway_is_said_to_be_unchanged(tmp_path: Path) -> None:
    shared = shared_weight(tmp_path, QuantConfig(op_types=("MatMul",)))
    effect = shared.effects("before_a")["before_a"]
    assert effect.status == "nothing changed"


def test_a_name_that_is_not_there_gets_the_nearest(tmp_path: Path) -> None:
    chain = conv_chain(tmp_path)
    made = chain.quantize()
    [effect] = effect_of(["tow"], chain.prepared.model, made, made)
    assert effect.status == "no such node"
    assert effect.details == ("the nearest names are two, one, three",)


def test_a_list_that_was_not_applied_changes_nothing(tmp_path: Path) -> None:
    chain = conv_chain(tmp_path)
    made = chain.quantize()
    found = effect_of(["one", "relu"], chain.prepared.model, made, made)
    assert [e.status for e in found] == ["nothing changed"] * 2


def test_values_that_are_only_handed_on_count_as_dequantized(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="one"),
        helper.make_node("Transpose", ["c1"], ["t1"], name="turn", perm=[0, 1, 3, 2]),
        helper.make_node("Conv", ["t1", "w2"], ["c2"], name="two"),
        helper.make_node("Tanh", ["c2"], ["h"], name="tanh"),
        helper.make_node("Conv", ["h", "w3"], ["y"], name="three"),
    ]
    weights = {f"w{i}": gaussian(3, 3, 1, 1, seed=i) for i in (1, 2, 3)}
    shapes = [1, 3, 4, 4]
    chain = bench(tmp_path, nodes, weights, inputs={"x": shapes}, outputs={"y": shapes})
    effect = chain.effects("turn", "two")["two"]
    assert effect.status == "still fed by Q/DQ"
    assert effect.details == (
        "its input t1 is still dequantized from int8 (handed on unchanged), "
        "because one needs it quantized",
    )
    assert free_fully("two", chain.prepared.model, chain.quantize()) == ("one",)
    assert chain.effects("one", "two")["two"].status == "float now"


def test_free_fully_refuses_a_name_that_is_not_there(tmp_path: Path) -> None:
    chain = conv_chain(tmp_path)
    with pytest.raises(ExclusionError, match="has no node 'tow'; the nearest names are 'two'"):
        free_fully("tow", chain.prepared.model, chain.quantize())


def check_freed(where: Bench, name: str) -> None:
    """With the answer the node is float by the oracle, and no member can be spared."""
    answer = free_fully(name, where.prepared.model, where.quantize(), where.config)
    made = where.quantize(name, *answer)
    assert why_not_float(made, name) == "", (name, answer)
    # The answer is the same whether or not the node is on the list already.
    again = free_fully(name, where.prepared.model, where.quantize(name), where.config)
    assert set(again) == set(answer)
    [effect] = effect_of([name], where.prepared.model, made, where.quantize(), where.config)
    assert effect.status in ("float now", "nothing changed")
    for spared in answer[:4]:
        rest = [n for n in answer if n != spared]
        assert why_not_float(where.quantize(name, *rest), name) != "", (name, spared)


@pytest.mark.parametrize("kind", ["qdq", "qoperator", "dynamic"])
@pytest.mark.parametrize("name", ["one", "relu", "two", "three"])
def test_what_free_fully_answers_is_enough_and_not_too_much(
    kind: str, name: str, tmp_path: Path
) -> None:
    check_freed(conv_chain(tmp_path, QuantConfig(format=kind)), name)


def test_free_fully_knows_which_op_types_a_recipe_quantizes(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="one"),
        helper.make_node("Sigmoid", ["c1"], ["s1"], name="sigmoid"),
        helper.make_node("Conv", ["s1", "w2"], ["y"], name="two"),
    ]
    weights = {"w1": gaussian(3, 3, 1, 1), "w2": gaussian(3, 3, 1, 1, seed=1)}
    convs = bench(
        tmp_path,
        nodes,
        weights,
        inputs={"x": [1, 3, 4, 4]},
        outputs={"y": [1, 3, 4, 4]},
        config=QuantConfig(op_types=("Conv",)),
    )
    # The Sigmoid stands between Q/DQ pairs, yet it asks for none of them.
    assert free_fully("two", convs.prepared.model, convs.quantize(), convs.config) == ()
    check_freed(convs, "two")


@needs_models
@pytest.mark.parametrize("name", ["Conv_21", "Concat_230", "Relu_79", "Conv_235", "Gather_18"])
def test_free_fully_frees_nodes_of_fastestdet(name: str, tmp_path: Path) -> None:
    where = real("fastestdet", tmp_path)
    answer = free_fully(name, where.prepared.model, where.quantize())
    made = where.quantize(name, *answer)
    assert why_not_float(made, name) == ""
    assert why_not_float(where.quantize(name), name) != ""


@needs_models
@pytest.mark.parametrize("kind", ["qdq", "qoperator", "dynamic"])
def test_free_fully_is_enough_and_not_too_much_on_every_node_of_resnet8(
    kind: str, tmp_path: Path
) -> None:
    where = real("mlperf-resnet8", tmp_path, QuantConfig(format=kind))
    nodes = [
        n.name
        for n in where.prepared.model.nodes
        if n.op_type in supported_op_types(where.config)
        and where.prepared.model.info(n.outputs[0]).dtype == "float32"
    ]
    assert len(nodes) >= 10
    for name in random.Random(kind).sample(nodes, 6):
        check_freed(where, name)


@needs_models
@pytest.mark.slow
@pytest.mark.parametrize("model", ["magika", "squeezenet-fp16", "ultraface-rfb320", "gtcrn"])
def test_free_fully_is_enough_and_not_too_much_on_other_real_models(
    model: str, tmp_path: Path
) -> None:
    where = real(model, tmp_path)
    nodes = [
        n.name
        for n in where.prepared.model.nodes
        if n.op_type in ("Add", "Concat", "Conv", "Gemm", "MatMul", "Mul", "Sigmoid")
        and where.prepared.model.info(n.outputs[0]).dtype == "float32"
    ]
    for name in random.Random(model).sample(nodes, 2):
        check_freed(where, name)


@needs_models
def test_free_names_answers_in_names_of_the_float_file(tmp_path: Path) -> None:
    where = real("fastestdet", tmp_path)
    made = where.quantize()
    # Conv_21 reads a channel shuffle that pre-processing folded into Reshape_13_new_reshape.
    answer = free_names("Conv_21", where.prepared, made)
    assert set(answer) <= set(where.model.node_by_name)
    assert why_not_float(where.quantize("Conv_21", *answer), "Conv_21") == ""
    folded = free_names("Transpose_14", where.prepared, made)
    assert "Reshape_13_new_reshape" not in folded


@needs_models
def test_what_pre_processing_removed_cannot_be_freed(tmp_path: Path) -> None:
    where = real("gtcrn", tmp_path)
    with pytest.raises(ExclusionError, match="pre-processing removed Transpose_158 or moved it"):
        free_names("Transpose_158", where.prepared, where.model)


@needs_models
def test_effects_on_fastestdet_agree_with_the_file(tmp_path: Path) -> None:
    where = real("fastestdet", tmp_path)
    names = ["Conv_21", "Relu_79", "Concat_230", "Conv_239"]
    made = where.quantize(*names)
    for effect in effect_of(names, where.prepared.model, made, where.quantize()):
        freed = why_not_float(made, effect.name) == ""
        assert (effect.status == "float now") == freed
        assert bool(effect.details) or freed
        for neighbour in effect.neighbours:
            assert neighbour in where.prepared.model.node_by_name
            assert neighbour not in names
