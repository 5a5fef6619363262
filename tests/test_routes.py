"""Our own routes: Netron's page adapted, its files on a list, held content, places for pictures."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient
from streamlit import config

from inspector.web import routes

SVG_HEAD = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\0" * 17 + b"\0\0\0\0IEND\xaeB`\x82"
NETRON = f"/inspector/netron/{routes.netron_version()}"


def svg(inside: str) -> bytes:
    return f"{SVG_HEAD}{inside}</svg>".encode()


def netron_page() -> str:
    spec = importlib.util.find_spec("netron")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], "index.html").read_text(encoding="utf-8")


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(Starlette(routes=routes.served())) as found:
        yield found


@pytest.fixture(autouse=True)
def _empty_shelves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "_held", routes._Shelves())
    monkeypatch.setattr(routes, "_places", routes._Shelves())


# ------------------------------------------------------------------------------------ Netron's page


def test_the_pane_is_netrons_page_with_our_module_in_the_place_of_its_script() -> None:
    page = netron_page()
    pane = routes.pane_document(page)
    assert '<script type="module" src="bridge.js"></script>' in pane
    assert "index.js" not in pane
    assert 'name="version"' not in pane
    assert 'name="date"' not in pane
    assert re.findall(r"<title>(.*?)</title>", pane) == ["Graph"]
    assert len(page) - len(pane) < 200, "nothing else is changed"


@pytest.mark.parametrize("part", ['src="index.js"', 'name="version"', 'name="date"', "<title>"])
def test_a_page_in_which_a_place_to_change_is_missing_is_refused_by_name(part: str) -> None:
    page = netron_page()
    assert page.count(part) == 1
    with pytest.raises(routes.NetronChanged, match=r"is there 0 times, expected once"):
        routes.pane_document(page.replace(part, 'name="other"'))


def test_a_page_with_two_scripts_of_the_name_is_refused() -> None:
    script = '<script type="text/javascript" src="index.js"></script>'
    with pytest.raises(routes.NetronChanged, match=r"the script index\.js is there 2 times"):
        routes.pane_document(netron_page().replace(script, script * 2))


def test_a_changed_page_is_answered_with_what_is_missing(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "_own_pane", lambda: routes.pane_document("<html></html>"))
    answer = client.get(f"{NETRON}/pane.html")
    assert answer.status_code == 500
    assert "the script index.js is there 0 times" in answer.text


def test_the_pane_document_has_a_strict_policy(client: TestClient) -> None:
    answer = client.get(routes.pane_address())
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    rules = dict(
        part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
    )
    assert rules == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self' 'unsafe-inline'",
        "img-src": "'self' data: blob:",
        "connect-src": "'self'",
        "worker-src": "'self'",
        "frame-ancestors": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("view.js", "text/javascript"),
        ("grapher.css", "text/css"),
        ("onnx-metadata.json", "application/json"),
        ("icon.png", "image/png"),
    ],
)
def test_netrons_files_are_served_unchanged_and_kept_by_the_browser(
    client: TestClient, name: str, kind: str
) -> None:
    answer = client.get(f"{NETRON}/{name}?version=1")
    spec = importlib.util.find_spec("netron")
    assert spec is not None
    assert spec.submodule_search_locations
    assert answer.content == Path(spec.submodule_search_locations[0], name).read_bytes()
    assert answer.headers["content-type"].startswith(kind)
    assert "immutable" in answer.headers["cache-control"]
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_our_module_is_served_fresh(client: TestClient) -> None:
    answer = client.get(f"{NETRON}/bridge.js")
    assert answer.content == routes.BRIDGE.read_bytes()
    assert answer.headers["content-type"].startswith("text/javascript")
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "address",
    [
        f"{NETRON}/index.js",
        f"{NETRON}/index.html",
        f"{NETRON}/__init__.py",
        f"{NETRON}/server.py",
        f"{NETRON}/nowhere.js",
        f"{NETRON}/..%2f__init__.py",
        f"{NETRON}/%2e%2e/%2e%2e/onnx/__init__.py",
        f"{NETRON}/..%5cserver.py",
        f"{NETRON}/view.js%00",
        f"{NETRON}/%2fetc%2fpasswd",
        f"{NETRON}/",
        "/inspector/netron/0.0.0/view.js",
        "/inspector/netron/view.js",
        "/inspector/held/",
        "/inspector/held/abc",
        "/inspector/held/..%2f..%2fapp.py",
    ],
)
def test_anything_else_is_not_found_without_detail(client: TestClient, address: str) -> None:
    answer = client.get(address)
    assert answer.status_code == 404
    assert answer.text in ("Not found", "Not Found")


# ------------------------------------------------------------------------------------ held content


def test_offered_bytes_come_back_with_their_type_and_no_right_to_run(client: TestClient) -> None:
    address = routes.offer(b'{"a": 1}', "application/json", "run-1")
    assert re.fullmatch(r"/inspector/held/[\w-]{43}", address)
    answer = client.get(address)
    assert answer.content == b'{"a": 1}'
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert "sandbox" in answer.headers["content-security-policy"]
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_the_same_key_and_content_have_the_same_address_others_do_not() -> None:
    first = routes.offer(b"x", "text/plain", "a")
    assert routes.offer(b"x", "text/plain", "a") == first
    others = {
        routes.offer(b"y", "text/plain", "a"),
        routes.offer(b"x", "text/plain", "b"),
        routes.offer(b"x", "text/html", "a"),
    }
    assert len(others | {first}) == 4


def test_an_offered_file_is_read_when_it_is_asked_for_and_told_by_its_change(
    client: TestClient, tmp_path: Path
) -> None:
    path = tmp_path / "float.onnx"
    path.write_bytes(b"one")
    first = routes.offer(path, "application/octet-stream", "run")
    assert client.get(first).content == b"one"
    assert routes.offer(path, "application/octet-stream", "run") == first
    path.write_bytes(b"longer")
    second = routes.offer(path, "application/octet-stream", "run")
    assert second != first
    assert client.get(second).content == b"longer"
    path.unlink()
    assert client.get(second).status_code == 404
    with pytest.raises(FileNotFoundError):
        routes.offer(path, "application/octet-stream", "run")


def test_the_least_recently_used_is_forgotten_first(client: TestClient) -> None:
    kept = routes.offer(b"kept", "text/plain", "k")
    lost = routes.offer(b"lost", "text/plain", "l")
    for number in range(routes.KEPT - 1):
        assert client.get(kept).status_code == 200
        routes.offer(b"%d" % number, "text/plain", "n")
    assert client.get(kept).status_code == 200
    assert client.get(lost).status_code == 404
    assert routes.offer(b"lost", "text/plain", "l") != lost


def test_what_nobody_used_for_twelve_hours_is_forgotten() -> None:
    now = [0.0]
    shelf: routes._Shelf[str] = routes._Shelf(lambda: now[0])
    used, unused = shelf.put("used", "u"), shelf.put("unused", "n")
    now[0] = 11 * 3600.0
    assert shelf.get(used) == "u"
    now[0] = 13 * 3600.0
    assert shelf.get(used) == "u"
    assert shelf.get(unused) is None
    assert shelf.put("unused", "n") != unused


def test_a_file_to_save_comes_in_pieces_under_its_name(client: TestClient, tmp_path: Path) -> None:
    path, content = tmp_path / "m.onnx", bytes(range(256)) * 1000
    path.write_bytes(content)
    name = 'a"b\r\nX: y/модель\ud800.onnx'
    for offered in (path, content):
        address = routes.offer(offered, "application/octet-stream", "run", file_name=name)
        answer = client.get(address)
        assert answer.content == content
        assert answer.headers["content-disposition"] == (
            "attachment; filename*=utf-8''a%22b%0D%0AX%3A%20y%2F"
            "%D0%BC%D0%BE%D0%B4%D0%B5%D0%BB%D1%8C%3F.onnx"
        )
        assert "x" not in answer.headers
        shown = routes.offer(offered, "application/octet-stream", "run")
        assert shown != address
        assert "content-disposition" not in client.get(shown).headers
    part = client.get(
        routes.offer(path, "application/octet-stream", "run", file_name=name),
        headers={"Range": "bytes=256-511"},
    )
    assert (part.status_code, part.content) == (206, content[256:512])


def test_only_get_reaches_held_content(client: TestClient) -> None:
    address = routes.offer(b"x", "text/plain", "a")
    for method in ("POST", "PUT", "DELETE"):
        assert client.request(method, address).status_code == 405


def test_the_base_path_of_the_server_stands_before_every_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = config.get_option
    monkeypatch.setattr(
        routes.config,
        "get_option",
        lambda key: "/tools/qi/" if key == "server.baseUrlPath" else plain(key),
    )
    address = routes.offer(b"x", "text/plain", "a")
    assert address.startswith("/tools/qi/inspector/held/")
    with TestClient(Starlette(routes=routes.served())) as client:
        assert client.get(address).content == b"x"
        assert client.get(routes.pane_address()).status_code == 200
        assert client.get("/inspector" + address.split("/inspector")[1]).status_code == 404


# ---------------------------------------------------------------------------------------- pictures


def test_a_place_takes_one_picture_and_then_has_a_new_address(
    client: TestClient, tmp_path: Path
) -> None:
    target = tmp_path / "graph" / "float.svg"
    address = routes.accept("run", target, 1000)
    assert routes.accept("run", target, 1000) == address
    picture = svg('<g id="n" style="fill: #fff"><title>&lt;b&gt;</title></g>')
    answer = client.put(address, content=picture, headers={"Content-Type": "image/svg+xml"})
    assert answer.status_code == 204
    assert target.read_bytes() == picture
    assert [path.name for path in target.parent.iterdir()] == ["float.svg"]
    again = client.put(address, content=picture, headers={"Content-Type": "image/svg+xml"})
    assert again.status_code == 404
    assert routes.accept("run", target, 1000) != address


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (svg("<g/>"), "image/png", 422),
        (PNG, "image/svg+xml", 422),
        (b"GIF89a", "image/png", 422),
        (PNG[:-4], "image/png", 422),
        (b"", "image/svg+xml", 422),
        (svg("<script/>"), "image/svg+xml", 422),
        (svg("<g/>"), "text/html", 415),
        (svg("<g/>"), "", 415),
        (svg("<g/>" * 300), "image/svg+xml", 413),
    ],
)
def test_a_refused_picture_writes_nothing_and_leaves_the_place_in_use(
    client: TestClient, tmp_path: Path, content: bytes, kind: str, status: int
) -> None:
    target = tmp_path / "picture"
    address = routes.accept("run", target, 1000)
    answer = client.put(address, content=content, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert list(tmp_path.iterdir()) == []
    assert routes.accept("run", target, 1000) == address
    good = client.put(address, content=PNG, headers={"Content-Type": "image/png"})
    assert good.status_code == 204
    assert target.read_bytes() == PNG


def test_a_place_for_svg_alone_takes_no_png(client: TestClient, tmp_path: Path) -> None:
    address = routes.accept("run", tmp_path / "p.svg", 1000, [routes.SVG])
    answer = client.put(address, content=PNG, headers={"Content-Type": "image/png"})
    assert answer.status_code == 415


def test_a_picture_that_cannot_be_written_says_so_without_a_path(
    client: TestClient, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    address = routes.accept("run", blocked / "p.png", 1000)
    answer = client.put(address, content=PNG, headers={"Content-Type": "image/png"})
    assert answer.status_code == 507
    assert str(tmp_path) not in answer.text


@pytest.mark.parametrize("kinds", [[], ["text/html"], [routes.SVG, "image/gif"]])
def test_a_place_for_anything_but_the_two_kinds_is_refused(
    tmp_path: Path, kinds: list[str]
) -> None:
    with pytest.raises(ValueError, match="media types"):
        routes.accept("run", tmp_path / "p", 1, kinds)


@pytest.mark.parametrize(
    "inside",
    [
        "<script>alert(1)</script>",
        "<SCRIPT/>",
        "<foreignObject><p/></foreignObject>",
        '<p xmlns="http://www.w3.org/1999/xhtml"/>',
        '<script xmlns="http://www.w3.org/1999/xhtml"/>',
        '<g onclick="alert(1)"/>',
        '<g ONLOAD="alert(1)"/>',
        '<image href="#a"/>',
        '<a href="#a"/>',
        '<use href="#a"/>',
        '<animate attributeName="href" to="javascript:alert(1)"/>',
        '<set attributeName="onclick" to="alert(1)"/>',
        "<style>@import url(http://evil.example/x)</style>",
        '<linearGradient href="http://evil.example/#a"/>',
        '<linearGradient xlink:href="data:image/svg+xml,x#a"/>',
        '<g style="fill: url(http://evil.example/#a)"/>',
        "<g style='fill: URL( \"//evil.example/#a\" )'/>",
        '<g style="fill: u\\72l(http://evil.example/#a)"/>',
        '<g fill="url(data:x)"/>',
        '<g style="cursor: image-set(&quot;//evil.example&quot; 1x)"/>',
        '<g xml:base="http://evil.example/"/>',
        "<svg/>",
        "<?xml-stylesheet href='http://evil.example/x.css'?>",
        "<g>",
        "&nbsp;",
    ],
)
def test_an_svg_that_could_run_or_reach_out_is_refused(inside: str) -> None:
    assert routes.picture_problem(svg(inside), routes.SVG) != ""


@pytest.mark.parametrize(
    "whole",
    [
        b'<!DOCTYPE svg [<!ENTITY a "b">]>' + svg("&a;"),
        b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://evil.example/x.dtd">' + svg(""),
        b'<g xmlns="http://www.w3.org/2000/svg"/>',
        b"<svg/>",
        b"<html><body/></html>",
        b"plain",
        svg("").decode().encode("utf-16"),
        svg("\xff").decode("utf-8").encode("latin-1"),
    ],
)
def test_what_is_no_svg_as_a_whole_is_refused(whole: bytes) -> None:
    assert routes.picture_problem(whole, routes.SVG) != ""


@pytest.mark.parametrize(
    "inside",
    [
        "",
        '<defs><marker id="a"><path d="M 0 0"/></marker></defs>',
        '<path style="marker-end: url(&quot;#a&quot;); font-family: &quot;Segoe UI&quot;"/>',
        '<path marker-end="url(#a)"/>',
        "<linearGradient href='#a'/>",
        '<g id="node-name-&lt;img src=x onerror=alert(1)&gt;"><text>url(http://x) \\</text></g>',
        '<g id="node-name-url(javascript:x)\\"/>',
        '<text xml:space="preserve">&lt;script&gt;</text>',
    ],
)
def test_a_harmless_svg_is_taken(inside: str) -> None:
    assert routes.picture_problem(svg(inside), routes.SVG) == ""


def test_the_package_carries_the_files_of_the_components() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    web = tomllib.loads(text)["tool"]["setuptools"]["package-data"]["inspector.web"]
    assert web == ["graph/*.js", "graph/*.css", "upload/*.js", "upload/*.css"]
    for folder, names in (
        ("graph", ("bridge.js", "panes.js", "panes.css")),
        ("upload", ("field.js", "field.css")),
    ):
        for name in names:
            assert (routes.BRIDGE.parents[1] / folder / name).is_file()
