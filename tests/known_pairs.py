"""Pairs of models for the tests, made by ONNX Runtime's own tools, with the truth in float64.

The truth comes from the integers, scales and zero points in the files and from tensors of plain
ONNX Runtime sessions; nothing of it from the code under test. `check_...` compare to 1e-6 dB.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, qdq_loss_debug, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from inspector.compare import compare_models
from inspector.comparison import ActivationError, Comparison, OutputError, WeightError
from inspector.feeds import load_feeds
from inspector.model_files import load_model
from tests.samples import floats, npz_folder, save

Arrays = dict[str, np.ndarray]
IMAGES = [{"x": floats((1, 3, 8, 8), s)} for s in range(3)]
TOLERANCE_DB = 1e-6


class Reader(CalibrationDataReader):
    def __init__(self, feeds: Sequence[Arrays]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> Arrays | None:
        return next(self.feeds, None)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """f.onnx and q.onnx in a folder, with feeds."""

    folder: Path
    feeds: Sequence[Arrays]

    def compared(self, **options: Any) -> Comparison:
        float_model = load_model(self.folder / "f.onnx")
        feeds = load_feeds(npz_folder(self.folder / "feeds", self.feeds), float_model)
        options = {"measure_latency": False, "explain_deployed": False} | options
        return compare_models(float_model, load_model(self.folder / "q.onnx"), feeds, **options)

    def tensor(self, file: str, name: str, *, optimized: bool = False) -> list[np.ndarray]:
        """A tensor of "f" or "q" for every feed, from a plain session, in float64."""
        if name in self.feeds[0]:
            return [feed[name].astype(np.float64) for feed in self.feeds]
        proto = onnx.load(self.folder / f"{file}.onnx")
        if name not in {o.name for o in proto.graph.output}:
            proto.graph.output.add(name=name)
        options = ort.SessionOptions()
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
        )
        session = ort.InferenceSession(proto.SerializeToString(), options)
        return [session.run([name], feed)[0].astype(np.float64) for feed in self.feeds]

    def integers(self, name: str) -> np.ndarray:
        """(q - zero_point) * scale of the constant that a DequantizeLinear of q.onnx reads."""
        proto = onnx.load(self.folder / "q.onnx")
        values = constants(proto)
        node = next(n for n in proto.graph.node if n.op_type.startswith("Deq") and name in n.input)
        codes, scale = (values[i].astype(np.float64) for i in node.input[:2])
        zero = values[node.input[2]].astype(np.float64) if len(node.input) > 2 else np.zeros(())
        given = {a.name: a.i for a in node.attribute}
        return (codes - spread(zero, codes, given)) * spread(scale, codes, given)


def constants(proto: onnx.ModelProto) -> Arrays:
    found = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Constant":
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return found


def spread(parameter: np.ndarray, codes: np.ndarray, given: dict[str, int]) -> np.ndarray:
    """A parameter of a DequantizeLinear in the shape of its codes, as ONNX says."""
    if parameter.size == 1:
        return np.full(codes.shape, parameter.reshape(()))
    axis = given.get("axis", 1) % codes.ndim
    if "block_size" in given:
        repeated = np.repeat(parameter, given["block_size"], axis)
        return repeated.take(np.arange(codes.shape[axis]), axis)
    shape = [1] * codes.ndim
    shape[axis] = -1
    return np.broadcast_to(parameter.reshape(shape), codes.shape)


def db(reference: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> float:
    """SQNR pooled over samples, dB."""
    x, y = (np.concatenate([v.astype(np.float64).ravel() for v in s]) for s in (reference, actual))
    noise = float(((x - y) ** 2).sum())
    return 10 * math.log10(float((x**2).sum()) / noise) if noise else math.inf


def close(value: float) -> Any:
    return pytest.approx(value, abs=TOLERANCE_DB)


def static(
    folder: Path,
    proto: onnx.ModelProto,
    feeds: Sequence[Arrays],
    *,
    calibration: Sequence[Arrays] | None = None,
    preprocess: bool = False,
    **options: Any,
) -> Pair:
    """The proto and what `quantize_static` makes of it."""
    source = save(proto, folder / "f.onnx")
    if preprocess:
        source = folder / "p.onnx"
        quant_pre_process(folder / "f.onnx", source)
    quantize_static(source, folder / "q.onnx", Reader(calibration or feeds), **options)
    return Pair(folder=folder, feeds=feeds)


def by_hand(
    folder: Path, proto: onnx.ModelProto, quantized: onnx.ModelProto, feeds: Sequence[Arrays]
) -> Pair:
    save(proto, folder / "f.onnx")
    save(quantized, folder / "q.onnx")
    return Pair(folder=folder, feeds=feeds)


def rewritten(pair: Pair, change: Callable[[onnx.GraphProto], None], file: str = "q") -> Pair:
    path = pair.folder / f"{file}.onnx"
    proto = onnx.load(path)
    change(proto.graph)
    save(proto, path)
    return pair


def renamed(pair: Pair, file: str, names: dict[str, str]) -> Pair:
    def change(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            for names_of in (node.input, node.output):
                for at, name in enumerate(names_of):
                    names_of[at] = names.get(name, name)
        del graph.value_info[:]

    return rewritten(pair, change, file)


def weight_of(result: Comparison, name: str) -> WeightError:
    return next(w for w in result.weights if w.name == name)


def activation_of(result: Comparison, name: str) -> ActivationError:
    return next(a for a in result.activations if a.name == name)


def check_activation(
    pair: Pair,
    result: Comparison,
    name: str,
    before: str,
    after: str,
    *,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> ActivationError:
    """Both errors of a tensor against float64; `limits` are those of a folded Relu or Clip."""
    found = activation_of(result, name)
    reference = pair.tensor("f", name)
    actual = pair.tensor("q", after)
    own = [np.clip(v, *limits) for v in pair.tensor("q", before)]
    assert found.accumulated_sqnr_db == close(db(reference, actual))
    assert found.local_sqnr_db == close(db(own, actual))
    return found


def check_outputs(pair: Pair, result: Comparison) -> dict[str, OutputError]:
    found = {o.name: o for o in result.outputs}
    assert found
    for name, output in found.items():
        sides = [pair.tensor(file, name) for file in ("f", "q")]
        assert output.sqnr_db == close(db(*sides))
        each = [db([a], [b]) for a, b in zip(*sides, strict=True)]
        assert output.per_sample_sqnr_db == pytest.approx(each, abs=TOLERANCE_DB)
        shipped = [pair.tensor(file, name, optimized=True) for file in ("f", "q")]
        assert output.deployed_sqnr_db == close(db(*shipped))
    return found


def lower_median(values: Sequence[float]) -> float:
    """The median that lies on a value, as in records."""
    return sorted(values)[(len(values) - 1) // 2]


def channel_truth(pair: Pair, name: str, twin: str, axis: int) -> list[float]:
    sides = pair.tensor("f", name), pair.tensor("q", twin)
    return [
        db(*([v.take(c, axis) for v in side] for side in sides))
        for c in range(sides[0][0].shape[axis])
    ]


def check_channels(found: ActivationError | OutputError | WeightError, truth: list[float]) -> None:
    assert found.channel_sqnr_db == pytest.approx(truth, abs=TOLERANCE_DB)
    assert found.worst_channel_sqnr_db == close(min(truth))
    assert found.median_channel_sqnr_db == close(lower_median(truth))
    assert found.worst_channel == int(np.argmin(truth))


# -- the debugger ------------------------------------------------------------------------------


def debugger_weights(pair: Pair) -> dict[str, float]:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        matched = qdq_loss_debug.create_weight_matching(
            str(pair.folder / "f.onnx"), str(pair.folder / "q.onnx")
        )
        return dict(qdq_loss_debug.compute_weight_error(matched))


def debugger_activations(pair: Pair, *, with_float: bool = True) -> dict[str, dict[str, float]]:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = []
        for file in ("q", "f"):
            more = pair.folder / f"{file}_more.onnx"
            qdq_loss_debug.modify_model_output_intermediate_tensors(
                pair.folder / f"{file}.onnx", more
            )
            found.append(qdq_loss_debug.collect_activations(str(more), Reader(pair.feeds)))
        if not with_float:
            found[1] = {}
        matched = qdq_loss_debug.create_activation_matching(*found)
        return dict(qdq_loss_debug.compute_activation_error(matched))
