"""The search for an exclusion list against the loop that a user would write, and plain greedy.

Calibrated on all feeds, judged on the same, simulated, ONNX Runtime's defaults. The loop is
"quantize only this" for an order, bisect its prefix, put nodes back one at a time, over
`quantize_static` with cached ranges, a session and all feeds for each list. Greedy adds the node
that gains most; it is given our trials, so that it takes bearable time, and is stopped after so
many. Nothing runs twice.

python -m tests.benchmarks search
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from inspector.calibration import calibrate
from inspector.compare import compare_models
from inspector.feeds import Feeds, load_feeds, split_calibration
from inspector.model_files import load_model
from inspector.prepare import prepare
from inspector.quantize import quantize_model, quantizer_names
from inspector.recipe import QuantConfig
from inspector.search import find_exclusions
from inspector.search_result import Goal
from inspector.trials import Request, Trials, open_trials, quantized_nodes
from tests.benchmarks.harness import Figure, Unavailable, shared_model
from tests.benchmarks.subjects import Subject

NAME = "search"
GOAL_DB = 20.0
MOST_NODES = {"magika": 6, "fastestdet": 41}
OF_THE_LOOP = 1 / 3
GREEDY_TRIALS = 280

Evaluate = Callable[[Collection[str]], float]


def by_loop(names: list[str], figure: Evaluate) -> list[str]:
    """Only-this order, bisect, prune."""
    every = frozenset(names)
    order = sorted(names, key=lambda n: figure(every - {n}))
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if figure(order[:middle]) >= GOAL_DB:
            high = middle
        else:
            low = middle + 1
    found = order[:low]
    for name in reversed(order[:low]):
        fewer = [n for n in found if n != name]
        if figure(fewer) >= GOAL_DB:
            found = fewer
    return found


def by_greedy(names: list[str], figure: Evaluate, most: int) -> tuple[list[str], float, int]:
    """The list, its figure and how many lists were measured: always the node that gains most."""
    found: list[str] = []
    best, count = figure(found), 1
    while best < GOAL_DB and count + len(names) - len(found) <= most:
        gains = {n: figure([*found, n]) for n in names if n not in found}
        count += len(gains)
        node = max(gains, key=lambda n: gains[n])
        found.append(node)
        best = gains[node]
    return found, best, count


class Loop:
    """One list after the other with ONNX Runtime alone.

    Attributes:
        evaluations: lists that were measured, each once.
    """

    def __init__(self, subject: Subject, feeds: Feeds, names: dict[str, tuple[str, ...]]) -> None:
        self._subject, self._names = subject, names
        self._feeds = list(feeds)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._options = options
        self._reference = self._run(subject.path)
        self._known: dict[frozenset[str], float] = {}
        self._target = subject.path.with_name("list.onnx")

    @property
    def evaluations(self) -> int:
        return len(self._known)

    def _run(self, path: Path) -> list[list[Any]]:
        session = onnxruntime.InferenceSession(
            str(path), self._options, providers=["CPUExecutionProvider"]
        )
        return [session.run(None, feed) for feed in self._feeds]

    def figure(self, exclude: Collection[str]) -> float:
        """SQNR of the output in dB."""
        key = frozenset(exclude)
        if key not in self._known:
            nodes = [each for name in key for each in self._names[name]]
            self._subject.by_public_function(nodes, self._target)
            signal = noise = 0.0
            for reference, actual in zip(self._reference, self._run(self._target), strict=True):
                for a, b in zip(reference, actual, strict=True):
                    signal += float(np.square(a, dtype=np.float64).sum())
                    noise += float(np.square(a.astype(np.float64) - b).sum())
            self._known[key] = 10 * np.log10(signal / noise) if noise else np.inf
        return self._known[key]


def figures_of(name: str, folder: Path, *, quick: bool) -> list[Figure]:
    """The lines of one model."""
    home = shared_model(name)
    config = QuantConfig()
    model = load_model(home / "model.onnx")
    feeds = load_feeds(home / "inputs", model)
    split = split_calibration(feeds, feeds)
    cache = folder / "cache"
    prepared = prepare(model, config, cache)
    ranges = calibrate(prepared.model, feeds, cache=cache)

    begin, computed = time.perf_counter(), time.process_time()
    trials: Trials = open_trials(
        model, config, feeds, split, "output_sqnr_db", cache=cache, beside=True
    )
    names = list(quantized_nodes(trials, model))
    result = find_exclusions(
        trials, Goal.of(trials.metric, GOAL_DB), candidates=names, coarse_samples=4
    )
    ours, our_processor = time.perf_counter() - begin, time.process_time() - computed
    made = quantize_model(
        model, config, calibration=feeds, exclude=result.nodes, output=folder / "ours.onnx",
        cache=cache,
    )  # fmt: skip
    comparison = compare_models(
        model, load_model(made.path), feeds, measure_latency=False, explain_deployed=False
    )
    real = min(o.sqnr_db for o in comparison.outputs)

    assert prepared.model.path is not None
    path = folder / "prepared.onnx"
    path.write_bytes(prepared.model.path.read_bytes())
    subject = Subject(
        name=name, model=load_model(path), path=path, ranges=ranges.path, feeds=feeds,
        config=config,
    )  # fmt: skip
    own = {n: quantizer_names(prepared, [n], config) for n in names}
    begin, computed = time.perf_counter(), time.process_time()
    loop = Loop(subject, feeds, own)
    listed = by_loop(names, loop.figure)
    theirs, their_processor = time.perf_counter() - begin, time.process_time() - computed
    most = len(names) + 1 if quick else GREEDY_TRIALS
    before = trials.evaluations
    begin = time.perf_counter()
    greedy, greedy_db, count = by_greedy(
        names,
        lambda n: trials.figure(trials.measure(Request(exclude=frozenset(n)))),
        most,
    )
    greedy_seconds = time.perf_counter() - begin
    task = comparison.task
    return [
        Figure(
            benchmark=NAME, subject=name, what=f"nodes of the list for {GOAL_DB:g} dB",
            measured=len(result.nodes) if result.reached else np.inf,
            required=MOST_NODES[name],
            note=f"{result.after:.2f} dB, {result.evaluations} lists in {ours:.1f} s; "
            f"{100 * result.float_macs_fraction:.1f} % of the MACs in float",
        ),
        Figure(
            benchmark=NAME, subject=name, what="the list, re-quantized", measured=real, unit="dB",
            required=GOAL_DB, at_least=True,
            note="" if task is None
            else f"{round(task.top1_quantized * task.samples)} of {task.samples} right",
        ),
        Figure(
            benchmark=NAME, subject=name, what="search / loop over quantize_static",
            measured=ours / theirs, unit="x", required=OF_THE_LOOP,
            note=f"{our_processor / their_processor:.3g} x in processor time",
        ),
        Figure(
            benchmark=NAME, subject=name, what="nodes by the loop", measured=len(listed),
            note=f"{loop.figure(listed):.2f} dB, {loop.evaluations} lists in {theirs:.1f} s",
        ),
        Figure(
            benchmark=NAME, subject=name, what="nodes by plain greedy", measured=len(greedy),
            note=f"{greedy_db:.2f} dB after {count} lists "
            f"({trials.evaluations - before} of them run, {greedy_seconds:.1f} s, our trials)",
        ),
    ]  # fmt: skip


def measure(*, quick: bool) -> list[Figure]:
    found: list[Figure] = []
    for name in list(MOST_NODES)[: 1 if quick else None]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found += figures_of(name, Path(folder), quick=quick)
            except Unavailable as missing:
                found.append(
                    Figure(benchmark=NAME, subject=name, what="skipped", measured=None,
                           note=str(missing))
                )  # fmt: skip
    return found
