"""What an owner does with runs as a whole: share them, write notes on them, remove them.

A share is a row of the index and is looked up at every rerun (`session.access`), so that one taken
back ends at once; what was already handed to the other's browser by address is withdrawn here.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import streamlit as st

from inspector import hosting
from inspector.audit import audit
from inspector.errors import InspectorError, ReportError
from inspector.index import Share
from inspector.render import format_bytes, shorten_name
from inspector.store import Note, PairRecord, RunRecord, Workspace
from inspector.web import gate, identity, routes, session, widgets
from inspector.web.session import View
from inspector.web.words import md_text

LONGEST_NOTE = 4000
MOST_ADDRESSES = 50
_SHOWN_SHARES = 8
_NAMED, _EVERYONE = "Named people", "Everyone who signs in"
_LOOK, _EDIT = "Look", "Look and edit"
# In the session's state: which dialog is open, and what about.
_DIALOG = "dialog"
_SEPARATORS = re.compile(r"[\s,;]+")

# Notes are compared and written in one go; all sessions of a server are in one process.
_note_lock: Final = threading.Lock()


# ── who may see a run ────────────────────────────────────────────────────────────────────────


def button(view: View) -> None:
    """Opens the dialog that shares the run; nothing in local mode and for runs of others."""
    if not session.is_signed_in() or session.access().owner:
        return
    st.button(
        "Share",
        key="share",
        type="tertiary",
        icon=":material/share:",
        on_click=_open,
        args=("share", view.run.id),
        help="Lets others see this run by its link",
    )
    if _is_open("share", view.run.id):
        _share_dialog(view)


def _open(what: str, about: str) -> None:
    """Has a dialog shown from now on, whenever the page runs: a job that ends has it run again."""
    st.session_state[_DIALOG] = (what, about)


def _is_open(what: str, about: str) -> bool:
    return bool(st.session_state.get(_DIALOG) == (what, about))


def is_dialog_open() -> bool:
    """Whether one of these dialogs is open; a page can show one dialog at a time."""
    return _DIALOG in st.session_state


def on_page(name: str) -> None:
    """Closes the dialog of another page, or of another run.

    Args:
        name: of the page that is about to be shown.
    """
    here = (name, st.query_params.get("run", ""))
    if st.session_state.get("dialog-page", here) != here:
        _close()
    st.session_state["dialog-page"] = here


def _close() -> None:
    st.session_state.pop(_DIALOG, None)


def link(run_id: str) -> str:
    """The address that opens a run, as people reach this server."""
    parts = urlsplit(st.context.url or identity.openid_origin())
    origin = f"{parts.scheme}://{parts.netloc}" if parts.netloc else ""
    return f"{origin}{gate.base_path()}/overview?run={run_id}"


@st.dialog("Share this run", width="medium", on_dismiss=_close)
def _share_dialog(view: View) -> None:
    st.markdown(
        f"**{md_text(shorten_name(view.pair.title, 50))}** · {md_text(widgets.run_label(view.run))}"
    )
    st.code(link(view.run.id), language=None, wrap_lines=True)
    st.caption(
        "It shows the whole pair: both models, the samples and every run, as figures are measured "
        "against them."
    )
    whom = st.segmented_control(
        "Who may open the link", (_NAMED, _EVERYONE), default=_NAMED, key="share-whom",
        required=True,
    )  # fmt: skip
    given = ""
    if whom == _NAMED:
        given = st.text_input(
            "Their addresses", key="share-addresses",
            placeholder="ada@example.org, grace@example.org",
        )  # fmt: skip
    may = st.segmented_control(
        "They may", (_LOOK, _EDIT), default=_LOOK, key="share-may", required=True,
        help="Edit: tick nodes, set matches, make runs, measure, write notes. Only you can share "
        "and delete.",
    )  # fmt: skip
    if st.button("Share", key="share-now", type="primary", icon=":material/share:"):
        try:
            addresses = [""] if whom == _EVERYONE else _addresses(given)
            _share(view, addresses, editable=may == _EDIT)
        except InspectorError as error:
            widgets.error(error)
    _existing_shares(view)


def _addresses(given: str) -> list[str]:
    """The addresses in a text, without the user's own.

    Raises:
        ReportError: there is none, or one of them cannot be one.
    """
    found = []
    for word in filter(None, _SEPARATORS.split(given)):
        address = hosting.clean_address(word)
        # Behind a proxy people may have names without.
        named = identity.settings().auth == "oidc" and "@" not in address[1:-1]
        if not address or named or "*" in address:
            raise ReportError(
                f"{shorten_name(word, 60)} is not an address",
                hint="Write addresses as people sign in with them, with commas between them.",
            )
        found.append(address)
    own = identity.require().key
    found = [each for each in found if hosting.user_key(each) != own]
    if not 0 < len(found) <= MOST_ADDRESSES:
        raise ReportError(
            f"there are {len(found)} addresses of others, expected 1 to {MOST_ADDRESSES}",
            hint="Write the addresses of those who may see this run.",
        )
    return found


def _require_own() -> None:
    """Refuses what only the owner of the run may do."""
    if session.access().owner:
        raise ReportError(
            "only the owner of a run can share or delete it",
            hint="Ask the owner, or load the models into your own workspace.",
        )


def _share(view: View, addresses: list[str], *, editable: bool) -> None:
    _require_own()
    run = session.own_workspace().run(view.run.id)
    user = identity.require()
    for address in addresses:
        session.index().share(run.id, run.pair_id, user.key, address, editable)
        audit(
            "share", user=user.address, run=run.id, pair=run.pair_id,
            whom=address or "everyone", editable=editable,
        )  # fmt: skip
    if not editable:
        _end_access(run.pair_id)


def _existing_shares(view: View) -> None:
    """Who may see the pair, each with the button that takes it back."""
    own = identity.require().key
    shares = [s for s in session.index().shares_of_pair(view.pair.id) if s.owner_key == own]
    if not shares:
        return
    numbers = {run.id: run.number for run in view.runs}
    st.markdown("**Shared with**")
    with st.container(height=230 if len(shares) > 4 else "content", border=False, gap="xsmall"):
        for place, share in enumerate(shares):
            with st.container(
                horizontal=True, vertical_alignment="center", key=f"share-row-{place}"
            ):
                who = md_text(shorten_name(share.address, 40)) if share.address else _EVERYONE
                st.markdown(
                    f"{who} · {'may edit' if share.editable else 'may look'}", width="content"
                )
                st.caption(
                    f"run {numbers.get(share.run_id, '–')}, since {_day(share.created)}",
                    width="content",
                )
                st.space("stretch")
                st.button(
                    "Take back",
                    key=f"unshare-{share.run_id}-{hosting.user_key(share.address)}",
                    type="tertiary",
                    icon=":material/link_off:",
                    on_click=_take_back,
                    args=(share,),
                )


@session.reporting
def _take_back(share: Share) -> None:
    user = identity.require()
    if share.owner_key != user.key:
        return
    session.index().unshare(share.run_id, share.address)
    audit(
        "unshare", user=user.address, run=share.run_id, pair=share.pair_id,
        whom=share.address or "everyone",
    )  # fmt: skip
    _end_access(share.pair_id)


def _end_access(pair_id: str) -> None:
    """Ends what others have under way or in hand that they may not have any more."""
    own = identity.require().key
    runs = [run.id for run in session.own_workspace().runs(pair_id)]
    shares = session.index().shares_of_pair(pair_id)

    def may(key: str, looks: bool) -> bool:
        own_shares = (s for s in shares if not s.address or hosting.user_key(s.address) == key)
        return any(share.editable or looks for share in own_shares)

    session.stop_jobs(runs, keep=may)
    routes.withdraw(runs, but=own)


def whose() -> None:
    """Says whose run is looked at, with the way back; nothing for the user's own."""
    found = session.access()
    if not found.owner:
        return
    what = "you may edit" if found.editable else "you may look"
    with st.container(
        horizontal=True, vertical_alignment="center", key="whose", gap="small", width="content"
    ):
        st.markdown(
            f":material/group: Shared by **{md_text(shorten_name(found.owner, 28))}** · {what}",
            width="content",
        )
        st.button(
            "My own runs",
            key="own-runs",
            type="tertiary",
            icon=":material/home:",
            on_click=st.query_params.clear,
            help="Leaves this run and opens what you looked at last",
        )


def shared_with_me(place: str = "") -> None:
    """The runs that others share with the user, each with a link; nothing where there are none.

    Args:
        place: tells two of these lists on one page apart.
    """
    if not session.is_signed_in():
        return
    user, data = identity.require(), identity.settings().data
    assert data is not None
    shown: list[tuple[Share, PairRecord, RunRecord]] = []
    for share in reversed(session.index().shares_to(user.key)):
        folder = hosting.workspace_folder(data, share.owner_key)
        if share.run_id in {each.run_id for each, _, _ in shown} or not folder.is_dir():
            continue
        try:
            space = Workspace(folder)
            shown.append((share, space.pair(share.pair_id), space.run(share.run_id)))
        except InspectorError:  # removed meanwhile
            continue
        if len(shown) == _SHOWN_SHARES:
            break
    if not shown:
        return
    st.markdown("**Shared with me**")
    with st.container(horizontal=True, key=f"shared-with-me{place}"):
        for share, pair, run in shown:
            owner = session.index().address_of(share.owner_key)
            st.button(
                f"{md_text(shorten_name(pair.title, 32))} · run {run.number} · "
                f"{md_text(shorten_name(owner, 32))}",
                key=f"shared{place}-{share.run_id}",
                type="tertiary",
                icon=":material/edit:" if share.editable else ":material/visibility:",
                on_click=_open_run,
                args=(share.run_id,),
                help="You may edit it" if share.editable else "You may look at it",
            )


def _open_run(run_id: str) -> None:
    st.query_params.clear()
    session.select_run(run_id)


# ── notes ────────────────────────────────────────────────────────────────────────────────────


def note_button(view: View) -> None:
    """Opens the run's note, to be read and, where the user may, written."""
    st.button(
        "Note",
        key="note-button",
        type="tertiary",
        icon=":material/sticky_note_2:",
        on_click=_open_note,
        args=(view.run.id,),
        help="What is to be remembered about this run",
    )
    if _is_open("note", view.run.id):
        _note_dialog(view)


@session.reporting
def _open_note(run_id: str) -> None:
    st.session_state["note-before"] = session.workspace().note(run_id)
    st.session_state.pop("note-text", None)
    _open("note", run_id)


def note(view: View) -> None:
    """The run's note in one line with who wrote it and when; nothing where there is none."""
    found = session.workspace().note(view.run.id)
    if found is None:
        return
    text = " ".join(found.text.split())
    with st.container(key="note", gap=None):
        st.caption(
            f":material/sticky_note_2: {md_text(shorten_end(text, 160))} :gray[— {_signed(found)}]",
            help=_tooltip(found) if len(text) > 160 else None,
        )


def shorten_end(text: str, longest: int) -> str:
    """The text, cut at its end where it is longer."""
    return text if len(text) <= longest else f"{text[: longest - 1].rstrip()}…"


def _signed(found: Note) -> str:
    by = f"{md_text(shorten_name(found.by, 40))}, " if found.by else ""
    return f"{by}{_day(found.written)}"


def _tooltip(found: Note) -> str:
    return "  \n".join(md_text(line) for line in found.text.splitlines()[:60])


def _day(time: str) -> str:
    """A time of a record as people read it: in UTC, to the minute."""
    return f"{datetime.fromisoformat(time):%Y-%m-%d %H:%M} UTC"


@st.dialog("Note on this run", width="medium", on_dismiss=_close)
def _note_dialog(view: View) -> None:
    before: Note | None = st.session_state.get("note-before")
    label = md_text(widgets.run_label(view.run))
    st.caption(f"{label}" + (f" · last written by {_signed(before)}" if before else ""))
    if not session.may_edit():
        for line in (before.text if before else "No note is written yet.").splitlines():
            st.markdown(md_text(line) or "&nbsp;")
        st.caption(session.edit_hint())
        return
    text = st.text_area(
        "Note",
        before.text if before else "",
        key="note-text",
        max_chars=LONGEST_NOTE,
        height=220,
        label_visibility="collapsed",
        placeholder="What was tried, what was found, what comes next",
    )
    if st.button("Save", key="note-save", type="primary", icon=":material/save:"):
        try:
            meanwhile = save_note(view.run.id, text, before)
        except InspectorError as error:
            widgets.error(error)
            return
        if meanwhile is None:
            _close()
            st.rerun()
        st.session_state["note-before"] = meanwhile[0]
        _changed_meanwhile(meanwhile[0])


def _changed_meanwhile(other: Note | None) -> None:
    """Says what another wrote since the dialog was opened: nothing is lost of either text."""
    if other is None:
        st.warning("The note was taken away meanwhile. **Save again to write yours.**")
        return
    st.warning(
        f"Not saved yet: {_signed(other)} another text was written, which stands below. **Take "
        "what you need of it into yours, then Save: yours takes its place.**"
    )
    st.code(other.text, language=None, wrap_lines=True)


def save_note(run_id: str, text: str, before: Note | None) -> tuple[Note | None] | None:
    """Writes a note, unless another one was written since.

    Args:
        run_id: the run that is looked at.
        text: at most `LONGEST_NOTE` characters; an empty one takes the note away.
        before: the note that the writer has seen; None where there was none.

    Returns:
        None where it is written; else the other note, alone in a tuple: None where the note was
        taken away.

    Raises:
        ReportError: the text is too long, or the user may not write it.
    """
    session.require_edit()
    if len(text) > LONGEST_NOTE:
        raise ReportError(
            f"the note has {len(text):,} characters, expected at most {LONGEST_NOTE:,}",
            hint="Shorten the note.",
        )
    space = session.workspace()
    with _note_lock:
        now = space.note(run_id)
        if now != before and (now is None or now.text != text):
            return (now,)
        space.save_note(run_id, text, identity.require().address)
    return None


# ── removal ──────────────────────────────────────────────────────────────────────────────────


def delete_run_button(view: View) -> None:
    """Asks whether the shown run may be removed; nothing for runs of others."""
    if session.access().owner:
        return
    only = len(view.runs) == 1
    st.button(
        f"Delete run {view.run.number}",
        key="delete-run",
        icon=":material/delete:",
        type="tertiary",
        disabled=only,
        on_click=_open,
        args=("delete-run", view.run.id),
        help="It is the pair's only run: delete the pair on the Models page." if only else None,
    )
    if _is_open("delete-run", view.run.id):
        _delete_run_dialog(view)


@st.dialog("Delete this run?", on_dismiss=_close)
def _delete_run_dialog(view: View) -> None:
    size = format_bytes(_size(session.own_workspace().run_folder(view.run.id)))
    st.markdown(
        f"**{md_text(widgets.run_label(view.run))}** of "
        f"{md_text(shorten_name(view.pair.title, 50))} goes with its file, figures and note: "
        f"**{size}**. The pair and its other runs stay." + _links_end([view.run.id])
    )
    if _confirmed("delete-run"):
        session.own_workspace().run(view.run.id)
        session.stop_jobs([view.run.id])
        session.own_workspace().delete_run(view.run.id)
        _forgotten([view.run.id], run=view.run.id, pair=view.pair.id)
        if session.is_signed_in():
            session.index().forget_run(view.run.id)
        session.select_run(next(run.id for run in reversed(view.runs) if run.id != view.run.id))
        st.rerun()


def delete_pair_button(pair: PairRecord) -> None:
    """Asks whether a pair may be removed; nothing for pairs of others."""
    if session.access().owner:
        return
    st.button(
        "Delete this pair",
        key="delete-pair",
        icon=":material/delete:",
        type="tertiary",
        on_click=_open,
        args=("delete-pair", pair.id),
    )
    if _is_open("delete-pair", pair.id):
        _delete_pair_dialog(pair)


@st.dialog("Delete this pair?", on_dismiss=_close)
def _delete_pair_dialog(pair: PairRecord) -> None:
    space = session.own_workspace()
    runs = space.runs(pair.id)
    size = format_bytes(_pair_size(space, pair, runs))
    st.markdown(
        f"**{md_text(shorten_name(pair.title, 50))}** goes with "
        f"**{widgets.count(len(runs), 'run')}, {size}**: figures, notes, made models, "
        + (
            "and the models and samples that no other pair uses."
            if _is_inside(space, pair.float_model.path)
            else "but not the files on your disk that it was loaded from."
        )
        + _links_end([run.id for run in runs])
    )
    if _confirmed("delete-pair"):
        session.stop_jobs([run.id for run in runs])
        space.delete_pair(pair.id)
        _forgotten([run.id for run in runs], pair=pair.id, runs=len(runs))
        if session.is_signed_in():
            session.index().forget_pair(pair.id)
        others = space.pairs()
        if space.current_pair() is None and others:
            space.set_current_pair(others[0].id)
        st.query_params.clear()
        st.rerun()


def _links_end(run_ids: list[str]) -> str:
    """A sentence on the links that end with runs; "" where there are none."""
    if not session.is_signed_in():
        return ""
    shared = sum(len(session.index().shares(each)) for each in run_ids)
    return f" {widgets.count(shared, 'share')} by link will end." if shared else ""


def _confirmed(key: str) -> bool:
    """Whether the removal was confirmed; it can be called off."""
    st.caption("This cannot be undone. A job that works on it is stopped first.")
    with st.container(horizontal=True, key=f"{key}-choice"):
        if st.button("Keep", key=f"{key}-no"):
            _close()
            st.rerun()
        return st.button("Delete", key=f"{key}-yes", type="primary", icon=":material/delete:")


def _forgotten(run_ids: list[str], **what: str | int) -> None:
    """Writes a removal down, and takes back the addresses of what was removed."""
    _close()
    user = identity.require()
    if session.is_signed_in():
        audit("delete", user=user.address, **what)
    routes.withdraw(run_ids)


def _is_inside(space: Workspace, path: Path | str) -> bool:
    return bool(str(path)) and Path(path).is_relative_to(space.root)


def _pair_size(space: Workspace, pair: PairRecord, runs: tuple[RunRecord, ...]) -> int:
    """Bytes that go with a pair: its runs, and its models and feeds that no other pair names."""
    others = {
        str(path) for other in space.pairs() if other.id != pair.id for path in _files_of(other)
    }
    own = {path for path in _files_of(pair) if _is_inside(space, path) and str(path) not in others}
    folders = [space.run_folder(run.id) for run in runs]
    return sum(map(_size, [*folders, *own]))


def _files_of(pair: PairRecord) -> Iterator[Path]:
    for model in (pair.float_model, pair.quantized_model):
        if model is not None:
            yield model.path
    for feeds in (pair.inputs, pair.calibration):
        if feeds is not None and feeds.path:
            yield Path(feeds.path)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if not path.is_dir():
        return path.stat().st_size if path.is_file() else 0
    return sum(
        os.lstat(os.path.join(folder, name)).st_size
        for folder, _, names in os.walk(path)
        for name in names
    )


# ── the account ──────────────────────────────────────────────────────────────────────────────


def account() -> None:
    """The user's address, what they store, and what signs them out; nothing in local mode."""
    user = identity.current_user()
    if user is None or user == identity.LOCAL:
        return
    with st.popover(
        md_text(shorten_name(user.address, 28)), key="account", type="tertiary", on_change="rerun"
    ) as opened:
        st.markdown(f"Signed in as {md_text(user.address)}")
        found = identity.settings()
        if opened.open:
            used = session.own_workspace().size_bytes()
            st.caption(
                f"Stored: {format_usage(used, found.quota_bytes)}",
                help="Delete pairs and runs that you no longer need to make room.",
            )
            st.progress(min(1.0, used / found.quota_bytes))
            st.button(
                "Delete everything of mine",
                key="delete-all",
                type="tertiary",
                icon=":material/delete_forever:",
                on_click=_open,
                args=("delete-all", ""),
            )
        if found.auth == "oidc":
            st.button("Sign out", key="sign-out", on_click=st.logout)
        elif found.sign_out:
            st.link_button("Sign out", found.sign_out)
    if _is_open("delete-all", ""):
        _delete_all_dialog()


def format_usage(used: int, quota: int) -> str:
    """``1.2 of 20 GB``, both in the unit of the quota."""
    unit, name = next(
        (unit, name)
        for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes"))
        if quota >= unit
    )
    share = used / unit
    least = 0.1 if unit > 1 else 1.0
    shown = f"< {least:g}" if 0 < share < least else f"{share:.1f}".removesuffix(".0")
    return f"{shown} of {quota / unit:.4g} {name}"


@st.dialog("Delete everything of yours?", on_dismiss=_close)
def _delete_all_dialog() -> None:
    space, user = session.own_workspace(), identity.require()
    pairs = space.pairs()
    runs = [run.id for pair in pairs for run in space.runs(pair.id)]
    st.markdown(
        f"**{widgets.count(len(pairs), 'pair')}, {widgets.count(len(runs), 'run')}, "
        f"{format_bytes(space.size_bytes())}**: models, samples, figures and notes go, and every "
        "link that you shared ends. What others share with you stays theirs."
    )
    if _confirmed("delete-all"):
        session.stop_jobs(None)
        space.delete_everything()
        session.index().forget_user(user.key)
        _forgotten(runs, what="everything", pairs=len(pairs), runs=len(runs))
        st.query_params.clear()
        st.session_state.clear()
        st.rerun()
