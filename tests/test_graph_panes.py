"""The graph panes in a real browser: drawing, colours, marks, selection, keys, export, refusals."""

from __future__ import annotations

import io
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from PIL import Image
from playwright.sync_api import Browser, FrameLocator, Locator, Page, Route, expect

from inspector.error_scale import ERROR_COLORS, ERROR_STEPS, NO_FIGURE_COLOR
from inspector.web import routes
from tests.graph_page import (
    HELPERS,
    HOSTILE,
    IN_BODY,
    MEASURES,
    QUOTED,
    SIDES,
    events,
    running_graph_app,
    small_pair,
    write_look,
    write_pair,
    write_real,
)
from tests.samples import MODELS, needs_models

PATIENCE = 60_000

pytestmark = pytest.mark.browser


class App(NamedTuple):
    """A running app, and the folder of the pairs it shows."""

    address: str
    root: Path


class Graph:
    """The page as a test sees it: both panes, and everything that went wrong or out."""

    def __init__(self, page: Page, app: App, pair: str) -> None:
        self.page = page
        self.app = app
        self.pair = pair
        self.folder = app.root / pair
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.policies: dict[str, str] = {}
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: (self.errors.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("response", self._response)

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} {message.location}")

    def _response(self, response: Any) -> None:
        if "/inspector/" in response.url:
            policy = response.headers.get("content-security-policy", "")
            self.policies[response.url] = policy

    def open(self, *, ready: bool = True) -> Graph:
        self.page.goto(f"{self.app.address}/?pair={quote(self.pair)}")
        if ready:
            self.ready()
        return self

    def ready(self) -> None:
        for side in SIDES:
            drawn = self.page.locator(f".pane.{side}[data-painted]")
            expect(drawn).to_be_visible(timeout=PATIENCE)
            expect(self.page.locator(f".pane.{side} .cover.gone")).to_have_count(1)

    def frame(self, side: str) -> FrameLocator:
        return self.page.frame_locator(f'iframe[title="{side} graph"]')

    def node(self, side: str, name: str) -> Locator:
        return self.frame(side).locator(f"g.node[id={css(f'node-name-{name}')}]")

    def header(self, side: str, name: str) -> Locator:
        return self.node(side, name).locator("> .node-item-type").first

    def selected(self, side: str) -> Locator:
        return self.frame(side).locator("g.node.select")

    def look(self, **changes: Any) -> None:
        """Shows something else: the page runs again, the panes stay."""
        write_look(self.folder, **changes)
        self.page.get_by_role("button", name="Rerun").click()

    def heard(self, name: str, wanted: Any) -> None:
        """Waits until the page's script got this from the browser."""
        deadline = time.monotonic() + 20
        while wanted not in events(self.folder, name):
            assert time.monotonic() < deadline, events(self.folder, name)
            self.page.wait_for_timeout(20)

    def tool(self, side: str, name: str) -> Locator:
        return self.page.locator(f".pane.{side}").get_by_role("button", name=name)

    def fills(self, side: str) -> dict[str, str]:
        """The colours of all headers that are drawn, by node; asked for on the page, because
        Netron takes `eval` from its own document."""
        found: dict[str, str] = self.page.evaluate(
            """side => {
              const roots = [...document.querySelectorAll('*')].map(each => each.shadowRoot);
              const frame = roots.map(
                root => root && root.querySelector(`iframe[title="${side} graph"]`)
              ).find(each => each);
              const nodes = frame.contentDocument.querySelectorAll('g.graph-node');
              return Object.fromEntries([...nodes].map(each => [
                each.id.replace(/^node-name-/, ''),
                frame.contentWindow.getComputedStyle(
                  each.querySelector(':scope > .node-item-type > path')).fill,
              ]));
            }""",
            side,
        )
        return found

    def off_origin(self) -> list[str]:
        own = urlsplit(self.app.address).netloc
        return [
            url
            for url in self.requests
            if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).netloc != own
        ]


def css(text: str) -> str:
    """The text as a string in a selector."""
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def rgb(color: str) -> str:
    return "rgb({}, {}, {})".format(*(int(color[at : at + 2], 16) for at in (1, 3, 5)))


def expected_color(figure: float | str | None) -> str:
    """The colour of a figure in dB by its own oracle: where it lies among the sorted steps."""
    if figure is None:
        return NO_FIGURE_COLOR
    value = float(figure)
    if math.isnan(value):
        return ERROR_COLORS[0]
    return ERROR_COLORS[int(np.searchsorted(ERROR_STEPS, value, side="right"))]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    root = tmp_path_factory.mktemp("graph")
    with running_graph_app(root) as address:
        yield App(address, root)


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    try:
        yield context.new_page()
    finally:
        context.close()


@pytest.fixture
def small(page: Page, app: App, request: pytest.FixtureRequest) -> Graph:
    """The small pair, under a name of its own, not opened yet."""
    pair = re.sub(r"\W", "-", request.node.name)
    write_pair(app.root / pair, *small_pair())
    return Graph(page, app, pair)


@pytest.fixture
def real(page: Page, app: App) -> Callable[[str], Graph]:
    def make(name: str) -> Graph:
        folder = app.root / name
        if not folder.exists():
            write_real(folder, MODELS / name)
        return Graph(page, app, name)

    return make


def figures(graph: Graph, side: str) -> dict[str, dict[str, Any]]:
    sheet = json.loads((graph.folder / "sheet.json").read_text())
    found: dict[str, dict[str, Any]] = sheet["sides"][side]
    return found


# ------------------------------------------------------------------------------- drawing and colour


def test_both_graphs_are_drawn_from_this_origin_alone_under_a_strict_policy(small: Graph) -> None:
    small.open()
    for side in SIDES:
        nodes = figures(small, side)
        expect(small.page.locator(f".pane.{side} .count")).to_have_text(f"{len(nodes)} nodes")
        expect(small.header(side, "fourth").locator("text")).to_have_text("Sigmoid")
    assert small.off_origin() == []
    assert small.errors == []
    assert any(url.endswith("/worker.js") for url in small.policies)
    for url, policy in small.policies.items():
        assert policy.startswith("default-src 'none'"), url
    assert small.page.context.cookies() == [] or all(
        cookie["name"].startswith("_streamlit") for cookie in small.page.context.cookies()
    )
    for side in SIDES:
        for hidden in ("#menu-button", "#open-file-button", "#logo", "#sidebar-model-button"):
            expect(small.frame(side).locator(hidden)).to_be_hidden()


@pytest.mark.slow
def test_every_node_has_the_colour_of_its_figure(small: Graph) -> None:
    small.open()
    seen = set()
    for side in SIDES:
        for name, about in figures(small, side).items():
            if name.startswith("inner"):
                continue
            color = expected_color(about["figures"].get("accumulated"))
            seen.add(color)
            header = small.header(side, name)
            expect(header.locator("path")).to_have_css("fill", rgb(color))
            if color in ERROR_COLORS:
                text = MEASURES[0]["texts"][ERROR_COLORS.index(color)]
                wanted = "rgb(255, 255, 255)" if text == "#fff" else "rgb(0, 0, 0)"
                expect(header.locator("text")).to_have_css("fill", wanted)
    assert len(seen) >= 5, "the sample has figures of many kinds"


@pytest.mark.slow
def test_a_lower_is_better_measure_is_coloured_worst_first_and_shown_in_percent(
    small: Graph,
) -> None:
    small.open()
    small.look(measure="saturated")
    expect(small.page.locator(".scale .swatch")).to_have_text(
        ["≥ 10", "1–10", "0.1–1", "0.01–0.1", "< 0.01"]
    )
    steps = MEASURES[1]["steps"]
    for side in SIDES:
        for name, about in figures(small, side).items():
            if name.startswith("inner") or "saturated" not in about["figures"]:
                continue
            reached = int(np.searchsorted(steps, about["figures"]["saturated"], side="right"))
            color = ERROR_COLORS[4 - reached]
            expect(small.header(side, name).locator("path")).to_have_css("fill", rgb(color))


@pytest.mark.slow
def test_the_legend_says_what_the_colours_are(small: Graph) -> None:
    write_look(small.folder, threshold=30)
    small.open()
    legend = small.page.locator(".legend")
    expect(legend.locator(".title")).to_have_text("Accumulated error, dB")
    expect(legend.locator(".direction")).to_have_text("higher is better")
    expect(legend.locator(".scale .swatch")).to_have_text(
        ["< 10", "10–20", "20–30", "30–40", "≥ 40"]
    )
    colors = [
        legend.locator(".scale .swatch")
        .nth(at)
        .evaluate("e => getComputedStyle(e).backgroundColor")
        for at in range(5)
    ]
    assert colors == [rgb(color) for color in ERROR_COLORS]
    expect(legend.locator(".calm")).to_have_text("> 30: not coloured")
    # The marks that stand on some node, and no others.
    for word in ("float again", "still wrapped", "no partner"):
        expect(legend).to_contain_text(word)
    for word in ("to leave in float", "a part is worse", "preview"):
        expect(legend).not_to_contain_text(word)
    small.look(excluded=["fourth"])
    expect(legend).to_contain_text("to leave in float")


@pytest.mark.slow
def test_figures_better_than_the_threshold_stay_uncoloured(small: Graph) -> None:
    small.open()
    small.look(threshold=21)
    for side in SIDES:
        for name, about in figures(small, side).items():
            figure = about["figures"].get("accumulated")
            if name.startswith("inner") or figure is None:
                continue
            calm = float(figure) > 21
            color = "rgb(255, 255, 255)" if calm else rgb(expected_color(figure))
            expect(small.header(side, name).locator("path")).to_have_css("fill", color)


@pytest.mark.slow
def test_marks_are_outlines_and_badges_beside_the_colour(small: Graph) -> None:
    small.open()
    small.look(excluded=["fourth"], changed={"fifth": {"accumulated": 12}})
    dashed = small.node("float", "fourth").locator("> .qi-marks > rect.qi-excluded")
    expect(dashed).to_have_css("stroke", "rgb(124, 58, 237)")
    expect(dashed).to_have_css("stroke-dasharray", "8px, 4px")
    twin = small.node("quantized", "fourth").locator("> .qi-marks > rect.qi-excluded")
    expect(twin).to_have_count(1)
    expect(small.frame("quantized").locator("rect.qi-excluded")).to_have_count(1)
    for side in SIDES:
        marked = dict.fromkeys(("unmatched", "float again", "still wrapped"), 0)
        for name, about in figures(small, side).items():
            for mark in about["marks"] if not name.startswith("inner") else []:
                marked[mark] += 1
        frame = small.frame(side)
        for mark, count in marked.items():
            outlines = frame.locator(f"rect.qi-{mark.replace(' ', '-')}")
            expect(outlines).to_have_count(count)
        expect(frame.locator(".qi-badge text", has_text="?")).to_have_count(marked["unmatched"])
        expect(frame.locator(".qi-badge text", has_text="▲")).to_have_count(marked["still wrapped"])
    assert any(about["marks"] for about in figures(small, "quantized").values())
    expect(small.header("float", "fifth").locator("path")).to_have_css("fill", rgb(ERROR_COLORS[1]))
    for side in SIDES:
        expect(small.node(side, "fifth").locator("> .qi-marks .qi-preview")).to_have_count(1)
    title = small.header("float", "fifth").locator("title")
    expect(title).to_contain_text("Preview: Accumulated error 12 dB")
    small.look()
    expect(small.frame("float").locator(".qi-preview, .qi-excluded")).to_have_count(0)


# ------------------------------------------------------------------------------ selection and keys


@pytest.mark.slow
def test_a_click_selects_the_node_and_its_partners_both_ways_and_opens_nothing(
    small: Graph,
) -> None:
    small.open()
    small.header("float", "fourth").click()
    expect(small.selected("float")).to_have_count(1)
    expect(small.node("float", "fourth")).to_have_class(re.compile(r"\bselect\b"))
    # The node, and the Q and DQ that serve its output.
    expect(small.selected("quantized")).to_have_count(3)
    expect(small.node("quantized", "fourth")).to_have_class(re.compile(r"\bselect\b"))
    small.heard("selected", {"side": "float", "name": "fourth", "names": ["fourth"]})
    small.header("quantized", "t2_DQ").click()
    expect(small.selected("quantized")).to_have_count(1)
    expect(small.node("float", HOSTILE)).to_have_class(re.compile(r"\bselect\b"))
    expect(small.selected("float")).to_have_count(1)
    small.heard("selected", {"side": "quantized", "name": "t2_DQ", "names": ["t2_DQ"]})
    for side in SIDES:
        expect(small.frame(side).locator("#sidebar")).to_have_css("opacity", "0")


@pytest.mark.slow
def test_an_old_answer_does_not_undo_a_newer_click(small: Graph) -> None:
    small.open()
    small.header("float", "first").click()
    small.heard("selected", {"side": "float", "name": "first", "names": ["first"]})
    small.header("float", "fifth").click()
    small.heard("selected", {"side": "float", "name": "fifth", "names": ["fifth"]})
    small.look(selected={"side": "float", "name": "first"}, measure="saturated")
    expect(small.page.locator(".title")).to_have_text("Saturated share, %")
    expect(small.node("float", "fifth")).to_have_class(re.compile(r"\bselect\b"))
    small.look(selected={"side": "float", "name": "last"})
    expect(small.node("float", "last")).to_have_class(re.compile(r"\bselect\b"))
    expect(small.selected("float")).to_have_count(1)
    small.look(selected=None)
    expect(small.selected("float")).to_have_count(0)
    expect(small.selected("quantized")).to_have_count(0)


@pytest.mark.slow
def test_a_right_click_and_the_key_x_report_a_toggle_with_all_selected(small: Graph) -> None:
    small.open()
    small.header("float", "fifth").click(button="right")
    small.heard("toggled", {"side": "float", "name": "fifth", "names": ["fifth"]})
    small.header("float", "first").click()
    small.header("float", "fourth").click(modifiers=["Shift"])
    small.header("float", "last").click(modifiers=["Shift"])
    small.header("float", "last").click(modifiers=["Shift"])
    expect(small.selected("float")).to_have_count(2)
    small.page.keyboard.press("x")
    both = ["first", "fourth"]
    small.heard("toggled", {"side": "float", "name": "fourth", "names": both})
    small.header("float", "first").click(button="right")
    small.heard("toggled", {"side": "float", "name": "first", "names": both})
    small.header("float", "fifth").click(button="right")
    assert all(each["names"] in (both, ["fifth"]) for each in events(small.folder, "toggled"))
    expect(small.selected("float")).to_have_count(2)


@pytest.mark.slow
def test_toggles_in_quick_succession_all_arrive(small: Graph) -> None:
    write_look(small.folder, height=620)
    small.open()
    names = ["first", HOSTILE, QUOTED, "fourth"]
    boxes = [small.header("float", name).bounding_box() for name in names]
    for box in boxes:
        assert box is not None
        small.page.mouse.click(box["x"] + 8, box["y"] + 8, button="right")
    for name in names:
        small.heard("toggled", {"side": "float", "name": name, "names": [name]})
    small.page.wait_for_timeout(500)
    assert [each["name"] for each in events(small.folder, "toggled")] == names


@pytest.mark.slow
def test_keys_in_a_pane_reach_the_page(small: Graph) -> None:
    small.open()
    small.page.evaluate(
        "() => document.addEventListener('keydown', event => { window.lastKey = event.key; })"
    )
    small.header("quantized", "fifth").click()
    small.page.keyboard.press("j")
    small.heard("key", {"key": "j"})
    small.page.keyboard.press("y")
    small.page.keyboard.press("/")
    small.page.wait_for_function("window.lastKey === '/'")
    expect(small.selected("quantized")).to_have_count(1)
    assert {each["key"] for each in events(small.folder, "key")} == {"j"}


@pytest.mark.slow
def test_a_double_click_and_enter_open_netrons_properties_and_escape_closes_them(
    small: Graph,
) -> None:
    small.open()
    sidebar = small.frame("float").locator("#sidebar")
    small.header("float", HOSTILE).dblclick()
    expect(sidebar).to_have_css("opacity", "1")
    expect(sidebar.locator(".sidebar-item input").first).to_be_visible()
    expect(sidebar.get_by_text(HOSTILE, exact=True)).to_be_visible()
    small.page.keyboard.press("Escape")
    expect(sidebar).to_have_css("opacity", "0")
    expect(small.selected("float")).to_have_count(1)
    small.page.keyboard.press("Enter")
    expect(sidebar).to_have_css("opacity", "1")
    sidebar.locator("#sidebar-closebutton").click()
    expect(sidebar).to_have_css("opacity", "0")
    assert small.errors == []


@pytest.mark.slow
def test_a_deep_link_selects_in_both_panes_once_they_are_drawn(small: Graph) -> None:
    write_look(small.folder, selected={"side": "quantized", "name": "last"}, height=330)
    small.open()
    for side in SIDES:
        expect(small.node(side, "last")).to_have_class(re.compile(r"\bselect\b"))
        expect(small.header(side, "last")).to_be_in_viewport()


@pytest.mark.slow
def test_a_deep_link_into_a_body_opens_it(small: Graph) -> None:
    write_look(small.folder, selected={"side": "float", "name": IN_BODY})
    small.open()
    for side in SIDES:
        expect(small.node(side, IN_BODY)).to_have_class(re.compile(r"\bselect\b"))
        expect(small.header(side, IN_BODY)).to_be_in_viewport()


@pytest.mark.slow
def test_a_node_that_is_not_drawn_is_named_in_a_note(small: Graph) -> None:
    small.open()
    small.look(selected={"side": "float", "name": "<b>gone</b>"})
    note = small.page.locator(".pane.float .note.shown")
    expect(note).to_have_text("<b>gone</b> is not drawn as a node of its own")


# --------------------------------------------------------------------------------- bodies and names


@pytest.mark.slow
def test_nodes_in_a_body_are_coloured_when_it_is_expanded_and_when_it_is_entered(
    small: Graph,
) -> None:
    small.open()
    color = rgb(expected_color(figures(small, "float")[IN_BODY]["figures"].get("accumulated")))
    frame = small.frame("float")
    expect(small.node("float", IN_BODY)).to_have_count(0)
    frame.get_by_text("+", exact=True).last.click()  # of the second branch
    inner = small.header("float", IN_BODY).locator("path")
    expect(inner).to_have_css("fill", color)
    small.header("float", IN_BODY).click()
    expect(small.node("quantized", IN_BODY)).to_have_class(re.compile(r"\bselect\b"))
    expect(small.node("float", IN_BODY)).to_have_class(re.compile(r"\bselect\b"))
    small.look(excluded=[IN_BODY])
    expect(small.node("float", IN_BODY).locator("> .qi-marks > .qi-excluded")).to_have_count(1)
    frame.get_by_text("○", exact=True).last.click()
    expect(small.node("float", "last")).to_have_count(0)
    expect(inner).to_have_css("fill", color)
    expect(small.node("float", IN_BODY).locator("> .qi-marks > .qi-excluded")).to_have_count(1)
    frame.locator("#toolbar-path-back-button").click()
    last = rgb(expected_color(figures(small, "float")["last"]["figures"].get("accumulated")))
    expect(small.header("float", "last").locator("path")).to_have_css("fill", last)
    assert small.errors == []


@pytest.mark.slow
def test_hostile_names_stay_text(small: Graph) -> None:
    small.open()
    for side in SIDES:
        for name in (HOSTILE, QUOTED):
            title = small.header(side, name).locator("title")
            expect(title).to_contain_text(name)
            small.header(side, name).click()
            small.heard("selected", {"side": side, "name": name, "names": [name]})
        for made in ("img", "image", "svg script", "foreignObject"):
            expect(small.frame(side).locator(made)).to_have_count(0)
    small.look(selected={"side": "float", "name": "last"})
    expect(small.node("quantized", "last")).to_have_class(re.compile(r"\bselect\b"))
    small.look(selected={"side": "float", "name": HOSTILE})
    expect(small.node("quantized", HOSTILE)).to_have_class(re.compile(r"\bselect\b"))
    assert small.page.evaluate("window.hacked") is None
    assert small.errors == []


# ------------------------------------------------------------------------- theme, zoom and pictures


@pytest.mark.slow
def test_the_theme_changes_without_a_new_drawing(small: Graph) -> None:
    small.open()
    documents = len([url for url in small.requests if url.endswith("/pane.html")])
    assert documents == 2
    small.look(theme="dark")
    for side in SIDES:
        body = small.frame(side).locator("body")
        expect(body).to_have_css("background-color", "rgb(15, 23, 42)")
        expect(small.frame(side).locator(".edge-path").first).to_have_css(
            "stroke", "rgb(136, 136, 136)"
        )
        name, about = next(
            (name, about)
            for name, about in figures(small, side).items()
            if about["figures"].get("accumulated") not in (None, "NaN")
        )
        color = rgb(expected_color(about["figures"]["accumulated"]))
        expect(small.header(side, name).locator("path")).to_have_css("fill", color)
    small.look(theme="light")
    expect(small.frame("float").locator("body")).to_have_css(
        "background-color", "rgb(255, 255, 255)"
    )
    assert len([url for url in small.requests if url.endswith("/pane.html")]) == documents


@pytest.mark.slow
def test_graphs_and_figures_are_fetched_once_and_a_new_sheet_alone_again(small: Graph) -> None:
    small.open()
    for excluded in (["first"], ["first", "fifth"], []):
        small.look(excluded=excluded)
        expect(small.frame("float").locator(".qi-excluded")).to_have_count(len(excluded))
    assert len([url for url in small.requests if "/held/" in url]) == 3
    sheet = json.loads((small.folder / "sheet.json").read_text())
    sheet["sides"]["float"]["first"]["figures"]["accumulated"] = 99
    (small.folder / "sheet.json").write_text(json.dumps(sheet))
    small.look()
    expect(small.header("float", "first").locator("path")).to_have_css("fill", rgb(ERROR_COLORS[4]))
    assert len([url for url in small.requests if "/held/" in url]) == 4


@pytest.mark.slow
def test_zoom_and_fit_change_one_pane(small: Graph) -> None:
    small.open()

    def width(side: str) -> float:
        box = small.frame(side).locator("#canvas").bounding_box()
        assert box is not None
        return box["width"]

    float_width, quantized_width = width("float"), width("quantized")
    small.tool("float", "Zoom out").click()
    small.page.wait_for_timeout(100)
    assert width("float") == pytest.approx(0.8 * float_width, rel=0.01)
    assert width("quantized") == quantized_width
    small.tool("float", "Fit to the width").click()
    small.page.wait_for_timeout(100)
    frame = small.page.locator('iframe[title="float graph"]').bounding_box()
    assert frame is not None
    assert width("float") <= frame["width"] + 1


@pytest.mark.slow
def test_the_exported_svg_has_the_colours_and_is_taken_by_our_own_route(small: Graph) -> None:
    write_look(small.folder, excluded=["fourth"], theme="dark", keep=True)
    small.open()
    small.header("float", "first").click()
    with small.page.expect_download() as waiting:
        small.tool("float", "SVG").click()
    assert waiting.value.suggested_filename == "float-graph.svg"
    text = Path(waiting.value.path()).read_text(encoding="utf-8")
    assert routes.picture_problem(text.encode(), routes.SVG) == ""
    tree = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    styles = {
        group.get("id", ""): [
            path.get("style", "")
            for item in group.findall(f"{space}g")
            if "node-item-type" in item.get("class", "")
            for path in item.findall(f"{space}path")
        ]
        for group in tree.iter(f"{space}g")
        if "graph-node" in group.get("class", "")
    }
    for name, about in figures(small, "float").items():
        if not name.startswith("inner"):
            color = rgb(expected_color(about["figures"].get("accumulated")))
            assert f"fill: {color}" in styles[f"node-name-{name}"][0], name
    assert "stroke: rgb(124, 58, 237)" in text, "the mark of the light theme"
    assert "219, 39, 119" not in re.sub(r"<style.*?</style>", "", text)
    borders = [e for e in tree.iter() if "node-border" in e.get("class", "")]
    assert borders
    assert not any("219, 39, 119" in border.get("style", "") for border in borders), "no selection"
    expect(small.node("float", "first")).to_have_class(re.compile(r"\bselect\b"))
    small.tool("float", "Keep the picture").click()
    small.heard("key", {"key": "picture", "side": "float"})
    assert (small.folder / "kept.svg").read_text(encoding="utf-8").count("<g") > 10
    assert small.errors == []


@pytest.mark.slow
def test_the_exported_png_has_the_colours(small: Graph) -> None:
    small.open()
    with small.page.expect_download() as waiting:
        small.tool("quantized", "PNG").click()
    picture = Image.open(io.BytesIO(Path(waiting.value.path()).read_bytes())).convert("RGB")
    there = {color for _, color in picture.getcolors(1 << 24) or []}
    for about in figures(small, "quantized").values():
        figure = about["figures"].get("accumulated")
        if figure is not None and about["op"] not in ("Relu", "Abs", "Neg"):
            color = expected_color(figure)
            assert tuple(int(color[at : at + 2], 16) for at in (1, 3, 5)) in there
    small.ready()
    expect(small.header("quantized", "first")).to_be_visible()


# ------------------------------------------------------------------------------ failure and return


@pytest.mark.slow
def test_a_graph_that_cannot_be_read_says_so_and_can_be_tried_again(small: Graph) -> None:
    good = (small.folder / "float.onnx").read_bytes()
    (small.folder / "float.onnx").write_bytes(b"<html>not a model</html>")
    small.open(ready=False)
    box = small.page.locator(".pane.float .error")
    expect(box).to_contain_text("The float graph is not drawn", timeout=PATIENCE)
    expect(small.page.locator(".pane.quantized .cover.gone")).to_have_count(1, timeout=PATIENCE)
    small.page.wait_for_timeout(300)
    assert next(each["side"] for each in events(small.folder, "failed")) == "float"
    (small.folder / "float.onnx").write_bytes(good)
    small.look()
    small.ready()
    expect(small.header("float", "first")).to_be_visible()


@pytest.mark.slow
def test_figures_that_are_gone_say_so_and_the_graphs_stand(small: Graph) -> None:
    write_look(small.folder, urls={"sheet": "/inspector/held/gone"})
    small.open(ready=False)
    expect(small.page.locator(".legend .trouble")).to_have_text(
        "The figures cannot be fetched: the server answers 404", timeout=PATIENCE
    )
    expect(small.header("float", "first")).to_be_visible(timeout=PATIENCE)
    small.heard("failed", {
        "side": "", "message": "The figures cannot be fetched: the server answers 404"
    })  # fmt: skip
    small.look()
    small.ready()


@pytest.mark.slow
def test_after_another_page_the_panes_work_again(small: Graph) -> None:
    small.open()
    small.page.get_by_role("link", name="Other").click()
    expect(small.page.get_by_text("The other page")).to_be_visible()
    expect(small.page.locator("iframe")).to_have_count(0)
    small.page.go_back()
    small.ready()
    small.header("float", "fifth").click()
    expect(small.node("quantized", "fifth")).to_have_class(re.compile(r"\bselect\b"))
    small.header("quantized", "first").click(button="right")
    small.heard("toggled", {"side": "quantized", "name": "first", "names": ["first"]})
    assert small.errors == []


@pytest.mark.slow
def test_messages_from_elsewhere_change_nothing(small: Graph) -> None:
    small.open()
    small.page.evaluate(
        """() => {
          const forged = { from: 'quant-inspector-pane', type: 'toggled', name: 'first' };
          window.postMessage(forged, '*');
          const frame = document.createElement('iframe');
          frame.srcdoc = `<script>
            parent.postMessage(${JSON.stringify(forged)}, '*');
            const order = { from: 'quant-inspector-page', type: 'theme', theme: 'dark' };
            for (const { shadowRoot } of parent.document.querySelectorAll('*')) {
              for (const frame of shadowRoot ? shadowRoot.querySelectorAll('iframe') : []) {
                frame.contentWindow.postMessage(order, '*');
                parent.forged = (parent.forged || 0) + 1;
              }
            }
          <` + `/script>`;
          document.body.append(frame);
        }"""
    )
    small.page.wait_for_function("window.forged === 2")
    small.header("float", "fifth").click(button="right")
    small.heard("toggled", {"side": "float", "name": "fifth", "names": ["fifth"]})
    assert {each["name"] for each in events(small.folder, "toggled")} == {"fifth"}
    expect(small.frame("float").locator("html")).to_have_attribute("data-theme", "light")


# -------------------------------------------------------------------------------- Netron's contract


@pytest.mark.parametrize(
    ("file", "old", "new", "missing"),
    [
        ("view.js", "showNodeProperties(", "showNodeThings(", "View.showNodeProperties"),
        ("view.js", "    get activeTarget()", "    get activeGraph()", "View.activeTarget"),
        ("view.js", "name-${value.name}", "called-${value.name}", "element id node-name-<name>"),
        ("view.js", "    scrollTo(selection, behavior)", "    goTo(selection, behavior)",
         "Graph.scrollTo"),
        ("browser.js", "    async _openModel(", "    async _readModel(", "Host._openModel"),
        ("grapher.js", "'node node-border'", "'node node-outline'", "a node's border .node-border"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_what_netron_moved_is_named_in_the_pane(
    small: Graph, file: str, old: str, new: str, missing: str
) -> None:
    def changed(route: Route) -> None:
        answer = route.fetch()
        text = answer.text()
        assert old in text, f"Netron's {file} has no {old!r} any more"
        route.fulfill(response=answer, body=text.replace(old, new))

    small.page.context.route(f"**/{file}*", changed)
    small.open(ready=False)
    box = small.page.locator(".pane.float .error")
    expect(box).to_contain_text("Netron's inside has changed", timeout=PATIENCE)
    expect(box).to_contain_text(missing)
    small.heard("failed", {
        "side": "float",
        "message": f"Netron's inside has changed, missing: {missing}. "
        "Install the netron version that pyproject.toml names.",
    })  # fmt: skip


# -------------------------------------------------------------------------------------- real models


@needs_models
@pytest.mark.parametrize("name", ["fastestdet", "gtcrn", "ultraface-rfb320", "silero-vad-16k"])
@pytest.mark.slow
def test_real_pairs_are_drawn_coloured_and_linked(real: Callable[[str], Graph], name: str) -> None:
    graph = real(name).open()
    drawn = {}
    for side in SIDES:
        drawn[side] = graph.fills(side)
        nodes = figures(graph, side)
        wanted = {
            each: rgb(expected_color(about["figures"].get("accumulated")))
            for each, about in nodes.items()
            if each in drawn[side]
        }
        assert len(wanted) >= 5
        assert {each: drawn[side][each] for each in wanted} == wanted
        main = {node.name for node in onnx.load(graph.folder / f"{side}.onnx").graph.node}
        left = {each for each in main - set(wanted) if nodes[each]["op"] != "Constant"}
        assert left == set(), "every node of the main graph is drawn"
    pairs = [
        (name, about["partners"][0])
        for name, about in figures(graph, "quantized").items()
        if about["partners"] and about["op"] not in (*HELPERS, "Constant")
    ]
    partner = next(
        (one, other)
        for one, other in pairs[len(pairs) // 2 :]
        if one in drawn["quantized"] and other in drawn["float"]
    )
    graph.header("quantized", partner[0]).click()
    expect(graph.node("float", partner[1])).to_have_class(re.compile(r"\bselect\b"))
    expect(graph.header("float", partner[1])).to_be_in_viewport()
    assert graph.errors == []
    assert graph.off_origin() == []


@needs_models
@pytest.mark.slow
def test_a_body_of_a_real_model_opens_by_a_deep_link_and_is_coloured(
    real: Callable[[str], Graph],
) -> None:
    graph = real("silero-vad-16k")
    main = onnx.load(graph.folder / "float.onnx").graph
    outside = {node.name for node in main.node}
    inside = [
        name
        for name, about in figures(graph, "float").items()
        if name not in outside and about["op"] != "Constant" and about["figures"]
    ]
    assert inside
    name = inside[-1]
    write_look(graph.folder, selected={"side": "float", "name": name})
    try:
        graph.open()
        expect(graph.node("float", name)).to_have_class(re.compile(r"\bselect\b"))
        color = rgb(expected_color(figures(graph, "float")[name]["figures"]["accumulated"]))
        expect(graph.header("float", name).locator("path")).to_have_css("fill", color)
    finally:
        write_look(graph.folder)
    assert graph.errors == []


def test_helper_names_of_the_sheet_are_those_of_the_bridge() -> None:
    text = routes.BRIDGE.read_text(encoding="utf-8")
    (listed,) = re.findall(r"const HELPERS = new Set\(\[(.*?)\]\)", text)
    assert tuple(re.findall(r"'(\w+)'", listed)) == HELPERS
