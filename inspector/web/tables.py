"""Records as table rows: one row per record, figures as numbers so that columns sort."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from inspector.comparison import (
    ActivationError,
    BatchEffect,
    Comparison,
    DeviceError,
    NonFinite,
    OutputError,
    Skipped,
    Unmatched,
    WeightError,
    judged_db,
    low_slices,
)
from inspector.render import (
    feeds_text,
    format_bytes,
    format_db,
    format_number,
    group_unmatched,
    has_isolated,
    printable,
    read_number,
    shorten_name,
)
from inspector.store import Note, RunRecord
from inspector.web import style
from inspector.web.session import View, compared, rank_of, sqnr_of

# Beyond this many rows, decibels are shown as plain numbers: formatting cells one by one is slow.
STYLED_ROWS = 600
# More rows take the browser longer than a reader has patience; downloads have all of them.
MAX_ROWS = 2000
# A smaller change would be shown as none.
LEAST_CHANGE_DB = 0.05
# Names that are listed in one cell.
MAX_NAMES = 20
DECIBELS = ("sqnr", "local", "isolated", "added", "worst", "part_db", "weight", "before", "after")
RECIPE_DECIBELS = ("deployed", "unseen", "simulated", "joined")
# An empty table has its columns too.
# fmt: off
TENSOR_COLUMNS = [
    "sign", "name", "tensor", "kind", "op", "type", "sqnr", "local", "worst", "clipped", "node",
]
NODE_COLUMNS = [
    "float", "sign", "name", "node", "op", "sqnr", "part_db", "local", "weight", "tensor",
]
# fmt: on
RECIPE_COLUMNS = [
    *("sign", "label", "deployed", "unseen", "simulated", "joined", "top1", "agreement"),
    *("metric", "ms", "spread", "mb", "note"),
]
KINDS = ("activation", "weight", "bias")
ISOLATED_MEANING = (
    "Of the node alone: it reads the float model's tensors, quantized as it reads them; before the "
    "output's own Q/DQ."
)
ADDED_MEANING = (
    "What the node adds, with its output's own Q/DQ: against the float node on the same quantized "
    "inputs. – also where those make the float node give NaN or infinity."
)
RULES = {
    "name": "by name",
    "structure": "by structure",
    "content": "by content",
    "pin": "by hand",
}


def _known(sqnr_db: float | None) -> float | None:
    return None if sqnr_db is None or math.isnan(sqnr_db) else sqnr_db


def shown(frame: pd.DataFrame) -> Any:
    """The frame with decibels as "12.3 dB" and "exact", which still sort as numbers."""
    columns = [name for name in (*DECIBELS, *RECIPE_DECIBELS) if name in frame]
    if len(frame) > STYLED_ROWS or not columns:
        return frame
    styled = frame.style.format(format_db, subset=columns, na_rep="–")
    return styled.format(_format_change, subset=["change"]) if "change" in frame else styled


def _format_change(db: float) -> str:
    """A change of SQNR with its sign; where one of both is exact, that there is no number."""
    if math.isinf(db):
        return "now exact" if db > 0 else "was exact"
    return f"{db:+.1f} dB"


def kind_of(record: ActivationError | WeightError) -> str:
    """ "activation", "weight" or "bias"."""
    return record.kind if isinstance(record, WeightError) else "activation"


def op_types(comparison: Comparison) -> list[str]:
    """The op types that occur, most frequent first."""
    seen: dict[str, int] = {}
    for each in compared(comparison):
        seen[each.op_type] = seen.get(each.op_type, 0) + 1
    return sorted(seen, key=lambda op: (-seen[op], op))


def _matches(text: str, *fields: str) -> bool:
    return all(
        any(word in field.lower() for field in fields) for word in text.lower().split() if word
    )


def _times(profile: Mapping[str, Any] | None, side: str) -> Mapping[str, float]:
    """Seconds by tensor of one deployed model."""
    measured = {} if profile is None else profile[side]["deployed"]
    times: Mapping[str, float] = measured.get("tensors", {})
    return times


def tensors(
    comparison: Comparison,
    *,
    text: str = "",
    kind: str | None = None,
    op_type: str | None = None,
    profile: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """The compared tensors that pass the filters, worst first.

    At most `MAX_ROWS`; `attrs["total"]` of the frame is how many pass. With a profile
    (`workbench.profile_run`) there are columns of times; with isolated errors (`workbench.isolate`)
    those and what is added.
    """
    took, took_float = _times(profile, "quantized"), _times(profile, "float")
    passing = [
        each
        for each in compared(comparison)
        if (not kind or kind_of(each) == kind)
        and (not op_type or each.op_type == op_type)
        and (not text or _matches(text, each.name, each.node, each.op_type))
    ]
    measured, rows = has_isolated(comparison), []
    width = 26 if measured or profile is not None else 52
    for each in sorted(passing, key=rank_of)[:MAX_ROWS]:
        sqnr = sqnr_of(each)
        activation = each if isinstance(each, ActivationError) else None
        rows.append(
            {
                "sign": style.SIGNS[style.severity(rank_of(each))],
                "name": each.name,
                "tensor": shorten_name(each.name, width),
                "kind": kind_of(each),
                "op": shorten_name(each.op_type, 24),
                "type": each.dtype,
                "sqnr": _known(sqnr),
                "local": _known(activation.local_sqnr_db) if activation else None,
                "isolated": _known(activation.isolated_sqnr_db) if activation else None,
                "added": _known(activation.added_sqnr_db) if activation else None,
                "worst": _known(each.worst_channel_sqnr_db)
                if each.worst_channel is not None
                else None,
                "clipped": None
                if activation is None or activation.saturated_fraction is None
                else 100 * activation.saturated_fraction,
                "node": shorten_name(each.node, 120),
                "time": _micros(took, each.quantized_name) if activation else None,
                "float_time": _micros(took_float, each.name) if activation else None,
            }
        )
    columns = list(TENSOR_COLUMNS)
    if measured:
        after = columns.index("local") + 1
        columns[after:after] = ["isolated", "added"]
    if profile is not None:
        columns[-1:-1] = ["time", "float_time"]
    frame = pd.DataFrame(rows, columns=columns)
    frame.attrs["total"] = len(passing)
    return frame


def _micros(seconds: Mapping[str, float], tensor: str) -> float | None:
    return 1e6 * seconds[tensor] if tensor in seconds else None


def _device_text(record: DeviceError) -> str:
    steps = [f"float → simulated {format_db(record.quantization_sqnr_db)}"]
    if record.kernel_sqnr_db is not None:
        steps.append(f"→ deployed {format_db(record.kernel_sqnr_db)}")
    steps.append(f"→ device {format_db(record.device_sqnr_db)}")
    most = {"exact": "no noise at all"}.get(record.verdict, f"most from {record.verdict}")
    return f"{' '.join(steps)}; in all {format_db(record.total_sqnr_db)}, {most}"


def tensor_facts(record: ActivationError | WeightError, comparison: Comparison) -> pd.DataFrame:
    """What a tensor's scale can hold, what was seen and what it was matched with, as texts."""
    channels = "–" if record.channel_axis is None else f"axis {record.channel_axis}"
    if isinstance(record, WeightError):
        rows = [
            ("Scales", "one" if record.axis is None else f"per channel, axis {record.axis}"),
            (
                "Output channels",
                "–" if record.channel_axis is None else f"axis {record.channel_axis}",
            ),
        ]
    else:
        low, high = record.representable_low, record.representable_high
        rows = [
            (
                "Observed, float model",
                f"{format_number(record.observed_low)} … {format_number(record.observed_high)}",
            ),
            (
                "Representable",
                "–" if low is None else f"{format_number(low)} … {format_number(high)}",
            ),
            ("Channels", channels),
        ]
        if record.isolated_sqnr_db is not None or record.added_sqnr_db is not None:
            rows += [
                ("Isolated", f"{format_db(record.isolated_sqnr_db)}, the node alone"),
                ("Added", f"{format_db(record.added_sqnr_db)}, by the node and its Q/DQ"),
            ]
        if record.nonfinite_float or record.nonfinite_quantized:
            found = f"float {record.nonfinite_float:,}, quantized {record.nonfinite_quantized:,}"
            rows.append(("NaN or infinite", found))
    rows += [
        ("Cosine similarity", f"{record.cosine_similarity:.6f}"),
        ("MSE", format_number(record.mse)),
        ("Quantized tensor", shorten_name(record.quantized_name, 90)),
        ("Matched", RULES.get(record.matched_by, record.matched_by)),
    ]
    if record.note:
        rows.append(("Note", printable(record.note, 90)))
    scope = record.scope if isinstance(record, WeightError) else ""
    if scope:
        rows.append(("Inside", shorten_name(scope, 90)))
    rows += [("Device", _device_text(d)) for d in comparison.device if d.name == record.name]
    return pd.DataFrame(rows, columns=["", " "]).set_index("")


def _db(label: str, meaning: str, width: int = 78) -> Any:
    return st.column_config.NumberColumn(label, help=meaning, width=width)


def tensor_columns(frame: pd.DataFrame) -> dict[str, Any]:
    """How the columns of `tensors` are shown; further ones take their room from the names."""
    text = st.column_config.TextColumn
    narrow = "isolated" in frame or "time" in frame
    return {
        "sign": text("", width=28, help="● below 10 dB · ▲ below 20 dB · ✓ fine"),
        "name": None,
        "tensor": text("Tensor", width=165 if narrow else 285),
        "kind": text("Kind", width=72),
        "op": text("Op", width=72),
        "type": text("Type", width=52, help="Stored as; a float type where it was left in float."),
        "sqnr": _db(
            "SQNR",
            "Signal over quantization noise, higher is better; +6 dB is one more bit. Activations: "
            "accumulated up to here, as the next node reads it.",
        ),
        "local": _db("Local", "Before against after the tensor's own Q/DQ."),
        "isolated": _db("Isolated", ISOLATED_MEANING),
        "added": _db("Added", ADDED_MEANING),
        "worst": _db("Channel", "SQNR of the worst channel."),
        "clipped": st.column_config.NumberColumn(
            "Clipped %", format="%.2f", help="Values outside what scale and zero point can hold."
        ),
        "time": st.column_config.NumberColumn(
            "Time µs",
            format="%.0f",
            width=70,
            help="Of the node that computes it, with its constants and its own Q/DQ, in the "
            "quantized model as deployed; – where it was fused into a neighbour.",
        ),
        "float_time": st.column_config.NumberColumn(
            "Float µs", format="%.0f", width=70, help="The same in the float model."
        ),
        "node": text("Node"),
    }


def nodes(
    comparison: Comparison,
    ticked: Collection[str],
    listed: Iterable[Mapping[str, Any]] = (),
    *,
    selected: str = "",
    text: str = "",
    op_type: str | None = None,
) -> pd.DataFrame:
    """The float model's nodes, worst output first.

    Args:
        comparison: gives the figures.
        ticked: names of nodes to leave in float.
        listed: every node that can be left in float, as `workbench.list_nodes` has them; those
            without a compared tensor come last.
        selected: the node to mark.
        text, op_type: filters.
    """
    named = {str(each["name"]): each for each in listed}
    outputs: dict[str, ActivationError] = {}
    for each in comparison.activations:
        if each.node and (each.node not in outputs or rank_of(each) < rank_of(outputs[each.node])):
            outputs[each.node] = each
    weights: dict[str, WeightError] = {}
    for weight in comparison.weights:
        if weight.kind == "weight" and (
            weight.node not in weights or weight.sqnr_db < weights[weight.node].sqnr_db
        ):
            weights[weight.node] = weight
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys((*outputs, *weights, *named, *ticked)):
        output, constant = outputs.get(name), weights.get(name)
        op = str(named[name]["op_type"]) if name in named else "–"
        op = output.op_type if output else constant.op_type if constant else op
        if op_type and op != op_type:
            continue
        if text and not _matches(text, name, op, output.name if output else ""):
            continue
        sqnr = output.accumulated_sqnr_db if output else None
        rank = rank_of(output) if output else None
        rows.append(
            {
                "float": name in ticked,
                "sign": "▸" * (name == selected) + style.SIGNS[style.severity(rank)],
                "name": name,
                "node": shorten_name(name, 40),
                "op": shorten_name(op, 24),
                "sqnr": _known(sqnr),
                "part_db": _known(min((part.sqnr_db for part in output.slices), default=None))
                if output
                else None,
                "local": _known(output.local_sqnr_db) if output else None,
                "weight": _known(constant.sqnr_db) if constant else None,
                "rank": math.inf if rank is None else rank,
                "tensor": shorten_name(
                    output.name
                    if output
                    else ", ".join(named[name]["outputs"])
                    if name in named
                    else "",
                    60,
                ),
            }
        )
    rows.sort(key=lambda row: row.pop("rank"))
    # Ticked ones are always among them.
    kept = [row for at, row in enumerate(rows) if at < MAX_ROWS or row["float"]]
    frame = pd.DataFrame(kept, columns=NODE_COLUMNS)
    frame.attrs["total"] = len(rows)
    return frame


def op_of_nodes(comparison: Comparison) -> dict[str, str]:
    """The op type of every node that computes or reads a compared tensor."""
    return {each.node: each.op_type for each in compared(comparison) if each.node}


def node_columns(wide: str = "") -> dict[str, Any]:
    """How the columns of `nodes` are shown.

    Args:
        wide: the type of the column "wide"; "" where it is not there.
    """
    text = st.column_config.TextColumn
    return {
        "float": st.column_config.CheckboxColumn(
            "Float", width=72, help="Leave this node in float. Select the cell and press Space."
        ),
        "wide": st.column_config.CheckboxColumn(
            wide or None,
            width=60,
            help="Give what this node computes 65,536 levels instead of "
            "256. The file stays as small; ONNX Runtime's CPU kernels compute the nodes around it "
            "in float.",
        ),
        "sign": text("", width=36, help="▸ selected · ● below 10 dB · ▲ below 20 dB · ✓ fine"),
        "name": None,
        "node": text("Node", width="medium"),
        "op": text("Op", width=80),
        "sqnr": _db("Output", "Accumulated SQNR of the node's output."),
        "part_db": _db("Worst part", "Of a Concat: the lowest SQNR of what it joins."),
        "local": _db("Local", "What the output's own Q/DQ costs."),
        "weight": _db("Weight", "SQNR of the node's weight."),
        "tensor": text("Output tensor", width="medium"),
        "graph": st.column_config.LinkColumn(
            "Graph", width=52, display_text="show", help="This node on the graph, in a new tab."
        ),
    }


def parts(record: OutputError | ActivationError) -> pd.DataFrame:
    """What an output is joined from where a part is lost, else its channels; worst first."""
    if low_slices(record):
        rows = [
            {
                "sign": style.SIGNS[style.severity(part.sqnr_db)],
                "part": shorten_name(part.source, 20),
                "channels": f"{part.start}…{part.stop - 1}",
                "sqnr": _known(part.sqnr_db),
                "largest": part.absmax,
            }
            for part in sorted(record.slices, key=lambda part: part.sqnr_db)
        ]
        return pd.DataFrame(rows)
    numbered = sorted(enumerate(record.channel_sqnr_db), key=lambda pair: pair[1])
    return pd.DataFrame(
        [
            {
                "sign": style.SIGNS[style.severity(value)],
                "part": f"channel {channel}",
                "sqnr": _known(value),
            }
            for channel, value in numbered
        ]
    )


def part_columns() -> dict[str, Any]:
    """How the columns of `parts` are shown."""
    text = st.column_config.TextColumn
    return {
        "sign": text("", width=28, help="● below 10 dB · ▲ below 20 dB · ✓ fine"),
        "part": text("Part", width=148),
        "channels": text("Ch.", width=52, help="Channels along the axis of the Concat."),
        "sqnr": _db("SQNR", "Accumulated SQNR in dB of this part alone.", 64),
        "largest": st.column_config.NumberColumn(
            "Largest", format="%.4g", width=60, help="Largest absolute float value in this part."
        ),
    }


def deltas(before: Comparison, after: Comparison) -> pd.DataFrame:
    """What each tensor is judged by, before and after, largest change first; changed ones only."""
    old = {each.name: each for each in compared(before)}
    rows = []
    for each in compared(after):
        if each.name not in old:
            continue
        was, now = _known(judged_db(old[each.name])), _known(judged_db(each))
        if was is None or now is None or was == now or abs(now - was) < LEAST_CHANGE_DB:
            continue
        rows.append(
            {
                "name": each.name,
                "tensor": shorten_name(each.name, 48),
                "op": shorten_name(each.op_type, 24),
                "kind": kind_of(each),
                "before": was,
                "after": now,
                "change": now - was,
            }
        )
    frame = pd.DataFrame(
        rows, columns=["name", "tensor", "op", "kind", "before", "after", "change"]
    )
    order = frame["change"].abs().sort_values(ascending=False, kind="stable").index
    listed = frame.loc[order[:MAX_ROWS]].reset_index(drop=True)
    listed.attrs["total"] = len(frame)
    return listed


def delta_columns() -> dict[str, Any]:
    """How the columns of `deltas` are shown."""
    text = st.column_config.TextColumn
    return {
        "name": None,
        "tensor": text("Tensor", width="large"),
        "op": text("Op", width="small"),
        "kind": text("Kind", width="small"),
        "before": _db(
            "Before",
            "SQNR in the run of the same recipe without exclusions; of a part that was joined in, "
            "where that is far below the whole.",
        ),
        "after": _db("After", "The same in this run."),
        "change": _db("Change", "Higher is better. +6 dB is one more bit."),
    }


def runs(entries: Iterable[tuple[RunRecord, str, str, Note | None]]) -> pd.DataFrame:
    """The history: newest first, with format, output SQNR and note as given."""
    rows = [
        {
            "id": run.id,
            "run": run.number,
            "what": "the loaded file" if run.number == 0 else run.title,
            "format": label,
            "in float": len(run.exclusions),
            "output": output,
            "part": format_db(_number_of(run, "worst_part_sqnr_db")),
            "size": format_bytes(run.model.size_bytes),
            "made": run.created.replace("T", " ")[:16],
            "note": "" if note is None else note.text,
        }
        for run, label, output, note in entries
    ]
    columns = ["id", "run", "what", "format", "in float", "output", "part", "size", "made", "note"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.sort_values("run", ascending=False, kind="stable").reset_index(drop=True)


def _number_of(run: RunRecord, key: str) -> float | None:
    """The lowest of a figure over a run's outputs."""
    outputs = run.summary.get("outputs", ())
    values = [read_number(each[key]) for each in outputs if each.get(key) is not None]
    return min(values, default=None)


def run_columns() -> dict[str, Any]:
    """How the columns of `runs` are shown."""
    text = st.column_config.TextColumn
    number = st.column_config.NumberColumn
    return {
        "id": None,
        "run": number("Run", format="%d", width="small"),
        "what": text("What"),
        "format": text("Format", width="small"),
        "in float": number("Nodes in float", format="%d", width="small"),
        "output": text("Output SQNR", width="small", help="Pooled; of several outputs the lowest."),
        "part": text("Worst part", width="small"),
        "size": text("Size", width="small"),
        "made": text("Made (UTC)", width="small"),
        "note": text("Note"),
    }


def recipes(rows: Sequence[Mapping[str, Any]], current: str = "") -> pd.DataFrame:
    """The recipes that gave a model, in the order given.

    Args:
        rows: of a "quant-inspector/recipes" table.
        current: label of the recipe of the run on screen.
    """
    frame = pd.DataFrame(
        [
            {
                "sign": "▸" * (row["label"] == current)
                + style.SIGNS[style.severity(recipe_rank(row))],
                "label": row["label"],
                "deployed": _known(_read(row["deployed_sqnr_db"])),
                "unseen": _known(_read(row["unseen_sqnr_db"])),
                "simulated": _known(_read(row["sqnr_db"])),
                "joined": _known(_read(row["worst_part_sqnr_db"])),
                "top1": 100 * row["task"]["top1_quantized"] if row["task"] else None,
                "agreement": 100 * row["task"]["top1_agreement"] if row["task"] else None,
                "metric": _metric(row),
                "ms": 1000 * row["latency"]["median_seconds"] if row["latency"] else None,
                "spread": 1000 * row["latency"]["spread_seconds"] if row["latency"] else None,
                "mb": row["size_bytes"] / 1e6,
                "note": f"same file as {row['same_as']}"
                if row.get("same_as")
                else printable("; ".join(row["notes"]), 160),
            }
            for row in rows
            if row["state"] == "done"
        ],
        columns=RECIPE_COLUMNS,
    )
    optional = ("unseen", "joined", "top1", "agreement", "metric")
    return frame.drop(columns=[name for name in optional if frame[name].isna().all()])


def _metric(row: Mapping[str, Any]) -> float | None:
    """A recipe's task metric, deployed where it was run so."""
    for figure in row.get("metrics", ()):
        key = "simulated" if figure["deployed"] is None else "deployed"
        return _known(read_number(figure[key]))
    return None


def recipe_rank(row: Mapping[str, Any]) -> float | None:
    """What a recipe is judged by: its lowest output as deployed, or a joined part that it hides."""
    keys = ("deployed_sqnr_db", "worst_part_sqnr_db")
    known = [value for value in (_known(_read(row[key])) for key in keys) if value is not None]
    return min(known, default=None)


def _read(value: Any) -> float | None:
    return None if value is None else read_number(value)


def recipe_columns() -> dict[str, Any]:
    """How the columns of `recipes` are shown."""
    text, number = st.column_config.TextColumn, st.column_config.NumberColumn
    return {
        "sign": text("", width=36, help="▸ this run · ● below 10 dB · ▲ below 20 dB · ✓ fine"),
        "label": text(
            "Recipe",
            width=310,
            help="Calibration · scales of weights · ranges of activations · types of activations "
            "and weights (U unsigned, S signed) · 7 bit where the range of weights is reduced.",
        ),
        "deployed": _db("Deployed", "SQNR of the lowest output, all optimisations on.", 86),
        "unseen": _db("Unseen", "Simulated, on samples that did not calibrate.", 86),
        "simulated": _db("Simulated", "Optimisations off, all samples.", 86),
        "joined": _db(
            "Worst part", "Lowest SQNR of what a Concat joins into an output, simulated.", 86
        ),
        "top1": number("Top-1 %", format="%.1f", width=70, help="Share of samples right."),
        "agreement": number(
            "As float %", format="%.1f", width=80, help="Share on which both choose one class."
        ),
        "metric": number(
            "Task metric", format="%.4g", width=90, help="The pair's task metric, deployed."
        ),
        "ms": number(
            "ms", format="%.3g", width=62, help="Deployed, one feed, median of interleaved runs."
        ),
        "spread": number("± ms", format="%.2g", width=58, help="Interquartile range of the runs."),
        "mb": number("MB", format="%.3f", width=66, help="File and external data; 10⁶ bytes."),
        "note": text("Note"),
    }


def recipe_reasons(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The recipes without a model by reason; those that were tried come first."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["state"] in ("failed", "impossible"):
            found.setdefault((row["state"], row["reason"]), []).append(row["label"])
    what = {"failed": "gave no model", "impossible": "not possible"}
    return pd.DataFrame(
        [
            {
                "Count": len(labels),
                "": what[state],
                "Reason": printable(reason, 240),
                "Recipes": _listed(labels),
            }
            for (state, reason), labels in found.items()
        ]
    )


def reasons(items: Sequence[Unmatched | Skipped]) -> pd.DataFrame:
    """What has no figure, grouped by reason; the most frequent first."""
    return pd.DataFrame(
        [
            {
                "Count": len(names),
                "Kind": shorten_name(kind, 24),
                "Model": model or "both",
                "Reason": printable(reason, 120),
                "Names": _listed(names),
            }
            for (kind, model, reason), names in group_unmatched(items).items()
        ]
    ).head(MAX_ROWS)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(shorten_name(name, 60) for name in names[:MAX_NAMES])
    more = len(names) - MAX_NAMES
    return f"{shown}, … {more:,} more" if more > 0 else shown


def nonfinite(items: Sequence[NonFinite]) -> pd.DataFrame:
    """Tensors with NaN or infinity, where it begins first."""
    return pd.DataFrame(
        [
            {
                "": "● begins here" if each.origin else "passed on",
                "Model": each.model,
                "Node": shorten_name(each.node or each.tensor, 60),
                "Op": shorten_name(each.op_type, 24),
                "NaN": each.nan,
                "Infinite": each.infinite,
                "First sample": shorten_name(each.first_sample, 40),
                "Tensor": shorten_name(each.tensor, 60),
            }
            for each in sorted(items, key=lambda each: not each.origin)[:MAX_ROWS]
        ]
    )


def batch(effect: BatchEffect) -> pd.DataFrame:
    """Per output, samples alone against the same samples in one batch."""
    return pd.DataFrame(
        [
            {
                "Output": shorten_name(each.output, 60),
                "Quantized moves by": format_number(each.quantized_max_abs_difference),
                "Float moves by": format_number(each.float_max_abs_difference),
                "SQNR of the batch": format_db(each.quantized_sqnr_db),
                "Worst sample": shorten_name(each.worst_sample, 40),
            }
            for each in effect.outputs[:MAX_ROWS]
        ]
    )


def deployed(comparison: Comparison) -> pd.DataFrame:
    """Per output, what optimisations change."""
    return pd.DataFrame(
        [
            {
                "": "▲" if each.deployed_differs or each.deployed_flips else "✓",
                "Output": shorten_name(each.name, 60),
                "Simulated": format_db(each.sqnr_db),
                "Deployed": format_db(each.deployed_sqnr_db),
                "Apart by, steps": "–"
                if each.deployed_max_steps is None
                else format_number(each.deployed_max_steps),
                "Largest moves on": f"{each.deployed_flips} of {comparison.samples}",
                "Because of": shorten_name(each.deployed_cause or "–", 60),
            }
            for each in comparison.outputs[:MAX_ROWS]
        ]
    )


def device(items: Sequence[DeviceError]) -> pd.DataFrame:
    """Tensors of a device beside ours, the largest difference first."""
    ordered = sorted(items, key=lambda each: _badness(each.total_sqnr_db))
    return pd.DataFrame(
        [
            {
                "Tensor": shorten_name(each.name, 60),
                "Float → simulated": format_db(each.quantization_sqnr_db),
                "Simulated → deployed": format_db(each.kernel_sqnr_db),
                "→ device": format_db(each.device_sqnr_db),
                "In all": format_db(each.total_sqnr_db),
                "Most noise from": each.verdict,
                "Samples": each.samples,
                "In the dump": shorten_name(each.device_name, 40),
            }
            for each in ordered[:MAX_ROWS]
        ]
    )


def _badness(sqnr_db: float) -> float:
    return -math.inf if math.isnan(sqnr_db) else sqnr_db


def outputs(comparison: Comparison) -> pd.DataFrame:
    """One row per graph output, every figure as text with its unit."""
    return pd.DataFrame(
        [
            {
                "Output": shorten_name(each.name, 60),
                "Simulated": format_db(each.sqnr_db),
                "Deployed": format_db(each.deployed_sqnr_db),
                "Worst channel": format_db(each.worst_channel_sqnr_db),
                "Median channel": format_db(each.median_channel_sqnr_db),
                "Worst sample": f"{format_db(each.worst_sample_sqnr_db)} "
                f"({shorten_name(each.worst_sample, 40)})",
                "Median sample": format_db(each.median_sample_sqnr_db),
                "Cosine": f"{each.cosine_similarity:.5f}",
            }
            for each in comparison.outputs
        ]
    )


def provenance(view: View) -> pd.DataFrame:
    """Which files and feeds the figures are of."""
    comparison = view.comparison
    rows = [
        ("Float model", comparison.float_model),
        ("Quantized model", comparison.quantized_model),
    ]
    return pd.DataFrame(
        [
            {
                "": label,
                "File": shorten_name(file.path, 90),
                "Format": file.quant_format,
                "Size": format_bytes(file.size_bytes),
                "sha256": file.sha256,
            }
            for label, file in rows
        ]
        + [
            {
                "": "Feeds",
                "File": shorten_name(view.pair.inputs.title or view.pair.inputs.path, 90),
                "Format": feeds_text(comparison),
                "Size": "",
                "sha256": "",
            }
        ]
    )
