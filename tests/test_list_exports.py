"""Exports of an exclusion list: in each target's own matcher, they mean exactly the listed nodes.

The oracles are ONNX Runtime's quantizer itself and, for tools that are not installed here, their
matchers written down anew in `MATCHERS` from their code (Olive 0.13, AMD Quark 0.13, NNCF 3.4,
NVIDIA ModelOpt 0.47).
"""

from __future__ import annotations

import ast
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    quant_pre_process,
    quantize_dynamic,
    quantize_static,
)

from inspector.cli import cli, main
from inspector.errors import ExclusionError
from inspector.exclusions import (
    ExclusionEntry,
    ExclusionList,
    resolve,
    write_exclusions,
)
from inspector.list_exports import (
    PREPARED_TARGETS,
    TARGETS,
    export,
    export_list,
    needs_preparing,
)
from inspector.model import Model
from inspector.model_files import load_model
from inspector.prepare import prepare
from inspector.recipe import QuantConfig
from tests.samples import MODELS, array, conv_relu_gemm, floats, model, needs_models, save

# --- reading a text as its tool would ---------------------------------------------------------


def given(text: str, target: str) -> list[str]:
    """What a text gives its tool; nothing in the text but what belongs there."""
    if target == "olive":
        values = json.loads(text)
        assert values["op_types_to_exclude"] == []
        return list(values["nodes_to_exclude"])
    variable = {"quark": "exclude", "nncf": "ignored_scope"}.get(target, "nodes_to_exclude")
    assigned = {
        statement.targets[0].id: statement.value
        for statement in ast.parse(text).body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    assert set(assigned) <= {variable, "model", "names"}
    value = assigned[variable]
    if target == "nncf":
        assert isinstance(value, ast.Call)
        assert ast.unparse(value.func) == "IgnoredScope"
        assert [k.arg for k in value.keywords] == ["names"]
        value = value.keywords[0].value
    found = ast.literal_eval(value)
    assert isinstance(found, list)
    return found


def run_copy(text: str) -> None:
    """Runs the lines of a text that write a copy of the model, in the current folder."""
    tree = ast.parse(text)
    tree.body = [s for s in tree.body if "IgnoredScope" not in ast.unparse(s)]
    exec(compile(tree, "copy", "exec"), {})


def exact(entries: Sequence[str], names: Sequence[str]) -> list[str]:
    """ONNX Runtime: ``node.name in nodes_to_exclude``; Olive hands its names on to that."""
    return [name for name in names if name in entries]


def quark(entries: Sequence[str], names: Sequence[str]) -> list[str]:
    """Quark: strings from "^" on are searched for, if ".*" is in them; others are names."""
    patterns = [e for e in entries if e.startswith("^")]
    kept = [p for p in patterns if ".*" in p]
    found = {e for e in entries if not e.startswith("^")}
    hits = {name for name in names if any(re.search(p, name) for p in kept)}
    assert hits or not kept, "Quark raises where expressions find nothing"
    return [name for name in names if name in found | hits]


def nncf(entries: Sequence[str], names: Sequence[str]) -> list[str]:
    """NNCF: exact names; unknown ones raise, and so do names that nodes share."""
    named = [name or f"unnamed_nncf_{at}" for at, name in enumerate(names)]
    assert max(Counter(named).values()) == 1, "NNCF raises on shared names"
    assert set(entries) <= set(named), "NNCF raises on unknown names"
    return [name for name in named if name in entries]


def modelopt(entries: Sequence[str], names: Sequence[str]) -> list[str]:
    """ModelOpt: ``re.match``, which fits a prefix."""
    return [name for name in names if any(re.match(e, name) for e in entries)]


MATCHERS: dict[str, Callable[[Sequence[str], Sequence[str]], list[str]]] = {
    "ort": exact,
    "olive": exact,
    "quark": quark,
    "nncf": nncf,
    "modelopt": modelopt,
}
every_target = pytest.mark.parametrize("target", TARGETS)


def names_of(source: Model) -> list[str]:
    return [node.name for node in source.nodes]


def chain(*names: str) -> onnx.ModelProto:
    """Relus one behind the other, with these names."""
    nodes = [
        helper.make_node("Relu", [f"t{at}"], [f"t{at + 1}"], name) for at, name in enumerate(names)
    ]
    return model(nodes, [("t0", [1, 2])], [(f"t{len(names)}", [1, 2])])


def test_every_target_has_a_matcher_and_a_place_in_the_command() -> None:
    assert set(MATCHERS) == set(TARGETS)
    [option] = [p for p in cli.commands["exclusions"].params if p.name == "target"]
    assert tuple(option.type.choices) == TARGETS


# --- the texts --------------------------------------------------------------------------------

GOLDEN = {
    "ort": """\
# What ONNX Runtime leaves in float of 'model': 3 entries, by exact name; names it does not find \
are passed over in silence.
nodes_to_exclude = [
    'conv',
    'gemm',
    'gemm_MatMul',
]
# Use: quantize_static(…, nodes_to_exclude=nodes_to_exclude) or \
quantize_dynamic(…, nodes_to_exclude=nodes_to_exclude)
# On its command line: python -m onnxruntime.quantization.static_quantize_runner … \
--nodes_to_exclude conv gemm gemm_MatMul
""",
    "olive": """\
{
  "type": "OnnxStaticQuantization",
  "nodes_to_exclude": [
    "conv",
    "gemm"
  ],
  "op_types_to_exclude": []
}
""",
    "quark": """\
# What AMD Quark leaves in float of 'model': 2 entries, by exact name; a string that starts with \
^ is a regular expression.
exclude = [
    'conv',
    'gemm',
]
# Use: QConfig(…, exclude=exclude)
# On its scripts' command line: --exclude_nodes 'conv;gemm'
""",
    "nncf": """\
# What NNCF leaves in float of 'model': 2 entries, by exact name; it raises on names that it \
does not find.
from nncf import IgnoredScope

ignored_scope = IgnoredScope(names=[
    'conv',
    'gemm',
])
# Use: nncf.quantize(model, calibration_dataset, ignored_scope=ignored_scope)
""",
    "modelopt": """\
# What NVIDIA ModelOpt leaves in float of 'model': 2 entries, by regular expressions, each for \
one whole name.
nodes_to_exclude = [
    '^conv$',
    '^gemm$',
]
# Use: modelopt.onnx.quantization.quantize(…, nodes_to_exclude=nodes_to_exclude), without \
simplify, which renames nodes
# On its command line: python -m modelopt.onnx.quantization --onnx_path … \
--nodes_to_exclude '^conv$' '^gemm$'
""",
}


@every_target
def test_each_target_gets_its_own_text(target: str) -> None:
    found = export(["conv", "gemm"], Model(conv_relu_gemm()), target)
    assert found.text == GOLDEN[target]
    assert found.target == target
    assert found.notes == ()
    assert found.names == tuple(given(found.text, target))
    assert export_list(["conv", "gemm"], Model(conv_relu_gemm()), target) == found.text


@every_target
def test_an_empty_list_leaves_nothing_in_float(target: str) -> None:
    source = Model(conv_relu_gemm())
    text = export_list(ExclusionList(), source, target)
    assert given(text, target) == []
    assert MATCHERS[target]([], names_of(source)) == []


@every_target
def test_patterns_become_the_names_they_stand_for(target: str) -> None:
    source = Model(conv_relu_gemm())
    held = ExclusionList(nodes=(ExclusionEntry(name="gemm"),), patterns=("*o*",))
    found = export(held, source, target)
    matched = MATCHERS[target](given(found.text, target), names_of(source))
    assert matched == ["conv", "pool", "gemm"]
    assert "*o* stands for 2 nodes (conv, pool)" in found.notes


@every_target
def test_a_name_the_model_lacks_is_an_error(target: str) -> None:
    with pytest.raises(ExclusionError, match="has no node 'convv'"):
        export(["convv"], Model(conv_relu_gemm()), target)


def test_misuse_is_told_from_a_wrong_list() -> None:
    with pytest.raises(ValueError, match="target 'onnx', expected one of ort, olive"):
        export(["conv"], Model(conv_relu_gemm()), "onnx")
    with pytest.raises(TypeError, match="one string"):
        export("conv", Model(conv_relu_gemm()), "ort")


# --- which nodes they mean --------------------------------------------------------------------

HOSTILE = (
    "/conv1", "/conv10", "/conv1/Conv", "x/conv1", "/CONV1", "a.b", "axb", "a.b.c", "a|b", "a",
    "b+c(d)[0]{2}", "b+c(d)[0]", "^start", "^start.*", "^startle", "start", "^", "$", ".*", "*",
    "-dash", "--op_types_to_exclude", "semi;colon", "semi", "colon", "#", "# a", "it's", '"quoted"',
    "'''", '"""', "back\\slash", "back\\", "\\n", "line\nbreak", "line", "break", "n", "n\n",
    "^n", "^n\n", "tab\t", " space ", " ", "{re}x", "(?#.*)", "\u202egnp", "naïve", "节点",
    "\x1b[2J", "\U0001f600", "x\nimport os", "Relu", "Relu_t1", "%s", "{0}", "f{x}", "\r", "…",
)  # fmt: skip


@every_target
def test_a_hostile_name_means_its_own_node_only(target: str) -> None:
    source = Model(chain(*HOSTILE))
    assert names_of(source) == list(HOSTILE)
    for name in HOSTILE:
        text = export_list([name], source, target)
        assert MATCHERS[target](given(text, target), HOSTILE) == [name]
    text = export_list(HOSTILE, source, target)
    assert MATCHERS[target](given(text, target), HOSTILE) == list(HOSTILE)
    # As a file: no line that a comment did not mean to begin, nothing that a terminal obeys.
    assert all(c.isprintable() or c == "\n" for c in text)
    kinds = (ast.Assign, ast.ImportFrom)
    assert target == "olive" or all(isinstance(s, kinds) for s in ast.parse(text).body)


def test_a_note_cannot_leave_its_comment() -> None:
    for target in set(TARGETS) - {"olive"}:
        found = export(["x*"], Model(chain("x\nraise SystemExit", "x\u2028\r", "a")), target)
        assert "\n" in found.notes[0]
        tree = ast.parse(found.text)
        assert all(isinstance(s, ast.Assign | ast.ImportFrom) for s in tree.body)
        assert all(c.isprintable() or c == "\n" for c in found.text)


def test_hostile_names_are_left_off_command_lines_that_cannot_hold_them() -> None:
    source = Model(chain("a", "-b", "c;d", "e\nf"))
    for target, fine, bad in (
        ("ort", ["a", "c;d"], "-b"),
        ("ort", ["a", "c;d"], "e\nf"),
        ("quark", ["a", "-b"], "c;d"),
        ("modelopt", ["a", "-b"], "e\nf"),
    ):
        assert "command line" in export_list(fine, source, target)
        assert "command line" not in export_list([*fine, bad], source, target)


@needs_models
@every_target
@pytest.mark.parametrize("folder", ["fastestdet", "gtcrn"])
def test_real_lists_mean_exactly_their_nodes(folder: str, target: str) -> None:
    source = load_model(MODELS / folder / "model.onnx")
    names = names_of(source)
    candidates = [n.name for n in source.nodes if n.op_type != "Constant"]
    picker = random.Random(7)
    for size in (1, 5, 40, len(candidates)):
        listed = picker.sample(candidates, size)
        entries = given(export_list(listed, source, target), target)
        assert MATCHERS[target](entries, names) == [n for n in names if n in listed]


@needs_models
def test_real_names_would_be_mistaken_as_bare_prefixes() -> None:
    names = names_of(load_model(MODELS / "fastestdet" / "model.onnx"))
    assert any(len(modelopt([name], names)) > 1 for name in names)


# --- files whose nodes have no names, or shared ones ------------------------------------------


@needs_models
@every_target
def test_nodes_without_a_name_are_found_in_the_copy_only(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(MODELS / "ultraface-rfb320" / "model.onnx", "model.onnx")
    source = load_model("model.onnx")
    listed = [n for n in source.nodes if n.op_type in ("Conv", "Relu")][3:9]
    found = export([n.name for n in listed], source, target)
    entries = given(found.text, target)
    if target == "olive":
        [note] = found.notes
        assert "give it the copy that the lines for ONNX Runtime (ort) write" in note
        run_copy(export_list([n.name for n in listed], source, "ort"))
    else:
        run_copy(found.text)
    assert not {n.name for n in onnx.load("model.onnx").graph.node} - {""}
    copy = onnx.load("model.named.onnx").graph
    matched = MATCHERS[target](entries, [n.name for n in copy.node])
    assert len(matched) == len(listed)
    outputs = {n.name: tuple(n.output) for n in copy.node}
    assert sorted(outputs[m] for m in matched) == sorted(n.outputs for n in listed)


@pytest.mark.parametrize("target", ["ort", "quark", "nncf", "modelopt"])
@pytest.mark.parametrize("listed", [["dup"], ["dup_t2"], ["dup_t4", "Relu_t3"], ["own"]])
def test_nodes_that_share_a_name_are_told_apart(
    target: str, listed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(chain("dup", "dup", "", "dup", "own"), Path("model.onnx"))
    source = load_model("model.onnx")
    text = export_list(listed, source, target)
    if "import onnx" in text:
        run_copy(text)
    else:
        # Where nothing is mistaken, nothing is renamed.
        assert listed == ["own"]
        shutil.copy("model.onnx", "model.named.onnx")
    nodes = onnx.load("model.named.onnx").graph.node
    matched = MATCHERS[target](given(text, target), [n.name for n in nodes])
    wanted = [source.node_by_name[name].outputs for name in listed]
    found = [tuple(n.output) for n in nodes if n.name in matched]
    assert sorted(found) == sorted(wanted)


def test_names_like_those_given_to_nodes_need_no_copy() -> None:
    source = Model(chain("Relu", "Relu_t2", "own", "own_t4"))
    for target in TARGETS:
        assert "import onnx" not in export_list(names_of(source), source, target)


def test_the_copy_goes_on_using_external_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    proto = conv_relu_gemm()
    proto.graph.node[0].name = ""
    weights = [onnx.numpy_helper.to_array(i) for i in proto.graph.initializer]
    onnx.save(proto, "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    before = Path("w.bin").read_bytes()
    run_copy(export_list(["Conv_c"], load_model("model.onnx"), "ort"))
    assert Path("w.bin").read_bytes() == before
    copy = onnx.load("model.named.onnx", load_external_data=False)
    assert all(i.data_location == onnx.TensorProto.EXTERNAL for i in copy.graph.initializer)
    copy = onnx.load("model.named.onnx")
    assert [n.name for n in copy.graph.node][:2] == ["Conv_c", "relu"]
    for tensor, weight in zip(copy.graph.initializer, weights, strict=True):
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), weight)


def test_nodes_inside_functions_are_found_in_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    proto = model(
        [helper.make_node("F", [a], [b], n, domain="my") for a, b, n in ("xym", "yzk")],
        [("x", [2])],
        [("z", [2])],
    )
    body = [
        helper.make_node("Relu", ["a"], ["i"], "inner"),
        helper.make_node("Neg", ["i"], ["b"], "outer"),
    ]
    opsets = [helper.make_opsetid("", 17)]
    proto.functions.append(helper.make_function("my", "F", ["a"], ["b"], body, opsets))
    proto.opset_import.append(helper.make_opsetid("my", 1))
    save(proto, Path("model.onnx"))
    source = load_model("model.onnx")
    listed = [n.name for n in source.nodes if n.op_type == "Relu"]
    for target in ("ort", "quark", "nncf", "modelopt"):
        text = export_list(listed, source, target)
        run_copy(text)
        nodes = onnx.load("model.named.onnx").graph.node
        matched = MATCHERS[target](given(text, target), [n.name for n in nodes])
        assert [n.op_type for n in nodes if n.name in matched] == ["Relu", "Relu"]
    assert "what local functions held" in export(listed, source, "olive").notes[0]


# --- nodes that tools rename, split or remove -------------------------------------------------


class Reader(CalibrationDataReader):
    def __init__(self, *feeds: dict[str, Any]) -> None:
        self.left = list(feeds)

    def get_next(self) -> dict[str, Any] | None:
        return self.left.pop() if self.left else None


def op_types(path: str | Path) -> list[str]:
    return [n.op_type for n in onnx.load(path).graph.node]


@pytest.mark.parametrize("target", ["ort", "olive"])
def test_a_gemm_stays_in_float_in_dynamic_quantization(target: str, tmp_path: Path) -> None:
    path = save(conv_relu_gemm(), tmp_path / "m.onnx")
    held = ExclusionList(nodes=(ExclusionEntry(name="gemm"),), recipe=QuantConfig(format="dynamic"))
    text = export_list(held, load_model(path), target)
    if target == "olive":
        assert json.loads(text)["type"] == "OnnxDynamicQuantization"
    out = tmp_path / "q.onnx"
    for names, integer in ((given(text, target), False), (["gemm"], True)):
        quantize_dynamic(path, out, op_types_to_quantize=["MatMul"], nodes_to_exclude=names)
        assert ("MatMulInteger" in op_types(out)) is integer


def test_a_gemm_has_one_name_in_static_quantization() -> None:
    held = ExclusionList(nodes=(ExclusionEntry(name="gemm"),), recipe=QuantConfig())
    for target in ("ort", "olive"):
        assert given(export_list(held, Model(conv_relu_gemm()), target), target) == ["gemm"]


def test_a_gemms_part_does_not_take_another_node_along() -> None:
    proto = conv_relu_gemm()
    proto.graph.node[1].name = "gemm_MatMul"
    source = Model(proto)
    assert given(export_list(["gemm"], source, "ort"), "ort") == ["gemm"]
    held = ExclusionList(nodes=(ExclusionEntry(name="gemm"),), recipe=QuantConfig(format="dynamic"))
    found = export(held, source, "ort")
    assert given(found.text, "ort") == ["gemm", "gemm_MatMul"]
    assert "both are left in float" in found.notes[0]
    assert "# Note: dynamic quantization calls" in found.text


def matmul_add() -> onnx.ModelProto:
    """A MatMul and an Add that pre-processing makes one Gemm of, then a Sigmoid."""
    return model(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"], "mat"),
            helper.make_node("Add", ["m", "b"], ["a"], "add"),
            helper.make_node("Sigmoid", ["a"], ["y"], "sigmoid"),
        ],
        [("x", [2, 8])],
        [("y", [2, 4])],
        [array("w", floats((8, 4))), array("b", floats((4,), 1))],
    )


def test_a_fused_node_stays_in_float_under_its_new_name(tmp_path: Path) -> None:
    path = save(matmul_add(), tmp_path / "m.onnx")
    source = load_model(path)
    prepared = prepare(source, QuantConfig(), tmp_path / "cache")
    for target in sorted(PREPARED_TARGETS):
        found = export(["mat"], source, target, prepared=prepared)
        fused = prepared.successors["mat"]
        assert fused is not None
        assert fused != "mat"
        assert set(given(found.text, target)) >= {"mat", fused}
        # Neither the file nor the prepared model has another node of these names.
        assert exact(given(found.text, target), names_of(source)) == ["mat"]
        assert exact(given(found.text, target), names_of(prepared.model)) == [fused]
        assert any(f"mat became part of {fused}" in note for note in found.notes)
        # Tools that do not pre-process have the file's nodes only.
        for other in set(TARGETS) - PREPARED_TARGETS:
            text = export_list(["mat"], source, other, prepared=prepared)
            assert MATCHERS[other](given(text, other), names_of(source)) == ["mat"]
            assert text == export_list(["mat"], source, other)
        # ONNX Runtime's own pre-processing and quantizer.
        if not (tmp_path / "p.onnx").exists():
            quant_pre_process(path, tmp_path / "p.onnx")
        for names, quantized in ((given(found.text, target), False), (["mat"], True)):
            quantize_static(
                tmp_path / "p.onnx",
                tmp_path / "q.onnx",
                Reader({"x": floats((2, 8), 3)}),
                op_types_to_quantize=["Gemm"],
                nodes_to_exclude=names,
            )
            assert ("QuantizeLinear" in op_types(tmp_path / "q.onnx")) is quantized


@needs_models
def test_real_lists_mean_what_pre_processing_made_of_their_nodes(tmp_path: Path) -> None:
    source = load_model(MODELS / "gtcrn" / "model.onnx")
    prepared = prepare(source, QuantConfig(), tmp_path)
    listed = ["Add_157", "MatMul_156", "Transpose_158"]
    wanted = resolve(listed, source, prepared=prepared).prepared_names
    allowed = {*wanted, *(p for n in wanted for p in prepared.companions.get(n, ()))}
    assert "MatMul_156/MatMulAddFusion" in allowed
    assert len(allowed) > 1
    for target in sorted(PREPARED_TARGETS):
        entries = given(export_list(listed, source, target, prepared=prepared), target)
        assert set(MATCHERS[target](entries, names_of(prepared.model))) == allowed
        assert MATCHERS[target](entries, names_of(source)) == [
            n for n in names_of(source) if n in listed
        ]


def test_a_node_that_only_pre_processing_makes_is_named_where_it_runs(tmp_path: Path) -> None:
    source = load_model(save(matmul_add(), tmp_path / "m.onnx"))
    prepared = prepare(source, QuantConfig(), tmp_path / "cache")
    fused = prepared.successors["mat"]
    assert fused is not None
    for target in TARGETS:
        found = export([fused, "sigmoid"], source, target, prepared=prepared)
        matched = exact(given(found.text, target), [*names_of(prepared.model), "^sigmoid$"])
        if target in PREPARED_TARGETS:
            assert matched == [fused, "sigmoid"]
        else:
            assert len(matched) == 1
            assert f"{fused!r} cannot be given to" in found.notes[0]
        with pytest.raises(ExclusionError):
            export([fused], source, target)


def test_a_cast_that_nncf_removes_is_left_out() -> None:
    proto = model(
        [
            helper.make_node("Cast", ["x"], ["c"], "idle", to=1),
            helper.make_node("Cast", ["c"], ["d"], "half", to=10),
            helper.make_node("Cast", ["d"], ["y"], "back", to=1),
        ],
        [("x", [2])],
        [("y", [2])],
    )
    found = export(["idle", "half", "back"], Model(proto), "nncf")
    assert given(found.text, "nncf") == ["half", "back"]
    assert "'idle' is left out" in found.notes[0]
    assert given(export_list(["idle"], Model(proto), "modelopt"), "modelopt") == ["^idle$"]


def conv_bn_add(*, pad: bool = False, wide: bool = False) -> onnx.ModelProto:
    """(Pad,) Conv, BatchNormalization, Add of a constant, Relu; `wide` reads the Conv twice."""
    nodes = [
        *([helper.make_node("Pad", ["x", "pads"], ["x0"], "pad")] if pad else []),
        helper.make_node("Conv", ["x0" if pad else "x", "w"], ["c"], "conv"),
        helper.make_node("BatchNormalization", ["c", "s", "s", "s", "s"], ["b"], "bn"),
        helper.make_node("Add", ["b", "k"], ["a"], "add"),
        helper.make_node("Relu", ["a"], ["y"], "relu"),
        *([helper.make_node("Neg", ["c"], ["z"], "neg")] if wide else []),
    ]
    shape = [1, 4, 4, 4]
    constants = [
        array("w", floats((4, 4, 1, 1))),
        array("s", np.ones(4, np.float32)),
        array("k", floats((1, 4, 1, 1))),
        array("pads", np.zeros(8, np.int64)),
    ]
    outputs = [("y", shape), *([("z", shape)] if wide else [])]
    return model(nodes, [("x", shape)], outputs, constants[: 4 if pad else 3])


@pytest.mark.parametrize("name", ["conv", "bn", "add"])
def test_quark_is_told_what_its_simplification_calls_fused_nodes(name: str) -> None:
    def names(proto: onnx.ModelProto, listed: str = name) -> list[str]:
        return given(export_list([listed], Model(proto), "quark"), "quark")

    # It calls a fused node by the tensor between its parts, the last one fused counting.
    assert names(conv_bn_add()) == [name, "c", "b"]
    assert names(conv_bn_add(pad=True)) == [name, "c", "b", "a"]
    computed = conv_bn_add()
    computed.graph.node[2].input[1] = "x"
    assert names(computed) == ([name] if name == "add" else [name, "c"])
    # A tensor with two readers cannot go, and a Relu is not fused.
    assert names(conv_bn_add(wide=True)) == [name]
    assert names(conv_bn_add(), "relu") == ["relu"]
    assert "the names its simplification gives" in export_list(
        [name], Model(conv_bn_add()), "quark"
    )
    taken = conv_bn_add()
    taken.graph.node[-1].name = "c"
    assert names(taken) == [name, "b"]


def test_olive_pre_processes_unless_the_recipe_does_not() -> None:
    source = Model(conv_relu_gemm())
    held = ExclusionList(nodes=(ExclusionEntry(name="conv"),), recipe=QuantConfig(preprocess=False))
    assert json.loads(export_list(held, source, "olive"))["quant_preprocess"] is False
    assert "quant_preprocess" not in json.loads(export_list(["conv"], source, "olive"))
    assert not needs_preparing(held, source, "olive")


def test_pre_processing_is_asked_for_only_where_it_matters() -> None:
    source = Model(conv_relu_gemm())
    listed = ExclusionList(nodes=(ExclusionEntry(name="conv"),))
    made = ExclusionList(nodes=(ExclusionEntry(name="conv_new"),))
    for target in TARGETS:
        assert needs_preparing(listed, source, target) is (target in PREPARED_TARGETS)
        assert needs_preparing(made, source, target)
        assert not needs_preparing(ExclusionList(), source, target)


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with m.onnx and a list of two of its nodes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUANT_INSPECTOR_DATA", str(tmp_path / "data"))
    source = load_model(save(matmul_add(), tmp_path / "m.onnx"))
    entries = (ExclusionEntry(name="mat"), ExclusionEntry(name="sigmoid"))
    held = ExclusionList(nodes=entries, float_name="m.onnx", float_sha256=source.sha256)
    write_exclusions(held, "list.json")
    return tmp_path


@every_target
def test_the_command_writes_what_the_library_does(
    target: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["exclusions", "list.json", "--model", "m.onnx", "--to", target]
    assert main(words) == 0
    printed = capsys.readouterr()
    source = load_model("m.onnx")
    prepared = prepare(source, QuantConfig(), folder / "data" / "cache")
    found = export(
        ["mat", "sigmoid"], source, target,
        prepared=prepared if target in PREPARED_TARGETS else None,
    )  # fmt: skip
    assert given(printed.out, target) == list(found.names)
    assert printed.err.splitlines() == [f"warning: {note}" for note in found.notes]
    assert main([*words, "-o", "out.txt"]) == 0
    assert Path("out.txt").read_text(encoding="utf-8") == printed.out == found.text
    assert capsys.readouterr().out == "wrote out.txt\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no.json", "--model", "m.onnx", "--to", "ort"], "no.json cannot be read"),
        (["list.json", "--model", "no.onnx", "--to", "ort"], "no.onnx"),
        (["list.json", "--model", "m.onnx", "--to", "onnx"], "'onnx' is not one of 'ort'"),
        (["list.json", "--model", "m.onnx"], "Missing option '--to'"),
        (["list.json", "--to", "ort"], "Missing option '--model'"),
        (["list.json", "--model", "m.onnx", "--to", "ort", "-o", "list.json"], "is an input"),
        (["list.json", "--model", "m.onnx", "--to", "ort", "-o", "no/o.py"], "cannot be written"),
        (["list.json", "--model", "other.onnx", "--to", "ort"], "was made for m.onnx"),
        (["wrong.json", "--model", "m.onnx", "--to", "nncf"], "has no node 'matt'"),
    ],
)
def test_what_the_user_can_put_right_is_exit_code_2(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(conv_relu_gemm(), folder / "other.onnx")
    write_exclusions(ExclusionList(nodes=(ExclusionEntry(name="matt"),)), "wrong.json")
    assert main(["exclusions", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if not line.startswith("warning:")]
    assert [line.split(":")[0] for line in lines] == ["error", "hint"]
    assert message in lines[0]


def test_a_list_of_another_model_can_be_accepted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = matmul_add()
    proto.producer_name = "another"
    save(proto, folder / "other.onnx")
    words = ["exclusions", "list.json", "--model", "other.onnx", "--to", "modelopt"]
    assert main(words) == 2
    assert main([*words, "--accept-other-model"]) == 0
    printed = capsys.readouterr()
    assert given(printed.out, "modelopt") == ["^mat$", "^sigmoid$"]
    assert "was made for another model (m.onnx" in printed.err
