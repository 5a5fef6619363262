"""Seconds per sample of the comparison's activation pass, against the two bare runs.

Bare are the float and the quantized model with optimisations off, inputs in memory, outputs only.
They are run on each sample right before the comparison takes it, so that both see the same machine
whatever else it does; so are the deployed runs, which the comparison does as well and which are
taken off. The slope between 8 and 32 samples is the time of samples 9 to 32, one each: what is
paid once is not in it and is on lines of its own.

python -m tests.benchmarks activation_pass
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from inspector.compare import compare_models, feed_for_quantized
from inspector.feeds import Feeds, load_feeds
from inspector.matching import match_tensors
from inspector.model import Model
from inspector.model_files import load_model
from inspector.runtime import Feed, Session, open_session
from tests.benchmarks.harness import MODELS, Figure, Seconds, processor_note, ratio
from tests.benchmarks.networks import Pair, resnet50_pair, transformer_pair
from tests.benchmarks.subjects import RESNET50, SHARED

NAME = "activation_pass"
REQUIRED = 1.35

# How a message of `compare_models` begins, and the phase that lasts until the next message. What
# begins otherwise, after the last sample, are findings.
PHASES = {
    "matching": "set-up",
    "opening": "set-up",
    "comparing weights": "weights",
    "comparing sample": "pass",
    # Between two parts of one sample; a version that does not say so has it inside its passes.
    "running as deployed": "optimised run",
    "timing": "latency",
}


def phase_of(message: str) -> str:
    """The phase that begins with a message of `compare_models`."""
    return next((p for start, p in PHASES.items() if message.startswith(start)), "findings")


@dataclass(frozen=True, kw_only=True, slots=True)
class Runs:
    """Two sessions and the samples for them, to be run bare.

    Attributes:
        sessions: of the float and of the quantized model.
        samples: for each of the two, as many as wanted at most.
    """

    sessions: tuple[Session, Session]
    samples: Sequence[tuple[Feed, Feed]]

    def run(self, at: int, into: Seconds) -> None:
        """Runs both on one sample and keeps how long that took."""
        begin, computed = time.perf_counter(), time.process_time()
        for session, feed in zip(self.sessions, self.samples[at], strict=True):
            session.run(feed)
        into.processor.append(time.process_time() - computed)
        into.wall.append(time.perf_counter() - begin)


def bare_runs(float_model: Model, quantized_model: Model, feeds: Feeds, *, optimized: bool) -> Runs:
    """Both models opened and run once, so that no later run is the first."""
    matching = match_tensors(float_model, quantized_model)
    samples = [(feed, feed_for_quantized(matching, feed)) for feed in feeds]
    sessions = [open_session(m, optimized=optimized) for m in (float_model, quantized_model)]
    runs = Runs(sessions=(sessions[0], sessions[1]), samples=samples)
    runs.run(0, Seconds([], []))
    return runs


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One comparison.

    Attributes:
        once: wall seconds by phase, but for the pass.
        passes: of the activation pass, by sample.
        bare: of the two bare runs, by sample.
        deployed: of both models as deployed, by sample.
    """

    once: dict[str, float]
    passes: Seconds
    bare: Seconds
    deployed: Seconds


def measured(models: tuple[Model, Model], feeds: Feeds, bare: Runs, deployed: Runs) -> Measured:
    """A comparison that stands still before each sample for the other runs on it.

    Latency is left out: it is measured on its own.
    """
    once: dict[str, float] = {}
    plain, beside = Seconds([], []), Seconds([], [])
    # By sample: wall and processor seconds of the parts of its pass, and of its deployed runs.
    parts: dict[str, dict[str, list[float]]] = {"pass": {}, "optimised run": {}}
    message, begin, computed = "", 0.0, 0.0

    def progress(_fraction: float, next_message: str) -> None:
        nonlocal message, begin, computed
        lasted, spent = time.perf_counter() - begin, time.process_time() - computed
        phase, place = phase_of(message), message.partition("sample ")[2]
        if phase in parts:
            both = parts[phase].setdefault(place, [0.0, 0.0])
            both[0] += lasted
            both[1] += spent
        elif message:
            once[phase] = once.get(phase, 0.0) + lasted
        message = next_message
        starts = phase_of(message) == "pass"
        if starts and message.partition("sample ")[2] not in parts["pass"]:
            at = len(plain.wall)
            if at % 2:
                bare.run(at, plain)
            deployed.run(at, beside)
            # Its threads spin on for a while; no other run is to be slowed down by them.
            time.sleep(0.01)
            if not at % 2:
                bare.run(at, plain)
        begin, computed = time.perf_counter(), time.process_time()

    compare_models(*models, feeds, measure_latency=False, progress=progress)
    passes, shipped = (
        Seconds([both[0] for both in found.values()], [both[1] for both in found.values()])
        for found in (parts["pass"], parts["optimised run"])
    )
    if not shipped.wall:
        shipped = beside
        passes = Seconds(*(
            [whole - own for whole, own in zip(both, taken, strict=True)]
            for both, taken in zip(passes, shipped, strict=True)
        ))  # fmt: skip
    return Measured(once=once, passes=passes, bare=plain, deployed=shipped)


def _later(rounds: Sequence[Seconds], few: int) -> Seconds:
    """The samples of all rounds but for the first `few` of each."""
    return Seconds(
        [s for one in rounds for s in one.wall[few:]],
        [s for one in rounds for s in one.processor[few:]],
    )


def figures_of(subject: str, pair: Pair, *, few: int, many: int, rounds: int) -> list[Figure]:
    """The lines of one pair; samples are repeated where it has fewer than `many`."""
    models = load_model(pair.float_path), load_model(pair.quantized_path)
    feeds = load_feeds(pair.feeds_folder, models[0])
    feeds = feeds.subset([at % len(feeds) for at in range(many)])
    bare = bare_runs(*models, feeds, optimized=False)
    deployed = bare_runs(*models, feeds, optimized=True)
    all_rounds = [measured(models, feeds, bare, deployed) for _ in range(rounds)]
    passes = _later([one.passes for one in all_rounds], few)
    bare_ones = _later([one.bare for one in all_rounds], few)
    shipped = _later([one.deployed for one in all_rounds], few)
    of_sums = sum(passes.wall) / sum(bare_ones.wall)
    lines = [
        Figure(
            benchmark=NAME, subject=subject,
            what=f"slope {few} to {many} samples: activation pass / two bare runs",
            measured=ratio(passes.wall, bare_ones.wall), unit="x",
            required=REQUIRED if subject == RESNET50 else None,
            note=f"{processor_note(passes, bare_ones)}, {of_sums:.3g} x of the sums",
        ),
        *(
            Figure(benchmark=NAME, subject=subject, what=what, unit="ms",
                   measured=1000 * seconds.median)
            for what, seconds in (
                ("activation pass, per sample", passes),
                ("two bare runs, optimisations off, per sample", bare_ones),
                ("both models as deployed, per sample", shipped),
            )
        ),
    ]  # fmt: skip
    once = {"set-up": "set-up", "weights": "weights", "findings": "findings and records"}
    lines += [
        Figure(
            benchmark=NAME, subject=subject, what=f"{what}, once", unit="ms",
            measured=1000 * statistics.median(one.once.get(phase, 0.0) for one in all_rounds),
        )
        for phase, what in once.items()
    ]  # fmt: skip
    return lines


def measure(*, quick: bool) -> list[Figure]:
    if quick:
        return figures_of(RESNET50, resnet50_pair(), few=2, many=8, rounds=1)
    found = figures_of(RESNET50, resnet50_pair(), few=8, many=32, rounds=3)
    found += figures_of("transformer", transformer_pair(), few=4, many=12, rounds=2)
    for name in SHARED:
        folder = MODELS / name
        if folder.is_dir():
            pair = Pair(folder / "model.onnx", folder / "ort_static_qdq.onnx", folder / "inputs")
            found += figures_of(name, pair, few=8, many=32, rounds=1)
    return found
