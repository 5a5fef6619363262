from __future__ import annotations

import itertools
from pathlib import Path

from onnx import helper

from inspector.model_files import load_model
from inspector.runtime import open_session
from inspector.timing import RUNS_A_TURN, measure_latency
from tests.samples import array, floats, model, save


def matmuls(path: Path, count: int) -> Path:
    """`count` products of 256x256 matrices in a row."""
    names = ["x", *(f"t{i}" for i in range(count - 1)), "y"]
    nodes = [
        helper.make_node("MatMul", [a, "w"], [b], f"mm{i}")
        for i, (a, b) in enumerate(itertools.pairwise(names))
    ]
    constants = [array("w", floats((256, 256), 1, 0.05))]
    return save(model(nodes, [("x", [256, 256])], [("y", [256, 256])], constants), path)


def test_a_model_of_twenty_times_the_work_takes_longer(tmp_path: Path) -> None:
    sessions = [
        open_session(load_model(matmuls(tmp_path / f"{n}.onnx", n)), optimized=True)
        for n in (2, 40)
    ]
    feed = {"x": floats((256, 256))}
    short, long = measure_latency(sessions, [feed, feed], budget_seconds=0.1)
    assert short.median_seconds < long.median_seconds
    assert short.runs == long.runs >= 2 * RUNS_A_TURN
    assert short.spread_seconds >= 0


def test_the_budget_ends_the_measurement(tmp_path: Path) -> None:
    session = open_session(load_model(matmuls(tmp_path / "m.onnx", 2)), optimized=True)
    (sample,) = measure_latency([session], [{"x": floats((256, 256))}], budget_seconds=0.0)
    assert sample.runs == 2 * RUNS_A_TURN
