"""Record -> Plotly figure, one function per figure; the only module that imports Plotly.

No error is computed here: a figure takes what the records say, and its title states what is to be
seen in it (`title` replaces that sentence, `dark` is
for a dark background). Numbers that have no place on an axis keep
their meaning: an infinite SQNR lies on a rail labelled "exact", a not finite one on a rail below,
and values far outside the usual decibels on rails of their own, so that one of them does not
flatten the rest. Where a point is drawn elsewhere than its number, the number itself travels in the
trace's `meta`; `figure_csv` writes that one. `customdata` of a mark is the name it selects.

Colours mean the same everywhere: float is slate, quantized is amber, excluded is violet, and the
error scale runs from dark blue (worst) to yellow (best) in lightness as well as in hue, so that it
reads without colour vision and on both backgrounds. It shares no hue with the identities' amber
at its bad end, where it matters.

Show the figures with `theme=None` in Streamlit, else its own template replaces this one.
"""

from __future__ import annotations

import csv
import html
import io
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from inspector.comparison import (
    ActivationError,
    Comparison,
    OutputError,
    SliceError,
    WeightError,
    judged_db,
    low_slices,
)
from inspector.error_scale import ERROR_COLORS as ERROR_COLORS
from inspector.error_scale import ERROR_STEPS as ERROR_STEPS
from inspector.error_scale import NO_FIGURE_COLOR as NO_FIGURE_COLOR
from inspector.error_scale import error_color as error_color
from inspector.lab import SchemeRow, Trial
from inspector.pareto import front_of, knee_of

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
DEPTH_HEIGHT = 340
MAX_CHANNELS = 64
WORST_CHANNELS = 32
MAX_SLICES = 24
MAX_LEVELS = 512
MAX_POINTS = 2000

_NO_TENSOR = "See the unmatched tensors for the reasons."
_CLEAR = "rgba(0,0,0,0)"
_HOVER = "%{hovertext}<extra></extra>"
_DECORATION = "decoration"  # meta of a trace that only repeats or explains points
_LABEL_SIZE = 11
_HOVER_WIDTH = 160
_LABEL_LINE_PX = 15.0
_TICK_PX = 12.0
_MOST_FALLS = 4
_MOST_OUTPUT_LABELS = 9
_LOWEST_DB, _HIGHEST_DB = -20.0, 80.0
# A fall is a finding where it is at least half a bit and ends where one looks closer.
_FALL_DB = 3.0
_FALL_BELOW_DB = 30.0
_PLAIN_DB = 45.0
_FINE_DB = 20.0

_Array = NDArray[np.float64]


class _Palette(NamedTuple):
    """The colours of the pictures on a light and on a dark background."""

    float_model: str
    quantized: str
    ink: str
    muted: str
    grid: str
    ground: str
    hover: str
    densest: str
    excluded: str
    accent: str


_COLORS = (
    ("#475569", "#94a3b8"),
    ("#d97706", "#f59e0b"),
    ("#0f172a", "#e2e8f0"),
    ("#64748b", "#94a3b8"),
    ("rgba(100,116,139,0.18)", "rgba(148,163,184,0.16)"),
    ("rgba(255,255,255,0.82)", "rgba(15,23,42,0.78)"),
    ("#ffffff", "#1e293b"),
    ("#7c2d12", "#fef3c7"),
    ("#7c3aed", "#7c3aed"),
    ("#2563eb", "#3b82f6"),
)


@cache
def _palette(dark: bool) -> _Palette:
    return _Palette(*(pair[dark] for pair in _COLORS))


def _fade(color: str, opacity: float) -> str:
    """A hex colour as ``rgba(...)``."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"


# --- words -----------------------------------------------------------------------------------


def short_name(name: str, width: int = 28) -> str:
    """The name, at most `width` characters: its middle becomes "…", whole path parts first.

    ``/backbone/stage4/block2/conv2/Conv`` becomes ``/backbone/…/conv2/Conv``.
    """
    if len(name) <= width:
        return name
    parts = name.split("/")
    head = "/".join(parts[:2]) if name.startswith("/") else parts[0]
    tail = ""
    for part in reversed(parts):
        longer = f"/{part}{tail}"
        if len(head) + 2 + len(longer) > width:
            break
        tail = longer
    if tail:
        return f"{head}/…{tail}"
    keep = max(width - 1, 2)
    return f"{name[: keep // 2]}…{name[len(name) - (keep - keep // 2) :]}"


def _escape(text: str) -> str:
    """Text that Plotly shows as it is: its labels are a subset of HTML.

    Control characters and those that turn the writing direction are spelled out.
    """
    if not text.isprintable():
        text = "".join(c if c.isprintable() else _spelled(c) for c in text)
    return html.escape(text, quote=False)


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _told(name: str) -> str:
    """A name for a hover text: whole, unless it would cover the picture."""
    return _name(name, _HOVER_WIDTH)


def _name(name: str, width: int = 26) -> str:
    return _escape(short_name(name, width))


def _distinct(names: Sequence[str], width: int) -> list[str]:
    """The names, escaped and shortened to `width`, or to as much more as keeps them apart."""
    for wide in range(width, 2 * width, 4):
        shown = [short_name(name, wide) for name in names]
        if len(set(shown)) == len(set(names)):
            break
    return [_escape(name) for name in shown]


def _db(value: float | None) -> str:
    if value is None:
        return "–"
    if math.isnan(value):
        return "not finite"
    if math.isinf(value):
        return "exact" if value > 0 else "-∞ dB"
    return f"{value:.1f} dB"


def _real(value: float) -> str:
    return f"{value:.4g}"


def _count(value: float) -> str:
    """A round count: 1, 10, 1k, 100k, 1M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _percent(fraction: float) -> str:
    """A share as ``"12.3 %"``; what is not quite none or all is not rounded to it."""
    if 0 < fraction < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= fraction < 1:
        return "> 99.9 %"
    return f"{100 * fraction:.1f} %" if 0 < fraction < 1 else f"{100 * (fraction > 0)} %"


def _sort_key(db: float) -> float:
    """NaN counts as lowest, as in `metrics.worst_and_median`."""
    return -math.inf if math.isnan(db) else db


def _node(record: ActivationError) -> str:
    return record.node or record.name


# --- the frame of every figure ---------------------------------------------------------------


@cache
def template(dark: bool = False) -> go.layout.Template:
    """The one Plotly template: transparent ground, system font, quiet axes.

    Numerals line up where the page sets ``font-variant-numeric: tabular-nums``: Plotly has no such
    setting and its SVG text inherits the page's.
    """
    colors = _palette(dark)
    font = {"family": FONT, "size": 12, "color": colors.ink}
    small = {"size": _LABEL_SIZE, "color": colors.muted}
    axis_title = {"font": {"size": 12, "color": colors.muted}, "standoff": 8}
    quiet = {"showline": False, "zeroline": False, "ticks": "", "automargin": False}
    axis = {"gridcolor": colors.grid, "tickfont": small, "title": axis_title, **quiet}
    title_font = {"size": 14, "weight": 600, "color": colors.ink}
    corner = {"x": 0, "xref": "container", "y": 1, "yref": "container", "yanchor": "top"}
    hover = {"bgcolor": colors.hover, "bordercolor": colors.muted, "font": font, "namelength": -1}
    legend = {"x": 0, "y": 1, "yanchor": "bottom", "orientation": "h", "bgcolor": _CLEAR}
    return go.layout.Template(
        layout={
            "font": font,
            "paper_bgcolor": _CLEAR,
            "plot_bgcolor": _CLEAR,
            "colorway": [colors.float_model, colors.quantized, colors.excluded],
            "title": {"font": title_font, "xanchor": "left", **corner},
            "hoverlabel": {"align": "left", **hover},
            "legend": {"font": small, "itemsizing": "constant", **legend},
            "modebar": {"bgcolor": _CLEAR, "color": colors.muted, "activecolor": colors.ink},
            "xaxis": axis,
            "yaxis": axis,
            "hovermode": "closest",
        }
    )


def _figure(
    title: str | None, sentence: str, dark: bool, height: int, subtitle: str = "", **layout: Any
) -> go.Figure:
    """An empty figure in the one frame.

    `title` is shown as it is; `sentence`, in its absence, and `subtitle` are already escaped.
    """
    text, pad = _escape(title) if title else sentence, 8
    if subtitle:
        # Plotly's own subtitle stands a whole line below the title, and a second line of the
        # title moves the first one up.
        style = f"font-size:12px;font-weight:400;color:{_palette(dark).muted}"
        text, pad = f'{text}<br><span style="{style}">{subtitle}</span>', 18
    layout["margin"] = {"l": 60, "r": 20, "t": 64, "b": 46} | layout.get("margin", {})
    layout["title"] = {"text": text, "pad": {"t": pad, "l": 8}}
    # Plotly takes longer to check a layout than a page takes for the rest of the figure. The tests
    # have it checked.
    layout |= {"template": template(dark), "height": height}
    return go.Figure(layout=layout, _validate=False)


def _nothing(title: str | None, sentence: str, note: str, dark: bool, height: int) -> go.Figure:
    """What is shown where there is nothing to draw: a sentence, and why, in the same frame."""
    hidden = {"visible": False}
    figure = _figure(title, sentence, dark, height, xaxis=hidden, yaxis=hidden)
    _label(figure, dark, note, 0.5, 0.5, font_size=13, font_color=_palette(dark).muted)
    return figure


def _plot_height(figure: go.Figure) -> float:
    margin = figure.layout.margin
    return float(figure.layout.height - margin.t - margin.b)


def _label(figure: go.Figure, dark: bool, text: str, x: float, y: float, **where: Any) -> None:
    """A small text on a veil of the background, so that it reads over data.

    x and y are shares of the plot where `where` does not name an axis.
    """
    colors = _palette(dark)
    place = {"xref": "paper", "yref": "paper", "showarrow": False, "borderpad": 1}
    style = {"font_size": _LABEL_SIZE, "font_color": colors.ink, "bgcolor": colors.ground}
    figure.add_annotation(text=text, x=x, y=y, **(place | style | where))


def _pointer(figure: go.Figure, dark: bool, text: str, x: float, y: float, **where: Any) -> None:
    """A small text with a thin line to the data point (x, y) it names; ax, ay in pixels."""
    place = {"xref": "x", "yref": "y", "yanchor": "middle", "standoff": 5}
    arrow = {"showarrow": True, "arrowhead": 0, "arrowwidth": 1, "arrowcolor": _palette(dark).muted}
    _label(figure, dark, text, x, y, **(place | arrow | where))


def _level(figure: go.Figure, y: float, color: str, dash: str = "solid", yref: str = "y") -> None:
    """A line across the whole width."""
    line = {"color": color, "width": 1.5 if dash == "solid" else 1.25, "dash": dash}
    figure.add_shape(type="line", xref="paper", x0=0, x1=1, yref=yref, y0=y, y1=y, line=line)


def _picked(
    names: Iterable[Any], hover: Iterable[str], true: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    """What every clickable trace carries: the names to select, the hover texts, the numbers."""
    return {
        "customdata": list(names),
        "hovertext": list(hover),
        "hovertemplate": _HOVER,
        "meta": dict(true),
        # Clicking selects a point; Plotly would then fade all others.
        "unselected": {"marker": {"opacity": 1}},
    }


def _add_marks(
    figure: go.Figure, name: str, x: Any, y: Any, picked: Mapping[str, Any], **style: Any
) -> None:
    """Clickable marks, also where they reach over the plot's edge."""
    figure.add_scatter(x=x, y=y, mode="markers", name=name, cliponaxis=False, **picked, **style)


def _decorate(figure: go.Figure, name: str, x: Any, y: Any, mode: str, **style: Any) -> None:
    """Marks or a line that carry no numbers of their own."""
    meta = {"hoverinfo": "skip", "meta": _DECORATION, "cliponaxis": mode == "lines"}
    figure.add_scatter(x=x, y=y, mode=mode, name=name, **meta, **style)


# --- decibels on an axis ---------------------------------------------------------------------

_RAILS_ABOVE = (f">{_HIGHEST_DB:g}", "exact")
_RAILS_BELOW = (f"<{_LOWEST_DB:g}", "NaN")
_FLOOR = ""  # a row at the very bottom, for the ticks of excluded nodes


def _rail(db: float) -> str | None:
    """The rail this figure is drawn on; None where it has its place on the axis."""
    if math.isnan(db):
        return _RAILS_BELOW[1]
    if db > _HIGHEST_DB:
        return _RAILS_ABOVE[db == math.inf]
    return _RAILS_BELOW[0] if db < _LOWEST_DB else None


@dataclass(frozen=True, kw_only=True, slots=True)
class _DecibelAxis:
    """Where decibels are drawn: a linear part, and the rails above and below that are needed."""

    low: float
    high: float
    rails: Mapping[str, float]
    range: tuple[float, float]

    @classmethod
    def of(cls, values: Iterable[float | None], *, floor_row: bool = False) -> _DecibelAxis:
        given = [v for v in values if v is not None]
        used = {_rail(v) for v in given} | ({_FLOOR} if floor_row else set())
        linear = [v for v in given if _rail(v) is None]
        low = 10.0 * math.floor(min([0.0, *linear]) / 10)
        high = 10.0 * math.ceil(max([50.0, *linear]) / 10)
        gap = 0.08 * (high - low)
        above = [name for name in _RAILS_ABOVE if name in used]
        below = [name for name in (*_RAILS_BELOW, _FLOOR) if name in used]
        rails = {name: high + gap * (i + 1) for i, name in enumerate(above)}
        rails |= {name: low - gap * (i + 1) for i, name in enumerate(below)}
        room = 0.6 if below or low < 0 else 0.0
        ends = (low - gap * (len(below) + room), high + gap * (len(above) + 0.6))
        return cls(low=low, high=high, rails=rails, range=ends)

    def y(self, db: float) -> float:
        """Where this figure is drawn."""
        rail = _rail(db)
        return db if rail is None else self.rails[rail]

    def pixels(self, db: float, height: float) -> float:
        """Distance of this figure from the top of a plot of this height, in pixels."""
        bottom, top = self.range
        return (top - self.y(db)) / (top - bottom) * height

    def layout(self, title: str, height: float) -> dict[str, Any]:
        """Range, ticks and title for a Plotly axis of this many pixels."""
        pixels = height / (self.range[1] - self.range[0])
        step = 10 if 10 * pixels >= 20 else 20
        rails = {y: name for name, y in self.rails.items() if name != _FLOOR}
        ticks = {
            float(v): str(v)
            for v in range(int(self.low), int(self.high) + 1)
            if v % step == 0 and all(abs(v - y) * pixels >= _TICK_PX for y in rails)
        } | rails
        shown = {"tickvals": list(ticks), "ticktext": list(ticks.values())}
        return {"range": list(self.range), "title": {"text": title}, **shown}

    def bands(self) -> list[dict[str, Any]]:
        """Shapes: one faint band per error step."""
        bottom, top = self.range
        edges = [bottom, *(s for s in ERROR_STEPS if bottom < s < top), top]
        colors = [error_color(low if low >= ERROR_STEPS[0] else -math.inf) for low in edges]
        across = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "line": {"width": 0}}
        return [
            across | {"y0": y0, "y1": y1, "fillcolor": color, "opacity": 0.09, "layer": "below"}
            for (y0, y1), color in zip(pairwise(edges), colors, strict=False)
        ]


def _spread(wanted: Sequence[float], height: float) -> list[float]:
    """Places for lines of text, as near to the wanted ones as their height and the ends allow."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = [0.0] * len(wanted)
    previous = 4 - _LABEL_LINE_PX
    for i in order:
        previous = places[i] = max(wanted[i], previous + _LABEL_LINE_PX)
    following = height - 4 + _LABEL_LINE_PX
    for i in reversed(order):
        following = places[i] = min(places[i], following - _LABEL_LINE_PX)
    return places


# --- error by depth --------------------------------------------------------------------------


def _falls(
    activations: Sequence[ActivationError], parents: Mapping[str, Collection[str]] | None
) -> list[float | None]:
    """Per tensor, the SQNR it fell from: the lowest of its own inputs where they are known.

    Else the lowest of the four tensors before it that are neither exact nor NaN: neighbours in
    topological order may lie on different branches, and a branch that was bad already must not
    count again each time the order returns to it. None where there is nothing before.
    """
    accumulated = {a.name: a.accumulated_sqnr_db for a in activations}
    before: list[float | None] = []
    recent: list[float] = []
    for record in activations:
        known = [accumulated[p] for p in (parents or {}).get(record.name, ()) if p in accumulated]
        numbers = [v for v in known if not math.isnan(v)] or recent
        before.append(min(numbers, default=None))
        if math.isfinite(record.accumulated_sqnr_db):
            recent = [*recent[-3:], record.accumulated_sqnr_db]
    return before


def _fall_db(before: float | None, after: float) -> float | None:
    """How far it fell; None without a finite figure on both sides."""
    if before is None or not (math.isfinite(before) and math.isfinite(after)):
        return None
    return before - after


def _worst_falls(
    activations: Sequence[ActivationError], falls: Sequence[float | None]
) -> list[int]:
    """Positions of the falls worth naming, deepest first.

    What comes from above `_PLAIN_DB` counts from there: that much, quantizing takes anywhere.
    """
    depth = {
        i: min(before, _PLAIN_DB) - max(record.accumulated_sqnr_db, _LOWEST_DB)
        for i, (record, before) in enumerate(zip(activations, falls, strict=True))
        if before is not None and record.accumulated_sqnr_db < _FALL_BELOW_DB
    }
    deepest = max(depth.values(), default=0.0)
    named = [i for i in depth if depth[i] >= max(_FALL_DB, deepest / 3)]
    return sorted(named, key=lambda i: -depth[i])[:_MOST_FALLS]


def _first_break(activations: Sequence[ActivationError]) -> int | None:
    """Position of the first tensor that quantization made not finite (masks are so in float)."""
    broken = (i for i, a in enumerate(activations) if a.nonfinite_quantized > a.nonfinite_float)
    return next(broken, None)


def _hidden_parts(activations: Sequence[ActivationError]) -> dict[int, SliceError]:
    """By position, the lowest part of a Concat that the figure of the whole hides."""
    low = {i: low_slices(a) for i, a in enumerate(activations) if a.slices}
    return {i: parts[0] for i, parts in low.items() if parts}


def _depth_title(
    comparison: Comparison, falls: Sequence[float | None], worst: Sequence[int]
) -> str:
    activations = comparison.activations
    broken = _first_break(activations)
    if broken is not None:
        return f"The values stop being finite at {_name(_node(activations[broken]))}"
    hidden = _hidden_title(comparison)
    if hidden:
        return hidden
    finite = [a for a in activations if not math.isnan(a.accumulated_sqnr_db)]
    if not finite:
        return "No tensor has a finite SQNR"
    if len(finite) < len(activations) and all(a.accumulated_sqnr_db == math.inf for a in finite):
        first = next(a for a in activations if math.isnan(a.accumulated_sqnr_db))
        return f"Exact up to {_name(_node(first))}, where values stop being finite in both models"
    lowest = min(finite, key=lambda a: a.accumulated_sqnr_db)
    named, lowest_db = _name(_node(lowest)), lowest.accumulated_sqnr_db
    if worst:
        first = activations[worst[0]]
        end = min((_sort_key(o.sqnr_db) for o in comparison.outputs), default=-math.inf)
        if end < max(_FINE_DB, first.accumulated_sqnr_db + _FALL_DB):
            return (
                f"The largest fall is at {_name(_node(first))}: "
                f"{_db(falls[worst[0]]).removesuffix(' dB')} to {_db(first.accumulated_sqnr_db)}"
            )
        if lowest_db < _FINE_DB:
            return f"{named} falls to {_db(lowest_db)}, yet the output has {_db(end)}"
        return f"Accumulated SQNR stays above {_FINE_DB:g} dB"
    if lowest_db == math.inf:
        return "Both models agree exactly at every tensor"
    return f"No sudden fall: the lowest tensor is {named} with {_db(lowest_db)}"


def _depth_hover(record: ActivationError, before: float | None, excluded: bool) -> str:
    after = record.accumulated_sqnr_db
    change = _fall_db(before, after)
    if change is not None:
        fell = f"{change:.1f} dB" if change >= 0 else f"none, {-change:.1f} dB better"
    else:
        fell = "first error after an exact tensor" if before == math.inf > after else "–"
    lines = [
        f"<b>{_told(_node(record))}</b>",
        f"{_told(record.op_type)} · tensor {_told(record.name)}",
        f"accumulated {_db(after)} · local {_db(record.local_sqnr_db)}",
        f"fall: {fell}",
    ]
    if record.nonfinite_float or record.nonfinite_quantized:
        counts = f"{record.nonfinite_float:,} float, {record.nonfinite_quantized:,} quantized"
        lines.append(f"not finite: {counts} values")
    return "<br>".join([*lines, "left in float"] if excluded else lines)


def _output_hover(output: OutputError, name: str) -> str:
    worst, median = output.worst_channel_sqnr_db, output.median_channel_sqnr_db
    lines = [
        f"<b>{_told(output.name)}</b> ({name})",
        f"simulated {_db(output.sqnr_db)} · deployed {_db(output.deployed_sqnr_db)}",
        f"worst channel {_db(worst)} · median {_db(median)}",
        f"worst sample {_db(output.worst_sample_sqnr_db)} {_told(output.worst_sample)}".rstrip(),
    ]
    return "<br>".join(lines)


def _dot_size(count: int) -> float:
    return 7.0 if count <= 80 else 5.5 if count <= 400 else 4.0


def _dots(numbers: Collection[float], count: int, dark: bool) -> dict[str, Any]:
    """Markers in the colours of the error scale, as small as `count` of them need."""
    rim = {"width": 0.75 if count <= 400 else 0.25, "color": _fade(_palette(dark).ink, 0.55)}
    symbols = ["x" if math.isnan(db) else "circle" for db in numbers]
    colors = [error_color(db) for db in numbers]
    return {"size": _dot_size(count), "symbol": symbols, "color": colors, "line": rim}


class _DepthPlot:
    """The two pictures by depth: tensors from left to right, outputs at the right.

    The only output is labelled at its mark; several have a line each in the margin.
    """

    def __init__(
        self, axis: _DecibelAxis, names: Sequence[str], hover: Callable[[int], str], dark: bool
    ) -> None:
        self.axis, self.names, self.hover, self.dark = axis, names, hover, dark
        self.count = len(names)
        # Positions that are drawn; None for all.
        self.drawn: set[int] | None = None

    def thin(self, values: Sequence[float], most: int | None, keep: Iterable[int]) -> None:
        """Draws the lowest of every few neighbours where there are more than `most`, and `keep`."""
        if most is None or self.count <= most:
            return
        size = math.ceil(self.count / most)
        groups = (range(at, min(at + size, self.count)) for at in range(0, self.count, size))
        self.drawn = {min(group, key=lambda i: _sort_key(values[i])) for group in groups}
        self.drawn.update(keep)
        self.figure.update_xaxes(
            title_text=f"tensor, in topological order; the lowest of every {size} is drawn"
        )

    def frame(self, title: str | None, sentence: str, comparison: Comparison) -> None:
        """The empty picture, with the labels of its outputs."""
        count, axis, outputs = self.count, self.axis, list(comparison.outputs)
        if len(outputs) > _MOST_OUTPUT_LABELS:
            outputs = sorted(outputs, key=lambda o: _sort_key(o.sqnr_db))[:_MOST_OUTPUT_LABELS]
        texts = [_db(o.sqnr_db) for o in outputs]
        margin = {"r": 28 if outputs else 16, "t": 62, "b": 44}
        if len(outputs) > 1:
            short = _distinct([o.name for o in outputs], 14)
            texts = [f"{name} {text}" for name, text in zip(short, texts, strict=True)]
            margin["t"] += 18  # the legend takes two rows in a narrow column
            margin["r"] = min(240, 36 + 6 * max(len(html.unescape(text)) for text in texts))
        bands, revision = axis.bands(), comparison.float_model.sha256
        self.figure = _figure(
            title,
            sentence,
            self.dark,
            DEPTH_HEIGHT,
            margin=margin,
            shapes=bands,
            uirevision=revision,
        )
        self.height = height = _plot_height(self.figure)
        pad = max(0.6, 0.015 * count)
        self.output_x = count - 1 + (1.4 * pad if outputs else 0.0)
        x_range, dtick = [-pad, self.output_x + 0.6 * pad], 1 if count <= 12 else None
        self.figure.update_yaxes(**axis.layout("SQNR, dB", height))
        self.figure.update_xaxes(range=x_range, title_text="tensor, in topological order")
        self.figure.update_xaxes(showgrid=False, tickformat="d", nticks=12, dtick=dtick)
        wanted = [axis.pixels(o.sqnr_db, height) for o in outputs]
        where: dict[str, Any] = {"ax": 22, "xanchor": "left", "standoff": 7, "bgcolor": _CLEAR}
        places = _spread(wanted, height)
        if len(outputs) == 1:
            places, where = [wanted[0] + (18 if wanted[0] < 28 else -18)], {"ax": 0}
        for text, output, at, place in zip(texts, outputs, wanted, places, strict=True):
            self.point(text, self.output_x, output.sqnr_db, ay=place - at, **where)

    def chosen(self, values: Mapping[int, float]) -> dict[int, float]:
        """Those that are drawn."""
        return {i: v for i, v in values.items() if self.drawn is None or i in self.drawn}

    def point(self, text: str, x: float, db: float, **where: Any) -> None:
        _pointer(self.figure, self.dark, text, x, self.axis.y(db), **where)

    def marks(
        self, name: str, values: Mapping[int, float], *, rail: str | None = None, **style: Any
    ) -> None:
        """Clickable marks of tensors, by position, at their decibels or all on one rail."""
        drawn = [self.axis.y(v) if rail is None else self.axis.rails[rail] for v in values.values()]
        names, hover = [self.names[i] for i in values], [self.hover(i) for i in values]
        picked = _picked(names, hover, {"y": list(values.values())})
        _add_marks(self.figure, name, list(values), drawn, picked, **style)

    def line(self, name: str, values: Sequence[float | None], color: str, width: float) -> None:
        """A line through the tensors and one mark per tensor, in order; None where it has none.

        Exact tensors lie on their rail and the line passes them over; NaN breaks it.
        """
        some = range(self.count) if self.drawn is None else sorted(self.drawn)
        drawn = {i: values[i] for i in some if values[i] != math.inf}
        y = [None if v is None or math.isnan(v) else self.axis.y(v) for v in drawn.values()]
        line = {"color": color, "width": width if self.count <= 400 else 0.75 * width}
        _decorate(self.figure, name, list(drawn), y, "lines", line=line, legendgroup=name)
        given = {i: v for i in some if (v := values[i]) is not None}
        broken = [math.isnan(v) for v in given.values()]
        size, ink = max(_dot_size(self.count) - 2.5, 2.5), _palette(self.dark).ink
        marker = {
            "size": [7.0 if nan else size for nan in broken],
            "symbol": ["x" if nan else "circle" for nan in broken],
            "color": [ink if nan else color for nan in broken],
            "line": {"width": 0},
        }
        self.marks(name, given, marker=marker, legendgroup=name, showlegend=False)

    def outputs(
        self, name: str, outputs: Sequence[OutputError], *, faint: bool = False, **style: Any
    ) -> None:
        """Diamonds at the right."""
        amber = _fade(_palette(self.dark).quantized, 0.7 if faint else 1.0)
        numbers = [o.sqnr_db for o in outputs]
        color = amber if faint else [error_color(db) for db in numbers]
        symbol = "diamond-open" if faint else "diamond"
        rim = {"width": 1.5, "color": amber}
        marker = {"symbol": symbol, "size": 11, "color": color, "line": rim}
        hover = [_output_hover(o, name) for o in outputs]
        picked = _picked([o.name for o in outputs], hover, {"y": numbers})
        x, y = [self.output_x] * len(outputs), [self.axis.y(db) for db in numbers]
        _add_marks(self.figure, name, x, y, picked, marker=marker, **style)

    def label(self, spots: Sequence[tuple[int, float, str]]) -> None:
        """Labels of tensors (position, dB, text), one above the other at the bottom.

        A row of its own keeps each clear of the others at any width; it stands at the left of its
        point, where the line is still high, if there is room.
        """
        lowest = self.axis.pixels(self.axis.low, self.height) - 10
        later_first = sorted((i for i, _, _ in spots), reverse=True)
        for i, db, text in spots:
            place = lowest - later_first.index(i) * (_LABEL_LINE_PX + 2)
            side = 1 if i < 0.4 * self.count else -1
            where = {"ax": 26 * side, "xanchor": "left" if side > 0 else "right"}
            self.point(text, i, db, ay=place - self.axis.pixels(db, self.height), **where)


def error_by_depth(
    comparison: Comparison,
    *,
    selected: str | None = None,
    excluded: Collection[str] = (),
    parents: Mapping[str, Collection[str]] | None = None,
    most: int | None = MAX_POINTS,
    title: str | None = None,
    dark: bool = False,
) -> go.Figure:
    """SQNR of every matched tensor in topological order: where the error comes in.

    Accumulated is a line, local are dots in the colours of the error scale, graph outputs stand at
    the right. `customdata` of every mark is the tensor's name (the float model's).

    Args:
        comparison: activations in topological order.
        selected: the tensor to be marked.
        excluded: names of the nodes left in float; they get a violet tick.
        parents: the float tensors each tensor is computed from; with them a fall is measured
            from the worst of a tensor's own inputs, else from the worst of the four before it.
        most: beyond this many tensors the lowest of every few is drawn; None for no limit.
    """
    activations = comparison.activations
    if not activations:
        sentence = "No error by depth: no activation was matched"
        return _nothing(title, sentence, _NO_TENSOR, dark, DEPTH_HEIGHT)
    colors = _palette(dark)
    accumulated = [a.accumulated_sqnr_db for a in activations]
    local = {i: a.local_sqnr_db for i, a in enumerate(activations) if a.local_sqnr_db is not None}
    in_float = {i: accumulated[i] for i, a in enumerate(activations) if a.node in excluded}
    falls = _falls(activations, parents)
    worst = _worst_falls(activations, falls)
    hidden = _hidden_parts(activations)
    parts = {i: part.sqnr_db for i, part in hidden.items()}
    outputs = [o.sqnr_db for o in comparison.outputs]
    every = [*accumulated, *local.values(), *parts.values(), *outputs]
    axis = _DecibelAxis.of(every, floor_row=bool(in_float))
    told = list(zip(activations, falls, strict=True))
    names, sentence = [a.name for a in activations], _depth_title(comparison, falls, worst)
    plot = _DepthPlot(axis, names, lambda i: _depth_hover(*told[i], i in in_float), dark)
    plot.frame(title, sentence, comparison)
    chosen = [names.index(selected)] if selected in names else []
    broken = _first_break(activations)
    spoken = [*worst, *([] if broken is None else [broken]), *chosen, *list(hidden)[:MAX_POINTS]]
    plot.thin(accumulated, most, [*spoken, *list(in_float)[:MAX_POINTS]])
    local, parts, in_float = (plot.chosen(values) for values in (local, parts, in_float))
    plot.marks("local (own Q/DQ)", local, marker=_dots(local.values(), len(activations), dark))
    plot.line("accumulated", accumulated, colors.quantized, 2.0)
    if comparison.outputs:
        plot.outputs("output", comparison.outputs)
    if parts:
        line = {"width": 1, "color": _fade(colors.ink, 0.55)}
        fill = [error_color(db) for db in parts.values()]
        mark = {"symbol": "triangle-down", "size": 12, "color": fill, "line": line}
        plot.marks("part of a Concat", parts, marker=mark)
    if in_float:
        line = {"width": 3, "color": colors.excluded}
        tick = {"symbol": "line-ns", "size": 11, "color": colors.excluded, "line": line}
        plot.marks("left in float", in_float, rail=_FLOOR, marker=tick)
    for at in chosen:
        line = {"color": _fade(colors.ink, 0.35), "width": 1}
        plot.figure.add_vline(x=at, line=line, layer="below")
        ring = {"symbol": "circle-open", "size": 15, "color": colors.ink, "line": {"width": 2}}
        y = [axis.y(accumulated[at])]
        _decorate(plot.figure, "selected", [at], y, "markers", marker=ring, showlegend=False)
    spots = [
        (i, part.sqnr_db, f"{_name(part.source)}  {_db(part.sqnr_db)}")
        for i, part in sorted(hidden.items(), key=lambda item: item[1].sqnr_db)[:_MOST_FALLS]
    ]
    named = {i for i, _, _ in spots}
    for i in dict.fromkeys([*([] if broken is None else [broken]), *worst]):
        if i in named:
            continue
        after = accumulated[i]
        change = _fall_db(falls[i], after)
        fell = "not finite" if i == broken else _db(after if change is None else -change)
        spots.append((i, after, f"{_name(_node(activations[i]))}  {fell}"))
    plot.label(spots)
    return plot.figure


def blank(dark: bool = False) -> go.Figure:
    """An empty frame of the depth chart's size, to be shown while there is nothing yet."""
    return _nothing("", "", "", dark, DEPTH_HEIGHT)


def before_after(
    before: Comparison,
    after: Comparison,
    dark: bool = False,
    *,
    most: int | None = MAX_POINTS,
    title: str | None = None,
) -> go.Figure:
    """Accumulated SQNR of every tensor before and after a change, by depth.

    Tensors are paired by the float model's name; one that only one side has is drawn for that
    side alone. Beyond `most` tensors the lowest of every few is drawn; None for no limit.
    """
    records = {a.name: a for a in (*before.activations, *after.activations)}
    names = sorted(records, key=lambda name: records[name].depth)
    if not names:
        sentence = "No tensor to compare: no activation was matched"
        return _nothing(title, sentence, _NO_TENSOR, dark, DEPTH_HEIGHT)
    old = {a.name: a.accumulated_sqnr_db for a in before.activations}
    new = {a.name: a.accumulated_sqnr_db for a in after.activations}
    outputs = (o.sqnr_db for o in (*before.outputs, *after.outputs))
    axis = _DecibelAxis.of([*old.values(), *new.values(), *outputs])

    def hover(at: int) -> str:
        name = names[at]
        return (
            f"<b>{_told(_node(records[name]))}</b><br>tensor {_told(name)}<br>"
            f"before {_db(old.get(name))} · after {_db(new.get(name))}"
        )

    plot = _DepthPlot(axis, names, hover, dark)
    plot.frame(title, _change_title(before, after), after)
    plot.thin([min(old.get(n, math.inf), new.get(n, math.inf)) for n in names], most, ())
    amber = _palette(dark).quantized
    plot.line("before", [old.get(n) for n in names], _fade(amber, 0.4), 1.5)
    plot.line("after", [new.get(n) for n in names], amber, 2.25)
    plot.outputs("output before", before.outputs, faint=True, showlegend=False)
    plot.outputs("output after", after.outputs, showlegend=False)
    return plot.figure


def _noise(db: float) -> float:
    """Noise-to-signal ratio, 0 for exact; nan counts as -20 dB, as does all below."""
    return 10 ** (-max(_sort_key(db), _LOWEST_DB) / 10)


def _change_title(before: Comparison, after: Comparison) -> str:
    """Counts tensors by what they are judged by: a part that a Concat hides counts for it."""
    old = {a.name: _noise(judged_db(a)) for a in before.activations}
    pairs = [(old[a.name], _noise(judged_db(a))) for a in after.activations if a.name in old]
    better = sum(now < 0.977 * was for was, now in pairs)  # by more than 0.1 dB
    worse = sum(0.977 * now > was for was, now in pairs)
    tensors = f"{better} of {len(pairs)} tensors better, {worse} worse"
    was = {o.name: o for o in before.outputs}
    paired = [o for o in after.outputs if o.name in was]
    if not paired:
        return tensors
    worst = min(paired, key=lambda o: _sort_key(judged_db(was[o.name])))
    then = was[worst.name]
    which, ends = "Output" if len(paired) == 1 else "Worst output", [then.sqnr_db, worst.sqnr_db]
    if low_slices(then) or low_slices(worst):
        which = "Worst part"
        ends = [min((p.sqnr_db for p in o.slices), default=o.sqnr_db) for o in (then, worst)]
    return f"{which} goes from {_db(ends[0]).removesuffix(' dB')} to {_db(ends[1])}; {tensors}"


# --- cause map -------------------------------------------------------------------------------

_CORNERS = ("its own fault", "carries others' error", "recovers", "fine")
_MOST_CAUSES, _LEAST_CAUSES = 8, 3
# Long labels would cover the marks: fewer of them.
_FEW_CAUSES, _LONG_CAUSE = 4, 30
# They compute nothing: what they have alone is what quantizing their input costs.
_MOVERS = frozenset(
    {"Concat", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "GatherElements",
     "GatherND", "Identity", "MaxPool", "Pad", "Reshape", "Slice", "SpaceToDepth", "Split",
     "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)  # fmt: skip
# The narrowest plot that rails and labels are laid out for.
_MAP_WIDTH = 480.0


def _isolated(record: ActivationError) -> float:
    """Its isolated SQNR; of a record that has one."""
    return math.nan if record.isolated_sqnr_db is None else record.isolated_sqnr_db


def _corner(record: ActivationError) -> int:
    """Which of `_CORNERS`, divided at `_FINE_DB` on both axes; NaN counts as lowest."""
    right, above = (
        _sort_key(v) >= _FINE_DB for v in (_isolated(record), record.accumulated_sqnr_db)
    )
    return right + 2 * above


def _own_db(record: ActivationError) -> float:
    """The lower of what a node has alone and of what it adds; infinite where neither is known.

    Of a node that only moves values what it adds alone: the rest is its input's.
    """
    alone = None if record.op_type in _MOVERS else record.isolated_sqnr_db
    known = [v for v in (alone, record.added_sqnr_db) if v is not None]
    return min(map(_sort_key, known), default=math.inf)


def _cause_order(at: int, record: ActivationError) -> tuple[float, float, int]:
    return _own_db(record), _sort_key(record.accumulated_sqnr_db), at


def _tail_name(name: str, width: int = 26) -> str:
    """The end of a path, which tells one node from the next: ``…/LayerNorm_0/Rsqrt``."""
    if len(name) <= width:
        return name
    tail = ""
    for part in reversed(name.split("/")):
        if len(part) + len(tail) + 2 > width:
            break
        tail = f"/{part}{tail}"
    return f"…{tail}" if tail else short_name(name, width)


def _tail_names(names: Sequence[str]) -> list[str]:
    """The names' ends, as much longer as keeps different ones apart."""
    for wide in (26, 34, 42, 50):
        shown = [_tail_name(name, wide) for name in names]
        if len(set(shown)) == len(set(names)):
            break
    return shown


def _cause_verdict(record: ActivationError) -> str:
    """What a node's three figures say together."""
    corner, added = _corner(record), record.added_sqnr_db
    if corner != 1 or added is None or added >= _FINE_DB:
        return _CORNERS[corner]
    if math.isnan(added):
        return "the float node is not finite on what this one reads"
    return "fine alone; on what it reads, it adds error or its own Q/DQ does"


def _cause_hover(record: ActivationError, excluded: bool) -> str:
    lines = [
        f"<b>{_told(_node(record))}</b>",
        f"{_told(record.op_type)} · tensor {_told(record.name)}",
        f"isolated {_db(record.isolated_sqnr_db)} · added {_db(record.added_sqnr_db)}",
        f"accumulated {_db(record.accumulated_sqnr_db)} · local {_db(record.local_sqnr_db)}",
        _cause_verdict(record),
    ]
    return "<br>".join([*lines, "left in float"] if excluded else lines)


def _hidden_title(comparison: Comparison) -> str:
    """Says that a Concat hides a lost part; "" where none does."""
    hidden = _hidden_parts(comparison.activations)
    if not hidden:
        return ""
    i = min(hidden, key=lambda i: hidden[i].sqnr_db)
    part, whole = hidden[i], comparison.activations[i]
    return (
        f"{_name(whole.name, 20)} hides a part: {_name(part.source, 22)} at "
        f"{_db(part.sqnr_db)} under {_db(whole.accumulated_sqnr_db)}"
    )


def _cause_title(comparison: Comparison, measured: Sequence[ActivationError]) -> str:
    hidden = _hidden_title(comparison)
    if hidden:
        return hidden
    corners = Counter(map(_corner, measured))
    end = min((_sort_key(o.sqnr_db) for o in comparison.outputs), default=-math.inf)
    yet = f", yet the output has {_db(end)}" if end >= _FINE_DB else ""
    bad = [a for a in measured if _corner(a) == 0 and a.op_type not in _MOVERS]
    if bad:
        worst = min(bad, key=lambda a: _sort_key(_isolated(a)))
        name = _tail_name(_node(worst), 32 if yet else 48)
        named = f"{_escape(name)}: {_db(_isolated(worst))}"
        return f"Worst alone is {named}{yet}"
    if corners[1]:
        tensors = "1 tensor carries" if corners[1] == 1 else f"{corners[1]} tensors carry"
        return f"No node is bad alone: {tensors} error from elsewhere{yet}"
    return f"No tensor is below {_FINE_DB:g} dB in the whole model"


class _CausePlot:
    """The map's frame and its marks, which stand at a tensor's isolated and accumulated SQNR."""

    def __init__(
        self, activations: Sequence[ActivationError], places: Sequence[int], lows: Sequence[float]
    ) -> None:
        self.activations = activations
        self.x_axis = _DecibelAxis.of([_isolated(activations[i]) for i in places])
        self.y_axis = _DecibelAxis.of(
            [*(activations[i].accumulated_sqnr_db for i in places), *lows]
        )

    def frame(self, figure: go.Figure, dark: bool, counts: Mapping[int, int]) -> None:
        """Axes, bands, and the four corners with their names."""
        self.figure, self.dark, self.height = figure, dark, _plot_height(figure)
        x_axis, y_axis, muted = self.x_axis, self.y_axis, _palette(dark).muted
        figure.update_layout(shapes=[*y_axis.bands(), *_strip(x_axis)])
        figure.update_xaxes(**x_axis.layout("isolated SQNR, dB (the node alone)", _MAP_WIDTH))
        figure.update_xaxes(showgrid=False)
        figure.update_yaxes(**y_axis.layout("accumulated SQNR, dB", self.height))
        _level(figure, y_axis.y(_FINE_DB), muted, "dot")
        line = {"color": muted, "width": 1.25, "dash": "dot"}
        figure.add_vline(x=x_axis.y(_FINE_DB), line=line)
        for corner, name in enumerate(_CORNERS):
            right, above = corner % 2, corner // 2
            where: dict[str, Any] = {"xshift": 4 - 8 * right, "bgcolor": _CLEAR}
            where["xanchor"] = ("left", "right")[right]
            where["yanchor"] = "bottom"  # those of the top above the plot
            text = f"<b>{name}</b>: {counts.get(corner, 0):,}"
            _label(figure, dark, text, right, above, font_color=muted, **where)

    def marks(
        self,
        name: str,
        numbers: Sequence[tuple[int, float]],
        hover: Iterable[str],
        marker: Mapping[str, Any],
    ) -> None:
        """Clickable marks of tensors (position, dB on the y axis)."""
        records = [self.activations[i] for i, _ in numbers]
        true: dict[str, Sequence[Any]] = {
            "x": [a.isolated_sqnr_db for a in records],
            "y": [db for _, db in numbers],
            "z": [a.added_sqnr_db for a in records],
        }
        x = [self.x_axis.y(_isolated(a)) for a in records]
        y = [self.y_axis.y(db) for _, db in numbers]
        picked = _picked([a.name for a in records], hover, true)
        _add_marks(self.figure, name, x, y, picked, marker=marker)

    def ring(self, i: int) -> None:
        """Marks the selected tensor."""
        record, ink = self.activations[i], _palette(self.dark).ink
        ring = {"symbol": "circle-open", "size": 15, "color": ink, "line": {"width": 2}}
        x, y = self.x_axis.y(_isolated(record)), self.y_axis.y(record.accumulated_sqnr_db)
        _decorate(self.figure, "selected", [x], [y], "markers", marker=ring)

    def label(self, spots: Sequence[tuple[int, float, str]]) -> None:
        """Labels of marks (position, dB, text), each in a row of its own, whatever the width.

        The lowest row is left to the corners' names.
        """
        at = [self.y_axis.pixels(db, self.height) for _, db, _ in spots]
        rows = _spread([pixels - 12 for pixels in at], self.height - 16)
        middle = sum(self.x_axis.range) / 2
        for (i, db, text), pixels, row in zip(spots, at, rows, strict=True):
            x, y = self.x_axis.y(_isolated(self.activations[i])), self.y_axis.y(db)
            side = 1 if x < middle else -1
            where = {"ax": 26 * side, "xanchor": "left" if side > 0 else "right"}
            _pointer(self.figure, self.dark, _escape(text), x, y, ay=row - pixels, **where)


def cause_map(
    comparison: Comparison,
    dark: bool = False,
    *,
    selected: str | None = None,
    excluded: Collection[str] = (),
    most: int | None = MAX_POINTS,
    title: str | None = None,
) -> go.Figure:
    """Isolated (x) against accumulated (y) SQNR of every tensor: whose fault an error is.

    Left of 20 dB a node is bad on the float model's own tensors; below, its tensor arrives bad.
    The four corners are named and counted. A mark's colour is the lower of what its node has alone
    and what it adds, so that carriers stay pale wherever they lie; a Concat's lost part is a mark
    of its own. `customdata` of every mark is the tensor's name (the float model's).

    Args:
        comparison: with isolated errors; without, a sentence says that there are none.
        dark: for a dark background.
        selected: the tensor to be marked.
        excluded: names of the nodes left in float; their marks have a violet rim.
        most: beyond this many tensors only the worst are drawn; None for no limit.
        title: replaces the sentence.
    """
    activations = comparison.activations
    places = [i for i, a in enumerate(activations) if a.isolated_sqnr_db is not None]
    if not places:
        return _no_causes(comparison, title, dark)
    records = [activations[i] for i in places]
    sentence, counts = _cause_title(comparison, records), Counter(map(_corner, records))
    every = len(places)
    places.sort(key=lambda i: _cause_order(i, activations[i]))
    chosen = [i for i in places if activations[i].name == selected]
    named = _causes([(i, activations[i]) for i in places])
    measured = set(places)
    hidden = {i: part for i, part in _hidden_parts(activations).items() if i in measured}
    told = "blue: lost in this node, alone or by what it adds · yellow: little is"
    if most is not None and every > most:
        places = list(dict.fromkeys([*places[:most], *named, *chosen]))
        hidden = dict(list(hidden.items())[:most])
        told = f"the worst {len(places):,} of {every:,} are drawn; {told}"
    plot = _CausePlot(activations, places, [part.sqnr_db for part in hidden.values()])
    margin, revision = {"r": 16, "t": 62, "b": 44}, f"causes {comparison.float_model.sha256}"
    figure = _figure(
        title, sentence, dark, DEPTH_HEIGHT, told, margin=margin, showlegend=False,
        uirevision=revision,
    )  # fmt: skip
    plot.frame(figure, dark, counts)
    # The worst come last, on top of the others.
    places.reverse()
    drawn = [activations[i] for i in places]
    in_float = [a.node in excluded for a in drawn]
    violet, rim = _palette(dark).excluded, _fade(_palette(dark).ink, 0.55)
    line = {
        "color": [violet if left else rim for left in in_float],
        "width": [2.0 if left else 0.75 if every <= 400 else 0.25 for left in in_float],
    }
    marker = {
        "size": _dot_size(every) + 1,
        "symbol": [_cause_symbol(a) for a in drawn],
        "color": [error_color(_own_db(a)) for a in drawn],
        "line": line,
    }
    hover = [_cause_hover(a, left) for a, left in zip(drawn, in_float, strict=True)]
    numbers = [(i, activations[i].accumulated_sqnr_db) for i in places]
    plot.marks("isolated against accumulated", numbers, hover, marker)
    if hidden:
        numbers = [(i, part.sqnr_db) for i, part in hidden.items()]
        fill = [error_color(db) for _, db in numbers]
        line = {"width": 1, "color": rim}
        marker = {"symbol": "triangle-down", "size": 12, "color": fill, "line": line}
        hover = [
            f"<b>{_told(part.source)}</b><br>part of {_told(activations[i].name)}<br>"
            f"accumulated {_db(part.sqnr_db)}"
            for i, part in hidden.items()
        ]
        plot.marks("part of a Concat", numbers, hover, marker)
    for i in chosen:
        plot.ring(i)
    spots = [(i, part.sqnr_db, part.source) for i, part in hidden.items()]
    spots = sorted(spots, key=lambda spot: _sort_key(spot[1]))[:_LEAST_CAUSES]
    spots += [(i, activations[i].accumulated_sqnr_db, _node(activations[i])) for i in named]
    texts = _tail_names([name for *_, name in spots[:_MOST_CAUSES]])
    if max(map(len, texts), default=0) > _LONG_CAUSE:
        texts = _tail_names([name for *_, name in spots[:_FEW_CAUSES]])
    plot.label([(i, db, text) for (i, db, _), text in zip(spots, texts, strict=False)])
    return figure


def _no_causes(comparison: Comparison, title: str | None, dark: bool) -> go.Figure:
    """What stands there where no isolated error is known."""
    if not comparison.activations:
        sentence, note = "No cause map: no activation was matched", _NO_TENSOR
    elif any(a.added_sqnr_db is not None for a in comparison.activations):
        sentence, note = "No cause map: no node could be run alone", "The table has what each adds."
    else:
        sentence = "Where errors begin is not measured yet"
        note = "Measure it: each node is run alone, on the float model's own tensors."
    return _nothing(title, sentence, note, dark, DEPTH_HEIGHT)


def _causes(ordered: Sequence[tuple[int, ActivationError]]) -> list[int]:
    """Positions of the nodes to be labelled, of all from the worst on."""
    spoiled = [(i, a) for i, a in ordered if _sort_key(a.accumulated_sqnr_db) < _FALL_BELOW_DB]
    bad = [(i, _own_db(a)) for i, a in spoiled[:_MOST_CAUSES]]
    return [
        i for at, (i, own) in enumerate(bad)
        if own < (_FALL_BELOW_DB if at < _LEAST_CAUSES else _FINE_DB)
    ]  # fmt: skip


def _cause_symbol(record: ActivationError) -> str:
    figures = (record.isolated_sqnr_db, record.added_sqnr_db, record.accumulated_sqnr_db)
    if any(v is not None and math.isnan(v) for v in figures):
        return "x"
    return "diamond" if record.is_output else "circle"


def _strip(axis: _DecibelAxis) -> list[dict[str, Any]]:
    """The error steps as a strip of colours along the x axis."""
    return [
        {
            **band, "xref": "x", "x0": band["y0"], "x1": band["y1"], "yref": "paper",
            "y0": -0.018, "y1": 0.0, "opacity": 0.55,
        }
        for band in axis.bands()
    ]  # fmt: skip


# --- one tensor: histogram, error, map ---------------------------------------------------------


def _floats(values: Any) -> _Array:
    """A list of numbers, maybe absent, as an array."""
    return np.asarray([] if values is None else values, dtype=np.float64)


def _pair(values: Any) -> tuple[float, float] | None:
    """Two finite numbers, or None."""
    array = _floats(values)
    if array.size != 2 or not np.isfinite(array).all():
        return None
    return float(array[0]), float(array[1])


def _tensor(detail: Mapping[str, Any]) -> str:
    return _name(str(detail.get("tensor") or "tensor"))


def _described(detail: Mapping[str, Any]) -> str:
    """Type, step and number of values, in one line."""
    parts = [_escape(str(detail["dtype"]))] if detail.get("dtype") else []
    scales, zero_points = _floats(detail.get("scale")), _floats(detail.get("zero_point"))
    if scales.size == 1:
        parts.append(f"step {_real(scales.item())}")
        if zero_points.size == 1:
            parts.append(f"zero point {zero_points.item():.0f}")
    elif scales.size:
        ends = f"{_real(float(scales.min()))} to {_real(float(scales.max()))}"
        parts.append(f"{scales.size} channel steps, {ends}")
    parts.append(f"{int(detail.get('count') or 0):,} values")
    nonfinite = int(detail.get("nonfinite") or 0)
    return " · ".join([*parts, f"{nonfinite:,} not finite"] if nonfinite else parts)


def _count_axis(most: float, log: bool) -> tuple[dict[str, Any], float]:
    """Plotly's y axis for counts, and where a count of zero is drawn."""
    title = {"text": "values (log)" if log else "values"}
    most = max(most, 1.0)
    if not log:
        return {"title": title, "range": [0, 1.06 * most], "tickformat": "~s", "nticks": 6}, 0.0
    decades = math.ceil(math.log10(most)) + 1
    ticks = [10.0**d for d in range(0, decades + 1, 1 if decades <= 6 else 2)]
    floor = 0.6
    axis = {"type": "log", "range": [math.log10(floor), math.log10(most) + 0.25]}
    return axis | {"title": title, "tickvals": ticks, "ticktext": [*map(_count, ticks)]}, floor


def _cells(values: Sequence[Any] | _Array) -> _Array:
    """Numbers and gaps (None) as Plotly takes them fastest; the figure's JSON is that of a list.

    Of a list Plotly looks at each element by itself, several times.
    """
    return np.array(values, dtype=object)


def _add_outline(
    figure: go.Figure, name: str, edges: _Array, counts: _Array, floor: float, **style: Any
) -> None:
    """A histogram's outline; empty bins lie on the floor."""
    y, x = np.maximum(counts, floor).tolist(), edges.tolist()
    true = {"x": ((edges[:-1] + edges[1:]) / 2).tolist(), "y": counts.tolist()}
    bins = [f"{_real(low)} to {_real(high)}" for low, high in pairwise(x)]
    hover = [f"{ends}: {int(n):,} {name}" for ends, n in zip(bins, counts, strict=True)]
    style["line"] = {"shape": "hv", **style["line"]}
    told = {"hovertext": _cells([*hover, hover[-1]]), "hovertemplate": _HOVER, "meta": true}
    place = {"x": _cells(x), "y": _cells([*y, y[-1]])}
    figure.add_scatter(**place, mode="lines", name=name, **told, **style)


def _outside(detail: Mapping[str, Any], kind: str) -> tuple[int, int]:
    """How many values lie left and right of the bins."""
    return int(detail.get(f"{kind}_below") or 0), int(detail.get(f"{kind}_above") or 0)


def _add_outside(figure: go.Figure, outside: tuple[int, int], edges: _Array, dark: bool) -> None:
    left, right = _real(float(edges[0])), _real(float(edges[-1]))
    if outside[0]:
        _label(figure, dark, f"◀ {outside[0]:,} below {left}", 0, 0.55, xanchor="left")
    if outside[1]:
        _label(figure, dark, f"{outside[1]:,} above {right} ▶", 1, 0.55, xanchor="right")


def _histogram_title(
    detail: Mapping[str, Any],
    edges: _Array,
    counts: _Array,
    observed: tuple[float | None, float | None] | None,
) -> str:
    name, limits = _tensor(detail), _pair(detail.get("representable"))
    low, high = _pair(detail.get("saturated")) or (0.0, 0.0)
    if limits is None:
        return f"{name} stays in float: it has no integer grid"
    if low + high >= 0.0005:
        where = "at both ends" if min(low, high) >= 0.0005 else "below" if low > high else "above"
        return f"{_percent(low + high)} of {name} is clipped {where}"
    core = _core(detail, edges, counts)
    if core and limits[1] > limits[0]:
        used = (min(limits[1], core[1]) - max(limits[0], core[0])) / (limits[1] - limits[0])
        if 0 < used < 0.5:
            return f"99.9 % of {name} lies in {_percent(used)} of its range"
    clipped = _percent(low + high) if low + high else "nothing"
    beyond = _beyond(limits, _pair(observed), detail)
    if beyond is not None:
        reached = f"The float model's {name} reaches {_real(beyond)}"
        return f"{reached}, the quantized model's stays inside: {clipped} is clipped"
    return f"{name} fills its range, {clipped} is clipped"


def _beyond(
    limits: tuple[float, float], observed: tuple[float, float] | None, detail: Mapping[str, Any]
) -> float | None:
    """The end of the float model's range that is furthest outside the limits; None where inside.

    Half a step outside is rounded, not lost: as where values count as clipped.
    """
    if observed is None:
        return None
    room = float(_floats(detail.get("scale")).max(initial=0.0)) / 2
    below, above = limits[0] - observed[0], observed[1] - limits[1]
    outside, end = (below, observed[0]) if below > above else (above, observed[1])
    return end if outside > room else None


def _core(detail: Mapping[str, Any], edges: _Array, counts: _Array) -> tuple[float, float] | None:
    """Between which edges the middle 99.9 % of the float values lie; None where out of view."""
    below, above = _outside(detail, "float")
    total = float(counts.sum()) + below + above
    reached = below + np.cumsum(counts)
    inside = np.flatnonzero((reached > 0.0005 * total) & (reached - counts < 0.9995 * total))
    if not inside.size or max(below, above) > 0.0005 * total:
        return None
    return float(edges[inside[0]]), float(edges[inside[-1] + 1])


def _levels(detail: Mapping[str, Any], view: tuple[float, float]) -> _Array:
    """The representable values in view; empty where they are unknown or `MAX_LEVELS` and more."""
    scales, limits = _floats(detail.get("scale")), _pair(detail.get("representable"))
    if limits is None or scales.size != 1 or not scales.item() > 0:
        return np.empty(0)
    scale, zero_points = scales.item(), _floats(detail.get("zero_point"))
    low, high = max(view[0], limits[0]), min(view[1], limits[1])
    if high < low or (high - low) / scale >= MAX_LEVELS - 1:
        return np.empty(0)
    zero = zero_points.item() if zero_points.size == 1 else 0.0
    first, last = math.ceil(low / scale + zero - 1e-6), math.floor(high / scale + zero + 1e-6)
    levels: _Array = (np.arange(first, last + 1, dtype=np.float64) - zero) * scale
    return levels


def histogram(
    detail: Mapping[str, Any],
    *,
    log: bool = True,
    observed: tuple[float | None, float | None] | None = None,
    title: str | None = None,
    dark: bool = False,
) -> go.Figure:
    """How a tensor's values are spread, float against dequantized, and the grid they must fit.

    Args:
        detail: one tensor's detail as the workbench writes it.
        log: logarithmic counts; an empty bin then lies on the axis.
        observed: lowest and highest value in the float model. What is clipped is counted in the
            quantized model, whose values before Q may stay inside where these do not.
    """
    height = 320
    edges = _floats(detail.get("edges"))
    counts, quantized = _floats(detail.get("float_counts")), _floats(detail.get("quantized_counts"))
    outside = _outside(detail, "float")
    if edges.size < 2 or counts.size != edges.size - 1 or not counts.sum() + sum(outside):
        sentence = f"{_tensor(detail)} holds no finite value"
        return _nothing(title, sentence, _described(detail), dark, height)
    colors = _palette(dark)
    y_axis, floor = _count_axis(float(max(counts.max(), quantized.max(initial=0))), log)
    room = 0.015 * float(edges[-1] - edges[0] or 1.0)
    view = (float(edges[0]) - room, float(edges[-1]) + room)
    said = _histogram_title(detail, edges, counts, observed)
    figure = _figure(title, said, dark, height, _described(detail), margin={"t": 88, "b": 48})
    figure.update_layout(hovermode="x", legend_y=1.1)  # the borders' labels stand between
    figure.update_yaxes(**y_axis)
    x_title = "value, in the tensor's own units"
    figure.update_xaxes(range=list(view), title_text=x_title, ticklabelstandoff=6)
    line = {"width": 0.5, "color": colors.float_model}
    filled = {"fill": "tozeroy", "fillcolor": _fade(colors.float_model, 0.55)}
    _add_outline(figure, "float", edges, counts, floor, line=line, **filled)
    if quantized.size == edges.size - 1:
        line = {"width": 1.5, "color": colors.quantized}
        _add_outline(figure, "dequantized", edges, quantized, floor, line=line)
    levels = _levels(detail, view).tolist()
    if levels:
        line = {"width": 1, "color": _fade(colors.quantized, 0.75)}
        ticks = {"symbol": "line-ns", "size": 9, "line": line}
        _decorate(figure, "integer grid", levels, [floor] * len(levels), "markers", marker=ticks)
    limits = _pair(detail.get("representable"))
    if limits is not None:
        # Their labels keep to the corners, where they can neither meet nor be cut.
        shares = _pair(detail.get("saturated")) or (0.0, 0.0)
        for end, (limit, share) in enumerate(zip(limits, shares, strict=True)):
            if view[0] <= limit <= view[1]:
                figure.add_vline(x=limit, line={"color": colors.quantized, "width": 1.5})
            _label_end(figure, dark, end, ("from", "to")[end], limit, share, view)
    _add_outside(figure, outside, edges, dark)
    return figure


def _label_end(
    figure: go.Figure,
    dark: bool,
    end: int,
    word: str,
    limit: float,
    share: float,
    view: tuple[float, float],
) -> None:
    """Writes an end of a range into its corner: the limit, what is clipped, and which way it is."""
    colors = _palette(dark)
    before, after = "◀ " * (limit < view[0]), " ▶" * (limit > view[1])
    text = f"{before}{word} {_real(limit)}: {_percent(share)} clipped{after}"
    color = colors.ink if share else colors.muted
    side = ("left", "right")[end]
    _label(figure, dark, text, end, 1, xanchor=side, yanchor="bottom", font_color=color)


def error_histogram(
    detail: Mapping[str, Any], dark: bool = False, *, log: bool = True, title: str | None = None
) -> go.Figure:
    """How the error (dequantized - float) is spread, in steps of the scale where there is one.

    Rounding alone stays within half a step: what lies outside was clipped or came from above.
    """
    height = 300
    edges, counts = _floats(detail.get("error_edges")), _floats(detail.get("error_counts"))
    outside = _outside(detail, "error")
    beyond = sum(outside)
    total = float(counts.sum()) + beyond
    if edges.size < 2 or counts.size != edges.size - 1 or not total:
        sentence = f"{_tensor(detail)} has no finite error to show"
        return _nothing(title, sentence, _described(detail), dark, height)
    colors = _palette(dark)
    in_steps = detail.get("error_unit") == "steps"
    low, high = float(edges[0]), float(edges[-1])
    notes = [_tensor(detail)]
    if counts.sum():
        mean = float((edges[:-1] + edges[1:]) / 2 @ counts / counts.sum())
        mean = mean if abs(mean) > 1e-6 * (high - low) else 0.0
        notes.append(f"mean {mean:+.3g}" + (" steps" if in_steps else ""))
    if in_steps:
        within = float(counts[(edges[:-1] < 0.5) & (edges[1:] > -0.5)].sum()) / total
        sentence = f"{_percent(within)} of the errors are within half a step"
        rounding = beyond == 0 and within > 0.995
        notes.append(
            "what rounding alone does" if rounding else "the rest is clipped or carried in"
        )
        low, high = min(low, -0.75), max(high, 0.75)
    else:
        reach = np.maximum(np.abs(edges[:-1]), np.abs(edges[1:]))
        within = float(reach[counts > 0].max(initial=0.0))
        sentence = f"{_percent(1 - beyond / total)} of the errors are within ±{_real(within)}"
    said = " · ".join(notes)
    figure = _figure(title, sentence, dark, height, said, hovermode="x", showlegend=False)
    y_axis, floor = _count_axis(float(counts.max()), log)
    figure.update_yaxes(**y_axis)
    room = 0.015 * (high - low or 1.0)
    unit = "steps of the scale" if in_steps else "the tensor's own units"
    figure.update_xaxes(
        range=[low - room, high + room], title_text=f"dequantized − float, in {unit}"
    )
    filled = {"fill": "tozeroy", "fillcolor": _fade(colors.quantized, 0.45)}
    line = {"width": 1, "color": colors.quantized}
    _add_outline(figure, "errors", edges, counts, floor, line=line, **filled)
    if in_steps:
        for step, anchor, text in ((-0.5, "right", "-½ step"), (0.5, "left", "+½ step")):
            figure.add_vline(x=step, line={"color": colors.ink, "width": 1.25, "dash": "dot"})
            where = {"xref": "x", "xanchor": anchor, "yanchor": "bottom"}
            _label(figure, dark, text, step, 1, font_color=colors.muted, **where)
    else:
        figure.add_vline(x=0, line={"color": colors.muted, "width": 1, "dash": "dot"})
    _add_outside(figure, outside, edges, dark)
    return figure


def value_map(
    detail: Mapping[str, Any], dark: bool = False, *, title: str | None = None
) -> go.Figure:
    """Float × dequantized as a binned density: a staircase on the identity where all is well.

    ``map_counts[i][j]`` counts the values in float bin i and dequantized bin j.
    """
    height = 380
    x, y = _floats(detail.get("map_float_edges")), _floats(detail.get("map_quantized_edges"))
    counts = _floats(detail.get("map_counts"))
    if x.size < 2 or y.size < 2 or counts.shape != (x.size - 1, y.size - 1) or not counts.any():
        sentence = f"{_tensor(detail)} holds no pair of finite values"
        return _nothing(title, sentence, _described(detail), dark, height)
    colors = _palette(dark)
    middle_x, middle_y = (x[:-1] + x[1:]) / 2, (y[:-1] + y[1:]) / 2
    cell = max(float(np.diff(x).max()), float(np.diff(y).max()))
    near = np.abs(middle_y[None, :] - middle_x[:, None]) <= cell * 1.01
    share = float(counts[near].sum() / counts.sum())
    sentence = f"{_percent(share)} of the values lie on the identity line"
    notes = f"{_tensor(detail)} · {int(counts.sum()):,} values · a cell is {_real(cell)} wide"
    margin = {"l": 68, "t": 58, "b": 48}
    figure = _figure(title, sentence, dark, height, notes, margin=margin, showlegend=False)
    density = counts.T
    decades = list(range(math.ceil(math.log10(density.max())) + 1))
    small = {"size": _LABEL_SIZE, "color": colors.muted}
    faint, middle = _fade(colors.quantized, 0.18), _fade(colors.quantized, 0.75)
    figure.add_heatmap(
        x=_cells(x),
        y=_cells(y),
        z=_cells([[math.log10(n) if n else None for n in row] for row in density.tolist()]),
        zmin=-0.3,
        zmax=max(1, decades[-1]),
        colorscale=[[0, faint], [0.55, middle], [1, colors.densest]],
        colorbar={
            "title": {"text": "values", "font": small},
            "tickfont": small,
            "tickvals": decades,
        },
        customdata=_cells(density.astype(int)),
        hovertemplate="float %{x:.4g}<br>dequantized %{y:.4g}<br>%{customdata:,}<extra></extra>",
        hoverongaps=False,
        name="values",
        meta={"x": middle_x.tolist(), "y": middle_y.tolist(), "z": _cells(density)},
    )
    bar = {"ticktext": [_count(10.0**d) for d in decades], "thickness": 10, "outlinewidth": 0}
    figure.update_traces(colorbar={**bar, "len": 0.9})
    ends = [max(x[0], y[0]), min(x[-1], y[-1])]
    if ends[0] < ends[1]:
        line = {"color": _fade(colors.ink, 0.7), "width": 1, "dash": "dot"}
        _decorate(figure, "identity", ends, ends, "lines", line=line)
    figure.update_xaxes(title_text="float value", range=[x[0], x[-1]])
    figure.update_yaxes(title_text="dequantized value", range=[y[0], y[-1]])
    return figure


# --- channels, slices, samples -----------------------------------------------------------------


def channels(
    channel_sqnr_db: Sequence[float | None],
    channel_low: Sequence[float],
    channel_high: Sequence[float],
    *,
    worst: int | None = None,
    axis_name: str = "channel",
    representable: tuple[float, float] | None = None,
    title: str | None = None,
    dark: bool = False,
) -> go.Figure:
    """SQNR per channel, worst first, over each channel's range.

    Args:
        channel_sqnr_db: per channel.
        channel_low, channel_high: the float range per channel; empty where unknown.
        worst: the channel to be named; the lowest one where None.
        axis_name: what a channel is, e.g. "channel" or "output feature".
        representable: what the scale can hold, drawn over the ranges.
    """
    height = 360
    numbers = [math.nan if v is None else float(v) for v in channel_sqnr_db]
    word = _escape(axis_name)
    if not numbers:
        note = "The tensor has no channel axis, or its shape differs between samples."
        return _nothing(title, f"There is no figure per {word}", note, dark, height)
    colors = _palette(dark)
    order = sorted(range(len(numbers)), key=lambda i: _sort_key(numbers[i]))
    if worst is None or not 0 <= worst < len(numbers):
        worst = order[0]
    # The lower of the middle two, so that it lies on a value.
    median = numbers[order[(len(order) - 1) // 2]]
    shown = order if len(order) <= MAX_CHANNELS else order[:WORST_CHANNELS]
    ranged = len(channel_low) == len(channel_high) == len(numbers)
    axis = _DecibelAxis.of([median, *(numbers[i] for i in shown)])
    named = f"{word} {worst}"
    if len(numbers) == 1:
        sentence = f"There is one {word}: {_db(numbers[0])}"
    elif all(v == math.inf for v in numbers):
        sentence = f"Every {word} is exact"
    else:
        sentence = f"{named} is worst: {_db(numbers[worst])}, the median {word} {_db(median)}"
        sentence = sentence[:1].upper() + sentence[1:]
    some = len(shown) < len(numbers)
    notes = f"the worst {len(shown)} of {len(numbers):,}" if some else f"all {len(numbers)}"
    if ranged:
        widths = np.abs(np.subtract(channel_high, channel_low))
        typical, widest = float(np.median(widths)), int(np.argmax(np.nan_to_num(widths)))
        if typical > 0 and widths[widest] / typical >= 4:
            times = f"{widths[widest] / typical:.3g} times as wide as the median one"
            notes += f" · {word} {widest} is {times}"
    margin = {"r": 92, "t": 70, "b": 50}
    figure = _figure(title, sentence, dark, height, notes, margin=margin, showlegend=False)
    panel = _plot_height(figure) * (0.53 if ranged else 1.0)
    figure.update_layout(bargap=0.25, xaxis_anchor="y2" if ranged else "y")
    figure.update_yaxes(domain=[0.47 if ranged else 0, 1], **axis.layout("SQNR, dB", panel))
    places = list(range(len(shown)))
    x_range, angle = [-0.7, max(len(shown), 6) - 0.3], -90 if len(shown) > 16 else 0
    figure.update_xaxes(title_text=f"{word}, worst first", range=x_range, showgrid=False)
    figure.update_xaxes(tickvals=places, ticktext=[str(i) for i in shown], tickangle=angle)
    hover = [f"<b>{word} {i}</b><br>{_db(numbers[i])}" for i in shown]
    if ranged:
        ends = [f"{_real(channel_low[i])} to {_real(channel_high[i])}" for i in shown]
        hover = [f"{text}<br>range {both}" for text, both in zip(hover, ends, strict=True)]
    rim = {"width": [2.0 if i == worst else 0.0 for i in shown], "color": colors.ink}
    marker = {"color": [error_color(numbers[i]) for i in shown], "line": rim}
    picked = _picked(shown, hover, {"x": shown, "y": [numbers[i] for i in shown]})
    heights = [axis.y(numbers[i]) for i in shown]
    figure.add_bar(x=places, y=heights, marker=marker, name="SQNR", **picked)
    beside = {"xanchor": "left", "align": "left", "xshift": 4}
    _level(figure, axis.y(median), colors.ink, "dot")
    _label(figure, dark, f"median<br>{_db(median)}", 1, axis.y(median), yref="y", **beside)
    if not ranged:
        return figure
    below = {"domain": [0, 0.38], "anchor": "x", "title": {"text": "float range"}, "nticks": 4}
    figure.update_layout(yaxis2={**below, "zeroline": True, "zerolinecolor": colors.grid})
    for name, chosen, width, color in (
        ("range", [i for i in places if shown[i] != worst], 3, colors.float_model),
        ("range of the worst", [i for i in places if shown[i] == worst], 5, colors.ink),
    ):
        ends_of = [(float(channel_low[shown[i]]), float(channel_high[shown[i]])) for i in chosen]
        cap = {"symbol": "line-ew", "size": 7, "line": {"width": 1.5, "color": color}}
        line = {"color": color, "width": width}
        texts = [text for i in chosen for text in (hover[i], hover[i], "")]
        numbers_of = [n for i in chosen for n in (shown[i], shown[i], None)]
        x, y = [x for i in chosen for x in (i, i, None)], [y for e in ends_of for y in (*e, None)]
        look: dict[str, Any] = {"mode": "lines+markers", "line": line, "marker": cap}
        told: dict[str, Any] = {"hovertext": texts, "hovertemplate": _HOVER, "name": name}
        figure.add_scatter(x=x, y=y, yaxis="y2", meta={"x": numbers_of}, **look, **told)
    for limit in representable or ():
        _level(figure, limit, colors.quantized, yref="y2")
    return figure


def slices(
    slices: Sequence[SliceError], dark: bool = False, *, title: str | None = None
) -> go.Figure:
    """The inputs of a Concat: each part's SQNR beside the size of its values.

    Parts that share one scale but not one size are the commonest cause of a silent part.
    """
    if not slices:
        sentence = "This tensor is not joined from parts"
        return _nothing(title, sentence, "Only a Concat has parts.", dark, 200)
    colors = _palette(dark)
    shown = sorted(slices, key=lambda s: _sort_key(s.sqnr_db))[:MAX_SLICES]
    worst = shown[0]
    axis = _DecibelAxis.of([s.sqnr_db for s in shown])
    largest = max(slices, key=lambda s: _sort_key(s.absmax))
    notes = [f"the worst {len(shown)} of {len(slices)} parts"] if len(shown) < len(slices) else []
    if worst.sqnr_db == math.inf:
        sentence = "Every part arrives exactly"
    else:
        part = _name(worst.source, 36) if len(slices) > 1 else "The only part"
        arrives = "not finite" if math.isnan(worst.sqnr_db) else f"at {_db(worst.sqnr_db)}"
        sentence = f"{part} arrives {arrives}"
        if worst.absmax > 0 and largest.absmax / worst.absmax >= 2:
            ratio = f"{largest.absmax / worst.absmax:.3g}"
            notes.insert(0, f"{_name(largest.source, 36)} is {ratio} times as large")
    sources = _distinct([s.source for s in shown], 26)
    labels = [f"{n} {s.start}…{s.stop - 1}" for n, s in zip(sources, shown, strict=True)]
    left = int(min(340, 20 + 6.6 * max(len(html.unescape(t)) for t in labels)))
    places = list(range(len(shown)))
    absmax = [s.absmax if math.isfinite(s.absmax) else 0.0 for s in shown]
    bottom, top = axis.range
    height, margin = 106 + 30 * len(shown), {"l": left, "t": 54}
    said = " · ".join(notes)
    figure = _figure(title, sentence, dark, height, said, margin=margin, showlegend=False)
    # Each bar carries its figure, so the rails need no tick; the room at the right is for them.
    db_range = [bottom, top + 0.25 * (top - bottom)]
    steps = [v for v in range(int(axis.low), int(axis.high) + 1) if v % 20 == 0]
    figure.update_xaxes(domain=[0, 0.47], range=db_range, tickvals=steps, title_text="SQNR, dB")
    wide = {"range": [0, 1.25 * (max(absmax) or 1.0)], "nticks": 5}
    wide_title = {"text": "largest |value|, float"}
    figure.update_layout(xaxis2={"domain": [0.53, 1], "anchor": "y", "title": wide_title, **wide})
    figure.update_yaxes(tickvals=places, ticktext=labels, range=[len(shown) - 0.4, -0.6])
    figure.update_yaxes(showgrid=False, tickfont_color=colors.ink)
    figure.update_layout(bargap=0.35)
    sqnr_db, error_colors = [s.sqnr_db for s in shown], [error_color(s.sqnr_db) for s in shown]
    hover = [
        f"<b>{_told(s.source)}</b><br>channels {s.start}…{s.stop - 1}<br>"
        f"{_db(s.sqnr_db)} · largest |value| {_real(s.absmax)}"
        for s in shown
    ]
    for name, numbers, drawn, say, x_name, color in (
        ("SQNR", sqnr_db, [axis.y(db) for db in sqnr_db], _db, "x", error_colors),
        ("largest |value|", [s.absmax for s in shown], absmax, _real, "x2", colors.float_model),
    ):
        bar = {"orientation": "h", "xaxis": x_name, "marker": {"color": color}, "name": name}
        picked = _picked([s.source for s in shown], hover, {"x": numbers})
        figure.add_bar(x=drawn, y=places, **bar, **picked)
        where = {"xref": x_name, "yref": "y", "xanchor": "left", "xshift": 2, "bgcolor": _CLEAR}
        for place, at, number in zip(places, drawn, numbers, strict=True):
            _label(figure, dark, say(number), max(at, 0.0), place, **where)
    return figure


def per_sample(
    output_error: OutputError,
    dark: bool = False,
    *,
    sample_names: Sequence[str] = (),
    title: str | None = None,
) -> go.Figure:
    """SQNR of one output, sample by sample, with the pooled figure and the median."""
    numbers = [float(v) for v in output_error.per_sample_sqnr_db]
    name, count = _name(output_error.name), len(numbers)
    if not numbers:
        sentence = f"{name} has no figure per sample"
        return _nothing(title, sentence, "No sample was compared.", dark, 280)
    colors = _palette(dark)
    pooled, median = output_error.sqnr_db, output_error.median_sample_sqnr_db
    worst = min(range(count), key=lambda i: _sort_key(numbers[i]))
    lowest = numbers[worst]
    names = [*sample_names[:count], *(f"sample {i}" for i in range(len(sample_names), count))]
    if worst >= len(sample_names) and output_error.worst_sample:
        names[worst] = output_error.worst_sample
    axis = _DecibelAxis.of([pooled, median, *numbers])
    if all(v == math.inf for v in numbers):
        sentence = f"{name} is exact on every sample"
    elif count == 1:
        sentence = f"{name} has {_db(lowest)} on its only sample"
    elif math.isfinite(lowest) and math.isfinite(median) and median - lowest < _FALL_DB:
        sentence = f"{name} is alike on all samples: {_db(lowest)} at worst, median {_db(median)}"
    else:
        sentence = f"{name} is worst on {_name(names[worst])}: {_db(lowest)}, median {_db(median)}"
    margin, bands = {"r": 112, "t": 44, "b": 44}, axis.bands()
    figure = _figure(title, sentence, dark, 280, margin=margin, shapes=bands, showlegend=False)
    height = _plot_height(figure)
    figure.update_yaxes(**axis.layout("SQNR, dB", height))
    pad = max(0.6, 0.02 * count)
    figure.update_xaxes(title_text="sample", range=[-pad, count - 1 + pad], showgrid=False)
    figure.update_xaxes(tickformat="d", nticks=12, dtick=1 if count <= 12 else None)
    higher = _sort_key(pooled) >= _sort_key(median)
    for word, db, dash in (("pooled", pooled, "solid"), ("median", median, "dot")):
        up = higher == (word == "pooled")
        _level(figure, axis.y(db), colors.quantized, dash)
        where = {"yref": "y", "xanchor": "left", "yanchor": "bottom" if up else "top", "xshift": 4}
        _label(figure, dark, f"{word} {_db(db)}", 1, axis.y(db), **where)
    hover = [f"<b>{_told(n)}</b><br>{_db(db)}" for n, db in zip(names, numbers, strict=True)]
    picked, y = _picked(names, hover, {"y": numbers}), [axis.y(db) for db in numbers]
    _add_marks(figure, "sample", list(range(count)), y, picked, marker=_dots(numbers, count, dark))
    if count > 1 and lowest != math.inf:
        side = -1 if worst > 0.6 * count else 1
        down = -1 if axis.pixels(lowest, height) > height - 30 else 1
        where = {"ax": 14 * side, "ay": 18 * down, "xanchor": "left" if side > 0 else "right"}
        _pointer(figure, dark, _name(names[worst]), worst, axis.y(lowest), **where)
    return figure


# --- what the figures rest on ------------------------------------------------------------------

_RULES = {
    "name": "by name",
    "structure": "by structure",
    "content": "by content",
    "pin": "by hand",
}


def coverage(comparison: Comparison, dark: bool = False) -> go.Figure:
    """What became of every float tensor: matched by which rule, fused, or not compared.

    One stacked bar whose parts add up to all float tensors. Empty where the comparison does not
    know (made by an earlier version).
    """
    counts, height = comparison.counts, 86
    if counts is None:
        sentence = "Which tensors are compared was not counted"
        return _nothing(None, sentence, "Compare the models again.", dark, height)
    colors = _palette(dark)
    records: list[ActivationError | WeightError] = [*comparison.activations, *comparison.weights]
    found = Counter(r.matched_by for r in records if not (isinstance(r, WeightError) and r.scope))
    rules = [*_RULES, *sorted(found.keys() - _RULES.keys())]
    parts = [(f"matched {_RULES.get(rule, _told(rule))}", found[rule]) for rule in rules]
    if sum(found.values()) != counts.matched:
        # Weights of If and Loop bodies are compared too, but are not among the counted ones.
        parts = [("matched", counts.matched)]
    shades = dict(zip(rules, (1.0, 0.72, 0.48), strict=False))
    look = {
        f"matched {word}": _fade(colors.float_model, shades.get(rule, 0.4))
        for rule, word in _RULES.items()
    }
    look |= {"matched by hand": colors.accent, "matched": colors.float_model}
    parts += [("fused into a compared one", counts.fused), ("not compared", counts.unmatched)]
    whole = max(counts.float_tensors, 1)
    margin = {"l": 8, "r": 8, "t": 18, "b": 34}
    figure = _figure("", "", dark, height, margin=margin, barmode="stack", bargap=0)
    for word, number in parts:
        if not number:
            continue
        fused, lost = word.startswith("fused"), word == "not compared"
        color = NO_FIGURE_COLOR if lost else look.get(word, _fade(colors.float_model, 0.22))
        marker: dict[str, Any] = {"color": color, "line": {"width": 1, "color": colors.hover}}
        if fused:
            shape = {"shape": "/", "size": 6, "solidity": 0.25, "fgcolor": colors.muted}
            marker["pattern"] = shape
        figure.add_bar(
            x=[number],
            y=["float tensors"],
            orientation="h",
            name=f"{word} {number:,}",
            marker=marker,
            meta={"x": [number], "y": [word]},
            hovertemplate=f"{number:,} of {whole:,} {word}<extra></extra>",
        )
    legend = {"y": -0.12, "yanchor": "top", "traceorder": "normal"}
    figure.update_layout(legend=legend, showlegend=True)
    figure.update_xaxes(visible=False, range=[0, whole])
    figure.update_yaxes(visible=False)
    return figure


# --- recipes -----------------------------------------------------------------------------------

RECIPES_HEIGHT = 330


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.3g} MB"


def recipes(
    rows: Sequence[Mapping[str, Any]],
    dark: bool = False,
    *,
    selected: str = "",
    current: str = "",
    title: str | None = None,
) -> go.Figure:
    """What each recipe gives against what it takes: deployed SQNR over time, area by file size.

    Args:
        rows: of a "quant-inspector/recipes" table, best first; strict or not. Those without a
            figure or a time have no mark.
        dark: for a dark background.
        selected: label of the row to mark.
        current: label of the recipe of the run on screen.
        title: replaces the sentence.
    """
    twins = {r["label"]: r["same_as"] for r in rows if r.get("same_as")}
    selected, current = twins.get(selected, selected), twins.get(current, current)
    done = [r for r in rows if r["state"] == "done" and not r.get("same_as")]
    shown = [r for r in done if r["latency"] is not None and r["deployed_sqnr_db"] is not None]
    height = RECIPES_HEIGHT
    if not shown:
        note = "Each is a mark here as soon as it is tried."
        if done:
            note = "No recipe that was tried could be timed."
        return _nothing(title, "No recipe has a figure yet", note, dark, height)
    colors = _palette(dark)
    numbers = [float(r["deployed_sqnr_db"]) for r in shown]
    times = [float(r["latency"]["median_seconds"]) for r in shown]
    floats = [float(r["latency"]["float_seconds"]) for r in shown if r["latency"]["float_seconds"]]
    sizes = [float(r["size_bytes"]) for r in shown]
    axis = _DecibelAxis.of(numbers)
    span = max(numbers) - min(numbers)
    if all(_rail(db) is None for db in numbers):
        # Recipes lie close together: the usual axis from 0 on would flatten what tells them apart.
        pad = 0.12 * max(span, 5.0)
        low, high = min(numbers) - 1.8 * pad, max(numbers) + 1.5 * pad
        axis = _DecibelAxis(low=low, high=high, rails={}, range=(low, high))
    whole = f"{len(shown)} of {len(rows)} recipes"
    notes = [f"{whole}, files that are the same once", "area: size", "dotted: none is better"]
    margin, bands = {"r": 24, "t": 62, "b": 44}, axis.bands()
    sentence = _recipes_title(shown, numbers, times)
    figure = _figure(title, sentence, dark, height, " · ".join(notes), margin=margin, shapes=bands)
    if axis.rails or span >= 40:
        figure.update_yaxes(**axis.layout("deployed SQNR, dB", _plot_height(figure)))
    else:
        figure.update_yaxes(range=list(axis.range), nticks=7, title_text="deployed SQNR, dB")
    reach = max([*times, *floats]) * 1000
    figure.update_xaxes(title_text="latency on this machine, ms", showgrid=False)
    figure.update_xaxes(range=[0, 1.08 * reach], nticks=10)
    front = front_of(list(zip(times, numbers, strict=True)))
    line = {"color": colors.muted, "width": 1.25, "dash": "dot"}
    x, y = [1000 * times[i] for i in front], [axis.y(numbers[i]) for i in front]
    _decorate(figure, "frontier", x, y, "lines", line=line, showlegend=False)
    if floats:
        middle = float(np.median(floats))
        line = {"color": colors.float_model, "width": 1.5}
        at = 1000 * middle
        figure.add_shape(type="line", line=line, x0=at, x1=at, yref="paper", y0=0, y1=1)
        side = "right" if 1000 * middle > 0.8 * reach else "left"
        where: dict[str, Any] = {
            "xref": "x",
            "xanchor": side,
            "yanchor": "bottom",
            "font_color": colors.float_model,
        }
        shift = {"xshift": -4 if side == "right" else 4}
        told = f"float {_milliseconds(middle)}"
        _label(figure, dark, told, 1000 * middle, 0.01, **where, **shift)
    scale = max(sizes) or 1.0
    for name, per_channel in (("per channel", True), ("per tensor", False)):
        chosen = [i for i, r in enumerate(shown) if bool(r["recipe"]["per_channel"]) is per_channel]
        if not chosen:
            continue
        hover = [_recipe_hover(shown[i], numbers[i], times[i], sizes[i]) for i in chosen]
        true = {"x": [1000 * times[i] for i in chosen], "y": [numbers[i] for i in chosen]}
        picked = _picked([shown[i]["label"] for i in chosen], hover, true)
        labels = [shown[i]["label"] for i in chosen]
        rims = [3.0 if n == selected else 1.0 for n in labels]
        inks = [colors.accent if n == selected else colors.hover for n in labels]
        marker: dict[str, Any] = {
            "size": [8 + 10 * math.sqrt(sizes[i] / scale) for i in chosen],
            "symbol": "circle" if per_channel else "diamond",
            "color": _fade(colors.quantized, 0.9 if per_channel else 0.55),
            "line": {"width": rims, "color": inks},
        }
        y = [axis.y(numbers[i]) for i in chosen]
        _add_marks(figure, name, true["x"], y, picked, marker=marker)
    figure.update_layout(showlegend=True, legend={"x": 1, "xanchor": "right", "y": 1.01})
    named = [(0, "best")]
    mine = next((i for i, r in enumerate(shown) if r["label"] == current), None)
    if mine is not None:
        named = [(0, "best, and this run")] if mine == 0 else [*named, (mine, "this run")]
    for place, word in named:
        left = 1000 * times[place] > 0.8 * reach
        where = {"ax": -22 if left else 22, "ay": -16 if place == 0 else 18}
        where["xanchor"] = "right" if left else "left"
        _pointer(figure, dark, word, 1000 * times[place], axis.y(numbers[place]), **where)
    return figure


def _recipes_title(
    rows: Sequence[Mapping[str, Any]], numbers: Sequence[float], times: Sequence[float]
) -> str:
    """What one can have for at most 1 dB less than the best."""
    near = [i for i, db in enumerate(numbers) if _sort_key(db) >= _sort_key(numbers[0]) - 1]
    fastest = min(near, key=lambda i: times[i], default=0)
    best = f"{_db(numbers[0])} in {_milliseconds(times[0])}"
    if len(rows) == 1:
        return f"The first recipe gives {best}"
    if times[fastest] >= 0.95 * times[0]:
        return f"The best recipe gives {best}; none within 1 dB of it is faster"
    return (
        f"The best recipe gives {best}; {_escape(rows[fastest]['label'])} {_db(numbers[fastest])} "
        f"in {_milliseconds(times[fastest])}"
    )


def _recipe_hover(row: Mapping[str, Any], db: float, seconds: float, size: float) -> str:
    lines = [f"<b>{_told(str(row['label']))}</b>", f"{_db(db)} deployed"]
    if row["unseen_sqnr_db"] is not None:
        lines[-1] += f" · {_db(float(row['unseen_sqnr_db']))} on unseen feeds"
    if row["task"]:
        lines.append(f"top-1 {_percent(float(row['task']['top1_quantized']))}")
    lines.append(f"{_milliseconds(seconds)} · {_megabytes(size)}")
    if row.get("same_as"):
        lines.append(f"same file as {_told(str(row['same_as']))}")
    return "<br>".join(lines)


# --- exclusion lists: what they give against what they cost --------------------------------------

LISTS_HEIGHT = 332


@dataclass(frozen=True, kw_only=True, slots=True)
class ListPoint:
    """One exclusion list among others.

    Attributes:
        key: what a click on its mark selects.
        nodes: how many stay in float.
        figure: of the metric; nan where an output is not finite.
        price: on the axis that was chosen.
        deployed: the figure of its real file, where that was made.
        notes: further lines for the hover text.
    """

    key: str
    nodes: int
    figure: float
    price: float
    deployed: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ListAxes:
    """What the two axes of `exclusion_lists` show.

    Attributes:
        metric: its name.
        unit: "dB" or "".
        higher_is_better: which way is good.
        price: the title of the horizontal axis, with its unit.
        price_unit: for the sentences, e.g. "% of the MACs in float".
    """

    metric: str
    unit: str
    higher_is_better: bool
    price: str
    price_unit: str

    def text(self, value: float) -> str:
        """A figure with its unit."""
        return (
            _db(value)
            if self.unit == "dB"
            else "not finite"
            if math.isnan(value)
            else f"{value:.4g}"
        )


def exclusion_lists(
    points: Sequence[ListPoint],
    axes: ListAxes,
    dark: bool = False,
    *,
    goal: float | None = None,
    chosen: str = "",
    selected: str = "",
    height: int = LISTS_HEIGHT,
    title: str | None = None,
) -> go.Figure:
    """What exclusion lists give (y) against what they cost (x); clicking one selects it.

    Those that no cheaper list beats are filled and joined; behind the knee more buys little more.

    Args:
        points: the lists, at best the empty one among them.
        axes: what is shown.
        dark: for a dark background.
        goal: the figure to be reached.
        chosen: key of the list that a search proposes.
        selected: key of the list to mark.
        height: in pixels.
        title: replaces the sentence.
    """
    if not points:
        note = "Each list that is tried is a mark here at once."
        return _nothing(title, "No list has been tried yet", note, dark, height)
    colors = _palette(dark)
    sign = 1.0 if axes.higher_is_better else -1.0
    front = front_of([(p.price, sign * p.figure) for p in points])
    knee = knee_of([(points[i].price, sign * points[i].figure) for i in front])
    at_knee = None if knee is None else front[knee]
    finite = [p.figure for p in points if math.isfinite(p.figure)] or [0.0]
    low, high = (
        min([*finite, *([goal] if goal is not None else [])]),
        max([*finite, *([goal] if goal is not None else [])]),
    )
    pad = 0.12 * ((high - low) or 1.0)
    bottom, top = low - pad, high + 1.5 * pad
    sentence = _lists_title(points, axes, front, goal, chosen)
    told = [_count_text(len(points), "list"), "joined: no cheaper one is better, simulated"]
    if goal is not None and any(_misses(p, goal, sign) for p in points):
        told.append("cross: misses the goal deployed")
    figure = _figure(
        title, sentence, dark, height, " · ".join(told),
        margin={"r": 24, "t": 62, "b": 44}, showlegend=False,
    )  # fmt: skip
    unit = f", {axes.unit}" if axes.unit else ""
    figure.update_yaxes(range=[bottom, top], nticks=7, title_text=f"{axes.metric}{unit}")
    dearest = max(p.price for p in points)
    cheapest = min(p.price for p in points)
    margin = 0.04 * ((dearest - cheapest) or 1.0)
    figure.update_xaxes(
        range=[cheapest - margin, dearest + 2 * margin], title_text=axes.price, showgrid=False
    )

    def y_of(value: float) -> float:
        return low - pad / 2 if math.isnan(value) else min(max(value, low), high + pad)

    if goal is not None:
        _level(figure, goal, colors.accent, "dash")
        _label(
            figure, dark, f"goal {axes.text(goal)}", 1, goal, yref="y", xanchor="right",
            yanchor="bottom", font_color=colors.accent,
        )  # fmt: skip
    line = {"color": colors.muted, "width": 1.25, "dash": "dot", "shape": "hv"}
    x, y = [points[i].price for i in front], [y_of(points[i].figure) for i in front]
    _decorate(figure, "joined", x, y, "lines", line=line)
    on_front = set(front)
    for name, which in (("beaten", False), ("front", True)):
        here = [p for i, p in enumerate(points) if (i in on_front) is which]
        if not here:
            continue
        hover = [_list_hover(p, axes) for p in here]
        true = {"x": [p.price for p in here], "y": [p.figure for p in here]}
        missed = [goal is not None and _misses(p, goal, sign) for p in here]
        marker = {
            "symbol": ["x" if each else "circle" for each in missed],
            "size": [11 if p.key in (selected, chosen) else 8 if which else 6 for p in here],
            "color": _fade(colors.quantized, 0.95 if which else 0.35),
            "line": {
                "width": [3.0 if p.key == selected else 1.0 for p in here],
                "color": [colors.accent if p.key == selected else colors.hover for p in here],
            },
        }
        picked = _picked([p.key for p in here], hover, true)
        _add_marks(figure, name, true["x"], [y_of(p.figure) for p in here], picked, marker=marker)
    named: dict[int, str] = {}
    for at, point in enumerate(points):
        if not point.nodes:
            named[at] = "none in float"
        elif point.figure == math.inf:
            named[at] = f"exact, {_nodes_text(point.nodes)}"
        if point.key == chosen:
            named[at] = f"proposed, {_nodes_text(point.nodes)}"
    if at_knee is not None:
        more = (
            f"{named[at_knee]}, knee"
            if at_knee in named
            else f"knee, {_nodes_text(points[at_knee].nodes)}"
        )
        named[at_knee] = more
    for at, word in named.items():
        point = points[at]
        right = point.price > cheapest + 0.7 * (dearest - cheapest)
        side = "right" if right else "left"
        ax, ay = (-28, 34) if right else (24, 18)
        at_y = y_of(point.figure)
        _pointer(figure, dark, word, point.price, at_y, ax=ax, ay=ay, xanchor=side)
    return figure


def _misses(point: ListPoint, goal: float, sign: float) -> bool:
    """Whether a list's real file misses what it reaches simulated."""
    if point.deployed is None or not sign * point.figure >= sign * goal:
        return False
    return not sign * point.deployed >= sign * goal


def _count_text(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _nodes_text(count: int) -> str:
    return _count_text(count, "node")


def _lists_title(
    points: Sequence[ListPoint],
    axes: ListAxes,
    front: Sequence[int],
    goal: float | None,
    chosen: str,
) -> str:
    """The list that is proposed, or how far the best one got."""
    finite = [points[i] for i in front if math.isfinite(points[i].figure)]
    best = finite[-1] if finite else points[front[-1]]
    mine = next((p for p in points if p.key == chosen), best)
    sign = 1.0 if axes.higher_is_better else -1.0
    told = f"{axes.metric} {axes.text(mine.figure)} with {_nodes_text(mine.nodes)} in float"
    told += f" ({_price(mine.price)} {axes.price_unit})"
    if goal is not None and not sign * mine.figure >= sign * goal:
        return f"No list tried reaches {axes.text(goal)}; the best gives {told}"
    return told


def _price(value: float) -> str:
    return f"{value:.3g}" if value else "0"


def _list_hover(point: ListPoint, axes: ListAxes) -> str:
    lines = [f"<b>{_nodes_text(point.nodes)} in float</b>", axes.text(point.figure)]
    lines.append(f"{_price(point.price)} {axes.price_unit}")
    return "<br>".join([*lines, *map(_escape, point.notes)])


# --- the lab: one tensor under another range or scheme -------------------------------------------

MOST_LAB_LEVELS = 256
_LAB_REACH = 2.0  # a handle this many data ranges away is out of the picture


def _lab_view(edges: _Array, trial: Trial) -> tuple[float, float]:
    """From where to where the lab's picture goes: the data and both handles, unless far away."""
    width = float(edges[-1] - edges[0]) or abs(float(edges[0])) or 1.0
    left = min(float(edges[0]), max(trial.low, float(edges[0]) - _LAB_REACH * width))
    right = max(float(edges[-1]), min(trial.high, float(edges[-1]) + _LAB_REACH * width))
    room = 0.02 * (right - left)
    return left - room, right + room


def _beyond_end(
    edges: _Array, counts: _Array, end: float, *, above: bool
) -> tuple[_Array, _Array, _Array]:
    """The bins beyond an end: edges cut at it, heights, and how many values lie in each."""
    cut = np.maximum(edges, end) if above else np.minimum(edges, end)
    kept = np.diff(cut) > 0
    if not kept.any():
        return np.empty(0), np.empty(0), np.empty(0)
    shares = np.diff(cut)[kept] / np.diff(edges)[kept]
    first = int(np.flatnonzero(kept)[0])
    ends = cut[first : first + int(kept.sum()) + 1]
    return ends, counts[kept], counts[kept] * shares


def _lab_notes(trial: Trial) -> str:
    zero = trial.zero_point
    parts = [
        f"step {_real(trial.scale)}",
        f"zero point {zero:.0f}" if zero == round(zero) else f"offset {_real(zero)} steps",
        f"{trial.level_count:,} levels",
    ]
    if trial.noise > 0:
        parts.append(f"noise: {_percent(trial.clipping_noise / trial.noise)} from clipping")
    parts.append(f"even rounding alone: {_db(trial.predicted_sqnr_db)}")
    return " · ".join(parts)


def lab_figure(
    detail: Mapping[str, Any],
    trial: Trial,
    *,
    log: bool = True,
    title: str | None = None,
    dark: bool = False,
) -> go.Figure:
    """A tensor's values under the grid that is tried: its levels, both handles, what is clipped.

    Args:
        detail: one tensor's detail as the workbench writes it; its float values are drawn.
        trial: what the scheme makes of them.
        log: logarithmic counts; an empty bin then lies on the axis.
        title: replaces the sentence.
        dark: for a dark background.
    """
    height = 340
    edges, counts = _floats(detail.get("edges")), _floats(detail.get("float_counts"))
    outside = _outside(detail, "float")
    if edges.size < 2 or counts.size != edges.size - 1 or not counts.sum() + sum(outside):
        sentence = f"{_tensor(detail)} holds no finite value"
        return _nothing(title, sentence, "There is nothing to quantize.", dark, height)
    colors = _palette(dark)
    shares = trial.clipped_low_fraction, trial.clipped_high_fraction
    lost = f"{_percent(sum(shares))} is clipped" if sum(shares) else "nothing is clipped"
    said = f"{_escape(trial.scheme.title)} gives {_db(trial.sqnr_db)}: {lost}"
    y_axis, floor = _count_axis(float(counts.max()), log)
    view = _lab_view(edges, trial)
    figure = _figure(title, said, dark, height, _lab_notes(trial), margin={"t": 88, "b": 48})
    figure.update_layout(hovermode="x", legend_y=1.1)  # the handles' labels stand between
    figure.update_yaxes(**y_axis)
    x_title = "value, in the tensor's own units"
    figure.update_xaxes(range=list(view), title_text=x_title, ticklabelstandoff=6)
    line = {"width": 0.5, "color": colors.float_model}
    filled = {"fill": "tozeroy", "fillcolor": _fade(colors.float_model, 0.55)}
    _add_outline(figure, "float", edges, counts, floor, line=line, **filled)
    lossy = ERROR_COLORS[0]
    for side, end, share in zip(("below", "above"), (trial.clip_low, trial.clip_high), shares,
                                strict=True):  # fmt: skip
        ends, heights, numbers = _beyond_end(edges, counts, end, above=side == "above")
        if not share or not numbers.any():
            continue
        y = np.maximum(heights, floor).tolist()
        true = {"x": ((ends[:-1] + ends[1:]) / 2).tolist(), "y": numbers.tolist()}
        hover = [f"{_real(a)} to {_real(b)}: clipped" for a, b in pairwise(ends.tolist())]
        figure.add_scatter(
            x=ends.tolist(),
            y=[*y, y[-1]],
            mode="lines",
            name=f"clipped {side}",
            line={"shape": "hv", "width": 1, "color": lossy},
            fill="tozeroy",
            fillcolor=_fade(lossy, 0.75),
            hovertext=[*hover, hover[-1]],
            hovertemplate=_HOVER,
            meta=true,
        )
    levels = trial.levels[(trial.levels >= view[0]) & (trial.levels <= view[1])].tolist()
    if 0 < len(levels) <= MOST_LAB_LEVELS:
        line = {"width": 1, "color": _fade(colors.quantized, 0.8)}
        ticks = {"symbol": "line-ns", "size": 12, "line": line}
        _decorate(figure, "levels", levels, [floor] * len(levels), "markers", marker=ticks)
    for end, (handle, share) in enumerate(zip((trial.low, trial.high), shares, strict=True)):
        inside = view[0] <= handle <= view[1]
        if inside:
            outer = view[end]
            veil = {"fillcolor": _fade(colors.accent, 0.1), "line_width": 0, "layer": "below"}
            figure.add_vrect(x0=min(outer, handle), x1=max(outer, handle), **veil)
            figure.add_vline(x=handle, line={"color": colors.accent, "width": 2})
        _label_end(figure, dark, end, ("low", "high")[end], handle, share, view)
    _add_outside(figure, outside, edges, dark)
    return figure


def scheme_bars(
    rows: Sequence[SchemeRow],
    dark: bool = False,
    *,
    selected: str = "",
    title: str | None = None,
) -> go.Figure:
    """SQNR of one tensor under each scheme, best first; published mistakes above what was meant.

    Args:
        rows: one per scheme.
        dark: for a dark background.
        selected: name of the scheme to mark.
        title: replaces the sentence.
    """
    if not rows:
        note = "Choose at least one scheme."
        return _nothing(title, "No scheme is compared", note, dark, 160)
    colors = _palette(dark)
    ordered = sorted(rows, key=lambda r: -_sort_key((r.correct or r.published).sqnr_db))
    # Name, label, its figure, what is wrong with it.
    bars: list[tuple[str, str, Trial, str]] = []
    for row in ordered:
        name, label = row.scheme.name, row.scheme.title
        if row.correct is None:
            bars.append((name, label, row.published, ""))
            continue
        bars.append((name, f"{label}, published", row.published, row.scheme.error))
        bars.append((row.correct.scheme.name, f"{label}, correct", row.correct, ""))
    numbers = [each.sqnr_db for _, _, each, _ in bars]
    first = ordered[0]
    best = (first.correct or first.published).sqnr_db
    sentence = f"{_escape(first.scheme.title)} is best: {_db(best)}"
    alike = sum((r.correct or r.published).sqnr_db > best - 0.1 for r in ordered) - 1
    if alike > 0 and math.isfinite(best):
        sentence = f"{sentence}, {alike} other{'s' * (alike > 1)} within 0.1 dB"
    if all(v == math.inf for v in numbers):
        sentence = "Every scheme is exact"
    wrong = any(error for *_, error in bars)
    notes = "hatched: as published, with a mistake" if wrong else f"{len(bars)} schemes"
    axis = _DecibelAxis.of(numbers)
    labels = [_escape(label) for _, label, _, _ in bars]
    left = int(min(380, 20 + 6.2 * max(len(html.unescape(t)) for t in labels)))
    height, margin = 112 + 19 * len(bars), {"l": left, "t": 58, "r": 24}
    figure = _figure(title, sentence, dark, height, notes, margin=margin, showlegend=False)
    bottom, top = axis.range
    steps = [v for v in range(int(axis.low), int(axis.high) + 1) if v % 20 == 0]
    db_range = [bottom, top + 0.14 * (top - bottom)]
    figure.update_xaxes(range=db_range, tickvals=steps, title_text="SQNR, dB")
    places = list(range(len(bars)))
    figure.update_yaxes(tickvals=places, ticktext=labels, range=[len(bars) - 0.4, -0.6])
    figure.update_yaxes(showgrid=False, tickfont_color=colors.ink)
    figure.update_layout(bargap=0.3)
    hover = [
        f"<b>{text}</b><br>{_db(each.sqnr_db)} · {_percent(each.clipped_fraction)} clipped<br>"
        f"{_escape(each.scheme.formula)}" + (f"<br>{_escape(error)}" if error else "")
        for text, (_, _, each, error) in zip(labels, bars, strict=True)
    ]
    rims = [2.0 if name == selected else 0.0 for name, *_ in bars]
    marker = {
        "color": [error_color(db) for db in numbers],
        "line": {"width": rims, "color": colors.ink},
        "pattern": {"shape": ["/" if error else "" for *_, error in bars], "size": 6},
    }
    drawn = [axis.y(db) for db in numbers]
    picked = _picked([name for name, *_ in bars], hover, {"x": numbers, "y": labels})
    figure.add_bar(x=drawn, y=places, orientation="h", marker=marker, name="SQNR", **picked)
    where = {"xref": "x", "yref": "y", "xanchor": "left", "xshift": 2, "bgcolor": _CLEAR}
    for place, at, number in zip(places, drawn, numbers, strict=True):
        _label(figure, dark, _db(number), max(at, 0.0), place, **where)
    return figure


# --- the numbers of a picture ------------------------------------------------------------------


_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def _cell(value: Any) -> str:
    """A number as the JSON reports write it; infinities and NaN in words."""
    if value is None:
        return ""
    if isinstance(value, float):
        if math.isfinite(value):
            return f"{value:.12g}"
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    # A spreadsheet would take such a name for a formula.
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else str(value)


def figure_csv(figure: go.Figure) -> str:
    """The picture's numbers as CSV with a header: trace, x, y, z (where there is one) and text.

    One row per point, or per cell of a map that holds something. The numbers are the true ones also
    where a point is drawn on a rail; lines that only repeat points are left out.
    """
    rows: list[tuple[Any, ...]] = []
    mapped = False
    for trace in figure.data:
        if trace.meta == _DECORATION:
            continue
        true = trace.meta or {}
        x, y = (true.get(key, getattr(trace, key)) for key in ("x", "y"))
        if trace.type == "heatmap":
            mapped = True
            cells = ((j, i, z) for i, row in enumerate(true["z"]) for j, z in enumerate(row) if z)
            rows += [(trace.name, x[j], y[i], z, "") for j, i, z in cells]
            continue
        texts = trace.customdata if trace.customdata is not None else [""] * len(x)
        third = true.get("z", [None] * len(x))
        mapped |= "z" in true
        for at, value, z, text in zip(x, y, third, texts, strict=True):
            if at is not None and value is not None:
                rows.append((trace.name, at, value, z, text))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    kept = (0, 1, 2, 3, 4) if mapped else (0, 1, 2, 4)
    writer.writerow([("trace", "x", "y", "z", "text")[i] for i in kept])
    writer.writerows([_cell(row[i]) for i in kept] for row in rows)
    return out.getvalue()
