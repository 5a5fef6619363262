"""Addresses of our own beside Streamlit's: Netron's modules, held content, pictures, uploads.

The browser fetches a graph and its figures once, by address, while a page sends only what changed
with every rerun. Apart from the pages, because these answers are given outside of any script run.
An address of held content, of a place for a picture or of an inbox for uploads carries a token that
cannot be guessed and is good for the user alone whose page asked for it. Nothing is opened that was
not handed to `offer` or `accept`, except the files of the installed Netron package on a fixed list.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import re
import secrets
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeVar
from urllib.parse import quote, unquote
from xml.parsers import expat

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from streamlit import config

from inspector.publishing import give_name
from inspector.web import gate, identity, metrics, uploads
from inspector.web.uploads import Inbox, Refused, Turn

BRIDGE = Path(__file__).with_name("graph") / "bridge.js"
SVG = "image/svg+xml"
PNG = "image/png"
# Entries of each kind that are kept for each user, and seconds after which one that nobody used
# is forgotten.
KEPT = 64
EXPIRY_SECONDS = 12 * 3600.0

_MODULE_TYPES = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".json": "application/json",
    ".png": "image/png",
    ".ico": "image/x-icon",
}
_PANE_POLICY = (
    "default-src 'none'; script-src 'self'; "
    # Netron's page has its style in the document and sets styles of elements.
    "style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; worker-src 'self'; "
    "frame-ancestors 'self'; base-uri 'none'; form-action 'none'"
)
# Whatever was offered, opened on its own it runs nothing and reaches nothing.
_HELD_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox; "
    "frame-ancestors 'self'; base-uri 'none'; form-action 'none'"
)
_FRESH = "no-store"
_FOREVER = "public, max-age=31536000, immutable"

_log = logging.getLogger("inspector.web")


class NetronChanged(RuntimeError):
    """The installed Netron is not the one its page is adapted for."""


# ---------------------------------------------------------------------------------- Netron's page


@functools.cache
def netron_version() -> str:
    """The version of the installed package; it is part of the addresses of its modules."""
    return importlib.metadata.version("netron")


@functools.cache
def _netron_folder() -> Path:
    found = importlib.util.find_spec("netron")  # not imported: its package starts a logger
    if found is None or not found.submodule_search_locations:
        raise NetronChanged("the package netron is not installed")
    return Path(found.submodule_search_locations[0])


@functools.cache
def _netron_files() -> Mapping[str, Path]:
    """What may be served of Netron's package: its modules, styles, metadata and icons by name."""
    return {
        path.name: path
        for path in _netron_folder().iterdir()
        # Its own start script is what ours replaces.
        if path.suffix in _MODULE_TYPES and path.name != "index.js" and path.is_file()
    }


def pane_document(page: str) -> str:
    """Netron's page with our module in the place of its script, without its version, date, title.

    Args:
        page: the text of Netron's `index.html`.

    Raises:
        NetronChanged: one of the places to change is missing, or is there more than once.
    """
    changes = (
        (
            r'<script type="text/javascript" src="index\.js"></script>',
            '<script type="module" src="bridge.js"></script>',
            "the script index.js",
        ),
        (r'<meta name="version" content="[^"]*">\n?', "", "the version"),
        (r'<meta name="date" content="[^"]*">\n?', "", "the date"),
        (r"<title>[^<]*</title>", "<title>Graph</title>", "the title"),
    )
    for pattern, replacement, what in changes:
        page, count = re.subn(pattern, replacement, page)
        if count != 1:
            raise NetronChanged(
                f"Netron's page has changed: {what} is there {count} times, expected once. "
                "Install the version that pyproject.toml names."
            )
    return page


@functools.cache
def _own_pane() -> str:
    return pane_document((_netron_folder() / "index.html").read_text(encoding="utf-8"))


def _answer(content: str | bytes, media_type: str, policy: str, caching: str) -> Response:
    return Response(content, media_type=media_type, headers=_headers(policy, caching))


def _headers(policy: str, caching: str) -> dict[str, str]:
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": caching,
    }


def _refusal(status: int, text: str) -> Response:
    return PlainTextResponse(text, status, headers=_headers(_HELD_POLICY, _FRESH))


def _not_found() -> Response:
    return _refusal(404, "Not found")


async def _netron(request: Request) -> Response:
    name = request.path_params["name"]
    if request.path_params["version"] != netron_version():
        return _not_found()
    if name == "pane.html":
        try:
            return _answer(_own_pane(), "text/html", _PANE_POLICY, _FRESH)
        except NetronChanged as changed:
            _log.error("%s", changed)
            return _refusal(500, str(changed))
    if name == "bridge.js":
        text = await run_in_threadpool(BRIDGE.read_bytes)
        return _answer(text, "text/javascript", _PANE_POLICY, _FRESH)
    path = _netron_files().get(name)
    if path is None:
        return _not_found()
    return FileResponse(
        path,
        media_type=_MODULE_TYPES[path.suffix],
        headers=_headers(_PANE_POLICY, _FOREVER),
    )


# ------------------------------------------------------------------------- held content and places


@dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    """Content behind an address; a path is opened when it is asked for.

    With a file's name it is saved by the browser instead of shown.
    """

    content: bytes | Path
    media_type: str
    file_name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where one picture may be put."""

    target: Path
    limit_bytes: int
    media_types: frozenset[str]


_T = TypeVar("_T")


class _Shelf(Generic[_T]):
    """What stands behind tokens: the least recently used goes first, the unused after some hours.

    Script threads fill it, the server's loop reads it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, tuple[object, _T, float]] = OrderedDict()
        self._tokens: dict[object, str] = {}

    def _forget(self, token: str) -> tuple[object, _T, float]:
        entry = self._entries.pop(token)
        self._tokens.pop(entry[0], None)
        return entry

    def _tidy(self) -> None:
        oldest = self._clock() - EXPIRY_SECONDS
        while self._entries:
            token, (_, _, used) = next(iter(self._entries.items()))
            if len(self._entries) <= KEPT and used > oldest:
                return
            self._forget(token)

    def put(self, identity: object, value: _T) -> str:
        """The token of the value; the one it has where the identity is there already."""
        with self._lock:
            token = self._tokens.get(identity)
            if token is None:
                token = secrets.token_urlsafe(32)
                self._tokens[identity] = token
            self._entries[token] = (identity, value, self._clock())
            self._entries.move_to_end(token)
            self._tidy()
            return token

    def get(self, token: str) -> _T | None:
        """What the token stands for, which counts as a use; None when there is nothing."""
        with self._lock:
            self._tidy()
            entry = self._entries.get(token)
            if entry is None:
                return None
            self._entries[token] = (entry[0], entry[1], self._clock())
            self._entries.move_to_end(token)
            return entry[1]

    def take(self, token: str) -> tuple[object, _T] | None:
        """Removes what the token stands for; None when there is nothing."""
        with self._lock:
            self._tidy()
            if token not in self._entries:
                return None
            identity, value, _ = self._forget(token)
            return identity, value

    def withdraw(self, keys: Collection[str]) -> None:
        """Forgets what was put under identities that begin with one of the keys."""
        with self._lock:
            for token, (about, _, _) in list(self._entries.items()):
                if isinstance(about, tuple) and about[0] in keys:
                    self._forget(token)

    def put_back(self, token: str, identity: object, value: _T) -> None:
        """Undoes `take`, unless the identity has got a new token since."""
        with self._lock:
            if identity not in self._tokens:
                self._tokens[identity] = token
                self._entries[token] = (identity, value, self._clock())


class _Shelves(Generic[_T]):
    """A shelf for each user: a token is only looked for on the shelf of who asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shelves: dict[str, _Shelf[_T]] = {}

    def of(self, user: identity.User) -> _Shelf[_T]:
        with self._lock:
            return self._shelves.setdefault(user.key, _Shelf())

    def withdraw(self, keys: Collection[str], but: str | None) -> None:
        with self._lock:
            shelves = [shelf for user, shelf in self._shelves.items() if user != but]
        for shelf in shelves:
            shelf.withdraw(keys)


_held: Final[_Shelves[_Held]] = _Shelves()
_places: Final[_Shelves[_Place]] = _Shelves()


def offer(content: bytes | Path, media_type: str, key: str, *, file_name: str = "") -> str:
    """The address, as a browser of the app asks for it, at which the user gets the content.

    The same key with the same content has the same address (a path's content is told by its size
    and time of change), so a page may offer at every rerun. The address is forgotten twelve hours
    after its last use, or when `KEPT` others were used since.

    Args:
        content: the bytes, or a file that is opened when it is asked for.
        media_type: what it is served as.
        key: tells the users of equal content apart; it is not part of the address.
        file_name: under which a browser saves it; "" to show it.

    Raises:
        OSError: the file is not there.
    """
    about: tuple[object, ...]
    if isinstance(content, Path):
        content = content.resolve()
        stamp = content.stat()
        about = (key, media_type, file_name, content, stamp.st_size, stamp.st_mtime_ns)
    else:
        about = (key, media_type, file_name, hashlib.sha256(content).digest())
    held = _Held(content=content, media_type=media_type, file_name=file_name)
    token = _held.of(identity.require()).put(about, held)
    return f"{_root()}/held/{token}"


def accept(
    key: str,
    target: Path,
    limit_bytes: int,
    media_types: Collection[str] = (SVG, PNG),
) -> str:
    """The address that takes one picture by PUT and writes it to the target.

    The same request has the same address until a picture was taken; then it has a new one. A
    picture that is refused (415 type, 413 size, 422 content) leaves the address in use.

    Args:
        key: tells the users of one target apart.
        target: the file to write, all of it or nothing; its folder is made where it is missing.
        limit_bytes: the largest picture taken.
        media_types: which of `SVG` and `PNG` it may be.

    Raises:
        ValueError: a media type is neither of the two, or none is given.
    """
    kinds = frozenset(media_types)
    if not kinds or not kinds <= {SVG, PNG}:
        raise ValueError(f"media types {sorted(kinds)}, expected of {SVG} and {PNG}")
    place = _Place(target=target.absolute(), limit_bytes=limit_bytes, media_types=kinds)
    token = _places.of(identity.require()).put((key, place), place)
    return f"{_root()}/picture/{token}"


def withdraw(keys: Collection[str], *, but: str | None = None) -> None:
    """Ends the addresses that were given out under keys, as of runs that are not shared any more.

    Args:
        keys: as `offer` and `accept` were given them.
        but: the key of a user who keeps theirs; None for nobody.
    """
    _held.withdraw(keys, but)
    _places.withdraw(keys, but)


async def _serve_held(request: Request) -> Response:
    held = _held.of(gate.asker_of(request)).get(request.path_params["token"])
    if held is None:
        return _not_found()
    headers = _headers(_HELD_POLICY, _FRESH)
    if held.file_name:
        name = quote(held.file_name, safe="", errors="replace")
        headers["Content-Disposition"] = f"attachment; filename*=utf-8''{name}"
    if isinstance(held.content, bytes):
        return Response(held.content, media_type=held.media_type, headers=headers)
    if not await run_in_threadpool(held.content.is_file):
        return _not_found()
    return FileResponse(held.content, media_type=held.media_type, headers=headers)


async def _take_picture(request: Request) -> Response:
    token = request.path_params["token"]
    places = _places.of(gate.asker_of(request))
    taken = places.take(token)
    if taken is None:
        return _not_found()
    about, place = taken
    written = False
    try:
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind not in place.media_types:
            return _refusal(415, f"A picture of type {' or '.join(sorted(place.media_types))}")
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > place.limit_bytes:
                    return _refusal(413, f"More than {place.limit_bytes} bytes")
        except ClientDisconnect:
            return _refusal(400, "Broken off")
        problem = await run_in_threadpool(picture_problem, bytes(body), kind)
        if problem:
            return _refusal(422, problem)
        try:
            await run_in_threadpool(_write, place.target, bytes(body))
        except OSError as error:
            _log.error("a picture cannot be written: %s", error)
            return _refusal(507, "The picture cannot be written")
        written = True
        return Response(status_code=204, headers=_headers(_HELD_POLICY, _FRESH))
    finally:
        if not written:
            places.put_back(token, about, place)


def _write(target: Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=target.parent) as folder:
        part = Path(folder) / "picture"
        part.write_bytes(content)
        give_name(part, target)


# --------------------------------------------------------------------------------------- uploads

# What is written to the disk at once, and is in memory for each upload at most.
BLOCK_BYTES = 1 << 20
# Seconds without a byte after which a connection is given up; the upload may go on with another.
STALL_SECONDS = 60.0
# Uploads of one user that are received at the same time.
MOST_AT_ONCE = 16
# Sizes and offsets up to 10^15 bytes.
_COUNT = re.compile(r"\d{1,15}", re.ASCII)
# By user; only the server's loop counts.
_receiving: Final[Counter[str]] = Counter()


def upload_address(token: str) -> str:
    """The address of an inbox: `<address>/<id>` takes a file that the browser calls by this id.

    PUT with `Upload-Name` (percent-encoded), `Upload-Length` and `Upload-Offset`, all bytes in
    decimal, appends the body, which may be empty and may be broken off; GET says how many bytes
    are here; DELETE removes the file, or without an id all of them. Answers are JSON: `offset`
    (bytes that are here, null where there is no such upload), `done` (whole and found good),
    `name` (as it is kept) and `text` (what is wrong). Status 400 malformed, 404 unknown: begin
    again, 408 stalled or 409 another offset: go on at `offset`, 413 too large or too many, 422 not
    what it should be, 429 too many at once: later, 507 no space.
    """
    return f"{_root()}/upload/{token}"


def _receipt(
    status: int, *, offset: int | None = None, done: bool = False, name: str = "", text: str = ""
) -> Response:
    return JSONResponse(
        {"offset": offset, "done": done, "name": name, "text": text},
        status,
        headers=_headers(_HELD_POLICY, _FRESH),
    )


def _inbox(request: Request) -> Inbox:
    user, token = gate.asker_of(request), request.path_params["token"]
    found = uploads.inboxes().find(user.key, token)
    if found is None:
        raise Refused(404, "Not found")
    return found


def _number(request: Request, header: str) -> int:
    given = request.headers.getlist(header)
    if len(given) != 1 or not _COUNT.fullmatch(given[0]):
        raise Refused(400, f"{header} is one decimal number")
    return int(given[0])


def _upload_name(request: Request) -> str:
    given = request.headers.getlist("upload-name")
    try:
        name = unquote(given[0], errors="strict") if len(given) == 1 else ""
    except UnicodeDecodeError:
        name = ""
    if not name:
        raise Refused(400, "Upload-Name is one percent-encoded name in UTF-8")
    return name


async def _take_upload(request: Request) -> Response:
    key = gate.asker_of(request).key
    if _receiving[key] >= MOST_AT_ONCE:
        return _receipt(429, text=f"More than {MOST_AT_ONCE} uploads at once")
    _receiving[key] += 1
    try:
        return await _take_body(request)
    finally:
        _receiving[key] -= 1


async def _take_body(request: Request) -> Response:
    try:
        inbox = _inbox(request)
        name, size = _upload_name(request), _number(request, "Upload-Length")
        offset = _number(request, "Upload-Offset")
        coming = 0
        if "content-length" in request.headers:
            coming = _number(request, "Content-Length")
        if offset + coming > size:
            raise Refused(413, f"More than the {size} bytes that were announced")
        file_id = request.path_params["file"]
        turn = await run_in_threadpool(inbox.begin, file_id, name, size, offset)
        offset, done, stalled = await _receive(request, inbox, turn)
    except Refused as refused:
        return _receipt(refused.status, offset=refused.offset, text=refused.text)
    if stalled:
        return _receipt(408, offset=offset, text="Nothing came for too long")
    return _receipt(200, offset=offset, done=done, name=turn.file.name)


async def _receive(request: Request, inbox: Inbox, turn: Turn) -> tuple[int, bool, bool]:
    """Appends the body, and as much as came of one that was broken off.

    Returns the bytes that are here, whether the file is whole, and whether the body stopped coming.
    """
    block, stalled = bytearray(), False
    now = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(STALL_SECONDS) as patience:
            async for chunk in request.stream():
                inbox.touch(turn)
                block += chunk
                if len(block) >= BLOCK_BYTES:
                    # Nothing more is read meanwhile: a slow disk slows the sender down.
                    patience.reschedule(None)
                    await run_in_threadpool(inbox.add, turn, block)
                    block = bytearray()
                patience.reschedule(now() + STALL_SECONDS)
    except ClientDisconnect:
        pass  # nobody hears the answer; the sender asks for the offset when it is back
    except TimeoutError:
        stalled = True
    offset, done = await run_in_threadpool(inbox.add, turn, block)
    return offset, done, stalled


async def _tell_upload(request: Request) -> Response:
    try:
        offset, done = _inbox(request).offset(request.path_params["file"])
    except Refused as refused:
        return _receipt(refused.status, text=refused.text)
    return _receipt(200, offset=offset, done=done)


async def _remove_upload(request: Request) -> Response:
    try:
        await run_in_threadpool(_inbox(request).remove, request.path_params["file"])
    except Refused as refused:
        return _receipt(refused.status, text=refused.text)
    return _receipt(200)


async def _clear_inbox(request: Request) -> Response:
    try:
        await run_in_threadpool(_inbox(request).clear)
    except Refused as refused:
        return _receipt(refused.status, text=refused.text)
    return _receipt(200)


# -------------------------------------------------------------------------------------- pictures

_SVG_SPACE = "http://www.w3.org/2000/svg"
_XML_SPACE = "http://www.w3.org/XML/1998/namespace"
_SVG_ELEMENTS = frozenset(
    {
        *("svg", "g", "defs", "marker", "path", "rect", "line", "circle", "ellipse", "polyline"),
        *("polygon", "text", "tspan", "title", "desc", "clipPath", "mask", "pattern"),
        *("linearGradient", "radialGradient", "stop"),
    }
)
# `url(#…)` names a part of the same picture; anything else leads out of it.
_LEADS_OUT = re.compile(
    r"url\s*\((?!\s*[\"']?\s*#)|javascript:|@import|image-set|src\s*\(|\\", re.I
)


def picture_problem(content: bytes, media_type: str) -> str:
    """Why the bytes are not a harmless picture of the type; "" when they are one.

    A PNG has its signature, its header first and its end last. An SVG is UTF-8 XML without
    document type, entities and processing instructions; its elements are shapes, text and what
    styles them (no script, no foreignObject, no animation, no image, no link); no attribute is a
    handler, and no reference leads out of the picture.
    """
    if media_type == PNG:
        whole = (
            content[:8] == b"\x89PNG\r\n\x1a\n"
            and content[12:16] == b"IHDR"
            and content[-8:-4] == b"IEND"
        )
        return "" if whole else "Not a PNG"
    if media_type != SVG:
        return "Not a picture"
    return _svg_problem(content)


def _svg_problem(content: bytes) -> str:
    problems: list[str] = []
    depth = 0

    def begin(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        space, _, local = name.rpartition(" ")
        if space != _SVG_SPACE or local not in _SVG_ELEMENTS or (depth == 0) != (local == "svg"):
            problems.append(f"The element {local[:40]}")
        depth += 1
        for key, value in attributes.items():
            key_space, _, attribute = key.rpartition(" ")
            plain = attribute.lower()
            if plain.startswith("on") or plain == "src":
                problems.append(f"The attribute {attribute[:40]}")
            elif plain == "href" and not value.startswith("#"):
                problems.append("A link that leads out")
            elif key_space == _XML_SPACE and plain not in ("space", "lang"):
                problems.append(f"The attribute xml:{attribute[:40]}")
            # Ids and classes carry names of nodes, in which anything is allowed.
            elif plain not in ("id", "class") and _LEADS_OUT.search(value):
                problems.append("A reference that leads out")

    def end(_: str) -> None:
        nonlocal depth
        depth -= 1

    def refuse(*_: object) -> None:
        problems.append("A document type, an entity or a processing instruction")

    parser = expat.ParserCreate("utf-8", namespace_separator=" ")
    parser.StartElementHandler = begin
    parser.EndElementHandler = end
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.ProcessingInstructionHandler = refuse
    try:
        content.decode("utf-8")
        parser.Parse(content, True)
    except (expat.ExpatError, UnicodeDecodeError):
        problems.append("Not XML")
    return problems[0] if problems else ""


# ---------------------------------------------------------------------------------------- routes


def _root() -> str:
    """The beginning of our addresses; Streamlit does not put its base path before them."""
    base = str(config.get_option("server.baseUrlPath") or "").strip("/")
    return f"/{base}/inspector" if base else "/inspector"


def pane_address() -> str:
    """The address of the document in which one graph is drawn."""
    return f"{_root()}/netron/{netron_version()}/pane.html"


async def _health(_: Request) -> Response:
    return _answer("ok", "text/plain", _HELD_POLICY, _FRESH)


def served() -> list[BaseRoute]:
    """The routes to give to `st.App`."""
    root = _root()
    return [
        Route(f"{root.removesuffix('/inspector')}/healthz", _health, methods=["GET"]),
        Route(f"{root.removesuffix('/inspector')}/metrics", metrics.answer, methods=["GET"]),
        Route(f"{root}/netron/{{version}}/{{name}}", _netron, methods=["GET"]),
        Route(f"{root}/held/{{token}}", _serve_held, methods=["GET"]),
        Route(f"{root}/picture/{{token}}", _take_picture, methods=["PUT"]),
        Route(f"{root}/upload/{{token}}", _clear_inbox, methods=["DELETE"]),
        Route(f"{root}/upload/{{token}}/{{file}}", _take_upload, methods=["PUT"]),
        Route(f"{root}/upload/{{token}}/{{file}}", _tell_upload, methods=["GET"]),
        Route(f"{root}/upload/{{token}}/{{file}}", _remove_upload, methods=["DELETE"]),
    ]
