"""Seconds from a click on a node in the app to new preview numbers on screen.

The app is started as a user starts it, with a real pair and all its feeds; each click ticks or
unticks one more node of the table on the exclusions page.

python -m tests.benchmarks click_to_preview
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page

from inspector.store import FeedSource, Workspace
from inspector.workbench import load_pair
from tests.benchmarks.harness import Figure, Unavailable, shared_model
from tests.browser import chromium, running_app

NAME = "click_to_preview"
REQUIRED_SECONDS = 1.0
ROUNDS = 9
# Of the node table: its header, a row, and the middle of the box in it, pixels.
HEADER, ROW, BOX_LEFT = 32, 31, 37
# So many rows below the first are whole on screen.
ROWS = 7


def tick(page: Page, row: int) -> None:
    """Clicks on the box of a row of the node table."""
    table = page.locator('[data-testid="stDataFrame"]').first.bounding_box()
    assert table is not None
    y = table["y"] + HEADER + (row + 0.5) * ROW
    page.mouse.click(table["x"] + BOX_LEFT, y)


def seconds_of_clicks(page: Page, rounds: int) -> list[float]:
    """One figure per click after the first, which opens the preview."""
    page.locator(".st-key-requantize-panel").wait_for(timeout=120_000)
    shown = page.locator(".st-key-ticked")
    # The first click on a table may only select a cell.
    for _ in range(4):
        if shown.locator("code").count():
            break
        tick(page, 0)
        page.wait_for_timeout(2500)
    page.locator(".st-key-preview").wait_for(timeout=120_000)
    found = []
    for at in range(rounds):
        preview = page.locator(".st-key-preview")
        before, ticked = preview.inner_text(), shown.inner_text()
        begin = time.perf_counter()
        # The second time round they are unticked.
        tick(page, 1 + at % ROWS)
        while preview.inner_text() == before or shown.inner_text() == ticked:
            if time.perf_counter() - begin > 30:
                raise Unavailable(f"click {at + 1} changed no number within 30 s")
            page.wait_for_timeout(10)
        found.append(time.perf_counter() - begin)
        page.wait_for_timeout(700)
    return found


def measure(*, quick: bool) -> list[Figure]:
    folder = shared_model("fastestdet")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        Workspace(root)
        source = FeedSource(kind="path", path=str(folder / "inputs"))
        load_pair(
            root,
            float_path=folder / "model.onnx",
            quantized_path=folder / "ort_static_qdq.onnx",
            inputs=source,
        )
        with chromium() as browser, running_app(root) as address:
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.goto(f"{address}/exclusions")
            seconds = seconds_of_clicks(page, 3 if quick else ROUNDS)
    return [
        Figure(
            benchmark=NAME, subject="fastestdet, 7 samples", what="click to new preview numbers",
            measured=statistics.median(seconds), unit="s", required=REQUIRED_SECONDS,
            note=", ".join(f"{s:.2f}" for s in seconds),
        )
    ]  # fmt: skip
