"""How the app is hosted: the settings of a server, each user's folder, texts without its paths.

Local mode is one user on one machine: loopback only, no sign-in, paths on the machine may be
opened. Portal mode is a team on one server: everybody signs in and has a workspace of their own,
and nothing is opened that was not uploaded. Settings come from the environment, are read before
the server answers, and are refused there with a hint. Apart from `web/`, because backup and
housekeeping need the same settings without a web server.
"""

from __future__ import annotations

import difflib
import hashlib
import ipaddress
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from inspector.errors import SettingError

SECRET_HEADER = "X-Quant-Inspector-Secret"
SHORTEST_SECRET = 16
LONGEST_ADDRESS = 254
_SECRET_HINT = "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
# They mean something of their own, so a proxy cannot put an address there.
_TAKEN = frozenset(
    {
        *("authorization", "connection", "content-length", "content-type", "cookie", "forwarded"),
        *("host", "origin", "referer", "sec-websocket-protocol", "transfer-encoding", "upgrade"),
        *("user-agent", "x-forwarded-for", "x-forwarded-proto", SECRET_HEADER.lower()),
    }
)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])B?|B)", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

# (variable, what it is, default as text); the README's table.
SETTINGS = (
    ("QUANT_INSPECTOR_MODE", "`local` or `portal`.", "local"),
    (
        "QUANT_INSPECTOR_DATA",
        "The folder that holds everything. Portal mode needs it.",
        "the user's cache folder",
    ),
    (
        "QUANT_INSPECTOR_NETWORK",
        "`1` lets local mode answer other machines, without sign-in.",
        "0",
    ),
    (
        "QUANT_INSPECTOR_AUTH",
        "Portal mode: `oidc`, or `header:NAME` for a header in which a proxy that signs people in "
        "puts their address. The header is believed from this machine and through a unix socket; "
        "where `QUANT_INSPECTOR_PROXY_SECRET` is set, only together with it.",
        "",
    ),
    (
        "QUANT_INSPECTOR_PROXY_SECRET",
        f"At least {SHORTEST_SECRET} characters that the proxy sends in `{SECRET_HEADER}`. Needed "
        "where the server listens beyond loopback, or the proxy sends `X-Forwarded-For`.",
        "",
    ),
    (
        "QUANT_INSPECTOR_SIGN_OUT",
        "With `header:NAME`: the address of the proxy that signs people out.",
        "",
    ),
    ("QUANT_INSPECTOR_UPLOAD_LIMIT", "The largest upload.", "4 GB"),
    ("QUANT_INSPECTOR_QUOTA", "What one user may store.", "20 GB"),
    ("QUANT_INSPECTOR_JOBS", "Jobs that one user may have at once.", "4"),
    ("QUANT_INSPECTOR_JOB_SECONDS", "The longest a job may run.", "3600"),
    ("QUANT_INSPECTOR_JOB_MEMORY", "What a job may use.", "8 GB"),
    (
        "QUANT_INSPECTOR_EXPIRY_DAYS",
        "Days after which a workspace that nobody opened is removed; `0` for never.",
        "90",
    ),
    ("QUANT_INSPECTOR_WORKERS", "Worker processes kept at once, over all users.", "24"),
    (
        "QUANT_INSPECTOR_WORKER_IDLE_SECONDS",
        "Seconds after which a worker with nothing to do is ended.",
        "600",
    ),
)
_DEFAULTS = {name: default for name, _, default in SETTINGS}
# Of the command line, and of tests.
_OTHERS = frozenset(
    f"QUANT_INSPECTOR_{each}" for each in ("CLUSTER", "THREADS", "MODELS", "CHAOS", "CHAOS_SEED")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How this server is hosted.

    Attributes:
        mode: "local" or "portal".
        data: the folder of everything; None in local mode for the user's cache folder.
        network: whether local mode may answer other machines.
        auth: "" in local mode, else "oidc" or "header".
        header: the name of the header that holds the address; "" without.
        proxy_secret: what has to come with the header; "" where it need not.
        sign_out: the proxy's address for signing out; "" where there is none.
        upload_bytes: the largest upload.
        quota_bytes: what one user may store.
        jobs: jobs of one user at once.
        job_seconds: the longest a job may run.
        job_memory_bytes: what a job may use.
        expiry_days: days after which an unused workspace is removed; 0 for never.
        workers: worker processes at once, over all users.
        worker_idle_seconds: after which a worker without a job is ended.
    """

    mode: str = "local"
    data: Path | None = None
    network: bool = False
    auth: str = ""
    header: str = ""
    proxy_secret: str = field(default="", repr=False)
    sign_out: str = ""
    upload_bytes: int = 4 * 10**9
    quota_bytes: int = 20 * 10**9
    jobs: int = 4
    job_seconds: float = 3600.0
    job_memory_bytes: int = 8 * 10**9
    expiry_days: int = 90
    workers: int = 24
    worker_idle_seconds: float = 600.0

    @property
    def is_portal(self) -> bool:
        """Whether people sign in and have workspaces of their own."""
        return self.mode == "portal"


def read_settings(environ: Mapping[str, str], server_address: str | None) -> Settings:
    """The settings of a server that is about to listen at an address.

    Args:
        environ: variables as in `SETTINGS`; empty ones count as absent.
        server_address: an IP address, a host name, "unix://…"; None or "" for every interface.

    Raises:
        SettingError: a variable cannot be read, local mode would answer other machines, or portal
            mode has no usable identity or no folder.
    """
    given = {name: environ.get(name, "").strip() for name in _DEFAULTS}
    mode = given["QUANT_INSPECTOR_MODE"] or "local"
    if mode not in ("local", "portal"):
        raise SettingError(
            f"QUANT_INSPECTOR_MODE is {mode!r}, expected local or portal",
            hint="Set QUANT_INSPECTOR_MODE=portal to host a team, or unset it.",
        )
    data = given["QUANT_INSPECTOR_DATA"]
    # By field of `Settings`; the types of a mixed dictionary are not known to mypy.
    common = {
        "data": Path(data).expanduser().absolute() if data else None,
        "upload_bytes": _size(given, "QUANT_INSPECTOR_UPLOAD_LIMIT"),
        "quota_bytes": _size(given, "QUANT_INSPECTOR_QUOTA"),
        "jobs": _whole(given, "QUANT_INSPECTOR_JOBS", least=1),
        "job_seconds": float(_whole(given, "QUANT_INSPECTOR_JOB_SECONDS", least=1)),
        "job_memory_bytes": _size(given, "QUANT_INSPECTOR_JOB_MEMORY"),
        "expiry_days": _whole(given, "QUANT_INSPECTOR_EXPIRY_DAYS", least=0),
        "workers": _whole(given, "QUANT_INSPECTOR_WORKERS", least=1),
        "worker_idle_seconds": float(_whole(given, "QUANT_INSPECTOR_WORKER_IDLE_SECONDS", least=1)),
    }
    near = is_near(server_address)
    if mode == "local":
        return Settings(**common, network=_local_network(given, server_address, near))  # type: ignore[arg-type]
    auth, header, secret = _identity(given, server_address, near)
    if not data:
        raise SettingError(
            "QUANT_INSPECTOR_DATA is not set, and portal mode has no other place for workspaces",
            hint="Set QUANT_INSPECTOR_DATA to a folder that is backed up.",
        )
    return Settings(
        **common,  # type: ignore[arg-type]
        mode=mode,
        auth=auth,
        header=header,
        proxy_secret=secret,
        sign_out=_sign_out(given["QUANT_INSPECTOR_SIGN_OUT"], auth),
    )


def check_names(environ: Mapping[str, str]) -> None:
    """Refuses variables that look like settings and are none: what they were to set would not hold.

    Raises:
        SettingError: there is one.
    """
    known = {*_DEFAULTS, *_OTHERS}
    for name in sorted(environ):
        if name.startswith("QUANT_INSPECTOR_") and name not in known:
            close = difflib.get_close_matches(name, _DEFAULTS, 1, 0.8)
            raise SettingError(
                f"{name} is set, which is no setting",
                hint=f"Set {close[0]} instead, or unset it." if close else f"Unset {name}.",
            )


def is_near(address: str | None) -> bool:
    """Whether an address is of this machine alone: loopback or a unix socket."""
    if not address:
        return False
    if address.startswith("unix://") or address.lower() == "localhost":
        return True
    try:
        found = ipaddress.ip_address(address.strip("[]").split("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return bool((mapped or found).is_loopback)


def _local_network(given: Mapping[str, str], address: str | None, near: bool) -> bool:
    network = given["QUANT_INSPECTOR_NETWORK"] or "0"
    if network not in ("0", "1"):
        raise SettingError(
            f"QUANT_INSPECTOR_NETWORK is {network!r}, expected 0 or 1",
            hint="Unset QUANT_INSPECTOR_NETWORK.",
        )
    if given["QUANT_INSPECTOR_AUTH"]:
        # Whoever sets it believes that people have to sign in.
        raise SettingError(
            "QUANT_INSPECTOR_AUTH is set, but local mode has no sign-in",
            hint="Set QUANT_INSPECTOR_MODE=portal as well, or unset QUANT_INSPECTOR_AUTH.",
        )
    if not near and network == "0":
        raise SettingError(
            f"The server address is {address or 'every interface'}, and local mode, which has no "
            "sign-in, only listens on this machine",
            hint="Use --server.address 127.0.0.1, or QUANT_INSPECTOR_MODE=portal with sign-in "
            "(QUANT_INSPECTOR_NETWORK=1 opens the app to everybody who reaches the port).",
        )
    return network == "1"


def _identity(given: Mapping[str, str], address: str | None, near: bool) -> tuple[str, str, str]:
    """How people are known: ("oidc" or "header", the header's name, the proxy's secret)."""
    kind, _, name = given["QUANT_INSPECTOR_AUTH"].partition(":")
    secret = given["QUANT_INSPECTOR_PROXY_SECRET"]
    if kind == "oidc" and not name:
        return kind, "", ""
    if kind != "header" or not name:
        found = given["QUANT_INSPECTOR_AUTH"]
        raise SettingError(
            "Portal mode needs to know who asks: QUANT_INSPECTOR_AUTH is "
            f"{repr(found) if found else 'not set'}, expected oidc or header:NAME",
            hint="Set QUANT_INSPECTOR_AUTH=oidc with an [auth] section in .streamlit/secrets.toml, "
            "or QUANT_INSPECTOR_AUTH=header:X-Forwarded-Email behind a proxy that signs people in.",
        )
    if not _TOKEN.fullmatch(name) or name.lower() in _TAKEN:
        raise SettingError(
            f"QUANT_INSPECTOR_AUTH names the header {name[:80]!r}, which cannot hold an address",
            hint="Set QUANT_INSPECTOR_AUTH=header:X-Forwarded-Email.",
        )
    if secret and (len(secret) < SHORTEST_SECRET or not secret.isascii() or " " in secret):
        raise SettingError(
            f"QUANT_INSPECTOR_PROXY_SECRET has {len(secret)} characters, expected at least "
            f"{SHORTEST_SECRET} of ASCII without spaces",
            hint=f"Make one with {_SECRET_HINT}.",
        )
    if not near and not secret:
        raise SettingError(
            f"The server address is {address or 'every interface'}, so anybody who reaches the "
            f"port could send {name}",
            hint="Use --server.address 127.0.0.1, or set QUANT_INSPECTOR_PROXY_SECRET to what the "
            f"proxy sends in {SECRET_HEADER}.",
        )
    return kind, name, secret


def _sign_out(address: str, auth: str) -> str:
    if not address:
        return ""
    parts = urlsplit(address)
    inside = not parts.scheme and address.startswith("/") and not address.startswith("//")
    if auth != "header" or not (inside or (parts.scheme in ("http", "https") and parts.netloc)):
        raise SettingError(
            f"QUANT_INSPECTOR_SIGN_OUT is {address!r}, expected the address of the proxy that "
            "signs people out, with QUANT_INSPECTOR_AUTH=header:NAME",
            hint="Set QUANT_INSPECTOR_SIGN_OUT=/oauth2/sign_out, for example, or unset it.",
        )
    return address


def _whole(given: Mapping[str, str], name: str, *, least: int) -> int:
    text = given[name] or _DEFAULTS[name]
    if not text.isascii() or not text.isdigit() or len(text) > 12 or int(text) < least:
        raise SettingError(
            f"{name} is {text[:40]!r}, expected a whole number of {least} or more",
            hint=f"Set {name}={_DEFAULTS[name]}, or unset it.",
        )
    return int(text)


def _size(given: Mapping[str, str], name: str) -> int:
    text = given[name] or _DEFAULTS[name]
    found = _SIZE.fullmatch(text)
    size = (
        int(float(found[1]) * _UNITS[(found[2] or "").upper()]) if found and len(text) < 24 else 0
    )
    if size < 1:
        raise SettingError(
            f"{name} is {text[:40]!r}, expected a size such as 500 MB or 4 GB",
            hint=f"Set {name}='{_DEFAULTS[name]}', or unset it.",
        )
    return size


# --------------------------------------------------------------------------------- people


def clean_address(text: str) -> str:
    """The address of a person as it is shown; "" where it cannot be one.

    One word of at most 254 printable characters, without what separates lists; not necessarily
    with an @, as some proxies send names.
    """
    address = unicodedata.normalize("NFC", text.strip())
    if not address or len(address) > LONGEST_ADDRESS or not address.isprintable():
        return ""
    if any(sign.isspace() or sign in ',;<>"\\/' for sign in address):
        return ""
    return address


def user_key(address: str) -> str:
    """The name of a user's folder: 32 hexadecimal digits of the SHA-256 of the address.

    Upper and lower case are the same person.
    """
    return hashlib.sha256(address.lower().encode("utf-8")).hexdigest()[:32]


def workspace_folder(data: Path, key: str) -> Path:
    """The folder of a user's workspace.

    Args:
        data: `Settings.data`.
        key: from `user_key`.

    Raises:
        ValueError: the key is none.
    """
    if not re.fullmatch(r"[0-9a-f]{32}", key):
        raise ValueError("a user's key is 32 hexadecimal digits")
    return data / "users" / key


def without_paths(text: str, data: Path) -> str:
    """The text in which files of any workspace are named without the folders they lie in."""
    end = r"(?!\w|[.-]\w)"
    known = "users|blobs|models|feeds|runs|pairs|cache|temporary|files"
    known += "|(?:upload-)?[0-9a-f][0-9a-f-]{5,63}"
    start = rf"(?<![\w.-]){re.escape(str(data))}"
    return re.sub(rf"{start}(?:/(?:{known})(?=/|{end}))*(?:/|{end})", "", text)
