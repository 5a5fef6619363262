"""Which recipe is best here?"""

import streamlit as st

from inspector.web import recipes, session, widgets

session.guard()

# get
view = session.view()

# guard
if view is None:
    widgets.nothing_loaded()
    st.stop()
assert view is not None

# show: the best one and the figures of the selected one
widgets.context_bar(view)
recipes.finding(view)

# ask: try them, or make one the run
recipes.ask(view)

# show: what each gives and costs
recipes.chart_and_table(view)
recipes.take_along(view)
