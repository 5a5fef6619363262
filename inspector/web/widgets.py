"""The parts that more than one page shows."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import streamlit as st

from inspector import figures
from inspector.comparison import ActivationError, Comparison, OutputError, low_slices
from inspector.errors import InspectorError, RunError
from inspector.jobs import ACTIVE, JobStatus
from inspector.render import comparison_csv, shorten_name
from inspector.store import RunRecord
from inspector.web import routes, session, tables
from inspector.web.session import View
from inspector.web.words import md_code, md_text

# Sentences in a list.
MOST_NOTES = 100
_FORMATS = {
    "qdq": "QDQ",
    "qoperator": "QOperator",
    "dynamic": "dynamic",
    "weight_only": "weight only",
    "float": "float",
}
_SEEN = {
    "seen": ("seen", "All samples were used in calibration as well: the figures may flatter."),
    "unseen": ("unseen", "None of the samples was used in calibration."),
    "mixed": ("partly seen", "Some samples were used in calibration as well."),
    "unknown": ("calibration unknown", "Which samples calibrated the loaded file is not known."),
}


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it is not one."""
    ending = "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{ending}"


# ── errors ───────────────────────────────────────────────────────────────────────────────────


def error(found: InspectorError) -> None:
    """Shows what is wrong and what to do about it: the one way this app shows an error."""
    found = session.told(found)
    st.error(f"{md_text(found.message)}\n\n**{md_text(found.hint)}**", icon=":material/error:")


def problem() -> None:
    """Shows the error of the last finished job, until it is dismissed."""
    found = session.problem()
    if found is None:
        return
    with st.container(horizontal=True, vertical_alignment="center", key="problem"):
        error(found)
        st.button(
            "Dismiss",
            key="dismiss",
            on_click=session.dismiss_problem,
            type="tertiary",
            icon=":material/close:",
        )


# ── jobs ─────────────────────────────────────────────────────────────────────────────────────


def remaining(job: JobStatus) -> str:
    """What a job is doing and how long it still takes."""
    if job.state == "queued":
        return f"waiting for its turn, {count(job.ahead, 'job')} before it"
    text = job.message or "starting"
    if job.remaining_seconds is None:
        return text
    return f"{text} · {max(1, round(job.remaining_seconds))} s left"


def _unfinished(job_id: str) -> JobStatus | None:
    """The job as it stands. Runs the page again where it has ended, or is gone with its worker."""
    try:
        job = session.status(job_id)
    except RunError:
        job = None
    if job is not None and job.state in ACTIVE:
        return job
    session.run_again()
    return None


def job_card(job_id: str, *, place: str) -> None:
    """A job's progress with its Stop button; renews itself, and the page once the job is over."""

    @st.fragment(run_every=session.look_seconds())
    def card() -> None:
        job = _unfinished(job_id)
        if job is None:
            return
        st.progress(
            min(1.0, max(0.0, job.fraction)), text=md_text(f"{job.title}: {remaining(job)}")
        )
        st.button(
            "Stop",
            key=f"stop-{place}-{job_id}",
            icon=":material/stop:",
            on_click=session.stop_job,
            args=(job_id,),
        )

    card()


def waiting_jobs(jobs: Sequence[JobStatus]) -> None:
    """The jobs that wait for their turn, each with a button that takes it out of the queue."""
    for job in jobs:
        with st.container(horizontal=True, vertical_alignment="center", gap="xxsmall", wrap=False):
            st.caption(f"{job.ahead + 1}\\. {md_text(shorten_name(job.title, 20))}")
            st.button(
                ":material/close:",
                key=f"stop-waiting-{job.id}",
                type="tertiary",
                on_click=session.stop_job,
                args=(job.id,),
                help=f"Stop: {md_text(job.title)}",
            )


def stopped_jobs() -> None:
    """What the end of the server has stopped, what of it is kept and where it goes on; once."""
    jobs = session.stopped_jobs()
    if not jobs:
        return
    with st.container(key="stopped", border=True, gap="xsmall"):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f"**The server was restarted and has stopped {count(len(jobs), 'job')}:**")
            st.button(
                "Dismiss",
                key="dismiss-stopped",
                type="tertiary",
                icon=":material/close:",
                on_click=session.dismiss_stopped,
            )
        for job in jobs:
            with st.container(horizontal=True, vertical_alignment="center"):
                st.markdown(f"{md_text(job.title)}. {job.sentence}", width="content")
                if job.page:
                    st.page_link(
                        page(job.page),
                        label=f"Open {job.page}",
                        icon=":material/arrow_forward:",
                        query_params={"run": job.run_id} if job.run_id else {},
                    )


def waiting(job: JobStatus, *, height: int, key: str) -> None:
    """A placeholder of the final height that turns into the answer once there is one."""

    @st.fragment(run_every=session.look_seconds())
    def poll() -> None:
        now = _unfinished(job.id)
        if now is not None:
            st.caption(f"{md_text(now.title)}: {md_text(remaining(now))}")

    with st.container(key=f"wait-{key}", height=height, border=True):
        poll()


def ask_for(purpose: str, run_id: str) -> None:
    """Has `answer_to` put the question of this purpose for a run, also where it failed before."""
    session.forget((purpose, run_id))
    st.session_state[f"asked-{purpose}"] = run_id


def is_asked(purpose: str, run_id: str) -> bool:
    """Whether `ask_for` was called and there is no answer yet."""
    return bool(st.session_state.get(f"asked-{purpose}") == run_id)


def answer_to(purpose: str, run_id: str, function: Callable[..., Any], *, title: str) -> None:
    """Waits for what was asked for and runs the page again, or says why there is none.

    Args:
        purpose: as `ask_for` was given it.
        run_id: likewise.
        function: of `tasks`; keeps its result in the store.
        title: of the job.
    """
    if not is_asked(purpose, run_id):
        return
    told = session.ask((purpose, run_id), function, session.root(), run_id=run_id, title=title)
    if told.job is not None:
        waiting(told.job, height=58, key=purpose)
        return
    del st.session_state[f"asked-{purpose}"]
    if told.error is not None:
        error(told.error)
    else:
        session.run_again()


def poll(job: JobStatus) -> None:
    """Runs the page again once a job has ended; takes no room."""

    @st.fragment(run_every=session.look_seconds())
    def look() -> None:
        _unfinished(job.id)

    look()


# ── samples ──────────────────────────────────────────────────────────────────────────────────


def open_sample(name: str) -> None:
    """Starts loading a bundled pair and waits for it."""
    session.open_sample(name, "load")


# ── the frame ────────────────────────────────────────────────────────────────────────────────

_pages: dict[str, Any] = {}


def register_pages(pages: dict[str, Any]) -> None:
    """Tells the links which pages there are, by name."""
    # Not emptied before: another session's script may be about to look one up.
    _pages.update(pages)


def page(name: str) -> Any:
    """The page of that name, for `st.page_link` and `st.switch_page`."""
    return _pages[name]


def format_label(recipe: dict[str, Any]) -> str:
    """A recipe's format in three words, e.g. "int8 QDQ"."""
    kind = str(recipe.get("format", "qdq"))
    weights = str(recipe.get("weight_type", "int8"))
    activations = str(recipe.get("activation_type", weights))
    if kind in ("dynamic", "weight_only", "float"):
        types = weights
    else:
        types = weights if weights == activations else f"{activations}/{weights}"
    return _FORMATS.get(kind, kind) if kind == "float" else f"{types} {_FORMATS.get(kind, kind)}"


def samples_label(comparison: Comparison) -> tuple[str, str]:
    """How many samples and whether they are real and unseen; and what that means."""
    if comparison.random_feeds:
        return (
            f"{count(comparison.samples, 'random feed')}",
            "Seeded noise, not data: good for finding broken nodes, not for judging accuracy.",
        )
    mark, meaning = _SEEN.get(comparison.seen, ("", ""))
    label = count(comparison.samples, "sample")
    return (f"{label}, {mark}" if mark else label), meaning


def run_label(run: RunRecord) -> str:
    """A run's number and what it is."""
    if run.number == 0:
        return "run 0 · the loaded file"
    what = count(len(run.exclusions), "node") + " in float" if run.exclusions else "all quantized"
    return f"run {run.number} · {what}"


def chosen(key: str, shown: str, select: Callable[[str], None]) -> None:
    """Selects what was chosen in a box.

    Streamlit also calls back for a box that has just left the page, with the value it had: when
    that is the one it was shown with, nobody has chosen anything.
    """
    wanted = st.session_state.get(key)
    if wanted and wanted != shown:
        select(str(wanted))


def sentence(text: str, severity: str = "") -> None:
    """The sentence that states a page's finding."""
    with st.container(key="sentence"):
        sign = {"problem": ":red[●] ", "look": ":orange[▲] ", "fine": ":green[✓] "}
        st.markdown(sign.get(severity, "") + md_text(text))


def tiles(entries: Sequence[tuple[str, str, str, str]]) -> None:
    """At most four figures side by side, each as (name, value with unit, second line, meaning)."""
    for column, (label, value, second, meaning) in zip(
        st.columns(len(entries), gap="small"), entries, strict=True
    ):
        column.metric(
            md_text(label),
            md_text(value),
            md_text(second) or None,
            delta_color="off",
            delta_arrow="off",
            help=md_text(meaning) or None,
            border=True,
            height="stretch",
        )


def as_markdown(frame: Any) -> Any:
    """The frame for `st.table`, which takes its texts for markdown: shown as they are."""
    return frame.map(lambda text: md_text(str(text)))


def picture(
    figure: Any,
    *,
    key: str,
    name: str,
    alt: str,
    clickable: bool = False,
    whole: Callable[[], Any] | None = None,
    select: Callable[[str], None] = session.select_tensor,
) -> None:
    """A figure with its data as CSV in its upper right corner; a click may select a tensor.

    Args:
        figure: what is shown.
        key: of the element.
        name: of the downloaded file.
        alt: what the picture shows, for who cannot see it.
        clickable: marks carry names to select.
        whole: makes the figure with every point, for the download; `figure` has them all if None.
        select: takes the name of a mark that was clicked; names are those of tensors by default.
    """
    with st.container(key=f"picture-{key}", gap=None):
        with st.container(key=f"csv-{key}"):
            st.download_button(
                "CSV",
                data=lambda: figures.figure_csv(figure if whole is None else whole()),
                file_name=f"{file_name(name)}.csv",
                mime="text/csv",
                key=f"download-{key}",
                on_click="ignore",
                type="tertiary",
                help="Download the numbers of this picture",
            )
        selection: dict[str, Any] = {}
        if clickable:
            selection = {
                "on_select": partial(point_clicked, key, select),
                "selection_mode": "points",
            }
        st.plotly_chart(
            figure,
            key=key,
            theme=None,
            alt=alt,
            config={"displayModeBar": False, "displaylogo": False},
            **selection,
        )


def point_clicked(key: str, select: Callable[[str], None] = session.select_tensor) -> None:
    """Selects what was clicked in a picture, a tensor by default, once per click."""
    name = _selected_point(key)
    if name != st.session_state.get(f"clicked-{key}", ""):
        st.session_state[f"clicked-{key}"] = name
        select(name)


def _selected_point(key: str) -> str:
    state: Any = st.session_state.get(key) or {}
    points: Iterable[Any] = state.get("selection", {}).get("points", ())
    for point in points:
        found = point.get("customdata")
        if isinstance(found, (list, tuple)):
            found = found[0] if found else None
        if isinstance(found, str):
            return found
    return ""


def file_name(name: str) -> str:
    """A file name made of a tensor's or a pair's name."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(name).name or name).strip("._")
    return safe[-100:] or "download"


_KEY_TABLE = """
| key | does |
|---|---|
| `j` `k` | next, previous worst tensor; on the graph the node |
| `u` | on the graph: follow the error upstream |
| `x` | leave the selected tensor's node in float, or quantize it |
| `z` `Shift z` | undo, redo the ticked nodes |
| `/` | search |
| `?` | this list |
"""


@st.dialog("Keys")
def keys_dialog() -> None:
    """Shows the keys."""
    st.markdown(_KEY_TABLE)


def leave_in_float(view: View, *, key: str) -> None:
    """The button that ticks the selected tensor's node, with `x`."""
    draft = session.draft(view.pair.id, view.run.exclusions)
    ticked = view.node in draft.nodes
    st.button(
        "Undo float" if ticked else "Leave in float",
        key=key,
        shortcut="x",
        disabled=not (view.node and session.may_edit()),
        icon=":material/undo:" if ticked else ":material/block:",
        on_click=session.toggle,
        args=(view.pair.id, draft, view.node),
        help=session.edit_hint(
            "Ticks this tensor's node on the exclusions page; Re-quantize applies it."
        ),
    )


def in_graph(view: View) -> None:
    """The link to the selected tensor's node on the graph page."""
    node = {"node": view.node} if view.node else {}
    st.page_link(
        page("graph"),
        label="Graph",
        icon=":material/account_tree:",
        query_params={**session.address(), "tensor": view.tensor, **node},
        help="Shows the node that computes this tensor in both graphs",
    )


def step_worst(view: View, by: int) -> None:
    """Selects the tensor that is `by` places further down the worst-first list."""
    order = session.worst_first(view.comparison)
    if order:
        place = order.index(view.tensor) + by if view.tensor in order else 0
        session.select_tensor(order[max(0, min(len(order) - 1, place))])


def neighbours(view: View, *, key: str) -> None:
    """The two buttons to the previous and the next worst tensor, with `k` and `j`."""
    order = session.worst_first(view.comparison)
    place = order.index(view.tensor) if view.tensor in order else 0
    st.button(
        ":material/arrow_upward:",
        key=f"{key}-previous",
        shortcut="k",
        help="The tensor before this one in the list, worst first",
        disabled=place == 0,
        on_click=step_worst,
        args=(view, -1),
    )
    st.button(
        ":material/arrow_downward:",
        key=f"{key}-next",
        shortcut="j",
        help="The next worst tensor",
        disabled=place >= len(order) - 1,
        on_click=step_worst,
        args=(view, 1),
    )


# ── filters (in the address) and the table they filter ───────────────────────────────────────


def find_field(label: str = "Search") -> str:
    """The text every word of which has to occur; `/` leads here."""
    return (
        st.text_input(
            label,
            key="find",
            bind="query-params",
            type="search",
            live=True,
            placeholder="Search (/)",
            label_visibility="collapsed",
            width=140,
        )
        or ""
    )


def kind_field() -> str | None:
    """The kind of tensor to list; None for all."""
    names = {"activation": "Activations", "weight": "Weights", "bias": "Biases"}
    return st.segmented_control(
        "Kind",
        tables.KINDS,
        format_func=names.__getitem__,
        key="kind",
        bind="query-params",
        label_visibility="collapsed",
    )


def op_field(op_types: Sequence[str]) -> str | None:
    """The op type to list; None for all."""
    return st.selectbox(
        "Op type",
        op_types,
        index=None,
        format_func=lambda op: shorten_name(op, 40),
        key="op",
        bind="query-params",
        placeholder="Any op type",
        label_visibility="collapsed",
        width=116,
    )


def tensor_field(
    view: View, order: Sequence[str], *, refused: Sequence[str] = (), shown: str = ""
) -> None:
    """The selected tensor, to be chosen from all, worst first.

    Args:
        refused: tensors that are not compared as their match was refused; they come last.
        shown: a tensor that is not compared and is looked at instead of the selected one.
    """
    now = shown or view.tensor
    key = f"tensor-choice-{zlib.crc32(f'{view.run.id}{now}{bool(shown)}'.encode()):x}"
    some = [*order[: tables.MAX_ROWS], *(name for name in refused if name not in order)]
    if now not in some:
        some.append(now)
    st.selectbox(
        "Tensor",
        some,
        index=some.index(now),
        key=key,
        format_func=lambda name: (
            shorten_name(name, 64) + (" · refused" if name in refused and name not in order else "")
        ),
        on_change=chosen,
        args=(key, now, session.select_tensor),
        label_visibility="collapsed",
        width=400,
    )


def tensor_table(
    frame: Any, view: View, *, key: str, columns: dict[str, Any] | None = None
) -> None:
    """A table of tensors (column `name`) in which a click on a row selects the tensor."""
    if not len(frame):
        st.caption("No tensor passes the filters: clear the search or choose another kind.")
        return
    limited(frame, view, key=key)
    names = list(frame["name"])
    # The rows under a key change with run and filters, so they are part of it: a selection is a
    # row number.
    full_key = f"{key}-{view.run.id}-{zlib.crc32(chr(0).join(names).encode()):x}"
    wanted = [names.index(view.tensor)] if view.tensor in names else []

    def row_chosen() -> None:
        rows = st.session_state[full_key]["selection"]["rows"]
        if rows and rows != wanted:
            session.select_tensor(names[rows[0]])

    state: Any = st.session_state.get(full_key) or {}
    if list(state.get("selection", {}).get("rows", ())) != wanted:
        st.session_state[full_key] = {"selection": {"rows": wanted, "columns": [], "cells": []}}
    st.dataframe(
        tables.shown(frame),
        key=full_key,
        hide_index=True,
        column_config=columns or tables.tensor_columns(frame),
        on_select=row_chosen,
        selection_mode="single-row",
        height=min(420, 36 + 35 * len(frame)),
        placeholder="–",
    )


def file_button(
    label: str,
    path: Path,
    *,
    file_name: str,
    key: str,
    run_id: str,
    media_type: str = "application/octet-stream",
    help: str | None = None,
) -> None:
    """A button that saves a file of a run, for as long as the user may see the run.

    It comes from the disk in pieces: Streamlit's own download button would keep all of it in
    memory.
    """
    there = path.is_file()
    st.link_button(
        label,
        routes.offer(path, media_type, run_id, file_name=file_name) if there else "",
        key=key,
        icon=":material/download:",
        help=help if there else f"There is no file {md_text(path.name)} any more.",
        disabled=not there,
    )


def limited(frame: Any, view: View, *, key: str) -> None:
    """Says that a table shows the worst only, and offers all of it."""
    total = frame.attrs.get("total", len(frame))
    if total <= len(frame):
        return
    with st.container(horizontal=True, vertical_alignment="center", key=f"limited-{key}"):
        st.caption(f"The worst {len(frame):,} of {total:,}: search for others.", width="content")
        st.download_button(
            "All as CSV",
            data=lambda: comparison_csv(view.comparison),
            file_name=f"{file_name(f'{view.pair.title}-run{view.run.number}')}.csv",
            mime="text/csv",
            key=f"all-{key}",
            on_click="ignore",
            type="tertiary",
            icon=":material/download:",
        )


def notes(sentences: Sequence[str], word: str) -> None:
    """Sentences to read before trusting a figure, folded away where there are many."""
    if not sentences:
        return
    lines = "\n".join(f"- {md_text(each)}" for each in sentences[:MOST_NOTES])
    if len(sentences) > MOST_NOTES:
        lines += f"\n- and {len(sentences) - MOST_NOTES:,} more, in the report's files"
    if len(sentences) == 1 and word == "warning":
        st.warning(md_text(sentences[0]), icon=":material/warning:")
    else:
        with st.expander(count(len(sentences), word), expanded=word == "warning"):
            st.markdown(lines)


def parts_table(record: OutputError | ActivationError) -> None:
    """Where an output collapses: the parts it is joined from, or its channels, worst first."""
    joined = bool(low_slices(record))
    with st.container(key="parts", gap="xsmall"):
        name = md_code(shorten_name(record.name, 30))
        st.markdown(f"**{name} {'is joined from' if joined else 'by channel, worst first'}**")
        st.dataframe(
            tables.shown(tables.parts(record)),
            hide_index=True,
            column_config=tables.part_columns(),
            height="content" if joined and len(record.slices) < 8 else 290,
            placeholder="–",
            key="parts-table",
        )
        if joined:
            st.caption(
                "Parts that share one scale but not one size: the small one is rounded away."
            )
