"""Seconds from the first request to the sample's comparison on screen, file cache warm.

python -m tests.benchmarks.first_screen
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from tests.browser import CHART, chromium, running_app

REPEATS = 3


def measure() -> list[float]:
    """One figure per fresh server with an empty data folder; the first, cold one is left out."""
    seconds = []
    with chromium() as browser:
        for _ in range(REPEATS + 1):
            with tempfile.TemporaryDirectory() as data, running_app(Path(data)) as address:
                context = browser.new_context(viewport={"width": 1280, "height": 800})
                page = context.new_page()
                begin = time.perf_counter()
                page.goto(address)
                page.get_by_text("slice is silent").wait_for(timeout=60_000)
                page.locator(CHART).first.wait_for(timeout=60_000)
                seconds.append(time.perf_counter() - begin)
                context.close()
    return seconds[1:]


def main() -> None:
    seconds = measure()
    listed = ", ".join(f"{s:.2f}" for s in seconds)
    print(f"first screen: median {statistics.median(seconds):.2f} s ({listed})")


if __name__ == "__main__":
    main()
