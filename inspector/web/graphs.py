"""The blocks of the graph page: what to colour by, the two graphs, the card of the selected node.

Which node is selected stands in the address (`node`, and `side` where it is the quantized model's),
so that a link opens the page on it; the tensor it computes is selected along with it, everywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from inspector import figures, node_figures
from inspector.comparison import ActivationError, low_slices
from inspector.groups import block_of, nodes_after, nodes_between
from inspector.node_figures import MEASURES, Measure
from inspector.render import (
    find_headline,
    format_bytes,
    format_db,
    format_ms,
    format_percent,
    has_isolated,
    read_number,
    shorten_name,
)
from inspector.web import (
    causes,
    facts,
    parts,
    precision,
    routes,
    sensitivity,
    session,
    style,
    tasks,
    times,
    widgets,
    words,
)
from inspector.web.graph_panes import graph_panes
from inspector.web.session import Answer, Draft, View

HEIGHT = 560
SIDES = ("float", "quantized")
# A picture of 2,000 nodes takes some 3 MB.
_PICTURE_BYTES = 24_000_000
_DB_LIMITS = (5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 40.0, 50.0)
_SHARE_LIMITS = (0.0001, 0.001, 0.01, 0.02, 0.05, 0.1)
_MOST_FOUND = 200
# What a node is ranked by, lowest worst, without the sheet.
_OF_RECORDS: Mapping[str, Callable[[ActivationError], float | None]] = {
    "accumulated": session.rank_of,
    "local": lambda a: a.local_sqnr_db,
    "isolated": lambda a: a.isolated_sqnr_db,
    "added": lambda a: a.added_sqnr_db,
    "saturated": lambda a: None if a.saturated_fraction is None else -a.saturated_fraction,
}
_SHEETS_KEPT = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """What is drawn of a run.

    Attributes:
        files: paths of the two graphs.
        links: what belongs together, by side and node (`workbench.graph_of_run`).
        sheet: what each node shows (`node_figures.sheet`).
        sheet_text: the same as JSON.
        around: the node whose neighbourhood this is; "" for the whole graphs.
        totals: nodes of each model.
        hops: how far the neighbourhood reaches.
    """

    files: Mapping[str, Path]
    links: Mapping[str, Mapping[str, Mapping[str, Any]]]
    sheet: Mapping[str, Any]
    sheet_text: bytes
    around: str
    totals: Mapping[str, int]
    hops: int

    def figure(self, side: str, node: str, measure: str) -> float | None:
        """What a node shows; None where it has no such figure."""
        shown = self.sheet["sides"][side].get(node, {"figures": {}})["figures"].get(measure)
        return None if shown is None else read_number(shown)

    def nodes(self) -> list[dict[str, Any]]:
        """The float model's nodes with their inputs and outputs, as `groups` takes them."""
        links = self.links["float"]
        outputs = {name: list(link["outputs"]) for name, link in links.items()}
        return [
            {
                "name": name,
                "op_type": link["op_type"],
                "inputs": [o for source in link["sources"] for o in outputs.get(source, ())],
                "outputs": outputs[name],
            }
            for name, link in links.items()
            if not link["scope"]
        ]


# ── what is drawn ────────────────────────────────────────────────────────────────────────────


def ask(view: View) -> Answer:
    """The two graphs of the run, from the store or from a worker."""
    around = st.session_state.get(f"around-{view.run.id}", "")
    pins = tuple((pin.float_name, pin.quantized_name) for pin in view.run.pins)
    return session.ask(
        ("graph", view.run.id, pins, around),
        tasks.graph_of_run,
        session.root(),
        run_id=view.run.id,
        around=around,
        title="Reading both graphs",
        patience=0.6,
    )


def drawn(
    view: View,
    found: Mapping[str, Any],
    profile: Mapping[str, Any] | None,
    costs: Mapping[str, Any] | None = None,
) -> Drawn:
    """The graphs with what every node shows; made once for as long as nothing is measured anew."""
    stamp = session.workspace().comparison_stamp(view.run.id)
    measured = (profile is not None, costs is not None)
    key = (view.run.id, stamp, measured, found["around"], found["hops"])
    kept: dict[Any, Drawn] = st.session_state.setdefault("drawn", {})
    if key not in kept:
        sheet = node_figures.sheet(
            view.comparison,
            found["links"],
            profile=profile,
            effects=view.run.effects,
            sensitivity=costs,
        )
        kept[key] = Drawn(
            files={side: Path(found[side]) for side in SIDES},
            links=found["links"],
            sheet=sheet,
            sheet_text=json.dumps(sheet).encode("ascii"),
            around=found["around"],
            totals=found["nodes"],
            hops=found["hops"],
        )
        while len(kept) > _SHEETS_KEPT:
            del kept[next(iter(kept))]
    return kept[key]


def selected(view: View, drawing: Drawn) -> tuple[str, str]:
    """Side and name of the selected node; ("float", "") where there is none."""
    node, side = st.query_params.get("node", ""), st.query_params.get("side", "float")
    if side in SIDES and node in drawing.links[side]:
        return side, node
    return "float", view.node if view.node in drawing.links["float"] else ""


def follow_address(view: View, drawing: Drawn) -> None:
    """Goes where the address leads, or says that nothing is there."""
    wanted = st.query_params.get("node", "") or view.node
    known = drawing.links["float"].keys() | drawing.links["quantized"].keys()
    if drawing.around and wanted and wanted not in known:
        own = {a.node for a in view.comparison.activations}
        if wanted in own and wanted != st.session_state.get(f"around-{view.run.id}"):
            _centre(view.run.id, wanted)
            st.rerun()
    asked = st.query_params.get("node", "")
    if asked and asked not in known:
        st.caption(
            f":orange[▲] There is no node {words.md_code(shorten_name(asked, 60))} in this run: "
            "the selected tensor's node is shown."
        )
    measure = st.query_params.get("measure", "")
    if measure and measure not in {each.key for each in MEASURES}:
        names = ", ".join(words.md_code(each.key) for each in MEASURES)
        st.caption(
            f":orange[▲] There is no measure {words.md_code(shorten_name(measure, 40))}: {names}."
        )


def _float_nodes(drawing: Drawn, side: str, names: Sequence[str]) -> list[str]:
    """The nodes of the float model that nodes of either stand for, without those in bodies."""
    links = drawing.links[side]
    found: list[str] = []
    for name in names:
        if name in links:
            found += [name] if side == "float" else links[name]["partners"][:1]
    own = drawing.links["float"]
    return [name for name in dict.fromkeys(found) if name in own and not own[name]["scope"]]


def select(view: View, drawing: Drawn, side: str, name: str) -> None:
    """Puts a node into the address, and the tensor it stands for; on every page."""
    link = drawing.links[side].get(name)
    if link is None:
        return
    record = next((r for r in _records(view, drawing, side, name)), None)
    if record is not None:
        session.select_tensor(record.name)
    st.query_params["node"] = name
    if side == "float":
        st.query_params.pop("side", None)
    else:
        st.query_params["side"] = side


def _records(view: View, drawing: Drawn, side: str, name: str) -> list[ActivationError]:
    """The compared tensors that a node computes, or stands for; the worst first."""
    link = drawing.links[side].get(name)
    if link is None:
        return []
    own = [a for a in view.comparison.activations if a.node == name] if side == "float" else []
    if not own and link["tensor"]:
        own = [a for a in view.comparison.activations if a.name == link["tensor"]]
    return sorted(own, key=session.rank_of)


# ── ask: what to colour by, which node ───────────────────────────────────────────────────────


def _format_limit(measure: Measure, limit: float | None) -> str:
    if limit is None:
        return "all"
    if measure.unit == "dB":
        return f"< {format_db(limit)}"
    return f"> {format_percent(limit)}"


def controls(
    view: View,
    drawing: Drawn,
    draft: Draft,
    profile: Mapping[str, Any] | None,
    costs: Mapping[str, Any] | None,
) -> tuple[Measure, float | None]:
    """The row above the graphs: measure, threshold, search, steps from node to node.

    Returns:
        What the graphs are coloured by, and the value from which on nodes stay uncoloured.
    """
    side, node = selected(view, drawing)
    with st.container(
        horizontal=True, vertical_alignment="center", key="graph-controls", gap="xsmall"
    ):
        by_key = {measure.key: measure for measure in MEASURES}
        offered = [m.key for m in MEASURES if _has(drawing, m.key)]
        options_of = offered or [MEASURES[0].key]
        asked = st.query_params.get("measure", "")
        now = asked if asked in options_of else options_of[0]
        # A box of its own for every value that is set from outside.
        key = f"measure-{view.run.id}-{now}-{len(options_of)}"
        chosen = st.selectbox(
            "Colour by",
            options_of,
            index=options_of.index(now),
            format_func=lambda key: by_key[key].label,
            key=key,
            on_change=_color_by,
            args=(key,),
            label_visibility="collapsed",
            width=168,
        )
        measure = by_key[str(chosen)]
        limits = _DB_LIMITS if measure.unit == "dB" else _SHARE_LIMITS
        options = [*limits, None] if measure.unit == "dB" else [*reversed(limits), None]
        threshold = st.select_slider(
            "Colour",
            options,
            value=None,
            format_func=partial(_format_limit, measure),
            key=f"threshold-{measure.unit}",
            label_visibility="collapsed",
            width=120,
            help="Nodes that are better than this stay without colour.",
        )
        _search(view, drawing)
        st.space("stretch")
        missing = costs is None and sensitivity.can_be_measured(view)
        if profile is None or missing or not has_isolated(view.comparison):
            with st.popover(
                "Measure", key="graph-measure", help="Measures what nodes cannot be coloured by yet"
            ):
                causes.offer(view)
                times.offer(view, profile)
                sensitivity.offer(view, costs)
        step = partial(_step, view, drawing, measure.key)
        st.button(
            ":material/arrow_upward:",
            key="graph-previous",
            shortcut="k",
            on_click=partial(_step, view, drawing, measure.key, -1),
            help="The node before, from the worst",
        )
        st.button(
            "Next worst",
            key="graph-next",
            icon=":material/arrow_downward:",
            shortcut="j",
            on_click=step,
            help=f"The node with the next worst {measure.label.lower()}",
        )
        st.button(
            "Upstream",
            key="graph-upstream",
            icon=":material/north:",
            shortcut="u",
            disabled=not node,
            on_click=_follow,
            args=(view, drawing, side, node),
            help="Follows the error upstream: to the node whose added error explains the error of "
            "the selected one"
            + (
                ""
                if has_isolated(view.comparison)
                else "; by the largest fall of SQNR until it is measured where errors begin"
            ),
        )
        _more(view, drawing, draft)
        parts.undo_button(view, draft)
    return measure, threshold


def _color_by(key: str) -> None:
    st.query_params["measure"] = st.session_state[key]


def _has(drawing: Drawn, measure: str) -> bool:
    return any(measure in each["figures"] for each in drawing.sheet["sides"]["float"].values())


def _step(view: View, drawing: Drawn, measure: str, by: int = 1) -> None:
    """Selects the node that is so many places further down from the worst to the best."""
    side, node = selected(view, drawing)
    if side != "float":
        node = next(iter(_float_nodes(drawing, side, [node])), "")
    if drawing.around and measure in _OF_RECORDS:
        _step_through_all(view, measure, node, by)
        return
    order = node_figures.worst_first(drawing.sheet["sides"]["float"], measure)
    if order:
        place = (order.index(node) + by) % len(order) if node in order else 0
        select(view, drawing, "float", order[place])


def _step_through_all(view: View, measure: str, node: str, by: int) -> None:
    """The next worst of the whole model, where only a neighbourhood of it is drawn."""
    figure = _OF_RECORDS[measure]
    ranked = [(value, a) for a in view.comparison.activations
              if a.node and (value := figure(a)) is not None]  # fmt: skip
    ranked.sort(key=lambda pair: pair[0])
    names = [a.node for _, a in ranked]
    if not names:
        return
    record = ranked[(names.index(node) + by) % len(names) if node in names else 0][1]
    session.select_tensor(record.name)
    st.query_params["node"] = record.node


def _follow(view: View, drawing: Drawn, side: str, node: str) -> None:
    found = node_figures.upstream(view.comparison, drawing.links, node)
    if not found:
        st.toast("No figure upstream of this node.")
        return
    own = _float_nodes(drawing, side, [node])
    if own and found == own[0]:
        st.toast(
            "This node adds the largest part of its error itself."
            if has_isolated(view.comparison)
            else "SQNR falls most at this node: an estimate, until it is measured where errors "
            "begin.",
            icon=":material/flag:",
        )
    select(view, drawing, "float", found)


def is_broken_pattern(text: str) -> bool:
    """Whether a text is meant as /a regex/ and is none."""
    if len(text) > 2 and text.startswith("/") and text.endswith("/"):
        try:
            re.compile(text[1:-1])
        except re.error:
            return True
    return False


def matches(text: str, name: str, op_type: str) -> bool:
    """Whether a node is meant: every word occurs in its name or op type, or /a regex/ does."""
    if len(text) > 2 and text.startswith("/") and text.endswith("/"):
        try:
            pattern = re.compile(text[1:-1], re.IGNORECASE)
        except re.error:
            return False
        # Long names against a pattern with many ways to fit would take for ever.
        return any(pattern.search(each[:200]) for each in (name, op_type))
    whole = f"{name} {op_type}".lower()
    return all(word in whole for word in text.lower().split())


def _found(drawing: Drawn, text: str) -> list[str]:
    if not text.strip():
        return []
    links = drawing.links["float"]
    return [name for name, link in links.items() if matches(text, name, str(link["op_type"]))]


def _search(view: View, drawing: Drawn) -> None:
    text = widgets.find_field()
    if not text.strip():
        return
    found = _found(drawing, text)
    key = f"found-{len(found)}-{hash(text)}"

    def chosen() -> None:
        name = st.session_state[key]
        if name:
            select(view, drawing, "float", name)

    st.selectbox(
        "Found",
        found[:_MOST_FOUND],
        index=None,
        key=key,
        format_func=lambda name: f"{drawing.links['float'][name]['op_type']} {shorten_name(name)}",
        placeholder="no valid pattern"
        if is_broken_pattern(text)
        else f"{widgets.count(len(found), 'node')} found",
        disabled=not found,
        on_change=chosen,
        label_visibility="collapsed",
        width=190,
    )


def _more(view: View, drawing: Drawn, draft: Draft) -> None:
    """Ticks many nodes at once, from the selected one and from what is searched for."""
    side, node = selected(view, drawing)
    own = next(iter(_float_nodes(drawing, side, [node])), "")
    known = drawing.nodes()
    op_of = {each["name"]: str(each["op_type"]) for each in known}
    op, text = op_of.get(own, ""), str(st.session_state.get("find") or "")
    marked = st.session_state.get(f"marked-{view.run.id}", ())
    offers: list[tuple[str, Sequence[str]]] = [
        (
            f"All {words.md_text(shorten_name(op, 24))}" if op else "All of its op type",
            [n for n, each in op_of.items() if op and each == op],
        ),
        ("Its block", block_of(own, op_of)),
        ("Everything after it", nodes_after(own, known) if own else ()),
        (
            "Between the two nodes selected",
            nodes_between(marked[0], marked[1], known) if len(marked) == 2 else (),
        ),
        ("What the search found", [n for n in _found(drawing, text) if n in op_of]),
    ]
    with st.popover("Tick more", key="graph-more"):
        if own:
            st.caption(f"From {words.md_code(shorten_name(own, 40))}")
        parts.tick_buttons(view, draft, offers, key="graph-more")
        st.caption("Shift-click a second node in a graph to select two.")


# ── show: the two graphs ─────────────────────────────────────────────────────────────────────


def panes(
    view: View, drawing: Drawn, draft: Draft, measure: Measure, threshold: float | None
) -> None:
    """The two graphs; a click selects a node, a right-click toggles it."""
    side, node = selected(view, drawing)
    key = f"graph-{view.run.id}"
    urls = {
        name: routes.offer(drawing.files[name], "application/octet-stream", view.run.id)
        for name in SIDES
    }
    urls["sheet"] = routes.offer(drawing.sheet_text, "application/json", view.run.id)
    urls["pane"] = routes.pane_address()
    answered = partial(_reported, key)

    def picked() -> None:
        report = answered("selected")
        if report:
            st.session_state.pop(f"marked-{view.run.id}", None)
            marked = _float_nodes(drawing, report["side"], report.get("names", ()))
            if len(marked) == 2:
                st.session_state[f"marked-{view.run.id}"] = tuple(marked)
            select(view, drawing, report["side"], report["name"])

    def toggled() -> None:
        report = answered("toggled")
        if not report:
            return
        if not session.may_edit():
            st.toast(session.edit_hint())
            return
        names = _float_nodes(drawing, report["side"], report.get("names") or [report["name"]])
        if not names:
            st.toast("This node stands for none of the float model's main graph.")
            return
        if all(name in draft.nodes for name in names):
            kept = tuple(name for name in draft.nodes if name not in names)
        else:
            kept = tuple(dict.fromkeys((*draft.nodes, *names)))
        session.tick(view.pair.id, draft, kept)

    def pressed() -> None:
        report = answered("key")
        actions: dict[str, Callable[[], None]] = {
            "j": lambda: _step(view, drawing, measure.key),
            "k": lambda: _step(view, drawing, measure.key, -1),
            "u": lambda: _follow(view, drawing, side, node),
            "z": lambda: session.undo(view.pair.id, draft),
        }
        if report and report.get("key") in actions:
            actions[report["key"]]()

    def failed() -> None:
        report = answered("failed")
        if report:
            st.toast(words.md_text(f"The {report['side']} graph: {report['message']}"))

    graph_panes(
        {
            "urls": urls,
            "measure": measure.key,
            "threshold": threshold,
            "selected": {"side": side, "name": node} if node else None,
            "excluded": list(draft.nodes),
            "changed": _previewed(view, draft),
            "theme": "dark" if style.is_dark() else "light",
            "picture": _picture_place(view),
            "keys": ["j", "k", "u", "z"],
        },
        key=key,
        height=HEIGHT,
        on_selected_change=picked,
        on_toggled_change=toggled,
        on_key_change=pressed,
        on_failed_change=failed,
    )


def _picture(view: View) -> Path:
    """Where the run's coloured graph is kept for its report."""
    return session.workspace().run_folder(view.run.id) / "graph" / "picture.svg"


def _picture_place(view: View) -> str:
    """The address that takes the run's coloured graph; "" where the user may not put it there."""
    if not session.may_edit():
        return ""
    return routes.accept(view.run.id, _picture(view), _PICTURE_BYTES)


def kept_picture(view: View) -> None:
    """The coloured graph that was kept for the report; where there is none, how to keep one."""
    path = _picture(view)
    if not path.is_file():
        st.caption("No picture of the graph is kept: **To report** above a graph keeps one.")
        return
    address = routes.offer(path, routes.SVG, view.run.id)
    # An image runs no script and loads nothing, whatever the file holds.
    st.html(
        f'<img src="{address}" alt="The graph, coloured by error" '
        'style="width: 100%; max-height: 46rem; object-fit: contain">'
    )
    widgets.file_button(
        "Download SVG",
        path,
        file_name=f"{widgets.file_name(f'{view.pair.title}-run{view.run.number}-graph')}.svg",
        key="graph-picture",
        run_id=view.run.id,
        media_type=routes.SVG,
    )


def _previewed(view: View, draft: Draft) -> dict[str, dict[str, Any]]:
    """The outputs' figures as the ticked list would have them, by the node that computes them."""
    recipe = parts.usual_recipe(view)
    if set(draft.nodes) == set(view.run.exclusions) and not parts.differs(view, recipe):
        return {}
    answer = session.list_preview(view, recipe, draft.nodes)
    if answer.value is None or answer.value["reason"]:
        return {}
    nodes = {a.name: a.node for a in view.comparison.activations if a.node}
    return {
        nodes[each["name"]]: {"accumulated": each["sqnr_db"]}
        for each in answer.value["outputs"]
        if each["name"] in nodes
    }


def _reported(key: str, what: str) -> dict[str, Any]:
    """What the graphs last said of this kind; {} for nothing."""
    state: Any = st.session_state.get(key)
    found = None if state is None else state.get(what)
    return dict(found) if found else {}


def excerpt(view: View, drawing: Drawn) -> None:
    """Says that only a neighbourhood is drawn, and offers the one of the selected node."""
    if not drawing.around:
        return
    _, node = selected(view, drawing)
    total, shown = max(drawing.totals.values()), len(drawing.links["float"])
    with st.container(horizontal=True, vertical_alignment="center", key="excerpt"):
        st.caption(
            f"{total:,} nodes are too many to draw: {shown:,} nodes of the float model are shown, "
            f"up to {drawing.hops} edges around {words.md_code(shorten_name(drawing.around, 40))}.",
            width="content",
        )
        wanted = st.query_params.get("node", "") or view.node or node
        if wanted and wanted != drawing.around:
            st.button(
                "Centre on the selected node",
                key="centre",
                on_click=_centre,
                args=(view.run.id, wanted),
            )


def _centre(run_id: str, node: str) -> None:
    st.session_state[f"around-{run_id}"] = node


# ── show: the card of the selected node ──────────────────────────────────────────────────────


def card(view: View, drawing: Drawn, draft: Draft) -> None:
    """What is known of the selected node, and whether it stays in float."""
    side, node = selected(view, drawing)
    with st.container(border=True, height=HEIGHT, key="node-card", gap="small"):
        if not node:
            st.markdown("**No node selected**")
            st.caption(
                "Click a node in a graph; right-click leaves it in float. `j` goes to the next "
                "worst, `u` follows its error upstream."
            )
            return
        link = drawing.links[side][node]
        own = next(iter(_float_nodes(drawing, side, [node])), "")
        color = "gray" if side == "float" else "orange"
        st.markdown(
            f":{color}[**{words.md_text(shorten_name(str(link['op_type']), 28))}**] "
            f"{words.md_code(shorten_name(node, 34))}",
            help=words.md_code(node),
        )
        _marks(drawing, side, node, own, draft)
        ticked = own in draft.nodes
        st.button(
            "Undo float" if ticked else "Leave in float",
            key="graph-float",
            shortcut="x",
            disabled=not (own and session.may_edit()),
            icon=":material/undo:" if ticked else ":material/block:",
            type="secondary" if ticked else "primary",
            width="stretch",
            on_click=session.toggle,
            args=(view.pair.id, draft, own),
            help=session.edit_hint(
                words.md_code(own)
                if own
                else "This node stands for none of the float model's main graph."
            ),
        )
        if own:
            outputs = list(drawing.links["float"][own]["outputs"])
            precision.choice(view, draft, own, outputs, key="graph-precision")
        rows = _figure_rows(view, drawing, side, node)
        if rows:
            st.table(
                pd.DataFrame(rows, columns=["", " "]).set_index(""),
                border="horizontal",
                hide_header=True,
            )
        _tensor(view, drawing, side, node)


def _marks(drawing: Drawn, side: str, node: str, own: str, draft: Draft) -> None:
    marks = list(drawing.sheet["sides"][side][node]["marks"])
    if own in draft.nodes:
        marks.insert(0, "to leave in float")
    partners = drawing.links[side][node]["partners"]
    other = "quantized" if side == "float" else "float"
    named = ", ".join(words.md_code(shorten_name(p, 26)) for p in partners[:3])
    more = f" and {len(partners) - 3} more" if len(partners) > 3 else ""
    said = f"{other} model: {named}{more}" if partners else f"no partner in the {other} model"
    if marks:
        said = f"{', '.join(marks)} · {said}"
    st.caption(said)


def _figure_rows(view: View, drawing: Drawn, side: str, node: str) -> list[tuple[str, str]]:
    """Each figure of a node with its unit, then what its tensors and weights are stored as."""
    rows = []
    for measure in MEASURES:
        value = drawing.figure(side, node, measure.key)
        if value is None:
            continue
        text = format_db(value) if measure.unit == "dB" else format_percent(value)
        rows.append((measure.label, f"{text} of the run" if measure.key == "seconds" else text))
        if measure.key == "accumulated":
            records = _records(view, drawing, side, node)
            rows += [("Worst part joined", format_db(p.sqnr_db))
                     for p in (low_slices(records[0])[:1] if records else ())]  # fmt: skip
    own = next(iter(_float_nodes(drawing, side, [node])), "")
    computed = [a for a in view.comparison.activations if a.node == own]
    makers = set(drawing.links["float"][own]["sources"]) if own else set()
    read = [a for a in view.comparison.activations if a.node in makers]
    weights = [w for w in view.comparison.weights if w.node == own and own]
    for label, dtypes in (
        ("Reads", [a.dtype for a in read]),
        ("Weights", [w.dtype for w in weights if w.kind == "weight"]),
        ("Gives", [a.dtype for a in computed]),
    ):
        if dtypes:
            rows.append((label, ", ".join(dict.fromkeys(dtypes))))
    worst = min((w.sqnr_db for w in weights if w.kind == "weight"), default=None)
    if worst is not None:
        rows.append(("Weight SQNR", format_db(worst)))
    return rows


def _tensor(view: View, drawing: Drawn, side: str, node: str) -> None:
    """The tensor that a node stands for: its scale, its histogram, the way to its page."""
    records = _records(view, drawing, side, node)
    if not records:
        st.caption("None of its tensors is compared.")
        return
    record = next((r for r in records if r.name == view.tensor), records[0])
    if record.name == view.tensor:
        answer = session.tensor_detail(view)
        if answer.job is not None:
            widgets.waiting(answer.job, height=150, key="card")
        elif answer.error is not None:
            widgets.error(answer.error)
        else:
            figure = figures.histogram(answer.value, dark=style.is_dark())
            figure.layout.annotations = ()
            figure.update_layout(
                height=150, title=None, showlegend=False,
                margin={"l": 34, "r": 6, "t": 6, "b": 22},
            )  # fmt: skip
            figure.update_xaxes(title_text=None)
            figure.update_yaxes(title_text=None)
            st.plotly_chart(
                figure,
                key="card-histogram", theme=None,
                config={"displayModeBar": False, "displaylogo": False},
                alt="Histogram of the tensor, float against dequantized",
            )  # fmt: skip
    scale = facts.formula(record).partition("    ")[0] if record.scale is not None else "float"
    st.caption(
        f"{words.md_code(shorten_name(record.name, 30))} "
        f"{' × '.join(map(str, record.shape)) or 'scalar'} · {words.md_code(scale)}",
        help=words.md_code(record.name),
    )
    st.page_link(
        widgets.page("tensors"),
        label="Why? All of this tensor",
        icon=":material/bar_chart:",
        query_params={**session.address(), "tensor": record.name},
    )


# ── show: the finding, or what the ticked list would give ────────────────────────────────────


def finding(view: View, draft: Draft) -> None:
    """One sentence: the run's finding, or the preview of the ticked nodes."""
    output = find_headline(view.comparison)
    recipe = parts.usual_recipe(view)
    # Asked for before anything is ticked as well: the first tick is then answered at once.
    answer = session.list_preview(view, recipe, draft.nodes)
    if set(draft.nodes) == set(view.run.exclusions) and not parts.differs(view, recipe):
        widgets.sentence(output.sentence, output.severity)
        return
    left, right = st.columns([6.5, 1], vertical_alignment="center", gap="small")
    with left:
        if answer.value is not None and not answer.value["reason"]:
            text = facts.preview_sentence(
                view, answer.value, output.output, draft.nodes,
                overrides=parts.own_overrides(recipe),
            )  # fmt: skip
            seconds = answer.value.get("latency_seconds")
            size = answer.value.get("size_bytes")
            if seconds is not None:
                text += f" · ≈ {format_ms(seconds)}"
            if size is not None:
                text += f", ≈ {format_bytes(size)}"
            widgets.sentence(text, facts.preview_severity(view, answer.value, output.output))
        else:
            text = facts.change_sentence(
                view, output.output, draft.nodes,
                overrides=None if recipe is None else parts.own_overrides(recipe),
            )  # fmt: skip
            if answer.job is not None:
                text += f" ({answer.job.title.lower()} …)"
            widgets.sentence(text, output.severity)
            if answer.job is not None:
                widgets.poll(answer.job)
            elif answer.error is not None:
                widgets.error(answer.error)
            elif answer.value is not None and answer.value["reason"]:
                st.caption(f"No preview: {words.md_text(answer.value['reason'])}.")
    right.page_link(
        widgets.page("exclusions"),
        label="Confirm"
        if parts.own_overrides(recipe)
        else f"Confirm {widgets.count(len(draft.nodes), 'node')}",
        icon=":material/play_arrow:",
        query_params=session.address(),
    )
