"""A browser tab as the server sees it: Streamlit's websocket, spoken without a browser."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack
from http.cookies import SimpleCookie
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
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
        while self.receive(deadline - time.monotonic()).WhichOneof("type") != "script_finished":
            continue
        return b"\n".join(self.received[start:])
