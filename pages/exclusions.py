"""Which nodes stay in float, and what does that gain?"""

import streamlit as st

from inspector.render import find_headline
from inspector.web import facts, parts, session, widgets

HEIGHT = 380

# get
view = session.view()

# guard
if view is None:
    widgets.nothing_loaded()
    st.stop()
assert view is not None
draft = session.draft(view.pair.id, view.run.exclusions)

# show: what the run's list gained
widgets.context_bar(view)
headline = find_headline(view.comparison)
widgets.sentence(facts.change_sentence(view, headline.output, draft.nodes), headline.severity)
widgets.tiles(facts.change_tiles(view, headline.output))

# ask: which nodes, by which recipe
left, right = st.columns([2.4, 1], gap="small")
with left:
    parts.node_editor(view, draft, height=HEIGHT - 48)
with right:
    parts.requantize_panel(view, draft, height=HEIGHT)

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
