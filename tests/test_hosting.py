"""A server's settings: what is read, what is refused with which hint, folders and addresses."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inspector import hosting
from inspector.errors import SettingError
from inspector.hosting import (
    LONGEST_ADDRESS,
    SETTINGS,
    Settings,
    clean_address,
    is_near,
    read_settings,
    user_key,
    without_paths,
    workspace_folder,
)

LOOPBACK = "127.0.0.1"
SECRET = "a-secret-of-the-proxy"
HEADER = "header:X-Forwarded-Email"
PORTAL = {"QUANT_INSPECTOR_MODE": "portal", "QUANT_INSPECTOR_DATA": "/srv/quant"}


def portal(address: str | None = LOOPBACK, **more: str) -> Settings:
    named = {f"QUANT_INSPECTOR_{name}": value for name, value in more.items()}
    return read_settings({**PORTAL, **named}, address)


def refused(environ: dict[str, str], address: str | None = LOOPBACK) -> SettingError:
    with pytest.raises(SettingError) as caught:
        read_settings(environ, address)
    return caught.value


def test_without_any_variable_the_app_is_local_with_the_documented_defaults() -> None:
    found = read_settings({}, LOOPBACK)
    assert found == Settings()
    assert not found.is_portal
    assert found.data is None
    assert found.upload_bytes == 4_000_000_000


def test_variables_that_are_empty_count_as_absent() -> None:
    assert read_settings({name: " " for name, _, _ in SETTINGS}, LOOPBACK) == Settings()


def test_every_field_has_a_variable_and_every_default_can_be_read_back() -> None:
    documented = {name: default for name, _, default in SETTINGS if default and "'" not in default}
    assert read_settings(documented, LOOPBACK) == Settings()
    assert len(SETTINGS) == len(fields(Settings)) - 1, "auth and header are one variable"


@pytest.mark.parametrize("address", [LOOPBACK, "localhost", "::1", "127.8.9.10", "unix:///run/q"])
def test_local_mode_listens_on_this_machine(address: str) -> None:
    assert is_near(address)
    assert read_settings({}, address).mode == "local"


@pytest.mark.parametrize("address", [None, "", "0.0.0.0", "::", "10.0.0.7", "inspector.example"])
def test_local_mode_refuses_to_listen_further_unless_it_is_told_to(address: str | None) -> None:
    assert not is_near(address)
    error = refused({}, address)
    assert "only listens on this machine" in error.message
    assert "--server.address 127.0.0.1" in error.hint
    assert read_settings({"QUANT_INSPECTOR_NETWORK": "1"}, address).network


def test_an_address_that_only_looks_like_loopback_is_not() -> None:
    for address in ("127.0.0.1.example.org", "localhost.example.org", "0.0.0.0", "::ffff:10.0.0.1"):
        assert not is_near(address)
    assert is_near("::ffff:127.0.0.1")


def test_local_mode_refuses_a_sign_in_that_it_would_ignore() -> None:
    error = refused({"QUANT_INSPECTOR_AUTH": "oidc"})
    assert error.message == "QUANT_INSPECTOR_AUTH is set, but local mode has no sign-in"
    assert "QUANT_INSPECTOR_MODE=portal" in error.hint


@pytest.mark.parametrize("mode", ["Portal", "team", "portal local"])
def test_a_mode_that_is_none_is_refused(mode: str) -> None:
    assert f"is {mode!r}" in refused({"QUANT_INSPECTOR_MODE": mode}).message


@pytest.mark.parametrize(
    "auth", ["", "none", "oidc:google", "OIDC", "header", "header:", "basic", "X-Forwarded-Email"]
)
def test_portal_mode_without_a_usable_identity_is_refused_with_both_ways(auth: str) -> None:
    error = refused({**PORTAL, "QUANT_INSPECTOR_AUTH": auth})
    assert "needs to know who asks" in error.message
    assert "QUANT_INSPECTOR_AUTH=oidc" in error.hint
    assert "header:X-Forwarded-Email" in error.hint
    assert "\n" not in error.message + error.hint


@pytest.mark.parametrize(
    "name",
    ["Cookie", "host", "X Email", "X-Email:", "X-Émail", "X-Quant-Inspector-Secret", "a" * 65],
)
def test_a_header_that_cannot_hold_an_address_is_refused(name: str) -> None:
    error = refused({**PORTAL, "QUANT_INSPECTOR_AUTH": f"header:{name}"})
    assert "cannot hold an address" in error.message


def test_portal_mode_without_a_folder_is_refused() -> None:
    error = refused({"QUANT_INSPECTOR_MODE": "portal", "QUANT_INSPECTOR_AUTH": HEADER})
    assert "QUANT_INSPECTOR_DATA is not set" in error.message


def test_a_header_beyond_loopback_needs_the_secret() -> None:
    error = refused({**PORTAL, "QUANT_INSPECTOR_AUTH": HEADER}, "0.0.0.0")
    assert "anybody who reaches the port could send X-Forwarded-Email" in error.message
    found = portal("0.0.0.0", AUTH=HEADER, PROXY_SECRET=SECRET)
    assert (found.auth, found.header, found.proxy_secret) == ("header", "X-Forwarded-Email", SECRET)
    assert portal("unix:///run/quant.sock", AUTH=HEADER).proxy_secret == ""


@pytest.mark.parametrize(
    "secret", ["short", "fifteen-letters", "with a space in it", "sécrèt-of-16-let"]
)
def test_a_secret_that_is_weak_or_cannot_be_a_header_is_refused_unseen(secret: str) -> None:
    error = refused(
        {**PORTAL, "QUANT_INSPECTOR_AUTH": HEADER, "QUANT_INSPECTOR_PROXY_SECRET": secret}
    )
    assert "at least 16" in error.message
    assert secret not in error.message + error.hint


def test_the_secret_is_not_in_the_text_of_the_settings() -> None:
    assert SECRET not in repr(portal(AUTH=HEADER, PROXY_SECRET=SECRET))


def test_oidc_needs_no_secret_of_a_proxy_on_any_address() -> None:
    found = portal("0.0.0.0", AUTH="oidc")
    assert found.is_portal
    assert (found.auth, found.header, found.data) == ("oidc", "", Path("/srv/quant"))


@pytest.mark.parametrize("address", ["//evil.example", "javascript:alert(1)", "sign_out", "https:"])
def test_a_sign_out_that_is_no_address_is_refused(address: str) -> None:
    error = refused({**PORTAL, "QUANT_INSPECTOR_AUTH": HEADER, "QUANT_INSPECTOR_SIGN_OUT": address})
    assert "QUANT_INSPECTOR_SIGN_OUT" in error.message
    assert portal(AUTH=HEADER, SIGN_OUT="/oauth2/sign_out").sign_out == "/oauth2/sign_out"


@pytest.mark.parametrize(
    ("text", "size"),
    [("500 MB", 500 * 10**6), ("1.5GB", 1_500_000_000), ("2t", 2 * 10**12), ("1024 B", 1024)],
)
def test_sizes_are_read_with_their_unit(text: str, size: int) -> None:
    assert portal(AUTH="oidc", QUOTA=text).quota_bytes == size


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("UPLOAD_LIMIT", each) for each in ("0 B", "-1", "lots", "4 GiB", "1e9", "20", "9" * 30)),
        *(("JOBS", each) for each in ("0", "-1", "2.5", "many", "٣")),
        ("EXPIRY_DAYS", "-3"),
        ("WORKERS", "0"),
        ("NETWORK", "yes"),
    ],
)
def test_a_limit_that_cannot_be_read_is_named_with_its_default(name: str, text: str) -> None:
    error = refused({f"QUANT_INSPECTOR_{name}": text})
    assert f"QUANT_INSPECTOR_{name}" in error.message
    assert f"QUANT_INSPECTOR_{name}" in error.hint
    assert portal(AUTH="oidc", EXPIRY_DAYS="0").expiry_days == 0


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("QUANT_INSPECTOR_UPLOADLIMIT", "QUANT_INSPECTOR_UPLOAD_LIMIT"),
        ("QUANT_INSPECTOR_PROXYSECRET", "QUANT_INSPECTOR_PROXY_SECRET"),
        ("QUANT_INSPECTOR_XYZZY", ""),
    ],
)
def test_a_variable_that_is_no_setting_is_refused_with_the_one_that_was_meant(
    name: str, meant: str
) -> None:
    with pytest.raises(SettingError) as refused:
        hosting.check_names({"PATH": "/bin", "QUANT_INSPECTOR_MODE": "portal", name: "1"})
    assert name in refused.value.message
    assert refused.value.hint.startswith(f"Set {meant} instead" if meant else f"Unset {name}")
    hosting.check_names({each: "1" for each, _, _ in hosting.SETTINGS})


# ------------------------------------------------------------------------------------- people


def test_upper_and_lower_case_are_one_person() -> None:
    assert user_key("Ada@Example.org") == user_key("ada@example.org")
    assert user_key("ada@example.org") != user_key("ada@example.com")


@given(st.text())
def test_whatever_the_address_its_folder_lies_directly_in_users(address: str) -> None:
    try:
        key = user_key(address)
    except UnicodeEncodeError:  # half a surrogate pair is no text
        return
    folder = workspace_folder(Path("/srv/quant"), key)
    assert folder.parent == Path("/srv/quant/users")
    assert re.fullmatch(r"[0-9a-f]{32}", folder.name)


@pytest.mark.parametrize("key", ["", "..", "../" * 11, "A" * 32, "0" * 31, "0" * 32 + "\n"])
def test_a_folder_is_only_of_a_key(key: str) -> None:
    with pytest.raises(ValueError, match="32 hexadecimal digits"):
        workspace_folder(Path("/srv/quant"), key)


@pytest.mark.parametrize(
    "text", ["ada@example.org", " ada@example.org ", "Ada.L+x@example.org", "ada"]
)
def test_an_address_is_one_word(text: str) -> None:
    assert clean_address(text) == text.strip()


@pytest.mark.parametrize(
    "text",
    ["", " ", "a b@example.org", "a@x.org,b@x.org", "a\n@x.org", "a\0@x.org", "<a@x.org>", "../a"],
)
def test_what_cannot_be_an_address_is_nobody(text: str) -> None:
    assert clean_address(text) == ""
    assert clean_address("a" * (LONGEST_ADDRESS + 1)) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot read /srv/q/users/{k}/models/{s}/m.onnx: damaged", "cannot read m.onnx: damaged"),
        ("'/srv/q/users/{k}/feeds/{s}/a b.npz'", "'a b.npz'"),
        ("/srv/q/blobs/{s} is gone", " is gone"),
        ("in /srv/q/users/{k}/temporary.", "in ."),
        ("in /srv/q", "in "),
        ("/srv/quantity stays, and /srv stays", "/srv/quantity stays, and /srv stays"),
        ("the node /model/srv/q/Conv", "the node /model/srv/q/Conv"),
    ],
)
def test_a_text_names_files_without_the_servers_folders(text: str, shown: str) -> None:
    text = text.format(k="0" * 32, s="ab" * 32)
    assert without_paths(text, Path("/srv/q")) == shown
