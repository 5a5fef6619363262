"""What one workspace does: load a pair, re-quantize it, look into a tensor.

Each public function is one job for the worker process: it takes the workspace's folder and plain
values, opens the models, and leaves its result in the store, where the web process reads it. The
command line calls the same library functions below it, so both give the same numbers.
"""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.commands import inspector_command, onnxruntime_call, onnxruntime_command
from inspector.compare import PairRunner, compare_models, feed_for_quantized, plain
from inspector.comparison import Comparison, Pin, judged_db
from inspector.devices import load_dump
from inspector.errors import FeedError, ReportError
from inspector.exclusions import (
    ExclusionEntry,
    ExclusionList,
    effect_of,
    free_names,
    resolve,
)
from inspector.exclusions import to_json as exclusions_json
from inspector.feeds import Feeds, image_feeds, load_feeds, random_feeds, split_calibration
from inspector.images import Preprocess
from inspector.matching import ActivationPair, Matching, WeightPair, match_tensors, rectify
from inspector.model import Model
from inspector.model_files import load_model
from inspector.padding import Padding
from inspector.prepare import prepare
from inspector.qparams import INTEGER_DTYPES, QParams
from inspector.quantize import quantize_model
from inspector.recipe import QuantConfig, read_recipe
from inspector.render import comparison_json, headline, read_comparison, strict
from inspector.runtime import Progress, available_providers, no_progress, part_of
from inspector.scheme import count_scheme, read_scheme, stored_values
from inspector.states import Carried, check_states, likely_states
from inspector.stats import Histogram, saturated_counts
from inspector.store import (
    FeedSource,
    PairOptions,
    PairRecord,
    RunRecord,
    StoredModel,
    Workspace,
    detail_key,
    new_id,
    utc_now,
)
from inspector.structure import View
from inspector.watches import in_float_layout, real_values

HISTOGRAM_BINS = 192
MAP_BINS = 96
# Samples that are looked at for padding, and pairs of an output and an input for a state.
PADDING_SAMPLES = 16
STATE_PAIRS = 400


@lru_cache(maxsize=6)
def _loaded(path: Path, _modified: int, _size: int) -> Model:
    return load_model(path)


def _open(path: Path) -> Model:
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
    model = _open(Path(path))
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
    float_model = _open(float_path)
    quantized = None if quantized_path is None else _open(quantized_path)
    stamp = _stamps(inputs, calibration, options)
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
            summary=_summary(comparison) | {"feeds_stamp": stamp},
            effects=(),
            notes=tuple(recipe.notes),
        )
        run_id = workspace.save_run(run, comparison_json(comparison, detail=True)).id
    workspace.set_current_pair(pair.id)
    return run_id


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
    progress: Progress = no_progress,
) -> Comparison:
    """A comparison as the pair's options want it.

    Args:
        loaded: `quantized` is the file that the pair was loaded with. Only that one is set beside
            tensors of a device: they were computed by that file.
        again: latency, and what makes the deployed outputs differ, are known already.
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
        progress=progress,
    )


def _stamps(
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
    save_pair: bool = False,
) -> str:
    """Quantizes, compares and saves one run; returns its id.

    Of `pins`, those hold whose tensors both models have.
    """
    begin = time.perf_counter()
    float_model = _open(pair.float_model.path)
    feeds = open_feeds(pair.inputs, float_model)
    own = None if pair.calibration is None else open_feeds(pair.calibration, float_model)
    split = split_calibration(feeds, own, limit=config.calibration_samples)
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
        stamps = _stamps(pair.inputs, pair.calibration, pair.options)
        summary = _summary(comparison) | {"feeds_stamp": stamps}
        before = base.summary if base is not None else None
        summary["before"] = None if before is None else before["outputs"]
        file = pair.float_model.path
        shown = pair.float_model.name if workspace.root in file.parents else str(file)
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
        if base is None and parent is not None and parent.number == 0:
            notes += _against_loaded(parent, comparison)
        if save_pair:
            workspace.save_pair(pair)
        numbers = [r.number for r in workspace.runs(pair.id)]
        run = RunRecord(
            id=new_id(),
            pair_id=pair.id,
            number=max(numbers, default=0) + 1,
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
        data = target.with_name(target.name + ".data")
        run = workspace.save_run(
            run,
            comparison_json(comparison, detail=True),
            target,
            external_data=[data] if data.exists() else [],
        )
    progress(1.0, "saved")
    return run.id


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

    Latency is not measured again. Where the comparison fails, the run keeps the one it has.

    Raises:
        ModelError: a pin names a tensor that is not there, or two that cannot be a pair.
    """
    workspace = Workspace(root)
    run = workspace.run(run_id)
    pair = workspace.pair(run.pair_id)
    progress(0.0, "reading the models")
    float_model, quantized = _open(pair.float_model.path), _open(run.model.path)
    feeds = open_feeds(pair.inputs, float_model)
    seen: Sequence[bool] | None = None
    if run.number > 0:
        config = QuantConfig.from_json(run.recipe)
        own = None if pair.calibration is None else open_feeds(pair.calibration, float_model)
        split = split_calibration(feeds, own, limit=config.calibration_samples)
        seen = _seen(config, split.seen)
    comparison = _compare(
        pair, float_model, quantized, feeds, loaded=run.number == 0, seen=seen, pins=pins,
        again=True, progress=part_of(progress, 0.05, 0.98),
    )  # fmt: skip
    before = read_comparison(workspace.comparison(run_id))
    causes = {o.name: o.deployed_cause for o in before.outputs}
    comparison = replace(
        comparison,
        latency=before.latency,
        outputs=tuple(
            replace(o, deployed_cause=causes.get(o.name, "")) for o in comparison.outputs
        ),
    )
    run = replace(run, pins=tuple(pins), summary={**run.summary, **_summary(comparison)})
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
        model = _open(path)
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
    progress: Progress = no_progress,
) -> str:
    """The id of a new run of a pair: a recipe plus an exclusion list, quantized and compared.

    Before and after always compare runs of one recipe, so the run without exclusions is made
    first where this recipe has none yet. Matches set by hand go along. A request that was carried
    out before gives its run.
    """
    workspace = Workspace(root)
    parent = workspace.run(run_id)
    pair = workspace.pair(parent.pair_id)
    options = QuantConfig.from_json(config)
    runs = workspace.runs(pair.id)
    alike = [r for r in runs if r.number > 0 and QuantConfig.from_json(r.recipe) == options]
    done = next((r for r in alike if set(r.exclusions) == set(exclude)), None)
    if done is not None:
        return done.id
    base = next((r for r in alike if not r.exclusions), None)
    loaded = next((r for r in runs if r.number == 0), None)
    if base is None:
        stop = 0.5 if exclude else 1.0
        base_id = _quantize(
            workspace, pair, options, (), parent=loaded, base=None, pins=parent.pins,
            progress=part_of(progress, 0.0, stop),
        )  # fmt: skip
        if not exclude:
            return base_id
        base = workspace.run(base_id)
        progress = part_of(progress, stop, 1.0)
    return _quantize(
        workspace, pair, options, tuple(exclude), parent=parent, base=base, pins=parent.pins,
        progress=progress,
    )  # fmt: skip


def propose_free(
    root: Path, *, run_id: str, node: str, progress: Progress = no_progress
) -> list[str]:
    """Further nodes to exclude so that a node's inputs, weight and output are really float."""
    workspace = Workspace(root)
    run = workspace.run(run_id)
    pair = workspace.pair(run.pair_id)
    float_model = _open(pair.float_model.path)
    progress(0.2, "reading the quantized graph")
    config = QuantConfig.from_json(run.recipe)
    prepared = prepare(float_model, config, workspace.cache)
    return list(free_names(node, prepared, _open(run.model.path), config))


def list_nodes(
    root: Path, *, run_id: str, progress: Progress = no_progress
) -> list[dict[str, Any]]:
    """The nodes of the float file that a list can name: name, op type and outputs, in order."""
    workspace = Workspace(root)
    pair = workspace.pair(workspace.run(run_id).pair_id)
    progress(0.2, "reading the float model")
    return _graph(_open(pair.float_model.path))


def _graph(model: Model) -> list[dict[str, Any]]:
    return [
        {"name": n.name, "op_type": n.op_type, "outputs": list(n.outputs)}
        for n in model.nodes
        if n.op_type != "Constant"
    ]


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
    float_model, quantized = _open(pair.float_model.path), _open(run.model.path)
    # What was matched by the values seen on the feeds is known from the comparison.
    seen = [
        Pin(float_name=a.name, quantized_name=a.quantized_name)
        for a in comparison.activations
        if a.matched_by == "content"
    ]
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
        detail = _weight_detail(found, quantized)
    else:
        detail = _activation_detail(found, comparison, float_model, quantized, pair, matching,
                                    progress)  # fmt: skip
    result: dict[str, Any] = strict(detail)
    workspace.write_detail(run_id, key, result)
    return result


def _weight_detail(pair: WeightPair, quantized: Model) -> dict[str, Any]:
    reference = pair.reference()
    qparams = pair.quantized.qparams if pair.quantized is not None else None
    actual = (
        stored_values(quantized, pair.quantized)
        if pair.quantized is not None
        else quantized.constant(pair.quantized_name)
    )
    if actual is None:
        raise ReportError(
            f"the values of {pair.quantized_name} cannot be read",
            hint="Choose another tensor from the table on the overview.",
        )
    _check_shapes(pair.name, pair.quantized_name, reference, actual)
    finite = reference[np.isfinite(reference)]
    low = float(finite.min()) if finite.size else 0.0
    high = float(finite.max()) if finite.size else 0.0
    _, _, spread = _finite_ranges([(reference, actual, None)])
    bins = _Bins(low, high, qparams, spread)
    bins.add(reference, actual, reference if qparams is not None else None)
    return bins.detail(pair.name, pair.node.name, pair.kind)


def _activation_detail(
    pair: ActivationPair,
    comparison: Comparison,
    float_model: Model,
    quantized: Model,
    record: PairRecord,
    matching: Matching,
    progress: Progress,
) -> dict[str, Any]:
    """The values of a pair on the feeds that the comparison saw, with its mask and its states."""
    known = next(a for a in comparison.activations if a.name == pair.name)
    feeds = open_feeds(record.inputs, float_model)
    runner = PairRunner(float_model, quantized, matching, [pair])
    padding = Padding(float_model, comparison.mask) if comparison.mask else None
    if padding is not None:
        masks = [padding.mask_of(feed, feeds.names[at]) for at, feed in enumerate(feeds)]
        for at in padding.telling(masks):
            padding.learn(masks[at], runner.run(feeds[at], feeds.names[at])[0])
    theirs = [(matching.outputs[o], matching.inputs[i]) for o, i in comparison.states]

    def values(told: Progress) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]]:
        """Float values, what consumers read, and the latter before its Q, part by part."""
        states = Carried(comparison.states), Carried(theirs)
        for at, feed in enumerate(feeds):
            told(at / len(feeds), f"sample {at + 1} of {len(feeds)}")
            name = feeds.names[at]
            its_feed = states[1].into(feed_for_quantized(matching, feed), name)
            reference, actual = runner.run(states[0].into(feed, name), name, its_feed)
            states[0].keep(reference)
            states[1].keep(actual)
            after = real_values(pair, actual[pair.after])
            before = actual.get(pair.before) if pair.before else None
            if before is not None:
                before = rectify(in_float_layout(pair, before), pair.rectifiers, float_model)
            _check_shapes(pair.name, pair.after, reference[pair.name], after)
            if padding is None:
                yield reference[pair.name], after, before
                continue
            padding.use(padding.mask_of(feed, name))
            parts = [padding.parts(pair.name, a) for a in (reference[pair.name], after)]
            befores: list[Any] = [None] * len(parts[0])
            if before is not None:
                befores = padding.parts(pair.name, before)
            yield from zip(*parts, befores, strict=True)

    low, high, spread = known.observed_low, known.observed_high, known.max_abs_error
    start = 0.1
    if not all(map(math.isfinite, (low, high, spread))):
        start = 0.55
        low, high, spread = _finite_ranges(values(part_of(progress, 0.1, start)))
    elif math.isfinite(known.mse):
        spread = min(spread, 8 * math.sqrt(known.mse))
    bins = _Bins(low, high, pair.qparams, spread)
    for arrays in values(part_of(progress, start, 1.0)):
        bins.add(*arrays)
    return bins.detail(pair.name, pair.node.name if pair.node else "", "activation")


def _finite_ranges(
    values: Iterable[tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]],
) -> tuple[float, float, float]:
    """Lowest and highest finite float value and the largest finite error; zeros for none."""
    low, high, spread = math.inf, -math.inf, 0.0
    for reference, actual, _ in values:
        finite = reference[np.isfinite(reference)].astype(np.float64)
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
        both = np.isfinite(reference) & np.isfinite(actual)
        error = np.abs(reference[both].astype(np.float64) - actual[both])
        spread = max(spread, float(error.max(initial=0.0)))
    return (low, high, spread) if low <= high else (0.0, 0.0, spread)


def _check_shapes(name: str, other: str, reference: NDArray[Any], actual: NDArray[Any]) -> None:
    if reference.shape != actual.shape:
        raise ReportError(
            f"the values of {other} ({list(actual.shape)}) cannot be set against {name} "
            f"({list(reference.shape)})",
            hint="Choose another tensor, or pin this one to a tensor of its own shape.",
        )


class _Bins:
    """The counts behind a tensor's pictures, summed over samples."""

    def __init__(self, low: float, high: float, qparams: QParams | None, spread: float) -> None:
        self.qparams = qparams
        self.step = float(qparams.scale) if qparams is not None and qparams.per_tensor else None
        low = low if math.isfinite(low) else 0.0
        high = high if math.isfinite(high) else 0.0
        edges = _edges(low, high, qparams)
        self.values = _empty(edges)
        self.quantized = _empty(edges)
        unit = self.step or 1.0
        reach = spread / unit
        reach = max(reach, 0.5) if self.step else (reach or 1e-12)
        self.errors = _empty(np.linspace(-1.02 * reach, 1.02 * reach, 122))
        self.map_edges = np.linspace(edges[0], edges[-1], MAP_BINS + 1)
        self.map = np.zeros((MAP_BINS, MAP_BINS), np.int64)
        self.saturated = np.zeros(2, np.int64)
        self.before = 0
        self.count = 0

    def add(
        self, reference: NDArray[Any], actual: NDArray[Any], before: NDArray[Any] | None
    ) -> None:
        reference = reference.astype(np.float64)
        actual = actual.astype(np.float64)
        self.values = self.values.merge(Histogram.of(reference, self.values.edges))
        self.quantized = self.quantized.merge(Histogram.of(actual, self.quantized.edges))
        with np.errstate(invalid="ignore"):
            error = (actual - reference) / (self.step or 1.0)
        self.errors = self.errors.merge(Histogram.of(error, self.errors.edges))
        finite = np.isfinite(reference) & np.isfinite(actual)
        counts, _, _ = np.histogram2d(
            reference[finite], actual[finite], [self.map_edges, self.map_edges]
        )
        self.map += counts.astype(np.int64)
        self.count += int(reference.size)
        if before is not None and self.qparams is not None:
            self.saturated += saturated_counts(before, self.qparams)
            self.before += int(before.size)

    def detail(self, tensor: str, node: str, kind: str) -> dict[str, Any]:
        qparams = self.qparams
        return {
            "tensor": tensor,
            "node": node,
            "kind": kind,
            "dtype": qparams.dtype if qparams is not None else "float32",
            "scale": None if qparams is None else plain(qparams.scale),
            "zero_point": None if qparams is None else plain(qparams.zero_point),
            "axis": None if qparams is None else qparams.axis,
            "edges": self.values.edges.tolist(),
            "float_counts": self.values.counts.tolist(),
            "quantized_counts": self.quantized.counts.tolist(),
            "float_below": self.values.below,
            "float_above": self.values.above,
            "quantized_below": self.quantized.below,
            "quantized_above": self.quantized.above,
            "error_edges": self.errors.edges.tolist(),
            "error_counts": self.errors.counts.tolist(),
            "error_below": self.errors.below,
            "error_above": self.errors.above,
            "error_unit": "steps" if self.step else "real",
            "map_float_edges": self.map_edges.tolist(),
            "map_quantized_edges": self.map_edges.tolist(),
            "map_counts": self.map.tolist(),
            "representable": None if qparams is None else list(qparams.representable_range()),
            "saturated": (self.saturated / self.before).tolist() if self.before else None,
            "count": self.count,
            "nonfinite": self.values.nonfinite + self.quantized.nonfinite,
        }


def _empty(edges: NDArray[np.float64]) -> Histogram:
    return Histogram(edges=edges, counts=np.zeros(edges.size - 1, np.int64))


def _edges(low: float, high: float, qparams: QParams | None) -> NDArray[np.float64]:
    """Bin edges over the observed range; between integer codes where there is one step size.

    Bins of whole steps keep the codes from beating against the bins.
    """
    if qparams is None or not qparams.per_tensor or not float(qparams.scale) > 0:
        margin = 0.02 * (high - low) or max(abs(low), 1.0) * 0.02
        return np.linspace(low - margin, high + margin, HISTOGRAM_BINS + 1)
    step = float(qparams.scale)
    qmin, qmax = INTEGER_DTYPES[qparams.dtype]
    zero = int(qparams.zero_point)
    first = math.floor(low / step) - 1
    last = math.ceil(high / step) + 1
    # A range far wider than the data would leave the picture empty: show twice the data at most.
    reach = max(last - first, 4)
    first = min(first, max(qmin - zero, first - reach // 2))
    last = max(last, min(qmax - zero, last + reach // 2))
    per_bin = max(1, math.ceil((last - first) / HISTOGRAM_BINS))
    bins = math.ceil((last - first + 1) / per_bin)
    return np.asarray((first - 0.5 + per_bin * np.arange(bins + 1)) * step, np.float64)


# -- feeds ---------------------------------------------------------------------------------------


def list_options(
    *, float_path: Path, inputs: FeedSource | None = None, progress: Progress = no_progress
) -> dict[str, Any]:
    """What a pair's options can be: inputs, states that fit and look likely, a mask, providers.

    Args:
        float_path: the float model.
        inputs: the feeds, looked at for padding; None where none are chosen yet.
        progress: see `runtime.Progress`.
    """
    model = _open(Path(float_path))
    progress(0.4, "looking for masks and states")
    possible = [(o.name, i.name) for o in model.outputs for i in model.inputs][:STATE_PAIRS]
    states = list(dict.fromkeys((*likely_states(model), *filter(_carries(model), possible))))
    return {
        "inputs": [i.name for i in model.inputs],
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
    model = _open(Path(float_path))
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
