"""Exclusion lists measured on feeds by one metric, each sample of each list only once.

What `sensitivity` and `search` share. A trial is a list, and what the metric summed on the samples
it ran on, simulated. Trials are kept in memory, and in a folder where one is given, so that what
was stopped goes on where it was. `open_trials` is how the command line and the app get there from
models and feeds.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.calibration import calibrate
from inspector.comparison import Pin
from inspector.errors import ReportError, RunError
from inspector.feeds import CalibrationSplit, Feeds
from inspector.matching import match_tensors
from inspector.model import FLOAT_DTYPES, Model
from inspector.model_files import load_model
from inspector.output_metrics import Guided, guided, prepared
from inspector.prepare import prepare
from inspector.preview import FloatRuns, Outputs, RecipeSource, Source, SurgerySource
from inspector.quantize import quantize_model
from inspector.quantizer import UnplannableError
from inspector.recipe import QuantConfig, check_overrides
from inspector.runtime import (
    Progress,
    chosen_threads,
    no_progress,
    part_of,
    runtime_version,
)
from inspector.states import States
from inspector.task_metrics import TaskMetric, parse_metric


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to measure.

    Attributes:
        exclude: nodes of the float file that are left in float.
        overrides: ONNX Runtime's entries of `TensorQuantOverrides` as (activation, JSON).
        part: "both", or "weights" or "activations" for these quantized alone.
    """

    exclude: frozenset[str] = frozenset()
    overrides: tuple[tuple[str, str], ...] = ()
    part: str = "both"

    def to_json(self) -> dict[str, Any]:
        """As plain data, the same for equal requests."""
        return {
            "exclude": sorted(self.exclude),
            "overrides": [list(o) for o in self.overrides],
            "part": self.part,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Request:
        """What `to_json` gave."""
        overrides = tuple((str(tensor), str(entry)) for tensor, entry in data["overrides"])
        exclude = frozenset(map(str, data["exclude"]))
        return cls(exclude=exclude, overrides=overrides, part=str(data["part"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What one request gave so far.

    Attributes:
        request: what was measured.
        sums: by sample, what the metric summed there (see `TaskMetric.sums`).
    """

    request: Request
    sums: Mapping[int, NDArray[np.float64]] = field(default_factory=dict)

    def total(self, samples: Iterable[int]) -> NDArray[np.float64]:
        """The sums over some samples; one that is named twice counts twice."""
        # In one order, whatever order they were run in.
        return np.asarray(np.sum([self.sums[at] for at in sorted(samples)], axis=0), np.float64)


# What one request gave on some samples.
Sums = Mapping[int, NDArray[np.float64]]


class LostError(RunError):
    """The place where trials run cannot be used any more; no request is to blame."""


# Runs requests on samples in another place, side by side, and hands on what each gave as it comes;
# what is raised ends the rest. Of one request several parts may come.
Elsewhere = Callable[
    [Sequence[tuple[Request, Sequence[int]]], Callable[[Request, Sums], None], Progress], None
]


# Samples that run at a time: one run leaves cores idle between its nodes.
_THREADS = min(os.cpu_count() or 1, 8)


def _side_by_side(
    work: Callable[[int], Outputs], samples: Sequence[int], threads: int
) -> Generator[Outputs, None, None]:
    """What samples give, in their order; nothing runs any more once it is closed or has raised."""
    if threads < 2 or len(samples) < 2:
        yield from map(work, samples)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Outputs]] = deque()
        rest = iter(samples)
        try:
            while True:
                # No more than one ahead of each thread, or many outputs would be held.
                ahead = islice(rest, 2 * threads - len(waiting))
                waiting.extend(pool.submit(work, at) for at in ahead)
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Trials:
    """Trials of one model, recipe, metric and feeds.

    Holds the float model's outputs of every sample.

    Args:
        float_model: the user's float model.
        source: what computes the outputs under a list.
        feeds: at least one.
        metric: what is measured.
        mask: the input that marks padding; "" for none.
        states: (output, input) pairs that carry over from sample to sample; all samples of a
            request then run, in order.
        folder: keeps the trials; None for memory alone.
        key: what tells this model, recipe, metric and feeds from all others, for `folder`.
        notes: what to know about the source, one sentence each.
        progress: told the sample that the float model runs on.

    Attributes:
        evaluations: requests that took a run since this was opened.
        runs: samples that were run.
        elsewhere: runs what is missing; None for this process.

    Raises:
        RunError: the runtime refuses a model or a feed.
        ReportError: the folder cannot be used, or holds trials of something else.
    """

    def __init__(
        self,
        float_model: Model,
        source: Source,
        feeds: Feeds,
        metric: TaskMetric,
        *,
        mask: str = "",
        states: States = (),
        folder: Path | None = None,
        key: str = "",
        notes: Sequence[str] = (),
        progress: Progress = no_progress,
    ) -> None:
        self.source = source
        self.feeds = feeds
        self.notes = tuple(notes)
        self.evaluations = self.runs = 0
        self.elsewhere: Elsewhere | None = None
        self._states = tuple(states)
        self._float = FloatRuns(float_model, feeds, mask=mask, states=states, progress=progress)
        if isinstance(source, SurgerySource):
            source.fit({n: v.shape for n, v in self._float.outputs[0].items()}, feeds[0])
        found_of = enumerate(self._float.outputs)
        self.metric = prepared(metric, ((found, self._float.parts(at)) for at, found in found_of))
        self._kept: dict[Request, dict[int, NDArray[np.float64]]] = {}
        self._file = None if folder is None else _opened(folder, key, self._kept)

    @property
    def every(self) -> tuple[int, ...]:
        """All samples."""
        return tuple(range(len(self.feeds)))

    def known(self) -> list[Trial]:
        """All trials so far, in the order they were first run in."""
        return [Trial(request=r, sums=dict(s)) for r, s in self._kept.items() if s]

    def measure(
        self,
        request: Request,
        samples: Sequence[int] | None = None,
        *,
        progress: Progress = no_progress,
    ) -> Trial:
        """A trial with at least these samples; what is known is not run again.

        Args:
            request: what to measure.
            samples: indices; None for all.
            progress: called before every sample; what it raises ends the trial.

        Raises:
            InspectorError: a name or a grid cannot be used.
            UnplannableError: the source cannot show this list.
            LostError: the place where trials run is gone.
        """
        if self.elsewhere is not None:
            return self.measure_all([request], samples, progress=progress)[0]
        missing = self._missing(request, samples)
        if missing:
            self.evaluations += 1
            overrides = {tensor: json.loads(entry) for tensor, entry in request.overrides}
            run = self.source.runner(request.exclude, overrides or None, request.part)
            fresh: dict[int, NDArray[np.float64]] = {}

            def outputs(at: int) -> Outputs:
                return run(self._float.feed(at), self.feeds.names[at])

            # Carried states come from the sample before.
            threads = 1 if self._states else chosen_threads() or _THREADS
            with closing(_side_by_side(outputs, missing, threads)) as results:
                for place, at in enumerate(missing):
                    progress(place / len(missing), f"sample {place + 1} of {len(missing)}")
                    found = next(results)
                    reference, parts = self._float.outputs[at], self._float.parts(at)
                    fresh[at] = self.metric.sums(at, reference, found, parts)
            self._keep(request, fresh)
        return Trial(request=request, sums=dict(self._kept[request]))

    def _missing(self, request: Request, samples: Sequence[int] | None) -> list[int]:
        """The samples of a trial that have not been run."""
        wanted = self.every if samples is None or self._states else tuple(samples)
        known = self._kept.setdefault(request, {})
        return [at for at in dict.fromkeys(wanted) if at not in known]

    def _keep(self, request: Request, fresh: Sums) -> None:
        """Takes in what a request gave on some samples."""
        self.runs += len(fresh)
        self._kept[request].update(fresh)
        if self._file is not None:
            _append(self._file, request, fresh)

    def measure_all(
        self,
        requests: Sequence[Request],
        samples: Sequence[int] | None = None,
        *,
        progress: Progress = no_progress,
    ) -> list[Trial]:
        """Trials of several requests, in their order; they may run side by side elsewhere."""
        if self.elsewhere is not None:
            wave = [(r, self._missing(r, samples)) for r in dict.fromkeys(requests)]
            wave = [(request, missing) for request, missing in wave if missing]
            waiting = {request for request, _ in wave}

            def keep(request: Request, fresh: Sums) -> None:
                self.evaluations += request in waiting
                waiting.discard(request)
                self._keep(request, fresh)

            if wave:
                self.elsewhere(wave, keep, progress)
            return [Trial(request=r, sums=dict(self._kept[r])) for r in requests]
        found = []
        for at, request in enumerate(requests):
            progress(at / len(requests), f"trial {at + 1} of {len(requests)}")
            found.append(self.measure(request, samples))
        return found

    def figure(self, trial: Trial, samples: Iterable[int] | None = None) -> float:
        """The metric over some samples of a trial; None for all that it ran on."""
        return self.metric.figure(trial.total(trial.sums if samples is None else samples))


def quantized_nodes(
    trials: Trials, float_model: Model, among: Collection[str] | None = None
) -> tuple[str, ...]:
    """The float file's nodes that are quantized where all others are not, in graph order.

    Of several that are one node once the model is prepared, the first.

    Args:
        trials: of what quantizes.
        float_model: the user's float model.
        among: look at these only; None for all.
    """
    source = trials.source
    found = source.distinct(
        [n.name for n in float_model.nodes if n.name and n.op_type != "Constant"]
    )
    every = frozenset(found)
    least = source.places(every)
    return tuple(
        name
        for name in found
        if (among is None or name in among) and not source.places(every - {name}) <= least
    )


def open_trials(
    float_model: Model,
    config: QuantConfig,
    feeds: Feeds,
    split: CalibrationSplit,
    metric: str,
    *,
    cache: Path,
    quantized: Model | None = None,
    pins: Sequence[Pin] = (),
    mask: str = "",
    states: States = (),
    types: Collection[str] = (),
    folder: Path | None = None,
    beside: bool = False,
    expected: Path | None = None,
    allow_code: bool = False,
    progress: Progress = no_progress,
) -> Trials:
    """Trials of a recipe, or of freeing nodes in a finished file.

    A recipe of format "qdq" is re-quantized for every list. Where that cannot be planned (dynamic,
    "qoperator", weights in blocks …) its file is made once, and lists free nodes in it; `notes` of
    what is returned then says so.

    Args:
        float_model: the user's float model.
        config: the recipe; only told apart by where there is a finished file.
        feeds: what is measured, at least one.
        split: what calibrates.
        metric: as `parse_metric` takes it.
        cache: folder for prepared models and ranges.
        quantized: a finished file; None to quantize by the recipe.
        pins: of the finished file.
        mask, states, folder: see `Trials`.
        types: integer types that overrides may put an activation on, beside the recipe's own.
        beside: measure the outputs' SQNR as well, see `output_metrics.Guided`.
        expected, allow_code: see `parse_metric`.
        progress: see `runtime.Progress`.

    Raises:
        UnplannableError: nothing in the finished file can be freed.
        InspectorError: a model, recipe, metric or feed that cannot be used.
    """
    notes: list[str] = []
    source: Source | None = None
    if quantized is None and config.format == "qdq":
        try:
            progress(0.0, "pre-processing the model")
            made_ready = prepare(float_model, config, cache)
            check_overrides(made_ready.model, config)
            ranges = calibrate(
                made_ready.model,
                split.calibration,
                method=config.method,
                percentile=config.percentile,
                op_types=config.op_types,
                limit=config.calibration_samples,
                cache=cache,
                progress=part_of(progress, 0.1, 0.5),
            )
            source = RecipeSource(made_ready, config, ranges.path, feeds[0], states, types)
        except UnplannableError as error:
            notes.append(f"lists free nodes in the recipe's own file, because {error}")
    elif quantized is None:
        notes.append(
            f"lists free nodes in the recipe's own file, because format {config.format} is not "
            "re-quantized in memory"
        )
    identity = "" if quantized is None else quantized.sha256
    if source is None:
        with tempfile.TemporaryDirectory(
            prefix="quant-inspector-", ignore_cleanup_errors=True
        ) as name:
            if quantized is None:
                made = quantize_model(
                    float_model,
                    config,
                    calibration=split.calibration,
                    output=Path(name) / "quantized.onnx",
                    cache=cache,
                    progress=part_of(progress, 0.0, 0.5),
                )
                quantized = load_model(made.path)
            progress(0.5, "matching the file with the float model")
            matching = match_tensors(float_model, quantized, pins=pins)
            source = SurgerySource(float_model, quantized, matching, feeds[0], states)
    outputs = [
        o.name
        for o in float_model.outputs
        if o.name in source.output_names and o.dtype in (*FLOAT_DTYPES, "unknown")
    ]
    found = parse_metric(metric, outputs, feeds, expected=expected, allow_code=allow_code)
    if beside:
        found = guided(found, outputs)
    parts = [
        float_model.sha256, identity, [[p.float_name, p.quantized_name] for p in pins],
        config.to_json() if not identity else None, feeds.digest, split.calibration.digest,
        found.text, mask, [list(s) for s in states], runtime_version(),
        isinstance(found, Guided), list(feeds.labels or ()),
        "" if expected is None else hashlib.sha256(expected.read_bytes()).hexdigest(),
    ]  # fmt: skip
    return Trials(
        float_model,
        source,
        feeds,
        found,
        mask=mask,
        states=states,
        folder=folder,
        key=hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(),
        notes=notes,
        progress=part_of(progress, 0.5, 1.0),
    )


_NAME = "trials.jsonl"


def _opened(folder: Path, key: str, kept: dict[Request, dict[int, NDArray[np.float64]]]) -> Path:
    """The file of a folder's trials, which are put into `kept`.

    Raises:
        ReportError: it cannot be read or written, or is of something else.
    """
    file = folder / _NAME
    try:
        # Without what it lies in: that of a pair that was deleted meanwhile must not come back.
        folder.mkdir(exist_ok=True)
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        whole_lines = [line for line in map(_read, lines) if line is not None]
        if whole_lines and whole_lines[0].get("key") != key:
            raise ReportError(
                f"{folder} holds trials of another model, recipe, metric or feeds",
                hint="Name an empty folder, or the options these trials were made with.",
            )
        if len(whole_lines) < len(lines) or not whole_lines:
            # A line that was cut off by a stop would spoil the next one.
            text = "".join(json.dumps(each) + "\n" for each in whole_lines or [{"key": key}])
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ReportError(
            f"trials cannot be kept in {folder}: {error.strerror or error}",
            hint="Name a folder that can be written.",
        ) from error
    for line in whole_lines[1:]:
        request = Request.from_json(line["request"])
        sums = {int(at): np.array([float(v) for v in s]) for at, s in line["sums"].items()}
        kept.setdefault(request, {}).update(sums)
    return file


def _read(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _append(file: Path, request: Request, sums: Mapping[int, NDArray[np.float64]]) -> None:
    data = {
        "request": request.to_json(),
        "sums": {str(at): [_number(v) for v in s.tolist()] for at, s in sums.items()},
    }
    with file.open("a", encoding="utf-8") as writer:
        writer.write(json.dumps(data) + "\n")


def _number(value: float) -> float | str:
    """A float that strict JSON can hold."""
    return value if math.isfinite(value) else repr(value)
