"""Task metrics: their texts, their sums and their figures.

The oracles are written here in float64, element by element where that is short enough.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inspector.calibration import calibrate
from inspector.cli import main
from inspector.compare import compare_models
from inspector.comparison import Comparison, TaskFigure
from inspector.detections import PRESETS
from inspector.errors import FeedError
from inspector.feeds import Feeds, load_feeds, random_feeds, split_calibration
from inspector.live import preview_list
from inspector.metrics import sqnr_db
from inspector.model_files import load_model
from inspector.output_metrics import LEAST_PROBABILITY, OutputSqnr, SelectedSqnr
from inspector.prepare import prepare
from inspector.preview import Previewer, RecipeSource
from inspector.quantize import quantize_model
from inspector.recipe import QuantConfig
from inspector.recipe_table import recipe_grid, recipes_json, run_recipes
from inspector.render import (
    comparison_json,
    dump_json,
    format_figure,
    metric_text,
    read_comparison,
    recipes_text,
)
from inspector.store import FeedSource, PairOptions, Workspace
from inspector.task_metrics import (
    METRICS,
    MetricWatch,
    TaskMetric,
    metric_choices,
    misses,
    parse_metric,
    prepared,
    read_expected,
    split_target,
    whole,
)
from inspector.web.facts import metric_tile
from inspector.workbench import load_pair
from tests.samples import MODELS, ROOT, needs_models, rng

Arrays = dict[str, Any]


def normal(*shape: int, seed: int = 0) -> Any:
    return rng(seed).normal(0, 1, shape).astype(np.float32)


def pooled(
    metric: TaskMetric, samples: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> float:
    return metric.figure(
        np.sum([metric.sums(at, a, b) for at, (a, b) in enumerate(samples)], axis=0)
    )


def one(text: str, reference: Any, actual: Any, feeds: Feeds | None = None) -> float:
    """The figure of one sample of one output."""
    return pooled(parse_metric(text, ["y"], feeds), [({"y": reference}, {"y": actual})])


class Rows(Feeds):
    """Feeds of which only rows, labels and names are looked at."""

    def __init__(self, rows: Sequence[int], labels: Sequence[int] | None = None) -> None:
        super().__init__(
            source=None,  # type: ignore[arg-type]
            indices=tuple(range(len(rows))),
            names=tuple(f"{at:02}.npz" for at in range(len(rows))),
            available=len(rows),
            what="samples",
            rows=tuple(rows),
            labels=None if labels is None else tuple(labels),
        )


# -- texts -------------------------------------------------------------------------------------


def test_every_metric_is_documented_and_every_option_is_known() -> None:
    assert all(each.says for each in METRICS.values())
    assert "".join(METRICS).isidentifier()


@pytest.mark.parametrize(
    "name",
    ["a:b", "a/b:0", "a@b", "a[0:4]", "a{b>1}", "a+b", "a,k=3", "758", "日本", "@k=3", "a b"],
)
def test_outputs_of_any_name_can_be_named(name: str) -> None:
    outputs = ["a", name, "b"]
    assert parse_metric(f"output_sqnr_db:{name}", outputs).outputs == (name,)
    found = parse_metric(f"output_sqnr_db:{name}[1:3]", outputs)
    assert isinstance(found, SelectedSqnr)
    assert (found.outputs, found.selection and found.selection.text) == ((name,), "[1:3]")
    found = parse_metric(f"output_sqnr_db:b{{{name}>=0.5}}", outputs)
    assert isinstance(found, SelectedSqnr)
    assert found.outputs == ("b", name)
    assert found.condition is not None
    assert (found.condition.sign, found.condition.number) == (">=", 0.5)
    assert parse_metric(f"neighbour_overlap:{name}@k=2", outputs).outputs == (name,)
    assert parse_metric(f"detection_f1:{name}+b@ssd", outputs).outputs == (name, "b")


def test_of_two_outputs_that_fit_the_longer_name_is_meant() -> None:
    assert isinstance(parse_metric("output_sqnr_db:a[0:4]", ["a"]), SelectedSqnr)
    assert isinstance(parse_metric("output_sqnr_db:a[0:4]", ["a", "a[0:4]"]), OutputSqnr)


def test_without_an_output_all_or_the_only_one_is_meant() -> None:
    assert parse_metric("output_sqnr_db", ["a", "b"]).outputs == ("a", "b")
    assert parse_metric(" agreement ", ["a", "b"]).outputs == ("a", "b")
    assert parse_metric("cosine", ["a"]).outputs == ("a",)
    with pytest.raises(FeedError, match="the model has 2 outputs that could be meant"):
        parse_metric("cosine", ["a", "b"])


def test_directions_and_units_are_told() -> None:
    feeds = Rows([1], [0])
    found = [parse_metric(text, ["y"], feeds) for text in METRICS if text != "expected"]
    assert {m.text for m in found if not m.higher_is_better} == {"top1_drop", "top5_drop", "kl"}
    assert {m.text: m.unit for m in found if m.unit} == {"output_sqnr_db": "dB", "kl": "nats"}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("sqnr", "no metric is called 'sqnr' (nearest: ", "Use one of output_sqnr_db, top1,"),
        ("", "no metric is called ''", "Use one of"),
        ("output_sqnr_db:z", "'z' names no output that can be compared", "Name one of y, scores"),
        ("output_sqnr_db:", "'' names no output", "Name one of"),
        ("output_sqnr_db[0:4]", "'[0:4]' cannot be read", "follow an output"),
        ("output_sqnr_db:y[a]", "'a' is neither an index nor a slice", "Write e.g. [0:4]"),
        ("output_sqnr_db:y[]", "'' is neither", "Write e.g."),
        ("output_sqnr_db:y[0:4:-1]", "'0:4:-1' is neither", "steps are 1 or more"),
        ("output_sqnr_db:y[..., ...]", "'...' is neither", "Write e.g."),
        ("output_sqnr_db:y[1:2:3:4]", "'1:2:3:4' is neither", "Write e.g."),
        ("output_sqnr_db:y{scores}", "{scores} is no comparison with a number", "Write an output"),
        ("output_sqnr_db:y{scores>x}", "{scores>x} is no comparison", "{scores>0.3}"),
        ("output_sqnr_db:y{scores>nan}", "is no comparison", "Write an output"),
        ("output_sqnr_db:y{z>1}", "'z' names no output", "nearest: "),
        ("output_sqnr_db:y{__import__('os')>1}", "names no output", "Name one of"),
        ("cosine:y[0:4]", "cosine looks at whole outputs", "Leave [channels]"),
        ("output_sqnr_db@k=3", "option 'k=3' cannot be used", "Use the options of output_sqnr_db"),
        ("cosine:y@", "option '' cannot be used", "each once: mean, cls"),
        ("cosine:y@mean,mean", "option 'mean' cannot be used", "each once"),
        ("cosine:y@mean=1", "option 'mean=1' cannot be used", "each once"),
        ("cosine:y@mean,cls", "mean and cls exclude each other", "Keep one"),
        ("neighbour_overlap:y@k", "option 'k' cannot be used", "k=N"),
        ("neighbour_overlap:y@k=0", "k=0 is not a whole number from 1", "Write e.g. k=1"),
        ("neighbour_overlap:y@k=1.5", "k=1.5 is not a whole number", "Write e.g. k=1"),
        ("detection_f1:y@iou=2", "iou=2 is not a number from 0.01 to 1", "Write e.g. iou=1"),
        ("detection_f1:y@score=nan", "score=nan is not a number", "Write e.g. score=1"),
        ("detection_f1:y@ssd", "ssd reads 2 output(s), not 1", "Name the outputs and the layout"),
        ("detection_f1:y@yolov5,yolov8", "yolov5 and yolov8 exclude", "Keep one"),
        ("detection_f1:y+scores+y", "names no output", "Name one of"),
        ("cosine:y+scores", "names no output", "Name one of"),
        ("top1", "top1 needs labels, and the feeds have none", "Write labels.json"),
        ("expected:y", "expected:y needs expected values", "Give --expected FILE.csv"),
        ("os:getcwd", "no metric is called 'os'", "Use one of"),
    ],
)
def test_texts_that_mean_nothing_are_refused(text: str, message: str, hint: str) -> None:
    with pytest.raises(FeedError) as caught:
        parse_metric(text, ["y", "scores"], Rows([1]))
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_model_without_floating_outputs_has_no_metric() -> None:
    with pytest.raises(FeedError, match="names no output that can be compared"):
        parse_metric("output_sqnr_db", [])


def test_targets_are_split_at_the_last_sign() -> None:
    assert split_target("output_sqnr_db:a=b=20") == ("output_sqnr_db:a=b", 20.0)
    assert split_target("detection_f1@score=0.3=0.9") == ("detection_f1@score=0.3", 0.9)
    assert split_target("output_sqnr_db:y{s>=0.5}=-1e1") == ("output_sqnr_db:y{s>=0.5}", -10.0)
    for text in ("top1", "top1=", "=3", "top1=x", "top1=nan"):
        with pytest.raises(FeedError, match="names no metric and number"):
            split_target(text)


def test_a_figure_that_is_not_known_misses_every_goal() -> None:
    assert misses(None, 0, higher_is_better=True)
    assert misses(math.nan, 0, higher_is_better=False)
    assert misses(0.5, 0.6, higher_is_better=True)
    assert not misses(0.6, 0.6, higher_is_better=True)
    assert misses(0.6, 0.5, higher_is_better=False)
    assert not misses(-0.1, 0, higher_is_better=False)


# -- all of them -------------------------------------------------------------------------------

TEXTS = (
    "output_sqnr_db", "output_sqnr_db:y[1:3]", "output_sqnr_db:y{y[0]>0}", "top1", "top5_drop",
    "agreement", "mean_iou:y@axis=1", "cosine", "kl", "argmax",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_sums_of_samples_add_up_and_cross_to_another_process(text: str) -> None:
    feeds = Rows([2, 1, 2], [0, 5, 3, 6, 1])
    metric = pickle.loads(pickle.dumps(parse_metric(text, ["y"], feeds)))
    sides = [
        ({"y": normal(rows, 7, seed=at)}, {"y": normal(rows, 7, seed=9 + at)})
        for at, rows in enumerate(feeds.rows)
    ]
    each = [metric.sums(at, a, b) for at, (a, b) in enumerate(sides)]
    assert {s.dtype for s in each} == {np.dtype(np.float64)}
    assert len({s.shape for s in each}) == 1
    # A figure of two samples is that of both rows in one, where rows are alike.
    twice = metric.figure(each[0] + each[0])
    assert twice == pytest.approx(metric.figure(each[0]), nan_ok=True)
    if not text.startswith("top"):  # labels may like the other model better
        perfect = [metric.sums(at, a, a) for at, (a, _) in enumerate(sides)]
        best = metric.figure(np.sum(perfect, axis=0))
        got = metric.figure(np.sum(each, axis=0))
        assert best > got if metric.higher_is_better else best < got
    assert math.isnan(metric.figure(np.zeros_like(each[0]))) or text == "output_sqnr_db"


@pytest.mark.parametrize("text", TEXTS)
def test_nan_is_never_better_than_a_number(text: str) -> None:
    feeds = Rows([2], [0, 1])
    metric = parse_metric(text, ["y"], feeds)
    a = normal(2, 7)
    a[:, 0] += 9  # so that the label of the first row is right and the condition holds
    b = a.copy()
    b[0, 1] = math.nan
    spoiled = metric.figure(metric.sums(0, {"y": a}, {"y": b}))
    fine = metric.figure(metric.sums(0, {"y": a}, {"y": a}))
    if not math.isnan(spoiled):
        assert spoiled < fine if metric.higher_is_better else spoiled > fine


@pytest.mark.parametrize("text", TEXTS)
def test_nan_in_the_float_model_is_no_success_either(text: str) -> None:
    metric = parse_metric(text, ["y"], Rows([2], [0, 1]))
    a = normal(2, 7)
    a[:, 0] += 9
    a[0, :2] = math.nan
    found = metric.figure(metric.sums(0, {"y": a}, {"y": a}))
    if text.endswith("_drop"):
        assert found == 0  # both are wrong alike
    else:
        assert math.isnan(found) or found < 1


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("text", TEXTS)
def test_outputs_of_other_precisions_are_measured(text: str, dtype: Any) -> None:
    metric = parse_metric(text, ["y"], Rows([2], [0, 1]))
    a, b = normal(2, 7).astype(dtype), normal(2, 7, seed=1).astype(dtype)
    wide = [{"y": v.astype(np.float64)} for v in (a, b)]
    found = metric.figure(metric.sums(0, {"y": a}, {"y": b}))
    assert found == pytest.approx(metric.figure(metric.sums(0, *wide)), rel=1e-9)


# -- SQNR --------------------------------------------------------------------------------------


def test_output_sqnr_is_that_of_the_worst_output_pooled() -> None:
    metric = parse_metric("output_sqnr_db", ["a", "b"])
    sides = [
        (
            {"a": normal(2, 3, seed=at), "b": normal(4, seed=at)},
            {"a": normal(2, 3, seed=9 + at), "b": normal(4, seed=at) * 1.01},
        )
        for at in range(3)
    ]
    both = [np.concatenate([side[at]["a"] for side in sides]) for at in (0, 1)]
    assert pooled(metric, sides) == pytest.approx(sqnr_db(*both), abs=1e-9)


@pytest.mark.parametrize(
    ("selection", "entries"),
    [
        ("[1:3]", np.s_[:, 1:3]),
        ("[2]", np.s_[:, 2:3]),
        ("[-1]", np.s_[:, -1:]),
        ("[:, 1:3]", np.s_[:, 1:3]),
        ("[..., 0]", np.s_[..., 0:1]),
        ("[:, ::2, 1]", np.s_[:, ::2, 1:2]),
        ("[0, ..., 2:]", np.s_[0:1, ..., 2:]),
        ("[...]", np.s_[...]),
    ],
)
def test_a_selection_is_what_numpy_cuts(selection: str, entries: Any) -> None:
    a, b = normal(2, 5, 4), normal(2, 5, 4, seed=1)
    expected = sqnr_db(a[entries], b[entries])
    assert one(f"output_sqnr_db:y{selection}", a, b) == pytest.approx(expected, abs=1e-9)


def test_one_entry_cuts_the_only_axis_where_there_is_one() -> None:
    a, b = normal(6), normal(6, seed=1)
    assert one("output_sqnr_db:y[2:4]", a, b) == pytest.approx(sqnr_db(a[2:4], b[2:4]))


@pytest.mark.parametrize("selection", ["[9:12]", "[7]", "[:, :, :, 0]", "[0, 3:3]"])
def test_a_selection_of_nothing_is_refused(selection: str) -> None:
    with pytest.raises(FeedError, match=r"selects nothing of shape \[2, 5, 4\]"):
        one(f"output_sqnr_db:y{selection}", normal(2, 5, 4), normal(2, 5, 4))


@pytest.mark.parametrize(
    ("shape", "text", "chosen"),
    [
        # Equal shapes: element by element.
        ((1, 6, 4), "{s>0.3}", lambda s: s > 0.3),
        # An axis of length 1 is repeated.
        ((1, 6, 3), "{s[..., 1]<=0.3}", lambda s: np.repeat(s[..., 1:2] <= 0.3, 4, axis=2)),
        # Another length: where any satisfies it.
        ((1, 6, 3), "{s>1}", lambda s: np.repeat((s > 1).any(2, keepdims=True), 4, axis=2)),
        ((1, 2, 4), "{s != 0.5}", lambda s: np.repeat((s != 0.5).any(1, keepdims=True), 6, axis=1)),
    ],
)  # fmt: skip
def test_a_condition_chooses_by_the_float_model(shape: Any, text: str, chosen: Any) -> None:
    a, b, s = normal(1, 6, 4), normal(1, 6, 4, seed=1), normal(*shape, seed=2)
    metric = parse_metric(f"output_sqnr_db:y{text}", ["y", "s"])
    found = pooled(metric, [({"y": a, "s": s}, {"y": b, "s": normal(*shape, seed=3)})])
    where = chosen(s)
    assert where.sum() > 0
    assert found == pytest.approx(sqnr_db(a[where], b[where]), abs=1e-9)


def test_a_condition_goes_with_a_selection() -> None:
    a, b = normal(1, 9, 5, 5), normal(1, 9, 5, 5, seed=1)
    where = np.repeat(a[:, :1] > 0.5, 4, axis=1)
    expected = sqnr_db(a[:, 1:5][where], b[:, 1:5][where])
    assert one("output_sqnr_db:y[1:5]{y[0]>0.5}", a, b) == pytest.approx(expected, abs=1e-9)


def test_a_condition_that_never_holds_has_no_figure() -> None:
    assert math.isnan(one("output_sqnr_db:y{y>99}", normal(3, 4), normal(3, 4)))


@pytest.mark.parametrize("shape", [(1, 6), (1, 3, 2), (6, 4)])
def test_a_condition_of_an_unlike_shape_is_refused(shape: Any) -> None:
    metric = parse_metric("output_sqnr_db:y{s>0}", ["y", "s"])
    with pytest.raises(FeedError, match="the condition on s has shape"):
        metric.sums(0, {"y": normal(1, 6, 4), "s": normal(*shape)}, {"y": normal(1, 6, 4)})


# -- classes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [1, 5])
def test_label_accuracy_is_that_of_sorted_classes(best: int) -> None:
    rows = [30, 1, 20]
    labels = rng(1).integers(0, 9, sum(rows)).tolist()
    feeds = Rows(rows, labels)
    sides = []
    hits = [0, 0]
    at = 0
    for sample, count in enumerate(rows):
        pair = [np.round(normal(count, 9, seed=s + sample)) for s in (0, 50)]  # with ties
        sides.append(({"y": pair[0]}, {"y": pair[1]}))
        for row in range(count):
            for side in (0, 1):
                values = pair[side][row].tolist()
                ranked = sorted(range(9), key=lambda k: (-values[k], k))
                hits[side] += labels[at] in ranked[:best]
            at += 1
    assert pooled(parse_metric(f"top{best}", ["y"], feeds), sides) == hits[1] / sum(rows)
    drop = (hits[0] - hits[1]) / sum(rows)
    assert pooled(parse_metric(f"top{best}_drop", ["y"], feeds), sides) == pytest.approx(drop)
    assert hits[0] != hits[1]


def test_the_output_with_as_many_classes_as_labels_is_judged() -> None:
    metric = parse_metric("top1", ["few", "box", "many"], Rows([1], [6]))
    arrays = {"few": normal(1, 3), "box": normal(1, 4, 5), "many": np.eye(8)[6][None]}
    assert metric.figure(metric.sums(0, arrays, arrays)) == 1
    with pytest.raises(FeedError, match="no output holds 8 or more classes for each of 1 row"):
        parse_metric("top1", ["few", "box"], Rows([1], [7])).sums(0, arrays, arrays)
    with pytest.raises(FeedError, match="no output holds 6 or more classes"):
        parse_metric("top5", ["few"], Rows([1], [0])).sums(0, arrays, arrays)


def test_agreement_counts_rows_and_argmax_positions() -> None:
    a, b = normal(6, 4), normal(6, 4, seed=1)
    same = np.mean([np.argmax(x) == np.argmax(y) for x, y in zip(a, b, strict=True)])
    assert 0 < same < 1
    assert one("agreement", a, b, Rows([6])) == same
    # Each axis may be a batch, positions or pixels.
    assert one("argmax", a.reshape(2, 3, 4), b.reshape(2, 3, 4)) == same
    moved = [v.reshape(2, 3, 4).transpose(0, 2, 1) for v in (a, b)]
    assert one("argmax@axis=1", *moved) == same
    assert one("argmax@axis=-2", *moved) == same
    with pytest.raises(FeedError, match="expected an axis 3"):
        one("argmax@axis=3", *moved)


def test_agreement_of_an_output_with_positions_points_to_argmax() -> None:
    with pytest.raises(FeedError) as caught:
        one("agreement", normal(2, 3, 4), normal(2, 3, 4), Rows([2]))
    assert "Use argmax" in caught.value.hint


def brute_iou(pairs: list[tuple[Any, Any]], classes: int) -> float:
    """One class after the other, one pixel after the other."""
    shares = []
    for kind in range(classes):
        shared = either = 0
        for a, b in pairs:
            for x, y in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True):
                shared += x == kind == y
                either += kind in (x, y)
        if either:
            shares.append(shared / either)
    return float(np.mean(shares))


def test_mean_iou_pools_pixels_of_every_class_over_samples() -> None:
    metric = parse_metric("mean_iou", ["y"])
    sides, chosen = [], []
    for at, size in enumerate(((4, 5), (3, 3))):  # ragged
        a, b = (normal(1, 6, *size, seed=at), normal(1, 6, *size, seed=9 + at))
        a[:, 5], b[:, 5] = -9, -9  # a class that nobody chooses
        sides.append(({"y": a}, {"y": b}))
        chosen.append((a.argmax(1), b.argmax(1)))
    assert pooled(metric, sides) == pytest.approx(brute_iou(chosen, 6))


def test_mean_iou_of_one_channel_takes_a_threshold() -> None:
    a, b = normal(1, 1, 4, 5), normal(1, 1, 4, 5, seed=1)
    expected = brute_iou([((a > 0.2).astype(int), (b > 0.2).astype(int))], 2)
    assert one("mean_iou@threshold=0.2", a, b) == pytest.approx(expected)
    with pytest.raises(FeedError, match="expected several classes on axis 1"):
        one("mean_iou", a, b)
    with pytest.raises(FeedError, match="expected one channel on axis 1"):
        one("mean_iou@threshold=0", normal(1, 2, 4, 5), normal(1, 2, 4, 5))


def test_mean_iou_along_the_last_axis() -> None:
    a, b = normal(1, 4, 5, 3), normal(1, 4, 5, 3, seed=1)
    expected = brute_iou([(a.argmax(-1), b.argmax(-1))], 3)
    assert one("mean_iou@axis=-1", a, b) == pytest.approx(expected)


def test_pixels_with_nan_are_a_class_that_is_never_right() -> None:
    a = np.zeros((1, 2, 1, 4), np.float32)
    a[:, 0] = 1
    b = a.copy()
    b[0, 1, 0, 3] = math.nan
    assert one("mean_iou", a, a) == 1
    assert one("mean_iou", a, b) == one("mean_iou", b, a) == one("mean_iou", b, b) == 0.5


# -- boxes -------------------------------------------------------------------------------------


def test_detection_f1_is_twice_the_pairs_over_all_boxes() -> None:
    a = np.zeros((1, 4, 6), np.float32)
    a[0, :3] = [[0, 0, 10, 10, 0.9, 1], [20, 0, 30, 10, 0.8, 1], [40, 0, 50, 10, 0.7, 2]]
    b = a.copy()
    b[0, 0, :4] += 1  # IoU 81/119
    b[0, 2, 5] = 3
    b[0, 3] = [90, 90, 99, 99, 0.5, 1]
    assert one("detection_f1", a, b) == pytest.approx(2 * 2 / (3 + 4))
    assert one("detection_f1@iou=0.7", a, b) == pytest.approx(2 * 1 / (3 + 4))
    assert one("detection_f1@score=0.6", a, b) == pytest.approx(2 * 2 / (3 + 3))
    assert one("detection_f1:y@nms6,score=0.85", a, b) == pytest.approx(1)
    assert math.isnan(one("detection_f1@score=0.99", a, b))


def test_detection_f1_reads_a_batch_picture_by_picture() -> None:
    a = np.zeros((2, 1, 6), np.float32)
    a[0, 0] = [0, 0, 10, 10, 0.9, 1]
    b = a[::-1].copy()  # the same box in the other picture
    assert one("detection_f1", a, b, Rows([2])) == 0
    assert one("detection_f1", a, a, Rows([2])) == 1


def test_suppression_and_classes_are_options() -> None:
    values = np.zeros((1, 9, 10), np.float32)
    values[0, :4, 0] = values[0, :4, 1] = [5, 5, 4, 4]
    values[0, 1, 1] = 6  # IoU 0.6 with the first
    values[0, 4, :2] = 0.9, 0.8
    values[0, 6:] = 7  # masks
    shifted = values.copy()
    shifted[0, 4, 1] = 0
    assert one("detection_f1@yolov8,classes=2", values, shifted) == 1
    assert one("detection_f1@yolov8,classes=2,nms=0.7", values, shifted) == pytest.approx(2 / 3)


def test_detection_f1_of_two_outputs_takes_boxes_first() -> None:
    boxes, scores = np.float32([[[0, 0, 1, 1]]]), np.float32([[[0.1, 0.9]]])
    arrays = {"b": boxes, "s": scores}
    metric = parse_metric("detection_f1:b+s@ssd", ["s", "b"])
    assert metric.figure(metric.sums(0, arrays, arrays)) == 1
    with pytest.raises(FeedError, match="output s has shape"):
        parse_metric("detection_f1:s+b@ssd", ["s", "b"]).sums(0, arrays, arrays)


# -- embeddings --------------------------------------------------------------------------------


def cosine(a: Any, b: Any) -> float:
    a, b = (np.asarray(v, np.float64).ravel() for v in (a, b))
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


def test_cosine_is_the_mean_over_rows() -> None:
    a, b = normal(5, 8), normal(5, 8, seed=1)
    expected = np.mean([cosine(x, y) for x, y in zip(a, b, strict=True)])
    assert one("cosine", a, b, Rows([5])) == pytest.approx(expected, abs=1e-12)
    # One row: the whole output is one vector.
    assert one("cosine", a, b, Rows([1])) == pytest.approx(cosine(a, b), abs=1e-12)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_cosine_pools_over_what_is_no_padding(pooling: str) -> None:
    a, b = normal(2, 6, 8), normal(2, 6, 8, seed=1)
    lengths = [4, 6]

    def parts(_name: str, values: Any) -> list[Any]:
        return [values[row : row + 1, :length] for row, length in enumerate(lengths)]

    metric = parse_metric(f"cosine@{pooling}", ["y"], Rows([2]))
    expected = []
    for row, length in enumerate(lengths):
        x, y = (v[row, :length].astype(np.float64) for v in (a, b))
        if pooling == "mean":
            expected.append(cosine(sum(x) / length, sum(y) / length))
        else:
            expected.append(cosine(x[0], y[0]))
    found = metric.figure(metric.sums(0, {"y": a}, {"y": b}, parts))
    assert found == pytest.approx(np.mean(expected), abs=1e-12)
    with pytest.raises(FeedError, match="expected \\(rows, positions, width\\)"):
        one(f"cosine@{pooling}", normal(2, 8), normal(2, 8))


def brute_overlap(a: Sequence[Any], b: Sequence[Any], k: int) -> float:
    """One row after the other, all cosines in a list."""
    shares = []
    for at in range(len(a)):
        near = []
        for vector in (a[at], b[at]):
            others = [n for n in range(len(a)) if n != at]
            others.sort(key=lambda n: -cosine(vector, a[n]))
            near.append(set(others[:k]))
        shares.append(len(near[0] & near[1]) / k)
    return float(np.mean(shares))


@pytest.mark.parametrize(("option", "k"), [("", 5), ("@k=1", 1), ("@k=3", 3)])
def test_neighbours_are_looked_for_among_the_float_models_vectors(option: str, k: int) -> None:
    feeds = Rows([4, 1, 9])
    sides = [
        ({"y": normal(n, 6, seed=at)}, {"y": normal(n, 6, seed=at) + normal(n, 6, seed=77)})
        for at, n in enumerate(feeds.rows)
    ]
    metric = prepared(
        parse_metric(f"neighbour_overlap{option}", ["y"], feeds), ((a, whole) for a, _ in sides)
    )
    a, b = (np.concatenate([side[at]["y"] for side in sides]) for at in (0, 1))
    expected = brute_overlap(a, b, k)
    assert 0 < expected < 1
    assert pooled(pickle.loads(pickle.dumps(metric)), sides) == pytest.approx(expected)
    assert pooled(metric, [(x, x) for x, _ in sides]) == 1


def test_few_rows_have_half_of_the_others_as_neighbours() -> None:
    sides = [({"y": normal(1, 6, seed=at)}, {"y": normal(1, 6, seed=9 + at)}) for at in range(7)]
    metric = prepared(parse_metric("neighbour_overlap", ["y"]), ((a, whole) for a, _ in sides))
    a, b = ([side[at]["y"] for side in sides] for at in (0, 1))
    assert pooled(metric, sides) == pytest.approx(brute_overlap(a, b, 3))


def test_a_vector_with_nan_has_no_neighbours_and_is_nobodys() -> None:
    sides = [({"y": normal(1, 6, seed=at)}, {"y": normal(1, 6, seed=at)}) for at in range(5)]
    sides[2][1]["y"][0, 0] = math.nan
    metric = prepared(parse_metric("neighbour_overlap@k=2", ["y"]), ((a, whole) for a, _ in sides))
    assert pooled(metric, sides) == pytest.approx(4 / 5)
    sides[2][0]["y"][0, 0] = math.nan
    metric = prepared(parse_metric("neighbour_overlap@k=2", ["y"]), ((a, whole) for a, _ in sides))
    assert pooled(metric, sides) == pytest.approx(4 / 5)


def test_neighbours_need_enough_vectors_of_one_length() -> None:
    metric = parse_metric("neighbour_overlap", ["y"])
    with pytest.raises(FeedError, match="has not seen the float model's outputs"):
        metric.sums(0, {"y": normal(1, 6)}, {"y": normal(1, 6)})
    with pytest.raises(FeedError, match="2 rows are too few"):
        prepared(metric, [({"y": normal(1, 6)}, whole)] * 2)
    with pytest.raises(FeedError, match="5 rows are too few to have 4"):
        prepared(parse_metric("neighbour_overlap@k=4", ["y"]), [({"y": normal(1, 6)}, whole)] * 5)
    with pytest.raises(FeedError, match="vectors of unequal length") as caught:
        prepared(metric, [({"y": normal(1, n, 6)}, whole) for n in (4, 5, 6)])
    assert "@mean" in caught.value.hint


# -- distributions -----------------------------------------------------------------------------


def brute_kl(a: Any, b: Any) -> float:
    """Of logits, one position after the other."""
    total = []
    for x, y in zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True):
        p, q = ([math.exp(float(v)) for v in row] for row in (x, y))
        p, q = ([v / sum(row) for v in row] for row in (p, q))
        total.append(sum(s * math.log(s / t) for s, t in zip(p, q, strict=True)))
    return float(np.mean(total))


def test_kl_is_that_of_the_softmax_per_position() -> None:
    a, b = normal(2, 3, 5), normal(2, 3, 5, seed=1)
    expected = brute_kl(a, b)
    assert one("kl", a, b) == pytest.approx(expected, rel=1e-9)
    assert one("kl@logits", a * 1.0, b + 900) == pytest.approx(expected, rel=1e-3)  # no overflow
    moved = [v.transpose(0, 2, 1) for v in (a, b)]
    assert one("kl@axis=1", *moved) == pytest.approx(expected, rel=1e-9)
    assert one("kl", a, a) == 0


def test_kl_of_probabilities_takes_them_as_they_are() -> None:
    a, b = (np.exp(normal(4, 5, seed=s)) for s in (0, 1))
    p, q = (v / v.sum(-1, keepdims=True) for v in (a, b))
    assert one("kl@probabilities", p, q) == pytest.approx(brute_kl(np.log(a), np.log(b)), rel=1e-5)
    # Quantized ones need not sum to 1, and may be 0.
    p, q = np.float64([[0.5, 0.5, 0]]), np.float64([[0.8, 0, 0]])
    c = LEAST_PROBABILITY
    ours, others = (np.array(v) / sum(v) for v in ([0.5, 0.5, c], [0.8, c, c]))
    expected = sum(s * math.log(s / t) for s, t in zip(ours, others, strict=True))
    assert one("kl@probabilities", p, q) == pytest.approx(expected, rel=1e-12)


def test_kl_refuses_to_guess_what_looks_like_probabilities() -> None:
    p = np.float32([[0.25, 0.75]])
    with pytest.raises(FeedError, match="output y looks like probabilities"):
        one("kl", p, p)
    assert one("kl@logits", p, p) == 0


def test_kl_of_masked_logits_is_finite_and_of_excluded_ones_infinite() -> None:
    a = np.float32([[1, 2, -math.inf]])
    assert one("kl", a, np.float32([[1, 2, -math.inf]])) == 0
    lost = math.log(1 + 1 / (math.e + math.e**2))  # of what is possible, to the third class
    assert one("kl", a, np.float32([[1, 2, 0]])) == pytest.approx(lost)
    assert one("kl", np.float32([[1, 2, 0]]), a) == math.inf
    assert math.isnan(one("kl", np.float32([[math.inf, 2, 0]]), a))


# -- expected values ---------------------------------------------------------------------------


def written(folder: Path, text: str) -> Path:
    path = folder / "expected.csv"
    path.write_bytes(text.encode())
    return path


def test_expected_values_give_the_mean_absolute_error(tmp_path: Path) -> None:
    lines = ["\ufeffsample,a,b", "01.npz,0.5,-1e3", "00.npz, 1 ,2", "", "more,0,0", ""]
    path = written(tmp_path, "\r\n".join(lines))
    metric = parse_metric("expected", ["y"], Rows([1, 1]), expected=path)
    assert (metric.higher_is_better, metric.unit) == (False, "")
    arrays = [{"y": np.float32([[1.5, 2]])}, {"y": np.float32([[0, 0]])}]
    assert pooled(metric, [(a, a) for a in arrays]) == (0.5 + 0 + 0.5 + 1000) / 4
    with pytest.raises(FeedError, match="expected 2 elements, as there are expected values"):
        metric.sums(0, {"y": normal(1, 3)}, {"y": normal(1, 3)})


def test_expected_classes_give_the_accuracy(tmp_path: Path) -> None:
    path = written(tmp_path, "sample,class\n00.npz,2\n01.npz,0\n")
    metric = parse_metric("expected", ["y"], Rows([1, 1]), expected=path)
    assert metric.higher_is_better
    eye = np.eye(3, dtype=np.float32)
    assert pooled(metric, [({"y": eye[:1]}, {"y": eye[2:]})] * 2) == 0.5
    with pytest.raises(FeedError, match="samples hold several rows"):
        parse_metric("expected", ["y"], Rows([1, 2]), expected=path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "row 1: found nothing, expected a header"),
        ("sample\n", "row 1: found sample, expected a header"),
        ("name,a\n", "row 1: found name,a, expected a header"),
        ("sample,a\n", "row 2: there are no samples"),
        ("sample,a\n00.npz,1\n00.npz,2\n", "row 3: sample 00.npz is there twice"),
        ("sample,a\n,1\n", "row 2: no sample is named"),
        ("sample,a\n00.npz\n", "row 2: found 1 cells, expected 2"),
        ("sample,a\n00.npz,1,2\n", "row 2: found 3 cells, expected 2"),
        ("sample,a\n00.npz,x\n", "row 2: found 'x', expected a finite number"),
        ("sample,a\n00.npz,nan\n", "row 2: found 'nan', expected a finite number"),
        ("sample,a\n00.npz,inf\n", "row 2: found 'inf', expected a finite number"),
        ("sample,a\n00.npz,\n", "row 2: found '', expected a finite number"),
        ("sample,class\n00.npz,-1\n", "row 2: found '-1', expected a class number"),
        ("sample,class\n00.npz,1.0\n", "row 2: found '1.0', expected a class number"),
        ('sample,a\n"00.npz,1\n', "cannot be read"),
    ],
)
def test_files_of_expected_values_are_read_strictly(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(FeedError) as caught:
        read_expected(written(tmp_path, text))
    assert message in caught.value.message
    assert "sample,class" in caught.value.hint


def test_a_sample_without_expected_values_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "sample,a\n00.npz,1\n")
    with pytest.raises(FeedError, match=r"has no row for sample 01.npz"):
        parse_metric("expected", ["y"], Rows([1, 1]), expected=path)
    with pytest.raises(FeedError, match="cannot be read"):
        parse_metric("expected", ["y"], Rows([1]), expected=tmp_path / "nothing.csv")


# -- a user's own ------------------------------------------------------------------------------


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_metric.py").write_text(
        "def largest(reference, actual, sample):\n"
        "    return sample + abs(reference['y'] - actual['y']).max()\n"
        "largest.higher_is_better = False\n"
        "largest.unit = 'V'\n"
        "def broken(reference, actual, sample):\n"
        "    return reference['z']\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("own_metric", None)


@pytest.mark.usefixtures("own_module")
def test_a_users_function_is_averaged_over_samples() -> None:
    metric = parse_metric("own_metric:largest", ["y"], allow_code=True)
    assert (metric.higher_is_better, metric.unit) == (False, "V")
    sides = [({"y": np.float32([1, 2])}, {"y": np.float32([1, 2.5])})] * 2
    assert pooled(metric, sides) == (0.5 + 1.5) / 2


@pytest.mark.usefixtures("own_module")
def test_no_code_runs_unless_it_is_allowed() -> None:
    with pytest.raises(FeedError, match="no metric is called 'own_metric'"):
        parse_metric("own_metric:largest", ["y"])
    assert "own_metric" not in sys.modules


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("own_metric:number", "own_metric:number is no function"),
        ("own_metric:nothing", "cannot be imported: AttributeError"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_what_is_no_function_is_refused(text: str, message: str) -> None:
    with pytest.raises(FeedError, match=message):
        parse_metric(text, ["y"], allow_code=True)


@pytest.mark.usefixtures("own_module")
def test_a_function_that_raises_is_named() -> None:
    metric = parse_metric("own_metric:broken", ["y"], allow_code=True)
    with pytest.raises(FeedError, match="own_metric:broken raised KeyError on sample 0"):
        metric.sums(0, {"y": normal(1)}, {"y": normal(1)})


# -- real pairs --------------------------------------------------------------------------------


def compared(
    folder: Path, quantized: str, *texts: str, limit: int | None = None, **options: Any
) -> Comparison:
    float_name = "model.onnx" if (folder / "model.onnx").exists() else "float.onnx"
    float_model = load_model(folder / float_name)
    inputs = folder / "inputs" if (folder / "inputs").exists() else folder / "feeds"
    feeds = load_feeds(inputs, float_model, limit=limit)
    outputs = [o.name for o in float_model.outputs]
    return compare_models(
        float_model, load_model(folder / quantized), feeds, measure_latency=False,
        explain_deployed=False, metrics=[parse_metric(t, outputs, feeds) for t in texts], **options,
    )  # fmt: skip


def test_a_comparison_gives_the_metrics_of_both_runs() -> None:
    found = compared(
        ROOT / "sample_models" / "digit-detector", "quantized.onnx",
        "output_sqnr_db", "detection_f1", "output_sqnr_db:output0[4:]", limit=3,
    )  # fmt: skip
    sqnr, boxes, scores = found.metrics
    (output,) = found.outputs
    assert sqnr.simulated == pytest.approx(output.sqnr_db, abs=1e-3)
    assert sqnr.deployed == pytest.approx(output.deployed_sqnr_db, abs=1e-3)
    assert sqnr.float_figure == math.inf
    # sample_models/README.md: detects nothing, and its scores are silent.
    assert (boxes.float_figure, boxes.simulated, boxes.deployed, boxes.samples) == (1, 0, 0, 3)
    assert scores.simulated == pytest.approx(0.0, abs=0.05)


@needs_models
@pytest.mark.slow
def test_metrics_of_real_classifiers_are_those_of_the_task() -> None:
    found = compared(
        MODELS / "magika", "ort_static_qdq.onnx", "top1", "top1_drop", "agreement",
        "kl@probabilities",
    )  # fmt: skip
    top1, drop, agreement, divergence = found.metrics
    assert found.task is not None
    assert (top1.float_figure, top1.simulated) == (found.task.top1_float, 9 / 20)
    assert drop.simulated == pytest.approx(11 / 20)
    assert agreement.simulated == pytest.approx(found.task.top1_agreement)
    assert divergence.simulated > 1


@needs_models
@pytest.mark.slow
def test_metrics_of_real_embeddings_leave_padding_out() -> None:
    found = compared(
        MODELS / "minilm-l6", "ort_dynamic.onnx", "cosine", "neighbour_overlap",
        mask="attention_mask",
    )  # fmt: skip
    cosines, neighbours = found.metrics
    # shared/models/README.md: mean cosine 0.963.
    assert cosines.simulated == pytest.approx(0.963, abs=0.002)
    assert neighbours.float_figure == 1
    assert 0.7 < neighbours.simulated < 1
    assert neighbours.deployed is not None


@needs_models
@pytest.mark.slow
def test_metrics_of_real_detectors_are_measured_deployed_as_well() -> None:
    found = compared(MODELS / "ultraface-rfb320", "ort_static_qdq.onnx", "detection_f1")
    (boxes,) = found.metrics
    assert boxes.float_figure == 1
    assert 0.9 < boxes.simulated <= 1
    assert boxes.deployed == pytest.approx(boxes.simulated, abs=0.1)


def test_a_metric_of_an_output_without_partner_is_skipped_with_its_reason(tmp_path: Path) -> None:
    folder = ROOT / "sample_models" / "digit-detector"
    float_model, quantized = (load_model(folder / f"{n}.onnx") for n in ("float", "quantized"))
    metric = OutputSqnr(text="output_sqnr_db:gone", outputs=("gone",))
    found = compare_models(
        float_model, quantized, random_feeds(float_model, samples=1), metrics=[metric],
        measure_latency=False, explain_deployed=False,
    )  # fmt: skip
    assert found.metrics == ()
    (skipped,) = [s for s in found.skipped if s.name == "output_sqnr_db:gone"]
    assert skipped.reason == "output gone: it has no partner that can be read"


def test_an_output_that_is_gone_on_one_sample_leaves_no_figure() -> None:
    watch = MetricWatch(parse_metric("output_sqnr_db", ["a", "b"]))
    both = {"a": normal(3), "b": normal(3)}
    watch.add(0, both, both, both, both)
    found = watch.figure()
    assert found is not None
    assert (found.simulated, found.deployed, found.samples) == (math.inf, math.inf, 1)
    watch.add(1, both, {"a": both["a"]}, {}, {})
    watch.add(2, both, both, both, both)
    assert watch.lacks == "b"
    assert watch.figure() is None


def test_presets_are_options_of_the_command_line() -> None:
    assert set(PRESETS) < set(METRICS["detection_f1"].options)


# -- the command line --------------------------------------------------------------------------

SAMPLE = ROOT / "sample_models" / "digit-detector"
COMPARE = (
    "compare", str(SAMPLE / "float.onnx"), str(SAMPLE / "quantized.onnx"), "--inputs",
    str(SAMPLE / "feeds"), "--samples", "2", "--no-findings",
)  # fmt: skip


def test_compare_gives_metrics_as_text_and_json_and_fails_by_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # What a gate judges is measured, whether or not it is asked for.
    words = [*COMPARE, "--metric", "detection_f1"]
    target = tmp_path / "found.json"
    goals = ["--fail-under", "detection_f1=0.9", "--fail-under", "output_sqnr_db:output0[:4]=30"]
    assert main([*words, *goals, "--fail-under", "20", "--json", str(target)]) == 1
    out, err = capsys.readouterr()
    assert "  detection_f1: float 1, simulated 0, deployed 0 (higher is better)\n" in out
    assert "gate failed: detection_f1 is 0 deployed, wanted at least 0.9" in err
    assert err.count("gate failed") == 1
    first, second = json.loads(target.read_text())["metrics"]
    assert first == {
        "metric": "detection_f1", "unit": "", "higher_is_better": True, "float": 1.0,
        "simulated": 0.0, "deployed": 0.0, "samples": 2,
    }  # fmt: skip
    assert (second["float"], second["unit"]) == ("Infinity", "dB")
    assert second["deployed"] > 30


@pytest.mark.usefixtures("own_module")
def test_compare_runs_a_users_function(
    capsys: pytest.CaptureFixture[str], own_module: Path
) -> None:
    (own_module / "expected.csv").write_text("sample,class\n00.png,1\n01.png,2\n")
    (own_module / "spread.py").write_text(
        "def spread(reference, actual, sample):\n"
        "    return float(abs(reference['output0'] - actual['output0']).max())\n"
        "spread.higher_is_better = False\n"
    )
    words = [*COMPARE, "--metric", "spread:spread", "--fail-under", "spread:spread=0"]
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert re.search(r"spread:spread: float 0, simulated [1-9].*\(lower is better\)", out)
    assert re.search(r"gate failed: spread:spread is .* deployed, wanted at most 0\n", err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metric", "nothing"], "no metric is called 'nothing'"),
        (["--metric", "top1"], "top1 needs labels"),
        (["--metric", "expected", "--expected", "gone.csv"], "gone.csv cannot be read"),
        (["--fail-under", "top1=x"], "names no metric and number"),
        (["--fail-under", "many"], "--fail-under takes a number of decibels, or METRIC=VALUE"),
    ],
)
def test_metrics_that_cannot_be_end_the_command(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMPARE, *words]) == 2
    assert message in capsys.readouterr().err


def test_metrics_cross_json_and_back() -> None:
    folder = ROOT / "sample_models" / "digit-transformer"
    float_model, quantized = (load_model(folder / f"{n}.onnx") for n in ("float", "quantized"))
    feeds = load_feeds(folder / "feeds.npz", float_model, limit=8)
    found = compare_models(
        float_model, quantized, feeds, measure_latency=False, explain_deployed=False,
        metrics=[parse_metric(t, ["logits"], feeds) for t in ("output_sqnr_db", "top1_drop")],
    )  # fmt: skip
    again = read_comparison(json.loads(dump_json(comparison_json(found, detail=True))))
    assert again.metrics == found.metrics
    assert len(found.metrics) == 2


# -- lists, recipes and the app ----------------------------------------------------------------


def test_a_preview_measures_what_the_requantized_file_gives(tmp_path: Path) -> None:
    model = load_model(SAMPLE / "float.onnx")
    feeds = load_feeds(SAMPLE / "feeds", model, limit=2)
    config, exclude = QuantConfig(), ["/head/Concat_3"]
    metric = parse_metric("detection_f1", ["output0"], feeds)
    prepared_model = prepare(model, config, tmp_path)
    ranges = calibrate(prepared_model.model, feeds, cache=tmp_path)
    source = RecipeSource(prepared_model, config, ranges.path, feeds[0])
    preview = Previewer(model, source, feeds, metrics=[metric]).preview(exclude)
    made = quantize_model(
        model, config, calibration=feeds, exclude=exclude, output=tmp_path / "out.onnx",
        cache=tmp_path,
    )  # fmt: skip
    real = compare_models(
        model, load_model(made.path), feeds, metrics=[metric], measure_latency=False,
        explain_deployed=False,
    )  # fmt: skip
    (would,), (is_so,) = preview.metrics, real.metrics
    assert would.simulated == is_so.simulated > 0.8
    assert would.deployed is None
    assert is_so.deployed is not None


def test_recipes_are_set_beside_each_other_by_the_metric(tmp_path: Path) -> None:
    folder = ROOT / "sample_models" / "digit-transformer"
    model = load_model(folder / "float.onnx")
    feeds = load_feeds(folder / "feeds.npz", model, limit=10)
    split = split_calibration(feeds)
    rows = [row for row in recipe_grid(QuantConfig()) if not row.reason][:1]
    metric = parse_metric("kl", ["logits"], feeds)
    first, *_ = run_recipes(model, feeds, split, rows=rows, cache=tmp_path, metrics=[metric])
    (figure,) = first.metrics
    assert figure.float_figure == 0
    assert 0 < figure.simulated < 0.1
    table = recipes_json(model, feeds, [first], planned=rows, seen=split.seen)
    assert table["rows"][0]["metrics"][0]["metric"] == "kl"
    header = next(line for line in recipes_text(table).splitlines() if line.startswith("  recipe "))
    assert " kl " in header


def test_a_pair_keeps_its_metric_for_runs_and_previews(tmp_path: Path) -> None:
    run_id = load_pair(
        tmp_path, float_path=SAMPLE / "float.onnx", quantized_path=SAMPLE / "quantized.onnx",
        inputs=FeedSource(
            kind="path", path=str(SAMPLE / "feeds"), preprocess=None, samples=2, title="feeds"
        ),
        options=PairOptions(metric="detection_f1"),
    )  # fmt: skip
    workspace = Workspace(tmp_path)
    run = workspace.run(run_id)
    assert workspace.pair(run.pair_id).options.metric == "detection_f1"
    (figure,) = workspace.comparison(run_id)["metrics"]
    assert (figure["float"], figure["simulated"]) == (1.0, 0.0)
    found = preview_list(
        tmp_path, run_id=run_id, config=dict(run.recipe), exclude=["/head/Concat_3"]
    )
    assert found["reason"] == ""
    assert [f["simulated"] for f in found["without_metrics"]] == [0.0]
    assert found["metrics"][0]["simulated"] > 0.8


def test_the_app_never_runs_a_users_code(tmp_path: Path) -> None:
    options = PairOptions(metric="os:getcwd")
    with pytest.raises(FeedError, match="no metric is called 'os'"):
        load_pair(
            tmp_path, float_path=SAMPLE / "float.onnx", quantized_path=SAMPLE / "quantized.onnx",
            inputs=FeedSource(
                kind="path", path=str(SAMPLE / "feeds"), preprocess=None, samples=1, title="feeds"
            ),
            options=options,
        )  # fmt: skip
    assert not Workspace(tmp_path).pairs()


def test_choices_name_an_output_where_one_of_several_is_meant() -> None:
    assert "cosine" in metric_choices(["y"])
    found = metric_choices([f"y{at}" for at in range(9)])
    assert [text for text in found if text.startswith("cosine")] == [
        "cosine:y0", "cosine:y1", "cosine:y2", "cosine:y3",
    ]  # fmt: skip
    assert not [text for text in found if text.startswith("expected")]
    assert metric_choices([]) == {}
    for text in found:
        parse_metric(text, [f"y{at}" for at in range(9)], Rows([1], [0]))


def figure_of(**changes: Any) -> TaskFigure:
    fields: dict[str, Any] = {
        "metric": "detection_f1", "unit": "", "higher_is_better": True, "float_figure": 1.0,
        "simulated": 0.91236, "deployed": 0.9, "samples": 7, **changes,
    }  # fmt: skip
    return TaskFigure(**fields)


def test_a_tile_shows_what_ships_beside_float_and_simulated() -> None:
    label, value, caption, meaning = metric_tile(figure_of())
    assert (label, value) == ("Task: detection_f1", "0.9")
    assert caption == "float 1 · simulated 0.9124"
    assert "over 7 samples. Higher is better" in meaning
    assert metric_tile(figure_of(deployed=None))[1:3] == ("0.9124", "float 1")
    assert metric_tile(figure_of(unit="dB", deployed=31.26))[1] == "31.3 dB"
    assert "Lower is better" in metric_tile(figure_of(higher_is_better=False))[3]
    nothing = figure_of(float_figure=math.nan, simulated=math.nan, deployed=math.nan)
    assert metric_tile(nothing)[1:3] == ("NaN", "nothing counts on these samples")


def test_a_text_says_which_direction_is_good_and_shows_hostile_names_safely() -> None:
    text = metric_text(figure_of(metric="cosine:\x1b[31m", unit="nats", higher_is_better=False))
    assert text.startswith("cosine:\\x1b[31m: float 1 nats, simulated 0.9124 nats")
    assert text.endswith("deployed 0.9 nats (lower is better)")
    assert format_figure(None, "") == "–"
    assert format_figure(math.nan, "") == format_figure(math.nan, "dB") == "NaN"


@pytest.mark.parametrize("text", ["top1=95", "agreement=1.5", "detection_f1:a@yolov8=-0.1"])
def test_a_share_beyond_0_to_1_is_refused_with_what_was_meant(text: str) -> None:
    with pytest.raises(FeedError, match="is a share from 0 to 1") as found:
        split_target(text)
    assert ("top1=0.95 for 95 %" in found.value.hint) is (text == "top1=95")
