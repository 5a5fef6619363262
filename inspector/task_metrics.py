"""The task metrics that a text can name, and their figures over the samples of a comparison.

Apart from `output_metrics`, which computes, because texts come from the command line and from pages
and are read strictly: ``NAME[:OUTPUT][@OPTION,…]``, see `parse_metric`.
"""

from __future__ import annotations

import csv
import importlib
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector import detections
from inspector.arrays import listed, nearest
from inspector.comparison import TaskFigure
from inspector.errors import FeedError
from inspector.feeds import Feeds
from inspector.model import FLOAT_DTYPES, Model
from inspector.output_metrics import (
    OWN_ERRORS,
    SIGNS,
    Agreement,
    Condition,
    DetectionF1,
    ExpectedValues,
    KlDivergence,
    LabelAccuracy,
    MeanCosine,
    MeanIou,
    NeighbourOverlap,
    Outputs,
    OutputSqnr,
    OwnMetric,
    Parts,
    PositionAgreement,
    SelectedSqnr,
    Selection,
    TaskMetric,
    prepared,
    whole,
)
from inspector.padding import Padding

__all__ = [
    "METRICS",
    "MetricWatch",
    "OutputSqnr",
    "Outputs",
    "Parts",
    "TaskMetric",
    "comparable_outputs",
    "metric_choices",
    "metric_hint",
    "misses",
    "parse_metric",
    "prepared",
    "read_expected",
    "split_target",
    "whole",
]

Floats = NDArray[np.float64]

# -- expected values ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What should come out, by sample name.

    Attributes:
        kind: "class" for one class each, "values" for as many numbers as an output has elements.
        values: by sample name.
    """

    kind: str
    values: Mapping[str, tuple[float, ...]]


_CSV_HINT = (
    "Write a header and one line per sample: sample,class with a class number, or sample,y0,y1,… "
    "with one number per output element."
)


def read_expected(path: Path) -> Expected:
    """Expected values from a CSV file.

    The first line is a header, whose first column is called ``sample``. A single further column
    called ``class`` holds class numbers; otherwise the further columns, whatever their names, hold
    one finite number per element of the output in row-major order. Samples are called as in the
    feeds; each has one line.

    Raises:
        FeedError: the file cannot be read, or a line that is named does not fit.
    """

    def refuse(row: int, what: str) -> FeedError:
        return FeedError(f"{path.name}, row {row}: {what}", hint=_CSV_HINT)

    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise FeedError(f"{path.name} cannot be read: {reason}", hint=_CSV_HINT) from error
    header = [cell.strip() for cell in lines[0]] if lines else []
    if len(header) < 2 or header[0] != "sample":
        found = ",".join(header)[:80] or "nothing"
        raise refuse(1, f"found {found}, expected a header sample,… with at least one more column")
    kind = "class" if header[1:] == ["class"] else "values"
    values: dict[str, tuple[float, ...]] = {}
    for row, cells in enumerate(lines[1:], start=2):
        if not cells:
            continue  # an empty line
        if len(cells) != len(header):
            raise refuse(row, f"found {len(cells)} cells, expected {len(header)}")
        name = cells[0].strip()
        if not name or name in values:
            raise refuse(row, f"sample {name} is there twice" if name else "no sample is named")
        numbers = []
        for cell in cells[1:]:
            wanted = "a class number of 0 or more" if kind == "class" else "a finite number"
            try:
                number = int(cell) if kind == "class" else float(cell)
            except ValueError:
                number = math.nan
            if not math.isfinite(number) or (kind == "class" and number < 0):
                raise refuse(row, f"found {cell.strip()[:40]!r}, expected {wanted}")
            numbers.append(float(number))
        values[name] = tuple(numbers)
    if not values:
        raise refuse(2, "there are no samples")
    return Expected(kind=kind, values=values)


def _own(text: str, outputs: tuple[str, ...]) -> OwnMetric:
    """The metric that a user's module holds; its code runs in this process.

    Raises:
        FeedError: it cannot be imported, or is no function.
    """
    module, _, name = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    hint = (
        "Name a module in this folder or an installed one, and a function in it: module:function."
    )
    try:
        function = getattr(importlib.import_module(module), name)
    except OWN_ERRORS as error:
        raise FeedError(
            f"{text} cannot be imported: {type(error).__name__}: {error}", hint=hint
        ) from error
    if not callable(function):
        raise FeedError(f"{text} is no function", hint=hint)
    return OwnMetric(
        text=text,
        outputs=outputs,
        function=function,
        unit=str(getattr(function, "unit", "")),
        higher_is_better=bool(getattr(function, "higher_is_better", True)),
    )


# -- texts -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Name:
    """One metric that a text can name.

    Attributes:
        says: what it is.
        options: that it takes.
        outputs: how many outputs may be named.
        several: where none is named, all are looked at.
        needs: "labels", "expected" or "" for neither.
    """

    says: str
    options: tuple[str, ...] = ()
    outputs: int = 1
    several: bool = False
    needs: str = ""


_POOLED = ("mean", "cls")
METRICS: dict[str, Name] = {
    "output_sqnr_db": Name(
        says="SQNR of an output or a part of it, by default the worst output", several=True
    ),
    "top1": Name(
        says="share of rows whose label has the largest value", several=True, needs="labels"
    ),
    "top5": Name(
        says="share of rows whose label is among the five largest", several=True, needs="labels"
    ),
    "top1_drop": Name(says="top1 of the float model minus top1", several=True, needs="labels"),
    "top5_drop": Name(says="top5 of the float model minus top5", several=True, needs="labels"),
    "agreement": Name(says="share of rows with the float model's class", several=True),
    "detection_f1": Name(
        says="F1 of boxes against the float model's",
        options=(*detections.PRESETS, "score", "iou", "nms", "classes"),
        outputs=2,
        several=True,
    ),
    "mean_iou": Name(
        says="mean IoU of segmented classes against the float model's",
        options=("axis", "threshold"),
    ),
    "cosine": Name(says="mean cosine of vectors", options=_POOLED),
    "neighbour_overlap": Name(says="share of nearest neighbours kept", options=(*_POOLED, "k")),
    "kl": Name(
        says="mean Kullback-Leibler divergence per position",
        options=("probabilities", "logits", "axis"),
    ),
    "argmax": Name(says="share of positions with the float model's class", options=("axis",)),
    "expected": Name(
        says="mean absolute error, or share of classes right, against a CSV", needs="expected"
    ),
}
_FLAGS = frozenset({*detections.PRESETS, *_POOLED, "probabilities", "logits"})
_WHOLE_NUMBERS = frozenset({"k", "axis", "classes"})
# What stands behind the name of an output.
_TAIL = re.compile(r"(?P<selection>\[[^\[\]]*\])?(?P<condition>\{.*\})?(?P<options>@[^@{}\[\]]*)?")


def metric_hint() -> str:
    """One imperative sentence that names every metric."""
    return f"Use one of {', '.join(METRICS)}."


@dataclass(kw_only=True, slots=True)
class _Text:
    """The parts of a metric's text."""

    name: str
    outputs: tuple[str, ...] = ()
    selection: str = ""
    condition: str = ""
    options: dict[str, str] = field(default_factory=dict)


def _tail(rest: str, outputs: Sequence[str], most: int) -> tuple[tuple[str, ...], str] | None:
    """The outputs at the start of a text, the longest names first, and what stands behind them."""
    for output in sorted(outputs, key=len, reverse=True):
        if output and rest.startswith(output):
            behind = rest[len(output) :]
            if _TAIL.fullmatch(behind):
                return (output,), behind
            if most > 1 and behind.startswith("+"):
                more = _tail(behind[1:], outputs, most - 1)
                if more is not None:
                    return (output, *more[0]), more[1]
    return None


def _no_output(text: str, rest: str, outputs: Sequence[str]) -> FeedError:
    near = nearest(re.split(r"[@\[{]", rest)[0], outputs)
    return FeedError(
        f"{text}: {rest!r} names no output that can be compared",
        hint=f"Name one of {listed(outputs, 8)}; nearest: {near}."
        if outputs
        else "Load a model whose outputs are floating-point values.",
    )


def _split(text: str, outputs: Sequence[str]) -> _Text:
    """The parts of a text.

    Raises:
        FeedError: no such metric or output, or a form that it does not take.
    """
    name = re.split(r"[:@\[{]", text, maxsplit=1)[0]
    if name not in METRICS:
        shown = f"no metric is called {name!r}"
        raise FeedError(f"{shown} (nearest: {nearest(name, list(METRICS))})", hint=metric_hint())
    rest = text[len(name) :]
    found = _Text(name=name)
    if rest.startswith(":"):
        named = _tail(rest[1:], outputs, METRICS[name].outputs)
        if named is None:
            raise _no_output(text, rest[1:], outputs)
        found.outputs, rest = named
    tail = _TAIL.fullmatch(rest)
    if tail is None or ((tail["selection"] or tail["condition"]) and not found.outputs):
        raise FeedError(
            f"{text}: {rest!r} cannot be read",
            hint="Write NAME:OUTPUT@OPTION,OPTION; [channels] and {condition} follow an output.",
        )
    found.selection, found.condition = tail["selection"] or "", tail["condition"] or ""
    if (found.selection or found.condition) and name != "output_sqnr_db":
        raise FeedError(
            f"{text}: {name} looks at whole outputs",
            hint="Leave [channels] and {condition} out; they go with output_sqnr_db.",
        )
    known = METRICS[name].options
    for option in (tail["options"] or "@")[1:].split(",") if tail["options"] else ():
        key, sign, given = (part.strip() for part in option.partition("="))
        if key not in known or key in found.options or bool(sign) == (key in _FLAGS):
            takes = ", ".join(k if k in _FLAGS else f"{k}=N" for k in known) or "none"
            raise FeedError(
                f"{text}: option {option.strip()!r} cannot be used",
                hint=f"Use the options of {name}, each once: {takes}.",
            )
        found.options[key] = given
    return found


def _number(text: str, options: Mapping[str, str], key: str, low: float, high: float) -> Any:
    """An option's number; None where it is not given.

    Raises:
        FeedError: no number, or one outside low..high.
    """
    if key not in options:
        return None
    kind = int if key in _WHOLE_NUMBERS else float
    try:
        number = kind(options[key])
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        what = "a whole number" if kind is int else "a number"
        raise FeedError(
            f"{text}: {key}={options[key]} is not {what} from {low:g} to {high:g}",
            hint=f"Write e.g. {key}={max(low, min(high, 1)):g}.",
        )
    return number


def _one_of(text: str, options: Mapping[str, str], words: Iterable[str]) -> str:
    """Which of several words is among the options; "" for none.

    Raises:
        FeedError: more than one.
    """
    found = [word for word in words if word in options]
    if len(found) > 1:
        raise FeedError(f"{text}: {' and '.join(found)} exclude each other", hint="Keep one.")
    return found[0] if found else ""


def _selection(text: str) -> Selection:
    """``[0:4]``, ``[3]``, ``[:, 4:]`` or ``[..., 1]``.

    Raises:
        FeedError: anything else.
    """
    entries: list[slice | EllipsisType] = []
    for part in text[1:-1].split(","):
        part = part.strip()
        if part == "..." and Ellipsis not in entries:
            entries.append(Ellipsis)
            continue
        numbers = [number.strip() for number in part.split(":")]
        try:
            ends = [int(number) if number else None for number in numbers]
        except ValueError:
            ends = []
        step = ends[2] if len(ends) == 3 else None
        if not part or not 1 <= len(ends) <= 3 or (step is not None and step < 1):
            raise FeedError(
                f"{text} is no selection: {part!r} is neither an index nor a slice",
                hint="Write e.g. [0:4], [3] or [:, 4:]; steps are 1 or more.",
            )
        if len(ends) == 1:
            at = ends[0]
            assert at is not None
            entries.append(slice(at, None if at == -1 else at + 1))
        else:
            entries.append(slice(*ends))
    return Selection(text=text, entries=tuple(entries))


_COMPARED = re.compile(rf"(.*?)\s*({'|'.join(SIGNS)})\s*([^<>=!]+)", re.DOTALL)


def _condition(text: str, outputs: Sequence[str]) -> Condition:
    """``{scores>0.3}`` or ``{out[4]>=0.25}``.

    Raises:
        FeedError: anything else, or an output that is not there.
    """
    parts = _COMPARED.fullmatch(text[1:-1].strip())
    try:
        number = float(parts[3]) if parts else math.nan
    except ValueError:
        number = math.nan
    if parts is None or math.isnan(number):
        raise FeedError(
            f"{text} is no comparison with a number",
            hint="Write an output, one of > >= < <= == != and a number, e.g. {scores>0.3}.",
        )
    named = _tail(parts[1], outputs, 1)
    tail = _TAIL.fullmatch(named[1]) if named else None
    if named is None or tail is None or tail["condition"] or tail["options"]:
        raise _no_output(text, parts[1], outputs)
    chosen = _selection(tail["selection"]) if tail["selection"] else None
    return Condition(output=named[0][0], selection=chosen, sign=parts[2], number=number)


def _the_output(text: _Text, outputs: Sequence[str], whole_text: str) -> tuple[str, ...]:
    """The output that is named, or the only one.

    Raises:
        FeedError: there are several and none is named.
    """
    if text.outputs or len(outputs) == 1:
        return text.outputs or tuple(outputs)
    raise FeedError(
        f"{whole_text}: the model has {len(outputs)} outputs that could be meant",
        hint=f"Name one, e.g. {text.name}:{outputs[0]}; there are {listed(outputs, 8)}.",
    )


def _labelled(text: str, outputs: tuple[str, ...], name: str, feeds: Feeds | None) -> LabelAccuracy:
    if feeds is None or feeds.labels is None:
        raise FeedError(
            f"{text} needs labels, and the feeds have none",
            hint="Write labels.json beside the feeds: one class number per sample in sorted file "
            "order, e.g. [3, 0, 7].",
        )
    labels, start = [], 0
    for rows in feeds.rows:
        labels.append(feeds.labels[start : start + rows])
        start += rows
    return LabelAccuracy(
        text=text,
        outputs=outputs,
        best=1 if name.startswith("top1") else 5,
        drop=name.endswith("_drop"),
        labels=tuple(labels),
    )


def _expecting(
    text: str, outputs: tuple[str, ...], feeds: Feeds | None, path: Path | None
) -> LabelAccuracy | ExpectedValues:
    if path is None or feeds is None:
        raise FeedError(f"{text} needs expected values", hint="Give --expected FILE.csv.")
    expected = read_expected(path)
    missing = [name for name in feeds.names if name not in expected.values]
    if missing:
        raise FeedError(
            f"{path.name} has no row for sample {listed(missing)}",
            hint=f"Call samples as the feeds do, e.g. {feeds.names[0]}.",
        )
    values = tuple(expected.values[name] for name in feeds.names)
    if expected.kind == "values":
        return ExpectedValues(text=text, outputs=outputs, expected=values)
    if any(rows != 1 for rows in feeds.rows):
        raise FeedError(
            f"{path.name} has one class per sample, but samples hold several rows",
            hint="Use top1 with labels.json, which has a label per row.",
        )
    classes = tuple((int(number),) for (number,) in values)
    return LabelAccuracy(text=text, outputs=outputs, best=1, drop=False, labels=classes)


def comparable_outputs(model: Model) -> tuple[str, ...]:
    """The outputs that metrics can look at: those of floating-point values."""
    return tuple(o.name for o in model.outputs if o.dtype in (*FLOAT_DTYPES, "unknown"))


_SHARES = frozenset(
    {"top1", "top5", "agreement", "argmax", "detection_f1", "mean_iou", "neighbour_overlap"}
)


def metric_choices(outputs: Sequence[str], *, most: int = 4) -> dict[str, str]:
    """Texts to choose from, with what each says; those that need a file of their own are left out.

    Args:
        outputs: the float model's that can be compared.
        most: outputs that are named, where a metric looks at one of several.
    """
    found = {}
    for name, each in METRICS.items():
        if each.needs == "expected" or not outputs:
            continue
        if each.several or len(outputs) == 1:
            found[name] = each.says
        else:
            found.update({f"{name}:{output}": each.says for output in outputs[:most]})
    return found


def split_target(text: str) -> tuple[str, float]:
    """The metric's text and the number of ``METRIC=VALUE``.

    Raises:
        FeedError: there is no number behind the last "=".
    """
    metric, _, given = text.rpartition("=")
    try:
        number = float(given)
    except ValueError:
        number = math.nan
    if not metric.strip() or math.isnan(number):
        raise FeedError(
            f"{text!r} names no metric and number",
            hint="Write METRIC=VALUE, e.g. detection_f1=0.9.",
        )
    name = re.split(r"[:@]", metric.strip(), maxsplit=1)[0]
    if name in _SHARES and not 0 <= number <= 1:
        raise FeedError(
            f"{text}: {name} is a share from 0 to 1, never {number:g}",
            hint=f"Write {metric.strip()}={number / 100:g} for {number:g} %."
            if 2 <= number <= 100
            else "Write a share from 0 to 1.",
        )
    return metric.strip(), number


def misses(figure: float | None, wanted: float, *, higher_is_better: bool) -> bool:
    """Whether a figure is worse than wanted, or not known."""
    if figure is None or math.isnan(figure):
        return True
    return figure < wanted if higher_is_better else figure > wanted


def parse_metric(
    text: str,
    outputs: Sequence[str],
    feeds: Feeds | None = None,
    *,
    expected: Path | None = None,
    allow_code: bool = False,
) -> TaskMetric:
    """The metric that a text names.

    ``NAME[:OUTPUT][@OPTION,…]`` with a name of `METRICS`. Of outputs whose names begin alike the
    longest that fits is meant, whatever characters it holds; without one the only output is meant
    (or all, where the metric looks at several). ``output_sqnr_db:OUTPUT[channels]{condition}``
    narrows an output down, see `Selection` and `Condition`; ``detection_f1:BOXES+SCORES`` names
    two. With `allow_code`, any other text is ``module:function`` and is imported, see `OwnMetric`.

    Args:
        text: e.g. "output_sqnr_db", "output_sqnr_db:boxes[0:4]{scores[..., 1]>0.3}", "top1_drop",
            "detection_f1:output0@yolov8,score=0.3".
        outputs: the float model's outputs that can be compared.
        feeds: that it is measured on; what they hold of rows and labels is kept. None for one row
            in each sample.
        expected: the CSV file of the metric "expected", see `read_expected`.
        allow_code: whether a user's own code may be run.

    Raises:
        FeedError: no such metric or output, an option it does not take, or no labels.
    """
    text = text.strip()
    known = re.split(r"[:@\[{]", text, maxsplit=1)[0] in METRICS
    if allow_code and not known and re.fullmatch(r"[\w.]+:\w+", text):
        return _own(text, tuple(outputs))
    parts = _split(text, outputs)
    name, options = parts.name, parts.options
    several = parts.outputs or tuple(outputs)
    rows = feeds.rows if feeds is not None else ()
    if not outputs:
        raise _no_output(text, "", outputs)
    if METRICS[name].needs == "labels":
        return _labelled(text, several, name, feeds)
    if name == "output_sqnr_db":
        if not parts.selection and not parts.condition:
            return OutputSqnr(text=text, outputs=several)
        chosen = _selection(parts.selection) if parts.selection else None
        condition = _condition(parts.condition, outputs) if parts.condition else None
        looked_at = (*several, *((condition.output,) if condition else ()))
        return SelectedSqnr(
            text=text,
            outputs=tuple(dict.fromkeys(looked_at)),
            selection=chosen,
            condition=condition,
        )
    if name == "agreement":
        return Agreement(text=text, outputs=several, rows=rows)
    if name == "detection_f1":
        preset = _one_of(text, options, detections.PRESETS)
        if preset and len(several) != detections.PRESETS[preset].outputs:
            raise FeedError(
                f"{text}: {preset} reads {detections.PRESETS[preset].outputs} output(s), "
                f"not {len(several)}",
                hint=detections.preset_hint(),
            )
        return DetectionF1(
            text=text,
            outputs=several,
            preset=preset,
            score=_number(text, options, "score", 1e-6, 1e6),
            iou=_number(text, options, "iou", 0.01, 1) or detections.MATCHED_IOU,
            suppression=_number(text, options, "nms", 0.01, 1) or detections.SUPPRESSED_IOU,
            classes=_number(text, options, "classes", 1, 1e6),
        )
    one = _the_output(parts, outputs, text)
    if name == "expected":
        return _expecting(text, one, feeds, expected)
    axis = _number(text, options, "axis", -8, 7)
    if name == "mean_iou":
        threshold = _number(text, options, "threshold", -math.inf, math.inf)
        return MeanIou(
            text=text, outputs=one, axis=1 if axis is None else axis, threshold=threshold
        )
    if name in ("kl", "argmax"):
        axis = -1 if axis is None else axis
        if name == "argmax":
            return PositionAgreement(text=text, outputs=one, axis=axis)
        holds = _one_of(text, options, ("probabilities", "logits"))
        return KlDivergence(text=text, outputs=one, axis=axis, holds=holds)
    pooling = _one_of(text, options, _POOLED) or "none"
    if name == "cosine":
        return MeanCosine(text=text, outputs=one, pooling=pooling, rows=rows)
    count = _number(text, options, "k", 1, 1e6) or 0
    return NeighbourOverlap(text=text, outputs=one, pooling=pooling, rows=rows, neighbours=count)


# -- over samples ------------------------------------------------------------------------------


class MetricWatch:
    """The running sums of one metric, for the float model, simulated and deployed.

    A metric that has to see all samples first gets them at the end; what it looks at is held.

    Args:
        metric: as it was parsed.
        padding: which positions to leave out.

    Attributes:
        lacks: an output that was not there on some sample, without which there is no figure; ""
            for none.
    """

    def __init__(self, metric: TaskMetric, padding: Padding | None = None) -> None:
        self.metric = metric
        self.padding = padding
        self.samples = 0
        self.lacks = ""
        self._sums: dict[str, Floats] = {}
        self._held: dict[str, list[tuple[Outputs, Outputs, NDArray[np.bool_] | None]]] = {}

    def add(
        self,
        sample: int,
        reference: Outputs,
        simulated: Outputs,
        deployed_reference: Outputs,
        deployed: Outputs,
        mask: NDArray[np.bool_] | None = None,
    ) -> None:
        """One sample's outputs by the float model's names.

        Args:
            sample: its index among the feeds; samples come in order.
            reference: the float model's, simulated.
            simulated: the quantized model's, those that can be compared.
            deployed_reference: the float model's, deployed; empty where it was not run so.
            deployed: the quantized model's, likewise.
            mask: of `padding`.
        """
        missing = [n for n in self.metric.outputs if n not in reference or n not in simulated]
        self.lacks = self.lacks or next(iter(missing), "")
        if self.lacks:
            return
        self.samples += 1
        runs = [("float", reference, reference), ("simulated", reference, simulated)]
        if all(name in deployed and name in deployed_reference for name in self.metric.outputs):
            runs.append(("deployed", deployed_reference, deployed))
        for which, ours, others in runs:
            if isinstance(self.metric, NeighbourOverlap):
                ours, others = ({n: s[n] for n in self.metric.outputs} for s in (ours, others))
                self._held.setdefault(which, []).append((ours, others, mask))
            else:
                self._take(self.metric, which, sample, ours, others, mask)

    def _parts(self, mask: NDArray[np.bool_] | None) -> Parts:
        if self.padding is None or mask is None:
            return whole
        self.padding.use(mask)
        return self.padding.parts

    def _take(
        self,
        metric: TaskMetric,
        which: str,
        sample: int,
        reference: Outputs,
        actual: Outputs,
        mask: NDArray[np.bool_] | None,
    ) -> None:
        found = metric.sums(sample, reference, actual, self._parts(mask))
        known = self._sums.get(which)
        self._sums[which] = found if known is None else known + found

    def figure(self) -> TaskFigure | None:
        """The record of all samples, at least one; None where an output was not there."""
        if self.lacks:
            return None
        for which, held in self._held.items():
            references = ((ours, self._parts(mask)) for ours, _, mask in held)
            metric = prepared(self.metric, references)
            for sample, (ours, others, mask) in enumerate(held):
                self._take(metric, which, sample, ours, others, mask)
        self._held = {}
        found = {which: self.metric.figure(sums) for which, sums in self._sums.items()}
        return TaskFigure(
            metric=self.metric.text,
            unit=self.metric.unit,
            higher_is_better=self.metric.higher_is_better,
            float_figure=found["float"],
            simulated=found["simulated"],
            deployed=found.get("deployed"),
            samples=self.samples,
        )
