"""Small models and feeds for the tests, named after what is in them, and the real ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).parents[1]
MODELS = Path(os.environ.get("QUANT_INSPECTOR_MODELS", ROOT.parent / "shared" / "models"))
# How many times as many random examples: THOROUGH=20 pytest -m slow
THOROUGH = int(os.environ.get("THOROUGH", "1"))
needs_models = pytest.mark.skipif(
    not MODELS.is_dir(), reason=f"no real models at {MODELS} (set QUANT_INSPECTOR_MODELS)"
)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def array(name: str, values: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(values), name)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[tuple[str, Sequence[int | str]]],
    outputs: Sequence[tuple[str, Sequence[int | str] | None]],
    constants: Sequence[onnx.TensorProto] = (),
    *,
    opset: int = 17,
    contrib: bool = False,
) -> onnx.ModelProto:
    """A model with float32 inputs and outputs."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs],
        list(constants),
    )
    opsets = [helper.make_opsetid("", opset)]
    if contrib:
        opsets.append(helper.make_opsetid("com.microsoft", 1))
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def save(proto: onnx.ModelProto, path: Path) -> Path:
    onnx.save(proto, path)
    return path


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def floats(shape: Sequence[int], seed: int = 0, gain: float = 1.0) -> np.ndarray[Any, Any]:
    return (rng(seed).standard_normal(shape) * gain).astype(np.float32)


def conv_relu_gemm() -> onnx.ModelProto:
    """Conv, Relu, global pool, Gemm (transB): the ordinary healthy case."""
    return model(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"], "relu"),
            helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
            helper.make_node("Flatten", ["p"], ["f"], "flatten"),
            helper.make_node("Gemm", ["f", "gw", "gb"], ["y"], "gemm", transB=1),
        ],
        [("x", [1, 3, 8, 8])],
        [("y", [1, 5])],
        [
            array("w", floats((8, 3, 3, 3), 1, 0.3)),
            array("b", floats((8,), 2, 0.1)),
            array("gw", floats((5, 8), 3)),
            array("gb", floats((5,), 4)),
        ],
    )


def boxes_and_scores_in_one_concat() -> onnx.ModelProto:
    """Boxes in pixels and scores below 1 share one scale behind the Concat."""
    return model(
        [
            helper.make_node("Conv", ["x", "w1"], ["boxes_raw"], "box_conv"),
            helper.make_node("Mul", ["boxes_raw", "gain"], ["boxes"], "box_mul"),
            helper.make_node("Conv", ["x", "w2"], ["score_raw"], "score_conv"),
            helper.make_node("Sigmoid", ["score_raw"], ["scores"], "score_sigmoid"),
            helper.make_node("Concat", ["boxes", "scores"], ["y"], "join", axis=1),
        ],
        [("x", [1, 3, 6, 6])],
        [("y", [1, 7, 6, 6])],
        [
            array("w1", floats((4, 3, 1, 1), 1)),
            array("w2", floats((3, 3, 1, 1), 2)),
            array("gain", np.float32(300.0)),
        ],
    )


def conv_batchnorm() -> onnx.ModelProto:
    """Conv without bias and a BatchNormalization that pre-processing folds into it."""
    return model(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
            helper.make_node("BatchNormalization", ["c", "g", "be", "m", "v"], ["n"], "bn"),
            helper.make_node("Relu", ["n"], ["y"], "relu"),
        ],
        [("x", [1, 3, 6, 6])],
        [("y", [1, 4, 6, 6])],
        [
            array("w", floats((4, 3, 1, 1), 1)),
            array("g", np.abs(floats((4,), 2)) + 0.5),
            array("be", floats((4,), 3)),
            array("m", floats((4,), 4)),
            array("v", np.abs(floats((4,), 5)) + 0.5),
        ],
    )


def qdq_of(
    x: str, y: str, scale: float, zero: int, dtype: str = "int8"
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """A Q/DQ pair from tensor `x` to tensor `y` with its constants."""
    nodes = [
        helper.make_node("QuantizeLinear", [x, f"{y}_s", f"{y}_z"], [f"{y}_q"], f"Q_{y}"),
        helper.make_node("DequantizeLinear", [f"{y}_q", f"{y}_s", f"{y}_z"], [y], f"DQ_{y}"),
    ]
    return nodes, [
        array(f"{y}_s", np.float32(scale)),
        array(f"{y}_z", np.array(zero, np.dtype(dtype))),
    ]


def npz_folder(folder: Path, feeds: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for at, feed in enumerate(feeds):
        np.savez(folder / f"{at:02}.npz", **feed)
    return folder


# For scripts that tests run in a process of their own: peak resident memory in bytes. Linux starts
# ru_maxrss of a new process with its parent's peak, so it says nothing about a small child.
PEAK_BYTES = """
def peak_bytes():
    with open("/proc/self/status") as status:
        return next(int(l.split()[1]) * 1024 for l in status if l.startswith("VmHWM"))
"""
