"""Where errors begin: the choice between the pictures of a run, and the job that measures it."""

from __future__ import annotations

from functools import partial

import streamlit as st

from inspector import figures
from inspector.jobs import JobStatus
from inspector.render import shorten_name
from inspector.store import isolation_measured
from inspector.web import session, style, tasks, widgets
from inspector.web.session import View

BY_DEPTH, CAUSES = "Along the graph", "Cause map"
MEASURING = "Measuring where errors begin"
_CHOICE = "chart"


def choice(view: View) -> str:
    """The chosen picture, by a control that also offers to measure what the second one shows."""
    with st.container(
        horizontal=True, vertical_alignment="center", key="chart-choice", gap="xsmall"
    ):
        chosen = st.segmented_control(
            "Picture",
            (BY_DEPTH, CAUSES),
            # With a value of its own in the session, a default would be said twice.
            default=None if _CHOICE in st.session_state else BY_DEPTH,
            key=_CHOICE,
            bind="query-params",
            label_visibility="collapsed",
            required=True,
        )
        offer(view)
    return str(chosen)


def offer(view: View) -> None:
    """The button that has it measured where errors begin; nothing once it was."""
    if isolation_measured(view.run):
        return
    st.button(
        "Measure where errors begin",
        key="measure-causes",
        icon=":material/target:",
        disabled=_job(view) is not None or not session.may_edit(),
        on_click=_measure,
        args=(view,),
        help=session.edit_hint(
            "Two more runs per sample: each node alone, and the error it adds. It takes about as "
            "long as comparing did."
        ),
    )


def cause_map(view: View, *, key: str) -> None:
    """The cause map; while it is measured, how far that is."""
    job = _job(view)
    if job is not None:
        # As high as the picture that follows, with the room under it.
        with st.container(key="wait-causes", height=figures.DEPTH_HEIGHT + 8, border=True):
            widgets.job_card(job.id, place="causes")
        return
    causes = partial(
        figures.cause_map,
        view.comparison,
        style.is_dark(),
        selected=view.tensor,
        excluded=view.run.exclusions,
    )
    widgets.picture(
        causes(),
        key=key,
        name=f"{view.pair.title}-run{view.run.number}-causes",
        alt="Isolated against accumulated SQNR of every tensor; click a mark to select its tensor",
        clickable=True,
        whole=partial(causes, most=None),
    )


def _title(view: View) -> str:
    """Of the job; another run has another."""
    return f"{MEASURING}: {shorten_name(view.pair.title, 36)}, run {view.run.number}"


def _job(view: View) -> JobStatus | None:
    return session.running_title(_title(view))


def _measure(view: View) -> None:
    session.dismiss_problem()
    st.session_state[_CHOICE] = CAUSES
    # With the jobs that replace a run's comparison in other ways, so that none undoes another.
    session.submit(
        tasks.isolate, session.root(), run_id=view.run.id, title=_title(view), purpose="isolate"
    )
