"""Who asks, in both modes: judged from requests, and tried on real servers from outside."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import HTTPConnection
from streamlit import config
from streamlit.web.server.starlette import starlette_app_utils
from streamlit.web.server.starlette.starlette_server_config import USER_COOKIE_NAME

from inspector.errors import ModelError, RunError, SettingError
from inspector.hosting import SECRET_HEADER, Settings, user_key
from inspector.store import FeedSource, Workspace
from inspector.web import forms, gate, identity, portal, session, tasks
from tests.hosted import (
    ADA,
    BOB,
    COOKIE_SECRET,
    HEADER,
)
from tests.samples import ROOT

SECRET = "a-secret-of-the-proxy"
BEHIND_PROXY = Settings(mode="portal", data=Path("/srv/q"), auth="header", header=HEADER)
WITH_SECRET = Settings(
    mode="portal", data=Path("/srv/q"), auth="header", header=HEADER, proxy_secret=SECRET
)
SIGN_IN = b"Sign in to continue"
LOOPBACK, REMOTE = ("127.0.0.1", 5000), ("10.1.2.3", 5000)


def connection(
    *headers: tuple[str, str],
    client: tuple[str, int] | None = LOOPBACK,
    server: tuple[str, int | None] | None = ("127.0.0.1", 8501),
) -> HTTPConnection:
    raw = [(name.lower().encode(), value.encode("utf-8")) for name, value in headers]
    return HTTPConnection({"type": "http", "headers": raw, "client": client, "server": server})


def asker(found: Settings, *args: Any, **kwargs: Any) -> str:
    user = identity.asker(found, connection(*args, **kwargs))
    return user.address if user else ""


# ---------------------------------------------------------------------- the header of a proxy


@pytest.mark.parametrize("client", [LOOPBACK, ("::1", 9), ("::ffff:127.0.0.1", 9)])
def test_the_header_is_believed_from_this_machine(client: tuple[str, int]) -> None:
    assert asker(BEHIND_PROXY, (HEADER, ADA), client=client) == ADA


def test_the_header_is_believed_through_a_unix_socket() -> None:
    assert asker(BEHIND_PROXY, (HEADER, ADA), client=None, server=("/run/q.sock", None)) == ADA
    assert asker(BEHIND_PROXY, (HEADER, ADA), client=None, server=None) == ADA


@pytest.mark.parametrize(
    "client", [REMOTE, ("127.0.0.1.example.org", 9), ("0.0.0.0", 9), ("::ffff:10.1.2.3", 9)]
)
def test_the_header_of_another_machine_counts_as_absent(client: tuple[str, int]) -> None:
    assert asker(BEHIND_PROXY, (HEADER, ADA), client=client) == ""


def test_a_peer_that_is_gone_already_is_no_unix_socket() -> None:
    assert asker(BEHIND_PROXY, (HEADER, ADA), client=None) == ""


def test_a_peer_that_x_forwarded_for_may_have_named_is_not_believed() -> None:
    forwarded = ("X-Forwarded-For", "127.0.0.1")
    assert asker(BEHIND_PROXY, (HEADER, ADA), forwarded) == ""
    assert asker(WITH_SECRET, (HEADER, ADA), forwarded, (SECRET_HEADER, SECRET)) == ADA


@pytest.mark.parametrize(
    "given",
    [
        (),
        ((SECRET_HEADER, ""),),
        ((SECRET_HEADER, SECRET[:-1]),),
        ((SECRET_HEADER, SECRET + "x"),),
        ((SECRET_HEADER, "x"), (SECRET_HEADER, SECRET)),
        ((SECRET_HEADER, SECRET), (SECRET_HEADER, SECRET)),
        ((SECRET_HEADER, "sécrèt"),),
        (("X-Quant_Inspector-Secret", SECRET),),
    ],
)
def test_where_a_secret_is_set_nothing_else_makes_the_header_believed(given: Any) -> None:
    assert asker(WITH_SECRET, (HEADER, ADA), *given) == ""
    assert asker(WITH_SECRET, (HEADER, ADA), (SECRET_HEADER, SECRET), client=REMOTE) == ADA


@pytest.mark.parametrize("value", ["", " ", "a b", f"{ADA}, {BOB}", "a\x01b", "x" * 300])
def test_a_header_without_one_address_is_nobody(value: str) -> None:
    assert asker(BEHIND_PROXY, (HEADER, value)) == ""


def test_two_headers_are_nobody() -> None:
    assert asker(BEHIND_PROXY, (HEADER, ADA), (HEADER, BOB)) == ""
    assert asker(BEHIND_PROXY) == ""


def test_an_address_in_other_letters_is_read_as_utf_8() -> None:
    assert asker(BEHIND_PROXY, (HEADER, "zoë@example.org")) == "zoë@example.org"


def test_in_local_mode_everybody_is_the_one_user() -> None:
    assert identity.asker(Settings(), connection((HEADER, ADA))) == identity.LOCAL


# ------------------------------------------------------------------------- the signed cookie


def test_streamlit_signs_and_reads_its_cookie_as_the_routes_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The functions are Streamlit's own and may change with it."""
    assert USER_COOKIE_NAME == "_streamlit_user"
    signed = starlette_app_utils.create_signed_value("s" * 32, USER_COOKIE_NAME, '{"a": 1}')
    read = starlette_app_utils.decode_signed_value("s" * 32, USER_COOKIE_NAME, signed)
    assert read == b'{"a": 1}'
    assert starlette_app_utils.decode_signed_value("t" * 32, USER_COOKIE_NAME, signed) is None
    assert starlette_app_utils.decode_signed_value("s" * 32, "other", signed) is None


# ---------------------------------------------------------------- settings that are refused


@pytest.fixture
def portal_variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Portal mode in this process; what Streamlit is told is taken back."""
    kept = {
        key: config.get_option(key)
        for key in ("server.trustedUserHeaders", "client.showErrorDetails")
    }
    monkeypatch.setenv("QUANT_INSPECTOR_MODE", "portal")
    monkeypatch.setenv("QUANT_INSPECTOR_DATA", "/srv/q")
    monkeypatch.setenv("QUANT_INSPECTOR_AUTH", f"header:{HEADER}")
    yield monkeypatch
    for key, value in kept.items():
        config.set_option(key, value)


def test_headers_that_streamlit_would_believe_from_anybody_are_refused(
    portal_variables: pytest.MonkeyPatch,
) -> None:
    config.set_option("server.trustedUserHeaders", {"X-User": "email"})
    with pytest.raises(SettingError, match=r"trustedUserHeaders is set"):
        identity.checked_settings()


def test_a_setting_that_cannot_be_used_ends_the_program(
    portal_variables: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    portal_variables.setenv("QUANT_INSPECTOR_AUTH", "header:")
    with pytest.raises(SystemExit) as ended:
        portal.middleware()
    assert ended.value.code == 2
    assert re.fullmatch(r"Error: [^\n]+\.\nHint: [^\n]+\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("", "at least one authentication provider"),
        ('[auth]\nredirect_uri = "http://x/oauth2callback"\n', "cookie_secret"),
        (
            '[auth]\nredirect_uri="http://x/oauth2callback"\ncookie_secret="xxx"\nclient_id="i"\n'
            'client_secret="s"\nserver_metadata_url="http://x/m"\n',
            "cookie_secret in .streamlit/secrets.toml has 3 characters",
        ),
        (
            f'[auth]\nredirect_uri="http://x/callback"\ncookie_secret="{COOKIE_SECRET}"\n'
            'client_id="i"\nclient_secret="s"\nserver_metadata_url="http://x/m"\n',
            "does not lead to /oauth2callback",
        ),
        (
            f'[auth]\nredirect_uri="http://x/oauth2callback"\ncookie_secret="{COOKIE_SECRET}"\n'
            '[auth.other]\nclient_id="i"\n',
            "client_secret",
        ),
        (
            "[auth]\nredirect_uri='http://x/oauth2callback'\n"
            f"cookie_secret='python3 -c {'x' * 32}'\n"
            "client_id='i'\nclient_secret='s'\nserver_metadata_url='http://x/m'\n",
            "has the example's own cookie_secret or client_secret",
        ),
        (
            f"[auth]\nredirect_uri='http://x/oauth2callback'\ncookie_secret='{COOKIE_SECRET}'\n"
            "[auth.one]\nclient_id='i'\nclient_secret='of the provider'\n"
            "server_metadata_url='http://x/m'\n",
            "has the example's own cookie_secret or client_secret",
        ),
    ],
)
def test_openid_settings_that_nobody_could_sign_in_with_are_refused(
    portal_variables: pytest.MonkeyPatch, tmp_path: Path, toml: str, says: str
) -> None:
    file = tmp_path / "secrets.toml"
    file.write_text(toml, encoding="utf-8")
    portal_variables.setenv("QUANT_INSPECTOR_AUTH", "oidc")
    kept = config.get_option("secrets.files")
    from streamlit.runtime.secrets import secrets_singleton

    secrets_singleton._reset()
    config.set_option("secrets.files", [str(file)])
    try:
        with pytest.raises(SettingError) as caught:
            identity.checked_settings()
        assert says in caught.value.message
        assert "\n" not in caught.value.message + caught.value.hint
    finally:
        secrets_singleton._reset()
        config.set_option("secrets.files", kept)


# -------------------------------------------------------------------- what the gate lets pass


def gate_of(found: Settings, pages: tuple[str, ...] = ("overview", "report")) -> gate.Gate:
    return gate.Gate(lambda *_: None, settings=found, pages=pages)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("address", "there"),
    [
        *((each, True) for each in ("/", "/overview", "/report?run=1&find=a%20b")),
        *((each, False) for each in ("", "//evil.example", "https://evil.example/overview")),
        *((each, False) for each in ("/\\evil.example", "/overview/../x", "/inspector/held/x")),
        *((each, False) for each in ("/overview\r\nX: y", "/overview?a b", "/overview?é")),
        *((each, False) for each in ("overview", "/overview/", "/auth/logout", "@evil.example")),
    ],
)
def test_a_sign_in_leads_to_pages_and_nowhere_else(address: str, there: bool) -> None:
    assert gate_of(BEHIND_PROXY)._is_page(address) is there


def test_a_user_keeps_the_addresses_that_were_sent_last() -> None:
    found = gate_of(BEHIND_PROXY)
    for number in range(gate.KEPT_ADDRESSES + 1):
        found._note("ada", b"\x12\x3a/media/%056x.png" % number)
    ada = identity.User(address="a", key="ada")
    bob = identity.User(address="b", key="bob")
    for user, name, there in (
        (ada, f"media/{1:056x}.png", True),
        (ada, f"media/{0:056x}.png", False),
        (bob, f"media/{1:056x}.png", False),
        (ada, "_stcore/upload_file/5-e/7-f", False),
        (bob, "overview", True),
    ):
        assert (found._foreign(name, user) is None) is there, (user.key, name)


def test_a_folder_of_the_server_leaves_no_trace_in_a_message() -> None:
    content = f"\x12 {ROOT}/inspector/web/portal.py and /srv/q/users/ab/models/x.onnx".encode()
    masked = gate._masked(content, gate._masks(Path("/srv/q")))
    assert len(masked) == len(content)
    assert str(ROOT).encode() not in masked
    assert b"/srv/q" not in masked
    assert b"x.onnx" in masked


@pytest.mark.parametrize("page", sorted((ROOT / "pages").glob("*.py")), ids=lambda each: each.stem)
def test_every_page_asks_the_guard_before_anything_else(page: Path) -> None:
    body = ast.parse(page.read_text(encoding="utf-8")).body[1:]
    harmless = (ast.Import, ast.ImportFrom, ast.Assign)
    first = next(each for each in body if not isinstance(each, harmless))
    assert ast.unparse(first) == "session.guard()"
    for each in body[: body.index(first)]:
        assert not isinstance(each, ast.Assign) or not [
            part for part in ast.walk(each) if isinstance(part, ast.Call)
        ]


def test_what_a_form_names_has_to_lie_in_the_users_own_workspace(
    portal_variables: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    portal_variables.setenv("QUANT_INSPECTOR_DATA", str(tmp_path))
    ada = identity.user_of_address("ada@example.org")
    portal_variables.setattr(identity, "current_user", lambda: ada)
    own = tmp_path / "users" / user_key("ada@example.org")
    assert session.root() == own
    assert not session.is_local()
    model, feeds = own / "models" / "m.onnx", own / "feeds" / "f.npz"
    stored = FeedSource(kind="stored", path=str(feeds))
    forms._check_uploaded(model, None, stored, None)
    forms._check_uploaded(model, model, FeedSource(kind="random", samples=2), stored)
    (own / "models").mkdir(parents=True)
    (own / "models" / "link.onnx").symlink_to("/etc/passwd")
    foreign = tmp_path / "users" / user_key("bob@example.org") / "m.onnx"
    for wrong in (Path("/etc/passwd"), foreign, own / ".." / "x", own / "models" / "link.onnx"):
        with pytest.raises(ModelError, match="not uploaded"):
            forms._check_uploaded(wrong, None, stored, None)
        with pytest.raises(ModelError, match="not uploaded"):
            forms._check_uploaded(model, None, FeedSource(kind="stored", path=str(wrong)), None)
    with pytest.raises(ModelError, match="not uploaded"):
        forms._check_uploaded(model, None, FeedSource(kind="path", path=str(feeds)), None)


def test_an_error_is_told_without_folders_and_settings_of_the_server(
    portal_variables: pytest.MonkeyPatch,
) -> None:
    error = RunError(
        "cannot write /srv/q/users/" + "0" * 32 + "/models/m.onnx",
        hint="Free disk space or set QUANT_INSPECTOR_DATA to a folder you may write to.",
    )
    told = session.told(error)
    assert type(told) is RunError
    assert told.message == "cannot write m.onnx"
    assert told.hint == "Tell whoever runs this server: its disk is full."
    setting = RunError("no", hint="Set QUANT_INSPECTOR_JOBS=4, or unset it.")
    needs = "Tell whoever runs this server: its settings have to change."
    assert session.told(setting).hint == needs
    portal_variables.delenv("QUANT_INSPECTOR_MODE")
    portal_variables.delenv("QUANT_INSPECTOR_AUTH")
    assert session.told(error) is error


def test_a_sample_in_a_portal_is_a_private_copy(tmp_path: Path) -> None:
    run = tasks.load_sample(
        tmp_path, "digit-transformer", private=True, progress=lambda _fraction, _message: None
    )
    files = [each for each in tmp_path.rglob("*.json") if each.is_file()]
    assert files
    for each in files:
        assert str(ROOT) not in each.read_text(encoding="utf-8")
    assert Workspace(tmp_path).pair(Workspace(tmp_path).run(run).pair_id).inputs.kind == "stored"


# --------------------------------------------------------------------------- in local mode


def local(client: tuple[str, int] | None, network: bool = False) -> int:
    connection_ = HTTPConnection({"type": "http", "headers": [], "client": client, "path": "/"})
    refusal = gate_of(Settings(network=network))._local(connection_)
    return 200 if refusal is None else refusal.status_code


def test_local_mode_answers_this_machine_only_whatever_the_server_listens_on() -> None:
    assert local(LOOPBACK) == local(("::1", 5)) == local(None) == 200
    assert local(REMOTE) == 403
    assert local(REMOTE, network=True) == 200
    assert local(("10.1.2.3", 0)) == 200, "a proxy on this machine named the peer"
