"""The oracle of matching without names: rename everything at random, match, map the names back."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from functools import lru_cache

import onnx
import pytest

from inspector.compare import compare_models
from inspector.comparison import Comparison
from inspector.feeds import load_feeds
from inspector.matching import Matching, match_tensors
from inspector.model import Model
from inspector.model_files import load_model
from tests.samples import MODELS, ROOT, needs_models


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for body in attribute.graphs:
                yield from _graphs(body)


def renamed(
    model: Model, seed: int = 0, prefix: str = ""
) -> tuple[Model, dict[str, str], dict[str, str]]:
    """The model with other names for everything, and the old name by new tensor and node name."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graphs = list(_graphs(proto.graph))
    tensors: dict[str, None] = {}
    nodes: dict[str, None] = {}
    for graph in graphs:
        for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
            tensors[value.name] = None
        for node in graph.node:
            tensors |= dict.fromkeys((*node.input, *node.output))
            nodes[node.name] = None
    tensors.pop("", None)
    rng = random.Random(seed)

    def fresh(names: dict[str, None], letter: str) -> dict[str, str]:
        numbers = list(range(len(names)))
        rng.shuffle(numbers)
        return {name: f"{letter}{n}" for name, n in zip(names, numbers, strict=True)}

    new_tensor, new_node = fresh(tensors, f"{prefix}t"), fresh(nodes, f"{prefix}n")
    for graph in graphs:
        for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
            value.name = new_tensor[value.name]
        for node in graph.node:
            node.name = new_node[node.name]
            for names in (node.input, node.output):
                names[:] = [new_tensor.get(n, n) for n in names]
        del graph.quantization_annotation[:]
    return (
        Model(proto),
        {new: old for old, new in new_tensor.items()},
        {new: old for old, new in new_node.items()},
    )


Pair = tuple[str, str]
ALL = [
    ("fastestdet", "ort_static_qdq"),
    ("gtcrn", "gtcrn"),
    ("gtcrn", "ort_static_qdq"),
    ("magika", "ort_static_qdq"),
    ("minilm-l6", "ort_dynamic"),
    ("minilm-l6", "ort_static_qdq"),
    ("mlperf-kws-dscnn", "ort_static_qdq"),
    ("mlperf-kws-dscnn", "quantized"),
    ("mlperf-resnet8", "ort_static_qdq"),
    ("mlperf-resnet8", "quantized"),
    ("silero-vad-16k", "ort_static_qdq"),
    ("squeezenet-fp16", "fp16"),
    ("squeezenet-fp16", "ort_static_qdq"),
    ("ultraface-rfb320", "ort_static_qdq"),
]


@lru_cache(maxsize=2)
def loaded(folder: str, twin: str) -> tuple[Model, Model]:
    return (
        load_model(MODELS / folder / "model.onnx"),
        load_model(MODELS / folder / f"{twin}.onnx"),
    )


def told(
    matching: Matching,
    float_names: Mapping[str, str] | None = None,
    quantized_names: Mapping[str, str] | None = None,
    float_nodes: Mapping[str, str] | None = None,
    quantized_nodes: Mapping[str, str] | None = None,
) -> dict[str, object]:
    """What a matching says but for how it knows, in the files' own names."""

    def f(name: str | None) -> str | None:
        return name if name is None or float_names is None else float_names[name]

    def q(name: str | None) -> str | None:
        return name if name is None or quantized_names is None else quantized_names[name]

    def path(scope: str) -> str:
        if quantized_nodes is None:
            return scope
        return "/".join(quantized_nodes.get(part, part) for part in scope.split("/"))

    def node(name: str) -> str:
        return name if float_nodes is None else float_nodes[name]

    return {
        "activations": {
            f(p.name): (q(p.before), q(p.after), p.integers, [node(r.name) for r in p.rectifiers],
                        p.permutation)
            for p in matching.activations
        },
        "weights": {
            (f(w.name), path(w.scope)): (q(w.quantized_name), w.kind, w.channel_axis,
                                         node(w.node.name))
            for w in matching.weights
        },
        "fused": {
            f(u.name): f(u.fused_into)
            for u in matching.unmatched
            if u.model == "float" and u.fused_into
        },
        "unmatched": {
            f(u.name) for u in matching.unmatched if u.model == "float" and not u.fused_into
        },
        "inputs": {f(a): q(b) for a, b in matching.inputs.items()},
        "outputs": {f(a): q(b) for a, b in matching.outputs.items()},
    }  # fmt: skip


def assert_same(found: dict[str, object], expected: dict[str, object]) -> None:
    for part, value in expected.items():
        other = found[part]
        if isinstance(value, dict) and isinstance(other, dict):
            apart = {
                k: (value.get(k), other.get(k))
                for k in value.keys() | other.keys()
                if value.get(k) != other.get(k)
            }
            assert not apart, (part, len(apart), dict(list(apart.items())[:5]))
        assert other == value, part


@needs_models
@pytest.mark.parametrize(("folder", "twin"), ALL, ids=["-".join(p) for p in ALL])
@pytest.mark.parametrize("side", ["quantized", "float", "both"])
def test_without_names_the_same_tensors_are_paired_and_folded(
    folder: str, twin: str, side: str
) -> None:
    float_model, quantized = loaded(folder, twin)
    expected = told(match_tensors(float_model, quantized))
    names: list[Mapping[str, str] | None] = [None] * 4
    if side in ("float", "both"):
        float_model, names[0], names[2] = renamed(float_model, seed=1, prefix="f")
    if side in ("quantized", "both"):
        quantized, names[1], names[3] = renamed(quantized, seed=2, prefix="q")
    matching = match_tensors(float_model, quantized)
    assert_same(told(matching, *names), expected)
    assert all(p.matched_by != "name" for p in matching.activations)
    assert any("by position" in note for note in matching.notes)


def figures(
    result: Comparison, names: Mapping[str, str] | None = None
) -> dict[tuple[str, ...], tuple[float, ...]]:
    """Every figure of a comparison by what it is about; `names` maps back the quantized model's."""
    found: dict[tuple[str, ...], tuple[float, ...]] = {}
    for a in result.activations:
        local = math.nan if a.local_sqnr_db is None else a.local_sqnr_db
        key = ("activation", a.name)
        found[key] = (a.accumulated_sqnr_db, local, a.mse, *a.channel_sqnr_db)
    for w in result.weights:
        stored = w.quantized_name if names is None else names[w.quantized_name]
        found["weight", w.name, stored] = (w.sqnr_db, w.mse, *w.channel_sqnr_db)
    for o in result.outputs:
        found["output", o.name] = (o.sqnr_db, *o.per_sample_sqnr_db, o.max_abs_error)
    return found


def numbers_without_names(folder: str, twin: str, samples: int) -> None:
    float_model, quantized = loaded(folder, twin)
    feeds = load_feeds(MODELS / folder / "inputs", float_model).subset([*range(samples)])
    other, names, _ = renamed(quantized, seed=5, prefix="q")
    expected = figures(compare_models(float_model, quantized, feeds, measure_latency=False))
    found = figures(compare_models(float_model, other, feeds, measure_latency=False), names)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=1e-9, rel=1e-9, nan_ok=True), name


@needs_models
@pytest.mark.parametrize(
    "folder", ["mlperf-resnet8", "magika", "silero-vad-16k", "ultraface-rfb320"]
)
def test_without_names_every_figure_is_the_same(folder: str) -> None:
    numbers_without_names(folder, "ort_static_qdq", 2)


@needs_models
@pytest.mark.slow
@pytest.mark.parametrize(("folder", "twin"), ALL, ids=["-".join(p) for p in ALL])
def test_without_names_every_figure_of_every_pair_is_the_same(folder: str, twin: str) -> None:
    numbers_without_names(folder, twin, 4)


@needs_models
@pytest.mark.parametrize(("folder", "twin"), ALL, ids=["-".join(p) for p in ALL])
def test_names_that_belong_to_other_tensors_change_nothing(folder: str, twin: str) -> None:
    float_model, quantized = loaded(folder, twin)
    expected = told(match_tensors(float_model, quantized))
    # Both are numbered anew, each in an order of its own: nearly every name is there, and lies.
    one, *mine = renamed(float_model, seed=7)
    other, *its = renamed(quantized, seed=8)
    matching = match_tensors(one, other)
    assert_same(told(matching, mine[0], its[0], mine[1], its[1]), expected)
    assert any("names were not used" in note for note in matching.notes)


# -- attention: three products of one operand, each between Reshapes of its own -------------------

ATTENTION = ROOT / "sample_models" / "digit-transformer"


def products(matching: Matching) -> dict[str, str]:
    """The quantized weight of each product of the float model."""
    return {w.name: w.quantized_name for w in matching.weights if w.node.op_type == "MatMul"}


def test_query_and_key_are_not_taken_for_each_other() -> None:
    float_model = load_model(ATTENTION / "float.onnx")
    quantized = load_model(ATTENTION / "quantized.onnx")
    found = products(match_tensors(float_model, quantized))
    assert len(found) >= 19
    assert found == {name: f"{name}_quantized" for name in found}


@pytest.mark.parametrize("side", ["float", "quantized"])
def test_without_names_query_and_key_are_told_apart_by_their_weights(side: str) -> None:
    float_model = load_model(ATTENTION / "float.onnx")
    quantized = load_model(ATTENTION / "quantized.onnx")
    expected = products(match_tensors(float_model, quantized))
    if side == "float":
        float_model, tensors, _ = renamed(float_model, seed=1, prefix="f")
        found = {tensors[k]: v for k, v in products(match_tensors(float_model, quantized)).items()}
    else:
        quantized, tensors, _ = renamed(quantized, seed=2, prefix="q")
        found = {k: tensors[v] for k, v in products(match_tensors(float_model, quantized)).items()}
    assert found == expected
