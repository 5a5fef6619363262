"""How the time to compare, to quantize again and to plan grows with the nodes of a model.

Chains of 500 to 5,000 nodes with the same work per node; the exponent k of the power law
``seconds = c * nodes**k`` says how: 1 is linear, 2 quadratic.

python -m tests.benchmarks growth
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
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


def lines_of(what: str, works: Mapping[int, Callable[[int], Any]], rounds: int) -> list[Figure]:
    """The exponent of one kind of work, and its seconds by number of nodes.

    The smallest is run once before, so that it does not pay for what every first run pays.
    """
    first = min(works)
    works[first](rounds)
    named = {str(size): work for size, work in works.items()}
    seconds = interleaved(named, rounds)
    median = {size: seconds[str(size)].median for size in works}
    computed = [statistics.median(seconds[str(size)].processor) for size in works]
    subject = f"{first:,} to {max(works):,} nodes"
    note = f"{growth_exponent([*works], computed):.2f} in processor time; "
    note += ", ".join(f"{size:,}: {value:.3g} s" for size, value in median.items())
    return [
        Figure(
            benchmark=NAME, subject=subject, what=f"{what}, exponent of growth", required=REQUIRED,
            measured=growth_exponent([*median], [*median.values()]), note=note,
        )
    ]  # fmt: skip


def _compare(models: tuple[Model, Model], feeds: Feeds, _turn: int) -> None:
    compare_models(*models, feeds, measure_latency=False, explain_deployed=False)


def _quantizing(subjects: dict[int, Subject], rounds: int) -> list[Figure]:
    quantizers = {size: subject.quantizer() for size, subject in subjects.items()}
    lists = {size: subject.lists(rounds + 1) for size, subject in subjects.items()}

    def work(method: str, size: int, turn: int) -> None:
        getattr(quantizers[size], method)(lists[size][turn])

    found: list[Figure] = []
    for method, what in (("quantize", "in-memory re-quantization"), ("plan", "dry run")):
        found += lines_of(what, {size: partial(work, method, size) for size in subjects}, rounds)
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
            works[size] = partial(_compare, models, feeds)
        found = lines_of(f"comparison of {SAMPLES} samples", works, 2)
        try:
            found += _quantizing(subjects, 2 if quick else 5)
        except Unavailable as missing:
            found.append(
                Figure(benchmark=NAME, subject="", what="re-quantize, dry run: skipped",
                       measured=None, note=str(missing))
            )  # fmt: skip
    return found
