"""What broke, and where does the error enter?"""

from functools import partial

import streamlit as st

from inspector import figures
from inspector.render import find_headline
from inspector.web import (
    basis,
    causes,
    context,
    diagnosed,
    facts,
    matches,
    session,
    sharing,
    style,
    tables,
    times,
    widgets,
)

PICTURE, MAP, TABLE = "depth", "causes", "tensors"

session.guard()

# get
view = session.view()

# guard
if view is None:
    context.nothing_loaded()
    st.stop()
assert view is not None

# show: the finding, four figures, one picture
comparison = view.comparison
headline = find_headline(comparison)
context.bar(view)
sharing.note(view)
widgets.sentence(headline.sentence, headline.severity)
widgets.tiles(facts.overview_tiles(view, headline.output))

left, right = st.columns([1.9, 1], gap="small")
with left:
    if causes.choice(view) == causes.CAUSES:
        causes.cause_map(view, key=MAP)
    else:
        depth = partial(
            figures.error_by_depth,
            comparison,
            selected=view.tensor,
            excluded=view.run.exclusions,
            dark=style.is_dark(),
        )
        widgets.picture(
            depth(),
            key=PICTURE,
            name=f"{view.pair.title}-run{view.run.number}-error-by-depth",
            alt="SQNR of every tensor in topological order; click a point to select its tensor",
            clickable=True,
            whole=partial(depth, most=None),
        )
with right:
    diagnosed.panel(view, facts.uneven(comparison, headline.output), key="findings")
basis.panel(view, key="basis")

# get: what each node takes, where it was measured
profile = times.profile(view)

# ask: which tensors the table lists; the answer is in the address
with st.container(
    horizontal=True, vertical_alignment="center", key="overview-filters", gap="xsmall"
):
    text = widgets.find_field()
    kind = widgets.kind_field()
    op_type = widgets.op_field(tables.op_types(comparison))
    times.offer(view, profile)
    st.space("stretch")
    widgets.neighbours(view, key="overview")
    widgets.leave_in_float(view, key="overview-float")
    widgets.in_graph(view)
    st.page_link(
        widgets.page("tensors"),
        label="Why?",
        icon=":material/bar_chart:",
        query_params={**session.address(), "tensor": view.tensor},
    )

# show: every tensor, worst first
times.answer(view, profile)
widgets.tensor_table(
    tables.tensors(comparison, text=text, kind=kind, op_type=op_type, profile=profile),
    view,
    key=TABLE,
)
widgets.notes(comparison.warnings, "warning")
widgets.notes(view.run.notes, "note")
matches.not_compared(view, key="not-compared")
