"""A field of a form that takes files: the component that sends them from the browser.

Apart from the forms, because its style and script are files of their own (`upload/field.css`,
`upload/field.js`) and its protocol with the page is fixed here. The files go to the routes, not
through the page: the page only hears that there are new ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit import runtime
from streamlit.runtime.scriptrunner import get_script_run_ctx

from inspector.render import format_bytes
from inspector.store import check_quota
from inspector.web import identity, routes, session, uploads
from inspector.web.uploads import Inbox, Uploaded

_FOLDER = Path(__file__).with_name("upload")
_NAME = "quant_inspector_upload_field"


@functools.cache
def _component() -> Callable[..., Any]:
    """The component, registered once per process; its script sees only data, never markup."""
    return st.components.v2.component(
        _NAME,
        css=(_FOLDER / "field.css").read_text(encoding="utf-8"),
        js=(_FOLDER / "field.js").read_text(encoding="utf-8"),
    )


def _is_open(session_id: str) -> bool:
    return runtime.exists() and runtime.get_instance().is_active_session(session_id)


def _tokens() -> dict[str, str]:
    tokens: dict[str, str] = st.session_state.setdefault("inboxes", {})
    return tokens


def inbox(key: str) -> Inbox:
    """The inbox of a field in this tab; a new one where it has none, or it was removed."""
    user, known = identity.require(), uploads.inboxes()
    found = known.find(user.key, _tokens().get(key, ""))
    if found is None:
        context = get_script_run_ctx()
        settings, workspace = identity.settings(), session.own_workspace()

        def check() -> None:
            if settings.is_portal:
                check_quota(workspace, settings.quota_bytes, known.missing_bytes(user.key))

        found = Inbox(
            workspace.root / "temporary",
            session=context.session_id if context else "",
            limit_bytes=settings.upload_bytes,
            check_quota=check,
        )
        _tokens()[key] = known.open(user.key, found)
        known.keep_tidy(_is_open)
    return found


def version(*paths: Path) -> int:
    """How often the files beside uploaded ones have changed: part of the key of what is asked about
    them, as others may lie at the same paths since. 0 where none is of this tab's inboxes."""
    inboxes = [inbox(key) for key in _tokens()]
    return sum(
        each.changes for each in inboxes if any(path.is_relative_to(each.folder) for path in paths)
    )


def is_under_way() -> bool:
    """Whether a file of this tab is on its way: what is chosen is not complete yet."""
    return any(inbox(key).missing_bytes() for key in _tokens())


def failed() -> tuple[str, ...]:
    """Names of the files of this tab that were not taken and still stand in a field."""
    by_field: dict[str, list[str]] = st.session_state.get("failed-uploads", {})
    return tuple(name for names in by_field.values() for name in names)


def _note_failed(key: str, told: Any) -> None:
    """Keeps what a field's script has just told of files that were not taken."""
    names = told.get("failed") if isinstance(told, dict) else None
    if isinstance(names, list):
        by_field = st.session_state.setdefault("failed-uploads", {})
        by_field[key] = [each for each in names[:100] if isinstance(each, str)]


def _nothing() -> None:
    """A callback that does nothing: Streamlit reports only what has one."""


def upload_field(label: str, *, key: str, meaning: str) -> tuple[Uploaded, ...]:
    """Shows the field; the files that are in its inbox, in the order of their coming.

    There are none while one is still on its way. The page runs again when a batch of files is
    through, and when one was taken out.

    Args:
        label: what to upload.
        key: of the component.
        meaning: a line that explains it.
    """
    own = inbox(key)
    own.gather()
    found = own.files()
    listed = [{"id": each.id, "name": each.name, "size": each.size_bytes} for each in found]
    shown = _component()(
        key=key,
        data={
            "field": key,
            "address": routes.upload_address(_tokens()[key]),
            "label": label,
            "meaning": meaning,
            "limit": own.limit_bytes,
            "limit_text": format_bytes(own.limit_bytes).replace(".00 ", " "),
            "files": listed,
        },
        height="content",
        on_changed_change=_nothing,
    )
    _note_failed(key, shown.get("changed"))
    return () if own.missing_bytes() else found
