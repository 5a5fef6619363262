"""Float against quantized: every matched weight, activation and output, streamed over the feeds.

Activations never outlive their sample: only sums are kept (`watches`). Nothing is left out
silently: what no figure speaks of is in `Comparison.unmatched`, `skipped` or `not_observed`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.arrays import counted, listed, nearest, printable
from inspector.batches import BatchSide, batch_warnings, measure_batch
from inspector.comparison import (
    ActivationError,
    BatchEffect,
    Comparison,
    DeviceError,
    Latency,
    MatchCounts,
    ModelFile,
    OutputError,
    Pin,
    Skipped,
    TaskFigure,
    Unmatched,
    WeightError,
)
from inspector.content import ELEMENTS, Summary
from inspector.devices import DeviceWatch, Dump, fitted, match_names
from inspector.equalize import CHECKED_FEEDS, comparable_float, equal_db
from inspector.errors import FeedError, ModelError, QuantizationError, RunError
from inspector.feeds import Feeds
from inspector.folding import constant_value
from inspector.isolation import Isolation
from inspector.kernels import find_transformer
from inspector.layouts import OutputLayouts
from inspector.matching import (
    Matching,
    Observed,
    match_tensors,
    to_observe,
)
from inspector.metrics import ErrorTotals, worst_and_median
from inspector.model import FLOAT_DTYPES, Model, Node
from inspector.nonfinite import NonFiniteTrace, has_nonfinite, nonfinite_warning
from inspector.padding import Padding
from inspector.pairs import PairRunner, feed_for_quantized
from inspector.runtime import CPU, Feed, Progress, Session, no_progress, open_session, part_of
from inspector.scheme import COMPUTES_IN_INTEGERS, QuantFormat, quant_formats, stored_values
from inspector.states import Carried, States, check_states, likely_states
from inspector.task_metrics import MetricWatch, TaskMetric
from inspector.timing import measure_latency as time_sessions
from inspector.twin import Reducer
from inspector.watches import (
    DIFFERENT_STEPS,
    OutputWatch,
    TaskWatch,
    TensorWatch,
    plain,
    real_values,
    scale_and_zero_point,
)
from inspector.weights import WeightPair

__all__ = [
    "PairRunner",
    "check_pair",
    "compare_models",
    "compare_weights",
    "feed_for_quantized",
    "model_file",
    "plain",
]

# Samples whose values are looked at to find partners by content: as few as give each tensor so
# many elements, and at most so many.
OBSERVED_ELEMENTS = 4096
OBSERVED_SAMPLES = 3
# A weight below the first, in dB, is suspected to hold a factor where what its node computes is
# better than it by the second.
BROKEN_DB = 10.0
HEALTHIER_DB = 15.0
# Nodes behind a weight's own that are looked at for what they compute.
_CHAIN = 8

# -- weights -----------------------------------------------------------------------------------


def _stored(
    pair: WeightPair, quantized_model: Model
) -> tuple[NDArray[Any] | None, str, int | None]:
    """What the quantized model holds in a weight's place, its type and the axis of its scales."""
    if pair.quantized is None:
        bodies = (b for b in quantized_model.bodies if b.path == pair.scope)
        graph = next(bodies, None) if pair.scope else quantized_model
        actual = None if graph is None else constant_value(graph, pair.quantized_name)
        return actual, "" if actual is None else str(actual.dtype.name), None
    qparams = pair.quantized.qparams
    return stored_values(quantized_model, pair.quantized), qparams.dtype, qparams.axis


def _worst_copy(pair: WeightPair, quantized_model: Model) -> WeightError | Unmatched:
    """A weight's record: of the worst copy, where the quantized model stores several."""
    found = [_weight_error(own, quantized_model) for own in (pair, *pair.copies)]
    if len(found) == 1:
        return found[0]
    errors = [f for f in found if isinstance(f, WeightError)]
    lost = [f.reason for f in found if isinstance(f, Unmatched)]
    if not errors:
        return found[0]
    worst = min(errors, key=lambda e: -np.inf if np.isnan(e.sqnr_db) else e.sqnr_db)
    notes = [
        f"also stored as {e.quantized_name} for {e.node}: "
        + ("exact" if e.sqnr_db == np.inf else f"{e.sqnr_db:.1f} dB")
        for e in errors
        if e is not worst
    ]
    return replace(worst, note="; ".join(n for n in (worst.note, *notes, *lost) if n))


def _weight_error(pair: WeightPair, quantized_model: Model) -> WeightError | Unmatched:
    reference = pair.reference()
    actual, dtype, axis = _stored(pair, quantized_model)
    qparams = pair.quantized.qparams if pair.quantized is not None else None
    if actual is None:
        reason = f"the values of {pair.quantized_name} cannot be read"
        return Unmatched(name=pair.name, kind=pair.kind, model="float", reason=reason)
    if actual.shape != reference.shape:
        reason = f"shapes differ: float {reference.shape}, quantized {actual.shape}"
        return Unmatched(name=pair.name, kind=pair.kind, model="float", reason=reason)
    channel_axis = pair.channel_axis if pair.channel_axis is not None else axis
    totals = ErrorTotals.of(reference, actual, channel_axis)
    channels = totals.channel_sqnr_db if channel_axis is not None else np.array([])
    worst, median, worst_channel = worst_and_median(channels)
    absmax: tuple[float, ...] = ()
    if channel_axis is not None and reference.size:
        others = tuple(a for a in range(reference.ndim) if a != channel_axis)
        absmax = tuple(np.abs(reference.astype(np.float64)).max(axis=others).tolist())
    scale, zero_point = scale_and_zero_point(qparams)
    return WeightError(
        name=pair.name,
        node=pair.node.name,
        op_type=pair.node.op_type,
        kind=pair.kind,
        quantized_name=pair.quantized_name,
        dtype=dtype,
        shape=tuple(reference.shape),
        axis=axis,
        channel_axis=channel_axis,
        scale=scale,
        zero_point=zero_point,
        sqnr_db=totals.sqnr_db,
        worst_channel_sqnr_db=worst,
        median_channel_sqnr_db=median,
        worst_channel=worst_channel,
        channel_sqnr_db=tuple(channels.tolist()),
        channel_absmax=absmax,
        max_abs_error=totals.max_abs_error,
        mse=totals.mse,
        cosine_similarity=totals.cosine_similarity,
        matched_by=pair.matched_by,
        note="; ".join(
            n for n in (pair.note, pair.quantized.note if pair.quantized is not None else "") if n
        ),
        scope=pair.scope,
    )


def compare_weights(
    matching: Matching, quantized_model: Model
) -> tuple[tuple[WeightError, ...], tuple[Unmatched, ...]]:
    """Every matched weight and bias, and those that could not be compared after all."""
    found = [_worst_copy(pair, quantized_model) for pair in matching.weights]
    main_graph = set(matching.float_tensors)
    return (
        tuple(
            replace(w, in_body=w.name not in main_graph)
            for w in found
            if isinstance(w, WeightError)
        ),
        tuple(w for w in found if isinstance(w, Unmatched)),
    )


def _explained(
    weights: Sequence[WeightError],
    matching: Matching,
    float_model: Model,
    quantized_model: Model,
    activations: Mapping[str, float],
) -> tuple[WeightError, ...]:
    """Weights that look broken and are multiples of the float ones, with a note that says so.

    Args:
        weights: all records.
        matching: of the two models.
        float_model: what holds the nodes.
        quantized_model: what holds the weights.
        activations: accumulated SQNR by float tensor.
    """
    pairs: dict[tuple[str, str, str, str], WeightPair] = {}
    for pair in matching.weights:
        for own in (pair, *pair.copies):
            pairs[own.name, own.scope, own.quantized_name, own.node.name] = own
    found = []
    for weight in weights:
        own = pairs[weight.name, weight.scope, weight.quantized_name, weight.node]
        note = ""
        if weight.sqnr_db < BROKEN_DB:
            best = max((activations.get(n, -np.inf) for n in _behind(own.node, float_model)),
                       default=-np.inf)  # fmt: skip
            folded = bool(best >= weight.sqnr_db + HEALTHIER_DB)
            note = _factor_note(own, quantized_model, weight.channel_axis, folded)
        notes = "; ".join(n for n in (weight.note, note) if n)
        found.append(replace(weight, note=notes) if note else weight)
    return tuple(found)


def _behind(node: Node, model: Model) -> list[str]:
    """The outputs of a node and of the few behind it."""
    found = dict.fromkeys(o for o in node.outputs if o)
    for name in found.copy():
        front = [name]
        for _ in range(_CHAIN):
            front = [o for n in front for c in model.consumers.get(n, ()) for o in c.outputs if o]
            front = [o for o in dict.fromkeys(front) if o not in found]
            found.update(dict.fromkeys(front))
    return list(found)


def _factor_note(pair: WeightPair, quantized_model: Model, axis: int | None, folded: bool) -> str:
    """Says that a weight is the float one times a factor; "" where it is not.

    Args:
        pair: of the weight.
        quantized_model: what holds it.
        axis: the output-channel axis.
        folded: what is computed with it is right, so that the factor belongs there.
    """
    reference, actual = pair.reference(), _stored(pair, quantized_model)[0]
    if actual is None or reference.size < 2:
        return ""
    reference, actual = reference.astype(np.float64), actual.astype(np.float64)
    sides: list[int | None] = [None]
    if axis is not None and 1 < reference.shape[axis] < reference.size:
        sides.append(axis)
    for side in sides:
        others = tuple(a for a in range(reference.ndim) if a != side)
        power = (reference * reference).sum(axis=others, keepdims=True)
        gain = (reference * actual).sum(axis=others, keepdims=True) / np.where(power, power, 1.0)
        after = ErrorTotals.of(reference * gain, actual).sqnr_db
        if not after >= BROKEN_DB + HEALTHIER_DB or np.any((gain == 0) & (power > 0)):
            continue
        if side is None:
            what = f"{gain.item():.4g} times the float weight"
            what += ": a factor was folded into it" if folded else ""
        else:
            what = f"each channel is the float one times {gain.min():.4g} to {gain.max():.4g}"
            what += ": factors were folded into it" if folded else ""
        return f"{what} ({after:.1f} dB after that)"
    return ""


# -- what may be compared ----------------------------------------------------------------------


def check_pair(float_model: Model, quantized_model: Model) -> None:
    """Refuses two files that cannot be a float model and its quantized twin.

    Shapes of inputs are judged once it is known which input is which, and in which layout.

    Raises:
        ModelError: the same file twice, the two swapped, or a float side that is quantized.
    """
    left, right = quant_formats(float_model), quant_formats(quantized_model)
    if float_model.sha256 and float_model.sha256 == quantized_model.sha256:
        raise ModelError(
            f"{float_model.name} and {quantized_model.name} hold the same bytes, "
            "expected a float model and its quantized twin",
            hint="Name the float file first and the quantized file second.",
        )
    if COMPUTES_IN_INTEGERS.intersection(left):
        swapped = not COMPUTES_IN_INTEGERS.intersection(right)
        raise ModelError(
            f"the float model {float_model.name} is quantized ({'+'.join(left)})"
            + (f" and {quantized_model.name} is not: they are swapped" if swapped else ""),
            hint="Name the float file first and the quantized file second.",
        )
    if len(float_model.inputs) != len(quantized_model.inputs):
        raise ModelError(
            f"{float_model.name} has {len(float_model.inputs)} inputs "
            f"({', '.join(i.name for i in float_model.inputs)}), {quantized_model.name} has "
            f"{len(quantized_model.inputs)} ({', '.join(i.name for i in quantized_model.inputs)})",
            hint="Load the float model that this quantized model was made from.",
        )


def _check_inputs(float_model: Model, quantized_model: Model, matching: Matching) -> None:
    """Refuses inputs of different shapes; another layout is no difference.

    Raises:
        ModelError: naming the input.
    """
    for info in float_model.inputs:
        twin = quantized_model.info(matching.inputs.get(info.name, info.name))
        if info.shape is None or twin.shape is None:
            continue
        conversion = matching.conversions.get(info.name)
        order = conversion.permutation if conversion is not None else None
        shape = info.shape if order is None else tuple(info.shape[a] for a in order)
        if len(shape) != len(twin.shape) or any(
            isinstance(a, int) and isinstance(b, int) and a != b
            for a, b in zip(shape, twin.shape, strict=True)
        ):
            raise ModelError(
                f"input {info.name}: {float_model.name} takes {list(info.shape)}, "
                f"{quantized_model.name} takes {list(twin.shape)}",
                hint="Load two models of the same input shape.",
            )


def _check_related(float_model: Model, quantized_model: Model, matching: Matching) -> None:
    weighted = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (1,), "MatMul": (0, 1)}
    names = {
        node.inputs[at]
        for node in float_model.nodes
        for at in weighted.get(node.op_type, ())
        if at < len(node.inputs)
        and node.inputs[at] in float_model.constant_names
        and float_model.info(node.inputs[at]).dtype in (*FLOAT_DTYPES, "unknown")
    }
    matched = names & {w.name for w in matching.weights}
    if names and len(matched) * 2 < len(names):
        raise ModelError(
            f"only {len(matched)} of {len(names)} weights of {float_model.name} have a partner in "
            f"{quantized_model.name}: these look like unrelated models",
            hint="Load the float model that this quantized model was made from.",
        )


def model_file(model: Model) -> ModelFile:
    """What identifies a loaded file in a comparison."""
    return ModelFile(
        path=model.name,
        sha256=model.sha256,
        size_bytes=model.size_bytes,
        quant_format="+".join(quant_formats(model)),
    )


def _seen_label(seen: Sequence[bool] | None) -> str:
    if seen is None:
        return "unknown"
    if all(seen):
        return "seen"
    return "mixed" if any(seen) else "unseen"


def _feed_warnings(at: str, feed: Feed) -> list[str]:
    found = []
    for name, value in feed.items():
        if value.dtype.kind == "f":
            bad = int(value.size - np.count_nonzero(np.isfinite(value)))
            if bad:
                found.append(
                    f"sample {at}: input {name} holds {bad} NaN or infinite values of {value.size}"
                )
    return found


# -- matching by values ------------------------------------------------------------------------


def _match(
    float_model: Model, quantized_model: Model, feeds: Feeds, pins: Sequence[Pin]
) -> Matching:
    """Pairs by pins, names and edges; then by values, where tensors without partner are left."""
    matching = match_tensors(float_model, quantized_model, pins=pins)
    _check_inputs(float_model, quantized_model, matching)
    _check_related(float_model, quantized_model, matching)
    wanted = to_observe(matching)
    if not all(wanted):
        return matching
    sessions = [
        open_session(model, optimized=False, outputs=names)
        for model, names in zip((float_model, quantized_model), wanted, strict=True)
    ]
    found: tuple[dict[str, Summary], dict[str, Summary]] = ({}, {})
    some = feeds.subset(range(min(OBSERVED_SAMPLES, len(feeds))))
    for at, feed in enumerate(some):
        for session, own, names, summaries in zip(
            sessions, (feed, feed_for_quantized(matching, feed)), wanted, found, strict=True
        ):
            readable = [n for n in names if n in session.output_names]
            values = session.run(own, readable, sample=some.names[at])
            for name, value in values.items():
                if value.dtype.kind not in "fiu":
                    continue
                summary = Summary.of(value, ELEMENTS // OBSERVED_SAMPLES)
                known = summaries.get(name)
                summaries[name] = summary if known is None else known.merge(summary)
        if all(s.count >= OBSERVED_ELEMENTS for side in found for s in side.values()):
            break
    return match_tensors(
        float_model,
        quantized_model,
        pins=pins,
        observed=Observed(float_values=found[0], quantized_values=found[1]),
    )


def _counts(
    matching: Matching, compared: Iterable[str], unmatched: Sequence[Unmatched], integers: set[str]
) -> MatchCounts:
    """What became of every float tensor, once it is known which pairs could be compared."""
    tensors = set(matching.float_tensors) - integers
    matched = tensors.intersection(compared)
    fused = {u.name for u in unmatched if u.model == "float" and u.fused_into}
    fused = (fused & tensors) - matched
    return MatchCounts(
        matched=len(matched),
        fused=len(fused),
        unmatched=len(tensors) - len(matched) - len(fused),
        float_tensors=len(tensors),
    )


def _truly_fused(unmatched: Iterable[Unmatched], compared: set[str]) -> tuple[Unmatched, ...]:
    """A tensor fused into one that is not compared after all is unmatched like it."""
    return tuple(
        replace(u, fused_into="", reason=f"{u.reason}, which is not compared")
        if u.fused_into and u.fused_into not in compared
        else u
        for u in unmatched
    )


# -- the whole ---------------------------------------------------------------------------------


class _Pass:
    """Both models opened as simulated and as deployed, and what watches them sample by sample."""

    def __init__(
        self,
        float_model: Model,
        quantized_model: Model,
        feeds: Feeds,
        matching: Matching,
        *,
        padding: Padding | None,
        states: States,
        provider: str,
        actual: Dump | None,
        in_runtime: bool,
        isolated: bool,
        metrics: Sequence[TaskMetric],
    ) -> None:
        self.float_model, self.quantized_model = float_model, quantized_model
        self.matching = matching
        self.padding = padding
        pairs = {p.before for p in matching.activations} | {p.after for p in matching.activations}
        # A NaN before a Q without partner would vanish unseen.
        vanishing = {t.before for t in matching.scheme.tensors if t.kind == "activation"}
        vanishing |= matching.scheme.activations_at_run_time
        also = sorted(n for n in vanishing - pairs if n and n in quantized_model.producers)
        self.refused: list[Skipped] = []
        with ThreadPoolExecutor(1) as pool:
            # Opening is one core's work, so both kinds of session are opened at the same time.
            deployed = pool.submit(
                lambda: (
                    self._deployed(quantized_model, "quantized", provider),
                    self._deployed(float_model, "float", provider),
                )
            )
            # Not coded where every tensor is wanted once more (isolated) or looked at in numpy.
            self.runner = PairRunner(
                float_model, quantized_model, matching, also=also,
                coded=in_runtime and not isolated and padding is None,
            )  # fmt: skip
            self.deployed, self.deployed_float = deployed.result()
        self.reducer = Reducer()
        self.in_runtime = in_runtime
        self.isolation: Isolation | None = None
        if isolated:
            self.isolation = Isolation(
                float_model, quantized_model, self.runner, padding=padding, in_runtime=in_runtime
            )
        self.watches = {p.name: TensorWatch(p, float_model, padding) for p in self.runner.pairs}
        self.outputs: dict[str, OutputWatch] = {}
        for name in self.runner.outputs:
            watch = self.watches.get(name)
            scale = watch.pair.qparams.scale if watch and watch.pair.qparams else None
            step = float(np.max(scale)) if scale is not None else None
            self.outputs[name] = OutputWatch(name, watch, step, padding)
        compared = {name: watch.pair for name, watch in self.watches.items()}
        self.layouts = OutputLayouts(quantized_model, matching, self.runner.outputs, compared)
        self.task = TaskWatch(feeds.labels) if feeds.labels else None
        self.metrics = [MetricWatch(metric, padding) for metric in metrics]
        theirs = [(matching.outputs[o], matching.inputs[i]) for o, i in states]
        self.own_state, self.own_deployed = Carried(states), Carried(states)
        self.their_state, self.their_deployed = Carried(theirs), Carried(theirs)
        self.traces = (
            NonFiniteTrace(float_model, "float", padding),
            NonFiniteTrace(quantized_model, "quantized", padding),
        )
        self.skipped = [*self.refused] + [
            Skipped(name=name, kind="output", model="", reason=reason)
            for name, reason in self.runner.unreadable.items()
        ]
        self.skipped += [
            Skipped(name=name, kind="tensor", model="", reason=reason)
            for name, reason in self.runner.left_out.items()
            if name not in self.runner.outputs and name in self.runner.not_floating
            and name in matching.float_tensors
        ]  # fmt: skip
        # Outputs that cannot be compared on some sample, with the reason: no figure leaves it out.
        self.unusable: dict[str, str] = {}
        self.first: tuple[Feed, Feed] | None = None
        # The sample on which deployed outputs are furthest from the simulated ones.
        self.furthest = 0.0
        self.furthest_feed: Feed = {}
        self.furthest_simulated: dict[str, NDArray[Any]] = {}
        self.furthest_rows = 1
        self.furthest_mask: NDArray[np.bool_] | None = None
        self.actual = actual
        self.devices: dict[str, DeviceWatch] = {}
        self.warnings: list[str] = []
        if actual is not None:
            self._meet(actual)

    def _deployed(self, model: Model, side: str, provider: str) -> Session | None:
        """A model as deployed; None where the runtime refuses it so, and only so."""
        try:
            return open_session(model, optimized=True, provider=provider)
        except (RunError, ModelError) as error:
            if provider != CPU:
                raise
            reason = f"all figures are of simulated runs: {error}"
            self.refused.append(
                Skipped(name="deployed figures", kind="figure", model=side, reason=reason)
            )
            return None

    def _meet(self, dump: Dump) -> None:
        """Which tensor each key of the dump is; the quantized model's names come first."""
        integers = {t.after: t.quantized for t in self.matching.scheme.tensors if t.after}
        names: dict[str, str] = {}
        for watch in self.watches.values():
            pair = watch.pair
            output = self.matching.outputs.get(pair.name, "")
            for name in (pair.after, output, integers.get(pair.after, "")):
                if name:
                    names.setdefault(name, pair.name)
        for pair_name in self.watches:
            names.setdefault(pair_name, pair_name)
        met = match_names(dump, list(names))
        if not met.found:
            raise FeedError(
                f"the dump from the device holds {counted(len(dump.names), 'tensor')}, none of "
                f"which is compared here: {listed([printable(n, 60) for n in dump.names])}",
                hint="Name each array like a tensor of the float or the quantized model; "
                f"nearest to the first one: {nearest(dump.names[0], list(names))}.",
            )
        self.warnings += [*dump.notes, *met.notes]
        self.skipped += met.unknown
        for tensor, key in met.found.items():
            name = names[tensor]
            if name not in self.devices:
                self.devices[name] = DeviceWatch(name, self.watches[name].pair.after, key)

    def learn(self, feeds: Feeds) -> None:
        """Shows the padding which axes follow the mask."""
        if self.padding is None:
            return
        masks = [self.padding.mask_of(f, feeds.names[at]) for at, f in enumerate(feeds)]
        for at in self.padding.telling(masks):
            values, _ = self.runner.run(feeds[at], feeds.names[at])
            self.padding.learn(masks[at], values)

    def sample(self, at: int, feed: Feed, name: str, rows: int) -> None:
        """Runs everything on one sample and lets go of its tensors."""
        theirs = feed_for_quantized(self.matching, feed)
        own_feed = self.own_state.into(feed, name)
        their_feed = self.their_state.into(theirs, name)
        reference, actual = self.runner.run_values(own_feed, name, their_feed)
        if self.padding is not None:
            self.padding.use(self.padding.mask_of(feed, name))
        self.warnings += _feed_warnings(name, feed)
        # What may be bad, by model.
        also = self.runner.also
        suspects = (
            self.reducer.suspects(reference, also[0]),
            self.reducer.suspects(actual, also[1]),
        )
        watches = self.watches.values() if self.in_runtime else ()
        reduced = self.reducer.sums(watches, reference, actual)
        for pair in self.runner.pairs:
            if pair.name in reference and pair.after in actual:
                sums = reduced.get(pair.name)
                if sums is not None:
                    ours, others = self.watches[pair.name].take(sums)
                else:
                    before = actual.get(pair.before) if pair.before else None
                    ours, others = self.watches[pair.name].add(
                        reference[pair.name], before, actual[pair.after], reference
                    )
                if ours:
                    suspects[0].add(pair.name)
                if others:
                    suspects[1].update(n for n in (pair.before, pair.after) if n)
        if self.isolation is not None:
            self.isolation.add(own_feed, their_feed, reference, actual, name)
        # Only a few are looked at after this.
        reference.keep({*self.runner.outputs, *suspects[0], *own_feed, *self.devices})
        watched = {self.watches[n].pair.after for n in self.devices}
        actual.keep({*self.runner.outputs.values(), *suspects[1], *their_feed, *watched})
        own_deployed = self.own_deployed.into(feed, name)
        their_deployed = self.their_deployed.into(theirs, name)
        if self.first is None:
            self.first = (own_deployed, their_deployed)
        shipped_float: dict[str, NDArray[Any]] = {}
        shipped: dict[str, NDArray[Any]] = {}
        if self.deployed_float is not None and self.deployed is not None:
            shipped_float = self.deployed_float.run(own_deployed, sample=name)
            shipped = self.deployed.run(their_deployed, sample=name)
        for output, other in self.runner.outputs.items():
            learned = self.layouts.fit(output, reference[output].shape, actual[other].shape)
            self.warnings += [learned] if learned else []
        simulated = {n: self.layouts.as_float(n, actual[o]) for n, o in self.runner.outputs.items()}
        deployed = {
            n: self.layouts.as_float(n, shipped[o])
            for n, o in self.runner.outputs.items()
            if o in shipped
        }
        furthest = 0.0
        for output, watch in self.outputs.items():
            arrays = (reference[output], simulated[output])
            why = self.unusable.get(output) or _not_comparable(*arrays)
            if why:
                self.unusable[output] = why
                continue
            steps = watch.add(*arrays, shipped_float.get(output), deployed.get(output), rows=rows)
            flips = 0
            if output in deployed:
                flips = watch.flips_between(simulated[output], deployed[output], rows)
            totals = watch.simulated[-1]
            if totals.nonfinite_reference:
                suspects[0].add(output)
            if totals.nonfinite_actual:
                suspects[1].add(self.runner.outputs[output])
            if steps > DIFFERENT_STEPS or flips:
                furthest = max(furthest, steps, float(flips > 0))
        if furthest > self.furthest:
            self.furthest, self.furthest_feed = furthest, their_deployed
            self.furthest_simulated, self.furthest_rows = simulated, rows
            if self.padding is not None:
                self.furthest_mask = self.padding.mask_of(feed, name)
        if self.task is not None:
            self.task.add(rows, {n: reference[n] for n in self.runner.outputs}, simulated)
        self._measure(at, reference, simulated, shipped_float, deployed)
        self._devices(at, reference, actual, deployed)
        for carried, outputs in (
            (self.own_state, reference), (self.their_state, actual),
            (self.own_deployed, shipped_float), (self.their_deployed, shipped),
        ):  # fmt: skip
            if outputs:
                carried.keep(outputs)
        fresh = [
            trace.count({n: values[n] for n in names if has_nonfinite(values[n])}, name)
            for trace, values, names in zip(self.traces, (reference, actual), suspects, strict=True)
        ]
        del reference, actual
        if any(fresh):
            further = [
                trace.see(ran, name, names) if is_fresh else ()
                for trace, is_fresh, ran, names in zip(
                    self.traces, fresh, (own_feed, their_feed), suspects, strict=True
                )
            ]
            if any(further):
                self.runner.look_at(*further)

    def _measure(
        self,
        at: int,
        reference: Mapping[str, NDArray[Any]],
        simulated: Mapping[str, NDArray[Any]],
        shipped_float: Mapping[str, NDArray[Any]],
        deployed: Mapping[str, NDArray[Any]],
    ) -> None:
        """One sample of every task metric."""
        mask = None if self.padding is None else self.padding.mask
        own = {n: reference[n] for n in self.runner.outputs}
        usable = {n: v for n, v in simulated.items() if n not in self.unusable}
        for watch in self.metrics:
            watch.add(at, own, usable, shipped_float, deployed, mask)

    def measured(self) -> tuple[TaskFigure, ...]:
        """One figure per task metric; metrics without one go to `skipped`."""
        found = []
        for watch in self.metrics:
            figure = watch.figure()
            if figure is not None:
                found.append(figure)
                if math.isnan(figure.float_figure):
                    self.warnings.append(
                        f"{figure.metric}: the float model's own outputs give no figure on these "
                        "samples (nothing counts, or NaN)"
                    )
                continue
            why = self.unusable.get(watch.lacks, "it has no partner that can be read")
            reason, name = f"output {watch.lacks}: {why}", watch.metric.text
            self.skipped.append(Skipped(name=name, kind="figure", model="", reason=reason))
        return tuple(found)

    def _devices(
        self,
        at: int,
        reference: Mapping[str, NDArray[Any]],
        actual: Mapping[str, NDArray[Any]],
        deployed: Mapping[str, NDArray[Any]],
    ) -> None:
        if self.actual is None:
            return
        keys = {d.device_name for d in self.devices.values()}
        dumped = self.actual.tensors(at, keys)
        for name, device in self.devices.items():
            if device.device_name in dumped and name in reference:
                watch = self.watches[name]
                self._add_device(
                    device,
                    reference[name],
                    real_values(watch.pair, actual[watch.pair.after]),
                    deployed.get(name),
                    dumped[device.device_name],
                )

    def _add_device(
        self,
        device: DeviceWatch,
        reference: NDArray[Any],
        simulated: NDArray[Any],
        deployed: NDArray[Any] | None,
        dumped: NDArray[Any],
    ) -> None:
        """One sample of one dumped tensor, without padding where its layout is ours."""
        qparams = self.watches[device.name].qparams
        fit = fitted(dumped, reference.shape)
        if self.padding is None or fit is None or simulated.shape != reference.shape:
            device.add(reference, simulated, deployed, dumped, qparams)
            return
        sides = [reference, simulated, fit[0]] + ([] if deployed is None else [deployed])
        parts = (self.padding.parts(device.name, side) for side in sides)
        for first, second, third, *fourth in zip(*parts, strict=True):
            device.add(first, second, fourth[0] if fourth else None, third, qparams)

    def device_records(self) -> tuple[DeviceError, ...]:
        """One per dumped tensor that could be compared; the others go to `skipped`."""
        found = []
        for watch in self.devices.values():
            record = watch.error()
            self.warnings += watch.notes
            if isinstance(record, DeviceError):
                found.append(record)
            else:
                self.skipped.append(record)
        return tuple(found)

    def close(self) -> None:
        """Ends the threads that reduce."""
        self.reducer.close()
        if self.isolation is not None:
            self.isolation.close()

    def with_isolated(self, record: ActivationError) -> ActivationError:
        """A record with what its node does wrong by itself, where that was computed."""
        totals = self.watches[record.name].accumulated
        if self.isolation is None or totals is None:
            return record
        return replace(
            record,
            isolated_sqnr_db=self.isolation.isolated_sqnr_db(record.name),
            added_sqnr_db=self.isolation.added_sqnr_db(record.name, float(totals.signal.sum())),
        )

    def latency(self) -> Latency | None:
        """Both models as deployed, on the first sample."""
        if self.first is None or self.deployed_float is None or self.deployed is None:
            return None
        a, b = time_sessions([self.deployed_float, self.deployed], list(self.first))
        return Latency(
            float_seconds=a.median_seconds,
            quantized_seconds=b.median_seconds,
            float_spread_seconds=a.spread_seconds,
            quantized_spread_seconds=b.spread_seconds,
            runs=a.runs,
        )

    def causes(self, progress: Progress) -> dict[str, tuple[str, str]]:
        """The graph transformer and a sentence, by output whose deployed values differ."""
        names = [n for n, w in self.outputs.items() if w.differs and n not in self.unusable]
        if not names or not self.furthest_feed:
            return {}
        if self.padding is not None and self.furthest_mask is not None:
            self.padding.use(self.furthest_mask)

        def differs(values: Mapping[str, NDArray[Any]]) -> bool:
            for name in names:
                watch, before = self.outputs[name], self.furthest_simulated[name]
                after = self.layouts.as_float(name, values[self.runner.outputs[name]])
                if watch.steps(watch.apart_by(before, after)) > DIFFERENT_STEPS:
                    return True
                if watch.flips_between(before, after, self.furthest_rows):
                    return True
            return False

        cause = find_transformer(
            self.quantized_model,
            self.furthest_feed,
            [self.runner.outputs[n] for n in names],
            differs=differs,
            progress=progress,
        )
        if cause is None:
            return {}
        sentence = cause.sentence
        if cause.transformers:
            named = ", ".join(f'"{t}"' for t in cause.transformers[:4])
            sentence += f": disabled_optimizers=[{named}] of an InferenceSession avoids it"
        return dict.fromkeys(names, (cause.name, sentence))

    def batch(
        self, feeds: Feeds, states: States, mask: str, progress: Progress
    ) -> BatchEffect | Skipped | None:
        """Alone against in a batch, where ranges are found at run time."""
        if QuantFormat.DYNAMIC not in self.matching.scheme.formats:
            return None
        if self.deployed_float is None or self.deployed is None:
            return None  # said where the session was refused
        if states:
            reason = "each sample depends on the one before it"
            return Skipped(name="batch effect", kind="figure", model="", reason=reason)
        outputs = {n: o for n, o in self.runner.outputs.items() if n not in self.unusable}
        return measure_batch(
            BatchSide(
                session=self.deployed_float, feed_of=dict, outputs={n: n for n in outputs}
            ),
            BatchSide(
                session=self.deployed,
                feed_of=lambda feed: feed_for_quantized(self.matching, feed),
                outputs=outputs,
            ),
            self.float_model, self.quantized_model, feeds, mask=mask, progress=progress,
        )  # fmt: skip


def _not_comparable(reference: NDArray[Any], actual: NDArray[Any]) -> str:
    """Why two arrays of an output have no figures; "" where they have."""
    if reference.dtype.kind != "f":
        return f"it holds {_kind(reference)} values, no floating-point ones"
    if actual.dtype.kind != "f":
        return f"the quantized model gives {_kind(actual)} values without scale in its place"
    if reference.shape != actual.shape:
        return f"shapes differ: float {reference.shape}, quantized {actual.shape}"
    return ""


def _kind(values: NDArray[Any]) -> str:
    return "string" if values.dtype.kind in "OUS" else str(values.dtype.name)


# NaN and infinity are counted and told; numpy need not warn of them as well.
@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def compare_models(
    float_model: Model,
    quantized_model: Model,
    feeds: Feeds,
    *,
    seen: Sequence[bool] | None = None,
    pins: Sequence[Pin] = (),
    mask: str = "",
    states: States = (),
    provider: str = CPU,
    actual: Dump | None = None,
    measure_latency: bool = True,
    explain_deployed: bool = True,
    in_runtime: bool = True,
    isolated: bool = False,
    metrics: Sequence[TaskMetric] = (),
    progress: Progress = no_progress,
) -> Comparison:
    """Every matched weight, activation and output of two models, over all feeds.

    Activations are compared with optimisations off (simulated), outputs also with all
    optimisations on (deployed; both models). One sample's activations are held at a time.

    Args:
        float_model: the float model.
        quantized_model: its quantized twin.
        feeds: at least one.
        seen: for each feed whether it was used in calibration; None where that is unknown.
        pins: matches set by hand; they come before every rule.
        mask: the input whose zeros mark padding, which every figure then leaves out; "" for none.
        states: (output, input) pairs of the float model through which each sample gets what the
            same model (float or quantized, simulated or deployed) gave for the one before.
        provider: ONNX Runtime's execution provider of the deployed runs.
        actual: tensors dumped from a device for these feeds.
        measure_latency: time both models, deployed, on the first feed.
        explain_deployed: where deployed and simulated outputs differ, look for the graph
            transformer that makes the difference, which opens a few sessions more.
        in_runtime: sums are made where the tensors are (`twin`); else all of them in numpy, which
            takes longer and gives the same to 1e-6.
        isolated: give every activation its `isolated_sqnr_db` and `added_sqnr_db`, which takes
            about as long again.
        metrics: what else the outputs are judged by, made for these feeds.
        progress: see `runtime.Progress`.

    Raises:
        ModelError: the two files cannot be a float model and its quantized twin.
        FeedError: `mask` or `states` name no such tensors, or values that do not fit; or outputs
            that do not suit a metric.
        RunError: the runtime refuses a model, a feed or the execution provider.
    """
    check_pair(float_model, quantized_model)
    file = model_file(float_model)
    float_model, told = _comparable(float_model, quantized_model, feeds)
    padding = Padding(float_model, mask) if mask else None
    check_states(states, float_model)
    progress(0.0, "matching tensors")
    matching = _match(float_model, quantized_model, feeds, pins)
    progress(0.03, "opening sessions")
    # The runtime judges the graphs before any of their numbers are computed with.
    run = _Pass(
        float_model, quantized_model, feeds, matching,
        padding=padding, states=states, provider=provider, actual=actual, in_runtime=in_runtime,
        isolated=isolated, metrics=metrics,
    )  # fmt: skip
    progress(0.06, "comparing weights")
    weights, lost_weights = compare_weights(matching, quantized_model)
    _check_pinned(pins, lost_weights)
    run.learn(feeds)
    warnings = [*float_model.notes, *told, *matching.notes, *feeds.notes]
    warnings += [c.note for c in matching.conversions.values() if c.note]
    warnings += [
        f"{model.name} holds float16 tensors: each is rounded where it is looked at, while outputs "
        "are what the runtime gives when nothing else is, which rounds less often"
        for model, rounded in zip((float_model, quantized_model), run.runner.rounded, strict=True)
        if rounded
    ]
    for at, feed in enumerate(feeds):
        progress(0.1 + 0.75 * at / len(feeds), f"comparing sample {at + 1} of {len(feeds)}")
        run.sample(at, feed, feeds.names[at], feeds.rows[at])
    run.close()
    latency = None
    if measure_latency:
        progress(0.86, "timing both models")
        latency = run.latency()
    effect = run.batch(feeds, states, mask, part_of(progress, 0.88, 0.92))
    causes = {}
    if explain_deployed and provider == CPU:
        causes = run.causes(part_of(progress, 0.92, 0.99))

    output_names = frozenset(o.name for o in float_model.outputs)
    results = [w.error(output_names) for w in run.watches.values()]
    activations = tuple(run.with_isolated(r) for r in results if isinstance(r, ActivationError))
    outputs = {
        n: w.error(feeds.names, seen, cause=causes.get(n, ("", ""))[0])
        for n, w in run.outputs.items()
        if n not in run.unusable
    }
    device = run.device_records()
    measured = run.measured()
    warnings += run.warnings
    warnings += [
        _deployed_warning(run.outputs[name], record, len(feeds), causes.get(name, ("", ""))[1])
        for name, record in outputs.items()
        if record.deployed_differs
    ]
    if isinstance(effect, BatchEffect):
        warnings += batch_warnings(effect, {n: w.peak for n, w in run.outputs.items()})
    found = tuple(trace.records() for trace in run.traces)
    warnings += [
        nonfinite_warning(records, who, feeds.names)
        for records, who in zip(found, ("the float model", "the quantized model"), strict=True)
        if records
    ]
    task = run.task.task() if run.task is not None else None
    if run.task is not None and task is None:
        warnings.append("labels are given, but no output has as many classes: no top-1 figures")
    likely = likely_states(float_model) if not states and len(feeds) > 1 else ()
    if likely:
        warnings.append(
            f"{', '.join(f'{output}={given}' for output, given in likely)}: an output that looks "
            "like the state of an input; each sample takes it from its feed, so errors do not "
            "build up over time unless it is named as a state"
        )
    _check_pinned(pins, (r for r in results if isinstance(r, Unmatched)))
    warnings += _shared_pins(pins, (*activations, *weights))
    figures = {a.name: a.accumulated_sqnr_db for a in activations}
    weights = _explained(weights, matching, float_model, quantized_model, figures)
    compared = {a.name for a in activations} | {w.name for w in weights}
    unmatched = _truly_fused(
        (
            *matching.unmatched,
            *lost_weights,
            *(
                Unmatched(name=n, kind="activation", model="float", reason=reason)
                for n, reason in run.runner.left_out.items()
                if n not in run.runner.not_floating
            ),
            *(r for r in results if isinstance(r, Unmatched)),
        ),
        compared,
    )
    progress(1.0, "compared")
    return Comparison(
        float_model=file,
        quantized_model=model_file(quantized_model),
        samples=len(feeds),
        sample_names=tuple(feeds.names),
        random_feeds=feeds.random,
        seen=_seen_label(seen),
        weights=weights,
        activations=activations,
        outputs=tuple(outputs.values()),
        unmatched=unmatched,
        task=task,
        latency=latency,
        warnings=tuple(dict.fromkeys(warnings)),
        counts=_counts(matching, compared, unmatched, run.runner.not_floating),
        skipped=tuple(dict.fromkeys((
            *matching.skipped, *run.skipped, *_unjudged(run.unusable),
            *_without_figures(matching, padding),
            *((effect,) if isinstance(effect, Skipped) else ()),
        ))),
        not_observed=matching.not_observed,
        nonfinite=tuple(r for records in found for r in records),
        provider=provider,
        metrics=measured,
        mask=mask,
        states=tuple(states),
        batch=effect if isinstance(effect, BatchEffect) else None,
        device=device,
        pins=tuple(pins),
    )  # fmt: skip


def _comparable(
    float_model: Model, quantized_model: Model, feeds: Feeds
) -> tuple[Model, tuple[str, ...]]:
    """What the quantized model's inner tensors are set beside, and what has to be said of it.

    Outputs are judged against the same model, which has to be the float model but for rounding.
    """
    equalized = comparable_float(float_model, quantized_model)
    if equalized is float_model:
        return float_model, ()
    checked = feeds.subset(range(min(len(feeds), CHECKED_FEEDS)))
    try:
        found = equal_db(float_model, equalized, checked)
    except QuantizationError as error:
        return float_model, (
            f"the file says that it was equalized, but {error.message}: inner tensors and weights "
            "are compared with the float model as it is, which says little",
        )
    return equalized, (
        "the file was made of the float model with equalized channels: inner tensors and weights "
        "are compared with that, whose outputs are the float model's to "
        f"{min(found.values(), default=math.inf):.0f} dB",
    )


def _check_pinned(pins: Iterable[Pin], lost: Iterable[Unmatched]) -> None:
    """A match set by hand that gives no figure is a mistake to be told, not a tensor to be lost."""
    partners = {p.float_name: p.quantized_name for p in pins if p.quantized_name is not None}
    for record in lost:
        if record.model == "float" and record.name in partners:
            raise ModelError(
                f"{record.name} cannot be compared with {partners[record.name]}: {record.reason}",
                hint="Pin it to a tensor of the same shape, or leave the match to the rules.",
            )


def _shared_pins(
    pins: Iterable[Pin], records: Sequence[ActivationError | WeightError]
) -> Iterable[str]:
    """Tells where a match set by hand takes a partner that another tensor has as well."""
    by_name = {r.name: r for r in records}
    for pin in pins:
        mine = by_name.get(pin.float_name)
        if mine is None or pin.quantized_name is None:
            continue
        others = [
            r.name for r in records if r.quantized_name == mine.quantized_name and r is not mine
        ]
        if others:
            yield (
                f"{mine.quantized_name} is pinned to {mine.name} and is compared with "
                f"{listed(others)} as well: one of the matches is likely wrong"
            )


def _unjudged(outputs: Mapping[str, str]) -> Iterable[Skipped]:
    return (
        Skipped(name=n, kind="output", model="", reason=reason) for n, reason in outputs.items()
    )


def _without_figures(matching: Matching, padding: Padding | None) -> Iterable[Skipped]:
    for name in sorted(matching.scheme.activations_at_run_time):
        reason = "its scale is found at run time: no local error and no saturation"
        yield Skipped(name=name, kind="figure", model="quantized", reason=reason)
    for name, reason in padding.not_applied.items() if padding is not None else ():
        yield Skipped(name=name, kind="figure", model="", reason=f"mask not applied: {reason}")


def _deployed_warning(watch: OutputWatch, record: OutputError, samples: int, cause: str) -> str:
    steps = watch.steps(watch.apart)
    unit = "steps of its scale" if watch.output_step is not None else "of 255 steps of its range"
    flips = (
        f", and the largest element changes place {record.deployed_flips} times in {samples} "
        f"sample{'' if samples == 1 else 's'}"
        if record.deployed_flips
        else ""
    )
    return (
        f"output {record.name}: simulated and deployed values differ by up to {steps:.3g} {unit}"
        f"{flips}" + (f"; {cause}" if cause else "")
    )
