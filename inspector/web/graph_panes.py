"""The two linked graphs of a page: the component that draws them in the browser.

Apart from the page that shows it, because its markup, style and script are files of their own
(`graph/panes.js`, `graph/panes.css`) and its protocol with the page is fixed here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import streamlit as st

_FOLDER = Path(__file__).with_name("graph")
_NAME = "quant_inspector_graph_panes"


@functools.cache
def _component() -> Callable[..., Any]:
    """The component, registered once per process; its script sees only data, never markup."""
    return st.components.v2.component(
        _NAME,
        css=(_FOLDER / "panes.css").read_text(encoding="utf-8"),
        js=(_FOLDER / "panes.js").read_text(encoding="utf-8"),
    )


def _nothing() -> None:
    """A callback that does nothing: Streamlit reports only what has one."""


def graph_panes(
    data: Mapping[str, Any],
    *,
    key: str,
    height: int = 560,
    on_selected_change: Callable[[], None] = _nothing,
    on_toggled_change: Callable[[], None] = _nothing,
    on_key_change: Callable[[], None] = _nothing,
    on_failed_change: Callable[[], None] = _nothing,
) -> Any:
    """Shows the float and the quantized graph side by side; what the browser last reported.

    Args:
        data: what to show, JSON throughout; numbers that are not finite are the strings
            "Infinity", "-Infinity" and "NaN".
            `urls`: addresses of the `float` and the `quantized` graph, of the `sheet` of figures
            (from `routes.offer`) and of the `pane` document (`routes.pane_address()`).
            `measure`: the key of the sheet's measure to colour by.
            `threshold`: figures better than it stay uncoloured; None colours all.
            `selected`: {"side", "name"} to select in both panes and scroll to, or None. The
            browser's own last selection coming back changes nothing.
            `excluded`: names of float nodes on the list of nodes to leave in float.
            `changed`: {float node: {measure key: previewed figure}}.
            `theme`: "light" or "dark".
            `picture`: an address from `routes.accept` that takes SVG, or "" to offer no button.
            `keys` (optional): the keys to report; "/" and "?" are pressed on the page instead.
        key: of the component, and of its values in the session state.
        height: of legend and panes together, pixels.

    Returns:
        The component's result with `selected` ({"side", "name", "names"}: the node selected last,
        and all of them; None before a click), which stays, and, each for one rerun, `toggled`
        ({"side", "name", "names"}: right-click or the key x; all selected nodes when the clicked
        one is among them), `key` ({"key"}: one of the keys; "picture" with "side" when a picture
        was put) and `failed` ({"side", "message"}; side "" is the sheet).
    """
    return _component()(
        key=key,
        data={**data, "height": height},
        height="content",
        on_selected_change=on_selected_change,
        on_toggled_change=on_toggled_change,
        on_key_change=on_key_change,
        on_failed_change=on_failed_change,
    )
