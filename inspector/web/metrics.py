"""What the server counts, for a monitor: Prometheus text at `/metrics`.

Apart from the gate and the workers that report to it, because an open address may hold no name, no
address of a person, no id and no path: every label here is of a fixed, short list. A scrape reads
what the kernel keeps anyway and walks no folder.
"""

from __future__ import annotations

import platform
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import prometheus_client as prometheus
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inspector.jobs import ACTIVE, JobStatus, Worker

ENDS = ("done", "failed", "cancelled", "stopped")
_SECONDS = (0.1, 0.5, 2.0, 10.0, 30.0, 120.0, 600.0, 1800.0, 3600.0)
# The first part of an address below the base path, and what is counted for it.
_CLASSES = {
    "_stcore": "streamlit",
    "auth": "sign-in",
    "component": "streamlit",
    "healthz": "health",
    "media": "media",
    "metrics": "metrics",
    "oauth2callback": "sign-in",
    "static": "static",
}
_OURS = {
    "held": "download",
    "download": "download",
    "netron": "graph",
    "picture": "upload",
    "upload": "upload",
}

# The library gives this function no types.
prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]
registry = prometheus.CollectorRegistry()
prometheus.ProcessCollector(registry=registry)
requests = prometheus.Counter(
    "quant_inspector_requests",
    "Requests answered, by kind of address and status.",
    ("kind", "status"),
    registry=registry,
)
received = prometheus.Counter(
    "quant_inspector_received_bytes",
    "Bytes of request bodies taken in, by kind of address.",
    ("kind",),
    registry=registry,
)
pages_open = prometheus.Gauge(
    "quant_inspector_websockets", "Open websockets: pages in browsers.", registry=registry
)
jobs_ended = prometheus.Counter(
    "quant_inspector_jobs_ended",
    "Jobs that ended, by how.",
    ("how",),
    registry=registry,
)
job_seconds = prometheus.Histogram(
    "quant_inspector_job_seconds",
    "Seconds that jobs ran, without their time in the queue.",
    buckets=_SECONDS,
    registry=registry,
)
_build = prometheus.Gauge(
    "quant_inspector_build_info", "Always 1.", ("version", "python", "streamlit"), registry=registry
)
for _how in ENDS:
    jobs_ended.labels(_how)
for _kind in ("upload", "streamlit"):
    received.labels(_kind)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


_build.labels(_version("quant-inspector"), platform.python_version(), _version("streamlit")).set(1)


def kind_of(name: str, pages: Collection[str]) -> str:
    """What an address counts as.

    Args:
        name: below the base path, without the slash before it.
        pages: the names of the pages; "" is one.
    """
    parts = name.strip("/").split("/")
    if len(parts) == 1 and parts[0] in pages:
        return "page"
    if parts[0] == "inspector" and len(parts) > 1:
        return _OURS.get(parts[1], "other")
    return _CLASSES.get(parts[0], "other")


class Counting:
    """The ASGI application around all others that counts what comes in and goes out.

    Args:
        app: the application inside.
        base: the path before every address; what lies beside it counts as "other".
        pages: as `kind_of` takes them.
    """

    def __init__(self, app: ASGIApp, *, base: str, pages: Collection[str]) -> None:
        self._app = app
        self._base = base
        self._pages = frozenset(pages)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]
        inside = path.startswith(f"{self._base}/") or path == self._base
        kind = kind_of(path[len(self._base) :], self._pages) if inside else "other"
        accepted = False

        async def sending(message: Message) -> None:
            nonlocal accepted
            what = message["type"]
            if what == "http.response.start":
                requests.labels(kind, str(message["status"])).inc()
            elif what == "websocket.accept":
                accepted = True
                requests.labels(kind, "101").inc()
                pages_open.inc()
            elif what == "websocket.close" and not accepted:
                requests.labels(kind, "403").inc()
            await send(message)

        async def taking() -> Message:
            message = await receive()
            if message["type"] == "http.request" and message.get("body"):
                received.labels(kind).inc(len(message["body"]))
            return message

        try:
            await self._app(scope, taking, sending)
        finally:
            if accepted:
                pages_open.dec()


def job_ended(status: JobStatus) -> None:
    """Counts a job that has ended."""
    jobs_ended.labels(status.state if status.state in ENDS else "failed").inc()
    if status.seconds > 0:
        job_seconds.observe(status.seconds)


class _Now(Collector):
    """What is asked for at each scrape."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._data: Path | None = None
        self._workers: Callable[[], Iterable[Worker]] = tuple

    def watch(self, data: Path, workers: Callable[[], Iterable[Worker]]) -> None:
        """From now on tells of the disk of a folder, and of the workers that there are."""
        with self._lock:
            self._data, self._workers = data, workers

    def describe(self) -> Iterable[prometheus.Metric]:
        return ()

    def collect(self) -> Iterable[prometheus.Metric]:
        with self._lock:
            data, workers = self._data, self._workers
        found = list(workers())
        states = Counter(job.state for worker in found for job in worker.jobs())
        jobs = GaugeMetricFamily(
            "quant_inspector_jobs", "Jobs that have not ended.", labels=("state",)
        )
        for state in ACTIVE:
            jobs.add_metric((state,), states[state])
        yield jobs
        # Of a process that is just starting it is not known yet.
        alive = Counter(
            "unknown" if (held := worker.confinement) is None else "yes" if held.network else "no"
            for worker in found
            if worker.is_alive
        )
        processes = GaugeMetricFamily(
            "quant_inspector_workers",
            "Worker processes alive, by whether they can reach the network.",
            labels=("network",),
        )
        for network in ("no", "yes", "unknown"):
            processes.add_metric((network,), alive[network])
        yield processes
        yield GaugeMetricFamily(
            "quant_inspector_workers_resident_memory_bytes",
            "Memory that worker processes and what they have started hold, without mapped files.",
            value=sum(worker.resident_bytes for worker in found),
        )
        if data is not None:
            yield from _disk(data)


def _disk(data: Path) -> Iterator[prometheus.Metric]:
    with suppress(OSError):
        usage = shutil.disk_usage(data)
        disk = GaugeMetricFamily(
            "quant_inspector_disk_bytes",
            "The disk of the data folder: what the server may still write, and what is taken.",
            labels=("what",),
        )
        disk.add_metric(("free",), usage.free)
        disk.add_metric(("used",), usage.used)
        yield disk


_now = _Now()
registry.register(_now)
watch = _now.watch


def answer(_: Request) -> Response:
    """The figures as Prometheus reads them."""
    return Response(
        prometheus.generate_latest(registry),
        headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"},
        media_type=prometheus.CONTENT_TYPE_LATEST,
    )
