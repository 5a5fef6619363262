"""What each node shows on the graph: figures, colours, marks, the text of its hover.

Made of a comparison and of the links between nodes as `node_links` writes them to JSON, so that
the web process needs neither models nor ONNX for it. Nothing is computed that the comparison does
not hold: a node shows the worst of the tensors it computes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inspector.comparison import (
    LOOK_DB,
    ActivationError,
    Comparison,
    judged_db,
    low_slices,
)
from inspector.error_scale import ERROR_COLORS, ERROR_STEPS, NO_FIGURE_COLOR, readable_text
from inspector.render import (
    aligned,
    format_db,
    format_percent,
    read_number,
    shorten_name,
    strict,
)

UNMATCHED, FLOAT_AGAIN, STILL_WRAPPED = "unmatched", "float again", "still wrapped"
WORSE_PART = "worse part"
_MARKS = {
    "float now": FLOAT_AGAIN,
    "still fed by Q/DQ": STILL_WRAPPED,
    "weight still quantized": STILL_WRAPPED,
}
_NAME_WIDTH = 120

Link = Mapping[str, Any]
"""A `node_links.NodeLink` as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """What a graph can be coloured by.

    Attributes:
        key: its name in the sheet.
        label: its name on the page.
        unit: "dB", or "share" for a number 0..1.
        better: "higher" or "lower": which values are good.
        steps: the limits between the five colours, ascending.
    """

    key: str
    label: str
    unit: str
    better: str
    steps: tuple[float, ...]

    def color_index(self, value: float) -> int:
        """Position in the colours, 0 for the worst and for nan. A limit counts to what is above."""
        passed = sum(value >= step for step in self.steps)
        if math.isnan(value):
            return 0
        return passed if self.better == "higher" else len(self.steps) - passed

    def badness(self, value: float) -> float:
        """Higher is worse, on a scale of its own; inf for nan."""
        if math.isnan(value):
            return math.inf
        return -value if self.better == "higher" else value

    def to_json(self) -> dict[str, Any]:
        """The measure with its colours, worst first, and the readable text colour on each."""
        return {
            "key": self.key,
            "label": self.label,
            "unit": self.unit,
            "better": self.better,
            "steps": list(self.steps),
            "colors": list(ERROR_COLORS),
            "texts": [readable_text(color) for color in ERROR_COLORS],
        }


MEASURES: tuple[Measure, ...] = (
    *(
        Measure(key=key, label=label, unit="dB", better="higher", steps=ERROR_STEPS)
        for key, label in (
            ("accumulated", "Accumulated error"),
            ("local", "Local error"),
            ("isolated", "Isolated error"),
            ("added", "Added error"),
            ("sensitivity", "Sensitivity"),
        )
    ),
    Measure(
        key="saturated", label="Saturated share", unit="share", better="lower",
        steps=(0.0001, 0.001, 0.01, 0.1),
    ),
    Measure(
        key="seconds", label="Time", unit="share", better="lower", steps=(0.01, 0.02, 0.05, 0.1)
    ),
)  # fmt: skip
_BY_KEY = {measure.key: measure for measure in MEASURES}


def sheet(
    comparison: Comparison,
    links: Mapping[str, Mapping[str, Link]],
    *,
    profile: Mapping[str, Any] | None = None,
    how: str = "simulated",
    effects: Iterable[Mapping[str, Any]] = (),
    sensitivity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything the graph shows of a run, as strict JSON.

    "measures" are `MEASURES`, "no_figure" is the colour without a figure, and "sides" holds for
    "float" and "quantized", by node, "op", "partners", "figures" by measure, "marks" and "tip"
    (lines of plain text). A measure without a figure is absent.

    A float node shows the worst of the tensors it computes, per measure; one that was fused shows
    those of the tensor it became a part of. A quantized node shows its first partner's with
    figures, a Q or DQ those of the tensor that it quantizes. The time of a node is that of its own
    model, with the Q and DQ that belong to it, as share of all node times.

    "judged" is there where the node ranks by less than its accumulated SQNR: that of a part which
    it joins, dB.

    Marks: "worse part" for a node that joins one far below the whole; "unmatched" for a float node
    whose tensors are neither compared nor fused, and for a quantized node that stands for nothing;
    "float again" and "still wrapped" after what excluding the node really did.

    Args:
        comparison: the run's.
        links: of the run's two models, ``{"float": …, "quantized": …}``.
        profile: the run's times (`workbench.profile_run`), None where they were not measured.
        how: which of them, "simulated" or "deployed".
        effects: of the run's exclusions, as its record keeps them: "name" of a node and "status".
        sensitivity: what each node costs (`sensitivity.SensitivityTable`), None where it was not
            measured. A node shows the worst output's SQNR with only this node quantized.
    """
    maker = _Sheet(comparison, links, profile, how, effects, sensitivity)
    sides: dict[str, Any] = {"float": {}, "quantized": {}}
    for side, shown in sides.items():
        for name, link in links[side].items():
            shown[name] = maker.node(side, name, link)
    result: dict[str, Any] = strict(
        {
            "measures": [measure.to_json() for measure in MEASURES],
            "no_figure": NO_FIGURE_COLOR,
            "sides": sides,
        }
    )
    return result


def _figures(records: Iterable[ActivationError]) -> dict[str, float]:
    """The worst of some tensors, by measure."""
    found: dict[str, float] = {}
    for record in records:
        for key, value in (
            ("accumulated", record.accumulated_sqnr_db),
            ("local", record.local_sqnr_db),
            ("isolated", record.isolated_sqnr_db),
            ("added", record.added_sqnr_db),
            ("saturated", record.saturated_fraction),
        ):
            if value is None:
                continue
            badness = _BY_KEY[key].badness
            if key not in found or badness(value) > badness(found[key]):
                found[key] = value
    return found


class _Records:
    """The compared tensors of each float node."""

    def __init__(self, comparison: Comparison, links: Mapping[str, Mapping[str, Link]]) -> None:
        self.links = links
        self.by_tensor = {a.name: a for a in comparison.activations}
        self.by_node: dict[str, list[ActivationError]] = {}
        for record in comparison.activations:
            if record.node:
                self.by_node.setdefault(record.node, []).append(record)

    def of(self, node: str, link: Link) -> list[ActivationError]:
        """What a float node computes, else what it became a part of."""
        # A node in a body has a longer name than any that a record can mean.
        own = self.by_node.get(node, []) if not link["scope"] else []
        return own or self.of_tensor(link)

    def of_tensor(self, link: Link) -> list[ActivationError]:
        record = self.by_tensor.get(link["tensor"])
        return [] if record is None else [record]


class _Sheet:
    def __init__(
        self,
        comparison: Comparison,
        links: Mapping[str, Mapping[str, Link]],
        profile: Mapping[str, Any] | None,
        how: str,
        effects: Iterable[Mapping[str, Any]],
        sensitivity: Mapping[str, Any] | None,
    ) -> None:
        self.links = links
        self.alone = {
            name: read_number(row["only"]["both"]["figure"])
            for row in (sensitivity or {}).get("rows", ())
            if "both" in row["only"]
            for name in row["nodes"]
        }
        self.records = _Records(comparison, links)
        self.lost = {
            u.name: u.reason
            for u in comparison.unmatched
            if u.model == "float" and u.kind == "activation" and not u.fused_into
        }
        self.marks: dict[str, str] = {}
        for effect in effects:
            mark = _MARKS.get(str(effect.get("status")))
            for name in self.named(str(effect.get("name"))) if mark else ():
                self.marks[name] = mark or ""
        self.seconds: dict[str, Mapping[str, float]] = {}
        self.total: dict[str, float] = {}
        for side in ("float", "quantized"):
            measured = ((profile or {}).get(side) or {}).get(how) or {}
            self.seconds[side] = measured.get("tensors") or {}
            nodes = (measured.get("times") or {}).get("nodes") or ()
            self.total[side] = sum(float(node["seconds"]) for node in nodes)

    def named(self, name: str) -> Sequence[str]:
        """The float nodes that the name of a prepared or quantized node stands for."""
        if name in self.links["float"]:
            return (name,)
        link = self.links["quantized"].get(name)
        return link["partners"] if link is not None and not link["serves"] else ()

    def node(self, side: str, name: str, link: Link) -> dict[str, Any]:
        """What one node shows."""
        records = self.float_records(name, link) if side == "float" else self.partners(link)
        figures = _figures(records)
        for node in (name,) if side == "float" else link["partners"]:
            if node in self.alone and not link["serves"] and not link["scope"]:
                figures["sensitivity"] = self.alone[node]
                break
        spent = self.spent(side, link)
        if spent is not None and self.total[side] > 0:
            figures["seconds"] = spent / self.total[side]
        marks = self.marks_of(side, name, link, records)
        judged = min(map(_judged, records), default=math.inf)
        return {
            "op": link["op_type"],
            "partners": list(link["partners"]),
            "figures": figures,
            **({"judged": judged} if judged < figures.get("accumulated", -math.inf) else {}),
            "marks": marks,
            "tip": "\n".join(self.tip(side, name, link, records, figures, spent, marks)),
        }

    def float_records(self, name: str, link: Link) -> list[ActivationError]:
        return self.records.of(name, link)

    def partners(self, link: Link) -> list[ActivationError]:
        """What a quantized node shows: its own tensor's where it serves, else a partner's."""
        own = self.records.of_tensor(link) if link["serves"] else []
        if own:
            return own
        for partner in link["partners"]:
            found = self.records.of(partner, self.links["float"][partner])
            if found:
                return found
        return []

    def spent(self, side: str, link: Link) -> float | None:
        """Seconds of a node with its Q and DQ; those of whom it serves where it has none."""
        known = self.seconds[side]
        found = [known[o] for o in link["outputs"] if o in known]
        if not link["scope"] and found:
            return sum(found)
        if link["serves"] and not link["scope"]:
            for partner in link["partners"]:
                for other in self.other(side)[partner]["partners"]:
                    served = self.links[side][other]
                    if not served["serves"]:
                        return self.spent(side, served)
        return None

    def other(self, side: str) -> Mapping[str, Link]:
        return self.links["quantized" if side == "float" else "float"]

    def marks_of(
        self, side: str, name: str, link: Link, records: Collection[ActivationError]
    ) -> list[str]:
        found = []
        if side == "float":
            if not records and not link["scope"] and any(o in self.lost for o in link["outputs"]):
                found.append(UNMATCHED)
            if name in self.marks:
                found.append(self.marks[name])
            if any(low_slices(r) for r in records if r.node == name):
                found.append(WORSE_PART)
        elif not link["serves"]:
            if not link["partners"]:
                found.append(UNMATCHED)
            marks = (self.marks[p] for p in link["partners"] if p in self.marks)
            found += dict.fromkeys(marks)
            if any(low_slices(r) for r in records if r.op_type == link["op_type"]):
                found.append(WORSE_PART)
        return found

    def tip(
        self,
        side: str,
        name: str,
        link: Link,
        records: Sequence[ActivationError],
        figures: Mapping[str, float],
        spent: float | None,
        marks: Sequence[str],
    ) -> Iterator[str]:
        yield f"{plain_name(link['op_type'])} {plain_name(name)}"
        if link["serves"] and link["partners"]:
            yield f"serves {plain_name(link['partners'][0])}"
        elif side == "float" and records and records[0].name not in link["outputs"]:
            yield f"a part of {plain_name(records[0].name)}"
        elif len(records) > 1:
            yield f"the worst of {len(records)} tensors"
        elif records:
            yield f"tensor {plain_name(records[0].name)}"
        for key, value in figures.items():
            measure = _BY_KEY[key]
            if measure.unit == "dB":
                yield f"{key} {format_db(value)}"
            elif key == "saturated":
                yield _clipped(value, records)
            else:
                yield f"time {format_percent(value)} of the run, {_milliseconds(spent)}"
        if any(_BY_KEY[key].unit == "dB" for key in figures):
            yield "dB: higher is better"
        if link["scope"]:
            yield "inside a body, whose tensors are not compared"
        low = [part for record in records for part in low_slices(record)]
        if WORSE_PART in marks and low:
            part = f"{plain_name(low[0].source)} {format_db(low[0].sqnr_db)}"
            yield f"a part that it joins is worse: {part}"
        for mark in marks:
            if mark == WORSE_PART:
                continue
            reason = next((self.lost[o] for o in link["outputs"] if o in self.lost), "")
            known = mark == UNMATCHED and side == "float" and reason
            yield f"{mark}: {plain_name(reason)}" if known else mark


def _judged(record: ActivationError) -> float:
    """The SQNR a tensor is ranked by; NaN is the worst."""
    db = judged_db(record)
    return -math.inf if math.isnan(db) else db


def _clipped(value: float, records: Iterable[ActivationError]) -> str:
    text = f"saturated {_share(value)} of the values"
    worst = next((r for r in records if r.saturated_fraction == value), None)
    if worst is None or not value:
        return text
    low, high = worst.saturated_low_fraction, worst.saturated_high_fraction
    if low is None or high is None:
        return text
    return f"{text} (clipped below {_share(low)}, above {_share(high)})"


def _share(fraction: float) -> str:
    """Small shares with the digits that their colours need: ``0.012 %``."""
    return f"{fraction:.3%}".replace("%", " %") if 0 < fraction < 0.01 else format_percent(fraction)


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.3f} ms"


def plain_name(name: str) -> str:
    """A name from a file on one line: what cannot be printed is a space, cut at 120."""
    text = "".join(c if c.isprintable() else " " for c in name)
    return text if len(text) <= _NAME_WIDTH else f"{text[: _NAME_WIDTH - 1]}…"


def worst_first(side: Mapping[str, Mapping[str, Any]], measure: str) -> list[str]:
    """The nodes that have a figure, the worst first; of equal ones the first of the file.

    A node that joins a part which is far worse than the whole ranks by that part.

    Args:
        side: one of the "sides" of a sheet.
        measure: key of a measure.
    """
    badness = _BY_KEY[measure].badness
    known = {
        name: read_number(
            each.get("judged", each["figures"][measure])
            if measure == "accumulated"
            else each["figures"][measure]
        )
        for name, each in side.items()
        if measure in each["figures"]
    }
    return sorted(known, key=lambda name: -badness(known[name]))


def format_figure(measure: str, value: Any) -> str:
    """A figure of a sheet with its unit."""
    number = read_number(value)
    return format_db(number) if _BY_KEY[measure].unit == "dB" else format_percent(number)


def nodes_text(sheet: Mapping[str, Any], measure: str, top: int) -> list[str]:
    """The worst float nodes with their figure, marks and partners, as lines of a terminal."""
    side = sheet["sides"]["float"]
    order = worst_first(side, measure)
    label = _BY_KEY[measure].label
    better = _BY_KEY[measure].better
    lines = [f"{label}: worst {min(top, len(order))} of {len(order)} nodes ({better} is better)"]
    rows = []
    for name in order[:top]:
        each = side[name]
        partners = [plain_name(p) for p in each["partners"][:1]]
        more = f" and {len(each['partners']) - 1} more" if len(each["partners"]) > 1 else ""
        rows.append(
            [
                shorten_name(plain_name(name), 48),
                shorten_name(each["op"], 24),
                ", ".join(each["marks"]) or "–",
                "".join(shorten_name(p, 40) for p in partners) + more or "–",
                format_figure(measure, each["figures"][measure]),
            ]
        )
    header = ["node", "op", "marks", "quantized nodes", label.lower()]
    return lines + (aligned(header, rows, left=4) if rows else [])


# -- from one to the next --------------------------------------------------------------------------


def upstream(comparison: Comparison, links: Mapping[str, Mapping[str, Link]], node: str) -> str:
    """The float node whose added error explains the error of a node: itself or an ancestor.

    Looked for is the node from which the largest share of noise arrives. What a node adds is
    ``10^(-added_sqnr_db / 10)``, its noise over its own signal. Of that no more can arrive than
    the accumulated noise share of each node on the way: an error that a later tensor shows no more
    explains nothing behind it, so a node is worth the least of these along its best way. Of equal
    ones the one that adds more wins, then the one further up.

    Where added errors were not measured, the growth of the accumulated noise share stands for
    them: that of a node less the largest among the nodes it is computed from. That is the largest
    fall of accumulated SQNR, counted in noise, because a fall from exact to 60 dB is harmless.

    Args:
        comparison: the run's.
        links: of the run's two models, with "sources".
        node: a float node, or a quantized one, which stands for its first partner.

    Returns:
        The name of the float node, `node` itself where it adds most, and for a rectifier that was
        folded the node it was folded into; "" where no figure is known.
    """
    float_links = links["float"]
    if node not in float_links:
        partners = links["quantized"].get(node, {"partners": []})["partners"]
        if not partners:
            return ""
        node = partners[0]
    records = _Records(comparison, links)
    noise = {n: _noise(records.of(n, link)) for n, link in float_links.items()}
    measured = any(a.added_sqnr_db is not None for a in comparison.activations)
    ways = _ways(float_links, node, noise)
    best, chosen = (-1.0, -1.0, False), ""
    for name, way in ways.items():  # from the node upwards: a later one is further up
        its = records.of(name, float_links[name])
        own = _added(its) if measured else _growth(name, float_links, noise)
        if own is None:
            continue
        worth = (min(own, way), own, name in records.by_node)
        if own > 0 and worth >= best:
            best, chosen = worth, name
    # A folded Relu stands for the node it was folded into, which is what is quantized.
    for partner in float_links[chosen]["partners"][:1] if chosen else ():
        twin = links["quantized"].get(partner, {"partners": []})["partners"][:1]
        chosen = twin[0] if twin and twin[0] in ways else chosen
    return chosen


def _ways(
    links: Mapping[str, Link], node: str, noise: Mapping[str, float | None]
) -> dict[str, float]:
    """A node and its ancestors, from it upwards, with how much noise can arrive from each."""
    order = {name: at for at, name in enumerate(links)}
    ancestors, waiting = {node}, [node]
    while waiting:
        for source in links[waiting.pop()]["sources"]:
            if source not in ancestors:
                ancestors.add(source)
                waiting.append(source)
    ways = {node: math.inf}
    for name in sorted(ancestors, key=lambda n: -order[n]):
        here = noise[name]
        through = min(ways[name], math.inf if here is None else here)
        for source in links[name]["sources"]:
            ways[source] = max(ways.get(source, 0.0), through)
    return {name: ways[name] for name in sorted(ways, key=lambda n: -order[n])}


def _noise_share(db: float) -> float:
    """Noise over signal of an SQNR; inf for nan."""
    if math.isnan(db) or db < -3000:
        return math.inf
    return math.pow(10.0, -db / 10)


def _noise(records: Iterable[ActivationError]) -> float | None:
    """The largest accumulated noise share; None where there is no signal to be relative to."""
    known = [r.accumulated_sqnr_db for r in records if r.accumulated_sqnr_db != -math.inf]
    return max(map(_noise_share, known), default=None)


def _added(records: Iterable[ActivationError]) -> float | None:
    """The largest added noise share, as far as it does harm.

    NaN, where the float node has no finite value for what the quantized node read, counts only
    where the tensor arrives spoiled: masks overflow without harm.
    """
    found = []
    for record in records:
        total, added = record.accumulated_sqnr_db, record.added_sqnr_db
        if added is None or -math.inf in (added, total):
            continue
        if math.isnan(added) and total >= LOOK_DB:
            continue
        found.append(_noise_share(added))
    return max(found, default=None)


def _growth(
    name: str, links: Mapping[str, Link], noise: Mapping[str, float | None]
) -> float | None:
    """How much larger the noise share is than that of any node this one is computed from."""
    here = noise[name]
    if here is None:
        return None
    before = 0.0
    seen, waiting = {name}, [name]
    while waiting:
        for source in links[waiting.pop()]["sources"]:
            if source in seen:
                continue
            seen.add(source)
            known = noise[source]
            if known is None:
                waiting.append(source)
            else:
                before = max(before, known)
    return 0.0 if before == math.inf else max(here - before, 0.0)
