"""The bar above every page, and what stands there while nothing is loaded.

Apart from the widgets that pages share, because it stands on what an owner does with a run as a
whole (`sharing`), which is made of those.
"""

from __future__ import annotations

import streamlit as st

from inspector import figures
from inspector.comparison import Comparison, low_slices
from inspector.render import format_db, shorten_name
from inspector.web import session, sharing, style, widgets
from inspector.web.session import View
from inspector.web.words import md_text


def bar(view: View) -> None:
    """What is looked at: pair, format, samples, run, and the output's SQNR before and after."""
    ids = [each.id for each in view.runs]
    labels = {each.id: widgets.run_label(each) for each in view.runs}
    samples, meaning = widgets.samples_label(view.comparison)
    after = format_db(_worst_output_db(view.comparison))
    with st.container(
        horizontal=True, vertical_alignment="center", key="context", gap="small", wrap=True
    ):
        st.markdown(f"**{md_text(shorten_name(view.pair.title, 36))}**", width="content")
        st.badge(md_text(widgets.format_label(view.run.recipe)), color="orange")
        st.badge(
            samples,
            color="violet" if view.comparison.random_feeds else "gray",
            help=meaning or None,
        )
        # A box whose value is changed from outside may answer with its old value, which would
        # undo the change: each view has a box of its own.
        key = f"context-run-{view.run.id}-{len(ids)}"
        st.selectbox(
            "Run",
            ids,
            index=ids.index(view.run.id),
            key=key,
            format_func=lambda run_id: labels.get(run_id, run_id),
            label_visibility="collapsed",
            on_change=widgets.chosen,
            args=(key, view.run.id, session.select_run),
            width=210,
        )
        sharing.whose()
        several = len(view.comparison.outputs) > 1
        what = "lowest output SQNR" if several else "output SQNR"
        text, of = f"**{after}**", "of this run"
        if view.before is not None and view.baseline is not None:
            text = f"{format_db(_worst_output_db(view.before))} → {text}"
            of = f": run {view.baseline.number} → run {view.run.number}"
        hidden = _hidden_slice(view)
        if hidden:
            text += f" · worst part {hidden}"
            what += " and that of the worst part joined into it"
        # One line where there is room; else these go together to a second one.
        with st.container(
            horizontal=True,
            horizontal_alignment="right",
            vertical_alignment="center",
            key="context-end",
            gap="small",
            wrap=False,
        ):
            st.markdown(text, width="content", help=f"{what} {of}".replace(" :", ":"))
            sharing.note_button(view)
            sharing.button(view)
            sharing.account()


def empty_bar() -> None:
    """The context bar where nothing is looked at: who is signed in, in portal mode."""
    if not session.is_signed_in():
        return
    with st.container(
        horizontal=True, horizontal_alignment="right", vertical_alignment="center", key="context"
    ):
        sharing.account()


def _hidden_slice(view: View) -> str:
    """The lowest SQNR of a joined part, before and after, where the pooled figure hides it."""
    sides = [view.before, view.comparison] if view.before is not None else [view.comparison]
    if not any(low_slices(output) for side in sides for output in side.outputs):
        return ""
    figures_db = [
        min((part.sqnr_db for output in side.outputs for part in output.slices), default=None)
        for side in sides
    ]
    *before, after = map(format_db, figures_db)
    return " → ".join([*before, f"**{after}**"])


def _worst_output_db(comparison: Comparison) -> float | None:
    """The lowest output SQNR, pooled over the samples."""
    values = [each.sqnr_db for each in comparison.outputs]
    return min(values) if values else None


def nothing_loaded() -> None:
    """What a page says when there is no comparison yet: the job that makes one, or what to do."""
    empty_bar()
    jobs = session.active_jobs()
    if jobs:
        st.subheader("Comparing…", anchor=False)
        with st.container(height=430, border=True):
            widgets.job_card(jobs[0].id, place="first")
            # An empty chart: the browser fetches the chart library while the models are compared.
            st.plotly_chart(
                figures.blank(style.is_dark()),
                theme=None,
                config={"staticPlot": True},
                key="no-chart",
            )
        return
    failure = session.last_failure()
    if failure is not None and session.problem() is None:
        widgets.error(failure)
    st.subheader("No models are loaded yet", anchor=False)
    st.markdown(
        "Load a float and a quantized ONNX model with a few inputs, or look at a bundled sample: "
        "a trained detector whose scores collapse in int8."
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        st.page_link(widgets.page("models"), label="Load models", icon=":material/upload_file:")
        st.button(
            "Open the sample",
            key="open-sample",
            type="primary",
            on_click=widgets.open_sample,
            args=(session.FIRST_SAMPLE,),
        )
    sharing.shared_with_me("-first")
