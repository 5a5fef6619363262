"""The main path in a real browser: see the collapse, exclude the node, re-quantize, same number."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from inspector import workbench
from inspector.cli import main as cli_main
from inspector.comparison import Pin
from inspector.render import format_db
from inspector.store import FeedSource, Workspace
from inspector.web.tasks import load_sample
from tests.browser import CHART, running_app
from tests.samples import MODELS, ROOT, needs_models
from tests.test_pages import load_hostile

SAMPLE = ROOT / "sample_models" / "digit-detector"
PATIENCE = 90_000

pytestmark = pytest.mark.browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    try:
        yield context.new_page()
    finally:
        context.close()


def tick_first_row(page: Page) -> None:
    """The editor's grid is a canvas: focus its first cell and press Space."""
    grid = page.get_by_test_id("stDataFrame").first
    grid.click(position={"x": 36, "y": 36 + 16}, timeout=PATIENCE)
    page.keyboard.press("Space")


def test_a_user_sees_the_collapse_excludes_the_node_and_gets_the_command_lines_number(
    page: Page, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    with running_app(data) as address:
        page.goto(address)
        expect(page.get_by_text("slice is silent")).to_be_visible(timeout=PATIENCE)
        expect(page.locator(CHART).first).to_be_visible(timeout=PATIENCE)
        expect(page.get_by_text("Page not found")).to_have_count(0)

        page.get_by_role("link", name="Exclusions").click()
        tick_first_row(page)
        expect(page.get_by_text("1 node to leave in float")).to_be_visible(timeout=PATIENCE)
        page.get_by_role("button", name="Re-quantize").click()
        expect(page.get_by_text("run 2").first).to_be_visible(timeout=PATIENCE)

        workspace = Workspace(data)
        (pair,) = workspace.pairs()
        run = workspace.runs(pair.id)[-1]
        assert run.exclusions == ("/head/Concat_3",)
        report = tmp_path / "report.json"
        code = cli_main(
            ["compare", str(SAMPLE / "float.onnx"), str(run.model.path),
             "--inputs", str(SAMPLE / "feeds"), "--json", str(report)]
        )  # fmt: skip
        assert code == 0
        (output,) = json.loads(report.read_text())["outputs"]
        for figure in ("sqnr_db", "worst_channel_sqnr_db"):
            shown = page.get_by_text(format_db(output[figure]))
            expect(shown.first).to_be_visible(timeout=PATIENCE)
        assert output["worst_channel_sqnr_db"] > 10, "the scores are back"

        page.reload()
        expect(page.get_by_text("run 2").first).to_be_visible(timeout=PATIENCE)
        assert re.search(r"run=[0-9a-f]{32}", page.url)


@pytest.mark.slow
def test_a_match_is_pinned_and_its_row_says_so(page: Page, tmp_path: Path) -> None:
    run_id = load_sample(tmp_path, "digit-detector", progress=lambda *_: None)
    name = "/head/Sigmoid_output_0"
    with running_app(tmp_path) as address:
        page.goto(f"{address}/tensors?run={run_id}&tensor={name}")
        page.get_by_role("button", name="Matched by name").click(timeout=PATIENCE)
        box = page.get_by_role("combobox", name="Pin to another tensor of the quantized model")
        box.fill(name, timeout=PATIENCE)
        page.get_by_role("option", name=f"{name} · ").click(timeout=PATIENCE)
        page.get_by_role("button", name="Pin", exact=True).click()
        pinned = page.get_by_role("button", name="Matched by hand")
        expect(pinned).to_be_visible(timeout=PATIENCE)
        assert Workspace(tmp_path).run(run_id).pins == (Pin(float_name=name, quantized_name=name),)
        page.reload()
        expect(pinned).to_be_visible(timeout=PATIENCE)


@pytest.mark.slow
def test_hostile_names_become_no_elements(page: Page, tmp_path: Path) -> None:
    run_id = load_hostile(tmp_path)
    said: list[str] = []
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    with running_app(tmp_path) as address:
        for name in ("overview", "tensors", "graph", "exclusions", "models", "report"):
            page.goto(f"{address}/{name}?run={run_id}")
            expect(page.locator(".st-key-context")).to_be_visible(timeout=PATIENCE)
            if name == "overview":
                expect(page.locator(CHART).first).to_be_visible(timeout=PATIENCE)
                page.locator(".st-key-basis summary").click()
                page.locator(".st-key-picture-depth .nsewdrag").hover()
            if name == "tensors":
                histogram = page.locator(".st-key-picture-histogram .js-plotly-plot")
                expect(histogram).to_be_visible(timeout=PATIENCE)
            made = page.evaluate(
                """() => [
                  ...[...document.links].filter(
                    each => each.host !== location.host || each.protocol !== "http:"),
                  ...document.querySelectorAll(
                    'img[src="x"], .katex, [aria-label="skull icon"], img[alt="Streamlit logo"]'),
                ].map(each => each.outerHTML.slice(0, 200))"""
            )
            assert made == [], name
            assert page.evaluate("window.hacked") is None
            text = page.locator(".stMain").inner_text()
            assert "\N{FACE WITH TEARS OF JOY}" not in text
            assert "\u202e" not in text
    assert said == []
    assert not [url for url in asked if "evil" in url]


@needs_models
@pytest.mark.slow
def test_excluding_on_a_real_detector_writes_the_bytes_of_the_command_line(
    page: Page, tmp_path: Path
) -> None:
    folder = MODELS / "fastestdet"
    data = tmp_path / "data"
    workbench.load_pair(
        data,
        float_path=folder / "model.onnx",
        quantized_path=folder / "ort_static_qdq.onnx",
        inputs=FeedSource(kind="path", path=str(folder / "inputs")),
    )
    with running_app(data) as address:
        page.goto(f"{address}/exclusions")
        tick_first_row(page)
        expect(page.get_by_text("1 node to leave in float")).to_be_visible(timeout=PATIENCE)
        page.get_by_role("button", name="Re-quantize").click()
        expect(page.get_by_text("run 2").first).to_be_visible(timeout=PATIENCE)
        (pair,) = Workspace(data).pairs()
        run = Workspace(data).runs(pair.id)[-1]
        (excluded,) = run.exclusions
        out, listed, report = (tmp_path / name for name in ("o.onnx", "list.json", "report.json"))
        words = ["quantize", folder / "model.onnx", "-o", out, "--inputs", folder / "inputs",
                 "--exclude", excluded, "--save-exclusions", listed]  # fmt: skip
        assert cli_main([str(w) for w in words]) == 0
        assert out.read_bytes() == run.model.path.read_bytes()
        words = ["compare", folder / "model.onnx", out, "--inputs", folder / "inputs",
                 "--json", report]  # fmt: skip
        assert cli_main([str(w) for w in words]) == 0
        (output,) = json.loads(report.read_text())["outputs"]
        expect(page.get_by_text(format_db(output["sqnr_db"])).first).to_be_visible()


@pytest.mark.parametrize(
    "name",
    [
        *("", "graph"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("overview", "tensors", "exclusions", "models", "report")
        ),
    ],
)
def test_every_address_opens_its_page_directly(page: Page, tmp_path: Path, name: str) -> None:
    with running_app(tmp_path) as address:
        page.goto(f"{address}/{name}")
        expect(page.get_by_text("digit-detector").first).to_be_visible(timeout=PATIENCE)
        expect(page.get_by_text("Page not found")).to_have_count(0)
        expect(page.get_by_test_id("stException")).to_have_count(0)
