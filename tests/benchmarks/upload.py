"""What a large upload costs the server: memory, and how soon it still answers others.

python -m tests.benchmarks upload
"""

from __future__ import annotations

import re
import secrets
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.benchmarks.harness import Figure, Unavailable
from tests.browser import ended, free_port, started
from tests.samples import ROOT
from tests.stream import Tab

SIZE = 2 * 10**9
QUICK_SIZE = 2 * 10**8
CHUNK = 8 << 20
MOST_GROWTH_MB = 20.0


def resident_mb(pid: int, line: str = "VmRSS") -> float:
    """What a process holds in memory; with "VmHWM" the most it ever held."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        raise Unavailable("the memory of another process can be read on Linux only")
    found = next(x for x in status.read_text().splitlines() if x.startswith(line))
    return int(found.split()[1]) * 1024 / 1e6


def inbox_address(app: str, **identity: Any) -> tuple[str, Tab]:
    """Where the float model's field takes files, and the tab that has to stay open for it."""
    tab = Tab(app, **identity)
    shown = tab.open("models")
    found = re.search(rb"/inspector/upload/[\w-]{43}", shown)
    assert found is not None
    return app + found[0].decode(), tab


def pieces(size: int, block: bytes) -> Iterator[bytes]:
    for start in range(0, size, len(block)):
        yield block[: min(len(block), size - start)]


def send(client: httpx.Client, address: str, size: int) -> None:
    """Sends a file of random bytes in chunks as the field does."""
    block, file_id = secrets.token_bytes(1 << 18), secrets.token_hex(16)
    for offset in range(0, size, CHUNK):
        part = min(CHUNK, size - offset)
        answer = client.put(
            f"{address}/{file_id}",
            content=pieces(part, block),
            headers={
                "Upload-Name": f"{file_id}.onnx",
                "Upload-Length": str(size),
                "Upload-Offset": str(offset),
                "Content-Length": str(part),
            },
        )
        assert answer.json()["offset"] == offset + part, answer.text


def latencies(app: str, stop: threading.Event) -> list[float]:
    """Seconds that the server took to say that it is well, five times a second."""
    found = []
    with httpx.Client() as client:
        while not stop.wait(0.2):
            begin = time.perf_counter()
            client.get(f"{app}/healthz").raise_for_status()
            found.append(time.perf_counter() - begin)
    return found


def measure(*, quick: bool) -> list[Figure]:
    size = QUICK_SIZE if quick else SIZE
    port = free_port()
    app = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as data:
        process = started(ROOT, {"QUANT_INSPECTOR_DATA": data}, port=port)
        try:
            address, tab = inbox_address(app)
            with tab, httpx.Client(timeout=60) as client:
                send(client, address, CHUNK)  # what the first upload loads stays
                time.sleep(3)
                before = resident_mb(process.pid)
                Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak from now on
                answers: list[float] = []
                stop = threading.Event()
                asking = threading.Thread(target=lambda: answers.extend(latencies(app, stop)))
                asking.start()
                begin = time.perf_counter()
                try:
                    send(client, address, size)
                    seconds = time.perf_counter() - begin
                finally:
                    stop.set()
                    asking.join()
                peak = resident_mb(process.pid, "VmHWM")
        finally:
            ended(process)
    subject = f"{size / 1e9:g} GB"
    note = f"{size / 1e6 / seconds:.0f} MB/s"
    return [
        Figure(
            benchmark="upload",
            subject=subject,
            what="growth of the server's memory at its peak",
            measured=peak - before,
            unit="MB",
            required=MOST_GROWTH_MB,
            note=note,
        ),
        Figure(
            benchmark="upload",
            subject=subject,
            what="another request meanwhile, median",
            measured=statistics.median(answers) if answers else None,
            unit="s",
            note=f"worst {max(answers, default=0):.3f} s",
        ),
    ]
