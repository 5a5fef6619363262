"""Which recipe is best here?"""

import streamlit as st

from inspector.web import context, recipes, session

session.guard()

# get
view = session.view()

# guard
if view is None:
    context.nothing_loaded()
    st.stop()
assert view is not None

# show: the best one and the figures of the selected one
context.bar(view)
recipes.finding(view)

# ask: try them, or make one the run
recipes.ask(view)

# show: what each gives and costs
recipes.chart_and_table(view)
recipes.take_along(view)
