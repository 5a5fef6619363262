"""What other people's tools made of real networks: their files against our figures.

The truth is plain ONNX Runtime with optimisations off, float64 numpy, and what onnx itself reads in
the files; each pair is compared once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from inspector.compare import compare_models
from inspector.comparison import Comparison
from inspector.feeds import load_feeds
from inspector.model_files import load_model
from tests.known_pairs import Arrays, constants, db
from tests.samples import MODELS, needs_models

pytestmark = needs_models

TOLERANCE_DB = 1e-6


@dataclass(frozen=True, kw_only=True)
class Twin:
    """model.onnx of a network and another file of it."""

    network: str
    file: str

    @cached_property
    def protos(self) -> tuple[onnx.ModelProto, onnx.ModelProto]:
        folder = MODELS / self.network
        return onnx.load(folder / "model.onnx"), onnx.load(folder / self.file)

    @cached_property
    def feeds(self) -> list[Arrays]:
        return [dict(np.load(p)) for p in sorted((MODELS / self.network / "inputs").glob("*.npz"))]

    @cached_property
    def result(self) -> Comparison:
        folder = MODELS / self.network
        float_model = load_model(folder / "model.onnx")
        return compare_models(
            float_model,
            load_model(folder / self.file),
            load_feeds(folder / "inputs", float_model),
            measure_latency=False,
            explain_deployed=False,
        )

    def outputs(
        self, side: int, feeds: Sequence[Arrays], *, optimized: bool = False
    ) -> list[list[np.ndarray]]:
        """For every feed the outputs of a file, whose inputs are taken in order."""
        options = ort.SessionOptions()
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
        )
        session = ort.InferenceSession(
            self.protos[side].SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        stored = {i.name for i in self.protos[0].graph.initializer}
        names = [i.name for i in self.protos[0].graph.input if i.name not in stored]
        found = []
        for feed in feeds:
            values = [feed[name] for name in names]
            named = {
                i.name: v.astype(np.float16) if i.type == "tensor(float16)" else v
                for i, v in zip(session.get_inputs(), values, strict=True)
            }
            found.append(session.run(None, named))
        return found

    def true_sqnr_db(self) -> list[float]:
        """SQNR of every output over all feeds."""
        sides = [list(zip(*self.outputs(side, self.feeds), strict=True)) for side in (0, 1)]
        assert all(any(v.any() for v in reference) for reference in sides[0])
        return [db(reference, actual) for reference, actual in zip(*sides, strict=True)]

    def weights_of(self, op_type: str) -> set[str]:
        """Constants of the float file that nodes of a type read at their second input."""
        proto = self.protos[0]
        read = {n.input[1] for n in proto.graph.node if n.op_type == op_type}
        return read & set(constants(proto))


@pytest.fixture(scope="module")
def twin() -> Callable[[str, str], Twin]:
    return cache(lambda network, file: Twin(network=network, file=file))


FIGURES = [
    ("mlperf-resnet8", "quantized.onnx", [24.32]),
    ("mlperf-kws-dscnn", "quantized.onnx", [20.12]),
    ("minilm-l6", "ort_dynamic.onnx", [11.37]),
    ("gtcrn", "gtcrn.onnx", [math.inf] * 4),
    ("squeezenet-fp16", "fp16.onnx", [76.29]),
]
LONG = ("minilm-l6", "squeezenet-fp16")
TFLITE = ["mlperf-resnet8", "mlperf-kws-dscnn"]


@pytest.mark.parametrize(
    ("network", "file", "figures"),
    [pytest.param(*f, id=f[0], marks=pytest.mark.slow if f[0] in LONG else ()) for f in FIGURES],
)
def test_outputs_have_the_error_that_plain_sessions_give(
    twin: Callable[[str, str], Twin], network: str, file: str, figures: list[float]
) -> None:
    pair = twin(network, file)
    ours = [o.sqnr_db for o in pair.result.outputs]
    assert pair.result.samples == len(pair.feeds)
    assert ours == pytest.approx(figures, abs=0.02)
    assert ours == pytest.approx(pair.true_sqnr_db(), abs=TOLERANCE_DB)


@pytest.mark.parametrize("network", TFLITE)
def test_every_float_weight_that_a_node_reads_is_matched(
    twin: Callable[[str, str], Twin], network: str
) -> None:
    pair = twin(network, "quantized.onnx")
    graph = pair.protos[0].graph
    read = {name for node in graph.node for name in node.input}
    stored = {i.name for i in graph.initializer if i.data_type == TensorProto.FLOAT}
    # A weight that this file itself stores in 8 bits is compared as it leaves its DequantizeLinear.
    dequantized = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    scales = {n.input[1] for n in graph.node if n.op_type == "DequantizeLinear"}
    assert len(stored & read) >= 20
    weights = {w.name for w in pair.result.weights}
    assert weights == (stored & read) - scales | dequantized
    left = [u for u in pair.result.unmatched if u.model == "float" and u.kind != "activation"]
    assert {u.name for u in left if u.fused_into} == scales
    assert {u.name for u in left if not u.fused_into} == stored - read
    assert stored - read == {"six_f", "zero_f"}
    assert {u.reason for u in left if not u.fused_into} == {"nothing reads it"}


@pytest.mark.parametrize("network", TFLITE)
def test_every_weight_has_the_error_of_the_integers_in_the_file(
    twin: Callable[[str, str], Twin], network: str
) -> None:
    pair = twin(network, "quantized.onnx")
    reference, actual = (dequantized(p) for p in pair.protos)
    reference = constants(pair.protos[0]) | reference
    for weight in pair.result.weights:
        truth = db([reference[weight.name]], [actual[f"{weight.name}_quantized"]])
        assert weight.sqnr_db == pytest.approx(truth, abs=TOLERANCE_DB)
        assert weight.sqnr_db > 25


def dequantized(proto: onnx.ModelProto) -> Arrays:
    """(q - zero_point) * scale of every stored DequantizeLinear, by the names of both its ends."""
    values = constants(proto)
    found = {}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in values:
            codes, scale, *zero = (values[i].astype(np.float64) for i in node.input)
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            # Parameters per channel, with as many axes as the codes have from theirs on.
            behind = (1,) * (codes.ndim - 1 - axis)
            parameters = [p.reshape(p.shape + behind) if p.size > 1 else p for p in (scale, *zero)]
            found[node.input[0]] = (codes - sum(parameters[1:])) * parameters[0]
            found[node.output[0]] = found[node.input[0]]
    return found


@pytest.mark.parametrize("network", TFLITE)
def test_inputs_and_outputs_with_other_names_are_said_to_be_mapped_by_position(
    twin: Callable[[str, str], Twin], network: str
) -> None:
    pair = twin(network, "quantized.onnx")
    first, second = (p.graph for p in pair.protos)
    expected = {
        f"{kind} {ours.name} is called {theirs.name} in the quantized model (by position)"
        for kind, sides in (
            ("input", (first.input, second.input)), ("output", (first.output, second.output))
        )
        for ours, theirs in zip(*sides, strict=True)
        if ours.name != theirs.name
    }  # fmt: skip
    assert expected
    assert {w for w in pair.result.warnings if "by position" in w} == expected


@pytest.mark.slow
def test_every_matmul_weight_of_a_dynamically_quantized_network_is_matched(
    twin: Callable[[str, str], Twin],
) -> None:
    pair = twin("minilm-l6", "ort_dynamic.onnx")
    expected = pair.weights_of("MatMul")
    assert len(expected) == 36
    found = {w.name: w for w in pair.result.weights}
    assert expected <= set(found)
    assert {found[n].dtype for n in expected} == {"int8"}
    assert not expected & {u.name for u in pair.result.unmatched}


def test_what_shares_a_batch_changes_a_dynamically_quantized_output(
    twin: Callable[[str, str], Twin],
) -> None:
    """Ranges are found over the batch, so that a sentence depends on its company, as deployed."""
    pair = twin("minilm-l6", "ort_dynamic.onnx")
    longest = max(f["input_ids"].shape[1] for f in pair.feeds)
    batch = {
        name: np.concatenate(
            [np.pad(f[name], ((0, 0), (0, longest - f[name].shape[1]))) for f in pair.feeds]
        )
        for name in pair.feeds[0]
    }
    truth = []
    for side in (0, 1):
        sentences = pair.outputs(side, pair.feeds, optimized=True)
        alone = np.concatenate([o[0] for o in sentences])
        ((together,),) = pair.outputs(side, [batch], optimized=True)
        truth.append(float(np.abs(alone.astype(np.float64) - together).max()))
    effect = pair.result.batch
    assert effect is not None
    assert (effect.samples, effect.padded) == (len(pair.feeds), True)
    (output,) = effect.outputs
    assert output.quantized_max_abs_difference == pytest.approx(0.031, abs=0.002)
    assert output.quantized_max_abs_difference == pytest.approx(truth[1], abs=1e-6)
    assert output.float_max_abs_difference < 1e-6
    assert truth[0] < 1e-6


def test_every_conv_weight_of_a_network_with_batch_normalizations_is_matched(
    twin: Callable[[str, str], Twin],
) -> None:
    pair = twin("ultraface-rfb320", "ort_static_qdq.onnx")
    expected = pair.weights_of("Conv")
    assert len(expected) == 52
    found = {w.name: w for w in pair.result.weights}
    assert expected <= set(found)
    assert {found[n].dtype for n in expected} == {"int8"}
    actual = dequantized(pair.protos[1])
    reference = constants(pair.protos[0])
    for name in expected:
        truth = db([reference[name]], [actual[f"{name}_quantized"]])
        assert found[name].sqnr_db == pytest.approx(truth, abs=TOLERANCE_DB)
