"""A portal under load: twenty people at work for two minutes, two heavy jobs beside them.

The client is `tests/stream.Visitor`: it speaks Streamlit's websocket as a browser does, keeps the
address and the widgets' values, and follows the timers of a page, but draws nothing. Each person
works on a model pair of their own in which every name carries their watermark; every message that
comes is searched for the watermarks of all others, every page for their own.

python -m tests.portal_load [--people N] [--seconds N] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil

from inspector.errors import InspectorError
from inspector.store import Workspace
from tests import hosted
from tests.benchmarks.harness import MODELS, Figure, busy, print_table
from tests.hosted import Portal, watermark, workspace_of
from tests.samples import ROOT
from tests.stream import Visitor

NAME = "portal"
SECRET = "a-secret-of-the-proxy-that-only-the-tests-know"
MARK = re.compile(rb"markof[0-9a-f]{8}")
# What a person does between two clicks, seconds.
THINKING = (3.0, 6.0)
ALONE_THINKING = (0.3, 0.6)
# The web process must stay below, bytes.
MOST_MEMORY = 600 * 10**6
MOST_TIMES_UNLOADED = 3.0
SAMPLE_SECONDS = 2.0
# Between one person's coming and the next's: all of them upload and compare within a minute.
ARRIVAL_SECONDS = 3.0
PAGES = ("overview", "tensors", "exclusions", "recipes", "report")


# ── models of one's own ──────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A real pair that people get copies of, with names of their own."""

    float_path: Path
    quantized_path: Path
    inputs: tuple[Path, ...]


def light_sources() -> tuple[Source, ...]:
    """Pairs that are compared in a second or two; real ones as well where they are here."""
    digits = ROOT / "sample_models" / "digit-transformer"
    own = Source(
        float_path=digits / "float.onnx",
        quantized_path=digits / "quantized.onnx",
        inputs=(digits / "feeds.npz",),
    )
    return (own, *_shared("mlperf-kws-dscnn"), *_shared("mlperf-resnet8"))


def heavy_source() -> Source:
    """A pair whose searches take minutes; the smaller sample where it is not here."""
    return next(iter(_shared("ultraface-rfb320")), light_sources()[0])


def _shared(name: str) -> Iterator[Source]:
    folder = MODELS / name
    if folder.is_dir():
        yield Source(
            float_path=folder / "model.onnx",
            quantized_path=folder / "ort_static_qdq.onnx",
            inputs=tuple(sorted((folder / "inputs").glob("*.npz"))),
        )


def marked(path: Path, mark: str) -> onnx.ModelProto:
    """The model with the mark before all names of nodes and tensors, except those of its inputs."""
    proto = onnx.load(path)
    graph = proto.graph
    kept = {each.name for each in graph.input} | {""}

    def new(name: str) -> str:
        return name if name in kept else f"{mark}_{name}"

    for node in graph.node:
        assert not any(each.HasField("g") for each in node.attribute), "no graphs in graphs here"
        node.name = new(node.name)
        for names in (node.input, node.output):
            names[:] = [new(each) for each in names]
    for each in (*graph.initializer, *graph.output, *graph.value_info):
        each.name = new(each.name)
    for annotation in graph.quantization_annotation:
        annotation.tensor_name = new(annotation.tensor_name)
    return proto


def own_pair(source: Source, mark: str, folder: Path) -> tuple[Path, Path, list[Path]]:
    """The files of a person's pair: float model, quantized model, inputs."""
    folder.mkdir(parents=True, exist_ok=True)
    models = []
    for path, name in ((source.float_path, "float"), (source.quantized_path, "quantized")):
        models.append(folder / f"{mark}-{name}.onnx")
        onnx.save(marked(path, mark), models[-1])
    inputs = []
    for path in source.inputs:
        inputs.append(folder / f"{mark}-{path.name}")
        inputs[-1].write_bytes(path.read_bytes())
    return models[0], models[1], inputs


# ── people ───────────────────────────────────────────────────────────────────────────────────


@dataclass(kw_only=True)
class Diary:
    """What one person saw.

    Attributes:
        cached: seconds of each click that only shows what is computed already, by what it was.
        computed: seconds until the answer of a click that had to be computed was there.
        errors: what went wrong, and whose watermark was seen that should not have been.
        pages: whole pages that came.
        messages: that came.
        received_bytes: of them.
        runs: ids of the runs that were made and shown.
    """

    cached: dict[str, list[float]] = field(default_factory=dict)
    computed: dict[str, list[float]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    pages: int = 0
    messages: int = 0
    received_bytes: int = 0
    runs: list[str] = field(default_factory=list)


class Person(threading.Thread):
    """Somebody at work in a tab of theirs, until they are told to stop.

    Args:
        portal: where.
        address: who.
        files: float model, quantized model and inputs to upload first; None where a pair is there.
        seed: of what they do.
        thinking: shortest and longest time between two clicks, seconds.
    """

    def __init__(
        self,
        portal: Portal,
        address: str,
        *,
        seed: int,
        files: tuple[Path, Path, list[Path]] | None = None,
        thinking: tuple[float, float] = THINKING,
    ) -> None:
        super().__init__(name=address, daemon=True)
        self.address, self.diary = address, Diary()
        self.ready, self.stop = threading.Event(), threading.Event()
        self._portal, self._files, self._thinking = portal, files, thinking
        self._random = random.Random(seed)
        self._mark = watermark(address).encode()
        self._seen: set[tuple[str, ...]] = set()
        self._page = ""
        self._ticked = 0

    def run(self) -> None:
        try:
            with Visitor(
                self._portal.address, see=self._see, **self._portal.identity(self.address)
            ) as tab:
                self._tab = tab
                self._work()
        except Exception as error:  # what ends a person is what the test is about
            self.diary.errors.append(f"{self.address}: {type(error).__name__}: {error}")
        finally:
            self.ready.set()

    def _work(self) -> None:
        name = self.address.partition("@")[0].encode()
        assert name in self._tab.visit("models"), "not signed in"
        if self._files is not None:
            self._upload(*self._files)
        for page in ("overview", "tensors", "exclusions", "report"):
            self._open(page)
        self.ready.set()
        while not self.stop.is_set():
            time.sleep(self._random.uniform(*self._thinking))
            self._something()

    def _upload(self, float_model: Path, quantized: Path, inputs: list[Path]) -> None:
        self._page = "models"
        begin = time.perf_counter()
        self._tab.finish()
        self._tab.upload("upload-float", [float_model])
        self._tab.upload("upload-quantized", [quantized])
        self._check(self._tab.upload("upload-inputs", inputs))
        self._tab.finish()
        self.diary.computed.setdefault("upload", []).append(time.perf_counter() - begin)
        shown = self._computed("compare", lambda: self._tab.click("compare"))
        if "run" not in self._tab.query:
            seen = re.findall(rb"[ -~]{12,}", shown)[-60:]
            raise AssertionError(f"the new pair's overview did not open: {seen}")
        self.diary.runs.append(self._tab.query["run"])

    def _something(self) -> None:
        page = self._page
        chance = self._random.random()
        if page == "exclusions" and chance < 0.5:
            self._toggle()
        elif page == "exclusions" and chance < 0.6 and self._ticked % 2:
            self._requantize()
        elif page in ("overview", "tensors") and chance < 0.6:
            way = "next" if self._random.random() < 0.7 else "previous"
            self._measure(f"{page}: {way} tensor", lambda: self._tab.click(f"{page}-{way}"))
        else:
            self._open(self._random.choice([each for each in PAGES if each != page]))

    def _open(self, page: str) -> None:
        self._page = page
        self._measure(f"to {page}", lambda: self._tab.visit(page))

    def _measure(self, what: str, click: Callable[[], bytes]) -> None:
        """Clicks, and waits until the answer is there."""
        begin = time.perf_counter()
        shown = click()
        seconds = time.perf_counter() - begin
        # The same page of the same run and tensor was shown before: nothing is left to compute.
        view = (self._page, *(self._tab.query.get(each, "") for each in ("run", "tensor")))
        cached = view in self._seen or what.startswith("overview: ")
        # A list that is ticked has a preview of its own.
        cached = cached and not (self._page == "exclusions" and self._ticked % 2)
        if cached:
            self.diary.cached.setdefault(what, []).append(seconds)
        self._check(shown)
        shown = self._tab.finish()
        if not cached:
            self.diary.computed.setdefault(what, []).append(time.perf_counter() - begin)
        self._check(shown)
        self._seen.add(view)

    def _toggle(self) -> None:
        """Ticks or unticks a node of the table, and waits for the preview."""
        key = next(each for each in reversed(self._tab.ids) if each.startswith("nodes-"))
        self._ticked += 1
        row, on = (self._ticked // 2) % 5, self._ticked % 2 == 1
        edits = {"edited_rows": {str(row): {"float": on}}, "added_rows": [], "deleted_rows": []}
        self._computed(
            "tick with preview", lambda: self._tab.choose(key, string_value=json.dumps(edits))
        )

    def _requantize(self) -> None:
        before = self._tab.query.get("run", "")
        self._computed("re-quantize", lambda: self._tab.click("requantize"))
        run = self._tab.query.get("run", "")
        if run != before:
            self.diary.runs.append(run)
        self._seen.clear()

    def _computed(self, what: str, click: Callable[[], bytes]) -> bytes:
        begin = time.perf_counter()
        self._check(click())
        shown = self._tab.finish(120)
        self.diary.computed.setdefault(what, []).append(time.perf_counter() - begin)
        self._check(shown)
        return shown

    def _see(self, message: bytes) -> None:
        self.diary.messages += 1
        self.diary.received_bytes += len(message)
        for found in set(MARK.findall(message)):
            if found != self._mark:
                self.diary.errors.append(f"{self.address} was sent {found.decode()}")

    def _check(self, shown: bytes) -> None:
        """What has to hold for every page."""
        self.diary.pages += 1
        if self._mark not in shown:
            self.diary.errors.append(f"{self.address} on {self._page}: not their own page")
        self.diary.errors += [f"{self.address} on {self._page}: {e}" for e in self._tab.errors]
        self._tab.errors.clear()


class Heavy(Person):
    """Somebody with a long job: starts it, and looks at its page until told to stop."""

    def __init__(self, portal: Portal, address: str, *, page: str) -> None:
        super().__init__(portal, address, seed=0)
        self._job_page = page

    def _work(self) -> None:
        self._tab.visit(self._job_page)
        self._tab.finish()
        if self._job_page == "exclusions":
            self._tab.choose("exclusions-view", string_array_value={"data": ["Search"]})
            self._tab.finish()
            self._tab.choose("goal-value", double_value=200.0)
        self._begin()
        self.ready.set()
        while not self.stop.is_set():
            if self._tab.is_waiting:
                self._check(self._tab.tick())
            else:
                self._begin()
                time.sleep(1)

    def _begin(self) -> None:
        key = "start-search" if self._job_page == "exclusions" else "try-recipes"
        self._tab.click(key)
        self.diary.runs.append(self._job_page)


# ── the server, as the machine sees it ───────────────────────────────────────────────────────


class Watch(threading.Thread):
    """Memory and processor time of the web process, every two seconds until told to stop."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._process = process
        self.stop = threading.Event()
        self.memory: list[tuple[float, int]] = []

    def run(self) -> None:
        begin = time.monotonic()
        while not self.stop.wait(SAMPLE_SECONDS):
            self.memory.append((time.monotonic() - begin, self._process.memory_info().rss))

    def slope_mb_per_minute(self) -> float:
        """Of the second half: what comes before is the warm-up. NaN where there is no half."""
        half = [each for each in self.memory if each[0] > self.memory[-1][0] / 2]
        if len(half) < 3:
            return float("nan")
        seconds, found = zip(*half, strict=True)
        return float(np.polyfit(seconds, found, 1)[0]) * 60 / 1e6


def push_aside(workers: Sequence[psutil.Process]) -> None:
    """Binds processes to one core, behind everything else."""
    for process in workers:
        process.nice(19)
        for thread in process.threads():
            os.sched_setaffinity(thread.id, {max(os.sched_getaffinity(0))})
        os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(0))})


# ── the measurement ──────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Load:
    """What was measured.

    Attributes:
        alone: what one person saw on an idle server.
        people: what each saw of twenty.
        heavy: what the two with long jobs saw.
        watch: of the web process.
        seconds: from when all were at work until the first was told to stop.
        server_share: cores that the web process used meanwhile.
        client_share: cores that the client used.
        heavy_states: how the two long jobs stood at the end.
        problems: that the disk shows afterwards.
    """

    alone: Diary
    people: list[Diary]
    heavy: list[Diary]
    watch: Watch
    seconds: float
    server_share: float
    client_share: float
    heavy_states: list[str]
    problems: list[str]

    def errors(self) -> list[str]:
        diaries = (self.alone, *self.people, *self.heavy)
        return [*(each for diary in diaries for each in diary.errors), *self.problems]


def load(data: Path, *, people: int, seconds: float, seed: int, alone_seconds: float) -> Load:
    """Measures a portal of its own in an empty folder."""
    sources = light_sources()
    names = [f"person{at:02}@example.org" for at in range(people)]
    files = {
        name: own_pair(sources[at % len(sources)], watermark(name), data.parent / watermark(name))
        for at, name in enumerate(["alone@example.org", *names])
    }
    environment = {"QUANT_INSPECTOR_PROXY_SECRET": SECRET}
    log = data.parent / "server.log"
    with hosted.header_portal(data, environment=environment, log=log) as portal:
        assert portal.process is not None
        server = psutil.Process(portal.process.pid)
        first = "alone@example.org"
        alone = Person(portal, first, files=files[first], seed=seed, thinking=ALONE_THINKING)
        _at_work([alone], alone_seconds)
        before = server.children(recursive=True)
        heavy = []
        for page in ("exclusions", "recipes"):
            name = f"{page}@example.org"
            paths = own_pair(heavy_source(), watermark(name), data.parent / watermark(name))
            hosted.load_files(data, name, *paths)
            heavy.append(Heavy(portal, name, page=page))
            heavy[-1].start()
        for each in heavy:
            each.ready.wait()
        workers = [each for each in server.children(recursive=True) if each not in before]
        push_aside(workers)
        crowd = [
            Person(portal, name, files=files[name], seed=seed + at)
            for at, name in enumerate(names, 1)
        ]
        watch = Watch(server)
        watch.start()
        used, own = sum(server.cpu_times()[:2]), time.process_time()
        begin = time.monotonic()
        _at_work(crowd, seconds)
        lasted = time.monotonic() - begin
        used, own = sum(server.cpu_times()[:2]) - used, time.process_time() - own
        watch.stop.set()
        states = [f"{each.diary.runs[0]} started {len(each.diary.runs)} x" for each in heavy]
        for each in heavy:
            each.stop.set()
        for each in heavy:
            each.join(60)
    return Load(
        alone=alone.diary,
        people=[each.diary for each in crowd],
        heavy=[each.diary for each in heavy],
        watch=watch,
        seconds=lasted,
        server_share=used / lasted,
        client_share=own / lasted,
        heavy_states=states,
        problems=[*_problems(data, crowd), *complaints(log)],
    )


def _at_work(people: Sequence[Person], seconds: float) -> None:
    """Lets people work, and waits until the last has gone; nobody begins at the same moment."""
    for each in people:
        each.start()
        time.sleep(min(ARRIVAL_SECONDS, seconds / 40))
    for each in people:
        each.ready.wait()
    time.sleep(seconds)
    for each in people:
        each.stop.set()
    for each in people:
        each.join(180)
        if each.is_alive():
            each.diary.errors.append(f"{each.address} is stuck")


def _problems(data: Path, people: Sequence[Person]) -> list[str]:
    """What is not on disk as it was shown."""
    found = []
    for each in people:
        workspace = Workspace(workspace_of(data, each.address))
        found += [f"{each.address}: {error.message}" for error in workspace.unreadable()]
        for run in each.diary.runs:
            try:
                name = workspace.run(run).model.name
            except InspectorError as error:
                found.append(f"{each.address}: {error.message}")
            else:
                if watermark(each.address) not in name:
                    found.append(f"{each.address}: run {run} is of a model without their mark")
    return found


def complaints(log: Path) -> list[str]:
    """What the server's log holds of errors: the last line of each traceback, and what is said."""
    text = re.sub(r"\x1b\[[\d;]*m", "", log.read_text(encoding="utf-8", errors="replace"))
    said = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Warning)\b.*|.*\b(?:ERROR|CRITICAL)\b.*")
    return [f"log: {each[:300]}" for each in text.splitlines() if said.match(each)]


def pooled(diaries: Sequence[Diary], what: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for diary in diaries:
        for name, seconds in getattr(diary, what).items():
            found.setdefault(name, []).extend(seconds)
    return found


def measure(*, quick: bool) -> list[Figure]:
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        data.mkdir()
        size = {"people": 5, "seconds": 15.0, "alone_seconds": 6.0} if quick else {
            "people": 20, "seconds": 120.0, "alone_seconds": 30.0
        }  # fmt: skip
        return figures_of(load(data, seed=1, **size))  # type: ignore[arg-type]


def figures_of(found: Load) -> list[Figure]:
    """The table."""
    people = len(found.people)
    alone, loaded = pooled([found.alone], "cached"), pooled(found.people, "cached")
    before = [s for seconds in alone.values() for s in seconds]
    after = [s for seconds in loaded.values() for s in seconds]
    computed = pooled(found.people, "computed")
    clicks = sum(map(len, loaded.values())) + sum(map(len, computed.values()))
    subject = f"{people} people, {found.seconds:.0f} s"

    def line(what: str, measured: float | None, unit: str = "", **more: Any) -> Figure:
        return Figure(
            benchmark=NAME, subject=subject, what=what, measured=measured, unit=unit, **more
        )

    def spread(seconds: Sequence[float]) -> str:
        return f"95 % within {np.percentile(seconds, 95) * 1000:.0f} ms, n = {len(seconds)}"

    rows = [
        line("cached view, alone", statistics.median(before) * 1000, "ms", note=spread(before)),
        line("cached view, loaded", statistics.median(after) * 1000, "ms", note=spread(after)),
        line(
            "loaded / alone, medians", statistics.median(after) / statistics.median(before), "x",
            required=MOST_TIMES_UNLOADED,
            note=f"95th percentiles {np.percentile(after, 95) / np.percentile(before, 95):.2f} x",
        ),
    ]  # fmt: skip
    for name, seconds in sorted(loaded.items()):
        one = alone.get(name, [])
        note = f"alone {statistics.median(one) * 1000:.0f} ms (n = {len(one)}); " if one else ""
        rows.append(
            line(name, statistics.median(seconds) * 1000, "ms", note=note + spread(seconds))
        )
    for name, seconds in sorted(computed.items()):
        rows.append(
            line(f"{name}, computed", statistics.median(seconds), "s", note=spread(seconds))
        )
    errors = found.errors()
    peak = max((rss for _, rss in found.watch.memory), default=0)
    kinds = "; ".join(f"{n} x {text[:90]}" for text, n in Counter(errors).most_common(4))
    return [
        *rows,
        line(
            "errors, strangers' watermarks among them", len(errors), required=0,
            note=kinds or f"{sum(d.messages for d in found.people):,} messages, "
            f"{sum(d.received_bytes for d in found.people) / 1e6:.0f} MB searched",
        ),
        line("clicks a second", clicks / found.seconds, note=f"a click every {THINKING[0]:g} to "
             f"{THINKING[1]:g} s and person, after the answer; client: Streamlit's websocket"),
        line("memory of the web process, most", peak / 1e6, "MB", required=MOST_MEMORY / 1e6,
             note=", ".join(f"{rss / 1e6:.0f}" for _, rss in found.watch.memory[::8])),
        line("memory, second half", found.watch.slope_mb_per_minute(), "MB/min"),
        line("cores used by the web process", found.server_share,
             note=f"the client itself {found.client_share:.2f}"),
        line("long jobs beside", len(found.heavy), note="; ".join(found.heavy_states)
             + "; niced 19, one core"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.portal_load", description=__doc__)
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--alone", type=float, default=30.0, help="seconds of one person before")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if busy():
        print(busy())
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        data.mkdir()
        found = load(
            data, people=given.people, seconds=given.seconds, seed=given.seed,
            alone_seconds=given.alone,
        )  # fmt: skip
    for text, times in Counter(found.errors()).most_common(30):
        print(f"{times} x {text}")
    print_table(figures_of(found))


if __name__ == "__main__":
    main()
