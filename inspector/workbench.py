"""What one workspace does: load a pair, re-quantize it, look into a tensor.

Each public function is one job for the worker process: it takes the workspace's folder and plain
values, opens the models, and leaves its result in the store, where the web process reads it. The
command line calls the same library functions below it, so both give the same numbers.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import shlex
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from inspector.cluster import cluster_address, recipes_at
from inspector.commands import inspector_command, onnxruntime_call, onnxruntime_command
from inspector.compare import compare_models
from inspector.comparison import Comparison, Pin, judged_db
from inspector.details import activation_detail, weight_detail
from inspector.devices import load_dump
from inspector.equalize import comparable_float
from inspector.errors import ExclusionError, FeedError, InspectorError, ReportError
from inspector.exclusions import (
    ExclusionEntry,
    ExclusionList,
    effect_of,
    free_names,
    override_effects,
    resolve,
)
from inspector.exclusions import from_json as exclusions_from_json
from inspector.exclusions import to_json as exclusions_json
from inspector.feeds import (
    CalibrationSplit,
    Feeds,
    image_feeds,
    load_feeds,
    random_feeds,
    split_calibration,
)
from inspector.findings import found_by_content
from inspector.freed_file import write_freed
from inspector.images import Preprocess
from inspector.list_exports import export, needs_preparing
from inspector.matching import ActivationPair, WeightPair, match_tensors
from inspector.model import Model
from inspector.model_files import load_model
from inspector.node_links import link_nodes, only_nodes, twins_around
from inspector.pairs import feed_for_quantized
from inspector.prepare import prepare
from inspector.quantize import quantize_model
from inspector.recipe import QuantConfig, quantizer_format, read_recipe
from inspector.recipe_table import (
    RecipeResult,
    recipe_grid,
    recipe_key,
    recipes_json,
    run_recipes,
)
from inspector.render import comparison_json, headline, read_comparison, strict
from inspector.rewrite import free_nodes
from inspector.runtime import CPU, Feed, Progress, available_providers, no_progress, part_of
from inspector.scheme import count_scheme, read_scheme
from inspector.skeleton import all_node_names, main_nodes, neighbourhood, skeleton_of
from inspector.states import check_states, likely_states
from inspector.store import (
    PROFILE_KEY,
    FeedSource,
    PairOptions,
    PairRecord,
    RunRecord,
    StoredModel,
    Workspace,
    detail_key,
    isolation_measured,
    made_by_surgery,
    new_id,
    utc_now,
)
from inspector.structure import View
from inspector.task_metrics import (
    TaskMetric,
    comparable_outputs,
    metric_choices,
    parse_metric,
)
from inspector.timing import profile_nodes, seconds_by_tensor

# Samples that are looked at for padding, and pairs of an output and an input for a state.
PADDING_SAMPLES = 16
STATE_PAIRS = 400
# A browser draws graphs of up to so many nodes in a few seconds.
LIMIT_NODES = 2000
# The key under which a run keeps what its graphs were made of.
GRAPH_KEY = "graph"


@lru_cache(maxsize=6)
def _loaded(path: Path, _modified: int, _size: int) -> Model:
    return load_model(path)


def open_model(path: Path) -> Model:
    """A loaded model, kept while the file does not change."""
    if not path.is_file():
        return load_model(path)  # says what is wrong
    stat = path.stat()
    return _loaded(path, stat.st_mtime_ns, stat.st_size)


def _stored(model: Model, path: Path) -> StoredModel:
    return StoredModel(
        name=model.name, sha256=model.sha256, size_bytes=model.size_bytes, path=path.absolute()
    )


def open_feeds(source: FeedSource, model: Model) -> Feeds:
    """The feeds a source describes, checked against a model's inputs.

    Raises:
        FeedError: they do not fit.
    """
    if source.kind == "random":
        return random_feeds(model, samples=source.samples or 8, seed=source.seed)
    path = Path(source.path)
    if source.preprocess is None:
        return load_feeds(path, model, limit=source.samples)
    feeds = image_feeds(path, model, Preprocess.from_json(source.preprocess))
    if source.samples is not None and source.samples < len(feeds):
        feeds = feeds.subset(range(source.samples))
    return feeds


def describe_model(path: Path | str, progress: Progress = no_progress) -> dict[str, Any]:
    """What a file holds, as `quant-inspector show --json` writes it."""
    model = open_model(Path(path))
    progress(0.5, "reading the quantization")
    scheme = read_scheme(model)
    counts = count_scheme(model, scheme)
    recipe = read_recipe(model) if counts.quantized_nodes else None
    return {
        "format": "quant-inspector/model",
        "version": 1,
        "path": model.name,
        "sha256": model.sha256,
        "size_bytes": model.size_bytes,
        "opset": model.opset,
        "opsets": model.opsets,
        "producer": model.producer,
        "quant_format": scheme.label,
        "nodes": counts.nodes,
        "quantized_nodes": counts.quantized_nodes,
        "weights": counts.weights,
        "quantized_weights": counts.quantized_weights,
        "op_types": dict(counts.op_types),
        "quantized_op_types": dict(counts.quantized_op_types),
        "inputs": [_info(i) for i in model.inputs],
        "outputs": [_info(o) for o in model.outputs],
        "recipe": None if recipe is None else recipe.config.to_json(),
        "graph": _graph(model),
        "warnings": [*model.notes, *(recipe.notes if recipe is not None else ())],
    }


def _info(info: Any) -> dict[str, Any]:
    shape = None if info.shape is None else list(info.shape)
    return {"name": info.name, "dtype": info.dtype, "shape": shape}


# -- runs ----------------------------------------------------------------------------------------


def _summary(comparison: Comparison) -> dict[str, Any]:
    """The figures every page shows in its context bar, strict JSON."""
    outputs = [
        {
            "name": o.name,
            "sqnr_db": o.sqnr_db,
            "deployed_sqnr_db": o.deployed_sqnr_db,
            "worst_channel_sqnr_db": o.worst_channel_sqnr_db,
            "worst_part_sqnr_db": judged_db(o),
            "worst_sample_sqnr_db": o.worst_sample_sqnr_db,
        }
        for o in comparison.outputs
    ]
    summary: dict[str, Any] = {
        "headline": headline(comparison),
        "quant_format": comparison.quantized_model.quant_format,
        "samples": comparison.samples,
        "seen": comparison.seen,
        "random_feeds": comparison.random_feeds,
        "outputs": outputs,
        "float_size_bytes": comparison.float_model.size_bytes,
        "size_bytes": comparison.quantized_model.size_bytes,
        "latency": None,
        "task": None,
    }
    if comparison.latency is not None:
        summary["latency"] = {
            "float_seconds": comparison.latency.float_seconds,
            "quantized_seconds": comparison.latency.quantized_seconds,
        }
    if comparison.task is not None:
        summary["task"] = {
            "top1_float": comparison.task.top1_float,
            "top1_quantized": comparison.task.top1_quantized,
            "top1_agreement": comparison.task.top1_agreement,
        }
    result: dict[str, Any] = strict(summary)
    return result


def load_pair(
    root: Path,
    *,
    float_path: Path,
    quantized_path: Path | None,
    inputs: FeedSource,
    calibration: FeedSource | None = None,
    options: PairOptions | None = None,
    title: str = "",
    progress: Progress = no_progress,
) -> str:
    """The id of the run that a float model, its quantized twin and feeds give.

    With a quantized file that is run 0; without one, the float model is quantized with the
    defaults, which is run 1. The pair becomes the workspace's current one. Nothing is saved
    unless all of it worked. The same models on the same feeds again open the latest of their runs.
    """
    begin = time.perf_counter()
    workspace = Workspace(root)
    options = options or PairOptions()
    progress(0.0, "reading the models")
    float_model = open_model(float_path)
    quantized = None if quantized_path is None else open_model(quantized_path)
    stamp = stamps_of(inputs, calibration, options)
    known = _known_run(workspace, float_model, quantized, (inputs, calibration, options), stamp)
    if known is not None:
        workspace.set_current_pair(known.pair_id)
        return known.id
    feeds = open_feeds(inputs, float_model)
    if calibration is not None:
        open_feeds(calibration, float_model)
    pair = PairRecord(
        id=new_id(),
        title=title or _title(float_path, float_model),
        float_model=_stored(float_model, float_path),
        quantized_model=None
        if quantized is None or quantized_path is None
        else _stored(quantized, quantized_path),
        inputs=inputs,
        calibration=calibration,
        created=utc_now(),
        options=options,
    )
    if quantized is None:
        run_id = _quantize(
            workspace, pair, QuantConfig(), (), parent=None, base=None, progress=progress,
            save_pair=True,
        )  # fmt: skip
    else:
        comparison = _compare(
            pair, float_model, quantized, feeds, loaded=True,
            progress=part_of(progress, 0.05, 0.98),
        )  # fmt: skip
        recipe = read_recipe(quantized)
        workspace.save_pair(pair)
        assert pair.quantized_model is not None
        run = RunRecord(
            id=new_id(),
            pair_id=pair.id,
            number=0,
            title="loaded file",
            recipe=recipe.config.to_json(),
            exclusions=(),
            model=pair.quantized_model,
            created=utc_now(),
            parent=None,
            seconds=time.perf_counter() - begin,
            summary=_summary(comparison)
            | {"feeds_stamp": stamp, "surgery_fits": _surgery_fits(quantized)},
            effects=(),
            notes=tuple(recipe.notes),
        )
        run_id = workspace.save_run(run, comparison_json(comparison, detail=True)).id
    workspace.set_current_pair(pair.id)
    return run_id


def _surgery_fits(quantized: Model) -> bool:
    """A recipe cannot repeat the file: another tool made it, or ranges are found at run time."""
    made_here = quantized.proto.producer_name == "onnx.quantize"
    return not made_here or quantizer_format(quantized) == "dynamic"


def _compare(
    pair: PairRecord,
    float_model: Model,
    quantized: Model,
    feeds: Feeds,
    *,
    loaded: bool,
    seen: Sequence[bool] | None = None,
    pins: Sequence[Pin] = (),
    again: bool = False,
    isolated: bool = False,
    progress: Progress = no_progress,
) -> Comparison:
    """A comparison as the pair's options want it.

    Args:
        loaded: `quantized` is the file that the pair was loaded with. Only that one is set beside
            tensors of a device: they were computed by that file.
        again: latency, and what makes the deployed outputs differ, are known already.
        isolated: with the isolated error of every node and the error it adds.
    """
    options = pair.options
    dump = load_dump(Path(options.device), feeds.names) if loaded and options.device else None
    return compare_models(
        float_model,
        quantized,
        feeds,
        seen=seen,
        pins=pins,
        mask=options.mask,
        states=options.states,
        provider=options.provider,
        actual=dump,
        measure_latency=not again,
        explain_deployed=not again,
        isolated=isolated,
        metrics=metrics_of(pair, float_model, feeds),
        progress=progress,
    )


def metrics_of(pair: PairRecord, float_model: Model, feeds: Feeds) -> tuple[TaskMetric, ...]:
    """The task metric that the pair's outputs are judged by; () for none.

    Raises:
        FeedError: its text means nothing for this model and these feeds.
    """
    text = pair.options.metric
    return (parse_metric(text, comparable_outputs(float_model), feeds),) if text else ()


def stamps_of(
    inputs: FeedSource, calibration: FeedSource | None, options: PairOptions
) -> list[list[int]]:
    sources = [Path(s.path) for s in (inputs, calibration) if s is not None and s.kind != "random"]
    stamps = [_stamp(path) for path in sources]
    return [*stamps, _stamp(Path(options.device))] if options.device else stamps


def _stamp(path: Path) -> list[int]:
    """What changes when a file or the files of a folder do: number, size and time."""
    if not path.exists():
        return []
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    facts = [f.stat() for f in files]
    return [
        len(facts),
        sum(s.st_size for s in facts),
        max((s.st_mtime_ns for s in facts), default=0),
    ]


def _known_run(
    workspace: Workspace,
    float_model: Model,
    quantized: Model | None,
    wanted: tuple[FeedSource, FeedSource | None, PairOptions],
    stamp: list[list[int]],
) -> RunRecord | None:
    """The latest run of a pair of these very files and options, None where there is none."""
    for pair in workspace.pairs():
        twin = pair.quantized_model
        if (
            pair.float_model.sha256 == float_model.sha256
            and (None if twin is None else twin.sha256) == (quantized.sha256 if quantized else None)
            and (pair.inputs, pair.calibration, pair.options) == wanted
        ):
            runs = workspace.runs(pair.id)
            if runs and runs[0].summary.get("feeds_stamp") == stamp:
                return runs[-1]
    return None


def _title(path: Path, model: Model) -> str:
    stem = path.stem
    return path.absolute().parent.name if stem in ("model", "float") else stem or model.name


def _quantize(
    workspace: Workspace,
    pair: PairRecord,
    config: QuantConfig,
    exclude: Sequence[str],
    *,
    parent: RunRecord | None,
    base: RunRecord | None,
    progress: Progress,
    pins: Sequence[Pin] = (),
    preview: Mapping[str, Any] | None = None,
    save_pair: bool = False,
) -> str:
    """Quantizes, compares and saves one run; returns its id.

    Of `pins`, those hold whose tensors both models have.
    """
    begin = time.perf_counter()
    float_model = open_model(pair.float_model.path)
    feeds = open_feeds(pair.inputs, float_model)
    split = _split(pair, float_model, feeds, config)
    with workspace.scratch() as scratch:
        target = scratch / f"{Path(pair.float_model.name).stem}.int8.onnx"
        made = quantize_model(
            float_model,
            config,
            calibration=split.calibration if config.static else None,
            exclude=exclude,
            output=target,
            cache=workspace.cache,
            progress=part_of(progress, 0.0, 0.5),
        )
        quantized = load_model(target)
        kept = _still_there(pins, quantized)
        comparison = _compare(
            pair, float_model, quantized, feeds, loaded=False, pins=kept,
            seen=_seen(config, split.seen), progress=part_of(progress, 0.5, 0.95),
        )  # fmt: skip
        progress(0.96, "reading back what was changed")
        prepared = prepare(float_model, config, workspace.cache)
        effects: list[dict[str, Any]] = []
        made_notes = list(made.notes)
        if exclude:
            resolved = resolve(exclude, float_model, prepared=prepared)
            baseline = load_model(base.model.path) if base is not None else None
            found = effect_of(resolved.prepared_names, prepared.model, quantized, baseline, config)
            made_notes += resolved.notes
            effects = [_record(e) for e in found]
        effects += [_record(e) for e in override_effects(prepared.model, quantized, config)]
        stamps = stamps_of(pair.inputs, pair.calibration, pair.options)
        summary = _summary(comparison) | {"feeds_stamp": stamps}
        summary["preview"] = dict(preview) if preview else None
        before = base.summary if base is not None else None
        summary["before"] = None if before is None else before["outputs"]
        shown = _shown(workspace, pair.float_model)
        names: dict[str, Any] = {"model": shown, "output": target.name}
        summary["commands"] = {
            "inspector": inspector_command(
                config,
                exclude,
                float_name=shown,
                output=target.name,
                inputs=_command_path(pair.inputs),
                calibration=_command_path(pair.calibration),
            ),
            "python": onnxruntime_call(config, exclude, prepared=prepared, **names),
            "onnxruntime": onnxruntime_command(config, exclude, prepared=prepared, **names),
        }
        summary["exclusion_list"] = exclusions_json(
            _exclusion_list(float_model, config, exclude, comparison, base)
        )
        notes = list(dict.fromkeys(made_notes))
        lost = [pin.float_name for pin in pins if pin not in kept]
        if lost:
            notes.append(
                f"matched by hand in the run before, but not here, where the tensor is not: "
                f"{', '.join(lost)}"
            )
        if pair.options.device:
            notes.append("the device's tensors are those of the loaded file: not set beside this")
        same = parent is not None and QuantConfig.from_json(parent.recipe) == config
        if base is None and parent is not None and parent.number == 0 and same:
            notes += _against_loaded(parent, comparison)
        if save_pair:
            workspace.save_pair(pair)
        run = RunRecord(
            id=new_id(),
            pair_id=pair.id,
            number=workspace.claim_number(pair.id),
            title=f"{len(exclude)} excluded" if exclude else "baseline, no exclusion",
            recipe=config.to_json(),
            exclusions=tuple(exclude),
            model=_stored(quantized, target),
            created=utc_now(),
            parent=base.id if base is not None else (parent.id if parent is not None else None),
            seconds=time.perf_counter() - begin,
            summary=strict(summary),
            effects=tuple(effects),
            notes=tuple(notes),
            pins=tuple(kept),
        )
        run = _save(workspace, run, comparison, target)
    progress(1.0, "saved")
    return run.id


def _save(workspace: Workspace, run: RunRecord, comparison: Comparison, target: Path) -> RunRecord:
    data = target.with_name(f"{target.name}.data")
    return workspace.save_run(
        run,
        comparison_json(comparison, detail=True),
        target,
        external_data=[data] if data.exists() else [],
    )


def _split(
    pair: PairRecord, float_model: Model, feeds: Feeds, config: QuantConfig
) -> CalibrationSplit:
    own = None if pair.calibration is None else open_feeds(pair.calibration, float_model)
    return split_calibration(feeds, own, limit=config.calibration_samples)


def _shown(workspace: Workspace, model: StoredModel) -> str:
    """What to call a model in a command: its name alone where only the workspace has the file."""
    return model.name if workspace.root in model.path.parents else str(model.path)


def _seen(config: QuantConfig, seen: Sequence[bool]) -> Sequence[bool]:
    """Dynamic quantization observes no ranges beforehand: every feed is unseen."""
    return seen if config.static else (False,) * len(seen)


def _still_there(pins: Sequence[Pin], quantized: Model) -> list[Pin]:
    if not pins:
        return []
    view = View(quantized)
    known: Collection[str] = {*view.root, *view.constants}
    return [p for p in pins if p.quantized_name is None or p.quantized_name in known]


def rematch(
    root: Path, *, run_id: str, pins: Sequence[Pin], progress: Progress = no_progress
) -> str:
    """Compares a run anew with these matches set by hand; its id. The pins stay with the run.

    Latency is not measured again; isolated errors are where they were before. Where the comparison
    fails, the run keeps the one it has.

    Raises:
        ModelError: a pin names a tensor that is not there, or two that cannot be a pair.
    """
    workspace = Workspace(root)
    run = workspace.run(run_id)
    isolated = isolation_measured(run)
    return _compare_anew(workspace, run, pins=pins, isolated=isolated, progress=progress)


def isolate(root: Path, *, run_id: str, progress: Progress = no_progress) -> str:
    """Measures a run's nodes alone, and what each adds; the run's id. The figures stay with it.

    The run is compared anew with all that it had: its matches set by hand, its latency. A run that
    was measured before stays as it is. Where the comparison fails, the run keeps the one it has.
    """
    workspace = Workspace(root)
    run = workspace.run(run_id)
    if isolation_measured(run):
        return run.id
    return _compare_anew(workspace, run, pins=run.pins, isolated=True, progress=progress)


def _compare_anew(
    workspace: Workspace, run: RunRecord, *, pins: Sequence[Pin], isolated: bool, progress: Progress
) -> str:
    """Replaces a run's comparison; its id. What takes long and does not change is kept."""
    pair = workspace.pair(run.pair_id)
    progress(0.0, "reading the models")
    float_model, quantized = open_model(pair.float_model.path), open_model(run.model.path)
    feeds = open_feeds(pair.inputs, float_model)
    seen: Sequence[bool] | None = None
    if run.number > 0 and not made_by_surgery(run):
        config = QuantConfig.from_json(run.recipe)
        split = _split(pair, float_model, feeds, config)
        seen = _seen(config, split.seen)
    comparison = _compare(
        pair, float_model, quantized, feeds, loaded=run.number == 0, seen=seen, pins=pins,
        again=True, isolated=isolated, progress=part_of(progress, 0.05, 0.98),
    )  # fmt: skip
    before = read_comparison(workspace.comparison(run.id))
    causes = {o.name: o.deployed_cause for o in before.outputs}
    comparison = replace(
        comparison,
        latency=before.latency,
        # What makes deployed outputs differ is known already, and so is the sentence that says it.
        warnings=tuple(
            next((told for told in before.warnings if told.startswith(f"{w}; ")), w)
            for w in comparison.warnings
        ),
        outputs=tuple(
            replace(o, deployed_cause=causes.get(o.name, "")) for o in comparison.outputs
        ),
    )
    summary = {**run.summary, **_summary(comparison), "isolated": isolated}
    run = replace(run, pins=tuple(pins), summary=summary)
    workspace.replace_comparison(run, comparison_json(comparison, detail=True))
    progress(1.0, "saved")
    return run.id


def list_tensors(
    root: Path, *, run_id: str, progress: Progress = no_progress
) -> dict[str, list[dict[str, Any]]]:
    """The tensors that can be matched by hand, under "float" and "quantized".

    Of each its name, shape (sizes that are not fixed and shapes that are not known are None) and
    whether it is constant: constants are matched with constants only.
    """
    workspace = Workspace(root)
    run = workspace.run(run_id)
    pair = workspace.pair(run.pair_id)
    listed = {}
    for at, (side, path) in enumerate(
        (("float", pair.float_model.path), ("quantized", run.model.path))
    ):
        progress(at / 2, f"reading the {side} model")
        model = open_model(path)
        view = View(model)
        listed[side] = [
            {"name": name, "shape": _sizes(model, name), "constant": name in view.constants}
            for name in dict.fromkeys((*view.root, *view.constants))
        ]
    return listed


def _sizes(model: Model, name: str) -> list[int | None] | None:
    shape = model.info(name).shape
    return None if shape is None else [d if isinstance(d, int) else None for d in shape]


def _command_path(source: FeedSource | None) -> str | None:
    """The path to write into a command; None where feeds are no files of the user's own."""
    return source.path if source is not None and source.kind == "path" else None


def _record(record: Any) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value := getattr(record, name), tuple) else value
        for name in record.__dataclass_fields__
    }


def _against_loaded(loaded: RunRecord, comparison: Comparison) -> list[str]:
    """Says where the same recipe gives another accuracy than the loaded file has."""
    then = {o["name"]: o["sqnr_db"] for o in loaded.summary["outputs"]}
    apart = [
        o.name
        for o in comparison.outputs
        if isinstance(then.get(o.name), float) and abs(then[o.name] - o.sqnr_db) > 0.05
    ]
    if not apart:
        return []
    figures = ", ".join(
        f"{o.name} {o.sqnr_db:.1f} dB here, {then[o.name]:.1f} dB there"
        for o in comparison.outputs
        if o.name in apart
    )
    return [
        "this run differs from the loaded file although the recipe is the same "
        f"(other calibration data or options): {figures}"
    ]


def _exclusion_list(
    float_model: Model,
    config: QuantConfig,
    exclude: Sequence[str],
    comparison: Comparison,
    base: RunRecord | None,
) -> ExclusionList:
    after = {o.name: o.sqnr_db for o in comparison.outputs}
    parts = {o.name: judged_db(o) for o in comparison.outputs}
    then = {o["name"]: o for o in base.summary["outputs"]} if base is not None else {}
    worst = min(after, key=lambda n: parts[n], default=None)
    measured = None
    if worst is not None:
        measured = strict(
            {
                "samples": comparison.samples,
                "output": worst,
                "output_sqnr_db": {
                    "before": then.get(worst, {}).get("sqnr_db"),
                    "after": after[worst],
                },
                "worst_part_sqnr_db": {
                    "before": then.get(worst, {}).get("worst_part_sqnr_db"),
                    "after": parts[worst],
                },
            }
        )
    known = float_model.node_by_name
    entries = tuple(
        ExclusionEntry(name=name, op_type=known[name].op_type, outputs=known[name].outputs)
        if name in known
        else ExclusionEntry(name=name)  # pre-processing added it
        for name in exclude
    )
    return ExclusionList(
        nodes=entries,
        float_name=float_model.name,
        float_sha256=float_model.sha256,
        recipe=config,
        measured=measured,
    )


def requantize(
    root: Path,
    *,
    run_id: str,
    config: dict[str, Any],
    exclude: Sequence[str],
    preview: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> str:
    """The id of a new run of a pair: a recipe plus an exclusion list, quantized and compared.

    Before and after always compare runs of one recipe, so the run without exclusions and overrides
    is made first where this recipe has none yet. Matches set by hand go along. A request that was
    carried out before gives its run.

    Args:
        root: the workspace's folder.
        run_id: the run it starts from.
        config: the recipe, as `QuantConfig.to_json` gives it.
        exclude: nodes of the float file.
        preview: SQNR in dB by output, as a preview of this list gave it (strict JSON); it is kept
            with the run, to be set beside what came.
        progress: see `runtime.Progress`.
    """
    workspace = Workspace(root)
    parent = workspace.run(run_id)
    pair = workspace.pair(parent.pair_id)
    options = QuantConfig.from_json(config)
    plain = replace(options, overrides=())
    runs = workspace.runs(pair.id)
    made = {
        r.id: QuantConfig.from_json(r.recipe)
        for r in runs
        if r.number > 0 and not made_by_surgery(r)
    }
    done = [r for r in runs if made.get(r.id) == options and set(r.exclusions) == set(exclude)]
    if done:
        return done[0].id
    base = next((r for r in runs if made.get(r.id) == plain and not r.exclusions), None)
    loaded = next((r for r in runs if r.number == 0), None)
    if base is None:
        stop = 0.5 if exclude or options.overrides else 1.0
        base_id = _quantize(
            workspace, pair, plain, (), parent=loaded, base=None, pins=parent.pins,
            progress=part_of(progress, 0.0, stop),
        )  # fmt: skip
        if stop == 1.0:
            return base_id
        base = workspace.run(base_id)
        progress = part_of(progress, stop, 1.0)
    return _quantize(
        workspace, pair, options, tuple(exclude), parent=parent, base=base, pins=parent.pins,
        preview=preview, progress=progress,
    )  # fmt: skip


def free_in_file(
    root: Path,
    *,
    run_id: str,
    exclude: Sequence[str],
    preview: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> str:
    """The id of a new run of a pair: the loaded file with nodes freed by surgery, and compared.

    Every other scale stays as the file has it, whatever tool made it. A request that was carried
    out before gives its run; without nodes it is the run of the loaded file.

    Args:
        root: the workspace's folder.
        run_id: any run of the pair.
        exclude: nodes of the float file.
        preview: see `requantize`.
        progress: see `runtime.Progress`.

    Raises:
        ExclusionError: the pair was loaded without a quantized file, or nothing can be freed.
    """
    begin = time.perf_counter()
    workspace = Workspace(root)
    pair = workspace.pair(workspace.run(run_id).pair_id)
    runs = workspace.runs(pair.id)
    loaded = next((r for r in runs if r.number == 0), None)
    if loaded is None or pair.quantized_model is None:
        raise ExclusionError(
            "this pair was loaded without a quantized file, so there is none to free nodes in",
            hint="Re-quantize with the list instead.",
        )
    wanted = set(exclude)
    done = next(
        (r for r in runs if made_by_surgery(r) and set(r.exclusions) == wanted),
        loaded if not wanted else None,
    )
    if done is not None:
        return done.id
    progress(0.0, "reading the models")
    float_model, quantized = open_model(pair.float_model.path), open_model(loaded.model.path)
    feeds = open_feeds(pair.inputs, float_model)
    progress(0.05, "matching tensors")
    # The weights that come back are those that the file was made of.
    source = comparable_float(float_model, quantized)
    matching = match_tensors(source, quantized, pins=loaded.pins)
    progress(0.1, "freeing nodes")
    freed = free_nodes(source, quantized, matching, tuple(exclude))
    with workspace.scratch() as scratch:
        target = scratch / f"{Path(pair.quantized_model.name).stem}.freed.onnx"
        notes = write_freed(
            freed, target, inputs=[float_model, quantized], matching=matching, feeds=feeds
        )
        result = load_model(target)
        kept = _still_there(loaded.pins, result)
        comparison = _compare(
            pair, float_model, result, feeds, loaded=False, pins=kept,
            progress=part_of(progress, 0.3, 0.97),
        )  # fmt: skip
        stamps = stamps_of(pair.inputs, pair.calibration, pair.options)
        summary = _summary(comparison) | {"feeds_stamp": stamps, "way": "surgery"}
        summary["preview"] = dict(preview) if preview else None
        summary["before"] = loaded.summary["outputs"]
        inside = [_shown(workspace, m) for m in (pair.float_model, pair.quantized_model)]
        words = ["quant-inspector", "free", *inside, "-o", target.name]
        words += [word for name in exclude for word in ("--exclude", name)]
        summary["commands"] = {"inspector": shlex.join(words)}
        config = QuantConfig.from_json(loaded.recipe)
        summary["exclusion_list"] = exclusions_json(
            _exclusion_list(float_model, config, exclude, comparison, loaded)
        )
        run = RunRecord(
            id=new_id(),
            pair_id=pair.id,
            number=workspace.claim_number(pair.id),
            title=f"{len(exclude)} freed in the file",
            recipe=loaded.recipe,
            exclusions=tuple(exclude),
            model=_stored(result, target),
            created=utc_now(),
            parent=loaded.id,
            seconds=time.perf_counter() - begin,
            summary=strict(summary),
            effects=tuple(_record(e) for e in freed.effects),
            notes=tuple(dict.fromkeys((*loaded.notes, *notes))),
            pins=tuple(kept),
        )
        run = _save(workspace, run, comparison, target)
    progress(1.0, "saved")
    return run.id


def propose_free(
    root: Path, *, run_id: str, node: str, progress: Progress = no_progress
) -> list[str]:
    """Further nodes to exclude so that a node's inputs, weight and output are really float."""
    workspace = Workspace(root)
    run = workspace.run(run_id)
    pair = workspace.pair(run.pair_id)
    float_model = open_model(pair.float_model.path)
    progress(0.2, "reading the quantized graph")
    config = QuantConfig.from_json(run.recipe)
    prepared = prepare(float_model, config, workspace.cache)
    return list(free_names(node, prepared, open_model(run.model.path), config))


def export_exclusions(
    root: Path, *, run_id: str, target: str, progress: Progress = no_progress
) -> dict[str, Any]:
    """A run's exclusion list as another tool takes it: "text" of a file, and "notes" on it.

    Args:
        root: the workspace's folder.
        run_id: the run.
        target: one of `list_exports.TARGETS`.
        progress: see `runtime.Progress`.
    """
    workspace = Workspace(root)
    run = workspace.run(run_id)
    pair = workspace.pair(run.pair_id)
    model = open_model(pair.float_model.path)
    listed = run.summary.get("exclusion_list")
    held = exclusions_from_json(listed) if listed else None
    what = run.exclusions if held is None else held
    prepared = None
    if held is not None and needs_preparing(held, model, target):
        progress(0.1, "preparing the model")
        prepared = prepare(model, held.recipe or QuantConfig(), workspace.cache)
    made = export(what, model, target, prepared=prepared)
    return {"text": made.text, "notes": list(made.notes)}


def list_nodes(
    root: Path, *, run_id: str, progress: Progress = no_progress
) -> list[dict[str, Any]]:
    """The nodes of the float file that a list can name, in order.

    Each with its name, op type, inputs (also those that its bodies read) and outputs.
    """
    workspace = Workspace(root)
    pair = workspace.pair(workspace.run(run_id).pair_id)
    progress(0.2, "reading the float model")
    return _graph(open_model(pair.float_model.path))


def _graph(model: Model) -> list[dict[str, Any]]:
    return [
        {
            "name": n.name,
            "op_type": n.op_type,
            "inputs": [*n.inputs, *n.captured],
            "outputs": list(n.outputs),
        }
        for n in model.nodes
        if n.op_type != "Constant"
    ]


# -- the graph -----------------------------------------------------------------------------------


def graph_of_run(
    root: Path,
    *,
    run_id: str,
    around: str = "",
    hops: int = 4,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """The graphs of a run's two models, ready to be drawn. Kept with the run.

    Under "float" and "quantized" stand paths of skeletons (`skeleton.skeleton_of`), under "links"
    what belongs together (`NodeLinks.to_json`), under "nodes" how many nodes each model has, bodies
    included. They are made anew after matches were set by hand. Where a model has more than
    `LIMIT_NODES`, the files and the links are cut down to the neighbourhood of one node, which
    "around" names, up to "hops" edges away; else "around" is "".

    Args:
        root: the workspace's folder.
        run_id: the run.
        around: a node of either model; "" for the one that computes the worst tensor.
        hops: how far to go in the float model; less where that has more than `LIMIT_NODES`.
        progress: see `runtime.Progress`.

    Raises:
        ModelError: neither model has such a node.
    """
    workspace = Workspace(root)
    folder = workspace.run_folder(run_id) / "graph"
    comparison = read_comparison(workspace.comparison(run_id))
    pins = (*comparison.pins, *found_by_content(comparison))
    stamp = {"pins": [[pin.float_name, pin.quantized_name] for pin in pins]}
    kept = workspace.detail(run_id, GRAPH_KEY) or {}
    whole = tuple(folder / name for name in ("float.onnx", "quantized.onnx", "links.json"))
    if kept.get("stamp") != stamp or not all(path.is_file() for path in whole):
        progress(0.0, "reading the models")
        float_model, quantized = _models_of(workspace, run_id)
        progress(0.3, "matching nodes")
        matching = match_tensors(float_model, quantized, pins=pins)
        links = link_nodes(float_model, quantized, matching).to_json()
        progress(0.8, "writing the graphs")
        skeletons = [skeleton_of(model).SerializeToString() for model in (float_model, quantized)]
        _put_files(workspace, whole, [*skeletons, _compact(links)])
        nodes = {side: len(each) for side, each in links.items()}
        kept = {"stamp": stamp, "nodes": nodes}
        workspace.write_detail(run_id, GRAPH_KEY, kept)
    else:
        links = json.loads(whole[2].read_bytes())
    shown: dict[str, Any] = {"float": str(whole[0]), "quantized": str(whole[1]), "links": links}
    shown |= {"nodes": kept["nodes"], "around": "", "hops": 0}
    if max(kept["nodes"].values()) > LIMIT_NODES:
        progress(0.9, "cutting out the neighbourhood")
        around = around or _worst_node(comparison) or next(iter(links["float"]), "")
        shown |= _cut_graph(workspace, run_id, links, around, hops)
    progress(1.0, "ready")
    return shown


def _compact(links: Mapping[str, Any]) -> bytes:
    return json.dumps(links, separators=(",", ":"), allow_nan=False).encode("ascii")


def _models_of(workspace: Workspace, run_id: str) -> tuple[Model, Model]:
    """What a run's tensors are matched in: the float model, equalized where the run is."""
    run = workspace.run(run_id)
    pair = workspace.pair(run.pair_id)
    quantized = open_model(run.model.path)
    return comparable_float(open_model(pair.float_model.path), quantized), quantized


def _worst_node(comparison: Comparison) -> str:
    """The float node that computes the tensor with the lowest accumulated SQNR; "" for none."""
    made = [a for a in comparison.activations if a.node and a.accumulated_sqnr_db != -math.inf]
    spoiled = (a for a in made if math.isnan(a.accumulated_sqnr_db))
    worst = next(spoiled, None) or min(made, key=lambda a: a.accumulated_sqnr_db, default=None)
    return "" if worst is None else worst.node


def _cut_graph(
    workspace: Workspace, run_id: str, links: Mapping[str, Any], around: str, hops: int
) -> dict[str, Any]:
    """The files and links of the neighbourhood of a node, with how far it goes."""
    models = dict(zip(("float", "quantized"), _models_of(workspace, run_id), strict=True))
    side = "float" if around in links["float"] else "quantized"
    if side == "quantized" and links[side].get(around, {}).get("partners"):
        around, side = links[side][around]["partners"][0], "float"
    other = "quantized" if side == "float" else "float"
    owners = main_nodes(models[other])
    for reach in range(max(hops, 0), -1, -1):
        mine = neighbourhood(models[side], around, reach)
        theirs = {owners[name] for name in twins_around(links, side, mine)}
        if max(len(mine), len(theirs)) <= LIMIT_NODES:
            break
    names = {side: mine, other: theirs}
    skeletons = {key: skeleton_of(model, only=names[key]) for key, model in models.items()}
    known = {key: all_node_names(each) for key, each in skeletons.items()}
    mark = hashlib.sha256(f"{reach} {around}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
    folder = workspace.run_folder(run_id) / "graph"
    paths = {key: folder / f"{key}-{mark}.onnx" for key in skeletons}
    contents = [skeletons[key].SerializeToString() for key in paths]
    _put_files(workspace, tuple(paths.values()), contents)
    cut = only_nodes(links, known["float"], known["quantized"])
    return {
        **{key: str(path) for key, path in paths.items()},
        "links": cut,
        "around": around,
        "hops": reach,
    }


def _put_files(workspace: Workspace, paths: Sequence[Path], contents: Sequence[bytes]) -> None:
    """Writes files of one folder, each of which is whole at any time."""
    with workspace.scratch() as scratch:
        try:
            paths[0].parent.mkdir(exist_ok=True)
            for path, content in zip(paths, contents, strict=True):
                (scratch / path.name).write_bytes(content)
                os.replace(scratch / path.name, path)
        except OSError as error:
            raise ReportError(
                f"{paths[0].parent} cannot be written: {error.strerror or error}",
                hint="Check the folder's permissions and the free space on its disk.",
            ) from error


# -- one tensor ----------------------------------------------------------------------------------


def inspect_tensor(
    root: Path,
    *,
    run_id: str,
    tensor: str,
    kind: str = "activation",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """The binned values of one tensor: histograms, error histogram, map. Kept with the run.

    Args:
        root: the workspace's folder.
        run_id: the run.
        tensor: the float model's tensor.
        kind: "activation", or "weight" for a constant.
        progress: see `runtime.Progress`.

    Raises:
        ReportError: the run compares no such tensor.
    """
    workspace = Workspace(root)
    comparison = read_comparison(workspace.comparison(run_id))
    records = comparison.activations if kind == "activation" else comparison.weights
    known = next((r for r in records if r.name == tensor), None)
    if known is None:
        raise ReportError(
            f"this run compares no {kind} called {tensor!r}",
            hint="Choose a tensor from the table on the overview.",
        )
    key = detail_key(kind, tensor, known.quantized_name)
    kept = workspace.detail(run_id, key)
    if kept is not None:
        return kept
    run = workspace.run(run_id)
    pair = workspace.pair(run.pair_id)
    float_model, quantized = _models_of(workspace, run_id)
    # What was matched by the values seen on the feeds is known from the comparison.
    seen = found_by_content(comparison)
    matching = match_tensors(float_model, quantized, pins=(*comparison.pins, *seen))
    progress(0.1, "reading the tensor")
    pairs: Sequence[ActivationPair | WeightPair] = (
        matching.activations if kind == "activation" else matching.weights
    )
    found = next((p for p in pairs if p.name == tensor), None)
    if found is None:
        raise ReportError(
            f"this run compares no {kind} called {tensor!r}",
            hint="Choose a tensor from the table on the overview.",
        )
    if isinstance(found, WeightPair):
        detail = weight_detail(found, quantized)
    else:
        feeds = open_feeds(pair.inputs, float_model)
        detail = activation_detail(
            found, comparison, float_model, quantized, feeds, matching, progress
        )
    result: dict[str, Any] = strict(detail)
    workspace.write_detail(run_id, key, result)
    return result


# -- feeds ---------------------------------------------------------------------------------------


def list_options(
    *, float_path: Path, inputs: FeedSource | None = None, progress: Progress = no_progress
) -> dict[str, Any]:
    """What a pair's options can be: inputs, states that fit and look likely, a mask, providers …

    Args:
        float_path: the float model.
        inputs: the feeds, looked at for padding; None where none are chosen yet.
        progress: see `runtime.Progress`.
    """
    model = open_model(Path(float_path))
    progress(0.4, "looking for masks and states")
    possible = [(o.name, i.name) for o in model.outputs for i in model.inputs][:STATE_PAIRS]
    states = list(dict.fromkeys((*likely_states(model), *filter(_carries(model), possible))))
    return {
        "inputs": [i.name for i in model.inputs],
        "metrics": metric_choices(comparable_outputs(model)),
        "mask": _padding_mask(model, inputs),
        "states": [list(each) for each in states],
        "likely_states": [list(each) for each in likely_states(model)],
        "providers": list(available_providers()),
    }


def _carries(model: Model) -> Callable[[tuple[str, str]], bool]:
    """Whether an output can be the state of an input: same type and shape."""

    def fits(pair: tuple[str, str]) -> bool:
        try:
            check_states([pair], model)
        except FeedError:
            return False
        return True

    return fits


def _padding_mask(model: Model, source: FeedSource | None) -> str:
    """The input called a mask that marks padding in one of the first feeds; "" for none."""
    masks = [i.name for i in model.inputs if "mask" in i.name.lower()]
    if not masks or source is None:
        return ""
    feeds = open_feeds(source, model)
    if source.kind != "random":
        for feed in feeds.subset(range(min(len(feeds), PADDING_SAMPLES))):
            for name in masks:
                if name in feed and feed[name].dtype.kind in "biuf" and not feed[name].all():
                    return name
    return ""


def preview_feed(
    *, float_path: Path, inputs: FeedSource, progress: Progress = no_progress
) -> dict[str, Any]:
    """What the model gets from the first feeds: count, notes, ranges, and for images the picture.

    The picture is a PNG in base64; "" where the feeds are no images.
    """
    model = open_model(Path(float_path))
    progress(0.3, "reading the feeds")
    feeds = open_feeds(inputs, model)
    if not len(feeds):
        raise FeedError(
            f"{inputs.title or inputs.path} holds no samples", hint="Name a folder with feeds."
        )
    first = feeds[0]
    ranges = []
    for name, value in first.items():
        numeric = value.dtype.kind in "fiub" and value.size
        ranges.append(
            {
                "input": name,
                "dtype": str(value.dtype),
                "shape": list(value.shape),
                "low": float(value.min()) if numeric else None,
                "high": float(value.max()) if numeric else None,
            }
        )
    picture = ""
    if inputs.preprocess is not None or feeds.pictures:
        pixels = feeds.picture(0)
        if pixels is not None:
            from PIL import Image

            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="PNG")
            picture = base64.b64encode(buffer.getvalue()).decode("ascii")
    result: dict[str, Any] = strict(
        {
            "samples": len(feeds),
            "names": list(feeds.names[:200]),
            "description": feeds.description,
            "random": feeds.random,
            "notes": list(feeds.notes),
            "labels": feeds.labels is not None,
            "ranges": ranges,
            "picture_png": picture,
        }
    )
    return result


# -- time and recipes ----------------------------------------------------------------------------


def profile_run(root: Path, *, run_id: str, progress: Progress = no_progress) -> dict[str, Any]:
    """What each node and each tensor of both models takes on the first feed. Kept with the run.

    Under "float" and "quantized", under "simulated" and "deployed": "times" (`NodeTimes.to_json`)
    and "tensors", seconds by tensor of that file (`timing.seconds_by_tensor`); or "error", where
    the runtime refuses the model so.
    """
    workspace = Workspace(root)
    kept = workspace.detail(run_id, PROFILE_KEY)
    if kept is not None:
        return kept
    run = workspace.run(run_id)
    pair = workspace.pair(run.pair_id)
    progress(0.0, "reading the models")
    float_model, quantized = open_model(pair.float_model.path), open_model(run.model.path)
    feed = open_feeds(pair.inputs, float_model)[0]
    pins = read_comparison(workspace.comparison(run_id)).pins
    theirs = feed_for_quantized(match_tensors(float_model, quantized, pins=pins), feed)
    found: dict[str, dict[str, Any]] = {"float": {}, "quantized": {}}
    steps = [
        (side, model, given, optimized)
        for side, model, given in (("float", float_model, feed), ("quantized", quantized, theirs))
        for optimized in (False, True)
    ]
    for at, (side, model, given, optimized) in enumerate(steps):
        how = "deployed" if optimized else "simulated"
        part = part_of(progress, 0.1 + 0.9 * at / len(steps), 0.1 + 0.9 * (at + 1) / len(steps))
        provider = pair.options.provider if optimized else CPU
        found[side][how] = _profile(
            model, given, optimized, provider, f"timing the {side} model, {how}", part
        )
    result: dict[str, Any] = strict(found)
    workspace.write_detail(run_id, PROFILE_KEY, result)
    return result


def _profile(
    model: Model, feed: Feed, optimized: bool, provider: str, step: str, progress: Progress
) -> dict[str, Any]:
    try:
        times = profile_nodes(
            model, feed, optimized=optimized, provider=provider, told=lambda: progress(0.0, step)
        )
    except InspectorError as error:
        return {"error": error.message}
    return {"times": times.to_json(), "tensors": seconds_by_tensor(model, times)}


def try_recipes(
    root: Path, *, run_id: str, again: bool = False, progress: Progress = no_progress
) -> int:
    """How many recipes of a run's pair have been tried: those kept and those that this job added.

    What is not varied is that of the run's recipe. Each row is in the store once it is there
    (`Workspace.recipes`), and stays when the job is stopped; the next one goes on from there.

    Args:
        root: the workspace's folder.
        run_id: the run.
        again: forget what was tried before.
        progress: see `runtime.Progress`.
    """
    workspace = Workspace(root)
    run = workspace.run(run_id)
    pair = workspace.pair(run.pair_id)
    progress(0.0, "reading the model")
    float_model = open_model(pair.float_model.path)
    config = QuantConfig.from_json(run.recipe)
    feeds = open_feeds(pair.inputs, float_model)
    split = _split(pair, float_model, feeds, config)
    stamp = stamps_of(pair.inputs, pair.calibration, pair.options)
    before = workspace.recipes(pair.id)
    same = before.get("feeds_stamp") == stamp and not again
    planned = {recipe_key(row.config.to_json()): row for row in recipe_grid(config)}
    kept = [
        row
        for row in (before.get("rows", ()) if same else ())
        if row["state"] != "waiting" and recipe_key(row["recipe"]) in planned
    ]
    known = {recipe_key(row["recipe"]) for row in kept}
    rows = [row for key, row in planned.items() if key not in known]
    results: list[RecipeResult] = []
    shown = _shown(workspace, pair.float_model)

    def save() -> list[dict[str, Any]]:
        table = recipes_json(
            float_model, feeds, results, planned=planned.values(), kept=kept, float_name=shown,
            seen=split.seen,
            inputs=_command_path(pair.inputs), calibration=_command_path(pair.calibration),
        )  # fmt: skip
        workspace.save_recipes(pair.id, strict({**table, "feeds_stamp": stamp}))
        return list(table["rows"])

    save()
    tried: set[QuantConfig] = set()
    runs: dict[str, Any] = {
        "rows": rows, "mask": pair.options.mask, "states": pair.options.states,
        "provider": pair.options.provider, "metrics": metrics_of(pair, float_model, feeds),
        "progress": progress,
    }  # fmt: skip
    with recipes_at(cluster_address(), float_model, feeds, split, **runs) as elsewhere:
        for result in run_recipes(
            float_model, feeds, split, **runs, cache=workspace.cache, elsewhere=elsewhere
        ):
            results.append(result)
            if result.row.config not in tried and not result.row.reason:
                save()  # at once: the job may be stopped by force
            tried.add(result.row.config)
    return sum(row["state"] in ("done", "failed") for row in save())
