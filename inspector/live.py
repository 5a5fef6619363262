"""What one workspace shows while the user is still choosing: previews of exclusion lists.

Apart from `workbench`, because these jobs leave nothing in the store: the models, ranges and the
switchboard stay in the worker process from click to click.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from inspector.calibration import calibrate
from inspector.diagnosis import GainOf, diagnose, previewed_gain
from inspector.errors import InspectorError
from inspector.feeds import Feeds, split_calibration
from inspector.findings import Case, case_of
from inspector.matching import match_tensors
from inspector.prepare import prepare
from inspector.preview import Change, Preview, Previewer, RecipeSource, SurgerySource
from inspector.quantize import extra_options
from inspector.quantizer import UnplannableError
from inspector.recipe import QuantConfig
from inspector.render import read_comparison, strict
from inspector.runtime import Progress, no_progress, part_of
from inspector.store import PairRecord, RunRecord, Workspace, made_by_surgery
from inspector.workbench import open_feeds, open_model, stamps_of

# Each holds the float model's outputs, a session and the weights twice.
KEPT_PREVIEWERS = 2


_opened: OrderedDict[str, Previewer] = OrderedDict()
# What each gives without any list, as strict JSON.
_without: WeakKeyDictionary[Previewer, list[dict[str, Any]]] = WeakKeyDictionary()


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
    without = None
    try:
        if config is None:
            previewer = _open_surgery(workspace, pair, opening)
            found = previewer.preview(exclude, progress=running)
            alike = run.number == 0 or made_by_surgery(run)
        else:
            options = QuantConfig.from_json(config)
            previewer = _open_recipe(workspace, pair, replace(options, overrides=()), opening)
            # Grids that are set by hand are inputs of the same switchboard.
            entries = extra_options(options).get("TensorQuantOverrides", {})
            overrides = {tensor: each[0] for tensor, each in entries.items()}
            found = previewer.preview(exclude, overrides, progress=running)
            alike = QuantConfig.from_json(run.recipe) == options
            if alike and run.number == 0:
                without = _outputs_without_list(previewer)
            alike &= not run.summary.get("surgery_fits") and not made_by_surgery(run)
        own = previewer.source.change(run.exclusions, None) if alike else None
    except UnplannableError as error:
        return {"reason": str(error)}
    result: dict[str, Any] = strict(
        {"reason": "", **asdict(found), "without": without, **_estimates(run, found, own)}
    )
    return result


def _outputs_without_list(previewer: Previewer) -> list[dict[str, Any]]:
    """The outputs of the recipe alone; computed once."""
    if previewer not in _without:
        found = previewer.preview(())
        _without[previewer] = [asdict(output) for output in found.outputs]
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
    share = own.float_macs_fraction
    size = run.model.size_bytes + found.weight_bytes - own.weight_bytes
    latency = run.summary.get("latency")
    seconds = None
    if latency is not None and share < 1 and math.isfinite(share):
        in_float, so_far = float(latency["float_seconds"]), float(latency["quantized_seconds"])
        in_integers = (so_far - in_float * share) / (1 - share)
        wanted = found.float_macs_fraction
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

    Raises:
        UnplannableError: this recipe has none.
    """
    if config.format != "qdq":
        raise UnplannableError(f"a recipe of format {config.format} has no preview")

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
        source = RecipeSource(prepared, config, ranges.path, feeds[0], pair.options.states)
        return Previewer(
            float_model, source, feeds, mask=pair.options.mask, states=pair.options.states,
            progress=part_of(progress, 0.5, 1.0),
        )  # fmt: skip

    return _kept(_key(workspace, pair, config.to_json()), make)


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
        matching = match_tensors(float_model, quantized, pins=loaded.pins)
        try:
            source = SurgerySource(float_model, quantized, matching, feeds[0], pair.options.states)
        except InspectorError as error:
            raise UnplannableError(error.message) from error
        return Previewer(
            float_model, source, feeds, mask=pair.options.mask, states=pair.options.states,
            progress=part_of(progress, 0.3, 1.0),
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


FINDINGS_KEY = "findings"


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
    found = diagnose(case, gain_of=gain_of, progress=part_of(progress, 0.3, 1.0))
    result: list[dict[str, Any]] = strict([finding.to_json() for finding in found])
    workspace.write_detail(run_id, FINDINGS_KEY, {"stamp": stamp, "findings": result})
    return result
