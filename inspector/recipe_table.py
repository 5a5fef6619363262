"""Many recipes for one float model, tried one after the other: what each gives and costs.

Apart from `quantize`, which makes one model: here is what changes between recipes, which of them
cannot be, in which order they are tried, and figures of the outputs alone, which are those of
`compare_models` without the work for every other tensor. Anytime: a row counts when it is there.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.calibration import METHODS, calibrate_many
from inspector.commands import inspector_command
from inspector.comparison import Task, TaskFigure, made_with
from inspector.errors import CalibrationError, InspectorError, ModelError, ReportError, RunError
from inspector.feeds import CalibrationSplit, Feeds
from inspector.folding import DQ, Q
from inspector.matching import activation_channel_axis
from inspector.metrics import ErrorTotals, merge_totals, worst_and_median
from inspector.model import Model
from inspector.model_files import load_model
from inspector.padding import Padding
from inspector.prepare import prepare
from inspector.quantize import quantize_model
from inspector.recipe import QuantConfig
from inspector.runtime import CPU, Feed, Progress, Session, no_progress, open_session, part_of
from inspector.states import Carried, States, check_states
from inspector.task_metrics import MetricWatch, TaskMetric
from inspector.timing import LatencySample, latency_of_models, measure_latency
from inspector.watches import TaskWatch

RECIPES_FORMAT = "quant-inspector/recipes"
RECIPES_VERSION = 1
# Outputs of the float model on all feeds are kept for the next recipe up to this size.
KEPT_BYTES = 256 * 10**6
# A recipe's own measurement, and for each recipe in the one of all of them in turns at the end.
ROW_SECONDS = 0.15
TOGETHER_SECONDS = 0.1
# More sessions at a time are not opened for it: each holds its weights.
TOGETHER_BYTES = 2 * 10**9

# What is varied. The order of a tuple is how often its values win, which matters only until the
# first figures are there.
METHOD_NAMES = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
_ACTIVATIONS = ("uint8", "int8")
_WEIGHTS = ("int8", "uint8")
_SHORT = {"int8": "S8", "uint8": "U8", "int16": "S16", "uint16": "U16", "int4": "S4", "uint4": "U4"}
_AXES = (
    "method",
    "per_channel",
    "activation_symmetric",
    "activation_type",
    "weight_type",
    "reduce_range",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeRow:
    """A recipe of the table before it is tried.

    Attributes:
        config: the recipe.
        label: what it has of what is varied, e.g. "MinMax · per channel · asymmetric · U8 S8".
        reason: why it cannot be, one clause; "" where it can be tried.
    """

    config: QuantConfig
    label: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputFigure:
    """One output of a quantized model; every figure is `comparison.OutputError`'s of that name.

    Attributes:
        name: the float model's.
        sqnr_db, deployed_sqnr_db: pooled over all feeds; nan where it does not run deployed.
        unseen_sqnr_db: pooled over the feeds that did not calibrate, simulated; None for none.
        worst_channel_sqnr_db: simulated; nan where there are no channels.
        worst_part_sqnr_db: where a Concat makes the output, its lowest part, simulated; None where
            none does. What is all zero in the float model does not count.
    """

    name: str
    sqnr_db: float
    deployed_sqnr_db: float
    unseen_sqnr_db: float | None
    worst_channel_sqnr_db: float = math.nan
    worst_part_sqnr_db: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeResult:
    """What one recipe gave.

    Attributes:
        row: the recipe.
        error: why there is no model, one sentence; "" where there is one.
        outputs: one record per output that can be compared.
        task: top-1 where the feeds have labels.
        metrics: the task metrics that were asked for and could be measured.
        latency: deployed, on the first feed, in turns with the float model; None where it was not
            measured.
        float_seconds: the float model's median in the same turns.
        size_bytes: of the file with its external data.
        sha256: of the file; two recipes can make the same one.
        notes: what to know, one sentence each.
        seconds: how long it took to try.
    """

    row: RecipeRow
    error: str = ""
    outputs: tuple[OutputFigure, ...] = ()
    task: Task | None = None
    metrics: tuple[TaskFigure, ...] = ()
    latency: LatencySample | None = None
    float_seconds: float | None = None
    size_bytes: int | None = None
    sha256: str = ""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def deployed_db(self) -> float:
        """The lowest output, deployed, where that is known; nan for no output or not finite."""
        return _lowest([o.deployed_sqnr_db for o in self.outputs])

    @property
    def sqnr_db(self) -> float:
        """The lowest output, simulated; nan for no output or not finite."""
        return _lowest([o.sqnr_db for o in self.outputs])

    @property
    def unseen_db(self) -> float | None:
        """The lowest output on unseen feeds; None where there are none."""
        known = [o.unseen_sqnr_db for o in self.outputs if o.unseen_sqnr_db is not None]
        return _lowest(known) if known else None

    @property
    def worst_part_db(self) -> float | None:
        """The lowest part joined into an output, which the pooled figures hide; None for none."""
        known = [o.worst_part_sqnr_db for o in self.outputs if o.worst_part_sqnr_db is not None]
        return _lowest(known) if known else None

    @classmethod
    def from_json(cls, row: RecipeRow, told: Mapping[str, Any]) -> RecipeResult:
        """What `to_json` gave of a recipe that was tried without being timed."""
        metrics = [{**each, "float_figure": each["float"]} for each in told["metrics"]]
        return cls(
            row=row,
            error=told["reason"] if told["state"] == "failed" else "",
            outputs=tuple(OutputFigure(**each) for each in told["outputs"]),
            task=None if told["task"] is None else Task(**told["task"]),
            metrics=tuple(
                TaskFigure(**{f.name: each[f.name] for f in fields(TaskFigure)}) for each in metrics
            ),
            size_bytes=told["size_bytes"],
            sha256=told["sha256"],
            notes=tuple(told["notes"]),
            seconds=told["seconds"],
        )

    def to_json(self) -> dict[str, Any]:
        """The row as values that `render.strict` takes."""
        state = "impossible" if self.row.reason else "failed" if self.error else "done"
        sample, task = self.latency, self.task
        return {
            "label": self.row.label,
            "state": state,
            "reason": self.row.reason or self.error,
            "recipe": self.row.config.to_json(),
            "sqnr_db": self.sqnr_db if state == "done" else None,
            "deployed_sqnr_db": self.deployed_db if state == "done" else None,
            "unseen_sqnr_db": self.unseen_db,
            "worst_part_sqnr_db": self.worst_part_db,
            "outputs": [{f.name: getattr(o, f.name) for f in fields(o)} for o in self.outputs],
            "task": None if task is None else {f.name: getattr(task, f.name) for f in fields(task)},
            "metrics": [figure.to_json() for figure in self.metrics],
            "latency": None
            if sample is None
            else {
                "median_seconds": sample.median_seconds,
                "spread_seconds": sample.spread_seconds,
                "float_seconds": self.float_seconds,
                "runs": sample.runs,
            },
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "notes": list(self.notes),
            "seconds": self.seconds,
        }


def _lowest(values: Sequence[float]) -> float:
    if not values or any(math.isnan(v) for v in values):
        return math.nan
    return min(values)


# -- which recipes -----------------------------------------------------------------------------


def recipe_label(config: QuantConfig) -> str:
    """A recipe's place in the table, e.g. "MinMax · per channel · asymmetric · U8 S8 · 7 bit".

    The types are those of activations and weights.
    """
    weights = _SHORT[config.weight_type]
    channels = "per channel" if config.per_channel else "per tensor"
    if not config.static:
        parts = ["dynamic", channels, f"{weights} weights"]
    else:
        symmetry = "symmetric" if config.activation_symmetric else "asymmetric"
        types = f"{_SHORT[config.activation_type]} {weights}"
        parts = [METHOD_NAMES[config.method], channels, symmetry, types]
    if config.reduce_range:
        parts.append("7 bit")
    if config.equalize:
        parts.append("equalized")
    return " · ".join(parts)


def _impossible(config: QuantConfig) -> str:
    """Why a recipe cannot be, known before any work; "" where it can be tried."""
    if config.static and config.activation_type == "int8" and config.weight_type == "uint8":
        return "ONNX Runtime has no kernels for S8 activations with U8 weights"
    eight = config.weight_type in ("int8", "uint8")
    if config.reduce_range and not eight:
        return f"there is no range to reduce in {config.weight_type} weights"
    if config.format in ("qoperator", "dynamic") and not eight:
        return f"format {config.format} takes 8-bit weights only"
    return ""


def recipe_grid(config: QuantConfig) -> tuple[RecipeRow, ...]:
    """The recipes to set beside each other: everything varied that can be, the rest as in `config`.

    Static: method × per tensor or channel × activations symmetric or not × U8 or S8 activations ×
    S8 or U8 weights × reduced range or not. Dynamic quantization has neither a method nor a choice
    for activations. Possible ones come first, the most promising at the front: the recipe given,
    then MinMax before the others, per channel before per tensor, the whole range before 7 bits.
    What cannot be is at the end, with its reason. (What only some models refuse is found out by
    trying.)

    Args:
        config: format, op types, nodes, pre-processing, percentile and the number of calibration
            samples are taken from here, and its own combination is the first row.
    """
    methods = tuple(METHOD_NAMES) if config.static else (config.method,)
    assert set(METHOD_NAMES) == set(METHODS)
    if config.activation_symmetric is False:
        config = replace(config, activation_symmetric=None)  # which is the same
    symmetries = (None, True) if config.static else (config.activation_symmetric,)
    activations = _ACTIVATIONS if config.static else (config.activation_type,)
    combinations = itertools.product(
        methods, (True, False), symmetries, activations, _WEIGHTS, (False, True)
    )
    configs = [config]
    for method, per_channel, symmetric, activation, weight, reduce_range in combinations:
        configs.append(
            replace(
                config,
                method=method,
                percentile=config.percentile if method == config.method else None,
                per_channel=per_channel,
                activation_symmetric=symmetric,
                activation_type=activation,
                weight_type=weight,
                # What was asked for one type need not suit the other.
                weight_symmetric=config.weight_symmetric if weight == config.weight_type else None,
                reduce_range=reduce_range,
            )
        )
    rows = [
        RecipeRow(config=each, label=recipe_label(each), reason=_impossible(each))
        for each in dict.fromkeys(configs)
    ]
    order = {id(row): at for at, row in enumerate(rows)}
    return tuple(sorted(rows, key=lambda r: (bool(r.reason), order[id(r)] > 0, _doubt(r.config))))


def _doubt(config: QuantConfig) -> float:
    """How far down the list a recipe stands while nothing is known of the model."""
    methods, weights = tuple(METHOD_NAMES), (*_WEIGHTS, config.weight_type)
    return (
        1.0 * methods.index(config.method)
        + 2.0 * (not config.per_channel)
        + 0.5 * bool(config.activation_symmetric)
        + 0.25 * (config.activation_type != _ACTIVATIONS[0])
        + 1.5 * weights.index(config.weight_type)
        + 3.0 * config.reduce_range
    )


def _apart(a: QuantConfig, b: QuantConfig) -> int:
    """In how many of the varied options two recipes differ."""
    return sum(getattr(a, name) != getattr(b, name) for name in _AXES)


# -- the outputs alone -------------------------------------------------------------------------


class OutputRunner:
    """A float model and its feeds, opened once to set many quantized models beside it.

    The quantized models are what the quantizer made of this float model: inputs and outputs have
    its names and shapes. Where the float outputs of all feeds fit into `KEPT_BYTES`, the float
    model runs once.

    Args:
        float_model: the float model.
        feeds: at least one.
        mask: the input whose zeros mark padding; "" for none.
        states: (output, input) pairs through which each sample gets what the same model gave for
            the one before.
        provider: ONNX Runtime's execution provider of the deployed runs.

    Raises:
        FeedError: `mask` or `states` name no such tensors.
        ModelError, RunError: the runtime refuses the model or the provider.
    """

    def __init__(
        self,
        float_model: Model,
        feeds: Feeds,
        *,
        mask: str = "",
        states: States = (),
        provider: str = CPU,
    ) -> None:
        check_states(states, float_model)
        self.model, self.feeds = float_model, feeds
        self.states, self.provider = tuple(states), provider
        self.simulated = open_session(float_model, optimized=False)
        self.deployed = _deployed(float_model, provider)
        self.outputs = tuple(
            n for n in self.simulated.output_names if n in {o.name for o in float_model.outputs}
        )
        self._kept: list[_Sample] = []
        self._keeps = True
        self._axes: dict[str, int | None] = {}
        self.padding = Padding(float_model, mask) if mask else None
        if self.padding is not None:
            masks = [self.padding.mask_of(f, feeds.names[at]) for at, f in enumerate(feeds)]
            for at in self.padding.telling(masks):
                feed = feeds[at]
                values = self.simulated.run(feed, self.outputs, sample=feeds.names[at])
                self.padding.learn(masks[at], {**feed, **values})

    def samples(self) -> Iterator[_Sample]:
        """Every feed with what the float model gives for it."""
        if self._keeps and len(self._kept) == len(self.feeds):
            yield from self._kept
            return
        self._kept, held = [], 0
        carried = Carried(self.states), Carried(self.states)
        for at, feed in enumerate(self.feeds):
            name = self.feeds.names[at]
            found: list[dict[str, NDArray[Any]]] = []
            for state, session in zip(carried, (self.simulated, self.deployed), strict=True):
                if session is None:
                    found.append({})
                    continue
                own = state.into(feed, name)
                values = session.run(own, self.outputs, sample=name)
                state.keep({**own, **values})
                found.append(values)
            sample = _Sample(at=at, feed=dict(feed), simulated=found[0], deployed=found[1])
            held += sum(v.nbytes for part in (sample.feed, *found) for v in part.values())
            if self._keeps and held <= KEPT_BYTES:
                self._kept.append(sample)
            else:
                self._keeps, self._kept = False, []
            yield sample

    def figures(
        self,
        quantized: Model,
        *,
        seen: Sequence[bool] | None = None,
        metrics: Sequence[MetricWatch] = (),
        progress: Progress = no_progress,
    ) -> tuple[tuple[OutputFigure, ...], Task | None, tuple[str, ...]]:
        """Every output of a quantized model that can be compared, top-1, and notes.

        Args:
            quantized: made of this float model.
            seen: for each feed whether it was used in calibration; None where that is unknown.
            metrics: are shown every sample.
            progress: told after every sample; what it raises ends the work.

        Raises:
            ModelError, RunError: the runtime refuses the model, or a feed.
        """
        last_q = _last_q(quantized)
        session = open_session(
            quantized,
            optimized=False,
            outputs=tuple(n for n in last_q.values() if n in quantized.producers),
        )
        deployed = _deployed(quantized, self.provider)
        names = [n for n in self.outputs if n in session.output_names]
        before = {n: last_q[n] for n in names if last_q.get(n) in session.output_names}
        simulated: dict[str, list[ErrorTotals]] = {n: [] for n in names}
        shipped: dict[str, list[ErrorTotals]] = {n: [] for n in names}
        lost: dict[str, str] = {}
        task = TaskWatch(self.feeds.labels) if self.feeds.labels else None
        carried = Carried(self.states), Carried(self.states)
        asked = list(dict.fromkeys((*names, *before.values())))
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            for sample in self.samples():
                name = self.feeds.names[sample.at]
                progress(sample.at / len(self.feeds), f"sample {sample.at + 1}")
                own = carried[0].into(sample.feed, name)
                values = session.run(own, asked, sample=name)
                carried[0].keep({**own, **values})
                actual: Mapping[str, NDArray[Any]] = {}
                if deployed is not None and self.deployed is not None:
                    own = carried[1].into(sample.feed, name)
                    actual = deployed.run(own, names, sample=name)
                    carried[1].keep({**own, **actual})
                mask = None
                if self.padding is not None:
                    mask = self.padding.mask_of(sample.feed, name)
                    self.padding.use(mask)
                for output in names:
                    reference = sample.simulated[output]
                    why = lost.get(output) or _not_comparable(reference, values[output])
                    if why:
                        lost[output] = why
                        continue
                    axis = self._axis(output, reference)
                    totals = self._totals(output, reference, values[output], axis)
                    hidden = values.get(before.get(output, ""))
                    if hidden is not None and np.isnan(hidden).any():
                        # Q turns NaN into some integer: nothing behind it shows it any more.
                        totals = totals if totals.nonfinite_actual else totals.unknown()
                    simulated[output].append(totals)
                    if output in actual:
                        both = sample.deployed[output], actual[output]
                        shipped[output].append(self._totals(output, *both))
                if task is not None:
                    rows = self.feeds.rows[sample.at]
                    task.add(rows, {n: sample.simulated[n] for n in names}, values)
                usable = {n: values[n] for n in names if n not in lost}
                for watch in metrics:
                    watch.add(sample.at, sample.simulated, usable, sample.deployed, actual, mask)
        figures = tuple(
            self._figure(n, simulated[n], shipped[n], seen)
            for n in names
            if n not in lost and simulated[n]
        )
        notes = tuple(f"output {n} is not compared: {why}" for n, why in lost.items())
        if deployed is None:
            notes += ("it does not load with optimisations on: figures are of simulated runs",)
        return figures, None if task is None else task.task(), notes

    def _axis(self, output: str, reference: NDArray[Any]) -> int | None:
        """The channel axis of an output, that of its first sample; None without one."""
        if output not in self._axes:
            self._axes[output] = activation_channel_axis(self.model, output, reference.ndim)
        axis = self._axes[output]
        return axis if axis is not None and axis < reference.ndim else None

    def _totals(
        self,
        output: str,
        reference: NDArray[Any],
        actual: NDArray[Any],
        axis: int | None = None,
    ) -> ErrorTotals:
        if self.padding is None:
            return ErrorTotals.of(reference, actual, axis)
        parts = (self.padding.parts(output, v) for v in (reference, actual))
        return merge_totals(ErrorTotals.of(a, b, axis) for a, b in zip(*parts, strict=True))

    def _figure(
        self,
        output: str,
        simulated: Sequence[ErrorTotals],
        shipped: Sequence[ErrorTotals],
        seen: Sequence[bool] | None,
    ) -> OutputFigure:
        totals = merge_totals(simulated)
        channels = np.array([])
        if self._axes[output] is not None and len({t.signal.size for t in simulated}) == 1:
            channels = totals.channel_sqnr_db
        parts = []
        for start, stop in self._parts(output) if channels.size else ():
            if stop <= channels.size:
                parts.append(totals.slice(start, stop).sqnr_db)
        parts = [p for p in parts if p != -math.inf]
        return OutputFigure(
            name=output,
            sqnr_db=totals.sqnr_db,
            deployed_sqnr_db=merge_totals(shipped).sqnr_db if shipped else math.nan,
            unseen_sqnr_db=_unseen(simulated, seen),
            worst_channel_sqnr_db=worst_and_median(channels)[0],
            worst_part_sqnr_db=_lowest(parts) if parts else None,
        )

    def _parts(self, output: str) -> list[tuple[int, int]]:
        """Where the inputs of the Concat that makes an output lie along its channel axis."""
        node, axis = self.model.producers.get(output), self._axes[output]
        if node is None or node.op_type != "Concat" or axis is None:
            return []
        found, start = [], 0
        for name in node.inputs:
            shape = self.model.info(name).shape or ()
            size = shape[axis] if axis < len(shape) else None
            if not isinstance(size, int):
                return []
            if size:
                found.append((start, start + size))
            start += size
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    """One feed and the float model's outputs for it, simulated and deployed."""

    at: int
    feed: dict[str, NDArray[Any]]
    simulated: dict[str, NDArray[Any]]
    deployed: dict[str, NDArray[Any]]


def _deployed(model: Model, provider: str) -> Session | None:
    """A model as deployed; None where the runtime refuses it so on the CPU."""
    try:
        return open_session(model, optimized=True, provider=provider)
    except (RunError, ModelError):
        if provider != CPU:
            raise
        return None


def _last_q(model: Model) -> dict[str, str]:
    """The tensor before the Q of each output that a Q/DQ pair ends, by output."""
    found = {}
    for output in model.outputs:
        last = model.producers.get(output.name)
        first = model.producers.get(last.inputs[0]) if last is not None and last.inputs else None
        if last is not None and last.op_type == DQ and first is not None and first.op_type == Q:
            found[output.name] = first.inputs[0]
    return found


def _not_comparable(reference: NDArray[Any], actual: NDArray[Any]) -> str:
    if reference.dtype.kind != "f" or actual.dtype.kind != "f":
        return "it holds no floating-point values"
    if reference.shape != actual.shape:
        return f"shapes differ: float {reference.shape}, quantized {actual.shape}"
    return ""


def _unseen(totals: Sequence[ErrorTotals], seen: Sequence[bool] | None) -> float | None:
    if seen is None:
        return None
    parts = [t for t, known in zip(totals, seen, strict=True) if not known]
    return merge_totals(parts).sqnr_db if parts else None


# -- trying them -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Tried:
    """What is remembered while recipes are tried."""

    results: list[RecipeResult] = field(default_factory=list)
    models: dict[str, Path] = field(default_factory=dict)
    # Ranges that cannot be observed once cannot be observed by the next recipe either.
    refused: dict[tuple[str, bool], CalibrationError] = field(default_factory=dict)
    # The methods that look at histograms share their runs over the feeds; see `_observe`.
    observed: set[bool] = field(default_factory=set)
    percentile: float | None = None

    def best(self) -> QuantConfig | None:
        done = [r for r in self.results if not r.error]
        return max(done, key=_merit).row.config if done else None


def _merit(result: RecipeResult) -> float:
    value = result.deployed_db
    value = result.sqnr_db if math.isnan(value) else value
    return -math.inf if math.isnan(value) else value


# Tries recipes in another place, several at a time, and asks for the next as soon as it can take
# one; a recipe's result comes once it is there.
Elsewhere = Callable[[Iterator[RecipeRow], Progress], Iterator[RecipeResult]]


def run_recipes(
    float_model: Model,
    feeds: Feeds,
    split: CalibrationSplit,
    *,
    rows: Sequence[RecipeRow],
    cache: Path,
    output_folder: Path | None = None,
    mask: str = "",
    states: States = (),
    provider: str = CPU,
    metrics: Sequence[TaskMetric] = (),
    elsewhere: Elsewhere | None = None,
    progress: Progress = no_progress,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[RecipeResult]:
    """Tries recipes and yields each result once it is there; a recipe that fails is a row too.

    Next is always the recipe nearest to the best so far, so that good ones come early. In the end
    all models are timed once more, in turns with each other, and their rows come again with those
    times: of two rows of one recipe the later counts.

    Args:
        float_model: the float model.
        feeds: what the figures are of.
        split: the calibration feeds, and which of `feeds` they are.
        rows: from `recipe_grid`; those that cannot be come back at once.
        cache: folder for caches: ranges are observed once per method and prepared model.
        output_folder: keeps the models, one file per recipe; None keeps none.
        mask, states, provider, metrics: as for `compare_models`.
        elsewhere: tries them; None for this process. Nothing is timed then and no model is kept:
            `output_folder`, `mask` and the like are what `elsewhere` was made with.
        progress: told before and while each recipe is tried; what it raises ends the work, and
            what was yielded stays.
        stop: asked before each recipe; True ends the work after what is done.

    Raises:
        FeedError: `mask` or `states` do not fit.
        ModelError, RunError: the float model does not run.
    """
    for row in rows:
        if row.reason:
            yield RecipeResult(row=row)
    waiting = [row for row in rows if not row.reason]
    if not waiting:
        return
    tried = _Tried(percentile=shared_percentile(rows))
    count = len(waiting)

    def following() -> Iterator[RecipeRow]:
        while waiting and not stop():
            best = tried.best()
            at = 0
            if best is not None:
                at = min(range(len(waiting)), key=lambda i: (_apart(waiting[i].config, best), i))
            yield waiting.pop(at)

    if elsewhere is not None:
        for result in elsewhere(following(), lambda _, text: progress(
            len(tried.results) / count, f"recipe {len(tried.results) + 1} of {count}: {text}"
        )):  # fmt: skip
            tried.results.append(result)
            yield result
        progress(1.0, "tried")
        return
    progress(0.0, "running the float model")
    runner = OutputRunner(float_model, feeds, mask=mask, states=states, provider=provider)
    with ExitStack() as stack:
        folder = output_folder
        if folder is None:
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="quant-inspector-"))
            )
        else:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ReportError(
                    f"the folder {folder} cannot be made: {error.strerror or error}",
                    hint="Name a folder that can be written to.",
                ) from error
        for row in following():
            done = len(tried.results)
            told = _counted(part_of(progress, 0.95 * done / count, 0.95 * (done + 1) / count),
                            f"recipe {done + 1} of {count}")  # fmt: skip
            result = _try_recipe(
                row, runner, split, tried, cache=cache, folder=folder, metrics=metrics, told=told
            )
            tried.results.append(result)
            yield result
        progress(0.95, "timing all of them in turns")
        yield from _timed_together(tried, runner)
    progress(1.0, "tried")


def shared_percentile(rows: Iterable[RecipeRow]) -> float | None:
    """The share of values that the recipes by percentile keep; None for the runtime's own."""
    found = (r.config.percentile for r in rows if not r.reason and r.config.method == "percentile")
    return next(found, None)


def recipe_trier(
    float_model: Model,
    feeds: Feeds,
    split: CalibrationSplit,
    *,
    cache: Path,
    folder: Path,
    mask: str = "",
    states: States = (),
    provider: str = CPU,
    metrics: Sequence[TaskMetric] = (),
    percentile: float | None = None,
) -> Callable[[RecipeRow], RecipeResult]:
    """What tries one recipe after the other without timing them, for whoever is `elsewhere`.

    Args:
        float_model, feeds, split, cache, mask, states, provider, metrics: as for `run_recipes`.
        folder: for the models, each of which is removed again.
        percentile: of `shared_percentile`.

    Raises:
        FeedError: `mask` or `states` do not fit.
        ModelError, RunError: the float model does not run.
    """
    runner = OutputRunner(float_model, feeds, mask=mask, states=states, provider=provider)
    tried = _Tried(percentile=percentile)
    folder.mkdir(parents=True, exist_ok=True)

    def try_one(row: RecipeRow) -> RecipeResult:
        result = _try_recipe(
            row, runner, split, tried, cache=cache, folder=folder, metrics=metrics,
            told=no_progress, timed=False,
        )  # fmt: skip
        for made in folder.iterdir():
            made.unlink()
        tried.results.append(result)
        return result

    return try_one


def _counted(progress: Progress, which: str) -> Progress:
    return lambda fraction, message: progress(fraction, f"{which}: {message}")


def _try_recipe(
    row: RecipeRow,
    runner: OutputRunner,
    split: CalibrationSplit,
    tried: _Tried,
    *,
    cache: Path,
    folder: Path,
    metrics: Sequence[TaskMetric],
    told: Progress,
    timed: bool = True,
) -> RecipeResult:
    begin = time.perf_counter()
    config = row.config
    told(0.0, row.label)
    method = (config.method, config.per_channel)
    target = folder / f"{recipe_file_name(config)}.onnx"
    try:
        if method in tried.refused:
            raise tried.refused[method]
        if config.static and config.method != "minmax":
            _observe(config, runner.model, split, tried, cache, part_of(told, 0.0, 0.3))
        made = quantize_model(
            runner.model,
            config,
            calibration=split.calibration if config.static else None,
            output=target,
            cache=cache,
            progress=_named(part_of(told, 0.3, 0.6), row.label),
        )
        known = next((r for r in tried.results if r.sha256 == made.sha256), None)
        if known is not None:
            tried.models[row.label] = target
            spent = time.perf_counter() - begin
            return replace(known, row=row, notes=made.notes, seconds=spent)
        quantized = load_model(target)
        seen = split.seen if config.static else (False,) * len(runner.feeds)
        watches = [MetricWatch(metric, runner.padding) for metric in metrics]
        figures, task, notes = runner.figures(
            quantized,
            seen=seen,
            metrics=watches,
            progress=_named(part_of(told, 0.6, 0.9), row.label),
        )
        measured = [watch.figure() for watch in watches]
        told(0.9, row.label)
        latency, float_seconds = _latency(quantized, runner) if timed else (None, None)
    except CalibrationError as error:
        tried.refused[method] = error
        return _failed(row, error, begin)
    except InspectorError as error:
        return _failed(row, error, begin)
    tried.models[row.label] = target
    return RecipeResult(
        row=row,
        outputs=figures,
        task=task,
        metrics=tuple(figure for figure in measured if figure is not None),
        latency=latency,
        float_seconds=float_seconds,
        size_bytes=quantized.size_bytes,
        sha256=made.sha256,
        notes=tuple(dict.fromkeys((*made.notes, *notes))),
        seconds=time.perf_counter() - begin,
    )


def _observe(
    config: QuantConfig,
    model: Model,
    split: CalibrationSplit,
    tried: _Tried,
    cache: Path,
    progress: Progress,
) -> None:
    """Puts the ranges by percentile and by entropy into the cache, from the same runs.

    Raises:
        CalibrationError: this recipe's method has no ranges on these feeds.
    """
    if config.per_channel in tried.observed:
        return
    found = calibrate_many(
        prepare(model, config, cache).model,
        split.calibration,
        methods=("percentile", "entropy"),
        percentile=tried.percentile,
        op_types=config.op_types,
        limit=config.calibration_samples,
        cache=cache,
        progress=progress,
    )
    tried.observed.add(config.per_channel)
    for method, ranges in found.items():
        if isinstance(ranges, CalibrationError):
            tried.refused[method, config.per_channel] = ranges
    own = found[config.method]
    if isinstance(own, CalibrationError):
        raise own


def _failed(row: RecipeRow, error: InspectorError, begin: float) -> RecipeResult:
    return RecipeResult(row=row, error=error.message, seconds=time.perf_counter() - begin)


def _named(progress: Progress, label: str) -> Progress:
    """Says which recipe it is instead of every step of it."""
    return lambda fraction, _message: progress(fraction, label)


def recipe_file_name(config: QuantConfig) -> str:
    """A file name for a recipe's model, without suffix, e.g. "minmax-channel-asym-u8s8-7bit"."""
    words = recipe_label(config).lower()
    for long, short in (("per ", ""), (" · ", "-"), ("ymmetric", "ym"), (" ", "")):
        words = words.replace(long, short)
    return words


def _latency(quantized: Model, runner: OutputRunner) -> tuple[LatencySample | None, float | None]:
    """The quantized model in turns with the float model on the first feed."""
    session = _deployed(quantized, runner.provider)
    if session is None or runner.deployed is None:
        return None, None
    feed: Feed = runner.feeds[0]
    both = [runner.deployed, session]
    reference, own = measure_latency(both, [feed, feed], budget_seconds=ROW_SECONDS)
    return own, reference.median_seconds


def _timed_together(tried: _Tried, runner: OutputRunner) -> Iterator[RecipeResult]:
    """The results anew, timed in turns with each other; none where there is nothing to gain."""
    done = [r for r in tried.results if r.latency is not None and r.row.label in tried.models]
    held = sum(r.size_bytes or 0 for r in done)
    if len(done) < 2 or held > TOGETHER_BYTES:
        return
    models = {r.sha256: tried.models[r.row.label] for r in done}
    feed = runner.feeds[0]
    try:
        samples = latency_of_models(
            [runner.model, *(load_model(path) for path in models.values())],
            [feed] * (1 + len(models)),
            provider=runner.provider,
            budget_seconds=TOGETHER_SECONDS * (1 + len(models)),
        )
    except InspectorError:
        return  # e.g. not enough memory for all at once: the rows keep their own times
    by_file = dict(zip(models, samples[1:], strict=True))
    for result in done:
        yield replace(
            result, latency=by_file[result.sha256], float_seconds=samples[0].median_seconds
        )


# -- the table ---------------------------------------------------------------------------------


def recipe_key(recipe: Mapping[str, Any]) -> str:
    """What tells one row of a table from another: its recipe, as JSON writes it."""
    return json.dumps(recipe, sort_keys=True)


def _rank(row: Mapping[str, Any]) -> tuple[int, float, float, float]:
    """Where a row stands: the best deployed SQNR first, then the smaller, then the faster file."""
    states = ("done", "waiting", "failed", "impossible")
    known = [float(row[k]) for k in ("deployed_sqnr_db", "sqnr_db") if row[k] is not None]
    figures = [v for v in known if not math.isnan(v)]
    return (
        states.index(row["state"]),
        -figures[0] if figures else math.inf,
        float(row["size_bytes"] or 0),
        float((row["latency"] or {}).get("median_seconds", 0.0)),
    )


def recipes_json(
    float_model: Model,
    feeds: Feeds,
    results: Sequence[RecipeResult],
    *,
    planned: Collection[RecipeRow] = (),
    kept: Sequence[Mapping[str, Any]] = (),
    seen: Sequence[bool] = (),
    inputs: str | None = None,
    calibration: str | None = None,
    float_name: str = "",
    further: Sequence[str] = (),
) -> dict[str, Any]:
    """The table as values that `render.strict` takes: format "quant-inspector/recipes".

    One row per recipe, the best deployed SQNR first; then those not tried yet, those that gave no
    model, and those that cannot be.

    Args:
        float_model: what the recipes were tried on.
        feeds: what the figures are of.
        results: as they came; of two of one recipe the later counts.
        planned: all rows; those without a result are there with the state "waiting".
        kept: rows of an earlier table of the same model and feeds.
        seen: for each feed whether it was used in calibration.
        inputs, calibration, float_name: paths for the command that makes the best one.
        further: its further words, e.g. how many samples were taken.
    """
    found = {
        recipe_key(r.config.to_json()): {**RecipeResult(row=r).to_json(), "state": "waiting"}
        for r in planned
    }
    found |= {recipe_key(row["recipe"]): dict(row) for row in kept}
    found |= {recipe_key(r.row.config.to_json()): r.to_json() for r in results}
    rows = sorted(found.values(), key=_rank)
    first: dict[str, str] = {}
    for row in rows:
        label = row["label"]
        row["same_as"] = first.setdefault(row["sha256"], label) if row["sha256"] else ""
        row["same_as"] = "" if row["same_as"] == label else row["same_as"]
    command = None
    if rows and rows[0]["state"] == "done":
        command = inspector_command(
            QuantConfig.from_json(rows[0]["recipe"]),
            float_name=float_name or float_model.name,
            inputs=inputs,
            calibration=calibration,
        )
        command = " ".join([command, *map(shlex.quote, further)])
    static = any(row["recipe"].get("format") != "dynamic" for row in rows)
    used = sum(seen) if static else 0
    return {
        "format": RECIPES_FORMAT,
        "version": RECIPES_VERSION,
        "made_with": made_with(),
        "float_model": {
            "path": float_name or float_model.name,
            "sha256": float_model.sha256,
            "size_bytes": float_model.size_bytes,
        },
        "samples": len(feeds),
        "random_feeds": feeds.random,
        "seen_samples": used,
        "rows": rows,
        "command": command,
    }
