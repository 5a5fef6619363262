"""Multiply-accumulates, counted by hand and, for real networks, as their papers give them."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import helper

from inspector.costs import count_macs
from inspector.feeds import load_feeds, random_feeds
from inspector.model_files import load_model
from tests.samples import MODELS, array, floats, model, needs_models, save


def test_each_op_type_counts_what_a_hand_counts(tmp_path: Path) -> None:
    proto = model(
        [
            helper.make_node("Conv", ["x", "w"], ["a"], "grouped", group=2, pads=[1, 1, 1, 1]),
            helper.make_node("ConvTranspose", ["a", "t"], ["b"], "up", strides=[2, 2], group=2),
            helper.make_node("Flatten", ["b"], ["c"], "flat"),
            helper.make_node("Gemm", ["c", "g"], ["d"], "dense", transB=1),
            helper.make_node("MatMul", ["d", "m"], ["e"], "last"),
            helper.make_node("Gemm", ["e", "e"], ["out"], "outer", transA=1),
        ],
        [("x", [1, 4, 6, 6])],
        [("out", [3, 3])],
        [
            array("w", floats((8, 2, 3, 3), 1)),
            array("t", floats((8, 2, 2, 2), 2)),
            array("g", floats((5, 4 * 12 * 12), 3)),
            array("m", floats((5, 3), 4)),
        ],
    )
    float_model = load_model(save(proto, tmp_path / "model.onnx"))
    macs = count_macs(float_model, random_feeds(float_model, samples=1, seed=0)[0])
    assert macs == {
        "grouped": 8 * 6 * 6 * 2 * 9,
        "up": 8 * 6 * 6 * 2 * 4,
        "dense": 5 * 4 * 12 * 12,
        "last": 3 * 5,
        "outer": 3 * 3 * 1,
    }


def test_sizes_that_the_file_leaves_open_come_from_the_feed(tmp_path: Path) -> None:
    proto = model(
        [helper.make_node("MatMul", ["x", "w"], ["out"], "m")],
        [("x", ["batch", "length", 4])],
        [("out", ["batch", "length", 7])],
        [array("w", floats((4, 7), 1))],
    )
    float_model = load_model(save(proto, tmp_path / "model.onnx"))
    assert count_macs(float_model, {"x": floats((2, 3, 4))}) == {"m": 2 * 3 * 7 * 4}
    assert count_macs(float_model, {"x": floats((1, 9, 4))}) == {"m": 9 * 7 * 4}


@needs_models
@pytest.mark.parametrize(
    ("name", "millions"),
    # MLPerf Tiny gives 12.5 and 2.7 million; SqueezeNet 1.0's paper about 0.85 billion, 1.1 0.35.
    [("mlperf-resnet8", (12.4, 12.6)), ("mlperf-kws-dscnn", (2.6, 2.8))],
)
def test_real_networks_count_what_is_published(name: str, millions: tuple[float, float]) -> None:
    folder = MODELS / name
    float_model = load_model(folder / "model.onnx")
    feed = load_feeds(folder / "inputs", float_model, limit=1)[0]
    low, high = millions
    assert low * 1e6 < sum(count_macs(float_model, feed).values()) < high * 1e6
