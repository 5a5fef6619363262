"""Which nodes stay in float, and what does that gain?"""

import streamlit as st

from inspector.web import context, lists, parts, precision, session, widgets

HEIGHT = 380

session.guard()

# get
view = session.view()

# guard
if view is None:
    context.nothing_loaded()
    st.stop()
assert view is not None
draft = session.draft(view.pair.id, view.run.exclusions)

# show: what the run's list gained, or what the ticked one would
context.bar(view)
gain = st.container()

# ask: which nodes, by hand or by a search; by which recipe
left, right = st.columns([2.4, 1], gap="small")
with right:
    recipe = parts.requantize_panel(view, draft, height=HEIGHT)
with left:
    if lists.searching():
        lists.search(view, draft, recipe, height=HEIGHT)
    else:
        wide = precision.wide_nodes(view, draft)
        parts.node_editor(view, draft, height=HEIGHT - 48, wide=wide)
with gain:
    parts.gain(view, draft, recipe)

# show: what came of it
changed, really, runs, take = st.tabs(
    ["Change per tensor", "What each exclusion did", f"Runs ({len(view.runs)})", "Take it along"]
)
with changed:
    parts.change(view)
with really:
    parts.effects(view, draft)
with runs:
    parts.history(view, draft)
with take:
    parts.take_along(view)
widgets.notes(view.run.notes, "note")
