"""The preview of a toggle on one feed, against running the model once and against quantizing again.

A preview is deriving the list's inputs, setting them and running the switchboard. Quantizing again
is in memory, with a session (optimisations off) and a run; beside it the same by ONNX Runtime's
public function with a warm cache. All take the same lists, each one node away from the one before.
No preview is faster than one run, so that what a run takes of quantizing again is the floor.

python -m tests.benchmarks toggle
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inspector.errors import InspectorError
from inspector.runtime import Feed, open_session
from tests.benchmarks.harness import (
    Figure,
    Unavailable,
    interleaved,
    library,
    processor_note,
    ratio,
)
from tests.benchmarks.subjects import RESNET50, SHARED, subject

NAME = "toggle"
# Of one bare simulated run.
OF_A_RUN = {RESNET50: 1.3}
# Of quantizing again, with session and run.
OF_REQUANTIZING = {"magika": 0.5}
ELSEWHERE = 0.25


def previewer(quantizer: Any) -> Callable[[Sequence[str], Feed], Any]:
    """What gives the outputs for an exclusion list and a feed; the one place that knows how."""
    board = library("switchboard").Switchboard(quantizer)
    return lambda exclude, feed: board.run(board.plan_of(exclude), feed)


def figures_of(name: str, folder: Path, rounds: int) -> list[Figure]:
    """The lines of one model."""
    work = subject(name, folder)
    quantizer = work.quantizer()
    refused = (InspectorError, library("quantizer").UnplannableError)
    begin = time.perf_counter()
    try:
        preview = previewer(quantizer)
    except refused as error:
        raise Unavailable(f"no switchboard: {error}") from error
    opened = time.perf_counter() - begin
    feed = work.feeds[0]
    bare = open_session(quantizer.quantize(()), optimized=False)
    lists = work.lists(rounds + 1)

    def again(turn: int) -> None:
        open_session(quantizer.quantize(lists[turn]), optimized=False).run(feed)

    target = folder / "by-public-function.onnx"

    def by_public_function(turn: int) -> None:
        work.by_public_function(lists[turn], target)
        open_session(target, optimized=False).run(feed)

    works = {
        "preview": lambda turn: preview(lists[turn], feed),
        "run": lambda _: bare.run(feed),
        "again": again,
        "public": by_public_function,
    }
    preview(lists[-1], feed)
    bare.run(feed)
    seconds = interleaved(works, rounds)
    shown = {
        "preview": "preview of a toggle, 1 feed",
        "run": "one bare simulated run",
        "again": "in-memory re-quantization, session and run",
        "public": "quantize_static with a warm cache, session and run",
    }
    return [
        Figure(
            benchmark=NAME, subject=name, what="preview / one bare simulated run",
            measured=ratio(seconds["preview"].wall, seconds["run"].wall), unit="x",
            required=OF_A_RUN.get(name),
            note=processor_note(seconds["preview"], seconds["run"]),
        ),
        Figure(
            benchmark=NAME, subject=name, what="preview / re-quantize, session and run",
            measured=ratio(seconds["preview"].wall, seconds["again"].wall), unit="x",
            required=None if name in OF_A_RUN else OF_REQUANTIZING.get(name, ELSEWHERE),
            note=processor_note(seconds["preview"], seconds["again"]),
        ),
        Figure(
            benchmark=NAME, subject=name, what="one run / re-quantize, session and run (floor)",
            measured=ratio(seconds["run"].wall, seconds["again"].wall), unit="x",
        ),
        Figure(
            benchmark=NAME, subject=name, what="preview / quantize_static, session and run",
            measured=ratio(seconds["preview"].wall, seconds["public"].wall), unit="x",
        ),
        *(
            Figure(
                benchmark=NAME, subject=name, what=what, unit="ms",
                measured=1000 * seconds[key].median,
            )
            for key, what in shown.items()
        ),
        Figure(benchmark=NAME, subject=name, what="opening the switchboard, once",
               measured=1000 * opened, unit="ms"),
    ]  # fmt: skip


def measure(*, quick: bool) -> list[Figure]:
    library("switchboard")
    found: list[Figure] = []
    for name in (RESNET50, "fastestdet", "gtcrn") if quick else (RESNET50, *SHARED):
        with tempfile.TemporaryDirectory() as folder:
            try:
                found += figures_of(name, Path(folder), 3 if quick else 15)
            except Unavailable as missing:
                found.append(
                    Figure(benchmark=NAME, subject=name, what="skipped", measured=None,
                           note=str(missing))
                )  # fmt: skip
    return found
