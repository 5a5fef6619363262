"""The entry point: ``streamlit run app.py``.

`streamlit run` finds `app` and serves it; its script is `inspector/web/portal.py`, which lies in
a folder without a sibling `pages/`, so that no page can be reached around the portal.
`streamlit.testing` runs this file as a plain script instead.
"""

import streamlit as st
from streamlit import runtime

from inspector.web import portal, routes

if __name__ == "__main__" and runtime.exists():
    portal.main()
else:
    app = st.App(
        portal.__file__,
        routes=routes.served(),
        middleware=portal.middleware(),
        lifespan=portal.lifespan,
        on_script_error=portal.on_script_error,
    )
