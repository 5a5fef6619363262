"""What am I comparing, and how do I load my own?"""

import streamlit as st

from inspector.errors import InspectorError
from inspector.web import context, forms, parts, session, tasks, widgets

session.guard()

# get
view = session.view()

# guard: without a pair only the form is shown
if view is not None:
    # show: both sides and the feeds
    context.bar(view)
    parts.pair(view)
elif session.active_jobs():
    context.nothing_loaded()
else:
    context.empty_bar()
    widgets.sentence("Load a float and a quantized model, or open a sample")

# ask: a pair of one's own
busy = session.running("load")
with st.expander("Load your own models", expanded=view is None, key="load", on_change="rerun"):
    chosen = None
    try:
        chosen = forms.load_form()
    except InspectorError as error:
        widgets.error(error)
    fits = parts.preview(chosen)
    with st.container(height=92, border=False, key="compare-slot"):
        if busy is not None:
            widgets.job_card(busy.id, place="load")
        else:
            lacking = forms.lacking(chosen, fits)
            with st.container(horizontal=True, vertical_alignment="center", key="compare-row"):
                pressed = st.button(
                    "Compare",
                    type="primary",
                    disabled=bool(lacking),
                    icon=":material/play_arrow:",
                    key="compare",
                )
                if lacking:
                    st.caption(lacking, width="content")
            if pressed and not lacking:
                assert chosen is not None
                session.dismiss_problem()
                chosen = forms.store(chosen)
                session.submit(
                    tasks.load_pair,
                    session.own_root(),
                    float_path=chosen.float_path,
                    quantized_path=chosen.quantized_path,
                    inputs=chosen.inputs,
                    calibration=chosen.calibration,
                    options=chosen.options,
                    pair_title=chosen.title,
                    title=f"Comparing {chosen.title}",
                    purpose="load",
                )
                st.rerun()

widgets.problem()

# ask: a sample or an earlier pair
parts.samples_and_pairs(view)
