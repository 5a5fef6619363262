"""What each node takes: the button that has it measured, and the times once they are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from inspector.store import PROFILE_KEY
from inspector.web import session, tasks, widgets
from inspector.web.session import View

_PURPOSE = "profile"


def profile(view: View) -> Mapping[str, Any] | None:
    """The times of the shown run's nodes; None where they were not measured."""
    return session.workspace().detail(view.run.id, PROFILE_KEY)


def offer(view: View, found: Mapping[str, Any] | None) -> None:
    """The button that has every node timed; while that runs, how far it is."""
    if found is not None:
        return
    st.button(
        "Time",
        key="time-nodes",
        icon=":material/timer:",
        disabled=widgets.is_asked(_PURPOSE, view.run.id) or not session.may_edit(),
        on_click=widgets.ask_for,
        args=(_PURPOSE, view.run.id),
        help=session.edit_hint(
            "Measures with ONNX Runtime's profiler what each tensor takes in both models, and "
            "adds it to the table."
        ),
    )


def answer(view: View, found: Mapping[str, Any] | None) -> None:
    """Waits for the times that were asked for, or says why there are none."""
    if found is None:
        widgets.answer_to(_PURPOSE, view.run.id, tasks.profile_run, title="Timing every node")
