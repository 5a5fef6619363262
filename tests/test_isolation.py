"""Isolated and added errors against plain sessions on parts of the two models.

The oracle cuts a model at the compared tensors with onnx's own extractor, runs each part alone with
ONNX Runtime (optimisations off) on the other model's tensors, and takes the error in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from inspector.compare import compare_models
from inspector.comparison import ActivationError, Comparison
from inspector.feeds import load_feeds
from inspector.model_files import load_model
from inspector.render import comparison_json, read_comparison
from tests.known_pairs import db
from tests.samples import MODELS, array, floats, model, needs_models, save

Arrays = dict[str, np.ndarray]


def session(proto: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def all_tensors(proto: onnx.ModelProto, feed: Arrays) -> Arrays:
    """Every tensor of the main graph, by a plain session."""
    known = onnx.ModelProto()
    known.CopyFrom(proto)
    have = {o.name for o in known.graph.output}
    for node in proto.graph.node:
        known.graph.output.extend(
            onnx.ValueInfoProto(name=o) for o in node.output if o and o not in have
        )
    ran = session(known)
    names = [o.name for o in ran.get_outputs()]
    return feed | dict(zip(names, ran.run(names, feed), strict=True))


class Parts:
    """A model cut at some tensors.

    Args:
        proto: the model.
        cuts: the tensors at which the way back to the inputs ends.
    """

    def __init__(self, proto: onnx.ModelProto, cuts: set[str]) -> None:
        self.proto, self.cuts = proto, cuts
        self.producers = {o: n for n in proto.graph.node for o in n.output if o}
        self.constants = {i.name for i in proto.graph.initializer}
        self.inputs = {i.name for i in proto.graph.input} - self.constants

    def run(self, target: str, given: Mapping[str, np.ndarray]) -> np.ndarray:
        """A tensor computed from the nearest cut tensors."""
        nodes, front, needed = set(), [target], set()
        while front:
            name = front.pop()
            if name in self.constants or not name:
                continue
            if name in self.inputs or (name in self.cuts and name != target):
                needed.add(name)
                continue
            node = self.producers[name]
            if id(node) not in nodes:
                nodes.add(id(node))
                front += node.input
        graph = onnx.GraphProto(name="part")
        graph.node.extend(n for n in self.proto.graph.node if id(n) in nodes)
        read = {i for n in graph.node for i in n.input}
        graph.initializer.extend(i for i in self.proto.graph.initializer if i.name in read)
        for name in sorted(needed):
            kind = helper.np_dtype_to_tensor_dtype(given[name].dtype)
            graph.input.append(helper.make_tensor_value_info(name, kind, None))
        graph.output.append(onnx.ValueInfoProto(name=target))
        part = onnx.ModelProto(
            graph=graph, opset_import=self.proto.opset_import, ir_version=self.proto.ir_version
        )
        found: np.ndarray = session(part).run([target], {n: given[n] for n in needed})[0]
        return found


def moved(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The array with its axes in the order that gives this shape."""
    if value.shape == shape:
        return value
    orders = itertools.permutations(range(value.ndim))
    return value.transpose(next(o for o in orders if tuple(value.shape[a] for a in o) == shape))


class Oracle:
    """A pair of files in which every Q that is compared stands for a float tensor of its name.

    Args:
        float_proto, quantized_proto: the files.
        result: their comparison, of which only the names are taken.
        feeds: the same.
    """

    def __init__(
        self,
        float_proto: onnx.ModelProto,
        quantized_proto: onnx.ModelProto,
        result: Comparison,
        feeds: list[Arrays],
    ) -> None:
        self.result = result
        quantizers = {n.output[0]: n.input[0] for n in quantized_proto.graph.node
                      if n.op_type == "QuantizeLinear"}  # fmt: skip
        dequantizers = {n.output[0]: n.input[0] for n in quantized_proto.graph.node
                        if n.op_type == "DequantizeLinear"}  # fmt: skip
        self.before = {}
        for a in result.activations:
            codes = dequantizers.get(a.quantized_name, "")
            self.before[a.name] = quantizers.get(codes, a.quantized_name)
        # What a Relu or Clip computes in the one file and something else in the other.
        rectifiers = ("Relu", "Clip")
        ops = [
            {o: n.op_type for n in proto.graph.node for o in n.output}
            for proto in (float_proto, quantized_proto)
        ]
        self.rectified = {
            n for n, b in self.before.items()
            if ops[0].get(n) in rectifiers and ops[1].get(b) not in rectifiers
        }  # fmt: skip
        self.floats = Parts(float_proto, set(self.before))
        self.quantized = Parts(quantized_proto, set(self.before.values()))
        self.values = [
            (all_tensors(float_proto, feed), all_tensors(quantized_proto, feed)) for feed in feeds
        ]

    def isolated(self, record: ActivationError) -> float:
        target, pairs = self.before[record.name], []
        for ours, theirs in self.values:
            given = theirs | {
                b: np.ascontiguousarray(moved(ours[n], theirs[b].shape))
                for n, b in self.before.items()
            }
            made = moved(self.quantized.run(target, given), ours[record.name].shape)
            if record.name in self.rectified:
                made = np.maximum(made, 0)
            pairs.append((ours[record.name], made))
        return db(*zip(*pairs, strict=True))

    def added(self, record: ActivationError) -> float:
        signal = noise = 0.0
        read = {a.name: a.quantized_name for a in self.result.activations}
        for ours, theirs in self.values:
            given = ours | {
                n: np.ascontiguousarray(moved(theirs[after], ours[n].shape))
                for n, after in read.items()
            }
            made = self.floats.run(record.name, given).astype(np.float64)
            noise += float(((made - moved(theirs[record.quantized_name], made.shape)) ** 2).sum())
            signal += float((ours[record.name].astype(np.float64) ** 2).sum())
        if not math.isfinite(noise):
            return math.nan
        return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def near(ours: float | None, truth: float) -> None:
    assert ours is not None
    if math.isfinite(truth) and truth < 90:
        assert ours == pytest.approx(truth, abs=2e-4)
    else:  # the last bit of float32 decides
        assert ours > 90 or math.isnan(ours) == math.isnan(truth)


# -- a small model -----------------------------------------------------------------------------


def q_dq(name: str, scale: float, zero_point: int = 128) -> list[onnx.NodeProto]:
    scale_name, zero_name = f"{name}_s", f"{name}_z"
    values = array(scale_name, np.float32(scale)), array(zero_name, np.uint8(zero_point))
    return [
        *(helper.make_node("Constant", [], [v.name], v.name, value=v) for v in values),
        helper.make_node("QuantizeLinear", [name, scale_name, zero_name], [f"{name}_q"]),
        helper.make_node("DequantizeLinear", [f"{name}_q", scale_name, zero_name], [f"{name}_d"]),
    ]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Oracle]:
    """Conv with a folded Relu, a float island of two nodes, and a branch that reads both."""
    folder = tmp_path_factory.mktemp("small")
    weight, matrix = floats((6, 3, 3, 3), 1, 0.3), floats((6, 6), 2, 0.4)
    step = np.float32(np.abs(weight).max() / 127)
    codes = np.clip(np.rint(weight / step), -127, 127).astype(np.int8)
    node = helper.make_node
    shapes = [("x", [1, 3, 9, 9])], [("y", None)]
    float_proto = model(
        [
            node("Conv", ["x", "w"], ["c"], "conv"), node("Relu", ["c"], ["r"], "relu"),
            node("Tanh", ["r"], ["t"], "tanh"), node("Neg", ["t"], ["n"], "neg"),
            node("Add", ["n", "r"], ["a"], "add"),
            node("Transpose", ["a"], ["p"], "turn", perm=[0, 2, 3, 1]),
            node("MatMul", ["p", "m"], ["y"], "matmul"),
        ],
        *shapes, [array("w", weight), array("m", matrix)],
    )  # fmt: skip
    quantized_proto = model(
        [
            *q_dq("x", 0.025), node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"]),
            node("Conv", ["x_d", "wd"], ["c"], "conv"), *q_dq("c", 0.04, 0),
            node("Tanh", ["c_d"], ["t"], "tanh"), node("Neg", ["t"], ["n"], "neg"),
            node("Add", ["n", "c_d"], ["a"], "add"), *q_dq("a", 0.03),
            node("Transpose", ["a_d"], ["p"], "turn", perm=[0, 2, 3, 1]),
            node("MatMul", ["p", "m"], ["y"], "matmul"),
        ],
        *shapes,
        [array("wq", codes), array("ws", step), array("wz", np.int8(0)), array("m", matrix)],
    )  # fmt: skip
    (folder / "in").mkdir()
    feeds = [{"x": floats((1, 3, 9, 9), seed)} for seed in (5, 6, 7)]
    for at, feed in enumerate(feeds):
        np.savez(folder / "in" / f"{at}.npz", **feed)
    float_model = load_model(save(float_proto, folder / "f.onnx"))
    quantized = load_model(save(quantized_proto, folder / "q.onnx"))
    result = compare_models(
        float_model, quantized, load_feeds(folder / "in", float_model), isolated=True,
        measure_latency=False, explain_deployed=False,
    )  # fmt: skip
    return result, Oracle(float_proto, quantized_proto, result, feeds)


def record(result: Comparison, name: str) -> ActivationError:
    return next(a for a in result.activations if a.name == name)


def test_every_figure_of_a_small_model_is_that_of_its_parts_alone(
    small: tuple[Comparison, Oracle],
) -> None:
    result, oracle = small
    computed = [a for a in result.activations if a.node]
    assert {a.name for a in computed} >= {"r", "t", "n", "a", "y"}
    for own in computed:
        near(own.isolated_sqnr_db, oracle.isolated(own))
        near(own.added_sqnr_db, oracle.added(own))


def test_a_folded_relu_is_applied_before_the_isolated_error_is_taken(
    small: tuple[Comparison, Oracle],
) -> None:
    result, oracle = small
    own = record(result, "r")
    assert "r" in oracle.rectified
    # Not rectified it would be below 3 dB.
    assert own.isolated_sqnr_db is not None
    assert own.isolated_sqnr_db > 25


def test_float_islands_read_the_float_models_tensors_too(
    small: tuple[Comparison, Oracle],
) -> None:
    result, _ = small
    # Neg computes exactly; only what it reads is wrong.
    for name in ("n",):
        own = record(result, name)
        assert own.isolated_sqnr_db == math.inf
        assert own.added_sqnr_db == math.inf
        assert own.accumulated_sqnr_db < 60


def test_the_added_error_is_that_of_the_reference_evaluator_in_float64(
    small: tuple[Comparison, Oracle],
) -> None:
    result, oracle = small
    signal = noise = 0.0
    for ours, theirs in oracle.values:
        nodes = [n for n in oracle.floats.proto.graph.node if n.op_type == "Conv"]
        wide = helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info(n, TensorProto.DOUBLE, None) for n in "xw"],
            [helper.make_tensor_value_info("c", TensorProto.DOUBLE, None)],
        )  # fmt: skip
        proto = helper.make_model(wide, opset_imports=oracle.floats.proto.opset_import)
        weight = next(i for i in oracle.floats.proto.graph.initializer if i.name == "w")
        given = {
            "x": theirs["x_d"].astype(np.float64),
            "w": onnx.numpy_helper.to_array(weight).astype(np.float64),
        }
        made = np.maximum(ReferenceEvaluator(proto).run(None, given)[0], 0)
        noise += ((made - theirs["c_d"]) ** 2).sum()
        signal += (ours["r"].astype(np.float64) ** 2).sum()
    truth = 10 * math.log10(signal / noise)
    assert record(result, "r").added_sqnr_db == pytest.approx(truth, abs=1e-4)


def test_inputs_and_comparisons_without_the_pass_have_no_such_figures(
    small: tuple[Comparison, Oracle], tmp_path: Path
) -> None:
    result, oracle = small
    own = record(result, "x")
    assert own.isolated_sqnr_db is None
    assert own.added_sqnr_db is None
    float_model = load_model(save(oracle.floats.proto, tmp_path / "f.onnx"))
    quantized = load_model(save(oracle.quantized.proto, tmp_path / "q.onnx"))
    np.savez(tmp_path / "0.npz", x=floats((1, 3, 9, 9)))
    plain = compare_models(
        float_model, quantized, load_feeds(tmp_path / "0.npz", float_model),
        measure_latency=False, explain_deployed=False,
    )  # fmt: skip
    assert all(a.isolated_sqnr_db is None is a.added_sqnr_db for a in plain.activations)


def test_files_with_and_without_the_figures_are_read_back(
    small: tuple[Comparison, Oracle],
) -> None:
    result, _ = small
    written = comparison_json(result, detail=True)
    assert read_comparison(written) == result
    for own in written["activations"]:
        del own["isolated_sqnr_db"], own["added_sqnr_db"]
    old = read_comparison(written)
    assert all(a.isolated_sqnr_db is None for a in old.activations)


# -- real models -------------------------------------------------------------------------------


def compared(network: str, file: str, limit: int) -> tuple[Comparison, Oracle]:
    folder = MODELS / network
    paths = folder / "model.onnx", folder / file
    float_model, quantized = (load_model(p) for p in paths)
    result = compare_models(
        float_model, quantized, load_feeds(folder / "inputs", float_model, limit=limit),
        isolated=True, measure_latency=False, explain_deployed=False,
    )  # fmt: skip
    feeds = [dict(np.load(p)) for p in sorted((folder / "inputs").glob("*.npz"))[:limit]]
    return result, Oracle(onnx.load(paths[0]), onnx.load(paths[1]), result, feeds)


@needs_models
@pytest.mark.parametrize(("network", "every"), [("fastestdet", 9), ("magika", 7)])
def test_figures_of_real_networks_are_those_of_their_parts_alone(network: str, every: int) -> None:
    result, oracle = compared(network, "ort_static_qdq.onnx", 1)
    computed = [a for a in result.activations if a.node and a.isolated_sqnr_db is not None]
    assert len(computed) > 70
    for own in computed[::every]:
        near(own.isolated_sqnr_db, oracle.isolated(own))
        assert own.added_sqnr_db is not None
        near(own.added_sqnr_db, oracle.added(own))


@needs_models
@pytest.mark.slow
@pytest.mark.parametrize("network", ["fastestdet", "magika", "ultraface-rfb320"])
def test_all_figures_of_real_networks_are_those_of_their_parts_alone(network: str) -> None:
    result, oracle = compared(network, "ort_static_qdq.onnx", 2)
    for own in result.activations:
        if own.isolated_sqnr_db is not None:
            near(own.isolated_sqnr_db, oracle.isolated(own))
        if own.added_sqnr_db is not None:
            near(own.added_sqnr_db, oracle.added(own))


@needs_models
@pytest.mark.slow
def test_the_isolated_error_of_magika_points_at_the_modules_of_the_shortest_known_list() -> None:
    folder = MODELS / "magika"
    float_model = load_model(folder / "model.onnx")
    quantized = load_model(folder / "ort_static_qdq.onnx")
    result = compare_models(
        float_model, quantized, load_feeds(folder / "inputs", float_model), isolated=True,
        measure_latency=False, explain_deployed=False,
    )  # fmt: skip

    def rank(own: ActivationError) -> float:
        return math.inf if own.isolated_sqnr_db is None else own.isolated_sqnr_db

    worst = [a.node.partition("MagikaV2/")[2] for a in sorted(result.activations, key=rank)]
    assert set(worst[:3]) == {f"ApplyActivation_1/{n}" for n in ("Tanh", "Mul_3", "AddV2")}
    # Sqrt gives zeros that 1/x makes infinite: only what 1/x adds tells, since it is exact itself.
    overflowing = [a for a in result.activations if math.isnan(a.added_sqnr_db or 0.0)]
    assert overflowing[0].node.partition("MagikaV2/")[2] == "LayerNorm_0/Rsqrt__112"


@needs_models
@pytest.mark.parametrize(
    ("network", "file"),
    [
        ("squeezenet-fp16", "fp16.onnx"), ("mlperf-kws-dscnn", "quantized.onnx"),
        ("silero-vad-16k", "ort_static_qdq.onnx"), ("mlperf-resnet8", "quantized.onnx"),
    ],
)  # fmt: skip
def test_other_formats_layouts_and_bodies_have_figures_too(network: str, file: str) -> None:
    folder = MODELS / network
    float_model, quantized = load_model(folder / "model.onnx"), load_model(folder / file)
    result = compare_models(
        float_model, quantized, load_feeds(folder / "inputs", float_model, limit=2), isolated=True,
        measure_latency=False, explain_deployed=False,
    )  # fmt: skip
    computed = [a for a in result.activations if a.node]
    known: list[Any] = [a for a in computed if a.isolated_sqnr_db is not None]
    assert len(known) >= len(computed) - 2
    # Errors that are handed on make it worse nearly everywhere.
    better = [a for a in known if not a.isolated_sqnr_db < a.accumulated_sqnr_db - 3]
    assert len(better) > 0.8 * len(known)
