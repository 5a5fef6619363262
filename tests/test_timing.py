from __future__ import annotations

import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from inspector.errors import Cancelled, RunError
from inspector.model import Model
from inspector.model_files import load_model
from inspector.runtime import CPU, open_session
from inspector.timing import (
    RUNS_A_TURN,
    NodeTime,
    NodeTimes,
    _name_in_file,
    _node_times,
    _profiled,
    _Run,
    _runs,
    latency_of_models,
    measure_latency,
    profile_nodes,
    seconds_by_tensor,
)
from tests.samples import MODELS, array, floats, model, needs_models, qdq_of, save


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


# Nodes. The oracle for the figures is the profile itself: a run cannot be shorter than its parts.


def profile_events(*events: tuple[str, str, int, int, str]) -> list[dict[str, Any]]:
    """Events as the profiler writes them: category, name, start, length (µs), op type."""
    return [
        {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"op_name": op}}
        for cat, name, ts, dur, op in events
    ]


def test_nodes_belong_to_the_run_they_lie_in_and_bodies_to_their_owner() -> None:
    events = profile_events(
        ("Session", "session_initialization", 0, 90, ""),
        ("Node", "a_kernel_time", 100, 10, "Add"),
        ("Node", "inner_kernel_time", 112, 20, "Mul"),  # written before the If it is in
        ("Node", "if_kernel_time", 111, 30, "If"),
        ("Node", "zero_kernel_time", 111, 0, "Shape"),
        ("Session", "model_run", 95, 60, ""),
        ("Node", "a_kernel_time", 205, 14, "Add"),
        ("Session", "model_run", 200, 25, ""),
    )
    first, second = _runs([*events, {"name": "no times"}, {"cat": "Node", "ts": 1, "dur": "2"}])
    assert first.nodes == (
        ("a", "Add", pytest.approx(10e-6)),
        ("if", "If", pytest.approx(30e-6)),
    )
    assert first.seconds == pytest.approx(60e-6)
    assert second.nodes == (("a", "Add", pytest.approx(14e-6)),)


def test_medians_are_per_node_over_runs_and_copies_count_as_their_original(tmp_path: Path) -> None:
    proto = model(
        [helper.make_node("Relu", ["x"], ["h"], "r"), helper.make_node("Neg", ["h"], ["y"], "n")],
        [("x", [2])],
        [("y", [2])],
    )
    loaded = load_model(save(proto, tmp_path / "m.onnx"))
    runs = [
        _Run(seconds=1.0, nodes=(("r", "Relu", a), ("r/duplicated_token_1", "Relu", 0.25), *more))
        for a, more in (
            (0.1, (("own", "ReorderInput", 0.5),)),
            (0.2, ()),
            (0.6, (("h_nchwc", "Relu", 0.125),)),
        )
    ]
    times = _node_times(loaded, runs, True)
    found = {n.name: (n.op_type, n.seconds, n.in_file) for n in times.nodes}
    assert found == {
        "r": ("Relu", pytest.approx(0.45), True),  # 0.35, 0.45, 0.975
        "own": ("ReorderInput", 0.0, False),  # not reached in most runs
    }
    assert (times.runs, times.run_seconds, times.optimized) == (3, 1.0, True)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("conv", "conv"),
        ("conv_token_12", "conv"),
        ("conv/duplicated", "conv"),
        ("conv/duplicated_token_3", "conv"),
        ("conv/MatMulScaleFusion/", "conv"),
        ("t_nchwc", "conv"),  # named after the tensor it computes
        ("x_token_1", "x_token_1"),  # a node of the file that is called so
        ("ReorderOutput", "ReorderOutput"),
        ("other_token_1", "other_token_1"),
        ("conv/inner", "conv/inner"),
    ],
)
def test_names_of_the_runtime_lead_back_to_nodes_of_the_file(
    tmp_path: Path, given: str, wanted: str
) -> None:
    proto = model(
        [
            helper.make_node("Relu", ["a"], ["t"], "conv"),
            helper.make_node("Relu", ["t"], ["y"], "x_token_1"),
        ],
        [("a", [2])],
        [("y", [2])],
    )
    assert _name_in_file(given, load_model(save(proto, tmp_path / "m.onnx"))) == wanted


def real(folder: str, file: str) -> tuple[Model, dict[str, Any]]:
    loaded = load_model(MODELS / folder / file)
    return loaded, dict(np.load(MODELS / folder / "inputs" / "00.npz"))


@needs_models
@pytest.mark.parametrize("optimized", [False, True])
def test_the_nodes_of_a_run_never_take_longer_than_the_run(optimized: bool) -> None:
    loaded, feed = real("mlperf-resnet8", "ort_static_qdq.onnx")
    with tempfile.TemporaryDirectory() as folder:
        session, profiled = _profiled(loaded, optimized, CPU, Path(folder) / "p")
        wall = []
        for _ in range(5):
            begin = time.perf_counter()
            session.run(feed)
            wall.append(time.perf_counter() - begin)
        runs = _runs(json.loads(Path(profiled.end_profiling()).read_text()))
    assert len(runs) == 5
    for run, seconds in zip(runs, wall, strict=True):
        assert run.nodes
        # Whole microseconds: each event may be rounded up by one.
        assert sum(n[2] for n in run.nodes) <= run.seconds + 1e-6 * len(run.nodes)
        assert run.seconds <= seconds + 2e-6


@needs_models
def test_simulated_nodes_are_those_of_the_file_and_deployed_ones_are_fused() -> None:
    loaded, feed = real("mlperf-kws-dscnn", "quantized.onnx")
    simulated = profile_nodes(loaded, feed_of(loaded, feed), optimized=False, runs=3)
    deployed = profile_nodes(loaded, feed_of(loaded, feed), optimized=True, runs=3)
    assert set(simulated.by_name) == {n.name for n in loaded.nodes}
    assert all(n.in_file for n in simulated.nodes)
    assert len(deployed.nodes) < len(simulated.nodes) / 2
    convs = [n for n in deployed.nodes if n.op_type == "QLinearConv"]
    assert convs
    assert all(loaded.node_by_name[n.name].op_type == "Conv" for n in convs)
    assert simulated.runs == deployed.runs == 3
    strict_json = json.dumps(deployed.to_json(), allow_nan=False)
    assert json.loads(strict_json)["nodes"][0]["name"] == deployed.nodes[0].name


def feed_of(loaded: Model, feed: dict[str, Any]) -> dict[str, Any]:
    """A float twin's feed under the names of the quantized file, by position."""
    return dict(zip((i.name for i in loaded.inputs), feed.values(), strict=True))


@needs_models
def test_bodies_of_an_if_are_part_of_its_time() -> None:
    loaded, feed = real("silero-vad-16k", "model.onnx")
    times = profile_nodes(loaded, feed, optimized=False, runs=2)
    assert set(times.by_name) <= set(loaded.node_by_name)
    assert any(n.op_type == "If" for n in times.nodes)


def test_the_budget_ends_a_profile_after_one_run(tmp_path: Path) -> None:
    loaded = load_model(matmuls(tmp_path / "m.onnx", 1))
    feed = {"x": floats((256, 256))}
    assert profile_nodes(loaded, feed, optimized=False, budget_seconds=0.0).runs == 1
    assert profile_nodes(loaded, feed, optimized=False, runs=4).runs == 4


def test_profiling_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(matmuls(tmp_path / "m.onnx", 2))
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(private))
    before = sorted(tmp_path.iterdir())
    profile_nodes(loaded, {"x": floats((256, 256))}, optimized=True, runs=2)

    def stop() -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        profile_nodes(loaded, {"x": floats((256, 256))}, optimized=True, told=stop)
    with pytest.raises(RunError):
        profile_nodes(loaded, {"x": floats((3, 3))}, optimized=True)
    assert list(private.iterdir()) == []
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_with_no_readable_output_is_refused_by_name(tmp_path: Path) -> None:
    node = helper.make_node("SequenceConstruct", ["x"], ["s"], "sequence")
    proto = model([node], [("x", [2])], [])
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, [2]))
    proto.graph.output.append(helper.make_value_info("s", kind))
    loaded = load_model(save(proto, tmp_path / "s.onnx"))
    with pytest.raises(RunError, match="no output whose values can be read"):
        profile_nodes(loaded, {"x": floats((2,))}, optimized=False)


def test_a_tensors_time_is_its_node_its_constants_and_its_own_pair(tmp_path: Path) -> None:
    before, first = qdq_of("x", "xq", 0.1, 0)
    behind, second = qdq_of("c", "y", 0.1, 0)
    weights = [array("w8", np.ones((4, 4), np.int8)), array("ws", np.float32(0.5))]
    nodes = [
        *before,
        helper.make_node("DequantizeLinear", ["w8", "ws"], ["w"], "DQ_w"),
        helper.make_node("MatMul", ["xq", "w"], ["c"], "mm"),
        *behind,
        helper.make_node("MatMul", ["xq", "w"], ["d"], "mm2"),
        helper.make_node("Split", ["d"], ["d1", "d2"], "split", axis=1),
    ]
    proto = model(
        nodes,
        [("x", [4, 4])],
        [("y", [4, 4]), ("d1", [4, 2]), ("d2", [4, 2])],
        [*first, *second, *weights],
    )
    loaded = load_model(save(proto, tmp_path / "m.onnx"))
    took = {"Q_xq": 1.0, "DQ_xq": 2.0, "DQ_w": 4.0, "mm": 8.0, "Q_y": 16.0, "DQ_y": 32.0,
            "mm2": 64.0, "split": 128.0}  # fmt: skip
    times = NodeTimes(
        optimized=False,
        runs=1,
        run_seconds=1.0,
        nodes=tuple(
            NodeTime(name=n, op_type="?", seconds=s, in_file=True) for n, s in took.items()
        ),
    )
    found = seconds_by_tensor(loaded, times)
    assert found == {
        **dict.fromkeys(("x", "xq_q", "xq"), 3.0),
        **dict.fromkeys(("c", "y_q", "y"), 2.0 + 8.0 + 16.0 + 32.0),  # half of the shared weight
        "d": 2.0 + 64.0,
        "d1": 64.0,
        "d2": 64.0,
    }
    names = ("x", "c", "d", "d1", "d2")
    assert sum(found[n] for n in names) == sum(took.values())
    fused = NodeTimes(optimized=True, runs=1, run_seconds=1.0, nodes=times.nodes[3:4])
    assert seconds_by_tensor(loaded, fused) == dict.fromkeys(("c", "y_q", "y"), 8.0)


def test_several_models_are_timed_in_the_same_turns(tmp_path: Path) -> None:
    models = [load_model(matmuls(tmp_path / f"{n}.onnx", n)) for n in (1, 2, 3)]
    feed = {"x": floats((256, 256))}
    samples = latency_of_models(models, [feed] * 3, budget_seconds=0.0)
    assert [s.runs for s in samples] == [2 * RUNS_A_TURN] * 3
    with pytest.raises(RunError):
        latency_of_models(models, [feed] * 3, provider="NoSuchExecutionProvider")
