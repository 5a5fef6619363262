"""The graph page in a browser: colours, linked selection, toggles, deep links, nothing outside.

The panes themselves are tested in `test_graph_panes`.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, FrameLocator, Locator, Page, expect

from inspector import workbench
from inspector.cli import main as cli_main
from inspector.error_scale import ERROR_COLORS, error_color
from inspector.store import FeedSource, Workspace
from tests.browser import running_app
from tests.samples import MODELS, needs_models
from tests.test_pages import load_hostile

PATIENCE = 90_000
SIDES = ("float", "quantized")

pytestmark = pytest.mark.browser


class Watched:
    """A page with what its browser complained of, and what it asked of others."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address = page, address
        self.errors: list[str] = []
        self.outside: list[str] = []
        self.dialogs: list[str] = []
        page.on("console", lambda said: said.type == "error" and self.errors.append(said.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda box: (self.dialogs.append(box.message), box.dismiss()))
        page.on("request", lambda request: self._asked(request.url))

    def _asked(self, url: str) -> None:
        inside = (self.address, self.address.replace("http", "ws", 1), "data:", "blob:")
        if not url.startswith(inside):
            self.outside.append(url)

    def pane(self, side: str) -> FrameLocator:
        return self.page.frame_locator(f'iframe[title^="{side}" i]')

    def node(self, side: str, name: str) -> object:
        return self.pane(side).locator(f'[id="node-name-{name}"]')

    def opened(self, query: str) -> Watched:
        """Both graphs of a run, drawn."""
        self.page.goto(f"{self.address}/graph?{query}")
        for side in SIDES:
            expect(self.pane(side).locator(".graph-node").first).to_be_visible(timeout=PATIENCE)
        return self

    def check(self) -> None:
        """Nothing was complained of but the two files Streamlit misses on a direct address."""
        harmless = "Failed to load resource: the server responded with a status of 404"
        found = [e for e in self.errors if not e.startswith(harmless)]
        assert not found
        assert len(self.errors) <= 2
        assert not self.outside
        assert not self.dialogs


@pytest.fixture
def watched(browser: Browser) -> Iterator[Callable[..., Watched]]:
    with contextlib.ExitStack() as stack:

        def start(address: str, *, theme: str = "light") -> Watched:
            context = browser.new_context(
                viewport={"width": 1280, "height": 800}, color_scheme=theme
            )
            stack.callback(context.close)
            return Watched(context.new_page(), address)

        yield start


def load(root: Path, name: str, quantized: str = "ort_static_qdq.onnx", samples: int = 2) -> str:
    folder = MODELS / name
    return workbench.load_pair(
        root,
        float_path=folder / "model.onnx",
        quantized_path=folder / quantized,
        inputs=FeedSource(kind="path", path=str(folder / "inputs"), samples=samples),
    )


def spelled(color: str) -> str:
    """A colour as browsers write it."""
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgb({red}, {green}, {blue})"


def check_fill(watched: Watched, side: str, node: str, color: str) -> None:
    """The head of a node has this colour, ``#rrggbb``; Netron leaves its page no `eval`."""
    head = watched.pane(side).locator(f'[id="node-name-{node}"] .node-item path').first
    expect(head).to_have_css("fill", spelled(color), timeout=PATIENCE)


def ticked(root: Path) -> tuple[str, ...]:
    workspace = Workspace(root)
    (pair,) = workspace.pairs()
    return tuple(workspace.draft(pair.id).get("nodes", ()))


def click(label: Locator, button: Literal["left", "right"] = "left") -> None:
    """Clicks a node once it stands still: a graph glides to what is selected."""
    label.scroll_into_view_if_needed()
    places = [label.bounding_box()]
    while len(places) < 3 or places[-3:] != 3 * places[-1:]:
        time.sleep(0.2)
        places.append(label.bounding_box())
    label.click(button=button, force=True)


@pytest.mark.slow
@needs_models
def test_the_graph_of_a_real_detector_is_coloured_linked_and_toggled(
    watched: Callable[..., Watched], tmp_path: Path
) -> None:
    run = load(tmp_path / "data", "fastestdet")
    report = tmp_path / "report.json"
    folder = MODELS / "fastestdet"
    code = cli_main(
        ["compare", str(folder / "model.onnx"), str(folder / "ort_static_qdq.onnx"),
         "--inputs", str(folder / "inputs"), "--samples", "2", "--json", str(report)]
    )  # fmt: skip
    assert code == 0
    figures = {
        each["node"]: each["accumulated_sqnr_db"]
        for each in json.loads(report.read_text())["activations"]
        if each["node"]
    }
    with running_app(tmp_path / "data") as address:
        seen = watched(address).opened(f"run={run}&node=Conv_257")
        card = seen.page.locator(".st-key-node-card")
        expect(card).to_contain_text("Conv_257", timeout=PATIENCE)

        # The colour is that of the command line's number, in both graphs.
        some = ["Conv_257", "Sigmoid_261", "Concat_264", "Conv_0", "MaxPool_2"]
        for node in (n for n in some if n in figures):
            for side in SIDES:
                check_fill(seen, side, node, error_color(figures[node]))

        # A click in either graph selects in the other and fills the card.
        for side, other in (SIDES, SIDES[::-1]):
            node = "Concat_264" if side == "float" else "Conv_257"
            click(seen.pane(side).locator(f'[id="node-name-{node}"] text').first)
            twin = seen.pane(other).locator(f'[id="node-name-{node}"]')
            expect(twin).to_have_class(re.compile(r"\bselect\b"), timeout=PATIENCE)
            expect(card).to_contain_text(node, timeout=PATIENCE)
            assert re.search(rf"node={node}\b", seen.page.url)

        # A right-click puts the node on the list, and the preview answers.
        head = seen.pane("float").locator('[id="node-name-Concat_264"] text').first
        click(head, button="right")
        expect(seen.page.get_by_text("Preview: 1 node in float")).to_be_visible(timeout=PATIENCE)
        assert ticked(tmp_path / "data") == ("Concat_264",)
        seen.page.get_by_role("link", name="Exclusions").click()
        expect(seen.page.get_by_text("1 node to leave in float")).to_be_visible(timeout=PATIENCE)
        seen.page.go_back()
        check_fill(seen, "float", "Concat_264", error_color(figures["Concat_264"]))
        click(head, button="right")
        expect(seen.page.get_by_text("Preview: 1 node in float")).to_have_count(0)
        assert ticked(tmp_path / "data") == ()
        seen.check()


@pytest.mark.slow
@needs_models
@pytest.mark.parametrize(
    ("name", "theme"),
    [("gtcrn", "dark"), ("ultraface-rfb320", "light"), ("silero-vad-16k", "dark")],
)
def test_other_real_models_are_drawn_without_complaint(
    watched: Callable[..., Watched], tmp_path: Path, name: str, theme: str
) -> None:
    run = load(tmp_path, name)
    with running_app(tmp_path) as address:
        seen = watched(address, theme=theme).opened(f"run={run}")
        seen.page.get_by_role("button", name="Next worst").click()
        card = seen.page.locator(".st-key-node-card")
        expect(card.get_by_role("button", name="Leave in float")).to_be_enabled(timeout=PATIENCE)
        seen.page.wait_for_url(re.compile(r"[?&]node="), timeout=PATIENCE)
        expect(seen.pane("float").locator(".graph-node.select").first).to_be_visible(
            timeout=PATIENCE
        )
        # The card is whole: a key pressed while it is made anew is lost, as a click would be.
        expect(card.locator(".js-plotly-plot")).to_be_visible(timeout=PATIENCE)
        end = time.monotonic() + PATIENCE / 1000
        while not ticked(tmp_path):
            assert time.monotonic() < end, "the key does nothing"
            seen.page.keyboard.press("x")
            seen.page.wait_for_timeout(3000)
        expect(card.get_by_role("button", name="Undo float")).to_be_visible(timeout=PATIENCE)
        assert len(ticked(tmp_path)) == 1
        seen.check()


@pytest.mark.slow
def test_hostile_names_stay_text_in_the_graph(
    watched: Callable[..., Watched], tmp_path: Path
) -> None:
    run = load_hostile(tmp_path)
    with running_app(tmp_path) as address:
        seen = watched(address).opened(f"run={run}")
        seen.page.get_by_role("button", name="Next worst").click()
        expect(seen.page.locator(".st-key-node-card")).not_to_contain_text("No node selected")
        for side in SIDES:
            assert seen.pane(side).locator('img[src="x"]').count() == 0
        seen.check()


@pytest.mark.slow
@needs_models
def test_a_graph_kept_for_the_report_stands_there(
    watched: Callable[..., Watched], tmp_path: Path
) -> None:
    run = load(tmp_path, "mlperf-resnet8")
    with running_app(tmp_path) as address:
        seen = watched(address).opened(f"run={run}")
        seen.page.get_by_role("button", name="Keep the picture").first.click()
        picture = Workspace(tmp_path).run_folder(run) / "graph" / "picture.svg"
        seen.page.wait_for_timeout(500)
        for _ in range(100):
            if picture.is_file():
                break
            seen.page.wait_for_timeout(100)
        text = picture.read_text()
        assert any(color in text or spelled(color) in text for color in ERROR_COLORS)
        seen.page.get_by_role("link", name="Report").click()
        image = seen.page.get_by_alt_text("The graph, coloured by error")
        expect(image).to_be_visible(timeout=PATIENCE)
        assert image.evaluate("element => element.naturalWidth") > 100
        seen.check()
