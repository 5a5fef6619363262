"""Where in the graph is the error?"""

import streamlit as st

from inspector.web import context, graphs, sensitivity, session, times, widgets

session.guard()

# get
view = session.view()

# guard
if view is None:
    context.nothing_loaded()
    st.stop()
assert view is not None
draft = session.draft(view.pair.id, view.run.exclusions)

# show: the run's finding, or what the ticked nodes would give
context.bar(view)
graphs.finding(view, draft)

# get: both graphs, from the worker
answer = graphs.ask(view)

# guard
if answer.job is not None:
    widgets.waiting(answer.job, height=graphs.HEIGHT, key="graph")
    st.stop()
if answer.error is not None:
    widgets.error(answer.error)
    st.stop()
profile, costs = times.profile(view), sensitivity.found(view)
drawing = graphs.drawn(view, answer.value, profile, costs)
graphs.follow_address(view, drawing)

# ask: what to colour by, which node
measure, threshold = graphs.controls(view, drawing, draft, profile, costs)
times.answer(view, profile)
sensitivity.answer(view, costs)
graphs.excerpt(view, drawing)

# show: the graphs, the selected node
left, right = st.columns([3.3, 1], gap="small")
with left:
    graphs.panes(view, drawing, draft, measure, threshold)
with right:
    graphs.card(view, drawing, draft)
if measure.key == "sensitivity":
    sensitivity.notes(costs)
widgets.notes(view.run.notes, "note")
