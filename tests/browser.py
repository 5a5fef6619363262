"""The app as a user has it: `streamlit run app.py` and Debian's Chromium."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from tests.samples import ROOT

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
# The depth chart of the overview, once it is drawn.
CHART = ".st-key-picture-depth .js-plotly-plot .trace"
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def served(
    folder: Path,
    environment: Mapping[str, str],
    *options: str,
    port: int = 0,
    base: str = "",
    script: str = "app.py",
) -> Iterator[str]:
    """The address of the folder's `app.py`, run by Streamlit until the block ends.

    Args:
        folder: of the app.
        environment: variables besides those of this process.
        options: of `streamlit run`.
        port: to listen on; a free one by default.
        base: the path before every address, as "/tools".
        script: that Streamlit is given, in the folder.
    """
    port = port or free_port()
    process = started(folder, environment, *options, port=port, base=base, script=script)
    try:
        yield f"http://127.0.0.1:{port}{base}"
    finally:
        ended(process)


def started(
    folder: Path,
    environment: Mapping[str, str],
    *options: str,
    port: int,
    base: str = "",
    script: str = "app.py",
    within: Sequence[str] = (),
    log: Path | None = None,
) -> subprocess.Popen[bytes]:
    """The process of a server that answers; arguments as `served`.

    Args:
        within: a command that runs the server, with its arguments before the server's.
        log: where to add what the server says.

    Raises:
        RuntimeError: it ended, or did not answer within a minute.
    """
    with open(log or os.devnull, "ab") as said:
        process = subprocess.Popen(
            [*within, sys.executable, "-m", "streamlit", "run", script, "--server.port", str(port),
             "--server.headless", "true", "--server.baseUrlPath", base, *options],
            cwd=folder,
            env={**os.environ, **environment},
            stdout=said,
            stderr=said,
        )  # fmt: skip
    deadline = time.monotonic() + 60
    while True:
        try:
            health = f"http://127.0.0.1:{port}{base}/_stcore/health"
            urllib.request.urlopen(health, timeout=1).close()
            return process
        except (urllib.error.URLError, OSError):
            if process.poll() is not None or time.monotonic() > deadline:
                ended(process)
                raise RuntimeError("the app did not start") from None
            time.sleep(0.02)


def ended(process: subprocess.Popen[bytes]) -> None:
    """Ends a server, by force where it does not end by itself."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def running_app(data: Path) -> Iterator[str]:
    """The address of the app, started as the README says, with its own data folder."""
    with served(ROOT, {"QUANT_INSPECTOR_DATA": str(data)}) as address:
        yield address


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser with a profile of its own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()
