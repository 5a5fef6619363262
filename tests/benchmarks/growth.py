"""How the time to compare, to quantize again and to plan grows with the nodes of a model.

Chains of 500 to 5,000 nodes with the same work per node; the exponent k of the power law
``seconds = c * nodes**k`` says how: 1 is linear, 2 quadratic.

python -m tests.benchmarks growth
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from inspector.compare import compare_models
from inspector.feeds import Feeds
from inspector.model import Model
from inspector.model_files import load_model
from tests.benchmarks.harness import Figure, Unavailable, growth_exponent, interleaved
from tests.benchmarks.networks import chain_pair
from tests.benchmarks.subjects import Subject, chain_subject

NAME = "growth"
REQUIRED = 1.15
SAMPLES = 2
# How `compare_models` says that it waits for the runtime.
OPENING = "opening sessions"


def _exponent(
    what: str, seconds: Mapping[int, float], note: str = "", *, required: float | None = REQUIRED
) -> Figure:
    """The exponent of one kind of work, and its seconds by number of nodes."""
    return Figure(
        benchmark=NAME, subject=f"{min(seconds):,} to {max(seconds):,} nodes",
        what=f"{what}, exponent of growth", required=required,
        measured=growth_exponent([*seconds], [*seconds.values()]),
        note=note + ", ".join(f"{size:,}: {value:.3g} s" for size, value in seconds.items()),
    )  # fmt: skip


def calls_of(work: Callable[[], Any]) -> int:
    """How many functions are called, Python's and those of its extensions."""
    count = 0

    def called(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(called)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def lines_of(what: str, works: Mapping[int, Callable[[int], Any]], rounds: int) -> list[Figure]:
    """The line of one kind of work.

    The smallest is run once before, so that it does not pay for what every first run pays.
    """
    works[min(works)](rounds)
    seconds = interleaved({str(size): work for size, work in works.items()}, rounds)
    computed = [statistics.median(seconds[str(size)].processor) for size in works]
    note = f"{growth_exponent([*works], computed):.2f} in processor time; "
    return [_exponent(what, {size: seconds[str(size)].median for size in works}, note)]


@dataclass(frozen=True, slots=True)
class _Comparison:
    """A comparison that notes how long the runtime took to open its sessions.

    Attributes:
        models: float and quantized.
        feeds: of the float model.
        whole, opening: seconds of each call, one after the other.
    """

    models: tuple[Model, Model]
    feeds: Feeds
    whole: list[float] = field(default_factory=list)
    opening: list[float] = field(default_factory=list)

    def __call__(self, _turn: int) -> None:
        begin, message = time.perf_counter(), ""
        marks: dict[str, float] = {}

        def progress(_fraction: float, next_message: str) -> None:
            nonlocal message
            marks[f"end of {message}"] = time.perf_counter()
            message = next_message
            marks.setdefault(message, time.perf_counter())

        compare_models(
            *self.models, self.feeds, measure_latency=False, explain_deployed=False,
            progress=progress,
        )  # fmt: skip
        self.whole.append(time.perf_counter() - begin)
        self.opening.append(marks[f"end of {OPENING}"] - marks[OPENING])


def _comparing(works: Mapping[int, _Comparison], rounds: int) -> list[Figure]:
    """The lines of comparing: the whole, the runtime's opening of four sessions, and the rest."""
    what = f"comparison of {SAMPLES} samples"
    found = lines_of(what, works, rounds)
    for part, seconds_of, required in (
        ("opening the sessions", lambda w: w.opening, None),
        ("the rest", lambda w: [a - b for a, b in zip(w.whole, w.opening, strict=True)], REQUIRED),
    ):
        medians = {n: statistics.median(seconds_of(w)[-rounds:]) for n, w in works.items()}
        found.append(_exponent(f"{what}: {part}", medians, required=required))
    return found


def _quantizing(subjects: dict[int, Subject], rounds: int) -> list[Figure]:
    quantizers = {size: subject.quantizer() for size, subject in subjects.items()}
    lists = {size: subject.lists(rounds + 1) for size, subject in subjects.items()}

    def work(method: str, size: int, turn: int) -> None:
        getattr(quantizers[size], method)(lists[size][turn])

    found: list[Figure] = []
    for method, what in (("quantize", "in-memory re-quantization"), ("plan", "dry run")):
        works = {size: partial(work, method, size) for size in subjects}
        found += lines_of(what, works, rounds)
        # What is left above 1 in the seconds is memory that no cache holds any more.
        calls = {size: calls_of(partial(each, rounds)) for size, each in works.items()}
        found.append(
            Figure(
                benchmark=NAME, subject=found[-1].subject,
                what=f"{what}: function calls, exponent of growth", required=REQUIRED,
                measured=growth_exponent([*calls], [*calls.values()]),
                note=", ".join(f"{size:,}: {count:,}" for size, count in calls.items()),
            )
        )  # fmt: skip
    return found


def measure(*, quick: bool) -> list[Figure]:
    sizes = (100, 200, 400) if quick else (500, 1000, 2000, 5000)
    pairs = {size: chain_pair(size) for size in sizes}
    with tempfile.TemporaryDirectory() as name:
        subjects = {size: chain_subject(size, pair, Path(name)) for size, pair in pairs.items()}
        works = {}
        for size, pair in pairs.items():
            models = load_model(pair.float_path), load_model(pair.quantized_path)
            feeds = subjects[size].feeds.subset(range(SAMPLES))
            works[size] = _Comparison(models, feeds)
        found = _comparing(works, 2)
        try:
            found += _quantizing(subjects, 2 if quick else 5)
        except Unavailable as missing:
            found.append(
                Figure(benchmark=NAME, subject="", what="re-quantize, dry run: skipped",
                       measured=None, note=str(missing))
            )  # fmt: skip
    return found
