"""What every Conv, Gemm and MatMul costs, against a loop over ONNX Runtime's public function.

The loop quantizes the prepared model once per node with `quantize_static`, its cache of ranges and
`nodes_to_quantize` (only this) or `nodes_to_exclude` (all without this), and runs each file on all
samples. The library opens its trials and measures the same; both start from the same prepared model
and ranges, without optimisations when they run.

python -m tests.benchmarks sensitivity
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnxruntime.quantization import QuantFormat, quantize_static

from inspector.calibration import calibrate, hushed
from inspector.feeds import CalibrationSplit, load_feeds
from inspector.metrics import decibels, powers
from inspector.model_files import load_model
from inspector.prepare import prepare
from inspector.quantize import QUANT_TYPES, extra_options
from inspector.recipe import COMPUTE_OPS, QuantConfig
from inspector.runtime import open_session
from tests.benchmarks.harness import (
    Figure,
    Unavailable,
    interleaved,
    library,
    processor_note,
    ratio,
    shared_model,
)
from tests.benchmarks.networks import CALIBRATED_ON, FOLDER, resnet50_pair
from tests.benchmarks.subjects import RESNET50

NAME = "sensitivity"
TIMES, WITHIN_DB = 5.0, 0.05
ONLY, WITHOUT = "only", "without"
SAMPLES = 8


class Both:
    """One model, measured in both ways."""

    def __init__(self, name: str, folder: Path, samples: int, every: int) -> None:
        """
        Args:
            name: of the model.
            folder: for files.
            samples: how many.
            every: only each so-manyth node.
        """
        if name == RESNET50:
            path, _, inputs = resnet50_pair()
        else:
            path, inputs = shared_model(name) / "model.onnx", shared_model(name) / "inputs"
        self.folder, self.config = folder, QuantConfig()
        self.model = load_model(path)
        self.feeds = load_feeds(inputs, self.model, limit=samples)
        self.cache = FOLDER / "cache"
        calibration = self.feeds.subset(range(min(CALIBRATED_ON, len(self.feeds))))
        self.split = CalibrationSplit(calibration=calibration, seen=(True,) * len(self.feeds))
        self.prepared = prepare(self.model, self.config, self.cache)
        self.ranges = calibrate(self.prepared.model, calibration, cache=self.cache).path
        taken = self.prepared.float_names
        self.nodes = {
            taken[node.name]: node.name
            for node in self.prepared.model.nodes
            if node.op_type in COMPUTE_OPS
        }
        self.nodes = dict(list(self.nodes.items())[::every])

    def by_loop(self, way: str) -> dict[str, float]:
        """The outputs' SQNR in dB by node, the public way."""
        held = list(self.feeds)
        session = open_session(self.model, optimized=False)
        reference = [session.run(feed) for feed in held]
        target = self.folder / "of-the-loop.onnx"
        found = {}
        for name, node in self.nodes.items():
            which = "nodes_to_quantize" if way == ONLY else "nodes_to_exclude"
            with hushed():
                quantize_static(
                    self.prepared.model.path, target, None,
                    quant_format=QuantFormat.QDQ,
                    activation_type=QUANT_TYPES[self.config.activation_type],
                    weight_type=QUANT_TYPES[self.config.weight_type],
                    calibration_cache_path=self.ranges,
                    extra_options=extra_options(self.config),
                    **{which: [node]},
                )  # fmt: skip
            quantized = open_session(target, optimized=False)
            sums: dict[str, Any] = {}
            for feed, wanted in zip(held, reference, strict=True):
                given = quantized.run(feed)
                for output, values in wanted.items():
                    sums[output] = sums.get(output, 0.0) + powers(values, given[output])
            found[name] = min(decibels(*each) for each in sums.values())
        return found

    def by_library(self, ways: Sequence[str]) -> dict[str, dict[str, float]]:
        """The same by way."""
        trials = library("trials").open_trials(
            self.model, self.config, self.feeds, self.split, "output_sqnr_db", cache=self.cache
        )
        table = library("sensitivity").measure_sensitivity(
            trials, self.model, self.nodes, ways=ways, coarse_samples=None
        )
        found: dict[str, dict[str, float]] = {way: {} for way in ways}
        for row in table.rows:
            if ONLY in ways:
                found[ONLY][row.name] = row.only["both"].figure
            if WITHOUT in ways:
                found[WITHOUT][row.name] = row.without.figure
        return found


def apart_db(first: dict[str, float], second: dict[str, float]) -> float:
    """How far two sides are apart at the most; infinity where one lacks a node."""
    if first.keys() != second.keys():
        return math.inf
    pairs = [(first[name], second[name]) for name in first]
    return max((0.0 if a == b else abs(a - b) for a, b in pairs), default=0.0)


def figures_of(
    name: str, ways: Sequence[str], folder: Path, *, samples: int, every: int, wanted: bool
) -> list[Figure]:
    """The lines of one model."""
    work = Both(name, folder, samples, every)
    subject = f"{name}, {len(work.nodes)} nodes, {len(work.feeds)} samples"
    found = []
    for way in ways:
        kept: dict[str, Any] = {}
        works = {
            "loop": lambda _, w=way, k=kept: k.update(loop=work.by_loop(w)),
            "library": lambda _, w=way, k=kept: k.update(library=work.by_library([w])[w]),
        }
        seconds = interleaved(works, 1)
        which = "only this quantized" if way == ONLY else "all without this"
        found += [
            Figure(
                benchmark=NAME, subject=subject, what=f"{which}: loop / library",
                measured=ratio(seconds["loop"].wall, seconds["library"].wall), unit="x",
                required=TIMES if wanted else None, at_least=True,
                note=processor_note(seconds["loop"], seconds["library"]),
            ),
            Figure(
                benchmark=NAME, subject=subject, what=f"{which}: figures apart at most",
                measured=apart_db(kept["loop"], kept["library"]), unit="dB", required=WITHIN_DB,
            ),
            *(
                Figure(benchmark=NAME, subject=subject, what=f"{which}: {side}",
                       measured=seconds[side].median, unit="s")
                for side in works
            ),
        ]  # fmt: skip
    return found


def measure(*, quick: bool) -> list[Figure]:
    library("sensitivity")
    every = 9 if quick else 1
    found: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        # With few nodes opening weighs more, so that the time is told and not judged.
        found += figures_of(
            RESNET50, [ONLY], Path(folder), samples=2 if quick else SAMPLES, every=every,
            wanted=not quick,
        )  # fmt: skip
        try:
            found += figures_of(
                "fastestdet", [ONLY, WITHOUT], Path(folder), samples=2 if quick else SAMPLES,
                every=every, wanted=False,
            )  # fmt: skip
        except Unavailable as missing:
            found.append(
                Figure(benchmark=NAME, subject="fastestdet", what="skipped", measured=None,
                       note=str(missing))
            )  # fmt: skip
    return found
