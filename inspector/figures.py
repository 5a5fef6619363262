"""Record -> Plotly figure, one function per figure; the only module that imports Plotly.

No error is computed here: a figure takes what the records say, and its title states what is to be
seen in it. Numbers that have no place on an axis keep their meaning: an infinite SQNR lies on a
rail labelled "exact", a not finite one on a rail below, and values far outside the usual decibels
on rails of their own, so that one of them does not flatten the rest. Where a point is drawn
elsewhere than its number, the number itself travels in the trace's `meta`; `figure_csv` writes
that one.

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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

if TYPE_CHECKING:  # the records only: drawing must not load what runs models
    from inspector.comparison import ActivationError, Comparison, OutputError, SliceError

ERROR_STEPS: tuple[float, ...] = (10.0, 20.0, 30.0, 40.0)
ERROR_COLORS: tuple[str, ...] = ("#2a59c0", "#6077a8", "#8b8e90", "#b5a765", "#dcc54a")
"""Worst first: below 10 dB, 10 to 20, 20 to 30, 30 to 40, and 40 dB and more."""
NO_FIGURE_COLOR = "#a1a1aa"

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
DEPTH_HEIGHT = 340
MAX_CHANNELS = 64
WORST_CHANNELS = 32
MAX_SLICES = 24
MAX_LEVELS = 512

_CLEAR = "rgba(0,0,0,0)"
_LABEL_SIZE = 11
_LABEL_CHAR_PX = 6.4
_LABEL_LINE_PX = 15.0
_TICK_PX = 12.0
_MOST_FALLS = 4
_MOST_OUTPUT_LABELS = 9
# A fall is a finding where it is at least half a bit and ends where one looks closer.
_FALL_DB = 3.0
_FALL_BELOW_DB = 30.0
_PLAIN_DB = 45.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Palette:
    float_model: str
    quantized: str
    excluded: str
    ink: str
    muted: str
    grid: str
    ground: str
    hover: str


_LIGHT = _Palette(
    float_model="#475569",
    quantized="#d97706",
    excluded="#7c3aed",
    ink="#0f172a",
    muted="#64748b",
    grid="rgba(100,116,139,0.18)",
    ground="rgba(255,255,255,0.82)",
    hover="#ffffff",
)
_DARK = _Palette(
    float_model="#94a3b8",
    quantized="#f59e0b",
    excluded="#7c3aed",
    ink="#e2e8f0",
    muted="#94a3b8",
    grid="rgba(148,163,184,0.16)",
    ground="rgba(15,23,42,0.78)",
    hover="#1e293b",
)


def _palette(dark: bool) -> _Palette:
    return _DARK if dark else _LIGHT


def _fade(color: str, opacity: float) -> str:
    """A hex colour as ``rgba(...)``."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"


def error_color(db: float | None) -> str:
    """The hex colour of an SQNR, the same in every chart, table and graph, light and dark.

    Worst below 10 dB, best from 40 dB (also exact). nan counts as worst, as in `metrics`; None, no
    figure at all, is a neutral grey.
    """
    if db is None:
        return NO_FIGURE_COLOR
    if math.isnan(db):
        return ERROR_COLORS[0]
    return ERROR_COLORS[sum(db >= step for step in ERROR_STEPS)]


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
    """Text that Plotly shows as it is: its labels are a subset of HTML."""
    return html.escape(text, quote=False)


def _name(name: str, width: int = 28) -> str:
    return _escape(short_name(name, width))


def _db(value: float | None) -> str:
    if value is None:
        return "–"
    if math.isnan(value):
        return "not finite"
    if math.isinf(value):
        return "exact" if value > 0 else "−∞ dB"
    return f"{value:.1f} dB".replace("-", "−")


def _real(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


def _percent(fraction: float) -> str:
    """A share as ``"12.3 %"``; what is not quite none or all is not rounded to it."""
    if fraction <= 0:
        return "0 %"
    if fraction < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= fraction < 1:
        return "> 99.9 %"
    return "100 %" if fraction >= 1 else f"{100 * fraction:.1f} %"


def _distinct(names: Sequence[str], width: int) -> list[str]:
    """The names, escaped and shortened to `width`, or to as much more as keeps them apart."""
    for wide in range(width, 3 * width, 4):
        shown = [short_name(name, wide) for name in names]
        if len(set(shown)) == len(set(names)):
            break
    return [_escape(name) for name in shown]


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
    axis = {
        "gridcolor": colors.grid,
        "linecolor": colors.muted,
        "showline": False,
        "zeroline": False,
        "ticks": "",
        "tickfont": {"size": _LABEL_SIZE, "color": colors.muted},
        "title": {"font": {"size": 12, "color": colors.muted}, "standoff": 8},
        "automargin": False,
    }
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 12, "color": colors.ink},
            "paper_bgcolor": _CLEAR,
            "plot_bgcolor": _CLEAR,
            "colorway": [colors.float_model, colors.quantized, colors.excluded],
            "title": {
                "x": 0,
                "xref": "container",
                "xanchor": "left",
                "y": 1,
                "yref": "container",
                "yanchor": "top",
                "pad": {"t": 8, "l": 8},
                "font": {"size": 14, "weight": 600, "color": colors.ink},
            },
            "margin": {"l": 60, "r": 16, "t": 64, "b": 44, "pad": 0},
            "hoverlabel": {
                "bgcolor": colors.hover,
                "bordercolor": colors.muted,
                "font": {"family": FONT, "size": 12, "color": colors.ink},
                "align": "left",
                "namelength": -1,
            },
            "legend": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": 1,
                "yanchor": "bottom",
                "bgcolor": _CLEAR,
                "font": {"size": _LABEL_SIZE, "color": colors.muted},
                "itemsizing": "constant",
            },
            "modebar": {
                "bgcolor": _CLEAR,
                "color": colors.muted,
                "activecolor": colors.ink,
            },
            "xaxis": axis,
            "yaxis": axis,
            "hovermode": "closest",
        }
    )


def _figure(title: str, dark: bool, *, height: int, subtitle: str = "", **layout: Any) -> go.Figure:
    """An empty figure in the one frame; `title` and `subtitle` are already escaped."""
    place = {}
    if subtitle:
        # Plotly's own subtitle stands a whole line below the title, and a second line of the
        # title moves the first one up.
        style = f"font-size:12px;font-weight:400;color:{_palette(dark).muted}"
        title = f'{title}<br><span style="{style}">{subtitle}</span>'
        place = {"pad": {"t": 18, "l": 8}}
    figure = go.Figure()
    figure.update_layout(
        template=template(dark), title={"text": title, **place}, height=height, **layout
    )
    return figure


def _nothing(title: str, note: str, dark: bool, *, height: int) -> go.Figure:
    """What is shown where there is nothing to draw: a sentence, and why, in the same frame."""
    figure = _figure(title, dark, height=height)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.add_annotation(
        x=0.5,
        y=0.5,
        xref="paper",
        yref="paper",
        showarrow=False,
        text=note,
        font={"size": 13, "color": _palette(dark).muted},
    )
    return figure


def _label(figure: go.Figure, dark: bool, text: str, **where: Any) -> None:
    """A small text on a veil of the background, so that it reads over data."""
    colors = _palette(dark)
    options: dict[str, Any] = {
        "showarrow": False,
        "font": {"size": _LABEL_SIZE, "color": colors.ink},
        "bgcolor": colors.ground,
        "borderpad": 2,
    }
    figure.add_annotation(text=text, **(options | where))


def _pointer(figure: go.Figure, dark: bool, text: str, **where: Any) -> None:
    """A small text with a thin line to the point (x, y) it names; ax, ay in pixels."""
    arrow = {"showarrow": True, "arrowhead": 0, "arrowwidth": 1, "arrowcolor": _palette(dark).muted}
    _label(figure, dark, text, **(arrow | {"yanchor": "middle", "standoff": 5} | where))


def _level(figure: go.Figure, y: float, color: str, *, width: float = 1.5, **options: Any) -> None:
    """A line across the whole width at `y`."""
    line = {"color": color, "width": width, "dash": options.pop("dash", "solid")}
    figure.add_shape(type="line", xref="paper", x0=0, x1=1, y0=y, y1=y, line=line, **options)


def _picked(
    names: Sequence[Any], hover: Sequence[str], true: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    """What every clickable trace carries: the names to select, the hover texts, the numbers."""
    return {
        "customdata": list(names),
        "hovertext": list(hover),
        "hovertemplate": "%{hovertext}<extra></extra>",
        "meta": dict(true),
        # Clicking selects a point; Plotly would then fade all others.
        "unselected": {"marker": {"opacity": 1}},
    }


_DECORATION = "decoration"


# --- decibels on an axis ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _DecibelAxis:
    """Where decibels are drawn: a linear part from `low` to `high` and rails above and below.

    Attributes:
        low, high: ends of the linear part, multiples of 10.
        over, exact, under, nonfinite: whether the rail of that name is needed.
        floor_row: a row at the very bottom is reserved (ticks of excluded nodes).
    """

    low: float
    high: float
    over: bool
    exact: bool
    under: bool
    nonfinite: bool
    floor_row: bool

    LOWEST = -20.0
    HIGHEST = 80.0

    @classmethod
    def of(cls, values: Iterable[float | None], *, floor_row: bool = False) -> _DecibelAxis:
        given = [v for v in values if v is not None]
        finite = [v for v in given if math.isfinite(v)]
        top = max([v for v in finite if v <= cls.HIGHEST], default=0.0)
        bottom = min([v for v in finite if v >= cls.LOWEST], default=0.0)
        return cls(
            low=min(0.0, 10.0 * math.floor(bottom / 10)),
            high=max(50.0, 10.0 * math.ceil(top / 10)),
            over=any(v > cls.HIGHEST for v in finite),
            exact=any(v == math.inf for v in given),
            under=any(v < cls.LOWEST for v in given),
            nonfinite=any(math.isnan(v) for v in given),
            floor_row=floor_row,
        )

    @property
    def gap(self) -> float:
        return 0.08 * (self.high - self.low)

    @property
    def exact_y(self) -> float:
        return self.high + self.gap * (1 + self.over)

    @property
    def nonfinite_y(self) -> float:
        return self.low - self.gap * (1 + self.under)

    @property
    def floor_y(self) -> float:
        return self.low - self.gap * (1 + self.under + self.nonfinite)

    @property
    def range(self) -> tuple[float, float]:
        top = self.high + self.gap * (0.6 + self.over + self.exact)
        rows = self.under + self.nonfinite + self.floor_row
        bottom = self.low - self.gap * (rows + (0.6 if rows or self.low < 0 else 0.0))
        return bottom, top

    def y(self, db: float) -> float:
        """Where this figure is drawn."""
        if math.isnan(db):
            return self.nonfinite_y
        if db == math.inf:
            return self.exact_y
        if db > self.HIGHEST:
            return self.high + self.gap
        if db < self.LOWEST:
            return self.low - self.gap
        return db

    def pixels(self, y: float, height: float) -> float:
        """Distance from the top of a plot of this height, in pixels."""
        bottom, top = self.range
        return (top - y) / (top - bottom) * height

    def layout(self, title: str, height: float) -> dict[str, Any]:
        """Range, ticks and title for a Plotly axis of this many pixels."""
        bottom, top = self.range
        pixels = height / (top - bottom)
        step = 10 if 10 * pixels >= 20 else 20
        rails = [
            (y, text)
            for needed, y, text in (
                (self.over, self.high + self.gap, f">{self.HIGHEST:g}"),
                (self.exact, self.exact_y, "exact"),
                (self.under, self.low - self.gap, f"<−{-self.LOWEST:g}"),
                (self.nonfinite, self.nonfinite_y, "NaN"),
            )
            if needed
        ]
        ticks = [
            (float(v), f"{v}".replace("-", "−"))
            for v in range(int(self.low), int(self.high) + 1)
            if v % step == 0 and all(abs(v - y) * pixels >= _TICK_PX for y, _ in rails)
        ]
        ticks += rails
        return {
            "range": [bottom, top],
            "tickvals": [y for y, _ in ticks],
            "ticktext": [text for _, text in ticks],
            "title": {"text": title},
        }

    def bands(self) -> list[dict[str, Any]]:
        """Shapes: one faint band per error step."""
        bottom, top = self.range
        edges = [bottom, *(s for s in ERROR_STEPS if bottom < s < top), top]
        return [
            {
                "type": "rect",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": low,
                "y1": high,
                "fillcolor": error_color(low if low >= ERROR_STEPS[0] else -math.inf),
                "opacity": 0.09,
                "line": {"width": 0},
                "layer": "below",
            }
            for low, high in pairwise(edges)
        ]


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near to the wanted ones as `gap` between neighbours and the two ends allow."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = [0.0] * len(wanted)
    previous = -math.inf
    for i in order:
        previous = places[i] = max(wanted[i], previous + gap, low)
    following = high + gap
    for i in reversed(order):
        following = places[i] = min(places[i], following - gap)
    return places


@dataclass(frozen=True, kw_only=True, slots=True)
class _Spot:
    """A point to be labelled: its share of the width, its pixels from the top, its text."""

    x: float
    y: float
    text: str


def _place_labels(
    spots: Sequence[_Spot],
    points: NDArray[np.float64],
    widths: Sequence[float],
    height: float,
) -> list[tuple[float, float, str] | None]:
    """For each spot the label's offset in pixels and its anchor, or None where it finds no room.

    A label overlaps no other and does not leave the plot, at any of the `widths`; of the places
    that remain it takes the one that covers the fewest `points` (share of width, pixels from top).
    """
    taken: list[list[tuple[float, float, float, float]]] = [[] for _ in widths]
    places: list[tuple[float, float, str] | None] = []
    for spot in spots:
        wide = _LABEL_CHAR_PX * len(spot.text) + 8
        best: tuple[float, tuple[float, float, str]] | None = None
        for dy in (24, 42, 62, 84, 108, -24, -42, -62, -84, -108):
            for anchor, dx, left in (
                ("left", 12.0, 0.0),
                ("right", -12.0, -wide),
                ("center", 0.0, -wide / 2),
            ):
                boxes = []
                covered = 0
                for width in widths:
                    x0, y0 = spot.x * width + dx + left, spot.y + dy - _LABEL_LINE_PX / 2
                    boxes.append((x0, y0, x0 + wide, y0 + _LABEL_LINE_PX))
                    inside = np.abs(points[:, 0] * width - (x0 + wide / 2)) < wide / 2
                    covered += int(
                        np.sum(inside & (np.abs(points[:, 1] - spot.y - dy) < _LABEL_LINE_PX / 2))
                    )
                fits = all(
                    box[0] >= 2 and box[2] <= width - 2 and box[1] >= 0 and box[3] <= height - 2
                    for box, width in zip(boxes, widths, strict=True)
                )
                if not fits or any(
                    box[0] < other[2] + 6
                    and other[0] < box[2] + 6
                    and box[1] < other[3] + 2
                    and other[1] < box[3] + 2
                    for box, others in zip(boxes, taken, strict=True)
                    for other in others
                ):
                    continue
                cost = covered + abs(dy) / 12 + (2.0 if dy < 0 else 0.0)
                if best is None or cost < best[0]:
                    best = (cost, (dx, float(dy), anchor))
                    chosen = boxes
        places.append(best[1] if best else None)
        if best:
            for others, box in zip(taken, chosen, strict=True):
                others.append(box)
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
        i: min(before, _PLAIN_DB) - max(record.accumulated_sqnr_db, _DecibelAxis.LOWEST)
        for i, (record, before) in enumerate(zip(activations, falls, strict=True))
        if before is not None and record.accumulated_sqnr_db < _FALL_BELOW_DB
    }
    deepest = max(depth.values(), default=0.0)
    named = [i for i in depth if depth[i] >= max(_FALL_DB, deepest / 3)]
    return sorted(named, key=lambda i: -depth[i])[:_MOST_FALLS]


def _first_break(activations: Sequence[ActivationError]) -> int | None:
    """Position of the first tensor that quantization made not finite (masks are so in float)."""
    for i, record in enumerate(activations):
        if record.nonfinite_quantized > record.nonfinite_float:
            return i
    return None


def _depth_title(
    activations: Sequence[ActivationError], falls: Sequence[float | None], worst: Sequence[int]
) -> str:
    broken = _first_break(activations)
    if broken is not None:
        return f"The values stop being finite at {_name(_node(activations[broken]), 40)}"
    if worst:
        first = activations[worst[0]]
        return (
            f"The largest fall is at {_name(_node(first), 40)}: "
            f"{_db(falls[worst[0]]).removesuffix(' dB')} to {_db(first.accumulated_sqnr_db)}"
        )
    finite = [a for a in activations if not math.isnan(a.accumulated_sqnr_db)]
    if not finite:
        return "No tensor has a finite SQNR"
    lowest = min(finite, key=lambda a: a.accumulated_sqnr_db)
    if lowest.accumulated_sqnr_db == math.inf:
        return "Both models agree exactly at every tensor"
    return (
        f"No sudden fall: the lowest tensor is {_name(_node(lowest), 40)} "
        f"with {_db(lowest.accumulated_sqnr_db)}"
    )


def _noise(db: float) -> float:
    """Noise-to-signal ratio, 0 for exact; nan counts as -20 dB, as does all below."""
    return 10 ** (-max(-20.0 if math.isnan(db) else db, -20.0) / 10)


def _depth_hover(record: ActivationError, before: float | None, excluded: bool) -> str:
    after = record.accumulated_sqnr_db
    change = _fall_db(before, after)
    if change is not None:
        fell = f"{change:.1f} dB" if change >= 0 else f"none, {-change:.1f} dB better"
    else:
        fell = "first error after an exact tensor" if before == math.inf > after else "–"
    lines = [
        f"<b>{_escape(_node(record))}</b>",
        f"{_escape(record.op_type)} · tensor {_escape(record.name)}",
        f"accumulated {_db(after)} · local {_db(record.local_sqnr_db)}",
        f"fall: {fell}",
    ]
    if record.nonfinite_float or record.nonfinite_quantized:
        lines.append(
            f"not finite: {record.nonfinite_float:,} float, "
            f"{record.nonfinite_quantized:,} quantized values"
        )
    if excluded:
        lines.append("left in float")
    return "<br>".join(lines)


def _dot_size(count: int) -> float:
    return 7.0 if count <= 80 else 5.5 if count <= 400 else 4.0


def _output_labels(outputs: Sequence[OutputError]) -> list[tuple[float, str]]:
    """Figure and text of the outputs to be named at the right, the worst where there are many."""
    shown = list(outputs)
    if len(shown) > _MOST_OUTPUT_LABELS:
        shown = sorted(shown, key=lambda o: _sort_key(o.sqnr_db))[:_MOST_OUTPUT_LABELS]
    names = _distinct([o.name for o in shown], 16)
    return [(o.sqnr_db, f"{n} {_db(o.sqnr_db)}") for o, n in zip(shown, names, strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _DepthPlot:
    """The frame of the two pictures by depth: tensors from left to right, outputs at the right."""

    figure: go.Figure
    axis: _DecibelAxis
    count: int
    output_x: float
    x_range: tuple[float, float]
    side_margins: int
    dark: bool

    PLOT_HEIGHT = DEPTH_HEIGHT - 62.0 - 44.0

    @classmethod
    def of(
        cls,
        title: str,
        axis: _DecibelAxis,
        count: int,
        outputs: Sequence[OutputError],
        *,
        y_title: str,
        revision: str,
        dark: bool,
    ) -> _DepthPlot:
        labels = _output_labels(outputs)
        longest = max((len(html.unescape(text)) for _, text in labels), default=0)
        right = int(min(230, 44 + _LABEL_CHAR_PX * longest)) if labels else 16
        pad = max(0.6, 0.015 * count)
        output_x = count - 1 + (1.4 * pad if labels else 0.0)
        x_range = (-pad, output_x + 0.6 * pad)
        figure = _figure(
            title,
            dark,
            height=DEPTH_HEIGHT,
            margin={"l": 60, "r": right, "t": 62, "b": 44},
            shapes=axis.bands(),
            uirevision=revision,
            hoverdistance=24,
            yaxis=axis.layout(y_title, cls.PLOT_HEIGHT),
        )
        figure.update_xaxes(
            range=list(x_range),
            title={"text": "tensor, in topological order"},
            showgrid=False,
            tickformat="d",
            **({"tickvals": list(range(count))} if count <= 12 else {"nticks": 12}),
        )
        wanted = [axis.pixels(axis.y(db), cls.PLOT_HEIGHT) for db, _ in labels]
        places = _spread(wanted, _LABEL_LINE_PX, 4, cls.PLOT_HEIGHT - 4)
        for (db, text), at, place in zip(labels, wanted, places, strict=True):
            _pointer(
                figure,
                dark,
                text,
                x=output_x,
                y=axis.y(db),
                ax=26,
                ay=place - at,
                xanchor="left",
                standoff=7,
                bgcolor=_CLEAR,
            )
        return cls(
            figure=figure,
            axis=axis,
            count=count,
            output_x=output_x,
            x_range=x_range,
            side_margins=60 + right,
            dark=dark,
        )

    def marks(
        self,
        name: str,
        x: Sequence[float],
        values: Sequence[float],
        names: Sequence[str],
        hover: Sequence[str],
        *,
        marker: Mapping[str, Any],
        y: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        """Clickable marks at their decibels, or at `y`."""
        drawn = [self.axis.y(db) for db in values] if y is None else list(y)
        self.figure.add_scatter(
            x=x,
            y=drawn,
            mode="markers",
            marker=marker,
            name=name,
            cliponaxis=False,
            **_picked(names, hover, {} if drawn == list(values) else {"y": list(values)}),
            **options,
        )

    def line(
        self,
        name: str,
        values: Sequence[float | None],
        names: Sequence[str],
        hover: Sequence[str],
        *,
        opacity: float = 1.0,
        width: float = 2.0,
    ) -> None:
        """A line through the tensors and one mark per tensor, in order; None where it has none.

        Exact tensors lie on their rail and the line passes them over; NaN breaks it.
        """
        colors = _palette(self.dark)
        color = _fade(colors.quantized, opacity) if opacity < 1 else colors.quantized
        drawn = [(i, v) for i, v in enumerate(values) if v != math.inf]
        self.figure.add_scatter(
            x=[i for i, _ in drawn],
            y=[None if v is None or math.isnan(v) else self.axis.y(v) for _, v in drawn],
            mode="lines",
            line={"color": color, "width": width if self.count <= 400 else 0.75 * width},
            hoverinfo="skip",
            name=name,
            legendgroup=name,
            meta=_DECORATION,
        )
        given = [(i, v) for i, v in enumerate(values) if v is not None]
        size = max(_dot_size(self.count) - 2.5, 2.5)
        self.marks(
            name,
            [i for i, _ in given],
            [v for _, v in given],
            [names[i] for i, _ in given],
            [hover[i] for i, _ in given],
            marker={
                "size": [7.0 if math.isnan(v) else size for _, v in given],
                "symbol": ["x" if math.isnan(v) else "circle" for _, v in given],
                "color": [colors.ink if math.isnan(v) else color for _, v in given],
                "line": {"width": 0},
            },
            legendgroup=name,
            showlegend=False,
        )

    def outputs(
        self, name: str, outputs: Sequence[OutputError], *, faint: bool = False, **options: Any
    ) -> None:
        """Diamonds at the right."""
        if not outputs:
            return
        amber = _fade(_palette(self.dark).quantized, 0.7 if faint else 1.0)
        figures = [o.sqnr_db for o in outputs]
        self.marks(
            name,
            [self.output_x] * len(outputs),
            figures,
            [o.name for o in outputs],
            [_output_hover(o, name) for o in outputs],
            marker={
                "symbol": "diamond-open" if faint else "diamond",
                "size": 11,
                "color": amber if faint else [error_color(db) for db in figures],
                "line": {"width": 1.5, "color": amber},
            },
            **options,
        )

    def share(self, x: Any) -> Any:
        """The share of the plot's width left of x."""
        return (x - self.x_range[0]) / (self.x_range[1] - self.x_range[0])


def _output_hover(output: OutputError, name: str) -> str:
    lines = [
        f"<b>{_escape(output.name)}</b> ({name})",
        f"simulated {_db(output.sqnr_db)} · deployed {_db(output.deployed_sqnr_db)}",
        f"worst channel {_db(output.worst_channel_sqnr_db)}"
        f" · median {_db(output.median_channel_sqnr_db)}",
        f"worst sample {_db(output.worst_sample_sqnr_db)} {_escape(output.worst_sample)}".rstrip(),
    ]
    return "<br>".join(lines)


def error_by_depth(
    comparison: Comparison,
    *,
    selected: str | None = None,
    excluded: Collection[str] = (),
    parents: Mapping[str, Collection[str]] | None = None,
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
        title: a sentence in place of the derived one.
        dark: for a dark background.
    """
    activations = comparison.activations
    if not activations:
        return _nothing(
            _escape(title) if title else "No error by depth: no activation was matched",
            "See the unmatched tensors for the reasons.",
            dark,
            height=DEPTH_HEIGHT,
        )
    colors = _palette(dark)
    names = [a.name for a in activations]
    accumulated = [a.accumulated_sqnr_db for a in activations]
    local = {i: a.local_sqnr_db for i, a in enumerate(activations) if a.local_sqnr_db is not None}
    in_float = [i for i, a in enumerate(activations) if a.node and a.node in excluded]
    falls = _falls(activations, parents)
    worst = _worst_falls(activations, falls)
    hover = [
        _depth_hover(a, before, i in in_float)
        for i, (a, before) in enumerate(zip(activations, falls, strict=True))
    ]
    axis = _DecibelAxis.of(
        [*accumulated, *local.values(), *(o.sqnr_db for o in comparison.outputs)],
        floor_row=bool(in_float),
    )
    plot = _DepthPlot.of(
        _escape(title) if title else _depth_title(activations, falls, worst),
        axis,
        len(activations),
        comparison.outputs,
        y_title="SQNR, dB",
        revision=comparison.float_model.sha256,
        dark=dark,
    )
    plot.marks(
        "local (own Q/DQ)",
        list(local),
        list(local.values()),
        [names[i] for i in local],
        [hover[i] for i in local],
        marker={
            "size": _dot_size(len(activations)),
            "color": [error_color(db) for db in local.values()],
            "line": {
                "width": 0.75 if len(activations) <= 400 else 0.25,
                "color": _fade(colors.ink, 0.55),
            },
        },
    )
    plot.line("accumulated", accumulated, names, hover)
    plot.outputs("output", comparison.outputs)
    if in_float:
        plot.marks(
            "left in float",
            in_float,
            [accumulated[i] for i in in_float],
            [names[i] for i in in_float],
            [hover[i] for i in in_float],
            y=[axis.floor_y] * len(in_float),
            marker={
                "symbol": "line-ns",
                "size": 11,
                "line": {"width": 3, "color": colors.excluded},
                "color": colors.excluded,
            },
        )
    if selected in names:
        at = names.index(selected)
        plot.figure.add_vline(
            x=at, line={"color": _fade(colors.ink, 0.35), "width": 1}, layer="below"
        )
        plot.figure.add_scatter(
            x=[at],
            y=[axis.y(accumulated[at])],
            mode="markers",
            marker={
                "symbol": "circle-open",
                "size": 15,
                "color": colors.ink,
                "line": {"width": 2},
            },
            hoverinfo="skip",
            showlegend=False,
            name="selected",
            meta=_DECORATION,
        )
    _name_falls(plot, activations, falls, worst)
    return plot.figure


def _name_falls(
    plot: _DepthPlot,
    activations: Sequence[ActivationError],
    falls: Sequence[float | None],
    worst: Sequence[int],
) -> None:
    """Labels at the worst falls, and at the first tensor that is not finite."""
    broken = _first_break(activations)
    named = [*([broken] if broken is not None else []), *(i for i in worst if i != broken)]

    def pixels(db: float) -> float:
        return plot.axis.pixels(plot.axis.y(db), plot.PLOT_HEIGHT)

    spots = []
    for i in named:
        after = activations[i].accumulated_sqnr_db
        change = _fall_db(falls[i], after)
        fell = "not finite" if i == broken else _db(after if change is None else -change)
        text = f"{short_name(_node(activations[i]), 26)}  {fell}"
        spots.append(_Spot(x=plot.share(i), y=pixels(after), text=text))
    # What labels should not cover: the dots, and the line between its points.
    drawn = np.array([pixels(a.accumulated_sqnr_db) for a in activations])
    steps = np.arange(0, len(drawn), 1 / 6 if len(drawn) <= 400 else 1)
    line = np.column_stack([plot.share(steps), np.interp(steps, np.arange(len(drawn)), drawn)])
    local = [
        (plot.share(i), pixels(a.local_sqnr_db))
        for i, a in enumerate(activations)
        if a.local_sqnr_db is not None
    ]
    places = _place_labels(
        spots,
        np.vstack([line, np.array(local).reshape(-1, 2)]),
        [width - plot.side_margins for width in (760, 900, 1200, 1600)],
        plot.PLOT_HEIGHT,
    )
    for i, spot, place in zip(named, spots, places, strict=True):
        if place is not None:
            _pointer(
                plot.figure,
                plot.dark,
                _escape(spot.text),
                x=i,
                y=plot.axis.y(activations[i].accumulated_sqnr_db),
                ax=place[0],
                ay=place[1],
                xanchor=place[2],
                borderpad=1,
            )


def before_after(
    before: Comparison,
    after: Comparison,
    dark: bool = False,
    *,
    title: str | None = None,
) -> go.Figure:
    """Accumulated SQNR of every tensor before and after a change, by depth.

    Tensors are paired by the float model's name; one that only one side has is drawn for that
    side alone. `customdata` of every mark is the tensor's name.
    """
    records = {a.name: a for a in (*before.activations, *after.activations)}
    names = sorted(records, key=lambda name: records[name].depth)
    if not names:
        return _nothing(
            _escape(title) if title else "No tensor to compare: no activation was matched",
            "See the unmatched tensors for the reasons.",
            dark,
            height=DEPTH_HEIGHT,
        )
    old = {a.name: a.accumulated_sqnr_db for a in before.activations}
    new = {a.name: a.accumulated_sqnr_db for a in after.activations}
    outputs = [*before.outputs, *after.outputs]
    plot = _DepthPlot.of(
        _escape(title) if title else _change_title(old, new, before.outputs, after.outputs),
        _DecibelAxis.of([*old.values(), *new.values(), *(o.sqnr_db for o in outputs)]),
        len(names),
        after.outputs,
        y_title="accumulated SQNR, dB",
        revision=after.float_model.sha256,
        dark=dark,
    )
    hover = [
        f"<b>{_escape(_node(records[name]))}</b><br>tensor {_escape(name)}<br>"
        f"before {_db(old.get(name))} · after {_db(new.get(name))}"
        for name in names
    ]
    plot.line("before", [old.get(n) for n in names], names, hover, opacity=0.4, width=1.5)
    plot.line("after", [new.get(n) for n in names], names, hover, width=2.25)
    plot.outputs("output before", before.outputs, faint=True, showlegend=False)
    plot.outputs("output after", after.outputs, showlegend=False)
    return plot.figure


def _change_title(
    old: Mapping[str, float],
    new: Mapping[str, float],
    old_outputs: Sequence[OutputError],
    new_outputs: Sequence[OutputError],
) -> str:
    pairs = [(_noise(old[name]), _noise(new[name])) for name in new if name in old]
    better = sum(now < 0.977 * was for was, now in pairs)  # by more than 0.1 dB
    worse = sum(0.977 * now > was for was, now in pairs)
    tensors = f"{better} of {len(pairs)} tensors are better, {worse} worse"
    was = {o.name: o.sqnr_db for o in old_outputs}
    paired = [o for o in new_outputs if o.name in was]
    if not paired:
        return tensors
    worst = min(paired, key=lambda o: _sort_key(was[o.name]))
    which = "Output" if len(paired) == 1 else "Worst output"
    change = f"{_db(was[worst.name])} to {_db(worst.sqnr_db)}"
    return f"{which} {_name(worst.name, 24)} goes from {change}; {tensors}"


# --- one tensor: histogram, error, map ---------------------------------------------------------


def _floats(values: Any) -> NDArray[np.float64]:
    """A list of numbers, maybe absent, as an array."""
    return np.asarray([] if values is None else values, dtype=np.float64)


def _scalar(value: Any) -> float | None:
    """A scale or zero point that is one number; None where there is none or one per channel."""
    array = _floats(value).ravel()
    return float(array[0]) if array.size == 1 else None


def _count_axis(most: float, log: bool) -> tuple[dict[str, Any], float]:
    """Plotly's y axis for counts, and where a count of zero is drawn."""
    title = {"text": "values (log)" if log else "values"}
    most = max(most, 1.0)
    if not log:
        return {"title": title, "range": [0, 1.06 * most], "tickformat": "~s", "nticks": 6}, 0.0
    decades = math.ceil(math.log10(most)) + 1
    ticks = [10.0**d for d in range(0, decades + 1, 1 if decades <= 6 else 2)]
    floor = 0.6
    return {
        "type": "log",
        "title": title,
        "range": [math.log10(floor), math.log10(most) + 0.25],
        "tickvals": ticks,
        "ticktext": [_count(t) for t in ticks],
    }, floor


def _count(value: float) -> str:
    """A round count: 1, 10, 1k, 100k, 1M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _steps(
    edges: NDArray[np.float64], counts: NDArray[np.float64], floor: float
) -> tuple[list[float], list[float]]:
    """x and y of a histogram's outline (line shape "hv"); empty bins lie on the floor."""
    drawn = np.maximum(counts, floor)
    return [*edges.tolist()], [*drawn.tolist(), float(drawn[-1])]


def _histogram_trace(
    name: str, edges: NDArray[np.float64], counts: NDArray[np.float64], floor: float, **style: Any
) -> go.Scatter:
    x, y = _steps(edges, counts, floor)
    bins = [
        f"{_real(low)} to {_real(high)}: {int(n):,} {name}"
        for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    return go.Scatter(
        x=x,
        y=y,
        mode="lines",
        name=name,
        hovertext=[*bins, bins[-1]],
        hovertemplate="%{hovertext}<extra></extra>",
        meta={"x": ((edges[:-1] + edges[1:]) / 2).tolist(), "y": counts.tolist()},
        line={"shape": "hv", **style.pop("line", {})},
        **style,
    )


def _described(detail: Mapping[str, Any]) -> str:
    """Type, step and number of values, in one line."""
    parts = []
    dtype = str(detail.get("dtype") or "")
    if dtype:
        parts.append(_escape(dtype))
    scales = _floats(detail.get("scale")).ravel()
    zero_point = _scalar(detail.get("zero_point"))
    if scales.size == 1:
        parts.append(f"step {_real(float(scales[0]))}")
        if zero_point is not None:
            parts.append(f"zero point {zero_point:.0f}".replace("-", "−"))
    elif scales.size:
        parts.append(
            f"{scales.size} channel steps, {_real(float(scales.min()))} to "
            f"{_real(float(scales.max()))}"
        )
    parts.append(f"{int(detail.get('count') or 0):,} values")
    nonfinite = int(detail.get("nonfinite") or 0)
    if nonfinite:
        parts.append(f"{nonfinite:,} not finite")
    return " · ".join(parts)


def _representable(detail: Mapping[str, Any]) -> tuple[float, float] | None:
    limits = _floats(detail.get("representable"))
    if limits.size != 2 or not np.isfinite(limits).all():
        return None
    return float(limits[0]), float(limits[1])


def _saturated(detail: Mapping[str, Any]) -> tuple[float, float]:
    shares = np.nan_to_num(_floats(detail.get("saturated")))
    return (float(shares[0]), float(shares[1])) if shares.size == 2 else (0.0, 0.0)


def _histogram_title(
    detail: Mapping[str, Any], edges: NDArray[np.float64], counts: NDArray[np.float64]
) -> str:
    name = _name(str(detail.get("tensor") or "tensor"), 26)
    limits, (low, high) = _representable(detail), _saturated(detail)
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
    return f"{name} fills its range, nothing is clipped"


def _core(
    detail: Mapping[str, Any], edges: NDArray[np.float64], counts: NDArray[np.float64]
) -> tuple[float, float] | None:
    """Between which edges the middle 99.9 % of the float values lie; None where out of view."""
    below, above = int(detail.get("float_below") or 0), int(detail.get("float_above") or 0)
    total = float(counts.sum()) + below + above
    reached = below + np.cumsum(counts)
    inside = np.flatnonzero((reached > 0.0005 * total) & (reached - counts < 0.9995 * total))
    if not inside.size or max(below, above) > 0.0005 * total:
        return None
    return float(edges[inside[0]]), float(edges[inside[-1] + 1])


def _levels(
    scale: float | None,
    zero_point: float | None,
    view: tuple[float, float],
    limits: tuple[float, float],
) -> NDArray[np.float64]:
    """The representable values in view; empty where they are unknown or `MAX_LEVELS` and more."""
    low, high = max(view[0], limits[0]), min(view[1], limits[1])
    if scale is None or not scale > 0 or high < low or (high - low) / scale >= MAX_LEVELS - 1:
        return np.empty(0)
    offset = -(zero_point or 0.0) * scale
    first = math.ceil((low - offset) / scale - 1e-6)
    last = math.floor((high - offset) / scale + 1e-6)
    levels: NDArray[np.float64] = np.arange(first, last + 1, dtype=np.float64) * scale + offset
    return levels


def histogram(
    detail: Mapping[str, Any],
    *,
    log: bool = True,
    title: str | None = None,
    dark: bool = False,
) -> go.Figure:
    """How a tensor's values are spread, float against dequantized, and the grid they must fit.

    Args:
        detail: one tensor's detail as the workbench writes it.
        log: logarithmic counts; an empty bin then lies on the axis.
        title: a sentence in place of the derived one.
        dark: for a dark background.
    """
    height = 320
    edges = _floats(detail.get("edges"))
    counts, quantized = _floats(detail.get("float_counts")), _floats(detail.get("quantized_counts"))
    name = _name(str(detail.get("tensor") or "tensor"), 26)
    beyond = int(detail.get("float_below") or 0) + int(detail.get("float_above") or 0)
    if edges.size < 2 or counts.size != edges.size - 1 or not counts.sum() + beyond:
        return _nothing(
            _escape(title) if title else f"{name} holds no finite value",
            _described(detail),
            dark,
            height=height,
        )
    colors = _palette(dark)
    y_axis, floor = _count_axis(float(max(counts.max(), quantized.max(initial=0))), log)
    limits = _representable(detail)
    view = (float(edges[0]), float(edges[-1]))
    span = view[1] - view[0] or 1.0
    # A border just outside is worth the room: the unused part of the range is a finding.
    shown = (
        min([view[0], *(v for v in limits or () if v >= view[0] - 0.6 * span)]),
        max([view[1], *(v for v in limits or () if v <= view[1] + 0.6 * span)]),
    )
    room = 0.015 * (shown[1] - shown[0] or 1.0)
    x_range = (shown[0] - room, shown[1] + room)
    figure = _figure(
        _escape(title) if title else _histogram_title(detail, edges, counts),
        dark,
        height=height,
        subtitle=_described(detail),
        margin={"l": 60, "r": 20, "t": 88, "b": 48},
        hovermode="x",
        # The borders' labels stand between plot and legend.
        legend={"y": 1 + 20 / (height - 136)},
    )
    figure.update_yaxes(**y_axis)
    figure.update_xaxes(
        range=list(x_range),
        title={"text": "value, in the tensor's own units"},
        ticklabelstandoff=6,
    )
    figure.add_trace(
        _histogram_trace(
            "float",
            edges,
            counts,
            floor,
            fill="tozeroy",
            fillcolor=_fade(colors.float_model, 0.55),
            line={"width": 0.5, "color": colors.float_model},
        )
    )
    if quantized.size == edges.size - 1:
        figure.add_trace(
            _histogram_trace(
                "dequantized",
                edges,
                quantized,
                floor,
                line={"width": 1.5, "color": colors.quantized},
            )
        )
    if limits is not None:
        levels = _levels(
            _scalar(detail.get("scale")), _scalar(detail.get("zero_point")), x_range, limits
        )
        if levels.size:
            figure.add_scatter(
                x=levels.tolist(),
                y=[floor] * levels.size,
                mode="markers",
                marker={
                    "symbol": "line-ns",
                    "size": 9,
                    "line": {"width": 1, "color": _fade(colors.quantized, 0.75)},
                },
                cliponaxis=False,
                name="integer grid",
                hoverinfo="skip",
                meta=_DECORATION,
            )
        _mark_borders(figure, limits, _saturated(detail), x_range, dark)
    for side, x, anchor, text in (
        ("float_below", 0.0, "left", f"◀ {{}} below {_real(view[0])}"),
        ("float_above", 1.0, "right", f"{{}} above {_real(view[1])} ▶"),
    ):
        number = int(detail.get(side) or 0)
        if number:
            _label(
                figure,
                dark,
                text.format(f"{number:,}"),
                x=x,
                y=0.45,
                xref="paper",
                yref="paper",
                xanchor=anchor,
            )
    return figure


def _mark_borders(
    figure: go.Figure,
    limits: tuple[float, float],
    saturated: tuple[float, float],
    x_range: tuple[float, float],
    dark: bool,
) -> None:
    """The ends of the representable range as solid lines, the clipped share beside each."""
    colors = _palette(dark)
    texts = [
        f"{word} {_real(limit)}: {_percent(share)} clipped"
        for word, limit, share in zip(("from", "to"), limits, saturated, strict=True)
    ]
    places = [(limit - x_range[0]) / (x_range[1] - x_range[0]) for limit in limits]
    in_view = [0 <= p <= 1 for p in places]
    anchors = ["left" if places[0] < 0.3 else "right", "right" if places[1] > 0.7 else "left"]
    # Where labels would meet in a narrow column, the second goes inside the plot.
    needed = {("left", "right"): 0.67, ("left", "left"): 0.4, ("right", "right"): 0.4}
    crowded = places[1] - places[0] < needed.get((anchors[0], anchors[1]), 0.0)
    for i, limit in enumerate(limits):
        if in_view[i]:
            figure.add_vline(x=limit, line={"color": colors.quantized, "width": 1.5})
        text = texts[i] if in_view[i] else f"◀ {texts[i]}" if i == 0 else f"{texts[i]} ▶"
        _label(
            figure,
            dark,
            text,
            x=limit if in_view[i] else float(i),
            xref="x" if in_view[i] else "paper",
            y=1,
            yref="paper",
            xanchor=anchors[i] if in_view[i] else ("left", "right")[i],
            yanchor="top" if crowded and i == 1 else "bottom",
            font={"size": _LABEL_SIZE, "color": colors.ink if saturated[i] else colors.muted},
        )


def _share_within(
    edges: NDArray[np.float64], counts: NDArray[np.float64], limit: float, total: float
) -> float:
    """Share of `total` (> 0) in the bins that reach between -limit and +limit."""
    inside = (edges[:-1] < limit) & (edges[1:] > -limit)
    return float(counts[inside].sum()) / total


def error_histogram(
    detail: Mapping[str, Any],
    dark: bool = False,
    *,
    log: bool = True,
    title: str | None = None,
) -> go.Figure:
    """How the error (dequantized - float) is spread, in steps of the scale where there is one.

    Rounding alone stays within half a step: what lies outside was clipped or came from above.
    """
    height = 300
    edges, counts = _floats(detail.get("error_edges")), _floats(detail.get("error_counts"))
    name = _name(str(detail.get("tensor") or "tensor"), 26)
    below, above = int(detail.get("error_below") or 0), int(detail.get("error_above") or 0)
    total = float(counts.sum()) + below + above
    if edges.size < 2 or counts.size != edges.size - 1 or not total:
        return _nothing(
            _escape(title) if title else f"{name} has no finite error to show",
            _described(detail),
            dark,
            height=height,
        )
    colors = _palette(dark)
    in_steps = detail.get("error_unit") == "steps"
    within = _share_within(edges, counts, 0.5, total)
    y_axis, floor = _count_axis(float(counts.max()), log)
    centres = (edges[:-1] + edges[1:]) / 2
    unit = " steps" if in_steps else ""
    if in_steps:
        sentence = f"{_percent(within)} of the errors are within half a step"
    else:
        sentence = f"95 % of the errors are {_quantile(edges, counts, below + above)}"
    notes = [name]
    if counts.sum():
        mean = float(centres @ counts / counts.sum())
        notes.append(f"mean {mean:+.3g}{unit}".replace("-", "−"))
    if in_steps and below + above == 0 and within > 0.995:
        notes.append("what rounding alone does")
    elif in_steps:
        notes.append("the rest is clipped or carried in")
    figure = _figure(
        _escape(title) if title else sentence,
        dark,
        height=height,
        subtitle=" · ".join(notes),
        margin={"l": 60, "r": 20, "t": 68, "b": 44},
        hovermode="x",
        showlegend=False,
    )
    figure.update_yaxes(**y_axis)
    low, high = float(edges[0]), float(edges[-1])
    if in_steps:
        low, high = min(low, -0.75), max(high, 0.75)
    room = 0.015 * (high - low or 1.0)
    figure.update_xaxes(
        range=[low - room, high + room],
        title={
            "text": "dequantized − float, in steps of the scale"
            if in_steps
            else "dequantized − float, in the tensor's own units"
        },
    )
    figure.add_trace(
        _histogram_trace(
            "errors",
            edges,
            counts,
            floor,
            fill="tozeroy",
            fillcolor=_fade(colors.quantized, 0.45),
            line={"width": 1, "color": colors.quantized},
        )
    )
    if in_steps:
        for step, anchor, text in ((-0.5, "right", "−½ step"), (0.5, "left", "+½ step")):
            figure.add_vline(x=step, line={"color": colors.ink, "width": 1.25, "dash": "dot"})
            _label(
                figure,
                dark,
                text,
                x=step,
                y=1,
                yref="paper",
                xanchor=anchor,
                yanchor="bottom",
                font={"size": _LABEL_SIZE, "color": colors.muted},
            )
    else:
        figure.add_vline(x=0, line={"color": colors.muted, "width": 1, "dash": "dot"})
    for number, x, anchor, text in (
        (below, 0.0, "left", f"◀ {below:,} below {_real(float(edges[0]))}"),
        (above, 1.0, "right", f"{above:,} above {_real(float(edges[-1]))} ▶"),
    ):
        if number:
            _label(figure, dark, text, x=x, y=0.6, xref="paper", yref="paper", xanchor=anchor)
    return figure


def _quantile(edges: NDArray[np.float64], counts: NDArray[np.float64], beyond: int) -> str:
    """Within which distance of zero 95 % of the errors lie, in words."""
    reach = np.maximum(np.abs(edges[:-1]), np.abs(edges[1:]))
    order = np.argsort(reach, kind="stable")
    filled = np.cumsum(counts[order]) >= 0.95 * (counts.sum() + beyond)
    if not filled.any():
        return f"not within ±{_real(float(reach.max()))}"
    return f"within ±{_real(float(reach[order][np.argmax(filled)]))}"


def value_map(
    detail: Mapping[str, Any], dark: bool = False, *, title: str | None = None
) -> go.Figure:
    """Float × dequantized as a binned density: a staircase on the identity where all is well.

    ``map_counts[i][j]`` counts the values in float bin i and dequantized bin j.
    """
    height = 380
    x, y = _floats(detail.get("map_float_edges")), _floats(detail.get("map_quantized_edges"))
    counts = _floats(detail.get("map_counts"))
    name = _name(str(detail.get("tensor") or "tensor"), 26)
    if x.size < 2 or y.size < 2 or counts.shape != (x.size - 1, y.size - 1) or not counts.any():
        return _nothing(
            _escape(title) if title else f"{name} holds no pair of finite values",
            _described(detail),
            dark,
            height=height,
        )
    colors = _palette(dark)
    middle_x, middle_y = (x[:-1] + x[1:]) / 2, (y[:-1] + y[1:]) / 2
    cell = max(float(np.diff(x).max()), float(np.diff(y).max()))
    near = np.abs(middle_y[None, :] - middle_x[:, None]) <= cell * 1.01
    share = float(counts[near].sum() / counts.sum())
    figure = _figure(
        _escape(title) if title else f"{_percent(share)} of the values lie on the identity line",
        dark,
        height=height,
        subtitle=f"{name} · {int(counts.sum()):,} values · a cell is {_real(cell)} wide",
        margin={"l": 68, "r": 20, "t": 58, "b": 48},
        showlegend=False,
    )
    density = counts.T
    with np.errstate(divide="ignore"):
        shade = np.where(density > 0, np.log10(density), np.nan)
    most = math.ceil(float(np.nanmax(shade)))
    decades = list(range(most + 1))
    figure.add_heatmap(
        x=x.tolist(),
        y=y.tolist(),
        z=[[None if math.isnan(v) else v for v in row] for row in shade.tolist()],
        zmin=-0.3,
        zmax=max(1.0, float(most)),
        colorscale=[
            [0, _fade(colors.quantized, 0.18)],
            [0.55, _fade(colors.quantized, 0.75)],
            [1, "#7c2d12" if not dark else "#fef3c7"],
        ],
        customdata=density.astype(int).tolist(),
        hovertemplate="float %{x:.4g}<br>dequantized %{y:.4g}<br>%{customdata:,} values"
        "<extra></extra>",
        hoverongaps=False,
        colorbar={
            "title": {"text": "values", "font": {"size": _LABEL_SIZE, "color": colors.muted}},
            "tickvals": decades,
            "ticktext": [_count(10.0**d) for d in decades],
            "tickfont": {"size": _LABEL_SIZE, "color": colors.muted},
            "thickness": 10,
            "outlinewidth": 0,
            "len": 0.9,
        },
        name="values",
        meta={"x": middle_x.tolist(), "y": middle_y.tolist(), "z": density.tolist()},
    )
    ends = [max(x[0], y[0]), min(x[-1], y[-1])]
    if ends[0] < ends[1]:
        figure.add_scatter(
            x=ends,
            y=ends,
            mode="lines",
            line={"color": _fade(colors.ink, 0.7), "width": 1, "dash": "dot"},
            hoverinfo="skip",
            name="identity",
            meta=_DECORATION,
        )
    figure.update_xaxes(title={"text": "float value"}, range=[x[0], x[-1]])
    figure.update_yaxes(title={"text": "dequantized value"}, range=[y[0], y[-1]])
    return figure


# --- channels, slices, samples -----------------------------------------------------------------


def _median(values: Sequence[float]) -> float:
    """The median that lies on a value (the lower of the middle two), NaN counting as lowest."""
    return sorted(values, key=_sort_key)[(len(values) - 1) // 2]


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
        title: a sentence in place of the derived one.
        dark: for a dark background.
    """
    height = 360
    figures = [math.nan if v is None else float(v) for v in channel_sqnr_db]
    word = _escape(axis_name)
    if not figures:
        return _nothing(
            _escape(title) if title else f"There is no figure per {word}",
            "The tensor has no channel axis, or its shape differs between samples.",
            dark,
            height=height,
        )
    colors = _palette(dark)
    order = sorted(range(len(figures)), key=lambda i: _sort_key(figures[i]))
    if worst is None or not 0 <= worst < len(figures):
        worst = order[0]
    median = _median(figures)
    shown = order if len(order) <= MAX_CHANNELS else order[:WORST_CHANNELS]
    axis = _DecibelAxis.of([median, *(figures[i] for i in shown)])
    ranged = len(channel_low) == len(channel_high) == len(figures)
    if len(figures) == 1:
        sentence = f"There is one {word}: {_db(figures[0])}"
    elif all(v == math.inf for v in figures):
        sentence = f"Every {word} is exact"
    else:
        sentence = (
            f"{word[:1].upper()}{word[1:]} {worst} is worst: {_db(figures[worst])}, "
            f"the median {word} {_db(median)}"
        )
    notes = [
        f"the worst {len(shown)} of {len(figures):,}"
        if len(shown) < len(figures)
        else f"all {len(figures)}, worst first"
    ]
    if ranged:
        widths = [abs(high - low) for low, high in zip(channel_low, channel_high, strict=True)]
        typical = float(np.median(widths))
        widest = max(range(len(widths)), key=lambda i: _sort_key(widths[i]))
        if typical > 0 and widths[widest] / typical >= 4:
            notes.append(
                f"{word} {widest} is {widths[widest] / typical:.3g} times as wide as the median one"
            )
    figure = _figure(
        _escape(title) if title else sentence,
        dark,
        height=height,
        subtitle=" · ".join(notes),
        margin={"l": 60, "r": 92, "t": 70, "b": 50},
        showlegend=False,
        bargap=0.25,
        xaxis={"anchor": "y2" if ranged else "y"},
        yaxis={"domain": [0.47, 1] if ranged else [0, 1]},
    )
    places = list(range(len(shown)))
    figure.add_bar(
        x=places,
        y=[axis.y(figures[i]) for i in shown],
        marker={
            "color": [error_color(figures[i]) for i in shown],
            "line": {
                "width": [2.0 if i == worst else 0.0 for i in shown],
                "color": colors.ink,
            },
        },
        name="SQNR",
        **_picked(
            shown,
            [
                f"<b>{word} {i}</b><br>{_db(figures[i])}"
                + (
                    f"<br>range {_real(channel_low[i])} to {_real(channel_high[i])}"
                    if ranged
                    else ""
                )
                for i in shown
            ],
            {"x": shown, "y": [figures[i] for i in shown]},
        ),
    )
    panel = (height - 70 - 50) * (0.53 if ranged else 1.0)
    figure.update_yaxes(**axis.layout("SQNR, dB", panel))
    _level(figure, axis.y(median), colors.ink, width=1, dash="dot")
    _label(
        figure,
        dark,
        f"median<br>{_db(median)}",
        x=1,
        y=axis.y(median),
        xref="paper",
        xanchor="left",
        align="left",
        xshift=4,
    )
    figure.update_xaxes(
        title={"text": f"{word}, worst first"},
        tickvals=places,
        ticktext=[str(i) for i in shown],
        tickangle=-90 if len(shown) > 16 else 0,
        showgrid=False,
        range=[-0.7, max(len(shown), 6) - 0.3],
    )
    if worst in shown and len(figures) > 1:
        foot = max(axis.y(figures[worst]), 0.0)
        _pointer(
            figure,
            dark,
            f"{word} {worst}: {_db(figures[worst])}",
            x=shown.index(worst),
            y=foot,
            ax=12,
            ay=min(8 - axis.pixels(foot, panel), -14),
            xanchor="left",
            standoff=2,
        )
    if ranged:
        _add_ranges(figure, shown, worst, channel_low, channel_high, representable, word, dark)
    return figure


def _add_ranges(
    figure: go.Figure,
    shown: Sequence[int],
    worst: int,
    low: Sequence[float],
    high: Sequence[float],
    representable: tuple[float, float] | None,
    word: str,
    dark: bool,
) -> None:
    """The second panel of `channels`: each channel's range as a whisker."""
    colors = _palette(dark)
    for name, chosen, width, color in (
        ("range", [i for i in shown if i != worst], 3, colors.float_model),
        ("range of the worst", [i for i in shown if i == worst], 5, colors.ink),
    ):
        x: list[float | None] = []
        y: list[float | None] = []
        numbers: list[int | None] = []
        texts: list[str] = []
        for i in chosen:
            place = shown.index(i)
            x += [place, place, None]
            y += [float(low[i]), float(high[i]), None]
            numbers += [i, i, None]
            texts += [f"<b>{word} {i}</b><br>{_real(low[i])} to {_real(high[i])}"] * 2 + [""]
        figure.add_scatter(
            x=x,
            y=y,
            yaxis="y2",
            mode="lines+markers",
            line={"color": color, "width": width},
            marker={"symbol": "line-ew", "size": 7, "line": {"width": 1.5, "color": color}},
            name=name,
            hovertext=texts,
            hovertemplate="%{hovertext}<extra></extra>",
            meta={"x": numbers},
        )
    for limit in representable or ():
        _level(figure, limit, colors.quantized, width=1.25, yref="y2")
    if representable is not None:
        _label(
            figure,
            dark,
            f"holds to<br>{_real(representable[1])}",
            x=1,
            y=representable[1],
            xref="paper",
            yref="y2",
            xanchor="left",
            align="left",
            xshift=4,
            font={"size": _LABEL_SIZE, "color": colors.quantized},
        )
    figure.update_layout(
        yaxis2={
            "domain": [0, 0.38],
            "anchor": "x",
            "title": {"text": "float range"},
            "nticks": 4,
            "zeroline": True,
            "zerolinecolor": colors.grid,
        }
    )


def slices(
    slices: Sequence[SliceError], dark: bool = False, *, title: str | None = None
) -> go.Figure:
    """The inputs of a Concat: each part's SQNR beside the size of its values.

    Parts that share one scale but not one size are the commonest cause of a silent part.
    """
    if not slices:
        return _nothing(
            _escape(title) if title else "This tensor is not joined from parts",
            "Only a Concat has parts.",
            dark,
            height=200,
        )
    colors = _palette(dark)
    order = sorted(range(len(slices)), key=lambda i: _sort_key(slices[i].sqnr_db))
    shown = [slices[i] for i in order[:MAX_SLICES]]
    worst = shown[0]
    axis = _DecibelAxis.of([s.sqnr_db for s in shown])
    largest = max(slices, key=lambda s: _sort_key(s.absmax))
    if worst.sqnr_db == math.inf:
        sentence = "Every part arrives exactly"
    else:
        part = _name(worst.source, 30) if len(slices) > 1 else "The only part"
        arrives = "not finite" if math.isnan(worst.sqnr_db) else f"at {_db(worst.sqnr_db)}"
        sentence = f"{part} arrives {arrives}"
        if worst.absmax > 0 and largest.absmax / worst.absmax >= 2:
            ratio = f"{largest.absmax / worst.absmax:.3g}"
            sentence += f": {_name(largest.source, 24)} is {ratio} times as large"
    height = 106 + 30 * len(shown)
    sources = _distinct([s.source for s in shown], 26)
    labels = [f"{n} [{s.start}:{s.stop}]" for n, s in zip(sources, shown, strict=True)]
    left = int(min(340, 20 + 6.6 * max(len(html.unescape(t)) for t in labels)))
    figure = _figure(
        _escape(title) if title else sentence,
        dark,
        height=height,
        subtitle=f"the worst {len(shown)} of {len(slices)} parts"
        if len(shown) < len(slices)
        else "",
        margin={"l": left, "r": 20, "t": 54, "b": 46},
        showlegend=False,
        bargap=0.35,
        xaxis={"domain": [0, 0.47]},
        xaxis2={"domain": [0.53, 1], "anchor": "y"},
    )
    places = list(range(len(shown)))
    hover = [
        f"<b>{_escape(s.source)}</b><br>channels {s.start} to {s.stop - 1}<br>"
        f"{_db(s.sqnr_db)} · largest |value| {_real(s.absmax)}"
        for s in shown
    ]
    absmax = [s.absmax for s in shown]
    largest_finite = max([v for v in absmax if math.isfinite(v)], default=0.0) or 1.0
    bottom, top = axis.range
    figure.update_layout(
        # Each bar carries its figure, so the rails need no tick; the room at the right is for them.
        xaxis={
            "range": [bottom, top + 0.25 * (top - bottom)],
            "tickvals": [v for v in range(int(axis.low), int(axis.high) + 1) if v % 20 == 0],
            "title": {"text": "SQNR, dB"},
        },
        xaxis2={
            "range": [0, 1.25 * largest_finite],
            "nticks": 5,
            "title": {"text": "largest |value|, float"},
        },
        yaxis={
            "tickvals": places,
            "ticktext": labels,
            "range": [len(shown) - 0.4, -0.6],
            "showgrid": False,
            "tickfont": {"size": _LABEL_SIZE, "color": colors.ink},
        },
    )
    for name, numbers, drawn, texts, x_name, color in (
        (
            "SQNR",
            [s.sqnr_db for s in shown],
            [axis.y(s.sqnr_db) for s in shown],
            [_db(s.sqnr_db) for s in shown],
            "x",
            [error_color(s.sqnr_db) for s in shown],
        ),
        (
            "largest |value|",
            absmax,
            [v if math.isfinite(v) else 0.0 for v in absmax],
            [_real(v) for v in absmax],
            "x2",
            colors.float_model,
        ),
    ):
        figure.add_bar(
            x=drawn,
            y=places,
            orientation="h",
            xaxis=x_name,
            marker={"color": color},
            name=name,
            **_picked([s.source for s in shown], hover, {"x": numbers}),
        )
        for place, at, text in zip(places, drawn, texts, strict=True):
            _label(
                figure,
                dark,
                text,
                x=max(at, 0.0),
                y=place,
                xref=x_name,
                xanchor="left",
                xshift=2,
                bgcolor=_CLEAR,
            )
    return figure


def per_sample(
    output_error: OutputError,
    dark: bool = False,
    *,
    sample_names: Sequence[str] = (),
    title: str | None = None,
) -> go.Figure:
    """SQNR of one output, sample by sample, with the pooled figure and the median."""
    height = 280
    figures = [float(v) for v in output_error.per_sample_sqnr_db]
    name = _name(output_error.name, 30)
    if not figures:
        return _nothing(
            _escape(title) if title else f"{name} has no figure per sample",
            "No sample was compared.",
            dark,
            height=height,
        )
    colors = _palette(dark)
    pooled, median = output_error.sqnr_db, output_error.median_sample_sqnr_db
    worst = min(range(len(figures)), key=lambda i: _sort_key(figures[i]))
    names = [
        sample_names[i]
        if i < len(sample_names)
        else (output_error.worst_sample or f"sample {i}")
        if i == worst
        else f"sample {i}"
        for i in range(len(figures))
    ]
    axis = _DecibelAxis.of([pooled, median, *figures])
    lowest = figures[worst]
    if all(v == math.inf for v in figures):
        sentence = f"{name} is exact on every sample"
    elif len(figures) == 1:
        sentence = f"{name} has {_db(lowest)} on its only sample"
    elif math.isfinite(lowest) and math.isfinite(median) and median - lowest < _FALL_DB:
        sentence = f"{name} is alike on all samples: {_db(lowest)} at worst, median {_db(median)}"
    else:
        sentence = (
            f"{name} is worst on {_name(names[worst], 26)}: {_db(lowest)}, median {_db(median)}"
        )
    left, right, top, bottom = 60, 112, 44, 44
    figure = _figure(
        _escape(title) if title else sentence,
        dark,
        height=height,
        margin={"l": left, "r": right, "t": top, "b": bottom},
        shapes=axis.bands(),
        showlegend=False,
    )
    plot_height = float(height - top - bottom)
    lines = [("pooled", pooled, "solid"), ("median", median, "dot")]
    wanted = [axis.pixels(axis.y(db), plot_height) for _, db, _ in lines]
    for (word, db, dash), at, place in zip(
        lines, wanted, _spread(wanted, _LABEL_LINE_PX, 4, plot_height - 4), strict=True
    ):
        _level(figure, axis.y(db), colors.quantized, dash=dash)
        _label(
            figure,
            dark,
            f"{word} {_db(db)}",
            x=1,
            y=axis.y(db),
            xref="paper",
            xanchor="left",
            xshift=4,
            yshift=at - place,
        )
    figure.add_scatter(
        x=list(range(len(figures))),
        y=[axis.y(db) for db in figures],
        mode="markers",
        marker={
            "size": 9 if len(figures) <= 60 else _dot_size(len(figures)),
            "symbol": ["x" if math.isnan(db) else "circle" for db in figures],
            "color": [error_color(db) for db in figures],
            "line": {"width": 0.75, "color": _fade(colors.ink, 0.55)},
        },
        name="sample",
        **_picked(
            names,
            [f"<b>{_escape(n)}</b><br>{_db(db)}" for n, db in zip(names, figures, strict=True)],
            {"y": figures},
        ),
    )
    pad = max(0.6, 0.02 * len(figures))
    figure.update_yaxes(**axis.layout("SQNR, dB", plot_height))
    figure.update_xaxes(
        title={"text": "sample"},
        range=[-pad, len(figures) - 1 + pad],
        showgrid=False,
        tickformat="d",
        **({"tickvals": list(range(len(figures)))} if len(figures) <= 12 else {}),
    )
    if len(figures) > 1 and lowest != math.inf:
        at_right = worst > 0.6 * len(figures)
        low_down = axis.pixels(axis.y(lowest), plot_height) > plot_height - 30
        _pointer(
            figure,
            dark,
            _name(names[worst], 26),
            x=worst,
            y=axis.y(lowest),
            ax=-14 if at_right else 14,
            ay=-18 if low_down else 18,
            xanchor="right" if at_right else "left",
            borderpad=1,
        )
    return figure


# --- the numbers of a picture ------------------------------------------------------------------


def _cell(value: Any) -> str:
    """A number as the JSON reports write it; infinities and NaN in words."""
    if value is None:
        return ""
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return f"{value:.12g}"
    return str(value)


def figure_csv(figure: go.Figure) -> str:
    """The picture's numbers as CSV with a header: trace, x, y, z (maps only) and text.

    One row per point, or per cell of a map that holds something. The numbers are the true ones also
    where a point is drawn on a rail; lines that only repeat points are left out.
    """
    rows: list[tuple[Any, Any, Any, Any, Any]] = []
    mapped = False
    for trace in figure.data:
        if trace.meta == _DECORATION:
            continue
        true = trace.meta if isinstance(trace.meta, Mapping) else {}
        x, y = (true.get(key, getattr(trace, key, None)) for key in ("x", "y"))
        if trace.type == "heatmap":
            mapped = True
            cells = true.get("z", trace.z)
            rows += [
                (trace.name, x[j], y[i], z, "")
                for i, row in enumerate(cells)
                for j, z in enumerate(row)
                if z
            ]
            continue
        texts = true.get("text", trace.text if trace.text is not None else trace.customdata)
        listed = isinstance(texts, Sequence | np.ndarray) and not isinstance(texts, str)
        for i, (at, value) in enumerate(zip(x or (), y or (), strict=True)):
            if at is None or value is None:
                continue
            text = texts[i] if listed and texts is not None and i < len(texts) else ""
            rows.append((trace.name, at, value, None, text))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trace", "x", "y", "z", "text"] if mapped else ["trace", "x", "y", "text"])
    for name, at, value, z, text in rows:
        row = [name or "", _cell(at), _cell(value), _cell(z), _cell(text)]
        writer.writerow(row if mapped else [*row[:3], row[4]])
    return out.getvalue()
