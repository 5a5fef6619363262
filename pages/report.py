"""What do I hand on?"""

import streamlit as st

from inspector.render import comparison_csv, comparison_json, dump_json, find_headline
from inspector.web import basis, context, facts, graphs, session, tables, widgets

session.guard()

# get
view = session.view()

# guard
if view is None:
    context.nothing_loaded()
    st.stop()
assert view is not None

# show
comparison = view.comparison
headline = find_headline(comparison)
context.bar(view)
widgets.sentence(headline.sentence, headline.severity)
widgets.tiles(facts.overview_tiles(view, headline.output))
stem = widgets.file_name(f"{view.pair.title}-run{view.run.number}")
with st.container(horizontal=True, vertical_alignment="center", key="downloads"):
    st.download_button(
        "Download JSON",
        data=lambda: dump_json(comparison_json(comparison)),
        file_name=f"{stem}.json",
        mime="application/json",
        on_click="ignore",
        icon=":material/download:",
        type="primary",
        key="json",
    )
    st.download_button(
        "Download CSV",
        data=lambda: comparison_csv(comparison),
        file_name=f"{stem}.csv",
        mime="text/csv",
        on_click="ignore",
        icon=":material/download:",
        key="csv",
    )
    st.caption("Format quant-inspector/comparison, version 1: the same as the command line writes.")
basis.panel(view, key="basis")
st.subheader("Outputs", anchor=False)
st.dataframe(tables.outputs(comparison), hide_index=True)
st.subheader("Compared", anchor=False)
st.dataframe(tables.provenance(view), hide_index=True)
widgets.notes(comparison.warnings, "warning")
widgets.notes(view.run.notes, "note")
st.subheader("Graph", anchor=False)
graphs.kept_picture(view)
with st.expander("All tensors", key="all-tensors", on_change="rerun") as everything:
    if everything.open:
        frame = tables.tensors(comparison)
        widgets.limited(frame, view, key="report")
        st.dataframe(
            tables.shown(frame),
            hide_index=True,
            column_config=tables.tensor_columns(frame),
            placeholder="–",
        )
commands = view.run.summary.get("commands", {})
if isinstance(commands, dict) and commands.get("inspector"):
    st.subheader("The same from the command line", anchor=False)
    st.code(str(commands["inspector"]), language="bash", wrap_lines=True)
