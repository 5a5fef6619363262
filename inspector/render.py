"""Records to text, JSON and CSV, and back from JSON.

Nothing is computed here but the choice of words: every figure comes out of a record as it is.
The formats are read by other programs, so they only grow: keys are added, `version` stays.
Names come out of files that nobody vouches for: see `printable` and `comparison_csv`.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import math
import re
import types
import typing
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from inspector.comparison import (
    FAR_BELOW_DB,
    LOOK_DB,
    ActivationError,
    BatchEffect,
    BatchError,
    Comparison,
    NonFinite,
    OutputError,
    Pin,
    Skipped,
    TaskFigure,
    Unmatched,
    WeightError,
    first_nonfinite,
    low_slices,
    made_with,
)
from inspector.errors import ReportError

if TYPE_CHECKING:
    # They load ONNX, which the app's own process does without.
    from inspector.sensitivity import Measured, SensitivityTable

COMPARISON_FORMAT = "quant-inspector/comparison"
COMPARISON_VERSION = 1

# Below 10 dB an output's noise is a third of its size.
PROBLEM_DB = 10.0
# A channel or slice with less than this much signal over its noise carries nothing: one that is
# all zero has 0.0 dB exactly.
NO_SIGNAL_DB = 1.0
_FINE = ": nothing stands out"
_SPREAD = "the error is spread over many tensors; change the recipe before excluding nodes"
# A tensor whose noise doubles (3 dB) is a step; smaller changes are the usual slow decline.
STEP_DB = 3.0
# The deployed kernels round differently, but not by this much.
DEPLOYED_DROP_DB = 6.0
# Where fewer of the float tensors are compared, what was not looked at outweighs what was.
LOW_COVERAGE = 0.5
# Lists of reasons are cut here, and words of a message there: the JSON has all of them, whole.
MOST_GROUPS = 12
LONGEST_WORD = 240
# A sample's company may move an output by this share of its largest value.
COMPANY_FRACTION = 0.01
# Values of these share one unit and most of them are small tails by nature: a class that never
# occurs has 0 dB without anything being wrong.
PROBABILITIES = frozenset({"Softmax", "LogSoftmax", "Sigmoid", "HardSigmoid"})

Record = TypeVar("Record")

# ------------------------------------------------------------------------------------ names

# What a terminal obeys instead of showing it: C0 and C1 controls, marks and overrides of the
# writing direction, line separators. Lone surrogates cannot be encoded at all.
_UNSHOWN = "\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
_UNPRINTABLE = re.compile(f"[\x00-\x1f{_UNSHOWN}]")
_UNSHOWN_IN_JSON = re.compile(f"[{_UNSHOWN}]")
_SPOKEN = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


def printable(text: str, longest: int | None = None) -> str:
    """The text as one line that a terminal shows and does not obey.

    Control characters and those that turn the writing direction become escapes (``\\x1b``,
    ``\\u202e``); everything else stays. Twice is the same as once.

    Args:
        text: a name, or a sentence that holds names.
        longest: longer words lose their middle; None keeps them whole.
    """

    def escape(match: re.Match[str]) -> str:
        code = ord(match[0])
        return _SPOKEN.get(match[0]) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")

    text = _UNPRINTABLE.sub(escape, text)
    if longest is None or len(text) <= longest:
        return text
    return re.sub(rf"\S{{{longest + 1},}}", lambda word: shorten_name(word[0], longest), text)


def shorten_name(name: str, width: int = 40) -> str:
    """The name, printable, in at most `width` characters: its middle is cut where it is longer.

    Paths are cut between their parts (``/backbone/…/conv2/Conv``): the end tells most.

    Raises:
        ValueError: a width below 3.
    """
    if width < 3:
        raise ValueError(f"a name does not fit in {width} characters")
    name = printable(name)
    if len(name) <= width:
        return name
    parts = name.split("/")
    first = 2 if not parts[0] else 1
    head = "/".join(parts[:first])
    for keep in range(min(len(parts) - first - 1, width), 0, -1):
        short = f"{head}/…/{'/'.join(parts[-keep:])}"
        if len(short) <= width:
            return short
    left = (width - 1) // 3
    return f"{name[:left]}…{name[len(name) - (width - 1 - left) :]}"


def _listed(names: Sequence[str], shown: int = 3, width: int = 30) -> str:
    """The first names, and how many more there are."""
    words = [shorten_name(name, width) for name in names[:shown]]
    more = len(names) - shown
    return ", ".join([*words, f"… {more:,} more"] if more > 0 else words)


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


def format_figure(value: float | None, unit: str) -> str:
    """A task metric's figure with its unit, e.g. ``0.914``, ``31.2 dB``; "–" for None."""
    if unit == "dB" or value is None:
        return format_db(value)
    return f"{format_number(value)} {unit}".rstrip()


def metric_text(figure: TaskFigure) -> str:
    """One line: both models' figures of a task metric, and which direction is good."""
    which = "higher" if figure.higher_is_better else "lower"
    ends = (
        f"{side} {format_figure(value, figure.unit)}"
        for side, value in (
            ("float", figure.float_figure),
            ("simulated", figure.simulated),
            ("deployed", figure.deployed),
        )
    )
    return f"{printable(figure.metric)}: {', '.join(ends)} ({which} is better)"


def format_number(value: float | None) -> str:
    """Four significant digits of a real in the tensor's own unit, e.g. a scale or a range."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    return str(value) if math.isinf(value) else f"{value + 0.0:.4g}"


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
    """Strict JSON text of a value (see `strict`), indented.

    Names are whole; what a terminal would obey in them is written as an escape of JSON's own.
    """
    text = json.dumps(strict(value), allow_nan=False, ensure_ascii=False, indent=1)
    return _UNSHOWN_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


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
# Fields that the format calls otherwise.
_IN_JSON = {"float_figure": "float"}
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
        "counts": strict(comparison.counts),
        "skipped": records(comparison.skipped),
        "not_observed": records(comparison.not_observed),
        "nonfinite": records(comparison.nonfinite),
        "provider": comparison.provider,
        "mask": comparison.mask,
        "states": strict(comparison.states),
        "batch": strict(comparison.batch),
        "device": records(comparison.device),
        "pins": records(comparison.pins),
        "metrics": [strict(figure.to_json()) for figure in comparison.metrics],
    }


def _read(kind: Any, value: Any, where: str) -> Any:
    """The value of a type hint from its JSON form."""
    if dataclasses.is_dataclass(kind):
        return _read_record(typing.cast("type[Any]", kind), value, where)
    origin = typing.get_origin(kind)
    if origin is tuple:
        items = typing.get_args(kind)
        if not isinstance(value, list):
            raise ValueError(f"{where} is {value!r}, expected a list")
        if items[-1] is not Ellipsis and len(items) != len(value):
            raise ValueError(f"{where} is {value!r}, expected {len(items)} items")
        return tuple(_read(items[0], v, where) for v in value)
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


@functools.cache
def _fields(kind: type[Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """A record's fields with their types, and those that files of earlier versions lack.

    A field with a default was added later.
    """
    fields = dataclasses.fields(kind)
    added = frozenset(f.name for f in fields if f.default is not dataclasses.MISSING)
    return typing.get_type_hints(kind), added


def _read_record(kind: type[Record], value: Any, where: str) -> Record:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}, expected an object")
    hints, added = _fields(typing.cast(Any, kind))
    held = {name: _IN_JSON.get(name, name) for name in hints}
    missing = [held[n] for n in hints if held[n] not in value and n not in added]
    if missing:
        raise ValueError(f"{where} has no {', '.join(map(repr, missing))}")
    return kind(
        **{
            n: _read(hint, value[held[n]], f"{where}.{held[n]}")
            for n, hint in hints.items()
            if held[n] in value
        }
    )


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
    # Columns are added at the end only: what reads them by position goes on working.
    "scope", "fused_into", "model", "deployed_max_steps", "deployed_flips", "deployed_cause",
    "device_name", "samples", "quantization_sqnr_db", "kernel_sqnr_db", "device_sqnr_db",
    "total_sqnr_db", "verdict", "nan", "infinite", "first_sample", "origin",
    "isolated_sqnr_db", "added_sqnr_db",
)  # fmt: skip
# What a spreadsheet takes for a formula at the start of a cell.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else value
    value = strict(value)
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def comparison_csv(comparison: Comparison) -> str:
    """A row per output, activation, weight, bias and unmatched tensor, under `CSV_COLUMNS`.

    After them a row for everything skipped, not observed and not finite, and for each tensor of a
    device. Units are in the column names; ``mse`` and ``max_abs_error`` are in the tensor's own
    unit. Values per channel are separated by spaces, an empty cell means that there is none.
    Names are whole, but one that a spreadsheet would take for a formula gets a leading apostrophe.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS)
    writer.writeheader()

    def write(kind: str, record: Any, note: str | None = None) -> None:
        row = {c: _cell(getattr(record, c)) for c in CSV_COLUMNS if hasattr(record, c)}
        if note is not None:
            row["note"] = _cell(note)
        writer.writerow({**row, "kind": _cell(kind)})

    for output in comparison.outputs:
        write("output", output)
    for activation in comparison.activations:
        write("activation", activation)
    for weight in comparison.weights:
        write(weight.kind, weight)
    for item in comparison.unmatched:
        write(item.kind, item, f"not compared ({item.model} model): {item.reason}")
    for kind, items in (
        ("skipped", comparison.skipped), ("not_observed", comparison.not_observed)
    ):  # fmt: skip
        for skipped in items:
            write(kind, skipped, f"{skipped.kind}{_whose(skipped.model)}: {skipped.reason}")
    for bad in comparison.nonfinite:
        writer.writerow(
            {c: _cell(getattr(bad, c)) for c in CSV_COLUMNS if hasattr(bad, c)}
            | {"kind": "nonfinite", "name": _cell(bad.tensor)}
        )
    for device in comparison.device:
        write("device", device)
    return text.getvalue()


def _whose(model: str) -> str:
    """`` (float model)``; nothing where it is both."""
    return f" ({model} model)" if model else ""


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


def has_isolated(comparison: Comparison) -> bool:
    """Whether isolated and added errors were measured, of any activation."""
    return any(
        a.isolated_sqnr_db is not None or a.added_sqnr_db is not None
        for a in comparison.activations
    )


def largest_added_error(comparison: Comparison) -> tuple[ActivationError | None, float]:
    """The activation where most noise enters, and that noise over its own signal, 0..1.

    Where added errors were measured, that is the lowest `added_sqnr_db`. Else it is estimated from
    two kinds of evidence: its own Q/DQ makes at least half of its accumulated noise, or its
    accumulated SQNR is a step below everything computed before it. Carriers of other tensors'
    noise show neither. (None, 0.0) where no tensor does.
    """
    if any(a.added_sqnr_db is not None for a in comparison.activations):
        return _most_added(comparison)
    return _estimated_added(comparison)


def _most_added(comparison: Comparison) -> tuple[ActivationError | None, float]:
    """By what was measured; the first of the graph where several add as much.

    NaN, where the float node gives no finite value for what the quantized node read, counts as all
    of the signal, but only where the tensor arrives spoiled: masks overflow without harm.
    """
    best: ActivationError | None = None
    lowest = math.inf
    for record in sorted(comparison.activations, key=lambda a: a.depth):
        total, added = record.accumulated_sqnr_db, record.added_sqnr_db
        # Without a signal there is nothing to be relative to.
        if added is None or added == -math.inf or math.isnan(total) or total == -math.inf:
            continue
        if math.isnan(added) and not total < LOOK_DB:
            continue
        if _badness(added) < lowest:
            best, lowest = record, _badness(added)
    return best, 0.0 if best is None else _noise_share(lowest)


def _estimated_added(comparison: Comparison) -> tuple[ActivationError | None, float]:
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
    place = (
        shorten_name(record.node, 60) if record.node else f"input {shorten_name(record.name, 60)}"
    )
    # Of several outputs, the one that is named may not depend on this place.
    where = "in the whole model at" if len(comparison.outputs) > 1 else "at"
    text = f"largest error added {where} {place} ({format_db(record.accumulated_sqnr_db)})"
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
        return f"{text}, whose own {shorten_name(record.dtype, 16)} steps leave {format_db(own)}"
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


def _origin(comparison: Comparison, model: str) -> NonFinite | None:
    """Where NaN or infinity begins in a model; what both models have is no quantization's doing."""
    found = [n for n in comparison.nonfinite if n.model == model]
    if model == "quantized":
        own = {n.tensor for n in comparison.nonfinite if n.model == "float"}
        twins = {a.quantized_name for a in comparison.activations if a.name in own}
        found = [n for n in found if n.tensor not in own | twins] or found
    return first_nonfinite(found, comparison.sample_names)


def _not_finite(comparison: Comparison, output: OutputError) -> Headline:
    own = next((a for a in comparison.activations if a.name == output.name), None)
    bad = sum(map(math.isnan, output.per_sample_sqnr_db))
    where = f" on {format_count(bad, comparison.samples)} samples" if bad else ""
    model = "float" if own is not None and own.nonfinite_float else "quantized"
    itself = " itself" if model == "float" else ""
    name = shorten_name(output.name, 60)
    text = f"Output {name}: the {model} model{itself} gives NaN or infinity{where}"
    first = _origin(comparison, model)
    tensor = output.name
    if first is not None:
        place = shorten_name(first.node or first.tensor, 60)
        text += f", first at {place}"
        if first.first_sample:
            text += f" on sample {shorten_name(first.first_sample)}"
        twin = (
            a for a in comparison.activations
            if first.tensor in ((a.name,) if model == "float" else (a.quantized_name, a.name))
        )  # fmt: skip
        # The tensor before its Q/DQ has a name of its own: its node leads there as well.
        by_node = (a for a in comparison.activations if a.node and a.node == first.node)
        tensor = next((a.name for group in (twin, by_node) for a in group), tensor)
    elif model == "quantized":
        bads = (
            a for a in comparison.activations if a.nonfinite_quantized and not a.nonfinite_float
        )
        start = min(bads, key=lambda a: a.depth, default=None)
        if start is not None:
            text += f", first at {shorten_name(start.node or start.name, 60)}"
            tensor = start.name
    return Headline(sentence=text, severity="problem", output=output.name, tensor=tensor)


def _on_device(comparison: Comparison, output: OutputError) -> Headline | None:
    """What a device's own arithmetic breaks in an output; None where it adds little."""
    record = next((d for d in comparison.device if d.name == output.name), None)
    if record is None or record.verdict != "device":
        return None
    simulated, total = record.quantization_sqnr_db, record.total_sqnr_db
    # Above twice what is worth a look, a drop is of no concern.
    enough = max(LOOK_DB, min(simulated, 2 * LOOK_DB) - DEPLOYED_DROP_DB)
    if total >= enough:
        return None
    depth = {a.name: a.depth for a in comparison.activations}
    blamed = [d for d in comparison.device if d.verdict == "device" and d.name in depth]
    first = min(blamed, key=lambda d: depth[d.name], default=record)
    text = (
        f"Output {shorten_name(output.name, 60)}: {format_db(simulated)} simulated, but "
        f"{format_db(total)} on the device, whose own arithmetic adds the most noise"
    )
    if first.name != output.name:
        text += f", first at {shorten_name(first.name, 60)}"
    severity = "look" if total >= LOOK_DB else "problem"
    return Headline(sentence=text, severity=severity, output=output.name, tensor=first.name)


def _transformer(output: OutputError) -> str:
    """The graph transformer that makes deployed outputs differ; nothing where it is unknown."""
    if not output.deployed_cause:
        return ""
    return f": ONNX Runtime's {shorten_name(output.deployed_cause, 60)} makes the difference"


def _not_deployed(comparison: Comparison) -> Skipped | None:
    """The session whose refusal leaves no deployed figures; None where both were opened."""
    return next(
        (s for s in comparison.skipped if (s.name, s.kind) == ("deployed figures", "figure")), None
    )


def unknown_deployed(comparison: Comparison) -> str:
    """A clause that says why there are no deployed figures; "" where there are."""
    refused = _not_deployed(comparison)
    if refused is None:
        return ""
    model = f"the {refused.model} model cannot be opened with optimisations on"
    return f"deployed figures are unknown: {model}"


def _judge(comparison: Comparison, output: OutputError) -> tuple[int, float, Headline]:
    """Rank (0 is gravest), SQNR and headline of one output."""
    name, sqnr, deployed = output.name, output.sqnr_db, output.deployed_sqnr_db
    lead = f"Output {shorten_name(name, 60)}"
    if math.isnan(sqnr):
        return 0, -math.inf, _not_finite(comparison, output)

    def found(sentence: str, severity: str, tensor: str | None = name) -> Headline:
        return Headline(sentence=sentence, severity=severity, output=name, tensor=tensor)

    if _not_deployed(comparison):
        deployed = sqnr
    if math.isnan(deployed) or deployed < min(LOOK_DB, sqnr - DEPLOYED_DROP_DB):
        text = f"{lead}: {format_db(sqnr)} simulated, but {format_db(deployed)} deployed"
        cause = f"with the kernels that ship{_transformer(output)}"
        return 1, _badness(deployed), found(f"{text}, {cause}", "problem")
    device = _on_device(comparison, output)
    if device is not None and device.severity == "problem":
        return 1, _badness(sqnr), device
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
    if device is not None:
        return 4, sqnr, device
    return 5, sqnr, found(f"{lead} {format_db(sqnr)}{_FINE}", "fine", None)


def _coverage(comparison: Comparison) -> str:
    """The counts where most float tensors are not compared; "" where enough are."""
    counts = comparison.counts
    if counts is None or counts.unmatched <= LOW_COVERAGE * counts.float_tensors:
        return ""
    return (
        f"only {format_count(counts.matched, counts.float_tensors)} float tensors are matched "
        f"({counts.fused:,} fused, {counts.unmatched:,} unmatched)"
    )


def _peak(comparison: Comparison, output: str) -> float:
    """Largest absolute float value of an output; NaN where it was not observed."""
    record = next((a for a in comparison.activations if a.name == output), None)
    if record is None:
        return math.nan
    return max(abs(record.observed_low), abs(record.observed_high))


def _company(comparison: Comparison) -> tuple[str, BatchError] | None:
    """The output that its company in a batch changes most, in the quantized model only."""
    batch = comparison.batch
    if batch is None:
        return None
    shares = [
        (error.quantized_max_abs_difference / peak, error)
        for error in batch.outputs
        if (peak := _peak(comparison, error.output)) > 0
        and peak < math.inf
        # What the float model does as well is not the quantization's.
        and not error.quantized_max_abs_difference <= 2 * error.float_max_abs_difference
    ]
    if not shares:
        return None
    share, worst = max(shares, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
    if share <= COMPANY_FRACTION:
        return None
    text = (
        f"but it depends on the samples beside it: alone against {_batch_name(batch)} up to "
        f"{format_number(worst.quantized_max_abs_difference)} ({format_percent(share)} of its "
        f"peak; float {format_number(worst.float_max_abs_difference)})"
    )
    return text, worst


def _batch_name(batch: BatchEffect) -> str:
    return f"in a {'padded ' if batch.padded else ''}batch of {batch.samples:,}"


def find_headline(comparison: Comparison) -> Headline:
    """The gravest finding over all outputs: sentence, severity, and the tensor to look at."""
    outputs = comparison.outputs
    random = " (random feeds)" if comparison.random_feeds else ""
    if not outputs:
        record, _ = largest_added_error(comparison)
        cause = "" if record is None else f"; {_cause(comparison, record)}"
        reasons = (u.reason for u in comparison.unmatched if u.kind == "output")
        reason = next((f": {printable(reason, 60)}" for reason in reasons), "")
        return Headline(
            sentence=f"No output of the two models could be compared{reason}{cause}{random}",
            severity="problem",
            tensor=None if record is None else record.name,
        )
    if all(o.sqnr_db == o.deployed_sqnr_db == math.inf for o in outputs):
        what = f"Output {shorten_name(outputs[0].name, 60)} is" if len(outputs) == 1 else (
            f"All {len(outputs)} outputs are"
        )  # fmt: skip
        sentence = f"{what} exact: both models give the same values{random}"
        return Headline(sentence=sentence, severity="fine", output=outputs[0].name)
    found = min((_judge(comparison, o) for o in outputs), key=lambda judged: judged[:2])[2]
    if found.severity == "fine":
        coverage, company = _coverage(comparison), _company(comparison)
        if coverage:
            sentence = f"{found.sentence.removesuffix(_FINE)}, but {coverage}"
            found = dataclasses.replace(found, sentence=sentence, severity="look")
        elif company is not None:
            text, error = company
            sqnr = next((o.sqnr_db for o in outputs if o.name == error.output), math.nan)
            sentence = f"Output {shorten_name(error.output, 60)} {format_db(sqnr)}, {text}{random}"
            return Headline(
                sentence=sentence, severity="look", output=error.output, tensor=error.output
            )
    refused = _not_deployed(comparison)
    if refused is not None:
        sentence = f"{found.sentence.removesuffix(_FINE)}, but {unknown_deployed(comparison)}"
        # The float model is not what ships.
        grave = found.severity == "problem" or refused.model == "quantized"
        severity = "problem" if grave else "look"
        found = dataclasses.replace(
            found, sentence=sentence, severity=severity, tensor=found.tensor or found.output
        )
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


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
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


_RULES = {"name": "by name", "structure": "by structure", "content": "by content", "pin": "by hand"}


def accounting_text(comparison: Comparison) -> str:
    """What became of every float tensor of the float model's main graph; "" where it is unknown.

    ``354 float tensors: 266 matched (142 weights, 124 activations; 240 by name, 26 by structure),
    49 fused, 39 unmatched``. The three parts add up to the whole; where they do not, it says so.
    """
    counts = comparison.counts
    if counts is None:
        return ""
    # A float weight that two bodies read is one tensor.
    weights = {w.name: w for w in comparison.weights if not w.in_body}
    bodies = {w.name for w in comparison.weights if w.in_body}
    records: list[WeightError | ActivationError] = [*weights.values(), *comparison.activations]
    rules = Counter(record.matched_by for record in records)
    order = [*_RULES, *sorted(rules.keys() - _RULES.keys())]
    found = [f"{rules[r]:,} {_RULES.get(r, shorten_name(r))}" for r in order if rules[r]]
    sides = [
        f"{_count(len(weights), 'weight')}",
        f"{_count(len(comparison.activations), 'activation')}",
    ]
    parts = [", ".join(sides), ", ".join(found)] if records else []
    if bodies:
        parts.append(f"{_count(len(bodies), 'more weight')} inside bodies")
    how = f" ({'; '.join(parts)})" if parts else ""
    text = (
        f"{_count(counts.float_tensors, 'float tensor')}: {counts.matched:,} matched{how}, "
        f"{counts.fused:,} fused, {counts.unmatched:,} unmatched"
    )
    total = counts.matched + counts.fused + counts.unmatched
    return text if total == counts.float_tensors else f"{text}, which does not add up ({total:,})"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _group_lines(
    items: Sequence[Unmatched | Skipped], *, lead: str = "", most: int = MOST_GROUPS
) -> list[str]:
    """One line per reason with the first names; what is beyond `most` reasons is counted."""
    groups = list(group_unmatched(items).items())
    lines = [
        f"{lead}{len(names):,} × {shorten_name(kind)}{_whose(shorten_name(model))}: "
        f"{printable(reason, 60)}  [{_listed(names)}]"
        for (kind, model, reason), names in groups[:most]
    ]
    if groups[most:]:
        rest = sum(len(names) for _, names in groups[most:])
        lines.append(f"{lead}{rest:,} more, for {_count(len(groups) - most, 'other reason')}")
    return lines


def _nonfinite_lines(comparison: Comparison) -> list[str]:
    lines = []
    for model in ("float", "quantized"):
        found = [n for n in comparison.nonfinite if n.model == model]
        first = first_nonfinite(found, comparison.sample_names)
        if first is None:
            continue
        place = shorten_name(first.node or first.tensor, 60)
        sample = f" in sample {shorten_name(first.first_sample)}" if first.first_sample else ""
        others = sum(n.origin for n in found) - 1
        more = f"; it begins at {_count(others, 'other node')} too" if others > 0 else ""
        lines.append(
            f"NaN or infinity: {_count(len(found), 'tensor')} of the {model} model, first at "
            f"{place} ({shorten_name(first.op_type, 32)}){sample} with {first.nan:,} NaN and "
            f"{first.infinite:,} infinite{more}"
        )
    return lines


def _pin_line(pins: Sequence[Pin]) -> list[str]:
    words = [
        f"{shorten_name(p.float_name, 30)} refused"
        if p.quantized_name is None
        else f"{shorten_name(p.float_name, 30)} = {shorten_name(p.quantized_name, 30)}"
        for p in pins
    ]
    return [f"matched by hand: {_listed(words, 5, 64)}"] if words else []


def _deployed_lines(comparison: Comparison) -> list[str]:
    lines = []
    for output in comparison.outputs:
        if not (output.deployed_differs or output.deployed_flips):
            continue
        parts = []
        if output.deployed_max_steps is not None:
            parts.append(f"up to {format_number(output.deployed_max_steps)} steps apart")
        if output.deployed_flips:
            flips = format_count(output.deployed_flips, comparison.samples)
            parts.append(f"another largest element on {flips} samples")
        what = ", ".join(parts) or "more than 3 steps apart, or another largest element"
        cause = (
            f"; none of it without ONNX Runtime's {shorten_name(output.deployed_cause, 60)}"
            if output.deployed_cause
            else ""
        )
        lines.append(f"simulated against deployed: {shorten_name(output.name)}: {what}{cause}")
    return lines


def _batch_lines(batch: BatchEffect | None) -> list[str]:
    if batch is None:
        return []
    worst = sorted(batch.outputs, key=lambda b: -abs(b.quantized_max_abs_difference))
    parts = [
        f"up to {format_number(b.quantized_max_abs_difference)} in {shorten_name(b.output)} "
        f"(float {format_number(b.float_max_abs_difference)})"
        for b in worst[:3]
    ]
    if worst[3:]:
        parts.append(_count(len(worst) - 3, "more output"))
    found = ", ".join(parts) or "no output has the batch as its first axis"
    return [f"alone against {_batch_name(batch)}: {found}"]


def basis_lines(comparison: Comparison) -> list[str]:
    """What the figures of a comparison rest on, a sentence each, for a terminal and for pages.

    The first line is always there: samples, whether calibration saw them, how the models ran.
    The others say what was left out, was not finite or depends on something; none where nothing is.
    """
    c = comparison
    provider = shorten_name(c.provider, 60)
    lines = [f"{feeds_text(c)}; simulated: optimisations off; deployed: all on, {provider}"]
    if c.mask:
        lines.append(f"mask: positions where {shorten_name(c.mask, 60)} is 0 do not count")
    if c.states:
        pairs = [f"{shorten_name(o, 30)} → {shorten_name(i, 30)}" for o, i in c.states]
        lines.append(
            f"states: each model hands its own from sample to sample: {_listed(pairs, 5, 64)}"
        )
    lines += _pin_line(c.pins)
    lines += _nonfinite_lines(c)
    lines += _deployed_lines(c)
    lines += _batch_lines(c.batch)
    lines += _group_lines(c.skipped, lead="skipped: ", most=6)
    lines += _group_lines(c.not_observed, lead="not observed: ", most=6)
    return lines


def _device_lines(comparison: Comparison, top: int, name_width: int) -> list[str]:
    worst = sorted(comparison.device, key=lambda d: _badness(d.total_sqnr_db))[:top]
    rows = [
        (
            shorten_name(d.name, name_width),
            format_db(d.quantization_sqnr_db),
            format_db(d.kernel_sqnr_db),
            format_db(d.device_sqnr_db),
            format_db(d.total_sqnr_db),
            d.verdict,
        )
        for d in worst
    ]
    header = ("tensor", "float→simulated", "simulated→deployed", "→device", "total", "verdict")
    title = f"Device: worst {format_count(len(rows), len(comparison.device))}"
    return ["", title, *aligned(header, rows, left=1)] if rows else []


def _facts(comparison: Comparison) -> list[str]:
    lines = aligned(
        ("", "file", "format", "size"),
        [
            (
                side,
                shorten_name(Path(file.path).name, 60),
                shorten_name(file.quant_format),
                format_bytes(file.size_bytes),
            )
            for side, file in (
                ("float", comparison.float_model),
                ("quantized", comparison.quantized_model),
            )
        ],
        left=3,
    )[1:]
    accounting = accounting_text(comparison)
    if accounting:
        lines.append(f"  {accounting}")
    task, latency = comparison.task, comparison.latency
    if task is not None:
        lines.append(
            f"  top-1 float {format_percent(task.top1_float)}, "
            f"quantized {format_percent(task.top1_quantized)}, "
            f"same choice {format_percent(task.top1_agreement)} of {task.samples:,} labels"
        )
    lines += [f"  {metric_text(figure)}" for figure in comparison.metrics]
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
        deployed = None if _not_deployed(comparison) else o.deployed_sqnr_db
        rows.append([*row, format_db(deployed)])
    header = ("output", "pooled", "worst channel", "median channel", "worst sample",
              "median sample", "deployed")  # fmt: skip
    lines = aligned(header, rows, left=1)
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
    return ["", "Slices far below the whole", *aligned(header, rows, left=3)]


def _activation_lines(comparison: Comparison, top: int, name_width: int) -> list[str]:
    worst = sorted(comparison.activations, key=lambda a: _badness(a.accumulated_sqnr_db))[:top]
    measured = has_isolated(comparison)
    rows = [
        (
            shorten_name(a.name, name_width),
            shorten_name(a.op_type, 32),
            shorten_name(a.dtype, 16),
            format_db(a.accumulated_sqnr_db),
            format_db(a.local_sqnr_db),
            *((format_db(a.isolated_sqnr_db), format_db(a.added_sqnr_db)) if measured else ()),
            *_channels(a),
            format_percent(a.saturated_fraction),
        )
        for a in worst
    ]
    header = ("tensor", "op", "type", "accumulated", "local",
              *(("isolated", "added") if measured else ()), "worst channel", "median channel",
              "clipped")  # fmt: skip
    title = f"Activations: worst {format_count(len(rows), len(comparison.activations))}"
    return ["", title, *aligned(header, rows, left=3)] if rows else []


def _weight_lines(comparison: Comparison, top: int, name_width: int) -> list[str]:
    worst = sorted(comparison.weights, key=lambda w: _badness(w.sqnr_db))[:top]
    rows = [
        (
            shorten_name(w.name, name_width),
            shorten_name(w.op_type, 32),
            shorten_name(w.dtype, 16),
            format_db(w.sqnr_db),
            *_channels(w),
            format_number(w.max_abs_error),
        )
        for w in worst
    ]
    header = ("tensor", "op", "type", "SQNR", "worst channel", "median channel", "max abs error")
    title = f"Weights: worst {format_count(len(rows), len(comparison.weights))}"
    return ["", title, *aligned(header, rows, left=3)] if rows else []


# What follows "into", and words with a digit, "_" or "/" in them.
_NAME_IN_REASON = re.compile(
    r"(?<=\binto )\S+|(?<!\S)(?=\S*[A-Za-z])(?=\S*[\d_/])[^\s(]\S*?(?=[,;]?(?:\s|$))"
)


def group_unmatched(
    items: Iterable[Unmatched | Skipped],
) -> dict[tuple[str, str, str], tuple[str, ...]]:
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
    """Fused tensors apart from those that nothing speaks of."""
    lines = []
    fused = [u for u in comparison.unmatched if u.fused_into]
    if fused:
        lines += ["", f"Fused: {_count(len(fused), 'tensor')}"]
        lines += [f"  {line}" for line in _group_lines(fused)]
    lost = [u for u in comparison.unmatched if not u.fused_into]
    if lost:
        others = sum(u.model == "quantized" for u in lost)
        of = f" ({others:,} of them of the quantized model)" if others else ""
        lines += ["", f"Not compared: {_count(len(lost), 'tensor')}{of}"]
        lines += [f"  {line}" for line in _group_lines(lost)]
    return lines


def comparison_text(
    comparison: Comparison, *, top: int = 10, name_width: int = 40, warnings: bool = True
) -> str:
    """The comparison for a terminal, the finding first.

    Args:
        comparison: what to show.
        top: rows of the tables of activations, weights and a device's tensors, worst first.
        name_width: longer names lose their middle.
        warnings: show them too; the command line writes them to stderr instead.
    """
    lines = [headline(comparison), "", *_facts(comparison)]
    if comparison.outputs:
        lines += ["", *_output_lines(comparison, name_width)]
    lines += _slice_lines(comparison, name_width)
    lines += ["", "What these figures rest on", *(f"  {x}" for x in basis_lines(comparison))]
    if top:
        lines += _device_lines(comparison, top, name_width)
        lines += _activation_lines(comparison, top, name_width)
        lines += _weight_lines(comparison, top, name_width)
    lines += _unmatched_lines(comparison)
    if warnings:
        lines += [
            "",
            *(f"warning: {printable(text, LONGEST_WORD)}" for text in comparison.warnings),
        ]
    return "\n".join(map(printable, lines)).rstrip()


def _tensor_texts(infos: Iterable[Mapping[str, Any]]) -> list[str]:
    """``name: float32[1, 3, ?]`` of each tensor; "?" where a size is not fixed."""
    texts = []
    for info in infos:
        shape = info["shape"]
        sizes = "?" if shape is None else ", ".join(
            "?" if d is None else shorten_name(str(d)) for d in shape
        )  # fmt: skip
        texts.append(f"{shorten_name(info['name'])}: {info['dtype']}[{sizes}]")
    return texts


def show_text(description: Mapping[str, Any]) -> str:
    """What `workbench.describe_model` found in a file, for a terminal."""
    d = description
    ops = ", ".join(
        f"{shorten_name(op)} {count:,}" for op, count in list(d["op_types"].items())[:8]
    )
    rows: list[tuple[str, Sequence[str]]] = [
        ("file", [d["path"]]),
        ("sha256", [d["sha256"]]),
        ("size", [format_bytes(d["size_bytes"])]),
        ("opset", [str(d["opset"])]),
        ("producer", [shorten_name(d["producer"] or "–", 80)]),
        ("format", [d["quant_format"]]),
        ("nodes", [f"{format_count(d['quantized_nodes'], d['nodes'])} quantized"]),
        ("weights", [f"{format_count(d['quantized_weights'], d['weights'])} quantized"]),
        ("top ops", [ops]),
        ("inputs", _tensor_texts(d["inputs"])),
        ("outputs", _tensor_texts(d["outputs"])),
    ]
    if d["recipe"] is not None:
        rows.append(("recipe", [_recipe_text(d["recipe"])]))
    bodies = d.get("bodies") or ()
    if bodies:
        rows.append(("bodies", [*map(_body_text, bodies[:8]), *_more(len(bodies) - 8)]))
    skipped = [Skipped(**{k: s[k] for k in _SKIPPED_KEYS}) for s in d.get("skipped") or ()]
    if skipped:
        rows.append(("skipped", _group_lines(skipped)))
    return "\n".join(
        f"{label if at == 0 else '':<10}{printable(line, LONGEST_WORD)}".rstrip()
        for label, lines in rows
        for at, line in enumerate(lines)
    )


_SKIPPED_KEYS = ("name", "kind", "model", "reason")


def _more(count: int) -> list[str]:
    return [f"… {count:,} more"] if count > 0 else []


def _body_text(body: Mapping[str, Any]) -> str:
    """``/decoder/If_1/then_branch: 41 nodes``, and how many of them are quantized."""
    return f"{shorten_name(body['path'], 80)}: {_count(body['nodes'], 'node')}"


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


# ---------------------------------------------------------------------------------- recipes


def _recipe_figure(row: Mapping[str, Any], key: str) -> str:
    return format_db(None if row.get(key) is None else read_number(row[key]))


def _metric_cell(figure: Mapping[str, Any] | None) -> str:
    """A task metric of a recipe, deployed where it was run so."""
    if figure is None:
        return "–"
    value = figure["simulated"] if figure["deployed"] is None else figure["deployed"]
    return format_figure(read_number(value), figure["unit"])


def recipe_finding(table: Mapping[str, Any]) -> str:
    """One sentence on a table of recipes: the best one, and what it costs beside the float model.

    Args:
        table: what `recipe_table.recipes_json` made, strict or not.
    """
    done = [r for r in table["rows"] if r["state"] == "done"]
    tried = sum(r["state"] in ("done", "failed") for r in table["rows"])
    if not done:
        return f"None of {_count(tried, 'recipe')} gave a model" if tried else "No recipe was tried"
    best = done[0]
    figures = _recipe_figure(best, "deployed_sqnr_db")
    part = best.get("worst_part_sqnr_db")
    if part is not None and read_number(part) < LOOK_DB:
        figures += f", but its worst part {format_db(read_number(part))}"
    return f"Best of {_count(tried, 'recipe')}: {best['label']}, {figures}"


def recipes_text(table: Mapping[str, Any]) -> str:
    """A table of recipes for a terminal: the best first, then what gave no model, and why.

    Args:
        table: what `recipe_table.recipes_json` made, strict or not.
    """
    rows = table["rows"]
    done = [r for r in rows if r["state"] == "done"]
    labelled = any(r["task"] for r in done)
    unseen = any(r["unseen_sqnr_db"] is not None for r in done)
    used = table.get("seen_samples", 0)
    kind = f"{used} of them seen in calibration" if used else "unseen: not used in calibration"
    if used == table["samples"]:
        kind = "all seen in calibration"
    if table["random_feeds"]:
        kind = "random feeds, no data"
    lines = [recipe_finding(table), "", f"  {_count(table['samples'], 'sample')}, {kind}"]
    lines.append("  SQNR: of the lowest output, pooled over samples; higher is better")
    joined = any(r.get("worst_part_sqnr_db") is not None for r in done)
    header = ["recipe", "deployed", *(["unseen"] if unseen else []), "simulated"]
    header += ["worst part"] if joined else []
    header += ["top-1", "as float"] if labelled else []
    metrics = list(dict.fromkeys(f["metric"] for r in done for f in r.get("metrics", ())))
    header += [shorten_name(metric, 28) for metric in metrics]
    header += ["time", "spread", "size", ""]
    body, same = [], 0
    for row in done:
        latency, task = row["latency"] or {}, row["task"] or {}
        cells = [row["label"], _recipe_figure(row, "deployed_sqnr_db")]
        cells += [_recipe_figure(row, "unseen_sqnr_db")] if unseen else []
        cells.append(_recipe_figure(row, "sqnr_db"))
        cells += [_recipe_figure(row, "worst_part_sqnr_db")] if joined else []
        if labelled:
            cells += [format_percent(task.get(k)) for k in ("top1_quantized", "top1_agreement")]
        figures = {f["metric"]: f for f in row.get("metrics", ())}
        cells += [_metric_cell(figures.get(metric)) for metric in metrics]
        cells += [format_ms(latency.get(k)) for k in ("median_seconds", "spread_seconds")]
        cells += [format_bytes(row["size_bytes"]), "=" if row.get("same_as") else ""]
        same += bool(row.get("same_as"))
        body.append(cells)
    if body:
        lines += ["", *aligned(header, body, 1)]
    if same:
        lines.append("  = the file is the same, byte for byte, as that of a recipe above")
    for state, title in (("failed", "Gave no model"), ("impossible", "Not possible")):
        reasons: defaultdict[str, list[str]] = defaultdict(list)
        for row in rows:
            if row["state"] == state:
                reasons[row["reason"]].append(row["label"])
        if reasons:
            lines += ["", title]
        for reason, labels in reasons.items():
            lines.append(f"  {printable(reason, LONGEST_WORD)}")
            lines += [f"    {label}" for label in labels[:3]]
            lines += [f"    … {len(labels) - 3:,} more"] if len(labels) > 3 else []
    waiting = sum(r["state"] == "waiting" for r in rows)
    if waiting:
        lines += ["", f"{_count(waiting, 'recipe')} not tried"]
    if table["command"]:
        lines += ["", "The best one again:", f"  {table['command']}"]
    return "\n".join(printable(line, None) for line in lines)


def sensitivity_lines(table: SensitivityTable, top: int) -> list[str]:
    """The most sensitive rows as a table, each figure with its interval."""

    def shown(found: Measured | None) -> str:
        if found is None:
            return "–"
        text = format_figure(found.figure, table.unit)
        if found.low is None or math.isnan(found.low) or found.low == found.high:
            return text
        ends = (format_figure(v, "") for v in (found.low, found.high))
        return f"{text} [{' … '.join(ends)}]"

    whole = ", ".join(f"{part} {shown(found)}" for part, found in table.whole.items())
    better = "higher" if table.higher_is_better else "lower"
    lines = [
        f"{table.metric} ({better} is better), {table.samples} samples, "
        f"{table.evaluations} lists run in {format_number(table.seconds)} s",
        f"everything quantized: {whole or '–'}",
    ]
    parts = list(dict.fromkeys(part for row in table.rows for part in row.only))
    rows = []
    for row in table.rows[:top]:
        gain = "–" if row.gain is None else f"{row.gain:+.3g}"
        cells = [shown(row.only.get(part)) for part in parts]
        rows.append([shorten_name(row.name, 60), *cells, shown(row.without), gain])
    heads = [table.by, *(f"only ({p})" if p != "both" else "only this" for p in parts)]
    rows.insert(0, [*heads, "all without this", "gain"])
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if len(table.rows) > top:
        lines.append(f"and {len(table.rows) - top} more")
    reasons = {f"{row.name}: {row.reason}" for row in table.rows if row.reason}
    return [*lines, *sorted(reasons)]
