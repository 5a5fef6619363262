"""Who asks: a page by Streamlit's session, a route by its request.

In local mode it is always the one user of this machine. In portal mode a page asks `require`,
which shows the sign-in and stops where nobody is signed in, and the gate in front of the server
(`gate.py`) asks `asker` for every request. Both agree: with OpenID the routes read the signed
cookie that Streamlit sets for the pages, with its own functions; with a header the pages get the
address from the gate, which alone judges whether the header is believed.
"""

from __future__ import annotations

import functools
import hmac
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import quote, unquote

import streamlit as st
from starlette.requests import HTTPConnection
from streamlit import auth_util, config
from streamlit.errors import StreamlitAuthError
from streamlit.runtime.scriptrunner import get_script_run_ctx
from streamlit.web.server.server_util import get_cookie_secret
from streamlit.web.server.starlette.starlette_app_utils import decode_signed_value
from streamlit.web.server.starlette.starlette_server_config import USER_COOKIE_NAME

from inspector import hosting
from inspector.errors import SettingError
from inspector.hosting import SECRET_HEADER, Settings
from inspector.web.words import md_text

# How the gate tells the pages whom it has seen in the header; it drops what came with this name.
SEEN_HEADER = "X-Quant-Inspector-User"
_SEEN_KEY = "address"
_SHORTEST_COOKIE_SECRET = 32

_log = logging.getLogger("inspector.web")
# Set by the gate. Another way of starting the server has none, and then nobody is signed in.
gate_stands = threading.Event()


@dataclass(frozen=True, kw_only=True, slots=True)
class User:
    """Somebody who uses the app.

    Attributes:
        address: as they signed in; "" for the one user of local mode.
        key: the name of their folder, from `hosting.user_key`; "" in local mode.
    """

    address: str
    key: str


LOCAL = User(address="", key="")


def settings() -> Settings:
    """How this server is hosted.

    Raises:
        SettingError: a setting cannot be used.
    """
    given = tuple(os.environ.get(name, "") for name, _, _ in hosting.SETTINGS)
    return _read(given, config.get_option("server.address"))


@functools.lru_cache(maxsize=4)
def _read(given: tuple[str, ...], server_address: str | None) -> Settings:
    names = (name for name, _, _ in hosting.SETTINGS)
    return hosting.read_settings(dict(zip(names, given, strict=True)), server_address)


def user_of_address(text: str) -> User | None:
    """The user of an address; None where it cannot be one."""
    address = hosting.clean_address(text)
    return User(address=address, key=hosting.user_key(address)) if address else None


# ── before the server starts ─────────────────────────────────────────────────────────────────


def checked_settings() -> Settings:
    """The settings, once all that sign-in needs is there; sets what Streamlit has to know of it.

    Raises:
        SettingError: a setting cannot be used, or nobody could sign in.
    """
    hosting.check_names(os.environ)
    found = settings()
    if not found.is_portal:
        return found
    if found.auth == "oidc":
        _check_openid()
    headers = config.get_option("server.trustedUserHeaders")
    ours = {SEEN_HEADER: _SEEN_KEY}
    if headers and headers != ours:
        raise SettingError(
            "Streamlit's option server.trustedUserHeaders is set, which anybody who reaches the "
            "port could use to be somebody else",
            hint="Unset server.trustedUserHeaders, and use QUANT_INSPECTOR_AUTH=header:NAME.",
        )
    config.set_option("server.trustedUserHeaders", ours if found.auth == "header" else {})
    # A traceback names folders of the server.
    config.set_option("client.showErrorDetails", "none")
    return found


def _check_openid() -> None:
    if not auth_util.is_authlib_installed():
        raise SettingError(
            "QUANT_INSPECTOR_AUTH is oidc, but the package Authlib is not installed",
            hint='Run pip install -e ".[portal]".',
        )
    section = auth_util.get_secrets_auth_section()
    names = providers()
    try:
        for name in names or ["default"]:
            auth_util.validate_auth_credentials(name)
    except StreamlitAuthError as error:
        raise SettingError(
            f"QUANT_INSPECTOR_AUTH is oidc, but: {' '.join(str(error).split()).rstrip('.')}",
            hint="Put redirect_uri, cookie_secret, client_id, client_secret and "
            "server_metadata_url into [auth] of .streamlit/secrets.toml.",
        ) from error
    secret = str(section.get("cookie_secret", ""))
    if len(secret) < _SHORTEST_COOKIE_SECRET:
        raise SettingError(
            f"cookie_secret in .streamlit/secrets.toml has {len(secret)} characters, expected "
            f"{_SHORTEST_COOKIE_SECRET} or more: whoever guesses it can be anybody",
            hint="Make one with python -c 'import secrets; print(secrets.token_urlsafe(32))'.",
        )
    if " " in secret or "of the provider" in map(str, _values(section.to_dict())):
        raise SettingError(
            "The [auth] section of .streamlit/secrets.toml has the example's own cookie_secret or "
            "client_secret, which everybody can read",
            hint="Replace every value that is marked CHANGE; make a cookie_secret with "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))'.",
        )
    if auth_util.get_validated_redirect_uri() is None or not openid_origin().startswith("http"):
        raise SettingError(
            "redirect_uri in .streamlit/secrets.toml does not lead to /oauth2callback",
            hint="Set redirect_uri to the app's address followed by /oauth2callback.",
        )


def _values(section: Mapping[str, Any]) -> Iterator[Any]:
    """What stands in a section and in those within it."""
    for value in section.values():
        if isinstance(value, Mapping):
            yield from _values(value)
        else:
            yield value


def providers() -> list[str]:
    """The OpenID providers people can sign in at, as `st.login` takes them."""
    section = auth_util.get_secrets_auth_section().to_dict()
    named = [name for name, value in section.items() if isinstance(value, Mapping)]
    named = [name for name in named if name != "client_kwargs"]
    return (["default"] if "client_id" in section else []) + named


def openid_origin() -> str:
    """Scheme and host under which people reach the app, from `redirect_uri`; "" without."""
    return auth_util.get_origin_from_redirect_uri() or ""


# ── a request ────────────────────────────────────────────────────────────────────────────────


def asker(found: Settings, connection: HTTPConnection) -> User | None:
    """Who sent a request or opens a websocket; None where nobody is signed in.

    Args:
        found: the server's settings.
        connection: with the peer as the server saw it, and the headers as they came.
    """
    if not found.is_portal:
        return LOCAL
    if found.auth == "header":
        return _in_header(found, connection)
    return _in_cookies(connection.cookies)


def user_of_answer(headers: Iterable[tuple[bytes, bytes]]) -> User | None:
    """Whom an answer signs in by the cookies that it sets; None where it signs in nobody."""
    cookies: dict[str, str] = {}
    for name, value in headers:
        if name.lower() == b"set-cookie":
            try:
                found = SimpleCookie(value.decode("latin-1"))
            except CookieError:
                continue
            # What is deleted, at the address before a base path, is set to nothing.
            cookies.update({key: each.value for key, each in found.items() if each.value})
    return _in_cookies(cookies)


def _in_header(found: Settings, connection: HTTPConnection) -> User | None:
    given = connection.headers.getlist(found.header)
    if len(given) != 1 or not _is_believed(found, connection):
        return None
    try:
        return user_of_address(given[0].encode("latin-1").decode("utf-8"))
    except UnicodeError:
        return None


def _is_believed(found: Settings, connection: HTTPConnection) -> bool:
    if found.proxy_secret:
        given = connection.headers.getlist(SECRET_HEADER)
        fits = len(given) == 1 and hmac.compare_digest(
            given[0].encode("latin-1"), found.proxy_secret.encode("latin-1")
        )
        if not fits:
            other = "with another value than QUANT_INSPECTOR_PROXY_SECRET"
            how = other if len(given) == 1 else f"{len(given)} times"
            _say_unbelieved(found.header, f"{SECRET_HEADER} came {how}")
        return fits
    if "x-forwarded-for" in connection.headers:
        # The server may have put what stands there in the place of the peer.
        _say_unbelieved(
            found.header,
            f"a proxy that sends X-Forwarded-For has to send {SECRET_HEADER} as well; set "
            "QUANT_INSPECTOR_PROXY_SECRET",
        )
        return False
    if connection.client is not None:
        return hosting.is_near(connection.client.host)
    # No peer: a unix socket, which has a path and no port; or a peer that is gone already.
    server = connection.scope.get("server")
    return server is None or server[1] is None


@functools.cache
def _say_unbelieved(header: str, why: str) -> None:
    _log.warning("%s was not believed: %s", header, why)


def _in_cookies(cookies: Mapping[str, str]) -> User | None:
    secret = get_cookie_secret()

    def signed(name: str) -> bytes | None:
        value = cookies.get(name)
        if value is None:
            return None
        try:
            return decode_signed_value(secret, name, value.encode("latin-1"))
        except UnicodeError:
            return None

    try:
        raw = auth_util.get_cookie_with_chunks(signed, USER_COOKIE_NAME)
        claims = json.loads(raw) if raw else None
    except ValueError:
        return None
    if not isinstance(claims, dict) or claims.get("origin") != openid_origin():
        return None
    return _of_claims(claims)


def _of_claims(claims: Mapping[str, Any]) -> User | None:
    """The user of an identity token: by a mail address that the provider does not doubt."""
    address = claims.get("email")
    # Some providers let people write any address, and say here that they have not checked it.
    doubted = str(claims.get("email_verified", True)).lower() not in ("true", "1")
    if claims.get("is_logged_in") is not True or not isinstance(address, str) or doubted:
        return None
    return user_of_address(address)


def seen_header(user: User) -> tuple[bytes, bytes]:
    """The header that tells the pages whom the gate has seen."""
    return SEEN_HEADER.lower().encode(), quote(user.address, safe="").encode()


# ── a page ───────────────────────────────────────────────────────────────────────────────────


def current_user() -> User | None:
    """Who looks at the page; None where nobody is signed in."""
    found = settings()
    if not found.is_portal:
        return LOCAL
    if not gate_stands.is_set():
        _log.error("there is no gate: start the server with `streamlit run app.py`")
        return None
    claims = _claims()
    if found.auth == "oidc":
        return _of_claims(claims)
    seen = claims.get(_SEEN_KEY)
    return user_of_address(unquote(seen)) if isinstance(seen, str) else None


def _claims() -> Mapping[str, Any]:
    """What the page's session knows of who opened it, as `st.user` has it: that looks for a file
    with secrets each time, and a page asks a hundred times."""
    context = get_script_run_ctx()
    return {} if context is None else context.user_info


def require() -> User:
    """Who looks at the page. Where nobody is signed in, shows the sign-in and ends the page."""
    user = current_user()
    if user is None:
        _sign_in()
        st.stop()
    return user


def _sign_in() -> None:
    with st.container(key="sign-in"):
        st.subheader("Sign in to continue", anchor=False)
        if settings().auth != "oidc":
            return
        if _claims().get("is_logged_in"):
            st.markdown("Your sign-in came without an e-mail address that the provider verified.")
            st.button("Sign out", key="sign-out", on_click=st.logout)
            return
        names = providers()
        for name in names:
            label = "Sign in" if len(names) == 1 else f"Sign in with {name}"
            st.button(
                md_text(label),
                key=f"sign-in-{name}",
                type="primary",
                on_click=st.login,
                args=() if name == "default" else (name,),
            )
