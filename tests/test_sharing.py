"""Runs that are shared, annotated and removed: by whom, what of them is seen, what is refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from streamlit.proto.WidgetStates_pb2 import WidgetState

from inspector import workbench
from inspector.errors import ReportError
from inspector.hosting import user_key
from inspector.index import Index
from inspector.store import Workspace, new_id
from inspector.web import session, sharing
from tests.browser import chromium, served
from tests.hosted import (
    BOB,
    HEADER,
    PAGES,
    Portal,
    fill,
    header_portal,
    openid_portal,
    sign_in,
    watermark,
    workspace_of,
)
from tests.samples import ROOT
from tests.stream import Visitor

EVE = "eve@example.org"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"></svg>'
SLOWLY = 60_000  # milliseconds that a browser waits on a busy machine
_numbers = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class Owned:
    """A run in the workspace of somebody who has no other."""

    address: str
    run: str
    pair: str
    space: Workspace

    @property
    def mark(self) -> bytes:
        return watermark(self.address).encode()

    def record(self) -> dict[str, str]:
        """What the workspace says, without what can be computed again."""
        files = [
            *self.space.root.glob("pairs/*/*"),
            *self.space.root.glob("runs/*/*.json"),
            *self.space.root.glob("runs/*/graph/*.svg"),
            *self.space.root.glob("current.json"),
        ]
        return {str(p): p.read_text(encoding="utf-8") for p in files if p.is_file()}


def owned_in(data: Path) -> Owned:
    address = f"owner{next(_numbers)}@example.org"
    run = fill(data, address)
    space = Workspace(workspace_of(data, address))
    return Owned(address=address, run=run, pair=space.run(run).pair_id, space=space)


class Person(Visitor):
    """A visitor who also presses what stands in a dialog, and reads figures and buttons."""

    def __init__(self, address: str, **more: Any) -> None:
        self.fragments: dict[str, str] = {}
        self.disabled: dict[str, bool] = {}
        self.figures: list[str] = []
        super().__init__(address, **more)

    def receive(self, timeout: float = 60.0) -> ForwardMsg:
        message = super().receive(timeout)
        if message.WhichOneof("type") == "new_session" and self._is_whole:
            self.figures.clear()
            self.disabled.clear()
        element = message.delta.new_element
        kind = element.WhichOneof("type")
        widget = getattr(getattr(element, kind), "id", "") if kind else ""
        block = message.delta.add_block
        opens = block.WhichOneof("type")
        if opens in ("popover", "expandable") and getattr(block, opens).id:
            widget = getattr(block, opens).id
            self.ids[widget.split("-", 2)[-1]] = widget
        if isinstance(widget, str) and widget:
            self.fragments[widget] = message.delta.fragment_id
        if kind == "button":
            self.disabled[widget.split("-", 2)[-1]] = element.button.disabled
        elif kind == "metric":
            self.figures.append(f"{element.metric.label} {element.metric.body}")
        elif kind == "dataframe":
            self.figures.append(element.dataframe.arrow_data.data.hex())
        elif kind == "plotly_chart":
            self.figures.append(element.plotly_chart.spec)
        elif kind == "markdown" and " dB" in element.markdown.body:
            self.figures.append(element.markdown.body)
        return message

    def do(self, key: str, **value: Any) -> bytes:
        """All that came after a button was pressed or a widget got a value, in its dialog."""
        state = WidgetState(id=self.ids[key], **(value or {"trigger_value": True}))
        if value:
            self._values[state.id] = state
        fragment = self.fragments.get(state.id, "")
        came: list[bytes] = []
        self._see = came.append
        self._rerun(*([] if value else [state]), **({"fragment_id": fragment} if fragment else {}))
        return b"".join(came)


@pytest.fixture(scope="module")
def portal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Portal]:
    data = tmp_path_factory.mktemp("sharing") / "data"
    data.mkdir()
    with header_portal(data) as found:
        yield found


@pytest.fixture
def owned(portal: Portal) -> Owned:
    return owned_in(portal.data)


def person(portal: Portal, address: str) -> Person:
    return Person(portal.address, **portal.identity(address))


def share(portal: Portal, owned: Owned, address: str, *, editable: bool = False) -> None:
    Index(portal.data).share(owned.run, owned.pair, user_key(owned.address), address, editable)


def audited(portal: Portal) -> list[dict[str, Any]]:
    lines = (portal.data / "audit.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ------------------------------------------------------------------------------ without a server


@pytest.mark.parametrize(
    ("used", "quota", "said"),
    [
        (1_234_000_000, 20 * 10**9, "1.2 of 20 GB"),
        (0, 20 * 10**9, "0 of 20 GB"),
        (4_000, 20 * 10**9, "< 0.1 of 20 GB"),
        (20_000_000_000, 20 * 10**9, "20 of 20 GB"),
        (750_000, 1_500_000, "0.8 of 1.5 MB"),
        (3, 900, "3 of 900 bytes"),
    ],
)
def test_what_is_stored_is_said_in_the_unit_of_the_quota(used: int, quota: int, said: str) -> None:
    assert sharing.format_usage(used, quota) == said


def test_indexes_of_one_folder_in_one_process_lose_nothing_of_each_other(tmp_path: Path) -> None:
    first = Index(tmp_path)
    for number in range(3):
        second = Index(tmp_path)  # must not give up the locks of the first
        second.share(f"{number}" * 32, "b" * 32, user_key(EVE), BOB, True)
        second.close()
        first.saw(user_key(BOB), BOB)
        assert len(first.shares_to(user_key(BOB))) == number + 1


@pytest.fixture(scope="module")
def two_pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Owned, str, str]:
    """A workspace with a pair that is shared, and the ids of a pair and a run that are not."""
    owned = owned_in(tmp_path_factory.mktemp("pairs") / "data")
    space, pair_id, run_id = owned.space, new_id(), new_id()
    space.save_pair(replace(space.pair(owned.pair), id=pair_id))
    run = replace(space.run(owned.run), id=run_id, pair_id=pair_id)
    space.save_run(run, space.comparison(owned.run))
    return owned, pair_id, run_id


def test_of_anothers_workspace_there_is_the_shared_pair_and_nothing_else(
    two_pairs: tuple[Owned, str, str],
) -> None:
    owned, pair_id, run_id = two_pairs
    seen = session._SharedWorkspace(owned.space.root, owned.pair, True)
    assert seen.run(owned.run) == owned.space.run(owned.run)
    assert seen.runs(owned.pair) == owned.space.runs(owned.pair)
    assert seen.pair(owned.pair) == owned.space.pair(owned.pair)
    assert seen.comparison(owned.run) == owned.space.comparison(owned.run)
    nothing = new_id()
    for look, hidden in (
        (seen.run, run_id),
        (seen.comparison, run_id),
        (seen.note, run_id),
        (seen.run_folder, run_id),
        (seen.pair, pair_id),
        (seen.runs, pair_id),
        (seen.draft, pair_id),
    ):
        with pytest.raises(ReportError) as refused:
            look(hidden)
        with pytest.raises(ReportError) as missing:
            look(nothing)
        assert str(refused.value) == str(missing.value).replace(nothing, hidden)


@pytest.mark.parametrize("editable", [False, True])
def test_what_a_share_does_not_allow_by_name_is_refused(
    two_pairs: tuple[Owned, str, str], editable: bool
) -> None:
    owned, _, _ = two_pairs
    seen = session._SharedWorkspace(owned.space.root, owned.pair, editable)
    looks = {
        *("root", "cache", "pair", "draft", "recipes", "search", "run", "runs", "comparison"),
        *("comparison_stamp", "run_folder", "detail", "note"),
    }
    edits = {"save_draft", "save_note"} if editable else set()
    names = {each for each in dir(Workspace) if not each.startswith("_")}
    refused = names - looks - edits
    for name in refused:
        with pytest.raises(ReportError, match="looked at"):
            getattr(seen, name)
    for name in looks | edits:
        getattr(seen, name)
    assert {"delete_run", "delete_pair", "delete_everything", "set_current_pair"} <= refused
    assert {"pairs", "current_pair", "size_bytes", "save_run", "write_detail"} <= refused


# ------------------------------------------------------------------------- who sees a run, and how


@pytest.mark.slow
def test_without_a_share_the_answer_is_that_of_a_run_that_does_not_exist(
    portal: Portal, owned: Owned
) -> None:
    share(portal, owned, EVE)
    nothing = new_id()
    with person(portal, BOB) as bob:
        for page in PAGES:
            said = {}
            for run in (owned.run, nothing):
                shown = bob.visit(page, query=f"run={run}")
                assert owned.mark not in shown
                assert owned.address.encode() not in shown
                assert b"You are signed in as" in shown
                texts = re.findall(rb"[ -~]*there is no run[ -~]*", shown)
                assert texts, page
                said[run] = [text.replace(run.encode(), b"ID") for text in texts]
            assert said[owned.run] == said[nothing], page


@pytest.mark.slow
def test_a_shared_run_shows_the_very_same_figures_on_every_page(
    portal: Portal, owned: Owned
) -> None:
    share(portal, owned, BOB)
    found: dict[str, dict[str, list[str]]] = {}
    for address in (owned.address, BOB):
        with person(portal, address) as one:
            for page in ("overview", "tensors", "graph", "exclusions", "recipes", "report"):
                query = f"run={owned.run}"
                one.visit(page, query)
                one.finish()
                one.visit(page, query)
                found.setdefault(page, {})[address] = sorted(one.figures)
                assert owned.mark in bytes(one._run)
                whose = b"Shared by" in bytes(one._run)
                assert whose == (address == BOB)
                assert (b"you may look" in bytes(one._run)) == (address == BOB)
    for page, by in found.items():
        assert by[owned.address] == by[BOB], page
    for page in ("overview", "tensors", "exclusions", "report"):
        assert len(found[page][BOB]) > 4


@pytest.mark.slow
def test_who_may_only_look_sees_the_run_and_not_what_its_owner_tries_at_the_moment(
    portal: Portal, owned: Owned
) -> None:
    share(portal, owned, BOB)
    share(portal, owned, EVE, editable=True)
    node = f"{watermark(owned.address)}_relu"
    owned.space.save_draft(owned.pair, {"nodes": [node]})
    ticked = {}
    for address in (owned.address, BOB, EVE):
        with person(portal, address) as one:
            shown = one.visit("exclusions", f"run={owned.run}")
            ticked[address] = b"1 node" in shown
    assert ticked == {owned.address: True, BOB: False, EVE: True}


@pytest.mark.slow
def test_the_dialog_shares_with_several_people_and_takes_back_at_once(
    portal: Portal, owned: Owned
) -> None:
    with person(portal, owned.address) as ada, person(portal, BOB) as bob:
        ada.visit("overview", f"run={owned.run}")
        shown = ada.do("share")
        assert f"/overview?run={owned.run}".encode() in shown
        ada.do("share-addresses", string_value="not;an<address")
        assert b"is not an address" in ada.do("share-now")
        ada.do("share-addresses", string_value="*@example.org")
        assert b"is not an address" in ada.do("share-now")
        ada.do("share-addresses", string_value=owned.address)
        assert b"expected 1 to 50" in ada.do("share-now")
        ada.do("share-addresses", string_value=f"{BOB.upper()}, {EVE};grace@example.org")
        shown = ada.do("share-now")
        assert b"Take back" in shown
        index = Index(portal.data)
        assert [s.address for s in index.shares(owned.run)] == [
            BOB.upper(), EVE, "grace@example.org",
        ]  # fmt: skip
        assert not any(s.editable for s in index.shares(owned.run))

        # In the hands of Bob: addresses of both graphs, of their figures, of the model.
        held: set[bytes] = set()
        for page, number in (("graph", 3), ("exclusions", 1)):
            bob.visit(page, f"run={owned.run}")
            shown = bob.finish()
            assert owned.mark in shown
            assert b"/inspector/picture/" not in shown
            found = set(re.findall(rb"/inspector/held/[\w-]{43}", shown))
            assert len(found) == number, page
            held |= found
        with portal.client(BOB) as client:
            assert {client.get(each.decode()).status_code for each in held} == {200}
            ada.do(f"unshare-{owned.run}-{user_key(BOB)}")
            assert {client.get(each.decode()).status_code for each in held} == {404}
        shown = bob.visit("overview")
        assert b"there is no run" in shown
        assert owned.mark not in shown
        with person(portal, EVE) as eve:
            assert owned.mark in eve.visit("overview", f"run={owned.run}")
    lines = [line for line in audited(portal) if line.get("run") == owned.run]
    assert [(line["event"], line["whom"]) for line in lines] == [
        ("share", BOB.upper()),
        ("share", EVE),
        ("share", "grace@example.org"),
        ("unshare", BOB.upper()),
    ]
    assert {line["user"] for line in lines} == {owned.address}


@pytest.mark.slow
def test_what_everyone_may_see_everyone_finds_on_the_models_page(
    portal: Portal, owned: Owned
) -> None:
    with person(portal, owned.address) as ada:
        ada.visit("overview")
        ada.do("share")
        ada.do("share-whom", string_array_value={"data": ["Everyone who signs in"]})
        ada.do("share-may", string_array_value={"data": ["Look and edit"]})
        ada.do("share-now")
    (found,) = Index(portal.data).shares(owned.run)
    assert (found.address, found.editable) == ("", True)
    with person(portal, "anybody@example.org") as anybody:
        shown = anybody.visit("models")
        assert b"Shared with me" in shown
        assert owned.mark in shown
        assert b"Shared with me" in anybody.visit("overview"), "who has nothing sees it at once"
        assert f"shared-first-{owned.run}" in anybody.ids
        anybody.visit("models")
        shown = anybody.click(f"shared-{owned.run}")
        assert b"you may edit" in shown
        assert anybody.query == {"run": owned.run}
        # One click leads back.
        shown = anybody.click("own-runs")
        assert anybody.query == {}
        assert b"Shared by" not in shown
    Index(portal.data).unshare(owned.run, "")


@pytest.mark.slow
def test_after_a_sign_in_a_shared_link_opens_the_run(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    owned = owned_in(data)
    with openid_portal(data) as portal:
        share(portal, owned, BOB)
        cookies, where = sign_in(portal.address, BOB, f"overview?run={owned.run}")
        assert where == f"/overview?run={owned.run}"
        with Person(portal.address, cookies=cookies) as bob:
            assert owned.mark in bob.visit("overview", f"run={owned.run}")


@pytest.mark.slow
def test_other_runs_of_the_shared_pair_are_seen_other_pairs_are_not(portal: Portal) -> None:
    owned = owned_in(portal.data)
    space, hidden = owned.space, new_id()
    space.save_pair(replace(space.pair(owned.pair), id=hidden, title="hiddenpair"))
    secret = replace(space.run(owned.run), id=new_id(), pair_id=hidden)
    space.save_run(secret, space.comparison(owned.run))
    config = {**space.run(owned.run).recipe, "method": "percentile"}
    other = workbench.requantize(space.root, run_id=owned.run, config=config, exclude=[])
    share(portal, owned, BOB)
    with person(portal, BOB) as bob:
        assert owned.mark in bob.visit("overview", f"run={other}")
        shown = bob.visit("models")
        assert b"hiddenpair" not in shown
        assert hidden.encode() not in shown
        shown = bob.visit("overview", f"run={secret.id}")
        assert b"there is no run" in shown
        assert b"hiddenpair" not in shown


# ----------------------------------------------------------------------------------- who changes it


@pytest.mark.slow
def test_buttons_of_who_may_only_look_are_disabled_or_not_there(
    portal: Portal, owned: Owned
) -> None:
    share(portal, owned, BOB)
    with person(portal, BOB) as bob:
        for page, keys in {
            "overview": ("overview-float", "measure-causes", "time-nodes"),
            "tensors": ("tensors-float",),
            "graph": ("graph-float", "undo"),
            "exclusions": ("requantize", "undo", "redo", "tick-run"),
            "recipes": ("try-recipes",),
        }.items():
            bob.visit(page, f"run={owned.run}")
            bob.finish()
            bob.visit(page)
            for key in keys:
                assert bob.disabled[key], (page, key)
            for key in ("share", "delete-run", "delete-pair"):
                assert key not in bob.disabled, (page, key)
        bob.visit("models")
        assert "delete-pair" not in bob.disabled


CHANGES = {
    "tick": ("overview", (), "overview-float"),
    "measure": ("overview", (), "measure-causes"),
    "time": ("overview", (), "time-nodes"),
    "recipes": ("recipes", (), "try-recipes"),
    "requantize": ("exclusions", (), "requantize"),
    "search": ("exclusions", ("exclusions-view",), "start-search"),
    "note": ("overview", ("note-button",), "note-save"),
    "match": ("tensors", ("match",), "match-refuse"),
}


@pytest.mark.slow
@pytest.mark.parametrize("taken_back", [False, True])
@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_page_that_was_made_while_editing_was_allowed_changes_nothing_any_more(
    portal: Portal, owned: Owned, change: str, taken_back: bool
) -> None:
    page, steps, key = CHANGES[change]
    share(portal, owned, BOB, editable=True)
    if change == "requantize":
        owned.space.save_draft(owned.pair, {"nodes": [f"{watermark(owned.address)}_relu"]})
    with person(portal, BOB) as bob:
        bob.visit(page, f"run={owned.run}")
        bob.finish()
        bob.visit(page)
        for step in steps:
            if step == "note-button":
                bob.do(step)
                bob.do("note-text", string_value="changed")
            elif step == "exclusions-view":
                bob.choose(step, string_array_value={"data": ["Search"]})
            elif step == "match":
                bob.choose(f"match-{owned.run}", bool_value=True)
                bob.finish()
        assert not bob.disabled[key]
        before = owned.record()
        if taken_back:
            Index(portal.data).unshare(owned.run, BOB)
        else:
            share(portal, owned, BOB, editable=False)
        shown = bob.do(key)
        said = b"there is no" if taken_back else b"looked at, not to be changed"
        if change in ("requantize", "note") and not taken_back:
            # Decided while the page is made: by then it offers nothing to press.
            said = b"lets you look, not change"
        assert said in shown
        assert b"unforeseen" not in shown
        bob.finish()
    assert owned.record() == before


@pytest.mark.slow
def test_a_place_for_a_picture_ends_with_the_right_to_edit(portal: Portal, owned: Owned) -> None:
    share(portal, owned, BOB, editable=True)
    with person(portal, BOB) as bob, person(portal, owned.address) as ada:
        bob.visit("graph", f"run={owned.run}")
        bob.finish()
        (place,) = set(re.findall(rb"/inspector/picture/[\w-]{43}", bytes(bob._run)))
        ada.visit("overview", f"run={owned.run}")
        ada.do("share")
        ada.do("share-addresses", string_value=BOB)
        ada.do("share-now")  # to look, from now on
        with portal.client(BOB) as client:
            answer = client.put(
                place.decode(), content=SVG, headers={"Content-Type": "image/svg+xml"}
            )
            assert answer.status_code == 404
    assert not list(owned.space.root.glob("runs/*/graph/*.svg"))


@pytest.mark.slow
def test_who_may_edit_ticks_writes_and_makes_runs_in_the_owners_workspace(
    portal: Portal, owned: Owned
) -> None:
    share(portal, owned, BOB, editable=True)
    with person(portal, BOB) as bob, person(portal, owned.address) as ada:
        bob.visit("overview", f"run={owned.run}&tensor={watermark(owned.address)}_hidden")
        bob.click("overview-float")
        assert owned.space.draft(owned.pair)["nodes"]
        bob.click("overview-float")
        bob.do("note-button")
        bob.do("note-text", string_value="by Bob,\nin two lines")
        bob.do("note-save")
        note = owned.space.note(owned.run)
        assert note is not None
        assert (note.text, note.by) == ("by Bob,\nin two lines", BOB)
        shown = ada.visit("overview", f"run={owned.run}")
        assert b"by Bob" in shown
        owned.space.save_draft(owned.pair, {"nodes": [f"{watermark(owned.address)}_relu"]})
        bob.visit("exclusions")
        bob.click("requantize")
        bob.finish()
        made = owned.space.runs(owned.pair)[-1]
        assert made.id != owned.run
        assert bob.query["run"] == made.id
        assert owned.mark in bytes(bob._run)
    assert not Workspace(workspace_of(portal.data, BOB)).pairs()


@pytest.mark.slow
def test_models_loaded_while_looking_at_anothers_run_are_the_lookers_own(
    portal: Portal, owned: Owned
) -> None:
    looker = "looker@example.org"
    share(portal, owned, looker)
    before = owned.record()
    with person(portal, looker) as bob:
        bob.visit("models", f"run={owned.run}")
        assert owned.mark in bytes(bob._run)
        bob.click("sample-digit-detector")
        bob.finish(120)
    own = Workspace(workspace_of(portal.data, looker))
    assert [pair.title for pair in own.pairs()] == ["digit-detector"]
    assert owned.record() == before


# ----------------------------------------------------------------------------------------- notes


@pytest.mark.slow
def test_a_note_that_another_wrote_meanwhile_is_shown_and_not_lost(
    portal: Portal, owned: Owned
) -> None:
    share(portal, owned, BOB, editable=True)
    with person(portal, BOB) as bob, person(portal, owned.address) as ada:
        for each, text in ((bob, "what Bob saw"), (ada, "what Ada saw")):
            each.visit("overview", f"run={owned.run}")
            each.do("note-button")
            each.do("note-text", string_value=text)
        bob.do("note-save")
        shown = ada.do("note-save")
        assert b"Not saved yet" in shown
        assert b"what Bob saw" in shown
        note = owned.space.note(owned.run)
        assert note is not None
        assert note.text == "what Bob saw"
        ada.do("note-text", string_value="what Ada and Bob saw")
        ada.do("note-save")
        note = owned.space.note(owned.run)
        assert note is not None
        assert (note.text, note.by) == ("what Ada and Bob saw", owned.address)
        ada.visit("overview")
        ada.do("note-button")
        ada.do("note-text", string_value="x" * 4001)
        ada.do("note-save")
        note = owned.space.note(owned.run)
        assert note is not None
        assert note.text == "x" * 4000
        # Shown in the list of runs as well.
        ada.visit("exclusions")
        assert any((b"x" * 4000).hex() in each for each in ada.figures)


# --------------------------------------------------------------------------------------- removal


@pytest.mark.slow
def test_a_deleted_pair_takes_its_runs_its_shares_and_its_running_job_along(
    portal: Portal, owned: Owned
) -> None:
    share(portal, owned, BOB, editable=True)
    with person(portal, owned.address) as ada, person(portal, BOB) as bob:
        bob.visit("recipes", f"run={owned.run}")
        bob.click("try-recipes")
        assert bob.is_waiting
        ada.visit("models")
        shown = ada.do("delete-pair")
        assert b"1 run, " in shown
        assert b"1 share by link will end" in shown
        assert b"Keep" in shown
        ada.do("delete-pair-yes")
        assert not list((owned.space.root / "pairs").iterdir())
        assert not list((owned.space.root / "runs").iterdir())
        assert not list((owned.space.root / "models").iterdir())
        shown = bob.finish()
        assert owned.mark not in shown
        bob.visit("overview")
        assert b"there is no run" in bytes(bob._run)
        ada.visit("overview", "")
        assert b"No models are loaded yet" in ada.finish()
        assert not list((owned.space.root / "pairs").iterdir()), "the job has made nothing since"
        with contextlib.closing(sqlite3.connect(portal.data / "index.sqlite")) as index:
            states = index.execute("SELECT state FROM jobs WHERE keeps LIKE ?", [f"%{owned.run}%"])
            assert states.fetchall() == [("cancelled",)]
    assert Index(portal.data).shares(owned.run) == ()
    (line,) = [e for e in audited(portal) if e["event"] == "delete" and e["user"] == owned.address]
    assert (line["pair"], line["runs"]) == (owned.pair, 1)


@pytest.mark.slow
def test_everything_of_somebody_goes_and_nothing_of_anybody_else(
    portal: Portal, owned: Owned
) -> None:
    other = owned_in(portal.data)
    before = other.record()
    share(portal, owned, BOB)
    share(portal, other, owned.address)
    with person(portal, owned.address) as ada:
        ada.visit("overview")
        ada.choose("account", bool_value=True)
        assert b"of 20 GB" in bytes(ada._run)
        shown = ada.do("delete-all")
        assert b"1 pair, 1 run" in shown
        ada.do("delete-all-yes")
        shown = ada.visit("models", "")
        assert owned.mark not in shown
        assert other.mark in shown, "what others share stays theirs"
    assert not list((owned.space.root / "runs").iterdir())
    assert Index(portal.data).shares(owned.run) == ()
    assert other.record() == before
    (line,) = [e for e in audited(portal) if e["event"] == "delete" and e["user"] == owned.address]
    assert (line["what"], line["pairs"], line["runs"]) == ("everything", 1, 1)


@pytest.mark.slow
def test_where_the_quota_is_used_up_nothing_more_is_made_and_the_hint_says_what_to_do(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    owned = owned_in(data)
    with (
        header_portal(data, environment={"QUANT_INSPECTOR_QUOTA": "2 KB"}) as portal,
        person(portal, owned.address) as ada,
        person(portal, BOB) as bob,
    ):
        ada.visit("models")
        shown = ada.click("sample-digit-transformer")
        assert b"that one user may store" in shown
        assert b"Delete pairs or runs" in shown
        share(portal, owned, BOB, editable=True)
        owned.space.save_draft(owned.pair, {"nodes": [f"{watermark(owned.address)}_relu"]})
        bob.visit("exclusions", f"run={owned.run}")
        shown = bob.click("requantize")
        assert b"is full" in shown
        assert b"one user may store" not in shown, "how much others store is theirs to know"
    assert len(owned.space.runs(owned.pair)) == 1


# -------------------------------------------------------------------------------- on this machine


@pytest.mark.slow
def test_in_local_mode_runs_have_notes_and_can_be_deleted_but_not_shared(tmp_path: Path) -> None:
    owned = owned_in(tmp_path / "data")
    recipe = {**owned.space.run(owned.run).recipe, "method": "percentile"}
    second = workbench.requantize(owned.space.root, run_id=owned.run, config=recipe, exclude=[])
    environment = {"QUANT_INSPECTOR_DATA": str(owned.space.root)}
    with served(ROOT, environment) as address, Person(address) as one:
        one.visit("overview", f"run={second}")
        assert "share" not in one.disabled
        assert "account" not in one.ids
        one.do("note-button")
        one.do("note-text", string_value="looked at on a Sunday")
        one.do("note-save")
        note = owned.space.note(second)
        assert note is not None
        assert (note.text, note.by) == ("looked at on a Sunday", "")
        assert b"looked at on a Sunday" in one.visit("overview")
        one.visit("exclusions")
        shown = one.do("delete-run")
        assert b"run 2" in shown or b"run 1" in shown
        one.do("delete-run-yes")
        assert [run.id for run in owned.space.runs(owned.pair)] == [owned.run]
        assert one.query["run"] == owned.run
        one.visit("exclusions")
        assert one.disabled["delete-run"], "a pair keeps its last run"
        one.visit("models")
        shown = one.do("delete-pair")
        one.do("delete-pair-yes")
        assert owned.space.pairs() == ()


# ---------------------------------------------------------------------------------- in a browser


@pytest.mark.slow
def test_in_a_browser_a_link_is_shared_opened_and_taken_back(portal: Portal, owned: Owned) -> None:
    with chromium() as browser:
        pages = {}
        for address in (owned.address, BOB):
            context = browser.new_context(
                viewport={"width": 1280, "height": 800}, extra_http_headers={HEADER: address}
            )
            pages[address] = context.new_page()
            pages[address].set_default_timeout(SLOWLY)
        ada, bob = pages[owned.address], pages[BOB]
        ada.goto(f"{portal.address}/overview?run={owned.run}")
        ada.locator(".st-key-share button").first.click()
        # Nobody writes and presses within the moment in which the page is made anew.
        at_rest = ada.locator("[data-testid=stApp][data-test-script-state=notRunning]")
        ada.get_by_label("Their addresses").fill(BOB)
        expect(at_rest).to_be_visible(timeout=SLOWLY)
        ada.keyboard.press("Tab")
        expect(at_rest).to_be_visible(timeout=SLOWLY)
        expect(ada.get_by_label("Their addresses")).to_have_value(BOB)
        ada.locator(".st-key-share-now button").first.click()
        expect(ada.get_by_text("may look")).to_be_visible(timeout=SLOWLY)
        link = ada.locator("[data-testid=stDialog] [data-testid=stCode]").first.inner_text().strip()
        assert link == f"{portal.address}/overview?run={owned.run}"
        bob.goto(link)
        whose = bob.locator(".st-key-whose").first
        expect(whose).to_contain_text(owned.address.split("@")[0], timeout=SLOWLY)
        expect(whose).to_contain_text("you may look")
        expect(bob.locator(".st-key-overview-float button").first).to_be_disabled(timeout=SLOWLY)
        expect(bob.locator(".st-key-share")).to_have_count(0)
        ada.get_by_role("button", name="Take back").click()
        expect(ada.get_by_role("button", name="Take back")).to_have_count(0, timeout=SLOWLY)
        bob.get_by_role("link", name="Report").click()
        expect(bob.get_by_text("there is no run")).to_be_visible(timeout=SLOWLY)
        expect(bob.get_by_text(watermark(owned.address))).to_have_count(0)
