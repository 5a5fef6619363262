"""What each node costs: the button that has it measured, and the figures once they are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from inspector.store import SENSITIVITY_KEY, made_by_surgery
from inspector.web import session, tasks, widgets
from inspector.web.session import View

_PURPOSE = "sensitivity"


def found(view: View) -> Mapping[str, Any] | None:
    """What the nodes of the shown run cost; None where it was not measured."""
    return session.workspace().detail(view.run.id, SENSITIVITY_KEY)


def can_be_measured(view: View) -> bool:
    """Whether the shown run's recipe is re-quantized for every list."""
    of_a_file = made_by_surgery(view.run) or view.run.summary.get("surgery_fits")
    return not of_a_file and view.run.recipe.get("format") == "qdq"


def offer(view: View, known: Mapping[str, Any] | None) -> None:
    """The button that has every node measured alone; nothing once it was, or where it cannot be."""
    if known is not None or not can_be_measured(view):
        return
    st.button(
        "Sensitivity",
        key="measure-sensitivity",
        icon=":material/troubleshoot:",
        disabled=widgets.is_asked(_PURPOSE, view.run.id) or not session.may_edit(),
        on_click=widgets.ask_for,
        args=(_PURPOSE, view.run.id),
        help=session.edit_hint(
            "Quantizes each node alone with this run's recipe and measures the outputs: first on "
            "few samples, then on all for the most sensitive. What is stopped goes on where it was."
        ),
    )


def answer(view: View, known: Mapping[str, Any] | None) -> None:
    """Waits for what was asked for, or says why there is none."""
    if known is None:
        widgets.answer_to(
            _PURPOSE, view.run.id, tasks.measure_run, title="Measuring each node alone"
        )


def notes(known: Mapping[str, Any] | None) -> None:
    """What to know about the figures, where there are some."""
    for note in known["notes"] if known is not None else ():
        st.caption(f":gray[{note}]")
