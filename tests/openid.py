"""An OpenID provider on loopback: code flow with PKCE, keys at an address, tokens signed RS256."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

import uvicorn
from authlib.oauth2 import AuthorizationServer
from authlib.oauth2.rfc6749 import AuthorizationCodeMixin, ClientMixin, OAuth2Request
from authlib.oauth2.rfc6749.grants import AuthorizationCodeGrant
from authlib.oauth2.rfc6749.requests import BasicOAuth2Payload
from authlib.oauth2.rfc6750 import BearerTokenGenerator
from authlib.oauth2.rfc7636 import CodeChallenge
from authlib.oidc.core import UserInfo
from authlib.oidc.core.grants import OpenIDCode
from joserfc.jwk import KeySet, RSAKey
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

CLIENT_ID = "quant-inspector"


@dataclass
# Authlib comes without types, so mypy takes its classes for Any.
class _Client(ClientMixin):  # type: ignore[misc]
    redirect_uri: str
    secret: str

    def get_client_id(self) -> str:
        return CLIENT_ID

    def get_default_redirect_uri(self) -> str:
        return self.redirect_uri

    def get_allowed_scope(self, scope: str) -> str:
        return " ".join(each for each in scope.split() if each in ("openid", "email", "profile"))

    def check_redirect_uri(self, redirect_uri: str) -> bool:
        return redirect_uri == self.redirect_uri

    def check_client_secret(self, client_secret: str) -> bool:
        return secrets.compare_digest(client_secret, self.secret)

    def check_endpoint_auth_method(self, method: str, endpoint: str) -> bool:
        return method in ("client_secret_basic", "client_secret_post")

    def check_response_type(self, response_type: str) -> bool:
        return response_type == "code"

    def check_grant_type(self, grant_type: str) -> bool:
        return grant_type == "authorization_code"


@dataclass
class _Code(AuthorizationCodeMixin):  # type: ignore[misc]
    code: str
    redirect_uri: str
    scope: str
    nonce: str | None
    claims: dict[str, Any]
    code_challenge: str
    code_challenge_method: str
    auth_time: int = field(default_factory=lambda: int(time.time()))

    def get_redirect_uri(self) -> str:
        return self.redirect_uri

    def get_scope(self) -> str:
        return self.scope

    def get_nonce(self) -> str | None:
        return self.nonce

    def get_auth_time(self) -> int:
        return self.auth_time

    def get_acr(self) -> None:
        return None

    def get_amr(self) -> None:
        return None


class Provider:
    """The provider; `claims` says what it knows of people besides their address."""

    def __init__(self, address: str, redirect_uri: str) -> None:
        self.address = address
        self.client = _Client(redirect_uri=redirect_uri, secret=secrets.token_urlsafe(24))
        self.key = RSAKey.generate_key(2048, {"use": "sig", "kid": "one"})
        self.codes: dict[str, _Code] = {}
        self.claims: dict[str, Mapping[str, Any]] = {}
        self.exchanged = 0
        self.server = _server(self)

    def secrets_toml(self, cookie_secret: str) -> str:
        """The section of `.streamlit/secrets.toml`."""
        return (
            "[auth]\n"
            f'redirect_uri = "{self.client.redirect_uri}"\n'
            f'cookie_secret = "{cookie_secret}"\n'
            f'client_id = "{CLIENT_ID}"\n'
            f'client_secret = "{self.client.secret}"\n'
            f'server_metadata_url = "{self.address}/.well-known/openid-configuration"\n'
        )

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/.well-known/openid-configuration", self._metadata),
                Route("/keys", self._keys),
                Route("/authorize", self._ask, methods=["GET"]),
                Route("/authorize", self._answer, methods=["POST"]),
                Route("/token", self._token, methods=["POST"]),
                Route("/end", self._end),
            ]
        )

    async def _metadata(self, _: Request) -> Response:
        return JSONResponse(
            {
                "issuer": self.address,
                "authorization_endpoint": f"{self.address}/authorize",
                "token_endpoint": f"{self.address}/token",
                "jwks_uri": f"{self.address}/keys",
                "end_session_endpoint": f"{self.address}/end",
                "response_types_supported": ["code"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["RS256"],
                "code_challenge_methods_supported": ["S256"],
            }
        )

    async def _keys(self, _: Request) -> Response:
        return JSONResponse(KeySet([self.key]).as_dict(private=False))

    async def _ask(self, request: Request) -> Response:
        hidden = "".join(
            f'<input type="hidden" name="{escape(key)}" value="{escape(value)}">'
            for key, value in request.query_params.items()
        )
        return HTMLResponse(
            "<title>Provider</title><form method=post action=/authorize>"
            f"<label>Address <input name=address></label>{hidden}<button>Continue</button></form>"
        )

    async def _answer(self, request: Request) -> Response:
        form = {key: str(value) for key, value in (await request.form()).items()}
        address = form.pop("address")
        claims = {"sub": address, "email": address, "email_verified": True}
        claims |= dict(self.claims.get(address, {}))
        asked = _request(request, form)
        grant = self.server.get_consent_grant(asked, end_user=claims)
        answer: Response = self.server.create_authorization_response(
            asked, grant_user=claims, grant=grant
        )
        return answer

    async def _token(self, request: Request) -> Response:
        form = {key: str(value) for key, value in (await request.form()).items()}
        self.exchanged += 1
        answer: Response = self.server.create_token_response(_request(request, form))
        return answer

    async def _end(self, request: Request) -> Response:
        return RedirectResponse(request.query_params["post_logout_redirect_uri"])


class _Asked(OAuth2Request):  # type: ignore[misc]
    @property
    def args(self) -> Mapping[str, str]:
        return dict(self.payload.data)

    @property
    def form(self) -> Mapping[str, str]:
        return dict(self.payload.data)


def _request(request: Request, form: dict[str, str]) -> OAuth2Request:
    # The library insists on TLS, which loopback does not need.
    uri = str(request.url).replace("http://", "https://")
    asked = _Asked(method=request.method, uri=uri, headers=request.headers)
    asked.payload = BasicOAuth2Payload(form)
    return asked


def _server(provider: Provider) -> AuthorizationServer:
    class Server(AuthorizationServer):  # type: ignore[misc]
        def query_client(self, client_id: str) -> _Client | None:
            return provider.client if client_id == CLIENT_ID else None

        def save_token(self, token: Any, request: Any) -> None: ...

        def send_signal(self, name: str, *args: Any, **kwargs: Any) -> None: ...

        def create_oauth2_request(self, request: Any) -> OAuth2Request:
            return request

        def handle_response(self, status: int, body: Any, headers: Any) -> Response:
            text = json.dumps(body) if isinstance(body, dict) else body
            return Response(text, status, headers=dict(headers))

    class Grant(AuthorizationCodeGrant):  # type: ignore[misc]
        def save_authorization_code(self, code: str, request: OAuth2Request) -> None:
            asked = request.payload.data
            provider.codes[code] = _Code(
                code=code,
                redirect_uri=request.payload.redirect_uri,
                scope=request.scope,
                nonce=asked.get("nonce"),
                claims=request.user,
                code_challenge=asked["code_challenge"],
                code_challenge_method=asked["code_challenge_method"],
            )

        def query_authorization_code(self, code: str, client: _Client) -> _Code | None:
            return provider.codes.get(code)

        def delete_authorization_code(self, authorization_code: _Code) -> None:
            del provider.codes[authorization_code.code]

        def authenticate_user(self, authorization_code: _Code) -> dict[str, Any]:
            return authorization_code.claims

    class Identity(OpenIDCode):  # type: ignore[misc]
        def exists_nonce(self, nonce: str, request: OAuth2Request) -> bool:
            return any(each.nonce == nonce for each in provider.codes.values())

        def resolve_client_private_key(self, client: _Client) -> RSAKey:
            return provider.key

        def get_client_algorithm(self, client: _Client) -> str:
            return "RS256"

        def get_client_claims(self, client: _Client) -> dict[str, Any]:
            return {"iss": provider.address}

        def get_encode_header(self, client: _Client) -> dict[str, Any]:
            return {"alg": "RS256", "kid": "one"}

        def generate_user_info(self, user: dict[str, Any], scope: str) -> UserInfo:
            return UserInfo(**user)

    server = Server()
    server.register_token_generator(
        "default", BearerTokenGenerator(lambda *_, **__: secrets.token_urlsafe(24))
    )
    server.register_grant(Grant, [CodeChallenge(required=True), Identity(require_nonce=True)])
    return server


@contextlib.contextmanager
def running_provider(redirect_uri: str) -> Iterator[Provider]:
    """A provider that answers until the block ends."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        provider = Provider(address, redirect_uri)
        server = uvicorn.Server(uvicorn.Config(provider.app(), log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield provider
        finally:
            server.should_exit = True
            thread.join(10)
