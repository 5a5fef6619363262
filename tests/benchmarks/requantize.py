"""Quantizing again after a toggle: the in-memory route against `quantize_static`.

Both have the ranges already. `quantize_static` reads the model and the cached ranges and writes a
file, as it must; the in-memory route has been opened before, which is on a line of its own. The
dry run (`plan`) takes the same lists.

python -m tests.benchmarks requantize
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from tests.benchmarks.harness import (
    Figure,
    Unavailable,
    interleaved,
    library,
    processor_note,
    ratio,
)
from tests.benchmarks.subjects import RESNET50, subject

NAME = "requantize"
REQUIRED = {RESNET50: 0.5, "fastestdet": 0.3, "gtcrn": 0.3}
DRY_RUN = 0.15


def figures_of(name: str, folder: Path, rounds: int) -> list[Figure]:
    """The lines of one model."""
    work = subject(name, folder)
    begin = time.perf_counter()
    quantizer = work.quantizer()
    opened = time.perf_counter() - begin
    lists = work.lists(rounds + 1)
    target = folder / "by-public-function.onnx"
    quantizer.quantize(lists[-1])
    quantizer.plan(lists[-1])
    seconds = interleaved(
        {
            "public": lambda turn: work.by_public_function(lists[turn], target),
            "in memory": lambda turn: quantizer.quantize(lists[turn]),
            "dry run": lambda turn: quantizer.plan(lists[turn]),
        },
        rounds,
    )
    shown = {
        "public": "quantize_static, warm cache",
        "in memory": "in-memory re-quantization",
        "dry run": "dry run",
    }
    return [
        Figure(
            benchmark=NAME, subject=name, what="in-memory re-quantization / quantize_static",
            measured=ratio(seconds["in memory"].wall, seconds["public"].wall), unit="x",
            required=REQUIRED[name],
            note=processor_note(seconds["in memory"], seconds["public"]),
        ),
        Figure(
            benchmark=NAME, subject=name, what="dry run / in-memory re-quantization",
            measured=ratio(seconds["dry run"].wall, seconds["in memory"].wall), unit="x",
            required=DRY_RUN,
            note=processor_note(seconds["dry run"], seconds["in memory"]),
        ),
        *(
            Figure(
                benchmark=NAME, subject=name, what=what, unit="ms",
                measured=1000 * seconds[key].median,
            )
            for key, what in shown.items()
        ),
        Figure(benchmark=NAME, subject=name, what="opening the in-memory quantizer, once",
               measured=1000 * opened, unit="ms"),
    ]  # fmt: skip


def measure(*, quick: bool) -> list[Figure]:
    library("quantizer")
    found: list[Figure] = []
    for name in REQUIRED:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found += figures_of(name, Path(folder), 3 if quick else 15)
            except Unavailable as missing:
                found.append(
                    Figure(benchmark=NAME, subject=name, what="skipped", measured=None,
                           note=str(missing))
                )  # fmt: skip
    return found
