"""What one workspace shows while the user is still choosing: previews of exclusion lists.

Apart from `workbench`, because these jobs leave nothing in the store: the models, ranges and the
switchboard stay in the worker process from click to click.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from inspector.calibration import calibrate
from inspector.cluster import cluster_address, trials_at
from inspector.comparison import Pin
from inspector.diagnosis import GainOf, diagnose, previewed_gain, requantized_gain
from inspector.equalize import comparable_float
from inspector.errors import Cancelled, InspectorError, RunError
from inspector.feeds import Feeds, split_calibration
from inspector.findings import Case, case_of
from inspector.matching import match_tensors
from inspector.model import Model
from inspector.prepare import prepare, wanted_opset
from inspector.preview import Change, Preview, Previewer, RecipeSource, SurgerySource
from inspector.quantize import extra_options
from inspector.quantizer import UnplannableError
from inspector.real_files import RealFiles, cures_for, try_cures
from inspector.recipe import ACTIVATION_TYPES, QuantConfig
from inspector.render import read_comparison, strict
from inspector.runtime import Progress, no_progress, part_of
from inspector.search import find_exclusions
from inspector.search_result import Goal, SearchTrial
from inspector.sensitivity import ONLY, measure_sensitivity
from inspector.store import (
    FINDINGS_KEY,
    SENSITIVITY_KEY,
    PairRecord,
    RunRecord,
    Workspace,
    made_by_surgery,
)
from inspector.trials import Request, Trial, Trials, quantized_nodes
from inspector.workbench import metrics_of, open_feeds, open_model, stamps_of

# Each holds the float model's outputs, a session and the weights twice.
KEPT_PREVIEWERS = 2


_opened: OrderedDict[str, Previewer] = OrderedDict()
# What each gives without any list.
_without: WeakKeyDictionary[Previewer, Preview] = WeakKeyDictionary()


def preview_list(
    root: Path,
    *,
    run_id: str,
    config: Mapping[str, Any] | None,
    exclude: Sequence[str],
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """What a list would give, as strict JSON; nothing is kept in the store.

    The keys are those of `Preview`, and:
        reason: why there is no preview, "" where there is one; the other keys are then absent.
        without: "outputs" of the same recipe without a list, where the run is the loaded file: its
            own figures have another calibration in them; None elsewhere.
        without_metrics: "metrics" of the same; None elsewhere.
        carriers: see `RecipeSource.carriers`; {} for surgery, which sets no grids.
        size_bytes: estimate of the file, from the run's file and the weights that change.
        latency_seconds: estimate, from what the run and the float model took and the share of
            multiply-accumulates in float; None where the run's file was made in another way or was
            not timed.

    Args:
        root: the workspace's folder.
        run_id: the run the list starts from.
        config: a recipe to re-quantize with, as `QuantConfig.to_json` gives it; None for surgery
            on the loaded file.
        exclude: nodes of the float file.
        progress: see `runtime.Progress`.

    Raises:
        InspectorError: the recipe or a name cannot be used.
    """
    workspace = Workspace(root)
    run = workspace.run(run_id)
    pair = workspace.pair(run.pair_id)
    opening, running = part_of(progress, 0.0, 0.5), part_of(progress, 0.5, 1.0)
    without, overrides = None, None
    try:
        if config is None:
            previewer = _open_surgery(workspace, pair, opening)
            found = previewer.preview(exclude, progress=running)
            alike = run.number == 0 or made_by_surgery(run)
        else:
            options = QuantConfig.from_json(config)
            previewer = _open_recipe(workspace, pair, options, opening)
            # Grids that are set by hand are inputs of the same switchboard.
            entries = extra_options(options).get("TensorQuantOverrides", {})
            overrides = {tensor: each[0] for tensor, each in entries.items()}
            found = previewer.preview(exclude, overrides, progress=running)
            own_recipe = QuantConfig.from_json(run.recipe)
            if run.number == 0 and replace(options, overrides=own_recipe.overrides) == own_recipe:
                without = _without_list(previewer, own_recipe)
            alike = own_recipe == options
            alike &= not run.summary.get("surgery_fits") and not made_by_surgery(run)
        own = previewer.source.change(run.exclusions, overrides) if alike else None
    except UnplannableError as error:
        return {"reason": str(error)}
    result: dict[str, Any] = strict(
        {
            **asdict(found),
            **_estimates(run, found, own),
            "reason": "",
            "without": None if without is None else [asdict(o) for o in without.outputs],
            "without_metrics": None
            if without is None
            else [asdict(figure) for figure in without.metrics],
            "carriers": previewer.source.carriers,
        }
    )
    return result


def _without_list(previewer: Previewer, config: QuantConfig) -> Preview | None:
    """What the recipe alone gives, computed once; None where this previewer has not its types."""
    if previewer not in _without:
        entries = extra_options(config).get("TensorQuantOverrides", {})
        try:
            found = previewer.preview((), {tensor: each[0] for tensor, each in entries.items()})
        except UnplannableError:
            return None
        _without[previewer] = found
    return _without[previewer]


def _estimates(run: RunRecord, found: Preview, own: Change | None) -> dict[str, Any]:
    """Size and latency of the file the list would give.

    Args:
        run: measured.
        found: the list's preview.
        own: what the run's own list changes; None where it has another recipe.
    """
    if own is None:
        return {"size_bytes": None, "latency_seconds": None}
    # What reads or gives 16 bits computes in float as well.
    share = own.float_macs_fraction + own.wide_macs_fraction
    size = run.model.size_bytes + found.weight_bytes - own.weight_bytes
    latency = run.summary.get("latency")
    seconds = None
    if latency is not None and share < 1 and math.isfinite(share):
        in_float, so_far = float(latency["float_seconds"]), float(latency["quantized_seconds"])
        in_integers = (so_far - in_float * share) / (1 - share)
        wanted = found.float_macs_fraction + found.wide_macs_fraction
        seconds = max(in_float * wanted + in_integers * (1 - wanted), 0.0)
    return {"size_bytes": size, "latency_seconds": seconds}


def _kept(key: str, make: Callable[[], Previewer]) -> Previewer:
    """What was opened under a key, as the click before left it."""
    if key not in _opened:
        _opened[key] = make()
    _opened.move_to_end(key)
    while len(_opened) > KEPT_PREVIEWERS:
        _opened.popitem(last=False)
    return _opened[key]


def _key(workspace: Workspace, pair: PairRecord, what: Any) -> str:
    stamps = stamps_of(pair.inputs, pair.calibration, pair.options)
    return json.dumps([str(workspace.root), pair.id, what, stamps], sort_keys=True)


def _open_recipe(
    workspace: Workspace, pair: PairRecord, config: QuantConfig, progress: Progress
) -> Previewer:
    """The previewer of a pair and a recipe.

    Its overrides' ranges are inputs. Their types are not: a model is lifted to another opset for
    some, and the session has branches for those that are asked for.

    Raises:
        UnplannableError: this recipe has none.
    """
    if config.format != "qdq":
        raise UnplannableError(f"a recipe of format {config.format} has no preview")

    given = {each.quant_type for each in config.overrides}
    types = sorted(given.intersection(ACTIVATION_TYPES) - {config.activation_type})
    plain = replace(config, overrides=())

    def make() -> Previewer:
        progress(0.0, "preparing the preview")
        float_model = open_model(pair.float_model.path)
        feeds = open_feeds(pair.inputs, float_model)
        own = None if pair.calibration is None else open_feeds(pair.calibration, float_model)
        split = split_calibration(feeds, own, limit=config.calibration_samples)
        prepared = prepare(float_model, config, workspace.cache)
        ranges = calibrate(
            prepared.model,
            split.calibration,
            method=config.method,
            percentile=config.percentile,
            op_types=config.op_types,
            cache=workspace.cache,
            progress=part_of(progress, 0.1, 0.5),
        )
        states = pair.options.states
        source = RecipeSource(prepared, plain, ranges.path, feeds[0], states, types)
        return Previewer(
            float_model, source, feeds, mask=pair.options.mask, states=pair.options.states,
            metrics=metrics_of(pair, float_model, feeds), progress=part_of(progress, 0.5, 1.0),
        )  # fmt: skip

    lifted = wanted_opset(config)
    return _kept(_key(workspace, pair, [plain.to_json(), types, lifted]), make)


def _open_surgery(workspace: Workspace, pair: PairRecord, progress: Progress) -> Previewer:
    """The previewer of surgery on a pair's loaded file.

    Raises:
        UnplannableError: there is no such file, or nothing in it can be freed.
    """
    loaded = next((r for r in workspace.runs(pair.id) if r.number == 0), None)
    if loaded is None:
        raise UnplannableError("the pair was loaded without a quantized file")

    def make() -> Previewer:
        progress(0.0, "preparing the preview")
        float_model, quantized = open_model(pair.float_model.path), open_model(loaded.model.path)
        feeds = open_feeds(pair.inputs, float_model)
        made_of = comparable_float(float_model, quantized)
        matching = match_tensors(made_of, quantized, pins=loaded.pins)
        try:
            source = SurgerySource(made_of, quantized, matching, feeds[0], pair.options.states)
        except InspectorError as error:
            raise UnplannableError(error.message) from error
        return Previewer(
            float_model, source, feeds, mask=pair.options.mask, states=pair.options.states,
            metrics=metrics_of(pair, float_model, feeds), progress=part_of(progress, 0.3, 1.0),
        )  # fmt: skip

    return _kept(_key(workspace, pair, [loaded.id, len(loaded.pins)]), make)


def surgery_gain(
    case: Case,
    feeds: Feeds,
    *,
    mask: str = "",
    states: Sequence[tuple[str, str]] = (),
    progress: Progress = no_progress,
) -> GainOf | None:
    """What measures a remedy by freeing its nodes in this very file; None where none can be freed.

    Args:
        case: float model, quantized model and what matches.
        feeds: at least one.
        mask: the input that marks padding; "" for none.
        states: (output, input) pairs that carry over from sample to sample.
        progress: see `runtime.Progress`.

    Raises:
        RunError: the runtime refuses a feed.
    """
    models = case.float_model, case.quantized_model
    try:
        source = SurgerySource(*models, case.matching, feeds[0], tuple(states))
        previewer = Previewer(
            case.float_model, source, feeds, mask=mask, states=tuple(states), progress=progress
        )
        before = previewer.preview(())
    except (InspectorError, UnplannableError):
        return None
    return previewed_gain(previewer, {o.name: o.worst_part_sqnr_db for o in before.outputs})


def diagnose_run(
    root: Path, *, run_id: str, progress: Progress = no_progress
) -> list[dict[str, Any]]:
    """What is wrong with a run, as strict JSON (`Finding.to_json`), remedies measured.

    Kept with the run until it is compared anew.
    """
    workspace = Workspace(root)
    stamp = list(workspace.comparison_stamp(run_id))
    kept = workspace.detail(run_id, FINDINGS_KEY)
    if kept is not None and kept["stamp"] == stamp:
        return list(kept["findings"])
    run = workspace.run(run_id)
    pair = workspace.pair(run.pair_id)
    progress(0.0, "reading the models")
    float_model, quantized = open_model(pair.float_model.path), open_model(run.model.path)
    feeds = open_feeds(pair.inputs, float_model)
    recipe = run.recipe if run.number > 0 and not made_by_surgery(run) else None
    comparison = read_comparison(workspace.comparison(run_id))
    case = case_of(comparison, float_model, quantized, recipe)
    gain_of = surgery_gain(
        case, feeds, mask=pair.options.mask, states=pair.options.states,
        progress=part_of(progress, 0.1, 0.3),
    )  # fmt: skip
    reached = 0.3

    def told(fraction: float, message: str) -> None:
        # Steps of a re-quantization are told at the place that the diagnosis has reached.
        nonlocal reached
        reached = max(reached, 0.3 + 0.7 * fraction)
        progress(reached, message)

    config = QuantConfig.from_json(run.recipe)
    own = None if pair.calibration is None else open_feeds(pair.calibration, float_model)
    recipe_gain_of = requantized_gain(
        case, config, feeds, split_calibration(feeds, own, limit=config.calibration_samples),
        cache=workspace.cache, float_model=float_model, exclude=run.exclusions,
        made_so=recipe is not None, mask=pair.options.mask, states=pair.options.states,
        progress=lambda _fraction, message: told(0.0, message),
    )  # fmt: skip
    found = diagnose(case, gain_of=gain_of, recipe_gain_of=recipe_gain_of, progress=told)
    result: list[dict[str, Any]] = strict([finding.to_json() for finding in found])
    workspace.write_detail(run_id, FINDINGS_KEY, {"stamp": stamp, "findings": result})
    return result


# The page is told what was tried so far at most this often.
_TOLD_SECONDS = 1.0


def search_list(
    root: Path,
    *,
    run_id: str,
    config: Mapping[str, Any] | None,
    metric: str,
    value: float,
    budget_seconds: float | None = None,
    max_float_macs: float | None = None,
    simulated: bool = False,
    progress: Progress = no_progress,
) -> bool:
    """Whether a list reaches a goal. What was found is in the store (`Workspace.search`), as
    "quant-inspector/search" and, while it goes on, with `trials` alone.

    Stopped, it ends with what it has. Every trial is kept, and the next search starts from there.

    Args:
        root: the workspace's folder.
        run_id: the run the search starts from.
        config: a recipe to re-quantize with; None for surgery on the loaded file, whose lists are
            judged simulated.
        metric, value: the goal, see `task_metrics.parse_metric`.
        budget_seconds: after this nothing new is tried; None for no limit.
        max_float_macs: share of the multiply-accumulates that the list may put in float.
        simulated: judge with optimisations off and not the file as it ships.
        progress: see `runtime.Progress`.

    Raises:
        InspectorError: a metric, recipe or feed that cannot be used.
    """
    workspace = Workspace(root)
    run = workspace.run(run_id)
    pair = workspace.pair(run.pair_id)
    loaded = next((r for r in workspace.runs(pair.id) if r.number == 0), None)
    begin, told = time.monotonic(), 0.0
    stopped = False

    def going_on(fraction: float, message: str) -> None:
        nonlocal stopped
        try:
            progress(fraction, message)
        except Cancelled:
            stopped = True

    float_model = open_model(pair.float_model.path)
    feeds = open_feeds(pair.inputs, float_model)
    own = None if pair.calibration is None else open_feeds(pair.calibration, float_model)
    recipe = QuantConfig() if config is None else QuantConfig.from_json(config)
    split = split_calibration(feeds, own, limit=recipe.calibration_samples)
    quantized: Model | None = None
    pins: Sequence[Pin] = ()
    if config is None:
        if loaded is None:
            raise RunError(
                "the pair was loaded without a quantized file",
                hint="Search with a recipe: choose Re-quantize.",
            )
        quantized, pins, simulated = open_model(loaded.model.path), loaded.pins, True
    of = [config, metric, "" if loaded is None else loaded.id, stamps_of(
        pair.inputs, pair.calibration, pair.options
    )]  # fmt: skip
    place = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
    with ExitStack() as stack:
        try:
            trials = stack.enter_context(trials_at(
                cluster_address(), float_model, recipe, feeds, split, metric, cache=workspace.cache,
                quantized=quantized, pins=pins, folder=workspace.trials_folder(pair.id) / place,
                mask=pair.options.mask, states=pair.options.states, beside=True,
                progress=part_of(going_on, 0.0, 0.1),
            ))  # fmt: skip
        except UnplannableError as error:
            raise RunError(
                f"no list can be tried: {error}", hint="Search with a recipe."
            ) from error
        goal = Goal.of(trials.metric, value)
        seen = split.seen if recipe.static and quantized is None else (False,) * len(feeds)
        judged = [at for at, known in enumerate(seen) if not known] or list(range(len(feeds)))
        accept = None
        if not simulated:
            files = RealFiles(
                float_model, feeds, split, trials.metric, judged, cache=workspace.cache,
                mask=pair.options.mask, states=pair.options.states, provider=pair.options.provider,
            )  # fmt: skip
            accept = partial(files.figure, recipe)

        shown: dict[frozenset[str], SearchTrial] = {}

        def so_far(fraction: float, message: str) -> None:
            nonlocal told
            going_on(0.1 + 0.8 * fraction, message)
            if time.monotonic() > told + _TOLD_SECONDS:
                for trial in trials.known():
                    names = trial.request.exclude
                    if names not in shown and trial.request == Request(exclude=names):
                        shown.update(_shown_trial(trials, trial, judged))
                state = {"goal": asdict(goal), "trials": [t.to_json() for t in shown.values()]}
                workspace.save_search(pair.id, strict(state))
                told = time.monotonic()

        result = find_exclusions(
            trials, goal, candidates=quantized_nodes(trials, float_model), accept=accept,
            judged=judged, max_float_macs=max_float_macs,
            budget_seconds=budget_seconds, progress=so_far, stop=lambda: stopped,
        )  # fmt: skip
        result = replace(result, unseen=not all(seen))
        over = math.inf if budget_seconds is None else begin + budget_seconds
        if accept is not None and (result.nodes or not result.reached) and not stopped:
            cures = try_cures(
                files, goal, cures_for(recipe, result.worst_tensors),
                progress=part_of(going_on, 0.9, 1.0),
                stop=lambda: stopped or time.monotonic() > over,
            )  # fmt: skip
            result = replace(result, cures=cures)
        workspace.save_search(pair.id, strict({**result.to_json(), "recipe": config}))
        if stopped:
            raise Cancelled
        return result.reached


def _shown_trial(
    trials: Trials, trial: Trial, judged: Sequence[int]
) -> dict[frozenset[str], SearchTrial]:
    """A list with its price; {} where it did not run on all samples that judge, or has none."""
    if not trial.sums.keys() >= set(judged):
        return {}
    names = trial.request.exclude
    try:
        change = trials.source.change(names, None)
    except (InspectorError, UnplannableError):
        return {}
    found = SearchTrial(
        nodes=tuple(sorted(names)),
        figure=trials.figure(trial, judged),
        float_macs_fraction=change.float_macs_fraction,
        weight_bytes=change.weight_bytes,
    )
    return {names: found}


def measure_run(root: Path, *, run_id: str, progress: Progress = no_progress) -> dict[str, Any]:
    """What each node costs, quantized alone with a run's recipe: `SensitivityTable` as strict JSON.

    Kept with the run. Trials are kept with the pair: what was stopped goes on where it was.

    Raises:
        RunError: the run's file was not made by a recipe that is re-quantized for every list.
    """
    workspace = Workspace(root)
    kept = workspace.detail(run_id, SENSITIVITY_KEY)
    if kept is not None:
        return kept
    run = workspace.run(run_id)
    pair = workspace.pair(run.pair_id)
    config = QuantConfig.from_json(run.recipe)
    if made_by_surgery(run) or run.summary.get("surgery_fits") or config.format != "qdq":
        raise RunError(
            "only one node quantized cannot be measured in a finished file, whose other nodes keep "
            "their scales",
            hint="Re-quantize with a recipe of format qdq and measure that run.",
        )
    progress(0.0, "reading the models")
    float_model = open_model(pair.float_model.path)
    feeds = open_feeds(pair.inputs, float_model)
    own = None if pair.calibration is None else open_feeds(pair.calibration, float_model)
    split = split_calibration(feeds, own, limit=config.calibration_samples)
    what = json.dumps([SENSITIVITY_KEY, run.recipe, stamps_of(
        pair.inputs, pair.calibration, pair.options
    )], sort_keys=True)  # fmt: skip
    with trials_at(
        cluster_address(), float_model, config, feeds, split, "output_sqnr_db",
        folder=workspace.trials_folder(pair.id) / hashlib.sha256(what.encode()).hexdigest()[:16],
        cache=workspace.cache, mask=pair.options.mask, states=pair.options.states,
        progress=part_of(progress, 0.0, 0.2),
    ) as trials:  # fmt: skip
        table = measure_sensitivity(
            trials, float_model, ways=(ONLY,), progress=part_of(progress, 0.2, 1.0)
        )
    result: dict[str, Any] = strict(table.to_json())
    workspace.write_detail(run_id, SENSITIVITY_KEY, result)
    return result
