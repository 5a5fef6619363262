"""What each node takes: the button that has it measured, and the times once they are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from inspector.store import PROFILE_KEY
from inspector.web import session, tasks, widgets
from inspector.web.session import View

_ASKED = "profiling"


def profile(view: View) -> Mapping[str, Any] | None:
    """The times of the shown run's nodes; None where they were not measured."""
    return session.workspace().detail(view.run.id, PROFILE_KEY)


def _ask(run_id: str) -> None:
    session.forget(("profile", run_id))
    st.session_state[_ASKED] = run_id


def offer(view: View, found: Mapping[str, Any] | None) -> None:
    """The button that has every node timed; while that runs, how far it is."""
    if found is not None:
        return
    st.button(
        "Time",
        key="time-nodes",
        icon=":material/timer:",
        disabled=st.session_state.get(_ASKED) == view.run.id,
        on_click=_ask,
        args=(view.run.id,),
        help="Measures with ONNX Runtime's profiler what each tensor takes in both models, and "
        "adds it to the table.",
    )


def answer(view: View, found: Mapping[str, Any] | None) -> None:
    """Waits for the times that were asked for, or says why there are none."""
    if found is not None or st.session_state.get(_ASKED) != view.run.id:
        return
    told = session.ask(
        ("profile", view.run.id),
        tasks.profile_run,
        session.root(),
        run_id=view.run.id,
        title="Timing every node",
    )
    if told.job is not None:
        widgets.waiting(told.job, height=58, key="profile")
        return
    del st.session_state[_ASKED]
    if told.error is not None:
        widgets.error(told.error)
    else:
        st.rerun()
