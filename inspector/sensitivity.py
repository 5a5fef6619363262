"""What each node, block or operator type costs the outputs, measured one at a time.

Two ways: *only* this is quantized and all else is in float, and all is quantized *without* this.
Errors cancel and add up, so that the two rank differently; a ranking is where to begin, not the
list. Apart from `search`, which decides: here nothing is chosen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.costs import count_macs
from inspector.errors import ExclusionError, QuantizationError
from inspector.groups import block_of
from inspector.model import Model
from inspector.preview import ACTIVATIONS, BOTH, WEIGHTS, RecipeSource
from inspector.quantizer import UnplannableError
from inspector.runtime import Progress, no_progress
from inspector.task_metrics import TaskMetric
from inspector.trials import Request, Trial, Trials, quantized_nodes

FORMAT, VERSION = "quant-inspector/sensitivity", 1
ONLY, WITHOUT = "only", "without"
WAYS = (ONLY, WITHOUT)
PARTS = (BOTH, WEIGHTS, ACTIVATIONS)
NODE, BLOCK, OP_TYPE = "node", "block", "op-type"
GROUPINGS = (NODE, BLOCK, OP_TYPE)
# Samples of the first look, and what share of the rows is then looked at on all of them.
COARSE_SAMPLES = 4
_REFINED_SHARE, _LEAST_REFINED = 0.25, 8
# Of the intervals.
RESAMPLES, CONFIDENCE, SEED = 1000, 0.9, 0
# Ranks of two halves of the samples that agree less make a ranking unstable.
STABLE_RANKS = 0.7
# Requests that another place is given at a time.
_WAVE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The metric under one list.

    Attributes:
        figure: over the samples; nan where none counts.
        low, high: the middle 90 % of the figure over resamplings of the samples; None with fewer
            than two samples, nan where a resampling has no figure.
        samples: how many it is over.
    """

    figure: float
    low: float | None
    high: float | None
    samples: int

    def to_json(self) -> dict[str, Any]:
        """As plain data; numbers that are not finite are left as they are."""
        return {
            "figure": self.figure, "low": self.low, "high": self.high, "samples": self.samples,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """What one node, block or operator type costs.

    Attributes:
        name: of the node, the path of the block, or the operator type.
        nodes: of the float model, in graph order.
        op_type: of the node; "" for several types.
        macs: multiply-accumulates with the first sample's shapes.
        only: by part ("both", "weights", "activations"), the metric with only this quantized.
        without: the metric with only this left in float; None where it was not measured.
        gain: by how much `without` is better than the whole model on the same samples; negative
            where it is worse, None where it was not measured.
        reason: why something was not measured; "" where nothing is missing.
    """

    name: str
    nodes: tuple[str, ...]
    op_type: str
    macs: int
    only: Mapping[str, Measured] = field(default_factory=dict)
    without: Measured | None = None
    gain: float | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "name": self.name,
            "nodes": list(self.nodes),
            "op_type": self.op_type,
            "macs": self.macs,
            "only": {part: found.to_json() for part, found in self.only.items()},
            "without": None if self.without is None else self.without.to_json(),
            "gain": self.gain,
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class SensitivityTable:
    """The rows, and what they are of.

    Attributes:
        metric, unit, higher_is_better: see `TaskMetric`.
        by: "node", "block" or "op-type".
        samples: of the feeds.
        whole: by part, the metric with everything quantized.
        rows: most sensitive first; those without a figure last.
        stability: by way, the rank correlation (Spearman) between both halves of the samples; None
            where it cannot be told.
        notes: what to know, one sentence each.
        evaluations, runs: lists and samples that were run for this table.
        seconds: how long it took.
        complete: nothing was left out because of a stop.
        interrupted: the stop was Ctrl-C.
    """

    metric: str
    unit: str
    higher_is_better: bool
    by: str
    samples: int
    whole: Mapping[str, Measured]
    rows: tuple[Sensitivity, ...]
    stability: Mapping[str, float | None]
    notes: tuple[str, ...]
    evaluations: int
    runs: int
    seconds: float
    complete: bool
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "metric": {
                "text": self.metric,
                "unit": self.unit,
                "higher_is_better": self.higher_is_better,
            },
            "by": self.by,
            "samples": self.samples,
            "confidence": CONFIDENCE,
            "whole": {part: found.to_json() for part, found in self.whole.items()},
            "rows": [row.to_json() for row in self.rows],
            "stability": dict(self.stability),
            "notes": list(self.notes),
            "evaluations": self.evaluations,
            "runs": self.runs,
            "seconds": self.seconds,
            "complete": self.complete,
        }


def grouped(
    nodes: Sequence[str], op_types: Mapping[str, str], by: str
) -> dict[str, tuple[str, ...]]:
    """What rows are of, by name.

    Args:
        nodes: in graph order.
        op_types: by node.
        by: "node"; "block" for what shares the path before the last ``/`` of a name, inner and
            outer blocks alike, but none of a single node; or "op-type".
    """
    if by == NODE:
        return {name: (name,) for name in nodes}
    found: dict[str, tuple[str, ...]] = {}
    if by == OP_TYPE:
        for kind in dict.fromkeys(op_types[name] for name in nodes):
            found[kind] = tuple(name for name in nodes if op_types[name] == kind)
        return found
    if by != BLOCK:
        raise ValueError(f"by is {by!r}, expected one of {GROUPINGS}")
    for name in nodes:
        members = block_of(name, nodes)
        if members:
            found.setdefault(name.rpartition("/")[0], members)
    return found


def measure_sensitivity(
    trials: Trials,
    float_model: Model,
    nodes: Collection[str] | None = None,
    *,
    by: str = NODE,
    ways: Collection[str] = WAYS,
    parts: Collection[str] = (BOTH,),
    coarse_samples: int | None = COARSE_SAMPLES,
    refined: int | None = None,
    progress: Progress = no_progress,
    stop: Callable[[], bool] = lambda: False,
) -> SensitivityTable:
    """What nodes cost, each measured alone.

    Where there are more than twice `coarse_samples`, all rows are looked at on so many, evenly
    spread, and only the most sensitive on the rest. Ends early, with what is there, when `stop`
    says so and on Ctrl-C; trials that are known are not run again.

    Args:
        trials: of a metric.
        float_model: the user's float model.
        nodes: of it, those to measure; None for all that are quantized. Others are left out.
        by: "node", "block" or "op-type".
        ways: "only", "without" or both.
        parts: of "both", "weights" and "activations", what "only" quantizes of a node.
        coarse_samples: None to take all samples at once.
        refined: rows that are measured on all samples; None for a quarter, at least 8.
        progress: told how many lists were run; what it raises ends the work.
        stop: asked before every list.

    Raises:
        ValueError: an unknown way, part or grouping.
        InspectorError: the models cannot be run.
    """
    for given, known in ((ways, WAYS), (parts, PARTS)):
        wrong = set(given).difference(known)
        if wrong:
            raise ValueError(f"{wrong.pop()!r} is none of {known}")
    return _Sweep(
        trials, float_model, nodes, by, ways, parts, coarse_samples, refined, progress, stop
    ).run()


class _Enough(Exception):
    """The work was stopped."""


class _Sweep:
    """The state of one measurement."""

    def __init__(
        self,
        trials: Trials,
        float_model: Model,
        nodes: Collection[str] | None,
        by: str,
        ways: Collection[str],
        parts: Collection[str],
        coarse_samples: int | None,
        refined: int | None,
        progress: Progress,
        stop: Callable[[], bool],
    ) -> None:
        self.begin = time.monotonic()
        self.trials, self.by = trials, by
        self.progress, self.stop = progress, stop
        self.before = trials.evaluations, trials.runs
        self.notes = list(trials.notes)
        own = quantized_nodes(trials, float_model, nodes)
        types = {n.name: n.op_type for n in float_model.nodes}
        self.groups = grouped(own, types, by)
        left_out = [] if nodes is None else sorted(set(nodes).difference(own))
        if left_out:
            self.notes.append(
                f"left out, because they are not quantized or are one with another node: "
                f"{', '.join(left_out)}"
            )
        if not self.groups and own:
            self.notes.append(f"there is nothing to group by {by}: no two nodes share a path")
        self.types = {
            name: types[members[0]] if len({types[m] for m in members}) == 1 else ""
            for name, members in self.groups.items()
        }
        self.macs = count_macs(float_model, trials.feeds[0])
        self.parts = [part for part in PARTS if part in parts]
        self.ways = [way for way in WAYS if way in ways]
        self.reasons: dict[str, str] = {}
        if not isinstance(trials.source, RecipeSource):
            self._without_only()
        self.coarse = trials.every
        if coarse_samples is not None and len(trials.every) > 2 * max(1, coarse_samples):
            count = max(1, coarse_samples)
            step = len(trials.every) / count
            self.coarse = tuple(int(at * step) for at in range(count))
        self.refined = refined
        self.failed: dict[Request, str] = {}
        self.done = self.planned = 0

    def _without_only(self) -> None:
        if ONLY in self.ways:
            self.notes.append(
                "only one node quantized was not measured: a finished file keeps the scales of its "
                "other nodes, so surgery can leave nodes in float, not quantize them"
            )
            self.ways = [WITHOUT] if WITHOUT in self.ways else []

    # -- requests --------------------------------------------------------------------------

    def only(self, name: str, part: str) -> Request:
        source = self.trials.source
        assert isinstance(source, RecipeSource)
        return Request(exclude=source.all_but(self.groups[name]), part=part)

    def without(self, name: str) -> Request:
        return Request(exclude=frozenset(self.groups[name]))

    def whole(self, part: str) -> Request:
        return Request(part=part)

    def requests(self, names: Iterable[str]) -> list[Request]:
        """What these rows take, one way after the other."""
        found = []
        if ONLY in self.ways:
            # The parts of one node in a row share what comes before it.
            found += [self.only(name, part) for name in names for part in self.parts]
        if WITHOUT in self.ways:
            found += [self.without(name) for name in names]
        return found

    # -- the work --------------------------------------------------------------------------

    def run(self) -> SensitivityTable:
        complete, interrupted = True, False
        names = list(self.groups)
        whole = [self.whole(part) for part in (self.parts if ONLY in self.ways else [BOTH])]
        first = [*whole, *self.requests(names)] if names else whole
        coarse = len(self.coarse) < len(self.trials.every)
        count = len(names) if not coarse else self._count(names)
        # The second look at most takes each way's worst.
        self.planned = len(first) + (len(self.requests(names)) * count // max(1, len(names)))
        self.planned -= 0 if coarse else len(first) - len(whole)
        try:
            self._measure(first, self.coarse)
            if coarse:
                again = self._worst(names, count)
                if len(again) < len(names):
                    self.notes.append(
                        f"{len(again)} of {len(names)} rows were measured on all "
                        f"{len(self.trials.every)} samples, because they are the most sensitive "
                        f"on {len(self.coarse)}; the others on those {len(self.coarse)} alone"
                    )
                self.planned = self.done + len(whole) + len(self.requests(again))
                self._measure([*whole, *self.requests(again)], self.trials.every)
        except (_Enough, KeyboardInterrupt) as stop:
            complete, interrupted = False, isinstance(stop, KeyboardInterrupt)
            self.notes.append("stopped: what was not measured yet is missing")
        return self._table(complete, interrupted)

    def _count(self, names: Sequence[str]) -> int:
        if self.refined is not None:
            return min(self.refined, len(names))
        return min(len(names), max(_LEAST_REFINED, math.ceil(_REFINED_SHARE * len(names))))

    def _worst(self, names: Sequence[str], count: int) -> list[str]:
        """The rows to look at again: each way's most sensitive, in graph order."""
        found: set[str] = set()
        known = self._known()
        for way in self.ways:
            # On the same samples, whatever else is known: a second time the same rows follow.
            keys = [self._key(name, way, known, self.coarse) for name in names]
            ranked = sorted((key, at) for at, key in enumerate(keys) if key is not None)
            found.update(names[at] for _, at in ranked[:count])
        return [name for name in names if name in found]

    def _key(
        self,
        name: str,
        way: str,
        known: Mapping[Request, Trial],
        samples: Sequence[int] | None = None,
    ) -> float | None:
        """What ranks a row one way, lowest first; None without a figure.

        Args:
            name: of the row.
            way: "only" or "without".
            known: all trials.
            samples: None for all that count of the trial.
        """
        trial = known.get(self._ranked_by(name, way))
        if trial is None:
            return None
        counted = self._samples(trial) if samples is None else samples
        if not counted or not all(at in trial.sums for at in counted):
            return None
        figure = self.trials.metric.figure(trial.total(counted))
        if math.isnan(figure):
            return -math.inf if way == ONLY else math.inf
        # Only this quantized: bad is sensitive. All but this quantized: good is.
        return figure if self.trials.metric.higher_is_better is (way == ONLY) else -figure

    def _measure(self, requests: Sequence[Request], samples: Sequence[int]) -> None:
        size = _WAVE if self.trials.elsewhere is not None else 1
        for at in range(0, len(requests), size):
            if self.stop():
                raise _Enough
            wave = requests[at : at + size]
            share = self.done / max(1, self.planned)
            self.progress(min(share, 1.0), f"list {self.done + 1} of {self.planned}")
            try:
                self.trials.measure_all(wave, samples)
            except (UnplannableError, QuantizationError, ExclusionError):
                for request in wave:  # one of them, and which one is not said
                    self._measure_one(request, samples)
            self.done += len(wave)

    def _measure_one(self, request: Request, samples: Sequence[int]) -> None:
        try:
            self.trials.measure(request, samples)
        except UnplannableError as error:
            self.failed[request] = str(error)
        except (QuantizationError, ExclusionError) as error:
            self.failed[request] = error.message

    # -- the table -------------------------------------------------------------------------

    def _known(self) -> dict[Request, Trial]:
        return {trial.request: trial for trial in self.trials.known()}

    def _samples(self, trial: Trial) -> tuple[int, ...]:
        """All samples, or as many as every row has."""
        if all(at in trial.sums for at in self.trials.every):
            return self.trials.every
        return tuple(at for at in self.coarse if at in trial.sums)

    def _table(self, complete: bool, interrupted: bool) -> SensitivityTable:
        known = self._known()
        metric = self.trials.metric

        def measured(request: Request) -> Measured | None:
            trial = known.get(request)
            if trial is None or not self._samples(trial):
                return None
            return measured_on(metric, trial, self._samples(trial))

        whole = {part: found for part in PARTS if (found := measured(self.whole(part))) is not None}
        rows = []
        for name, members in self.groups.items():
            requests = [self.only(name, part) for part in self.parts] if ONLY in self.ways else []
            only = {r.part: found for r in requests if (found := measured(r)) is not None}
            left, gain = None, None
            if WITHOUT in self.ways:
                requests.append(self.without(name))
                left = measured(requests[-1])
                gain = self._gain(known, requests[-1])
            reasons = dict.fromkeys(self.failed[r] for r in requests if r in self.failed)
            rows.append(
                Sensitivity(
                    name=name,
                    nodes=members,
                    op_type=self.types[name],
                    macs=sum(self.macs.get(member, 0) for member in members),
                    only=only,
                    without=left,
                    gain=gain,
                    reason="; ".join(reasons),
                )
            )
        way = self.ways[0] if self.ways else WITHOUT
        keys = {row.name: self._key(row.name, way, known) for row in rows}
        rows.sort(key=lambda row: math.inf if (key := keys[row.name]) is None else key)
        stability = {way: self._stability(way, known) for way in self.ways}
        for way, ranks in stability.items():
            if ranks is not None and ranks < STABLE_RANKS:
                self.notes.append(
                    f'unstable-ranking: by "{way}", the ranks of one half of the samples and '
                    f"those of the other correlate by {ranks:.2f} only; add samples before "
                    "relying on the order"
                )
        return SensitivityTable(
            metric=metric.text,
            unit=metric.unit,
            higher_is_better=metric.higher_is_better,
            by=self.by,
            samples=len(self.trials.every),
            whole=whole,
            rows=tuple(rows),
            stability=stability,
            notes=tuple(dict.fromkeys(self.notes)),
            evaluations=self.trials.evaluations - self.before[0],
            runs=self.trials.runs - self.before[1],
            seconds=time.monotonic() - self.begin,
            complete=complete,
            interrupted=interrupted,
        )

    def _gain(self, known: Mapping[Request, Trial], request: Request) -> float | None:
        trial, whole = known.get(request), known.get(self.whole(BOTH))
        if trial is None or whole is None:
            return None
        samples = [at for at in self._samples(trial) if at in whole.sums]
        if not samples:
            return None
        metric = self.trials.metric
        after, before = (metric.figure(t.total(samples)) for t in (trial, whole))
        if after == before:
            return 0.0  # both may be infinite
        return after - before if metric.higher_is_better else before - after

    def _stability(self, way: str, known: Mapping[Request, Trial]) -> float | None:
        """How alike two halves of the samples rank the rows that were run on most of them."""
        metric = self.trials.metric
        found: dict[tuple[int, ...], list[tuple[float, ...]]] = {}
        for name in self.groups:
            trial = known.get(self._ranked_by(name, way))
            samples = () if trial is None else self._samples(trial)
            if trial is None or len(samples) < 2:
                continue
            pair = tuple(metric.figure(trial.total(samples[at::2])) for at in range(2))
            if not any(math.isnan(v) for v in pair):
                found.setdefault(samples, []).append(pair)
        if not found:
            return None
        pairs = found[max(found, key=len)]
        return rank_correlation([a for a, _ in pairs], [b for _, b in pairs])

    def _ranked_by(self, name: str, way: str) -> Request:
        return self.without(name) if way == WITHOUT else self.only(name, self.parts[0])


def measured_on(metric: TaskMetric, trial: Trial, samples: Sequence[int]) -> Measured:
    """A trial's figure with its interval.

    The interval is that of a bootstrap: the samples are drawn anew, with replacement and always in
    the same `RESAMPLES` ways, and their sums pooled; no sample is run again.
    """
    figure = metric.figure(trial.total(samples))
    if len(samples) < 2:
        return Measured(figure=figure, low=None, high=None, samples=len(samples))
    sums = np.stack([trial.sums[at] for at in samples])
    drawn = _draws(len(samples)) @ sums
    found = np.sort([metric.figure(total) for total in drawn])
    if np.isnan(found).any():
        return Measured(figure=figure, low=math.nan, high=math.nan, samples=len(samples))
    # No interpolation: figures may be infinite.
    edge = round((1 - CONFIDENCE) / 2 * (len(found) - 1))
    return Measured(
        figure=figure, low=float(found[edge]), high=float(found[-1 - edge]), samples=len(samples)
    )


def _draws(count: int) -> NDArray[np.float64]:
    """How often each of so many samples is drawn, [RESAMPLES, count]."""
    rng = np.random.default_rng(SEED)
    chosen = rng.integers(count, size=(RESAMPLES, count))
    found = np.zeros((RESAMPLES, count))
    np.add.at(found, (np.arange(RESAMPLES)[:, None], chosen), 1)
    return found


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, -1..1, equal values sharing their mean rank.

    None with fewer than three values, or where all of one side are equal.
    """
    if len(first) < 3:
        return None
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (first, second)]
    a, b = (r - r.mean() for r in ranks)
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else None


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: NDArray[np.float64] = last - (counts - 1) / 2
    return means[places]
