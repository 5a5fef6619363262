"""A view's figures as the tiles and sentences that pages show. Choice of words, no arithmetic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from inspector.comparison import (
    ActivationError,
    Comparison,
    Latency,
    OutputError,
    TaskFigure,
    WeightError,
    judged_db,
    low_slices,
)
from inspector.qparams import integer_range
from inspector.render import (
    format_bytes,
    format_count,
    format_db,
    format_figure,
    format_ms,
    format_number,
    format_percent,
    printable,
    read_number,
    shorten_name,
)
from inspector.store import RunRecord
from inspector.web import style
from inspector.web.session import View

Tile = tuple[str, str, str, str]

SQNR_MEANING = (
    "SQNR: signal over quantization noise, higher is better; +6 dB is one more bit; below 20 dB "
    "look closer."
)


def output_of(comparison: Comparison, name: str | None) -> OutputError | None:
    """The output of that name; the one with the lowest SQNR where none has it."""
    outputs = comparison.outputs
    for each in outputs:
        if each.name == name:
            return each
    return min(outputs, key=lambda each: each.sqnr_db, default=None)


def output_tile(comparison: Comparison, name: str | None) -> Tile:
    """Pooled, worst and median channel and worst sample of one output, and what ships."""
    output = output_of(comparison, name)
    if output is None:
        return ("Output SQNR", "–", "no output is compared", "See the tensors that are unmatched.")
    parts = [f"deployed {format_db(output.deployed_sqnr_db)}"]
    if output.seen_sqnr_db is not None and output.unseen_sqnr_db is not None:
        parts.append(
            f"seen {format_db(output.seen_sqnr_db)}, unseen {format_db(output.unseen_sqnr_db)}"
        )
    return (
        f"Output SQNR, pooled: {shorten_name(output.name, 24)}",
        format_db(output.sqnr_db),
        " · ".join(parts),
        SQNR_MEANING + " Pooled over all samples, simulated; deployed runs the kernels that ship.",
    )


def parts_tile(comparison: Comparison, name: str | None) -> Tile:
    """Worst channel or slice, the median channel, and the worst sample."""
    output = output_of(comparison, name)
    if output is None:
        return ("Worst channel", "–", "", "")
    meaning = (
        "A pooled figure is ruled by the largest values: a channel, a slice or a sample can be "
        f"lost without moving it. Worst sample: {output.worst_sample}."
    )
    if output.worst_channel is None:
        return (
            "Worst sample",
            format_db(output.worst_sample_sqnr_db),
            f"median {format_db(output.median_sample_sqnr_db)}",
            meaning,
        )
    return (
        f"Worst channel (#{output.worst_channel})",
        format_db(output.worst_channel_sqnr_db),
        f"median channel {format_db(output.median_channel_sqnr_db)} · worst sample "
        f"{format_db(output.worst_sample_sqnr_db)}",
        meaning,
    )


def _shown_figure(figure: TaskFigure) -> float:
    """Deployed, simulated where it was not run so."""
    return figure.simulated if figure.deployed is None else figure.deployed


def metric_meaning(figure: TaskFigure) -> str:
    """What to know of a task metric's figure."""
    direction = "Higher" if figure.higher_is_better else "Lower"
    return (
        f"{printable(figure.metric)}, over {format_count(figure.samples)} samples. {direction} is "
        "better; the float model's own figure is the measure."
    )


def metric_tile(figure: TaskFigure) -> Tile:
    """A task metric of both models, as it ships."""
    parts = [f"float {format_figure(figure.float_figure, figure.unit)}"]
    if math.isnan(figure.float_figure):
        parts = ["nothing counts on these samples"]
    elif figure.deployed is not None:
        parts.append(f"simulated {format_figure(figure.simulated, figure.unit)}")
    return (
        f"Task: {shorten_name(figure.metric, 26)}",
        format_figure(_shown_figure(figure), figure.unit),
        " · ".join(parts),
        metric_meaning(figure),
    )


def task_or_size_tiles(view: View) -> list[Tile]:
    """The task metric; without one top-1 where there are labels, else what quantizing saved."""
    comparison, tiles = view.comparison, [metric_tile(f) for f in view.comparison.metrics]
    if tiles:
        return tiles
    task = comparison.task
    size = (
        f"{format_bytes(comparison.quantized_model.size_bytes)}",
        f"float {format_bytes(comparison.float_model.size_bytes)}",
    )
    if task is not None:
        tiles.append(
            (
                "Top-1, quantized",
                format_percent(task.top1_quantized),
                f"float {format_percent(task.top1_float)} · same choice "
                f"{format_percent(task.top1_agreement)} of {task.samples}",
                f"On {task.samples} labelled samples, output {task.output}. "
                f"Size {size[0]}, {size[1]}.",
            )
        )
    else:
        tiles.append(
            ("Size, quantized", size[0], size[1], "File and external data; 1 MB is 10⁶ bytes.")
        )
    return tiles


def _is_noisy(latency: Latency) -> bool:
    """Half of the runs lie further apart than 40 % of the median."""
    return (
        latency.float_spread_seconds > 0.4 * latency.float_seconds
        or latency.quantized_spread_seconds > 0.4 * latency.quantized_seconds
    )


def _times_float(latency: Latency | None) -> str:
    if latency is None or not latency.float_seconds:
        return "–"
    return f"{latency.quantized_seconds / latency.float_seconds:.1f} ×"


def pace(latency: Latency) -> str:
    """How the quantized model's latency stands to the float model's, in words."""
    ratio = latency.quantized_seconds / latency.float_seconds if latency.float_seconds else 1.0
    if 0.95 <= ratio <= 1.05:
        return "as fast"
    return f"{ratio:.1f} × slower" if ratio > 1 else f"{1 / ratio:.1f} × faster"


def latency_tile(comparison: Comparison) -> Tile:
    """The latency of both models on this machine."""
    latency = comparison.latency
    if latency is None:
        return ("Latency on this machine", "–", "not measured", "")
    return (
        "int8 against float on this machine",
        f"{format_ms(latency.quantized_seconds)}",
        f"float {format_ms(latency.float_seconds)}: int8 is {pace(latency)}"
        + (", noisy" if _is_noisy(latency) else ""),
        f"Deployed, one feed, median of {latency.runs} interleaved runs; spread "
        f"{format_ms(latency.quantized_spread_seconds)} and "
        f"{format_ms(latency.float_spread_seconds)}. Other machines differ.",
    )


def overview_tiles(view: View, output: str | None) -> list[Tile]:
    """The overview's four tiles."""
    return [
        output_tile(view.comparison, output),
        parts_tile(view.comparison, output),
        *task_or_size_tiles(view),
        latency_tile(view.comparison),
    ]


def uneven(comparison: Comparison, name: str | None) -> OutputError | ActivationError | None:
    """The record whose parts explain an output: the Concat behind it, or its own channels.

    None where every part is about as good as the whole.
    """
    output = output_of(comparison, name)
    if output is None:
        return None
    if low_slices(output):
        return output
    for each in comparison.activations:
        if each.is_output and each.name == output.name and low_slices(each):
            return each
    gap = output.sqnr_db - output.worst_channel_sqnr_db
    if output.worst_channel is not None and len(output.channel_sqnr_db) > 1 and gap > 10:
        return output
    return None


def formula(record: ActivationError | WeightError) -> str:
    """How integers become reals, with this tensor's numbers."""
    scale, zero_point = record.scale, record.zero_point
    if scale is None or zero_point is None:
        return f"{record.dtype}: has no scale and zero point"
    if isinstance(scale, Sequence) and len(scale) > 1:
        return (
            "real = scale[c] * (q - zero_point[c])"
            f"    scale {format_number(min(scale))} … {format_number(max(scale))} over "
            f"{len(scale)} channels of axis {getattr(record, 'axis', None)}"
        )
    one = scale[0] if isinstance(scale, Sequence) else scale
    zero = zero_point[0] if isinstance(zero_point, Sequence) else zero_point
    text = f"real = {format_number(one)} * (q - {zero})" if zero >= 0 else (
        f"real = {format_number(one)} * (q + {-zero})"
    )  # fmt: skip
    try:
        low, high = integer_range(record.dtype)
    except ValueError:
        return text
    return (
        f"{text}    q = {low} … {high}    "
        f"real = {format_number(one * (low - zero))} … {format_number(one * (high - zero))}"
    )


def tensor_sentence(record: ActivationError | WeightError) -> str:
    """What there is to say about one tensor, by the figures it has."""
    name = shorten_name(record.name, 44)
    if isinstance(record, WeightError):
        if record.scale is None:
            return f"{name} is left in float ({record.dtype})"
        return f"{name} is stored with {format_db(record.sqnr_db)}"
    accumulated, local = record.accumulated_sqnr_db, record.local_sqnr_db
    lead = f"{name} arrives with {format_db(accumulated)}"
    low = low_slices(record)
    if low:
        part = low[0]
        return f"{lead}, but its part {shorten_name(part.source)} with {format_db(part.sqnr_db)}"
    if record.nonfinite_quantized > record.nonfinite_float:
        return f"{lead}: {record.nonfinite_quantized:,} values are not finite"
    if local is None:
        return f"{lead}; it has no Q/DQ of its own"
    if local - accumulated > 3:
        return f"{lead}; its own Q/DQ leaves {format_db(local)}, the rest comes from earlier nodes"
    if record.saturated_fraction and record.saturated_fraction >= 0.001:
        return f"{lead}: {format_percent(record.saturated_fraction)} of it is clipped"
    return f"{lead}; its own Q/DQ leaves {format_db(local)}"


def tensor_tiles(record: ActivationError | WeightError) -> list[Tile]:
    """The four tiles of one tensor."""
    channel: Tile = (
        "Worst channel"
        if record.worst_channel is None
        else f"Worst channel #{record.worst_channel}",
        "–" if record.worst_channel is None else format_db(record.worst_channel_sqnr_db),
        "no channels"
        if record.worst_channel is None
        else f"median {format_db(record.median_channel_sqnr_db)} of {len(record.channel_sqnr_db)}",
        "SQNR per channel of the float tensor.",
    )
    error: Tile = (
        "Largest error",
        format_number(record.max_abs_error),
        f"cosine {record.cosine_similarity:.5f} · MSE {format_number(record.mse)}",
        "Largest |float − quantized|, in the tensor's own unit.",
    )
    if isinstance(record, WeightError):
        return [
            ("SQNR", format_db(record.sqnr_db), "against the float weight", SQNR_MEANING),
            channel,
            error,
            (
                "Stored as",
                record.dtype,
                "per tensor" if record.axis is None else f"per channel, axis {record.axis}",
                f"Read by {record.node}; matched by {record.matched_by}.",
            ),
        ]
    clipped = record.saturated_fraction
    local = f"local {format_db(record.local_sqnr_db)}"
    meaning = (
        f"{SQNR_MEANING} Accumulated: float model against quantized model, as consumers read it. "
        "Local: before against after its own Q/DQ."
    )
    if record.isolated_sqnr_db is not None or record.added_sqnr_db is not None:
        local += (
            f" · isolated {format_db(record.isolated_sqnr_db)} · "
            f"added {format_db(record.added_sqnr_db)}"
        )
        meaning += (
            " Isolated: the node alone, on the float model's tensors. Added: against the float "
            "node on the same quantized inputs."
        )
    return [
        ("Accumulated SQNR", format_db(record.accumulated_sqnr_db), local, meaning),
        channel,
        error,
        (
            "Clipped",
            format_percent(clipped),
            "no Q/DQ pair"
            if clipped is None
            else f"low {format_percent(record.saturated_low_fraction)} · "
            f"high {format_percent(record.saturated_high_fraction)}",
            f"Observed in the float model {format_number(record.observed_low)} … "
            f"{format_number(record.observed_high)}; representable "
            f"{format_number(record.representable_low)} … "
            f"{format_number(record.representable_high)}.",
        ),
    ]


def _channel_db(output: OutputError | None) -> str:
    if output is None or output.worst_channel is None:
        return "–"
    return format_db(output.worst_channel_sqnr_db)


def change_tiles(view: View, output: str | None) -> list[Tile]:
    """Before and after, of runs of one recipe; the run alone where there is nothing before."""
    after = view.comparison
    before = view.before
    now = output_of(after, output)
    was = output_of(before, now.name if now else None) if before else None

    def arrow(old: str | None, new: str) -> str:
        return new if old is None else f"{old} → {new}"

    latency, old_latency = after.latency, before.latency if before else None
    runs = f"run {view.baseline.number} → run {view.run.number}" if view.baseline else "this run"
    told = agreement(view.run)
    runs += f"; {told}" if told else ""
    sample = arrow(
        format_db(was.worst_sample_sqnr_db) if was else None,
        format_db(now.worst_sample_sqnr_db if now else None),
    )
    tiles: list[Tile] = [
        (
            "Output SQNR, pooled",
            arrow(format_db(was.sqnr_db) if was else None, format_db(now.sqnr_db if now else None)),
            runs,
            SQNR_MEANING,
        ),
        (
            "Worst channel",
            arrow(_channel_db(was) if was else None, _channel_db(now)),
            f"worst sample {sample}",
            "The channel, and the sample, that is worst in each run.",
        ),
        (
            "Size",
            arrow(
                format_bytes(before.quantized_model.size_bytes) if before else None,
                format_bytes(after.quantized_model.size_bytes),
            ),
            f"float {format_bytes(after.float_model.size_bytes)}",
            "",
        ),
    ]
    if after.metrics:
        earlier = {f.metric: f for f in before.metrics} if before else {}
        for figure in after.metrics:
            old_figure = earlier.get(figure.metric)
            shown = format_figure(_shown_figure(figure), figure.unit)
            was_shown = (
                format_figure(_shown_figure(old_figure), figure.unit) if old_figure else None
            )
            label, _, caption, meaning = metric_tile(figure)
            tiles.append((label, arrow(was_shown, shown), caption, meaning))
    elif after.task is not None:
        old = before.task if before else None
        tiles.append(
            (
                "Top-1",
                arrow(
                    format_percent(old.top1_quantized) if old else None,
                    format_percent(after.task.top1_quantized),
                ),
                f"float {format_percent(after.task.top1_float)}",
                f"On {format_count(after.task.samples)} labelled samples.",
            )
        )
    else:
        tiles.append(
            (
                "Latency against float",
                arrow(_times_float(old_latency), _times_float(latency)),
                f"{format_ms(latency.quantized_seconds)}, float {format_ms(latency.float_seconds)}"
                + (", noisy" if _is_noisy(latency) else "")
                if latency
                else "not measured",
                "Share of the float model's time, measured in turns with it, deployed; lower is "
                "faster. Times of different runs are not compared: the machine differs by then.",
            )
        )
    return tiles


def change_sentence(
    view: View,
    output: str | None,
    ticked: Sequence[str],
    *,
    overrides: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """What the shown run's exclusions gained, or what is chosen and not applied yet.

    Args:
        view: what is shown.
        output: the output to speak of; None for the worst.
        ticked: nodes in float in the next run.
        overrides: of the next run; None for those of the shown one.
    """
    held = view.run.recipe.get("overrides", ())
    overrides = held if overrides is None else overrides
    number = len(view.run.exclusions)
    if list(overrides) != list(held):
        chosen = [*([_nodes(len(ticked)) + " in float"] if ticked else []),
                  set_by_hand(overrides) or "no grid set by hand"]  # fmt: skip
        return f"{' and '.join(chosen)}: Re-quantize applies it"
    if set(ticked) != set(view.run.exclusions):
        nodes = "1 node is" if len(ticked) == 1 else f"{len(ticked)} nodes are"
        return f"{nodes} ticked: Re-quantize applies them"
    if not number and not overrides:
        return "No node is left in float yet: tick the worst, then re-quantize"
    done = [*([f"{_nodes(number)} left in float"] if number else []),
            *([set_by_hand(overrides)] if overrides else [])]  # fmt: skip
    what = " and ".join(done)
    now = output_of(view.comparison, output)
    was = output_of(view.before, now.name if now else None) if view.before else None
    if now is None or was is None:
        return f"{what}: output {format_db(now.sqnr_db if now else None)}"
    text = (
        f"{what}: {shorten_name(now.name, 30)} {format_db(was.sqnr_db)} → {format_db(now.sqnr_db)}"
    )
    if low_slices(was) or low_slices(now):
        parts = [min(part.sqnr_db for part in each.slices) for each in (was, now) if each.slices]
        text += f", worst part {' → '.join(map(format_db, parts))}"
    elif now.worst_channel is not None and was.worst_channel is not None:
        text += f", worst channel {_channel_db(was)} → {_channel_db(now)}"
    return text


# A smaller difference would be shown as none.
LEAST_SHOWN_DB = 0.05

# ── a list that is not applied yet ───────────────────────────────────────────────────────────


def _previewed(found: Mapping[str, Any], output: str | None) -> Mapping[str, Any] | None:
    """The preview of an output, of the worst where it is not named."""
    outputs = found["outputs"]
    named = next((each for each in outputs if each["name"] == output), None)
    return named or min(outputs, key=lambda o: read_number(o["worst_part_sqnr_db"]), default=None)


def preview_sentence(
    view: View,
    found: Mapping[str, Any],
    output: str | None,
    ticked: Sequence[str],
    *,
    overrides: Sequence[Mapping[str, Any]] = (),
) -> str:
    """What the ticked nodes and the recipe's overrides would give, against the run that is shown.

    Args:
        view: what is shown.
        found: the preview (`live.preview_list`).
        output: the output to speak of; None for the worst.
        ticked: nodes in float.
        overrides: those of the previewed recipe.
    """
    nodes = f"{'no node' if not ticked else _nodes(len(ticked))} in float"
    if overrides:
        nodes = set_by_hand(overrides) + (f" and {nodes}" if ticked else "")
    would = _previewed(found, output)
    if would is None:
        return f"Preview: {nodes}; no output of floating-point values to judge by"
    now = output_of(view.comparison, would["name"])
    before, was = _before(view, found, would["name"])
    text = f"Preview: {nodes} would give {shorten_name(str(would['name']), 30)} "
    text += _now_and_then(before, would["sqnr_db"])
    will = read_number(would["worst_part_sqnr_db"])
    if was != before or will != read_number(would["sqnr_db"]):
        text += f", worst part {_now_and_then(was, will)}"
    if now is not None and before is not None and abs(now.sqnr_db - before) >= LEAST_SHOWN_DB:
        text += f" (the loaded file, calibrated otherwise: {format_db(now.sqnr_db)})"
    return text


def set_by_hand(overrides: Sequence[Mapping[str, Any]]) -> str:
    """``2 tensors at int16, 1 grid set by hand``; "" for none."""
    types = Counter(str(each["quant_type"]) for each in overrides if typed(each) and len(each) == 2)
    said = [f"{_tensors(number)} at {dtype}" for dtype, number in types.items()]
    grids = len(overrides) - types.total()
    if grids:
        said.append(f"{'1 grid' if grids == 1 else f'{grids} grids'} set by hand")
    return ", ".join(said)


def typed(override: Mapping[str, Any]) -> bool:
    """Whether an entry of a recipe's overrides puts its tensor on a 16-bit grid."""
    return str(override.get("quant_type", "")).endswith("int16")


def _tensors(number: int) -> str:
    return "1 tensor" if number == 1 else f"{number} tensors"


def _without(found: Mapping[str, Any], output: str) -> Mapping[str, Any] | None:
    """An output of the previewed recipe without a list; None where the run's own figures are it."""
    outputs = found.get("without") or ()
    return next((each for each in outputs if each["name"] == output), None)


def _now_and_then(now: float | None, then: Any) -> str:
    """``8.0 dB → 12.3 dB``; one figure where there is nothing before."""
    after = format_db(read_number(then))
    return after if now is None else f"{format_db(now)} → {after}"


def _before(view: View, found: Mapping[str, Any], output: str) -> tuple[float | None, float | None]:
    """SQNR in dB of an output, and of its worst part, that a preview is set beside."""
    without = _without(found, output)
    if without is not None:
        return read_number(without["sqnr_db"]), read_number(without["worst_part_sqnr_db"])
    now = output_of(view.comparison, output)
    return (now.sqnr_db, judged_db(now)) if now else (None, None)


def preview_severity(view: View, found: Mapping[str, Any], output: str | None) -> str:
    """The severity of what a list would give: a key of `style.SIGNS`. What is worse than without
    the list is not fine, however good it is."""
    would = _previewed(found, output)
    if would is None:
        return style.severity(None)
    sign = style.severity(read_number(would["worst_part_sqnr_db"]))
    before, _ = _before(view, found, would["name"])
    after = read_number(would["sqnr_db"])
    worse = before is not None and after is not None and after < before - LEAST_SHOWN_DB
    return "look" if worse and sign == "fine" else sign


def _nodes(number: int) -> str:
    return "1 node" if number == 1 else f"{number} nodes"


def _metric_previews(view: View, found: Mapping[str, Any]) -> list[Tile]:
    """The task metrics of a list that is not applied yet, after those of the run."""
    known = {f.metric: f.simulated for f in view.comparison.metrics}
    known |= {f["metric"]: read_number(f["simulated"]) for f in found["without_metrics"] or ()}
    tiles: list[Tile] = []
    for each in found["metrics"]:
        metric, unit = each["metric"], each["unit"]
        value = format_figure(read_number(each["simulated"]), unit)
        if metric in known:
            value = f"{format_figure(known[metric], unit)} → {value}"
        better = "Higher" if each["higher_is_better"] else "Lower"
        tiles.append(
            (
                f"Preview of {shorten_name(metric, 26)}",
                value,
                f"float {format_figure(read_number(each['float_figure']), unit)}",
                f"Simulated, on {format_count(each['samples'])} samples. {better} is better.",
            )
        )
    return tiles


def preview_tiles(view: View, found: Mapping[str, Any], output: str | None) -> list[Tile]:
    """The figures of a list that is not applied yet; estimates carry ≈."""
    would = _previewed(found, output)
    now = output_of(view.comparison, would["name"]) if would is not None else None
    was = now.worst_sample_sqnr_db if now is not None else None
    pooled = now.sqnr_db if now is not None else None
    without = _without(found, would["name"]) if would is not None else None
    if without is not None:
        was, pooled = (read_number(without[k]) for k in ("worst_sample_sqnr_db", "sqnr_db"))
    tiles: list[Tile] = [
        (
            "Output SQNR, preview",
            _now_and_then(pooled, would["sqnr_db"]) if would else "–",
            f"worst sample {_now_and_then(was, would['worst_sample_sqnr_db'])}" if would else "",
            "Simulated, of the run (for a loaded file: of its recipe quantized anew) and of this "
            f"list. {SQNR_MEANING}",
        )
    ]
    task = found["task"]
    if found.get("metrics"):
        tiles += _metric_previews(view, found)
    elif task is not None:
        before = view.comparison.task
        tiles.append(
            (
                "Top-1, preview",
                (f"{format_percent(before.top1_quantized)} → " if before is not None else "")
                + format_percent(read_number(task["top1_quantized"])),
                f"float {format_percent(read_number(task['top1_float']))}",
                f"On {format_count(task['samples'])} labelled samples, simulated.",
            )
        )
    else:
        tiles.append(_changed_tile(found))
    share, wide = (read_number(found[f"{kind}_macs_fraction"]) for kind in ("float", "wide"))
    tiles.append(
        (
            "MACs in float",
            format_percent(share),
            f"16 bits {format_percent(wide)}"
            if wide > 0
            else f"no exclusion {format_percent(read_number(found['whole_float_macs_fraction']))}",
            "Share of the multiply-accumulates of Conv, ConvTranspose, Gemm and MatMul whose "
            "operands are not both quantized. 16 bits: of nodes that read or give a 16-bit "
            "tensor, which ONNX Runtime's CPU kernels compute in float all the same.",
        )
    )
    seconds, size = found["latency_seconds"], found["size_bytes"]
    latency = view.comparison.latency
    tiles.append(
        (
            "Size, latency",
            f"≈ {format_bytes(size)}" if size is not None else "–",
            f"≈ {format_ms(read_number(seconds))}, now {format_ms(latency.quantized_seconds)}"
            if seconds is not None and latency is not None
            else "latency after re-quantizing",
            "Estimates: the run's file and the weights that change; the run's and the float "
            "model's time by their share of multiply-accumulates.",
        )
    )
    return tiles


def _changed_tile(found: Mapping[str, Any]) -> Tile:
    """What changes in the graph; surgery tells of weights only."""
    number = len(found["float_weights"])
    weights = "1 weight" if number == 1 else f"{number} weights"
    if not (found["freed"] or found["added"] or found["regridded"]) and found["float_weights"]:
        return ("Back in float", weights, "every other scale stays", "")
    types = Counter(dtype for _, dtype in found["retyped"])
    wide = {name for name, _ in found["retyped"]}
    numbers = {
        "other range": len(set(found["regridded"]) - wide),
        "new pair": len(set(found["added"]) - wide),
    }
    parts = [f"{number} {word}" for word, number in numbers.items() if number]
    parts += [f"{number} {dtype}" for dtype, number in types.items()]
    return (
        "Tensors in float",
        f"+{len(found['freed'])}",
        ", ".join([*parts, weights]),
        "Activations that lose their Q/DQ pair against no exclusion at all, those that "
        "get another scale or a pair of their own, and weights stored in float.",
    )


def agreement(run: RunRecord) -> str:
    """Whether a run's preview was right; "" where it had none."""
    told = run.summary.get("preview")
    if not told:
        return ""
    real = {each["name"]: read_number(each["sqnr_db"]) for each in run.summary["outputs"]}
    pairs = [(read_number(db), real[name]) for name, db in told.items() if name in real]
    if not pairs:
        return ""
    before, after = min(pairs, key=lambda pair: pair[1])
    same = all(a == b or abs(a - b) < 0.005 for a, b in pairs)
    said = f"preview {format_db(before)}"
    return f"{said}, confirmed" if same else f"{said}, came {format_db(after)}"
