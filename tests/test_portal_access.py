"""Real servers tried from outside: pages, routes and sessions, by people signed in or not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from itsdangerous import URLSafeTimedSerializer
from playwright.sync_api import Browser, expect
from streamlit.web.server.starlette.starlette_server_config import USER_COOKIE_NAME
from websockets.exceptions import ConnectionClosed, InvalidStatus

from inspector.hosting import user_key
from inspector.web import identity
from tests.browser import free_port, served
from tests.hosted import (
    ADA,
    BOB,
    COOKIE_SECRET,
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
from tests.stream import Tab

# Servers are started and models are read by workers.
pytestmark = pytest.mark.slow
SIGN_IN = b"Sign in to continue"


def cookie(
    claims: Any, *, secret: str = COOKIE_SECRET, name: str = USER_COOKIE_NAME, age_days: float = 0
) -> str:
    class Signer(URLSafeTimedSerializer.default_signer):  # type: ignore[misc]
        def get_timestamp(self) -> int:
            return int(time.time() - age_days * 86400)

    text = claims if isinstance(claims, str) else json.dumps(claims)
    return str(URLSafeTimedSerializer(secret, salt=name, signer=Signer).dumps(text))


def claims_of(portal_: Portal, address: str = BOB, **more: Any) -> dict[str, Any]:
    start = {"email": address, "email_verified": True, "is_logged_in": True, "provider": "default"}
    return {"origin": portal_.address, **start, **more}


def bad_cookies(of: Portal) -> dict[str, str]:
    """Cookies that are nobody's, by what is wrong with them."""
    good = cookie(claims_of(of))
    flipped = ("A" if good[9] != "A" else "B").join((good[:9], good[10:]))
    return {
        "expired": cookie(claims_of(of), age_days=40),
        "altered": flipped,
        "cut": good[:-3],
        "of another secret": cookie(claims_of(of), secret="x" * 40),
        "of another cookie": cookie(claims_of(of), name="_streamlit_user_tokens"),
        "of another app": cookie(claims_of(of, origin="http://elsewhere.example")),
        "signed out": cookie(claims_of(of, is_logged_in=False)),
        "signed in as text": cookie(claims_of(of, is_logged_in="true")),
        "address in doubt": cookie(claims_of(of, email_verified=False)),
        "address in doubt as text": cookie(claims_of(of, email_verified="false")),
        "without address": cookie(claims_of(of, email=None)),
        "address is a list": cookie(claims_of(of, email=[BOB])),
        "address is a path": cookie(claims_of(of, email="../../etc/passwd")),
        "not an object": cookie([1, 2]),
        "not JSON": cookie("{"),
        "chunks that are not there": cookie("chunks-3"),
        "chunks without end": cookie("chunks-99999999999"),
        "chunks of text": cookie("chunks-many"),
        "nothing": "",
        "rubbish": "%00%ff;;==",
        "long": "x" * 6000,
    }


# -------------------------------------------------------------- a server that must not start

REFUSED = {
    "no identity": {"QUANT_INSPECTOR_MODE": "portal", "QUANT_INSPECTOR_DATA": "/srv/q"},
    "no provider": {
        "QUANT_INSPECTOR_MODE": "portal",
        "QUANT_INSPECTOR_DATA": "/srv/q",
        "QUANT_INSPECTOR_AUTH": "oidc",
    },
    "local on the network": {"STREAMLIT_SERVER_ADDRESS": "0.0.0.0"},
}


def test_without_a_usable_identity_the_server_ends_before_it_answers_with_two_lines() -> None:
    running = {}
    for name, variables in REFUSED.items():
        port = free_port()
        environment = {k: v for k, v in os.environ.items() if "QUANT_INSPECTOR" not in k}
        running[name] = port, subprocess.Popen(
            [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port),
             "--server.headless", "true"],
            cwd=ROOT, env={**environment, **variables}, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
    said = {}
    for name, (port, process) in running.items():
        answered = False
        while process.poll() is None:
            try:
                httpx.get(f"http://127.0.0.1:{port}/_stcore/health", timeout=0.3)
                answered = True
            except httpx.HTTPError:
                time.sleep(0.02)
        assert process.stderr is not None
        with process.stderr:
            said[name] = process.stderr.read().splitlines()[-2:]
        assert process.returncode == 2, name
        assert not answered, name
    for name, (error, hint) in said.items():
        assert error.startswith("Error: "), name
        assert hint.startswith("Hint: "), name
    assert "Portal mode needs to know who asks" in said["no identity"][0]
    assert ".streamlit/secrets.toml" in said["no provider"][1]
    assert "only listens on this machine" in said["local on the network"][0]


# ------------------------------------------------------------------------------ real servers


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A portal's folder in which Ada has a watermarked run, and Bob nothing."""
    folder = tmp_path_factory.mktemp("portal") / "SERVERFOLDER"
    fill(folder, ADA)
    return folder


@pytest.fixture(scope="module")
def by_header(data: Path) -> Iterator[Portal]:
    with header_portal(data) as found:
        yield found


@pytest.fixture(scope="module")
def by_openid(data: Path) -> Iterator[Portal]:
    with openid_portal(data) as found:
        yield found


@pytest.fixture(scope="module", params=["header", "openid"])
def hosted(request: pytest.FixtureRequest) -> Portal:
    found: Portal = request.getfixturevalue(f"by_{request.param}")
    return found


def leaks(content: bytes, data: Path) -> list[str]:
    """What of Ada or of the server is in an answer."""
    marks = (watermark(ADA), "Ada", user_key(ADA), "SERVERFOLDER", str(ROOT))
    return [each for each in marks if each.encode() in content]


def test_the_first_thing_a_new_server_is_asked_for_is_guarded_as_well(data: Path) -> None:
    with openid_portal(data) as fresh, fresh.tab("") as tab:
        shown = tab.open("overview", query="run=1")
        assert SIGN_IN in shown
        assert leaks(shown, data) == []


@pytest.mark.parametrize("page", [*PAGES, "home", "nowhere"])
def test_without_a_sign_in_every_page_asks_for_one_and_shows_nothing_else(
    by_openid: Portal, page: str
) -> None:
    with by_openid.tab("") as tab:
        shown = tab.open(page)
        assert SIGN_IN in shown
        assert list(tab.buttons) == ["Sign in"]
        assert leaks(shown, by_openid.data) == []
        # The stylesheet, the keys, the sentence, the button: no link, no card of a job, no picture.
        assert sorted(tab.elements) == ["button", "heading", "html", "html"]
    assert not workspace_of(by_openid.data, "").exists()


@pytest.mark.parametrize("wrong", sorted(bad_cookies(Portal(address="", data=Path()))))
def test_a_cookie_that_is_nobodys_opens_nothing(by_openid: Portal, wrong: str) -> None:
    value = bad_cookies(by_openid)[wrong]
    with httpx.Client(
        base_url=by_openid.address, headers={"Cookie": f"_streamlit_user={value}"}
    ) as client:
        answer = client.get("/_stcore/metrics")
        assert answer.status_code == 401
        assert answer.content == SIGN_IN
    if len(value) < 4000:
        with Tab(by_openid.address, cookies={USER_COOKIE_NAME: value}) as tab:
            shown = tab.open("overview")
            assert b"Sign in to continue" in shown or b"sign-in came without" in shown
            assert leaks(shown, by_openid.data) == []


def test_a_good_cookie_made_the_same_way_opens_the_page(by_openid: Portal) -> None:
    value = cookie(claims_of(by_openid, ADA))
    with Tab(by_openid.address, cookies={USER_COOKIE_NAME: value}) as tab:
        assert watermark(ADA).encode() in tab.open("overview")


def test_an_address_that_the_provider_has_not_verified_is_nobody(by_openid: Portal) -> None:
    assert by_openid.provider is not None
    mallory = ADA
    by_openid.provider.claims[mallory] = {"email_verified": False}
    try:
        cookies, _ = sign_in(by_openid.address, mallory)
    finally:
        del by_openid.provider.claims[mallory]
    with Tab(by_openid.address, cookies=cookies) as tab:
        shown = tab.open("overview")
        assert b"without an e-mail address that the provider verified" in shown
        assert watermark(ADA).encode() not in shown
        assert list(tab.buttons) == ["Sign out"]


def test_a_sign_in_leads_back_to_the_page_that_was_asked_for(by_openid: Portal) -> None:
    wanted = "report?run=0123&find=a%20b"
    cookies, where = sign_in(by_openid.address, BOB, wanted)
    assert where == f"/{wanted}"
    assert "quant_inspector_return" not in cookies
    assert sign_in(by_openid.address, BOB)[1] == "/"


def test_under_a_base_path_all_of_it_works_and_nothing_answers_beside_it(data: Path) -> None:
    with openid_portal(data, base="/tools/qi") as based:
        cookies, where = sign_in(based.address, ADA, "report?find=a")
        assert where == "/report?find=a"
        with Tab(based.address, cookies=cookies) as tab:
            assert watermark(ADA).encode() in tab.open("overview")
        with httpx.Client(base_url=based.address, timeout=60, cookies=cookies) as client:
            assert client.get("/healthz").text == "ok"
            assert client.get("/_stcore/metrics").status_code == 200
        root = based.address.removesuffix("/tools/qi")
        for path in ("/healthz", "/overview", "/_stcore/metrics", "/tools", "/tools/q", "/"):
            answer = httpx.get(f"{root}{path}", cookies=cookies)
            assert answer.status_code == 404, path
        for path in ("/_stcore/metrics", "/media/x", "x/healthz"):
            assert httpx.get(f"{based.address}{path}").status_code == 401, path


def test_through_a_unix_socket_the_header_is_believed(data: Path, tmp_path: Path) -> None:
    socket = tmp_path / "portal.sock"
    variables = {
        "QUANT_INSPECTOR_MODE": "portal",
        "QUANT_INSPECTOR_DATA": str(data),
        "QUANT_INSPECTOR_AUTH": f"header:{HEADER}",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "app:app", "--uds", str(socket)],
        cwd=ROOT, env={**os.environ, **variables},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not socket.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)  # between its name and its first answer
        transport = httpx.HTTPTransport(uds=str(socket))
        with httpx.Client(base_url="http://portal", transport=transport, timeout=60) as client:
            assert client.get("/healthz").text == "ok"
            assert client.get("/_stcore/metrics").status_code == 401
            assert client.get("/_stcore/metrics", headers={HEADER: ADA}).status_code == 200
    finally:
        process.terminate()
        process.wait(20)


def test_behind_a_proxy_nothing_of_streamlit_answers_without_the_header(by_header: Portal) -> None:
    with httpx.Client(base_url=by_header.address, timeout=60) as client:
        for page in PAGES:
            answer = client.get(f"/{page}")
            assert answer.status_code == 401
            assert SIGN_IN in answer.content
            assert b"<script" not in answer.content
        assert client.get("/static/js/index.js").status_code == 401
    with pytest.raises(InvalidStatus) as caught:
        by_header.tab("")
    assert caught.value.response.status_code == 403


@pytest.mark.parametrize("script", ["inspector/web/portal.py", "pages/overview.py"])
def test_started_around_the_gate_the_pages_know_nobody(data: Path, script: str) -> None:
    variables = {
        "QUANT_INSPECTOR_MODE": "portal",
        "QUANT_INSPECTOR_DATA": str(data),
        "QUANT_INSPECTOR_AUTH": f"header:{HEADER}",
        "STREAMLIT_SERVER_TRUSTED_USER_HEADERS": json.dumps({identity.SEEN_HEADER: "address"}),
    }
    with served(ROOT, variables, script=script) as address:
        for headers in ({HEADER: ADA}, {identity.SEEN_HEADER: ADA}):
            with Tab(address, headers=headers) as tab:
                shown = tab.open()
                assert SIGN_IN in shown
                assert watermark(ADA).encode() not in shown


def test_the_gates_own_header_cannot_be_forged(by_header: Portal) -> None:
    forged = {identity.SEEN_HEADER: ADA}
    assert httpx.get(f"{by_header.address}/_stcore/metrics", headers=forged).status_code == 401
    with Tab(by_header.address, headers={**forged, HEADER: BOB}) as tab:
        assert leaks(tab.open("overview"), by_header.data) == []


def test_everybody_sees_their_own_pages_with_their_address_and_a_sign_out(hosted: Portal) -> None:
    with hosted.tab(ADA) as tab:
        shown = tab.open("overview")
        assert watermark(ADA).encode() in shown
        assert b"Ada@" in shown
        assert ("Sign out" in tab.buttons) == (hosted.provider is not None)
    with hosted.tab(BOB) as tab:
        shown = tab.open("overview")
        assert b"No models are loaded yet" in shown
        assert b"bob@" in shown
        assert leaks(shown, hosted.data) == []
    assert not (workspace_of(hosted.data, BOB) / "current.json").exists(), "no sample by itself"


@pytest.mark.parametrize("page", PAGES)
def test_another_users_run_is_not_there(hosted: Portal, page: str) -> None:
    runs = [each.name for each in (workspace_of(hosted.data, ADA) / "runs").iterdir()]
    assert runs
    for run in (*runs, f"../../{user_key(ADA)}/runs/{runs[0]}", "%2e%2e%2f"):
        with hosted.tab(BOB) as tab:
            shown = tab.open(page, query=f"run={run}")
            assert [each for each in leaks(shown, hosted.data) if each != user_key(ADA)] == []


def test_a_session_cannot_be_taken_over_by_another_user(hosted: Portal) -> None:
    with hosted.tab(ADA) as tab:
        tab.open("overview")
        with hosted.tab(BOB, session_id=tab.session_id) as other:
            shown = other.open("overview")
            assert other.session_id != tab.session_id
            assert leaks(shown, hosted.data) == []


def test_a_websocket_of_another_sites_page_is_refused(hosted: Portal) -> None:
    for origin in ("https://evil.example", "http://127.0.0.1:1", "null"):
        with pytest.raises(InvalidStatus) as caught:
            hosted.tab(ADA, origin=origin)
        assert caught.value.response.status_code == 403


def test_no_page_of_a_portal_names_a_folder_of_the_server(hosted: Portal) -> None:
    for page in PAGES:
        with hosted.tab(ADA) as tab:
            shown = tab.open(page)
            assert b"SERVERFOLDER" not in shown
            assert str(ROOT).encode() not in shown
    with hosted.tab(BOB) as tab:
        shown = tab.open("models")
        assert b"Float model" in shown
        for field in (b"path on this machine", b"Path on this machine", b"/path/to"):
            assert field not in shown


def test_messages_that_nobody_needs_are_not_heard(by_openid: Portal) -> None:
    with by_openid.tab("") as tab:
        tab.open()
        tab.settle()
        asking = {"request_id": "1", "file_names": ["m.onnx"], "session_id": tab.session_id}
        for unwanted, said in (
            *(("load_git_info", True), ("clear_cache", True), ("set_run_on_save", True)),
            ("file_urls_request", asking),
        ):
            tab.send(**{unwanted: said})
            with pytest.raises(TimeoutError):
                tab.receive(0.7)
        tab.send_bytes(b"\xff\xff\xff")
        with pytest.raises(ConnectionClosed):
            tab.receive(10)


# ------------------------------------------------------------------ the table of the attempts


@pytest.fixture(scope="module")
def addresses(hosted: Portal) -> dict[str, str]:
    """Addresses that Ada's pages were given: of a graph, of a place for a picture, of media, of a
    file to upload."""
    found: dict[str, str] = {}
    with hosted.tab(ADA) as tab:
        upload = re.search(rb"/inspector/upload/[\w-]{43}", tab.open("models"))
        assert upload is not None
        found["upload"] = f"{upload[0].decode()}/{'0' * 32}"
        while "held" not in found:
            shown = tab.open("graph")
            held = re.findall(rb"/inspector/held/[\w-]{43}", shown)
            place = re.findall(rb"/inspector/picture/[\w-]{43}", shown)
            if held and place:
                found |= {"held": held[0].decode(), "place": place[0].decode()}
        # Last: what no page shows any more is dropped with the next run of any page.
        shown = tab.open("exclusions")
        icon = re.findall(rb"/media/\w+\.png", shown)
        media = [each for each in re.findall(rb"/media/[\w.]+", shown) if each not in icon]
        found["media"] = media[0].decode()
    return found


PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\0" * 17 + b"\0\0\0\0IEND\xaeB`\x82"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"></svg>'
TRICKS = (
    "/..%2f..%2fetc%2fpasswd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/..%5c..%5cwindows",
    "//etc/passwd",
    "/static/..%2f..%2f..%2fapp.py",
    "/media/..%2f..%2fapp.py",
    "/media/%2fetc%2fpasswd",
    "/inspector/held/..%2f..%2fapp.py",
    "/inspector/held/%252e%252e%252fapp.py",
    "/inspector/netron/..%2f..%2fapp.py/x",
    "/component/..%2f..%2fapp.py",
    "/overview%00",
    "/overview/../inspector/held/x",
    "/app/static/../secrets.toml",
    "/.streamlit/secrets.toml",
    "/app.py",
)


def sent(client: httpx.Client, method: str, path: str, **more: Any) -> httpx.Response:
    """The answer to a path that is sent exactly as it is written."""
    url = httpx.URL(client.base_url).copy_with(raw_path=path.encode())
    return client.request(method, url, **more)


@pytest.mark.parametrize(
    ("method", "what", "expected"),
    [
        ("GET", "held", {"": 401, BOB: 404, ADA: 200}),
        ("HEAD", "held", {"": 401, BOB: 404, ADA: 200}),
        ("GET", "media", {"": 401, BOB: 404, ADA: 200}),
        ("PUT", "upload", {"": 401, BOB: 404, ADA: 400}),
        ("GET", "upload", {"": 401, BOB: 404}),
        ("DELETE", "upload", {"": 401, BOB: 404}),
        ("PUT", "place", {"": 401, BOB: 404}),
        ("POST", "held", {"": 401, BOB: 405}),
    ],
)
def test_an_address_is_good_for_the_user_alone_whose_page_asked_for_it(
    hosted: Portal,
    addresses: dict[str, str],
    method: str,
    what: str,
    expected: dict[str, int],
) -> None:
    for who, status in expected.items():
        with hosted.client(who) as client:
            answer = client.request(method, addresses[what], content=SVG if "P" in method else None)
            assert answer.status_code == status, (who, answer.text)
            if who != ADA:
                assert leaks(answer.content, hosted.data) == []
                assert len(answer.content) < 100


@pytest.mark.parametrize("path", TRICKS)
def test_a_path_that_leads_elsewhere_finds_nothing(hosted: Portal, path: str) -> None:
    for who in ("", BOB):
        with hosted.client(who) as client:
            answer = sent(client, "GET", path)
        shell = answer.status_code == 200 and b"<title>Streamlit</title>" in answer.content
        assert answer.status_code in (400, 401, 404) or (shell and who), (who, answer.status_code)
        assert leaks(answer.content, hosted.data) == []
        assert b"cookie_secret" not in answer.content
        assert b"root:" not in answer.content
        assert b"portal.middleware" not in answer.content


@pytest.mark.parametrize(
    "path",
    [
        *("/inspector/netron/x/view.js", "/inspector/held/x", "/media/x", "/component/x/y.js"),
        *("/_stcore/metrics", "/_stcore/bidi-components/x", "/_stcore/upload_file/a/b"),
        *("/_stcore/agent/interact", "/_stcore/script-health-check", "/_stcore/stream"),
        *("/app/static/x", "/docs", "/inspector", "/healthz/x", "/_stcore/health/x"),
    ],
)
def test_whatever_is_not_needed_to_sign_in_is_refused_by_every_method(
    hosted: Portal, path: str
) -> None:
    with hosted.client("") as client:
        for method in ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "BREW"):
            answer = client.request(method, path)
            assert answer.status_code == 401, (method, answer.status_code)
            assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_takes_no_posts_from_nobody(hosted: Portal, page: str) -> None:
    with hosted.client("") as client:
        for method in ("POST", "PUT", "DELETE"):
            assert client.request(method, f"/{page}", content=b"x").status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://127.0.0.1:1", "Sec-Fetch-Site": "same-origin"},
    ],
)
def test_what_another_sites_page_sends_is_refused(
    hosted: Portal, addresses: dict[str, str], headers: dict[str, str]
) -> None:
    with hosted.client(ADA) as client:
        for what in ("place", "upload"):
            answer = client.put(addresses[what], content=SVG, headers=headers)
            assert answer.status_code == 403


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (SVG + b" " * 50_000_000, "image/svg+xml", 413),
        (b"<svg", "image/svg+xml", 422),
        (b"\0" * 100, "image/svg+xml", 422),
        (SVG, "text/html", 415),
        (b"", "image/svg+xml", 422),
    ],
)
def test_a_body_that_is_oversized_or_malformed_is_refused(
    hosted: Portal, addresses: dict[str, str], body: bytes, kind: str, status: int
) -> None:
    with hosted.client(ADA) as client:
        answer = client.put(addresses["place"], content=body, headers={"Content-Type": kind})
        assert answer.status_code == status
        assert leaks(answer.content, hosted.data) == []


def test_an_upload_that_is_oversized_or_malformed_is_refused(
    hosted: Portal, addresses: dict[str, str]
) -> None:
    def described(length: int) -> dict[str, str]:
        return {"Upload-Name": "m.onnx", "Upload-Length": str(length), "Upload-Offset": "0"}

    with hosted.client(ADA) as client:
        for headers, status in (
            ({}, 400),
            (described(10**13), 413),
            (described(4), 413),
            (described(-1), 400),
        ):
            answer = client.put(addresses["upload"], headers=headers, content=b"12345")
            assert answer.status_code == status
            assert leaks(answer.content, hosted.data) == []
        own = client.put("/_stcore/upload_file/a/b", files={"f": b"x"})
        assert own.status_code == 404, "Streamlit's own uploads stay in memory"


def test_health_is_open_and_names_nobody(hosted: Portal) -> None:
    with hosted.client("") as client:
        answer = client.get("/healthz")
        assert (answer.status_code, answer.content) == (200, b"ok")
        assert client.get("/_stcore/health").status_code == 200


def test_no_shared_cache_keeps_what_a_user_was_given(
    hosted: Portal, addresses: dict[str, str]
) -> None:
    with hosted.client(ADA) as client:
        for what in ("held", "media"):
            assert "no-store" in client.get(addresses[what]).headers["cache-control"]


# -------------------------------------------------------------------------------- a browser


@pytest.mark.browser
def test_in_a_browser_one_signs_in_sees_the_pages_and_signs_out(
    by_openid: Portal, browser: Browser
) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(120_000)
    expect.set_options(timeout=60_000)
    page.goto(f"{by_openid.address}/exclusions")
    expect(page.get_by_text("Sign in to continue")).to_be_visible()
    expect(page.get_by_test_id("stSidebar")).to_have_count(0)
    expect(page.get_by_text("Overview")).to_have_count(0)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_label("Address").fill(ADA)
    page.get_by_role("button", name="Continue").click()
    account = page.locator(".st-key-context").get_by_role("button", name="Ada@")
    expect(account).to_be_visible()
    expect(page).to_have_url(f"{by_openid.address}/exclusions")
    expect(page.get_by_text(watermark(ADA)).first).to_be_visible()
    account.click()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_text("Sign in to continue")).to_be_visible()
    page.goto(f"{by_openid.address}/report")
    expect(page.get_by_text("Sign in to continue")).to_be_visible()
    expect(page.get_by_text(watermark(ADA))).to_have_count(0)
    names = {each["name"] for each in page.context.cookies()}
    assert USER_COOKIE_NAME not in names
    page.close()


@pytest.mark.browser
def test_in_a_browser_an_upload_and_a_download_pass_the_gate(
    by_header: Portal, by_openid: Portal, browser: Browser
) -> None:
    model = next((by_header.data.parent / f"sources-{watermark(ADA)}").glob("*.onnx"))
    expect.set_options(timeout=60_000)
    context = browser.new_context(extra_http_headers={HEADER: BOB})
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.goto(f"{by_header.address}/models")
    page.locator(".st-key-upload-float input[type=file]").set_input_files(model)
    expect(page.get_by_text("Still missing: inputs")).to_be_visible()
    kept = [each.name for each in workspace_of(by_header.data, BOB).rglob("*.onnx")]
    assert kept == [model.name]
    context.close()
    context = browser.new_context()
    cookies = by_openid.identity(ADA)["cookies"]
    context.add_cookies(
        [{"name": name, "value": cookies[name], "url": by_openid.address} for name in cookies]
    )
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.goto(f"{by_openid.address}/report")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download JSON").click()
    found = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert found["format"] == "quant-inspector/comparison"
    assert leaks(json.dumps(found).encode(), by_openid.data) == [watermark(ADA)]
    context.close()
