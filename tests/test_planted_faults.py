"""Two faults planted at once in quantizations of real models: both are named, and nothing else is.

The truth is what the test wrote into the file: which tensor, which fault, which factor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from inspector.cli import main
from inspector.compare import compare_models
from inspector.diagnosis import diagnose
from inspector.feeds import Feeds, load_feeds
from inspector.findings import LOOK, PROBLEM, Finding, case_of
from inspector.live import surgery_gain
from inspector.matching import Matching, match_tensors
from inspector.model import Model
from inspector.model_files import load_model
from inspector.quantize import quantize_model
from inspector.recipe import QuantConfig
from tests.samples import MODELS, array, needs_models, save

Place = Callable[[onnx.GraphProto, Matching], None]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is written into a file, and what has to be said of it.

    Attributes:
        code: of the finding.
        tensor: the float model's.
        plant: changes the file.
        evidence: figures that the finding has to hold.
    """

    code: str
    tensor: str
    plant: Place
    evidence: dict[str, float]


# -- planting ----------------------------------------------------------------------------------


def change(graph: onnx.GraphProto, name: str, values: Callable[[np.ndarray], Any]) -> None:
    tensor = next(i for i in graph.initializer if i.name == name)
    old = numpy_helper.to_array(tensor)
    new = np.asarray(values(old)).astype(old.dtype)
    assert (new != old).any(), f"{name} has that value already"
    tensor.CopyFrom(array(name, new))


def node_of(graph: onnx.GraphProto, op_type: str, source: str) -> onnx.NodeProto:
    return next(n for n in graph.node if n.op_type == op_type and n.input[0] == source)


def q_of(graph: onnx.GraphProto, matching: Matching, tensor: str) -> onnx.NodeProto:
    pair = next(a for a in matching.activations if a.name == tensor)
    assert pair.before is not None
    return node_of(graph, "QuantizeLinear", pair.before)


def parameters(graph: onnx.GraphProto, matching: Matching, weight: str) -> tuple[str, str]:
    """Names of a weight's scale and zero point, behind DequantizeLinear or in integer operators."""
    pair = next(w for w in matching.weights if w.name == weight)
    assert pair.quantized is not None
    codes = pair.quantized.quantized
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] == codes:
            return node.input[1], node.input[2]
    stem = codes.removesuffix("_quantized")
    return f"{stem}_scale", f"{stem}_zero_point"


def weight_scale(tensor: str, factor: float) -> Fault:
    def plant(graph: onnx.GraphProto, matching: Matching) -> None:
        change(graph, parameters(graph, matching, tensor)[0], lambda old: old * factor)

    return Fault(code="weight-gain", tensor=tensor, plant=plant, evidence={"gain": factor})


def weight_zero_point(tensor: str, expected: int) -> Fault:
    """Dropped: the file's own is `expected`."""

    def plant(graph: onnx.GraphProto, matching: Matching) -> None:
        change(graph, parameters(graph, matching, tensor)[1], lambda old: old * 0)

    evidence = {"zero_point_in_file": 0, "zero_point_expected": expected}
    return Fault(code="weight-offset", tensor=tensor, plant=plant, evidence=evidence)


def activation_scale(tensor: str, factor: float) -> Fault:
    """A wrong scale, or a range so much widened."""

    def plant(graph: onnx.GraphProto, matching: Matching) -> None:
        change(graph, q_of(graph, matching, tensor).input[1], lambda old: old * factor)

    evidence = {"scale_ratio": factor}
    return Fault(code="activation-scale", tensor=tensor, plant=plant, evidence=evidence)


def activation_zero_point(tensor: str, expected: int) -> Fault:
    """Dropped in Q and DQ: the file's own is `expected`."""

    def plant(graph: onnx.GraphProto, matching: Matching) -> None:
        change(graph, q_of(graph, matching, tensor).input[2], lambda old: old * 0)

    evidence = {"zero_point_in_file": 0, "zero_point_expected": expected}
    return Fault(code="activation-scale", tensor=tensor, plant=plant, evidence=evidence)


def read_zero_point(tensor: str, expected: int) -> Fault:
    """Dropped in DQ alone: ONNX's default is 0."""

    def plant(graph: onnx.GraphProto, matching: Matching) -> None:
        codes = q_of(graph, matching, tensor).output[0]
        del node_of(graph, "DequantizeLinear", codes).input[2]

    evidence = {"q_zero_point": expected, "dq_zero_point": 0}
    return Fault(code="qdq-pair-differs", tensor=tensor, plant=plant, evidence=evidence)


# -- what is planted where ---------------------------------------------------------------------

# Recipe entries and faults; a name says what is together.
Planted = tuple[dict[str, Any], tuple[Fault, Fault]]

DETECTOR: dict[str, Planted] = {
    "a scale too large and a zero point": (
        {}, (activation_scale("onnx::Conv_468", 4), activation_zero_point("onnx::Conv_590", -128)),
    ),
    "a scale too small and a zero point not at an end": (
        {},
        (activation_scale("onnx::Conv_747", 0.25), activation_zero_point("onnx::Sigmoid_954", 52)),
    ),
    "a weight and a widened range": (
        {}, (weight_scale("onnx::Conv_769", 1.5), activation_scale("input.196", 8)),
    ),
    "a weight and the widened range of a Concat's part": (
        {}, (weight_scale("onnx::Conv_895", 1.5), activation_scale("onnx::Concat_595", 8)),
    ),
    "a node's weight and its input": (
        {}, (weight_scale("onnx::Conv_967", 1.5), activation_scale("onnx::Conv_752", 4)),
    ),
    "a node's weight and its output, in one branch": (
        {}, (weight_scale("onnx::Conv_826", 1.5), activation_scale("onnx::Concat_497", 8)),
    ),
    "a widened range that is handed on and a zero point in DQ alone": (
        {}, (activation_scale("old_x.11", 8), read_zero_point("input.280", -1)),
    ),
    "a weight's zero point and a widened range": (
        {"weight_symmetric": False},
        (weight_zero_point("onnx::Conv_769", 20), activation_scale("onnx::Concat_595", 8)),
    ),
    "a weight's zero point and the next weight": (
        {"weight_symmetric": False},
        (weight_zero_point("onnx::Conv_943", -6), weight_scale("onnx::Conv_949", 1.5)),
    ),
}  # fmt: skip

LAYER = "/m/encoder/layer.2"
EMBEDDING: dict[str, Planted] = {
    "a scale too large and a zero point": (
        {},
        (
            activation_scale(f"{LAYER}/attention/self/query/MatMul_output_0", 4),
            activation_zero_point(f"{LAYER}/intermediate/dense/Add_output_0", -33),
        ),
    ),
    "a weight and a widened range": (
        {},
        (
            weight_scale("onnx::MatMul_700", 1.5),
            activation_scale(f"{LAYER}/output/LayerNorm/LayerNormalization_output_0", 8),
        ),
    ),
    "a node's weight and its output, in one branch": (
        {},
        (
            weight_scale("onnx::MatMul_729", 1.5),
            activation_scale(f"{LAYER}/attention/self/value/MatMul_output_0", 8),
        ),
    ),
    "neighbours behind each other": (
        {},
        (
            activation_scale(f"{LAYER}/output/dense/MatMul_output_0", 0.25),
            read_zero_point(f"{LAYER}/output/dense/Add_output_0", -119),
        ),
    ),
    "a weight's zero point and a scale too large": (
        {"weight_symmetric": False},
        (
            weight_zero_point("onnx::MatMul_732", -8),
            activation_scale(f"{LAYER}/attention/self/key/MatMul_output_0", 4),
        ),
    ),
}

DYNAMIC = {
    "a weight's scale and another's zero point": (
        weight_scale("onnx::MatMul_731", 1.5),
        weight_zero_point("m.embeddings.token_type_embeddings.weight", 55),
    ),
    "a weight and the next one": (
        weight_scale("onnx::MatMul_732", 1.5), weight_scale("onnx::MatMul_733", 1.5),
    ),
}  # fmt: skip


# -- judging -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Healthy:
    """A real model, a file made of it on the very samples compared, and what matches."""

    float_model: Model
    path: Path
    feeds: Feeds
    matching: Matching

    def planted(self, faults: Collection[Fault], path: Path) -> Path:
        proto = onnx.load(self.path)
        for fault in faults:
            fault.plant(proto.graph, self.matching)
        return save(proto, path)

    def diagnosed(self, path: Path, *, measured: bool = False) -> list[Finding]:
        quantized = load_model(path)
        comparison = compare_models(
            self.float_model, quantized, self.feeds, measure_latency=False, explain_deployed=False
        )
        case = case_of(comparison, self.float_model, quantized)
        gain_of = surgery_gain(case, self.feeds) if measured else None
        return list(diagnose(case, gain_of=gain_of))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Healthy]:
    """Quantizes a real model on its first samples, or opens a file beside it; each only once."""
    folder = tmp_path_factory.mktemp("healthy")

    @cache
    def made(name: str, file: str = "", samples: int = 4, **recipe: Any) -> Healthy:
        float_model = load_model(MODELS / name / "model.onnx")
        feeds = load_feeds(MODELS / name / "inputs", float_model).subset(range(samples))
        path = MODELS / name / file
        if not file:
            path = folder / f"{name}-{samples}-{len(recipe)}.onnx"
            config = QuantConfig.from_json(recipe)
            quantize_model(float_model, config, calibration=feeds, output=path, cache=folder)
        matching = match_tensors(float_model, load_model(path))
        return Healthy(float_model=float_model, path=path, feeds=feeds, matching=matching)

    return made


def check(found: Sequence[Finding], faults: Sequence[Fault]) -> None:
    """Both are problems and come first, with the right figures; no other tensor is accused."""
    wanted = {(f.code, f.tensor) for f in faults}
    assert {(f.code, f.tensor) for f in found[: len(faults)]} == wanted
    for fault in faults:
        (own,) = [f for f in found if (f.code, f.tensor) == (fault.code, fault.tensor)]
        assert own.severity == PROBLEM
        for key, figure in fault.evidence.items():
            assert own.evidence[key] == pytest.approx(figure, rel=0.03), key
    # What is measured to gain is an error that the file has without the faults, too.
    rest = [f for f in found if f.severity == PROBLEM and (f.code, f.tensor) not in wanted]
    assert all("output_gain_db" in f.evidence for f in rest)


@needs_models
def test_two_faults_in_a_detector_are_named_first(
    healthy: Callable[..., Healthy], tmp_path: Path
) -> None:
    file = healthy("fastestdet", samples=2)
    faults = DETECTOR["a weight and a widened range"][1]
    check(file.diagnosed(file.planted(faults, tmp_path / "planted.onnx")), faults)


@needs_models
@pytest.mark.slow
@pytest.mark.parametrize("together", DETECTOR)
def test_two_faults_in_a_detector_are_named_whatever_they_are(
    healthy: Callable[..., Healthy], together: str, tmp_path: Path
) -> None:
    recipe, faults = DETECTOR[together]
    file = healthy("fastestdet", **recipe)
    measured = together.startswith("a scale")
    found = file.diagnosed(file.planted(faults, tmp_path / "planted.onnx"), measured=measured)
    check(found, faults)
    assert {f.tensor for f in found if f.severity == PROBLEM} == {f.tensor for f in faults}


@needs_models
@pytest.mark.slow
@pytest.mark.parametrize("together", EMBEDDING)
def test_two_faults_in_an_embedding_are_named(
    healthy: Callable[..., Healthy], together: str, tmp_path: Path
) -> None:
    recipe, faults = EMBEDDING[together]
    file = healthy("minilm-l6", **recipe)
    measured = together == "a weight and a widened range"
    check(
        file.diagnosed(file.planted(faults, tmp_path / "planted.onnx"), measured=measured), faults
    )


@needs_models
@pytest.mark.slow
@pytest.mark.parametrize("together", DYNAMIC)
def test_two_faults_in_a_dynamic_file_are_named(
    healthy: Callable[..., Healthy], together: str, tmp_path: Path
) -> None:
    file = healthy("minilm-l6", "ort_dynamic.onnx", samples=3)
    faults = DYNAMIC[together]
    check(file.diagnosed(file.planted(faults, tmp_path / "planted.onnx")), faults)


@needs_models
@pytest.mark.slow
def test_without_faults_neither_file_has_one(healthy: Callable[..., Healthy]) -> None:
    """No rule calls a tensor of them wrong in itself, and few are worth a look."""
    for name, recipe in (("fastestdet", {}), ("fastestdet", {"weight_symmetric": False}),
                         ("minilm-l6", {})):  # fmt: skip
        file = healthy(name, **recipe)
        found = file.diagnosed(file.path)
        assert [f.code for f in found if f.severity == PROBLEM] == []
        codes = {f.code for f in found if f.severity == LOOK}
        assert codes.isdisjoint({"activation-scale", "clipped", "weight-gain", "negatives-leak"})


@needs_models
@pytest.mark.slow
@pytest.mark.parametrize("name", ["fastestdet", "minilm-l6"])
def test_the_command_line_names_both_faults_first(
    healthy: Callable[..., Healthy],
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = healthy(name)
    _, faults = (DETECTOR if name == "fastestdet" else EMBEDDING)["a weight and a widened range"]
    path = file.planted(faults, tmp_path / "planted.onnx")
    report = tmp_path / "d.json"
    source = MODELS / name
    monkeypatch.setenv("QUANT_INSPECTOR_DATA", str(tmp_path / "data"))
    words = ["diagnose", source / "model.onnx", path, "--inputs", source / "inputs"]
    if name == "minilm-l6":
        words.append("--no-preview")  # which re-quantizes with several recipes
    assert main([str(w) for w in (*words, "--samples", "4", "--json", report)]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = [line for line in lines if line.startswith("●")][:2]
    assert {line.split(":")[0] for line in first} == {f"● {f.code}" for f in faults}
    assert all(any(f.tensor in line for line in first) for f in faults)
    found = json.loads(report.read_text())["findings"][:2]
    assert {(f["code"], f["tensor"]) for f in found} == {(f.code, f.tensor) for f in faults}
