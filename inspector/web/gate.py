"""What reaches the server at all: the gate in front of pages, routes and Streamlit's own answers.

Every request and every websocket passes here first. In portal mode nothing is answered without a
known user except what a sign-in needs; what is not on that list is refused, so a route that is
added later is guarded from its first day. A user only gets media whose address was sent to this
user's own pages. In local mode only this machine is answered.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from google.protobuf.message import DecodeError
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from streamlit import config
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.web.server.starlette.starlette_server_config import USER_COOKIE_NAME

from inspector import hosting
from inspector.audit import audit
from inspector.hosting import SECRET_HEADER, Settings
from inspector.web import identity, metrics
from inspector.web.identity import User

PROJECT = Path(__file__).resolve().parents[2]
ASKER = "inspector.asker"
# Addresses that one user was sent and may still ask for.
KEPT_ADDRESSES = 4096
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
# What a page cannot do without, and what a monitor asks for: no names in any of them.
_OPEN = ("healthz", "metrics", "_stcore/health")
_SHELL = ("_stcore/host-config", "favicon.png", "favicon.ico", "manifest.json", "index.html")
_OPENID = ("auth/login", "auth/logout", "oauth2callback")
_STREAM = "_stcore/stream"
# The page somebody came for before they were asked to sign in.
_RETURN = "quant_inspector_return"
RETURN_SECONDS = 900
LONGEST_RETURN = 2000
# With a header nobody says when a sign-in begins: it is one after so long without a request.
ABSENCE_SECONDS = 12 * 3600.0
_SIGNED_IN = f"{USER_COOKIE_NAME}=".encode()
_MEDIA = re.compile(rb"/media/([0-9a-f]{16,128})")
# What a page may tell Streamlit and ours never do: these show the checkout, empty everybody's
# caches, or ask for a place in Streamlit's own uploads, which stay in memory.
_UNWANTED = frozenset({"load_git_info", "clear_cache", "set_run_on_save", "file_urls_request"})
_SIGN_IN_PAGE = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" '
    'content="light dark"><title>Quant Inspector</title>'
    '<body style="font-family: system-ui, sans-serif; margin: 3rem"><h1>Sign in to continue</h1>'
    "<p>Quant Inspector was not told who you are: open it by the address at which your team signs "
    "in."
)
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def asker_of(connection: HTTPConnection) -> User:
    """Who asks a route, as the gate has found.

    Raises:
        KeyError: the route was reached around the gate in portal mode.
    """
    if ASKER not in connection.scope and not identity.settings().is_portal:
        return identity.LOCAL
    user: User = connection.scope[ASKER]
    return user


def middleware(found: Settings, pages: Sequence[str]) -> list[Middleware]:
    """What to give to `st.App`.

    Args:
        found: the checked settings.
        pages: the addresses of the pages, without a slash.
    """
    return [
        Middleware(metrics.Counting, base=base_path(), pages=("", *pages)),
        Middleware(Gate, settings=found, pages=tuple(pages)),
    ]


def base_path() -> str:
    """The path before every address, as "/tools"; "" where there is none."""
    base = str(config.get_option("server.baseUrlPath") or "").strip("/")
    return f"/{base}" if base else ""


def _respond(status: int, text: str) -> Response:
    return PlainTextResponse(text, status, headers=_HEADERS)


class Gate:
    """The ASGI application around all others."""

    def __init__(self, app: ASGIApp, *, settings: Settings, pages: Sequence[str]) -> None:
        self._app = app
        self._settings = settings
        self._base = base_path()
        self._pages = frozenset({"", "/", *(f"/{name}" for name in pages)})
        self._names = frozenset({"", *pages})
        self._sent: dict[str, OrderedDict[str, None]] = {}
        self._seen: dict[str, float] = {}
        self._masks = _masks(settings.data)
        identity.gate_stands.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        refusal: Response | None
        if not self._settings.is_portal:
            refusal, user = self._local(connection), identity.LOCAL
        else:
            user_or_none = identity.asker(self._settings, connection)
            refusal = self._portal(connection, user_or_none)
            user = user_or_none or User(address="", key="")
            scope = self._inside(scope, user_or_none)
        if refusal is None and self._settings.is_portal:
            refusal = self._cross_site(connection)
        if self._settings.is_portal:
            await self._note_who(connection, user, refusal)
        if refusal is not None:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await refusal(scope, receive, send)
            return
        if self._settings.is_portal:
            if scope["type"] == "websocket":
                receive, send = _without_unwanted(receive), self._noting(user, send)
            else:
                send = self._private(self._returning(connection, user, send))
                send = self._signing(connection, user, send)
        await self._app(scope, receive, send)

    # Who may ask what.

    def _local(self, connection: HTTPConnection) -> Response | None:
        client = connection.client
        # Port 0 is what the server writes where a proxy on this machine named the peer.
        near = client is None or client.port == 0 or hosting.is_near(client.host)
        if near or self._settings.network:
            return None
        return _respond(403, "Local mode answers this machine only")

    def _portal(self, connection: HTTPConnection, user: User | None) -> Response | None:
        path: str = connection.scope["path"]
        if not path.startswith(self._base) or _is_tricky(path):
            return _respond(404, "Not found")
        asked = path[len(self._base) :]
        name = asked.lstrip("/")
        if name in _OPEN:
            return None
        if user is not None:
            return self._foreign(name, user)
        openid = self._settings.auth == "oidc"
        if connection.scope["type"] == "websocket":
            # The page that asks to sign in is one of Streamlit's; without OpenID it is ours.
            return None if openid and name == _STREAM else _respond(401, "Sign in to continue")
        page = asked in self._pages
        reads = connection.scope["method"] in _SAFE
        needed = page or name in _SHELL or name in _OPENID or name.startswith("static/")
        if openid and needed and reads:
            return None
        if page and reads:
            return HTMLResponse(_SIGN_IN_PAGE, 401, headers=_HEADERS)
        if name.endswith(("/_stcore/health", "/_stcore/host-config")):
            # Streamlit's page looks for its server beside itself first.
            return _respond(404, "Not found")
        return _respond(401, "Sign in to continue")

    def _foreign(self, name: str, user: User) -> Response | None:
        """Refuses media whose address was not sent to the user, and Streamlit's own uploads."""
        media = name.startswith("media/")
        if media and name.split(".")[0] in self._sent.get(user.key, ()):
            return None
        if media or name.startswith("_stcore/upload_file/"):
            return _respond(404, "Not found")
        return None

    def _cross_site(self, connection: HTTPConnection) -> Response | None:
        """Refuses what another site's page asks for in the user's name."""
        scope, headers = connection.scope, connection.headers
        if scope["type"] == "http" and scope["method"] in _SAFE:
            return None
        origin = headers.get("origin")
        foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if origin is not None:
            same = urlsplit(origin).netloc == headers.get("host", "")
            foreign = not same and origin not in self._own_origins()
        elif scope["type"] == "websocket":
            return None  # not a browser
        return _respond(403, "Asked for by another site") if foreign else None

    def _own_origins(self) -> list[str]:
        more = config.get_option("server.corsAllowedOrigins") or ()
        return [each for each in (identity.openid_origin(), *map(str, more)) if each]

    # What is written down of it.

    async def _note_who(
        self, connection: HTTPConnection, user: User, refusal: Response | None
    ) -> None:
        """Writes down who was refused, and with a header who came."""
        scope, now = connection.scope, time.monotonic()
        path: str = scope["path"]
        name = path[len(self._base) :].strip("/")
        peer = connection.client.host if connection.client else ""
        if refusal is None:
            if user.key and self._settings.auth == "header":
                last = self._seen.get(user.key, -ABSENCE_SECONDS)
                self._seen[user.key] = now
                if now - last >= ABSENCE_SECONDS:
                    await run_in_threadpool(audit, "sign-in", user=user.address, peer=peer)
            return
        first_visit = refusal.status_code == 401 and (
            f"/{name}" in self._pages or name in _SHELL or name.startswith("static/")
        )
        probe = name.endswith(("/_stcore/health", "/_stcore/host-config"))
        if first_visit or probe:
            return
        await run_in_threadpool(
            audit,
            "denied",
            user=user.address,
            peer=peer,
            status=refusal.status_code,
            # An address may hold a token, a path that leads out does not.
            what=path if _is_tricky(path) else metrics.kind_of(name, self._names),
            method=scope.get("method", scope["type"]),
            why=bytes(refusal.body).decode(),
        )

    def _signing(self, connection: HTTPConnection, user: User, send: Send) -> Send:
        """Writes down who signs in at a provider, tries to, and signs out."""
        path: str = connection.scope["path"]
        name = path[len(self._base) :].lstrip("/")
        if self._settings.auth != "oidc" or name not in ("oauth2callback", "auth/logout"):
            return send
        peer = connection.client.host if connection.client else ""

        async def signing(message: Message) -> None:
            if message["type"] == "http.response.start":
                if name == "oauth2callback":
                    came = identity.user_of_answer(message.get("headers", ()))
                    if came is not None:
                        await run_in_threadpool(audit, "sign-in", user=came.address, peer=peer)
                    else:
                        why = "The provider named nobody"
                        await run_in_threadpool(
                            audit, "denied", user="", peer=peer, what="sign-in", why=why
                        )
                elif user.key:
                    await run_in_threadpool(audit, "sign-out", user=user.address, peer=peer)
            await send(message)

        return signing

    # What goes in and out.

    def _inside(self, scope: Scope, user: User | None) -> Scope:
        """The request as the app sees it: who asks, and no header that could say otherwise."""
        dropped = {SECRET_HEADER.lower().encode(), identity.SEEN_HEADER.lower().encode()}
        if self._settings.header:
            dropped.add(self._settings.header.lower().encode())
        headers = [each for each in scope["headers"] if each[0].lower() not in dropped]
        scope = {**scope, "headers": headers}
        if user is not None:
            scope[ASKER] = user
            if self._settings.auth == "header":
                headers.append(identity.seen_header(user))
        return scope

    def _noting(self, user: User, send: Send) -> Send:
        """Remembers which addresses a page was sent, and hides the server's folders."""

        async def noting(message: Message) -> None:
            content = message.get("bytes")
            if message["type"] == "websocket.send" and content:
                if user.key:
                    self._note(user.key, content)
                message = {**message, "bytes": _masked(content, self._masks)}
            await send(message)

        return noting

    def _note(self, key: str, content: bytes) -> None:
        if b"/media/" not in content:
            return
        found = [f"media/{each.decode()}" for each in _MEDIA.findall(content)]
        sent = self._sent.setdefault(key, OrderedDict())
        for address in found:
            sent[address] = None
            sent.move_to_end(address)
        while len(sent) > KEPT_ADDRESSES:
            sent.popitem(last=False)

    def _returning(self, connection: HTTPConnection, user: User, send: Send) -> Send:
        """Leads back, after a sign-in, to the page that somebody came for: a link stays a link.

        Streamlit itself always leads to the first page.
        """
        if self._settings.auth != "oidc" or connection.scope["method"] != "GET":
            return send
        path: str = connection.scope["path"]
        name = path[len(self._base) :]
        query = connection.scope.get("query_string", b"").decode("latin-1")
        cookie = ""
        if not user.key and name in self._pages and (name.strip("/") or query):
            wanted = quote(f"{path}?{query}" if query else path, safe="")
            if len(wanted) <= LONGEST_RETURN:
                cookie = f"{_RETURN}={wanted}; Max-Age={RETURN_SECONDS}"
        wanted = unquote(connection.cookies.get(_RETURN, ""))
        back = name == "/oauth2callback" and self._is_page(wanted)
        if not cookie and not back:
            return send

        async def returning(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                value = cookie
                signed_in = any(
                    key.lower() == b"set-cookie" and text.startswith(_SIGNED_IN)
                    for key, text in headers
                )
                if back and signed_in:
                    value = f"{_RETURN}=; Max-Age=0"
                    headers = [each for each in headers if each[0].lower() != b"location"]
                    headers.append((b"location", wanted.encode("latin-1", "ignore")))
                if value:
                    value += f"; Path={self._base or '/'}; HttpOnly; SameSite=Lax"
                    headers.append((b"set-cookie", value.encode("latin-1")))
                message = {**message, "headers": headers}
            await send(message)

        return returning

    def _is_page(self, address: str) -> bool:
        """Whether an address is one of the pages, with whatever query, and nowhere else."""
        path, _, query = address.partition("?")
        inside = path.startswith(f"{self._base}/") and path[len(self._base) :] in self._pages
        return inside and address.isascii() and address.isprintable() and " " not in query

    def _private(self, send: Send) -> Send:
        """Lets no shared cache keep an answer, and no cookie of a sign-in travel in the clear."""
        secure = identity.openid_origin().startswith("https:")

        async def private(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = []
                kept = False
                for name, value in message.get("headers", ()):
                    if name.lower() == b"cache-control":
                        kept = True
                    if secure and name.lower() == b"set-cookie" and b"secure" not in value.lower():
                        value += b"; Secure"
                    headers.append((name, value))
                if not kept:
                    headers.append((b"cache-control", b"private, no-store"))
                message = {**message, "headers": headers}
            await send(message)

        return private


def _is_tricky(path: str) -> bool:
    """Whether a path tries to lead elsewhere: no address of the app does."""
    segments = path.split("/")
    return (
        ".." in segments
        or "." in segments
        or "//" in path
        or any(sign in "\\%" or not sign.isprintable() for sign in path)
    )


def _without_unwanted(receive: Receive) -> Receive:
    async def wanted() -> Message:
        while True:
            message = await receive()
            content = message.get("bytes")
            if message["type"] != "websocket.receive" or not content:
                return message
            said = BackMsg()
            try:
                said.ParseFromString(content)
            except DecodeError:  # Streamlit closes the connection
                return message
            if said.WhichOneof("type") not in _UNWANTED:
                return message

    return wanted


def _masks(data: Path | None) -> dict[bytes, list[bytes]]:
    """Folders of the server that no message may name, by the folder they lie in.

    Pages name no folder in portal mode; this is for what Streamlit says of itself, and for what a
    later page forgets.
    """
    folders = {PROJECT: ["inspector", "pages", "sample_models", "app.py"]}
    if data is not None:
        folders.setdefault(data, []).extend(["users", "blobs"])
    return {
        str(folder).encode(): [str(folder / name).encode() for name in names]
        for folder, names in folders.items()
    }


def _masked(content: bytes, masks: Mapping[bytes, Sequence[bytes]]) -> bytes:
    """The message with dashes in the place of folders: here, it cannot change its length."""
    for root, folders in masks.items():
        if root in content:  # most messages are searched only twice
            for folder in folders:
                content = content.replace(folder, b"/" + b"-" * (len(folder) - 1))
    return content
