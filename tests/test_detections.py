"""Boxes of detectors: decoding, suppression and matching.

The oracles are loops over single boxes in Python floats, written from the projects' own
descriptions: one cell, one box, one pair at a time.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inspector.detections import (
    MOST_BOXES,
    PRESETS,
    Boxes,
    check,
    decode,
    matches,
    overlaps,
    preset_hint,
    recognise,
    suppress,
)
from inspector.errors import FeedError
from inspector.feeds import load_feeds
from inspector.model_files import load_model
from inspector.runtime import open_session
from tests.samples import MODELS, ROOT, needs_models, rng

Box = tuple[float, float, float, float]


def iou(a: Any, b: Any) -> float:
    """Intersection over union of two boxes, from first principles."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [max(0.0, r[2] - r[0]) * max(0.0, r[3] - r[1]) for r in (a, b)]
    union = sum(areas) - shared
    return shared / union if union > 0 else 0.0


def suppressed(found: list[tuple[Box, float, int]], limit: float) -> list[tuple[Box, float, int]]:
    """Greedy suppression per class, one box at a time."""
    kept: list[tuple[Box, float, int]] = []
    for box in sorted(found, key=lambda f: -f[1]):
        if all(k[2] != box[2] or iou(k[0], box[0]) <= limit for k in kept):
            kept.append(box)
    return kept


def as_list(boxes: Boxes) -> list[tuple[Box, float, int]]:
    return [
        (tuple(c), s, k)
        for c, s, k in zip(
            boxes.corners.tolist(), boxes.scores.tolist(), boxes.classes.tolist(), strict=True
        )
    ]


def assert_same(boxes: Boxes, expected: list[tuple[Box, float, int]]) -> None:
    found = as_list(boxes)
    assert [f[2] for f in found] == [e[2] for e in expected]
    np.testing.assert_allclose([f[1] for f in found], [e[1] for e in expected], rtol=1e-5)
    np.testing.assert_allclose(
        [f[0] for f in found], [e[0] for e in expected], rtol=1e-4, atol=1e-4
    )


def around(x: float, y: float, w: float, h: float) -> Box:
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def some_boxes(count: int, seed: int = 0, classes: int = 2) -> Boxes:
    random = rng(seed)
    corner, size = random.uniform(0, 60, (count, 2)), random.uniform(5, 40, (count, 2))
    scores = np.sort(random.uniform(0.3, 1, count))[::-1].copy()
    return Boxes(
        corners=np.concatenate([corner, corner + size], axis=1),
        scores=scores,
        classes=random.integers(0, classes, count),
    )


# -- overlap, suppression, matching ------------------------------------------------------------


def test_overlaps_are_those_of_every_pair() -> None:
    a, b = some_boxes(9), some_boxes(7, seed=1)
    expected = [[iou(x, y) for y in b.corners] for x in a.corners]
    np.testing.assert_allclose(overlaps(a.corners, b.corners), expected, atol=1e-12)


def test_boxes_without_area_overlap_by_nothing() -> None:
    flat = np.array([[1.0, 1, 1, 5], [5, 5, 1, 1], [0, 0, 9, 9]])
    np.testing.assert_array_equal(overlaps(flat, flat), [[0, 0, 0], [0, 0, 0], [0, 0, 1]])
    assert overlaps(flat, np.zeros((0, 4))).shape == (3, 0)


def test_boxes_as_large_as_floats_go_overlap_without_nan() -> None:
    huge = np.array([[-1e308, -1e308, 1e308, 1e308], [0, 0, 1, 1]])
    assert np.isfinite(overlaps(huge, huge)).all()


@given(st.integers(0, 40), st.integers(0, 10_000), st.sampled_from([0.1, 0.45, 0.9]))
def test_suppression_keeps_what_a_loop_over_boxes_keeps(
    count: int, seed: int, limit: float
) -> None:
    boxes = some_boxes(count, seed)
    assert as_list(suppress(boxes, limit)) == suppressed(as_list(boxes), limit)


def test_boxes_of_two_classes_do_not_suppress_each_other() -> None:
    same = np.array([[0.0, 0, 10, 10], [0, 0, 10, 10], [1, 0, 10, 10]])
    boxes = Boxes(corners=same, scores=np.array([0.9, 0.8, 0.7]), classes=np.array([0, 1, 0]))
    assert suppress(boxes).scores.tolist() == [0.9, 0.8]


def greedy(reference: Boxes, actual: Boxes, least: float) -> int:
    """Pairs, one box at a time."""
    free = list(range(len(reference.scores)))
    pairs = 0
    for box, kind in zip(actual.corners, actual.classes, strict=True):
        best, found = least, None
        for at in free:
            shared = iou(box, reference.corners[at])
            if reference.classes[at] == kind and (
                shared > best or (shared == best and found is None)
            ):
                best, found = shared, at
        if found is not None:
            free.remove(found)
            pairs += 1
    return pairs


@given(st.integers(0, 25), st.integers(0, 25), st.integers(0, 10_000))
def test_matches_are_those_of_a_loop_over_boxes(ours: int, others: int, seed: int) -> None:
    a, b = some_boxes(ours, seed), some_boxes(others, seed + 1)
    for least in (0.1, 0.5):
        assert matches(a, b, least) == greedy(a, b, least)


def test_a_box_is_matched_once() -> None:
    one = Boxes(corners=np.array([[0.0, 0, 10, 10]]), scores=np.ones(1), classes=np.zeros(1, int))
    twice = Boxes(
        corners=np.array([[0.0, 0, 10, 10], [0, 0, 10, 9]]), scores=np.ones(2),
        classes=np.zeros(2, int),
    )  # fmt: skip
    assert matches(one, twice) == matches(twice, one) == 1


def test_an_overlap_of_just_the_limit_is_a_match_and_less_is_none() -> None:
    whole = Boxes(corners=np.array([[0.0, 0, 10, 10]]), scores=np.ones(1), classes=np.zeros(1, int))
    for height, pairs in ((5.0, 1), (4.99, 0)):
        half = Boxes(
            corners=np.array([[0.0, 0, 10, height]]), scores=np.ones(1), classes=np.zeros(1, int)
        )
        assert matches(whole, half, 0.5) == pairs


def test_another_class_is_no_match() -> None:
    a = some_boxes(1)
    b = Boxes(corners=a.corners, scores=a.scores, classes=a.classes + 1)
    assert (matches(a, a), matches(a, b)) == (1, 0)


# -- layouts -----------------------------------------------------------------------------------


def test_yolov5_scores_are_objectness_times_class() -> None:
    values = rng(3).uniform(0, 1, (2, 63, 8)).astype(np.float32)
    values[..., :2] *= 64
    values[..., 2:4] *= 20
    for picture, boxes in zip(values, decode("yolov5", [values], score=0.3), strict=True):
        found = []
        for row in picture.astype(float):
            kind = int(np.argmax(row[5:]))
            if row[4] * row[5 + kind] >= 0.3:
                found.append((around(*row[:4]), row[4] * row[5 + kind], kind))
        assert len(found) > 10
        assert_same(boxes, suppressed(found, 0.45))


def test_yolov8_is_transposed_and_has_no_objectness() -> None:
    values = rng(4).uniform(0, 1, (2, 7, 84)).astype(np.float32)
    values[:, :2] *= 64
    values[:, 2:4] *= 20
    for picture, boxes in zip(values, decode("yolov8", [values], score=0.9), strict=True):
        found = []
        for column in picture.T.astype(float):
            kind = int(np.argmax(column[4:]))
            if column[4 + kind] >= 0.9:
                found.append((around(*column[:4]), column[4 + kind], kind))
        assert len(found) > 10
        assert_same(boxes, suppressed(found, 0.45))


def test_columns_behind_the_classes_are_no_classes() -> None:
    values = rng(4).uniform(0, 0.5, (1, 9, 84)).astype(np.float32)
    values[:, 6:] += 10  # masks
    assert max(decode("yolov8", [values], classes=2)[0].classes) == 1
    assert len(decode("yolov8", [values], classes=2, score=0.5)[0]) == 0
    assert min(decode("yolov8", [values])[0].classes) >= 2


def test_yolox_boxes_lie_relative_to_the_cells_of_three_grids() -> None:
    side = 2  # of the coarsest grid: a picture of 64 x 64
    count = 21 * side * side
    values = rng(5).uniform(0, 1, (1, count, 7)).astype(np.float32)
    found, at = [], 0
    for stride in (8, 16, 32):
        for y in range(64 // stride):
            for x in range(64 // stride):
                row = values[0, at].astype(float)
                at += 1
                kind = int(np.argmax(row[5:]))
                score = row[4] * row[5 + kind]
                if score >= 0.3:
                    size = (math.exp(row[2]) * stride, math.exp(row[3]) * stride)
                    box = around((row[0] + x) * stride, (row[1] + y) * stride, *size)
                    found.append((box, score, kind))
    assert at == count
    assert_same(decode("yolox", [values])[0], suppressed(found, 0.45))
    with pytest.raises(FeedError, match="not the cells of strides"):
        decode("yolox", [values[:, :-1]])


def fastestdet_boxes(grid: Any, least: float) -> list[tuple[Box, float, int]]:
    """One cell after the other, as the project's example reads them."""
    channels, height, width = grid.shape
    found = []
    for y in range(height):
        for x in range(width):
            cell = [float(v) for v in grid[:, y, x]]
            kind = max(range(channels - 5), key=lambda k: cell[5 + k])
            score = max(cell[0], 0.0) ** 0.6 * max(cell[5 + kind], 0.0) ** 0.4
            if score >= least:
                sizes = [1 / (1 + math.exp(-v)) for v in cell[3:5]]
                middle = (x + math.tanh(cell[1])) / width, (y + math.tanh(cell[2])) / height
                found.append((around(*middle, *sizes), score, kind))
    return found


def test_fastestdet_cells_hold_offsets_and_sizes() -> None:
    values = rng(6).uniform(0, 1, (2, 8, 4, 6)).astype(np.float32)
    values[:, 1:5] = rng(7).normal(0, 1, (2, 4, 4, 6))
    values[0, 0, 0, 0] = -1e-3  # rounding
    for picture, boxes in zip(values, decode("fastestdet", [values]), strict=True):
        found = fastestdet_boxes(picture, 0.65)
        assert len(found) > 5
        assert_same(boxes, suppressed(found, 0.45))


def test_ssd_leaves_the_background_out_and_scores_does_not() -> None:
    boxes = some_boxes(40).corners[None].astype(np.float32)
    raw = rng(8).uniform(0, 3, (1, 40, 3))
    scores = (np.exp(raw) / np.exp(raw).sum(-1, keepdims=True)).astype(np.float32)
    for preset, first in (("ssd", 1), ("scores", 0)):
        found = []
        for box, row in zip(boxes[0].astype(float), scores[0].astype(float), strict=True):
            kind = int(np.argmax(row[first:]))
            if row[first + kind] >= 0.5:
                found.append((tuple(box), row[first + kind], kind))
        assert found
        assert_same(decode(preset, [boxes, scores], score=0.5)[0], suppressed(found, 0.45))


def test_exports_that_suppress_are_taken_as_they_are() -> None:
    six = np.zeros((1, 4, 6), np.float32)
    six[0, 0] = [0, 0, 10, 10, 0.9, 3]
    six[0, 1] = [0, 0, 10, 10, 0.8, 3]  # overlaps, and stays
    expected = [((0.0, 0.0, 10.0, 10.0), 0.9, 3), ((0.0, 0.0, 10.0, 10.0), 0.8, 3)]
    assert_same(decode("nms6", [six])[0], expected)
    assert_same(decode("nms6", [six[0]])[0], expected)
    assert_same(decode("nms6", [six[:, :0]])[0], [])


def test_boxes_of_two_pictures_in_one_list_do_not_meet() -> None:
    seven = np.array([[0, 0, 0, 10, 10, 2, 0.9], [1, 0, 0, 10, 10, 2, 0.8]], np.float32)
    ours = decode("nms7", [seven])[0]
    assert len(ours) == 2
    assert matches(ours, ours) == 2
    moved = seven.copy()
    moved[:, 0] += 1
    assert matches(ours, decode("nms7", [moved])[0]) == 1


def test_a_negative_picture_ends_a_detection_output() -> None:
    rows = [[0, 1, 0.9, 0, 0, 1, 1], [-1, 0, 0, 0, 0, 0, 0], [0, 1, 0.9, 0, 0, 1, 1]]
    values = np.array(rows, np.float32).reshape(1, 1, 3, 7)
    (boxes,) = decode("detection_output", [values])
    assert as_list(boxes) == [((0.0, 0.0, 1.0, 1.0), pytest.approx(0.9), 1)]


@pytest.mark.parametrize("spoiled", [(0, 4), (0, 5), (0, 0), (0, 2)])
def test_a_box_with_nan_is_a_detection_that_nothing_matches(spoiled: tuple[int, int]) -> None:
    values = np.array([[[5, 5, 4, 4, 1, 1], [50, 50, 4, 4, 1, 1]]], np.float32)
    (whole,) = decode("yolov5", [values])
    values[0, spoiled[0], spoiled[1]] = math.nan
    (boxes,) = decode("yolov5", [values])
    assert (len(boxes), boxes.broken, len(boxes.scores)) == (2, 1, 1)
    assert matches(whole, boxes) == matches(boxes, boxes) == 1


def test_only_the_best_boxes_of_a_picture_are_looked_at() -> None:
    count = MOST_BOXES + 50
    values = np.zeros((1, count, 6), np.float32)
    values[0, :, 0] = np.arange(count) * 10
    values[0, :, 2:4] = 1
    values[0, :, 4] = np.linspace(0.3, 1, count)
    (boxes,) = decode("nms6", [values])
    assert len(boxes) == MOST_BOXES
    assert boxes.scores.min() == pytest.approx(values[0, 50, 4])


# -- recognising -------------------------------------------------------------------------------


def zeros(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("shape", "preset"),
    [
        ((1, 25200, 85), "yolov5"),
        ((2, 25200, 6), "yolov5"),
        ((1, 84, 8400), "yolov8"),
        ((1, 14, 2000), "yolov8"),
        ((1, 85, 22, 22), "fastestdet"),
        ((1, 300, 6), "nms6"),
        ((17, 6), "nms6"),
        ((17, 7), "nms7"),
        ((1, 1, 100, 7), "detection_output"),
    ],
)
def test_a_layout_is_recognised_by_shape(shape: tuple[int, ...], preset: str) -> None:
    assert recognise({"y": zeros(*shape)}) == (preset, ("y",))
    check(preset, {"y": zeros(*shape)})


@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 8400, 85)],  # YOLOX, YOLOv6, or YOLOv8 transposed
        [(1, 126, 85)],  # no grids of a square picture
        [(1, 255, 20, 20)],  # raw grids of three anchors
        [(1, 116, 8400), (1, 32, 160, 160)],  # YOLOv8 with masks
        [(1, 10)],
        [(1, 5, 4, 4)],
        [(1,)],
        [()],
        [(1, 100, 4), (1, 99, 5)],
        [(1, 100, 4), (1, 100, 4)],
        [(1, 4, 4)] * 3,
    ],
)
def test_where_shapes_do_not_tell_the_hint_lists_the_layouts(shapes: list[Any]) -> None:
    arrays = {f"y{at}": zeros(*shape) for at, shape in enumerate(shapes)}
    with pytest.raises(FeedError, match="no layout of boxes is told by the shapes") as caught:
        recognise(arrays)
    assert all(f"{name}:" in caught.value.hint for name in PRESETS)


def test_scores_that_add_up_to_one_hold_the_background() -> None:
    scores = np.tile(np.float32([0.7, 0.2, 0.1]), (1, 50, 1))
    boxes = zeros(1, 50, 4)
    assert recognise({"s": scores, "b": boxes}) == ("ssd", ("b", "s"))
    scores[0, 7] = 0.9
    assert recognise({"b": boxes, "s": scores}) == ("scores", ("b", "s"))
    scores[0, 7] = math.nan
    assert recognise({"b": boxes, "s": scores})[0] == "scores"


@pytest.mark.parametrize(
    ("preset", "arrays", "part"),
    [
        ("yolov5", [zeros(1, 9, 5)], r"output y0 has shape \[1, 9, 5\]"),
        ("yolov8", [zeros(1, 85, 3, 3)], "output y0 has shape"),
        ("nms6", [zeros(1, 9, 7)], "output y0 has shape"),
        ("nms7", [zeros(9, 8)], "output y0 has shape"),
        ("ssd", [zeros(1, 9, 5), zeros(1, 9, 2)], "output y0 has shape"),
        ("ssd", [zeros(1, 9, 4), zeros(1, 8, 2)], "expected as many boxes as scores"),
        ("yolov5", [np.zeros((1, 9, 6), np.int64)], "int64"),
        ("fastestdet", [zeros()], r"shape \[\]"),
    ],
)
def test_outputs_that_a_layout_cannot_have_are_refused(
    preset: str, arrays: list[Any], part: str
) -> None:
    with pytest.raises(FeedError, match=part) as caught:
        check(preset, {f"y{at}": a for at, a in enumerate(arrays)})
    assert caught.value.hint == preset_hint()


# -- real detectors ----------------------------------------------------------------------------


def test_the_sample_detector_finds_the_digits_that_were_drawn() -> None:
    folder = ROOT / "sample_models" / "digit-detector"
    model = load_model(folder / "float.onnx")
    truths = json.loads((folder / "feeds" / "boxes.json").read_text())
    session = open_session(model, optimized=True)
    feeds = load_feeds(folder / "feeds", model)
    pairs = drawn = found = 0
    for name, feed in zip(feeds.names, feeds, strict=True):
        outputs = session.run(feed)
        preset, names = recognise(outputs)
        (boxes,) = decode(preset, [outputs[n] for n in names])
        truth = np.array(truths[name], float)
        wanted = Boxes(
            corners=truth[:, :4], scores=np.ones(len(truth)), classes=truth[:, 4].astype(int)
        )
        pairs += matches(wanted, boxes)
        drawn, found = drawn + len(truth), found + len(boxes)
    # sample_models/README.md: F1 0.985 with suppression at 0.5.
    assert drawn == 68
    assert 2 * pairs / (drawn + found) == pytest.approx(0.985, abs=0.002)


@needs_models
def test_real_fastestdet_is_read_as_its_example_reads_it() -> None:
    folder = MODELS / "fastestdet"
    model = load_model(folder / "model.onnx")
    session = open_session(model, optimized=True)
    seen = 0
    for feed in load_feeds(folder / "inputs", model):
        outputs = session.run(feed)
        assert recognise(outputs) == ("fastestdet", ("758",))
        (boxes,) = decode("fastestdet", [outputs["758"]])
        found = suppressed(fastestdet_boxes(outputs["758"][0], 0.65), 0.45)
        assert_same(boxes, found)
        seen += len(found)
    assert seen > 5


@needs_models
def test_real_ultraface_is_recognised_as_ssd_with_background() -> None:
    folder = MODELS / "ultraface-rfb320"
    model = load_model(folder / "model.onnx")
    session = open_session(model, optimized=True)
    for feed in load_feeds(folder / "inputs", model):
        outputs = session.run(feed)
        assert recognise(outputs) == ("ssd", ("boxes", "scores"))
        (boxes,) = decode("ssd", [outputs["boxes"], outputs["scores"]])
        assert len(boxes) > 0
        assert set(boxes.classes.tolist()) == {0}
