"""The whole comparison against ONNX Runtime's debugger, time and peak memory.

The debugger's whole route: augment both models, collect the activations of both, match and
measure weights and activations. Each is run in a process of its own, and timed without imports.

python -m tests.benchmarks against_debugger
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from onnxruntime.quantization import qdq_loss_debug

from inspector.calibration import hushed
from inspector.compare import compare_models, feed_for_quantized
from inspector.feeds import load_feeds
from inspector.matching import match_tensors
from inspector.model_files import load_model
from inspector.runtime import open_session
from inspector.timing import measure_latency
from tests.benchmarks.harness import MODELS, Child, Figure, Seconds, in_child, processor_note, ratio
from tests.benchmarks.networks import FeedReader, Pair, feed_files, resnet50_pair

NAME = "against_debugger"
FASTER, MEMORY = 4.0, 0.3
MEGABYTE = 1e6


def our_comparison(float_path: str, quantized_path: str, feeds: str, samples: int) -> list[float]:
    """Wall and processor seconds from paths to the record."""
    begin, computed = time.perf_counter(), time.process_time()
    float_model = load_model(float_path)
    compare_models(
        float_model, load_model(quantized_path), load_feeds(feeds, float_model, limit=samples)
    )
    return [time.perf_counter() - begin, time.process_time() - computed]


def beyond_the_debugger(
    float_path: str, quantized_path: str, feeds: str, samples: int
) -> list[float]:
    """Wall and processor seconds of what a comparison does and the debugger does not.

    Both models opened as deployed, run on every sample and timed.
    """
    models = load_model(float_path), load_model(quantized_path)
    all_feeds = load_feeds(feeds, models[0], limit=samples)
    matching = match_tensors(*models)
    begin, computed = time.perf_counter(), time.process_time()
    sessions = [open_session(model, optimized=True) for model in models]
    for feed in all_feeds:
        for session, own in zip(sessions, (feed, feed_for_quantized(matching, feed)), strict=True):
            session.run(own)
    first = all_feeds[0]
    measure_latency(sessions, [first, feed_for_quantized(matching, first)])
    return [time.perf_counter() - begin, time.process_time() - computed]


def their_comparison(float_path: str, quantized_path: str, feeds: str, samples: int) -> list[float]:
    """Wall and processor seconds from paths to the errors of weights and activations."""
    files = feed_files(Path(feeds))[:samples]
    begin, computed = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as name, hushed():
        found = []
        for path in (float_path, quantized_path):
            augmented = Path(name) / f"{Path(path).stem}-augmented.onnx"
            qdq_loss_debug.modify_model_output_intermediate_tensors(path, augmented)
            found.append(qdq_loss_debug.collect_activations(str(augmented), FeedReader(files)))
        weights = qdq_loss_debug.create_weight_matching(float_path, quantized_path)
        qdq_loss_debug.compute_weight_error(weights)
        activations = qdq_loss_debug.create_activation_matching(found[1], found[0])
        qdq_loss_debug.compute_activation_error(activations)
    return [time.perf_counter() - begin, time.process_time() - computed]


def figures_of(
    subject: str, pair: Pair, samples: int, rounds: int, *, required: bool
) -> list[Figure]:
    """The lines of one pair."""
    arguments = (*map(str, pair), samples)
    works = {
        "ours": our_comparison,
        "theirs": their_comparison,
        "beyond": beyond_the_debugger,
    }
    both: dict[str, list[Child]] = {name: [] for name in works}
    for turn in range(rounds):
        for name in works if turn % 2 == 0 else [*works][::-1]:
            both[name].append(in_child(works[name], *arguments))
    seconds = {
        name: Seconds([c.result[0] for c in children], [c.result[1] for c in children])
        for name, children in both.items()
    }
    peak = {n: statistics.median(c.peak_bytes for c in children) for n, children in both.items()}
    subject = f"{subject}, {samples} samples"
    return [
        Figure(
            benchmark=NAME, subject=subject, what="qdq_loss_debug / whole comparison, seconds",
            measured=ratio(seconds["theirs"].wall, seconds["ours"].wall), unit="x",
            required=FASTER if required else None, at_least=True,
            note=processor_note(seconds["theirs"], seconds["ours"]),
        ),
        Figure(
            benchmark=NAME, subject=subject, what="whole comparison / qdq_loss_debug, peak memory",
            measured=peak["ours"] / peak["theirs"], unit="x",
            required=MEMORY if required else None,
        ),
        Figure(
            benchmark=NAME, subject=subject, unit="x",
            what="qdq_loss_debug / whole comparison without deployed runs, seconds",
            measured=statistics.median(seconds["theirs"].wall) / statistics.median(
                [a - b for a, b in zip(seconds["ours"].wall, seconds["beyond"].wall, strict=True)]
            ),
        ),
        *(
            Figure(
                benchmark=NAME, subject=subject, what=f"{what}, seconds", unit="s",
                measured=seconds[name].median,
                note=f"peak memory {peak[name] / MEGABYTE:,.0f} MB",
            )
            for name, what in (
                ("ours", "whole comparison"),
                ("beyond", "of it both models as deployed: opened, run, timed"),
                ("theirs", "qdq_loss_debug"),
            )
        ),
    ]  # fmt: skip


def measure(*, quick: bool) -> list[Figure]:
    found = figures_of("ResNet-50 shape", resnet50_pair(), 16, 1 if quick else 3, required=True)
    # Of the real pairs, these are some that the debugger gets through.
    for name in () if quick else ("minilm-l6", "mlperf-resnet8", "ultraface-rfb320"):
        folder = MODELS / name
        if folder.is_dir():
            pair = Pair(folder / "model.onnx", folder / "ort_static_qdq.onnx", folder / "inputs")
            found += figures_of(name, pair, len(feed_files(pair.feeds_folder)), 3, required=False)
    return found
