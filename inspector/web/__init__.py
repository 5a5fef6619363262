"""The Streamlit side: routes, navigation, session state, shared widgets. It computes nothing."""
