"""A browser tab as the server sees it: Streamlit's websocket, spoken without a browser."""

from __future__ import annotations

import json
import secrets
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from http.cookies import SimpleCookie
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, quote, urlsplit

import httpx
from streamlit.proto.Alert_pb2 import Alert
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.Delta_pb2 import Delta
from streamlit.proto.Element_pb2 import Element
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from streamlit.proto.WidgetStates_pb2 import WidgetState
from websockets.sync.client import ClientConnection, connect

PATIENCE_SECONDS = 60.0


class Tab:
    """A tab of one person.

    Args:
        address: of the app, with its base path.
        headers: that a proxy would send with every request.
        cookies: of the browser.
        origin: of the page that opens the websocket; the app's own by default.
        session_id: of a session to go on with, as after a lost connection.
    """

    def __init__(
        self,
        address: str,
        *,
        headers: Mapping[str, str] | None = None,
        cookies: Mapping[str, str] | None = None,
        origin: str | None = None,
        session_id: str = "",
    ) -> None:
        self._address = address
        self.headers = dict(headers or {})
        self.cookies = dict(cookies or {})
        self.received: list[bytes] = []
        parts = urlsplit(address)
        self._origin = origin or f"{parts.scheme}://{parts.netloc}"
        health = urllib.request.Request(f"{address}/_stcore/health", headers=self.headers)
        with urllib.request.urlopen(health, timeout=PATIENCE_SECONDS) as answer:
            for each in answer.headers.get_all("Set-Cookie") or ():
                self.cookies.update({k: v.value for k, v in SimpleCookie(each).items()})
        protocols = ["streamlit", self.cookies["_streamlit_xsrf"]]
        self._open = ExitStack()
        self._connection: ClientConnection = self._open.enter_context(
            connect(
                f"ws://{parts.netloc}{parts.path}/_stcore/stream",
                subprotocols=[*protocols, *([session_id] if session_id else [])],  # type: ignore[list-item]
                additional_headers={**self.headers, "Cookie": self.cookie_header()},
                origin=self._origin,  # type: ignore[arg-type]
                max_size=None,
                open_timeout=PATIENCE_SECONDS,
            )
        )
        self.session_id = ""
        # Ids of the buttons on the page by label, and kinds of all elements that came.
        self.buttons: dict[str, str] = {}
        self.elements: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def cookie_header(self) -> str:
        return "; ".join(f"{key}={value}" for key, value in self.cookies.items())

    def send(self, **message: Any) -> None:
        """Sends a message of Streamlit's, by the name of its field."""
        self._connection.send(BackMsg(**message).SerializeToString())

    def send_bytes(self, content: bytes) -> None:
        self._connection.send(content)

    def open(self, page: str = "", query: str = "") -> bytes:
        """All that came until the page had run."""
        said = BackMsg()
        said.rerun_script.page_name = page
        said.rerun_script.query_string = query
        self._connection.send(said.SerializeToString())
        return self.until_finished()

    def press(self, label: str) -> bytes:
        """All that came after a press of the button of this label on the page."""
        said = BackMsg()
        state = said.rerun_script.widget_states.widgets.add()
        state.id = self.buttons[label]
        state.trigger_value = True
        self._connection.send(said.SerializeToString())
        return self.until_finished()

    def receive(self, timeout: float = PATIENCE_SECONDS) -> ForwardMsg:
        """The next message.

        Raises:
            TimeoutError: none came.
        """
        content = self._connection.recv(timeout)
        assert isinstance(content, bytes)
        self.received.append(content)
        message = ForwardMsg()
        message.ParseFromString(content)
        if message.WhichOneof("type") == "new_session":
            self.session_id = message.new_session.initialize.session_id
        kind = message.delta.new_element.WhichOneof("type")
        if kind:
            self.elements.append(kind)
        button = message.delta.new_element.button
        if button.id:
            self.buttons[button.label] = button.id
        return message

    def settle(self) -> None:
        """Waits until nothing more comes."""
        try:
            while True:
                self.receive(0.7)
        except TimeoutError:
            return

    def until_finished(self) -> bytes:
        """All that came until a script had run."""
        start, deadline = len(self.received), time.monotonic() + PATIENCE_SECONDS
        while True:
            message = self.receive(deadline - time.monotonic())
            # A run that ends early is followed by another one.
            early = message.script_finished == ForwardMsg.FINISHED_EARLY_FOR_RERUN
            if message.WhichOneof("type") == "script_finished" and not early:
                return b"\n".join(self.received[start:])


class UploadRefused(Exception):
    """What the server said to an upload that it does not take."""


class Visitor(Tab):
    """A tab that goes from page to page and works there, as a browser does for a person.

    It keeps the address and the widgets' values, and asks again where a page said that it wants to
    be asked (`st.fragment(run_every=...)`).

    Args:
        see: is given every message as it comes; what came is not kept otherwise.
    """

    def __init__(
        self, address: str, *, see: Callable[[bytes], None] = lambda _: None, **more: Any
    ) -> None:
        self._see = see
        self.ids: dict[str, str] = {}
        self.errors: list[str] = []
        self._values: dict[str, WidgetState] = {}
        # By fragment: seconds between two questions, and when the next is due.
        self._timers: dict[str, tuple[float, float]] = {}
        # The id of a component that is to run the page again at once; "" where none waits for that.
        self._signal = ""
        self._pages: dict[str, str] = {}
        self._page, self._query = "", ""
        # Where the fields of the page take files, by their keys.
        self.inboxes: dict[str, str] = {}
        # What the page consists of, from its last run from the top.
        self._run, self._is_whole = bytearray(), True
        super().__init__(address, **more)

    def visit(self, page: str, query: str | None = None) -> bytes:
        """The page; with the run and the tensor that are looked at.

        Args:
            page: its address.
            query: of the address; None for what it is now.
        """
        if query is not None:
            self._query = query
        self._values.clear()
        self.ids.clear()
        if page in self._pages:
            self._page = self._pages[page]
            return self._rerun()
        return self._rerun(page_name=page)

    def click(self, key: str) -> bytes:
        """The page after a press of the button of this key."""
        return self._rerun(WidgetState(id=self.ids[key], trigger_value=True))

    def choose(self, key: str, **value: Any) -> bytes:
        """The page after a widget was given a value, by the name of its field."""
        state = WidgetState(id=self.ids[key], **value)
        self._values[state.id] = state
        return self._rerun()

    def upload(
        self, key: str, files: Iterable[Path], *, pace: Callable[[int], None] = lambda _: None
    ) -> bytes:
        """The page after files were sent to one of its fields, as the field's script sends them.

        Raises:
            UploadRefused: the server takes one of them no further.
        """
        parts = urlsplit(self._address)
        for file in files:
            answer = send_file(
                f"{parts.scheme}://{parts.netloc}{self.inboxes[key]}",
                file,
                headers={**self.headers, "Cookie": self.cookie_header()},
                pace=pace,
            )
            if answer.status_code != 200:
                raise UploadRefused(f"{answer.status_code}: {answer.text}")
        return self._rerun()

    def finish(self, patience: float = PATIENCE_SECONDS) -> bytes:
        """The page once it no longer wants to be asked again: nothing is under way any more.

        Raises:
            TimeoutError: the patience was used up.
        """
        deadline = time.monotonic() + patience
        while self.is_waiting:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the page still waits after {patience:g} s")
            self.tick()
        return bytes(self._run)

    @property
    def is_waiting(self) -> bool:
        """Whether the page wants to be asked again."""
        return bool(self._timers or self._signal)

    @property
    def query(self) -> dict[str, str]:
        """The query of the address."""
        return dict(parse_qsl(self._query))

    def tick(self) -> bytes:
        """The page after it was asked again, once, as it wanted."""
        if self._signal:
            state = WidgetState(
                id=f"$$STREAMLIT_INTERNAL_KEY_{self._signal}__events",
                json_trigger_value=json.dumps([{"event": "now", "value": True}]),
            )
            return self._rerun(state)
        fragment = min(self._timers, key=lambda each: self._timers[each][1])
        interval, due = self._timers[fragment]
        time.sleep(max(0.0, due - time.monotonic()))
        self._timers[fragment] = interval, time.monotonic() + interval
        return self._rerun(fragment_id=fragment, is_auto_rerun=True)

    def _rerun(self, *triggers: WidgetState, **more: Any) -> bytes:
        said = BackMsg()
        rerun = said.rerun_script
        rerun.query_string = self._query
        if "page_name" not in more:
            rerun.page_script_hash = self._page
        for name, value in more.items():
            setattr(rerun, name, value)
        rerun.widget_states.widgets.extend([*self._values.values(), *triggers])
        self._connection.send(said.SerializeToString())
        status = ForwardMsg.FINISHED_EARLY_FOR_RERUN
        deadline = time.monotonic() + PATIENCE_SECONDS
        while status == ForwardMsg.FINISHED_EARLY_FOR_RERUN:
            message = self.receive(deadline - time.monotonic())
            if message.WhichOneof("type") == "script_finished":
                status = message.script_finished
        return bytes(self._run)

    def receive(self, timeout: float = PATIENCE_SECONDS) -> ForwardMsg:
        """The next message."""
        message = super().receive(timeout)
        content = self.received.pop()
        self.elements.clear()
        self._see(content)
        kind = message.WhichOneof("type")
        if kind == "new_session":
            self._is_whole = not message.metadata.run.fragment_ids
            if self._is_whole:
                self._timers.clear()
                self._signal = ""
                self._run.clear()
        elif kind == "navigation":
            self._page = message.navigation.page_script_hash
            self._pages = {
                each.url_pathname: each.page_script_hash for each in message.navigation.app_pages
            }
        elif kind == "page_info_changed":
            self._query = message.page_info_changed.query_string
        elif kind == "auto_rerun":
            interval = message.auto_rerun.interval
            self._timers[message.auto_rerun.fragment_id] = interval, time.monotonic() + interval
        elif kind == "stop_auto_rerun":
            self._timers.pop(message.stop_auto_rerun.fragment_id, None)
        elif kind == "delta":
            self._note(message.delta)
        if self._is_whole:
            self._run += content
        return message

    def _note(self, delta: Delta) -> None:
        element = delta.new_element
        kind = element.WhichOneof("type")
        if kind == "exception" or (kind == "alert" and element.alert.format == Alert.ERROR):
            self.errors.append(str(getattr(element, kind))[:500])
        if kind == "bidi_component":
            given = json.loads(element.bidi_component.json or "{}")
            if isinstance(given, dict) and "field" in given:
                self.inboxes[given["field"]] = given["address"]
            if element.bidi_component.component_name.endswith("quant_inspector_signal"):
                self._signal = element.bidi_component.id
        widget = getattr(element, kind).id if kind in _WITH_ID else ""
        if widget:
            # The key that the page gave it stands last in an id.
            self.ids[widget.split("-", 2)[-1]] = widget


_WITH_ID = {
    field.name
    for field in Element.DESCRIPTOR.fields
    if field.message_type and "id" in field.message_type.fields_by_name
}


CHUNK_BYTES = 1 << 20


def send_file(
    inbox: str,
    file: Path,
    *,
    headers: Mapping[str, str],
    pace: Callable[[int], None] = lambda _: None,
) -> httpx.Response:
    """The answer to the last chunk of a file, or to the first one that was refused.

    Args:
        inbox: the address of the field.
        file: to be sent.
        headers: of every request.
        pace: is told, before each chunk, how many bytes were taken so far.
    """
    size, offset, one = file.stat().st_size, 0, secrets.token_hex(16)
    with (
        httpx.Client(headers=dict(headers), timeout=PATIENCE_SECONDS) as client,
        file.open("rb") as f,
    ):
        while True:
            pace(offset)
            answer = client.put(
                f"{inbox}/{one}",
                content=f.read(CHUNK_BYTES),
                headers={
                    "Upload-Name": quote(file.name),
                    "Upload-Length": str(size),
                    "Upload-Offset": str(offset),
                },
            )
            if answer.status_code != 200 or answer.json()["done"]:
                return answer
            offset = answer.json()["offset"]
            f.seek(offset)
