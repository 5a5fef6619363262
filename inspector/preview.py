"""What an exclusion list would give, before a file is made.

Output figures are those that a comparison of that file gives for simulated runs: the same sums over
the same feeds, with the outputs from one session that serves every list. There are two such: the
switchboard of a recipe, and a finished file with both forms of every place that surgery changes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from inspector.calibration import hushed
from inspector.comparison import Task, TaskFigure, judged_db
from inspector.costs import count_macs
from inspector.errors import InspectorError, QuantizationError
from inspector.feeds import Feeds
from inspector.layouts import OutputLayouts
from inspector.matching import ActivationPair, Matching
from inspector.model import FLOAT_DTYPES, Model
from inspector.padding import Padding
from inspector.pairs import feed_for_quantized
from inspector.prepare import QUANTIZER_ERRORS, Prepared, shorten, text_of
from inspector.quantize import open_quantizer, quantizer_names
from inspector.quantizer import Plan, UnplannableError
from inspector.recipe import QuantConfig
from inspector.rewrite import switchable
from inspector.runtime import Feed, Progress, no_progress, open_session
from inspector.states import Carried, States
from inspector.switchboard import Switchboard
from inspector.task_metrics import MetricWatch, Parts, TaskMetric, whole
from inspector.watches import OutputWatch, TaskWatch, TensorWatch

# Of feeds that are held in memory from preview to preview.
HELD_BYTES = 256 * 2**20
_KEPT_PLANS = 8
# What of a model is quantized.
BOTH, WEIGHTS, ACTIVATIONS = "both", "weights", "activations"
# ONNX Runtime's entries of `TensorQuantOverrides`, by activation.
Overrides = Mapping[str, Mapping[str, Any]] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewOutput:
    """One graph output under a list, simulated.

    Attributes:
        name: the float model's output.
        sqnr_db: pooled over all feeds.
        worst_part_sqnr_db: what it is judged by: the lowest of the parts joined into it, or the
            pooled figure where it has none.
        worst_channel_sqnr_db: nan where it has no channels.
        median_sample_sqnr_db, worst_sample_sqnr_db: of the samples' own.
        per_sample_sqnr_db: one per feed, in order.
    """

    name: str
    sqnr_db: float
    worst_part_sqnr_db: float
    worst_channel_sqnr_db: float
    median_sample_sqnr_db: float
    worst_sample_sqnr_db: float
    per_sample_sqnr_db: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """What a list would give.

    Attributes:
        outputs: those that hold floating-point values.
        task: None without labels.
        freed: activations that lose their Q/DQ pair.
        added: activations that get one, because a Relu or Clip is no longer folded.
        regridded: activations whose scale or zero point changes.
        float_weights: weights that are stored in float instead.
        refused: nodes that surgery cannot leave in float, with the reason.
        float_macs_fraction: share of the multiply-accumulates that compute in float, 0..1; nan
            where the model has none.
        whole_float_macs_fraction: the same without the list.
        weight_bytes: of all weights as they would be stored.
        whole_weight_bytes: the same without the list.
        seconds: how long the preview took.
        retyped: activations that get another integer type than the recipe's, with that type.
        unheeded: activations whose override gives them no type, because they stay in float, are
            folded or have the scale of another.
        wide_macs_fraction: share of the multiply-accumulates that are not in float, of nodes that
            read or give a 16-bit tensor. ONNX Runtime's CPU kernels for integers take 8 bits only:
            deployed there, these compute in float between the two.
        metrics: the task metrics that were asked for, simulated.
    """

    outputs: tuple[PreviewOutput, ...]
    task: Task | None
    freed: tuple[str, ...]
    added: tuple[str, ...]
    regridded: tuple[str, ...]
    float_weights: tuple[str, ...]
    float_macs_fraction: float
    whole_float_macs_fraction: float
    weight_bytes: int
    whole_weight_bytes: int
    seconds: float
    refused: tuple[tuple[str, str], ...] = ()
    retyped: tuple[tuple[str, str], ...] = ()
    unheeded: tuple[str, ...] = ()
    wide_macs_fraction: float = 0.0
    metrics: tuple[TaskFigure, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What a list changes in the file, without running it: fields of `Preview`."""

    freed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    regridded: tuple[str, ...] = ()
    float_weights: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    retyped: tuple[tuple[str, str], ...] = ()
    unheeded: tuple[str, ...] = ()
    wide_macs_fraction: float = 0.0
    float_macs_fraction: float
    whole_float_macs_fraction: float
    weight_bytes: int
    whole_weight_bytes: int


Outputs = dict[str, NDArray[Any]]
# Runs one sample; the samples of one preview come in order, through one of these.
Run = Callable[[Feed, str], Outputs]


class Source(Protocol):
    """What computes the outputs of any list's own file; lists name nodes of the float file."""

    output_names: Collection[str]

    @property
    def carriers(self) -> Mapping[str, str]: ...

    def change(self, exclude: Collection[str], overrides: Overrides) -> Change: ...

    def distinct(self, names: Sequence[str]) -> tuple[str, ...]: ...

    def places(self, exclude: Collection[str]) -> frozenset[str]: ...

    def runner(self, exclude: Collection[str], overrides: Overrides, part: str = BOTH) -> Run: ...


class RecipeSource:
    """Re-quantizing with a recipe.

    Args:
        prepared: what the quantizer is given.
        config: the recipe.
        ranges: what was observed, as a file.
        feed: the first sample; its shapes count the multiply-accumulates.
        states: (output, input) pairs that carry over from sample to sample.
        types: see `Switchboard`.

    Raises:
        UnplannableError: this recipe or model has no switchboard.
    """

    def __init__(
        self,
        prepared: Prepared,
        config: QuantConfig,
        ranges: Path,
        feed: Feed,
        states: States = (),
        types: Collection[str] = (),
    ) -> None:
        with hushed():
            try:
                quantizer = open_quantizer(prepared, config, ranges)
                if quantizer is None:
                    raise UnplannableError("this model is quantized by the public function only")
                board = Switchboard(quantizer, types)
            except QUANTIZER_ERRORS as error:
                raise UnplannableError(shorten(text_of(error))) from error
            except InspectorError as error:
                raise UnplannableError(error.message) from error
        self.board = board
        self.output_names: Collection[str] = board.output_names
        self._names = prepared
        self._prepared = prepared.model
        self._config = config
        self._states = tuple(states)
        self._macs = count_macs(prepared.model, feed)
        self._plans: dict[Any, Plan] = {}
        self._whole = self._costs(board.whole)

    def _plan(self, exclude: Collection[str], overrides: Overrides) -> Plan:
        key = (frozenset(exclude), repr(overrides))
        if key not in self._plans:
            names = quantizer_names(self._names, exclude, self._config)
            with hushed():
                try:
                    self._plans[key] = self.board.plan_of(names, overrides)
                except QUANTIZER_ERRORS as error:
                    raise QuantizationError(
                        f"ONNX Runtime's quantizer refuses this list: {shorten(text_of(error))}",
                        hint="Leave another node in float.",
                    ) from error
            if len(self._plans) > _KEPT_PLANS:
                del self._plans[next(iter(self._plans))]
        return self._plans[key]

    def change(self, exclude: Collection[str], overrides: Overrides = None) -> Change:
        """What a list changes.

        Raises:
            ExclusionError: a name that is not in the model.
            QuantizationError: ONNX Runtime's quantizer refuses the list.
            UnplannableError: the switchboard cannot show it.
        """
        plan, whole = self._plan(exclude, overrides), self.board.whole
        share, wide, size = self._costs(plan)
        own = self._config.activation_type
        types = {
            name: entry["quant_type"].name.removeprefix("Q").lower()
            for name, entry in (overrides or {}).items()
            if "quant_type" in entry and name not in self._prepared.constant_names
        }
        return Change(
            freed=tuple(n for n in whole.activations if n not in plan.activations),
            added=tuple(n for n in plan.activations if n not in whole.activations),
            regridded=tuple(
                n
                for n, grid in plan.activations.items()
                if n in whole.activations and not grid.same(whole.activations[n])
            ),
            float_weights=tuple(n for n in whole.weights if n not in plan.weights),
            float_macs_fraction=share,
            whole_float_macs_fraction=self._whole[0],
            weight_bytes=size,
            whole_weight_bytes=self._whole[2],
            retyped=tuple((n, g.dtype) for n, g in plan.activations.items() if g.dtype != own),
            unheeded=tuple(
                name
                for name, dtype in types.items()
                if name not in plan.activations or plan.activations[name].dtype != dtype
            ),
            wide_macs_fraction=wide,
        )

    def distinct(self, names: Sequence[str]) -> tuple[str, ...]:
        """Names that stand for different nodes, of those that pre-processing fused the first."""
        found: dict[tuple[str, ...], str] = {}
        for name in names:
            own = quantizer_names(self._names, [name], self._config)
            if own:
                found.setdefault(own, name)
        return tuple(found.values())

    def places(self, exclude: Collection[str]) -> frozenset[str]:
        """The tensors that are quantized under a list.

        Raises:
            InspectorError, UnplannableError: see `change`.
        """
        plan = self._plan(exclude, None)
        return frozenset((*plan.activations, *plan.weights))

    def all_but(self, names: Collection[str]) -> frozenset[str]:
        """The list that leaves everything else in float, as names of the prepared model.

        Args:
            names: of the float file.

        Raises:
            ExclusionError: a name that is not in the model.
        """
        own = quantizer_names(self._names, names, self._config)
        return frozenset(self._prepared.node_by_name).difference(own)

    def runner(
        self, exclude: Collection[str], overrides: Overrides = None, part: str = BOTH
    ) -> Run:
        """What runs the samples under a list, in order.

        Args:
            exclude: nodes of the float file.
            overrides: see `Quantizer.plan`.
            part: what is quantized: BOTH, WEIGHTS or ACTIVATIONS.
        """
        plan = part_of_plan(self._plan(exclude, overrides), part)
        carried = Carried(self._states)

        def run(feed: Feed, sample: str) -> Outputs:
            given = carried.into(feed, sample)
            # A state comes out otherwise under every list: what it leads to does not come again.
            found = self.board.run(plan, given, sample=sample, remember=not self._states)
            carried.keep(found)
            return found

        return run

    @property
    def carriers(self) -> Mapping[str, str]:
        """By activation without a range of its own, the one whose override is its override.

        What a folded Relu or Clip reads, and what has the scale of another; without any list.
        """
        whole = self.board.whole
        behind = self._behind(whole)
        return {**whole.shares, **{n: whole.shares.get(r, r) for n, r in behind.items()}}

    def _behind(self, plan: Plan) -> dict[str, str]:
        """What folded Relus and Clips give, by what they read."""
        nodes = (self._prepared.node_by_name[name] for name in plan.folded)
        return {node.inputs[0]: node.outputs[0] for node in nodes}

    def _costs(self, plan: Plan) -> tuple[float, float, int]:
        """Shares of the multiply-accumulates in float and at 16 bits, and bytes of the weights."""
        nodes = self._prepared.node_by_name
        in_float = {
            name
            for name in self._macs
            if not all(i in plan.activations or i in plan.weights for i in nodes[name].inputs[:2])
        }
        behind = self._behind(plan)
        wide = {n for n, grid in plan.activations.items() if grid.zero_point.itemsize == 2}
        at_16_bits = {
            name
            for name in self._macs
            if name not in in_float
            and wide.intersection(
                [*nodes[name].inputs[:2], *(behind.get(o, o) for o in nodes[name].outputs)]
            )
        }
        total = 0
        for name in self._prepared.constant_names:
            info = self._prepared.info(name)
            grid = plan.weights.get(name)
            if grid is not None:
                bits = 4 if "int4" in grid.zero_point.dtype.name else grid.zero_point.itemsize * 8
                total += (_size(info.shape) * bits + 7) // 8
                total += grid.scale.nbytes + grid.zero_point.nbytes
            elif info.dtype in FLOAT_DTYPES:
                total += _size(info.shape) * _BYTES.get(info.dtype, 4)
        return _share(self._macs, in_float), _share(self._macs, at_16_bits), total


class SurgerySource:
    """Freeing nodes in a finished file.

    Args:
        float_model: the float model.
        quantized: the file.
        matching: of the two.
        feed: the float model's first sample.
        states: (output, input) pairs of the float model that carry over.

    Raises:
        UnplannableError: nothing in the file can be freed.
        RunError: the runtime refuses the graph with both forms.
    """

    def __init__(
        self,
        float_model: Model,
        quantized: Model,
        matching: Matching,
        feed: Feed,
        states: States = (),
    ) -> None:
        self._both = switchable(float_model, quantized, matching)
        if not self._both.switches:
            raise UnplannableError("no node of this file can be left in float by surgery")
        self._float_model = float_model
        self._matching = matching
        self._session = open_session(self._both.model, optimized=False)
        self._outputs = {
            n: other for n, other in matching.outputs.items() if other in self._session.output_names
        }
        self.output_names: Collection[str] = self._outputs
        pairs = {pair.name: pair for pair in matching.activations}
        self._layouts = OutputLayouts(quantized, matching, self._outputs, pairs)
        self._states = tuple((matching.outputs[o], matching.inputs[i]) for o, i in states)
        self._macs = count_macs(float_model, feed)
        self._can = frozenset(self._both.can_be_freed)
        self.carriers: Mapping[str, str] = {}

    def change(self, exclude: Collection[str], overrides: Overrides = None) -> Change:
        """What a list changes; the bytes of weights are an estimate from 8-bit ones.

        Raises:
            UnplannableError: grids were set by hand, which surgery does not take.
        """
        if overrides:
            raise UnplannableError("surgery leaves every other scale as the file has it")
        names = self._can.intersection(exclude)
        nodes = self._float_model.node_by_name
        known = self._float_model.constant_names
        sizes = {
            i: _size(self._float_model.info(i).shape)
            for name in self._can
            for i in nodes[name].inputs
            if i in known and self._float_model.info(i).dtype in FLOAT_DTYPES
        }
        in_float = {i for name in names for i in nodes[name].inputs if i in sizes}
        rest = set(self._macs) - self._can
        return Change(
            float_weights=tuple(sorted(in_float)),
            refused=tuple((n, self._both.refused[n]) for n in exclude if n in self._both.refused),
            float_macs_fraction=_share(self._macs, rest | names),
            whole_float_macs_fraction=_share(self._macs, rest),
            weight_bytes=sum(size * (4 if i in in_float else 1) for i, size in sizes.items()),
            whole_weight_bytes=sum(sizes.values()),
        )

    def distinct(self, names: Sequence[str]) -> tuple[str, ...]:
        """Names of nodes that can be freed, of those that are freed as one the first."""
        found: dict[bytes, str] = {}
        for name in names:
            if name in self._can:
                found.setdefault(self._both.feed([name])[self._both.input_name].tobytes(), name)
        return tuple(found.values())

    def places(self, exclude: Collection[str]) -> frozenset[str]:
        """Those places of the file that are quantized under a list, of all that lists can free."""
        bits = self._both.feed(sorted(self._can.intersection(exclude)))[self._both.input_name]
        return frozenset(str(at) for at, freed in enumerate(bits) if not freed)

    def runner(
        self, exclude: Collection[str], overrides: Overrides = None, part: str = BOTH
    ) -> Run:
        """What runs the samples under a list, in order.

        Raises:
            UnplannableError: weights or activations alone are asked for.
        """
        if part != BOTH:
            raise UnplannableError("surgery takes weights and activations together")
        bits = self._both.feed(sorted(self._can.intersection(exclude)))
        carried = Carried(self._states)

        def run(feed: Feed, sample: str) -> Outputs:
            theirs = carried.into(feed_for_quantized(self._matching, feed), sample)
            found = self._session.run({**theirs, **bits}, sample=sample)
            carried.keep(found)
            return {n: self._layouts.as_float(n, found[o]) for n, o in self._outputs.items()}

        return run

    def fit(self, shapes: Mapping[str, tuple[int, ...]], feed: Feed) -> None:
        """Learns from one sample how outputs are laid out that nothing else tells.

        Args:
            shapes: of the float model's outputs for the sample.
            feed: the sample.
        """
        theirs = feed_for_quantized(self._matching, feed)
        found = self._session.run({**theirs, **self._both.feed(())})
        for name, other in self._outputs.items():
            self._layouts.fit(name, shapes[name], found[other].shape)


class FloatRuns:
    """The float model's outputs of every sample, with as many of the feeds as memory holds.

    Args:
        float_model: the user's float model.
        feeds: at least one.
        mask: the input that marks padding; "" for none.
        states: (output, input) pairs that carry over from sample to sample.
        progress: told the sample that the model runs on.

    Attributes:
        outputs: by sample, in order.
        output_names: of the model, in order.
        padding: which positions to leave out; None for none.

    Raises:
        RunError: the runtime refuses the model or a feed.
    """

    def __init__(
        self,
        float_model: Model,
        feeds: Feeds,
        *,
        mask: str = "",
        states: States = (),
        progress: Progress = no_progress,
    ) -> None:
        session = open_session(float_model, optimized=False)
        self.output_names = session.output_names
        self.outputs: list[Outputs] = []
        self._feeds = feeds
        # Read from disk again where they are too many to be held.
        self._held: dict[int, Feed] = {}
        size = 0
        carried = Carried(tuple(states))
        for at, feed in enumerate(feeds):
            progress(at / len(feeds), f"float model: sample {at + 1} of {len(feeds)}")
            found = session.run(carried.into(feed, feeds.names[at]), sample=feeds.names[at])
            carried.keep(found)
            self.outputs.append(found)
            size += sum(value.nbytes for value in feed.values())
            if size <= HELD_BYTES:
                self._held[at] = feed
        self.padding: Padding | None = None
        if mask:
            self.padding = Padding(float_model, mask)
            self._masks = [self.padding.mask_of(f, feeds.names[at]) for at, f in enumerate(feeds)]
            for at in self.padding.telling(self._masks):
                self.padding.learn(self._masks[at], self.outputs[at])

    def feed(self, at: int) -> Feed:
        """A sample's inputs."""
        return self._held[at] if at in self._held else self._feeds[at]

    def parts(self, at: int) -> Parts:
        """What of an output counts in a sample, until this is asked for another one."""
        if self.padding is None:
            return whole
        self.padding.use(self._masks[at])
        return self.padding.parts


class Previewer:
    """Previews of one model on some feeds.

    Holds the float model's outputs of every sample.

    Args:
        float_model: the user's float model.
        source: what computes the outputs under a list.
        feeds: at least one.
        mask: the input that marks padding; "" for none.
        states: (output, input) pairs that carry over from sample to sample.
        metrics: what else the outputs are judged by.
        progress: told the sample that the float model runs on.

    Raises:
        RunError: the runtime refuses a model or a feed.
    """

    def __init__(
        self,
        float_model: Model,
        source: Source,
        feeds: Feeds,
        *,
        mask: str = "",
        states: States = (),
        metrics: Sequence[TaskMetric] = (),
        progress: Progress = no_progress,
    ) -> None:
        self.source = source
        self.feeds = feeds
        self._metrics = tuple(metrics)
        self._float_model = float_model
        self._float = FloatRuns(float_model, feeds, mask=mask, states=states, progress=progress)
        self._names = [
            n
            for n in self._float.output_names
            if n in source.output_names
            and all(values[n].dtype.kind == "f" for values in self._float.outputs)
        ]
        if isinstance(source, SurgerySource):
            source.fit({n: v.shape for n, v in self._float.outputs[0].items()}, feeds[0])

    def preview(
        self,
        exclude: Collection[str],
        overrides: Overrides = None,
        *,
        progress: Progress = no_progress,
    ) -> Preview:
        """What a list would give.

        Args:
            exclude: nodes of the float file.
            overrides: see `Quantizer.plan`.
            progress: called before every sample; what it raises ends the preview.

        Raises:
            InspectorError: a name or a grid cannot be used.
            UnplannableError: the source cannot show this list.
        """
        begin = time.perf_counter()
        change = self.source.change(exclude, overrides)
        run = self.source.runner(exclude, overrides)
        padding = self._float.padding
        parts = {n: self._watch(n) for n in self._names}
        watches = {n: OutputWatch(n, part, None, padding) for n, part in parts.items()}
        task = TaskWatch(self.feeds.labels) if self.feeds.labels else None
        metrics = [MetricWatch(metric, padding) for metric in self._metrics]
        for at, name in enumerate(self.feeds.names):
            progress(at / len(self.feeds), f"preview: sample {at + 1} of {len(self.feeds)}")
            found = run(self._float.feed(at), name)
            self._float.parts(at)  # the padding is this sample's from here on
            reference = self._float.outputs[at]
            for output, watch in watches.items():
                parts[output].add(reference[output], None, found[output], reference)
                watch.add(reference[output], found[output], None, None)
            if task is not None:
                task.add(self.feeds.rows[at], reference, found)
            mask = None if padding is None else padding.mask
            for metric in metrics:
                metric.add(at, reference, {n: found[n] for n in self._names}, {}, {}, mask)
        fields = {name: getattr(change, name) for name in Change.__dataclass_fields__}
        return Preview(
            outputs=tuple(_output(w, self.feeds.names) for w in watches.values()),
            task=None if task is None else task.task(),
            metrics=tuple(f for f in (metric.figure() for metric in metrics) if f is not None),
            seconds=time.perf_counter() - begin,
            **fields,
        )

    def _watch(self, output: str) -> TensorWatch:
        """The running sums of an output's channels and parts, as `compare` keeps them."""
        pair = ActivationPair(
            name=output,
            node=self._float_model.producers.get(output),
            before=None,
            after=output,
            integers=False,
            qparams=None,
            rectifiers=(),
            matched_by="name",
            note="",
        )
        return TensorWatch(pair, self._float_model, self._float.padding)


def part_of_plan(plan: Plan, part: str) -> Plan:
    """The plan with only its weights (and their biases) or only its activations quantized."""
    if part == WEIGHTS:
        return replace(plan, activations={}, folded=frozenset())
    if part == ACTIVATIONS:
        return replace(plan, weights={}, biases={}, bias_readers={})
    return plan


_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def _size(shape: Sequence[int | str | None] | None) -> int:
    """How many elements a tensor of a known shape has."""
    return math.prod(d for d in shape or () if isinstance(d, int))


def _share(macs: Mapping[str, int], which: Collection[str]) -> float:
    total = sum(macs.values())
    return sum(n for name, n in macs.items() if name in which) / total if total else math.nan


def _output(watch: OutputWatch, samples: Sequence[str]) -> PreviewOutput:
    record = watch.error(samples, None)
    return PreviewOutput(
        name=record.name,
        sqnr_db=record.sqnr_db,
        worst_part_sqnr_db=judged_db(record),
        worst_channel_sqnr_db=record.worst_channel_sqnr_db,
        median_sample_sqnr_db=record.median_sample_sqnr_db,
        worst_sample_sqnr_db=record.worst_sample_sqnr_db,
        per_sample_sqnr_db=record.per_sample_sqnr_db,
    )
