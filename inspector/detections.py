"""Boxes out of what a detector gives, and how many of them two models have in common.

Apart from `output_metrics`, because how a network writes its boxes is known from the project it
comes from and not from its file. A layout is recognised from shapes where only one fits; two
detectors are always read with the same one. Greedy suppression per class follows Felzenszwalb et
al. 2010, greedy matching by falling score PASCAL VOC (Everingham et al. 2010).

A box that holds NaN or infinity is a detection that nothing matches: it is never left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.errors import FeedError

# Overlap from which the lower of two boxes of one class is suppressed, and from which two are one.
SUPPRESSED_IOU = 0.45
MATCHED_IOU = 0.5
# Boxes of one picture that are looked at, best first: a broken model may give all of them.
MOST_BOXES = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Boxes:
    """The detections of one picture, highest score first; equal scores in the output's order.

    Attributes:
        corners: x1, y1, x2, y2 in whatever unit the model has, float64, shape (boxes, 4), finite.
        scores: float64, shape (boxes,), finite.
        classes: int64, shape (boxes,).
        broken: further detections, whose score or corners are NaN or infinite.
    """

    corners: Floats
    scores: Floats
    classes: NDArray[np.int64]
    broken: int = 0

    def __len__(self) -> int:
        """All detections, with the broken ones."""
        return len(self.scores) + self.broken


# -- layouts -----------------------------------------------------------------------------------

# Candidates of a batch: corners (rows, boxes, 4), score of the best class and that class, both
# (rows, boxes).
_Raw = tuple[Floats, NDArray[Any], NDArray[np.int64]]


def _corners(centres: NDArray[Any]) -> Floats:
    """Corners of boxes given as centre x, centre y, width, height along the last axis."""
    x, y, w, h = np.moveaxis(np.asarray(centres, np.float64), -1, 0)
    return np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], axis=-1)


def _best(scores: NDArray[Any], classes: int | None) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The highest class score along the last axis, NaN where one is, and its class."""
    scores = scores[..., :classes]
    best = np.asarray(scores.argmax(axis=-1), np.int64)
    return np.take_along_axis(scores, best[..., None], axis=-1)[..., 0], best


def _yolov5(outputs: Sequence[NDArray[Any]], classes: int | None) -> _Raw:
    (values,) = outputs
    best, kind = _best(values[..., 5:], classes)
    return _corners(values[..., :4]), best * values[..., 4], kind


def _yolov8(outputs: Sequence[NDArray[Any]], classes: int | None) -> _Raw:
    (values,) = outputs
    values = np.moveaxis(values, 1, 2)
    best, kind = _best(values[..., 4:], classes)
    return _corners(values[..., :4]), best, kind


def _grid(cells: int) -> tuple[Floats, Floats]:
    """Cell (x, y) and stride of every candidate on the grids of strides 8, 16 and 32.

    Raises:
        FeedError: not the grids of a square picture.
    """
    side = math.isqrt(cells // 21)
    if cells != 21 * side * side:
        raise FeedError(
            f"{cells} candidates are not the cells of strides 8, 16 and 32 on a square picture",
            hint="Export the model with its boxes decoded and use the preset yolov5.",
        )
    at, strides = [], []
    for stride in (8, 16, 32):
        count = side * 32 // stride
        y, x = np.mgrid[:count, :count]
        at.append(np.stack([x.ravel(), y.ravel()], axis=-1))
        strides.append(np.full(count * count, stride))
    return np.concatenate(at).astype(np.float64), np.concatenate(strides).astype(np.float64)


def _yolox(outputs: Sequence[NDArray[Any]], classes: int | None) -> _Raw:
    (values,) = outputs
    best, kind = _best(values[..., 5:], classes)
    cells, strides = _grid(values.shape[1])
    places = np.asarray(values[..., :4], np.float64)
    with np.errstate(over="ignore"):
        sizes = np.exp(places[..., 2:]) * strides[:, None]
    middles = (places[..., :2] + cells) * strides[:, None]
    return _corners(np.concatenate([middles, sizes], axis=-1)), best * values[..., 4], kind


def _fastestdet(outputs: Sequence[NDArray[Any]], classes: int | None) -> _Raw:
    # Channels: objectness, offset x and y, width and height, classes. Corners are shares of the
    # picture.
    (grid,) = outputs
    height, width = grid.shape[2:]
    values = np.moveaxis(grid, 1, -1).reshape(grid.shape[0], height * width, -1)
    best, kind = _best(values[..., 5:], classes)
    y, x = (v.ravel() for v in np.mgrid[:height, :width])
    places = np.asarray(values[..., 1:5], np.float64)
    sizes = 0.5 * (1 + np.tanh(places[..., 2:] / 2))  # the sigmoid, without overflow
    middles = (np.stack([x, y], axis=-1) + np.tanh(places[..., :2])) / (width, height)
    # What rounds to just below 0 has no root.
    objects, best = (np.maximum(np.asarray(v, np.float64), 0.0) for v in (values[..., 0], best))
    return _corners(np.concatenate([middles, sizes], axis=-1)), objects**0.6 * best**0.4, kind


def _scores(outputs: Sequence[NDArray[Any]], classes: int | None) -> _Raw:
    boxes, scores = outputs
    best, kind = _best(scores, classes)
    return np.asarray(boxes, np.float64), best, kind


def _ssd(outputs: Sequence[NDArray[Any]], classes: int | None) -> _Raw:
    boxes, scores = outputs
    return _scores((boxes, scores[..., 1:]), classes)


def _nms6(outputs: Sequence[NDArray[Any]], _classes: int | None) -> _Raw:
    (values,) = outputs
    if values.ndim == 2:
        values = values[None]
    return np.asarray(values[..., :4], np.float64), values[..., 4], _whole(values[..., 5])


def _nms7(outputs: Sequence[NDArray[Any]], _classes: int | None) -> _Raw:
    (values,) = outputs
    kinds = _in_picture(values[:, 0], values[:, 5])
    return np.asarray(values[None, :, 1:5], np.float64), values[None, :, 6], kinds[None]


def _detection_output(outputs: Sequence[NDArray[Any]], _classes: int | None) -> _Raw:
    (values,) = outputs
    values = values.reshape(-1, 7)
    # A negative picture ends the list; what stands behind it is left over from earlier runs.
    ends = np.flatnonzero(values[:, 0] < 0)
    values = values[: ends[0]] if ends.size else values
    kinds = _in_picture(values[:, 0], values[:, 1])
    return np.asarray(values[None, :, 3:7], np.float64), values[None, :, 2], kinds[None]


def _whole(numbers: NDArray[Any]) -> NDArray[np.int64]:
    """Class numbers that are held as floats; -1 for what is none."""
    finite = np.isfinite(numbers)
    return np.where(finite, np.rint(np.where(finite, numbers, 0)), -1).astype(np.int64)


def _in_picture(pictures: NDArray[Any], kinds: NDArray[Any]) -> NDArray[np.int64]:
    """Classes that differ from picture to picture, so that only boxes of one picture meet."""
    return np.asarray(_whole(pictures) * 2**32 + _whole(kinds), np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One way to write boxes.

    Attributes:
        outputs: how many arrays it takes; two are boxes and scores, in this order.
        ranks: dimensions that its arrays may have.
        columns: least length of `axis`, where the fields of a box lie.
        axis: see `columns`.
        score: lowest score of a detection where none is named.
        suppress: boxes overlap and have to be suppressed.
        read: the arrays as candidates.
        says: what it reads, for a hint.
    """

    outputs: int = 1
    ranks: tuple[int, ...] = (3,)
    columns: int
    axis: int = -1
    score: float
    suppress: bool = True
    read: Callable[[Sequence[NDArray[Any]], int | None], _Raw]
    says: str


PRESETS: dict[str, Preset] = {
    "yolov5": Preset(
        columns=6, score=0.25, read=_yolov5,
        says="(batch, boxes, cx cy w h objectness classes…), also YOLOv7",
    ),
    "yolov8": Preset(
        columns=5, axis=1, score=0.25, read=_yolov8,
        says="(batch, cx cy w h classes…, boxes), also YOLOv9 and YOLO11",
    ),
    "yolox": Preset(
        columns=6, score=0.3, read=_yolox,
        says="as yolov5, boxes relative to the cells of a square picture",
    ),
    "fastestdet": Preset(
        ranks=(4,), columns=6, axis=1, score=0.65, read=_fastestdet,
        says="(batch, objectness x y w h classes…, height, width)",
    ),
    "ssd": Preset(
        outputs=2, columns=2, score=0.5, read=_ssd,
        says="(batch, boxes, x1 y1 x2 y2) and (batch, boxes, background classes…), also UltraFace",
    ),
    "scores": Preset(
        outputs=2, columns=1, score=0.25, read=_scores, says="as ssd, without background",
    ),
    "nms6": Preset(
        ranks=(2, 3), columns=6, score=0.25, suppress=False, read=_nms6,
        says="(batch, boxes, x1 y1 x2 y2 score class)",
    ),
    "nms7": Preset(
        ranks=(2,), columns=7, score=0.25, suppress=False, read=_nms7,
        says="(boxes, picture x1 y1 x2 y2 class score)",
    ),
    "detection_output": Preset(
        ranks=(4,), columns=7, score=0.25, suppress=False, read=_detection_output,
        says="(1, 1, boxes, picture class score x1 y1 x2 y2)",
    ),
}  # fmt: skip


def preset_hint() -> str:
    """One imperative sentence that names every preset."""
    each = "; ".join(f"{name}: {preset.says}" for name, preset in PRESETS.items())
    return f"Name the outputs and the layout, e.g. detection_f1:output0@yolov8. Layouts: {each}."


def recognise(arrays: Mapping[str, NDArray[Any]]) -> tuple[str, tuple[str, ...]]:
    """The preset that fits the float model's outputs, and the outputs that it takes.

    Only shapes are looked at, but for boxes beside scores: these hold the background where the
    scores of every box add up to 1.

    Args:
        arrays: one sample's outputs by name.

    Raises:
        FeedError: none fits, or several do.
    """
    floats = {name: array for name, array in arrays.items() if array.dtype.kind == "f"}
    if len(floats) == 1:
        ((name, array),) = floats.items()
        found = _of_one(array.shape)
        if found:
            return found, (name,)
    elif len(floats) == 2:
        names = sorted(floats, key=lambda n: floats[n].shape[-1:] != (4,))
        boxes, scores = (floats[n] for n in names)
        alike = boxes.ndim == 3 and boxes.shape[:-1] == scores.shape[:-1]
        if alike and boxes.shape[-1] == 4 and scores.shape[-1] != 4:
            with np.errstate(invalid="ignore"):
                sums = scores.sum(axis=-1, dtype=np.float64)
            one = scores.shape[-1] > 1 and np.allclose(sums, 1.0, atol=0.01)
            return "ssd" if one else "scores", tuple(names)
    shown = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
    raise FeedError(f"no layout of boxes is told by the shapes of {shown}", hint=preset_hint())


def _of_one(shape: tuple[int, ...]) -> str:
    """The preset of a single output; "" where its shape does not say."""
    if len(shape) == 2:
        return {6: "nms6", 7: "nms7"}.get(shape[1], "")
    if len(shape) == 4:
        if shape[:2] == (1, 1) and shape[3] == 7:
            return "detection_output"
        # Raw grids of three anchors have three times as many channels as a box has fields.
        return "fastestdet" if shape[1] > 5 and shape[1] % 3 else ""
    if len(shape) != 3:
        return ""
    _, first, last = shape
    if 5 <= first < last:
        return "yolov8"
    # Three anchors on every cell of strides 8, 16 and 32 of a square picture; with one anchor the
    # layout may be YOLOX's, YOLOv6's or a transposed YOLOv8's.
    side = math.isqrt(first // 63)
    if last >= 6 and side and first == 63 * side * side:
        return "yolov5"
    one = math.isqrt(first // 21)
    if last == 6 and first <= MOST_BOXES and first != 21 * one * one:
        return "nms6"
    return ""


def check(preset: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Refuses outputs that a preset cannot read.

    Raises:
        FeedError: naming the first that does not fit.
    """
    known = PRESETS[preset]
    for at, (name, array) in enumerate(arrays.items()):
        columns = known.columns
        if known.outputs == 2 and at == 0:
            columns = 4
        exact = columns == 4 or not known.suppress
        size = array.shape[known.axis] if array.ndim in known.ranks else 0
        if size < columns or (exact and size != columns) or array.dtype.kind != "f":
            raise FeedError(
                f"output {name} has shape {list(array.shape)} ({array.dtype.name}), expected "
                f"{known.says} for {preset}",
                hint=preset_hint(),
            )
    if known.outputs == 2:
        boxes, scores = arrays.values()
        if boxes.shape[:-1] != scores.shape[:-1]:
            raise FeedError(
                f"outputs {' and '.join(arrays)} have shapes {list(boxes.shape)} and "
                f"{list(scores.shape)}, expected as many boxes as scores",
                hint=preset_hint(),
            )


# -- boxes -------------------------------------------------------------------------------------


def decode(
    preset: str,
    outputs: Sequence[NDArray[Any]],
    *,
    score: float | None = None,
    iou: float = SUPPRESSED_IOU,
    classes: int | None = None,
) -> list[Boxes]:
    """The detections of each picture of a batch.

    A box has the class of its highest score (the first of equal ones) and is a detection where that
    score is at least `score`. The `MOST_BOXES` best of a picture are kept and, where the export
    does not do that itself, suppressed per class.

    Args:
        preset: of `PRESETS`.
        outputs: as `check` lets them pass.
        score: None for the preset's own.
        iou: of suppression.
        classes: how many of the class columns are classes; None for all (YOLO's masks and key
            points stand behind them).
    """
    known = PRESETS[preset]
    least = known.score if score is None else score
    with np.errstate(invalid="ignore", over="ignore"):
        corners, scores, kinds = known.read(outputs, classes)
        wanted = np.isnan(scores) | (scores >= least)
    found = []
    for at in range(len(scores)):
        rows = np.flatnonzero(wanted[at])
        own = corners[at, rows]
        values = np.asarray(scores[at, rows], np.float64)
        whole = np.isfinite(values) & np.isfinite(own).all(axis=-1)
        order = np.argsort(-values[whole], kind="stable")[:MOST_BOXES]
        boxes = Boxes(
            corners=own[whole][order],
            scores=values[whole][order],
            classes=kinds[at, rows][whole][order],
            broken=int(np.count_nonzero(~whole)),
        )
        found.append(suppress(boxes, iou) if known.suppress else boxes)
    return found


def overlaps(one: Floats, other: Floats) -> Floats:
    """Intersection over union of every pair, 0..1, shape (boxes of one, boxes of other).

    A box whose corners are swapped has no area; two without area overlap by 0.
    """
    # Corners as large as float64 has them give areas that are infinite.
    with np.errstate(over="ignore", invalid="ignore"):
        low = np.maximum(one[:, None, :2], other[None, :, :2])
        high = np.minimum(one[:, None, 2:], other[None, :, 2:])
        shared = np.maximum(high - low, 0.0).prod(axis=-1)
        areas = [np.maximum(b[:, 2:] - b[:, :2], 0.0).prod(axis=-1) for b in (one, other)]
        union = areas[0][:, None] + areas[1][None, :] - shared
        return np.asarray(np.divide(shared, union, out=np.zeros_like(shared), where=union > 0))


def suppress(boxes: Boxes, iou: float = SUPPRESSED_IOU) -> Boxes:
    """The boxes without those that overlap a better one of their class by more than `iou`."""
    corners, classes = boxes.corners, boxes.classes
    left = np.ones(len(corners), np.bool_)
    for at in range(len(corners)):
        if left[at]:
            rivals = at + 1 + np.flatnonzero(left[at + 1 :] & (classes[at + 1 :] == classes[at]))
            left[rivals[overlaps(corners[at : at + 1], corners[rivals])[0] > iou]] = False
    kept = np.flatnonzero(left)
    return Boxes(
        corners=corners[kept],
        scores=boxes.scores[kept],
        classes=classes[kept],
        broken=boxes.broken,
    )


def matches(reference: Boxes, actual: Boxes, iou: float = MATCHED_IOU) -> int:
    """How many boxes of one model the other has as well, each counted once.

    From the highest score down, every actual box takes the free reference box of its class that it
    overlaps most (the better one of equals), where that is by at least `iou`.
    """
    shared = overlaps(actual.corners, reference.corners)
    shared[actual.classes[:, None] != reference.classes[None, :]] = -1.0
    found = 0
    for row in shared:
        if row.size:
            best = int(row.argmax())
            if row[best] >= iou:
                shared[:, best] = -1.0
                found += 1
    return found
