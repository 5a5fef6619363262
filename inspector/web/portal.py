"""The frame around every page: navigation, the job under way, errors, keys.

`st.App` runs this file as its script; `app.py` calls `main` where Streamlit's test runner runs
it. Pages are given by absolute path: no folder `pages/` lies beside this script.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import streamlit as st
import streamlit.logger
from starlette.concurrency import run_in_threadpool
from streamlit.runtime.scriptrunner import get_script_run_ctx

from inspector import audit, confinement, housekeeping, logs
from inspector.errors import InspectorError, SettingError
from inspector.hosting import Settings
from inspector.index import Index
from inspector.web import gate, identity, metrics, session, sharing, style, uploads, widgets, words

PAGES_FOLDER = Path(__file__).resolve().parents[2] / "pages"
# (address, title, icon); each shows the page file of its address.
PAGES = (
    ("models", "Models", ":material/deployed_code:"),
    ("overview", "Overview", ":material/show_chart:"),
    ("tensors", "Tensors", ":material/bar_chart:"),
    ("graph", "Graph", ":material/account_tree:"),
    ("exclusions", "Exclusions", ":material/checklist:"),
    ("recipes", "Recipes", ":material/science:"),
    ("report", "Report", ":material/description:"),
)

_log = logging.getLogger("inspector.web")


def middleware() -> list[Any]:
    """The gate in front of the server.

    Raises:
        SystemExit: a setting cannot be used; what is wrong and what to do are two lines on standard
            error, and nothing was answered yet.
    """
    try:
        found = identity.checked_settings()
        if found.is_portal:
            _open_books(found)
        return gate.middleware(found, ["home", *(each[0] for each in PAGES)])
    except InspectorError as error:
        print(f"Error: {error.message}.\nHint: {error.hint}", file=sys.stderr)
        raise SystemExit(2) from None


def _open_books(found: Settings) -> None:
    """Portal mode: makes the folder of everything, and begins its log and its audit trail.

    Raises:
        SettingError: the folder cannot be made or written.
        ReportError: its index is damaged.
    """
    assert found.data is not None
    try:
        housekeeping.make_private(found.data)
        audit.keep_in(found.data)
        Index(found.data).close()
    except OSError as error:
        raise SettingError(
            f"QUANT_INSPECTOR_DATA is {found.data}, which cannot be written: {error.strerror}",
            hint="Set QUANT_INSPECTOR_DATA to a folder that the server's user may write to.",
        ) from error
    logs.write_json()
    streamlit.logger.setup_formatter = logs.lead_to_root  # for those that are made later


@asynccontextmanager
async def lifespan(_app: Any) -> AsyncIterator[None]:
    """Starts the local user's worker with the server, and stops every worker with it.

    Unfinished uploads do not outlive it either.
    """
    confinement.give_memory_back()
    await run_in_threadpool(uploads.remove_leftovers, _workspaces())
    found = identity.settings()
    folder = found.data or session.own_root()
    metrics.watch(folder, session.workers)
    await run_in_threadpool(_begin_records, folder)
    if not found.is_portal:
        session.start()
    elif found.data is not None:
        # Its thread ends with this process, wherever it is.
        housekeeping.keep_tidy(found.data, found.expiry_days, is_busy=session.is_busy)
    yield
    uploads.inboxes().close()
    session.close_workers()


def _begin_records(folder: Path) -> None:
    """Tells of jobs that the last end of the server has stopped, unless it has not ended: of two
    servers on one folder the second knows nothing of the jobs of the first."""
    try:
        alone = housekeeping.hold(folder)
    except OSError as error:  # whatever needs the folder says so
        _log.warning("%s cannot be held: %s", folder, error)
        alone = True
    if alone:
        session.begin_records()
    else:
        _log.warning("another server is using %s: its jobs are left alone", folder)


def _workspaces() -> list[Path]:
    """The folders of all workspaces of this server."""
    found = identity.settings()
    if not found.is_portal or found.data is None:
        return [session.own_root()]
    return list((found.data / "users").glob("*"))


def on_script_error(error: Exception) -> bool:
    """Says that something unforeseen happened; the details go to the log, not on the page."""
    _log.error("a page failed", exc_info=error)
    st.error(
        f"Something unforeseen happened: {words.md_text(type(error).__name__)}.\n\n"
        "**Reload the page; if it happens again, report it with the lines of the server's log.**",
        icon=":material/error:",
    )
    return True


def _pages() -> dict[str, Any]:
    pages = {
        name: st.Page(PAGES_FOLDER / f"{name}.py", title=title, icon=icon, url_path=name)
        for name, title, icon in PAGES
    }
    # "/" shows the overview as well; the default page has no address of its own.
    pages["home"] = st.Page(
        PAGES_FOLDER / "overview.py",
        title="Overview",
        url_path="home",
        default=True,
        visibility="hidden",
    )
    return pages


@functools.cache
def _signal() -> Callable[..., Any]:
    """A component without a picture that runs the page again, once for each number it is given."""
    return st.components.v2.component(
        "quant_inspector_signal",
        js="""
            const given = new WeakMap();
            export default ({ parentElement, data, setTriggerValue }) => {
                if (given.get(parentElement) !== data.number) {
                    given.set(parentElement, data.number);
                    setTriggerValue('now', true);
                }
            };
        """,
    )


def _open_overview(pages: dict[str, Any]) -> None:
    """Opens the overview of the pair that was just loaded, in the run after this one.

    Not at once: the browser still has the timers of the page that watched the job, and a timer that
    fires during a change of page asks for the old page again, which then comes out empty. Once the
    browser shows this run it has no such timers any more; so it says that, once and by no timer.
    """
    opening = st.session_state["overview-to-open"]
    answer = st.session_state.get("open-overview") or {}
    if answer.get("now"):
        # Before the signal is put on the page again: the browser would give it once more.
        del st.session_state["overview-to-open"]
        st.switch_page(pages["overview"], query_params={"run": opening["run"]})
    opening["asked"] += 1
    st.caption("Opening the overview…")
    _signal()(key="open-overview", data={"number": opening["asked"]}, on_now_change=lambda: None)


def _sidebar(pages: dict[str, Any], current: Any) -> None:
    with st.sidebar:
        with st.container(key="brand"):
            st.markdown("Quant Inspector")
        with st.container(key="nav"):
            for name, title, icon in PAGES:
                at_home = name == "overview" and current == pages["home"]
                st.page_link(
                    pages["home" if at_home else name],
                    label=title,
                    icon=icon,
                    width="stretch",
                    # Run, tensor and filters go along; Streamlit drops them otherwise.
                    query_params=session.address(),
                )
        with st.container(key="keys"):
            st.button("Keys", icon=":material/keyboard:", type="tertiary", key="keys-button")
        if "overview-to-open" in st.session_state:
            _open_overview(pages)
        jobs = session.active_jobs()
        with st.container(key="job", height=170, border=False):
            if jobs:
                widgets.job_card(jobs[0].id, place="sidebar")
                widgets.waiting_jobs(jobs[1:])
    if st.session_state.get("keys-button") and not sharing.is_dialog_open():
        widgets.keys_dialog()


def _drop_stale_widgets() -> None:
    """Lets go of the callbacks of widgets that the last page did not show.

    Streamlit forgets what such a widget was set to, but keeps its callback with all arguments, a
    whole view among them, for as long as the tab is open. Where its insides are others than those
    of 1.67, nothing is dropped.
    """
    state = getattr(getattr(get_script_run_ctx(), "session_state", None), "_state", None)
    new, old = getattr(state, "_new_widget_state", None), getattr(state, "_old_state", None)
    known = getattr(new, "widget_metadata", None)
    shown = getattr(new, "states", None)
    if known is None or shown is None or old is None:
        return
    for widget in [each for each in known if each not in shown and each not in old]:
        del known[widget]


def main() -> None:
    """Shows the page that the address asks for."""
    st.set_page_config(
        page_title="Quant Inspector",
        # Streamlit keeps the picture as media, which nobody gets who has not signed in.
        page_icon=style.icon() if identity.current_user() else None,
        layout="wide",
        initial_sidebar_state=200,
    )
    style.apply()
    pages = _pages()
    # Before the sign-in as well: a page that is not known yet would be sought beside the script.
    current = st.navigation(list(pages.values()), position="hidden")
    identity.require()
    _drop_stale_widgets()
    widgets.register_pages(pages)
    session.start()
    loaded = session.settle()
    if loaded is not None:
        st.session_state["overview-to-open"] = {"run": loaded, "asked": 0}
    with session.whole_run():
        sharing.on_page(current.url_path)
        _sidebar(pages, current)
        widgets.stopped_jobs()
        if current != pages["models"]:  # there it stands beside the button that was pressed
            widgets.problem()
        try:
            current.run()
        except InspectorError as error:
            widgets.error(error)
            if session.address():
                st.page_link(pages["home"], label="Open the latest run", icon=":material/home:")
                if session.is_signed_in():
                    own = words.md_text(identity.require().address)
                    st.caption(
                        f"You are signed in as {own}. Somebody else's run opens once it is shared "
                        "with this address."
                    )


if __name__ == "__main__":
    main()
