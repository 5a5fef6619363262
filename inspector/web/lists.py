"""The search on the exclusions page: which lists reach a goal, and what each costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from inspector import figures
from inspector.render import format_count, read_number, shorten_name
from inspector.web import session, style, tasks, widgets
from inspector.web.session import Draft, View
from inspector.web.words import md_text

SEARCHING = "Searching a list"
_VIEW = "exclusions-view"
_BUDGETS = {10: "10 s", 30: "30 s", 60: "1 min", 300: "5 min", 1200: "20 min", 0: "no limit"}
_PRICES = {"macs": "MACs", "bytes": "Size", "ms": "≈ Latency"}
_DEFAULT_GOAL_DB = 20.0
# What may be asked of any model; one that does not fit is refused with the reason.
_TASKS = ("agreement", "detection_f1", "mean_iou", "cosine", "argmax", "kl")

Search = Mapping[str, Any]


def searching() -> bool:
    """Whether the search stands in the left half and not the nodes."""
    return st.session_state.get(_VIEW) == "Search"


def view_field() -> None:
    """Nodes or search, in the left half."""
    st.segmented_control(
        "What is shown", ["Nodes", "Search"], default="Nodes", key=_VIEW,
        required=True, label_visibility="collapsed",
    )  # fmt: skip


def search(view: View, draft: Draft, recipe: Mapping[str, Any] | None, *, height: int) -> None:
    """The goal, the search and its chart; a click on a mark ticks that list.

    Args:
        view: what is shown.
        draft: what is ticked.
        recipe: to re-quantize with; None for surgery on the loaded file.
        height: of the whole, in pixels.
    """
    found = session.workspace().search(view.pair.id)
    job = session.running_title(SEARCHING)
    with st.container(horizontal=True, vertical_alignment="center", key="search-row", gap="xsmall"):
        view_field()
        goal = _goal_field(view, found)
        prices = [p for p in _PRICES if p != "ms" or view.comparison.latency is not None]
        price = st.segmented_control(
            "Price", prices, default="macs", format_func=_PRICES.__getitem__, key="price",
            required=True, label_visibility="collapsed", help="What the horizontal axis shows.",
        )  # fmt: skip
        st.space("stretch")
        if job is not None:
            st.button(
                "Stop", key="stop-search", icon=":material/stop:",
                on_click=session.stop_job, args=(job.id,),
                help="Keeps what was tried; the next search goes on from there.",
            )  # fmt: skip
        else:
            st.button(
                "Search", key="start-search", type="primary", icon=":material/search:",
                disabled=not session.may_edit(),
                on_click=_start, args=(view, recipe, goal),
                help=session.edit_hint(
                    "Ranks the nodes by what each costs alone, then looks for the smallest list "
                    "that reaches the goal. What is there stays when you stop."
                ),
            )  # fmt: skip
    _chart(view, draft, str(price), height - 48)


def _goal_field(view: View, found: Search) -> dict[str, Any]:
    """The goal and the budget, in a popover that says what they are."""
    kept = found.get("goal", {})
    metrics = list(dict.fromkeys([*_metrics(view), *([kept["metric"]] if kept else [])]))
    slot = st.container(width="content")
    stored: dict[str, Any] = st.session_state.setdefault("search-goal", {})
    text = stored.get("text") or _goal_text(
        kept.get("metric", metrics[0]), kept.get("value", _DEFAULT_GOAL_DB), 60
    )
    with slot.popover(md_text(text), key="goal"):
        metric = st.selectbox(
            "Metric", metrics, index=metrics.index(kept["metric"]) if kept else 0,
            accept_new_options=True, key="goal-metric",
            help="output_sqnr_db[:output], or a task metric of the README, e.g. detection_f1.",
        )  # fmt: skip
        value = st.number_input(
            "To be reached", value=float(kept.get("value", _DEFAULT_GOAL_DB)), key="goal-value",
            format="%.4g",
        )  # fmt: skip
        budget = st.select_slider(
            "Budget", list(_BUDGETS), value=60, format_func=_BUDGETS.__getitem__, key="goal-budget"
        )
        macs = st.slider("At most so many MACs in float, %", 0, 100, 100, key="goal-macs")
        deployed = st.toggle(
            "Judge the deployed model", value=True, key="goal-deployed",
            help="Off: optimisations off, as previews are. On: each accepted list is quantized "
            "and run as it ships.",
        )  # fmt: skip
    told = _goal_text(str(metric), float(value), int(budget))
    if told != stored.get("text"):
        stored["text"] = told
        session.run_again()
    return {
        "metric": str(metric),
        "value": float(value),
        "budget_seconds": float(budget) or None,
        "max_float_macs": None if macs == 100 else macs / 100,
        "simulated": not deployed,
    }


def _metrics(view: View) -> list[str]:
    names = [o.name for o in view.comparison.outputs]
    own = [view.pair.options.metric] if view.pair.options.metric else []
    found = [*own, "output_sqnr_db", *(f"output_sqnr_db:{n}" for n in names if len(names) > 1)]
    labelled = ["top1_drop"] if view.comparison.task is not None else []
    return [*found, *labelled, *_TASKS]


def _goal_text(metric: str, value: float, budget: int) -> str:
    name = "output SQNR" if metric == "output_sqnr_db" else metric
    unit = " dB" if metric.startswith("output_sqnr_db") else ""
    sign = "≤" if metric.endswith("_drop") or metric.startswith("kl") else "≥"
    return f"{name} {sign} {value:.4g}{unit}, {_BUDGETS[budget]}"


def _start(view: View, recipe: Mapping[str, Any] | None, goal: Mapping[str, Any]) -> None:
    session.dismiss_problem()
    session.submit(
        tasks.search_list,
        session.root(),
        run_id=view.run.id,
        config=None if recipe is None else dict(recipe),
        title=SEARCHING,
        purpose="search",
        **goal,
    )


def _chart(view: View, draft: Draft, price: str, height: int) -> None:
    """What was found so far; renews itself while the search runs."""
    running = session.running_title(SEARCHING) is not None

    @st.fragment(run_every=1.0 if running else None)
    def block() -> None:
        found = session.workspace().search(view.pair.id)
        job = session.running_title(SEARCHING)
        ticked = session.draft(view.pair.id, view.run.exclusions).nodes
        if (running and job is None) or set(ticked) != set(draft.nodes):
            session.run_again()  # what stands around this changes as well
        trials = [t for t in found.get("trials", ()) if t["metric"] is not None]
        keys = {_key(t["nodes"]): t for t in trials}
        axes = _axes(found, price)
        marks = (_point(view, key, t, trials, price, axes) for key, t in keys.items())
        points = [mark for mark in marks if mark is not None]

        def load(key: str) -> None:
            if key in keys and session.may_edit():
                session.tick(view.pair.id, draft, tuple(keys[key]["nodes"]))

        widgets.picture(
            figures.exclusion_lists(
                points,
                axes,
                style.is_dark(),
                goal=found.get("goal", {}).get("value"),
                chosen=_key(found.get("nodes", ())) if found.get("reached") else "",
                selected=_key(draft.nodes),
                height=height - 36,
            ),
            key="lists",
            name=f"{view.pair.title}-lists",
            alt="Exclusion lists: the metric over the price; click a mark to tick that list",
            clickable=True,
            select=load,
        )
        if job is not None:
            st.progress(min(1.0, max(0.0, job.fraction)), text=md_text(widgets.remaining(job)))
        else:
            _proposal(view, draft, found)

    block()


def _proposal(view: View, draft: Draft, found: Search) -> None:
    """How the last search ended, and a button that ticks the list it proposes."""
    with st.container(horizontal=True, vertical_alignment="center", key="proposal", gap="small"):
        nodes = tuple(found.get("nodes", ()))
        if nodes and set(nodes) != set(draft.nodes) and st.button(
            f"Tick the {widgets.count(len(nodes), 'node')} found", key="tick-found",
            type="tertiary", icon=":material/checklist:", disabled=not session.may_edit(),
        ):  # fmt: skip
            session.tick(view.pair.id, draft, nodes)
            st.rerun()
        st.caption(_said(found), width="content")


def _key(nodes: Sequence[str]) -> str:
    """What a list's mark is selected by, and is called in the download."""
    return ", ".join(sorted(nodes)) or "(none)"


def _axes(found: Search, price: str) -> figures.ListAxes:
    goal = found.get("goal", {})
    titles = {
        "macs": ("multiply-accumulates in float, %", "% of MACs"),
        "bytes": ("weights, MB", "MB of weights"),
        "ms": ("≈ latency, ms", "ms ≈"),
    }
    return figures.ListAxes(
        metric=str(goal.get("metric", "output_sqnr_db")).replace("output_sqnr_db", "output SQNR"),
        unit=str(goal.get("unit", "dB")),
        higher_is_better=bool(goal.get("higher_is_better", True)),
        price=titles[price][0],
        price_unit=titles[price][1],
    )


def _point(
    view: View,
    key: str,
    trial: Mapping[str, Any],
    trials: Sequence[Any],
    price: str,
    axes: figures.ListAxes,
) -> figures.ListPoint | None:
    share = read_number(trial["float_macs_fraction"])
    worth: float | None = 100 * share
    if price == "bytes":
        worth = trial["weight_bytes"] / 1e6
    elif price == "ms":
        worth = _milliseconds(view, share, trials)
    if worth is None or worth != worth:
        return None
    names = [shorten_name(str(n), 40) for n in trial["nodes"]]
    lines = [", ".join(names[:3]) + (", …" if len(names) > 3 else "")] if names else []
    deployed = trial.get("deployed")
    if deployed is not None:
        lines.append(f"deployed {axes.text(read_number(deployed))}")
    return figures.ListPoint(
        key=key,
        nodes=len(trial["nodes"]),
        figure=read_number(trial["metric"]),
        price=worth,
        deployed=None if deployed is None else read_number(deployed),
        notes=tuple(lines),
    )


def _milliseconds(view: View, share: float, trials: Sequence[Any]) -> float | None:
    """Estimate from what the run and the float model took and the share of MACs in float."""
    latency = view.comparison.latency
    own = next((t for t in trials if set(t["nodes"]) == set(view.run.exclusions)), None)
    if latency is None or own is None:
        return None
    before = read_number(own["float_macs_fraction"])
    if not before < 1:
        return None
    integers = (latency.quantized_seconds - latency.float_seconds * before) / (1 - before)
    return 1000 * max(latency.float_seconds * share + integers * (1 - share), 0.0)


def _said(found: Search) -> str:
    """How the last search ended."""
    if not found:
        return "Feeds that did not calibrate judge the lists where there are any."
    if "seconds" not in found:
        return "Stopped; what was tried is kept, and the next search starts from there."
    parts = [f"{format_count(found['evaluations'])} lists run in {found['seconds']:.1f} s"]
    if found["ended"]:
        parts.append(md_text(found["ended"]))
    judged = found["goal"]["judged"]
    after = read_number(found["metric"]["after"])
    parts.append(f"{judged} {_axes(found, 'macs').text(after)}")
    parts += ["judged on samples that did not calibrate" if found["unseen"] else "all calibrated"]
    for cure in [c for c in found["cures"] if c["reached"]][:2]:
        told = _axes(found, "macs").text(read_number(cure["metric"]))
        parts.append(f"without a list: {md_text(cure['label'])} {told}")
    return " · ".join(parts)
