"""Records to text, JSON and CSV, and back from JSON.

Nothing is computed here but the choice of words: every figure comes out of a record as it is.
The formats are read by other programs, so they only grow: keys are added, `version` stays.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
import types
import typing
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from inspector.comparison import (
    FAR_BELOW_DB,
    LOOK_DB,
    ActivationError,
    Comparison,
    OutputError,
    Unmatched,
    WeightError,
    low_slices,
    made_with,
)
from inspector.errors import ReportError

COMPARISON_FORMAT = "quant-inspector/comparison"
COMPARISON_VERSION = 1

# Below 10 dB an output's noise is a third of its size.
PROBLEM_DB = 10.0
# A channel or slice with less than this much signal over its noise carries nothing: one that is
# all zero has 0.0 dB exactly.
NO_SIGNAL_DB = 1.0
_SPREAD = "the error is spread over many tensors; change the recipe before excluding nodes"
# A tensor whose noise doubles (3 dB) is a step; smaller changes are the usual slow decline.
STEP_DB = 3.0
# The deployed kernels round differently, but not by this much.
DEPLOYED_DROP_DB = 6.0
# Values of these share one unit and most of them are small tails by nature: a class that never
# occurs has 0 dB without anything being wrong.
PROBABILITIES = frozenset({"Softmax", "LogSoftmax", "Sigmoid", "HardSigmoid"})

Record = TypeVar("Record")

# ---------------------------------------------------------------------------------- numbers


def _significant(value: float) -> str:
    """Three digits without an exponent; all digits before the point where there are more."""
    size = abs(value)
    return f"{value:,.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"


def format_db(value: float | None) -> str:
    """``12.3 dB``; "exact" for infinity, "–" for None, "NaN" and "-∞ dB" for what they are."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "exact" if value > 0 else "-∞ dB"
    return f"{round(value, 1) + 0.0:.1f} dB"


def format_percent(fraction: float | None) -> str:
    """``99.1 %`` of a share 0..1; not quite none or all says so (``<0.1 %``, ``>99.9 %``)."""
    if fraction is None:
        return "–"
    if math.isnan(fraction):
        return "NaN"
    if 0 < fraction < 0.0005:
        return "<0.1 %"
    if 0.9995 <= fraction < 1:
        return ">99.9 %"
    return f"{fraction * 100:.1f} %"


def format_ms(seconds: float | None) -> str:
    """``4.32 ms`` of a time in seconds."""
    if seconds is None or math.isnan(seconds):
        return "–"
    milliseconds = seconds * 1000
    return "<0.01 ms" if 0 < milliseconds < 0.005 else f"{_significant(milliseconds)} ms"


def format_bytes(size: int | None) -> str:
    """``1.20 MB`` (1 MB is 1,000,000 bytes)."""
    if size is None:
        return "–"
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor * 0.9995:
            return f"{_significant(size / factor)} {unit}"
    return f"{size} bytes"


def format_count(count: int, total: int | None = None) -> str:
    """``3 of 41``, or ``1,234`` without a total."""
    return f"{count:,}" if total is None else f"{count:,} of {total:,}"


def format_number(value: float | None) -> str:
    """Four significant digits of a real in the tensor's own unit, e.g. a scale or a range."""
    if value is None:
        return "–"
    return str(value) if not math.isfinite(value) else f"{value + 0.0:.4g}"


def shorten_name(name: str, width: int = 40) -> str:
    """The name in at most `width` characters, its middle cut where it is longer.

    Paths are cut between their parts (``/backbone/…/conv2/Conv``): the end tells most.

    Raises:
        ValueError: a width below 3.
    """
    if width < 3:
        raise ValueError(f"a name does not fit in {width} characters")
    if len(name) <= width:
        return name
    parts = name.split("/")
    first = 2 if not parts[0] else 1
    head = "/".join(parts[:first])
    for keep in range(len(parts) - first - 1, 0, -1):
        short = f"{head}/…/{'/'.join(parts[-keep:])}"
        if len(short) <= width:
            return short
    left = (width - 1) // 3
    return f"{name[:left]}…{name[len(name) - (width - 1 - left) :]}"


# ------------------------------------------------------------------------------------- JSON


def strict(value: Any) -> Any:
    """The value as strict JSON knows it: non-finite numbers as strings, tuples as lists.

    ``"Infinity"``, ``"-Infinity"`` and ``"NaN"`` are the spellings of the proto3 JSON mapping.

    Raises:
        TypeError: something JSON has no form for.
    """
    if value is None or isinstance(value, (bool, str)):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [strict(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: strict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        return strict(value.tolist())
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def dump_json(value: Any) -> str:
    """Strict JSON text of a value (see `strict`), indented."""
    return json.dumps(strict(value), allow_nan=False, ensure_ascii=False, indent=1)


def read_number(value: Any) -> float:
    """The float of a JSON number or one of the three strings for non-finite ones.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, str) and value in ("Infinity", "-Infinity", "NaN"):
        return float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise ValueError(f"{value!r} is not a number")


_ISSUE_ORDER: dict[type, tuple[str, ...]] = {
    WeightError: (
        "name", "node", "quantized_name", "dtype", "axis", "scale", "zero_point", "sqnr_db",
        "worst_channel_sqnr_db", "median_channel_sqnr_db", "max_abs_error", "mse",
        "cosine_similarity", "matched_by",
    ),
    ActivationError: (
        "name", "node", "quantized_name", "dtype", "scale", "zero_point", "local_sqnr_db",
        "accumulated_sqnr_db", "worst_channel_sqnr_db", "median_channel_sqnr_db",
        "cosine_similarity", "mse", "max_abs_error", "saturated_fraction", "matched_by",
    ),
    OutputError: (
        "name", "sqnr_db", "worst_channel_sqnr_db", "median_channel_sqnr_db",
        "median_sample_sqnr_db", "worst_sample_sqnr_db", "deployed_sqnr_db", "cosine_similarity",
        "max_abs_error", "per_sample_sqnr_db",
    ),
}  # fmt: skip
_PER_CHANNEL = frozenset({"channel_sqnr_db", "channel_absmax", "channel_low", "channel_high"})


def _record_json(record: Any, *, detail: bool) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(record)]
    first = _ISSUE_ORDER.get(type(record), ())
    ordered = [*first, *(n for n in names if n not in first)]
    return {
        name: strict(getattr(record, name))
        for name in ordered
        if detail or name not in _PER_CHANNEL
    }


def comparison_json(comparison: Comparison, *, detail: bool = False) -> dict[str, Any]:
    """The comparison as strict JSON values, format ``quant-inspector/comparison`` version 1.

    Args:
        comparison: what to write.
        detail: the figures of every channel too; `read_comparison` needs them.
    """

    def records(items: Iterable[Any]) -> list[dict[str, Any]]:
        return [_record_json(item, detail=detail) for item in items]

    latency = comparison.latency
    return {
        "format": COMPARISON_FORMAT,
        "version": COMPARISON_VERSION,
        "made_with": made_with(),
        "headline": headline(comparison),
        "float_model": strict(comparison.float_model),
        "quantized_model": strict(comparison.quantized_model),
        "samples": comparison.samples,
        "sample_names": list(comparison.sample_names),
        "random_feeds": comparison.random_feeds,
        "seen": comparison.seen,
        "optimization": "disabled",
        "weights": records(comparison.weights),
        "activations": records(comparison.activations),
        "outputs": records(comparison.outputs),
        "task": strict(comparison.task),
        "latency_ms": None
        if latency is None
        else strict(
            {"float": latency.float_seconds * 1e3, "quantized": latency.quantized_seconds * 1e3}
        ),
        "latency": strict(latency),
        "unmatched": records(comparison.unmatched),
        "warnings": list(comparison.warnings),
    }


def _read(kind: Any, value: Any, where: str) -> Any:
    """The value of a type hint from its JSON form."""
    if dataclasses.is_dataclass(kind):
        return _read_record(typing.cast("type[Any]", kind), value, where)
    origin = typing.get_origin(kind)
    if origin is tuple:
        item = typing.get_args(kind)[0]
        if not isinstance(value, list):
            raise ValueError(f"{where} is {value!r}, expected a list")
        return tuple(_read(item, v, where) for v in value)
    if origin in (types.UnionType, typing.Union):
        choices = typing.get_args(kind)
        if value is None and type(None) in choices:
            return None
        for choice in choices:
            if choice is not type(None) and (typing.get_origin(choice) is tuple) == isinstance(
                value, list
            ):
                return _read(choice, value, where)
    elif kind is float:
        return read_number(value)
    elif type(value) is kind:
        return value
    raise ValueError(f"{where} is {value!r}, expected {getattr(kind, '__name__', kind)}")


def _read_record(kind: type[Record], value: Any, where: str) -> Record:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}, expected an object")
    hints = typing.get_type_hints(kind)
    missing = [name for name in hints if name not in value]
    if missing:
        raise ValueError(f"{where} has no {', '.join(map(repr, missing))}")
    return kind(**{n: _read(hint, value[n], f"{where}.{n}") for n, hint in hints.items()})


def read_comparison(data: Mapping[str, Any]) -> Comparison:
    """The comparison written by ``comparison_json(..., detail=True)``, equal in every figure.

    Raises:
        ReportError: another format, a newer version, or the form without channels.
    """
    hint = "Compare the two models again with this version of Quant Inspector."
    found = data.get("format"), data.get("version")
    if found != (COMPARISON_FORMAT, COMPARISON_VERSION):
        raise ReportError(
            f"not a comparison we can read: format {found[0]!r} version {found[1]!r}, "
            f"expected {COMPARISON_FORMAT!r} version {COMPARISON_VERSION}",
            hint=hint,
        )
    try:
        return _read_record(Comparison, data, "comparison")
    except ValueError as error:
        raise ReportError(f"the comparison is damaged or abridged: {error}", hint=hint) from error


# -------------------------------------------------------------------------------------- CSV

CSV_COLUMNS = (
    "kind", "name", "node", "op_type", "depth", "quantized_name", "dtype", "shape", "axis",
    "scale", "zero_point", "sqnr_db", "deployed_sqnr_db", "local_sqnr_db", "accumulated_sqnr_db",
    "worst_channel", "worst_channel_sqnr_db", "median_channel_sqnr_db", "worst_sample",
    "worst_sample_sqnr_db", "median_sample_sqnr_db", "cosine_similarity", "mse", "max_abs_error",
    "saturated_fraction", "observed_low", "observed_high", "representable_low",
    "representable_high", "matched_by", "note",
)  # fmt: skip


def _cell(value: Any) -> str:
    value = strict(value)
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def comparison_csv(comparison: Comparison) -> str:
    """One row per output, activation, weight, bias and unmatched tensor, under `CSV_COLUMNS`.

    Units are in the column names; ``mse`` and ``max_abs_error`` are in the tensor's own unit.
    Values per channel are separated by spaces, an empty cell means that there is none.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS)
    writer.writeheader()
    rows: list[tuple[str, Any]] = [
        *(("output", record) for record in comparison.outputs),
        *(("activation", record) for record in comparison.activations),
        *((record.kind, record) for record in comparison.weights),
    ]
    for kind, record in rows:
        row = {c: _cell(getattr(record, c)) for c in CSV_COLUMNS if hasattr(record, c)}
        writer.writerow({**row, "kind": kind})
    for item in comparison.unmatched:
        note = f"not compared ({item.model} model): {item.reason}"
        writer.writerow({"kind": item.kind, "name": item.name, "note": note})
    return text.getvalue()


# --------------------------------------------------------------------------------- headline


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Headline:
    """The finding that a comparison opens with.

    Attributes:
        sentence: what to know first.
        severity: "problem", "look" or "fine".
        output: the output it is about; None where none is compared.
        tensor: the float model's tensor to look at first; None where nothing stands out.
    """

    sentence: str
    severity: str
    output: str | None = None
    tensor: str | None = None


def _badness(sqnr_db: float) -> float:
    """For sorting: what is unknown comes first."""
    return -math.inf if math.isnan(sqnr_db) else sqnr_db


def _noise_share(sqnr_db: float) -> float:
    """Noise over signal, at most 1: what is beyond that is lost all the same."""
    return 1.0 if sqnr_db <= 0 else math.pow(10.0, -sqnr_db / 10.0)


def largest_added_error(comparison: Comparison) -> tuple[ActivationError | None, float]:
    """The activation where most noise enters, and that noise over its own signal, 0..1.

    Two kinds of evidence count: its own Q/DQ makes at least half of its accumulated noise, or its
    accumulated SQNR is a step below everything computed before it. Carriers of other tensors'
    noise show neither. (None, 0.0) where no tensor does.
    """
    best: ActivationError | None = None
    most = 0.0
    lowest = math.inf
    for record in sorted(comparison.activations, key=lambda a: a.depth):
        total, own = record.accumulated_sqnr_db, record.local_sqnr_db
        if math.isnan(total) or total == -math.inf:
            continue
        added = 0.0
        if own is not None and math.isfinite(own) and own <= total + STEP_DB:
            added = _noise_share(own)
        elif total <= lowest - STEP_DB:
            added = _noise_share(total) - _noise_share(lowest)
        if added > most:
            best, most = record, added
        lowest = min(lowest, total)
    return best, most


def _cause(comparison: Comparison, record: ActivationError) -> str:
    """Where the error enters and, where the figures say it, why."""
    place = shorten_name(record.node, 60) if record.node else f"input {record.name}"
    text = f"largest error added at {place} ({format_db(record.accumulated_sqnr_db)})"
    clipped = record.saturated_fraction or 0.0
    weights = [
        w
        for w in comparison.weights
        if w.node == record.node and w.sqnr_db <= record.accumulated_sqnr_db + 2 * STEP_DB
    ]
    if weights:
        worst = min(weights, key=lambda w: w.sqnr_db)
        return f"{text}, where weight {shorten_name(worst.name)} has {format_db(worst.sqnr_db)}"
    if clipped >= 0.01:
        return f"{text}, where {format_percent(clipped)} of the values are clipped"
    own = record.local_sqnr_db
    if own is not None and own <= record.accumulated_sqnr_db + STEP_DB:
        return f"{text}, whose own {record.dtype} steps leave {format_db(own)}"
    return text


def _dead(values: Sequence[float]) -> list[int]:
    """Channels with a signal in the float model and none left; all-zero ones (-inf) had none."""
    return [i for i, v in enumerate(values) if v < NO_SIGNAL_DB and v != -math.inf]


def _is(sqnr_db: float) -> str:
    if abs(sqnr_db) < 0.05:
        return f"is silent ({format_db(sqnr_db)})"
    if sqnr_db < NO_SIGNAL_DB:
        return f"is noise ({format_db(sqnr_db)})"
    return f"has only {format_db(sqnr_db)}"


def _carry(channels: Sequence[float]) -> str:
    dead = len(_dead(channels))
    verb = "carries" if dead == 1 else "carry"
    return f"{format_count(dead, len(channels))} channels {verb} no signal"


def _hidden_collapse(output: OutputError, op_type: str) -> tuple[str, str] | None:
    """What an output's pooled figure hides, and how grave it is; None for nothing."""
    channels = output.channel_sqnr_db
    slices = low_slices(output)
    if slices:
        worst = slices[0]
        more = f" (and {len(slices) - 1} more of {len(output.slices)})" if slices[1:] else ""
        dead = f": {_carry(channels)}" if _dead(channels) else ""
        text = f"but the {shorten_name(worst.source)} slice{more} {_is(worst.sqnr_db)}{dead}"
        return text, "problem"
    if output.sqnr_db < LOOK_DB:
        return None
    if op_type not in PROBABILITIES and len(channels) > 1:
        worst_db, at = min((v, i) for i, v in enumerate(channels) if v > -math.inf)
        if _dead(channels):
            return f"but {_carry(channels)} (channel {at}: {format_db(worst_db)})", "problem"
        if worst_db < min(PROBLEM_DB, output.sqnr_db - 2 * FAR_BELOW_DB):
            text = f"but channel {at} of {len(channels)} has only {format_db(worst_db)}"
            return text, "problem"
    sample = output.worst_sample_sqnr_db
    if -math.inf < sample < min(PROBLEM_DB, output.sqnr_db - FAR_BELOW_DB):
        name = shorten_name(output.worst_sample)
        return f"but sample {name} has only {format_db(sample)}", "look"
    return None


def _not_finite(comparison: Comparison, output: OutputError) -> Headline:
    own = next((a for a in comparison.activations if a.name == output.name), None)
    bad = sum(map(math.isnan, output.per_sample_sqnr_db))
    where = f" on {format_count(bad, comparison.samples)} samples" if bad else ""
    if own is not None and own.nonfinite_float:
        return Headline(
            sentence=f"Output {output.name}: the float model itself gives NaN or infinity{where}",
            severity="problem",
            output=output.name,
            tensor=output.name,
        )
    first = min(
        (a for a in comparison.activations if a.nonfinite_quantized and not a.nonfinite_float),
        key=lambda a: a.depth,
        default=None,
    )
    text = f"Output {output.name}: the quantized model gives NaN or infinity{where}"
    if first is not None:
        text += f", first at {shorten_name(first.node or first.name, 60)}"
    tensor = output.name if first is None else first.name
    return Headline(sentence=text, severity="problem", output=output.name, tensor=tensor)


def _judge(comparison: Comparison, output: OutputError) -> tuple[int, float, Headline]:
    """Rank (0 is gravest), SQNR and headline of one output."""
    name, sqnr, deployed = output.name, output.sqnr_db, output.deployed_sqnr_db
    lead = f"Output {name}"
    if math.isnan(sqnr):
        return 0, -math.inf, _not_finite(comparison, output)

    def found(sentence: str, severity: str, tensor: str | None = name) -> Headline:
        return Headline(sentence=sentence, severity=severity, output=name, tensor=tensor)

    if math.isnan(deployed) or deployed < min(LOOK_DB, sqnr - DEPLOYED_DROP_DB):
        text = f"{lead}: {format_db(sqnr)} simulated, but {format_db(deployed)} deployed"
        return 1, _badness(deployed), found(f"{text}, with the kernels that ship", "problem")
    op_type = next((a.op_type for a in comparison.activations if a.name == name), "")
    hidden = _hidden_collapse(output, op_type)
    if hidden is not None:
        rank = 2 if hidden[1] == "problem" else 4
        return rank, sqnr, found(f"{lead}: {format_db(sqnr)} pooled, {hidden[0]}", hidden[1])
    if sqnr < LOOK_DB:
        record, added = largest_added_error(comparison)
        if record is None or added < 0.5 * _noise_share(sqnr):
            cause, tensor = _SPREAD, name
        else:
            cause, tensor = _cause(comparison, record), record.name
        severity = "problem" if sqnr < PROBLEM_DB else "look"
        return 3, sqnr, found(f"{lead} {format_db(sqnr)}: {cause}", severity, tensor)
    task = comparison.task
    if task is not None and task.output == name:
        lost = task.top1_float - task.top1_quantized
        if lost >= 0.02 and lost * task.samples > 1.5:
            text = (
                f"{lead} {format_db(sqnr)}, but top-1 falls from "
                f"{format_percent(task.top1_float)} to {format_percent(task.top1_quantized)}"
            )
            return 4, sqnr, found(text, "look")
    return 5, sqnr, found(f"{lead} {format_db(sqnr)}: nothing stands out", "fine", None)


def find_headline(comparison: Comparison) -> Headline:
    """The gravest finding over all outputs: sentence, severity, and the tensor to look at."""
    outputs = comparison.outputs
    random = " (random feeds)" if comparison.random_feeds else ""
    if not outputs:
        record, _ = largest_added_error(comparison)
        cause = "" if record is None else f"; {_cause(comparison, record)}"
        reason = next((f": {u.reason}" for u in comparison.unmatched if u.kind == "output"), "")
        return Headline(
            sentence=f"No output of the two models could be compared{reason}{cause}{random}",
            severity="problem",
            tensor=None if record is None else record.name,
        )
    if all(o.sqnr_db == o.deployed_sqnr_db == math.inf for o in outputs):
        what = f"Output {outputs[0].name} is" if len(outputs) == 1 else (
            f"All {len(outputs)} outputs are"
        )  # fmt: skip
        sentence = f"{what} exact: both models give the same values{random}"
        return Headline(sentence=sentence, severity="fine", output=outputs[0].name)
    found = min((_judge(comparison, o) for o in outputs), key=lambda judged: judged[:2])[2]
    several = f" (worst of {len(outputs)} outputs)" if len(outputs) > 1 else ""
    return dataclasses.replace(found, sentence=f"{found.sentence}{several}{random}")


def headline(comparison: Comparison) -> str:
    """The sentence that states the finding (see `find_headline`)."""
    return find_headline(comparison).sentence


# ------------------------------------------------------------------------------------- text

SEEN_WORDS = {
    "seen": "seen in calibration",
    "unseen": "not seen in calibration",
    "mixed": "partly seen in calibration",
    "unknown": "unknown whether seen in calibration",
}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Aligned lines; the first `left` columns to the left, figures to the right."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return [
        "  "
        + "  ".join(
            f"{cell:<{w}}" if i < left else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _channels(record: OutputError | ActivationError | WeightError) -> tuple[str, str]:
    """Worst and median channel; "–" where there are no channels."""
    if record.worst_channel is None:
        return "–", "–"
    return (
        f"{format_db(record.worst_channel_sqnr_db)} (#{record.worst_channel})",
        format_db(record.median_channel_sqnr_db),
    )


def feeds_text(comparison: Comparison) -> str:
    """``8 samples, not seen in calibration``; random feeds say so."""
    noun = "sample" if comparison.samples == 1 else "samples"
    kind = "random feeds, no data" if comparison.random_feeds else SEEN_WORDS[comparison.seen]
    return f"{comparison.samples:,} {noun}, {kind}"


def _facts(comparison: Comparison) -> list[str]:
    lines = _table(
        ("", "file", "format", "size"),
        [
            (
                side,
                shorten_name(Path(file.path).name, 60),
                file.quant_format,
                format_bytes(file.size_bytes),
            )
            for side, file in (
                ("float", comparison.float_model),
                ("quantized", comparison.quantized_model),
            )
        ],
        left=3,
    )[1:]
    lines.append(f"  {feeds_text(comparison)}")
    task, latency = comparison.task, comparison.latency
    if task is not None:
        lines.append(
            f"  top-1 float {format_percent(task.top1_float)}, "
            f"quantized {format_percent(task.top1_quantized)}, "
            f"same choice {format_percent(task.top1_agreement)} of {task.samples:,} labels"
        )
    if latency is not None:
        lines.append(
            f"  quantized {format_ms(latency.quantized_seconds)}, "
            f"float {format_ms(latency.float_seconds)} on this machine "
            f"(spread {format_ms(latency.quantized_spread_seconds)}, "
            f"{format_ms(latency.float_spread_seconds)}; median of {latency.runs} runs)"
        )
    return lines


def _output_lines(comparison: Comparison, name_width: int) -> list[str]:
    rows = []
    for o in comparison.outputs:
        row = [shorten_name(o.name, name_width), format_db(o.sqnr_db), *_channels(o)]
        row += [format_db(o.worst_sample_sqnr_db), format_db(o.median_sample_sqnr_db)]
        rows.append([*row, format_db(o.deployed_sqnr_db)])
    header = ("output", "pooled", "worst channel", "median channel", "worst sample",
              "median sample", "deployed")  # fmt: skip
    lines = _table(header, rows, left=1)
    for o in comparison.outputs:
        if o.seen_sqnr_db is not None and o.unseen_sqnr_db is not None:
            lines.append(
                f"  {shorten_name(o.name, name_width)}: {format_db(o.seen_sqnr_db)} on seen, "
                f"{format_db(o.unseen_sqnr_db)} on unseen samples"
            )
    return lines


def _slice_lines(comparison: Comparison, name_width: int) -> list[str]:
    joined: dict[str, OutputError | ActivationError] = {a.name: a for a in comparison.activations}
    joined.update({o.name: o for o in comparison.outputs if o.slices})
    rows = []
    for name, record in joined.items():
        low = {s.source for s in low_slices(record)}
        for part in record.slices if low else ():
            rows.append(
                (
                    "▲" if part.source in low else " ",
                    shorten_name(name, name_width),
                    shorten_name(part.source, name_width),
                    f"{part.start}..{part.stop - 1}",
                    format_number(part.absmax),
                    format_db(part.sqnr_db),
                )
            )
    if not rows:
        return []
    header = (" ", "Concat", "slice", "channels", "largest float value", "SQNR")
    return ["", "Slices far below the whole", *_table(header, rows, left=3)]


def _activation_lines(comparison: Comparison, top: int, name_width: int) -> list[str]:
    worst = sorted(comparison.activations, key=lambda a: _badness(a.accumulated_sqnr_db))[:top]
    rows = [
        (
            shorten_name(a.name, name_width),
            a.op_type,
            a.dtype,
            format_db(a.accumulated_sqnr_db),
            format_db(a.local_sqnr_db),
            *_channels(a),
            format_percent(a.saturated_fraction),
        )
        for a in worst
    ]
    header = ("tensor", "op", "type", "accumulated", "local", "worst channel", "median channel",
              "clipped")  # fmt: skip
    title = f"Activations: worst {format_count(len(rows), len(comparison.activations))}"
    return ["", title, *_table(header, rows, left=3)] if rows else []


def _weight_lines(comparison: Comparison, top: int, name_width: int) -> list[str]:
    worst = sorted(comparison.weights, key=lambda w: _badness(w.sqnr_db))[:top]
    rows = [
        (
            shorten_name(w.name, name_width),
            w.op_type,
            w.dtype,
            format_db(w.sqnr_db),
            *_channels(w),
            format_number(w.max_abs_error),
        )
        for w in worst
    ]
    header = ("tensor", "op", "type", "SQNR", "worst channel", "median channel", "max abs error")
    title = f"Weights: worst {format_count(len(rows), len(comparison.weights))}"
    return ["", title, *_table(header, rows, left=3)] if rows else []


# What follows "into", and words with a digit, "_" or "/" in them.
_NAME_IN_REASON = re.compile(
    r"(?<=\binto )\S+|(?<!\S)(?=\S*[A-Za-z])(?=\S*[\d_/])[^\s(]\S*?(?=[,;]?(?:\s|$))"
)


def group_unmatched(items: Iterable[Unmatched]) -> dict[tuple[str, str, str], tuple[str, ...]]:
    """Names by (kind, model, reason), most frequent first.

    Reasons that differ only in the names they mention ("fused into 485") are one reason.
    """
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for item in items:
        reason = _NAME_IN_REASON.sub("…", item.reason)
        groups[item.kind, item.model, reason].append(item.name)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return {key: tuple(names) for key, names in ordered}


def _unmatched_lines(comparison: Comparison) -> list[str]:
    if not comparison.unmatched:
        return []
    lines = ["", f"Not compared: {format_count(len(comparison.unmatched))} tensors"]
    for (kind, model, reason), names in group_unmatched(comparison.unmatched).items():
        shown = ", ".join(shorten_name(n, 30) for n in names[:3]) + (", …" if names[3:] else "")
        lines.append(f"  {len(names):>4} × {kind} ({model} model): {reason}  [{shown}]")
    return lines


def comparison_text(
    comparison: Comparison, *, top: int = 10, name_width: int = 40, warnings: bool = True
) -> str:
    """The comparison for a terminal, the finding first.

    Args:
        comparison: what to show.
        top: rows of the tables of activations and weights, worst first.
        name_width: longer names lose their middle.
        warnings: show them too; the command line writes them to stderr instead.
    """
    lines = [headline(comparison), "", *_facts(comparison)]
    if comparison.outputs:
        lines += ["", *_output_lines(comparison, name_width)]
    lines += _slice_lines(comparison, name_width)
    if top:
        lines += _activation_lines(comparison, top, name_width)
        lines += _weight_lines(comparison, top, name_width)
    lines += _unmatched_lines(comparison)
    if warnings:
        lines += ["", *(f"warning: {text}" for text in comparison.warnings)]
    return "\n".join(lines).rstrip()


def _tensor_texts(infos: Iterable[Mapping[str, Any]]) -> list[str]:
    """``name: float32[1, 3, ?]`` of each tensor; "?" where a size is not fixed."""
    texts = []
    for info in infos:
        shape = info["shape"]
        sizes = "?" if shape is None else ", ".join("?" if d is None else str(d) for d in shape)
        texts.append(f"{shorten_name(info['name'])}: {info['dtype']}[{sizes}]")
    return texts


def show_text(description: Mapping[str, Any]) -> str:
    """What `workbench.describe_model` found in a file, for a terminal."""
    d = description
    ops = ", ".join(f"{op} {count:,}" for op, count in list(d["op_types"].items())[:8])
    rows: list[tuple[str, Sequence[str]]] = [
        ("file", [d["path"]]),
        ("sha256", [d["sha256"]]),
        ("size", [format_bytes(d["size_bytes"])]),
        ("opset", [str(d["opset"])]),
        ("producer", [d["producer"] or "–"]),
        ("format", [d["quant_format"]]),
        ("nodes", [f"{format_count(d['quantized_nodes'], d['nodes'])} quantized"]),
        ("weights", [f"{format_count(d['quantized_weights'], d['weights'])} quantized"]),
        ("top ops", [ops]),
        ("inputs", _tensor_texts(d["inputs"])),
        ("outputs", _tensor_texts(d["outputs"])),
    ]
    if d["recipe"] is not None:
        rows.append(("recipe", [_recipe_text(d["recipe"])]))
    return "\n".join(
        f"{label if at == 0 else '':<10}{line}".rstrip()
        for label, lines in rows
        for at, line in enumerate(lines)
    )


def _recipe_text(recipe: Mapping[str, Any]) -> str:
    """``format qdq, activation type int8, …``; options left to their defaults are not named."""

    def words(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return " ".join(value) if isinstance(value, (list, tuple)) else str(value)

    return ", ".join(
        f"{key.replace('_', ' ')} {words(value)}"
        for key, value in recipe.items()
        if value is not None and value not in ([], ())
    )
